"""Small graphs put together by hand: what capture and the pipeline make of a model, without running them."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node

from fxquant import ops  # noqa: F401  (declares torch.ops.fxquant)
from fxquant.annotation import Note, write_note
from fxquant.graphs import CapturedGraph, CapturedWeight, infer_value, target_name
from fxquant.spec import PRESETS

aten = torch.ops.aten
INT8 = PRESETS["int8dq"]
DEQUANTIZE = torch.ops.fxquant.dequantize.default
QUANTIZE = torch.ops.fxquant.quantize_dynamic.default
KERNEL = torch.ops.fxquant.int8_linear_dynamic.default
LINEAR = aten.linear.default
QKV = ("layers.0.attn.q_proj", "layers.0.attn.k_proj", "layers.0.attn.v_proj")
EMBEDDING = "embeddings stay float by default; give embeddings= or a rule"
NO_KERNEL = "runs as dequantize + linear. int8_linear: the device has none"


class Hand:
    """A graph under construction; every node gets its value, every weight is random from a fixed seed."""

    def __init__(self) -> None:
        self.graph = Graph()
        self.mode = FakeTensorMode()
        self.tensors: dict[str, torch.Tensor] = {}
        self._random = torch.Generator().manual_seed(0)

    def weight(self, name: str, *shape: int, tensor: torch.Tensor | None = None) -> Node:
        self.tensors[name] = torch.randn(shape, generator=self._random) if tensor is None else tensor
        node = self.graph.create_node("get_attr", name)
        node.meta["val"] = self.mode.from_tensor(self.tensors[name])
        return node

    def input(self, name: str, *shape: int, dtype: torch.dtype = torch.float32, note: Note | None = None) -> Node:
        node = self.graph.placeholder(name)
        with self.mode:
            node.meta["val"] = torch.empty(shape, dtype=dtype)
        if note is not None:
            write_note(node, note)
        return node

    def call(self, target: Any, *args: Any, note: Note | None = None, **kwargs: Any) -> Node:
        node = self.graph.create_node("call_function", target, args, kwargs)
        node._rename(target_name(node).split(".")[-1])  # as export names it: linear, not linear_default
        node.meta["val"] = infer_value(node, self.mode)
        if note is not None:
            write_note(node, note)
        return node

    def module(self, *outputs: Node) -> GraphModule:
        self.graph.output(outputs)
        return GraphModule(dict(self.tensors), self.graph)

    def captured(self, gm: GraphModule, paths: dict[str, tuple[str, ...]] | None = None) -> CapturedGraph:
        weights = tuple(
            CapturedWeight(name, (paths or {}).get(name, (name,)), position, is_parameter=True)
            for position, name in enumerate(self.tensors, start=1)
        )
        return CapturedGraph(gm, (0,), weights, 1 + len(weights))


def paths_of_model() -> dict[str, tuple[str, ...]]:
    """Attribute name → the model's names, for the model of `captured_model`."""
    plain = {path.replace(".", "_") + "_weight": (f"{path}.weight",) for path in (*QKV, "layers.0.o", "layers.0.down")}
    return {**plain, "embed_weight": ("embed.weight", "head.weight"), "layers_0_down_bias": ("layers.0.down.bias",)}


def captured_model() -> CapturedGraph:
    """head(down(o(relu(q(x) + k(x) + v(x))))) with x = embed(tokens); the head is tied to the embedding. Width 8."""
    hand = Hand()
    tokens = hand.input("tokens", 2, 4, dtype=torch.int64)
    table = hand.weight("embed_weight", 10, 8)
    names = ("layers_0_attn_q_proj_weight", "layers_0_attn_k_proj_weight", "layers_0_attn_v_proj_weight")
    qkv = [hand.weight(name, 8, 8) for name in names]
    o = hand.weight("layers_0_o_weight", 8, 8)
    down, down_bias = hand.weight("layers_0_down_weight", 8, 8), hand.weight("layers_0_down_bias", 8)
    x = hand.call(aten.embedding.default, table, tokens, note=Note(("embed",), reason=EMBEDDING))
    q, k, v = (hand.call(LINEAR, x, w, note=Note((p,), INT8)) for p, w in zip(QKV, qkv, strict=True))
    total = hand.call(aten.add.Tensor, hand.call(aten.add.Tensor, q, k), v)
    y = hand.call(LINEAR, hand.call(aten.relu.default, total), o, note=Note(("layers.0.o",), INT8))
    y = hand.call(LINEAR, y, down, down_bias, note=Note(("layers.0.down",), reason='rule "*.down=none"'))
    y = hand.call(LINEAR, y, table, note=Note(("head",), reason="the weight has more than one reader"))
    return hand.captured(hand.module(y), paths_of_model())


def lowered_model() -> GraphModule:
    """The same after lowering: q, k, v on one kernel, o as reference, down left by a rule, the head declined."""
    hand = Hand()
    tokens = hand.input("tokens", 2, 4, dtype=torch.int64)
    site = Note(QKV, INT8, "default", ("fuse-siblings", "lower"), "int8_linear_dynamic", "model.py:41")
    kept = Note(("layers.0.o",), INT8, NO_KERNEL, source="model.py:44")
    packed = hand.input("layers_0_attn_packed", 24 * 8, dtype=torch.int8, note=site)
    scale = hand.input("layers_0_attn_scale", 24, 1, note=site)
    codes = hand.input("layers_0_o_codes", 8, 8, dtype=torch.int8, note=kept)
    o_scale = hand.input("layers_0_o_scale", 8, 1, note=kept)
    table = hand.input("embed_weight", 10, 8, note=Note())
    down, bias = hand.input("layers_0_down_weight", 8, 8, note=Note()), hand.input("layers_0_down_bias", 8, note=Note())
    x = hand.call(aten.embedding.default, table, tokens, note=Note(("embed",), reason=EMBEDDING))
    qkv = hand.call(KERNEL, x, packed, scale, None, 8, note=site)
    by_fuse = Note(QKV, None, "default", ("fuse-siblings",))
    pieces = hand.call(aten.split_with_sizes.default, qkv, [8, 8, 8], -1, note=by_fuse)
    q, k, v = (hand.call(operator.getitem, pieces, i, note=by_fuse) for i in range(3))
    total = hand.call(aten.add.Tensor, hand.call(aten.add.Tensor, q, k), v)
    by_qdq = Note(("layers.0.o",), INT8, made_by=("insert-qdq",))
    both = hand.call(QUANTIZE, hand.call(aten.relu.default, total), "int8/token", note=by_qdq)
    parts = [hand.call(operator.getitem, both, i, note=by_qdq) for i in range(2)]
    y = hand.call(DEQUANTIZE, *parts, None, "int8/token", torch.float32, note=by_qdq)
    w = hand.call(DEQUANTIZE, codes, o_scale, None, "int8/channel", torch.float32, note=by_qdq)
    y = hand.call(LINEAR, y, w, note=kept)
    y = hand.call(LINEAR, y, down, bias, note=Note(("layers.0.down",), reason='rule "*.down=none"'))
    y = hand.call(LINEAR, y, table, note=Note(("head",), reason="the weight has more than one reader"))
    return hand.module(y)
