"""QExperts: the experts of routers, as transformers holds them, against its own forward with the rounded weights."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.moe import use_experts_implementation
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import fxquant
from fxquant.nn import QExperts, experts
from fxquant.ops import reference
from tests.helpers import assert_same

DEPTH = 128
FORMATS = ("int8", "int4", "int8/tensor", "fp6_e3m2", "mxfp4", "nvfp4", "int2/group8/shift", "int4/block8x16")
E, K, T, HIDDEN, INNER = 6, 2, 9, 48, 40  # experts, of these chosen, tokens, widths


@use_experts_implementation(has_gate=False, has_bias=True, has_post_expert_norm=True)
class PlainExperts(nn.Module):
    """What no model here has: no gate, biases, a norm behind."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_experts = config.num_local_experts
        self.up_proj = nn.Parameter(torch.empty(E, INNER, HIDDEN))
        self.up_proj_bias = nn.Parameter(torch.empty(E, INNER))
        self.down_proj = nn.Parameter(torch.empty(E, HIDDEN, INNER))
        self.down_proj_bias = nn.Parameter(torch.empty(E, HIDDEN))
        self.act_fn = nn.GELU()
        self.post_expert_norm = nn.LayerNorm(HIDDEN)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        total = torch.zeros_like(hidden_states)
        for token, choice in torch.cartesian_prod(torch.arange(len(hidden_states)), torch.arange(K)).tolist():
            i = top_k_index[token, choice]
            x = self.act_fn(self.up_proj[i] @ hidden_states[token] + self.up_proj_bias[i])
            x = self.post_expert_norm(self.down_proj[i] @ x + self.down_proj_bias[i])
            total[token] += top_k_weights[token, choice] * x
        return total


def mixtral(**fields: Any) -> MixtralConfig:
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_local_experts": E, "num_experts_per_tok": K}
    return _eager(MixtralConfig(**{**sizes, **fields}))


def qwen(**fields: Any) -> Qwen3MoeConfig:
    sizes = {"hidden_size": HIDDEN, "moe_intermediate_size": INNER, "num_experts": E, "num_experts_per_tok": K}
    return _eager(Qwen3MoeConfig(**{**sizes, **fields}))


def _eager(config: Any) -> Any:
    config._experts_implementation = "eager"
    return config


CLASSES: dict[str, Callable[[], nn.Module]] = {
    "mixtral": lambda: MixtralExperts(mixtral()),
    "qwen": lambda: Qwen3MoeExperts(qwen()),
    "transposed": lambda: GptOssExperts(mixtral(swiglu_alpha=1.702, swiglu_limit=7.0)),
    "no-gate": lambda: PlainExperts(mixtral()),
}


def module_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    module = CLASSES[name]()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def quantized(name: str, weights: str = "int8", **fields: Any) -> QExperts:
    model = nn.ModuleDict({"m": module_of(name)})
    report = fxquant.quantize(model, weights=weights, **fields)
    assert [row.path for row in report.quantized] == ["m"], report
    module = model["m"]
    assert isinstance(module, QExperts)
    return module


