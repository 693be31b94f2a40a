"""Turn-taking and medians, on a clock of our own."""

from __future__ import annotations

from demo.timing import Timing, alternate


def test_functions_take_turns_and_the_warm_up_is_not_counted() -> None:
    calls: list[str] = []
    now = [0.0]

    def costing(name: str, seconds: list[float]):
        def call() -> None:
            calls.append(name)
            now[0] += seconds.pop(0)

        return call

    turns: list[str] = []
    taken = alternate(
        {"a": costing("a", [50, 1, 2, 9]), "b": costing("b", [70, 4, 4, 4])},
        rounds=3,
        warmup=1,
        advance=lambda: turns.append("turn"),
        clock=lambda: now[0],
    )
    assert "".join(calls) == "abababab"
    assert taken["a"] == Timing((1.0, 2.0, 9.0))
    assert taken["a"].median == 2
    assert taken["b"].median == 4
    assert taken["b"].spread == 0
    assert len(turns) == 4


def test_the_spread_of_a_single_turn_is_zero() -> None:
    assert Timing((3.0,)).spread == 0.0
    assert Timing((1.0, 2.0, 3.0, 4.0, 5.0)).spread == 3.0  # quartiles 1.5 and 4.5
