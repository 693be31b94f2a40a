// AVX512 with VNNI: codes staged as u8 = code + 128, one vpdpbusd per 64 products.
// Included into isa_avx512vnni.cpp and isa_amx.cpp inside an anonymous namespace, after planes.h.

struct Avx512Vnni : Vectors<16> {
    static constexpr int kWidth = 16;
    using Code = uint8_t;
    using CodeVector = B;  // the low byte of code + 128 is the same, signed or not
    static constexpr int kCodeOffset = 128;
    static constexpr bool kMultipliesDigits = true;
    // 6 rows x 4 vectors are 24 sums; with 4 vectors of B and one broadcast they fill the 32 registers, and 24 products per
    // 10 loads keep both multiply ports busy.
    static constexpr int kTall = 6;
    static constexpr int kFloatTall = 6;
    static constexpr int kAttendTall = kFloatTall;
    static constexpr bool kAttendsByTiles = false;
    static constexpr int kFloatVectors = 4;
    static constexpr int kLoneVectors = 4;  // of one row
    static constexpr int kFused = 4;        // rows
    static constexpr double kProducts = 250, kFloatProducts = 60;  // a nanosecond: see launch.h
    static constexpr bool kScalesSums = true;

    static F fma(F a, F b, F c) { return bits<F>(_mm512_fmadd_ps(bits<__m512>(a), bits<__m512>(b), bits<__m512>(c))); }
    static F least(F a, F b) { return bits<F>(_mm512_min_ps(bits<__m512>(a), bits<__m512>(b))); }
    static F greatest(F a, F b) { return bits<F>(_mm512_max_ps(bits<__m512>(a), bits<__m512>(b))); }
    static constexpr bool kStoresUpper = true;
    static void store_upper(void* to, U a, U b) {
        alignas(64) static constexpr uint16_t kUpper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                            33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
        store(to, _mm512_permutex2var_epi16(bits<__m512i>(a), load<__m512i>(kUpper), bits<__m512i>(b)));
    }
    static constexpr bool kTakesBytes = true;
    template <class To>
    static To last_bytes(I v) {
        return bits<To>(_mm512_cvtepi32_epi8(bits<__m512i>(v)));
    }
    static F load_half(const void* from) { return bits<F>(_mm512_cvtph_ps(load<__m256i>(from))); }
    static void store_half(void* to, F v) {
        store(to, _mm512_cvtps_ph(bits<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }

    static constexpr bool kTestsBytes = true;
    static uint64_t bits_of_bytes(const uint8_t* bytes, int64_t count) {  // a bit for each that is not 0; count <= 64
        const __mmask64 there = count < 64 ? (uint64_t{1} << count) - 1 : ~uint64_t{0};
        const __m512i held = _mm512_maskz_loadu_epi8(there, bytes);
        return _mm512_test_epi8_mask(held, held);
    }

#if defined(__clang__) || __GNUC__ >= 11  // an assembler that knows them stands beside them
    static constexpr bool kAddsPairs = true;
    // Whether there is AVX512-BF16.
    static bool adds_pairs() {
        static const bool has = [] {
            unsigned a = 0, b = 0, c = 0, d = 0;
            return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 5 & 1) != 0;
        }();
        return has;
    }
    // sum + the products of both bfloat16 of each lane. Subnormals count as 0, and become it.
    static F add_pairs(F sum, F a, F b) {
        asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
        return sum;
    }
    // Rounded to bfloat16, to nearest even: lanes 2i and 2i + 1 of `low`, then `high`, are pair i.
    static F pair(F low, F high) {
        F pairs;
        asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(pairs) : "v"(high), "v"(low));
        return pairs;
    }
#else
    static constexpr bool kAddsPairs = false;
#endif

    // Values of 64 patterns: those in even and in odd bytes are looked up as bfloat16 in tables of 32 or 64, then widened.
    template <int Bits>
    struct Lookup {
        static constexpr int kTables = Bits <= 5 ? 1 : 1 << (Bits - 5);

        explicit Lookup(const CodedWeight& w) {
            for (int i = 0; i < kTables; ++i) table[i] = _mm512_loadu_si512(w.values + 32 * i);
        }

