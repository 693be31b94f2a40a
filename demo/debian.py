"""Data that Debian packages, fetched and unpacked without root."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path


class Unreachable(RuntimeError):
    """A package is neither installed, nor in the cache, nor to be fetched."""


def unpacked(package: str, what: str, work: Path) -> Path:
    """Download a package and unpack it below `work`; the folder that stands for ``/``.

    what: its name in errors. Raises Unreachable.
    """
    missing = [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]
    if missing:
        raise Unreachable(f"{what} cannot be fetched: no {' or '.join(missing)} on this machine")
    archive, folder = _download(package, what, work), work / "unpacked"
    call(["dpkg-deb", "-x", str(archive), str(folder)], what, work)
    return folder


def _download(package: str, what: str, work: Path) -> Path:
    """The .deb file, by the system's package lists or, if those are empty, by lists of our own in `work`."""
    lists, archives = work / "lists", work / "archives"
    (lists / "partial").mkdir(parents=True, exist_ok=True)
    (archives / "partial").mkdir(parents=True, exist_ok=True)
    own = ["-o", f"Dir::State::lists={lists}", "-o", f"Dir::Cache={archives}"]
    try:
        call(["apt-get", "-q", "download", package], what, work)
    except Unreachable:
        call(["apt-get", "-q", *own, "update"], what, work)
        call(["apt-get", "-q", *own, "download", package], what, work)
    return next(work.glob(f"{package}_*.deb"))


def call(command: list[str], what: str, work: Path) -> str:
    """Run a program in `work`; what it printed. Raises Unreachable, with the last line of its error."""
    try:
        done = subprocess.run(command, cwd=work, check=True, capture_output=True, text=True, timeout=90)
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no message"])[-1]
        raise Unreachable(f"{what} cannot be fetched: `{command[0]}` said: {last}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unreachable(f"{what} cannot be fetched: {error}") from error
    return done.stdout
