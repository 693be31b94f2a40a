"""The torch.compile backend: option parsing, names of parameters, executors and dumps wired together."""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxquant import cpu_kernels
from fxquant.capture import back_to_dynamo, from_dynamo, with_tensors_as_inputs
from fxquant.dump import Dumper, measure_sqnr
from fxquant.errors import PathRulesNeedModel
from fxquant.gradients import InferenceOnly
from fxquant.graphs import CapturedGraph
from fxquant.lowering import to_eager, to_inductor, to_training
from fxquant.passes import ignore
from fxquant.pipeline import Decide, Lowered, quantize_graph, train_graph
from fxquant.report import GraphReport, ModelReport, SiteSqnr
from fxquant.runner import Deciding, GraphRunner, Names, TrainingRunner
from fxquant.spec import QuantConfig
from fxquant.target import Target
from fxquant.weights import process_store

logger = logging.getLogger("fxquant")


def backend(
    gm: GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Any]:
    """``torch.compile(model, backend="fxquant", options={...})``: quantize and lower one graph of Dynamo's.

    The options are the fields of `QuantConfig`; an unknown one, or a value that does not fit, is a named error. This
    door sees graphs only: what Dynamo never shows it (a disabled module, code after a graph break) it cannot report,
    and rules by module path are refused where a graph no longer knows its root. `fxquant.compile` has neither limit.
    ``training=True`` trains: operands are rounded in the graph, with a straight-through gradient.
    """
    given = dict(options or {}) if mode is None else {**(options or {}), "mode": mode}
    return QuantizingBackend(QuantConfig.from_options(given))(gm, example_inputs)


