// What every file of CPU ops needs: the kernels of one instruction set, tensors as rows, checked weights. Stable ABI.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>
#include <optional>

#include "cpu.h"
#include "kernels.h"
#include "launch.h"
#include "pages.h"

namespace fxquant {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBlockings = 32;

inline int64_t best_isa() {
    static const int64_t best = [] {
        for (const int64_t isa : {kAmx, kAvx512Vnni, kAvxVnni, kAvx2}) {
            if (kernels_of_isa(isa) != nullptr && cpu_has(isa)) return isa;
        }
        return int64_t{kPortable};
    }();
    return best;
}

// Those of a configuration, the number by which an op is told how to run: the instruction set, and from bit 4 on a blocking.
inline const Kernels& kernels_for(int64_t config) {
    int64_t isa = config & 15;
    STD_TORCH_CHECK(isa <= kAvxVnni && config >= 0 && config >> 4 < kBlockings, "fxquant: isa is ", config,
                    "; known are 0 (choose), 1 (portable), 2 (AVX2), 3 (AVX512-VNNI), 4 (AMX) and 5 (AVX-VNNI), plus 16 times a blocking below ",
                    kBlockings);
    if (isa == kChoose) isa = best_isa();
    const Kernels* kernels = kernels_of_isa(isa);
    const char* const names[] = {"", "", " (AVX2)", " (AVX512-VNNI)", " (AMX)", " (AVX-VNNI)"};
    STD_TORCH_CHECK(kernels != nullptr && cpu_has(isa), "fxquant: isa=", isa, names[isa],
                    " was asked for, but this CPU or this build lacks it; isa=0 chooses what is there");
    return *kernels;
}

inline std::optional<Float> float_of(ScalarType type) {
    if (type == ScalarType::Float) return Float::f32;
    if (type == ScalarType::BFloat16) return Float::bf16;
    if (type == ScalarType::Half) return Float::f16;
    return std::nullopt;
}

inline Float float_type(const char* op, const char* what, ScalarType type) {
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

inline bool evenly_spaced(const Tensor& x, int64_t width, int64_t rows, int64_t& stride) {
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

inline RowView row_view(const char* op, const char* what, const Tensor& x) {
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

inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline Tensor in_large_pages(Tensor fresh) {
    prefer_huge_pages(fresh.data_ptr(), fresh.numel() * static_cast<int64_t>(fresh.element_size()));
    return fresh;
}

// An uninitialized contiguous CPU tensor with x's leading sizes and `last` as its last one.
inline Tensor like_rows(const Tensor& x, int64_t last, ScalarType type) {
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
    return in_large_pages(Tensor(fresh));
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
        const int64_t bytes = int8_layout(n, in_features).bytes();
        const bool fits = packed_.sizes().size() == 1 && packed_.numel() == bytes && packed_.scalar_type() == ScalarType::Char;
        STD_TORCH_CHECK(fits, "fxquant::", op, ": packed is not what int8_pack makes of [", n, ", ", in_features, "]: int8 [", bytes,
                        "] is needed");
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

// A scale that is given for a whole activation, and its factor, as numerics.given has them.
inline Scaling given_scaling(const char* op, const Tensor& scale) {
    STD_TORCH_CHECK(scale.numel() == 1 && scale.scalar_type() == ScalarType::Float, "fxquant::", op, ": the scale of x has ",
                    scale.numel(), " values of ", torch::headeronly::toString(scale.scalar_type()), "; one of Float is needed");
    const float given = *static_cast<const float*>(scale.data_ptr());
    if (!(given >= 0.0f && given < __builtin_inff())) return {__builtin_nanf(""), 0.0f};
    return {given, given >= 0x1p-126f ? 1.0f / given : 0.0f};
}

// Rows of one pass: as many row blocks as kStagedBytes hold, at least one.
inline int64_t pass_rows(int64_t rows, int64_t stride) {
    const int64_t most = std::max(kRowBlock, kStagedBytes / stride / kRowBlock * kRowBlock);
    return std::min(rows, most);
}

inline Rows rows_from(const RowView& x, Float type, int64_t first) {
    const auto* data = static_cast<const char*>(x.held.data_ptr()) + first * x.stride * (type == Float::f32 ? 4 : 2);
    return Rows{data, x.stride, x.width, type};
}

inline void check_width(const char* op, const RowView& x, int64_t in_features) {
    STD_TORCH_CHECK(in_features >= 1 && in_features <= kMostInFeatures, "fxquant::", op, ": in_features is ", in_features, "; 1 to ",
                    kMostInFeatures, " are taken");
    STD_TORCH_CHECK(x.width == in_features, "fxquant::", op, ": x has ", x.width, " features, in_features is ", in_features);
}

}  // namespace fxquant
