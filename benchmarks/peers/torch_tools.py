"""Peers inside torch: torchao under Inductor, Optimum Quanto and torch's own `quantize_dynamic` in eager."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.peers.absent import need
from benchmarks.peers.subjects import Subject


def torchao(config: str, subject: Subject, threads: int) -> Callable[[], Tensor]:
    """torchao's config of that name, compiled with freezing and max-autotune."""
    quantization = need("torchao.quantization", "torchao")
    model = copy.deepcopy(subject.model)
    quantization.quantize_(model, getattr(quantization, config)(set_inductor_config=False))
    fn = torch.compile(model, dynamic=False, fullgraph=True, options={"freezing": True, "max_autotune": True})
    return lambda: fn(*subject.inputs)


def quanto(subject: Subject, threads: int) -> Callable[[], Tensor]:
    """Quanto's 8-bit weights, in eager: under Inductor its kernels are no faster."""
    library = need("optimum.quanto", "optimum-quanto")
    model = copy.deepcopy(subject.model)
    library.quantize(model, weights=library.qint8)
    library.freeze(model)
    return lambda: model(*subject.inputs)


def quantize_dynamic(subject: Subject, threads: int) -> Callable[[], Tensor]:
    """torch's deprecated dynamic quantization (FBGEMM), in eager."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(subject.model, {nn.Linear}, dtype=torch.qint8)
    return lambda: model(*subject.inputs)


TOOLS: dict[str, Callable[[Subject, int], Callable[[], Tensor]]] = {
    "torchao int8dq": partial(torchao, "Int8DynamicActivationInt8WeightConfig"),
    "torchao int8wo": partial(torchao, "Int8WeightOnlyConfig"),
    "Quanto int8, eager": quanto,
    "torch quantize_dynamic, eager": quantize_dynamic,
}
