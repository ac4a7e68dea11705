"""Find out which curation pays: train a model on each selection of `runs/curate.yaml`, all for the same samples.

Usage: python runs/curation.py [--out runs/curation] [--jobs 2] [--only NAME...] [--seeds 0 1 2]
       python runs/curation.py --table

The pool is one of icons with noise of known kinds (`runs/noise.py`). Each selection is curated once, so all seeds train
on the same pairs. What was measured goes to `runs/curation.jsonl`, a line for each selection and seed, and is not
measured again; a job that was killed goes on from its last checkpoint. `--table` prints accuracy on the held-out sets
with 95 % intervals over the seeds, the difference to the raw pool of the same seed, and how much of each kind of noise
a selection has left.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from measure import machine
from noise import CLEAN, make_noisy
from records import interval, table

from modeclip import Catalog, Selection, curate, embed, evaluate, index, open_systems
from modeclip.clustering.embedding import EmbedConfig
from modeclip.curation.curating import make_method
from modeclip.data.sources import DataConfig
from modeclip.data.tasks.task import catalog_tasks
from modeclip.pipeline.recipe import parse_recipe
from modeclip.pipeline.run_folder import single_job
from modeclip.system.console import log
from modeclip.system.paths import RunPaths
from modeclip.training.jobs import TrainConfig, TrainJob
from modeclip.training.trainer import train

HERE = Path(__file__).parent
RAW, KIND = "raw", "noise"
TRUSTED = "trusted"
"""Column of the pairs that somebody has looked at."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model: what it is trained on, and its seed."""

    selection: str
    seed: int
    job: TrainJob
    kept: dict[str, float]
    """Share of the pairs of each kind of noise that are kept; what a probability keeps counts by it."""


class Experiment:
    """The pool and everything that is tried on it."""

    def __init__(self, plan: Path, out: Path) -> None:
        content = yaml.safe_load(plan.read_text(encoding="utf-8"))
        recipe = parse_recipe({"name": "curation", "data": content["data"], "train": content["train"]})
        self.data: DataConfig = recipe.data
        self.train: TrainConfig = recipe.train
        self.noise: dict[str, float] = content["noise"]
        self.trusted: float = content["trusted"]
        self.seeds: list[int] = content["seeds"]
        self.selections: dict[str, Any] = content["selections"]
        self.embed = EmbedConfig(**content["embed"])
        self.out = out

    def pool(self) -> Catalog:
        """Make the noisy pool, or open it if it is there."""
        clean, noisy = RunPaths(folder=self.out / "clean"), RunPaths(folder=self.out / "pool")
        if not clean.catalog_path.exists():
            index(self.data, str(clean.folder))
        if not noisy.catalog_path.exists():
            pairs = noisy.folder / "pairs.parquet"
            make_noisy(Catalog.open(clean.catalog_path), pairs, self.noise, seed=0)
            index(DataConfig.from_flat({"source": str(pairs)}), str(noisy.folder))
        catalog = Catalog.open(noisy.catalog_path)
        embed(catalog, self.embed)
        if TRUSTED not in catalog.columns:
            right = np.flatnonzero(catalog.read([KIND])[KIND] == CLEAN)
            chosen = np.random.default_rng(0).choice(right, round(self.trusted * len(right)), replace=False)
            catalog.add_columns({TRUSTED: np.isin(np.arange(len(catalog)), chosen)}, facts={"seed": 0})
        return catalog

    def cells(self, only: list[str] | None, seeds: list[int] | None, done: set[tuple[str, int]]) -> list[Cell]:
        """Curate the pool for each selection that has models to train, and return these."""
        catalog, cells = self.pool(), []
        for number, (name, steps) in enumerate(self.selections.items()):
            missing = [s for s in self.seeds if (name, s) not in done and (seeds is None or s in seeds)]
            if not missing or (only and name not in only):
                continue
            selection, settings = self.choose(catalog, f"c{number}", steps)
            catalog = Catalog.open(catalog.path)  # with the columns of all steps
            chosen = selection.mask_of(catalog).astype(np.float64)
            if probability := settings.get("probability"):
                chosen *= np.nan_to_num(catalog.read([probability])[probability])
            kinds = catalog.read([KIND])[KIND]
            kept = {str(kind): float(chosen[kinds == kind].mean()) for kind in np.unique(kinds)}
            for seed in missing:
                folder = self.out / "models" / f"{name.replace(' ', '-').replace('%', 'percent')}-{seed}"
                job = single_job(catalog, folder, replace(self.train, seed=seed, **settings), selection=selection)
                cells.append(Cell(selection=name, seed=seed, job=job, kept=kept))
        return cells

    def choose(self, catalog: Catalog, name: str, steps: Any) -> tuple[Selection, dict[str, str]]:
        """Curate the pool by some methods, and return the pairs to train on and the settings that go with them."""
        if isinstance(steps, dict):
            return Selection(where=(steps["where"],)), {}
        selection, settings = Selection(), dict[str, str]()
        for place, step in enumerate(steps):
            column = f"{name}_{place}"
            given = {key: value for key, value in step.items() if key != "method"}
            if step["method"] == "dfn":
                given["train"] = replace(self.train, seed=1000)
            curated = curate(catalog, make_method(step["method"], **given), name=column, selection=selection)
            catalog = Catalog.open(catalog.path)
            selection = Selection(mask=f"{column}_kept")
            if "probability" in curated.added:
                settings["probability"] = f"{column}_probability"
            if "caption" in curated.added:
                settings["captions"] = f"{column}_caption"
        return selection, settings


