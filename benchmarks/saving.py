"""Speed and memory of fxquant.save and fxquant.load, against safetensors alone on the same bytes, in turn.

safetensors' save writes tensors that lie in rows already and waits for the disk as ours does; its load copies mapped
tensors, since reading nothing takes no time. Who is first changes from round to round; times are medians, ratios those
of the rounds. Peak memory is RssAnon above its value before, of a process of its own.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fxquant
from benchmarks.harness import Outcome, arguments, finish, progress

WIDTH, HIDDEN = 4096, 8192
FLOOR = 0.5


def layer_count(config: str, megabytes: int) -> int:
    """How many layers take so much memory."""
    return max(1, round(megabytes * 1e6 / fxquant.memory_footprint(_layer(config))))


def skeleton(layers: int) -> nn.Module:
    """The float model."""
    return nn.Sequential(*[nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(layers)])


def quantized(config: str, layers: int) -> nn.Module:
    """The quantized one, made without its float weights: its layers have the same values, in memory of their own."""
    one = _layer(config)
    return nn.Sequential(*[deepcopy(one) for _ in range(layers)])


def _layer(config: str) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.Linear(WIDTH, HIDDEN, bias=False)
    fxquant.quantize(layer, config)
    fxquant.freeze(layer)
    return layer


def speeds(config: str, megabytes: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Median seconds of each, by the clock and of work, and median ratios: safetensors' seconds over ours."""
    layers = layer_count(config, megabytes)
    model = quantized(config, layers)
    fxquant.save(quantized(config, 1), folder / "small")
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    total = sum(tensor.nbytes for tensor in state.values())
    ours, theirs = folder / "ours", folder / "theirs"
    theirs.mkdir()
    seconds: dict[str, list[tuple[float, float]]] = {"save": [], "theirs_save": []}

    def save_theirs() -> None:
        path = theirs / "model.safetensors"
        save_file(state, path)
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

    acts = {"theirs_save": save_theirs, "save": lambda: fxquant.save(model, ours)}
    for number in range(rounds):
        shutil.rmtree(ours, ignore_errors=True)
        (theirs / "model.safetensors").unlink(missing_ok=True)
        for name in _in_turn(("theirs_save", "save"), number):
            seconds[name].append(_timed(acts[name]))
    seconds |= _in_a_process(f"s.loads(P({str(theirs)!r}), P({str(ours)!r}), {layers}, {rounds})")
    wall = {name: [each for each, _ in times] for name, times in seconds.items()}
    work = {name: [each for _, each in times] for name, times in seconds.items()}
    return {
        "bytes": total,
        "seconds": {name: statistics.median(times) for name, times in wall.items()},
        "cpu_seconds": {name: statistics.median(times) for name, times in work.items()},
        "ratio": {name: _ratio(wall, name) for name in ("save", "load")},
    }


def _ratio(seconds: dict[str, list[float]], name: str) -> float:
    """How fast ours is beside theirs: the median over the rounds."""
    pairs = zip(seconds[f"theirs_{name}"], seconds[name], strict=True)
    return statistics.median(theirs / ours for theirs, ours in pairs)


