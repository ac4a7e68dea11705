"""The report of a run: one page with results, training curves, the map of clusters, routing, pictures and cost.

This file reads the run folder and computes what is drawn: which rows form a group, where a curve or a dot lies, which
classes and pictures are shown. If the run lacks a part (tasks, logs, a catalog), a sentence takes the place of its
section.

Price: about two seconds on one core for 256 clusters and 4 experts, nearly all of it for the two-dimensional map.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired

import numpy as np
from jaxtyping import Float
from typing_extensions import TypedDict

from modeclip.clustering.clusters import Clustering
from modeclip.clustering.fitting import CARDS_FILE
from modeclip.errors import DamagedError, ModeclipError
from modeclip.evaluation.systems import is_equal_cost
from modeclip.mixture.explain import far_from, flag
from modeclip.pages.charts import Axis, draw_curves, draw_gains, draw_map, neighbour_plane
from modeclip.pages.html import embed_picture, family_of, is_control, write_page
from modeclip.system.files import read_json
from modeclip.system.paths import RunPaths, home_path
from modeclip.training.jobs import job_name, role_of

if TYPE_CHECKING:
    from modeclip.data.catalog import Catalog

Json = dict[str, Any]

RUN_AGAIN = "give the same modeclip run again, which makes it anew"
MAX_DOTS = 1500
"""Most clusters on the map, largest first: t-SNE takes a few seconds, and the dots still lie beside each other."""
MAX_CLASSES = 10
"""Most classes shown for a task."""
MAX_SAMPLES = 40
"""Most pictures shown for an expert."""
GROUPS = (
    ("models", ("seed", "dense")),
    ("experts", ("expert",)),
    ("mixtures", ("mixture",)),
    ("controls", ("control",)),
    ("bounds", ("bound",)),
)
"""Groups of rows in the table of results, each with the kinds of models in it."""


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the report of a run and return its path.

    Args:
        run: A run folder with ``results.json``. Every other part may be missing.
        out: The page to write; ``report.html`` in the run folder by default. An existing page is replaced as a whole.

    Raises:
        ModeclipError: The folder holds no readable ``results.json``, or a training log has a broken line.
    """
    run, out = home_path(run), out and home_path(out)
    results = read_run(run)
    models, seed = results["models"], int(results["seed"])
    atlas = build_atlas(run, results["routing"])
    experts = find_experts(models, atlas)
    return write_page(
        out or RunPaths(folder=run).report,
        "report.html",
        results=results,
        num_experts=len(experts),
        headline=find_headline(models),
        decision=(decision := results.get("decision")),
        charts={name: draw_gains(decision["rows"], name) for name in decision["questions"]} if decision else {},
        table=build_table(results),
        training=build_training(run, models),
        atlas=atlas,
        tasks=build_tasks(results, atlas),
        sheets=build_sheets(run, experts, seed),
    )


def read_run(run: Path) -> Json:
    """Read ``results.json`` of a run. Parts that are missing come back empty, and models in the order of their cost."""
    path = RunPaths(folder=run).results
    if not path.is_file():
        raise ModeclipError(f"no results.json in {run}: expected a finished run folder; `modeclip run` writes one")
    try:
        results = read_json(path, dict[str, Any], RUN_AGAIN)
        if missing := [name for name in ("tasks", "models") if not isinstance(results[name], list)]:
            raise TypeError(f"{' and '.join(missing)} must be lists")
        results["models"] = sorted(results["models"], key=lambda model: model["samples"])
    except DamagedError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        problem = f"lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ModeclipError(
            f"{path} is not a modeclip result ({problem}); delete it and give `modeclip run` again"
        ) from error
    empty: Json = {"name": run.name, "date": "", "seed": 0, "machine": {}, "chance": {}, "tasks": [], "routing": {}}
    return {**empty, "stages": read_stages(run), **results}


class StageTime(TypedDict):
    """What the report says of a finished stage."""

    name: str
    """Name of the stage."""
    seconds: float
    """How long it took."""
    detail: str
    """What it did."""
    peak_memory_gb: NotRequired[float]
    """Most memory that it took."""


def read_stages(run: Path) -> list[Json]:
    """Read the records of a run's finished stages, in the order in which they finished."""
    paths = sorted(RunPaths(folder=run).stages.glob("*.json"), key=lambda path: (path.stat().st_mtime_ns, path.name))
    return [dict(read_json(path, StageTime, RUN_AGAIN)) for path in paths]


