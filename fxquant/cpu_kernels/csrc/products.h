// The two products, one task at a time: int8 x int8 with int32 sums, and float32 x int8 with float32 sums.
// Included into each isa_*.cpp inside an anonymous namespace, after vectors.h.

// Rows r0 <= r < r1 in groups of at most Isa's tile height, as equal as they come: 7 rows are 4 + 3, not 6 + 1.
template <class Body>
inline void for_groups(int64_t r0, int64_t r1, int64_t tallest, Body body) {
    const int64_t rows = r1 - r0, groups = (rows + tallest - 1) / tallest;
    for (int64_t g = 0, row = r0; g < groups; ++g) {
        const int64_t height = rows / groups + (g < rows % groups ? 1 : 0);
        body(g, row, height);
        row += height;
    }
}

// The int8 product of up to 64 columns and one row group over `depth` quads. See Isa::dot.
template <class Isa, int R = Isa::kTall>
inline void dot(int64_t rows, const char* codes, int64_t stride, const int8_t* b, int64_t depth, int32_t* acc, bool add,
                const int8_t* fetch) {
    if (rows == R) return Isa::template dot<R>(codes, stride, b, depth, acc, add, fetch);
    if constexpr (R > 1) dot<Isa, R - 1>(rows, codes, stride, b, depth, acc, add, fetch);
}

// Depth blocks of the int8 product, in quads: 1024 x 64 x 4 codes are 256 KiB of one panel, which stays in an L2 of
// 512 KiB or more while all row groups pass over it. (L1-sized blocks cost more in reloaded sums than they save.)
constexpr int64_t kDepthQuads = 1024;

// Up to this K a wrapped int32 sum of (code + 128) * code minus a wrapped 128 * column sum is still the exact sum of
// code * code: only the true sum, at most 127 * 127 * K, has to fit. Beyond it the sums are kept in int64.
constexpr int64_t kWrapSafe = 131072;

// Adds the sums of the columns' codes, which undo the offset of staged codes; `add` false begins them.
template <class Isa>
void add_sums(const int8_t* b, int64_t depth, int32_t* sums, bool add) {
    if constexpr (Isa::kCodeOffset == 0) return;
    constexpr int64_t kPiece = PanelQuads<Isa>::kSpread;
    char ones[kPiece * kQuad];
    std::memset(ones, 1, sizeof(ones));
    for (int64_t q = 0; q < depth; q += kPiece) {
        dot<Isa>(1, ones, 0, b + q * kPanel * kQuad, depth - q < kPiece ? depth - q : kPiece, sums, add || q > 0, nullptr);
    }
}

// Those of a whole full panel.
template <class Isa>
void full_sums(const Weight& w, const PanelQuads<Isa>& b, int32_t* sums) {
    if (!stores_sums(w.in_features)) return add_sums<Isa>(b.packed, b.depth, sums, false);
    std::memcpy(sums, b.packed + b.depth * kPanel * kQuad, kPanel * sizeof(int32_t));
}

// Times the offset of staged codes, wrapped.
template <class Isa>
inline void times_offset(int32_t* sums) {
    for (int64_t c = 0; c < kPanel; ++c) {
        sums[c] = static_cast<int32_t>(static_cast<uint32_t>(sums[c]) * static_cast<uint32_t>(Isa::kCodeOffset));
    }
}

