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
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from modeclip.clustering.class_selection import PREFIX, name_of
from modeclip.clustering.clusters import Clustering
from modeclip.clustering.controls import CONTROL_COLUMNS
from modeclip.clustering.fitting import count_pairs
from modeclip.data.catalog import Catalog
from modeclip.data.selection import ALL, Selection
from modeclip.errors import LIMIT, ModeclipError, check_between, check_least
from modeclip.models.blocks import freeze
from modeclip.models.checkpoints import checkpoint_files
from modeclip.models.clip import PARITY_FILE, check_model, hollow_model, load_clip, save_clip
from modeclip.system.files import hash_file, holder_of
from modeclip.training.batches import select_rows
from modeclip.training.choosing import with_model
from modeclip.training.jobs import (
    DONE_FILE,
    JOB_FILE,
    MOST_PROCESSES,
    Role,
    TrainConfig,
    TrainJob,
    TrainResult,
    job_name,
)
from modeclip.training.objectives import make_objective

ROWS_AT_ONCE = 1 << 16
"""Rows whose keys and captions are in memory while they are hashed."""


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
    for_classes: tuple[str, ...] = ()
    """Class names that are known beforehand, as files with one on each line or lists such as 'cat,dog': one expert for
    the fine clusters nearest to them, trained for as long as the dense control. `train-experts` then trains it alone; a
    recipe trains it beside all others and asks what it gains on held-out images of these names."""
    nearest: int = 1
    """Fine clusters that each of these class names takes. With more, the expert sees more pairs, each less often; with
    0 only the pairs whose caption is one of the names, in any case and with any signs."""
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
        some = (1, MOST_PROCESSES)
        check_between("experts", self, jobs=some, threads_per_job=some, processes_per_job=some)
        check_least("experts", self, nearest=0)
        if any(number < 0 for number in self.only):
            raise ModeclipError(f"experts.only: expected numbers of experts, 0 or more, got {min(self.only)}")


