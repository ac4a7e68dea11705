"""Measures seconds, memory and disk of each data stage per million pairs: the table of docs/scale.md.

Usage: python benchmarks/scale.py SOURCE FOLDER [--fine 1024] [--fit-samples 100000] [--workers 2]

SOURCE is anything that `modeclip index` takes; docs/scale.md was made with `iconify`. FOLDER is created, or its stages
are run again. Each stage runs in a process of its own, so that only its own memory counts. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

STAGES = {
    "index": "from modeclip.data.indexing import index; from modeclip.data.sources.options import DataConfig\n"
    "index(DataConfig.from_flat({{'source': {source!r}, 'workers': {workers}}}), {folder!r}, replace=True)",
    "embed": "from modeclip.clustering.embedding import EmbedConfig, embed\n"
    "embed(catalog, EmbedConfig(encoder='minilm'))",
    "fit": "from modeclip.clustering.fitting import ClusterConfig, fit\n"
    "fit(catalog, ClusterConfig(num_fine={fine}, fit_samples={fit_samples})).save({folder!r} + '/clusters')",
    "assign": "from modeclip.clustering.clusters import Clustering\n"
    "from modeclip.clustering.fitting import ClusterConfig, apply\n"
    "config = ClusterConfig(num_fine={fine}, fit_samples={fit_samples})\n"
    "apply(catalog, Clustering.load({folder!r} + '/clusters'), config).save({folder!r} + '/clusters')",
    "check": "from modeclip.data.checks import check\ncheck(catalog)",
}
CODE = """
import json
from pathlib import Path
from modeclip.data.catalog import Catalog
from modeclip.system.devices import PeakMemory
folder = Path({folder!r})
catalog = Catalog.open(folder) if {stage!r} != "index" else None
with PeakMemory() as peak:
    import time; started = time.monotonic()
{body}
    seconds = time.monotonic() - started
print(json.dumps([seconds, peak.gb, len(Catalog.open(folder))]))
"""


def disk_gb(folder: Path) -> float:
    """Return the size of all files below a folder, in 10^9 bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9


def main() -> None:
    """Run the stages and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--fine", type=int, default=1024)
    parser.add_argument("--fit-samples", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    values = vars(arguments) | {"folder": str(arguments.folder)}
    print(f"{datetime.now(UTC).date()}, {platform.machine()}, {os.cpu_count()} cores, {arguments.source}")
    print("| stage | pairs | seconds | pairs a second | seconds per million | peak memory GB | disk GB per million |")
    print("|---|---|---|---|---|---|---|")
    results = {}
    for stage in arguments.stages:
        body = "\n".join(f"    {line}" for line in STAGES[stage].format(**values).splitlines())
        before = disk_gb(arguments.folder) if stage != "index" else 0.0
        started = time.monotonic()
        code = CODE.format(stage=stage, folder=values["folder"], body=body)
        done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
        whole = time.monotonic() - started
        seconds, memory, pairs = json.loads(done.stdout.splitlines()[-1])
        disk = max(0.0, disk_gb(arguments.folder) - before) / pairs * 1e6
        million = seconds / pairs * 1e6
        print(
            f"| {stage} | {pairs:,} | {seconds:.1f} | {pairs / seconds:,.0f} | {million:.1f} | {memory:.2f} |"
            f" {disk:.3f} |"
        )
        results[stage] = {"pairs": pairs, "seconds": seconds, "with_start": whole, "memory_gb": memory, "disk_gb": disk}
    print(json.dumps({"benchmark": "scale", "stages": results}))


if __name__ == "__main__":
    main()
