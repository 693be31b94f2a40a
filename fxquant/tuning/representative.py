"""Problems that stand for all of their kind: what kernels are compiled for where no shapes are given."""

from __future__ import annotations

from fxquant.spec import PRESETS, LinearSpec
from fxquant.target import Arch, Problem

WIDTH = 4096  # of the linears of Llama-3-8B
FEW, SOME, MANY = 1, 16, 1024  # rows: one token of one user, of several; a prompt, or an image's patches
NORMS = ("", "rmsnorm", "layernorm")
TOKENS = 32768
INDICES = 256


def representative() -> tuple[Problem, ...]:
    """A linear of each preset with many, some and few rows, a quantization of each format of activations, alone and
    behind each norm, and an embedding of each format of weights. bfloat16; many rows first."""
    specs = [LinearSpec.parse(str(spec)) for spec in PRESETS.values()]
    pairs = [(str(spec.weights or ""), str(spec.activations or "")) for spec in specs if spec.weights is not None]
    activations = dict.fromkeys(x for _, x in pairs if x)
    weights = dict.fromkeys(w for w, _ in pairs)
    linears = [_linear(m, w, x) for m in (MANY, SOME, FEW) for w, x in dict.fromkeys(pairs)]
    quantized = [Problem("quantize", MANY, 0, WIDTH, "", x, "bfloat16", norm) for norm in NORMS for x in activations]
    embeddings = [Problem("embedding", INDICES, TOKENS, WIDTH, w, "", "bfloat16") for w in weights]
    return tuple(problem.without_steps() for problem in (*linears, *quantized, *embeddings))


def _linear(m: int, weights: str, activations: str) -> Problem:
    return Problem("linear", m, WIDTH, WIDTH, weights, activations, "bfloat16")


def representative_of(kernel: str, arch: Arch) -> list[Problem]:
    """Those that a kernel takes on an architecture, the most telling first."""
    from fxquant.triton_kernels import KERNELS

    found = KERNELS[kernel]
    return [p for p in representative() if p.op == found.op and not found.why_not(p, arch)]
