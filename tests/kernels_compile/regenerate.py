"""Write facts.json anew: `python -m tests.kernels_compile.regenerate [KERNEL ...]`. Review the result as a diff."""

from __future__ import annotations

import sys

from fxquant.target import KernelConfig
from fxquant.tuning.facts import Facts
from tests.kernels_compile import table
from tests.kernels_compile.checks import complaints


def main(names: list[str]) -> None:
    """All kernels, or those of these names; rows of others stay as they are, unless their kernel is gone."""
    rows = list(table.rows())
    before = table.read()["rows"] if names and table.PATH.exists() else {}
    found = {}
    for row in rows:
        if names and row.kernel not in names and row.key in before:
            kept = before[row.key]
            found[row.key] = (KernelConfig.from_json(kept["config"]), Facts.from_json(kept["launches"]))
            continue
        facts = row.facts()
        found[row.key] = (row.config, facts)
        for complaint in complaints(row.problem, row.config, facts, row.arch):
            sys.stderr.write(f"{row.key}, {row.config}: {complaint}\n")
    table.write(found)
    sys.stderr.write(f"{table.PATH}: {len(found)} rows\n")


if __name__ == "__main__":
    main(sys.argv[1:])
