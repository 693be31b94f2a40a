"""quantize_static: schema, reference, fake, gradient, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fxquant.errors import FxQuantError, GradientsNeedTraining, InvalidSpec, ShapeMismatch, UnsupportedActivation
from fxquant.ops import reference
from fxquant.spec import TensorSpec
from tests.test_ops_static import SCALE, Linear, codes_of, normal
from tests.twins import assert_same_bits

OPS = torch.ops.fxquant
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SPECS = ("int8/tensor", "float8_e4m3fn/tensor", "float8_e5m2/tensor", "fp6_e3m2/tensor", "fp4_e2m1/tensor")
ONE = torch.tensor(SCALE)


def samples() -> dict[str, tuple[Any, ...]]:
    x = normal(2, 5, 70)
    return {
        "int8": (x, ONE, "int8/tensor"),
        "float8": (x.half(), ONE.view(1), "float8_e4m3fn/tensor"),
        "small float": (x.bfloat16(), ONE, "fp6_e3m2/tensor"),
        "strided": (x.transpose(0, 1), ONE, "int8/tensor"),
        "empty": (x[:0], ONE, "int8/tensor"),
        "row": (x[0, 0], ONE, "int8/tensor"),
        "gradient": (x.clone().requires_grad_(), ONE, "int8/tensor"),
    }


# That it has no gradient is checked below: opcheck would take one.
@pytest.mark.parametrize("name", [name for name in samples() if name != "gradient"])
def test_opcheck(name: str) -> None:
    torch.library.opcheck(OPS.quantize_static.default, samples()[name])


@pytest.mark.parametrize("name", list(samples()))
def test_fake_has_shapes_dtypes_and_strides_of_the_reference(name: str) -> None:
    args = samples()[name]
    with torch.no_grad():
        real = reference.quantize_static(*args)
        with torch._subclasses.FakeTensorMode() as mode:
            fake = OPS.quantize_static(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
    for one, other in zip(real, fake, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_is_rounded_as_defined(dtype: torch.dtype) -> None:
    x = normal(2, 20, 70).to(dtype)
    codes, scale = reference.quantize_static(x, ONE, "int8/tensor")
    assert torch.equal(codes, codes_of(x, SCALE))
    assert_same_bits(scale, ONE.expand(2, 20, 1).contiguous())
    assert int((codes.abs() == 127).sum()) > 20


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_codes_stand_for_what_fake_quantize_static_gives(spec: str, dtype: torch.dtype) -> None:
    x, scale = normal(20, 70).to(dtype), torch.tensor(1.5 / TensorSpec.parse(spec).qmax)  # beyond 1.5 is cut off
    codes, scales = reference.quantize_static(x, scale, spec)
    values = reference.dequantize(codes, scales[:1], None, spec, dtype)
    assert_same_bits(values, reference.fake_quantize_static(x, scale, spec))


def test_a_product_of_the_codes_is_int8_linear_static() -> None:
    p = Linear()
    codes, scale = reference.quantize_static(p.x, p.x_scale, "int8/tensor")
    got = reference.int8_linear(codes, scale, p.packed, p.scale, p.bias, 70, torch.float32)
    assert_same_bits(got, reference.int8_linear_static(p.x, *p.arguments(p.bias)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("spec", SPECS)
def test_a_row_that_is_not_finite_has_no_scale(bad: float, spec: str) -> None:
    x = normal(5, 70)
    x[2, 3] = bad
    codes, scale = reference.quantize_static(x, ONE, spec)
    assert scale.isnan().flatten().tolist() == [False, False, True, False, False]
    clean, _ = reference.quantize_static(normal(5, 70), ONE, spec)
    assert torch.equal(codes[[0, 1, 3, 4]].view(torch.uint8), clean[[0, 1, 3, 4]].view(torch.uint8))


@pytest.mark.parametrize("scale", [0.0, math.nan, math.inf, -1.0, 2.0**-127])
def test_scales_at_the_edges(scale: float) -> None:
    x, given = torch.cat([normal(5, 70), normal(5, 70) * 1e36]), torch.tensor(scale)
    codes, scales = reference.quantize_static(x, given, "int8/tensor")
    values = codes.float() * scales
    want = reference.fake_quantize_static(x, given, "int8/tensor")
    assert torch.equal(values.nan_to_num(nan=9.0), want.nan_to_num(nan=9.0))


@pytest.mark.parametrize("shape", [(0, 70), (2, 0, 70), (3, 0)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    for op in (reference.quantize_static, OPS.quantize_static):
        codes, scale = op(torch.empty(shape), ONE, "int8/tensor")
        assert (codes.shape, scale.shape) == (shape, (*shape[:-1], 1))


def test_codes_have_no_gradient() -> None:
    x, scale = normal(5, 70).requires_grad_(), ONE.clone().requires_grad_()
    for args in ((x, ONE), (x.detach(), scale)):
        with pytest.raises(GradientsNeedTraining, match=r"fxquant\.quantize_static"):
            OPS.quantize_static(*args, "int8/tensor")[1].sum().backward()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph(dynamic: bool, fresh_dynamo: None) -> None:
    def run(x: Tensor) -> Tensor:
        codes, scale = OPS.quantize_static((x + 1).transpose(0, 1), ONE, "int8/tensor")
        return codes.float() * scale

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for rows in (3, 5):
        x = normal(rows, 2, 70)
        assert_same_bits(compiled(x), run(x))


REFUSED: dict[str, tuple[tuple[Any, ...], type[FxQuantError], str]] = {
    "granularity": ((normal(5, 70), ONE, "int8/token"), InvalidSpec, "one float32 scale for the whole tensor"),
    "scale dtype": ((normal(5, 70), ONE, "fp4_e2m1/tensor/e4m3"), InvalidSpec, "fp4_e2m1/tensor/e4m3"),
    "activation": ((torch.ones(5, 70, dtype=torch.int32), ONE, "int8/tensor"), UnsupportedActivation, "int32"),
    "two scales": ((normal(5, 70), torch.ones(2), "int8/tensor"), ShapeMismatch, r"scale of shape \[2\]"),
    "scale of rows": ((normal(5, 70), torch.ones(5, 1), "int8/tensor"), ShapeMismatch, r"scale of shape \[5, 1\]"),
    "half scale": ((normal(5, 70), ONE.half(), "int8/tensor"), ShapeMismatch, "dtype torch.float16"),
    "devices": ((normal(5, 70), ONE.to("meta"), "int8/tensor"), ShapeMismatch, "meta"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_errors_are_the_same_from_reference_and_fake(name: str) -> None:
    args, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        reference.quantize_static(*args)
    with torch._subclasses.FakeTensorMode() as mode, pytest.raises(error, match=words):
        OPS.quantize_static(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