// The same product where K is beyond kWrapSafe: int64 sums over pieces that cannot overflow by themselves.
template <class Isa>
void int8_product_wide(const Int8Problem& p, const Task& t, PanelQuads<Isa>& b, const Columns& columns) {
    constexpr int W = Isa::kWidth;
    const int64_t step = b.full ? 8192 : PanelQuads<Isa>::kSpread;  // quads: 32768 * 255 * 127 < 2^31
    const char* codes = static_cast<const char*>(p.codes);
    alignas(64) int32_t piece[Isa::kTall * kPanel];
    alignas(64) int32_t sums[kPanel] = {};
    if (b.full) full_sums<Isa>(p.weight, b, sums);
    for (int64_t q = 0; !b.full && q < b.depth; q += step) add_sums<Isa>(b.at(q), b.depth - q < step ? b.depth - q : step, sums, q > 0);
    for_groups(t.row0, t.row1, Isa::kTall, [&](int64_t, int64_t row, int64_t height) {
        int64_t total[Isa::kTall * kPanel];
        for (int64_t i = 0; i < height * kPanel; ++i) total[i] = -int64_t{Isa::kCodeOffset} * sums[i % kPanel];
        for (int64_t q = 0; q < b.depth; q += step) {
            const int64_t n = b.depth - q < step ? b.depth - q : step;
            const char* a = codes + row * p.code_stride + q * kQuad * static_cast<int64_t>(sizeof(typename Isa::Code));
            const int8_t* at = b.at(q);
            dot<Isa>(height, a, p.code_stride, at, n, piece, false, at);
            for (int64_t i = 0; i < height * kPanel; ++i) total[i] += piece[i];
        }
        for (int64_t r = 0; r < height; ++r) {
            alignas(64) float value[kPanel];
            for (int64_t i = 0; i < kPanel; ++i) value[i] = static_cast<float>(total[r * kPanel + i]);
            finish<Isa>(
                columns, [&](int64_t c) { return load<typename Isa::F>(value + c); },
                [&](int64_t c) { return load<typename Isa::F>(columns.scale + c) * p.x_scale[row + r]; }, p.out, p.out_type,
                row + r, p.weight.out_features);
        }
    });
    static_assert(kPanel % W == 0, "whole vectors in a panel");
}

template <class Isa>
void int8_product(const Int8Problem& p, const Task& t) {
    using I = typename Isa::I;
    PanelQuads<Isa> b(p.weight, t.panel);
    const Columns columns(p.weight, t.panel);
    if (p.weight.in_features > kWrapSafe) return int8_product_wide<Isa>(p, t, b, columns);

    alignas(64) int32_t acc[kRowBlock * kPanel];
    if constexpr (Isa::kDotsFeatures) {
        if (!b.full && t.row1 - t.row0 == 1) {  // to spread the panel would take longer than all products
            std::memset(acc, 0, kPanel * sizeof(int32_t));
            Isa::dot_features(static_cast<const char*>(p.codes) + t.row0 * p.code_stride, b.rows, acc);
            finish<Isa>(
                columns, [&](int64_t c) { return __builtin_convertvector(load<I>(acc + c), typename Isa::F); },
                [&](int64_t c) { return load<typename Isa::F>(columns.scale + c) * p.x_scale[t.row0]; }, p.out, p.out_type, t.row0,
                p.weight.out_features);
            return;
        }
    }
    alignas(64) int32_t shift[kPanel] = {};  // sums of the columns, in the end times the offset, wrapped
    if (b.full) full_sums<Isa>(p.weight, b, shift);
    const int64_t depth = b.depth, most = kDepthQuads + kDepthQuads / 2, spread = PanelQuads<Isa>::kSpread;
    const int64_t pieces = b.full ? (depth + most - 1) / most : (depth + spread - 1) / spread;
    // While the row groups pass over this panel, each of the first four brings a quarter of the next one into L2. A lone
    // group does not: it is waiting for memory itself.
    const int64_t fetch_step = depth * kPanel * kQuad / 4;
    const int8_t* next = t.row1 - t.row0 > Isa::kTall ? t.next : nullptr;
    for (int64_t piece = 0; piece < pieces; ++piece) {
        const bool last = piece + 1 == pieces;
        const int64_t q0 = b.full ? depth * piece / pieces : piece * spread;
        const int64_t q1 = last ? depth : b.full ? depth * (piece + 1) / pieces : q0 + spread;
        const int8_t* codes_of_b = b.at(q0);
        if (!b.full) add_sums<Isa>(codes_of_b, q1 - q0, shift, piece > 0);
        if (last) times_offset<Isa>(shift);
        for_groups(t.row0, t.row1, Isa::kTall, [&](int64_t g, int64_t row, int64_t height) {
            const char* a = static_cast<const char*>(p.codes) + row * p.code_stride +
                            q0 * kQuad * static_cast<int64_t>(sizeof(typename Isa::Code));
            int32_t* sums = acc + (pieces == 1 ? 0 : (row - t.row0) * kPanel);
            const int8_t* fetch = next == nullptr ? nullptr : next + (g < 3 ? g : 3) * fetch_step;
            dot<Isa>(height, a, p.code_stride, codes_of_b, q1 - q0, sums, piece > 0, fetch);
            if (!last) return;
            finish_group<Isa>(columns, {sums, shift, p.x_scale + row, height}, p.out, p.out_type, row, p.weight.out_features);
        });
    }
}

