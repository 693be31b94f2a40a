// Codes out of a little-endian stream of bits. Included inside an anonymous namespace: every file gets its own copy.

// Eight codes of `Bits` bits each, one after another in the low bits of `word`, moved apart into a byte each.
template <int Bits>
uint64_t apart(uint64_t word) {
    constexpr uint64_t kFour = (uint64_t{1} << (4 * Bits)) - 1;
    constexpr uint64_t kTwo = ((uint64_t{1} << (2 * Bits)) - 1) * 0x0000000100000001u;
    constexpr uint64_t kOne = ((uint64_t{1} << Bits) - 1) * 0x0001000100010001u;
    word = (word & kFour) | ((word & kFour << (4 * Bits)) << (32 - 4 * Bits));
    word = (word & kTwo) | ((word & kTwo << (2 * Bits)) << (16 - 2 * Bits));
    return (word & kOne) | ((word & kOne << Bits) << (8 - Bits));
}
