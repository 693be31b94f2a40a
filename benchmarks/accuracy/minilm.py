"""all-MiniLM-L6-v2: an example sentence must find the meaning of its word (WordNet) among all meanings."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from benchmarks.accuracy.metrics import sqnr
from benchmarks.accuracy.subject import SQNR, Forward, Metric, Outputs, Subject
from demo import minilm, sentences
from demo.quality import mean_cosine, mean_reciprocal_rank, recall_at

LENGTHS = (16, 32, 64)
ROWS = 64


@torch.no_grad()
def embed(model: Forward, ids: Tensor, mask: Tensor, lengths: tuple[int, ...] = LENGTHS, rows: int = ROWS) -> Tensor:
    """Vectors of tokenized sentences (int64 [n, tokens] twice), in batches of `rows` sentences of about one length.

    Each sentence is padded to the first of `lengths` that holds it, so there are as many graphs as lengths; a batch
    that is not full repeats its last sentence.
    """
    count = mask.sum(1)
    found: dict[int, Tensor] = {}
    for low, high in pairwise((0, *lengths)):
        chosen = torch.nonzero((count > low) & (count <= high)).flatten()
        for part in chosen.split(rows) if len(chosen) else ():
            filled = torch.cat([part, part[-1:].expand(rows - len(part))])
            vectors = model(ids[filled, :high], mask[filled, :high])[: len(part)].float()
            found.update(zip(part.tolist(), vectors, strict=True))
    return torch.stack([found[index] for index in range(len(ids))])


def score(got: Outputs, want: Outputs) -> dict[str, float]:
    queries, documents = got["queries"], got["documents"]
    vectors, exact = torch.cat([queries, documents]), torch.cat([want["queries"], want["documents"]])
    return {
        "mrr": mean_reciprocal_rank(queries, documents),
        "recall": recall_at(queries, documents, 10),
        "cosine": mean_cosine(vectors, exact),
        "sqnr": sqnr(vectors, exact),
    }


def subject(quick: bool = False) -> Subject:
    """The encoder and 1,000 queries among 1,000 glosses (`quick`: 100)."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # its load report: the checkpoint's pooler is not used
    pairs = sentences.load_pairs(100 if quick else 1000)
    count = len(pairs.pairs)
    tokens = minilm.load_tokenizer(LENGTHS[-1])(
        [*(pair.query for pair in pairs.pairs), *(pair.document for pair in pairs.pairs)]
    )
    ids, mask = tokens.input_ids, tokens.attention_mask

    def run(model: Forward) -> Outputs:
        vectors = embed(model, ids, mask)
        return {"queries": vectors[:count], "documents": vectors[count:]}

    short = LENGTHS[0]
    full = torch.nonzero(mask.sum(1) >= short).flatten()[:ROWS]
    full = torch.cat([full, full[-1:].expand(ROWS - len(full))])
    return Subject(
        name="minilm",
        title="MiniLM (sentence encoder)",
        source=f"all-MiniLM-L6-v2; {pairs.source}, {count} queries among {count} documents",
        timed_as=f"{ROWS} sentences of {short} tokens",
        metrics=(
            Metric("mrr", "MRR", 4),
            Metric("recall", "recall at 10", 3),
            Metric("cosine", "cosine to float", 4),
            SQNR,
        ),
        model=minilm.load_encoder(),
        run=run,
        score=score,
        timed=(ids[full, :short], torch.ones(ROWS, short, dtype=mask.dtype)),
    )
