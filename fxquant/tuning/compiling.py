"""Compiling a recorded launch for any target, without a GPU: what `fxquant.tuning.facts` reads."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile, make_backend
from triton.runtime.jit import create_function_from_signature

from fxquant.numerics import packed_bytes
from fxquant.spec import TensorSpec
from fxquant.target import Arch, KernelConfig, Problem
from fxquant.triton_kernels import KERNELS, Operands
from fxquant.triton_kernels.launching import OPTIONS, Launch, recorded
from fxquant.triton_kernels.operands import DTYPES, EmbeddingOperands, QuantizeOperands, linear_operands


@dataclass(frozen=True)
class Specialized:
    """A launch as Triton compiles it: the function with types, constants and known divisors of its arguments."""

    source: Any
    target: GPUTarget
    options: Any

    @property
    def key(self) -> str:
        """Equal only where the machine code is: source of the function and all it calls, arguments, options, Triton."""
        parts = (triton.__version__, str(self.target), self.source.hash(), self.options.hash())
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]

    def compiled(self) -> Any:
        """Triton's CompiledKernel: `.asm` by stage ('ptx', 'cubin', 'amdgcn', …), `.metadata`."""
        return compile(self.source, target=self.target, options=self.options.__dict__)


def specialized(launch: Launch, arch: Arch) -> Specialized:
    """As a real launch would do it: by dtype, by divisibility of addresses and numbers, by numbers that are 1.

    Meta tensors count as aligned to 16 bytes, as torch's allocations are. Triton's own cache then has one entry for
    both, so that what is compiled here is what a GPU loads.
    """
    target = GPUTarget(arch.backend, arch.compute, arch.warp_size)
    backend = make_backend(target)
    function = launch.function
    runtime = {
        "debug": knobs.runtime.debug,
        "instrumentation_mode": knobs.compilation.instrumentation_mode,
        "fpsan_homomorphic_casts": knobs.compilation.fpsan_homomorphic_casts,
    }
    meta = {**OPTIONS, **launch.meta, **runtime}
    bind = create_function_from_signature(function.signature, function.params, backend)
    bound, specialization, options = bind(*launch.args, **meta)
    options, signature, constexprs, attrs = function._pack_args(backend, meta, bound, specialization, options)
    return Specialized(ASTSource(function, signature, constexprs, attrs), target, options)


def launches_of(problem: Problem, config: KernelConfig, operands: Operands | None = None) -> list[Launch]:
    """What the kernel's launcher would start for that problem, with `empty_operands` if no others are given."""
    with recorded() as launches:
        KERNELS[config.kernel].run(operands or empty_operands(problem), config)
    return launches


def empty_operands(problem: Problem) -> Operands:
    """Operands of a problem on the meta device; a linear's with a bias, a norm's with a weight."""
    match problem.op:
        case "linear":
            return linear_operands(problem)
        case "quantize":
            return _empty_quantize(problem)
        case "embedding":
            return _empty_embedding(problem)


def _empty_quantize(problem: Problem) -> QuantizeOperands:
    with torch.device("meta"):
        static = problem.extra == "static"
        norm = "" if static else problem.extra
        return QuantizeOperands(
            x=torch.empty(problem.m, problem.k, dtype=DTYPES[problem.dtype]),
            spec=problem.activations,
            norm=norm,
            norm_weight=torch.empty(problem.k, dtype=DTYPES[problem.dtype]) if norm else None,
            norm_bias=torch.empty(problem.k, dtype=DTYPES[problem.dtype]) if norm == "layernorm" else None,
            eps=1e-6 if norm else 0.0,
            scale=torch.empty(1, 1) if static else None,
        )


def _empty_embedding(problem: Problem) -> EmbeddingOperands:
    spec = TensorSpec.parse(problem.weights)
    shape = spec.granularity.scale_shape((problem.n, problem.k))
    zeros = spec.scale_dtype if spec.scheme == "shift" else torch.uint8
    with torch.device("meta"):
        return EmbeddingOperands(
            indices=torch.empty(problem.m, dtype=torch.int64),
            rows=torch.empty(problem.n, packed_bytes(problem.k, spec.format.bits), dtype=torch.uint8),
            scale=torch.empty(shape, dtype=spec.scale_dtype),
            in_features=problem.k,
            spec=problem.weights,
            dtype=DTYPES[problem.dtype],
            zero_point=torch.empty(shape, dtype=zeros) if spec.has_zero_point else None,
            tensor_scale=torch.empty(1, 1) if spec.has_tensor_scale else None,
        )
