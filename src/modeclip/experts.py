"""A clustered catalog and a budget -> the jobs of the whole method, and their processes.

The jobs are: the seed model on all data; the dense control that simply goes on with all data; one data expert per
cluster, each continuing from the seed; and a second dense control, trained from the start on a schedule as long as the
whole mixture's cost, the row that says what the same compute buys without experts. Jobs never talk to each other:
each is a process with its own folder, started when the job that it continues from is done.

Budgets (METHOD: "one epoch" is a number of samples, not a pass over the data):
    paper     every expert sees as many samples as the dense control does after the seed: n experts cost n times that.
    matched   the experts together see what the dense control sees.

Source: MoDE Sec. 3.3, 4.2 and 5.5 (largest range first), and the released default of 2 % of out-of-cluster samples,
which is an option here and 0 as in the paper.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from modeclip.errors import ModeclipError
from modeclip.jobs import TrainConfig, TrainJob, TrainResult
from modeclip.progress import log, make_progress
from modeclip.training import PARENT_VARIABLE

POLL_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """How the experts and their controls are trained."""

    budget: Literal["paper", "matched"] = "paper"
    """Samples of an expert: ``paper`` as many as the dense control's rest, ``matched`` that divided by the experts."""
    out_of_cluster_fraction: float = 0.0
    """Share of the pairs of other clusters that every expert sees too, in [0, 1] (released code: 0.02; paper: 0)."""
    dense_total: bool = True
    """Also train a dense model at the mixture's total cost, on a schedule of its own: the fair comparison."""
    jobs: int = 2
    """Processes that train at the same time."""
    threads_per_job: int = 1
    """Threads of each process; another number changes the order of sums and so the last bits of the weights."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 <= self.out_of_cluster_fraction <= 1:
            raise ModeclipError(
                f"experts.out_of_cluster_fraction must lie in [0, 1], got {self.out_of_cluster_fraction}"
            )
        for name in ("jobs", "threads_per_job"):
            if getattr(self, name) < 1:
                raise ModeclipError(f"experts.{name} must be at least 1, got {getattr(self, name)}")


def plan_jobs(
    catalog: Path, fingerprint: str, folder: Path, num_experts: int, train: TrainConfig, experts: ExpertsConfig
) -> list[TrainJob]:
    """Return the jobs of the method in the order in which they should start.

    Args:
        catalog: Path of the clustered catalog.
        fingerprint: Hash of the catalog's pairs and of their clustering.
        folder: Where the models go, a folder each.
        num_experts: Experts, numbered by decreasing range (the training priority of MoDE Sec. 5.5).
        train: Settings shared by all models.
        experts: Budget and controls.
    """
    part = train.steps_per_part
    seed_steps, dense_steps = train.seed_parts * part, train.total_parts * part
    seed_share = train.seed_parts / train.total_parts
    expert_steps = dense_steps - seed_steps
    if experts.budget == "matched":
        expert_steps = max(1, expert_steps // num_experts)
    total_steps = seed_steps + num_experts * expert_steps
    seed = TrainJob(
        name="seed",
        folder=str(folder / "seed"),
        catalog=str(catalog),
        catalog_fingerprint=fingerprint,
        config=train,
        first_step=0,
        last_step=seed_steps,
        first_share=0.0,
        last_share=seed_share,
        threads=experts.threads_per_job,
    )

    def control(name: str, last_step: int) -> TrainJob:
        return replace(seed, name=name, folder=str(folder / name), last_step=last_step, last_share=1.0)

    def continued(job: TrainJob) -> TrainJob:
        return replace(
            job, start_from=seed.folder, start_digest=seed.digest, first_step=seed_steps, first_share=seed_share
        )

    dense = continued(control("dense", dense_steps))
    totals = [control("dense-total", total_steps)] if experts.dense_total else []
    return [seed, *totals, dense] + [
        replace(
            continued(control(f"expert-{k}", seed_steps + expert_steps)),
            where={"expert": k},
            out_of_cluster_fraction=experts.out_of_cluster_fraction,
        )
        for k in range(num_experts)
    ]


def run_jobs(jobs: Sequence[TrainJob], workers: int) -> dict[str, TrainResult]:
    """Train all jobs that are not done yet, each in a process of its own, with one live board for all of them.

    Args:
        jobs: The jobs; one that continues from another must come after it.
        workers: Processes at the same time.

    Returns:
        The result of each job, by name.

    Raises:
        ModeclipError: A job failed; the others were stopped, each with a checkpoint to continue from.
    """
    results = {job.name: result for job in jobs if (result := TrainResult.read(job)) is not None}
    waiting = [job for job in jobs if job.name not in results]
    running: dict[str, tuple[TrainJob, subprocess.Popen[str]]] = {}
    with make_progress() as bars:
        tasks = {
            job.name: bars.add_task(
                f"train {job.name}", total=_samples(job), completed=_samples_done(job), unit="samples", start=False
            )
            for job in waiting
        }
        try:
            while waiting or running:
                for job in [job for job in waiting if _ready(job, results, jobs)][: workers - len(running)]:
                    waiting.remove(job)
                    running[job.name] = (job, _start(job))
                    bars.start_task(tasks[job.name])
                time.sleep(POLL_SECONDS)
                for name, (job, process) in list(running.items()):
                    bars.update(tasks[name], completed=_samples_done(job))
                    if process.poll() is not None:
                        del running[name]
                        results[name] = _finish(job, process)
                        bars.update(tasks[name], completed=_samples(job))
                        if bars.disable:
                            log(f"train {name}: {results[name].samples:,} samples in {results[name].seconds:.0f} s")
        finally:
            _stop([process for _, process in running.values()])
    return results


def _ready(job: TrainJob, results: dict[str, TrainResult], jobs: Sequence[TrainJob]) -> bool:
    return all(other.name in results for other in jobs if other.folder == job.start_from)


def _start(job: TrainJob) -> subprocess.Popen[str]:
    environment = os.environ | {PARENT_VARIABLE: str(os.getpid())}
    environment["OMP_NUM_THREADS"] = str(job.threads)
    command = [sys.executable, "-m", "modeclip.training", str(job.save())]
    errors = (Path(job.folder) / "errors.txt").open("w", encoding="utf-8")
    with errors:
        return subprocess.Popen(command, env=environment, stderr=errors, stdout=errors, text=True)


def _finish(job: TrainJob, process: subprocess.Popen[str]) -> TrainResult:
    result = TrainResult.read(job)
    if process.returncode == 0 and result is not None:
        return result
    path = Path(job.folder) / "errors.txt"
    lines = path.read_text(encoding="utf-8").strip().splitlines() or [f"exit code {process.returncode}"]
    if process.returncode == 2:
        raise ModeclipError(lines[-1])
    if process.returncode < 0:
        lines.append(f"killed by signal {-process.returncode}")
    raise ModeclipError(f"{job.name}: training ended early: {lines[-1]} (all of it in {path}); run again to continue")


def _stop(processes: Sequence[subprocess.Popen[str]]) -> None:
    """Ask each process to save a checkpoint and end; kill one that does not within half a minute."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _samples(job: TrainJob) -> int:
    return (job.last_step - job.first_step) * job.config.batch_size


def _samples_done(job: TrainJob) -> int:
    """Return the samples that a job's log says it has trained on."""
    try:
        with (Path(job.folder) / "log.jsonl").open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 4096))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            step = json.loads(line)["step"]
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
        return int(max(0, min(step, job.last_step) - job.first_step) * job.config.batch_size)
    return 0
