"""Reports as text: how much, where not, why not. Stable: no times, no addresses, no absolute paths."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from fxquant.report.records import KINDS, STATUSES, Site, Uncovered

if TYPE_CHECKING:
    from fxquant.report.reports import GraphReport, ModelReport

_WORST = 5
_WORDS = {"linear": "linear", "conv": "convolution", "embedding": "embedding"}
# A component of a path that is a number: "layers.3.mlp".
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_BARE_DOOR = (
    'torch.compile(backend="fxquant") sees graphs only: modules that Dynamo never showed are not in this report.\n'
    "fxquant.compile(model, config) has the model in hand and names them; fxquant.explain(model, *args) does so "
    "without compiling."
)


def size_text(count: int) -> str:
    """Bytes in decimal units: ``412.0 MB``."""
    if count < 1000:
        return f"{count} B"
    value, unit = count / 1e3, "kB"
    for larger in ("MB", "GB"):
        if value >= 999.95:
            value, unit = value / 1e3, larger
    return f"{value:.1f} {unit}"


def folded_names(names: Iterable[str]) -> list[str]:
    """Names that differ in one number become one: ``layers.{0-3,5}.mlp.down``."""
    by_template: dict[str, list[tuple[int, ...]]] = {}
    for name in names:
        template = _NUMBER.sub("{}", name.replace("{", "{{").replace("}", "}}"))
        by_template.setdefault(template, []).append(tuple(map(int, _NUMBER.findall(name))))
    folded = []
    for template, rows in by_template.items():
        columns = [sorted(set(column)) for column in zip(*rows, strict=True)]
        if len(rows) > 1 and sum(len(column) > 1 for column in columns) == 1 and len(set(rows)) == len(rows):
            folded.append(template.format(*(_ranges(column) for column in columns)))
        else:
            folded += [template.format(*row) for row in rows]
    return folded


def _ranges(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "{" + ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs) + "}"


def graph_text(report: GraphReport) -> str:
    """The summary of one graph, as it stands in ``00-summary.txt``."""
    lines = [_headline(report), *_site_lines(report.sites), *_quantized_lines(report.sites)]
    lines += [*_shared_lines(report.sites), *_declined_lines(report)]
    if report.misses:
        rows = [(miss.where, f"{miss.reason}{f' (at %{miss.node})' if miss.node else ''}") for miss in report.misses]
        lines += ["closest misses", *_table(rows)]
    if report.others:
        lines += ["weights of other ops, float (size of each)", *_uncovered_lines(report.others)]
    measured = sorted((s for s in report.sites if s.sqnr is not None), key=lambda s: s.sqnr or 0.0)
    if measured:
        lines += ["lowest sqnr", *_table([(s.path, f"{s.sqnr:.1f}dB") for s in measured[:_WORST]])]
    if report.sets:
        lines.append(f"serves {len(report.sets) + 1} parameter sets")
    if report.break_reason:
        lines.append(f"graph break after it: {report.break_reason}")
    return "\n".join(lines)


def model_text(report: ModelReport) -> str:
    """The summary of a model: coverage first, then what is not covered, then each graph."""
    known = report.coverage is not None
    lines = [_coverage_line(report)] if known else [_count(len(report.graphs), "graph"), _BARE_DOOR]
    if report.fallbacks:
        lines += [f"{_count(len(report.fallbacks), 'module')} in eager", *_site_lines(report.fallbacks)]
        lines += _quantized_lines(report.fallbacks)
    if report.uncovered:
        total = sum(row.bytes for row in report.uncovered)
        title = f"not quantized: {_count(len(report.uncovered), 'parameter')}, {size_text(total)} (size of each)"
        lines += [title, *_uncovered_lines(report.uncovered)]
    return "\n\n".join(["\n".join(lines), *(graph_text(graph) for graph in report.graphs)])


def _coverage_line(report: ModelReport) -> str:
    assert report.coverage is not None
    sizes = f"{size_text(report.quantized_bytes)} of {size_text(report.matrix_bytes)}"
    return (
        f"fxquant.{report.door}: {report.coverage:.1%} of the weights quantized "
        f"({sizes} in parameters with two or more dimensions), "
        f"{_count(len(report.graphs), 'graph')}"
    )


def _headline(report: GraphReport) -> str:
    parts = []
    for op in KINDS:
        if counts := report.counts_of(op):
            words = ", ".join(f"{count} {status}" for status, count in counts.items())
            parts.append(f"{_count(sum(counts.values()), _WORDS[op])}: {words}.")
    rest = [site for site in report.sites if site.op not in KINDS]
    others = sum(1 for site in rest if site.parameter_names)
    parts = parts or ["no linears, convolutions or embeddings."]
    parts += [f"{_count(others, 'other op')} with weights."] if others else []
    parts += [f"{_count(len(rest) - others, 'product')} of two activations."] if len(rest) > others else []
    sizes = f"weights {size_text(report.bytes_before)} -> {size_text(report.bytes_after)}"
    return f"{report.name}: {' '.join(parts)}   {sizes}"


def _site_lines(sites: Sequence[Site]) -> list[str]:
    lines = []
    lowered = [site for site in sites if site.status == "lowered"]
    if lowered:
        lines.append(f"  {'lowered':<10} {', '.join(_kernel_words(lowered))}")
        chosen = _grouped((site.path, site.kernel) for site in lowered if " (" in site.kernel)
        lines += [f"  {'':<10} {where}: {kernel}" for where, kernel in chosen]
        changed = Counter(site.reason for site in lowered if site.reason)
        lines += [f"  {'':<10} {_count(count, 'site')}: {why}" for why, count in changed.items()]
    rows: list[tuple[str, str, str]] = []
    for status in STATUSES[1:]:
        chosen = [site for site in sites if site.status == status]
        rows += [(status, where, why) for where, why in _grouped((site.path, _why(site)) for site in chosen)]
    width = max((len(where) for _, where, _ in rows), default=0)
    lines += [f"  {status:<10} {where:<{width}}  {why}".rstrip() for status, where, why in rows]
    return lines


def _why(site: Site) -> str:
    if not site.reason and site.status == "reference":
        return f"{site.spec_text}: runs as dequantize + {site.op}"
    return site.reason_with_op


def _quantized_lines(sites: Sequence[Site]) -> list[str]:
    """Each quantized site with format, granularity, algorithm and bytes; equal ones together, unless measured."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for number, site in enumerate(site for site in sites if site.is_quantized):
        spec = site.spec_text.partition(" algorithm=")[0]
        sizes = f"{size_text(site.bytes_before)} -> {size_text(site.bytes_after)}"
        measured = _sqnr_text(site)
        own = str(number) if measured else ""
        rows.setdefault((site.op, spec, site.algorithm, sizes, measured, own), []).append(site.path)
    table = [(name, *words[:-1]) for words, names in rows.items() for name in folded_names(names)]
    return ["quantized (size of each)", *_columns(table)] if table else []


