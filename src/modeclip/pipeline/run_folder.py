"""`RunFolder` plans, trains, bundles and evaluates the models of a run; recipes and single commands work through it.

One model by itself is planned by `single_job`.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from modeclip.clustering.class_selection import PriorSelection, mark_prior, name_of, read_names, select_for_classes
from modeclip.clustering.clusters import Clustering
from modeclip.clustering.controls import CONTROL_COLUMNS, ONE_STEP_FOLDER, add_controls
from modeclip.clustering.fitting import (
    ClusterConfig,
    read_config,
)
from modeclip.clustering.novelty import fitted_quantiles
from modeclip.data.catalog import Catalog
from modeclip.data.selection import ALL, Selection
from modeclip.data.tasks.task import catalog_tasks
from modeclip.errors import DamagedError, ModeclipError
from modeclip.evaluation.evaluate import EvaluateConfig, evaluate, run_table
from modeclip.evaluation.results import Result, write_results
from modeclip.evaluation.systems import System, TrainedModel, run_systems
from modeclip.mixture.bundle import EDITS, RoutingConfig, assemble_bundle, encoder_of, is_bundled
from modeclip.mixture.manifest import MANIFEST_FILE
from modeclip.models.feature_cache import FeatureCache
from modeclip.pipeline.known_names import Contest
from modeclip.system.console import log
from modeclip.system.files import (
    only_process,
    read_json,
    versions,
    write_json,
)
from modeclip.system.paths import RunPaths
from modeclip.training.batches import job_rows
from modeclip.training.experts import (
    ExpertsConfig,
    fingerprint_of,
    names_job,
    part,
    pin_jobs,
    plan_jobs,
    reuse_models,
    seed_model,
)
from modeclip.training.jobs import TrainConfig, TrainJob, TrainResult
from modeclip.training.launching import run_jobs
from modeclip.training.preflight import check_negatives

EDITED = "edited"
"""State of a bundle that a user has changed since it was made: it stays as it is."""
LOCK_PATIENCE_SECONDS = 600.0
"""How long to wait for another process that writes the bundle of the same folder."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RunFolder(RunPaths):
    """A run's folder with a clustered catalog, and how its models are trained.

    The catalog and the clustering are opened, and the jobs are planned, when they are first asked for, and only once.
    """

    training: TrainConfig = field(default_factory=TrainConfig)
    """How each model is trained."""
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    """Which models there are, and where they run."""
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    """Rule and templates that the bundle keeps."""
    clustered_by: ClusterConfig | None = None
    """Settings of the clustering, for a folder of an earlier version, which does not tell them."""
    selection: Selection = ALL
    """Pairs that the models may be trained on."""
    encoder: str | None = None
    """Name of the catalog's encoder by whoever opens the folder, which is needed if it is Python code."""

    @cached_property
    def catalog(self) -> Catalog:
        """The catalog of the training pairs.

        Raises:
            ModeclipError: There is none, or it is not clustered.
        """
        catalog = Catalog.open(self.catalog_path.resolve())
        if "expert" not in catalog.columns:
            raise ModeclipError(f"catalog {catalog.path!r} is not clustered: run modeclip cluster {self.folder} first")
        return catalog

    @cached_property
    def clustering(self) -> Clustering:
        """The clustering that the catalog's experts come from.

        Raises:
            ModeclipError: There is none, or the catalog was clustered in another way since.
        """
        clustering = Clustering.load(self.clusters)
        facts = self.catalog.facts("expert") or {}
        if facts.get("clustering", clustering.digest) != clustering.digest:
            raise ModeclipError(
                f"{self.clusters} is not the clustering that the catalog's column expert comes from: run modeclip"
                f" cluster {self.folder} again"
            )
        return clustering

    @cached_property
    def cluster_config(self) -> ClusterConfig:
        """The settings that the clustering was made with, by which the controls are split too."""
        known = read_config(self.clusters) or self.clustered_by
        if known is not None:
            return known
        sizes = {"num_fine": self.clustering.num_fine, "num_experts": self.clustering.num_experts}
        return ClusterConfig(**sizes, seed=self.training.seed)

    @cached_property
    def fingerprint(self) -> str:
        """What the training data and, if it is a folder, the start model are known by."""
        return fingerprint_of(self.catalog, self.clustering, self.training.model)

    @property
    def split_controls(self) -> list[str]:
        """The controls that need a column of the catalog; none where only some experts are trained."""
        return [] if self.experts.only else sorted(CONTROL_COLUMNS.keys() & set(self.experts.controls))

    def add_controls(self) -> dict[str, Int[np.ndarray, " K"]]:
        """Add the columns of the controls that the catalog lacks; return the rows of each of their models."""
        return add_controls(self.catalog, self.split_controls, self.cluster_config, self.clusters, self.selection)

    @cached_property
    def jobs(self) -> list[TrainJob]:
        """The models that were asked for, in the order in which they should start.

        Raises:
            ModeclipError: The settings fit neither the clustering nor each other, or the catalog lacks the column of a
            control (`add_controls`) or that of the expert for class names (`mark_classes`).
        """
        return self._plan(self.experts)

    @cached_property
    def members(self) -> list[TrainJob]:
        """The seed and every expert of the clusters, those of other machines and earlier calls included."""
        every = replace(self.experts, only=(), order="index", controls=(), for_classes=())
        jobs = self._plan(every) if self.experts.only else self.jobs
        members = [job for job in jobs if is_bundled(job) and job.role != "prior"]
        return sorted(members, key=lambda job: -1 if job.index is None else job.index)

    @property
    def class_experts(self) -> list[TrainJob]:
        """The experts for class names that are done in this folder and continue the seed of its experts."""
        starts = {job.start_digest for job in self.members if job.role == "expert"}
        found = []
        for path in sorted(self.models.resolve().glob("expert-*/job.json")):
            with suppress(ModeclipError):  # damaged: it cannot be part of the bundle
                job = replace(TrainJob.load(path), folder=str(path.parent))
                if job.role == "prior" and job.start_digest in starts and TrainResult.read(job) is not None:
                    found.append(job)
        return found

    def mark_classes(self, classes: Sequence[str], nearest: int = 1) -> PriorSelection:
        """Mark the rows of an expert for class names in the catalog, and return which fine clusters they are of.

        Args:
            classes: Files of class names, or lists with commas; one expert is trained for all of them.
            nearest: Fine clusters that each class name takes; 0: the pairs whose caption is one of the names.

        Raises:
            ModeclipError: A file cannot be read, the captions were not embedded by an encoder of texts, or none of
                them is a name where those that are were asked for.
        """
        names, name = read_names(classes), name_of(classes)
        prior = select_for_classes(self.catalog, self.clustering, names, name=name, count=nearest, encoder=self.encoder)
        mark_prior(self.catalog, prior)
        return prior

    def jobs_for_classes(self, classes: Sequence[str], nearest: int = 1) -> list[TrainJob]:
        """Return the job of one expert for class names, behind the seed's; its rows are marked in the catalog.

        Args:
            classes: As for `mark_classes`.
            nearest: As for `mark_classes`.

        Raises:
            ModeclipError: As for `mark_classes`.
        """
        prior = self.mark_classes(classes, nearest)
        models = self.models.resolve()
        parting = part(Path(self.catalog.path), self.fingerprint, models, self.training, self.experts, self.selection)
        expert = replace(names_job(parting, prior.name), catalog_fingerprint=f"{self.fingerprint}-{prior.digest}")
        return pin_jobs([expert] if parting.seed is None else [parting.seed, expert], self.catalog)

    def train(
        self, jobs: Sequence[TrainJob], *, ray: bool = False, stop_on_failure: bool = False, bundle: bool = False
    ) -> dict[str, TrainResult]:
        """Train the jobs that are not finished yet.

        Args:
            jobs: Of this folder.
            ray: Run them on Ray.
            stop_on_failure: Stop all of them when one fails.
            bundle: Bring the bundle up to date after each expert that is done.

        Returns:
            Results by the jobs' names.

        Raises:
            ModeclipError: Jobs failed.
        """

        def refresh(job: TrainJob) -> None:
            if bundle and job.role == "expert":
                try:
                    self.refresh_bundle()
                except (ModeclipError, OSError) as error:  # no reason to stop the other experts; it is tried again
                    log(f"bundle: {error}")

        self.reuse_models(jobs)
        for job in jobs:  # an expert with too few pairs, or without a negative, is an error before the seed is trained
            if TrainResult.read(job) is None and (
                warning := check_negatives(job, self.catalog, job_rows(job, self.catalog))
            ):
                log(warning)
        return run_jobs(
            jobs,
            self.experts.jobs,
            processes=self.experts.processes_per_job,
            ray=ray,
            stop_on_failure=stop_on_failure,
            on_done=refresh,
        )

    def reuse_models(self, jobs: Sequence[TrainJob]) -> None:
        """Bring finished models to the jobs that they fit, where clusters have got other numbers; say which."""
        if self.models.is_dir():
            with only_process(self.models, LOCK_PATIENCE_SECONDS):
                for words in reuse_models(jobs):
                    log(f"the same pairs as before: {words}")

    def refresh_bundle(self) -> Path | None:
        """Write the bundle of the experts that are done, unless it is up to date or was edited since.

        Returns:
            Its folder; None where no expert is done.
        """
        done = [job for job in self.members if TrainResult.read(job) is not None] + self.class_experts
        if all(job.role not in {"expert", "prior"} for job in done):
            return None
        with only_process(self.models, LOCK_PATIENCE_SECONDS):
            lineage = self.lineage
            if self.is_edited:
                log(
                    f"bundle: {self.bundle} was edited since it was made and stays as it is; modeclip bundle adds to it"
                )
            elif (
                lineage.get("jobs") != {job.name: job.digest for job in done}
                or lineage.get("catalog_fingerprint") != self.members[0].catalog_fingerprint
                or "experts" not in lineage.get("recipe", {})  # an earlier version wrote it
            ):
                self.write_bundle()
        return self.bundle

    @property
    def lineage(self) -> dict[str, Any]:
        """What the bundle says that it was made from; nothing where there is none, or where it is damaged."""
        with suppress(DamagedError):
            lineage = read_json(self.bundle / MANIFEST_FILE, dict[str, Any], "").get("lineage")
            return lineage if isinstance(lineage, dict) else {}
        return {}

    @property
    def is_edited(self) -> bool:
        """Whether the bundle was edited since it was made from the run."""
        return bool(self.lineage.get(EDITS))

    def write_bundle(self, *, name: str | None = None, lineage: Mapping[str, Any] | None = None) -> Path:
        """Write the bundle of the models that are done, in the place of any other, and return its folder.

        Args:
            name: Of the run; the folder's by default.
            lineage: What else the models were made from; their settings are always recorded.

        Raises:
            ModeclipError: The seed is not trained yet.
        """
        recipe = {"train": asdict(self.decided), "experts": asdict(self.experts)}
        if not self.selection.is_all:
            recipe["selection"] = asdict(self.selection)
        return assemble_bundle(
            self.folder,
            [*self.members, *self.class_experts],
            self.routing,
            seed=self.seed if self.experts.start is not None else None,
            name=name,
            lineage={"recipe": recipe} | dict(lineage or {}),
        )

    @property
    def seed(self) -> Path:
        """The model folder of the seed, trained here or given."""
        return seed_model(self.models, self.decided, self.experts)

    @property
    def decided(self) -> TrainConfig:
        """The training with the model and the learning rate that the plan chose, where it leaves them open."""
        planned = self.members[0].config
        return replace(self.training, model=planned.model, learning_rate=planned.learning_rate)

    def evaluate(self, name: str, *, batch_size: int = 512, knowledge: Sequence[str] = ()) -> dict[str, Any]:
        """Score the finished models on the held-out tasks and write ``results.json`` and ``results``.

        ``results.json`` is the table that the report shows; the folder ``results`` has what `modeclip evaluate` writes,
        the answer to every image among it, so that two runs can be compared.

        Args:
            name: Of the run.
            batch_size: Images encoded at a time.
            knowledge: Dictionaries whose definitions stand behind the prompts.

        Returns:
            What was written.
        """
        results = {
            "name": name,
            "date": datetime.now(UTC).date().isoformat(),
            "seed": self.training.seed,
            "machine": _machine(),
        }
        shutil.rmtree(self.answers, ignore_errors=True)  # of an earlier evaluation, which may have had other systems
        if self.tasks_path.exists():
            one_step, cache = self.clusters / ONE_STEP_FOLDER, FeatureCache(self.features)
            tasks = catalog_tasks(Catalog.open(self.tasks_path))
            encoder = encoder_of(self.catalog)
            models = self._trained_models()
            systems = run_systems(
                models,
                self.clustering,
                encoder,
                self.routing,
                cache,
                one_step=Clustering.load(one_step) if "one-step" in self.split_controls else None,
                trust_encoder=encoder == self.encoder,
                quantiles=fitted_quantiles(self.catalog, self.clustering.num_fine, self.selection),
            )
            config = EvaluateConfig(batch_size=batch_size, knowledge=tuple(knowledge))
            found = evaluate(systems, tasks, config, cache, done=lambda part: write_results(self.answers, part))
            results |= run_table(systems, tasks, found)
            results |= {"knowledge": list(knowledge)} if knowledge else {}
            if self.experts.for_classes:
                results |= self._decision(systems, models, found, config, cache)
            cache.remove_unused()
        else:
            results |= {"tasks": [], "chance": {}, "majority": {}, "models": [], "routing": {}}
        write_json(self.results, results)
        return results

    def _decision(
        self,
        systems: Sequence[System],
        models: Sequence[TrainedModel],
        found: Sequence[Result],
        config: EvaluateConfig,
        cache: FeatureCache,
    ) -> dict[str, Any]:
        """Ask what the expert for class names gains; return the part ``decision`` of the results, if there is one."""
        sources = self.experts.for_classes
        held, expert = Catalog.open(self.tasks_path), f"expert-{name_of(sources)}"
        contest = Contest.of(held, read_names(sources), expert, systems)
        if contest is None:
            return {}
        asked = evaluate(list(contest.systems.values()), [contest.task], config, cache)
        write_results(self.names_answers, asked)
        of_system = {result.system: result.outcome for result in asked}
        answers = {way: [of_system[system.name]] for way, system in contest.systems.items()}
        elsewhere = {
            way: [{result.task.name: result.outcome for result in found if result.system == system.name}]
            for way, system in contest.systems.items()
        }
        return {"decision": contest.decision(answers, elsewhere, models)}

    def _trained_models(self) -> list[TrainedModel]:
        """Return the finished models of the run and of its bundle, the seed among them also where it was given."""
        jobs = {job.name: job for job in (*self.jobs, *self.members)}
        models = [model for job in jobs.values() if (model := TrainedModel.of(job)) is not None]
        if all(model.role != "seed" for model in models):
            models.append(TrainedModel.given(self.seed))
        return models

    def _plan(self, experts: ExpertsConfig) -> list[TrainJob]:
        jobs = plan_jobs(
            Path(self.catalog.path),
            self.fingerprint,
            self.models.resolve(),
            self.clustering.num_experts,
            self.training,
            experts,
            ranges=self.clustering.range_of_expert,
            selection=self.selection,
        )
        return pin_jobs(jobs, self.catalog)


