"""Say what jobs will cost in samples, time, memory and disk before any of it is spent.

Time, memory and file sizes are measured. Each kind of job is trained for a few steps in a folder that is thrown away,
once for each model, batch and number of threads; its time is the median of the steps after the warm-up. It runs alone,
so jobs that share a machine's memory bandwidth will take longer.

Price: some seconds for each distinct model (importing torch, ``MEASURED_STEPS`` steps, a checkpoint).
"""

from __future__ import annotations

import heapq
import json
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from modeclip.data.catalog import Catalog
from modeclip.errors import ModeclipError
from modeclip.models.clip import load_clip
from modeclip.models.deltas import WEIGHTS_FILE
from modeclip.models.flops import Flops, count_flops
from modeclip.system.console import busy
from modeclip.training.batches import job_rows
from modeclip.training.jobs import LOG_FILE, TrainJob
from modeclip.training.launching import start_job
from modeclip.training.status import in_words, job_status
from modeclip.training.trunk_outputs import measure_outputs

MEASURED_STEPS = 10
WARM_UP_STEPS = 3
"""First measured steps that do not count, since kernels, caches and memory are used for the first time."""
CAPTIONS_COUNTED = 256
"""Captions of which the longest says how many tokens the text tower sees; a batch has no more where it is smaller."""
COLUMNS = (
    "model",
    "rows",
    "steps",
    "samples",
    "passes",
    "MFLOPs/sample",
    "s/step",
    "time",
    "memory GB",
    "disk GB",
    "done",
)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What a few real steps of a job have taken."""

    seconds_per_step: float
    """Median wall time of a step, alone on the machine."""
    memory_gb: float
    """Highest memory of a process in 10^9 bytes: of its GPU where there is one, else resident memory."""
    checkpoint_bytes: int
    """Size of a checkpoint."""
    model_bytes: int
    """Size of the exported model."""


@dataclass(frozen=True, kw_only=True)
class JobPlan:
    """What one job will cost."""

    name: str
    """Name of the model."""
    rows: int
    """Pairs of the catalog that it trains on."""
    steps: int
    """Steps that it takes in all."""
    samples: int
    """Samples that it trains on in all."""
    share_done: float
    """Share of them that is done, in [0, 1]."""
    flops_per_sample: int | None
    """Floating-point operations of a training sample, forward and backward (`modeclip.models.flops`), as the mean over
    the job: where the trunk's outputs are kept, the trunk counts once for each pair. None where nothing is left."""
    seconds_per_step: float | None
    """Measured time of a step; None where nothing is left to do."""
    seconds: float
    """Time that is left. Where the trunk's outputs are kept, measured steps have run it; later ones are taken to be
    faster as their operations are fewer."""
    memory_gb: float | None
    """Highest memory of one process in 10^9 bytes; None where nothing is left to do."""
    disk_bytes: int
    """Most disk space that it takes from now on: its checkpoints, another one while it is written, and the model."""

    @property
    def passes(self) -> float:
        """Mean number of times that it sees each of its pairs."""
        return self.samples / self.rows


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What all jobs will cost."""

    jobs: tuple[JobPlan, ...]
    """Plan of each job, in the order of the jobs."""
    seconds: float
    """Wall time that is left if the jobs that run at the same time do not slow each other down."""
    disk_bytes: int
    """Disk space that all of them take from now on."""
    free_bytes: int
    """Free disk space in their folder."""
    folder: str
    """Folder of the models."""

    @property
    def problem(self) -> str | None:
        """Why the jobs cannot work, in one line; None if they can."""
        if self.disk_bytes <= self.free_bytes:
            return None
        return (
            f"{self.folder}: models and checkpoints need {_gb(self.disk_bytes)} GB, {_gb(self.free_bytes)} are free; "
            "free some space, choose another folder, or lower --keep-checkpoints"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON holds it."""
        return asdict(self) | {"problem": self.problem}

    def rows(self) -> list[tuple[str, ...]]:
        """Return the rows of a table with `COLUMNS`."""
        rows = [
            (
                job.name,
                f"{job.rows:,}",
                f"{job.steps:,}",
                f"{job.samples:,}",
                f"{job.passes:.2f}",
                "" if job.flops_per_sample is None else f"{job.flops_per_sample / 1e6:,.1f}",
                "" if job.seconds_per_step is None else f"{job.seconds_per_step:.3f}",
                in_words(job.seconds) if job.seconds else "",
                "" if job.memory_gb is None else f"{job.memory_gb:.2f}",
                _gb(job.disk_bytes) if job.disk_bytes else "",
                f"{100 * job.share_done:.0f} %" if job.share_done else "",
            )
            for job in self.jobs
        ]
        total = sum(job.samples for job in self.jobs)
        return [*rows, ("all", "", "", f"{total:,}", "", "", "", in_words(self.seconds), "", _gb(self.disk_bytes), "")]


