// What follows a product: scale and bias, then what After says, and the one rounding to the result's type.
// Included into each isa_*.cpp inside an anonymous namespace, after functions.h and before products.h.

// What the 64 columns of one panel need at the end. A part-filled panel gets padded copies, so that the
// epilogue always works on whole vectors.
struct Columns {
    int64_t first;
    int64_t count;
    const float* scale;
    const float* bias;
    After after;
    alignas(64) float scale_copy[kPanel];
    alignas(64) float bias_copy[kPanel];

    Columns(const Weight& w, int64_t panel) : first(panel * kPanel), after(w.after) {
        count = w.out_features - first < kPanel ? w.out_features - first : kPanel;
        if (w.coded != nullptr) {
            read_steps(*w.coded, panel, scale_copy);
            scale = scale_copy;
        } else {
            scale = w.scale == nullptr ? nullptr : padded(w.scale + first, scale_copy);
        }
        bias = w.bias == nullptr ? nullptr : padded(w.bias + first, bias_copy);
    }

    const float* padded(const float* from, float* copy) const {
        if (count == kPanel) return from;
        for (int64_t i = 0; i < kPanel; ++i) copy[i] = i < count ? from[i] : 0.0f;
        return copy;
    }
};

// One finished row of 64 columns: y = value(column) * factor(column) [+ bias], then what `after` says, rounded once to T. at:
// bytes from the first row's first column to this one's. by: what after.factor has for the row.
template <class Isa, Float T, class Value, class Factor>
inline void finish_row(const Columns& columns, Value value, Factor factor, const float* by, char* out, int64_t at) {
    constexpr int W = Isa::kWidth;
    const After& after = columns.after;
    alignas(64) char partial[kPanel * 4];
    out += at;
    char* to = columns.count == kPanel ? out : partial;
    if (after.activation != Activation::none || after.residual != nullptr) {
        alignas(64) float y[kPanel];
        for (int64_t c = 0; c < kPanel; c += W) {
            typename Isa::F v = value(c) * factor(c);
            if (columns.bias != nullptr) v = v + load<typename Isa::F>(columns.bias + c);
            if (by != nullptr) v = v * load<typename Isa::F>(by + c);
            store(y + c, v);
        }
        const auto* residual = static_cast<const char*>(after.residual);
        follow<Isa, T>(after.activation, residual == nullptr ? nullptr : residual + at, columns.count, y);
        for (int64_t c = 0; c < kPanel; c += W) store_float<Isa, T>(to + c * size_of(T), load<typename Isa::F>(y + c));
        if (to == partial) std::memcpy(out, partial, columns.count * size_of(T));
        return;
    }
    for (int64_t c = 0; c < kPanel; c += W) {
        typename Isa::F y = value(c) * factor(c);
        if (columns.bias != nullptr) y = y + load<typename Isa::F>(columns.bias + c);
        if (by != nullptr) y = y * load<typename Isa::F>(by + c);
        store_float<Isa, T>(to + c * size_of(T), y);
    }
    if (to == partial) std::memcpy(out, partial, columns.count * size_of(T));
}

// Where the columns of a row stand, in bytes from the first of all results, and what multiplies them.
struct RowPlace {
    int64_t stride;  // from row to row
    int64_t first;
    const float* factor;
    int64_t bytes;

    RowPlace(const After& after, int64_t column, int64_t row, int64_t width, Float type) : bytes(kPanel * size_of(type)) {
        const Place& place = after.place;
        if (place.width != 0) width = place.width;
        stride = width * size_of(type);
        first = (row - place.row0) * stride + (column - place.column0) * size_of(type);
        factor = after.factor == nullptr ? nullptr : after.factor + (row - after.factor_row0) * kPanel;
    }

    // Rows far apart, which no hardware fetches ahead.
    void fetch(const char* at) const {
        for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(at + line);
    }
};

template <class Isa, class Value, class Factor>
inline void finish(const Columns& columns, Value value, Factor factor, void* out, Float type, int64_t row, int64_t width) {
    char* to = static_cast<char*>(out);
    const RowPlace place(columns.after, columns.first, row, width, type);
    const int64_t at = place.first;
    const float* by = place.factor;
    if (columns.after.residual != nullptr) {  // those of the next group
        place.fetch(static_cast<const char*>(columns.after.residual) + at + Isa::kTall * place.stride);
    }
    switch (type) {
        case Float::f32: return finish_row<Isa, Float::f32>(columns, value, factor, by, to, at);
        case Float::bf16: return finish_row<Isa, Float::bf16>(columns, value, factor, by, to, at);
        case Float::f16: return finish_row<Isa, Float::f16>(columns, value, factor, by, to, at);
    }
}

