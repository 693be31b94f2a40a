// fxquant::fake_quantize: dequantize(quantize_dynamic(x)), without the codes. Two passes over x. fake_quantize_static: the same
// by a scale that is given.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstring>
#include <string>

#include "ranges.h"
#include "spec.h"

namespace fxquant {
namespace {

// As numerics.smallest_range: 2^(ceil(log2(span)) - 126).
float smallest_range(float span) {
    const int floor = std::ilogb(span);
    return std::ldexp(1.0f, floor + (std::ldexp(1.0f, floor) < span ? 1 : 0) - 126);
}

Grid grid_of(const Spec& spec) {
    Grid grid = {};
    grid.largest = largest(spec.format);
    grid.smallest_range = smallest_range(grid.largest);
    grid.largest_exponent = std::ilogb(grid.largest);
    grid.smallest_exponent = smallest_exponent(spec.format);
    grid.mantissa_bits = spec.format.is_float ? spec.format.mantissa_bits : spec.format.bits;
    grid.minus_zero = spec.format.is_float && spec.format.top != Top::nan_is_minus_zero;
    grid.scale = spec.scale == Spec::Scale::e8m0   ? Grid::Scale::e8m0
                 : spec.scale == Spec::Scale::e4m3 ? Grid::Scale::e4m3
                                                   : Grid::Scale::float32;
    grid.group = spec.granularity == Spec::Granularity::group ? spec.size : 0;
    return grid;
}

Spec activation_spec(const char* op, const std::string& text) {
    Spec spec;
    STD_TORCH_CHECK(parse_spec(text, spec), "fxquant::", op, ": spec '", text, "' is not one that the kernels know");
    const bool known = spec.format.is_float || spec.format.bits == 8;
    const bool granules = spec.granularity != Spec::Granularity::channel && spec.granularity != Spec::Granularity::block &&
                          (spec.scale == Spec::Scale::float32 || spec.granularity == Spec::Granularity::group);
    STD_TORCH_CHECK(known && granules && spec.scheme == Spec::Scheme::symmetric && spec.scale != Spec::Scale::bfloat16 && spec.scale != Spec::Scale::stepped,
                    "fxquant::", op, ": spec '", text,
                    "': activations are int8 or a float format, symmetric, per tensor, token, sample or group (e8m0 and e4m3: group)");
    return spec;
}

// Granules of more than a row: a tensor, or a sample of several rows.
void by_runs(const Kernels& kernels, const Grid& grid, const char* x, Float type, int64_t count, int64_t n, char* out) {
    const std::vector<uint32_t> amax = largest_of_runs(kernels, x, type, count, n);
    const int64_t pieces = (n + kPiece - 1) / kPiece, bytes = type == Float::f32 ? 4 : 2;
    split(count * pieces, count * n < kSerialElements, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t run = i / pieces, from = i % pieces * kPiece, at = (run * n + from) * bytes;
            kernels.fake_quantize_piece(grid, x + at, type, std::min(kPiece, n - from), amax[run], out + at);
        }
    });
}

void by_rows(const Kernels& kernels, Grid grid, const RowView& rows, Float type, char* out) {
    const Rows all = rows_from(rows, type, 0);
    float tensor_scale = 1.0f;
    if (grid.scale == Grid::Scale::e4m3) {
        const Tensor held = dense(rows.held);
        const uint32_t bits = largest_of_runs(kernels, static_cast<const char*>(held.data_ptr()), type, 1, rows.rows * rows.width)[0];
        std::memcpy(&tensor_scale, &bits, sizeof(bits));
        // NaN and infinity stay what they are. A range so small that a block scale's reciprocal overflows counts as zero.
        const bool small = tensor_scale < smallest_range(grid.largest * 448.0f * 512.0f);
        tensor_scale = small ? 0.0f : tensor_scale / (grid.largest * 448.0f);
    }
    split(rows.rows, rows.rows * rows.width < kSerialElements,
          [&](int64_t begin, int64_t end) { kernels.fake_quantize(grid, all, begin, end, out, tensor_scale); });
}

Tensor fake_quantize(const Tensor x, std::string text) {
    const char* op = "fake_quantize";
    const Spec spec = activation_spec(op, text);
    const Grid grid = grid_of(spec);
    const Float type = float_type(op, "x", x.scalar_type());
    const Kernels& kernels = kernels_for(kChoose);
    const auto sizes = x.sizes();
    const bool whole = spec.granularity == Spec::Granularity::tensor || spec.granularity == Spec::Granularity::sample;
    const RowView rows = row_view(op, "x", whole ? dense(x) : x);
    Tensor out = like_rows(x, rows.width, x.scalar_type());
    if (x.numel() == 0) return out;
    auto* to = static_cast<char*>(out.data_ptr());
    if (!whole) {
        by_rows(kernels, grid, rows, type, to);
    } else {
        const int64_t runs = spec.granularity == Spec::Granularity::tensor ? 1 : sizes[0];
        by_runs(kernels, grid, static_cast<const char*>(rows.held.data_ptr()), type, runs, x.numel() / runs, to);
    }
    return out;
}

Tensor fake_quantize_static(const Tensor x, const Tensor scale, std::string text) {
    const char* op = "fake_quantize_static";
    const Spec spec = activation_spec(op, text);
    STD_TORCH_CHECK(spec.granularity == Spec::Granularity::tensor, "fxquant::", op, ": spec '", text,
                    "': one scale is taken, for the whole tensor");
    const Grid grid = grid_of(spec);
    const Float type = float_type(op, "x", x.scalar_type());
    const Scaling by = given_scaling(op, scale);
    const Kernels& kernels = kernels_for(kChoose);
    const RowView rows = row_view(op, "x", dense(x));
    Tensor out = like_rows(x, rows.width, x.scalar_type());
    const auto* from = static_cast<const char*>(rows.held.data_ptr());
    auto* to = static_cast<char*>(out.data_ptr());
    const int64_t n = x.numel(), bytes = type == Float::f32 ? 4 : 2;
    split((n + kPiece - 1) / kPiece, n < kSerialElements, [&](int64_t begin, int64_t end) {
        for (int64_t at = begin * kPiece; at < std::min(n, end * kPiece); at += kPiece) {
            kernels.fake_quantize_static(grid, from + at * bytes, type, std::min(kPiece, n - at), by, to + at * bytes);
        }
    });
    return out;
}

}  // namespace
}  // namespace fxquant

STABLE_TORCH_LIBRARY_IMPL(fxquant, CPU, m) {
    m.impl("fake_quantize", TORCH_BOX(&fxquant::fake_quantize));
    m.impl("fake_quantize_static", TORCH_BOX(&fxquant::fake_quantize_static));
}
