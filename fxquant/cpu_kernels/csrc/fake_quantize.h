// What an activation becomes by quantizing and dequantizing it: rounding to a format's grid. Bit-equal to fxquant.numerics.
// Included into each isa_*.cpp inside an anonymous namespace, after quantize.h.

struct GranuleScale {
    float scale;   // what a step of the grid is worth, before the tensor scale
    float factor;  // what values are multiplied by to stand on the grid; 0 where the granule has no usable range
};

// 2^exponent for -149 <= exponent <= 127.
inline float power_of_two(int exponent) {
    return bits<float>(exponent >= -126 ? static_cast<uint32_t>(exponent + 127) << 23 : uint32_t{1} << (exponent + 149));
}

// The granule whose largest absolute value has the bits `amax`; scales of float32 or powers of two.
inline GranuleScale granule_scale(const Grid& grid, uint32_t amax_bits) {
    if (amax_bits >= 0x7f800000u) return {__builtin_nanf(""), 0.0f};
    const float amax = bits<float>(amax_bits);
    if (grid.scale == Grid::Scale::e8m0) {
        const int exponent = static_cast<int>(amax_bits >> 23) - 127 - grid.largest_exponent;
        const int kept = exponent < -127 ? -127 : exponent > 127 ? 127 : exponent;
        return {power_of_two(kept), power_of_two(-kept)};
    }
    if (amax < grid.smallest_range) return {0.0f, 0.0f};
    return {amax / grid.largest, grid.largest / amax};
}

// Those of one vector of granules under a tensor scale, which is not finite if any of them is not: scales are nearest e4m3,
// even at ties. Together, because three divisions a granule would cost more than its values.
template <class Isa>
inline void e4m3_scales(const Grid& grid, const uint32_t* amax, float tensor_scale, GranuleScale* to) {
    using F = typename Isa::F;
    using I = typename Isa::I;
    constexpr int W = Isa::kWidth;
    const F wanted = load<F>(amax) / grid.largest / tensor_scale, top = F{} + 448.0f, bottom = F{} + 0x1p-9f;
    const F v = wanted < top ? wanted : top;
    const I exponent = (bits<I>(v) & 0x7f800000) >> 23, smallest = I{} + (127 - 6);
    const F magic = bits<F>(((exponent > smallest ? exponent : smallest) << 23) + ((23 - 3) << 23 | 0x400000));
    const F kept = (v + magic) - magic;
    const F scale = kept < bottom ? bottom : kept;
    const F factor = 1.0f / (scale * tensor_scale);
    const bool finite = tensor_scale < bits<float>(0x7f800000u);
    for (int i = 0; i < W; ++i) {
        if (!finite) to[i] = {__builtin_nanf(""), 0.0f};
        else if (amax[i] == 0 || tensor_scale == 0.0f) to[i] = {0.0f, 0.0f};
        else to[i] = {scale[i], factor[i]};
    }
}

template <class Isa, Float T>
inline void store_some(char* to, typename Isa::F v, int64_t n) {
    if (n >= Isa::kWidth) return store_float<Isa, T>(to, v);
    alignas(64) char padded[Isa::kWidth * 4];
    store_float<Isa, T>(padded, v);
    std::memcpy(to, padded, n * size_of(T));
}

// n values, next to each other, of one granule.
template <class Isa, Float T>
void granule_to_grid(const Grid& grid, const char* from, char* to, int64_t n, GranuleScale s, float tensor_scale) {
    using F = typename Isa::F;
    using I = typename Isa::I;
    constexpr int W = Isa::kWidth;
    if (s.scale != s.scale) {  // NaN
        for (int64_t k = 0; k < n; k += W) store_some<Isa, T>(to + k * size_of(T), F{} + s.scale, n - k);
        return;
    }
    const I smallest = I{} + (grid.smallest_exponent + 127);
    const int32_t up = (23 - grid.mantissa_bits) << 23 | 0x400000;  // to 1.5 * 2^(exponent + 23 - mantissa bits)
    const I sign = I{} + (grid.minus_zero ? static_cast<int32_t>(0x80000000u) : 0);
    const int32_t ties = grid.mantissa_bits == 0 ? 0x400000 : -1;
    const F top = F{} + grid.largest, bottom = F{} - grid.largest;
    const auto rounded = [&](F x) {
        F v = x * s.factor;
        v = v > top ? top : v;
        v = v < bottom ? bottom : v;
        const I exponent = (bits<I>(v) & 0x7f800000) >> 23;
        const F magic = bits<F>(((exponent > smallest ? exponent : smallest) << 23) + up);
        F code = (v + magic) - magic;
        // Without mantissa bits the even code is the one with the even exponent, which the sum cannot see.
        const I tie = ((bits<I>(v) & 0x7fffff) == ties) & (exponent >= smallest) & ((exponent & 1) == 0);
        code = tie ? bits<F>(bits<I>(v) & static_cast<int32_t>(0xff800000u)) : code;
        return bits<F>(bits<I>(code) | (bits<I>(v) & sign)) * s.scale * tensor_scale;
    };
    int64_t k = 0;
    for (; k + W <= n; k += W) store_float<Isa, T>(to + k * size_of(T), rounded(load_float<Isa, T>(from + k * size_of(T))));
    if (k < n) store_some<Isa, T>(to + k * size_of(T), rounded(load_tail<Isa, T>(from + k * size_of(T), n - k)), n - k);
}

