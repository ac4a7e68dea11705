"""Rates of a catalog of small pictures: random access, selection, adding a column of embeddings.

Usage: python benchmarks/catalog.py CATALOG [--rounds 20]        (for instance runs/demo/catalog.lance)

Works on a copy in a temporary folder; prints medians over rounds.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from modeclip import Catalog

BATCH = 256


def median_seconds(work: Callable[[], object], rounds: int) -> float:
    """Return the median time of one call, after one that does not count."""
    work()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return float(np.median(times))


def main() -> None:
    """Measure and print one line a rate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("catalog", type=Path)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = shutil.copytree(arguments.catalog, Path(folder) / "catalog.lance")
        catalog, draw = Catalog.open(path), np.random.default_rng(0)
        count = len(catalog)
        vectors = draw.standard_normal((count, 384)).astype(np.float16)

        def random_rows() -> np.ndarray:
            return draw.integers(0, count, BATCH)

        rates = {
            "pictures read and decoded": BATCH
            / median_seconds(lambda: catalog.images(random_rows()), arguments.rounds),
            "captions read": BATCH / median_seconds(lambda: catalog.read(["caption"], random_rows()), arguments.rounds),
            "rows selected by a value": count
            / median_seconds(lambda: catalog.select(group="tabler"), arguments.rounds),
            "rows given a 384-d column": count / median_seconds(lambda: catalog.add_columns({"new": vectors}), 5),
        }
    print(f"{datetime.now(UTC).date()}, {platform.machine()}, {count:,} pairs, random batches of {BATCH}")
    for name, rate in rates.items():
        print(f"{name:<28} {rate:>12,.0f} a second")


if __name__ == "__main__":
    main()