        __m512i find(__m512i codes) const {  // the low bits of each 16-bit lane; what stands above them is not looked at
            if constexpr (Bits <= 5) return _mm512_permutexvar_epi16(codes, table[0]);
            __m512i found[kTables / 2 + 1];
            FXQUANT_UNROLL for (int i = 0; i < kTables / 2; ++i)
                found[i] = _mm512_permutex2var_epi16(table[2 * i], codes, table[2 * i + 1]);
            FXQUANT_UNROLL for (int n = kTables / 4, bit = 64; n > 0; n /= 2, bit *= 2) {
                const __mmask32 upper = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(static_cast<short>(bit)));
                FXQUANT_UNROLL for (int i = 0; i < n; ++i)
                    found[i] = _mm512_mask_mov_epi16(found[2 * i], upper, found[2 * i + 1]);
            }
            return found[0];
        }

        void values(U codes, F* value) const {
            const U even = bits<U>(find(bits<__m512i>(codes)));
            const U odd = bits<U>(find(_mm512_srli_epi16(bits<__m512i>(codes), 8)));
            value[0] = bits<F>(even << 16);
            value[1] = bits<F>(odd << 16);
            value[2] = bits<F>(even & 0xffff0000u);
            value[3] = bits<F>(odd & 0xffff0000u);
        }

