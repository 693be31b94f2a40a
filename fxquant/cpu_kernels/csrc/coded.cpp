// The ops over weights of any number format: pack_panels, decode_weight, linear_weight_only, linear_dynamic.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <string>

#include "coded_weight.h"
#include "int8_passes.h"
#include "shims.h"

namespace fxquant {
namespace {

Tensor pack_panels(const Tensor codes, const std::string text) {
    const Spec spec = weight_spec("pack_panels", text);
    const auto sizes = codes.sizes();
    STD_TORCH_CHECK(sizes.size() == 2 && codes.element_size() == 1, "fxquant::pack_panels: codes are [N, K], one byte each; met ",
                    torch::headeronly::toString(codes.scalar_type()), " with ", sizes.size(), " dimensions");
    const int64_t n = sizes[0], k = sizes[1], bits = spec.format.bits;
    const Tensor from = dense(codes);
    Tensor packed = torch::stable::empty({plane_layout(n, k, bits).bytes()}, ScalarType::Byte, std::nullopt, codes.device());
    const auto* in = static_cast<const uint8_t*>(from.data_ptr());
    auto* out = static_cast<uint8_t*>(packed.data_ptr());
    prefer_huge_pages(out, packed.numel());
    const auto flip = static_cast<uint8_t>(pattern_offset(spec));
    split(panels(n), n * k < kSerialElements, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) pack_planes(in, n, k, bits, flip, p, out);
    });
    return packed;
}

Tensor decode_weight(const Tensor packed, const Tensor scale, const std::optional<Tensor> zero_point,
                     const std::optional<Tensor> tensor_scale, int64_t out_features, int64_t in_features, const std::string text,
                     ScalarType dtype) {
    const char* op = "decode_weight";
    const Kernels& kernels = kernels_for(kChoose);
    const HeldCodedWeight weight(op, kernels, packed, scale, zero_point, tensor_scale, std::nullopt, out_features, in_features, text);
    const Float type = float_type(op, "dtype", dtype);
    Tensor out = torch::stable::empty({out_features, in_features}, dtype, std::nullopt, packed.device());
    split(panels(out_features), out_features * in_features < kSerialElements, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) kernels.coded.decode(weight.view, p, out.data_ptr(), type);
    });
    return out;
}

int64_t float_bytes(Float type) { return type == Float::f32 ? 4 : 2; }

// x_group: of the values of x that share a scale; 0 where all of a row do.
std::vector<Piece> pieces_of(const CodedWeight& w, int64_t x_group) {
    std::vector<Piece> pieces;
    const int64_t group = x_group == 0 ? w.in_features : x_group;
    pieces.reserve(static_cast<size_t>(w.granules + w.in_features / group + w.in_features / kMostPiece + 1));
    for (int64_t k = 0; k < w.in_features;) {
        const int64_t granule = k / w.granule, from = k - granule * w.granule;  // a long granule counts as several
        int64_t end = std::min(granule * w.granule + (from / kMostPiece + 1) * kMostPiece, w.in_features);
        end = std::min({end, (granule + 1) * w.granule, (k / group + 1) * group});
        pieces.push_back({k, end, granule});
        k = end;
    }
    return pieces;
}

// What a product with a coded weight is given, and its result.
struct Linear {
    const Kernels& kernels;
    const RowView& rows;
    Float type;
    const HeldBefore& before;
    const CodedWeight& weight;
    const HeldAfter& after;
    Tensor& out;
    Float out_type;
    int64_t config;

    // Of the pass that begins with row `first`.
    void* to(int64_t first) const { return static_cast<char*>(out.data_ptr()) + first * after.columns * float_bytes(out_type); }
    CodedWeight weight_from(int64_t first) const {
        CodedWeight w = weight;
        w.after = after.from(first, out_type);
        return w;
    }

    // body(prepared rows, row0, row1, at) of `count` rows from `first` on: see for_prepared.
    template <class Body>
    void prepare(int64_t first, int64_t count, Body body) const {
        split(count, count * weight.in_features < kSerialElements, [&](int64_t begin, int64_t end) {
            for_prepared(kernels, before.from(first), rows_from(rows, type, first), begin, end, body);
        });
    }
};

// Of weights whose sums take codes: integers that only a scale and a zero point stand between.
bool takes_codes(const CodedWeight& w) {
    return w.integer && w.scheme != Scheme::shift && w.tensor_scale == nullptr && (w.granules == 1 || w.granule % kQuad == 0);
}

// Whether the weight's codes, times how many steps a scale has, are multiplied as int8 codes: by the product of those, or a few
// rows at a time straight from its planes. The sums are the same.
bool is_int8(const CodedWeight& w) {
    return w.steps != nullptr && w.in_features <= kWrapSafe && (w.granules == 1 || w.granule % kQuad == 0);
}

