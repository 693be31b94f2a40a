"""Convolutions of the model door against torch's own with rounded weights, and against float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxquant
from fxquant.nn import recording
from fxquant.ops import reference
from tests.kernels.cpu_helpers import U_OUT, assert_equal
from tests.nn.kinds import (
    CONVOLUTIONS,
    DTYPES,
    FORMATS,
    PRODUCTS,
    TRANSPOSED,
    Kind,
    assert_near,
    exact,
    exact_gradient,
    matrix_of,
    quantized,
    rounded_input,
    with_rounded_weight,
)

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")  # torch's own, of even kernels
ALL = {**CONVOLUTIONS, **TRANSPOSED}
kinds = pytest.mark.parametrize("kind", ALL.values(), ids=ALL)
DYNAMIC = {
    "w=int8/channel x=int8/token": "int8/sample",
    "w=int4/group32/stepped x=int8/token": "int8/sample",
    "w=int8/channel x=int8/tensor": "int8/tensor",
    "w=float8_e4m3fn/channel x=float8_e4m3fn/token": "float8_e4m3fn/sample",
    "w=float8_e4m3fn/tensor x=float8_e4m3fn/tensor": "float8_e4m3fn/tensor",
    "w=mxfp4 x=mxfp4": "",  # groups of features are not neighbours in x
}


@pytest.fixture
def recorder() -> Iterator[list[Tensor]]:
    """What a calibration would be told: inputs and outputs in turn."""
    seen: list[Tensor] = []

    class Listening:
        def record_call(self, module: nn.Module) -> None: ...

        def record_input(self, module: nn.Module, x: Tensor) -> None:
            seen.append(x)

        def record_output(self, module: nn.Module, y: Tensor) -> None:
            seen.append(y)

    listening = Listening()
    recording.ACTIVE.append(listening)
    yield seen
    recording.ACTIVE.remove(listening)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", FORMATS)
@kinds
def test_the_weight_is_rounded_then_frozen(kind: Kind, spec: str, dtype: torch.dtype) -> None:
    module, x = kind.module(dtype), kind.input(dtype)
    want, near = with_rounded_weight(module, spec, dtype), exact(module, spec, x)
    q = quantized(module, f"w={spec}")
    assert_equal(q(x), want(x))
    q.freeze()
    assert q.is_frozen
    assert "weight" not in dict(q.named_parameters())
    assert_equal(q.weight, want.get_parameter("weight").detach())
    if q.has_kernels():
        assert_near(q(x), near)
    else:
        assert_equal(q(x), want(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", DYNAMIC)
@kinds
def test_activations_are_rounded_by_sample(kind: Kind, config: str, dtype: torch.dtype) -> None:
    module, x = kind.module(dtype), kind.input(dtype)
    spec = config.split()[0].removeprefix("w=")
    want = with_rounded_weight(module, spec, dtype)
    rounded = rounded_input(x, DYNAMIC[config], dtype)
    within = DYNAMIC[config] == "int8/sample" and spec == "int8/channel"  # codes by scale, not rounded to x's dtype
    near = exact(module, spec, rounded_input(x, "int8/sample", torch.float64) if within else rounded)
    q = quantized(module, config)
    assert_equal(q(x), want(rounded))
    q.freeze()
    if q.has_kernels():
        assert_near(q(x), near)
    else:
        assert_equal(q(x), want(rounded))


@pytest.mark.parametrize("spec", ["int8/channel", "int4/group32/stepped", "float8_e4m3fn/channel"])
@kinds
def test_a_calibrated_scale_is_used(kind: Kind, spec: str) -> None:
    module, x, scale = kind.module(), kind.input(), torch.tensor(0.01)  # of ranges beyond 1.27 something is cut off
    static = f"{'float8_e4m3fn' if spec.startswith('float8') else 'int8'}/tensor"
    rounded = reference.fake_quantize_static(x, scale, static)
    want, near = with_rounded_weight(module, spec, torch.float32), exact(module, spec, rounded)
    q = quantized(module, f"w={spec}", activations=static.partition("/")[0])
    q.input_scale = scale
    assert_equal(q(x), want(rounded))
    q.freeze()
    assert_near(q(x), near)


@pytest.mark.parametrize("config", DYNAMIC)
@pytest.mark.parametrize("static", [False, True])
@kinds
def test_while_recording_activations_are_float(recorder: list[Tensor], kind: Kind, config: str, static: bool) -> None:
    module, x = kind.module(), kind.input()
    spec = config.split()[0].removeprefix("w=")
    want, near = with_rounded_weight(module, spec, torch.float32), exact(module, spec, x)
    q = quantized(module, config)
    q.input_scale = torch.tensor(0.001) if static else None
    assert_equal(q(x), want(x))
    q.freeze()
    y = q(x)
    assert_near(y, near)
    assert [t is x for t in recorder] == [True, False, True, False]
    assert recorder[3] is y


@pytest.mark.parametrize("frozen", [False, True])
@kinds
def test_an_input_without_a_batch_is_one_sample(kind: Kind, frozen: bool) -> None:
    x = kind.input()
    q = quantized(kind.module(), "int8dq")
    if frozen:
        q.freeze()
    y = q(x[0])
    assert y.dim() == x.dim() - 1
    assert_equal(y, q(x[:1])[0])


@pytest.mark.parametrize("frozen", [False, True])
@kinds
def test_an_empty_batch_has_an_empty_answer(kind: Kind, frozen: bool) -> None:
    x, module = kind.input(), kind.module()
    shape = module(x).shape
    q = quantized(module, "int8wo")
    if frozen:
        q.freeze()
    assert q(x[:0]).shape == (0, *shape[1:])


@pytest.mark.parametrize("config", ["int8dq", "int4wo"])
@pytest.mark.parametrize("name", ["2d", "2d-no-bias", "2d-uneven", "2d-reflect", "2d-groups", "2d-transposed"])
def test_channels_last_stays_so(name: str, config: str) -> None:
    kind = ALL[name]
    module, x = kind.module(), kind.input().to(memory_format=torch.channels_last)
    want = module(x).stride()
    q = quantized(module, config)
    plain = q(x.contiguous())
    torch.testing.assert_close(q(x), plain)
    assert q(x).stride() == want
    q.freeze()
    torch.testing.assert_close(q(x), plain)
    assert q(x).stride() == want


def test_a_weight_in_channels_last_has_the_same_codes() -> None:
    kind = ALL["2d"]
    plain, last = kind.module(), kind.module().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    for module in (plain, last):
        quantized(module, "int8dq").freeze()
    assert_equal(last(kind.input()), plain(kind.input()))


@pytest.mark.parametrize("name", TRANSPOSED)
def test_output_size_is_kept(name: str) -> None:
    kind = TRANSPOSED[name]
    module, x = kind.module(), kind.input()
    assert isinstance(module.stride, tuple)
    largest = [n + s - 1 for n, s in zip(module(x).shape[2:], module.stride, strict=True)]
    if name == "2d-transposed-groups":
        largest = list(module(x).shape[2:])
    elif name == "2d-transposed":
        largest = [n - 1 for n in module(x).shape[2:]]  # its output_padding is set aside
    want = with_rounded_weight(module, "int8/channel", torch.float32)
    q = quantized(module, "int8wo")
    for _ in range(2):
        assert_equal(q(x, largest), want(x, largest))
        assert_equal(q(input=x, output_size=largest), want(x, largest))
        assert_equal(q(x[0], largest), want(x[0], largest))
        with pytest.raises(ValueError, match="requested an output size"):
            q(x, [n + 99 for n in largest])
        q.freeze()


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_matrix_has_a_row_for_each_output(name: str) -> None:
    kind = PRODUCTS[name]
    module = kind.module()
    assert isinstance(module.weight, Tensor)
    weight = module.weight.detach().clone()
    q = quantized(module, "int8wo")
    assert_equal(q.matrix(weight), matrix_of(module, weight))
    assert_equal(q.unmatrix(q.matrix(weight)), weight)
    assert q.matrix_shape() == tuple(matrix_of(module, weight).shape)
    q.freeze()
    assert q.matrix_shape() == tuple(matrix_of(module, weight).shape)


@pytest.mark.parametrize("name", TRANSPOSED)
def test_a_large_output_feature_does_not_coarsen_another(name: str) -> None:
    kind = TRANSPOSED[name]
    module, x = kind.module(), kind.input()
    plain = copy.deepcopy(module)
    with torch.no_grad():
        assert isinstance(module.weight, Tensor)
        module.weight[:, 0] *= 1000
    groups = module.groups
    assert isinstance(groups, int)
    outputs = module.weight.shape[1]
    others = [index for index in range(outputs * groups) if index % outputs]
    y, want = quantized(module, "int8wo")(x), quantized(plain, "int8wo")(x)
    assert_equal(y[:, others], want[:, others])


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv1d(4, 6, 3)
        self.up = nn.ConvTranspose1d(6, 4, 3)
        self.up.weight = self.down.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


def test_a_transposed_convolution_that_shares_its_weight_has_codes_of_its_own() -> None:
    torch.manual_seed(0)
    model, x = Autoencoder(), torch.randn(2, 4, 9)
    down = with_rounded_weight(model.down, "int8/channel", torch.float32)
    up, near = with_rounded_weight(model.up, "int8/channel", torch.float32), exact(model.down, "int8/channel", x)
    fxquant.quantize(model, "int8wo")
    assert_equal(model(x), up(down(x)))
    fxquant.freeze(model)
    assert_near(model.down(x), near)
    y = model.down(x)
    assert_equal(model.up(y), up(y))


class Seen(TorchDispatchMode):
    """The ops that run, and the largest float tensor that one of them makes."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []
        self.floats: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.ops.append(str(func))
        self.floats += [tuple(t.shape) for t in [made] if isinstance(t, Tensor) and t.is_floating_point()]
        return made


