"""Rules for Triton kernels: any target that runs them, by the formats that its architecture multiplies."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from fxquant.annotation import amend_note
from fxquant.graphs import add_call, value_of
from fxquant.lowering.plans import chosen, dtype_word, no_tiles, no_triton_kernel, problem_of
from fxquant.lowering.rule import MADE_BY, PACK_ROWS, Rule, add, cast_to, layout
from fxquant.lowering.site import DEQUANTIZE, QuantizedSite
from fxquant.numerics.tiles import scaled_by_blocks
from fxquant.products import CONVOLUTION, weight_of
from fxquant.target import Problem, Target

TILE_CODES = torch.ops.fxquant.tile_codes.default
TRANSPOSE_GRANULES = torch.ops.fxquant.transpose_granules.default
_FXQUANT = torch.ops.fxquant


class TiledCodes(Rule):
    """The product of codes with codes, which siblings that could not be joined share.

    before:  linear(dequantize(xc, xs), dequantize(@codes, @scale, @zero_point), b)
    after:   tiled_linear_codes(xc, xs, tile_codes(@codes), transpose_granules(@scale), …, b, plan)
    """

    kind = "linear"
    kernel = "tiled_linear_codes"

    def why_not(self, site: QuantizedSite, target: Target) -> str:
        if site.spec.activations is None:
            return "x is float, the rule wants codes"
        if site.x_quantize is None or site.x_operand.target is not DEQUANTIZE:
            return "no codes of x are in the graph"
        return no_tiles(site) or no_triton_kernel(problem_of(site, site.spec.activations), target.arch)

    def build(self, gm: GraphModule, site: QuantizedSite, target: Target) -> Node:
        spec = site.spec.activations
        assert spec is not None
        choice = chosen(problem_of(site, spec), target, site)
        codes, scale, *_ = site.x_operand.args
        whole = site.x_operand.args[5] if len(site.x_operand.args) > 5 else None
        assert isinstance(codes, Node)
        if spec.format.bits == 4:
            codes = layout(gm, codes, PACK_ROWS, str(spec))
        stored = scaled_by_blocks(site.weight.spec, spec)
        weight = _stored_weight(gm, site) if stored else _tiled_weight(gm, site)
        x = (codes, scale, whole, str(spec))
        made = add(gm, site, _FXQUANT.tiled_linear_codes.default, *x, *weight, *_tail(site, choice.ints))
        amend_note(made, kernel=choice.words)
        return made


class TiledFloat(Rule):
    """The product of a float x with a weight that the kernel decodes; a quantized x is read as the values of its codes.

    before:  linear(x, dequantize(@codes, @scale, @zero_point), b)
    after:   tiled_linear(x, tile_codes(@codes), transpose_granules(@scale), …, b, plan)
    """

    kind = "linear"
    kernel = "tiled_linear"

    def why_not(self, site: QuantizedSite, target: Target) -> str:
        return no_tiles(site) or no_triton_kernel(problem_of(site, None), target.arch)

    def build(self, gm: GraphModule, site: QuantizedSite, target: Target) -> Node:
        choice = chosen(problem_of(site, None), target, site)
        x = cast_to(gm, site, site.x_operand)
        weight = _tiled_weight(gm, site)
        made = add(gm, site, _FXQUANT.tiled_linear.default, x, *weight, *_tail(site, choice.ints))
        amend_note(made, kernel=choice.words)
        if spec := site.spec.activations:
            amend_note(made, reason=f"x is rounded to {spec} and multiplied as {dtype_word(site.dtype)}: no kernel of "
                                    f"{target.arch} multiplies its codes with {site.weight.spec}")  # fmt: skip
        return made


class DecodedConvolution(Rule):
    """A convolution whose weight is decoded at each call, and takes the bytes of its format until then.

    before:  convolution(x, view(dequantize(@codes, @scale)), b, stride, …)
    after:   convolution(x, view(decode_rows(pack_rows(@codes), @scale)), b, stride, …)
    """

    kind = "conv"
    kernel = "decode_rows"

    def why_not(self, site: QuantizedSite, target: Target) -> str:
        return ""

    def build(self, gm: GraphModule, site: QuantizedSite, target: Target) -> Node:
        weight, view, spec = site.weight, value_of(weight_of(site.product)), str(site.weight.spec)
        rows = layout(gm, weight.codes, PACK_ROWS, spec)
        tail = (weight.scale, weight.zero_point, weight.tensor_scale, weight.in_features, spec, view.dtype)
        decoded = add(gm, site, _FXQUANT.decode_rows.default, rows, *tail)
        shaped = (decoded, list(view.shape))
        matrix = add_call(gm.graph, torch.ops.aten.view.default, shaped, like=site.product, made_by=MADE_BY)
        made = add(gm, site, CONVOLUTION, site.x_operand, matrix, *site.product.args[2:])
        amend_note(made, reason="decoded at each call, then a float convolution: no Triton kernel multiplies patches")
        return made


class TiledTable(Rule):
    """Only the rows that are looked up are decoded.

    before:  embedding(dequantize(@codes, @scale), indices)
    after:   embedding_dequantize(indices, pack_rows(@codes), @scale)
    """

    kind = "embedding"
    kernel = "embedding_dequantize"

    def why_not(self, site: QuantizedSite, target: Target) -> str:
        weight = site.weight
        sizes = (0, weight.out_features, weight.in_features)
        problem = Problem("embedding", *sizes, str(weight.spec), "", dtype_word(site.dtype))
        return no_triton_kernel(problem, target.arch)

    def build(self, gm: GraphModule, site: QuantizedSite, target: Target) -> Node:
        weight, spec = site.weight, str(site.weight.spec)
        rows = layout(gm, weight.codes, PACK_ROWS, spec)
        tail = (weight.scale, weight.zero_point, weight.tensor_scale, weight.in_features, spec, site.dtype)
        return add(gm, site, _FXQUANT.embedding_dequantize.default, site.x, rows, *tail)


def _tiled_weight(gm: GraphModule, site: QuantizedSite) -> tuple[Node, Node, Node | None, Node | None]:
    """(tiles, scale, zero_point, tensor_scale) of the site's weight."""
    weight, spec = site.weight, str(site.weight.spec)
    sizes = (spec, weight.out_features, weight.in_features)
    zero_point = weight.zero_point
    return (
        layout(gm, weight.codes, TILE_CODES, spec),
        layout(gm, weight.scale, TRANSPOSE_GRANULES, *sizes),
        None if zero_point is None else layout(gm, zero_point, TRANSPOSE_GRANULES, *sizes),
        weight.tensor_scale,
    )


def _stored_weight(gm: GraphModule, site: QuantizedSite) -> tuple[Node, Node, None, Node | None]:
    """The same in the storage form, which kernels of block-scaled formats read."""
    weight = site.weight
    return layout(gm, weight.codes, PACK_ROWS, str(weight.spec)), weight.scale, None, weight.tensor_scale


def _tail(site: QuantizedSite, plan: tuple[int, ...]) -> tuple[object, ...]:
    """bias, residual, activation, in_features, spec, dtype, plan."""
    weight = site.weight
    return site.bias, None, "", weight.in_features, str(weight.spec), site.dtype, list(plan)
