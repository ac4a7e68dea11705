"""Outcomes of tasks: hand-made matrices, scikit-learn, slow loops, and bootstraps that really resample samples."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom
from sklearn.metrics import average_precision_score, balanced_accuracy_score, roc_auc_score, top_k_accuracy_score

from modeclip.errors import ModeclipError
from modeclip.evaluation import metrics, similarity
from modeclip.evaluation.intervals import Outcome, bootstrap_interval, paired_interval, paired_test
from modeclip.evaluation.metrics import score_classes, select_captions
from modeclip.evaluation.similarity import Similarity


def of_scores(scores: np.ndarray) -> Similarity:
    """Similarities that are these numbers: images are rows, texts the axes."""
    rows = np.ascontiguousarray(scores, dtype=np.float32)
    return Similarity(images=[rows], texts=[np.eye(scores.shape[1], dtype=np.float32)], weights=np.ones(1))


def random_task(seed: int, num_images: int = 400, num_classes: int = 9) -> tuple[np.ndarray, np.ndarray]:
    """Scores that are right about half the time, classes of very different sizes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(num_classes, size=num_images) * rng.integers(2, size=num_images)
    return rng.normal(size=(num_images, num_classes)) + 1.5 * np.eye(num_classes)[labels], labels


def random_labels(seed: int, num_images: int = 150, num_classes: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Scores and several labels an image; scores are rounded, so that many are equal; images 0 and 1 show nothing."""
    rng = np.random.default_rng(seed)
    labels = rng.random((num_images, num_classes)) < np.linspace(0.1, 0.6, num_classes)
    labels[:2] = False
    return np.round(rng.normal(size=labels.shape) + labels, 1), labels


# --- classification ------------------------------------------------------------------------------


def test_a_matrix_made_by_hand() -> None:
    scores = np.array(
        [
            [0.6, 0.1, 0.2, 0.0, 0.3, 0.4],  # class 0, first
            [0.6, 0.1, 0.2, 0.0, 0.3, 0.4],  # class 1, fifth
            [0.6, 0.1, 0.2, 0.0, 0.3, 0.4],  # class 3, last
            [0.5, 0.5, 0.5, 0.5, 0.5, 0.5],  # class 0 of six equals, first
            [0.5, 0.5, 0.5, 0.5, 0.5, 0.5],  # class 3 of six equals, fourth
        ]
    )
    found = score_classes(of_scores(scores), np.array([0, 1, 3, 0, 3]))
    assert found.rank.tolist() == [0, 4, 5, 0, 3]
    assert found.prediction.tolist() == [0, 0, 0, 0, 0]
    assert found.hits.tolist() == [1, 0, 0, 1, 0]
    assert found.metrics == pytest.approx(
        {"acc1": 2 / 5, "acc5": 4 / 5, "mean_top1_top5": 3 / 5, "mean_per_class_recall": 1 / 3}
    )
    assert found.score == 2 / 5
    assert found.weights is None


@pytest.mark.parametrize("seed", range(3))
def test_metrics_equal_scikit_learns(seed: int) -> None:
    scores, labels = random_task(seed)
    classes = np.arange(scores.shape[1])
    found = score_classes(of_scores(scores), labels).metrics
    assert found["acc1"] == pytest.approx(top_k_accuracy_score(labels, scores, k=1, labels=classes))
    assert found["acc5"] == pytest.approx(top_k_accuracy_score(labels, scores, k=5, labels=classes))
    assert found["mean_per_class_recall"] == pytest.approx(balanced_accuracy_score(labels, scores.argmax(axis=1)))
    assert found["mean_top1_top5"] == pytest.approx((found["acc1"] + found["acc5"]) / 2)


@pytest.mark.parametrize("seed", range(3))
def test_area_equals_scikit_learns_with_equal_margins(seed: int) -> None:
    scores, labels = random_task(seed, num_images=200, num_classes=2)
    scores = np.round(4 * scores) / 4  # quarters: exact in float32, and many equal margins
    found = score_classes(of_scores(scores), labels, "roc_auc")
    assert found.score == pytest.approx(roc_auc_score(labels, scores[:, 1] - scores[:, 0]))
    assert np.average(found.hits, weights=found.weights) == pytest.approx(found.score)


@pytest.mark.parametrize("seed", range(3))
def test_mean_average_precision_equals_scikit_learns(seed: int) -> None:
    scores, labels = random_labels(seed)
    found = score_classes(of_scores(scores), labels, "mean_average_precision")
    assert found.score == pytest.approx(average_precision_score(labels, scores.astype(np.float32)))
    assert found.hits.mean() == pytest.approx(found.score)
    assert found.rank[:2].tolist() == [6, 6]
    best = [min(np.flatnonzero(np.argsort(-row, kind="stable") == c)[0] for c in np.flatnonzero(shown))
            for row, shown in zip(scores[2:], labels[2:], strict=True) if shown.any()]  # fmt: skip
    assert found.rank[2:][labels[2:].any(axis=1)].tolist() == best


def test_a_class_that_no_image_shows_does_not_count() -> None:
    scores, labels = random_labels(3)
    labels[:, 2] = False
    found = score_classes(of_scores(scores), labels, "mean_average_precision")
    kept = [0, 1, 3, 4, 5]
    expected = average_precision_score(labels[:, kept], scores[:, kept].astype(np.float32))
    assert found.score == pytest.approx(expected)


@pytest.mark.parametrize("metric", ["acc1", "mean_per_class_recall", "mean_average_precision"])
def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch, metric: str) -> None:
    scores, labels = random_labels(4) if metric == "mean_average_precision" else random_task(4)
    whole = score_classes(of_scores(scores), labels, metric)
    monkeypatch.setattr(similarity, "BLOCK_NUMBERS", 100)
    monkeypatch.setattr(metrics, "BLOCK_NUMBERS", 2 * len(scores))
    parts = score_classes(of_scores(scores), labels, metric)
    assert parts.metrics == whole.metrics
    np.testing.assert_array_equal(parts.rank, whole.rank)
    np.testing.assert_array_equal(parts.hits, whole.hits)


@pytest.mark.parametrize(
    ("scores", "labels", "metric", "message"),
    [
        (np.eye(3), np.array([0, 1, 2]), "f1", "unknown metric 'f1'; known: acc1, acc5, "),
        (np.eye(3), np.array([0, 1, 3]), "acc1", "labels: expected 0 to 2 for 3 classes, got 0 to 3"),
        (np.eye(3), np.array([0, 1]), "acc1", "labels: .*1 or more images, got 2 for 3"),
        (np.eye(3), np.array([0, 1, 2]), "acc5", "acc5.*needs 5 classes, got 3 .*choose acc1"),
        (np.eye(2), np.array([0, 0]), "roc_auc", "roc_auc.*two classes.*got 2 .*1 of them.*choose acc1"),
        (np.eye(3), np.array([0, 1, 2]), "mean_average_precision", "got one label an image"),
        (np.eye(3), np.eye(3, dtype=bool), "acc1", "got several labels an image"),
        (np.eye(3), np.eye(3, 2, dtype=bool), "mean_average_precision", "column for each of 3 classes.*got 2"),
        (np.eye(3), np.zeros((3, 3), bool), "mean_average_precision", "at least one image.*without any"),
        (np.diag([1, np.nan, 1]), np.array([0, 1, 2]), "acc1", "predictions: row "),
    ],
)
def test_what_cannot_be_scored_is_said(scores: np.ndarray, labels: np.ndarray, metric: str, message: str) -> None:
    with pytest.raises(ModeclipError, match=message):
        score_classes(of_scores(scores), labels, metric)


# --- selection -----------------------------------------------------------------------------------


def test_winoground_made_by_hand() -> None:
    scores = np.full((6, 6), 9.0)  # between instances: must not be read
    scores[:2, :2] = [[0.9, 0.1], [0.2, 0.8]]  # all right
    scores[2:4, 2:4] = [[0.9, 0.5], [0.8, 0.6]]  # texts find their images, the second image not its text
    scores[4:, 4:] = [[0.5, 0.5], [0.5, 0.5]]  # equal: nothing is told apart
    instances = np.array([7, 7, 3, 3, 5, 5])
    shuffled = np.array([2, 0, 4, 3, 5, 1])  # an instance keeps the order of its images
    found = select_captions(of_scores(scores[shuffled]), instances[shuffled], instances)
    assert found.metrics == pytest.approx({"image_acc": 2 / 3, "text_acc": 1 / 3, "acc": 1 / 3})
    assert found.extra["instance"].tolist() == [3, 5, 7]
    assert found.hits.tolist() == [0, 0, 1]
    assert found.rank.tolist() == [0, 1, 0]
    assert found.prediction.tolist() == [0, 0, 0]


def test_sugar_crepe_made_by_hand() -> None:
    scores = np.array([[0.9, 0.1, 0, 0], [0, 0, 0.3, 0.4]])
    found = select_captions(of_scores(scores), np.array([0, 1]), np.array([0, 0, 1, 1]))
    assert found.metrics == {"image_acc": 1.0, "text_acc": 0.5, "acc": 0.5}
    assert found.prediction.tolist() == [0, 1]


@pytest.mark.parametrize("seed", range(2))
def test_selection_equals_a_slow_loop_over_instances(seed: int) -> None:
    rng = np.random.default_rng(seed)
    of_image, of_text = rng.permutation(np.arange(60) % 20), rng.permutation(np.arange(80) % 20)  # 3 images, 4 texts
    weights = rng.random((80, 2)) if seed else rng.random((60, 2))
    images, texts = ([rng.normal(size=(n, 8)).astype(np.float32) for _ in range(2)] for n in (60, 80))
    made = Similarity(images=images, texts=texts, weights=weights, per_image=not seed)
    scores = made.block(slice(None))
    found = select_captions(made, of_image, of_text)
    for place in range(20):
        part = scores[np.ix_(of_image == place, of_text == place)]
        assert found.extra["text_hit"][place] == (part.argmax(axis=1) == np.arange(3)).all()
        assert found.extra["image_hit"][place] == (part.argmax(axis=0)[:3] == np.arange(3)).all()


def test_an_instance_without_text_is_said() -> None:
    with pytest.raises(ModeclipError, match=r"selection.*texts in every instance.*none in \[1\]"):
        select_captions(of_scores(np.eye(2)), np.array([0, 1]), np.array([0, 0]))


# --- intervals and tests -------------------------------------------------------------------------


def slow_interval(score_of_rows, strata: np.ndarray, num_resamples: int) -> np.ndarray:
    """Draw the images of each stratum again, compute the metric anew each time, take the 2.5 and 97.5 percentiles."""
    rng = np.random.default_rng(5)
    members = [np.flatnonzero(strata == s) for s in np.unique(strata)]
    scores = [score_of_rows(np.concatenate([rng.choice(m, len(m)) for m in members])) for _ in range(num_resamples)]
    return np.percentile(scores, [2.5, 97.5])


def test_interval_of_a_mean_per_class_resamples_each_class() -> None:
    scores, labels = random_task(6, num_images=300)
    found = score_classes(of_scores(scores), labels, "mean_per_class_recall")
    expected = slow_interval(
        lambda rows: balanced_accuracy_score(labels[rows], scores[rows].argmax(axis=1)), labels, num_resamples=600
    )
    interval = bootstrap_interval([found])
    assert interval.mean == pytest.approx(found.score)
    np.testing.assert_allclose([interval.low, interval.high], expected, atol=0.015)


def test_interval_of_an_area_is_the_one_of_areas_computed_anew() -> None:
    scores, labels = random_task(7, num_images=250, num_classes=2)
    found = score_classes(of_scores(scores), labels, "roc_auc")
    margin = scores[:, 1] - scores[:, 0]
    expected = slow_interval(lambda rows: roc_auc_score(labels[rows], margin[rows]), labels, num_resamples=600)
    interval = bootstrap_interval([found])
    np.testing.assert_allclose([interval.low, interval.high], expected, atol=0.015)


def test_interval_of_average_precisions_is_as_wide_as_those_computed_anew() -> None:
    scores, labels = random_labels(8, num_images=400, num_classes=4)
    found = score_classes(of_scores(scores), labels, "mean_average_precision")
    low, high = slow_interval(
        lambda rows: average_precision_score(labels[rows], scores[rows]), np.zeros(400), num_resamples=400
    )
    interval = bootstrap_interval([found])
    assert interval.high - interval.low == pytest.approx(high - low, rel=0.15)
    assert interval.low == pytest.approx(low, abs=0.02)


def test_interval_over_tasks_of_several_metrics_is_of_their_plain_mean() -> None:
    parts = [
        score_classes(of_scores(random_task(9)[0]), random_task(9)[1], "mean_top1_top5"),
        score_classes(of_scores(random_labels(9)[0]), random_labels(9)[1], "mean_average_precision"),
        score_classes(of_scores(random_task(9, 60, 2)[0]), random_task(9, 60, 2)[1], "roc_auc"),
    ]
    interval = bootstrap_interval(parts)
    assert interval.mean == pytest.approx(np.mean([part.score for part in parts]))
    assert interval.low < interval.mean < interval.high
    widths = [bootstrap_interval([part]).high - bootstrap_interval([part]).low for part in parts]
    assert interval.high - interval.low == pytest.approx(np.hypot.reduce(widths) / 3, rel=0.05)


def outcome(hits: np.ndarray, weights: np.ndarray | None = None, main: str = "acc1") -> Outcome:
    places = np.zeros(len(hits), np.int64)
    score = float(np.average(hits, weights=weights))
    return Outcome(metrics={main: score}, main=main, hits=hits, prediction=places, rank=places, weights=weights)


def test_outcomes_and_right_or_wrong_give_the_same_intervals() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.random(200) < 0.6, rng.random(200) < 0.5
    one_outcome, other_outcome = outcome(one.astype(float)), outcome(other.astype(float))
    assert bootstrap_interval({"a": one}) == bootstrap_interval([one_outcome])
    assert paired_interval({"a": one}, {"a": other}) == paired_interval([one_outcome], [other_outcome])
    assert paired_test({"a": one}, {"a": other}) == paired_test({"a": one_outcome}, {"a": other_outcome})


def test_many_levels_and_few_give_the_same_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    from modeclip.evaluation import intervals

    hits = (np.random.default_rng(1).random(307) < 0.7).astype(float)
    counted = bootstrap_interval([outcome(hits)])
    monkeypatch.setattr(intervals, "MAX_LEVELS", 1)
    monkeypatch.setattr(intervals, "DRAWN_NUMBERS", 70_000)
    drawn = bootstrap_interval([outcome(hits)])
    np.testing.assert_allclose([drawn.low, drawn.high], [counted.low, counted.high], atol=0.004)


def test_paired_interval_of_areas_sees_that_two_models_err_alike() -> None:
    scores, labels = random_task(10, num_images=300, num_classes=2)
    rng = np.random.default_rng(3)
    one = score_classes(of_scores(scores), labels, "roc_auc")
    other = score_classes(of_scores(scores + 0.3 * rng.normal(size=scores.shape)), labels, "roc_auc")
    paired = paired_interval([one], [other])
    alone = bootstrap_interval([one])
    assert paired.mean == pytest.approx(one.score - other.score)
    assert paired.high - paired.low < 0.6 * (alone.high - alone.low)


@pytest.mark.parametrize(("only_first", "only_second"), [(8, 1), (5, 5), (0, 3), (0, 0), (30, 12)])
def test_mcnemar_is_exact(only_first: int, only_second: int) -> None:
    kinds = np.repeat([0, 1, 2, 3], [only_first, only_second, 7, 4])
    first, second = np.isin(kinds, (0, 2)), np.isin(kinds, (1, 2))
    found = paired_test({"a": first[::2], "b": first[1::2]}, {"a": second[::2], "b": second[1::2]})
    assert (found.only_first, found.only_second) == (only_first, only_second)
    number = only_first + only_second
    both_tails = 2 * binom.cdf(min(only_first, only_second), number, 0.5) if number else 1.0
    assert found.p_value == pytest.approx(min(1.0, both_tails))
    back = paired_test({"a": second}, {"a": first})
    assert back.p_value == pytest.approx(found.p_value)


HALF = np.array([1.0, 0.5, 0.0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: paired_test([outcome(HALF)], [outcome(HALF)]), "paired test.*right and wrong.*use acc1"),
        (
            lambda: paired_interval([outcome(HALF)], [outcome(HALF, main="roc_auc")]),
            "same metric.*got acc1 and roc_auc",
        ),
        (
            lambda: paired_interval([outcome(HALF, HALF + 1)], [outcome(HALF)]),
            "paired interval.*same labels",
        ),
        (lambda: paired_interval([outcome(HALF)], []), r"paired interval.*same tasks.*and \[\]"),
        (lambda: bootstrap_interval([]), "interval.*at least one task.*got no tasks"),
    ],
)
def test_what_cannot_be_compared_is_said(call, message: str) -> None:
    with pytest.raises(ModeclipError, match=message):
        call()
