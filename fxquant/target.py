"""Target: what the machine that will run the graph can do. Asked for when a target is needed, never at import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from fxquant.errors import InvalidOption

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Target:
    """Capabilities of one device; code asks for these, not for names of processors.

    device           'cpu' or 'cuda'.
    avx2, avx512, vnni  instruction sets of the CPU; vnni means AVX512-VNNI, on 512 bit registers.
    has_kernels  compiled kernels are registered for fxquant's ops on this device.
    """

    device: Device
    avx2: bool = False
    avx512: bool = False
    vnni: bool = False
    has_kernels: bool = False

    @property
    def runs_default(self) -> bool:
        """True if the default preset, int8dq, is worth taking here.

        Not without an int8 kernel for the device, and not on a CPU where only the portable kernel runs: both are
        slower than float. A CPU without a compiler runs it by reference, with a warning.
        """
        if self.device != "cpu":
            return self.has_kernels
        return self.avx2 or not self.has_kernels

    @staticmethod
    def of_this_machine(device: str | torch.device = "cpu") -> Target:
        """Ask this machine. `device` is a torch device of type cpu or cuda. Raises `InvalidOption` for another."""
        kind = torch.device(device).type
        match kind:
            case "cpu":
                able = torch.cpu.get_capabilities()
                return Target(
                    "cpu",
                    avx2=bool(able.get("avx2")),
                    avx512=bool(able.get("avx512_f")),
                    vnni=bool(able.get("avx512_vnni")),
                    has_kernels=_has_kernels("CPU"),
                )
            case "cuda":
                return Target("cuda", has_kernels=_has_kernels("CUDA"))
            case _:
                raise InvalidOption("device", kind, "it takes 'cpu' or 'cuda'")


def _has_kernels(dispatch_key: str) -> bool:
    # The dispatcher raises for an op that nobody has declared yet; asked through the list of names it just says no.
    name = "fxquant::int8_linear_dynamic"
    return name in torch._C._dispatch_get_all_op_names() and torch._C._dispatch_has_kernel_for_dispatch_key(
        name, dispatch_key
    )
