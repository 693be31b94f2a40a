"""What many tests need: a model's captured graph, and running it as Dynamo would."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxquant import verify
from fxquant.annotation import note_of
from fxquant.capture import from_dynamo
from fxquant.graphs import CapturedGraph
from fxquant.products import TWO_ACTIVATIONS


def capture(model: Callable[..., Any], *inputs: Any, dynamic: bool = False) -> CapturedGraph:
    """The captured graph of a model that Dynamo traces without a break."""
    _, (captured,) = through_capture(model, *inputs, dynamic=dynamic, fullgraph=True)
    return captured


def through_capture(
    model: Callable[..., Any],
    *inputs: Any,
    dynamic: bool = False,
    fullgraph: bool = False,
    names: Mapping[int, tuple[str, ...]] | None = None,
    others: Sequence[Sequence[Any]] = (),
    compare: Callable[[Any, Any], None] | None = None,
) -> tuple[Any, list[CapturedGraph]]:
    """Run the model with every graph of Dynamo's replaced by its captured form; returns the result and the graphs.

    With `others`, further argument lists to call with afterwards, the result is the list of all results. `compare`
    is called with what each captured graph gives and with what Dynamo's own graph gives on the same arguments.
    """
    graphs: list[CapturedGraph] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Any], **_: Any) -> Callable[..., Any]:
        captured = from_dynamo(gm, example_inputs, names)
        verify.captured(captured.gm)
        graphs.append(captured)

        def run(*args: Any) -> Any:
            result = run_captured(captured, args)
            if compare is not None:
                compare(result, gm(*args))
            return result

        return run

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=fullgraph)
    with torch.no_grad():
        results = [compiled(*args) for args in (inputs, *others)]
    return (results if others else results[0]), graphs


def run_captured(captured: CapturedGraph, args: Sequence[Any]) -> Any:
    """Run a captured graph with the original flat arguments; its weights are those that it was captured with."""
    return captured.gm(*(args[position] for position in captured.inputs))


def model_names(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """Every path of every parameter and buffer of the model, by identity."""
    names: dict[int, tuple[str, ...]] = {}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in tensors:
        names[id(tensor)] = (*names.get(id(tensor), ()), name)
    return names


def linear_paths(captured: CapturedGraph) -> list[str]:
    """The paths of the canonical products, in graph order."""
    return [note_of(node).path for node in linears(captured)]


def linears(captured: CapturedGraph) -> list[torch.fx.Node]:
    return list(captured.gm.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default))


def reasons(captured: CapturedGraph) -> list[str]:
    """The reasons that capture wrote on products with a weight that it left, in graph order."""
    found = [note_of(node).reason for node in captured.gm.graph.nodes]
    return [reason for reason in found if reason not in ("", TWO_ACTIVATIONS)]


def of_activations(captured: CapturedGraph) -> list[str]:
    """The names of the nodes that capture found to be products of two activations, in graph order."""
    return [node.name for node in captured.gm.graph.nodes if note_of(node).reason == TWO_ACTIVATIONS]


def assert_same(actual: Any, expected: Any, depth: int = 1) -> None:
    """Equal up to `depth` roundings in a row of the widest value of the expected tensor, each of relative size eps.

    NaN must stand where NaN is expected.
    """
    if expected is None:
        assert actual is None
        return
    if isinstance(expected, (tuple, list)):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other, depth)
        return
    assert isinstance(actual, Tensor)
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    finite = expected[expected.isfinite()].double().abs()
    widest = finite.max().item() if finite.numel() else 0.0
    atol = depth * torch.finfo(expected.dtype).eps * max(widest, 1e-30)
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=atol, equal_nan=True)
