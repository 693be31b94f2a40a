// The products with weights of any number format, one panel at a time: float32 x values, and int8 x integer codes.
// Included into each isa_*.cpp inside an anonymous namespace, after granules.h and before kernels_of.h.

// The blocks of the k from k0 on, codes of held_bits(). room: 64 bytes for each k up to k1, if the panel is compact.
template <class Isa, int Bits>
inline const uint8_t* blocks_of(const CodedWeight& w, int64_t panel, int64_t k0, int64_t k1, uint8_t* room) {
    const PanelLayout layout = layout_of(w);
    if constexpr (Bits == 8) {
        if (!layout.is_full(panel)) {
            spread_panel<Isa>(w, panel, k0, k1, room);
            return room;
        }
    }
    return w.packed + layout.offset(panel) + k0 / kBlock * Bits * kPanel;
}

inline Weight epilogue_of(const CodedWeight& w) { return {nullptr, w.tensor_scale, w.bias, w.out_features, w.in_features, w.after}; }

template <class Isa, int Bits>
void coded_product_of(const CodedProblem& p, int64_t panel, int64_t row0, int64_t row1) {
    const CodedWeight& w = p.weight;
    const typename Isa::template Lookup<Bits> lookup(w);
    Granule<Isa> granule(w, panel);
    alignas(64) uint8_t room[kTileK * kPanel];
    alignas(64) float tile[kTileK * kPanel];
    alignas(64) float acc[kRowBlock * kPanel];
    std::memset(acc, 0, (row1 - row0) * kPanel * sizeof(float));
    const auto blocks = [&](int64_t k, int64_t end) { return blocks_of<Isa, Bits>(w, panel, k, end, room); };
    bool fused = false;
    if constexpr (!Isa::kMultipliesDigits) fused = granule_sums<Isa, Bits>(p, lookup, panel, row0, row1, blocks, acc);
    fused = fused || fused_product<Isa, Bits>(p, panel, row0, row1 - row0, acc);
    for (int64_t k = 0; !fused && k < w.in_features; k += kTileK) {
        const int64_t end = k + kTileK < w.in_features ? k + kTileK : w.in_features;
        decode_tile<Isa, Bits>(lookup, granule, blocks(k, end), k, end, tile);
        for_groups(row0, row1, Isa::kFloatTall, [&](int64_t, int64_t row, int64_t height) {
            float_tile<Isa>(false, height, p.x + row * p.x_stride + k, p.x_stride, tile, quads(end - k), acc + (row - row0) * kPanel);
        });
    }
    const Columns columns(epilogue_of(w), panel);
    finish_floats<Isa>(columns, acc, nullptr, p.out, p.out_type, row0, row1, w.out_features);
}

template <class Isa, Float T>
void store_transposed(const float* tile, int64_t depth, int64_t features, int64_t width, char* out) {
    constexpr int W = Isa::kWidth;
    for (int64_t n = 0; n < features; ++n) {
        for (int64_t k = 0; k < depth; k += W) {
            alignas(64) float row[W];
            for (int i = 0; i < W; ++i) row[i] = k + i < depth ? tile[(k + i) * kPanel + n] : 0.0f;
            alignas(64) char narrow[W * 4];
            store_float<Isa, T>(narrow, load<typename Isa::F>(row));
            std::memcpy(out + (n * width + k) * size_of(T), narrow, (k + W <= depth ? W : depth - k) * size_of(T));
        }
    }
}

