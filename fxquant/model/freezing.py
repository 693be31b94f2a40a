"""freeze: codes in the place of float weights; and what a model takes in memory."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fxquant.errors import NonFiniteWeight, NotAModule
from fxquant.nn import QModule


def freeze(model: nn.Module) -> None:
    """Replace the float weights of all quantized modules by their codes, one module at a time.

    The codes are those that the modules rounded to, so each module's output stays what it was up to the order of float
    sums (where a later module rounds activations, that may move a code here and there); float
    weights are let go at once, so that memory peaks at the float model and one layer. Tied weights stay one. Frozen
    weights take no gradient; biases and what was not quantized still do. Does nothing where there is nothing to do.

    Raises:
        NotAModule: `model` is no module.
        NonFiniteWeight: a weight holds NaN or infinity; nothing has been frozen.
    """
    if not isinstance(model, nn.Module):
        raise NotAModule(model)
    freeze_modules(model, (module for module in model.modules() if isinstance(module, QModule)))


def freeze_modules(model: nn.Module, modules: Iterable[QModule]) -> None:
    """`freeze` for some modules of a model, and those that are tied to them."""
    chosen = list(modules)
    tied = _tied(model)
    check_finite(model, chosen)
    for module in chosen:
        weight = module._parameters.get("weight")
        group = [] if weight is None else tied[id(weight)]
        # A linear owns what it shares: its kernels need their own layout, a table can be read from any.
        owner = next((one for one in group if one.kind == "linear" and not one.is_frozen), module)
        followers = [other for other in group if other is not owner and reads_same_rows(other, owner)]
        owner.freeze()
        for other in followers:
            if owner.is_frozen:
                other.follow(owner)


def memory_footprint(model: nn.Module) -> int:
    """Bytes of all parameters and buffers of a model as they are held now, what is shared counted once.

    That is codes and scales of frozen modules, and the float weights of those that are not. Differs from the sum over
    ``parameters()``, which leaves out codes.
    """
    storages: dict[tuple[torch.device, int], int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        storages[tensor.device, storage.data_ptr() or id(tensor)] = storage.nbytes()
    return sum(storages.values())


def _tied(model: nn.Module) -> dict[int, list[QModule]]:
    groups: dict[int, list[QModule]] = {}
    for module in model.modules():
        if isinstance(module, QModule) and (weight := module._parameters.get("weight")) is not None:
            groups.setdefault(id(weight), []).append(module)
    return groups


def reads_same_rows(one: QModule, other: QModule) -> bool:
    """Whether both, not frozen yet, quantize the weight that they share as one matrix: a convolution and the transposed
    one of a tied autoencoder don't, and get codes of their own."""
    weights = one._parameters.get("weight"), other._parameters.get("weight")
    if weights[0] is None or weights[0] is not weights[1]:
        return False
    if weights[0].is_meta:
        return one.matrix_shape() == other.matrix_shape()
    return torch.equal(one.matrix(weights[0].detach()), other.matrix(weights[0].detach()))


def check_finite(model: nn.Module, modules: Iterable[QModule]) -> None:
    """Raises `NonFiniteWeight` if one of these modules of the model has a weight that holds NaN or infinity."""
    paths = {id(module): path for path, module in model.named_modules()}
    for module in modules:
        check_module_finite(module, paths[id(module)])


def check_module_finite(module: QModule, path: str) -> None:
    """The same for one module, of that path."""
    for name in module.matrix_names():
        weight = module._parameters.get(name)
        if weight is None or weight.is_meta or not weight.numel() or _is_finite(weight):
            continue
        bad = torch.nonzero(~torch.isfinite(weight))
        raise NonFiniteWeight(path or name, len(bad), bad[0].tolist())


def _is_finite(weight: Tensor) -> bool:
    least, most = torch.aminmax(weight.detach())
    return bool(torch.isfinite(least) & torch.isfinite(most))
