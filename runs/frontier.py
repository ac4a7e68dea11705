"""When do data experts pay? A law of their gain by how full the towers are, tested on a training that it has not seen.

Usage: python runs/frontier.py [--predict]

The gain of four experts over one dense model of equal cost differs between the studies of `runs/experiments.yaml`:
towers, length, pairs. Three laws compete, each a line fitted by least squares to the gains of all seeds:

    fullness   log2(samples / operations of a sample): what a tower of its size has seen
    passes     log2(samples / pairs)
    both       log2 of samples, and log2 of the operations of a sample, each with its own slope

The one with the smallest error on studies that are left out, one after another, is taken. ``--predict`` writes what it
foresees for studies that have no record yet to `frontier.json`, with the law and the date; what is written there is
never replaced, so that a study measured later tests it. Without ``--predict`` the laws and the tests are printed, which
`runs/results.py` also puts into docs/results.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from experiments import base_arm, training_flops
from records import Records, averages, interval, short, table
from scipy.stats import t

HERE = Path(__file__).parent
PREDICTIONS = HERE / "frontier.json"
ARMS = {
    "images": (base_arm(encoder="clip-image"), ""),
    "captions": (base_arm(), "log"),
}
"""Kinds of experts, and how they are mixed: captions by log-probabilities, which their records favour."""
LAWS: Mapping[str, Callable[[float, float, float], list[float]]] = {
    "fullness": lambda samples, flops, _: [samples / flops],
    "passes": lambda samples, _, pairs: [samples / pairs],
    "both": lambda samples, flops, _: [samples, flops],
}
"""What each law knows of a training, of which it takes the logarithm to the base 2: samples, floating-point operations
of a sample, pairs."""


@dataclass(frozen=True)
class Law:
    """A fitted line, with what an interval of a new study's gain needs."""

    name: str
    weights: np.ndarray
    design: np.ndarray
    scatter: float
    """Standard deviation of the gain of a whole study (the mean of its seeds) around the line."""

    @property
    def slopes(self) -> list[tuple[float, float]]:
        """Points of gain for each doubling, and the half widths of their 95 % intervals."""
        free = len(self.design) - len(self.weights)
        errors = self.scatter * np.sqrt(np.diag(np.linalg.pinv(self.design.T @ self.design)))
        halves = t.ppf(0.975, free) * errors if free > 0 else np.full(len(errors), np.nan)
        return [(float(value), float(half)) for value, half in zip(self.weights[1:], halves[1:], strict=True)]

    @property
    def pays_from(self) -> float | None:
        """Of a law with one feature: where, in what was measured, the mean gain is certain; None where nowhere."""
        low, high = self.design[:, 1].min(), self.design[:, 1].max()
        for feature in np.linspace(low, high, 400):
            row = np.array([1.0, feature])
            leverage = float(row @ np.linalg.pinv(self.design.T @ self.design) @ row)
            half = t.ppf(0.975, len(self.design) - 2) * self.scatter * leverage**0.5
            if row @ self.weights > half:
                return float(feature)
        return None

    def foresee(self, features: list[float]) -> tuple[float, float]:
        """Return the gain of a new study, and the half width of its 95 % interval."""
        row = np.array([1.0, *features])
        leverage = float(row @ np.linalg.pinv(self.design.T @ self.design) @ row)
        free = len(self.design) - len(row)
        half = t.ppf(0.975, free) * self.scatter * (1 + leverage) ** 0.5 if free > 0 else float("nan")
        return float(row @ self.weights), float(half)


def fit(name: str, studies: Mapping[str, tuple[list[float], float]]) -> Law:
    """Fit a law to the features and gains of studies, each counting once."""
    design = np.array([[1.0, *features] for features, _ in studies.values()])
    gains = np.array([gain for _, gain in studies.values()])
    weights, *_ = np.linalg.lstsq(design, gains, rcond=None)
    free = max(1, len(gains) - design.shape[1])
    return Law(name, weights, design, float(np.sum((gains - design @ weights) ** 2) / free) ** 0.5)


def gains_of(records: Records, kind: str) -> dict[str, list[float]]:
    """Return the gain of a kind of experts over the dense model of equal cost, by study, for each seed."""
    arm, how = ARMS[kind]
    found = {}
    for name in records.studies:
        own, dense = averages(records.mixed(name, arm, how)), averages(records.equal(name, arm.cost))
        if gains := [own[seed] - dense[seed] for seed in own if seed in dense]:
            found[name] = gains
    return found


def features_of(records: Records, law: str, study: str) -> list[float]:
    """Return what a law knows of a study."""
    plan = records.studies[study]
    flops, pairs = training_flops(plan.train.model), plan.pairs or records.data["pairs"]
    return np.log2(LAWS[law](plan.train.samples, flops, pairs)).tolist()


