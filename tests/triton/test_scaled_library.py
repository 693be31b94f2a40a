"""int_mm and float8_mm: torch's products behind the operands of our kernels; torch has them on a CPU too."""

from __future__ import annotations

import pytest
import torch

from fxquant.target import ARCHS, KernelConfig
from fxquant.triton_kernels.launching import recorded
from fxquant.triton_kernels.library import FLOAT8_MM, INT_MM
from fxquant.triton_kernels.operands import linear_operands
from tests.triton.helpers import assert_within, operands_of, problem, strided
from tests.triton.scaled import FLOAT8, INT8, check_exact, check_rounding, exact_operands, sums64

INT_MM_CONFIG, FLOAT8_MM_CONFIG = KernelConfig("int_mm"), KernelConfig("float8_mm")


@pytest.mark.parametrize("shape", [(17, 32, 64), (33, 128, 264), (64, 8, 8), (5, 32, 64), (0, 32, 64)], ids=str)
def test_int_mm_has_the_bits_of_the_reference(shape: tuple[int, int, int]) -> None:
    made = exact_operands(problem(shape, *INT8), residual=True, activation="relu")
    check_exact(INT_MM, INT_MM_CONFIG, made)
    check_exact(INT_MM, INT_MM_CONFIG, strided(made))


@pytest.mark.parametrize("kind", [FLOAT8, ("float8_e4m3fn/tensor", "float8_e4m3fn/tensor")], ids=str)
@pytest.mark.parametrize("shape", [(1, 16, 16), (17, 32, 64), (33, 128, 272), (0, 32, 64)], ids=str)
def test_float8_mm_within_the_bound(shape: tuple[int, int, int], kind: tuple[str, str]) -> None:
    made = operands_of(problem(shape, *kind), residual=True, activation="relu")
    check_rounding(FLOAT8_MM, FLOAT8_MM_CONFIG, made)
    check_rounding(FLOAT8_MM, FLOAT8_MM_CONFIG, strided(made))


def test_float8_mm_gives_plain_bfloat16_results_by_itself() -> None:
    made = operands_of(problem((17, 32, 64), *FLOAT8, dtype="bfloat16"))
    sums, absolute = sums64(made)
    scale = made.x_scale.double() * made.scale.double()
    y64 = sums * scale + made.bias.double()
    bound = 2.0**-8 * y64.abs() + 2.0**-16 * (absolute * scale + y64.abs())
    assert_within(FLOAT8_MM.run(made, FLOAT8_MM_CONFIG), y64, bound)


def test_shape_rules_are_stated() -> None:
    sm90, fine = ARCHS["sm90"], (17, 64, 64)
    assert not INT_MM.why_not(problem(fine, *INT8), sm90)
    assert "17 rows or more, not 16" in INT_MM.why_not(problem((16, 64, 64), *INT8), sm90)
    assert "multiples of 8" in INT_MM.why_not(problem((17, 63, 64), *INT8), sm90)
    assert "multiples of 8" in INT_MM.why_not(problem((17, 64, 60), *INT8), sm90)
    assert "multiplies int8" in INT_MM.why_not(problem(fine, *FLOAT8), sm90)
    assert not FLOAT8_MM.why_not(problem(fine, *FLOAT8), sm90)
    assert "multiples of 16" in FLOAT8_MM.why_not(problem((17, 64, 72), *FLOAT8), sm90)
    assert "multiplies float8" in FLOAT8_MM.why_not(problem(fine, *INT8), sm90)
    assert "one side only" in FLOAT8_MM.why_not(problem(fine, "float8_e5m2/channel", "float8_e5m2/token"), sm90)
    for other in ("sm80", "gfx942"):
        assert other in FLOAT8_MM.why_not(problem(fine, *FLOAT8), ARCHS[other])


def test_runs_on_meta_tensors_with_one_launch_to_finish() -> None:
    for kernel, config, kind in ((INT_MM, INT_MM_CONFIG, INT8), (FLOAT8_MM, FLOAT8_MM_CONFIG, FLOAT8)):
        p = problem((33, 64, 128), *kind)
        with recorded() as launches:
            y = kernel.run(linear_operands(p), config)
        assert y.shape == (33, 64)
        assert y.dtype == torch.float16
        assert [launch.function.__name__ for launch in launches] == ["_finish_sums"]


def test_an_e5m2_weight_is_not_scaled_by_the_library() -> None:
    """Its product by row takes e4m3fn on that side only."""
    kind = ("float8_e5m2/channel", "float8_e4m3fn/token")
    with recorded() as launches:
        FLOAT8_MM.run(linear_operands(problem((32, 64, 64), *kind, dtype="bfloat16")), FLOAT8_MM_CONFIG)
    assert [launch.function.__name__ for launch in launches] == ["_finish_sums"]
