"""The page that reads straight down: order of the stages, what is shown, what is refused, and whole dumps."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.annotation import PassResult, note_of
from fxquant.dump import Dumper
from fxquant.errors import FxQuantError, PassFailed, UnloweredSite
from fxquant.graphs import CapturedGraph
from fxquant.passes import Annotate, Pass, run_passes
from fxquant.pipeline import pipeline_for, quantize_graph
from fxquant.runner import Deciding
from fxquant.spec import QuantConfig
from fxquant.target import Target
from tests.helpers import capture, through_capture
from tests.lowering.helpers import CPU, NO_KERNEL, targets
from tests.models import AttentionBlock, DecoderLayer, GatedMlp
from tests.passes.helpers import Linears, X

SLOW_TARGETS = [Target("cuda"), Target("cpu", has_kernels=True)]
STAGES = ["capture", "annotate", "fuse-siblings", "insert-qdq", "share-quantize", "fold-weights"]
STAGES += ["fuse-gates", "fuse-prologues", "fuse-epilogues", "fuse-rotary", "fuse-attention", "share-operands", "lower"]


def pair(m: Any, x: Tensor) -> Tensor:
    return m.a(x) * m.b(x)


def lowered(captured: CapturedGraph, config: QuantConfig | str = "int8dq", **options: Any) -> Any:
    config = QuantConfig(config) if isinstance(config, str) else config
    options.setdefault("target", CPU)
    return quantize_graph(captured, config, Deciding(config), **options)


def test_every_stage_is_shown_in_order_with_what_it_did() -> None:
    seen: list[tuple[str, GraphModule, PassResult | None]] = []
    captured = capture(Linears(pair), X)
    result = lowered(captured, observe=lambda *stage: seen.append(stage))
    assert [stage for stage, _, _ in seen] == STAGES
    assert all(gm is captured.gm is result.gm for _, gm, _ in seen)
    assert [r if r is None else r.changed for _, _, r in seen] == [None, 2, 1, 1, 0, 1, 0, 0, 0, 0, 0, 0, 1]
    assert list(result.report.seconds) == STAGES


def test_without_fusing_siblings_share_their_codes() -> None:
    stages: list[str] = []
    result = lowered(
        capture(Linears(pair), X),
        QuantConfig("int8dq", fuse=False),
        observe=lambda stage, gm, r: stages.append(stage),
    )
    assert stages == [stage for stage in STAGES if not stage.startswith("fuse-") and stage != "share-operands"]
    assert targets(result.gm) == ["int8_quantize_per_token", "int8_linear", "int8_linear"]


def test_the_captured_graph_survives_if_a_copy_is_given() -> None:
    captured = capture(Linears(pair), X)
    before = str(captured.gm.graph)
    wanted = captured.gm(X)
    lowered(captured.copy())
    assert str(captured.gm.graph) == before
    torch.testing.assert_close(captured.gm(X), wanted, rtol=0, atol=0)


def test_a_graph_without_a_product_comes_out_as_it_went_in() -> None:
    captured = capture(lambda x: torch.relu(x) + 1, X)
    before = [str(n.target) for n in captured.gm.graph.nodes]
    result = lowered(captured)
    assert [str(n.target) for n in result.gm.graph.nodes] == before
    assert result.report.sites == ()


def test_strict_names_every_site_that_no_kernel_took() -> None:
    config = QuantConfig("int8dq", rules={"b": "w=int4/channel1"}, strict=True)
    words = "b: runs as dequantize . linear. int8_linear_dynamic, int8_linear, linear_dynamic: x is float"
    with pytest.raises(UnloweredSite, match=words) as error:
        lowered(capture(Linears(pair), X), config)
    assert "1 site would not run on a quantized kernel" in str(error.value)
    with pytest.raises(UnloweredSite, match="this machine has no compiled kernels"):
        lowered(capture(Linears(pair), X), QuantConfig("int8dq", strict=True), target=NO_KERNEL)


def test_strict_lets_a_site_stay_float_where_a_rule_says_so() -> None:
    result = lowered(capture(Linears(pair), X), QuantConfig("int8dq", rules={"b": None}, strict=True))
    assert targets(result.gm) == ["int8_linear_dynamic"]


@pytest.mark.parametrize("target", SLOW_TARGETS, ids=["a GPU", "a CPU without AVX2"])
def test_the_default_stays_float_where_it_would_be_slower(target: Target) -> None:
    result = lowered(capture(Linears(pair), X), QuantConfig(), target=target)
    assert targets(result.gm) == []
    reason = f"the default, int8dq, would be slower than float: no fast int8 kernel on {target.device}; name a preset"
    assert [(site.status, site.reason) for site in result.report.sites] == [("float", reason)] * 2


@pytest.mark.parametrize("target", SLOW_TARGETS, ids=["a GPU", "a CPU without AVX2"])
def test_a_named_preset_is_quantized_everywhere(target: Target) -> None:
    result = lowered(capture(Linears(pair), X), "int8dq", target=target)
    assert {site.status for site in result.report.sites} <= {"lowered", "reference"}


# Passes that fail.


class Fails(Pass):
    name: ClassVar[str] = "fails"

    def __init__(self, error: Exception | None) -> None:
        self.error = error

    def run(self, gm: GraphModule) -> PassResult:
        if self.error is not None:
            raise self.error
        first, *_, output = gm.graph.nodes  # what the output reads now stands behind it
        first.prepend(output)
        return PassResult()


def test_a_failure_names_the_pass_and_those_before_it() -> None:
    captured = capture(Linears(pair), X)
    first = Annotate(Deciding(QuantConfig()))
    with pytest.raises(PassFailed, match="pass 'fails' failed, after annotate: KeyError: 'w'") as error:
        run_passes(captured.gm, [first, Fails(KeyError("w"))])
    assert isinstance(error.value.__cause__, KeyError)
    with pytest.raises(PassFailed, match="pass 'fails' failed, as the first pass: ZeroDivisionError"):
        run_passes(captured.gm, [Fails(ZeroDivisionError())])


def test_a_graph_that_does_not_lint_is_the_fault_of_the_pass() -> None:
    captured = capture(Linears(pair), X)
    with pytest.raises(PassFailed, match="pass 'fails' failed"):
        run_passes(captured.gm, [Fails(None)])


def test_errors_of_our_own_go_through() -> None:
    captured = capture(Linears(pair), X)
    with pytest.raises(FxQuantError, match="said on purpose") as error:
        run_passes(captured.gm, [Fails(FxQuantError("said on purpose"))])
    assert type(error.value) is FxQuantError


def test_passes_are_plain_data() -> None:
    config, deciding = QuantConfig(), Deciding(QuantConfig())
    assert pipeline_for(config, deciding) == pipeline_for(config, deciding)
    assert pipeline_for(config, deciding) != pipeline_for(config, deciding, evaluate=False)


# Whole dumps.


class BertBlock(nn.Module):
    """Post-norm encoder block with biases, as BERT's."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = AttentionBlock(32, 4, bias=True)
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.intermediate, self.output = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.output(F.gelu(self.intermediate(x))))


