"""The user's files of facts: clear JSON, one file a compiled launch. Losing them costs a compilation each."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from fxquant.cpu_kernels import cache_dir
from fxquant.cpu_kernels.build import BuildFailed

logger = logging.getLogger(__name__)
T = TypeVar("T")


def folder() -> Path | None:
    """Where the files lie, beside the CPU kernels; None where no folder of the user's own can be had."""
    try:
        path = cache_dir() / "facts"
        path.mkdir(mode=0o700, exist_ok=True)
    except (BuildFailed, OSError) as error:
        logger.debug("facts are not kept: %s", error)
        return None
    return path


def path_of(key: str) -> Path | None:
    """The file of a launch by its key, which also depends on how facts are read; None without a folder."""
    parent = folder()
    digest = hashlib.sha256(f"{key}\n{_readers()}".encode()).hexdigest()[:24]
    return parent and parent / f"{digest}.json"


def read(path: Path | None, made_of: Callable[[dict[str, Any]], T]) -> T | None:
    """What `made_of` makes of a file's facts; None if there is none, or none that can be read: it will be made anew."""
    if path is None or not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return made_of(content["facts"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("facts in %s cannot be used (%s); they are made anew", path, error)
        return None


def write(path: Path | None, facts: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Write under a temporary name and rename; `about` says in clear what the facts are of."""
    if path is None:
        return
    text = json.dumps({"about": about, "facts": facts}, indent=1)
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    except OSError as error:
        logger.debug("facts are not kept: %s", error)
        return
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except OSError as error:
        logger.debug("facts are not kept: %s", error)
        Path(name).unlink(missing_ok=True)


@functools.cache
def _readers() -> str:
    """Digest of this package: other readers may see other facts in the same code."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
