"""k-means against slow oracles: float64 brute force, scipy's exact assignment, and a Lloyd step in plain numpy."""

from __future__ import annotations

import inspect
import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from scipy.optimize import linear_sum_assignment

import modeclip.balancing as balancing
from modeclip.balancing import assign_balanced
from modeclip.distances import squared_distances
from modeclip.errors import ModeclipError
from modeclip.kmeans import KMeansResult, kmeans, nearest


def points(num_rows: int, dimension: int, seed: int, num_groups: int = 6) -> np.ndarray:
    """Return float32 unit vectors in groups of uneven size."""
    rng = np.random.default_rng(seed)
    group = rng.choice(num_groups, num_rows, p=np.arange(1, num_groups + 1) / np.arange(1, num_groups + 1).sum())
    x = rng.normal(size=(num_groups, dimension))[group] + 0.5 * rng.normal(size=(num_rows, dimension))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def all_distances(x: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Return exact squared distances, (N, M)."""
    return np.square(x[:, None].astype(np.float64) - centers[None]).sum(2)


def cheapest(x: np.ndarray, centers: np.ndarray, capacity: int) -> float:
    """Return the least total cost: every centre is ``capacity`` places, every place takes one row."""
    cost = np.repeat(all_distances(x, centers), capacity, axis=1)
    return float(cost[linear_sum_assignment(cost)].sum())


# nearest


@pytest.mark.parametrize("chunk_rows", [None, 1, 2, 7, 64])
def test_nearest_is_brute_force(chunk_rows: int | None) -> None:
    x, centers = points(200, 17, 0), points(23, 17, 1)
    index, squared = nearest(x, centers, chunk_rows=chunk_rows)
    expected = all_distances(x, centers)
    np.testing.assert_array_equal(index, expected.argmin(1))
    np.testing.assert_allclose(squared, expected.min(1), rtol=1e-5)
    assert (index.dtype, squared.dtype) == (np.int64, np.float32)


@settings(max_examples=40)
@given(data=st.data(), seed=st.integers(0, 1000), num_centers=st.integers(1, 12), num_rows=st.integers(0, 40))
def test_nearest_with_ties_in_any_batch(data: st.DataObject, seed: int, num_centers: int, num_rows: int) -> None:
    rng = np.random.default_rng(seed)
    grid = rng.integers(-1, 2, (num_rows, 3)).astype(np.float32)  # whole numbers: distances are exact, ties many
    centers = rng.integers(-1, 2, (num_centers, 3)).astype(np.float32)
    index, squared = nearest(grid, centers)
    expected = all_distances(grid, centers)
    np.testing.assert_array_equal(index, expected.argmin(1))
    np.testing.assert_array_equal(squared, expected.min(1))
    chunked = nearest(grid, centers, chunk_rows=data.draw(st.integers(1, 41)))
    np.testing.assert_array_equal(chunked[0], index)
    np.testing.assert_array_equal(chunked[1], squared)


@pytest.mark.parametrize("chunk_rows", [1, 3, 50])
def test_nearest_tells_apart_what_float32_products_cannot(chunk_rows: int) -> None:
    rng = np.random.default_rng(0)
    x = points(100, 64, 0)
    base = points(1, 64, 1)
    centers = (base + 3e-8 * rng.normal(size=(40, 64))).astype(np.float32)  # some equal, some a bit apart
    centers = np.concatenate([centers, centers[::-1]])
    index, squared = nearest(x, centers, chunk_rows=chunk_rows)
    np.testing.assert_array_equal(index, all_distances(x, centers).argmin(1))
    whole = nearest(x, centers)
    np.testing.assert_array_equal(squared, whole[1])


def test_nearest_of_permuted_rows_is_permuted() -> None:
    x, centers = points(300, 32, 2), points(40, 32, 3)
    order = np.random.default_rng(0).permutation(300)
    index, squared = nearest(x, centers)
    permuted = nearest(x[order], centers)
    np.testing.assert_array_equal(permuted[0], index[order])
    np.testing.assert_array_equal(permuted[1], squared[order])


def test_nearest_reads_float16_and_read_only_rows() -> None:
    x = points(50, 8, 0).astype(np.float16)
    x.setflags(write=False)
    as_float32 = x.astype(np.float32)
    as_float32.setflags(write=False)
    np.testing.assert_array_equal(nearest(x, as_float32[:5])[0], nearest(as_float32, x[:5])[0])


# balanced assignment


@pytest.mark.parametrize("ratio", [1.0, 1.1, 1.5])
@pytest.mark.parametrize(
    ("num_rows", "num_centers", "seed", "copies"), [(40, 4, 0, 1), (90, 9, 1, 1), (120, 12, 2, 6), (60, 20, 3, 15)]
)
def test_balanced_assignment_is_near_optimal(
    num_rows: int, num_centers: int, seed: int, copies: int, ratio: float
) -> None:
    x = np.repeat(points(num_rows // copies, 12, seed), copies, axis=0)
    centers = points(num_centers, 12, seed + 100)
    capacity = math.ceil(ratio * num_rows / num_centers - 1e-9)
    assignment = assign_balanced(x, centers, capacity)
    cost = float(all_distances(x, centers)[np.arange(num_rows), assignment].sum())
    assert np.bincount(assignment, minlength=num_centers).max() <= capacity
    assert cost <= 1.01 * cheapest(x, centers, capacity)


@pytest.mark.parametrize("seed", range(3))
def test_candidates_are_renewed_when_prices_outgrow_them(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balancing, "CANDIDATES", 2)
    x, centers = points(150, 10, seed, num_groups=1), points(15, 10, seed + 50)
    assignment = assign_balanced(x, centers, 10)
    cost = float(all_distances(x, centers)[np.arange(150), assignment].sum())
    np.testing.assert_array_equal(np.bincount(assignment), 10)
    assert cost <= 1.01 * cheapest(x, centers, 10)


def test_rows_left_when_rounds_run_out_are_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balancing, "MAX_ROUNDS", 1)
    x, centers = points(60, 8, 0, num_groups=1), points(6, 8, 1)
    np.testing.assert_array_equal(np.bincount(assign_balanced(x, centers, 10)), 10)


def test_one_centre_takes_all() -> None:
    np.testing.assert_array_equal(assign_balanced(points(5, 3, 0), points(1, 3, 1), 5), 0)


def test_order_of_centres_does_not_change_the_balanced_cost() -> None:
    x, centers = points(200, 16, 0), points(10, 16, 1)
    order = np.random.default_rng(0).permutation(10)
    costs = [
        float(squared_distances(x, some, assign_balanced(x, some, 22)).sum()) for some in (centers, centers[order])
    ]
    assert costs[0] == pytest.approx(costs[1], rel=2 * balancing.MAX_GAP)


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
    x = points(num_distinct, 4, seed)[np.random.default_rng(seed).integers(0, num_distinct, num_rows)]
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
    x = points(400, 20, 5)
    start, after = (kmeans(x, 10, num_iterations=n, seed=3) for n in (0, 1))
    centers = np.stack([x[start.assignment == j].astype(np.float64).mean(0) for j in range(10)])
    np.testing.assert_allclose(after.centers, centers, atol=1e-6)
    np.testing.assert_array_equal(after.assignment, all_distances(x, after.centers).argmin(1))
    check_is_consistent(x, after)


def test_objective_never_rises() -> None:
    x = points(500, 16, 6, num_groups=30)
    objectives = [kmeans(x, 25, num_iterations=n, seed=1).objective for n in range(12)]
    assert objectives == sorted(objectives, reverse=True)
    assert objectives[-1] < 0.9 * objectives[0]


def test_balanced_objective_never_rises_at_the_final_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    import modeclip.kmeans as module

    monkeypatch.setattr(module, "LOOSE_FRACTION", 0.0)
    monkeypatch.setattr(module, "MIN_IMPROVEMENT", -math.inf)
    monkeypatch.setattr(balancing, "FIRST_STEP", 2.0)  # coarse auctions, so that some assignments are worse
    monkeypatch.setattr(balancing, "MAX_GAP", 1.0)
    x = points(300, 16, 6, num_groups=30)
    objectives = [kmeans(x, 25, max_size_ratio=1.1, num_iterations=n).objective for n in range(20)]
    assert objectives == sorted(objectives, reverse=True)


def test_balance_costs_little_and_free_sizes_nothing() -> None:
    x = points(600, 16, 7, num_groups=20)
    free = kmeans(x, 20)
    balanced = kmeans(x, 20, max_size_ratio=1.1)
    unlimited = kmeans(x, 20, max_size_ratio=20.0)
    assert balanced.sizes.max() <= 33 < free.sizes.max()
    assert free.objective < balanced.objective < 2 * free.objective
    np.testing.assert_array_equal(unlimited.centers, free.centers)


def test_tightening_capacity_pays() -> None:
    """The reason for starting loose: a lower objective at the final capacity, on average over seeds."""
    import modeclip.kmeans as module

    x = points(1500, 24, 8, num_groups=80)

    def mean_objective() -> float:
        return float(np.mean([kmeans(x, 40, max_size_ratio=1.1, seed=seed).objective for seed in range(4)]))

    tightened = mean_objective()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LOOSE_START", 1.0)
        assert tightened < mean_objective()


@pytest.mark.parametrize("ratio", [None, 1.2])
def test_same_seed_same_bytes(ratio: float | None) -> None:
    x = points(300, 16, 8)
    first, again = (kmeans(x, 12, max_size_ratio=ratio, seed=4) for _ in range(2))
    other = kmeans(x, 12, max_size_ratio=ratio, seed=5)
    assert first.centers.tobytes() == again.centers.tobytes()
    assert first.assignment.tobytes() == again.assignment.tobytes()
    assert first.centers.tobytes() != other.centers.tobytes()


def test_input_is_left_as_it_was() -> None:
    x = points(100, 8, 9)
    before = x.tobytes()
    kmeans(x, 5, max_size_ratio=1.0)
    assert x.tobytes() == before


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
    import modeclip.kmeans as module

    monkeypatch.setattr(module, "_start", lambda x, num_clusters, _: np.repeat(x[:1], num_clusters, axis=0))
    x = points(80, 6, 3)
    result = kmeans(x, 12)
    assert result.sizes.min() >= 1
    check_is_consistent(x, result)


def test_fewer_distinct_rows_than_clusters() -> None:
    x = np.repeat(points(3, 5, 0), 4, axis=0)
    result = kmeans(x, 6)
    assert result.objective == pytest.approx(0, abs=1e-12)
    assert np.count_nonzero(result.sizes) == 3


def test_as_many_clusters_as_rows() -> None:
    result = kmeans(points(9, 4, 0), 9, max_size_ratio=1.0)
    np.testing.assert_array_equal(result.sizes, 1)
    assert result.objective == pytest.approx(0, abs=1e-12)


# mistakes


def with_nan() -> np.ndarray:
    x = points(10, 4, 0)
    x[[3, 7], [1, 2]] = np.nan, np.inf
    return x


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_clusters": 0}, "num_clusters must be 1 or more, got 0"),
        (
            {"num_clusters": 11},
            "num_clusters must be at most the number of rows, got 11 clusters for 10 rows: "
            "ask for fewer clusters or give more rows",
        ),
        (
            {"num_clusters": 2, "max_size_ratio": 0.9},
            "max_size_ratio must be 1 or more (1 = all clusters equal), got 0.9",
        ),
        (
            {"num_clusters": 2, "max_size_ratio": math.nan},
            "max_size_ratio must be 1 or more (1 = all clusters equal), got nan",
        ),
        ({"num_clusters": 2, "num_iterations": -1}, "num_iterations must be 0 or more, got -1"),
        (
            {"num_clusters": 2, "x": with_nan()},
            "x has NaN or infinite values in 2 of 10 rows, the first is row 3: remove or recompute these rows",
        ),
    ],
)
def test_mistakes_of_kmeans(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ModeclipError) as caught:
        kmeans(**({"x": points(10, 4, 0)} | arguments))  # type: ignore[arg-type]
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("x", "centers", "chunk_rows", "message"),
    [
        (points(3, 4, 0), points(2, 5, 0), None, "x and centers must have the same width, got 4 and 5"),
        (points(3, 4, 0), np.empty((0, 4), np.float32), None, "centers is empty"),
        (points(3, 4, 0), points(2, 4, 0), 0, "chunk_rows must be 1 or more, got 0"),
        (points(3, 4, 0), with_nan(), None, "centers has NaN or infinite values in 2 of 10 rows, the first is row 3"),
    ],
)
def test_mistakes_of_nearest(x: np.ndarray, centers: np.ndarray, chunk_rows: int | None, message: str) -> None:
    with pytest.raises(ModeclipError) as caught:
        inspect.unwrap(nearest)(x, centers, chunk_rows=chunk_rows)  # without the shape checks of tests
    assert message in str(caught.value)


def test_mistake_in_dimensions() -> None:
    with pytest.raises(ModeclipError) as caught:
        inspect.unwrap(kmeans)(np.zeros((2, 3, 4), np.float32), 2)
    assert str(caught.value) == "x must have 2 dimensions (rows, features), got 3: shape (2, 3, 4)"
