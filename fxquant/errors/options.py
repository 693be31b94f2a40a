"""Recipes that do not make sense, or not for this model: formats, presets, options, specs and patterns."""

from __future__ import annotations

from collections.abc import Sequence

from fxquant.errors.base import FxQuantError
from fxquant.errors.words import nearest, quoted, sentence, unknown


class UnknownFormat(FxQuantError, ValueError):
    """A number format that does not exist."""

    def __init__(self, name: object, known: Sequence[str]) -> None:
        super().__init__(unknown("number format", name, known))


class UnknownPreset(FxQuantError, ValueError):
    """A preset that does not exist; `hint`, if there is one, says what else the name may have meant."""

    def __init__(self, name: object, known: Sequence[str], hint: str = "") -> None:
        super().__init__(f"{unknown('preset', name, known)} {hint}".rstrip())


class UnknownOption(FxQuantError, ValueError):
    """An option, or a field of `QuantConfig`, that does not exist."""

    def __init__(self, name: object, known: Sequence[str]) -> None:
        super().__init__(unknown("option", name, known))


class InvalidOption(FxQuantError, ValueError):
    """A known option with a value that it cannot have; `reason` says what it takes."""

    def __init__(self, option: str, value: object, reason: str) -> None:
        self.option = option
        super().__init__(f"option {option!r} has the value {value!r}: {sentence(reason)}")


class InvalidSpec(FxQuantError, ValueError):
    """A spec that cannot be read, or that asks for what cannot be; `reason` says what it takes."""

    def __init__(self, text: object, reason: str) -> None:
        super().__init__(f"spec {str(text)!r}: {sentence(reason)}")


class PathRulesNeedModel(FxQuantError, ValueError):
    """Rules by module path where the module paths are not known."""

    def __init__(self, patterns: Sequence[str], where: str) -> None:
        super().__init__(
            f"{where}: the patterns {quoted(patterns)} name module paths, which cannot be resolved here. "
            "Use fxquant.compile(model, config), which has the model in hand, or drop rules, include and exclude."
        )


class PatternMatchesNothing(FxQuantError, ValueError):
    """A pattern of rules, include or exclude that no module path of the model matches."""

    def __init__(self, patterns: Sequence[str], paths: Sequence[str]) -> None:
        near = [found for p in patterns if (found := nearest(p, paths))]
        hint = f" Did you mean {quoted(dict.fromkeys(near))}?" if near else ""
        shown = ", ".join(paths[:8]) + (f" and {len(paths) - 8} more" if len(paths) > 8 else "")
        super().__init__(
            f"no module matches {quoted(patterns)}.{hint} The model has: {shown or 'no quantizable module'}. "
            "A pattern is a glob over the whole module path or a parent of it, such as 'lm_head' or '*.mlp.*'."
        )
