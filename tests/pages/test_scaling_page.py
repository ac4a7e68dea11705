"""The picture of scaling laws: a law is a straight line inside its frame, and long names have room."""

from __future__ import annotations

import numpy as np

from modeclip.evaluation.scaling import ScalingConfig, ScalingPoint, ScalingResult, fit_scaling
from modeclip.pages.scaling_page import draw_laws


def fit_law(family: str) -> ScalingResult:
    """Return the fit of points that follow a law exactly."""
    computes = (4.5e12, 1.8e13, 4.8e13, 2e14, 4.8e14)
    points = [
        ScalingPoint(name=f"{compute:g}", family=family, compute=compute, errors=(4.0 * compute**-0.06,))
        for compute in computes
    ]
    return fit_scaling(points, ScalingConfig(num_resamples=20))


def test_places_on_the_picture_are_straight_for_a_law() -> None:
    chart = draw_laws(fit_law("dense"))
    across, up = np.array([(point["x"], point["y"]) for point in chart["points"]]).T
    slope, start = np.polyfit(across, up, 1)
    np.testing.assert_allclose(up, start + slope * across, atol=0.01)
    left, upper, right, lower = chart["frame"]
    assert ((left < across) & (across < right) & (upper < up) & (up < lower)).all()


def test_the_picture_has_room_for_long_names_of_families() -> None:
    chart = draw_laws(fit_law("d" * 60))
    assert chart["size"][0] - chart["frame"][2] > 60 * 8  # a bold letter of 13 pixels takes less than 8
