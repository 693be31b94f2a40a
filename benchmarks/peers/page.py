"""The page benchmarks/results/peers.md, made from the results beside it: what must hold, then every table and plot.

python -m benchmarks.peers.page
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks.harness import RESULTS
from benchmarks.table import markdown, section

# In the order of the page; with the plot that belongs to each.
SCRIPTS = {
    "peers.kernels": "peers.roofline.png",
    "peers.models": "peers.models.png",
    "peers.overhead": "",
    "peers.sizes": "",
    "peers.eager": "",
}
NAME = "peers.md"


def page(folder: Path) -> str:
    """All of the scripts' results that lie in the folder."""
    found = {
        name: json.loads(path.read_text(encoding="utf-8"))
        for name in SCRIPTS
        if (path := folder / f"{name}.json").exists()
    }
    checks = [(name, check) for name, data in found.items() for check in data["checks"]]
    holding = sum(check["ok"] for _, check in checks)
    verdicts = [
        [check["what"], check["value"], check["demand"], "holds" if check["ok"] else "**does not hold**", name]
        for name, check in checks
    ]
    parts = [
        "# Beside other tools on the CPU",
        "Written by `make bench`; how it is measured: [docs/benchmarks.md](../../docs/benchmarks.md).",
        "## Must hold",
        f"{holding} of {len(checks)} hold. One thread: by medians; two: by best rounds. Missing from the list: "
        + (", ".join(name for name in SCRIPTS if name not in found) or "no script")
        + ".",
        markdown(["what", "measured", "demand", "", "script"], verdicts),
    ]
    for name, data in found.items():
        parts.append(section({**data, "checks": []}).replace("###", "##", 1))
        if SCRIPTS[name] and (folder / SCRIPTS[name]).exists():
            parts.append(f"![{data['title']}]({SCRIPTS[name]})")
    return "\n\n".join(parts) + "\n"


def main(chosen: argparse.Namespace) -> int:
    path = chosen.results / NAME
    path.write_text(page(chosen.results), encoding="utf-8")
    sys.stdout.write(f"written to {path}\n")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    sys.exit(main(parser.parse_args()))
