"""The quantized embedding: only the rows that are looked up are rounded, or decoded."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxquant.nn.base import QModule
from fxquant.nn.forms import Form, read
from fxquant.nn.registry import register_module
from fxquant.spec import LinearSpec, TensorSpec

_FXQUANT = torch.ops.fxquant


@register_module(nn.Embedding)
class QEmbedding(QModule, nn.Embedding):  # pyright: ignore[reportIncompatibleVariableOverride]
    """nn.Embedding with a quantized table [N, K]: y [*indices, K] in the table's dtype.

    A frozen table of its own is held as rows of codes; one that is a linear's weight too (tied) is read from where that
    linear's kernels have it.
    """

    kind = "embedding"
    # Whether the codes of a row depend on that row alone.
    _by_row: bool

    def matrix(self, weight: Tensor, name: str = "weight") -> Tensor:
        return weight  # no view: its gradient may be sparse

    def unmatrix(self, matrix: Tensor, name: str = "weight") -> Tensor:
        return matrix

    def has_kernels(self, name: str = "weight") -> bool:
        return False

    @classmethod
    def unfit(cls, module: nn.Module, spec: LinearSpec) -> str:
        if problem := super().unfit(module, spec):
            return problem
        max_norm = getattr(module, "max_norm", None)
        return "" if max_norm is None else f"its rows are rescaled in place as they are read (max_norm={max_norm})"

    def adopt(self, spec: LinearSpec, calibratable: bool) -> None:
        super().adopt(spec, calibratable)
        self._by_row = spec.weights is None or _is_by_row(spec.weights)

    def _computed(self, x: Tensor, activations: str) -> Tensor:
        held = self._holder()
        if held._forms:
            return _decoded(x, held.parts(), held._forms["weight"], self.compute_dtype)
        if not self._by_row:
            return self._looked_up(x, self.float_weight(self.compute_dtype))
        rows = self._looked_up(x, self._parameters["weight"])
        if not self._weight_spec:
            return rows
        matrix = rows.reshape(-1, self.embedding_dim)
        rounded = _FXQUANT.fake_quantize_weight(matrix, self._weight_spec, self.quantization.algorithm)
        return rounded.view(rows.shape)

    def _looked_up(self, indices: Tensor, table: Tensor | None) -> Tensor:
        """torch's own look-up, for its gradient: none to the padding row, sparse if asked for."""
        assert table is not None
        options = {"scale_grad_by_freq": self.scale_grad_by_freq, "sparse": self.sparse}
        return F.embedding(indices, table, self.padding_idx, **options)


def _decoded(indices: Tensor, parts: tuple[Tensor | None, ...], form: Form, dtype: torch.dtype) -> Tensor:
    codes, scale, zero_point, tensor_scale = parts
    assert scale is not None
    scale, zero_point = read(scale, form), None if zero_point is None else read(zero_point, form)
    numbers = (scale, zero_point, tensor_scale)
    if form.layout == "rows":
        return _FXQUANT.embedding_dequantize(indices, codes, *numbers, form.columns, form.spec, dtype)
    return _FXQUANT.embedding_packed(indices, codes, *numbers, form.rows, form.columns, form.spec, dtype)


def _is_by_row(spec: TensorSpec) -> bool:
    granularity = spec.granularity
    by_row = granularity.kind == "group" or (granularity.kind == "channel" and granularity.axis % 2 == 0)
    return by_row and not spec.depends_on_whole
