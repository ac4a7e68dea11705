"""Embeddings and centres in, float64 distances out: what routing looks at, a few hundred rows at a time.

Where `distances.nearest` wants the one nearest centre of a billion captions, routing wants every distance of a few
names, or of a corpus of texts, to all centres, and the same answer whatever else is asked in the same call.

Price: a product of the rows with the centres in float64 and a few passes over a chunk that stays in the cache. For a
million texts of 384 dimensions on one core: 17 seconds for 1024 centres, 2 minutes for 8192
(``benchmarks/routing.py``).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int

MAX_DISTANCES = 2**22
"""How many class-to-centre distances are held at once (32 MiB)."""

MAX_ROWS = 256
"""Most classes whose distances are held at once: of 1024 centres, 2 MiB, which stay in the cache."""

ROUNDING = 1e-13
"""Relative difference of squared distances below which two centres count as equally near."""


def nearest_center(
    embeddings: Float[np.ndarray, "L D"], centers: Float[np.ndarray, "M D"]
) -> tuple[Int[np.ndarray, " L"], Float[np.ndarray, " L"]]:
    """Find each embedding's nearest centre, lowest index of equals, and the distance to it.

    Examples:
        >>> index, distance = nearest_center(np.array([[0.5], [0.9]]), np.array([[0.0], [1.0]]))
        >>> index, distance.round(3)
        (array([0, 1]), array([0.5, 0.1]))
    """
    index, distance = np.empty(len(embeddings), dtype=np.int64), np.empty(len(embeddings))
    for rows, chunk, squared in squared_distances(embeddings, centers):
        index[rows], distance[rows] = nearest_of(chunk, squared, centers)
    return index, distance


def nearest_centers(
    embeddings: Float[np.ndarray, "L D"], centers: Float[np.ndarray, "M D"], count: int
) -> tuple[Int[np.ndarray, "L n"], Float[np.ndarray, "L n"]]:
    """Find each embedding's nearest centres, nearest first, lowest index of equals, and the distances to them.

    Examples:
        >>> nearest_centers(np.array([[0.6]]), np.array([[0.0], [1.0], [1.5]]), 2)[0]
        array([[1, 0]])
    """
    count = min(count, len(centers))
    index, distance = np.empty((len(embeddings), count), dtype=np.int64), np.empty((len(embeddings), count))
    for rows, chunk, squared in squared_distances(embeddings, centers):
        room = ROUNDING * (squared + np.vecdot(chunk, chunk)[:, None])
        farthest = np.partition(squared + room, count - 1, axis=1)[:, count - 1]
        for row, x, near in zip(range(len(embeddings))[rows], chunk, squared - room <= farthest[:, None], strict=True):
            found = np.flatnonzero(near)
            gaps = np.linalg.norm(x - centers[found], axis=1)
            order = np.lexsort((found, gaps.round(12)))[:count]  # what differs by rounding only is equal
            index[row], distance[row] = found[order], gaps[order]
    return index, distance


def squared_distances(embeddings: np.ndarray, centers: np.ndarray) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Yield (rows, these rows in float64, their squared distances to every centre, of which each lives until the next).

    Args:
        embeddings: Rows.
        centers: Centres.
    """
    centers = centers.astype(np.float64)
    squared_norm, columns = np.vecdot(centers, centers), np.ascontiguousarray(-2 * centers.T)
    num_rows = max(1, min(MAX_ROWS, MAX_DISTANCES // len(centers)))
    buffer = np.empty((min(num_rows, len(embeddings)), len(centers)))  # memory that is new each time costs more
    for start in range(0, len(embeddings), num_rows):
        rows = slice(start, start + num_rows)
        chunk = embeddings[rows].astype(np.float64)
        squared = np.matmul(chunk, columns, out=buffer[: len(chunk)])
        squared += squared_norm
        squared += np.vecdot(chunk, chunk)[:, None]
        yield rows, chunk, np.maximum(squared, 0.0, out=squared)


def nearest_of(chunk: np.ndarray, squared: np.ndarray, centers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the nearest centre of each row and the exact distance to it."""
    least = squared.min(axis=1)
    # The matrix product rounds equal distances apart: what differs by rounding only is equal.
    limit = least + ROUNDING * (least + np.vecdot(chunk, chunk))
    index = (squared <= limit[:, None]).argmax(axis=1)
    return index, np.linalg.norm(chunk - centers[index], axis=1)