// The int32 sums of the rows of a group, [rows, 64] less `shift`, and what a code of each row is worth.
struct GroupSums {
    const int32_t* sum;
    const int32_t* shift;
    const float* x_scale;
    int64_t rows;

    template <class Isa>
    typename Isa::F at(int64_t r, int64_t c) const {
        using U = typename Isa::U;
        const U exact = load<U>(sum + r * kPanel + c) - load<U>(shift + c);
        return __builtin_convertvector(bits<typename Isa::I>(exact), typename Isa::F);
    }
    float x_scale_of(int64_t r) const { return x_scale[r]; }
};

// The same as floats. x_scale: null where it is in the sums.
struct GroupFloats {
    const float* sum;
    const float* x_scale;
    int64_t rows;

    template <class Isa>
    typename Isa::F at(int64_t r, int64_t c) const {
        return load<typename Isa::F>(sum + r * kPanel + c);
    }
    float x_scale_of(int64_t r) const { return x_scale == nullptr ? 1.0f : x_scale[r]; }
};

template <class Isa>
inline typename Isa::F column_scale(const Columns& columns, int64_t c) {
    return columns.scale == nullptr ? Isa::splat(1.0f) : load<typename Isa::F>(columns.scale + c);
}

// y = sum * (scale * x_scale) + bias of a full panel's columns: put(row, first column, vectors y) of each row.
template <class Isa, class Sums, class Put>
FXQUANT_INLINE void scale_sums(const Columns& columns, const Sums& of, Put put) {
    using F = typename Isa::F;
    constexpr int W = Isa::kWidth, kVectors = W == 16 ? 4 : 2;
    for (int64_t c = 0; c < kPanel; c += kVectors * W) {
        F scale[kVectors], bias[kVectors];
        FXQUANT_UNROLL for (int j = 0; j < kVectors; ++j) {
            scale[j] = column_scale<Isa>(columns, c + j * W);
            bias[j] = columns.bias == nullptr ? Isa::splat(-0.0f) : load<F>(columns.bias + c + j * W);  // y + -0 is y, -0 too
        }
        for (int64_t r = 0; r < of.rows; ++r) {
            const F x_scale = Isa::splat(of.x_scale_of(r));
            F y[kVectors];
            FXQUANT_UNROLL for (int j = 0; j < kVectors; ++j) {
                y[j] = of.template at<Isa>(r, c + j * W) * (scale[j] * x_scale) + bias[j];
            }
            put(r, c, y);
        }
    }
}

template <class Isa, Float T, int N>
FXQUANT_INLINE void store_vectors(char* to, const typename Isa::F (&y)[N]) {
    FXQUANT_UNROLL for (int j = 0; j < N; j += 2) store_two<Isa, T>(to + j * Isa::kWidth * size_of(T), y[j], y[j + 1]);
}

template <class Isa, Float T, int N>
FXQUANT_INLINE void add_vectors(const char* residual, typename Isa::F (&y)[N]) {
    FXQUANT_UNROLL for (int j = 0; j < N; ++j) y[j] = y[j] + load_float<Isa, T>(residual + j * Isa::kWidth * size_of(T));
}

// Where a group's results stand: `out` and `residual` at its first row and column, rows `stride` bytes apart. factor: [rows, 64].
struct GroupPlace {
    char* out;
    const char* residual;
    const float* factor;
    int64_t stride;
};

template <class Isa, Float T, bool Factor, bool Residual, class Sums>
FXQUANT_TILE void finish_sums(const Columns& columns, const Sums& of, const GroupPlace& place) {
    using F = typename Isa::F;
    scale_sums<Isa>(columns, of, [&](int64_t r, int64_t c, auto& y) {
        constexpr int N = sizeof(y) / sizeof(F);
        const int64_t at = r * place.stride + c * size_of(T);
        if constexpr (Factor) {
            FXQUANT_UNROLL for (int j = 0; j < N; ++j) y[j] = y[j] * load<F>(place.factor + r * kPanel + c + j * Isa::kWidth);
        }
        if constexpr (Residual) add_vectors<Isa, T>(place.residual + at, y);
        store_vectors<Isa, T>(place.out + at, y);
    });
}

template <class Isa, class Sums>
FXQUANT_TILE void widen_sums(const Columns& columns, const Sums& of, float* wide) {
    scale_sums<Isa>(columns, of, [&](int64_t r, int64_t c, auto& y) {
        store_vectors<Isa, Float::f32>(reinterpret_cast<char*>(wide + r * kPanel + c), y);
    });
}

