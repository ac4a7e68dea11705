"""How sure the test images make us of a score: bootstrap intervals of the mean over tasks, and paired tests.

The score of a model is the plain mean over its tasks (`average`). Its interval is a percentile bootstrap: the tasks
stay, and the samples of each are drawn again with replacement among those of equal weight. The interval says how sure
the test images make us; it says nothing about another training seed or about other tasks. Samples of one image (the
texts that ask for it, and the image that asks for a text) are hard or easy together, so there images are drawn, each
with all of its samples.

Where the samples' contributions have few values (right or wrong, the difference of two models), one multinomial draw of
their counts IS one resample. Areas and average precisions are not means over samples. There a contribution is the
metric plus the sample's influence on it (infinitesimal jackknife); the mean of these is the metric, their spread is
DeLong's.

Source: MoDE (arXiv 2404.16030), Sec. 4.3, for the plain mean; Efron and Tibshirani, An Introduction to the Bootstrap
(1993), chapters 13 and 22; DeLong et al. (1988) for areas; McNemar (1947) for the paired test.
Price: an interval of accuracies costs a few counts a task and resample, whatever the number of images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float, Int

from modeclip.errors import ModeclipError

NUM_RESAMPLES, CONFIDENCE = 10_000, 0.95
"""What an interval is made with unless the caller says otherwise."""

MAX_LEVELS = 16
"""With at most so many distinct contributions, a resample is drawn as their counts."""

DRAWN_NUMBERS = 1 << 24
"""With more of them, so many contributions are drawn at a time."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """What one model did on one task."""

    metrics: Mapping[str, float]
    """Value of each metric, as a fraction, under CLIP_benchmark's names."""
    main: str
    """Name of the metric that counts in averages."""
    hits: Float[np.ndarray, " n"]
    """Contribution of each sample; their mean, weighted by ``weights``, is the main metric. 0 or 1 for accuracies."""
    prediction: Int[np.ndarray, " n"]
    """Best class, text or image of each sample; -1 where it has none."""
    rank: Int[np.ndarray, " n"]
    """Place of the right answer among all answers, 0 for the first; of several right ones the best place counts. Where
    no answer is right, the number of all answers."""
    weights: Float[np.ndarray, " n"] | None = None
    """Weight of each sample; None: all alike."""
    image: Int[np.ndarray, " n"] | None = None
    """Number of the image that each sample is of, where an image has several samples; None: each has one."""
    extra: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Further values of each sample, by name."""

    @property
    def score(self) -> float:
        """The main metric."""
        return self.metrics[self.main]


Scored = Outcome | Bool[np.ndarray, " _"]
"""What a model did on a task, or only whether each sample is right."""

ScoredTasks = Mapping[str, Outcome] | Mapping[str, Bool[np.ndarray, " _"]] | Sequence[Outcome]
"""What a model did on several tasks, by name or in a fixed order."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A statistic with its bootstrap interval; fractions in [0, 1], or [-1, 1] if a difference."""

    mean: float
    """The statistic on the images as they are."""

    low: float
    """Lower end of the interval."""

    high: float
    """Upper end of the interval."""


@dataclass(frozen=True, kw_only=True)
class PairedTest:
    """Exact McNemar test of two models on the same samples."""

    only_first: int
    """Samples that only the first gets right; where images have several, images of which it gets more right."""
    only_second: int
    """The same of the second."""
    p_value: float
    """Probability of a split at least as uneven if either were as likely, two-sided."""


def average(outcomes: ScoredTasks) -> float:
    """Return the plain mean over tasks of their main metrics.

    Examples:
        >>> average({"pets": np.array([True, False]), "cars": np.array([True])})
        0.75
    """
    scored = _by_task(outcomes).values()
    return float(np.mean([one.score if isinstance(one, Outcome) else one.mean() for one in scored]))


def bootstrap_interval(
    outcomes: ScoredTasks, *, num_resamples: int = NUM_RESAMPLES, confidence: float = CONFIDENCE, seed: int = 0
) -> Interval:
    """Return the plain mean over tasks of their main metrics, with an interval from resampling each task's samples.

    A model that is right (or wrong) on every image has an interval of width 0, because these images hold no sign of
    what it fails at.

    Args:
        outcomes: What the model did on each task. The order of named tasks has no influence.
        num_resamples: The default leaves about 1 % of the interval's width to chance.
        confidence: Share of the resamples between the two ends, in (0, 1).
        seed: Seed of the resamples.

    Raises:
        ModeclipError: There is no task, a task has no image, or a number is out of its range.

    Examples:
        >>> is_correct = np.array([True] * 80 + [False] * 20)
        >>> bootstrap_interval({"pets": is_correct})
        Interval(mean=0.8, low=0.72, high=0.88)
    """
    gains = {task: (*_contributions(scored), _images(scored)) for task, scored in _by_task(outcomes).items()}
    return _interval_of_mean(gains, num_resamples, confidence, seed)


