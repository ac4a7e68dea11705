"""Nearest centres against slow searches in float64, in every precision and any blocks."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

import modeclip.clustering.distances as distances
from modeclip.clustering.distances import ArrayLike, as_rows, assign_nearest, nearest_centers
from modeclip.errors import ModeclipError
from support import grouped_rows, rows_with_nan, squared_distances_of, unit_rows


@pytest.mark.parametrize("chunk_rows", [None, 1, 2, 7, 64])
def test_nearest_is_brute_force(chunk_rows: int | None) -> None:
    x, centers = grouped_rows(200, 17, 0), grouped_rows(23, 17, 1)
    index, squared = assign_nearest(x, centers, chunk_rows=chunk_rows)
    expected = squared_distances_of(x, centers)
    np.testing.assert_array_equal(index, expected.argmin(1))
    np.testing.assert_allclose(squared, expected.min(1), rtol=1e-5)
    assert (index.dtype, squared.dtype) == (np.int64, np.float32)


@settings(max_examples=40)
@given(data=st.data(), seed=st.integers(0, 1000), num_centers=st.integers(1, 12), num_rows=st.integers(0, 40))
def test_nearest_with_ties_in_any_batch(data: st.DataObject, seed: int, num_centers: int, num_rows: int) -> None:
    rng = np.random.default_rng(seed)
    grid = rng.integers(-1, 2, (num_rows, 3)).astype(np.float32)  # whole numbers: distances are exact, ties many
    centers = rng.integers(-1, 2, (num_centers, 3)).astype(np.float32)
    index, squared = assign_nearest(grid, centers)
    expected = squared_distances_of(grid, centers)
    np.testing.assert_array_equal(index, expected.argmin(1))
    np.testing.assert_array_equal(squared, expected.min(1))
    chunked = assign_nearest(grid, centers, chunk_rows=data.draw(st.integers(1, 41)))
    np.testing.assert_array_equal(chunked[0], index)
    np.testing.assert_array_equal(chunked[1], squared)


@pytest.mark.parametrize("chunk_rows", [1, 3, 50])
def test_nearest_tells_apart_what_float32_products_cannot(chunk_rows: int) -> None:
    rng = np.random.default_rng(0)
    x = grouped_rows(100, 64, 0)
    base = grouped_rows(1, 64, 1)
    centers = (base + 3e-8 * rng.normal(size=(40, 64))).astype(np.float32)  # some equal, some a bit apart
    centers = np.concatenate([centers, centers[::-1]])
    index, squared = assign_nearest(x, centers, chunk_rows=chunk_rows)
    np.testing.assert_array_equal(index, squared_distances_of(x, centers).argmin(1))
    whole = assign_nearest(x, centers)
    np.testing.assert_array_equal(squared, whole[1])


@pytest.fixture(params=["bfloat16", "float32"])
def precision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Have products done in one precision, where the processor can, whatever the size of a block."""
    if request.param == "bfloat16" and not distances.has_fast_bfloat16("cpu"):
        pytest.skip("this processor only emulates bfloat16")
    monkeypatch.setattr(distances, "has_fast_bfloat16", lambda _: request.param == "bfloat16")
    monkeypatch.setattr(distances, "BFLOAT16_WORK", 1 << 13)
    return str(request.param)


