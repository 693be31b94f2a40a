// The ops of saving and loading: rows_of_packed, packed_of_rows.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>

#include "coded_weight.h"
#include "stored.h"

namespace fxquant {
namespace {

constexpr int64_t kSerialBytes = int64_t{1} << 18;  // a few microseconds of one thread, as much as it takes to wake another

StoredWeight read_weight(const char* op, int64_t n, int64_t k, const std::string& text, const std::string& layout) {
    const bool is_int8 = layout == "int8";
    STD_TORCH_CHECK(is_int8 || layout == "panels", "fxquant::", op, ": layout '", layout, "'; 'int8' and 'panels' are known");
    STD_TORCH_CHECK(n >= 0 && k >= 0 && k <= kMostInFeatures, "fxquant::", op, ": a weight [", n, ", ", k, "]; ", kMostInFeatures,
                    " input features are the most");
    const Spec spec = weight_spec(op, text);
    const bool fits = !is_int8 || (!spec.format.is_float && spec.format.bits == 8 && spec.scheme == Spec::Scheme::symmetric);
    STD_TORCH_CHECK(fits, "fxquant::", op, ": layout 'int8' holds symmetric int8, not '", text, "'");
    const auto flip = static_cast<uint8_t>(is_int8 ? 0 : pattern_offset(spec));
    return stored_weight(n, k, spec.format.bits, flip, is_int8);
}

Tensor rows_of_packed(const Tensor packed, int64_t out_features, int64_t in_features, const std::string text,
                      const std::string layout, int64_t begin, int64_t end) {
    const StoredWeight w = read_weight("rows_of_packed", out_features, in_features, text, layout);
    STD_TORCH_CHECK(packed.sizes().size() == 1 && packed.numel() == w.layout.bytes() && packed.element_size() == 1,
                    "fxquant::rows_of_packed: packed has ", packed.numel(), " elements; ", w.layout.bytes(), " bytes, flat, are needed");
    const bool whole = begin % kPanel == 0 && (end % kPanel == 0 || end == out_features);
    STD_TORCH_CHECK(whole && 0 <= begin && begin <= end && end <= out_features, "fxquant::rows_of_packed: rows ", begin, " to ", end,
                    " of ", out_features, "; whole panels of ", kPanel, " are taken");
    const Tensor held = dense(packed);
    Tensor rows = torch::stable::empty({end - begin, w.row_bytes()}, ScalarType::Byte, std::nullopt, packed.device());
    const auto* from = static_cast<const uint8_t*>(held.data_ptr());
    auto* to = static_cast<uint8_t*>(rows.data_ptr());
    const int64_t first = begin / kPanel;
    split(panels(end - begin), rows.numel() < kSerialBytes, [&](int64_t p, int64_t last) {
        for (; p < last; ++p) rows_of_panel(w, from + w.layout.offset(first + p), first + p, to + p * kPanel * w.row_bytes());
    });
    return rows;
}

Tensor packed_of_rows(const Tensor rows, int64_t in_features, const std::string text, const std::string layout) {
    const auto sizes = rows.sizes();
    STD_TORCH_CHECK(sizes.size() == 2 && rows.scalar_type() == ScalarType::Byte, "fxquant::packed_of_rows: rows are uint8 [N, bytes]; met ",
                    torch::headeronly::toString(rows.scalar_type()), " with ", sizes.size(), " dimensions");
    const StoredWeight w = read_weight("packed_of_rows", sizes[0], in_features, text, layout);
    STD_TORCH_CHECK(sizes[1] == w.row_bytes(), "fxquant::packed_of_rows: rows of ", sizes[1], " bytes; ", in_features, " codes of '", text,
                    "' take ", w.row_bytes());
    const Tensor held = dense(rows);
    const int64_t bytes = w.layout.bytes();
    // Not in large pages: where a host has taken back free ones, as from idle virtual machines, they take longest to come again.
    Tensor packed = torch::stable::empty({bytes}, w.is_int8 ? ScalarType::Char : ScalarType::Byte, std::nullopt, rows.device());
    const auto* from = static_cast<const uint8_t*>(held.data_ptr());
    auto* to = static_cast<uint8_t*>(packed.data_ptr());
    const Kernels& kernels = kernels_for(kChoose);
    const bool is_small = bytes < kSerialBytes;
    split(panels(sizes[0]), is_small, [&](int64_t p, int64_t last) {
        for (; p < last; ++p) {
            uint8_t* panel = to + w.layout.offset(p);
            const int64_t panel_bytes = w.layout.offset(p + 1) - w.layout.offset(p);
            const bool past = !is_small && was_written(panel, panel_bytes);
            if (!is_small && !past) bring_pages(panel, panel_bytes);
            panel_of_rows(w, kernels, from + p * kPanel * w.row_bytes(), p, past, panel);
        }
    });
    return packed;
}

}  // namespace
}  // namespace fxquant

STABLE_TORCH_LIBRARY_IMPL(fxquant, CPU, m) {
    m.impl("rows_of_packed", TORCH_BOX(&fxquant::rows_of_packed));
    m.impl("packed_of_rows", TORCH_BOX(&fxquant::packed_of_rows));
}
