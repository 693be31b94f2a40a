"""Attention nodes are taken apart with torch's semantics: the reference is the same graph, left as Dynamo made it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.capture import from_export
from fxquant.graphs import target_name, value_of
from tests.helpers import assert_same, capture, linear_paths, linears, model_names, reasons, through_capture

E, H, L, S, B = 16, 4, 5, 7, 3
# Roundings in a row between input and output: projection, scores, softmax, product with values, projection, each
# summing up to 4 * E terms in another order than torch's fused kernels.
DEPTH = 4 * E


class Attend(nn.Module):
    """One attention call; keyword arguments are fixed, masks are inputs."""

    def __init__(self, dtype: torch.dtype = torch.float32, *, self_attention: bool = False, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(11)
        module = {k: options.pop(k) for k in ("bias", "add_bias_kv", "add_zero_attn", "kdim", "vdim") if k in options}
        self.batch_first = options.pop("batch_first", True)
        self.mha = nn.MultiheadAttention(E, H, batch_first=self.batch_first, dtype=dtype, **module)
        if self.mha.in_proj_bias is not None:
            nn.init.normal_(self.mha.in_proj_bias)
            nn.init.normal_(self.mha.out_proj.bias)
        self.self_attention = self_attention
        self.options = options
        self.sizes = (module.get("kdim", E), module.get("vdim", E))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, padding: Any = None, mask: Any = None) -> Any:
        if self.self_attention:
            key = value = query
        return self.mha(query, key, value, key_padding_mask=padding, attn_mask=mask, **self.options)


def inputs(model: Attend, dtype: torch.dtype = torch.float32, *, batched: bool = True) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    lengths = (L, L, L) if model.self_attention else (L, S, S)
    shapes = [(B, length, size) for length, size in zip(lengths, (E, *model.sizes), strict=True)]
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    if not batched:
        return [x[0] for x in made]
    return made if model.batch_first else [x.transpose(0, 1).contiguous() for x in made]


def check(model: nn.Module, *args: Any, depth: int = DEPTH, products: int = 4) -> Any:
    """Capture, compare with what Dynamo's own graph gives, count the products."""
    compared: list[None] = []

    def compare(out: Any, expected: Any) -> None:
        assert_same(out, expected, depth=depth)
        compared.append(None)

    _, (captured,) = through_capture(model, *args, fullgraph=True, compare=compare)
    assert len(compared) == 1
    assert len(linears(captured)) == products
    words = {target_name(n) for n in captured.gm.graph.nodes}
    assert not any("multi_head_attention" in word or "encoder_layer" in word for word in words)
    assert not reasons(captured)
    return captured


def boolean(*shape: int) -> Tensor:
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(1)) < 0.3
    mask[..., 0] = False  # a row with nothing left is a case of its own
    return mask


def additive(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2)).to(dtype)


WEIGHTS = (
    {"need_weights": False},
    {"need_weights": True},
    {"need_weights": True, "average_attn_weights": False},
)
MODULES = (
    {"self_attention": True},
    {},
    {"bias": False},
    {"kdim": 6, "vdim": 10},
    {"kdim": 6, "vdim": 10, "bias": False},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True, "kdim": 6, "vdim": 10},
    {"batch_first": False},
)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("module", MODULES, ids=str)
def test_modules(module: dict[str, Any], weights: dict[str, Any]) -> None:
    model = Attend(**module, **weights).eval()
    source = L if model.self_attention else S
    check(model, *inputs(model), additive(B, source), additive(L, source).triu(1))


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("case", ["plain", "unbatched", "grown"])
@pytest.mark.parametrize(
    ("padding", "mask"),
    [("bool", None), ("float", None), (None, "bool2"), (None, "float2"), (None, "bool3"), (None, "float3"),
     ("bool", "bool2"), ("float", "float3"), ("bool", "bool3"), (None, None)],
)  # fmt: skip
def test_masks(padding: str | None, mask: str | None, case: str, need_weights: bool) -> None:
    batched, grown = case != "unbatched", case == "grown"
    model = Attend(add_bias_kv=grown, add_zero_attn=grown, need_weights=need_weights).eval()
    kinds = {"bool": boolean, "float": additive}
    rows = (B, S) if batched else (S,)
    planes = (B * H, L, S) if batched else (H, L, S)
    padding_mask = kinds[padding](*rows) if padding else None
    attention_mask = kinds[mask[:-1]](*((L, S) if mask[-1] == "2" else planes)) if mask else None
    check(model, *inputs(model, batched=batched), padding_mask, attention_mask)


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_causal_hint(need_weights: bool, padding: bool) -> None:
    model = Attend(self_attention=True, is_causal=True, need_weights=need_weights).eval()
    mask = nn.Transformer.generate_square_subsequent_mask(L)
    check(model, *inputs(model), additive(B, L) if padding else None, mask)


