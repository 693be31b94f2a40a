"""What launchers take: the operands of one operation, by name; and how operands for a problem are made up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.algorithms import quantize
from fxquant.numerics import pack_codes_rows, packed_bytes
from fxquant.numerics.panels import granules_along
from fxquant.numerics.tiles import pack_tiles, scaled_by_blocks, tiles_shape, transpose_granules
from fxquant.spec import TensorSpec
from fxquant.target import Problem

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LinearOperands:
    """y [M, N] = activation(x [M, K] times weight [N, K], transposed, + bias) + residual.

    x           float, or codes of `x_spec`: int8, float8, or 4-bit floats in uint8, two a byte, low half first.
    x_scale     of codes: [M, 1], [1, 1], or [M, granules along K]; float32, or the spec's scale dtype.
    x_tensor_scale  float32 [1, 1] where x_spec has one.
    tiles       uint8 [N, bytes], the layout of `fxquant.numerics.tiles`.
    scale       [granules along K, N] in the spec's scale dtype; zero_point likewise, uint8, or a shift.
    tensor_scale  float32 [1, 1] or [N, 1] where the spec has one.
    bias        [N], any float dtype. residual: [M, N], of the output's dtype.
    activation  '', 'relu', 'gelu', 'gelu_tanh' or 'silu'.

    Where both sides are scaled by small blocks (`scaled_by_blocks`: mxfp8, mxfp4, nvfp4), the weight stays in the
    storage form, which `tl.dot_scaled` reads: tiles uint8 [N, ceil(K * bits / 8)] of `numerics.bits`, scale [N, G].
    """

    x: Tensor
    tiles: Tensor
    scale: Tensor
    in_features: int
    spec: str
    dtype: torch.dtype
    x_spec: str = ""
    x_scale: Tensor | None = None
    x_tensor_scale: Tensor | None = None
    zero_point: Tensor | None = None
    tensor_scale: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    activation: str = ""

    @property
    def out_features(self) -> int:
        return self.tiles.shape[0]

    @property
    def problem(self) -> Problem:
        dtype = str(self.dtype).removeprefix("torch.")
        return Problem("linear", self.x.shape[0], self.out_features, self.in_features, self.spec, self.x_spec, dtype)


@dataclass(frozen=True)
class QuantizeOperands:
    """x [M, K] -> codes and scales of `spec`; after a norm over K, if `norm` is 'rmsnorm' or 'layernorm'.

    norm_weight, norm_bias  [K] or None; eps of the norm. scale: float32 [1, 1] if the range is known (static).
    """

    x: Tensor
    spec: str
    norm: str = ""
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    eps: float = 0.0
    scale: Tensor | None = None


@dataclass(frozen=True)
class EmbeddingOperands:
    """Rows of a table: indices [M] of any integer dtype, rows uint8 [N, bytes] as `fxquant.numerics.bits` packs them,
    scale, zero_point and tensor_scale in the shape of the spec's granularity."""

    indices: Tensor
    rows: Tensor
    scale: Tensor
    in_features: int
    spec: str
    dtype: torch.dtype
    zero_point: Tensor | None = None
    tensor_scale: Tensor | None = None


def linear_operands(
    problem: Problem, device: str | torch.device = "meta", *, bias: bool = True, seed: int = 0
) -> LinearOperands:
    """Operands of that problem: empty ones on the meta device, else random ones, quantized by the reference."""
    spec, dtype = TensorSpec.parse(problem.weights), DTYPES[problem.dtype]
    x_spec = TensorSpec.parse(problem.activations) if problem.activations else None
    n, k, device = problem.n, problem.k, torch.device(device)
    if device.type == "meta":
        weight = _empty_weight(n, k, spec, x_spec)
        x, x_scale, x_tensor_scale = _empty_activation(problem, x_spec, dtype)
        b = torch.empty(n, dtype=dtype, device="meta")
    else:
        torch.manual_seed(seed)
        weight = held_weight(torch.randn(n, k, device=device), spec, x_spec)
        x, x_scale, x_tensor_scale = torch.randn(problem.m, k, device=device).to(dtype), None, None
        if x_spec is not None:
            x, x_scale, x_tensor_scale = quantized_activation(x, x_spec)
        b = torch.randn(n, device=device).to(dtype)
    tiles, scale, zero_point, tensor_scale = weight
    return LinearOperands(
        x=x,
        tiles=tiles,
        scale=scale,
        in_features=k,
        spec=problem.weights,
        dtype=dtype,
        x_spec=problem.activations,
        x_scale=x_scale,
        x_tensor_scale=x_tensor_scale,
        zero_point=zero_point,
        tensor_scale=tensor_scale,
        bias=b if bias else None,
    )


HeldWeight = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def held_weight(weight: Tensor, spec: TensorSpec, x_spec: TensorSpec | None = None) -> HeldWeight:
    """(tiles, scale, zero_point, tensor_scale) of a float weight [N, K], as `LinearOperands` has them."""
    codes, scale, zero_point, tensor_scale = quantize(weight, spec)
    whole = tensor_scale if spec.has_tensor_scale else None
    if scaled_by_blocks(spec, x_spec):
        return pack_codes_rows(codes, spec), scale, None, whole
    n, k = weight.shape
    zeros = transpose_granules(zero_point, spec, n, k) if spec.has_zero_point else None
    return pack_tiles(codes, spec), transpose_granules(scale, spec, n, k), zeros, whole


def _empty_weight(n: int, k: int, spec: TensorSpec, x_spec: TensorSpec | None) -> HeldWeight:
    granules, zero_dtype = granules_along(k, spec), spec.scale_dtype if spec.scheme == "shift" else torch.uint8
    with torch.device("meta"):
        whole = torch.empty(1, 1) if spec.has_tensor_scale else None
        if scaled_by_blocks(spec, x_spec):
            rows = torch.empty(n, packed_bytes(k, spec.format.bits), dtype=torch.uint8)
            return rows, torch.empty(n, granules, dtype=spec.scale_dtype), None, whole
        zeros = torch.empty(granules, n, dtype=zero_dtype) if spec.has_zero_point else None
        tiles = torch.empty(tiles_shape(n, k, spec), dtype=torch.uint8)
        return tiles, torch.empty(granules, n, dtype=spec.scale_dtype), zeros, whole


def quantized_activation(x: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor, Tensor | None]:
    """(codes, scale, tensor_scale) of x [M, K] by the reference, as `LinearOperands` has them."""
    codes, scale, _, tensor_scale = quantize(x, spec)
    held = pack_codes_rows(codes, spec) if spec.format.bits == 4 else codes
    return held, scale, tensor_scale if spec.has_tensor_scale else None


def _empty_activation(
    problem: Problem, spec: TensorSpec | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    with torch.device("meta"):
        if spec is None:
            return torch.empty(problem.m, problem.k, dtype=dtype), None, None
        narrow = spec.format.bits == 4
        width, code_dtype = ((problem.k + 1) // 2, torch.uint8) if narrow else (problem.k, spec.code_dtype)
        scale = torch.empty(spec.granularity.scale_shape((problem.m, problem.k)), dtype=spec.scale_dtype)
        tensor_scale = torch.empty(1, 1) if spec.has_tensor_scale else None
        return torch.empty(problem.m, width, dtype=code_dtype), scale, tensor_scale