def rows_and_centers(case: str) -> tuple[np.ndarray, np.ndarray]:
    """Return data that is hard on low precision, 150 centres."""
    rng = np.random.default_rng(7)
    x, centers = grouped_rows(600, 48, 0, num_groups=40), grouped_rows(150, 48, 1, num_groups=40)
    match case:
        case "near ties":  # centres in pairs, rows in the middle of a pair give or take some float32 steps
            centers[75:] = centers[:75] + 1e-3 * rng.normal(size=(75, 48)).astype(np.float32)
            pair = rng.integers(0, 75, 600)
            x = (centers[pair].astype(np.float64) + centers[pair + 75]) / 2
            x = x + 1e-7 * rng.normal(size=x.shape)
        case "cancelling":  # large terms of a score cancel, what bfloat16 lost of them does not
            centers[:75, :2], centers[75:, :2] = 0.7, -0.7
            centers[75:, 2:] = centers[:75, 2:]
            centers[:, 2:] /= np.linalg.norm(centers[:, 2:], axis=1, keepdims=True)
            x = centers[rng.integers(0, 150, 600)]
            x[:, 0] = 4 + rng.uniform(0, 1, 600)
            x[:, 1] = -x[:, 0] + 0.004 * rng.normal(size=600)
        case "line":  # all errors of a score point the same way
            x, centers = np.zeros((600, 48)), np.zeros((150, 48))
            centers[:, 0] = 1 + np.arange(150) / 3e4
            centers[::2, 0] *= -1
            x[:, 0] = rng.choice([-1, 1], 600) * rng.uniform(1, 1.005, 600)
        case "duplicates":
            centers[50:100], x[300:] = centers[:50], x[:300]
            x[:100] = centers[:100]
        case "offset":
            x, centers = x + 1000, centers + 1000
        case "scales":
            x, centers = x * 10.0 ** rng.uniform(-3, 3, (600, 1)), centers * 10.0 ** rng.uniform(-2, 2, (150, 1))
        case "tiny":
            x, centers = x * 1e-21, centers * 1e-21
        case "huge":
            x, centers = x * 1e25, centers * 1e25
    return x.astype(np.float32), centers.astype(np.float32)


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("case", ["plain", "near ties", "cancelling", "line", "duplicates", "offset", "scales", "tiny"])
def test_nearest_is_exact_in_any_precision(case: str) -> None:
    x, centers = rows_and_centers(case)
    index, squared = assign_nearest(x, centers)
    expected = squared_distances_of(x, centers)
    np.testing.assert_array_equal(index, expected.argmin(1))
    for chunk_rows in (1, 7, 64, 599):
        chunked = assign_nearest(x, centers, chunk_rows=chunk_rows)
        np.testing.assert_array_equal(chunked[0], index)
        np.testing.assert_array_equal(chunked[1], squared)


@pytest.mark.usefixtures("precision")
@pytest.mark.filterwarnings("ignore:overflow")
def test_nearest_survives_scores_that_overflow() -> None:
    x, centers = rows_and_centers("huge")
    np.testing.assert_array_equal(assign_nearest(x, centers)[0], squared_distances_of(x, centers).argmin(1))


@pytest.mark.usefixtures("precision")
def test_near_ties_beyond_memory_are_cut_in_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "PAIRS_IN_MEMORY", 40)
    x, centers = rows_and_centers("duplicates")
    np.testing.assert_array_equal(assign_nearest(x, centers)[0], squared_distances_of(x, centers).argmin(1))


@pytest.mark.slow
def test_float32_products_of_reduced_precision_change_nothing() -> None:
    import torch

    x, centers = rows_and_centers("near ties")
    x, centers = np.tile(x, (4, 1)), np.tile(centers, (4, 1))
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distances, "has_fast_bfloat16", lambda _: False)
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        try:
            index = assign_nearest(x, centers)[0]
        finally:
            torch.backends.mkldnn.matmul.fp32_precision = before
    np.testing.assert_array_equal(index, squared_distances_of(x, centers).argmin(1))


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("case", ["plain", "near ties", "cancelling", "line", "duplicates", "offset", "scales"])
def test_few_go_on_to_float64_and_the_nearest_always(case: str) -> None:
    x, centers = rows_and_centers(case)
    scorer = distances.Scorer(centers, "cpu")
    pairs = distances._near_ties(scorer, scorer.moved(x))
    assert pairs is not None
    exact = squared_distances_of(x, centers)
    kept = np.zeros(exact.shape, bool)
    kept[pairs] = True
    assert kept[exact == exact.min(1, keepdims=True)].all()
    if case == "plain":
        assert kept.sum() < 1.5 * len(x)


