"""What the device of a module's weights runs, and so the layout in which they lie there."""

from __future__ import annotations

import functools

import torch

from fxquant.numerics.tiles import scaled_by_blocks
from fxquant.spec import TensorSpec
from fxquant.target import Problem, Target, arch_named

_FEW = 16  # rows of x: whether a kernel takes a problem hardly depends on them


@functools.cache
def arch_of(device: torch.device) -> str:
    """The name of the architecture that Triton kernels run on there; '' if none do."""
    return Target.of_this_machine(device).arch


def layout_on(device: torch.device, weights: TensorSpec, activations: str, shape: tuple[int, int]) -> str:
    """'tiles' where Triton kernels run; 'blocks' if they multiply such blocks of both sides; '' elsewhere."""
    if not arch_of(device):
        return ""
    both = bool(activations) and scaled_by_blocks(weights, TensorSpec.parse(activations))
    return "blocks" if both and multiplies_codes(device, str(weights), activations, *shape) else "tiles"


def multiplies_codes(device: torch.device, weights: str, activations: str, rows: int, columns: int) -> bool:
    """Whether products of a weight [rows, columns] with codes of that spec have a kernel there.

    Else x is rounded to its format's values, and multiplied as a float.
    """
    return _multiplies_codes(device, weights, activations, rows, columns)


# What torch._dynamo.assume_constant_result sets (see `fxquant.nn.warn`): Dynamo would trace the search for a kernel.
multiplies_codes._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


@functools.cache
def _multiplies_codes(device: torch.device, weights: str, activations: str, rows: int, columns: int) -> bool:
    if not (arch := arch_of(device)):
        return False
    from fxquant.triton_kernels import kernels_for

    problem = Problem("linear", _FEW, rows, columns, weights, activations, "float16")
    return bool(kernels_for(problem, arch_named(arch)))
