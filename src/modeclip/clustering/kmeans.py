"""K-means for any vectors, if wanted with a limit on the size of a cluster.

Method: k-means++ picks the first centres from a sample of the rows. The next iterations work on samples that grow, and
every few of them the centres that would be missed least move into the clusters that gain most by being split. Lloyd
iterations on all rows follow until the objective stands still. A centre that lost its rows starts again at the row that
is farthest from its centre. Where there are few rows for each centre, all iterations are Lloyd's. With
``max_size_ratio`` the rows choose at prices that steer the sizes, and the last two assignments are the cheapest that
respect the limit (`modeclip.clustering.balancing`).

The module knows nothing of captions: numpy goes in and comes out, torch computes the products, and the same seed on the
same machine gives the same bytes.

Source: MoDE (arXiv 2404.16030) Sec. 3.2 clusters by balanced k-means without saying which; k-means++ is Arthur and
Vassilvitskii 2007, here with several draws at once; moving centres follows Kanungo et al. 2004, "A local search
approximation algorithm for k-means clustering", though several move at once and by estimates; spherical k-means is
Dhillon and Modha 2001.

Price: an iteration is one product of (N, D) with (D, M). Memory is the N x D input, a quarter of it for samples, and
one block for each thread. ``benchmarks/kmeans_faiss.py`` and ``benchmarks/kmeans_balanced.py`` measure times and
objectives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Int

from modeclip.clustering.balancing import adjust, assign_balanced
from modeclip.clustering.distances import (
    ROWS_IN_MEMORY,
    ArrayLike,
    as_rows,
    assign_nearest,
    blocks,
    squared_errors,
    two_cheapest,
)
from modeclip.errors import ModeclipError

Start = Literal["k-means++", "random"]
START_ROWS_PER_CENTER = 16
"""Rows for each centre that k-means++ draws from."""
START_GROWTH = 8
"""k-means++ adds centres in batches: one new centre for this many that it has already."""
SAMPLE_ROWS_PER_CENTER = 32
"""Rows for each centre in the first sample. Each further sample is twice as large, up to a quarter of all rows."""
SAMPLED_FRACTION = 0.6
"""Share of the iterations that work on samples, where there are rows enough."""
SUMMED_ROWS = 1 << 14
"""Rows that are summed up in float32; as many as there are centres, if that is more."""
LARGEST_SQUARES, SMALLEST_SQUARES = 2.0**120, 2.0**-80
"""Range of the sum of the squares of a block of rows: beyond it squared distances overflow, or lose their digits."""
MIN_IMPROVEMENT = 1e-4
"""Lloyd stops when an iteration lowers the objective by less than this fraction."""
EXACT_ITERATIONS = 1
"""Last iterations of a balanced fit whose assignments obey the capacity; in those before, prices lead towards it."""
SWAP_EVERY = 4
"""Iterations, on samples or at prices, from one exchange of centres to the next."""
SWAP_FRACTION = 0.6
"""Share of these iterations after which centres are exchanged no more."""
MAX_SWAPPED_FRACTION = 0.15
"""Largest share of the centres that are exchanged at once."""
SPLIT_ROUNDS = 4
"""Two-means iterations that estimate what splitting a cluster gains."""
MAX_REPAIRS = 8
"""How often an assignment may be repeated because centres were empty; once is usually enough."""


@dataclass(frozen=True, kw_only=True, eq=False)
class KMeansResult:
    """What `kmeans` found."""

    centers: Float[np.ndarray, "M D"]
    """The points that the rows were assigned to, float32; once k-means has converged, the means of the clusters."""
    assignment: Int[np.ndarray, " N"]
    """Cluster of each row: that of the nearest centre, or under a size limit that of the balanced assignment."""
    objective: float
    """Mean over rows of the squared Euclidean distance to the assigned centre."""
    sizes: Int[np.ndarray, " M"]
    """Rows per cluster; 0 occurs only where the rows have fewer distinct values than there are centres."""


def kmeans(
    x: ArrayLike,
    num_clusters: int,
    *,
    max_size_ratio: float | None = None,
    num_iterations: int = 25,
    seed: int = 0,
    spherical: bool = False,
    start: Start = "k-means++",
    device: str = "cpu",
    on_iteration: Callable[[], object] | None = None,
) -> KMeansResult:
    """Cluster rows by k-means, if wanted with no cluster larger than a multiple of the mean size.

    From one iteration on all rows to the next the objective never rises. (A balanced fit has one such iteration.)

    Args:
        x: Rows to cluster, (N, D): a list, a numpy array of any number type or a torch tensor; computed in float32.
        num_clusters: Centres, 1 to N.
        max_size_ratio: 1 or more: no cluster gets more than ``ceil(max_size_ratio * N / num_clusters)`` rows. None:
            sizes are free. The limit holds for the returned assignment, not for what
            `modeclip.clustering.distances.assign_nearest` gives with the same centres.
        num_iterations: Most updates of the centres; 25 is where the objective of caption embeddings has settled.
        seed: Decides the start, the samples and the splits; nothing else is random.
        spherical: Whether only directions count: rows are scaled to unit length (in a copy, unless they have it), and
            centres after each update, so that the nearest centre is the one with the largest cosine.
        start: First centres: rows drawn by k-means++, or by chance alone (``random``).
        device: Torch device of the distance products.
        on_iteration: Called after each update of the centres, for a progress bar.

    Raises:
        ModeclipError: ``x`` is not a matrix of finite numbers, their squares are too large or too small for float32, or
            an argument is out of its range.

    Examples:
        >>> x = np.array([[0.0], [0.1], [5.0], [5.1]], dtype=np.float32)
        >>> result = kmeans(x, 2)
        >>> result.sizes.tolist(), round(result.objective, 4)
        ([2, 2], 0.0025)
    """
    rows = as_rows("x", x)
    _check_squares(rows)
    capacity = _capacity(len(rows), num_clusters, max_size_ratio)
    if num_iterations < 0:
        raise ModeclipError(f"num_iterations must be 0 or more, got {num_iterations}")
    if start not in get_args(Start):
        raise ModeclipError(f"start must be one of {', '.join(get_args(Start))}, got {start!r}")
    if spherical:
        rows = _directions(rows)
    tick = on_iteration or (lambda: None)
    random = np.random.default_rng(seed)
    centers = _start(rows, num_clusters, start, random, device)
    sizes = _sample_sizes(len(rows), num_clusters, num_iterations)
    if capacity < len(rows):
        sizes += [len(rows)] * (num_iterations - EXACT_ITERATIONS - len(sizes))
    centers = _approach(rows, centers, sizes, capacity, random, spherical, device, tick)
    centers, assignment, objective = _assign_and_repair(rows, centers, capacity, device)
    for _ in range(num_iterations - len(sizes)):
        moved = _means(rows, assignment, centers, spherical)
        moved, changed, lower = _assign_and_repair(rows, moved, capacity, device)
        tick()
        if lower >= objective:  # rounding, or two balanced assignments within their gap
            break
        improvement = objective - lower
        centers, assignment, objective = moved, changed, lower
        if improvement <= MIN_IMPROVEMENT * objective:
            break
    return KMeansResult(
        centers=centers,
        assignment=assignment,
        objective=objective,
        sizes=np.bincount(assignment, minlength=num_clusters),
    )


def _check_squares(x: Float[np.ndarray, "N D"]) -> None:
    """Raise if float32, in which distances are computed, cannot hold the squares of the numbers."""
    with np.errstate(over="ignore"):
        squares = [float(np.vdot(x[block], x[block])) for block in _parts(x)]
    if not max(squares) <= LARGEST_SQUARES:
        raise ModeclipError(
            f"x: expected numbers up to about 1e17, got {np.abs(x).max():.0e}: divide all rows by one number"
        )
    if sum(squares) < SMALLEST_SQUARES and x.any():
        raise ModeclipError(
            f"x: expected numbers above about 1e-12, got at most {np.abs(x).max():.0e}: multiply all rows by one number"
        )


def _capacity(num_rows: int, num_clusters: int, max_size_ratio: float | None) -> int:
    """Check the numbers that `kmeans` was given, and return how many rows a cluster may have."""
    if num_clusters < 1:
        raise ModeclipError(f"num_clusters must be 1 or more, got {num_clusters}")
    if num_clusters > num_rows:
        raise ModeclipError(
            f"num_clusters must be at most the number of rows, got {num_clusters} clusters for {num_rows} rows: "
            "ask for fewer clusters or give more rows"
        )
    if max_size_ratio is None:
        return num_rows
    if not max_size_ratio >= 1:
        raise ModeclipError(f"max_size_ratio must be 1 or more (1 = all clusters equal), got {max_size_ratio}")
    most = max_size_ratio * num_rows / num_clusters
    return int(min(math.ceil(most - 1e-9 * most), num_rows))  # 1.1 * 20 / 2 is a little above 11


def _directions(x: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
    """Return the rows at unit length: the same array if they have it up to rounding, else a copy."""
    norms = np.concatenate([np.empty(0), *(np.linalg.norm(x[b].astype(np.float64), axis=1) for b in _parts(x))])
    zero = np.flatnonzero(norms == 0)
    if zero.size:
        raise ModeclipError(
            f"x: {zero.size} of {len(x)} rows have zero length and so no direction, the first is row {zero[0]}: "
            "remove them or set spherical=False"
        )
    if (np.abs(norms - 1) <= 2e-7).all():
        return x
    out = np.empty_like(x)
    for block in _parts(x):
        out[block] = x[block] / norms[block, None]
    return out


def _parts(x: Float[np.ndarray, "N D"]) -> Iterator[slice]:
    return blocks(len(x), ROWS_IN_MEMORY)


def _start(
    x: Float[np.ndarray, "N D"], num_clusters: int, start: Start, random: np.random.Generator, device: str
) -> Float[np.ndarray, "M D"]:
    """Choose rows as first centres, from a uniform sample of the rows."""
    num_rows = num_clusters if start == "random" else START_ROWS_PER_CENTER * num_clusters
    x = _sample(x, min(num_rows, len(x)), random)
    if start == "random":
        return x
    chosen = [int(random.integers(len(x)))]
    distance = assign_nearest(x, x[chosen], device=device)[1]
    while len(chosen) < num_clusters:
        count = min(num_clusters - len(chosen), 1 + len(chosen) // START_GROWTH)
        total = np.cumsum(distance, dtype=np.float64)
        drawn = np.searchsorted(total, random.random(count) * total[-1], side="right")
        drawn = np.unique(np.minimum(drawn, len(x) - 1))
        chosen.extend(drawn.tolist())
        distance = np.minimum(distance, assign_nearest(x, x[drawn], device=device)[1])
    return x[chosen]


def _sample(x: Float[np.ndarray, "N D"], num_rows: int, random: np.random.Generator) -> Float[np.ndarray, "n D"]:
    """Return rows drawn at random, in their order; if all are wanted, ``x`` itself."""
    return x if num_rows >= len(x) else x[np.sort(random.choice(len(x), num_rows, replace=False))]


def _sample_sizes(num_rows: int, num_clusters: int, num_iterations: int) -> list[int]:
    """Return how many rows each of the first iterations samples; the number doubles after every few of them."""
    first = SAMPLE_ROWS_PER_CENTER * num_clusters
    num_sizes = max(0, int(math.log2(max(num_rows / 4 / first, 0.5))) + 1)
    num_sampled = int(SAMPLED_FRACTION * num_iterations) if num_sizes else 0
    return [first << (i * num_sizes // num_sampled) for i in range(num_sampled)]


def _approach(
    x: Float[np.ndarray, "N D"],
    centers: Float[np.ndarray, "M D"],
    sizes: list[int],
    capacity: int,
    random: np.random.Generator,
    spherical: bool,
    device: str,
    tick: Callable[[], object],
) -> Float[np.ndarray, "M D"]:
    """Bring the centres near their places by iterations that need not be exact, one for each of the sample sizes.

    Every few iterations some centres change places (`_swapped`), which Lloyd's iterations never do. Under a capacity
    the rows choose at prices, which `adjust` moves so that about as many rows choose a centre as it may have.
    """
    prices = np.zeros(len(centers))
    last_swap = max(SWAP_EVERY, SWAP_FRACTION * len(sizes)) if len(sizes) > SWAP_EVERY + 1 else 0
    sample = x[:0]
    for i, size in enumerate(sizes if len(centers) > 1 else []):
        if size != len(sample):
            sample = _sample(x, size, random)
        first, second, margin = two_cheapest(sample, centers, prices, device)
        if i % SWAP_EVERY == 0 and 0 < i <= last_swap:
            centers = _means(sample, first, centers, spherical)
            share = capacity * len(sample) / len(x) if capacity < len(x) else 0.0
            centers, prices = _swapped(sample, centers, (first, second, margin), prices, share, random)
        else:
            assignment = first
            if capacity < len(x):
                assignment, prices = adjust(prices, first, second, margin, capacity * len(sample) / len(x))
            centers = _means(sample, assignment, centers, spherical)
        tick()
    return centers


def _swapped(
    x: Float[np.ndarray, "N D"],
    centers: Float[np.ndarray, "M D"],
    choices: tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"], Float[np.ndarray, " N"]],
    prices: Float[np.ndarray, " M"],
    capacity: float,
    random: np.random.Generator,
) -> tuple[Float[np.ndarray, "M D"], Float[np.ndarray, " M"]]:
    """Move centres that are missed least into clusters that gain more by being split in two; both halves cost nothing.

    What the loss of a centre costs is what its rows pay more at their second choice, and the price of its places.
    """
    first, second, margin = choices
    num_centers = len(centers)
    gain, halves = _halves(x, first, num_centers, random)
    loss = np.bincount(first, weights=margin, minlength=num_centers) + capacity * prices
    centers, prices = centers.copy(), prices.copy()
    done = np.zeros(num_centers, bool)
    by_gain = iter(np.argsort(-gain, kind="stable").tolist())
    split = next(by_gain)
    for gone in np.argsort(loss, kind="stable")[: math.ceil(MAX_SWAPPED_FRACTION * num_centers)].tolist():
        while done[split]:
            split = next(by_gain)
        if gain[split] <= loss[gone]:
            break
        if done[gone] or split == gone or (second[first == gone] == split).any():  # its rows would change the gain
            continue
        centers[[split, gone]] = halves[split]
        prices[[split, gone]] = 0
        done[[split, gone]] = True
    return centers, prices


def _halves(
    x: Float[np.ndarray, "N D"], assignment: Int[np.ndarray, " N"], num_clusters: int, random: np.random.Generator
) -> tuple[Float[np.ndarray, " M"], Float[np.ndarray, "M 2 D"]]:
    """Split every cluster in two; return by how much each sum of squared distances falls, and the halves' means."""
    import torch

    side = random.integers(0, 2, len(x))
    for _ in range(SPLIT_ROUNDS):
        sub = 2 * assignment + side
        means = _means(x, sub, np.zeros((2 * num_clusters, x.shape[1]), np.float32))
        sizes = np.bincount(sub, minlength=2 * num_clusters)
        toward = torch.from_numpy(means[1::2] - means[::2])
        middle = np.einsum("md,md->m", toward.numpy(), (means[1::2] + means[::2]) / 2)
        for block in _parts(x):
            some = torch.from_numpy(assignment[block])
            along = (toward[some].mul_(torch.from_numpy(x[block]))).sum(1).numpy()
            side[block] = along > middle[assignment[block]]
    shared = sizes[::2] * sizes[1::2] / np.maximum(sizes[::2] + sizes[1::2], 1)
    return shared * toward.square().sum(1).numpy(), means.reshape(num_clusters, 2, -1)


