"""The demo's sentence pairs: parsing, choosing, the cache, and what happens when nothing can be reached."""

from __future__ import annotations

import logging
import subprocess
from pathlib import Path

import pytest

from demo import debian, sentences
from demo.sentences import Pair, PairSet, WordNetUnreachable

NOUN = (
    '00002684 03 n 01 object 0 002 @ 00001930 n 0000 + 00532607 v 0105 | a tangible entity; "it was full of balls"  \n'
)


def data_folder(folder: Path, *lines: str) -> Path:
    folder.mkdir(parents=True)
    for name in sentences.DATA_FILES:
        (folder / name).write_text("  1 This software and database is being provided to you\n")
    (folder / "data.noun").write_text("".join(lines))
    return folder


@pytest.mark.parametrize(
    ("line", "pair"),
    [
        (NOUN, Pair("it was full of balls", "a tangible entity")),
        # the first of two examples; the definition keeps its inner semicolon
        (
            '1 v 01 x 0 000 | draw air in, and out of; the lungs; "I can breathe better now"; "The patient is"\n',
            Pair("I can breathe better now", "draw air in, and out of; the lungs"),
        ),
        ("1 03 n 01 x 0 000 | a definition without an example  \n", None),
        ('1 03 n 01 x 0 000 | short; "three words only"\n', None),
        ('1 03 n 01 x 0 000 | "an example without any definition"\n', None),
        ("  1 This software and database | is a licence header\n", None),
        ("no bar at all\n", None),
    ],
)
def test_parses_a_line_of_wordnet(line: str, pair: Pair | None) -> None:
    assert sentences.parse_line(line) == pair


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        (
            "Return the first\nline of text.\n\nIt says a bit\nmore here.\n\nNot this.",
            ("Return the first line of text.", "It says a bit more here."),
        ),
        ("Return the first line of text.", None),
        ("Too short.\n\nBut this part is long enough.", None),
        ("", None),
    ],
)
def test_parses_a_docstring(text: str, pair: tuple[str, str] | None) -> None:
    assert sentences.parse_docstring(text) == (Pair(*pair) if pair else None)


def test_choosing_takes_each_document_once_and_depends_on_the_seed_only() -> None:
    pairs = [Pair(f"q{i}", f"d{i % 40}") for i in range(80)]
    chosen = sentences.choose(pairs, 30, seed=1)
    assert len({pair.document for pair in chosen}) == len(chosen) == 30
    assert chosen == sentences.choose(reversed(pairs[40:]), 30, seed=1)  # neither order nor duplicates count
    assert chosen != sentences.choose(pairs, 30, seed=2)
    assert len(sentences.choose(pairs, 1000, seed=1)) == 40


def test_pairs_come_from_the_cache_the_second_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = data_folder(tmp_path / "elsewhere", NOUN)
    monkeypatch.setattr(sentences, "wordnet_folder", lambda cache: folder)
    first = sentences.load_pairs(5, cache=tmp_path / "cache")
    assert first.pairs == (Pair("it was full of balls", "a tangible entity"),)
    assert "WordNet" in first.source

    def unreachable(cache: Path) -> Path:
        raise WordNetUnreachable("asked although the pairs are kept")

    monkeypatch.setattr(sentences, "wordnet_folder", unreachable)
    assert sentences.load_pairs(5, cache=tmp_path / "cache") == first


def test_a_broken_cache_file_is_named_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = data_folder(tmp_path / "wordnet", NOUN)
    monkeypatch.setattr(sentences, "wordnet_folder", lambda cache: folder)
    kept = tmp_path / "pairs-5-0.json"
    kept.write_text('{"source": "cut of')
    with caplog.at_level(logging.WARNING):
        found = sentences.load_pairs(5, cache=tmp_path)
    assert str(kept) in caplog.text
    assert sentences.read_pairs(kept) == found
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []  # no temporary file stays


def test_without_wordnet_the_docstrings_serve_and_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unreachable(cache: Path) -> Path:
        raise WordNetUnreachable("no archive")

    monkeypatch.setattr(sentences, "wordnet_folder", unreachable)
    with caplog.at_level(logging.WARNING):
        found = sentences.load_pairs(50, cache=tmp_path)
    assert len(found.pairs) == 50
    assert "docstrings" in found.source
    assert "no archive" in caplog.text
    assert not any(tmp_path.iterdir())


def test_a_failed_fetch_says_why_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], **kwargs: object) -> None:
        raise subprocess.CalledProcessError(100, command, stderr="W: x\nE: Unable to locate package wordnet-base\n")

    monkeypatch.setattr(debian.shutil, "which", lambda tool: f"/usr/bin/{tool}")
    monkeypatch.setattr(debian.subprocess, "run", fail)
    with pytest.raises(WordNetUnreachable, match=r"apt-get.*Unable to locate package"):
        sentences.fetch_wordnet(tmp_path)
    assert not any(tmp_path.iterdir())


def test_no_debian_tools_is_a_named_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian.shutil, "which", lambda tool: None)
    with pytest.raises(WordNetUnreachable, match="no apt-get or dpkg-deb"):
        sentences.fetch_wordnet(tmp_path)


def test_a_fetch_falls_back_on_lists_of_its_own_and_keeps_the_data_files_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], cwd: Path, **kwargs: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if command[0] == "dpkg-deb":
            data_folder(Path(command[3]) / "usr" / "share" / "wordnet", NOUN)
            (Path(command[3]) / "usr" / "share" / "wordnet" / "index.noun").write_text("not needed")
        elif command[-2:] == ["download", sentences.PACKAGE]:
            if "-o" not in command:  # the system's own lists are empty
                raise subprocess.CalledProcessError(100, command, stderr="E: Unable to locate package")
            (cwd / f"{sentences.PACKAGE}_1_all.deb").touch()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(debian.shutil, "which", lambda tool: f"/usr/bin/{tool}")
    monkeypatch.setattr(debian.subprocess, "run", run)
    folder = sentences.fetch_wordnet(tmp_path)
    assert [command[0] for command in commands] == ["apt-get", "apt-get", "apt-get", "dpkg-deb"]
    assert "update" in commands[1]
    assert sorted(path.name for path in folder.iterdir()) == sorted(sentences.DATA_FILES)
    assert list(tmp_path.iterdir()) == [folder]
    assert list(sentences.wordnet_pairs(folder)) == [Pair("it was full of balls", "a tangible entity")]


def test_a_set_survives_writing_and_reading(tmp_path: Path) -> None:
    pairs = PairSet("here", (Pair("naïve — question", "answer"), Pair("a", "b")))
    sentences.write_pairs(tmp_path / "below" / "pairs.json", pairs)
    assert sentences.read_pairs(tmp_path / "below" / "pairs.json") == pairs
    assert sentences.read_pairs(tmp_path / "absent.json") is None
