"""`weight` of a frozen module: a tensor to every reader, and a named error to every writer."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fxquant
from fxquant.errors import FrozenWeight


@pytest.fixture
def frozen() -> Any:
    torch.manual_seed(0)
    linear = nn.Linear(64, 8)
    fxquant.quantize(linear, weights="int8")
    fxquant.freeze(linear)
    return linear


def values(linear: Any) -> Tensor:
    return linear.quantized_weight().dequantize()


def test_shape_dtype_and_device_decode_nothing(frozen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Tensor:
        raise AssertionError("decoded")

    monkeypatch.setattr(type(frozen), "float_weight", fail)
    weight = frozen.weight
    facts = (weight.shape, weight.dtype, weight.device, weight.numel(), weight.size(0), weight.dim(), weight.ndim)
    assert facts == (torch.Size([8, 64]), torch.float32, torch.device("cpu"), 512, 8, 2, 2)
    assert (weight.requires_grad, weight.is_meta, weight.element_size(), weight.nbytes) == (False, False, 4, 2048)
    assert isinstance(weight, Tensor)
    assert not isinstance(weight, nn.Parameter)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_has_the_dtype_that_the_module_computes_in(frozen: Any, dtype: torch.dtype) -> None:
    assert frozen.to(dtype).weight.dtype is dtype
    assert torch.equal(frozen.weight + 0, values(frozen).to(dtype))


READS: list[Callable[[Tensor], Any]] = [
    lambda w: w + 0,
    lambda w: w.clone(),
    lambda w: w.data.clone(),
    lambda w: w.detach().to(torch.float64).float(),
    lambda w: torch.cat([w, w])[:8],
    lambda w: w.t().t(),
    lambda w: copy.deepcopy(w),
    lambda w: pickle.loads(pickle.dumps(w)),
    lambda w: torch.tensor(w.tolist()),
    lambda w: torch.from_numpy(w.cpu().numpy()),
    lambda w: torch.zeros(8, 64).add_(w),
    lambda w: torch.zeros(8, 64).copy_(w),
    lambda w: nn.functional.linear(torch.eye(64), w).t(),
]


@pytest.mark.parametrize("number", range(len(READS)))
def test_readers_get_plain_tensors_with_its_values(frozen: Any, number: int) -> None:
    got = READS[number](frozen.weight)
    assert type(got) is Tensor
    assert torch.equal(got, values(frozen))


def test_it_is_saved_by_its_values(frozen: Any, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(frozen.weight, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=True), values(frozen))
    save_file({"w": frozen.weight}, tmp_path / "w.safetensors")
    assert torch.equal(load_file(tmp_path / "w.safetensors")["w"], values(frozen))


def _assign(weight: Any) -> None:
    weight.data = torch.zeros(8, 64)


def _add_to_data(weight: Any) -> None:
    weight.data += 1


def _add(weight: Any) -> None:
    weight += 1


def _set_item(weight: Any) -> None:
    weight[0] = 1


def _require_grad(weight: Any) -> None:
    weight.requires_grad = True


WRITES: list[Callable[[Tensor], Any]] = [
    *(_assign, _add_to_data, _add, _set_item, _require_grad),
    lambda w: w.add_(1),
    lambda w: w.copy_(torch.zeros(8, 64)),
    lambda w: w.data.add_(1),
    lambda w: w.detach().zero_(),
    lambda w: w.requires_grad_(True),
    lambda w: nn.init.normal_(w),
    lambda w: nn.init.kaiming_uniform_(w),
    lambda w: torch.add(torch.zeros(8, 64), 1, out=w),
    lambda w: nn.Parameter(w),
]


@pytest.mark.parametrize("number", range(len(WRITES)))
def test_writers_are_refused(frozen: Any, number: int) -> None:
    before = values(frozen)
    with pytest.raises(FrozenWeight, match=r"QLinear.weight is frozen"):
        WRITES[number](frozen.weight)
    assert torch.equal(values(frozen), before)
    assert torch.equal(frozen.weight + 0, before)


def test_what_changes_nothing_is_not_refused(frozen: Any) -> None:
    assert torch.equal(frozen.weight.requires_grad_(False), values(frozen))
    assert not frozen.weight.requires_grad


def test_the_weight_is_decoded_once(frozen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real = type(frozen).float_weight
    monkeypatch.setattr(type(frozen), "float_weight", lambda *a: calls.append("decoded") or real(*a))
    weight = frozen.weight
    assert torch.equal(weight + 1, weight + 1)
    assert calls == ["decoded"]


def test_gradients_go_to_what_it_is_multiplied_with(frozen: Any) -> None:
    x = torch.randn(3, 64, requires_grad=True)
    nn.functional.linear(x, frozen.weight).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, values(frozen).sum(0).expand(3, 64))


def test_a_compiler_reads_a_plain_one(frozen: Any) -> None:
    def tied(x: Tensor) -> Tensor:
        return x.to(frozen.weight.dtype) @ frozen.weight.t()

    compiled = torch.compile(tied, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 64)
    assert torch.equal(compiled(x), tied(x))
