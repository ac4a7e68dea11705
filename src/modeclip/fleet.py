"""A folder with a clustered catalog -> the jobs of its experts, for planning, commands, training and the bundle.

    RUN/catalog.lance   with the columns ``expert`` and ``fine_cluster``
    RUN/clusters/       the clustering that they come from
    RUN/models/         a folder for each job
    RUN/bundle/         written anew after each expert that is done

Which experts there are is decided by the clusters, or by class names of tasks: then one expert is trained on the fine
clusters nearest to them (``modeclip.clustering.class_selection``). One model by itself is a job of the same kind: `single_job`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from modeclip.clustering.class_selection import PriorSelection, mark_prior, name_of, read_classes, select_for_classes
from modeclip.clustering.clusters import Clustering
from modeclip.clustering.controls import add_controls
from modeclip.clustering.fitting import ClusterConfig
from modeclip.data.catalog import Catalog
from modeclip.errors import ModeclipError
from modeclip.evaluation.run_evaluation import EvaluateConfig
from modeclip.mixture.bundle import EDITS, MANIFEST_FILE
from modeclip.mixture.bundling import BUNDLE, CLUSTERS, assemble_bundle, is_bundled
from modeclip.system.console import log
from modeclip.system.files import only_process
from modeclip.training.experts import ExpertsConfig, fingerprint_of, part, pin_jobs, plan_jobs, seed_model
from modeclip.training.jobs import TrainConfig, TrainJob, TrainResult
from modeclip.training.launching import run_jobs

MODELS = "models"
LOCK_PATIENCE_SECONDS = 600.0
"""How long to wait for another process that writes the bundle of the same folder."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Fleet:
    """The jobs of a run folder."""

    run: Path
    """The folder, absolute."""
    catalog: Catalog
    """Its catalog."""
    train: TrainConfig
    """How each model is trained."""
    experts: ExpertsConfig
    """Which models there are, and where they run."""
    fingerprint: str
    """What the pairs, the clustering and the start model are known by."""
    jobs: tuple[TrainJob, ...]
    """In the order in which they should start."""
    prior: PriorSelection | None = None
    """What class names asked for, where there are any."""

    @property
    def missing(self) -> list[TrainJob]:
        """Jobs that are not done yet."""
        return [job for job in self.jobs if TrainResult.read(job) is None]

    def run_missing(self, *, ray: bool = False, stop_on_failure: bool = False, evaluate: EvaluateConfig) -> Path | None:
        """Train what is missing, and write the bundle anew after each expert that is done.

        Args:
            ray: Run on Ray.
            stop_on_failure: Stop all when one fails.
            evaluate: What the bundle does by default.

        Returns:
            The bundle's folder; None where no expert of the clusters is done.

        Raises:
            ModeclipError: Jobs failed, or the bundle cannot be written.
        """

        def refresh(job: TrainJob) -> None:
            if job.role == "expert":
                try:
                    self.write_bundle(evaluate)
                except (ModeclipError, OSError) as error:  # no reason to stop the other experts; it is tried again
                    log(f"bundle: {error}")

        run_jobs(
            self.jobs,
            self.experts.jobs,
            processes=self.experts.processes_per_job,
            ray=ray,
            stop_on_failure=stop_on_failure,
            on_done=refresh,
        )
        return self.write_bundle(evaluate)

    def write_bundle(self, evaluate: EvaluateConfig) -> Path | None:
        """Write the bundle of what is done, unless it is there already or was edited since.

        Args:
            evaluate: Rule, temperature and templates that it uses by default.

        Returns:
            Its folder; None where no expert of the clusters is done.
        """
        done = [job for job in self.members if TrainResult.read(job) is not None]
        if all(job.role != "expert" for job in done):
            return None
        with only_process(self.run / MODELS, LOCK_PATIENCE_SECONDS):
            folder = self.run / BUNDLE
            lineage = self._lineage(folder)
            if lineage.get(EDITS):
                log(f"bundle: {folder} was edited since it was made and stays as it is; modeclip bundle adds to it")
            elif lineage.get("jobs") != {job.name: job.digest for job in done}:
                given = self.experts.start is not None
                assemble_bundle(
                    self.run,
                    self.members,
                    evaluate,
                    lineage={"catalog_fingerprint": self.fingerprint},
                    seed=seed_model(self.run / MODELS, self.train, self.experts) if given else None,
                )
        return folder

    @cached_property
    def members(self) -> list[TrainJob]:
        """Return the seed and all experts of the clusters, those of other machines and earlier calls included."""
        everyone = replace(self.experts, only=(), controls=(), order="index")
        clustering = Clustering.load(self.run / CLUSTERS)
        jobs = plan_jobs(
            Path(self.catalog.path), self.fingerprint, self.run / MODELS, clustering.num_experts, self.train, everyone
        )
        return [job for job in jobs if is_bundled(job)]

    def _lineage(self, folder: Path) -> Mapping[str, Any]:
        try:
            content = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):  # there is none, or it is damaged: it is written anew
            return {}
        return dict(content.get("lineage", {}))


