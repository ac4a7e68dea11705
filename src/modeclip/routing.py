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
- `adaptive`: `per_class` with a temperature for each class, temperature * spread_l; `SPREADS`.

The sum of an expert without a fine cluster is 0. In the softmax of `paper`, `eq6`, `release` and
`coarse` that is still exp(0) > 0: the published formulas give some weight to an expert that no
class speaks for. `share`, `per_class` and `adaptive` give it 0.

What a row is. A task's classes, or the texts of a corpus whose images ask for a text (eq. 7), are
routed together. Queries that ask for an image, and images where the clusters are of images, are
each a task of their own: `each=True` gives a row of weights to each, under every rule.

Then, in this order, where asked for:

- `prior`: p(c) <- prior_c p(c) / sum, for experts that are better than others on their own data.
- `seed_distance` r (`share`, `per_class`, `adaptive`): the seed model is expert K + 1, with one
  centre at distance r from every class, A_l,seed = exp(-r^2 / temperature): little near a centre,
  nearly all far from every centre.
- `max_experts` n: the n experts with the largest mean over all rows, their weights renormalised.

Source: MoDE (arXiv 2404.16030), Sec. 3.4, eq. 5-7; App. E for the two terms of `paper` that depend
on L; CoarseCluster in Sec. 5.2; images in Sec. 5.3. `top1`, `share`, `per_class`, `adaptive`, prior,
seed and budget are ours. A temperature for each point is Zelnik-Manor's and Perona's (2004).
Price: one product of an L x D with a D x M matrix in float64, a chunk of rows at a time: `per_class`
weighs a million texts of 384 dimensions in 17 seconds for M = 1024 and in 2 minutes for M = 8192 (one
core, ``benchmarks/routing.py``); memory is that of the weights and of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from modeclip.errors import ModeclipError, unknown
from modeclip.nearness import nearest_center, nearest_of, squared_distances

RULES = ("paper", "eq6", "release", "uniform", "coarse", "top1", "share", "per_class", "adaptive")

SHARE_RULES = ("share", "per_class", "adaptive")
"""Rules under which every centre counts."""

DEFAULT_TEMPERATURE = dict.fromkeys(RULES, 0.2) | {"share": 0.1, "per_class": 0.1, "adaptive": 0.125}
"""Each rule's temperature for callers that name none: the paper's; 0.1 if all centres count, and the
factor of `adaptive` that comes to 0.1 for a class at a usual distance."""

SPREADS = ("nearest", "mean", "gap", "radius")
"""What `adaptive` takes for the spread of a class: `nearest`: d_l^2; `mean`: the mean of the squared
distances to the `NUM_NEAREST` nearest centres; `gap`: that mean less d_l^2; `radius`: the squared
typical distance of the captions in the nearest cluster, which the caller gives."""

NUM_NEAREST = 16
"""How many centres are neighbours of a class, for its spread."""

LEAST_SPREAD = 1e-9
"""Smallest temperature of a class under `adaptive`: on a centre, that centre alone decides."""

SMALL_TASK = 10
"""A task with fewer classes than this is small (App. E)."""

LARGE_TASK = 200
"""A task with more classes than this is large (App. E)."""

RELEASE_SLOPE = 5.0
"""Factor of the plain distance in the published code, before it grows with L."""

RELEASE_SOFTNESS = 8.0
"""What the published code divides the experts' sums by before the softmax."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Routing:
    """The experts' weights for one task, and the distances that they were made from."""

    weights: Float[np.ndarray, "... K"]
    """Weight of each expert, summing to 1: (K,), or a row for each class (L, K) under `per_class`,
    `adaptive`, and with `each`. With `seed_distance`, the seed's weight is one more at the end."""

    nearest_fine: Int[np.ndarray, " L"]
    """Index of the fine centre nearest to each class; the lowest index if several are."""

    distance: Float[np.ndarray, " L"]
    """Euclidean distance to that centre, NOT squared: 0 to 2 for unit vectors."""

    entropy: float
    """Entropy of the weights in nats: 0 is one expert, ln(K) uniform. Of rows: the mean."""


