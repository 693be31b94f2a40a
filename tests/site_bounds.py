"""Each kernel of a lowered graph against float64, on the inputs that it really had; bounds from the arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from fxquant.numerics import unpack_int8
from fxquant.ops.around import activated, prepared
from fxquant.spec import TensorSpec
from tests.kernels.cpu_helpers import multiplies_digits, through
from tests.twins import U, assert_within, fixed_point_error, int8_linear_float64

fx = torch.ops.fxquant
UNIT = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # roundoff of the output, past float32's
# Half the distance of the smallest numbers of the dtype: below its normal range the rounding is absolute.
TINY = {torch.float32: 2.0**-150, torch.bfloat16: 2.0**-134, torch.float16: 2.0**-25}
Call = tuple[list[Any], dict[str, Any]]  # what a kernel was given: by position, and by name
_KERNELS = ("linear", "conv", "embedding_dequantize")


class SiteRecorder(Interpreter):
    """Runs a lowered graph and keeps what each kernel was given and gave."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.sites: list[tuple[Node, Call, Tensor]] = []

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        name = str(n.target)
        if name.startswith("fxquant.") and any(word in name for word in _KERNELS):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            self.sites.append((n, (list(args), dict(kwargs)), value))
        return value


def assert_site_within_bound(node: Node, call: Call, got: Tensor) -> None:
    """One kernel against float64: as exact as its op's docstring says."""
    args, kwargs = call
    x, *others = args
    grouped = {name: kwargs[name] for name in ("x_group",) if name in kwargs}
    want, bound = _EXACT[node.target]([_prepared(x, kwargs), *others], got, **grouped)
    if kwargs.get("activation") or kwargs.get("residual") is not None:
        # No function is steeper than 1.13, and each is off by 8u of its argument.
        bound = 1.13 * bound + 8 * U * want.abs()
        want = activated(want, kwargs.get("activation", ""))
        if (residual := kwargs.get("residual")) is not None:
            want = want + residual.double()
        bound = bound + (U + UNIT[got.dtype]) * want.abs()
    # The roundings apply to a result that is itself rounded: (1 + u)**2 - 1 is u * (2 + u).
    assert_within(got, want, bound * (1 + 2 * UNIT[got.dtype] + 2.0**-20) + TINY[got.dtype])


