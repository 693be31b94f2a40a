// The CPU kernels of the fxquant ops, on LibTorch's stable ABI. Schemas, fakes and references are defined in fxquant/ops.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <optional>
#include <tuple>

#include "kernels.h"
#include "launch.h"

namespace fxquant {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum Isa : int64_t { kChoose = 0, kPortable = 1, kAvx2 = 2, kAvx512Vnni = 3 };

bool cpu_has(int64_t isa) {
#if defined(__x86_64__)
    if (isa == kAvx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (isa == kAvx512Vnni) {
        return cpu_has(kAvx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
    }
#endif
    return isa == kPortable;
}

int64_t best_isa() {
    static const int64_t best = [] {
        if (avx512vnni_kernels() != nullptr && cpu_has(kAvx512Vnni)) return int64_t{kAvx512Vnni};
        if (avx2_kernels() != nullptr && cpu_has(kAvx2)) return int64_t{kAvx2};
        return int64_t{kPortable};
    }();
    return best;
}

const Kernels& kernels_for(int64_t isa) {
    STD_TORCH_CHECK(isa >= kChoose && isa <= kAvx512Vnni, "fxquant: isa is ", isa,
                    "; known are 0 (choose), 1 (portable), 2 (AVX2) and 3 (AVX512-VNNI)");
    if (isa == kChoose) isa = best_isa();
    const Kernels* kernels = isa == kPortable ? portable_kernels() : isa == kAvx2 ? avx2_kernels() : avx512vnni_kernels();
    STD_TORCH_CHECK(kernels != nullptr && cpu_has(isa), "fxquant: isa=", isa, isa == kAvx2 ? " (AVX2)" : " (AVX512-VNNI)",
                    " was asked for, but this CPU or this build lacks it; isa=0 chooses what is there");
    return *kernels;
}

std::optional<Float> float_of(ScalarType type) {
    if (type == ScalarType::Float) return Float::f32;
    if (type == ScalarType::BFloat16) return Float::bf16;
    if (type == ScalarType::Half) return Float::f16;
    return std::nullopt;
}

Float float_type(const char* op, const char* what, ScalarType type) {
    const std::optional<Float> known = float_of(type);
    STD_TORCH_CHECK(known.has_value(), "fxquant::", op, ": ", what, " is ", torch::headeronly::toString(type),
                    "; float32, bfloat16 and float16 are taken: cast it");
    return *known;
}

// x[..., K] as rows. A copy is made only where the rows are not evenly spaced or their values not next to each other.
struct RowView {
    Tensor held;
    int64_t rows;
    int64_t width;
    int64_t stride;
};

bool evenly_spaced(const Tensor& x, int64_t width, int64_t rows, int64_t& stride) {
    const auto sizes = x.sizes(), strides = x.strides();
    const int64_t dims = static_cast<int64_t>(sizes.size());
    if (width > 1 && strides[dims - 1] != 1) return false;
    stride = width;
    int64_t below = 0, spacing = 0;  // rows counted so far and the distance from one to the next
    for (int64_t d = dims - 2; d >= 0; --d) {
        if (sizes[d] == 1) continue;
        if (below == 0) {
            below = sizes[d];
            spacing = strides[d];
        } else if (strides[d] == spacing * below) {
            below *= sizes[d];
        } else {
            return false;
        }
    }
    if (rows > 1) stride = spacing;
    return true;
}

RowView row_view(const char* op, const char* what, const Tensor& x) {
    const auto sizes = x.sizes();
    STD_TORCH_CHECK(sizes.size() >= 1, "fxquant::", op, ": ", what, " has no dimension; [..., K] is needed");
    RowView view{x, 1, sizes[sizes.size() - 1], 0};
    for (size_t d = 0; d + 1 < sizes.size(); ++d) view.rows *= sizes[d];
    if (!evenly_spaced(x, view.width, view.rows, view.stride)) {
        view.held = torch::stable::contiguous(x);
        view.stride = view.width;
    }
    return view;
}

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// An uninitialized contiguous CPU tensor with x's leading sizes and `last` as its last one.
Tensor like_rows(const Tensor& x, int64_t last, ScalarType type) {
    constexpr size_t kMostDims = 64;
    int64_t sizes[kMostDims], strides[kMostDims];
    const auto from = x.sizes();
    STD_TORCH_CHECK(from.size() <= kMostDims, "fxquant: a tensor of ", from.size(), " dimensions");
    const int64_t dims = static_cast<int64_t>(from.size());
    int64_t step = 1;
    for (int64_t d = dims - 1; d >= 0; --d) {
        sizes[d] = d == dims - 1 ? last : from[d];
        strides[d] = step;
        step *= std::max<int64_t>(sizes[d], 1);
    }
    AtenTensorHandle fresh = nullptr;
    const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(dims, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &fresh));
    return Tensor(fresh);
}

// Scale, bias and packed codes of one weight, checked, with float copies of what is not float32 yet. Keeps them alive.
class HeldWeight {
public:
    HeldWeight(const char* op, const Kernels& kernels, const Tensor& packed, const Tensor& scale,
               const std::optional<Tensor>& bias, int64_t in_features)
        : packed_(dense(packed)), scale_(dense(scale)) {
        const int64_t n = scale_.numel();
        STD_TORCH_CHECK(scale_.scalar_type() == ScalarType::Float, "fxquant::", op, ": scale is ",
                        torch::headeronly::toString(scale_.scalar_type()), "; scales are float32");
        check_packed(op, n, in_features);
        view = {static_cast<const int8_t*>(packed_.data_ptr()), static_cast<const float*>(scale_.data_ptr()), nullptr, n,
                in_features};
        if (bias.has_value()) view.bias = float_bias(op, kernels, *bias, n);
    }

    Weight view;

private:
    void check_packed(const char* op, int64_t n, int64_t in_features) const {
        const auto sizes = packed_.sizes();
        const bool shape = sizes.size() == 4 && sizes[0] == panels(n) && sizes[1] == quads(in_features) + 1 &&
                           sizes[2] == kPanel && sizes[3] == kQuad;
        STD_TORCH_CHECK(shape && packed_.scalar_type() == ScalarType::Char, "fxquant::", op,
                        ": packed is not what int8_pack makes of [", n, ", ", in_features, "]: int8 [", panels(n), ", ",
                        quads(in_features) + 1, ", ", kPanel, ", ", kQuad, "] is needed");
    }

    const float* float_bias(const char* op, const Kernels& kernels, const Tensor& bias, int64_t n) {
        STD_TORCH_CHECK(bias.numel() == n, "fxquant::", op, ": bias has ", bias.numel(), " values for ", n, " output features");
        bias_ = dense(bias);
        const Float type = float_type(op, "bias", bias_->scalar_type());
        if (type == Float::f32) return static_cast<const float*>(bias_->data_ptr());
        wide_bias_.reset(new float[static_cast<size_t>(round_up(n, 16))]);
        kernels.widen(Rows{bias_->data_ptr(), n, n, type}, 0, 1, wide_bias_.get(), n);
        return wide_bias_.get();
    }

    Tensor packed_;
    Tensor scale_;
    std::optional<Tensor> bias_;
    std::unique_ptr<float[]> wide_bias_;
};

// Rows of one pass: as many row blocks as kStagedBytes hold, at least one.
int64_t pass_rows(int64_t rows, int64_t stride) {
    const int64_t most = std::max(kRowBlock, kStagedBytes / stride / kRowBlock * kRowBlock);
    return std::min(rows, most);
}

// stage_rows(row0, row1, staged, x_scale) fills the staged form of rows row0 .. row1 - 1 of one pass (counted from `first`).
template <class StageRows>
void int8_passes(const Kernels& kernels, const Weight& w, int64_t rows, void* out, Float out_type, StageRows stage_rows) {
    const int64_t stride = staged_stride(w.in_features, kernels.code_bytes);
    const int64_t most = pass_rows(rows, stride);
    char* staged = scratch(most * stride + most * static_cast<int64_t>(sizeof(float)));
    auto* x_scale = reinterpret_cast<float*>(staged + most * stride);
    for (int64_t first = 0; first < rows; first += most) {
        const int64_t count = std::min(most, rows - first);
        split(count, count * w.in_features < kSerialElements,
              [&](int64_t begin, int64_t end) { stage_rows(first, begin, end, staged, stride, x_scale); });
        void* to = static_cast<char*>(out) + first * w.out_features * (out_type == Float::f32 ? 4 : 2);
        const Int8Problem problem{staged, stride, x_scale, w, to, out_type};
        for_tasks(w, count, [&](const Task& task) { kernels.int8_product(problem, task); });
    }
}

Rows rows_from(const RowView& x, Float type, int64_t first) {
    const auto* data = static_cast<const char*>(x.held.data_ptr()) + first * x.stride * (type == Float::f32 ? 4 : 2);
    return Rows{data, x.stride, x.width, type};
}

void check_width(const char* op, const RowView& x, int64_t in_features) {
    STD_TORCH_CHECK(in_features >= 1 && in_features <= kMostInFeatures, "fxquant::", op, ": in_features is ", in_features, "; 1 to ",
                    kMostInFeatures, " are taken");
    STD_TORCH_CHECK(x.width == in_features, "fxquant::", op, ": x has ", x.width, " features, in_features is ", in_features);
}

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

Tensor int8_linear_dynamic(const Tensor x, const Tensor packed, const Tensor scale, const std::optional<Tensor> bias,
                           int64_t in_features, int64_t isa) {
    const char* op = "int8_linear_dynamic";
    const Kernels& kernels = kernels_for(isa);
    const RowView rows = row_view(op, "x", x);
    check_width(op, rows, in_features);
    const ScalarType type = x.scalar_type();
    const Float float_in = float_type(op, "x", type);
    const HeldWeight weight(op, kernels, packed, scale, bias, in_features);
    Tensor out = like_rows(x, weight.view.out_features, type);
    int8_passes(kernels, weight.view, rows.rows, out.data_ptr(), float_in,
                [&](int64_t first, int64_t begin, int64_t end, char* staged, int64_t stride, float* x_scale) {
                    kernels.quantize_staged(rows_from(rows, float_in, first), begin, end, staged, stride, x_scale);
                });
    return out;
}

Tensor int8_linear(const Tensor codes, const Tensor x_scale, const Tensor packed, const Tensor scale,
                   const std::optional<Tensor> bias, int64_t in_features, ScalarType dtype, int64_t isa) {
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
    Tensor out = like_rows(codes, weight.view.out_features, dtype);
    const auto* from = static_cast<const int8_t*>(packed_rows.data_ptr());
    const auto* from_scale = static_cast<const float*>(row_scale.data_ptr());
    int8_passes(kernels, weight.view, rows.rows, out.data_ptr(), out_type,
                [&](int64_t first, int64_t begin, int64_t end, char* staged, int64_t stride, float* to_scale) {
                    kernels.stage(from + first * in_features, in_features, begin, end, staged, stride);
                    std::memcpy(to_scale + begin, from_scale + first + begin, static_cast<size_t>(end - begin) * sizeof(float));
                });
    return out;
}

Tensor int8_linear_weight_only(const Tensor x, const Tensor packed, const Tensor scale, const std::optional<Tensor> bias,
                               int64_t in_features, int64_t isa) {
    const char* op = "int8_linear_weight_only";
    const Kernels& kernels = kernels_for(isa);
    const RowView rows = row_view(op, "x", x);
    check_width(op, rows, in_features);
    const ScalarType type = x.scalar_type();
    const Float float_in = float_type(op, "x", type);
    const HeldWeight weight(op, kernels, packed, scale, bias, in_features);
    const Weight& w = weight.view;
    Tensor out = like_rows(x, w.out_features, type);

    const int64_t stride = staged_stride(w.in_features, sizeof(float)) / static_cast<int64_t>(sizeof(float));
    const int64_t most = pass_rows(rows.rows, stride * static_cast<int64_t>(sizeof(float)));
    auto* wide = reinterpret_cast<float*>(scratch(most * stride * static_cast<int64_t>(sizeof(float))));
    for (int64_t first = 0; first < rows.rows; first += most) {
        const int64_t count = std::min(most, rows.rows - first);
        const Rows from = rows_from(rows, float_in, first);
        split(count, count * w.in_features < kSerialElements,
              [&](int64_t begin, int64_t end) { kernels.widen(from, begin, end, wide, stride); });
        void* to = static_cast<char*>(out.data_ptr()) + first * w.out_features * (float_in == Float::f32 ? 4 : 2);
        const FloatProblem problem{wide, stride, w, to, float_in};
        for_tasks(w, count, [&](const Task& task) { kernels.float_product(problem, task); });
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
    const int64_t shape[4] = {panels(n), quads(k) + 1, kPanel, kQuad};
    const int64_t strides[4] = {panel_bytes(k), kPanel * kQuad, kQuad, 1};
    AtenTensorHandle fresh = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(4, shape, strides, aoti_torch_dtype_int8(),
                                                           aoti_torch_device_type_cpu(), 0, &fresh));
    Tensor packed(fresh);
    const auto* in = static_cast<const int8_t*>(from.data_ptr());
    auto* out = static_cast<int8_t*>(packed.data_ptr());
    split(panels(n), n * k < kSerialElements, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) pack_block(in, n, k, p, out + p * panel_bytes(k));
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
    m.impl("int8_linear", TORCH_BOX(&fxquant::int8_linear));
    m.impl("int8_linear_weight_only", TORCH_BOX(&fxquant::int8_linear_weight_only));
}
