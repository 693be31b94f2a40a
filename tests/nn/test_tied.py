"""Small language models of transformers: Conv1D, and a head that shares its weight with the embedding."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.nn import QConv1D, QEmbedding, QLinear, QModule
from fxquant.ops import reference
from fxquant.spec import TensorSpec
from fxquant.tensor import QuantizedTensor
from tests.kernels.cpu_helpers import assert_equal
from tests.nn.kinds import assert_near, rounded_input, rounded_matrix

transformers = pytest.importorskip("transformers")
from transformers.pytorch_utils import Conv1D  # noqa: E402

IDS = torch.randint(1, 97, (2, 7), generator=torch.Generator().manual_seed(0))
CONFIGS = ("int8dq", "int8wo", "int4wo", "nvfp4wo", "w=fp6_e3m2/channel")
ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def gpt2(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.GPT2Config(vocab_size=97, n_positions=32, n_embd=64, n_layer=2, n_head=4, **ENDS)
    return transformers.GPT2LMHeadModel(config).eval()


def llama(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=97, num_hidden_layers=2, tie_word_embeddings=True, **sizes, **ENDS)
    return transformers.LlamaForCausalLM(config).eval()


models = pytest.mark.parametrize("make", [gpt2, llama])
Make = Callable[..., Any]


def frozen(make: Make, config: str = "int8dq", seed: int = 0) -> Any:
    model = make(seed)
    fxquant.quantize(model, config)
    fxquant.freeze(model)
    return model


def parts(model: Any) -> tuple[QEmbedding, QLinear]:
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(table, QEmbedding)
    assert isinstance(head, QLinear)
    return table, head


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits


def tokens(model: Any) -> Tensor:
    mask = torch.ones_like(IDS)
    return model.generate(IDS, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("config", CONFIGS)
@models
def test_frozen_gives_what_unfrozen_gave(make: Make, config: str) -> None:
    model = make()
    exactly = logits(model)
    report = fxquant.quantize(model, config)
    assert report.linear_share >= 0.99
    (tied,) = [row for row in report.rows if row.tied_to]
    assert (tied.kind, tied.tied_to) == ("embedding", "lm_head")
    unfrozen, said = logits(model), tokens(model)
    assert not torch.equal(unfrozen, exactly)
    fxquant.freeze(model)
    # Each product is as exact as tests/nn/test_conv.py and test_linear.py show; here they follow each other.
    torch.testing.assert_close(logits(model), unfrozen, rtol=1e-4, atol=1e-4 * float(unfrozen.abs().max()))
    assert_equal(tokens(model), said)


@pytest.mark.parametrize("config", CONFIGS)
@models
def test_the_embedding_reads_the_heads_codes(make: Make, config: str) -> None:
    model = frozen(make, config)
    table, head = parts(model)
    assert table._owner == (head,)
    assert_equal(table(IDS), head.weight[IDS])
    without = fxquant.memory_footprint(model)
    head.hold("weight", QuantizedTensor.quantize(torch.randn(97, 64), TensorSpec.parse(head._weight_spec)))
    assert_equal(table(IDS), head.weight[IDS])
    assert fxquant.memory_footprint(model) == without
    model.set_input_embeddings(nn.Identity())
    assert fxquant.memory_footprint(model) == without  # the embedding holds nothing of its own


@pytest.mark.parametrize("config", CONFIGS[:2])
@models
def test_a_tie_survives_copies_and_state_dicts(make: Make, config: str) -> None:
    model = frozen(make, config)
    want, state = logits(model), model.state_dict()
    assert {name for name in state if "lm_head" in name} == {f"lm_head.weight_{p}" for p in ("codes", "scale", "spec")}
    assert not [name for name in state if "wte" in name or "embed" in name]  # once, under the head's name
    other = frozen(make, config, seed=1)
    assert not torch.equal(logits(other), want)
    other.load_state_dict(state, strict=True)
    for one in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_equal(logits(one), want)
        table, head = parts(one)
        assert table._owner == (head,)
        assert fxquant.memory_footprint(one) == fxquant.memory_footprint(model)


def test_a_tied_weight_is_read_only() -> None:
    model = frozen(llama)
    for module in parts(model):
        with pytest.raises(AttributeError, match="weight is frozen"):
            setattr(module, "weight", nn.Parameter(torch.zeros(97, 64)))  # noqa: B010


def test_a_tie_survives_dtypes() -> None:
    model = frozen(llama).to(torch.bfloat16)
    table, _ = parts(model)
    assert table(IDS).dtype == table.weight.dtype == logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"exclude": "lm_head"}, {"lm_head": 'exclude "lm_head"', "model.embed_tokens": "embeddings stay float"}),
        (
            {"exclude": "lm_head", "embeddings": "int4"},
            {"lm_head": 'exclude "lm_head"', "model.embed_tokens": "tied to 'lm_head', which stays float"},
        ),
        ({"rules": {"model.embed_tokens": None}}, {"lm_head": "tied to 'model.embed_tokens', which stays float"}),
    ],
    ids=["exclude", "both", "rule"],
)
def test_tied_modules_stay_float_together(options: dict[str, Any], words: dict[str, str]) -> None:
    model = llama()
    report = fxquant.quantize(model, "int8dq", **options)
    reasons = {row.paths[0]: row.reason for row in report.skipped}
    assert reasons.keys() == {"lm_head", "model.embed_tokens"}
    for path, reason in words.items():
        assert reason in reasons[path]
    fxquant.freeze(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_heads_format_is_that_of_both() -> None:
    model = llama()
    fxquant.quantize(model, "int8dq", embeddings="int4", rules={"lm_head": "mxfp4wo"})
    table, head = parts(model)
    assert str(table.quantization) == str(head.quantization) == "w=fp4_e2m1/group32/e8m0"


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 16, padding_idx=0)
        self.head = nn.Linear(16, 11)
        self.head.weight = self.table.weight


def test_a_tied_weight_learns_from_both_uses() -> None:
    torch.manual_seed(0)
    model, ids, grad = Tied(), torch.tensor([[0, 3, 10]]), torch.randn(1, 3, 11)
    weight = model.table.weight.detach().clone().requires_grad_()
    rounded = reference.fake_quantize_weight(weight.detach(), "int4/group8")
    rounded = weight + (rounded - weight).detach()
    nn.functional.linear(nn.functional.embedding(ids, rounded, 0), rounded, model.head.bias).backward(grad)
    fxquant.quantize(model, "w=int4/group8")
    model.head(model.table(ids)).backward(grad)
    got, want = model.table.weight.grad, weight.grad
    assert got is not None
    assert want is not None
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("fresh_dynamo")
def test_one_graph_of_a_tied_model() -> None:
    torch.manual_seed(0)
    model, ids = Tied(), torch.tensor([[0, 3, 10]])
    fxquant.quantize(model, "int4wo")
    fxquant.freeze(model)

    def run(ids: Tensor) -> Tensor:
        return model.head(model.table(ids))

    with torch.no_grad():
        assert_equal(torch.compile(run, backend="aot_eager", fullgraph=True)(ids), run(ids))


# ---- Conv1D


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "spec", ["int8/channel", "int4/group32/affine/bf16", "fp4_e2m1/group16/e4m3", "fp6_e3m2/tensor"]
)
def test_a_conv1d_is_a_linear_of_its_transpose(spec: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module, x = Conv1D(33, 70).to(dtype), torch.randn(2, 3, 70).to(dtype)
    nn.init.normal_(module.bias)
    weight = rounded_matrix(module.weight.detach().t(), spec)
    float_one = nn.Linear(70, 33).double()
    float_one.weight, float_one.bias = nn.Parameter(weight.double()), nn.Parameter(module.bias.detach().double())
    fxquant.quantize(nn.ModuleDict({"m": module}), f"w={spec}")
    assert isinstance(module, (Conv1D, QConv1D))
    assert isinstance(module, QModule)
    y, total = float_one(x.double()), x.double().abs() @ weight.double().abs().t() + float_one.bias.abs()
    gamma = 75 * 2.0**-24 / (1 - 75 * 2.0**-24)
    operand = {torch.float32: 0.0, torch.bfloat16: 2.0**-8}[dtype]  # before freeze the weight has x's dtype
    assert_near(module(x=x), (y, (gamma + operand) * total))
    module.freeze()
    assert_near(module(x), (y, gamma * total))
    assert_equal(module.weight, weight.t().to(dtype))
    assert module.state_dict()["weight_codes"].shape[0] == 33
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_equal(copied(x), module(x))
        assert isinstance(copied, Conv1D)


def test_a_conv1d_quantizes_its_input() -> None:
    torch.manual_seed(0)
    module: Any = Conv1D(33, 70)
    x = torch.randn(2, 3, 70)
    weight = rounded_matrix(module.weight.detach().t(), "int8/channel").double()
    rounded = rounded_input(x, "int8/token", torch.float64)
    y, total = rounded @ weight.t() + module.bias.detach().double(), rounded.abs() @ weight.abs().t()
    fxquant.quantize(nn.ModuleDict({"m": module}), "int8dq")
    for _ in range(2):
        assert_near(module(x), (y.detach(), 80 * 2.0**-24 * total))
        module.freeze()
