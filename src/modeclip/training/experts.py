"""Plan the jobs of the whole method: the seed, its experts, and the models that they are compared with.

The seed is trained on all data. The dense control goes on with all data. A second dense control costs as much as the
whole mixture and so shows what the same compute buys without experts. Each data expert continues from the seed on its
own cluster. On request there are models that control for other explanations of a mixture's gain. Every job needs the
seed and nothing else, so experts train in any order, anywhere. The seed may be given instead of trained.

An expert's budget is a number of samples, not of passes over its data:
    paper     each expert sees as many samples as the dense control does after the seed; n experts cost n times that.
    matched   the experts together see as many samples as the dense control does after the seed.

Source: MoDE Sec. 3.3, 4.2, 5.1, 5.2 (controls) and 5.5 (largest range first). The released code gives an expert 2 % of
the samples of other clusters; here that is an option, and 0 as in the paper.
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
from modeclip.errors import ModeclipError, check_least
from modeclip.models.clip import check_model, load_clip, save_clip
from modeclip.system.files import hash_file
from modeclip.training.jobs import JOB_FILE, Role, TrainConfig, TrainJob, TrainResult, job_name


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """Which experts and controls are trained, and how they run."""

    budget: Literal["paper", "matched"] = "paper"
    """Samples of an expert: as many as the dense control sees after the seed (``paper``), or that number divided by the
    number of experts (``matched``)."""
    out_of_cluster_fraction: float = 0.0
    """Share of the pairs of other clusters that each expert sees too, in [0, 1] (released code: 0.02; paper: 0)."""
    order: Literal["index", "range", "size"] = "index"
    """Order in which the experts start: by number, by range (largest first, as in the paper), or by pairs (most
    first)."""
    only: tuple[int, ...] = ()
    """Numbers of the experts to train, without any control. None given: all experts, and the controls."""
    start: str | None = None
    """Trained seed that the experts start from. The folder of a finished job and a checkpoint (``.pt``) of
    open_clip_train bring their optimizer state; experts of a model specification get a schedule of their own with a
    warm-up (fine-tuning). None: the seed is trained too."""
    dense: bool = True
    """Also train the dense control: the seed goes on with all data for as long as one expert of the paper."""
    dense_total: bool = True
    """Also train a dense model at the mixture's total cost, on a schedule of its own, for a fair comparison. Where the
    dense control has that cost already (``matched``), it serves as this model."""
    controls: tuple[Literal["random", "full", "one-step"], ...] = ()
    """Control mixtures with as many models as there are experts: ``random`` splits the data at random into the
    clusters' sizes, ``full`` trains on all data with other seeds, ``one-step`` clusters into experts directly."""
    jobs: int = 2
    """Models that train at the same time, each in a process, or in as many as ``processes_per_job`` says."""
    threads_per_job: int = 1
    """Threads of each process. Another number changes the order of sums and so the last bits of the weights."""
    processes_per_job: int = 1
    """Processes that train one model together under torchrun, each with a GPU; they divide its batches."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 <= self.out_of_cluster_fraction <= 1:
            raise ModeclipError(
                f"experts.out_of_cluster_fraction must lie in [0, 1], got {self.out_of_cluster_fraction}"
            )
        check_least("experts", self, jobs=1, threads_per_job=1, processes_per_job=1)


@dataclass(frozen=True, kw_only=True)
class Parting:
    """The end of the seed model, where the experts and the dense control part."""

    seed: TrainJob | None
    """The job that trains the seed; None where the seed is given."""
    rest: TrainJob
    """The job that goes on from there to the end of the schedule on all data; every branch is a variation of it."""

    def branch(
        self, role: Role, index: int | None = None, *, name: str | None = None, steps: int | None = None
    ) -> TrainJob:
        """Return a job that starts where the seed ends, in a folder beside the seed's.

        Args:
            role: What the model is for.
            index: Number of the expert, or of the control's member.
            name: Name of the model and of its folder; by default that of its role and index.
            steps: Number of steps to the end of the schedule; by default those of the dense control.
        """
        last_step = self.rest.last_step if steps is None else self.rest.first_step + steps
        name = name or job_name(role, index)
        folder = str(Path(self.rest.folder).with_name(name))
        return replace(self.rest, name=name, role=role, index=index, folder=folder, last_step=last_step)

    @property
    def num_steps(self) -> int:
        """Steps from the end of the seed to the end of the schedule."""
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
        folder: Folder of the models; each gets a folder in it.
        num_experts: Number of experts.
        train: Settings that all models share.
        experts: Budget, start and controls.
        ranges: Range of each expert (MoDE Sec. 5.5). None: the experts are numbered by decreasing range already.

    Raises:
        ModeclipError: A number in ``experts.only`` is not that of an expert, or the experts cannot start from
            ``experts.start``.
    """
    if wrong := [k for k in experts.only if not 0 <= k < num_experts]:
        raise ModeclipError(
            f"experts.only: there is no expert {wrong[0]}; expected numbers from 0 to {num_experts - 1}"
        )
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
    """Return where the experts part from the seed, which is trained here or given; arguments as for `plan_jobs`."""
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
    """Return the rest of the schedule after a seed that is given."""
    start, num_steps = str(experts.start), rest.last_step - rest.first_step
    path = Path(start)
    if path.suffix == ".pt":
        if not path.is_file():
            raise ModeclipError(f"experts.start: {path}: no such file; expected a checkpoint of open_clip_train")
        return replace(rest, start_from=str(path.resolve()), start_digest=hash_file(path))
    if not (path / JOB_FILE).is_file():
        check_model(start, random_weights=False)
        fresh = replace(rest, config=replace(rest.config, model=start), start_from=None, start_digest="")
        return replace(fresh, first_step=0, last_step=num_steps, first_share=0.0)
    seed = TrainJob.load(path / JOB_FILE)
    if TrainResult.read(seed) is None:
        raise ModeclipError(
            f"experts.start: the job in {path} is not finished; train it first: modeclip train {path / JOB_FILE}"
        )
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
        first_share=seed.last_share if seed.last_share < 1 else 0.0,  # after a whole schedule a new one begins
    )


