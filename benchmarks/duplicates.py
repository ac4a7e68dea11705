"""Measures what finding duplicates costs: processor seconds, rate and peak memory of each kind, in its own process.

    python benchmarks/duplicates.py CATALOG.lance            a catalog with embedded captions and clusters
    python benchmarks/duplicates.py new --vectors icons.npy  makes one first, a pair for each vector, without pictures

The vectors are those of `benchmarks/semdedup.py`. Pairs without pictures cannot be compared by them, so `perceptual`
and `pixels` need a real catalog; they work on a copy without what is kept beside it, so that they look at every
picture. Nothing is written into the catalog but what is kept beside it. Lines of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa

from modeclip.curation.curating import curate
from modeclip.curation.duplicates import DuplicatesConfig
from modeclip.data.catalog import FINGERPRINT, FORMAT, FORMAT_VERSION, PAIR_COLUMNS, Catalog
from modeclip.data.storage import FileWriter, create

KINDS = {
    "exact": {},
    "pixels": {"pixels": True},
    "perceptual": {"by": "perceptual"},
    "semantic": {"by": "semantic", "clusters": 0},
    "semantic, kept fraction": {"by": "semantic", "kept_fraction": 0.3, "clusters": 0},
    "density": {"by": "density", "kept_fraction": 0.3, "clusters": 0},
    "balanced": {"by": "balanced", "kept_fraction": 0.3, "clusters": 0},
}
"""Settings of each kind; clusters 0 stands for one for every 1,000 pairs."""
PICTURES = ("pixels", "perceptual")
ROWS_AT_ONCE = 65_536


def machine() -> str:
    """Return the processor's name and the number of cores."""
    path = Path("/proc/cpuinfo")
    names = [line for line in path.read_text().splitlines() if "model name" in line] if path.exists() else []
    name = names[0].split(":")[1].strip() if names else platform.processor()
    return f"{name}, {os.cpu_count()} cores"


def make_catalog(path: Path, vectors: np.ndarray) -> None:
    """Write a catalog of pairs that have a vector and no picture."""
    names = ("key", "caption", "image", "path", "offset", "size", "width", "height", "digest", "group")
    schema = pa.schema([(name, PAIR_COLUMNS[name]) for name in names])
    writer = FileWriter(str(path), schema)
    for start in range(0, len(vectors), ROWS_AT_ONCE):
        rows = range(start, min(start + ROWS_AT_ONCE, len(vectors)))
        pairs = [
            (f"{row:09d}", f"caption {row % 997}", b"", None, 0, 0, 1, 1, (row // 2).to_bytes(16, "little"), "")
            for row in rows
        ]
        writer.write(pa.Table.from_pylist([dict(zip(names, pair, strict=True)) for pair in pairs], schema))
    metadata = {FORMAT.encode(): FORMAT_VERSION.encode(), FINGERPRINT.encode(): b"vectors"}
    create(str(path), schema.with_metadata(metadata), writer.finish())
    parts = (vectors[start : start + ROWS_AT_ONCE] for start in range(0, len(vectors), ROWS_AT_ONCE))
    Catalog.open(path).add_columns({"caption_embedding": part.astype(np.float16)} for part in parts)


def measure(path: str, kind: str) -> None:
    """Find the duplicates of one kind, and print what it took."""
    catalog, settings = Catalog.open(path), dict(KINDS[kind])
    if "clusters" in settings:
        settings["clusters"] = max(1, round(len(catalog) / 1000))
    started, clock = time.process_time(), time.perf_counter()
    curated = curate(catalog, DuplicatesConfig(**settings), dry_run=True)
    seconds, clock = time.process_time() - started, time.perf_counter() - clock
    result = {
        "benchmark": "duplicates",
        "kind": kind,
        "rows": len(catalog),
        "dropped": int((curated.column("cause") == 1).sum()),
        "processor_seconds": round(seconds, 2),
        "seconds": round(clock, 2),
        "pairs_a_second_of_a_core": round(len(catalog) / seconds),
        "processor_seconds_per_million": round(1e6 * seconds / len(catalog), 1),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "load": round(os.getloadavg()[0], 1),
        "machine": machine(),
        "date": str(datetime.now(UTC).date()),
    }
    print(json.dumps(result), flush=True)


def main() -> None:
    """Measure each kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("catalog", help="catalog, or where to make one")
    parser.add_argument("--vectors", type=Path, help=".npy of vectors to make the catalog of")
    parser.add_argument("--rows", type=int, default=375_000, help="vectors that are taken")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        measure(arguments.catalog, arguments.one)
        return
    if arguments.vectors and not Path(arguments.catalog).exists():
        make_catalog(Path(arguments.catalog), np.load(arguments.vectors, mmap_mode="r")[: arguments.rows])
    for kind in arguments.kinds:
        if kind in PICTURES and arguments.vectors:
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = arguments.catalog
            if kind in PICTURES:
                path = shutil.copytree(path, Path(folder) / "c.lance", ignore=shutil.ignore_patterns("_modeclip"))
            subprocess.run([sys.executable, __file__, path, "--one", kind], check=True)


if __name__ == "__main__":
    main()
