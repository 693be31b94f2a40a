// The products of few rows with planes of codes: patterns go from the planes through registers into the sums, and no tile is
// written. Sums are formed in the order of coded.h, so that results are those of the tiles, bit by bit.
// Included into each isa_*.cpp inside an anonymous namespace, after planes.h and before coded.h.

// Planes of more bits are looked up in several tables, which leave no registers for the sums.
constexpr int kMostFusedBits = 5;

// Whether each granule of a weight is made of whole blocks.
inline bool whole_blocks(const CodedWeight& w) { return w.granules == 1 || w.granule % kBlock == 0; }

// sum[r][j] += x[r][k] * value of k and columns j, for the quad of k whose first is x[0].
template <class Isa, int Bits, Scheme S, int R, int Columns, class Sums>
FXQUANT_INLINE void fused_quad(const typename Isa::template Lookup<Bits>& lookup, const Granule<Isa>& granule,
                                                      const uint8_t* block, int quad, int64_t column, const float* x,
                                                      int64_t stride, Sums& sum) {
    using F = typename Isa::F;
    FXQUANT_UNROLL for (int j = 0; j < Columns; ++j) {
        const int64_t c = column + j * Isa::kWidth;
        F value[4];
        lookup.values(patterns<typename Isa::U, Bits>(block, static_cast<int>(4 * quad + c / 16), c % 16 * 4), value);
        FXQUANT_UNROLL for (int i = 0; i < 4; ++i) {
            if constexpr (S == Scheme::affine) value[i] = value[i] - load<F>(granule.zero + c);
            value[i] = value[i] * load<F>(granule.scale + c);
            if constexpr (S == Scheme::shift) value[i] = value[i] + load<F>(granule.zero + c);
            FXQUANT_UNROLL for (int r = 0; r < R; ++r) sum[r][j] = Isa::fma(Isa::splat(x[r * stride + i]), value[i], sum[r][j]);
        }
    }
}

// R rows and the columns from `column` on, over `depth` quads that begin with a block and lie in one granule.
template <class Isa, int Bits, Scheme S, int R>
FXQUANT_TILE void fused_columns(const typename Isa::template Lookup<Bits>& table, const Granule<Isa>& granule, const uint8_t* block,
                                int64_t column, int64_t depth, const float* x, int64_t stride, float* acc) {
    using F = typename Isa::F;
    constexpr int W = Isa::kWidth, kColumns = Isa::kFloatVectors;
    const typename Isa::template Lookup<Bits> lookup = table;  // a copy of its own stays in registers
    F sum[R][kColumns];
    FXQUANT_UNROLL for (int r = 0; r < R; ++r) FXQUANT_UNROLL for (int j = 0; j < kColumns; ++j)
        sum[r][j] = load<F>(acc + r * kPanel + j * W);
    for (; depth > 1; depth -= 2, block += Bits * kPanel, x += kBlock) {
        FXQUANT_UNROLL for (int row = 0; row < Bits; ++row) __builtin_prefetch(block + kFetchAhead + row * kPanel);
        fused_quad<Isa, Bits, S, R, kColumns>(lookup, granule, block, 0, column, x, stride, sum);
        fused_quad<Isa, Bits, S, R, kColumns>(lookup, granule, block, 1, column, x + kQuad, stride, sum);
    }
    if (depth > 0) fused_quad<Isa, Bits, S, R, kColumns>(lookup, granule, block, 0, column, x, stride, sum);
    FXQUANT_UNROLL for (int r = 0; r < R; ++r) FXQUANT_UNROLL for (int j = 0; j < kColumns; ++j)
        store(acc + r * kPanel + j * W, sum[r][j]);
}

template <class Isa, int Bits, Scheme S, int R>
void fused_rows(const CodedProblem& p, int64_t panel, int64_t row0, float* acc) {
    const CodedWeight& w = p.weight;
    const typename Isa::template Lookup<Bits> lookup(w);
    Granule<Isa> granule(w, panel);
    const PanelLayout layout = plane_layout(w.out_features, w.in_features, w.bits);
    const uint8_t* blocks = w.packed + layout.offset(panel);
    for (int64_t k = 0; k < w.in_features;) {
        granule.enter(k);
        const int64_t end = granule.end < w.in_features ? granule.end : w.in_features;
        const uint8_t* block = blocks + k / kBlock * Bits * kPanel;
        const float* x = p.x + row0 * p.x_stride + k;
        for (int64_t c = 0; c < kPanel; c += Isa::kFloatVectors * Isa::kWidth) {
            fused_columns<Isa, Bits, S, R>(lookup, granule, block, c, quads(end - k), x, p.x_stride, acc + c);
        }
        k = end;
    }
}

template <class Isa, int Bits, int R>
void fused_of_scheme(const CodedProblem& p, int64_t panel, int64_t row0, int64_t rows, float* acc) {
    if (rows == R) {
        switch (p.weight.scheme) {
            case Scheme::symmetric: return fused_rows<Isa, Bits, Scheme::symmetric, R>(p, panel, row0, acc);
            case Scheme::affine: return fused_rows<Isa, Bits, Scheme::affine, R>(p, panel, row0, acc);
            case Scheme::shift: return fused_rows<Isa, Bits, Scheme::shift, R>(p, panel, row0, acc);
        }
    }
    if constexpr (R > 1) fused_of_scheme<Isa, Bits, R - 1>(p, panel, row0, rows, acc);
}

// Sums of the rows from row0 on, [rows][64], added to acc. False if the weight's planes are none for this.
template <class Isa, int Bits>
bool fused_product(const CodedProblem& p, int64_t panel, int64_t row0, int64_t rows, float* acc) {
    if constexpr (Bits > kMostFusedBits) {
        return false;
    } else {
        if (rows > Isa::kFused || !whole_blocks(p.weight)) return false;
        fused_of_scheme<Isa, Bits, Isa::kFused>(p, panel, row0, rows, acc);
        return true;
    }
}