def seed_model(folder: Path, train: TrainConfig, experts: ExpertsConfig) -> Path:
    """Return the model folder of the seed, which stands in for missing experts.

    A seed that is given as a checkpoint or a specification is exported to the folder first.

    Args:
        folder: Folder of the models.
        train: Names the model.
        experts: Says whether the seed is given.
    """
    own, start = folder / job_name("seed"), experts.start
    if start is None or (Path(start) / JOB_FILE).is_file():
        return own if start is None else Path(start)
    if not own.is_dir():
        spec = f"{train.model.partition('@')[0]}@{start}" if start.endswith(".pt") else start
        save_clip(load_clip(spec), own)
    return own


def fingerprint_of(catalog: Catalog, clustering: Clustering | None, model: str) -> str:
    """Return a hash of the training data and, where the start model is a folder, of its weights.

    Args:
        catalog: Catalog of the pairs.
        clustering: Clustering that gives pairs to experts; None where no expert is trained.
        model: Model specification.
    """
    start = Path(model.removeprefix("local-dir:"))
    weights = [hash_file(file) for file in sorted(start.glob("open_clip*")) if file.is_file()]
    parts = [catalog.fingerprint, *([] if clustering is None else [clustering.digest]), *weights]
    return sha256("-".join(parts).encode()).hexdigest()[:16]


def _order(
    catalog: Path, num_experts: int, order: str, ranges: Sequence[float] | Float[np.ndarray, " K"] | None
) -> list[int]:
    """Return the experts in the order in which they start; among equals the lower number comes first."""
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
    """Return the dense models that the mixture is compared with, the longer one first."""
    jobs = []
    same = parting.seed is not None and experts.dense and mixture_steps == parting.num_steps
    if experts.dense_total and not same:
        whole = parting.branch("dense-total", steps=mixture_steps)
        if parting.seed is not None:  # its schedule has that length from its start
            begun = replace(whole, first_step=0, first_share=0.0)
            whole = replace(begun, start_from=None, start_digest="")
        jobs.append(whole)
    return [*jobs, parting.branch("dense")] if experts.dense else jobs


def _member(parting: Parting, role: Role, k: int, steps: int, experts: ExpertsConfig) -> TrainJob:
    """Return the job of an expert, or of a member of a control mixture."""
    job = parting.branch(role, k, steps=steps)
    if role == "full":
        return replace(job, config=replace(job.config, seed=job.config.seed + 1 + k))
    where = {CONTROL_COLUMNS.get(role, "expert"): k}
    return replace(job, where=where, out_of_cluster_fraction=experts.out_of_cluster_fraction)
