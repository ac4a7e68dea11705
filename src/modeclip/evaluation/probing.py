"""The linear probe: how well a linear classifier on frozen features tells the classes of a task apart.

The classifier is multinomial logistic regression by scikit-learn's L-BFGS. Its inverse strength of regularisation, C,
is searched as CLIP does it. Part of the training images is held out, and seven values from 1e-6 to 1e6 are tried. Then
the steps around the best value are halved until there are eight values to a factor of ten. The classifier is fitted
again on all training images with the C that got most of the held-out images right; among equals, the C with the
smallest cross-entropy. Features are taken as they are, not standardised.

Features of several experts are concatenated, as in the paper, which found their sum, the other choice, to be worse.

Source: MoDE (arXiv 2404.16030), Table 9, for the concatenation; CLIP (arXiv 2103.00020), Sec. A.3, for the classifier
and the search. CLIP has official validation sets; ours is drawn from the training images, class by class,
with copies of an image (equal bytes) on the same side.
Price: 15 fits on part of the images and one on all of them; each fit starts where the next smaller C ended. 10,000
images with 512 numbers in 100 classes take 15 s on one core. A torch L-BFGS was no faster on a CPU.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from modeclip.data.holdout import keep_together
from modeclip.errors import ModeclipError, check_above_zero, check_least, unknown
from modeclip.evaluation.intervals import Outcome
from modeclip.evaluation.metrics import score_classes
from modeclip.evaluation.similarity import Similarity
from modeclip.system.console import progress

STEPS_A_DECADE = 8
"""Values of C to a factor of ten, where the search ends."""
DECADES = (-6, 6)
"""Smallest and largest log10 C that is tried."""
START_STEP = 2
"""Distance between the first values of log10 C."""
TOLERANCE = 1e-5
"""A fit ends when no entry of the mean loss's gradient is larger. It is a tenth of scikit-learn's default, because unit
vectors of many dimensions have small entries."""
LONG = 1 << 25
"""A progress bar is shown from so many features times classes on: about two seconds."""


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """How a linear probe is fitted."""

    combine: Literal["concatenate", "sum"] = "concatenate"
    """How the features of several experts become one vector."""
    C: float | None = None
    """Inverse strength of the regularisation, above 0; None: it is searched."""
    validation_fraction: float = 0.2
    """Share of each class's training images that the search holds out, in (0, 1). Each class keeps at least one."""
    max_iterations: int = 1000
    """Largest number of L-BFGS steps."""
    seed: int = 0
    """Seed that decides which images are held out."""

    def __post_init__(self) -> None:
        if self.combine not in ("concatenate", "sum"):
            raise unknown("way to combine features", self.combine, ["concatenate", "sum"])
        check_above_zero("probe", self, "C")
        if not 0 < self.validation_fraction < 1:
            raise ModeclipError(
                f"linear probe: validation_fraction: expected a share between 0 and 1, got {self.validation_fraction}"
            )
        check_least("probe", self, max_iterations=1, seed=0)


@dataclass(frozen=True, kw_only=True)
class ProbeTrial:
    """One value of C that the search tried."""

    C: float
    """Inverse strength of the regularisation."""
    accuracy: float
    """Share of the held-out images that are classified correctly."""
    loss: float
    """Mean cross-entropy on them, in nats."""
    iterations: int
    """Number of L-BFGS steps."""
    converged: bool
    """Whether these steps were enough."""

    @property
    def merit(self) -> tuple[float, float]:
        """What values of C are compared by: more images right, and among equals a smaller loss."""
        return self.accuracy, -self.loss if math.isfinite(self.loss) else -math.inf


@dataclass(frozen=True, kw_only=True, eq=False)
class ProbeResult:
    """A linear probe and what it does on the test images."""

    outcome: Outcome
    """Metrics and answers, as `metrics.score_classes` returns them."""
    C: float
    """The regularisation that was given or found."""
    sweep: tuple[ProbeTrial, ...]
    """What the search tried, by rising C; empty where C was given."""
    converged: bool
    """Whether the last fit ended before the limit of its steps."""
    num_train: int
    """Number of images of the last fit."""
    num_validation: int
    """How many of these the search held out."""
    coefficients: Float[np.ndarray, "L D"]
    """Weights of the classes."""
    intercepts: Float[np.ndarray, " L"]
    """Biases of the classes."""


