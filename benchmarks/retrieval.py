"""Memory and time that retrieval takes with many texts and images and memory-mapped features of several experts.

Usage: python benchmarks/retrieval.py [--texts 1000000 --images 200000 --dimension 8 --experts 2 --folder DIR]

The features are random, which makes no difference to the work; they are written to files in a temporary folder and
memory-mapped. Two numbers are printed for memory: with and without the pages of the mapped files.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from modeclip.evaluation.retrieval import retrieve
from modeclip.evaluation.similarity import Similarity

ROWS_AT_ONCE = 1 << 14


def make_features(path: Path, rows: int, dimension: int, draw: np.random.Generator) -> np.ndarray:
    """Write random unit vectors and return them memory-mapped."""
    features = np.lib.format.open_memmap(path, "w+", np.float32, (rows, dimension))
    for start in range(0, rows, ROWS_AT_ONCE):
        part = draw.standard_normal((min(ROWS_AT_ONCE, rows - start), dimension), np.float32)
        features[start : start + len(part)] = part / np.linalg.norm(part, axis=1, keepdims=True)
    del features
    return np.load(path, mmap_mode="r")


def memory() -> tuple[float, float]:
    """Return what is this process's alone now, and that with the mapped files it has just read, in 10^9 bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    size = {line.split(":")[0]: int(line.split()[1]) * 1024 / 1e9 for line in lines if line.endswith(" kB")}
    return size["RssAnon"], size["VmRSS"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=1_000_000)
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--dimension", type=int, default=8)
    parser.add_argument("--experts", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the files of features go for the time being")
    arguments = parser.parse_args()
    draw = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        sides = [
            [
                make_features(Path(folder) / f"{side}-{k}.npy", rows, arguments.dimension, draw)
                for k in range(arguments.experts)
            ]
            for side, rows in (("images", arguments.images), ("texts", arguments.texts))
        ]
        weights = draw.dirichlet(np.ones(arguments.experts), arguments.texts).astype(np.float32)
        similarity = Similarity(images=sides[0], texts=sides[1], weights=weights)
        image_of_text = np.arange(arguments.texts) * arguments.images // arguments.texts
        seen, done = [memory()], threading.Event()

        def watch() -> None:
            while not done.wait(0.2):
                seen.append(memory())

        watcher = threading.Thread(target=watch)
        watcher.start()
        started, computed = time.perf_counter(), time.process_time()
        outcome = retrieve(similarity, image_of_text)
        seconds, computing = time.perf_counter() - started, time.process_time() - computed
        done.set()
        watcher.join()
    pairs = arguments.texts * arguments.images
    print(f"{datetime.now(UTC).date()}, {platform.machine()}, {arguments.texts:,} texts, {arguments.images:,} images, "
          f"{arguments.experts} experts of {arguments.dimension} dimensions")  # fmt: skip
    print(f"time: {seconds:,.0f} s, {computing:,.0f} s of computing, {computing / pairs * 1e9:.1f} ns a similarity")
    own, mapped = (max(column) for column in zip(*seen, strict=True))
    print(f"memory: {own:.2f} GB of its own at most, {mapped:.2f} GB with the mapped files")
    print(f"recalls of random features: {outcome.metrics}")


if __name__ == "__main__":
    main()
