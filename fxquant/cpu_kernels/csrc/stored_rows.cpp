// Panels of the rows of a checkpoint, and rows of panels: permutations of the same bits. Codes of 8 and 4 bits are moved as
// words, others by way of a byte each.
#include "stored.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

namespace fxquant {
namespace {
#include "vectors.h"
#include "turn.h"
#include "apart.h"
#include "split_planes.h"
#include "turn_words.h"

constexpr uint64_t kEachByte = 0x0101010101010101u;

// The inverse of apart(): eight bytes, each below 2^Bits, one after another in the low bits.
template <int Bits>
uint64_t together(uint64_t codes) {
    uint64_t word = 0;
    for (int i = 0; i < 8; ++i) word |= (codes >> (8 * i) & 0xff) << (Bits * i);
    return word;
}

// Of the eight codes of a block, those that are below K: their bits, one after another, and a byte each.
template <int Bits>
struct Block {
    explicit Block(int64_t left) : codes(std::min<int64_t>(left, kBlock)), bytes((codes * Bits + 7) / 8) {}

    uint64_t read(const uint8_t* at) const {
        uint64_t word = 0;
        std::memcpy(&word, at, static_cast<size_t>(bytes));
        return word & ~uint64_t{0} >> (64 - codes * Bits);
    }
    void write(uint64_t word, uint8_t* at) const {
        word &= ~uint64_t{0} >> (64 - codes * Bits);
        std::memcpy(at, &word, static_cast<size_t>(bytes));
    }

    int64_t codes;
    int64_t bytes;
};

template <int Bits>
void planes_of_rows(const StoredWeight& w, const uint8_t* rows, uint8_t* to) {
    uint8_t patterns[kBlockCodes];
    for (int64_t k = 0; k < w.in_features; k += kBlock, rows += Bits, to += Bits * kPanel) {
        const Block<Bits> block(w.in_features - k);
        for (int64_t c = 0; c < kPanel; ++c) {
            const uint64_t eight = apart<Bits>(block.read(rows + c * w.row_bytes())) ^ w.flip * kEachByte;
            std::memcpy(patterns + c * kQuad, &eight, kQuad);
            const uint64_t upper = eight >> 32;
            std::memcpy(patterns + kBlockCodes / 2 + c * kQuad, &upper, kQuad);
        }
        split_planes<Bits>(patterns, to);
    }
}

template <int Bits>
void rows_of_planes(const StoredWeight& w, const uint8_t* from, uint8_t* rows) {
    uint8_t patterns[kBlockCodes];
    for (int64_t k = 0; k < w.in_features; k += kBlock, rows += Bits, from += Bits * kPanel) {
        const Block<Bits> block(w.in_features - k);
        join_planes<Bits>(from, patterns);
        for (int64_t c = 0; c < kPanel; ++c) {
            const uint64_t eight = load<uint32_t>(patterns + c * kQuad) |
                                   uint64_t{load<uint32_t>(patterns + kBlockCodes / 2 + c * kQuad)} << 32;
            block.write(together<Bits>(eight ^ w.flip * kEachByte), rows + c * w.row_bytes());
        }
    }
}

// Rows of codes into rows of patterns, and back: of compact panels.
template <int Bits>
void flip_rows(const StoredWeight& w, const uint8_t* from, int64_t count, uint8_t* to) {
    const uint64_t flips = together<Bits>(w.flip * kEachByte);
    for (int64_t c = 0; c < count; ++c, from += w.row_bytes(), to += w.row_bytes()) {
        for (int64_t k = 0; k < w.in_features; k += kBlock) {
            const Block<Bits> block(w.in_features - k);
            block.write(block.read(from + k * Bits / 8) ^ flips, to + k * Bits / 8);
        }
    }
}

// body(integral constant of the bits)
template <class Body>
void with_bits(int64_t bits, Body body) {
    switch (bits) {
        case 2: return body(std::integral_constant<int, 2>());
        case 3: return body(std::integral_constant<int, 3>());
        case 4: return body(std::integral_constant<int, 4>());
        case 5: return body(std::integral_constant<int, 5>());
        case 6: return body(std::integral_constant<int, 6>());
        case 7: return body(std::integral_constant<int, 7>());
        default: return body(std::integral_constant<int, 8>());
    }
}

template <int Bits>
constexpr bool kByWords = Bits == 4 || Bits == 8;

}  // namespace

void panel_of_rows(const StoredWeight& w, const Kernels& kernels, const uint8_t* rows, int64_t panel, bool past, uint8_t* packed) {
    with_bits(w.bits, [&](auto bits) {
        constexpr int kBits = bits();
        if (!w.layout.is_full(panel)) return flip_rows<kBits>(w, rows, w.layout.features(panel), packed);
        if constexpr (!kByWords<kBits>) {
            planes_of_rows<kBits>(w, rows, packed);
        } else {
            const int64_t filled = w.filled_bytes();
            int32_t sums[kPanel] = {};
            turn_to_panel<kBits>(w, kernels, rows, past, w.with_sums() ? sums : nullptr, packed);
            if (w.with_sums()) std::memcpy(packed + filled * kPanel, sums, sizeof(sums));
        }
    });
}

void rows_of_panel(const StoredWeight& w, const uint8_t* packed, int64_t panel, uint8_t* rows) {
    with_bits(w.bits, [&](auto bits) {
        constexpr int kBits = bits();
        if (!w.layout.is_full(panel)) return flip_rows<kBits>(w, packed, w.layout.features(panel), rows);
        if constexpr (kByWords<kBits>) turn_to_rows<kBits>(w, packed, rows);
        else rows_of_planes<kBits>(w, packed, rows);
    });
}

}  // namespace fxquant
