"""A save that is killed, or runs out of room, leaves the old folder or the new one, whole."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import fxquant
from fxquant.checkpoint import folders
from fxquant.errors import SaveFailed
from tests.checkpoint.folders import answer, contents, small
from tests.models import Decoder


def outcomes(place: Path, *arguments: str) -> list[tuple[str, str, int]]:
    command = [sys.executable, "-m", "tests.checkpoint.killed", str(place), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [tuple(outcome) for outcome in json.loads(done.stdout)]


@pytest.mark.parametrize("step", ["exchange", pytest.param("two-steps", marks=pytest.mark.slow)])
def test_killed_before_any_call_the_folder_is_old_or_new(step: str, tmp_path: Path) -> None:
    ended = outcomes(tmp_path, "calls", step)
    assert {found for _, found, _ in ended} == {"old", "new"}
    counted = Counter((how, found) for how, found, _ in ended)
    assert counted["killed", "old"] > 15
    assert counted["killed", "new"] > 3
    assert ended[-1][:2] == ("saved", "new")  # so a save has been killed at each of its calls
    assert any(hidden for _, _, hidden in ended)  # which the next save has removed, or `killed` had failed


@pytest.mark.slow
@pytest.mark.parametrize("step", ["exchange", "two-steps"])
def test_killed_at_random_times_the_folder_is_old_or_new(step: str, tmp_path: Path) -> None:
    ended = outcomes(tmp_path, "times", step)
    assert {found for _, found, _ in ended} <= {"old", "new"}
    assert sum(how == "killed" for how, _, _ in ended) > 10


def test_files_that_may_not_grow_are_a_clean_error(tmp_path: Path) -> None:
    assert outcomes(tmp_path, "limits", "exchange") == [("SaveFailed", "old", 0)] * 4


@pytest.mark.parametrize("name", ["open", "pwrite", "fsync", "mkdir", "link"])
def test_a_full_disk_is_a_clean_error_and_the_old_folder_whole(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small()
    fxquant.save(model, tmp_path / "q")
    (tmp_path / "q/notes.txt").write_text("mine")
    before = contents(tmp_path / "q")
    real = getattr(os, name)

    def full(*args: object, **options: object) -> object:
        if name == "open" and "safetensors" not in str(args[0]):
            return real(*args, **options)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, name, full)
        if name == "link":  # where there are no hard links, files are copied
            patched.setattr(shutil, "copy2", full)
        with pytest.raises(SaveFailed, match=r"No space left.*as it was") as caught:
            fxquant.save(small("int4wo"), tmp_path / "q")
    assert isinstance(caught.value, OSError)
    assert contents(tmp_path / "q") == before
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_without_hard_links_other_files_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    fxquant.save(small(), tmp_path / "q")
    (tmp_path / "q/notes.txt").write_text("mine")
    monkeypatch.setattr(os, "link", refused)
    fxquant.save(small("int4wo"), tmp_path / "q")
    assert (tmp_path / "q/notes.txt").read_text() == "mine"


def test_a_save_that_another_process_has_under_way_is_left_alone(tmp_path: Path) -> None:
    with folders.replaced(tmp_path / "q", lambda _: True) as other:
        (other / "half").write_text("a")
        fxquant.save(small(), tmp_path / "q")
        assert (other / "half").exists()
    assert set(contents(tmp_path / "q")) == {"half"}  # the last to end counts


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    model = small()
    fxquant.save(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert torch.equal(answer(fxquant.load(tmp_path / "real", factory=Decoder)), answer(model))


def test_a_folder_that_cannot_be_replaced_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SaveFailed, match="it is a file"):
        fxquant.save(small(), tmp_path / "file")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SaveFailed, match="working directory"):
        fxquant.save(small(), ".")
    assert contents(tmp_path) == {"file": b"mine"}


def test_the_new_folder_has_the_rights_of_the_old(tmp_path: Path) -> None:
    fxquant.save(small(), tmp_path / "q")
    (tmp_path / "q").chmod(0o750)
    fxquant.save(small(), tmp_path / "q")
    assert (tmp_path / "q").stat().st_mode & 0o777 == 0o750
