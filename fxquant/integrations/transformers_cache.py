"""A KV cache of codes, through transformers' cache classes: int8 by default, int2 to int7 in groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import BaseQuantizedLayer, Cache

from fxquant.errors import InvalidOption
from fxquant.spec import TensorSpec
from fxquant.tensor import QuantizedTensor

_FXQUANT = torch.ops.fxquant


class FxQuantCache(Cache):
    """`model.generate(..., past_key_values=FxQuantCache(model.config))`: keys and values are kept as codes.

    Each head's row of a token has scales of its own, so that rows are quantized once, when they come, and never again:
    there is no residual window as in transformers' `QuantizedCache(backend="quanto")`, whose place this takes. The
    prompt's own pass sees float keys and values, later ones what the codes stand for. Codes are decoded at each step.

    config  the model's.
    nbits   8 (one scale a row), or 2 to 7 (packed; a scale and a zero point for `q_group_size` numbers).

    Raises:
        InvalidOption: another `nbits`, or a model whose layers are not all of full attention.
    """

    def __init__(self, config: Any, nbits: int = 8, q_group_size: int = 64) -> None:
        text = config.get_text_config(decoder=True)
        strange = {kind for kind in getattr(text, "layer_types", None) or () if kind != "full_attention"}
        if strange:
            raise InvalidOption("config", sorted(strange), "codes are kept of layers of full attention alone")
        if type(nbits) is not int or not 2 <= nbits <= 8:
            raise InvalidOption("nbits", nbits, "it takes 2 to 8")
        spec = TensorSpec.parse("int8/channel" if nbits == 8 else f"int{nbits}/group{q_group_size}/affine")
        super().__init__(layers=[FxQuantLayer(spec) for _ in range(text.num_hidden_layers)])

    @property
    def nbytes(self) -> int:
        """Bytes of all codes, scales and zero points."""
        return sum(t.nbytes for layer in self.layers if isinstance(layer, FxQuantLayer) for t in layer.held())


class FxQuantLayer(BaseQuantizedLayer):
    """Keys and values of one layer; each a list of tensors [B, H, T, …]: codes, scales, and zero points if any."""

    def __init__(self, spec: TensorSpec) -> None:
        super().__init__()
        self.spec = spec

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Takes keys and values [B, H, T, D] of new tokens; returns those of all [B, H, T', D], in their dtype."""
        self.cumulative_length += key_states.shape[-2]
        new = self._quantize(key_states), self._quantize(value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._widths = key_states.shape[-1], value_states.shape[-1]
        if self._quantized_keys is None or self._quantized_values is None:
            self._quantized_keys, self._quantized_values = new
            return key_states, value_states
        self._quantized_keys = _joined(self._quantized_keys, new[0])
        self._quantized_values = _joined(self._quantized_values, new[1])
        return self._read(self._quantized_keys, self._widths[0]), self._read(self._quantized_values, self._widths[1])

    def held(self) -> list[Tensor]:
        """All tensors."""
        return [*(self._quantized_keys or ()), *(self._quantized_values or ())]

    def _quantize(self, tensor: Tensor) -> list[Tensor]:
        rows = QuantizedTensor.quantize(tensor.reshape(-1, tensor.shape[-1]), self.spec)
        packed = rows.codes if self.spec.format.bits == 8 else _FXQUANT.pack_rows(rows.codes, str(self.spec))
        parts = [part for part in (packed, rows.scale, rows.zero_point) if part is not None]
        return [part.view(*tensor.shape[:-1], part.shape[-1]) for part in parts]

    def _dequantize(self, q_tensor: list[Tensor]) -> Tensor:
        return self._read(q_tensor, self._widths[0])

    def _read(self, parts: list[Tensor], width: int) -> Tensor:
        codes, scale, zero_point = (*(part.flatten(0, -2) for part in parts), None)[:3]
        assert codes is not None
        assert scale is not None
        if self.spec.format.bits < 8:
            codes = _FXQUANT.unpack_rows(codes, str(self.spec), width)
        rows = QuantizedTensor(self.spec, codes, scale, zero_point).dequantize(self.dtype)
        return rows.view(*parts[0].shape[:-1], width)

    # ---- beams, and answers that are taken back

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        if self._quantized_keys is not None and self._quantized_values is not None:
            self._quantized_keys = [change(part) for part in self._quantized_keys]
            self._quantized_values = [change(part) for part in self._quantized_values]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda part: part.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda part: part[indices])

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, so many."""
        kept = max(self.cumulative_length - abs(tokens_to_remove), 0)
        self._each(lambda part: part[..., :kept, :])
        self.cumulative_length = kept

    def reset(self) -> None:
        super().reset()
        self.cumulative_length = 0


def _joined(old: list[Tensor], new: list[Tensor]) -> list[Tensor]:
    return [torch.cat(pair, dim=-2) for pair in zip(old, new, strict=True)]
