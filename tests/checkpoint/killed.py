"""Saves in processes that are killed, one after the other; run as a program by `test_atomic.py`.

    python -m tests.checkpoint.killed FOLDER calls|times|limits exchange|two-steps

calls: SIGKILL before each call, in turn, that makes or changes a file. times: at random times. limits: no file may grow
beyond so many bytes. Prints JSON: for each save how it ended, and what the folder held then.
"""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import fxquant
from fxquant.checkpoint import folders
from fxquant.errors import SaveFailed
from tests.checkpoint.folders import contents, small
from tests.models import Decoder

CHANGING = [(os, name) for name in ("open", "pwrite", "fsync", "mkdir", "rename", "link", "unlink", "rmdir")]


def main(place: Path, how: str, step: str) -> None:
    torch.set_num_threads(1)
    old, new, folder = small("int8dq", layers=1), small("int4wo", layers=1), place / "model"
    fxquant.save(old, folder, max_shard_size="30KB")
    (folder / "notes.txt").write_text("mine")
    wanted = {"old": contents(folder)}
    fxquant.save(new, folder, max_shard_size="30KB")
    wanted["new"] = contents(folder)
    if step == "two-steps":
        folders._exchange = _no_exchange
    outcomes = []
    for act in _acts(how):
        fxquant.save(old, folder, max_shard_size="30KB")
        assert contents(folder) == wanted["old"]
        assert [path.name for path in place.iterdir()] == ["model"], "leftovers"
        ended = _in_a_child(act, lambda: fxquant.save(new, folder, max_shard_size="30KB"))
        hidden = len(list(place.iterdir())) - 1
        if not folder.exists():  # a load puts it back
            fxquant.load(folder, factory=lambda: Decoder(layers=1))
        found = contents(folder)
        outcomes.append([ended, next((name for name in wanted if wanted[name] == found), "broken"), hidden])
        if how == "calls" and ended == "saved":
            break
    fxquant.save(new, folder, max_shard_size="30KB")
    assert [path.name for path in place.iterdir()] == ["model"], "leftovers"
    print(json.dumps(outcomes))


def _acts(how: str) -> list[Callable[[], None]]:
    if how == "calls":
        return [lambda nth=nth: _kill_at(nth) for nth in range(1, 300)]
    if how == "times":
        random.seed(0)
        return [partial(_kill_after, random.uniform(0, 0.06)) for _ in range(60)]
    return [
        lambda most=most: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)) for most in (0, 100, 5000, 25_000)
    ]


def _in_a_child(act: Callable[[], None], save: Callable[[], None]) -> str:
    child = os.fork()
    if not child:
        code = 1
        try:
            act()
            save()
            code = 0
        except SaveFailed:
            code = 2
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return "killed"
    return {0: "saved", 2: "SaveFailed"}.get(os.WEXITSTATUS(status), "raised")


def _kill_at(nth: int) -> None:
    """Kill this process in the place of the nth call that would change a file."""
    left = [nth]

    def counted(function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **options: object) -> object:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return call

    for module, name in [*CHANGING, (folders, "_exchange"), (shutil, "rmtree")]:
        setattr(module, name, counted(getattr(module, name)))


def _kill_after(seconds: float) -> None:
    """A process that kills this one after a time."""
    victim = os.getpid()
    if not os.fork():
        time.sleep(seconds)
        os.kill(victim, signal.SIGKILL)
        os._exit(0)


def _no_exchange(one: Path, other: Path) -> None:
    raise OSError(errno.ENOSYS, "no exchange here")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
