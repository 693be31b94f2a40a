// Any machine: plain C++ and four-lane vectors, which the compiler maps to what it has (SSE2, NEON).
#include <cstring>
#include <type_traits>
#include <utility>

#include "kernels.h"

namespace fxquant {
namespace {
#include "vectors.h"
#include "quantize.h"
#include "fixed_point.h"
#include "functions.h"
#include "prepare.h"
#include "fake_quantize.h"
#include "turn.h"
#include "apart.h"
#include "spread.h"
#include "planes.h"
#include "patterns.h"
#include "panel_quads.h"

inline float half_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16, magnitude = half & 0x7fffu;
    if (magnitude >= 0x7c00u) return bits<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    // Shifted into a float's fields the exponent is 112 too small, for subnormals too: one exact product puts it right.
    return bits<float>(sign | bits<uint32_t>(bits<float>(magnitude << 13) * 0x1p112f));
}

inline uint16_t float_to_half(float value) {
    const uint32_t u = bits<uint32_t>(value), magnitude = u & 0x7fffffffu;
    const uint16_t sign = static_cast<uint16_t>(u >> 16 & 0x8000u);
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // from 65520 on: infinity
    if (magnitude < 0x38800000u) {  // below 2^-14: a subnormal half; adding 2^-1 * its unit's inverse rounds to nearest even
        const float shifted = bits<float>(magnitude) + 0.5f;
        return static_cast<uint16_t>(sign | (bits<uint32_t>(shifted) - 0x3f000000u));
    }
    const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
    return static_cast<uint16_t>(sign | ((rounded >> 13) - (112u << 10)));
}

struct Portable : Vectors<4> {
    static constexpr int kWidth = 4;
    using Code = int16_t;
    using CodeVector = S;
    static constexpr int kCodeOffset = 0;
    static constexpr int kTall = 4;
    static constexpr int kFloatTall = 4;
    static constexpr int kAttendTall = kFloatTall;
    static constexpr bool kAttendsByTiles = false;
    static constexpr int kFloatVectors = 2;
    static constexpr int kLoneVectors = 4;
    static constexpr bool kRaisesCodes = false;
    static constexpr int kFused = 2;
    static constexpr double kProducts = 4, kFloatProducts = 4;
    static constexpr bool kScalesSums = false;
    static constexpr bool kMultipliesDigits = false;
    static constexpr bool kDotsFeatures = false;
    static constexpr bool kAddsPairs = false;
    static constexpr bool kTestsBytes = false;

    static F fma(F a, F b, F c) { return a * b + c; }
    static F load_half(const void* from) {
        const H half = load<H>(from);
        return F{half_to_float(half[0]), half_to_float(half[1]), half_to_float(half[2]), half_to_float(half[3])};
    }
    static void store_half(void* to, F v) {
        store(to, H{float_to_half(v[0]), float_to_half(v[1]), float_to_half(v[2]), float_to_half(v[3])});
    }

    template <int Bits>
    using Lookup = PlainLookup<Portable, Bits>;
    using Nibbles = PlainNibbles<Portable>;

    static constexpr int kTurned = 4;  // features at a time

    // line(i): the four quads of feature i. They go to [quads][64][4].
    template <class Line>
    static void turn_quads(Line line, uint8_t* to) {
        turn_tile<uint32_t>(line, kTurned, kSpreadK / kQuad, reinterpret_cast<uint32_t*>(to), kPanel);
    }

    template <int R>
    static void dot(const char* codes, int64_t stride, const int8_t* b, int64_t depth, int32_t* acc, bool add, const int8_t*) {
        dot_of<R>(codes, stride, b, depth, acc, add);
    }

    template <int R>
    static void dot_patterns(const char* codes, int64_t stride, const uint8_t* b, int64_t depth, int32_t* acc, bool add) {
        dot_of<R>(codes, stride, b, depth, acc, add);
    }

    template <int R, class Byte>
    static void dot_of(const char* codes, int64_t stride, const Byte* b, int64_t depth, int32_t* acc, bool add) {
        if (!add) std::memset(acc, 0, R * kPanel * sizeof(int32_t));
        for (int64_t q = 0; q < depth; ++q, b += kPanel * kQuad) {
            for (int r = 0; r < R; ++r) {
                int16_t a[kQuad];
                std::memcpy(a, codes + r * stride + q * kQuad * 2, sizeof(a));
                auto* sum = reinterpret_cast<uint32_t*>(acc + r * kPanel);  // unsigned: the sum may wrap, see kWrapSafe
                for (int c = 0; c < kPanel; ++c) {
                    const Byte* w = b + c * kQuad;
                    sum[c] += static_cast<uint32_t>(a[0] * w[0] + a[1] * w[1] + a[2] * w[2] + a[3] * w[3]);
                }
            }
        }
    }
};

#include "attention.h"
#include "finish.h"
#include "rotary.h"
#include "products.h"
#include "float_product.h"
#include "fused.h"
#include "granules.h"
#include "coded.h"
#include "patches.h"
#include "kernels_of.h"

constexpr Kernels kKernels = kernels_of<Portable>("portable");
}  // namespace

const Kernels* portable_kernels() { return &kKernels; }
}  // namespace fxquant
