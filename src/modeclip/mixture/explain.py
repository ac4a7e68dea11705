"""Why a task is routed as it is: the fine clusters that lie nearest to each of its classes, and whose those are.

Price: the distances of the class names to all centres once more; the cards of the clusters are read from the bundle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from modeclip.clustering.distances import nearest_centers
from modeclip.mixture.bundle import Bundle

NEAREST_SHOWN = 3
"""How many fine clusters a class is explained by."""


@dataclass(frozen=True, kw_only=True)
class NearCluster:
    """A fine cluster that a class name lies close to."""

    index: int
    """Index of the fine cluster."""
    distance: float
    """Euclidean distance of the class name to its centre: 0 to 2 for unit vectors."""
    expert: int
    """Index of the expert that the cluster belongs to."""
    captions: tuple[str, ...]
    """The captions nearest to its centre."""


@dataclass(frozen=True, kw_only=True)
class ClassReason:
    """Why one class has the weights that it has."""

    name: str
    """The class name, the query, or the file of the picture."""
    weights: tuple[float, ...]
    """Weight of each expert for this class. All classes have the same, unless each is weighed by itself."""
    clusters: tuple[NearCluster, ...]
    """The nearest fine clusters, nearest first; none where the router does not look at clusters."""


def explain(
    names: Sequence[str],
    weights: Float[np.ndarray, "L K"],
    embeddings: Float[np.ndarray, "L D"],
    bundle: Bundle,
) -> list[ClassReason]:
    """Name the fine clusters nearest to each class, with their captions and their experts.

    Args:
        names: Name of each class.
        weights: Weight of each expert for each class.
        embeddings: Vector of each class by the bundle's encoder; of an image, the image's half of a pair's vector.
        bundle: The bundle with the clusters and their cards.
    """
    centers = bundle.fine_centers[:, -embeddings.shape[1] :]
    nearest, distance = nearest_centers(embeddings, centers, NEAREST_SHOWN)
    experts, cards = bundle.expert_of_fine.tolist(), bundle.clusters
    return [
        ClassReason(
            name=name,
            weights=tuple(own),
            clusters=tuple(
                NearCluster(index=s, distance=gap, expert=experts[s], captions=tuple(cards[s]["nearest_captions"]))
                for s, gap in zip(near, gaps, strict=True)
            ),
        )
        for name, own, near, gaps in zip(names, weights.tolist(), nearest.tolist(), distance.tolist(), strict=True)
    ]