template <class Isa, int Bits>
void decode_panel_of(const CodedWeight& w, int64_t panel, void* out, Float out_type) {
    const typename Isa::template Lookup<Bits> lookup(w);
    Granule<Isa> granule(w, panel);
    alignas(64) uint8_t room[kTileK * kPanel];
    alignas(64) float tile[kTileK * kPanel];
    const int64_t first = panel * kPanel;
    const int64_t features = w.out_features - first < kPanel ? w.out_features - first : kPanel;
    for (int64_t k = 0; k < w.in_features; k += kTileK) {
        const int64_t end = k + kTileK < w.in_features ? k + kTileK : w.in_features;
        decode_tile<Isa, Bits>(lookup, granule, blocks_of<Isa, Bits>(w, panel, k, end, room), k, end, tile);
        if (w.tensor_scale != nullptr) {
            for (int64_t i = 0; i < end - k; ++i) {
                for (int64_t n = 0; n < features; ++n) tile[i * kPanel + n] *= w.tensor_scale[first + n];
            }
        }
        char* to = static_cast<char*>(out) + (first * w.in_features + k) * size_of(out_type);
        switch (out_type) {
            case Float::f32: store_transposed<Isa, Float::f32>(tile, end - k, features, w.in_features, to); break;
            case Float::bf16: store_transposed<Isa, Float::bf16>(tile, end - k, features, w.in_features, to); break;
            case Float::f16: store_transposed<Isa, Float::f16>(tile, end - k, features, w.in_features, to); break;
        }
    }
}

// ---- int8 activations

// Most k of one tile of patterns: 256 x 64 bytes are 16 KiB.
constexpr int64_t kPatternK = 256;

// k of one tile: whole pieces, where they are small and made of what a compact panel is spread by.
inline int64_t pattern_k(const CodedDynamicProblem& p) {
    const int64_t usual = p.pieces[0].k1;
    const bool whole = p.count > 1 && usual <= kPatternK && usual % kSpreadK == 0;
    return whole ? kPatternK / usual * usual : kPatternK;
}

// The part of one piece that lies in a tile, with what its sums need at the end.
struct Span {
    int64_t quad0, depth;  // within the tile
    int64_t index;         // of the piece
    bool begins, ends;
    int64_t like;  // spans from this one on that begin and end in the tile, all as deep
    alignas(64) float scale[kPanel];
    alignas(64) int32_t zero[kPanel];  // affine
};

template <class Isa>
inline void read_span(const CodedWeight& w, int64_t panel, int64_t granule, Span& s) {
    read_granule<Isa>(w, w.scale, panel, granule, s.scale);
    if (w.scheme == Scheme::affine) {
        alignas(64) float zero[kPanel];
        read_granule<Isa>(w, w.zero, panel, granule, zero);
        for (int64_t c = 0; c < kPanel; ++c) s.zero[c] = static_cast<int32_t>(zero[c]);
    }
}

template <class Isa>
Span span_of(const CodedDynamicProblem& p, int64_t panel, int64_t index, int64_t k0, int64_t k1) {
    const Piece& piece = p.pieces[index];
    Span s;
    const int64_t begin = piece.k0 > k0 ? piece.k0 : k0, end = piece.k1 < k1 ? piece.k1 : k1;
    s.quad0 = (begin - k0) / kQuad;
    s.depth = quads(end - begin);
    s.index = index;
    s.begins = begin == piece.k0;
    s.ends = end == piece.k1;
    if (s.ends) read_span<Isa>(p.weight, panel, piece.granule, s);
    return s;
}

// y += scale * float(sum of (pattern - zero) * code) [* x_scale], for the rows of one group.
template <class Isa>
void add_span(const CodedDynamicProblem& p, const Span& s, int64_t row, int64_t height, const int32_t* sums, float* y) {
    using F = typename Isa::F;
    using U = typename Isa::U;
    const bool affine = p.weight.scheme == Scheme::affine;
    const PieceRows rows = p.rows.from(row, s.index);
    for (int64_t r = 0; r < height; ++r) {
        const U begin = U{} + static_cast<uint32_t>(rows.begin[r * rows.count]);
        for (int64_t c = 0; c < kPanel; c += Isa::kWidth) {
            const U zeros = affine ? load<U>(s.zero + c) * begin : begin;  // unsigned: it may wrap between
            const F total = __builtin_convertvector(bits<typename Isa::I>(load<U>(sums + r * kPanel + c) + zeros), F);
            const F scale = load<F>(s.scale + c);
            F* at = reinterpret_cast<F*>(y + r * kPanel + c);
            *at = rows.scale == nullptr ? Isa::fma(scale, total, *at)
                                        : Isa::fma(scale * total, Isa::splat(rows.scale[r * rows.count]), *at);
        }
    }
}

