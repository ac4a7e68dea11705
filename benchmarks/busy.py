"""How long images take to encode beside other programs: threads that wait briefly, as `modeclip` has them, or long.

Usage: python benchmarks/busy.py RUN [--busy 2] [--rounds 3]

RUN is a folder of a finished run, such as that of `make demo`. The same command builds a search index of its held-out
images with GNU OpenMP's own number of spins (300,000) and with modeclip's, in turn, on a quiet machine and beside
``--busy`` processes that compute without end. Seconds are those of the whole command, the processor's in brackets.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from modeclip.__main__ import SPINS

USUAL = "300000"


def build(run: Path, spins: str) -> tuple[float, float]:
    """Return the seconds that an index takes by the clock, and of the processor."""
    with tempfile.TemporaryDirectory() as folder:
        words = [
            "search",
            "build",
            str(run / "tasks.lance"),
            "--model",
            str(run / "bundle"),
            "--out",
            f"{folder}/index",
        ]
        started, before = time.monotonic(), os.times()
        subprocess.run(
            [sys.executable, "-m", "modeclip", *words],
            env=os.environ | {"GOMP_SPINCOUNT": spins},
            check=True,
            capture_output=True,
        )
        now = os.times()
    used = now.children_user + now.children_system - before.children_user - before.children_system
    return time.monotonic() - started, used


@contextmanager
def beside(count: int) -> Iterator[None]:
    """Have processes compute without end meanwhile."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def main() -> None:
    """Print the seconds of each round and the ratio of their medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--busy", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}")
    for count in (0, arguments.busy):
        found: dict[str, list[float]] = {USUAL: [], SPINS: []}
        with beside(count):
            for _ in range(arguments.rounds):
                for spins, seconds in found.items():
                    clock, used = build(arguments.run, spins)
                    seconds.append(clock)
                    print(f"beside {count}: {spins} spins {clock:.1f} s ({used:.1f})", flush=True)
        usual, ours = (sorted(seconds)[len(seconds) // 2] for seconds in found.values())
        print(f"beside {count}: {usual / ours:.2f} times as fast with {SPINS} spins as with {USUAL}")


if __name__ == "__main__":
    main()
