// Scores of attention: what a mask leaves of them, and their exponentials. Included into each isa_*.cpp inside an anonymous
// namespace, after vectors.h.

constexpr auto kLarger = [](auto a, auto b) { return a > b ? a : b; };  // b where one is NaN
constexpr auto kSum = [](auto a, auto b) { return a + b; };

// e^x of x <= 0, to 2 units in the last place and what rounding x * log2(e) makes of it; 0 below e^-87.6, NaN of NaN.
template <class Isa>
inline typename Isa::F exponential_below(typename Isa::F x) {
    using F = typename Isa::F;
    using U = typename Isa::U;
    constexpr float kLog2E = 0x1.715476p0f, kMagic = 12582912.0f;  // 1.5 * 2^23: the sum's last bits are the nearest integer
    const F bottom = F{} - 88.0f, log2e = F{} + kLog2E, magic = F{} + kMagic;
    x = kLarger(bottom, x);  // 2^-127 then, whose bits are 0
    const F sum = Isa::fma(x, log2e, magic);
    const F r = Isa::fma(x, log2e, magic - sum);
    F p = F{} + 1.535336188319500e-4f;  // 2^r on [-1/2, 1/2]: Cephes' exp2f
    p = Isa::fma(p, r, F{} + 1.339887440266574e-3f);
    p = Isa::fma(p, r, F{} + 9.618437357674640e-3f);
    p = Isa::fma(p, r, F{} + 5.550332471162809e-2f);
    p = Isa::fma(p, r, F{} + 2.402264791363012e-1f);
    p = Isa::fma(p, r, F{} + 6.931472028550421e-1f);
    p = Isa::fma(p, r, F{} + 1.0f);
    return p * bits<F>((bits<U>(sum) << 23) + 0x3f800000u);
}

// Halved until four lanes are left, in the same order on every machine of that width.
template <int W, class F, class Of>
inline float lanes_to_one(F v, Of of) {
    if constexpr (W > 4) {
        typedef float Half __attribute__((vector_size(W * 2)));
        Half halves[2];
        std::memcpy(halves, &v, sizeof(v));
        return lanes_to_one<W / 2>(of(halves[0], halves[1]), of);
    } else {
        typedef float Pair __attribute__((vector_size(16)));
        const Pair swapped = {v[2], v[3], v[0], v[1]};
        const Pair two = of(Pair(v), swapped);
        const Pair one = of(two, Pair{two[1], two[0], two[3], two[2]});
        return one[0];
    }
}

// What a mask leaves of one query's scores of a block.
struct Kept {
    int32_t end;  // none from here on
    bool plain;   // all up to there, as they are
};

// A bit for each of `count` <= kKeyBlock bytes that is not 0.
template <class Isa>
inline uint64_t bits_of_bools(const uint8_t* bools, int64_t count) {
    static_assert(kKeyBlock == 64, "a bit for each key");
    if constexpr (Isa::kTestsBytes) return Isa::bits_of_bytes(bools, count);
    constexpr uint64_t kOnes = 0x0101010101010101u, kLow = 0x7fu * kOnes, kGather = 0x0102040810204080u;
    uint64_t found = 0;
    for (int64_t k = 0; k < count; k += 8) {
        uint64_t word = 0;
        if (k + 8 <= count) word = load<uint64_t>(bools + k);
        else std::memcpy(&word, bools + k, static_cast<size_t>(count - k));
        const uint64_t some = (((word & kLow) + kLow) | word) >> 7 & kOnes;  // no carry leaves its byte
        found |= (some * kGather >> 56) << k;
    }
    return found;
}

template <class Isa>
inline Kept kept_of_bools(const uint8_t* mask, int64_t count) {
    const uint64_t kept = bits_of_bools<Isa>(mask, count);
    if (kept == 0) return {0, true};
    return {64 - __builtin_clzll(kept), (kept & (kept + 1)) == 0};  // a prefix is plain, such as a causal mask's
}

