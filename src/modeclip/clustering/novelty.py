"""Distances of captions to their fine centre in; quantiles per fine cluster, and how novel a new caption is, out.

A new caption's novelty is the share of the captions of its cluster that lie nearer to the centre than it does: 0 at the
centre, 1 beyond all that were seen. So 1 % of new captions from the same source lie beyond the quantile 0.99, whatever
the cluster's width. Two corrections make that hold for small clusters:

- A caption that the centre was fitted on pulled it towards itself. In a cluster of n, whose centre is its mean, the
  mean of the others lies n / (n - 1) times as far away; that distance is what is compared with.
- A cluster of n captions knows nothing of its tail beyond 1 - 1/n. From its highest quantile that it does know, its
  tail goes on as that of all clusters together does, in multiples of theirs at that level.

Clusters of about ten captions say little of what is far: more than that are wanted for each. Rejected: the median as
the one scale, which keeps the share of novel pairs at chance throughout, but lets a wide cluster have the long tail of
tight ones, so that nothing is novel there.

Source: ours; MoDE names continual learning as future work.
Price: two numbers of each of at most two million rows are read; eight numbers a fine cluster are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256

import numpy as np
from jaxtyping import Bool, Float, Int

from modeclip.data.catalog import Catalog
from modeclip.errors import ModeclipError

LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)
"""Quantiles that are kept of each fine cluster, the median among them, what is typical of an empty one."""
SAMPLED_ROWS = 2_000_000
"""Most rows that they are computed of: 2,000 a cluster for 1024 of them, so two lie beyond the last quantile."""
ROWS_AT_ONCE = 1 << 17


@dataclass(frozen=True, kw_only=True, eq=False)
class FineQuantiles:
    """How far from the centre the captions of each fine cluster lie."""

    levels: tuple[float, ...]
    """Shares of the captions, ascending, in (0, 1)."""
    distances: Float[np.ndarray, "M Q"]
    """Distance to the centre within which that share of a cluster's captions lies, float32, ascending in a row."""

    @property
    def digest(self) -> str:
        """Hash of levels and distances, as hexadecimal digits."""
        return sha256(repr(self.levels).encode() + np.ascontiguousarray(self.distances).tobytes()).hexdigest()[:16]

    def threshold(self, level: float) -> Float[np.ndarray, " M"]:
        """Return the distance within which a share of each cluster's captions lies, linear between those kept.

        Raises:
            ModeclipError: The level is not between the first and the last that were kept.
        """
        if not self.levels[0] <= level <= self.levels[-1]:
            raise ModeclipError(
                f"quantile of the distances: expected {self.levels[0]:g} to {self.levels[-1]:g}, got {level:g}"
            )
        after = int(np.searchsorted(self.levels, level))
        if self.levels[after] == level:
            return np.asarray(self.distances[:, after])
        share = (level - self.levels[after - 1]) / (self.levels[after] - self.levels[after - 1])
        low, high = self.distances[:, after - 1], self.distances[:, after]
        return np.asarray(low + np.float32(share) * (high - low), np.float32)

    def novelty(
        self, fine: Int[np.ndarray, " n"], distance: Float[np.ndarray, " n"]
    ) -> tuple[Float[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        """Return the share of each caption's cluster that lies nearer, and whether it lies beyond all levels.

        Args:
            fine: Fine cluster of each caption.
            distance: Its Euclidean distance to that centre.

        Examples:
            >>> known = FineQuantiles(levels=(0.5, 0.9), distances=np.array([[0.4, 0.8]], np.float32))
            >>> share, beyond = known.novelty(np.zeros(4, int), np.array([0.0, 0.2, 0.6, 0.9], np.float32))
            >>> [round(float(s), 2) for s in share], beyond.tolist()
            ([0.0, 0.25, 0.7, 1.0], [False, False, False, True])
        """
        knots = np.pad(self.distances, ((0, 0), (1, 0)))[fine].astype(np.float64)
        shares = np.array([0.0, *self.levels])
        after = (distance[:, None] > knots).sum(1)
        beyond, row = after == len(shares), np.arange(len(fine))
        high = np.clip(after, 1, len(shares) - 1)
        low, width = knots[row, high - 1], knots[row, high] - knots[row, high - 1]
        part = np.clip((distance - low) / np.where(width > 0, width, 1), 0, 1)
        share = shares[high - 1] + part * (shares[high] - shares[high - 1])
        return np.where(beyond, 1, np.where(after == 0, 0, share)).astype(np.float32), beyond

    def extended(self, others: FineQuantiles) -> FineQuantiles:
        """Return these clusters followed by others of the same levels."""
        if others.levels != self.levels:
            raise ModeclipError(f"quantiles of other levels: expected {self.levels}, got {others.levels}")
        return FineQuantiles(levels=self.levels, distances=np.concatenate([self.distances, others.distances]))


def fit_quantiles(
    fine: Int[np.ndarray, " N"], distance: Float[np.ndarray, " N"], num_fine: int, levels: tuple[float, ...] = LEVELS
) -> FineQuantiles:
    """Compute the quantiles of each cluster from the captions that were assigned to it.

    Args:
        fine: Fine cluster of each caption.
        distance: Its Euclidean distance to that centre.
        num_fine: Fine clusters; one without two captions gets what is typical of the others.
        levels: Shares, ascending, 0.5 among them.

    Examples:
        >>> distance = np.linspace(0.0, 1.0, 1001, dtype=np.float32)
        >>> [round(float(d), 2) for d in fit_quantiles(np.zeros(1001, int), distance, 1).distances[0]]
        [0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0]
    """
    sizes = np.bincount(fine, minlength=num_fine)
    distance = distance * (sizes / np.maximum(sizes - 1, 1))[fine]
    order = np.argsort(fine, kind="stable")
    parts = np.split(distance[order], np.cumsum(sizes)[:-1])
    own = np.array([np.quantile(part, levels) if len(part) > 1 else np.zeros(len(levels)) for part in parts])
    known = (sizes[:, None] * (1 - np.array(levels)) >= 1 - 1e-9) & (sizes[:, None] > 1)
    middle = levels.index(0.5)
    typical = float(np.median(own[known[:, middle], middle])) if known[:, middle].any() else 0.0
    highest = np.where(known, np.arange(len(levels)), -1).max(1)  # level that a cluster itself knows
    distances = np.where(known, own, 0.0)
    for base in np.unique(highest):
        level, clusters = max(int(base), middle), highest == base
        scale = own[clusters, base] if base >= 0 else np.full(clusters.sum(), typical)
        tail = _tail(distance, own[:, level] * known[:, level], fine, levels)
        distances[clusters, base + 1 :] = scale[:, None] * tail[base + 1 :]
    return FineQuantiles(levels=levels, distances=np.maximum.accumulate(distances, axis=1).astype(np.float32))


def _tail(
    distance: Float[np.ndarray, " N"],
    scale: Float[np.ndarray, " M"],
    fine: Int[np.ndarray, " N"],
    levels: tuple[float, ...],
) -> Float[np.ndarray, " Q"]:
    """Return the quantiles of all distances in multiples of their cluster's scale, where that is not 0."""
    rows = scale[fine] > 0
    return np.quantile(distance[rows] / scale[fine[rows]], levels) if rows.any() else np.ones(len(levels))


def fitted_quantiles(catalog: Catalog, num_fine: int) -> FineQuantiles:
    """Compute the quantiles of a clustered catalog, of every n-th row where it has very many.

    Raises:
        ModeclipError: The catalog is not clustered.
    """
    step = -(-len(catalog) // SAMPLED_ROWS)
    fine, distance, start = [], [], 0
    for block in catalog.batches(["fine_cluster", "fine_distance"], ROWS_AT_ONCE):
        rows = np.arange(-start % step, len(block["fine_cluster"]), step)
        fine.append(block["fine_cluster"][rows])
        distance.append(block["fine_distance"][rows])
        start += len(block["fine_cluster"])
    found = np.concatenate([np.empty(0, np.int32), *fine])
    if len(found) and int(found.max()) >= num_fine:
        raise ModeclipError(
            f"catalog {catalog.path!r} has fine cluster {int(found.max())}, expected {num_fine} of them: it is"
            " clustered otherwise than the bundle; give the catalog that the bundle was made from"
        )
    return fit_quantiles(found, np.concatenate([np.empty(0, np.float32), *distance]), num_fine)