template <class Isa, int R = Isa::kTall>
inline void dot_patterns(int64_t rows, const char* codes, int64_t stride, const uint8_t* b, int64_t depth, int32_t* acc, bool add) {
    if (rows == R) return Isa::template dot_patterns<R>(codes, stride, b, depth, acc, add);
    if constexpr (R > 1) dot_patterns<Isa, R - 1>(rows, codes, stride, b, depth, acc, add);
}

template <class Isa, bool Affine, int R = Isa::kTall>
inline void dot_spans_of(const CodedDynamicProblem& p, const Span* spans, int64_t count, const char* codes, const uint8_t* tile,
                         int64_t row, int64_t height, float* y) {
    if (height == R) {
        return Isa::template dot_spans<R, Affine>(spans, count, codes, p.code_stride, tile, p.rows.from(row, spans[0].index), y);
    }
    if constexpr (R > 1) dot_spans_of<Isa, Affine, R - 1>(p, spans, count, codes, tile, row, height, y);
}

template <class Isa>
inline void dot_spans(const CodedDynamicProblem& p, const Span* spans, int64_t count, const char* codes, const uint8_t* tile,
                      int64_t row, int64_t height, float* y) {
    if (p.weight.scheme == Scheme::affine) return dot_spans_of<Isa, true>(p, spans, count, codes, tile, row, height, y);
    dot_spans_of<Isa, false>(p, spans, count, codes, tile, row, height, y);
}

inline void count_alike(Span* spans, int64_t count) {
    for (int64_t i = count - 1; i >= 0; --i) {
        Span& s = spans[i];
        const bool goes_on = i + 1 < count && spans[i + 1].depth == s.depth;
        s.like = !s.begins || !s.ends ? 0 : goes_on ? 1 + spans[i + 1].like : 1;
    }
}

// Spans that begin and end in the tile, as many alike as come first, finished with the sums in registers. 0 where the
// instruction set does not do that.
template <class Isa>
int64_t scaled_spans(const CodedDynamicProblem& p, const Span* spans, const char* codes, const uint8_t* tile, int64_t row,
                     int64_t height, float* y) {
    if constexpr (!Isa::kScalesSums) {
        return 0;
    } else {
        if (spans[0].like > 0) dot_spans<Isa>(p, spans, spans[0].like, codes, tile, row, height, y);
        return spans[0].like;
    }
}

// The same sums of few rows straight from the planes of a full panel. False if the weight's planes are none for this.
template <class Isa, int Bits, bool Affine, int R>
void fused_spans(const CodedDynamicProblem& p, int64_t panel, int64_t row0, int64_t rows, float* y) {
    if (rows == R) {
        constexpr auto kCode = static_cast<int64_t>(sizeof(typename Isa::Code));
        const CodedWeight& w = p.weight;
        const uint8_t* blocks = w.packed + layout_of(w).offset(panel);
        Span s;
        for (int64_t i = 0; i < p.count; ++i) {
            const Piece& piece = p.pieces[i];
            if (i == 0 || piece.granule != p.pieces[i - 1].granule) {
                read_span<Isa>(w, panel, piece.granule, s);
                fetch_granule(w, w.scale, panel, piece.granule);
                if (Affine) fetch_granule(w, w.zero, panel, piece.granule);
            }
            s.depth = quads(piece.k1 - piece.k0);
            Isa::template dot_planes<R, Bits, Affine>(s, static_cast<const char*>(p.codes) + row0 * p.code_stride + piece.k0 * kCode,
                                                      p.code_stride, blocks + piece.k0 / kBlock * Bits * kPanel,
                                                      p.rows.from(row0, i), y);
        }
        return;
    }
    if constexpr (R > 1) fused_spans<Isa, Bits, Affine, R - 1>(p, panel, row0, rows, y);
}

