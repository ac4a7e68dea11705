"""Metrics against hand-made matrices, scikit-learn, and bootstraps that really resample images."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
from sklearn.metrics import accuracy_score

from modeclip.errors import ModeclipError
from modeclip.evaluation.intervals import Interval, Outcome, average, bootstrap_interval, paired_interval
from modeclip.evaluation.metrics import choose_by_labels, score_classes
from modeclip.evaluation.similarity import Similarity


def random_predictions(seed, num_images=300, num_classes=12):
    """Scores that are right about half the time, classes of very different sizes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(num_classes, size=num_images) * rng.integers(2, size=num_images)
    scores = rng.normal(size=(num_images, num_classes)) + 1.5 * np.eye(num_classes)[labels]
    return scores, labels


# --- accuracies ----------------------------------------------------------------------------------


def as_similarity(scores):
    """Return similarities that are these scores."""
    identity = np.eye(scores.shape[1], dtype=np.float32)
    return Similarity(images=[scores.astype(np.float32)], texts=[identity], weights=np.ones(1))


def test_a_matrix_made_by_hand():
    scores = np.array(
        [
            [0.7, 0.2, 0.1],  # class 0, right
            [0.1, 0.2, 0.7],  # class 0, wrong
            [0.4, 0.4, 0.2],  # class 0, a tie that the lower index wins, right
            [0.4, 0.4, 0.2],  # class 1, the same tie, wrong
            [-9.0, -8.0, -99.0],  # class 1, right
        ]
    )
    found = score_classes(as_similarity(scores), np.array([0, 0, 0, 1, 1]))
    np.testing.assert_array_equal(found.hits, [1, 0, 1, 0, 1])
    np.testing.assert_array_equal(found.prediction, [0, 2, 0, 0, 1])


@pytest.mark.parametrize("seed", range(3))
def test_accuracies_equal_scikit_learns(seed):
    scores, labels = random_predictions(seed)
    found = score_classes(as_similarity(scores), labels)
    assert found.score == pytest.approx(accuracy_score(labels, scores.argmax(axis=1)))


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        (np.zeros((2, 2)), np.zeros(3, int), "labels: .* images, got 3 for 2"),
        (np.zeros((0, 2)), np.zeros(0, int), "labels: .*1 or more images, got 0 for 0"),
        (np.array([[0.0, 1.0], [math.nan, 0.0]]), np.zeros(2, int), "row 1 holds NaN; the model diverged"),
        (np.zeros((2, 3)), np.array([1, 3]), "labels: expected 0 to 2 for 3 classes, got 1 to 3"),
    ],
)
def test_what_cannot_be_scored_is_said(scores, labels, message):
    with pytest.raises(ModeclipError, match=message):
        inspect.unwrap(score_classes)(as_similarity(scores), labels)


def test_labels_choose_once_by_the_average_or_for_each_task():
    def outcome(score):
        one = np.zeros(1, int)
        return Outcome(metrics={"acc1": score}, main="acc1", hits=np.array([score]), prediction=one, rank=one)

    scores = {"expert-0": {"cats": 0.6, "dogs": 0.2}, "expert-1": {"cats": 0.5, "dogs": 0.5}}
    outcomes = {name: {task: outcome(score) for task, score in own.items()} for name, own in scores.items()}
    assert choose_by_labels(outcomes) == ("expert-1", {"cats": "expert-0", "dogs": "expert-1"})
    assert average(outcomes["expert-0"]) == pytest.approx(0.4)
    equal = {"expert-1": outcomes["expert-1"], "expert-2": outcomes["expert-1"]}
    assert choose_by_labels(equal)[0] == "expert-1", "the first of equals"


# --- intervals -----------------------------------------------------------------------------------


def make_tasks(seed):
    """Three tasks of different size; two models whose mistakes go together."""
    rng = np.random.default_rng(seed)
    model, baseline = {}, {}
    for task, num_images, model_fraction in (("a", 400, 0.7), ("b", 50, 0.4), ("c", 120, 0.9)):
        model[task] = rng.random(num_images) < model_fraction
        baseline[task] = model[task] ^ (rng.random(num_images) < 0.15)
    return model, baseline


