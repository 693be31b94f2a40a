// AMX: eight registers of 16 rows x 64 bytes, and the product of two of them into a third. Linux hands them out on request.
// Included into isa_amx.cpp inside an anonymous namespace.

// Written out: so they need no compiler option that an older compiler would refuse, and know of memory, which GCC's
// intrinsics do not.
#define FXQUANT_TILE_LOAD(tile, from, stride) \
    asm volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(from), "r"(static_cast<int64_t>(stride)) : "memory")
#define FXQUANT_TILE_STORE(tile, to, stride) \
    asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(to), "r"(static_cast<int64_t>(stride)) : "memory")
#define FXQUANT_TILE_ZERO(tile) asm volatile("tilezero %%tmm" #tile ::)
// to += a * b: unsigned codes of a, signed ones of b; of both signed.
#define FXQUANT_TILE_DOT(to, a, b) asm volatile("tdpbusd %%tmm" #b ", %%tmm" #a ", %%tmm" #to ::)
#define FXQUANT_TILE_DOT_SIGNED(to, a, b) asm volatile("tdpbssd %%tmm" #b ", %%tmm" #a ", %%tmm" #to ::)
// The same of pairs of bfloat16, summed up in float32.
#define FXQUANT_TILE_DOT_PAIRS(to, a, b) asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #to ::)

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileQuads = 16;

// The registers' shapes. Their contents are lost where these change, and at the end, where they become what the thread had before:
// llama.cpp, in one process with us, shapes them once.
class TileShapes {
public:
    TileShapes() { asm volatile("sttilecfg %0" : "=m"(before_)); }
    ~TileShapes() {
        if (before_.palette != 0) before_.use();
        else asm volatile("tilerelease" ::);
    }
    TileShapes(const TileShapes&) = delete;
    TileShapes& operator=(const TileShapes&) = delete;

    // 17 to 32 rows: sums in 0 to 3, codes of rows in 4 and 5, of columns in 6 and 7. Up to 16: rows in 4, columns in 5 to 7.
    // quads: of the codes, 16 at most.
    void for_rows(int64_t rows, int64_t quads = kTileQuads) {
        const int64_t wanted = rows + quads * 64;
        if (wanted == chosen_) return;
        chosen_ = wanted;
        Config config;
        const bool high = rows > kTileRows;
        for (int i = 4; i < 8; ++i) {
            const bool of_rows = i == 4 || (high && i == 5);
            if (of_rows) config.bytes[i] = static_cast<uint16_t>(quads * kQuad);
            else config.rows[i] = static_cast<uint8_t>(quads);
        }
        const auto first = static_cast<uint8_t>(high ? kTileRows : rows), second = static_cast<uint8_t>(high ? rows - kTileRows : rows);
        config.rows[0] = config.rows[1] = config.rows[4] = first;
        config.rows[2] = config.rows[3] = second;
        if (high) config.rows[5] = second;
        config.use();
    }

    // 16 rows and columns: sums in 0 and 1, codes of so many quads of rows in 4 and 6, of columns in 5 and 7.
    void for_quads(int64_t quads) {
        if (-quads == chosen_) return;
        chosen_ = -quads;
        Config config;
        config.bytes[4] = config.bytes[6] = static_cast<uint16_t>(quads * kQuad);
        config.rows[5] = config.rows[7] = static_cast<uint8_t>(quads);
        config.use();
    }

private:
    struct Config {  // as the processor reads it
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};

        void use() const { asm volatile("ldtilecfg %0" ::"m"(*this)); }
    };
    static_assert(sizeof(Config) == 64, "64 bytes");

    Config before_;
    int64_t chosen_ = 0;
};

// Memory to bring into L2, some lines of it with each step of a product.
struct Ahead {
    const int8_t* at;
    int64_t lines;

    void fetch() {
        for (int64_t i = 0; i < lines; ++i, at += 64) __builtin_prefetch(at, 0, 2);
    }
};
