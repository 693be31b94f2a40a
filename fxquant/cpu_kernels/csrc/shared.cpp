// fxquant::shared: a copy, which Inductor does not make anew for each reader.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "shims.h"
#include "tensors.h"

namespace fxquant {
namespace {

Tensor shared(const Tensor x) { return torch::stable::clone(x); }

}  // namespace
}  // namespace fxquant

STABLE_TORCH_LIBRARY_IMPL(fxquant, CPU, m) { m.impl("shared", TORCH_BOX(&fxquant::shared)); }

FXQUANT_SHIM(shared)