def plan(jobs: Sequence[TrainJob], catalog: Catalog, *, workers: int = 1, processes: int = 1) -> Plan:
    """Return what jobs will cost, after training a few steps of each kind of job.

    Args:
        jobs: The jobs, none of them running.
        catalog: Their catalog.
        workers: Number of jobs at the same time.
        processes: Number of processes that train one job together.

    Raises:
        ModeclipError: A job cannot work: too few pairs, an unknown model, a precision that the device lacks.
    """
    measured: dict[str, Measurement] = {}
    operations: dict[str, Flops] = {}
    plans = []
    for job in jobs:
        rows, status = job_rows(job, catalog), job_status(job)
        left = job.last_step - status.step
        known: Measurement | None = None
        if left:
            kind = _kind(job)
            if kind not in measured:
                with busy(f"measuring a few steps of {job.name}"):
                    measured[kind] = measure(job, processes)
                    operations[kind] = _flops_per_sample(job, catalog, rows)
            known = measured[kind]
        kept = job.config.engine.keep_checkpoints + 1
        steps = job.last_step - job.first_step
        every = operations[_kind(job)] if known else None  # of a sample whose trunk runs
        mean = every.training if every else None
        if every and job.config.engine.keep_trunk:
            mean = every.training - round(every.trunk * (1 - min(1.0, len(rows) / (steps * job.config.batch_size))))
        plans.append(
            JobPlan(
                name=job.name,
                rows=len(rows),
                steps=steps,
                samples=steps * job.config.batch_size,
                share_done=status.share,
                flops_per_sample=mean,
                seconds_per_step=known.seconds_per_step if known else None,
                seconds=left * known.seconds_per_step * mean / every.training if known and every and mean else 0.0,
                memory_gb=known.memory_gb if known else None,
                disk_bytes=kept * known.checkpoint_bytes + known.model_bytes + _trunk_bytes(job, catalog, rows)
                if known
                else 0,
            )
        )
    folder = Path(jobs[0].folder).parent
    return Plan(
        jobs=tuple(plans),
        seconds=wall_time(jobs, [entry.seconds for entry in plans], workers),
        disk_bytes=sum(entry.disk_bytes for entry in plans),
        free_bytes=free_bytes(folder),
        folder=str(folder),
    )


def measure(job: TrainJob, processes: int = 1) -> Measurement:
    """Train a few steps of a job in a process of its own and a folder that is thrown away.

    Raises:
        ModeclipError: The job cannot work.
    """
    with tempfile.TemporaryDirectory(prefix="modeclip-plan-") as temporary:
        folder = Path(temporary) / job.name
        engine = replace(
            job.config.engine, log_every=1, save_every="24h", keep_checkpoints=1, report_to=(), keep_trunk=False
        )
        probe = replace(
            job,
            folder=str(folder),
            config=replace(job.config, engine=engine),
            first_step=0,
            last_step=MEASURED_STEPS,
            first_share=0.0,
            last_share=1.0,
            start_from=None,
            start_digest="",
        )
        _train(probe, processes)
        lines = [json.loads(line) for line in (folder / LOG_FILE).read_text(encoding="utf-8").splitlines()]
        counted = [line for line in lines if line["step"] > WARM_UP_STEPS]
        checkpoints = [file.stat().st_size for file in folder.rglob("*.safetensors") if file.name != WEIGHTS_FILE]
        return Measurement(
            seconds_per_step=statistics.median(job.config.batch_size / line["samples_per_second"] for line in counted),
            memory_gb=max(line["memory_gb"] for line in lines),
            checkpoint_bytes=max(checkpoints),
            model_bytes=(folder / WEIGHTS_FILE).stat().st_size,
        )


def _trunk_bytes(job: TrainJob, catalog: Catalog, rows: Int[np.ndarray, " N"]) -> int:
    """Return what the trunk's outputs will take on disk; 0 where they are not kept."""
    depth = job.config.depth
    if depth is None:
        return 0
    from modeclip.training.gradients import Towers

    clip = load_clip(_untrained(job), seed=0)
    return measure_outputs(job, catalog, rows, clip, Towers(clip, depth=depth).run_trunks)[1]


def _untrained(job: TrainJob) -> str:
    """Return the model of a job without its weights, unless it is a folder."""
    model = job.config.model
    return model if Path(model).exists() else model.partition("@")[0]


def _flops_per_sample(job: TrainJob, catalog: Catalog, rows: Int[np.ndarray, " N"]) -> Flops:
    """Return the operations of a sample in a batch of the job's captions."""
    first = rows[: min(job.config.batch_size, CAPTIONS_COUNTED)]
    captions = catalog.read(["caption"], first)["caption"].tolist()
    tokens = load_clip(_untrained(job), seed=0).tokens(captions)
    length = int((tokens != 0).any(0).nonzero().max()) + 1  # as `modeclip.models.trunk` cuts the padding
    return count_flops(job.config.model, length, trainable=job.config.trainable)


def wall_time(jobs: Sequence[TrainJob], seconds: Sequence[float], workers: int) -> float:
    """Return the time until the last job ends if each free worker takes the next job that can start.

    Args:
        jobs: The jobs, in the order in which they should start.
        seconds: Time of each job.
        workers: Number of jobs at the same time.
    """
    left, clock = dict(zip([job.folder for job in jobs], seconds, strict=True)), 0.0
    waiting, running, done = list(jobs), list[tuple[float, str]](), set[str]()
    while waiting or running:
        ready = [job for job in waiting if job.start_from not in left or job.start_from in done]
        for job in ready[: workers - len(running)]:
            waiting.remove(job)
            heapq.heappush(running, (clock + left[job.folder], job.folder))
        clock, folder = heapq.heappop(running)
        done.add(folder)
    return clock


def free_bytes(folder: Path) -> int:
    """Return the free space of the file system of a folder, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _kind(job: TrainJob) -> str:
    """Return the settings that time and memory of a step depend on."""
    config = replace(job.config, seed=0, samples=2 * job.config.batch_size, total_parts=2, seed_parts=1)
    return json.dumps([asdict(config), job.threads])


def _train(job: TrainJob, processes: int) -> None:
    """Train a job in a process of its own and wait for it."""
    started = start_job(job, processes)
    try:
        trouble = started.end()
    except BaseException:
        started.process.terminate()
        started.process.wait()
        raise
    if trouble:
        raise ModeclipError(trouble)


def _gb(count: int) -> str:
    return f"{count / 1e9:,.2f}"
