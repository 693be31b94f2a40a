// Ranges of granules that are larger than a row.
#pragma once

#include <algorithm>
#include <vector>

#include "tensors.h"

namespace fxquant {

constexpr int64_t kPiece = int64_t{1} << 14;  // values that one task looks at

// The largest absolute value, as bits, of each of `count` runs of n values that follow each other.
inline std::vector<uint32_t> largest_of_runs(const Kernels& kernels, const char* x, Float type, int64_t count, int64_t n) {
    const int64_t pieces = (n + kPiece - 1) / kPiece, bytes = type == Float::f32 ? 4 : 2;
    std::vector<uint32_t> found(static_cast<size_t>(count * pieces)), all(static_cast<size_t>(count));
    split(count * pieces, count * n < kSerialElements, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t run = i / pieces, from = i % pieces * kPiece;
            found[i] = kernels.amax(x + (run * n + from) * bytes, type, std::min(kPiece, n - from));
        }
    });
    for (int64_t i = 0; i < count * pieces; ++i) all[i / pieces] = std::max(all[i / pieces], found[i]);
    return all;
}

}  // namespace fxquant
