// The int8 codes of one panel in quads, [..][64][4]: those of a weight of int8, or of one in steps. Included into each isa_*.cpp
// inside an anonymous namespace, after patterns.h.

// What each of 64 features multiplies its codes by in one granule: its scale, in steps.
template <class Isa>
struct Multiples {
    using F = typename Isa::F;
    using I = typename Isa::I;
    using U = typename Isa::U;
    using Halves = typename Isa::Halves;
    using Bytes = typename Isa::Bytes;

    Multiples(const CodedWeight& weight, int64_t panel) : w(weight), panel(panel) {
        alignas(64) float step[kPanel];
        read_steps(w, panel, step);
        for (int64_t c = 0; c < kPanel; c += Isa::kWidth) {
            const F of = load<F>(step + c);
            store(in_one + c, of > 0.0f ? 1.0f / of : F{});  // where it is 0, or NaN, so is every sum in the end
        }
    }

    void read(int64_t granule, int32_t* to) const {
        alignas(64) float scale[kPanel];
        read_granule<Isa>(w, w.scale, panel, granule, scale);
        for (int64_t c = 0; c < kPanel; c += Isa::kWidth) {
            const F by = load<F>(in_one + c);
            store(to + c, __builtin_convertvector(by > 0.0f ? load<F>(scale + c) * by + 0.5f : F{}, I));
        }
    }

    // Those of the granule that k lies in, for multiply(). Padding belongs to the last one.
    void enter(int64_t k) {
        if (k < end) return;
        const int64_t granule = k / w.granule;
        end = granule + 1 < w.granules ? (granule + 1) * w.granule : INT64_MAX;
        alignas(64) int32_t multiple[kPanel];
        read(granule, multiple);
        for (int64_t c = 0; c < kPanel; c += Isa::kWidth) {
            const U of = load<U>(multiple + c), offset = of * static_cast<uint32_t>(w.offset) & 0xffu;
            store(by + c, of | of << 16);
            store(less + c, offset | offset << 8 | offset << 16 | offset << 24);
        }
    }

    // (pattern - offset) * multiple, an int8, of the features from c on and four k. Two patterns of at most 15 at once, times at most
    // 16: neither product reaches into the other's byte.
    Bytes multiply(U pattern, int64_t c) const {
        const Halves product = bits<Halves>(pattern) * bits<Halves>(load<U>(by + c));
        return bits<Bytes>(product) - bits<Bytes>(load<U>(less + c));
    }

    const CodedWeight& w;
    const int64_t panel;
    int64_t end = 0;
    alignas(64) float in_one[kPanel];
    alignas(64) uint32_t by[kPanel];
    alignas(64) uint32_t less[kPanel];
};

// Codes of the k from k0 (a multiple of 8) to k1 times their multiples: quads of int8.
template <class Isa, int Bits>
FXQUANT_TILE void multiply_patterns(Multiples<Isa>& multiples, int64_t k0, int64_t k1, uint8_t* tile) {
    using U = typename Isa::U;
    constexpr int kStep = Isa::kWidth;  // features
    const CodedWeight& w = multiples.w;
    const PanelLayout layout = layout_of(w);
    const bool full = layout.is_full(multiples.panel);
    if (Bits == 8 && !full) spread_panel<Isa>(w, multiples.panel, k0, k1, tile);
    const uint8_t* block = w.packed + layout.offset(multiples.panel) + k0 / kBlock * Bits * kPanel;
    for (int64_t k = k0; k < k1; k += kBlock, block += Bits * kPanel, tile += kBlock * kPanel) {
        FXQUANT_UNROLL for (int row = 0; full && row < Bits; ++row) __builtin_prefetch(block + kFetchAhead + row * kPanel);
        FXQUANT_UNROLL_WIDE for (int q = 0; q < 2; ++q) {
            multiples.enter(k + q * kQuad);
            FXQUANT_UNROLL_WIDE for (int c = 0; c < kPanel; c += kStep) {
                uint8_t* to = tile + (q * kPanel + c) * kQuad;
                U pattern;
                if constexpr (Bits == 8) {
                    pattern = load<U>(to);
                } else {
                    pattern = patterns<U, Bits>(block, 4 * q + c / 16, c % 16 * kQuad);
                }
                store(to, multiples.multiply(pattern, c));
            }
        }
    }
}

// Those of a full panel of int8 where they lie, all others piece by piece.
template <class Isa>
struct PanelQuads {
    PanelQuads(const Weight& w, int64_t panel) : depth(quads(w.in_features)), coded(w.coded), panel(panel) {
        if (coded != nullptr) return;
        const PanelLayout layout = int8_layout(w.out_features, w.in_features);
        packed = w.packed + layout.offset(panel);
        full = layout.is_full(panel);
        rows = {reinterpret_cast<const uint8_t*>(packed), layout.row_bytes, layout.features(panel), w.in_features};
    }

    // The quads from q on: all of them, or kSpread of them, for which q is a multiple of that.
    const int8_t* at(int64_t q) {
        if (full) return packed + q * kPanel * kQuad;
        const int64_t k = q * kQuad, end = k + kSpread * kQuad;
        if (coded != nullptr) {
            Multiples<Isa> multiples(*coded, panel);
            const int64_t k1 = end < coded->in_features ? end : coded->in_features;
            with_bits(held_bits(*coded, panel), [&](auto bits) { multiply_patterns<Isa, bits()>(multiples, k, k1, tile); });
        } else {
            spread_rows<Isa, 8>(rows, k, end < rows.in_features ? end : rows.in_features, 0, tile);
        }
        return reinterpret_cast<const int8_t*>(tile);
    }

    static constexpr int64_t kSpread = 64;  // 16 KiB stay in L1
    const int64_t depth;
    const CodedWeight* coded;  // in steps; or null
    const int64_t panel;
    const int8_t* packed = nullptr;
    bool full = false;
    CompactRows rows = {};
    alignas(64) uint8_t tile[kSpread * kQuad * kPanel];
};
