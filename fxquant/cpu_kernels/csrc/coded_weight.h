// A weight of any number format as the kernels read it: checked, and held for as long as they run.
#pragma once

#include <string>
#include <unordered_map>
#include <vector>

#include "spec.h"
#include "tensors.h"

namespace fxquant {

inline Spec weight_spec(const char* op, const std::string& text) {
    Spec spec;
    const bool known = parse_spec(text, spec);
    using G = Spec::Granularity;
    STD_TORCH_CHECK(known, "fxquant::", op, ": spec '", text,
                    "' is not format/granularity[/scheme][/scale], such as int4/group128/affine; write aliases out: str(TensorSpec.parse(...))");
    STD_TORCH_CHECK(!spec.format.is_float || spec.scheme == Spec::Scheme::symmetric, "fxquant::", op, ": spec '", text,
                    "' has a zero point, which needs an integer format");
    STD_TORCH_CHECK(spec.granularity != G::sample && spec.axis == 0, "fxquant::", op, ": spec '", text,
                    "' has no granularity of a packed weight; tensor, channel, group<n> and block<r>x<c> are those");
    return spec;
}

// The bit that turns a code of the spec into the pattern that is packed: symmetric integers are kept as code + 2^(bits - 1).
inline int32_t pattern_offset(const Spec& spec) {
    return spec.format.is_float || spec.scheme != Spec::Scheme::symmetric ? 0 : 1 << (spec.format.bits - 1);
}

// A spec, and what each pattern of its codes is worth: CodedWeight::values.
struct CodedSpec {
    Spec spec;
    alignas(64) uint16_t values[256];
};

inline CodedSpec read_coded_spec(const char* op, const std::string& text) {
    CodedSpec read{weight_spec(op, text), {}};
    float values[256];
    code_values(read.spec, values);
    for (int i = 0; i < 256; ++i) {
        uint32_t pattern;
        std::memcpy(&pattern, &values[(i ^ pattern_offset(read.spec)) & ((1 << read.spec.format.bits) - 1)], sizeof(pattern));
        read.values[i] = static_cast<uint16_t>(pattern >> 16);
    }
    return read;
}

// Specs stay read: a step of a small model has hundreds of products, some of which take less time than reading theirs.
inline const CodedSpec& coded_spec(const char* op, const std::string& text) {
    thread_local std::unordered_map<std::string, CodedSpec> known;
    const auto found = known.find(text);
    return found != known.end() ? found->second : known.emplace(text, read_coded_spec(op, text)).first->second;
}

inline Stored stored_scale(const Spec& spec) {
    switch (spec.scale) {
        case Spec::Scale::bfloat16:
        case Spec::Scale::stepped: return Stored::bf16;
        case Spec::Scale::e8m0: return Stored::e8m0;
        case Spec::Scale::e4m3: return Stored::e4m3;
        default: return Stored::f32;
    }
}

inline ScalarType stored_type(Stored stored) {
    switch (stored) {
        case Stored::bf16: return ScalarType::BFloat16;
        case Stored::e8m0: return ScalarType::Float8_e8m0fnu;
        case Stored::e4m3: return ScalarType::Float8_e4m3fn;
        case Stored::u8: return ScalarType::Byte;
        default: return ScalarType::Float;
    }
}

class HeldCodedWeight {
public:
    HeldCodedWeight(const char* op, const Kernels& kernels, const Tensor& packed, const Tensor& scale,
                    const std::optional<Tensor>& zero_point, const std::optional<Tensor>& tensor_scale,
                    const std::optional<Tensor>& bias, int64_t out_features, int64_t in_features, const std::string& text)
        : coded(coded_spec(op, text)), spec(coded.spec), op_(op), packed_(dense(packed)), scale_(dense(scale)) {
        STD_TORCH_CHECK(in_features >= 1 && in_features <= kMostInFeatures && out_features >= 0, "fxquant::", op, ": in_features is ",
                        in_features, " and out_features is ", out_features, "; 1 to ", kMostInFeatures, " and 0 or more are taken");
        view.out_features = out_features;
        view.in_features = in_features;
        read_codes();
        const bool grouped = spec.granularity == Spec::Granularity::group || spec.granularity == Spec::Granularity::block;
        view.granule = grouped ? std::min(spec.size, in_features) : in_features;
        view.granules = (in_features + view.granule - 1) / view.granule;
        const bool stepped = spec.scale == Spec::Scale::stepped && stores_steps(in_features, view.bits, view.granules);
        view.scale = granules("scale", scale_, stored_scale(spec), stepped ? out_features : 0);
        view.steps = stepped ? static_cast<const uint16_t*>(view.scale.data) + out_features * view.granules : nullptr;
        view.zero = {nullptr, Stored::u8, 0};
        if (spec.scheme != Spec::Scheme::symmetric) {
            STD_TORCH_CHECK(zero_point.has_value(), "fxquant::", op, ": spec '", text, "' needs a zero_point; none was given");
            zero_ = dense(*zero_point);
            view.zero = granules("zero_point", *zero_, spec.scheme == Spec::Scheme::affine ? Stored::u8 : stored_scale(spec));
        }
        view.tensor_scale = nullptr;
        if (spec.scale == Spec::Scale::e4m3) read_tensor_scale(tensor_scale);
        view.bias = nullptr;
        if (bias.has_value()) read_bias(kernels, *bias);
    }