def _means(
    x: Float[np.ndarray, "N D"],
    assignment: Int[np.ndarray, " N"],
    centers: Float[np.ndarray, "M D"],
    spherical: bool = False,
) -> Float[np.ndarray, "M D"]:
    """Return the mean of each cluster, at unit length if spherical.

    A cluster without rows keeps its centre, and so does a spherical one whose mean has no direction. Sums are float32
    within a block and float64 across blocks, in the order of the rows: exact enough, and the same every time.
    """
    import torch

    sums = torch.zeros(centers.shape, dtype=torch.float64)
    part = torch.empty(centers.shape)
    for block in blocks(len(x), max(SUMMED_ROWS, len(centers))):
        part.zero_()
        part.index_add_(0, torch.from_numpy(assignment[block]), torch.from_numpy(x[block]))
        sums += part
    sizes = np.bincount(assignment, minlength=len(centers))[:, None]
    means = sums.numpy() / np.maximum(sizes, 1)
    if spherical:
        norms = np.linalg.norm(means, axis=1, keepdims=True)
        sizes, means = np.where(norms > 0, sizes, 0), means / np.where(norms > 0, norms, 1)
    return np.where(sizes > 0, means, centers).astype(np.float32)


def _assign_and_repair(
    x: Float[np.ndarray, "N D"],
    centers: Float[np.ndarray, "M D"],
    capacity: int,
    device: str,
) -> tuple[Float[np.ndarray, "M D"], Int[np.ndarray, " N"], float]:
    """Assign all rows; if some centres got none, move each to a row that is far from its centre, and assign again."""
    for _ in range(MAX_REPAIRS):
        if capacity >= len(x):
            assignment, distance = assign_nearest(x, centers, device=device)
        else:
            assignment = assign_balanced(x, centers, capacity, device=device)
            distance = squared_errors(x, centers, assignment)
        empty = np.flatnonzero(np.bincount(assignment, minlength=len(centers)) == 0)
        rows = _farthest_rows(x, distance, len(empty))
        if len(rows) == 0:
            break
        centers = centers.copy()
        centers[empty[: len(rows)]] = x[rows]
    return centers, assignment, float(distance.mean(dtype=np.float64))


def _farthest_rows(x: Float[np.ndarray, "N D"], distance: Float[np.ndarray, " N"], count: int) -> list[int]:
    """Return up to ``count`` rows, all different, the farthest from its centre first; none that lies on its centre."""
    rows: list[int] = []
    if count == 0:
        return rows
    for row in np.argsort(-distance, kind="stable"):
        if len(rows) == count or distance[row] <= 0:
            break
        if not rows or not (x[rows] == x[row]).all(1).any():
            rows.append(int(row))
    return rows
