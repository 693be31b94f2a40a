"""The ops as a GPU runs them: from the op's arguments to a kernel and back, by the interpreter on CPU tensors."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from fxquant import triton_kernels
from fxquant.errors import NoGpuKernelWarning
from fxquant.ops import fitting, gpu, reference
from fxquant.spec import TensorSpec
from fxquant.target import ARCHS, KernelConfig, Problem, Target
from fxquant.triton_kernels import KERNELS, kernels_for
from fxquant.triton_kernels.launching import guarded, recorded
from fxquant.tuning import lookup
from fxquant.tuning.compiling import empty_operands
from tests.test_ops_tiled import Case, K, N

SM90 = ARCHS["sm90"]
REFERENCE: Any = reference  # operands are put together as tuples of any length
GPU: Any = gpu
U16 = 2.0**-11


@pytest.fixture(autouse=True)
def on_sm90(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors count as those of an H100; a warning is an error unless a test expects it."""
    monkeypatch.setattr(gpu, "arch_on", lambda device: "sm90")
    warnings.simplefilter("error", NoGpuKernelWarning)
    GPU._warn.cache_clear()
    GPU.forget_plans()


def half(t: Tensor) -> Tensor:
    return t.to(torch.float16)


def close(got: Tensor, want: Tensor, size: float) -> None:
    """Both round a float32 sum of terms whose absolute values add up to `size` at most."""
    assert (got.dtype, got.shape, got.stride()) == (want.dtype, want.shape, want.stride())
    error = (got.double() - want.double()).abs()
    assert (error <= 2 * U16 * want.double().abs() + 4 * K * 2.0**-24 * size).all(), float(error.max())


def on_kernel(op: Any, *args: Any) -> Any:
    """The result of an op's kernel, which must not have written elsewhere."""
    with guarded():
        return op(*args)


@pytest.mark.parametrize("text", ["int8/channel", "int4/group32/affine/bf16", "fp6_e3m2/channel"])
@pytest.mark.parametrize("activation", ["", "gelu"])
def test_tiled_linear(text: str, activation: str) -> None:
    c = Case(text)
    args = (half(c.x), *c.parts, half(c.bias), half(c.residual), activation, K, c.text, torch.float16)
    plan = lookup(Problem("linear", 0, N, K, c.text, "", "float16"), Target("cuda", arch="sm90")).to_ints()
    want = REFERENCE.tiled_linear(*args, plan)
    for given in (plan, []):
        close(on_kernel(GPU.tiled_linear, *args, given), want, 400.0)


@pytest.mark.parametrize(
    ("x_text", "text"),
    [
        ("int8/token", "int8/channel"),
        ("int8/tensor", "int8/channel"),
        ("int8/token", "int4/group32/bf16"),
        ("int8/token", "int4/group32/stepped"),
        ("float8_e4m3fn/token", "float8_e4m3fn/channel"),
        ("float8_e4m3fn/tensor", "float8_e4m3fn/tensor"),
    ],
)
def test_tiled_linear_of_codes(x_text: str, text: str) -> None:
    c = Case(text, x_text)
    args = (*c.of_codes(half(c.bias), half(c.residual), "silu")[:-2], torch.float16)
    plan = lookup(Problem("linear", 0, N, K, c.text, str(c.x_spec), "float16"), Target("cuda", arch="sm90")).to_ints()
    assert plan
    close(on_kernel(GPU.tiled_linear_codes, *args, plan), REFERENCE.tiled_linear_codes(*args, plan), 400.0)


def test_four_bit_codes_are_packed_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "arch_on", lambda device: "sm100")
    problem = Problem("linear", 6, N, K, str(TensorSpec.parse("mxfp4")), str(TensorSpec.parse("mxfp4")), "float16")
    if not kernels_for(problem, ARCHS["sm100"]):
        pytest.skip("no kernel takes it")
    c = Case("mxfp4", "mxfp4")
    for packed in (True, False):
        args = (*c.of_codes(half(c.bias), packed=packed)[:-2], torch.float16)
        close(on_kernel(GPU.tiled_linear_codes, *args, []), REFERENCE.tiled_linear_codes(*args, []), 400.0)


