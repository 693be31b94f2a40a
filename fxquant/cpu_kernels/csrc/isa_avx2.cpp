// AVX2 with FMA: codes staged as int16, vpmaddwd on widened weights. (vpmaddubsw would saturate: 2 * 255 * 127 > 32767.)
#include "kernels.h"

#if defined(__AVX2__)
#include <cpuid.h>
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
#include "fake_quantize.h"
#include "turn.h"
#include "apart.h"
#include "spread.h"
#include "planes.h"
#include "patterns.h"
#include "panel_quads.h"

#include "avx2.h"
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

constexpr Kernels kKernels = kernels_of<Avx2>("avx2");
}  // namespace

const Kernels* avx2_kernels() { return &kKernels; }
}  // namespace fxquant

#else
namespace fxquant {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace fxquant
#endif