def find_headline(models: Sequence[Json]) -> Json:
    """Find the mixture under its default rule and the dense model of equal cost, and judge their difference.

    Returns:
        ``mixture``, ``dense``, ``uniform`` and ``random`` (a model or None), ``versus`` (the difference and its
        interval), and ``verdict``: "win" or "loss" if the interval excludes zero, "tie" if it includes zero, "none" if
        there is nothing to compare.
    """
    mixtures = [model for model in models if model["kind"] == "mixture"]
    mixture = next((model for model in mixtures if model.get("default")), None)
    versus = (mixture or {}).get("versus_dense_total")
    verdict = "none"
    if versus:
        low, high = versus["interval"]
        verdict = "win" if low > 0 else "loss" if high < 0 else "tie"
    uniform = next((model for model in mixtures if model["rule"] == "uniform"), None)
    cost = (mixture or {}).get("samples")
    of_its_cost = {model["name"]: model for model in models if is_equal_cost(model["name"], model["samples"], cost)}
    dense = of_its_cost.get("dense-total", of_its_cost.get("dense"))
    random = next((model for model in models if family_of(model["name"]) == "random"), None)
    found = {"mixture": mixture, "dense": dense, "uniform": uniform, "random": random}
    return {**found, "versus": versus, "verdict": verdict}


def build_table(results: Json) -> Json | None:
    """Arrange the models in groups and find the best value of each column; None if nothing was evaluated.

    Single models are in the order of their cost, the other groups in that of average accuracy, the best first. Bounds
    are chosen with the test labels, so they are never marked as the best.
    """
    models = [model for model in results["models"] if model.get("average") is not None]
    if not models or not results["tasks"]:
        return None
    groups = []
    for key, kinds in GROUPS:
        rows = [model for model in models if model["kind"] in kinds]
        if key != "models":
            rows.sort(key=lambda model: -model["average"])
        if rows:
            groups.append({"key": key, "rows": rows})
    honest = [model for model in models if model["kind"] != "bound"] or models
    names = [task["name"] for task in results["tasks"]]
    ends = [end for model in models for end in model.get("interval") or [model["average"]]]
    margin = 0.04 * (max(ends) - min(ends)) or 0.01
    return {
        "groups": groups,
        "best": {name: max(model["accuracy"].get(name, 0.0) for model in honest) for name in names},
        "best_average": max(model["average"] for model in honest),
        "highest": {name: max(model["accuracy"].get(name, 0.0) for model in models) for name in names},
        "axis": Axis(min(ends) - margin, max(ends) + margin, 0.0, 100.0),
        "has_versus": any(model.get("versus_dense_total") for model in models),
        "has_entropy": any(model.get("entropy") for model in models),
    }


def build_training(run: Path, models: Sequence[Json]) -> Json | None:
    """Read the training logs and place curves of loss and learning rate against samples; None without logs."""
    names = [model["name"] for model in models if model["kind"] in ("seed", "dense", "expert")]
    paths = {path.parent.name: path for path in sorted(run.glob("models/*/log.jsonl"))}
    order = {name: position for position, name in enumerate(names)}
    logs = {
        name: log
        for name in sorted(paths, key=lambda name: (order.get(name, len(order)), name))
        if len((log := read_training_log(paths[name]))["samples"])
    }
    if not logs:
        return None
    seed = logs.get(job_name("seed"))
    branch = float(seed["samples"][-1]) if seed is not None and len(logs) > 1 else None
    charts = [
        draw_curves(logs, "loss", branch, size=(720.0, 520.0), right=116.0),
        draw_curves(logs, "lr", branch, size=(420.0, 190.0), right=14.0),
    ]
    for chart in charts:
        chart["labels"] = [item for item in chart["labels"] if not is_control(item[0])]
    return {
        "names": list(logs),
        "families": list(dict.fromkeys(family_of(name) for name in logs)),
        "charts": charts,
        "speeds": [
            {"name": name, "rate": float(np.median(log["samples_per_second"])), "wait": float(log["data_wait"].mean())}
            for name, log in logs.items()
        ],
    }


def read_training_log(path: Path) -> dict[str, Float[np.ndarray, " steps"]]:
    """Read a training log into columns, in the order of samples. If a step was logged twice, its later line counts."""
    fields = ("samples", "loss", "lr", "samples_per_second", "data_wait")
    records: dict[float, list[float]] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            record = json.loads(line)
            values = [float(record[field]) for field in fields]
        except (ValueError, TypeError, KeyError) as error:
            raise ModeclipError(f"{path} line {number} is not a training record ({error!r}); train it again") from error
        if all(map(math.isfinite, values)):
            records[values[0]] = values
    table = np.array([records[key] for key in sorted(records)]).reshape(-1, len(fields))
    return dict(zip(fields, table.T, strict=True))


