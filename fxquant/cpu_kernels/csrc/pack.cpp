// Packing: codes of a weight in the layout of kernels.h. Once for each weight, so moving bytes well is all there is to it.
#include <algorithm>
#include <cstring>
#include <numeric>

#include "kernels.h"

namespace fxquant {

void pack_quads(const int8_t* codes, int64_t n, int64_t k, int64_t panel, int8_t* packed) {
    constexpr int64_t kStrip = 16;  // quads: one cache line of a row; the 4 KiB that 64 rows fill with them stay in L1
    const PanelLayout layout = int8_layout(n, k);
    const int8_t* rows = codes + panel * kPanel * k;
    int8_t* to = packed + layout.offset(panel);
    if (!layout.is_full(panel)) {
        std::memcpy(to, rows, static_cast<size_t>(layout.features(panel) * k));
        return;
    }
    const int64_t whole = k / kQuad, depth = quads(k);
    if (whole < depth) std::memset(to + whole * kPanel * kQuad, 0, kPanel * kQuad);
    for (int64_t from = 0; from < whole; from += kStrip) {
        const int64_t end = std::min(from + kStrip, whole);
        for (int64_t c = 0; c < kPanel; ++c) {
            for (int64_t q = from; q < end; ++q) std::memcpy(to + (q * kPanel + c) * kQuad, rows + c * k + q * kQuad, kQuad);
        }
    }
    for (int64_t c = 0; c < kPanel; ++c) {
        const int8_t* row = rows + c * k;
        for (int64_t i = whole * kQuad; i < k; ++i) to[(whole * kPanel + c) * kQuad + i - whole * kQuad] = row[i];
        if (!stores_sums(k)) continue;
        const int32_t sum = std::accumulate(row, row + k, int32_t{0});
        std::memcpy(to + (depth * kPanel + c) * kQuad, &sum, sizeof(sum));
    }
}

namespace {

#include "split_planes.h"

// A full panel.
template <int Bits>
void pack_full(const uint8_t* rows, int64_t k, uint8_t flip, uint8_t* to) {
    constexpr int64_t kStrip = 8;  // blocks: one cache line of a row; the 4 KiB that 64 rows fill with them stay in L1
    const int64_t depth = (k + kBlock - 1) / kBlock;
    uint8_t patterns[kStrip * kBlockCodes];
    for (int64_t from = 0; from < depth; from += kStrip) {
        const int64_t end = std::min(from + kStrip, depth);
        std::memset(patterns, 0, sizeof(patterns));
        for (int64_t c = 0; c < kPanel; ++c) {
            for (int64_t b = from; b < end; ++b) {
                const uint8_t* at = rows + c * k + b * kBlock;
                uint8_t* quads_of_c = patterns + (b - from) * kBlockCodes + c * kQuad;
                uint8_t eight[kBlock] = {};
                if ((b + 1) * kBlock > k) at = static_cast<uint8_t*>(std::memcpy(eight, at, static_cast<size_t>(k - b * kBlock)));
                std::memcpy(quads_of_c, at, kQuad);
                std::memcpy(quads_of_c + kBlockCodes / 2, at + kQuad, kQuad);
            }
        }
        for (uint8_t& pattern : patterns) pattern ^= flip;
        for (int64_t b = from; b < end; ++b) split_planes<Bits>(patterns + (b - from) * kBlockCodes, to + b * Bits * kPanel);
    }
}

// One row of a compact panel: a stream of bits, of which a byte's lowest come first.
template <int Bits>
void pack_row(const uint8_t* row, int64_t k, uint8_t flip, uint8_t* to) {
    constexpr uint64_t kMask = (1 << Bits) - 1;
    for (int64_t from = 0; from < k; from += 8, to += Bits) {
        const int64_t count = std::min<int64_t>(8, k - from);
        uint64_t word = 0;
        for (int64_t i = 0; i < count; ++i) word |= ((row[from + i] ^ flip) & kMask) << (i * Bits);
        std::memcpy(to, &word, static_cast<size_t>((count * Bits + 7) / 8));
    }
}

template <int Bits>
void pack_panel(const uint8_t* codes, int64_t n, int64_t k, uint8_t flip, int64_t panel, uint8_t* packed) {
    const PanelLayout layout = plane_layout(n, k, Bits);
    const uint8_t* rows = codes + panel * kPanel * k;
    uint8_t* to = packed + layout.offset(panel);
    if (layout.is_full(panel)) return pack_full<Bits>(rows, k, flip, to);
    for (int64_t c = 0; c < layout.features(panel); ++c) pack_row<Bits>(rows + c * k, k, flip, to + c * layout.row_bytes);
}

}  // namespace

void pack_planes(const uint8_t* codes, int64_t n, int64_t k, int64_t bits, uint8_t flip, int64_t panel, uint8_t* packed) {
    switch (bits) {
        case 2: return pack_panel<2>(codes, n, k, flip, panel, packed);
        case 3: return pack_panel<3>(codes, n, k, flip, panel, packed);
        case 4: return pack_panel<4>(codes, n, k, flip, panel, packed);
        case 5: return pack_panel<5>(codes, n, k, flip, panel, packed);
        case 6: return pack_panel<6>(codes, n, k, flip, panel, packed);
        case 7: return pack_panel<7>(codes, n, k, flip, panel, packed);
        default: return pack_panel<8>(codes, n, k, flip, panel, packed);
    }
}

}  // namespace fxquant
