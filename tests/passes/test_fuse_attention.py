"""fuse-attention: attention goes to the kernel without copies of its keys and values, or stays with a reason."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant import quantize
from fxquant.annotation import note_of
from fxquant.capture import from_export
from fxquant.graphs import CapturedGraph, target_name
from fxquant.passes import FuseAttention, run_passes
from fxquant.report.walk import is_left
from tests.attention_problems import operands
from tests.helpers import capture
from tests.passes.helpers import Comparison, arguments_for, check_pass, nodes_of, run, within

ATTENTION = torch.ops.fxquant.attention.default
SHAPE = (2, 6, 2, 5, 9, 8, 8)
GIVEN = operands(SHAPE)
CLOSE = within(2e-6)  # scores below 5, sums of 9 keys: 40 roundings of values below 4
MASK = torch.ones(5, 9, dtype=torch.bool).tril(4)
sdpa = F.scaled_dot_product_attention


def attend(captured: CapturedGraph) -> Any:
    (node,) = nodes_of(captured.gm, ATTENTION)
    return node


def words(captured: CapturedGraph) -> list[str]:
    return [target_name(n) for n in captured.gm.graph.nodes if n.op in ("call_function", "call_method")]


def in_order(captured: CapturedGraph, forward: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Dynamo has the inputs in the order in which the graph reads them; its names are those of the parameters."""
    named = dict(zip((f"l_{name}_" for name in inspect.signature(forward).parameters), inputs, strict=True))
    return [named[node.name] for node in captured.gm.graph.find_nodes(op="placeholder") if node.name in named]


def fused(forward: Callable[..., Any], *inputs: Tensor, compare: Comparison = CLOSE) -> CapturedGraph:
    captured = capture(forward, *inputs)
    ordered = in_order(captured, forward, inputs)
    result = check_pass(FuseAttention(), captured, *ordered, changed=1, compare=compare)
    assert result.declined == []
    return captured


def fused_in_place(forward: Callable[..., Any], *inputs: Tensor) -> CapturedGraph:
    """The same for a model that writes to its inputs: each run gets its own."""
    captured = capture(forward, *(x.clone() for x in inputs))
    ordered = in_order(captured, forward, inputs)
    want = run(captured.gm, [x.clone() for x in ordered])
    assert run_passes(captured.gm, [FuseAttention()])["fuse-attention"].changed == 1
    CLOSE(run(captured.gm, [x.clone() for x in ordered]), want)
    return captured


def expanded(x: Tensor) -> Tensor:
    b, heads, n, width = x.shape
    return x[:, :, None, :, :].expand(b, heads, 3, n, width).reshape(b, heads * 3, n, width)


