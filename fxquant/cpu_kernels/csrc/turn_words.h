// Full panels of codes of 8 or 4 bits and the rows of a checkpoint: words of 32 bits, which hold four neighbours along K, or
// eight, turned from [64 features, words] to [words, 64 features] and back. Included inside an anonymous namespace, after
// turn.h, where stored.h is known.

using Word4 = Lane16<uint32_t>::V;

constexpr int64_t kStripWords = 16;  // a cache line of a row; the 4 KiB that 64 rows fill with them stay in L1
constexpr int64_t kStripBytes = kStripWords * 4;
constexpr int64_t kManyStrips = 8;
constexpr int64_t kStripAhead = 6 * kStripBytes;  // fetched ahead in each row: there are more rows than the hardware follows

// A word of a panel holds the codes k 0, 4, 1, 5, 2, 6, 3, 7, that of a row 0 to 7.
template <int Shift, class V>
inline V exchange_bits(V words, uint32_t mask) {  // the bits of the mask with those so many places above them
    const V differ = (words >> Shift ^ words) & mask;
    return words ^ differ ^ differ << Shift;
}

template <int Bits, class V>
inline V to_panel(V words, uint32_t flip) {
    if constexpr (Bits == 4) words = exchange_bits<4>(exchange_bits<8>(words, 0x0000ff00u), 0x00f000f0u);
    return words ^ flip;
}

template <int Bits>
inline Word4 to_row(Word4 words, uint32_t flip) {
    if constexpr (Bits == 4) words = exchange_bits<8>(exchange_bits<4>(words, 0x00f000f0u), 0x0000ff00u);
    return words ^ flip;
}

// put(j, the j-th words of line(0) to line(3))
template <class Line, class Put>
inline void turn_four(Line line, Put put) {
    const Word4 a0 = line(0), a1 = line(1), a2 = line(2), a3 = line(3);
    const Word4 b0 = low_halves(a0, a2), b1 = high_halves(a0, a2), b2 = low_halves(a1, a3), b3 = high_halves(a1, a3);
    put(0, low_halves(b0, b2));
    put(1, high_halves(b0, b2));
    put(2, low_halves(b1, b3));
    put(3, high_halves(b1, b3));
}

// kStripWords of each of 64 rows, `stride` bytes apart, into [kStripWords, 64]; those from `count` on are left out.
template <int Bits>
FXQUANT_INLINE void strip_to_panel(const uint8_t* rows, int64_t stride, int64_t ahead, int64_t count, uint32_t flip, uint8_t* to) {
    for (int64_t c = 0; c < kPanel; c += 4, rows += 4 * stride, to += 16) {
        FXQUANT_UNROLL for (int64_t i = 0; i < 4; ++i) __builtin_prefetch(rows + i * stride + ahead);
        FXQUANT_UNROLL for (int64_t v = 0; v < kStripWords / 4; ++v) {
            turn_four([&](int64_t i) { return to_panel<Bits>(load<Word4>(rows + i * stride + v * 16), flip); },
                      [&](int64_t j, Word4 words) {
                          if (v * 4 + j < count) store(to + (v * 4 + j) * kPanel * 4, words);
                      });
        }
    }
}

// The inverse, of `features` from the first of `from` on: 64 bytes of each row are written; words from `count` on are 0.
template <int Bits>
FXQUANT_INLINE void strip_to_rows(const uint8_t* from, int64_t features, int64_t count, uint32_t flip, uint8_t* rows, int64_t stride) {
    for (int64_t c = 0; c < features; c += 4, rows += 4 * stride, from += 16) {
        FXQUANT_UNROLL for (int64_t v = 0; v < kStripWords / 4; ++v) {
            const auto line = [&](int64_t i) {
                return v * 4 + i < count ? to_row<Bits>(load<Word4>(from + (v * 4 + i) * kPanel * 4), flip) : Word4{};
            };
            turn_four(line, [&](int64_t j, Word4 words) { store(rows + j * stride + v * 16, words); });
        }
    }
}

