"""Compares SemDeDup with one made of faiss, k-means and a search in each cluster, on the same vectors and threads.

    python benchmarks/semdedup.py VECTORS.npy
    python benchmarks/semdedup.py icons.npy --iconify node_modules/@iconify/json     makes the file first

The file holds unit vectors, one for each pair. With ``--iconify`` it is made of the names of all icons of npm's package
@iconify/json by the packaged MiniLM, 381,000 of them; most names stand in several sets, as captions of the web repeat
each other. ``--jitter`` adds noise of a given length to each vector, after which none repeats another to the bit, as
those of images do not.

A round is timed from the vectors to the decisions: k-means (faiss 20 iterations, modeclip as in the product),
assignment, members by distance to the centre, farthest first, near pairs, who stays. faiss fits on its default of 256
rows a centre, and finds near pairs by a range search in an index of each cluster. Then both search the clusters that
faiss made: what each drops, and for what, must be the same; where not, float64 says who is right. The ratio is
modeclip's time divided by faiss's, the median over the rounds, by the clock and in processor seconds. The last line is
JSON. Bar: at most 0.5 of the time, same pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import faiss
import numpy as np
import torch

from modeclip.clustering.distances import assign_nearest, for_each_block
from modeclip.clustering.fitting import sample_rows
from modeclip.curation.clustered import ROWS_PER_CENTER, center_of, fit_centers
from modeclip.curation.semdedup import find_near_copies, nearest_before

BAR = 0.5
ITERATIONS = 20
Search = Callable[[np.ndarray, float, bool], np.ndarray]
"""Returns for each member of a cluster, given in order, what it is dropped for, -1 if it stays."""


def make_vectors(package: Path) -> np.ndarray:
    """Return the vectors of the names of all icons of @iconify/json."""
    from modeclip.data.sources.iconify import iconify_caption, variant_pattern
    from modeclip.models.encoders import load_encoder

    names = []
    for path in sorted((package / "json").glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        pattern, icons = variant_pattern(content), content["icons"]
        names += [iconify_caption(icon, pattern) for icon in sorted(icons) if not icons[icon].get("hidden")]
    distinct, inverse = np.unique(np.array(names, object), return_inverse=True)
    by_length = np.argsort([len(name) for name in distinct], kind="stable")
    encoder = load_encoder("minilm")
    vectors = np.empty((len(distinct), encoder.dimension), np.float32)
    for start in range(0, len(distinct), 8192):
        some = by_length[start : start + 8192]
        vectors[some] = encoder.encode(distinct[some].tolist())
    return vectors.astype(np.float16)[inverse]


def machine() -> str:
    """Return the processor's name and the number of cores."""
    path = Path("/proc/cpuinfo")
    names = [line for line in path.read_text().splitlines() if "model name" in line] if path.exists() else []
    name = names[0].split(":")[1].strip() if names else platform.processor()
    return f"{name}, {os.cpu_count()} cores"


def our_search(x: np.ndarray, threshold: float, chain: bool) -> np.ndarray:
    """Search a cluster with modeclip."""
    if not chain:
        return find_near_copies(x, threshold)[0]
    nearest, cosine = nearest_before(x)
    return np.where(cosine > threshold, nearest, -1)


def faiss_search(x: np.ndarray, threshold: float, chain: bool) -> np.ndarray:
    """Search a cluster with faiss: all near pairs, then who stays."""
    index = faiss.IndexFlatIP(x.shape[1])
    index.add(x)
    limits, cosine, near = index.range_search(x, threshold)
    later = np.repeat(np.arange(len(x)), np.diff(limits.astype(np.int64)))
    before = near < later
    later, near, cosine = later[before], near[before], cosine[before]
    copy_of = np.full(len(x), -1)
    if chain:
        order = np.lexsort((near, -cosine, later))
        some, best = np.unique(later[order], return_index=True)
        copy_of[some] = near[order][best]
        return copy_of
    order = np.lexsort((near, later))
    for one, other in zip(later[order].tolist(), near[order].tolist(), strict=True):
        if copy_of[one] < 0 and copy_of[other] < 0:
            copy_of[one] = other
    return copy_of


def search_clusters(
    x: np.ndarray, labels: np.ndarray, search: Search, threshold: float, chain: bool, threads: bool
) -> np.ndarray:
    """Return for each row what it is dropped for, -1 if it stays."""
    order = np.argsort(labels, kind="stable")
    clusters = np.split(order, np.cumsum(np.bincount(labels))[:-1])
    copy_of = np.full(len(x), -1)

    def work(block: slice) -> None:
        members = clusters[block.start]
        if not len(members):
            return
        rows = x[members]
        by_distance = np.lexsort((members, np.vecdot(rows, center_of(rows)).round(12)))
        members = members[by_distance]
        found = search(rows[by_distance], threshold, chain)
        copy_of[members] = np.where(found < 0, -1, members[found])

    if threads:
        for_each_block(len(clusters), 1, work, "cpu")
    else:
        for number in range(len(clusters)):
            work(slice(number, number + 1))
    return copy_of


def ours(x: np.ndarray, clusters: int, threshold: float, chain: bool, seed: int) -> np.ndarray:
    """Cluster and search with modeclip."""
    centers = fit_centers(x[sample_rows(len(x), ROWS_PER_CENTER * clusters, seed)], clusters, seed)
    labels = assign_nearest(x, centers)[0]
    search_clusters(x, labels, our_search, threshold, chain, threads=True)
    return labels


