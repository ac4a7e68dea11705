"""How much reading slows down training on small pictures, with pictures and freed memory kept or not.

Usage: python benchmarks/feed.py runs/demo/catalog.lance [--model modeclip-icon-xs] [--passes 3] [--rounds 3]

Each variant is a training job in a process of its own with one thread; the variants take turns. The rate is the median
over the log lines after the first pass over the pictures, since the first pass reads every picture in every variant.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from modeclip import Catalog
from modeclip.training.jobs import EngineConfig, TrainConfig, TrainJob

BATCH = 256
GIVING_BACK = "import sys, modeclip.training.trainer as t; t.keep_freed_memory = lambda: None; t.main(sys.argv[1])"
VARIANTS = {
    "read anew, memory given back": (0.0, ["-c", GIVING_BACK]),
    "read anew, memory kept": (0.0, ["-m", "modeclip.training.trainer"]),
    "pictures kept, memory given back": (4.0, ["-c", GIVING_BACK]),
    "pictures kept, memory kept": (4.0, ["-m", "modeclip.training.trainer"]),
}


def rate(catalog: Path, model: str, passes: int, gigabytes: float, words: list[str]) -> float:
    """Train a job and return its samples per second after the first pass."""
    steps = len(Catalog.open(catalog)) // BATCH
    with tempfile.TemporaryDirectory() as folder:
        engine = EngineConfig(keep_pictures_gb=gigabytes, save_every="10h")
        job = TrainJob(
            name="feed",
            folder=folder,
            catalog=str(catalog),
            catalog_fingerprint="",
            config=TrainConfig(model=model, samples=passes * steps * BATCH, batch_size=BATCH, engine=engine),
            first_step=0,
            last_step=passes * steps,
            first_share=0.0,
            last_share=1.0,
        )
        subprocess.run([sys.executable, *words, str(job.save())], check=True)
        lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return float(np.median([line["samples_per_second"] for line in lines if line["step"] > steps]))


def main() -> None:
    """Measure every variant in turn and print medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("catalog", type=Path)
    parser.add_argument("--model", default="modeclip-icon-xs")
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    rates: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(arguments.rounds):
        for name, (gigabytes, words) in VARIANTS.items():
            rates[name].append(rate(arguments.catalog, arguments.model, arguments.passes, gigabytes, words))
    medians = {name: float(np.median(found)) for name, found in rates.items()}
    base = medians["read anew, memory given back"]
    print(f"{datetime.now(UTC).date()}, torch {torch.__version__}, {platform.machine()}, one thread, {arguments.model}")
    for name, found in medians.items():
        print(f"{name:<34} {found:7,.0f} samples/s   {found / base:.2f} x   {[round(x) for x in rates[name]]}")
    print(json.dumps({"ratio": round(medians["pictures kept, memory kept"] / base, 3)}))


if __name__ == "__main__":
    main()
