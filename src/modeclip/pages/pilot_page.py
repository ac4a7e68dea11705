"""The page of a pilot: what to train and how sure that is, and what every way gains and costs.

The picture has an interval for each way; a way whose interval touches the line at 0 is not told from the dense model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modeclip.pages.charts import draw_gains
from modeclip.pages.html import write_page

PAGE_FILE = "pilot.html"
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
