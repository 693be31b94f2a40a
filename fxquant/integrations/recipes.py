"""What FxQuantConfig holds, whichever library's config it is: a recipe, and what a saved model says of its modules."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fxquant.errors import InvalidOption
from fxquant.integrations.module_tables import ModuleTable
from fxquant.spec import ConfigLike, NumberFormat, QuantConfig, TensorSpec, resolve_config

METHOD = "fxquant"


class Method(str, Enum):
    """The name by which libraries know this method: a text to transformers, of an Enum to diffusers."""

    FXQUANT = METHOD


FORMAT = 1
FIELDS = (
    "preset", "weights", "activations", "embeddings", "group_size", "algorithm", "include", "exclude", "rules",
)  # fmt: skip


class Recipe:
    """A recipe as the config of a model that is loaded. The mixin of each library's own class of configs.

    recipe  what modules get, a `QuantConfig`.
    table   how each module of a saved model is quantized; None until the model is saved.
    """

    recipe: QuantConfig
    table: ModuleTable | None

    def __init__(
        self,
        preset: ConfigLike = None,
        weights: str | NumberFormat | TensorSpec | None = None,
        activations: str | NumberFormat | TensorSpec | None = None,
        embeddings: str | NumberFormat | TensorSpec | None = None,
        group_size: int | None = None,
        algorithm: str | None = None,
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
        rules: Any = None,
        saved: Mapping[str, Any] | None = None,
        **told: Any,
    ) -> None:
        """preset: a preset's name ('int4wo'), a `QuantConfig`, a format; the others are `QuantConfig`'s, over it.

        saved: what the file of a saved model holds of its modules.

        Raises:
            InvalidOption, UnknownFormat, UnknownPreset, ...: the recipe does not make sense.
            InvalidQuantizationMap: `saved` does not.
        """
        given = {"weights": weights, "activations": activations, "embeddings": embeddings, "group_size": group_size}
        given |= {"algorithm": algorithm, "include": include, "exclude": exclude, "rules": rules}
        self._check(told)
        self.recipe = resolve_config(preset, {name: value for name, value in given.items() if value is not None})
        self.table = None if saved is None else ModuleTable.from_json(saved)

    def to_dict(self) -> dict[str, Any]:
        """What JSON holds of it: those fields of the recipe that are not the defaults, and the table."""
        ours, default = (json.loads(config.to_json()) for config in (self.recipe, QuantConfig()))
        found = {"quant_method": METHOD, "format": FORMAT, "version": _version()}
        found |= {name: ours[name] for name in FIELDS if ours[name] != default[name]}
        if self.table is not None:
            found["saved"] = self.table.as_json()
        return found

    @staticmethod
    def _check(told: Mapping[str, Any]) -> None:
        """Everything beside the recipe that a file may say."""
        if (form := told.get("format", FORMAT)) != FORMAT:
            raise InvalidOption("format", form, f"this version of fxquant reads format {FORMAT}; use a newer one")
        if (method := told.get("quant_method", METHOD)) != METHOD:
            raise InvalidOption("quant_method", method, f"this config's is {METHOD!r}")
        for name in told:
            if name not in ("format", "quant_method", "version"):
                raise InvalidOption(name, told[name], f"FxQuantConfig takes {', '.join(FIELDS)}")


def _version() -> str:
    try:
        return version("fxquant")
    except PackageNotFoundError:
        return "unknown"
