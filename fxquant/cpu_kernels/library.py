"""The built library: loading it registers the CPU kernels of the fxquant ops."""

from __future__ import annotations

import ctypes
import functools
import threading
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch  # noqa: F401 - the library's symbols are in libtorch, which must be loaded before it

from fxquant.cpu_kernels.build import BuildFailed, build
from fxquant.errors import KernelsUnavailableWarning

_LOADING = threading.Lock()


@dataclass(frozen=True)
class Library:
    """The loaded kernels.

    path  the shared library.
    isa   what runs when an op is called with isa=0: 'amx', 'avx512vnni', 'avxvnni', 'avx2' or 'portable'.
    """

    path: Path
    isa: str
    _handle: ctypes.CDLL = field(repr=False, compare=False)

    def fingerprint(self, pointers: Any, nbytes: Any, n: int, each: Any = None) -> int:
        """One hash over three 8-byte samples of each of n buffers; a buffer shorter than 8 bytes counts whole.

        pointers (c_void_p * n), nbytes (c_int64 * n); each (c_uint64 * n) or None gets the hash of every buffer. The
        arrays are made once by the caller: a call then costs the reads, about 0.1 us a buffer.
        """
        return self._handle.fxquant_fingerprint(pointers, nbytes, n, each)

    def tensor_state(self, tensors: Any, n: int) -> int:
        """One hash over address and version of n tensors, given by their ``_cdata`` as (c_void_p * n)."""
        return self._handle.fxquant_tensor_state(tensors, n)


def load() -> Library | None:
    """The kernels, built if they are not there yet (40 s of one core); None, with one warning, if that cannot be done.

    Idempotent and safe for threads. From then on the CPU key of the fxquant ops runs them.
    """
    with _LOADING:  # functools.cache alone would let two threads build, and warn, twice
        return _load()


def best_isa() -> str | None:
    """The instruction set that the kernels use on this machine; None without kernels."""
    library = load()
    return None if library is None else library.isa


@functools.cache
def _load() -> Library | None:
    try:
        path = build()
        handle = _open(path)
    except (BuildFailed, OSError) as error:
        warnings.warn(KernelsUnavailableWarning(str(error)), stacklevel=4)
        return None
    handle.fxquant_isa.restype = ctypes.c_char_p
    handle.fxquant_tensor_state.restype = ctypes.c_uint64
    handle.fxquant_tensor_state.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    handle.fxquant_fingerprint.restype = ctypes.c_uint64
    handle.fxquant_fingerprint.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
    return Library(path, handle.fxquant_isa().decode(), handle)


def _open(path: Path) -> ctypes.CDLL:
    try:
        # Its static initializers register the kernels, as torch.ops.load_library does. Global: see csrc/shims.h.
        return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise BuildFailed(f"the library does not load ({error}); delete {path} to have it built again") from error
