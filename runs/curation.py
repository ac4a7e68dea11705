"""Find out which curation pays: train a model on each selection of `runs/curate.yaml`, all for the same samples.

Usage: python runs/curation.py [--out runs/curation] [--jobs 2] [--only NAME...] [--seeds 0 1 2]
       python runs/curation.py --page which-pays.html      or --table: what the records say, without any model
       python runs/curation.py --costs                     what each selection costs, on a copy of the pool

The pool is one of icons with noise of known kinds (`runs/noise.py`). Each selection is curated once, so all seeds train
on the same pairs. What was measured goes to `runs/curation.jsonl`, a line for each selection and seed, and is not
measured again; a job that was killed goes on from its last checkpoint.

What the plan has under `then` begins when all selections are measured with all seeds: prompts with definitions, and
mixtures of data experts (MoDE) that cost as much as a dense model on the same pairs, on the raw pool and on the best
selection. That is the one with the highest mean over the seeds among those that a user could choose too, so not the
oracle. NormSim's targets are the trusted pairs, since the held-out sets have no training images.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from curation_report import CLEAN, averages, read_lines, tables, write_study
from measure import machine
from noise import make_noisy

from modeclip import Catalog, RunFolder, Selection, cluster, curate, embed, evaluate, index, open_systems
from modeclip.clustering.embedding import EmbedConfig
from modeclip.clustering.fitting import ClusterConfig, ClusterResult
from modeclip.curation.curating import columns_of, curations_of, make_method
from modeclip.curation.dfn import FILTERS
from modeclip.data.sources import DataConfig
from modeclip.data.tasks.task import catalog_tasks
from modeclip.evaluation.evaluate import EvaluateConfig
from modeclip.mixture.bundle import RoutingConfig
from modeclip.pipeline.recipe import parse_recipe
from modeclip.pipeline.run_folder import single_job
from modeclip.system.console import log
from modeclip.system.paths import RunPaths
from modeclip.training.experts import ExpertsConfig
from modeclip.training.jobs import TrainConfig, TrainJob
from modeclip.training.trainer import train

HERE = Path(__file__).parent
KIND = "noise"
BEST = "best"
"""What the plan calls the selection with the highest mean over the seeds."""
TRUSTED = "trusted"
"""Column of the pairs that somebody has looked at."""


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Data experts of clusters of captions, which with their seed model see as many samples as a dense model does."""

    folder: Path
    pool: Path
    """The catalog, which is copied into the folder: each mixture clusters it in its own way."""
    train: TrainConfig
    selection: Selection
    num_experts: int

    def make(self) -> tuple[str, int, int]:
        """Cluster the pairs and train what is missing; return the bundle, the pairs, and the samples of all models."""
        run = RunFolder(
            folder=self.folder,
            training=self.train,
            experts=ExpertsConfig(budget="matched", dense=False, dense_total=False, jobs=1),
            routing=RoutingConfig(rule="per_class"),
            selection=self.selection,
        )
        if not run.catalog_path.exists():
            copy_pool(self.pool, run.catalog_path)
        if not run.clusters.exists():
            self._cluster(Catalog.open(run.catalog_path)).save(run.clusters)
        results = run.train(run.jobs, stop_on_failure=True)
        run.refresh_bundle()
        return str(run.bundle), results["seed"].rows, sum(result.samples for result in results.values())

    def _cluster(self, catalog: Catalog) -> ClusterResult:
        """Cluster with the seed of the training; where an expert's pairs fill no batch, with the next that does it."""
        for more in range(10):
            config = ClusterConfig(num_experts=self.num_experts, seed=self.train.seed + 1000 * more)
            found = cluster(catalog, config, selection=self.selection)
            expert = Catalog.open(catalog.path).read(["expert"])["expert"].reshape(len(catalog), -1)[:, 0]
            sizes = np.bincount(expert[self.selection.mask_of(catalog)], minlength=self.num_experts)
            if sizes.min() >= self.train.batch_size:
                return found
        raise SystemExit(f"{self.folder}: in ten clusterings some expert has fewer pairs than a batch")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model or mixture: what it is trained on, its seed, and how it is asked."""

    selection: str
    seed: int
    model: TrainJob | Mixture
    kept: dict[str, float]
    """Share of the pairs of each kind of noise that are kept; what a probability keeps counts by it."""
    of: str | None = None
    """The selection whose pairs these are, where it is another one."""
    knowledge: tuple[str, ...] = ()
    """Dictionaries whose definitions stand behind the prompts."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The pairs of a selection."""

    selection: Selection
    settings: dict[str, str]
    """Settings of the training that go with them."""
    kept: dict[str, float]


