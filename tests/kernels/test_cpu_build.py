"""Building and loading the CPU kernels: where they are kept, and what happens where they cannot be had."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from fxquant import cpu_kernels
from fxquant.cpu_kernels.build import BuildFailed, build
from tests.kernels.cpu_helpers import loaded

# What a fresh process does: load twice, say what came of it, and compute something either way.
PROGRAM = """
import sys, warnings
import torch
from fxquant import cpu_kernels, ops
with warnings.catch_warnings(record=True) as met:
    warnings.simplefilter("always")
    first, second = cpu_kernels.load(), cpu_kernels.load()
assert first is second
for warning in met:
    print(warning.category.__name__, warning.message)
print("library", first and first.path, cpu_kernels.best_isa())
codes = torch.ones(3, 5, dtype=torch.int8)
one = torch.ones(3, 1)
y = torch.ops.fxquant.int8_linear_dynamic(torch.ones(2, 5), torch.ops.fxquant.int8_pack(codes), one, None, 5)
print("answer", y.shape, bool(torch.equal(y, torch.full((2, 3), 5.0))))
"""


def start(cache: Path, **environment: str) -> subprocess.Popen[str]:
    full = {**os.environ, "OMP_NUM_THREADS": "1", "FXQUANT_CACHE_DIR": str(cache), **environment}
    command = [sys.executable, "-c", PROGRAM]
    root = Path(__file__).parents[2]
    return subprocess.Popen(command, env=full, cwd=root, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[str]) -> str:
    said, complained = process.communicate(timeout=200)
    assert process.returncode == 0, complained
    return said


def fake_compiler(folder: Path, body: str) -> str:
    """A compiler that knows its version; `body` is what it does when asked to compile. $out is the file to make."""
    path = folder / "fake-c++"
    path.write_text(
        "#!/bin/sh\n"
        '[ "$1" = --version ] && { echo "fake 1.0"; exit 0; }\n'
        'for word; do [ "$last" = -o ] && out=$word; last=$word; done\n' + body
    )
    path.chmod(0o755)
    return str(path)


def copying_compiler(folder: Path, seconds: float) -> str:
    """A compiler whose only product is the library that is already built, slowly: for races, not for code."""
    library = loaded().path
    return fake_compiler(
        folder,
        f'sleep {seconds}\ncase "$out" in *.so) head -c 1000 {library} > "$out"; sleep {seconds}; cp {library} "$out";;'
        ' *) : > "$out";; esac\n',
    )


def test_no_compiler_is_one_warning_and_the_reference(tmp_path: Path) -> None:
    said = finish(start(tmp_path, CXX="/nowhere/c++"))
    assert said.count("KernelsUnavailableWarning") == 1
    assert "CXX=/nowhere/c++ names no compiler; install one, or name it in the environment variable CXX" in said
    assert "library None None" in said
    assert "answer torch.Size([2, 3]) True" in said


def test_a_failing_compiler_is_one_warning_with_its_words(tmp_path: Path) -> None:
    said = finish(start(tmp_path, CXX=fake_compiler(tmp_path, "echo no such header >&2\nexit 3\n")))
    assert said.count("KernelsUnavailableWarning") == 1
    assert "ended with 3 and said:\nno such header" in said
    assert "answer torch.Size([2, 3]) True" in said
    assert not list(tmp_path.glob("*.so"))
    assert not list(tmp_path.glob("building-*"))


def test_a_library_that_does_not_load_is_one_warning(tmp_path: Path) -> None:
    said = finish(start(tmp_path, CXX=fake_compiler(tmp_path, 'echo this is no library > "$out"\n')))
    assert said.count("KernelsUnavailableWarning") == 1
    assert "file too short" in said or "invalid ELF header" in said
    (library,) = tmp_path.glob("*.so")
    assert f"delete {library} to have it built again" in said
    assert "answer torch.Size([2, 3]) True" in said


def test_two_processes_build_at_once(tmp_path: Path) -> None:
    """Both find a whole library, though each is half-written for a while under its own temporary name."""
    compiler = copying_compiler(tmp_path, seconds=0.3)
    cache = tmp_path / "cache"
    for process in [start(cache, CXX=compiler) for _ in range(2)]:
        said = finish(process)
        assert "KernelsUnavailableWarning" not in said
        assert "answer torch.Size([2, 3]) True" in said
    (library,) = cache.iterdir()
    assert library.suffix == ".so"
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


def test_a_built_library_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXQUANT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", copying_compiler(tmp_path, seconds=0.0))
    first = build()
    made = first.stat().st_mtime_ns
    assert build() == first
    assert first.stat().st_mtime_ns == made


def test_another_source_is_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXQUANT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", copying_compiler(tmp_path, seconds=0.0))
    sources = tmp_path / "csrc"
    shutil.copytree(Path(cpu_kernels.__file__).parent / "csrc", sources)
    monkeypatch.setattr("fxquant.cpu_kernels.build._SOURCE_DIR", sources)
    first = build()
    with (sources / "vectors.h").open("a") as file:
        file.write("// edited\n")
    assert build() != first


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fxquant.cpu_kernels.build._FLAGS", ("-std=c++20",)),
        ("fxquant.cpu_kernels.build._SOURCES", {"ops.cpp": ("-O3",)}),
        ("fxquant.cpu_kernels.build._version", lambda compiler: "fake 2.0"),
        ("torch.__version__", "2.13.1"),
    ],
    ids=["flags", "flags of one file", "compiler version", "torch version"],
)
def test_other_tools_are_another_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: object
) -> None:
    monkeypatch.setenv("FXQUANT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", copying_compiler(tmp_path, seconds=0.0))
    first = build()
    monkeypatch.setattr(name, value)
    assert build() != first


def test_the_cache_directory_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXQUANT_CACHE_DIR", str(tmp_path / "a" / "b"))
    assert cpu_kernels.cache_dir() == tmp_path / "a" / "b"
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700


def test_a_directory_that_others_can_write_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o777)
    monkeypatch.setenv("FXQUANT_CACHE_DIR", str(tmp_path))
    with pytest.raises(BuildFailed, match=r"others may write into the cache directory .*; `chmod 700` it"):
        cpu_kernels.cache_dir()


def test_a_directory_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXQUANT_CACHE_DIR", str(tmp_path))
    owner = tmp_path.stat().st_uid
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    with pytest.raises(BuildFailed, match=f"belongs to user {owner}, not to {owner + 1}"):
        cpu_kernels.cache_dir()


def test_without_a_home_the_temporary_folder_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("a file where the home directory should be")
    monkeypatch.delenv("FXQUANT_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cpu_kernels.cache_dir() == tmp_path / f"fxquant-{os.getuid()}"


def test_the_compiler_is_the_one_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = fake_compiler(tmp_path, "exit 1\n")
    monkeypatch.setenv("CXX", f"{fake} --some-flag")
    assert cpu_kernels.find_compiler() == (fake, "--some-flag")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cpu_kernels.find_compiler() is None
    with pytest.raises(BuildFailed, match="no C\\+\\+ compiler was found"):
        build()


def test_the_instruction_set_is_the_best_that_the_cpu_has() -> None:
    library = loaded()
    able = torch.cpu.get_capabilities()
    avx512 = all(able.get(name) for name in ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl", "avx512_vnni"))
    with_avx512 = "amx" if able.get("amx_int8") else "avx512vnni"
    with_avx2 = "avxvnni" if able.get("avx_vnni") else "avx2"
    without = with_avx2 if able.get("avx2") and able.get("fma3") else "portable"
    expected = with_avx512 if avx512 else without
    assert library.isa == cpu_kernels.best_isa() == expected


def test_nothing_happens_at_import() -> None:
    code = "import os; os.environ['CXX'] = '/nowhere'; os.environ['FXQUANT_CACHE_DIR'] = '/proc/none'\n"
    code += "import fxquant.cpu_kernels, sys; assert 'torch.utils.cpp_extension' not in sys.modules"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=Path(__file__).parents[2], timeout=200)


def test_loading_again_is_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cpu_kernels.load() is loaded()