def single_job(
    catalog: Catalog,
    folder: Path,
    train: TrainConfig,
    *,
    selection: Selection = ALL,
    start: str | None = None,
    threads: int = 1,
) -> TrainJob:
    """Return the job that trains one model by itself, from the start or onwards from another model.

    Args:
        catalog: Any catalog.
        folder: Where the model goes; the folder's name becomes the job's.
        train: How the model is trained.
        selection: Rows to train on.
        start: Folder of a finished job, or a checkpoint (``.pt``) of open_clip_train. The job then takes the steps
            after ``train.seed_parts``, as an expert does after its seed; None takes the whole schedule.
        threads: Threads that compute.

    Raises:
        ModeclipError: The selection keeps too few pairs, a column that training reads does not fit, or the start
            cannot be continued.
    """
    folder = folder.resolve()
    fingerprint = fingerprint_of(catalog, None, train.model)
    if not selection.is_all:
        rows = selection.rows(catalog)
        fingerprint += f"-{sha256(rows.tobytes()).hexdigest()[:16]}"
    experts = ExpertsConfig(start=start, threads_per_job=threads)
    where, others = selection.split(catalog)
    parting = part(Path(catalog.path), fingerprint, folder.parent, train, experts, others)
    job = replace(parting.branch("single", name=folder.name), where=where)
    if parting.seed is not None:
        job = replace(job, first_step=0, first_share=0.0, start_from=None, start_digest="")
    job_rows(job, catalog)  # what cannot be trained on is told before anything is written
    return pin_jobs([job], catalog)[0]


def _machine() -> dict[str, Any]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor() or platform.machine()
    known = versions()
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "python": platform.python_version(),
        "torch": known["torch"],
        "open_clip": known["open_clip_torch"],
        "modeclip": known["modeclip"],
    }
