"""Hypothesis strategies over all that the spec grammar can say."""

from __future__ import annotations

from hypothesis import strategies as st

from fxquant.spec import (
    CHANNEL,
    FORMATS,
    INT8,
    SAMPLE,
    TENSOR,
    TOKEN,
    Granularity,
    LinearSpec,
    Rule,
    TensorSpec,
    block,
    group,
    number_format,
)
from fxquant.spec.linears import ALGORITHMS, algorithm_problem
from fxquant.spec.tensors import SCALES, SCHEMES, STEPPED_BITS, Scale

SMALL_FLOATS = [
    number_format(f"fp{1 + exponent + mantissa}_e{exponent}m{mantissa}")
    for exponent in range(1, 8)
    for mantissa in range(7)
    if 3 <= 1 + exponent + mantissa <= 8
]
FORMAT = st.sampled_from([*FORMATS.values(), *SMALL_FLOATS])
GROUP = st.integers(1, 4096).map(group)
BLOCK = st.builds(block, st.integers(1, 4096), st.integers(1, 4096))
AXIS = st.integers(-3, 3).map(lambda axis: Granularity("channel", axis=axis))
WEIGHT_GRANULARITY = st.one_of(st.sampled_from([TENSOR, CHANNEL]), AXIS, GROUP, BLOCK)
ACTIVATION_GRANULARITY = st.one_of(st.sampled_from([TENSOR, TOKEN, SAMPLE]), GROUP)
ANY_GRANULARITY = st.one_of(WEIGHT_GRANULARITY, ACTIVATION_GRANULARITY)


@st.composite
def tensor_specs(draw: st.DrawFn, granularities: st.SearchStrategy[Granularity]) -> TensorSpec:
    """Every format with every scheme and scale that it can have."""
    number, granularity = draw(FORMAT), draw(granularities)
    scheme = draw(st.sampled_from(SCHEMES if number.kind == "int" else SCHEMES[:1]))
    grouped = scheme == "symmetric" and granularity.kind == "group"
    small = number.kind == "int" and number.bits <= STEPPED_BITS
    fitting: list[Scale] = ["float32", "bfloat16"]
    if grouped:
        fitting = [one for one in SCALES if small or one != "stepped"]
    scale = draw(st.sampled_from(fitting))
    return TensorSpec(number, granularity, scheme, scale)


@st.composite
def linear_specs(draw: st.DrawFn) -> LinearSpec:
    """Quantized weights, with or without activations, by every algorithm that fits."""
    weights = draw(WEIGHT)
    algorithm = draw(st.sampled_from([a for a in ALGORITHMS if not algorithm_problem(a, weights)]))
    return LinearSpec(weights, draw(st.one_of(st.none(), ACTIVATION)), algorithm)


def _can_be_activation(spec: TensorSpec) -> bool:
    return (
        spec.scheme == "symmetric"
        and spec.scale not in ("bfloat16", "stepped")
        and (spec.format == INT8 or spec.format.kind == "float")
    )


WEIGHT = tensor_specs(WEIGHT_GRANULARITY)
ACTIVATION = tensor_specs(ACTIVATION_GRANULARITY).filter(_can_be_activation)
ANY_TENSOR = tensor_specs(ANY_GRANULARITY)
QUANTIZED = linear_specs()
ALONE = ACTIVATION.map(lambda spec: LinearSpec(None, spec))
LINEAR = st.one_of(QUANTIZED, ALONE, st.just(LinearSpec(None, None)))
PATTERN = st.text(st.characters(codec="ascii", categories=("L", "N"), include_characters="._*?[]"), min_size=1)
RULE = st.builds(Rule, PATTERN, st.one_of(st.none(), QUANTIZED, ALONE))
