// The codes of a compact panel, moved apart and interleaved as those of a full panel stand in whole bytes: quads of k, 64
// features. Included into each isa_*.cpp inside an anonymous namespace, after turn.h and apart.h.

// Rows of codes: row c, of feature c, begins at codes + c * row_bytes.
struct CompactRows {
    const uint8_t* codes;
    int64_t row_bytes;
    int64_t features;
    int64_t in_features;
};

// How far ahead in its row the next codes are fetched, in bytes: there are more rows than the hardware keeps track of.
constexpr int64_t kRowFetch = 192;

using Bytes16 = Lane16<uint8_t>::V;

// Sixteen codes of a row, a byte each, from `at` on, where they take 2 * Bits bytes. kReads<Bits> bytes are read.
template <int Bits>
constexpr int64_t kReads = Bits == 8 ? 16 : Bits == 4 ? 8 : Bits == 2 ? 4 : Bits + 8;

template <int Bits>
inline Bytes16 sixteen(const uint8_t* at) {
    typedef uint64_t Words __attribute__((vector_size(16)));
    if constexpr (Bits == 8) {
        return load<Bytes16>(at);
    } else if constexpr (Bits == 4) {
        const Bytes16 held = bits<Bytes16>(Words{load<uint64_t>(at), 0});
        return low_halves<Bytes16>(held & 15, held >> 4);
    } else if constexpr (Bits == 2) {
        using Pairs = Lane16<uint16_t>::V;
        const Bytes16 held = bits<Bytes16>(Words{load<uint32_t>(at), 0});
        const Bytes16 first = low_halves<Bytes16>(held & 3, held >> 2 & 3), last = low_halves<Bytes16>(held >> 4 & 3, held >> 6);
        return bits<Bytes16>(low_halves(bits<Pairs>(first), bits<Pairs>(last)));
    } else {
        return bits<Bytes16>(Words{apart<Bits>(load<uint64_t>(at)), apart<Bits>(load<uint64_t>(at + Bits))});
    }
}

// The same where fewer bytes may be left than are read.
template <int Bits>
inline Bytes16 last_sixteen(const uint8_t* at, int64_t left) {
    uint8_t copy[16] = {};
    std::memcpy(copy, at, left < 2 * Bits ? left : 2 * Bits);
    return sixteen<Bits>(copy);
}

// Codes of k0 <= k < k1, k0 a multiple of kSpreadK, up to a multiple of it: to [quads][64][4]. `none` stands beyond K, 0 where
// there is no feature.
template <class Isa, int Bits>
FXQUANT_TILE void spread_rows(const CompactRows& rows, int64_t k0, int64_t k1, uint8_t none, uint8_t* to) {
    using Quads = Lane16<uint32_t>::V;
    const uint8_t* end = rows.codes + rows.features * rows.row_bytes;
    for (int64_t k = k0; k < k1; k += kSpreadK, to += kSpreadK * kPanel) {
        Bytes16 keep = ~Bytes16{};
        for (int64_t i = rows.in_features - k; i < kSpreadK; ++i) keep[i] = 0;
        const Bytes16 beyond = none & ~keep;
        const uint8_t* at = rows.codes + k * Bits / 8;
        const auto whole = [&](int64_t i) {
            const uint8_t* row = at + i * rows.row_bytes;
            __builtin_prefetch(row + kRowFetch);
            return bits<Quads>((sixteen<Bits>(row) & keep) | beyond);
        };
        const auto part = [&](int64_t i) {
            const uint8_t* row = at + i * rows.row_bytes;
            const Bytes16 codes = end - row < kReads<Bits> ? last_sixteen<Bits>(row, end - row) : sixteen<Bits>(row);
            return bits<Quads>((codes & keep) | beyond);
        };
        int64_t c = 0;
        const auto skip = [&](int64_t features) {
            c += features;
            at += features * rows.row_bytes;
        };
        const int64_t reach = (Isa::kTurned - 1) * rows.row_bytes + kReads<Bits>;
        for (; c + Isa::kTurned <= rows.features && reach <= end - at; skip(Isa::kTurned)) Isa::turn_quads(whole, to + c * kQuad);
        for (; c < rows.features; skip(kQuad)) {
            const int64_t left = rows.features - c;
            turn_tile<uint32_t>(part, left < kQuad ? left : kQuad, kSpreadK / kQuad, reinterpret_cast<uint32_t*>(to + c * kQuad), kPanel);
        }
        for (; c < kPanel; c += kQuad) {
            FXQUANT_UNROLL for (int64_t q = 0; q < kSpreadK / kQuad; ++q) store(to + (q * kPanel + c) * kQuad, Bytes16{});
        }
    }
}
