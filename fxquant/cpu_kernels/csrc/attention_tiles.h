// Products of attention, and keys and values laid out for them. Included into each isa_*.cpp inside an anonymous namespace, after
// vectors.h and turn.h.
//
// An operand's words of 32 bits hold a float each or, in pairs, two bfloat16 that are neighbours in what is summed over.

// out[rows, columns] = a @ b * factor, or keep[row] * out + a @ b where keep is given. a: [rows, depth]; b: [depth, columns], each
// in words, strides too. factor is for pairs; floats take it beforehand.
struct TileProduct {
    const float* a;
    int64_t a_stride;
    const float* b;
    int64_t b_stride;
    int64_t depth;  // values
    float* out;
    int64_t out_stride;
    const float* keep;
    float factor;
};

// One word of each of R rows of a, times one of each column of b.
template <class Isa, bool Pairs, int R, int C>
FXQUANT_INLINE void add_word(const float* a, int64_t a_stride, const float* b, typename Isa::F (&sum)[R][C]) {
    using F = typename Isa::F;
    F value[C];
    FXQUANT_UNROLL for (int j = 0; j < C; ++j) value[j] = load<F>(b + j * Isa::kWidth);
    FXQUANT_UNROLL for (int r = 0; r < R; ++r) {
        const F factor = Isa::splat(a[r * a_stride]);
        FXQUANT_UNROLL for (int j = 0; j < C; ++j) {
            if constexpr (Pairs) sum[r][j] = Isa::add_pairs(sum[r][j], factor, value[j]);
            else sum[r][j] = Isa::fma(factor, value[j], sum[r][j]);
        }
    }
}

template <class Isa, bool Pairs, int R, int C>
FXQUANT_TILE void attend_tile(const TileProduct& p, int64_t column) {
    using F = typename Isa::F;
    using U = typename Isa::U;
    constexpr int W = Isa::kWidth;
    float* out = p.out + column;
    const float *a = p.a, *b = p.b + column;
    const int64_t words = Pairs ? p.depth / 2 : p.depth, a_stride = p.a_stride, b_stride = p.b_stride;
    F sum[R][C];
    if (Pairs || p.keep == nullptr) {
        FXQUANT_UNROLL for (int r = 0; r < R; ++r) FXQUANT_UNROLL for (int j = 0; j < C; ++j) sum[r][j] = F{};
    } else {
        FXQUANT_UNROLL for (int r = 0; r < R; ++r) FXQUANT_UNROLL for (int j = 0; j < C; ++j)
            sum[r][j] = load<F>(out + r * p.out_stride + j * W) * Isa::splat(p.keep[r]);
    }
    for (int64_t k = 0; k < words; ++k, ++a, b += b_stride) add_word<Isa, Pairs, R, C>(a, a_stride, b, sum);
    if constexpr (Pairs) {
        if (p.depth % 2 != 0) {  // what the other half of b holds is not to be read, not even times 0
            alignas(64) float half[C * W];
            FXQUANT_UNROLL for (int j = 0; j < C; ++j) store(half + j * W, load<U>(b + j * W) & 0xffffu);
            add_word<Isa, true, R, C>(a, a_stride, half, sum);
        }
        if (p.keep == nullptr) {
            FXQUANT_UNROLL for (int r = 0; r < R; ++r) FXQUANT_UNROLL for (int j = 0; j < C; ++j) sum[r][j] *= p.factor;
        } else {  // last, so that nothing waits for the exponentials in keep
            FXQUANT_UNROLL for (int r = 0; r < R; ++r) FXQUANT_UNROLL for (int j = 0; j < C; ++j)
                sum[r][j] = Isa::fma(load<F>(out + r * p.out_stride + j * W), Isa::splat(p.keep[r]), sum[r][j]);
        }
    }
    FXQUANT_UNROLL for (int r = 0; r < R; ++r) FXQUANT_UNROLL for (int j = 0; j < C; ++j)
        store(out + r * p.out_stride + j * W, sum[r][j]);
}

template <class Isa, bool Pairs, int R, int C>
inline void attend_columns(int64_t count, const TileProduct& p, int64_t column) {
    if (count == C) return attend_tile<Isa, Pairs, R, C>(p, column);
    if constexpr (C > 1) attend_columns<Isa, Pairs, R, C - 1>(count, p, column);
}

// Any number of rows up to kFloatTall and any number of vectors, in as few and as even tiles as there can be.
template <class Isa, bool Pairs, int R = Isa::kFloatTall>
inline void attend_product(int64_t rows, int64_t vectors, const TileProduct& p) {
    constexpr int kMost = R == 1 ? Isa::kLoneVectors : Isa::kFloatVectors;
    if (rows == R) {
        if (vectors <= kMost) return attend_columns<Isa, Pairs, R, kMost>(vectors, p, 0);
        const int64_t tiles = (vectors + kMost - 1) / kMost;
        for (int64_t i = 0; i < tiles; ++i) {
            const int64_t from = vectors * i / tiles, to = vectors * (i + 1) / tiles;
            attend_columns<Isa, Pairs, R, kMost>(to - from, p, from * Isa::kWidth);
        }
        return;
    }
    if constexpr (R > 1) attend_product<Isa, Pairs, R - 1>(rows, vectors, p);
}

template <class Isa>
void attend_by_tiles(int64_t rows, int64_t vectors, const TileProduct& p);  // tiled_attention.h

// The same of up to kAttendTall rows.
template <class Isa, bool Pairs>
inline void attend(int64_t rows, int64_t vectors, const TileProduct& p) {
    if constexpr (Isa::kAttendsByTiles) attend_by_tiles<Isa>(rows, vectors, p);
    else attend_product<Isa, Pairs>(rows, vectors, p);
}

