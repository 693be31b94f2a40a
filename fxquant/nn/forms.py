"""Forms of a frozen weight: as the kernels read it, resident in a module; and as a state dict stores it.

The kernels' layout is a permutation of the same bits (docs/formats.md), so a weight is in memory once, and state dicts
do not depend on the device. Both directions are O(n).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import NamedTuple, overload

import torch
from torch import Tensor

from fxquant import numerics
from fxquant.errors import ShapeMismatch
from fxquant.numerics.held import held_dtype
from fxquant.numerics.threads import one_thread
from fxquant.ops.storage import check_table
from fxquant.spec import TensorSpec
from fxquant.tensor import QuantizedTensor

_FXQUANT = torch.ops.fxquant
# What a frozen weight consists of, in this order; each is a buffer, named after the weight.
PARTS = ("codes", "scale", "zero_point", "tensor_scale")
# What a state dict holds of it: the parts that it has, and its spec as text, in bytes.
STORED = (*PARTS, "spec")
_STORED_LAYOUTS = ("rows", "blocks")
_PANEL_LAYOUTS = ("int8", "panels")
ON_DEVICES = ("tiles", "blocks")  # what Triton kernels read
_LONGEST_TEXT = 256  # of a spec
_AT_ONCE = 1 << 20  # bytes of codes that are made to be stored: they are written while they are in a cache


class Form(NamedTuple):
    """How one frozen weight [rows, columns] lies in memory.

    layout  "int8": int8_pack and its scales. "panels": pack_panels and pack_granules. "rows": pack_rows, as stored.
            "tiles": tile_codes and transpose_granules, where Triton kernels read them. "blocks": as "rows", for their
            products of blocks.
    """

    spec: str
    layout: str
    rows: int
    columns: int
    byte_scale: torch.dtype | None = None  # of scales that are held as bytes
    takes_integers: bool = False  # sums of integer products serve it: see `lowering.linears.IntegerDynamic`

    @property
    def parsed(self) -> TensorSpec:
        return TensorSpec.parse(self.spec)


def form_of(
    spec: TensorSpec,
    shape: tuple[int, int],
    *,
    on_kernels: bool,
    on_int8_kernels: bool = True,
    on_device: str = "",
) -> Form:
    """The form for a weight that kernels read (of products, of int8 rows, a device's), or that is decoded by rows."""
    if not on_kernels or not numerics.fits_panels(spec) or shape[1] > numerics.MAX_IN_FEATURES:
        layout = "rows"
    elif on_device:
        layout = on_device
    else:
        layout = "int8" if on_int8_kernels and str(spec) == "int8/channel" else "panels"
    byte_scale = spec.scale_dtype if spec.scale_dtype.itemsize == 1 else None
    return Form(str(spec), layout, *shape, byte_scale, layout == "panels" and _takes_integers(spec))


def pack(weight: QuantizedTensor, form: Form) -> tuple[Tensor | None, ...]:
    """The resident tensors, in the order of `PARTS`. Scales of one byte are held as uint8: what moves tensors can't
    always move float8."""
    spec, rows, columns = form.spec, form.rows, form.columns
    codes, scale, zero_point = weight.codes, weight.scale, weight.zero_point
    if form.layout == "int8":
        codes = _FXQUANT.int8_pack(codes)
    elif form.layout in _STORED_LAYOUTS:
        codes = _FXQUANT.pack_rows(codes, spec)
    elif form.layout == "tiles":
        codes = _FXQUANT.tile_codes(codes, spec)
        scale = _FXQUANT.transpose_granules(scale, spec, rows, columns)
        zero_point = None if zero_point is None else _FXQUANT.transpose_granules(zero_point, spec, rows, columns)
    else:
        codes = _FXQUANT.pack_panels(codes, spec)
        scale = _FXQUANT.pack_granules(scale, spec, rows, columns)
        zero_point = None if zero_point is None else _FXQUANT.pack_granules(zero_point, spec, rows, columns)
    return codes, _as_held(scale), None if zero_point is None else _as_held(zero_point), weight.tensor_scale


def unpack(parts: tuple[Tensor | None, ...], form: Form) -> QuantizedTensor:
    """The inverse of `pack`."""
    codes, scale, zero_point, tensor_scale = parts
    spec = form.parsed
    assert codes is not None
    assert scale is not None
    if form.layout == "int8":
        codes = _FXQUANT.int8_unpack(codes, form.rows, form.columns)
    elif form.layout in _STORED_LAYOUTS:
        codes = _FXQUANT.unpack_rows(codes, form.spec, form.columns)
    elif form.layout == "tiles":
        codes = _FXQUANT.untile_codes(codes, form.columns, form.spec)
    else:
        codes = _FXQUANT.unpack_panels(codes, form.rows, form.columns, form.spec)
    scale, zero_point = _numbers_read(scale, form), None if zero_point is None else _numbers_read(zero_point, form)
    return QuantizedTensor(spec, codes, scale, zero_point, tensor_scale)


def decoded(parts: tuple[Tensor | None, ...], form: Form, dtype: torch.dtype) -> Tensor:
    """The values [rows, columns]; one op, whatever the layout."""
    codes, scale, zero_point, tensor_scale = parts
    assert scale is not None
    scale, zero_point = read(scale, form), None if zero_point is None else read(zero_point, form)
    if form.layout == "int8":
        return _FXQUANT.dequantize(_FXQUANT.int8_unpack(codes, form.rows, form.columns), scale, None, form.spec, dtype)
    if form.layout in _STORED_LAYOUTS:
        return _FXQUANT.decode_rows(codes, scale, zero_point, tensor_scale, form.columns, form.spec, dtype)
    if form.layout == "tiles":
        return _FXQUANT.decode_tiles(codes, scale, zero_point, tensor_scale, form.columns, form.spec, dtype)
    return _FXQUANT.decode_weight(codes, scale, zero_point, tensor_scale, form.rows, form.columns, form.spec, dtype)


def to_storage(weight: QuantizedTensor) -> dict[str, Tensor]:
    """By part: codes as uint8 rows [N, ceil(K * bits / 8)], the spec as uint8 text, the rest of `QuantizedTensor`."""
    text = str(weight.spec)
    numbers = (weight.scale, weight.zero_point, weight.tensor_scale)
    parts = (_FXQUANT.pack_rows(weight.codes, text), *numbers, _text_as_bytes(text))
    return {part: t for part, t in zip(STORED, parts, strict=True) if t is not None}


def stored_numbers(parts: tuple[Tensor | None, ...], form: Form) -> dict[str, Tensor]:
    """By part, what a state dict holds of a resident weight besides its codes."""
    _, scale, zero_point, tensor_scale = parts
    assert scale is not None
    scale, zero_point = _numbers_read(scale, form), None if zero_point is None else _numbers_read(zero_point, form)
    numbers = (None, scale, zero_point, tensor_scale, _text_as_bytes(form.spec))
    return {part: t for part, t in zip(STORED, numbers, strict=True) if t is not None}


def stored_codes(parts: tuple[Tensor | None, ...], form: Form) -> Iterator[Tensor]:
    """The codes of a resident weight as a state dict holds them, uint8 rows, some at a time: little memory is taken."""
    codes = parts[0]
    assert codes is not None
    if form.layout in _STORED_LAYOUTS:
        yield codes
    elif form.layout in _PANEL_LAYOUTS and codes.device.type == "cpu":
        row_bytes = numerics.packed_bytes(form.columns, form.parsed.format.bits)
        step = max(1, _AT_ONCE // max(1, row_bytes * numerics.PANEL)) * numerics.PANEL
        for begin in range(0, form.rows, step):
            end = min(begin + step, form.rows)
            yield _FXQUANT.rows_of_packed(codes, form.rows, form.columns, form.spec, form.layout, begin, end)
    else:
        yield _FXQUANT.pack_rows(unpack(parts, form).codes, form.spec)


def stored(parts: tuple[Tensor | None, ...], form: Form) -> dict[str, Tensor]:
    """By part, all that a state dict holds of a resident weight, in memory of its own."""
    codes = list(stored_codes(parts, form))
    rows = codes[0].clone() if len(codes) == 1 else torch.cat(codes)
    return {"codes": rows, **stored_numbers(parts, form)}


def resident(stored: Mapping[str, Tensor], form: Form) -> tuple[Tensor | None, ...]:
    """The resident tensors of what a state dict holds, in memory of their own; the inverse of `stored`.

    Raises `ShapeMismatch` where parts, shapes or dtypes are not those of the form's spec.
    """
    spec, on_cpu = form.parsed, stored["codes"].device.type == "cpu"
    scale, zero_point, tensor_scale = _checked_numbers(stored, spec, form.columns)
    if form.layout in _STORED_LAYOUTS:
        codes = stored["codes"].clone()
    elif form.layout in _PANEL_LAYOUTS and on_cpu:
        codes = _FXQUANT.packed_of_rows(stored["codes"], form.columns, form.spec, form.layout)
    else:
        codes = _copy(_FXQUANT.unpack_rows(stored["codes"], form.spec, form.columns))
        return pack(QuantizedTensor(spec, codes, _copy(scale), _copy(zero_point), _copy(tensor_scale)), form)
    with one_thread():
        own = partial(_granules, form=form) if form.layout == "panels" else _copy
        held = None if zero_point is None else _as_held(own(zero_point))
        return codes, _as_held(own(scale)), held, _copy(tensor_scale)


def from_storage(stored: Mapping[str, Tensor], spec: TensorSpec, columns: int) -> QuantizedTensor:
    """The inverse of `to_storage`. Raises `ShapeMismatch` where parts, shapes or dtypes are not those of the spec."""
    numbers = _checked_numbers(stored, spec, columns)
    return QuantizedTensor(spec, _FXQUANT.unpack_rows(stored["codes"], str(spec), columns), *numbers)


def _checked_numbers(
    stored: Mapping[str, Tensor], spec: TensorSpec, columns: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Scale, zero point and the tensor's scale, if all parts fit together; else raises `ShapeMismatch`."""
    where, wanted = "codes of a state dict", stored_parts(spec)
    if sorted(stored) != sorted(wanted):
        raise ShapeMismatch(where, f"the parts {', '.join(stored)}", f"{', '.join(wanted)} for {spec}")
    told, text = stored["spec"], str(spec).encode()
    is_text = told.dtype is torch.uint8 and told.dim() == 1 and told.numel() < _LONGEST_TEXT
    if not is_text or bytes(told.tolist()) != text:
        met = bytes(told.tolist()).decode(errors="replace") if is_text else f"{told.dtype} {list(told.shape)}"
        raise ShapeMismatch(where, f"codes of {met}", str(spec))
    rows, scale = stored["codes"], stored["scale"]
    if spec.scale_dtype.itemsize == 1 and scale.dtype in (torch.uint8, spec.scale_dtype):
        scale = scale.view(held_dtype(spec.scale_dtype, scale.device))  # saved from another kind of device
    numbers = scale, stored.get("zero_point"), stored.get("tensor_scale")
    check_table("fxquant.nn", rows, *numbers, columns, str(spec), torch.float32)
    return numbers


def stored_parts(spec: TensorSpec) -> list[str]:
    """Those of `STORED` that a weight of that spec has."""
    there = (True, True, spec.has_zero_point, spec.has_tensor_scale, True)
    return [part for part, is_there in zip(STORED, there, strict=True) if is_there]


def read(held: Tensor, form: Form) -> Tensor:
    """A held scale (zero point, shift) in its own dtype, if its device has that."""
    return held if form.byte_scale is None else held.view(held_dtype(form.byte_scale, held.device))


def transposed(t: Tensor) -> Tensor:
    """[granules, N] -> [N, granules], also of the dtypes of one byte that torch can't copy."""
    raw = t.view(torch.uint8) if t.dtype.itemsize == 1 else t
    return raw.t().contiguous().view(t.dtype)


def _numbers_read(held: Tensor, form: Form) -> Tensor:
    """Held scales (zero points, shifts) in the shape of the spec's granularity."""
    numbers, spec = read(held, form), form.parsed
    if form.layout == "tiles":
        return _of_granularity(transposed(numbers), spec)
    if form.layout == "panels":
        return _of_granularity(numerics.unpack_granules(numbers, spec, form.rows, form.columns), spec)
    return numbers


@overload
def _copy(t: Tensor) -> Tensor: ...


@overload
def _copy(t: None) -> None: ...


def _copy(t: Tensor | None) -> Tensor | None:
    """A copy, also of dtypes of one byte that torch can't copy."""
    if t is None:
        return None
    raw = t.view(torch.uint8) if t.dtype.itemsize == 1 else t
    return raw.clone(memory_format=torch.contiguous_format).view(t.dtype)


def _text_as_bytes(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8, device="cpu")  # whatever the default is


def _granules(t: Tensor, form: Form) -> Tensor:
    return _FXQUANT.pack_granules(t, form.spec, form.rows, form.columns)


def _as_held(t: Tensor) -> Tensor:
    return t.view(torch.uint8) if t.dtype.itemsize == 1 else t


def _takes_integers(spec: TensorSpec) -> bool:
    if spec.format.kind != "int" or spec.scheme == "shift" or spec.granularity.kind == "block":
        return False
    return spec.granularity.kind != "group" or spec.granularity.size % 4 == 0


def _of_granularity(rows: Tensor, spec: TensorSpec) -> Tensor:
    """Numbers of each row -> numbers of each granule."""
    if spec.granularity.kind == "tensor":
        return rows[:1].clone(memory_format=torch.contiguous_format)  # a view would keep all rows alive
    return rows[:: spec.granularity.rows].contiguous() if spec.granularity.kind == "block" else rows
