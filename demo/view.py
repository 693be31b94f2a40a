"""The demo's table."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from pathlib import Path

import torch
from rich.table import Table

from demo.compare import Quality, Settings, Sizes, Speed
from demo.sentences import PairSet


def machine() -> str:
    """What the numbers were taken on, in one line: processor, threads, versions."""
    return f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def processor(info: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name as the system gives it."""
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def result_table(settings: Settings, speeds: list[Speed], sizes: Sizes | None, scores: Quality) -> Table:
    """Float beside quantized, one row a figure."""
    name = settings.preset if settings.backend == "fxquant" else settings.backend
    table = Table(title=f"all-MiniLM-L6-v2, {settings.tokens} tokens, float32 beside {name}", title_justify="left")
    table.add_column("")
    for heading in ("float (Inductor)", name, "change"):
        table.add_column(heading, justify="right")
    for row in speeds:
        table.add_row(
            f"latency, batch {row.batch}",
            milliseconds(row.stats["float"].median),
            milliseconds(row.stats["quantized"].median),
            f"{row.ratio:.2f}x as fast",
        )
    if sizes is not None:
        for label, before, after in sizes.rows:
            table.add_row(label, megabytes(before), megabytes(after), f"{before / after:.2f}x smaller")
    table.add_row(
        "retrieval, MRR",
        f"{scores.float_mrr:.4f}",
        f"{scores.quantized_mrr:.4f}",
        f"{scores.quantized_mrr - scores.float_mrr:+.4f} ± {scores.mrr_error:.4f}",
    )
    table.add_row(
        "retrieval, recall at 10",
        f"{scores.float_recall:.1%}",
        f"{scores.quantized_recall:.1%}",
        f"{100 * (scores.quantized_recall - scores.float_recall):+.1f} points",
    )
    table.add_row("cosine to float", "1", f"{scores.cosine:.5f}", "")
    return table


def notes(settings: Settings, pairs: PairSet, sizes: Sizes | None, scores: Quality, seconds: float) -> str:
    """What the table's figures mean and where to look further."""
    lines = [
        f"machine    {machine()}",
        "latency    medians; the two models took turns in one process, shapes static, rows without padding",
        f"task       {pairs.source}; {scores.queries} queries, {scores.queries} documents",
    ]
    if sizes is not None:
        kernels = ", ".join(f"{count} on {kernel}" for kernel, count in sizes.kernels.items())
        lines.append(f"layers     {sizes.linears} linear layers: {kernels}")
        lines.append(f"dumps      {settings.dump.resolve()} (start with graph_000/00-summary.txt)")
    lines.append(f"took       {seconds:.0f} s")
    return "\n".join(lines)


def as_json(settings: Settings, speeds: list[Speed], sizes: Sizes | None, scores: Quality) -> str:
    """The figures for other programs: seconds and bytes."""
    figures = {
        "machine": machine(),
        "preset": settings.preset,
        "backend": settings.backend,
        "tokens": settings.tokens,
        "latency": {row.batch: {name: stats.as_json() for name, stats in row.stats.items()} for row in speeds},
        "sizes": None if sizes is None else asdict(sizes),
        "quality": asdict(scores),
    }
    return json.dumps(figures, indent=2) + "\n"


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"


def megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