bool few_rows(const Linear& linear, int64_t digits) {
    const CodedWeight& w = linear.weight;
    const PanelLayout layout = plane_layout(w.out_features, w.in_features, w.bits);
    const bool whole = (w.granules == 1 || w.granule % kBlock == 0) && layout.is_full(panels(w.out_features) - 1);
    return whole && linear.rows.rows * digits <= linear.kernels.coded.stepped_rows;
}

void product_of_int8(const Linear& linear, int64_t digits) {
    const Kernels& kernels = linear.kernels;
    const CodedWeight& w = linear.weight;
    const Weight view{nullptr, nullptr, w.bias, w.out_features, w.in_features, {}, &w};
    int8_passes(kernels, digits, linear.config, view, linear.after, linear.rows.rows, linear.out.data_ptr(), linear.out_type,
                [&](int64_t first, int64_t begin, int64_t end, char* staged, int64_t stride, float* x_scale) {
                    for_prepared(kernels, linear.before.from(first), rows_from(linear.rows, linear.type, first), begin, end,
                                 [&](const Rows& prepared, int64_t row0, int64_t row1, int64_t at) {
                                     char* to = staged + at * digits * stride;
                                     const auto quantize = digits > 1 ? kernels.quantize_digits : kernels.quantize_staged;
                                     quantize(prepared, row0, row1, to, stride, x_scale + at);
                                 });
                });
}

// x as codes, or as digits.
void product_of_codes(const Linear& linear, int64_t digits, int64_t x_group) {
    if (x_group == 0 && is_int8(linear.weight) && !few_rows(linear, digits)) return product_of_int8(linear, digits);
    const Kernels& kernels = linear.kernels;
    const CodedWeight& w = linear.weight;
    const int64_t group = std::min(x_group, round_up(w.in_features, kBlock));
    const std::vector<Piece> pieces = pieces_of(w, group);
    const auto count = static_cast<int64_t>(pieces.size());
    const int64_t scales = group == 0 ? 1 : count;
    const int64_t stride = staged_stride(w.in_features, kernels.code_bytes);
    const int64_t row_bytes = stride * digits + (scales + count * digits) * static_cast<int64_t>(sizeof(float));
    const int64_t most = pass_rows(linear.rows.rows, row_bytes), most_codes = most * digits;
    const int64_t task = kernels.by_rows ? kRowBlock : kPatternRows;
    const Blocking by = blocking_of(linear.config, {task, kernels.by_rows}).of_digits(digits, task);
    char* staged = scratch(most * row_bytes);
    auto* x_scale = reinterpret_cast<float*>(staged + most_codes * stride);
    auto* sums = reinterpret_cast<int32_t*>(x_scale + most * scales);
    const PieceRows piece_rows = {sums, group == 0 ? nullptr : x_scale, count};
    const float* row_scale = group == 0 ? x_scale : nullptr;
    for (int64_t first = 0; first < linear.rows.rows; first += most) {
        const int64_t now = std::min(most, linear.rows.rows - first);
        CodedDynamicProblem problem{staged,     stride, digits, row_scale, group, piece_rows, pieces.data(), count,
                                    linear.weight_from(first), linear.to(first), linear.out_type};
        if (x_group != 0 || !is_int8(w)) problem.weight.steps = nullptr;
        linear.prepare(first, now, [&](const Rows& prepared, int64_t row0, int64_t row1, int64_t at) {
            const int64_t code = at * digits;
            kernels.coded.quantize(prepared, row0, row1, problem, staged + code * stride, x_scale + at * scales, sums + code * count);
        });
        const double time = product_time(now, w.out_features, w.in_features, w.bits,
                                         kernels.int8_products / static_cast<double>(digits));
        for_products(problem, now, time, by, [&](const CodedDynamicProblem& p, int64_t panel, int64_t row0, int64_t row1, int64_t) {
            kernels.coded.dynamic_product(p, panel, row0, row1);
        });
    }
}

