"""quantize: give modules their quantized classes, in place."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fxquant.errors import AlreadyFrozen, NotAModule, PatternMatchesNothing
from fxquant.model.freezing import check_finite, freeze_modules, reads_same_rows
from fxquant.model.records import QuantizeReport, QuantizeRow
from fxquant.nn import QModule, quantized_class, why_none
from fxquant.spec import NAMED_SPECS, ConfigLike, LinearSpec, NumberFormat, QuantConfig, TensorSpec, resolve_config

SideLike = str | NumberFormat | TensorSpec | None
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Candidate:
    """A module with weight matrices, its paths, and what was decided for it."""

    module: nn.Module
    paths: list[str]
    kind: str
    names: tuple[str, ...]  # of its matrices
    spec: LinearSpec | None = None
    reason: str = ""
    tied_to: str = ""
    parameters: int = field(init=False)
    bytes_before: int = field(init=False)

    def __post_init__(self) -> None:
        held = [self.module._parameters[name] for name in self.names]
        self.parameters = sum(p.numel() for p in held if p is not None)
        self.bytes_before = sum(p.nbytes for p in held if p is not None)
        if isinstance(self.module, QModule) and self.module.is_frozen:
            shapes = [self.module.matrix_shape(name) for name in self.module.matrix_names()]
            self.parameters = sum(rows * columns for rows, columns in shapes)


def quantize(
    model: nn.Module,
    config: ConfigLike = None,
    *,
    weights: SideLike = None,
    activations: SideLike = None,
    group_size: int | None = None,
    algorithm: str | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    device: torch.device | str | None = None,
    **fields: Any,
) -> QuantizeReport:
    """Quantize a model's modules in place: they round their weights, and their inputs if asked, at every call.

    Weights stay float parameters that can be trained (gradients go straight through the rounding) until `freeze`.

    model         any module, also a single Linear.
    config        a preset's name ('int8dq'), a `QuantConfig`, or a mapping of its fields; the other arguments are such
                  fields too, and stand over it: formats by name ('int8', 'qint4') or as objects (`fxquant.qint4`).
    include, exclude  globs over module paths; one that matches a module matches all below it.
    device        move the model there one module at a time, and freeze each as soon as it is there, so that the device
                  never holds more than one float layer.

    Returns what was quantized, how, and what was not and why.

    Raises:
        NotAModule: `model` is a function, say.
        InvalidOption, UnknownFormat, UnknownPreset, …: the config does not make sense.
        PatternMatchesNothing: a pattern matches no module; nothing has been changed.
        AlreadyFrozen: modules that are frozen would become something else; nothing has been changed.
        NonFiniteWeight: with `device`, a weight holds NaN or infinity; nothing has been frozen.
    """
    given = {"weights": weights, "activations": activations, "group_size": group_size, "algorithm": algorithm}
    given |= {"include": include, "exclude": exclude, **fields}
    resolved = resolve_config(config, {name: value for name, value in given.items() if value is not None})
    if not isinstance(model, nn.Module):
        raise NotAModule(model)
    paths = [path for path, _ in model.named_modules(remove_duplicate=False) if path]
    if dead := resolved.unmatched(paths):
        raise PatternMatchesNothing(dead, paths)
    candidates = _candidates(model)
    for candidate in candidates:
        _decide(candidate, resolved)
    _keep_what_attention_reads(candidates)
    _tie(candidates)
    _refuse_other_codes(candidates)
    uncalibrated: list[str] = []
    for candidate in candidates:
        _adopt(candidate, resolved, uncalibrated)
    _remember_ties(candidates)
    switch_off_fast_paths(model)
    report = QuantizeReport(tuple(_row(c) for c in candidates if c.spec is not None or c.kind != "norm"))
    if device is not None:
        _move_and_freeze(model, candidates, device)
    return report


def _candidates(model: nn.Module) -> list[Candidate]:
    """Modules with float matrices of their own; frozen ones too, which have none left."""
    found: dict[int, Candidate] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if id(module) in found:
            found[id(module)].paths.append(path)
            continue
        kind = quantized_class(type(module))
        parameters = {name: p for name, p in module._parameters.items() if p is not None and not is_lazy(p)}
        matrices = [name for name, p in parameters.items() if p.dim() >= 2]
        if kind is not None and not isinstance(module, torch.jit.ScriptModule):
            names = tuple(name for name in kind.weight_names if name in parameters)
            found[id(module)] = Candidate(module, [path], kind.kind, names)
        elif matrices:
            found[id(module)] = Candidate(module, [path], type(module).__name__, tuple(matrices))
    return list(found.values())


def _decide(candidate: Candidate, config: QuantConfig) -> None:
    module = candidate.module
    kind = quantized_class(type(module))
    if kind is None:
        unknown = f"{candidate.kind} has no quantized class (see register_module)"
        candidate.reason = why_none(type(module)) or unknown
        return
    decisions = [config.spec_for(path, kind.kind) for path in candidate.paths]
    default = config.default_for(kind.kind).spec
    decision = next((d for d in decisions if d.spec != default), decisions[0])
    candidate.spec, candidate.reason = decision
    if candidate.spec is not None and (problem := kind.unfit(module, candidate.spec)):
        candidate.spec, candidate.reason = None, problem
    if candidate.spec is None and isinstance(module, QModule):
        candidate.spec, candidate.reason = module.quantization, f"left as it was: {candidate.reason}"


def _keep_what_attention_reads(candidates: list[Candidate]) -> None:
    """A float attention of torch's multiplies by the weight of its child out_proj, and never calls it."""
    by_module = {id(candidate.module): candidate for candidate in candidates}
    for attention in candidates:
        child = getattr(attention.module, "out_proj", None)
        if attention.spec is None and isinstance(attention.module, nn.MultiheadAttention) and id(child) in by_module:
            path = attention.paths[0] or "(root)"
            by_module[id(child)].spec = None
            by_module[id(child)].reason = f"read by {path!r}, which stays float: {attention.reason}"


