"""The presets: a name for a recipe."""

from __future__ import annotations

import re

from fxquant.errors import FxQuantError, InvalidSpec, UnknownPreset
from fxquant.spec.linears import LinearSpec, words_of
from fxquant.spec.peers import known, resolved
from fxquant.spec.sides import activation_spec, weight_spec

PRESETS = {
    name: LinearSpec.parse(text)
    for name, text in {
        "int8wo": "w=int8/channel",
        "int8dq": "w=int8/channel x=int8/token",
        "int4wo": "w=int4/group128/affine/bf16",
        "int4wo-g32": "w=int4/group32/affine/bf16",
        "int4dq": "w=int4/group32/stepped x=int8/token",
        "int2wo": "w=int2/group32/affine/bf16",
        "fp8wo": "w=float8_e4m3fn/channel",
        "fp8dq": "w=float8_e4m3fn/tensor x=float8_e4m3fn/tensor",
        "fp8dqrow": "w=float8_e4m3fn/channel x=float8_e4m3fn/token",
        "fp6_e3m2": "w=fp6_e3m2/channel",
        "fp6_e2m3": "w=fp6_e2m3/channel",
        "fp5_e2m2": "w=fp5_e2m2/channel",
        "fp4_e2m1": "w=fp4_e2m1/channel",
        "mxfp8": "w=mxfp8 x=mxfp8",
        "mxfp8wo": "w=mxfp8",
        "mxfp6wo": "w=mxfp6",
        "mxfp4": "w=mxfp4 x=mxfp4",
        "mxfp4wo": "w=mxfp4",
        "nvfp4": "w=nvfp4 x=nvfp4",
        "nvfp4wo": "w=nvfp4",
    }.items()
}

_NAMED = re.compile(r"(?P<name>[^\s=()]+(?:\([^()]*\))?)(?:\s+(?P<changes>.*))?", re.DOTALL)


def preset(name: str) -> LinearSpec:
    """The preset of that name, ours or a peer's (see `fxquant.spec.peers`). Raises `UnknownPreset` with the nearest."""
    text = _ours(name) if isinstance(name, str) else ""
    if text.startswith("w="):
        return LinearSpec.parse(text)
    if text not in PRESETS:
        raise UnknownPreset(name, [*PRESETS, *known()], _format_hint(name))
    return PRESETS[text]


def linear_spec(value: str | LinearSpec | None) -> LinearSpec | None:
    """A preset's name, the text of a `LinearSpec`, both, the spec itself, or None / 'none' for float.

    Words behind a name change that preset: 'int4wo algorithm=hqq', 'int8dq x=none'. A side may be a bare format,
    'w=int4', as for `QuantConfig`. Raises `UnknownPreset`, `InvalidSpec`, `InvalidOption` or `UnknownFormat`.
    """
    if value is None:
        return None
    if isinstance(value, LinearSpec):
        return None if value.is_float else value
    if not isinstance(value, str):
        raise InvalidSpec(
            value, "give a preset's name, a text such as 'w=int8/channel', a LinearSpec, or None for float"
        )
    name, changes = _split(value)
    from_nothing = name == "none" or (changes and not name)
    base = LinearSpec(None, None) if from_nothing else preset(name)
    words = words_of(changes) if changes else {}
    spec = LinearSpec(
        weight_spec(words["w"], "w") if "w" in words else base.weights,
        activation_spec(words["x"], "x") if "x" in words else base.activations,
        words.get("algorithm", base.algorithm),
    )
    return None if spec.is_float else spec


def preset_text(value: object) -> str | None:
    """The option `preset` in our own words: a peer's name becomes ours. Raises as `linear_spec` does."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise UnknownPreset(value, [*PRESETS, *known()])
    spec = linear_spec(value)
    name, changes = _split(value)
    ours = _ours(name)
    return f"{ours} {changes}".strip() if ours in PRESETS else str(spec or "none")


def _format_hint(name: object) -> str:
    """What to write for a format or a tensor spec, which is no preset; empty for anything else."""
    try:
        weight_spec(str(name), "w")
    except FxQuantError:
        return ""
    return f"A format is no preset: write 'w={name}'."


def _ours(name: str) -> str:
    text = name if name in PRESETS else resolved(name)
    return next((ours for ours, spec in PRESETS.items() if str(spec) == text), text)


def _split(text: str) -> tuple[str, str]:
    """A preset's name, empty if there is none, and the words behind it."""
    tight = re.sub(r"\(([^()]*)\)", lambda found: f"({''.join(found[1].split())})", text.strip())
    found = _NAMED.fullmatch(tight)
    return (found["name"], found["changes"] or "") if found else ("", tight)
