// Attention in bfloat16 by tiles: 16 rows at a time. Included into isa_amx.cpp inside an anonymous namespace, after tiles.h and
// attention.h.

// What attention.h needs to know. Only for pairs.
struct AttendsByTiles : Avx512Vnni {
    static constexpr int kAttendTall = kTileRows;
    static constexpr bool kAttendsByTiles = true;
};

// Sums of 16 columns over `steps` times 16 words: [16][16].
FXQUANT_INLINE void attend_column(const TileProduct& p, int64_t column, int64_t steps, float* sums) {
    const float *a = p.a, *b = p.b + column;
    const int64_t a_bytes = p.a_stride * 4, b_bytes = p.b_stride * 4;
    FXQUANT_TILE_ZERO(0);
    for (int64_t i = 0; i < steps; ++i, a += kTileRows, b += kTileRows * p.b_stride) {
        FXQUANT_TILE_LOAD(4, a, a_bytes);
        FXQUANT_TILE_LOAD(6, b, b_bytes);
        FXQUANT_TILE_DOT_PAIRS(0, 4, 6);
    }
    FXQUANT_TILE_STORE(0, sums, 64);
}

// Rows behind the last are read, as far as memory of the task goes, and come to nothing.
template <class Isa>
void attend_by_tiles(int64_t rows, int64_t vectors, const TileProduct& p) {
    constexpr int64_t kStep = 2 * kTileRows;  // values
    const int64_t steps = p.depth / kStep, rest = p.depth % kStep;
    alignas(64) float ones[kTileRows];
    const float* keep = p.keep;
    if (steps > 0) {
        alignas(64) float sums[4][kTileRows * 16];
        for (int64_t first = 0; first < vectors; first += 4) {
            const int64_t count = vectors - first < 4 ? vectors - first : 4;
            for (int64_t j = 0; j < count; ++j) attend_column(p, (first + j) * 16, steps, sums[j]);
            for (int64_t j = 0; j < count; ++j) {
                float* out = p.out + (first + j) * 16;
                for (int64_t r = 0; r < rows; ++r) {
                    float* to = out + r * p.out_stride;
                    const __m512 sum = _mm512_load_ps(sums[j] + r * 16);
                    if (keep == nullptr) _mm512_storeu_ps(to, _mm512_mul_ps(sum, _mm512_set1_ps(p.factor)));
                    else _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_loadu_ps(to), _mm512_set1_ps(keep[r]), sum));
                }
            }
        }
        for (float& one : ones) one = 1.0f;
        keep = ones;
    }
    for (int64_t r = 0; rest > 0 && r < rows; r += Isa::kFloatTall) {
        const int64_t words = steps * kTileRows;
        attend_product<Isa, true>(rows - r < Isa::kFloatTall ? rows - r : Isa::kFloatTall, vectors,
                                  {p.a + r * p.a_stride + words, p.a_stride, p.b + words * p.b_stride, p.b_stride, rest,
                                   p.out + r * p.out_stride, p.out_stride, keep + r, 1.0f});
    }
}

// Whether whole steps make up the scores, and whole tiles the results: what is left of keys alone is multiplied otherwise.
inline bool tiles_attend(const AttentionProblem& p) {
    return p.type == Float::bf16 && Avx512Vnni::adds_pairs() && p.width % (2 * kTileRows) == 0 && p.value_width % kTileRows == 0;
}
