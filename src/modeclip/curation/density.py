"""How many pairs each cluster keeps: by density (DBP), or as evenly as its size allows (balanced sampling).

Density-based pruning keeps many pairs of clusters that are wide and far from others, and few of dense ones among many.
With k clusters of n_j pairs, d_intra the mean cosine distance of a cluster's members to its centre, d_inter that of its
centre to the 20 nearest other centres, and N pairs that are wanted,

    P = softmax(d_intra d_inter / temperature)
    minimise |x - P N|^2   so that   sum x = N,   min(N / 2k, n_j - 1) <= x_j <= n_j

The minimum is x_j = P_j N + s, cut to its bounds, for the one number s that makes the sum right. The sum is a piecewise
linear function of s that rises, so s is found exactly, by bisection over its corners.

Balanced sampling is the same with P = 0 and no lower bound: x_j = min(s, n_j). In a hierarchy the shares of the parent
clusters come first, and each is divided among its children.

Source: DBP (arXiv 2401.04578), Sec. 3, temperature of the paper; hierarchical sampling (arXiv 2405.15613), Sec. 3.

Price: sorting the clusters; nothing to speak of.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from modeclip.clustering.distances import blocks

LEAST_SHARE = 0.5
"""A cluster keeps at least this share of the mean, if it has as many pairs (DBP)."""
CENTERS_AT_ONCE = 1024
"""Centres whose distances to all others are in memory at a time."""


def mean_distance_to_nearest(centers: Float[np.ndarray, "M D"], num_nearest: int) -> Float[np.ndarray, " M"]:
    """Return the mean cosine distance of each centre to the nearest others: d_inter; 0 where there is no other.

    Args:
        centers: Unit vectors.
        num_nearest: How many others count, at most; 20 in the paper.
    """
    count = min(num_nearest, len(centers) - 1)
    distance = np.zeros(len(centers))
    for block in blocks(len(centers) if count else 0, CENTERS_AT_ONCE):
        cosine = centers[block] @ centers.T
        cosine[np.arange(len(cosine)), np.arange(block.start, block.stop)] = -np.inf
        distance[block] = 1 - np.partition(cosine, -count, axis=1)[:, -count:].mean(1)
    return distance


def density_sizes(
    intra: Float[np.ndarray, " M"],
    inter: Float[np.ndarray, " M"],
    sizes: Int[np.ndarray, " M"],
    total: int,
    temperature: float,
) -> Int[np.ndarray, " M"]:
    """Return how many pairs each cluster keeps by density-based pruning.

    Args:
        intra: d_intra of each cluster.
        inter: d_inter of each cluster.
        sizes: Pairs of each cluster, 1 or more.
        total: Pairs that are wanted, 1 to the number of all.
        temperature: Of the softmax, above 0; the lower, the more goes to the clusters of the largest product.

    Examples:
        >>> density_sizes(np.array([0.1, 0.3]), np.array([0.2, 0.4]), np.array([100, 100]), 50, 0.1).tolist()
        [13, 37]
    """
    logits = intra * inter / temperature
    share = np.exp(logits - logits.max())
    low = np.minimum(LEAST_SHARE * total / len(sizes), sizes - 1)
    return round_sizes(fill_to(share / share.sum() * total, low, sizes, total), sizes)


def equal_sizes(sizes: Int[np.ndarray, " M"], total: int) -> Int[np.ndarray, " M"]:
    """Return how many pairs each cluster keeps if all keep the same number, as far as they have so many.

    Args:
        sizes: Pairs of each cluster.
        total: Pairs that are wanted, 0 to the number of all.

    Examples:
        >>> equal_sizes(np.array([1, 5, 9]), 9).tolist()
        [1, 4, 4]
    """
    return round_sizes(fill_to(np.zeros(len(sizes)), np.zeros(len(sizes)), sizes, total), sizes)


def equal_sizes_by_level(
    sizes: Int[np.ndarray, " M"], parents: Int[np.ndarray, " M"], total: int
) -> Int[np.ndarray, " M"]:
    """Return how many pairs each cluster keeps if first parents and then the clusters of each share evenly.

    Args:
        sizes: Pairs of each cluster.
        parents: Number of the cluster that each belongs to, from 0.
        total: Pairs that are wanted, 0 to the number of all.

    Examples:
        >>> equal_sizes_by_level(np.array([4, 4, 9]), np.array([0, 0, 1]), 10).tolist()
        [3, 2, 5]
    """
    kept = np.zeros(len(sizes), np.int64)
    for parent, wanted in enumerate(equal_sizes(np.bincount(parents, weights=sizes).astype(np.int64), total)):
        children = np.flatnonzero(parents == parent)
        if children.size:
            kept[children] = equal_sizes(sizes[children], int(wanted))
    return kept


def fill_to(
    ideal: Float[np.ndarray, " M"], low: Float[np.ndarray, " M"], high: Int[np.ndarray, " M"], total: int
) -> Float[np.ndarray, " M"]:
    """Return the nearest numbers to the ideal ones that lie within bounds and have a given sum.

    Args:
        ideal: What each would be without bounds.
        low: Least of each.
        high: Most of each, not below the least.
        total: Their sum, between those of all least and of all most.
    """
    corners = np.sort(np.concatenate([low - ideal, high - ideal]))

    def at(shift: float) -> Float[np.ndarray, " M"]:
        return np.clip(ideal + shift, low, high)

    first, last = 0, len(corners) - 1  # the sum is not above the total at the first, not below it at the last
    while last - first > 1:
        middle = (first + last) // 2
        first, last = (middle, last) if at(corners[middle]).sum() <= total else (first, middle)
    below, above = at(corners[first]), at(corners[last])
    rise = above.sum() - below.sum()
    part = (total - below.sum()) / rise if rise > 0 else 0.0
    filled: np.ndarray = below + np.clip(part, 0, 1) * (above - below)
    return filled


def round_sizes(x: Float[np.ndarray, " M"], sizes: Int[np.ndarray, " M"]) -> Int[np.ndarray, " M"]:
    """Round numbers to whole ones of the same sum, those with the largest fractions up, none above its size."""
    whole = np.floor(x + 1e-9).astype(np.int64)
    up = np.lexsort((np.arange(len(x)), -(x - whole).round(9), whole >= sizes))
    whole[up[: round(x.sum()) - int(whole.sum())]] += 1
    return whole