@pytest.mark.parametrize("need_weights", [False, True])
def test_row_with_nothing_left(need_weights: bool) -> None:
    model = Attend(need_weights=need_weights).eval()
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[1] = True
    captured = check(model, *inputs(model), padding)
    words = [target_name(n) for n in captured.gm.graph.nodes]
    assert ("scaled_dot_product_attention" in words) is not need_weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("need_weights", [False, True])
def test_narrow_dtypes(need_weights: bool, dtype: torch.dtype) -> None:
    model = Attend(dtype, need_weights=need_weights).eval()
    # six roundings to the narrow type: q, k, v, scores, weights, output
    check(model, *inputs(model, dtype), None, additive(L, S, dtype=dtype), depth=6)


def test_training_mode_without_dropout() -> None:
    model = Attend(need_weights=True).train()
    check(model, *inputs(model))


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_draws_the_same_numbers(need_weights: bool) -> None:
    model = Attend(need_weights=need_weights).train()
    model.mha.dropout = 0.5
    args = inputs(model)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager")
        torch.manual_seed(0)
        expected = compiled(*args)
    torch.manual_seed(0)
    out, (captured,) = through_capture(model, *args)
    assert_same(out, expected, depth=DEPTH)
    assert len(linears(captured)) == 4


def test_same_value_is_projected_three_times() -> None:
    model = Attend(self_attention=True, need_weights=False).eval()
    captured = capture(model, *inputs(model))
    query, key, value, out = linears(captured)
    assert query.args[0] is key.args[0] is value.args[0]
    assert linear_paths(captured) == ["mha.q_proj", "mha.k_proj", "mha.v_proj", "mha.out_proj"]
    weights = [n.args[1] for n in (query, key, value, out)]
    assert all(isinstance(w, torch.fx.Node) and len(w.users) == 1 for w in weights)
    assert [tuple(value_of(w).shape) for w in weights if isinstance(w, torch.fx.Node)] == [(E, E)] * 4


def test_weights_that_nobody_reads_are_not_averaged() -> None:
    class First(Attend):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, padding: Any = None, mask: Any = None) -> Any:
            return super().forward(query, key, value, padding, mask)[0]

    model = First(need_weights=True).eval()
    captured = check(model, *inputs(model))
    assert "mean" not in [target_name(n) for n in captured.gm.graph.nodes]


def test_dynamic_lengths() -> None:
    model = Attend(need_weights=True, self_attention=True).eval()

    def args(batch: int, length: int) -> list[Tensor]:
        x = additive(batch, length, E)
        return [x, x, x, boolean(batch, length)]

    first, *others = [args(3, 5), args(4, 9), args(7, 2)]
    compared: list[int] = []

    def compare(out: Any, expected: Any) -> None:
        assert_same(out, expected, depth=DEPTH)
        compared.append(out[0].shape[0])

    _, graphs = through_capture(model, *first, dynamic=True, others=others, compare=compare)
    assert [len(linears(captured)) for captured in graphs] == [4]
    assert len(compared) == 3


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("separate", [False, True])
def test_dynamic_width_is_that_of_the_weights(training: bool, separate: bool) -> None:
    class SelfAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha = nn.MultiheadAttention(E, H, batch_first=True, kdim=E + 1 if separate else None)

        def forward(self, x: Tensor, key: Tensor) -> Tensor:
            return self.mha(x, key, x, need_weights=False)[0]

    model = SelfAttention().train(training)
    args = additive(B, L, E), additive(B, L, E + separate)
    out, (captured,) = through_capture(model, *args, dynamic=True)
    assert reasons(captured) == []
    assert len(linears(captured)) == 4
    with torch.no_grad():
        assert_same(out, model(*args), depth=DEPTH)


@pytest.mark.parametrize("norm_first", [False, True])
def test_dynamic_width_of_an_encoder_layer(norm_first: bool) -> None:
    model = nn.TransformerEncoderLayer(E, H, 2 * E, 0.0, batch_first=True, norm_first=norm_first).eval()
    x, y = additive(B, L, E), additive(B + 1, S, E)
    (first, second), (captured,) = through_capture(model, x, dynamic=True, others=[(y,)])
    assert reasons(captured) == []
    assert len(linears(captured)) == 6
    with torch.no_grad():
        assert_same(first, model(x), depth=2 * DEPTH)
        assert_same(second, model(y), depth=2 * DEPTH)


