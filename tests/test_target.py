from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch

import fxquant.ops  # noqa: F401  # declares the op that the target asks about
from fxquant.errors import InvalidOption
from fxquant.target import Target


def test_asks_the_cpu_for_its_instruction_sets() -> None:
    target = Target.of_this_machine()
    level = torch.backends.cpu.get_cpu_capability()
    assert target.device == "cpu"
    assert target.avx512 or level != "AVX512"
    assert target.avx2 or level == "DEFAULT"
    assert target.avx512 or not target.vnni


def test_kernel_is_what_the_dispatcher_has() -> None:
    registered = torch._C._dispatch_has_kernel_for_dispatch_key("fxquant::int8_linear_dynamic", "CPU")
    assert Target.of_this_machine().has_kernels == registered
    assert not Target.of_this_machine("cuda:0").has_kernels


def test_says_no_kernel_before_any_op_is_declared() -> None:
    code = "from fxquant.target import Target; assert not Target.of_this_machine().has_kernels"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_weights_without_values_have_no_target() -> None:
    with pytest.raises(InvalidOption, match="'meta': weights have no values there: load them first"):
        Target.of_weights("meta")
    assert Target.of_weights("cpu") == Target.of_this_machine()


def test_another_device_has_no_kernels() -> None:
    target = Target.of_this_machine("meta")
    assert target == Target("meta")
    assert not target.has_kernels
    assert not target.runs_triton


def test_is_frozen_and_hashable() -> None:
    target = Target("cpu", vnni=True)
    assert {target: 1}[dataclasses.replace(target)] == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        target.vnni = False  # pyright: ignore[reportAttributeAccessIssue]
