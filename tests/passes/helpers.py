"""How passes are tested: graph in, graph out, both compared as graphs; and what holds for every pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from fxquant.annotation import PassResult, note_of
from fxquant.dump import text
from fxquant.graphs import CapturedGraph, copy_of, value_of, written_by
from fxquant.passes import Pass, run_passes
from fxquant.pipeline import pipeline_for
from fxquant.products import products
from fxquant.runner import Deciding
from fxquant.spec import QuantConfig, TensorSpec
from tests.helpers import capture

Config = QuantConfig | str
Forward = Callable[[Any, Tensor], Any]
Comparison = Callable[[Any, Any], None]

K = 16
# |x| <= 1 and |w| <= K**-0.5, so |x| @ |w| <= K**0.5; two float32 sums of it, each off by K roundings at most.
ATOL = 2 * K * K**0.5 * 2.0**-24
X = torch.rand(5, K, generator=torch.Generator().manual_seed(0)) * 2 - 1


class Linears(nn.Module):
    """Linears a, b, c, … of the given widths over K features, and what is done with them."""

    def __init__(
        self, forward: Forward, widths: Sequence[int] = (8, 8, 8), bias: Sequence[bool] | bool = False
    ) -> None:
        super().__init__()
        torch.manual_seed(1)
        biases = [bias] * len(widths) if isinstance(bias, bool) else bias
        for name, width, has_bias in zip("abcdef", widths, biases, strict=False):
            setattr(self, name, nn.Linear(K, width, bias=has_bias))
        self.low_a, self.low_b = nn.Parameter(torch.rand(2, K)), nn.Parameter(torch.rand(8, 2))
        self.register_buffer("table", torch.rand(8, K))
        self.compute = forward

    def forward(self, x: Tensor) -> Any:
        return self.compute(self, x)


def staged(
    model: Callable[..., Any],
    *inputs: Any,
    config: Config = "int8dq",
    before: str = "",
    dynamic: bool = False,
    evaluate: bool = True,
) -> CapturedGraph:
    """The captured graph after the pipeline's passes that stand in front of the pass `before` (all, if it is empty)."""
    captured = capture(model, *inputs, dynamic=dynamic)
    run_passes(captured.gm, passes_before(before, config, evaluate=evaluate))
    return captured


def passes_before(name: str, config: Config = "int8dq", *, evaluate: bool = True) -> list[Pass]:
    config = QuantConfig(config) if isinstance(config, str) else config
    passes = pipeline_for(config, Deciding(config), evaluate=evaluate)
    names = [step.name for step in passes]
    assert not name or name in names
    return list(passes[: names.index(name)] if name else passes)


def quantized_weight(w: Tensor, spec: str, *algorithm: str) -> Tensor:
    """What insert-qdq writes for a weight: only outputs that exist for the spec are read."""
    parsed = TensorSpec.parse(spec)
    parts = torch.ops.fxquant.quantize_weight.default(w, spec, *algorithm)
    zero_point = parts[2] if parsed.has_zero_point else None
    last = (parts[3],) if parsed.has_tensor_scale else ()
    return torch.ops.fxquant.dequantize.default(parts[0], parts[1], zero_point, spec, w.dtype, *last)


def quantized_activation(x: Tensor, spec: str) -> Tensor:
    """What insert-qdq writes for an activation."""
    parts = torch.ops.fxquant.quantize_dynamic.default(x, spec)
    last = (parts[2],) if TensorSpec.parse(spec).has_tensor_scale else ()
    return torch.ops.fxquant.dequantize.default(parts[0], parts[1], None, spec, x.dtype, *last)


def nodes_of(gm: GraphModule, target: Any) -> list[Node]:
    """The nodes that call `target`, in graph order."""
    return list(gm.graph.find_nodes(op="call_function", target=target))


def arguments_for(captured: CapturedGraph, *tensors: Tensor) -> list[Any]:
    """The graph's arguments for these tensors: Dynamo passes symbolic sizes as inputs of their own."""
    rest, sizes = iter(tensors), {}
    placeholders = captured.gm.graph.find_nodes(op="placeholder")
    pairs = [(node, next(rest) if isinstance(value_of(node), Tensor) else None) for node in placeholders]
    for node, tensor in pairs:
        if tensor is not None:
            sizes |= {str(symbol): size for symbol, size in zip(value_of(node).shape, tensor.shape, strict=True)}
    return [sizes[str(value_of(node))] if tensor is None else tensor for node, tensor in pairs]