def test_static_keys_are_declined_by_name() -> None:
    module = nn.MultiheadAttention(E, H).eval()

    def compute(x: Tensor, static: Tensor) -> Any:
        return F.multi_head_attention_forward(
            x, x, x, E, H, module.in_proj_weight, module.in_proj_bias, None, None, False, 0.0,
            module.out_proj.weight, module.out_proj.bias, training=False, static_k=static, static_v=static,
        )[0]  # fmt: skip

    x, static = additive(L, B, E), additive(B * H, S, E // H)
    out, (captured,) = through_capture(compute, x, static)
    assert reasons(captured) == ["attention with static_k or static_v: left as it is"]
    with torch.no_grad():
        assert torch.equal(out, compute(x, static))


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("mask_type", [None, 0, 1, 2])
def test_native_attention(mask_type: int | None, need_weights: bool) -> None:
    module = nn.MultiheadAttention(E, H).eval()
    mask = None if mask_type is None else boolean(*[(L, L), (B, L), (B, H, L, L)][mask_type])

    def compute(x: Tensor) -> Any:
        return torch._native_multi_head_attention(
            x, x, x, E, H, module.in_proj_weight, module.in_proj_bias, module.out_proj.weight, module.out_proj.bias,
            mask, need_weights, True, mask_type,
        )[: 1 + need_weights]  # fmt: skip

    check(compute, additive(B, L, E))  # pyright: ignore[reportArgumentType]


def layer(**options: Any) -> nn.TransformerEncoderLayer:
    torch.manual_seed(4)
    made = nn.TransformerEncoderLayer(E, H, 2 * E, batch_first=True, dropout=0.0, **options)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.4)
    return made.eval()


class Layer(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.block = layer(**options)

    def forward(self, x: Tensor, mask: Any = None, padding: Any = None) -> Tensor:
        return self.block(x, src_mask=mask, src_key_padding_mask=padding)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_encoder_layer(activation: str, norm_first: bool) -> None:
    model = Layer(activation=activation, norm_first=norm_first)
    captured = check(model, additive(B, L, E), products=6)
    parts = ("q_proj", "k_proj", "v_proj", "out_proj")
    assert linear_paths(captured) == [*(f"block.self_attn.{p}" for p in parts), "block.linear1", "block.linear2"]


@pytest.mark.parametrize("mask", [None, "bool", "float", "plane", "empty", "steep"])
@pytest.mark.parametrize("padding", [False, True])
def test_encoder_layer_masks(mask: str | None, padding: bool) -> None:
    masks = {
        "bool": boolean(L, L),
        "float": nn.Transformer.generate_square_subsequent_mask(L),
        "plane": boolean(B * H, L, L),
        "empty": torch.eye(L, dtype=torch.bool) | (torch.arange(L) == 2)[:, None],  # row 2 has nothing left
        "steep": torch.where(boolean(L, L), -3.0, 0.0),  # the fused layer leaves out whatever is not zero
    }
    kind = torch.float32 if mask in ("float", "steep") else torch.bool  # torch wants both masks of one kind
    columns = boolean(B, L) if kind == torch.bool else torch.where(boolean(B, L), -float("inf"), 0.0)
    check(Layer(), additive(B, L, E), masks[mask] if mask else None, columns if padding else None, products=6)


def test_encoder_layer_function_with_a_square_mask() -> None:
    block = layer()
    mask = boolean(L, L)

    def compute(x: Tensor) -> Tensor:
        attention = block.self_attn
        return torch._transformer_encoder_layer_fwd(
            x, E, H, attention.in_proj_weight, attention.in_proj_bias,
            attention.out_proj.weight, attention.out_proj.bias,
            True, False, 1e-5, block.norm1.weight, block.norm1.bias, block.norm2.weight, block.norm2.bias,
            block.linear1.weight, block.linear1.bias, block.linear2.weight, block.linear2.bias, mask, 0,
        )  # fmt: skip

    check(compute, additive(B, L, E), products=6)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_encoder_of_two_layers(training: bool, padding: bool) -> None:
    model = nn.TransformerEncoder(layer(), 2, enable_nested_tensor=True).train(training)
    x, mask = additive(B, L, E), None
    padding_mask = boolean(B, L) if padding else None
    _, (captured,) = through_capture(
        model, x, mask, padding_mask, names=model_names(model), compare=lambda a, b: assert_same(a, b, depth=2 * DEPTH)
    )
    parts = [f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")]
    assert linear_paths(captured) == [f"layers.{i}.{p}" for i in range(2) for p in (*parts, "linear1", "linear2")]
    assert not reasons(captured)


def test_export_decomposes_the_fused_layer_too() -> None:
    model = Layer()
    x = additive(B, L, E)
    with torch.no_grad():
        program = torch.export.export(model, (x,), strict=True)
        captured = from_export(program)
        assert linear_paths(captured)[::5] == ["block.self_attn.q_proj", "block.linear2"]
        assert not reasons(captured)
        (out,) = captured.gm(x)
        assert_same(out, model(x), depth=DEPTH)
