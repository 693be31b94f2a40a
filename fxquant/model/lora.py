"""LoRA by peft on quantized modules: the layers that train it, and that merge it into codes."""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fxquant.errors import MergeRefused, PackageMissing
from fxquant.nn import QModule
from fxquant.nn.forms import Form
from fxquant.tensor import QuantizedTensor

Config = TypeVar("Config")
_Held = tuple[dict[str, Form], dict[str, Tensor | None], Tensor | None]


def peft_config(config: Config) -> Config:
    """The peft `LoraConfig`, in place, with which `get_peft_model` wraps quantized modules in layers that can merge.

    Without it peft's own layers do the same in training; their merge raises `FrozenWeight`. Merging quantizes weight +
    delta to the format that the module has, so it rounds; unmerging puts the codes back that were there before, bit for
    bit. Adapters whose sum is no plain delta (DoRA and the like) train, and are not merged: `MergeRefused`.

    Raises:
        PackageMissing: peft is not installed.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise PackageMissing("peft", "peft_config") from error
    # The registration is of peft's configs, not of the process. A callable serves as well as a class.
    config._register_custom_module({QModule: _layer})  # type: ignore[attr-defined]
    return config


def _layer(target: nn.Module, adapter_name: str, config: Any, **options: Any) -> nn.Module | None:
    """peft's layer around a quantized module; of a kind that merges, if its weight is frozen or will be."""
    from peft.tuners.lora.layer import dispatch_default

    layer = dispatch_default(target, adapter_name, config=config, **options)
    if layer is not None:
        _become_merging(layer)
    return layer


def let_merge(model: nn.Module) -> int:
    """Give LoRA layers that peft put around quantized modules, of a config that was not ours, a merge into codes.

    For libraries that make peft's config themselves: call it when an adapter has been loaded. Returns how many layers
    were changed.
    """
    layers = [module for module in model.modules() if isinstance(getattr(module, "base_layer", None), QModule)]
    return sum(_become_merging(layer) for layer in layers)


def _become_merging(layer: nn.Module) -> bool:
    from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, Embedding, Linear

    if type(layer) not in (Linear, Embedding, Conv1d, Conv2d, Conv3d):
        return False
    layer.__class__ = _merging(type(layer))
    layer._before_merge = None  # type: ignore[assignment]
    return True


class _Merging(nn.Module):
    """The mixin of peft's layers for weights that are codes. A float weight is left to peft, which adds to it."""

    base_layer: Any
    _before_merge: _Held | None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        from peft.tuners.tuners_utils import check_adapters_to_merge

        layer: Any = self
        base: QModule = layer.get_base_layer()
        if not base.is_frozen:
            super().merge(safe_merge, adapter_names)  # type: ignore[misc]
            return
        own = (*layer.lora_A, *layer.lora_embedding_A)
        names = [name for name in check_adapters_to_merge(layer, adapter_names) if name in own]
        if not names:
            return
        _check(layer, base, names)
        delta = sum(layer.get_delta_weight(name).float() for name in names)
        assert isinstance(delta, Tensor)
        if safe_merge and not torch.isfinite(delta).all():
            raise MergeRefused(type(base).__name__, f"the delta of {', '.join(names)} holds NaN or infinity")
        if self._before_merge is None:
            self._before_merge = _held(base)
        matrix = base.matrix(base.float_weight(torch.float32) + delta)
        weight = QuantizedTensor.quantize(matrix, base._forms["weight"].parsed, base.quantization.algorithm)
        base.hold("weight", weight)
        for name in names:
            if (bias := _bias(layer, name)) is not None:
                base.bias.data += bias  # type: ignore[union-attr]
        layer.merged_adapters.extend(names)

    def unmerge(self) -> None:
        layer: Any = self
        if self._before_merge is None:
            super().unmerge()  # type: ignore[misc]
            return
        base: QModule = layer.get_base_layer()
        base._forms, buffers, bias = self._before_merge
        base._buffers.update({name: None if b is None else b.to(base._device()) for name, b in buffers.items()})
        if bias is not None:
            base.bias.data.copy_(bias)  # type: ignore[union-attr]
        self._before_merge = None
        layer.merged_adapters.clear()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _revive, (type(self).__mro__[2],), self.__dict__.copy()


@cache
def _merging(plain: type[nn.Module]) -> type[_Merging]:
    return type(plain.__name__, (_Merging, plain), {"__module__": plain.__module__})


def _revive(plain: type[nn.Module]) -> nn.Module:
    return object.__new__(_merging(plain))


def _check(layer: Any, base: QModule, names: list[str]) -> None:
    kind = type(base).__name__
    if base._owner:
        raise MergeRefused(kind, "its weight is another module's too, to which it is tied")
    if strange := [name for name in names if name in layer.lora_variant]:
        words = f"the adapters {', '.join(strange)} are {type(layer.lora_variant[strange[0]]).__name__}: no plain delta"
        raise MergeRefused(kind, words)
    if any(layer.lora_bias.get(name) for name in names) and base.bias is None:
        raise MergeRefused(kind, "the adapter has a bias, and the module has none")


def _held(base: QModule) -> _Held:
    bias = base._parameters.get("bias")
    buffers = {name: buffer for name, buffer in base._buffers.items() if name.startswith("weight_")}
    return base._forms, buffers, None if bias is None else bias.detach().clone()


def _bias(layer: Any, name: str) -> Tensor | None:
    return layer.lora_B[name].bias.detach() * layer.scaling[name] if layer.lora_bias.get(name) else None
