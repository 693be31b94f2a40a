"""Dumps: the text of a graph, the folder of a graph, and the numbers in the braces."""

from __future__ import annotations

import ast
import json
import math
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fxquant.annotation import Note, amend_note
from fxquant.dump import Dumper, dot, measure_sqnr, sqnr, text
from fxquant.dump.folder import write_atomically
from fxquant.dump.printer import type_text
from fxquant.errors import DumpFailed, FxQuantError
from fxquant.report import GraphReport, SiteSqnr
from tests.handmade import DEQUANTIZE, INT8, LINEAR, Hand, aten, captured_model, lowered_model

INT8_LINEAR = torch.ops.fxquant.int8_linear_weight_only.default
Golden = Callable[[str, str], None]


def test_text_of_a_captured_graph(golden: Golden) -> None:
    golden("captured.txt", text(captured_model().gm, "01-capture"))


def test_text_of_a_lowered_graph(golden: Golden) -> None:
    golden("lowered.txt", text(lowered_model(), "07-lower", {"int8_linear_dynamic": SiteSqnr(41.27, 45.0)}))


def test_text_is_the_same_for_the_same_graph_and_names_no_machine() -> None:
    first, second = text(lowered_model()), text(lowered_model())
    assert first == second
    assert not re.search(r"0x[0-9a-f]+|/work/|/home/|/tmp/", first)


def test_an_edit_changes_only_its_own_lines() -> None:
    gm = captured_model().gm
    before = text(gm).splitlines()
    relu = next(n for n in gm.graph.nodes if n.target is aten.relu.default)
    relu.replace_all_uses_with(relu.args[0])
    gm.graph.erase_node(relu)
    after = text(gm).splitlines()
    assert len(set(before) - set(after)) == 2  # the relu, and the linear that read it


def test_a_weight_keeps_its_name_when_it_becomes_an_input() -> None:
    hand = Hand()
    weight = hand.input("lin_codes", 8, 8, note=Note(("lin",)))
    weight._rename("lin_codes_1")  # as FX does where the get_attr of that name still stands
    shown = text(hand.module(hand.call(LINEAR, hand.input("x", 2, 8), weight, note=Note(("lin",)))))
    assert "  @lin_codes: f32[8, 8]\n" in shown
    assert "aten.linear(%x, @lin_codes)" in shown


@pytest.mark.parametrize(
    ("dtype", "word"),
    [
        (torch.float32, "f32"), (torch.bfloat16, "bf16"), (torch.float16, "f16"), (torch.float64, "f64"),
        (torch.int8, "i8"), (torch.uint8, "u8"), (torch.int64, "i64"), (torch.bool, "bool"),
        (torch.complex64, "c64"), (torch.float8_e4m3fn, "f8e4m3fn"),
    ],
)  # fmt: skip
def test_types_name_the_dtype_in_short(dtype: torch.dtype, word: str) -> None:
    assert type_text(torch.empty(2, 3, dtype=dtype)) == f"{word}[2, 3]"


def test_types_of_scalars_tuples_and_nothing() -> None:
    assert type_text((torch.empty(2), None, [torch.empty(())])) == "(f32[2], None, (f32[]))"
    assert type_text(3) == "int"
    assert type_text(None) == ""


def test_symbolic_sizes_are_words() -> None:
    env = ShapeEnv()
    mode = torch._subclasses.FakeTensorMode(shape_env=env)
    x = mode.from_tensor(torch.empty(4, 64, dtype=torch.float16), static_shapes=False)
    assert re.fullmatch(r"f16\[s\d+, s\d+\]", type_text(x))
    assert re.fullmatch(r"Sym\(s\d+\)", type_text(x.shape[0]))
    assert re.fullmatch(r"f16\[2\*s\d+, s\d+\]", type_text(torch.cat([x, x])))


def test_arguments_of_every_kind_are_readable() -> None:
    hand = Hand()
    x = hand.input("x", 4, 8)
    out = hand.call(aten.clone.default, x, memory_format=torch.contiguous_format)
    out = hand.call(aten._to_copy.default, out, dtype=torch.float16)
    index: Any = (slice(None, 2), slice(1, None, 3), None, Ellipsis)
    picked = hand.graph.call_function(torch.Tensor.__getitem__, (out, index))
    gm = hand.module(picked)
    shown = text(gm)
    assert "%clone: f32[4, 8] = aten.clone(%x, memory_format=contiguous_format)" in shown
    assert "aten._to_copy(%clone, dtype=f16)" in shown
    assert "%__getitem__ = __getitem__(%_to_copy, (:2, 1::3, None, Ellipsis))" in shown


