"""The tables about tasks of a subject each, from `runs/subjects.jsonl` (docs/results.md)."""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from experiments import PARTS, base_arm, read_studies
from records import interval, table
from scipy.stats import t

HERE = Path(__file__).parent
DENSE = f"part-{PARTS}"
CAPTIONS, IMAGES, FULL = base_arm().name, base_arm(encoder="clip-image").name, base_arm(kind="full").name
LOG = "logarithms of probabilities"
WAYS = {
    "experts of captions": (f"{CAPTIONS} per_class", "tasks"),
    "the same, log-probabilities": (f"{CAPTIONS} mixing", LOG),
    "experts of images": (f"{IMAGES} per_class", "tasks"),
    "of images, two for each image": (f"{IMAGES} strongest 2", "tasks"),
    "of images, one for each image": (f"{IMAGES} strongest 1", "tasks"),
    "Full-4": (f"{FULL} uniform", "tasks"),
}
"""What is held against the dense model: the row of the records, and the name of its accuracies there."""
GROUPINGS = {
    "sets": "{} icon sets",
    "wordnet": "{} subjects of WordNet",
    "categories": "{} categories of icon sets",
}
Found = Mapping[tuple[str, str], Mapping[int, Mapping[str, Any]]]


def read(path: Path) -> Found:
    """Return the values by grouping and row, by seed."""
    found: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
    for line in map(json.loads, path.read_text(encoding="utf-8").splitlines() if path.exists() else []):
        found.setdefault((line["tasks"], line["row"]), {})[line["seed"]] = line["values"]
    return found


def gains(found: Found, grouping: str, row: str, name: str = "tasks", far: bool = False) -> np.ndarray:
    """Return what a row gains on the dense model, (seeds, tasks) in points; far: on images without a near-copy."""
    dense, mine = found.get((grouping, DENSE), {}), found.get((grouping, row), {})
    seeds = [seed for seed in sorted(mine) if seed in dense]
    if not seeds:
        return np.empty((0, 1))
    if not far:
        return np.array([np.array(mine[seed][name]) - dense[seed]["tasks"] for seed in seeds])
    facts = found[grouping, "tasks"][0]
    count, ends = sum(facts["images"]), np.cumsum(facts["images"])
    kept = ~unpacked(facts["near"], count)

    def accuracies(hits: str) -> np.ndarray:
        right = unpacked(hits, count)
        parts = zip(np.split(right, ends[:-1]), np.split(kept, ends[:-1]), strict=True)
        return np.array([100 * one[there].mean() for one, there in parts if there.any()])

    return np.array([accuracies(mine[seed]["hits"]) - accuracies(dense[seed]["hits"]) for seed in seeds])


def unpacked(text: str, count: int) -> np.ndarray:
    """Return which of so many images `measure.packed` has marked."""
    return np.unpackbits(np.frombuffer(b64decode(text), np.uint8))[:count].astype(bool)


def both(points: np.ndarray) -> str:
    """Return a mean gain with its intervals over the seeds and over the tasks."""
    if not points.size:
        return ""
    return f"{points.mean():+.1f}\u00a0±\u00a0" + ", ".join(f"{half:.1f}" for half in half_widths(points))


def half_widths(points: np.ndarray) -> list[float]:
    """Return the half widths of a mean's 95 % intervals over the seeds and over the tasks, where there are several."""
    return [
        float(t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)
        for values in (points.mean(axis=1), points.mean(axis=0))
        if len(values) > 1
    ]


def marked(points: np.ndarray) -> str:
    """Return a mean gain with its intervals, in bold where it is certain."""
    return f"**{both(points)}**" if is_certain(points) else both(points)


def is_certain(points: np.ndarray) -> bool:
    """Tell whether neither interval holds 0."""
    if len(points) < 2:
        return False
    sides = [points.mean(axis=1), points.mean(axis=0)]
    return all(
        abs(np.mean(values)) > t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
        for values in sides
    )


def gains_table(found: Found) -> str:
    """Return the gains at equal cost by what the tasks are."""
    rows = []
    for grouping, words in GROUPINGS.items():
        facts = found.get((grouping, "tasks"))
        dense = found.get((grouping, DENSE))
        if not facts or not dense:
            continue
        count, images = len(facts[0]["tasks"]), sum(facts[0]["images"])
        cells = [marked(gains(found, grouping, *way)) for way in WAYS.values()]
        level = interval([float(np.mean(values["tasks"])) for values in dense.values()])
        rows.append([words.format(count), f"{images:,}", level, *cells])
        far = int((~unpacked(facts[0]["near"], images)).sum())
        cells = [
            marked(gains(found, grouping, row, far=True)) if name == "tasks" else "" for row, name in WAYS.values()
        ]
        rows.append(["without images that have a near-copy", f"{far:,}", "", *cells])
    return table(["tasks", "images", "dense", *WAYS], rows)


