"""What the runner does at every call: it tells parameter sets apart, and puts a call's arguments together."""

from __future__ import annotations

import struct

import pytest

from fxquant.runner import _identities, _taker


@pytest.mark.parametrize("count", [0, 1, 2, 300])
def test_identities_are_the_ids_of_the_objects(count: int) -> None:
    objects = tuple(object() for _ in range(count))
    assert _identities(objects) == struct.pack(f"{count}P", *map(id, objects))


@pytest.mark.parametrize("positions", [[], [2], [2, 0], [0, 0, 1]])
def test_a_taker_gives_a_tuple_of_what_stands_at_the_positions(positions: list[int]) -> None:
    assert _taker(positions)("abc") == tuple("abc"[p] for p in positions)