        __m512i table[kTables];
    };

    static constexpr int kTurned = 16;  // features at a time

    // line(i): four words of feature i. put(word j of each feature), j from 0 to 3.
    template <class Line, class Put>
    FXQUANT_INLINE void turn_words(Line line, Put put) {
        __m512i four[4];  // feature i of each four, a lane each
        FXQUANT_UNROLL for (int i = 0; i < 4; ++i) {
            four[i] = _mm512_castsi128_si512(bits<__m128i>(line(i)));
            four[i] = _mm512_inserti32x4(four[i], bits<__m128i>(line(i + 4)), 1);
            four[i] = _mm512_inserti32x4(four[i], bits<__m128i>(line(i + 8)), 2);
            four[i] = _mm512_inserti32x4(four[i], bits<__m128i>(line(i + 12)), 3);
        }
        const __m512i low01 = _mm512_unpacklo_epi32(four[0], four[1]), high01 = _mm512_unpackhi_epi32(four[0], four[1]);
        const __m512i low23 = _mm512_unpacklo_epi32(four[2], four[3]), high23 = _mm512_unpackhi_epi32(four[2], four[3]);
        put(_mm512_unpacklo_epi64(low01, low23));
        put(_mm512_unpackhi_epi64(low01, low23));
        put(_mm512_unpacklo_epi64(high01, high23));
        put(_mm512_unpackhi_epi64(high01, high23));
    }

    // line(i): the four quads of feature i. They go to [quads][64][4].
    template <class Line>
    static void turn_quads(Line line, uint8_t* to) {
        turn_words(line, [&](__m512i words) { store(std::exchange(to, to + kPanel * kQuad), words); });
    }

    // A tile takes so little of each row that no hardware fetches the next ones, and all of x seldom lies in L2: here the pass over
    // R rows brings those behind them.
    template <int R>
    FXQUANT_INLINE void fetch_next_rows(const void* rows, int64_t stride, int64_t bytes) {
        for (int64_t line = 0; line < bytes; line += 64) {
            FXQUANT_UNROLL for (int r = 0; r < R; ++r) __builtin_prefetch(static_cast<const char*>(rows) + (R + r) * stride + line);
        }
    }

    template <int R>
    FXQUANT_TILE void dot_patterns(const char* codes, int64_t stride, const uint8_t* b, int64_t depth, int32_t* acc, bool add) {
        fetch_next_rows<R>(codes, stride, depth * kQuad);
        __m512i sum[R][4];
        FXQUANT_UNROLL for (int r = 0; r < R; ++r) FXQUANT_UNROLL for (int j = 0; j < 4; ++j)
            sum[r][j] = add ? _mm512_load_si512(acc + r * kPanel + j * 16) : _mm512_setzero_si512();
        for (int64_t q = 0; q < depth; ++q, b += kPanel * kQuad) {
            __m512i pattern[4];
            FXQUANT_UNROLL for (int j = 0; j < 4; ++j) pattern[j] = _mm512_load_si512(b + j * 64);
            FXQUANT_UNROLL for (int r = 0; r < R; ++r) {
                const __m512i a = _mm512_set1_epi32(load<int32_t>(codes + r * stride + q * kQuad));
                FXQUANT_UNROLL for (int j = 0; j < 4; ++j) sum[r][j] = _mm512_dpbusd_epi32(sum[r][j], pattern[j], a);
            }
        }
        FXQUANT_UNROLL for (int r = 0; r < R; ++r) FXQUANT_UNROLL for (int j = 0; j < 4; ++j)
            _mm512_store_si512(acc + r * kPanel + j * 16, sum[r][j]);
    }

    // Begins sums with what undoes the patterns' zero.
    template <int R, bool Affine, class Span>
    FXQUANT_INLINE void begin_sums(const Span& s, const PieceRows& rows, __m512i (&sum)[R][4]) {
        FXQUANT_UNROLL for (int r = 0; r < R; ++r) {
            const __m512i begin = _mm512_set1_epi32(rows.begin[r * rows.count]);
            FXQUANT_UNROLL for (int j = 0; j < 4; ++j)
                sum[r][j] = Affine ? _mm512_mullo_epi32(_mm512_load_si512(s.zero + j * 16), begin) : begin;
        }
    }

    // y + scale * float(sums) [* x_scale].
    template <bool Grouped>
    FXQUANT_INLINE __m512 scaled(__m512 scale, __m512i sums, const float* x_scale, __m512 y) {
        const __m512 value = _mm512_cvtepi32_ps(sums);
        if constexpr (Grouped) return _mm512_fmadd_ps(_mm512_mul_ps(scale, value), _mm512_set1_ps(*x_scale), y);
        return _mm512_fmadd_ps(scale, value, y);
    }

    template <int R>
    FXQUANT_INLINE void add_quad(const __m512i (&pattern)[4], const char* codes, int64_t stride, __m512i (&sum)[R][4]) {
        FXQUANT_UNROLL for (int r = 0; r < R; ++r) {
            const __m512i a = _mm512_set1_epi32(load<int32_t>(codes + r * stride));
            // Not the intrinsic: where the sums are worked on after the loop, GCC 12 copies each of them to the stack in the loop.
            FXQUANT_UNROLL for (int j = 0; j < 4; ++j) asm("vpdpbusd %2, %1, %0" : "+v"(sum[r][j]) : "v"(pattern[j]), "v"(a));
        }
    }

    // Patterns that stay in registers while all rows use them: GCC 12 would load them again for each.
    FXQUANT_INLINE void hold_quad(const uint8_t* b, __m512i (&pattern)[4]) {
        FXQUANT_UNROLL for (int j = 0; j < 4; ++j) {
            pattern[j] = _mm512_load_si512(b + j * 64);
            asm("" : "+v"(pattern[j]));
        }
    }

    static constexpr int kUsual = 8;  // quads

    // Spans of whole kUsual quads: no loop whose end would often be guessed wrong, and 3 rows at a time leave room for y in registers.
    template <int R, bool Affine, bool Grouped, class Span>
    FXQUANT_TILE void dot_few_rows(const Span* spans, int64_t count, const char* codes, int64_t stride, const uint8_t* tile,
                                   PieceRows rows, float* y) {
        fetch_next_rows<R>(rows.begin, rows.count * static_cast<int64_t>(sizeof(int32_t)), 1);
        __m512 total[R][4];
        FXQUANT_UNROLL for (int r = 0; r < R; ++r) FXQUANT_UNROLL for (int j = 0; j < 4; ++j)
            total[r][j] = _mm512_load_ps(y + r * kPanel + j * 16);
        const uint8_t* b = tile + spans[0].quad0 * kPanel * kQuad;
        const char* a = codes + spans[0].quad0 * kQuad;
        const float* next = y + R * kPanel;
        for (const Span* end = spans + count; spans < end; ++spans) {
            __m512i sum[R][4];
            begin_sums<R, Affine>(*spans, rows, sum);
            const uint8_t* last = b + spans->depth * kPanel * kQuad;
            do {
                fetch_next_rows<R>(a, stride, 1);
                __builtin_prefetch(next);
                __builtin_prefetch(next + 16);
                FXQUANT_UNROLL for (int q = 0; q < kUsual; ++q) {
                    __m512i pattern[4];
                    hold_quad(b + q * kPanel * kQuad, pattern);
                    add_quad<R>(pattern, a + q * kQuad, stride, sum);
                }
                b += kUsual * kPanel * kQuad;
                a += kUsual * kQuad;
                next += 32;
            } while (b != last);
            FXQUANT_UNROLL for (int j = 0; j < 4; ++j) {
                const __m512 scale = _mm512_load_ps(spans->scale + j * 16);
                FXQUANT_UNROLL for (int r = 0; r < R; ++r)
                    total[r][j] = scaled<Grouped>(scale, sum[r][j], rows.scale + r * rows.count, total[r][j]);
            }
            rows = {rows.begin + 1, Grouped ? rows.scale + 1 : nullptr, rows.count};
        }
        FXQUANT_UNROLL for (int r = 0; r < R; ++r) FXQUANT_UNROLL for (int j = 0; j < 4; ++j)
            _mm512_store_ps(y + r * kPanel + j * 16, total[r][j]);
    }

    // The same into y in memory.
    template <bool Grouped, int R, class Span>
    FXQUANT_INLINE void end_sums_of(const Span& s, const __m512i (&sum)[R][4], const PieceRows& rows, float* y) {
        FXQUANT_UNROLL for (int j = 0; j < 4; ++j) {
            const __m512 scale = _mm512_load_ps(s.scale + j * 16);
            FXQUANT_UNROLL for (int r = 0; r < R; ++r) {
                float* at = y + r * kPanel + j * 16;
                _mm512_store_ps(at, scaled<Grouped>(scale, sum[r][j], rows.scale + r * rows.count, _mm512_load_ps(at)));
            }
        }
        asm volatile("" ::: "memory");  // y stays in memory: kept in registers from span to span it would drive out the sums
    }

    template <int R, class Span>
    FXQUANT_INLINE void end_sums(const Span& s, const __m512i (&sum)[R][4], const PieceRows& rows, float* y) {
        if (rows.scale != nullptr) return end_sums_of<true>(s, sum, rows, y);
        end_sums_of<false>(s, sum, rows, y);
    }

    template <int R, bool Affine, bool Grouped, class Span>
    FXQUANT_INLINE void dot_usual_spans(const Span* spans, int64_t count, const char* codes, int64_t stride, const uint8_t* tile,
                                        const PieceRows& rows, float* y) {
        constexpr int kHigh = R > 3 ? (R + 1) / 2 : R;
        dot_few_rows<kHigh, Affine, Grouped>(spans, count, codes, stride, tile, rows, y);
        if constexpr (R > kHigh) {
            dot_few_rows<R - kHigh, Affine, Grouped>(spans, count, codes + kHigh * stride, stride, tile, rows.from(kHigh, 0),
                                                     y + kHigh * kPanel);
        }
    }


    // Spans of one tile of patterns, of one depth. rows: from the first one on.
    template <int R, bool Affine, class Span>
    FXQUANT_TILE void dot_spans(const Span* spans, int64_t count, const char* codes, int64_t stride, const uint8_t* tile,
                                const PieceRows& rows, float* y) {
        if (spans[0].depth % kUsual == 0) {
            if (rows.scale != nullptr) return dot_usual_spans<R, Affine, true>(spans, count, codes, stride, tile, rows, y);
            return dot_usual_spans<R, Affine, false>(spans, count, codes, stride, tile, rows, y);
        }
        for (int64_t i = 0; i < count; ++i) {
            const Span& s = spans[i];
            __m512i sum[R][4];
            begin_sums<R, Affine>(s, rows.from(0, i), sum);
            const uint8_t* b = tile + s.quad0 * kPanel * kQuad;
            const char* a = codes + s.quad0 * kQuad;
            const uint8_t* end = b + s.depth * kPanel * kQuad;
            fetch_next_rows<R>(a, stride, s.depth * kQuad);
            do {
                __m512i pattern[4];
                FXQUANT_UNROLL for (int j = 0; j < 4; ++j) pattern[j] = _mm512_load_si512(b + j * 64);
                add_quad<R>(pattern, a, stride, sum);
                b += kPanel * kQuad;
                a += kQuad;
            } while (b != end);
            end_sums<R>(s, sum, rows.from(0, i), y);
        }
    }

    template <int R, int Bits>
    FXQUANT_INLINE void add_planes(int64_t depth, const char* codes, int64_t stride, const uint8_t* block, int64_t ahead, __m512i (&sum)[R][4]) {
        for (int64_t q = 0; q < depth; q += 2, block += Bits * kPanel, codes += kBlock) {
            FXQUANT_UNROLL for (int row = 0; row < Bits; ++row) __builtin_prefetch(block + ahead + row * kPanel, 0, 2);
            __m512i pattern[4];
            FXQUANT_UNROLL for (int j = 0; j < 4; ++j) pattern[j] = bits<__m512i>(patterns<U, Bits>(block, j, 0));
            add_quad<R>(pattern, codes, stride, sum);
            if (q + 1 == depth) break;
            FXQUANT_UNROLL for (int j = 0; j < 4; ++j) pattern[j] = bits<__m512i>(patterns<U, Bits>(block, 4 + j, 0));
            add_quad<R>(pattern, codes + kQuad, stride, sum);
        }
    }

    // A span that is a whole piece, from its planes.
    template <int R, int Bits, bool Affine, class Span>
    FXQUANT_TILE void dot_planes(const Span& s, const char* codes, int64_t stride, const uint8_t* block, const PieceRows& rows,
                                 float* y) {
        __m512i sum[R][4];
        begin_sums<R, Affine>(s, rows, sum);
        add_planes<R, Bits>(s.depth, codes, stride, block, kFetchAhead, sum);
        end_sums<R>(s, sum, rows, y);
    }

    // The same, its sums times the multiples of a weight in steps: exact, into integers. scales: 64 bfloat16; in_one: see Multiples.
    template <int R, int Bits>
    FXQUANT_TILE void dot_stepped(const uint16_t* scales, const float* in_one, int64_t depth, const char* codes, int64_t stride,
                                  const uint8_t* block, int64_t ahead, const PieceRows& rows, int32_t* y) {
        __m512i sum[R][4];
        FXQUANT_UNROLL for (int r = 0; r < R; ++r) FXQUANT_UNROLL for (int j = 0; j < 4; ++j)
            sum[r][j] = _mm512_set1_epi32(rows.begin[r * rows.count]);
        add_planes<R, Bits>(depth, codes, stride, block, ahead, sum);
        FXQUANT_UNROLL for (int j = 0; j < 4; ++j) {
            const __m512 scale = bits<__m512>(load_float<Avx512Vnni, Float::bf16>(scales + j * 16));
            const __m512i by = _mm512_cvtps_epi32(_mm512_mul_ps(scale, _mm512_load_ps(in_one + j * 16)));
            FXQUANT_UNROLL for (int r = 0; r < R; ++r) {
                int32_t* at = y + r * kPanel + j * 16;
                _mm512_store_si512(at, _mm512_add_epi32(_mm512_load_si512(at), _mm512_mullo_epi32(by, sum[r][j])));
            }
        }
        asm volatile("" ::: "memory");  // as in end_sums_of
    }

    static constexpr bool kDotsFeatures = true;
    // R rows of codes x the codes of features as they stand in a compact panel, one row after another.
    template <int R>
    FXQUANT_TILE void dot_features(const char* codes, int64_t stride, const CompactRows& rows, int32_t* acc) {
        const __m512i offset = _mm512_set1_epi8(static_cast<char>(kCodeOffset));
        for (int64_t c = 0; c < rows.features; ++c) {
            const uint8_t* feature = rows.codes + c * rows.row_bytes;
            __m512i sum[R], of_offset = _mm512_setzero_si512();
            FXQUANT_UNROLL for (int r = 0; r < R; ++r) sum[r] = of_offset;
            for (int64_t k = 0; k < rows.in_features; k += 64) {
                const int64_t left = rows.in_features - k;
                const __mmask64 there = left < 64 ? (uint64_t{1} << left) - 1 : ~uint64_t{0};
                const __m512i b = _mm512_maskz_loadu_epi8(there, feature + k);
                FXQUANT_UNROLL for (int r = 0; r < R; ++r)
                    sum[r] = _mm512_dpbusd_epi32(sum[r], _mm512_maskz_loadu_epi8(there, codes + r * stride + k), b);
                of_offset = _mm512_dpbusd_epi32(of_offset, offset, b);
            }
            FXQUANT_UNROLL for (int r = 0; r < R; ++r) acc[r * kPanel + c] = _mm512_reduce_add_epi32(_mm512_sub_epi32(sum[r], of_offset));
        }
    }

    // One quad of B x R rows.
    template <int R>
    FXQUANT_INLINE void dot_quad(const char* codes, int64_t stride, const int8_t* b, __m512i (&sum)[R][4]) {
        const __m512i b0 = _mm512_loadu_si512(b), b1 = _mm512_loadu_si512(b + 64);
        const __m512i b2 = _mm512_loadu_si512(b + 128), b3 = _mm512_loadu_si512(b + 192);
        FXQUANT_UNROLL for (int r = 0; r < R; ++r) {
            const __m512i a = _mm512_set1_epi32(load<int32_t>(codes + r * stride));
            sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], a, b0);
            sum[r][1] = _mm512_dpbusd_epi32(sum[r][1], a, b1);
            sum[r][2] = _mm512_dpbusd_epi32(sum[r][2], a, b2);
            sum[r][3] = _mm512_dpbusd_epi32(sum[r][3], a, b3);
        }
    }

    // Fetch: lines of `fetch`, as many as B has. Else B itself comes from memory, in two streams, its halves, as a core reads those
    // faster than one.
    template <int R, bool Fetch>
    FXQUANT_TILE void dot_loop(const char* codes, int64_t stride, const int8_t* b, int64_t depth, int32_t* acc, bool add,
                               const int8_t* fetch) {
        constexpr int64_t kBytes = kPanel * kQuad;
        __m512i sum[R][4];
        FXQUANT_UNROLL for (int r = 0; r < R; ++r) FXQUANT_UNROLL for (int j = 0; j < 4; ++j)
            sum[r][j] = add ? _mm512_load_si512(acc + r * kPanel + j * 16) : _mm512_setzero_si512();
        int64_t q = 0;
        for (const int64_t half = depth / 2; !Fetch && q < half; ++q) {
            FXQUANT_UNROLL for (int s = 0; s < 2; ++s) {
                const int8_t* at = b + (s * half + q) * kBytes;
                FXQUANT_UNROLL for (int line = 0; line < kBytes; line += 64) __builtin_prefetch(at + kStreamAhead + line);
                dot_quad<R>(codes + (s * half + q) * kQuad, stride, at, sum);
            }
        }
        for (q *= 2; q < depth; ++q) {
            if constexpr (Fetch) {
                _mm_prefetch(reinterpret_cast<const char*>(fetch), _MM_HINT_T1);
                fetch += 64;
            }
            dot_quad<R>(codes + q * kQuad, stride, b + q * kBytes, sum);
        }
        FXQUANT_UNROLL for (int r = 0; r < R; ++r) FXQUANT_UNROLL for (int j = 0; j < 4; ++j)
            _mm512_store_si512(acc + r * kPanel + j * 16, sum[r][j]);
    }

    template <int R>
    static void dot(const char* codes, int64_t stride, const int8_t* b, int64_t depth, int32_t* acc, bool add,
                    const int8_t* fetch) {
        if (fetch != nullptr) return dot_loop<R, true>(codes, stride, b, depth, acc, add, fetch);
        return dot_loop<R, false>(codes, stride, b, depth, acc, add, fetch);
    }
};
