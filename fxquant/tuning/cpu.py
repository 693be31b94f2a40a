"""The C++ kernels as tuning sees them: which one a problem runs on, operands for it, and the problem of a call.

Their ops take one number that changes the speed and no result: the instruction set, and how the product is cut into
tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxquant.algorithms import quantize
from fxquant.numerics import pack_granules, pack_int8, pack_panels
from fxquant.spec import TensorSpec
from fxquant.target import KernelConfig, Problem

# The numbers that the ops' argument `isa` takes (csrc/tensors.h), the narrowest first.
ISAS = {"portable": 1, "avx2": 2, "avxvnni": 5, "avx512vnni": 3, "amx": 4}
_ALWAYS_BELOW = ("portable", "avx2", "avx512vnni")  # a wider one; many CPUs with AVX512 lack AVX-VNNI
ISA = "isa"
ROWS, BY_ROWS, SERIAL = "rows", "by_rows", "serial"  # a blocking (csrc/launch.h); a field that is not there is 0
_ROWS = {0: 0, 32: 1, 64: 2, 128: 3, 256: 4}  # of a task, and the numbers that stand for them
_LONG = 128  # rows of x from which on the rows of a task matter
# Products that a kernel shares out among the threads, though one alone may be as fast.
_FEW_PRODUCTS = range(2**20, 2**25)
CODES = "codes"  # of a problem's `extra`: x comes quantized
_TOKEN, _STATIC, _INT8 = "int8/token", "int8/tensor", "int8/channel"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def words_of(config: KernelConfig) -> str:
    """A configuration for people: an instruction set by its name, 'int8_linear_dynamic isa=avx2'."""
    number = config.meta.get(ISA)
    name = next((name for name, known in ISAS.items() if known == number), "")
    if not name:
        return str(config)
    rest = (f"{field}={value}" for field, value in config.meta.items() if field != ISA)
    return " ".join((config.kernel, f"{ISA}={name}", *rest))


def number_of(config: KernelConfig) -> int:
    """The argument `isa` of the ops: bits 0 to 3 the instruction set, 4 to 6 the rows, 7 by_rows, 8 serial."""
    field = config.meta.get
    return config[ISA] | _ROWS[field(ROWS, 0)] << 4 | field(BY_ROWS, 0) << 7 | field(SERIAL, 0) << 8


def blockings(problem: Problem, threads: int) -> tuple[dict[str, int], ...]:
    """Blockings worth measuring, the heuristic's first: 256 rows a task, and neighbouring tasks share a panel."""
    found: list[dict[str, int]] = [{}]
    if problem.m >= _LONG:
        found += [{ROWS: rows, BY_ROWS: 1} for rows in (64, 128)]
    if threads > 1 and problem.m * problem.n * problem.k in _FEW_PRODUCTS:
        found.append({SERIAL: 1})
    return tuple(found)


def isas_up_to(name: str) -> tuple[int, ...]:
    """What a CPU can run whose best instruction set has that name, the best first."""
    known = [isa for other, isa in ISAS.items() if other in (name, *_ALWAYS_BELOW)]
    return tuple(reversed(known[: known.index(ISAS[name]) + 1]))


@dataclass(frozen=True)
class CpuKernel:
    """One op of the CPU kernels.

    takes     whether it is the one for a problem.
    operands  arguments of the op for a problem, without `isa`: random values, quantized by the reference.
    weight    where the packed weight stands among them.
    """

    name: str
    takes: Callable[[Problem], bool]
    operands: Callable[[Problem], tuple[Any, ...]]
    weight: int = 1

    @property
    def op(self) -> Any:
        """The op; `fxquant.ops` has declared it, as the import of fxquant does."""
        return getattr(torch.ops.fxquant, self.name).default

    def run(self, args: tuple[Any, ...], number: int) -> Tensor:
        return self.op(*args, number)

    def reference(self, args: tuple[Any, ...]) -> Tensor:
        """What the op's definition in plain torch gives, whatever kernels are registered."""
        return self.op._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args)


def cpu_kernel_for(problem: Problem) -> CpuKernel | None:
    """The kernel that lowering gives such a problem on a CPU; None if it has none that can be tuned."""
    return next((kernel for kernel in CPU_KERNELS if kernel.takes(problem)), None)


