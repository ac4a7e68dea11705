"""The approximate search of large indexes: Lance's IVF_RQ over the concatenated vectors, with its recall measured.

All image vectors of a mixture have the norm sqrt(K), so cosine and product rank alike; Lance's recall is higher with
cosine. How many partitions a query looks at is doubled until the ten best rows of text queries, as the exact search
finds them, are found to the share that is wanted. Queries of texts lie apart from the images, so recall measured on
images would say too much.

Source: RaBitQ (arXiv 2405.12497) for IVF_RQ. Price: a minute for a million rows of 512 numbers on two cores, and the
exact search of the captions that the recall is measured on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from modeclip.search.exact import Rows
from modeclip.system.console import busy, log

COUNT = 10
"""Best rows that recall is measured by."""
REFINE = 10
"""For each wanted row so many candidates are scored with their stored vectors."""
FIRST_PARTITIONS = 8


@dataclass(frozen=True, kw_only=True)
class Approximate:
    """An approximate index and what it finds."""

    partitions: int
    """Cells that the rows are divided into."""
    looked_at: int
    """Cells that a query looks at."""
    recall: float
    """Share of the ten best rows of text queries that it finds."""
    queries: int
    """Captions that this was measured on."""


def build_approximate(dataset: Any, rows: Rows, queries: Float[np.ndarray, "T D"], recall: float) -> Approximate | None:
    """Build Lance's index and choose how many partitions a query looks at; None if the recall is not reached.

    Args:
        dataset: The rows; the index is added to it.
        rows: Their vectors.
        queries: Vectors of texts.
        recall: What is wanted, in (0, 1].
    """
    partitions = max(1, round(math.sqrt(len(rows))))
    with busy(f"building an approximate index of {len(rows):,} images"):
        dataset.create_index("vector", "IVF_RQ", metric="cosine", num_partitions=partitions, replace=True)
    best = rows.best(queries, COUNT)[0]
    looked_at, found = FIRST_PARTITIONS, 0.0
    while looked_at <= partitions:
        trial = Approximate(partitions=partitions, looked_at=looked_at, recall=0.0, queries=len(queries))
        shares = [
            len(np.intersect1d(nearest(dataset, query, COUNT, trial), true)) / len(true)
            for query, true in zip(queries, best, strict=True)
        ]
        found = float(np.mean(shares))
        log(f"approximate index: {looked_at} of {partitions} partitions hold {100 * found:.1f} % of the best 10")
        if found >= recall:
            return Approximate(partitions=partitions, looked_at=looked_at, recall=found, queries=len(queries))
        looked_at *= 2
    log(f"the approximate index does not reach a recall of {recall:g}; searches stay exact")
    return None


def nearest(
    dataset: Any, vector: Float[np.ndarray, " D"], count: int, approximate: Approximate
) -> Int[np.ndarray, " k"]:
    """Return the rows that the approximate index finds for a vector, best first."""
    table = dataset.to_table(
        columns=["_rowoffset", "_distance"],
        nearest={
            "column": "vector",
            "q": np.asarray(vector, np.float32),
            "k": count,
            "nprobes": approximate.looked_at,
            "refine_factor": REFINE,
            "metric": "cosine",
        },
    )
    return np.asarray(table["_rowoffset"], np.int64)
