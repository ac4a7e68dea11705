"""Ways to train that were tried against one dense model of their cost, in one table: what should I try first?

The rows come from the records of all studies: experts, subjects, batches, one model out of many, curation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import curation_report
import demo_report
import names_report
import numpy as np
import one_model_report
import subjects_report
from experiments import PARTS, QUARTER, base_arm
from findings import EIGHT_IMAGES, FINISHED_IMAGES, IMAGE_ARM, Gain, at_equal_cost
from records import Records, interval, table

from modeclip.data.tasks.names import CLASS_NAMES
from modeclip.pipeline.known_names import NAMES

HERE = Path(__file__).parent

Lines = Sequence[Mapping[str, Any]]
ONE_MODEL = {
    "sparse upcycling": "sparse upcycling",
    "CLIP-MoE, data experts": "CLIP-MoE of data experts",
    "CLIP-MoE, DMU": "CLIP-MoE, diversified multiplet upcycling",
    "soup of data experts": "soup of data experts",
    "distilled from the mixture": "one model distilled from the mixture",
}
"""Cells of `runs/one_model.py`, and what the table calls them."""
DEMOS = {"demo.jsonl": "`modeclip-icon`", "demo_short.jsonl": "`xs`"}
"""Records of the demo's question, and the towers."""
MORE = 1.05
"""What costs more than so many times the dense model, or less than its inverse, says so."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A way to train, and what it gains in points."""

    way: str
    where: str
    gain: str
    mean: float
    is_certain: bool
    cost: float = 1.0
    """What it costs, the dense model's cost being 1."""

    @property
    def verdict(self) -> str:
        """Say whether it pays, and at which cost if it is another."""
        words = ("gains" if self.mean > 0 else "loses") if self.is_certain else "not certain"
        return words + ("" if 1 / MORE < self.cost < MORE else f", at {self.cost:.2f} times the cost")


def rows_of(records: Records, subjects: subjects_report.Found, one_model: Lines, curation: Lines) -> list[Row]:
    """Return the ways that have records, the largest gain first."""
    found = [
        *_known(records, subjects),
        *_demo(),
        *_mixtures(records),
        *_batches(records),
        *_one_model(one_model),
        *_curated(curation),
    ]
    return sorted(found, key=lambda row: -row.mean)


def ways_table(rows: list[Row]) -> str:
    """Return the table."""
    cells = [[row.way, row.where, f"**{row.gain}**" if row.is_certain else row.gain, row.verdict] for row in rows]
    return table(["way to train", "measured on", "points", "verdict"], cells, words=2)


def _of(way: str, where: str, gain: Gain, cost: float = 1.0) -> Iterator[Row]:
    if len(gain.values) > 1:
        yield Row(way=way, where=where, gain=str(gain), mean=gain.mean, is_certain=gain.is_certain, cost=cost)


def _known(records: Records, subjects: subjects_report.Found) -> Iterator[Row]:
    gained = subjects_report.known(subjects)
    if gained:
        for side, words in enumerate(("on these names", "on other subjects")):
            points = np.stack([each[side] for each in gained.values()], axis=1)
            yield Row(
                way=f"one expert for known names, {words}",
                where=f"{len(gained)} subjects of held-out icons, `xxs`, 3.1 passes",
                gain=subjects_report.both(points),
                mean=float(points.mean()),
                is_certain=subjects_report.is_certain(points),
            )
    for kind, words in names_report.KINDS.items():
        experts = names_report.read(records, kind)
        own = Gain([float(np.mean(one.own)) for one in experts])
        passes = records.studies[names_report.STUDY].train.samples / records.data["pairs"]
        where = f"{len(experts)} icon sets, each on its own (interval over sets)"
        yield from _of(words, f"{where}, `xxs`, {passes:.1f} passes, {names_report.seeds_of(experts)}", own)