@dataclass(frozen=True, kw_only=True)
class Parting:
    """The end of the seed model, where the experts and the dense control part."""

    seed: TrainJob | None
    """The job that trains the seed; None where the seed is given."""
    rest: TrainJob
    """The job that goes on from there to the end of the schedule on all data; every branch is a variation of it."""
    trainable: str
    """What the branches change, those apart that are dense: they, like the seed, train whole."""
    keep_trunk: bool = False
    """Whether these branches keep what their frozen blocks give."""

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
        is_dense = role in {"dense", "dense-total"}
        config = self.rest.config
        if not is_dense:
            engine = replace(config.engine, keep_trunk=self.keep_trunk)
            config = replace(config, trainable=self.trainable, engine=engine)
        return replace(self.rest, name=name, role=role, index=index, folder=folder, config=config, last_step=last_step)

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
    selection: Selection = ALL,
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
        selection: Rows that the models may use.

    Raises:
        ModeclipError: A number in ``experts.only`` is not that of an expert, or the experts cannot start from
            ``experts.start``.
    """
    if wrong := [k for k in experts.only if not 0 <= k < num_experts]:
        raise ModeclipError(
            f"experts.only: there is no expert {wrong[0]}; expected numbers from 0 to {num_experts - 1}"
        )
    parting = part(catalog, fingerprint, folder, train, experts, selection)
    steps = max(1, parting.num_steps // num_experts) if experts.budget == "matched" else parting.num_steps
    numbers = [
        k
        for k in _order(catalog, num_experts, experts.order, ranges, selection)
        if not experts.only or k in experts.only
    ]
    jobs = [] if parting.seed is None else [parting.seed]
    if not experts.only:
        jobs += _dense_controls(parting, num_experts * steps, experts)
    if experts.for_classes:  # as long as the dense control, beside which it trains
        jobs.append(names_job(parting, name_of(experts.for_classes)))
    roles: tuple[Role, ...] = ("expert", *(() if experts.only else experts.controls))
    for role in roles:
        jobs += [_member(parting, role, k, steps, experts) for k in numbers]
    return jobs


def names_job(parting: Parting, name: str) -> TrainJob:
    """Return the job of an expert for class names, whose pairs a column of the catalog marks.

    Args:
        parting: Where it leaves the seed.
        name: Of the selection (`modeclip.clustering.class_selection`).
    """
    return replace(parting.branch("prior", name=f"expert-{name}"), mask=PREFIX + name)


def part(
    catalog: Path,
    fingerprint: str,
    folder: Path,
    train: TrainConfig,
    experts: ExpertsConfig,
    selection: Selection = ALL,
) -> Parting:
    """Return where the experts part from the seed, which is trained here or given; arguments as for `plan_jobs`.

    Raises:
        ModeclipError: The experts cannot start from ``experts.start``, or the model lacks what they are to change.
    """
    train = with_model(train, catalog, experts.start, folder / job_name("seed"))
    trainable, keep_trunk = train.trainable, train.engine.keep_trunk
    train = replace(train, trainable="all", engine=replace(train.engine, keep_trunk=False))
    seed_steps = train.seed_parts * train.steps_per_part
    seed = TrainJob(
        name=job_name("seed"),
        role="seed",
        folder=str(folder / job_name("seed")),
        catalog=str(catalog),
        catalog_fingerprint=fingerprint,
        config=train.decided(),
        first_step=0,
        last_step=seed_steps,
        first_share=0.0,
        last_share=train.seed_parts / train.total_parts,
        selection=selection.absolute(),
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
    if experts.start is not None:
        rest = _given(rest, train, experts)
    if trainable != "all":  # told before hours of a seed
        freeze(hollow_model(rest.config.model), trainable)
    seed_job = seed if experts.start is None else None
    return Parting(seed=seed_job, rest=rest, trainable=trainable, keep_trunk=keep_trunk)


def _given(rest: TrainJob, train: TrainConfig, experts: ExpertsConfig) -> TrainJob:
    """Return the rest of the schedule after a seed that is given."""
    start, num_steps = str(experts.start), rest.last_step - rest.first_step
    path = Path(start)
    if path.suffix == ".pt":
        if not path.is_file():
            raise ModeclipError(f"experts.start: {path}: no such file; expected a checkpoint of open_clip_train")
        return replace(rest, start_from=str(path.resolve()), start_digest=hash_file(path))
    if not (path / JOB_FILE).is_file():
        check_model(start, random_weights=False)
        fresh = replace(rest, config=replace(train, model=start).decided(), start_from=None, start_digest="")
        return replace(fresh, first_step=0, last_step=num_steps, first_share=0.0)
    seed = TrainJob.load(path / JOB_FILE)
    if TrainResult.read(replace(seed, folder=start)) is None:  # where it is now, copied or moved
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

    A seed that is given as a checkpoint or a specification is exported to a folder of its own there first, whose name
    has a hash of it.

    Args:
        folder: Folder of the models.
        train: Names the model.
        experts: Says whether the seed is given.
    """
    own, start = folder / job_name("seed"), experts.start
    if start is None or (Path(start) / JOB_FILE).is_file():
        return own if start is None else Path(start)
    spec = f"{train.model.partition('@')[0]}@{start}" if start.endswith(".pt") else start
    file = Path(spec.partition("@")[2])
    content = [spec, *_weights(spec), *([hash_file(file)] if file.is_file() else [])]
    given = own.with_name(f"{own.name}-{_join(content)}")
    if not (given / PARITY_FILE).is_file():  # it is written last
        save_clip(load_clip(spec), given)
    return given


def fingerprint_of(catalog: Catalog, clustering: Clustering | None, model: str) -> str:
    """Return a hash of the training data and, where the start model is a folder, of its weights.

    Args:
        catalog: Catalog of the pairs.
        clustering: Clustering that gives pairs to experts; None where no expert is trained.
        model: Model specification.
    """
    parts = [catalog.fingerprint, *([] if clustering is None else [clustering.digest]), *_weights(model)]
    return _join(parts)


def _join(parts: Sequence[str]) -> str:
    return sha256("-".join(parts).encode()).hexdigest()[:16]


