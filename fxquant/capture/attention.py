"""Attention modules that Dynamo shows as one opaque node become linears and plain attention, with torch's semantics.

before:  out, w = multi_head_attention_forward(x, x, x, 64, 4, @in_proj_weight, …)
after:   q, k, v = linear(x, @in_proj_weight[:64]), linear(x, @in_proj_weight[64:128]), linear(x, …[128:])
         out     = linear(scaled_dot_product_attention(q, k, v), @out_proj_weight)

The functions below read as ordinary torch code: they run on `fx.Proxy`s whose nodes get their values at once.
Source of method: torch 2.13, `F.multi_head_attention_forward` and `aten/native/transformers`.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

from fxquant.annotation import amend_note, note_of
from fxquant.capture.editor import MADE_BY, Editor, give_reason, is_transformed, substitute
from fxquant.graphs import VALUE_KEY, fake_mode_of, infer_value, inherit_meta, refresh_values, target_name, value_of
from fxquant.products import LINEAR

# A proxy in the place of a tensor, which torch's stubs would refuse.
Traced = Any

_NEGATIVE_INFINITY = float("-inf")


def take_attention_apart(editor: Editor) -> None:
    """Decompose every attention node of the graph; one that cannot be gets the reason written on it."""
    constant = editor.constants()
    for node in list(editor.gm.graph.nodes):
        word = target_name(node).removeprefix("aten.") if node.op == "call_function" else ""
        decompose = _DECOMPOSITIONS.get(word)
        if decompose is None:
            continue
        if why := _why_not(node):
            weight = next((n for n in node.all_input_nodes if n in constant and value_of(n).dim() == 2), None)
            give_reason(node, why, editor.model.holder(node, weight, 1) if weight else "")
            continue
        with editor.gm.graph.inserting_before(node), editor.region(node):
            tracer = _Tracer(editor, node)
            arguments = {k: tracer.proxy(v) if isinstance(v, Node) else v for k, v in _arguments(node).items()}
            result = decompose(tracer, arguments)
        _put_in_place(editor, node, result)


class _Tracer(GraphAppendingTracer):
    """Turns torch calls on proxies into nodes that have their values, and stand for one attention node."""

    def __init__(self, editor: Editor, like: Node) -> None:
        super().__init__(editor.gm.graph)
        self.editor = editor
        self.like = like
        self._mode = fake_mode_of(editor.gm)

    def create_proxy(self, *args: Any, **kwargs: Any) -> Proxy:
        proxy = super().create_proxy(*args, **kwargs)
        inherit_meta(proxy.node, self.like, MADE_BY)
        proxy.node.meta[VALUE_KEY] = infer_value(proxy.node, self._mode)
        return proxy

    def linear(self, x: Traced, weight: Traced, bias: Traced, path: str) -> Traced:
        """The canonical product of the site `path`."""
        made = self.create_proxy("call_function", LINEAR, (x, weight) if bias is None else (x, weight, bias), {})
        amend_note(made.node, paths=(path,))
        return made


@dataclass(frozen=True)
class _Heads:
    """Query, key and value, each [batch, heads, length, head size], and the additive mask (broadcastable), if any."""

    query: Traced
    key: Traced
    value: Traced
    mask: Traced


def _multi_head_attention(t: _Tracer, a: dict[str, Any]) -> tuple[Any, Any]:
    """`F.multi_head_attention_forward`: inputs [length, batch, features], or [length, features] unbatched."""
    batched = _rank(a["query"]) == 3
    inputs = [a[name] if batched else a[name].unsqueeze(1) for name in ("query", "key", "value")]
    padding, mask, causal = _masks(a, batched)
    path = _module_of(t, a["in_proj_weight"] if a["in_proj_weight"] is not None else a["q_proj_weight"], 1)
    query, key, value = _project(t, inputs, a, path)
    grown = 0
    if a["bias_k"] is not None:
        key = torch.cat([key, a["bias_k"].expand_as(key[:1])])
        value = torch.cat([value, a["bias_v"].expand_as(value[:1])])
        grown += 1
    heads = int(a["num_heads"])
    query, key, value = (_split_heads(x, heads).permute(1, 2, 0, 3) for x in (query, key, value))
    if a["add_zero_attn"]:
        key, value = F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1))
        grown += 1
    parts = _Heads(query, key, value, _merged(_grown(mask, grown), _grown(padding, grown), heads))
    dropout = a["dropout_p"] if a["training"] else 0.0
    if a["need_weights"]:
        out, weights = _explicit_attention(parts, heads, dropout)
        weights = weights.mean(dim=1) if a["average_attn_weights"] else weights
    else:
        out, weights = F.scaled_dot_product_attention(query, key, value, parts.mask, dropout, causal), None
    out = out.permute(2, 0, 1, 3).flatten(-2)
    out = t.linear(out, a["out_proj_weight"], a["out_proj_bias"], _join(path, "out_proj"))
    if not batched:
        out, weights = out.squeeze(1), None if weights is None else weights.squeeze(0)
    return out, weights


def _masks(a: dict[str, Any], batched: bool) -> tuple[Traced, Traced, bool]:
    """The padding mask [batch, source] and the attention mask, both additive; whether the causal hint is used."""
    dtype = value_of(a["query"].node).dtype
    padding, mask, causal = a["key_padding_mask"], a["attn_mask"], bool(a["is_causal"])
    if padding is not None and not batched:
        padding = padding.unsqueeze(0)
    padding = _additive(padding, dtype)
    if causal and padding is None and not a["need_weights"]:
        return None, None, True
    return padding, _additive(mask, dtype), causal and padding is None


def _additive(mask: Traced, dtype: torch.dtype) -> Traced:
    """A boolean mask (True: leave out) as one that is added."""
    if mask is None or value_of(mask.node).dtype.is_floating_point:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, _NEGATIVE_INFINITY)


def _project(t: _Tracer, inputs: list[Any], a: dict[str, Any], path: str) -> list[Traced]:
    packed, bias = a["in_proj_weight"], a["in_proj_bias"]
    # Of the weight, not of an input: under dynamic=True an input's may be symbolic.
    features = _size(a["q_proj_weight"], 0) if a["use_separate_proj_weight"] else _size(packed, 0) // 3
    projected = []
    for i, (x, part) in enumerate(zip(inputs, "qkv", strict=True)):
        own = a[f"{part}_proj_weight"] if a["use_separate_proj_weight"] else None
        weight = packed.narrow(0, i * features, features) if own is None else own
        part_bias = None if bias is None else bias.narrow(0, i * features, features)
        projected.append(t.linear(x, weight, part_bias, _join(path, f"{part}_proj")))
    return projected


def _split_heads(x: Traced, heads: int) -> Any:
    return x.unflatten(-1, (heads, _size(x, -1) // heads))


def _grown(mask: Traced, count: int) -> Traced:
    """The mask with `count` more columns that leave nothing out: for bias_k and for the zero key."""
    return F.pad(mask, (0, count)) if mask is not None and count else mask


def _merged(mask: Traced, padding: Traced, heads: int) -> Traced:
    """One additive mask, [target, source] or [batch, heads or 1, target or 1, source]."""
    if mask is not None and _rank(mask) == 3:
        mask = mask.unflatten(0, (-1, heads))  # [batch * heads, target, source]
    if padding is None:
        return mask
    columns = padding[:, None, None, :]
    return columns if mask is None else mask + columns


def _explicit_attention(parts: _Heads, heads: int, dropout: Any) -> tuple[Any, Any]:
    """Softmax(QK) written out, in torch's order of operations; returns output and weights, both by head."""
    query, key, value = (x.flatten(0, 1) for x in (parts.query, parts.key, parts.value))
    query = query * math.sqrt(1.0 / _size(query, -1))
    scores = torch.bmm(query, key.transpose(-2, -1))
    if parts.mask is not None:  # added by itself: torch's baddbmm has no values of symbolic sizes
        flat = parts.mask.unsqueeze(0) if _rank(parts.mask) == 2 else parts.mask.expand(-1, heads, -1, -1).flatten(0, 1)
        scores = scores + flat
    weights: Any = F.softmax(scores, dim=-1)
    if not isinstance(dropout, float) or dropout > 0.0:
        weights = F.dropout(weights, p=dropout)
    out = torch.bmm(weights, value)
    return out.unflatten(0, (-1, heads)), weights.unflatten(0, (-1, heads))