def assert_same_graph(got: GraphModule, expected: GraphModule) -> None:
    """The two graphs are one graph, up to the names of nodes and the order of independent ones.

    They are walked together from their outputs (and from the calls that write in place, in order): targets, arguments
    and sharing must be equal, weights equal in value. Placeholders are matched by position.
    """
    why = _Unifier(got, expected).difference()
    if why:
        raise AssertionError(f"{why}\n\n{text(got, 'got')}\n{text(expected, 'expected')}")


class _Unifier:
    def __init__(self, got: GraphModule, expected: GraphModule) -> None:
        self.modules = (got, expected)
        self.places = tuple(
            {node: i for i, node in enumerate(gm.graph.find_nodes(op="placeholder"))} for gm in self.modules
        )
        self.there: dict[Node, Node] = {}
        self.back: dict[Node, Node] = {}

    def difference(self) -> str:
        roots = [_roots(gm) for gm in self.modules]
        if len(roots[0]) != len(roots[1]):
            return f"got {len(roots[0]) - 1} calls that write in place, expected {len(roots[1]) - 1}"
        todo: list[tuple[Any, Any]] = list(zip(*roots, strict=True))
        while todo:
            one, other = todo.pop()
            if why := self._compare(one, other, todo):
                return f"got       {_line(one)}\nexpected  {_line(other)}\n{why}"
        return ""

    def _compare(self, one: Any, other: Any, todo: list[tuple[Any, Any]]) -> str:
        """Why the two values differ; what has to be compared next is put on `todo`."""
        if isinstance(one, Node) and isinstance(other, Node):
            return self._compare_nodes(one, other, todo)
        if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
            if len(one) != len(other):
                return f"{len(one)} elements, expected {len(other)}"
            todo += zip(one, other, strict=True)
            return ""
        if isinstance(one, slice) and isinstance(other, slice):
            todo += [(one.start, other.start), (one.stop, other.stop), (one.step, other.step)]
            return ""
        return "" if type(one) is type(other) and one == other else f"{one!r}, expected {other!r}"

    def _compare_nodes(self, one: Node, other: Node, todo: list[tuple[Any, Any]]) -> str:
        if one in self.there or other in self.back:
            shared = self.there.get(one) is other and self.back.get(other) is one
            return "" if shared else "shared differently: the one is read in more places than the other"
        self.there[one], self.back[other] = other, one
        if one.op != other.op:
            return f"a {one.op}, expected a {other.op}"
        if one.op == "placeholder":
            places = (self.places[0][one], self.places[1][other])
            return "" if places[0] == places[1] else f"input {places[0]}, expected input {places[1]}"
        if one.op == "get_attr":
            held = [getattr(gm, str(n.target)) for gm, n in zip(self.modules, (one, other), strict=True)]
            return _weight_difference(*held)
        if one.target != other.target:
            return f"calls {one.target}, expected {other.target}"
        if one.kwargs.keys() != other.kwargs.keys():
            return f"keywords {sorted(one.kwargs)}, expected {sorted(other.kwargs)}"
        todo.append((one.args, other.args))
        todo += [(one.kwargs[key], other.kwargs[key]) for key in one.kwargs]
        return ""


def _roots(gm: GraphModule) -> list[Node]:
    return [node for node in gm.graph.nodes if node.op == "output" or written_by(node)]


def _weight_difference(one: Any, other: Any) -> str:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape or one.dtype != other.dtype:
            return f"a weight {list(one.shape)} {one.dtype}, expected {list(other.shape)} {other.dtype}"
        equal = torch.equal(*(t.detach().contiguous().view(torch.uint8) for t in (one, other)))
        return "" if equal else "weights of other values"
    return "" if type(one) is type(other) else f"{type(one)}, expected {type(other)}"


def _line(value: Any) -> str:
    return value.format_node() or str(value) if isinstance(value, Node) else repr(value)


