"""What `runs/measure.py` has recorded, and the words of the tables: means, intervals, differences."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from experiments import MAIN, PARTS, Arm, Study, base_arm, read_studies
from scipy.stats import t

TUNED_EVERY = 4  # every fourth task, by name, chooses settings; the others confirm them
CHOSE_BEFORE = ("lucide", "heroicons", "octicon", "fa7-brands", "feather")
"""The demo's tasks, where the default rule was first chosen, under the names that they have here, and the set of which
lucide is a fork."""
BY_SEED = Mapping[int, np.ndarray]
OF = {
    "clip-image": " of images",
    "clip-sets": " of whole icon sets",
    "clip-both": " of images and captions",
    "clip": " of captions by the seed model",
    "tfidf": " of captions by TF-IDF",
    "minilm-set": " of captions with their set's name",
}
"""What tables call the clusters of an encoder other than MiniLM of captions."""


class Records:
    """What was measured, by study, row and seed."""

    def __init__(self, path: Path) -> None:
        self.lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        self._found: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
        for line in self.lines:
            self._found.setdefault((line["study"], line["row"]), {})[line["seed"]] = line["values"]
        self.data = self.values("data", "tasks")[0]
        """What was asked first, images that training has too among it."""
        self.asked = next(line["values"] for line in reversed(self.lines) if is_exam(line))
        """What is asked now, without such images."""
        self.tuned = np.arange(len(self.data["tasks"])) % TUNED_EVERY == 0
        self.confirmed = ~self.tuned & ~np.isin(self.data["tasks"], CHOSE_BEFORE)
        studies = {study.name: study for study in read_studies()[1]}
        rate = studies[MAIN].train.learning_rate
        self.studies = {name: study for name, study in studies.items() if study.train.learning_rate == rate}
        self.other_rates = {name: study for name, study in studies.items() if name not in self.studies}

    def values(self, study: str, row: str) -> dict[int, dict[str, Any]]:
        """Return the numbers of a row by seed."""
        return self._found.get((study, row), {})

    def tasks(self, study: str, row: str, name: str = "tasks") -> dict[int, np.ndarray]:
        """Return the accuracy on each task by seed."""
        return {seed: np.array(values[name]) for seed, values in sorted(self.values(study, row).items())}

    def equal(self, study: str, parts: int) -> dict[int, np.ndarray]:
        """Return the dense model whose own schedule has so many parts, or one part more where there is none."""
        if parts == PARTS:
            return self.tasks(study, "part-32")
        return self.tasks(study, f"total-{parts}") or self.tasks(study, f"total-{parts + 1}")

    def mixed(self, study: str, arm: Arm, how: str = "") -> dict[int, np.ndarray]:
        """Return the accuracies of an arm's mixture: by its own weights, `uniform`, or by log-probabilities (`log`)."""
        if how == "log":
            return self.tasks(study, f"{arm.name} mixing", "logarithms of probabilities")
        rule = how or ("per_class" if arm.kind == "mode" else "uniform")
        return self.tasks(study, f"{arm.name} {rule}")


def is_exam(line: Mapping[str, Any]) -> bool:
    """Tell whether a record says what was asked."""
    return line["study"] == "data" and line["row"].startswith("tasks")


def interval(values: Sequence[float]) -> str:
    """Return a mean with the half width of its 95 % t-interval."""
    if not len(values):
        return ""
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:.1f}"
    half = t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{mean:.1f}\u00a0±\u00a0{half:.1f}"  # stays on one line of a narrow column


def averages(scores: BY_SEED, chosen: np.ndarray | None = None) -> dict[int, float]:
    """Return the plain mean over the tasks, by seed."""
    return {seed: float(values[slice(None) if chosen is None else chosen].mean()) for seed, values in scores.items()}


def mean(scores: BY_SEED, chosen: np.ndarray | None = None) -> str:
    """Return the interval of the average."""
    return interval(list(averages(scores, chosen).values()))


def against(scores: BY_SEED, other: BY_SEED, chosen: np.ndarray | None = None) -> str:
    """Return the mean difference of two rows with its interval over the seeds that both have."""
    mine, theirs = averages(scores, chosen), averages(other, chosen)
    text = interval([mine[seed] - theirs[seed] for seed in mine if seed in theirs])
    return text if not text or text.startswith("-") else f"+{text}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """Return a Markdown table, whose first columns hold words and the others numbers."""
    if not rows:
        return "Not computed yet."
    lines = [f"| {' | '.join(columns)} |", "|---" * words + "|---:" * (len(columns) - words) + "|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def label(arm: Arm) -> str:
    """Return what a table calls an arm of several models, by all in which it differs from the usual ones."""
    kind = {"full": "Full", "random": "Random"}.get(arm.kind, "MoDE")
    words = [f"{kind}-{arm.experts}{OF.get(arm.encoder, '')}", arm.budget, f"parted at {arm.part}"]
    words += [] if arm.fine == base_arm().fine else [f"M = {arm.fine:,}"]
    words += [f"{100 * arm.outside:g} % from outside"] if arm.outside else []
    words += [] if arm.trainable == "all" else [f"`{arm.trainable}`"]
    words += [] if arm.rate == 1 else [f"{arm.rate:g} times the learning rate"]
    words += [f"{arm.extra} parts more"] if arm.extra else []
    return ", ".join(words)


def plain_arms(study: Study) -> list[Arm]:
    """Return the arms that differ from the base arm in experts, parting, budget, and captions or images alone."""
    order = itertools.product(("minilm", "clip-image"), ("matched", "paper"), (16, 27), (2, 4, 8))
    wanted = [base_arm(encoder=e, budget=b, part=p, experts=k) for e, b, p, k in order]
    return [arm for arm in wanted if arm in study.arms]


def short(study: Study) -> str:
    """Return the size of a study's towers."""
    return study.train.model.removeprefix("modeclip-icon-")
