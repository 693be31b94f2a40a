// Rows of a quantized table: their codes in a byte each, what these are worth, and the rows that are looked up. Bit-equal to
// numerics.decode.
#pragma once

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "coded_weight.h"

namespace fxquant {
namespace {

float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

// 2^exponent for -126 <= exponent <= 127. (ldexp is a call, and costs as much as a short row.)
float power_of_two(int exponent) { return from_bits(static_cast<uint32_t>(exponent + 127) << 23); }

float stored_float(const void* data, Stored type, int64_t i) {
    switch (type) {
        case Stored::f32: {
            float value;
            std::memcpy(&value, static_cast<const char*>(data) + 4 * i, sizeof(value));
            return value;
        }
        case Stored::bf16: {
            uint16_t half;
            std::memcpy(&half, static_cast<const char*>(data) + 2 * i, sizeof(half));
            const uint32_t whole = uint32_t{half} << 16;
            float value;
            std::memcpy(&value, &whole, sizeof(value));
            return value;
        }
        case Stored::e8m0: {
            const int exponent = static_cast<const uint8_t*>(data)[i];
            return exponent == 255 ? std::nanf("") : exponent == 0 ? from_bits(0x00400000u) : power_of_two(exponent - 127);
        }
        case Stored::e4m3: {  // never negative as a scale, but any code is read right
            const int code = static_cast<const uint8_t*>(data)[i], magnitude = code & 0x7f, exponent = magnitude >> 3;
            const int whole = exponent == 0 ? magnitude : (magnitude & 7) + 8;
            const float value = static_cast<float>(whole) * power_of_two((exponent == 0 ? 1 : exponent) - 10);
            return magnitude == 0x7f ? std::nanf("") : std::copysign(value, code & 0x80 ? -1.0f : 1.0f);
        }
        default: return static_cast<const uint8_t*>(data)[i];
    }
}

#include "apart.h"

// Codes of a row, `Bits` each in one little-endian stream, a byte each. (The hosts that this is built for are little-endian.)
template <int Bits>
void spread(const uint8_t* row, int64_t width, uint8_t* codes) {
    const int64_t whole = width / 8, rest = width - whole * 8, row_bytes = (width * Bits + 7) / 8;
    uint64_t word = 0;
    for (int64_t i = 0; i < whole; ++i) {
        // Whole words where the row has them: a part of one, put together in memory, would be waited for.
        if (i * Bits + 8 <= row_bytes) {
            std::memcpy(&word, row + i * Bits, sizeof(word));
        } else {
            std::memcpy(&word, row + i * Bits, Bits);
        }
        const uint64_t bytes = apart<Bits>(word);
        std::memcpy(codes + 8 * i, &bytes, sizeof(bytes));
    }
    word = 0;
    std::memcpy(&word, row + whole * Bits, static_cast<size_t>((rest * Bits + 7) / 8));
    const uint64_t bytes = apart<Bits>(word);
    std::memcpy(codes + 8 * whole, &bytes, static_cast<size_t>(rest));
}

void spread(int bits, const uint8_t* row, int64_t width, uint8_t* codes) {
    switch (bits) {
        case 2: return spread<2>(row, width, codes);
        case 3: return spread<3>(row, width, codes);
        case 4: return spread<4>(row, width, codes);
        case 5: return spread<5>(row, width, codes);
        case 6: return spread<6>(row, width, codes);
        case 7: return spread<7>(row, width, codes);
        default: std::memcpy(codes, row, static_cast<size_t>(width));
    }
}

uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}

uint32_t all_ones(bool yes) { return 0u - static_cast<uint32_t>(yes); }

// What codes are worth; as code_values says, but by arithmetic, which the compiler turns into vectors.
void values_of(const Spec& spec, const uint8_t* __restrict codes, int64_t n, float* __restrict out) {
    const Format f = spec.format;
    if (!f.is_float) {
        const int32_t sign = spec.scheme == Spec::Scheme::symmetric ? 1 << (f.bits - 1) : 0;
        for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>((codes[i] ^ sign) - sign);
        return;
    }
    const int shift = 23 - f.mantissa_bits, sign_shift = 32 - f.bits;
    const uint32_t mask = (1u << (f.bits - 1)) - 1, first_normal = 1u << f.mantissa_bits;
    const uint32_t raise = static_cast<uint32_t>(127 - f.bias) << 23;
    const float unit = power_of_two(1 - f.bias - f.mantissa_bits);
    const uint32_t infinity = f.top == Top::ieee ? mask - (first_normal - 1) : 256;
    const uint32_t nan = f.top == Top::ieee ? infinity + 1 : f.top == Top::nan ? mask : 256;
    const uint32_t nan_code = f.top == Top::nan_is_minus_zero ? mask + 1 : 256;
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t code = codes[i], magnitude = code & mask;
        const uint32_t normal = (magnitude << shift) + raise;
        const uint32_t subnormal = to_bits(static_cast<float>(static_cast<int32_t>(magnitude)) * unit);
        // By masks: the compiler would make branches of choices, and no branch predicts a code.
        const uint32_t small = all_ones(magnitude < first_normal), top = all_ones(magnitude == infinity);
        const uint32_t none = all_ones(magnitude >= nan) | all_ones(code == nan_code);
        const uint32_t value = (((subnormal & small) | (normal & ~small)) & ~(top | none)) | (0x7f800000u & top) | (0x7fc00000u & none);
        out[i] = from_bits(value | (code & (mask + 1)) << sign_shift);
    }
}

