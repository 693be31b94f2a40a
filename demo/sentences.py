"""Real sentence pairs for the retrieval task: an example sentence, and the meaning of the word it is an example of.

The pairs come from WordNet (Debian's package wordnet-base, fetched without root and kept in a cache). Where no Debian
archive can be reached they are made from the docstrings of Python's own library: first sentence, then the rest.
"""

from __future__ import annotations

import ast
import json
import logging
import os
import random
import re
import shutil
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from demo.debian import Unreachable, unpacked

log = logging.getLogger(__name__)

DATA_FILES = ("data.noun", "data.verb", "data.adj", "data.adv")
PACKAGE = "wordnet-base"


@dataclass(frozen=True)
class Pair:
    """A query and the one document that it should find."""

    query: str
    document: str


@dataclass(frozen=True)
class PairSet:
    """The pairs of a task and, in words, where they come from."""

    source: str
    pairs: tuple[Pair, ...]


WordNetUnreachable = Unreachable


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/fxquant-demo``, by default below ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fxquant-demo"


def load_pairs(count: int = 1000, *, seed: int = 0, cache: Path | None = None) -> PairSet:
    """`count` pairs with different documents, the same ones for the same `seed`; from the cache if it has them."""
    cache = cache or default_cache()
    kept = cache / f"pairs-{count}-{seed}.json"
    if (found := read_pairs(kept)) is not None:
        return found
    try:
        source, every = "WordNet 3.0, example sentence -> gloss", list(wordnet_pairs(wordnet_folder(cache)))
    except WordNetUnreachable as error:
        # Not kept: the next run asks again, since the two tasks have different scores.
        log.warning("%s; using the docstrings of Python's library instead", error)
        every = list(docstring_pairs(Path(sysconfig.get_path("stdlib"))))
        return PairSet("docstrings of Python's library, first sentence -> the rest", choose(every, count, seed))
    chosen = PairSet(source, choose(every, count, seed))
    write_pairs(kept, chosen)
    return chosen


def choose(pairs: Iterable[Pair], count: int, seed: int) -> tuple[Pair, ...]:
    """`count` of the pairs (all, if there are fewer), one per document, so that each query has one right answer."""
    by_document = {pair.document: pair for pair in pairs}
    distinct = sorted(by_document.values(), key=lambda pair: (pair.document, pair.query))
    random.Random(seed).shuffle(distinct)
    return tuple(distinct[:count])


# ---- WordNet


def wordnet_pairs(folder: Path) -> Iterator[Pair]:
    """All (example, gloss) pairs of the database files in `folder`."""
    for name in DATA_FILES:
        with (folder / name).open(encoding="utf-8") as lines:
            yield from (pair for line in lines if (pair := parse_line(line)) is not None)


def parse_line(line: str) -> Pair | None:
    """The pair of one synset line of a WordNet data file; None for the licence header and synsets without an example.

    A line ends in ``| definition; definition; "example"; "example"``. Examples of under four words are left out: they
    are phrases, not sentences.
    """
    if line.startswith("  ") or "|" not in line:
        return None
    text = line.split("|", 1)[1].strip()
    definition, quote, rest = text.partition('"')
    gloss = definition.strip().rstrip(";:,").strip()
    example = rest.partition('"')[0].strip()
    if not gloss or not quote or len(example.split()) < 4:
        return None
    return Pair(example, gloss)


def wordnet_folder(cache: Path) -> Path:
    """A folder with WordNet's data files: the system's, the cache's, or fetched from Debian into the cache."""
    for folder in (Path("/usr/share/wordnet"), cache / "wordnet"):
        if all((folder / name).is_file() for name in DATA_FILES):
            return folder
    return fetch_wordnet(cache)


def fetch_wordnet(cache: Path) -> Path:
    """Download Debian's package and unpack its data files into ``cache/wordnet``, as one rename. Needs no root."""
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as name:
        work = Path(name)
        root = unpacked(PACKAGE, "WordNet", work)
        ready = work / "wordnet"
        ready.mkdir()
        for file in DATA_FILES:
            shutil.copy(root / "usr" / "share" / "wordnet" / file, ready / file)
        try:
            ready.rename(cache / "wordnet")
        except OSError as error:  # another process was quicker: its files are the same
            if not (cache / "wordnet").is_dir():
                raise WordNetUnreachable(f"WordNet cannot be kept in {cache}: {error}") from error
    return cache / "wordnet"


# ---- docstrings, when no archive can be reached


def docstring_pairs(folder: Path) -> Iterator[Pair]:
    """(first sentence, next paragraph) of the docstrings in the Python files right in `folder`."""
    for file in sorted(folder.glob("*.py")):
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
                pair = parse_docstring(ast.get_docstring(node) or "")
                if pair is not None:
                    yield pair


def parse_docstring(text: str) -> Pair | None:
    """First line and the paragraph after it; None if either has fewer than four words."""
    first, _, rest = text.partition("\n\n")
    query, document = " ".join(first.split()), " ".join(re.split(r"\n\s*\n", rest)[0].split())
    if len(query.split()) < 4 or len(document.split()) < 4:
        return None
    return Pair(query, document)


# ---- the cache


def read_pairs(path: Path) -> PairSet | None:
    """The set kept in `path`; None if there is none, or (with a warning) if it cannot be read."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return PairSet(kept["source"], tuple(Pair(**pair) for pair in kept["pairs"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("the cache file %s cannot be read (%s): making it anew", path, error)
        return None


def write_pairs(path: Path, pairs: PairSet) -> None:
    """Keep the set, so that a reader sees either the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump({"source": pairs.source, "pairs": [asdict(pair) for pair in pairs.pairs]}, file)
    os.replace(name, path)