@pytest.mark.usefixtures("precision")
def test_bound_covers_the_rounding_of_stored_scores() -> None:
    """On eighths, which bfloat16 holds exactly, all that is lost is lost by storing scores."""
    rng = np.random.default_rng(0)
    x = (rng.integers(-8, 9, (600, 48)) / 8).astype(np.float32)
    half = (rng.integers(-8, 9, (75, 48)) / 8).astype(np.float32)
    centers = np.concatenate([half, -half])
    scorer = distances.Scorer(centers, "cpu")
    moved = scorer.moved(x)
    scores, rounded = scorer.scores(moved)
    best = scores.float().amax(1)
    allowed = (best - scorer.certain(moved, rounded, best)).numpy()[:, None] / 2
    expected = x.astype(np.float64) @ centers.T - np.square(centers).sum(1) / 2
    lost = np.abs(scores[:, :150].float().numpy() - expected)
    smaller = np.abs(expected) <= np.abs(best.numpy())[:, None]
    assert (lost <= allowed)[smaller].all()


def test_nearest_of_permuted_rows_is_permuted() -> None:
    x, centers = grouped_rows(300, 32, 2), grouped_rows(40, 32, 3)
    order = np.random.default_rng(0).permutation(300)
    index, squared = assign_nearest(x, centers)
    permuted = assign_nearest(x[order], centers)
    np.testing.assert_array_equal(permuted[0], index[order])
    np.testing.assert_array_equal(permuted[1], squared[order])


def test_nearest_reads_float16_and_read_only_rows() -> None:
    x = grouped_rows(50, 8, 0).astype(np.float16)
    x.setflags(write=False)
    as_float32 = x.astype(np.float32)
    as_float32.setflags(write=False)
    np.testing.assert_array_equal(assign_nearest(x, as_float32[:5])[0], assign_nearest(as_float32, x[:5])[0])


@pytest.mark.parametrize(
    ("x", "centers", "chunk_rows", "message"),
    [
        (grouped_rows(3, 4, 0), grouped_rows(2, 5, 0), None, "x and centers.*same width.*got 4 and 5.*same encoder"),
        (grouped_rows(3, 4, 0), np.empty((0, 4), np.float32), None, "centers is empty"),
        (grouped_rows(3, 4, 0), grouped_rows(2, 4, 0), 0, "chunk_rows must be 1 or more, got 0"),
        (
            grouped_rows(3, 4, 0),
            rows_with_nan(),
            None,
            "centers .*NaN.*2 of 10 rows.*row 3.*remove or recompute",
        ),
    ],
)
def test_mistakes_of_nearest(x: np.ndarray, centers: np.ndarray, chunk_rows: int | None, message: str) -> None:
    with pytest.raises(ModeclipError, match=message):
        assign_nearest(x, centers, chunk_rows=chunk_rows)


# float64


def test_equally_near_centers_give_the_lowest_index() -> None:
    centers = unit_rows(40, 33)
    centers = np.concatenate([centers, centers[::-1]])  # each centre twice, at other columns
    x = unit_rows(500, 33, 1)
    index, distance = nearest_centers(x, centers)
    np.testing.assert_array_equal(index[:, 0], squared_distances_of(x, centers[:40]).argmin(1))
    exact = np.linalg.norm(x.astype(np.float64) - centers[index[:, 0]], axis=1)
    np.testing.assert_array_equal(distance[:, 0], exact)


@pytest.mark.parametrize("count", [1, 3, 100])
def test_several_nearest_centers_are_in_the_order_of_a_plain_sort(count: int) -> None:
    x, centers = unit_rows(30, 5).astype(np.float64), unit_rows(25, 5, 1).astype(np.float64)
    centers = np.concatenate([centers, centers[:10]])  # some twice
    index, distance = nearest_centers(x, centers, count)
    expected = squared_distances_of(x, centers)
    assert index.shape == (30, min(count, 35))
    for row, found, gaps in zip(expected, index, distance, strict=True):
        assert found.tolist() == sorted(range(35), key=lambda s: (round(row[s], 12), s))[:count]
        np.testing.assert_allclose(gaps, np.sqrt(row[found]))
    np.testing.assert_array_equal(index[:, :1], nearest_centers(x, centers)[0])


