"""The form of shipped tables: an entry for each format and size, a row for neighbouring buckets with one configuration.

{"format": 2, "arch": …, "source": "modelled",
 "kernels": {name: {"source": hash of its source, "fields": names of its configurations' values}},
 "configs": [[kernel, value, …], …],
 "entries": [{"op", "weights", "activations", "extra", "dtypes": […], "n", "k",
              "rows": [[first bucket, last bucket, number of the configuration, microseconds, of the heuristic's], …]}]}

A row's times are those at its last bucket, to three digits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fxquant.target import M_BUCKETS, KernelConfig, Problem
from fxquant.tuning.plans.records import Entry

TABLE_FORMAT = 2
_KEY = ("op", "weights", "activations", "extra", "n", "k")


def to_compact(arch: str, entries: Iterable[Entry]) -> dict[str, Any]:
    """The table of modelled entries. Dtypes with the same rows share them."""
    kernels: dict[str, dict[str, Any]] = {}
    configs: dict[KernelConfig, int] = {}
    sizes: dict[tuple[Any, ...], dict[str, dict[int, Entry]]] = {}
    for entry in entries:
        problem, config = entry.problem, entry.config
        kernels[config.kernel] = {"source": entry.kernel_source, "fields": list(config.meta)}
        key = tuple(getattr(problem, name) for name in _KEY)
        sizes.setdefault(key, {}).setdefault(problem.dtype, {})[problem.m] = entry
    listed: list[dict[str, Any]] = []
    for key, by_dtype in sorted(sizes.items()):
        of_key: list[dict[str, Any]] = []
        for dtype, by_m in sorted(by_dtype.items()):
            rows = _rows(by_m, configs)
            same = next((one for one in of_key if one["rows"] == rows), None)
            if same is None:
                of_key.append({**dict(zip(_KEY, key, strict=True)), "dtypes": [dtype], "rows": rows})
            else:
                same["dtypes"].append(dtype)
        listed += of_key
    return {
        "format": TABLE_FORMAT,
        "arch": arch,
        "source": "modelled",
        "kernels": dict(sorted(kernels.items())),
        "configs": [[config.kernel, *config.meta.values()] for config in configs],
        "entries": listed,
    }


def _rows(by_m: Mapping[int, Entry], configs: dict[KernelConfig, int]) -> list[list[float]]:
    rows: list[list[float]] = []
    for m, entry in sorted(by_m.items()):
        number = configs.setdefault(entry.config, len(configs))
        first = rows.pop()[0] if rows and rows[-1][2] == number and _next(int(rows[-1][1])) == m else m
        rows.append([first, m, number, _micro(entry.seconds), _micro(entry.heuristic_seconds)])
    return rows


def _next(m: int) -> int:
    """The bucket after m; 0 behind the last."""
    return next((bucket for bucket in M_BUCKETS if bucket > m), 0)


def _micro(seconds: float) -> float:
    return float(f"{seconds * 1e6:.3g}")


def from_compact(table: Mapping[str, Any]) -> Iterator[Entry]:
    """The inverse: an entry for each bucket. Raises KeyError, IndexError, TypeError or ValueError if it is none."""
    if table["format"] != TABLE_FORMAT or table["source"] != "modelled":
        raise ValueError(f"format {table['format']!r}, source {table['source']!r}")
    kernels = table["kernels"]
    configs = [
        KernelConfig(kernel, tuple(zip(kernels[kernel]["fields"], map(int, values), strict=True)))
        for kernel, *values in table["configs"]
    ]
    for fields in table["entries"]:
        op, weights, activations, extra, n, k = (fields[name] for name in _KEY)
        for first, last, number, seconds, heuristic in fields["rows"]:
            config = configs[number]
            source = str(kernels[config.kernel]["source"])
            for m in (bucket for bucket in M_BUCKETS if first <= bucket <= last):
                for dtype in fields["dtypes"]:
                    problem = Problem(op, m, n, k, weights, activations, dtype, extra)
                    yield Entry(problem, config, "modelled", source, seconds / 1e6, heuristic / 1e6)
