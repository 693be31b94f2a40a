// Packing: codes of a weight in the layout of kernels.h. Once for each weight, so moving bytes well is all there is to it.
#include <algorithm>
#include <cstring>
#include <numeric>

#include "kernels.h"

namespace fxquant {

void pack_block(const int8_t* codes, int64_t n, int64_t k, int64_t panel, int8_t* to) {
    constexpr int64_t kStrip = 16;  // quads: one cache line of a row; the 4 KiB that 64 rows fill with them stay in L1
    const int64_t first = panel * kPanel, count = std::min(kPanel, n - first), whole = k / kQuad, depth = quads(k);
    if (count < kPanel || whole < depth) std::memset(to, 0, static_cast<size_t>(panel_bytes(k)));
    const int8_t* rows = codes + first * k;
    for (int64_t from = 0; from < whole; from += kStrip) {
        const int64_t end = std::min(from + kStrip, whole);
        for (int64_t c = 0; c < count; ++c) {
            for (int64_t q = from; q < end; ++q) std::memcpy(to + (q * kPanel + c) * kQuad, rows + c * k + q * kQuad, kQuad);
        }
    }
    for (int64_t c = 0; c < count; ++c) {
        const int8_t* row = rows + c * k;
        for (int64_t i = whole * kQuad; i < k; ++i) to[(whole * kPanel + c) * kQuad + i - whole * kQuad] = row[i];
        const int32_t sum = std::accumulate(row, row + k, int32_t{0});
        std::memcpy(to + (depth * kPanel + c) * kQuad, &sum, sizeof(sum));
    }
}

}  // namespace fxquant
