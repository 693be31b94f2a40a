"""A folder replaced as a whole: whoever looks at it, or kills the process, finds the old one or the new one."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from fxquant.errors import SaveFailed

try:
    import fcntl
except ImportError:  # pragma: no cover  (Windows)
    fcntl = None

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
# What a file system says that cannot exchange two names.
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)


@contextlib.contextmanager
def replaced(folder: str | os.PathLike[str], is_ours: Callable[[str], bool]) -> Iterator[Path]:
    """Gives an empty folder to write to; when the block ends well, it takes the place of `folder`, made if need be.

    Files of the old folder that are not `is_ours` (by name) are in the new one too, by hard links where there are. When
    the block raises, nothing has changed. The new folder's files and names are on the disk before it is put in place;
    one step (RENAME_EXCHANGE) exchanges the two where the system can, else the old one is moved away first, and
    `recover` moves it back after a kill between. What killed processes left beside the folder is removed.

    Raises:
        SaveFailed: the folder cannot be written, or cannot be replaced.
    """
    target = Path(os.path.realpath(folder))
    with _named(target):
        _check(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.parent):
            _clean(target)
            fresh = target.with_name(f"{_prefix(target)}{secrets.token_hex(8)}")
            fresh.mkdir()
            hold = _lock(fresh, wait=False)
    try:
        with _named(target):
            yield fresh
            _finish(target, fresh, is_ours)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)  # by now the old folder, if all went well
        if hold is not None:
            os.close(hold)


def recover(folder: str | os.PathLike[str]) -> None:
    """Put back a folder that a process was replacing, in two steps, when it was killed between them."""
    target = Path(os.path.realpath(folder))
    if not target.exists() and _old(target).is_dir():
        with contextlib.suppress(OSError):
            _old(target).rename(target)


def sync(path: Path) -> None:
    """Wait until the file, or the names in the folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _finish(target: Path, fresh: Path, is_ours: Callable[[str], bool]) -> None:
    if target.is_dir():
        for path in list(target.iterdir()):
            if not is_ours(path.name):
                _take_along(path, fresh / path.name)
        shutil.copymode(target, fresh)
    sync(fresh)
    with _locked(target.parent):
        _put_in_place(fresh, target)
        sync(target.parent)


def _put_in_place(fresh: Path, target: Path) -> None:
    if not target.exists():
        fresh.rename(target)
        return
    try:
        _exchange(fresh, target)
    except OSError as error:
        if error.errno not in _NO_EXCHANGE:
            raise
        target.rename(_old(target))
        fresh.rename(target)
        shutil.rmtree(_old(target), ignore_errors=True)


def _exchange(one: Path, other: Path) -> None:
    """Exchange two names in one step."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if renameat2 is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(other))


def _take_along(old: Path, new: Path) -> None:
    if old.is_dir() and not old.is_symlink():
        new.mkdir()
        for path in list(old.iterdir()):
            _take_along(path, new / path.name)
        shutil.copystat(old, new)
        return
    try:
        os.link(old, new, follow_symlinks=False)
    except (OSError, NotImplementedError):  # no hard links here
        shutil.copy2(old, new, follow_symlinks=False)
        if not new.is_symlink():
            sync(new)


def _check(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise SaveFailed(target, "it is a file, and a folder is needed")
    here = Path.cwd()
    if target == here or target in here.parents:
        raise SaveFailed(target, "it is the working directory, or above it, and saving replaces the whole folder")


def _clean(target: Path) -> None:
    """Remove what killed processes left; who still writes holds a lock."""
    recover(target)
    shutil.rmtree(_old(target), ignore_errors=True)
    for leftover in list(target.parent.iterdir()):
        if leftover.name.startswith(_prefix(target)) and (hold := _lock(leftover, wait=False)) is not None:
            shutil.rmtree(leftover, ignore_errors=True)
            os.close(hold)


def _prefix(target: Path) -> str:
    return f".{target.name}.fxquant-new-"


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.fxquant-old")


def _lock(folder: Path, *, wait: bool) -> int | None:
    """An open descriptor that holds the folder's lock; None if another process does, or where there are no locks."""
    if fcntl is None:
        return None
    descriptor = -1
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        if descriptor >= 0:
            os.close(descriptor)
        return None
    return descriptor


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time makes, removes and exchanges folders in this one."""
    hold = _lock(folder, wait=True)
    try:
        yield
    finally:
        if hold is not None:
            os.close(hold)


@contextlib.contextmanager
def _named(target: Path) -> Iterator[None]:
    try:
        yield
    except SaveFailed:
        raise
    except OSError as error:
        raise SaveFailed(target, error.strerror or str(error)) from error
