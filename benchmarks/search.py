"""Compares searches of one index under routing weights with faiss: exact, approximate, and an index for each expert.

    python benchmarks/search.py [--index INDEX] [--images 375000] [--experts 4] [--size 64] [--rounds 21]

With ``--index`` the vectors are those of an index that `modeclip search build` has made, and the queries its captions,
routed as users' are. Without it, vectors are random, drawn around centres as those of pictures are, each expert's with
norm 1, texts lie apart from the images, as CLIP's do, and a query weighs the experts at random. Everything runs on one
thread. In each round every way searches the same query once, in turn; printed is the median time of each, the
processor's too, which a busy machine disturbs less, and the ratio to faiss's flat search over float32. Bar: 20 ms, or
1.2 times faiss, whichever is more.

The index for each expert is what one has to do without vectors that are put together: faiss's flat search in each, the
best of each list joined. Its answer is right only if the lists are long enough, so the share of the ten best that it
finds is printed too. The approximate index is built for a recall of 0.95 with half of the queries; what it finds is
printed of the other half, which is timed too. Bar: five times the rate of the exact search. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from statistics import median

import faiss
import numpy as np
import torch
from semdedup import machine

from modeclip.search.approximate import build_approximate
from modeclip.search.exact import Rows, half_is_fast
from modeclip.search.index import Index

BEST = 10
LISTS = 100
CENTRES, QUERIES = 1000, 400


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


def read(folder: str) -> tuple[Rows, np.ndarray, int]:
    """Return the rows of an index, captions as queries, and the number of its experts."""
    index = Index.open(folder)
    drawn = np.random.default_rng(0).permutation(len(index))[: 4 * QUERIES]
    captions = [found["caption"] for found in index.read(drawn.tolist(), ["caption"])]
    texts = list(dict.fromkeys(caption for caption in captions if caption and caption.strip()))[:QUERIES]
    return index.rows, index.model.encode_texts(texts, index.model.weigh(texts)), len(index.model.names)


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=375_000)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--size", type=int, default=64, help="numbers in a vector of each expert")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--index", help="index whose vectors and captions are taken")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    if arguments.index is None:
        vectors, queries = draw(arguments.images, arguments.experts, arguments.size)
        rows, experts = Rows(vectors), arguments.experts
    else:
        rows, queries, experts = read(arguments.index)
    full = rows.take(np.arange(len(rows)))
    flat = faiss.IndexFlatIP(full.shape[1])
    flat.add(full)
    apart = []
    for part in np.split(full, experts, axis=1):
        index = faiss.IndexFlatIP(part.shape[1])
        index.add(np.ascontiguousarray(part))
        apart.append(index)
    del full

    def separately(query: np.ndarray) -> np.ndarray:
        found = []
        for index, part in zip(apart, np.split(query, experts), strict=True):
            found.append(index.search(np.ascontiguousarray(part)[None], LISTS)[1][0])
        candidates = np.unique(np.concatenate(found))
        scores = rows.take(candidates) @ query
        best: np.ndarray = candidates[np.argsort(-scores)[:BEST]]
        return best

    ways: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "faiss, flat, float32": lambda query: flat.search(query[None], BEST)[1][0],
        "modeclip, exact": lambda query: rows.best(query[None], BEST)[0][0],
        f"an index for each of {experts} experts": separately,
    }
    begun = time.perf_counter()
    found = build_approximate(rows, queries[::2], 0.95)
    print(f"approximate index built and measured in {time.perf_counter() - begun:.0f} s: {found and found[0]}")
    if found is not None:
        facts, candidates = found
        ways["modeclip, approximate"] = lambda query: candidates.best(rows, query, BEST, facts.looked_at)
    asked = queries[1::2]
    truth = rows.best(asked, BEST)[0]
    times: dict[str, list[float]] = {name: [] for name in ways}
    processor: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(-2, arguments.rounds):
        for name, way in ways.items():
            begun, used = time.perf_counter(), time.process_time()
            way(asked[number])
            if number >= 0:
                times[name].append(1000 * (time.perf_counter() - begun))
                processor[name].append(1000 * (time.process_time() - used))
    finds = {
        name: float(np.mean([len(np.intersect1d(way(query), true)) for query, true in zip(asked, truth, strict=True)]))
        / BEST
        for name, way in ways.items()
    }
    today, peer = str(datetime.now(UTC).date()), median(times["faiss, flat, float32"])
    print(f"{today}, {machine()}, one thread, load {os.getloadavg()[0]:.1f}, seed 0")
    print(f"{len(rows):,} images, {experts} experts, {rows.dimension} numbers in all, the best {BEST}")
    print(f"{'':<34}{'ms':>8}{'processor':>11}{'of faiss':>10}{'finds':>8}")
    for name, taken in times.items():
        row = f"{median(taken):>8.2f}{median(processor[name]):>11.2f}{median(taken) / peer:>10.3f}"
        print(f"{name:<34}{row}{100 * finds[name]:>7.1f}%")
    result = {
        name: {"ms": median(taken), "processor_ms": median(processor[name]), "finds": finds[name]}
        for name, taken in times.items()
    }
    print(
        json.dumps({"date": today, "machine": machine(), "half": half_is_fast(), "load": os.getloadavg()[0], **result})
    )


if __name__ == "__main__":
    main()
