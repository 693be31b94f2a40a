"""Number formats, and how many values share one scale."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from fxquant.errors import InvalidSpec, UnknownFormat, nearest

FormatKind = Literal["int", "float"]
GranularityKind = Literal["tensor", "channel", "token", "sample", "group", "block"]
GRANULARITIES = ("tensor", "channel", "token", "sample", "group", "block")
GRANULARITY_FORMS = (
    "a granularity is tensor, channel, token or group<n>, such as group128; also channel<axis>, sample, block<r>x<c>"
)


@dataclass(frozen=True)
class NumberFormat:
    """A format of codes: its symmetric range qmin..qmax, and the dtype in which one code is stored.

    An integer format leaves out its most negative code, so that the range is symmetric. A float format has a sign bit,
    `exponent_bits` and `mantissa_bits`; the integers have 0 of both.
    """

    name: str
    bits: int
    kind: FormatKind
    qmin: float
    qmax: float
    storage: torch.dtype
    exponent_bits: int = 0
    mantissa_bits: int = 0

    def __str__(self) -> str:
        return self.name

    @property
    def is_small_float(self) -> bool:
        """True for fpB_eXmY, whose codes are bit patterns in uint8; False for integers and torch's float8 dtypes."""
        return self.kind == "float" and self.storage == torch.uint8

    @property
    def largest_exponent(self) -> int:
        """floor(log2(qmax)): what an e8m0 scale subtracts; `emax` of OCP MX."""
        return math.frexp(self.qmax)[1] - 1

    @property
    def bias(self) -> int:
        """What a small float's exponent field is larger by than its exponent: 2^(X-1) - 1, and 0 for X = 1."""
        return 2 ** (self.exponent_bits - 1) - 1


def _integer(bits: int) -> NumberFormat:
    largest = 2 ** (bits - 1) - 1
    return NumberFormat(f"int{bits}", bits, "int", -largest, largest, torch.int8)


def _small_float(exponent_bits: int, mantissa_bits: int) -> NumberFormat:
    bits = 1 + exponent_bits + mantissa_bits
    largest_exponent = 2**exponent_bits - 1 - (2 ** (exponent_bits - 1) - 1)
    largest = math.ldexp(2.0 - 2.0**-mantissa_bits, largest_exponent)
    name = f"fp{bits}_e{exponent_bits}m{mantissa_bits}"
    return NumberFormat(name, bits, "float", -largest, largest, torch.uint8, exponent_bits, mantissa_bits)


INT2, INT3, INT4, INT5, INT6, INT7, INT8 = (_integer(bits) for bits in range(2, 9))
FLOAT8_E4M3FN = NumberFormat("float8_e4m3fn", 8, "float", -448.0, 448.0, torch.float8_e4m3fn, 4, 3)
FLOAT8_E5M2 = NumberFormat("float8_e5m2", 8, "float", -57344.0, 57344.0, torch.float8_e5m2, 5, 2)
FLOAT8_E4M3FNUZ = NumberFormat("float8_e4m3fnuz", 8, "float", -240.0, 240.0, torch.float8_e4m3fnuz, 4, 3)
FLOAT8_E5M2FNUZ = NumberFormat("float8_e5m2fnuz", 8, "float", -57344.0, 57344.0, torch.float8_e5m2fnuz, 5, 2)
FP6_E3M2 = _small_float(3, 2)
FP6_E2M3 = _small_float(2, 3)
FP5_E2M2 = _small_float(2, 2)
FP4_E2M1 = _small_float(2, 1)

# Every format with a name of its own; fpB_eXmY of other splits are made by `number_format`.
FORMATS = {
    f.name: f
    for f in (
        *(INT8, INT7, INT6, INT5, INT4, INT3, INT2),
        *(FLOAT8_E4M3FN, FLOAT8_E5M2, FLOAT8_E4M3FNUZ, FLOAT8_E5M2FNUZ),
        *(FP6_E3M2, FP6_E2M3, FP5_E2M2, FP4_E2M1),
    )
}
ALIASES = {
    **{f"i{bits}": f"int{bits}" for bits in range(2, 9)},
    **{f"qint{bits}": f"int{bits}" for bits in range(2, 9)},
    "fp8": "float8_e4m3fn",
    "float8": "float8_e4m3fn",
    "e4m3": "float8_e4m3fn",
    "e4m3fn": "float8_e4m3fn",
    "fp8_e4m3": "float8_e4m3fn",
    "fp8_e4m3fn": "float8_e4m3fn",
    "float8_e4m3": "float8_e4m3fn",
    "qfloat8": "float8_e4m3fn",
    "qfloat8_e4m3fn": "float8_e4m3fn",
    "e5m2": "float8_e5m2",
    "fp8_e5m2": "float8_e5m2",
    "qfloat8_e5m2": "float8_e5m2",
    "e4m3fnuz": "float8_e4m3fnuz",
    "qfloat8_e4m3fnuz": "float8_e4m3fnuz",
    "e5m2fnuz": "float8_e5m2fnuz",
    "e3m2": "fp6_e3m2",
    "float6_e3m2fn": "fp6_e3m2",
    "e2m3": "fp6_e2m3",
    "float6_e2m3fn": "fp6_e2m3",
    "e2m2": "fp5_e2m2",
    "e2m1": "fp4_e2m1",
    "fp4": "fp4_e2m1",
    "float4_e2m1fn": "fp4_e2m1",
}


