"""Metrics of a task from similarities and labels. Arrays only: no models and no files.

What a model did on a task is an `Outcome`: the metrics under CLIP_benchmark's names, and for every sample what it
contributes to the metric that counts. From these contributions ``intervals`` makes intervals and tests without a model.

- `acc1`, `acc5`: the right class is the best, or among the best five. `mean_top1_top5`: the mean of both (Kinetics700).
- `mean_per_class_recall`: the accuracy on the images of a class, averaged over the classes that have images.
- `roc_auc` (two classes): how often an image of the second class has a larger margin than one of the first.
- `mean_average_precision` (several labels an image): averaged over the classes that some image shows.
- `image_acc`, `text_acc`, `acc`: the share of instances in which every text finds its image, every image its text, or
  both. An answer with an equal rival counts as not found (in CLIP_benchmark the first of equals is found).

Source: MoDE (arXiv 2404.16030), Sec. 4.3, for the metrics; DeLong et al. (1988) for the influence on areas.
Price: a pass over the similarities, in blocks; with several labels an image two passes and a sort for each class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Int

from modeclip.data.tasks.task import METRICS
from modeclip.errors import ModeclipError, unknown
from modeclip.evaluation.intervals import Outcome, average
from modeclip.evaluation.similarity import BLOCK_NUMBERS, Similarity

TOP = 5
"""Classes among which `acc5` looks for the right one; a task with fewer has no such metric."""


def score_classes(
    similarity: Similarity, labels: Int[np.ndarray, " N"] | Bool[np.ndarray, "N L"], metric: str = "acc1"
) -> Outcome:
    """Score a classification: the class with the highest similarity wins, and the lowest index among equals.

    Args:
        similarity: Of N images with L classes; read in blocks.
        labels: Index of each image's class; or, where an image shows several classes, a mask of these.
        metric: The metric of ``task.METRICS`` that counts.

    Raises:
        ModeclipError: The metric is unknown or does not fit the labels, a label has no class, or a similarity is NaN.

    Examples:
        >>> images = np.array([[1.0, 0.0], [0.6, 0.8]], np.float32)
        >>> similarity = Similarity(images=[images], texts=[np.eye(2, dtype=np.float32)], weights=np.ones(1))
        >>> score_classes(similarity, np.array([0, 0])).metrics["acc1"]
        0.5
    """
    _check_labels(similarity, labels, metric)
    prediction, rank, margin = _places(similarity, labels)
    if labels.ndim == 2:
        hits = _average_precisions(similarity, labels)
        metrics = {"mean_average_precision": float(hits.mean())}
        return Outcome(metrics=metrics, main=metric, hits=hits, prediction=prediction, rank=rank)
    is_first, is_top = (rank == 0).astype(np.float64), (rank < TOP).astype(np.float64)
    _, class_of_image, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    by_class = len(labels) / (len(sizes) * sizes[class_of_image])
    contributions: dict[str, tuple[np.ndarray, np.ndarray | None]] = {
        "acc1": (is_first, None),
        "mean_per_class_recall": (is_first, by_class),
    }
    if similarity.shape[1] >= TOP:
        contributions |= {"acc5": (is_top, None), "mean_top1_top5": ((is_first + is_top) / 2, None)}
    if similarity.shape[1] == 2 and len(sizes) == 2:
        contributions["roc_auc"] = _area(margin, labels == 1), by_class
    if metric not in contributions:
        raise ModeclipError(
            f"metric {metric}: needs {'two classes with images' if metric == 'roc_auc' else f'{TOP} classes'}, got "
            f"{similarity.shape[1]} classes, {len(sizes)} of them with images; choose acc1"
        )
    hits, weights = contributions[metric]
    metrics = {name: float(np.average(h, weights=w)) for name, (h, w) in contributions.items()}
    return Outcome(metrics=metrics, main=metric, hits=hits, prediction=prediction, rank=rank, weights=weights)


def select_captions(
    similarity: Similarity, instance_of_image: Int[np.ndarray, " N"], instance_of_text: Int[np.ndarray, " T"]
) -> Outcome:
    """Score instances whose images and texts are to be told apart, as in Winoground and SugarCrepe.

    The i-th image of an instance belongs to its i-th text. A text without an image (SugarCrepe's wrong captions) only
    distracts. Samples are instances, in the order of their numbers: ``prediction`` is the place of the text that the
    first image of an instance prefers, ``rank`` the number of other texts that are at least as similar to that image
    as its own.

    Args:
        similarity: Of all images with all texts; only those within an instance are read.
        instance_of_image: Number of each image's instance.
        instance_of_text: Number of each text's instance.

    Raises:
        ModeclipError: An instance has no image or no text.
    """
    instances = np.unique(np.concatenate([instance_of_image, instance_of_text]))
    for name, of in (("image", instance_of_image), ("text", instance_of_text)):
        without = np.setdiff1d(instances, of)
        if len(without) or not len(instances):
            raise ModeclipError(f"selection: expected {name}s in every instance, got none in {without[:1].tolist()}")
    image_order, text_order = (np.argsort(of, kind="stable") for of in (instance_of_image, instance_of_text))
    ordered = _reordered(similarity, image_order, text_order)
    image_ends = np.searchsorted(instance_of_image[image_order], instances, side="right").tolist()
    text_ends = np.searchsorted(instance_of_text[text_order], instances, side="right").tolist()
    found = np.empty((len(instances), 2))
    prediction, rank = np.empty((2, len(instances)), dtype=np.int64)
    starts = zip([0, *image_ends[:-1]], [0, *text_ends[:-1]], strict=True)
    for row, (images, texts) in enumerate(starts):
        scores = ordered.block(slice(images, image_ends[row]), slice(texts, text_ends[row]))
        _refuse_nan(scores, images)
        pairs = min(scores.shape)
        own = scores.diagonal()
        found[row, 0] = ((scores[:, :pairs] >= own).sum(axis=0) == 1).all()
        found[row, 1] = ((scores[:pairs] >= own[:, None]).sum(axis=1) == 1).all()
        prediction[row], rank[row] = scores[0].argmax(), (scores[0] >= own[0]).sum() - 1
    both = found.min(axis=1)
    metrics = {"image_acc": float(found[:, 0].mean()), "text_acc": float(found[:, 1].mean()), "acc": float(both.mean())}
    extra = {"instance": instances, "image_hit": found[:, 0], "text_hit": found[:, 1]}
    return Outcome(metrics=metrics, main="acc", hits=both, prediction=prediction, rank=rank, extra=extra)


def choose_by_labels(outcomes: Mapping[str, Mapping[str, Outcome]]) -> tuple[str, dict[str, str]]:
    """Return the expert with the highest average, and the best expert of each task; the first of equals.

    Args:
        outcomes: What each expert did on each task: all experts, the same tasks.
    """
    best = max(outcomes, key=lambda expert: average(outcomes[expert]))
    return best, {task: max(outcomes, key=lambda expert: outcomes[expert][task].score) for task in outcomes[best]}


# ---------------------------------------------------------------- places and contributions


def _check_labels(similarity: Similarity, labels: np.ndarray, metric: str) -> None:
    """Raise if the labels do not fit the metric or the classes."""
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    num_images, num_classes = similarity.shape
    if len(labels) != num_images or num_images == 0:
        raise ModeclipError(f"labels: expected one for each of 1 or more images, got {len(labels)} for {num_images}")
    if (labels.ndim == 2) != (metric == "mean_average_precision"):
        got = "several labels" if labels.ndim == 2 else "one label"
        raise ModeclipError(
            f"metric {metric}: got {got} an image; use mean_average_precision where images have several labels, and "
            "only there"
        )
    if labels.ndim == 2 and labels.shape[1] != num_classes:
        raise ModeclipError(f"labels: expected a column for each of {num_classes} classes, got {labels.shape[1]}")
    if labels.ndim == 1:
        _check_range(labels, num_classes)
    elif not labels.any():
        raise ModeclipError("labels: expected at least one image with a label, got images without any")


def _check_range(labels: np.ndarray, num_classes: int) -> None:
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ModeclipError(
            f"labels: expected 0 to {num_classes - 1} for {num_classes} classes, got {labels.min()} to {labels.max()}"
        )


def _refuse_nan(scores: np.ndarray, first: int) -> None:
    is_nan = np.isnan(scores).any(axis=1)
    if is_nan.any():
        raise ModeclipError(f"predictions: row {first + is_nan.argmax()} holds NaN; the model diverged")


def _places(similarity: Similarity, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return each image's best class, the place of its (best) right class, and by how much class 1 beats class 0."""
    num_images, num_classes = similarity.shape
    prediction, rank = np.empty((2, num_images), dtype=np.int64)
    margin = np.zeros(num_images)
    for rows, scores in similarity.blocks():
        _refuse_nan(scores, rows.start)
        right: np.ndarray = labels[rows]
        none: np.ndarray = np.zeros(len(right), dtype=bool)
        if right.ndim == 2:
            none = ~np.logical_or.reduce(right, axis=1)
            right = np.where(right, scores, -np.inf).argmax(axis=1)
        own = np.take_along_axis(scores, right[:, None], axis=1)
        ahead = (scores > own) | ((scores == own) & (np.arange(num_classes) < right[:, None]))
        prediction[rows] = scores.argmax(axis=1)
        rank[rows] = np.where(none, num_classes, ahead.sum(axis=1))
        if num_classes == 2:
            margin[rows] = scores[:, 1].astype(np.float64) - scores[:, 0]
    return prediction, rank, margin


def _area(margin: np.ndarray, is_positive: np.ndarray) -> np.ndarray:
    """Return each image's contribution to the area under the ROC curve."""

    def share_below(values: np.ndarray, others: np.ndarray) -> np.ndarray:
        ordered = np.sort(others)
        below = sum(np.searchsorted(ordered, values, side=side) for side in ("left", "right"))
        return np.asarray(below / (2 * len(others)))

    positive, negative = margin[is_positive], margin[~is_positive]
    placement = np.empty(len(margin))
    placement[is_positive] = share_below(positive, negative)
    placement[~is_positive] = 1 - share_below(negative, positive)
    area = placement[is_positive].mean()
    influence: np.ndarray = area + 2 * (placement - area)  # 2: each class has half of the weight
    return influence


def _average_precisions(similarity: Similarity, labels: np.ndarray) -> np.ndarray:
    """Return each image's contribution to the mean average precision."""
    num_images, num_classes = similarity.shape
    shown: np.ndarray = np.logical_or.reduce(labels, axis=0)
    total, step = np.zeros(num_images), max(1, BLOCK_NUMBERS // num_images)
    for start in range(0, num_classes, step):
        classes = slice(start, min(start + step, num_classes))
        scores = similarity.block(slice(None), classes)
        for offset in np.flatnonzero(shown[classes]):
            total += _average_precision(scores[:, offset], labels[:, start + offset])
    total /= shown.sum()
    return total


def _average_precision(scores: np.ndarray, is_positive: np.ndarray) -> np.ndarray:
    """Return each image's contribution to one class's average precision; equal scores are one threshold."""
    order = np.argsort(-scores, kind="stable")
    sorted_scores, positive = -scores[order], is_positive[order].astype(np.float64)
    place = np.searchsorted(sorted_scores, sorted_scores, side="right")
    precision = positive.cumsum()[place - 1] / place
    average = (positive * precision).sum() / positive.sum()

    def over_later(values: np.ndarray) -> np.ndarray:
        """Sum from the first of each one's equals to the end."""
        sums: np.ndarray = values[::-1].cumsum()[::-1][np.searchsorted(sorted_scores, sorted_scores)]
        return sums

    gained = positive * (precision + over_later(positive / place) - average)
    derivative = (gained - over_later(positive * precision / place)) / positive.sum()
    contribution = np.empty(len(scores))
    contribution[order] = average + len(scores) * derivative
    return contribution


def _reordered(similarity: Similarity, images: np.ndarray, texts: np.ndarray) -> Similarity:
    """Return the same similarities with images and texts in another order."""
    weights = similarity.weights
    if weights.ndim == 2:
        weights = weights[images if similarity.per_image else texts]
    return replace(
        similarity,
        images=[rows[images] for rows in similarity.images],
        texts=[rows[texts] for rows in similarity.texts],
        weights=weights,
    )
