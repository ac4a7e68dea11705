"""Rows and centres in, exact nearest centres and squared Euclidean distances out, a block of rows at a time.

Method: one float32 product per block gives all scores and their two smallest; where these are closer than float32 can
tell, float64 differences decide, the lowest index on a tie. So the answer is that of a brute-force search in float64
and does not depend on the size of a block, which plain blocked products do not promise.

Price: the product of (N, D) with (M, D), plus about a third of it; memory is the input, the output and one block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from modeclip.errors import ModeclipError

if TYPE_CHECKING:
    import torch

SCORES_IN_MEMORY = 1 << 23
"""Entries of a block of the N x M score matrix: 32 MiB of float32."""
ROWS_IN_MEMORY = 1 << 15
"""Rows of a block where only N x D work is done."""


def nearest(
    x: Float[np.ndarray, "N D"],
    centers: Float[np.ndarray, "M D"],
    *,
    chunk_rows: int | None = None,
    device: str = "cpu",
) -> tuple[Int[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """Return each row's nearest centre and the squared Euclidean distance to it.

    Exact: float32 products only narrow the choice, and where they cannot tell two centres apart float64 differences
    decide, the lowest index on a tie. So the answer does not depend on how many rows are asked at once.

    Args:
        x: Rows.
        centers: Centres, at least one.
        chunk_rows: Rows compared with all centres at a time; None: as many as keep a block of 32 MiB.
        device: Torch device of the distance products.

    Returns:
        Index of the nearest centre (int64) and squared distance (float32) per row.

    Raises:
        ModeclipError: an input is not a matrix of finite numbers, or the two differ in width.

    Examples:
        >>> index, squared_distance = nearest(np.array([[0.0, 3.0]]), np.array([[4.0, 3.0], [0.0, 1.0]]))
        >>> index.tolist(), squared_distance.tolist()
        ([1], [4.0])
    """
    rows, points = checked("x", x), checked("centers", centers)
    if rows.shape[1] != points.shape[1]:
        raise ModeclipError(
            f"x and centers must have the same width, got {rows.shape[1]} and {points.shape[1]}: "
            "both must come from the same encoder"
        )
    if len(points) == 0:
        raise ModeclipError("centers is empty: at least one centre is needed")
    if chunk_rows is not None and chunk_rows < 1:
        raise ModeclipError(f"chunk_rows must be 1 or more, got {chunk_rows}")
    index = np.empty(len(rows), np.int64)
    scorer = Scorer(points, device)
    for block in blocks(len(rows), chunk_rows or scorer.block_rows):
        index[block] = _nearest_block(rows[block], scorer)
    return index, squared_distances(rows, points, index)


def checked(name: str, x: Float[np.ndarray, "..."]) -> Float[np.ndarray, "N D"]:
    """Return a matrix as finite, contiguous, writable float32 (torch warns of read-only memory)."""
    if x.ndim != 2:
        raise ModeclipError(f"{name} must have 2 dimensions (rows, features), got {x.ndim}: shape {x.shape}")
    with np.errstate(over="ignore"):
        rows = np.require(x, np.float32, ["C", "W"])
    bad = [
        block.start + np.flatnonzero(~np.isfinite(rows[block]).all(1)) for block in blocks(len(rows), ROWS_IN_MEMORY)
    ]
    where = np.concatenate([np.empty(0, np.int64), *bad])
    if where.size:
        raise ModeclipError(
            f"{name} has NaN or infinite values in {where.size} of {len(rows)} rows, the first is row {where[0]}: "
            "remove or recompute these rows"
        )
    return rows


def blocks(num_rows: int, block_rows: int) -> Iterator[slice]:
    """Yield slices that cut rows into blocks."""
    for first in range(0, num_rows, block_rows):
        yield slice(first, min(first + block_rows, num_rows))


class Scorer:
    """Squared distances from rows to all centres, less the row's own squared norm, on a device."""

    def __init__(self, centers: Float[np.ndarray, "M D"], device: str) -> None:
        import torch

        self.centers, self.device = centers, torch.device(device)
        squares = np.einsum("md,md->m", centers, centers, dtype=np.float64)
        self.largest_norm = float(np.sqrt(squares.max()))
        self.block_rows = max(1, SCORES_IN_MEMORY // len(centers))
        self._squares = torch.from_numpy(squares.astype(np.float32)).to(self.device)
        self._matrix = torch.from_numpy(centers).to(self.device).T

    def scores(self, rows: Float[np.ndarray, "B D"]) -> torch.Tensor:
        """Return the (B, M) float32 scores: smallest where the centre is nearest."""
        import torch

        return torch.addmm(self._squares, torch.from_numpy(rows).to(self.device), self._matrix, alpha=-2)

    def tolerance(self, rows: Float[np.ndarray, "B D"]) -> Float[np.ndarray, " B"]:
        """Return by how much two scores of a row must differ for their order to be certain in float32."""
        norms = np.sqrt(np.einsum("bd,bd->b", rows, rows)) + self.largest_norm
        unit = float(np.finfo(np.float32).eps)
        return np.asarray((rows.shape[1] + 8) * unit * norms**2)


def _nearest_block(rows: Float[np.ndarray, "B D"], scorer: Scorer) -> Int[np.ndarray, " B"]:
    """Return the exact nearest centre of the rows of one block, the lowest index on a tie."""
    if len(scorer.centers) == 1:
        return np.zeros(len(rows), np.int64)
    scores = scorer.scores(rows)
    values, indices = (part.cpu().numpy() for part in scores.topk(2, largest=False))
    index = indices[:, 0].astype(np.int64)
    limit = values[:, 0] + scorer.tolerance(rows)
    unsure = np.flatnonzero(values[:, 1] <= limit)
    for part in blocks(len(unsure), scorer.block_rows):
        some = unsure[part]
        row, center = np.nonzero(scores[some].cpu().numpy() <= limit[some, None])
        exact = _pair_distances(rows[some], scorer.centers, row, center)
        order = np.lexsort((center, exact, row))
        first = order[np.searchsorted(row[order], np.arange(len(some)))]
        index[some] = center[first]
    return index


def _pair_distances(
    rows: Float[np.ndarray, "B D"],
    centers: Float[np.ndarray, "M D"],
    row: Int[np.ndarray, " P"],
    center: Int[np.ndarray, " P"],
) -> Float[np.ndarray, " P"]:
    """Return float64 squared distances of (row, centre) pairs."""
    out = np.empty(len(row))
    for block in blocks(len(row), ROWS_IN_MEMORY):
        difference = rows[row[block]].astype(np.float64) - centers[center[block]]
        out[block] = np.einsum("pd,pd->p", difference, difference)
    return out


def squared_distances(
    x: Float[np.ndarray, "N D"], centers: Float[np.ndarray, "M D"], assignment: Int[np.ndarray, " N"]
) -> Float[np.ndarray, " N"]:
    """Return the squared distance of each row to its centre, from differences: no cancellation near zero."""
    out = np.empty(len(x), np.float32)
    for block in blocks(len(x), ROWS_IN_MEMORY):
        difference = x[block] - centers[assignment[block]]
        out[block] = np.einsum("nd,nd->n", difference, difference)
    return out
