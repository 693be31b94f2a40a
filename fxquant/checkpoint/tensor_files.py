"""The format of a safetensors file: its header, checked before anything is believed, and its tensors, mapped.

The format: 8 bytes, the length n of the header, little-endian; n bytes of JSON, for each tensor its dtype, shape and
the place of its bytes behind the header; then the bytes, without gaps.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxquant.checkpoint.json_files import open_regular, parse_json
from fxquant.errors import InvalidCheckpoint

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}
MAX_HEADER = 32 << 20  # bytes: some 200,000 tensors
_MAX_DIMENSIONS = 64
_MAX_SIZE = 1 << 48  # of a dimension, and of the product of those that are not 0: what torch can hold in strides


class Place(NamedTuple):
    """Where a tensor lies behind the header of its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile(NamedTuple):
    """A file whose header makes sense: what its header says beside tensors, and the tensors, mapped from the file."""

    metadata: dict[str, str]
    tensors: dict[str, Tensor]


def read_file(path: Path) -> TensorFile:
    """Check a file and map its tensors. No byte of a tensor is read, and nothing is allocated for it.

    The mapping is private, so writing to a tensor leaves the file as it is. A tensor that the file has at an address
    unfit for its dtype is a copy.

    Raises:
        InvalidCheckpoint: the file is no safetensors file, or its header contradicts itself or the file's size.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little") if size >= 8 else -1
        if not 2 <= length <= size - 8:
            raise InvalidCheckpoint(path, _no_header(size, length))
        if length > MAX_HEADER:
            raise InvalidCheckpoint(path, f"its header is said to take {length} bytes; the most is {MAX_HEADER}")
        header = parse_json(path, file.read(length))
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    metadata, places = _checked(path, header, size - 8 - length)
    return TensorFile(metadata, {key: _mapped(mapped, 8 + length, place) for key, place in places.items()})


def _no_header(size: int, length: int) -> str:
    if size < 8:
        return f"it has {size} bytes, too few for a safetensors file"
    return f"its header is said to take {length} bytes, and the file has {size}: it is cut off, or no safetensors file"


def _checked(path: Path, header: Mapping[str, Any], size: int) -> tuple[dict[str, str], dict[str, Place]]:
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise InvalidCheckpoint(path, "its __metadata__ is no object of texts")
    places = {key: _place(path, key, told) for key, told in header.items() if key != "__metadata__"}
    end = 0
    for key, place in sorted(places.items(), key=lambda item: (item[1].begin, item[1].end)):
        if place.begin != end:
            raise InvalidCheckpoint(path, f"tensor {key!r} begins at byte {place.begin}, and byte {end} is due")
        end = place.end
    if end != size:
        raise InvalidCheckpoint(
            path, f"its tensors take {end} bytes, and the file has {size}: it is cut off, or edited"
        )
    return metadata, places


def _place(path: Path, key: str, told: object) -> Place:
    problem = _entry_problem(told)
    if problem or not isinstance(told, dict):
        raise InvalidCheckpoint(path, f"tensor {key!r}: {problem}")
    dtype, shape, (begin, end) = DTYPES[told["dtype"]], tuple(told["shape"]), told["data_offsets"]
    wanted = math.prod(shape) * dtype.itemsize
    if end - begin != wanted:
        met = f"tensor {key!r} of shape {list(shape)} and dtype {told['dtype']} is given {end - begin} bytes"
        raise InvalidCheckpoint(path, f"{met}, and takes {wanted}")
    return Place(dtype, shape, begin, end)


def _entry_problem(told: object) -> str:
    if not isinstance(told, dict) or set(told) != {"dtype", "shape", "data_offsets"}:
        return "its entry has not just dtype, shape and data_offsets"
    if not isinstance(told["dtype"], str) or told["dtype"] not in DTYPES:
        return f"dtype {str(told['dtype'])[:40]!r} is not known"
    shape, offsets = told["shape"], told["data_offsets"]
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS or math.prod(n or 1 for n in shape) > _MAX_SIZE:
        return "its shape is no list of sizes"
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return "its data_offsets are no range"
    return ""


def _are_sizes(told: object) -> bool:
    return isinstance(told, list) and all(type(n) is int and 0 <= n <= _MAX_SIZE for n in told)


def _mapped(buffer: mmap.mmap, start: int, place: Place) -> Tensor:
    if place.begin == place.end:
        return torch.empty(place.shape, dtype=place.dtype, device="cpu")
    raw = torch.frombuffer(buffer, dtype=torch.uint8, count=place.end - place.begin, offset=start + place.begin)
    if raw.data_ptr() % place.dtype.itemsize:
        raw = raw.clone()
    return raw.view(place.dtype).view(place.shape)
