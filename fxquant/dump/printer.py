"""The text form of a graph.

FX's own node names are kept: numbering nodes anew would shift every later line and ruin a difference between stages.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxquant.annotation import note_of
from fxquant.graphs import target_name, value_of
from fxquant.report.records import SiteSqnr, stable_text
from fxquant.report.walk import is_by_config, is_left, is_site, is_weight_input, kernel_of, source_of


def text(gm: GraphModule, stage: str = "", sqnr: Mapping[str, SiteSqnr] | None = None) -> str:
    """The graph, one line a node; `stage` goes into the first line, `sqnr` (by node name) into the braces."""
    nodes = list(gm.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder" and not is_weight_input(node)]
    signature = ", ".join(_typed(f"%{node.name}", value_of(node)) for node in inputs)
    title = f"graph {stage}" if stage else "graph"
    header = _weights(gm, nodes)
    body = [f"  {_line(node, sqnr or {})}" for node in nodes if node.op not in ("placeholder", "get_attr")]
    lines = [f"{title}({signature}) {{", *header, *([""] if header else []), *body, "}"]
    for name, inner in _inner_graphs(gm, nodes).items():
        lines += ["", text(inner, name, sqnr).rstrip("\n")]
    return "\n".join(lines) + "\n"


def type_text(value: Any) -> str:
    """The type of a value: ``f32[2, 8]``, ``f16[s0, 64]``, ``(i8[2, 8], f32[2, 1])``, ``Sym(s0)``; empty if unknown."""
    if isinstance(value, torch.Tensor):
        return f"{_dtype_text(value.dtype)}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(type_text(item) or 'None' for item in value)})"
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return f"Sym({value})"
    return "" if value is None else type(value).__name__


def _dtype_text(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.").replace("float8_", "f8")
    return re.sub(r"^(u?)int|^(b?)float|^complex", _short, name)


def _short(match: re.Match[str]) -> str:
    word = match.group()
    if word.endswith("int"):
        return "u" if word == "uint" else "i"
    return "c" if word == "complex" else word.replace("float", "f")


def _typed(name: str, value: Any) -> str:
    kind = type_text(value)
    return f"{name}: {kind}" if kind else name


def _weights(gm: GraphModule, nodes: list[Node]) -> list[str]:
    lines: dict[str, None] = {}
    for node in nodes:
        if node.op == "get_attr":
            held = _held(gm, node)
            kind = "graph" if isinstance(held, GraphModule) else type_text(value_of(node)) or type_text(held)
            lines[f"  @{node.target}: {kind}"] = None
        elif is_weight_input(node):
            lines[f"  {_typed(f'@{node.target}', value_of(node))}"] = None
    return list(lines)


def _held(gm: GraphModule, node: Node) -> Any:
    """What a get_attr node reads; None where the graph module has let go of it."""
    held: Any = gm
    for name in str(node.target).split("."):
        held = getattr(held, name, None)
    return held


def _inner_graphs(gm: GraphModule, nodes: list[Node]) -> dict[str, GraphModule]:
    held = {str(node.target): _held(gm, node) for node in nodes if node.op == "get_attr"}
    return {name: inner for name, inner in held.items() if isinstance(inner, GraphModule)}


def _line(node: Node, sqnr: Mapping[str, SiteSqnr]) -> str:
    if node.op == "output":
        return f"return {_argument(node.args[0])}"
    arguments = [_argument(a) for a in node.args] + [f"{k}={_argument(v)}" for k, v in node.kwargs.items()]
    call = f"{_typed(f'%{node.name}', value_of(node))} = {target_name(node)}({', '.join(arguments)})"
    return "  ".join(part for part in (call, _braces(node, sqnr), _story(node)) if part)


def _braces(node: Node, sqnr: Mapping[str, SiteSqnr]) -> str:
    note = note_of(node)
    if not (is_site(node) or is_left(node)):
        return ""
    words = str(note.spec).split() if note.spec is not None else []
    if kernel := kernel_of(node):
        words.append(f"kernel={kernel}")
    measured = sqnr.get(node.name, SiteSqnr())
    if measured.output is not None:
        words.append(f"sqnr={measured.output:.1f}dB")
    if measured.weight is not None:
        words.append(f"weight={measured.weight:.1f}dB")
    if note.reason and note.spec is None:
        words.append(f"float: {stable_text(note.reason)}")
    elif note.reason and not is_by_config(note.reason):
        # The whole story, every rule's refusal, stands in the summary.
        words.append(f"because: {stable_text(note.reason).split('. ')[0]}")
    return "{" + ", ".join(words) + "}" if words else ""


def _story(node: Node) -> str:
    note = note_of(node)
    words = [note.path, source_of(node)] if is_site(node) or is_left(node) else []
    if note.made_by and not _made_with_input(node):
        words.append(f"made by {', '.join(note.made_by)}")
    words = [word for word in words if word]
    return f"# {stable_text('  '.join(words))}" if words else ""


def _made_with_input(node: Node) -> bool:
    """An element of a tuple: the line that makes the tuple says who made both."""
    if node.target is not operator.getitem:
        return False
    source = node.args[0]
    return isinstance(source, Node) and note_of(source).made_by == note_of(node).made_by


def _argument(value: Any) -> str:
    if isinstance(value, Node):
        is_weight = value.op == "get_attr" or is_weight_input(value)
        # A weight keeps its target when lowering makes it an input; its node name may get a number.
        return f"@{value.target}" if is_weight else f"%{value.name}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_argument, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, list):
        return f"[{', '.join(map(_argument, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key!r}: {_argument(item)}' for key, item in value.items())}}}"
    if isinstance(value, slice):
        step = "" if value.step is None else f":{_argument(value.step)}"
        return f"{_bound(value.start)}:{_bound(value.stop)}{step}"
    if isinstance(value, torch.dtype):
        return _dtype_text(value)
    if isinstance(value, (torch.device, torch.memory_format, torch.layout)):
        return str(value).removeprefix("torch.")
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    return stable_text(repr(value))


def _bound(value: Any) -> str:
    return "" if value is None else _argument(value)
