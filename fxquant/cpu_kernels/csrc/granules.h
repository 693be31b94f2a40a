// Sums of float products granule by granule: of x * (pattern - 8), in the order of k; less (zero - 8) * sum of x, if there is a
// zero; then the granule's scale times that is added to the total. Rows that come alone take the codes from the planes through
// registers, others from tiles, with the same sums bit by bit.
// Included into each isa_*.cpp inside an anonymous namespace, after fused.h and before coded.h.

// k of one decoded tile: 128 x 64 floats are 32 KiB, which stay in L1 or close to it while all row groups pass over them.
constexpr int64_t kTileK = 128;

constexpr float kMiddle = 8;  // of the patterns

// How far ahead of the codes of few rows the next ones are fetched, in bytes.
constexpr int64_t kNibblesAhead = 16384;

// The sums of one row of x in each granule.
template <class Isa>
void sum_of_granules(const CodedWeight& w, const float* x, float* sums) {
    using F = typename Isa::F;
    for (int64_t g = 0; g < w.granules; ++g) {
        int64_t k = g * w.granule;
        const int64_t end = g + 1 < w.granules ? k + w.granule : w.in_features;
        Lanes<Isa> lanes;
        const auto add = [&](const float* values) {
            for (int v = 0; v < Lanes<Isa>::kVectors; ++v) lanes.sum[v] += load<F>(values + v * Isa::kWidth);
        };
        for (; k + 16 <= end; k += 16) add(x + k);
        if (k < end) {
            float rest[16] = {};
            std::memcpy(rest, x + k, (end - k) * sizeof(float));
            add(rest);
        }
        sums[g] = lanes.total();
    }
}

// What a granule's sums need at the end: for the 64 features of a panel.
template <class Isa>
struct Finish {
    void read(const CodedWeight& w, int64_t panel, int64_t index) {
        read_granule<Isa>(w, w.scale, panel, index, scale);
        if (w.scheme == Scheme::affine) read_granule<Isa>(w, w.zero, panel, index, zero);
    }

    // of_x: null if there is no zero; of the first row, `granules` from row to row.
    void add(const float* part, int64_t rows, const float* of_x, int64_t granules, float* acc) const {
        using F = typename Isa::F;
        for (int64_t c = 0; c < kPanel; c += Isa::kWidth) {
            const F by = load<F>(scale + c), less = of_x == nullptr ? F{} : kMiddle - load<F>(zero + c);
            for (int64_t r = 0; r < rows; ++r) {
                F sum = load<F>(part + r * kPanel + c);
                if (of_x != nullptr) sum = Isa::fma(Isa::splat(of_x[r * granules]), less, sum);
                store(acc + r * kPanel + c, Isa::fma(by, sum, load<F>(acc + r * kPanel + c)));
            }
        }
    }

    alignas(64) float scale[kPanel];
    alignas(64) float zero[kPanel];
};

// sum[r][j] += x[r][k] * (pattern - 8) of one quad of k.
template <class Isa, int Quad, int R, int Columns, class Sums>
FXQUANT_INLINE void granule_quad(const typename Isa::Nibbles& nibbles, const typename Isa::U* held, const float* x, int64_t stride,
                                 Sums& sum) {
    const auto add = [&](auto i) {
        FXQUANT_UNROLL for (int j = 0; j < Columns; ++j) {
            const typename Isa::F value = nibbles.template value<4 * Quad + i()>(held[j]);
            FXQUANT_UNROLL for (int r = 0; r < R; ++r) sum[r][j] = Isa::fma(Isa::splat(x[r * stride + 4 * Quad + i()]), value, sum[r][j]);
        }
    };
    add(std::integral_constant<int, 0>());
    add(std::integral_constant<int, 1>());
    add(std::integral_constant<int, 2>());
    add(std::integral_constant<int, 3>());
}

