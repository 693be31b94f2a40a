// Between the layout of the kernels and the rows of a checkpoint (fxquant/numerics/stored_rows.py). Plain data, no torch.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace fxquant {

// A weight [N, K]: codes of `bits` bits, in panels whose patterns differ from codes by the bit `flip`. In those of int8_layout,
// else of plane_layout; with_sums: of each column, behind a full panel. A row of a checkpoint is a stream of bits, of which a
// byte's lowest come first.
struct StoredWeight {
    int64_t in_features;
    int64_t bits;
    uint8_t flip;
    bool is_int8;
    PanelLayout layout;

    bool with_sums() const { return is_int8 && stores_sums(in_features); }
    int64_t row_bytes() const { return (in_features * bits + 7) / 8; }
    int64_t filled_bytes() const { return round_up(in_features, is_int8 ? kQuad : kBlock) * bits / 8; }  // of a full panel's rows
};

inline StoredWeight stored_weight(int64_t n, int64_t k, int64_t bits, uint8_t flip, bool is_int8) {
    return {k, bits, flip, is_int8, is_int8 ? int8_layout(n, k) : plane_layout(n, k, bits)};
}

// One panel. rows: of the panel's first feature and those behind it, at any address, row_bytes() apart. packed: the panel. past:
// write it past the caches, which pays where they do not hold it.
void panel_of_rows(const StoredWeight& w, const Kernels& kernels, const uint8_t* rows, int64_t panel, bool past, uint8_t* packed);
void rows_of_panel(const StoredWeight& w, const uint8_t* packed, int64_t panel, uint8_t* rows);

}  // namespace fxquant
