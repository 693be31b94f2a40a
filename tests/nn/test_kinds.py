"""What a quantized module of any kind must survive, float and frozen."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxquant.nn import QModule
from tests.kernels.cpu_helpers import assert_equal
from tests.nn.kinds import EMBEDDINGS, KINDS, NORMS, Kind, assert_near, exact, quantized, rounded_input
from tests.twins import assert_same_bits

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")  # torch's own, of even kernels
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
WITH_WEIGHTS = {name: kind for name, kind in KINDS.items() if name not in NORMS}
weights = pytest.mark.parametrize("kind", WITH_WEIGHTS.values(), ids=WITH_WEIGHTS)
CONFIGS = (
    "w=int8/channel x=int8/token",
    "w=int4/group32/affine/bf16",
    "w=fp4_e2m1/group16/e4m3 x=float8_e4m3fn/token",
    "w=fp4_e2m1/group32/e8m0",
)
configs = pytest.mark.parametrize("config", CONFIGS)


def frozen(kind: Kind, config: str, dtype: torch.dtype = torch.float32) -> QModule:
    q = quantized(kind.module(dtype), config)
    q.freeze()
    return q


def other(kind: Kind) -> nn.Module:
    """The same module with other weights."""
    module = kind.module()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-3, 3)
    return module


def codes_of(q: nn.Module) -> dict[str, Tensor]:
    return {name: t for name, t in q.named_buffers() if name.startswith("weight_")}


@kinds
def test_it_stays_the_same_object(kind: Kind) -> None:
    module, x, calls = kind.module(), kind.input(), []
    torch_class, parameters = type(module), dict(module.named_parameters())
    module.eval()
    module.note = "mine"  # pyright: ignore[reportArgumentType]
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    module.register_forward_pre_hook(lambda m, args: calls.append("before"))
    module.register_forward_hook(lambda m, args, y: calls.append("after"))
    q = quantized(module, CONFIGS[0])
    assert q is module
    assert isinstance(q, torch_class)
    assert type(q).__name__ == f"Q{torch_class.__name__}"
    assert {name: id(p) for name, p in q.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    assert not any(p.requires_grad for p in q.parameters())
    assert (q.training, q.note) == (False, "mine")
    q(x)
    q.freeze()
    q(x)
    assert calls == ["before", "after"] * 2
    assert (q.training, q.note) == (False, "mine")
    assert not any(p.requires_grad for p in q.parameters())
    assert not q(x).requires_grad


@configs
@kinds
def test_copies_and_pickles(kind: Kind, config: str) -> None:
    x, q = kind.input(), quantized(kind.module(), config)
    for _ in range(2):
        want = q(x)
        for copied in (copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
            assert type(copied) is type(q)
            assert_equal(copied(x), want)
            tensors = {t.data_ptr() for t in (*q.parameters(), *q.buffers()) if t.numel()}
            assert not tensors & {t.data_ptr() for t in (*copied.parameters(), *copied.buffers())}
        q.freeze()


@configs
@weights
def test_a_state_dict_goes_round(kind: Kind, config: str) -> None:
    x, q = kind.input(), frozen(kind, config)
    want, stored = q(x), io.BytesIO()
    torch.save(q.state_dict(), stored)
    stored.seek(0)
    state = torch.load(stored, weights_only=True)
    shape = q.quantized_weight()
    assert state["weight_codes"].dtype == torch.uint8
    assert state["weight_codes"].shape[0] == shape.codes.shape[0]
    assert_same_bits(state["weight_scale"], shape.scale)
    frozen_one, float_one = quantized(other(kind), config), quantized(other(kind), config)
    frozen_one.freeze()
    on_meta = quantized(other(kind).to("meta"), config)
    for into, options in ((frozen_one, {}), (float_one, {}), (on_meta, {"assign": True})):
        result = into.load_state_dict(state, strict=True, **options)
        assert not result.missing_keys
        assert not result.unexpected_keys
        assert into.is_frozen
        assert_equal(into(x), want)
        assert list(into.state_dict()) == list(state)


@configs
@weights
def test_a_float_state_dict_is_for_a_float_module(kind: Kind, config: str) -> None:
    state, x = quantized(other(kind), config).state_dict(), kind.input()
    q = quantized(kind.module(), config)
    q.load_state_dict(state)
    assert_equal(q(x), quantized(other(kind), config)(x))
    q.freeze()
    with pytest.raises(RuntimeError, match="weight is float, but the module is frozen"):
        q.load_state_dict(state)


@weights
def test_codes_of_another_shape_are_refused(kind: Kind) -> None:
    state = frozen(kind, CONFIGS[1]).state_dict()
    q = quantized(kind.module(), CONFIGS[1])
    for broken in ({"weight_codes": state["weight_codes"][1:]}, {"weight_scale": state["weight_scale"][1:]}):
        with pytest.raises(RuntimeError, match="weight: not the codes of int4/group32/affine/bf16"):
            q.load_state_dict({**state, **broken})
    with pytest.raises(RuntimeError, match="weight"):
        q.load_state_dict({name: t for name, t in state.items() if name != "weight_scale"})


@pytest.mark.parametrize("name", [name for name in KINDS if name not in EMBEDDINGS])
def test_calibrated_scales_are_stored(name: str) -> None:
    kind = KINDS[name]
    x, q, empty = kind.input(), quantized(kind.module(), CONFIGS[0]), quantized(kind.module(), CONFIGS[0])
    q.input_scale, q.output_scale = torch.tensor(0.02), torch.tensor(0.03)
    for _ in range(2):
        state = q.state_dict()
        empty.load_state_dict(state)
        assert (empty.input_scale, empty.output_scale) == (q.input_scale, q.output_scale)
        assert_equal(empty(x), q(x))
        q.freeze()


@configs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@weights
def test_a_dtype_is_what_it_computes_in(kind: Kind, dtype: torch.dtype, config: str) -> None:
    q = frozen(kind, config)
    before = {name: t.clone() for name, t in codes_of(q).items()}
    table = q.weight
    q.to(dtype)
    x = kind.input(dtype)
    assert q(x).dtype == dtype
    assert q.weight.dtype == dtype
    assert_equal(q.weight, table.to(dtype))
    assert all(p.dtype == dtype for p in q.parameters())
    after = codes_of(q)
    assert list(after) == list(before)
    for name, t in before.items():
        assert_same_bits(after[name], t)
    assert_same_bits(copy.deepcopy(q)(x), q(x))


@configs
@weights
def test_memory_is_shared(kind: Kind, config: str) -> None:
    x, q = kind.input(), frozen(kind, config)
    want = q(x)
    q.share_memory()
    assert all(t.is_shared() for t in (*q.parameters(), *q.buffers()))
    assert_equal(q(x), want)


@weights
def test_a_frozen_weight_is_read_only(kind: Kind) -> None:
    q = frozen(kind, CONFIGS[0])
    with pytest.raises(AttributeError, match="is frozen"):
        setattr(q, "weight", nn.Parameter(q.weight))  # noqa: B010
    assert not q.weight.requires_grad
    names = {name for name, _ in q.named_parameters()}
    assert names <= {"bias"}


@pytest.mark.parametrize("activations", ["int8/token", "int8/sample", "int8/tensor", "float8_e4m3fn/token"])
@pytest.mark.parametrize("spec", ["int8/channel", "int4/group32/stepped", "fp6_e3m2/channel"])
def test_a_linear_rounds_its_input_as_asked(spec: str, activations: str) -> None:
    module = KINDS["linear"].module()
    sizes = torch.tensor([1.0, 10.0, 100.0])
    x = torch.randn(2, 3, 70, generator=torch.Generator().manual_seed(1)) * sizes[:, None]
    near = exact(module, spec, rounded_input(x, activations, torch.float32))
    q = quantized(module, f"w={spec} x={activations}")
    for _ in range(2):
        assert_near(q(x), near)
        q.freeze()


# One of each way that a graph can go.
COMPILED = {
    name: KINDS[name]
    for name in ("1d-same", "2d", "2d-uneven", "2d-groups", "2d-transposed", "embedding", "layer-norm", "rms-norm")
}


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("config", ["w=int8/channel x=int8/token", "w=fp4_e2m1/group32/e8m0"])
@pytest.mark.parametrize("kind", COMPILED.values(), ids=COMPILED)
def test_one_graph_forward_and_backward(kind: Kind, config: str) -> None:
    q, x = quantized(kind.module(), config), kind.input()
    compiled = torch.compile(q, backend="aot_eager", fullgraph=True)
    want, wanted = outcome(q, q, x)
    got, gradients = outcome(compiled, q, x)
    assert_equal(got, want)
    assert list(gradients) == list(wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-6, atol=1e-6)
    with torch._dynamo.config.patch(error_on_recompile=True):
        outcome(compiled, q, x)
    q.freeze()
    frozen_graph = torch.compile(q, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        want = q(x)
        assert_equal(frozen_graph(x), want)
        with torch._dynamo.config.patch(error_on_recompile=True):
            frozen_graph(x)


def outcome(call: Any, module: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the gradients of a sum over it."""
    module.zero_grad()
    given = x.clone().requires_grad_() if x.is_floating_point() else x
    y = call(given)
    weights = torch.linspace(-1, 1, y.numel()).view(y.shape)
    (y * weights).sum().backward()
    found = {name: p.grad.to_dense() for name, p in module.named_parameters() if p.grad is not None}
    return y.detach(), found if given.grad is None else {"x": given.grad, **found}


@pytest.mark.parametrize("name", ["2d", "2d-transposed-groups", "embedding", "rms-norm"])
def test_export(name: str) -> None:
    kind = KINDS[name]
    x, q = kind.input(), quantized(kind.module(), CONFIGS[0])
    for _ in range(2):
        with torch.no_grad():
            want = q(x)
            assert_equal(torch.export.export(q, (x,)).module()(x), want)
        q.freeze()