@pytest.mark.parametrize(
    ("config", "op"),
    [
        ("int8dq", "fxquant.int8_conv_dynamic.default"),
        ("int8wo", "fxquant.conv_weight_only.default"),
        ("int4wo", "fxquant.conv_weight_only.default"),
        ("nvfp4wo", "fxquant.conv_weight_only.default"),
    ],
)
@pytest.mark.parametrize("name", [name for name in CONVOLUTIONS if "groups" not in name and "depthwise" not in name])
def test_kernels_read_the_codes(name: str, config: str, op: str) -> None:
    kind = CONVOLUTIONS[name]
    module, x = kind.module(), kind.input()
    assert isinstance(module.weight, Tensor)
    shape = tuple(module.weight.shape)
    q = quantized(module, config)
    q.freeze()
    with Seen() as seen, torch.no_grad():
        q(x)
    assert op in seen.ops
    assert shape not in seen.floats
    assert tuple(q.matrix_shape()) not in seen.floats


def test_a_static_convolution_runs_on_its_kernel() -> None:
    kind = CONVOLUTIONS["2d"]
    q = quantized(kind.module(), "int8wo", activations="int8")
    q.input_scale = torch.tensor(0.02)
    q.freeze()
    with Seen() as seen, torch.no_grad():
        q(kind.input())
    assert "fxquant.int8_conv_static.default" in seen.ops


