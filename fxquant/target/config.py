"""KernelConfig: which kernel, and its parameters. Plan: which configuration for how many rows."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_TILE = ("BLOCK_M", "BLOCK_N", "BLOCK_K")
_SHORT = {"num_warps": "w", "num_stages": "s", "SPLIT_K": "k", "GROUP_M": "g"}


@dataclass(frozen=True)
class KernelConfig:
    """A kernel by name, and the whole numbers that it is compiled or called with, by field name, in a fixed order."""

    kernel: str
    values: tuple[tuple[str, int], ...] = ()

    @staticmethod
    def of(kernel: str, **values: int) -> KernelConfig:
        return KernelConfig(kernel, tuple(values.items()))

    def __getitem__(self, field: str) -> int:
        return self.meta[field]

    @property
    def meta(self) -> dict[str, int]:
        """The values by name, as a launcher hands them on."""
        return dict(self.values)

    def to_json(self) -> dict[str, Any]:
        return {"kernel": self.kernel, **self.meta}

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> KernelConfig:
        values = tuple((name, int(value)) for name, value in fields.items() if name != "kernel")
        return KernelConfig(str(fields["kernel"]), values)

    def __str__(self) -> str:
        """Such as 'scaled_mm 64x128x64 w4 s3'."""
        meta = self.meta
        tile = "x".join(str(meta.pop(name)) for name in _TILE if name in meta)
        rest = (f"{_SHORT.get(name, name + '=')}{value}" for name, value in meta.items())
        return " ".join(word for word in (self.kernel, tile, *rest) if word)


def kernel_id(kernel: str) -> int:
    """A number for a kernel's name that is the same in every version: a compiled graph may keep it."""
    return zlib.crc32(kernel.encode())


@dataclass(frozen=True)
class PlanRow:
    """The configuration for up to `limit` rows of x, and where it comes from: 'tuned', 'modelled' or 'heuristic'."""

    limit: int
    config: KernelConfig
    source: str = "heuristic"


@dataclass(frozen=True)
class Plan:
    """Configurations by number of rows, smallest limit first; the last one also serves whatever is above."""

    rows: tuple[PlanRow, ...]

    def row(self, m: int) -> PlanRow:
        return next((row for row in self.rows if m <= row.limit), self.rows[-1])

    def merged(self) -> Plan:
        """Neighbours with one configuration made one row."""
        kept: list[PlanRow] = []
        for row in self.rows:
            if kept and kept[-1].config == row.config and kept[-1].source == row.source:
                kept.pop()
            kept.append(row)
        return Plan(tuple(kept))

    def to_ints(self) -> list[int]:
        """As an operation takes it: for each row the limit, the kernel's number, how many values, the values."""
        flat: list[int] = []
        for row in self.rows:
            values = [value for _, value in row.config.values]
            flat += [row.limit, kernel_id(row.config.kernel), len(values), *values]
        return flat

    @staticmethod
    def from_ints(flat: Sequence[int], fields: Mapping[int, tuple[str, tuple[str, ...]]]) -> Plan:
        """The inverse of `to_ints`; `fields` gives name and field names of a kernel by its number. Sources are lost."""
        rows, at = [], 0
        while at < len(flat):
            limit, number, count = flat[at : at + 3]
            name, names = fields[number]
            values = flat[at + 3 : at + 3 + count]
            rows.append(PlanRow(limit, KernelConfig(name, tuple(zip(names, values, strict=True)))))
            at += 3 + count
        return Plan(tuple(rows))
