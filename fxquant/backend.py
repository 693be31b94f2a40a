"""The torch.compile backend: option parsing, names of parameters, executors and dumps wired together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxquant import cpu_kernels
from fxquant.capture import from_dynamo
from fxquant.dump import Dumper, measure_sqnr
from fxquant.errors import PathRulesNeedModel
from fxquant.gradients import InferenceOnly
from fxquant.graphs import CapturedGraph
from fxquant.lowering import to_eager, to_inductor
from fxquant.passes import ignore
from fxquant.pipeline import Decide, Lowered, quantize_graph
from fxquant.report import GraphReport, ModelReport, SiteSqnr
from fxquant.runner import Deciding, GraphRunner, Names
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
    """
    given = dict(options or {}) if mode is None else {**(options or {}), "mode": mode}
    return QuantizingBackend(QuantConfig.from_options(given))(gm, example_inputs)


class QuantizingBackend:
    """A backend for torch.compile with a typed config; given `names`, it can ask for the model's names of its tensors.

    ``reports`` has one entry for each graph lowered.
    """

    def __init__(
        self, config: QuantConfig, names: Callable[[], Names] | None = None, watch: InferenceOnly | None = None
    ) -> None:
        self.config = config
        self.names = names
        self._watch = watch or InferenceOnly()
        self._runners: list[GraphRunner] = []
        self._dumpers: dict[str, Dumper] = {}

    @property
    def reports(self) -> list[GraphReport]:
        return [report for runner in self._runners for report in runner.reports]

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self._watch_gradients(example_inputs)
        captured = from_dynamo(gm, example_inputs, self.names() if self.names else None)
        self._refuse_unresolvable_rules(captured)
        runner = GraphRunner(captured, Deciding(self.config, self.names), self._lower, process_store())
        if self.config.numerics:
            runner.measure_first_call(self._measure)
        runner.prepare(example_inputs)
        self._runners.append(runner)

        def call(*args: Any) -> Any:  # Dynamo wants a plain function
            self._watch_gradients(args)
            return runner(*args)

        return call

    def _watch_gradients(self, inputs: Sequence[Any]) -> None:
        if torch.is_grad_enabled():
            self._watch.check("a graph of backend fxquant", inputs)

    def _refuse_unresolvable_rules(self, captured: CapturedGraph) -> None:
        if self.names is None and self.config.has_path_rules and captured.break_reason:
            raise PathRulesNeedModel(self.config.patterns, f"graph break ({captured.break_reason})")

    def _lower(self, captured: CapturedGraph, decide: Decide) -> tuple[Lowered, Callable[..., Any]]:
        kernels = cpu_kernels.load()
        dumper = Dumper(self.config.dump, self._summary) if self.config.dump else None
        lowered = quantize_graph(
            captured,
            self.config,
            decide,
            target=Target.of_this_machine(_device_of(captured)),
            name=f"graph_{len(self.reports):03d}",
            observe=dumper or ignore,
            evaluate=dumper is not None,
        )
        if dumper:
            dumper.finish(lowered.report)
            self._dumpers[lowered.report.name] = dumper
        logger.info("%s", self._summary(lowered.report))
        if self.config.executor == "eager" or kernels is None:
            return lowered, to_eager(lowered.gm)
        return lowered, to_inductor(lowered.gm, self.config.mode)

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


def _device_of(captured: CapturedGraph) -> str:
    for node in captured.gm.graph.find_nodes(op="get_attr"):
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            return value.device.type
    return "cpu"