// y = activation(y) of rows of 64.
template <class Isa>
FXQUANT_TILE void activate_all(Activation activation, int64_t n, float* y) {
    using F = typename Isa::F;
    constexpr int W = Isa::kWidth, kVectors = W == 16 ? 4 : 1;
    with_activation(activation, [&](auto a) {
        for (const float* end = y + n; y < end; y += kVectors * W) {
            F v[kVectors];
            FXQUANT_UNROLL for (int j = 0; j < kVectors; ++j) v[j] = load<F>(y + j * W);
            activate_vectors<Isa, a()>(v);
            FXQUANT_UNROLL for (int j = 0; j < kVectors; ++j) store(y + j * W, v[j]);
        }
    });
}

template <class Isa, Float T>
FXQUANT_TILE void store_rows(const float* wide, int64_t rows, const GroupPlace& place) {
    using F = typename Isa::F;
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < kPanel; c += 2 * Isa::kWidth) {
            const int64_t at = r * place.stride + c * size_of(T);
            F y[2] = {load<F>(wide + r * kPanel + c), load<F>(wide + r * kPanel + c + Isa::kWidth)};
            if (place.residual != nullptr) add_vectors<Isa, T>(place.residual + at, y);
            store_vectors<Isa, T>(place.out + at, y);
        }
    }
}

template <class Isa, Float T, class Sums>
void finish_group_of(const Columns& columns, const Sums& of, const GroupPlace& place) {
    const Activation activation = columns.after.activation;
    if (activation == Activation::none) {
        if (place.factor != nullptr && place.residual != nullptr) return finish_sums<Isa, T, true, true>(columns, of, place);
        if (place.factor != nullptr) return finish_sums<Isa, T, true, false>(columns, of, place);
        if (place.residual != nullptr) return finish_sums<Isa, T, false, true>(columns, of, place);
        return finish_sums<Isa, T, false, false>(columns, of, place);
    }
    // An activation's constants take most registers: it goes over all rows at once, once they are floats.
    alignas(64) float held[Isa::kTall * kPanel];
    const bool in_place = T == Float::f32 && place.residual == nullptr && place.stride == kPanel * size_of(T);
    float* wide = in_place ? reinterpret_cast<float*>(place.out) : held;
    widen_sums<Isa>(columns, of, wide);
    activate_all<Isa>(activation, of.rows * kPanel, wide);
    if (!in_place) store_rows<Isa, T>(wide, of.rows, place);
}

// The finished rows of a group, from `row` on: what finish() makes of each, in one go.
template <class Isa, class Sums>
void finish_group(const Columns& columns, const Sums& of, void* out, Float type, int64_t row, int64_t width) {
    if (columns.count < kPanel) {
        for (int64_t r = 0; r < of.rows; ++r) {
            const auto factor = [&](int64_t c) { return column_scale<Isa>(columns, c) * of.x_scale_of(r); };
            finish<Isa>(columns, [&](int64_t c) { return of.template at<Isa>(r, c); }, factor, out, type, row + r, width);
        }
        return;
    }
    const RowPlace at(columns.after, columns.first, row, width, type);
    GroupPlace place{static_cast<char*>(out) + at.first, nullptr, at.factor, at.stride};
    if (columns.after.residual != nullptr) {
        place.residual = static_cast<const char*>(columns.after.residual) + at.first;
        for (int64_t r = 0; r < of.rows; ++r) at.fetch(place.residual + (r + Isa::kTall) * at.stride);
    }
    switch (type) {
        case Float::f32: return finish_group_of<Isa, Float::f32>(columns, of, place);
        case Float::bf16: return finish_group_of<Isa, Float::bf16>(columns, of, place);
        case Float::f16: return finish_group_of<Isa, Float::f16>(columns, of, place);
    }
}

// Rows row0 <= r < row1 from sums of floats, [rows, 64]. x_scale: of the first of them on, or null.
template <class Isa>
void finish_floats(const Columns& columns, const float* sums, const float* x_scale, void* out, Float type, int64_t row0, int64_t row1,
                   int64_t width) {
    for (int64_t row = row0; row < row1; row += Isa::kTall, sums += Isa::kTall * kPanel) {
        const float* scale = x_scale == nullptr ? nullptr : x_scale + row - row0;
        const int64_t rows = row1 - row < Isa::kTall ? row1 - row : Isa::kTall;
        finish_group<Isa>(columns, GroupFloats{sums, scale, rows}, out, type, row, width);
    }
}