// Code i of each of W columns of a quad row, as floats: the byte is shifted to the top and back down with its sign. Or, where
// one operation merges bits: it is brought into the mantissa of 2^23 or 2^15, with its sign turned into an offset of 128.
template <class Isa, int i>
inline typename Isa::F code_floats(const int8_t* quad_columns) {
    using U = typename Isa::U;
    using I = typename Isa::I;
    if constexpr (Isa::kTogglesBits) {
        constexpr int kBit = i % 2 * 8;
        constexpr uint32_t kExponent = static_cast<uint32_t>(150 - kBit) << 23;
        const U held = load<U>(quad_columns) >> (i / 2 * 16);
        return bits<typename Isa::F>(Isa::toggle(held, 0xffu << kBit, kExponent | 0x80u << kBit)) -
               bits<typename Isa::F>(U{} + (kExponent | 0x80u << kBit));
    }
    const I raised = bits<I>(load<U>(quad_columns) << (24 - 8 * i));
    return __builtin_convertvector(raised >> 24, typename Isa::F);
}

// How far ahead in a panel's codes the next ones are fetched, in bytes: at the speed of memory about its latency.
constexpr int64_t kCodesAhead = 8192;

// R rows x NV vectors of columns, codes widened in registers: one byte is read where floats take four. acc is added to, or
// begun.
template <class Isa, int R, int NV>
FXQUANT_TILE void float_tile_packed(const float* x, int64_t stride, const int8_t* b, int64_t depth, float* acc, bool add) {
    using F = typename Isa::F;
    constexpr int W = Isa::kWidth;
    F sum[R][NV];
    FXQUANT_UNROLL for (int r = 0; r < R; ++r) FXQUANT_UNROLL for (int j = 0; j < NV; ++j)
        sum[r][j] = add ? load<F>(acc + r * kPanel + j * W) : F{};
    const auto step = [&](const float* at, F b0, int j) {
        FXQUANT_UNROLL for (int r = 0; r < R; ++r) sum[r][j] = Isa::fma(Isa::splat(at[r * stride]), b0, sum[r][j]);
    };
    for (int64_t q = 0; q < depth; ++q) {
        const int8_t* row = b + q * kPanel * kQuad;
        const float* at = x + q * kQuad;
        FXQUANT_UNROLL for (int j = 0; j < NV * W * kQuad; j += 64) __builtin_prefetch(row + kCodesAhead + j);
        FXQUANT_UNROLL for (int j = 0; j < NV; ++j) step(at, code_floats<Isa, 0>(row + j * W * 4), j);
        FXQUANT_UNROLL for (int j = 0; j < NV; ++j) step(at + 1, code_floats<Isa, 1>(row + j * W * 4), j);
        FXQUANT_UNROLL for (int j = 0; j < NV; ++j) step(at + 2, code_floats<Isa, 2>(row + j * W * 4), j);
        FXQUANT_UNROLL for (int j = 0; j < NV; ++j) step(at + 3, code_floats<Isa, 3>(row + j * W * 4), j);
    }
    FXQUANT_UNROLL for (int r = 0; r < R; ++r) FXQUANT_UNROLL for (int j = 0; j < NV; ++j)
        store(acc + r * kPanel + j * W, sum[r][j]);
}

