"""QMultiheadAttention: torch's attention with quantized projections of q, k and v. The one out of it is its child."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxquant.errors import InvalidOption, NestedInput, ShapeMismatch
from fxquant.nn import kernels, recording
from fxquant.nn.base import QModule
from fxquant.nn.forms import Form
from fxquant.nn.registry import register_module
from fxquant.nn.several import weight_property
from fxquant.nn.warn import warn_uncalibrated
from fxquant.numerics.panels import PANEL

_PACKED = "in_proj_weight"
_APART = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
_MODULE = "nn.MultiheadAttention"
_Inputs = tuple[Tensor, Tensor, Tensor]


@register_module(nn.MultiheadAttention)
class QMultiheadAttention(QModule, nn.MultiheadAttention):
    """nn.MultiheadAttention whose weights [3 * E, E], or three where kdim or vdim differ, are quantized.

    Self-attention projects by one product. Of different inputs each is multiplied by its own rows of the weight if E is
    a multiple of 64, by all of them else. A calibration gives all inputs one scale.
    """

    weight_names = (_PACKED, *_APART)
    in_proj_weight: Any = weight_property(_PACKED)
    q_proj_weight: Any = weight_property(_APART[0])
    k_proj_weight: Any = weight_property(_APART[1])
    v_proj_weight: Any = weight_property(_APART[2])
    weight: Any = weight_property("weight")  # it has none, no more than torch's

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """False even where they are: torch's encoder layer would read the weights and not call this module."""
        return False

    def unmatrix(self, matrix: Tensor, name: str = _PACKED) -> Tensor:
        return matrix

    def has_tile_kernels(self, name: str = _PACKED) -> bool:
        return True

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention: the outputs in the layout of `query`, and the weights or None.

        Raises:
            NestedInput: an input is a nested tensor.
            ShapeMismatch: inputs or masks do not go together.
            InvalidOption: is_causal, which says what attn_mask is, without attn_mask.
        """
        inputs = query, key, value
        _check_inputs(inputs, self.batch_first)
        if is_causal and attn_mask is None:
            raise InvalidOption("is_causal", True, "it says that attn_mask is the causal mask: give that too")
        if self._uncalibrated:
            warn_uncalibrated(self._uncalibrated)
        # As torch does: the mask is then not looked at.
        causal = is_causal and key_padding_mask is None and not need_weights
        masks = None if causal else attn_mask, key_padding_mask
        if not recording.ACTIVE:
            return self._attended(inputs, self._activation_spec, masks, causal, need_weights, average_attn_weights)
        weights: list[Tensor | None] = []

        def attended(_: Tensor, activations: str) -> Tensor:
            y, found = self._attended(inputs, activations, masks, causal, need_weights, average_attn_weights)
            weights.append(found)
            return y

        return recording.recorded(self, _as_one(inputs), attended), weights[0]

    def _attended(
        self,
        inputs: _Inputs,
        activations: str,
        masks: tuple[Tensor | None, Tensor | None],
        causal: bool,
        need_weights: bool,
        average: bool,
    ) -> tuple[Tensor, Tensor | None]:
        batched = inputs[0].dim() == 3
        batch_first = self.batch_first or not batched
        projected = self._project(inputs, activations)
        rows = projected if batched else tuple(t.unsqueeze(0) for t in projected)
        q, k, v = rows if batch_first else tuple(t.transpose(0, 1) for t in rows)  # [B, L or S, E]
        scores = self._scores(q, k, masks)
        k, v = self._lengthened(k, v)
        if scores is not None and k.shape[1] > scores.shape[-1]:
            scores = F.pad(scores, (0, k.shape[1] - scores.shape[-1]))
        q, k, v = (t.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            y, weights = _weighted(q, k, v, scores, dropout)
            weights = weights.mean(1) if average else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            y = F.scaled_dot_product_attention(q, k, v, scores, dropout, causal)
        y = y.permute(*((0, 2, 1, 3) if batch_first else (2, 0, 1, 3))).flatten(-2)
        y = self.out_proj(y)
        return y if batched else y.squeeze(0), weights

    # ---- projections

    def _project(self, inputs: _Inputs, activations: str) -> _Inputs:
        """q, k and v [..., E] of the three inputs [..., their features]."""
        query, key, value = inputs
        kernels.settle(self)
        if _PACKED not in self.matrix_names():
            q, k, v = (
                self._product(x, activations, name, i) for i, (x, name) in enumerate(zip(inputs, _APART, strict=True))
            )
            return q, k, v
        weight = None if self._on_kernels(_PACKED) else self.float_weight(_dtype(query), _PACKED)
        if query is key and key is value:
            q, k, v = self._rows(query, activations, weight, 0, 3).chunk(3, -1)
        elif key is value:
            q = self._rows(query, activations, weight, 0, 1)
            k, v = self._rows(key, activations, weight, 1, 3).chunk(2, -1)
        else:
            q, k, v = (self._rows(x, activations, weight, i, i + 1) for i, x in enumerate(inputs))
        return q, k, v

    def _on_kernels(self, name: str) -> bool:
        return name in self._forms and self._forms[name].layout != "rows"

    def _product(self, x: Tensor, activations: str, name: str, third: int) -> Tensor:
        """x [..., K] by a weight [E, K] of its own."""
        x, bias = x.to(_dtype(x)), self._bias(third, third + 1)
        if self._on_kernels(name):
            return kernels.linear_of(self, self.parts(name), self._forms[name], x, bias, activations)
        return _linear(self.rounded(x, activations), self.float_weight(x.dtype, name), bias)

    def _rows(self, x: Tensor, activations: str, weight: Tensor | None, first: int, last: int) -> Tensor:
        """x [..., E] by some thirds of in_proj_weight: [..., (last - first) * E]; weight: None if kernels read it."""
        x, here = x.to(_dtype(x)), slice(first * self.embed_dim, last * self.embed_dim)
        if weight is not None:
            return _linear(self.rounded(x, activations), weight[here], self._bias(first, last))
        form, parts = self._forms[_PACKED], self.parts(_PACKED)
        if last - first == 3 or not _splits(form):
            y = kernels.linear_of(self, parts, form, x, self.in_proj_bias, activations)
            return y if last - first == 3 else y[..., here]
        form, parts = _thirds(form, parts, first, last)
        return kernels.linear_of(self, parts, form, x, self._bias(first, last), activations)

    def _bias(self, first: int, last: int) -> Tensor | None:
        bias = self.in_proj_bias
        return None if bias is None else bias[first * self.embed_dim : last * self.embed_dim]

    # ---- keys and masks

    def _lengthened(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v [B, S, E] with the learned key and value behind them and those of zeros, where there are any."""
        more_k, more_v = [k], [v]
        if self.bias_k is not None and self.bias_v is not None:
            more_k.append(self.bias_k.to(k.dtype).expand(k.shape[0], 1, -1))
            more_v.append(self.bias_v.to(v.dtype).expand(v.shape[0], 1, -1))
        if self.add_zero_attn:
            more_k.append(torch.zeros_like(k[:, :1]))
            more_v.append(torch.zeros_like(v[:, :1]))
        return (torch.cat(more_k, 1), torch.cat(more_v, 1)) if len(more_k) > 1 else (k, v)

    def _scores(self, q: Tensor, k: Tensor, masks: tuple[Tensor | None, Tensor | None]) -> Tensor | None:
        """What the masks add to the scores [B, heads, L, S], in a shape that spreads to it; None if nothing."""
        attn_mask, key_padding_mask = masks
        (batch, length, _), keys = q.shape, k.shape[1]
        total = None
        if attn_mask is not None:
            each = [batch * self.num_heads, length, keys]
            if list(attn_mask.shape) not in (each, each[1:]):
                raise ShapeMismatch(_MODULE, f"attn_mask of shape {list(attn_mask.shape)}", f"{each[1:]} or {each}")
            lead = [batch, self.num_heads] if attn_mask.dim() == 3 else [1, 1]
            total = _added("attn_mask", attn_mask, q.dtype).view(*lead, length, keys)
        if key_padding_mask is not None:
            if key_padding_mask.numel() != batch * keys or key_padding_mask.shape[-1] != keys:
                met = f"key_padding_mask of shape {list(key_padding_mask.shape)}"
                raise ShapeMismatch(_MODULE, met, f"{[batch, keys]}, or {[keys]} without a batch,")
            padding = _added("key_padding_mask", key_padding_mask, q.dtype).view(batch, 1, 1, keys)
            total = padding if total is None else total + padding
        return total


