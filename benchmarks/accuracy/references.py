"""What these models gave when the project's founders measured them, to be met or bettered.

Round-to-nearest, weights only, on this kind of machine (2 cores, torch 2.13, CPU), before fxquant was written; the
crops, the WordNet queries and the noise were other ones than here. 1,000 queries (differences under .01 are noise),
40 crops, 500 samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.accuracy import control
from benchmarks.accuracy.control import Quantizer
from benchmarks.accuracy.recipes import FLOAT

ORIGIN = "measured by the project's founders before fxquant was written, on the same kind of machine"

# How much a figure may fall short and still be the same figure: MRR by the noise of 1,000 queries, agreement by three
# crops of 40 (two standard errors where the two sets of crops are other ones), the rest by half a unit of the last
# digit that was written down.
SLACK: Mapping[str, float] = {"mrr": 0.01, "agreement": 0.075, "cosine": 0.0005, "psnr": 0.5, "kl": 0.0005}


@dataclass(frozen=True)
class Reference:
    """One scheme: the row of ours that follows it, how to do it plainly, and the founders' figures by model."""

    scheme: str
    recipe: str
    plain: Quantizer | None
    figures: Mapping[str, Mapping[str, float]]


REFERENCES = (
    Reference("float32", FLOAT, None, {"minilm": {"mrr": 0.337}, "efficientnet": {"agreement": 1.0}}),
    Reference(
        "int8 per channel",
        "int8wo",
        control.symmetric(8),
        {
            "minilm": {"mrr": 0.337, "cosine": 0.9996},
            "efficientnet": {"agreement": 0.90},
            "dit": {"psnr": 61},
            "smollm2": {"kl": 0.003},
        },
    ),
    Reference(
        "float8 e4m3 per channel",
        "fp8wo",
        control.float8,
        {"minilm": {"mrr": 0.337, "cosine": 0.9984}, "dit": {"psnr": 48}, "smollm2": {"kl": 0.020}},
    ),
    Reference(
        "int4 g32 affine, integer zero point",
        "int4wo-g32",
        control.affine(4, 32),
        {"minilm": {"mrr": 0.325, "cosine": 0.973}, "dit": {"psnr": 39}, "smollm2": {"kl": 0.30}},
    ),
    Reference(
        "int4 g32 symmetric",
        "int4 g32 symmetric",
        control.symmetric(4, 32),
        {"minilm": {"mrr": 0.314, "cosine": 0.955}, "dit": {"psnr": 37}, "smollm2": {"kl": 0.39}},
    ),
    Reference(
        "int4 per channel",
        "int4 per channel",
        control.symmetric(4),
        {
            "minilm": {"mrr": 0.319, "cosine": 0.909},
            "efficientnet": {"agreement": 0.275},
            "dit": {"psnr": 36},
            "smollm2": {"kl": 0.84},
        },
    ),
    Reference(
        "int2 g32",
        "int2wo",
        control.affine(2, 32),
        {"minilm": {"mrr": 0.224, "cosine": 0.544}, "dit": {"psnr": 24}, "smollm2": {"kl": 6.7}},
    ),
)