class Broken(nn.Module):
    """A graph break between two linears, and a third one that a rule keeps float."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        torch._dynamo.graph_break()
        return self.head(torch.relu(self.second(x)))


@pytest.mark.parametrize(
    ("name", "make", "config"),
    [
        ("llama_block", lambda: DecoderLayer(32, 4, 2, 48), QuantConfig("int8dq")),
        ("bert_block", BertBlock, QuantConfig("int8dq", rules={"output": "int8wo"})),
        ("gated_mlp", lambda: GatedMlp(32, 64), QuantConfig("int4wo-g32")),
        ("graph_break", Broken, QuantConfig("int8dq", rules={"head": None})),
    ],
)
def test_dumps_tell_the_whole_story(
    name: str,
    make: Callable[[], nn.Module],
    config: QuantConfig,
    golden: Callable[[str, str], None],
    tmp_path: Path,
) -> None:
    _, graphs = through_capture(make().eval(), torch.zeros(2, 6, 32))
    for captured in graphs:
        dumper = Dumper(tmp_path)
        dumper.finish(lowered(captured, config, observe=dumper).report)
    golden(f"dump_{name}.txt", story(tmp_path))


def story(directory: Path) -> str:
    """The first stage, what each later one changed, the last stage and the summary, of every graph."""
    parts = []
    for folder in sorted(directory.iterdir()):
        files = [folder / "01-capture.txt", *sorted(folder.glob("*.diff")), *folder.glob("*-lower.txt")]
        files.append(folder / "00-summary.txt")
        parts += [f"==== {folder.name}/{file.name}\n{file.read_text()}" for file in files]
    # Line numbers would tie the dump to the last edit of the file that holds the model.
    return re.sub(r"\.py:\d+", ".py:0", "\n".join(parts))


def test_the_notes_of_a_lowered_graph_are_complete() -> None:
    result = lowered(capture(Linears(pair), X))
    for node in result.gm.graph.nodes:
        if node.op == "call_function":
            assert note_of(node).source, node.name
