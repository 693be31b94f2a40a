"""Reports: what they count, what they name, and how they read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.fx import Graph, GraphModule

from fxquant.annotation import Declined, Note, PassResult, amend_note, note_of
from fxquant.graphs import CapturedGraph
from fxquant.products import TWO_ACTIVATIONS
from fxquant.report import (
    GraphReport,
    ModelReport,
    ParameterFacts,
    Site,
    SiteSqnr,
    parameter_facts,
    site_graph,
    snapshot,
)
from fxquant.report.records import stable_text
from fxquant.report.summary import folded_names, size_text
from fxquant.report.walk import is_kernel, op_of, status_of
from fxquant.spec import QuantConfig, linear_spec
from tests.handmade import EMBEDDING, INT8, KERNEL, LINEAR, QKV, Hand, aten, captured_model, lowered_model

RESULTS = {
    "annotate": PassResult(4, [Declined("layers.0.down", 'rule "*.down=none"', "linear_4")]),
    "fuse-siblings": PassResult(
        1, [Declined("layers.0.{gate,up}", "some of the linears have a bias and some have none")]
    ),
    "share-quantize": PassResult(0, []),
}


def _report() -> GraphReport:
    missed = Declined("lower/int8_linear", "got as far as dequantize(x): scale is f16, the rule wants f32", "linear_7")
    return GraphReport.of("graph_000", captured_model(), lowered_model(), RESULTS, [missed], seconds={"capture": 0.5})


def _by_path(report: GraphReport) -> dict[str, Site]:
    return {site.path: site for site in report.sites}


def _facts(**sizes: int) -> dict[str, ParameterFacts]:
    return {name: ParameterFacts(number, size, 2) for number, (name, size) in enumerate(sizes.items())}


def test_each_site_says_what_became_of_it() -> None:
    sites = _by_path(_report())
    assert {path: site.status for path, site in sites.items()} == {
        "embed": "skipped",
        "layers.0.attn.{q,k,v}_proj": "lowered",
        "layers.0.o": "reference",
        "layers.0.down": "skipped",
        "head": "declined",
    }
    joined = sites["layers.0.attn.{q,k,v}_proj"]
    assert joined.paths == QKV
    assert joined.members == 3
    assert joined.kernel == "int8_linear_dynamic"
    assert joined.spec_text == "w=int8/channel x=int8/token"
    assert joined.source == "model.py:41"
    assert joined.reason == ""
    assert sites["layers.0.o"].reason.startswith("runs as dequantize + linear")
    assert sites["embed"].op == "embedding"


def test_a_site_knows_its_parameters_and_bytes_before_and_after() -> None:
    sites = _by_path(_report())
    joined = sites["layers.0.attn.{q,k,v}_proj"]
    assert joined.parameter_names == tuple(f"{path}.weight" for path in QKV)
    assert joined.bytes_before == 3 * 8 * 8 * 4
    assert joined.bytes_after == 24 * 8 + 24 * 4  # packed int8 and the scales
    assert sites["layers.0.o"].bytes_before == 8 * 8 * 4
    assert sites["layers.0.o"].bytes_after == 8 * 8 + 8 * 4
    down = sites["layers.0.down"]
    assert down.parameter_names == ("layers.0.down.weight", "layers.0.down.bias")
    assert down.bytes_before == down.bytes_after == (8 * 8 + 8) * 4
    assert sites["head"].parameter_names == ("embed.weight", "head.weight")


def test_totals_count_a_tied_weight_once() -> None:
    report = _report()
    table, down = 10 * 8 * 4, (8 * 8 + 8) * 4
    assert report.bytes_before == table + 4 * 8 * 8 * 4 + down
    assert report.bytes_after == table + (192 + 96) + (64 + 32) + down
    assert report.counts == {"lowered": 3, "reference": 1, "skipped": 2, "declined": 1}
    assert report.counts_of("linear") == {"lowered": 3, "reference": 1, "skipped": 1, "declined": 1}
    assert report.counts_of("conv") == {}


def test_a_snapshot_outlives_the_passes_that_edit_the_graph_in_place() -> None:
    captured = captured_model()
    before = snapshot(captured)
    for node in list(captured.gm.graph.nodes):
        node.meta.clear()
    for name in before.weights:
        delattr(captured.gm, name)
    assert GraphReport.of("graph_000", before, lowered_model(), RESULTS).sites == _report().sites


def test_parameters_are_found_by_path_if_the_captured_product_is_gone() -> None:
    before = replace(snapshot(captured_model()), sites=())
    joined = _by_path(GraphReport.of("g", before, lowered_model(), {}))["layers.0.attn.{q,k,v}_proj"]
    assert joined.parameter_names == tuple(f"{path}.weight" for path in QKV)


def _twice(*, lowered: bool) -> tuple[Hand, CapturedGraph]:
    """One linear called twice: on its input, then on its own output."""
    hand = Hand()
    x = hand.input("x", 4, 8)
    if lowered:
        note = Note(("shared",), INT8, kernel="int8_linear_dynamic")
        packed, scale = (
            hand.input("w_packed", 8 * 8, dtype=torch.int8, note=note),
            hand.input("w_scale", 8, 1, note=note),
        )
        for _ in range(2):
            x = hand.call(KERNEL, x, packed, scale, None, 8, note=note)
    else:
        w = hand.weight("shared_weight", 8, 8)
        for _ in range(2):
            x = hand.call(LINEAR, x, w, note=Note(("shared",)))
    gm = hand.module(x)
    return hand, hand.captured(gm, {"shared_weight": ("shared.weight",)})


def test_a_module_called_twice_is_two_sites_and_one_weight() -> None:
    report = GraphReport.of("g", _twice(lowered=False)[1], _twice(lowered=True)[1].gm, {})
    assert [(site.members, site.bytes_before) for site in report.sites] == [(1, 256), (1, 256)]
    assert report.bytes_before == 256
    assert report.bytes_after == 64 + 32


def test_products_of_one_module_belong_to_their_own_sites() -> None:
    def build(names: tuple[str, ...]) -> tuple[Hand, list]:
        hand = Hand()
        x = hand.input("x", 4, 8)
        return hand, [hand.call(LINEAR, x, hand.weight(name, 8, 8), note=Note(("attn",), INT8)) for name in names]

    hand, made = build(("w_in", "w_out"))
    captured = hand.captured(hand.module(*made))
    report = GraphReport.of("g", captured, captured.gm, {})
    assert [site.parameter_names for site in report.sites] == [("w_in",), ("w_out",)]

    joined, wide = build(("w_both",))
    report = GraphReport.of("g", captured, joined.module(*wide), {})
    assert [(site.parameter_names, site.members) for site in report.sites] == [(("w_in", "w_out"), 2)]


@pytest.mark.parametrize(
    ("note", "status"),
    [
        (Note(reason='rule "head=none"'), "skipped"),
        (Note(reason='exclude "head"'), "skipped"),
        (Note(reason="not in include"), "skipped"),
        (Note(reason="default"), "skipped"),
        (Note(reason="quantized would be slower than float at 4 rows"), "float"),
        (Note(reason="the weight has 3 dimensions, a linear wants 2"), "declined"),
        (Note(spec=INT8, reason="default"), "reference"),
    ],
)
def test_status_of_a_linear(note: Note, status: str) -> None:
    hand = Hand()
    node = hand.call(LINEAR, hand.input("x", 2, 8), hand.weight("w", 8, 8), note=note)
    assert status_of(node) == status


def test_a_matrix_that_no_site_reads_is_named_with_its_reader() -> None:
    hand = Hand()
    image, kernel, vector = hand.input("x", 1, 3, 8, 8), hand.weight("stem_weight", 4, 3, 3, 3), hand.weight("gain", 8)
    hand.weight("idle", 2, 2)
    out = hand.call(aten.mul.Tensor, hand.call(aten.conv2d.default, image, kernel), 2)
    captured = hand.captured(hand.module(out, hand.call(aten.mul.Tensor, vector, 2)))
    report = GraphReport.of("g", captured, captured.gm, {})
    assert [(row.name, row.bytes, row.reason) for row in report.others] == [
        ("stem_weight", 432, "read by aten.conv2d, which is no product that is quantized"),
        ("idle", 16, "nothing in the graph reads it"),
    ]
    assert "no linears, convolutions or embeddings." in str(report)


def test_a_constant_that_is_no_weight_of_the_model_counts_for_nothing() -> None:
    hand = Hand()
    w = hand.weight("w", 8, 8)
    lifted = hand.graph.create_node("get_attr", "lifted")
    lifted.meta["val"] = hand.mode.from_tensor(torch.ones(8, 8))
    site = hand.call(LINEAR, hand.input("x", 2, 8), hand.call(aten.mul.Tensor, w, lifted), note=Note(("lin",)))
    hand.graph.output(site)
    gm = GraphModule({**hand.tensors, "lifted": torch.ones(8, 8)}, hand.graph)
    (row,) = GraphReport.of("g", hand.captured(gm), gm, {}).sites
    assert (row.parameter_names, row.bytes_before) == (("w",), 256)


def test_nodes_that_passes_made_for_a_site_get_no_row() -> None:
    made = [n.name for n in lowered_model().graph.nodes if note_of(n).made_by and note_of(n).reason == "default"]
    assert "split_with_sizes" in made
    assert all(site.node not in made[1:] for site in _report().sites if site.op != "linear")
    assert len(_report().sites) == 5


def test_coverage_is_by_bytes_of_matrices() -> None:
    facts = {
        "embed.weight": ParameterFacts(1, 320, 2),
        "head.weight": ParameterFacts(1, 320, 2),
        **{f"{path}.weight": ParameterFacts(10 + i, 256, 2) for i, path in enumerate(QKV)},
        "layers.0.o.weight": ParameterFacts(20, 256, 2),
        "layers.0.down.weight": ParameterFacts(21, 256, 2),
        "layers.0.down.bias": ParameterFacts(22, 32, 1),
        "lost.weight": ParameterFacts(23, 512, 2),
        "steps": ParameterFacts(24, 4096, 2, is_float=False),
    }
    report = ModelReport.of_model(facts, [_report()])
    assert report.matrix_bytes == 320 + 5 * 256 + 512
    assert report.quantized_bytes == 4 * 256
    assert report.coverage == report.quantized_bytes / report.matrix_bytes
    assert [(row.name, row.bytes, row.reason) for row in report.uncovered] == [
        ("lost.weight", 512, "never seen by Dynamo"),
        ("embed.weight = head.weight", 320, EMBEDDING),
        ("layers.0.down.weight", 256, 'rule "*.down=none"'),
    ]


def test_a_tied_weight_that_one_reader_quantizes_is_covered_once() -> None:
    head = Site(("head",), "lowered", parameter_names=("embed.weight", "head.weight"))
    table = Site(
        ("embed",), "declined", reason=EMBEDDING, parameter_names=("embed.weight", "head.weight"), op="embedding"
    )
    facts = {name: ParameterFacts(1, 320, 2) for name in ("embed.weight", "head.weight")}
    for sites in ((head, table), (table, head)):
        report = ModelReport.of_model(facts, [GraphReport("g", sites)])
        assert (report.coverage, report.matrix_bytes, report.uncovered) == (1.0, 320, ())
        apart = [GraphReport("g", (site,)) for site in sites]  # a graph break between the two
        assert ModelReport.of_model(facts, apart).coverage == 1.0


def test_a_module_in_eager_is_covered_and_named() -> None:
    why = "never seen by Dynamo: torch.compiler.disable at model.py:88"
    eager = Site(("stem",), "fallback", reason=why, parameter_names=("stem.weight",))
    report = ModelReport.of_model(_facts(**{"stem.weight": 100, "x.weight": 300}), [], [eager])
    assert report.coverage == 0.25
    assert f"  fallback   stem  {why}" in str(report).splitlines()
    assert report.uncovered[0].reason == "nothing was captured yet: call the model first"
    assert report.sites == (eager,)


def test_one_graph_covers_every_parameter_set_that_it_serves() -> None:
    site = Site(("0.lin",), "lowered", parameter_names=("0.lin.weight",))
    table = Site(("0.table",), "declined", reason="no", parameter_names=("0.table",), op="lstm")
    graph = GraphReport("g", (site, table)).serving([{"0.lin.weight": "1.lin.weight", "0.table": "1.table"}])
    report = ModelReport.of_model(_facts(**{"0.lin.weight": 4, "1.lin.weight": 4, "0.table": 1, "1.table": 1}), [graph])
    assert report.coverage == 0.8
    assert [(row.name, row.reason) for row in report.uncovered] == [
        ("0.table", "lstm: no"),
        ("1.table", "lstm: no"),
    ]
    assert "serves 2 parameter sets" in str(report)


def test_a_model_without_matrices_is_covered() -> None:
    assert ModelReport.of_model({}, []).coverage == 1.0


def test_parameter_facts_know_tied_names() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(2, 3, bias=False)})
    model["b"].weight = model["a"].weight
    facts = parameter_facts(model)
    assert set(facts) == {"a.weight", "a.bias", "b.weight"}
    assert facts["a.weight"].identity == facts["b.weight"].identity != facts["a.bias"].identity
    assert (facts["a.weight"].bytes, facts["a.weight"].is_matrix, facts["a.bias"].is_matrix) == (24, True, False)


def test_the_bare_door_says_what_it_cannot_know() -> None:
    report = ModelReport.of_graphs([_report()])
    assert report.coverage is None
    for words in (
        "sees graphs only",
        "fxquant.compile(model, config)",
        "fxquant.explain(model, *args)",
        "graph_000: 6 linears: 3 lowered, 1 reference, 1 skipped, 1 declined. 1 embedding: 1 skipped.",
    ):
        assert words in str(report)


def test_the_summaries_read_as_drawn(golden: Callable[[str, str], None]) -> None:
    graph = replace(_report(), break_reason="graph break in user code at model.py:88")
    facts = _facts(**{f"{path}.weight": 256 for path in QKV}, **{f"blocks.{i}.conv": 1000 for i in (0, 1, 2, 5)})
    golden("summary_graph.txt", f"{graph}\n")
    golden("summary_model.txt", f"{ModelReport.of_model(facts, [graph])}\n")


def test_a_reason_already_told_is_not_told_again() -> None:
    report = _report()
    assert "annotate" in report.declined
    assert "share-quantize" not in report.declined
    assert str(report).count('rule "*.down=none"') == 1


MEASURED = {"int8_linear_dynamic": SiteSqnr(float("inf"), 50.0), "linear": SiteSqnr(41.25)}


def test_reports_are_json() -> None:
    report = ModelReport.of_model({}, [_report().with_sqnr(MEASURED)])
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    first = data["graphs"][0]
    assert first["seconds"] == {"capture": 0.5}
    assert first["declined"]["fuse-siblings"][0]["where"] == "layers.0.{gate,up}"
    assert [site["sqnr"] for site in first["sites"]] == [None, "inf", 41.25, None, None]
    assert [site["weight_sqnr"] for site in first["sites"]] == [None, 50.0, None, None, None]
    assert [site["algorithm"] for site in first["sites"]] == ["", "absmax", "absmax", "", ""]
    assert first["sites"][1]["paths"] == list(QKV)


def test_the_worst_sites_are_listed() -> None:
    text = str(_report().with_sqnr({"int8_linear_dynamic": SiteSqnr(41.26), "linear": SiteSqnr(12.0)}))
    assert text.endswith("lowest sqnr\n  layers.0.o                  12.0dB\n  layers.0.attn.{q,k,v}_proj  41.3dB")


def test_site_graph_connects_sites_through_other_nodes() -> None:
    graph = site_graph(lowered_model())
    assert sorted(graph.edges) == [
        ("embedding", "int8_linear_dynamic"),
        ("int8_linear_dynamic", "linear"),
        ("linear", "linear_1"),
        ("linear_1", "linear_2"),
    ]
    assert graph.nodes["int8_linear_dynamic"] == {
        "path": "layers.0.attn.{q,k,v}_proj",
        "op": "linear",
        "status": "lowered",
        "spec": "w=int8/channel x=int8/token",
        "kernel": "int8_linear_dynamic",
    }


def _mixed() -> CapturedGraph:
    """A convolution on a kernel, one whose weight a kernel makes, an embedding on a kernel, attention's product."""
    fx, hand = torch.ops.fxquant, Hand()
    image, ids = hand.input("x", 1, 4, 8, 8), hand.input("ids", 8, dtype=torch.int64)
    geometry = ([1, 1], [0, 0], [1, 1])
    spec, table = linear_spec("w=int4/group32/affine algorithm=hqq"), linear_spec("w=int8/channel")
    note = Note(("stem",), spec, kernel="decode_weight")
    by_lower = Note(("stem",), spec, made_by=("lower",))
    matrix = hand.call(aten.view.default, hand.weight("stem_packed", 4, 36), [4, 4, 3, 3], note=by_lower)
    y = hand.call(aten.convolution.default, image, matrix, None, *geometry, False, [0, 0], 1, note=note)
    y = hand.call(aten.convolution.default, y, hand.weight("plain", 4, 4, 3, 3), None, *geometry, False, [0, 0], 1,
                  note=Note(("plain",), reason='rule "plain=none"'))  # fmt: skip
    rows, scale = hand.weight("rows", tensor=torch.zeros(9, 8, dtype=torch.uint8)), hand.weight("scale", 9, 1)
    e = hand.call(fx.embedding_dequantize.default, ids, rows, scale, None, None, 8, "int8/channel", torch.float32,
                  note=Note(("table",), table, kernel="embedding_dequantize"))  # fmt: skip
    attention = Note(("attn",), reason=TWO_ACTIVATIONS, made_by=("capture",))
    return hand.captured(hand.module(y, hand.call(aten.matmul.default, e, e, note=attention)))


