// Activation functions of vectors of floats. No fused multiply-add: all instruction sets give the same bits.
// Included into each isa_*.cpp inside an anonymous namespace, after vectors.h and quantize.h.

// e^x, to 2 units in the last place up to e^88.3, then infinity; never below e^-87.3. NaN of NaN. N vectors side by side: each
// is one long chain of operations, and a processor looks ahead over a few vectors' at most.
template <class Isa, int N>
inline void exponentials(typename Isa::F (&x)[N]) {
    using F = typename Isa::F;
    using I = typename Isa::I;
    constexpr float kLog2E = 0x1.715476p0f, kLn2High = 0x1.63p-1f, kLn2Low = -0x1.bd0106p-13f;
    constexpr float kMagic = 12582912.0f;  // see nearest_integers
    constexpr float kTerms[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
    F raised[N], r[N], p[N];
    FXQUANT_UNROLL for (int i = 0; i < N; ++i) x[i] = Isa::greatest(F{} - 87.3f, Isa::least(F{} + 88.8f, x[i]));  // NaN stays
    FXQUANT_UNROLL for (int i = 0; i < N; ++i) raised[i] = x[i] * kLog2E + kMagic;
    FXQUANT_UNROLL for (int i = 0; i < N; ++i) {
        const F whole = raised[i] - kMagic;
        r[i] = (x[i] - whole * kLn2High) - whole * kLn2Low;  // the first product is exact: kLn2High has 9 bits
    }
    FXQUANT_UNROLL for (int i = 0; i < N; ++i) p[i] = F{} + 1.9875691500e-4f;
    FXQUANT_UNROLL for (int n = 0; n < 5; ++n) {
        FXQUANT_UNROLL for (int i = 0; i < N; ++i) p[i] = p[i] * r[i] + kTerms[n];
    }
    FXQUANT_UNROLL for (int i = 0; i < N; ++i) p[i] = p[i] * (r[i] * r[i]) + (r[i] + 1.0f);
    // The last bits of `raised` are the whole number, at most 128, whose power of 2 has infinity's bits.
    FXQUANT_UNROLL for (int i = 0; i < N; ++i) x[i] = p[i] * bits<F>((bits<I>(raised[i]) + 127) << 23);
}

template <class Isa>
inline typename Isa::F exponential(typename Isa::F x) {
    typename Isa::F one[1] = {x};
    exponentials<Isa, 1>(one);
    return one[0];
}

// The error function, to 4 units of 2^-24: a quotient of polynomials as in XLA (erf32), 1 beyond its range.
template <class Isa>
inline typename Isa::F error_function(typename Isa::F x) {
    using F = typename Isa::F;
    const F one = F{} + 1.0f, end = F{} + 3.8325068f;
    const F s = x * x;
    F p = s * 2.2905065861350646e-4f + 3.4082910107109506e-3f;
    p = p * s + 5.0955695062380861e-2f;
    p = p * s + 1.8520832239976145e-1f;
    p = p * s + 1.128379143519084f;
    F q = s * -1.1791602954361697e-7f + 2.3547966471313185e-5f;
    q = q * s + 1.0179625278914885e-3f;
    q = q * s + 1.4070470171167667e-2f;
    q = q * s + 1.1098505178285362e-1f;
    q = q * s + 4.9746925110067538e-1f;
    q = q * s + 1.0f;
    const F inside = x * p / q;
    return x > end ? one : x < -end ? -one : inside;
}

// x = activation(x)
template <class Isa, Activation A, int N>
inline void activate_vectors(typename Isa::F (&x)[N]) {
    using F = typename Isa::F;
    F e[N];
    FXQUANT_UNROLL for (int i = 0; i < N; ++i) {
        if constexpr (A == Activation::relu) x[i] = x[i] < F{} ? F{} : x[i];
        if constexpr (A == Activation::gelu) x[i] = x[i] * 0.5f * (error_function<Isa>(x[i] * 0.70710678f) + 1.0f);
        if constexpr (A == Activation::silu) e[i] = -x[i];
        if constexpr (A == Activation::gelu_tanh) e[i] = (x[i] * x[i] * x[i] * 0.044715f + x[i]) * 0.79788456f * 2.0f;
    }
    if constexpr (A != Activation::silu && A != Activation::gelu_tanh) return;
    exponentials<Isa, N>(e);
    FXQUANT_UNROLL for (int i = 0; i < N; ++i) {
        if constexpr (A == Activation::silu) x[i] = x[i] / (e[i] + 1.0f);
        if constexpr (A == Activation::gelu_tanh) x[i] = x[i] * 0.5f * (2.0f - 2.0f / (e[i] + 1.0f));
    }
}

template <class Isa, Activation A>
inline typename Isa::F activate(typename Isa::F x) {
    typename Isa::F one[1] = {x};
    activate_vectors<Isa, A, 1>(one);
    return one[0];
}

// body(integral constant of the activation)
template <class Body>
inline void with_activation(Activation activation, Body body) {
    switch (activation) {
        case Activation::none: return body(std::integral_constant<Activation, Activation::none>());
        case Activation::relu: return body(std::integral_constant<Activation, Activation::relu>());
        case Activation::gelu: return body(std::integral_constant<Activation, Activation::gelu>());
        case Activation::gelu_tanh: return body(std::integral_constant<Activation, Activation::gelu_tanh>());
        case Activation::silu: return body(std::integral_constant<Activation, Activation::silu>());
    }
}

// y = activation(y) + residual, for one panel's columns of one row. residual: `count` values of T, or null. One function for
// all products: inlined into each, these would be most of their code.
template <class Isa, Float T>
FXQUANT_TILE void follow(Activation activation, const char* residual, int64_t count, float* y) {
    using F = typename Isa::F;
    with_activation(activation, [&](auto a) {
        if constexpr (a() != Activation::none) {
            for (int64_t c = 0; c < kPanel; c += Isa::kWidth) store(y + c, activate<Isa, a()>(load<F>(y + c)));
        }
    });
    if (residual == nullptr) return;
    alignas(64) char padded[kPanel * 4];
    if (count < kPanel) {
        std::memset(padded, 0, sizeof(padded));
        std::memcpy(padded, residual, count * size_of(T));
        residual = padded;
    }
    for (int64_t c = 0; c < kPanel; c += Isa::kWidth) {
        store(y + c, load<F>(y + c) + load_float<Isa, T>(residual + c * size_of(T)));
    }
}
