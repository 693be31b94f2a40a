"""One product outside any graph: capture, passes and kernels over a graph of one module's forward, run in eager.

It is the same pipeline and the same weight store, so the numbers and the packed weights are those of the graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer
from torch.nn.modules.lazy import LazyModuleMixin

from fxquant import cpu_kernels
from fxquant.annotation import amend_note, note_of
from fxquant.capture.assemble import make_canonical
from fxquant.gradients import InferenceOnly
from fxquant.graphs import VALUE_KEY, CapturedGraph, CapturedWeight, infer_value, value_of
from fxquant.lowering import to_eager
from fxquant.pipeline import Decide, Lowered, quantize_graph, train_graph
from fxquant.products import form_of
from fxquant.report import Site
from fxquant.runner import Deciding, GraphRunner, TrainingRunner
from fxquant.spec import QuantConfig
from fxquant.target import Target
from fxquant.weights import WeightStore

Compute = Callable[[Any, Any, Any, Any], Any]


@dataclass(frozen=True)
class ProductModule:
    """A class of torch's whose forward is one product.

    ``compute(module, x, weight, bias)`` is that product; ``methods`` are what must be torch's own for it to be;
    ``fields`` are the attributes that it reads besides.
    """

    base: type[nn.Module]
    compute: Compute
    methods: tuple[str, ...] = ("forward",)
    fields: tuple[str, ...] = ()


def _linear(module: Any, x: Any, weight: Any, bias: Any) -> Any:
    return nn.functional.linear(x, weight, bias)


def _convolution(module: Any, x: Any, weight: Any, bias: Any) -> Any:
    return module._conv_forward(x, weight, bias)


def _embedding(module: Any, x: Any, weight: Any, bias: Any) -> Any:
    return nn.functional.embedding(x, weight, *(getattr(module, name) for name in _OF_EMBEDDING))


_OF_CONVOLUTION = ("stride", "padding", "dilation", "groups", "padding_mode")
_OF_EMBEDDING = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
PRODUCT_MODULES: tuple[ProductModule, ...] = (
    ProductModule(nn.Linear, _linear),
    *(ProductModule(base, _convolution, ("forward", "_conv_forward"), _OF_CONVOLUTION) for base in _CONVOLUTIONS),
    ProductModule(nn.Embedding, _embedding, fields=_OF_EMBEDDING),
)


def product_module(module: nn.Module) -> ProductModule | None:
    """What a module computes, if it computes what torch's class does, from a parameter of its own; else None."""
    found = next((known for known in PRODUCT_MODULES if isinstance(module, known.base)), None)
    if found is None or isinstance(module, LazyModuleMixin):  # its first call makes it a product
        return None
    own = any(
        getattr(type(module), name) is not getattr(found.base, name) or name in module.__dict__
        for name in found.methods
    )
    return None if own or module._parameters.get("weight") is None else found