def _weighted(q: Tensor, k: Tensor, v: Tensor, scores: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
    """Attention [B, heads, L, d] that shows its weights [B, heads, L, S]."""
    found = (q * math.sqrt(1.0 / q.shape[-1])) @ k.transpose(-2, -1)
    weights = F.softmax(found if scores is None else found + scores, dim=-1)
    weights = F.dropout(weights, dropout, training=dropout > 0.0)
    return weights @ v, weights


def _added(name: str, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as what is added to scores: where a bool one is True, minus infinity."""
    if mask.dtype is torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
    if not mask.is_floating_point():
        raise ShapeMismatch(_MODULE, f"{name} of dtype {mask.dtype}", "a bool or float mask")
    return mask.to(dtype)


def _check_inputs(inputs: _Inputs, batch_first: bool) -> None:
    """Inputs are plain tensors [L, features] or with a batch, as many keys as values."""
    if any(x.is_nested for x in inputs):
        raise NestedInput(_MODULE)
    query, key, value = inputs
    dims = query.dim()
    fits = dims in (2, 3) and key.dim() == dims and value.dim() == dims and key.shape[:-1] == value.shape[:-1]
    batch = 0 if batch_first else 1
    if not fits or (dims == 3 and query.shape[batch] != key.shape[batch]):
        met = f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
        raise ShapeMismatch(_MODULE, met, "two or three dimensions, one batch, and as many keys as values")


def _as_one(inputs: _Inputs) -> Tensor:
    """What a calibration sees: every input that is another tensor, once."""
    query, key, value = inputs
    others = [x for x in (key, value if value is not key else query) if x is not query]
    return torch.cat([x.flatten() for x in (query, *others)]) if others else query


def _dtype(x: Tensor) -> torch.dtype:
    """That in which a product of x is computed."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias if bias is None else bias.to(weight.dtype))


def _splits(form: Form) -> bool:
    """Whether the packed weight is one third after the other: rows of tiles; full panels, and whole blocks, in each."""
    if form.layout == "tiles":
        return True
    third, granularity = form.rows // 3, form.parsed.granularity
    return third % PANEL == 0 and (granularity.kind != "block" or third % granularity.rows == 0)


def _thirds(
    form: Form, parts: tuple[Tensor | None, ...], first: int, last: int
) -> tuple[Form, tuple[Tensor | None, ...]]:
    """Some thirds of a weight that splits: views. What belongs to the whole weight is one number."""

    def some(t: Tensor | None, axis: int = 0) -> Tensor | None:
        if t is None or t.numel() == 1:
            return t
        third = t.shape[axis] // 3
        return t.narrow(axis, first * third, (last - first) * third).contiguous()

    codes, scale, zero_point, tensor_scale = parts
    across = 1 if form.layout == "tiles" else 0  # of tiles, a row of scales is that of a granule
    numbers = some(scale, across), some(zero_point, across), some(tensor_scale)
    rows = (last - first) * (form.rows // 3)
    return form._replace(rows=rows), (some(codes), *numbers)