// Whether sums of x * code may be kept 2^24 times as large: then no bit of them changes, they only must not overflow.
inline bool may_be_raised(const float* x, int64_t n) {
    constexpr uint32_t kMost = (127u + 64u) << 23;  // 2^64 * 2^7 * 2^24, and K up to 2^32
    uint32_t over = 0;
    for (int64_t k = 0; k < n; ++k) over |= static_cast<uint32_t>((bits<uint32_t>(x[k]) & 0x7fffffffu) > kMost);
    return over == 0;
}

// float_tile_packed of one row that may be raised: a code in the top byte of a lane has its sign there.
template <class Isa, int NV>
FXQUANT_TILE void float_row_raised(const float* x, const int8_t* b, int64_t depth, float* acc) {
    using F = typename Isa::F;
    using U = typename Isa::U;
    constexpr int W = Isa::kWidth;
    F sum[NV];
    FXQUANT_UNROLL for (int j = 0; j < NV; ++j) sum[j] = F{};
    const auto step = [&](float at, U raised, int j) {
        sum[j] = Isa::fma(Isa::splat(at), __builtin_convertvector(bits<typename Isa::I>(raised), F), sum[j]);
    };
    for (int64_t q = 0; q < depth; ++q, b += kPanel * kQuad, x += kQuad) {
        FXQUANT_UNROLL for (int j = 0; j < NV * W * kQuad; j += 64) __builtin_prefetch(b + kCodesAhead + j);
        FXQUANT_UNROLL for (int j = 0; j < NV; ++j) {
            const U held = load<U>(b + j * W * kQuad);
            step(x[0], Isa::template raise<0>(held), j);
            step(x[1], Isa::template raise<1>(held), j);
            step(x[2], Isa::template raise<2>(held), j);
            step(x[3], Isa::template raise<3>(held), j);
        }
    }
    FXQUANT_UNROLL for (int j = 0; j < NV; ++j) store(acc + j * W, sum[j] * 0x1p-24f);
}

// The same sums from codes that were widened to floats before: tile is [depth * 4][64] floats.
template <class Isa, int R, int NV>
FXQUANT_TILE void float_tile_wide(const float* x, int64_t stride, const float* tile, int64_t depth, float* acc, bool add) {
    using F = typename Isa::F;
    constexpr int W = Isa::kWidth;
    F sum[R][NV];
    FXQUANT_UNROLL for (int r = 0; r < R; ++r) FXQUANT_UNROLL for (int j = 0; j < NV; ++j)
        sum[r][j] = add ? load<F>(acc + r * kPanel + j * W) : F{};
    for (int64_t k = 0; k < depth * kQuad; ++k) {
        F b[NV];
        FXQUANT_UNROLL for (int j = 0; j < NV; ++j) b[j] = load<F>(tile + k * kPanel + j * W);
        FXQUANT_UNROLL for (int r = 0; r < R; ++r) {
            const F a = Isa::splat(x[r * stride + k]);
            FXQUANT_UNROLL for (int j = 0; j < NV; ++j) sum[r][j] = Isa::fma(a, b[j], sum[r][j]);
        }
    }
    FXQUANT_UNROLL for (int r = 0; r < R; ++r) FXQUANT_UNROLL for (int j = 0; j < NV; ++j)
        store(acc + r * kPanel + j * W, sum[r][j]);
}