template <class Isa, int Bits>
bool fused_dynamic(const CodedDynamicProblem& p, int64_t panel, int64_t row0, int64_t rows, float* y) {
    if constexpr (!Isa::kScalesSums) {
        return false;
    } else {
        if (rows > Isa::kTall || !whole_blocks(p.weight) || p.x_group % kBlock != 0 || !layout_of(p.weight).is_full(panel)) return false;
        if (p.weight.scheme == Scheme::affine) {
            fused_spans<Isa, Bits, true, Isa::kTall>(p, panel, row0, rows, y);
        } else {
            fused_spans<Isa, Bits, false, Isa::kTall>(p, panel, row0, rows, y);
        }
        return true;
    }
}

// Few rows x a full panel of a weight in steps, from its planes. The sums are those of int8_product, and so is all that follows.
template <class Isa, int Bits, int R = Isa::kTall>
void stepped_sums(const CodedDynamicProblem& p, int64_t panel, int64_t row0, int64_t rows, int32_t* sums) {
    if (rows == R) {
        const CodedWeight& w = p.weight;
        const PanelLayout layout = layout_of(w);
        const uint8_t* blocks = w.packed + layout.offset(panel);
        const auto* scales = static_cast<const uint16_t*>(w.scale.data) + panel * kPanel * w.granules;
        const Multiples<Isa> multiples(w, panel);
        for (int64_t line = 0; line < kPanel; line += 32) __builtin_prefetch(w.steps + (panel + 1) * kPanel + line);
        const auto bytes_before = [&](int64_t i) { return p.pieces[i].k0 / kBlock * Bits * kPanel; };
        const auto add = [&](int64_t i, int64_t ahead) {
            const Piece& piece = p.pieces[i];
            fetch_granule(w, w.scale, panel, piece.granule);
            Isa::template dot_stepped<R, Bits>(scales + piece.granule * kPanel, multiples.in_one, quads(piece.k1 - piece.k0),
                                               static_cast<const char*>(p.codes) + row0 * p.code_stride + piece.k0, p.code_stride,
                                               blocks + bytes_before(i), ahead, p.rows.from(row0, i), sums);
        };
        // Two streams, as in dot_loop. Behind the first one's end lies what the second has read: there the next panel's second begins.
        const int64_t half = p.count / 2;
        for (int64_t i = 0; i < half; ++i) {
            const bool inside = bytes_before(i) + kFetchAhead < bytes_before(half);
            add(i, kFetchAhead + (inside ? 0 : layout.full_bytes));
            add(half + i, kFetchAhead);
        }
        if (p.count % 2 != 0) add(p.count - 1, kFetchAhead);
        return;
    }
    if constexpr (R > 1) stepped_sums<Isa, Bits, R - 1>(p, panel, row0, rows, sums);
}

template <class Isa, int Bits>
void stepped_product(const CodedDynamicProblem& p, int64_t panel, int64_t row0, int64_t row1) {
    const CodedWeight& w = p.weight;
    alignas(64) int32_t sums[Isa::kTall * kPanel] = {};
    alignas(64) const int32_t nothing[kPanel] = {};
    stepped_sums<Isa, Bits>(p, panel, row0 * p.digits, (row1 - row0) * p.digits, sums);
    const Int8Problem whole{p.codes, p.code_stride, p.digits, p.x_scale, {nullptr, nullptr, w.bias, w.out_features, w.in_features, w.after, &w}, p.out, p.out_type};
    const Columns columns(whole.weight, panel);
    if (p.digits > 1) return finish_digits<Isa>(whole, columns, sums, nothing, row0, row1);
    finish_group<Isa>(columns, GroupSums{sums, nothing, p.x_scale + row0, row1 - row0}, p.out, p.out_type, row0, w.out_features);
}