// What the granules of one row have: numbers from `first` on, `step` apart.
struct Numbers {
    const void* data;
    Stored type;
    int64_t first;
    int64_t step;

    float at(int64_t granule) const { return stored_float(data, type, first + granule * step); }
};

// Values of codes, one row, into what they stand for. zeros: null if symmetric.
void scale_row(const Spec& spec, int64_t width, int64_t granule, const Numbers& scales, const Numbers* zeros, float whole, float* out) {
    for (int64_t begin = 0, g = 0; begin < width; begin += granule, ++g) {
        const float scale = scales.at(g), zero = zeros == nullptr ? 0.0f : zeros->at(g);
        const int64_t end = std::min(width, begin + granule);
        if (spec.scheme == Spec::Scheme::shift) {
            for (int64_t k = begin; k < end; ++k) out[k] = out[k] * scale + zero;
        } else {
            for (int64_t k = begin; k < end; ++k) out[k] = (out[k] - zero) * scale * whole;
        }
    }
}

// Indices as int64, all of them within the table.
std::vector<int64_t> checked_indices(const char* op, const Tensor& indices, int64_t count) {
    const bool wide = indices.scalar_type() == ScalarType::Long;
    STD_TORCH_CHECK(wide || indices.scalar_type() == ScalarType::Int, "fxquant::", op, ": indices are ",
                    torch::headeronly::toString(indices.scalar_type()), "; int32 and int64 are taken");
    const Tensor held = dense(indices);
    std::vector<int64_t> found(static_cast<size_t>(held.numel()));
    for (int64_t i = 0; i < held.numel(); ++i) {
        found[i] = wide ? static_cast<const int64_t*>(held.data_ptr())[i] : static_cast<const int32_t*>(held.data_ptr())[i];
        if (found[i] >= 0 && found[i] < count) continue;
        throw std::out_of_range(std::string("fxquant::") + op + ": index " + std::to_string(found[i]) +
                                " is out of range for a table of " + std::to_string(count) + " rows");  // IndexError in Python
    }
    return found;
}

// Row row_of(i) of the table for each i of [0, n), one after another in `out`.
template <class Table, class RowOf>
void decode(const Table& table, int64_t n, RowOf row_of, Float type, Tensor& out) {
    const Kernels& kernels = kernels_for(kChoose);
    auto* to = static_cast<char*>(out.data_ptr());
    const int64_t bytes = type == Float::f32 ? 4 : 2, width = table.width;
    split(n, n * width < kSerialElements, [&](int64_t begin, int64_t end) {
        std::vector<uint8_t> codes(static_cast<size_t>(round_up(width, kBlock)));  // some tables write whole words
        std::vector<float> values(type == Float::f32 ? 0 : static_cast<size_t>(width));
        for (int64_t i = begin; i < end; ++i) {
            char* at = to + i * width * bytes;
            float* row = type == Float::f32 ? reinterpret_cast<float*>(at) : values.data();
            table.row(row_of(i), codes.data(), row);
            if (type != Float::f32) kernels.narrow(row, width, type, at);
        }
    });
}

// The rows `indices` of a table of `count` rows, [*indices, width] in `dtype`.
template <class Table>
Tensor look_up(const char* op, const Tensor& indices, const Table& table, int64_t count, ScalarType dtype) {
    const Float type = float_type(op, "dtype", dtype);
    const std::vector<int64_t> wanted = checked_indices(op, indices, count);
    std::vector<int64_t> sizes;
    for (const int64_t size : indices.sizes()) sizes.push_back(size);
    sizes.push_back(table.width);
    Tensor out = torch::stable::empty(sizes, dtype, std::nullopt, indices.device());
    decode(table, static_cast<int64_t>(wanted.size()), [&](int64_t i) { return wanted[i]; }, type, out);
    return out;
}

}  // namespace
}  // namespace fxquant