def _order(
    catalog: Path,
    num_experts: int,
    order: str,
    ranges: Sequence[float] | Float[np.ndarray, " K"] | None,
    selection: Selection,
) -> list[int]:
    """Return the experts in the order in which they start; among equals the lower number comes first."""
    if order == "size":
        first: Int[np.ndarray, " K"] | Float[np.ndarray, " K"] = -count_pairs(
            Catalog.open(catalog), num_experts, selection=selection
        )
    elif order == "range" and ranges is not None:
        first = -np.asarray(ranges, np.float64)
    else:
        first = np.zeros(num_experts, np.int64)
    return [int(k) for k in np.argsort(first, kind="stable")]


def pin_jobs(jobs: Sequence[TrainJob], catalog: Catalog) -> list[TrainJob]:
    """Return planned jobs, each known by the pairs that it trains on, what else it reads of them, and its start.

    So a model stays what it is when the clusters change around its pairs, or get other numbers. A job that an earlier
    version has begun or finished keeps the digest that it had there: the fingerprint of catalog and clustering, and for
    a control a hash of how its column was made, say that nothing has changed.

    Args:
        jobs: As `plan_jobs` returns them, in any order.
        catalog: Their catalog.
    """
    pinned, digests = list(jobs), dict[str, str]()
    for place in sorted(range(len(jobs)), key=lambda place: jobs[place].start_from is not None):  # the seed first
        job = jobs[place]
        for column in sorted(job.where.keys() & set(CONTROL_COLUMNS.values())):
            made_by = sha256(json.dumps(catalog.facts(column), sort_keys=True).encode()).hexdigest()[:16]
            job = replace(job, catalog_fingerprint=f"{job.catalog_fingerprint}-{made_by}")
        job = replace(job, start_digest=digests.get(job.start_from or "", job.start_digest))
        pinned[place] = job if _is_begun(job) else replace(job, pairs=hash_pairs(job, catalog))
        digests[job.folder] = pinned[place].digest
    return pinned


def hash_pairs(job: TrainJob, catalog: Catalog) -> str:
    """Return a hash of what a job reads: its pairs in their order, columns for its objective, and start weights.

    Where the job takes all pairs, the catalog's fingerprint stands for them. Else keys, captions and the hashes of the
    images are read: about a second for a million pairs.
    """
    rows, content = select_rows(job, catalog), sha256()
    if len(rows) == len(catalog):
        content.update(catalog.fingerprint.encode())
    else:
        for column in ("key", "caption", "digest"):
            sizes = sha256()
            for start in range(0, len(rows), ROWS_AT_ONCE):
                values = catalog.read([column], rows[start : start + ROWS_AT_ONCE])[column].tolist()
                texts = [value.encode() if isinstance(value, str) else value or b"" for value in values]
                sizes.update(np.array([len(text) for text in texts], np.int64).tobytes())
                content.update(b"".join(texts))
            content.update(sizes.digest())
    for column in filter(None, (*make_objective(job.config).columns, job.config.probability)):
        content.update(column.encode() + catalog.read([column], rows)[column].tobytes())
    if job.config.captions is not None:
        content.update(f"captions {job.config.captions}".encode())
        for start in range(0, len(rows), ROWS_AT_ONCE):
            captions = catalog.captions(rows[start : start + ROWS_AT_ONCE], job.config.captions)
            content.update(json.dumps(captions).encode())
    content.update(catalog.exif.encode())
    content.update("".join(_weights(job.config.model)).encode())
    return content.hexdigest()[:16]


def _is_begun(job: TrainJob) -> bool:
    """Tell whether a job's folder holds that very job, finished or with a checkpoint."""
    folder = Path(job.folder)
    try:
        before = TrainJob.load(folder / JOB_FILE)
    except ModeclipError:  # missing or damaged
        return False
    is_used = (folder / DONE_FILE).is_file() or bool(checkpoint_files(folder))
    return is_used and before.digest == job.digest


def _weights(model: str) -> list[str]:
    """Return the hashes of a start model's files, if it is a folder."""
    start = Path(model.removeprefix("local-dir:"))
    return [hash_file(file) for file in sorted(start.glob("open_clip*")) if file.is_file()]


