// fxquant::embedding_dequantize and decode_rows: rows of a table that is packed by rows, some of them or all.
#include <torch/csrc/stable/library.h>

#include "rows.h"
#include "shims.h"

namespace fxquant {
namespace {

// A table of codes with the numbers of its granules in the shapes that quantize_weight gives.
struct Table {
    Table(const char* op, const std::string& text, const Tensor& rows, const Tensor& scale, const std::optional<Tensor>& zero_point,
          const std::optional<Tensor>& tensor_scale, int64_t width)
        : width(width), op_(op), rows_(dense(rows)), scale_(dense(scale)) {
        STD_TORCH_CHECK(parse_spec(text, spec), "fxquant::", op, ": spec '", text, "' is not one that the kernels know");
        row_bytes = (width * spec.format.bits + 7) / 8;
        const auto sizes = rows_.sizes();
        STD_TORCH_CHECK(sizes.size() == 2 && sizes[1] == row_bytes && rows_.scalar_type() == ScalarType::Byte,
                        "fxquant::", op, ": rows are uint8 [N, ", row_bytes, "] for ", width, " codes of ", text);
        count = sizes[0];
        place_granules();
        const Stored stored = stored_scale(spec);
        scale_type = stored;
        zero_type = spec.scheme == Spec::Scheme::affine ? Stored::u8 : stored;
        check("scale", scale_, stored, granule_rows * granules);
        if (spec.scheme != Spec::Scheme::symmetric) {
            STD_TORCH_CHECK(zero_point.has_value(), "fxquant::", op, ": spec '", text, "' needs a zero_point");
            zero_ = dense(*zero_point);
            check("zero_point", *zero_, zero_type, granule_rows * granules);
        }
        if (spec.scale == Spec::Scale::e4m3) {
            STD_TORCH_CHECK(tensor_scale.has_value(), "fxquant::", op, ": spec '", text, "' needs a tensor_scale");
            tensor_scale_ = dense(*tensor_scale);
            check("tensor_scale", *tensor_scale_, Stored::f32, tensor_scale_->numel() == 1 ? 1 : count);
        }
    }

    void row(int64_t index, uint8_t* codes, float* out) const {
        spread(spec.format.bits, static_cast<const uint8_t*>(rows_.data_ptr()) + index * row_bytes, width, codes);
        values_of(spec, codes, width, out);
        const int64_t first = (granule_rows == 1 ? 0 : index / rows_each) * granules;
        const Numbers scales{scale_.data_ptr(), scale_type, first, 1};
        const Numbers zeros{zero_ ? zero_->data_ptr() : nullptr, zero_type, first, 1};
        float whole = 1.0f;
        if (tensor_scale_) whole = stored_float(tensor_scale_->data_ptr(), Stored::f32, tensor_scale_->numel() == 1 ? 0 : index);
        scale_row(spec, width, granule, scales, zero_ ? &zeros : nullptr, whole, out);
    }

    const int64_t width;
    int64_t row_bytes, count;

private:
    void place_granules() {
        using G = Spec::Granularity;
        granule = width;
        granules = 1;
        rows_each = 1;
        granule_rows = spec.granularity == G::tensor ? (scale_.numel() == 1 ? 1 : count) : count;
        if (spec.granularity == G::group || spec.granularity == G::block) {
            granule = std::max<int64_t>(1, std::min(spec.size, width));
            granules = (width + granule - 1) / granule;
        }
        if (spec.granularity == G::block) {
            rows_each = spec.rows;
            granule_rows = (count + rows_each - 1) / rows_each;
        }
        if (spec.granularity == G::channel && (spec.axis == 1 || spec.axis == -1)) {  // one scale a column
            granule = 1;
            granules = width;
            granule_rows = 1;
        }
    }

    void check(const char* what, const Tensor& t, Stored stored, int64_t wanted) const {
        STD_TORCH_CHECK(t.scalar_type() == stored_type(stored) && t.numel() == wanted, "fxquant::", op_, ": ", what,
                        " has ", t.numel(), " values of ", torch::headeronly::toString(t.scalar_type()), "; ", wanted, " of ",
                        torch::headeronly::toString(stored_type(stored)), " are needed");
    }

    const char* op_;
    Spec spec;
    Tensor rows_, scale_;
    std::optional<Tensor> zero_, tensor_scale_;
    Stored scale_type, zero_type;
    int64_t granule, granules, rows_each, granule_rows;
};

Tensor embedding_dequantize(const Tensor indices, const Tensor rows, const Tensor scale, const std::optional<Tensor> zero_point,
                            const std::optional<Tensor> tensor_scale, int64_t embedding_dim, const std::string spec, ScalarType dtype) {
    const Table table("embedding_dequantize", spec, rows, scale, zero_point, tensor_scale, embedding_dim);
    return look_up("embedding_dequantize", indices, table, table.count, dtype);
}

Tensor decode_rows(const Tensor rows, const Tensor scale, const std::optional<Tensor> zero_point,
                   const std::optional<Tensor> tensor_scale, int64_t width, const std::string spec, ScalarType dtype) {
    const Table table("decode_rows", spec, rows, scale, zero_point, tensor_scale, width);
    const Float type = float_type("decode_rows", "dtype", dtype);
    Tensor out = torch::stable::empty({table.count, width}, dtype, std::nullopt, rows.device());
    decode(table, table.count, [](int64_t i) { return i; }, type, out);
    return out;
}

}  // namespace
}  // namespace fxquant

STABLE_TORCH_LIBRARY_IMPL(fxquant, CPU, m) {
    m.impl("embedding_dequantize", TORCH_BOX(&fxquant::embedding_dequantize));
    m.impl("decode_rows", TORCH_BOX(&fxquant::decode_rows));
}

FXQUANT_SHIM(embedding_dequantize)
