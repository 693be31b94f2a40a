"""Which kernel runs a quantized site: an ordered tuple of rules, best first.

A rule says why it can't (`why_not`) or builds its node. What no rule takes runs as written: dequantize, then a
float product. That costs speed, never correctness.

Rules are written against a list of traps; none of them is ever emitted, and a test keeps it so:
oneDNN's qlinear with signed activations (a scalar reference on CPUs without AMX), torch's float32
``_weight_int8pack_mm`` and ``_weight_int4pack_mm_for_cpu`` (scalar references), and qlinear with run-time scale tensors
under max-autotune (it crashes).
"""

from __future__ import annotations

from fxquant.lowering.convolutions import GroupedConvolution, Int8Convolution, WeightOnlyConvolution
from fxquant.lowering.embeddings import GatherRows
from fxquant.lowering.linears import Int8Dynamic, Int8Shared, Int8WeightOnly, IntegerDynamic, WeightOnly
from fxquant.lowering.rule import Rule
from fxquant.lowering.tiled import DecodedConvolution, TiledCodes, TiledFloat, TiledTable
from fxquant.target import Target

# For the kernels of a CPU.
RULES: tuple[Rule, ...] = (
    Int8Dynamic(),  # first: quantization inside the kernel saves a pass over x
    Int8Shared(),  # siblings that could not be joined: x is quantized once for all of them; autocast
    Int8WeightOnly(),
    IntegerDynamic(),  # before WeightOnly: integer sums are faster, and exact
    WeightOnly(),  # takes every format
    Int8Convolution(),
    WeightOnlyConvolution(),
    GroupedConvolution(),  # last of its kind: what has no kernel over patches
    GatherRows(),
)

# For Triton kernels, by what the target can do; which of them runs a problem is asked of the tables.
TRITON_RULES: tuple[Rule, ...] = (
    TiledCodes(),  # first: products of codes are the fastest, and the sums of integers exact
    TiledFloat(),  # takes every format, and codes of x that nothing multiplies as they are
    DecodedConvolution(),
    TiledTable(),
)


def rules_for(target: Target) -> tuple[Rule, ...]:
    """The rules to try on a target, best first."""
    return TRITON_RULES if target.runs_triton else RULES
