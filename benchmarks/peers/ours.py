"""Float32 by Inductor, and fxquant's recipes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.peers.subjects import Subject
from fxquant import QuantConfig, QuantizingBackend

Build = Callable[[Subject, int], Callable[[], Tensor]]


def plain(subject: Subject, threads: int) -> Callable[[], Tensor]:
    """The float model under torch.compile."""
    fn = torch.compile(subject.model, dynamic=False, fullgraph=True)
    return lambda: fn(*subject.inputs)


def quantized(config: QuantConfig, subject: Subject, threads: int) -> Callable[[], Tensor]:
    """backend="fxquant" on the same model."""
    fn = torch.compile(subject.model, backend=QuantizingBackend(config), dynamic=False, fullgraph=True)
    return lambda: fn(*subject.inputs)


# One recipe a model, for speed and accuracy both; the head is quantized too. 4 bits: groups of 32 as Q4_0 has, and as
# there 8 bits for the head.
INT8 = QuantConfig(preset="int8dq")
INT4 = QuantConfig(preset="int4dq", group_size=32, rules={"*lm_head": "int8dq"})
INT4_WEIGHTS = QuantConfig(preset="int4wo", rules={"*lm_head": "int8wo"})

FLOAT = "float32 Inductor"
OURS: dict[str, Build] = {
    "fxquant int8dq": partial(quantized, INT8),
    "fxquant int4dq": partial(quantized, INT4),
    "fxquant int4wo": partial(quantized, INT4_WEIGHTS),
}
