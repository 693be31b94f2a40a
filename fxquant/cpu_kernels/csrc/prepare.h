// What is done to a row of x before a product reads it: a norm over its values, or the product with a gate.
// Included into each isa_*.cpp inside an anonymous namespace, after functions.h.

// Sums are kept in 16 lanes whatever the vectors are, so that all instruction sets add in the same order.
template <class Isa>
struct Lanes {
    using F = typename Isa::F;
    static constexpr int kVectors = 16 / Isa::kWidth;
    F sum[kVectors] = {};

    float total() const {
        alignas(64) float lane[16];
        std::memcpy(lane, sum, sizeof(lane));
        for (int n = 8; n > 0; n /= 2) {
            for (int i = 0; i < n; ++i) lane[i] += lane[i + n];
        }
        return lane[0];
    }
};

// body(vector of the row's values, index of the first of them); zeros stand behind the last.
template <class Isa, Float T, class Body>
inline void for_values(const char* row, int64_t width, Body body) {
    int64_t k = 0;
    for (; k + Isa::kWidth <= width; k += Isa::kWidth) body(load_float<Isa, T>(row + k * size_of(T)), k);
    if (k < width) body(load_tail<Isa, T>(row + k * size_of(T), width - k), k);
}

template <class Isa, Float T, class Term>
inline float sum_of(const char* row, int64_t width, Term term) {
    Lanes<Isa> lanes;
    for_values<Isa, T>(row, width, [&](typename Isa::F v, int64_t k) { lanes.sum[k / Isa::kWidth % Lanes<Isa>::kVectors] += term(v, k); });
    return lanes.total();
}

// made: room for whole vectors behind the last value.
template <class Isa, Float T, bool Centered>
void normalize(const Before& before, const char* row, int64_t width, char* made) {
    using F = typename Isa::F;
    const auto n = static_cast<float>(width);
    float mean = 0.0f;
    if constexpr (Centered) mean = sum_of<Isa, T>(row, width, [](F v, int64_t) { return v; }) / n;
    const int64_t whole = width / Isa::kWidth * Isa::kWidth;
    const float squares = sum_of<Isa, T>(row, width, [&](F v, int64_t k) {
        F d = Centered ? v - mean : v;
        if (k >= whole) {  // the zeros behind the end are no values
            for (int64_t i = width - k; i < Isa::kWidth; ++i) d[i] = 0.0f;
        }
        return d * d;
    });
    const float factor = 1.0f / __builtin_sqrtf(squares / n + before.eps);
    for_values<Isa, T>(row, width, [&](F v, int64_t k) {
        F y = (Centered ? v - mean : v) * factor;
        if (before.weight != nullptr) y = y * load<F>(before.weight + k);
        if (before.bias != nullptr) y = y + load<F>(before.bias + k);
        store_float<Isa, T>(made + k * size_of(T), y);
    });
}

template <class Isa, Float T>
void gate(const Before& before, const char* row, const char* other, int64_t width, char* made) {
    using F = typename Isa::F;
    with_activation(before.activation, [&](auto a) {
        for_values<Isa, T>(row, width, [&](F v, int64_t k) {
            const char* at = other + k * size_of(T);
            const F by = k + Isa::kWidth <= width ? load_float<Isa, T>(at) : load_tail<Isa, T>(at, width - k);
            store_float<Isa, T>(made + k * size_of(T), activate<Isa, a()>(v) * by);
        });
    });
}

template <class Isa, Float T>
void prepare_of(const Before& before, const Rows& x, int64_t row, char* made) {
    const char* from = static_cast<const char*>(x.data) + row * x.stride * size_of(T);
    if (before.kind == Before::Kind::rmsnorm) return normalize<Isa, T, false>(before, from, x.width, made);
    if (before.kind == Before::Kind::layernorm) return normalize<Isa, T, true>(before, from, x.width, made);
    const Rows& other = before.other;
    gate<Isa, T>(before, from, static_cast<const char*>(other.data) + row * other.stride * size_of(T), x.width, made);
}

template <class Isa>
void prepare(const Before& before, const Rows& x, int64_t row, void* made) {
    auto* to = static_cast<char*>(made);
    switch (x.type) {
        case Float::f32: return prepare_of<Isa, Float::f32>(before, x, row, to);
        case Float::bf16: return prepare_of<Isa, Float::bf16>(before, x, row, to);
        case Float::f16: return prepare_of<Isa, Float::f16>(before, x, row, to);
    }
}