def _native_attention(t: _Tracer, a: dict[str, Any]) -> tuple[Any, Any]:
    """`torch._native_multi_head_attention`: inputs [batch, length, features]; the mask leaves out what is not zero."""
    path = _module_of(t, a["qkv_weight"], 1)
    out, weights = _native_core(t, a, [a["query"], a["key"], a["value"]], int(a["num_head"]), path, a["need_weights"])
    if weights is not None and a["average_attn_weights"]:
        weights = weights.mean(dim=1)
    return out, weights


def _native_core(
    t: _Tracer, a: dict[str, Any], inputs: list[Any], heads: int, path: str, need_weights: bool
) -> tuple[Any, Any]:
    packed = {"in_proj_weight": a["qkv_weight"], "in_proj_bias": a["qkv_bias"], "use_separate_proj_weight": False}
    projected = _project(t, inputs, packed, path)
    query, key, value = (_split_heads(x, heads).transpose(1, 2) for x in projected)
    if a["mask"] is None and not need_weights:
        out, weights = F.scaled_dot_product_attention(query, key, value), None
    else:
        scores = torch.matmul(query / math.sqrt(_size(query, -1)), key.transpose(-2, -1))
        if a["mask"] is not None:  # not through scaled_dot_product_attention: a row with nothing left must give NaN
            scores = scores.masked_fill(_left_out(a["mask"], a["mask_type"]), _NEGATIVE_INFINITY)
        weights = F.softmax(scores, dim=-1)
        out = torch.matmul(weights, value)
    out = out.transpose(1, 2).flatten(-2)
    return t.linear(out, a["proj_weight"], a["proj_bias"], _join(path, "out_proj")), weights if need_weights else None