def inputs(records: Records, law: str, gains: Mapping[str, list[float]]) -> dict[str, tuple[list[float], float]]:
    """Return the features and the mean gain of each study."""
    return {name: (features_of(records, law, name), float(np.mean(values))) for name, values in gains.items()}


def error_of(records: Records, law: str, gains: Mapping[str, list[float]]) -> float:
    """Return the root mean square error on studies that are left out, one after another."""
    wrong = []
    for name, values in gains.items():
        others = {other: found for other, found in gains.items() if other != name}
        foreseen, _ = fit(law, inputs(records, law, others)).foresee(features_of(records, law, name))
        wrong.append(np.mean(values) - foreseen)
    return float(np.sqrt(np.mean(np.square(wrong))))


def choose(records: Records, kind: str, known: set[str] | None = None) -> tuple[Law, dict[str, float]]:
    """Return the law with the smallest error on studies left out, and the errors of all; of known studies alone."""
    gains = {name: g for name, g in gains_of(records, kind).items() if known is None or name in known}
    errors = {law: error_of(records, law, gains) for law in LAWS}
    best = min(errors, key=lambda law: errors[law])
    return fit(best, inputs(records, best, gains)), errors


def predict(records: Records) -> list[dict[str, Any]]:
    """Return what the laws foresee for studies that have no record yet."""
    found = []
    for kind, (arm, _) in ARMS.items():
        gains = gains_of(records, kind)
        law, errors = choose(records, kind)
        for name, study in records.studies.items():
            if name not in gains and arm in study.arms:
                gain, half = law.foresee(features_of(records, law.name, name))
                found.append(
                    {
                        "kind": kind,
                        "study": name,
                        "law": law.name,
                        "gain": round(gain, 2),
                        "half_width": round(half, 2),
                        "errors": {key: round(value, 2) for key, value in errors.items()},
                        "known": sorted(gains),
                        "date": datetime.now(UTC).date().isoformat(),
                    }
                )
    return found


def laws_table(records: Records) -> str:
    """Return the laws, with their errors on studies that are left out."""
    rows = []
    for kind in ARMS:
        law, errors = choose(records, kind)
        for name, error in errors.items():
            own = fit(name, inputs(records, name, gains_of(records, kind)))
            slopes = ", ".join(f"{value:+.2f}\u00a0\u00b1\u00a0{half:.2f}" for value, half in own.slopes)
            rows.append([kind, f"**{name}**" if name == law.name else name, slopes, f"{error:.2f}"])
    return table(["experts of", "law", "points for each doubling", "error on a study left out"], rows, words=2)


def tests_table(records: Records) -> str:
    """Return what was foreseen before it was measured, and what was measured."""
    rows = []
    for line in json.loads(PREDICTIONS.read_text(encoding="utf-8")) if PREDICTIONS.is_file() else []:
        study, gains = records.studies[line["study"]], gains_of(records, line["kind"]).get(line["study"], [])
        inside = abs(np.mean(gains) - line["gain"]) <= line["half_width"] if gains else None
        pairs = study.pairs or records.data["pairs"]
        passes = f"{study.train.samples / pairs:.1f}"
        told = f"{line['gain']:+.1f} \u00b1 {line['half_width']:.1f} ({line['law']})"
        verdict = "" if inside is None else "yes" if inside else "no"
        rows.append([line["kind"], short(study), f"{pairs:,}", passes, told, interval(gains), verdict])
    columns = ["experts of", "towers", "pairs", "passes", "foreseen", "measured", "inside"]
    return table(columns, rows, words=2)


def tests_found(records: Records) -> str:
    """Return how many trainings were as foreseen."""
    lines = json.loads(PREDICTIONS.read_text(encoding="utf-8"))
    inside = []
    for line in lines:
        if gains := gains_of(records, line["kind"]).get(line["study"]):
            inside.append(abs(np.mean(gains) - line["gain"]) <= line["half_width"])
    if not inside:
        return "None of what was foreseen is measured yet."
    return (
        f"Of {len(inside)} gains that were foreseen before their training, {sum(inside)} lie in the interval that was "
        f"written down{'' if len(inside) == len(lines) else f'; {len(lines) - len(inside)} are not measured yet'}. The "
        "laws above are fitted with these trainings too."
    )


def main() -> None:
    """Print the laws and their tests; with ``--predict`` write down what they foresee."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=Path, default=HERE / "experiments.jsonl")
    parser.add_argument("--predict", action="store_true")
    arguments = parser.parse_args()
    records = Records(arguments.records)
    if arguments.predict:
        before = json.loads(PREDICTIONS.read_text(encoding="utf-8")) if PREDICTIONS.is_file() else []
        known = {(line["kind"], line["study"]) for line in before}
        new = [line for line in predict(records) if (line["kind"], line["study"]) not in known]
        PREDICTIONS.write_text(json.dumps([*before, *new], indent=2) + "\n", encoding="utf-8")
    print(laws_table(records), tests_table(records), sep="\n\n")


if __name__ == "__main__":
    main()