class CardTables(TypedDict):
    """The tables of ``cards.json``."""

    fine: list[Json]
    """What is shown of each fine cluster."""
    experts: list[Json]
    """What is shown of each expert."""
    imbalance: float
    """Rows of the largest expert as a multiple of the mean."""
    objective: float
    """Mean squared distance to the nearest fine centre."""


def build_atlas(run: Path, routing: Mapping[str, Json]) -> Json | None:
    """Place the fine clusters on a map, with the tasks whose classes are nearest to each; None without clusters."""
    folder = RunPaths(folder=run).clusters
    if not (folder / "cards.json").is_file() or not (folder / "clustering.safetensors").is_file():
        return None
    cards: Json = dict(read_json(folder / CARDS_FILE, CardTables, "cluster again (modeclip cluster)"))
    shown = sorted(cards["fine"], key=lambda card: (-card["size"], card["index"]))[:MAX_DOTS]
    centers = Clustering.load(folder).fine_centers.astype(np.float32)
    met = {name: {item["nearest_fine"] for item in task["classes"]} for name, task in routing.items()}
    for card in shown:
        card["tasks"] = [name for name, indices in met.items() if card["index"] in indices]
    plane = neighbour_plane(centers[[card["index"] for card in shown]])
    card_of_fine = {card["index"]: card for card in cards["fine"]}
    return {**cards, **draw_map(shown, plane, smallest=2.5), "card_of_fine": card_of_fine}


def build_tasks(results: Json, atlas: Json | None) -> list[Json]:
    """Describe the routing of each task: weights, entropy, the clusters nearest to its classes, and some classes."""
    cards = atlas["card_of_fine"] if atlas else {}
    places = {dot["index"]: dot for dot in atlas["dots"]} if atlas else {}
    tasks = []
    for task in results["tasks"]:
        routing = results["routing"].get(task["name"])
        if routing is None:
            continue
        classes = sorted(routing["classes"], key=lambda item: (item["distance"], item["name"]))
        indices = np.linspace(0, len(classes) - 1, min(MAX_CLASSES, len(classes))).round().astype(int)
        counts = np.bincount([item["nearest_fine"] for item in classes], minlength=1)
        met = {int(fine): int(counts[fine]) for fine in np.flatnonzero(counts)}
        shares = np.zeros(len(routing["weights"]))
        for fine, count in met.items():
            if fine in cards:
                shares[cards[fine]["expert"]] += count / len(classes)
        tasks.append(
            {
                **flag(None),  # a run of an earlier version does not tell
                **task,
                **routing,
                "far_from": far_from((routing.get("domain") or {}).get("nearest")),
                "shares": shares.tolist() if cards else [],
                "shown": [
                    {**classes[index], "cluster": cards.get(classes[index]["nearest_fine"])} for index in indices
                ],
                "num_met": len(met),
                "dots": [
                    {**places[fine], "r": round(min(30.0, 6 + 5 * math.sqrt(count)), 1)}
                    for fine, count in met.items()
                    if fine in places
                ],
            }
        )
    return tasks


def find_experts(models: Sequence[Json], atlas: Json | None) -> list[int]:
    """Return the indices of the run's experts, from its clusters or, without them, from the evaluated models."""
    if atlas:
        return sorted(card["index"] for card in atlas["experts"])
    found = [role_of(model["name"]) for model in models]
    return sorted(index for role, index in found if role == "expert" and index is not None)


def build_sheets(run: Path, experts: Sequence[int], seed: int) -> Json:
    """Draw random pictures with captions for each expert.

    Returns:
        ``sheets``, one for each expert. If the catalog cannot be read there are none, and ``reason`` says why.
    """
    from modeclip.data.catalog import Catalog

    try:
        catalog = Catalog.open(RunPaths(folder=run).catalog_path)
        return {"sheets": [draw_sheet(catalog, expert, seed) for expert in experts], "reason": ""}
    except ModeclipError as error:
        return {"sheets": [], "reason": str(error)}


def draw_sheet(catalog: Catalog, expert: int, seed: int) -> Json:
    """Draw pictures from the training data of one expert, each with another caption."""
    rows = catalog.select(expert=expert)
    drawn = np.random.default_rng((seed, expert)).permutation(rows)[: 8 * MAX_SAMPLES]
    captions = [str(caption) for caption in catalog.read(["caption"], drawn)["caption"]] if len(drawn) else []
    first = {caption: int(row) for caption, row in zip(reversed(captions), drawn[::-1], strict=True)}
    chosen = list(dict.fromkeys(captions))[:MAX_SAMPLES]
    images = catalog.images(np.array([first[caption] for caption in chosen], dtype=np.int64)) if chosen else []
    pictures = [embed_picture(image, caption) for image, caption in zip(images, chosen, strict=True)]
    return {"expert": expert, "num_samples": len(rows), "pictures": pictures}
