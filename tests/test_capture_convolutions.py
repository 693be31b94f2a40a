"""Convolutions and embeddings in the canonical graph, through both doors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant import verify
from fxquant.annotation import note_of
from fxquant.capture import from_export
from fxquant.graphs import CapturedGraph
from fxquant.products import CONVOLUTION, EMBEDDING, products
from tests.helpers import assert_same, capture, reasons, through_capture

# Torch's own, once in a process, from its kernel for the float convolution.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


class Model(nn.Module):
    """One module, and what is done with it."""

    def __init__(self, inner: nn.Module, forward: Callable[[Any, Tensor], Any] | None = None) -> None:
        super().__init__()
        self.inner = inner
        self.compute = forward or (lambda m, x: m.inner(x))

    def forward(self, x: Tensor) -> Any:
        return self.compute(self, x)


def numbers(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(3)) * 2 - 1


def convolution(captured: CapturedGraph) -> torch.fx.Node:
    ((node, form),) = products(captured.gm)
    assert (node.target, form.kind) == (CONVOLUTION, "conv")
    return node


IMAGE = (2, 4, 9, 8)
# What captures, the lists of stride, padding, dilation, and groups.
GEOMETRIES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[Any]]] = {
    "plain": (lambda: nn.Conv2d(4, 6, 3), IMAGE, [[1, 1], [0, 0], [1, 1], 1]),
    "no bias": (lambda: nn.Conv2d(4, 6, 3, bias=False), IMAGE, [[1, 1], [0, 0], [1, 1], 1]),
    "strided": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 3)), IMAGE, [[2, 3], [0, 0], [1, 1], 1]),
    "padded": (lambda: nn.Conv2d(4, 6, 3, padding=(1, 2)), IMAGE, [[1, 1], [1, 2], [1, 1], 1]),
    "dilated": (lambda: nn.Conv2d(4, 6, 3, dilation=2, padding=2), IMAGE, [[1, 1], [2, 2], [2, 2], 1]),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), IMAGE, [[1, 1], [0, 0], [1, 1], 2]),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1), IMAGE, [[1, 1], [1, 1], [1, 1], 4]),
    "valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), IMAGE, [[1, 1], [0, 0], [1, 1], 1]),
    "same": (lambda: nn.Conv2d(4, 6, (3, 5), padding="same"), IMAGE, [[1, 1], [1, 2], [1, 1], 1]),
    "uneven same": (lambda: nn.Conv2d(4, 6, (2, 3), padding="same"), IMAGE, [[1, 1], [0, 1], [1, 1], 1]),
    "uneven dilated same": (
        lambda: nn.Conv2d(4, 6, (4, 2), dilation=(1, 3), padding="same"),
        IMAGE,
        [[1, 1], [1, 1], [1, 3], 1],
    ),
    "reflected": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), IMAGE, [[1, 1], [0, 0], [1, 1], 1]),
    "unbatched": (lambda: nn.Conv2d(4, 6, 3, padding=1), IMAGE[1:], [[1, 1], [1, 1], [1, 1], 1]),
    "one axis": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9), [[2], [1], [1], 1]),
    "one axis, unbatched": (lambda: nn.Conv1d(4, 6, 2, padding="same"), (4, 9), [[1], [0], [1], 1]),
    "three axes": (lambda: nn.Conv3d(4, 6, 2, stride=(1, 2, 1)), (2, 4, 5, 6, 5), [[1, 2, 1], [0] * 3, [1] * 3, 1]),
}


@pytest.mark.parametrize("case", GEOMETRIES)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_every_geometry_is_one_form_with_the_same_bits(case: str, dynamic: bool) -> None:
    make, shape, geometry = GEOMETRIES[case]
    torch.manual_seed(0)
    model, x = Model(make()), numbers(*shape)
    out, (captured,) = through_capture(model, x, dynamic=dynamic, fullgraph=True)
    stride, padding, dilation, transposed, output_padding, groups = convolution(captured).args[3:]
    assert [stride, padding, dilation, groups] == geometry
    assert (transposed, output_padding) == (False, [0] * len(geometry[0]))
    assert note_of(convolution(captured)).path == "inner"
    with torch.no_grad():
        assert torch.equal(out, model(x))


@pytest.mark.parametrize("case", GEOMETRIES)
def test_export_comes_to_the_same_form(case: str) -> None:
    make, shape, geometry = GEOMETRIES[case]
    torch.manual_seed(0)
    model, x = Model(make()).eval(), numbers(*shape)
    captured = from_export(torch.export.export(model, (x,)))
    verify.captured(captured.gm)
    node = convolution(captured)
    assert [*node.args[3:6], node.args[8]] == geometry
    with torch.no_grad():
        (out,) = captured.gm(x)
        assert torch.equal(out, model(x))


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: F.conv2d(x, m.inner.weight, stride=2),
        lambda m, x: F.conv2d(x, weight=m.inner.weight, bias=m.inner.bias, padding="same", groups=1),
        lambda m, x: torch.convolution(x, m.inner.weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
        lambda m, x: F.conv2d(x, m.inner.weight * 2, m.inner.bias),
    ],
    ids=["keywords", "all keywords", "convolution", "expression"],
)
def test_functionals(forward: Any) -> None:
    model, x = Model(nn.Conv2d(4, 6, 3), forward), numbers(*IMAGE)
    out, (captured,) = through_capture(model, x, fullgraph=True)
    assert note_of(convolution(captured)).source.startswith("test_capture_convolutions.py:")
    with torch.no_grad():
        assert_same(out, model(x))


def test_channels_last_stays() -> None:
    model = Model(nn.Conv2d(4, 6, 3)).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    out, (captured,) = through_capture(model, numbers(*IMAGE), fullgraph=True)
    assert convolution(captured).meta["val"].stride() == out.stride()


def test_autocast_rounds_what_it_rounded() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return m.inner(x)

    model, x = Model(nn.Conv1d(4, 6, 2, padding="same"), forward), numbers(2, 4, 9)
    out, (captured,) = through_capture(model, x, fullgraph=True)
    assert convolution(captured).meta["val"].dtype is torch.bfloat16
    with torch.no_grad():
        assert torch.equal(out, model(x))


@pytest.mark.parametrize(
    ("inner", "words"),
    [
        (nn.ConvTranspose2d(4, 6, 3), "a transposed convolution"),
        (nn.ConvTranspose2d(4, 6, 3, groups=2, output_padding=1, stride=2), "a transposed convolution"),
    ],
    ids=["transposed", "grouped"],
)
def test_what_is_left_says_why(inner: nn.Module, words: str) -> None:
    captured = capture(Model(inner), numbers(*IMAGE))
    assert not list(products(captured.gm))
    (reason,) = reasons(captured)
    assert reason.startswith(words)


IDS = torch.tensor([[1, 0, 7], [9, 9, 2]])
TABLES: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...]]] = {
    "plain": (lambda: nn.Embedding(10, 4), ()),
    "padding": (lambda: nn.Embedding(10, 4, padding_idx=3), (3,)),
    "padding from behind": (lambda: nn.Embedding(10, 4, padding_idx=-1), (9,)),
    "sparse": (lambda: nn.Embedding(10, 4, sparse=True), (-1, False, True)),
}


@pytest.mark.parametrize("case", TABLES)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_embeddings_take_one_form(case: str, dynamic: bool) -> None:
    make, tail = TABLES[case]
    model = Model(make())
    out, (captured,) = through_capture(model, IDS, dynamic=dynamic, fullgraph=True)
    ((node, form),) = products(captured.gm)
    assert (node.target, form.kind, node.args[2:]) == (EMBEDDING, "embedding", tail)
    assert note_of(node).path == "inner"
    with torch.no_grad():
        assert torch.equal(out, model(IDS))


def test_both_orders_of_operands() -> None:
    def forward(m: Any, ids: Tensor) -> Tensor:
        return F.embedding(ids, m.inner.weight, padding_idx=-2) + torch.embedding(m.inner.weight, ids)

    model = Model(nn.Embedding(10, 4), forward)
    out, (captured,) = through_capture(model, IDS, fullgraph=True)
    assert [node.args[2:] for node, _ in products(captured.gm)] == [(8,), ()]
    with torch.no_grad():
        assert torch.equal(out, model(IDS))


def test_a_table_of_constant_indices_is_a_product_too() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, 4)
            self.register_buffer("ids", torch.arange(6))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.table(self.ids)

    captured = capture(Positions(), numbers(6, 4))
    ((node, _),) = products(captured.gm)
    assert note_of(node).path == "table"


def test_max_norm_writes_to_its_table() -> None:
    """The head tied to it must stay float too: its codes would be those of the table before the call."""

    def forward(m: Any, ids: Tensor) -> Tensor:
        return F.linear(m.inner(ids), m.inner.weight)

    captured = capture(Model(nn.Embedding(10, 4, max_norm=0.1), forward), IDS)
    assert reasons(captured) == ["the model writes to the weight while it runs"] * 2


def test_products_of_activations_are_named() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        scores = torch.bmm(x, x.transpose(1, 2))
        return F.scaled_dot_product_attention(scores @ x, x, x, torch.zeros(9, 9)) + F.conv1d(x, x[:4, :, :1])[:, :1]

    captured = capture(Model(nn.Identity(), forward), numbers(4, 9, 9))
    found = [
        n.name for n in captured.gm.graph.nodes if note_of(n).reason == "a product of two activations: stays float"
    ]
    assert len(found) == 4
    assert not reasons(captured)
