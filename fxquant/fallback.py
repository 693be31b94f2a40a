"""What Dynamo never shows us, quantized all the same.

`fxquant.compile` runs a shadow of the user's model: a copy of the module tree in which the parameters, buffers and hooks
are the user's own objects, and each linear asks where it runs. Under Dynamo it is the plain float product, which the backend
quantizes in the graph; in eager (a disabled module, a frame that Dynamo gave up) it is the same quantized op, from the very
first call. The user's modules are never touched.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from fxquant import cpu_kernels
from fxquant.annotation import Note, write_note
from fxquant.gradients import refuse_gradients
from fxquant.graphs import VALUE_KEY, CapturedGraph, CapturedWeight
from fxquant.lowering import to_eager
from fxquant.pipeline import quantize_graph
from fxquant.report import Site
from fxquant.runner import Deciding, GraphRunner
from fxquant.spec import QuantConfig
from fxquant.target import Target
from fxquant.weights import WeightStore

_LINEAR = torch.ops.aten.linear.default


class EagerLinear:
    """One linear outside any graph: the pipeline over a graph of one product, run by the eager executor.

    It is the same pipeline and the same weight store, so the numbers and the packed weights are those of the graphs.
    """

    def __init__(self, path: str, config: QuantConfig, store: WeightStore) -> None:
        self._path = path
        self._config = config
        self._store = store
        self._runners: dict[tuple[torch.dtype, torch.dtype, bool], GraphRunner] = {}

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        refuse_gradients([("the input of " + self._path, x)])
        key = (x.dtype, weight.dtype, bias is None)
        runner = self._runners.get(key)
        if runner is None:
            runner = self._runners[key] = self._make_runner(x, weight, bias)
        return runner(x, weight) if bias is None else runner(x, weight, bias)

    @property
    def site(self) -> Site | None:
        """The report's row for this linear; None if it has not run."""
        for runner in self._runners.values():
            for report in runner.reports:
                return report.sites[0]
        return None

    def _make_runner(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> GraphRunner:
        captured = _graph_of_one_linear(self._path, x, weight, bias)

        def lower(captured: CapturedGraph, decide: Any) -> Any:
            cpu_kernels.load()
            target = Target.of_this_machine(weight.device)
            lowered = quantize_graph(captured, self._config, decide, target=target, name=self._path, evaluate=False)
            return lowered, to_eager(lowered.gm)

        return GraphRunner(captured, Deciding(self._config, lambda: {}), lower, self._store)


def _graph_of_one_linear(path: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> CapturedGraph:
    graph, attributes = Graph(), {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    mode = torch._subclasses.FakeTensorMode()
    x_node = graph.placeholder("x")
    x_node.meta[VALUE_KEY] = mode.from_tensor(x.detach())
    operands = [x_node]
    for name, tensor in attributes.items():
        node = graph.create_node("get_attr", name)
        node.meta[VALUE_KEY] = mode.from_tensor(tensor.detach())
        operands.append(node)
    product = graph.call_function(_LINEAR, tuple(operands))
    with mode, torch.no_grad():
        product.meta[VALUE_KEY] = _LINEAR(*(n.meta[VALUE_KEY] for n in operands))
    write_note(product, Note(paths=(path,)))
    graph.output(product)
    gm = GraphModule(dict(attributes), graph)
    weights = tuple(
        CapturedWeight(name, (f"{path}.{name}",), position, isinstance(tensor, nn.Parameter))
        for position, (name, tensor) in enumerate(attributes.items(), start=1)
    )
    return CapturedGraph(gm, (0,), weights, 1 + len(weights))


class ShadowLinear(nn.Linear):
    """A linear of the shadow tree: the plain product for Dynamo, the quantized op in eager."""

    _fxquant_eager: EagerLinear
    _fxquant_reason: str

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return nn.functional.linear(input, self.weight, self.bias)
        if not self._fxquant_reason:
            self.__dict__["_fxquant_reason"] = _why_in_eager()
        return self._fxquant_eager(input, self.weight, self.bias)


def _why_in_eager() -> str:
    """Reads the call stack: the user's line that led here, and whether a torch.compiler.disable stands above it."""
    place, disabled = "", False
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        ours = "/torch/" in file or file == __file__
        if not place and not ours:
            place = f"{file.rsplit('/', 1)[-1]}:{frame.f_lineno}"
        if file.endswith("eval_frame.py") and "DisableContext" in frame.f_code.co_qualname:
            disabled = True
            break
        frame = frame.f_back
    why = "torch.compiler.disable" if disabled else "a frame that Dynamo did not trace (graph break or skipped code)"
    return f"never seen by Dynamo: {why} at {place}; ran in eager on the quantized op"


class Shadow:
    """The shadow of a model, kept in step with it.

    ``root`` is the module to compile. Before each call ``sync`` looks whether the user replaced a module or changed
    ``training``, and mends the shadow. Parameters, buffers and hooks need no sync: they live in dictionaries that both share.
    What a module writes to itself as a plain attribute while it runs lands in the shadow.
    """

    def __init__(self, model: nn.Module, config: QuantConfig, store: WeightStore) -> None:
        self._model = model
        self._config = config
        self._store = store
        self.root: nn.Module
        self._children: list[tuple[dict[str, Any], list[Any]]]
        self._pairs: list[tuple[nn.Module, nn.Module]] = []
        self._mirror()

    def sync(self) -> bool:
        """Bring the shadow up to date; True if the user had replaced a module."""
        changed = any(list(live.values()) != known for live, known in self._children)
        if changed:
            self._mirror()
        for original, twin in self._pairs:
            if original.training is not twin.training:
                twin.training = original.training
        return changed

    @property
    def fallbacks(self) -> list[Site]:
        """The report's rows for the linears that ran in eager."""
        rows = []
        for _, twin in self._pairs:
            if isinstance(twin, ShadowLinear) and (site := twin._fxquant_eager.site):
                status = "fallback" if site.is_quantized else site.status
                rows.append(replace(site, status=status, reason=twin._fxquant_reason, source=""))
        return rows

    def _mirror(self) -> None:
        """Make the twins' children those of the originals; a module that was there before keeps its twin."""
        self._paths = {id(m): path for path, m in self._model.named_modules()}
        known = {id(original): twin for original, twin in self._pairs}
        self._pairs, self._children = [], []
        for module in self._model.modules():
            twin = known.get(id(module)) or self._fresh_twin(module)
            known[id(module)] = twin
            self._pairs.append((module, twin))
        for module, twin in self._pairs:
            children = module._modules
            if children:
                self._children.append((children, list(children.values())))
                twins = {name: None if child is None else known[id(child)] for name, child in children.items()}
                twin.__dict__["_modules"] = twins
        self.root = known[id(self._model)]

    def _fresh_twin(self, module: nn.Module) -> nn.Module:
        if isinstance(module, torch.jit.ScriptModule):
            return module  # compiled by TorchScript: nothing of it can be copied or seen
        kind = ShadowLinear if type(module) is nn.Linear else type(module)
        twin = kind.__new__(kind)
        twin.__dict__.update(module.__dict__)
        if isinstance(twin, ShadowLinear):
            twin.__dict__["_fxquant_reason"] = ""
            twin.__dict__["_fxquant_eager"] = EagerLinear(self._paths[id(module)], self._config, self._store)
        return twin


def tensor_names(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """The model's names for its parameters and buffers, by identity; a tied tensor has several."""
    names: dict[int, tuple[str, ...]] = {}
    for name, tensor in _all_tensors(model):
        names[id(tensor)] = (*names.get(id(tensor), ()), name)
    return names


def _all_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


