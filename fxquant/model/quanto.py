"""State dicts and maps of optimum-quanto, read and written.

A frozen 8-bit module of Quanto's holds ``weight._data`` (codes, in the weight's shape) and ``weight._scale``; one of 4
or 2 bits ``weight._data._data``, ``weight._scale`` and ``weight._shift``: codes from 0, grouped as [N * K / group,
group], packed along axis 0, value scale * code - shift. The group is not stored: `group_size` is Quanto's rule. Each
module has ``input_scale`` and ``output_scale``, which are 1 until they are calibrated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from fxquant.errors import InvalidQuantizationMap, NotAModule, NotForQuanto, StateDictMismatch
from fxquant.model.maps import NONE, QuantizationMap
from fxquant.nn import QModule
from fxquant.nn.forms import STORED, to_storage
from fxquant.numerics import spread
from fxquant.spec import TensorSpec
from fxquant.tensor import QuantizedTensor

# Quanto's names, to ours; the last of two that mean one format is the one that it writes.
FORMATS = {
    "qint2": "int2",
    "qint4": "int4",
    "qint8": "int8",
    "qfloat8": "float8_e4m3fn",
    "qfloat8_e4m3fn": "float8_e4m3fn",
    "qfloat8_e4m3fnuz": "float8_e4m3fnuz",
    "qfloat8_e5m2": "float8_e5m2",
}
NAMES = {ours: quanto for quanto, ours in FORMATS.items()}
_ACTIVATIONS = ("qint8", "qfloat8", "qfloat8_e4m3fn", "qfloat8_e4m3fnuz", "qfloat8_e5m2")
_SCALES = ("input_scale", "output_scale")


def is_quanto(quantization_map: QuantizationMap, state_dict: Mapping[str, Tensor]) -> bool:
    """Whether map and state dict look like Quanto's."""
    entries = quantization_map.values() if isinstance(quantization_map, Mapping) else ()
    texts = [text for fields in entries if isinstance(fields, Mapping) for text in fields.values()]
    return any(text in FORMATS for text in texts) or any(key.endswith(".weight._data") for key in state_dict)


def group_size(columns: int) -> int | None:
    """How many weights of a row of `columns` share a scale in Quanto's 4 and 2 bits; None: all of them."""
    if columns <= 128:
        return None
    return next((size for size in (128, 96, 64, 32) if columns % size == 0), None)


# ---- reading


def from_quanto(
    model: nn.Module, state_dict: Mapping[str, Tensor], quantization_map: QuantizationMap
) -> tuple[dict[str, Tensor], dict[str, dict[str, str]]]:
    """State dict and map of Quanto's as ours, for a model with the same modules; the tensors of codes are new.

    Weights stand for the same numbers; bfloat16 scales of groups stay such, all others become float32. Activations are
    those of quantize(model, activations='qint8'): static with the scale that Quanto calibrated, dynamic where that is
    1, which is Quanto's word for none. Norms, whose outputs Quanto's Calibration leaves float, are left as they are.

    Raises:
        InvalidQuantizationMap: the map names formats that Quanto has not, or modules that `model` has not.
        StateDictMismatch: parts of a weight are missing, or have other shapes than the module.
    """
    ours = dict(state_dict)
    found: dict[str, dict[str, str]] = {}
    problems: list[str] = []
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, fields in quantization_map.items():
        weights, activations = fields.get("weights", NONE), fields.get("activations", NONE)
        scales = {name: ours.pop(key) for name in _SCALES if (key := _key(path, name)) in ours}
        if path not in modules:
            problems.append(f"{path!r}: the model has no module of that name")
        elif weights not in (NONE, *FORMATS) or activations not in (NONE, *_ACTIVATIONS):
            problems.append(f"{path!r}: Quanto has no weights {weights!r} with activations {activations!r}")
        elif weights != NONE:
            spec = _read_weight(ours, path, _shape(modules[path]), FORMATS[weights])
            found[path] = {"weights": str(spec), "activations": NONE, "algorithm": "auto", "calibratable": "no"}
            if activations != NONE:
                granularity = "token" if isinstance(modules[path], nn.Linear) else "sample"
                found[path]["activations"] = f"{FORMATS[activations]}/{granularity}"
                found[path]["calibratable"] = "yes"
                set_ones = {n: s.detach().float().reshape(()) for n, s in scales.items() if bool(s != 1)}
                ours.update({_key(path, name): scale for name, scale in set_ones.items()})
    if problems:
        raise InvalidQuantizationMap(problems)
    return ours, found


