"""Compiling a recorded launch for any target, without a GPU: what `fxquant.tuning.facts` reads."""

from __future__ import annotations

from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile, make_backend
from triton.runtime.jit import create_function_from_signature

from fxquant.target import Arch, KernelConfig, Problem
from fxquant.triton_kernels import KERNELS
from fxquant.triton_kernels.launching import Launch, recorded
from fxquant.triton_kernels.operands import linear_operands


def compile_launch(launch: Launch, arch: Arch) -> Any:
    """Triton's CompiledKernel of one launch: `.asm` by stage ('ptx', 'cubin', 'amdgcn', …), `.metadata`.

    Arguments are specialized as at run time: by dtype, by divisibility of addresses and numbers, by numbers that are 1.
    """
    target = GPUTarget(arch.backend, arch.compute, arch.warp_size)
    backend = make_backend(target)
    function, meta = launch.function, {"debug": False, "enable_fp_fusion": True, **launch.meta}
    bind = create_function_from_signature(function.signature, function.params, backend)
    bound, specialization, options = bind(*launch.args, **meta)
    options, signature, constexprs, attrs = function._pack_args(backend, meta, bound, specialization, options)
    return compile(ASTSource(function, signature, constexprs, attrs), target=target, options=options.__dict__)


def launches_of(problem: Problem, config: KernelConfig) -> list[Launch]:
    """What the kernel's launcher would start for that problem."""
    with recorded() as launches:
        KERNELS[config.kernel].run(linear_operands(problem), config)
    return launches
