"""Peak memory and time of a training step for growing batches, with and without cached gradients.

    python benchmarks/cached_gradient.py                           the demo's model, micro-batches of 64
    python benchmarks/cached_gradient.py --model ViT-B-32 --micro-batch 8 --batches 16 64 256

Each row is a process of its own that trains three steps on real icons. Its memory is the peak that the operating system
counts (on a GPU, PyTorch) less the peak of the smallest batch, whose activations are those of one micro-batch. The
pictures take 3 x H x W bytes a sample of the machine's memory with either method and have a column of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import torch

from modeclip.models.clip import load_clip
from modeclip.training.jobs import EngineConfig, TrainConfig, TrainJob

STEPS = 3


def measure(
    folder: Path, catalog: Path, model: str, batch_size: int, micro_batch: int, threads: int
) -> tuple[float, float]:
    """Return the peak memory in 10^9 bytes and the samples per second of the last step."""
    config = TrainConfig(
        model=model,
        samples=2 * batch_size,
        batch_size=batch_size,
        total_parts=2,
        seed_parts=1,
        engine=EngineConfig(micro_batch=micro_batch, log_every=1, save_every="10h"),
    )
    job = TrainJob(
        name="benchmark",
        folder=str(folder),
        catalog=str(catalog),
        catalog_fingerprint="",
        config=config,
        first_step=0,
        last_step=STEPS,
        first_share=0.0,
        last_share=1.0,
        threads=threads,
    )
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "modeclip.training.trainer", str(job.save())]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    line = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    return line["memory_gb"], line["samples_per_second"]


def main() -> None:
    """Measure every batch size both ways and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="modeclip-icon")
    parser.add_argument("--micro-batch", type=int, default=64)
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256, 1024, 4096, 8192])
    parser.add_argument("--plain-up-to", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    from modeclip.data.indexing import index
    from modeclip.data.sources import DataConfig

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores"
    width, height = load_clip(arguments.model, seed=0).image_size
    print(f"{datetime.now(UTC).date()}, {platform.machine()}, {device}, torch {torch.__version__}, {arguments.model}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        index(DataConfig.from_flat({"source": "icons", "train_sets": ("tabler", "phosphor")}), folder)
        catalog, base = folder / "catalog.lance", 0.0
        print(f"{'batch':>6} {'pictures MB':>12} {'cached MB':>10} {'samples/s':>10} {'plain MB':>9} {'samples/s':>10}")
        for size in arguments.batches:
            common = (arguments.model, size)
            cached, rate = measure(folder / f"c{size}", catalog, *common, arguments.micro_batch, arguments.threads)
            base = base or cached
            row = f"{size:6,} {size * 3 * width * height / 1e6:12.1f} {1000 * (cached - base):10.0f} {rate:10.1f}"
            if size <= arguments.plain_up_to:
                plain, rate = measure(folder / f"p{size}", catalog, *common, 0, arguments.threads)
                row += f" {1000 * (plain - base):9.0f} {rate:10.1f}"
            print(row, flush=True)


if __name__ == "__main__":
    main()
