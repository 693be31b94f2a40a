// AVX512 with VNNI, and AMX for products of several rows.
#include "kernels.h"

#if defined(__AVX512VNNI__) && defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)  // whose assemblers know it
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
#include "turn.h"
#include "apart.h"
#include "spread.h"
#include "planes.h"
#include "patterns.h"
#include "panel_quads.h"
#include "avx512vnni.h"
#include "attention.h"
#include "finish.h"
#include "products.h"
#include "float_product.h"
#include "fused.h"
#include "granules.h"
#include "coded.h"
#include "tiles.h"
#include "tiled_product.h"
#include "tiled_spans.h"
#include "tiled_attention.h"

constexpr int64_t kFewestTiled = 6;  // rows

void int8_product_of_tiles(const Int8Problem& p, const Task& t) {
    if ((t.row1 - t.row0) * p.digits < kFewestTiled || p.weight.in_features > kWrapSafe) return avx512vnni_kernels()->int8_product(p, t);
    tiled_product<Avx512Vnni>(p, t);
}

void dynamic_product_of_tiles(const CodedDynamicProblem& p, int64_t panel, int64_t row0, int64_t row1) {
    int64_t rest = row0;
    if (tiles_serve(p, panel, row1 - row0)) {
        rest = row1 - (row1 - row0) % kTileRows;
        with_bits(held_bits(p.weight, panel), [&](auto bits) { tiled_dynamic_of<Avx512Vnni, bits()>(p, panel, row0, rest); });
    }
    if (rest < row1) avx512vnni_kernels()->coded.dynamic_product(p, panel, rest, row1);
}

void attention_of_tiles(const AttentionProblem& p, int64_t batch, int64_t key_head, int64_t query0, int64_t query1, void* room) {
    const int64_t rows = (query1 - query0) * (p.heads / p.key_heads);
    if (rows < kFewestTiled || !tiles_attend(p)) {
        return avx512vnni_kernels()->attention(p, batch, key_head, query0, query1, room);
    }
    TileShapes shapes;
    shapes.for_rows(2 * kTileRows);
    AttentionTask<AttendsByTiles, true>(p, batch, key_head, query0, query1, room).run();
}

Kernels with_tiles(Kernels k) {
    k.name = "amx";
    k.int8_products = 2000;
    k.by_rows = true;
    k.int8_product = int8_product_of_tiles;
    k.coded.dynamic_product = dynamic_product_of_tiles;
    k.attention = attention_of_tiles;
    return k;
}
}  // namespace

const Kernels* amx_kernels() {
    static const Kernels kernels = with_tiles(*avx512vnni_kernels());
    return &kernels;
}
}  // namespace fxquant

#else
namespace fxquant {
const Kernels* amx_kernels() { return nullptr; }
}  // namespace fxquant
#endif