def paired_interval(
    outcomes: ScoredTasks,
    baseline: ScoredTasks,
    *,
    num_resamples: int = NUM_RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Interval:
    """Return the difference of two models' means on the same samples, with an interval.

    Both models are resampled together, so what makes an image hard for both cancels out: the interval is narrower than
    two separate ones suggest. It excludes 0 when the better model is better whatever images are drawn.

    Args:
        outcomes: What the first model did on each task.
        baseline: The same for the second model: the same tasks, and their samples in the same order. A positive
            difference means that the first model is better.
        num_resamples: As in `bootstrap_interval`.
        confidence: As in `bootstrap_interval`.
        seed: Seed of the resamples.

    Raises:
        ModeclipError: As `bootstrap_interval`, or the tasks, their samples or their metrics differ.

    Examples:
        >>> baseline = np.array([True] * 70 + [False] * 30)
        >>> better = np.array([True] * 80 + [False] * 20)
        >>> paired_interval({"pets": better}, {"pets": baseline})
        Interval(mean=0.1, low=0.05, high=0.16)
    """
    gains = {}
    for task, (first, second) in _pairs(outcomes, baseline).items():
        (hits, weights), (others, _) = _contributions(first), _contributions(second)
        gains[task] = hits - others, weights, _images(first, second)
    return _interval_of_mean(gains, num_resamples, confidence, seed)


def paired_test(outcomes: ScoredTasks, baseline: ScoredTasks) -> PairedTest:
    """Test whether two models get the same number of samples right: McNemar's test, exact, samples of all tasks pooled.

    Only samples that exactly one of them gets right count; if the models were equally good, either would be as likely
    to get such a sample right. Unlike the interval, the test counts a sample of a small task as much as one of a large
    task. Where images have
    several samples, an image counts for the model that gets more of them right: a sign test over the images.

    Args:
        outcomes: What the first model did on each task.
        baseline: The same for the second model: the same tasks, and their samples in the same order.

    Raises:
        ModeclipError: The tasks, their samples or metrics differ, or a metric does not count right and wrong samples.

    Examples:
        >>> first, second = np.array([True] * 9 + [False] * 11), np.array([True] + [False] * 18 + [True])
        >>> paired_test({"pets": first}, {"pets": second})
        PairedTest(only_first=8, only_second=1, p_value=0.0390625)
    """
    from scipy.stats import binomtest

    only_first = only_second = 0
    for task, (first, second) in _pairs(outcomes, baseline).items():
        hits, others = _contributions(first)[0], _contributions(second)[0]
        if not np.isin([*hits, *others], (0, 1)).all():
            raise ModeclipError(
                f"paired test, task {task!r}: its metric does not count right and wrong samples; use acc1"
            )
        image = _images(first, second)
        more = hits - others if image is None else np.bincount(image, hits) - np.bincount(image, others)
        only_first += int((more > 0).sum())
        only_second += int((more < 0).sum())
    differing = only_first + only_second
    p_value = float(binomtest(only_first, differing).pvalue) if differing else 1.0
    return PairedTest(only_first=only_first, only_second=only_second, p_value=p_value)


def _by_task(outcomes: ScoredTasks) -> dict[str, Scored]:
    """Name tasks that have no names by their places."""
    if isinstance(outcomes, Mapping):
        return dict(outcomes)
    return {f"{place:09}": outcome for place, outcome in enumerate(outcomes)}


def _contributions(scored: Scored) -> tuple[np.ndarray, np.ndarray | None]:
    """Return contributions and weights."""
    return (scored.hits, scored.weights) if isinstance(scored, Outcome) else (scored.astype(np.float64), None)


def _images(*scored: Scored) -> np.ndarray | None:
    """Return the image of each sample, as far as one of the outcomes of the same samples knows it."""
    known = (each.image for each in scored if isinstance(each, Outcome))
    return next((image for image in known if image is not None), None)


def _pairs(outcomes: ScoredTasks, baseline: ScoredTasks) -> dict[str, tuple[Scored, Scored]]:
    """Return what two models did on each task; raise if that cannot be compared sample by sample."""
    first, second = _by_task(outcomes), _by_task(baseline)
    if first.keys() != second.keys():
        raise ModeclipError(
            f"paired interval: expected the same tasks for both models, got {sorted(first)} and {sorted(second)}"
        )
    for task in first:
        one, other = first[task], second[task]
        metrics = [scored.main if isinstance(scored, Outcome) else "acc1" for scored in (one, other)]
        (hits, weights), (others, other_weights) = _contributions(one), _contributions(other)
        if len(hits) != len(others):
            raise ModeclipError(
                f"paired interval, task {task!r}: expected the same images for both models, "
                f"got {len(hits)} and {len(others)}"
            )
        if metrics[0] != metrics[1]:
            raise ModeclipError(
                f"paired interval, task {task!r}: expected the same metric for both models, got {metrics[0]} and "
                f"{metrics[1]}"
            )
        if not np.allclose(1.0 if weights is None else weights, 1.0 if other_weights is None else other_weights):
            raise ModeclipError(f"paired interval, task {task!r}: expected the same labels for both models, got others")
    return {task: (first[task], second[task]) for task in first}


def _interval_of_mean(
    gains_of_task: Mapping[str, tuple[np.ndarray, np.ndarray | None, np.ndarray | None]],
    num_resamples: int,
    confidence: float,
    seed: int,
) -> Interval:
    """Bootstrap the plain mean over tasks of the weighted mean over samples of what they contribute."""
    if not 0 < confidence < 1:
        raise ModeclipError(f"confidence: expected a number between 0 and 1, got {confidence}")
    if num_resamples < 1:
        raise ModeclipError(f"num_resamples: expected at least 1, got {num_resamples}")
    if not gains_of_task:
        raise ModeclipError("interval: expected at least one task with images, got no tasks")
    for task, (gains, *_) in gains_of_task.items():
        if len(gains) == 0:
            raise ModeclipError(f"interval: expected tasks with images, got none in {task!r}")

    generator = np.random.default_rng(seed)
    means, resampled_means = [], np.zeros(num_resamples)
    for task in sorted(gains_of_task):
        gains, weights, image = gains_of_task[task]
        weights = np.ones(len(gains)) if weights is None else weights
        if image is not None:
            resampled_means += _resampled_images(gains, weights, image, num_resamples, generator)
        for weight in np.unique(weights[weights > 0]) if image is None else ():
            alike = gains[weights == weight]
            share = 1.0 if len(alike) == len(gains) else weight * len(alike) / weights.sum()
            resampled_means += share * _resampled(alike, num_resamples, generator)
        means.append(np.average(gains, weights=weights))
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled_means / len(means), [tail, 1 - tail])
    return Interval(mean=float(np.mean(means)), low=float(low), high=float(high))


