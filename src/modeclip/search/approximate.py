"""The approximate search of large indexes: faiss names candidates, and the exact search ranks them.

The candidates come from an inverted file of 4-bit codes (faiss's ``IVF,PQx4fs``): the rows lie in cells by their
nearest centres, and of the cells whose centres are best for a query each row is scored by 4 bits for every number.
The best `CANDIDATES` are scored again with their stored vectors. How many cells a query looks at grows until the ten
best rows of text queries, as the exact search finds them, are found to the share that is wanted. Queries of texts lie
apart from the images, so recall measured on images would say too much.

Source: inverted files and product codes, Jégou et al. (TPAMI 2011); their 4-bit form, André et al. (TPAMI 2021); faiss
(arXiv 2401.08281). Rejected, with figures in ``docs/log.md``: Lance's IVF_RQ, and cells of our own without codes;
codes of two numbers, which lose too much where many rows are nearly as good as the best.
Price: D / 2 + 8 bytes of memory and disk a row, k-means of a sample of rows, and the exact search of the captions that
the recall is measured on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from modeclip.search.exact import Rows
from modeclip.system.console import busy, log

COUNT = 10
"""Best rows that recall is measured by."""
CANDIDATES, CANDIDATES_PER_HIT = 400, 16
"""Rows that are scored with their stored vectors: at least so many, and so many for each row that is wanted."""
FIRST_LOOKED_AT, GROWTH = 4, 1.4
"""Cells that a query looks at in the first trial, and how many times more in each next one."""
ROWS_PER_CELL = 64
"""Rows of the sample that each centre is fitted to."""
FEWEST_ROWS = 256
"""Rows below which no index is built: codes of 16 values need as many rows, and so few are searched in no time."""
ROWS_AT_ONCE = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Approximate:
    """An approximate index and what it finds."""

    partitions: int
    """Cells that the rows are divided into."""
    looked_at: int
    """Cells that a query looks at."""
    recall: float
    """Share of the ten best rows of text queries that it finds, on captions that did not choose ``looked_at``."""
    queries: int
    """Captions that this was measured on."""
    file: str = ""
    """File of the index in the folder; empty: an earlier modeclip made it with Lance, and searches are exact."""


class Candidates:
    """An index of faiss, which names the rows that may be the best for a query."""

    def __init__(self, index: Any) -> None:
        self._index = index

    @classmethod
    def fit(cls, rows: Rows, seed: int = 0) -> Candidates:
        """Divide rows into as many cells as the square root of their number, and keep a code of each."""
        import faiss

        cells = max(1, round(math.sqrt(len(rows))))
        kind = f"IVF{cells},PQ{rows.dimension}x4fs"  # a code of 4 bits for every number
        index: Any = faiss.index_factory(rows.dimension, kind, faiss.METRIC_INNER_PRODUCT)
        index.cp.seed, index.cp.min_points_per_centroid = seed, 1
        chosen = np.random.default_rng(seed).choice(len(rows), min(len(rows), ROWS_PER_CELL * cells), replace=False)
        index.train(rows.take(np.sort(chosen)))
        for start in range(0, len(rows), ROWS_AT_ONCE):
            index.add(rows.take(np.arange(start, min(start + ROWS_AT_ONCE, len(rows)))))
        return cls(index)

    @classmethod
    def of_bytes(cls, content: bytes) -> Candidates:
        """Return what `to_bytes` has made."""
        import faiss

        return cls(faiss.deserialize_index(np.frombuffer(content, np.uint8)))

    def to_bytes(self) -> bytes:
        """Return the index as faiss writes it."""
        import faiss

        return faiss.serialize_index(self._index).tobytes()

    @property
    def partitions(self) -> int:
        """Cells that the rows are divided into."""
        return int(self._index.nlist)

    def best(self, rows: Rows, vector: Float[np.ndarray, " D"], count: int, looked_at: int) -> Int[np.ndarray, " k"]:
        """Return the rows among the candidates that have the largest products with a vector, largest first.

        k is ``count``, or less where the cells that are looked at hold fewer rows.

        Args:
            rows: All rows, as they were fitted.
            vector: The query.
            count: Rows that are wanted, 1 or more.
            looked_at: Cells that it looks at.
        """
        import faiss

        asked = np.asarray(vector, np.float32)[None]
        wanted = min(len(rows), max(CANDIDATES, CANDIDATES_PER_HIT * count))
        settings: Any = faiss.SearchParametersIVF
        found = self._index.search(asked, wanted, params=settings(nprobe=looked_at))[1][0]
        return rows.best_among(vector, np.sort(found[found >= 0]), count)


def faiss_is_there() -> bool:
    """Tell whether faiss is installed."""
    return find_spec("faiss") is not None


def build_approximate(
    rows: Rows, queries: Float[np.ndarray, "T D"], recall: float
) -> tuple[Approximate, Candidates] | None:
    """Build an index and choose how many cells a query looks at; None if too few of the best rows are found.

    Half of the queries choose, and the recall that is noted is that of the other half; both must reach what is wanted.

    Args:
        rows: The vectors.
        queries: Vectors of texts.
        recall: What is wanted, in (0, 1].
    """
    if len(rows) < FEWEST_ROWS or len(queries) < 2:
        log(f"{len(rows):,} images and {len(queries):,} captions are too few to measure an index; searches stay exact")
        return None
    if not faiss_is_there():
        log('searches stay exact; for an approximate index, pip install "modeclip[search]" and build it again')
        return None
    with busy(f"building an approximate index of {len(rows):,} images"):
        candidates = Candidates.fit(rows)
        facts = _measured(candidates, rows, queries, recall)
    if facts is None:
        log(f"the approximate index does not reach a recall of {recall:g}; searches stay exact")
        return None
    share = f"{100 * facts.recall:.1f} % of the best {COUNT}"
    log(f"approximate index: {facts.looked_at} of {facts.partitions} cells hold {share}")
    return facts, candidates


def _measured(
    candidates: Candidates, rows: Rows, queries: Float[np.ndarray, "T D"], recall: float
) -> Approximate | None:
    """Return the fewest cells tried that reach a recall; None where all of them do not."""
    best, partitions, looked_at = rows.best(queries, COUNT)[0], candidates.partitions, FIRST_LOOKED_AT
    while True:
        looked_at = min(looked_at, partitions)
        shares = [
            len(np.intersect1d(candidates.best(rows, query, COUNT, looked_at), true)) / len(true)
            for query, true in zip(queries, best, strict=True)
        ]
        chosen, measured = float(np.mean(shares[::2])), float(np.mean(shares[1::2]))
        if min(chosen, measured) >= recall:
            return Approximate(partitions=partitions, looked_at=looked_at, recall=measured, queries=len(shares[1::2]))
        if looked_at == partitions:
            return None
        looked_at = max(looked_at + 1, round(GROWTH * looked_at))
