"""English text to judge a language model by: Python's tutorial and the King James Bible, as Debian packages them.

Fetched once, without root, and kept. Where no Debian archive can be reached: the README of this repository.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from demo.debian import Unreachable, call, unpacked

log = logging.getLogger(__name__)

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fxquant-demo"
README = Path(__file__).parents[1] / "README.md"


def load_texts(cache: Path = CACHE) -> dict[str, str]:
    """The texts by their names."""
    try:
        return {name: _kept(cache / f"{name.replace(' ', '-')}.txt", fetch) for name, fetch in SOURCES.items()}
    except Unreachable as error:
        log.warning("%s; using this repository's README instead", error)
        return {"README": README.read_text(encoding="utf-8")}


def _kept(path: Path, fetch: Callable[[Path], str]) -> str:
    """The file's text; fetched first if it is not there."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as name:
            work = Path(name)
            fresh = work / path.name
            fresh.write_text(fetch(work), encoding="utf-8")
            fresh.replace(path)
    return path.read_text(encoding="utf-8")


def _tutorial(work: Path) -> str:
    root = unpacked("python3.11-doc", "Python's documentation", work)
    folder = root / "usr/share/doc/python3.11/html/_sources/tutorial"
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.rst.txt")))


def _bible(work: Path) -> str:
    """Verse by verse, without their numbers."""
    what = "the King James Bible"
    root = unpacked("bible-kjv-text", what, work)
    unpacked("bible-kjv", what, work)
    data = str((root / "usr/lib/bible.data").relative_to(work))
    printed = call(["unpacked/usr/bin/bible", "-p", ".", "-d", data, "-f", "-l0", "gen1:1-rev22:21"], what, work)
    return re.sub(r"(?m)^\S+ ", "", printed)


SOURCES: dict[str, Callable[[Path], str]] = {"Python tutorial": _tutorial, "KJV": _bible}
