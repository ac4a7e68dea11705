"""The routing formulas: how much weight each expert gets, from class embeddings and cluster centres.

A mixture answers with the weighted sum of its experts' cosine similarities, and this module computes
the weights. Nothing is learned and no image is needed. A class name is embedded as the captions were,
so the fine cluster that it falls into tells which expert was trained on such words. With class
embeddings e_l, fine centres e_s, S_c the fine clusters of expert c, and d_l the distance of class l
to its nearest centre:

    A_ls = exp(-||e_l - e_s||^2 / temperature)                                         (eq. 5)
    p(c) = softmax over c of the sum, over all classes l and all s in S_c, of A_ls     (eq. 6)

The rules:

- `eq6`: a class keeps only the A of its nearest centre, A_l = exp(-d_l^2 / temperature).
- `paper`: `eq6`, but if L < 10, every A_l is multiplied by exp(0.5 - sqrt(L)), and if L > 200, the
  temperature is divided by ln(L). So nothing changes at L = 10 and at L = 200 exactly.
- `release`: what the published code computes, from the plain distance and without a temperature:
  A_l = exp((add - d_l) * mul), with add = exp(0.5 - sqrt(L)) if L < 10, else 0, and
  mul = 5 * log10(max(10, L - 200)), which is 5 up to L = 210; then p = softmax(sums / 8).
- `uniform`: 1 / K each, the plain ensemble.
- `coarse`: `eq6` with the mean of each expert's fine centres in place of the fine centres.
- `top1`: all weight goes to the expert that has the most under `paper`.
- `per_class`: each class has its own weights: each expert's share of the class's A_ls over ALL centres.
- `share`: the mean of `per_class` over the classes.

The sum of an expert without a fine cluster is 0. In the softmax of `paper`, `eq6`, `release` and
`coarse` that is still exp(0) > 0, so the published formulas give some weight to an expert that no
class is near to. `share` and `per_class` give it 0.

The classes of a task are routed together, and so are the texts of a corpus from which images choose
(eq. 7). Queries that look for an image are tasks of their own, and so are images where the clusters
are of images: `each=True` gives each of them a row of weights, under every rule.

`max_experts` n keeps the n experts with the largest mean over all rows and renormalises their weights.

Source: MoDE (arXiv 2404.16030), Sec. 3.4, eq. 5-7; App. E for the two terms of `paper` that depend
on L; CoarseCluster in Sec. 5.2; images in Sec. 5.3. `top1`, `share`, `per_class` and the budget are ours;
what was tried beyond them and did not win is in ``runs/candidates.py``.
Price: one product of an L x D with a D x M matrix in float64, a chunk of rows at a time. `per_class`
weighs a million texts of 384 dimensions in 17 seconds for M = 1024 and in 2 minutes for M = 8192 (one
core, ``benchmarks/routing.py``). Memory holds the weights and one chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Int

from modeclip.clustering.distances import ArrayLike, as_array, nearest_centers, nearest_of, squared_distance_blocks
from modeclip.data.prompts import check_templates, fill
from modeclip.errors import ModeclipError, unknown

RULES = ("paper", "eq6", "release", "uniform", "coarse", "top1", "share", "per_class")

DEFAULT_RULE = "per_class"
"""What measurement favours: on tasks that had no part in choosing it, over three seeds, it beats uniform weights by
1.9 ± 0.8 points where experts have specialised, and the published rules gain nothing (``runs/results.py``)."""

DEFAULT_TEMPERATURE = dict.fromkeys(RULES, 0.2) | {"share": 0.1, "per_class": 0.1}
"""Each rule's temperature for callers that name none: the paper's 0.2, or 0.1 where all centres count."""

Mix = Literal["cosines", "log-probabilities"]
MIXES: tuple[Mix, ...] = get_args(Mix)
"""What the experts contribute to the weighted sum: cosines (the paper), or the logarithms of their probabilities, which
take all classes of a task at once."""

SMALL_TASK = 10
"""A task with fewer classes than this is small (App. E)."""

LARGE_TASK = 200
"""A task with more classes than this is large (App. E)."""

RELEASE_SLOPE = 5.0
"""Factor of the plain distance in the published code, before it grows with L."""

RELEASE_SOFTNESS = 8.0
"""The published code divides the experts' sums by this before the softmax."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Routing:
    """The experts' weights for one task, and the distances that they follow from."""

    weights: Float[np.ndarray, "... K"]
    """Weight of each expert, summing to 1: (K,), or a row for each class (L, K) under `per_class` and with `each`."""

    nearest_fine: Int[np.ndarray, " L"]
    """Index of the fine centre nearest to each class; the lowest index if several are equally near."""

    distance: Float[np.ndarray, " L"]
    """Euclidean distance to that centre, NOT squared: 0 to 2 for unit vectors."""

    entropy: float
    """Entropy of the weights in nats: 0 if one expert has all, ln(K) if they are equal; the mean over rows."""


