"""A clustered catalog and a budget -> the jobs of the whole method: the seed, its experts, and their controls.

The jobs are: the seed model on all data; the dense control that simply goes on with all data; a second dense control
at the mixture's total cost, the row that says what the same compute buys without experts; one data expert per cluster,
each continuing from the seed; and, on request, models that control for other explanations of a mixture's gain. A job
needs the seed and nothing else, so experts train in any order, anywhere. The seed may be given instead of trained.

Budgets (METHOD: "one epoch" is a number of samples, not a pass over the data):
    paper     every expert sees as many samples as the dense control does after the seed: n experts cost n times that.
    matched   the experts together see what the dense control sees.

Source: MoDE Sec. 3.3, 4.2, 5.1, 5.2 (controls) and 5.5 (largest range first), and the released default of 2 % of
out-of-cluster samples, which is an option here and 0 as in the paper.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from modeclip.clustering.clusters import Clustering
from modeclip.clustering.controls import CONTROL_COLUMNS
from modeclip.clustering.fitting import count_pairs
from modeclip.data.catalog import Catalog
from modeclip.errors import ModeclipError
from modeclip.models.clip import check_model
from modeclip.system.files import hash_file
from modeclip.training.jobs import JOB_FILE, Role, TrainConfig, TrainJob, TrainResult, job_name


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """How the experts and their controls are trained."""

    budget: Literal["paper", "matched"] = "paper"
    """Samples of an expert: ``paper`` as many as the dense control's rest, ``matched`` that divided by the experts."""
    out_of_cluster_fraction: float = 0.0
    """Share of the pairs of other clusters that every expert sees too, in [0, 1] (released code: 0.02; paper: 0)."""
    order: Literal["index", "range", "size"] = "index"
    """Which expert starts first: by number, by range (the paper: largest first), or by pairs (most first)."""
    only: tuple[int, ...] = ()
    """Experts that are trained, by number, without any control; none given: all, with the controls."""
    start: str | None = None
    """Trained seed that the experts start from: the folder of a finished job or a checkpoint (``.pt``) of
    open_clip_train, both with optimizer state, or a model specification, whose experts then have a schedule of their
    own with a warm-up (fine-tuning). None: the seed is trained too."""
    dense: bool = True
    """Also train the dense control: the seed goes on with all data, as long as one expert of the paper."""
    dense_total: bool = True
    """Also train a dense model at the mixture's total cost, on a schedule of its own: the fair comparison. Where the
    dense control has that cost (``matched``), it is that model."""
    controls: tuple[Literal["random", "full", "one-step"], ...] = ()
    """Further mixtures of as many models: ``random`` split in the clusters' sizes, ``full`` data with other seeds,
    ``one-step`` clusters (as many fine clusters as experts)."""
    jobs: int = 2
    """Processes, or with ``processes_per_job`` groups of them, that train at the same time."""
    threads_per_job: int = 1
    """Threads of each process; another number changes the order of sums and so the last bits of the weights."""
    processes_per_job: int = 1
    """Processes that train one model together, a GPU each, by torchrun; they divide its batches."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 <= self.out_of_cluster_fraction <= 1:
            raise ModeclipError(
                f"experts.out_of_cluster_fraction must lie in [0, 1], got {self.out_of_cluster_fraction}"
            )
        for name in ("jobs", "threads_per_job", "processes_per_job"):
            if getattr(self, name) < 1:
                raise ModeclipError(f"experts.{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Parting:
    """The point of the schedule at which all branches part: the end of the seed model."""

    seed: TrainJob | None
    """The job that trains the seed; None where it is given."""
    rest: TrainJob
    """From there to the end of the schedule on all data; every branch is a variation of it."""

    def branch(
        self, role: Role, index: int | None = None, *, name: str | None = None, steps: int | None = None
    ) -> TrainJob:
        """Return a job that starts where the seed ends, in a folder beside the seed's.

        Args:
            role: What the model is for.
            index: Which of them it is, for roles of which there are several.
            name: Of the model and of its folder; by default what role and index make.
            steps: How many it takes to the end of the schedule; by default as many as the dense control's rest.
        """
        last_step = self.rest.last_step if steps is None else self.rest.first_step + steps
        name = name or job_name(role, index)
        folder = str(Path(self.rest.folder).with_name(name))
        return replace(self.rest, name=name, role=role, index=index, folder=folder, last_step=last_step)

    @property
    def num_steps(self) -> int:
        """Steps from there to the end of the schedule."""
        return self.rest.last_step - self.rest.first_step


def plan_jobs(
    catalog: Path,
    fingerprint: str,
    folder: Path,
    num_experts: int,
    train: TrainConfig,
    experts: ExpertsConfig,
    *,
    ranges: Sequence[float] | Float[np.ndarray, " K"] | None = None,
) -> list[TrainJob]:
    """Return the jobs of the method in the order in which they should start.

    Args:
        catalog: Path of the clustered catalog.
        fingerprint: Hash of the catalog's pairs and of their clustering.
        folder: Where the models go, a folder each.
        num_experts: Experts.
        train: Settings shared by all models.
        experts: Budget, start and controls.
        ranges: Range of each expert (MoDE Sec. 5.5); None: experts are numbered by decreasing range, as they are made.

    Raises:
        ModeclipError: A number in ``experts.only`` is no expert, or what the experts should start from is of no use.
    """
    if wrong := [k for k in experts.only if not 0 <= k < num_experts]:
        raise ModeclipError(f"experts.only: there is no expert {wrong[0]}; expected 0 to {num_experts - 1}")
    parting = part(catalog, fingerprint, folder, train, experts)
    steps = max(1, parting.num_steps // num_experts) if experts.budget == "matched" else parting.num_steps
    numbers = [k for k in _order(catalog, num_experts, experts.order, ranges) if not experts.only or k in experts.only]
    jobs = [] if parting.seed is None else [parting.seed]
    if not experts.only:
        jobs += _dense_controls(parting, num_experts * steps, experts)
    roles: tuple[Role, ...] = ("expert", *(() if experts.only else experts.controls))
    for role in roles:
        jobs += [_member(parting, role, k, steps, experts) for k in numbers]
    return jobs


def part(catalog: Path, fingerprint: str, folder: Path, train: TrainConfig, experts: ExpertsConfig) -> Parting:
    """Return where the experts part from the seed, be it trained here or given; arguments as for `plan_jobs`."""
    seed_steps = train.seed_parts * train.steps_per_part
    seed = TrainJob(
        name=job_name("seed"),
        role="seed",
        folder=str(folder / job_name("seed")),
        catalog=str(catalog),
        catalog_fingerprint=fingerprint,
        config=train,
        first_step=0,
        last_step=seed_steps,
        first_share=0.0,
        last_share=train.seed_parts / train.total_parts,
        threads=experts.threads_per_job,
    )
    rest = replace(
        seed,
        name=job_name("dense"),
        role="dense",
        folder=str(folder / job_name("dense")),
        first_step=seed_steps,
        last_step=train.total_parts * train.steps_per_part,
        first_share=seed.last_share,
        last_share=1.0,
        start_from=seed.folder,
        start_digest=seed.digest,
    )
    return Parting(seed=seed, rest=rest) if experts.start is None else Parting(seed=None, rest=_given(rest, experts))


def _given(rest: TrainJob, experts: ExpertsConfig) -> TrainJob:
    """Return the rest of the schedule behind a seed that is given."""
    start, num_steps = str(experts.start), rest.last_step - rest.first_step
    path = Path(start)
    if path.suffix == ".pt":
        if not path.is_file():
            raise ModeclipError(f"experts.start: {path}: no such file; expected a checkpoint of open_clip_train")
        return replace(rest, start_from=str(path.resolve()), start_digest=hash_file(path))
    if not (path / JOB_FILE).is_file():
        check_model(start)
        fresh = replace(rest, config=replace(rest.config, model=start), start_from=None, start_digest="")
        return replace(fresh, first_step=0, last_step=num_steps, first_share=0.0)
    seed = TrainJob.load(path / JOB_FILE)
    if TrainResult.read(seed) is None:
        raise ModeclipError(f"experts.start: the job in {path} is not finished; train it first: modeclip train {path}")
    if seed.config.model != rest.config.model:
        raise ModeclipError(
            f"experts.start: {path} is a {seed.config.model}, train.model is {rest.config.model}; give the same model"
        )
    return replace(
        rest,
        start_from=str(path.resolve()),
        start_digest=seed.digest,
        first_step=seed.last_step,
        last_step=seed.last_step + num_steps,
        first_share=seed.last_share if seed.last_share < 1 else 0.0,  # behind a whole schedule a new one begins
    )


def seed_model(folder: Path, train: TrainConfig, experts: ExpertsConfig) -> Path:
    """Return the model folder of the seed, which stands in for missing experts; one that is given is exported to it.

    Args:
        folder: Where the models are.
        train: Names the model.
        experts: Says whether the seed is given.
    """
    own, start = folder / job_name("seed"), experts.start
    if start is None or (Path(start) / JOB_FILE).is_file():
        return own if start is None else Path(start)
    if not own.is_dir():
        from modeclip.models.clip import load_clip, save_clip

        spec = f"{train.model.partition('@')[0]}@{start}" if start.endswith(".pt") else start
        save_clip(load_clip(spec, seed=train.seed), own)
    return own


def fingerprint_of(catalog: Catalog, clustering: Clustering | None, model: str) -> str:
    """Return what the training data and, if it is a folder, the start model are known by.

    Args:
        catalog: Its pairs.
        clustering: What decided the experts of the pairs; None where no expert is trained.
        model: Model specification.
    """
    start = Path(model.removeprefix("local-dir:"))
    weights = [hash_file(file) for file in sorted(start.glob("open_clip*")) if file.is_file()]
    parts = [catalog.fingerprint, *([] if clustering is None else [clustering.digest]), *weights]
    return sha256("-".join(parts).encode()).hexdigest()[:16]


def _order(
    catalog: Path, num_experts: int, order: str, ranges: Sequence[float] | Float[np.ndarray, " K"] | None
) -> list[int]:
    """Return the experts in the order in which they start; of equals the lower number first."""
    if order == "size":
        first: Int[np.ndarray, " K"] | Float[np.ndarray, " K"] = -count_pairs(Catalog.open(catalog), num_experts)
    elif order == "range" and ranges is not None:
        first = -np.asarray(ranges, np.float64)
    else:
        first = np.zeros(num_experts, np.int64)
    return [int(k) for k in np.argsort(first, kind="stable")]


def pin_jobs(jobs: Sequence[TrainJob], catalog: Catalog) -> list[TrainJob]:
    """Return the jobs with each control's job tied to the column that selects its rows.

    The fingerprint of every other job already says how its rows are selected. A control's job also carries a hash of
    how its column was made, so that it is trained again when that column is made in another way.
    """
    pinned = []
    for job in jobs:
        for column in sorted(job.where.keys() & set(CONTROL_COLUMNS.values())):
            made_by = sha256(json.dumps(catalog.facts(column), sort_keys=True).encode()).hexdigest()[:16]
            job = replace(job, catalog_fingerprint=f"{job.catalog_fingerprint}-{made_by}")
        pinned.append(job)
    return pinned


def _dense_controls(parting: Parting, mixture_steps: int, experts: ExpertsConfig) -> list[TrainJob]:
    """Return the dense models that the mixture is compared with, the longest first; where both are one, that one."""
    jobs = []
    same = parting.seed is not None and experts.dense and mixture_steps == parting.num_steps
    if experts.dense_total and not same:
        whole = parting.branch("dense-total", steps=mixture_steps)
        if parting.seed is not None:  # its schedule is planned for that length from the start
            begun = replace(whole, first_step=0, first_share=0.0)
            whole = replace(begun, start_from=None, start_digest="")
        jobs.append(whole)
    return [*jobs, parting.branch("dense")] if experts.dense else jobs


def _member(parting: Parting, role: Role, k: int, steps: int, experts: ExpertsConfig) -> TrainJob:
    """Return one model of a mixture: of the experts, or of a control."""
    job = parting.branch(role, k, steps=steps)
    if role == "full":
        return replace(job, config=replace(job.config, seed=job.config.seed + 1 + k))
    where = {CONTROL_COLUMNS.get(role, "expert"): k}
    return replace(job, where=where, out_of_cluster_fraction=experts.out_of_cluster_fraction)
