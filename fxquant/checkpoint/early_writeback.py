"""Writing to the disk begins while more is made, so that the wait for it at the end is short."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

_EVERY = 32 << 20  # bytes: a fraction of a second of a disk
_SYNC_FILE_RANGE_WRITE = 2


class EarlyWriteback:
    """Has the system begin to write what was put into a file, some MiB at a time; where it can't, fsync does it all.

    What it says is not looked at: a failure to write comes back from fsync.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._begin = self._end = 0

    def note(self, offset: int, count: int) -> None:
        """So many bytes have been put at this offset."""
        if offset != self._end:
            self._start()
            self._begin = offset
        self._end = offset + count
        if self._end - self._begin >= _EVERY:
            self._start()

    def _start(self) -> None:
        sync_file_range = _function()
        if sync_file_range is not None and self._end > self._begin:
            sync_file_range(self._descriptor, self._begin, self._end - self._begin, _SYNC_FILE_RANGE_WRITE)
        self._begin = self._end


@functools.cache
def _function() -> Callable[[int, int, int, int], int] | None:
    """Linux's sync_file_range; Python has no door to it."""
    try:
        found = ctypes.CDLL(None).sync_file_range
    except (OSError, TypeError, AttributeError):
        return None
    found.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return found
