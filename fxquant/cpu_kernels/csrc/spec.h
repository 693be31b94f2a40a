// A tensor's spec, read from the text that fxquant/spec writes and reads. Plain data, no torch.
#pragma once

#include <cstdint>
#include <string>

namespace fxquant {

// What lies at the top of a float format's range: nothing but numbers (the small floats), infinities and NaN, or NaN alone.
enum class Top : int32_t { numbers, ieee, nan, nan_is_minus_zero };

struct Format {
    bool is_float;
    int bits;
    int exponent_bits;  // floats: sign, exponent, mantissa
    int mantissa_bits;
    int bias;
    Top top;
};

struct Spec {
    enum class Granularity { tensor, channel, token, sample, group, block };
    enum class Scheme { symmetric, affine, shift };
    enum class Scale { float32, bfloat16, stepped, e8m0, e4m3 };
    Format format;
    Granularity granularity;
    int64_t axis;  // channel
    int64_t rows;  // block
    int64_t size;  // group; columns of a block
    Scheme scheme;
    Scale scale;
};

// Reads 'format/granularity[/scheme][/scale]' or the name of a whole spec, such as 'mxfp4'. False where it cannot.
bool parse_spec(const std::string& text, Spec& spec);

// The largest value of a symmetric code: 127 for int8, 448 for float8_e4m3fn, 6 for fp4_e2m1.
float largest(const Format& format);

// The smallest exponent: that of the subnormals too. Integers, which are evenly spaced: that of their largest.
int smallest_exponent(const Format& format);

// The value of each bit pattern 0 .. 2^bits - 1, before scale and zero point: two's complement for symmetric integers.
void code_values(const Spec& spec, float* values);

}  // namespace fxquant
