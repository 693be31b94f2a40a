"""Every code of every format, decoded by the kernels' functions and by numerics: the same values, bit by bit."""

# Triton reads the jit functions, not Python: a constexpr is a plain value there, and tensors take any index.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fxquant.numerics.small_floats import code_values
from fxquant.numerics.tiles import chunk_width, pack_tiles, part_width, parts_of, tile_flip
from fxquant.spec import FORMATS, TensorSpec, number_format
from fxquant.triton_kernels.decode import fits_float16, format_meta, load_patterns, scale_value, widen

SMALL = [f"fp{1 + x + y}_e{x}m{y}" for x in range(1, 8) for y in range(7) if 3 <= 1 + x + y <= 8]
NAMES = sorted({*FORMATS, *SMALL})
OUT = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _widen_all(
    patterns_ptr, zero_ptr, out_ptr, SIZE: tl.constexpr, OUT: tl.constexpr, AFFINE: tl.constexpr, COLUMN: tl.constexpr,
    BITS: tl.constexpr,
    EXPONENT: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr, CENTRE: tl.constexpr, FLIP: tl.constexpr,
    NANS: tl.constexpr, BY_UNIT: tl.constexpr = False,
):  # fmt: skip
    at = tl.arange(0, SIZE)
    patterns, zero = tl.load(patterns_ptr + at).to(tl.uint32), tl.load(zero_ptr + at)
    value = widen(patterns, zero, OUT, COLUMN, BITS, EXPONENT, MANTISSA, BIAS, CENTRE, FLIP, NANS, BY_UNIT, AFFINE)
    if tl.bfloat16 == OUT:
        tl.store(out_ptr + at, value.to(tl.uint16, bitcast=True))
    else:
        tl.store(out_ptr + at, value)


@triton.jit
def _load_all(
    tiles_ptr, out_ptr, row_bytes, ROWS: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr, BITS: tl.constexpr,
    EXPONENT: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr, CENTRE: tl.constexpr, FLIP: tl.constexpr,
    NANS: tl.constexpr, BY_UNIT: tl.constexpr = False,
):  # fmt: skip
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, STEP)[None, :]
    for chunk in range(2):
        at = tiles_ptr + rows * row_bytes + chunk * (CHUNK * BITS // 8) + columns
        for column in tl.static_range(0, CHUNK, STEP):
            patterns = load_patterns(at, 0, 0, None, column, BITS, "pointers")
            value = widen(
                patterns, 0, tl.float32, column, BITS, EXPONENT, MANTISSA, BIAS, CENTRE, FLIP, NANS, BY_UNIT, False
            )  # fmt: skip
            tl.store(out_ptr + (rows * 2 + chunk) * CHUNK + column + columns, value)


@triton.jit
def _scales(raw_ptr, out_ptr, SIZE: tl.constexpr, SCALE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out_ptr + at, scale_value(tl.load(raw_ptr + at), SCALE))


def _widened(
    patterns: Tensor,
    zero: Tensor,
    spec: TensorSpec,
    dtype: torch.dtype,
    part: int = 0,
    affine: bool = False,
    **options: bool,
) -> Tensor:
    """The values of the patterns as they lie in that part of a chunk, among bits of other codes."""
    bits = spec.format.bits
    if bits in (2, 4):
        others = 0xA5 & ~((2**bits - 1) << (bits * part))
        patterns = (patterns << (bits * part)) | others
    held = torch.int16 if dtype == torch.bfloat16 else dtype
    out = torch.empty(patterns.numel(), dtype=held)
    _widen_all[(1,)](
        patterns, zero, out, patterns.numel(), OUT[dtype], affine, 64 * part, **format_meta(spec), **options
    )
    return out.view(dtype)


def _same_bits(got: Tensor, want: Tensor) -> None:
    bits = torch.int32 if got.dtype == torch.float32 else torch.int16
    assert torch.equal(got.isnan(), want.isnan())
    number = ~want.isnan()
    assert torch.equal(got[number].view(bits), want[number].view(bits))


@pytest.mark.parametrize("dtype", OUT, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_code(name: str, dtype: torch.dtype) -> None:
    """Each pattern, in each part of a chunk, widens to the value that numerics gives it."""
    spec = TensorSpec.parse(f"{name}/channel")
    if dtype == torch.float16 and not fits_float16(spec):
        return
    want = code_values(number_format(name)).to(dtype)
    held = (torch.arange(2**spec.format.bits) ^ tile_flip(spec)).to(torch.uint8)
    for part in range(parts_of(spec.format.bits)):
        _same_bits(_widened(held, held, spec, dtype, part), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_float8_by_the_target_itself(dtype: torch.dtype) -> None:
    """Where it has an instruction; the interpreter's cast knows no NaN. Formats without one decode as ever."""
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz"):
        values = code_values(number_format(name))
        patterns = torch.arange(256)[~values.isnan()].to(torch.uint8)
        patterns = torch.cat([patterns, patterns[:1].expand(256 - len(patterns))])
        got = _widened(patterns, patterns, TensorSpec.parse(f"{name}/channel"), dtype, BY_UNIT=True)
        _same_bits(got, values[patterns.int()].to(dtype))


def test_what_fits_float16() -> None:
    """A format is said to fit float16 only if all of its values are the same there."""
    for name in NAMES:
        values = code_values(number_format(name))
        if fits_float16(TensorSpec.parse(f"{name}/channel")):
            assert torch.equal(values.half().float().nan_to_num(0.5), values.nan_to_num(0.5)), name
    assert not fits_float16(TensorSpec.parse("fp7_e5m1/channel"))  # 98304 is beyond float16


@pytest.mark.parametrize("dtype", OUT, ids=str)
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_code_with_a_zero_point(bits: int, dtype: torch.dtype) -> None:
    spec = TensorSpec.parse(f"int{bits}/channel/affine")
    codes = torch.arange(2**bits)
    for zero in (0, 1, 2**bits // 2, 2**bits - 1):
        zeros = torch.full_like(codes, zero).to(torch.uint8)
        for part in range(parts_of(bits)):
            got = _widened(codes.to(torch.uint8), zeros, spec, dtype, part, affine=True)
            _same_bits(got, (codes - zero).to(dtype))


@pytest.mark.parametrize("bits", range(2, 9))
def test_patterns_out_of_tiles(bits: int) -> None:
    """Random patterns, packed by numerics, come back from every column, in whole parts and in parts of 16 columns."""
    spec = TensorSpec.parse(f"int{bits}/channel/shift")
    chunk = chunk_width(bits)
    torch.manual_seed(bits)
    codes = torch.randint(0, 2**bits, (4, 2 * chunk), dtype=torch.uint8)
    tiles = pack_tiles(codes, spec)
    for step in (part_width(bits), 16):
        out = torch.empty(codes.shape)
        _load_all[(1,)](tiles, out, tiles.shape[1], 4, chunk, step, **format_meta(spec))
        assert torch.equal(out, codes.float())


@pytest.mark.parametrize(("scale", "dtype"), [("e8m0", torch.float8_e8m0fnu), ("e4m3", torch.float8_e4m3fn)])
def test_every_scale(scale: str, dtype: torch.dtype) -> None:
    raw = torch.arange(256).to(torch.uint8)
    if scale == "e4m3":
        raw[128:] = 0  # a scale has no sign
    out = torch.empty(256)
    _scales[(1,)](raw, out, 256, scale)
    _same_bits(out, raw.view(dtype).float())
