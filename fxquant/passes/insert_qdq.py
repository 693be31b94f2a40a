"""insert-qdq: from here on the graph computes the quantized model, in reference arithmetic."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxquant import ops  # noqa: F401  (declares torch.ops.fxquant)
from fxquant.annotation import PassResult, amend_note, note_of
from fxquant.graphs import VALUE_KEY, add_call, autocast_regions, entered, fake_mode_of, infer_value, value_of
from fxquant.passes.base import Pass
from fxquant.passes.joining import parts_of, quantized_by_parts
from fxquant.passes.sites import uncast
from fxquant.products import Form, activation_of, products, weight_of
from fxquant.spec import LinearSpec, TensorSpec

QUANTIZE_DYNAMIC = torch.ops.fxquant.quantize_dynamic.default
QUANTIZE_WEIGHT = torch.ops.fxquant.quantize_weight.default
DEQUANTIZE = torch.ops.fxquant.dequantize.default
_FLATTEN, _VIEW = torch.ops.aten.flatten.using_ints, torch.ops.aten.view.default
_CAT, _EXPAND, _CLONE = torch.ops.aten.cat.default, torch.ops.aten.expand.default, torch.ops.aten.clone.default
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}

Call = Callable[..., Node]


@dataclass(frozen=True)
class InsertQdq(Pass):
    """Put quantize → dequantize around the operands of every annotated product.

    before:  y = linear(x, @w, b)
    after:   xc, xs     = quantize_dynamic(x, "int8/token")
             wc, ws, wz = quantize_weight(@w, "int8/channel")
             y          = linear(dequantize(xc, xs), dequantize(wc, ws, wz), b)

    before:  y = convolution(x, @w, b, stride, …)          e = embedding(@w, indices)
    after:   wc, ws = quantize_weight(flatten(@w, 1))      wc, ws = quantize_weight(@w)
             y = convolution(x, view(dequantize(wc, ws), w.shape), b, stride, …)
                                                           e = embedding(dequantize(wc, ws), indices)

    A convolution's weight is quantized as a matrix [O, all the rest], so that groups run along the rest. A weight that
    was joined is quantized by its parts where a whole would have other codes:

    before:  y = linear(x, cat(@q, @k))
    after:   qc, qs = quantize_weight(@q, "int8/tensor")   kc, ks = quantize_weight(@k, "int8/tensor")
             y = linear(x, dequantize(cat(qc, kc), cat(expand(qs, [8, 1]), expand(ks, [8, 1]))))
    """

    name = "insert-qdq"

    def run(self, gm: GraphModule) -> PassResult:
        result = PassResult()
        for node, form in products(gm):
            spec = note_of(node).spec
            if spec is None or DEQUANTIZE in (source.target for source in _behind_view(weight_of(node))):
                continue
            call, x = _caller(gm, node), activation_of(node)
            if spec.activations is not None and x is not None:
                assert form.activation is not None
                node.update_arg(form.activation, _activation(call, x, spec.activations))
            if spec.weights is not None:
                old = weight_of(node)
                node.update_arg(form.weight, _weight(call, old, form, spec))
                if not old.users and old is not uncast(old):
                    gm.graph.erase_node(old)
                _keep_layout(gm, node, form)
            result.changed += 1
        return result


def _behind_view(weight: Node) -> Iterator[Node]:
    yield weight
    if weight.target is _VIEW:
        yield from weight.all_input_nodes


def _caller(gm: GraphModule, site: Node) -> Call:
    """A function that adds a call in front of the site, in its name."""

    def call(target: Any, *args: Any) -> Node:
        with gm.graph.inserting_before(site):
            return add_call(gm.graph, target, args, like=site, made_by=InsertQdq.name)

    return call


def _activation(call: Call, x: Node, spec: TensorSpec) -> Node:
    made = call(QUANTIZE_DYNAMIC, x, str(spec))
    codes, scale = call(operator.getitem, made, 0), call(operator.getitem, made, 1)
    tensor_scale = (call(operator.getitem, made, 2),) if spec.has_tensor_scale else ()
    return call(DEQUANTIZE, codes, scale, None, str(spec), value_of(x).dtype, *tensor_scale)


def _weight(call: Call, weight: Node, form: Form, spec: LinearSpec) -> Node:
    """The weight behind its codes, in the shape that the product reads."""
    assert spec.weights is not None
    value, weight = value_of(weight), uncast(weight)
    matrix = call(_FLATTEN, weight, 1) if form.kind == "conv" else weight
    parts = parts_of(weight) if quantized_by_parts(spec) else ()
    codes, scale, zero_point, tensor_scale = _joined(call, parts, spec) if parts else _codes(call, matrix, spec)
    last = () if tensor_scale is None else (tensor_scale,)
    decoded = call(DEQUANTIZE, codes, scale, zero_point, str(spec.weights), value.dtype, *last)
    return call(_VIEW, decoded, list(value.shape)) if form.kind == "conv" else decoded


Parts = tuple[Node, Node, Node | None, Node | None]


def _codes(call: Call, matrix: Node, spec: LinearSpec) -> Parts:
    """Codes, scale, zero point and tensor scale of a matrix; None for what the spec does not have."""
    wanted = spec.weights
    assert wanted is not None
    algorithm = () if spec.algorithm == "auto" else (spec.algorithm,)
    made = call(QUANTIZE_WEIGHT, matrix, str(wanted), *algorithm)
    exists = (True, True, wanted.has_zero_point, wanted.has_tensor_scale)
    codes, scale, *others = (call(operator.getitem, made, i) if there else None for i, there in enumerate(exists))
    assert codes is not None
    assert scale is not None
    return codes, scale, others[0], others[1]


def _joined(call: Call, weights: tuple[Node, ...], spec: LinearSpec) -> Parts:
    """Codes of each weight by itself, one below the other; what is one number for a weight is repeated for its rows."""
    rows = [int(value_of(w).shape[0]) for w in weights]
    columns = zip(*(_codes(call, w, spec) for w in weights), strict=True)
    codes, scale, zero_point, tensor_scale = (_stacked(call, column, rows) for column in columns)
    assert codes is not None
    assert scale is not None
    return codes, scale, zero_point, tensor_scale


def _stacked(call: Call, column: tuple[Node | None, ...], rows: list[int]) -> Node | None:
    tensors = [t for t in column if t is not None]
    if not tensors:
        return None
    by_row = [
        t if value_of(t).shape[0] == n else call(_EXPAND, t, [n, *value_of(t).shape[1:]])
        for t, n in zip(tensors, rows, strict=True)
    ]
    return call(_CAT, by_row)


def _keep_layout(gm: GraphModule, node: Node, form: Form) -> None:
    """Codes forget that a convolution's weight was in channels_last, which its output follows: copy that into it."""
    if form.kind != "conv":
        return
    old = value_of(node)
    with entered(autocast_regions(gm).get(node, ())):
        new = infer_value(node, fake_mode_of(gm))
    if tuple(map(str, new.stride())) == tuple(map(str, old.stride())):
        return
    node.meta[VALUE_KEY] = new
    users = list(node.users)
    wanted = {"memory_format": _CHANNELS_LAST.get(old.dim(), torch.contiguous_format)}
    with gm.graph.inserting_after(node):
        copy = add_call(gm.graph, _CLONE, (node,), like=node, made_by=InsertQdq.name, kwargs=wanted)
    amend_note(copy, spec=None)
    copy.meta[VALUE_KEY] = old
    for user in users:
        user.replace_input_with(node, copy)