// Adds up the signed bytes of each of 64 features: words [count, 64], count <= kStripWords.
inline void add_bytes(const uint8_t* words, int64_t count, int32_t* sums) {
    constexpr uint32_t kBias = 0x80808080u, kEven = 0x00ff00ffu;
    for (int64_t c = 0; c < kPanel; c += 4) {
        Word4 pairs = {};  // two sums of 16 bits each, of bytes plus 128
        for (int64_t i = 0; i < count; ++i) {
            const Word4 word = load<Word4>(words + (i * kPanel + c) * 4) ^ kBias;
            pairs += (word & kEven) + (word >> 8 & kEven);
        }
        const Word4 sum = (pairs & 0xffffu) + (pairs >> 16) - static_cast<uint32_t>(4 * 128 * count);
        store(sums + c, load<Word4>(sums + c) + sum);
    }
}

// The flip of a whole word.
template <int Bits>
inline uint32_t flips_of(const StoredWeight& w) {
    return (Bits == 4 ? w.flip * 0x11u : w.flip) * 0x01010101u;
}

// sums: of the signed bytes of each feature, added up; or null. kernels: of this CPU. past: the caches, if they can.
template <int Bits>
void turn_to_panel(const StoredWeight& w, const Kernels& kernels, const uint8_t* rows, bool past, int32_t* sums, uint8_t* to) {
    const int64_t row_bytes = w.row_bytes(), filled = w.filled_bytes();
    const auto last = static_cast<uint8_t>(w.in_features * Bits % 8 == 0 ? 0xff : 0x0f);  // the bits of a row's last byte
    int64_t at = 0;
    if (kernels.turn_lines != nullptr && reinterpret_cast<uintptr_t>(to) % kStripBytes == 0) {
        const int64_t lines = (row_bytes - (last != 0xff)) / kStripBytes;
        kernels.turn_lines(rows, row_bytes, lines, Bits, flips_of<Bits>(w), past, to, sums);
        at = lines * kStripBytes;
    }
    for (to += at * kPanel; at < filled; at += kStripBytes, to += kStripBytes * kPanel) {
        const int64_t count = std::min(kStripWords, (filled - at) / 4), left = row_bytes - at;
        if (left > kStripBytes || (left == kStripBytes && last == 0xff)) {
            strip_to_panel<Bits>(rows + at, row_bytes, std::min(kStripAhead, left - 1), kStripWords, flips_of<Bits>(w), to);
        } else {
            uint8_t ends[kPanel * kStripBytes] = {};
            for (int64_t c = 0; c < kPanel && left > 0; ++c) {
                std::memcpy(ends + c * kStripBytes, rows + c * row_bytes + at, static_cast<size_t>(left));
                ends[c * kStripBytes + left - 1] &= last;
            }
            strip_to_panel<Bits>(ends, kStripBytes, 0, count, flips_of<Bits>(w), to);
        }
        if (sums != nullptr) add_bytes(to, count, sums);
    }
}

template <int Bits>
void turn_to_rows(const StoredWeight& w, const uint8_t* from, uint8_t* rows) {
    const int64_t row_bytes = w.row_bytes(), filled = w.filled_bytes();
    int64_t at = 0;
    // Lines of rows so far apart fall into one set of the L1 cache: several of four rows, not one of each.
    for (; row_bytes % 4096 == 0 && at < row_bytes; at += kManyStrips * kStripBytes, from += kManyStrips * kStripBytes * kPanel) {
        for (int64_t c = 0; c < kPanel; c += 4) {
            for (int64_t i = 0; i < kManyStrips; ++i) {
                strip_to_rows<Bits>(from + c * 4 + i * kStripBytes * kPanel, 4, kStripWords, flips_of<Bits>(w),
                                    rows + c * row_bytes + at + i * kStripBytes, row_bytes);
            }
        }
    }
    for (; at < filled; at += kStripBytes, from += kStripBytes * kPanel) {
        const int64_t count = std::min(kStripWords, (filled - at) / 4), left = row_bytes - at;
        if (left >= kStripBytes) {
            strip_to_rows<Bits>(from, kPanel, kStripWords, flips_of<Bits>(w), rows + at, row_bytes);
            continue;
        }
        uint8_t ends[kPanel * kStripBytes];
        strip_to_rows<Bits>(from, kPanel, count, flips_of<Bits>(w), ends, kStripBytes);
        for (int64_t c = 0; c < kPanel && left > 0; ++c)
            std::memcpy(rows + c * row_bytes + at, ends + c * kStripBytes, static_cast<size_t>(left));
    }
}
