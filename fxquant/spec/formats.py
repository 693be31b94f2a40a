"""Number formats, and how many values share one scale."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch

from fxquant.errors import InvalidSpec, UnknownFormat, nearest

FormatKind = Literal["int", "float"]
GranularityKind = Literal["tensor", "channel", "token", "group"]
GRANULARITIES = ("tensor", "channel", "token", "group")


@dataclass(frozen=True)
class NumberFormat:
    """A format of codes: its symmetric range qmin..qmax, and the dtype in which one code is stored.

    An integer format leaves out its most negative code, so that the range is symmetric.
    """

    name: str
    bits: int
    kind: FormatKind
    qmin: float
    qmax: float
    storage: torch.dtype

    def __str__(self) -> str:
        return self.name


INT8 = NumberFormat("int8", 8, "int", -127, 127, torch.int8)
INT4 = NumberFormat("int4", 4, "int", -7, 7, torch.int8)
FLOAT8_E4M3FN = NumberFormat("float8_e4m3fn", 8, "float", -448.0, 448.0, torch.float8_e4m3fn)
FLOAT8_E5M2 = NumberFormat("float8_e5m2", 8, "float", -57344.0, 57344.0, torch.float8_e5m2)

FORMATS = {f.name: f for f in (INT8, INT4, FLOAT8_E4M3FN, FLOAT8_E5M2)}
ALIASES = {
    "i8": "int8",
    "qint8": "int8",
    "i4": "int4",
    "qint4": "int4",
    "fp8": "float8_e4m3fn",
    "float8": "float8_e4m3fn",
    "e4m3": "float8_e4m3fn",
    "e4m3fn": "float8_e4m3fn",
    "fp8_e4m3": "float8_e4m3fn",
    "float8_e4m3": "float8_e4m3fn",
    "qfloat8": "float8_e4m3fn",
    "qfloat8_e4m3fn": "float8_e4m3fn",
    "e5m2": "float8_e5m2",
    "fp8_e5m2": "float8_e5m2",
    "qfloat8_e5m2": "float8_e5m2",
}


def number_format(name: str | NumberFormat) -> NumberFormat:
    """The format of that name or alias. Raises `UnknownFormat`, which names the nearest."""
    if isinstance(name, NumberFormat):
        return name
    found = FORMATS.get(ALIASES.get(name, name)) if isinstance(name, str) else None
    if found is None:
        raise UnknownFormat(name, [*FORMATS, *ALIASES])
    return found


@dataclass(frozen=True)
class Granularity:
    """Which values share one scale.

    tensor    one scale; a tensor of n dimensions has scale [1] * n
    channel   one per row of axis 0: weight [N, K] -> scale [N, 1]
    token     one per row of the last axis: activation [..., K] -> scale [..., 1]
    group     one per `size` neighbours along K: weight [N, K] -> scale [N, ceil(K / size)], the last may be shorter
    """

    kind: GranularityKind
    size: int = 0

    def __post_init__(self) -> None:
        if self.kind not in GRANULARITIES:
            raise InvalidSpec(self.kind, "a granularity is tensor, channel, token or group<n>")
        if (self.kind == "group") != (self.size > 0):
            raise InvalidSpec(f"{self.kind}{self.size}", "a group, and only a group, has a size, of at least 1")

    def __str__(self) -> str:
        return f"group{self.size}" if self.kind == "group" else self.kind

    @staticmethod
    def parse(text: str) -> Granularity:
        """Read 'tensor', 'channel', 'token' or 'group128'. Raises `InvalidSpec`."""
        match text:
            case "tensor" | "channel" | "token":
                return Granularity(text)
            case _ if found := re.fullmatch(r"group([1-9][0-9]*)", text):
                return Granularity("group", int(found[1]))
            case _:
                near = nearest(text, ("tensor", "channel", "token", "group128"))
                hint = f"; did you mean {near!r}?" if near else ""
                raise InvalidSpec(text, f"a granularity is tensor, channel, token or group<n>, such as group128{hint}")


TENSOR = Granularity("tensor")
CHANNEL = Granularity("channel")
TOKEN = Granularity("token")


def group(size: int) -> Granularity:
    """One scale per `size` neighbours along K."""
    return Granularity("group", size)