COPIES: dict[str, Callable[[Tensor], Tensor]] = {
    "expand": expanded,
    "unsqueeze": lambda x: x.unsqueeze(2).expand(-1, -1, 3, -1, -1).reshape(2, 6, 9, 8),
    "flatten": lambda x: x.unsqueeze(-3).expand(2, 2, 3, 9, 8).flatten(1, 2),
    "contiguous": lambda x: x[..., None, :, :].expand(2, 2, 3, 9, 8).contiguous().view(2, 6, 9, 8),
    "clone": lambda x: x[:, :, None].expand(2, 2, 3, 9, 8).clone().view(2, 6, 9, 8),
    "repeat_interleave": lambda x: x.repeat_interleave(3, 1),
    "repeat_interleave of torch": lambda x: torch.repeat_interleave(x, 3, dim=-3),
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_of_keys_and_values_are_not_made(name: str) -> None:
    copy = COPIES[name]
    captured = fused(lambda q, k, v, m: sdpa(q, copy(k), copy(v), m, scale=0.25), *GIVEN.all, MASK)
    node = attend(captured)
    assert [n.op for n in node.args[:4]] == ["placeholder"] * 4
    assert node.args[4:] == (0.25, False)
    assert not {"expand", "reshape", "view", "flatten", "repeat_interleave"} & set(words(captured))


def test_enable_gqa() -> None:
    captured = fused(lambda q, k, v: sdpa(q, k, v, is_causal=True, enable_gqa=True), *GIVEN.all)
    assert words(captured) == ["fxquant.attention", "aten.clone"]
    assert attend(captured).args[3:] == (None, None, True)


def test_a_head_for_each() -> None:
    o = operands((2, 3, 3, 5, 9, 8, 4))
    fused(lambda q, k, v, m: sdpa(q, k, v, m), *o.all, torch.randn(5, 9))
    fused(lambda q, k, v: sdpa(query=q, key=k, value=v, attn_mask=None, dropout_p=0.0), *o.all)


def test_its_note_says_who_made_it() -> None:
    captured = fused(lambda q, k, v: sdpa(q, k, v, enable_gqa=True), *GIVEN.all)
    note = note_of(attend(captured))
    assert note.made_by[-1] == "fuse-attention"
    assert note.reason == "a product of two activations: stays float"
    assert [n.name for n in captured.gm.graph.nodes if is_left(n)] == ["attention"]  # not the copy behind it


NOT_COPIES: dict[str, Callable[[Tensor], Tensor]] = {
    "other order": lambda x: x.repeat(1, 3, 1, 1),
    "other dimension": lambda x: x.unsqueeze(1).expand(2, 3, 2, 9, 8).reshape(2, 6, 9, 8),
    "a part": lambda x: x[:, :, None, :, :4].expand(2, 2, 3, 9, 4).repeat(1, 1, 1, 1, 2).reshape(2, 6, 9, 8),
    "backwards": lambda x: x.flip(2)[:, :, None].expand(2, 2, 3, 9, 8).reshape(2, 6, 9, 8).flip(2),
    "expanded only": lambda x: x[:, :1].expand(2, 6, 9, 8),
    "keys": lambda x: x[:, :, :3].repeat_interleave(3, 2).repeat_interleave(3, 1),
}


@pytest.mark.parametrize("name", NOT_COPIES)
def test_what_only_looks_like_copies_is_read_as_it_is(name: str) -> None:
    copy = NOT_COPIES[name]
    fused(lambda q, k, v: sdpa(q, copy(k), copy(v)), *GIVEN.all)


def test_copies_of_keys_alone_stay() -> None:
    o = operands((2, 6, 2, 5, 9, 8, 8))
    value = operands((2, 6, 6, 5, 9, 8, 8)).value
    captured = fused(lambda q, k, v: sdpa(q, expanded(k), v), o.query, o.key, value)
    assert attend(captured).args[1].op != "placeholder"


def test_copies_that_are_read_elsewhere_stay_there() -> None:
    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        copies = expanded(k)
        return sdpa(q, copies, expanded(v)), copies + 1

    captured = fused(forward, *GIVEN.all)
    assert attend(captured).args[1].op == "placeholder"
    assert words(captured).count("expand") == 1


def test_one_tensor_for_keys_and_values() -> None:
    def forward(q: Tensor, k: Tensor) -> Tensor:
        copies = expanded(k)
        return sdpa(q, copies, copies)

    fused(forward, GIVEN.query, GIVEN.key)


def test_a_cache_that_is_written_to_after_it_was_copied() -> None:
    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys = expanded(k)
        k.mul_(2)
        return sdpa(q, keys, expanded(v))

    captured = fused_in_place(forward, *GIVEN.all)
    assert attend(captured).args[1].op != "placeholder"


def test_a_cache_that_is_written_to_before() -> None:
    def forward(q: Tensor, k: Tensor, v: Tensor, at: Tensor, new: Tensor) -> Tensor:
        k.index_copy_(2, at, new)
        return sdpa(q, expanded(k), expanded(v))

    captured = fused_in_place(forward, *GIVEN.all, torch.tensor([3]), torch.ones(2, 2, 1, 8))
    assert attend(captured).args[1].op == "placeholder"


@pytest.mark.parametrize(
    ("after", "copies"),
    [
        (lambda y: y.transpose(1, 2).contiguous().reshape(2, 5, 48), 0),
        (lambda y: y.transpose(1, 2).flatten(2) * 2, 0),
        (lambda y: y.permute(2, 0, 1, 3).flatten(-2).contiguous(), 0),
        (lambda y: y.view(12, 5, 8) + 1, 1),
        (lambda y: y, 1),
    ],
)
def test_the_layout_that_the_model_knows(after: Callable[[Tensor], Tensor], copies: int) -> None:
    captured = fused(lambda q, k, v: after(sdpa(q, k, v, enable_gqa=True)), *GIVEN.all)
    assert words(captured).count("aten.clone") == copies


DECLINED: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], str]] = {
    "dropout": (lambda q, k, v: sdpa(q, k, v, dropout_p=0.1, enable_gqa=True), GIVEN.all, "it has dropout"),
    "rank": (
        lambda q, k, v: sdpa(q, k, v),
        tuple(x[0, :2] for x in GIVEN.all),
        "its operands have 3, 3, 3 dimensions, not 4",
    ),
    "float64": (
        lambda q, k, v: sdpa(q, k, v),
        tuple(x[:, :2].double() for x in GIVEN.all),
        "it makes torch.float64 of",
    ),
    "batches": (
        lambda q, k, v: sdpa(q, k, v),
        (GIVEN.query[:, :2], GIVEN.key[:1], GIVEN.value[:1]),
        "its operands are [2, 2, 5, 8]",
    ),
    "mask of one key": (
        lambda q, k, v, m: sdpa(q, k, v, m),
        (GIVEN.query[:, :2], GIVEN.key, GIVEN.value, torch.randn(5, 1)),
        "its mask is [5, 1] for 9 keys",
    ),
}


