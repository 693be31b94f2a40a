// Rows of floats in fixed point, by the range of each: x = 2^e * v, v an integer of at most 2^22, or of 127 * 257 for floats of 16 bits.
// v is written as balanced digits, rows of codes that the products of int8 multiply: sums of v * code are exact, in any order.
// Rounding x to 2^e is the one error: at most 2^-22 of the row's largest value; or 1.004 * 2^-15, and none to bfloat16 down to 2^-7 of it.
// Included into each isa_*.cpp inside an anonymous namespace, after quantize.h.

// What a row is multiplied by to become integers, and what one of them is worth. Both are powers of two. Factor 0: the row holds
// infinity, which counts as 1 then and all else as 0; or NaN, which the scale is.
inline Scaling fixed_point(uint32_t amax_bits, int64_t digits) {
    constexpr uint32_t kInfinity = 0x7f800000u, kBiasTwice = 254;
    if (amax_bits >= kInfinity) return {amax_bits > kInfinity ? __builtin_nanf("") : bits<float>(kInfinity), 0.0f};
    const bool near_two = (amax_bits & 0x7fffffu) > 0x7effffu;  // times a power of two: 255 / 128 and more are beyond two digits
    const uint32_t below = digits == kMostDigits ? 21 : near_two ? 13 : 14, exponent = amax_bits >> 23;
    const uint32_t of_scale = exponent > below ? exponent - below : 1;  // no subnormal
    return {bits<float>(of_scale << 23), bits<float>((kBiasTwice - of_scale) << 23)};
}

// The digits of W integers, each plus Offset, `stride` bytes apart.
template <class Isa, int Offset, int64_t Count>
inline void store_digits(typename Isa::I v, char* codes, int64_t stride) {
    using I = typename Isa::I;
    static_assert(Count <= 3 && kDigitBits == 8 && sizeof(typename Isa::Code) == 1, "bytes of a lane");
    const auto raised = bits<typename Isa::U>(v) + (Count == 2 ? 0x8080u : 0x808080u);  // its bytes are the digits, each plus 128
    FXQUANT_UNROLL for (int i = 0; i < Count; ++i) {
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
    constexpr int64_t kCount = digits_of(T);
    const Scaling s = fixed_point(amax_bits<Isa, T>(row, width), kCount);
    const auto put = [&](int64_t k, typename Isa::F x) {
        const I positive = bits<I>(x) == 0x7f800000, negative = bits<I>(x) == static_cast<int32_t>(0xff800000u);  // -1: it is
        const I v = s.factor == 0.0f ? negative - positive : nearest_integers<Isa>(x * s.factor);
        store_digits<Isa, Offset, kCount>(v, codes + k, stride);
    };
    int64_t k = 0;
    for (; k + W <= width; k += W) put(k, load_float<Isa, T>(row + k * size_of(T)));
    if (k < width) put(k, load_tail<Isa, T>(row + k * size_of(T), width - k));
    return s.scale;
}

// Rows row0 <= r < row1, digits_of(x.type) rows of codes each.
template <class Isa, int Offset>
void fixed_rows(const Rows& x, int64_t row0, int64_t row1, char* codes, int64_t stride, float* scale) {
    for (int64_t r = row0; r < row1; ++r) {
        const char* row = static_cast<const char*>(x.data) + r * x.stride * size_of(x.type);
        char* to = codes + r * digits_of(x.type) * stride;
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