def _left_out(mask: Traced, mask_type: int) -> Traced:
    """The mask as booleans; type 0: [length, length], 1: [batch, length], 2: [batch, heads, length, length]."""
    mask = mask.to(torch.bool)  # torch's fused kernel does the same with a float mask: what is not zero is left out
    return mask[:, None, None, :] if mask_type == 1 else mask


def _encoder_layer(t: _Tracer, a: dict[str, Any]) -> Any:
    """`torch._transformer_encoder_layer_fwd`: src [batch, length, features]; no dropout."""
    path = _module_of(t, a["qkv_weight"], 2)
    features = (_size(a["norm_weight_1"], 0),)

    def norm(x: Any, number: int) -> Any:
        return F.layer_norm(x, features, a[f"norm_weight_{number}"], a[f"norm_bias_{number}"], a["eps"])

    def attend(x: Any) -> Any:
        return _native_core(t, a, [x, x, x], int(a["num_heads"]), _join(path, "self_attn"), False)[0]

    def feed_forward(x: Any) -> Any:
        hidden = t.linear(x, a["ffn_weight_1"], a["ffn_bias_1"], _join(path, "linear1"))
        hidden: Any = F.gelu(hidden) if a["use_gelu"] else F.relu(hidden)
        return t.linear(hidden, a["ffn_weight_2"], a["ffn_bias_2"], _join(path, "linear2"))

    x = a["src"]
    if a["norm_first"]:
        x = x + attend(norm(x, 1))
        return x + feed_forward(norm(x, 2))
    x = norm(x + attend(x), 1)
    return norm(x + feed_forward(x), 2)


_DECOMPOSITIONS = {
    "multi_head_attention_forward": _multi_head_attention,
    "_native_multi_head_attention": _native_attention,
    "_transformer_encoder_layer_fwd": _encoder_layer,
}


def _arguments(node: Node) -> dict[str, Any]:
    """The call's arguments by name, as they are in the graph; nodes are not wrapped yet."""
    if target_name(node) == "multi_head_attention_forward":
        bound = inspect.signature(F.multi_head_attention_forward).bind(*node.args, **node.kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)
    word = target_name(node).removeprefix("aten.")
    schema = getattr(torch.ops.aten, word).default._schema
    given = dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | node.kwargs
    return {a.name: given.get(a.name, a.default_value) for a in schema.arguments}


def _why_not(node: Node) -> str:
    if is_transformed(node):
        return "attention inside a function transform such as torch.vmap: left as it is"
    a = _arguments(node)
    if a.get("static_k") is not None or a.get("static_v") is not None:
        return "attention with static_k or static_v: left as it is"
    flags = ("num_heads", "num_head", "need_weights", "training", "is_causal", "norm_first", "mask_type")
    if computed := [name for name in flags if isinstance(a.get(name), Node)]:
        return f"attention whose {computed[0]} is computed: left as it is"
    weight = next(w for name in ("in_proj_weight", "q_proj_weight", "qkv_weight") if (w := a.get(name)) is not None)
    fixed = all(isinstance(size, int) for size in value_of(weight).shape)
    return "" if fixed else "attention with weights of unknown size: left as it is"


def _put_in_place(editor: Editor, node: Node, result: Any) -> None:
    """Let the new nodes stand for the old one and for what was taken out of its tuple."""
    old = value_of(node)
    if not isinstance(result, tuple):
        node.replace_all_uses_with(result.node)
        editor.gm.graph.erase_node(node)
        pairs = [(result.node, old)]
    else:
        parts = tuple(None if r is None else r.node for r in result)
        for user in [u for u in node.users if target_name(u) == "getitem"]:
            substitute(user, parts[user.args[1]])  # pyright: ignore[reportArgumentType, reportCallIssue]
        substitute(node, parts)
        for part in parts:
            _erase_unread(part)
        pairs = [(p, v) for p, v in zip(parts, old, strict=True) if p is not None and p.users]
    moved = [new for new, value in pairs if _strides(value_of(new)) != _strides(value)]
    if moved:
        refresh_values(editor.gm, moved)


def _erase_unread(node: Node | None) -> None:
    """Erase what was made for an output that nobody reads: the weights of `attention(x, x, x)[0]`."""
    while node is not None and not node.users and MADE_BY in note_of(node).made_by:
        (operand,) = node.all_input_nodes[:1] or (None,)
        node.graph.erase_node(node)
        node = operand


def _strides(value: Any) -> tuple[str, ...]:
    return tuple(map(str, value.stride())) if isinstance(value, torch.Tensor) else ()


def _module_of(t: _Tracer, weight: Traced, levels: int) -> str:
    return t.editor.model.holder(t.like, weight.node, levels)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _rank(x: Traced) -> int:
    return value_of(x.node).dim()


def _size(x: Traced, axis: int) -> int:
    return int(value_of(x.node).shape[axis])
