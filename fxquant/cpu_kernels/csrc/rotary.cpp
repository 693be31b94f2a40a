// fxquant::rotary: checks, strides, and how the rows are shared out. The kernel: rotary.h.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "shims.h"
#include "tensors.h"

namespace fxquant {
namespace {

constexpr const char* kOp = "rotary";
constexpr int64_t kMostDims = 8;

struct Operand {
    const char* data;
    int64_t step[kMostDims];  // bytes; 0 where its rows are shared
};

Tensor last_contiguous(const Tensor& t) {
    const int64_t last = t.dim() - 1;
    return t.sizes()[last] <= 1 || t.strides()[last] == 1 ? t : torch::stable::contiguous(t);
}

Operand operand(const char* what, const Tensor& t, const Tensor& x) {
    const auto sizes = t.sizes(), strides = t.strides(), wanted = x.sizes();
    const int64_t missing = x.dim() - t.dim(), last = x.dim() - 1;
    Operand made{static_cast<const char*>(t.data_ptr()), {}};
    for (int64_t d = 0; d < t.dim(); ++d) {
        STD_TORCH_CHECK(sizes[d] == wanted[missing + d] || (sizes[d] == 1 && missing + d < last), "fxquant::", kOp, ": ", what,
                        " has size ", sizes[d], " where x has ", wanted[missing + d]);
        made.step[missing + d] = sizes[d] == 1 ? 0 : strides[d] * static_cast<int64_t>(t.element_size());
    }
    return made;
}

// The leading dimensions of x from the outermost to the innermost in memory, so that neighbours are written together.
struct Loop {
    explicit Loop(const Tensor& out) : dims(out.dim() - 1) {
        for (int64_t d = 0; d < dims; ++d) {
            order[d] = d;
            size[d] = out.sizes()[d];
        }
        const auto strides = out.strides();
        std::stable_sort(order, order + dims, [&](int64_t a, int64_t b) { return strides[a] > strides[b]; });
        inner = dims > 0 ? size[order[dims - 1]] : 1;
        for (int64_t d = 0; d + 1 < dims; ++d) runs *= size[order[d]];
    }

    int64_t step(const Operand& o) const { return dims > 0 ? o.step[order[dims - 1]] : 0; }

    const char* at(const Operand& o, int64_t run) const {
        int64_t offset = 0;
        for (int64_t d = dims - 2; d >= 0; --d) {
            offset += run % size[order[d]] * o.step[order[d]];
            run /= size[order[d]];
        }
        return o.data + offset;
    }

    int64_t dims, order[kMostDims], size[kMostDims], inner, runs = 1;
};

Tensor rotary(const Tensor x, const Tensor cos, const Tensor sin, int64_t isa) {
    const Float type = float_type(kOp, "x", x.scalar_type());
    STD_TORCH_CHECK(cos.scalar_type() == x.scalar_type() && sin.scalar_type() == x.scalar_type(), "fxquant::", kOp,
                    ": x, cos and sin are of different dtypes");
    STD_TORCH_CHECK(x.dim() >= 1 && x.dim() <= kMostDims && cos.dim() >= 1 && cos.dim() <= x.dim() && sin.dim() >= 1 &&
                        sin.dim() <= x.dim(),
                    "fxquant::", kOp, ": x, cos and sin have ", x.dim(), ", ", cos.dim(), " and ", sin.dim(),
                    " dimensions; 1 to ", kMostDims, " are taken, and of cos and sin no more than of x");
    const int64_t width = x.sizes()[x.dim() - 1];
    STD_TORCH_CHECK(width % 2 == 0, "fxquant::", kOp, ": x has ", width, " features, which cannot be halved");
    const Kernels& kernels = kernels_for(isa);
    const Tensor held = x.strides()[x.dim() - 1] == 1 ? x : torch::stable::contiguous(x);
    const Tensor held_cos = last_contiguous(cos), held_sin = last_contiguous(sin);
    const Tensor out = torch::stable::empty_like(held);
    const Operand from = operand("x", held, x), c = operand("cos", held_cos, x), s = operand("sin", held_sin, x);
    const Operand to = operand("the result", out, x);
    if (out.numel() == 0) return out;
    const Loop loop(out);
    split(loop.runs, out.numel() < kSerialElements, [&](int64_t begin, int64_t end) {
        const int64_t bytes = static_cast<int64_t>(x.element_size());
        for (int64_t run = begin; run < end; ++run) {
            kernels.rotary({loop.at(from, run), loop.at(c, run), loop.at(s, run), const_cast<char*>(loop.at(to, run)),
                            loop.step(from) / bytes, loop.step(c) / bytes, loop.step(s) / bytes, loop.step(to) / bytes, loop.inner,
                            width / 2, type});
        }
    });
    return out;
}

}  // namespace
}  // namespace fxquant

STABLE_TORCH_LIBRARY_IMPL(fxquant, CPU, m) { m.impl("rotary", TORCH_BOX(&fxquant::rotary)); }

FXQUANT_SHIM(rotary)