def copy_pool(pool: Path, path: Path) -> None:
    """Copy a catalog as a whole or not at all, without what is kept beside it."""
    part = path.with_name(f"{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(pool, part, ignore=shutil.ignore_patterns("_modeclip"))
    part.rename(path)


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
        self.then: dict[str, dict[str, Any]] = content.get("then", {})
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

    def first_cells(self, lines: list[dict[str, Any]], only: list[str] | None, seeds: list[int]) -> Iterator[Cell]:
        """Yield a model for each selection and seed that is not measured; the pool is curated for it."""
        done = {(line["selection"], line["seed"]) for line in lines}
        for name in self.selections:
            for seed in seeds if not only or name in only else ():
                if (name, seed) not in done:
                    chosen = self.chosen(name)
                    yield Cell(selection=name, seed=seed, model=self.job(name, seed), kept=chosen.kept)

    def then_cells(self, lines: list[dict[str, Any]], only: list[str] | None, seeds: list[int]) -> Iterator[Cell]:
        """Yield what the plan has under ``then`` and is not measured, once all selections are, with all seeds."""
        done = {(line["selection"], line["seed"]) for line in lines}
        if missing := {(name, seed) for name in self.selections for seed in self.seeds} - done:
            log(f"{', '.join(self.then)}: left for later, since {len(missing)} models of other selections are missing")
            return
        best = best_of(lines, [name for name, steps in self.selections.items() if isinstance(steps, list)])
        for row, plan in self.then.items():
            for of in dict.fromkeys(best if name == BEST else name for name in plan["of"]):
                name = row if len(plan["of"]) == 1 else f"{row} of {of}"
                for seed in seeds if not only or name in only or row in only else ():
                    if (name, seed) not in done:
                        make = self.mixture if "experts" in plan else self.job
                        model = make(of, seed, plan)
                        knowledge, kept = tuple(plan.get("knowledge", ())), self.chosen(of).kept
                        yield Cell(selection=name, seed=seed, model=model, kept=kept, of=of, knowledge=knowledge)

    def job(self, name: str, seed: int, plan: dict[str, Any] | None = None) -> TrainJob:
        """Return the training of a dense model on a selection, for other samples if the plan says so."""
        chosen, samples = self.chosen(name), (plan or {}).get("samples", self.train.samples)
        longer = f"-{samples}" if samples != self.train.samples else ""
        folder = self.out / "models" / f"{file_name(name)}{longer}-{seed}"
        settings = replace(self.train, seed=seed, samples=samples, **chosen.settings)
        return single_job(Catalog.open(self.pool_path), folder, settings, selection=chosen.selection)

    def mixture(self, name: str, seed: int, plan: dict[str, Any]) -> Mixture:
        """Return the training of data experts on a selection."""
        chosen = self.chosen(name)
        return Mixture(
            folder=self.out / "mixtures" / f"{plan['experts']}-{file_name(name)}-{seed}",
            pool=self.pool_path,
            train=replace(self.train, seed=seed, seed_parts=plan["seed_parts"], **chosen.settings),
            selection=chosen.selection,
            num_experts=plan["experts"],
        )

    @property
    def pool_path(self) -> Path:
        """Where the noisy pool lies."""
        return RunPaths(folder=self.out / "pool").catalog_path

    @cache  # noqa: B019 - there is one experiment
    def chosen(self, name: str) -> Chosen:
        """Curate the pool for a selection, unless that is done, and return its pairs."""
        selection, settings = self.choose(self.pool(), name)
        catalog = Catalog.open(self.pool_path)  # with the columns of all steps
        weight = selection.mask_of(catalog).astype(np.float64)
        if probability := settings.get("probability"):
            weight *= np.nan_to_num(catalog.read([probability])[probability])
        kinds = catalog.read([KIND])[KIND]
        kept = {str(kind): float(weight[kinds == kind].mean()) for kind in np.unique(kinds)}
        return Chosen(selection=selection, settings=settings, kept=kept)

    def choose(self, catalog: Catalog, name: str) -> tuple[Selection, dict[str, str]]:
        """Curate a catalog by the methods of a selection; return the pairs to train on and the settings for them.

        The columns are called after the place of the selection in the plan, so new ones stand at its end.
        """
        steps, number = self.selections[name], list(self.selections).index(name)
        if isinstance(steps, dict):
            return Selection(where=(steps["where"],)), {}
        selection, settings = Selection(), dict[str, str]()
        for place, step in enumerate(steps):
            column = f"c{number}_{place}"
            given = {key: value for key, value in step.items() if key != "method"}
            if step["method"] == "dfn":
                given["train"] = replace(self.train, seed=1000)
            if targets := given.get("targets"):
                given["targets"] = (f"{self.pool_path}#{targets}",)
            curated = curate(catalog, make_method(step["method"], **given), name=column, selection=selection)
            catalog = Catalog.open(catalog.path)
            selection = Selection(mask=f"{column}_kept")
            if "probability" in curated.added:
                settings["probability"] = f"{column}_probability"
            if "caption" in curated.added:
                settings["captions"] = f"{column}_caption"
        return selection, settings

    def costs(self) -> Iterator[dict[str, Any]]:
        """Yield what each selection costs in processor seconds, on a copy of the pool that nothing is known of.

        The copy is embedded and has its filter already, whose training costs what that of a model does.
        """
        self.pool()
        for name, steps in self.selections.items():
            if not steps or isinstance(steps, dict):
                continue
            folder = self.out / "costs"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            copy_pool(self.pool_path, folder / self.pool_path.name)
            shutil.copytree(self.pool_path.with_suffix(FILTERS), (folder / self.pool_path.name).with_suffix(FILTERS))
            catalog = Catalog.open(folder / self.pool_path.name)
            for made in curations_of(catalog):
                catalog.remove_columns(columns_of(catalog, made))
            before = sum(os.times()[:4])
            self.choose(catalog, name)
            seconds = round(sum(os.times()[:4]) - before, 1)
            yield {"selection": name, "pairs": len(catalog), "processor_seconds": seconds, **machine()}
            shutil.rmtree(folder)


def file_name(selection: str) -> str:
    """Return a selection's name without what a file's should not have."""
    return selection.replace(" ", "-").replace("%", "percent")


def best_of(lines: list[dict[str, Any]], names: list[str]) -> str:
    """Return which of some selections has the highest mean over the seeds; of equal ones the first."""
    scores = averages(lines)
    return max(names, key=lambda name: float(np.mean(list(scores[name].values()))))


def measure(cell: Cell, tasks: Path) -> dict[str, Any]:
    """Train a model, or all of a mixture, unless that is done, and ask it the held-out tasks."""
    if isinstance(cell.model, Mixture):
        model, pairs, samples = cell.model.make()
    else:
        result = train(cell.model)
        model, pairs, samples = cell.model.folder, result.rows, result.samples
    config = EvaluateConfig(knowledge=cell.knowledge)
    results = evaluate(open_systems([model]), catalog_tasks(Catalog.open(tasks)), config)
    line = {
        "selection": cell.selection,
        "seed": cell.seed,
        "pairs": pairs,
        "samples": samples,
        "tasks": {one.task.name: 100 * one.outcome.score for one in results},
        "kept": cell.kept,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
    }
    return line | ({"of": cell.of} if cell.of else {})


def run(cells: list[Cell], records: Path, tasks: Path, jobs: int) -> None:
    """Measure models in several processes, all selections of one seed before those of the next; record each."""
    cells.sort(key=lambda cell: cell.seed)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(measure, cell, tasks) for cell in cells]):
            line = future.result()
            write_line(records, line)
            log(f"{line['selection']}, seed {line['seed']}: {np.mean(list(line['tasks'].values())):.1f} %")


