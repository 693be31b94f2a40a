"""Builds the C++ kernels with the compiler that torch.compile needs anyway, into a directory of the user's own.

The file's name is a hash of sources, flags, compiler and torch, so an edit or an upgrade builds anew. It is written
under a temporary name and renamed: whoever finds it finds it whole, and two processes may build at once.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from fxquant.errors import FxQuantError

logger = logging.getLogger(__name__)

_SOURCE_DIR = Path(__file__).parent / "csrc"
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512_VNNI = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni")
# One instruction set a file: only these files may hold its instructions, and they are entered after asking the CPU.
_SOURCES = {
    "ops.cpp": ("-O2",),  # torch's headers, no arithmetic: first, because it takes longest
    "isa_avx512vnni.cpp": ("-O3", *_AVX512_VNNI),
    "isa_amx.cpp": ("-O3", *_AVX512_VNNI),
    "isa_avx2.cpp": ("-O3", *_AVX2),
    "isa_avxvnni.cpp": ("-O3", *_AVX2),
    "isa_portable.cpp": ("-O3",),
    "attention.cpp": ("-O2",),
    "coded.cpp": ("-O2",),
    "conv.cpp": ("-O2",),
    "embedding.cpp": ("-O3",),
    "embedding_packed.cpp": ("-O3",),
    "fake_quantize.cpp": ("-O2",),
    "pack.cpp": ("-O3",),
    "rotary.cpp": ("-O2",),
    "shared.cpp": ("-O2",),
    "spec.cpp": ("-O2",),
    "stored_ops.cpp": ("-O2",),
    "stored_rows.cpp": ("-O3",),
    "fingerprint.cpp": ("-O2", "-UTORCH_TARGET_VERSION"),  # reads fields of TensorImpl, which the stable ABI hides
}
_FLAGS = (
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",  # a product and a sum are rounded one by one, as the reference does
    "-DTORCH_TARGET_VERSION=0x020d000000000000",  # the stable ABI as of torch 2.13
)
# Seconds. A build takes about 40 of one core, 26 of them for the instruction sets, shared out among the cores.
# (With -O2 these take 13, but the products become slower.)
_TIMEOUT = 300.0


class BuildFailed(FxQuantError):
    """Why there is no library or cache directory. Of a library it becomes the text of a KernelsUnavailableWarning."""


def find_compiler() -> tuple[str, ...] | None:
    """The C++ compiler as the start of a command line: $CXX, or else g++ or clang++ on the path. None if there is none.

    A $CXX that cannot be found is none: torch.compile would not look further either.
    """
    named = os.environ.get("CXX")
    if named:
        command = shlex.split(named)
        found = shutil.which(command[0]) if command else None
        return (found, *command[1:]) if found else None
    found = shutil.which("g++") or shutil.which("clang++")
    return (found,) if found else None


def cache_dir() -> Path:
    """A directory that only this user can write: $FXQUANT_CACHE_DIR, ~/.cache/fxquant, or one in the temporary folder.

    Raises `BuildFailed` where none can be had, also if $FXQUANT_CACHE_DIR belongs to somebody else: a library that
    another user put there would run as us.
    """
    named = os.environ.get("FXQUANT_CACHE_DIR")
    if named:
        return _private(Path(named).expanduser())
    try:
        return _private(Path("~/.cache/fxquant").expanduser())
    except (BuildFailed, RuntimeError) as error:  # RuntimeError: no home directory
        logger.debug("no cache in the home directory: %s", error)
        return _private(Path(tempfile.gettempdir()) / f"fxquant-{os.getuid()}")


def _private(directory: Path) -> Path:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.stat()
    except OSError as error:
        raise BuildFailed(f"the cache directory {directory} cannot be used ({error})") from error
    if status.st_uid != os.getuid():
        raise BuildFailed(f"the cache directory {directory} belongs to user {status.st_uid}, not to {os.getuid()}")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BuildFailed(f"others may write into the cache directory {directory}; `chmod 700` it")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise BuildFailed(f"the cache directory {directory} is not writable")
    return directory


def build() -> Path:
    """The path of the library, built if it is not there. Raises `BuildFailed` with the reason if it cannot be."""
    if sys.platform == "win32":
        raise BuildFailed("they are not built on Windows")
    compiler = find_compiler()
    if compiler is None:
        named = os.environ.get("CXX")
        met = f"CXX={named} names no compiler" if named else "no C++ compiler was found (g++, clang++)"
        raise BuildFailed(f"{met}; install one, or name it in the environment variable CXX")
    directory = cache_dir()
    library = directory / f"cpu_kernels-{_key(compiler)}.so"
    if not library.exists():
        started = time.perf_counter()
        _compile(compiler, library)
        logger.info("built %s in %.1f s", library, time.perf_counter() - started)
    return library


def _sources() -> dict[str, tuple[str, ...]]:
    if platform.machine().lower() in ("x86_64", "amd64"):
        return _SOURCES
    return {name: tuple(f for f in flags if not f.startswith("-m")) for name, flags in _SOURCES.items()}


def _key(compiler: tuple[str, ...]) -> str:
    parts = [*compiler, _version(compiler), torch.__version__, platform.machine(), *_FLAGS]
    parts += [f"{name} {' '.join(flags)}" for name, flags in _sources().items()]
    digest = hashlib.sha256("\n".join(parts).encode())
    for file in sorted(_SOURCE_DIR.iterdir()):
        digest.update(file.name.encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _version(compiler: tuple[str, ...]) -> str:
    try:
        shown = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=_TIMEOUT, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildFailed(f"the compiler {shlex.join(compiler)} does not run ({error})") from error
    return shown.stdout


def _compile(compiler: tuple[str, ...], library: Path) -> None:
    torch_dir = Path(torch.__file__).parent
    try:
        with tempfile.TemporaryDirectory(prefix="building-", dir=library.parent) as scratch:
            objects = {name: str(Path(scratch, name).with_suffix(".o")) for name in _sources()}
            include = ("-isystem", str(torch_dir / "include"))
            _run_together(
                [
                    [*compiler, *_FLAGS, *flags, *include, "-c", str(_SOURCE_DIR / name), "-o", objects[name]]
                    for name, flags in _sources().items()
                ]
            )
            made = str(Path(scratch, library.name))
            link = [*compiler, "-shared", "-o", made, *objects.values(), f"-L{torch_dir / 'lib'}", "-ltorch_cpu"]
            _run_together([link])
            os.rename(made, library)
    except OSError as error:
        raise BuildFailed(f"the build in {library.parent} failed ({error})") from error


def _run_together(commands: Sequence[list[str]]) -> None:
    """Run the commands side by side; if one fails, end the others and raise with what it said."""
    running: list[subprocess.Popen[str]] = []
    try:
        running.extend(
            subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            for command in commands
        )
        for index, process in enumerate(running):
            _, said = process.communicate(timeout=_TIMEOUT)
            if process.returncode != 0:
                failed = f"`{shlex.join(commands[index])}` ended with {process.returncode}"
                raise BuildFailed(f"{failed} and said:\n{said[-2000:].strip()}\n")
    except subprocess.TimeoutExpired as error:
        raise BuildFailed(f"the compiler took more than {_TIMEOUT:.0f} s") from error
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
                process.communicate()
