// Per-token symmetric int8: one scale per row. Bit-equal to fxquant.numerics, on every instruction set.
// Included into each isa_*.cpp inside an anonymous namespace, after vectors.h.

struct RowScale {
    float scale;   // what a code is worth
    float factor;  // 127 / amax, rounded once in float32; 0 where all codes are 0
};

inline RowScale row_scale(uint32_t amax_bits) {
    constexpr uint32_t kInfinity = 0x7f800000u;
    constexpr uint32_t kSmallest = (127u - 119u) << 23;  // 2^-119: below it 127 / amax would overflow
    if (amax_bits >= kInfinity) return {__builtin_nanf(""), 0.0f};
    if (amax_bits < kSmallest) return {0.0f, 0.0f};
    const float amax = bits<float>(amax_bits);
    return {amax / 127.0f, 127.0f / amax};
}

// Halved until four lanes are left: a group of 32 values must not cost more for its end than for itself.
template <class I, int W>
inline int32_t largest_lane(I v) {
    if constexpr (W > 4) {
        typedef int32_t Half __attribute__((vector_size(W * 2)));
        Half halves[2];
        std::memcpy(halves, &v, sizeof(v));
        return largest_lane<Half, W / 2>(halves[0] > halves[1] ? halves[0] : halves[1]);
    } else {
        const int32_t a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
        return a > b ? a : b;
    }
}

template <class Isa, Float T>
uint32_t amax_bits(const char* row, int64_t width) {
    // Without the sign, float bits order like integers, and NaN stands above infinity: an integer maximum misses neither.
    using I = typename Isa::I;
    constexpr int W = Isa::kWidth;
    I best = I{};
    int64_t k = 0;
    if constexpr (T == Float::bf16) {  // so do those of bfloat16, which are not widened for it
        using D = typename Isa::D;
        D most = D{};
        for (; k + 2 * W <= width; k += 2 * W) {
            const D v = load<D>(row + k * size_of(T)) & int16_t{0x7fff};
            most = v > most ? v : most;
        }
        const I low = bits<I>(most) << 16, high = bits<I>(most) & 0x7fff0000;
        best = low > high ? low : high;
    }
    for (; k + W <= width; k += W) {
        const I v = bits<I>(load_float<Isa, T>(row + k * size_of(T))) & 0x7fffffff;
        best = v > best ? v : best;
    }
    if (k < width) {
        const I v = bits<I>(load_tail<Isa, T>(row + k * size_of(T), width - k)) & 0x7fffffff;
        best = v > best ? v : best;
    }
    return static_cast<uint32_t>(largest_lane<I, W>(best));
}

// rint(v), half to even, for |v| < 2^22: the sum's last bits are the integer.
template <class Isa>
inline typename Isa::I nearest_integers(typename Isa::F v) {
    constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
    return bits<typename Isa::I>(v + kMagic) - 0x4b400000;
}

// Codes of values whose largest gave the factor, each plus Offset, as what they are kept in. No clamp is needed: amax * (127 /
// amax) is at most 127 (1 + u)^2, which rounds to 127. Two roundings: the files are built with -ffp-contract=off.
template <class Isa, class CodeVector, int Offset>
inline CodeVector narrow_codes(typename Isa::F x, float factor) {
    using I = typename Isa::I;
    static_assert(Offset % 2 == 0, "an odd one would turn ties the other way");
    constexpr float kMagic = 12582912.0f + Offset;  // see nearest_integers
    const auto last = bits<I>(x * factor + kMagic);  // its last bits are the code
    if constexpr (Isa::kTakesBytes && sizeof(CodeVector) == Isa::kWidth) return Isa::template last_bytes<CodeVector>(last);
    return __builtin_convertvector(last - 0x4b400000, CodeVector);  // as it stands, GCC 12 would convert it lane by lane
}

// Codes of any values: what is beyond the range saturates; NaN too, to some code.
template <class Isa>
inline typename Isa::I saturated_codes(typename Isa::F x, float factor) {
    using F = typename Isa::F;
    const F v = x * factor, top = F{} + 127.0f, bottom = F{} - 127.0f;
    const F below = v < top ? v : top;
    return nearest_integers<Isa>(below > bottom ? below : bottom);
}

// One row of T into codes: code_of(vector of values). Padded: whole vectors may be written past the row's end.
template <class Isa, Float T, class CodeVector, bool Padded, class CodeOf>
inline void store_codes(const char* row, int64_t width, char* codes, CodeOf code_of) {
    constexpr int W = Isa::kWidth;
    constexpr int64_t kCode = sizeof(CodeVector) / W;
    int64_t k = 0;
    for (; k + W <= width; k += W) {
        store(codes + k * kCode, CodeVector(code_of(load_float<Isa, T>(row + k * size_of(T)))));
    }
    if (k < width) {
        const CodeVector narrow = code_of(load_tail<Isa, T>(row + k * size_of(T), width - k));
        std::memcpy(codes + k * kCode, &narrow, Padded ? sizeof(narrow) : (width - k) * kCode);
    }
}

