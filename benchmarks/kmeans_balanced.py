"""Time and objective of balanced k-means, beside free k-means and, where it is installed, `k-means-constrained`.

    python benchmarks/kmeans_balanced.py                     20,000 rows, 256 clusters, ratios none, 1.5, 1.1
    python benchmarks/kmeans_balanced.py --rows 4000 --clusters 64

The rows are seeded unit vectors in groups whose sizes fall like those of topics do (a power law), so that free clusters
come out uneven. The objective is the mean squared distance to the assigned centre. One run of `k-means-constrained`
from one start is shown; its default takes the best of ten. Set OMP_NUM_THREADS to say how many threads both may use.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

RATIOS = (None, 1.5, 1.1)


def make_rows(num_rows: int, dimension: int, seed: int) -> np.ndarray:
    """Return (N, D) float32 unit vectors around 400 centres, of which some are met far more often than others."""
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((400, dimension))
    centers /= np.linalg.norm(centers, axis=1, keepdims=True)
    share = np.arange(1, 401) ** -0.7
    group = rng.choice(400, num_rows, p=share / share.sum())
    x = centers[group] + rng.standard_normal((num_rows, dimension)) / math.sqrt(dimension)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def ours(x: np.ndarray, num_clusters: int, ratio: float | None, seed: int) -> tuple[float, np.ndarray]:
    """Return objective and sizes of modeclip's k-means."""
    from modeclip.kmeans import kmeans

    result = kmeans(x, num_clusters, max_size_ratio=ratio, seed=seed)
    return result.objective, result.sizes


def constrained(x: np.ndarray, num_clusters: int, ratio: float | None, seed: int) -> tuple[float, np.ndarray]:
    """Return objective and sizes of one run of k-means-constrained."""
    from k_means_constrained import KMeansConstrained

    most = math.ceil((ratio or num_clusters) * len(x) / num_clusters - 1e-9)
    model = KMeansConstrained(n_clusters=num_clusters, size_max=most, n_init=1, max_iter=25, random_state=seed)
    labels = model.fit_predict(x)
    return float(model.inertia_) / len(x), np.bincount(labels, minlength=num_clusters)


def machine() -> str:
    """Return the processor's name, cores, and the threads that may be used."""
    path = Path("/proc/cpuinfo")
    names = [line for line in path.read_text().splitlines() if "model name" in line] if path.exists() else []
    name = names[0].split(":")[1].strip() if names else platform.processor()
    return f"{name}, {os.cpu_count()} cores, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'not set')}"


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--clusters", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=int, default=3, help="of ours; seeds count up from --seed")
    arguments = parser.parse_args()

    x = make_rows(arguments.rows, arguments.dimension, arguments.seed)
    today = datetime.now(UTC).date()
    print(f"{today}, {machine()}, seed {arguments.seed}, load {os.getloadavg()[0]:.1f} at the start")
    print(f"{len(x):,} x {x.shape[1]} unit vectors, {arguments.clusters} clusters")
    print(
        f"{'method':<22}{'ratio':>6}{'seed':>6}{'seconds':>9}{'CPU s':>8}{'objective':>11}{'largest':>9}{'smallest':>9}"
    )

    def show(method: str, fit: Callable[..., tuple[float, np.ndarray]], ratio: float | None, seed: int) -> None:
        started, cpu = time.perf_counter(), time.process_time()
        objective, sizes = fit(x, arguments.clusters, ratio, seed)
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        print(
            f"{method:<22}{ratio or 'none':>6}{seed:>6}{seconds:>9.2f}{cpu:>8.2f}{objective:>11.5f}"
            f"{sizes.max():>9}{sizes.min():>9}",
            flush=True,
        )

    ours(x[: arguments.clusters * 4], arguments.clusters, 1.5, 0)  # imports and threads are not timed
    for ratio in RATIOS:
        for seed in range(arguments.seed, arguments.seed + arguments.runs):
            show("modeclip", ours, ratio, seed)
    try:
        import k_means_constrained  # noqa: F401
    except ImportError:
        print("k-means-constrained is not installed: no comparison")
        return
    for ratio in RATIOS[1:]:
        show("k-means-constrained", constrained, ratio, arguments.seed)


if __name__ == "__main__":
    main()
