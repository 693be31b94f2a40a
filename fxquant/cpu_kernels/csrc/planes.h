// Patterns of codes out of the planes that hold their bits, and what patterns are worth. The layout is that of kernels.h and
// fxquant/numerics/panels.py. Included into each isa_*.cpp inside an anonymous namespace, after vectors.h.

#if defined(__AVX512F__)
#define FXQUANT_UNROLL_WIDE FXQUANT_UNROLL  // every shift count a constant; narrower vectors would make long code of it
#else
#define FXQUANT_UNROLL_WIDE
#endif

// How far ahead of the codes being read the next ones are fetched, in bytes.
constexpr int64_t kFetchAhead = 4096;

// The same of each of two streams of int8 codes.
constexpr int64_t kStreamAhead = 1024;

// The bits of one plane that belong to `vector`, moved to bit `Shift` of each byte.
template <class U, int Width, int Shift>
inline U plane_bits(const uint8_t* plane, int vector, int64_t at) {
    constexpr uint32_t kMask = 0x01010101u * ((1u << Width) - 1u);
    const U held = load<U>(plane + vector % Width * kPanel + at) >> (Width * (vector / Width));
    return (held & kMask) << Shift;
}

// Patterns of `vector` (0 to 7) of one block, from byte `at` of its 64 on: lane c holds feature c's four k.
template <class U, int Bits>
inline U patterns(const uint8_t* block, int vector, int64_t at) {
    static_assert(2 <= Bits && Bits <= 8, "formats have 2 to 8 bits");
    if constexpr (Bits == 8) return load<U>(block + vector * kPanel + at);
    U codes = U{};
    if constexpr (Bits & 4) codes |= plane_bits<U, 4, 0>(block, vector, at);
    if constexpr (Bits & 2) codes |= plane_bits<U, 2, Bits & 4>(block + (Bits & 4) * kPanel, vector, at);
    if constexpr (Bits & 1) codes |= plane_bits<U, 1, Bits & 6>(block + (Bits & 6) * kPanel, vector, at);
    return codes;
}

// Values of patterns where no instruction looks up 32 of them at once: integers are converted, others read from a table.
template <class Isa, int Bits>
struct PlainLookup {
    using F = typename Isa::F;
    using I = typename Isa::I;
    using U = typename Isa::U;

    explicit PlainLookup(const CodedWeight& w) : integer(w.integer), offset(w.offset), values_of(w.values) {}

    // value[i]: that of byte i of each lane.
    void values(U codes, F* value) const {
        if (integer) {
            FXQUANT_UNROLL for (int i = 0; i < 4; ++i)
                value[i] = __builtin_convertvector(bits<I>(codes >> (8 * i) & 0xffu) - offset, F);
            return;
        }
        uint8_t code[Isa::kWidth * 4];
        float found[4][Isa::kWidth];
        store(code, codes);
        for (int i = 0; i < 4; ++i) {
            for (int lane = 0; lane < Isa::kWidth; ++lane) found[i][lane] = bits<float>(uint32_t{values_of[code[lane * 4 + i]]} << 16);
            value[i] = load<F>(found[i]);
        }
    }

    bool integer;
    int32_t offset;
    const uint16_t* values_of;
};

// The pattern at bit P of each lane as it stands, in the middle of a float's mantissa: 2^(23 - P) + pattern.
template <class Isa, int P>
FXQUANT_INLINE typename Isa::F in_mantissa(typename Isa::U held) {
    return bits<typename Isa::F>(Isa::merge(held, 15u << P, static_cast<uint32_t>(150 - P) << 23));
}

// Patterns of 4 bits less 8 where no instruction looks up whole vectors of them.
template <class Isa>
struct PlainNibbles {
    using F = typename Isa::F;
    using U = typename Isa::U;

    // That of the k-th of 8 k. held: a vector of a block.
    template <int k>
    F value(U held) const {
        constexpr int P = k == 2 || k == 7 ? 16 : k == 3 || k == 4 || k == 5 ? 12 : 8;
        constexpr int kUp = P - 4 * (k % 4 * 2 + k / 4);  // from where it stands
        const U moved = kUp > 0 ? held << 8 : kUp < 0 ? held >> 12 : held;
        static_assert(kUp == 8 || kUp == 0 || kUp == -12, "three vectors serve all k");
        return in_mantissa<Isa, P>(moved) - static_cast<float>((1 << (23 - P)) + 8);
    }
};

// W bytes, widened.
template <class Isa>
inline typename Isa::U load_bytes(const void* from) {
    typedef uint8_t Bytes __attribute__((vector_size(Isa::kWidth)));
    Bytes bytes;  // not load<Bytes>(): a template argument would lose the attribute
    std::memcpy(&bytes, from, sizeof(bytes));
    return __builtin_convertvector(bytes, typename Isa::U);
}

