"""Predictions and labels in, accuracies and bootstrap intervals out: arrays only, no models, no files.

A task is a set of images with one true class each. Its metric is top-1 accuracy, or the mean over
classes of the accuracy in each class; the score of a model is the plain mean over its tasks.

The intervals are percentile bootstraps of that mean: the images of each task are drawn again with
replacement, the tasks stay. They say how sure the test images make us, and nothing of another
training seed or of other tasks. No resample is built: the number of correct images among n drawn
from a task with accuracy p is binomial(n, p), and for two models on the same images the numbers of
images that only one of them gets right are multinomial, so one draw of counts IS one resample.

Source: MoDE (arXiv 2404.16030), Sec. 4.3, for the metrics and their plain mean; Efron and
Tibshirani, An Introduction to the Bootstrap (1993), chapter 13, for percentile intervals.
Price: an interval costs a count or three per task and resample, whatever the number of images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from modeclip.errors import ModeclipError

Predictions = Int[np.ndarray, " N"] | Float[np.ndarray, "N L"]
"""Class indices, or a score for every class, of which the highest wins (ties: lowest index)."""

CorrectOfTask = Mapping[str, Bool[np.ndarray, " _"]]
"""Task name to whether each image of the task was classified correctly."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A statistic with its bootstrap interval; fractions in [0, 1], or [-1, 1] if a difference."""

    mean: float
    """The statistic on the images as they are."""

    low: float
    """Lower end of the interval."""

    high: float
    """Upper end of the interval."""


def correct(predictions: Predictions, labels: Int[np.ndarray, " N"]) -> Bool[np.ndarray, " N"]:
    """Tell for each image whether the predicted class is its label.

    Args:
        predictions: Class index of each image, or (N, L) scores: the highest wins, ties by index.
        labels: True class index of each image, 0 to L - 1.

    Raises:
        ModeclipError: There is no image, the lengths differ, a score is NaN, or scores are given
            and a label is not one of their columns.

    Examples:
        >>> correct(np.array([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8]]), np.array([0, 1, 1]))
        array([ True, False,  True])
    """
    if len(labels) == 0 or len(predictions) != len(labels):
        raise ModeclipError(
            "labels: expected one for each prediction, and at least one, "
            f"got {len(labels)} for {len(predictions)} predictions"
        )
    if predictions.ndim == 2:
        _check_scores(predictions, labels)
        predictions = predictions.argmax(axis=1)
    is_correct: np.ndarray = predictions == labels
    return is_correct


def accuracy(predictions: Predictions, labels: Int[np.ndarray, " N"]) -> float:
    """Return the fraction of images that are classified correctly; see `correct` for arguments.

    Examples:
        >>> accuracy(np.array([0, 0, 0, 1]), np.array([0, 0, 0, 0]))
        0.75
    """
    return float(correct(predictions, labels).mean())


def mean_per_class_accuracy(predictions: Predictions, labels: Int[np.ndarray, " N"]) -> float:
    """Return the plain mean, over the classes that have images, of the accuracy on their images.

    Large and small classes count alike; see `correct` for arguments.

    Examples:
        >>> mean_per_class_accuracy(np.array([0, 0, 0, 0]), np.array([0, 0, 0, 1]))
        0.5
    """
    is_correct = correct(predictions, labels)
    _, class_of_image = np.unique(labels, return_inverse=True)
    num_correct = np.bincount(class_of_image, weights=is_correct)
    return float((num_correct / np.bincount(class_of_image)).mean())


