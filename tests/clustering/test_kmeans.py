"""k-means against slow oracles: float64 brute force, scipy's exact assignment, and a Lloyd step in plain numpy."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from scipy.optimize import linear_sum_assignment

import modeclip.clustering.balancing as balancing
from modeclip.clustering.balancing import assign_balanced
from modeclip.clustering.distances import ArrayLike, assign_nearest, squared_errors
from modeclip.clustering.kmeans import KMeansResult, kmeans
from modeclip.errors import ModeclipError
from support import grouped_rows, rows_with_nan, squared_distances_of


def cheapest(x: np.ndarray, centers: np.ndarray, capacity: int) -> float:
    """Return the least total cost: every centre is ``capacity`` places, every place takes one row."""
    cost = np.repeat(squared_distances_of(x, centers), capacity, axis=1)
    return float(cost[linear_sum_assignment(cost)].sum())


# balanced assignment


@pytest.mark.parametrize("ratio", [1.0, 1.1, 1.5])
@pytest.mark.parametrize(
    ("num_rows", "num_centers", "seed", "copies"), [(40, 4, 0, 1), (90, 9, 1, 1), (120, 12, 2, 6), (60, 20, 3, 15)]
)
def test_balanced_assignment_is_near_optimal(
    num_rows: int, num_centers: int, seed: int, copies: int, ratio: float
) -> None:
    x = np.repeat(grouped_rows(num_rows // copies, 12, seed), copies, axis=0)
    centers = grouped_rows(num_centers, 12, seed + 100)
    capacity = math.ceil(ratio * num_rows / num_centers - 1e-9)
    assignment = assign_balanced(x, centers, capacity)
    cost = float(squared_distances_of(x, centers)[np.arange(num_rows), assignment].sum())
    assert np.bincount(assignment, minlength=num_centers).max() <= capacity
    assert cost <= 1.01 * cheapest(x, centers, capacity)


@pytest.mark.parametrize("seed", range(3))
def test_candidates_are_renewed_when_prices_outgrow_them(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balancing, "CANDIDATES", 2)
    x, centers = grouped_rows(150, 10, seed, num_groups=1), grouped_rows(15, 10, seed + 50)
    assignment = assign_balanced(x, centers, 10)
    cost = float(squared_distances_of(x, centers)[np.arange(150), assignment].sum())
    np.testing.assert_array_equal(np.bincount(assignment), 10)
    assert cost <= 1.01 * cheapest(x, centers, 10)


def test_rows_left_when_rounds_run_out_are_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balancing, "MAX_ROUNDS", 1)
    x, centers = grouped_rows(60, 8, 0, num_groups=1), grouped_rows(6, 8, 1)
    np.testing.assert_array_equal(np.bincount(assign_balanced(x, centers, 10)), 10)


@pytest.mark.parametrize("ratio", [1.0, 1.5])
def test_equal_rows_that_fit_no_centre_need_few_rounds(ratio: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balancing, "MAX_ROUNDS", 300)
    copies = [200, 90, 60, *[1] * 50]
    x, centers = np.repeat(grouped_rows(len(copies), 8, 0), copies, axis=0), grouped_rows(80, 8, 1)
    x = x[np.random.default_rng(2).permutation(len(x))]
    capacity = math.ceil(ratio * len(x) / len(centers))
    assignment = assign_balanced(x, centers, capacity)
    cost = float(squared_distances_of(x, centers)[np.arange(len(x)), assignment].sum())
    assert np.bincount(assignment).max() <= capacity
    assert cost <= 1.003 * cheapest(x, centers, capacity)


def test_one_centre_takes_all() -> None:
    np.testing.assert_array_equal(assign_balanced(grouped_rows(5, 3, 0), grouped_rows(1, 3, 1), 5), 0)


def test_order_of_centres_does_not_change_the_balanced_cost() -> None:
    x, centers = grouped_rows(200, 16, 0), grouped_rows(10, 16, 1)
    order = np.random.default_rng(0).permutation(10)
    costs = [float(squared_errors(x, some, assign_balanced(x, some, 22)).sum()) for some in (centers, centers[order])]
    assert costs[0] == pytest.approx(costs[1], rel=2 * balancing.MAX_GAP)


@pytest.mark.slow
@settings(max_examples=40)
@given(
    num_rows=st.integers(1, 60),
    num_clusters=st.integers(1, 60),
    ratio=st.floats(1, 3),
    num_distinct=st.integers(1, 60),
    seed=st.integers(0, 99),
    num_iterations=st.integers(0, 6),
)
def test_capacity_is_never_exceeded(
    num_rows: int, num_clusters: int, ratio: float, num_distinct: int, seed: int, num_iterations: int
) -> None:
    num_clusters = min(num_clusters, num_rows)
    x = grouped_rows(num_distinct, 4, seed)[np.random.default_rng(seed).integers(0, num_distinct, num_rows)]
    result = kmeans(x, num_clusters, max_size_ratio=ratio, num_iterations=num_iterations, seed=seed)
    assert result.sizes.max() <= math.ceil(ratio * num_rows / num_clusters)
    assert result.sizes.sum() == num_rows
    check_is_consistent(x, result)


# Lloyd


def check_is_consistent(x: np.ndarray, result: KMeansResult) -> None:
    np.testing.assert_array_equal(result.sizes, np.bincount(result.assignment, minlength=len(result.centers)))
    distances = np.square(x.astype(np.float64) - result.centers[result.assignment]).sum(1)
    assert result.objective == pytest.approx(distances.mean(), rel=1e-5, abs=1e-12)
    assert result.centers.dtype == np.float32
    assert result.assignment.dtype == np.int64


def test_step_is_lloyds() -> None:
    x = grouped_rows(400, 20, 5)
    start, after = (kmeans(x, 10, num_iterations=n, seed=3) for n in (0, 1))
    centers = np.stack([x[start.assignment == j].astype(np.float64).mean(0) for j in range(10)])
    np.testing.assert_allclose(after.centers, centers, atol=1e-6)
    np.testing.assert_array_equal(after.assignment, squared_distances_of(x, after.centers).argmin(1))
    check_is_consistent(x, after)


def test_objective_never_rises() -> None:
    x = grouped_rows(500, 16, 6, num_groups=30)
    objectives = [kmeans(x, 25, num_iterations=n, seed=1).objective for n in range(12)]
    assert objectives == sorted(objectives, reverse=True)
    assert objectives[-1] < 0.9 * objectives[0]


def test_exact_updates_of_a_balanced_fit_never_raise_its_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    import modeclip.clustering.kmeans as module

    monkeypatch.setattr(module, "MIN_IMPROVEMENT", -math.inf)
    monkeypatch.setattr(balancing, "FIRST_STEP", 2.0)  # coarse auctions, so that some assignments are worse
    monkeypatch.setattr(balancing, "MAX_GAP", 1.0)
    x = grouped_rows(300, 16, 6, num_groups=30)
    objectives = []
    for num_exact in range(12):
        monkeypatch.setattr(module, "EXACT_ITERATIONS", num_exact)
        objectives.append(kmeans(x, 25, max_size_ratio=1.1, num_iterations=num_exact).objective)
    assert objectives == sorted(objectives, reverse=True)


def test_balance_costs_little_and_free_sizes_nothing() -> None:
    x = grouped_rows(600, 16, 7, num_groups=20)
    free = kmeans(x, 20)
    balanced = kmeans(x, 20, max_size_ratio=1.1)
    unlimited = kmeans(x, 20, max_size_ratio=20.0)
    assert balanced.sizes.max() <= 33 < free.sizes.max()
    assert free.objective < balanced.objective < 2 * free.objective
    np.testing.assert_array_equal(unlimited.centers, free.centers)


def test_prices_lead_to_the_capacity() -> None:
    """The reason for prices: a lower objective at the capacity than plain Lloyd followed by balanced assignments."""
    import modeclip.clustering.kmeans as module

    x = grouped_rows(1500, 24, 8, num_groups=80)

    def mean_objective() -> float:
        return float(np.mean([kmeans(x, 40, max_size_ratio=1.1, seed=seed).objective for seed in range(4)]))

    priced = mean_objective()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "adjust", lambda prices, first, *_: (first, prices))
        assert priced < 0.995 * mean_objective()


def lloyd(x: np.ndarray, num_clusters: int, num_iterations: int, seed: int) -> float:
    """Return the objective of textbook k-means from random rows."""
    centers = x[np.random.default_rng(seed).choice(len(x), num_clusters, replace=False)].astype(np.float64)
    for _ in range(num_iterations):
        index = (np.square(centers).sum(1) - 2 * x @ centers.T).argmin(1)
        for j in np.unique(index):
            centers[j] = x[index == j].mean(0)
    return float((np.square(x).sum(1) + (np.square(centers).sum(1) - 2 * x @ centers.T).min(1)).mean())


@pytest.mark.slow
def test_samples_and_exchanged_centres_beat_lloyd() -> None:
    x = grouped_rows(20_000, 24, 9, num_groups=100)
    ours = [kmeans(x, 60, seed=seed, start="random").objective for seed in range(3)]
    textbook = [lloyd(x, 60, 25, seed) for seed in range(3)]
    assert max(ours) < 0.99 * min(textbook)


def test_exchange_moves_a_useless_centre_to_where_it_is_missed() -> None:
    from modeclip.clustering.kmeans import _swapped

    x = np.concatenate([grouped_rows(200, 8, seed, num_groups=1) * 0.1 + 5 * np.eye(8)[seed] for seed in range(4)])
    x = x.astype(np.float32)
    centers = np.stack([x[:100].mean(0), x[100:200].mean(0), x[200:400].mean(0), x[400:].mean(0)])
    distance = np.sort(squared_distances_of(x, centers), axis=1)
    order = np.argsort(squared_distances_of(x, centers), axis=1)
    choices = order[:, 0], order[:, 1], (distance[:, 1] - distance[:, 0]).astype(np.float32)
    moved, prices = _swapped(x, centers, choices, np.full(4, 0.01), 0.0, np.random.default_rng(0))
    assert assign_nearest(x, moved)[1].mean() < 0.05 * assign_nearest(x, centers)[1].mean()
    assert np.count_nonzero(prices) == 2


@pytest.mark.parametrize("ratio", [None, 1.3])
def test_number_of_updates_is_that_asked(ratio: float | None) -> None:
    x = grouped_rows(4000, 8, 1, num_groups=30)
    calls: list[None] = []
    kmeans(x, 10, num_iterations=9, max_size_ratio=ratio, on_iteration=lambda: calls.append(None))
    assert 5 < len(calls) <= 9


# spherical


def test_spherical_clusters_directions() -> None:
    rng = np.random.default_rng(3)
    x = grouped_rows(600, 12, 3, num_groups=20)
    scaled = (x * rng.uniform(0.1, 50, (600, 1))).astype(np.float32)
    before = scaled.copy()
    result = kmeans(scaled, 15, spherical=True)
    np.testing.assert_array_equal(scaled, before)
    np.testing.assert_allclose(np.linalg.norm(result.centers, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(result.assignment, (x.astype(np.float64) @ result.centers.T).argmax(1))
    check_is_consistent(x, result)
    for j in range(15):
        mean = x[result.assignment == j].astype(np.float64).mean(0)
        assert result.centers[j] @ mean / np.linalg.norm(mean) > 0.99


def test_spherical_step_is_lloyds_on_the_sphere() -> None:
    x = grouped_rows(400, 20, 5)
    start, after = (kmeans(x, 10, num_iterations=n, seed=3, spherical=True) for n in (0, 1))
    centers = np.stack([x[start.assignment == j].astype(np.float64).mean(0) for j in range(10)])
    np.testing.assert_allclose(after.centers, centers / np.linalg.norm(centers, axis=1, keepdims=True), atol=1e-6)
    assert after.objective < start.objective


def test_spherical_balanced() -> None:
    x = grouped_rows(300, 8, 1, num_groups=20)
    result = kmeans(x, 12, spherical=True, max_size_ratio=1.1)
    assert result.sizes.max() <= 28
    np.testing.assert_allclose(np.linalg.norm(result.centers, axis=1), 1, atol=1e-6)


def test_opposite_directions_leave_the_centre_where_it_is() -> None:
    x = np.array([[1, 0], [-1, 0]], np.float32)
    assert np.linalg.norm(kmeans(x, 1, spherical=True).centers) == pytest.approx(1)


def test_random_start_is_rows() -> None:
    x = grouped_rows(300, 8, 1)
    result = kmeans(x, 12, start="random", num_iterations=0)
    assert {row.tobytes() for row in result.centers} <= {row.tobytes() for row in x}
    assert kmeans(x, 12, start="random").centers.tobytes() != kmeans(x, 12).centers.tobytes()


def test_bytes_do_not_depend_on_the_number_of_threads() -> None:
    import torch

    x = grouped_rows(9000, 16, 8)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(kmeans(x, 64, max_size_ratio=1.2, num_iterations=8))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert results[0].centers.tobytes() == results[1].centers.tobytes()
    assert results[0].assignment.tobytes() == results[1].assignment.tobytes()


@pytest.mark.gpu
@pytest.mark.parametrize("ratio", [None, 1.2])
def test_gpu_gives_a_fit_as_good(ratio: float | None) -> None:
    x = grouped_rows(9000, 32, 8, num_groups=90)
    there, here = (kmeans(x, 64, max_size_ratio=ratio, device=device) for device in ("cuda", "cpu"))
    assert there.objective == pytest.approx(here.objective, rel=0.02)
    again = kmeans(x, 64, max_size_ratio=ratio, device="cuda")
    assert again.centers.tobytes() == there.centers.tobytes()
    for one, other in zip(assign_nearest(x, here.centers, device="cuda"), assign_nearest(x, here.centers), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("ratio", [None, 1.2])
def test_same_seed_same_bytes(ratio: float | None) -> None:
    x = grouped_rows(300, 16, 8)
    first, again = (kmeans(x, 12, max_size_ratio=ratio, seed=4) for _ in range(2))
    other = kmeans(x, 12, max_size_ratio=ratio, seed=5)
    assert first.centers.tobytes() == again.centers.tobytes()
    assert first.assignment.tobytes() == again.assignment.tobytes()
    assert first.centers.tobytes() != other.centers.tobytes()


def test_input_is_left_as_it_was() -> None:
    x = grouped_rows(100, 8, 9)
    before = x.tobytes()
    kmeans(x, 5, max_size_ratio=1.0)
    assert x.tobytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [None, 3.0])
def test_empty_clusters_are_repaired(ratio: float | None) -> None:
    """Nearly all rows are one point, so that most first centres fall on it; the other points still get theirs."""
    x = np.concatenate([np.zeros((60, 3)), 5 * np.eye(3), -5 * np.eye(3)]).astype(np.float32)
    for seed in range(3):
        result = kmeans(x, 7, max_size_ratio=ratio, seed=seed)
        check_is_consistent(x, result)
        if ratio is None:
            assert sorted(result.sizes.tolist()) == [1] * 6 + [60]
            assert result.objective == 0
        else:
            assert result.sizes.min() >= 1


def test_start_with_empty_clusters_is_repaired(monkeypatch: pytest.MonkeyPatch) -> None:
    import modeclip.clustering.kmeans as module

    monkeypatch.setattr(module, "_start", lambda x, num_clusters, *_: np.repeat(x[:1], num_clusters, axis=0))
    x = grouped_rows(80, 6, 3)
    result = kmeans(x, 12)
    assert result.sizes.min() >= 1
    check_is_consistent(x, result)


def test_fewer_distinct_rows_than_clusters() -> None:
    x = np.repeat(grouped_rows(3, 5, 0), 4, axis=0)
    result = kmeans(x, 6)
    assert result.objective == pytest.approx(0, abs=1e-12)
    assert np.count_nonzero(result.sizes) == 3


def test_as_many_clusters_as_rows() -> None:
    result = kmeans(grouped_rows(9, 4, 0), 9, max_size_ratio=1.0)
    np.testing.assert_array_equal(result.sizes, 1)
    assert result.objective == pytest.approx(0, abs=1e-12)


# arrays of other libraries


@pytest.mark.parametrize(
    "convert", [np.ndarray.tolist, np.float64, torch.tensor, lambda x: torch.tensor(x, requires_grad=True)]
)
def test_any_arrays_give_the_same_clusters(convert: Callable[[np.ndarray], ArrayLike]) -> None:
    x = grouped_rows(80, 6, 3)
    found, expected = kmeans(convert(x), 4, max_size_ratio=1.2), kmeans(x, 4, max_size_ratio=1.2)
    assert (type(found.centers), found.centers.dtype, found.objective) == (np.ndarray, np.float32, expected.objective)
    np.testing.assert_array_equal(found.centers, expected.centers)
    np.testing.assert_array_equal(found.assignment, expected.assignment)


def test_whole_numbers_are_clustered() -> None:
    assert kmeans([[0], [1], [9]], 2).sizes.tolist() in ([1, 2], [2, 1])


@pytest.mark.parametrize("factor", [2.0**55, 2.0**-35])
def test_size_of_the_numbers_does_not_matter(factor: float) -> None:
    x = grouped_rows(100, 6, 0)
    found, expected = kmeans(x * np.float32(factor), 7, max_size_ratio=1.1), kmeans(x, 7, max_size_ratio=1.1)
    np.testing.assert_array_equal(found.assignment, expected.assignment)
    assert found.objective == pytest.approx(factor**2 * expected.objective, rel=1e-5)


# mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_clusters": 0}, "num_clusters must be 1 or more, got 0"),
        ({"num_clusters": 11}, "11 clusters for 10 rows.*fewer clusters"),
        ({"num_clusters": 2, "max_size_ratio": 0.9}, "max_size_ratio must be 1 or more .* got 0.9"),
        ({"num_clusters": 2, "max_size_ratio": math.nan}, "max_size_ratio must be 1 or more .* got nan"),
        (
            {"num_clusters": 2, "x": np.eye(10, 4, dtype=np.float32), "spherical": True},
            "x: 6 of 10 rows.*zero length.*row 4.*remove",
        ),
        ({"num_clusters": 2, "num_iterations": -1}, "num_iterations must be 0 or more, got -1"),
        ({"num_clusters": 2, "start": "first"}, "start must be one of k-means\\+\\+, random, got 'first'"),
        ({"num_clusters": 2, "x": rows_with_nan()}, "x has NaN.*2 of 10 rows.*row 3.*remove"),
        (
            {"num_clusters": 2, "x": grouped_rows(10, 4, 0) * np.float32(1e19)},
            "numbers up to about 1e17, got .e.19: divide",
        ),
        ({"num_clusters": 2, "x": grouped_rows(10, 4, 0) * np.float32(1e-25)}, "numbers above about 1e-12.*multiply"),
        ({"num_clusters": 1, "x": []}, "x: expected a matrix"),
        ({"num_clusters": 1, "x": "rows"}, "x: expected an array of numbers, got str"),
    ],
)
def test_mistakes_of_kmeans(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ModeclipError, match=message) as caught:
        inspect.unwrap(kmeans)(**({"x": grouped_rows(10, 4, 0)} | arguments))  # without the type checks of tests
    assert "\n" not in str(caught.value)
