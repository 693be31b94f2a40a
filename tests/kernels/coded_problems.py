"""Weights of every format for the kernels' tests: random patterns, not quantized values, so that every code occurs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.numerics import code_values, spread
from fxquant.ops import reference
from fxquant.spec import TensorSpec
from tests.kernels.cpu_helpers import multiplies_digits
from tests.twins import U, fixed_point_error

FLOAT_NAMES = (
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
    "fp8_e6m1",
    "fp8_e1m6",
    "fp7_e3m3",
    "fp6_e3m2",
    "fp6_e2m3",
    "fp5_e2m2",
    "fp4_e2m1",
    "fp3_e1m1",
)
INTEGER_SPECS = [
    f"int{bits}/{rest}"
    for bits in range(2, 9)
    for rest in ("channel", "tensor/affine", "group32/affine/bf16", "group30/shift", "group5/shift/bf16", "block128x20")
] + [f"int{bits}/{rest}" for bits in (2, 3, 4) for rest in ("group16/stepped", "group20/stepped")]
FLOAT_SPECS = [
    f"{name}/{rest}" for name in FLOAT_NAMES for rest in ("channel", "group32/e8m0", "group16/e4m3", "group7")
]
SPECS = INTEGER_SPECS + FLOAT_SPECS
# One of each way through the kernels: planes of one to three widths, a zero point, a shift, floats, a tensor scale.
FEW_SPECS = (
    "int4/group128/affine/bf16",
    "int7/group12",
    "int3/channel/shift",
    "float8_e4m3fn/channel",
    "fp4_e2m1/group16/e4m3",
)
# opcheck's schema test multiplies the arguments, which torch cannot do with float8.
WITHOUT_ARITHMETIC = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
ALL_CHECKS = ("test_schema", *WITHOUT_ARITHMETIC)
DYNAMIC_SPECS = [
    f"int{bits}/{rest}"
    for bits in range(2, 9)
    for rest in (
        "channel",
        "tensor/affine",
        "group32/bf16",
        *(("group32/stepped", "group12/stepped") if bits <= 4 else ()),
        "group20/affine",
        "group1000/affine",
        "block128x128/affine",
    )
]


@dataclass(frozen=True)
class Coded:
    """A weight [N, K]: codes and their numbers in plain shapes, and all of it as the kernels take it."""

    spec: TensorSpec
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    tensor_scale: Tensor | None
    bias: Tensor

    @property
    def sizes(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def text(self) -> str:
        return str(self.spec)

    def granules(self, t: Tensor) -> Tensor:
        return reference.pack_granules(t, self.text, *self.sizes)

    @property
    def packed(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """(packed codes, scale, zero point) in the layout of the kernels."""
        zero_point = None if self.zero_point is None else self.granules(self.zero_point)
        return reference.pack_panels(self.codes, self.text), self.granules(self.scale), zero_point

    def terms(self) -> tuple[Tensor, Tensor]:
        """(pattern - zero) * scale * tensor_scale and what is added to it, the shift: float64, without rounding."""
        values = code_values(self.spec.format).double()
        raw = self.codes.view(torch.uint8).int() & (2**self.spec.format.bits - 1)
        value = raw.double() if self.spec.has_zero_point else values[raw]
        shift = torch.zeros_like(value)
        if self.zero_point is not None:
            zero = spread(self.zero_point.double(), self.codes.shape, self.spec.granularity)
            value, shift = (value, shift + zero) if self.spec.scheme == "shift" else (value - zero, shift)
        value = value * spread(self.scale.double(), self.codes.shape, self.spec.granularity)
        return (value if self.tensor_scale is None else value * self.tensor_scale.double()), shift

    def dynamic(self, op: object, x: Tensor, bias: Tensor | None, dtype: torch.dtype, *isa: int) -> Tensor:
        return op(x, *self.packed, bias, *self.sizes, self.text, dtype, *isa)  # pyright: ignore[reportCallIssue]

    def weight_only(self, op: object, x: Tensor, bias: Tensor | None, dtype: torch.dtype, *isa: int) -> Tensor:
        arguments = (*self.packed, self.tensor_scale, bias, *self.sizes, self.text, dtype)
        return op(x, *arguments, *isa)  # pyright: ignore[reportCallIssue]

    @property
    def takes_codes(self) -> bool:
        """Whether the kernels multiply codes with x in fixed point, and scale the sums of each granule."""
        size = self.spec.granularity.size
        whole = size == 0 or size >= self.sizes[1] or size % 4 == 0
        return self.spec.format.kind == "int" and self.spec.scheme != "shift" and whole

    def kernel_bound(self, x: Tensor, isa: int) -> tuple[Tensor, Tensor]:
        """bound(x), or what the kernels of that instruction set do better or otherwise."""
        if multiplies_digits(isa):
            return self._digits_bound(x) if self.takes_codes else self.bound(x)
        return self._granules_bound(x) if self.sums_granules else self.bound(x)

    def _digits_bound(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """That of x in fixed point.

        The sums of each digit in each granule meet a rounding as they become floats, one with their scale, one for each
        granule that follows; two more put the three digits together. The digits' magnitudes are 2**16, 2**8 and 1 times
        128 at most, beside an x of at least 2**21: together |x| + amax / 31.
        """
        value = self.terms()[0]
        count = self.scale.shape[-1] + 4
        gamma = count * U / (1 - count * U)
        magnitude = x.double().abs() + x.double().abs().amax(-1, keepdim=True) / 31
        return self.bound(x)[0], fixed_point_error(x, value) + gamma * (magnitude @ value.abs().t())

    @property
    def sums_granules(self) -> bool:
        """Whether the kernels sum up x times codes, each granule for itself, and scale the sums."""
        size = self.spec.granularity.size
        whole = size == 0 or size >= self.sizes[1]
        wanted = self.spec.format.kind == "int" and self.spec.format.bits == 4 and self.spec.scheme != "shift"
        return wanted and (whole or (size >= 16 and size % 8 == 0))

    def _granules_bound(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """That of sums of floats by granule.

        Their terms are x * (pattern - 8), as many as a granule has k, less (zero - 8) * sum of x. Each term meets a
        rounding per k of its granule, two where the zero comes in, one for the scale, one for each granule that follows
        and one for the tensor scale.
        """
        inner, granules = self.spec.granularity.size or self.sizes[1], self.scale.shape[-1]
        count = min(inner, self.sizes[1]) + granules + 3
        raw = (self.codes.view(torch.uint8).int() & 15) ^ (0 if self.spec.has_zero_point else 8)
        magnitude = (raw - 8).abs().double()
        if self.zero_point is not None:
            magnitude += spread((self.zero_point.double() - 8).abs(), self.codes.shape, self.spec.granularity)
        magnitude *= spread(self.scale.double(), self.codes.shape, self.spec.granularity)
        if self.tensor_scale is not None:
            magnitude *= self.tensor_scale.double()
        gamma = count * U / (1 - count * U)
        return self.bound(x)[0], gamma * (x.double().abs() @ magnitude.t())

    def bound(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(x @ weight^T in float64, how far float32 sums of rounded values may be from it)."""
        value, shift = self.terms()
        k = self.sizes[1] + 3  # one rounding for each step of decoding: scale, shift, tensor scale
        gamma = k * U / (1 - k * U)
        return x.double() @ (value + shift).t(), gamma * (x.double().abs() @ (value.abs() + shift.abs()).t())


