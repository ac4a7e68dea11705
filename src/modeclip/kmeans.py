"""Vectors in, k-means centres and an assignment out; with an upper bound on the size of a cluster when asked.

Method: greedy k-means++ on a sample of the rows, then Lloyd iterations until the objective stands still; a centre that
lost its rows starts again at the row that is served worst. With ``max_size_ratio`` the assignment step is the cheapest
one within the capacity (`modeclip.balancing`), and the capacity starts loose and tightens over the first iterations:
measured at ratio 1.1 that ends at a lower objective than the final capacity from the start.

Source: MoDE (arXiv 2404.16030) Sec. 3.2 clusters by balanced k-means without saying which; k-means++ is Arthur and
Vassilvitskii 2007, greedy as in scikit-learn. The tightening is ours.

Price: an iteration is one product of (N, D) with (D, M), balanced a few of them; memory is the N x D input and one
block. ``benchmarks/kmeans_balanced.py`` prints times and objectives. Knows nothing of captions: numpy at the borders,
torch for the products, the same bytes for the same seed, machine and number of threads.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from modeclip.balancing import assign_balanced
from modeclip.distances import ROWS_IN_MEMORY, blocks, checked, nearest, squared_distances
from modeclip.errors import ModeclipError

__all__ = ["KMeansResult", "kmeans", "nearest"]

START_ROWS_PER_CENTER = 80
"""Rows that k-means++ draws from, for each centre."""
MIN_IMPROVEMENT = 1e-4
"""Lloyd stops when an iteration lowers the objective by less than this fraction."""
LOOSE_FRACTION = 0.4
"""Share of the iterations of a balanced fit in which the capacity is still above its final value."""
LOOSE_START = 2.5
"""Capacity of the first balanced assignment, as a multiple of the final one."""
MAX_REPAIRS = 8
"""How often one assignment may be repeated because centres were empty; one repeat is the rule."""


@dataclass(frozen=True, kw_only=True, eq=False)
class KMeansResult:
    """Centres, the cluster of each row, the mean squared distance to them, and the rows per cluster."""

    centers: Float[np.ndarray, "M D"]
    """The points that the rows were assigned to, float32; at convergence the means of the clusters."""
    assignment: Int[np.ndarray, " N"]
    """Cluster of each row: the nearest centre, or the balanced assignment."""
    objective: float
    """Mean over rows of the squared Euclidean distance to the assigned centre."""
    sizes: Int[np.ndarray, " M"]
    """Rows per cluster; 0 occurs only where the rows have fewer distinct values than there are centres."""


def kmeans(
    x: Float[np.ndarray, "N D"],
    num_clusters: int,
    *,
    max_size_ratio: float | None = None,
    num_iterations: int = 25,
    seed: int = 0,
    device: str = "cpu",
    on_iteration: Callable[[], object] | None = None,
) -> KMeansResult:
    """Cluster rows by k-means, optionally with no cluster larger than a multiple of the mean size.

    The objective never rises from one iteration to the next, once a balanced fit has reached its final capacity.

    Args:
        x: Rows to cluster; computed in float32.
        num_clusters: Centres, 1 to N.
        max_size_ratio: No cluster gets more than ``ceil(max_size_ratio * N / num_clusters)`` rows; at least 1. None:
            sizes are free. The bound holds for the returned assignment, not for what `nearest` says afterwards.
        num_iterations: Most updates of the centres; 25 is where the objective of caption embeddings has settled.
        seed: Decides the start; the only randomness.
        device: Torch device of the distance products.
        on_iteration: Called after each update of the centres, for a progress bar.

    Raises:
        ModeclipError: ``x`` is not a matrix of finite numbers, or a number is out of its range.

    Examples:
        >>> x = np.array([[0.0], [0.1], [5.0], [5.1]], dtype=np.float32)
        >>> result = kmeans(x, 2)
        >>> result.sizes.tolist(), round(result.objective, 4)
        ([2, 2], 0.0025)
    """
    rows = checked("x", x)
    capacities = _capacities(len(rows), num_clusters, max_size_ratio, num_iterations)
    centers = _start(rows, num_clusters, np.random.default_rng(seed))
    centers, assignment, objective = _assign_and_repair(rows, centers, capacities[0], device)
    for before, capacity in itertools.pairwise(capacities):
        moved = _means(rows, assignment, centers)
        moved, changed, lower = _assign_and_repair(rows, moved, capacity, device)
        if on_iteration is not None:
            on_iteration()
        settled = before == capacity == capacities[-1]
        if settled and lower >= objective:  # rounding, or two balanced assignments within their gap
            break
        improvement = objective - lower
        centers, assignment, objective = moved, changed, lower
        if settled and improvement <= MIN_IMPROVEMENT * objective:
            break
    sizes = np.bincount(assignment, minlength=num_clusters)
    return KMeansResult(centers=centers, assignment=assignment, objective=objective, sizes=sizes)


def _capacities(num_rows: int, num_clusters: int, max_size_ratio: float | None, num_iterations: int) -> list[int]:
    """Check the numbers of `kmeans` and return the most rows of a cluster for each of the 1 + num_iterations fits."""
    if num_clusters < 1:
        raise ModeclipError(f"num_clusters must be 1 or more, got {num_clusters}")
    if num_clusters > num_rows:
        raise ModeclipError(
            f"num_clusters must be at most the number of rows, got {num_clusters} clusters for {num_rows} rows: "
            "ask for fewer clusters or give more rows"
        )
    if num_iterations < 0:
        raise ModeclipError(f"num_iterations must be 0 or more, got {num_iterations}")
    if max_size_ratio is None:
        return [num_rows] * (num_iterations + 1)
    if not max_size_ratio >= 1:
        raise ModeclipError(f"max_size_ratio must be 1 or more (1 = all clusters equal), got {max_size_ratio}")
    num_loose = int(LOOSE_FRACTION * num_iterations)
    looseness = [LOOSE_START ** max(0.0, 1 - i / max(num_loose, 1)) for i in range(num_iterations + 1)]
    if num_loose == 0:
        looseness = [1.0] * (num_iterations + 1)
    exact = [factor * max_size_ratio * num_rows / num_clusters for factor in looseness]
    return [min(math.ceil(most - 1e-9 * most), num_rows) for most in exact]  # 1.1 * 20 / 2 is a little above 11


def _start(x: Float[np.ndarray, "N D"], num_clusters: int, random: np.random.Generator) -> Float[np.ndarray, "M D"]:
    """Choose rows as first centres by greedy k-means++ on a uniform sample of the rows."""
    if len(x) > START_ROWS_PER_CENTER * num_clusters:
        x = x[np.sort(random.choice(len(x), START_ROWS_PER_CENTER * num_clusters, replace=False))]
    squares = np.einsum("nd,nd->n", x, x)
    num_trials = 2 + int(math.log(num_clusters))
    chosen = [int(random.integers(len(x)))]
    distance = np.maximum(squares - 2 * (x @ x[chosen[0]]) + squares[chosen[0]], 0)
    for _ in range(num_clusters - 1):
        total = np.cumsum(distance, dtype=np.float64)
        trials = np.searchsorted(total, random.random(num_trials) * total[-1], side="right")
        trials = np.minimum(trials, len(x) - 1)
        offered = np.maximum(squares[:, None] - 2 * (x @ x[trials].T) + squares[trials], 0)
        offered = np.minimum(offered, distance[:, None])
        best = int(offered.sum(0, dtype=np.float64).argmin())
        chosen.append(int(trials[best]))
        distance = np.ascontiguousarray(offered[:, best])
    return x[chosen]


def _means(
    x: Float[np.ndarray, "N D"], assignment: Int[np.ndarray, " N"], centers: Float[np.ndarray, "M D"]
) -> Float[np.ndarray, "M D"]:
    """Return the mean of each cluster; a cluster without rows keeps its centre.

    Sums are float32 within a block and float64 across blocks, in row order: as exact as it matters and repeatable.
    """
    import torch

    sums = torch.zeros(centers.shape, dtype=torch.float64)
    for block in blocks(len(x), ROWS_IN_MEMORY):
        part = torch.zeros(centers.shape)
        part.index_add_(0, torch.from_numpy(assignment[block]), torch.from_numpy(x[block]))
        sums += part
    sizes = np.bincount(assignment, minlength=len(centers))[:, None]
    return np.where(sizes > 0, sums.numpy() / np.maximum(sizes, 1), centers).astype(np.float32)


def _assign_and_repair(
    x: Float[np.ndarray, "N D"], centers: Float[np.ndarray, "M D"], capacity: int, device: str
) -> tuple[Float[np.ndarray, "M D"], Int[np.ndarray, " N"], float]:
    """Assign all rows; move each centre that got none to a badly served row and assign again."""
    for _ in range(MAX_REPAIRS):
        if capacity >= len(x):
            assignment, distance = nearest(x, centers, device=device)
        else:
            assignment = assign_balanced(x, centers, capacity, device=device)
            distance = squared_distances(x, centers, assignment)
        empty = np.flatnonzero(np.bincount(assignment, minlength=len(centers)) == 0)
        rows = _worst_served(x, distance, len(empty))
        if len(rows) == 0:
            break
        centers = centers.copy()
        centers[empty[: len(rows)]] = x[rows]
    return centers, assignment, float(distance.mean(dtype=np.float64))


def _worst_served(x: Float[np.ndarray, "N D"], distance: Float[np.ndarray, " N"], count: int) -> list[int]:
    """Return up to ``count`` rows of different value, farthest from their centre first, none that sits on it."""
    rows: list[int] = []
    if count == 0:
        return rows
    for row in np.argsort(-distance, kind="stable"):
        if len(rows) == count or distance[row] <= 0:
            break
        if not rows or not (x[rows] == x[row]).all(1).any():
            rows.append(int(row))
    return rows
