"""The demo's table."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from rich.table import Table

from demo.compare import Quality, Settings, Sizes, Speed
from demo.sentences import PairSet


def machine() -> str:
    """What the numbers were taken on, in one line: processor, threads, versions."""
    able = torch.cpu.get_capabilities()
    names = {"avx512_vnni": "AVX512-VNNI", "avx512_f": "AVX512", "avx2": "AVX2"}
    best = next((word for key, word in names.items() if able.get(key)), "no vector extension of interest")
    return f"{processor()} ({best}), {torch.get_num_threads()} threads, torch {torch.__version__}"


def processor(info: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name as the system gives it."""
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def headings(settings: Settings) -> tuple[str, str, str, str]:
    name = settings.preset if settings.backend == "fxquant" else settings.backend
    return "", "float (Inductor)", name, "change"


def result_rows(speeds: list[Speed], sizes: Sizes | None, scores: Quality) -> Iterator[tuple[str, str, str, str]]:
    """Float beside quantized, one row a figure."""
    for row in speeds:
        medians = [milliseconds(row.stats[name].median) for name in ("float", "quantized")]
        yield f"latency, batch {row.batch}", medians[0], medians[1], f"{row.ratio:.2f}x as fast"
    for label, before, after in sizes.rows if sizes is not None else ():
        yield label, megabytes(before), megabytes(after), f"{before / after:.2f}x smaller"
    change = f"{scores.quantized_mrr - scores.float_mrr:+.4f} ± {scores.mrr_error:.4f}"
    yield "retrieval, MRR", f"{scores.float_mrr:.4f}", f"{scores.quantized_mrr:.4f}", change
    change = f"{100 * (scores.quantized_recall - scores.float_recall):+.1f} points"
    yield "retrieval, recall at 10", f"{scores.float_recall:.1%}", f"{scores.quantized_recall:.1%}", change
    yield "cosine to float", "1", f"{scores.cosine:.5f}", ""


def result_table(settings: Settings, rows: Iterable[tuple[str, str, str, str]]) -> Table:
    """The rows for a terminal."""
    table = Table(title=f"all-MiniLM-L6-v2, {settings.tokens} tokens", title_justify="left")
    first, *others = headings(settings)
    table.add_column(first)
    for heading in others:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def as_markdown(settings: Settings, rows: Iterable[tuple[str, str, str, str]]) -> str:
    """The rows for a document."""
    lines = [headings(settings), ("---", "---:", "---:", "---:"), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\nall-MiniLM-L6-v2, {settings.tokens} tokens, on {machine()}.\n"


def put_between(text: str, name: str, content: str) -> str:
    """The text with what stands between the marks ``<!-- name:begin -->`` and ``<!-- name:end -->`` replaced."""
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"the text has no marks {begin.strip()} … {end}: put them where the table should stand")
    return f"{before}{begin}{content}{end}{after}"


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