def test_inner_graphs_are_printed_after_their_outer_one() -> None:
    inner = Hand()
    body = inner.module(inner.call(aten.relu.default, inner.input("y", 2)))
    hand = Hand()
    x = hand.input("x", 2)
    branch = hand.graph.create_node("get_attr", "true_graph_0")
    hand.graph.output(hand.graph.call_function(torch.cond, (x, branch)))
    shown = text(GraphModule({"true_graph_0": body}, hand.graph))
    assert "  @true_graph_0: graph\n" in shown
    assert shown.endswith("graph true_graph_0(%y: f32[2]) {\n  %relu: f32[2] = aten.relu(%y)\n  return (%relu,)\n}\n")


def test_dot_shows_sites_and_what_stands_between(golden: Golden) -> None:
    golden("sites.dot", dot(lowered_model()))


def test_dot_leaves_out_edges_that_follow_from_others() -> None:
    hand = Hand()
    x = hand.input("x", 4, 8)
    for i in range(3):  # a residual stream: every block feeds all later ones
        x = hand.call(
            aten.add.Tensor, x, hand.call(LINEAR, x, hand.weight(f"w{i}", 8, 8), note=Note((f"b.{i}",), INT8))
        )
    drawn = dot(hand.module(x))
    assert re.findall(r'"(\w+)" -> "(\w+)"', drawn) == [("linear", "linear_1"), ("linear_1", "linear_2")]


def test_dot_escapes_quotes() -> None:
    hand = Hand()
    x = hand.call(LINEAR, hand.input("x", 4, 8), hand.weight("w", 8, 8), note=Note(('say "w"',), INT8))
    assert r'label="say \"w\"\nw=int8/channel' in dot(hand.module(x))


def _dump(directory: Path) -> tuple[Dumper, Path]:
    dumper = Dumper(directory)
    captured = captured_model()
    dumper("capture", captured.gm, None)
    dumper("annotate", captured.gm, None)
    lowered = lowered_model()
    dumper("lower", lowered, None)
    dumper.finish(GraphReport.of("any", captured, lowered, {}))
    assert dumper.folder is not None
    return dumper, dumper.folder


def test_a_dump_folder_tells_the_story_in_order(tmp_path: Path) -> None:
    _, folder = _dump(tmp_path / "new" / "dump")
    assert folder == tmp_path / "new" / "dump" / "graph_000"
    assert sorted(os.listdir(folder)) == [
        "00-summary.txt", "01-capture.txt", "02-annotate.diff", "02-annotate.txt", "03-lower.diff", "03-lower.txt",
        "04-lowered.py", "report.json", "sites.dot",
    ]  # fmt: skip
    assert (folder / "00-summary.txt").read_text().startswith("graph_000: 6 linears: 3 lowered")
    assert (folder / "03-lower.txt").read_text() == text(lowered_model(), "03-lower")
    assert (folder / "02-annotate.diff").read_text() == ""
    diff = (folder / "03-lower.diff").read_text()
    assert diff.startswith("--- 02-annotate\n+++ 03-lower\n")
    assert "+  @layers_0_attn_packed: i8[192]" in diff
    assert json.loads((folder / "report.json").read_text())["name"] == "graph_000"
    assert (folder / "sites.dot").read_text() == dot(lowered_model())


def test_the_lowered_graph_reads_as_python(tmp_path: Path) -> None:
    _, folder = _dump(tmp_path)
    source = (folder / "04-lowered.py").read_text()
    tree = ast.parse(source)
    assert any(isinstance(node, ast.FunctionDef) and node.name == "forward" for node in ast.walk(tree))
    assert "torch.ops.fxquant.int8_linear_dynamic.default" in source


