// The int8 product, one task at a time: rows of codes, or digits of floats, with int32 sums.
// Included into each isa_*.cpp inside an anonymous namespace, after vectors.h.

// Rows r0 <= r < r1 in groups of at most Isa's tile height, as equal as they come: 7 rows are 4 + 3, not 6 + 1.
template <class Body>
inline void for_groups(int64_t r0, int64_t r1, int64_t tallest, Body body) {
    const int64_t rows = r1 - r0, groups = (rows + tallest - 1) / tallest;
    for (int64_t g = 0, row = r0; g < groups; ++g) {
        const int64_t height = rows / groups + (g < rows % groups ? 1 : 0);
        body(g, row, height);
        row += height;
    }
}

// The int8 product of up to 64 columns and one row group over `depth` quads. See Isa::dot.
template <class Isa, int R = Isa::kTall>
inline void dot(int64_t rows, const char* codes, int64_t stride, const int8_t* b, int64_t depth, int32_t* acc, bool add,
                const int8_t* fetch) {
    if (rows == R) return Isa::template dot<R>(codes, stride, b, depth, acc, add, fetch);
    if constexpr (R > 1) dot<Isa, R - 1>(rows, codes, stride, b, depth, acc, add, fetch);
}

// Depth blocks of the int8 product, in quads: 1024 x 64 x 4 codes are 256 KiB of one panel, which stays in an L2 of
// 512 KiB or more while all row groups pass over it. (L1-sized blocks cost more in reloaded sums than they save.)
constexpr int64_t kDepthQuads = 1024;

// Adds the sums of the columns' codes, which undo the offset of staged codes; `add` false begins them.
template <class Isa>
void add_sums(const int8_t* b, int64_t depth, int32_t* sums, bool add) {
    if constexpr (Isa::kCodeOffset == 0) return;
    constexpr int64_t kPiece = PanelQuads<Isa>::kSpread;
    char ones[kPiece * kQuad];
    std::memset(ones, 1, sizeof(ones));
    for (int64_t q = 0; q < depth; q += kPiece) {
        dot<Isa>(1, ones, 0, b + q * kPanel * kQuad, depth - q < kPiece ? depth - q : kPiece, sums, add || q > 0, nullptr);
    }
}

// Those of a whole full panel.
template <class Isa>
void full_sums(const Weight& w, const PanelQuads<Isa>& b, int32_t* sums) {
    if (!stores_sums(w.in_features)) return add_sums<Isa>(b.packed, b.depth, sums, false);
    std::memcpy(sums, b.packed + b.depth * kPanel * kQuad, kPanel * sizeof(int32_t));
}

// Times the offset of staged codes, wrapped.
template <class Isa>
inline void times_offset(int32_t* sums) {
    for (int64_t c = 0; c < kPanel; ++c) {
        sums[c] = static_cast<int32_t>(static_cast<uint32_t>(sums[c]) * static_cast<uint32_t>(Isa::kCodeOffset));
    }
}

// The sums of a row's digits, [digits, 64], each less `shift`, as one number of each column: exact, as a double holds 53 bits,
// and rounded once.
template <class Sum>
FXQUANT_TILE void join_digits(int64_t digits, const Sum* sums, const int32_t* shift, float* joined) {
    using Wraps = typename std::make_unsigned<Sum>::type;
    constexpr double kUnit = int64_t{1} << kDigitBits;
    alignas(64) double total[kPanel] = {};
    for (int64_t i = digits - 1; i >= 0; --i) {
        const Sum* of = sums + i * kPanel;
        for (int64_t c = 0; c < kPanel; ++c) {
            const auto sum = static_cast<Sum>(static_cast<Wraps>(of[c]) - static_cast<Wraps>(shift[c]));
            total[c] = total[c] * kUnit + static_cast<double>(sum);
        }
    }
    for (int64_t c = 0; c < kPanel; ++c) joined[c] = static_cast<float>(total[c]);
}

// Rows row0 <= r < row1 of y, all of whose sums are there: [digits of a row, 64], one row after another.
template <class Isa, class Sum>
void finish_digits(const Int8Problem& p, const Columns& columns, const Sum* sums, const int32_t* shift, int64_t row0, int64_t row1) {
    alignas(64) float joined[Isa::kTall * kPanel];
    for_groups(row0, row1, Isa::kTall, [&](int64_t, int64_t row, int64_t rows) {
        for (int64_t r = 0; r < rows; ++r, sums += p.digits * kPanel) join_digits(p.digits, sums, shift, joined + r * kPanel);
        finish_group<Isa>(columns, GroupFloats{joined, p.x_scale + row, rows}, p.out, p.out_type, row, p.weight.out_features);
    });
}

