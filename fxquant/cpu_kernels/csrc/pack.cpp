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

namespace {

constexpr int64_t kBlockCodes = kPanel * kBlock;

// One block of patterns, in the order of its vectors, into planes, widest first.
template <int Bits>
void split_planes(const uint8_t* patterns, uint8_t* to) {
    int shift = 0;
    for (int width = 8; width >= 1; width /= 2) {
        if (!(Bits & width)) continue;
        for (int row = 0; row < width; ++row, to += kPanel) {
            uint8_t held[kPanel] = {};
            for (int slot = 0; slot < 8 / width; ++slot) {
                const uint8_t* vector = patterns + (slot * width + row) * kPanel;
                for (int64_t i = 0; i < kPanel; ++i) held[i] |= (vector[i] >> shift & ((1 << width) - 1)) << (width * slot);
            }
            std::memcpy(to, held, kPanel);
        }
        shift += width;
    }
}

template <int Bits>
void pack_planes_of(const uint8_t* codes, int64_t n, int64_t k, uint8_t flip, int64_t panel, uint8_t* to) {
    constexpr int64_t kStrip = 8;  // blocks: one cache line of a row; the 4 KiB that 64 rows fill with them stay in L1
    const int64_t first = panel * kPanel, count = std::min(kPanel, n - first), depth = plane_blocks(k);
    uint8_t patterns[kStrip * kBlockCodes];
    for (int64_t from = 0; from < depth; from += kStrip) {
        const int64_t end = std::min(from + kStrip, depth);
        std::memset(patterns, 0, sizeof(patterns));
        for (int64_t c = 0; c < count; ++c) {
            for (int64_t b = from; b < end; ++b) {
                const uint8_t* at = codes + (first + c) * k + b * kBlock;
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

}  // namespace

void pack_planes(const uint8_t* codes, int64_t n, int64_t k, int64_t bits, uint8_t flip, int64_t panel, uint8_t* to) {
    switch (bits) {
        case 2: return pack_planes_of<2>(codes, n, k, flip, panel, to);
        case 3: return pack_planes_of<3>(codes, n, k, flip, panel, to);
        case 4: return pack_planes_of<4>(codes, n, k, flip, panel, to);
        case 5: return pack_planes_of<5>(codes, n, k, flip, panel, to);
        case 6: return pack_planes_of<6>(codes, n, k, flip, panel, to);
        case 7: return pack_planes_of<7>(codes, n, k, flip, panel, to);
        default: return pack_planes_of<8>(codes, n, k, flip, panel, to);
    }
}

}  // namespace fxquant