def test_no_two_graphs_share_a_folder(tmp_path: Path) -> None:
    assert [_dump(tmp_path)[1] for _ in range(2)] == [tmp_path / "graph_000", tmp_path / "graph_001"]
    one = Dumper(tmp_path)
    for _ in range(2):
        one("capture", captured_model().gm, None)
        one("lower", lowered_model(), None)
    assert one.folder == tmp_path / "graph_003"
    assert sorted(os.listdir(tmp_path / "graph_002")) == sorted(os.listdir(tmp_path / "graph_003"))


def test_dumpers_that_run_at_once_get_different_folders(tmp_path: Path) -> None:
    gm = captured_model().gm
    dumpers = [Dumper(tmp_path) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda dumper: dumper("capture", gm, None), dumpers))
    assert {dumper.folder for dumper in dumpers} == {tmp_path / f"graph_{n:03d}" for n in range(8)}


def test_a_directory_that_cannot_be_made_is_a_named_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DumpFailed, match=r"cannot write the dump to '.*file': File exists\. Give options=") as caught:
        Dumper(tmp_path / "file")("capture", captured_model().gm, None)
    assert isinstance(caught.value, FxQuantError)
    assert isinstance(caught.value, OSError)
    with pytest.raises(DumpFailed, match="Not a directory"):
        Dumper(tmp_path / "file" / "below")("capture", captured_model().gm, None)


def test_a_folder_that_is_gone_is_a_named_error(tmp_path: Path) -> None:
    dumper = Dumper(tmp_path)
    dumper("capture", captured_model().gm, None)
    assert dumper.folder is not None
    dumper.folder.rename(tmp_path / "moved")
    with pytest.raises(DumpFailed, match=r"graph_000/02-lower\.txt': No such file or directory"):
        dumper("lower", lowered_model(), None)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "a.txt", "old")

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "a.txt", "new")
    assert os.listdir(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_measured_numbers_reach_the_last_stage_and_the_summary(tmp_path: Path) -> None:
    dumper, folder = _dump(tmp_path)
    dumper.measured({"int8_linear_dynamic": SiteSqnr(41.27, 45.0), "linear": SiteSqnr(12.5)})
    assert "kernel=int8_linear_dynamic, sqnr=41.3dB, weight=45.0dB}" in (folder / "03-lower.txt").read_text()
    assert "sqnr" not in (folder / "01-capture.txt").read_text()
    assert "lowest sqnr\n  layers.0.o " in (folder / "00-summary.txt").read_text()
    sites = json.loads((folder / "report.json").read_text())["sites"]
    assert [site["sqnr"] for site in sites] == [None, 41.27, 12.5, None, None]
    assert [site["weight_sqnr"] for site in sites] == [None, 45.0, None, None, None]


def test_sqnr_in_decibel() -> None:
    assert sqnr(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])) == pytest.approx(20.0, abs=1e-12)  # 25 / 0.25
    assert sqnr(torch.ones(3), torch.ones(3)) == math.inf
    assert sqnr(torch.zeros(3), torch.ones(3)) == -math.inf
    assert math.isnan(sqnr(torch.ones(2), torch.tensor([1.0, math.nan])))
    big = torch.full((4,), 1e30)  # squares overflow in float32
    assert sqnr(big, big * 0.5) == pytest.approx(20 * math.log10(2), abs=1e-5)


def _siblings(*, joined: bool) -> tuple[GraphModule, dict[str, torch.Tensor]]:
    """a and b read x, c reads a + b; joined: one wide linear whose weight is rounded to quarters."""
    hand = Hand()
    x = hand.input("x", 4, 8)
    a, b, c = (hand.weight(name, *shape) for name, shape in {"a": (8, 8), "b": (8, 8), "c": (3, 8)}.items())
    if not joined:
        one, two = hand.call(LINEAR, x, a, note=Note(("a",), INT8)), hand.call(LINEAR, x, b, note=Note(("b",), INT8))
    else:
        wide = torch.cat([hand.tensors["a"], hand.tensors["b"]])
        weight = hand.weight("ab", tensor=(wide * 4).round() / 4)
        both = hand.call(LINEAR, x, weight, note=Note(("a", "b"), INT8, made_by=("fuse-siblings",)))
        one, two = hand.call(aten.slice.Tensor, both, 1, 0, 8), hand.call(aten.slice.Tensor, both, 1, 8, 16)
    out = hand.call(LINEAR, hand.call(aten.add_.Tensor, one, two), c, note=Note(("c",), INT8))
    return hand.module(out), hand.tensors