def slow_interval(statistic, images_of_task, num_resamples=4000):
    """Resample the images of each task one by one, and take the 2.5 and 97.5 percentiles."""
    rng = np.random.default_rng(123)
    values = []
    for _ in range(num_resamples):
        drawn = {task: rng.integers(n, size=n) for task, n in images_of_task.items()}
        values.append(statistic(drawn))
    return np.percentile(values, [2.5, 97.5])


def test_interval_equals_one_by_resampling_images():
    model, _ = make_tasks(0)
    low, high = slow_interval(
        lambda drawn: np.mean([model[task][rows].mean() for task, rows in drawn.items()]),
        {task: len(is_correct) for task, is_correct in model.items()},
    )
    interval = bootstrap_interval(model)
    assert interval.mean == pytest.approx(np.mean([c.mean() for c in model.values()]))
    assert interval.low == pytest.approx(low, abs=0.004)
    assert interval.high == pytest.approx(high, abs=0.004)


def test_paired_interval_equals_one_by_resampling_pairs():
    model, baseline = make_tasks(1)
    low, high = slow_interval(
        lambda drawn: np.mean([model[task][rows].mean() - baseline[task][rows].mean() for task, rows in drawn.items()]),
        {task: len(is_correct) for task, is_correct in model.items()},
    )
    interval = paired_interval(model, baseline)
    assert interval.mean == pytest.approx(bootstrap_interval(model).mean - bootstrap_interval(baseline).mean)
    assert interval.low == pytest.approx(low, abs=0.004)
    assert interval.high == pytest.approx(high, abs=0.004)


def test_interval_of_one_task_is_the_binomials():
    is_correct = np.arange(1000) < 800
    interval = bootstrap_interval({"task": is_correct})
    half_width = 1.96 * math.sqrt(0.8 * 0.2 / 1000)
    assert interval.low == pytest.approx(0.8 - half_width, abs=0.002)
    assert interval.high == pytest.approx(0.8 + half_width, abs=0.002)


def test_pairing_narrows_the_interval():
    model, baseline = make_tasks(2)
    paired = paired_interval(model, baseline)
    alone = [bootstrap_interval(model), bootstrap_interval(baseline)]
    assert paired.high - paired.low < 0.7 * math.hypot(*(i.high - i.low for i in alone))


def test_a_model_against_itself_and_the_other_way_round():
    model, baseline = make_tasks(3)
    assert paired_interval(model, model) == Interval(mean=0.0, low=0.0, high=0.0)
    forth, back = paired_interval(model, baseline), paired_interval(baseline, model)
    assert forth.mean == pytest.approx(-back.mean)
    assert forth.low == pytest.approx(-back.high, abs=0.004)


def test_seed_decides_and_order_of_tasks_does_not():
    model, baseline = make_tasks(4)
    backwards = dict(reversed(model.items()))
    assert bootstrap_interval(model, seed=5) == bootstrap_interval(backwards, seed=5)
    assert bootstrap_interval(model, seed=5) != bootstrap_interval(model, seed=6)
    assert paired_interval(model, baseline) == paired_interval(backwards, baseline)


def test_more_confidence_is_wider():
    model, _ = make_tasks(5)
    narrow, wide = (bootstrap_interval(model, confidence=c) for c in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.mean < narrow.high < wide.high


RIGHT = np.array([True, True])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_interval({}), "interval.*at least one task.*got no tasks"),
        (
            lambda: bootstrap_interval({"pets": RIGHT, "cars": RIGHT[:0]}),
            "interval.*images.*none in 'cars'",
        ),
        (
            lambda: bootstrap_interval({"pets": RIGHT}, confidence=95.0),
            r"confidence.*between 0 and 1.*got 95\.0",
        ),
        (
            lambda: bootstrap_interval({"pets": RIGHT}, num_resamples=0),
            "num_resamples: expected at least 1, got 0",
        ),
        (
            lambda: paired_interval({"pets": RIGHT}, {"cars": RIGHT}),
            r"paired interval.*same tasks.*got \['pets'\] and \['cars'\]",
        ),
        (
            lambda: paired_interval({"pets": RIGHT}, {"pets": RIGHT[:1]}),
            "paired interval.*'pets'.*same images.*got 2 and 1",
        ),
    ],
)
def test_what_has_no_interval_is_said(call, message):
    with pytest.raises(ModeclipError, match=f"^{message}$"):
        call()
