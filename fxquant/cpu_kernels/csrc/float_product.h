// The float product with int8 codes, one task at a time, where floats stay floats; and the tile of all float products.
// Included into each isa_*.cpp inside an anonymous namespace, after products.h.

// Code i of each of W columns of a quad row, as floats: the byte is shifted to the top and back down with its sign.
template <class Isa, int i>
inline typename Isa::F code_floats(const int8_t* quad_columns) {
    const auto raised = bits<typename Isa::I>(load<typename Isa::U>(quad_columns) << (24 - 8 * i));
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

// packed: b are codes, else they were widened. Codes are only where floats are not multiplied as digits.
template <class Isa, int R = Isa::kFloatTall>
inline void float_tile(bool packed, int64_t rows, const float* x, int64_t stride, const void* b, int64_t depth, float* acc,
                       bool add = true) {
    constexpr int W = Isa::kWidth, NV = R == 1 ? Isa::kLoneVectors : Isa::kFloatVectors;
    if (rows == R) {
        if constexpr (!Isa::kMultipliesDigits) {
            const auto* codes = static_cast<const int8_t*>(b);
            const bool raised = R == 1 && Isa::kRaisesCodes && packed && !add && may_be_raised(x, depth * kQuad);
            for (int64_t c = 0; packed && c < kPanel; c += NV * W) {
                if constexpr (R == 1 && Isa::kRaisesCodes) {
                    if (raised) {
                        float_row_raised<Isa, NV>(x, codes + c * kQuad, depth, acc + c);
                        continue;
                    }
                }
                float_tile_packed<Isa, R, NV>(x, stride, codes + c * kQuad, depth, acc + c, add);
            }
            if (packed) return;
        }
        for (int64_t c = 0; c < kPanel; c += NV * W) {
            float_tile_wide<Isa, R, NV>(x, stride, static_cast<const float*>(b) + c, depth, acc + c, add);
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
    finish_floats<Isa>(columns, acc, nullptr, p.out, p.out_type, t.row0, t.row1, p.weight.out_features);
}
