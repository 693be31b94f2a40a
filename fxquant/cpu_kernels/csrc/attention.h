// Attention in one pass over the keys: scores of a block of keys, their exponentials against the largest score so far, and the
// sum of values, which is scaled down when a larger one turns up (FlashAttention, Dao et al. 2022; the running maximum and sum:
// Milakov and Gimelshein 2018). float32 inside, whatever the operands are.
// Included into each isa_*.cpp inside an anonymous namespace, after vectors.h and turn.h.

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

// R rows x C vectors: out = a @ b, plus keep[row] * out where keep is given. a: [R, depth]; b: [depth, C vectors].
template <class Isa, int R, int C>
FXQUANT_TILE void attend_tile(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth, float* out,
                              int64_t out_stride, const float* keep) {
    using F = typename Isa::F;
    constexpr int W = Isa::kWidth;
    F sum[R][C];
    if (keep == nullptr) {
        FXQUANT_UNROLL for (int r = 0; r < R; ++r) FXQUANT_UNROLL for (int j = 0; j < C; ++j) sum[r][j] = F{};
    } else {
        FXQUANT_UNROLL for (int r = 0; r < R; ++r) FXQUANT_UNROLL for (int j = 0; j < C; ++j)
            sum[r][j] = load<F>(out + r * out_stride + j * W) * Isa::splat(keep[r]);
    }
    for (int64_t k = 0; k < depth; ++k, b += b_stride) {
        F value[C];
        FXQUANT_UNROLL for (int j = 0; j < C; ++j) value[j] = load<F>(b + j * W);
        FXQUANT_UNROLL for (int r = 0; r < R; ++r) {
            const F factor = Isa::splat(a[r * a_stride + k]);
            FXQUANT_UNROLL for (int j = 0; j < C; ++j) sum[r][j] = Isa::fma(factor, value[j], sum[r][j]);
        }
    }
    FXQUANT_UNROLL for (int r = 0; r < R; ++r) FXQUANT_UNROLL for (int j = 0; j < C; ++j)
        store(out + r * out_stride + j * W, sum[r][j]);
}

template <class Isa, int R, int C, class... Args>
inline void attend_columns(int64_t count, Args... args) {
    if (count == C) return attend_tile<Isa, R, C>(args...);
    if constexpr (C > 1) attend_columns<Isa, R, C - 1>(count, args...);
}

// The same for any number of rows up to kFloatTall and any number of vectors, in as few and as even tiles as there can be.
template <class Isa, int R = Isa::kFloatTall>
inline void attend_product(int64_t rows, int64_t vectors, const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                           int64_t depth, float* out, int64_t out_stride, const float* keep) {
    constexpr int kMost = R == 1 ? Isa::kLoneVectors : Isa::kFloatVectors;
    if (rows == R) {
        const int64_t tiles = (vectors + kMost - 1) / kMost;
        for (int64_t i = 0; i < tiles; ++i) {
            const int64_t from = vectors * i / tiles, to = vectors * (i + 1) / tiles, at = from * Isa::kWidth;
            attend_columns<Isa, R, kMost>(to - from, a, a_stride, b + at, b_stride, depth, out + at, out_stride, keep);
        }
        return;
    }
    if constexpr (R > 1) {
        attend_product<Isa, R - 1>(rows, vectors, a, a_stride, b, b_stride, depth, out, out_stride, keep);
    }
}

// What a mask leaves of one query's scores of a block.
struct Kept {
    int64_t end;  // none from here on
    bool plain;   // all up to there, as they are
};

inline Kept kept_of_bools(const uint8_t* mask, int64_t count) {
    constexpr int64_t kWord = sizeof(uint64_t);
    constexpr uint64_t kOnes = 0x0101010101010101u;
    bool all = true;
    int64_t end = 0, k = 0;
    for (; k + kWord <= count; k += kWord) {
        uint64_t word;
        std::memcpy(&word, mask + k, sizeof(word));  // of a size known here: one load
        if (word != 0) end = k + kWord;
        all = all && word == kOnes;
    }
    for (; k < count; ++k) {
        if (mask[k] != 0) end = k + 1;
        all = all && mask[k] != 0;
    }
    if (all) return {end, true};
    while (end > 0 && mask[end - 1] == 0) --end;
    return {end, std::memchr(mask, 0, static_cast<size_t>(end)) == nullptr};  // a prefix is plain too, such as a causal mask's
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
    return {any(some) ? count : 0, !any(other)};
}