def test_convolutions_embeddings_and_products_of_activations_have_rows() -> None:
    captured = _mixed()
    report = GraphReport.of("g", captured, captured.gm, {})
    rows = {site.path: (site.op, site.status, site.kernel, site.algorithm) for site in report.sites}
    assert rows == {
        "stem": ("conv", "lowered", "decode_weight", "hqq"),
        "plain": ("conv", "skipped", "", ""),
        "table": ("embedding", "lowered", "embedding_dequantize", "absmax"),
        "attn": ("matmul", "float", "", ""),
    }
    text = str(report)
    headline = "2 convolutions: 1 lowered, 1 skipped. 1 embedding: 1 lowered. 1 product of two activations."
    assert headline in text
    assert "  stem   conv       w=int4/group32/affine  hqq     576 B -> 576 B" in text
    assert "  float      attn   matmul: a product of two activations: stays float" in text


@pytest.mark.parametrize(
    ("target", "op"),
    [
        ("int8_linear", "linear"), ("int8_linear_dynamic", "linear"), ("int8_linear_weight_only", "linear"),
        ("linear_weight_only", "linear"), ("linear_dynamic", "linear"), ("conv_weight_only", "conv"),
        ("int8_conv_dynamic", "conv"), ("embedding_dequantize", "embedding"), ("fake_quantize", ""),
        ("decode_weight", ""), ("pack_panels", ""), ("quantize_weight", ""),
    ],
)  # fmt: skip
def test_kernels_are_known_by_their_name(target: str, op: str) -> None:
    graph = Graph()
    node = graph.call_function(getattr(torch.ops.fxquant, target).default, (graph.placeholder("x"),))
    assert is_kernel(node) is bool(op)
    assert not op or op_of(node) == op