// One row of T into codes by its own range. Returns what a code is worth.
template <class Isa, Float T, class CodeVector, int Offset, bool Padded>
float quantize_row(const char* row, int64_t width, char* codes) {
    using I = typename Isa::I;
    constexpr int W = Isa::kWidth;
    constexpr int64_t kCode = sizeof(CodeVector) / W;
    const RowScale s = row_scale(amax_bits<Isa, T>(row, width));
    if (s.factor == 0.0f) {  // not by multiplication: NaN * 0 and inf * 0 have no code
        const CodeVector zero = __builtin_convertvector(I{} + Offset, CodeVector);
        for (int64_t k = 0; k < width; k += W) {
            std::memcpy(codes + k * kCode, &zero, Padded || k + W <= width ? sizeof(zero) : (width - k) * kCode);
        }
        return s.scale;
    }
    store_codes<Isa, T, CodeVector, Padded>(row, width, codes,
                                            [&](typename Isa::F v) { return narrow_codes<Isa, CodeVector, Offset>(v, s.factor); });
    return s.scale;
}

// One row of T into staged codes by a factor that is given. Returns the bits of the largest absolute value, which say whether
// all are finite.
template <class Isa, Float T>
uint32_t quantize_row_by(const char* row, int64_t width, float factor, char* codes) {
    using I = typename Isa::I;
    I best = I{};
    store_codes<Isa, T, typename Isa::CodeVector, true>(row, width, codes, [&](typename Isa::F v) {
        const I magnitude = bits<I>(v) & 0x7fffffff;
        best = magnitude > best ? magnitude : best;
        return __builtin_convertvector(saturated_codes<Isa>(v, factor) + Isa::kCodeOffset, typename Isa::CodeVector);
    });
    return static_cast<uint32_t>(largest_lane<I, Isa::kWidth>(best));
}

template <class Isa, class CodeVector, int Offset, bool Padded>
void quantize_rows(const Rows& x, int64_t row0, int64_t row1, char* codes, int64_t stride, float* scale) {
    for (int64_t r = row0; r < row1; ++r) {
        const char* row = static_cast<const char*>(x.data) + r * x.stride * size_of(x.type);
        char* to = codes + r * stride;
        switch (x.type) {
            case Float::f32:
                scale[r] = quantize_row<Isa, Float::f32, CodeVector, Offset, Padded>(row, x.width, to);
                break;
            case Float::bf16:
                scale[r] = quantize_row<Isa, Float::bf16, CodeVector, Offset, Padded>(row, x.width, to);
                break;
            case Float::f16:
                scale[r] = quantize_row<Isa, Float::f16, CodeVector, Offset, Padded>(row, x.width, to);
                break;
        }
    }
}

template <class Isa>
void quantize(const Rows& x, int64_t row0, int64_t row1, int8_t* codes, float* scale) {
    quantize_rows<Isa, typename Isa::B, 0, false>(x, row0, row1, reinterpret_cast<char*>(codes), x.width, scale);
}

template <class Isa>
void quantize_staged(const Rows& x, int64_t row0, int64_t row1, void* staged, int64_t stride, float* scale) {
    quantize_rows<Isa, typename Isa::CodeVector, Isa::kCodeOffset, true>(x, row0, row1, static_cast<char*>(staged), stride,
                                                                         scale);
}

// A row that holds NaN or infinity gets scale NaN.
template <class Isa>
void quantize_static(const Rows& x, int64_t row0, int64_t row1, Scaling by, void* staged, int64_t stride, float* scale) {
    for (int64_t r = row0; r < row1; ++r) {
        const char* row = static_cast<const char*>(x.data) + r * x.stride * size_of(x.type);
        char* to = static_cast<char*>(staged) + r * stride;
        const uint32_t largest = x.type == Float::f32    ? quantize_row_by<Isa, Float::f32>(row, x.width, by.factor, to)
                                 : x.type == Float::bf16 ? quantize_row_by<Isa, Float::bf16>(row, x.width, by.factor, to)
                                                         : quantize_row_by<Isa, Float::f16>(row, x.width, by.factor, to);
        scale[r] = finite_or_nan(by.scale, largest);
    }
}

// int8 codes [rows, width], contiguous, into the form that the product reads.
template <class Isa>
void stage(const int8_t* codes, int64_t width, int64_t row0, int64_t row1, void* staged, int64_t stride) {
    for (int64_t r = row0; r < row1; ++r) {
        const int8_t* row = codes + r * width;
        auto* to = reinterpret_cast<typename Isa::Code*>(static_cast<char*>(staged) + r * stride);
        for (int64_t k = 0; k < width; ++k) to[k] = static_cast<typename Isa::Code>(row[k] + Isa::kCodeOffset);
        for (int64_t k = width; k < quads(width) * kQuad; ++k) to[k] = 0;
    }
}

template <class Isa, Float T>
void widen_row(const char* row, int64_t width, float* wide) {
    constexpr int W = Isa::kWidth;
    int64_t k = 0;
    for (; k + W <= width; k += W) store(wide + k, load_float<Isa, T>(row + k * size_of(T)));
    if (k < width) store(wide + k, load_tail<Isa, T>(row + k * size_of(T), width - k));
}

// Rows of any float type into float32 rows, zero up to the next whole vector.
template <class Isa>
void widen(const Rows& x, int64_t row0, int64_t row1, float* wide, int64_t stride) {
    for (int64_t r = row0; r < row1; ++r) {
        const char* row = static_cast<const char*>(x.data) + r * x.stride * size_of(x.type);
        float* to = wide + r * stride;
        switch (x.type) {
            case Float::f32: widen_row<Isa, Float::f32>(row, x.width, to); break;
            case Float::bf16: widen_row<Isa, Float::bf16>(row, x.width, to); break;
            case Float::f16: widen_row<Isa, Float::f16>(row, x.width, to); break;
        }
    }
}
