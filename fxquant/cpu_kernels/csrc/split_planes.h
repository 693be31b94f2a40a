// Blocks of patterns, [8 vectors, 64 bytes], into planes and back (fxquant/numerics/panels.py). Included inside an anonymous
// namespace: every file gets its own copy.

constexpr int64_t kBlockCodes = kPanel * kBlock;

// One block of patterns, in the order of its vectors, into planes, widest first.
template <int Bits>
void split_planes(const uint8_t* patterns, uint8_t* to) {
    int shift = 0;
    for (int width = 8; width >= 1; width /= 2) {
        if (!(Bits & width)) continue;
        for (int row = 0; row < width; ++row, to += kPanel) {
            uint8_t held[kPanel] = {};
            for (int slot = 0; slot < 8 / width; ++slot) {
                const uint8_t* vector = patterns + (slot * width + row) * kPanel;
                for (int64_t i = 0; i < kPanel; ++i) held[i] |= (vector[i] >> shift & ((1 << width) - 1)) << (width * slot);
            }
            std::memcpy(to, held, kPanel);
        }
        shift += width;
    }
}

// The inverse.
template <int Bits>
void join_planes(const uint8_t* from, uint8_t* patterns) {
    std::memset(patterns, 0, kBlockCodes);
    int shift = 0;
    for (int width = 8; width >= 1; width /= 2) {
        if (!(Bits & width)) continue;
        for (int row = 0; row < width; ++row, from += kPanel) {
            for (int slot = 0; slot < 8 / width; ++slot) {
                uint8_t* vector = patterns + (slot * width + row) * kPanel;
                for (int64_t i = 0; i < kPanel; ++i) vector[i] |= (from[i] >> (width * slot) & ((1 << width) - 1)) << shift;
            }
        }
        shift += width;
    }
}
