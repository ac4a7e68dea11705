"""The exact search: the best of all rows by their product with a query.

The rows are kept as they are stored, in float16. One query reads each row once, so the time is that of reading them.
Where the processor multiplies float16 by itself, rows are ranked in float16 first, and all that could be among the
best, by a bound on its rounding, are scored again in float32: the result is that of float32. Several queries share one
pass over the rows. Elsewhere rows are taken in blocks, which are turned into float32 once for all queries.

Price: 2 D bytes of memory a row. ``benchmarks/search.py`` prints the time of a query beside that of faiss.
"""

from __future__ import annotations

import time
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Float16, Int

if TYPE_CHECKING:
    from torch import Tensor

ROUNDING = 2.0**-9
"""Largest error of a product in float16 as a share of the two norms: twice what rounding its query (2^-11) and its
result (2^-11) can come to, if it is summed in float32. A processor that does worse is not used (`half_is_fast`)."""
BLOCK_BYTES = 1 << 24
"""Bytes of the float32 rows of a block, so that it stays in the processor's cache."""
TOGETHER = 32
"""Queries that share a pass over the rows in float16, each of which keeps a score of every row meanwhile."""
FEW = 16
"""One row in so many, or fewer, may be chosen: then only these are read."""


class Rows:
    """Vectors of N images, in float16, from which the best for a query are taken."""

    def __init__(self, vectors: Float16[np.ndarray, "N D"]) -> None:
        self._half = torch.from_numpy(np.require(vectors, np.float16, ["C", "W"]))
        self._norm = float(self.norms().max()) if len(vectors) else 0.0

    def __len__(self) -> int:
        return len(self._half)

    @property
    def dimension(self) -> int:
        """Numbers in a vector, D."""
        return int(self._half.shape[1])

    def norms(self) -> Float[np.ndarray, " N"]:
        """Return the norm of each row."""
        found = np.empty(len(self._half), np.float32)
        for part in self._blocks():
            found[part] = self._half[part].float().norm(dim=1).numpy()
        return found

    def take(self, rows: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n D"]:
        """Return some vectors, in float32."""
        vectors: np.ndarray = self._half[torch.from_numpy(rows)].float().numpy()
        return vectors

    def best(
        self, queries: Float[np.ndarray, "Q D"], count: int, allowed: Bool[np.ndarray, " N"] | None = None
    ) -> tuple[Int[np.ndarray, "Q k"], Float[np.ndarray, "Q k"]]:
        """Return the rows with the largest products with each query, and the products, largest first.

        Of equal products the row that comes first wins. k is ``count``, or the number of rows that may be chosen.

        Args:
            queries: Q vectors.
            count: How many rows of each are wanted, at least 1.
            allowed: Rows that may be chosen; None: all.
        """
        chosen = None if allowed is None else np.flatnonzero(allowed)
        count = min(count, len(self) if chosen is None else len(chosen))
        asked = torch.from_numpy(np.ascontiguousarray(queries, np.float32))
        if not count or not len(queries):
            return np.empty((len(queries), count), np.int64), np.empty((len(queries), count), np.float32)
        if chosen is not None and len(chosen) * FEW <= len(self):
            scores = torch.from_numpy(self.take(chosen)) @ asked.T
            rows, values = _largest(scores.T, count)
            return chosen[rows], values
        if half_is_fast():
            starts = range(0, len(asked), TOGETHER)
            parts = [self._best_in_half(asked[start : start + TOGETHER], count, allowed) for start in starts]
            return np.concatenate([rows for rows, _ in parts]), np.concatenate([values for _, values in parts])
        return self._best_in_blocks(asked, count, allowed)

    def best_among(
        self, query: Float[np.ndarray, " D"], chosen: Int[np.ndarray, " n"], count: int
    ) -> Int[np.ndarray, " k"]:
        """Return those of some rows that have the largest products with a query, largest first; ties as in `best`.

        Args:
            query: A vector.
            chosen: The rows, ascending.
            count: How many are wanted, at least 1.
        """
        scores = torch.from_numpy(self.take(chosen)) @ torch.from_numpy(np.ascontiguousarray(query, np.float32))
        best: np.ndarray = chosen[_largest(scores[None], min(count, len(chosen)))[0][0]]
        return best

    def _best_in_half(
        self, queries: Tensor, count: int, allowed: Bool[np.ndarray, " N"] | None
    ) -> tuple[Int[np.ndarray, "Q k"], Float[np.ndarray, "Q k"]]:
        # of norm 1, so that nothing overflows: float16 ends at 65,504
        scaled = queries / queries.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        unit = torch.nn.functional.normalize(scaled, dim=1)
        ranked = torch.mm(unit.half(), self._half.T) if len(unit) > 1 else torch.mv(self._half, unit[0].half())[None]
        found: list[np.ndarray] = []
        values: list[np.ndarray] = []
        for query, scores in zip(queries, ranked, strict=True):
            if allowed is not None:
                scores[~torch.from_numpy(allowed)] = -torch.inf
            least = float(torch.topk(scores, count).values[-1])
            bound = 2 * ROUNDING * self._norm
            rows = torch.nonzero(scores >= least - bound).flatten()
            places, own = _largest((self._half[rows].float() @ query)[None], count)
            found.append(rows.numpy()[places[0]])
            values.append(own[0])
        return np.stack(found), np.stack(values)

    def _best_in_blocks(
        self, queries: Tensor, count: int, allowed: Bool[np.ndarray, " N"] | None
    ) -> tuple[Int[np.ndarray, "Q k"], Float[np.ndarray, "Q k"]]:
        rows = torch.empty((len(queries), 0), dtype=torch.int64)
        values = torch.empty((len(queries), 0))
        for part in self._blocks():
            scores = queries @ self._half[part].float().T
            if allowed is not None:
                scores[:, ~torch.from_numpy(allowed[part])] = -torch.inf
            values = torch.cat([values, scores], dim=1)
            numbers = torch.arange(part.start, part.start + scores.shape[1]).expand(len(queries), -1)
            rows = torch.cat([rows, numbers], dim=1)
            # a stable sort of the few best: topk alone does not say which of equal scores it takes
            kept, scored = _largest(values, min(count, values.shape[1]))
            values, rows = torch.from_numpy(scored), rows.gather(1, torch.from_numpy(kept))
        return rows.numpy(), values.numpy()

    def _blocks(self) -> list[slice]:
        step = max(1, BLOCK_BYTES // (4 * max(1, self.dimension)))
        return [slice(start, min(start + step, len(self))) for start in range(0, len(self), step)]


def _largest(scores: Tensor, count: int) -> tuple[Int[np.ndarray, "Q k"], Float[np.ndarray, "Q k"]]:
    """Return places and values of the largest scores of each row, the first of equal ones first."""
    least = torch.topk(scores, count, dim=1).values[:, -1:]
    places, values = [], []
    for row, limit in zip(scores, least, strict=True):
        above = torch.nonzero(row >= limit).flatten()
        order = torch.sort(row[above], descending=True, stable=True).indices[:count]
        places.append(above[order].numpy())
        values.append(row[above[order]].numpy())
    return np.stack(places), np.stack(values)


@cache
def half_is_fast() -> bool:
    """Tell whether this processor multiplies float16 matrices with vectors faster than float32, and sums in float32."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(16_384, 256, generator=draw), dim=1)
    query = torch.nn.functional.normalize(torch.randn(256, generator=draw), dim=0)
    half, short = rows.half(), query.half()
    exact = half.float() @ query
    for found in (torch.mv(half, short), torch.mm(torch.stack([short, -short]), half.T)[0]):
        if float((found.float() - exact).abs().max()) > ROUNDING / 2:
            return False

    def seconds(matrix: Tensor, vector: Tensor) -> float:
        found = []
        for _ in range(5):
            begun = time.perf_counter()
            torch.mv(matrix, vector)
            found.append(time.perf_counter() - begun)
        return min(found)

    return seconds(half, short) < seconds(rows, query)
