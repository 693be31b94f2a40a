"""The user's files of tuned configurations: clear JSON, one file a device and set of versions.

A file is written under a temporary name and renamed: who finds it finds it whole. Who writes holds the lock file beside
it from reading to renaming, so that two processes that tune at once both keep their results.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fxquant.cpu_kernels import cache_dir
from fxquant.cpu_kernels.build import BuildFailed
from fxquant.errors import NotAPlanFile, OtherDevice, TuningCacheWarning
from fxquant.target import Problem
from fxquant.tuning.plans.device import Device
from fxquant.tuning.plans.records import Entries, Entry, merged

FORMAT = 1


def plan_folder() -> Path:
    """Where the files lie: a folder of the user's own, beside the CPU kernels. Raises `BuildFailed` if it has none."""
    folder = cache_dir() / "plans"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


class PlanCache:
    """The file of one device in a folder; the user's own cache folder if none is given.

    Reading never raises: a file that cannot be used is one warning and no entries. What was read is kept until the file
    changes.
    """

    def __init__(self, device: Device, folder: Path | None = None) -> None:
        self.device = device
        self._folder = folder
        self.state: tuple[int, int, int] | None = None  # inode, time and size of the file that was read
        self.entries: Entries = {}  # that were in it

    @property
    def path(self) -> Path:
        """Raises `BuildFailed` where no folder can be had."""
        return (self._folder or plan_folder()) / self.device.file_name

    def read(self) -> Entries:
        """The entries of the file; none if there is no file, or none that can be used."""
        try:
            path = self.path
            status = path.stat()
        except FileNotFoundError:
            self.state, self.entries = None, {}
            return self.entries
        except (BuildFailed, OSError) as error:
            self.state, self.entries = None, {}
            self._warn("the cache folder", str(error))
            return self.entries
        seen = (status.st_ino, status.st_mtime_ns, status.st_size)
        if seen != self.state:
            self.entries = self._parsed(path)
            self.state = seen
        return self.entries

    def write(self, entries: Iterable[Entry]) -> Path:
        """Add entries to the file, over those of the same problems; returns its path.

        Raises `BuildFailed` or OSError if it cannot be written.
        """
        path = self.path
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            self.state = None  # another process may have written a moment ago
            kept = merged(self.read().values(), entries)
            write_json(path, document(self.device, kept.values()))
        return path

    def _parsed(self, path: Path) -> dict[Problem, Entry]:
        try:
            device, entries = read_document(path)
        except NotAPlanFile as error:
            self._warn(path, str(error))
            return {}
        if difference := self.device.difference(device):
            self._warn(path, f"they are of another device: {difference}")
            return {}
        return merged(entries)

    def _warn(self, where: object, reason: str) -> None:
        key = (str(where), reason)
        if key not in _WARNED:
            _WARNED.add(key)
            warnings.warn(TuningCacheWarning(where, reason.rstrip(".")), stacklevel=4)


_WARNED: set[tuple[str, str]] = set()


def document(device: Device, entries: Iterable[Entry]) -> dict[str, Any]:
    """What a file holds, for `write_json`."""
    ordered = sorted(entries, key=lambda entry: str(entry.problem))
    return {"format": FORMAT, "device": device.to_json(), "entries": [entry.to_json() for entry in ordered]}


def read_document(path: Path) -> tuple[Device, list[Entry]]:
    """Device and entries of a file. Raises `NotAPlanFile`."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise NotAPlanFile(path, "tuned plans", f"its format is {found['format']!r}, this version reads {FORMAT}")
        return Device.from_json(found["device"]), [Entry.from_json(fields) for fields in found["entries"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, NotAPlanFile):
            raise
        raise NotAPlanFile(path, "tuned plans", f"{type(error).__name__}: {error}") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write by renaming: whoever reads finds the old content or the new one. Each entry has a line of its own."""
    head = {key: value for key, value in content.items() if key != "entries"}
    lines = [json.dumps(entry, ensure_ascii=False) for entry in content["entries"]]
    listed = "[\n  " + ",\n  ".join(lines) + "\n ]" if lines else "[]"
    text = json.dumps({**head, "entries": []}, indent=1, ensure_ascii=False)
    replace_text(path, text.removesuffix("[]\n}") + listed + "\n}\n")


def replace_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, have it on the disk, and rename it. Raises OSError."""
    temporary = path.with_name(f".{path.name}-{os.getpid()}-{threading.get_ident()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone with this lock file among all processes of the machine."""
    import fcntl  # not on Windows, where fxquant has no kernels to tune

    with path.open("w", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file gives the lock back


def export_plans(cache: PlanCache, file: Path) -> int:
    """Write the device's plans to a file that another machine of its kind can import; returns how many."""
    entries = cache.read()
    write_json(file, document(cache.device, entries.values()))
    return len(entries)


def import_plans(cache: PlanCache, file: Path) -> int:
    """Add the plans of a file that `export_plans` wrote; returns how many it has.

    Raises `OtherDevice` if they were made on another kind of machine or with other versions, `NotAPlanFile`.
    """
    device, entries = read_document(file)
    if difference := cache.device.difference(device):
        raise OtherDevice(file, device, cache.device, difference)
    cache.write(entries)
    return len(entries)
