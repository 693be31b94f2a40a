"""Whole models: float32 by Inductor beside backend="fxquant", in turns in one process, the error beside each ratio.

MiniLM (trained weights, real text, every row full), a Llama-like decoder and a ViT-like encoder (random weights).
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import (
    Error,
    Outcome,
    WrongAnswer,
    arguments,
    finish,
    judged_by,
    kernels_run,
    milliseconds,
    progress,
)
from benchmarks.timing import paired, ratio
from demo import compare, minilm, sentences
from fxquant import QuantConfig, QuantizingBackend
from tests.models import Decoder, VisionEncoder

MINILM_FLOOR = 1.5
# Float32 sums in another order differ by far less than this, quantized ones by far more.
FLOAT_AGREES = 1e-3
# Below this a model computes something else. Quantization noise adds up over layers, so it is less than one linear's.
LEAST_SQNR = 20.0


@dataclass(frozen=True)
class Case:
    """A model with inputs; ``floor`` is the least ratio to float32 Inductor, if one is demanded."""

    name: str
    make: Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]
    floor: float | None = None


def encoder(batch: int, tokens: int = 64) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """MiniLM and real text."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # its load report: the checkpoint's pooler is not used
    pairs = sentences.load_pairs()
    return minilm.load_encoder(), compare.example(minilm.load_tokenizer(tokens), pairs, batch)


def decoder(tokens: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The Llama-like decoder: width 1024, 4 layers, 16 heads on 4, MLP 2816, vocabulary 8192."""
    torch.manual_seed(0)
    model = Decoder(width=1024, layers=4, heads=16, kv_heads=4, hidden=2816, vocabulary=8192)
    return model.eval().requires_grad_(False), (torch.randint(0, 8192, (1, tokens)),)


def vision(batch: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The ViT-like encoder, of ViT-S's width, at 17 tokens an image."""
    torch.manual_seed(0)
    model = VisionEncoder(width=384, layers=6, heads=6, classes=1000).eval().requires_grad_(False)
    return model, (torch.randn(batch, 3, 32, 32),)


CASES = (
    Case("MiniLM, 32 x 64 tokens", lambda: encoder(32), MINILM_FLOOR),
    Case("decoder 1024 x 4, 1 token", lambda: decoder(1)),
    Case("decoder 1024 x 4, 128 tokens", lambda: decoder(128)),
    Case("decoder 1024 x 4, 1024 tokens", lambda: decoder(1024)),
    Case("ViT 384 x 6, 32 images", lambda: vision(32)),
)
QUICK = (CASES[0], CASES[2])


def kernels_of(backend: QuantizingBackend) -> dict[str, int]:
    """How many linears of the model each kernel runs, whatever it does beside the product, by the report; what runs
    otherwise under its status."""
    found: Counter[str] = Counter()
    for site in (site for report in backend.reports for site in report.sites if site.op == "linear"):
        found[site.kernel.partition(" ")[0] if site.status == "lowered" else site.status] += site.members
    return dict(found)


def check_kernels(case: Case, kernels: dict[str, int], ran: set[str]) -> None:
    """Raises WrongAnswer unless each linear was lowered or kept float, and the kernels reported are those that ran."""
    reported = {f"fxquant::{name}" for name in kernels if name != "float"}
    int8 = {name for name in ran if name.startswith("fxquant::int8_linear")}
    if not reported or reported != int8:
        raise WrongAnswer(case.name, f"the report says {kernels}, {sorted(ran)} ran", "the same kernels in both")


@torch.no_grad()
def measure(case: Case, threads: int, seconds: float, outcome: Outcome) -> None:
    """Compile, check and time one model."""
    progress(f"{case.name}, {threads} thread(s)")
    torch._dynamo.reset()
    model, inputs = case.make()
    want = model(*inputs)
    plain = torch.compile(model, dynamic=False, fullgraph=True)
    backend = QuantizingBackend(QuantConfig(preset="int8dq"))
    fast = torch.compile(model, backend=backend, dynamic=False, fullgraph=True)
    plain_error, error = Error.of(plain(*inputs), want), Error.of(fast(*inputs), want)
    kernels, ran = kernels_of(backend), kernels_run(lambda: fast(*inputs))
    if not plain_error.relative <= FLOAT_AGREES:
        raise WrongAnswer(f"{case.name}, float", f"relative error {plain_error.relative:.2g}", f"<= {FLOAT_AGREES}")
    if not error.sqnr >= LEAST_SQNR:
        raise WrongAnswer(case.name, f"an SQNR of {error.sqnr:.1f} dB", f"at least {LEAST_SQNR} dB")
    check_kernels(case, kernels, ran)
    stats = paired({"float": lambda: plain(*inputs), "int8dq": lambda: fast(*inputs)}, seconds=seconds, min_rounds=5)
    times = ratio(stats, "float", "int8dq")
    row = {"model": case.name, "threads": str(threads)}
    row |= {f"{name} ms": milliseconds(s.median) for name, s in stats.items()}
    row |= {"ratio": f"{times:.2f}", **error.as_row(), "linears by kernel": _words(kernels)}
    figures: dict[str, Any] = {"model": case.name, "threads": threads, "error": asdict(error), "kernels": kernels}
    outcome.add(row, **figures, ratio=times, stats={name: s.as_json() for name, s in stats.items()})
    if case.floor is not None:
        judged = ratio(stats, "float", "int8dq", judged_by(threads))
        outcome.at_least(f"{case.name}, {threads} thread(s)", judged, case.floor)


def _words(kernels: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in kernels.items())


def main(chosen: argparse.Namespace) -> int:
    outcome = Outcome("models", 'Models: float32 Inductor beside backend="fxquant" (int8dq), medians in turns')
    for threads in chosen.threads:
        torch.set_num_threads(threads)
        for case in QUICK if chosen.quick else CASES:
            measure(case, threads, 3.0 if chosen.quick else 8.0, outcome)
    return finish(outcome, chosen)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    sys.exit(main(parser.parse_args()))