def open_fleet(
    run: Path, train: TrainConfig, experts: ExpertsConfig, *, classes: Sequence[str] = (), nearest: int = 1
) -> Fleet:
    """Open a run folder's experts; the catalog gets the columns that they need.

    Args:
        run: Folder with ``catalog.lance`` and ``clusters/``.
        train: How each model is trained.
        experts: Which models there are.
        classes: Files of class names, or lists with commas: one expert is trained for all of them, in place of those
            of the clusters.
        nearest: Fine clusters that each class name takes.

    Raises:
        ModeclipError: The folder has no catalog or no clustering of it, or a setting is of no use.
    """
    run = run.resolve()
    catalog, clustering = Catalog.open(run), Clustering.load(run / CLUSTERS)
    if "expert" not in catalog.columns:
        raise ModeclipError(f"catalog {catalog.path!r} is not clustered: run modeclip cluster {run} first")
    facts = catalog.facts("expert") or {}
    if facts.get("clustering", clustering.digest) != clustering.digest:
        raise ModeclipError(
            f"{run / CLUSTERS} is not the clustering that the catalog's column expert comes from: run modeclip cluster"
            f" {run} again"
        )
    fingerprint, path = fingerprint_of(catalog, clustering, train.model), Path(catalog.path)
    if classes:
        names = [name for source in classes for name in read_classes(source)]
        prior = select_for_classes(catalog, clustering, names, name=name_of(classes), count=nearest)
        mark_prior(catalog, prior)
        parting = part(path, fingerprint, run / MODELS, train, experts)
        expert = parting.branch("prior", name=f"expert-{prior.name}")
        expert = replace(expert, mask=prior.column, catalog_fingerprint=f"{fingerprint}-{prior.digest}")
        jobs = [expert] if parting.seed is None else [parting.seed, expert]
    else:
        prior = None
        if experts.controls:
            config = ClusterConfig(num_fine=clustering.num_fine, num_experts=clustering.num_experts, seed=train.seed)
            add_controls(catalog, experts.controls, config, run / CLUSTERS)
        ranges = clustering.range_of_expert
        planned = plan_jobs(path, fingerprint, run / MODELS, clustering.num_experts, train, experts, ranges=ranges)
        jobs = pin_jobs(planned, catalog)
    return Fleet(
        run=run, catalog=catalog, train=train, experts=experts, fingerprint=fingerprint, jobs=tuple(jobs), prior=prior
    )


def single_job(
    catalog: Catalog,
    folder: Path,
    train: TrainConfig,
    *,
    where: Mapping[str, int] | None = None,
    mask: str | None = None,
    start: str | None = None,
    threads: int = 1,
) -> TrainJob:
    """Return the job of one model by itself, with a schedule of its own or behind what it starts from.

    Args:
        catalog: Any catalog.
        folder: Where the model goes; its name is that of the job.
        train: How it is trained.
        where: Columns and their values: only such rows.
        mask: Column of booleans: only the rows that it marks.
        start: Folder of a finished job or checkpoint (``.pt``) of open_clip_train: the job takes the steps behind
            ``train.seed_parts``, as an expert does behind its seed; None: the whole schedule.
        threads: Threads that compute.

    Raises:
        ModeclipError: There is no such column or value, or the start is of no use.
    """
    where, folder = dict(where or {}), folder.resolve()
    fingerprint = fingerprint_of(catalog, None, train.model)
    if where or mask:
        rows = catalog.select(mask=mask, **where)
        fingerprint += f"-{sha256(rows.tobytes()).hexdigest()[:16]}"
    experts = ExpertsConfig(start=start, threads_per_job=threads)
    parting = part(Path(catalog.path), fingerprint, folder.parent, train, experts)
    job = replace(parting.branch("single", name=folder.name), where=where, mask=mask)
    if parting.seed is None:
        return job
    return replace(job, first_step=0, first_share=0.0, start_from=None, start_digest="")
