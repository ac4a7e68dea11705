"""Tells how novel a caption is to a clustering, by how far it lies from its fine centre.

A caption's novelty is the share of the captions of its cluster that lie nearer to the centre than it does: 0 at the
centre, 1 beyond all captions that were seen. So 1 % of new captions from the same source lie beyond the quantile 0.99,
however wide the cluster is. Two corrections make this hold for small clusters:

- The centre was fitted on the captions, and each of them pulled it towards itself. In a cluster of n whose centre is
  its mean, the mean of the other captions lies n / (n - 1) times as far away. That larger distance is used.
- A cluster of n captions knows nothing of its tail beyond 1 - 1/n. Beyond the highest quantile that it does know, its
  tail continues like that of all clusters together, scaled to its own distance at that level.

A cluster of only ten captions or so tells little about what is far; have more. Rejected: the median as the only scale
of a cluster. It keeps the share of novel pairs at chance, but gives wide clusters the long tail of tight ones, so that
nothing is novel there.

A centre says little about a wide cluster of leftovers, in which a strange word lies as well as any caption. So captions
are kept too (`NearCaptions`), and a name that asks for weights is compared with the nearest of them: by how far
captions of the same source lie from the nearest other one. That is the nearest *different* one: where each caption
stands at several images, all would lie at distance 0, and whatever is not said in the same words would be far. Whether
a new pair is novel goes by the centres alone.

Source: ours; MoDE names continual learning as future work. The nearest neighbour as a measure of what is strange is as
in Ramaswamy et al., "Efficient algorithms for mining outliers from large data sets" (2000).
Price: two numbers of each of at most two million rows are read; eight numbers of each fine cluster are kept. At most
`KEPT_CAPTIONS` captions are, a byte a dimension: 6 MB for the demo's 15,304, and some seconds to compare them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from hashlib import sha256

import numpy as np
from jaxtyping import Bool, Float, Int, Int8

from modeclip.clustering.distances import blocks, nearest_centers
from modeclip.clustering.embedding import COLUMN, read_embeddings
from modeclip.data.catalog import Catalog
from modeclip.data.selection import ALL, Selection
from modeclip.errors import ModeclipError

LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)
"""Quantiles that are kept of each fine cluster. The median must be one: an empty cluster gets the typical one."""
SAMPLED_ROWS = 2_000_000
"""Most rows that quantiles are computed from: 2,000 for each of 1024 clusters, so that two lie beyond the last one."""


KEPT_CAPTIONS = 32_768
"""Most rows whose captions are kept, each once."""
COMPARED_CAPTIONS = 4_096
"""Most of the kept captions that are compared with all of them, to know how near captions lie to each other."""
CAPTIONS_IN_MEMORY = 512
"""Kept captions that are float64 at a time, some megabytes; with what is made of them all of the demo's take 150."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FineQuantiles:
    """Knows how far from the centre the captions of each fine cluster lie."""

    levels: tuple[float, ...]
    """Shares of the captions, ascending, in (0, 1)."""
    distances: Float[np.ndarray, "M Q"]
    """Distance to the centre within which that share of a cluster's captions lies, float32; every row ascends."""
    near: NearCaptions | None = None
    """Captions of all clusters; None where they were not kept."""

    @property
    def digest(self) -> str:
        """Hash of levels and distances, as hexadecimal digits."""
        return sha256(repr(self.levels).encode() + np.ascontiguousarray(self.distances).tobytes()).hexdigest()[:16]

    def threshold(self, level: float) -> Float[np.ndarray, " M"]:
        """Return the distance within which a share of each cluster's captions lies, interpolated between the quantiles.

        Raises:
            ModeclipError: The share is not between the first and the last level.
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
        """Return which share of its cluster lies nearer than each caption, and whether it lies beyond all levels.

        Args:
            fine: Fine cluster of each caption.
            distance: Euclidean distance of each caption to that centre.

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
        """Return the quantiles of these clusters followed by those of others, which have the same levels."""
        if others.levels != self.levels:
            raise ModeclipError(
                f"quantiles: expected the levels {self.levels}, got {others.levels}; compute both the same way"
            )
        near = self.near if self.near is None or others.near is None else self.near.joined(others.near)
        return FineQuantiles(
            levels=self.levels, distances=np.concatenate([self.distances, others.distances]), near=near
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class NearCaptions:
    """Knows captions by their vectors, and how far such a caption lies from the nearest other one."""

    vectors: Int8[np.ndarray, "n D"]
    """Each caption once; times ``scale`` they are unit vectors, to a byte."""
    scale: float
    """What a step of the bytes stands for."""
    quantiles: FineQuantiles
    """Quantiles of a caption's distance to the nearest other caption, as of one cluster."""

    @classmethod
    def fit(cls, x: Float[np.ndarray, "N D"]) -> NearCaptions | None:
        """Keep the captions of some rows, each once; None where there is just one.

        Args:
            x: Vectors of at most `KEPT_CAPTIONS` rows; those of zeros say nothing and are left out.
        """
        kept = np.unique(x[x.any(axis=1)], axis=0)
        if len(kept) < 2:
            return None
        vectors, scale = _to_bytes(kept)
        rows = np.arange(0, len(kept), -(-len(kept) // COMPARED_CAPTIONS))
        index, distance = nearest_centers(kept[rows], vectors * np.float32(scale), 2)
        other = np.where(index[:, 0] == rows, distance[:, 1], distance[:, 0])
        return cls(
            vectors=vectors,
            scale=scale,
            quantiles=FineQuantiles(levels=LEVELS, distances=np.quantile(other, LEVELS)[None].astype(np.float32)),
        )

    def distance(self, x: Float[np.ndarray, "L D"]) -> Float[np.ndarray, " L"]:
        """Return the Euclidean distance of each vector to the nearest caption."""
        found = np.full(len(x), np.inf)
        for block in blocks(len(self.vectors), CAPTIONS_IN_MEMORY):
            captions = self.vectors[block] * np.float32(self.scale)
            np.minimum(found, nearest_centers(x, captions)[1][:, 0], out=found)
        return found

    def joined(self, others: NearCaptions) -> NearCaptions:
        """Return the captions of both. What is far is what is far for both: the larger quantiles."""
        both = [own.vectors * np.float32(own.scale) for own in (self, others)]
        vectors, scale = _to_bytes(np.concatenate(both))
        larger = np.maximum(self.quantiles.distances, others.quantiles.distances)
        return NearCaptions(vectors=vectors, scale=scale, quantiles=replace(self.quantiles, distances=larger))


def _to_bytes(x: Float[np.ndarray, "n D"]) -> tuple[Int8[np.ndarray, "n D"], float]:
    scale = max(float(np.abs(x).max()), 1e-12) / 127
    return np.round(x / scale).astype(np.int8), scale


def fit_quantiles(
    fine: Int[np.ndarray, " N"], distance: Float[np.ndarray, " N"], num_fine: int, levels: tuple[float, ...] = LEVELS
) -> FineQuantiles:
    """Compute the quantiles of each cluster from the captions that were assigned to it.

    Args:
        fine: Fine cluster of each caption.
        distance: Euclidean distance of each caption to that centre.
        num_fine: Number of fine clusters; one with fewer than two captions gets what is typical of the others.
        levels: Shares, ascending; 0.5 is one of them.

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
    highest = np.where(known, np.arange(len(levels)), -1).max(1)  # position of the highest level that a cluster knows
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
    """Return the quantiles of all distances as multiples of their cluster's scale, without clusters of scale 0."""
    rows = scale[fine] > 0
    return np.quantile(distance[rows] / scale[fine[rows]], levels) if rows.any() else np.ones(len(levels))


def fitted_quantiles(catalog: Catalog, num_fine: int, selection: Selection = ALL) -> FineQuantiles:
    """Compute the quantiles from a clustered catalog, from every n-th row if it has more than ``SAMPLED_ROWS``.

    A selection leaves the other rows out.

    Raises:
        ModeclipError: The catalog is not clustered, or has more than ``num_fine`` fine clusters.
    """
    chosen = selection.mask_of(catalog)
    step = -(-int(chosen.sum()) // SAMPLED_ROWS)
    fine, distance, start, seen = [], [], 0, 0
    for block in catalog.batches(["fine_cluster", "fine_distance"]):
        own = np.flatnonzero(chosen[start : start + len(block["fine_cluster"])])
        rows = own[-seen % step :: step]
        fine.append(block["fine_cluster"][rows])
        distance.append(block["fine_distance"][rows])
        start += len(block["fine_cluster"])
        seen += len(own)
    found = np.concatenate([np.empty(0, np.int32), *fine])
    if len(found) and int(found.max()) >= num_fine:
        raise ModeclipError(
            f"catalog {catalog.path!r} has a fine cluster {int(found.max())}, expected 0 to {num_fine - 1}: it belongs"
            " to another clustering; give the catalog that the bundle was made from"
        )
    quantiles = fit_quantiles(found, np.concatenate([np.empty(0, np.float32), *distance]), num_fine)
    rows = np.flatnonzero(chosen)
    rows = rows[:: max(1, -(-len(rows) // KEPT_CAPTIONS))]
    near = NearCaptions.fit(read_embeddings(catalog, rows)) if len(rows) and COLUMN in catalog.columns else None
    return replace(quantiles, near=near)
