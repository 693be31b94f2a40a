"""How float8 numbers are held: in their own dtype, or, on devices for which torch has none, as the bytes of it.

Bytes are encoded and decoded by integer arithmetic and tables: no tensor of a float8 dtype is made there.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from fxquant.numerics.small_floats import small_float_bits
from fxquant.spec import FLOAT8_E4M3FN, NumberFormat

# torch refuses to make a float8 tensor on these.
WITHOUT_FLOAT8 = ["mps"]
_E8M0 = torch.float8_e8m0fnu


def held_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that a tensor of `dtype` has on that device: uint8 in the place of a float8 dtype that it lacks."""
    return torch.uint8 if is_held_as_bytes(dtype, device) else dtype


def is_held_as_bytes(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether numbers of a float8 dtype are bytes on that device."""
    return dtype.itemsize == 1 and dtype.is_floating_point and device.type in WITHOUT_FLOAT8


def float8_bytes(values: Tensor, number: NumberFormat) -> Tensor:
    """The bytes of float32 values within the range of a float8 format, rounded to nearest even."""
    if not _is_fnuz(number):
        return small_float_bits(values, number)
    # A pattern stands for half of what it does elsewhere, and that of -0 is the only NaN.
    bits = small_float_bits(values * 2, dataclasses.replace(number, qmin=2 * number.qmin, qmax=2 * number.qmax))
    return torch.where(bits == 0x80, 0, bits)


def scale_values(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales of that dtype as float32, of their bytes too."""
    if scale.dtype != torch.uint8:
        return scale.float()
    return byte_values(dtype, scale.device)[scale.int()]


def byte_values(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The value of each byte of a float8 dtype, float32 [256]."""
    return torch.tensor(_values_of_bytes(dtype), dtype=torch.float32, device=device)


@functools.cache
def _values_of_bytes(dtype: torch.dtype) -> list[float]:
    return torch.arange(256, dtype=torch.uint8, device="cpu").view(dtype).float().tolist()  # the CPU has every dtype


def held_scale(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 scales within the range of e4m3, as they are held on their device."""
    if is_held_as_bytes(dtype, values.device):
        return float8_bytes(values, FLOAT8_E4M3FN)
    return values.to(dtype)


def held_exponents(exponents: Tensor) -> Tensor:
    """uint8 exponents, numbered as in float32, as e8m0 scales are held on their device."""
    return exponents if is_held_as_bytes(_E8M0, exponents.device) else exponents.view(_E8M0)


def _is_fnuz(number: NumberFormat) -> bool:
    return number.name.endswith("fnuz")
