"""The pilot: trains several ways on a sample of the user's pairs at equal cost, and says which to take and how surely.

    sample -> plan -> seed models -> embed, cluster, filter -> all ways -> held-out questions -> verdict, page

The ways, for each random seed: one dense model; experts on clusters of captions and on clusters of images (MoDE); the
latter with a shared trunk, of which only the last block of both towers is trained; one expert for the user's class
names; one dense model on the pairs that a filter keeps (DFN). All go on from one seed model, half way through the
schedule, which every way counts as its own. Vectors are the seed model's own: on small towers a sentence encoder alone
would cost more than the training, and `docs/results.md` found no difference between encoders.

Equal cost is equal floating-point operations, forward and backward, of everything that a way needs: the seed model,
the vectors that are clustered or filtered, k-means, the filter. What a way needs besides training is taken off its
steps; a way for which nothing is left is left out and noted.

Every step leaves a record, and trainings go on from their checkpoints: killed at any moment, the same command goes on
with the same numbers, and nothing is trained twice. The settings and the plan are decided once for a folder.

Price: the minutes that the user gives.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from modeclip.clustering.embedding import EmbedConfig, embed
from modeclip.clustering.fitting import ClusterConfig, cluster
from modeclip.curation.curating import curate
from modeclip.curation.dfn import DfnConfig
from modeclip.data.catalog import Catalog
from modeclip.data.indexing import index
from modeclip.data.prompts import read_classes
from modeclip.data.selection import Selection
from modeclip.data.sources import DataConfig, open_source
from modeclip.data.tasks.names import CLASS_NAMES, chance_of_names, distinct_names
from modeclip.data.tasks.task import Task
from modeclip.errors import ModeclipError
from modeclip.evaluation.deciding import DENSE, OF_NAMES, decide, gains_of, mean_outcome, recall_outcome
from modeclip.evaluation.evaluate import EvaluateConfig, evaluate
from modeclip.evaluation.frontier import outlook
from modeclip.evaluation.intervals import Outcome
from modeclip.evaluation.results import read_predictions, write_results
from modeclip.evaluation.systems import open_systems
from modeclip.mixture.bundle import RoutingConfig
from modeclip.models.clip import check_model
from modeclip.models.deltas import WEIGHTS_FILE
from modeclip.models.feature_cache import FeatureCache
from modeclip.pipeline.pilot_data import RETRIEVAL, held_out_tasks, sample_source
from modeclip.pipeline.pilot_plan import (
    CAPTIONS,
    CURATED,
    FEWEST_HELD,
    FILTER_SHARE,
    HELD_FRACTION,
    IMAGES,
    LAST,
    NAMES,
    TRUNK,
    PilotConfig,
    PilotPlan,
    plan_pilot,
)
from modeclip.pipeline.recipe import plain_of
from modeclip.pipeline.run_folder import RunFolder, single_job
from modeclip.system.console import log
from modeclip.system.files import only_process, read_json, write_atomically, write_json, writing
from modeclip.system.paths import RunPaths, home_path
from modeclip.training.batches import job_rows
from modeclip.training.experts import ExpertsConfig, fingerprint_of, part, pin_jobs
from modeclip.training.jobs import AUTO, TrainConfig, TrainJob, TrainResult, settings_changes
from modeclip.training.journal import training_seconds
from modeclip.training.launching import run_jobs
from modeclip.training.preflight import check_negatives

SETTINGS_FILE, SAMPLE_FILE, PLAN_FILE, RESULT_FILE = "settings.json", "sample.json", "plan.json", "pilot.json"
RECORD_FILE = "made.json"
"""What a way needed besides training, in the folder of the way."""
MEASURED_FILE = "measured.json"
"""Written in the folder of a seed when all ways were asked all questions."""
AGAIN = "delete it and give the same modeclip pilot again"
KMEANS_PASSES = 2
"""Passes over the vectors besides the iterations of k-means: its start, and the assignment of all rows."""


@dataclass(frozen=True, kw_only=True)
class _Made:
    """What a way needs besides its training."""

    flops: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class _Attempt:
    """One way with one random seed."""

    jobs: list[TrainJob] = field(default_factory=list)
    """What is trained behind the seed model."""
    made: _Made = field(default_factory=_Made)
    """What it needed besides."""
    run: RunFolder | None = None
    """Folder of the mixture; None for a model by itself."""
    trainable: str = "all"
    """What its training changes."""
    has_seed: bool = True
    """Whether it goes on from the seed model."""

    @property
    def model(self) -> Path:
        """Folder of the bundle, or of the model."""
        return Path(self.jobs[0].folder) if self.run is None else self.run.bundle


def pilot(data: DataConfig, config: PilotConfig, out: Path) -> dict[str, Any]:
    """Do what is missing of a pilot and return what ``pilot.json`` holds.

    Args:
        data: Where the pairs come from; near-duplicates are held out together, of icons equal ones.
        config: What is tried, and the minutes.
        out: Folder of the pilot.

    Raises:
        ModeclipError: Too few pairs or minutes, a folder of other settings, or what training raises.
    """
    started, out = time.monotonic(), home_path(out).resolve()
    if data.tasks:
        raise ModeclipError(
            f"pilot: it holds out pairs by itself, got data.tasks {', '.join(data.tasks)}; leave them out, and give "
            "your class names as --classes"
        )
    if config.model != AUTO:
        check_model(config.model)
    names = distinct_names(read_classes(config.classes)) if config.classes else []
    if config.classes and len(names) < 2:
        raise ModeclipError(f"pilot.classes: expected at least 2 different class names, got {len(names)}; give more")
    out.mkdir(parents=True, exist_ok=True)
    with only_process(out), writing(out):
        _claim(out, data, config, names)
        if not (out / RESULT_FILE).is_file():
            _Pilot(data, config, out, names, started).run()
    result = read_json(out / RESULT_FILE, dict[str, Any], AGAIN)
    _write_page(result, out)
    return result


def _write_page(result: dict[str, Any], out: Path) -> None:
    from modeclip.pages.pilot_page import write_pilot

    write_pilot(result, out)


def _claim(out: Path, data: DataConfig, config: PilotConfig, names: list[str]) -> None:
    """Note the settings of a folder, or raise where it has others; how many models train at a time decides nothing."""
    settings = plain_of(asdict(config) | {"data": data.flat(), "classes": names})
    settings.pop("jobs")
    path = out / SETTINGS_FILE
    if not path.exists():
        if any(entry.name != "lock" for entry in out.iterdir()):
            raise ModeclipError(f"--out {out}: it holds something that is no pilot; give another folder")
        write_json(path, settings)
    differing = settings_changes(read_json(path, dict[str, Any], AGAIN), settings)
    if differing:
        raise ModeclipError(
            f"--out {out} has a pilot of other settings: {', '.join(differing)}; give the same, or another --out"
        )


class _Pilot:
    """A pilot at work in its folder."""

    def __init__(self, data: DataConfig, config: PilotConfig, out: Path, names: list[str], started: float) -> None:
        self.data, self.config, self.out, self.names, self.started = data, config, out, names, started
        self.paths, self.notes = RunPaths(folder=out), list[str]()

    def run(self) -> None:
        """Do what is missing, and write the result."""
        sample = self._sample()
        if self.config.clean:
            Selection(where=(self.config.clean,)).mask_of(self.catalog)  # a wrong condition is told before hours of it
        for line in self.plan.lines():
            log(line)
        seeds = [self._seed_job(number) for number in range(self.plan.seeds)]
        self._train(seeds)
        attempts = [self._attempts(number, seed) for number, seed in enumerate(seeds)]
        self._train([job for each in attempts for attempt in each.values() for job in attempt.jobs])
        for number, each in enumerate(attempts):
            for attempt in each.values():
                if attempt.run is not None:
                    attempt.run.refresh_bundle()
            self._ask(number, {name: attempt.model for name, attempt in each.items()})
        write_json(self.out / RESULT_FILE, self._result(sample, seeds, attempts))

    # ---------------------------------------------------------------- pairs and plan

    def _sample(self) -> dict[str, Any]:
        """Index a sample of the source, unless that is done, and return what is known of it."""
        path = self.out / SAMPLE_FILE
        if not path.is_file():
            data, wanted = self.data, self.config.wanted_pairs
            opened = open_source(data)
            if data.holdout == "image" and not opened.draws_images:
                data = replace(data, holdout="similar")  # but small drawings have similar hashes without being copies
            if not data.holdout_fraction:
                data = replace(data, holdout_fraction=HELD_FRACTION, holdout_seed=self.config.seed)
            found = sample_source(opened, wanted, seconds=6 * self.config.minutes, seed=self.config.seed)
            result = index(data, self.out, replace=True, source=found.source)
            write_json(
                path,
                {
                    "source": data.source,
                    "kind": result.kind,
                    "source_pairs": found.num_pairs,
                    "is_counted": found.is_counted,
                    "pairs": result.num_samples,
                    "held_out": sum(images for _, images in result.tasks.values()),
                },
            )
        return read_json(path, dict[str, Any], AGAIN)

    @cached_property
    def catalog(self) -> Catalog:
        """The sampled pairs."""
        return Catalog.open(self.paths.catalog_path)

    @cached_property
    def tasks(self) -> list[Task]:
        """What is asked, the question that decides first."""
        retrieval, classes = held_out_tasks(Catalog.open(self.paths.tasks_path), self.names, seed=self.config.seed)
        if not self.names:
            return [retrieval]
        number = 0 if classes is None else len(classes.images)
        if classes is None or number < FEWEST_HELD:
            raise ModeclipError(
                f"pilot.classes: expected at least {FEWEST_HELD} held-out captions that hold exactly one of the "
                f"{len(self.names):,} names, got {number}; write the names as captions have them, or give more --pairs"
            )
        return [classes, retrieval]

    @cached_property
    def plan(self) -> PilotPlan:
        """The plan, made if there is none."""
        path = self.out / PLAN_FILE
        if not path.is_file():
            spent, num_held = time.monotonic() - self.started, len(self.tasks[-1].texts)
            write_json(path, asdict(plan_pilot(self.catalog, num_held, self.data, self.config, spent=spent)))
        return read_json(path, PilotPlan, AGAIN)

    # ---------------------------------------------------------------- trainings

    def _settings(self, number: int, steps: int) -> TrainConfig:
        """Return a training whose second half has so many steps."""
        plan = self.plan
        samples, seed = 2 * steps * plan.batch_size, self.config.seed + number
        return TrainConfig(
            model=plan.model, samples=samples, batch_size=plan.batch_size, total_parts=2, seed_parts=1, seed=seed
        )

    @property
    def half(self) -> int:
        """Steps of half of the dense model's schedule."""
        return self.plan.samples // (2 * self.plan.batch_size)

    def _steps(self, made: _Made, trainable: str = "all", num_models: int = 1, halves: int = 1) -> int:
        """Return the steps of each model that a way can pay: those of the dense model, less what it needed besides."""
        plan = self.plan
        budget = halves * self.half * plan.batch_size * plan.flops().training - made.flops
        steps = int(budget / (plan.batch_size * plan.flops(trainable).training * num_models))
        if steps < 1:
            raise ModeclipError("what it needs besides training costs more than the training; give more minutes")
        return steps

    def _folder(self, number: int, way: str = "") -> Path:
        return self.out / f"seed-{number}" / way

    def _seed_job(self, number: int) -> TrainJob:
        """Return the job of a seed model: the first half of the schedule on all pairs."""
        train = self._settings(number, self.half)
        fingerprint = fingerprint_of(self.catalog, None, train.model)
        parting = part(Path(self.catalog.path), fingerprint, self._folder(number), train, ExpertsConfig())
        assert parting.seed is not None
        return pin_jobs([parting.seed], self.catalog)[0]

    def _train(self, jobs: Sequence[TrainJob]) -> None:
        """Train what is missing, whose names must differ for that."""
        named = [replace(job, name=" ".join(Path(job.folder).relative_to(self.out).parts)) for job in jobs]
        run_jobs(named, self.config.jobs, stop_on_failure=True)

    def _attempts(self, number: int, seed: TrainJob) -> dict[str, _Attempt]:
        """Return the trainings of all ways that go on from a seed model; what they need besides is made."""
        make: dict[str, Callable[[int, TrainJob], _Attempt]] = {
            DENSE: self._dense,
            CAPTIONS: self._captions,
            IMAGES: self._images,
            TRUNK: self._trunk,
            NAMES: self._names,
            CURATED: self._curated,
        }
        found: dict[str, _Attempt] = {}
        for name in self.plan.ways:
            try:
                attempt = make[name](number, seed)
                for job in attempt.jobs:
                    catalog = Catalog.open(job.catalog)
                    check_negatives(job, catalog, job_rows(job, catalog))
                found[name] = attempt
            except ModeclipError as error:
                if name == DENSE:
                    raise
                self.notes.append(f"{name} is left out (seed {number}): {error}")
                log(self.notes[-1])
        return found

    def _dense(self, number: int, seed: TrainJob) -> _Attempt:
        job = single_job(
            self.catalog, self._folder(number, DENSE), self._settings(number, self.half), start=seed.folder
        )
        return _Attempt(jobs=[job])

    def _captions(self, number: int, seed: TrainJob) -> _Attempt:
        folder = self._linked(number, CAPTIONS, self.catalog.path)
        return self._mixture(number, seed, folder, self._clustered(number, folder, f"clip:{seed.folder}"))

    def _images(self, number: int, seed: TrainJob) -> _Attempt:
        folder = self._linked(number, IMAGES, self.catalog.path)
        return self._mixture(number, seed, folder, self._clustered(number, folder, f"clip-image:{seed.folder}"))

    def _trunk(self, number: int, seed: TrainJob) -> _Attempt:
        before = self._folder(number, IMAGES)
        made = self._clustered(number, before, f"clip-image:{seed.folder}")
        folder = self._linked(number, TRUNK, RunPaths(folder=before).catalog_path)
        return self._mixture(number, seed, folder, made, LAST)

    def _names(self, number: int, seed: TrainJob) -> _Attempt:
        before = self._folder(number, CAPTIONS)
        made = self._clustered(number, before, f"clip:{seed.folder}")
        made = replace(made, flops=made.flops + len(self.names) * self.plan.flops().text)
        folder, names = self._linked(number, NAMES, RunPaths(folder=before).catalog_path), self.out / "names.txt"
        if not names.exists():
            write_atomically(names, "\n".join(self.names) + "\n")
        run = self._run(number, seed, folder, self._steps(made), 1)
        jobs = [job for job in run.jobs_for_classes([str(names)]) if job.role == "prior"]
        return _Attempt(jobs=jobs, made=made)

    def _curated(self, number: int, seed: TrainJob) -> _Attempt:
        folder = self._linked(number, CURATED, self.catalog.path)
        kept, path = self.config, folder / RECORD_FILE
        filter_steps = int(2 * self.half * FILTER_SHARE) // 2 if kept.clean else 0
        if kept.clean:
            given: dict[str, Any] = {"clean": kept.clean, "train": self._settings(number, max(1, filter_steps))}
        else:
            given = {"filter": seed.folder}
        if not path.is_file():
            started, catalog = time.monotonic(), Catalog.open(RunPaths(folder=folder).catalog_path)
            curate(catalog, DfnConfig(fraction=(kept.keep_fraction,), **given), name="dfn")
            flops, samples = self.plan.flops(), 2 * filter_steps * self.plan.batch_size
            cost = len(catalog) * flops.forward + samples * flops.training
            write_json(path, asdict(_Made(flops=float(cost), seconds=time.monotonic() - started)))
        made = read_json(path, _Made, AGAIN)
        catalog, chosen = Catalog.open(RunPaths(folder=folder).catalog_path), Selection(mask="dfn_kept")
        if kept.clean:
            steps = self._steps(made, halves=2) // 2
            job = single_job(catalog, folder / "model", self._settings(number, steps), selection=chosen)
            return _Attempt(jobs=[job], made=made, has_seed=False)
        settings = self._settings(number, self._steps(made))
        job = single_job(catalog, folder / "model", settings, selection=chosen, start=seed.folder)
        return _Attempt(jobs=[job], made=made)

    def _mixture(self, number: int, seed: TrainJob, folder: Path, made: _Made, trainable: str = "all") -> _Attempt:
        """Return the experts of a clustered folder."""
        count = self.plan.num_experts
        run = self._run(number, seed, folder, count * self._steps(made, trainable, count), count, trainable)
        return _Attempt(jobs=run.jobs, made=made, run=run, trainable=trainable)

    def _run(
        self, number: int, seed: TrainJob, folder: Path, steps: int, num_models: int, trainable: str = "all"
    ) -> RunFolder:
        return RunFolder(
            folder=folder,
            training=replace(self._settings(number, steps), trainable=trainable),
            experts=ExpertsConfig(
                start=seed.folder,
                budget="matched" if num_models > 1 else "paper",
                dense=False,
                dense_total=False,
                jobs=self.config.jobs,
            ),
            routing=RoutingConfig(rule="per_class", templates=("{}",)),
        )

    # ---------------------------------------------------------------- catalogs and clusters

    def _linked(self, number: int, way: str, catalog: Path | str) -> Path:
        """Return the folder of a way with its own columns: data files are links, since Lance writes none again.

        A clustering beside the catalog comes along.
        """
        paths, source = RunPaths(folder=self._folder(number, way)), RunPaths(folder=Path(catalog).parent)
        for origin, target in ((source.clusters, paths.clusters), (Path(catalog), paths.catalog_path)):
            if target.exists() or not origin.exists():
                continue
            part = target.with_name(f"{target.name}.part")
            shutil.rmtree(part, ignore_errors=True)
            skipped = shutil.ignore_patterns("_modeclip")
            shutil.copytree(origin, part, ignore=skipped, copy_function=_link)
            part.rename(target)
        return paths.folder

    def _clustered(self, number: int, folder: Path, encoder: str) -> _Made:
        """Embed and cluster the pairs of a way, unless that is done, and return what it took."""
        path, paths = folder / RECORD_FILE, RunPaths(folder=folder)
        if not path.is_file():
            started, catalog = time.monotonic(), Catalog.open(paths.catalog_path)
            found = embed(catalog, EmbedConfig(encoder=encoder))
            config = ClusterConfig(num_experts=self.plan.num_experts, seed=self.config.seed + number)
            result = cluster(Catalog.open(catalog.path), config)
            result.save(paths.clusters)
            of_image, count = encoder.startswith("clip-image:"), len(catalog)
            embedded = count if of_image else len(set(catalog.captions()))
            flops = self.plan.flops().image if of_image else self.plan.flops().text
            rounds = config.num_iterations + KMEANS_PASSES
            kmeans = 2.0 * rounds * count * len(result.clustering.fine_centers) * found.dimension
            made = _Made(flops=embedded * flops + kmeans, seconds=time.monotonic() - started)
            write_json(path, asdict(made))
        return read_json(path, _Made, AGAIN)

    # ---------------------------------------------------------------- questions and answers

    def _ask(self, number: int, models: dict[str, Path]) -> None:
        """Put the held-out questions to all ways of a seed, unless that is done."""
        folder = self._folder(number)
        if (folder / MEASURED_FILE).is_file():
            return
        cache = FeatureCache(self.paths.features)
        systems = open_systems([f"{name}={path}" for name, path in models.items()], cache)
        found = evaluate(systems, self.tasks, EvaluateConfig(templates=("{}",)), cache)
        write_results(folder / "results", found)
        write_json(folder / MEASURED_FILE, sorted(models))

    def _answers(self, number: int) -> dict[str, dict[str, Outcome]]:
        """Return what each way did with a seed, by task and way."""
        found: dict[str, dict[str, Outcome]] = {}
        for one in read_predictions(self._folder(number) / "results"):
            outcome = recall_outcome(one.outcome) if one.task == RETRIEVAL else one.outcome
            found.setdefault(one.task, {})[one.system] = outcome
        return found

    def _result(
        self, sample: dict[str, Any], seeds: list[TrainJob], attempts: list[dict[str, _Attempt]]
    ) -> dict[str, Any]:
        """Return all that the pilot has found, as JSON."""
        rows = [row for row in self.plan.rows() if all(row.name in each for each in attempts)]
        of_seed = [self._answers(number) for number in range(self.plan.seeds)]
        answers = {
            task.name: {row.name: [found[task.name][row.name] for found in of_seed] for row in rows}
            for task in self.tasks
        }
        gains = {name: gains_of(own) for name, own in answers.items()}
        task = self.tasks[0]
        verdict = decide(
            rows, gains[task.name], answers[task.name][DENSE], chance=_chance(task), measure=MEASURES[task.name]
        )
        plan = self.plan
        whole = plan.samples * plan.flops().training
        table = []
        for row in rows:
            costs = [self._cost(seed, each[row.name]) for seed, each in zip(seeds, attempts, strict=True)]
            table.append(
                {
                    "name": row.name,
                    "title": row.title,
                    "gain": {name: asdict(found[row.name]) for name, found in gains.items() if row.name in found},
                    "score": {name: mean_outcome(own[row.name]).score for name, own in answers.items()},
                    "recall": _recalls([found[RETRIEVAL][row.name] for found in of_seed]),
                    "seconds": float(np.mean([seconds for _, seconds, _ in costs])),
                    "cost": float(np.mean([flops for flops, _, _ in costs])) / whole,
                    "pairs": round(float(np.mean([pairs for _, _, pairs in costs]))),
                    "towers": row.towers,
                    "megabytes": _bytes_of(attempts[0][row.name].model) / 1e6,
                    "models": [str(each[row.name].model) for each in attempts],
                }
            )
        return {
            "verdict": asdict(verdict),
            "outlook": outlook(plan.samples, plan.flops().training) if IMAGES in {row.name for row in rows} else "",
            "measure": task.name,
            "chance": {one.name: _chance(one) for one in self.tasks},
            "questions": {one.name: len(one.texts) or len(one.images) for one in self.tasks},
            "num_classes": len(self.names),
            "rows": table,
            "plan": asdict(plan),
            "sample": sample,
            "minutes": self.config.minutes,
            "notes": list(dict.fromkeys(self.notes)),
        }

    def _cost(self, seed: TrainJob, attempt: _Attempt) -> tuple[float, float, int]:
        """Return the operations, the seconds and the pairs of a way, its seed model's included."""
        flops, seconds, pairs = attempt.made.flops, attempt.made.seconds, 0
        trained = [(seed, "all")] if attempt.has_seed else []
        for job, trainable in [*trained, *((job, attempt.trainable) for job in attempt.jobs)]:
            result = TrainResult.read(job)
            assert result is not None, job.folder
            flops += result.samples * self.plan.flops(trainable).training
            seconds += training_seconds(job, result)
            pairs += 0 if job is seed else result.rows
        return flops, seconds, pairs


MEASURES = {
    CLASS_NAMES: OF_NAMES,
    RETRIEVAL: "of retrieval (mean of R@1 and R@5, both ways)",
}
"""What the sentence calls the measures."""


def _chance(task: Task) -> float:
    """Return what guessing reaches: always the same class, or any order of the candidates."""
    if task.kind == "classification":
        return chance_of_names(task)
    return float(np.mean([min(1.0, k / len(task.texts)) for k in (1, 5)]))


def _recalls(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Return R@1 and R@5 both ways, averaged over the seeds."""
    names = [f"{side}_retrieval_recall@{k}" for side in ("image", "text") for k in (1, 5)]
    return {name: float(np.mean([outcome.metrics[name] for outcome in outcomes])) for name in names}


def _bytes_of(model: Path) -> int:
    """Return the size of the weights of a model, or of all models of a bundle."""
    files = [model / WEIGHTS_FILE] if (model / WEIGHTS_FILE).is_file() else model.rglob("*.safetensors")
    return sum(file.stat().st_size for file in files)


def _link(source: str, target: str) -> None:
    """Give a file a second name, or copy it where that cannot be."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
