// AVX2: codes staged as int16, pairs of products by vpmaddwd.
// Included into isa_avx2.cpp and isa_avxvnni.cpp inside an anonymous namespace, after planes.h.

struct Avx2 : Vectors<8> {
    static constexpr int kWidth = 8;
    using Code = int16_t;
    using CodeVector = S;
    static constexpr int kCodeOffset = 0;
    static constexpr int kTall = 4;          // 4 rows x 2 vectors of pair sums, 2 of B, 1 broadcast: 11 of 16 registers
    static constexpr int kFloatTall = 6;     // 6 rows x 2 vectors: 12 sums, 2 of B, 1 broadcast
    static constexpr int kAttendTall = kFloatTall;
    static constexpr bool kAttendsByTiles = false;
    static constexpr int kFloatVectors = 2;
    static constexpr int kLoneVectors = 8;   // of one row: as many sums as keep both units busy
    static constexpr int kFused = 2;
    static constexpr double kProducts = 60, kFloatProducts = 40;
    static constexpr bool kScalesSums = false;
    static constexpr bool kMultipliesDigits = false;
    static constexpr bool kRaisesCodes = true;
    static constexpr bool kDotsFeatures = false;
    static constexpr bool kAddsPairs = false;
    static constexpr bool kTestsBytes = false;

    static F fma(F a, F b, F c) { return bits<F>(_mm256_fmadd_ps(bits<__m256>(a), bits<__m256>(b), bits<__m256>(c))); }
    // Byte i of each lane, in its top byte.
    template <int i>
    static U raise(U held) {
        if constexpr (i == 3) return held & 0xff000000u;
        constexpr char n = -1;  // a zero
        const __m256i from = _mm256_setr_epi8(n, n, n, i, n, n, n, i + 4, n, n, n, i + 8, n, n, n, i + 12, n, n, n, i, n, n, n, i + 4,
                                              n, n, n, i + 8, n, n, n, i + 12);
        return bits<U>(_mm256_shuffle_epi8(bits<__m256i>(held), from));
    }
    static F load_half(const void* from) { return bits<F>(_mm256_cvtph_ps(load<__m128i>(from))); }
    static void store_half(void* to, F v) {
        store(to, _mm256_cvtps_ph(bits<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }

    static constexpr int64_t kFetch = int64_t{1} << 14;  // bytes ahead in B that are fetched for one row, which waits for memory

    template <int Bits>
    using Lookup = PlainLookup<Avx2, Bits>;
    using Nibbles = PlainNibbles<Avx2>;

    static constexpr int kTurned = 4;  // features at a time

    // line(i): the four quads of feature i. They go to [quads][64][4].
    template <class Line>
    static void turn_quads(Line line, uint8_t* to) {
        turn_tile<uint32_t>(line, kTurned, kSpreadK / kQuad, reinterpret_cast<uint32_t*>(to), kPanel);
    }

    static __m256i widen_bytes(const int8_t* b) { return _mm256_cvtepi8_epi16(load<__m128i>(b)); }
    static __m256i widen_bytes(const uint8_t* b) { return _mm256_cvtepu8_epi16(load<__m128i>(b)); }

    // 8 columns x R rows over n quads; each int32 lane holds the sum of one pair of k, two lanes make a column.
    template <int R, class Byte>
    FXQUANT_TILE void dot_columns(const char* codes, int64_t stride, const Byte* b, int64_t n, int32_t* acc, bool add) {
        __m256i low[R], high[R];
        FXQUANT_UNROLL for (int r = 0; r < R; ++r) low[r] = high[r] = _mm256_setzero_si256();
        for (int64_t q = 0; q < n; ++q) {
            const __m256i b_low = widen_bytes(b + q * kPanel * kQuad);
            const __m256i b_high = widen_bytes(b + q * kPanel * kQuad + 16);
            FXQUANT_UNROLL for (int r = 0; r < R; ++r) {
                const __m256i a = _mm256_set1_epi64x(load<int64_t>(codes + r * stride + q * kQuad * 2));
                low[r] = _mm256_add_epi32(low[r], _mm256_madd_epi16(a, b_low));
                high[r] = _mm256_add_epi32(high[r], _mm256_madd_epi16(a, b_high));
            }
        }
        FXQUANT_UNROLL for (int r = 0; r < R; ++r) {
            // hadd works within 128-bit halves: columns 0 1 4 5 | 2 3 6 7
            __m256i sum = _mm256_permute4x64_epi64(_mm256_hadd_epi32(low[r], high[r]), 0xd8);
            if (add) sum = _mm256_add_epi32(sum, load<__m256i>(acc + r * kPanel));
            store(acc + r * kPanel, sum);
        }
    }

    // One row x 32 columns over n quads: half of each line of B, one after another.
    template <class Byte>
    FXQUANT_TILE void dot_row(const char* codes, const Byte* b, int64_t n, int32_t* acc, bool add) {
        __m256i low[4], high[4];
        FXQUANT_UNROLL for (int j = 0; j < 4; ++j) low[j] = high[j] = _mm256_setzero_si256();
        for (int64_t q = 0; q < n; ++q, b += kPanel * kQuad) {
            const __m256i a = _mm256_set1_epi64x(load<int64_t>(codes + q * kQuad * 2));
            __builtin_prefetch(b + kFetch);
            __builtin_prefetch(b + kFetch + 64);
            FXQUANT_UNROLL for (int j = 0; j < 4; ++j) {
                low[j] = _mm256_add_epi32(low[j], _mm256_madd_epi16(a, widen_bytes(b + j * 32)));
                high[j] = _mm256_add_epi32(high[j], _mm256_madd_epi16(a, widen_bytes(b + j * 32 + 16)));
            }
        }
        FXQUANT_UNROLL for (int j = 0; j < 4; ++j) {
            __m256i sum = _mm256_permute4x64_epi64(_mm256_hadd_epi32(low[j], high[j]), 0xd8);
            if (add) sum = _mm256_add_epi32(sum, load<__m256i>(acc + j * 8));
            store(acc + j * 8, sum);
        }
    }

    template <int R>
    static void dot(const char* codes, int64_t stride, const int8_t* b, int64_t depth, int32_t* acc, bool add, const int8_t*) {
        dot_of<R>(codes, stride, b, depth, acc, add);
    }

    template <int R>
    static void dot_patterns(const char* codes, int64_t stride, const uint8_t* b, int64_t depth, int32_t* acc, bool add) {
        dot_of<R>(codes, stride, b, depth, acc, add);
    }

    template <int R, class Byte>
    static void dot_of(const char* codes, int64_t stride, const Byte* b, int64_t depth, int32_t* acc, bool add) {
        constexpr int64_t kNear = 64;  // quads: 16 KiB of B stay in L1 while its eight column groups are walked one by one
        for (int64_t q = 0; q < depth; q += kNear) {
            const int64_t n = depth - q < kNear ? depth - q : kNear;
            for (int64_t c = 0; R == 1 && c < kPanel; c += 32) {
                dot_row(codes + q * kQuad * 2, b + (q * kPanel + c) * kQuad, n, acc + c, add || q > 0);
            }
            for (int64_t c = 0; R > 1 && c < kPanel; c += 8) {
                dot_columns<R>(codes + q * kQuad * 2, stride, b + (q * kPanel + c) * kQuad, n, acc + c, add || q > 0);
            }
        }
    }
};
