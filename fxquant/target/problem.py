"""Problem: what a kernel is asked to do, and thereby the key of every table of tuned configurations."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

Op = Literal["linear", "quantize", "embedding"]
# A configuration that is right for 1,000 rows is right for 1,024: problems are tuned at the ends of these ranges.
M_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


def bucket_of(m: int) -> int:
    """The bucket of m rows: the smallest of `M_BUCKETS` that is not below m, the largest of all beyond it."""
    return next((bucket for bucket in M_BUCKETS if m <= bucket), M_BUCKETS[-1])


@dataclass(frozen=True)
class Problem:
    """One shape of one operation on given formats.

    op           'linear': y [m, n] = x [m, k] times a weight [n, k]. 'quantize': x [m, k] to codes, n is 0.
                 'embedding': m rows of k values out of a table of n.
    weights      text of the weight's TensorSpec; of a 'quantize', ''.
    activations  text of the TensorSpec of x as the kernel reads it (of a 'quantize': makes it); '' where x is float.
    dtype        of the float operands and of the result: 'float32', 'bfloat16' or 'float16'.
    extra        what else changes the work, such as 'rmsnorm' before a 'quantize'.
    """

    op: Op
    m: int
    n: int
    k: int
    weights: str
    activations: str
    dtype: str
    extra: str = ""

    def bucketed(self) -> Problem:
        """The same with m at the end of its bucket."""
        return dataclasses.replace(self, m=bucket_of(self.m))

    def with_m(self, m: int) -> Problem:
        return dataclasses.replace(self, m=m)

    def without_steps(self) -> Problem:
        """The same with bfloat16 scales for stepped ones: to a GPU's kernels they are nothing else."""
        return dataclasses.replace(self, weights=self.weights.replace("/stepped", "/bf16"))

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(fields: dict[str, Any]) -> Problem:
        return Problem(**fields)

    def __str__(self) -> str:
        formats = " × ".join(text for text in (self.activations or self.dtype, self.weights) if text)
        extra = f" {self.extra}" if self.extra else ""
        return f"{self.op} {self.m}×{self.n}×{self.k} {formats}{extra} -> {self.dtype}"


@dataclass(frozen=True)
class Work:
    """What a problem costs at least, whatever the kernel.

    operations  multiplications and additions in matrix products, two a term.
    unit        what multiplies: 'int8', 'float8', 'float4', 'float16' or 'float32'.
    bytes       read and written once each: x, codes and scales of the weight, bias, result.
    """

    operations: int
    unit: str
    bytes: int
