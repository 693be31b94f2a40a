"""accelerate's hooks around quantized modules: weights away from the device between calls, the same outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant

accelerate: Any = pytest.importorskip("accelerate")
hooks: Any = pytest.importorskip("accelerate.hooks")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 64)
        self.first = nn.Linear(64, 32)
        self.last = nn.Linear(32, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, T] -> [B, T, 8]"""
        return self.last(torch.relu(self.first(self.table(tokens))))


TOKENS = torch.arange(20).reshape(2, 10)


def model(weights: str, *, frozen: bool, activations: str | None = None) -> Net:
    torch.manual_seed(0)
    net = Net().eval()
    config: dict[str, Any] = {"activations": activations} if activations else {}
    fxquant.quantize(net, weights=weights, rules={"table": f"w={weights}/channel"}, **config)
    if frozen:
        fxquant.freeze(net)
    if activations:
        with fxquant.Calibration(), torch.no_grad():
            net(TOKENS)
    return net


def outputs(net: nn.Module) -> Tensor:
    with torch.no_grad():
        return net(TOKENS)


@pytest.mark.parametrize("weights", ["int8", "int4", "float8"])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("offload_buffers", [True, False])
def test_offloading_to_the_cpu_changes_nothing(weights: str, frozen: bool, offload_buffers: bool) -> None:
    net = model(weights, frozen=frozen)
    before = outputs(net)
    accelerate.cpu_offload(net, execution_device=torch.device("cpu"), offload_buffers=offload_buffers)
    assert any(parameter.is_meta for parameter in net.parameters())
    for _ in range(2):
        assert torch.equal(outputs(net), before)


@pytest.mark.parametrize("offload_buffers", [True, False])
def test_offloading_a_calibrated_model_changes_nothing(offload_buffers: bool) -> None:
    net = model("int8", frozen=True, activations="int8")
    before = outputs(net)
    accelerate.cpu_offload(net, execution_device=torch.device("cpu"), offload_buffers=offload_buffers)
    assert torch.equal(outputs(net), before)


@pytest.mark.parametrize("offload_buffers", [True, False])
@pytest.mark.parametrize("offload", [True, False])
def test_hooks_that_align_devices_change_nothing(offload: bool, offload_buffers: bool) -> None:
    net = model("int8", frozen=True)
    before = outputs(net)
    state = dict(net.state_dict()) if not offload else None
    for module in net.modules():
        if not list(module.children()):
            held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
            weights_map = {name: tensor.detach().clone() for name, tensor in held.items()}
            hooks.add_hook_to_module(
                module,
                hooks.AlignDevicesHook(
                    execution_device=torch.device("cpu"),
                    offload=offload,
                    offload_buffers=offload_buffers,
                    weights_map=weights_map if offload else None,
                ),
            )
    assert torch.equal(outputs(net), before)
    assert torch.equal(outputs(net), before)
    hooks.remove_hook_from_submodules(net)
    assert state is None or all(torch.equal(tensor, net.state_dict()[key]) for key, tensor in state.items())
    assert torch.equal(outputs(net), before)


def test_a_skeleton_of_accelerate_is_filled_by_requantize() -> None:
    net = model("int8", frozen=True)
    with accelerate.init_empty_weights():
        again = Net().eval()
    fxquant.requantize(again, net.state_dict(), fxquant.quantization_map(net))
    assert torch.equal(outputs(again), outputs(net))


def test_attach_align_device_hook_by_name() -> None:
    net = model("int4", frozen=True)
    before = outputs(net)
    held = {name: t.detach().clone() for name, t in (*net.named_parameters(), *net.named_buffers())}
    hooks.attach_align_device_hook(
        net, execution_device=torch.device("cpu"), offload=True, weights_map=held, offload_buffers=True
    )
    assert any(parameter.is_meta for parameter in net.parameters())  # codes are not persistent, and stay
    assert torch.equal(outputs(net), before)
