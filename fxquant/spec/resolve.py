"""One config from the several ways in which a user gives one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from fxquant.spec.config import QuantConfig
from fxquant.spec.formats import NumberFormat
from fxquant.spec.tensors import TensorSpec

ConfigLike: TypeAlias = QuantConfig | str | Mapping[str, Any] | NumberFormat | TensorSpec | None


def resolve_config(config: ConfigLike, fields: Mapping[str, Any]) -> QuantConfig:
    """The config from a `QuantConfig`, a preset's name, a mapping or a format of weights, with fields replaced."""
    if isinstance(config, (NumberFormat, TensorSpec)):
        config = {"weights": config}
    if isinstance(config, QuantConfig):
        return config.with_fields(**fields) if fields else config
    base: Mapping[str, Any] = {"preset": config} if isinstance(config, str) else config or {}
    return QuantConfig.from_options({**base, **fields})
