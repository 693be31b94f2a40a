"""Device: the key of a file of tuned configurations: which machine they were measured on, and with which versions."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fxquant.target import Arch, Target

_CPU_INFO = Path("/proc/cpuinfo")
_LAST_LEVEL = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")


@dataclass(frozen=True)
class Device:
    """What a measurement holds for. Two machines whose devices are equal may share their plans.

    kind     'gpu' or 'cpu'.
    name     the maker's: 'NVIDIA H100 80GB HBM3', 'AMD EPYC (family 25, model 17)'; '' of a GPU that is not here: an
             architecture's model.
    arch     of a GPU its architecture, 'sm90'; of a CPU the instruction sets that kernels are written for.
    caches   of a CPU: sizes of its levels.  threads: of a CPU, how many torch uses.
    fxquant, torch, triton  versions ('' without Triton, and for a CPU, whose kernels do not use it).
    """

    kind: Literal["cpu", "gpu"]
    name: str
    arch: str
    caches: str = ""
    threads: int = 0
    fxquant: str = ""
    torch: str = ""
    triton: str = ""

    def __str__(self) -> str:
        if self.kind == "gpu":
            return f"{self.name or 'any GPU'} ({self.arch})"
        return f"{self.name} ({self.arch}; caches {self.caches}; {self.threads} threads)"

    @property
    def file_name(self) -> str:
        """Of its file in a cache folder: readable, and different for every key."""
        words = re.sub(r"[^a-z0-9]+", "-", f"{self.name or 'modelled'} {self.arch}".lower()).strip("-")
        digest = hashlib.sha256(repr(sorted(self.to_json().items())).encode()).hexdigest()[:8]
        return f"plans-{words[:60]}-{digest}.json"

    def difference(self, other: Device) -> str:
        """The first field in which two devices differ, in words; '' if they are equal."""
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine != theirs:
                return f"{field.name} {theirs!r} instead of {mine!r}"
        return ""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> Device:
        return Device(**fields)


def device_of(target: Target) -> Device:
    """The device of a target: the CPU of this machine, its GPU, or where that is another one a GPU by architecture."""
    if target.device == "cpu":
        return _cpu()
    number = torch.cuda.current_device() if torch.cuda.is_available() else None
    return modelled_device(target.arch, "" if number is None else _name_of_gpu(number, target.arch))


@functools.cache
def _name_of_gpu(number: int, arch: str) -> str:
    """'' if this machine's GPU of that number is of another architecture."""
    here = Target.of_this_machine(torch.device("cuda", number)).arch == arch
    return torch.cuda.get_device_name(number) if here else ""


def modelled_device(arch: Arch | str, name: str = "") -> Device:
    """A GPU of that architecture; without a name, any."""
    return Device("gpu", name, str(arch), "", 0, _own_version(), torch.__version__, version("triton"))


def _cpu() -> Device:
    return _cpu_with(torch.get_num_threads())


@functools.cache
def _cpu_with(threads: int) -> Device:
    able = torch.cpu.get_capabilities()
    flags = {"avx2": "avx2", "avxvnni": "avx_vnni", "avx512vnni": "avx512_vnni", "amx": "amx_int8"}
    sets = [name for name, flag in flags.items() if able.get(flag)]
    sizes = [f"{able.get(level, 0) // 1024}K" for level in ("l1d_cache_size", "l2_cache_size")]
    if _LAST_LEVEL.exists():
        sizes.append(_LAST_LEVEL.read_text(encoding="ascii").strip())
    name = str(able.get("cpu_name") or able.get("architecture") or "unknown CPU") + _generation()
    arch = " ".join(sets) or "portable"
    return Device("cpu", name, arch, " ".join(sizes), threads, _own_version(), torch.__version__)


def _generation() -> str:
    """Such as ' (family 25, model 17)': in a virtual machine several have one name. '' where Linux does not say."""
    if not _CPU_INFO.exists():
        return ""
    first = _CPU_INFO.read_text(encoding="utf-8").partition("\n\n")[0]
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
    words = [f"{word} {fields[key]}" for word, key in (("family", "cpu family"), ("model", "model")) if key in fields]
    return f" ({', '.join(words)})" if words else ""


@functools.cache
def version(package: str) -> str:
    """Of an installed package; '' if it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _own_version() -> str:
    return version("fxquant")


def last_level_bytes() -> int:
    """Of this CPU's caches the largest; 32 MiB where the system does not say."""
    text = _LAST_LEVEL.read_text(encoding="ascii").strip() if _LAST_LEVEL.exists() else ""
    return int(text[:-1]) * 1024 if text.endswith("K") else 32 * 1024**2
