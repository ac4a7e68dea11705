"""The weights of a task, and the reasons for them: which fine clusters its classes met, and whose those are.

Price: the distances of the class names to all centres once more; the cards of the clusters are read from the bundle.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from modeclip.clustering.distances import nearest_centers
from modeclip.mixture.bundle import Bundle
from modeclip.mixture.rules import Routing

NEAREST_SHOWN = 3
"""Fine clusters that a class is explained by."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """How a task is to be routed."""

    rule: str
    """One of ``routing.RULES``."""
    temperature: float
    """Of the rule."""
    max_experts: int | None
    """How many experts may have weight; None: all."""


@dataclass(frozen=True, kw_only=True)
class NearCluster:
    """A fine cluster that a class name lies close to."""

    index: int
    """Of the fine cluster."""
    distance: float
    """Euclidean distance of the class name to its centre (unit vectors: 0 to 2)."""
    expert: int
    """Expert that the cluster belongs to."""
    captions: tuple[str, ...]
    """The captions nearest to its centre."""


@dataclass(frozen=True, kw_only=True)
class ClassReason:
    """Why one class has the weights that it has."""

    name: str
    """The class name, the query, or the file of the picture."""
    weights: tuple[float, ...]
    """Weight of each expert for this class (the same for all, unless the rule weighs each by itself)."""
    clusters: tuple[NearCluster, ...]
    """The nearest fine clusters, nearest first."""


@dataclass(frozen=True, kw_only=True)
class Route:
    """The weights of a task, before any model is loaded."""

    classnames: tuple[str, ...]
    """Class names, in the order of the task; queries, or files of pictures, where each is routed by itself."""
    asked: Asked
    """Rule, temperature and budget that made the weights."""
    routing: Routing
    """Weights, nearest clusters, distances, entropy."""
    bundle: Bundle = field(repr=False)
    """Whose experts they weigh."""
    embeddings: Float[np.ndarray, "L D"] = field(repr=False)
    """Unit vectors of the class names."""

    @property
    def rule(self) -> str:
        """Rule that made the weights."""
        return self.asked.rule

    @property
    def temperature(self) -> float:
        """Its temperature."""
        return self.asked.temperature

    @property
    def weights(self) -> Float[np.ndarray, "... K"]:
        """Weight of each expert: (K,), or a row a class (L, K)."""
        return self.routing.weights

    @property
    def class_weights(self) -> Float[np.ndarray, "L K"]:
        """Weight of each expert for each class, whatever the rule."""
        return np.broadcast_to(self.weights, (len(self.classnames), self.weights.shape[-1]))

    @property
    def members(self) -> tuple[str, ...]:
        """Names of the experts, in the order of the weights."""
        return tuple(expert.name for expert in self.bundle.experts)

    def explain(self) -> list[ClassReason]:
        """Say for each class which fine clusters it met, what they are about and whose they are."""
        centers = self.bundle.fine_centers[:, -self.embeddings.shape[1] :]
        nearest, distance = nearest_centers(self.embeddings, centers, NEAREST_SHOWN)
        experts, cards = self.bundle.expert_of_fine.tolist(), self.bundle.clusters
        return [
            ClassReason(
                name=name,
                weights=tuple(weights),
                clusters=tuple(
                    NearCluster(index=s, distance=gap, expert=experts[s], captions=tuple(cards[s]["nearest_captions"]))
                    for s, gap in zip(near, gaps, strict=True)
                ),
            )
            for name, weights, near, gaps in zip(
                self.classnames, self.class_weights.tolist(), nearest.tolist(), distance.tolist(), strict=True
            )
        ]
