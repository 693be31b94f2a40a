// Convolutions of one group and up to three spatial dimensions: fxquant::int8_conv_dynamic and fxquant::conv_weight_only.
//
// x is laid out once, padded, so that a patch is a table of offsets. The int8 product gathers rows of codes from it, some
// hundred at a time; the float product reads the patches where they lie.
#include <torch/csrc/stable/library.h>

#include <array>
#include <cstring>
#include <string>
#include <vector>

#include "coded_weight.h"
#include "ranges.h"

namespace fxquant {
namespace {

using torch::headeronly::MemoryFormat;
using Sizes = std::vector<int64_t>;

constexpr int64_t kLaidBytes = int64_t{4} << 20;   // laid out at a time: several samples, or a part of one
constexpr int64_t kGatheredBytes = int64_t{2} << 20;  // rows of codes at a time; they should not leave L2

struct Geometry {
    int64_t samples, channels;
    int64_t in[3], out[3], kernel[3], stride[3], pad[3], dilation[3];  // d, h, w
    int64_t features;   // K
    int64_t positions;  // outputs of a sample
    bool channels_last;
    bool pointwise;  // a patch is one position of x: in and out are then [1, 1, positions]
};

// As torch's Tensor.suggest_memory_format: what is both counts as contiguous.
MemoryFormat memory_format(const Tensor& x) {
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

Geometry geometry(const char* op, const Tensor& x, const Sizes& kernel, const Sizes& stride, const Sizes& padding,
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

Layout layout_of(const Geometry& g, const Pass& pass) {
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
std::vector<Pass> passes_of(const Geometry& g, int64_t bytes) {
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

Patches patches_of(const Geometry& g, const Layout& l, const Pass& pass, const void* laid, Sizes& offsets) {
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

// Where the results of one pass go: rows, one output position each, of all samples.
class Results {
public:
    Results(const Geometry& g, const Pass& pass, int64_t out_channels, void* out, Float type)
        : channels_last(g.channels_last), width(out_channels), type(type), out_(static_cast<char*>(out)), g_(g), pass_(pass) {
        each_ = g.positions / g.out[pass.axis] * pass.count;
        begin_ = g.positions / g.out[pass.axis] * pass.first;
    }

    int64_t rows() const { return pass_.samples * each_; }
    int64_t sample(int64_t row) const { return pass_.sample0 + row / each_; }
    int64_t position(int64_t row) const { return begin_ + row % each_; }  // in its sample
    int64_t each() const { return each_; }
    int64_t bytes() const { return type == Float::f32 ? 4 : 2; }

    // Channels last: where row r stands; the rows after it follow.
    char* row(int64_t r) const { return out_ + (sample(r) * g_.positions + position(r)) * width * bytes(); }

    // Contiguous: `count` channels from `first` on of the rows r0 <= r < r1, from [r1 - r0][stride] elements.
    void turn(const PatchKernels& kernels, const char* from, int64_t stride, int64_t r0, int64_t r1, int64_t first,
              int64_t count) const {
        for (int64_t r = r0; r < r1;) {
            const int64_t n = std::min(r1 - r, each_ - r % each_);
            char* to = out_ + ((sample(r) * width + first) * g_.positions + position(r)) * bytes();
            kernels.turn(from + (r - r0) * stride * bytes(), stride, n, count, type, to, g_.positions);
            r += n;
        }
    }

    const bool channels_last;
    const int64_t width;  // output channels
    const Float type;

private:
    char* out_;
    const Geometry& g_;
    const Pass& pass_;
    int64_t each_, begin_;
};

using Lay = decltype(PatchKernels::lay_codes);

// Lays out what the pass reads. element: bytes of one.
void lay_out(Lay lay, const Geometry& g, const Layout& l, const Pass& pass, const char* x, Float type, const float* factors,
             int64_t element, void* to) {
    const int64_t units = pass.samples * (g.channels_last ? l.size[0] * l.size[1] : g.channels);
    const int64_t values = g.channels * g.in[0] * g.in[1] * g.in[2];
    const char* from = x + pass.sample0 * values * (type == Float::f32 ? 4 : 2);
    const float* own = factors == nullptr ? nullptr : factors + pass.sample0;
    split(units, pass.samples * g.channels * l.channel < kSerialElements, [&](int64_t begin, int64_t end) {
        std::vector<char> room(static_cast<size_t>(room_elements(l) * element));
        lay(l, from, type, own, to, begin, end, room.data());
    });
}

// Rows of results that one task computes and turns round.
struct TurnedRows {
    alignas(64) char data[kRowBlock * kPanel * 4 + 64];
};

Weight panel_of(const Weight& w, int64_t panel) {
    const int64_t first = panel * kPanel, count = std::min(kPanel, w.out_features - first);
    return {w.packed + panel * panel_bytes(w.in_features), w.scale + first, w.bias == nullptr ? nullptr : w.bias + first, count,
            w.in_features};
}

// The product of `count` gathered rows, the first of which is row `first` of the pass.
void int8_rows(const Kernels& kernels, const Results& results, const Int8Problem& all, int64_t first, int64_t count) {
    const Weight& w = all.weight;
    for_tasks(w, count, [&](const Task& task) {
        const int64_t n = task.row1 - task.row0;
        Int8Problem problem = all;
        problem.codes = static_cast<const char*>(all.codes) + task.row0 * all.code_stride;
        problem.x_scale = all.x_scale + task.row0;
        if (results.channels_last) {
            problem.out = results.row(first + task.row0);
            return kernels.int8_product(problem, {task.panel, task.next, 0, n});
        }
        TurnedRows turned;
        problem.weight = panel_of(w, task.panel);
        problem.out = turned.data;
        kernels.int8_product(problem, {0, task.next, 0, n});
        const int64_t r0 = first + task.row0, columns = problem.weight.out_features;
        results.turn(kernels.patches, turned.data, columns, r0, r0 + n, task.panel * kPanel, columns);
    });
}

struct Scalings {
    std::vector<float> scale, factor;  // of each sample
};

Scalings sample_scalings(const Kernels& kernels, const char* x, Float type, int64_t samples, int64_t values) {
    Scalings found;
    for (const uint32_t amax : largest_of_runs(kernels, x, type, samples, values)) {
        const Scaling s = kernels.int8_scaling(amax);
        found.scale.push_back(s.scale);
        found.factor.push_back(s.factor);
    }
    return found;
}

void int8_convolution(const Kernels& kernels, const Geometry& g, const char* x, Float type, const Weight& weight, void* out) {
    const Scalings scalings = sample_scalings(kernels, x, type, g.samples, g.channels * g.in[0] * g.in[1] * g.in[2]);
    const int64_t stride = staged_stride(g.features, kernels.code_bytes);
    const int64_t block = std::max(kRowBlock, kGatheredBytes / stride / kRowBlock * kRowBlock);
    const bool rows_lie = g.pointwise && g.channels_last;  // a patch is a row of x already
    Sizes offsets;
    for (const Pass& pass : passes_of(g, kernels.code_bytes)) {
        const Layout l = layout_of(g, pass);
        const Results results(g, pass, weight.out_features, out, type);
        const int64_t rows = results.rows(), most = std::min(rows, block);
        const int64_t laid_bytes = rows_lie ? 0 : round_up(pass.samples * g.channels * l.channel * kernels.code_bytes + 64, 64);
        char* laid = scratch(laid_bytes + most * (stride + static_cast<int64_t>(sizeof(float))));
        char* staged = laid + laid_bytes;
        auto* x_scale = reinterpret_cast<float*>(staged + most * stride);
        const Patches patches = patches_of(g, l, pass, laid, offsets);
        if (!rows_lie) lay_out(kernels.patches.lay_codes, g, l, pass, x, type, scalings.factor.data(), kernels.code_bytes, laid);
        for (int64_t first = 0; first < rows; first += most) {
            const int64_t count = std::min(most, rows - first);
            split(count, count * g.features < kSerialElements, [&](int64_t begin, int64_t end) {
                for (int64_t r = begin; r < end; ++r) x_scale[r] = scalings.scale[results.sample(first + r)];
                if (!rows_lie) {
                    return kernels.patches.stage(patches, first + begin, first + end, staged + begin * stride, stride);
                }
                for (int64_t r = begin; r < end; ++r) {
                    const int64_t at = results.sample(first + r) * g.positions + results.position(first + r);
                    const char* from = x + at * g.channels * (type == Float::f32 ? 4 : 2);
                    kernels.patches.quantize_by({from, g.channels, g.channels, type}, 0, 1,
                                                scalings.factor[results.sample(first + r)], staged + r * stride, stride);
                }
            });
            int8_rows(kernels, results, {staged, stride, x_scale, weight, nullptr, type}, first, count);
        }
    }
}

void coded_convolution(const Kernels& kernels, const Geometry& g, const char* x, Float type, const CodedWeight& weight, void* out) {
    const bool rows_lie = g.pointwise && g.channels_last;
    const bool lies = g.pointwise && type == Float::f32;  // x is laid out already
    Sizes offsets;
    for (const Pass& pass : passes_of(g, sizeof(float))) {
        const Layout l = layout_of(g, pass);
        const Results results(g, pass, weight.out_features, out, type);
        const int64_t rows = results.rows(), values = g.channels * g.positions;
        Patches patches = patches_of(g, l, pass, nullptr, offsets);
        if (lies) {
            patches.data = x + (pass.sample0 * values + (rows_lie ? g.channels : 1) * pass.first) * 4;
            patches.sample = values;
        } else {
            auto* laid = reinterpret_cast<float*>(scratch((pass.samples * g.channels * l.channel + 16) * 4));
            patches.data = laid;
            if (rows_lie) {
                const Rows from{x + (pass.sample0 * g.positions + pass.first) * g.channels * 2, g.channels, g.channels, type};
                split(rows, rows * g.channels < kSerialElements,
                      [&](int64_t begin, int64_t end) { kernels.widen(from, begin, end, laid, g.channels); });
            } else {
                lay_out(kernels.patches.lay_floats, g, l, pass, x, type, nullptr, sizeof(float), laid);
            }
        }
        if (lies || rows_lie) {
            const int64_t step = rows_lie ? 1 : g.positions;
            for (int64_t k = 0; k < g.features; ++k) offsets[k] = k * step;
            patches.step[2] = rows_lie ? g.channels : 1;
            if (rows_lie && !lies) patches.sample = results.each() * g.channels;
        }
        for_panels(weight.out_features, g.features, rows, [&](int64_t panel, int64_t row0, int64_t row1, bool) {
            if (results.channels_last) {
                return kernels.patches.product(patches, weight, panel, row0, row1, results.row(row0), type, weight.out_features,
                                               panel * kPanel);
            }
            TurnedRows turned;
            kernels.patches.product(patches, weight, panel, row0, row1, turned.data, type, kPanel, 0);
            const int64_t first = panel * kPanel, columns = std::min(kPanel, weight.out_features - first);
            results.turn(kernels.patches, turned.data, kPanel, row0, row1, first, columns);
        });
    }
}

Tensor output(const Tensor& x, const Geometry& g, size_t dims, int64_t out_channels) {
    Sizes sizes = {g.samples, out_channels};
    const auto in = x.sizes();
    for (size_t i = 0; i < dims; ++i) sizes.push_back(g.pointwise ? in[i + 2] : g.out[i + 3 - dims]);
    return torch::stable::empty(sizes, x.scalar_type(), std::nullopt, x.device(), std::nullopt, memory_format(x));
}

Tensor int8_conv_dynamic(const Tensor x, const Tensor packed, const Tensor scale, const std::optional<Tensor> bias,
                         const Sizes kernel_size, const Sizes stride, const Sizes padding, const Sizes dilation, int64_t isa) {
    const char* op = "int8_conv_dynamic";
    const Kernels& kernels = kernels_for(isa);
    const Float type = float_type(op, "x", x.scalar_type());
    const Geometry g = geometry(op, x, kernel_size, stride, padding, dilation);
    STD_TORCH_CHECK(g.features >= 1 && g.features <= kMostInFeatures, "fxquant::", op, ": a patch has ", g.features,
                    " features; 1 to ", kMostInFeatures, " are taken");
    const HeldWeight weight(op, kernels, packed, scale, bias, g.features);
    Tensor out = output(x, g, kernel_size.size(), weight.view.out_features);
    if (out.numel() == 0) return out;
    const Tensor held = torch::stable::contiguous(x, memory_format(x));
    int8_convolution(kernels, g, static_cast<const char*>(held.data_ptr()), type, weight.view, out.data_ptr());
    return out;
}

Tensor conv_weight_only(const Tensor x, const Tensor packed, const Tensor scale, const std::optional<Tensor> zero_point,
                        const std::optional<Tensor> tensor_scale, const std::optional<Tensor> bias, int64_t out_channels,
                        const Sizes kernel_size, const Sizes stride, const Sizes padding, const Sizes dilation,
                        const std::string spec, int64_t isa) {
    const char* op = "conv_weight_only";
    const Kernels& kernels = kernels_for(isa);
    const Float type = float_type(op, "x", x.scalar_type());
    const Geometry g = geometry(op, x, kernel_size, stride, padding, dilation);
    const HeldCodedWeight weight(op, kernels, packed, scale, zero_point, tensor_scale, bias, out_channels, g.features, spec);
    Tensor out = output(x, g, kernel_size.size(), out_channels);
    if (out.numel() == 0) return out;
    const Tensor held = torch::stable::contiguous(x, memory_format(x));
    coded_convolution(kernels, g, static_cast<const char*>(held.data_ptr()), type, weight.view, out.data_ptr());
    return out;
}

}  // namespace
}  // namespace fxquant

STABLE_TORCH_LIBRARY_IMPL(fxquant, CPU, m) {
    m.impl("int8_conv_dynamic", TORCH_BOX(&fxquant::int8_conv_dynamic));
    m.impl("conv_weight_only", TORCH_BOX(&fxquant::conv_weight_only));
}
