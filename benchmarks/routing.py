"""How fast `per_class` weighs many texts, beside the formula written out in NumPy.

Usage: python benchmarks/routing.py [--texts 100000] [--fine 1024 8192] [--rounds 3]

Both run in turns in one process. The peer computes all squared distances in float64, the softmax over the centres and
the sums of each expert, 4096 texts at a time. For both it prints the seconds per million texts (best of the rounds),
then their ratio and the largest difference of a weight.
"""

from __future__ import annotations

import argparse
import platform
import time
from datetime import UTC, datetime

import numpy as np

from modeclip.mixture.rules import route

DIMENSION, EXPERTS, CHUNK = 384, 4, 4096


def written_out(texts: np.ndarray, centers: np.ndarray, expert_of_fine: np.ndarray, temperature: float) -> np.ndarray:
    """Return the weights by the formula, without any trick."""
    member = np.eye(EXPERTS)[expert_of_fine]
    wide, weights = centers.astype(np.float64), []
    for start in range(0, len(texts), CHUNK):
        some = texts[start : start + CHUNK].astype(np.float64)
        squared = np.square(some).sum(1)[:, None] - 2 * some @ wide.T + np.square(wide).sum(1)
        affinity = np.exp(-(squared - squared.min(1, keepdims=True)) / temperature)
        weights.append((affinity / affinity.sum(1, keepdims=True)) @ member)
    return np.concatenate(weights)


def unit(rng: np.random.Generator, rows: int) -> np.ndarray:
    """Return random unit vectors."""
    x = rng.standard_normal((rows, DIMENSION), dtype=np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def main() -> None:
    """Time both and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=100_000)
    parser.add_argument("--fine", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(f"{platform.machine()}, {datetime.now(UTC).date()}, {arguments.texts:,} texts, seed 0\n")
    print("| fine clusters | modeclip, s a million | NumPy, s a million | ratio | largest difference |")
    print("|---|---|---|---|---|")
    for fine in arguments.fine:
        rng = np.random.default_rng(0)
        texts, centers, experts = unit(rng, arguments.texts), unit(rng, fine), rng.integers(0, EXPERTS, fine)
        best, found = {"ours": np.inf, "peer": np.inf}, {}
        for _ in range(arguments.rounds):
            started = time.perf_counter()
            found["ours"] = route(
                texts, centers, experts, num_experts=EXPERTS, rule="per_class", temperature=0.1
            ).weights
            between = time.perf_counter()
            found["peer"] = written_out(texts, centers, experts, 0.1)
            best["ours"] = min(best["ours"], between - started)
            best["peer"] = min(best["peer"], time.perf_counter() - between)
        million = {name: seconds * 1e6 / arguments.texts for name, seconds in best.items()}
        difference = np.abs(found["ours"] - found["peer"]).max()
        ratio = million["ours"] / million["peer"]
        print(
            f"| {fine:,} | {million['ours']:.1f} | {million['peer']:.1f} | {ratio:.2f} | {difference:.1e} |", flush=True
        )


if __name__ == "__main__":
    main()
