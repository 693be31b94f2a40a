// What the launchers (ops.cpp) and the kernels of one instruction set (isa_*.cpp) agree on. Plain data, no torch.
#pragma once

#include <cstdint>

namespace fxquant {

constexpr int64_t kPanel = 64;  // output features in one packed block: four zmm registers of int32
constexpr int64_t kQuad = 4;    // consecutive k that stand together: what one dpbusd lane multiplies

// Rows that one task works on. 256 rows of accumulators are 64 KiB, which the depth blocks below may revisit in L2.
constexpr int64_t kRowBlock = 256;

// A packed block keeps the sum of each column's codes in int32: 127 * 2^24 < 2^31.
constexpr int64_t kMostInFeatures = int64_t{1} << 24;

constexpr int64_t quads(int64_t in_features) { return (in_features + kQuad - 1) / kQuad; }
constexpr int64_t panels(int64_t out_features) { return (out_features + kPanel - 1) / kPanel; }

// Bytes of one packed block: quads(K) rows of 64 x 4 codes and one row of 64 int32 column sums.
constexpr int64_t panel_bytes(int64_t in_features) { return (quads(in_features) + 1) * kPanel * kQuad; }

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Bytes from one staged row to the next: whole vectors, and an odd number of cache lines, because rows a multiple of 4096
// bytes apart would fall into one set of the L1 cache.
constexpr int64_t staged_stride(int64_t width, int64_t code_bytes) {
    const int64_t lines = round_up(width * code_bytes, 64) / 64;
    return (lines | 1) * 64;
}

enum class Float : int32_t { f32, bf16, f16 };

// Float rows of x: row r starts at data + r * stride elements and holds `width` values next to each other.
struct Rows {
    const void* data;
    int64_t stride;
    int64_t width;
    Float type;
};

// A packed weight [N, K]. scale: N floats. bias: N floats or null. packed: int8 [panels(N), quads(K) + 1, 64, 4].
struct Weight {
    const int8_t* packed;
    const float* scale;
    const float* bias;
    int64_t out_features;
    int64_t in_features;
};

// y[rows, N] = float(codes @ weight codes^T) * (x_scale * scale) + bias. codes: staged rows, code_stride bytes apart.
struct Int8Problem {
    const void* codes;
    int64_t code_stride;
    const float* x_scale;
    Weight weight;
    void* out;
    Float out_type;
};

// y[rows, N] = (x @ float(weight codes)^T) * scale + bias. x: float rows, x_stride floats apart, zero from K to 4 * quads(K).
struct FloatProblem {
    const float* x;
    int64_t x_stride;
    Weight weight;
    void* out;
    Float out_type;
};

// One task: one packed block against the rows row0 <= r < row1. `next` is the block worth fetching meanwhile.
struct Task {
    int64_t panel;
    const int8_t* next;
    int64_t row0;
    int64_t row1;
};

// The kernels of one instruction set. "Staged" codes are what its product reads: u8 = code + 128 or int16 = code,
// code_bytes each, padded so that whole vectors may be written past the end of a row.
struct Kernels {
    const char* name;
    int64_t code_bytes;
    void (*quantize)(const Rows& x, int64_t row0, int64_t row1, int8_t* codes, float* scale);
    void (*quantize_staged)(const Rows& x, int64_t row0, int64_t row1, void* staged, int64_t stride, float* scale);
    void (*stage)(const int8_t* codes, int64_t width, int64_t row0, int64_t row1, void* staged, int64_t stride);
    void (*widen)(const Rows& x, int64_t row0, int64_t row1, float* wide, int64_t stride);
    void (*int8_product)(const Int8Problem& problem, const Task& task);
    void (*float_product)(const FloatProblem& problem, const Task& task);
};

// Block `panel` of the packed form of codes [n, k]: 64 columns interleaved by quads, then their sums.
void pack_block(const int8_t* codes, int64_t n, int64_t k, int64_t panel, int8_t* to);

const Kernels* portable_kernels();
const Kernels* avx2_kernels();        // null where the compiler cannot make them (not x86-64)
const Kernels* avx512vnni_kernels();  // null likewise

}  // namespace fxquant
