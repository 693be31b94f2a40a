"""fxquant.json: what a folder of safetensors says of itself beside its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxquant.checkpoint.json_files import read_json
from fxquant.errors import FxQuantError, InvalidCheckpoint
from fxquant.model import quantization_map
from fxquant.nn import QModule
from fxquant.spec import TensorSpec

FORMAT = 1
FILE = "fxquant.json"
PACKING = "rows"  # docs/formats.md, Storage
_FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class Description:
    """The contents of the file.

    modules  a quantization map (see `fxquant.quantization_map`).
    dtypes   what each quantized module computes in, by path.
    weights  by key of each frozen weight: its format, group size, axis, scheme, scale's type, packing, spec and shape.
    shared   keys of tensors that are stored once under another key: that key.
    buffers  dtypes of the floating buffers that no state dict holds, by path.
    """

    modules: dict[str, dict[str, str]]
    dtypes: dict[str, torch.dtype]
    weights: dict[str, dict[str, Any]]
    shared: dict[str, str]
    buffers: dict[str, torch.dtype]

    def as_json(self) -> dict[str, Any]:
        """What the file holds: the same of the same model."""
        modules = {path: {**fields, "dtype": _name(self.dtypes[path])} for path, fields in self.modules.items()}
        return {
            "format": FORMAT,
            "versions": {"fxquant": _version(), "torch": str(torch.__version__)},
            "modules": modules,
            "weights": self.weights,
            "shared": self.shared,
            "buffers": {path: _name(dtype) for path, dtype in self.buffers.items()},
        }


def describe(model: nn.Module, shared: Mapping[str, str]) -> Description:
    """The description of a model whose state dict has these shared keys."""
    modules = quantization_map(model)
    dtypes, weights, buffers = {}, {}, {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, QModule):
            if path in modules and module.quantization.weights is not None:
                dtypes[path] = module.compute_dtype
            weights |= {f"{prefix}{name}": _weight(module, name) for name in module._forms}
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers.get(name)
            if buffer is not None and buffer.dtype in _FLOATS.values() and not _is_own(module, name):
                buffers[prefix + name] = buffer.dtype
    dtypes |= {path: torch.float32 for path in modules if path not in dtypes}
    return Description(modules, dtypes, weights, dict(shared), dict(sorted(buffers.items())))


def read_description(path: Path) -> Description:
    """Read and check the file. Raises `InvalidCheckpoint`, which says what is wrong with it."""
    told = read_json(path)
    if type(told.get("format")) is not int or told["format"] != FORMAT:
        written = f"format {str(told.get('format'))[:20]!r}"
        raise InvalidCheckpoint(path, f"it is of {written}; this version of fxquant reads format {FORMAT}")
    parts = {name: told.get(name) for name in ("modules", "weights", "shared", "buffers")}
    for name, part in parts.items():
        if not isinstance(part, dict):
            raise InvalidCheckpoint(path, f"its {name!r} is no object")
    for name in ("modules", "weights"):
        if not all(isinstance(fields, dict) for fields in told[name].values()):
            raise InvalidCheckpoint(path, f"its {name!r} holds what is no object")
    texts = [told["shared"], told["buffers"], *told["modules"].values()]
    if not all(isinstance(text, str) for part in texts for text in part.values()):
        raise InvalidCheckpoint(path, "its modules, shared keys and buffers are described by texts alone")
    modules, dtypes = {}, {}
    for name, fields in told["modules"].items():
        rest = dict(fields)
        dtypes[name] = _dtype(path, rest.pop("dtype", "float32"))
        modules[name] = rest
    for key, fields in told["weights"].items():
        _check_weight(path, key, fields)
    buffers = {name: _dtype(path, text) for name, text in told["buffers"].items()}
    return Description(modules, dtypes, told["weights"], told["shared"], buffers)


def _weight(module: QModule, name: str) -> dict[str, Any]:
    form = module._forms[name]
    return _spelled(form.parsed) | {"spec": form.spec, "shape": [form.rows, form.columns]}


def _spelled(spec: TensorSpec) -> dict[str, Any]:
    granularity = spec.granularity
    return {
        "format": spec.format.name,
        "bits": spec.format.bits,
        "granularity": granularity.kind,
        "group_size": granularity.size if granularity.kind in ("group", "block") else None,
        "axis": granularity.axis if granularity.kind == "channel" else -1,
        "scheme": spec.scheme,
        "scale": spec.scale,
        "packing": PACKING,
    }


def _check_weight(path: Path, key: str, fields: Mapping[str, Any]) -> None:
    """A spec and what it is spelled out as must be one: an edit of either alone would mislead some reader."""
    try:
        spec = TensorSpec.parse(fields.get("spec", ""))
    except FxQuantError as error:
        raise InvalidCheckpoint(path, f"weight {key!r}: {error}") from error
    for name, wanted in _spelled(spec).items():
        if fields.get(name) != wanted:
            met = f"weight {key!r}: {name} {str(fields.get(name))[:40]!r}"
            raise InvalidCheckpoint(path, f"{met} is not that of its spec {spec}, {wanted!r}")


def _is_own(module: nn.Module, name: str) -> bool:
    """Whether a buffer is one of those in which a quantized module holds codes."""
    return isinstance(module, QModule) and (name == "compute_like" or name.startswith(module.weight_names))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(path: Path, text: str) -> torch.dtype:
    if text not in _FLOATS:
        raise InvalidCheckpoint(path, f"{text[:40]!r} is no dtype to compute in: {', '.join(_FLOATS)}")
    return _FLOATS[text]


def _version() -> str:
    try:
        return version("fxquant")
    except PackageNotFoundError:
        return "unknown"