def measure(cell: Cell, tasks: Path) -> dict[str, Any]:
    """Train a model, unless that is done, and ask it the held-out tasks."""
    result = train(cell.job)
    systems = open_systems([cell.job.folder])
    results = evaluate(systems, catalog_tasks(Catalog.open(tasks)))
    scores = {one.task.name: 100 * one.outcome.score for one in results}
    return {
        "selection": cell.selection,
        "seed": cell.seed,
        "pairs": result.rows,
        "samples": result.samples,
        "tasks": scores,
        "kept": cell.kept,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
    }


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return what was measured so far."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def tables(lines: list[dict[str, Any]]) -> str:
    """Return accuracy by selection, best first, and what is left of each kind of noise."""
    scores: dict[str, dict[int, float]] = {}
    for line in lines:
        scores.setdefault(line["selection"], {})[line["seed"]] = float(np.mean(list(line["tasks"].values())))
    of = {line["selection"]: line for line in lines}
    kinds = sorted({kind for line in lines for kind in line["kept"]}, key=lambda kind: (kind != CLEAN, kind))
    rows = []
    for name, values in sorted(scores.items(), key=lambda item: -float(np.mean(list(item[1].values())))):
        both = [values[seed] - scores[RAW][seed] for seed in values if seed in scores.get(RAW, {})]
        change = interval(both) if name != RAW else ""
        left = [f"{100 * of[name]['kept'].get(kind, 0.0):.0f}" for kind in kinds]
        rows.append([name, f"{of[name]['pairs']:,}", interval(list(values.values())), change, *left])
    return table(["selection", "pairs", "accuracy", "against raw", *(f"% of {kind} kept" for kind in kinds)], rows)


def main() -> None:
    """Train and measure what is missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", type=Path, default=HERE / "curate.yaml")
    parser.add_argument("--out", type=Path, default=Path("runs/curation"))
    parser.add_argument("--records", type=Path, default=HERE / "curation.jsonl")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=None)
    parser.add_argument("--seeds", type=int, nargs="*", default=None)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if not arguments.table:
        experiment = Experiment(arguments.plan, arguments.out)
        done = {(line["selection"], line["seed"]) for line in read_lines(arguments.records)}
        cells = experiment.cells(arguments.only, arguments.seeds, done)
        cells.sort(key=lambda cell: cell.seed)  # all selections of one seed before those of the next
        tasks = RunPaths(folder=arguments.out / "clean").tasks_path
        with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
            for future in as_completed([pool.submit(measure, cell, tasks) for cell in cells]):
                line = future.result()
                with arguments.records.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                log(f"{line['selection']}, seed {line['seed']}: {np.mean(list(line['tasks'].values())):.1f} %")
    print(tables(read_lines(arguments.records)))


if __name__ == "__main__":
    main()
