"""torchao's side: a program, as importing it warns. Writes a folder for each case, and what torchao has of its weights.

    python torchao_peer.py OUT

OUT/CASE/model.safetensors is written by torchao's own `flatten_tensor_state_dict`; OUT/CASE.pt holds {"weights": {path:
dequantized}, "x", "y"}, "y" None where torchao has no kernel for it on a CPU. CASE "sharded" is "int8wo" in two files.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn


def build(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.Sequential(nn.LayerNorm(96), nn.Linear(96, 32, bias=False))).to(dtype)


def cases() -> dict[str, tuple[Any, torch.dtype]]:
    from torchao.quantization import Float8WeightOnlyConfig as Float8
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        MappingType,
        PerAxis,
        PerGroup,
        PerTensor,
    )

    bits: Any = torch
    asymmetric: dict[str, Any] = {"mapping_type": MappingType.ASYMMETRIC}
    return {
        "int8wo": (Int8WeightOnlyConfig(), torch.float32),
        "int8wo-bf16": (Int8WeightOnlyConfig(), torch.bfloat16),
        "int8wo-group": (Int8WeightOnlyConfig(granularity=PerGroup(32)), torch.float32),
        "int8wo-tensor": (Int8WeightOnlyConfig(granularity=PerTensor()), torch.float32),
        "int8dq": (Int8DynamicActivationInt8WeightConfig(), torch.float32),
        "intx4": (IntxWeightOnlyConfig(weight_dtype=bits.int4, granularity=PerGroup(32)), torch.bfloat16),
        "intx4-asym": (
            IntxWeightOnlyConfig(weight_dtype=bits.int4, granularity=PerGroup(32), **asymmetric),
            torch.float32,
        ),
        "intx3": (IntxWeightOnlyConfig(weight_dtype=bits.int3, granularity=PerAxis(0)), torch.float32),
        "fp8wo": (Float8(), torch.bfloat16),
        "fp8wo-tensor": (Float8(granularity=PerTensor()), torch.float32),
        "int4": (None, torch.bfloat16),
        "fp8dq": (None, torch.float32),
        "sharded": (Int8WeightOnlyConfig(), torch.float32),
    }


def int4(weight: Tensor) -> tuple[Any, Tensor]:
    """An Int4Tensor in the layout that its class documents, and its values: making one takes a GPU's package."""
    from torchao.quantization import Int4Tensor

    groups = weight.detach().float().unflatten(1, (-1, 32))
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    scale = ((high - low) / 15).to(weight.dtype).float()
    zero = (low + 8 * scale).to(weight.dtype).float()
    codes = ((groups - zero) / scale).round().clamp(-8, 7)
    values = (codes * scale + zero).flatten(1)
    codes = codes.flatten(1).to(torch.int8)
    packed = (codes[:, ::2] & 15) | (codes[:, 1::2] << 4)
    numbers = [t.squeeze(2).t().contiguous().to(weight.dtype) for t in (scale, zero)]
    return Int4Tensor(packed, numbers[0], numbers[1], [1, 32], weight.shape), values


def float8(weight: Tensor) -> Any:
    from torchao.quantization import Float8Tensor, PerRow
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

    return Float8Tensor.from_hp(weight.detach(), act_quant_kwargs=QuantizeTensorToFloat8Kwargs(granularity=PerRow()))


def main(out: Path) -> None:
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import quantize_

    for name, (config, dtype) in cases().items():
        model = build(dtype)
        x = torch.randn(5, 64, dtype=dtype)
        state: dict[str, Any] = dict(model.state_dict())
        linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
        weights: dict[str, Tensor] = {}
        y = None
        if config is not None:
            quantize_(model, config)
            state = dict(model.state_dict())
            weights = {path: state[f"{path}.weight"].dequantize() for path in linears}
            with torch.no_grad():
                y = model(x)
        for path in linears if config is None else ():
            key = f"{path}.weight"
            if name == "int4":
                state[key], weights[path] = int4(state[key])
            else:
                state[key] = float8(state[key])
                weights[path] = state[key].dequantize()
        tensors, metadata = flatten_tensor_state_dict(state)
        (out / name).mkdir()
        if name == "sharded":
            halves = [dict(list(tensors.items())[:3]), dict(list(tensors.items())[3:])]
            names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
            for file, half in zip(names, halves, strict=True):
                save_file(half, out / name / file, metadata=metadata)
            weight_map = {key: file for file, half in zip(names, halves, strict=True) for key in half}
            (out / name / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        else:
            save_file(tensors, out / name / "model.safetensors", metadata=metadata)
        torch.save({"weights": weights, "x": x, "y": y}, out / f"{name}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