def test_sqnr_of_joined_siblings_is_over_their_concatenation() -> None:
    captured, weights = _siblings(joined=False)
    quantized, rounded = _siblings(joined=True)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    measured = measure_sqnr(captured, quantized, [x])
    exact = torch.cat([x @ weights["a"].T, x @ weights["b"].T], -1)
    # The outputs are float32 sums of eight products; 1e-3 dB is far above their rounding at this level of noise.
    assert measured["linear"].output == pytest.approx(sqnr(exact, x @ rounded["ab"].T), abs=1e-3)
    c = weights["c"]
    got = (x @ rounded["ab"].T).split(8, -1)
    assert measured["linear_1"].output == pytest.approx(
        sqnr((exact[:, :8] + exact[:, 8:]) @ c.T, (got[0] + got[1]) @ c.T), abs=1e-3
    )


def test_sqnr_is_of_quantized_sites_with_a_counterpart() -> None:
    captured, _ = _siblings(joined=False)
    quantized, _ = _siblings(joined=True)
    first, last = (n for n in quantized.graph.nodes if n.target is LINEAR)
    amend_note(first, paths=("elsewhere",))
    assert list(measure_sqnr(captured, quantized, [torch.ones(4, 8)])) == [last.name]
    amend_note(last, spec=None)
    assert measure_sqnr(captured, quantized, [torch.ones(4, 8)]) == {}


def test_sqnr_of_a_graph_that_takes_packed_weights() -> None:
    hand = Hand()
    x = hand.input("x", 4, 8)
    captured = hand.module(hand.call(LINEAR, x, hand.weight("w", 8, 8), note=Note(("lin",), INT8)))
    codes, scale, *_ = torch.ops.fxquant.quantize_weight(hand.tensors["w"], "int8/channel")
    low = Hand()
    x = low.input("x", 4, 8)
    packed, factors = low.input("codes", 8, 8, dtype=torch.int8), low.input("scale", 8, 1)
    w = low.call(DEQUANTIZE, packed, factors, None, "int8/channel", torch.float32)
    lowered = low.module(low.call(LINEAR, x, w, note=Note(("lin",), INT8)))
    batch = torch.randn(4, 8, generator=torch.Generator().manual_seed(2))
    measured = measure_sqnr(captured, lowered, [batch], [batch, codes, scale])
    # Codes are off by at most half a step of amax/127, so each weight by at most 1/254 of its row's largest one.
    error = nn.functional.linear(batch, codes.float() * scale) - nn.functional.linear(batch, hand.tensors["w"])
    assert measured["linear"].output == pytest.approx(
        -10 * math.log10(float(error.square().sum() / (batch @ hand.tensors["w"].T).square().sum())), abs=1e-2
    )
    assert measured["linear"].output is not None
    assert measured["linear"].output > 40
    decoded = codes.float() * scale
    assert measured["linear"].weight == pytest.approx(sqnr(hand.tensors["w"], decoded), abs=1e-3)


@pytest.mark.parametrize("activation", ["", "silu"])
def test_sqnr_is_of_the_product_without_what_was_fused_into_it(activation: str) -> None:
    hand, low = Hand(), Hand()
    captured = hand.module(hand.call(LINEAR, hand.input("x", 4, 8), hand.weight("w", 8, 8), note=Note(("lin",), INT8)))
    codes, scale, *_ = torch.ops.fxquant.quantize_weight(hand.tensors["w"], "int8/channel")
    x, residual = low.input("x", 4, 8), low.input("residual", 4, 8)
    operands = (x, low.input("packed", 64, dtype=torch.int8), low.input("scale", 8, 1), None, 8)
    site = low.call(INT8_LINEAR, *operands, 0, residual, activation, note=Note(("lin",), INT8))
    lowered = low.module(site)
    batch = torch.randn(4, 8, generator=torch.Generator().manual_seed(3))
    packed = torch.ops.fxquant.int8_pack(codes)
    measured = measure_sqnr(captured, lowered, [batch], [batch, torch.ones(4, 8), packed, scale])
    plain = torch.ops.fxquant.int8_linear_weight_only(batch, packed, scale, None, 8)
    assert measured[site.name].output == sqnr(batch @ hand.tensors["w"].T, plain)