def route(
    class_embeddings: Float[np.ndarray, "L D"],
    fine_centers: Float[np.ndarray, "M D"],
    expert_of_fine: Int[np.ndarray, " M"],
    *,
    num_experts: int,
    rule: str = "paper",
    temperature: float = 0.2,
    each: bool = False,
    max_experts: int | None = None,
    prior: Float[np.ndarray, " K"] | None = None,
    seed_distance: float | None = None,
    spread: str = "nearest",
    fine_radius: Float[np.ndarray, " M"] | None = None,
) -> Routing:
    """Weigh the experts for one task.

    Args:
        class_embeddings: One unit vector a class, by the encoder that embedded the captions.
        fine_centers: Centres of the fine clusters of the captions.
        expert_of_fine: Which expert, 0 to K - 1, each fine cluster belongs to.
        num_experts: K.
        rule: One of `RULES`; the top of this module gives each one's formula.
        temperature: Lambda of eq. 5, in units of squared distance, above 0; under `adaptive` its
            factor. The default is the paper's, see `DEFAULT_TEMPERATURE`; `uniform` and `release`
            take no notice of it.
        each: Whether every row is a task of its own, as queries for images and images are.
        max_experts: How many experts may have weight; None: all.
        prior: What each expert's weight is multiplied by, 0 or more; None: the same for all.
        seed_distance: Distance at which the seed weighs as much as one centre; None: no seed.
        spread: What `adaptive` measures, one of `SPREADS`.
        fine_radius: Typical distance of each cluster's captions to its centre, for the spread
            `radius` (such as the median, ``FineQuantiles.threshold(0.5)``).

    Returns:
        The weights. `nearest_fine` and `distance` are about the fine centres under every rule,
        also under those that do not use them (`uniform`, `coarse`).

    Raises:
        ModeclipError: The rule is unknown, the temperature is not above 0, there is no class, an
            array has a wrong shape or is not finite, or another argument is out of range.

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
    _check_options(rule, num_experts, max_experts, prior, seed_distance)
    if rule in SHARE_RULES:
        weights, nearest_fine, distance = _share(
            class_embeddings,
            fine_centers,
            np.eye(num_experts)[expert_of_fine],
            temperature,
            seed_distance,
            _checked_spread(spread, fine_radius, len(fine_centers)) if rule == "adaptive" else None,
        )
        if rule == "share" and not each:
            weights = weights.mean(axis=0)
    else:
        nearest_fine, distance = nearest_center(class_embeddings, fine_centers)
        if rule == "coarse":
            coarse_centers, expert_of_coarse = _coarse_clusters(fine_centers, expert_of_fine)
            nearest_coarse, near = nearest_center(class_embeddings, coarse_centers)
            expert_of_class = expert_of_coarse[nearest_coarse]
        else:
            expert_of_class, near = expert_of_fine[nearest_fine].astype(np.int64), distance
        weights = _task_weights(rule, near, expert_of_class, num_experts, temperature, each)
    if prior is not None:
        seed = [] if seed_distance is None else [1.0]
        weights = reweigh(weights, np.array([*prior, *seed], dtype=np.float64))
    if max_experts is not None:
        weights = keep_best(weights, max_experts)
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
    return route(
        class_embeddings,
        fine_centers,
        expert_of_fine,
        num_experts=num_experts,
        rule="per_class",
        temperature=temperature,
    ).weights


def embed_classes(
    encode: Callable[[Sequence[str]], Float[np.ndarray, "_ D"]],
    classnames: Sequence[str],
    templates: Sequence[str] = (),
) -> Float[np.ndarray, "L D"]:
    """Embed class names for routing: the names themselves (the paper), or their prompts (the published code).

    Args:
        encode: The clusters' encoder: texts -> unit vectors.
        classnames: L class names.
        templates: Prompts with ``{}`` where the name goes, whose unit vectors are averaged and
            scaled to norm 1; none: the plain names.

    Raises:
        ModeclipError: A template has no place for the name.
    """
    for template in templates:
        if "{}" not in template:
            raise ModeclipError(f"template {template!r} has no {{}} where the class name goes")
    if not templates:
        return encode(list(classnames))
    total = sum(encode([template.replace("{}", name) for name in classnames]) for template in templates)
    vectors = np.asarray(total)
    unit: np.ndarray = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return unit.astype(vectors.dtype)


def keep_best(weights: Float[np.ndarray, "... K"], count: int, *, per_row: bool = False) -> Float[np.ndarray, "... K"]:
    """Give all weight to the experts that have the most, the lowest index of equals.

    Args:
        weights: (K,), or rows of weights.
        count: How many experts are kept, 1 or more.
        per_row: Whether each row keeps its own; else all keep those with the largest mean.

    Returns:
        Weights that sum to 1. A row that had nothing for any of those kept shares equally among them.

    Examples:
        >>> keep_best(np.array([0.1, 0.6, 0.3]), 2).round(3)
        array([0.   , 0.667, 0.333])
    """
    if count < 1:
        raise ModeclipError(f"max_experts: expected 1 or more, got {count}")
    if count >= weights.shape[-1]:
        return weights
    size = weights if per_row or weights.ndim == 1 else weights.mean(axis=0)
    mask = np.zeros(size.shape)
    np.put_along_axis(mask, np.argsort(-size, axis=-1, kind="stable")[..., :count], 1.0, axis=-1)
    return reweigh(weights, mask)


def reweigh(weights: Float[np.ndarray, "... K"], factors: Float[np.ndarray, "... K"]) -> Float[np.ndarray, "... K"]:
    """Multiply weights by factors of 0 or more and make them sum to 1; where nothing is left, the factors count alone.

    Examples:
        >>> reweigh(np.array([[0.5, 0.5], [0.0, 1.0]]), np.array([1.0, 0.0]))
        array([[1., 0.],
               [1., 0.]])
    """
    product = weights * factors
    total = product.sum(axis=-1, keepdims=True)
    alone = factors / factors.sum(axis=-1, keepdims=True)
    shares: np.ndarray = np.where(total > 0, product / np.where(total > 0, total, 1.0), alone)
    return shares


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


def _task_weights(
    rule: str, distance: np.ndarray, expert_of_class: np.ndarray, num_experts: int, temperature: float, each: bool
) -> np.ndarray:
    """Return the weights under the rules that look at the nearest centre alone: (K,), or a row for each class."""
    num_classes = 1 if each else len(distance)

    def sums(affinity: np.ndarray) -> np.ndarray:
        if not each:
            return np.bincount(expert_of_class, weights=affinity, minlength=num_experts)
        rows = np.zeros((len(affinity), num_experts))
        rows[np.arange(len(affinity)), expert_of_class] = affinity
        return rows

    match rule:
        case "eq6" | "coarse":
            return softmax(sums(_eq6_affinity(distance, temperature)))
        case "paper":
            return softmax(sums(_paper_affinity(distance, temperature, num_classes)))
        case "top1":
            # The largest sum has the largest weight, but nearly flat weights can round to a tie.
            best = sums(_paper_affinity(distance, temperature, num_classes)).argmax(axis=-1)
            one_hot: np.ndarray = np.eye(num_experts)[best]
            return one_hot
        case "release":
            return softmax(sums(_release_affinity(distance, num_classes)) / RELEASE_SOFTNESS)
        case _:
            return np.full((len(distance), num_experts) if each else num_experts, 1 / num_experts)


def _share(
    class_embeddings: np.ndarray,
    fine_centers: np.ndarray,
    is_member: np.ndarray,
    temperature: float,
    seed_distance: float | None,
    spread_of: Callable[[np.ndarray], np.ndarray] | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return each class's shares, its nearest centre and the distance to it, in one pass over the distances."""
    num_classes = len(class_embeddings)
    shares = np.empty((num_classes, is_member.shape[1] + (seed_distance is not None)))
    nearest_fine, distance = np.empty(num_classes, dtype=np.int64), np.empty(num_classes)
    for rows, chunk, squared in squared_distances(class_embeddings, fine_centers):
        nearest_fine[rows], distance[rows] = nearest_of(chunk, squared, fine_centers)
        own = temperature if spread_of is None else temperature * np.maximum(spread_of(squared), LEAST_SPREAD)[:, None]
        shares[rows] = _shares(squared, is_member, own, seed_distance)
    return shares, nearest_fine, distance