// x as floats.
void product_of_floats(const Linear& linear) {
    const Kernels& kernels = linear.kernels;
    const CodedWeight& w = linear.weight;
    const int64_t stride = staged_stride(w.in_features, sizeof(float)) / static_cast<int64_t>(sizeof(float));
    const bool summed = kernels.coded.sum != nullptr && sums_granules(w) && w.scheme == Scheme::affine;
    const int64_t count_of_sums = summed ? w.granules : 0;
    const int64_t row_bytes = (stride + count_of_sums) * static_cast<int64_t>(sizeof(float));
    const int64_t most = pass_rows(linear.rows.rows, row_bytes);
    auto* wide = reinterpret_cast<float*>(scratch(most * row_bytes));
    float* sums = wide + most * stride;
    for (int64_t first = 0; first < linear.rows.rows; first += most) {
        const int64_t now = std::min(most, linear.rows.rows - first);
        linear.prepare(first, now, [&](const Rows& prepared, int64_t row0, int64_t row1, int64_t at) {
            kernels.widen(prepared, row0, row1, wide + at * stride, stride);
            for (int64_t r = at + row0; summed && r < at + row1; ++r) kernels.coded.sum(w, wide + r * stride, sums + r * count_of_sums);
        });
        const CodedProblem problem{wide, stride, sums, linear.weight_from(first), linear.to(first), linear.out_type};
        const double time = product_time(now, w.out_features, w.in_features, w.bits, kernels.float_products);
        for_products(problem, now, time, blocking_of(linear.config),
                     [&](const CodedProblem& p, int64_t panel, int64_t row0, int64_t row1, int64_t) {
                         kernels.coded.product(p, panel, row0, row1);
                     });
    }
}

Tensor linear_weight_only(const Tensor x, const Tensor packed, const Tensor scale, const std::optional<Tensor> zero_point,
                          const std::optional<Tensor> tensor_scale, const std::optional<Tensor> bias, int64_t out_features,
                          int64_t in_features, const std::string text, ScalarType dtype, int64_t isa,
                          const std::optional<Tensor> residual, const std::string activation, const std::string prologue,
                          const std::optional<Tensor> by, const std::optional<Tensor> shift, double eps) {
    const char* op = "linear_weight_only";
    const Kernels& kernels = kernels_for(isa);
    const RowView rows = row_view(op, "x", x);
    check_width(op, rows, in_features);
    const Float type = float_type(op, "x", x.scalar_type()), out_type = float_type(op, "dtype", dtype);
    const HeldBefore before(op, kernels, x, rows, type, prologue, by, shift, eps);
    const HeldCodedWeight weight(op, kernels, packed, scale, zero_point, tensor_scale, bias, out_features, in_features, text);
    Tensor out = like_rows(x, result_columns(op, out_features, activation), dtype);
    const HeldAfter after(op, out, residual, activation);
    const Linear linear{kernels, rows, type, before, weight.view, after, out, out_type, isa};
    if (kernels.quantize_digits != nullptr && takes_codes(weight.view)) {
        product_of_codes(linear, digits_of(type), 0);
    } else {
        product_of_floats(linear);
    }
    return out;
}

Tensor linear_dynamic(const Tensor x, const Tensor packed, const Tensor scale, const std::optional<Tensor> zero_point,
                      const std::optional<Tensor> bias, int64_t out_features, int64_t in_features, const std::string text,
                      ScalarType dtype, int64_t isa, const std::optional<Tensor> residual, const std::string activation,
                      const std::string prologue, const std::optional<Tensor> by, const std::optional<Tensor> shift,
                      double eps, int64_t x_group) {
    const char* op = "linear_dynamic";
    const Kernels& kernels = kernels_for(isa);
    const RowView rows = row_view(op, "x", x);
    check_width(op, rows, in_features);
    const Float type = float_type(op, "x", x.scalar_type()), out_type = float_type(op, "dtype", dtype);
    const HeldBefore before(op, kernels, x, rows, type, prologue, by, shift, eps);
    const HeldCodedWeight weight(op, kernels, packed, scale, zero_point, std::nullopt, bias, out_features, in_features, text);
    STD_TORCH_CHECK(takes_codes(weight.view), "fxquant::", op, ": spec '", text,
                    "' is not of integers, symmetric or affine, in groups that are a multiple of ", kQuad);
    STD_TORCH_CHECK(x_group >= 0 && x_group % kQuad == 0, "fxquant::", op, ": x_group is ", x_group,
                    "; 0, or a multiple of ", kQuad, ", is taken");
    Tensor out = like_rows(x, result_columns(op, out_features, activation), dtype);
    const HeldAfter after(op, out, residual, activation);
    product_of_codes({kernels, rows, type, before, weight.view, after, out, out_type, isa}, 1, x_group);
    return out;
}

}  // namespace
}  // namespace fxquant

STABLE_TORCH_LIBRARY_IMPL(fxquant, CPU, m) {
    m.impl("pack_panels", TORCH_BOX(&fxquant::pack_panels));
    m.impl("decode_weight", TORCH_BOX(&fxquant::decode_weight));
    m.impl("linear_weight_only", TORCH_BOX(&fxquant::linear_weight_only));
    m.impl("linear_dynamic", TORCH_BOX(&fxquant::linear_dynamic));
}

FXQUANT_SHIM(linear_dynamic)
FXQUANT_SHIM(linear_weight_only)
