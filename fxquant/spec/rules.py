"""Rules: glob over module paths -> what the linears under it get."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeAlias

from fxquant.errors import InvalidOption, InvalidSpec
from fxquant.spec.linears import LinearSpec
from fxquant.spec.presets import linear_spec


class Decision(NamedTuple):
    """What one module path gets (None: stays float), and why, in words for the report."""

    spec: LinearSpec | None
    reason: str


@dataclass(frozen=True)
class Rule:
    """Modules whose path, or a parent of it, matches the glob `pattern` get `spec`; None keeps them float.

    Text form 'lm_head=none', '*.mlp.*=w=int8/channel'.
    """

    pattern: str
    spec: LinearSpec | None

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str) or not self.pattern or "=" in self.pattern:
            raise InvalidSpec(self.pattern, "a rule's pattern is a non-empty glob over module paths, without '='")
        if self.spec is not None and not isinstance(self.spec, LinearSpec):
            raise InvalidSpec(self.spec, "a Rule takes a LinearSpec or None; Rule.parse reads text")

    def __str__(self) -> str:
        return f"{self.pattern}={self.spec or 'none'}"

    @staticmethod
    def parse(text: str) -> Rule:
        """Read 'pattern=spec', where spec is a preset's name, the text of a `LinearSpec`, or none."""
        pattern, equals, spec = text.partition("=")
        if not equals:
            raise InvalidSpec(text, "a rule is 'pattern=spec', such as 'lm_head=none' or '*.mlp.*=int8wo'")
        return Rule(pattern.strip(), linear_spec(spec.strip()))


RulesLike: TypeAlias = (
    "Mapping[str, str | LinearSpec | None] | Iterable[Rule | str | tuple[str, str | LinearSpec | None]]"
)


def rules_of(value: Any) -> tuple[Rule, ...]:
    """Rules from a mapping {glob: spec} or a sequence of rules, texts or (glob, spec) pairs; order is kept."""
    if isinstance(value, Mapping):
        return tuple(Rule(pattern, linear_spec(spec)) for pattern, spec in value.items())
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise InvalidOption("rules", value, "it takes a mapping {glob: spec} or a sequence of rules")
    return tuple(_rule(entry) for entry in value)


def _rule(entry: object) -> Rule:
    match entry:
        case Rule():
            return entry
        case str():
            return Rule.parse(entry)
        case (str() as pattern, spec):
            return Rule(pattern, linear_spec(spec))
        case _:
            raise InvalidOption("rules", entry, "a rule is 'pattern=spec', a pair (pattern, spec) or a Rule")


def matches(pattern: str, path: str) -> bool:
    """True if the glob matches the module path or any parent of it; '*' also crosses dots, case counts."""
    return any(fnmatchcase(part, pattern) for part in _path_and_parents(path))


def _path_and_parents(path: str) -> Iterator[str]:
    yield path
    while "." in path:
        path = path.rpartition(".")[0]
        yield path
