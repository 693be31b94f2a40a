"""Well-known architectures: what is quantized, what stays float, no graph breaks, the answer of the float model."""

from __future__ import annotations

import pytest

from benchmarks.coverage import COMPILED_AGREES, FAMILIES, measure
from benchmarks.models import LEAST_SQNR

ROUTERS = ("model.layers.0.mlp.gate", "model.layers.1.mlp.gate")
LEFT = {
    "mixtral": ROUTERS,
    "qwen2_moe": ROUTERS,
    "qwen3_moe": ROUTERS,
    "opt": ("model.decoder.embed_positions",),
    "gemma3": ("model.embed_tokens", "lm_head"),
    "whisper": ("model.decoder.embed_positions",),
    "vit": ("vit.embeddings",),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_an_architecture_is_quantized_whole_and_compiled_in_one_piece(name: str) -> None:
    found = measure(name, ["int8dq"])
    assert found.left == LEFT.get(name, ())
    assert (found.share == 1.0) == (name not in LEFT)
    assert found.float_graphs.breaks == found.graphs.breaks == ()
    assert found.graphs.count == found.float_graphs.count >= 1
    assert found.sqnr["int8dq"] >= LEAST_SQNR
    # Sums in another order may round a value at a tie to the next code, which costs no more than rounding at all.
    assert found.differs <= 10 ** (-found.sqnr["int8dq"] / 20)
    assert measure(name, ["int8wo"]).differs <= COMPILED_AGREES
