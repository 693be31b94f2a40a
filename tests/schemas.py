"""What the schemas of the CPU's linears have in common, as torch prints it."""

from __future__ import annotations

AFTER = 'Tensor? residual=None, str activation=""'
AROUND = f'{AFTER}, str prologue="", Tensor? by=None, Tensor? shift=None, float eps=0.'