def _resampled(gains: np.ndarray, num_resamples: int, generator: np.random.Generator) -> np.ndarray:
    """Return means over samples that are drawn with replacement."""
    levels, level_of_gain = np.unique(np.concatenate([[-1.0, 0.0, 1.0], gains]), return_inverse=True)
    count = len(gains)
    if len(levels) <= MAX_LEVELS:
        shares = np.bincount(level_of_gain[3:], minlength=len(levels)) / count
        means: np.ndarray = generator.multinomial(count, shares, size=num_resamples) @ levels / count
        return means
    step = max(1, DRAWN_NUMBERS // count)
    sizes = [min(step, num_resamples - start) for start in range(0, num_resamples, step)]
    return np.concatenate([gains[generator.integers(count, size=(size, count))].mean(axis=1) for size in sizes])


def _resampled_images(
    gains: np.ndarray, weights: np.ndarray, image: np.ndarray, num_resamples: int, generator: np.random.Generator
) -> np.ndarray:
    """Return weighted means over the samples of images that are drawn with replacement.

    Images whose samples contribute the same are of one kind, and a resample is drawn as the kinds' counts.
    Samples of equal weight are one side (the texts, the images), whose mean is a ratio of two sums over the images, and
    which keeps its share of the whole.
    """
    used = weights > 0
    gains, weights = gains[used], weights[used]
    _, place = np.unique(image[used], return_inverse=True)
    count = int(place.max()) + 1
    sums, shares = [], []
    for weight in np.unique(weights):
        side = weights == weight
        sums += [np.bincount(place[side], gains[side], count), np.bincount(place[side], minlength=count)]
        shares.append(weight * side.sum() / weights.sum())
    of_image = np.column_stack(sums).astype(np.float64)
    kind = np.zeros(count, np.int64)
    for column in of_image.T:
        levels, level = np.unique(column, return_inverse=True)
        _, kind = np.unique(kind * len(levels) + level, return_inverse=True)
    _, first, sizes = np.unique(kind, return_index=True, return_counts=True)
    step = max(1, DRAWN_NUMBERS // len(first))
    steps = [min(step, num_resamples - start) for start in range(0, num_resamples, step)]
    shares_of_kind, of_kind = sizes / count, of_image[first]
    drawn = np.concatenate([generator.multinomial(count, shares_of_kind, size=size) @ of_kind for size in steps])
    means: np.ndarray = (drawn[:, ::2] / np.maximum(drawn[:, 1::2], 1)) @ shares
    return means