def route(
    class_embeddings: ArrayLike,
    fine_centers: ArrayLike,
    expert_of_fine: ArrayLike,
    *,
    num_experts: int,
    rule: str = "per_class",
    temperature: float | None = None,
    each: bool = False,
    max_experts: int | None = None,
) -> Routing:
    """Weigh the experts for one task.

    Arrays may be lists, numpy arrays of any number type, or torch tensors.

    Args:
        class_embeddings: (L, D) unit vectors, one a class, by the encoder that embedded the captions. A vector of
            zeros says nothing: that class gets the prior, each expert's share of the fine clusters, and has no part in
            the sums of the rules for whole tasks.
        fine_centers: (M, D) centres of the fine clusters of the captions.
        expert_of_fine: (M,) integers: which expert, 0 to K - 1, each fine cluster belongs to.
        num_experts: Number of experts, K.
        rule: One of `RULES`; the top of this module gives the formula of each.
        temperature: Lambda of eq. 5, in units of squared distance, above 0. None: the rule's own from
            `DEFAULT_TEMPERATURE`. `uniform` and `release` do not use it.
        each: Whether every row is a task of its own, as queries for images and images are.
        max_experts: How many experts may have weight; None: all of them.

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
    temperature = DEFAULT_TEMPERATURE[rule] if temperature is None else temperature
    classes, centers = _as_floats("class_embeddings", class_embeddings), _as_floats("fine_centers", fine_centers)
    owners = as_array("expert_of_fine", expert_of_fine)
    _check(classes, centers, owners, num_experts, temperature)
    if max_experts is not None and max_experts < 1:
        raise ModeclipError(f"max_experts: expected 1 or more, got {max_experts}")
    says = classes.any(axis=1)
    prior = np.bincount(owners, minlength=num_experts) / len(owners)
    if rule in {"share", "per_class"}:
        weights, nearest_fine, distance = _share(classes, centers, np.eye(num_experts)[owners], temperature)
        weights[~says] = prior
        if rule == "share" and not each:
            weights = weights.mean(axis=0)
    else:
        nearest_fine, distance = _nearest(classes, centers)
        if rule == "coarse":
            coarse_centers, expert_of_coarse = _coarse_clusters(centers, owners)
            nearest_coarse, near = _nearest(classes, coarse_centers)
            expert_of_class = expert_of_coarse[nearest_coarse]
        else:
            expert_of_class, near = owners[nearest_fine].astype(np.int64), distance
        counted = np.ones_like(says) if each or rule == "uniform" else says
        weights = prior
        if counted.any():
            weights = _task_weights(rule, near[counted], expert_of_class[counted], num_experts, temperature, each)
        if each and rule != "uniform":
            weights[~says] = prior
    if max_experts is not None:
        weights = keep_best(weights, max_experts)
    return Routing(weights=weights, nearest_fine=nearest_fine, distance=distance, entropy=entropy(weights))


def embed_classes(
    encode: Callable[[Sequence[str]], Float[np.ndarray, "_ D"]],
    classnames: Sequence[str],
    templates: Sequence[str] = (),
) -> Float[np.ndarray, "L D"]:
    """Embed class names for routing: the names themselves (the paper), or their prompts (the published code).

    Args:
        encode: Function of the clusters' encoder that turns texts into unit vectors.
        classnames: L class names.
        templates: Prompts with ``{}`` where the name goes. Their unit vectors are averaged and the mean is
            scaled to norm 1. None given: the plain names are embedded.

    Raises:
        ModeclipError: A template has no place for the name.
    """
    check_templates(templates, "route")
    if not templates:
        return encode(list(classnames))
    total = sum(encode([fill(template, name) for name in classnames]) for template in templates)
    vectors = np.asarray(total)
    unit: np.ndarray = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return unit.astype(vectors.dtype)


def keep_best(weights: Float[np.ndarray, "... K"], count: int, *, per_row: bool = False) -> Float[np.ndarray, "... K"]:
    """Give all weight to the experts that have the most; of equal ones the lowest index wins.

    Args:
        weights: (K,), or rows of weights.
        count: How many experts are kept, 1 or more.
        per_row: Whether each row keeps its own best; else all rows keep those with the largest mean.

    Returns:
        Weights that sum to 1. A row without any weight for the experts kept shares it equally among them.

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
    """Multiply weights by factors of 0 or more and make them sum to 1; a row with nothing left gets the factors alone.

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
    """Normalise exp(x) over the last axis; the largest value is subtracted first, so that nothing overflows.

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
    """Return the weights under the rules that look at nearest centres only: (K,), or a row for each class."""
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