def _key(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _shape(module: nn.Module) -> tuple[int, int]:
    """[N, K] of the weight of a Linear or a Conv2d, the only ones that Quanto quantizes."""
    if isinstance(module, QModule):
        return module.matrix_shape()
    weight = module._parameters.get("weight")
    return (0, 0) if weight is None else (weight.shape[0], math.prod(weight.shape[1:]))


def _read_weight(ours: dict[str, Tensor], path: str, shape: tuple[int, int], number: str) -> TensorSpec:
    """Replace the parts of one weight by ours; its spec. A float weight, of a module not frozen, is left."""
    names = ("_data", "_scale") if number not in ("int4", "int2") else ("_data._data", "_scale", "_shift")
    keys = [_key(path, f"weight.{name}") for name in names]
    if not any(key in ours for key in keys) and _key(path, "weight") in ours:
        size = group_size(shape[1]) if len(names) == 3 else None
        return TensorSpec.parse(
            f"{number}/{f'group{size}' if size else 'channel'}{'/shift' if len(names) == 3 else ''}"
        )
    if missing := [key for key in keys if key not in ours]:
        raise StateDictMismatch(missing, [])
    parts = [ours.pop(key) for key in keys]
    try:
        weight = _eight_bits(parts, shape, number) if len(parts) == 2 else _few_bits(parts, shape, number)
    except RuntimeError as error:
        met = " and ".join(f"{key} {tuple(part.shape)}" for key, part in zip(keys, parts, strict=True))
        raise StateDictMismatch([], [], [f"{met}: not the {number} codes of a weight {shape}"]) from error
    ours.update({_key(path, f"weight_{part}"): tensor for part, tensor in to_storage(weight).items()})
    return weight.spec


def _eight_bits(parts: list[Tensor], shape: tuple[int, int], number: str) -> QuantizedTensor:
    data, scale = parts
    scale = scale.detach().float().reshape(-1, 1).expand(shape[0], 1).contiguous()
    return QuantizedTensor(TensorSpec.parse(f"{number}/channel"), data.detach().reshape(shape), scale)


def _few_bits(parts: list[Tensor], shape: tuple[int, int], number: str) -> QuantizedTensor:
    packed, scale, shift = (part.detach() for part in parts)
    rows, columns = shape
    groups = scale.numel() // rows
    granularity = "channel" if groups == 1 else f"group{columns // max(groups, 1)}"
    scheme = "shift" if shift.is_floating_point() else "affine"
    narrow = "/bf16" if scale.dtype is torch.bfloat16 else ""
    spec = TensorSpec.parse(f"{number}/{granularity}/{scheme}{narrow}")
    codes = _unpack(packed, rows * groups if groups > 1 else rows, spec.format.bits).reshape(shape)
    # Quanto subtracts its shift; ours is the value of code 0.
    zero_point = -shift.to(spec.scale_dtype) if scheme == "shift" else shift.to(torch.uint8)
    return QuantizedTensor(
        spec, codes, scale.to(spec.scale_dtype).reshape(rows, groups), zero_point.reshape(rows, groups)
    )


def _unpack(packed: Tensor, rows: int, bits: int) -> Tensor:
    """uint8 [ceil(rows / (8 / bits)), ...] -> codes [rows, ...]: the low bits of all, then the next."""
    return torch.cat([(packed >> low) & (2**bits - 1) for low in range(0, 8, bits)])[:rows]


def _pack(codes: Tensor, bits: int) -> Tensor:
    """The inverse of `_unpack`; the last rows are filled up with 0."""
    parts = 8 // bits
    missing = -codes.shape[0] % parts
    padded = torch.cat([codes, codes.new_zeros(missing, *codes.shape[1:])])
    packed = torch.zeros_like(padded[: padded.shape[0] // parts])
    for index, part in enumerate(padded.chunk(parts)):
        packed |= part << (bits * index)
    return packed


# ---- writing


def to_quanto(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, dict[str, str]]]:
    """State dict and map of a quantized model as optimum-quanto's `requantize` takes them; the model is not changed.

    Linear and Conv2d modules are written quantized: int8 and float8 per channel; int4 and int2 in any scheme, in the
    groups that Quanto takes for the shape, or in larger ones. Weights of kinds that Quanto does not quantize (tables,
    other convolutions, attention) are written as floats, rounded as they are; norms as ordinary ones. Weights stand for
    the same numbers, except that scales take the model's dtype, as Quanto needs it: in bfloat16 and float16 they are
    rounded to it. Modules that are not frozen are written as if they were.

    Raises:
        NotForQuanto: a module has a format, groups, activations or scales that Quanto cannot hold; the first is named.
    """
    if not isinstance(model, nn.Module):
        raise NotAModule(model)
    state = dict(model.state_dict())
    found: dict[str, dict[str, str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, QModule):
            continue
        for name in (*(f"{n}_{part}" for n in module.weight_names for part in STORED), *_SCALES):
            state.pop(_key(path, name), None)
        if not isinstance(module, nn.Linear | nn.Conv2d) or not module._weight_spec:
            with torch.no_grad():
                for name in module.matrix_names():
                    state[_key(path, name)] = module.float_weight(module.compute_dtype, name).contiguous()
            continue
        state.pop(_key(path, "weight"), None)
        state.update(_written(path, module))
        activations = module.quantization.activations
        found[path] = {
            "weights": NAMES[TensorSpec.parse(module._weight_spec).format.name],
            "activations": NONE if activations is None else NAMES[activations.format.name],
        }
    return state, found


def _written(path: str, module: QModule) -> Iterator[tuple[str, Tensor]]:
    """Keys and tensors of one Linear or Conv2d."""
    weight = module.quantized_weight()
    number, dtype = weight.spec.format.name, module.compute_dtype
    if number not in NAMES:
        raise NotForQuanto(path, f"its weights are {number}; Quanto has {', '.join(NAMES)}")
    size = group_size(weight.shape[1]) if weight.spec.format.bits < 8 else None
    granule = size or weight.shape[1]
    scale = _in_granules(path, weight, weight.scale.float(), granule)
    if weight.tensor_scale is not None:
        scale = scale * weight.tensor_scale
    full = module.unmatrix(weight.codes).shape
    ones = [1] * (len(full) - 1)
    if weight.spec.format.bits == 8:
        if weight.spec.has_zero_point:
            raise NotForQuanto(path, f"{weight.spec} has zero points; Quanto's 8 bits are symmetric")
        yield _key(path, "weight._data"), weight.codes.reshape(full)
        shape = [] if weight.shape[0] == 1 else [-1, *ones]
    else:
        codes, shift = _from_zero(path, weight, granule)
        grouped = codes.reshape(-1, granule) if size else codes.reshape(full)
        yield _key(path, "weight._data._data"), _pack(grouped, weight.spec.format.bits)
        shape = [-1, 1] if size else [-1, *ones]
        yield _key(path, "weight._shift"), _as(path, shift, dtype).reshape(shape)
    yield _key(path, "weight._scale"), _as(path, scale, dtype).reshape(shape)
    yield from _activation_scales(path, module, dtype)


def _in_granules(path: str, weight: QuantizedTensor, numbers: Tensor, granule: int) -> Tensor:
    """Numbers of the weight's granules -> float32 [N, K / granule]: of Quanto's, which must not be larger."""
    rows, columns = weight.shape
    each = spread(numbers.float(), (rows, columns), weight.spec.granularity).expand(rows, columns)
    each = each.reshape(rows, columns // granule, granule)
    if not torch.equal(each.amax(-1), each.amin(-1)):
        met, wanted = weight.spec.granularity, f"group{granule}" if granule < columns else "channel"
        raise NotForQuanto(path, f"its scales are per {met}; for rows of {columns} weights Quanto has one per {wanted}")
    return each[..., 0].contiguous()


def _from_zero(path: str, weight: QuantizedTensor, granule: int) -> tuple[Tensor, Tensor]:
    """Codes as Quanto counts them, from 0, and its shifts: floats, or integers where the zero is a code."""
    scheme, bits = weight.spec.scheme, weight.spec.format.bits
    if scheme == "symmetric":
        zero = 2 ** (bits - 1)
        rows, columns = weight.shape
        codes = (weight.codes + zero).to(torch.uint8)
        return codes, torch.full([rows, columns // granule], zero, dtype=torch.uint8, device=codes.device)
    assert weight.zero_point is not None
    shift = _in_granules(path, weight, weight.zero_point, granule)
    return weight.codes, -shift if scheme == "shift" else shift.to(torch.uint8)


def _activation_scales(path: str, module: QModule, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    activations = module.quantization.activations
    if activations is not None and (activations.format.name not in NAMES or activations.format.bits < 8):
        raise NotForQuanto(path, f"its activations are {activations}; Quanto's are int8 or float8")
    for name in _SCALES:
        scale = getattr(module, name)
        if activations is not None and scale is None:
            raise NotForQuanto(
                path, "its activations are dynamic; Quanto's have calibrated ranges, so calibrate it first"
            )
        one = torch.ones((), dtype=dtype)
        yield _key(path, name), one if activations is None else _as(path, scale, dtype)


def _as(path: str, numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales in the model's dtype, shifts that are integers as they are."""
    if not numbers.is_floating_point():
        return numbers
    cast = numbers.to(dtype)
    if not torch.isfinite(cast).all() or ((cast == 0) & (numbers != 0)).any():
        raise NotForQuanto(path, f"a scale does not fit {dtype}, which Quanto keeps scales in")
    return cast.contiguous()