def _prepared(x: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """x as the kernel's product reads it."""
    before = {name: kwargs[name] for name in ("prologue", "by", "shift", "eps") if name in kwargs}
    if not before:
        return x
    made = through(x, 0, **before)
    torch.testing.assert_close(made, prepared(x, **({"by": None, "shift": None, "eps": 0.0} | before)))
    return made


Exact = tuple[Tensor, Tensor]  # the value in float64, and how far the kernel may be from it
Product = Callable[[Tensor, Tensor], Tensor]


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.t()


def _int8_linear_dynamic(args: list[Any], got: Tensor) -> Exact:
    x, packed, scale, bias, in_features = args
    codes, x_scale = fx.int8_quantize_per_token.default(x)
    weight = unpack_int8(packed, scale.shape[0], in_features)
    return int8_linear_float64(codes, x_scale, weight, scale, bias, UNIT[got.dtype])


def _int8_linear(args: list[Any], got: Tensor) -> Exact:
    codes, x_scale, packed, scale, bias, in_features, _ = args
    weight = unpack_int8(packed, scale.shape[0], in_features)
    return int8_linear_float64(codes, x_scale, weight, scale, bias, UNIT[got.dtype])


def _int8_linear_weight_only(args: list[Any], got: Tensor) -> Exact:
    x, packed, scale, bias, in_features = args
    weight = unpack_int8(packed, scale.shape[0], in_features).double() * scale.double()
    return _float_by_integers(x, weight, bias, in_features, 1, got)


def _linear_weight_only(args: list[Any], got: Tensor) -> Exact:
    x, packed, scale, zero_point, tensor_scale, bias, n, k, spec, _ = args
    weight = fx.decode_weight.default(packed, scale, zero_point, tensor_scale, n, k, spec, torch.float32).double()
    if TensorSpec.parse(spec).format.kind == "int":
        return _float_by_integers(x, weight, bias, k, max(1, scale.numel() // n), got)
    return _float_product(x, weight, bias, k, got)


def _linear_dynamic(args: list[Any], got: Tensor, x_group: int = 0) -> Exact:
    """Integer sums are exact; each group's is scaled and added in float32."""
    x, packed, scale, zero_point, bias, n, k, spec, _ = args
    weight = fx.decode_weight.default(packed, scale, zero_point, None, n, k, spec, torch.float32).double()
    codes, x_scale, _ = fx.quantize_dynamic.default(x, f"int8/group{x_group}" if x_group else "int8/token")
    groups = x_scale.shape[-1]
    rounded = codes.double() * x_scale.double().repeat_interleave(x_group or k, -1)[..., :k]
    terms = max(1, scale.numel() // n) + groups - 1  # one float sum a granule, and a group of x
    return _float_product(rounded, weight, bias, terms, got)


def _conv_weight_only(args: list[Any], got: Tensor) -> Exact:
    x, packed, scale, zero_point, tensor_scale, bias, n, kernel, stride, padding, dilation, spec = args
    k = x.shape[1] * math.prod(kernel)
    weight = fx.decode_weight.default(packed, scale, zero_point, tensor_scale, n, k, spec, torch.float32).double()
    return _float_product(x, weight, bias, k, got, _convolution(kernel, stride, padding, dilation), len(kernel))


def _int8_conv_dynamic(args: list[Any], got: Tensor) -> Exact:
    x, packed, scale, bias, kernel, stride, padding, dilation = args
    weight = unpack_int8(packed, scale.shape[0], x.shape[1] * math.prod(kernel)).double() * scale.double()
    codes, x_scale, _ = fx.quantize_dynamic.default(x, "int8/sample")
    rounded = codes.double() * x_scale.double()
    return _float_product(rounded, weight, bias, 1, got, _convolution(kernel, stride, padding, dilation), len(kernel))


def _embedding_dequantize(args: list[Any], got: Tensor) -> Exact:
    indices, rows, scale, zero_point, tensor_scale, width, spec, dtype = args
    codes = fx.unpack_rows.default(rows, spec, width)
    table = fx.dequantize.default(codes, scale, zero_point, spec, dtype, tensor_scale)
    want = torch.nn.functional.embedding(indices, table).double()
    return want, torch.zeros_like(want)


def _convolution(kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]) -> Product:
    def convolve(x: Tensor, weight: Tensor) -> Tensor:
        shaped = weight.view(weight.shape[0], x.shape[1], *kernel)
        return torch.ops.aten.convolution(x, shaped, None, stride, padding, dilation, False, [0] * len(kernel), 1)

    return convolve


def _float_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    terms: int,
    got: Tensor,
    product: Product = _linear,
    trailing: int = 0,
) -> Exact:
    """`terms` products summed in float32 in some order, each operand and the sum scaled with a few roundings more.

    `trailing`: the dimensions of the result after its features.
    """
    y = product(x.double(), weight)
    sums = product(x.double().abs(), weight.abs())
    count = terms + 5  # scale, zero point, tensor scale, x's scale, and the float32 that weight was decoded to
    gamma = count * U / (1 - count * U)
    if bias is not None:
        y = y + bias.double().view(-1, *[1] * trailing)
    return y, gamma * sums + (U + UNIT[got.dtype]) * y.abs()


def _float_by_integers(x: Tensor, weight: Tensor, bias: Tensor | None, k: int, granules: int, got: Tensor) -> Exact:
    """x in fixed point times integers: exact in each granule. Its digits are larger than x by amax / 31 in all."""
    if not multiplies_digits(0):
        return _float_product(x, weight, bias, k, got)
    want, bound = _float_product(x, weight, bias, granules, got)
    return want, bound + (1 + (granules + 5) * U / 31 / 2.0**-22) * fixed_point_error(x, weight)


_EXACT: dict[Any, Callable[..., Exact]] = {
    fx.int8_linear_dynamic.default: _int8_linear_dynamic,
    fx.int8_linear.default: _int8_linear,
    fx.int8_linear_weight_only.default: _int8_linear_weight_only,
    fx.linear_weight_only.default: _linear_weight_only,
    fx.linear_dynamic.default: _linear_dynamic,
    fx.conv_weight_only.default: _conv_weight_only,
    fx.int8_conv_dynamic.default: _int8_conv_dynamic,
    fx.embedding_dequantize.default: _embedding_dequantize,
}
