"""The weight store: packed weights by the identity of the parameters they come from, shared by all graphs.

Torch hands a compiled graph its parameters anew at every call, and one graph serves many parameter sets. The store
maps parameters to packed tensors. It holds parameters weakly: an entry goes when one of its parameters goes.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fxquant import cpu_kernels
from fxquant.errors import NonFiniteWeight

_SAMPLES, _WORD = 3, 8  # of each tensor that many bytes, as in fingerprint.cpp


@dataclass(frozen=True)
class Recipe:
    """How packed tensors come from parameters.

    ``fold(*parameters)`` quantizes: it gives codes, scales, …; ``pack`` arranges those for a kernel. ``key`` says both
    in text; equal keys mean equal tensors. ``where`` names each parameter's module, for errors. ``quantizes`` is False
    for a joined bias: inf is an honest value there.
    """

    key: str
    fold: Callable[..., tuple[Tensor, ...]] = field(compare=False)
    pack: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = field(compare=False)
    where: tuple[str, ...] = field(default=(), compare=False)
    quantizes: bool = field(default=True, compare=False)

    def apply(self, parameters: Sequence[Tensor], folded: tuple[Tensor, ...] | None = None) -> tuple[Tensor, ...]:
        """The packed tensors. `folded`: what ``fold`` gives for these parameters, if the caller has it.

        Raises:
            NonFiniteWeight: a parameter holds NaN or inf.
        """
        with torch.no_grad():
            tensors = self.fold(*parameters) if folded is None else folded
            if self.quantizes and any(not _is_finite(t) for t in tensors):
                raise _non_finite(self.where, parameters)
            return tuple(t.detach() for t in self.pack(tensors))


_SCALES = (torch.float32, torch.bfloat16, torch.float8_e8m0fnu)  # float8_e4m3fn scales stand under a float32 one


def _is_finite(tensor: Tensor) -> bool:
    """Of a scale; codes say nothing."""
    return tensor.dtype not in _SCALES or bool(torch.isfinite(tensor.float()).all())


def _non_finite(where: Sequence[str], parameters: Sequence[Tensor]) -> NonFiniteWeight:
    for path, parameter in zip(where, parameters, strict=True):
        bad = torch.nonzero(~torch.isfinite(parameter))
        if len(bad):
            return NonFiniteWeight(path, len(bad), bad[0].tolist())
    return NonFiniteWeight(where[0], 0, [])  # finite parameters whose expression is not


class Stamp:
    """What a set of tensors looked like: object identity, version, address and a few bytes of each.

    Torch counts some edits of a tensor in ``_version``; edits through ``.data``, numpy, fused optimizers or LoRA merges
    it does not count. On the CPU a hash over a few elements spread over the tensor sees those that touch the whole
    tensor. What it can't see: an edit of a few elements through ``.data`` or numpy, and ``.data`` edits on other
    devices.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """Take the tensors as they are now."""
        self._layouts = [_layout(t) for t in tensors]
        self._library = cpu_kernels.load()
        # torch swaps the insides of two tensors (torch.utils.swap_tensors) only if nobody refers to them weakly: while
        # the references live, so do the addresses.
        self._references = list(map(weakref.ref, tensors))
        self._insides = _table(ctypes.c_void_p, [t._cdata for t in tensors])
        on_cpu = [t for t in tensors if t.device.type == "cpu" and t.numel()]
        self._addresses = _table(ctypes.c_void_p, [t.data_ptr() for t in on_cpu])
        self._spans = _table(ctypes.c_int64, [_span_bytes(t) for t in on_cpu])
        self._state = self._read_state(tensors)
        self._fingerprint = self._read_fingerprint()

    def is_fresh(self, tensors: Sequence[Tensor]) -> bool:
        """True if nothing that can be seen cheaply has changed; for the same objects in the same shapes.

        It runs at every call of a graph, where nothing of this is in a cache any more: see fingerprint.cpp.
        """
        # The state first: the fingerprint reads at the addresses noted.
        return self._read_state(tensors) == self._state and self._read_fingerprint() == self._fingerprint

    def has_layout_of(self, tensors: Sequence[Tensor]) -> bool:
        """True if shapes, strides, dtypes and devices are theirs. Dynamo's guards ask that at every call."""
        return [_layout(t) for t in tensors] == self._layouts

    def _read_state(self, tensors: Sequence[Tensor]) -> Any:
        """Addresses, and the versions of those that have one: tensors made in inference mode have none."""
        if self._library is not None:
            return self._library.tensor_state(self._insides, len(self._insides))
        return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]

    def _read_fingerprint(self) -> Any:
        if self._library is not None:
            return self._library.fingerprint(self._addresses, self._spans, len(self._spans))
        return list(map(_samples, self._addresses, self._spans))


def _table(kind: Any, values: list[int]) -> Any:
    return (kind * len(values))(*values)


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _span_bytes(tensor: Tensor) -> int:
    """Bytes from the tensor's first element to the end of its last one, gaps included."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _samples(pointer: int, span: int) -> list[bytes]:
    """What the C++ library hashes: a few words spread over a tensor's bytes."""
    length = min(_WORD, span)
    offsets = ((span - length) * sample // (_SAMPLES - 1) for sample in range(_SAMPLES))
    return [ctypes.string_at(pointer + offset, length) for offset in offsets]


@dataclass
class Entry:
    """One packed weight: the tensors, and the stamp of the parameters they were made from."""

    tensors: tuple[Tensor, ...]
    stamp: Stamp


class WeightStore:
    """Packed weights, by recipe and parameters; weak in the parameters, safe for threads.

    ``packed_count`` counts how often anything was packed: what tests and the report look at.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[str, tuple[int, ...]], Entry] = {}
        self._lock = threading.RLock()
        self.generation = 0
        self.packed_count = 0

    def entry(self, recipe: Recipe, parameters: Sequence[Tensor], folded: tuple[Tensor, ...] | None = None) -> Entry:
        """The packed form of these parameters; packs if it is not there, packs again if they have changed."""
        key = (recipe.key, tuple(id(p) for p in parameters))
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and entry.stamp.has_layout_of(parameters) and entry.stamp.is_fresh(parameters):
                return entry
            stamp = Stamp(parameters)  # before packing: a change while it packs is seen at the next look
            tensors = recipe.apply(parameters, folded if entry is None else None)
            self.packed_count += 1
            if entry is not None:
                entry.stamp, entry.tensors = stamp, tensors
                self.generation += 1
                return entry
            self._entries[key] = Entry(tensors, stamp)
            for parameter in parameters:
                weakref.finalize(parameter, self._entries.pop, key, None).atexit = False
            return self._entries[key]

    def forget(self, parameters: Sequence[Tensor]) -> int:
        """Drop every entry that was made from one of these, to be packed again at the next call; returns how many."""
        ids = {id(p) for p in parameters}
        with self._lock:
            gone = [key for key in self._entries if ids & set(key[1])]
            for key in gone:
                del self._entries[key]
            self.generation += 1
            return len(gone)

    @property
    def resident_bytes(self) -> int:
        """Bytes of all packed tensors in the store."""
        return sum(t.nbytes for entry in self._entries.values() for t in entry.tensors)


_PROCESS_STORE = WeightStore()


def process_store() -> WeightStore:
    """The store that all graphs of this process share.

    It must outlive any one graph, and Dynamo gives a string backend no object to hang it on: prefill and decode
    graphs of one model arrive as two unrelated calls. It holds nothing alive but packed forms of living parameters.
    """
    return _PROCESS_STORE
