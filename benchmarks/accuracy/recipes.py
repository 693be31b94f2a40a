"""The rows of the tables: float, every preset, and the presets with other algorithms and granularities."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fxquant.spec import PRESETS

FLOAT = "float32"


@dataclass(frozen=True)
class Recipe:
    """A row: its name, the options of `fxquant.compile`, and the group that it belongs to in tables and plots.

    only: the name of the one model that it is for.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    family: str = "preset"
    only: str | None = None

    @property
    def needs_embeddings(self) -> bool:
        """True for a row that says nothing new of a model without embedding tables."""
        return "embeddings" in self.options


def family_of(name: str) -> str:
    """What a preset computes with: integers or floats, alone in the weights or in the activations too."""
    spec = PRESETS[name]
    weights = spec.weights
    assert weights is not None
    kind = "integer" if weights.format.kind == "int" else "float"
    return f"{kind} weights" if spec.activations is None else f"{kind} weights and activations"


def preset_recipes() -> tuple[Recipe, ...]:
    return tuple(Recipe(name, {"preset": name}, family_of(name)) for name in PRESETS)


# What `generate` is timed with, the output layer included. A language model's activations have outliers: as codes they
# need groups of their own, which small int4 weights are worth; int8 weights are multiplied with floats, in fixed point.
# Errors of the first layers go through all others, and those of the head straight into the guess: finer scales.
INT8_IN_GROUPS = "w=int8/group32/bf16"
INT8_BESIDE_INT4 = "w=int8/group32/bf16 x=int8/group16"
INT8_GENERATE: Mapping[str, Any] = {
    "preset": "int8wo",
    "rules": {"*layers.[0-2].*": INT8_IN_GROUPS, "*lm_head": INT8_IN_GROUPS},
    "exclude": (),
}
INT4_GENERATE: Mapping[str, Any] = {
    "weights": "int4/group32/affine/bf16",
    "activations": "int8/group16",
    "algorithm": "mse",
    "rules": {"*.self_attn.*": INT8_BESIDE_INT4, "*lm_head": INT8_BESIDE_INT4},
    "exclude": (),
}

EXTRA = (
    Recipe("int4 per channel", {"weights": "int4/channel"}, "other round-to-nearest"),
    Recipe("int4 g32 symmetric", {"weights": "int4/group32"}, "other round-to-nearest"),
    Recipe("int4 per channel, mse", {"weights": "int4/channel", "algorithm": "mse"}, "algorithm"),
    Recipe("int4wo, mse", {"preset": "int4wo", "algorithm": "mse"}, "algorithm"),
    Recipe("int4wo, hqq", {"preset": "int4wo", "algorithm": "hqq"}, "algorithm"),
    Recipe("int4wo-g32, mse", {"preset": "int4wo-g32", "algorithm": "mse"}, "algorithm"),
    Recipe("int4wo-g32, hqq", {"preset": "int4wo-g32", "algorithm": "hqq"}, "algorithm"),
    Recipe("int2wo, mse", {"preset": "int2wo", "algorithm": "mse"}, "algorithm"),
    Recipe("int2wo, hqq", {"preset": "int2wo", "algorithm": "hqq"}, "algorithm"),
    Recipe("int8wo, int8 embeddings", {"preset": "int8wo", "embeddings": "int8"}, "embeddings"),
    Recipe("int8wo, head too", {"preset": "int8wo", "exclude": ()}, "output layer too", "smollm2"),
    Recipe("int8dq, head too", {"preset": "int8dq", "exclude": ()}, "output layer too", "smollm2"),
    Recipe("int8wo, first layers and head in groups", INT8_GENERATE, "output layer too", "smollm2"),
    Recipe(
        "int8 in groups, head too",
        {"preset": "w=int8/group16/bf16 x=int8/group16", "exclude": ()},
        "output layer too",
        "smollm2",
    ),
    Recipe("int4 in groups, int8 attention and head", INT4_GENERATE, "output layer too", "smollm2"),
)


def all_recipes() -> tuple[Recipe, ...]:
    return (*preset_recipes(), *EXTRA)
