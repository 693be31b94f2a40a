"""The one way by which launchers start a Triton kernel, so that a launch can also be only written down.

What is written down is compiled for any target without a GPU (`fxquant.tuning.facts`): so what was examined there is
exactly what runs later, arguments, specialization and all.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Grid = tuple[int, ...]


@dataclass(frozen=True)
class Launch:
    """One launch: the jit function, its grid, positional arguments, and constexprs and options by name."""

    function: Any
    grid: Grid
    args: tuple[Any, ...]
    meta: dict[str, Any]


# Of every launch. Triton's default of it is about to change, and it says so with a warning.
OPTIONS = {"enable_fp_fusion": True}

_RECORD: ContextVar[list[Launch] | None] = ContextVar("fxquant_launches", default=None)


def launch(function: Any, grid: Grid, *args: Any, **meta: Any) -> None:
    """Run a jit function on the grid; under `recorded` only note it."""
    record = _RECORD.get()
    if record is not None:
        record.append(Launch(function, grid, args, meta))
    elif 0 not in grid:
        function[grid](*args, **{**OPTIONS, **meta})


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches inside are not run but put into the list; tensors may be on the meta device."""
    launches: list[Launch] = []
    token = _RECORD.set(launches)
    try:
        yield launches
    finally:
        _RECORD.reset(token)


_GUARDED: ContextVar[list[tuple[Tensor, int]] | None] = ContextVar("fxquant_guarded", default=None)
_SENTINEL, _SLACK = 0xA5, 4096


def output(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a result, not initialized. Every launcher takes it from here, so that tests can watch its end."""
    guarded = _GUARDED.get()
    if guarded is None:
        return torch.empty(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    raw = torch.full([size + _SLACK], _SENTINEL, dtype=torch.uint8, device=device)
    guarded.append((raw, size))
    return raw[:size].view(dtype).view(list(shape))


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Results made inside have memory behind them in which nothing may be written; raises AssertionError at the end."""
    made: list[tuple[Tensor, int]] = []
    token = _GUARDED.set(made)
    try:
        yield
    finally:
        _GUARDED.reset(token)
    for raw, size in made:
        if not (raw[size:] == _SENTINEL).all():
            raise AssertionError(f"a kernel wrote behind its result of {size} bytes")


ALIGNED = 16  # bytes: of the address and of the rows of what a descriptor (TMA) reads


def is_aligned(t: Tensor) -> bool:
    """It begins at such a multiple, as all that torch allocates does; a part of another tensor may not."""
    return t.device.type == "meta" or t.data_ptr() % ALIGNED == 0


def interpreted() -> bool:
    """True where Triton's interpreter runs the kernels (TRITON_INTERPRET=1), as tests do on a CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
