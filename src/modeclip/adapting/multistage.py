"""Multistage clusters: pairs that a model sees alike become each other's negatives, and each stage parts them further.

A stage sees the pairs as the model of the stage before it does. The vectors of their images and those of their texts
fall into a few clusters each, and a pair belongs to one of the joint ones: 3 x 3 = 9. Clusters accumulate: those of a
stage part the ones of the stage before, so there are 9, 81, 729... Pairs of one cluster have in common what the models
so far tell apart, so a model that tells pairs of one cluster apart must have learned something else.

No pair is ever left out. A cluster with too few pairs is merged into the nearest one that comes from the same cluster
of the stage before (by the distance between the means of image and text vectors, side by side), the smallest first. So
each cluster is a part of one cluster of the stage before, and has enough pairs where that one has.

Source: multistage contrastive learning as CLIP-MoE uses it (arXiv 2409.19291, Sec. 3.1). Merging is ours.
Price: two k-means of at most 2^18 vectors, and one pass over all vectors, of which a block is in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from modeclip.clustering.distances import assign_nearest, blocks
from modeclip.clustering.fitting import sample_rows
from modeclip.clustering.kmeans import kmeans
from modeclip.curation.scores import Vectors
from modeclip.errors import ModeclipError

MOST_FITTED = 1 << 18
"""Vectors that centres are fitted to at most: enough for nine clusters of any set."""
ROWS_AT_ONCE = 1 << 14
"""Vectors that are in memory at a time."""


@dataclass(frozen=True, kw_only=True)
class StageClusters:
    """The clusters of a stage."""

    cluster: Int[np.ndarray, " N"]
    """Cluster of each pair, from 0; numbered by the cluster of the stage before, then by those of this stage."""
    num_found: int
    """Clusters that had a pair before small ones were merged."""
    num_merged: int
    """Clusters that were merged into another because they had too few pairs."""
    pairs_moved: int
    """Pairs of these."""

    @property
    def num_clusters(self) -> int:
        """Clusters that are left."""
        return int(self.cluster.max()) + 1


def refine_clusters(
    before: Int[np.ndarray, " N"],
    images: Vectors,
    texts: Vectors,
    *,
    num_clusters: int = 3,
    min_pairs: int = 1,
    seed: int = 0,
    device: str = "cpu",
) -> StageClusters:
    """Part the clusters of the stage before by what a model sees in the pairs.

    Args:
        before: Cluster of each pair in the stage before; zeros before the first one.
        images: (N, D) unit vectors of the images.
        texts: (N, D) unit vectors of the texts.
        num_clusters: Clusters of the images, and as many of the texts.
        min_pairs: Pairs that a cluster must have, or it is merged.
        seed: Decides the samples and starts of k-means.
        device: Torch device of the distance products.

    Raises:
        ModeclipError: There are fewer pairs than clusters of the images.
    """
    count = len(before)
    if count < num_clusters:
        raise ModeclipError(
            f"{count:,} pairs are fewer than {num_clusters} clusters of their images; give more pairs or fewer clusters"
        )
    joint = np.zeros(count, np.int64)
    for number, vectors in enumerate((images, texts)):
        sample = sample_rows(count, MOST_FITTED, seed)
        centers = kmeans(_floats(vectors, sample), num_clusters, seed=seed + number, device=device).centers
        for rows in _parts(count):
            joint[rows] = num_clusters * joint[rows] + assign_nearest(_floats(vectors, rows), centers, device=device)[0]
    kinds, cluster = np.unique(before * num_clusters**2 + joint, return_inverse=True)
    sizes = np.bincount(cluster, minlength=len(kinds))
    if (sizes >= min_pairs).all():
        return StageClusters(cluster=cluster, num_found=len(kinds), num_merged=0, pairs_moved=0)
    sums = np.concatenate([_sums(vectors, cluster, len(kinds)) for vectors in (images, texts)], axis=1)
    target = merge_small(sizes, kinds // num_clusters**2, sums, min_pairs)
    moved = target != np.arange(len(kinds))
    _, number_of = np.unique(target, return_inverse=True)
    return StageClusters(
        cluster=number_of[cluster],
        num_found=len(kinds),
        num_merged=int(moved.sum()),
        pairs_moved=int(sizes[moved].sum()),
    )


def merge_small(
    sizes: Int[np.ndarray, " C"],
    parents: Int[np.ndarray, " C"],
    sums: Float[np.ndarray, "C D"],
    min_pairs: int,
) -> Int[np.ndarray, " C"]:
    """Return the cluster that each cluster becomes a part of: itself where it has enough pairs or no neighbour.

    Args:
        sizes: Pairs of each cluster, at least 1.
        parents: Cluster of the stage before that it comes from; only clusters of one parent are merged.
        sums: Sum of the vectors of its pairs.
        min_pairs: Pairs that a cluster must have.

    Examples:
        The cluster of a single pair, at 1, goes to the nearer of its neighbours, at 0 and at 5:

        >>> import numpy as np
        >>> merge_small(np.array([4, 1, 4]), np.zeros(3, int), np.array([[0.0], [1.0], [20.0]]), 2).tolist()
        [0, 0, 2]
    """
    target = np.arange(len(sizes))
    sizes, sums = sizes.copy(), sums.astype(np.float64)
    for parent in np.unique(parents).tolist():
        left = np.flatnonzero(parents == parent)
        while len(left) > 1:
            small = left[np.argmin(sizes[left])]
            if sizes[small] >= min_pairs:
                break
            left = left[left != small]
            means = sums[left] / sizes[left, None]
            nearest = left[np.argmin(np.square(means - sums[small] / sizes[small]).sum(1))]
            sums[nearest] += sums[small]
            sizes[nearest] += sizes[small]
            target[target == small] = nearest
    return target


def _sums(vectors: Vectors, cluster: Int[np.ndarray, " N"], count: int) -> Float[np.ndarray, "C D"]:
    """Return the sum of the vectors of each cluster."""
    total: np.ndarray | None = None
    for rows in _parts(len(cluster)):
        part = _floats(vectors, rows)
        total = np.zeros((count, part.shape[1])) if total is None else total
        np.add.at(total, cluster[rows], part)
    assert total is not None
    return total


def _parts(count: int) -> Iterator[slice]:
    return blocks(count, ROWS_AT_ONCE)


def _floats(vectors: Vectors, rows: slice | Int[np.ndarray, " n"]) -> Float[np.ndarray, "n D"]:
    """Return some vectors as float32, as they may be kept in fewer bytes."""
    return np.asarray(vectors[rows], np.float32)