// Rows row0 <= r < row1 of y from the sums of their codes, [rows of codes, 64]. Digits are put together here, in their place.
template <class Isa>
void finish_coded(const CodedDynamicProblem& p, const Columns& columns, float* sums, int64_t row0, int64_t row1) {
    using F = typename Isa::F;
    constexpr float kUnit = int64_t{1} << kDigitBits;
    for (int64_t at = 0; p.digits > 1 && at < (row1 - row0) * kPanel; at += Isa::kWidth) {
        const float* digit = sums + at / kPanel * p.digits * kPanel + at % kPanel;
        F y = load<F>(digit + (p.digits - 1) * kPanel);
        for (int64_t i = p.digits - 2; i >= 0; --i) y = Isa::fma(y, Isa::splat(kUnit), load<F>(digit + i * kPanel));
        store(sums + at, y);
    }
    const float* x_scale = p.x_scale == nullptr ? nullptr : p.x_scale + row0;
    finish_floats<Isa>(columns, sums, x_scale, p.out, p.out_type, row0, row1, p.weight.out_features);
}

// Rows row0 <= r < row1 of y.
template <class Isa, int Bits>
void coded_dynamic_of(const CodedDynamicProblem& p, int64_t panel, int64_t y_row0, int64_t y_row1) {
    constexpr auto kCode = static_cast<int64_t>(sizeof(typename Isa::Code));
    const CodedWeight& w = p.weight;
    if constexpr (Isa::kScalesSums) {
        if (w.steps != nullptr) return stepped_product<Isa, Bits>(p, panel, y_row0, y_row1);
    }
    const int64_t digits = p.digits, row0 = y_row0 * digits, row1 = y_row1 * digits;  // rows of codes
    alignas(64) uint8_t tile[kPatternK * kPanel];
    alignas(64) int32_t sums[kPatternRows * kPanel];
    alignas(64) float y[kPatternRows * kPanel];
    Span spans[kPatternK / kQuad];
    std::memset(y, 0, (row1 - row0) * kPanel * sizeof(float));
    int64_t piece = 0;
    const int64_t step = pattern_k(p);
    const Columns columns(epilogue_of(w), panel);
    if (fused_dynamic<Isa, Bits>(p, panel, row0, row1 - row0, y)) return finish_coded<Isa>(p, columns, y, y_row0, y_row1);
    for (int64_t k = 0; k < w.in_features; k += step) {
        const int64_t end = k + step < w.in_features ? k + step : w.in_features;
        spread_patterns<Isa, Bits>(w, panel, k, end, tile);
        int64_t count = 0;
        for (; piece < p.count && p.pieces[piece].k0 < end; ++piece) {
            spans[count++] = span_of<Isa>(p, panel, piece, k, end);
            if (!spans[count - 1].ends) break;
        }
        count_alike(spans, count);
        for_groups(row0, row1, Isa::kTall, [&](int64_t, int64_t row, int64_t height) {
            const char* codes = static_cast<const char*>(p.codes) + row * p.code_stride + k * kCode;
            int32_t* acc = sums + (row - row0) * kPanel;
            float* total = y + (row - row0) * kPanel;
            for (int64_t i = 0; i < count;) {
                const Span& s = spans[i];
                if (const int64_t whole = scaled_spans<Isa>(p, spans + i, codes, tile, row, height, total)) {
                    i += whole;
                    continue;
                }
                ++i;
                dot_patterns<Isa>(height, codes + s.quad0 * kQuad * kCode, p.code_stride, tile + s.quad0 * kPanel * kQuad, s.depth,
                                  acc, !s.begins);
                if (s.ends) add_span<Isa>(p, s, row, height, acc, total);
            }
            // Where rows of codes are rows of y: here its stores go beside the products of the next rows.
            if (end == w.in_features && digits == 1) finish_coded<Isa>(p, columns, total, row, row + height);
        });
    }
    if (digits > 1) finish_coded<Isa>(p, columns, y, y_row0, y_row1);
}