// The sums of R rows and some vectors of columns over the `depth` quads of each of G granules, `granule` k apart, into part
// [G][R][64]. A lone row has too few sums to keep the units busy: it takes two granules at a time.
template <class Isa, int G, int R, int Columns>
FXQUANT_TILE void granule_columns(const typename Isa::Nibbles& table, const uint8_t* block, int64_t granule, int64_t depth,
                                  const float* x, int64_t stride, float* part) {
    using F = typename Isa::F;
    using U = typename Isa::U;
    constexpr int W = Isa::kWidth;
    const typename Isa::Nibbles nibbles = table;  // a copy of its own stays in registers
    F sum[G][R][Columns];
    FXQUANT_UNROLL for (int g = 0; g < G; ++g) FXQUANT_UNROLL for (int r = 0; r < R; ++r) FXQUANT_UNROLL for (int j = 0; j < Columns; ++j)
        sum[g][r][j] = F{};
    const int64_t apart = granule * kPanel / 2;  // bytes
    U held[Columns];
    for (; depth > 1; depth -= 2, block += 4 * kPanel, x += kBlock) {
        FXQUANT_UNROLL for (int g = 0; g < G; ++g) {
            const uint8_t* at = block + g * apart;
            FXQUANT_UNROLL for (int64_t line = 0; line < Columns * W * kQuad; line += 64) __builtin_prefetch(at + kNibblesAhead + line);
            FXQUANT_UNROLL for (int j = 0; j < Columns; ++j) held[j] = load<U>(at + j * W * kQuad);
            granule_quad<Isa, 0, R, Columns>(nibbles, held, x + g * granule, stride, sum[g]);
            granule_quad<Isa, 1, R, Columns>(nibbles, held, x + g * granule, stride, sum[g]);
        }
    }
    if (depth > 0) {  // the end of K, behind the last whole block
        static_assert(G <= 2, "two granules are whole");
        FXQUANT_UNROLL for (int j = 0; j < Columns; ++j) held[j] = load<U>(block + j * W * kQuad);
        granule_quad<Isa, 0, R, Columns>(nibbles, held, x, stride, sum[0]);
    }
    FXQUANT_UNROLL for (int g = 0; g < G; ++g) FXQUANT_UNROLL for (int r = 0; r < R; ++r) FXQUANT_UNROLL for (int j = 0; j < Columns; ++j)
        store(part + (g * R + r) * kPanel + j * W, sum[g][r][j]);
}

// Granules g to g + G - 1 of R rows from row0 on.
template <class Isa, int G, int R>
inline void some_granules(const CodedProblem& p, const typename Isa::Nibbles& nibbles, int64_t panel, int64_t row0, int64_t g,
                          const uint8_t* blocks, float* acc) {
    constexpr int kColumns = 4;
    const CodedWeight& w = p.weight;
    const int64_t k = g * w.granule, end = g + G < w.granules ? k + w.granule : w.in_features - (G - 1) * w.granule;
    Finish<Isa> finish[G];
    alignas(64) float part[G * R * kPanel];
    for (int i = 0; i < G; ++i) {
        finish[i].read(w, panel, g + i);
        fetch_granule(w, w.scale, panel, g + i);
        if (w.scheme == Scheme::affine) fetch_granule(w, w.zero, panel, g + i);
    }
    for (int64_t c = 0; c < kPanel; c += kColumns * Isa::kWidth) {
        granule_columns<Isa, G, R, kColumns>(nibbles, blocks + k * kPanel / 2 + c * kQuad, w.granule, quads(end - k),
                                             p.x + row0 * p.x_stride + k, p.x_stride, part + c);
    }
    const float* of_x = w.scheme == Scheme::affine ? p.sums + row0 * w.granules + g : nullptr;
    for (int i = 0; i < G; ++i) finish[i].add(part + i * R * kPanel, R, of_x == nullptr ? nullptr : of_x + i, w.granules, acc);
}

template <class Isa, int R>
void granule_rows(const CodedProblem& p, int64_t panel, int64_t row0, int64_t rows, const uint8_t* blocks, float* acc) {
    if (rows < R) {
        if constexpr (R > 1) granule_rows<Isa, R - 1>(p, panel, row0, rows, blocks, acc);
        return;
    }
    const CodedWeight& w = p.weight;
    const typename Isa::Nibbles nibbles;
    const int64_t whole = w.in_features / w.granule;  // granules
    int64_t g = 0;
    for (; R == 1 && g + 1 < whole; g += 2) some_granules<Isa, R == 1 ? 2 : 1, R>(p, nibbles, panel, row0, g, blocks, acc);
    for (; g < w.granules; ++g) some_granules<Isa, 1, R>(p, nibbles, panel, row0, g, blocks, acc);
}

