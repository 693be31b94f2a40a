// The kernels for CPUs with AVX512-VNNI: avx512vnni.h.
#include "stored.h"

#if defined(__AVX512VNNI__)
#include <cpuid.h>
#include <immintrin.h>

#include <algorithm>
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
#include "avx512vnni.h"
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
#include "turn_words.h"
#include "lines_to_panel.h"

constexpr Kernels with_lines(Kernels k) {
    k.turn_lines = turn_lines;
    return k;
}

constexpr Kernels kKernels = with_lines(kernels_of<Avx512Vnni>("avx512vnni"));
}  // namespace

const Kernels* avx512vnni_kernels() { return &kKernels; }
}  // namespace fxquant

#else
namespace fxquant {
const Kernels* avx512vnni_kernels() { return nullptr; }
}  // namespace fxquant
#endif