def _eq6_affinity(distance: np.ndarray, temperature: float) -> np.ndarray:
    """A_l of eq. 5, of the nearest centre."""
    return np.exp(-(distance**2) / temperature)


def _paper_affinity(distance: np.ndarray, temperature: float, num_classes: int) -> np.ndarray:
    """A_l of eq. 5 with the terms of App. E for a small and for a large task."""
    if num_classes > LARGE_TASK:
        temperature = temperature / math.log(num_classes)
    scale = math.exp(0.5 - math.sqrt(num_classes)) if num_classes < SMALL_TASK else 1.0
    return scale * _eq6_affinity(distance, temperature)


def _release_affinity(distance: np.ndarray, num_classes: int) -> np.ndarray:
    """A_l as the published code computes it."""
    add = math.exp(0.5 - math.sqrt(num_classes)) if num_classes < SMALL_TASK else 0.0
    mul = RELEASE_SLOPE * math.log10(max(10, num_classes - LARGE_TASK))
    return np.exp((add - distance) * mul)


def _coarse_clusters(fine_centers: np.ndarray, expert_of_fine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean fine centre of every expert that has one, and which experts those are."""
    experts = np.unique(expert_of_fine)
    centers = fine_centers.astype(np.float64)
    means = np.stack([centers[expert_of_fine == expert].mean(axis=0) for expert in experts])
    return means, experts.astype(np.int64)


def _spread(squared: np.ndarray, kind: str, fine_radius: np.ndarray | None) -> np.ndarray:
    """Return spread_l of `SPREADS`, from the squared distances of the classes to all centres."""
    least: np.ndarray = squared.min(axis=1)
    if kind == "nearest":
        return least
    if kind == "radius":
        assert fine_radius is not None
        radius: np.ndarray = fine_radius[squared.argmin(axis=1)].astype(np.float64)
        return np.asarray(radius**2)
    count = min(NUM_NEAREST, squared.shape[1])
    mean: np.ndarray = np.partition(squared, count - 1, axis=1)[:, :count].mean(axis=1)
    return mean if kind == "mean" else mean - least


def _shares(
    squared: np.ndarray, is_member: np.ndarray, temperature: np.ndarray | float, seed_distance: float | None
) -> np.ndarray:
    """Return the experts' shares, and the seed's; what `squared` holds is used up."""
    least = squared.min(axis=1, keepdims=True)
    if seed_distance is not None:
        least = np.minimum(least, seed_distance**2)
    squared -= least
    squared /= -temperature
    sums: np.ndarray = np.exp(squared, out=squared) @ is_member
    if seed_distance is not None:
        sums = np.hstack([sums, np.exp((least - seed_distance**2) / temperature)])
    sums /= sums.sum(axis=1, keepdims=True)
    return sums


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


def _check_options(
    rule: str, num_experts: int, max_experts: int | None, prior: np.ndarray | None, seed_distance: float | None
) -> None:
    """Raise for an option that is out of range, or that the rule has no place for."""
    if max_experts is not None and max_experts < 1:
        raise ModeclipError(f"max_experts: expected 1 or more, got {max_experts}")
    if prior is not None:
        shown = f"{prior.dtype} of shape {prior.shape}"
        if prior.shape != (num_experts,) or not (np.isfinite(prior) & (prior >= 0)).all() or not prior.any():
            raise ModeclipError(f"prior: expected {num_experts} numbers of 0 or more, one above 0, got {shown}")
    if seed_distance is not None:
        if rule not in SHARE_RULES:
            raise ModeclipError(f"seed_distance: rule {rule!r} has no place for the seed; use {', '.join(SHARE_RULES)}")
        if not 0 < seed_distance < math.inf:
            raise ModeclipError(f"seed_distance: expected a finite number above 0, got {seed_distance}")


def _checked_spread(spread: str, fine_radius: np.ndarray | None, num_fine: int) -> Callable[[np.ndarray], np.ndarray]:
    """Return the function of the squared distances that a spread is."""
    if spread not in SPREADS:
        raise unknown("spread", spread, SPREADS)
    if spread == "radius" and (fine_radius is None or fine_radius.shape != (num_fine,)):
        raise ModeclipError(f"spread 'radius': expected fine_radius, a distance for each of {num_fine} fine clusters")
    return lambda squared: _spread(squared, spread, fine_radius)
