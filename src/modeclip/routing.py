"""Class embeddings and cluster centres in, a weight per expert out: whom a task listens to.

A mixture answers with the weighted sum of its experts' cosine similarities; this module gives the
weights. Nothing is learned and no image is needed: a class name is embedded as the captions were,
so the fine cluster that it falls into tells which expert was trained on such words. With class
embeddings e_l, fine centres e_s, S_c the fine clusters of expert c, and d_l the distance of class l
to its nearest centre:

    A_ls = exp(-||e_l - e_s||^2 / temperature)                                         (eq. 5)
    p(c) = softmax over c of the sum, over all classes l and all s in S_c, of A_ls     (eq. 6)

The rules:

- `eq6`: a class keeps only the A of its nearest centre, A_l = exp(-d_l^2 / temperature).
- `paper`: `eq6`; but if L < 10, every A_l is multiplied by exp(0.5 - sqrt(L)), and if L > 200, the
  temperature is divided by ln(L). So nothing changes at L = 10 and at L = 200 exactly.
- `release`: what the published code computes, of the plain distance and without a temperature:
  A_l = exp((add - d_l) * mul), with add = exp(0.5 - sqrt(L)) if L < 10, else 0, and
  mul = 5 * log10(max(10, L - 200)), which is 5 up to L = 210; then p = softmax(sums / 8).
- `uniform`: 1 / K each, the plain ensemble.
- `coarse`: `eq6` with the mean of each expert's fine centres in place of the fine centres.
- `top1`: all weight on the expert that has the most under `paper`.
- `per_class`: each class has its own weights, the experts' shares of its A_ls over ALL centres.
- `share`: the mean of `per_class` over the classes.

The sum of an expert without a fine cluster is 0. In the softmax of `paper`, `eq6`, `release` and
`coarse` that is still exp(0) > 0: the published formulas give some weight to an expert that no
class speaks for. `share` and `per_class` give it 0.

Source: MoDE (arXiv 2404.16030), Sec. 3.4, eq. 5-6; App. E for the two terms of `paper` that depend
on L; CoarseCluster in Sec. 5.2. `top1`, `share` and `per_class` are ours.
Price: one product of an L x D with a D x M matrix (`share`, `per_class`: two) in float64, and
memory for a few times `MAX_DISTANCES` numbers beside the inputs, however large L is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from modeclip.errors import ModeclipError, unknown

RULES = ("paper", "eq6", "release", "uniform", "coarse", "top1", "share", "per_class")

DEFAULT_TEMPERATURE = dict.fromkeys(RULES, 0.2) | {"share": 0.1, "per_class": 0.1}
"""Each rule's temperature for callers that name none: the paper's, or 0.1 if all centres count."""

SMALL_TASK = 10
"""A task with fewer classes than this is small (App. E)."""

LARGE_TASK = 200
"""A task with more classes than this is large (App. E)."""

RELEASE_SLOPE = 5.0
"""Factor of the plain distance in the published code, before it grows with L."""

RELEASE_SOFTNESS = 8.0
"""What the published code divides the experts' sums by before the softmax."""

MAX_DISTANCES = 2**22
"""How many class-to-centre distances are held at once (32 MiB)."""

ROUNDING = 1e-13
"""Relative difference of squared distances below which two centres count as equally near."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Routing:
    """The experts' weights for one task, and the distances that they were made from."""

    weights: Float[np.ndarray, "... K"]
    """Weight of each expert, summing to 1: (K,), or a row for each class (L, K) by `per_class`."""

    nearest_fine: Int[np.ndarray, " L"]
    """Index of the fine centre nearest to each class; the lowest index if several are."""

    distance: Float[np.ndarray, " L"]
    """Euclidean distance to that centre, NOT squared: 0 to 2 for unit vectors."""

    entropy: float
    """Entropy of the weights in nats: 0 is one expert, ln(K) uniform. `per_class`: its mean."""