def _tie(candidates: list[Candidate]) -> None:
    """One weight, one decision: tied modules share the codes of the first linear, or stay float together."""
    groups: dict[int, list[Candidate]] = {}
    for candidate in candidates:
        for name in candidate.names:
            groups.setdefault(id(candidate.module._parameters[name]), []).append(candidate)
    for group in groups.values():
        if len(group) > 1:
            _tie_group(group)


def _tie_group(group: list[Candidate]) -> None:
    lead = next((c for c in group if c.spec is not None and c.kind == "linear"), None)
    lead = lead or next((c for c in group if c.spec is not None), None)
    if lead is None or lead.spec is None:
        return
    # An embedding that stays float only because embeddings do by default goes along.
    kept = next((c for c in group if c.spec is None and not c.reason.startswith("embeddings stay float")), None)
    for candidate in group:
        if kept is not None:
            words = f"tied to {kept.paths[0]!r}, which stays float: {kept.reason}"
            candidate.spec, candidate.reason = None, candidate.reason if candidate is kept else words
        elif candidate is not lead:
            own = candidate.spec.activations if candidate.spec and candidate.kind == "linear" else None
            candidate.spec = replace(lead.spec, activations=own)
            candidate.reason, candidate.tied_to = f"tied to {lead.paths[0]!r}", lead.paths[0]


def _refuse_other_codes(candidates: list[Candidate]) -> None:
    refused: dict[tuple[LinearSpec, LinearSpec], list[str]] = {}
    for candidate in candidates:
        module = candidate.module
        if isinstance(module, QModule) and module.is_frozen and candidate.spec is not None:
            met, wanted = module.quantization, candidate.spec
            if (met.weights, met.algorithm) != (wanted.weights, wanted.algorithm):
                refused.setdefault((met, wanted), []).append(candidate.paths[0])
    for (met, wanted), paths in refused.items():
        raise AlreadyFrozen(paths, met, wanted)


def _adopt(candidate: Candidate, config: QuantConfig, uncalibrated: list[str]) -> None:
    module, spec = candidate.module, candidate.spec
    if spec is None:
        return
    kind = quantized_class(type(module))
    assert kind is not None
    module.__class__ = kind
    assert isinstance(module, QModule)
    static = _is_static(config, spec)
    module.adopt(spec, calibratable=static or _is_open(config, spec))
    if static and module.calibratable and config.activations is not None and module.input_scale is None:
        uncalibrated.append(candidate.paths[0] or "(root)")
        module._uncalibrated = uncalibrated


def _remember_ties(candidates: list[Candidate]) -> None:
    """Tied modules that can share codes know of each other: a state dict has these under one name only."""
    groups: dict[int, list[QModule]] = {}
    for candidate in candidates:
        module = candidate.module
        if isinstance(module, QModule) and (weight := module._parameters.get("weight")) is not None:
            groups.setdefault(id(weight), []).append(module)
    for group in groups.values():
        for module in group:
            module._ties = tuple(other for other in group if other is not module and reads_same_rows(other, module))


def _is_static(config: QuantConfig, spec: LinearSpec) -> bool:
    """One scale for a whole activation, asked for as such: presets that say so ('fp8dq') mean dynamic ones."""
    per_tensor = spec.activations is not None and spec.activations.granularity.kind == "tensor"
    return per_tensor and (config.activations is not None or spec != config.default_spec)


def _is_open(config: QuantConfig, spec: LinearSpec) -> bool:
    """A bare format ('int8') leaves open whether activations are dynamic or static."""
    bare = config.activations
    if bare is None or spec.activations is None or "/" in bare or bare in NAMED_SPECS:
        return False
    return spec.activations.format.name == bare and spec.activations.granularity.kind in ("token", "sample")


def switch_off_fast_paths(model: nn.Module) -> None:
    """torch's fused encoder layer reads weights and never calls the linears: not where these are quantized.

    It also takes nested tensors, which the encoder makes for its sake.
    """
    for module in model.modules():
        if not isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder):
            continue
        if not any(isinstance(part, QModule) for part in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
        else:
            module.activation_relu_or_gelu = 0


def _row(candidate: Candidate) -> QuantizeRow:
    module, spec = candidate.module, candidate.spec
    before = after = candidate.bytes_before
    if spec is not None and spec.weights is not None and isinstance(module, QModule):
        after = sum(spec.weights.nbytes(module.matrix_shape(name)) for name in module.matrix_names())
        before = before or after
    text, parameters = "" if spec is None else str(spec), candidate.parameters
    return QuantizeRow(
        tuple(candidate.paths), candidate.kind, text, candidate.reason, parameters, before, after, candidate.tied_to
    )


def _move_and_freeze(model: nn.Module, candidates: list[Candidate], device: torch.device | str) -> None:
    modules = [c.module for c in candidates if isinstance(c.module, QModule)]
    check_finite(model, modules)
    for module in modules:
        module.to(device)
        freeze_modules(model, [module])
    model.to(device)
