"""The demo's measurements: one model, compiled once for float and once by fxquant, side by side in one process."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Stats, paired, ratio
from demo.minilm import SentenceEncoder, Tokenizer, embed
from demo.quality import mean_cosine, mean_reciprocal_rank, recall_at, standard_error
from demo.sentences import PairSet

Encode = Callable[[Tensor, Tensor], Tensor]
Advance = Callable[[int], object]
"""Called with the number of steps just done."""


@dataclass(frozen=True)
class Settings:
    """What the demo measures. `batch_seconds` maps a batch size to the seconds that its timing takes, about."""

    preset: str = "int8dq"
    backend: str = "fxquant"
    tokens: int = 64
    pairs: int = 1000
    batch_seconds: dict[int, float] = field(default_factory=lambda: {1: 2.0, 32: 10.0})
    dump: Path = Path("fxquant-dump")

    @property
    def options(self) -> dict[str, Any]:
        """The options of the quantizing backend; none for a stand-in backend."""
        if self.backend != "fxquant":
            return {}
        return {"preset": self.preset, "dump": str(self.dump)}


@dataclass(frozen=True)
class Speed:
    """Time of one call for one batch size, float and quantized."""

    batch: int
    stats: dict[str, Stats]
    """By "float" and "quantized"."""

    @property
    def ratio(self) -> float:
        return ratio(self.stats, "float", "quantized")


@dataclass(frozen=True)
class Quality:
    """Scores of the retrieval task and how near the two models' embeddings are."""

    queries: int
    float_mrr: float
    quantized_mrr: float
    float_recall: float
    quantized_recall: float
    cosine: float
    mrr_error: float
    """Standard error of the difference of the two MRRs: what is smaller says nothing."""


@dataclass(frozen=True)
class Sizes:
    """Bytes of weights, float and quantized: of the quantized layers alone, and of the whole model.

    ``kernels`` counts the linear layers by the kernel that runs them, ``linears`` all of them.
    """

    layers: tuple[int, int]
    model: tuple[int, int]
    kernels: dict[str, int]
    linears: int

    @property
    def rows(self) -> tuple[tuple[str, int, int], ...]:
        return ("weights, quantized layers", *self.layers), ("weights, whole model", *self.model)


def compile_both(model: SentenceEncoder, settings: Settings) -> tuple[Encode, Encode]:
    """(float, quantized), compiled at their first calls. Static shapes: each batch size gets its own graph."""
    float_model = torch.compile(model, dynamic=False, fullgraph=True)
    options = settings.options or None
    quantized = torch.compile(model, backend=settings.backend, dynamic=False, fullgraph=True, options=options)
    return float_model, quantized


def example(tokenizer: Tokenizer, pairs: PairSet, batch: int) -> tuple[Tensor, Tensor]:
    """Real text for one timed batch, every row full: pairs are joined until a row has no padding left."""
    text = " ".join(f"{pair.query}. {pair.document}." for pair in pairs.pairs[:40])
    tokens = tokenizer([text] * batch)
    return tokens.input_ids, tokens.attention_mask


@torch.no_grad()
def warm_up(encoders: tuple[Encode, Encode], arguments: tuple[Tensor, Tensor], advance: Advance) -> None:
    """First calls, where compilation happens."""
    for encode in encoders:
        encode(*arguments)
        advance(1)


@torch.no_grad()
def speed(encoders: tuple[Encode, Encode], arguments: tuple[Tensor, Tensor], seconds: float) -> Speed:
    """Both models on the same batch, in turns."""
    float_model, quantized = encoders
    candidates: dict[str, Callable[[], object]] = {
        "float": lambda: float_model(*arguments),
        "quantized": lambda: quantized(*arguments),
    }
    return Speed(arguments[0].shape[0], paired(candidates, seconds=seconds))


def quality(
    encoders: tuple[Encode, Encode], tokenizer: Tokenizer, pairs: PairSet, size: int, advance: Advance
) -> Quality:
    """Both models on the retrieval task, in batches of `size` (a size already compiled costs no compilation)."""
    queries = [pair.query for pair in pairs.pairs]
    documents = [pair.document for pair in pairs.pairs]
    vectors = [embed(encode, tokenizer, queries + documents, size=size, advance=advance) for encode in encoders]
    (float_q, float_d), (quant_q, quant_d) = (v.split(len(queries)) for v in vectors)
    return Quality(
        queries=len(queries),
        float_mrr=mean_reciprocal_rank(float_q, float_d),
        quantized_mrr=mean_reciprocal_rank(quant_q, quant_d),
        float_recall=recall_at(float_q, float_d, 10),
        quantized_recall=recall_at(quant_q, quant_d, 10),
        cosine=mean_cosine(*vectors),
        mrr_error=standard_error((float_q, quant_q), (float_d, quant_d)),
    )


def sizes(model: SentenceEncoder, settings: Settings) -> Sizes | None:
    """Bytes of the weights before and after, as the dump of this run tells; None for a backend that writes none."""
    reports = sorted(settings.dump.glob("graph_*/report.json"))
    if not reports:
        return None
    linears = [s for s in json.loads(reports[0].read_text(encoding="utf-8"))["sites"] if s["op"] == "linear"]
    kernels: Counter[str] = Counter()
    for site in linears:
        if site["kernel"]:
            kernels[site["kernel"]] += site["members"]
    quantized = [site for site in linears if site["kernel"]]
    before, after = (sum(site[key] for site in quantized) for key in ("bytes_before", "bytes_after"))
    whole = sum(parameter.nbytes for parameter in model.parameters())
    return Sizes(
        layers=(before, after),
        model=(whole, whole - before + after),
        kernels=dict(kernels),
        linears=sum(site["members"] for site in linears),
    )


def fresh_folder(base: Path) -> Path:
    """A folder of its own for this run below `base`: ``run-000``, ``run-001``, …"""
    for number in itertools.count():
        folder = base / f"run-{number:03d}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise AssertionError("counting does not end")
