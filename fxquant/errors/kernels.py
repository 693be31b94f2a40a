"""Kernels that are not there, or that could not be compiled or shown."""

from __future__ import annotations

from collections.abc import Sequence

from fxquant.errors.base import FxQuantError
from fxquant.errors.words import sentence, unknown


class UnknownKernel(FxQuantError, ValueError):
    """A kernel's name that there is not."""

    def __init__(self, name: str, known: Sequence[str]) -> None:
        super().__init__(unknown("kernel", name, known))


class NothingToCompile(FxQuantError, ValueError):
    """A request to compile kernels that comes to none."""

    def __init__(self, target: str, reason: str) -> None:
        super().__init__(
            f"nothing to compile for {target}: {sentence(reason)} `fxquant kernels list` shows the kernels."
        )


class KernelNotCompiled(FxQuantError, RuntimeError):
    """A kernel that the compiler has given up, though it wrote a file: it would compute anything."""

    def __init__(self, kernel: str, arch: str, reason: str) -> None:
        super().__init__(
            f"{kernel} was not compiled for {arch}: {sentence(reason)} Don't run it; report it to fxquant."
        )


class DisassemblyFailed(FxQuantError, RuntimeError):
    """The tool that shows a kernel's machine code could not be run, or did not understand it."""

    def __init__(self, tool: str, reason: str) -> None:
        super().__init__(
            f"{tool} failed on a compiled kernel: {sentence(reason)} It comes with Triton; reinstall triton."
        )


class KernelsUnavailableWarning(UserWarning):
    """The compiled kernels cannot be used: the reference ops compute the same numbers, slower."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"fxquant's compiled kernels are not available: {reason}. The reference ops are used: same numbers, slower."
        )


class NoGpuKernelWarning(UserWarning):
    """An operation on a GPU that no kernel takes there: its reference computes the same numbers, slower."""

    def __init__(self, op: str, weights: str, activations: str, arch: str) -> None:
        formats = " with ".join(text for text in (activations, weights) if text)
        where = f"on {arch}" if arch else "on this GPU (they are for sm80 and later, and gfx942)"
        super().__init__(
            f"no Triton kernel takes a {op} of {formats} {where}. The reference runs it: same numbers, slower. "
            "`fxquant kernels list` says which formats have kernels where."
        )