@pytest.mark.parametrize("config", [QuantConfig("mxfp8"), QuantConfig(rules={"stem": "mxfp8"})])
def test_a_lowered_site_says_what_its_kind_cannot_have(config: QuantConfig) -> None:
    captured = _mixed()
    (stem, _) = captured.gm.graph.find_nodes(op="call_function", target=aten.convolution.default)
    spec, reason = config.spec_for("stem", "conv")
    amend_note(stem, spec=spec, reason=reason)
    report = GraphReport.of("g", captured, captured.gm, {})
    why = "a convolution has no groups of features, so weights only, no x=float8_e4m3fn/group32/e8m0"
    assert (report.sites[0].status, report.sites[0].reason) == ("lowered", why)
    assert f"             1 site: {why}\n" in str(report)


def test_what_several_modules_read_is_said() -> None:
    names = ("embed.weight", "head.weight")
    table = Site(("embed",), "lowered", "w=int8/channel", parameter_names=names, op="embedding")
    head = Site(("head",), "lowered", "w=int4/group32", parameter_names=(*names, "head.bias"))
    line = "  embed.weight = head.weight  read by embed (embedding, w=int8/channel), head (linear, w=int4/group32)"
    assert line in str(GraphReport("g", (table, head))).splitlines()
    assert "shared weights" not in str(GraphReport("g", (head, head)))  # a module that is called twice