def known(found: Found) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return what the expert for each subject's names gains on it, and on the other subjects on average, by seed."""
    facts, gained = found.get(("wordnet", "tasks")), {}
    arms = [arm for study in read_studies(HERE / "subjects.yaml")[1] for arm in study.arms if arm.kind == "prior"]
    for arm in arms if facts else []:
        points, place = gains(found, "wordnet", arm.name), facts[0]["tasks"].index(arm.task)  # type: ignore[index]
        if points.size:
            gained[arm.task] = points[:, place], np.delete(points, place, axis=1).mean(axis=1)
    return gained


def known_table(found: Found) -> str:
    """Return what one expert for the names of a subject gains on it at equal cost."""
    rows, facts, gained = [], found.get(("wordnet", "tasks")), known(found)
    for subject, (points, others) in gained.items():
        place = facts[0]["tasks"].index(subject)  # type: ignore[index]
        mine = found["wordnet", f"prior-{subject}"].values()
        levels = [[values["tasks"][place] for values in of] for of in (found["wordnet", DENSE].values(), mine)]
        trained = np.mean([values["pairs"][0] for values in mine])
        images = facts[0]["images"][place]  # type: ignore[index]
        cells = [subject, f"{images:,}", f"{trained:,.0f}", *map(interval, levels)]
        rows.append([*cells, signed(points), signed(others)])
    if len(gained) > 1 and len({len(points) for points, _ in gained.values()}) == 1:
        # of the subjects, with the intervals over seeds and over subjects
        means = [np.stack([each[side] for each in gained.values()], axis=1) for side in (0, 1)]
        rows.append(["mean", "", "", "", "", *map(both, means)])
    columns = ["names of", "images", "pairs trained on", "dense", "expert", "gain", "gain on the other subjects"]
    return table(columns, rows)


def signed(points: np.ndarray) -> str:
    """Return a mean gain with its interval and its sign."""
    text = interval(points.tolist())
    return text if text.startswith("-") else f"+{text}"


def in_short(found: Found) -> str:
    """Return the point that README has."""
    gained = known(found)
    own, others = (np.stack([each[side] for each in gained.values()], axis=1) for side in (0, 1))
    *most, last = gained

    def said(points: np.ndarray) -> str:
        seeds, subjects = half_widths(points)
        return f"±\u00a0{seeds:.1f} over {len(points)} seeds, ±\u00a0{subjects:.1f} over the subjects"

    verb = "does not beat" if own.mean() <= 0 else "beats" if is_certain(own) else "may beat"
    return (
        f"- **one expert for names that are known beforehand {verb} a dense model of the same cost**: by "
        f"{own.mean():.1f} points ({said(own)}) on {', '.join(most)} and {last}, the {len(gained)} largest subjects of "
        f"the held-out icons; on other subjects it stands at {others.mean():+.1f} ({said(others)});"
    )


def negatives_table(found: Found) -> str:
    """Return how many captions of a batch fit an image at least as well as its own."""
    values = list(found.get(("sets", "negatives"), {}).values())
    words = {"random": "random", "captions": "an expert of captions", "images": "an expert of images"}
    rows = [[text, interval([one[kind] for one in values])] for kind, text in words.items() if values]
    return table(["batches of", "captions that fit at least as well as an image's own, of 255"], rows)


def split(found: Found) -> str:
    """Say what experts of captions gain on as many models of all data, both mixed by log-probabilities."""
    told = []
    for grouping, words in GROUPINGS.items():
        experts, full = (gains(found, grouping, f"{arm} mixing", LOG) for arm in (CAPTIONS, FULL))
        if experts.size and experts.shape == full.shape:
            count = len(found[grouping, "tasks"][0]["tasks"])
            told.append(f"{marked(experts - full)} on {words.format(count)}")
    if not told:
        return "Not computed yet."
    return (
        "What the split itself brings, experts of captions against Full-4, both by log-probabilities: "
        f"{', '.join(told)}."
    )


def tables(found: Found) -> dict[str, str]:
    """Return each table by its name."""
    return {
        "subjects-split": split(found),
        "subjects": gains_table(found),
        "subjects-known": known_table(found),
        "subjects-negatives": negatives_table(found),
    }
