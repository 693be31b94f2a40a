"""QuantConfig: all that a user can ask for, as one frozen value."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fxquant.errors import InvalidOption, UnknownOption
from fxquant.spec.formats import NumberFormat
from fxquant.spec.kinds import FLOAT_BY_DEFAULT, spec_of_kind
from fxquant.spec.linears import ALGORITHMS, AUTO, LinearSpec, algorithm_problem
from fxquant.spec.options import flag, folder, globs, one_of, size_of_group
from fxquant.spec.presets import linear_spec, preset_text
from fxquant.spec.rules import Decision, Rule, RulesLike, matches, rules_of
from fxquant.spec.sides import activation_spec, regrouped, side_text, weight_spec
from fxquant.spec.tensors import TensorSpec

DEFAULT_PRESET = "int8dq"
EXECUTORS = ("inductor", "eager")
WRAPPERS = ("python", "cpp")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
AUTOTUNE = ("none", "quick", "full")


@dataclass(frozen=True, init=False)
class QuantConfig:
    """What to quantize, to what, and how to run it. The constructor takes short forms, the fields hold plain ones.

    preset       a name of `PRESETS` or a peer's name for it: what every linear and convolution gets. Words behind it
                 change it, 'int4wo algorithm=hqq'. Default int8dq, unless `weights` is given.
    weights      replaces the preset's weight side: a format ('int8', 'int4', 'fp8', 'mxfp4'), a tensor spec such as
                 'int4/group64/affine', or 'none'. Alone it means weight-only. A bare int8 or float is per channel,
                 a bare int2 to int7 group128/affine/bf16.
    activations  replaces the preset's activation side: 'int8' or a float format (dynamic, per token), 'mxfp8',
                 'int8/tensor' (dynamic too), or 'none'.
    embeddings   what embedding tables get that no rule names: as `weights`. Default: they stay float.
    group_size   weights get one scale per that many neighbours along K; embeddings do not.
    algorithm    how the codes of weights are chosen, where a spec leaves it open and it fits: absmax, minmax, mse, hqq.
    include      globs; if given, only matching modules get the default, unless a rule names them.
    rules        glob -> preset name, spec or None for float; the last matching rule wins, over `include`. A rule that
                 matches an embedding gives it the weight side, but a rule for '*' does not. A rule without weights,
                 'x=int8', is for norms: their output is rounded.
    exclude      globs that stay float, over all rules.
    fuse         join linears of one input (q, k, v), and epilogues into kernels.
    executor     'inductor' or 'eager': what runs the lowered graph.  mode: Inductor's mode.
    wrapper      what calls Inductor's kernels one after another, 'python' or 'cpp': less time a call, more to compile.
    dump         a folder for the graphs of every stage.  numerics: measure each site's error on the first batch.
    strict       raise `UnloweredSite` where a site would not run on a quantized kernel.
    training     train instead of infer: operands are rounded in the graph, with a straight-through gradient.
    autotune     'quick' or 'full': measure which configuration of a kernel is fastest, for shapes not measured before,
                 and keep it in the user's cache; 'none': use what the cache holds.
    """

    preset: str | None
    rules: tuple[Rule, ...]
    weights: str | None
    activations: str | None
    embeddings: str | None
    group_size: int | None
    algorithm: str
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    fuse: bool
    executor: str
    wrapper: str
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
        embeddings: str | NumberFormat | TensorSpec | None = None,
        group_size: int | None = None,
        algorithm: str = AUTO,
        include: str | Iterable[str] = (),
        exclude: str | Iterable[str] = (),
        fuse: bool = True,
        executor: str = "inductor",
        wrapper: str = "python",
        mode: str | None = None,
        dump: str | os.PathLike[str] | None = None,
        numerics: bool = False,
        strict: bool = False,
        training: bool = False,
        autotune: str = "none",
    ) -> None:
        flags = {"fuse": fuse, "numerics": numerics, "strict": strict, "training": training}
        fields: dict[str, Any] = {
            "preset": preset_text(preset),
            "rules": rules_of(rules),
            "weights": side_text("weights", weights),
            "activations": side_text("activations", activations),
            "embeddings": side_text("embeddings", embeddings),
            "group_size": size_of_group(group_size),
            "algorithm": one_of("algorithm", algorithm, ALGORITHMS),
            "include": globs("include", include),
            "exclude": globs("exclude", exclude),
            "executor": one_of("executor", executor, EXECUTORS),
            "wrapper": one_of("wrapper", wrapper, WRAPPERS),
            "mode": None if mode is None else one_of("mode", mode, MODES),
            "dump": folder("dump", dump),
            "autotune": one_of("autotune", autotune, AUTOTUNE),
            **{name: flag(name, value) for name, value in flags.items()},
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        self._check_together()

    def _check_together(self) -> None:
        if self.training and self.strict:
            raise InvalidOption("strict", True, "it asks for kernels, and training runs on none; leave one of them out")
        if self.training and self.numerics:
            raise InvalidOption("numerics", True, "errors are measured of inference; leave it or training out")
        if self.training and self.autotune != "none":
            raise InvalidOption("autotune", self.autotune, "training runs on no kernel; leave it or training out")
        self._check_algorithm()

    def _check_algorithm(self) -> None:
        specs = [self._written_spec(), self._embedding_spec(), *(rule.spec for rule in self.rules)]
        if self.algorithm == AUTO:
            return
        problems = [
            algorithm_problem(self.algorithm, spec.weights)
            for spec in specs
            if spec is not None and spec.algorithm == AUTO
        ]
        if not problems:
            open_to = "no spec here leaves its algorithm open; leave this one out"
            raise InvalidOption("algorithm", self.algorithm, open_to)
        if all(problems):
            raise InvalidOption("algorithm", self.algorithm, f"{problems[0]}; use 'auto'")

    @property
    def default_spec(self) -> LinearSpec | None:
        """What a linear gets that no rule names; None if it stays float."""
        return self._chosen(self._written_spec())

    def _written_spec(self) -> LinearSpec | None:
        base = self._base_spec()
        weights = base.weights if self.weights is None else weight_spec(self.weights)
        activations = base.activations if self.activations is None else activation_spec(self.activations)
        if self.group_size is not None:
            weights = regrouped(weights, self.group_size, explicit=self.weights)
        if weights is None and activations is not None:
            raise InvalidOption(
                "activations", str(activations), "quantized activations need quantized weights; give weights too"
            )
        return None if weights is None else LinearSpec(weights, activations, base.algorithm)

    def _base_spec(self) -> LinearSpec:
        if self.preset is None and (self.weights is not None or self.activations is not None):
            return LinearSpec(None, None)
        return linear_spec(self.preset or DEFAULT_PRESET) or LinearSpec(None, None)

    def _embedding_spec(self) -> LinearSpec | None:
        table = None if self.embeddings is None else weight_spec(self.embeddings, "embeddings")
        return None if table is None else LinearSpec(table, None)

    def _chosen(self, spec: LinearSpec | None) -> LinearSpec | None:
        """The spec with `algorithm` in it, where it leaves that open and can have it."""
        if spec is None or spec.algorithm != AUTO or algorithm_problem(self.algorithm, spec.weights):
            return spec
        return dataclasses.replace(spec, algorithm=self.algorithm)

    @property
    def asks_for_something(self) -> bool:
        """True if a preset, format, group size or rule is named; else a target may set the default aside."""
        named = (self.preset, self.weights, self.activations, self.embeddings, self.group_size)
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

    def spec_for(self, path: str, kind: str = "linear") -> Decision:
        """What the module of that path gets: exclude, else the last rule that matches, else include, else default.

        `kind` is linear, conv, embedding or norm: a convolution gets what `fxquant.spec.kinds.conv_spec` makes of a
        linear's spec, an embedding a rule's weight side or what the option `embeddings` says, a norm the activations of
        a rule that has no weights; a rule for '*' is a default, and names no embedding and no norm.

        Raises `InvalidOption`: the rule gives activations without weights to another kind than a norm.
        """
        for pattern in self.exclude:
            if matches(pattern, path):
                return Decision(None, f'exclude "{pattern}"')
        for rule in reversed(self.rules):
            names = kind not in FLOAT_BY_DEFAULT or rule.pattern.strip("*")
            if names and matches(rule.pattern, path):
                self._check_sides(rule, path, kind)
                return self._decision(rule.spec, f'rule "{rule}"', kind)
        if not self.include:
            return self._default("default", kind)
        for pattern in self.include:
            if matches(pattern, path):
                return self._default(f'include "{pattern}"', kind)
        return Decision(None, "not in include")

    @staticmethod
    def _check_sides(rule: Rule, path: str, kind: str) -> None:
        if kind != "norm" and rule.spec is not None and rule.spec.weights is None and rule.spec.activations is not None:
            needs = f"{path!r} is a {kind}: quantized activations need quantized weights; give them, or name norms only"
            raise InvalidOption("rules", str(rule), needs)

    def default_for(self, kind: str = "linear") -> Decision:
        """What a module of that kind gets that no rule, include or exclude names."""
        return self._default("default", kind)

    def _default(self, reason: str, kind: str) -> Decision:
        if kind == "norm":
            return Decision(None, "norms stay float by default; give a rule such as 'x=int8'")
        if kind != "embedding":
            return self._decision(self._written_spec(), reason, kind)
        table = self._embedding_spec()
        if table is None:
            return Decision(None, "embeddings stay float by default; give embeddings= or a rule")
        return self._decision(table, f'embeddings "{self.embeddings}"', kind)

    def _decision(self, spec: LinearSpec | None, reason: str, kind: str) -> Decision:
        fitting, change = spec_of_kind(self._chosen(spec), kind)
        return Decision(fitting, reason + change)

    @staticmethod
    def from_options(options: Mapping[str, Any] | None) -> QuantConfig:
        """The config of `torch.compile(options=...)`. Raises `UnknownOption` or `InvalidOption`, naming the nearest."""
        known = [field.name for field in dataclasses.fields(QuantConfig)]
        given = {} if options is None else options
        if not isinstance(given, Mapping):
            raise InvalidOption("options", given, "it takes a mapping of option names to values")
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
        except (json.JSONDecodeError, TypeError) as error:
            raise InvalidOption("config", str(text)[:80], f"it is not JSON ({error})") from error
        if not isinstance(fields, dict):
            raise InvalidOption("config", str(text)[:80], "it takes a JSON object of options")
        return QuantConfig.from_options(fields)
