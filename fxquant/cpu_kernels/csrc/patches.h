// Convolutions: activations laid out so that a patch is a table of offsets, rows of codes gathered from them, float products
// that read patches where they lie, and results turned round. Included into each isa_*.cpp after products.h.

// from [rows][columns], rows `from_stride` elements apart, into to [columns][rows], `to_stride` apart. Up to 15 bytes are read
// past the end of each row of `from`; nothing outside of `to` is written. Few columns at a time: rows of `to` are often a power
// of two apart, and so many of them do not fit into one set of the L1 cache.
template <class E>
void turn(const E* from, int64_t from_stride, int64_t rows, int64_t columns, E* to, int64_t to_stride) {
    constexpr int64_t T = Lane16<E>::kCount;
    for (int64_t c = 0; c < columns; c += T) {
        const int64_t count = columns - c < T ? columns - c : T;
        for (int64_t r = 0; r < rows; r += T) {
            const int64_t n = rows - r < T ? rows - r : T;
            const E* at = from + r * from_stride + c;
            const auto line = [&](int64_t i) { return load<typename Lane16<E>::V>(at + i * from_stride); };
            if (n == T) {
                turn_tile<E>(line, n, count, to + c * to_stride + r, to_stride);
                continue;
            }
            E part[T * T];
            turn_tile<E>(line, n, count, part, T);
            for (int64_t j = 0; j < count; ++j) std::memcpy(to + (c + j) * to_stride + r, part + j * T, n * sizeof(E));
        }
    }
}

// ---- laying out

// n values, as staged codes of one factor or as floats. Of NaN and infinity the code does not matter: the sample's scale is NaN.
template <class Isa, Float T, class Out>
void convert_line(const char* from, int64_t n, float factor, Out* to) {
    constexpr int W = Isa::kWidth;
    const auto converted = [&](typename Isa::F v) {
        if constexpr (sizeof(Out) == sizeof(float) && std::is_same_v<Out, float>) {
            return v;
        } else {
            return __builtin_convertvector(saturated_codes<Isa>(v, factor) + Isa::kCodeOffset, typename Isa::CodeVector);
        }
    };
    int64_t k = 0;
    for (; k + W <= n; k += W) store(to + k, converted(load_float<Isa, T>(from + k * size_of(T))));
    if (k < n) {
        const auto last = converted(load_tail<Isa, T>(from + k * size_of(T), n - k));
        std::memcpy(to + k, &last, (n - k) * sizeof(Out));
    }
}

template <class Out>
inline void split_phases(const Layout& l, const Out* line, Out* to) {  // line: padded, size[2] elements
    for (int64_t p = 0; p < l.phases; ++p) {
        for (int64_t i = p, j = 0; i < l.size[2]; i += l.step, ++j) to[p * l.phase_length + j] = line[i];
    }
}

// One padded line from `values`, the elements of x in it that are inside (converted); `to` has phases * phase_length elements.
template <class Out, class Fill>
inline void lay_line(const Layout& l, bool inside, Out zero, Out* to, Out* room, Fill fill) {
    const int64_t left = l.pad[2] > 0 ? (l.pad[2] < l.size[2] ? l.pad[2] : l.size[2]) : 0;
    const int64_t end = l.pad[2] + l.in[2] < l.size[2] ? l.pad[2] + l.in[2] : l.size[2];
    Out* line = l.step == 1 ? to : room;
    if (!inside || end <= left) {
        for (int64_t i = 0; i < l.size[2]; ++i) line[i] = zero;
    } else {
        for (int64_t i = 0; i < left; ++i) line[i] = zero;
        fill(line + left, left - l.pad[2], end - left);
        for (int64_t i = end; i < l.size[2]; ++i) line[i] = zero;
    }
    if (l.step != 1) split_phases(l, line, to);
}

inline bool is_used(const Layout& l, int axis, int64_t index) {
    return l.stride[axis] > 64 || (l.used[axis] >> (index % l.stride[axis]) & 1) != 0;
}