def route(
    class_embeddings: Float[np.ndarray, "L D"],
    fine_centers: Float[np.ndarray, "M D"],
    expert_of_fine: Int[np.ndarray, " M"],
    *,
    num_experts: int,
    rule: str = "paper",
    temperature: float = 0.2,
) -> Routing:
    """Weigh the experts for one task.

    Args:
        class_embeddings: One unit vector a class, by the encoder that embedded the captions.
        fine_centers: Centres of the fine clusters of the captions.
        expert_of_fine: Which expert, 0 to K - 1, each fine cluster belongs to.
        num_experts: K.
        rule: One of `RULES`; the top of this module gives each one's formula.
        temperature: Lambda of eq. 5, in units of squared distance, above 0. The default is the
            paper's, see `DEFAULT_TEMPERATURE`; `uniform` and `release` take no notice of it.

    Returns:
        The weights. `nearest_fine` and `distance` are about the fine centres under every rule,
        also under those that do not use them (`uniform`, `coarse`).

    Raises:
        ModeclipError: The rule is unknown, the temperature is not above 0, there is no class, an
            array has a wrong shape or is not finite, or an expert index is out of range.

    Examples:
        Seven classes at distance 0.6 from their nearest centre, which is expert 0's for five:

        >>> centers = np.array([[0.0, 0.0], [3.0, 0.0]])
        >>> classes = np.array([[0.0, 0.6]] * 5 + [[3.0, 0.6]] * 2)
        >>> route(classes, centers, np.array([0, 1]), num_experts=2, rule="eq6").weights.round(3)
        array([0.621, 0.379])

    References:
        Ma et al., MoDE: CLIP Data Experts via Clustering, arXiv 2404.16030, Sec. 3.4 and App. E.
    """
    if rule not in RULES:
        raise unknown("rule", rule, RULES)
    _check(class_embeddings, fine_centers, expert_of_fine, num_experts, temperature)
    nearest_fine, distance = nearest_center(class_embeddings, fine_centers)

    def sum_by_expert(affinity: np.ndarray, expert_of_class: np.ndarray) -> np.ndarray:
        return np.bincount(expert_of_class, weights=affinity, minlength=num_experts)

    expert_of_class = expert_of_fine[nearest_fine].astype(np.int64)
    match rule:
        case "eq6":
            affinity = _eq6_affinity(distance, temperature)
            weights = softmax(sum_by_expert(affinity, expert_of_class))
        case "paper":
            affinity = _paper_affinity(distance, temperature)
            weights = softmax(sum_by_expert(affinity, expert_of_class))
        case "top1":
            # The largest sum has the largest weight, but nearly flat weights can round to a tie.
            affinity = _paper_affinity(distance, temperature)
            weights = np.eye(num_experts)[sum_by_expert(affinity, expert_of_class).argmax()]
        case "release":
            affinity = _release_affinity(distance)
            weights = softmax(sum_by_expert(affinity, expert_of_class) / RELEASE_SOFTNESS)
        case "coarse":
            coarse_centers, expert_of_coarse = _coarse_clusters(fine_centers, expert_of_fine)
            nearest_coarse, coarse_distance = nearest_center(class_embeddings, coarse_centers)
            affinity = _eq6_affinity(coarse_distance, temperature)
            weights = softmax(sum_by_expert(affinity, expert_of_coarse[nearest_coarse]))
        case "uniform":
            weights = np.full(num_experts, 1 / num_experts)
        case _:
            shares = share(
                class_embeddings,
                fine_centers,
                expert_of_fine,
                num_experts=num_experts,
                temperature=temperature,
            )
            weights = shares if rule == "per_class" else shares.mean(axis=0)
    return Routing(weights=weights, nearest_fine=nearest_fine, distance=distance, entropy=entropy(weights))


def share(
    class_embeddings: Float[np.ndarray, "L D"],
    fine_centers: Float[np.ndarray, "M D"],
    expert_of_fine: Int[np.ndarray, " M"],
    *,
    num_experts: int,
    temperature: float,
) -> Float[np.ndarray, "L K"]:
    """Weigh the experts for every class: their shares of its affinity to all fine centres.

    Args:
        class_embeddings: One unit vector a class, or query text.
        fine_centers: Centres of the fine clusters of the captions.
        expert_of_fine: Which expert, 0 to K - 1, each fine cluster belongs to.
        num_experts: K.
        temperature: Lambda of eq. 5, above 0. Towards 0, the nearest centre alone decides.

    Returns:
        Weights that sum to 1 in each row.

    Raises:
        ModeclipError: As in `route`.

    Examples:
        >>> centers = np.array([[0.0], [1.0]])
        >>> classes = np.array([[0.1], [0.5]])
        >>> share(classes, centers, np.array([0, 1]), num_experts=2, temperature=0.2).round(3)
        array([[0.982, 0.018],
               [0.5  , 0.5  ]])
    """
    _check(class_embeddings, fine_centers, expert_of_fine, num_experts, temperature)
    is_member = np.eye(num_experts)[expert_of_fine]  # (M, K): 1 where centre s is in S_c
    shares = np.empty((len(class_embeddings), num_experts))
    for rows, squared in _squared_distances(class_embeddings, fine_centers):
        shares[rows] = softmax(-squared / temperature) @ is_member
    return shares


def nearest_center(
    embeddings: Float[np.ndarray, "L D"], centers: Float[np.ndarray, "M D"]
) -> tuple[Int[np.ndarray, " L"], Float[np.ndarray, " L"]]:
    """Find each embedding's nearest centre, lowest index of equals, and the distance to it.

    Examples:
        >>> index, distance = nearest_center(np.array([[0.5], [0.9]]), np.array([[0.0], [1.0]]))
        >>> index, distance.round(3)
        (array([0, 1]), array([0.5, 0.1]))
    """
    index = np.empty(len(embeddings), dtype=np.int64)
    distance = np.empty(len(embeddings))
    for rows, squared in _squared_distances(embeddings, centers):
        chunk = embeddings[rows].astype(np.float64)
        least = squared.min(axis=1)
        # The matrix product rounds equal distances apart: what differs by rounding only is equal.
        limit = least + ROUNDING * (least + np.vecdot(chunk, chunk))
        index[rows] = (squared <= limit[:, None]).argmax(axis=1)
        distance[rows] = np.linalg.norm(chunk - centers[index[rows]], axis=1)
    return index, distance