// Patterns less 8 of the k from k0 (a multiple of 8, where `block` is) to k1, up to whole blocks: tile [k1 - k0, 64].
template <class Isa, int Bits>
FXQUANT_TILE void widen_patterns(const typename Isa::template Lookup<Bits>& table, float less, const uint8_t* block, int64_t k0,
                                 int64_t k1, float* tile) {
    using F = typename Isa::F;
    const typename Isa::template Lookup<Bits> lookup = table;  // a copy of its own stays in registers
    for (int64_t k = k0; k < k1; k += kBlock, block += Bits * kPanel, tile += kBlock * kPanel) {
        FXQUANT_UNROLL for (int row = 0; row < Bits; ++row) __builtin_prefetch(block + kFetchAhead + row * kPanel);
        FXQUANT_UNROLL_WIDE for (int q = 0; q < 2; ++q) {
            FXQUANT_UNROLL_WIDE for (int c = 0; c < kPanel; c += Isa::kWidth) {
                F value[4];
                lookup.values(patterns<typename Isa::U, Bits>(block, 4 * q + c / 16, c % 16 * 4), value);
                FXQUANT_UNROLL for (int i = 0; i < 4; ++i) store(tile + (q * kQuad + i) * kPanel + c, value[i] - less);
            }
        }
    }
}

// Sums of the rows row0 <= r < row1, [rows][64], added to acc. blocks(k, end): where the codes of those k are. False if the
// weight's sums are others.
template <class Isa, int Bits, class Blocks>
bool granule_sums(const CodedProblem& p, const typename Isa::template Lookup<Bits>& lookup, int64_t panel, int64_t row0, int64_t row1,
                  Blocks blocks, float* acc) {
    if constexpr (Bits != 4 && Bits != 8) return false;
    const CodedWeight& w = p.weight;
    if (!sums_granules(w)) return false;
    if (Bits == 4 && row1 - row0 <= Isa::kFused) {
        granule_rows<Isa, Isa::kFused>(p, panel, row0, row1 - row0, blocks(0, w.in_features), acc);
        return true;
    }
    alignas(64) float tile[kTileK * kPanel];
    alignas(64) float part[kRowBlock * kPanel];
    struct Span {
        int64_t k0, k1;
        bool begins, ends;
        int64_t index;
    } spans[kTileK / kBlock];
    Finish<Isa> finish[kTileK / kBlock];
    for (int64_t k = 0, g = 0; k < w.in_features; k += kTileK) {
        const int64_t end = k + kTileK < w.in_features ? k + kTileK : w.in_features;
        widen_patterns<Isa, Bits>(lookup, kMiddle - static_cast<float>(w.offset), blocks(k, end), k, end, tile);
        int64_t count = 0;
        for (int64_t from = k; from < end; ++count) {
            const int64_t begin = g * w.granule, its_end = g + 1 < w.granules ? begin + w.granule : w.in_features;
            const int64_t to = its_end < end ? its_end : end;
            spans[count] = {from, to, from == begin, to == its_end, g};
            if (to == its_end) finish[count].read(w, panel, g++);
            from = to;
        }
        for_groups(row0, row1, Isa::kFloatTall, [&](int64_t, int64_t row, int64_t height) {
            const int64_t at = (row - row0) * kPanel;
            for (int64_t i = 0; i < count; ++i) {
                const Span& s = spans[i];
                float_tile<Isa>(false, height, p.x + row * p.x_stride + s.k0, p.x_stride, tile + (s.k0 - k) * kPanel, quads(s.k1 - s.k0),
                                part + at, !s.begins);
                if (!s.ends) continue;
                finish[i].add(part + at, height, w.scheme == Scheme::affine ? p.sums + row * w.granules + s.index : nullptr, w.granules,
                              acc + at);
            }
        });
    }
    return true;
}
