"""Accuracy by what a training has cost, in samples, operations and seconds: tables and scaling laws."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from experiments import PARTS, Study, training_flops
from records import Records, against, averages, label, mean, plain_arms, short, table

from modeclip.evaluation.intervals import Interval
from modeclip.evaluation.scaling import MIN_SIZES, ScalingResult, fit_scaling, read_points


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A dense model or a mixture with everything that its training has cost."""

    study: Study
    family: str
    name: str
    parts: int
    scores: dict[int, np.ndarray]

    @property
    def samples(self) -> float:
        """Samples that all of its models have trained on together, the seed model included."""
        return self.parts * self.study.train.samples / PARTS

    @property
    def sample_flops(self) -> float:
        """Floating-point operations of a training sample."""
        return training_flops(self.study.train.model)

    @property
    def flops(self) -> float:
        """Floating-point operations of the whole training."""
        return self.samples * self.sample_flops

    @property
    def average(self) -> float:
        """Mean accuracy over tasks and seeds."""
        return float(np.mean(list(averages(self.scores).values())))


def entries(records: Records) -> list[Entry]:
    """Return all dense models and plain mixtures on all pairs, the cheapest first."""
    found = []
    for study in records.studies.values():
        if study.pairs or not plain_arms(study):
            continue
        dense = {PARTS: records.equal(study.name, PARTS)}
        dense |= {arm.parts: records.tasks(study.name, arm.name) for arm in study.arms if arm.kind == "total"}
        for parts, scores in dense.items():
            found.append(Entry(study=study, family="dense", name="dense", parts=parts, scores=scores))
        for arm in plain_arms(study):
            scores = records.mixed(study.name, arm)
            of = " of images" if arm.encoder == "clip-image" else ""
            family = f"MoDE-{arm.experts}{of} {arm.budget} p{arm.part}"
            found.append(Entry(study=study, family=family, name=label(arm), parts=arm.cost, scores=scores))
    return sorted((entry for entry in found if entry.scores), key=lambda entry: entry.flops)


def cost_cells(records: Records, entry: Entry) -> list[str]:
    """Return million samples, TFLOPs and core seconds of a training."""
    rate = next(iter(records.values("data", "rates").values()), {}).get(entry.study.train.model)
    seconds = f"{entry.samples / rate:,.0f}" if rate else ""
    return [f"{entry.samples / 1e6:.2f}", f"{entry.flops / 1e12:,.1f}", seconds]


def size_table(records: Records) -> str:
    """Everything by its training cost, in samples, operations and seconds."""
    rows = [
        [short(entry.study), entry.name, *cost_cells(records, entry), mean(entry.scores)] for entry in entries(records)
    ]
    return table(["towers", "model", "million samples", "TFLOPs", "core seconds", "average"], rows)


def headline_table(records: Records) -> str:
    """For each dense model the cheapest mixture, and dense model, of smaller towers that reaches it."""
    rows, found = [], entries(records)
    rates = next(iter(records.values("data", "rates").values()), {})
    for large in (entry for entry in found if entry.family == "dense"):
        smaller = [entry for entry in found if entry.sample_flops < large.sample_flops]
        if not smaller:
            continue
        for kind, is_kind in (("mixture", False), ("dense", True)):
            of_kind = [entry for entry in smaller if (entry.family == "dense") == is_kind]
            best = next((entry for entry in of_kind if entry.average >= large.average), None)
            shown = [short(large.study), f"{large.samples / 1e6:.2f}", mean(large.scores)] if not is_kind else [""] * 3
            if best is None:
                highest = max(of_kind, key=lambda entry: entry.average)
                rows.append([*shown, f"no {kind}", "", mean(highest.scores) + " at most"])
                rows[-1] += [against(highest.scores, large.scores), "", "", ""]
                continue
            seconds = ""
            if rates:
                of_best, of_large = rates[best.study.train.model], rates[large.study.train.model]
                seconds = f"{best.samples / of_best / (large.samples / of_large):.0%}"
            ratios = [f"{best.samples / large.samples:.0%}", f"{best.flops / large.flops:.0%}", seconds]
            name = f"{short(best.study)}, {best.name}"
            gain = against(best.scores, large.scores)
            rows.append([*shown, name, f"{best.samples / 1e6:.2f}", mean(best.scores), gain, *ratios])
    columns = ["larger dense", "million samples", "average", "the cheapest that reaches it, of smaller towers"]
    columns += ["million samples", "average", "against it", "cost in samples", "in FLOPs", "in seconds"]
    return table(columns, rows)


def scaling_lines(records: Records) -> list[dict[str, Any]]:
    """Return a line for each model and seed, as `modeclip scaling` reads them, of families that it can fit."""
    found = entries(records)
    sizes: dict[str, set[float]] = {}
    for entry in found:
        sizes.setdefault(entry.family, set()).add(entry.flops)
    return [
        {
            "name": f"{short(entry.study)} {entry.samples / 1e6:.1f}M",
            "family": entry.family,
            "flops_per_sample": entry.sample_flops,
            "samples": entry.samples,
            "accuracy": round(value / 100, 6),
            "seed": seed,
        }
        for entry in found
        if len(sizes[entry.family]) >= MIN_SIZES
        for seed, value in averages(entry.scores).items()
    ]


def laws_of(records: Records) -> ScalingResult:
    """Fit the scaling laws of dense models and mixtures."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lines.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in scaling_lines(records)), encoding="utf-8")
        return fit_scaling(read_points([path]))


def scaling_table(records: Records) -> str:
    """Return the law of each family."""

    def ends(value: Interval, form: str) -> str:
        return f"{value.mean:{form}} ({value.low:{form}} to {value.high:{form}})"

    result = laws_of(records)
    rows = [
        [
            law.family,
            f"{law.num_points} of {sum(point.family == law.family for point in result.points)}",
            ends(law.A, ".2f"),
            ends(law.b, ".4f"),
            "" if law.compute_ratio is None else ends(law.compute_ratio, ".2g"),
        ]
        for law in result.laws
    ]
    columns = ["family", "points on its frontier", "A", "b", "times the compute for dense's lowest error"]
    return table(columns, rows)