template <class Isa>
Kept kept_of(MaskType type, const void* mask, int64_t count) {
    const auto* at = static_cast<const char*>(mask);
    switch (type) {
        case MaskType::boolean: return kept_of_bools(static_cast<const uint8_t*>(mask), count);
        case MaskType::f32: return kept_of_floats<Isa, Float::f32>(at, count);
        case MaskType::bf16: return kept_of_floats<Isa, Float::bf16>(at, count);
        case MaskType::f16: return kept_of_floats<Isa, Float::f16>(at, count);
        case MaskType::none: break;
    }
    return {count, true};
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

// What is known of queries: their largest scores so far, and the sums of exponentials against them.
struct Running {
    float* top;
    float* sum;
};

// The largest of a row of scores, of which `count` are there; the rest of their last vector becomes -infinity.
template <class Isa, int V>
inline float largest_score(float* scores, int64_t count, int64_t vectors) {
    using F = typename Isa::F;
    constexpr int W = Isa::kWidth;
    const F nothing = F{} - __builtin_inff();
    if (count < vectors * W) {
        float* last = scores + (vectors - 1) * W;
        store(last, Isa::lanes() < static_cast<int32_t>(count - (vectors - 1) * W) ? load<F>(last) : nothing);
    }
    F tops = nothing;
    FXQUANT_UNROLL for (int64_t j = 0; j < (V > 0 ? V : vectors); ++j) tops = kLarger(load<F>(scores + j * W), tops);
    return lanes_to_one<W>(tops, kLarger);
}

// A row of scores into exponentials against `base`. Returns their sum.
template <class Isa, int V>
inline float exponentials(float* scores, int64_t vectors, float base) {
    using F = typename Isa::F;
    constexpr int W = Isa::kWidth;
    F sums = F{};
    FXQUANT_UNROLL for (int64_t j = 0; j < (V > 0 ? V : vectors); ++j) {
        const F e = exponential_below<Isa>(load<F>(scores + j * W) - base);
        store(scores + j * W, e);
        sums += e;
    }
    return lanes_to_one<W>(sums, kSum);
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

// A block of keys [count, width], transposed: to[width][64]. `wide`: room for [64, whole vectors of width] floats.
template <class Isa>
void turn_keys(Float type, const char* keys, int64_t stride, int64_t count, int64_t width, float* wide, float* to) {
    using V = typename Lane16<uint32_t>::V;
    const auto* from = reinterpret_cast<const float*>(keys);
    const int64_t padded = round_up(width, Isa::kWidth), all = round_up(count, Isa::kTurned);
    if (type != Float::f32 || width % 4 != 0 || count != all) {
        widen_rows<Isa>(type, keys, stride, count, width, 1.0f, wide, padded);
        std::memset(wide + count * padded, 0, static_cast<size_t>((all - count) * padded) * sizeof(float));
        from = wide;
        stride = padded;
    }
    for (int64_t k = 0; k < all; k += Isa::kTurned) {
        for (int64_t i = 0; i < width; i += 4) {
            const float* at = from + k * stride + i;
            Isa::turn_quads([&](int line) { return load<V>(at + line * stride); },
                            reinterpret_cast<uint8_t*>(to + i * kKeyBlock + k));
        }
    }
}

template <class Isa, Float T>
inline void store_divided(const float* from, int64_t width, float by, char* to) {
    using F = typename Isa::F;
    constexpr int W = Isa::kWidth;
    for (int64_t k = 0; k < width; k += W) {
        const F y = load<F>(from + k) / by;
        if (k + W <= width) {
            store_float<Isa, T>(to + k * size_of(T), y);
        } else {
            alignas(64) char last[W * 4];
            store_float<Isa, T>(last, y);
            std::memcpy(to + k * size_of(T), last, static_cast<size_t>((width - k) * size_of(T)));
        }
    }
}

// The queries query0 <= q < query1 of all heads that share a key head: rows [query, head of the group] of one task. Their results
// depend on nothing else.
template <class Isa>
class AttentionTask {
public:
    AttentionTask(const AttentionProblem& problem, int64_t batch, int64_t key_head, int64_t query0, int64_t query1, void* room)
        : p(problem), batch_(batch), head0_(key_head * (p.heads / p.key_heads)), group_(p.heads / p.key_heads), query0_(query0),
          rows_((query1 - query0) * group_), width_(round_up(p.width, kPad)), value_width_(round_up(p.value_width, kPad)) {
        auto* at = static_cast<float*>(room);
        const auto take = [&](int64_t floats) { return std::exchange(at, at + round_up(floats, kPad)); };
        queries_ = take(rows_ * width_);
        sums_ = take(rows_ * value_width_);
        keys_ = take(width_ * kKeyBlock);
        wide_ = take((width_ > value_width_ ? width_ : value_width_) * kKeyBlock);
        scores_ = take(Isa::kFloatTall * kKeyBlock);
        running_ = {take(rows_), take(rows_)};
        kept_ = reinterpret_cast<Kept*>(take(rows_ * 4));
        key_data_ = operand(p.key, key_head);
        value_data_ = operand(p.value, key_head);
    }

    void run() {
        for (int64_t r = 0; r < rows_; ++r) {
            const char* from = static_cast<const char*>(p.query.data) +
                               (batch_ * p.query.batch + head(r) * p.query.head + query(r) * p.query.row) * size_of(p.type);
            widen_rows<Isa>(p.type, from, 0, 1, p.width, p.scale, queries_ + r * width_, width_);
            running_.top[r] = -__builtin_inff();
            running_.sum[r] = 0.0f;
        }
        std::memset(sums_, 0, static_cast<size_t>(rows_ * value_width_) * sizeof(float));
        const int64_t past = query(rows_ - 1) + 1;
        const int64_t end = p.causal && past < p.keys ? past : p.keys;
        for (int64_t k = 0; k < end; k += kKeyBlock) block(k, end - k < kKeyBlock ? end - k : kKeyBlock);
        finish();
    }

private:
    static constexpr int64_t kPad = 16;
    static constexpr int W = Isa::kWidth;

    int64_t query(int64_t row) const { return query0_ + row / group_; }
    int64_t head(int64_t row) const { return head0_ + row % group_; }
    const char* operand(const AttentionOperand& of, int64_t key_head) const {
        return static_cast<const char*>(of.data) + (batch_ * of.batch + key_head * of.head) * size_of(p.type);
    }
    const char* mask(int64_t row, int64_t k0) const {
        const int64_t at = batch_ * p.mask.batch + head(row) * p.mask.head + query(row) * p.mask.row + k0;
        return static_cast<const char*>(p.mask.data) + at * mask_size(p.mask_type);
    }
    int64_t count_of(int64_t row, int64_t k0, int64_t count) const {  // keys of the block up to the diagonal
        if (!p.causal) return count;
        const int64_t left = query(row) + 1 - k0;
        return left < 0 ? 0 : left < count ? left : count;
    }

    bool look_at_mask(int64_t k0, int64_t count) {
        if (p.mask_type == MaskType::none && !p.causal) {
            for (int64_t r = 0; r < rows_; ++r) kept_[r] = {count, true};
            return true;
        }
        bool some = false;
        for (int64_t r = 0; r < rows_; ++r) {
            const bool as_before = r % group_ != 0 && p.mask.head == 0;
            const int64_t n = as_before ? 0 : count_of(r, k0, count);
            kept_[r] = as_before ? kept_[r - 1] : p.mask_type == MaskType::none ? Kept{n, true} : kept_of<Isa>(p.mask_type, mask(r, k0), n);
            some = some || kept_[r].end > 0;
        }
        return some;
    }

    void block(int64_t k0, int64_t count) {
        if (!look_at_mask(k0, count)) return;
        const int64_t size = size_of(p.type);
        turn_keys<Isa>(p.type, key_data_ + k0 * p.key.row * size, p.key.row, count, p.width, wide_, keys_);
        const char* values = value_data_ + k0 * p.value.row * size;
        const auto* value = reinterpret_cast<const float*>(values);
        int64_t stride = p.value.row;
        if (p.type != Float::f32 || p.value_width % W != 0) {
            widen_rows<Isa>(p.type, values, stride, count, p.value_width, 1.0f, wide_, value_width_);
            value = wide_;
            stride = value_width_;
        }
        for (int64_t r = 0; r < rows_; r += Isa::kFloatTall) {
            tile(r, rows_ - r < Isa::kFloatTall ? rows_ - r : Isa::kFloatTall, k0, value, stride);
        }
    }

    void tile(int64_t row, int64_t rows, int64_t k0, const float* value, int64_t value_stride) {
        int64_t end = 0;
        for (int64_t r = row; r < row + rows; ++r) end = kept_[r].end > end ? kept_[r].end : end;
        if (end == 0) return;
        const int64_t vectors = (end + W - 1) / W;
        attend_product<Isa>(rows, vectors, queries_ + row * width_, width_, keys_, kKeyBlock, p.width, scores_, kKeyBlock, nullptr);
        alignas(64) float keep[kPad];
        soften(row, rows, end, k0, keep);
        attend_product<Isa>(rows, (p.value_width + W - 1) / W, scores_, kKeyBlock, value, value_stride, end,
                            sums_ + row * value_width_, value_width_, keep);
    }

    // Scores of a tile into exponentials, 0 where there is none; keep: what each row's sums so far are multiplied by.
    void soften(int64_t row, int64_t rows, int64_t end, int64_t k0, float* keep) {
        constexpr int kAll = kKeyBlock / W;
        alignas(64) float base[kPad] = {};
        for (int64_t r = 0; r < kPad; ++r) keep[r] = 0.0f;
        for (int64_t r = 0; r < rows; ++r) {
            float* scores = scores_ + r * kKeyBlock;
            const Kept& kept = kept_[row + r];
            if (!kept.plain) apply_mask<Isa>(p.mask_type, mask(row + r, k0), kept.end, scores);
            const int64_t own = (kept.end + W - 1) / W;
            for (int64_t k = own * W; k < end; k += W) store(scores + k, typename Isa::F{});
            const float before = running_.top[row + r];
            float top = before;
            if (own > 0) {
                top = own == kAll ? largest_score<Isa, kAll>(scores, kept.end, own) : largest_score<Isa, 0>(scores, kept.end, own);
                top = kLarger(top, before);
            }
            running_.top[row + r] = top;
            base[r] = top == -__builtin_inff() ? 0.0f : top;  // nothing there yet: all exponentials are 0
            keep[r] = before - base[r];
        }
        for (int64_t r = 0; r < Isa::kFloatTall; r += W) store(keep + r, exponential_below<Isa>(load<typename Isa::F>(keep + r)));
        for (int64_t r = 0; r < rows; ++r) {
            float* scores = scores_ + r * kKeyBlock;
            const int64_t own = (kept_[row + r].end + W - 1) / W;
            const float sum = own == kAll ? exponentials<Isa, kAll>(scores, own, base[r]) : exponentials<Isa, 0>(scores, own, base[r]);
            running_.sum[row + r] = running_.sum[row + r] * keep[r] + sum;
        }
    }

    void finish() {
        for (int64_t r = 0; r < rows_; ++r) {
            const float sum = running_.sum[r];
            const float by = sum == 0.0f ? 1.0f : sum;  // nothing was left: 0
            const float* from = sums_ + r * value_width_;
            char* to = static_cast<char*>(p.out) +
                       ((batch_ * p.queries + query(r)) * p.heads + head(r)) * p.value_width * size_of(p.type);
            switch (p.type) {
                case Float::f32: store_divided<Isa, Float::f32>(from, p.value_width, by, to); break;
                case Float::bf16: store_divided<Isa, Float::bf16>(from, p.value_width, by, to); break;
                case Float::f16: store_divided<Isa, Float::f16>(from, p.value_width, by, to); break;
            }
        }
    }

    const AttentionProblem& p;
    int64_t batch_, head0_, group_, query0_, rows_, width_, value_width_;
    float *queries_, *sums_, *keys_, *wide_, *scores_;
    Running running_;
    Kept* kept_;
    const char *key_data_, *value_data_;
};

template <class Isa>
void attention(const AttentionProblem& problem, int64_t batch, int64_t key_head, int64_t query0, int64_t query1, void* room) {
    AttentionTask<Isa>(problem, batch, key_head, query0, query1, room).run();
}