def routed(tokens: int = T, skip: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, what experts each goes to (never the last `skip` ones), and with what weights."""
    torch.manual_seed(1)
    chosen = torch.rand(tokens, E - skip).topk(K).indices
    return torch.randn(tokens, HIDDEN), chosen, torch.rand(tokens, K).softmax(-1)


def decoded(module: QExperts, name: str) -> Tensor:
    """The values of all codes, in the shape of the parameter."""
    matrices = module.quantized_weight(name).dequantize().view(E, -1, module.matrix_shape(name)[1])
    return matrices.transpose(1, 2) if module.is_transposed else matrices


def twin_of(module: QExperts, name: str) -> nn.Module:
    """transformers' module with the values that the codes of `module` stand for."""
    twin = module_of(name)
    with torch.no_grad():
        for path, parameter in twin.named_parameters():
            parameter.copy_(decoded(module, path) if path in module.matrix_names() else module.get_parameter(path))
    return twin


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("name", CLASSES)
def test_it_gives_what_transformers_gives_with_the_rounded_weights(name: str, weights: str) -> None:
    module = quantized(name, weights)
    twin = twin_of(module, name)
    with torch.no_grad():
        for _ in ("rounded", "frozen"):
            for call in (routed(), routed(1), routed(40)):
                assert_same(module(*call), twin(*call), DEPTH)
            fxquant.freeze(module)
    assert module.is_frozen


@pytest.mark.parametrize("weights", [*FORMATS, "int8/tensor", "int4/group16/affine/bf16"])
@pytest.mark.parametrize("name", ["mixtral", "transposed"])
def test_frozen_weights_are_the_codes_that_it_rounded_to(name: str, weights: str) -> None:
    module = quantized(name, weights)
    want = {key: decoded(module, key) for key in module.matrix_names()}
    rounded = {key: module.float_weight(torch.float32, key) for key in want}
    fxquant.freeze(module)
    for key in ("gate_up_proj", "down_proj"):
        assert torch.equal(rounded[key], want[key])
        assert torch.equal(getattr(module, key) + 0, want[key])
        assert getattr(module, key).shape == want[key].shape
        assert torch.equal(decoded(module, key), want[key])


@pytest.mark.parametrize("spec", ["int8/token", "float8_e4m3fn/token"])
@pytest.mark.parametrize("weights", ["int8", "int4/group16", "mxfp4"])
@pytest.mark.parametrize("name", ["qwen", "transposed"])
def test_inputs_of_both_products_are_rounded(name: str, weights: str, spec: str) -> None:
    module: Any = quantized(name, weights, activations=spec)
    twin: Any = twin_of(module, name)
    x, chosen, share = routed()
    want = torch.zeros_like(x)
    with torch.no_grad():
        for token, choice in torch.cartesian_prod(torch.arange(T), torch.arange(K)).tolist():
            i = chosen[token, choice]
            y = torch.ops.fxquant.fake_quantize(x[token : token + 1], spec)
            for key in ("gate_up_proj", "down_proj"):
                weight = getattr(twin, key)[i]
                y = y @ (weight if twin.is_transposed else weight.t())
                y = y + getattr(twin, f"{key}_bias")[i] if twin.has_bias else y
                y = torch.ops.fxquant.fake_quantize(twin._apply_gate(y), spec) if key == "gate_up_proj" else y
            want[token] += share[token, choice] * y[0]
        for _ in ("rounded", "frozen"):
            # A sum that differs by a rounding may tip a code of the second product's input: a step of 1/127.
            torch.testing.assert_close(module(x, chosen, share), want, rtol=0.0, atol=want.abs().max().item() / 127)
            fxquant.freeze(module)


class Shapes(TorchDispatchMode):
    """The ops that run, and the shapes of the float tensors that they make."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.floats: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        if isinstance(out, Tensor) and out.is_floating_point():
            self.floats.add(tuple(out.shape))
        return out


@pytest.mark.parametrize("weights", ["int8", "int4", "nvfp4"])
@pytest.mark.parametrize("name", ["mixtral", "transposed"])
def test_only_experts_that_were_hit_are_read_and_none_is_decoded(
    name: str, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = quantized(name, weights)
    parameters = {tuple(module._matrices(key).shape) for key in ("gate_up_proj", "down_proj")}
    fxquant.freeze(module)
    module.get_buffer("gate_up_proj_scale")[-2:] = (
        255 if weights == "nvfp4" else torch.nan
    )  # the last ones are never chosen
    call = routed(skip=2)
    # As the op runs it: a dispatch mode does not see the inside of an op.
    monkeypatch.setattr(experts, "_FXQUANT", SimpleNamespace(experts_linear=reference.experts_linear))
    with torch.no_grad(), Shapes() as seen:
        y = module(*call)
    assert y.isfinite().all()
    matrices = {shape[1:] for shape in parameters}
    assert not seen.floats & (parameters | matrices | {(shape[0] * shape[1], shape[2]) for shape in parameters})
    assert sum("linear_weight_only" in op for op in seen.names) == 2 * len(call[1].unique())


@pytest.mark.parametrize("weights", ["int4", "int8/tensor"])
@pytest.mark.parametrize("name", ["mixtral", "transposed"])
def test_gradients_go_straight_through_the_rounding(name: str, weights: str) -> None:
    module = quantized(name, weights)
    twin = twin_of(module, name)
    (x, chosen, share), found = routed(skip=1), []
    for one in (module, twin):
        inputs = x.clone().requires_grad_(), share.clone().requires_grad_()
        one(inputs[0], chosen, inputs[1]).square().sum().backward()
        found.append([*(t.grad for t in inputs), *(p.grad for _, p in sorted(one.named_parameters()))])
    assert_same(found[0], found[1], 8 * DEPTH)
    assert not found[0][-1][-1].any()  # an expert that nobody chose
    with torch.no_grad():
        before = [p.clone() for p in module.parameters()]
        for parameter in module.parameters():
            assert parameter.grad is not None
            parameter -= 1e-3 * parameter.grad
    assert all(not torch.equal(old, new) for old, new in zip(before, module.parameters(), strict=True))


@pytest.mark.parametrize("weights", ["int8", "int4", "mxfp4"])
@pytest.mark.parametrize("name", ["mixtral", "transposed"])
def test_a_frozen_module_has_a_gradient_to_its_input(name: str, weights: str) -> None:
    module = quantized(name, weights)
    twin = twin_of(module, name)
    fxquant.freeze(module)
    (x, chosen, share), found = routed(), []
    for one in (module, twin):
        inputs = x.clone().requires_grad_(), share.clone().requires_grad_()
        one(inputs[0], chosen, inputs[1]).square().sum().backward()
        found.append([t.grad for t in inputs])
    assert_same(found[0], found[1], 8 * DEPTH)


def test_training_lowers_the_loss() -> None:
    module = quantized("qwen", "int4", activations="int8")
    call, target = routed(), torch.randn(T, HIDDEN)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = (module(*call) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        trained = module(*call)
        fxquant.freeze(module)
        torch.testing.assert_close(module(*call), trained, rtol=0.0, atol=trained.abs().max().item() / 127)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_and_autocast(dtype: torch.dtype) -> None:
    module = quantized("transposed", activations="int8")
    x, chosen, share = routed()
    with torch.no_grad():
        want = module(x, chosen, share)
        for _ in ("rounded", "frozen"):
            with torch.autocast("cpu", dtype):
                cast = module(x, chosen, share)
            half = copy.deepcopy(module).to(dtype)(x.to(dtype), chosen, share)
            assert (cast.dtype, half.dtype) == (torch.float32, dtype)
            for got in (cast, half):
                torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.05 * want.abs().max().item())
            fxquant.freeze(module)


@pytest.mark.parametrize("frozen", [True, False])
def test_experts_of_other_processes_and_no_tokens_at_all(frozen: bool) -> None:
    """With experts spread over processes, what is not here has a number behind the last."""
    module = quantized("no-gate")
    if frozen:
        fxquant.freeze(module)
    x, chosen, share = routed()
    with torch.no_grad():
        elsewhere = chosen.masked_fill(chosen >= E - 2, E)
        mine = share.masked_fill(chosen >= E - 2, 0.0)
        assert_same(module(x, elsewhere, share), module(x, chosen, mine), DEPTH)
        assert not module(x, torch.full_like(chosen, E), share).any()
        assert module(x[:0], chosen[:0], share[:0]).shape == (0, HIDDEN)


@pytest.mark.parametrize("weights", [*FORMATS, "int4/group16/affine/bf16"])
@pytest.mark.parametrize("name", ["mixtral", "transposed"])
def test_a_state_dict_gives_the_same_module_again(name: str, weights: str) -> None:
    module, other = quantized(name, weights), quantized(name, weights)
    fxquant.freeze(module)
    state = copy.deepcopy(module.state_dict())
    assert state["down_proj_codes"].shape[:2] == (E, HIDDEN)
    assert "down_proj" not in state
    with torch.no_grad():
        for key in module.matrix_names():
            getattr(other, key).zero_()
    assert not any(other.load_state_dict(state, strict=True))
    with torch.no_grad():
        assert torch.equal(other(*routed()), module(*routed()))
    for wrong in (state["down_proj_codes"][:-1], state["down_proj_codes"][:, :-1]):
        with pytest.raises(RuntimeError, match="down_proj: not the codes of"):
            other.load_state_dict({**state, "down_proj_codes": wrong})


@pytest.mark.parametrize("frozen", [True, False])
def test_copies_and_pickles_are_equal(frozen: bool) -> None:
    module = quantized("qwen", "int4")
    if frozen:
        fxquant.freeze(module)
    with torch.no_grad():
        want = module(*routed())
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(twin(*routed()), want)
            assert twin.is_frozen is frozen
            assert isinstance(twin, Qwen3MoeExperts)


@pytest.mark.parametrize("frozen", [True, False])
def test_one_graph_with_the_router_forward_and_backward(frozen: bool) -> None:
    torch.manual_seed(0)
    block = MixtralSparseMoeBlock(mixtral(router_jitter_noise=0.0))
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    fxquant.quantize(block, "int8dq")
    if frozen:
        fxquant.freeze(block)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for tokens in (4, 7):
        x, found = torch.randn(2, tokens, HIDDEN, requires_grad=True), []
        for one in (compiled, block):
            x.grad = None
            y = one(x)
            y.square().sum().backward()
            found.append((y, x.grad))
        assert_same(found[0], found[1], DEPTH)
    torch._dynamo.reset()


@pytest.mark.parametrize("weights", ["int8", "int4", "mxfp4"])
def test_frozen_experts_take_what_their_format_promises(weights: str) -> None:
    module = quantized("mixtral", weights)
    promised = sum(module.quantized_weight(key).nbytes for key in module.matrix_names())
    fxquant.freeze(module)
    assert promised <= fxquant.memory_footprint(module) <= 1.02 * promised
    assert not list(module.parameters())


def tiny(name: str) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    if name == "mixtral":
        return MixtralForCausalLM(mixtral(**sizes, intermediate_size=160)).eval()
    return Qwen3MoeForCausalLM(qwen(**sizes, moe_intermediate_size=160, intermediate_size=96, head_dim=16)).eval()


@pytest.mark.parametrize("name", ["mixtral", "qwen"])
def test_whole_models(name: str) -> None:
    model = tiny(name)
    with torch.no_grad():
        ids = torch.randint(0, 64, (2, 9))
        exact = model(ids).logits
        report = fxquant.quantize(model, "int8wo")
        rounded = model(ids).logits
        fxquant.freeze(model)
        frozen = model(ids).logits
    assert report.linear_share >= 0.99
    assert {row.kind for row in report.skipped} == {"embedding", type(model.model.layers[0].mlp.gate).__name__}
    assert all("no quantized class" in row.reason for row in report.skipped if row.kind != "embedding")
    assert_same(frozen, rounded, DEPTH)
    assert 0 < (rounded - exact).abs().max() < 0.05 * exact.abs().max()


def test_requantize_a_model_onto_meta() -> None:
    model = tiny("mixtral")
    fxquant.quantize(model, "int4wo")
    fxquant.freeze(model)
    with torch.device("meta"):
        other = tiny("mixtral")
    fxquant.requantize(other, model.state_dict(), fxquant.quantization_map(model))
    with torch.no_grad():
        ids = torch.randint(0, 64, (2, 9))
        assert torch.equal(other(ids).logits, model(ids).logits)


def test_a_calibration_leaves_them_dynamic() -> None:
    model = tiny("mixtral")
    fxquant.quantize(model, weights="int8", activations="int8/tensor")
    ids = torch.randint(0, 64, (2, 9))
    with torch.no_grad(), fxquant.Calibration():
        model(ids)
    layer: Any = model.model.layers[0]
    assert layer.self_attn.q_proj.input_scale is not None
    assert layer.mlp.experts.input_scale is None
    with torch.no_grad():
        rounded = model(ids).logits
        fxquant.freeze(model)
        torch.testing.assert_close(model(ids).logits, rounded, rtol=0.0, atol=rounded.abs().max().item() / 50)


class Bare(nn.Module):
    """Experts that follow no interface."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(4, 8, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("tk,enk->ten", x, self.w1)


class Mine(MixtralExperts):
    def forward(self, *args: Any) -> Tensor:
        return 2 * super().forward(*args)


def test_what_is_left_is_named_with_the_reason() -> None:
    odd = module_of("mixtral")
    odd.down_proj = nn.Parameter(torch.zeros(E - 1, HIDDEN, INNER))
    unmarked = module_of("mixtral")
    del unmarked.has_gate
    model = nn.ModuleDict({"bare": Bare(), "mine": Mine(mixtral()), "odd": odd, "unmarked": unmarked})
    model["fits"] = nn.ModuleDict({"m": module_of("mixtral")})
    report = fxquant.quantize(model, weights="int4/block10x16")
    reasons = {row.path: row.reason for row in report.skipped}
    assert not report.quantized
    assert "no quantized class" in reasons["bare"]
    assert "forward of its own" in reasons["mine"]
    assert "its down_proj is of shape [5, 48, 40]: one matrix for each of 6 experts" in reasons["odd"]
    assert "it has no has_gate" in reasons["unmarked"]
    assert "blocks of 10 rows reach from one expert of its down_proj to the next" in reasons["fits.m"]
