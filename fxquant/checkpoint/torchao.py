"""Checkpoints of torchao, read: safetensors whose headers describe tensor subclasses.

For a weight `a.weight` the file holds `a._weight_qdata`, `a._weight_scale` and perhaps `a._weight_zero_point`; its
header has a text "a.weight" of JSON with the class and its attributes, and "tensor_names", a list of all (as torchao
0.18 writes, `torchao.prototype.safetensors`). What is read, as what it is here:

Int8Tensor                int8, one scale for each block; symmetric, or with zero points
IntxUnpackedToInt8Tensor  int2 to int8 the same, a byte a code
Int4Tensor                int4, two codes a byte, groups, value = code * scale + zero_point with codes from -8
Float8Tensor              float8, one scale for each block
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxquant.errors import FxQuantError, InvalidCheckpoint
from fxquant.nn.forms import to_storage
from fxquant.spec import TensorSpec
from fxquant.tensor import QuantizedTensor

NAMES = "tensor_names"
_FLOAT8 = {
    torch.float8_e4m3fn: "float8_e4m3fn",
    torch.float8_e5m2: "float8_e5m2",
    torch.float8_e4m3fnuz: "float8_e4m3fnuz",
    torch.float8_e5m2fnuz: "float8_e5m2fnuz",
}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_OPTIONAL = ("zero_point", "act_quant_scale", "act_quant_zero_point", "act_pre_scale")


class Ours(NamedTuple):
    """State dict and map as ours, and what each module computes in."""

    tensors: dict[str, Tensor]
    modules: dict[str, dict[str, str]]
    dtypes: dict[str, torch.dtype]


class _Weight(NamedTuple):
    """One weight as torchao has it: tensors and attributes by name, and the codes' shape as a matrix."""

    parts: dict[str, Tensor]
    told: Mapping[str, Any]

    @property
    def shape(self) -> tuple[int, int]:
        codes = self.parts["qdata"]
        return codes.shape[0], math.prod(codes.shape[1:])


def is_torchao(metadata: Mapping[str, str]) -> bool:
    """Whether headers say that the tensors are torchao's."""
    return NAMES in metadata