class QuantizingBackend:
    """A backend for torch.compile with a typed config; given `names`, it can ask for the model's names of its tensors.

    `leave_float` says of a known model whether it has quantized modules: see `fxquant.pipeline.quantize_graph`.
    ``reports`` has one entry for each graph lowered.
    """

    def __init__(
        self,
        config: QuantConfig,
        names: Callable[[], Names] | None = None,
        watch: InferenceOnly | None = None,
        leave_float: Callable[[], bool] = lambda: False,
    ) -> None:
        self.config = config
        self.names = names
        self._watch = watch or InferenceOnly()
        self._leave_float = leave_float
        self._runners: list[GraphRunner | TrainingRunner] = []
        self._dumpers: dict[str, Dumper] = {}

    @property
    def reports(self) -> list[GraphReport]:
        return [report for runner in self._runners for report in runner.reports]

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        captured = self._captured(gm, example_inputs)
        self._refuse_unresolvable_rules(captured)
        return (self._for_training if self.config.training else self._for_inference)(captured, gm, example_inputs)

    def _captured(self, gm: GraphModule, example_inputs: Sequence[Any]) -> CapturedGraph:
        return from_dynamo(gm, example_inputs, self.names() if self.names else None)

    def _for_inference(
        self, captured: CapturedGraph, gm: GraphModule, example_inputs: Sequence[Any]
    ) -> Callable[..., Any]:
        self._watch_gradients(example_inputs)
        runner = self._runner(captured, example_inputs)

        def call(*args: Any) -> Any:  # Dynamo wants a plain function
            self._watch_gradients(args)
            return runner(*args)

        return call

    def _runner(self, captured: CapturedGraph, example_inputs: Sequence[Any]) -> GraphRunner:
        runner = GraphRunner(captured, Deciding(self.config, self.names), self._lower, process_store())
        if self.config.numerics:
            runner.measure_first_call(self._measure)
        runner.prepare(example_inputs)
        self._runners.append(runner)
        return runner

    def _for_training(
        self, captured: CapturedGraph, gm: GraphModule, example_inputs: Sequence[Any]
    ) -> Callable[..., Any]:
        def first(captured: CapturedGraph, decide: Decide) -> tuple[Lowered, Callable[..., Any]]:
            lowered = self._lower_to_train(captured, decide)
            whole = back_to_dynamo(lowered.gm, lowered.binding.positions, gm)
            return lowered, to_training(whole, example_inputs, self.config.mode, eager=self._runs_eager)

        runner = TrainingRunner(captured, Deciding(self.config, self.names), self._lower_another)
        runner.prepare(example_inputs, first)
        self._runners.append(runner)

        def call(*args: Any) -> Any:
            return runner(*args)

        return call

    def _lower_another(self, captured: CapturedGraph, decide: Decide) -> tuple[Lowered, Callable[..., Any]]:
        """The graph for parameters that want other specs: Dynamo has done its part, and compiles this one anew."""
        lowered = self._lower_to_train(captured, decide)
        name, mode = ("aot_eager", None) if self._runs_eager else ("inductor", self.config.mode)
        compiled = torch.compile(lowered.gm.forward, backend=name, mode=mode)
        positions = lowered.binding.positions
        return lowered, lambda *args: compiled(*(args[p] for p in positions))

    def _lower_to_train(self, captured: CapturedGraph, decide: Decide) -> Lowered:
        dumper = Dumper(self.config.dump, self._summary) if self.config.dump else None
        lowered = train_graph(
            captured,
            self.config,
            decide,
            name=f"graph_{len(self.reports):03d}",
            observe=dumper or ignore,
            leave_float=self._leave_float(),
        )
        self._tell(lowered, dumper)
        return lowered

    @property
    def _runs_eager(self) -> bool:
        kernels = cpu_kernels.load()  # whatever runs the graph
        return self.config.executor == "eager" or kernels is None

    def _watch_gradients(self, inputs: Sequence[Any]) -> None:
        if torch.is_grad_enabled():
            self._watch.check("a graph of backend fxquant", inputs)

    def _refuse_unresolvable_rules(self, captured: CapturedGraph) -> None:
        if self.names is None and self.config.has_path_rules and captured.break_reason:
            raise PathRulesNeedModel(self.config.patterns, f"graph break ({captured.break_reason})")

    def _lower(self, captured: CapturedGraph, decide: Decide) -> tuple[Lowered, Callable[..., Any]]:
        eager = self._runs_eager  # asked first: it loads the kernels
        dumper = Dumper(self.config.dump, self._summary) if self.config.dump else None
        lowered = quantize_graph(
            captured,
            self.config,
            decide,
            target=Target.of_weights(_device_of(captured)),
            name=f"graph_{len(self.reports):03d}",
            observe=dumper or ignore,
            evaluate=dumper is not None,
            leave_float=self._leave_float(),
        )
        self._tell(lowered, dumper)
        if eager:
            return lowered, to_eager(lowered.gm)
        return lowered, to_inductor(lowered.gm, self.config.mode, self.config.wrapper)

    def _tell(self, lowered: Lowered, dumper: Dumper | None) -> None:
        if dumper:
            dumper.finish(lowered.report)
            self._dumpers[lowered.report.name] = dumper
        logger.info("%s", self._summary(lowered.report))

    def _summary(self, report: GraphReport) -> GraphReport | ModelReport:
        """What a user reads of one graph; without the model in hand it says that graphs are all that was seen."""
        return report if self.names else ModelReport.of_graphs([report])

    def _measure(
        self, captured: CapturedGraph, args: Sequence[Any], lowered: Lowered, lowered_args: Sequence[Any]
    ) -> dict[str, SiteSqnr]:
        sqnr = measure_sqnr(captured.gm, lowered.gm, args, lowered_args)
        if dumper := self._dumpers.get(lowered.report.name):
            dumper.measured(sqnr)
        return sqnr


class FrozenGraphs(list[Callable[..., Any]]):
    """Graphs with the weights that they run on. Whoever owns it keeps these alive; a plain list cannot be referred to
    weakly."""


class FreezingBackend(QuantizingBackend):
    """A backend for a model whose tensors are part of the graph, where Dynamo installs them: nothing watches them.

    Dynamo keeps a backend for as long as the code of the model's class: the weights are `graphs`', not this one's.
    """

    def __init__(self, graphs: FrozenGraphs, *args: Any) -> None:
        super().__init__(*args)
        self._graphs = weakref.ref(graphs)

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        gm, held = with_tensors_as_inputs(gm)
        inputs = (*example_inputs, *held)
        self._watch_gradients(inputs)
        runner = self._runner(self._captured(gm, inputs), inputs)
        frozen = runner.frozen(example_inputs, held)
        if (graphs := self._graphs()) is not None:
            graphs.append(frozen)
        known = weakref.ref(frozen)

        def call(*args: Any) -> Any:
            self._watch_gradients(args)
            run = known()
            assert run is not None, "whoever owns the graphs makes the call"
            return run(*args)

        return call


def _device_of(captured: CapturedGraph) -> str:
    """The type of device that most bytes of the graph's weights are on; the others may be a counter or a table."""
    bytes_on = Counter[str]()
    for node in captured.gm.graph.find_nodes(op="get_attr"):
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            size = value.numel() * value.itemsize
            bytes_on[value.device.type] += size if isinstance(size, int) else 0
    return max(bytes_on, key=lambda device: bytes_on[device], default="cpu")
