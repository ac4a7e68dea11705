"""The approximate search: what its candidates hold, and how it is measured."""

from __future__ import annotations

import numpy as np
import pytest

from modeclip.search import approximate
from modeclip.search.approximate import Candidates, build_approximate
from modeclip.search.exact import Rows
from support import unit_rows


def clustered(count: int, width: int, seed: int) -> np.ndarray:
    """Return rows around a few directions, as those of pictures lie."""
    centers, noise = unit_rows(40, width, seed), unit_rows(count, width, seed + 1)
    rows = centers[np.random.default_rng(seed).integers(40, size=count)] + 0.5 * noise
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def test_with_all_rows_as_candidates_the_search_is_the_exact_one() -> None:
    width = 25
    rows = Rows(clustered(390, width, 0))  # fewer than CANDIDATES
    candidates = Candidates.fit(rows)
    for query in unit_rows(8, width, 1).astype(np.float32):
        found = candidates.best(rows, query, 10, candidates.partitions)
        np.testing.assert_array_equal(found, rows.best(query[None], 10)[0][0])
    assert len(candidates.best(rows, query, 500, candidates.partitions)) == 390


def test_an_index_is_read_as_it_was_written() -> None:
    rows = Rows(clustered(2000, 16, 2))
    candidates = Candidates.fit(rows)
    again = Candidates.of_bytes(candidates.to_bytes())
    for query in unit_rows(8, 16, 3).astype(np.float32):
        np.testing.assert_array_equal(again.best(rows, query, 10, 3), candidates.best(rows, query, 10, 3))


def test_as_many_cells_are_looked_at_as_the_recall_takes() -> None:
    rows = Rows(clustered(4000, 24, 4))
    queries = clustered(80, 24, 6).astype(np.float32)
    true = rows.best(queries, 10)[0]

    def recall(looked_at: int) -> float:
        some = range(1, len(queries), 2)  # those that did not choose
        found = [set(candidates.best(rows, queries[at], 10, looked_at)) & set(true[at]) for at in some]
        return sum(map(len, found)) / len(found) / 10

    built = build_approximate(rows, queries, 0.9)
    assert built is not None
    facts, candidates = built
    assert facts.queries == 40
    assert recall(facts.looked_at) == pytest.approx(facts.recall)
    assert facts.recall >= 0.9
    assert recall(1) < 0.9
    assert facts.looked_at < facts.partitions == 63


def test_without_faiss_or_captions_searches_stay_exact(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, queries = Rows(clustered(300, 8, 8)), unit_rows(4, 8, 9).astype(np.float32)
    assert build_approximate(rows, queries[:0], 0.5) is None
    monkeypatch.setattr(approximate, "faiss_is_there", lambda: False)
    assert build_approximate(rows, queries, 0.5) is None
    assert 'pip install "modeclip[search]"' in capsys.readouterr().err
