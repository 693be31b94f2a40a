// Interleaving, by vectors of 16 bytes, and the transposition of small tiles made of it. Included into each isa_*.cpp inside
// an anonymous namespace, after vectors.h.

// Vectors of 16 bytes, which every instruction set can interleave. Their elements count as unsigned, whatever they hold.
template <class E>
struct Lane16 {
    using Raw = std::conditional_t<sizeof(E) == 1, uint8_t, std::conditional_t<sizeof(E) == 2, uint16_t, uint32_t>>;
    static constexpr int kCount = 16 / static_cast<int>(sizeof(E));
    typedef Raw V __attribute__((vector_size(16)));
};

#if defined(__clang__)
#define FXQUANT_SHUFFLE(V, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FXQUANT_SHUFFLE(V, a, b, ...) __builtin_shuffle(a, b, V{__VA_ARGS__})
#endif

// The first, or last, halves of two vectors, their elements taken in turn.
template <class V>
inline V low_halves(V a, V b) {
    if constexpr (sizeof(a[0]) == 1) return FXQUANT_SHUFFLE(V, a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    else if constexpr (sizeof(a[0]) == 2) return FXQUANT_SHUFFLE(V, a, b, 0, 8, 1, 9, 2, 10, 3, 11);
    else return FXQUANT_SHUFFLE(V, a, b, 0, 4, 1, 5);
}

template <class V>
inline V high_halves(V a, V b) {
    if constexpr (sizeof(a[0]) == 1) return FXQUANT_SHUFFLE(V, a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    else if constexpr (sizeof(a[0]) == 2) return FXQUANT_SHUFFLE(V, a, b, 4, 12, 5, 13, 6, 14, 7, 15);
    else return FXQUANT_SHUFFLE(V, a, b, 2, 6, 3, 7);
}

// n <= kCount lines, vectors, become columns: to[j * to_stride + i] = line(i)[j], for j < count. 16 bytes of each row of `to`
// are written, zeros where i >= n.
template <class E, class Line>
inline void turn_tile(Line line, int64_t n, int64_t count, E* to, int64_t to_stride) {
    using V = typename Lane16<E>::V;
    constexpr int T = Lane16<E>::kCount;
    V a[T], b[T];
    if (n == T) {
        FXQUANT_UNROLL for (int i = 0; i < T; ++i) a[i] = line(i);
    } else {
        for (int i = 0; i < T; ++i) a[i] = i < n ? line(i) : V{};
    }
    // Interleaving line i with line i + T/2, log2(T) times, is a transposition.
    for (int stage = 1; stage < T; stage *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < T / 2; ++i) {
            b[2 * i] = low_halves(a[i], a[i + T / 2]);
            b[2 * i + 1] = high_halves(a[i], a[i + T / 2]);
        }
        FXQUANT_UNROLL for (int i = 0; i < T; ++i) a[i] = b[i];
    }
    if (count >= T) {
        FXQUANT_UNROLL for (int j = 0; j < T; ++j) store(to + j * to_stride, a[j]);
    } else {
        for (int64_t j = 0; j < count; ++j) store(to + j * to_stride, a[j]);
    }
}
