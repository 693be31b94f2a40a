// fxquant::embedding_packed: rows of a table that stands in the layout of the linear kernels. Only these are decoded.
#include <torch/csrc/stable/library.h>

#include "rows.h"
#include "shims.h"

namespace fxquant {
namespace {

// In a full panel, four neighbours along K of one feature are one 32-bit word. This is where such a word stands in a plane, from
// the first row of a block on, and how its codes are moved into place.
struct Slot {
    int64_t offset;
    int down;
    uint32_t keep;
    int up;
};

// The planes that hold the vector of 64 bytes with this index, at the words of `column`.
std::vector<Slot> slots_of(int bits, int64_t vector, int64_t column) {
    std::vector<Slot> found;
    int first = 0;
    for (const int width : {8, 4, 2, 1}) {
        if ((bits & width) == 0) continue;
        const int64_t row = first + vector % width;
        const uint32_t keep = ((1u << width) - 1) * 0x01010101u;
        found.push_back({row * kPanel + column * kQuad, static_cast<int>(vector / width) * width, keep, first});
        first += width;
    }
    return found;
}

uint32_t word_at(const uint8_t* from) {
    uint32_t word;
    std::memcpy(&word, from, sizeof(word));
    return word;
}

// A weight that pack_panels packed.
struct PanelTable {
    PanelTable(const HeldCodedWeight& held)
        : width(held.view.in_features), spec_(held.spec), w_(held.view),
          layout_(plane_layout(w_.out_features, width, w_.bits)) {}

    void row(int64_t index, uint8_t* codes, float* out) const {
        const int64_t panel = index / kPanel;
        if (layout_.is_full(panel)) {
            gather(w_.packed + layout_.offset(panel), index % kPanel, codes);
        } else {
            const int64_t first = layout_.full * kPanel;
            spread(static_cast<int>(w_.bits), w_.packed + layout_.offset(layout_.full) + (index - first) * layout_.row_bytes, width,
                   codes);
        }
        const auto flip = static_cast<uint8_t>(w_.offset);
        for (int64_t k = 0; k < width; ++k) codes[k] ^= flip;
        values_of(spec_, codes, width, out);
        const Numbers zeros = numbers(w_.zero, index);
        scale_row(spec_, width, w_.granule, numbers(w_.scale, index), w_.scheme == Scheme::symmetric ? nullptr : &zeros,
                  w_.tensor_scale == nullptr ? 1.0f : w_.tensor_scale[index], out);
    }

    const int64_t width;

private:
    void gather(const uint8_t* panel, int64_t feature, uint8_t* codes) const {
        const int bits = static_cast<int>(w_.bits);
        for (int64_t half = 0; half < kBlock / kQuad; ++half) {
            const std::vector<Slot> slots = slots_of(bits, feature / 16 + half * 4, feature % 16);
            for (int64_t k = half * kQuad; k < width; k += kBlock) {
                const uint8_t* block = panel + k / kBlock * bits * kPanel;
                uint32_t word = 0;
                for (const Slot& s : slots) word |= (word_at(block + s.offset) >> s.down & s.keep) << s.up;
                std::memcpy(codes + k, &word, sizeof(word));
            }
        }
    }

    Numbers numbers(const Granules& of, int64_t index) const {
        if (of.rows > 0) return {of.data, of.type, index / of.rows * w_.granules, 1};
        const int64_t panel = index / kPanel;
        return {of.data, of.type, panel * kPanel * w_.granules + index % kPanel, layout_.features(panel)};
    }

    const Spec& spec_;
    const CodedWeight& w_;
    const PanelLayout layout_;
};

// A weight that int8_pack packed, one scale a row.
struct Int8Table {
    Int8Table(const Weight& w, const Spec& spec)
        : width(w.in_features), w_(w), spec_(spec), layout_(int8_layout(w.out_features, w.in_features)) {}

    void row(int64_t index, uint8_t* codes, float* out) const {
        const auto* packed = reinterpret_cast<const uint8_t*>(w_.packed);
        const int64_t panel = index / kPanel;
        if (layout_.is_full(panel)) {
            const uint8_t* from = packed + layout_.offset(panel) + index % kPanel * kQuad;
            for (int64_t k = 0; k < width; k += kQuad) std::memcpy(codes + k, from + k * kPanel, kQuad);
        } else {
            const int64_t first = layout_.full * kPanel;
            std::memcpy(codes, packed + layout_.offset(layout_.full) + (index - first) * width, static_cast<size_t>(width));
        }
        values_of(spec_, codes, width, out);
        scale_row(spec_, width, width, {w_.scale, Stored::f32, index, 0}, nullptr, 1.0f, out);
    }

    const int64_t width;

private:
    const Weight& w_;
    const Spec& spec_;
    const PanelLayout layout_;
};

Tensor embedding_packed(const Tensor indices, const Tensor packed, const Tensor scale, const std::optional<Tensor> zero_point,
                        const std::optional<Tensor> tensor_scale, int64_t num_embeddings, int64_t embedding_dim,
                        const std::string text, ScalarType dtype) {
    const char* op = "embedding_packed";
    const Kernels& kernels = kernels_for(kChoose);
    const Spec spec = weight_spec(op, text);
    const bool of_int8 = !spec.format.is_float && spec.format.bits == 8 && spec.granularity == Spec::Granularity::channel &&
                         spec.scheme == Spec::Scheme::symmetric && spec.scale == Spec::Scale::float32;
    if (!of_int8) {
        const HeldCodedWeight weight(op, kernels, packed, scale, zero_point, tensor_scale, std::nullopt, num_embeddings,
                                     embedding_dim, text);
        return look_up(op, indices, PanelTable(weight), num_embeddings, dtype);
    }
    STD_TORCH_CHECK(scale.numel() == num_embeddings, "fxquant::", op, ": scale has ", scale.numel(), " values for ", num_embeddings,
                    " rows");
    const HeldWeight weight(op, kernels, packed, scale, std::nullopt, embedding_dim);
    return look_up(op, indices, Int8Table(weight.view, spec), num_embeddings, dtype);
}

}  // namespace
}  // namespace fxquant

STABLE_TORCH_LIBRARY_IMPL(fxquant, CPU, m) { m.impl("embedding_packed", TORCH_BOX(&fxquant::embedding_packed)); }

FXQUANT_SHIM(embedding_packed)
