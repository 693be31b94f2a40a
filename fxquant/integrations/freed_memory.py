"""Memory that was freed goes back to the system while a model loads."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass

_EVERY = 32 << 20  # bytes: going back after each weight makes loading two to three times slower


@dataclass
class FreedMemory:
    """Counts the float weights that became codes, and now and then hands the C library's free pages to the system.

    glibc keeps freed blocks of up to 32 MB once it has seen one of that size, and float temporaries come to lie between
    codes that stay: without this the process may keep several times the quantized size. Where the C library has no
    malloc_trim it does nothing.
    """

    waiting: int = 0  # bytes since it last gave back

    def add(self, nbytes: int) -> None:
        """A float weight of so many bytes was let go."""
        self.waiting += nbytes
        if self.waiting >= _EVERY and (trim := _malloc_trim()) is not None:
            trim(0)
            self.waiting = 0


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, or Windows
        return None
    trim.argtypes, trim.restype = (ctypes.c_size_t,), ctypes.c_int
    return trim