    const CodedSpec& coded;
    const Spec& spec;  // its
    CodedWeight view{};

private:
    void read_codes() {
        const int64_t bits = spec.format.bits;
        const int64_t bytes = plane_layout(view.out_features, view.in_features, bits).bytes();
        const bool fits = packed_.sizes().size() == 1 && packed_.numel() == bytes && packed_.scalar_type() == ScalarType::Byte;
        STD_TORCH_CHECK(fits, "fxquant::", op_, ": packed is not what pack_panels makes of [", view.out_features, ", ",
                        view.in_features, "]: uint8 [", bytes, "] is needed");
        view.packed = static_cast<const uint8_t*>(packed_.data_ptr());
        view.bits = bits;
        view.scheme = static_cast<Scheme>(spec.scheme);
        view.integer = !spec.format.is_float;
        view.offset = pattern_offset(spec);
        view.values = coded.values;
    }

    // extra: numbers behind those of the granules.
    Granules granules(const char* what, const Tensor& t, Stored stored, int64_t extra = 0) const {
        const bool whole = spec.granularity == Spec::Granularity::tensor && t.numel() == 1;
        const int64_t rows = whole ? std::max<int64_t>(view.out_features, 1)
                                   : spec.granularity == Spec::Granularity::block ? spec.rows : 0;
        const int64_t wanted = (view.out_features + std::max<int64_t>(rows, 1) - 1) / std::max<int64_t>(rows, 1) * view.granules + extra;
        const bool fits = t.sizes().size() == 1 && (whole || t.numel() == wanted) && t.scalar_type() == stored_type(stored);
        STD_TORCH_CHECK(fits, "fxquant::", op_, ": ", what, " is not what pack_granules makes for [", view.out_features, ", ",
                        view.in_features, "]: ", torch::headeronly::toString(stored_type(stored)), " [", wanted, "] is needed");
        return {t.data_ptr(), stored, rows};
    }

    void read_tensor_scale(const std::optional<Tensor>& tensor_scale) {
        const int64_t n = view.out_features;
        STD_TORCH_CHECK(tensor_scale.has_value() && tensor_scale->scalar_type() == ScalarType::Float &&
                            (tensor_scale->numel() == 1 || tensor_scale->numel() == n),
                        "fxquant::", op_, ": scales of e4m3 need a tensor_scale, float32 [1, 1] or [", n, ", 1]");
        const Tensor held = dense(*tensor_scale);
        const auto* from = static_cast<const float*>(held.data_ptr());
        tensor_scales_.resize(static_cast<size_t>(n));
        for (int64_t i = 0; i < n; ++i) tensor_scales_[i] = from[held.numel() == 1 ? 0 : i];
        view.tensor_scale = tensor_scales_.data();
    }

    void read_bias(const Kernels& kernels, const Tensor& bias) {
        const int64_t n = view.out_features;
        STD_TORCH_CHECK(bias.numel() == n, "fxquant::", op_, ": bias has ", bias.numel(), " values for ", n, " output features");
        bias_ = dense(bias);
        const Float type = float_type(op_, "bias", bias_->scalar_type());
        view.bias = static_cast<const float*>(bias_->data_ptr());
        if (type == Float::f32) return;
        wide_bias_.resize(static_cast<size_t>(round_up(n, 16)));
        kernels.widen(Rows{bias_->data_ptr(), n, n, type}, 0, 1, wide_bias_.data(), n);
        view.bias = wide_bias_.data();
    }

    const char* op_;
    Tensor packed_;
    Tensor scale_;
    std::optional<Tensor> zero_;
    std::optional<Tensor> bias_;
    std::vector<float> tensor_scales_;
    std::vector<float> wide_bias_;
};

}  // namespace fxquant
