"""The benchmarks, one after another, each in a process of its own; ends with 1 if any demand does not hold.

python -m benchmarks [--quick] [--all] [--only NAME ...]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

from benchmarks.harness import RESULTS

# The ones with the most demands first.
SCRIPTS = (
    "peers.kernels",
    "peers.models",
    "peers.overhead",
    "peers.sizes",
    "peers.eager",
)
# Parts of the same and other questions; `--all` runs them too.
MORE = (
    "linear_inductor",
    "linear_formats",
    "linear_kernels",
    "models",
    "compile_time",
    "stale_check",
    "algorithms",
    "model_door",
    "generate",
    "saving",
)


def options_of(name: str, quick: bool) -> list[str]:
    """The command line of one script; that of the kernels has options of its own."""
    if name != "linear_kernels":
        return ["--quick"] if quick else []
    fast = ["--seconds", "0.1", "--sizes", "384", "1024", "--threads", "1"] if quick else []
    return ["--json", str(RESULTS / f"{name}.json"), *fast]


def main(chosen: argparse.Namespace) -> int:
    RESULTS.mkdir(parents=True, exist_ok=True)
    failed, begun = [], time.perf_counter()
    for name in chosen.only or (SCRIPTS + MORE if chosen.all else SCRIPTS):
        started = time.perf_counter()
        if name.startswith("peers."):  # the page says what is missing, and shows nothing old in its place
            (RESULTS / f"{name}.json").unlink(missing_ok=True)
        done = subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *options_of(name, chosen.quick)])
        sys.stdout.write(f"{name}: {time.perf_counter() - started:.0f} s\n\n")
        sys.stdout.flush()
        if done.returncode:
            failed.append(name)
    if any(name.startswith("peers.") for name in chosen.only or SCRIPTS):
        subprocess.run([sys.executable, "-m", "benchmarks.peers.page"], check=True)
    sys.stdout.write(f"all: {(time.perf_counter() - begun) / 60:.1f} minutes\n")
    if failed:
        sys.stdout.write(f"demands that do not hold, or a script that ended early: {', '.join(failed)}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds: shows that it works")
    parser.add_argument("--all", action="store_true", help="the scripts without peers too: 25 minutes more")
    parser.add_argument("--only", nargs="+", choices=SCRIPTS + MORE, help="these scripts")
    sys.exit(main(parser.parse_args()))
