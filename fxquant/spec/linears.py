"""What one linear, or one module of another kind, is quantized to."""

from __future__ import annotations

from dataclasses import dataclass

from fxquant.errors import InvalidSpec, nearest
from fxquant.spec.formats import INT8
from fxquant.spec.tensors import TensorSpec

FORM = "a linear spec is 'w=format/granularity x=format/granularity algorithm=name', each word at most once"
AUTO = "auto"
# The schemes that an algorithm can serve: absmax has no zero point to give, minmax always gives one.
SCHEMES_OF = {
    AUTO: ("symmetric", "affine", "shift"),
    "absmax": ("symmetric",),
    "minmax": ("affine", "shift"),
    "mse": ("symmetric", "affine", "shift"),
    "hqq": ("symmetric", "affine", "shift"),
}
ALGORITHMS = tuple(SCHEMES_OF)
# Beyond it a size is a slip, and would not fit the integers that kernels count with.
MAX_GROUP_SIZE = 2**31 - 1


def weight_problem(spec: TensorSpec) -> str:
    """Why no weight can have that spec, in words; empty if one can."""
    if spec.granularity.kind in ("token", "sample"):
        return f"weights are scaled per tensor, channel, group<n> or block<r>x<c>, not per {spec.granularity.kind}"
    return _size_problem(spec)


def activation_problem(spec: TensorSpec) -> str:
    """Why no activation can have that spec, in words; empty if one can."""
    if spec.granularity.kind not in ("tensor", "token", "sample", "group"):
        return f"activations are scaled per tensor, token, sample or group<n>, not per {spec.granularity.kind}"
    if spec.scheme != "symmetric" or not (spec.format == INT8 or spec.format.kind == "float"):
        return "activations are int8 or a float format, symmetric"
    if spec.scale == "bfloat16":
        return "scales of activations are float32, e8m0 or e4m3; leave 'bf16' out"
    return _size_problem(spec)


def _size_problem(spec: TensorSpec) -> str:
    largest = max(spec.granularity.size, spec.granularity.rows)
    return f"a group has at most {MAX_GROUP_SIZE} values" if largest > MAX_GROUP_SIZE else ""


def algorithm_problem(algorithm: str, weights: TensorSpec | None) -> str:
    """Why the codes of these weights cannot be chosen by that algorithm, in words; empty if they can."""
    if algorithm not in ALGORITHMS:
        near = nearest(str(algorithm), ALGORITHMS)
        return f"an algorithm is {', '.join(ALGORITHMS)}{f'; did you mean {near!r}?' if near else ''}"
    if weights is None:
        return "" if algorithm == AUTO else f"{algorithm} chooses codes of weights, but these stay float"
    if weights.scheme in SCHEMES_OF[algorithm]:
        return ""
    return f"{algorithm} is for {' or '.join(SCHEMES_OF[algorithm])} weights, but {weights} is {weights.scheme}"


@dataclass(frozen=True)
class LinearSpec:
    """What one linear gets: text form 'w=int8/channel x=int8/token'. None keeps that side float ('w=none').

    Activations without weights are for a norm, whose output they are; see `fxquant.spec.kinds`.
    algorithm   how the codes of the weights are chosen (see `fxquant.algorithms`); written only if it is not auto.
    """

    weights: TensorSpec | None
    activations: TensorSpec | None
    algorithm: str = AUTO

    def __post_init__(self) -> None:
        for side in (self.weights, self.activations):
            if side is not None and not isinstance(side, TensorSpec):
                raise InvalidSpec(side, "a LinearSpec takes a TensorSpec or None a side; LinearSpec.parse reads text")
        problem = algorithm_problem(self.algorithm, self.weights)
        if self.activations is not None:
            problem = activation_problem(self.activations) or problem
        if self.weights is not None:
            problem = weight_problem(self.weights) or problem
        if problem:
            raise InvalidSpec(self, problem)

    def __str__(self) -> str:
        activations = f" x={self.activations}" if self.activations is not None else ""
        algorithm = f" algorithm={self.algorithm}" if self.algorithm != AUTO else ""
        return f"w={self.weights or 'none'}{activations}{algorithm}"

    @property
    def is_float(self) -> bool:
        """True if neither side is quantized."""
        return self.weights is None and self.activations is None

    @staticmethod
    def parse(text: str) -> LinearSpec:
        """Read 'w=... x=... algorithm=...', in any order; a side left out is 'none', the algorithm auto.

        Raises `InvalidSpec` or `UnknownFormat`.
        """
        words = words_of(text)
        weights, activations = (words.get(side, "none") for side in "wx")
        return LinearSpec(
            None if weights == "none" else TensorSpec.parse(weights),
            None if activations == "none" else TensorSpec.parse(activations),
            words.get("algorithm", AUTO),
        )


def words_of(text: str) -> dict[str, str]:
    """The words 'name=value' of a linear spec's text, at least one; the values are not read yet."""
    words: dict[str, str] = {}
    for word in text.split() if isinstance(text, str) else ():
        name, _, value = word.partition("=")
        if name not in ("w", "x", "algorithm") or not value or name in words:
            raise InvalidSpec(text, FORM)
        words[name] = value
    if not words:
        raise InvalidSpec(text, FORM)
    return words