def from_torchao(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Ours:
    """Tensors of torchao's as ours: weights stand for the same numbers; tensors of codes may be new.

    path: named in errors. Activations that torchao quantizes at each call are so here, those with a scale of their own
    are static.

    Raises:
        InvalidCheckpoint: the headers make no sense, or a weight is of a class or kind that is not read (its name and
            class are in the message).
    """
    ours = Ours(dict(tensors), {}, {})
    for name in _names(path, metadata):
        told = _json(path, name, metadata.get(name, ""))
        kind = told.get("_type")
        if kind == "Tensor":
            continue
        if kind not in _READERS:
            raise _refused(path, name, f"a {str(kind)[:60]!r} is not read; {', '.join(_READERS)} are")
        if not isinstance(told.get("_data"), dict):
            raise _refused(path, name, "its header has no _data")
        module, _, attribute = name.rpartition(".")
        if attribute != "weight" or not module:
            raise _refused(path, name, "only the weights of modules are read")
        try:
            _take(ours, module, _READERS[kind], told["_data"])
        except (FxQuantError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise _refused(path, name, f"{kind}: {error}") from error
    return ours


def _take(ours: Ours, module: str, read: Callable[[_Weight], QuantizedTensor], told: Mapping[str, Any]) -> None:
    prefix = f"{module}._weight_"
    parts = {key.removeprefix(prefix): ours.tensors.pop(key) for key in list(ours.tensors) if key.startswith(prefix)}
    if strange := [part for part in parts if part not in ("qdata", "scale", *_OPTIONAL)]:
        raise ValueError(f"it has parts {strange}, which are not known")
    if "act_pre_scale" in parts or "act_quant_zero_point" in parts:
        raise ValueError("activations with a scale of their own before, or a zero point, are not read")
    weight = read(_Weight(parts, told))
    stored = to_storage(weight)
    ours.tensors.update({f"{module}.weight_{part}": tensor for part, tensor in stored.items()})
    activations = _activations(told)
    static = parts.get("act_quant_scale")
    if static is not None:
        ours.tensors[f"{module}.input_scale"] = static.float().reshape(())
    ours.modules[module] = {
        "weights": str(weight.spec),
        "activations": activations,
        "algorithm": "auto",
        "calibratable": "no" if static is None else "yes",
    }
    ours.dtypes[module] = _DTYPES[told["dtype"]["_data"]] if "dtype" in told else parts["scale"].dtype


def _int8(weight: _Weight) -> QuantizedTensor:
    return _integers(weight, 8)


def _intx(weight: _Weight) -> QuantizedTensor:
    return _integers(weight, int(weight.told["target_dtype"]["_data"].removeprefix("int")))


def _integers(weight: _Weight, bits: int) -> QuantizedTensor:
    """Codes from -2^(bits-1), one a byte: symmetric if no zero point is set, else counted from 0."""
    scale, granularity = _granules(weight)
    codes, zero = _whole(weight), weight.parts.get("zero_point")
    narrow = "/bf16" if scale.dtype is torch.bfloat16 else ""
    lowest = -(2 ** (bits - 1))
    least, most = (int(code) for code in codes.aminmax())
    if codes.dtype is not torch.int8 or not 2 <= bits <= 8 or least < lowest or most >= -lowest:
        raise ValueError(f"its codes are no int{bits}")
    if zero is None or not zero.any():
        if least > lowest:  # ours leave the lowest code out
            return QuantizedTensor(TensorSpec.parse(f"int{bits}/{granularity}{narrow}"), codes, scale)
        zero = torch.zeros(scale.shape, dtype=torch.int8)
    if zero.dtype is not torch.int8:
        raise ValueError(f"zero points of {zero.dtype} are not read")
    spec = TensorSpec.parse(f"int{bits}/{granularity}/affine{narrow}")
    counted, origin = codes.to(torch.int16) - lowest, zero.to(torch.int16) - lowest
    if (origin < 0).any() or (origin >= 2**bits).any():
        raise ValueError("a zero point is no code")
    return QuantizedTensor(spec, counted.to(torch.uint8), scale, origin.to(torch.uint8).reshape(scale.shape))


def _int4(weight: _Weight) -> QuantizedTensor:
    packed, scale, zero = (weight.parts[part] for part in ("qdata", "scale", "zero_point"))
    size = weight.told["block_size"][-1]
    if packed.dim() != 2 or packed.dtype not in (torch.int8, torch.uint8) or type(size) is not int or size < 1:
        raise ValueError(f"codes of {packed.dtype} {list(packed.shape)} in groups of {size} are not read")
    raw = packed.view(torch.uint8)
    codes = torch.stack([raw & 15, raw >> 4], -1).flatten(1) ^ 8  # two's complement, to codes from 0
    groups = [math.ceil(codes.shape[1] / size), codes.shape[0]]
    if list(scale.shape) != groups or list(zero.shape) != groups:
        raise ValueError(f"scales {list(scale.shape)} and zero points {list(zero.shape)} are not {groups}")
    scale, zero = (t.float().t().contiguous() for t in (scale, zero))
    return QuantizedTensor(TensorSpec.parse(f"int4/group{size}/shift"), codes, scale, zero - 8 * scale)


def _float8(weight: _Weight) -> QuantizedTensor:
    scale, granularity = _granules(weight)
    codes = _whole(weight)
    if codes.dtype not in _FLOAT8:
        raise ValueError(f"its codes are {codes.dtype}")
    return QuantizedTensor(TensorSpec.parse(f"{_FLOAT8[codes.dtype]}/{granularity}"), codes, scale.float())


_READERS: dict[str, Callable[[_Weight], QuantizedTensor]] = {
    "Int8Tensor": _int8,
    "IntxUnpackedToInt8Tensor": _intx,
    "Int4Tensor": _int4,
    "Float8Tensor": _float8,
}


def _whole(weight: _Weight) -> Tensor:
    return weight.parts["qdata"].reshape(weight.shape)


def _granules(weight: _Weight) -> tuple[Tensor, str]:
    """Scales in the shape that the granularity gives, and the granularity, of the blocks that share one."""
    rows, columns = weight.shape
    scale, block = weight.parts["scale"], weight.told.get("block_size") or list(weight.parts["qdata"].shape)
    if not isinstance(block, list) or not block or not all(type(size) is int and size >= 1 for size in block):
        raise ValueError("its block_size is no list of sizes")
    high, wide = block[0], math.prod(block[1:])
    if high > 1 and (high, wide) != (rows, columns):
        name, shape = f"block{high}x{wide}", [math.ceil(rows / high), math.ceil(columns / wide)]
    elif high == rows and wide == columns and rows > 1:
        name, shape = "tensor", [1, 1]
    elif wide == columns:
        name, shape = "channel", [rows, 1]
    else:
        name, shape = f"group{wide}", [rows, math.ceil(columns / wide)]
    if scale.numel() != math.prod(shape) or scale.dtype not in _DTYPES.values():
        raise ValueError(f"scales {list(scale.shape)} of {scale.dtype} do not fit blocks {block}")
    scale = scale if scale.dtype is torch.bfloat16 else scale.float()
    return scale.reshape(shape).contiguous(), name


def _activations(told: Mapping[str, Any]) -> str:
    """The text of the activations' spec, of what torchao says of them."""
    if told.get("activation_quantization") is not None:
        raise ValueError(f"activations {str(told['activation_quantization'])[:60]!r} are not read")
    dynamic = told.get("act_quant_kwargs")
    if dynamic is None:
        return "none"
    about = dynamic["_data"]
    if about.get("mapping_type", {}).get("_data", "SYMMETRIC") != "SYMMETRIC":
        raise ValueError("activations with a zero point are not read")
    granularities = {"PerRow": "token", "PerTensor": "tensor"}
    granularity = about["granularity"]["_type"]
    if granularity not in granularities:
        raise ValueError(f"activations by {str(granularity)[:40]!r} are not read")
    number = about["float8_dtype"]["_data"] if "float8_dtype" in about else "int8"
    return f"{number}/{granularities[granularity]}"


def _names(path: Path, metadata: Mapping[str, str]) -> list[str]:
    try:
        names = json.loads(metadata[NAMES])
    except (ValueError, RecursionError) as error:
        raise InvalidCheckpoint(path, f"its header's {NAMES} is no JSON: {error}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InvalidCheckpoint(path, f"its header's {NAMES} is no list of texts")
    return names


def _json(path: Path, name: str, text: str) -> dict[str, Any]:
    try:
        told = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _refused(path, name, f"its header is no JSON: {error}") from error
    if not isinstance(told, dict):
        raise _refused(path, name, "its header is no object")
    return told


def _refused(path: Path, name: str, problem: str) -> InvalidCheckpoint:
    return InvalidCheckpoint(path, f"torchao's weight {name!r}: {problem}")
