// Where the codes of a packed weight stand: full panels of 64 output features, permuted for the products, then the features
// that none of these holds, as rows of codes. (fxquant/numerics/panels.py and packing.py)
#pragma once

#include <cstdint>

namespace fxquant {

constexpr int64_t kPanel = 64;  // output features in one panel: four zmm registers of int32
constexpr int64_t kQuad = 4;    // consecutive k that stand together: what one dpbusd lane multiplies
constexpr int64_t kBlock = 8;   // consecutive k whose planes stand together: `bits` rows of 64 bytes

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
constexpr int64_t quads(int64_t in_features) { return (in_features + kQuad - 1) / kQuad; }
constexpr int64_t panels(int64_t out_features) { return (out_features + kPanel - 1) / kPanel; }

// The panels of one weight. Those from `full` on are compact: rows of row_bytes, one for each feature.
struct PanelLayout {
    int64_t out_features;
    int64_t full;
    int64_t full_bytes;  // of one full panel
    int64_t row_bytes;

    constexpr bool is_full(int64_t panel) const { return panel < full; }

    constexpr int64_t features(int64_t panel) const {
        const int64_t left = out_features - panel * kPanel;
        return left < kPanel ? left : kPanel;
    }

    // Where a panel begins; of the one behind the last: where the weight ends.
    constexpr int64_t offset(int64_t panel) const {
        const int64_t before = panel < full ? panel : full;
        const int64_t feature = panel * kPanel < out_features ? panel * kPanel : out_features;
        return before * full_bytes + (feature - before * kPanel) * row_bytes;
    }

    constexpr int64_t bytes() const { return offset(panels(out_features)); }
};

// What a panel may hold besides its codes and scales is one of so many parts: 2 %.
constexpr int64_t kParts = 50;

// Full panels, if filling up K to whole units costs them no more.
constexpr int64_t full_panels(int64_t out_features, int64_t in_features, int64_t unit) {
    return kParts * (round_up(in_features, unit) - in_features) > in_features ? 0 : out_features / kPanel;
}

// Planes of codes of `bits` bits: [K / 8, bits, 64] in a full panel.
constexpr PanelLayout plane_layout(int64_t out_features, int64_t in_features, int64_t bits) {
    return {out_features, full_panels(out_features, in_features, kBlock), round_up(in_features, kBlock) * bits * (kPanel / kBlock),
            (in_features * bits + 7) / 8};
}

// Whether a full panel of int8 codes ends with 64 int32, the sums of its columns: if that costs no more, beside codes
// and float scales.
constexpr bool stores_sums(int64_t in_features) {
    constexpr auto kNumber = static_cast<int64_t>(sizeof(int32_t));
    return kParts * (round_up(in_features, kQuad) - in_features + kNumber) <= in_features + kNumber;
}

// Whether the steps of a weight's rows stand behind its scales: if they and what fills up K cost no more, beside codes and
// scales of bfloat16.
constexpr bool stores_steps(int64_t in_features, int64_t bits, int64_t granules) {
    constexpr int64_t kNumberBits = 16;
    const int64_t padding = round_up(in_features, kBlock) - in_features;
    return kParts * (padding * bits + kNumberBits) <= in_features * bits + kNumberBits * granules;
}

// Bytes of a panel of int8 codes as the products read it: [quads(K), 64, 4].
constexpr int64_t quad_bytes(int64_t in_features) { return quads(in_features) * kQuad * kPanel; }

constexpr PanelLayout int8_layout(int64_t out_features, int64_t in_features) {
    const int64_t sums = stores_sums(in_features) ? kPanel * static_cast<int64_t>(sizeof(int32_t)) : 0;
    return {out_features, full_panels(out_features, in_features, kQuad), quad_bytes(in_features) + sums, in_features};
}

// k that are spread at a time: a compact panel is spread up to a multiple of these.
constexpr int64_t kSpreadK = 16;

}  // namespace fxquant
