"""The tables of docs/benchmarks.md, made from benchmarks/results/*.json: what was printed, on what, by which command.

python -m benchmarks.table [--write docs/benchmarks.md]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, milliseconds
from demo.view import put_between

MARK = "results"
# benchmarks/results/peers.md, docs/models.md, docs/diffusers.md.
WITH_OWN_PAGES = ("peers.", "coverage.", "pipelines.")


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column is text, the others figures."""
    rule = ["---", *("--:" for _ in headings[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (headings, rule, *rows))


def section(data: Mapping[str, Any]) -> str:
    """One script's results."""
    machine = data["machine"]
    facts = f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}, Python {machine['python']}"
    quick = " A quick run: fewer cases and rounds." if data["quick"] else ""
    rows = data["rows"]
    parts = [
        f"### {data['title']}",
        f"`{data['command']}`, {data['date']}, {data['seconds']:.0f} s. {facts}.{quick}",
        markdown(list(rows[0]), [list(row.values()) for row in rows]),
    ]
    if data["checks"]:
        checks = [[c["what"], c["value"], c["demand"], "ok" if c["ok"] else "**fails**"] for c in data["checks"]]
        parts.append(markdown(["must hold", "measured", "demand", ""], checks))
    if data.get("notes"):
        parts.append("\n".join(f"- {note}" for note in data["notes"]))
    return "\n\n".join(parts)


def kernel_section(data: Mapping[str, Any]) -> str:
    """The results of linear_kernels, whose file has a form of its own."""
    rows = []
    for cell in data["cells"]:
        medians = {name: one["median"] for name, one in cell["seconds"].items()}
        row = [str(cell["threads"]), str(cell["size"]), str(cell["rows"]), *map(milliseconds, medians.values())]
        rows.append([*row, f"{cell['gops']['int8dq']:.0f}"])
    names = [f"{name} ms" for name in data["cells"][0]["seconds"]]
    odd = [
        [f"{o['size']} beside {o['even']}", str(o["rows"]), f"{o['dynamic']:.2f}", f"{o['weight_only']:.2f}"]
        for o in data["odd_sizes"]
    ]
    return "\n\n".join(
        [
            "### The kernels alone, beside eager float32 and oneDNN",
            f"`python -m benchmarks.linear_kernels`, kernels {data['isa']}, torch {data['torch']}.",
            markdown(["threads", "N = K", "M", *names, "int8dq GOPS"], rows),
            "Time per operation of an odd size over that of the next multiple of 64:",
            markdown(["N = K", "M", "int8dq", "int8wo"], odd),
            "\n".join(f"- missed: {words}" for words in data["missed"]) or "Every floor holds.",
        ]
    )


def tables(folder: Path) -> str:
    """All results in the folder but those that have a page of their own."""
    sections = []
    for path in sorted(folder.glob("*.json")):
        if path.name.startswith(WITH_OWN_PAGES):
            continue
        data = json.loads(path.read_text(encoding="utf-8"))
        sections.append(section(data) if "rows" in data else kernel_section(data))
    return "\n\n".join(sections) or "No results yet: `make bench` writes them."


def write(page: Path, mark: str, text: str) -> None:
    """Put the text between the marks of that name in the page. Raises ValueError if it has none."""
    page.write_text(put_between(page.read_text(encoding="utf-8"), mark, f"\n{text}\n\n"), encoding="utf-8")


def main(chosen: argparse.Namespace) -> int:
    text = tables(chosen.results)
    if chosen.write is None:
        sys.stdout.write(text + "\n")
    else:
        write(chosen.write, MARK, text)
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--write", type=Path, help="a page with the marks of the results")
    sys.exit(main(parser.parse_args()))
