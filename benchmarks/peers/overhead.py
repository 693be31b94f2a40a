"""What a call costs beside its kernels: a decode step whose kernels take next to nothing, beside float Inductor's.

24 layers as in the real model but of width 16: what is left is Python, guards, argument checks, dispatch and
allocation, and its wall time is the overhead. Timed in turns, without a profiler. Beside it the real width of 256,
kernels included.
"""

from __future__ import annotations

import argparse
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import Error, Outcome, WrongAnswer, arguments, finish, judged_by, kernels_run, progress
from benchmarks.peers.ours import INT8, quantized
from benchmarks.peers.ours import plain as float_inductor
from benchmarks.peers.subjects import Logits, Subject
from benchmarks.timing import paired, ratio

LAYERS, EMPTY, REAL = 24, 16, 256
VOCABULARY = {EMPTY: 64, REAL: 8192}
ALLOWED = 1.1
OURS = "fxquant::int8_linear_dynamic"


def decoder(layers: int, width: int) -> Subject:
    """One token, without a cache, through a Llama of that many layers; MLP 2.75 widths, 4 heads on 1."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY[width],
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    model = Logits(LlamaForCausalLM(config)).eval().requires_grad_(False)
    return Subject("", model, (torch.randint(0, VOCABULARY[width], (1, 1)),), ())


@torch.no_grad()
def measure(outcome: Outcome, layers: int, width: int, threads: int, seconds: float) -> None:
    """Raises WrongAnswer if an answer is off, or if the quantized step runs without our kernels."""
    torch._dynamo.reset()
    subject = decoder(layers, width)
    want = subject.model(*subject.inputs)
    fns = {"float": float_inductor(subject, threads), "int8dq": quantized(INT8, subject, threads)}
    errors = {name: Error.of(fn(), want).relative for name, fn in fns.items()}
    if errors["float"] > 1e-3 or errors["int8dq"] > 0.2:
        raise WrongAnswer("overhead", str(errors), "float 1e-3 at most, int8dq 0.2 at most")
    kernels = kernels_run(fns["int8dq"])
    if OURS not in kernels:
        raise WrongAnswer("overhead", f"the step runs {sorted(kernels)}", OURS)
    stats = paired(fns, seconds=seconds, min_rounds=20)
    figure = judged_by(threads)
    cost = ratio(stats, "int8dq", "float", figure)
    what = f"{layers} layers of width {width}, 1 token, {threads} thread(s)"
    row = {"step": what, **{f"{name}, us": f"{1e6 * one.median:.0f}" for name, one in stats.items()}}
    row |= {f"{name}, best us": f"{1e6 * one.best:.0f}" for name, one in stats.items()}
    row |= {"of float's time": f"{cost:.2f}x", "rel. error": f"{errors['int8dq']:.4f}"}
    figures = {name: one.as_json() for name, one in stats.items()}
    outcome.add(row, width=width, layers=layers, threads=threads, stats=figures, errors=errors)
    if width == EMPTY:
        outcome.at_most(f"overhead of a step, in that of float Inductor: {what}", cost, ALLOWED)


def main(chosen: argparse.Namespace) -> int:
    layers = 4 if chosen.quick else LAYERS
    outcome = Outcome("peers.overhead", f"One decode step of {layers} layers: what is not kernels")
    for threads in chosen.threads:
        torch.set_num_threads(threads)
        for width in (EMPTY, REAL):
            progress(f"overhead, width {width}, {threads} thread(s)")
            measure(outcome, layers, width, threads, 1 if chosen.quick else 6)
    return finish(outcome, chosen)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    sys.exit(main(parser.parse_args()))
