// What the launchers (ops.cpp) and the kernels of one instruction set (isa_*.cpp) agree on. Plain data, no torch.
#pragma once

#include <cstdint>

#include "panels.h"

namespace fxquant {

// Rows that one task works on. 256 rows of accumulators are 64 KiB, which the depth blocks below may revisit in L2.
constexpr int64_t kRowBlock = 256;

// The same of a product of codes with patterns: each task spreads its panel's, which the more rows share.
constexpr int64_t kPatternRows = 512;

// The sum of a column's codes is an int32: 127 * 2^24 < 2^31.
constexpr int64_t kMostInFeatures = int64_t{1} << 24;

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

// What a granule's values are multiplied by to become codes: see numerics. scale: what a code is worth.
struct Scaling {
    float scale;
    float factor;
};

// The scale of a granule whose largest absolute value has these bits: NaN if it holds NaN or infinity.
constexpr float finite_or_nan(float scale, uint32_t amax) { return amax < 0x7f800000u ? scale : __builtin_nanf(""); }

enum class Activation : int32_t { none, relu, gelu, gelu_tanh, silu };

// Which half of a product's columns goes through the activation and is then multiplied with the other half.
enum class Gate : int32_t { none, first, second };

// Where the results of a task stand: that of row `row0` and column `column0` first. width: of a row; 0: as wide as the weight.
struct Place {
    int64_t row0;
    int64_t column0;
    int64_t width;
};

// What follows a product: y = activation(y) * factor + residual, before y is rounded. residual: rows of y's type, or null.
// factor: [rows from factor_row0 on, 64], or null; not with an activation. gate: of a whole result; launchers make two products
// of it, see around.h.
struct After {
    Activation activation;
    Gate gate;
    const void* residual;
    const float* factor;
    int64_t factor_row0;
    Place place;
};

// What x goes through before a product, rounded to its type: a norm over each row (weight, bias: K floats or null, whole vectors
// readable), or activation(x) * other.
struct Before {
    enum class Kind : int32_t { none, rmsnorm, layernorm, gate };
    Kind kind;
    Activation activation;
    const float* weight;
    const float* bias;
    float eps;
    Rows other;
};

// Up to this K a wrapped int32 sum of (code + 128) * code minus a wrapped 128 * column sum is still the exact sum of
// code * code: only the true sum, at most 128 * 128 * K, has to fit. Beyond it the sums are kept in int64.
constexpr int64_t kWrapSafe = (int64_t{1} << 17) - 1;

struct CodedWeight;

// A packed weight [N, K]. packed: see int8_layout. scale: N floats. Both are null where `coded` has codes and steps instead; what
// only finishes a product has no packed, and no scale where the sums are scaled. bias: N floats or null.
struct Weight {
    const int8_t* packed;
    const float* scale;
    const float* bias;
    int64_t out_features;
    int64_t in_features;
    After after;
    const CodedWeight* coded = nullptr;  // in steps, instead of packed and scale; outlives this
};

// Digits of a float in fixed point, each an int8 code, the lowest first: digit i counts for 256^i.
constexpr int64_t kMostDigits = 3;
constexpr int64_t kDigitBits = 8;
constexpr int64_t digits_of(Float type) { return type == Float::f32 ? kMostDigits : 2; }

// y[rows, N] = float(codes @ weight codes^T) * (x_scale * scale) + bias. codes: staged rows, code_stride bytes apart;
// `digits` of them for a row of y, 1 or digits_of() a float x.
struct Int8Problem {
    const void* codes;
    int64_t code_stride;
    int64_t digits;
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

// How values are rounded to a format by the range of their granule: see fake_quantize.h.
struct Grid {
    enum class Scale : int32_t { float32, e8m0, e4m3 };
    float largest;             // value of the largest code
    float smallest_range;      // a granule with less than this counts as zero (float32 scales)
    int32_t largest_exponent;  // floor(log2(largest))
    int32_t smallest_exponent;
    int32_t mantissa_bits;
    bool minus_zero;  // the format has a code for -0
    Scale scale;
    int64_t group;  // values of a row that share a scale; 0 where the whole row does
};

// Where the activations of a convolution are laid out for it: [sample, channel, d, h, phase, w] with the padding filled in, and
// each line split by w modulo the stride, so that neighbouring outputs read neighbours.
struct Layout {
    int64_t channels;
    int64_t in[3];   // d, h, w of x
    int64_t size[3];  // what is laid out, padding included: as much as the kernel reads
    int64_t pad[3];   // index in x = index in the layout - pad
    int64_t step;     // stride of w
    int64_t phases;   // that the kernel reads, at most step
    int64_t phase_length;
    int64_t line;     // elements of a line: phases * phase_length
    int64_t channel;  // elements of a channel: size[0] * size[1] * line
    bool channels_last;  // x is
    int64_t stride[2];   // of d and h
    uint64_t used[2];    // of d and h modulo the stride: whether the kernel reads them
};

// Patches: that of output (sample, d, h, w) begins at data + sample * `sample` + d * step[0] + h * step[1] + w * step[2], and
// its k-th value stands at offsets[k] from there. offsets: `count`, then zeros up to a multiple of 16.
struct Patches {
    const void* data;
    int64_t sample;
    int64_t step[3];
    int64_t out[3];
    const int64_t* offsets;
    int64_t count;
};

// One task: one panel against the rows row0 <= r < row1. next: the full panel worth fetching meanwhile, or null.
struct Task {
    int64_t panel;
    const int8_t* next;
    int64_t row0;
    int64_t row1;
};

// ---- weights in any number format: codes in panels of planes (fxquant/numerics/panels.py), one granule along K after another

enum class Scheme : int32_t { symmetric, affine, shift };
enum class Stored : int32_t { f32, bf16, e8m0, e4m3, u8 };

// Numbers of granules. rows: how many features share a row of numbers, [ceil(N / rows), granules]; 0 if none do, which then
// stand by panels, [granules, features of the panel] in each.
struct Granules {
    const void* data;
    Stored type;
    int64_t rows;
};

// A weight [N, K]; a value is (values[code] - zero) * scale, or values[code] * scale + zero if the scheme is shift.
struct CodedWeight {
    const uint8_t* packed;  // see plane_layout
    int64_t bits;
    Scheme scheme;
    bool integer;            // values[code] is code - offset
    int32_t offset;
    const uint16_t* values;  // of 256 codes, bfloat16, which holds all of them exactly; repeated beyond 2^bits
    Granules scale;
    Granules zero;           // affine and shift
    int64_t granules;        // along K
    int64_t granule;         // k in each but the last
    const float* tensor_scale;  // N floats or null
    const float* bias;          // likewise
    int64_t out_features;
    int64_t in_features;
    After after;
    const uint16_t* steps = nullptr;  // N bfloat16, of each row: each of its scales is so many of them, 16 at most. Or null
};

// Whether products of floats are summed up granule by granule with codes, which are exact, and each sum is scaled once: half
// the operations where they come from registers. Short granules would be scaled too often.
inline bool sums_granules(const CodedWeight& w) {
    const bool long_ones = w.granules == 1 || (w.granule >= 16 && w.granule % kBlock == 0);
    return w.integer && w.bits == 4 && w.scheme != Scheme::shift && long_ones;
}

// y[rows, N] = x @ value^T * tensor_scale + bias. x: float rows, x_stride floats apart, zero from K to 4 * quads(K). sums: of
// each row in each granule, [rows, granules], where sums_granules() and the scheme is affine.
struct CodedProblem {
    const float* x;
    int64_t x_stride;
    const float* sums;
    CodedWeight weight;
    void* out;
    Float out_type;
};

// Neighbouring k of one granule of the weight, and of one group of x, whose products are summed up in int32: k0 <= k < k1, k0 a
// multiple of 4.
struct Piece {
    int64_t k0;
    int64_t k1;
    int64_t granule;
};

// 255 * 128 * 65536 < 2^31: a granule beyond this many k is summed up in several pieces.
constexpr int64_t kMostPiece = 65536;

// What a row of codes brings to the sum of each piece. begin: what the sum begins with, minus the sum of the row's codes, times
// the weight's zero point where all its codes have the same one. scale: of x in each piece; null where a row has one scale.
// Both [rows, count].
struct PieceRows {
    const int32_t* begin;
    const float* scale;
    int64_t count;