@pytest.mark.parametrize("name", DECLINED)
def test_declined(name: str) -> None:
    forward, inputs, why = DECLINED[name]
    captured = capture(forward, *inputs)
    result = FuseAttention().run(captured.gm)
    assert result.changed == 0
    (declined,) = result.declined
    assert declined.reason.startswith(f"attention: {why}")


def test_under_autocast_it_stays() -> None:
    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return sdpa(q, k, v)

    captured = capture(forward, *(x[:, :2] for x in GIVEN.all))
    (declined,) = FuseAttention().run(captured.gm).declined
    assert "it makes torch.bfloat16 of torch.float32" in declined.reason


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    inputs = tuple(x.to(dtype) for x in GIVEN.all)
    fused(lambda q, k, v: sdpa(q, expanded(k), expanded(v)), *inputs, compare=within(2.0**-6))


def test_dynamic_lengths() -> None:
    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, expanded(k), expanded(v)).transpose(1, 2).flatten(2)

    captured = capture(forward, *GIVEN.all, dynamic=True)
    result = run_passes(captured.gm, [FuseAttention()])["fuse-attention"]
    assert (result.changed, result.declined) == (1, [])
    args = arguments_for(captured, *in_order(captured, forward, GIVEN.all))
    (got,) = run(captured.gm, args)
    CLOSE(got, forward(*GIVEN.all))


class Model(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, expanded(k), v.repeat_interleave(3, 1), scale=0.5).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("decomposed", [False, True])
def test_exported(decomposed: bool) -> None:
    program = torch.export.export(Model(), GIVEN.all)
    if decomposed:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own use of its treespecs
            program = program.run_decompositions({})
    captured = from_export(program)
    check_pass(FuseAttention(), captured, *GIVEN.all, changed=1, compare=CLOSE)
    assert [n.op for n in attend(captured).args[:3]] == ["placeholder"] * 3


class Block(nn.Module):
    """Attention between linears of 32 features, 4 heads on 2."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.kv, self.o = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (4, 8)).transpose(1, 2)
        k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in self.kv(x).chunk(2, -1))
        y = sdpa(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2))


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # at the import of torch._inductor
@pytest.mark.parametrize("executor", ["eager", "inductor"])
@pytest.mark.parametrize("door", ["compile", "model"])
def test_through_the_doors(executor: str, door: str) -> None:
    model, x = Block().eval().requires_grad_(False), torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"executor": executor}
    if door == "model":
        quantize(model, weights="int8")
    else:
        options["preset"] = "int8wo"
    want = torch.compile(model, backend="fxquant", options={**options, "fuse": False})(x)
    torch._dynamo.reset()
    got = torch.compile(model, backend="fxquant", options=options)(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