template <class Isa, Float T>
Kept kept_of_floats(const char* mask, int64_t count) {
    using F = typename Isa::F;
    using I = typename Isa::I;
    constexpr int W = Isa::kWidth;
    I some = I{}, other = I{};
    for (int64_t k = 0; k < count; k += W) {
        const char* at = mask + k * size_of(T);
        const F m = k + W <= count ? load_float<Isa, T>(at) : load_tail<Isa, T>(at, count - k);
        const I left = k + W <= count ? I{} : Isa::lanes() >= static_cast<int32_t>(count - k);
        some |= (m != F{} - __builtin_inff()) & ~left;
        other |= (m != F{}) & ~left;
    }
    const auto any = [](I v) {
        int32_t lanes[W], found = 0;
        std::memcpy(lanes, &v, sizeof(v));
        for (int i = 0; i < W; ++i) found |= lanes[i];
        return found != 0;
    };
    return {any(some) ? static_cast<int32_t>(count) : 0, !any(other)};
}

template <class Isa>
Kept kept_of(MaskType type, const void* mask, int64_t count) {
    const auto* at = static_cast<const char*>(mask);
    switch (type) {
        case MaskType::boolean: return kept_of_bools<Isa>(static_cast<const uint8_t*>(mask), count);
        case MaskType::f32: return kept_of_floats<Isa, Float::f32>(at, count);
        case MaskType::bf16: return kept_of_floats<Isa, Float::bf16>(at, count);
        case MaskType::f16: return kept_of_floats<Isa, Float::f16>(at, count);
        case MaskType::none: break;
    }
    return {static_cast<int32_t>(count), true};
}

template <class Isa, Float T>
inline void add_mask(const char* mask, int64_t count, float* scores) {
    using F = typename Isa::F;
    for (int64_t k = 0; k < count; k += Isa::kWidth) {
        const char* at = mask + k * size_of(T);
        const F m = k + Isa::kWidth <= count ? load_float<Isa, T>(at) : load_tail<Isa, T>(at, count - k);
        store(scores + k, load<F>(scores + k) + m);
    }
}

// Scores k < count of one query that its mask leaves out become -infinity, or the mask is added.
template <class Isa>
void apply_mask(MaskType type, const void* mask, int64_t count, float* scores) {
    using F = typename Isa::F;
    using I = typename Isa::I;
    using B = typename Isa::B;
    constexpr int W = Isa::kWidth;
    const auto* at = static_cast<const char*>(mask);
    switch (type) {
        case MaskType::f32: return add_mask<Isa, Float::f32>(at, count, scores);
        case MaskType::bf16: return add_mask<Isa, Float::bf16>(at, count, scores);
        case MaskType::f16: return add_mask<Isa, Float::f16>(at, count, scores);
        case MaskType::none: return;
        case MaskType::boolean: break;
    }
    for (int64_t k = 0; k < count; k += W) {
        B taken = B{};
        std::memcpy(&taken, at + k, static_cast<size_t>(k + W <= count ? W : count - k));
        const I is_taken = __builtin_convertvector(taken, I) != 0;
        store(scores + k, is_taken ? load<F>(scores + k) : F{} - __builtin_inff());
    }
}

// What is known of the queries of a tile: each one's largest score so far, and its sum of exponentials against it; in pairs a vector
// of sums.
struct Running {
    float* top;
    float* sum;
};

