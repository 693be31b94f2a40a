"""No kernel touches a byte outside its buffers: all of them, under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from fxquant import cpu_kernels
from fxquant.cpu_kernels import build

HERE = Path(__file__).parent
SANITIZE = (
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-O1",
    "-g1",
    "-std=c++17",
    "-ffp-contract=off",
)


@pytest.mark.slow  # compiles everything once more, with the sanitizers
def test_kernels_stay_in_their_buffers(tmp_path: Path) -> None:
    compiler = cpu_kernels.find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    source_dir = Path(cpu_kernels.__file__).parent / "csrc"
    empty = tmp_path / "empty.cpp"
    empty.write_text("int main() {}\n")
    if subprocess.run([*compiler, *SANITIZE, empty, "-o", tmp_path / "empty"], capture_output=True).returncode:
        pytest.skip("this compiler has no sanitizers")
    objects = []
    running = []
    kernels = {n: f for n, f in build._sources().items() if "isa" in n or n in ("pack.cpp", "stored_rows.cpp")}
    sources = {HERE / "cpu_bounds.cpp": (), **{source_dir / name: flags for name, flags in kernels.items()}}
    for source, flags in sources.items():
        objects.append(tmp_path / f"{source.stem}.o")
        isa = [flag for flag in flags if flag.startswith("-m")]
        command = [*compiler, *SANITIZE, *isa, f"-I{source_dir}", "-c", source, "-o", objects[-1]]
        running.append(subprocess.Popen(command))
    assert [process.wait(timeout=200) for process in running] == [0] * len(running)
    program = tmp_path / "bounds"
    subprocess.run([*compiler, *SANITIZE, *objects, "-o", program], check=True)
    ran = subprocess.run([program], capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert "portable done" in ran.stdout
