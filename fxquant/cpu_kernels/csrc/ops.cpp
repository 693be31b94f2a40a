// The CPU kernels of the fxquant ops, on LibTorch's stable ABI. Schemas, fakes and references are defined in fxquant/ops.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <optional>
#include <tuple>

#include "int8_passes.h"
#include "tensors.h"
#include "shims.h"

namespace fxquant {
namespace {

std::tuple<Tensor, Tensor> int8_quantize_per_token(const Tensor x) {
    const RowView rows = row_view("int8_quantize_per_token", "x", x);
    const Float type = float_type("int8_quantize_per_token", "x", x.scalar_type());
    const Kernels& kernels = kernels_for(kChoose);
    Tensor codes = like_rows(x, rows.width, ScalarType::Char);
    Tensor scale = like_rows(x, 1, ScalarType::Float);
    auto* to = static_cast<int8_t*>(codes.data_ptr());
    auto* to_scale = static_cast<float*>(scale.data_ptr());
    const Rows from = rows_from(rows, type, 0);
    split(rows.rows, rows.rows * rows.width < kSerialElements,
          [&](int64_t begin, int64_t end) { kernels.quantize(from, begin, end, to, to_scale); });
    return {codes, scale};
}

// What an op is told to do before and after its product: see around.h.
struct Around {
    const std::optional<Tensor>& residual;
    const std::string& activation;
    const std::string& prologue;
    const std::optional<Tensor>& by;
    const std::optional<Tensor>& shift;
    double eps;
};

// The linear of x, whose rows quantize_rows(kernels, rows, begin, end, staged, stride, x_scale) turns into staged codes: one row
// each, or `digits`.
template <class QuantizeRows>
Tensor linear_of_floats(const char* op, const Tensor& x, const Tensor& packed, const Tensor& scale, const std::optional<Tensor>& bias,
                        int64_t in_features, int64_t isa, const Around& around, int64_t digits, QuantizeRows quantize_rows) {
    const Kernels& kernels = kernels_for(isa);
    const RowView rows = row_view(op, "x", x);
    check_width(op, rows, in_features);
    const ScalarType type = x.scalar_type();
    const Float float_in = float_type(op, "x", type);
    const HeldBefore before(op, kernels, x, rows, float_in, around.prologue, around.by, around.shift, around.eps);
    const HeldWeight weight(op, kernels, packed, scale, bias, in_features);
    Tensor out = like_rows(x, result_columns(op, weight.view.out_features, around.activation), type);
    const HeldAfter after(op, out, around.residual, around.activation);
    int8_passes(kernels, digits, isa, weight.view, after, rows.rows, out.data_ptr(), float_in,
                [&](int64_t first, int64_t begin, int64_t end, char* staged, int64_t stride, float* x_scale) {
                    for_prepared(kernels, before.from(first), rows_from(rows, float_in, first), begin, end,
                                 [&](const Rows& prepared, int64_t row0, int64_t row1, int64_t at) {
                                     char* to = staged + at * digits * stride;
                                     quantize_rows(kernels, prepared, row0, row1, to, stride, x_scale + at);
                                 });
                });
    return out;
}

Tensor int8_linear_dynamic(const Tensor x, const Tensor packed, const Tensor scale, const std::optional<Tensor> bias,
                           int64_t in_features, int64_t isa, const std::optional<Tensor> residual, const std::string activation,
                           const std::string prologue, const std::optional<Tensor> by, const std::optional<Tensor> shift, double eps) {
    return linear_of_floats("int8_linear_dynamic", x, packed, scale, bias, in_features, isa,
                            {residual, activation, prologue, by, shift, eps}, 1,
                            [](const Kernels& kernels, const Rows& rows, int64_t begin, int64_t end, char* staged, int64_t stride,
                               float* x_scale) { kernels.quantize_staged(rows, begin, end, staged, stride, x_scale); });
}

Tensor int8_linear_static(const Tensor x, const Tensor x_scale, const Tensor packed, const Tensor scale,
                          const std::optional<Tensor> bias, int64_t in_features, int64_t isa, const std::optional<Tensor> residual,
                          const std::string activation, const std::string prologue, const std::optional<Tensor> by,
                          const std::optional<Tensor> shift, double eps) {
    const Scaling scaling = given_scaling("int8_linear_static", x_scale);
    return linear_of_floats("int8_linear_static", x, packed, scale, bias, in_features, isa,
                            {residual, activation, prologue, by, shift, eps}, 1,
                            [scaling](const Kernels& kernels, const Rows& rows, int64_t begin, int64_t end, char* staged, int64_t stride,
                                      float* to_scale) { kernels.quantize_static(rows, begin, end, scaling, staged, stride, to_scale); });
}

Tensor int8_linear(const Tensor codes, const Tensor x_scale, const Tensor packed, const Tensor scale,
                   const std::optional<Tensor> bias, int64_t in_features, ScalarType dtype, int64_t isa,
                   const std::optional<Tensor> residual, const std::string activation) {
    const char* op = "int8_linear";
    const Kernels& kernels = kernels_for(isa);
    STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Char && x_scale.scalar_type() == ScalarType::Float, "fxquant::", op,
                    ": codes are int8 and x_scale is float32; met ", torch::headeronly::toString(codes.scalar_type()), " and ",
                    torch::headeronly::toString(x_scale.scalar_type()));
    const Tensor packed_rows = dense(codes), row_scale = dense(x_scale);
    const RowView rows = row_view(op, "codes", packed_rows);
    check_width(op, rows, in_features);
    STD_TORCH_CHECK(row_scale.numel() == rows.rows, "fxquant::", op, ": x_scale has ", row_scale.numel(), " values for ",
                    rows.rows, " rows");
    const HeldWeight weight(op, kernels, packed, scale, bias, in_features);
    const Float out_type = float_type(op, "dtype", dtype);
    Tensor out = like_rows(codes, result_columns(op, weight.view.out_features, activation), dtype);
    const HeldAfter after(op, out, residual, activation);
    const auto* from = static_cast<const int8_t*>(packed_rows.data_ptr());
    const auto* from_scale = static_cast<const float*>(row_scale.data_ptr());
    int8_passes(kernels, 1, isa, weight.view, after, rows.rows, out.data_ptr(), out_type,
                [&](int64_t first, int64_t begin, int64_t end, char* staged, int64_t stride, float* to_scale) {
                    kernels.stage(from + first * in_features, in_features, begin, end, staged, stride);
                    std::memcpy(to_scale + begin, from_scale + first + begin, static_cast<size_t>(end - begin) * sizeof(float));
                });
    return out;
}

Tensor int8_linear_weight_only(const Tensor x, const Tensor packed, const Tensor scale, const std::optional<Tensor> bias,
                               int64_t in_features, int64_t isa, const std::optional<Tensor> residual, const std::string activation,
                               const std::string prologue, const std::optional<Tensor> by, const std::optional<Tensor> shift,
                               double eps) {
    const char* op = "int8_linear_weight_only";
    const Kernels& kernels = kernels_for(isa);
    if (kernels.quantize_digits != nullptr) {
        return linear_of_floats(op, x, packed, scale, bias, in_features, isa, {residual, activation, prologue, by, shift, eps},
                                digits_of(float_type(op, "x", x.scalar_type())),
                                [](const Kernels& k, const Rows& rows, int64_t begin, int64_t end, char* staged, int64_t stride,
                                   float* x_scale) { k.quantize_digits(rows, begin, end, staged, stride, x_scale); });
    }
    const RowView rows = row_view(op, "x", x);
    check_width(op, rows, in_features);
    const ScalarType type = x.scalar_type();
    const Float float_in = float_type(op, "x", type);
    const HeldBefore before(op, kernels, x, rows, float_in, prologue, by, shift, eps);
    const HeldWeight weight(op, kernels, packed, scale, bias, in_features);
    Weight w = weight.view;
    const int64_t columns = result_columns(op, w.out_features, activation);
    Tensor out = like_rows(x, columns, type);
    const HeldAfter after(op, out, residual, activation);

    const int64_t stride = staged_stride(w.in_features, sizeof(float)) / static_cast<int64_t>(sizeof(float));
    const int64_t most = pass_rows(rows.rows, stride * static_cast<int64_t>(sizeof(float)));
    auto* wide = reinterpret_cast<float*>(scratch(most * stride * static_cast<int64_t>(sizeof(float))));
    for (int64_t first = 0; first < rows.rows; first += most) {
        const int64_t count = std::min(most, rows.rows - first);
        const Rows from = rows_from(rows, float_in, first);
        split(count, count * w.in_features < kSerialElements, [&](int64_t begin, int64_t end) {
            for_prepared(kernels, before.from(first), from, begin, end,
                         [&](const Rows& prepared, int64_t row0, int64_t row1, int64_t at) {
                             kernels.widen(prepared, row0, row1, wide + at * stride, stride);
                         });
        });
        void* to = static_cast<char*>(out.data_ptr()) + first * columns * (float_in == Float::f32 ? 4 : 2);
        w.after = after.from(first, float_in);
        const FloatProblem whole{wide, stride, w, to, float_in};
        for_int8_products(whole, count, kernels.float_products, blocking_of(isa), kernels.float_product);
    }
    return out;
}

Tensor int8_pack(const Tensor codes) {
    const auto sizes = codes.sizes();
    STD_TORCH_CHECK(sizes.size() == 2 && codes.scalar_type() == ScalarType::Char, "fxquant::int8_pack: codes are int8 [N, K]; met ",
                    torch::headeronly::toString(codes.scalar_type()), " with ", sizes.size(), " dimensions");
    const int64_t n = sizes[0], k = sizes[1];
    STD_TORCH_CHECK(k <= kMostInFeatures, "fxquant::int8_pack: ", k, " input features; ", kMostInFeatures, " is the most");
    const Tensor from = dense(codes);
    Tensor packed = torch::stable::empty({int8_layout(n, k).bytes()}, ScalarType::Char, std::nullopt, codes.device());
    const auto* in = static_cast<const int8_t*>(from.data_ptr());
    auto* out = static_cast<int8_t*>(packed.data_ptr());
    prefer_huge_pages(out, packed.numel());
    split(panels(n), n * k < kSerialElements, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) pack_quads(in, n, k, p, out);
    });
    return packed;
}

}  // namespace
}  // namespace fxquant

extern "C" __attribute__((visibility("default"))) const char* fxquant_isa() {
    return fxquant::kernels_for(fxquant::best_isa()).name;
}

STABLE_TORCH_LIBRARY_IMPL(fxquant, CPU, m) {
    m.impl("int8_quantize_per_token", TORCH_BOX(&fxquant::int8_quantize_per_token));
    m.impl("int8_pack", TORCH_BOX(&fxquant::int8_pack));
    m.impl("int8_linear_dynamic", TORCH_BOX(&fxquant::int8_linear_dynamic));
    m.impl("int8_linear_static", TORCH_BOX(&fxquant::int8_linear_static));
    m.impl("int8_linear", TORCH_BOX(&fxquant::int8_linear));
    m.impl("int8_linear_weight_only", TORCH_BOX(&fxquant::int8_linear_weight_only));
}

FXQUANT_SHIM(int8_linear)
FXQUANT_SHIM(int8_linear_dynamic)
FXQUANT_SHIM(int8_linear_static)
FXQUANT_SHIM(int8_linear_weight_only)