def test_a_float32_x_with_a_half_result_is_computed_in_float32() -> None:
    c = Case("int4/group32/affine/bf16")
    args = (c.x, *c.parts, None, half(c.residual), "", K, c.text, torch.float16, [])
    close(on_kernel(GPU.tiled_linear, *args), REFERENCE.tiled_linear(*args), 400.0)


def test_a_plan_of_another_version_is_not_used() -> None:
    c = Case("int8/channel")
    args = (half(c.x), *c.parts, None, None, "", K, c.text, torch.float16)
    want = REFERENCE.tiled_linear(*args, [])
    for plan in ([8192, 12345, 1, 7], [8192]):
        close(on_kernel(GPU.tiled_linear, *args, plan), want, 400.0)


def test_a_configuration_that_is_for_another_architecture_is_not_used() -> None:
    """It may want more shared memory than there is."""
    problem = Problem("linear", 8192, 4096, 4096, "int8/channel", "int8/token", "float16")
    theirs = lookup(problem, Target("cuda", arch="sm90")).to_ints()
    for arch in ("sm89", "sm90", "gfx942"):
        config = GPU.config_for(theirs, problem, arch)
        kernel = KERNELS[config.kernel]
        assert config in kernel.candidates(problem, ARCHS[arch])


def test_a_plan_of_another_architecture_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exported graph may come to another GPU, which multiplies fewer formats."""
    c = Case("mxfp8", "mxfp8")
    plan = lookup(Problem("linear", 0, N, K, c.text, str(c.x_spec), "float16"), Target("cuda", arch="sm100")).to_ints()
    args = (*c.of_codes()[:-2], torch.float16)
    if kernels_for(Problem("linear", 6, N, K, c.text, str(c.x_spec), "float16"), SM90):
        pytest.skip("sm90 takes it too")
    with pytest.warns(NoGpuKernelWarning, match="no Triton kernel takes a linear of .* on sm90"):
        got = GPU.tiled_linear_codes(*args, plan)
    assert torch.equal(got, REFERENCE.tiled_linear_codes(*args, plan))


def test_an_old_gpu_runs_the_reference_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "arch_on", lambda device: "")
    c = Case("int8/channel")
    args = (half(c.x), *c.parts, None, None, "", K, c.text, torch.float16, [])
    with pytest.warns(NoGpuKernelWarning, match="no Triton kernel takes a linear of int8/channel on this GPU"):
        got = GPU.tiled_linear(*args)
    assert torch.equal(got, REFERENCE.tiled_linear(*args))
    assert torch.equal(GPU.tiled_linear(*args), got)  # a second warning would be an error


@pytest.mark.parametrize("spec", ["int8/token", "int8/tensor", "int8/sample"])
def test_quantize_dynamic(spec: str) -> None:
    x = half(Case("int8/channel").x)
    for got, want in zip(on_kernel(GPU.quantize_dynamic, x, spec), REFERENCE.quantize_dynamic(x, spec), strict=True):
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        assert torch.equal(got, want)


def test_the_other_makers_of_codes() -> None:
    x, scale = half(Case("int8/channel").x), torch.tensor([0.02])
    pairs = [
        (on_kernel(GPU.int8_quantize_per_token, x), REFERENCE.int8_quantize_per_token(x)),
        (on_kernel(GPU.quantize_static, x, scale, "int8/tensor"), REFERENCE.quantize_static(x, scale, "int8/tensor")),
        ([on_kernel(GPU.fake_quantize, x, "int8/token")], [REFERENCE.fake_quantize(x, "int8/token")]),
    ]
    for got, want in pairs:
        for one, other in zip(got, want, strict=True):
            assert (one.dtype, one.shape) == (other.dtype, other.shape)
            assert torch.equal(one, other)


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_norm_quantize(norm: str) -> None:
    c = Case("int8/channel")
    weight, bias = torch.rand(K) + 0.5, torch.rand(K) if norm == "layernorm" else None
    args = (half(c.x), norm, half(weight), None if bias is None else half(bias), 1e-5, "int8/token")
    codes, scale, _ = on_kernel(GPU.norm_quantize, *args)
    want, want_scale, _ = REFERENCE.norm_quantize(*args)
    assert (codes.int() - want.int()).abs().max() <= 1
    torch.testing.assert_close(scale, want_scale, rtol=2 * U16, atol=0)


@pytest.mark.parametrize("text", ["int8/channel", "int4/group32/affine/bf16"])
def test_embedding_dequantize(text: str) -> None:
    c = Case(text)
    rows = REFERENCE.pack_rows(c.codes, c.text)
    zero = c.zero_point if c.spec.has_zero_point else None
    args = (torch.tensor([[0, 64, 3], [3, 1, 2]]), rows, c.scale, zero, c.tensor_scale, K, c.text, torch.float16)
    assert torch.equal(on_kernel(GPU.embedding_dequantize, *args), REFERENCE.embedding_dequantize(*args))


def spread_out(value: Any) -> Any:
    """Tensors with other elements between theirs, as views of larger ones have them."""
    if not isinstance(value, Tensor):
        return value
    wide = torch.stack([value, value.flip(0)], -1)
    return wide[..., 0]


def test_operands_may_be_views_of_other_tensors() -> None:
    c, codes = Case("int4/group32/affine/bf16"), Case("int4/group32/affine/bf16", "int8/token")
    args = (half(c.x), *c.parts, half(c.bias), half(c.residual), "silu", K, c.text, torch.float16, [])
    of_codes = codes.of_codes(codes.bias, codes.residual)
    x, weight = half(torch.randn(3, K)), half(torch.rand(K))
    for op, given in (
        (GPU.tiled_linear, args),
        (GPU.tiled_linear_codes, of_codes),
        (GPU.quantize_dynamic, (x, "int8/token")),
        (GPU.norm_quantize, (x, "layernorm", weight, weight, 1e-5, "int8/token")),
    ):
        got, want = on_kernel(op, *map(spread_out, given)), op(*given)
        for one, other in zip(*((r,) if isinstance(r, Tensor) else r for r in (got, want)), strict=True):
            assert torch.equal(one, other)


def test_a_row_of_x_may_stand_for_many() -> None:
    c = Case("int8/channel", "int8/token")
    codes, *rest = c.of_codes()
    same = codes[:1, :1].expand_as(codes)
    got = GPU.tiled_linear_codes(same, *rest)
    assert torch.equal(got, GPU.tiled_linear_codes(same.contiguous(), *rest))


@pytest.mark.parametrize("text", ["int8/channel", "int4/group32/affine/bf16"])
def test_kernels_are_launched_on_the_gpu_where_the_operands_are(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current one, whatever its arguments say."""
    made: list[tuple[int, ...]] = []
    guard = torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda t: [made.append(tuple(t.shape)), guard(t)][1])
    c = Case(text)
    GPU.tiled_linear(half(c.x), *c.parts, None, None, "", K, c.text, torch.float16, [])
    GPU.quantize_dynamic(half(c.x), "int8/token")
    rows = REFERENCE.pack_rows(c.codes, c.text)
    zero = c.zero_point if c.spec.has_zero_point else None
    GPU.embedding_dequantize(torch.tensor([1]), rows, c.scale, zero, None, K, c.text, torch.float16)
    assert made == [(6, K), (6, K), tuple(rows.shape)]


