"""What one tensor is quantized to."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from fxquant.errors import InvalidSpec, nearest
from fxquant.spec.formats import Granularity, NumberFormat, number_format

Scheme = Literal["symmetric", "affine", "shift"]
Scale = Literal["float32", "bfloat16", "stepped", "e8m0", "e4m3"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
SCALES: dict[Scale, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "stepped": torch.bfloat16,
    "e8m0": torch.float8_e8m0fnu,
    "e4m3": torch.float8_e4m3fn,
}
SCALE_TEXTS: dict[str, Scale] = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "stepped": "stepped",
    "e8m0": "e8m0",
    "e4m3": "e4m3",
}
# Names for a whole spec: the block formats of OCP MX v1.0 and of NVIDIA's NVFP4.
NAMED_SPECS = {
    "mxfp8": "float8_e4m3fn/group32/e8m0",
    "mxfp8_e4m3": "float8_e4m3fn/group32/e8m0",
    "mxfp8_e5m2": "float8_e5m2/group32/e8m0",
    "mxfp6": "fp6_e2m3/group32/e8m0",
    "mxfp6_e2m3": "fp6_e2m3/group32/e8m0",
    "mxfp6_e3m2": "fp6_e3m2/group32/e8m0",
    "mxfp4": "fp4_e2m1/group32/e8m0",
    "nvfp4": "fp4_e2m1/group16/e4m3",
}
KNOWN_SCALES = "float32, bf16, stepped, e8m0 or e4m3"
STEPPED_BITS = 4  # 16 * 8 is what an int8 code holds
FORM = "a tensor spec is format/granularity or format/granularity/scheme/scale, such as int8/channel"


@dataclass(frozen=True)
class TensorSpec:
    """Format, granularity, scheme and scale type of one tensor: text 'int8/channel' or 'int4/group128/affine/bf16'.

    scheme  symmetric: code 0 means 0. affine: an integer zero point, for a range that holds 0. shift: the value of code
            0 is a float, for any range.
    scale   how a scale is stored: float32, bfloat16, stepped (bfloat16, and those of a row are whole multiples, 16 at
            most, of one step: each code times its multiple is an int8 code, and the row has one scale), e8m0 (a power
            of two, one byte), e4m3 (float8, under one float32 scale for the whole tensor).
    """

    format: NumberFormat
    granularity: Granularity
    scheme: Scheme = "symmetric"
    scale: Scale = "float32"

    def __post_init__(self) -> None:
        if not isinstance(self.format, NumberFormat) or not isinstance(self.granularity, Granularity):
            text = f"{self.format}/{self.granularity}"
            raise InvalidSpec(text, "a TensorSpec takes a NumberFormat and a Granularity; TensorSpec.parse reads text")
        if self.scheme not in SCHEMES:
            raise InvalidSpec(self.scheme, "a scheme is symmetric, affine or shift")
        if self.scale not in SCALES:
            raise InvalidSpec(self.scale, f"a scale is {KNOWN_SCALES}")
        if self.scheme != "symmetric" and self.format.kind != "int":
            raise InvalidSpec(self, f"a zero point needs an integer format; leave '{self.scheme}' out")
        if self.scale in ("e8m0", "e4m3") and (self.scheme, self.granularity.kind) != ("symmetric", "group"):
            raise InvalidSpec(self, f"{self.scale} scales are for symmetric groups, such as group32")
        if self.scale == "stepped":
            small = self.format.kind == "int" and self.format.bits <= STEPPED_BITS
            if not small or (self.scheme, self.granularity.kind) != ("symmetric", "group"):
                raise InvalidSpec(
                    self, "stepped scales are for symmetric groups of int2, int3 or int4, such as int4/group32"
                )

    @property
    def qmin(self) -> float:
        """The smallest code: -127 for int8, -7 for int4; 0 if there is a zero point."""
        return 0 if self.has_zero_point else self.format.qmin

    @property
    def qmax(self) -> float:
        """The largest code: 127 for int8, 7 for int4; 255 and 15 if there is a zero point."""
        return 2**self.format.bits - 1 if self.has_zero_point else self.format.qmax

    @property
    def code_dtype(self) -> torch.dtype:
        """The dtype in which one code is stored, one code an element: uint8 if there is a zero point."""
        return torch.uint8 if self.has_zero_point else self.format.storage

    @property
    def scale_dtype(self) -> torch.dtype:
        """The dtype of the scales, and of the shifts."""
        return SCALES[self.scale]

    @property
    def has_zero_point(self) -> bool:
        """True if affine or shift."""
        return self.scheme != "symmetric"

    @property
    def has_tensor_scale(self) -> bool:
        """True if the scales stand under one float32 scale for the whole tensor."""
        return self.scale == "e4m3"

    @property
    def depends_on_whole(self) -> bool:
        """True if a code depends on values of other rows: joining two tensors along axis 0 would change codes."""
        return self.has_tensor_scale or self.granularity.kind == "tensor"

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes that a tensor of that shape takes: codes packed row by row, scales, zero points or shifts.

        Raises `InvalidSpec` for a shape that cannot have this granularity.
        """
        if problem := self.granularity.unfit(shape):
            raise InvalidSpec(self, problem)
        *lead, last = shape or (1,)
        codes = math.prod(lead) * ((last * self.format.bits + 7) // 8)
        one_granule = self.scale_dtype.itemsize
        if self.has_zero_point:
            one_granule += 1 if self.scheme == "affine" else self.scale_dtype.itemsize
        granules = math.prod(self.granularity.scale_shape(shape))
        return codes + granules * one_granule + (4 if self.has_tensor_scale else 0)

    def __str__(self) -> str:
        parts = [str(self.format), str(self.granularity)]
        if self.scheme != "symmetric":
            parts.append(self.scheme)
        if self.scale != "float32":
            parts.append("bf16" if self.scale == "bfloat16" else self.scale)
        return "/".join(parts)

    @staticmethod
    def parse(text: str | TensorSpec) -> TensorSpec:
        """Read 'format/granularity[/scheme][/scale]' or a name such as 'mxfp4'.

        Raises `UnknownFormat` or `InvalidSpec`.
        """
        if isinstance(text, TensorSpec):
            return text
        if not isinstance(text, str):
            raise InvalidSpec(text, "a tensor spec is text such as 'int8/channel'")
        # Dynamo passes over caches, and warns of them.
        return _parse(text) if torch.compiler.is_compiling() else _parsed(text)


def _parse(text: str) -> TensorSpec:
    parts = NAMED_SPECS.get(text.strip(), text.strip()).split("/")
    if len(parts) not in (2, 3, 4):
        near = nearest(text, tuple(NAMED_SPECS))
        raise InvalidSpec(text, FORM + (f"; did you mean {near!r}?" if near else ""))
    scheme, scale = _scheme_and_scale(text, parts[2:])
    return TensorSpec(number_format(parts[0]), Granularity.parse(parts[1]), scheme, scale)


_parsed = functools.lru_cache(maxsize=1024)(_parse)  # ops read texts at every call


def _scheme_and_scale(text: str, parts: list[str]) -> tuple[Scheme, Scale]:
    scheme: Scheme = "symmetric"
    rest = list(parts)
    for known in SCHEMES:
        if rest and rest[0] == known:
            scheme = known
            rest.pop(0)
            break
    if not rest:
        return scheme, "float32"
    if len(rest) == 1 and rest[0] in SCALE_TEXTS:
        return scheme, SCALE_TEXTS[rest[0]]
    if len(rest) < len(parts):
        raise InvalidSpec(text, f"{FORM}; a scale is {KNOWN_SCALES}")
    near = nearest(rest[0], (*SCHEMES, *SCALE_TEXTS))
    hint = f"; did you mean {near!r}?" if near else ""
    raise InvalidSpec(text, f"a scheme is symmetric, affine or shift, and a scale {KNOWN_SCALES}{hint}")
