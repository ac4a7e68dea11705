"""The page of a pilot holds its sentence, its rows and an interval for each, and needs nothing but itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from modeclip.pages.charts import draw_gains
from modeclip.pages.pilot_page import write_pilot
from support import parse_page


def row(name: str, **gain: tuple[float, float, float]) -> dict[str, Any]:
    recall = {f"{side}_retrieval_recall@{k}": 0.01 * k for side in ("image", "text") for k in (1, 5)}
    return {
        "name": name,
        "title": f"way <{name}>",
        "gain": {measure: dict(zip(("mean", "low", "high"), own, strict=True)) for measure, own in gain.items()},
        "score": {"retrieval": 0.123},
        "recall": recall,
        "seconds": 1234.4,
        "cost": 0.987,
        "pairs": 800,
        "towers": 2.333,
        "megabytes": 6.54,
        "models": [],
    }


@pytest.fixture
def result() -> dict[str, Any]:
    rows = [row("dense"), row("a", retrieval=(0.02, 0.01, 0.03)), row("b", retrieval=(-0.02, -0.05, 0.01))]
    plan = {"num_pairs": 800, "model": "modeclip-icon-xxs", "samples": 6400, "seeds": 3}
    return {
        "verdict": {"choice": "a", "certainty": "sure", "sentence": "Train <a>, sure."},
        "outlook": "Later <more>.",
        "measure": "retrieval",
        "chance": {"retrieval": 0.01},
        "questions": {"retrieval": 150},
        "num_classes": 0,
        "rows": rows,
        "plan": plan,
        "sample": {"source": "my/pairs", "source_pairs": 5000, "is_counted": False},
        "minutes": 4.0,
        "notes": ["trunk is left out"],
    }


def test_page_holds_the_rows_and_the_sentence(result: dict[str, Any], tmp_path: Path) -> None:
    page = write_pilot(result, tmp_path)
    text = page.read_text(encoding="utf-8")
    assert "Content-Security-Policy" in text
    assert "http" not in text.replace("http-equiv", "")
    root = parse_page(page)
    for words in (
        "Train <a>, sure.",
        "Later <more>.",
        "Sure",
        "way <b>",
        "+2.0",
        "1,234",
        "2.33",
        "about 5,000",
        "trunk is left out",
    ):
        assert words in root.text, words
    assert len(root.all("circle", class_="dot")) == 2
    del result["outlook"]  # of an earlier version
    assert "Later" not in parse_page(write_pilot(result, tmp_path)).text


def test_a_way_is_drawn_by_what_its_interval_says(result: dict[str, Any]) -> None:
    chart = draw_gains(result["rows"], "retrieval")
    won, open_ = chart["rows"]
    assert (won["tone"], open_["tone"]) == ("win", "none")
    assert chart["zero"] < won["low"] < won["mean"] < won["high"]
    assert open_["low"] < chart["zero"] < open_["high"]
    left, _, right, _ = chart["frame"]
    assert all(left <= mark[end] <= right for mark in chart["rows"] for end in ("low", "high"))