def test_a_gpu_with_less_shared_memory_runs_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """8.6 gets configurations of 8.0."""
    c = Case("int8/channel", "int8/token")
    want, launch, tried = GPU.tiled_linear_codes(*c.of_codes()), triton_kernels.launch_by, []

    def limited(config: KernelConfig, operands: Any) -> Any:
        tried.append(config)
        if len(tried) < 3:
            raise OutOfResources(200 * 1024, 99 * 1024, "shared memory")
        return launch(config, operands)

    monkeypatch.setattr(triton_kernels, "launch_by", limited)
    monkeypatch.setattr(fitting, "_INSTEAD", {})
    close(GPU.tiled_linear_codes(*c.of_codes()), want, 400.0)
    assert len(tried) == 3
    close(GPU.tiled_linear_codes(*c.of_codes()), want, 400.0)
    assert tried[2:] == [tried[2]] * 2


@pytest.mark.parametrize(
    ("op", "x_text", "text"),
    [
        ("linear", "int8/token", "int8/channel"),
        ("linear", "float8_e4m3fn/token", "float8_e4m3fn/channel"),
        ("linear", "int8/token", "int4/group128"),
        ("linear", "", "int4/group128"),
        ("linear", "mxfp8", "mxfp8"),
        ("quantize", "int8/token", ""),
        ("quantize", "mxfp8", ""),
        ("embedding", "", "int4/channel"),
    ],
)
def test_grids_are_within_the_limits_of_cuda(op: Any, x_text: str, text: str) -> None:
    """65535 along all axes but the first: also for what few rows of x get, which may be the last row of a plan."""
    weights, activations = (str(TensorSpec.parse(t)) if t else "" for t in (text, x_text))
    n = 0 if op == "quantize" else 64
    few, many = (Problem(op, m, n, 8192, weights, activations, "float16") for m in (17, 2**19))
    for arch in (ARCHS["sm80"], ARCHS["sm100"]):
        for kernel in kernels_for(few, arch):
            with recorded() as launches:
                for config in kernel.candidates(few, arch):
                    kernel.run(empty_operands(many), config)
            assert launches
            assert all(count <= 65535 for launch in launches for count in launch.grid[1:]), kernel.name