// The same product where K is beyond kWrapSafe: int64 sums over pieces that cannot overflow by themselves.
template <class Isa>
void int8_product_wide(const Int8Problem& p, const Task& t, PanelQuads<Isa>& b, const Columns& columns) {
    static_assert(kPanel % Isa::kWidth == 0, "whole vectors in a panel");
    const int64_t step = b.full ? 8192 : PanelQuads<Isa>::kSpread;  // quads: 32768 * 255 * 128 < 2^31
    const char* codes = static_cast<const char*>(p.codes);
    const int64_t digits = p.digits, tallest = Isa::kTall / digits;
    alignas(64) int32_t piece[Isa::kTall * kPanel];
    alignas(64) int32_t sums[kPanel] = {};
    alignas(64) const int32_t nothing[kPanel] = {};
    if (b.full) full_sums<Isa>(p.weight, b, sums);
    for (int64_t q = 0; !b.full && q < b.depth; q += step) add_sums<Isa>(b.at(q), b.depth - q < step ? b.depth - q : step, sums, q > 0);
    for_groups(t.row0, t.row1, tallest, [&](int64_t, int64_t row, int64_t rows) {
        const int64_t height = rows * digits;
        int64_t total[Isa::kTall * kPanel];
        for (int64_t i = 0; i < height * kPanel; ++i) total[i] = -int64_t{Isa::kCodeOffset} * sums[i % kPanel];
        for (int64_t q = 0; q < b.depth; q += step) {
            const int64_t n = b.depth - q < step ? b.depth - q : step;
            const char* a = codes + row * digits * p.code_stride + q * kQuad * static_cast<int64_t>(sizeof(typename Isa::Code));
            const int8_t* at = b.at(q);
            dot<Isa>(height, a, p.code_stride, at, n, piece, false, at);
            for (int64_t i = 0; i < height * kPanel; ++i) total[i] += piece[i];
        }
        finish_digits<Isa>(p, columns, total, nothing, row, row + rows);
    });
}

template <class Isa>
void int8_product(const Int8Problem& p, const Task& t) {
    PanelQuads<Isa> b(p.weight, t.panel);
    const Columns columns(p.weight, t.panel);
    if (p.weight.in_features > kWrapSafe) return int8_product_wide<Isa>(p, t, b, columns);

    const int64_t digits = p.digits, row0 = t.row0 * digits, row1 = t.row1 * digits;  // rows of codes
    alignas(64) int32_t acc[kRowBlock * kPanel];
    alignas(64) int32_t shift[kPanel] = {};  // sums of the columns, in the end times the offset, wrapped
    const auto undo_offset = [&] {  // after the products, which bring what is read here
        if (b.full) full_sums<Isa>(p.weight, b, shift);
        times_offset<Isa>(shift);
    };
    if constexpr (Isa::kDotsFeatures) {
        if (!b.full && b.coded == nullptr && t.row1 - t.row0 == 1) {  // to spread the panel would take longer than all products
            std::memset(acc, 0, digits * kPanel * sizeof(int32_t));
            const char* a = static_cast<const char*>(p.codes) + row0 * p.code_stride;
            if (digits == 1) Isa::template dot_features<1>(a, p.code_stride, b.rows, acc);
            if (digits == 2) Isa::template dot_features<2>(a, p.code_stride, b.rows, acc);
            if (digits == 3) Isa::template dot_features<3>(a, p.code_stride, b.rows, acc);
            return finish_digits<Isa>(p, columns, acc, shift, t.row0, t.row1);
        }
    }
    const int64_t depth = b.depth, most = kDepthQuads + kDepthQuads / 2, spread = PanelQuads<Isa>::kSpread;
    const int64_t pieces = b.full ? (depth + most - 1) / most : (depth + spread - 1) / spread;
    const bool holds_sums = pieces > 1 || digits > 1;
    // While the row groups pass over this panel, each of the first four brings a quarter of the next one into L2. A lone
    // group does not: it is waiting for memory itself.
    const int64_t fetch_step = depth * kPanel * kQuad / 4;
    const int8_t* next = row1 - row0 > Isa::kTall ? t.next : nullptr;
    for (int64_t piece = 0; piece < pieces; ++piece) {
        const bool last = piece + 1 == pieces;
        const int64_t q0 = b.full ? depth * piece / pieces : piece * spread;
        const int64_t q1 = last ? depth : b.full ? depth * (piece + 1) / pieces : q0 + spread;
        const int8_t* codes_of_b = b.at(q0);
        if (!b.full) add_sums<Isa>(codes_of_b, q1 - q0, shift, piece > 0);
        for_groups(row0, row1, Isa::kTall, [&](int64_t g, int64_t row, int64_t height) {
            const char* a = static_cast<const char*>(p.codes) + row * p.code_stride +
                            q0 * kQuad * static_cast<int64_t>(sizeof(typename Isa::Code));
            int32_t* sums = acc + (holds_sums ? (row - row0) * kPanel : 0);
            const int8_t* fetch = next == nullptr ? nullptr : next + (g < 3 ? g : 3) * fetch_step;
            dot<Isa>(height, a, p.code_stride, codes_of_b, q1 - q0, sums, piece > 0, fetch);
            if (!last || digits > 1) return;
            if (g == 0) undo_offset();
            finish_group<Isa>(columns, GroupSums{sums, shift, p.x_scale + row, height}, p.out, p.out_type, row, p.weight.out_features);
        });
    }
    if (digits == 1) return;
    undo_offset();
    finish_digits<Isa>(p, columns, acc, shift, t.row0, t.row1);
}
