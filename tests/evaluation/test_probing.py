from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression

import modeclip.evaluation.probing as probing
from modeclip.errors import ModeclipError
from modeclip.evaluation.probing import ProbeConfig, hold_out, linear_probe


def make(seed: int, count: int, classes: int = 4, dimension: int = 6, spread: float = 0.8) -> tuple[np.ndarray, ...]:
    """Return unit vectors around class means, and their classes."""
    means = np.random.default_rng(100).normal(size=(classes, dimension))
    draw = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    rows = (means[labels] + spread * draw.normal(size=(count, dimension))).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True), labels


def softmax_loss(parameters: np.ndarray, rows: np.ndarray, labels: np.ndarray, classes: int, C: float) -> float:
    """The objective in its plainest form, in float64: C times the summed cross-entropy and half the squared weights."""
    weights = parameters.reshape(classes, -1)
    logits = rows @ weights[:, :-1].T + weights[:, -1]
    logits -= logits.max(1, keepdims=True)
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(rows)), labels]
    return float(C * losses.sum() + 0.5 * np.square(weights[:, :-1]).sum())


@pytest.mark.parametrize("C", [0.1, 10.0])
def test_fits_the_regression_that_it_says(C: float) -> None:
    rows, labels = make(0, 120)
    probe = linear_probe([rows], labels, [rows], labels, ProbeConfig(C=C))
    slow = minimize(
        softmax_loss, np.zeros(4 * 7), (rows.astype(float), labels, 4, C), method="L-BFGS-B", options={"maxfun": 10**6}
    )
    ours = softmax_loss(np.column_stack([probe.coefficients, probe.intercepts]).ravel(), rows, labels, 4, C)
    assert ours == pytest.approx(slow.fun, rel=1e-4)
    np.testing.assert_allclose(probe.coefficients, slow.x.reshape(4, 7)[:, :-1], atol=0.02)
    assert probe.sweep == ()
    assert probe.converged


@pytest.mark.parametrize("classes", [2, 5])
def test_answers_as_scikit_learn_does_at_the_same_c(classes: int) -> None:
    (rows, labels), (test, answers) = make(1, 200, classes), make(2, 300, classes)
    probe = linear_probe([rows], labels, [test], answers, ProbeConfig(C=3.0))
    theirs = LogisticRegression(C=3.0, max_iter=1000).fit(rows.astype(np.float64), labels)
    assert (probe.outcome.prediction == theirs.predict(test)).mean() > 0.995
    assert probe.outcome.metrics["acc1"] == pytest.approx(theirs.score(test, answers), abs=0.005)
    logits = test @ probe.coefficients.T + probe.intercepts
    np.testing.assert_array_equal(logits.argmax(1), probe.outcome.prediction)
    chances = np.exp(logits - np.log(np.exp(logits).sum(1, keepdims=True)))
    np.testing.assert_allclose(chances, theirs.predict_proba(test), atol=0.01)


def test_chosen_is_the_best_on_held_out_images_and_the_fit_uses_all() -> None:
    (rows, labels), (test, answers) = make(3, 400, spread=1.5), make(4, 400)
    probe = linear_probe([rows], labels, [test], answers)
    values = [trial.C for trial in probe.sweep]
    assert values == sorted(values)
    assert (values[0], values[-1]) == (1e-6, 1e6)
    best = [trial for trial in probe.sweep if trial.accuracy == max(trial.accuracy for trial in probe.sweep)]
    assert probe.C == min(best, key=lambda trial: trial.loss).C
    neighbours = [C for C in values if 0.7 * probe.C < C < 1.4 * probe.C]
    assert len(neighbours) == 3  # an eighth of a decade on either side was looked at
    assert (probe.num_train, probe.num_validation) == (400, 80)
    refitted = linear_probe([rows], labels, [test], answers, ProbeConfig(C=probe.C))
    np.testing.assert_array_equal(refitted.coefficients, probe.coefficients)


def test_the_accuracy_of_a_trial_is_that_of_the_same_fit_from_scratch() -> None:
    rows, labels = make(5, 300, spread=1.5)
    probe = linear_probe([rows], labels, [rows], labels, ProbeConfig(seed=7))
    held_out = hold_out(labels, 0.2, 7)
    for trial in probe.sweep[2:-3]:  # at a huge C a fit ends long before its optimum
        theirs = LogisticRegression(C=trial.C, max_iter=1000, tol=1e-5).fit(rows[~held_out], labels[~held_out])
        assert trial.accuracy == pytest.approx(theirs.score(rows[held_out], labels[held_out]), abs=0.02)
        chances = theirs.predict_proba(rows[held_out])[np.arange(held_out.sum()), labels[held_out]]
        assert trial.loss == pytest.approx(-np.log(chances).mean(), abs=0.01)


def test_same_seed_same_bits_other_seed_other_split() -> None:
    rows, labels = make(6, 200, spread=1.2)
    one, same, other = (
        linear_probe([rows], labels, [rows], labels, ProbeConfig(seed=seed)) for seed in (0, 0, 1)
    )  # fmt: skip
    assert one.sweep == same.sweep != other.sweep
    np.testing.assert_array_equal(one.coefficients, same.coefficients)


