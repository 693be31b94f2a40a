// AVX2 with AVX-VNNI, which CPUs without AVX512 have: codes staged as u8 = code + 128, one vpdpbusd per 32 products.
#include "kernels.h"

#if defined(__AVX2__) && (defined(__clang__) || __GNUC__ >= 11)  // an assembler that knows it stands beside them
#include <immintrin.h>

#include <cstring>
#include <type_traits>
#include <utility>

namespace fxquant {
namespace {
#include "vectors.h"
#include "quantize.h"
#include "fixed_point.h"
#include "functions.h"
#include "prepare.h"
#include "turn.h"
#include "apart.h"
#include "spread.h"
#include "planes.h"
#include "patterns.h"
#include "panel_quads.h"
#include "avx2.h"

struct AvxVnni : Avx2 {
    using Code = uint8_t;
    using CodeVector = B;  // the low byte of code + 128 is the same, signed or not
    static constexpr int kCodeOffset = 128;
    static constexpr int kTall = 6;  // 6 rows x 2 vectors of sums, 2 of B, 1 broadcast: 15 of 16 registers
    static constexpr bool kMultipliesDigits = true;

    // sum + the products of four bytes of each lane, those of `low` unsigned, of `high` signed.
    FXQUANT_INLINE __m256i add_quads(__m256i sum, __m256i low, __m256i high) {
        asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(low), "x"(high));
        return sum;
    }

    // R rows x V vectors of 8 columns over n quads. Unsigned: the codes, or the patterns of B.
    template <int R, int V, class Byte>
    FXQUANT_TILE void dot_columns(const char* codes, int64_t stride, const Byte* b, int64_t n, int32_t* acc, bool add) {
        __m256i sum[R][V];
        FXQUANT_UNROLL for (int r = 0; r < R; ++r) FXQUANT_UNROLL for (int j = 0; j < V; ++j)
            sum[r][j] = add ? load<__m256i>(acc + r * kPanel + j * 8) : _mm256_setzero_si256();
        const auto put = [&](__m256i& to, __m256i a, __m256i columns) {
            to = std::is_same<Byte, int8_t>::value ? add_quads(to, a, columns) : add_quads(to, columns, a);
        };
        for (int64_t q = 0; q < n; ++q, codes += kQuad, b += kPanel * kQuad) {
            if constexpr (R <= V) {  // few rows stay in registers, and wait for memory
                __m256i a[R];
                FXQUANT_UNROLL for (int r = 0; r < R; ++r) a[r] = _mm256_set1_epi32(load<int32_t>(codes + r * stride));
                FXQUANT_UNROLL for (int j = 0; j < V; j += 2) __builtin_prefetch(b + kFetch + j * 32);
                FXQUANT_UNROLL for (int j = 0; j < V; ++j) {
                    const __m256i columns = load<__m256i>(b + j * 32);
                    FXQUANT_UNROLL for (int r = 0; r < R; ++r) put(sum[r][j], a[r], columns);
                }
            } else {
                __m256i columns[V];
                FXQUANT_UNROLL for (int j = 0; j < V; ++j) columns[j] = load<__m256i>(b + j * 32);
                FXQUANT_UNROLL for (int r = 0; r < R; ++r) {
                    const __m256i a = _mm256_set1_epi32(load<int32_t>(codes + r * stride));
                    FXQUANT_UNROLL for (int j = 0; j < V; ++j) put(sum[r][j], a, columns[j]);
                }
            }
        }
        FXQUANT_UNROLL for (int r = 0; r < R; ++r) FXQUANT_UNROLL for (int j = 0; j < V; ++j)
            store(acc + r * kPanel + j * 8, sum[r][j]);
    }

    template <int R, class Byte>
    static void dot_of(const char* codes, int64_t stride, const Byte* b, int64_t depth, int32_t* acc, bool add) {
        constexpr int64_t kNear = 64;  // quads: 16 KiB of B stay in L1 while its column groups are walked one by one
        constexpr int V = R == 1 ? 8 : R <= 3 ? 4 : 2;
        for (int64_t q = 0; q < depth; q += kNear) {
            const int64_t n = depth - q < kNear ? depth - q : kNear;
            for (int64_t c = 0; c < kPanel; c += 8 * V) {
                dot_columns<R, V>(codes + q * kQuad, stride, b + (q * kPanel + c) * kQuad, n, acc + c, add || q > 0);
            }
        }
    }

    template <int R>
    static void dot(const char* codes, int64_t stride, const int8_t* b, int64_t depth, int32_t* acc, bool add, const int8_t*) {
        dot_of<R>(codes, stride, b, depth, acc, add);
    }

    template <int R>
    static void dot_patterns(const char* codes, int64_t stride, const uint8_t* b, int64_t depth, int32_t* acc, bool add) {
        dot_of<R>(codes, stride, b, depth, acc, add);
    }
};

#include "finish.h"
#include "products.h"
#include "float_product.h"
#include "fused.h"
#include "granules.h"
#include "coded.h"
#include "patches.h"

Kernels with_bytes(Kernels k) {
    k.name = "avxvnni";
    k.code_bytes = sizeof(AvxVnni::Code);
    k.int8_products = 120;
    k.quantize_staged = quantize_staged<AvxVnni>;
    k.quantize_digits = quantize_digits<AvxVnni>;
    k.quantize_static = quantize_static<AvxVnni>;
    k.stage = stage<AvxVnni>;
    k.int8_product = int8_product<AvxVnni>;
    k.coded.quantize = quantize_coded<AvxVnni>;
    k.coded.dynamic_product = coded_dynamic_product<AvxVnni>;
    k.patches.lay_codes = lay<AvxVnni, AvxVnni::Code>;
    k.patches.quantize_by = quantize_by<AvxVnni>;
    k.patches.stage = stage_patches<AvxVnni>;
    return k;
}
}  // namespace

const Kernels* avxvnni_kernels() {
    static const Kernels kernels = with_bytes(*avx2_kernels());
    return &kernels;
}
}  // namespace fxquant

#else
namespace fxquant {
const Kernels* avxvnni_kernels() { return nullptr; }
}  // namespace fxquant
#endif