// Units of contiguous x: channels of samples. `room`: size[2] elements.
template <class Isa, Float T, class Out>
void lay_channels(const Layout& l, const char* x, const float* factors, Out zero, Out* to, int64_t unit0, int64_t unit1, Out* room) {
    const int64_t plane = l.in[0] * l.in[1] * l.in[2];
    for (int64_t unit = unit0; unit < unit1; ++unit) {
        const char* from = x + unit * plane * size_of(T);
        Out* out = to + unit * l.channel;
        const float factor = factors == nullptr ? 1.0f : factors[unit / l.channels];
        for (int64_t d = 0; d < l.size[0]; ++d) {
            for (int64_t h = 0; h < l.size[1]; ++h, out += l.line) {
                if (!is_used(l, 0, d) || !is_used(l, 1, h)) continue;
                const int64_t id = d - l.pad[0], ih = h - l.pad[1];
                const bool inside = id >= 0 && id < l.in[0] && ih >= 0 && ih < l.in[1];
                const char* line = from + (id * l.in[1] + ih) * l.in[2] * size_of(T);
                lay_line(l, inside, zero, out, room, [&](Out* at, int64_t first, int64_t n) {
                    convert_line<Isa, T, Out>(line + first * size_of(T), n, factor, at);
                });
            }
        }
    }
}

// Units of channels-last x: lines of samples. `room`: (in[2] + 1) * channels + 16 elements, and channels * size[2] more.
template <class Isa, Float T, class Out>
void lay_lines(const Layout& l, const char* x, const float* factors, Out zero, Out* to, int64_t unit0, int64_t unit1, Out* room) {
    const int64_t lines = l.size[0] * l.size[1];
    Out* turned = room + (l.in[2] + 1) * l.channels + 16;
    for (int64_t unit = unit0; unit < unit1; ++unit) {
        if (!is_used(l, 0, unit % lines / l.size[1]) || !is_used(l, 1, unit % l.size[1])) continue;
        const int64_t sample = unit / lines, id = unit % lines / l.size[1] - l.pad[0], ih = unit % l.size[1] - l.pad[1];
        const bool inside = id >= 0 && id < l.in[0] && ih >= 0 && ih < l.in[1];
        if (inside) {
            const char* from = x + ((sample * l.in[0] + id) * l.in[1] + ih) * l.in[2] * l.channels * size_of(T);
            const float factor = factors == nullptr ? 1.0f : factors[sample];
            convert_line<Isa, T, Out>(from, l.in[2] * l.channels, factor, room);
            turn(room, l.channels, l.in[2], l.channels, turned, l.in[2]);
        }
        Out* spare = turned + l.channels * l.in[2];
        for (int64_t c = 0; c < l.channels; ++c) {
            Out* out = to + (sample * l.channels + c) * l.channel + unit % lines * l.line;
            lay_line(l, inside, zero, out, spare, [&](Out* at, int64_t first, int64_t n) {
                std::memcpy(at, turned + c * l.in[2] + first, n * sizeof(Out));
            });
        }
    }
}

template <class Isa, class Out>
void lay(const Layout& l, const void* data, Float type, const float* factors, void* out, int64_t unit0, int64_t unit1, void* spare) {
    const char* x = static_cast<const char*>(data);
    Out* to = static_cast<Out*>(out);
    Out* room = static_cast<Out*>(spare);
    const Out zero = static_cast<Out>(std::is_same_v<Out, float> ? 0 : Isa::kCodeOffset);
    const auto run = [&](auto channels, auto lines) {
        return l.channels_last ? lines(l, x, factors, zero, to, unit0, unit1, room)
                               : channels(l, x, factors, zero, to, unit0, unit1, room);
    };
    switch (type) {
        case Float::f32: return run(lay_channels<Isa, Float::f32, Out>, lay_lines<Isa, Float::f32, Out>);
        case Float::bf16: return run(lay_channels<Isa, Float::bf16, Out>, lay_lines<Isa, Float::bf16, Out>);
        case Float::f16: return run(lay_channels<Isa, Float::f16, Out>, lay_lines<Isa, Float::f16, Out>);
    }
}

