"""The captured graph computes what the model computes, and every product with a weight has the one form or a reason."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from fxquant import verify
from fxquant.annotation import note_of
from fxquant.capture import from_dynamo, from_export
from fxquant.errors import CaptureFailed
from fxquant.graphs import target_name, value_of
from tests.helpers import (
    assert_same,
    capture,
    linear_paths,
    linears,
    model_names,
    of_activations,
    reasons,
    run_captured,
    through_capture,
)

K, N = 24, 40
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Product(nn.Module):
    """One product of an activation with parameters, given as a function."""

    def __init__(self, compute: Any, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator).to(dtype))

        self.w, self.wt = parameter(K, N), parameter(N, K)
        self.stored = nn.Parameter(parameter(N, K).data.t())  # [K, N], columns contiguous
        self.heads, self.joined = parameter(K, 4, N // 4), parameter(4, K // 4, N)
        self.batch = parameter(3, K, N)
        self.bias, self.one, self.row, self.v = parameter(N), parameter(1), parameter(1, N), parameter(K)
        self.low_a, self.low_b = parameter(N, 2), parameter(2, K)
        self.compute = compute

    def forward(self, x: Tensor) -> Any:
        return self.compute(self, x)


def activation(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3)).to(dtype)


TWO_DIMENSIONAL = {
    "linear": lambda m, x: F.linear(x, m.wt, m.bias),
    "linear without bias": lambda m, x: F.linear(x, m.wt),
    "linear by keywords": lambda m, x: F.linear(input=x, weight=m.wt, bias=m.bias),
    "linear of a transpose": lambda m, x: F.linear(x, m.w.t()),
    "linear of an expression": lambda m, x: F.linear(x, m.wt * 2 + m.low_a @ m.low_b, m.bias + 1),
    "linear with a row as bias": lambda m, x: F.linear(x, m.wt) + F.linear(x, m.wt, m.row),
    "mm": lambda m, x: torch.mm(x, m.w),
    "mm by keywords": lambda m, x: torch.mm(mat2=m.w, input=x),
    "mm method": lambda m, x: x.mm(m.w),
    "addmm": lambda m, x: torch.addmm(m.bias, x, m.w),
    "addmm with factors": lambda m, x: torch.addmm(m.bias, x, m.w, beta=0.5, alpha=2),
    "addmm with beta zero": lambda m, x: torch.addmm(m.bias * float("nan"), x, m.w, beta=0),
    "addmm with a row": lambda m, x: torch.addmm(m.row, x, m.w),
    "addmm with one number": lambda m, x: torch.addmm(m.one, x, m.w),
    "addmm with an activation": lambda m, x: torch.addmm(x[:, :1], x, m.w),
    "addmm method": lambda m, x: m.bias.addmm(x, m.w, alpha=0.25),
    "addmm of a transpose": lambda m, x: torch.addmm(m.bias, x, m.wt.t()),
    "stored transposed": lambda m, x: x @ m.stored,
    "stored transposed, linear": lambda m, x: F.linear(x, m.stored.t()),
}
ANY_DIMENSIONS = {
    "matmul": lambda m, x: x @ m.w,
    "matmul function": lambda m, x: torch.matmul(x, m.w),
    "matmul method": lambda m, x: x.matmul(m.w),
    "dunder": lambda m, x: x.__matmul__(m.w),
    "t": lambda m, x: x @ m.wt.t(),
    "T": lambda m, x: x @ m.wt.T,
    "mT": lambda m, x: x @ m.wt.mT,
    "transpose": lambda m, x: x @ m.wt.transpose(-1, -2),
    "swapaxes": lambda m, x: x @ m.wt.swapaxes(0, 1),
    "permute": lambda m, x: x @ m.wt.permute(1, 0),
    "permute with a tuple": lambda m, x: x @ torch.permute(m.wt, (1, 0)),
    "inner": lambda m, x: torch.inner(x, m.wt),
    "one head": lambda m, x: x @ m.heads[:, 1],
    "einsum": lambda m, x: torch.einsum("...k,kn->...n", x, m.w),
    "einsum without arrow": lambda m, x: torch.einsum("...k,kn", x, m.w),
    "einsum of a transpose": lambda m, x: torch.einsum("...k,nk->...n", x, m.wt),
    "einsum to heads": lambda m, x: torch.einsum("...d, dhk -> ...hk", x, m.heads),
    "einsum to heads, permuted": lambda m, x: torch.einsum("...d,dhk->h...k", x, m.heads),
    "einsum from heads": lambda m, x: torch.einsum("...hk,hkd->...d", x.unflatten(-1, (4, -1)), m.joined),
    "einsum from heads, swapped": lambda m, x: torch.einsum("hkd,...kh->...d", m.joined, x.unflatten(-1, (K // 4, 4))),
    "einsum with the weight first": lambda m, x: torch.einsum("kn,...k->...n", m.w, x),
    "einsum over the first index": lambda m, x: torch.einsum("k...,kn->n...", x.movedim(-1, 0), m.w),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", [*TWO_DIMENSIONAL, *ANY_DIMENSIONS])
def test_product_becomes_linear(form: str, dtype: torch.dtype) -> None:
    model = Product({**TWO_DIMENSIONAL, **ANY_DIMENSIONS}[form], dtype)
    x = activation(5, K, dtype=dtype)
    out, (captured,) = through_capture(model, x, fullgraph=True)
    products = [n for n in captured.gm.graph.nodes if verify.product_word(n) and is_activation(n)]
    assert [target_name(n) for n in products] == ["aten.linear"] * (2 if "row as bias" in form else 1)
    assert not reasons(captured)
    # one product and at most two more roundings of it (alpha, bias); K sums in float32 add less than one rounding
    # of the narrow types, and at most K of float32's
    with torch.no_grad():
        assert_same(out, model(x), depth=4 if dtype != torch.float32 else K)


def is_activation(node: torch.fx.Node) -> bool:
    """Whether a value depends on a placeholder."""
    return node.op == "placeholder" or any(map(is_activation, node.all_input_nodes))


@pytest.mark.parametrize("shape", [(K,), (2, 3, K), (1, K), (0, K)], ids=str)
@pytest.mark.parametrize("form", ANY_DIMENSIONS)
def test_any_number_of_dimensions(form: str, shape: tuple[int, ...]) -> None:
    model = Product(ANY_DIMENSIONS[form])
    x = activation(*shape)
    out, (captured,) = through_capture(model, x, fullgraph=True)
    assert len(linears(captured)) == 1
    with torch.no_grad():
        assert_same(out, model(x), depth=K)


def test_transpose_of_a_transpose_is_the_weight_itself() -> None:
    captured = capture(Product(lambda m, x: x @ m.wt.t()), activation(5, K))
    (product,) = linears(captured)
    assert product.args[1] is next(n for n in captured.gm.graph.nodes if n.target == "wt")
    assert [n.op for n in captured.gm.graph.nodes] == ["placeholder", "get_attr", "call_function", "output"]


LEFT = {
    "the weight stands left": (lambda m, x: m.wt @ x.t(), "the weight stands left of the product"),
    "bmm": (lambda m, x: torch.bmm(x.expand(3, -1, -1), m.batch), "a batched product"),
    "batched matmul": (lambda m, x: x @ m.batch, "a batched product"),
    "batched einsum": (lambda m, x: torch.einsum("bk,bkn->bn", x[:3], m.batch), "a batched einsum"),
    "einsum that sums": (lambda m, x: torch.einsum("bk,kn->n", x, m.w), "an einsum that is no plain product"),
    "einsum of a diagonal": (lambda m, x: torch.einsum("bk,kk->bk", x, m.w[:, :K]), "an einsum with a repeated index"),
    "einsum that broadcasts": (lambda m, x: torch.einsum("bk,kn->bn", x[:, :1], m.w), "an einsum that broadcasts"),
    "einsum of three": (lambda m, x: torch.einsum("bk,kn,n->bn", x, m.w, m.bias), "an einsum of other than two"),
    "tensordot": (lambda m, x: torch.tensordot(x, m.w, 1), "this form of product"),
    "transposed conv": (lambda m, x: F.conv_transpose1d(x.t()[None], m.batch.permute(1, 2, 0)), "a transposed conv"),
    "conv by the activation": (lambda m, x: F.conv1d(m.batch[:, :5], x[:, :5, None]), "the weight is computed from an"),
    "embedding bag": (lambda m, x: F.embedding_bag(x[:1].abs().long(), m.w), "an embedding bag adds up the rows"),
    "embedding with max_norm": (
        lambda m, x: F.embedding(x[0].abs().long(), m.w, max_norm=9.0),
        "the model writes to the weight",
    ),
    "in place": (lambda m, x: torch.zeros_like(x[:, :1]).expand(-1, N).clone().addmm_(x, m.w), "an in-place product"),
    "written weight": (lambda m, x: m.w.mul_(1) is None or x @ m.w, "the model writes to the weight"),
    "inside vmap": (lambda m, x: torch.vmap(lambda row: row @ m.w)(x), "a product inside a function transform"),
    "vmap over the weight": (lambda m, x: torch.vmap(lambda w: x @ w)(m.batch), "a product inside a function"),
    "weight by the activation": (lambda m, x: F.linear(m.low_b, x), "the weight stands left of the product"),
}


@pytest.mark.parametrize("form", LEFT)
def test_product_that_stays_has_a_reason(form: str) -> None:
    compute, words = LEFT[form]
    model, x = Product(compute), activation(5, K)
    with torch.no_grad():
        expected = copy.deepcopy(model)(x)
    out, (captured,) = through_capture(model, x, fullgraph=True)
    assert not linears(captured)
    (reason,) = reasons(captured)
    assert reason.startswith(words)
    assert_same(out, expected)


@pytest.mark.parametrize(
    "compute",
    [
        lambda m, x: x @ x.t(),
        lambda m, x: torch.einsum("bk,ck->bc", x, x),
        lambda m, x: F.scaled_dot_product_attention(x, x, x),
        lambda m, x: x + (m.low_a @ m.low_b)[0],
        lambda m, x: x @ m.v,
        lambda m, x: x * m.w[:, 0],
    ],
    ids=["activations", "einsum", "attention", "parameters", "vector", "elementwise"],
)
def test_other_products_are_untouched(compute: Any, request: pytest.FixtureRequest) -> None:
    model, x = Product(compute), activation(5, K)
    out, (captured,) = through_capture(model, x, fullgraph=True)
    assert not linears(captured)
    assert not reasons(captured)
    two = request.node.callspec.id in ("activations", "einsum", "attention")
    assert len(of_activations(captured)) == two  # named for the report, and left as they are
    with torch.no_grad():
        assert torch.equal(out, model(x))


def test_weights_are_the_model_s_own_tensors() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4, bias=False)).eval()
    captured = capture(model, activation(3, 8))
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert {w.paths[0] for w in captured.weights} == set(state) - {"1.num_batches_tracked"}
    for weight in captured.weights:
        assert getattr(captured.gm, weight.name) is state[weight.paths[0]]
        assert weight.is_parameter == isinstance(state[weight.paths[0]], nn.Parameter)
        assert weight.input_meta["tensor_dict"]["_dynamo_static_input_type"]
        assert "grapharg" not in weight.input_meta
    assert sorted([*captured.inputs, *(w.position for w in captured.weights)]) == list(range(captured.argument_count))


def test_callers_graph_is_not_changed() -> None:
    seen: list[Any] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        before = str(gm.graph), [dict(n.meta) for n in gm.graph.nodes], dict(gm.named_parameters())
        captured = from_dynamo(gm, example_inputs)
        after = str(gm.graph), [dict(n.meta) for n in gm.graph.nodes], dict(gm.named_parameters())
        seen.append((before[0] == after[0], [list(m) for m in before[1]] == [list(m) for m in after[1]], after[2]))
        modes = {value_of(n).fake_mode for n in captured.gm.graph.nodes if isinstance(value_of(n), Tensor)}
        seen.append(len(modes))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
        torch.compile(model, backend=backend)(activation(1, 3, 8))
    assert seen == [(True, True, {}), 1]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.body(self.embed(tokens))))


@pytest.mark.parametrize("known", [False, True], ids=["bare", "named"])
def test_tied_and_shared_weights(known: bool) -> None:
    model, tokens = Tied(), torch.tensor([[1, 2, 9]])
    out, (captured,) = through_capture(model, tokens, names=model_names(model) if known else None)
    assert linear_paths(captured) == ["body", "body", "head"]
    assert len({w.name for w in captured.weights}) == len(captured.weights) == 3
    if known:
        assert captured.weight("embed_weight").paths == ("embed.weight", "head.weight")
    with torch.no_grad():
        assert torch.equal(out, model(tokens))


def test_same_tensor_twice_is_one_weight() -> None:
    def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        weights = [i for i, value in enumerate(example_inputs) if isinstance(value, nn.Parameter)]
        example_inputs[weights[1]] = example_inputs[weights[0]]
        graphs.append(from_dynamo(gm, example_inputs))
        return gm.forward

    graphs: list[Any] = []
    torch._dynamo.reset()
    with torch.no_grad():
        model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
        torch.compile(model, backend=backend)(activation(2, 8))
    (captured,) = graphs
    (weight,) = captured.weights
    first, second = linears(captured)
    assert first.args[1] is second.args[1]
    assert weight.paths == ("0.weight", "1.weight")
    assert linear_paths(captured) == ["0", "1"]
    assert captured.argument_count == 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.w = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        torch._dynamo.graph_break()
        return x @ self.w


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[1](self.blocks[0](x))
        torch._dynamo.graph_break()
        return self.last(x)


def test_names_survive_a_graph_break() -> None:
    model, x = Broken(), activation(2, 8)
    _, graphs = through_capture(model, x, names=model_names(model))
    assert len(graphs) > 2
    paths = [path for graph in graphs for path in linear_paths(graph)]
    assert set(paths) == {"blocks.0.inner.0", "blocks.0.w", "last"}  # one graph serves both blocks


def test_break_reason_names_the_line() -> None:
    def broken(x: Tensor) -> Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    _, graphs = through_capture(broken, activation(2))
    assert "graph_break" in graphs[0].break_reason
    assert "test_capture.py:" in graphs[0].break_reason
    assert graphs[1].break_reason == ""


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ParameterDict({name: nn.Parameter(torch.randn(8, 8)) for name in ("w1", "w2")})
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.normed(x @ self.experts["w1"] @ self.experts["w2"])


def test_paths_of_bare_and_parametrized_weights() -> None:
    model = Bare()
    out, (captured,) = through_capture(model, activation(2, 8), names=model_names(model))
    assert linear_paths(captured) == ["experts.w1", "experts.w2", "normed"]
    with torch.no_grad():
        assert_same(out, model(activation(2, 8)), depth=24)


def test_source_line_is_the_user_s() -> None:
    captured = capture(Product(lambda m, x: x @ m.w), activation(5, K))
    (product,) = linears(captured)
    assert note_of(product).source.startswith("test_capture.py:")
    assert note_of(product).made_by == ("capture",)


@pytest.mark.parametrize("form", ["einsum to heads, permuted", "addmm with factors", "einsum from heads, swapped", "T"])
def test_dynamic_shapes(form: str) -> None:
    model = Product({**TWO_DIMENSIONAL, **ANY_DIMENSIONS}[form])
    sizes = [activation(rows, K) for rows in (5, 7, 31)]
    outs, graphs = through_capture(model, sizes[0], dynamic=True, others=[(x,) for x in sizes[1:]])
    assert len(graphs) == 1
    for out, x in zip(outs, sizes, strict=True):
        with torch.no_grad():
            assert_same(out, model(x), depth=K)


class Scaled(nn.Module):
    """Attention whose scale is a number of the module: under dynamic=True a symbol that Dynamo then settles."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 0.25
        self.proj = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q = self.proj(x)
        return F.scaled_dot_product_attention(q, q, q, scale=self.scale)