def theirs(x: np.ndarray, clusters: int, threshold: float, chain: bool, seed: int) -> np.ndarray:
    """Cluster and search with faiss, which uses all threads for each call."""
    model = faiss.Kmeans(x.shape[1], clusters, niter=ITERATIONS, spherical=True, seed=seed + 1)
    model.train(x)
    labels = model.index.search(x, 1)[1][:, 0]
    search_clusters(x, labels, faiss_search, threshold, chain, threads=False)
    return np.asarray(labels)


def timed(work: Callable[..., np.ndarray], *settings: object) -> tuple[np.ndarray, np.ndarray]:
    """Return seconds by the clock and of the processor, and the result."""
    started = np.array([time.perf_counter(), time.process_time()])
    result = work(*settings)
    return np.array([time.perf_counter(), time.process_time()]) - started, result


def differences(x: np.ndarray, one: np.ndarray, other: np.ndarray, threshold: float) -> tuple[int, int]:
    """Return in how many rows two searches differ, and in how many of these not by rounding at the threshold or a tie.

    What one row's difference entails for rows after it counts as rounding only if their own cosines are at the
    threshold or equal, so the second number is an upper bound.
    """
    rows = np.flatnonzero(one != other)
    real = 0
    for row in rows:
        pair = [float(x[row].astype(np.float64) @ x[of]) if of >= 0 else threshold for of in (one[row], other[row])]
        real += abs(pair[0] - pair[1]) > 1e-6
    return len(rows), real


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vectors", type=Path, help=".npy of unit vectors")
    parser.add_argument("--iconify", type=Path, help="unpacked package @iconify/json to make the file of")
    parser.add_argument("--rows", type=int, default=375_000, help="rows that are taken, from the first on")
    parser.add_argument("--jitter", type=float, default=0.0, help="length of the noise that is added to each vector")
    parser.add_argument("--clusters", type=int, default=375)
    parser.add_argument("--eps", type=float, default=0.05)
    parser.add_argument("--chain", action="store_true", help="as published: dropped rows drop others")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()

    if not arguments.vectors.exists():
        np.save(arguments.vectors, make_vectors(arguments.iconify))
    x = np.load(arguments.vectors, mmap_mode="r")[: arguments.rows].astype(np.float32)
    if arguments.jitter:
        noise = np.random.default_rng(0).standard_normal(x.shape, np.float32)
        x += arguments.jitter * noise / np.linalg.norm(noise, axis=1, keepdims=True)
        del noise
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    threads = torch.get_num_threads()
    faiss.omp_set_num_threads(threads)
    threshold, today = 1 - arguments.eps, str(datetime.now(UTC).date())
    some = x.view(f"V{4 * x.shape[1]}").reshape(-1)[:: max(1, len(x) // 20_000)]
    distinct = len(np.unique(some)) / len(some)
    print(f"{today}, {machine()}, {threads} threads, load {os.getloadavg()[0]:.1f} at the start")
    shape = f"{len(x):,} x {x.shape[1]}, {100 * distinct:.0f} % of a sample of {len(some):,} distinct"
    print(f"{shape}, {arguments.clusters} clusters, eps {arguments.eps:g}")
    fit_centers(x[:4096], 16, 0)  # imports and threads are not timed
    our_search(x[:1024], threshold, arguments.chain)
    print(f"{'round':<7}{'':<10}{'clock s':>9}{'processor s':>13}{'dropped':>10}{'alike: differ':>15}{'really':>8}")
    ratios, differ, real, dropped = [], 0, 0, []
    for seed in range(arguments.rounds):
        settings = (x, arguments.clusters, threshold, arguments.chain, seed)
        pairs = [("faiss", theirs), ("modeclip", ours)]
        seconds, labels = {}, {}
        for name, work in pairs if seed % 2 == 0 else pairs[::-1]:
            seconds[name], labels[name] = timed(work, *settings)
        same = labels["faiss"]
        one = search_clusters(x, same, our_search, threshold, arguments.chain, threads=True)
        other = search_clusters(x, same, faiss_search, threshold, arguments.chain, threads=False)
        unlike = differences(x, one, other, threshold)
        differ, real = differ + unlike[0], real + unlike[1]
        dropped.append(int((one >= 0).sum()))
        ratios.append(seconds["modeclip"] / seconds["faiss"])
        print(f"{seed:<7}{'faiss':<10}{seconds['faiss'][0]:>9.2f}{seconds['faiss'][1]:>13.2f}{(other >= 0).sum():>10,}")
        print(
            f"{'':<7}{'modeclip':<10}{seconds['modeclip'][0]:>9.2f}{seconds['modeclip'][1]:>13.2f}{dropped[-1]:>10,}"
            f"{unlike[0]:>15}{unlike[1]:>8}",
            flush=True,
        )
    clock, processor = (median(column) for column in zip(*ratios, strict=True))
    result = {
        "benchmark": "semdedup",
        "ratio": round(clock, 4),
        "processor_ratio": round(processor, 4),
        "bar": BAR,
        "rows_unlike": differ,
        "rows_unlike_not_by_rounding": real,
        "met": bool(clock <= BAR and real == 0),
        "dropped": dropped,
        "rows": len(x),
        "jitter": arguments.jitter,
        "clusters": arguments.clusters,
        "eps": arguments.eps,
        "chain": arguments.chain,
        "rounds": arguments.rounds,
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "threads": threads,
        "machine": machine(),
        "date": today,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
