// Vectors of W lanes, by the vector extension that GCC and Clang share, and the float formats read into and written from them.
// Included into each isa_*.cpp inside an anonymous namespace: every file gets its own copy, made with its own flags.

#if defined(__clang__)
#define FXQUANT_UNROLL _Pragma("unroll")
#define FXQUANT_UNROLL_ROWS FXQUANT_UNROLL
#else
#define FXQUANT_UNROLL _Pragma("GCC unroll 8")
#define FXQUANT_UNROLL_ROWS _Pragma("GCC unroll 16")
#endif

// Register tiles stand alone: inlined into their callers they would share registers with these, and spill.
#define FXQUANT_TILE __attribute__((noinline)) static
#define FXQUANT_INLINE __attribute__((always_inline)) static inline

template <int W>
struct Vectors {
    typedef float F __attribute__((vector_size(W * 4)));
    typedef int32_t I __attribute__((vector_size(W * 4)));
    typedef uint32_t U __attribute__((vector_size(W * 4)));
    typedef uint16_t H __attribute__((vector_size(W * 2)));
    typedef int16_t S __attribute__((vector_size(W * 2)));
    typedef int16_t D __attribute__((vector_size(W * 4)));  // twice as many
    typedef uint16_t Halves __attribute__((vector_size(W * 4)));
    typedef uint8_t Bytes __attribute__((vector_size(W * 4)));
    typedef int8_t B __attribute__((vector_size(W)));

    // x - 0 is x, minus zero too, so that this is a broadcast and nothing else; x + 0 would be an addition.
    static F splat(float x) { return x - F{}; }

    // 0, 1, 2, ...
    static I lanes() {
        alignas(W * 4) static constexpr int32_t kLanes[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        I v;
        std::memcpy(&v, kLanes, sizeof(I));
        return v;
    }

    static U merge(U x, uint32_t mask, uint32_t other) { return (x & mask) | other; }

    // The lesser and the greater of two; the second where one is NaN.
    static F least(F a, F b) { return a < b ? a : b; }
    static F greatest(F a, F b) { return a > b ? a : b; }

    static constexpr bool kStoresUpper = false;  // the upper halves of two vectors at once
    static constexpr bool kTakesBytes = false;   // the last byte of each lane
};

template <class V>
inline V load(const void* from) {
    V v;
    std::memcpy(&v, from, sizeof(V));
    return v;
}

template <class V>
inline void store(void* to, V v) {
    std::memcpy(to, &v, sizeof(V));
}

template <class To, class From>
inline To bits(From v) {
    static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
    To to;
    std::memcpy(&to, &v, sizeof(To));
    return to;
}

constexpr int64_t size_of(Float type) { return type == Float::f32 ? 4 : 2; }

template <class Isa, Float T>
inline typename Isa::F load_float(const void* from) {
    using F = typename Isa::F;
    using U = typename Isa::U;
    if constexpr (T == Float::f32) {
        return load<F>(from);
    } else if constexpr (T == Float::bf16) {
        return bits<F>(__builtin_convertvector(load<typename Isa::H>(from), U) << 16);
    } else {
        return Isa::load_half(from);
    }
}

// The last n < W values of a row, then zeros.
template <class Isa, Float T>
inline typename Isa::F load_tail(const void* from, int64_t n) {
    alignas(64) char padded[Isa::kWidth * 4] = {};
    std::memcpy(padded, from, n * size_of(T));
    return load_float<Isa, T>(padded);
}

// v rounded to bfloat16, nearest even, in the upper half of each lane; what stands below is left. NaN stays NaN.
template <class Isa>
inline typename Isa::U rounded_half(typename Isa::F v) {
    using U = typename Isa::U;
    const U u = bits<U>(v);
    const U rounded = u + 0x7fffu + ((u >> 16) & 1u);
    return v != v ? U{} + 0x7fc00000u : rounded;
}

// float32 -> T, nearest even; NaN stays NaN.
template <class Isa, Float T>
inline void store_float(void* to, typename Isa::F v) {
    if constexpr (T == Float::f32) {
        store(to, v);
    } else if constexpr (T == Float::bf16) {
        store(to, __builtin_convertvector(rounded_half<Isa>(v) >> 16, typename Isa::H));
    } else {
        Isa::store_half(to, v);
    }
}

// Two vectors, one behind the other.
template <class Isa, Float T>
inline void store_two(char* to, typename Isa::F a, typename Isa::F b) {
    if constexpr (T == Float::bf16 && Isa::kStoresUpper) return Isa::store_upper(to, rounded_half<Isa>(a), rounded_half<Isa>(b));
    store_float<Isa, T>(to, a);
    store_float<Isa, T>(to + Isa::kWidth * size_of(T), b);
}