// e4m3fn with sign; subnormals by conversion, so that a thread that flushes denormals gets them too.
template <class Isa>
inline typename Isa::F e4m3_values(typename Isa::U code) {
    using F = typename Isa::F;
    using I = typename Isa::I;
    using U = typename Isa::U;
    const U magnitude = code & 0x7fu, sign = (code & 0x80u) << 24;
    const U normal = (magnitude << 20) + (120u << 23);
    const U subnormal = bits<U>(__builtin_convertvector(bits<I>(magnitude), F) * 0x1p-9f);
    const U finite = magnitude < 8u ? subnormal : normal;
    const U value = magnitude == 0x7fu ? U{} + 0x7fc00000u : finite;
    return bits<F>(value | sign);
}

template <class Isa>
inline typename Isa::F e8m0_values(typename Isa::U code) {
    using U = typename Isa::U;
    const U usual = code == 0u ? U{} + 0x00400000u : code << 23;  // 2^-127 is a subnormal float
    return bits<typename Isa::F>(code == 0xffu ? U{} + 0x7fc00000u : usual);
}

// 64 numbers that stand next to each other, from number `first` on.
template <class Isa>
inline void read_numbers(const void* data, Stored type, int64_t first, float* to) {
    constexpr int W = Isa::kWidth;
    const auto* bytes = static_cast<const uint8_t*>(data) + first;
    for (int64_t c = 0; c < kPanel; c += W) {
        switch (type) {
            case Stored::f32: store(to + c, load_float<Isa, Float::f32>(static_cast<const float*>(data) + first + c)); break;
            case Stored::bf16: store(to + c, load_float<Isa, Float::bf16>(static_cast<const uint16_t*>(data) + first + c)); break;
            case Stored::e8m0: store(to + c, e8m0_values<Isa>(load_bytes<Isa>(bytes + c))); break;
            case Stored::e4m3: store(to + c, e4m3_values<Isa>(load_bytes<Isa>(bytes + c))); break;
            case Stored::u8:
                store(to + c, __builtin_convertvector(bits<typename Isa::I>(load_bytes<Isa>(bytes + c)), typename Isa::F));
                break;
        }
    }
}

// Those of one granule for the features from `first` on, `count` of them: a copy, which a vector may be read from.
template <class Number>
inline void copy_numbers(const CodedWeight& w, const Granules& from, int64_t granule, int64_t first, int64_t count, char* to) {
    const auto* numbers = static_cast<const Number*>(from.data);
    if (from.rows == 0) {
        std::memcpy(to, numbers + first * w.granules + granule * count, count * static_cast<int64_t>(sizeof(Number)));
        return;
    }
    for (int64_t c = 0; c < count;) {
        const int64_t row = (first + c) / from.rows, end = (row + 1) * from.rows - first;
        const Number number = numbers[row * w.granules + granule];
        for (; c < count && c < end; ++c) store(to + c * static_cast<int64_t>(sizeof(Number)), number);
    }
}

template <class Isa>
FXQUANT_TILE void read_copied(const CodedWeight& w, const Granules& from, int64_t granule, int64_t first, int64_t count, float* to) {
    alignas(64) char copy[kPanel * sizeof(float)] = {};
    switch (from.type) {
        case Stored::f32: copy_numbers<uint32_t>(w, from, granule, first, count, copy); break;
        case Stored::bf16: copy_numbers<uint16_t>(w, from, granule, first, count, copy); break;
        default: copy_numbers<uint8_t>(w, from, granule, first, count, copy);
    }
    read_numbers<Isa>(copy, from.type, 0, to);
}

// The numbers of one granule for the 64 features of a panel. Where there is no feature: of code 0.
template <class Isa>
inline void read_granule(const CodedWeight& w, const Granules& from, int64_t panel, int64_t granule, float* to) {
    const int64_t first = panel * kPanel, left = w.out_features - first;
    if (from.rows == 0 && left >= kPanel) {
        return read_numbers<Isa>(from.data, from.type, first * w.granules + granule * kPanel, to);
    }
    read_copied<Isa>(w, from, granule, first, left < kPanel ? left : kPanel, to);
}

// Fetches the numbers of a later granule, or of the next panel's: they come too seldom for the hardware to do it.
inline void fetch_granule(const CodedWeight& w, const Granules& from, int64_t panel, int64_t granule) {
    constexpr int64_t kGranulesAhead = 6;
    if (from.rows != 0) return;
    const int64_t size = from.type == Stored::f32 ? 4 : from.type == Stored::bf16 ? 2 : 1;
    const auto* at = static_cast<const char*>(from.data) + (panel * w.granules + granule + kGranulesAhead) * kPanel * size;
    for (int64_t line = 0; line < kPanel * size; line += 64) {
        __builtin_prefetch(at + line);
        asm volatile("");  // GCC 12 drops a loop that does nothing else
    }
}

