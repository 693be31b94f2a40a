"""Short forms of one side of a linear: what a bare format means, and a group size beside it."""

from __future__ import annotations

from dataclasses import replace

from fxquant.errors import InvalidOption, UnknownFormat
from fxquant.spec.formats import ALIASES, CHANNEL, FORMATS, INT8, TOKEN, NumberFormat, group, number_format
from fxquant.spec.linears import activation_problem, weight_problem
from fxquant.spec.tensors import NAMED_SPECS, TensorSpec

# What int2 to int7 need to be worth having: a scale and a zero point for every few weights, and small ones.
GROUP_SIZE = 128
FORMS = "it takes a format such as 'int8', a tensor spec such as 'int8/channel', or 'none'"


def weight_spec(text: str, option: str = "weights") -> TensorSpec | None:
    """The spec of a weight: int8 and floats are per channel, int2 to int7 group128/affine/bf16, mxfp8 what it says.

    Raises `InvalidOption` (naming `option`), `InvalidSpec` or `UnknownFormat`.
    """
    if text == "none":
        return None
    spec = _whole(text)
    if spec is None:
        number = _format(text)
        coarse = number == INT8 or number.kind == "float"
        spec = TensorSpec(number, CHANNEL) if coarse else TensorSpec(number, group(GROUP_SIZE), "affine", "bfloat16")
    if problem := weight_problem(spec):
        raise InvalidOption(option, text, problem)
    return spec


def activation_spec(text: str, option: str = "activations") -> TensorSpec | None:
    """The spec of an activation, quantized dynamically: a bare format is per token, mxfp8 and its kind what they say.

    Raises `InvalidOption` (naming `option`), `InvalidSpec` or `UnknownFormat`.
    """
    if text == "none":
        return None
    spec = _whole(text)
    if spec is None:
        spec = TensorSpec(_format(text), TOKEN)
    if problem := activation_problem(spec):
        raise InvalidOption(option, text, problem)
    return spec


def side_text(option: str, value: object) -> str | None:
    """Canonical text of `weights`, `activations` or `embeddings`.

    A bare format stays one, since `group_size` may complete it; a spec is written out. Raises as the specs do.
    """
    match value:
        case None:
            return None
        case NumberFormat() | TensorSpec():
            text = str(value)
        case str():
            text = value.strip()
        case _:
            raise InvalidOption(option, value, FORMS)
    # The two sides refuse different granularities; say so now, under the option's own name.
    spec = activation_spec(text, option) if option == "activations" else weight_spec(text, option)
    if spec is None:
        return "none"
    return number_format(text).name if _whole(text) is None else str(spec)


def regrouped(weights: TensorSpec | None, size: int, explicit: str | None) -> TensorSpec:
    """The weights with one scale for each `size` neighbours; `explicit` is the option `weights`, None for a preset's.

    Raises `InvalidOption` where the two contradict each other.
    """
    if weights is None:
        raise InvalidOption("group_size", size, "it needs quantized weights; give weights or a preset")
    if weights.granularity == group(size):
        return weights
    if weights.scale in ("e8m0", "e4m3"):
        fixed = f"the blocks of {weights} are {weights.granularity.size} values by definition; leave group_size out"
        raise InvalidOption("group_size", size, fixed)
    if explicit is not None and "/" in explicit:
        raise InvalidOption("group_size", size, f"weights={explicit!r} says otherwise; give one of the two")
    return replace(weights, granularity=group(size))


def _format(text: str) -> NumberFormat:
    try:
        return number_format(text)
    except UnknownFormat:
        raise UnknownFormat(text, [*FORMATS, *NAMED_SPECS, *ALIASES]) from None


def _whole(text: str) -> TensorSpec | None:
    """The spec, if the text says more than a format."""
    return TensorSpec.parse(text) if "/" in text or text in NAMED_SPECS else None
