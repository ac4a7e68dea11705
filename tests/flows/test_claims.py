"""The table of the paper's claims: its verdicts are those of plain loops, and the changed pictures are repeatable."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

RUNS = Path(__file__).parents[2] / "runs"
CAPTIONS, IMAGES = "mode-k4-m1024-minilm-p16-matched", "mode-k4-m1024-clip-image-p16-matched"


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    """The scripts, which import each other as they lie in their folder."""
    sys.path.insert(0, str(RUNS))
    import claims
    import claims_report
    import records

    yield {module.__name__: module for module in (claims, claims_report, records)}
    sys.path.remove(str(RUNS))


def written(folder: Path, rows: dict[str, list[dict[str, Any]]], study: str = "main") -> Path:
    """Write rows, whose values are in the order of the seeds, as the scripts record them."""
    path = folder / f"{study}.jsonl"
    lines = [
        {"study": study, "seed": seed, "row": row, "values": values}
        for row, of_seeds in rows.items()
        for seed, values in enumerate(of_seeds)
    ]
    lines.append({"study": "data", "seed": 0, "row": "tasks", "values": {"tasks": ["a", "b"], "pairs": 9}})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def half_width(values: list[float]) -> float:
    """Return that of the 95 % interval of three values: t(0.975, 2) = 4.3027."""
    middle = sum(values) / 3
    return 4.3027 * math.sqrt(sum((value - middle) ** 2 for value in values) / 2 / 3)


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ([1.0, 1.2, 1.1], "holds"),
        ([-1.0, -1.2, -1.1], "does not hold"),
        ([1.0, 3.0, 0.1], "not certain"),
        ([-1.0, 0.0, -0.4], "not certain"),
        ([2.0], "not certain"),
        ([], "not tested"),
    ],
)
def test_a_claim_holds_where_the_interval_of_its_difference_lies_above_0(
    scripts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gains: list[float], verdict: str
) -> None:
    monkeypatch.setattr(scripts["claims_report"], "SUBJECTS", tmp_path / "none.jsonl")
    if len(gains) == 3:
        low = sum(gains) / 3 - half_width(gains)
        high = sum(gains) / 3 + half_width(gains)
        assert {"holds": low > 0, "does not hold": high < 0, "not certain": low < 0 < high}[verdict]
    report = scripts["claims_report"]
    dense = [10.0, 12.0, 11.0][: len(gains)]
    rows = {
        "part-32": [{"tasks": [value - 4, value + 4]} for value in dense],
        "mode-k4-m1024-minilm-p16-paper per_class": [
            {"tasks": [value + gain, value + gain]} for value, gain in zip(dense, gains, strict=True)
        ],
    }
    records = scripts["records"].Records(written(tmp_path, rows))
    measured = report.Measured(tmp_path / "nothing.jsonl")
    found = report.claims(records, measured)
    tested = {claim.tested: claim.verdict for claim in found if claim.verdict != "not tested"}
    asked = "MoDE-4 parted at 16, `per_class`, against dense on its own schedule"
    assert tested == ({asked: verdict} if gains else {})
    table = report.claims_table(records, measured)
    assert table.count("\n") == len(found) + 1
    if gains:
        row = next(line for line in table.splitlines() if f"| {asked} |" in line)
        assert f"| {verdict} | {sum(gains) / len(gains):+.1f}" in row


def test_gains_on_changed_pictures_are_means_over_the_changes(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    values = {
        (shift, model): draw.uniform(5, 9, (3, 2)).round(3)
        for shift in ("as drawn", "rotated", "noise")
        for model in ("dense", CAPTIONS)
    }
    rows = {
        f"{shift}: {model}": [{"tasks": seed.tolist(), "logs": (seed + 1).tolist()} for seed in found]
        for (shift, model), found in values.items()
    }
    rows["labelled: dense"] = rows["trained on: dense"] = [{"probe": 40.0}] * 3
    report = scripts["claims_report"]
    measured = report.Measured(written(tmp_path, rows))
    assert measured.shifts == ["rotated", "noise"]
    expected = [
        sum(
            sum(values[shift, CAPTIONS][seed]) / 2 - sum(values[shift, "dense"][seed]) / 2
            for shift in ("rotated", "noise")
        )
        / 2
        for seed in range(3)
    ]
    assert measured.shifted(report.CAPTIONS, "cosines").values == pytest.approx(expected)
    assert measured.shifted(report.CAPTIONS, "log-probabilities").values == pytest.approx([e + 1 for e in expected])
    assert measured.shifted(report.IMAGES, "cosines").values == []
    assert report.shifts_table(measured).count("\n") == 4


def test_the_best_expert_and_the_order_of_experts(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    zero_shot, probe = [[10, 20, 30, 40], [1, 2, 3, 4]], [[4.0, 3.0, 2.0, 1.0], [5.0, 6.0, 8.0, 7.0]]
    rows = {
        f"labelled: {CAPTIONS}-{k}": [{"zero-shot": zero_shot[s][k], "probe": probe[s][k]} for s in range(2)]
        for k in range(4)
    }
    rows[f"labelled: {CAPTIONS}-3"].append({"zero-shot": 1, "probe": 1})  # a seed with one expert only
    measured = scripts["claims_report"].Measured(written(tmp_path, rows))
    assert {seed: value.tolist() for seed, value in measured.best("probe").items()} == {0: [4.0], 1: [8.0]}
    # Spearman: 1 - 6 * sum of squared differences of ranks / (n (n^2 - 1)) = 1 - 6 * 20 / 60 and 1 - 6 * 2 / 60
    assert measured.agreement("probe").values == pytest.approx([-1.0, 0.8])


class Drawings:
    """Pictures of a task, read by number."""

    digest = "drawings"

    def digests(self) -> list[bytes]:
        return [b"one", b"other", b"third"]

    def __len__(self) -> int:
        return 3

    def read(self, rows: np.ndarray) -> list[Image.Image]:
        pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)
        return [Image.fromarray(pixels[row]) for row in rows]


def test_changed_pictures_do_not_depend_on_what_is_read_with_them(scripts: dict[str, ModuleType]) -> None:
    claims, seen = scripts["claims"], set()
    plain = Drawings()
    for shift in claims.SHIFTS:
        images = claims.ShiftedImages(images=plain, shift=shift)
        together = images.read(np.arange(3))
        alone = images.read(np.array([2]))[0]
        assert np.array_equal(np.asarray(together[2]), np.asarray(alone)), shift
        assert {(one.size, one.mode) for one in together} == {((32, 32), "RGB")}
        assert not np.array_equal(np.asarray(together[0]), np.asarray(plain.read(np.array([0]))[0]))
        seen.add(images.digest)
    assert len(seen | {plain.digest}) == len(claims.SHIFTS) + 1
    white = Image.new("RGB", (32, 32), "white")
    draw = np.random.default_rng(0)
    assert claims.inverted(white, draw).getcolors() == [(1024, (0, 0, 0))]
    for change in (claims.coloured, claims.rotated, claims.smaller):
        assert change(white, draw).getcolors() == [(1024, (255, 255, 255))]
    black = claims.smaller(Image.new("RGB", (32, 32), "black"), draw)
    assert sorted(black.getcolors()) == [(1024 - claims.SMALLER**2, (255, 255, 255)), (claims.SMALLER**2, (0, 0, 0))]
