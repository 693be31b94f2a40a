"""The rules for Triton kernels: what each takes on which architecture, what it makes of it, and why it says no."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxquant.annotation import note_of
from fxquant.graphs import CapturedGraph, value_of
from fxquant.lowering import select_kernels
from fxquant.lowering.plans import no_triton_kernel, problem_of
from fxquant.lowering.rules import RULES, TRITON_RULES, rules_for
from fxquant.lowering.site import quantized_sites
from fxquant.lowering.tiled import TiledCodes, TiledFloat
from fxquant.numerics.tiles import scaled_by_blocks
from fxquant.pipeline import quantize_graph
from fxquant.report import ModelReport
from fxquant.runner import Deciding
from fxquant.spec import PRESETS, QuantConfig, TensorSpec
from fxquant.target import ARCHS, M_BUCKETS, Plan, Problem, Target
from fxquant.target.config import kernel_id
from fxquant.triton_kernels import KERNELS
from tests.helpers import capture
from tests.lowering.helpers import CPU, bound, call_bound, selected, targets
from tests.passes.helpers import Linears, X, assert_values_are_true, nodes_of, run, staged

fx = torch.ops.fxquant
K, N = 64, 48
WIDE = torch.rand(5, K, generator=torch.Generator().manual_seed(0)) * 2 - 1
LAYOUTS = {"tile_codes", "transpose_granules", "pack_rows"}


def gpu(arch: str) -> Target:
    return Target("cuda", arch=arch)


@functools.cache
def quantized(preset: str, dtype: torch.dtype = torch.float16) -> CapturedGraph:
    torch.manual_seed(1)
    return staged(nn.Linear(K, N).to(dtype), WIDE.to(dtype), config=preset)


def kernels_in(captured: CapturedGraph) -> list[str]:
    return [name for name in targets(captured.gm) if name not in LAYOUTS]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_a_kernel_on_every_architecture(preset: str, arch: str) -> None:
    spec = PRESETS[preset]
    captured = quantized(preset).copy()
    result = select_kernels(captured.gm, gpu(arch))
    assert (result.changed, result.declined) == (1, [])
    problem = Problem("linear", 0, N, K, str(spec.weights), str(spec.activations or ""), "float16")
    multiplies_codes = spec.activations is not None and not no_triton_kernel(problem, arch)
    (site,) = [n for n in captured.gm.graph.nodes if note_of(n).kernel]
    if multiplies_codes:
        assert kernels_in(captured) == ["quantize_dynamic", "tiled_linear_codes"]
    else:
        rounds = ["quantize_dynamic", "dequantize"] if spec.activations else []
        assert kernels_in(captured) == [*rounds, "tiled_linear"]
        assert ("no kernel of" in note_of(site).reason) == (spec.activations is not None)
    assert note_of(site).kernel.split()[0] in KERNELS
    assert arch in note_of(site).kernel


@pytest.mark.parametrize(
    ("preset", "archs"),
    [
        ("int8dq", set(ARCHS)),
        ("int4dq", set(ARCHS)),
        ("mxfp4", {"sm100"}),
    ],
)
def test_codes_are_multiplied_where_the_hardware_does(preset: str, archs: set[str]) -> None:
    (site,) = quantized_sites(quantized(preset).gm)
    taken = {arch for arch in ARCHS if not TiledCodes().why_not(site, gpu(arch))}
    assert taken >= archs
    for arch in set(ARCHS) - taken:
        why = TiledCodes().why_not(site, gpu(arch))
        assert why.startswith(f"on {arch} no kernel takes {site.spec.activations} x with {site.weight.spec} (")
        assert not TiledFloat().why_not(site, gpu(arch))


@pytest.mark.parametrize("preset", PRESETS)
def test_numbers_are_those_of_the_reference_form(preset: str) -> None:
    captured = quantized(preset, torch.float32)
    wanted = run(captured.gm, [WIDE])
    for arch in ("sm80", "sm100"):
        copy = captured.copy()
        select_kernels(copy.gm, gpu(arch))
        assert_values_are_true(copy.gm, [WIDE])
        # K products of at most 1/8 each, and five roundings of scales.
        torch.testing.assert_close(run(copy.gm, [WIDE]), wanted, rtol=0, atol=(K + 5) * 2.0**-24 * 8)


def test_tiled_codes_writes_this() -> None:
    captured = selected(Linears(lambda m, x: m.a(x), bias=True), X, config="int8dq", target=gpu("sm90"))
    (site,) = nodes_of(captured.gm, fx.tiled_linear_codes.default)
    args: Any = site.args
    codes, scale, whole, x_spec, tiles, w_scale, zero, tensor_scale, bias, residual, activation, *tail, plan = args
    k, spec, dtype = tail
    assert (whole, x_spec, zero, tensor_scale, residual, activation) == (None, "int8/token", None, None, None, "")
    assert (k, spec, dtype) == (16, "int8/channel", torch.float32)
    assert [n.args[0].target for n in (codes, scale)] == [fx.quantize_dynamic.default] * 2
    assert (tiles.target, w_scale.target) == (fx.tile_codes.default, fx.transpose_granules.default)
    assert bias.op == "get_attr"
    assert plan[0] in M_BUCKETS
    note = note_of(site)
    assert note.made_by[-1] == "lower"
    assert note.kernel.split(" (")[1].startswith(("heuristic sm90", "modelled sm90"))


def test_weights_that_stay_in_their_storage_form() -> None:
    captured = selected(nn.Linear(K, N), WIDE, config="mxfp4", target=gpu("sm100"))
    (site,) = nodes_of(captured.gm, fx.tiled_linear_codes.default)
    args: Any = site.args
    assert args[4].target is fx.pack_rows.default
    assert args[5].op == "get_attr"
    assert args[0].target is fx.pack_rows.default  # codes of x, two a byte
    assert value_of(args[0]).shape == (5, K // 2)


@pytest.mark.parametrize("preset", ["int8dq", "int4wo", "mxfp4"])
def test_weights_are_laid_out_by_the_store(preset: str) -> None:
    model = nn.Linear(K, N)
    wanted = run(staged(model, WIDE, config=preset).gm, [WIDE])
    captured, binding, args = bound(model, WIDE, config=preset, target=gpu("sm90"))
    assert not LAYOUTS & set(targets(captured.gm))
    names = [str(n.target) for n in captured.gm.graph.find_nodes(op="placeholder")]
    assert any(name.endswith(("_tiles", "_rows")) for name in names)
    torch.testing.assert_close(call_bound(captured.gm, binding, args), wanted, rtol=0, atol=1e-5)


def test_siblings_share_the_codes_of_x() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.a(x) + m.b(x) * m.c(x)

    rules = {"b": "w=int4/group8 x=int8/token", "c": "w=fp8/channel x=int8/token"}
    config = QuantConfig("int8dq", rules=rules, fuse=False)
    model = Linears(forward)
    wanted = run(staged(model, X, config=config).gm, [X])
    captured = selected(model, X, config=config, target=gpu("sm90"))
    assert kernels_in(captured).count("quantize_dynamic") == 1
    assert {"tiled_linear_codes"} <= set(kernels_in(captured))
    torch.testing.assert_close(run(captured.gm, [X]), wanted, rtol=0, atol=1e-5)


def test_under_autocast_x_is_cast_to_the_dtype_of_the_product() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return m.a(x)

    for preset, name in (("int4wo", "tiled_linear"), ("int8dq", "tiled_linear_codes")):
        captured = selected(Linears(forward), X, config=preset, target=gpu("sm90"))
        (site,) = nodes_of(captured.gm, getattr(fx, name).default)
        assert value_of(site).dtype is torch.bfloat16
        assert_values_are_true(captured.gm, [X])


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_plan_serves_every_number_of_rows(dynamic: bool) -> None:
    captured = staged(nn.Linear(K, N), torch.rand(300, K), dynamic=dynamic)
    select_kernels(captured.gm, gpu("sm90"))
    (site,) = nodes_of(captured.gm, fx.tiled_linear_codes.default)
    ints: Any = site.args[-1]
    plan = Plan.from_ints(ints, {kernel_id(k.name): (k.name, k.fields) for k in KERNELS.values()})
    assert plan.rows[-1].limit == M_BUCKETS[-1]
    shown = plan.row(M_BUCKETS[-1] if dynamic else 300).config
    assert note_of(site).kernel.startswith(str(shown))


# Refusals.


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ("int4wo", "x is float, the rule wants codes"),
        (
            QuantConfig(weights="int4/group32/shift", activations="int8"),
            "on sm90 no kernel takes int8/token x with int4/group32/shift (",
        ),
        (
            QuantConfig(weights="int4/channel1", activations="int8"),
            "the weight is scaled per channel1, tiles have scales of rows or pieces of rows",
        ),
    ],
)
def test_what_the_product_of_codes_does_not_take(config: QuantConfig | str, why: str) -> None:
    (site,) = quantized_sites(staged(Linears(lambda m, x: m.a(x)), X, config=config).gm)
    assert TiledCodes().why_not(site, gpu("sm90")).startswith(why)


def test_what_no_rule_takes_keeps_running_and_says_why() -> None:
    captured = staged(Linears(lambda m, x: m.a(x)), X, config=QuantConfig(weights="int4/channel1"))
    wanted = run(captured.gm, [X])
    (declined,) = select_kernels(captured.gm, gpu("sm90")).declined
    assert declined.reason == (
        "runs as dequantize + linear. tiled_linear_codes: x is float, the rule wants codes; "
        "tiled_linear: the weight is scaled per channel1, tiles have scales of rows or pieces of rows"
    )
    torch.testing.assert_close(run(captured.gm, [X]), wanted, rtol=0, atol=0)


def test_sums_that_may_overflow() -> None:
    k = 2**24 + 1
    captured = staged(nn.Linear(k, 1, bias=False), torch.zeros(1, k), evaluate=False)
    (site,) = quantized_sites(captured.gm)
    assert TiledFloat().why_not(site, gpu("sm90")).startswith("in_features is 16777217: above 16777216")


@pytest.mark.parametrize("device", ["mps", "xpu", "meta"])
def test_devices_without_kernels_say_so_by_name(device: str) -> None:
    captured = staged(Linears(lambda m, x: m.a(x)), X)
    (declined,) = select_kernels(captured.gm, Target(device)).declined
    assert declined.reason == f"no kernels for {device}: runs as dequantize + linear"


def test_an_old_gpu_has_no_rules() -> None:
    captured = staged(Linears(lambda m, x: m.a(x)), X)
    (declined,) = select_kernels(captured.gm, Target("cuda")).declined
    assert declined.reason == "no kernels for cuda: runs as dequantize + linear"


def test_rules_are_chosen_by_what_the_target_can_do() -> None:
    assert rules_for(gpu("sm80")) is TRITON_RULES
    assert rules_for(CPU) is RULES
    assert rules_for(Target("mps")) is RULES


# The rest of the kinds.


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 32)
        self.conv = nn.Conv1d(32, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.conv(self.table(ids).transpose(1, 2)).transpose(1, 2))


@pytest.mark.parametrize("preset", ["int8dq", "int4wo-g32"])
def test_tables_and_convolutions(preset: str) -> None:
    ids = torch.tensor([[1, 2, 9], [0, 3, 3]])
    config = QuantConfig(preset, rules={"table": "int4wo-g32" if preset != "int8dq" else "int8wo"})
    torch.manual_seed(3)
    model = Mixed()
    wanted = run(staged(model, ids, config=config).gm, [ids])
    captured = selected(model, ids, config=config, target=gpu("sm90"))
    names = kernels_in(captured)
    assert {"embedding_dequantize", "decode_rows"} <= set(names)
    torch.testing.assert_close(run(captured.gm, [ids]), wanted, rtol=0, atol=1e-5)
    (conv,) = nodes_of(captured.gm, torch.ops.aten.convolution.default)
    assert note_of(conv).reason == "decoded at each call, then a float convolution: no Triton kernel multiplies patches"


def test_the_report_names_choice_and_source() -> None:
    captured = capture(nn.Sequential(nn.Linear(K, N), nn.Linear(N, K)), WIDE)
    config = QuantConfig("mxfp4")
    lowered = quantize_graph(captured, config, Deciding(config), target=gpu("sm80"))
    words = str(ModelReport.of_graphs([lowered.report]))
    assert "(heuristic sm80" in words or "(modelled sm80" in words
    if no_triton_kernel(Problem("linear", 0, N, K, "mxfp4", "mxfp4", "float32"), "sm80"):
        assert "no kernel of sm80 multiplies its codes with fp4_e2m1/group32/e8m0" in words


def test_problems_of_sites() -> None:
    (site,) = quantized_sites(quantized("int8dq").gm)
    assert problem_of(site, None) == Problem("linear", 0, N, K, "int8/channel", "", "float16")
    assert problem_of(site, TensorSpec.parse("int8/token")).activations == "int8/token"
    assert scaled_by_blocks(TensorSpec.parse("mxfp8"), TensorSpec.parse("nvfp4"))
    assert not scaled_by_blocks(TensorSpec.parse("mxfp8"), None)