def test_features_of_experts_stand_behind_one_another_or_are_added() -> None:
    (rows, labels), (others, _) = make(7, 80), make(8, 80)
    config = ProbeConfig(C=1.0)
    both = linear_probe([rows, others], labels, [rows, others], labels, config)
    joined = np.concatenate([rows, others], axis=1)
    np.testing.assert_array_equal(
        both.coefficients, linear_probe([joined], labels, [joined], labels, config).coefficients
    )
    added = linear_probe([rows, others], labels, [rows, others], labels, ProbeConfig(C=1.0, combine="sum"))
    total = rows + others
    np.testing.assert_array_equal(
        added.coefficients, linear_probe([total], labels, [total], labels, config).coefficients
    )


def test_classes_keep_their_numbers_where_some_have_no_images() -> None:
    rows, labels = make(9, 90, classes=3)
    shifted = np.array([2, 5, 9])[labels]
    probe = linear_probe([rows], shifted, [rows], shifted, ProbeConfig(C=10.0))
    assert set(probe.outcome.prediction.tolist()) == {2, 5, 9}
    assert probe.outcome.metrics["acc1"] == (probe.outcome.prediction == shifted).mean()


def test_holding_out_takes_the_same_share_of_each_class_and_leaves_one() -> None:
    labels = np.repeat([0, 1, 2], [100, 5, 1])
    held_out = hold_out(labels, 0.2, seed=0)
    assert [int(held_out[labels == label].sum()) for label in range(3)] == [20, 1, 0]
    assert hold_out(np.zeros(4, int), 0.99, seed=0).sum() == 3


def test_a_fit_that_is_cut_short_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "DECADES", (-2, 2))
    rows, labels = make(10, 100)
    probe = linear_probe([rows], labels, [rows], labels, ProbeConfig(max_iterations=1))
    assert not probe.converged
    assert not any(trial.converged for trial in probe.sweep if trial.C > 1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"labels": np.arange(12) % 3}, "1 classes .*no training image: 3.*add images"),
        ({"labels": np.zeros(12, int), "answers": np.zeros(12, int)}, "two classes or more, got one class"),
        ({"rows": np.ones((0, 6), np.float32), "labels": np.zeros(0, int)}, "at least one training image, got none"),
        ({"test": np.ones((12, 5), np.float32)}, "test features of 6 .*got 5"),
        ({"rows": np.full((12, 6), np.nan, np.float32)}, "features of training image 0 are not finite"),
        ({"labels": np.arange(12), "answers": np.arange(12)}, "got 12 images of 12 classes; give C"),
    ],
)
def test_what_cannot_be_fitted_is_one_line(damage: dict[str, np.ndarray], message: str) -> None:
    rows, labels = make(11, 12)
    given = {"rows": rows, "labels": labels, "test": rows, "answers": labels} | damage
    with pytest.raises(ModeclipError, match=message):
        linear_probe([given["rows"]], given["labels"], [given["test"]], given["answers"])


def test_features_of_other_sizes_are_not_added() -> None:
    (rows, labels), (others, _) = make(12, 12), make(13, 12, dimension=5)
    with pytest.raises(ModeclipError, match=r"one size.*got \[6, 5\].*concatenate"):
        linear_probe([rows, others], labels, [rows, others], labels, ProbeConfig(combine="sum"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"C": -1.0}, "C: expected a finite number above 0, got -1.0"),
        ({"validation_fraction": 1.0}, "validation_fraction: expected a share"),
        ({"max_iterations": 0}, "max_iterations: expected 1 or more"),
    ],
)
def test_settings_are_checked(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ModeclipError, match=message):
        ProbeConfig(**fields)


def test_copies_of_an_image_are_held_out_together_and_no_class_is_left_without() -> None:
    labels = np.repeat(np.arange(6), 20)
    draw = np.random.default_rng(5)
    images = [bytes([number]) for number in draw.integers(0, 60, len(labels))]
    images[100:] = [images[0]] * 20  # a class whose images are all copies of one that another class has too
    for seed in range(20):
        chosen = hold_out(labels, 0.3, seed, images)
        held, kept = (
            {image for image, is_held in zip(images, side, strict=True) if is_held} for side in (chosen, ~chosen)
        )
        assert not held & kept
        assert set(labels[~chosen]) == set(range(6))
        assert 0.1 < chosen.mean() < 0.5
    apart = [bytes([number]) for number in range(len(labels))]
    np.testing.assert_array_equal(hold_out(labels, 0.3, 1, apart), hold_out(labels, 0.3, 1))


def test_a_class_that_is_ruled_out_has_a_finite_loss() -> None:
    """Separable classes and the largest C: scores differ by more than exp can show."""
    rows = np.repeat(np.eye(2, dtype=np.float32), 10, axis=0)
    labels = np.repeat([0, 1], 10)
    labels[[4, 14]] = 1, 0  # held-out images of the other class, or the fit would be right about all
    for classes in (2, 3):
        features = np.vstack([rows, np.full((10, 2), -1, np.float32)]) if classes == 3 else rows
        answers = np.concatenate([labels, np.full(10, 2)]) if classes == 3 else labels
        probe = linear_probe([1000 * features], answers, [features], answers)
        assert all(np.isfinite(trial.loss) for trial in probe.sweep)


def test_the_chances_are_those_of_scikit_learn_and_exact_far_out() -> None:
    for classes in (2, 3):
        rows, labels = make(7, 90, classes)
        model = LogisticRegression(C=3.0, max_iter=1000).fit(rows, labels)
        np.testing.assert_allclose(np.exp(probing._log_chances(model, rows)), model.predict_proba(rows), atol=1e-6)
        model.coef_ *= 1e6
        logs = probing._log_chances(model, rows)
        assert np.isfinite(logs).all()
        assert logs.min() < -1e4
