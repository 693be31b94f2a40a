"""The namespace `fxquant` of torch.ops, and how one op is declared in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("fxquant", "DEF")
TAGS = (
    torch.Tag.pt2_compliant_tag,
    # The kernels read memory by the strides they are given; a compiler may not change these behind their back.
    torch.Tag.needs_exact_strides,
)


def declare(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
) -> None:
    """Define one op: schema, reference (any device), fake and gradient.

    Kernels register on a device's key of the same op. The gradient costs about 7 us a call where autograd keys are in
    force, even under no_grad; a runner of whole graphs leaves them out with torch._C._AutoDispatchBelowAutograd().
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=TAGS)
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fxquant::{name}", fake, lib=LIBRARY)
    torch.library.register_autograd(f"fxquant::{name}", backward, setup_context=setup_context, lib=LIBRARY)


def no_gradient(ctx: Any, *grads: Any) -> tuple[None, ...]:
    """The backward of an op whose outputs are constants."""
    return (None,) * len(ctx.needs_input_grad)
