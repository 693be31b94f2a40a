// Rows of floats in fixed point, by the range of each: x = 2^e * v, v an integer of at most 2^22, so that 2^e <= 2^-21 * amax. v is
// written as balanced digits, rows of codes that the products of int8 multiply: sums of v * code are exact, in any order.
// Rounding x to 2^e is the one error: at most 2^-22 of the row's largest value, and none to bfloat16 down to 2^-13 of it.
// Included into each isa_*.cpp inside an anonymous namespace, after quantize.h.

// What a row is multiplied by to become integers, and what one of them is worth. Both are powers of two. Factor 0: the row holds
// infinity, which counts as 1 then and all else as 0; or NaN, which the scale is.
inline Scaling fixed_point(uint32_t amax_bits) {
    constexpr uint32_t kInfinity = 0x7f800000u, kBitsBelow = 21, kBiasTwice = 254;
    if (amax_bits >= kInfinity) return {amax_bits > kInfinity ? __builtin_nanf("") : bits<float>(kInfinity), 0.0f};
    const uint32_t exponent = amax_bits >> 23;
    const uint32_t of_scale = exponent > kBitsBelow ? exponent - kBitsBelow : 1;  // no subnormal
    return {bits<float>(of_scale << 23), bits<float>((kBiasTwice - of_scale) << 23)};
}

// The digits of W integers, each plus Offset, `stride` bytes apart.
template <class Isa, int Offset>
inline void store_digits(typename Isa::I v, char* codes, int64_t stride) {
    using I = typename Isa::I;
    static_assert(kDigits == 3 && kDigitBits == 8 && sizeof(typename Isa::Code) == 1, "bytes of a lane");
    const auto raised = bits<typename Isa::U>(v) + 0x808080u;  // its bytes are the digits, each plus 128
    FXQUANT_UNROLL for (int i = 0; i < kDigits; ++i) {
        const I digit = bits<I>(raised >> (kDigitBits * i) & 0xffu) + (Offset - 128);
        if constexpr (Isa::kTakesBytes) {
            store(codes + i * stride, Isa::template last_bytes<typename Isa::B>(digit));
        } else {
            store(codes + i * stride, __builtin_convertvector(digit, typename Isa::B));
        }
    }
}

// One row of T. Returns what an integer is worth. Whole vectors may be written past the row's end.
template <class Isa, int Offset, Float T>
float fixed_row(const char* row, int64_t width, char* codes, int64_t stride) {
    using I = typename Isa::I;
    constexpr int W = Isa::kWidth;
    const Scaling s = fixed_point(amax_bits<Isa, T>(row, width));
    const auto put = [&](int64_t k, typename Isa::F x) {
        const I positive = bits<I>(x) == 0x7f800000, negative = bits<I>(x) == static_cast<int32_t>(0xff800000u);  // -1: it is
        const I v = s.factor == 0.0f ? negative - positive : nearest_integers<Isa>(x * s.factor);
        store_digits<Isa, Offset>(v, codes + k, stride);
    };
    int64_t k = 0;
    for (; k + W <= width; k += W) put(k, load_float<Isa, T>(row + k * size_of(T)));
    if (k < width) put(k, load_tail<Isa, T>(row + k * size_of(T), width - k));
    return s.scale;
}

// Rows row0 <= r < row1, kDigits rows of codes each.
template <class Isa, int Offset>
void fixed_rows(const Rows& x, int64_t row0, int64_t row1, char* codes, int64_t stride, float* scale) {
    for (int64_t r = row0; r < row1; ++r) {
        const char* row = static_cast<const char*>(x.data) + r * x.stride * size_of(x.type);
        char* to = codes + r * kDigits * stride;
        switch (x.type) {
            case Float::f32: scale[r] = fixed_row<Isa, Offset, Float::f32>(row, x.width, to, stride); break;
            case Float::bf16: scale[r] = fixed_row<Isa, Offset, Float::bf16>(row, x.width, to, stride); break;
            case Float::f16: scale[r] = fixed_row<Isa, Offset, Float::f16>(row, x.width, to, stride); break;
        }
    }
}

template <class Isa>
void quantize_digits(const Rows& x, int64_t row0, int64_t row1, void* staged, int64_t stride, float* scale) {
    fixed_rows<Isa, Isa::kCodeOffset>(x, row0, row1, static_cast<char*>(staged), stride, scale);
}
