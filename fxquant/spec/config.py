"""QuantConfig: all that a user can ask for, as one frozen value."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fxquant.errors import InvalidOption, UnknownOption, nearest
from fxquant.spec.formats import INT4, Granularity, NumberFormat, group, number_format
from fxquant.spec.rules import Decision, Rule, RulesLike, matches, rules_of
from fxquant.spec.tensors import LinearSpec, TensorSpec, preset

DEFAULT_PRESET = "int8dq"
EXECUTORS = ("inductor", "eager")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
ALGORITHMS = ("auto", "absmax", "minmax")
AUTOTUNE = ("none", "quick", "full")


@dataclass(frozen=True, init=False)
class QuantConfig:
    """What to quantize, to what, and how to run it. The constructor takes short forms, the fields hold plain ones.

    preset       a name of `PRESETS`: what every linear gets. Default int8dq, unless `weights` is given.
    weights      replaces the preset's weight side: a format ('int8', 'int4', 'fp8'), a tensor spec such as
                 'int4/group64/affine', or 'none'. Alone it means weight-only. A bare int8 or float8 is per channel,
                 a bare int4 is group128/affine.
    activations  replaces the preset's activation side: 'int8' (dynamic, per token), 'int8/token', 'int8/tensor'
                 (dynamic too), or 'none'.
    group_size   weights get one scale per that many neighbours along K.
    algorithm    how a scale is chosen: absmax (symmetric) or minmax (affine); auto takes the one that fits.
    include      globs; if given, only matching modules get the default, unless a rule names them.
    rules        glob -> preset name, spec or None for float; the last matching rule wins, over `include`.
    exclude      globs that stay float, over all rules.
    fuse         join linears of one input (q, k, v), and epilogues into kernels.
    executor     'inductor' or 'eager': what runs the lowered graph.  mode: Inductor's mode.
    dump         a folder for the graphs of every stage.  numerics: measure each site's error on the first batch.
    strict       raise `UnloweredSite` where a site would not run on a quantized kernel.
    training, autotune   reserved: anything but False and 'none' raises `InvalidOption`.
    """

    preset: str | None
    rules: tuple[Rule, ...]
    weights: str | None
    activations: str | None
    group_size: int | None
    algorithm: str
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    fuse: bool
    executor: str
    mode: str | None
    dump: str | None
    numerics: bool
    strict: bool
    training: bool
    autotune: str

    def __init__(
        self,
        preset: str | None = None,
        rules: RulesLike = (),
        weights: str | NumberFormat | TensorSpec | None = None,
        activations: str | NumberFormat | TensorSpec | None = None,
        group_size: int | None = None,
        algorithm: str = "auto",
        include: str | Iterable[str] = (),
        exclude: str | Iterable[str] = (),
        fuse: bool = True,
        executor: str = "inductor",
        mode: str | None = None,
        dump: str | os.PathLike[str] | None = None,
        numerics: bool = False,
        strict: bool = False,
        training: bool = False,
        autotune: str = "none",
    ) -> None:
        flags = {"fuse": fuse, "numerics": numerics, "strict": strict, "training": training}
        fields: dict[str, Any] = {
            "preset": preset,
            "rules": rules_of(rules),
            "weights": _side_text("weights", weights),
            "activations": _side_text("activations", activations),
            "group_size": _group_size(group_size),
            "algorithm": _one_of("algorithm", algorithm, ALGORITHMS),
            "include": _globs("include", include),
            "exclude": _globs("exclude", exclude),
            "executor": _one_of("executor", executor, EXECUTORS),
            "mode": None if mode is None else _one_of("mode", mode, MODES),
            "dump": _path("dump", dump),
            "autotune": _one_of("autotune", autotune, AUTOTUNE),
            **{name: _flag(name, value) for name, value in flags.items()},
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        self._check_together()

    def _check_together(self) -> None:
        if self.training:
            raise InvalidOption("training", True, "training is not supported by this version; leave it False")
        if self.autotune != "none":
            raise InvalidOption(
                "autotune", self.autotune, "autotuning is not supported by this version; leave it 'none'"
            )
        spec = self.default_spec
        scheme = "symmetric" if spec is None or spec.weights is None else spec.weights.scheme
        if (self.algorithm, scheme) in (("absmax", "affine"), ("minmax", "symmetric")):
            needs = "symmetric" if self.algorithm == "absmax" else "affine"
            raise InvalidOption(
                "algorithm", self.algorithm, f"it is for {needs} weights, but these are {scheme}; use 'auto'"
            )

    @property
    def default_spec(self) -> LinearSpec | None:
        """What a linear gets that no rule names; None if it stays float."""
        base = self._base_spec()
        weights = base.weights if self.weights is None else _weight_spec(self.weights)
        activations = base.activations if self.activations is None else _activation_spec(self.activations)
        if self.group_size is not None:
            weights = _regroup(weights, self.group_size, explicit=self.weights)
        if weights is None and activations is not None:
            raise InvalidOption(
                "activations", str(activations), "quantized activations need quantized weights; give weights too"
            )
        return None if weights is None else LinearSpec(weights, activations)

    def _base_spec(self) -> LinearSpec:
        if self.preset is not None:
            return preset(self.preset)
        if self.weights is None and self.activations is None:
            return preset(DEFAULT_PRESET)
        return LinearSpec(None, None)

    @property
    def asks_for_something(self) -> bool:
        """True if a preset, format, group size or rule is named; else a target may set the default aside."""
        named = (self.preset, self.weights, self.activations, self.group_size)
        return bool(self.rules) or any(x is not None for x in named)

    @property
    def has_path_rules(self) -> bool:
        """True if a rule, include or exclude needs the path of a module to be decided ('*' alone does not)."""
        return any(pattern.strip("*") for pattern in self.patterns)

    @property
    def patterns(self) -> tuple[str, ...]:
        """All globs over module paths, each once."""
        return tuple(dict.fromkeys((*self.include, *(rule.pattern for rule in self.rules), *self.exclude)))

    def unmatched(self, paths: Iterable[str]) -> tuple[str, ...]:
        """The globs that match none of these module paths."""
        known = tuple(paths)
        return tuple(p for p in self.patterns if not any(matches(p, path) for path in known))

    def spec_for(self, path: str) -> Decision:
        """What the module of that path gets: exclude, else the last rule that matches, else include, else default."""
        for pattern in self.exclude:
            if matches(pattern, path):
                return Decision(None, f'exclude "{pattern}"')
        for rule in reversed(self.rules):
            if matches(rule.pattern, path):
                return Decision(rule.spec, f'rule "{rule}"')
        if not self.include:
            return Decision(self.default_spec, "default")
        for pattern in self.include:
            if matches(pattern, path):
                return Decision(self.default_spec, f'include "{pattern}"')
        return Decision(None, "not in include")

    @staticmethod
    def from_options(options: Mapping[str, Any] | None) -> QuantConfig:
        """The config of `torch.compile(options=...)`. Raises `UnknownOption` or `InvalidOption`, naming the nearest."""
        known = [field.name for field in dataclasses.fields(QuantConfig)]
        given = dict(options or {})
        for name in given:
            if name not in known:
                raise UnknownOption(name, known)
        return QuantConfig(**given)

    def with_fields(self, **fields: Any) -> QuantConfig:
        """The same with some fields replaced. Raises what `from_options` raises."""
        known = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return QuantConfig.from_options({**known, **fields})

    def to_json(self) -> str:
        """JSON of all fields, in order; rules as pairs [pattern, spec]."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["rules"] = [[rule.pattern, None if rule.spec is None else str(rule.spec)] for rule in self.rules]
        return json.dumps(fields, indent=2)

    @staticmethod
    def from_json(text: str) -> QuantConfig:
        """The inverse of `to_json`; fields left out have their default."""
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise InvalidOption("config", text[:80], f"it is not JSON ({error})") from error
        if not isinstance(fields, dict):
            raise InvalidOption("config", text[:80], "it takes a JSON object of options")
        return QuantConfig.from_options(fields)