class EagerProduct:
    """One product module outside any graph; call it with the module as it is now, and the module's input."""

    def __init__(
        self,
        kind: ProductModule,
        paths: tuple[str, ...],
        config: QuantConfig,
        store: WeightStore,
        watch: InferenceOnly,
        leave_float: Callable[[], bool] = lambda: False,
    ) -> None:
        self._kind = kind
        self._paths = paths
        self._config = config
        self._store = store
        self._watch = watch
        self._leave_float = leave_float
        self._runners: dict[Any, GraphRunner | TrainingRunner] = {}

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor:
        weight, bias = module._parameters["weight"], module.__dict__["_parameters"].get("bias")
        args = tuple(t for t in (x, weight, bias) if t is not None)
        if torch.is_grad_enabled() and not self._config.training:
            self._watch.check(self._paths[0] or "a product in eager", args)
        runner = self._runners.get(key := self._key(module, args))
        if runner is None:
            runner = self._runners[key] = self._make_runner(module, args)
        return runner(*args)

    def _key(self, module: nn.Module, args: tuple[Tensor, ...]) -> Any:
        """What Dynamo would guard on."""
        x, *parameters = args
        fields = tuple(str(getattr(module, name)) for name in self._kind.fields)
        rank = x.dim() if fields else 0  # a linear of any rank is one graph
        layouts = ((t.dtype, t.shape, t.stride()) for t in parameters)
        return x.dtype, rank, torch.is_autocast_enabled(x.device.type), fields, *layouts

    @property
    def site(self) -> Site | None:
        """The report's row for this product; None if it has not run."""
        for runner in self._runners.values():
            for report in runner.reports:
                return report.sites[0]
        return None

    def _make_runner(self, module: nn.Module, args: tuple[Tensor, ...]) -> GraphRunner | TrainingRunner:
        captured = graph_of_one_product(self._kind, module, self._paths, *args)
        deciding = Deciding(self._config, lambda: {})
        if self._config.training:
            runner = TrainingRunner(captured, deciding, self._lower_to_train)
        else:
            runner = GraphRunner(captured, deciding, self._lower, self._store)
        runner.prepare(args)
        return runner

    def _lower(self, captured: CapturedGraph, decide: Decide) -> tuple[Lowered, Callable[..., Any]]:
        cpu_kernels.load()
        weight = value_of(captured.gm.graph.find_nodes(op="get_attr")[0])
        lowered = quantize_graph(
            captured,
            self._config,
            decide,
            target=Target.of_weights(weight.device),
            name=self._name,
            evaluate=False,
            leave_float=self._leave_float(),
        )
        return lowered, to_eager(lowered.gm)

    def _lower_to_train(self, captured: CapturedGraph, decide: Decide) -> tuple[Lowered, Callable[..., Any]]:
        cpu_kernels.load()
        lowered = train_graph(captured, self._config, decide, name=self._name, leave_float=self._leave_float())
        run, positions = to_eager(lowered.gm), lowered.binding.positions
        return lowered, lambda *args: run(*(args[p] for p in positions))

    @property
    def _name(self) -> str:
        return self._paths[0] or "product"


def graph_of_one_product(
    kind: ProductModule, module: nn.Module, paths: tuple[str, ...], x: Tensor, *parameters: Tensor
) -> CapturedGraph:
    """The captured graph of what the module computes of `x` with these parameters: weight, and bias if it has one."""
    graph, mode = Graph(), torch._subclasses.FakeTensorMode()
    attributes: dict[str, Any] = dict(zip(("weight", "bias"), parameters, strict=False))
    operands = [graph.placeholder("x"), *(graph.create_node("get_attr", name) for name in attributes)]
    for node, tensor in zip(operands, (x, *parameters), strict=True):
        node.meta[VALUE_KEY] = mode.from_tensor(tensor.detach())
    tracer = _Tracer(graph, mode)
    proxies = [Proxy(node, tracer) for node in operands]
    graph.output(kind.compute(module, *proxies, *[None] * (3 - len(proxies))).node)
    gm = GraphModule(dict(attributes), graph)
    names = {name: tuple(join(path, name) for path in paths) for name in attributes}
    make_canonical(gm, names, named=True)
    for node in gm.graph.nodes:
        if form_of(node) is not None or note_of(node).reason:
            amend_note(node, paths=paths, source="")
    weights = tuple(
        CapturedWeight(name, names[name], position, isinstance(tensor, nn.Parameter))
        for position, (name, tensor) in enumerate(attributes.items(), start=1)
    )
    return CapturedGraph(gm, (0,), weights, 1 + len(weights))


class _Tracer(GraphAppendingTracer):
    """Turns torch calls on proxies into nodes that have their values."""

    def __init__(self, graph: Graph, mode: Any) -> None:
        super().__init__(graph)
        self._mode = mode

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        node = super().create_node(*args, **kwargs)
        node.meta[VALUE_KEY] = infer_value(node, self._mode)
        return node


def join(path: str, name: str) -> str:
    """A parameter's name from its module's path, which is empty for the root."""
    return f"{path}.{name}" if path else name
