"""Rules that tried to beat `per_class`: weights of the experts for each class, as `modeclip.mixture.rules` has them.

With d_ls the distance of class l to fine centre s, and S_c the centres of expert c:

    A_ls = exp(-d_ls^2 / temperature_l),   weight(l, c) = sum over S_c of A_ls, normalised over the experts

- `adaptive`: temperature_l = factor * spread_l, the squared distance to the nearest centre (`nearest`), its mean over
  the 16 nearest (`mean`), or their difference (`gap`). A temperature for each point: Zelnik-Manor and Perona (2004).
- `with_seed`: the seed model is expert K + 1, with a centre at the same distance from every class.
- `reweighed`: each expert's weight times a number of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from modeclip.clustering.distances import squared_distance_blocks
from modeclip.mixture.rules import reweigh

NUM_NEAREST = 16
LEAST_SPREAD = 1e-9
SPREADS = ("nearest", "mean", "gap")


def adaptive(
    squared: Float[np.ndarray, "L M"],
    expert_of_fine: Int[np.ndarray, " M"],
    num_experts: int,
    spread: str,
    factor: float,
) -> Float[np.ndarray, "L K"]:
    """Weigh by a temperature for each class."""
    near = np.partition(squared, NUM_NEAREST - 1, axis=1)[:, :NUM_NEAREST]
    least, mean = near.min(axis=1), near.mean(axis=1)
    spreads = {"nearest": least, "mean": mean, "gap": mean - least}[spread]
    temperature = factor * np.maximum(spreads, LEAST_SPREAD)[:, None]
    return _normalised(np.exp((least[:, None] - squared) / temperature) @ np.eye(num_experts)[expert_of_fine])


def with_seed(
    squared: Float[np.ndarray, "L M"],
    expert_of_fine: Int[np.ndarray, " M"],
    num_experts: int,
    distance: float,
    temperature: float = 0.1,
) -> Float[np.ndarray, "L K+1"]:
    """Weigh the experts and the seed, which stands at one distance from every class."""
    least = np.minimum(squared.min(axis=1, keepdims=True), distance**2)
    experts = np.exp((least - squared) / temperature) @ np.eye(num_experts)[expert_of_fine]
    return _normalised(np.hstack([experts, np.exp((least - distance**2) / temperature)]))


def reweighed(weights: Float[np.ndarray, "L K"], factors: Sequence[float]) -> Float[np.ndarray, "L K"]:
    """Multiply each expert's weights by a number of its own."""
    return reweigh(weights, np.array(factors, dtype=np.float64))


def distances_of(
    class_embeddings: Float[np.ndarray, "L D"], fine_centers: Float[np.ndarray, "M D"]
) -> Float[np.ndarray, "L M"]:
    """Return the squared distance of each class to each centre."""
    parts = [squared.copy() for _, _, squared in squared_distance_blocks(class_embeddings, fine_centers)]
    return np.concatenate(parts)


def _normalised(sums: np.ndarray) -> np.ndarray:
    weights: np.ndarray = sums / sums.sum(axis=1, keepdims=True)
    return weights