def write_line(path: Path, line: dict[str, Any]) -> None:
    """Add a record to a file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def main() -> None:
    """Train and measure what is missing, or show what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", type=Path, default=HERE / "curate.yaml")
    parser.add_argument("--out", type=Path, default=Path("runs/curation"))
    parser.add_argument("--records", type=Path, default=HERE / "curation.jsonl")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=None)
    parser.add_argument("--seeds", type=int, nargs="*", default=None)
    parser.add_argument("--table", action="store_true", help="print what was measured")
    parser.add_argument("--page", type=Path, help="write what was measured as a page")
    parser.add_argument("--costs", action="store_true", help="measure what each selection costs")
    arguments = parser.parse_args()
    records, costs = arguments.records, arguments.records.with_name(f"{arguments.records.stem}_costs.jsonl")
    experiment = Experiment(arguments.plan, arguments.out)
    if arguments.costs:
        for line in experiment.costs():
            write_line(costs, line)
            log(f"{line['selection']}: {line['processor_seconds']:.1f} s")
    elif not (arguments.table or arguments.page):
        seeds, tasks = arguments.seeds or experiment.seeds, RunPaths(folder=arguments.out / "clean").tasks_path
        for part in (experiment.first_cells, experiment.then_cells):
            run(list(part(read_lines(records), arguments.only, seeds)), records, tasks, arguments.jobs)
    print(tables(read_lines(records)))
    if arguments.page:
        print(write_study(arguments.page, read_lines(records), read_lines(costs), experiment.selections))


if __name__ == "__main__":
    main()