def same_bits(got: Any, wanted: Any) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


def within(atol: float, rtol: float = 0.0) -> Comparison:
    return lambda got, wanted: torch.testing.assert_close(got, wanted, rtol=rtol, atol=atol)


def check_pass(
    step: Pass, captured: CapturedGraph, *inputs: Any, changed: int | None = None, compare: Comparison = same_bits
) -> PassResult:
    """Run one pass on a captured graph (edited in place) and check what every pass promises.

    The output is kept (bit for bit, unless `compare` says else), the graph is linted, nothing dead is left, every node
    has the value that it really computes, module paths and source lines survive, and a second run changes nothing.
    Returns what the first run said.
    """
    gm = captured.gm
    wanted = run(gm, inputs)
    old = copy_of(gm)
    result = run_passes(gm, [step])[step.name]
    if changed is not None:
        assert result.changed == changed, f"{result}\n{text(gm)}"
    compare(run(gm, inputs), wanted)
    assert_values_are_true(gm, inputs)
    assert _dead(gm) <= _dead(old), f"{step.name} leaves {_dead(gm) - _dead(old)} dead nodes"
    assert _paths(gm) == _paths(old), f"module paths were {_paths(old)}, are {_paths(gm)}"
    for node in gm.graph.nodes:
        if node.op == "call_function" and step.name in note_of(node).made_by:
            assert node.meta.get("stack_trace"), f"{node.name} has no stack trace"
            assert note_of(node).source, f"{node.name} has lost its source line"
    if not result.changed:
        assert_same_graph(gm, old)
    once = copy_of(gm)
    again = run_passes(gm, [step])[step.name]
    assert again.changed == 0, f"a second run changes {again.changed}"
    assert_same_graph(gm, once)
    return result


def captured_of(forward: Callable[..., Any], *inputs: Tensor) -> tuple[CapturedGraph, list[Tensor]]:
    """And the inputs in the order in which the graph reads them."""
    captured = capture(forward, *inputs)
    named = dict(zip((f"l_{name}_" for name in inspect.signature(forward).parameters), inputs, strict=True))
    return captured, [named[n.name] for n in captured.gm.graph.find_nodes(op="placeholder") if n.name in named]


def run(gm: GraphModule, inputs: Sequence[Any]) -> Any:
    with torch.no_grad():
        return gm(*inputs)


def assert_values_are_true(gm: GraphModule, inputs: Sequence[Any]) -> None:
    """Each node's fake value has the dtype, shape and strides of what the node computes on `inputs`."""
    gm.graph.lint()
    with torch.no_grad():
        _ValueCheck(gm).run(*inputs, enable_io_processing=False)


class _ValueCheck(Interpreter):
    def run_node(self, n: Node) -> Any:
        real = super().run_node(n)
        if n.op != "output":
            assert "val" in n.meta, f"{n.name} has no value"
            assert _matches(value_of(n), real), f"{n.name}: its value says {value_of(n)}, it computes {_facts(real)}"
        return real


def _matches(fake: Any, real: Any) -> bool:
    if isinstance(real, Tensor):
        same = isinstance(fake, Tensor) and fake.dtype == real.dtype and fake.dim() == real.dim()
        sizes = zip((*fake.shape, *_strides(fake)), (*real.shape, *_strides(real)), strict=True) if same else ()
        return same and all(not isinstance(one, int) or one == other for one, other in sizes)
    if isinstance(real, (tuple, list)):
        return len(fake) == len(real) and all(map(_matches, fake, real))
    return True


def _strides(tensor: Tensor) -> tuple[Any, ...]:
    """Strides, without those of dimensions of size 1, where they mean nothing."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return tuple(0 if isinstance(size, int) and size == 1 else stride for size, stride in pairs)


def _facts(real: Any) -> Any:
    return (real.dtype, tuple(real.shape), real.stride()) if isinstance(real, Tensor) else real


def _dead(gm: GraphModule) -> int:
    return sum(not n.users for n in gm.graph.nodes if n.op not in ("placeholder", "output") and not written_by(n))


def _paths(gm: GraphModule) -> set[str]:
    return {path for node, _ in products(gm) for path in note_of(node).paths}
