"""Command line of the demo; everything that prints is here."""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument("--pairs", type=int, default=1000, help="sentence pairs of the retrieval task")
    parser.add_argument("--seconds", type=float, nargs=2, default=(2, 10), help="to time batch 1, and batch 32")
    parser.add_argument("--preset", default="int8dq", help="what to quantize to")
    parser.add_argument("--backend", default="fxquant", help="another Dynamo backend, to see the demo's own noise")
    parser.add_argument("--dump", type=Path, default=Path("fxquant-dump"), help="folder for the graphs of every stage")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    parser.add_argument("--readme", type=Path, help="a document whose table of results to replace")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = parse(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: the model is on disk
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    run(chosen, Console())


def run(chosen: argparse.Namespace, console: Console) -> None:
    """Measure under a progress display, then print the table."""
    start = time.perf_counter()
    columns = (TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:

        def step(description: str, total: int) -> Callable[[int], None]:
            task = progress.add_task(description, total=total)
            return lambda done: progress.advance(task, done)

        done = step("torch and the model", 1)
        # Imported here, under the progress display: these take seconds.
        from transformers.utils import logging as transformers_logging

        from demo import compare, minilm, sentences, view

        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()  # its load report: the checkpoint's pooler is not used
        settings = compare.Settings(
            preset=chosen.preset,
            backend=chosen.backend,
            pairs=chosen.pairs,
            batch_seconds=dict(zip((1, 32), chosen.seconds, strict=True)),
            dump=compare.fresh_folder(chosen.dump) if chosen.backend == "fxquant" else chosen.dump,
        )
        model = minilm.load_encoder()
        tokenizer = minilm.load_tokenizer(settings.tokens)
        done(1)

        done = step("sentence pairs", 1)
        pairs = sentences.load_pairs(settings.pairs)
        done(1)

        encoders = compare.compile_both(model, settings)
        inputs = {batch: compare.example(tokenizer, pairs, batch) for batch in settings.batch_seconds}
        done = step("compile", 2 * len(inputs))
        for tensors in inputs.values():
            compare.warm_up(encoders, tensors, done)

        speeds = []
        for batch, seconds in settings.batch_seconds.items():
            done = step(f"latency, batch {batch}", 1)
            speeds.append(compare.speed(encoders, inputs[batch], seconds))
            done(1)

        done = step("retrieval task", 4 * len(pairs.pairs))
        scores = compare.quality(encoders, tokenizer, pairs, max(inputs), done)
        sizes = compare.sizes(model, settings)

    rows = list(view.result_rows(speeds, sizes, scores))
    console.print(view.result_table(settings, rows))
    if chosen.json is not None:
        chosen.json.write_text(view.as_json(settings, speeds, sizes, scores), encoding="utf-8")
    if chosen.readme is not None:
        document = chosen.readme.read_text(encoding="utf-8")
        table = view.as_markdown(settings, rows)
        chosen.readme.write_text(view.put_between(document, "results", table), encoding="utf-8")
    console.print(
        view.notes(settings, pairs, sizes, scores, time.perf_counter() - start), highlight=False, soft_wrap=True
    )


if __name__ == "__main__":
    main()
