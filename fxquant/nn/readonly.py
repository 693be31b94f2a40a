"""What a frozen module's `weight` is to those who ask for it: a tensor to read, decoded when its values are needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxquant.errors import FrozenWeight

# In place or by assignment, but for what ends in an underscore.
_WRITES = {"__setitem__", "__set__", "__delitem__", *(f"__i{o}__" for o in ("add", "sub", "mul", "truediv", "pow"))}
_WRITES |= {f"__i{o}__" for o in ("floordiv", "mod", "and", "or", "xor", "lshift", "rshift", "matmul")}

# What a tensor tells of itself beside its attributes, without a look at its values.
_FACTS = {
    "size",
    "dim",
    "ndimension",
    "numel",
    "nelement",
    "element_size",
    "stride",
    "is_floating_point",
    "is_contiguous",
}


class DequantizedWeight(Tensor):
    """A copy of a frozen weight: shape, dtype and device cost nothing, the first use of values decodes it.

    What is computed from it are plain tensors. Writing to it, also through `.data` and `detach()`, raises
    `FrozenWeight`: the write would be lost, as this is no part of the module (peft's merge writes so, and torch's
    initializers).
    """

    _decode: Callable[[], Tensor]
    _name: tuple[str, str]
    _values: Tensor | None
    _is_hf_initialized = True  # to transformers, which then initializes no such weight

    def _plain(self) -> Tensor:
        if self._values is None:
            with torch.no_grad():
                self._values = self._decode().detach()
        return self._values

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        is_getter = name == "__get__"
        if name == "detach" or (is_getter and getattr(func.__self__, "__name__", "") == "data"):
            return args[0]  # what is written to these would be lost as well
        if is_getter or name in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        _refuse_writes(name, args, kwargs)
        args, kwargs = pytree.tree_map_only(DequantizedWeight, cls._plain, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map_only(DequantizedWeight, cls._plain, (args, kwargs or {}))
        return func(*args, **kwargs)


def weight_to_read(module: Any, name: str = "weight") -> Tensor:
    """The weight of that name of a frozen module. A compiler gets a plain tensor: it would trace through the other."""
    dtype: torch.dtype = module.compute_dtype
    if torch.compiler.is_compiling():
        with torch.no_grad():
            return module.float_weight(dtype, name)
    shape = module.unmatrix(torch.empty(module.matrix_shape(name), device="meta"), name).shape
    make: Any = Tensor._make_wrapper_subclass
    weight = make(DequantizedWeight, shape, dtype=dtype, device=module._holder().parts(name)[0].device)
    weight._decode = lambda: module.float_weight(dtype, name)
    weight._name = (type(module).__name__, name)
    weight._values = None
    return weight


def _refuse_writes(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    in_place = name in _WRITES or (name.endswith("_") and not name.endswith("__"))
    target = args[0] if args else kwargs.get("tensor")
    written = kwargs.get("out") if not in_place else target
    if name == "requires_grad_" and not (args[1:] or [kwargs.get("requires_grad", True)])[0]:
        return
    if isinstance(written, DequantizedWeight):
        raise FrozenWeight(*written._name)
