"""Loops of machine code: which is hot, and what belongs to it."""

from __future__ import annotations

from fxquant.tuning.facts.loops import Instruction, hot_loop, innermost


def code(*lines: str) -> list[Instruction]:
    """Lines such as 'top: load', 'jump top' or 'maybe top': an unconditional and a conditional jump."""
    made = []
    for line in lines:
        label, _, text = line.rpartition(": ")
        name, _, target = text.partition(" ")
        made.append(Instruction((label,) if label else (), name, "", (target,) if target else (), name != "jump"))
    return made


def names(body: tuple[Instruction, ...]) -> list[str]:
    return [instruction.name for instruction in body]


def hot(*lines: str) -> tuple[list[str], bool]:
    body, is_loop = hot_loop(code(*lines), lambda i: i.name == "mma", lambda i: i.name == "load")
    return names(body), is_loop


def test_prologue_and_epilogue_do_not_count() -> None:
    assert hot("load", "load", "top: load", "mma", "maybe top", "mma", "store") == (["load", "mma", "maybe"], True)


def test_the_loop_with_matrix_instructions_wins_over_one_with_more_loads() -> None:
    body, _ = hot("a: load", "load", "load", "maybe a", "b: mma", "load", "maybe b")
    assert body == ["mma", "load", "maybe"]


def test_without_matrix_instructions_the_loop_with_most_loads() -> None:
    body, is_loop = hot("a: add", "load", "maybe a", "b: load", "load", "maybe b")
    assert body == ["load", "load", "maybe"]
    assert is_loop


def test_no_loop_is_the_whole_function() -> None:
    assert hot("load", "mma", "store") == (["load", "mma", "store"], False)


def test_matrix_instructions_outside_all_loops_make_no_loop_hot() -> None:
    assert hot("a: load", "maybe a", "mma") == (["load", "maybe", "mma"], False)


def test_an_inner_loop_is_no_part_of_the_outer_ones_own_code() -> None:
    inner = ["in: mma", *["add"] * 8, "maybe in"]
    body, _ = hot("out: load", *inner, "store", "maybe out")
    assert body == ["mma", *["add"] * 8, "maybe"]


def test_a_loop_that_only_polls_stays_in_the_loop_around_it() -> None:
    body, _ = hot("top: mma", "poll: try", "maybe poll", "load", "maybe top")
    assert body == ["mma", "try", "maybe", "load", "maybe"]


def test_a_block_behind_the_end_that_jumps_back_belongs_to_the_loop() -> None:
    body, _ = hot("top: mma", "maybe far", "back: load", "maybe top", "jump end", "far: wait", "jump back", "end: exit")
    assert body == ["mma", "maybe", "load", "maybe", "wait", "jump"]


def test_code_that_nothing_reaches_is_no_loop() -> None:
    assert hot("mma", "jump end", "dead: load", "jump dead", "end: exit") == (
        ["mma", "jump", "load", "jump", "exit"],
        False,
    )


def test_no_code_has_no_loops() -> None:
    assert innermost([]) == []