def _demo() -> Iterator[Row]:
    """Yield what the expert for the demo's names does, at the demo's length and after a short training."""
    for name, words in DEMOS.items():
        if not (HERE / name).exists():
            continue
        decision = demo_report.read(HERE / name)[-1]["decision"]
        row = next(row for row in decision["rows"] if row["name"] == NAMES)
        mean, low, high = (100 * row["gain"][CLASS_NAMES][key] for key in ("mean", "low", "high"))
        yield Row(
            way=f"one expert for {len(decision['classnames'])} known names, on these names",
            where=f"the demo's held-out sets, {words}, {row['samples'] / 1e6:.2f} million samples",
            gain=f"{mean:+.1f}\u00a0({low:+.1f}\u00a0to\u00a0{high:+.1f})",
            mean=mean,
            is_certain=low > 0 or high < 0,
        )


def _mixtures(records: Records) -> Iterator[Row]:
    studies = {
        "main": "`xxs`, 3.1 passes",
        "long-xxxs": "`xxxs`, 18.7 passes",
        QUARTER: "`xxxs`, 18.7 passes, a quarter of the pairs",
    }
    for study, where in studies.items():
        yield from _of("4 experts on clusters of images", where, at_equal_cost(records, study, IMAGE_ARM))
        yield from _of("8 experts on clusters of images", where, at_equal_cost(records, study, EIGHT_IMAGES))
        yield from _of("4 experts on clusters of captions", where, at_equal_cost(records, study, base_arm()))
        logs = at_equal_cost(records, study, base_arm(), "log")
        yield from _of("4 experts on clusters of captions, log-probabilities", where, logs)
        full = at_equal_cost(records, study, base_arm(kind="full"))
        yield from _of("4 models of all data, averaged", where, full)
        for part in (24, 27):
            late = at_equal_cost(records, study, base_arm(encoder="clip-image", part=part))
            yield from _of(f"4 experts on clusters of images, parted at {part}", where, late)
        on = at_equal_cost(records, study, FINISHED_IMAGES)
        yield from _of("a finished model that goes on as 4 experts on clusters of images", where, on)
        sets = at_equal_cost(records, study, base_arm(encoder="clip-sets"))
        yield from _of("4 experts on groups of whole icon sets", where, sets)


def _batches(records: Records) -> Iterator[Row]:
    studies = {"batches": "`xxs`, 3.1 passes", QUARTER: "`xxxs`, 18.7 passes, a quarter of the pairs"}
    for study, where in studies.items():
        dense = records.equal(study, PARTS)
        for arm in records.studies[study].arms:
            if arm.kind == "pure" and arm.part == 16 and not arm.batch:
                of = "images" if arm.encoder == "clip-image" else "captions"
                gain = Gain.of(records.tasks(study, arm.name), dense)
                yield from _of(f"one dense model, batches of one of {arm.experts} clusters of {of}", where, gain)


def _one_model(lines: Lines) -> Iterator[Row]:
    found = one_model_report.by_cell(lines)
    flops = {cell: np.mean([values["flops"] for values in of.values()]) for cell, of in found.items()}
    for cell, words in ONE_MODEL.items():
        times = flops.get(cell, 1.0) / flops.get(one_model_report.EQUAL_COST, 1.0)
        gains = one_model_report.gains(lines, cell, "tasks", one_model_report.EQUAL_COST)
        yield from _of(words, "`xs`, from a base of 0.52 million samples", Gain(gains), float(times))


def _curated(lines: Lines) -> Iterator[Row]:
    tested = [gain for gain in curation_report.gains(lines) if gain.half is not None]
    raw = interval(list(curation_report.averages(lines).get(curation_report.RAW, {}).values()))
    chosen = [gain for gain in tested if gain.corrected is not None and gain.selection != curation_report.TWICE]
    for gain in (chosen[0], chosen[-1]) if chosen else ():
        yield Row(
            way=f"curated pairs: {gain.selection}",
            where=f"a pool with known noise, raw {raw} %, equal samples",
            gain=f"{gain.mean:+.1f}\u00a0±\u00a0{gain.half:.1f}",
            mean=gain.mean,
            is_certain=gain.verdict in {"pays", "loses"},
        )
