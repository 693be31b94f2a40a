"""shared: a tensor as it is, computed once for all the ops that read it.

Inductor computes what no op made anew in front of each op that it can't look into: a mask or a table of cosines that
all layers read would be made in each of them. What an op gives has a place in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.ops.library import declare
from fxquant.ops.quantize import refuse


def shared(x: Tensor) -> Tensor:
    """A copy of x, of any shape and dtype, laid out as torch.empty_like(x) is."""
    return torch.empty_like(x).copy_(x)


declare("shared(Tensor x) -> Tensor", reference=shared, fake=torch.empty_like, backward=refuse("shared"))