def cpu_problem(name: str, arguments: dict[str, Any], m: int) -> Problem | None:
    """The problem of a call of op `name` with these arguments (fake tensors will do) on m rows; None if it has none."""
    kernel = next((kernel for kernel in CPU_KERNELS if kernel.name == name), None)
    if kernel is None:
        return None
    x, scale = arguments.get("x", arguments.get("codes")), arguments["scale"]
    group = arguments.get("x_group", 0)
    dtype = arguments.get("dtype", None if x is None else x.dtype)
    problem = Problem(
        op="linear",
        m=m,
        n=int(arguments.get("out_features", scale.shape[0])),
        k=int(arguments["in_features"]),
        weights=arguments.get("spec", _INT8),
        activations=f"int8/group{group}" if group else _ACTIVATIONS[name],
        dtype=str(dtype).removeprefix("torch."),
        extra=CODES if name == "int8_linear" else "",
    )
    return problem if kernel.takes(problem) else None  # under autocast another op than lowering's first choice runs


def _floats(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """x [m, k], weight [n, k], bias [n], the same for every configuration."""
    generator = torch.Generator("cpu").manual_seed(0)
    x, weight, bias = (
        torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float32) for shape in _shapes(problem)
    )
    dtype = _DTYPES[problem.dtype]
    return x.to(dtype), weight, bias.to(dtype)


def _shapes(problem: Problem) -> tuple[tuple[int, ...], ...]:
    return (problem.m, problem.k), (problem.n, problem.k), (problem.n,)


def _int8_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    codes, scale, *_ = quantize(weight, TensorSpec.parse(_INT8))
    return pack_int8(codes), scale


def _of_int8(problem: Problem) -> tuple[Any, ...]:
    x, weight, bias = _floats(problem)
    return x, *_int8_weight(weight), bias, problem.k


def _of_codes(problem: Problem) -> tuple[Any, ...]:
    x, *rest = _of_int8(problem)
    codes, scale, *_ = quantize(x, TensorSpec.parse(_TOKEN))
    return codes, scale, *rest, x.dtype


def _of_static(problem: Problem) -> tuple[Any, ...]:
    x, *rest = _of_int8(problem)
    return x, (x.float().abs().max() / 127).reshape(1), *rest


def _panels(problem: Problem) -> tuple[Tensor, tuple[Tensor | None, ...], tuple[Any, ...]]:
    """x; packed, scale, zero point and tensor scale; what follows them."""
    x, weight, bias = _floats(problem)
    spec = TensorSpec.parse(problem.weights)
    codes, scale, zero_point, tensor_scale = quantize(weight, spec)
    shape = (spec, problem.n, problem.k)
    zeros = pack_granules(zero_point, *shape) if spec.has_zero_point else None
    whole = tensor_scale if spec.has_tensor_scale else None
    held = pack_panels(codes, spec), pack_granules(scale, *shape), zeros, whole
    return x, held, (bias, problem.n, problem.k, problem.weights, _DTYPES[problem.dtype])


def _of_integers(problem: Problem) -> tuple[Any, ...]:
    x, (*weight, _), tail = _panels(problem)
    return x, *weight, *tail


def _of_any(problem: Problem) -> tuple[Any, ...]:
    x, weight, tail = _panels(problem)
    return x, *weight, *tail


def _is(activations: str, int8: bool, extra: str = "") -> Callable[[Problem], bool]:
    def takes(problem: Problem) -> bool:
        met = (problem.op, problem.activations, problem.weights == _INT8, problem.extra)
        return met == ("linear", activations, int8, extra)

    return takes


CPU_KERNELS: tuple[CpuKernel, ...] = (
    CpuKernel("int8_linear_dynamic", _is(_TOKEN, True), _of_int8),
    CpuKernel("int8_linear", _is(_TOKEN, True, CODES), _of_codes, weight=2),
    CpuKernel("int8_linear_static", _is(_STATIC, True), _of_static, weight=2),
    CpuKernel("int8_linear_weight_only", _is("", True), _of_int8),
    CpuKernel("linear_dynamic", _is(_TOKEN, False), _of_integers),
    CpuKernel("linear_weight_only", _is("", False), _of_any),
)
_ACTIVATIONS = {
    "int8_linear_dynamic": _TOKEN,
    "int8_linear": _TOKEN,
    "int8_linear_static": _STATIC,
    "int8_linear_weight_only": "",
    "linear_dynamic": _TOKEN,
    "linear_weight_only": "",
}
