"""The page of scaling laws, and its picture: error against compute for each family of models.

Both axes are logarithmic, so a law is a straight line and its interval the band around it. Points that the law is not
fitted to are hollow. The picture is an SVG that contains its colours, so it can stand alone in a text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modeclip.evaluation.scaling import ScalingResult
from modeclip.pages.charts import Axis
from modeclip.pages.html import expert_tones, format_compute, write_page

PAGE_FILE, PICTURE_FILE, RESULT_FILE = "scaling.html", "scaling.svg", "scaling.json"
SIZE = (860.0, 500.0)
"""Width and height of the picture, which is wider if a family has a long name."""
FRAME = (70.0, 20.0, 700.0, 440.0)
"""Left, upper, right and lower end of the axes; the names of the families are to the right."""
NAME_GAP = 17.0
"""Half the distance between names of families."""
MAX_NAMES = 24
"""If there are more points than this, no point has its name beside it."""
LETTER, FAMILY_LETTER = 5.6, 8.4
"""Width of a letter in the name of a point, and of a family."""


def write_scaling(result: ScalingResult, folder: Path, what: str = "error") -> tuple[Path, Path]:
    """Write ``scaling.html`` and ``scaling.svg`` to a folder.

    Args:
        result: The fitted laws and their points.
        folder: The folder; it is made if it is missing.
        what: Label of the upright axis, such as "top-1 error".

    Returns:
        The page and the picture.
    """
    picture = write_page(folder / PICTURE_FILE, "scaling.svg", chart=draw_laws(result, what))
    svg = picture.read_text(encoding="utf-8")
    page = write_page(folder / PAGE_FILE, "scaling.html", result=result, svg=svg, num_experts=len(result.laws))
    return page, picture


def draw_laws(result: ScalingResult, what: str = "error") -> dict[str, Any]:
    """Place points, lines and bands on the picture."""
    values = [error for point in result.points for error in point.errors]
    values += [number for band in result.bands.values() for place in band for number in place[1:2]]
    computes = [point.compute for point in result.points]
    left, upper, right, lower = FRAME
    across = Axis(min(computes) / 1.4, max(computes) * 1.4, left, right, log=True)
    up = Axis(min(values) / 1.08, max(values) * 1.08, lower, upper, log=True)
    colors = colors_of(result)
    families: list[dict[str, Any]] = []
    for law in result.laws:
        band = result.bands[law.family]
        line = [(across.place(compute), up.place(error)) for compute, error, _, _ in band]
        edge = [(across.place(compute), _inside(up.place(low))) for compute, _, low, _ in band]
        edge += [(across.place(compute), _inside(up.place(high))) for compute, _, _, high in reversed(band)]
        families.append({"name": law.family, "color": colors[law.family], "line": _path(line), "band": _path(edge)})
        families[-1] |= {"law": f"error = {law.A.mean:.3g} × C", "power": f"{-law.b.mean:.3f}", "end": line[-1][1]}
    points = [
        {
            "x": across.place(point.compute),
            "y": up.place(point.error),
            "low": up.place(min(point.errors)),
            "high": up.place(max(point.errors)),
            "color": colors[point.family],
            "fitted": point.fitted,
            "title": f"{point.name}, {point.family}\n{format_compute(point.compute)} FLOPs, error "
            f"{100 * point.error:.1f} %, seeds: {len(point.errors)}",
            "name": point.name,
        }
        for point in result.points
    ]
    return {
        "size": (max(SIZE[0], right + 24 + FAMILY_LETTER * max(len(law.family) for law in result.laws)), SIZE[1]),
        "frame": FRAME,
        "what": what,
        "x_ticks": [(format_compute(value), place) for value, place in _ticks(across)],
        "y_ticks": [(f"{100 * value:.3g}", place) for value, place in up.ticks(6)],
        "families": _name_families(families),
        "points": points,
        "names": _name_points(points) if len(points) <= MAX_NAMES else [],
    }


def colors_of(result: ScalingResult) -> dict[str, str]:
    """Return the colour of each family: on the page those of experts, which are others on dark ground."""
    return {law.family: light for law, (light, _) in zip(result.laws, expert_tones(len(result.laws)), strict=True)}


def _ticks(axis: Axis) -> list[tuple[float, float]]:
    """Return powers of ten if the axis has at least three, else round values."""
    powers = range(math.ceil(math.log10(axis.low)), math.floor(math.log10(axis.high)) + 1)
    ticks = [(10.0**power, axis.place(10.0**power)) for power in powers]
    return ticks if len(ticks) > 2 else axis.ticks(5)


def _inside(height: float) -> float:
    return min(max(height, FRAME[1]), FRAME[3])


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "M" + " ".join(f"{x:.1f} {y:.1f}" for x, y in places)


def _name_families(families: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Place each family's name at the end of its line, or below it if another name is there."""
    floor = FRAME[1] + 8
    for family in sorted(families, key=lambda family: float(family["end"])):
        family["height"] = floor = max(float(family["end"]), floor)
        floor += 2 * NAME_GAP
    return families


def _name_points(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Place names above or below their points; a name that would cover another name or a point is left out."""
    taken = [(point["x"] - 6, point["y"] - 6, point["x"] + 6, point["y"] + 6) for point in points]
    names = []
    for point in points:
        half = LETTER * len(point["name"]) / 2
        for shift in (-10.0, 18.0):
            box = (point["x"] - half, point["y"] + shift - 9, point["x"] + half, point["y"] + shift + 2)
            free = all(
                box[0] > other[2] or box[2] < other[0] or box[1] > other[3] or box[3] < other[1] for other in taken
            )
            if free and box[0] > FRAME[0] and box[2] < FRAME[2]:
                taken.append(box)
                names.append({"x": point["x"], "y": point["y"] + shift, "name": point["name"]})
                break
    return names
