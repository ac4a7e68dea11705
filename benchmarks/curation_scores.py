"""Measures what DFN costs: scores from kept vectors, s-CLIPLoss against plain code, and the embedding of pairs.

Usage: python benchmarks/curation_scores.py [--pairs 65536] [--dimension 512] [--catalog FOLDER --filter MODEL]

Scores are of random unit vectors in float16 files. Each stage runs in a process of its own, so that only its own memory
counts; a busy machine makes seconds long, and leaves processor seconds nearly as they are. The peer of s-CLIPLoss is
the formula with one matrix of logits for a batch of 8,192; both take turns. With a catalog, its pairs are embedded by
the filter too. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

PEER_BATCH, ROUNDS = 8192, 3
STAGES = {
    "cosine": "scores.cosine(images, texts)",
    "NormSim, p = 2, 50,000 targets": "scores.normsim(images, np.asarray(targets, np.float32), '2')",
    "NormSim, p = inf, 50,000 targets": "scores.normsim(images, np.asarray(targets, np.float32), 'inf')",
    "s-CLIPLoss, one partition": "scores.sclip_of_partition(images, texts, 0)",
    "threshold of a fraction": "scores.threshold_of(random, 0.15)",
    "soft cap, 10 draws a pair": "scores.soft_cap(random, 10 * len(random))",
}
CODE = """
import json, time
import numpy as np
from modeclip.curation import scores
from modeclip.system.devices import PeakMemory, memory_gb
images, texts, targets = (np.load({folder!r} + f"/{{name}}.npy", mmap_mode="r") for name in ("x", "t", "g"))
random = np.random.default_rng(0).normal(size=len(images))
import torch
with PeakMemory() as peak:
    started, worked = time.monotonic(), time.process_time()
    {body}
    seconds, worked = time.monotonic() - started, time.process_time() - worked
print(json.dumps([seconds, worked, peak.gb]))
"""
EMBED = """
import json, time
from modeclip.curation.curating import curate
from modeclip.curation import dfn
from modeclip.curation.dfn import DfnConfig
from modeclip.data.catalog import Catalog
from modeclip.system.devices import PeakMemory
catalog = Catalog.open({catalog!r})
dfn._encoder({model!r}, 0)  # loading it takes the same for any number of pairs
with PeakMemory() as peak:
    started, worked = time.monotonic(), time.process_time()
    curate(catalog, DfnConfig(filter={model!r}, random_weights=True), name="benchmark", dry_run=True)
    seconds, worked = time.monotonic() - started, time.process_time() - worked
print(json.dumps([seconds, worked, peak.gb, len(catalog)]))
"""


def write_vectors(folder: Path, name: str, count: int, dimension: int) -> None:
    """Write random unit vectors as float16."""
    draw = np.random.default_rng([ord(name), 0])
    file = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float16, (count, dimension))
    for start in range(0, count, 65_536):
        part = draw.normal(size=(min(65_536, count - start), dimension)).astype(np.float32)
        file[start : start + len(part)] = part / np.linalg.norm(part, axis=1, keepdims=True)


def run(code: str) -> list[float]:
    """Run a stage in a process of its own; return what it prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def ratio(folder: Path) -> float:
    """Return how many times as fast s-CLIPLoss is as plain code, by the median of rounds in turns."""
    import torch

    from modeclip.curation import scores

    images, texts = (np.load(folder / f"{name}.npy", mmap_mode="r")[:PEER_BATCH] for name in ("x", "t"))

    def plain() -> np.ndarray:
        x, t = (torch.from_numpy(part.astype(np.float32)) for part in (images, texts))
        logits = x @ t.T / scores.TAU
        loss = torch.diagonal(torch.log_softmax(logits, 1)) + torch.diagonal(torch.log_softmax(logits, 0))
        return (scores.TAU / 2 * loss).numpy()

    times: dict[str, list[float]] = {"ours": [], "plain": []}
    for _ in range(ROUNDS):
        for name, score in (("ours", lambda: scores.sclip(images, texts)), ("plain", plain)):
            started = time.monotonic()
            found = score()
            times[name].append(time.monotonic() - started)
    assert np.allclose(found, scores.sclip(images, texts), atol=1e-4)
    return float(np.median(times["plain"]) / np.median(times["ours"]))


def main() -> None:
    """Run the stages and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=65_536)
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--catalog", default="")
    parser.add_argument("--filter", default="modeclip-icon")
    given = parser.parse_args()
    rows: dict[str, dict[str, float]] = {}

    def tell(stage: str, seconds: float, worked: float, gb: float, pairs: int) -> None:
        rows[stage] = {"pairs": pairs, "seconds": seconds, "processor_seconds": worked, "memory_gb": gb}
        cells = f"{pairs:,} | {pairs / seconds:,.0f} | {1e6 * seconds / pairs:,.1f} | {1e6 * worked / pairs:,.1f}"
        print(f"| {stage} | {cells} | {gb:.2f} |", flush=True)

    columns = ("stage", "pairs", "pairs a second", "seconds per million", "processor seconds", "peak memory GB")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for vectors, count in (("x", given.pairs), ("t", given.pairs), ("g", 50_000)):
            write_vectors(folder, vectors, count, given.dimension)
        for stage, body in STAGES.items():
            tell(stage, *run(CODE.format(folder=str(folder), body=body)), given.pairs)
        faster = ratio(folder)
    if given.catalog:
        seconds, worked, gb, pairs = run(EMBED.format(catalog=given.catalog, model=given.filter))
        tell(f"embed with {given.filter}", seconds, worked, gb, int(pairs))
    print(f"s-CLIPLoss: {faster:.2f} times the rate of one matrix of logits, batch {PEER_BATCH:,}")
    print(json.dumps({"stages": rows, "ratio": faster}))


if __name__ == "__main__":
    main()
