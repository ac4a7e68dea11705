"""Compares the time of k-means and of assigning all rows with faiss on the same vectors, threads and process.

    python benchmarks/kmeans_faiss.py VECTORS.npy
    python benchmarks/kmeans_faiss.py CATALOG.lance --fine 1024 --rounds 3

A round fits with faiss (20 iterations over all rows) and with modeclip, then assigns all rows to faiss's centres with
both. The objective is the mean squared distance of all rows to their nearest centre. Where the two assignments differ,
float64 distances decide which one is right. The ratio is modeclip's time divided by faiss's, by the medians of the
rounds; the last line is JSON. Bars: a fit with an objective at most 0.1 % above that of faiss in at most 0.5 of its
time, and the assignment in at most 0.8 of its time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import faiss
import numpy as np
import torch

from modeclip.clustering.distances import assign_nearest
from modeclip.clustering.kmeans import kmeans

FIT_BAR, ASSIGN_BAR, OBJECTIVE_BAR = 0.5, 0.8, 1.001


def read_vectors(path: str) -> np.ndarray:
    """Return (N, D) float32 rows of a numpy file or of the caption embeddings of a catalog."""
    if path.endswith(".npy"):
        return np.asarray(np.load(path, mmap_mode="r"), np.float32)
    from modeclip.data.catalog import Catalog

    batches = Catalog.open(path).batches(["caption_embedding"], batch_size=65_536)
    return np.concatenate([np.asarray(batch["caption_embedding"], np.float32) for batch in batches])


def machine() -> str:
    """Return the processor's name and the number of cores."""
    path = Path("/proc/cpuinfo")
    names = [line for line in path.read_text().splitlines() if "model name" in line] if path.exists() else []
    name = names[0].split(":")[1].strip() if names else platform.processor()
    return f"{name}, {os.cpu_count()} cores"


def timed(work: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[float, Any]:
    """Return seconds and result."""
    started = time.perf_counter()
    result = work(*arguments, **options)
    return time.perf_counter() - started, result


def faiss_fit(x: np.ndarray, fine: int, seed: int) -> np.ndarray:
    """Return faiss's centres after 20 iterations over all rows."""
    model = faiss.Kmeans(x.shape[1], fine, niter=20, max_points_per_centroid=len(x) // fine + 1, seed=seed + 1)
    model.train(x)
    return np.asarray(model.centroids)


def faiss_search(x: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Return each row's nearest centre according to faiss."""
    index = faiss.IndexFlatL2(x.shape[1])
    index.add(centers)
    return np.asarray(index.search(x, 1)[1][:, 0])


def unlike(x: np.ndarray, centers: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> tuple[int, int]:
    """Return how many rows differ, and for how many of these float64 brute force does not give ours."""
    rows = np.flatnonzero(ours != theirs)
    exact = [np.square(x[row].astype(np.float64) - centers).sum(1).argmin() for row in rows]
    return len(rows), int(np.count_nonzero(ours[rows] != np.array(exact, np.int64)))


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vectors", help=".npy file or catalog")
    parser.add_argument("--fine", type=int, default=1024, help="number of centres")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=12, help="of modeclip")
    arguments = parser.parse_args()

    threads = torch.get_num_threads()
    faiss.omp_set_num_threads(threads)
    x = read_vectors(arguments.vectors)
    today = str(datetime.now(UTC).date())
    print(f"{today}, {machine()}, {threads} threads, load {os.getloadavg()[0]:.1f} at the start")
    print(f"{len(x):,} x {x.shape[1]} float32, {arguments.fine} centres, modeclip {arguments.iterations} iterations")
    kmeans(x[: 8 * arguments.fine], arguments.fine, num_iterations=1)  # imports and threads are not timed
    print(f"{'round':<7}{'':<10}{'fit s':>9}{'objective':>12}{'assign s':>10}{'rows unlike':>13}{'of ours wrong':>15}")
    table = []
    for seed in range(arguments.rounds):
        their_fit, centers = timed(faiss_fit, x, arguments.fine, seed)
        our_fit, fit = timed(kmeans, x, arguments.fine, num_iterations=arguments.iterations, seed=seed)
        our_time, (index, squared) = timed(assign_nearest, x, centers)
        their_time, their_index = timed(faiss_search, x, centers)
        objective = float(squared.mean(dtype=np.float64))
        differ, wrong = unlike(x, centers, index, their_index)
        print(f"{seed:<7}{'faiss':<10}{their_fit:>9.2f}{objective:>12.6f}{their_time:>10.2f}")
        print(
            f"{'':<7}{'modeclip':<10}{our_fit:>9.2f}{fit.objective:>12.6f}{our_time:>10.2f}{differ:>13}{wrong:>15}",
            flush=True,
        )
        table.append((our_fit, their_fit, fit.objective / objective, our_time, their_time, wrong))
    our_fit, their_fit, objective_ratio, our_time, their_time, _ = (
        median(column) for column in zip(*table, strict=True)
    )
    wrong = sum(row[-1] for row in table)
    fit_ratio, assign_ratio = our_fit / their_fit, our_time / their_time
    result = {
        "benchmark": "kmeans_faiss",
        "ratio": round(fit_ratio, 4),
        "bar": FIT_BAR,
        "assign_ratio": round(assign_ratio, 4),
        "assign_bar": ASSIGN_BAR,
        "objective_ratio": round(objective_ratio, 5),
        "objective_bar": OBJECTIVE_BAR,
        "wrong_rows": wrong,
        "met": fit_ratio <= FIT_BAR and objective_ratio <= OBJECTIVE_BAR and assign_ratio <= ASSIGN_BAR and wrong == 0,
        "rows": len(x),
        "fine": arguments.fine,
        "rounds": arguments.rounds,
        "threads": threads,
        "machine": machine(),
        "date": today,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
