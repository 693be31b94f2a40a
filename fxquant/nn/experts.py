"""QExperts: the experts of a router, whose weights are parameters [experts, out, in] of one module.

Transformers keeps them so, and lets others compute them: a class made by its `use_experts_implementation` says how
its weights lie (`has_gate`, `has_bias`, `is_transposed`, ...) and is called with what the router chose. Only these
marks are looked at, no name of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.nn import forms, recording
from fxquant.nn.base import QModule
from fxquant.nn.forms import PARTS, Form
from fxquant.nn.registry import register_interface
from fxquant.nn.several import weight_property
from fxquant.spec import LinearSpec, TensorSpec
from fxquant.tensor import QuantizedTensor

_FXQUANT = torch.ops.fxquant
_INTERFACE = "transformers.integrations.moe"
_MARKS = ("num_experts", "has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "_apply_gate")


def has_experts_interface(cls: type[nn.Module]) -> bool:
    """Whether transformers' decorator made the forward of that class."""
    forward = getattr(cls, "forward", None)  # a scripted module's class has none
    return hasattr(forward, "__wrapped__") and getattr(forward, "__globals__", {}).get("__name__") == _INTERFACE


@register_interface(has_experts_interface)
class QExperts(QModule):
    """Experts with quantized weights, each matrix by itself; frozen ones are decoded where a row chose them.

    Frozen, the parts of all matrices of a parameter are stacked along axis 0, in memory as in a state dict. Activations
    are quantized dynamically, also after a calibration: those in front of the second product have no module.
    """

    weight_names = ("gate_up_proj", "up_proj", "down_proj")
    gate_up_proj: Any = weight_property("gate_up_proj")
    up_proj: Any = weight_property("up_proj")
    down_proj: Any = weight_property("down_proj")
    weight: Any = weight_property("weight")  # none has that name

    # What transformers' decorator and the class that it is used on set.
    num_experts: int
    has_gate: bool
    has_bias: bool
    has_post_expert_norm: bool
    is_transposed: bool
    act_fn: Callable[[Tensor], Tensor]
    post_expert_norm: Callable[[Tensor], Tensor]
    _apply_gate: Callable[[Tensor], Tensor]
    # Rounding all matrices as one gives the codes of each: no scale is shared between rows.
    _by_row: bool

    @classmethod
    def unfit(cls, module: nn.Module, spec: LinearSpec) -> str:
        """As of every quantized class; and for modules that are not what the interface says."""
        if (problem := super().unfit(module, spec)) or isinstance(module, QModule):
            return problem
        if missing := [mark for mark in _MARKS if not hasattr(module, mark)]:
            return f"its forward is that of transformers' experts, but it has no {missing[0]}"
        for name in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"):
            weight = module._parameters.get(name)
            if weight is None or weight.dim() != 3 or weight.shape[0] != module.num_experts:
                met = "missing" if weight is None else f"of shape {list(weight.shape)}"
                return f"its {name} is {met}: one matrix for each of {module.num_experts} experts is needed"
            rows = weight.shape[2 if module.is_transposed else 1]
            if spec.weights and spec.weights.granularity.kind == "block" and rows % spec.weights.granularity.rows:
                return f"blocks of {spec.weights.granularity.rows} rows reach from one expert of its {name} to the next"
        return ""

    def adopt(self, spec: LinearSpec, calibratable: bool) -> None:
        super().adopt(spec, calibratable=False)
        weights = spec.weights
        self._by_row = weights is None or not (weights.depends_on_whole or weights.granularity.kind == "block")

    def matrix(self, weight: Tensor, name: str = "weight") -> Tensor:
        """All matrices, one below the other: [experts * N, K]."""
        weight = weight.transpose(1, 2) if self.is_transposed else weight
        return weight.reshape(-1, weight.shape[2])

    def unmatrix(self, matrix: Tensor, name: str = "weight") -> Tensor:
        weight = matrix.view(self.num_experts, -1, matrix.shape[1])
        return weight.transpose(1, 2) if self.is_transposed else weight

    # ---- running

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The sum over the chosen experts of their outputs, weighted: [T, hidden], in the dtype of `hidden_states`.

        hidden_states [T, hidden]; top_k_index [T, k] int64, which experts (one not here, num_experts or above, adds
        nothing); top_k_weights [T, k].
        """
        if not recording.ACTIVE:
            return self._routed(hidden_states, self._activation_spec, top_k_index, top_k_weights)

        def routed(x: Tensor, activations: str) -> Tensor:
            return self._routed(x, activations, top_k_index, top_k_weights)

        return recording.recorded(self, hidden_states, routed)

    def _routed(self, hidden: Tensor, activations: str, index: Tensor, weights: Tensor) -> Tensor:
        tokens, choices = index.shape
        experts, order = torch.sort(index.reshape(-1), stable=True)
        ends = torch.searchsorted(experts, torch.arange(self.num_experts, device=experts.device), right=True)
        x = hidden.to(self._dtype(hidden))[order // choices]
        x = self._product("gate_up_proj" if self.has_gate else "up_proj", x, experts, ends, activations)
        x = self._apply_gate(x) if self.has_gate else self.act_fn(x)
        x = self._product("down_proj", x, experts, ends, activations)
        if self.has_post_expert_norm:
            x = self.post_expert_norm(x)
        share = weights.reshape(-1)[order].masked_fill(experts >= self.num_experts, 0.0)
        by_choice = (x * share.unsqueeze(-1))[torch.argsort(order)].view(tokens, choices, x.shape[-1])
        return by_choice.sum(1).to(hidden.dtype)

    def _product(self, name: str, x: Tensor, experts: Tensor, ends: Tensor, activations: str) -> Tensor:
        """Each row of x [S, K] with the matrix of its expert, and its bias: [S, N]."""
        form = self._forms.get(name)
        if form is None:
            y = _FXQUANT.experts_matmul(self.rounded(x, activations), ends, self._rounded_weight(name).to(x.dtype))
        else:
            inside = activations == "int8/token" and (form.layout == "int8" or form.takes_integers)
            x = x if inside else self.rounded(x, activations)
            constants = form.rows, form.columns, form.spec, form.layout, inside
            y = _FXQUANT.experts_linear(x, ends, *_read(self.parts(name), form), *constants)
        if self.has_bias:
            bias = getattr(self, f"{name}_bias")
            y = y + bias[experts.clamp(max=self.num_experts - 1)].to(y.dtype)
        return y

    def _dtype(self, x: Tensor) -> torch.dtype:
        device = x.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.compute_dtype

    def _rounded_weight(self, name: str) -> Tensor:
        """The float parameter as [experts, N, K], rounded, with a straight-through gradient."""
        weight, how = self._matrices(name), (self._weight_spec, self.quantization.algorithm)
        if not self._weight_spec:
            return weight
        if self._by_row:
            return _FXQUANT.fake_quantize_weight(weight.reshape(-1, weight.shape[2]), *how).view(weight.shape)
        return torch.stack([_FXQUANT.fake_quantize_weight(one, *how) for one in weight])

    def float_weight(self, dtype: torch.dtype, name: str = "weight") -> Tensor:
        """All matrices, as the parameter lay: rounded, or decoded to be read. No product goes this way when frozen."""
        form = self._forms.get(name)
        if form is None:
            matrices = self._rounded_weight(name)
        else:
            matrices = torch.stack([forms.decoded(parts, form, dtype) for parts in self._each(name)])
        return matrices.transpose(1, 2) if self.is_transposed else matrices

    # ---- frozen weights

    def freeze(self) -> None:
        if self.is_frozen or not self._weight_spec:
            return
        self._remember_dtype()
        for name in self.matrix_names():
            self._hold_all(name, self._quantized(name), self.num_experts)

    def quantized_weight(self, name: str = "weight") -> QuantizedTensor:
        """All matrices, one below the other: [experts * N, K]. What belongs to one matrix is repeated for its rows."""
        each = list(self._unpacked(name) if name in self._forms else self._quantized(name))
        rows, spec = len(each[0].codes), each[0].spec
        of_granule = rows if spec.granularity.kind == "tensor" else 0
        scale = _joined([one.scale for one in each], of_granule)
        assert scale is not None
        zero_point = _joined([one.zero_point for one in each], of_granule)
        tensor_scale = _joined([one.tensor_scale for one in each], rows)
        return QuantizedTensor(spec, _stack([one.codes for one in each]).flatten(0, 1), scale, zero_point, tensor_scale)

    def matrix_shape(self, name: str = "weight") -> tuple[int, int]:
        rows, columns = super().matrix_shape(name)
        return rows * (self.num_experts if name in self._forms else 1), columns

    def _matrices(self, name: str) -> Tensor:
        weight = self._parameters[name]
        assert weight is not None
        return weight.transpose(1, 2) if self.is_transposed else weight

    def _quantized(self, name: str) -> Iterator[QuantizedTensor]:
        spec = TensorSpec.parse(self._weight_spec)
        for one in self._matrices(name).detach():
            yield QuantizedTensor.quantize(one, spec, self.quantization.algorithm)

    def _each(self, name: str) -> Iterator[tuple[Tensor | None, ...]]:
        for i in range(self.num_experts):
            yield tuple(None if t is None else t[i] for t in self.parts(name))

    def _unpacked(self, name: str) -> Iterator[QuantizedTensor]:
        return (forms.unpack(parts, self._forms[name]) for parts in self._each(name))

    def _hold_all(self, name: str, weights: Iterable[QuantizedTensor], count: int) -> None:
        """Make these the frozen matrices of that name, taken one at a time."""
        stacked: list[Tensor | None] = []
        form = None
        for i, weight in enumerate(weights):
            form = forms.form_of(weight.spec, weight.shape, on_kernels=True)
            parts = forms.pack(weight, form)
            stacked = stacked or [None if t is None else t.new_empty(count, *t.shape) for t in parts]
            for whole, part in zip(stacked, parts, strict=True):
                if whole is not None and part is not None:
                    whole[i] = part
        assert form is not None
        self._parameters.pop(name, None)
        for part, tensor in zip(PARTS, stacked, strict=True):
            self.register_buffer(f"{name}_{part}", tensor, persistent=False)
        self._forms = {**self._forms, name: form}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
        for name in self._forms:
            stored = [forms.to_storage(one) for one in self._unpacked(name)]
            destination.update({f"{prefix}{name}_{part}": _stack([one[part] for one in stored]) for part in stored[0]})

    def _load_codes(self, name: str, stored: Mapping[str, Tensor], prefix: str, errors: list[str]) -> None:
        rows, columns = self.matrix_shape(name)
        device, spec = self._device(), TensorSpec.parse(self._weight_spec)
        try:
            on_device = {part: t.to(device) for part, t in stored.items()}
            if {len(t) for t in on_device.values()} != {self.num_experts}:
                raise ValueError(f"parts of {len(on_device['codes'])} experts, the module has {self.num_experts}")
            one = [{part: t[i] for part, t in on_device.items()} for i in range(self.num_experts)]
            if list(one[0]["codes"].shape[:-1]) != [rows // self.num_experts]:
                raise ValueError(f"codes of shape {list(on_device['codes'].shape)}, the weight is {(rows, columns)}")
            self._remember_dtype()
            self._hold_all(name, (forms.from_storage(parts, spec, columns) for parts in one), self.num_experts)
        except (KeyError, RuntimeError, ValueError) as error:
            errors.append(f"{prefix}{name}: not the codes of {spec}: {error}")


def _read(parts: tuple[Tensor | None, ...], form: Form) -> tuple[Tensor | None, ...]:
    codes, scale, zero_point, tensor_scale = parts
    assert scale is not None
    return codes, forms.read(scale, form), None if zero_point is None else forms.read(zero_point, form), tensor_scale


def _stack(tensors: list[Tensor]) -> Tensor:
    """torch.stack, of one-byte floats too."""
    dtype = tensors[0].dtype
    if dtype.itemsize > 1:
        return torch.stack(tensors)
    return torch.stack([t.view(torch.uint8) for t in tensors]).view(dtype)


def _joined(tensors: list[Tensor | None], rows: int) -> Tensor | None:
    """Numbers of single matrices, one below the other; with `rows`, each is repeated for as many rows."""
    known = [t.expand(rows, 1) if rows else t for t in tensors if t is not None]
    return _stack(known).flatten(0, 1) if known else None
