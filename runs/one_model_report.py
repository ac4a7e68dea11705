"""What `runs/one_model.py` has recorded: scores, costs and ablations, and whether upcycling gains fine detail."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from records import interval, table

HERE = Path(__file__).parent
BASE, DMU, EQUAL_COST = "base", "CLIP-MoE, DMU", "dense, equal cost"
SPARSE, SPARSE_COST = "sparse upcycling", "dense, equal cost to sparse upcycling"
COMPARED = (SPARSE, "CLIP-MoE, data experts", DMU, "soup of data experts", "distilled from the mixture")
"""Ways that are named in short."""
MEASURES = {
    "tasks": "zero-shot",
    "image_retrieval_recall@1": "text to image, R@1",
    "text_retrieval_recall@1": "image to text, R@1",
}
"""What a model is worth, and what a table calls it."""
COSTS = {
    "samples": ("samples, k", 1e3, "{:,.0f}"),
    "flops": ("training, TFLOP", 1e12, "{:,.1f}"),
    "seconds": ("seconds", 1, "{:,.0f}"),
    "inference_flops": ("image, MFLOP", 1e6, "{:.1f}"),
    "ms_per_image": ("ms an image", 1, "{:.3f}"),
    "times_base": ("times the base", 1, "{:.2f}"),
    "parameters": ("parameters, M", 1e6, "{:.2f}"),
    "active_parameters": ("of these active, M", 1e6, "{:.2f}"),
}
"""What a model costs: heading, unit, format."""

Lines = Sequence[Mapping[str, Any]]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return what was measured so far."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def read_plan(path: Path = HERE / "one_model.yaml") -> dict[str, Any]:
    """Return which models there are."""
    plan: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return plan


def by_cell(lines: Lines) -> dict[str, dict[int, Mapping[str, Any]]]:
    """Return what was measured by model and seed."""
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for line in lines:
        found.setdefault(line["cell"], {})[line["seed"]] = line["values"]
    return found


def scores(lines: Lines, cell: str, measure: str) -> dict[int, float]:
    """Return a model's score by seed, in percent; ``tasks`` is the plain mean over the held-out sets."""
    return {
        seed: float(np.mean(list(values["tasks"].values()))) if measure == "tasks" else values["retrieval"][measure]
        for seed, values in sorted(by_cell(lines).get(cell, {}).items())
    }


def gains(lines: Lines, cell: str, measure: str, reference: str) -> list[float]:
    """Return by how much a model is better than another of the same seed, for each seed that has both."""
    theirs = scores(lines, reference, measure)
    return [value - theirs[seed] for seed, value in scores(lines, cell, measure).items() if seed in theirs]


def score_table(lines: Lines, cells: Sequence[str], reference: str, words: str) -> str:
    """Return a row for each model: its scores, and their differences to those of another."""
    rows = []
    for cell in cells:
        row = [cell]
        for measure in MEASURES:
            row += [
                interval(list(scores(lines, cell, measure).values())),
                _gain(lines, cell, measure, reference) if cell != reference else "",
            ]
        if row[1]:
            rows.append(row)
    return table(["model", *(column for word in MEASURES.values() for column in (word, words))], rows)


def cost_table(lines: Lines, cells: Sequence[str]) -> str:
    """Return a row for each model: what it costs to make and to use, means over the seeds."""
    found, rows = by_cell(lines), []
    for cell in (cell for cell in cells if cell in found):
        means = {key: float(np.mean([values[key] for values in found[cell].values()])) for key in COSTS}
        rows.append([cell, *(form.format(means[key] / unit) for key, (_, unit, form) in COSTS.items())])
    return table(["model", *(words for words, _, _ in COSTS.values())], rows)


def verdict(lines: Lines) -> str:
    """Say whether DMU gains fine detail: recall in retrieval, against the base and against dense at equal cost."""
    parts = []
    for measure in list(MEASURES)[1:]:
        for reference in (BASE, EQUAL_COST):
            found = gains(lines, DMU, measure, reference)
            if len(found) < 2:
                return "Not measured with several seeds yet, so there is no verdict on fine detail."
            text = interval(found)
            mean, half = (float(number) for number in text.replace("\u00a0", "").split("±"))
            word = "gains" if mean - half > 0 else "loses" if mean + half < 0 else "does not surely differ by"
            parts.append(f"{MEASURES[measure]}: {word} {text} points against {reference}")
    return f"DMU's claim is fine detail, which retrieval must show. {'; '.join(parts)} (95 % intervals over the seeds)."


def brief(lines: Lines) -> str:
    """Say in short what the ways are worth at equal training cost."""
    seeds = len(scores(lines, EQUAL_COST, "tasks"))
    if seeds < 2 or not all(gains(lines, cell, "tasks", EQUAL_COST) for cell in COMPARED):
        return "Not measured with several seeds yet."
    base, dense = (interval(list(scores(lines, cell, "tasks").values())) for cell in (BASE, EQUAL_COST))
    ways = [f"{cell} {_gain(lines, cell, 'tasks', EQUAL_COST)}" for cell in COMPARED]
    costs = {
        cell: np.mean([values["flops"] for values in by_cell(lines)[cell].values()]) for cell in (SPARSE, EQUAL_COST)
    }
    text = (
        f"From a small CLIP of {base} % on held-out icon sets, {seeds} seeds, in points against one dense model that "
        f"cost as many operations as that CLIP and its multiplet upcycling (DMU) together ({dense} %): "
        f"{'; '.join(ways)}. Sparse upcycling trains all "
        f"of the model and costs {costs[SPARSE] / costs[EQUAL_COST]:.2f} times that."
    )
    if gains(lines, SPARSE, "tasks", SPARSE_COST):
        own = _gain(lines, SPARSE, "tasks", SPARSE_COST)
        text += f" Against a dense model of its own cost it stands at {own}."
    return text


def _gain(lines: Lines, cell: str, measure: str, reference: str) -> str:
    text = interval(gains(lines, cell, measure, reference))
    return text if text[:1] in {"", "-"} else f"+{text}"


def named_tables(lines: Lines, plan: Mapping[str, Any]) -> dict[str, str]:
    """Return the tables by the names that pages know them by."""
    return {
        "one-model-scores": score_table(lines, list(plan["models"]), EQUAL_COST, "against equal cost"),
        "one-model-costs": cost_table(lines, list(plan["models"])),
        "one-model-ablations": score_table(lines, [DMU, *plan["ablations"]], DMU, "against DMU"),
        "one-model-verdict": verdict(lines),
        "one-model-brief": brief(lines),
    }


def tables(lines: Lines, plan: Mapping[str, Any]) -> str:
    """Return all tables for a terminal."""
    found = named_tables(lines, plan)
    return "\n\n".join(
        [
            f"Accuracy and recall in %, with 95 % intervals over {len({line['seed'] for line in lines})} seeds:",
            found["one-model-scores"],
            "What each cost, from random weights on, and what it costs to use:",
            found["one-model-costs"],
            f"Ablations of {DMU}:",
            found["one-model-ablations"],
            found["one-model-verdict"],
        ]
    )
