"""QLinear in every preset: rounded, frozen, stored, moved, compiled."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fxquant
from fxquant.errors import FrozenWeight
from fxquant.nn import QLinear
from fxquant.spec import PRESETS

FEW = ("int8wo", "int8dq", "int4wo", "int4dq", "int2wo", "fp8dq", "fp6_e3m2", "mxfp4", "nvfp4")


def linear(preset: str, n: int = 24, k: int = 200, dtype: torch.dtype = torch.float32, bias: bool = True) -> QLinear:
    torch.manual_seed(0)
    module = nn.Linear(k, n, bias=bias).to(dtype)
    fxquant.quantize(module, preset)
    assert isinstance(module, QLinear)
    return module


def rounded(preset: str, t: Tensor, side: str) -> Tensor:
    """What a tensor becomes, by the ops that tests/numerics prove."""
    spec = getattr(PRESETS[preset], side)
    if spec is None:
        return t
    if side == "activations":
        return torch.ops.fxquant.fake_quantize(t, str(spec))
    codes, scale, zero_point, whole = torch.ops.fxquant.quantize_weight(t, str(spec), PRESETS[preset].algorithm)
    zeros, whole = (part if part.numel() else None for part in (zero_point, whole))
    return torch.ops.fxquant.dequantize(codes, scale, zeros, str(spec), t.dtype, whole)


def bound(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Two sums of K products in float32 in different orders, x and weight rounded to `dtype` between, one result."""
    unit = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    sums = x.double().abs() @ weight.double().abs().t()
    most = sums if bias is None else sums + bias.double().abs()
    return 2 * (x.shape[-1] + 4) * 2.0**-24 * sums + 4 * unit * most + 1e-30


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_computes_with_rounded_weights_and_inputs(preset: str, dtype: torch.dtype) -> None:
    module = linear(preset, dtype=dtype)
    x = torch.randn(5, 200).to(dtype)
    weight, seen = rounded(preset, module.weight.detach(), "weights"), rounded(preset, x, "activations")
    want = nn.functional.linear(seen.double(), weight.double(), module.bias.detach().double())
    most = bound(seen, weight, module.bias.detach(), dtype)
    with torch.no_grad():
        assert ((module(x).double() - want).abs() <= most).all()
        fxquant.freeze(module)
        assert ((module(x).double() - want).abs() <= most).all()


@pytest.mark.parametrize("preset", PRESETS)
def test_frozen_weights_are_the_codes_that_it_rounded_to(preset: str) -> None:
    module = linear(preset)
    want = rounded(preset, module.weight.detach(), "weights")
    before = module.quantized_weight()
    fxquant.freeze(module)
    after = module.quantized_weight()
    assert torch.equal(before.codes.view(torch.uint8), after.codes.view(torch.uint8))
    assert torch.equal(module.weight, want)
    assert after.nbytes == PRESETS[preset].weights.nbytes((24, 200))  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("shape", [(1, 1), (8, 64), (70, 33), (64, 128)])
def test_a_state_dict_gives_the_same_module_again(preset: str, shape: tuple[int, int]) -> None:
    module = linear(preset, *shape)
    fxquant.freeze(module)
    state = {name: t.clone() for name, t in module.state_dict().items()}
    assert "weight" not in state
    assert state["weight_codes"].dtype is torch.uint8
    other = linear(preset, *shape)
    with torch.no_grad():
        other.weight.zero_()
    assert not any(other.load_state_dict(state, strict=True))
    x = torch.randn(3, shape[1])
    with torch.no_grad():
        assert torch.equal(other(x), module(x))
    assert other.is_frozen


@pytest.mark.parametrize(("met", "wanted"), [("int8wo", "fp8wo"), ("fp4_e2m1", "fp6_e2m3")])
def test_codes_of_another_format_are_refused(met: str, wanted: str) -> None:
    module, other = linear(met), linear(wanted)
    fxquant.freeze(module)
    with pytest.raises(RuntimeError, match=f"codes of {PRESETS[met].weights}"):
        other.load_state_dict(module.state_dict())


def test_loading_says_what_does_not_fit() -> None:
    module, other = linear("int4wo"), linear("int8wo")
    fxquant.freeze(module)
    with pytest.raises(RuntimeError, match="weight: not the codes of int8/channel"):
        other.load_state_dict(module.state_dict())
    with pytest.raises(RuntimeError, match="float, but the module is frozen"):
        module.load_state_dict(nn.Linear(200, 24).state_dict())
    state = module.state_dict()
    del state["weight_scale"]
    with pytest.raises(RuntimeError, match="weight: not the codes of int4"):
        module.load_state_dict(state)
    with pytest.raises(RuntimeError, match="weight_codes"):
        module.load_state_dict({"bias": module.bias})


@pytest.mark.parametrize("preset", FEW)
def test_copies_and_pickles_are_equal(preset: str) -> None:
    module = linear(preset)
    x = torch.randn(4, 200)
    for frozen in (False, True):
        if frozen:
            fxquant.freeze(module)
        with torch.no_grad():
            want = module(x)
            for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
                assert torch.equal(twin(x), want)
                assert twin.is_frozen is frozen


