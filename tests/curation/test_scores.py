"""Scores of pairs against slow definitions: s-CLIPLoss, NormSim, thresholds, soft cap sampling."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from modeclip.curation import scores
from support import unit_rows

X, T = unit_rows(90, 8, 1), unit_rows(90, 8, 2)


def contrast(x: np.ndarray, t: np.ndarray, tau: float) -> np.ndarray:
    """Return s-CLIPLoss of a whole batch, sum by sum."""
    found = []
    for i in range(len(x)):
        over_texts = math.fsum(math.exp(float(x[i].astype(float) @ t[j]) / tau) for j in range(len(x)))
        over_images = math.fsum(math.exp(float(x[j].astype(float) @ t[i]) / tau) for j in range(len(x)))
        found.append(float(x[i].astype(float) @ t[i]) - tau / 2 * (math.log(over_texts) + math.log(over_images)))
    return np.array(found)


@pytest.mark.parametrize("tau", [0.01, 0.07])
def test_sclip_is_its_formula(tau: float) -> None:
    assert np.allclose(scores.sclip(X, T, tau=tau), contrast(X, T, tau), atol=1e-6)


def test_sclip_is_minus_the_training_loss() -> None:
    logits = torch.from_numpy(X @ T.T) / 0.05
    labels = torch.arange(len(X))
    loss = sum(torch.nn.functional.cross_entropy(each, labels, reduction="none") for each in (logits, logits.T)) / 2
    assert np.allclose(-scores.sclip(X, T, tau=0.05) / 0.05, loss.numpy(), atol=1e-4)


def test_sclip_averages_over_full_batches_of_random_partitions(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = []

    def contrast_noted(x: np.ndarray, t: np.ndarray, tau: float) -> np.ndarray:
        rows = [int(np.flatnonzero((each == X).all(1))[0]) for each in x]
        batches.append(rows)
        return contrast(x, t, tau)

    monkeypatch.setattr(scores, "_contrast", contrast_noted)
    found = scores.sclip(X, T, batch_size=40, partitions=3, seed=5)
    assert [len(set(rows)) for rows in batches] == [40] * 9  # the third of each partition is filled up
    assert len({tuple(sorted(rows)) for rows in batches}) == 9
    told: list[int] = []
    scores.sclip_of_partition(X, T, 0, batch_size=40, advance=told.append)
    assert told == [40, 40, 10]
    expected = np.zeros((3, 90))
    for number, rows in enumerate(batches[:9]):
        new = [row for row in rows if expected[number // 3][row] == 0]
        values = dict(zip(rows, contrast(X[rows], T[rows], 0.01), strict=True))
        expected[number // 3][new] = [values[row] for row in new]
    assert (expected != 0).all()
    assert np.allclose(found, expected.mean(0), atol=1e-6)


def test_sclip_has_the_same_bytes_with_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "LOGITS_AT_ONCE", 90 * 7)  # blocks of seven rows
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(scores.sclip(X, T, batch_size=50, seed=1).tobytes())
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]
    assert found[0] != scores.sclip(X, T, batch_size=50, seed=2).tobytes()


def test_sclip_takes_from_an_image_that_is_near_to_every_caption() -> None:
    shared = np.eye(1, 32, dtype=np.float32)
    texts = unit_rows(64, 32, 3) + shared  # captions have something in common, and one image has nothing else
    images = np.where(np.arange(64)[:, None] == 0, shared, texts + unit_rows(64, 32, 4))
    images, texts = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (images, texts))
    places = [np.argsort(np.argsort(score(images, texts)))[0] for score in (scores.cosine, scores.sclip)]
    assert places[0] > 16
    assert places[1] == 0


@pytest.mark.parametrize("block", [8192, 7])
def test_cosine_and_normsim_are_their_formulas_in_any_blocks(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "ROWS_AT_ONCE", block)
    monkeypatch.setattr(scores, "LOGITS_AT_ONCE", 3 * block)
    near = X.astype(float) @ T.T.astype(float)
    assert np.allclose(scores.cosine(X, T), np.diag(near), atol=1e-6)
    assert np.allclose(scores.normsim(X, T, "2"), [math.sqrt(math.fsum(v**2 for v in row)) for row in near], atol=1e-5)
    assert np.allclose(scores.normsim(X, T, "inf"), [max(abs(v) for v in row) for row in near], atol=1e-6)


@pytest.mark.parametrize("fraction", [0.01, 0.15, 0.29, 0.5, 0.999, 1.0])
def test_threshold_is_the_value_at_its_place_in_descending_order(fraction: float) -> None:
    draw = np.random.default_rng(0)
    for values in (draw.permutation(100) / 100, draw.integers(0, 40, 100) / 40):  # without and with equal values
        descending = sorted(values.tolist(), reverse=True)
        expected = descending[min(int(100 * fraction), 99)]
        assert scores.threshold_of(values, fraction) == expected
        assert scores.threshold_of(values[::-1], fraction) == expected
        assert (values >= expected).sum() >= min(int(100 * fraction) + 1, 100)


def draw_with_soft_cap(logits: np.ndarray, rounds: int, size: int, seed: int) -> np.ndarray:
    """Return how often each pair is drawn, by drawing: the ``size`` largest of logits with Gumbel noise."""
    random, logits, drawn = np.random.default_rng(seed), logits.copy(), np.zeros(len(logits))
    for _ in range(rounds):
        chosen = np.argsort(-(logits + random.gumbel(size=len(logits))))[:size]
        drawn[chosen] += 1
        logits[chosen] -= 0.15
    return drawn


def test_soft_cap_is_what_drawing_gives_on_average() -> None:
    logits = 3 * np.random.default_rng(0).normal(size=400)
    drawn = np.mean([draw_with_soft_cap(logits, 60, 20, seed) for seed in range(60)], axis=0)
    expected = scores.soft_cap(logits, 60 * 20, round_draws=20)
    assert np.isclose(expected.sum(), 1200)
    assert expected.max() <= 60
    assert np.abs(expected - drawn).max() < 0.04 * drawn.max()
    order = np.random.default_rng(1).permutation(400)
    assert np.allclose(scores.soft_cap(logits[order], 1200, round_draws=20), expected[order])
    assert np.allclose(scores.soft_cap(logits + 50, 1200, round_draws=20), expected)  # a softmax has no zero
    assert (np.diff(expected[np.argsort(logits)]) >= -1e-9).all()


def test_soft_cap_of_equal_logits_and_of_few_pairs() -> None:
    assert scores.soft_cap(np.zeros(4), 10).tolist() == [2.5] * 4
    assert np.isclose(scores.soft_cap(np.array([0.0, 40.0]), 7).sum(), 7)
    every = scores.soft_cap(np.array([0.0, 1.0, 2.0]), 6, round_draws=3)  # a round draws all of them
    assert np.allclose(every, 2, atol=1e-3)