// Stores V vectors of exponentials, and returns their sum. Pairs: rounded to bfloat16 first, so that the weights are summed up as
// they are used: those of equal values then give that value, and errors of neighbours undo each other.
template <class Isa, bool Pairs, int V>
FXQUANT_INLINE typename Isa::F put_weights(const typename Isa::F (&weight)[V], float* to) {
    using F = typename Isa::F;
    using U = typename Isa::U;
    constexpr int W = Isa::kWidth;
    F sum = F{};
    if constexpr (Pairs) {
        const F ones = bits<F>(U{} + 0x3f803f80u);
        FXQUANT_UNROLL for (int j = 0; j < V; j += 2) {
            const F pairs = Isa::pair(weight[j], j + 1 < V ? weight[j + 1 < V ? j + 1 : j] : F{});
            store(to + j / 2 * W, pairs);
            sum = Isa::add_pairs(sum, pairs, ones);
        }
    } else {
        FXQUANT_UNROLL for (int j = 0; j < V; ++j) {
            store(to + j * W, weight[j]);
            sum += weight[j];
        }
    }
    return sum;
}

// Of `rows` rows of V vectors of scores, kept[r].end are there; the others become -infinity. base: what each row's exponentials are
// to be taken against; change: what its base before was more than that.
template <class Isa, int V>
inline void raise_tops(const Kept* kept, int64_t rows, float* scores, float* tops, float* base, float* change) {
    using F = typename Isa::F;
    constexpr int W = Isa::kWidth;
    const F nothing = F{} - __builtin_inff();
    for (int64_t r = 0; r < rows; ++r, scores += kKeyBlock) {
        F score[V], largest = nothing;
        FXQUANT_UNROLL for (int j = 0; j < V; ++j) score[j] = load<F>(scores + j * W);
        if (kept[r].end < V * W) {
            FXQUANT_UNROLL for (int j = 0; j < V; ++j) {
                score[j] = Isa::lanes() < static_cast<int32_t>(kept[r].end - j * W) ? score[j] : nothing;
                store(scores + j * W, score[j]);
            }
        }
        FXQUANT_UNROLL for (int j = 0; j < V; ++j) largest = kLarger(score[j], largest);
        const float before = tops[r], top = kLarger(lanes_to_one<W>(largest, kLarger), before);
        tops[r] = top;
        base[r] = top == -__builtin_inff() ? 0.0f : top;  // nothing there yet: all exponentials are 0
        change[r] = before - base[r];
    }
}

// The scores of a tile into exponentials, 0 where there are none. keep: what each row's sums so far are multiplied by; whole vectors
// of kAttendTall are written.
template <class Isa, bool Pairs, int V>
inline void soften(const Kept* kept, int64_t rows, float* scores, Running so_far, float* keep) {
    using F = typename Isa::F;
    constexpr int W = Isa::kWidth;
    constexpr int64_t kTall = Isa::kAttendTall;
    alignas(64) float base[round_up(kTall, W)] = {};
    for (int64_t r = 0; r < kTall; r += W) store(keep + r, F{});
    raise_tops<Isa, V>(kept, rows, scores, so_far.top, base, keep);
    for (int64_t r = 0; r < kTall; r += W) store(keep + r, exponential_below<Isa>(load<F>(keep + r)));
    for (int64_t r = 0; r < rows; ++r, scores += kKeyBlock) {
        F weight[V];
        FXQUANT_UNROLL for (int j = 0; j < V; ++j) weight[j] = exponential_below<Isa>(load<F>(scores + j * W) - base[r]);
        const F sum = put_weights<Isa, Pairs, V>(weight, scores);
        if constexpr (Pairs) store(so_far.sum + r * W, Isa::fma(load<F>(so_far.sum + r * W), Isa::splat(keep[r]), sum));
        else so_far.sum[r] = so_far.sum[r] * keep[r] + lanes_to_one<W>(sum, kSum);
    }
}

template <class Isa, bool Pairs, int V = kKeyBlock / Isa::kWidth>
inline void soften_vectors(int64_t vectors, const Kept* kept, int64_t rows, float* scores, Running so_far, float* keep) {
    if (vectors == V) return soften<Isa, Pairs, V>(kept, rows, scores, so_far, keep);
    if constexpr (V > 1) soften_vectors<Isa, Pairs, V - 1>(vectors, kept, rows, scores, so_far, keep);
}