@torch.no_grad()
def test_numbers_that_dynamo_settled_are_constants() -> None:
    model, x = Scaled().eval(), torch.randn(2, 3, 5, 8)
    out, (captured,) = through_capture(model, x, dynamic=True)
    (attention,) = [n for n in captured.gm.graph.nodes if "scaled_dot_product_attention" in target_name(n)]
    assert attention.kwargs["scale"] == 0.25
    assert_same(out, model(x), depth=8)


def test_autocast_region_keeps_its_dtypes() -> None:
    def compute(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = torch.einsum("bd,dhk->hbk", x, m.heads)
        return y.float() @ m.w[: N // 4]

    model, x = Product(compute), activation(5, K)
    out, (captured,) = through_capture(model, x, fullgraph=True)
    inside, outside = linears(captured)
    assert value_of(inside).dtype == torch.bfloat16
    assert value_of(outside).dtype == torch.float32
    with torch.no_grad():
        assert_same(out, model(x), depth=K)


def test_higher_order_call_has_a_reason() -> None:
    layer, x = nn.Linear(8, 8), activation(2, 8).requires_grad_()

    def compute(x: Tensor) -> Any:
        return checkpoint(layer, x, use_reentrant=False)

    graphs: list[Any] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        graphs.append(from_dynamo(gm, example_inputs))
        verify.captured(graphs[-1].gm)
        return lambda *args: run_captured(graphs[-1], args)

    torch._dynamo.reset()
    out = torch.compile(compute, backend=backend, fullgraph=True)(x)
    assert ["cannot be looked into" in reason for reason in reasons(graphs[0])] == [True]
    assert torch.equal(out, layer(x))


def test_custom_op_has_a_reason() -> None:
    with torch.library._scoped_library("capture_test", "DEF") as library:
        library.define("mix(Tensor x, Tensor w) -> Tensor")
        library.impl("mix", lambda x, w: x @ w, "CompositeExplicitAutograd")
        torch.library.register_fake("capture_test::mix", lambda x, w: x @ w, lib=library)
        model, x = Product(lambda m, x: torch.ops.capture_test.mix(x, m.w)), activation(5, K)
        captured = capture(model, x)
        assert reasons(captured) == ["capture_test.mix cannot be looked into: left as it is"]


def test_graph_of_a_condition_survives_release() -> None:
    inner, outer = nn.Linear(8, 8), nn.Linear(8, 8)

    def compute(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: inner(x) + 1, lambda x: x - 1, (outer(x),))

    x = activation(2, 8)
    out, (captured,) = through_capture(compute, x, fullgraph=True)
    assert len(linears(captured)) == 1
    assert ["cannot be looked into" in reason for reason in reasons(captured)] == [True]
    with torch.no_grad():
        assert torch.equal(out, compute(x))
    captured.release()
    subgraphs = dict(captured.copy().gm.named_children()).values()
    assert [isinstance(m, torch.fx.GraphModule) for m in subgraphs] == [True, True]


def test_wrong_number_of_inputs_is_named() -> None:
    gm = torch.fx.symbolic_trace(nn.Linear(2, 2))
    with pytest.raises(CaptureFailed, match="1 placeholders, but 2 example inputs"):
        from_dynamo(gm, [1, 2])


class Exported(nn.Module):
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)
        self.head = nn.Linear(8, 8, bias=False)
        self.head.weight = self.up.weight
        self.w = nn.Parameter(torch.randn(8, 8))
        self.register_buffer("count", torch.zeros(()))
        self.constant = torch.randn(8, 8)

    def forward(self, x: Tensor, extra: dict[str, Any]) -> dict[str, Tensor]:
        self.count.add_(1)
        y = self.head(self.up(x)) @ self.constant
        return {"y": torch.addmm(self.w[0], y, self.w.t()) + extra["shift"] * extra["n"], "count": self.count + 0}


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`:FutureWarning")  # torch's own, in decompositions
@pytest.mark.parametrize("decomposed", [False, True])
def test_export_door(decomposed: bool) -> None:
    model, x, shift = Exported(), activation(5, 8), activation(8)
    extra = {"shift": shift, "n": 3}
    rows = torch.export.Dim("rows")
    shapes = {"x": {0: rows}, "extra": {"shift": None, "n": None}}
    with torch.no_grad():
        program = torch.export.export(copy.deepcopy(model), (x, extra), dynamic_shapes=shapes)
        captured = from_export(program.run_decompositions() if decomposed else program)
        verify.captured(captured.gm)
        assert linear_paths(captured) == ["up", "head", "constant", "w"]
        assert len(captured.inputs) == 3
        assert [w.position for w in captured.weights] == list(range(3, captured.argument_count))
        assert captured.weight("up_weight").paths == ("up.weight", "head.weight")
        assert not [n for n in captured.gm.graph.nodes if n.op == "call_module"]
        x = activation(9, 8)
        flat, _ = pytree.tree_flatten(((x, extra), {}))
        out_spec = program.call_spec.out_spec
        assert out_spec is not None
        out = pytree.tree_unflatten(run_captured(captured, flat), out_spec)
        expected = model(x, extra)
        assert_same(out["y"], expected["y"], depth=48)
        assert_same(out["count"], expected["count"])
