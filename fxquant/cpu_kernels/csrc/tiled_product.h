// The int8 product of several rows by tiles. Included into isa_amx.cpp inside an anonymous namespace, after tiles.h and products.h.

constexpr int64_t kBytesOfSums = kPanel * sizeof(int32_t), kBytesOfColumns = kPanel * kQuad;  // from one row to the next

// Registers 0 to 3, from sums or from nothing.
FXQUANT_INLINE void begin_tiles(bool add, const int32_t* first, const int32_t* second, const int32_t* third, const int32_t* fourth) {
    if (add) {
        FXQUANT_TILE_LOAD(0, first, kBytesOfSums);
        FXQUANT_TILE_LOAD(1, second, kBytesOfSums);
        FXQUANT_TILE_LOAD(2, third, kBytesOfSums);
        FXQUANT_TILE_LOAD(3, fourth, kBytesOfSums);
    } else {
        FXQUANT_TILE_ZERO(0);
        FXQUANT_TILE_ZERO(1);
        FXQUANT_TILE_ZERO(2);
        FXQUANT_TILE_ZERO(3);
    }
}

FXQUANT_INLINE void end_tiles(int32_t* first, int32_t* second, int32_t* third, int32_t* fourth) {
    FXQUANT_TILE_STORE(0, first, kBytesOfSums);
    FXQUANT_TILE_STORE(1, second, kBytesOfSums);
    FXQUANT_TILE_STORE(2, third, kBytesOfSums);
    FXQUANT_TILE_STORE(3, fourth, kBytesOfSums);
}

// Sums of 17 to 32 rows x 32 columns: registers [2][2]. codes: of the rows, `stride` bytes apart; b: [steps * 16][64][4].
FXQUANT_TILE void dot_tiles_high(const char* codes, int64_t stride, const int8_t* b, int64_t steps, int32_t* acc, bool add,
                                 Ahead& ahead) {
    int32_t* lower = acc + kTileRows * kPanel;
    begin_tiles(add, acc, acc + 16, lower, lower + 16);
    for (int64_t i = 0; i < steps; ++i, codes += 64, b += kTileQuads * kBytesOfColumns) {
        FXQUANT_TILE_LOAD(4, codes, stride);
        FXQUANT_TILE_LOAD(6, b, kBytesOfColumns);
        FXQUANT_TILE_DOT(0, 4, 6);
        FXQUANT_TILE_LOAD(7, b + 64, kBytesOfColumns);
        FXQUANT_TILE_DOT(1, 4, 7);
        FXQUANT_TILE_LOAD(5, codes + kTileRows * stride, stride);
        FXQUANT_TILE_DOT(2, 5, 6);
        FXQUANT_TILE_DOT(3, 5, 7);
        ahead.fetch();
    }
    end_tiles(acc, acc + 16, lower, lower + 16);
}

// Sums of up to 16 rows x 64 columns: registers [1][4].
FXQUANT_TILE void dot_tiles_low(const char* codes, int64_t stride, const int8_t* b, int64_t steps, int32_t* acc, bool add,
                                Ahead& ahead) {
    begin_tiles(add, acc, acc + 16, acc + 32, acc + 48);
    for (int64_t i = 0; i < steps; ++i, codes += 64, b += kTileQuads * kBytesOfColumns) {
        FXQUANT_TILE_LOAD(4, codes, stride);
        FXQUANT_TILE_LOAD(5, b, kBytesOfColumns);
        FXQUANT_TILE_LOAD(6, b + 64, kBytesOfColumns);
        FXQUANT_TILE_DOT(0, 4, 5);
        FXQUANT_TILE_LOAD(7, b + 128, kBytesOfColumns);
        FXQUANT_TILE_DOT(1, 4, 6);
        FXQUANT_TILE_LOAD(5, b + 192, kBytesOfColumns);
        FXQUANT_TILE_DOT(2, 4, 7);
        FXQUANT_TILE_DOT(3, 4, 5);
        ahead.fetch();
    }
    end_tiles(acc, acc + 16, acc + 32, acc + 48);
}

// Quads of one depth block: 32 columns of it are 16 KiB, in half the sets of the L1 cache, where they stay while all row groups
// pass over them.
constexpr int64_t kTiledQuads = 128;
constexpr int64_t kTiledRows = 2 * kTileRows;

// int8_product of rows enough for tiles.
template <class Isa>
void tiled_product(const Int8Problem& p, const Task& t) {
    PanelQuads<Isa> b(p.weight, t.panel);
    const Columns columns(p.weight, t.panel);
    alignas(64) int32_t acc[kRowBlock * kPanel];
    alignas(64) int32_t shift[kPanel] = {};  // sums of the columns, in the end times the offset
    if (b.full) full_sums<Isa>(p.weight, b, shift);
    const int64_t block = b.full ? kTiledQuads : PanelQuads<Isa>::kSpread;
    const int64_t digits = p.digits, row0 = t.row0 * digits, row1 = t.row1 * digits;  // rows of codes
    const int64_t groups = (row1 - row0 + kTiledRows - 1) / kTiledRows;
    TileShapes shapes;
    for (int64_t q = 0; q < b.depth; q += block) {
        const int64_t n = b.depth - q < block ? b.depth - q : block, steps = n / kTileQuads, left = n % kTileQuads;
        const bool last = q + n == b.depth;
        const int8_t* columns_of_b = b.at(q);
        if (!b.full) add_sums<Isa>(columns_of_b, n, shift, q > 0);
        if (last) times_offset<Isa>(shift);
        // Meanwhile the next block of columns comes into L2, wherever it is.
        Ahead ahead = {last ? t.next : columns_of_b + n * kPanel * kQuad, 0};
        const int64_t passes = 2 * groups * steps;
        if (b.full && ahead.at != nullptr && passes > 0) ahead.lines = (n * kPanel * kQuad / 64 + passes - 1) / passes;
        // All rows x `count` products of `wide` quads each, from quad `first` of the block on.
        const auto pass = [&](int64_t first, int64_t count, int64_t wide) {
            const bool add = q + first > 0, ends = last && first + count * wide == n;
            const int8_t* at = columns_of_b + first * kPanel * kQuad;
            for (int half = 0; half < 2; ++half) {
                for (int64_t row = row0; row < row1; row += kTiledRows) {
                    const int64_t height = row1 - row < kTiledRows ? row1 - row : kTiledRows;
                    const char* a = static_cast<const char*>(p.codes) + row * p.code_stride + (q + first) * kQuad;
                    int32_t* sums = acc + (row - row0) * kPanel;
                    shapes.for_rows(height, wide);
                    if (height > kTileRows) {
                        dot_tiles_high(a, p.code_stride, at + half * 128, count, sums + half * 32, add, ahead);
                    } else if (half == 1) {
                        dot_tiles_low(a, p.code_stride, at, count, sums, add, ahead);
                    }
                    if (half == 0 || !ends || digits > 1) continue;
                    for_groups(row, row + height, Isa::kTall, [&](int64_t, int64_t of, int64_t rows) {
                        const GroupSums group{acc + (of - row0) * kPanel, shift, p.x_scale + of, rows};
                        finish_group<Isa>(columns, group, p.out, p.out_type, of, p.weight.out_features);
                    });
                }
            }
        };
        if (steps > 0) pass(0, steps, kTileQuads);
        if (left > 0) pass(steps * kTileQuads, 1, left);
    }
    if (digits > 1) finish_digits<Isa>(p, columns, acc, shift, t.row0, t.row1);
}