def softmax(x: Float[np.ndarray, "... K"]) -> Float[np.ndarray, "... K"]:
    """Normalise exp(x) over the last axis; the largest value is taken off first, so none overflows.

    Examples:
        >>> softmax(np.array([1000.0, 1000.0, 0.0]))
        array([0.5, 0.5, 0. ])
    """
    exponential: np.ndarray = np.exp(x - x.max(axis=-1, keepdims=True))
    exponential /= exponential.sum(axis=-1, keepdims=True)
    return exponential


def entropy(weights: Float[np.ndarray, "... K"]) -> float:
    """Measure how spread the weights are, in nats, with 0 ln 0 = 0; the mean if there are rows.

    Examples:
        >>> entropy(np.array([1.0, 0.0])), round(entropy(np.array([0.5, 0.5])), 4)
        (0.0, 0.6931)
    """
    positive = np.where(weights > 0, weights, 1.0)
    return float(abs((positive * np.log(positive)).sum(axis=-1).mean()))


def _eq6_affinity(distance: np.ndarray, temperature: float) -> np.ndarray:
    """A_l of eq. 5, of the nearest centre."""
    return np.exp(-(distance**2) / temperature)


def _paper_affinity(distance: np.ndarray, temperature: float) -> np.ndarray:
    """A_l of eq. 5 with the terms of App. E for a small and for a large task."""
    num_classes = len(distance)
    if num_classes > LARGE_TASK:
        temperature = temperature / math.log(num_classes)
    scale = math.exp(0.5 - math.sqrt(num_classes)) if num_classes < SMALL_TASK else 1.0
    return scale * _eq6_affinity(distance, temperature)


def _release_affinity(distance: np.ndarray) -> np.ndarray:
    """A_l as the published code computes it."""
    num_classes = len(distance)
    add = math.exp(0.5 - math.sqrt(num_classes)) if num_classes < SMALL_TASK else 0.0
    mul = RELEASE_SLOPE * math.log10(max(10, num_classes - LARGE_TASK))
    return np.exp((add - distance) * mul)


def _coarse_clusters(fine_centers: np.ndarray, expert_of_fine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean fine centre of every expert that has one, and which experts those are."""
    experts = np.unique(expert_of_fine)
    centers = fine_centers.astype(np.float64)
    means = np.stack([centers[expert_of_fine == expert].mean(axis=0) for expert in experts])
    return means, experts.astype(np.int64)


def _squared_distances(embeddings: np.ndarray, centers: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield (rows, squared distance of these rows to every centre), `MAX_DISTANCES` at a time."""
    centers = centers.astype(np.float64)
    squared_norm = np.vecdot(centers, centers)
    num_rows = max(1, MAX_DISTANCES // len(centers))
    for start in range(0, len(embeddings), num_rows):
        rows = slice(start, start + num_rows)
        chunk = embeddings[rows].astype(np.float64)
        squared = np.vecdot(chunk, chunk)[:, None] - 2 * chunk @ centers.T + squared_norm
        yield rows, np.maximum(squared, 0.0)


def _check(
    class_embeddings: np.ndarray,
    fine_centers: np.ndarray,
    expert_of_fine: np.ndarray,
    num_experts: int,
    temperature: float,
) -> None:
    """Raise for the first argument that no rule can work with."""
    for name, rows in (("class_embeddings", class_embeddings), ("fine_centers", fine_centers)):
        if rows.ndim != 2 or len(rows) == 0:
            raise ModeclipError(f"{name}: expected a matrix of 1 or more rows, got shape {rows.shape}")
        is_finite = np.isfinite(rows).all(axis=1)
        if not is_finite.all():
            raise ModeclipError(f"{name}: row {is_finite.argmin()} has a value that is not finite")
    if class_embeddings.shape[1] != fine_centers.shape[1]:
        raise ModeclipError(
            f"class_embeddings: expected {fine_centers.shape[1]} dimensions as fine_centers has, "
            f"got {class_embeddings.shape[1]}; use the encoder that embedded the captions"
        )
    num_fine = len(fine_centers)
    if expert_of_fine.shape != (num_fine,) or expert_of_fine.dtype.kind not in "iu":
        raise ModeclipError(
            f"expert_of_fine: expected an integer for each of {num_fine} fine centers, "
            f"got {expert_of_fine.dtype} of shape {expert_of_fine.shape}"
        )
    is_outside = (expert_of_fine < 0) | (expert_of_fine >= num_experts)
    if is_outside.any():
        fine = is_outside.argmax()
        raise ModeclipError(
            f"expert_of_fine: expected 0 to {num_experts - 1} (num_experts is {num_experts}), "
            f"got {expert_of_fine[fine]} at fine cluster {fine}"
        )
    if not 0 < temperature < math.inf:
        raise ModeclipError(f"temperature: expected a finite number above 0, got {temperature}")
