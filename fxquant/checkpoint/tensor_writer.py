"""A safetensors file, written tensor by tensor, in any order.

Tensors whose size is a multiple of 64 bytes begin at one, and all others at a multiple of their elements' size.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxquant.checkpoint.early_writeback import EarlyWriteback
from fxquant.checkpoint.tensor_files import DTYPES, Place

NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 64
_AT_ONCE = 1 << 18  # bytes of one call: calls of 1 and 4 MiB took longer where this was measured


class FileWriter:
    """Writes tensors into their places of one file, in any order; the file is on the disk when `write` has had all."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """tensors: all that the file will hold, on meta or not; only shapes and dtypes are looked at."""
        self.places = places_for(tensors)
        self.path = path
        header = header_for(self.places, metadata)
        self._start = len(header)
        self._missing = sum(place.end - place.begin for place in self.places.values())
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._to_disk = EarlyWriteback(self._descriptor)
        self._put(header, 0)
        self._end_if_all()

    def write(self, key: str, tensor: Tensor, offset: int = 0) -> None:
        """Write a tensor, of the shape and dtype that were announced; or rows of one, at this offset in its bytes."""
        place = self.places[key]
        is_whole = tuple(tensor.shape) == place.shape
        assert tensor.dtype is place.dtype, f"{key}: {tensor.dtype}, not {place.dtype}"
        assert is_whole or tensor.shape[1:] == place.shape[1:], f"{key}: {tuple(tensor.shape)}, not {place.shape}"
        assert offset + tensor.nbytes <= place.end - place.begin, f"{key}: more bytes than its place has"
        flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
        if flat.numel():
            self._put(_bytes(flat), self._start + place.begin + offset)
        self._missing -= flat.numel()
        self._end_if_all()

    def close(self) -> None:
        """Close the file, whether or not it is complete."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _end_if_all(self) -> None:
        if not self._missing:
            os.fsync(self._descriptor)
            self.close()

    def _put(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self._descriptor, view[:_AT_ONCE], offset)
            self._to_disk.note(offset, written)
            view, offset = view[written:], offset + written


def _bytes(flat: Tensor) -> memoryview:
    """The memory of a flat uint8 tensor on the CPU, which must outlive this."""
    return memoryview((ctypes.c_char * flat.numel()).from_address(flat.data_ptr())).cast("B")


def places_for(tensors: Mapping[str, Tensor]) -> dict[str, Place]:
    """The places of tensors (on meta, too) in a file of their own."""

    def by_alignment(item: tuple[str, Tensor]) -> tuple[bool, int]:
        return bool(item[1].nbytes % ALIGNMENT), -item[1].itemsize

    places, end = {}, 0
    for key, tensor in sorted(tensors.items(), key=by_alignment):
        begin, end = end, end + tensor.nbytes
        places[key] = Place(tensor.dtype, tuple(tensor.shape), begin, end)
    return places


def header_for(places: Mapping[str, Place], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a file, up to its tensors'."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    for key, place in places.items():
        offsets = [place.begin, place.end]
        header[key] = {"dtype": NAMES[place.dtype], "shape": list(place.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