def combine_features(
    features: Sequence[Float[np.ndarray, "N _"]], how: str = "concatenate"
) -> Float[np.ndarray, "N D"]:
    """Concatenate the features of several experts, or add them up.

    Raises:
        ModeclipError: They should be added up and have different dimensions.

    Examples:
        >>> one, other = np.ones((1, 2), np.float32), np.zeros((1, 2), np.float32)
        >>> combine_features([one, other])
        array([[1., 1., 0., 0.]], dtype=float32)
        >>> combine_features([one, other], "sum")
        array([[1., 1.]], dtype=float32)
    """
    sizes = [part.shape[1] for part in features]
    if how == "sum" and len(set(sizes)) > 1:
        raise ModeclipError(f"linear probe: expected features of one size to add up, got {sizes}; concatenate them")
    combined: np.ndarray = np.concatenate(features, axis=1) if how == "concatenate" else sum(features[1:], features[0])
    return combined


def linear_probe(
    train: Sequence[Float[np.ndarray, "N _"]],
    labels: Int[np.ndarray, " N"],
    test: Sequence[Float[np.ndarray, "n _"]],
    test_labels: Int[np.ndarray, " n"],
    config: ProbeConfig | None = None,
    *,
    metric: str = "acc1",
    images: Sequence[bytes] | None = None,
) -> ProbeResult:
    """Fit a linear classifier on frozen features, and classify test images with it.

    The same input and seed give the same result on the same machine.

    Args:
        train: Features of the training images by each of one or more experts.
        labels: Class index of each training image.
        test: Features of the test images by the same experts.
        test_labels: Class index of each test image.
        config: How the classifier is fitted.
        metric: The metric of ``task.METRICS`` that counts.
        images: What each training image is known by, so that its copies are held out together; None: all differ.

    Raises:
        ModeclipError: A class of the test images has no training image, there is only one class, or features are not
            finite.
    """
    config = config or ProbeConfig()
    features, of_test = combine_features(train, config.combine), combine_features(test, config.combine)
    _check(features, labels, of_test, test_labels)
    # Classes without any image, as in a subset of a larger task, would be columns that never win.
    classes, known = np.unique(labels, return_inverse=True)
    sweep, num_validation = [], 0
    if config.C is None:
        held_out = hold_out(known, config.validation_fraction, config.seed, images)
        num_validation = int(held_out.sum())
        sweep = _search(features, known, held_out, config)
        C = max(sweep, key=lambda trial: trial.merit).C
    else:
        C = config.C
    model, _, converged = _fit(features, known, C, config.max_iterations)
    coefficients, intercepts = _parameters(model, len(classes))
    logits = Similarity(
        images=[_with_ones(of_test)], texts=[np.column_stack([coefficients, intercepts])], weights=np.ones(1)
    )
    outcome = score_classes(logits, np.searchsorted(classes, test_labels), metric)
    return ProbeResult(
        outcome=replace(outcome, prediction=classes[outcome.prediction]),
        C=C,
        sweep=tuple(sweep),
        converged=converged,
        num_train=len(known),
        num_validation=num_validation,
        coefficients=coefficients,
        intercepts=intercepts,
    )


