"""What a call costs beside its kernels: one decode step through 24 layers of width 256, beside float32 Inductor's.

The profiler times every compiled loop and every library call of a step. Overhead is the rest of the same step: Python,
guards, argument checks, dispatch, allocation, and what the profiler itself takes for each of them, for both alike.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch._inductor import config as inductor
from torch.autograd import profiler_legacy
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import Error, Outcome, WrongAnswer, arguments, finish, progress
from benchmarks.peers.ours import INT8, quantized
from benchmarks.peers.ours import plain as float_inductor
from benchmarks.peers.subjects import Logits, Subject
from benchmarks.timing import paired

LAYERS, WIDTH = 24, 256
ALLOWED = 1.1


def decoder(layers: int) -> Subject:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=WIDTH,
        intermediate_size=WIDTH * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    model = Logits(LlamaForCausalLM(config)).eval().requires_grad_(False)
    return Subject("", model, (torch.randint(0, 8192, (1, 1)),), ())


# A step's kernels by name: compiled loops, library calls, ours. What calls them is overhead.
KERNELS = ("cpp_fused", "aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_dot_product", "mkl", "fxquant::")
STEP = "one step"


def parts(fn: Callable[[], Tensor], calls: int = 5) -> tuple[float, float]:
    """Seconds of a call, and of these the kernels' own; of the same calls, so that noise in a kernel is in both."""
    profile = profiler_legacy.profile()  # torch.profiler's Kineto writes lines of its own between ours
    with profile:
        fn()
        started = time.perf_counter()
        for _ in range(calls):
            with torch.autograd.profiler.record_function(STEP):
                fn()
        whole = time.perf_counter() - started
    events = sorted(profile.function_events or (), key=lambda event: event.time_range.start)
    if not any("cpp_fused" in event.name for event in events):
        raise WrongAnswer("overhead", "no compiled loop in the profile", "each of them by name")
    first = next(event.time_range.start for event in events if event.name == STEP)
    kernels = [e for e in events if e.time_range.start >= first and any(mark in e.name for mark in KERNELS)]
    return whole / calls, 1e-6 * sum(event.self_cpu_time_total for event in kernels) / calls


@torch.no_grad()
def measure(outcome: Outcome, subject: Subject, threads: int, rounds: int) -> None:
    want = subject.model(*subject.inputs)
    with inductor.patch({"cpp.enable_kernel_profile": True}):
        fns = {"float": float_inductor(subject, threads), "int8dq": quantized(INT8, subject, threads)}
        errors = {name: Error.of(fn(), want).relative for name, fn in fns.items()}
    if errors["float"] > 1e-3 or errors["int8dq"] > 0.2:
        raise WrongAnswer("overhead", str(errors), "float 1e-3 at most, int8dq 0.2 at most")
    steps = paired(fns, seconds=2, min_rounds=rounds)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in fns}
    for _ in range(rounds):
        for name, fn in fns.items():
            taken[name].append(parts(fn))
    beyond = {name: statistics.median(a - b for a, b in rows) for name, rows in taken.items()}
    for name, rows in taken.items():
        profiled, kernels = (statistics.median(column) for column in zip(*rows, strict=True))
        words = {"step": steps[name].median, "profiled": profiled, "kernels of it": kernels, "the rest": beyond[name]}
        row = {"candidate": name, "threads": str(threads), **{f"{k}, us": f"{1e6 * v:.0f}" for k, v in words.items()}}
        outcome.add(row | {"rel. error": f"{errors[name]:.4f}"}, candidate=name, threads=threads, rounds=rows)
    what = f"overhead of a step, in that of float Inductor, {threads} thread(s)"
    outcome.at_most(what, beyond["int8dq"] / beyond["float"], ALLOWED)


def main(chosen: argparse.Namespace) -> int:
    layers = 4 if chosen.quick else LAYERS
    outcome = Outcome("peers.overhead", f"One decode step of {layers} layers of width {WIDTH}: kernels and the rest")
    subject = decoder(layers)
    for threads in chosen.threads:
        progress(f"overhead, {threads} thread(s)")
        torch.set_num_threads(threads)
        torch._dynamo.reset()
        measure(outcome, subject, threads, 5 if chosen.quick else 25)
    return finish(outcome, chosen)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    sys.exit(main(parser.parse_args()))