@pytest.mark.parametrize("preset", FEW)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_changes_what_it_computes_in_and_no_code(preset: str, dtype: torch.dtype) -> None:
    module = linear(preset)
    fxquant.freeze(module)
    before = copy.deepcopy(module.quantized_weight())
    module.to(dtype)
    after = module.quantized_weight()
    assert torch.equal(before.scale.float(), after.scale.float())
    assert torch.equal(before.codes.view(torch.uint8), after.codes.view(torch.uint8))
    assert module.weight.dtype is dtype
    assert module.bias.dtype is dtype
    with torch.no_grad():
        assert module(torch.randn(2, 200, dtype=dtype)).dtype is dtype


def test_module_type_does_not_reach_the_codes() -> None:
    module = linear("int4wo")
    fxquant.freeze(module)
    before = module.quantized_weight()
    module.type(torch.bfloat16)
    assert torch.equal(module.quantized_weight().codes, before.codes)


@pytest.mark.parametrize("preset", FEW)
def test_gradients_of_a_rounded_weight_go_straight_through(preset: str) -> None:
    module = linear(preset)
    x = torch.randn(5, 200, requires_grad=True)
    grad = torch.randn(5, 24)
    module(x).backward(grad)
    weight, seen = rounded(preset, module.weight.detach(), "weights"), rounded(preset, x.detach(), "activations")
    torch.testing.assert_close(module.weight.grad, grad.t() @ seen, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x.grad, grad @ weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.bias.grad, grad.sum(0))


@pytest.mark.parametrize("preset", FEW)
def test_a_frozen_module_has_a_gradient_to_its_input(preset: str) -> None:
    module = linear(preset)
    fxquant.freeze(module)
    x, grad = torch.randn(5, 200, requires_grad=True), torch.randn(5, 24)
    module(x).backward(grad)
    torch.testing.assert_close(x.grad, grad @ module.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.bias.grad, grad.sum(0))
    assert [name for name, _ in module.named_parameters()] == ["bias"]


def test_what_a_module_was_it_stays() -> None:
    module = nn.Linear(8, 4).train()
    weight = module.weight.requires_grad_(False)
    seen: list[str] = []
    module.register_forward_hook(lambda *_: seen.append("hook"))
    module.__dict__["note"] = "mine"
    identity = id(module)
    fxquant.quantize(module, "int8wo")
    assert id(module) == identity
    assert isinstance(module, nn.Linear)
    assert module.weight is weight
    assert not module.weight.requires_grad
    assert module.training
    assert module.note == "mine"
    module(input=torch.randn(2, 8))  # kwargs only
    fxquant.freeze(module)
    module(torch.randn(2, 8))
    assert seen == ["hook", "hook"]
    assert module.training
    assert "frozen" in repr(module)
    assert "int8/channel" in repr(module)


def test_a_frozen_weight_cannot_be_replaced() -> None:
    module = linear("int8wo")
    fxquant.freeze(module)
    with pytest.raises(FrozenWeight, match="lost"):
        setattr(module, "weight", nn.Parameter(torch.zeros(24, 200)))  # noqa: B010  (pyright knows that it is read-only)


@pytest.mark.parametrize("preset", FEW)
@pytest.mark.parametrize("rows", [(0,), (), (2, 0), (2, 3)])
def test_inputs_of_any_rank_and_none_at_all(preset: str, rows: tuple[int, ...]) -> None:
    module = linear(preset)
    x = torch.randn(*rows, 200)
    with torch.no_grad():
        rounded_y = module(x)
        fxquant.freeze(module)
        assert module(x).shape == rounded_y.shape == (*rows, 24)


@pytest.mark.parametrize("preset", ["int8wo", "int8dq", "int4wo"])
def test_autocast_is_honoured(preset: str) -> None:
    module = linear(preset)
    x = torch.randn(3, 200)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        unfrozen = module(x)
        fxquant.freeze(module)
        frozen = module(x)
    assert unfrozen.dtype is frozen.dtype is torch.bfloat16
    torch.testing.assert_close(frozen, unfrozen, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("preset", FEW)
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # Inductor's own import, in grad mode
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_graph_forward_and_backward(preset: str, backend: str) -> None:
    module = linear(preset, 16, 40)
    x = torch.randn(3, 40, requires_grad=True)
    for frozen in (False, True):
        if frozen:
            fxquant.freeze(module)
        torch._dynamo.reset()
        compiled = torch.compile(module, backend=backend, fullgraph=True)
        x.grad = None
        compiled(x).square().sum().backward()
        got, y = x.grad, compiled(x)
        x.grad = None
        module(x).square().sum().backward()
        torch.testing.assert_close(got, x.grad, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(y, module(x), rtol=1e-4, atol=1e-5)


def test_no_recompile_per_call() -> None:
    torch._dynamo.reset()
    module = linear("int8dq", 16, 40)
    fxquant.freeze(module)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    with torch.no_grad():
        for _ in range(3):
            compiled(torch.randn(5, 40))
        assert counter.frame_count == 1
        for rows in (2, 7, 9):
            compiled(torch.randn(rows, 40))
    assert counter.frame_count == 2  # the second one takes any number of rows