def bootstrap_interval(
    correct_of_task: CorrectOfTask,
    *,
    num_resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Give the plain mean over tasks of their accuracies an interval, resampling each one's images.

    A model that is right (or wrong) on every image has an interval of width 0: the images seen
    hold no sign of what it fails at.

    Args:
        correct_of_task: For each task, what `correct` returned. The tasks' order has no influence.
        num_resamples: The default leaves about 1 % of the interval's width to chance.
        confidence: Share of the resamples between the two ends, in (0, 1).
        seed: Of the resamples.

    Raises:
        ModeclipError: There is no task, a task has no image, or a number is out of its range.

    Examples:
        >>> is_correct = np.array([True] * 80 + [False] * 20)
        >>> bootstrap_interval({"pets": is_correct})
        Interval(mean=0.8, low=0.72, high=0.88)
    """
    gains = {task: is_correct.astype(np.int64) for task, is_correct in correct_of_task.items()}
    return _interval_of_mean(gains, num_resamples, confidence, seed)


def paired_interval(
    correct_of_task: CorrectOfTask,
    baseline_of_task: CorrectOfTask,
    *,
    num_resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Give the difference of two models' mean accuracies, on the same images, an interval.

    Both models are resampled together, so what makes an image hard for both cancels out: the
    interval is narrower than two separate ones suggest, and it excludes 0 when the better model
    is better beyond the choice of images.

    Args:
        correct_of_task: For each task, what `correct` returned for the one model.
        baseline_of_task: The same for the other, same tasks and images in the same order. A
            positive difference means that the first model is better.
        num_resamples: As in `bootstrap_interval`.
        confidence: As in `bootstrap_interval`.
        seed: Of the resamples.

    Raises:
        ModeclipError: As `bootstrap_interval`, or the tasks or their numbers of images differ.

    Examples:
        >>> baseline = np.array([True] * 70 + [False] * 30)
        >>> better = np.array([True] * 80 + [False] * 20)
        >>> paired_interval({"pets": better}, {"pets": baseline})
        Interval(mean=0.1, low=0.05, high=0.16)
    """
    if correct_of_task.keys() != baseline_of_task.keys():
        raise ModeclipError(
            f"paired interval: expected the same tasks for both models, "
            f"got {sorted(correct_of_task)} and {sorted(baseline_of_task)}"
        )
    gains = {}
    for task, is_correct in correct_of_task.items():
        baseline = baseline_of_task[task]
        if len(is_correct) != len(baseline):
            raise ModeclipError(
                f"paired interval, task {task!r}: expected the same images for both models, "
                f"got {len(is_correct)} and {len(baseline)}"
            )
        gains[task] = is_correct.astype(np.int64) - baseline
    return _interval_of_mean(gains, num_resamples, confidence, seed)


def _check_scores(scores: np.ndarray, labels: np.ndarray) -> None:
    """Raise if scores cannot be ranked or have no column for a label."""
    is_nan = np.isnan(scores).any(axis=1)
    if is_nan.any():
        raise ModeclipError(f"predictions: row {is_nan.argmax()} holds NaN; the model diverged")
    num_classes = scores.shape[1]
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ModeclipError(
            f"labels: expected 0 to {num_classes - 1} for {num_classes} classes, got {labels.min()} to {labels.max()}"
        )


def _interval_of_mean(
    gains_of_task: Mapping[str, np.ndarray], num_resamples: int, confidence: float, seed: int
) -> Interval:
    """Bootstrap the plain mean over tasks of the mean over images of a gain of -1, 0 or 1."""
    if not 0 < confidence < 1:
        raise ModeclipError(f"confidence: expected a number between 0 and 1, got {confidence}")
    if num_resamples < 1:
        raise ModeclipError(f"num_resamples: expected at least 1, got {num_resamples}")
    if not gains_of_task:
        raise ModeclipError("interval: expected tasks with images, got no tasks")
    for task, gains in gains_of_task.items():
        if len(gains) == 0:
            raise ModeclipError(f"interval: expected tasks with images, got none in {task!r}")

    generator = np.random.default_rng(seed)
    means, resampled_means = [], np.zeros(num_resamples)
    for task in sorted(gains_of_task):
        gains = gains_of_task[task]
        num_images = len(gains)
        counts = np.bincount(gains + 1, minlength=3)  # images with gain -1, 0 and 1
        drawn = generator.multinomial(num_images, counts / num_images, size=num_resamples)
        resampled_means += (drawn[:, 2] - drawn[:, 0]) / num_images
        means.append((counts[2] - counts[0]) / num_images)
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled_means / len(means), [tail, 1 - tail])
    return Interval(mean=float(np.mean(means)), low=float(low), high=float(high))
