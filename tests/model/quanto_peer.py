"""optimum-quanto's side of the exchange: a program, as importing it warns and registers classes for the whole process.

``quanto_peer.py make OUT`` writes {case: {"state", "map", "weights"}} of models that Quanto quantized;
``quanto_peer.py read IN OUT`` reads {name: {"case", "state", "map"}} into Quanto and writes the {name: {path: weight}}
that it got, dequantized, None where a module is not quantized, and of float32 models under "" the output for the
samples.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.model.quanto_models import CASES, Case, build, samples


def unpack(packed: Tensor, bits: int) -> Tensor:
    """What Quanto's C++ extension does, which would be built for minutes."""
    return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)])


def weights_of(model: nn.Module) -> dict[str, Tensor | None]:
    """Dequantized from the generic packing, which is what a state dict holds."""
    from optimum.quanto import QTensor
    from optimum.quanto.nn import QModuleMixin

    found: dict[str, Tensor | None] = {}
    for path, module in model.named_modules():
        if isinstance(module, QModuleMixin) and module.weight_qtype is not None:
            weight: Any = module.weight
            if "WeightQB" not in type(weight).__name__[:8] and hasattr(weight, "weight_qbits_tensor"):
                weight = weight.weight_qbits_tensor()  # a kernel's own layout, back to the generic one
            found[path] = weight.dequantize().detach() if isinstance(weight, QTensor) else None
    return found


def make(case: Case) -> dict[str, Any]:
    from optimum import quanto

    model = build(case)
    quanto.quantize(model, weights=case.weights, activations=case.activations, exclude=list(case.exclude))
    if case.activations:
        with torch.no_grad(), quanto.Calibration():
            model(samples(case))
    if case.frozen:
        quanto.freeze(model)
    return {"state": model.state_dict(), "map": quanto.quantization_map(model), "weights": weights_of(model)}


def read(case: Case, given: dict[str, Any]) -> dict[str, Tensor | None]:
    from optimum import quanto

    model = build(case)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)  # what is not loaded shows
    quanto.requantize(model, given["state"], given["map"])
    if case.dtype is not torch.float32:  # its int8 product in bfloat16 crashes on weights that lie unaligned
        return weights_of(model)
    with torch.no_grad():
        return {**weights_of(model), "": model(samples(case))}


if __name__ == "__main__":
    # its wrappers of transformers' models, which take seconds to import
    sys.modules["optimum.quanto.models"] = ModuleType("optimum.quanto.models")
    from optimum.quanto.library.extensions import extension

    extension.get_extension("quanto_cpp")._lib = SimpleNamespace(unpack=unpack)
    if sys.argv[1] == "make":
        torch.save({name: make(case) for name, case in CASES.items()}, sys.argv[2])
    else:
        given = torch.load(sys.argv[2], weights_only=True)
        torch.save({name: read(CASES[entry["case"]], entry) for name, entry in given.items()}, sys.argv[3])
