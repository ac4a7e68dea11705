"""The exact search against sorting all products, in float16 first, in blocks, and where few rows may be chosen."""

from __future__ import annotations

import numpy as np
import pytest

from modeclip.search import exact
from modeclip.search.exact import Rows
from support import unit_rows


def sorted_products(vectors: np.ndarray, query: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Return the rows that may be chosen by their products in float64, the first of equal ones first."""
    scores = vectors.astype(np.float64) @ query.astype(np.float64)
    rows = np.flatnonzero(allowed)
    return rows[np.argsort(-scores[rows], kind="stable")]


@pytest.fixture(params=["half", "blocks"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank in float16 first, or in small blocks of float32, whatever this processor does faster."""
    monkeypatch.setattr(exact, "half_is_fast", lambda: request.param == "half")
    monkeypatch.setattr(exact, "BLOCK_BYTES", 4 * 24 * 100)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("share", [1.0, 0.5, 0.03])
def test_best_are_those_of_all_products(share: float) -> None:
    """Rows that differ by less than float16 resolves are told apart all the same."""
    draw = np.random.default_rng(0)
    vectors = unit_rows(1000, 24, draw).astype(np.float16)
    vectors[500:] = vectors[:500]
    vectors[500:, 0] = np.nextafter(vectors[500:, 0], np.float16(2))  # neighbours of the first half
    allowed = draw.random(1000) < share
    rows = Rows(vectors)
    for query in unit_rows(20, 24, 1).astype(np.float32):
        expected = sorted_products(vectors, query, allowed)[:10]
        found, scores = rows.best(query[None], 10, None if share == 1 else allowed)
        exact_scores = vectors[found[0]].astype(np.float64) @ query
        np.testing.assert_allclose(scores[0], exact_scores, atol=1e-6)
        best = vectors[expected].astype(np.float64) @ query
        np.testing.assert_allclose(exact_scores, best, atol=1e-6)  # rows within 1e-6 may change places


@pytest.mark.usefixtures("way")
def test_several_queries_are_each_answered_alone() -> None:
    vectors = unit_rows(700, 24, 2).astype(np.float16)
    queries = unit_rows(9, 24, 3).astype(np.float32)
    rows = Rows(vectors)
    together, _ = rows.best(queries, 5)
    for number, query in enumerate(queries):
        np.testing.assert_array_equal(together[number], rows.best(query[None], 5)[0][0])


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("factor", [1e6, 1e30, 1e-30, 0.0])
@pytest.mark.filterwarnings("error")
def test_queries_of_any_length_find_the_same(factor: float) -> None:
    """Float16 ends at 65,504, and a sum of parts that are divided by a small spread is longer than that."""
    rows = Rows(unit_rows(700, 24, 2).astype(np.float16))
    queries = unit_rows(2, 24, 3).astype(np.float32)
    for some in (queries[:1], queries):
        expected = rows.best(some, 5)[0] if factor else np.tile(np.arange(5), (len(some), 1))
        np.testing.assert_array_equal(rows.best(np.float32(factor) * some, 5)[0], expected)


@pytest.mark.usefixtures("way")
def test_of_equal_rows_the_first_comes_first() -> None:
    vectors = np.tile(unit_rows(3, 24, 4).astype(np.float16), (300, 1))
    found, _ = Rows(vectors).best(vectors[1:2].astype(np.float32), 4)
    np.testing.assert_array_equal(found[0], [1, 4, 7, 10])


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("count", [1, 7, 50])
def test_no_more_rows_are_returned_than_may_be_chosen(count: int) -> None:
    vectors = unit_rows(40, 24, 5).astype(np.float16)
    allowed = np.zeros(40, bool)
    allowed[[3, 5, 8]] = True
    found, scores = Rows(vectors).best(vectors[:1].astype(np.float32), count, allowed)
    assert found.shape == scores.shape == (1, min(count, 3))
    assert set(found[0].tolist()) <= {3, 5, 8}
    none, _ = Rows(vectors).best(vectors[:1].astype(np.float32), count, np.zeros(40, bool))
    assert none.shape == (1, 0)
