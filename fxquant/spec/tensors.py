"""What one tensor, and one linear, is quantized to; the presets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from fxquant.errors import InvalidSpec, UnknownPreset, nearest
from fxquant.spec.formats import (
    CHANNEL,
    FLOAT8_E4M3FN,
    INT4,
    INT8,
    TOKEN,
    Granularity,
    NumberFormat,
    group,
    number_format,
)

Scheme = Literal["symmetric", "affine"]
SCHEMES = ("symmetric", "affine")


@dataclass(frozen=True)
class TensorSpec:
    """Format, granularity and scheme of one tensor; text form 'int8/channel' or 'int4/group128/affine'."""

    format: NumberFormat
    granularity: Granularity
    scheme: Scheme = "symmetric"

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise InvalidSpec(self.scheme, "a scheme is symmetric or affine")
        if self.scheme == "affine" and self.format.kind != "int":
            raise InvalidSpec(self, "a zero point needs an integer format; leave 'affine' out")

    @property
    def qmin(self) -> float:
        """The smallest code: -127 for int8, -7 for int4; 0 if affine."""
        return 0 if self.scheme == "affine" else self.format.qmin

    @property
    def qmax(self) -> float:
        """The largest code: 127 for int8, 7 for int4; 255 and 15 if affine."""
        return 2**self.format.bits - 1 if self.scheme == "affine" else self.format.qmax

    @property
    def code_dtype(self) -> torch.dtype:
        """The dtype in which one code is stored, one code an element: uint8 if affine."""
        return torch.uint8 if self.scheme == "affine" else self.format.storage

    def __str__(self) -> str:
        affine = "/affine" if self.scheme == "affine" else ""
        return f"{self.format}/{self.granularity}{affine}"

    @staticmethod
    def parse(text: str | TensorSpec) -> TensorSpec:
        """Read 'format/granularity[/scheme]'. Raises `UnknownFormat` or `InvalidSpec`."""
        if isinstance(text, TensorSpec):
            return text
        if not isinstance(text, str):
            raise InvalidSpec(text, "a tensor spec is text such as 'int8/channel'")
        parts = text.strip().split("/")
        if len(parts) not in (2, 3):
            raise InvalidSpec(
                text, "a tensor spec is format/granularity or format/granularity/scheme, such as int8/channel"
            )
        scheme = parts[2] if len(parts) == 3 else "symmetric"
        if scheme != "symmetric" and scheme != "affine":
            near = nearest(scheme, SCHEMES)
            raise InvalidSpec(text, f"a scheme is symmetric or affine{f'; did you mean {near!r}?' if near else ''}")
        return TensorSpec(number_format(parts[0]), Granularity.parse(parts[1]), scheme)


@dataclass(frozen=True)
class LinearSpec:
    """What one linear gets: text form 'w=int8/channel x=int8/token'. None keeps that side float ('w=none')."""

    weights: TensorSpec | None
    activations: TensorSpec | None

    def __post_init__(self) -> None:
        for side in (self.weights, self.activations):
            if side is not None and not isinstance(side, TensorSpec):
                raise InvalidSpec(side, "a LinearSpec takes a TensorSpec or None a side; LinearSpec.parse reads text")
        if self.weights is not None and self.weights.granularity.kind == "token":
            raise InvalidSpec(self, "weights are scaled per tensor, channel or group<n>, not per token")
        if self.activations is not None:
            if self.activations.granularity.kind not in ("tensor", "token"):
                raise InvalidSpec(self, "activations are scaled per token or tensor")
            if self.activations.scheme != "symmetric" or self.activations.format is INT4:
                raise InvalidSpec(self, "activations are int8 or float8, symmetric")
            if self.weights is None:
                raise InvalidSpec(self, "quantized activations need quantized weights")

    def __str__(self) -> str:
        weights = f"w={self.weights or 'none'}"
        return weights if self.activations is None else f"{weights} x={self.activations}"

    @property
    def is_float(self) -> bool:
        """True if neither side is quantized."""
        return self.weights is None

    @staticmethod
    def parse(text: str) -> LinearSpec:
        """Read 'w=... x=...', in either order, a side left out or 'none'. Raises `InvalidSpec`, `UnknownFormat`."""
        sides: dict[str, TensorSpec | None] = {}
        for word in text.split():
            side, equals, spec = word.partition("=")
            if side not in ("w", "x") or not equals or side in sides:
                raise InvalidSpec(text, "a linear spec is 'w=format/granularity x=format/granularity', each side once")
            sides[side] = None if spec == "none" else TensorSpec.parse(spec)
        if not sides:
            raise InvalidSpec(text, "a linear spec is 'w=format/granularity x=format/granularity', each side once")
        return LinearSpec(sides.get("w"), sides.get("x"))


PRESETS = {
    "int8wo": LinearSpec(TensorSpec(INT8, CHANNEL), None),
    "int8dq": LinearSpec(TensorSpec(INT8, CHANNEL), TensorSpec(INT8, TOKEN)),
    "int4wo": LinearSpec(TensorSpec(INT4, group(128), "affine"), None),
    "int4wo-g32": LinearSpec(TensorSpec(INT4, group(32), "affine"), None),
    "fp8wo": LinearSpec(TensorSpec(FLOAT8_E4M3FN, CHANNEL), None),
}


def preset(name: str) -> LinearSpec:
    """The preset of that name. Raises `UnknownPreset`, which names the nearest."""
    if not isinstance(name, str) or name not in PRESETS:
        raise UnknownPreset(name, list(PRESETS))
    return PRESETS[name]


def linear_spec(value: str | LinearSpec | None) -> LinearSpec | None:
    """A preset's name, the text of a `LinearSpec`, the spec itself, or None / 'none' for float."""
    if value is None or value == "none":
        return None
    if isinstance(value, LinearSpec):
        return None if value.is_float else value
    if not isinstance(value, str):
        raise InvalidSpec(
            value, "give a preset's name, a text such as 'w=int8/channel', a LinearSpec, or None for float"
        )
    if "=" not in value:
        return preset(value)
    spec = LinearSpec.parse(value)
    return None if spec.is_float else spec
