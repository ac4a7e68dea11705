"""Captions that are kept: how near they lie to each other, against a slow oracle, and what is far from all of them."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from modeclip.clustering import novelty
from modeclip.clustering.novelty import CAPTIONS_IN_MEMORY, LEVELS, NearCaptions
from support import grouped_rows


def test_distances_to_the_nearest_other_caption() -> None:
    x = grouped_rows(300, 16, 0).astype(np.float32)
    x[::3] = x[0]  # one caption that recurs counts once, and is not near to itself
    x[1] = 0
    found = NearCaptions.fit(x)
    assert found is not None
    assert found.vectors.dtype == np.int8
    rows = np.unique(x[x.any(axis=1)], axis=0)
    assert len(found.vectors) == len(rows) == 200
    gaps = np.linalg.norm(rows[:, None] - rows[None], axis=2)
    np.fill_diagonal(gaps, np.inf)
    np.testing.assert_allclose(found.quantiles.distances[0], np.quantile(gaps.min(axis=1), LEVELS), atol=0.02)
    assert found.distance(x[3:5]).max() < 0.02
    assert found.distance(-x[:1])[0] == pytest.approx(np.linalg.norm(rows + x[0], axis=1).min(), abs=0.02)


def test_captions_held_out_are_far_as_often_as_the_quantile_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(novelty, "COMPARED_CAPTIONS", 500)
    x = grouped_rows(4000, 16, 1).astype(np.float32)
    found = NearCaptions.fit(x[::2])
    assert found is not None
    far = found.distance(x[1::2]) > found.quantiles.threshold(0.9)[0]
    assert 0.06 < far.mean() < 0.15


def test_joined_captions_are_near_to_what_either_is_near_to() -> None:
    one, other = (NearCaptions.fit(grouped_rows(100, 8, seed).astype(np.float32)) for seed in (2, 3))
    assert one is not None
    assert other is not None
    both, asked = one.joined(other), grouped_rows(50, 8, 4).astype(np.float32)
    np.testing.assert_allclose(both.distance(asked), np.minimum(one.distance(asked), other.distance(asked)), atol=0.02)
    assert (both.quantiles.distances >= one.quantiles.distances).all()


def test_one_caption_says_nothing() -> None:
    assert NearCaptions.fit(np.ones((5, 4), np.float32)) is None
    assert NearCaptions.fit(np.zeros((5, 4), np.float32)) is None


def test_distances_take_little_memory_and_are_those_of_all_captions_at_once() -> None:
    draw = np.random.default_rng(0)
    number = 8 * CAPTIONS_IN_MEMORY + 3
    found = NearCaptions.fit(draw.normal(size=(number, 64)).astype(np.float32))
    assert found is not None
    x = draw.normal(size=(5, 64)).astype(np.float32)
    x[0] = found.vectors[-1] * np.float32(found.scale)  # in the last block
    known = (found.vectors * np.float32(found.scale)).astype(np.float64)
    tracemalloc.start()
    try:
        distance = found.distance(x)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_allclose(distance, np.linalg.norm(x[:, None] - known, axis=2).min(axis=1), rtol=1e-12, atol=1e-12)
    assert most < known.nbytes, most