// The granule that k lies in, as floats for the 64 features of a panel.
template <class Isa>
struct Granule {
    Granule(const CodedWeight& weight, int64_t panel) : w(weight), panel(panel) {}

    void enter(int64_t k) {
        if (begin <= k && k < end) return;
        const int64_t index = k / w.granule < w.granules ? k / w.granule : w.granules - 1;  // padding belongs to the last one
        begin = index * w.granule;
        end = index + 1 < w.granules ? begin + w.granule : INT64_MAX;
        read_granule<Isa>(w, w.scale, panel, index, scale);
        if (w.scheme != Scheme::symmetric) read_granule<Isa>(w, w.zero, panel, index, zero);
    }

    const CodedWeight& w;
    const int64_t panel;
    int64_t begin = 0, end = 0;
    alignas(64) float scale[kPanel];
    alignas(64) float zero[kPanel];
};

// Values of W features and four k, scaled: those of k `first` to `last` - 1 into their rows of the tile.
template <class Isa, int Bits, Scheme S>
inline void decode_quad(const typename Isa::template Lookup<Bits>& lookup, const Granule<Isa>& granule, const uint8_t* block,
                        int vector, int64_t c, int first, int last, float* rows) {
    using F = typename Isa::F;
    F value[4];
    lookup.values(patterns<typename Isa::U, Bits>(block, vector, c % 16 * 4), value);
    FXQUANT_UNROLL for (int i = 0; i < 4; ++i) {
        if (i < first || i >= last) continue;
        if constexpr (S == Scheme::affine) value[i] = value[i] - load<F>(granule.zero + c);
        value[i] = value[i] * load<F>(granule.scale + c);
        if constexpr (S == Scheme::shift) value[i] = value[i] + load<F>(granule.zero + c);
        store(rows + i * kPanel + c, value[i]);
    }
}

// The same for a quad that reaches from one granule into the next.
template <class Isa, int Bits, Scheme S>
FXQUANT_TILE void decode_across(const typename Isa::template Lookup<Bits>& lookup, Granule<Isa>& granule, const uint8_t* block,
                                int64_t k, float* rows) {
    for (int i = 0; i < 4; ++i) {
        granule.enter(k + i);
        for (int64_t c = 0; c < kPanel; c += Isa::kWidth) {
            decode_quad<Isa, Bits, S>(lookup, granule, block, static_cast<int>(k % kBlock + c / 16), c, i, i + 1, rows);
        }
    }
}

// Values of the k from k0 (a multiple of 8, where `block` is) to k1, up to whole blocks: tile [k1 - k0, 64]. Bit-equal to
// numerics.decode.
template <class Isa, int Bits, Scheme S>
FXQUANT_TILE void decode_tile_of(const typename Isa::template Lookup<Bits>& table, Granule<Isa>& granule, const uint8_t* block,
                              int64_t k0, int64_t k1, float* tile) {
    constexpr int W = Isa::kWidth;
    const typename Isa::template Lookup<Bits> lookup = table;  // a copy of its own stays in registers
    for (int64_t k = k0; k < k1; k += kBlock, block += Bits * kPanel, tile += kBlock * kPanel) {
        FXQUANT_UNROLL for (int row = 0; row < Bits; ++row) __builtin_prefetch(block + kFetchAhead + row * kPanel);
        FXQUANT_UNROLL_WIDE for (int q = 0; q < 2; ++q) {
            float* rows = tile + q * kQuad * kPanel;
            granule.enter(k + q * kQuad);
            if (k + (q + 1) * kQuad > granule.end) {
                decode_across<Isa, Bits, S>(lookup, granule, block, k + q * kQuad, rows);
                continue;
            }
            FXQUANT_UNROLL_WIDE for (int c = 0; c < kPanel; c += W) {
                decode_quad<Isa, Bits, S>(lookup, granule, block, 4 * q + c / 16, c, 0, 4, rows);
            }
        }
    }
}

template <class Isa, int Bits>
inline void decode_tile(const typename Isa::template Lookup<Bits>& lookup, Granule<Isa>& granule, const uint8_t* block, int64_t k0,
                        int64_t k1, float* tile) {
    switch (granule.w.scheme) {
        case Scheme::symmetric: return decode_tile_of<Isa, Bits, Scheme::symmetric>(lookup, granule, block, k0, k1, tile);
        case Scheme::affine: return decode_tile_of<Isa, Bits, Scheme::affine>(lookup, granule, block, k0, k1, tile);
        case Scheme::shift: return decode_tile_of<Isa, Bits, Scheme::shift>(lookup, granule, block, k0, k1, tile);
    }
}
