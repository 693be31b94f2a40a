"""What joining two weights along their rows does to their codes, by format."""

from __future__ import annotations

import torch
from torch.fx import Node

from fxquant.annotation import note_of
from fxquant.spec import LinearSpec

CAT = torch.ops.aten.cat.default
JOINED_BY = "fuse-siblings"
# Algorithms that look at one granule at a time: rows know nothing of each other.
_BY_GRANULE = ("auto", "absmax", "minmax")


def quantized_by_parts(spec: LinearSpec) -> bool:
    """Whether a joined weight has the codes of its parts only if each part is quantized by itself."""
    return spec.weights is not None and (spec.weights.depends_on_whole or spec.algorithm not in _BY_GRANULE)


def why_no_joined_scale(spec: LinearSpec, rows: list[int]) -> str:
    """Why the scales of weights with so many rows cannot be one tensor; empty if they can."""
    if spec.weights is None:
        return ""
    granularity = spec.weights.granularity
    if granularity.kind == "channel" and granularity.axis not in (0, -2):
        return "one scale for each input feature of a whole weight: joined weights would need one for each part"
    if granularity.kind == "block" and any(n % granularity.rows for n in rows[:-1]):
        return f"blocks of {granularity.rows} rows would hold rows of two weights"
    return ""


def parts_of(weight: Node) -> tuple[Node, ...]:
    """The weights that fuse-siblings joined to this one; empty if it did not."""
    if weight.target is not CAT or JOINED_BY not in note_of(weight).made_by:
        return ()
    return tuple(weight.args[0])  # pyright: ignore[reportArgumentType]