// Rows of x into staged codes, all with one factor.
template <class Isa>
void quantize_by(const Rows& x, int64_t row0, int64_t row1, float factor, void* staged, int64_t stride) {
    for (int64_t r = row0; r < row1; ++r) {
        const char* row = static_cast<const char*>(x.data) + r * x.stride * size_of(x.type);
        auto* to = reinterpret_cast<typename Isa::Code*>(static_cast<char*>(staged) + r * stride);
        switch (x.type) {
            case Float::f32: convert_line<Isa, Float::f32>(row, x.width, factor, to); break;
            case Float::bf16: convert_line<Isa, Float::bf16>(row, x.width, factor, to); break;
            case Float::f16: convert_line<Isa, Float::f16>(row, x.width, factor, to); break;
        }
    }
}

// ---- reading patches

// Runs of rows whose patches lie next to each other: body(row, address of the first one's patch, rows of the run).
template <class E, class Body>
inline void for_runs(const Patches& p, int64_t row0, int64_t row1, Body body) {
    for (int64_t row = row0; row < row1;) {
        const int64_t w = row % p.out[2], line = row / p.out[2];
        const int64_t h = line % p.out[1], d = line / p.out[1] % p.out[0], sample = line / p.out[1] / p.out[0];
        const int64_t n = row1 - row < p.out[2] - w ? row1 - row : p.out[2] - w;
        const E* at = static_cast<const E*>(p.data) + sample * p.sample + d * p.step[0] + h * p.step[1] + w * p.step[2];
        body(row, at, n);
        row += n;
    }
}

// Rows of staged codes; `staged` is where row0 goes.
template <class Isa>
void stage_patches(const Patches& p, int64_t row0, int64_t row1, void* staged, int64_t stride) {
    using E = std::conditional_t<sizeof(typename Isa::Code) == 1, uint8_t, uint16_t>;
    constexpr int64_t T = Lane16<E>::kCount;
    const int64_t step = stride / static_cast<int64_t>(sizeof(E));
    for_runs<E>(p, row0, row1, [&](int64_t row, const E* at, int64_t n) {
        for (int64_t r = 0; r < n; r += T) {
            E* to = static_cast<E*>(staged) + (row + r - row0) * step;
            for (int64_t k = 0; k < p.count; k += T) {  // the table of offsets is padded with zeros
                const int64_t* offset = p.offsets + k;
                turn_tile<E>([&](int64_t i) { return load<typename Lane16<E>::V>(at + r + offset[i]); }, T, n - r, to + k, step);
            }
        }
    });
}

// R patches x NV vectors of columns over `depth` k: tile [depth][64] floats. acc [R][64] is added to.
template <class Isa, int R, int NV>
FXQUANT_TILE void patch_tile(const float* const* patch, const int64_t* offsets, const float* tile, int64_t depth, float* acc) {
    using F = typename Isa::F;
    constexpr int W = Isa::kWidth;
    F sum[R][NV];
    const float* at[R];
    FXQUANT_UNROLL for (int r = 0; r < R; ++r) at[r] = patch[r];
    FXQUANT_UNROLL for (int r = 0; r < R; ++r) FXQUANT_UNROLL for (int j = 0; j < NV; ++j)
        sum[r][j] = load<F>(acc + r * kPanel + j * W);
    for (int64_t k = 0; k < depth; ++k) {
        const int64_t offset = offsets[k];
        F b[NV];
        FXQUANT_UNROLL for (int j = 0; j < NV; ++j) b[j] = load<F>(tile + k * kPanel + j * W);
        FXQUANT_UNROLL for (int r = 0; r < R; ++r) {
            const F a = Isa::splat(at[r][offset]);
            FXQUANT_UNROLL for (int j = 0; j < NV; ++j) sum[r][j] = Isa::fma(a, b[j], sum[r][j]);
        }
    }
    FXQUANT_UNROLL for (int r = 0; r < R; ++r) FXQUANT_UNROLL for (int j = 0; j < NV; ++j)
        store(acc + r * kPanel + j * W, sum[r][j]);
}

