"""What a convolution, an embedding or a norm gets where the config speaks of linears."""

from __future__ import annotations

from dataclasses import replace

from fxquant.errors import InvalidOption, nearest
from fxquant.spec.formats import SAMPLE
from fxquant.spec.linears import LinearSpec

KINDS = ("linear", "conv", "embedding", "norm")
# What a rule for '*' does not name: an embedding costs little, and a norm is no product.
FLOAT_BY_DEFAULT = ("embedding", "norm")
NORM_RULE = "a norm has no weight matrix: a rule names it by activations alone, such as 'x=int8'"


def conv_spec(spec: LinearSpec) -> LinearSpec:
    """What a convolution gets where a linear gets `spec`.

    Its activation [B, C, ...] has no row of features: per token is read as per sample (one scale for each index of axis
    0), and groups along the last axis, which is space and not features, are left out. Weights are as the linear's.
    """
    x = spec.activations
    if x is None or x.granularity.kind not in ("token", "group"):
        return spec
    if x.granularity.kind == "group":
        return replace(spec, activations=None)
    return replace(spec, activations=replace(x, granularity=SAMPLE))


def embedding_spec(spec: LinearSpec) -> LinearSpec:
    """What an embedding gets where a linear gets `spec`: its weights; the indices that it takes are no activation."""
    return replace(spec, activations=None)


def norm_spec(spec: LinearSpec) -> LinearSpec | None:
    """What a norm gets by a rule: its output in the format of the activations, if they stand alone.

    A rule with weights is for the linears below a path: norms there stay float, as at the door that sees no modules.
    """
    return spec if spec.weights is None and spec.activations is not None else None


def spec_of_kind(spec: LinearSpec | None, kind: str) -> tuple[LinearSpec | None, str]:
    """`spec` as a module of that kind takes it, and what had to change in words that follow a reason; empty if nothing.

    Raises `InvalidOption` for a kind that does not exist.
    """
    if kind not in KINDS:
        near = nearest(str(kind), KINDS)
        hint = f"; did you mean {near!r}?" if near else ""
        raise InvalidOption("kind", kind, f"it takes {', '.join(map(repr, KINDS))}{hint}")
    if spec is None:
        return None, ""
    if kind == "norm":
        return norm_spec(spec), "" if spec.weights is None else f"; {NORM_RULE}"
    if spec.activations is None or kind == "linear":
        return spec, ""
    if kind == "embedding":
        return embedding_spec(spec), f"; an embedding has no activations, so no x={spec.activations}"
    changed = conv_spec(spec)
    if changed.activations is None:
        return changed, f"; a convolution has no groups of features, so weights only, no x={spec.activations}"
    return changed, "" if changed == spec else f"; a convolution takes x={spec.activations} per sample"
