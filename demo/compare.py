"""The demo's measurements: one model, compiled once for float and once by fxquant, side by side in one process."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from demo.minilm import SentenceEncoder, Tokenizer, embed
from demo.quality import mean_cosine, mean_reciprocal_rank, recall_at
from demo.sentences import PairSet
from demo.timing import Timing, alternate

WARMUP = 2
"""Rounds that are not counted, before each timed run."""

Encode = Callable[[Tensor, Tensor], Tensor]
Advance = Callable[[int], object]
"""Called with the number of steps just done."""


@dataclass(frozen=True)
class Settings:
    """What the demo measures. `batch_rounds` maps a batch size to its number of timed rounds."""

    preset: str = "int8dq"
    backend: str = "fxquant"
    tokens: int = 64
    pairs: int = 1000
    batch_rounds: dict[int, int] = field(default_factory=lambda: {1: 40, 32: 12})
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
    float_: Timing
    quantized: Timing

    @property
    def ratio(self) -> float:
        return self.float_.median / self.quantized.median


@dataclass(frozen=True)
class Quality:
    """Scores of the retrieval task and how near the two models' embeddings are."""

    queries: int
    float_mrr: float
    quantized_mrr: float
    float_recall: float
    quantized_recall: float
    cosine: float


@dataclass(frozen=True)
class Sizes:
    """Bytes of weights, float and quantized: of the quantized layers alone, and of the whole model."""

    layers: tuple[int, int]
    model: tuple[int, int]

    @property
    def rows(self) -> tuple[tuple[str, int, int], ...]:
        return ("weights of quantized layers", *self.layers), ("weights of the model", *self.model)


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
def speed(encoders: tuple[Encode, Encode], arguments: tuple[Tensor, Tensor], rounds: int, advance: Advance) -> Speed:
    """Both models on the same batch, in turns."""
    float_model, quantized = encoders
    taken = alternate(
        {"float": lambda: float_model(*arguments), "quantized": lambda: quantized(*arguments)},
        rounds=rounds,
        warmup=WARMUP,
        advance=lambda: advance(1),
    )
    return Speed(arguments[0].shape[0], taken["float"], taken["quantized"])


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
    )


def sizes(model: SentenceEncoder, settings: Settings) -> Sizes | None:
    """Bytes of the weights before and after, as the dump of this run tells; None for a backend that writes none."""
    reports = sorted(settings.dump.glob("graph_*/report.json"))
    if not reports:
        return None
    sites = [site for site in json.loads(reports[0].read_text(encoding="utf-8"))["sites"] if site["kernel"]]
    before, after = (sum(site[key] for site in sites) for key in ("bytes_before", "bytes_after"))
    whole = sum(parameter.nbytes for parameter in model.parameters())
    return Sizes(layers=(before, after), model=(whole, whole - before + after))


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
