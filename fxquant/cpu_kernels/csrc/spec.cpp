// Specs from text, and what the codes of a format are worth. Definitions: fxquant/spec and fxquant/numerics.
#include "spec.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

namespace fxquant {
namespace {

const std::pair<const char*, const char*> kWholeSpecs[] = {
    {"mxfp8", "float8_e4m3fn/group32/e8m0"},  {"mxfp8_e5m2", "float8_e5m2/group32/e8m0"},
    {"mxfp6", "fp6_e2m3/group32/e8m0"},       {"mxfp6_e3m2", "fp6_e3m2/group32/e8m0"},
    {"mxfp4", "fp4_e2m1/group32/e8m0"},       {"nvfp4", "fp4_e2m1/group16/e4m3"},
};

// Unsigned decimal without a leading zero, from `at` on; moves `at` behind it. 0 where there is none.
int64_t number(const std::string& text, size_t& at) {
    int64_t value = 0;
    if (at < text.size() && text[at] == '0') return 0;
    while (at < text.size() && text[at] >= '0' && text[at] <= '9' && value < (int64_t{1} << 56)) {
        value = 10 * value + (text[at++] - '0');
    }
    return value;
}

bool starts(const std::string& text, const char* with) { return text.rfind(with, 0) == 0; }

bool small_float(const std::string& name, Format& format) {  // fp6_e3m2: sign + 3 + 2
    if (!starts(name, "fp")) return false;
    size_t at = 2;
    const int64_t bits = number(name, at);
    if (name.compare(at, 2, "_e") != 0) return false;
    at += 2;
    const int64_t exponent = number(name, at);
    if (at + 1 >= name.size() || name[at] != 'm') return false;
    const bool zero = name.compare(at + 1, std::string::npos, "0") == 0;
    const int64_t mantissa = number(name, ++at);
    if (mantissa == 0 && !zero) return false;
    if (!(zero || at == name.size()) || bits < 3 || bits > 8 || exponent < 1 || bits != 1 + exponent + mantissa) return false;
    const int bias = exponent == 1 ? 0 : (1 << (exponent - 1)) - 1;
    format = {true, static_cast<int>(bits), static_cast<int>(exponent), static_cast<int>(mantissa), bias, Top::numbers};
    return true;
}

bool parse_format(const std::string& name, Format& format) {
    if (name.size() == 4 && starts(name, "int") && name[3] >= '2' && name[3] <= '8') {
        format = {false, name[3] - '0', 0, 0, 0, Top::numbers};
        return true;
    }
    if (name == "float8_e4m3fn" || name == "fp8_e4m3") return format = {true, 8, 4, 3, 7, Top::nan}, true;
    if (name == "float8_e5m2" || name == "fp8_e5m2") return format = {true, 8, 5, 2, 15, Top::ieee}, true;
    if (name == "float8_e4m3fnuz") return format = {true, 8, 4, 3, 8, Top::nan_is_minus_zero}, true;
    if (name == "float8_e5m2fnuz") return format = {true, 8, 5, 2, 16, Top::nan_is_minus_zero}, true;
    return small_float(name, format);
}

bool parse_granularity(const std::string& text, Spec& spec) {
    using G = Spec::Granularity;
    const auto plain = [&](const char* name, G kind) { return text == name && (spec.granularity = kind, true); };
    if (plain("tensor", G::tensor) || plain("channel", G::channel) || plain("token", G::token) || plain("sample", G::sample)) {
        return true;
    }
    size_t at = 5;
    if (starts(text, "group")) {
        spec.granularity = G::group;
        spec.size = number(text, at);
        return spec.size > 0 && at == text.size();
    }
    if (starts(text, "block")) {
        spec.granularity = G::block;
        spec.rows = number(text, at);
        if (at >= text.size() || text[at++] != 'x') return false;
        spec.size = number(text, at);
        return spec.rows > 0 && spec.size > 0 && at == text.size();
    }
    if (!starts(text, "channel")) return false;
    at = 7;
    const bool negative = at < text.size() && text[at] == '-';
    at += negative ? 1 : 0;
    spec.granularity = G::channel;
    spec.axis = number(text, at) * (negative ? -1 : 1);
    return spec.axis != 0 && at == text.size();
}

bool parse_word(const std::string& word, Spec& spec) {
    if (word == "symmetric") return true;
    if (word == "affine") return spec.scheme = Spec::Scheme::affine, true;
    if (word == "shift") return spec.scheme = Spec::Scheme::shift, true;
    if (word == "float32") return true;
    if (word == "bf16" || word == "bfloat16") return spec.scale = Spec::Scale::bfloat16, true;
    if (word == "stepped") return spec.scale = Spec::Scale::stepped, true;
    if (word == "e8m0") return spec.scale = Spec::Scale::e8m0, true;
    if (word == "e4m3") return spec.scale = Spec::Scale::e4m3, true;
    return false;
}

float float_value(const Format& f, int pattern) {
    const int magnitude_bits = f.exponent_bits + f.mantissa_bits;
    const int sign = pattern >> magnitude_bits & 1, magnitude = pattern & ((1 << magnitude_bits) - 1);
    const int exponent = magnitude >> f.mantissa_bits, fraction = magnitude & ((1 << f.mantissa_bits) - 1);
    const int last = (1 << f.exponent_bits) - 1;
    const float nan = std::numeric_limits<float>::quiet_NaN();
    if (f.top == Top::nan_is_minus_zero && sign == 1 && magnitude == 0) return nan;
    if (f.top == Top::nan && magnitude == (1 << magnitude_bits) - 1) return nan;
    if (f.top == Top::ieee && exponent == last) {
        return fraction != 0 ? nan : std::copysign(std::numeric_limits<float>::infinity(), sign ? -1.0f : 1.0f);
    }
    const int whole = exponent == 0 ? fraction : fraction + (1 << f.mantissa_bits);
    const int power = (exponent == 0 ? 1 : exponent) - f.bias - f.mantissa_bits;
    return std::copysign(std::ldexp(static_cast<float>(whole), power), sign ? -1.0f : 1.0f);
}

}  // namespace

bool parse_spec(const std::string& text, Spec& spec) {
    for (const auto& [name, meaning] : kWholeSpecs) {
        if (text == name) return parse_spec(meaning, spec);
    }
    spec = {{}, Spec::Granularity::tensor, 0, 0, 0, Spec::Scheme::symmetric, Spec::Scale::float32};
    size_t part = 0;
    for (size_t from = 0; from <= text.size(); ++part) {
        const size_t slash = std::min(text.find('/', from), text.size());
        const std::string word = text.substr(from, slash - from);
        const bool known = part == 0 ? parse_format(word, spec.format) : part == 1 ? parse_granularity(word, spec) : parse_word(word, spec);
        if (!known) return false;
        from = slash + 1;
    }
    return part >= 2 && part <= 4;
}

float largest(const Format& f) {
    if (!f.is_float) return static_cast<float>((1 << (f.bits - 1)) - 1);
    int top = (1 << (f.exponent_bits + f.mantissa_bits)) - 1;
    if (f.top == Top::nan) top -= 1;
    if (f.top == Top::ieee) top -= 1 << f.mantissa_bits;
    return float_value(f, top);
}

int smallest_exponent(const Format& f) { return f.is_float ? 1 - f.bias : f.bits; }

void code_values(const Spec& spec, float* values) {
    const Format& f = spec.format;
    const bool is_signed = spec.scheme == Spec::Scheme::symmetric;
    for (int i = 0; i < 1 << f.bits; ++i) {
        values[i] = f.is_float ? float_value(f, i) : static_cast<float>(is_signed && i >> (f.bits - 1) ? i - (1 << f.bits) : i);
    }
}

}  // namespace fxquant