def _as_floats(name: str, values: ArrayLike) -> np.ndarray:
    """Return a floating array; whole numbers become float64, floats keep their type and so their memory."""
    array = as_array(name, values)
    return array if array.dtype.kind == "f" else array.astype(np.float64)


def _nearest(classes: np.ndarray, centers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the nearest centre of each class and the distance to it."""
    index, distance = nearest_centers(classes, centers)
    return index[:, 0], distance[:, 0]


def _share(
    class_embeddings: np.ndarray, fine_centers: np.ndarray, is_member: np.ndarray, temperature: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return each class's shares, its nearest centre and the distance to it, in one pass over the distances."""
    num_classes = len(class_embeddings)
    shares = np.empty((num_classes, is_member.shape[1]))
    nearest_fine, distance = np.empty(num_classes, dtype=np.int64), np.empty(num_classes)
    for rows, chunk, squared in squared_distance_blocks(class_embeddings, fine_centers):
        nearest_fine[rows], distance[rows] = nearest_of(chunk, squared, fine_centers)
        squared -= squared.min(axis=1, keepdims=True)
        squared /= -temperature
        sums: np.ndarray = np.exp(squared, out=squared) @ is_member
        shares[rows] = sums / sums.sum(axis=1, keepdims=True)
    return shares, nearest_fine, distance


def _eq6_affinity(distance: np.ndarray, temperature: float) -> np.ndarray:
    """Return A_l of eq. 5 for the nearest centre."""
    return np.exp(-(distance**2) / temperature)


def _paper_affinity(distance: np.ndarray, temperature: float, num_classes: int) -> np.ndarray:
    """Return A_l of eq. 5 with the terms of App. E for a small and for a large task."""
    if num_classes > LARGE_TASK:
        temperature = temperature / math.log(num_classes)
    scale = math.exp(0.5 - math.sqrt(num_classes)) if num_classes < SMALL_TASK else 1.0
    return scale * _eq6_affinity(distance, temperature)


def _release_affinity(distance: np.ndarray, num_classes: int) -> np.ndarray:
    """Return A_l as the published code computes it."""
    add = math.exp(0.5 - math.sqrt(num_classes)) if num_classes < SMALL_TASK else 0.0
    mul = RELEASE_SLOPE * math.log10(max(10, num_classes - LARGE_TASK))
    return np.exp((add - distance) * mul)


def _coarse_clusters(fine_centers: np.ndarray, expert_of_fine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean fine centre of every expert that has one, and which experts those are."""
    experts = np.unique(expert_of_fine)
    centers = fine_centers.astype(np.float64)
    means = np.stack([centers[expert_of_fine == expert].mean(axis=0) for expert in experts])
    return means, experts.astype(np.int64)


def _check(
    class_embeddings: np.ndarray,
    fine_centers: np.ndarray,
    expert_of_fine: np.ndarray,
    num_experts: int,
    temperature: float,
) -> None:
    """Raise for the first argument that no rule can work with."""
    for name, rows in (("class_embeddings", class_embeddings), ("fine_centers", fine_centers)):
        if rows.ndim != 2 or 0 in rows.shape:
            raise ModeclipError(f"{name}: expected a matrix of 1 or more rows and columns, got shape {rows.shape}")
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
