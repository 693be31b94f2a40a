"""Norms of the model door: float, unless a rule names them; then their output is rounded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxquant
from fxquant.errors import InvalidOption
from fxquant.nn import QLayerNorm, QModule, QRMSNorm
from fxquant.ops import reference
from fxquant.spec import LinearSpec, QuantConfig
from tests.kernels.cpu_helpers import assert_equal
from tests.nn.kinds import DTYPES, NORMS, Kind, quantized, rounded_input

norms = pytest.mark.parametrize("kind", NORMS.values(), ids=NORMS)
OUTPUTS = {
    "x=int8": "int8/token",
    "w=none x=int8/tensor": "int8/tensor",
    "x=int8/sample": "int8/sample",
    "x=float8_e4m3fn": "float8_e4m3fn/token",
    "x=mxfp8": "float8_e4m3fn/group32/e8m0",
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", OUTPUTS)
@norms
def test_the_output_is_rounded(kind: Kind, rule: str, dtype: torch.dtype) -> None:
    module, x = kind.module(dtype), kind.input(dtype)
    y = module(x)
    assert not torch.equal(rounded_input(y, OUTPUTS[rule], dtype), y)
    q = quantized(module, f"int8dq {rule[rule.index('x=') :]}")
    assert_equal(q(x), rounded_input(y, OUTPUTS[rule], dtype))
    q.freeze()  # there is nothing to freeze
    assert not q.is_frozen
    assert_equal(q(x), rounded_input(y, OUTPUTS[rule], dtype))


@norms
def test_a_calibrated_scale_is_used(kind: Kind) -> None:
    module, x, scale = kind.module(), kind.input(), torch.tensor(0.01)
    y = module(x)
    q = quantized(module, "int8dq")
    q.output_scale, q.input_scale = scale, torch.tensor(100.0)
    assert_equal(q(x), reference.fake_quantize_static(y, scale, "int8/tensor"))


@norms
def test_calibration_sets_it(kind: Kind) -> None:
    from fxquant.calibration import Calibration

    module, x = kind.module(), kind.input()
    y = module(x)
    model = nn.ModuleDict({"m": module})
    fxquant.quantize(model, "int8dq", rules={"m": "x=int8/tensor"})
    assert isinstance(module, QModule)
    with Calibration(model):
        assert_equal(module(x), y)
    scale = y.detach().abs().max() / 127
    assert module.output_scale is not None
    torch.testing.assert_close(module.output_scale, scale, rtol=2.0**-22, atol=0.0)
    assert_equal(module(x), reference.fake_quantize_static(y, module.output_scale, "int8/tensor"))


@norms
def test_the_gradient_goes_straight_through(kind: Kind) -> None:
    module, x = kind.module(), kind.input()
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    want = x.clone().requires_grad_()
    module(want).backward(grad)
    parameters = {name: p.grad for name, p in module.named_parameters()}
    module.zero_grad()
    q = quantized(module, "int8dq")
    got = x.clone().requires_grad_()
    q(got).backward(grad)
    assert want.grad is not None
    assert got.grad is not None
    assert_equal(got.grad, want.grad)
    for name, p in q.named_parameters():
        assert p.grad is not None
        assert_equal(p.grad, parameters[name])  # pyright: ignore[reportArgumentType]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.rms = nn.RMSNorm(8)
        self.fc = nn.Linear(8, 8)


@pytest.mark.parametrize(
    ("options", "quantized_norms"),
    [
        ({"config": "int8dq"}, []),
        ({"config": "int8dq", "rules": {"*": "int8wo"}}, []),
        ({"config": "int8dq", "rules": {"b": "int8dq"}}, []),  # below a path whose linears have a rule
        ({"config": "int8dq", "rules": {"b.norm": "x=int8"}}, ["b.norm"]),
        ({"config": "int8dq", "rules": {"*r*m*": "x=int8", "b.rms": None}}, ["b.norm"]),
        ({"config": "int8dq", "rules": {"b.norm": "x=int8", "b.rms": "x=fp8"}, "exclude": "b.rms"}, ["b.norm"]),
        ({"config": "none", "rules": {"b.r*": "w=none x=fp8/tensor"}}, ["b.rms"]),
        ({"weights": "int8", "activations": "int8", "rules": {"*norm": "x=int8"}}, ["b.norm"]),
    ],
    ids=str,
)
def test_only_a_rule_without_weights_names_a_norm(options: dict[str, Any], quantized_norms: list[str]) -> None:
    model = nn.ModuleDict({"b": Block()})
    report = fxquant.quantize(model, options.pop("config", None), **options)
    assert [row.path for row in report.quantized if row.kind == "norm"] == quantized_norms
    assert not [row for row in report.skipped if row.kind == "norm"]  # nothing to tell of them
    found = [path for path, module in model.named_modules() if isinstance(module, (QLayerNorm, QRMSNorm))]
    assert found == quantized_norms


@pytest.mark.parametrize("pattern", ["b", "b.fc", "*"])
def test_activations_without_weights_are_refused_for_a_linear(pattern: str) -> None:
    model = nn.ModuleDict({"b": Block()})
    words = f"'{pattern if pattern == '*' else 'b'}"
    with pytest.raises(InvalidOption, match=r"'b.fc' is a linear: quantized activations need quantized weights") as e:
        fxquant.quantize(model, "int8dq", rules={pattern: "x=int8"})
    assert words in str(e.value)
    assert not [m for m in model.modules() if isinstance(m, QModule)]


def test_a_config_says_what_a_norm_gets() -> None:
    config = QuantConfig("int8dq", rules={"*.norm": "x=int8", "*.rms": "int8wo"})
    assert config.spec_for("a.norm", "norm").spec == LinearSpec.parse("x=int8/token")
    assert config.spec_for("a.norm", "norm").reason == 'rule "*.norm=w=none x=int8/token"'
    assert config.spec_for("a.rms", "norm").spec is None
    assert "a rule names it by activations alone" in config.spec_for("a.rms", "norm").reason
    assert config.spec_for("a.other", "norm") == config.default_for("norm")
    assert config.default_for("norm").spec is None
    assert QuantConfig.from_json(config.to_json()) == config


def test_the_report_counts_no_weights_of_norms() -> None:
    model = nn.ModuleDict({"b": Block()})
    report = fxquant.quantize(model, "int8dq", rules={"*.norm": "x=int8", "*.rms": "x=int8"})
    assert report.share == report.linear_share == 1.0
    assert report.bytes_before == 8 * 8 * 4
    assert [row.parameters for row in report.rows if row.kind == "norm"] == [0, 0]
    assert str(model["b"].norm) == "QLayerNorm((8,), eps=1e-05, elementwise_affine=True, bias=True, y=int8/token)"


def test_keywords_are_torchs() -> None:
    for name, word in (("layer-norm", "input"), ("rms-norm", "x")):
        q = quantized(NORMS[name].module(), "int8dq")
        assert_equal(q(**{word: NORMS[name].input()}), q(NORMS[name].input()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@norms
def test_autocast_is_as_torchs(kind: Kind, dtype: torch.dtype) -> None:
    module, x = kind.module(), kind.input()
    with torch.autocast("cpu", dtype=dtype):
        y = module(x)
        assert_equal(quantized(module, "int8dq")(x), reference.fake_quantize(y, "int8/token"))
