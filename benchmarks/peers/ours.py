"""Float32 by Inductor, and fxquant's recipes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

import fxquant
from benchmarks.accuracy.recipes import INT8_GENERATE
from benchmarks.peers.subjects import Subject
from fxquant import QuantConfig, QuantizingBackend, cpu_kernels

Build = Callable[[Subject, int], Callable[[], Tensor]]


class NoKernels(RuntimeError):
    """Without the C++ library the ops run as torch's own, slowly: there is nothing to compare."""


def with_kernels() -> None:
    """Load the C++ library, which a bare call of an op does not."""
    if cpu_kernels.load() is None:
        raise NoKernels("the C++ kernels could not be built here: run once without `-W ignore`, the warning says why")


def plain(subject: Subject, threads: int) -> Callable[[], Tensor]:
    """The float model under torch.compile."""
    fn = torch.compile(subject.model, dynamic=False, fullgraph=True)
    return lambda: fn(*subject.inputs)


def quantized(config: QuantConfig, subject: Subject, threads: int) -> Callable[[], Tensor]:
    """backend="fxquant" on the same model; a decode step is frozen and called from C++, as docs/tuning.md advises.

    Raises NoKernels where the C++ library could not be built.
    """
    with_kernels()
    if subject.step:
        fn = fxquant.compile(subject.model, config, wrapper="cpp", freezing=True, dynamic=False)
    else:
        fn = torch.compile(subject.model, backend=QuantizingBackend(config), dynamic=False, fullgraph=True)
    return lambda: fn(*subject.inputs)


def in_bfloat16(config: QuantConfig, subject: Subject, threads: int) -> Callable[[], Tensor]:
    """The same of the model in bfloat16, in which OpenVINO computes all but products on such a CPU; logits are too."""
    model = copy.deepcopy(subject.model).to(torch.bfloat16)
    return quantized(config.with_fields(wrapper="cpp"), replace(subject, model=model), threads)


# One recipe a model, for speed and accuracy both; the head is quantized too. 4 bits: groups of 32 as Q4_0 has, and as
# there 8 bits for the head.
INT8 = QuantConfig(preset="int8dq")
INT4 = QuantConfig(preset="int4dq", group_size=32, rules={"*lm_head": "int8dq"})
INT8_GROUPS = QuantConfig("w=int8/group128 x=int8/group128")
INT8_FINE = QuantConfig(**INT8_GENERATE)
INT4_WEIGHTS = QuantConfig(preset="int4wo", rules={"*lm_head": "int8wo"})
INT8_WEIGHTS = QuantConfig(preset="int8wo", algorithm="mse")

FLOAT = "float32 Inductor"
OURS: dict[str, Build] = {
    "fxquant int8dq": partial(quantized, INT8),
    "fxquant int8dq, bfloat16": partial(in_bfloat16, INT8),
    "fxquant int8dq, groups": partial(quantized, INT8_GROUPS),
    "fxquant int8wo, groups": partial(quantized, INT8_FINE),
    "fxquant int4dq": partial(quantized, INT4),
    "fxquant int4wo": partial(quantized, INT4_WEIGHTS),
    "fxquant int8wo": partial(quantized, INT8_WEIGHTS),
    "fxquant int8wo, bfloat16": partial(in_bfloat16, INT8_WEIGHTS),
}
# The same in words, for tables.
RECIPES = {
    "fxquant int8dq": "int8 weights, int8 activations per token",
    "fxquant int8dq, bfloat16": "the same; the model in bfloat16, called from C++ (wrapper='cpp')",
    "fxquant int8dq, groups": "int8 weights and int8 activations, both in groups of 128",
    "fxquant int8wo, groups": "int8 weights, in groups of 32 in three layers and the head; float activations",
    "fxquant int4dq": "int4 weights in groups of 32, int8 activations per token, int8 head",
    "fxquant int4wo": "int4 weights in groups of 128, float activations, int8 head",
    "fxquant int8wo": "int8 weights, scales of least squared error; float activations",
    "fxquant int8wo, bfloat16": "the same; the model in bfloat16, called from C++",
}
