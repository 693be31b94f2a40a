"""JSON files, read and written with care."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from fxquant.errors import InvalidCheckpoint

MAX_JSON = 64 << 20  # bytes


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `InvalidCheckpoint` if there is none."""
    with open_regular(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > MAX_JSON:
            raise InvalidCheckpoint(path, f"it has {size} bytes, and JSON of more than {MAX_JSON} is not read")
        return parse_json(path, file.read(MAX_JSON))


def open_regular(path: Path) -> Any:
    """An ordinary file, opened to read. Raises `InvalidCheckpoint` if it is missing, a pipe, a device, a folder."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise InvalidCheckpoint(path, "it is no ordinary file")
        return path.open("rb")
    except OSError as error:
        raise InvalidCheckpoint(path, error.strerror or str(error)) from error


def parse_json(path: Path, text: bytes) -> dict[str, Any]:
    """The JSON object that the text is. Raises `InvalidCheckpoint` where it is none, or has a key twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key is there twice")
        return found

    def refuse(word: str) -> NoReturn:
        raise ValueError(f"{word} is no JSON")

    try:
        value = json.loads(text.decode(), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise InvalidCheckpoint(path, f"its JSON cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise InvalidCheckpoint(path, "its JSON is no object")
    return value


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object as JSON; it is on the disk when this returns."""
    with path.open("x", encoding="utf-8") as file:
        json.dump(content, file, indent=2, sort_keys=False, ensure_ascii=False, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
