"""Near copies against a slow search in float64, whatever the blocks; what chains do; shares of clusters by scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, minimize

from modeclip.curation import semdedup
from modeclip.curation.density import (
    density_sizes,
    equal_sizes,
    equal_sizes_by_level,
    fill_to,
    mean_distance_to_nearest,
    round_sizes,
)
from modeclip.curation.semdedup import find_near_copies, nearest_before
from support import unit_rows


def members(count: int, spread: float, seed: int) -> np.ndarray:
    """Vectors around a few others, of which some are repeated to the bit and some are zero."""
    random = np.random.default_rng(seed)
    around = random.normal(size=(max(1, count // 8), 24))
    x = around[random.integers(len(around), size=count)] + spread * random.normal(size=(count, 24))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    x[random.integers(count, size=count // 4)] = x[0]
    x[random.integers(count, size=count // 9)] = 0
    return x


def cosines(x: np.ndarray) -> np.ndarray:
    """All cosines; 1 to the bit where vectors are equal, 0 where one says nothing."""
    exact = x.astype(np.float64) @ x.T.astype(np.float64)
    return np.where((x[:, None] == x).all(2) & x.any(1), 1.0, exact)


def slow_copies(x: np.ndarray, threshold: float) -> tuple[list[int], list[float]]:
    cosine = cosines(x)
    copy_of, found = [-1] * len(x), [np.nan] * len(x)
    for j in range(len(x)):
        near = [i for i in range(j) if copy_of[i] < 0 and cosine[j, i] > threshold]
        if near:
            copy_of[j], found[j] = near[0], cosine[j, near[0]]
    return copy_of, found


@pytest.mark.parametrize("at_once", [3, 7, 512])
@pytest.mark.parametrize("spread", [0.05, 0.2, 1.0])
def test_near_copies_are_those_of_a_slow_search(at_once: int, spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semdedup, "MEMBERS_AT_ONCE", at_once)
    monkeypatch.setattr(semdedup, "EARLIER_AT_ONCE", 2 * at_once)
    assert [len(found) for found in (*find_near_copies(unit_rows(0, 24), 0.5), *nearest_before(unit_rows(0, 24)))] == [
        0
    ] * 4
    for count in (1, 2, 5, 70):
        x = members(count, spread, seed=count)
        for threshold in (0.0, 0.5, 0.9, 0.99):
            copy_of, cosine = find_near_copies(x, threshold)
            expected, values = slow_copies(x, threshold)
            assert copy_of.tolist() == expected
            np.testing.assert_allclose(cosine, values, atol=1e-9)
        exact = np.tril(cosines(x) + 2, -1) - 2
        nearest, cosine = nearest_before(x)
        np.testing.assert_allclose(cosine[1:], exact.max(1)[1:], atol=1e-9)
        assert nearest[0] == -1
        np.testing.assert_allclose(exact[np.arange(1, count), nearest[1:]], cosine[1:], atol=1e-9)


def test_the_search_is_exact_without_fast_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    x = members(70, 0.2, seed=3)
    with_it = find_near_copies(x, 0.9)
    for fast in (True, False):
        monkeypatch.setattr(semdedup, "has_fast_bfloat16", lambda _, fast=fast: fast)
        np.testing.assert_array_equal(find_near_copies(x, 0.9), with_it)


def test_what_stays_has_no_near_copy_and_what_goes_has_one() -> None:
    x = members(200, 0.3, seed=1)
    copy_of, _ = find_near_copies(x, 0.8)
    kept, cosine = copy_of < 0, cosines(x)
    among = cosine[kept][:, kept] - 2 * np.eye(int(kept.sum()))
    assert among.max() <= 0.8 + 1e-9
    assert kept[copy_of[~kept]].all()
    assert (cosine[~kept, copy_of[~kept]] > 0.8).all()


def test_a_chain_goes_as_a_whole_only_where_dropped_members_drop_others() -> None:
    angles = np.arange(40) * np.pi / 80  # neighbours are near, the ends are at a right angle
    x = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    threshold = float(np.cos(1.5 * np.pi / 80))
    assert (nearest_before(x)[1] > threshold).sum() == 39
    assert (find_near_copies(x, threshold)[0] < 0).sum() == 20


def test_the_nearest_centres_are_those_of_a_full_sort() -> None:
    centers = unit_rows(30, 8).astype(np.float64)
    cosine = centers @ centers.T
    expected = [1 - np.sort(np.delete(row, place))[::-1][:5].mean() for place, row in enumerate(cosine)]
    np.testing.assert_allclose(mean_distance_to_nearest(centers, 5), expected)
    assert mean_distance_to_nearest(centers[:1], 5).tolist() == [0.0]


def test_shares_by_density_are_those_of_a_quadratic_program() -> None:
    random = np.random.default_rng(0)
    for _ in range(25):
        count = int(random.integers(1, 9))
        sizes = random.integers(1, 50, count)
        total = int(random.integers(1, sizes.sum() + 1))
        ideal = random.dirichlet(np.full(count, random.choice([0.2, 1, 5]))) * total
        low = np.minimum(0.5 * total / count, sizes - 1)
        room = (sizes - low).sum()
        program = minimize(
            lambda x, ideal=ideal: ((x - ideal) ** 2).sum(),
            x0=low + (total - low.sum()) / max(room, 1e-9) * (sizes - low),
            jac=lambda x, ideal=ideal: 2 * (x - ideal),
            bounds=Bounds(low, sizes),
            constraints=LinearConstraint(np.ones(count), total, total),
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        )
        found = fill_to(ideal, low, sizes, total)
        np.testing.assert_allclose(found, program.x, atol=1e-3)
        whole = round_sizes(found, sizes)
        assert whole.sum() == total
        assert (np.abs(whole - found) < 1).all()
        assert (whole <= sizes).all()


def test_shares_by_density_prefer_what_is_wide_and_far() -> None:
    sizes = np.full(4, 1000)
    kept = density_sizes(np.array([0.1, 0.1, 0.4, 0.4]), np.array([0.1, 0.5, 0.1, 0.5]), sizes, 400, 0.1)
    assert kept.sum() == 400
    assert 50 <= kept[0] <= kept[2] <= kept[1] < kept[3]


def test_even_shares_fill_small_clusters_and_parents_come_first() -> None:
    assert equal_sizes(np.array([2, 100, 7, 50]), 60).tolist() == [2, 26, 7, 25]
    assert equal_sizes(np.array([2, 3]), 5).tolist() == [2, 3]
    assert equal_sizes(np.array([2, 3]), 0).tolist() == [0, 0]
    kept = equal_sizes_by_level(np.array([90, 10, 100, 5]), np.array([0, 0, 1, 2]), 65)
    assert kept.tolist() == [20, 10, 30, 5]
