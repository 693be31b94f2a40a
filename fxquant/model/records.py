"""What `quantize` did, row by row."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class QuantizeRow:
    """One module that holds weights, and what became of it.

    ``paths`` are all its names (a shared module has several), ``spec`` is the text of its `LinearSpec`, empty if it
    stays float; ``reason`` says why it does, or which rule decided. ``parameters`` counts the numbers in its weight
    matrices, ``bytes_before`` and ``bytes_after`` are those of the weights, now and frozen. ``tied_to`` is the path of
    the module whose weight it shares.
    """

    paths: tuple[str, ...]
    kind: str
    spec: str
    reason: str
    parameters: int
    bytes_before: int
    bytes_after: int
    tied_to: str = ""

    @property
    def path(self) -> str:
        return " = ".join(path or "(root)" for path in self.paths)

    @property
    def is_quantized(self) -> bool:
        return bool(self.spec)


@dataclass(frozen=True)
class QuantizeReport:
    """What `quantize` made of a model; ``str()`` is its summary.

    ``rows`` are the modules with weight matrices, in the model's order. ``linear_share`` is the share of the numbers
    in such matrices (of two or more dimensions, tied ones once) that is quantized.
    """

    rows: tuple[QuantizeRow, ...]

    @property
    def quantized(self) -> tuple[QuantizeRow, ...]:
        return tuple(row for row in self.rows if row.is_quantized)

    @property
    def skipped(self) -> tuple[QuantizeRow, ...]:
        return tuple(row for row in self.rows if not row.is_quantized)

    @property
    def share(self) -> float:
        """Share of the numbers in weight matrices that is quantized, 0 to 1; 1 for a model without any."""
        return self._share(self.rows)

    @property
    def linear_share(self) -> float:
        """The same without embedding tables."""
        return self._share([row for row in self.rows if row.kind != "embedding"])

    @property
    def bytes_before(self) -> int:
        return sum(row.bytes_before for row in self.rows if not row.tied_to)

    @property
    def bytes_after(self) -> int:
        """Bytes of all weight matrices once the model is frozen."""
        return sum(row.bytes_after for row in self.rows if not row.tied_to)

    @staticmethod
    def _share(rows: tuple[QuantizeRow, ...] | list[QuantizeRow]) -> float:
        own = [row for row in rows if not row.tied_to]
        total = sum(row.parameters for row in own)
        return sum(row.parameters for row in own if row.is_quantized) / total if total else 1.0

    def __str__(self) -> str:
        size = f"{self.bytes_before / 1e6:.2f} MB -> {self.bytes_after / 1e6:.2f} MB once frozen"
        lines = [
            f"{len(self.quantized)} of {len(self.rows)} modules quantized, {self.share:.1%} of their weights; {size}"
        ]
        specs = Counter((row.kind, row.spec) for row in self.quantized)
        lines += [f"  {count:4} {kind:<10} {spec}" for (kind, spec), count in specs.most_common()]
        lines += [f"  float: {row.path} ({row.kind}, {row.parameters} weights): {row.reason}" for row in self.skipped]
        lines += [f"  tied: {row.path} = {row.tied_to}" for row in self.rows if row.tied_to]
        return "\n".join(lines)