template <class Isa, int R = Isa::kFloatTall>
inline void float_tile(bool packed, int64_t rows, const float* x, int64_t stride, const void* b, int64_t depth, float* acc,
                       bool add = true) {
    constexpr int W = Isa::kWidth, NV = R == 1 ? Isa::kLoneVectors : Isa::kFloatVectors;
    if (rows == R) {
        if constexpr (R == 1 && Isa::kRaisesCodes) {
            if (packed && !add && may_be_raised(x, depth * kQuad)) {
                for (int64_t c = 0; c < kPanel; c += NV * W) {
                    float_row_raised<Isa, NV>(x, static_cast<const int8_t*>(b) + c * kQuad, depth, acc + c);
                }
                return;
            }
        }
        for (int64_t c = 0; c < kPanel; c += NV * W) {
            if (packed) {
                float_tile_packed<Isa, R, NV>(x, stride, static_cast<const int8_t*>(b) + c * kQuad, depth, acc + c, add);
            } else {
                float_tile_wide<Isa, R, NV>(x, stride, static_cast<const float*>(b) + c, depth, acc + c, add);
            }
        }
        return;
    }
    if constexpr (R > 1) float_tile<Isa, R - 1>(packed, rows, x, stride, b, depth, acc, add);
}

template <class Isa>
void widen_codes(const int8_t* b, int64_t depth, float* tile) {
    constexpr int W = Isa::kWidth;
    for (int64_t q = 0; q < depth; ++q, tile += kQuad * kPanel) {
        for (int64_t c = 0; c < kPanel; c += W) {
            const int8_t* from = b + (q * kPanel + c) * kQuad;
            store(tile + c, code_floats<Isa, 0>(from));
            store(tile + kPanel + c, code_floats<Isa, 1>(from));
            store(tile + 2 * kPanel + c, code_floats<Isa, 2>(from));
            store(tile + 3 * kPanel + c, code_floats<Isa, 3>(from));
        }
    }
}

// Depth blocks of the float product, in quads: a widened tile of 256 k x 64 floats is 64 KiB, read from L2 by each row group.
constexpr int64_t kFloatDepthQuads = 64;

// Rows up to which every row group widens the codes for itself: 11 operations beside 24 products in a full tile. Cores with
// vector units to spare hide them at any height (Zen 5: 1.07 times as fast as a widened tile at 256 rows, 1.5 times at 16);
// where products and shifts share two ports, a tile that is widened once pays from here on.
constexpr int64_t kWidenInRegisters = 96;

template <class Isa>
void float_product(const FloatProblem& p, const Task& t) {
    using F = typename Isa::F;
    PanelQuads<Isa> b(p.weight, t.panel);
    const bool in_registers = t.row1 - t.row0 <= kWidenInRegisters;
    static_assert(PanelQuads<Isa>::kSpread <= kFloatDepthQuads, "what is spread at a time fits into a tile");
    const int64_t step = !b.full ? PanelQuads<Isa>::kSpread : in_registers ? b.depth : kFloatDepthQuads;
    alignas(64) float acc[kRowBlock * kPanel];
    alignas(64) float tile[kFloatDepthQuads * kQuad * kPanel];
    if (!in_registers) std::memset(acc, 0, (t.row1 - t.row0) * kPanel * sizeof(float));
    for (int64_t q = 0; q < b.depth; q += step) {
        const int64_t n = b.depth - q < step ? b.depth - q : step;
        const int8_t* codes = b.at(q);
        if (!in_registers) widen_codes<Isa>(codes, n, tile);
        const void* columns_of_b = in_registers ? static_cast<const void*>(codes) : tile;
        for_groups(t.row0, t.row1, Isa::kFloatTall, [&](int64_t, int64_t row, int64_t height) {
            float_tile<Isa>(in_registers, height, p.x + row * p.x_stride + q * kQuad, p.x_stride, columns_of_b, n,
                            acc + (row - t.row0) * kPanel, q > 0);
        });
    }
    const Columns columns(p.weight, t.panel);
    for (int64_t row = t.row0; row < t.row1; ++row) {
        const float* sum = acc + (row - t.row0) * kPanel;
        finish<Isa>(
            columns, [&](int64_t c) { return load<F>(sum + c); }, [&](int64_t c) { return load<F>(columns.scale + c); },
            p.out, p.out_type, row, p.weight.out_features);
    }
}