def test_whole_numbers_with_many_ties_in_any_type() -> None:
    draw = np.random.default_rng(0)
    x, centers = draw.integers(-2, 3, (300, 3)), draw.integers(-2, 3, (40, 3))
    expected = np.argsort(squared_distances_of(x, centers), axis=1, kind="stable")
    for dtype in (np.float16, np.float32, np.float64):
        np.testing.assert_array_equal(nearest_centers(x.astype(dtype), centers.astype(dtype), 5)[0], expected[:, :5])


def test_distances_that_differ_by_rounding_only_are_equal() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=33)
    centers = np.stack([rng.permutation(values) for _ in range(40)])
    x = np.repeat(rng.normal(size=(100, 1)), 33, axis=1)  # as far from each permutation
    np.testing.assert_array_equal(nearest_centers(x, centers)[0], 0)


def test_a_row_on_a_center_is_at_distance_0() -> None:
    centers = unit_rows(12, 5)
    index, distance = nearest_centers(centers, centers)
    np.testing.assert_array_equal(index[:, 0], np.arange(12))
    np.testing.assert_array_equal(distance, 0)


# arrays of other libraries


class Jaxlike:
    """An array of another library, which numpy reads by its ``__array__``."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        return self.values


X = [[0.5, 1.0], [2.0, -3.0], [0.0, 0.25]]


@pytest.mark.parametrize(
    "values",
    [
        X,
        tuple(map(tuple, X)),
        np.array(X, np.float16),
        np.array(X, np.float64)[:, ::-1][:, ::-1],
        np.array(X, np.longdouble),
        np.array(X, object),
        torch.tensor(X),
        torch.tensor(X, requires_grad=True),
        torch.tensor(X, dtype=torch.bfloat16),
        list(torch.tensor(X)),
        Jaxlike(np.array(X)),
    ],
    ids=lambda values: type(values).__name__,
)
def test_rows_of_any_kind(values: ArrayLike) -> None:
    rows = as_rows("x", values)
    assert (type(rows), rows.dtype, rows.flags.c_contiguous) == (np.ndarray, np.float32, True)
    np.testing.assert_array_equal(rows, X)
    np.testing.assert_array_equal(assign_nearest(values, values)[0], [0, 1, 2])


@pytest.mark.gpu
def test_rows_on_a_gpu() -> None:
    np.testing.assert_array_equal(as_rows("x", torch.tensor(X, device="cuda", requires_grad=True)), X)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("cats", "array of numbers, got str"),
        ([["a", "b"]], "array of numbers, got list"),
        ([[1.0], [1.0, 2.0]], "array of numbers, got list"),
        ([[1.0, None]], "NaN or infinite .* remove or recompute"),
        (np.array([[1j]]), "array of numbers, got ndarray of complex"),
        (np.array([["2020-01-01"]], "M8[D]"), "array of numbers, got ndarray of datetime"),
        (torch.eye(2).to_sparse(), "array of numbers, got Tensor"),
        ([], r"matrix.*shape \(0,\)"),
        ([[], []], r"matrix.*shape \(2, 0\)"),
        (1.0, r"matrix.*shape \(\)"),
        (torch.zeros(2, 3, 4), r"matrix.*shape \(2, 3, 4\)"),
        (np.full((2, 2), 1e300), "NaN or infinite.*remove or recompute"),
    ],
)
def test_what_is_no_matrix_of_numbers(values: ArrayLike, message: str) -> None:
    with pytest.raises(ModeclipError, match=f"^x[: ].*{message}") as caught:
        as_rows("x", values)
    assert "\n" not in str(caught.value)