template <class Isa, Float T>
void rows_to_grid(const Grid& grid, const Rows& x, int64_t row0, int64_t row1, char* to, float tensor_scale) {
    constexpr int W = Isa::kWidth;
    const int64_t group = grid.group == 0 || grid.group > x.width ? x.width : grid.group;
    for (int64_t r = row0; r < row1; ++r) {
        const char* row = static_cast<const char*>(x.data) + r * x.stride * size_of(T);
        char* out = to + r * x.width * size_of(T);
        for (int64_t k = 0; k < x.width; k += W * group) {
            const int64_t values = x.width - k < W * group ? x.width - k : W * group;
            uint32_t amax[W] = {};
            GranuleScale scales[W];
            const auto each = [&](auto body) {
                for (int64_t i = 0, at = 0; at < values; ++i, at += group) {
                    body(i, (k + at) * size_of(T), values - at < group ? values - at : group);
                }
            };
            each([&](int64_t i, int64_t at, int64_t n) { amax[i] = amax_bits<Isa, T>(row + at, n); });
            if (grid.scale == Grid::Scale::e4m3) {
                e4m3_scales<Isa>(grid, amax, tensor_scale, scales);
            } else {
                each([&](int64_t i, int64_t, int64_t) { scales[i] = granule_scale(grid, amax[i]); });
            }
            each([&](int64_t i, int64_t at, int64_t n) {
                granule_to_grid<Isa, T>(grid, row + at, out + at, n, scales[i], tensor_scale);
            });
        }
    }
}

template <class Isa>
void fake_quantize(const Grid& grid, const Rows& x, int64_t row0, int64_t row1, void* out, float tensor_scale) {
    char* to = static_cast<char*>(out);
    switch (x.type) {
        case Float::f32: return rows_to_grid<Isa, Float::f32>(grid, x, row0, row1, to, tensor_scale);
        case Float::bf16: return rows_to_grid<Isa, Float::bf16>(grid, x, row0, row1, to, tensor_scale);
        case Float::f16: return rows_to_grid<Isa, Float::f16>(grid, x, row0, row1, to, tensor_scale);
    }
}

template <class Isa>
void fake_quantize_piece(const Grid& grid, const void* from, Float type, int64_t n, uint32_t amax, void* out) {
    const char* x = static_cast<const char*>(from);
    char* to = static_cast<char*>(out);
    switch (type) {
        case Float::f32: return granule_to_grid<Isa, Float::f32>(grid, x, to, n, granule_scale(grid, amax), 1.0f);
        case Float::bf16: return granule_to_grid<Isa, Float::bf16>(grid, x, to, n, granule_scale(grid, amax), 1.0f);
        case Float::f16: return granule_to_grid<Isa, Float::f16>(grid, x, to, n, granule_scale(grid, amax), 1.0f);
    }
}

// n values by one scale that was given. The grid would take NaN and infinity for numbers: these become NaN.
template <class Isa, Float T>
void values_to_grid(const Grid& grid, const char* from, char* to, int64_t n, Scaling by) {
    granule_to_grid<Isa, T>(grid, from, to, n, {by.scale, by.factor}, 1.0f);
    constexpr uint32_t kInfinity = 0x7f800000u;
    if (amax_bits<Isa, T>(from, n) < kInfinity) return;
    for (int64_t at = 0; at < n * size_of(T); at += size_of(T)) {
        if (amax_bits<Isa, T>(from + at, 1) >= kInfinity) {
            store_some<Isa, T>(to + at, typename Isa::F{} + __builtin_nanf(""), 1);
        }
    }
}

template <class Isa>
void fake_quantize_static(const Grid& grid, const void* from, Float type, int64_t n, Scaling by, void* out) {
    const char* x = static_cast<const char*>(from);
    char* to = static_cast<char*>(out);
    switch (type) {
        case Float::f32: return values_to_grid<Isa, Float::f32>(grid, x, to, n, by);
        case Float::bf16: return values_to_grid<Isa, Float::bf16>(grid, x, to, n, by);
        case Float::f16: return values_to_grid<Isa, Float::f16>(grid, x, to, n, by);
    }
}

template <class Isa>
uint32_t largest_bits(const void* from, Float type, int64_t n) {
    const char* x = static_cast<const char*>(from);
    switch (type) {
        case Float::f32: return amax_bits<Isa, Float::f32>(x, n);
        case Float::bf16: return amax_bits<Isa, Float::bf16>(x, n);
        case Float::f16: return amax_bits<Isa, Float::f16>(x, n);
    }
    return 0;
}

// n floats, rounded to `type`.
template <class Isa>
void narrow(const float* from, int64_t n, Float type, void* to) {
    const auto each = [&](auto store_values, int64_t bytes) {
        for (int64_t k = 0; k < n; k += Isa::kWidth) {
            const auto v = n - k < Isa::kWidth ? load_tail<Isa, Float::f32>(from + k, n - k) : load<typename Isa::F>(from + k);
            store_values(static_cast<char*>(to) + k * bytes, v, n - k);
        }
    };
    switch (type) {
        case Float::f32: return each(store_some<Isa, Float::f32>, 4);
        case Float::bf16: return each(store_some<Isa, Float::bf16>, 2);
        case Float::f16: return each(store_some<Isa, Float::f16>, 2);
    }
}
