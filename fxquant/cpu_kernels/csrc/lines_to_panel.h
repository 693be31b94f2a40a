// Whole cache lines of the rows of a checkpoint into full panels, 16 features at a time. Included into isa_avx512vnni.cpp after
// avx512vnni.h and turn_words.h.

constexpr int64_t kLineAhead = 2 * kStripBytes;

// Past: past the caches. The lines of a panel are written whole, so that none need be read before, but one that a cache holds has
// to leave it.
template <int Bits, bool Past>
void lines_to_panel(const uint8_t* rows, int64_t row_bytes, int64_t lines, uint32_t flips, uint8_t* panel, int32_t* sums) {
    typedef uint32_t Words __attribute__((vector_size(64)));
    using Line16 = Lane16<uint8_t>::V;
    for (int64_t c = 0; c < kPanel; c += Avx512Vnni::kTurned) {
        __m512i sum = _mm512_setzero_si512();
        const uint8_t* from = rows + c * row_bytes;
        uint8_t* to = panel + c * kQuad;
        for (int64_t line = 0; line < lines; ++line) {
            FXQUANT_UNROLL_ROWS for (int64_t i = 0; i < Avx512Vnni::kTurned; ++i) __builtin_prefetch(from + i * row_bytes + kLineAhead);
            for (int64_t quarter = 0; quarter < 4; ++quarter, from += 16) {
                const auto turned = [&](__m512i words) {
                    words = bits<__m512i>(to_panel<Bits>(bits<Words>(words), flips));
                    sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), words);
                    Past ? _mm512_stream_si512(reinterpret_cast<__m512i*>(to), words) : store(to, words);
                    to += kPanel * kQuad;
                };
                Avx512Vnni::turn_words([&](int i) { return load<Line16>(from + i * row_bytes); }, turned);
            }
        }
        if (sums != nullptr) store(sums + c, _mm512_add_epi32(sum, load<__m512i>(sums + c)));
    }
    if constexpr (Past) _mm_sfence();
}

void turn_lines(const uint8_t* rows, int64_t row_bytes, int64_t lines, int64_t bits, uint32_t flips, bool past, uint8_t* panel,
                int32_t* sums) {
    const auto turn = past ? (bits == 4 ? lines_to_panel<4, true> : lines_to_panel<8, true>)
                           : (bits == 4 ? lines_to_panel<4, false> : lines_to_panel<8, false>);
    turn(rows, row_bytes, lines, flips, panel, sums);
}