def _one_of(option: str, value: object, known: tuple[str, ...]) -> str:
    if isinstance(value, str) and value in known:
        return value
    near = nearest(str(value), known)
    hint = f"; did you mean {near!r}?" if near else ""
    raise InvalidOption(option, value, f"it takes {', '.join(repr(k) for k in known)}{hint}")


def _flag(option: str, value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise InvalidOption(option, value, "it takes True or False")


def _path(option: str, value: object) -> str | None:
    if value is None:
        return None
    if isinstance(value, str | os.PathLike) and os.fspath(value):
        return str(os.fspath(value))
    raise InvalidOption(option, value, "it takes the path of a folder")


def _globs(option: str, value: object) -> tuple[str, ...]:
    globs = (value,) if isinstance(value, str) else value
    if isinstance(globs, Iterable):
        found = tuple(globs)
        if all(isinstance(glob, str) and glob for glob in found):
            return found
    raise InvalidOption(option, value, "it takes a glob over module paths, or a sequence of them")


def _group_size(value: object) -> int | None:
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise InvalidOption("group_size", value, "it takes a whole number of at least 1")


def _side_text(option: str, value: object) -> str | None:
    """Canonical text of `weights` or `activations`: the short form stays short, since `group_size` may complete it."""
    match value:
        case None:
            return None
        case "none":
            return "none"
        case NumberFormat() | TensorSpec():
            text = str(value)
        case str():
            text = str(TensorSpec.parse(value)) if "/" in value else number_format(value).name
        case _:
            raise InvalidOption(
                option, value, "it takes a format such as 'int8', a tensor spec such as 'int8/channel', or 'none'"
            )
    # The two sides refuse different granularities; say so now, under the option's own name.
    reader = _weight_spec if option == "weights" else _activation_spec
    reader(text)
    return text


def _weight_spec(text: str) -> TensorSpec | None:
    if text == "none":
        return None
    if "/" in text:
        spec = TensorSpec.parse(text)
    elif number_format(text) is INT4:
        spec = TensorSpec(INT4, group(128), "affine")
    else:
        spec = TensorSpec(number_format(text), Granularity("channel"))
    if spec.granularity.kind == "token":
        raise InvalidOption("weights", text, "weights are scaled per tensor, channel or group<n>")
    return spec


def _activation_spec(text: str) -> TensorSpec | None:
    if text == "none":
        return None
    spec = TensorSpec.parse(text if "/" in text else f"{text}/token")
    if spec.granularity.kind not in ("tensor", "token"):
        raise InvalidOption("activations", text, "activations are scaled per token or tensor")
    if spec.format is INT4 or spec.scheme == "affine":
        raise InvalidOption("activations", text, "activations are int8 or float8, symmetric")
    return spec


def _regroup(weights: TensorSpec | None, size: int, explicit: str | None) -> TensorSpec:
    if weights is None:
        raise InvalidOption("group_size", size, "it needs quantized weights; give weights or a preset")
    if explicit is not None and "/" in explicit and weights.granularity != group(size):
        raise InvalidOption("group_size", size, f"weights={explicit!r} says otherwise; give one of the two")
    return dataclasses.replace(weights, granularity=group(size))
