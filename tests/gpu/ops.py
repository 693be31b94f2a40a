"""Checks of every op `torch.ops.fxquant.*` on a device, against its reference on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxquant.ops import reference
from fxquant.spec import TensorSpec
from tests.twins import U

OPS = torch.ops.fxquant
N, K = 72, 80
SPEC, INT4 = "int8/channel", "int4/group16/affine"
MXFP8 = str(TensorSpec.parse("mxfp8"))
Case = tuple[Any, ...]


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _x(dtype: torch.dtype) -> Tensor:
    return _random(5, K, seed=1).to(dtype)


def _weight(spec: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Codes [N, K], scale, zero point and tensor scale."""
    codes, scale, zero, whole = reference.quantize_weight(_random(N, K), spec)
    return codes, scale, zero if zero.numel() else None, whole if whole.numel() else None


def _packed(spec: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """A weight in panels."""
    codes, scale, zero, whole = _weight(spec)
    zeros = None if zero is None else reference.pack_granules(zero, spec, N, K)
    return reference.pack_panels(codes, spec), reference.pack_granules(scale, spec, N, K), zeros, whole


def _tiled(spec: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """A weight in the layout of the Triton kernels."""
    codes, scale, zero, whole = _weight(spec)
    zeros = None if zero is None else reference.transpose_granules(zero, spec, N, K)
    return reference.tile_codes(codes, spec), reference.transpose_granules(scale, spec, N, K), zeros, whole


def _stored(spec: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """A table, or a weight, in rows of bits."""
    codes, scale, zero, whole = _weight(spec)
    return reference.pack_rows(codes, spec), scale, zero, whole


def _int8() -> tuple[Tensor, Tensor]:
    codes, scale, _, _ = _weight(SPEC)
    return reference.int8_pack(codes), scale


def _conv() -> tuple[Tensor, Tensor]:
    codes, scale, _, _ = reference.quantize_weight(_random(8, 27), SPEC)
    return reference.int8_pack(codes), scale


def _image(dtype: torch.dtype) -> Tensor:
    return _random(2, 3, 9, 8, seed=2).to(dtype)


def _conv_weight_only(dtype: torch.dtype) -> Case:
    codes, scale, zero, _ = reference.quantize_weight(_random(8, 27), "int4/group9/affine")
    spec, size = "int4/group9/affine", (8, 27)
    granules = [reference.pack_granules(t, spec, *size) for t in (scale, zero)]
    return _image(dtype), reference.pack_panels(codes, spec), *granules, None, _random(8), 8, [3, 3], *_MOVES, spec


def _experts(dtype: torch.dtype) -> Case:
    many = [reference.quantize_weight(_random(N, K, seed=seed), SPEC) for seed in range(3)]
    rows = torch.stack([reference.int8_pack(codes) for codes, *_ in many])
    return _x(dtype), _ENDS, rows, torch.stack([scale for _, scale, *_ in many]), None, None, N, K, SPEC, "int8", True


def _experts_backward(dtype: torch.dtype) -> Case:
    _, ends, codes, scale, *_ = _experts(dtype)
    return _random(5, N).to(dtype), ends, codes, scale, None, None, N, K, SPEC, "int8"


def _codes_linear(x_spec: str, spec: str, dtype: torch.dtype) -> Case:
    codes, scale, whole = reference.quantize_dynamic(_x(dtype), x_spec)
    block = TensorSpec.parse(x_spec).scale in ("e8m0", "e4m3")
    weight = _stored(spec) if block else _tiled(spec)
    return (
        codes, scale, whole if whole.numel() else None, x_spec, *weight,
        _random(N), None, "", K, spec, dtype, [],
    )  # fmt: skip


_MOVES = ([2, 1], [1, 0], [1, 2])  # stride, padding, dilation
_ENDS = torch.tensor([2, 2, 4])
_INDICES = torch.tensor([[3, 0, 71], [3, 17, 35]])
_STEP = torch.tensor(0.03)

# By op: the arguments of its cases on the CPU, from a float dtype.
CASES: dict[str, tuple[Callable[[torch.dtype], Case], ...]] = {
    "quantize_dynamic": tuple(
        lambda d, spec=spec: (_x(d), spec)
        for spec in ("int8/token", "int8/tensor", "int8/sample", "float8_e4m3fn/token", "float8_e4m3fn/group16", MXFP8)
    ),
    "int8_quantize_per_token": (lambda d: (_x(d),),),
    "quantize_static": (lambda d: (_x(d), _STEP, "int8/tensor"), lambda d: (_x(d), _STEP, "float8_e4m3fn/tensor")),
    "norm_quantize": (lambda d: (_exact_rows(d), "rmsnorm", None, None, 0.0, "int8/token"),),
    "quantize_weight": (lambda d: (_random(N, K).to(d), SPEC), lambda d: (_random(N, K).to(d), INT4)),
    "dequantize": (lambda d: (*_weight(INT4)[:3], INT4, d),),
    "fake_quantize": (lambda d: (_x(d), "int8/token"), lambda d: (_x(d), "float8_e4m3fn/token")),
    "fake_quantize_weight": (lambda d: (_random(N, K).to(d), INT4),),
    "fake_quantize_static": (lambda d: (_x(d), _STEP, "int8/tensor"),),
    "int8_pack": (lambda d: (_weight(SPEC)[0],),),
    "int8_unpack": (lambda d: (_int8()[0], N, K),),
    "int8_linear": (
        lambda d: (*reference.int8_quantize_per_token(_x(d)), *_int8(), _random(N), K, d),
    ),
    "int8_linear_dynamic": (lambda d: (_x(d), *_int8(), _random(N), K),),
    "int8_linear_static": (lambda d: (_x(d), _STEP, *_int8(), _random(N), K),),
    "int8_linear_weight_only": (lambda d: (_x(d), *_int8(), _random(N), K),),
    "pack_panels": (lambda d: (_weight(INT4)[0], INT4),),
    "unpack_panels": (lambda d: (_packed(INT4)[0], N, K, INT4),),
    "pack_granules": (lambda d: (_weight(INT4)[1], INT4, N, K),),
    "decode_weight": (lambda d: (*_packed(INT4), N, K, INT4, d),),
    "linear_weight_only": (lambda d: (_x(d), *_packed(INT4), _random(N), N, K, INT4, d),),
    "linear_dynamic": (lambda d: (_x(d), *_packed(INT4)[:3], _random(N), N, K, INT4, d),),
    "attention": (lambda d: (*_heads(d), torch.arange(6) < torch.arange(2, 7)[:, None]),),
    "pack_rows": (lambda d: (_weight(INT4)[0], INT4),),
    "unpack_rows": (lambda d: (_stored(INT4)[0], INT4, K),),
    "rows_of_packed": (lambda d: (_packed(INT4)[0], N, K, INT4, "panels", 0, N),),
    "packed_of_rows": (lambda d: (_stored(INT4)[0], K, INT4, "panels"),),
    "decode_rows": (lambda d: (*_stored(INT4), K, INT4, d),),
    "embedding_dequantize": (
        lambda d: (_INDICES, *_stored(INT4), K, INT4, d),
        lambda d: (_INDICES.int(), *_stored(MXFP8), K, MXFP8, d),
    ),
    "embedding_packed": (
        lambda d: (_INDICES, *_packed(INT4), N, K, INT4, d),
        lambda d: (_INDICES, *_int8(), None, None, N, K, SPEC, d),
    ),
    "tile_codes": (lambda d: (_weight(INT4)[0], INT4),),
    "untile_codes": (lambda d: (_tiled(INT4)[0], K, INT4),),
    "transpose_granules": (lambda d: (_weight(INT4)[1], INT4, N, K),),
    "decode_tiles": (lambda d: (*_tiled(INT4), K, INT4, d),),
    "tiled_linear": (
        lambda d: (_x(d), *_tiled(INT4), _random(N), None, "", K, INT4, d, []),
        lambda d: (_x(d), *_tiled(SPEC), _random(N), _random(5, N).to(d), "silu", K, SPEC, d, []),
    ),
    "tiled_linear_codes": (
        lambda d: _codes_linear("int8/token", SPEC, d),
        lambda d: _codes_linear("float8_e4m3fn/token", "float8_e4m3fn/channel", d),
        lambda d: _codes_linear(MXFP8, MXFP8, d),
    ),
    "int8_conv_dynamic": (lambda d: (_image(d), *_conv(), _random(8), [3, 3], *_MOVES),),
    "int8_conv_static": (lambda d: (_image(d), _STEP, *_conv(), _random(8), [3, 3], *_MOVES),),
    "conv_weight_only": (_conv_weight_only,),
    "experts_linear": (_experts,),
    "experts_linear_backward": (_experts_backward,),
    "experts_matmul": (lambda d: (_x(d), _ENDS, _random(3, N, K).to(d)),),
    "experts_outer": (lambda d: (_random(5, N).to(d), _x(d), _ENDS),),
    "rotary": (lambda d: (_heads(d)[0], *_random(2, 5, 8).to(d)),),
    "shared": (lambda d: (_x(d),),),
}  # fmt: skip
# Their results are codes, or values that one rounding makes of codes: equal in every bit. A scale may be off by one
# unit in the last place where torch makes it on a GPU, which multiplies with the reciprocal to divide by a number.
EXACT = frozenset(CASES) - {
    "quantize_weight", "fake_quantize_weight", "int8_linear", "int8_linear_dynamic", "int8_linear_static",
    "int8_linear_weight_only", "linear_weight_only", "linear_dynamic", "tiled_linear", "tiled_linear_codes",
    "int8_conv_dynamic", "int8_conv_static", "conv_weight_only", "experts_linear", "experts_linear_backward",
    "experts_matmul", "experts_outer", "attention",
}  # fmt: skip
_LARGEST_TERMS = 40.0  # of any case the sum of the absolute terms, as a multiple of the largest result


def _heads(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value: 4 heads of 5 queries, on 2 heads of 6 keys."""
    key, value = (_random(2, 2, 6, 8, seed=seed).to(dtype) for seed in (1, 2))
    return _random(2, 4, 5, 8).to(dtype), key, value


def _exact_rows(dtype: torch.dtype) -> Tensor:
    """Rows whose mean square is 4 in any order of summation."""
    signs = torch.where(torch.arange(5 * K) % 3 == 0, -2.0, 2.0)
    return signs.view(5, K).to(dtype)


def check_op(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Each case of the op gives on the device what its reference gives on the CPU."""
    for case in CASES[name]:
        args = case(dtype)
        want = _tensors(getattr(reference, name)(*args))
        got = _tensors(getattr(OPS, name)(*[_on(device, arg) for arg in args]))
        assert len(got) == len(want)
        for mine, its in zip(got, want, strict=True):
            assert mine.device.type == device.type
            assert (mine.shape, mine.dtype) == (its.shape, its.dtype)
            _assert_close(mine.cpu(), its, exact=name in EXACT)


def _assert_close(got: Tensor, want: Tensor, *, exact: bool) -> None:
    if not want.numel():
        return
    if want.dtype.itemsize == 1:
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))
        return
    size = want.double().abs().max().item()
    unit = torch.finfo(want.dtype).eps
    bound = 0.0 if exact else 2 * unit * want.double().abs() + 2 * (K + 16) * U * _LARGEST_TERMS * size
    assert ((got.double() - want.double()).abs() <= bound).all()


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _on(device: torch.device, argument: Any) -> Any:
    return argument.to(device) if isinstance(argument, Tensor) else argument
