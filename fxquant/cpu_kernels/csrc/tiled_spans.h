// int8 activations x coded weights by tiles: coded_dynamic_of for several rows and short pieces. Included into isa_amx.cpp inside
// an anonymous namespace, after tiles.h and coded.h.

// The most quads of a span that one product of tiles takes, so that all its products take as many.
inline int64_t quads_at_once(int64_t depth) {
    const int64_t parts = (depth + kTileQuads - 1) / kTileQuads;
    for (int64_t n = parts;; ++n) {
        if (depth % n == 0) return depth / n;
    }
}

// Shorter spans are stored and scaled too often: one row after another is as quick.
constexpr int64_t kShortestSpan = 32;

// Whether each piece lies in one tile of patterns, and each pattern less its zero point in a signed byte.
inline bool tiles_serve(const CodedDynamicProblem& p, int64_t panel, int64_t rows) {
    const CodedWeight& w = p.weight;
    const int64_t usual = p.pieces[0].k1;
    if (rows < kTileRows || usual < kShortestSpan || usual > kPatternK || (p.count > 1 && usual % kSpreadK != 0)) return false;
    for (int64_t i = 0; i < p.count; ++i) {
        if (p.pieces[i].k0 != i * usual || p.pieces[i].k1 - p.pieces[i].k0 > usual) return false;
    }
    if (w.scheme == Scheme::symmetric) return true;
    if (w.bits == 8 || w.zero.rows != 0) return false;
    const auto* zero = static_cast<const uint8_t*>(w.zero.data) + panel * kPanel * w.granules;
    uint8_t most = 0;
    for (int64_t i = 0; i < layout_of(w).features(panel) * w.granules; ++i) most = zero[i] > most ? zero[i] : most;
    return most <= 128;
}

// Patterns less their zero points, in place.
template <class Isa>
FXQUANT_TILE void take_zeros(const CodedWeight& w, const Span* spans, int64_t count, uint8_t* tile) {
    using U = typename Isa::U;
    for (const Span* end = spans + count; spans < end; ++spans) {
        uint8_t* at = tile + spans->quad0 * kPanel * kQuad;
        for (int64_t c = 0; c < kPanel; c += Isa::kWidth) {
            const U zero = w.scheme == Scheme::affine ? load<U>(spans->zero + c) : U{} + static_cast<uint32_t>(w.offset);
            const auto each = bits<__m512i>(zero * 0x01010101u);
            for (int64_t q = 0; q < spans->depth; ++q) {
                uint8_t* quad = at + (q * kPanel + c) * kQuad;
                _mm512_store_si512(quad, _mm512_sub_epi8(_mm512_load_si512(quad), each));
            }
        }
    }
}

// Spans whose sums are stored before the first of them is read: what a tile stores is not forwarded to a load.
constexpr int64_t kSumsAhead = 16;

// Spans of one depth x 16 rows: y += scale * float(sums) [* x_scale], for 64 columns. tile: of signed bytes.
template <class Isa, bool Grouped>
FXQUANT_TILE void add_tiled_spans(const Span* spans, int64_t count, const char* codes, int64_t stride, const uint8_t* tile,
                                  const PieceRows& rows, float* y) {
    constexpr int64_t kColumns = kPanel * kQuad, kSums = kTileRows * 16;
    const int64_t step = quads_at_once(spans->depth);
    alignas(64) int32_t sums[kSumsAhead * kSums];
    for (int64_t j = 0; j < kPanel; j += 16) {
        __m512 total[kTileRows];
        FXQUANT_UNROLL_ROWS for (int r = 0; r < kTileRows; ++r) total[r] = _mm512_load_ps(y + r * kPanel + j);
        for (int64_t first = 0; first < count; first += kSumsAhead) {
            const int64_t last = count - first < kSumsAhead ? count : first + kSumsAhead;
            int32_t* to = sums;
            for (int64_t i = first; i < last; ++i, to += kSums) {
                const uint8_t* b = tile + spans[i].quad0 * kColumns + j * kQuad;
                const char* a = codes + spans[i].quad0 * kQuad;
                const uint8_t* end = b + spans[i].depth * kColumns;
                FXQUANT_TILE_ZERO(0);
                for (; b < end; b += step * kColumns, a += step * kQuad) {
                    FXQUANT_TILE_LOAD(4, a, stride);
                    FXQUANT_TILE_LOAD(5, b, kColumns);
                    FXQUANT_TILE_DOT_SIGNED(0, 4, 5);
                }
                FXQUANT_TILE_STORE(0, to, 64);
            }
            const int32_t* of = sums;
            for (int64_t i = first; i < last; ++i, of += kSums) {
                const __m512 scale = _mm512_load_ps(spans[i].scale + j);
                FXQUANT_UNROLL_ROWS for (int r = 0; r < kTileRows; ++r)
                    total[r] = Isa::template scaled<Grouped>(scale, _mm512_load_si512(of + r * 16), rows.scale + r * rows.count + i, total[r]);
            }
        }
        FXQUANT_UNROLL_ROWS for (int r = 0; r < kTileRows; ++r) _mm512_store_ps(y + r * kPanel + j, total[r]);
    }
}

// coded_dynamic_of where tiles_serve: a multiple of 16 rows.
template <class Isa, int Bits>
void tiled_dynamic_of(const CodedDynamicProblem& p, int64_t panel, int64_t y_row0, int64_t y_row1) {
    const CodedWeight& w = p.weight;
    const int64_t row0 = y_row0 * p.digits, row1 = y_row1 * p.digits;  // rows of codes
    alignas(64) uint8_t tile[kPatternK * kPanel];
    alignas(64) float y[kPatternRows * kPanel];
    Span spans[kPatternK / kQuad];
    std::memset(y, 0, (row1 - row0) * kPanel * sizeof(float));
    const Columns columns(epilogue_of(w), panel);
    const int64_t step = pattern_k(p);
    TileShapes shapes;
    for (int64_t k = 0, piece = 0; k < w.in_features; k += step) {
        const int64_t end = k + step < w.in_features ? k + step : w.in_features;
        spread_patterns<Isa, Bits>(w, panel, k, end, tile);
        int64_t count = 0;
        for (; piece < p.count && p.pieces[piece].k0 < end; ++piece) spans[count++] = span_of<Isa>(p, panel, piece, k, end);
        take_zeros<Isa>(w, spans, count, tile);
        count_alike(spans, count);
        for (int64_t i = 0; i < count; i += spans[i].like) {
            shapes.for_quads(quads_at_once(spans[i].depth));
            for (int64_t row = row0; row < row1; row += kTileRows) {
                const char* codes = static_cast<const char*>(p.codes) + row * p.code_stride + k;
                const PieceRows rows = p.rows.from(row, spans[i].index);
                float* to = y + (row - row0) * kPanel;
                if (rows.scale != nullptr) {
                    add_tiled_spans<Isa, true>(spans + i, spans[i].like, codes, p.code_stride, tile, rows, to);
                } else {
                    add_tiled_spans<Isa, false>(spans + i, spans[i].like, codes, p.code_stride, tile, rows, to);
                }
            }
        }
    }
    finish_coded<Isa>(p, columns, y, y_row0, y_row1);
}