def reuse_models(jobs: Sequence[TrainJob]) -> list[str]:
    """Bring finished models to the folders of the jobs that they fit, where clusters have got other numbers.

    Whatever was in such a folder goes where the model came from.

    Args:
        jobs: Planned and pinned, of one folder of models.

    Returns:
        A few words about each model that was moved.
    """
    missing = {job.digest: job for job in jobs if job.pairs and TrainResult.read(job) is None}
    in_place = {Path(job.folder) for job in jobs} - {Path(job.folder) for job in missing.values()}
    found: dict[str, Path] = {}
    for place in {Path(job.folder).parent for job in missing.values()}:
        for path in sorted(place.glob(f"*/{DONE_FILE}")):
            digest = _read_digest(path)
            if digest in missing and path.parent not in in_place and holder_of(path.parent) is None:
                found.setdefault(digest, path.parent)
    targets = {digest: Path(missing[digest].folder) for digest in found}
    if any(holder_of(target) for target in targets.values()):
        return []
    aside = {digest: source.rename(source.with_name(f"reused-{digest}")) for digest, source in found.items()}
    free = [source for source in found.values() if source not in targets.values()]
    taken = [target for target in targets.values() if target.exists()]
    for target, place in zip(taken, free, strict=False):  # as many places are free, or more
        target.rename(place)
    for digest, target in targets.items():
        aside[digest].rename(target)
        missing[digest].save()
    return [f"{targets[digest].name} was {found[digest].name}" for digest in missing if digest in found]


def why_stale(job: TrainJob, catalog: Catalog) -> str:
    """Return why a finished model no longer fits the catalog, in a few words; empty if it fits, or if nobody can tell.

    Args:
        job: As its file says.
        catalog: Present state of the catalog that it was trained on.
    """
    facts = (catalog.facts("expert") if "expert" in catalog.columns else None) or {}
    clusterings = [[], [str(facts["clustering"])]] if "clustering" in facts else [[]]
    known = [_join([catalog.fingerprint, *clustering, *_weights(job.config.model)]) for clustering in clusterings]
    made_from = job.catalog_fingerprint.partition("-")[0]
    reads_pairs_alone = job.selection.is_all and job.config.probability is None and job.config.captions is None
    if made_from in known and job.mask is None and job.where.keys() <= {"expert"} and reads_pairs_alone:
        return ""
    if not job.pairs:
        is_known = made_from in known or not re.fullmatch("[0-9a-f]{16}", made_from)  # else another stage planned it
        return "" if is_known else "the catalog or its clusters have changed"
    try:
        return "" if hash_pairs(job, catalog) == job.pairs else "its pairs have changed"
    except ModeclipError:
        return "the columns that choose its pairs are gone"


def _read_digest(path: Path) -> str:
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["digest"])
    except (OSError, ValueError, TypeError, KeyError):
        return ""


def _dense_controls(parting: Parting, mixture_steps: int, experts: ExpertsConfig) -> list[TrainJob]:
    """Return the dense models that the mixture is compared with, the longer one first.

    With the budget ``matched`` the dense control has the mixture's cost, or what its division left over more. A second
    model for that cost stays where an earlier version has trained one.
    """
    jobs = []
    if experts.dense_total:
        whole = parting.branch("dense-total", steps=mixture_steps)
        if parting.seed is not None:  # its schedule has that length from its start
            begun = replace(whole, first_step=0, first_share=0.0)
            whole = replace(begun, start_from=None, start_digest="")
        if not experts.dense or mixture_steps > parting.num_steps or _is_trained(whole):
            jobs.append(whole)
    return [*jobs, parting.branch("dense")] if experts.dense else jobs


def _is_trained(job: TrainJob) -> bool:
    """Tell whether the folder of a job that is not pinned yet holds its model."""
    folder = Path(job.folder)
    try:
        before = TrainJob.load(folder / JOB_FILE)
    except ModeclipError:  # missing or damaged
        return False
    return (folder / DONE_FILE).is_file() and replace(before, pairs="").digest == replace(job, pairs="").digest


def _member(parting: Parting, role: Role, k: int, steps: int, experts: ExpertsConfig) -> TrainJob:
    """Return the job of an expert, or of a member of a control mixture."""
    job = parting.branch(role, k, steps=steps)
    if role == "full":
        return replace(job, config=replace(job.config, seed=(job.config.seed + 1 + k) % LIMIT))
    where = {CONTROL_COLUMNS.get(role, "expert"): k}
    return replace(job, where=where, out_of_cluster_fraction=experts.out_of_cluster_fraction)