def _sqnr_text(site: Site) -> str:
    parts = [("output", site.sqnr), ("weight", site.weight_sqnr)]
    return ", ".join(f"{word} {value:.1f}dB" for word, value in parts if value is not None)


def _shared_lines(sites: Sequence[Site]) -> list[str]:
    """Weights that several modules read: an embedding and the head tied to it."""
    readers: dict[str, dict[str, Site]] = {}
    for site in sites:
        for name in site.parameter_names:
            readers.setdefault(name, {}).setdefault(site.path, site)
    shared: dict[tuple[str, ...], list[str]] = {}
    for name, by_path in readers.items():
        if len(by_path) > 1:
            words = (f"{path} ({s.op}, {s.spec_text if s.is_quantized else 'float'})" for path, s in by_path.items())
            shared.setdefault(tuple(words), []).append(name)
    rows = [(" = ".join(names), f"read by {', '.join(words)}") for words, names in shared.items()]
    return ["shared weights", *_table(rows)] if rows else []


def _kernel_words(lowered: list[Site]) -> list[str]:
    by_kernel: dict[str, list[Site]] = {}
    for site in lowered:
        by_kernel.setdefault(site.kernel.split(" ")[0], []).append(site)
    words = []
    for kernel, sites in by_kernel.items():
        groups = [site for site in sites if site.members > 1]
        fused = f" ({sum(s.members for s in groups)} in {_count(len(groups), 'fused group')})" if groups else ""
        words.append(f"{sum(s.members for s in sites)} {kernel}{fused}")
    return words


def _declined_lines(report: GraphReport) -> list[str]:
    told = {(site.path, site.reason) for site in report.sites}
    fusions: list[tuple[str, str]] = []
    others: list[tuple[str, str]] = []
    for step, rows in report.declined.items():
        chosen = fusions if step.startswith("fuse-") else others
        untold = [row for row in rows if (row.where, row.reason) not in told]
        chosen += [(row.where or f"%{row.node}", f"{step}: {row.reason}") for row in untold]
    lines = ["declined fusions", *_table(_grouped(fusions))] if fusions else []
    return [*lines, "declined", *_table(_grouped(others))] if others else lines


def _uncovered_lines(rows: Iterable[Uncovered]) -> list[str]:
    return _table(_grouped((row.name, f"{size_text(row.bytes):>8}  {row.reason}") for row in rows))


def _grouped(rows: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Rows of one reason stand together, and those that differ in one number become one row."""
    by_reason: dict[str, list[str]] = {}
    for where, why in rows:
        by_reason.setdefault(why, []).append(where)
    return [(where, why) for why, names in by_reason.items() for where in folded_names(names)]


def _table(rows: Sequence[tuple[str, str]]) -> list[str]:
    width = max(len(where) for where, _ in rows)
    return [f"  {where:<{width}}  {why}".rstrip() for where, why in rows]


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(f"{word:<{n}}" for word, n in zip(row, widths, strict=True) if n).rstrip() for row in rows]


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
