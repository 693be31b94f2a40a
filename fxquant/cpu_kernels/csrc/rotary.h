// The kernel of fxquant::rotary. Included into each isa_*.cpp inside its anonymous namespace.

template <class Isa, Float T>
void store_part(void* to, typename Isa::F v, int64_t n) {
    alignas(64) char padded[Isa::kWidth * 4];
    store_float<Isa, T>(padded, v);
    std::memcpy(to, padded, n * size_of(T));
}

template <class Isa, Float T, bool Whole>
FXQUANT_INLINE void rotate(const char* x, const char* cos, const char* sin, char* out, int64_t half, int64_t at, int64_t n) {
    using F = typename Isa::F;
    const auto read = [&](const char* from, int64_t i) -> F {
        if constexpr (Whole) return load_float<Isa, T>(from + i * size_of(T));
        return load_tail<Isa, T>(from + i * size_of(T), n);
    };
    const F a = read(x, at), b = read(x, half + at);
    const F low = a * read(cos, at) - b * read(sin, at), high = b * read(cos, half + at) + a * read(sin, half + at);
    if constexpr (Whole) {
        store_float<Isa, T>(out + at * size_of(T), low);
        store_float<Isa, T>(out + (half + at) * size_of(T), high);
    } else {
        store_part<Isa, T>(out + at * size_of(T), low, n);
        store_part<Isa, T>(out + (half + at) * size_of(T), high, n);
    }
}

template <class Isa, Float T>
void rotary_of(const RotaryRows& r) {
    constexpr int64_t W = Isa::kWidth, S = size_of(T);
    const auto *x = static_cast<const char*>(r.x), *cos = static_cast<const char*>(r.cos), *sin = static_cast<const char*>(r.sin);
    auto* out = static_cast<char*>(r.out);
    const int64_t whole = r.half / W * W;
    for (int64_t row = 0; row < r.rows; ++row) {
        for (int64_t i = 0; i < whole; i += W) rotate<Isa, T, true>(x, cos, sin, out, r.half, i, W);
        if (whole < r.half) rotate<Isa, T, false>(x, cos, sin, out, r.half, whole, r.half - whole);
        x += r.x_step * S;
        cos += r.cos_step * S;
        sin += r.sin_step * S;
        out += r.out_step * S;
    }
}

template <class Isa>
void rotary(const RotaryRows& rows) {
    switch (rows.type) {
        case Float::f32: return rotary_of<Isa, Float::f32>(rows);
        case Float::bf16: return rotary_of<Isa, Float::bf16>(rows);
        case Float::f16: return rotary_of<Isa, Float::f16>(rows);
    }
}
