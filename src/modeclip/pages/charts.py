"""Charts: axes with round numbers, curves, bars, a map of clusters, and labels that do not cover each other.

These functions only compute positions; a page's template turns them into inline SVG, so that no page needs a chart
library. A chart is a dictionary with its ``size`` (width, height), its ``frame`` (left, upper, right, lower), ticks as
pairs (value, position) and what is drawn. The origin is the upper left corner: a larger height lies further down.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

Json = dict[str, Any]

MAX_CURVE_POINTS = 160
"""Most points of a curve; more would be finer than a screen shows."""
MAP_SIZE = (940.0, 640.0)
"""Width and height of the map of clusters."""
GAINS_WIDTH, GAIN_HEIGHT = 1080.0, 34.0
"""Width of a chart of gains, and height of each."""
MAX_LABELS = 64
"""Most words on the map; more would hide it."""


@dataclass(frozen=True, slots=True)
class Axis:
    """Maps values to positions on the page."""

    low: float
    """Value at ``start``."""
    high: float
    """Value at ``end``."""
    start: float
    """Position of ``low``."""
    end: float
    """Position of ``high``."""
    log: bool = False
    """Whether the axis is logarithmic; values must then be above 0."""

    def place(self, value: float | int) -> float:
        """Return the position of a value."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, low))
        return self.start + (value - low) / (high - low or 1.0) * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[tuple[float, float]]:
        """Return about ``count`` round values inside the axis, each with its position.

        Examples:
            >>> Axis(0.0, 1.0, 0.0, 100.0).ticks(3)
            [(0.0, 0.0), (0.5, 50.0), (1.0, 100.0)]
        """
        if self.log and self.high > 12 * self.low:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
            return [(step, self.place(step)) for step in steps if self.low <= step <= self.high]
        raw = (self.high - self.low or 1.0) / count
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * (1 - 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [(index * step, self.place(index * step)) for index in range(first, last + 1)]


def draw_curves(
    logs: Mapping[str, Mapping[str, np.ndarray]],
    field: str,
    branch: float | None,
    *,
    size: tuple[float, float],
    right: float,
) -> Json:
    """Place a curve for each model on a chart, with values for the pointer and names that do not cover each other.

    Args:
        logs: Columns of each model's training log: ``samples``, and the one to draw.
        field: The column to draw against samples. Losses get a logarithmic axis.
        branch: Position of a vertical line, such as the samples after which experts leave the seed; None for no line.
        size: Width and height of the chart in its own units.
        right: Room to the right of the curves; if it is above 50, their names are placed there.
    """
    short = {name: (thin(log["samples"]), thin(log[field])) for name, log in logs.items()}
    values = np.concatenate([column for _, column in short.values()])
    low, high = float(values.min()), float(values.max())
    across = Axis(0.0, max(float(samples[-1]) for samples, _ in short.values()), 46.0, size[0] - right)
    if field == "loss" and low > 0:
        up = Axis(low / 1.06, high * 1.06, size[1] - 34, 10.0, log=True)
    else:
        up = Axis(min(low, 0.0), high + 0.06 * (high - min(low, 0.0) or 1.0), size[1] - 34, 10.0)
    lines: list[Json] = [
        {
            "name": name,
            "samples": [float(f"{sample:.6g}") for sample in samples],
            "values": [float(f"{value:.5g}") for value in column],
            "points": [
                (round(across.place(sample), 1), round(up.place(value), 1))
                for sample, value in zip(samples.tolist(), column.tolist(), strict=True)
            ],
        }
        for name, (samples, column) in short.items()
    ]
    heights = spread([line["points"][-1][1] for line in lines], gap=14.0, low=14.0, high=size[1] - 38)
    labels = [(line["name"], line["points"][-1][0], height) for line, height in zip(lines, heights, strict=True)]
    return {
        "field": field,
        "size": size,
        "frame": (across.start, up.end, across.end, up.start),
        "x_ticks": across.ticks(6 if size[0] > 500 else 5),
        "y_ticks": up.ticks(5 if size[1] > 250 else 3),
        "lines": lines,
        "labels": labels if right > 50 else [],
        "branch": None if branch is None else across.place(branch),
    }


def thin(values: Float[np.ndarray, " steps"]) -> Float[np.ndarray, " points"]:
    """Return at most ``MAX_CURVE_POINTS`` values: the first, the last, and the means of equal stretches between."""
    if len(values) <= MAX_CURVE_POINTS:
        return values
    pieces = np.array_split(values[1:-1], MAX_CURVE_POINTS - 2)
    return np.array([values[0], *(piece.mean() for piece in pieces), values[-1]])


def spread(heights: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """Move heights until neighbours are ``gap`` apart. They keep their order and stay between ``low`` and ``high``.

    Examples:
        >>> spread([10.0, 12.0, 50.0], gap=10.0, low=0.0, high=60.0)
        [10.0, 20.0, 50.0]
    """
    order = np.argsort(heights, kind="stable")
    placed = list(heights)
    floor = low
    for index in order:
        placed[index] = max(placed[index], floor)
        floor = placed[index] + gap
    ceiling = high
    for index in order[::-1]:
        placed[index] = min(placed[index], ceiling)
        ceiling = placed[index] - gap
    return placed


def draw_bins(counts: Sequence[int], edges: Sequence[float], *, size: tuple[float, float]) -> Json | None:
    """Place the bars of counts on a logarithmic axis, or return None if nothing was counted.

    Each bar is as wide as its bin is on that axis.

    Args:
        counts: How many values each bin holds.
        edges: Lower edge of each bin, ascending. The last bin has no upper edge; it is drawn as wide as the one before.
        size: Width and height of the chart in its own units.
    """
    lows, heights = np.array(edges), np.array(counts)
    filled = np.flatnonzero(heights)
    if not len(filled):
        return None
    first, last = int(filled[0]), min(len(heights) - 1, int(filled[-1]) + 1)
    highs = np.append(lows[1:], 2 * lows[-1] - lows[-2])
    low = lows[first] or 0.5  # a bin that starts at 0 has no place on a logarithmic axis
    across = Axis(float(low), float(highs[last]), 46.0, size[0] - 12, log=True)
    up = Axis(0.0, float(heights.max()) * 1.08, size[1] - 34, 10.0)
    bars = []
    for position in range(first, last + 1):
        left, right = across.place(max(float(lows[position]), float(low))), across.place(float(highs[position]))
        top = up.place(int(heights[position]))
        words = f"{lows[position]:g}" if position == len(heights) - 1 else f"{lows[position]:g} to {highs[position]:g}"
        bars.append(
            {
                "x": round(left + 0.5, 1),
                "y": round(top, 1),
                "width": round(max(right - left - 1, 0.5), 1),
                "height": round(up.start - top, 1),
                "words": words,
                "count": int(heights[position]),
            }
        )
    return {
        "size": size,
        "frame": (across.start, up.end, across.end, up.start),
        "bars": [bar for bar in bars if bar["count"]],
        "x_ticks": _thin_ticks(across.ticks(5)),
        "y_ticks": up.ticks(4),
    }


def draw_sides(
    edges: Sequence[float],
    sides: Sequence[Sequence[float]],
    *,
    size: tuple[float, float],
    log: bool = False,
    threshold: float | None = None,
) -> Json:
    """Place the bars of a histogram, and the outlines of others of the same bins over them.

    Args:
        edges: Edges of the bins, ascending, one more than there are bins.
        sides: For each histogram its counts; the first one is drawn as bars.
        size: Width and height of the chart in its own units.
        log: Whether the horizontal axis is logarithmic; a bin that begins at 0 then begins at half of its end.
        threshold: Position of a vertical line; None for no line, and for one outside of the bins.
    """
    ends = [max(edge, edges[1] / 2) for edge in edges] if log else list(edges)
    across = Axis(float(ends[0]), float(ends[-1]), 46.0, size[0] - 12, log=log)
    up = Axis(0.0, max(map(max, sides), default=0.0) * 1.08 or 1.0, size[1] - 34, 10.0)
    places = [round(across.place(edge), 1) for edge in ends]
    bars = [
        {
            "x": round(left + 0.5, 1),
            "y": round(up.place(count), 1),
            "width": round(max(right - left - 1, 0.5), 1),
            "height": round(up.start - up.place(count), 1),
            "low": edges[place],
            "high": edges[place + 1],
            "counts": [side[place] for side in sides],
        }
        for place, (left, right, count) in enumerate(zip(places[:-1], places[1:], sides[0], strict=True))
        if any(side[place] for side in sides)
    ]
    outlines = []
    for side in sides[1:]:
        tops = [round(up.place(count), 1) for count in side]
        steps = [
            point
            for left, right, top in zip(places, places[1:], tops, strict=False)
            for point in ((left, top), (right, top))
        ]
        outlines.append([(places[0], up.start), *steps, (places[-1], up.start)])
    is_inside = threshold is not None and ends[0] <= threshold <= ends[-1]
    return {
        "size": size,
        "frame": (across.start, up.end, across.end, up.start),
        "bars": bars,
        "outlines": outlines,
        "x_ticks": _thin_ticks(across.ticks(5)) if log else across.ticks(5),
        "y_ticks": up.ticks(4),
        "threshold": across.place(float(threshold)) if is_inside and threshold is not None else None,
    }


def draw_lines(
    x: Sequence[float],
    lines: Mapping[str, Sequence[float]],
    *,
    size: tuple[float, float],
    log: bool = False,
    chosen: float | None = None,
) -> Json:
    """Place lines over a common axis on a chart.

    Args:
        x: Values of the horizontal axis, ascending; two or more.
        lines: For each name its values.
        size: Width and height of the chart in its own units.
        log: Whether the horizontal axis is logarithmic; its values must then be above 0.
        chosen: Position of a vertical line; None for no line, and for one outside of the axis.
    """
    across = Axis(float(x[0]), float(x[-1]), 46.0, size[0] - 14, log=log)
    values = [value for line in lines.values() for value in line]
    low, high = min([0.0, *values]), max(values)
    up = Axis(low, high + 0.06 * (high - low or 1.0), size[1] - 34, 10.0)
    is_inside = chosen is not None and x[0] <= chosen <= x[-1]
    return {
        "size": size,
        "frame": (across.start, up.end, across.end, up.start),
        "x_ticks": _thin_ticks(across.ticks(5)) if log else across.ticks(5),
        "y_ticks": up.ticks(4),
        "lines": [
            {
                "name": name,
                "points": [
                    (round(across.place(place), 1), round(up.place(value), 1), place, value)
                    for place, value in zip(x, line, strict=True)
                ],
            }
            for name, line in lines.items()
        ],
        "chosen": across.place(float(chosen)) if is_inside and chosen is not None else None,
    }


def _thin_ticks(ticks: list[tuple[float, float]], gap: float = 34.0) -> list[tuple[float, float]]:
    """Leave out ticks whose numbers would touch."""
    kept: list[tuple[float, float]] = []
    for value, place in ticks:
        if value > 0 and (not kept or place - kept[-1][1] >= gap):
            kept.append((value, place))
    return kept


def neighbour_plane(centers: Float[np.ndarray, "M D"]) -> Float[np.ndarray, "M 2"]:
    """Map points to a plane on which neighbours stay neighbours (t-SNE), or fewer than 8 points by PCA.

    Price: 5 s of processor time for 1,024 points. One thread does it: several wait for each other after every step.
    """
    if len(centers) < 8:
        return principal_plane(centers)
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    perplexity = min(30.0, (len(centers) - 1) / 3)
    with threadpool_limits(1):
        return np.asarray(TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(centers))


def principal_plane(centers: Float[np.ndarray, "M D"]) -> Float[np.ndarray, "M 2"]:
    """Map points to the plane of their two main directions (PCA)."""
    centred = (centers - centers.mean(axis=0)).astype(np.float64)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    axes = axes[:2] * np.where(axes[:2].sum(1, keepdims=True) < 0, -1, 1)  # the sign of a direction is arbitrary
    flat = np.zeros((len(centers), 2), dtype=np.float32)
    flat[:, : len(axes)] = centred @ axes.T
    return flat


def draw_trials(
    numbers: Sequence[int], values: Sequence[float | int], *, size: tuple[float, float], low: float | None = None
) -> Json:
    """Place the results of trials with different numbers on a chart whose horizontal axis is logarithmic.

    Args:
        numbers: The numbers that were tried, each 1 or more.
        values: The result of each.
        size: Width and height of the chart in its own units.
        low: Lowest value on the vertical axis; by default a little below the lowest result.
    """
    order = sorted(range(len(numbers)), key=lambda index: numbers[index])
    most, least = max(values), min(values)
    margin = 0.12 * (most - (least if low is None else low)) or 0.1 * abs(most) or 1.0
    across = Axis(float(min(numbers)), float(max(numbers)), 58.0, size[0] - 18, log=True)
    up = Axis(float(least - margin) if low is None else low, float(most + margin), size[1] - 30, 12.0)
    return {
        "size": size,
        "frame": (46.0, up.end, size[0] - 6, up.start),
        "x_ticks": [(numbers[index], across.place(numbers[index])) for index in order],
        "y_ticks": up.ticks(5),
        "points": [
            (round(across.place(numbers[index]), 1), round(up.place(values[index]), 1), numbers[index], values[index])
            for index in order
        ],
    }


def draw_gains(rows: Sequence[Mapping[str, Any]], measure: str) -> Json:
    """Place the gain of each way, with its interval, on an axis that has the dense model at 0.

    Args:
        rows: Rows of a pilot or of a run's decision.
        measure: Which of their gains is drawn.
    """
    left, top, right = 330.0, 10.0, 30.0
    shown = [row for row in rows if measure in row["gain"]]
    ends = [row["gain"][measure][end] for row in shown for end in ("low", "high")]
    reach = 1.06 * max([0.001, *map(abs, ends)])
    across = Axis(-reach, reach, left, GAINS_WIDTH - right)
    bottom = top + GAIN_HEIGHT * len(shown)
    marks = []
    for place, row in enumerate(shown):
        gain = row["gain"][measure]
        tone = "win" if gain["low"] > 0 else "loss" if gain["high"] < 0 else "none"
        marks.append(
            {
                "title": row["title"],
                "y": top + GAIN_HEIGHT * (place + 0.5),
                "low": across.place(gain["low"]),
                "mean": across.place(gain["mean"]),
                "high": across.place(gain["high"]),
                "tone": tone,
            }
        )
    return {
        "size": (GAINS_WIDTH, bottom + 34),
        "frame": (left, top, GAINS_WIDTH - right, bottom),
        "x_ticks": across.ticks(7),
        "y_ticks": [],
        "zero": across.place(0.0),
        "rows": marks,
    }


def draw_histogram(values: Float[np.ndarray, " n"], *, size: tuple[float, float], num_bins: int = 36) -> Json:
    """Place the bars of a histogram of values from 0 up, and a line at their mean."""
    counts, edges = np.histogram(values, bins=num_bins, range=(0, float(values.max(initial=1)) or 1.0))
    across = Axis(0.0, float(edges[-1]), 46.0, size[0] - 6)
    up = Axis(0.0, float(counts.max()) * 1.06, size[1] - 30, 8.0)
    bars = [
        {
            "x": round(across.place(float(low)) + 0.5, 1),
            "width": round(across.place(float(high)) - across.place(float(low)) - 1, 1),
            "y": round(up.place(int(count)), 1),
            "height": round(up.start - up.place(int(count)), 1),
            "count": int(count),
            "low": float(low),
            "high": float(high),
        }
        for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True)
        if count
    ]
    return {
        "size": size,
        "frame": (across.start, up.end, across.end, up.start),
        "x_ticks": across.ticks(6),
        "y_ticks": [tick for tick in up.ticks(4) if tick[0] == round(tick[0])],
        "bars": bars,
        "mean": across.place(float(values.mean())),
    }


def fit_box(points: Float[np.ndarray, "M 2"], size: tuple[float, float], margin: float) -> Float[np.ndarray, "M 2"]:
    """Scale points, each axis on its own, so that they fill a box except for a margin."""
    low, extent = points.min(axis=0), np.ptp(points, axis=0)
    unit = np.where(extent > 0, (points - low) / np.where(extent > 0, extent, 1), 0.5)
    return margin + unit * (np.asarray(size) - 2 * margin)


def draw_map(clusters: Sequence[Json], plane: Float[np.ndarray, "M 2"], *, smallest: float) -> Json:
    """Place clusters on a map as dots whose area is their size.

    Args:
        clusters: ``index``, ``expert``, ``size``, ``keywords`` and what else the template shows of each cluster, the
            largest first. Dots are drawn in this order, so that small ones lie on large ones.
        plane: Position of each cluster, in any unit.
        smallest: Smallest radius of a dot.
    """
    positions = fit_box(plane, MAP_SIZE, margin=34.0)
    largest = float(np.clip(340 / math.sqrt(len(clusters)), 7, 26))
    biggest = clusters[0]["size"] or 1
    dots = [
        {
            **cluster,
            "x": round(float(x), 1),
            "y": round(float(y), 1),
            "r": round(max(smallest, largest * math.sqrt(cluster["size"] / biggest)), 1),
        }
        for cluster, (x, y) in zip(clusters, positions, strict=True)
    ]
    return {"size": MAP_SIZE, "dots": dots, "labels": choose_labels(dots)}


def choose_labels(dots: Iterable[Json]) -> list[Json]:
    """Label clusters with their first key word, the largest first, unless the word would cover another one."""
    labels: list[Json] = []
    for dot in dots:
        word = str(dot["keywords"][0])[:18] if dot["keywords"] else ""
        half = 3.6 * len(word) + 5
        x = min(max(dot["x"], half), MAP_SIZE[0] - half)
        y = dot["y"] if dot["r"] > 11 else dot["y"] - dot["r"] - 7
        free = all(abs(x - old["x"]) > half + old["half"] or abs(y - old["y"]) > 20 for old in labels)
        if word and free and all(word != old["word"] for old in labels):
            labels.append({"x": x, "y": y, "half": half, "word": word, "expert": dot["expert"]})
        if len(labels) == MAX_LABELS:
            break
    return labels
