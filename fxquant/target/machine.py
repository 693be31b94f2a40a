"""Target: what the machine that will run the graph can do. Asked for when a target is needed, never at import."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch

from fxquant.errors import InvalidOption
from fxquant.target.gpus import ARCHS


@dataclass(frozen=True)
class Target:
    """Capabilities of one device; code asks for these, not for names of processors.

    device           type of a torch device: 'cpu', 'cuda' (AMD's too), 'mps', 'xpu', …
    avx2, avx512, vnni  instruction sets of the CPU; vnni means AVX512-VNNI, on 512 bit registers.
    has_kernels  compiled kernels are registered for fxquant's ops on this device.
    arch         of a GPU that Triton compiles for: the nearest name in `ARCHS` that is not newer; else ''.
    """

    device: str
    avx2: bool = False
    avx512: bool = False
    vnni: bool = False
    has_kernels: bool = False
    arch: str = ""

    @property
    def runs_triton(self) -> bool:
        """Our Triton kernels can run here."""
        return bool(self.arch)

    @property
    def runs_default(self) -> bool:
        """True if the default preset, int8dq, is worth taking here.

        Not without an int8 kernel for the device, and not on a CPU where only the portable kernel runs: both are
        slower than float. A CPU without a compiler runs it by reference, with a warning.
        """
        if self.device != "cpu":
            return self.has_kernels or self.runs_triton
        return self.avx2 or not self.has_kernels

    @staticmethod
    def of_weights(device: str | torch.device) -> Target:
        """The same for a device that holds weights. Raises `InvalidOption` for 'meta', where they have no values."""
        if torch.device(device).type == "meta":
            raise InvalidOption("device", "meta", "weights have no values there: load them first")
        return Target.of_this_machine(device)

    @staticmethod
    def of_this_machine(device: str | torch.device = "cpu") -> Target:
        """Ask this machine about a torch device, or the type of one."""
        device = torch.device(device)
        match device.type:
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
                return Target("cuda", arch=_arch_of(device))
            case other:
                return Target(other)


def _arch_of(device: torch.device) -> str:
    """The nearest architecture that is not newer than that GPU; '' if there is none, no GPU, or no Triton."""
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return ""
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
        return name if name in ARCHS else ""
    return nearest_arch(*torch.cuda.get_device_capability(device))


def nearest_arch(major: int, minor: int) -> str:
    """Of NVIDIA's architectures in `ARCHS` the newest that has no instruction which compute capability major.minor
    lacks; '' below 8.0."""
    if major == 12:  # its matrix instructions are sm89's: no warp groups, no tensor memory
        return "sm89"
    known = [arch.compute for arch in ARCHS.values() if isinstance(arch.compute, int)]
    older = [compute for compute in known if compute <= 10 * major + minor]
    return f"sm{max(older)}" if older else ""


def _has_kernels(dispatch_key: str) -> bool:
    # The dispatcher raises for an op that nobody has declared yet; asked through the list of names it just says no.
    name = "fxquant::int8_linear_dynamic"
    return name in torch._C._dispatch_get_all_op_names() and torch._C._dispatch_has_kernel_for_dispatch_key(
        name, dispatch_key
    )
