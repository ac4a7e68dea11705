"""How long a pass takes to draw its pairs from a column of probabilities, compared with numpy's own random numbers.

    python benchmarks/sampling.py --rows 10_000_000

The peer draws one number for each row from a generator in order, so it cannot say whether a row is read without the
rows before it, nor go on at any pass without having kept its state. The rounds alternate; the ratio is the median of
the rounds' ratios of processor time.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable

import numpy as np

from modeclip.training.batches import keeps


def processor_seconds(work: Callable[[], object]) -> float:
    """Return the processor time of a call."""
    started = time.process_time()
    work()
    return time.process_time() - started


def main() -> None:
    """Time both, in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    rows = np.arange(arguments.rows)
    probability = np.random.default_rng(0).random(arguments.rows).astype(np.float32)
    share = float(keeps(rows, probability, 0, 0).mean())
    assert abs(share - 0.5) < 5 * (0.25 / arguments.rows) ** 0.5, share
    ours, peer = [], []
    for number in range(arguments.rounds):
        ours.append(processor_seconds(lambda: keeps(rows, probability, 0, number)))  # noqa: B023
        peer.append(processor_seconds(lambda: np.random.default_rng(number).random(len(rows)) < probability))  # noqa: B023
    millions = arguments.rows / 1e6
    print(
        json.dumps(
            {
                "benchmark": "sampling",
                "rows": arguments.rows,
                "ms_per_million": round(1000 * float(np.median(ours)) / millions, 1),
                "peer_ms_per_million": round(1000 * float(np.median(peer)) / millions, 1),
                "ratio": round(float(np.median(np.array(ours) / np.array(peer))), 2),
                "load": round(os.getloadavg()[0], 1),
            }
        )
    )


if __name__ == "__main__":
    main()
