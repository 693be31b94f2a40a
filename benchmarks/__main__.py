"""All benchmarks, one after another, each in a process of its own; ends with 1 if any demand does not hold.

python -m benchmarks [--quick] [--only NAME ...]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

from benchmarks.harness import RESULTS

# The one with the most demands first.
SCRIPTS: dict[str, tuple[str, ...]] = {
    "linear_inductor": (),
    "models": (),
    "compile_time": (),
    "stale_check": (),
}


def main(chosen: argparse.Namespace) -> int:
    RESULTS.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in chosen.only or SCRIPTS:
        started = time.perf_counter()
        quick = ("--quick",) if chosen.quick else ()
        done = subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *SCRIPTS[name], *quick])
        sys.stdout.write(f"{name}: {time.perf_counter() - started:.0f} s\n\n")
        sys.stdout.flush()
        if done.returncode:
            failed.append(name)
    if failed:
        sys.stdout.write(f"demands that do not hold, or a script that ended early: {', '.join(failed)}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds: shows that it works, proves little")
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, help="these scripts")
    sys.exit(main(parser.parse_args()))
