"""Each rule: what it takes, what it makes of it, and why it says no."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.annotation import PassResult, note_of
from fxquant.dump import text
from fxquant.graphs import value_of
from fxquant.lowering import Packed, select_kernels
from fxquant.lowering.rules import RULES, Int8Dynamic, Int8Shared, Int8WeightOnly
from fxquant.lowering.site import quantized_sites
from fxquant.spec import PRESETS, QuantConfig
from fxquant.target import Target
from fxquant.weights import WeightStore
from tests.helpers import capture
from tests.lowering.helpers import CPU, NO_KERNEL, arguments_of, bound, call_bound, selected, targets
from tests.passes.helpers import Linears, X, assert_same_graph, assert_values_are_true, nodes_of, run, staged
from tests.twins import U, assert_within, int8_linear_float64

fx = torch.ops.fxquant
LINEAR = torch.ops.aten.linear.default
APART = QuantConfig("int8dq", fuse=False)


class Lowered(nn.Module):
    """Linears a and b with their int8 codes as buffers, and what the rules should write."""

    def __init__(self, forward: Any, dtype: torch.dtype = torch.float32, bias: bool = True) -> None:
        super().__init__()
        plain = Linears(lambda m, x: None, bias=bias).to(dtype)
        for name in "ab":
            linear = plain.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            codes, scale, *_ = fx.quantize_weight.default(linear.weight, "int8/channel")
            self.register_buffer(f"{name}_codes", codes)
            self.register_buffer(f"{name}_scale", scale)
            self.register_parameter(f"{name}_bias", linear.bias)
        self.compute = forward

    def forward(self, x: Tensor) -> Any:
        return self.compute(self, x)


def check(before: Any, after: Any, config: QuantConfig | str, x: Tensor = X, bias: bool = True) -> None:
    """Rules turn `before` into `after`; the result runs, and second time there is nothing left to do."""
    captured = selected(Linears(before, bias=bias).to(x.dtype), x, config=config)
    assert_same_graph(captured.gm, capture(Lowered(after, x.dtype, bias), x).gm)
    assert_values_are_true(captured.gm, [x])
    assert select_kernels(captured.gm, CPU) == PassResult()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_int8_dynamic_quantizes_inside_the_kernel(dtype: torch.dtype, bias: bool) -> None:
    def after(m: Any, x: Tensor) -> Tensor:
        return F.silu(fx.int8_linear_dynamic.default(x, fx.int8_pack.default(m.a_codes), m.a_scale, m.a_bias, 16))

    check(lambda m, x: F.silu(m.a(x)), after, "int8dq", X.to(dtype), bias)


def test_int8_weight_only_takes_a_float_x() -> None:
    def after(m: Any, x: Tensor) -> Tensor:
        return fx.int8_linear_weight_only.default(x, fx.int8_pack.default(m.a_codes), m.a_scale, m.a_bias, 16)

    check(lambda m, x: m.a(x), after, "int8wo")


def test_int8_shared_takes_codes_that_several_products_read() -> None:
    def after(m: Any, x: Tensor) -> Tensor:
        codes, scale = fx.int8_quantize_per_token.default(x)
        a, b = (
            fx.int8_linear.default(codes, scale, fx.int8_pack.default(w), s, bias, 16, torch.float32)
            for w, s, bias in ((m.a_codes, m.a_scale, m.a_bias), (m.b_codes, m.b_scale, m.b_bias))
        )
        return a + b

    check(lambda m, x: m.a(x) + m.b(x), after, APART)


def test_codes_that_a_float_product_reads_too_are_kept_for_it() -> None:
    """A sibling with float weights has no integer product: it reads the same codes, as floats."""
    config = QuantConfig("int8dq", rules={"b": "w=fp8/channel x=int8/token"})
    model = Linears(lambda m, x: m.a(x) + m.b(x))
    reference = staged(model, X, config=config)
    wanted = run(reference.gm, [X])
    captured = selected(model, X, config=config)
    kernels = [name for name in targets(captured.gm) if "pack" not in name]
    assert sorted(kernels) == ["fake_quantize", "int8_linear", "int8_quantize_per_token", "linear_weight_only"]
    torch.testing.assert_close(run(captured.gm, [X]), wanted, rtol=0, atol=1e-6)  # 16 products of size 1/4: 16 u * 4


def test_under_autocast_the_kernel_gives_the_dtype_of_the_product() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return m.a(x)

    captured = selected(Linears(forward), X)
    assert targets(captured.gm) == ["int8_quantize_per_token", "int8_pack", "int8_linear"]
    (site,) = nodes_of(captured.gm, fx.int8_linear.default)
    assert value_of(site).dtype is torch.bfloat16
    assert_values_are_true(captured.gm, [X])


@pytest.mark.parametrize("preset", ["int8dq", "int8wo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_kernels_stay_within_the_bound_of_their_arithmetic(preset: str, dtype: torch.dtype) -> None:
    x = X.to(dtype)
    captured = selected(Linears(lambda m, x: m.a(x), bias=True).to(dtype), x, config=preset)
    (got,) = run(captured.gm, [x])
    gm = captured.gm
    codes, scale, bias = (getattr(gm, f"a_{part}") for part in ("codes", "scale", "bias"))
    unit = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    if preset == "int8dq":
        x_codes, x_scale = fx.int8_quantize_per_token.default(x)
        want, bound = int8_linear_float64(x_codes, x_scale, codes, scale, bias.detach(), unit)
    else:
        total = x.double() @ codes.double().t()
        want = total * scale.double().t() + bias.detach().double()
        sums = x.double().abs() @ codes.double().abs().t() * scale.double().t()
        bound = (16 * U) * sums + 2 * U * (total * scale.double().t()).abs() + (U + unit) * want.abs()
    # Half precision: below its smallest normal number the rounding is absolute.
    assert_within(got, want, bound * (1 + 2.0**-8) + (2.0**-25 if dtype is torch.float16 else 0.0))


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_product_that_feeds_the_next_one(preset: str) -> None:
    """The second site's x is the node that the first one's kernel has just replaced."""
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4), nn.Linear(4, 4))
    captured = staged(model, X, config=preset)
    wanted = run(captured.gm, [X])
    result = select_kernels(captured.gm, CPU)
    assert result.changed + len(result.declined) == 3
    assert_values_are_true(captured.gm, [X])
    torch.testing.assert_close(run(captured.gm, [X]), wanted, rtol=0, atol=1e-2)  # a code may round the other way


# Refusals.


def reasons_of(model: nn.Module, config: QuantConfig | str, target: Target = CPU, x: Tensor = X) -> dict[str, str]:
    captured = staged(model, x, config=config)
    (site,) = quantized_sites(captured.gm)
    return {rule.kernel: rule.why_not(site, target) for rule in RULES if rule.kind == "linear"}


ONE = Linears(lambda m, x: m.a(x))
NOT_INT8 = "the weight is {}, the rule wants int8/channel"
FLOAT_X = "x is float, the rule wants int8/token"
NO_SHIFT = "the rule wants integers, symmetric or with an integer zero point"
WHOLE_QUADS = "integer sums want whole rows or groups of a multiple of 4"


@pytest.mark.parametrize(
    ("config", "weight"),
    [
        ("int4wo", "int4/group128/affine/bf16"),
        ("int4wo-g32", "int4/group32/affine/bf16"),
        ("fp8wo", "float8_e4m3fn/channel"),
        (QuantConfig(weights="int8/tensor"), "int8/tensor"),
    ],
)
def test_float_x_and_weights_that_are_not_int8_by_rows(config: QuantConfig | str, weight: str) -> None:
    assert reasons_of(ONE, config) == {
        "int8_linear_dynamic": FLOAT_X,
        "int8_linear": FLOAT_X,
        "int8_linear_weight_only": NOT_INT8.format(weight),
        "linear_dynamic": FLOAT_X,
        "linear_weight_only": "",
    }


def test_activations_that_integer_sums_do_not_take() -> None:
    why = "x is int8/tensor, the rule wants int8/token"
    or_groups = ", or groups of a multiple of 4 with float32 scales"
    assert reasons_of(ONE, QuantConfig(weights="int8", activations="int8/tensor")) == {
        "int8_linear_dynamic": why,
        "int8_linear": why,
        "int8_linear_weight_only": "x is quantized to int8/tensor, the rule wants a float x",
        "linear_dynamic": why + or_groups,
        "linear_weight_only": "",
    }


@pytest.mark.parametrize(
    ("weights", "why"),
    [
        ("int4/group32/shift", f"the weight is int4/group32/shift, {NO_SHIFT}"),
        ("float8_e4m3fn/channel", f"the weight is float8_e4m3fn/channel, {NO_SHIFT}"),
        ("int4/group6", f"the weight is scaled per group6, {WHOLE_QUADS}"),
        ("int4/block64x64", f"the weight is scaled per block64x64, {WHOLE_QUADS}"),
    ],
)
def test_weights_that_integer_sums_do_not_take(weights: str, why: str) -> None:
    reasons = reasons_of(ONE, QuantConfig(weights=weights, activations="int8"))
    assert (reasons["linear_dynamic"], reasons["linear_weight_only"]) == (why, "")


@pytest.mark.parametrize(
    ("config", "kernels"),
    [
        (QuantConfig(weights="int4", group_size=64, activations="int8"), ["linear_dynamic"]),
        (QuantConfig(weights="int3/channel", activations="int8"), ["linear_dynamic"]),
        (QuantConfig(weights="int8/channel", activations="int8/group32"), ["linear_dynamic"]),
        (QuantConfig("w=int8/group16 x=int8/group8"), ["linear_dynamic"]),
        (QuantConfig("w=int8/group16 x=int8/group6"), ["fake_quantize", "linear_weight_only"]),
        (QuantConfig("w=int8/group16 x=int8/group16/e8m0"), ["fake_quantize", "linear_weight_only"]),
        (QuantConfig(weights="int4/group6", activations="int8"), ["fake_quantize", "linear_weight_only"]),
        ("fp8dq", ["fake_quantize", "linear_weight_only"]),
        ("nvfp4", ["fake_quantize", "linear_weight_only"]),
        ("mxfp4wo", ["linear_weight_only"]),
        (QuantConfig(weights="int8/block64x64"), ["linear_weight_only"]),
    ],
)
def test_every_other_format_runs_on_the_kernels_that_decode(config: QuantConfig | str, kernels: list[str]) -> None:
    captured = selected(ONE, X, config=config)
    assert [name for name in targets(captured.gm) if not name.startswith("pack")] == kernels
    assert_values_are_true(captured.gm, [X])


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(70, 70, 3, groups=70, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(x)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_grouped_convolution_takes_the_bytes_of_its_format(preset: str) -> None:
    x = torch.randn(2, 70, 5, 6, generator=torch.Generator().manual_seed(1))
    model = Depthwise()
    wanted = run(staged(model, x, config=preset).gm, [x])
    captured, binding, args = bound(model, x, config=preset)
    assert [name for name in targets(captured.gm) if name != "fake_quantize"] == ["decode_rows"]
    spec = PRESETS[preset].weights
    assert spec is not None
    packed = [
        t
        for t, taken in zip(arguments_of(binding, args, WeightStore()), binding.arguments, strict=True)
        if isinstance(taken, Packed)
    ]
    assert sum(t.nbytes for t in packed) == spec.nbytes([70, 9])
    # The same float kernel on the same values.
    torch.testing.assert_close(call_bound(captured.gm, binding, args), wanted, rtol=0, atol=0)


def test_x_is_rounded_once_for_siblings_that_are_not_joined() -> None:
    model = Linears(lambda m, x: m.a(x) + m.b(x))
    reference = staged(model, X, config=QuantConfig("fp8dqrow", fuse=False))
    wanted = run(reference.gm, [X])
    captured = selected(model, X, config=QuantConfig("fp8dqrow", fuse=False))
    kernels = [name for name in targets(captured.gm) if "pack" not in name]
    assert kernels == ["fake_quantize", "linear_weight_only", "linear_weight_only"]
    torch.testing.assert_close(run(captured.gm, [X]), wanted, rtol=0, atol=1e-6)  # 16 products of size 1/4: 16 u * 4


@pytest.mark.parametrize("config", ["int8dq", "int8wo"])
def test_a_machine_without_the_kernel(config: str) -> None:
    why = "this machine has no compiled kernels (see the warning about the compiler)"
    assert why in reasons_of(ONE, config, NO_KERNEL).values()
    captured = selected(ONE, X, config=config, target=NO_KERNEL)
    assert len(nodes_of(captured.gm, LINEAR)) == 1


def test_another_device() -> None:
    captured = staged(ONE, X)
    (site,) = quantized_sites(captured.gm)
    site.weight.codes.meta["val"] = torch.empty(8, 16, dtype=torch.int8, device="meta")
    assert Int8Dynamic().why_not(site, CPU) == "the weight is on meta, the kernel is for the CPU"


def test_sums_that_may_overflow() -> None:
    k = 2**24 + 1
    captured = staged(nn.Linear(k, 1, bias=False), torch.zeros(1, k), evaluate=False)
    (site,) = quantized_sites(captured.gm)
    why = "in_features is 16777217: above 16777216 a column's sum of codes may overflow"
    assert Int8Dynamic().why_not(site, CPU) == why


def test_a_float_kernel_gives_what_it_takes() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return m.a(x)

    captured = staged(Linears(forward), X, config="int8wo")
    (site,) = quantized_sites(captured.gm)
    why = "x is torch.float32, the product torch.bfloat16: the kernel gives what it takes"
    assert Int8WeightOnly().why_not(site, CPU) == why


def test_codes_with_other_readers() -> None:
    captured = staged(Linears(lambda m, x: m.a(x) + m.b(x)), X, config=APART)
    one, other = quantized_sites(captured.gm)
    for site in (one, other):
        assert Int8Dynamic().why_not(site, CPU) == "other products read the same codes of x"
        assert Int8Shared().why_not(site, CPU) == ""
    assert (one.weight.in_features, one.dtype, one.weight.device_type) == (16, torch.float32, "cpu")


def test_what_no_rule_takes_keeps_running_and_is_reported_with_every_reason() -> None:
    captured = staged(ONE, X, config=QuantConfig(weights="int4/channel1"))
    wanted, before = run(captured.gm, [X]), text(captured.gm)
    result = select_kernels(captured.gm, CPU)
    assert result.changed == 0
    (declined,) = result.declined
    assert declined.where == "a"
    assert declined.reason == (
        "runs as dequantize + linear. int8_linear_dynamic, int8_linear, linear_dynamic: x is float, the rule wants "
        "int8/token; int8_linear_weight_only: the weight is int4/channel1, the rule wants int8/channel; "
        "linear_weight_only: the weight is scaled per channel1, the kernel wants scales of rows or pieces of rows"
    )
    (site,) = nodes_of(captured.gm, LINEAR)
    assert note_of(site).reason == declined.reason
    assert text(captured.gm) != before  # the reason stands in the text
    torch.testing.assert_close(run(captured.gm, [X]), wanted, rtol=0, atol=0)


def test_the_kernel_is_written_on_its_node() -> None:
    captured = selected(Linears(lambda m, x: m.a(x) * m.b(x)), X)
    (site,) = nodes_of(captured.gm, fx.int8_linear_dynamic.default)
    note = note_of(site)
    assert (note.kernel, note.paths, note.spec) == ("int8_linear_dynamic", ("a", "b"), PRESETS["int8dq"])
    assert note.made_by == ("fuse-siblings", "lower")
    assert note.source.startswith("test_rules.py:")


def test_without_rules_nothing_is_lowered() -> None:
    captured = staged(ONE, X)
    assert select_kernels(captured.gm, CPU, rules=()).changed == 0
