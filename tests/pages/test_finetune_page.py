"""The page of a fine-tuning shows the numbers of the result and needs nothing but itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from modeclip.adapting.finetuning import AlphaPoint, FinetuneResult, TableRow
from modeclip.evaluation.intervals import Interval
from modeclip.pages.finetune_page import write_finetuning


def make_interval(mean: float) -> Interval:
    return Interval(mean=mean, low=mean - 0.02, high=mean + 0.02)


@pytest.fixture
def result() -> FinetuneResult:
    curve = [AlphaPoint(alpha=n / 4, own=0.5 + 0.1 * n - 0.015 * n * n, general=0.61 - 0.02 * n) for n in range(5)]
    rows = [
        TableRow(
            name=name,
            num_images=1200,
            before=make_interval(before),
            tuned=make_interval(before + 0.2),
            after=make_interval(before + 0.1),
            change=make_interval(0.1 if name == "own set" else -0.01),
        )
        for name, before in (("own set", 0.5), ("general tasks", 0.61), ("lucide", 0.63), ("heroicons", 0.59))
    ]
    return FinetuneResult(
        folder="out",
        model="modeclip-icon",
        digest="0" * 16,
        alpha=0.5,
        num_train=4000,
        num_held_out=1200,
        num_duplicates=12,
        num_classes=40,
        batch_size=128,
        steps=240,
        planned_steps=310,
        best_step=180,
        tolerance=0.01,
        checks=tuple((60 * n, 0.5 + 0.2 * n - 0.033 * n * n) for n in range(1, 5)),
        curve=tuple(curve),
        table=tuple(rows),
    )


def test_page_holds_the_numbers_in_one_file(result: FinetuneResult, tmp_path: Path) -> None:
    page = write_finetuning(result, tmp_path)
    assert page == tmp_path / "finetune.html"
    text = page.read_text(encoding="utf-8")
    assert "Content-Security-Policy" in text
    assert "http" not in text.replace("http-equiv", "")
    assert text.count('<path class="curve') == 3
    assert "After, alpha 0.5" in text
    assert "240 of 310 steps" in text
    for row in result.table:
        assert f"{100 * row.after.mean:.1f} <span>{100 * row.after.low:.1f} to {100 * row.after.high:.1f}" in text
    assert "−1.0 <span>−3.0 to +1.0</span>" in text


def test_names_stay_text_and_general_tasks_may_be_absent(result: FinetuneResult, tmp_path: Path) -> None:
    points = tuple(replace(point, general=None) for point in result.curve)
    hostile = replace(result, model="<script>alert(1)</script>", curve=points, table=result.table[:1])
    text = write_finetuning(hostile, tmp_path).read_text(encoding="utf-8")
    assert "<script>" not in text
    assert text.count('<path class="curve') == 2
