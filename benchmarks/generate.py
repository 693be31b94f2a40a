"""SmolLM2-135M generates: `generate` with a static cache, quantized beside float compiled by Inductor, in turns.

Every model decodes by one compiled graph and passes the prompt in eager, as `compile_config` has it. Greedy, as many
tokens for all. A recipe's error is that of the logits of every position of the prompt.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

import fxquant
from benchmarks.accuracy.recipes import INT4_GENERATE
from benchmarks.harness import Error, Outcome, WrongAnswer, arguments, finish, kernels_run, progress
from benchmarks.peers import smollm2
from benchmarks.peers.absent import Absent
from benchmarks.peers.ours import INT8, INT8_FINE, with_kernels
from fxquant import QuantConfig

PROMPT, NEW, CACHE = 64, 128, 256
FLOAT = "float32 Inductor"
INT4 = QuantConfig(**INT4_GENERATE)
CONFIGS: dict[str, QuantConfig] = {
    "fxquant int8dq": INT8,
    "fxquant int8wo, groups": INT8_FINE,
    "fxquant int4dq": INT4,
}
RECIPES = {
    "fxquant int8dq": "int8 weights, int8 activations per token, the output layer too",
    "fxquant int8wo, groups": "int8 weights, in groups of 32 in three layers and the head; float activations",
    "fxquant int4dq": "int4 weights in groups of 32 by mse, int8 in attention and output layer; "
    "int8 activations in groups of 16",
}
# Tokens a second, in those of float.
FLOORS = {"fxquant int8dq": 2.2, "fxquant int8wo, groups": 2.2, "fxquant int4dq": 2.7}
# The largest relative error of logits: 4 bits in groups of 32 leave about 0.3.
ERRORS = {"fxquant int8dq": 0.2, "fxquant int8wo, groups": 0.1, "fxquant int4dq": 0.5}
Generate = Callable[[int], Tensor]


def generator(model: Any, ids: Tensor, config: Any) -> Generate:
    """Of a number of new tokens: all tokens, int64 [1, prompt + new]. No token ends the text."""
    model.generation_config.eos_token_id = None

    def generate(new: int) -> Tensor:
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            cache_implementation="static",
            max_cache_len=CACHE,
            compile_config=config,
        )

    return generate


def compiled_by(name: str) -> Any:
    """The config by which `generate` compiles decoding, on a CPU too: Inductor for float, or fxquant."""
    if name != FLOAT:
        from fxquant.integrations.transformers import compile_config

        return compile_config()
    from transformers import CompileConfig

    made: Any = CompileConfig(backend="inductor", fullgraph=True, mode=None)  # pyright: ignore[reportArgumentType]
    made._compile_all_devices = True
    return made


@torch.no_grad()
def quantized(config: QuantConfig) -> Any:
    model = smollm2.load()
    fxquant.quantize(model, config)
    fxquant.freeze(model)
    return model


@torch.no_grad()
def build(ids: Tensor) -> tuple[dict[str, Generate], dict[str, Error]]:
    """The generators, compiled and checked, and the errors of ours. Raises WrongAnswer."""
    float_model = smollm2.load()
    want = float_model(ids, use_cache=False).logits
    found, errors = {FLOAT: generator(float_model, ids, compiled_by(FLOAT))}, {}
    for name, config in CONFIGS.items():
        model = quantized(config)
        errors[name] = Error.of(model(ids, use_cache=False).logits, want)
        if not errors[name].relative <= ERRORS[name]:
            raise WrongAnswer(name, f"relative error {errors[name].relative:.3f}", f"{ERRORS[name]} at most")
        found[name] = generator(model, ids, compiled_by(name))
        eager, compiled = (make(8)[0] for make in (generator(model, ids, None), found[name]))
        if not agree(model, eager, compiled, errors[name]):
            raise WrongAnswer(name, "compiled decoding gives other tokens", "those of eager, or near ties")
        kernels = kernels_run(lambda generate=found[name]: generate(2))
        if not any("fxquant::" in kernel for kernel in kernels):
            raise WrongAnswer(name, f"it runs {sorted(kernels)}", "our kernels")
    return found, errors


def agree(model: Any, eager: Tensor, compiled: Tensor, error: Error) -> bool:
    """Whether tokens are the same up to one between which and eager's the recipe's own error can't tell.

    Compiled, attention adds in another order. A last bit may move an int8 code of an activation, which moves others in
    the layers behind it, so that two runs of one recipe may differ by about what its activations lose.
    """
    differing = (eager != compiled).nonzero().flatten().tolist()
    if not differing:
        return True
    at = differing[0]
    logits = model(eager[None, :at], use_cache=False).logits[0, -1]
    gap = logits.max() - logits[compiled[at]]
    return bool(gap <= error.relative * logits.square().mean().sqrt())


def turns(fns: dict[str, Generate], new: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round, A B C A B C; the first is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in fns}
    gc.collect()
    for counted in range(rounds + 1):
        for name, fn in fns.items():
            start = time.perf_counter()
            fn(new)
            if counted:
                taken[name].append(time.perf_counter() - start)
    return taken


def main(chosen: argparse.Namespace) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    outcome = Outcome("generate", f"SmolLM2-135M: {NEW} tokens behind {PROMPT}, static cache of {CACHE}, 1 thread")
    torch.set_num_threads(1)
    try:
        ids = torch.tensor([smollm2.text_ids(PROMPT)])
        with_kernels()
        progress("generate: compiling")
        fns, errors = build(ids)
    except Absent as absent:
        outcome.notes.append(f"skipped: {absent}")
        return finish(outcome, chosen)
    progress("generate: timing")
    new = NEW // 8 if chosen.quick else NEW
    rounds = 3 if chosen.quick else chosen.rounds
    whole, prompt = turns(fns, new, rounds), turns(fns, 1, rounds)
    for name, times in whole.items():
        rate, speed = new / median(times), median(whole[FLOAT]) / median(times)
        step = (median(times) - median(prompt[name])) / (new - 1)
        row = {"model": name, "tokens/s": f"{rate:.1f}", "of float": f"{speed:.2f}x"}
        row |= {
            "spread": f"{new / max(times):.1f} to {new / min(times):.1f}",
            "prompt ms": f"{1e3 * median(prompt[name]):.0f}",
        }
        row |= {"token ms": f"{1e3 * step:.2f}"}
        row |= errors[name].as_row() if name in errors else dict.fromkeys(("rel. error", "SQNR dB", "cosine"), "")
        outcome.add(row, model=name, seconds=times, prompt_seconds=prompt[name], new=new)
        if name in FLOORS:
            outcome.at_least(f"generate, {name}, tokens/s of float", speed, FLOORS[name])
    outcome.notes.extend(f"{name}: {RECIPES[name]}" for name in CONFIGS)
    return finish(outcome, chosen)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    sys.exit(main(parser.parse_args()))