template <class Isa, int NV, int R = Isa::kFloatTall>
inline void patch_tiles(int64_t rows, const float* const* patch, const int64_t* offsets, const float* tile, int64_t depth, float* acc) {
    if (rows == R) return patch_tile<Isa, R, NV>(patch, offsets, tile, depth, acc);
    if constexpr (R > 1) patch_tiles<Isa, NV, R - 1>(rows, patch, offsets, tile, depth, acc);
}

template <class Isa>
void patch_product(const float* const* patches, int64_t rows, const int64_t* offsets, const float* tile, int64_t depth,
                   int64_t columns, float* acc) {
    constexpr int64_t W = Isa::kWidth, NV = Isa::kFloatVectors;
    for_groups(0, rows, Isa::kFloatTall, [&](int64_t, int64_t row, int64_t height) {
        int64_t c = 0;
        for (; c + (NV - 1) * W < columns; c += NV * W) {
            patch_tiles<Isa, NV>(height, patches + row, offsets, tile + c, depth, acc + row * kPanel + c);
        }
        for (; c < columns; c += W) {
            patch_tiles<Isa, 1>(height, patches + row, offsets, tile + c, depth, acc + row * kPanel + c);
        }
    });
}

// One task of the float product: a panel and some rows. Compiled once, not for every width of codes.
template <class Isa>
struct PatchTask {
    PatchTask(const Patches& p, const CodedWeight& w, int64_t panel, int64_t row0, int64_t row1)
        : offsets(p.offsets), rows(row1 - row0), columns(epilogue_of(w), panel) {
        for_runs<float>(p, row0, row1, [&](int64_t row, const float* at, int64_t n) {
            for (int64_t i = 0; i < n; ++i) patches[row - row0 + i] = at + i * p.step[2];
        });
        std::memset(acc, 0, rows * kPanel * sizeof(float));
    }

    __attribute__((noinline)) void add(int64_t k, int64_t end) {
        patch_product<Isa>(patches, rows, offsets + k, tile, end - k, columns.count, acc);
    }

    void write(void* out, Float out_type, int64_t width, int64_t column) {
        columns.first = column;
        finish_floats<Isa>(columns, acc, nullptr, out, out_type, 0, rows, width);
    }

    const int64_t* offsets;
    int64_t rows;
    Columns columns;
    const float* patches[kRowBlock];
    alignas(64) float tile[kTileK * kPanel];
    alignas(64) float acc[kRowBlock * kPanel];
};

template <class Isa>
void coded_patches(const Patches& p, const CodedWeight& w, int64_t panel, int64_t row0, int64_t row1, void* out, Float out_type,
                   int64_t width, int64_t column) {
    PatchTask<Isa> task(p, w, panel, row0, row1);
    with_bits(held_bits(w, panel), [&](auto bits) {
        const typename Isa::template Lookup<bits()> lookup(w);
        Granule<Isa> granule(w, panel);
        alignas(64) uint8_t room[kTileK * kPanel];
        for (int64_t k = 0; k < w.in_features; k += kTileK) {
            const int64_t end = k + kTileK < w.in_features ? k + kTileK : w.in_features;
            decode_tile<Isa, bits()>(lookup, granule, blocks_of<Isa, bits()>(w, panel, k, end, room), k, end, task.tile);
            task.add(k, end);
        }
    });
    task.write(out, out_type, width, column);
}

// ---- results

// rows [n][width] of elements of `type`, `stride` elements apart, into to [width][n], `to_stride` apart.
inline void turn_rows(const void* from, int64_t stride, int64_t n, int64_t width, Float type, void* to, int64_t to_stride) {
    if (type == Float::f32) return turn(static_cast<const uint32_t*>(from), stride, n, width, static_cast<uint32_t*>(to), to_stride);
    turn(static_cast<const uint16_t*>(from), stride, n, width, static_cast<uint16_t*>(to), to_stride);
}

template <class Isa>
constexpr PatchKernels patch_kernels_of() {
    return {lay<Isa, typename Isa::Code>, lay<Isa, float>, quantize_by<Isa>, stage_patches<Isa>, coded_patches<Isa>, turn_rows};
}
