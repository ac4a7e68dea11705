"""The page of a pilot: what to train and how sure that is, and what every way gains and costs.

The picture has an interval for each way; a way whose interval touches the line at 0 is not told from the dense model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modeclip.pages.charts import Axis
from modeclip.pages.html import write_page

PAGE_FILE = "pilot.html"
WIDTH, ROW_HEIGHT, TOP, LEFT, RIGHT = 1080.0, 34.0, 10.0, 330.0, 30.0
MOODS = {"open": "none", "likely": "tie", "sure": "win"}
"""Look of the verdict by how sure it is."""


def write_pilot(result: Mapping[str, Any], folder: Path | str) -> Path:
    """Write ``pilot.html`` to a folder and return its path; an existing page is replaced as a whole.

    Args:
        result: What ``pilot.json`` holds.
        folder: Where the page goes.
    """
    verdict = result["verdict"]
    return write_page(
        Path(folder) / PAGE_FILE,
        "pilot.html",
        result=result,
        mood=MOODS[verdict["certainty"]],
        charts={name: draw_gains(result["rows"], name) for name in result["questions"]},
        names=list(result["questions"]),
    )


def draw_gains(rows: Sequence[Mapping[str, Any]], measure: str) -> dict[str, Any]:
    """Place the gain of each way, with its interval, on an axis that has the dense model at 0."""
    shown = [row for row in rows if measure in row["gain"]]
    ends = [row["gain"][measure][end] for row in shown for end in ("low", "high")]
    reach = 1.06 * max([0.001, *map(abs, ends)])
    across = Axis(-reach, reach, LEFT, WIDTH - RIGHT)
    bottom = TOP + ROW_HEIGHT * len(shown)
    marks = []
    for place, row in enumerate(shown):
        gain = row["gain"][measure]
        tone = "win" if gain["low"] > 0 else "loss" if gain["high"] < 0 else "none"
        marks.append(
            {
                "title": row["title"],
                "y": TOP + ROW_HEIGHT * (place + 0.5),
                "low": across.place(gain["low"]),
                "mean": across.place(gain["mean"]),
                "high": across.place(gain["high"]),
                "tone": tone,
            }
        )
    return {
        "size": (WIDTH, bottom + 34),
        "frame": (LEFT, TOP, WIDTH - RIGHT, bottom),
        "x_ticks": across.ticks(7),
        "y_ticks": [],
        "zero": across.place(0.0),
        "rows": marks,
    }
