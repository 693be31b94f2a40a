"""Notes, and how several module paths are said in one word."""

from __future__ import annotations

import dataclasses

import pytest
from torch.fx import Graph

from fxquant.annotation import Note, PassResult, amend_note, joined_path, note_of, write_note
from fxquant.spec import PRESETS


@pytest.mark.parametrize(
    ("paths", "word"),
    [
        ((), ""),
        (("a.b",), "a.b"),
        (("a.q_proj", "a.k_proj", "a.v_proj"), "a.{q,k,v}_proj"),
        (("m.gate_proj", "m.up_proj"), "m.{gate,up}_proj"),
        (("l.0.q", "l.1.q"), "l.{0,1}.q"),
        (("l.0.q", "l.1.k"), "l.{0,1}.{q,k}"),
        (("a.w1", "a.w3"), "a.w{1,3}"),
        (("a", "b"), "{a,b}"),
        (("a", "a"), "a"),
        (("a", "ba"), "{,b}a"),
        (("a.b", "c"), "{a.b,c}"),
        (("to_q", "to_k"), "to_{q,k}"),
    ],
)
def test_paths_are_folded_where_they_differ(paths: tuple[str, ...], word: str) -> None:
    assert joined_path(paths) == word
    assert Note(paths).path == word


def test_a_node_without_a_note_has_an_empty_one() -> None:
    node = Graph().placeholder("x")
    assert note_of(node) == Note()
    amend_note(node, reason="because")
    assert note_of(node) == Note(reason="because")


def test_amending_keeps_the_rest() -> None:
    node = Graph().placeholder("x")
    note = Note(("a",), PRESETS["int8dq"], "default", ("capture",), "", "model.py:3")
    write_note(node, note)
    amend_note(node, kernel="int8_linear")
    assert note_of(node) == dataclasses.replace(note, kernel="int8_linear")
    assert note.kernel == ""
    with pytest.raises(TypeError, match="kernels"):
        amend_note(node, kernels="misspelt")


def test_results_do_not_share_their_lists() -> None:
    assert PassResult().declined is not PassResult().declined
