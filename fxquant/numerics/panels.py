"""The kernels' layout of a weight in any format, in plain torch: codes in panels of bit planes, granules by panel.

A full panel holds 64 output features, and of these, block by block, 8 neighbours along K. A block's 512 codes are 8
vectors of 64 bytes: byte 4 * c + i of vector 4 * q + j belongs to feature 16 * j + c and k = 4 * q + i. Their bits are
kept in planes whose widths are the powers of two in the format's bits, widest first (6 = 4 + 2); the first plane holds
the low bits. A plane of width w has w rows of 64 bytes: row r holds the vectors r, r + w, r + 2w, ... of which the one
with index s is shifted left by w * s. So each format takes the bits it says, and a shift and a mask restore a vector.

A panel is full if it has 64 features and filling up K to whole blocks costs no more than 2 %. The features of all
others follow the full panels as rows of `numerics.bits`, which a kernel spreads as it reads them. What is packed is one
flat tensor of codes' patterns: code + 2^(bits - 1) of a symmetric integer, the code's own bits else. Places of a full
panel beyond K hold the pattern of code 0.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn.functional import pad

from fxquant.errors import UnevenScales
from fxquant.numerics.bits import pack_bits, packed_bytes, unpack_bits
from fxquant.numerics.held import held_dtype
from fxquant.numerics.scales import MOST_STEPS
from fxquant.spec import CHANNEL, TensorSpec, group

PANEL = 64  # output features
PARTS = 50  # what a panel may hold besides its codes and scales is one of so many: 2 %
BLOCK_K = 8
BYTE = 8
_EXPONENT = 0x7F800000  # the bits of a float32's
_UNITS = 2**11


def full_features(out_features: int, in_features: int, unit: int) -> int:
    """How many features of a weight stand in full panels, which hold whole units along K; works on symbolic sizes."""
    padding = -in_features % unit
    return 0 if PARTS * padding > in_features else out_features // PANEL * PANEL


def panel_shape(out_features: int, in_features: int, spec: TensorSpec) -> list[int]:
    """Shape of the packed codes [out_features, in_features] of a spec; works on symbolic sizes."""
    full, bits = full_features(out_features, in_features, BLOCK_K), spec.format.bits
    return [full * _blocks(in_features) * bits + (out_features - full) * packed_bytes(in_features, bits)]


def pack_panels(codes: Tensor, spec: TensorSpec) -> Tensor:
    """Codes [N, K] of the spec -> uint8, flat; full panels first."""
    out_features, in_features = codes.shape
    full, bits, flip = full_features(out_features, in_features, BLOCK_K), spec.format.bits, _flip(spec)
    patterns = (codes.contiguous().view(torch.uint8) & (2**bits - 1)) ^ flip
    filled = pad(patterns[:full], (0, -in_features % BLOCK_K), value=flip)
    return torch.cat([_planes(filled, bits).flatten(), pack_bits(patterns[full:], bits).flatten()])


def unpack_panels(packed: Tensor, out_features: int, in_features: int, spec: TensorSpec) -> Tensor:
    """The inverse of `pack_panels`: codes [out_features, in_features] in the spec's code dtype, contiguous."""
    full, bits = full_features(out_features, in_features, BLOCK_K), spec.format.bits
    row_bytes, rest, blocks = packed_bytes(in_features, bits), out_features - full, _blocks(in_features)
    planes, rows = packed.split([full * blocks * bits, rest * row_bytes])
    filled = _patterns(planes.view(full // PANEL, blocks, bits, PANEL), bits)
    patterns = torch.cat([filled[:, :in_features], unpack_bits(rows.view(rest, row_bytes), bits, in_features)])
    return pattern_codes(patterns, spec)


def pattern_codes(patterns: Tensor, spec: TensorSpec) -> Tensor:
    """Codes in the spec's code dtype, as the device holds it, of the uint8 patterns that stand for them."""
    if flip := _flip(spec):
        return (patterns.to(torch.int16) - flip).to(torch.int8)
    return patterns.view(held_dtype(spec.code_dtype, patterns.device))


def _planes(patterns: Tensor, bits: int) -> Tensor:
    """Patterns of full panels [panels * 64, blocks * 8] -> [panels, blocks, bits, 64]."""
    panels, blocks = patterns.shape[0] // PANEL, patterns.shape[1] // BLOCK_K
    vectors = patterns.view(panels, 4, 16, blocks, 2, 4).permute(0, 3, 4, 1, 2, 5).reshape(panels, blocks, BYTE, PANEL)
    planes, below = [], 0
    for width in plane_widths(bits):
        slots = ((vectors >> below) & (2**width - 1)).view(panels, blocks, BYTE // width, width, PANEL)
        plane = slots[:, :, 0]
        for slot in range(1, BYTE // width):
            plane = plane | (slots[:, :, slot] << (width * slot))
        planes.append(plane)
        below += width
    return torch.cat(planes, 2)


def _patterns(planes: Tensor, bits: int) -> Tensor:
    """The inverse of `_planes`."""
    panels, blocks = planes.shape[:2]
    vectors = planes.new_zeros([panels, blocks, BYTE, PANEL])
    row = 0
    for width in plane_widths(bits):
        plane = planes[:, :, row : row + width]
        slots = torch.cat([plane >> (width * slot) for slot in range(BYTE // width)], 2)
        vectors |= (slots & (2**width - 1)) << row  # as many bits lie below a plane as it has rows above it
        row += width
    patterns = vectors.view(panels, blocks, 2, 4, 16, 4).permute(0, 3, 4, 1, 2, 5)
    return patterns.reshape(panels * PANEL, blocks * BLOCK_K)


def granule_shape(out_features: int, in_features: int, spec: TensorSpec, joined: bool = False) -> list[int]:
    """Shape of the packed scales, zero points or shifts of a weight [out_features, in_features]; symbolic sizes too.

    joined: of tensors that were joined along axis 0, so that one number for each tensor became one a row.
    """
    if spec.granularity.kind == "tensor" and not joined:
        return [1]
    rows = spec.granularity.rows if spec.granularity.kind == "block" else 1
    steps = out_features if stores_steps(in_features, spec) else 0
    return [(out_features + rows - 1) // rows * granules_along(in_features, spec) + steps]


def pack_granules(t: Tensor, spec: TensorSpec, out_features: int, in_features: int) -> Tensor:
    """Scales (zero points, shifts) in the shape of the spec's granularity -> flat, in their own dtype.

    t: [1, 1] and [N, 1] too where one stands for a whole row. Numbers of whole tensors and of blocks stay as they are;
    others stand panel by panel, [granules along K, features of the panel] in each, and behind stepped ones the rows'
    steps (see `stores_steps`). Raises `UnevenScales` for stepped ones that are not.
    """
    if spec.granularity.kind == "block" or (spec.granularity.kind == "tensor" and t.shape[0] == 1):
        return t.clone(memory_format=torch.contiguous_format).flatten()
    raw = t.contiguous().view(torch.uint8) if t.dtype.itemsize == 1 else t
    granules, full = granules_along(in_features, spec), out_features // PANEL * PANEL
    rows = raw.expand(out_features, granules)
    sizes = granules * full, granules * (out_features - full), out_features if stores_steps(in_features, spec) else 0
    packed = raw.new_empty(sum(sizes))
    panels, rest, steps = packed.split(sizes)
    by_feature = rows[:full].reshape(full // PANEL, PANEL, granules)
    panels.view(full // PANEL, granules, PANEL).copy_(by_feature.transpose(1, 2))
    rest.view(granules, out_features - full).copy_(rows[full:].t())
    if steps.shape[0]:
        steps.copy_(steps_of(rows))
    return packed.view(t.dtype)


def unpack_granules(packed: Tensor, spec: TensorSpec, out_features: int, in_features: int) -> Tensor:
    """What each row has, [out_features, granules along K]; of a block its number is repeated for each of its rows."""
    raw = packed.view(torch.uint8) if packed.dtype.itemsize == 1 else packed
    granules, full = granules_along(in_features, spec), out_features // PANEL * PANEL
    if spec.granularity.kind == "block":
        rows = raw.view(-1, granules).repeat_interleave(spec.granularity.rows, 0)[:out_features]
    elif spec.granularity.kind == "tensor" and packed.shape[0] == 1:
        rows = raw.expand(out_features, 1)
    else:
        panels, rest = raw[: out_features * granules].split([full * granules, (out_features - full) * granules])
        by_feature = panels.view(full // PANEL, granules, PANEL).transpose(1, 2).reshape(full, granules)
        rows = torch.cat([by_feature, rest.view(granules, out_features - full).t()])
    return rows.contiguous().view(packed.dtype)


def stores_steps(in_features: int, spec: TensorSpec) -> bool:
    """Whether the steps of a weight's rows stand behind its scales: stepped ones, where a row holds enough beside them.

    What fills up K counts too. The products of other rows scale each granule.
    """
    scale_bits, padding = 8 * spec.scale_dtype.itemsize, -in_features % BLOCK_K
    row_bits = in_features * spec.format.bits + scale_bits * granules_along(in_features, spec)
    return spec.scale == "stepped" and PARTS * (padding * spec.format.bits + scale_bits) <= row_bits


def steps_of(scale: Tensor) -> Tensor:
    """The step [N] of each row of stepped scales [N, granules], bfloat16: the largest that all are whole multiples of.

    0 of a row of zeros; NaN where a scale is NaN. Raises `UnevenScales` where one is no multiple, more than MOST_STEPS
    of it, or negative; and where the step is subnormal, since its reciprocal may be no number.
    """
    if not scale.shape[1]:
        return scale.new_zeros(scale.shape[0])
    values = scale.float()
    top, blank = values.amax(1, keepdim=True), values == 0
    # In units of 2^-11 of the top's power of two, what is at least a sixteenth of the top is whole, and less than 2^12.
    power = (top.view(torch.int32) & _EXPONENT).view(torch.float32)
    units = values / power * _UNITS
    whole = units.to(torch.int32)
    step = _common_divisor(whole).float() / _UNITS * power
    even = ((units == whole) & ((whole > 0) | blank)).all(1, keepdim=True)
    even &= (top <= MOST_STEPS * step) & (step >= torch.finfo(torch.float32).tiny)
    known = blank.all(1, keepdim=True) | top.isnan()
    if bool((uneven := ~(even | known)).any()):
        raise UnevenScales(int(uneven.flatten().nonzero()[0]), MOST_STEPS)
    return torch.where(known, top.abs(), step).flatten().to(scale.dtype)


def _common_divisor(whole: Tensor) -> Tensor:
    """The greatest of each row of whole numbers [N, at least 1]: [N, 1]."""
    while (columns := whole.shape[1]) > 1:
        pairs = columns // 2
        divisors = torch.gcd(whole[:, :pairs], whole[:, columns - pairs :])
        whole = torch.cat([divisors, whole[:, pairs : columns - pairs]], 1)
    return whole


def rows_spec(spec: TensorSpec) -> TensorSpec:
    """The spec whose scales are those of `unpack_granules`: by channel, or by group along K."""
    size = spec.granularity.size
    return dataclasses.replace(spec, granularity=group(size) if size else CHANNEL)


def fits_panels(spec: TensorSpec) -> bool:
    """True if a weight [N, K] of that spec has a panel form: of channels, only those of axis 0, written as 0."""
    return spec.granularity.kind in ("tensor", "token", "group", "block") or spec.granularity == CHANNEL


def _blocks(in_features: int) -> int:
    return (in_features + BLOCK_K - 1) // BLOCK_K


def granules_along(in_features: int, spec: TensorSpec) -> int:
    """How many numbers a row has."""
    if spec.granularity.kind not in ("group", "block"):
        return 1
    return (in_features + spec.granularity.size - 1) // spec.granularity.size


def _flip(spec: TensorSpec) -> int:
    return 2 ** (spec.format.bits - 1) if spec.format.kind == "int" and not spec.has_zero_point else 0


def plane_widths(bits: int) -> list[int]:
    """The bits of a code that each plane holds: the powers of two in `bits`, widest first."""
    return [width for width in (8, 4, 2, 1) if bits & width]
