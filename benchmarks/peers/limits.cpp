// The two limits of a CPU core: reads from memory, and int8 products that never leave the registers.
// g++ -O3 -march=native -shared -fPIC limits.cpp
#include <immintrin.h>

#include <cstdint>

extern "C" {

// Reads `bytes` bytes, a multiple of 256; returns a sum so that nothing is left out.
uint64_t read_all(const void *from, int64_t bytes) {
#ifdef __AVX512F__
    const auto *at = static_cast<const char *>(from);
    __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
    for (int64_t i = 0; i < bytes; i += 256) {
        a = _mm512_add_epi64(a, _mm512_loadu_si512(at + i));
        b = _mm512_add_epi64(b, _mm512_loadu_si512(at + i + 64));
        c = _mm512_add_epi64(c, _mm512_loadu_si512(at + i + 128));
        d = _mm512_add_epi64(d, _mm512_loadu_si512(at + i + 192));
    }
    return _mm512_reduce_add_epi64(_mm512_add_epi64(_mm512_add_epi64(a, b), _mm512_add_epi64(c, d)));
#else
    const auto *at = static_cast<const uint64_t *>(from);
    uint64_t sums[16] = {};
    for (int64_t i = 0; i < bytes / 8; i += 16)
        for (int j = 0; j < 16; j++) sums[j] += at[i + j];
    uint64_t sum = 0;
    for (uint64_t one : sums) sum += one;
    return sum;
#endif
}

// `rounds` rounds of 16 independent products u8 x s8 -> s32, each of 64 multiplications and additions; returns how many
// operations that was, 0 where the CPU has no such instruction. In assembly: g++ 12 moves the sums about in each round.
int64_t dot_products(int64_t rounds) {
#ifdef __AVX512VNNI__
    const __m512i x = _mm512_set1_epi32(0x01020304), w = _mm512_set1_epi32(0x01010101);
#define PRODUCT(sum) "vpdpbusd %1, %0, %%zmm" #sum "\n\t"
    for (int64_t i = 0; i < rounds; i++)
        asm volatile(PRODUCT(0) PRODUCT(1) PRODUCT(2) PRODUCT(3) PRODUCT(4) PRODUCT(5) PRODUCT(6) PRODUCT(7) PRODUCT(8)
                         PRODUCT(9) PRODUCT(10) PRODUCT(11) PRODUCT(12) PRODUCT(13) PRODUCT(14) PRODUCT(15)
                     :
                     : "v"(x), "v"(w)
                     : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",
                       "xmm12", "xmm13", "xmm14", "xmm15");
    return rounds * 16 * 64 * 2;
#else
    (void)rounds;
    return 0;
#endif
}
}