def coded(text: str, n: int, k: int, *, seed: int, exact: bool = False) -> Coded:
    """exact: scales are powers of two, shifts and biases small multiples of them, tensor_scale 1/4."""
    spec, generator = TensorSpec.parse(text), torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 2**spec.format.bits, (n, k), generator=generator, dtype=torch.uint8)
    codes = raw.view(spec.code_dtype)
    if spec.code_dtype == torch.int8:
        codes = (raw.to(torch.int16) - 2 ** (spec.format.bits - 1)).to(torch.int8)
    if spec.format.kind == "float":  # NaN and infinity have a test of their own
        finite = code_values(spec.format).isfinite()[raw.int()]
        codes = torch.where(finite, raw, 0).to(torch.uint8).view(spec.code_dtype)
    shape = spec.granularity.scale_shape([n, k])
    scale = torch.exp2(torch.randint(-6, -3, shape, generator=generator).float())
    if spec.scale == "stepped" and not exact:
        step = torch.randint(8, 16, (n, 1), generator=generator) * 2.0**-9
        scale = step * torch.randint(1, 17, shape, generator=generator)
    elif not exact and spec.scale != "e8m0":
        scale = scale * (torch.rand(shape, generator=generator) + 0.5)
    scale = scale.to(spec.scale_dtype)
    zero_point = None
    if spec.scheme == "affine":
        zero_point = torch.randint(0, 2**spec.format.bits, shape, generator=generator).to(torch.uint8)
    elif spec.scheme == "shift":
        zero_point = (torch.randint(-32, 33, shape, generator=generator) * 2.0**-6).to(spec.scale_dtype)
    tensor_scale = None
    if spec.has_tensor_scale:
        tensor_scale = torch.full([1, 1], 0.25) if exact else torch.rand(n, 1, generator=generator) + 0.5
    bias = torch.randint(-64, 65, (n,), generator=generator).float()
    return Coded(spec, codes, scale, zero_point, tensor_scale, bias if exact else bias / 37)


def opchecks(arguments: tuple[object, ...]) -> tuple[str, ...]:
    """Those of torch.library.opcheck that these arguments allow."""
    eight = any(isinstance(a, Tensor) and a.dtype.is_floating_point and a.dtype.itemsize == 1 for a in arguments)
    return WITHOUT_ARITHMETIC if eight else ALL_CHECKS
