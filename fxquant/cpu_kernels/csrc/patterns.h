// Patterns of the codes of one panel as whole bytes, in quads, whatever the panel keeps them in. Included into each isa_*.cpp inside
// an anonymous namespace, after spread.h and planes.h.

// body(integral constant of `bits`): the width of the codes, known at compile time.
template <class Body, int Bits = 8>
inline void with_bits(int64_t bits, Body body) {
    if (bits == Bits) return body(std::integral_constant<int, Bits>());
    if constexpr (Bits > 2) with_bits<Body, Bits - 1>(bits, body);
}

inline PanelLayout layout_of(const CodedWeight& w) { return plane_layout(w.out_features, w.in_features, w.bits); }

// The steps of the 64 features of a panel; 0 where there is none.
inline void read_steps(const CodedWeight& w, int64_t panel, float* to) {
    const uint16_t* from = w.steps + panel * kPanel;
    const int64_t count = layout_of(w).features(panel);
    alignas(64) uint16_t copy[kPanel] = {};
    if (count < kPanel) {
        std::memcpy(copy, from, count * static_cast<int64_t>(sizeof(uint16_t)));
        from = copy;
    }
    for (int64_t c = 0; c < kPanel; ++c) to[c] = bits<float>(uint32_t{from[c]} << 16);
}

// Bits of a code where the products read it: those of a compact panel are spread into whole bytes.
inline int64_t held_bits(const CodedWeight& w, int64_t panel) { return layout_of(w).is_full(panel) ? w.bits : 8; }

// Spreads the codes of k0 <= k < k1, k0 a multiple of 16, of a compact panel: the blocks that planes of 8 bits would have.
template <class Isa>
inline void spread_panel(const CodedWeight& w, int64_t panel, int64_t k0, int64_t k1, uint8_t* to) {
    const PanelLayout layout = layout_of(w);
    const CompactRows rows = {w.packed + layout.offset(panel), layout.row_bytes, layout.features(panel), w.in_features};
    with_bits(w.bits, [&](auto bits) { spread_rows<Isa, bits()>(rows, k0, k1, static_cast<uint8_t>(w.offset), to); });
}

// Patterns of the k from k0 (a multiple of 8) to k1 in quads [k / 4, 64, 4], as the dot products read them.
template <class Isa, int Bits>
void spread_patterns(const CodedWeight& w, int64_t panel, int64_t k0, int64_t k1, uint8_t* tile) {
    using U = typename Isa::U;
    const PanelLayout layout = layout_of(w);
    if constexpr (Bits == 8) {
        if (!layout.is_full(panel)) return spread_panel<Isa>(w, panel, k0, k1, tile);
    }
    const uint8_t* block = w.packed + layout.offset(panel) + k0 / kBlock * Bits * kPanel;
    for (int64_t k = k0; k < k1; k += kBlock, block += Bits * kPanel, tile += kBlock * kPanel) {
        FXQUANT_UNROLL for (int row = 0; row < Bits; ++row) __builtin_prefetch(block + kFetchAhead + row * kPanel);
        FXQUANT_UNROLL_WIDE for (int vector = 0; vector < 8; ++vector) {
            for (int64_t at = 0; at < kPanel; at += sizeof(U)) {
                store(tile + vector * kPanel + at, patterns<U, Bits>(block, vector, at));
            }
        }
    }
}
