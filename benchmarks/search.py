"""Compares searches of one index under routing weights with faiss: exact, approximate, and an index for each expert.

    python benchmarks/search.py [--images 375000] [--experts 4] [--size 64] [--rounds 7] [--approximate]

Vectors are random, drawn around centres as those of pictures are, each expert's with norm 1; texts lie apart from the
images, as CLIP's do. A query weighs the experts at random. Everything runs on one thread. In each round every way
searches the same query once, in turn; printed is the median time of each, and its ratio to faiss's flat search over
float32. Bar: 20 ms, or 1.2 times faiss, whichever is more.

The index for each expert is what one has to do without vectors that are put together: faiss's flat search in each, the
best of each list joined. Its answer is right only if the lists are long enough, so the share of the ten best that it
finds is printed too. ``--approximate`` builds modeclip's approximate index with a recall of 0.95 and times it too.
Bar: five times the rate of the exact search. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from statistics import median

import faiss
import numpy as np
import pyarrow as pa
import torch
from semdedup import machine

from modeclip.search.approximate import build_approximate, nearest
from modeclip.search.exact import Rows, half_is_fast

BEST = 10
LISTS = 100
CENTRES, QUERIES = 1000, 200


def draw(images: int, experts: int, size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return image vectors (N, experts * size) in float16 and queries of texts with random weights."""
    random = np.random.default_rng(seed)
    parts, texts = [], []
    centre_of, topic = random.integers(0, CENTRES, images), random.integers(0, CENTRES, QUERIES)
    weights = random.dirichlet(np.full(experts, 0.5), QUERIES).astype(np.float32)
    for expert in range(experts):
        centres = random.standard_normal((CENTRES, size), np.float32)
        part = centres[centre_of] + 0.7 * random.standard_normal((images, size), np.float32)
        gap = random.standard_normal(size, np.float32)
        asked = 0.5 * centres[topic] + 0.7 * random.standard_normal((QUERIES, size), np.float32) + gap
        parts.append(part / np.linalg.norm(part, axis=1, keepdims=True))
        texts.append(weights[:, [expert]] * asked / np.linalg.norm(asked, axis=1, keepdims=True))
    return np.concatenate(parts, axis=1).astype(np.float16), np.concatenate(texts, axis=1)


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=375_000)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--size", type=int, default=64, help="numbers in a vector of each expert")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--approximate", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    vectors, queries = draw(arguments.images, arguments.experts, arguments.size)
    rows, full = Rows(vectors), vectors.astype(np.float32)
    flat = faiss.IndexFlatIP(full.shape[1])
    flat.add(full)
    apart = []
    for part in np.split(full, arguments.experts, axis=1):
        index = faiss.IndexFlatIP(arguments.size)
        index.add(np.ascontiguousarray(part))
        apart.append(index)
    del full

    def separately(query: np.ndarray) -> np.ndarray:
        found = []
        for index, part in zip(apart, np.split(query, arguments.experts), strict=True):
            found.append(index.search(np.ascontiguousarray(part)[None], LISTS)[1][0])
        candidates = np.unique(np.concatenate(found))
        scores = rows.take(candidates) @ query
        best: np.ndarray = candidates[np.argsort(-scores)[:BEST]]
        return best

    ways: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "faiss, flat, float32": lambda query: flat.search(query[None], BEST)[1][0],
        "modeclip, exact": lambda query: rows.best(query[None], BEST)[0][0],
        f"an index for each of {arguments.experts} experts": separately,
    }
    folder = tempfile.TemporaryDirectory(prefix="modeclip-search-")
    if arguments.approximate:
        import lance

        flat_list = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
        dataset = lance.write_dataset(pa.table({"vector": flat_list}), folder.name)
        begun = time.perf_counter()
        found = build_approximate(dataset, rows, queries, 0.95)
        print(f"approximate index built and measured in {time.perf_counter() - begun:.0f} s: {found}")
        if found is not None:
            ways["modeclip, approximate"] = lambda query: nearest(dataset, query, BEST, found)
    truth = rows.best(queries, BEST)[0]
    times: dict[str, list[float]] = {name: [] for name in ways}
    shares: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(-2, arguments.rounds):
        for name, way in ways.items():
            begun = time.perf_counter()
            answer = way(queries[number])
            if number >= 0:
                times[name].append(1000 * (time.perf_counter() - begun))
                shares[name].append(len(np.intersect1d(answer, truth[number])) / BEST)
    folder.cleanup()
    today, peer = str(datetime.now(UTC).date()), median(times["faiss, flat, float32"])
    print(f"{today}, {machine()}, one thread, load {os.getloadavg()[0]:.1f}, seed 0")
    print(f"{len(rows):,} images, {arguments.experts} experts of {arguments.size} numbers, the best {BEST}")
    print(f"{'':<34}{'ms':>8}{'of faiss':>10}{'finds':>8}")
    for name, taken in times.items():
        print(f"{name:<34}{median(taken):>8.1f}{median(taken) / peer:>10.2f}{100 * np.mean(shares[name]):>7.1f}%")
    result = {name: {"ms": median(taken), "recall": float(np.mean(shares[name]))} for name, taken in times.items()}
    print(
        json.dumps({"date": today, "machine": machine(), "half": half_is_fast(), "load": os.getloadavg()[0], **result})
    )


if __name__ == "__main__":
    main()