def number_format(name: str | NumberFormat) -> NumberFormat:
    """The format of that name or alias; any fpB_eXmY with B = 1 + X + Y, 3 <= B <= 8, X >= 1.

    Raises `UnknownFormat`, which names the nearest.
    """
    if isinstance(name, NumberFormat):
        return name
    if isinstance(name, str):
        if found := FORMATS.get(ALIASES.get(name, name)):
            return found
        fields = re.fullmatch(r"fp([3-8])_e([1-7])m([0-6])", name)
        if fields and int(fields[1]) == 1 + int(fields[2]) + int(fields[3]):
            return _small_float(int(fields[2]), int(fields[3]))
    raise UnknownFormat(name, [*FORMATS, *ALIASES])


@dataclass(frozen=True)
class Granularity:
    """Which values share one scale.

    tensor    one scale; a tensor of n dimensions has scale [1] * n
    channel   one per index of `axis`, 0 by default: weight [N, K] -> scale [N, 1]
    token     one per row of the last axis: activation [..., K] -> scale [..., 1]
    sample    one per index of axis 0 of an activation: [B, ...] -> scale [B, 1, ...]
    group     one per `size` neighbours along the last axis: [..., K] -> scale [..., ceil(K / size)]; the last group of
              a row may be shorter
    block     one per block of `rows` x `size` of a matrix: [N, K] -> scale [ceil(N / rows), ceil(K / size)]
    """

    kind: GranularityKind
    size: int = 0
    axis: int = 0
    rows: int = 0

    def __post_init__(self) -> None:
        if self.kind not in GRANULARITIES:
            raise InvalidSpec(self.kind, GRANULARITY_FORMS)
        if any(type(number) is not int for number in (self.size, self.axis, self.rows)):
            raise InvalidSpec(self, "sizes, rows and axes are whole numbers")
        if self.kind == "block" and (self.size < 1 or self.rows < 1):
            raise InvalidSpec(f"block{self.rows}x{self.size}", "a block has at least one row and one column")
        if self.kind != "block" and (self.kind == "group") != (self.size > 0):
            raise InvalidSpec(f"{self.kind}{self.size}", "a group, and only a group, has a size, of at least 1")
        if (self.axis and self.kind != "channel") or (self.rows and self.kind != "block"):
            raise InvalidSpec(self.kind, "only a channel has an axis, and only a block has rows")

    def __str__(self) -> str:
        match self.kind:
            case "group":
                return f"group{self.size}"
            case "channel":
                return f"channel{self.axis or ''}"
            case "block":
                return f"block{self.rows}x{self.size}"
            case _:
                return self.kind

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of a block."""
        return self.rows, self.size

    @staticmethod
    def parse(text: str) -> Granularity:
        """Read 'tensor', 'channel', 'channel-1', 'token', 'sample', 'group128' or 'block128x128'.

        Raises `InvalidSpec`.
        """
        if text in ("tensor", "channel", "token", "sample"):
            return Granularity(text)
        if found := re.fullmatch(r"group([1-9][0-9]*)", text):
            return Granularity("group", int(found[1]))
        if found := re.fullmatch(r"channel(0|-?[1-9][0-9]*)", text):
            return Granularity("channel", axis=int(found[1]))
        if found := re.fullmatch(r"block([1-9][0-9]*)x([1-9][0-9]*)", text):
            return Granularity("block", int(found[2]), rows=int(found[1]))
        near = nearest(text, ("tensor", "channel", "token", "sample", "group128", "block128x128"))
        hint = f"; did you mean {near!r}?" if near else ""
        raise InvalidSpec(text, GRANULARITY_FORMS + hint)

    def unfit(self, shape: Sequence[int]) -> str | None:
        """Why a tensor of that shape can't have this granularity, or None if it can."""
        ndim = len(shape)
        if self.kind == "block" and ndim != 2:
            return f"a block needs a matrix [N, K], not {ndim} dimensions"
        if self.kind == "channel" and not -ndim <= self.axis < ndim:
            return f"granularity {self} needs an axis {self.axis}, which {ndim} dimensions do not have"
        if self.kind != "tensor" and ndim == 0:
            return f"granularity {self} needs at least one dimension"
        return None

    def scale_shape(self, shape: Sequence[int]) -> list[int]:
        """Shape of the scales of a tensor of that shape; works on symbolic sizes."""
        ones = [1] * len(shape)
        match self.kind:
            case "tensor":
                return ones
            case "channel" | "sample":
                axis = self.axis % len(shape)
                return [*ones[:axis], shape[axis], *ones[axis + 1 :]]
            case "token":
                return [*shape[:-1], 1]
            case "group":
                return [*shape[:-1], (shape[-1] + self.size - 1) // self.size]
            case "block":
                return [(shape[0] + self.rows - 1) // self.rows, (shape[1] + self.size - 1) // self.size]


TENSOR = Granularity("tensor")
CHANNEL = Granularity("channel")
TOKEN = Granularity("token")
SAMPLE = Granularity("sample")


def group(size: int) -> Granularity:
    """One scale per `size` neighbours along the last axis."""
    return Granularity("group", size)


def block(rows: int, columns: int) -> Granularity:
    """One scale per block of a matrix."""
    return Granularity("block", columns, rows=rows)