def loads(theirs: Path, ours: Path, layers: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of loads in turn, in fresh memory; theirs copies the mapped file.

    In one process: on a virtual machine, what fresh memory costs depends on what the host has taken back since it was
    last freed, and so on the time since a process began.
    """
    fxquant.load(ours.parent / "small", factory=lambda: skeleton(1))  # what a first load makes once
    acts: dict[str, Callable[[], object]] = {
        "theirs_load": lambda: {k: t.clone() for k, t in load_file(theirs / "model.safetensors").items()},
        "load": lambda: fxquant.load(ours, factory=lambda: skeleton(layers)),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in acts}
    for number in range(rounds):
        for name in _in_turn(tuple(acts), number):
            _give_back()
            seconds[name].append(_timed(acts[name]))
    return seconds


def _in_turn(pair: tuple[str, ...], number: int) -> tuple[str, ...]:
    """Who is first changes from round to round."""
    return pair if number % 2 == 0 else pair[::-1]


def _in_a_process(expression: str) -> Any:
    """What an expression gives in a fresh process, whose memory nobody has touched before; `s` is this module."""
    imports = "import json; from pathlib import Path as P; from benchmarks import saving as s"
    code = f"{imports}; print(json.dumps({expression}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _give_back() -> None:
    """Have malloc give the system what is free: else one of two gets memory that is there, and the other new pages."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # the GNU C library's
    if trim is not None:
        trim(0)


def _timed(act: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock, and of work."""
    start, worked = time.perf_counter(), time.process_time()
    kept = act()
    taken = time.perf_counter() - start, time.process_time() - worked
    del kept
    return taken


def rss_anon() -> int:
    """Bytes of memory of this process that no file stands behind."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def peak_of(act: Callable[[], object]) -> tuple[int, object]:
    """The most RssAnon above its value before, looked at every millisecond, and what the act gave."""
    before, most, done = rss_anon(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, rss_anon())
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        kept = act()
    finally:
        done.set()
        thread.join()
    return max(most, rss_anon()) - before, kept


def load_peak(folder: Path, layers: int) -> dict[str, Any]:
    """Peak memory of a load, and what the issue allows it: quantized size, a tenth of it, the largest tensor."""
    fxquant.load(folder.parent / "small", factory=lambda: skeleton(1))  # what a first load makes once
    peak, model = peak_of(lambda: fxquant.load(folder, factory=lambda: skeleton(layers)))
    assert isinstance(model, nn.Module)
    size = fxquant.memory_footprint(model)
    largest = max(buffer.nbytes for buffer in model.buffers())
    return {"peak": peak, "size": size, "largest": largest, "allowed": round(1.1 * size) + largest}


def memory(config: str, megabytes: int, folder: Path) -> dict[str, Any]:
    """`load_peak` in a process of its own."""
    layers = layer_count(config, megabytes)
    fxquant.save(quantized(config, layers), folder / "ours")
    fxquant.save(quantized(config, 1), folder / "small")
    return _in_a_process(f"s.load_peak(P({str(folder / 'ours')!r}), {layers})")


def report_on(outcome: Outcome, config: str, megabytes: int, rounds: int, parent: str | None) -> None:
    """One config's rows and demands."""
    with tempfile.TemporaryDirectory(dir=parent) as name:
        found = speeds(config, megabytes, rounds, Path(name) / "speed")
        shutil.rmtree(Path(name) / "speed")
        held = memory(config, megabytes, Path(name) / "memory")
    wall, work = found["seconds"], found["cpu_seconds"]
    for act, ratio in found["ratio"].items():
        outcome.add(
            {
                "": f"{act} {config}, {found['bytes'] / 1e9:.2f} GB",
                "s": f"{wall[act]:.2f}",
                "safetensors s": f"{wall[f'theirs_{act}']:.2f}",
                "of its speed": f"{ratio:.2f}x",
                "CPU s": f"{work[act]:.2f}",
                "safetensors CPU s": f"{work[f'theirs_{act}']:.2f}",
            }
        )
        outcome.at_least(f"{act} {config}, of safetensors' speed", ratio, FLOOR)
    gigabytes = {part: size / 1e9 for part, size in held.items()}
    met, allowed = f"{gigabytes['peak']:.3f} GB", f"<= {gigabytes['allowed']:.3f} GB"
    outcome.demand(f"load {config}, peak RssAnon", held["peak"] <= held["allowed"], met, allowed)
    outcome.figures[-1].update(found, memory=held)


def main(chosen: argparse.Namespace) -> int:
    outcome = Outcome("saving", "fxquant.save and fxquant.load beside safetensors alone on the same bytes, medians")
    megabytes, rounds = (100, 1) if chosen.quick else (chosen.megabytes, chosen.rounds)
    for config in chosen.config:
        progress(config)
        report_on(outcome, config, megabytes, rounds, chosen.folder)
    outcome.notes.append(f"{rounds} rounds, first one and then the other; {torch.get_num_threads()} thread(s)")
    return finish(outcome, chosen)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--config", nargs="+", default=["int8wo", "int4wo"])
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", default=None, help="where to write; the temporary folder if not given")
    sys.exit(main(parser.parse_args()))