def test_no_rows() -> None:
    c = Case("int8/channel", "int8/token")
    c.x = c.x[:0]
    args = (half(c.x), *c.parts, None, None, "", K, c.text, torch.float16, [])
    assert GPU.tiled_linear(*args).shape == (0, 3, N)
    assert GPU.tiled_linear_codes(*c.of_codes()).shape == (0, 3, N)
    assert GPU.quantize_dynamic(c.x, "int8/token")[1].shape == (0, 3, 1)


def test_where_the_kernels_are_registered() -> None:
    for name in ("tiled_linear", "tiled_linear_codes", "quantize_dynamic", "norm_quantize", "embedding_dequantize"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fxquant::{name}", "CUDA")
    assert Target.of_this_machine("cpu").arch == ""


def on_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def test_no_op_waits_for_the_device_or_reads_a_value() -> None:
    """A CUDA graph can hold a call only then; on the meta device there is no value to be read."""
    c, codes, table = Case("int4/group32/affine/bf16"), Case("int8/channel", "int8/token"), Case("int8/channel")
    half_x, rows = half(c.x), REFERENCE.pack_rows(table.codes, table.text)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (GPU.tiled_linear, (half_x, *c.parts, half(c.bias), half(c.residual), "silu", K, c.text, torch.float16, [])),
        (GPU.tiled_linear_codes, codes.of_codes(codes.bias, codes.residual)),
        (GPU.quantize_dynamic, (half_x, "int8/token")),
        (GPU.quantize_dynamic, (half_x, "float8_e4m3fn/tensor")),
        (GPU.quantize_static, (half_x, torch.tensor([0.02]), "int8/tensor")),
        (GPU.norm_quantize, (half_x, "rmsnorm", half(torch.rand(K)), None, 1e-6, "int8/token")),
        (
            GPU.embedding_dequantize,
            (torch.tensor([3, 0]), rows, table.scale, None, None, K, table.text, torch.float16),
        ),
    ]
    for op, args in calls:
        with recorded() as launches:
            result = op(*map(on_meta, args))
        assert launches, op
        wanted = getattr(reference, op.__name__)(*args)
        pairs = [(result, wanted)] if isinstance(result, Tensor) else list(zip(result, wanted, strict=True))
        for made, want in pairs:
            assert (made.shape, made.dtype, made.stride()) == (want.shape, want.dtype, want.stride())
            assert made.device.type == "meta"
