// A product of int8 codes, pass by pass over x: each is staged as codes first, then multiplied.
#pragma once

#include "around.h"
#include "kernels.h"
#include "launch.h"

namespace fxquant {

// stage_rows(first, row0, row1, staged, stride, x_scale) fills the staged form, digits rows each, of rows row0 .. row1 - 1 of
// one pass (counted from `first`).
template <class StageRows>
void int8_passes(const Kernels& kernels, int64_t digits, int64_t config, Weight w, const HeldAfter& after, int64_t rows, void* out,
                 Float out_type, StageRows stage_rows) {
    const int64_t columns = after.columns;
    const int64_t stride = staged_stride(w.in_features, kernels.code_bytes);
    const int64_t row_bytes = stride * digits;
    const int64_t most = pass_rows(rows, row_bytes);
    char* staged = scratch(most * row_bytes + most * static_cast<int64_t>(sizeof(float)));
    auto* x_scale = reinterpret_cast<float*>(staged + most * row_bytes);
    const Blocking by = blocking_of(config, {kRowBlock, kernels.by_rows}).of_digits(digits);
    for (int64_t first = 0; first < rows; first += most) {
        const int64_t count = std::min(most, rows - first);
        split(count, count * w.in_features < kSerialElements,
              [&](int64_t begin, int64_t end) { stage_rows(first, begin, end, staged, stride, x_scale); });
        void* to = static_cast<char*>(out) + first * columns * (out_type == Float::f32 ? 4 : 2);
        w.after = after.from(first, out_type);
        const Int8Problem whole{staged, stride, digits, x_scale, w, to, out_type};
        for_int8_products(whole, count, kernels.int8_products / static_cast<double>(digits), by, kernels.int8_product);
    }
}

}  // namespace fxquant