    PieceRows from(int64_t row, int64_t piece) const {
        const int64_t at = row * count + piece;
        return {begin + at, scale == nullptr ? nullptr : scale + at, count};
    }
};

// y[rows, N] = (sum over pieces of float(codes @ (weight codes - zero)^T) * scale) * x_scale + bias, or with x_scale in the sum
// where it is one of each piece. codes: staged rows, see quantize_coded; `digits` of them for a row of y, 1 or
// digits_of() a float x, each with pieces of its own. x_scale: [rows], or null. x_group: values of x that share a scale; 0 where a row does.
struct CodedDynamicProblem {
    const void* codes;
    int64_t code_stride;
    int64_t digits;
    const float* x_scale;
    int64_t x_group;
    PieceRows rows;
    const Piece* pieces;
    int64_t count;
    CodedWeight weight;
    void* out;
    Float out_type;
};

struct CodedKernels {
    // One panel x the rows row0 <= r < row1, at most kRowBlock; of dynamic_product, kPatternRows.
    void (*product)(const CodedProblem& problem, int64_t panel, int64_t row0, int64_t row1);
    // The sums of one row of x in each granule.
    void (*sum)(const CodedWeight& weight, const float* x, float* sums);
    void (*dynamic_product)(const CodedDynamicProblem& problem, int64_t panel, int64_t row0, int64_t row1);
    // Rows of x into staged codes, code_bytes each, or into several rows of digits, their scales (of rows, or of pieces), and what
    // their sums begin with.
    void (*quantize)(const Rows& x, int64_t row0, int64_t row1, const CodedDynamicProblem& problem, void* codes, float* scale,
                     int32_t* begin);
    // One panel's values [64, K], with tensor_scale, into out [N, K].
    void (*decode)(const CodedWeight& weight, int64_t panel, void* out, Float out_type);
    // dynamic_product takes at most so many rows of codes of a weight in steps; int8_product any.
    int64_t stepped_rows;
};

// One panel of the packed form of codes [n, k], into its place in `packed`; `flip` is the bit that turns a code into its
// pattern.
void pack_planes(const uint8_t* codes, int64_t n, int64_t k, int64_t bits, uint8_t flip, int64_t panel, uint8_t* packed);

// ---- end of weights in any number format

struct PatchKernels {
    // Units unit0 <= u < unit1 of x, channels of samples (contiguous) or d, h lines of samples (channels last), into `to`: as
    // staged codes by each sample's factor, or as floats. room: room_elements() of what is laid out.
    void (*lay_codes)(const Layout& l, const void* x, Float type, const float* factors, void* to, int64_t unit0, int64_t unit1,
                      void* room);
    void (*lay_floats)(const Layout& l, const void* x, Float type, const float* factors, void* to, int64_t unit0, int64_t unit1,
                       void* room);
    void (*quantize_by)(const Rows& x, int64_t row0, int64_t row1, float factor, void* staged, int64_t stride);
    void (*stage)(const Patches& patches, int64_t row0, int64_t row1, void* staged, int64_t stride);
    // y[rows, N] = patches @ value^T * tensor_scale + bias for one panel and the rows row0 <= r < row1, at most kRowBlock: into
    // rows of `width` elements, at column `column`.
    void (*product)(const Patches& patches, const CodedWeight& weight, int64_t panel, int64_t row0, int64_t row1, void* out,
                    Float out_type, int64_t width, int64_t column);
    // [n][width] of elements of `type`, rows `stride` apart, into [width][n], `to_stride` apart. Up to 15 bytes behind each row
    // are read.
    void (*turn)(const void* from, int64_t stride, int64_t n, int64_t width, Float type, void* to, int64_t to_stride);
};

// ---- attention

// Keys whose scores are worked on together: 64 transposed keys of 64 features, and their values, fit into the L1 cache.
constexpr int64_t kKeyBlock = 64;

enum class MaskType : int32_t { none, boolean, f32, bf16, f16 };

constexpr int64_t mask_size(MaskType type) { return type == MaskType::boolean ? 1 : type == MaskType::f32 ? 4 : 2; }

// [batch, head, row, ...], of which the last dimension is contiguous: elements from one to the next. 0: all share one.
struct AttentionOperand {
    const void* data;
    int64_t batch;
    int64_t head;
    int64_t row;
};

// out[batch, queries, heads, value_width] = softmax(query @ key^T * scale, masked) @ value, of type `type`.
struct AttentionProblem {
    AttentionOperand query, key, value, mask;
    Float type;
    MaskType mask_type;
    bool causal;  // query q attends to the keys up to q
    float scale;
    int64_t heads, key_heads, queries, keys, width, value_width;
    void* out;
};

// Floats that a task of so many rows takes for itself.
constexpr int64_t attention_room(int64_t rows, int64_t width, int64_t value_width) {
    const int64_t k = round_up(width, 16), v = round_up(value_width, 16);
    return rows * (k + v + 19) + kKeyBlock * (k + (k > v ? k : v) + 16) + 256;
}

// ---- end of attention

// Rows of 2 * half contiguous elements, and the elements from one to the next: 0 where all share one.
struct RotaryRows {
    const void *x, *cos, *sin;
    void* out;
    int64_t x_step, cos_step, sin_step, out_step;
    int64_t rows, half;
    Float type;
};

// Elements that laying out one unit takes for itself.
constexpr int64_t room_elements(const Layout& l) {
    return l.channels_last ? (2 * l.in[2] + 1) * l.channels + l.size[2] + 64 : l.size[2] + 64;
}

// The kernels of one instruction set. "Staged" codes are what its product reads: u8 = code + 128 or int16 = code,
// code_bytes each, padded so that whole vectors may be written past the end of a row.
struct Kernels {
    const char* name;
    int64_t code_bytes;
    double int8_products, float_products;  // a nanosecond of one core, about: for launch.h
    bool by_rows;                          // its products of codes are quicker where neighbouring tasks share rows
    void (*quantize)(const Rows& x, int64_t row0, int64_t row1, int8_t* codes, float* scale);
    void (*quantize_staged)(const Rows& x, int64_t row0, int64_t row1, void* staged, int64_t stride, float* scale);
    // Rows in fixed point, as staged codes: digits_of() x rows for each. Null where floats stay floats.
    void (*quantize_digits)(const Rows& x, int64_t row0, int64_t row1, void* staged, int64_t stride, float* scale);
    void (*quantize_static)(const Rows& x, int64_t row0, int64_t row1, Scaling by, void* staged, int64_t stride, float* scale);
    void (*stage)(const int8_t* codes, int64_t width, int64_t row0, int64_t row1, void* staged, int64_t stride);
    // Row `row` of x after `before`, in x's type, into `made`: room for whole vectors.
    void (*prepare)(const Before& before, const Rows& x, int64_t row, void* made);
    void (*widen)(const Rows& x, int64_t row0, int64_t row1, float* wide, int64_t stride);
    void (*int8_product)(const Int8Problem& problem, const Task& task);
    void (*float_product)(const FloatProblem& problem, const Task& task);  // null where floats are multiplied as digits
    void (*fake_quantize)(const Grid& grid, const Rows& x, int64_t row0, int64_t row1, void* out, float tensor_scale);
    void (*fake_quantize_piece)(const Grid& grid, const void* x, Float type, int64_t n, uint32_t amax, void* out);
    void (*fake_quantize_static)(const Grid& grid, const void* x, Float type, int64_t n, Scaling by, void* out);
    void (*narrow)(const float* from, int64_t n, Float type, void* to);
    void (*rotary)(const RotaryRows& rows);
    Scaling (*int8_scaling)(uint32_t amax);
    PatchKernels patches;
    uint32_t (*amax)(const void* x, Float type, int64_t n);  // the bits of the largest absolute value; NaN stands on top
    CodedKernels coded;
    // `lines` cache lines of each of 64 rows of a checkpoint, codes of 4 or 8 bits, into a full panel, on a line's boundary, past the
    // caches or not. sums: of each feature's signed bytes, added up; or null. Null itself where it is no quicker than stored_rows.cpp.
    void (*turn_lines)(const uint8_t* rows, int64_t row_bytes, int64_t lines, int64_t bits, uint32_t flips, bool past,
                       uint8_t* panel, int32_t* sums);
    // The queries query0 <= q < query1 of the heads that share a key head. room: attention_room() of them.
    void (*attention)(const AttentionProblem& problem, int64_t batch, int64_t key_head, int64_t query0, int64_t query1, void* room);
};

// One panel of the packed form of codes [n, k], into its place in `packed`.
void pack_quads(const int8_t* codes, int64_t n, int64_t k, int64_t panel, int8_t* packed);

const Kernels* portable_kernels();
const Kernels* avx2_kernels();        // null where the compiler cannot make them (not x86-64)
const Kernels* avxvnni_kernels();     // null likewise
const Kernels* avx512vnni_kernels();  // null likewise
const Kernels* amx_kernels();         // null likewise; AVX512-VNNI with AMX

}  // namespace fxquant