// One row of x into codes by the range of each group; scale: one of each piece.
template <class Isa, class Vector>
void quantize_groups(const Rows& x, int64_t r, const CodedDynamicProblem& p, char* codes, float* scale) {
    constexpr int64_t kCode = sizeof(Vector) / Isa::kWidth;
    const char* row = static_cast<const char*>(x.data) + r * x.stride * size_of(x.type);
    const bool whole = p.x_group % Isa::kWidth == 0;  // vectors: what is written behind a group is written again by the next
    if (!whole) std::memset(codes, 0, quads(x.width) * kQuad * kCode);
    int64_t piece = 0;
    for (int64_t k = 0; k < x.width; k += p.x_group) {
        const int64_t end = k + p.x_group < x.width ? k + p.x_group : x.width;
        const Rows group = {row + k * size_of(x.type), x.stride, end - k, x.type};
        float of_group;
        if (whole) {
            quantize_rows<Isa, Vector, 0, true>(group, 0, 1, codes + k * kCode, 0, &of_group);
        } else {
            quantize_rows<Isa, Vector, 0, false>(group, 0, 1, codes + k * kCode, 0, &of_group);
        }
        for (; piece < p.count && p.pieces[piece].k0 < end; ++piece) scale[piece] = of_group;
    }
}

// scale: [rows], or [rows, pieces] of an x in groups. codes and begin: of each digit of each row.
template <class Isa>
void quantize_coded(const Rows& x, int64_t row0, int64_t row1, const CodedDynamicProblem& p, void* codes, float* scale,
                    int32_t* begin) {
    using Vector = typename Isa::CodeVector;
    using Code = typename std::remove_cv<typename std::remove_reference<decltype(Vector{}[0])>::type>::type;
    auto* staged = static_cast<char*>(codes);
    if (p.digits > 1) {
        if constexpr (Isa::kMultipliesDigits) fixed_rows<Isa, 0>(x, row0, row1, staged, p.code_stride, scale);
    } else if (p.x_group == 0) {
        quantize_rows<Isa, Vector, 0, true>(x, row0, row1, staged, p.code_stride, scale);
    } else {
        for (int64_t r = row0; r < row1; ++r) quantize_groups<Isa, Vector>(x, r, p, staged + r * p.code_stride, scale + r * p.count);
    }
    const auto zero = static_cast<uint32_t>(p.weight.scheme == Scheme::affine ? 1 : p.weight.offset);
    for (int64_t r = row0 * p.digits; r < row1 * p.digits; ++r) {
        const auto* row = reinterpret_cast<const Code*>(staged + r * p.code_stride);
        for (int64_t i = 0; i < p.count; ++i) {
            int32_t sum = 0;
            for (int64_t k = p.pieces[i].k0; k < p.pieces[i].k1; ++k) sum += row[k];
            begin[r * p.count + i] = static_cast<int32_t>(0u - zero * static_cast<uint32_t>(sum));
        }
    }
}

template <class Isa>
void coded_product(const CodedProblem& p, int64_t panel, int64_t row0, int64_t row1) {
    with_bits(held_bits(p.weight, panel), [&](auto bits) { coded_product_of<Isa, bits()>(p, panel, row0, row1); });
}

template <class Isa>
void coded_dynamic_product(const CodedDynamicProblem& p, int64_t panel, int64_t row0, int64_t row1) {
    with_bits(held_bits(p.weight, panel), [&](auto bits) { coded_dynamic_of<Isa, bits()>(p, panel, row0, row1); });
}

template <class Isa>
void decode_panel(const CodedWeight& w, int64_t panel, void* out, Float out_type) {
    with_bits(held_bits(w, panel), [&](auto bits) { decode_panel_of<Isa, bits()>(w, panel, out, out_type); });
}

template <class Isa>
constexpr CodedKernels coded_kernels_of() {
    return {coded_product<Isa>, Isa::kMultipliesDigits ? nullptr : sum_of_granules<Isa>, coded_dynamic_product<Isa>, quantize_coded<Isa>, decode_panel<Isa>,
            Isa::kScalesSums ? Isa::kTall : 0};
}
