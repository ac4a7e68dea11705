"""Pairs a second that a curation is explained for, and what memory that takes, for pools of several sizes.

    python benchmarks/explain.py --pairs 250000 1000000

Captions are words drawn from 50,000 by Zipf's law, so that most captions are distinct; half of the pairs are kept.
Each size runs in a process of its own, which tells its processor time and peak memory. The peer counts the captions of
the same catalog in a `collections.Counter`, in rounds that alternate with ours.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import ClassVar

import numpy as np
import pyarrow as pa

from modeclip.curation.curating import Curated
from modeclip.curation.explaining import explain
from modeclip.curation.method import Context, Decided, Prepared
from modeclip.data.catalog import FINGERPRINT, FORMAT, FORMAT_VERSION, PAIR_COLUMNS, Catalog
from modeclip.data.storage import FileWriter, create

BLOCK = 50_000


@dataclass(frozen=True, kw_only=True)
class Half:
    """Keeps half of the pairs."""

    method: ClassVar[str] = "half"

    def prepare(self, context: Context) -> Prepared:
        """Nothing has to be prepared here."""
        raise NotImplementedError(context.name)


def write_catalog(path: Path, count: int) -> None:
    """Write a catalog without images, and the columns of a curation."""
    rng = np.random.default_rng(0)
    words = np.array([f"word{n}" for n in range(50_000)], object)
    schema = pa.schema([(name, PAIR_COLUMNS[name]) for name in PAIR_COLUMNS if name != "task"])
    writer = FileWriter(str(path), schema, max_rows=BLOCK)
    for start in range(0, count, BLOCK):
        size = min(BLOCK, count - start)
        drawn = words[np.minimum(rng.zipf(1.3, (size, 8)) - 1, len(words) - 1)]
        numbers = range(start, start + size)
        values = {
            "key": [f"shard-{n // 10_000:05d}/{n}" for n in numbers],
            "caption": [" ".join(row) for row in drawn.tolist()],
            "width": rng.integers(32, 2000, size),
            "height": rng.integers(32, 2000, size),
        }
        table = {name: values.get(name, [None] * size) for name in schema.names}
        writer.write(pa.table(table, schema=schema))
    create(str(path), schema.with_metadata({FORMAT: FORMAT_VERSION, FINGERPRINT: "0" * 32}), writer.finish())
    cause = rng.integers(0, 2, count).astype(np.uint8)
    Catalog.open(path).add_columns({"half_cause": cause, "half_kept": cause == 0}, facts={"made_by": "benchmark"})


def measure(path: Path, rounds: int) -> dict[str, float]:
    """Return medians of processor seconds of both, and the peak memory of ours."""
    catalog = Catalog.open(path)
    prepared = Prepared(work=Decided(values={"half_cause": np.empty(0)}, facts={}), causes=("other half",))
    curated = Curated(catalog=catalog, name="half", method=Half(), prepared=prepared, num_computed=0)
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds: dict[str, list[float]] = {"ours": [], "counter": []}
    peak = 0
    for place in range(rounds):
        started = time.process_time()
        explain(curated)
        seconds["ours"].append(time.process_time() - started)
        peak = peak if place else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.process_time()
        counts = Counter[str]()
        for block in catalog.batches(["caption"]):
            counts.update(block["caption"].tolist())
        seconds["counter"].append(time.process_time() - started)
    whole = {name: median(found) for name, found in seconds.items()}
    return whole | {"peak_mb": peak / 1024, "base_mb": base / 1024, "distinct": float(len(counts))}


def main() -> None:
    """Measure each size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, nargs="+", default=[250_000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--catalog", type=Path, help="measure this one, and print JSON")
    arguments = parser.parse_args()
    if arguments.catalog:
        print(json.dumps(measure(arguments.catalog, arguments.rounds)))
        return
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} processors, {datetime.now(UTC).date()}, seed 0"
    )
    for count in arguments.pairs:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "catalog.lance"
            write_catalog(path, count)
            command = [sys.executable, __file__, "--catalog", str(path), "--rounds", str(arguments.rounds)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout)
        print(
            f"{count:,} pairs, {found['distinct']:,.0f} distinct captions: {count / found['ours']:,.0f} pairs a second"
            f" of a processor, {found['ours'] / found['counter']:.1f} times a Counter's time; peak"
            f" {found['peak_mb']:,.0f} MB, of which {found['base_mb']:,.0f} MB before the first pair"
        )


if __name__ == "__main__":
    main()
