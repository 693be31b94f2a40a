// What a convolution reads and in which passes: its sizes, how x is laid out for it, and where in that a patch lies.
#pragma once

#include <algorithm>
#include <vector>

#include "tensors.h"

namespace fxquant {

using torch::headeronly::MemoryFormat;
using Sizes = std::vector<int64_t>;

constexpr int64_t kLaidBytes = int64_t{4} << 20;  // laid out at a time: several samples, or a part of one

struct Geometry {
    int64_t samples, channels;
    int64_t in[3], out[3], kernel[3], stride[3], pad[3], dilation[3];  // d, h, w
    int64_t features;   // K
    int64_t positions;  // outputs of a sample
    bool channels_last;
    bool pointwise;  // a patch is one position of x: in and out are then [1, 1, positions]
};

// As torch's Tensor.suggest_memory_format: what is both counts as contiguous.
inline MemoryFormat memory_format(const Tensor& x) {
    const auto sizes = x.sizes(), strides = x.strides();
    const auto dims = static_cast<int64_t>(sizes.size());
    if ((dims != 4 && dims != 5) || strides[1] == 0) return MemoryFormat::Contiguous;
    int64_t least = 0;
    for (int64_t i = 0; i < dims; ++i) {
        const int64_t d = i == 0 ? 1 : i + 1 == dims ? 0 : dims - i;  // 1, then the last to 2, then 0
        if (sizes[d] == 0 || strides[d] < least || (d == 0 && least == strides[1])) return MemoryFormat::Contiguous;
        least = strides[d] * sizes[d];
    }
    return dims == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d;
}

inline Geometry geometry(const char* op, const Tensor& x, const Sizes& kernel, const Sizes& stride, const Sizes& padding,
                  const Sizes& dilation) {
    const auto sizes = x.sizes();
    const size_t dims = kernel.size();
    STD_TORCH_CHECK(dims >= 1 && dims <= 3 && sizes.size() == dims + 2 && stride.size() == dims && padding.size() == dims &&
                        dilation.size() == dims,
                    "fxquant::", op, ": x has ", sizes.size(), " dimensions and the kernel ", dims,
                    "; [B, I, *space] with one to three, and as many strides, paddings and dilations, are needed");
    Geometry g = {};
    g.samples = sizes[0];
    g.channels = sizes[1];
    g.features = g.channels;
    g.positions = 1;
    g.pointwise = true;
    for (int i = 0; i < 3; ++i) g.in[i] = g.out[i] = g.kernel[i] = g.stride[i] = g.dilation[i] = 1;
    for (size_t i = 0; i < dims; ++i) {
        const size_t to = i + 3 - dims;
        STD_TORCH_CHECK(kernel[i] >= 1 && stride[i] >= 1 && dilation[i] >= 1 && padding[i] >= 0, "fxquant::", op,
                        ": kernel, stride and dilation are at least 1 and padding at least 0");
        g.in[to] = sizes[i + 2], g.kernel[to] = kernel[i], g.stride[to] = stride[i], g.pad[to] = padding[i];
        g.dilation[to] = dilation[i];
        const int64_t room = g.in[to] + 2 * g.pad[to] - g.dilation[to] * (g.kernel[to] - 1) - 1;
        STD_TORCH_CHECK(room >= 0, "fxquant::", op, ": the kernel reaches over an input of size ", g.in[to], " with padding ",
                        g.pad[to]);
        g.out[to] = room / g.stride[to] + 1;
        g.features *= g.kernel[to];
        g.positions *= g.out[to];
        g.pointwise = g.pointwise && g.kernel[to] == 1 && g.stride[to] == 1 && g.pad[to] == 0;
    }
    g.channels_last = memory_format(x) != MemoryFormat::Contiguous;
    if (g.pointwise) {
        g.in[0] = g.in[1] = g.out[0] = g.out[1] = 1;
        g.in[2] = g.out[2] = g.positions;
    }
    return g;
}

// Outputs first <= o < first + count along `axis` of samples sample0 <= s < sample0 + samples: one pass.
struct Pass {
    int64_t sample0, samples;
    int axis;
    int64_t first, count;
};

inline Layout layout_of(const Geometry& g, const Pass& pass) {
    Layout l = {};
    l.channels = g.channels;
    l.channels_last = g.channels_last;
    for (int i = 0; i < 3; ++i) {
        const bool part = i == pass.axis;
        l.in[i] = g.in[i];
        l.size[i] = ((part ? pass.count : g.out[i]) - 1) * g.stride[i] + (g.kernel[i] - 1) * g.dilation[i] + 1;
        l.pad[i] = g.pad[i] - (part ? pass.first * g.stride[i] : 0);
        if (i == 2) continue;
        l.stride[i] = g.stride[i];
        for (int64_t k = 0; k < g.kernel[i]; ++k) l.used[i] |= uint64_t{1} << (k * g.dilation[i] % g.stride[i] % 64);
    }
    l.step = g.stride[2];
    l.phases = std::min(l.step, (g.kernel[2] - 1) * g.dilation[2] + 1);
    l.phase_length = (l.size[2] + l.step - 1) / l.step;
    l.line = l.phases * l.phase_length;
    l.channel = l.size[0] * l.size[1] * l.line;
    return l;
}

// Samples at a time, or parts of one along its first dimension that has several outputs, so that one pass lays out about
// kLaidBytes.
inline std::vector<Pass> passes_of(const Geometry& g, int64_t bytes) {
    const int axis = g.out[0] > 1 ? 0 : g.out[1] > 1 ? 1 : 2;
    const Layout whole = layout_of(g, {0, 1, axis, 0, g.out[axis]});
    const int64_t each = std::max<int64_t>(whole.channel * g.channels * bytes, 1);
    std::vector<Pass> passes;
    if (each <= kLaidBytes || (axis == 2 && g.channels_last)) {
        const int64_t most = std::max<int64_t>(1, kLaidBytes / each);
        for (int64_t s = 0; s < g.samples; s += most) passes.push_back({s, std::min(most, g.samples - s), axis, 0, g.out[axis]});
        return passes;
    }
    const int64_t parts = std::min(g.out[axis], (each + kLaidBytes - 1) / kLaidBytes);
    const int64_t step = (g.out[axis] + parts - 1) / parts;
    for (int64_t s = 0; s < g.samples; ++s) {
        for (int64_t o = 0; o < g.out[axis]; o += step) passes.push_back({s, 1, axis, o, std::min(step, g.out[axis] - o)});
    }
    return passes;
}

inline Patches patches_of(const Geometry& g, const Layout& l, const Pass& pass, const void* laid, Sizes& offsets) {
    Patches p = {};
    p.data = laid;
    p.sample = g.channels * l.channel;
    for (int i = 0; i < 3; ++i) p.out[i] = i == pass.axis ? pass.count : g.out[i];
    p.step[0] = g.stride[0] * l.size[1] * l.line;
    p.step[1] = g.stride[1] * l.line;
    p.step[2] = 1;
    offsets.clear();
    for (int64_t c = 0; c < g.channels; ++c) {
        for (int64_t d = 0; d < g.kernel[0]; ++d) {
            for (int64_t h = 0; h < g.kernel[1]; ++h) {
                const int64_t line = c * l.channel + (d * g.dilation[0] * l.size[1] + h * g.dilation[1]) * l.line;
                for (int64_t w = 0; w < g.kernel[2]; ++w) {
                    const int64_t at = w * g.dilation[2];
                    offsets.push_back(line + at % l.step * l.phase_length + at / l.step);
                }
            }
        }
    }
    p.count = g.features;
    offsets.resize(static_cast<size_t>(round_up(g.features, 16)), 0);
    p.offsets = offsets.data();
    return p;
}

}  // namespace fxquant