// Rows [count, width] of any type into floats times `factor`, zeros up to the next whole vector.
template <class Isa, Float T>
inline void widen_scaled(const char* from, int64_t width, float factor, float* to) {
    constexpr int W = Isa::kWidth;
    for (int64_t k = 0; k < width; k += W) {
        const char* at = from + k * size_of(T);
        store(to + k, (k + W <= width ? load_float<Isa, T>(at) : load_tail<Isa, T>(at, width - k)) * factor);
    }
}

template <class Isa>
void widen_rows(Float type, const char* from, int64_t stride, int64_t count, int64_t width, float factor, float* to, int64_t to_stride) {
    for (int64_t r = 0; r < count; ++r, from += stride * size_of(type), to += to_stride) {
        switch (type) {
            case Float::f32: widen_scaled<Isa, Float::f32>(from, width, factor, to); break;
            case Float::bf16: widen_scaled<Isa, Float::bf16>(from, width, factor, to); break;
            case Float::f16: widen_scaled<Isa, Float::f16>(from, width, factor, to); break;
        }
    }
}

// Rows of words, `rows` of them (whole kTurned), row_bytes apart, transposed: to[words, whole fours][64].
template <class Isa>
inline void turn_words(const char* from, int64_t row_bytes, int64_t rows, int64_t words, float* to) {
    using V = typename Lane16<uint32_t>::V;
    for (int64_t k = 0; k < rows; k += Isa::kTurned) {
        for (int64_t i = 0; i < words; i += 4) {
            const char* at = from + k * row_bytes + i * 4;
            Isa::turn_quads([&](int line) { return load<V>(at + line * row_bytes); },
                            reinterpret_cast<uint8_t*>(to + i * kKeyBlock + k));
        }
    }
}

// A block of keys [count, width], transposed: to[width][64]. `wide`: room for [64, whole vectors of width] floats.
template <class Isa>
void turn_keys(Float type, const char* keys, int64_t stride, int64_t count, int64_t width, float* wide, float* to) {
    const int64_t padded = round_up(width, Isa::kWidth), all = round_up(count, Isa::kTurned);
    int64_t row_bytes = stride * size_of(type);
    if (type != Float::f32 || width % 4 != 0 || count != all) {
        widen_rows<Isa>(type, keys, stride, count, width, 1.0f, wide, padded);
        std::memset(wide + count * padded, 0, static_cast<size_t>((all - count) * padded) * sizeof(float));
        keys = reinterpret_cast<const char*>(wide);
        row_bytes = padded * static_cast<int64_t>(sizeof(float));
    }
    turn_words<Isa>(keys, row_bytes, all, width, to);
}

// A block of bfloat16 keys [count, width], transposed pair by pair of their features: to[(width + 1) / 2][64].
template <class Isa>
void turn_paired_keys(const char* keys, int64_t stride, int64_t count, int64_t width, float* wide, float* to) {
    const int64_t words = (width + 1) / 2, padded = round_up(words, 4), all = round_up(count, Isa::kTurned);
    int64_t row_bytes = stride * 2;
    if (width % 8 != 0 || count != all) {
        std::memset(wide, 0, static_cast<size_t>(all * padded) * sizeof(float));
        for (int64_t k = 0; k < count; ++k) std::memcpy(wide + k * padded, keys + k * row_bytes, static_cast<size_t>(width * 2));
        keys = reinterpret_cast<const char*>(wide);
        row_bytes = padded * static_cast<int64_t>(sizeof(float));
    }
    turn_words<Isa>(keys, row_bytes, all, words, to);
}

// A block of bfloat16 values [count, width] in pairs of keys: to[(count + 1) / 2][to_stride].
template <class Isa>
void pair_values(const char* values, int64_t stride, int64_t count, int64_t width, float* to, int64_t to_stride) {
    using U = typename Isa::U;
    constexpr int W = Isa::kWidth;
    for (int64_t k = 0; k < count; k += 2, values += stride * 4, to += to_stride) {
        for (int64_t i = 0; i < width; i += W) {
            const auto value = [&](int64_t key) {  // a float's upper half
                const char* at = values + (key * stride + i) * 2;
                if (k + key >= count) return U{};
                return bits<U>(i + W <= width ? load_float<Isa, Float::bf16>(at) : load_tail<Isa, Float::bf16>(at, width - i));
            };
            store(to + i, value(0) >> 16 | value(1));
        }
    }
}

template <class Isa, Float T, class Of>
inline void store_row(const float* from, int64_t width, char* to, Of of) {
    using F = typename Isa::F;
    constexpr int W = Isa::kWidth;
    for (int64_t k = 0; k < width; k += W) {
        const F y = of(load<F>(from + k));
        if (k + W <= width) {
            store_float<Isa, T>(to + k * size_of(T), y);
        } else {
            alignas(64) char last[W * 4];
            store_float<Isa, T>(last, y);
            std::memcpy(to + k * size_of(T), last, static_cast<size_t>((width - k) * size_of(T)));
        }
    }
}

// Times `factor`, as bfloat16.
template <class Isa>
inline void store_paired(const float* from, int64_t width, float factor, char* to) {
    using F = typename Isa::F;
    constexpr int W = Isa::kWidth;
    for (int64_t k = 0; k < width; k += 2 * W) {
        const F pairs = Isa::pair(load<F>(from + k) * factor, k + W < width ? load<F>(from + k + W) * factor : F{});
        if (k + 2 * W <= width) store(to + k * 2, pairs);
        else std::memcpy(to + k * 2, &pairs, static_cast<size_t>(width - k) * 2);
    }
}
