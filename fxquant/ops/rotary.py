"""rotary: rotary position embedding (Su et al. 2021, arXiv:2104.09864) of halves: x * cos + cat(-x2, x1) * sin.

Computed in float32, products and sum each rounded, and rounded once more to x's dtype: the same bits on every
instruction set and in the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.errors import ShapeMismatch, UnsupportedActivation
from fxquant.ops.checks import ACTIVATION_DTYPES, check_devices
from fxquant.ops.library import declare
from fxquant.ops.quantize import refuse

MOST_DIMS = 8
_OP = "fxquant.rotary"


def rotary(x: Tensor, cos: Tensor, sin: Tensor, isa: int = 0) -> Tensor:
    """x * cos + cat((-x2, x1), -1) * sin, where x1 and x2 are the halves of x's last dimension.

    x [..., D] of at most eight dimensions, D even; cos and sin [..., D] that broadcast to it along the leading
    dimensions. All float32, bfloat16 or float16, of one dtype. `isa` picks a kernel's instruction set, for tests; the
    reference has none.

    Returns [..., D] in x's dtype, laid out as torch.empty_like(x) is, or contiguously where x's features are not.
    """
    check_rotary(x, cos, sin)
    wide, half = x.float(), x.shape[-1] // 2
    turned = torch.cat((-wide[..., half:], wide[..., :half]), -1)
    return _laid_out(x).copy_(wide * cos.float() + turned * sin.float())


def _rotary_fake(x: Tensor, cos: Tensor, sin: Tensor, isa: int = 0) -> Tensor:
    check_rotary(x, cos, sin)
    return _laid_out(x)


def check_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """The operands fit together, as far as their sizes are known; the kernel compares the rest when it runs."""
    for name, t in (("x", x), ("cos", cos), ("sin", sin)):
        if t.dtype not in ACTIVATION_DTYPES:
            raise UnsupportedActivation(f"{_OP}: {name}", t.dtype)
        if t.dtype != x.dtype or not 1 <= t.dim() <= min(x.dim(), MOST_DIMS):
            raise ShapeMismatch(
                _OP, f"{name} {_facts(t)} beside x {_facts(x)}", f"one dtype, 1 to {MOST_DIMS} dimensions"
            )
        sizes = zip(t.shape, x.shape[x.dim() - t.dim() :], strict=True)
        shared = [isinstance(size, int) and size == 1 for size in t.shape[:-1]] + [False]
        if any(_differ(a, b) for (a, b), one in zip(sizes, shared, strict=True) if not one):
            raise ShapeMismatch(_OP, f"{name} {_facts(t)}", f"{list(x.shape)}, or 1 before the last,")
    if isinstance(x.shape[-1], int) and x.shape[-1] % 2:
        raise ShapeMismatch(_OP, f"x {_facts(x)}", "an even last dimension")
    check_devices(_OP, x=x, cos=cos, sin=sin)


def _differ(size: int, wanted: int) -> bool:
    return isinstance(size, int) and isinstance(wanted, int) and size != wanted


def _facts(x: Tensor) -> str:
    return f"{list(x.shape)} {x.dtype}"


def _laid_out(x: Tensor) -> Tensor:
    if x.stride(-1) == 1:
        return torch.empty_like(x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


declare(
    "rotary(Tensor x, Tensor cos, Tensor sin, int isa=0) -> Tensor",
    reference=rotary,
    fake=_rotary_fake,
    backward=refuse("rotary"),
)
