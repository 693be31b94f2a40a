"""What passes write down: a Note on each site, a PassResult for each pass, a reason for each thing left alone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch.fx import Node

if TYPE_CHECKING:
    from fxquant.spec import LinearSpec

META_KEY = "fxquant"


@dataclass(frozen=True)
class Note:
    """The story of one node: where it comes from, what was decided for it, who made it.

    ``paths`` are module paths of the site (several after siblings were joined), ``spec`` is what
    annotate decided (None: stays float, ``reason`` says why), ``made_by`` lists the passes that made the
    node, oldest first, ``kernel`` is the kernel that lowering chose, ``source`` is ``file.py:line``.
    """

    paths: tuple[str, ...] = ()
    spec: LinearSpec | None = None
    reason: str = ""
    made_by: tuple[str, ...] = ()
    kernel: str = ""
    source: str = ""

    @property
    def path(self) -> str:
        """The paths as one word: ``layers.0.attn.{q,k,v}_proj`` for joined siblings."""
        return joined_path(self.paths)


def note_of(node: Node) -> Note:
    """The note of a node; an empty one if nobody wrote any."""
    return node.meta.get(META_KEY, Note())


def write_note(node: Node, note: Note) -> None:
    node.meta[META_KEY] = note


def amend_note(node: Node, **changes: object) -> None:
    """Replace some fields of the node's note."""
    node.meta[META_KEY] = replace(note_of(node), **changes)


@dataclass(frozen=True)
class Declined:
    """A candidate that a pass left alone: where, why, and at which node."""

    where: str
    reason: str
    node: str = ""


@dataclass
class PassResult:
    """What one pass did: how many places it changed, and each candidate that it left."""

    changed: int = 0
    declined: list[Declined] = field(default_factory=list)


def joined_path(paths: tuple[str, ...]) -> str:
    """Fold paths that differ in one component: ``a.q_proj``, ``a.k_proj`` become ``a.{q,k}_proj``."""
    if len(paths) <= 1:
        return "".join(paths)
    parts = [path.split(".") for path in paths]
    if len({len(p) for p in parts}) > 1:
        return "{" + ",".join(paths) + "}"
    folded = []
    for column in zip(*parts, strict=True):
        distinct = list(dict.fromkeys(column))
        folded.append(distinct[0] if len(distinct) == 1 else _fold_words(distinct))
    return ".".join(folded)


def _fold_words(words: list[str]) -> str:
    suffix = _common_suffix(words)
    prefix = _common_suffix([w[: len(w) - len(suffix)][::-1] for w in words])[::-1]
    middles = [w[len(prefix) : len(w) - len(suffix)] for w in words]
    return prefix + "{" + ",".join(middles) + "}" + suffix


def _common_suffix(words: list[str]) -> str:
    shortest = min(len(w) for w in words)
    length = 0
    while length < shortest and len({w[-length - 1] for w in words}) == 1:
        length += 1
    return words[0][len(words[0]) - length :]
