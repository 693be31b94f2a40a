// Convolutions of one group and up to three spatial dimensions: fxquant::int8_conv_dynamic, int8_conv_static, conv_weight_only.
//
// x is laid out once, padded, so that a patch is a table of offsets. The int8 product gathers rows of codes from it, some
// hundred at a time; the float product reads the patches where they lie.
#include <torch/csrc/stable/library.h>

#include <string>
#include <vector>

#include "coded_weight.h"
#include "geometry.h"
#include "ranges.h"

namespace fxquant {
namespace {

constexpr int64_t kGatheredBytes = int64_t{2} << 20;  // rows of codes at a time; they should not leave L2

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
    const PanelLayout layout = int8_layout(w.out_features, w.in_features);
    const int64_t first = panel * kPanel;
    return {w.packed + layout.offset(panel), w.scale + first, w.bias == nullptr ? nullptr : w.bias + first, layout.features(panel),
            w.in_features};
}

// The product of `count` gathered rows, the first of which is row `first` of the pass.
void int8_rows(const Kernels& kernels, const Results& results, const Int8Problem& all, int64_t first, int64_t count) {
    const Weight& w = all.weight;
    for_tasks(w, count, kernels.int8_products, Blocking{kRowBlock, kernels.by_rows}, [&](const Task& task) {
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

// given: the scale of all samples, if x does not have one for each. Even then a sample that is not finite has scale NaN.
Scalings sample_scalings(const Kernels& kernels, const Geometry& g, const char* x, Float type, const std::optional<Scaling>& given) {
    Scalings found;
    for (const uint32_t amax : largest_of_runs(kernels, x, type, g.samples, g.channels * g.in[0] * g.in[1] * g.in[2])) {
        const Scaling s = given.has_value() ? Scaling{finite_or_nan(given->scale, amax), given->factor} : kernels.int8_scaling(amax);
        found.scale.push_back(s.scale);
        found.factor.push_back(s.factor);
    }
    return found;
}

void int8_convolution(const Kernels& kernels, const Geometry& g, const char* x, Float type, const Scalings& scalings,
                      const Weight& weight, void* out) {
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
            int8_rows(kernels, results, {staged, stride, 1, x_scale, weight, nullptr, type}, first, count);
        }
    }
}

void coded_convolution(const Kernels& kernels, const Geometry& g, const char* x, Float type, const CodedWeight& weight, void* out) {
    const bool rows_lie = g.pointwise && g.channels_last;
    const bool lies = g.pointwise && type == Float::f32;  // x is laid out already
    // Widened rows take whole vectors: a thread's last row must not end in the first one of another thread.
    const int64_t row_step = lies ? g.channels : round_up(g.channels, 16);
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
            const int64_t laid_values = rows_lie ? rows * row_step : pass.samples * g.channels * l.channel;
            auto* laid = reinterpret_cast<float*>(scratch(laid_values * 4));
            patches.data = laid;
            if (rows_lie) {
                const Rows from{x + (pass.sample0 * g.positions + pass.first) * g.channels * 2, g.channels, g.channels, type};
                split(rows, rows * g.channels < kSerialElements,
                      [&](int64_t begin, int64_t end) { kernels.widen(from, begin, end, laid, row_step); });
            } else {
                lay_out(kernels.patches.lay_floats, g, l, pass, x, type, nullptr, sizeof(float), laid);
            }
        }
        if (lies || rows_lie) {
            const int64_t step = rows_lie ? 1 : g.positions;
            for (int64_t k = 0; k < g.features; ++k) offsets[k] = k * step;
            patches.step[2] = rows_lie ? row_step : 1;
            if (rows_lie && !lies) patches.sample = results.each() * row_step;
        }
        const double time = product_time(rows, weight.out_features, g.features, weight.bits, kernels.float_products);
        for_panels(weight.out_features, rows, time, Blocking{}, [&](int64_t panel, int64_t row0, int64_t row1, bool) {
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
    return in_large_pages(torch::stable::empty(sizes, x.scalar_type(), std::nullopt, x.device(), std::nullopt, memory_format(x)));
}

Tensor int8_conv(const char* op, const Tensor& x, const std::optional<Scaling>& given, const Tensor& packed, const Tensor& scale,
                 const std::optional<Tensor>& bias, const Sizes& kernel_size, const Sizes& stride, const Sizes& padding,
                 const Sizes& dilation, int64_t isa) {
    const Kernels& kernels = kernels_for(isa);
    const Float type = float_type(op, "x", x.scalar_type());
    const Geometry g = geometry(op, x, kernel_size, stride, padding, dilation);
    STD_TORCH_CHECK(g.features >= 1 && g.features <= kMostInFeatures, "fxquant::", op, ": a patch has ", g.features,
                    " features; 1 to ", kMostInFeatures, " are taken");
    const HeldWeight weight(op, kernels, packed, scale, bias, g.features);
    Tensor out = output(x, g, kernel_size.size(), weight.view.out_features);
    if (out.numel() == 0) return out;
    const Tensor held = torch::stable::contiguous(x, memory_format(x));
    const auto* values = static_cast<const char*>(held.data_ptr());
    int8_convolution(kernels, g, values, type, sample_scalings(kernels, g, values, type, given), weight.view, out.data_ptr());
    return out;
}

Tensor int8_conv_dynamic(const Tensor x, const Tensor packed, const Tensor scale, const std::optional<Tensor> bias,
                         const Sizes kernel_size, const Sizes stride, const Sizes padding, const Sizes dilation, int64_t isa) {
    return int8_conv("int8_conv_dynamic", x, std::nullopt, packed, scale, bias, kernel_size, stride, padding, dilation, isa);
}

Tensor int8_conv_static(const Tensor x, const Tensor x_scale, const Tensor packed, const Tensor scale, const std::optional<Tensor> bias,
                        const Sizes kernel_size, const Sizes stride, const Sizes padding, const Sizes dilation, int64_t isa) {
    const Scaling given = given_scaling("int8_conv_static", x_scale);
    return int8_conv("int8_conv_static", x, given, packed, scale, bias, kernel_size, stride, padding, dilation, isa);
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
    m.impl("int8_conv_static", TORCH_BOX(&fxquant::int8_conv_static));
    m.impl("conv_weight_only", TORCH_BOX(&fxquant::conv_weight_only));
}