def test_words_differ_in_nothing_that_is_of_one_run() -> None:
    text = 'File "/home/me/model.py", line 3: <object at 0x7f3a2c10> / 2, see https://pytorch.org/docs and a/b'
    assert stable_text(text) == 'File "model.py", line 3: <object at 0x…> / 2, see https://pytorch.org/docs and a/b'


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        (["layers.0.down", "layers.1.down", "layers.2.down", "layers.5.down"], ["layers.{0-2,5}.down"]),
        (["0", "2"], ["{0,2}"]),
        (["a.0.b.1", "a.1.b.2"], ["a.0.b.1", "a.1.b.2"]),
        (["a.3.b", "x", "a.4.{q,k}"], ["a.3.b", "x", "a.4.{q,k}"]),
        (["a.1", "a.1"], ["a.1", "a.1"]),
        (["fc1", "fc2"], ["fc1", "fc2"]),
    ],
)
def test_names_that_differ_in_one_number_fold(names: list[str], folded: list[str]) -> None:
    assert folded_names(names) == folded


@given(st.sets(st.integers(0, 40), min_size=2))
def test_a_folded_name_holds_every_number(numbers: set[int]) -> None:
    (name,) = folded_names([f"layers.{n}.{{q,k}}" for n in numbers])
    inner = name.removeprefix("layers.{").removesuffix("}.{q,k}")
    spans = [tuple(map(int, part.split("-"))) for part in inner.split(",")]
    assert {n for span in spans for n in range(span[0], span[-1] + 1)} == numbers


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (412_000_000, "412.0 MB"),
        (2_500_000_000, "2.5 GB"),
        (10**13, "10000.0 GB"),
    ],
)
def test_sizes_read_in_decimal_units(count: int, text: str) -> None:
    assert size_text(count) == text
