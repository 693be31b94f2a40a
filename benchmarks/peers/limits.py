"""The limits of this machine's cores, as loops to be timed in turn with a kernel: limits.cpp by g++ and ctypes."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from benchmarks.peers.absent import Absent

SOURCE = Path(__file__).with_name("limits.cpp")
_CHUNK = 256
_OPERATIONS = 16 * 64 * 2


@functools.cache
def _library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory(prefix="fxquant-limits-") as folder:
        target = Path(folder) / "limits.so"
        command = ["g++", "-O3", "-march=native", "-shared", "-fPIC", str(SOURCE), "-o", str(target)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise Absent(f"the loops could not be compiled: {getattr(error, 'stderr', '') or error}") from error
        library = ctypes.CDLL(str(target))
    library.read_all.restype = ctypes.c_uint64
    library.read_all.argtypes = (ctypes.c_void_p, ctypes.c_int64)
    library.dot_products.restype = ctypes.c_int64
    library.dot_products.argtypes = (ctypes.c_int64,)
    return library


def read_loop(buffers: Sequence[Tensor], threads: int) -> Callable[[], object]:
    """A function that reads every buffer once, each thread its part of all of them. Raises Absent without g++."""
    read = _library().read_all
    parts: list[list[tuple[int, int]]] = [[] for _ in range(threads)]
    for buffer in buffers:
        share = buffer.nbytes // threads // _CHUNK * _CHUNK
        for thread, part in enumerate(parts):
            part.append((buffer.data_ptr() + thread * share, share))

    def of(part: list[tuple[int, int]]) -> None:
        for start, count in part:
            read(start, count)

    return _side_by_side([functools.partial(of, part) for part in parts])


def product_loop(operations: int, threads: int) -> Callable[[], object]:
    """A function that does so many multiplications and additions by dpbusd, in registers. Raises Absent without it."""
    products = _library().dot_products
    if products(1) != _OPERATIONS:
        raise Absent("this CPU has no AVX512-VNNI: there is no dpbusd loop to compare with")
    return _side_by_side([functools.partial(products, operations // _OPERATIONS // threads)] * threads)


def _side_by_side(parts: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """All parts at once; ctypes lets go of the interpreter meanwhile."""
    first, *others = parts
    if not others:
        return first
    pool = ThreadPoolExecutor(len(others))

    def run() -> None:
        waiting = [pool.submit(part) for part in others]
        first()
        for one in waiting:
            one.result()

    return run