@pytest.mark.parametrize("config", ["w=int8/channel", "w=int4/group32/affine/bf16", "w=int8/channel x=int8/token"])
@kinds
def test_gradients_are_those_of_the_rounded_module(kind: Kind, config: str) -> None:
    module, x = kind.module(), kind.input().requires_grad_()
    spec = config.split()[0].removeprefix("w=")
    want = with_rounded_weight(module, spec, torch.float32)
    given = rounded_input(x.detach(), "int8/sample" if "x=" in config else "", torch.float32).requires_grad_()
    y = want(given)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(grad)
    near = exact_gradient(module, spec, x, grad)
    q = quantized(module, config)
    q(x).backward(grad)
    assert given.grad is not None
    assert x.grad is not None
    assert_equal(x.grad, given.grad)
    for name, parameter in q.named_parameters():
        assert parameter.grad is not None
        assert_equal(parameter.grad, want.get_parameter(name).grad)  # pyright: ignore[reportArgumentType]
    q.freeze()
    frozen = x.detach().requires_grad_()
    q(frozen).backward(grad)
    assert frozen.grad is not None
    assert_near(frozen.grad, near)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["2d", "2d-groups", "2d-transposed"])
def test_autocast_gives_its_dtype(name: str, dtype: torch.dtype) -> None:
    kind = ALL[name]
    module, x = kind.module(), kind.input()
    near = exact(module, "int8/channel", x, operands=2 * U_OUT[dtype])
    q = quantized(module, "int8wo")
    with torch.autocast("cpu", dtype=dtype):
        assert_near(q(x), near)
        q.freeze()
        y = q(x)
    assert y.dtype == dtype
    assert_near(y, near)
