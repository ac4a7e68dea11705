"""Charts: ticks, bars and dots lie inside their frames, and labels do not cover each other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeclip.data.checks import HistogramCounter
from modeclip.pages.charts import (
    Axis,
    choose_labels,
    draw_bins,
    draw_histogram,
    draw_trials,
    fit_box,
    neighbour_plane,
    principal_plane,
    spread,
    thin,
)


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(2, 8))
def test_ticks_are_few_and_inside(low: float, extent: float, count: int) -> None:
    ticks = Axis(low, low + extent, 0.0, 100.0).ticks(count)
    assert len(ticks) <= count + 1
    assert all(-1e-3 <= position <= 100.001 for _, position in ticks)


def test_logarithmic_axis() -> None:
    axis = Axis(0.01, 100.0, 0.0, 400.0, log=True)
    assert axis.place(1.0) == pytest.approx(200)
    assert [value for value, _ in axis.ticks()][:4] == pytest.approx([0.01, 0.02, 0.05, 0.1])


@given(st.lists(st.floats(0, 100), min_size=1, max_size=10))
def test_labels_are_spread_in_order(heights: list[float]) -> None:
    placed = spread(heights, gap=10.0, low=0.0, high=100.0)
    assert all(later - earlier >= 10 - 1e-9 for earlier, later in zip(sorted(placed), sorted(placed)[1:], strict=False))
    assert all(
        placed[i] <= placed[j] for i in range(len(heights)) for j in range(len(heights)) if heights[i] < heights[j]
    )


def test_thinning_keeps_the_ends_and_the_mean() -> None:
    values = np.linspace(0, 1, 10_001)
    few = thin(values)
    assert (len(few), few[0], few[-1]) == (160, 0.0, 1.0)
    assert few.mean() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("num", [1, 2, 7, 12])
def test_map_is_finite_and_inside_for_few_points(num: int) -> None:
    points = np.random.default_rng(0).normal(size=(num, 5)).astype(np.float32)
    placed = fit_box(neighbour_plane(points), (100.0, 50.0), margin=5.0)
    assert placed.min() >= 5 - 1e-4
    assert (placed.max(axis=0) <= [95.001, 45.001]).all()


def test_map_labels_do_not_cover_each_other() -> None:
    dots = [{"x": 50.0, "y": 50.0, "r": 20.0, "keywords": [word], "expert": 0} for word in ("first", "second")]
    assert [item["word"] for item in choose_labels(dots)] == ["first"]


def test_principal_plane_against_the_covariance() -> None:
    x = np.random.default_rng(0).normal(size=(50, 5)) * [5, 1, 3, 0.5, 0.1]
    plane = principal_plane(x.astype(np.float32))
    values = np.sort(np.linalg.eigvalsh(np.cov(x.T)))[::-1]
    np.testing.assert_allclose(plane.var(axis=0, ddof=1), values[:2], rtol=1e-4)
    assert principal_plane(np.ones((1, 1), np.float32)).tolist() == [[0, 0]]


def test_trials_are_placed_in_the_frame_and_in_order() -> None:
    chart = draw_trials([8, 2, 32], [0.5, 3.0, 1.0], size=(340.0, 210.0), low=0.0)
    left, upper, right, lower = chart["frame"]
    assert [point[2:] for point in chart["points"]] == [(2, 3.0), (8, 0.5), (32, 1.0)]
    assert all(left <= x <= right and upper <= y <= lower for x, y, *_ in chart["points"])
    xs = [x for x, *_ in chart["points"]]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)  # equal ratios, equal steps


def test_histogram_counts_every_value() -> None:
    values = np.random.default_rng(0).integers(0, 500, size=300).astype(np.float64)
    chart = draw_histogram(values, size=(720.0, 210.0))
    assert sum(bar["count"] for bar in chart["bars"]) == 300
    tallest = max(chart["bars"], key=lambda bar: bar["count"])
    assert tallest["height"] == max(bar["height"] for bar in chart["bars"])
    assert draw_histogram(np.zeros(3), size=(720.0, 210.0))["bars"][0]["count"] == 3


def test_bars_stay_inside_their_frame_and_keep_their_proportions() -> None:
    counter = HistogramCounter((0.0, 1.0, 2.0, 4.0, 8.0, 16.0))
    counter.add(np.array([0, 1, 1, 5, 5, 5, 5, 100]))
    found = counter.finish()
    chart = draw_bins(found.counts, found.edges, size=(380.0, 210.0))
    assert chart is not None
    left, upper, right, lower = chart["frame"]
    bars = chart["bars"]
    assert [bar["count"] for bar in bars] == [1, 2, 4, 1]
    assert [bar["words"] for bar in bars] == ["0 to 1", "1 to 2", "4 to 8", "16"]
    assert all(left <= bar["x"] and bar["x"] + bar["width"] <= right and bar["y"] >= upper for bar in bars)
    assert all(bar["y"] + bar["height"] == pytest.approx(lower, abs=0.2) for bar in bars)
    assert bars[2]["height"] == pytest.approx(4 * bars[0]["height"], abs=0.3)
    assert draw_bins((0, 0), (0.0, 1.0), size=(380.0, 210.0)) is None