def hold_out(
    labels: Int[np.ndarray, " N"], fraction: float, seed: int, images: Sequence[bytes] | None = None
) -> np.ndarray:
    """Choose the same share of every class's images at random, and leave each class at least one.

    Args:
        labels: Class of each image.
        fraction: Share of each class's images.
        seed: Seed of the draw.
        images: What each image is known by: all copies of an image go where the first one goes.

    Returns:
        Mask of the images (N,).

    Examples:
        >>> hold_out(np.array([0, 0, 0, 0, 1]), 0.5, seed=0).sum()
        np.int64(2)
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    _, start, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    place = np.arange(len(labels)) - np.repeat(start, sizes)
    chosen = np.zeros(len(labels), bool)
    chosen[order] = place < np.repeat(np.minimum(np.round(fraction * sizes), sizes - 1), sizes)
    if images is None:
        return chosen
    units = np.unique(np.array([image.hex() for image in images]), return_inverse=True)[1]
    chosen = keep_together(chosen, units)
    for label in np.unique(labels):
        if chosen[labels == label].all():  # its images are copies of those of other classes
            chosen[units == units[np.flatnonzero(labels == label)[0]]] = False
    return chosen


def _search(features: np.ndarray, labels: np.ndarray, held_out: np.ndarray, config: ProbeConfig) -> list[ProbeTrial]:
    """Try values of C and return the trials by rising C."""
    if not held_out.any():
        raise ModeclipError(
            f"linear probe: expected several training images a class to choose C with, got {len(labels)} images of "
            f"{labels.max() + 1} classes; give C (--probe-c)"
        )
    part, known = features[~held_out], labels[~held_out]
    others, answers = features[held_out], labels[held_out]
    found: dict[float, tuple[ProbeTrial, Any]] = {}  # by log10 C

    def attempt(exponent: float) -> None:
        smaller = [old for old in found if old < exponent]
        start = found[max(smaller)][1] if smaller else None
        model, iterations, converged = _fit(part, known, 10.0**exponent, config.max_iterations, start)
        chances = _log_chances(model, others)
        found[exponent] = (
            ProbeTrial(
                C=10.0**exponent,
                accuracy=float((chances.argmax(axis=1) == answers).mean()),
                loss=float(-chances[np.arange(len(answers)), answers].mean()),
                iterations=iterations,
                converged=converged,
            ),
            model,
        )

    low, high = DECADES
    exponents: list[float] = [float(exponent) for exponent in range(low, high + 1, START_STEP)]
    step = float(START_STEP)
    num_fits = len(exponents) + 2 * round(np.log2(START_STEP * STEPS_A_DECADE))
    with progress("linear probe", num_fits, "fits") if _is_long(part, known) else _no_bar() as advance:
        while True:
            for exponent in exponents:
                attempt(exponent)
                advance(1)
            step /= 2
            if step * STEPS_A_DECADE < 1:
                break
            peak = max(found, key=lambda old: found[old][0].merit)
            exponents = [new for new in (peak - step, peak + step) if low <= new <= high]
    return [found[exponent][0] for exponent in sorted(found)]


def _fit(
    features: np.ndarray, labels: np.ndarray, C: float, max_iterations: int, start: Any = None
) -> tuple[Any, int, bool]:
    """Fit scikit-learn's classifier; return it, its steps, and whether they were enough."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=C, max_iter=max_iterations, tol=TOLERANCE, warm_start=start is not None)
    if start is not None:
        model.classes_, model.coef_, model.intercept_ = start.classes_, start.coef_.copy(), start.intercept_.copy()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(features, labels)
    stopped = any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
    return model, int(model.n_iter_[0]), not stopped


def _log_chances(model: Any, features: np.ndarray) -> Float[np.ndarray, "N L"]:
    """Return the log-probability of each class, finite also where a class is ruled out.

    scikit-learn takes the logarithm of a probability that is 0 by then.
    """
    from scipy.special import log_softmax

    scores = features.astype(np.float64) @ model.coef_.T.astype(np.float64) + model.intercept_
    if scores.shape[1] == 1:  # of two classes it keeps the difference
        scores = np.column_stack([np.zeros(len(scores)), scores])
    logs: np.ndarray = log_softmax(scores, axis=1)
    return logs


def _parameters(model: Any, num_classes: int) -> tuple[Float[np.ndarray, "L D"], Float[np.ndarray, " L"]]:
    """Return weights and a bias for each class; for two classes scikit-learn keeps only the difference."""
    coefficients, intercepts = (np.asarray(part, np.float32) for part in (model.coef_, model.intercept_))
    if num_classes == 2:
        return np.concatenate([np.zeros_like(coefficients), coefficients]), np.append(np.float32(0), intercepts)
    return coefficients, intercepts


def _with_ones(features: np.ndarray) -> np.ndarray:
    return np.column_stack([features, np.ones(len(features), np.float32)])


def _is_long(features: np.ndarray, labels: np.ndarray) -> bool:
    return bool(features.size * (labels.max() + 1) > LONG)


def _no_bar() -> AbstractContextManager[Callable[[int], None]]:
    return nullcontext(lambda _: None)


def _check(features: np.ndarray, labels: np.ndarray, of_test: np.ndarray, test_labels: np.ndarray) -> None:
    """Raise if the classifier cannot be fitted or tested."""
    for name, rows in (("training", features), ("test", of_test)):
        if len(rows) == 0:
            raise ModeclipError(f"linear probe: expected at least one {name} image, got none")
        finite = np.isfinite(rows).all(axis=1)
        if not finite.all():
            raise ModeclipError(f"linear probe: features of {name} image {finite.argmin()} are not finite")
    if features.shape[1] != of_test.shape[1]:
        raise ModeclipError(
            f"linear probe: expected test features of {features.shape[1]} numbers as in training, "
            f"got {of_test.shape[1]}"
        )
    missing = np.setdiff1d(test_labels, labels)
    if len(missing):
        shown = ", ".join(map(str, missing[:5].tolist())) + (", ..." if len(missing) > 5 else "")
        raise ModeclipError(
            f"linear probe: {len(missing)} classes of the test images have no training image: {shown}; add images or "
            "leave these classes out"
        )
    if labels.min() == labels.max():
        raise ModeclipError("linear probe: expected training images of two classes or more, got one class")
