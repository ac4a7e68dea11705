"""Run training jobs: in processes of this machine, under torchrun, on Ray, or by commands for other machines.

Each job is a process of its own with its own folder, or a group of processes under torchrun. It starts when the job
that it continues from is done. When a job fails, only the jobs that need it fail too.

No process outlives the one that started it. A caller that is asked to end (Ctrl-C, SIGTERM, a closed terminal) has its
jobs save a checkpoint first. When it is killed, so are they (`modeclip.system.processes`), those under torchrun too;
then the same call goes on from their last checkpoints. A job that another process trains, on this machine or on another
one, is waited for until it is done or that process is gone.

Jobs on this machine divide its GPUs: each process gets one that the fewest others use. What a launcher such as Slurm
has said of the calling process is not passed on, since a job is no part of that process's group.

Price: a process for each job, which imports torch anew (two seconds), and a look at the jobs' files five times a
second.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

from modeclip.errors import ModeclipError
from modeclip.system.console import console, log, make_progress
from modeclip.system.devices import visible_gpus
from modeclip.system.files import Holder, holder_of, write_atomically
from modeclip.system.processes import PARENT_VARIABLE, start_tied, tied
from modeclip.training.jobs import ERRORS_FILE, JOB_FILE, TrainJob, TrainResult, remove_damage
from modeclip.training.status import in_words, job_status

POLL_SECONDS = 0.2
PATIENCE_SECONDS = 60.0
"""Time that a process has to save a checkpoint when it is asked to end."""
REPORT_SECONDS = 60.0
"""Time between two lines about a job that is waited for because another process trains it."""
MAX_RETRIES = 3
"""How often Ray repeats a job whose worker died, so that a job which kills its workers is given up."""
TRAINER = "modeclip.training.trainer"
"""Module that trains the job of a file when it is run as a program."""
STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGHUP)
"""Exit codes of a job that was asked to end and has saved a checkpoint; it ignores Ctrl-C."""
OF_LAUNCHERS = ("SLURM_", "TORCHELASTIC_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
"""What variables begin with that say which of several processes one is."""


@runtime_checkable
class Runner(Protocol):
    """Where jobs run."""

    def is_free(self) -> bool:
        """Return whether another job may start now."""
        ...

    def start(self, job: TrainJob) -> None:
        """Start a job."""
        ...

    def ended(self) -> dict[str, str]:
        """Return the trouble of each job that has ended since the last call, by name; empty if it went well."""
        ...

    def stop(self) -> None:
        """End all jobs that run, each with a checkpoint."""
        ...


def run_jobs(
    jobs: Sequence[TrainJob],
    workers: int,
    *,
    processes: int = 1,
    ray: bool = False,
    stop_on_failure: bool = False,
    on_done: Callable[[TrainJob], object] | None = None,
) -> dict[str, TrainResult]:
    """Train all jobs that are not done yet, and show how far they are.

    Args:
        jobs: The jobs, in any order.
        workers: Number of jobs at the same time on this machine. Ray takes as many as it has processors for.
        processes: Number of processes that train one job together under torchrun.
        ray: Run on the Ray cluster of ``RAY_ADDRESS``, on one that runs on this machine, or on a new one. All its
            machines must see the jobs' folders and the catalog.
        stop_on_failure: When one job fails, stop the others, each with a checkpoint.
        on_done: Called with each job when it is done, but not with jobs that were done before.

    Returns:
        The result of each job, by name.

    Raises:
        ModeclipError: Some jobs failed. The others are done, unless they had to stop or need one that failed.
    """
    results = {job.name: result for job in jobs if (result := TrainResult.read(job)) is not None}
    waiting = [job for job in jobs if job.name not in results]
    if not waiting:
        return results
    for job in waiting:
        remove_damage(job)
        if not (Path(job.folder) / JOB_FILE).is_file():
            job.save()  # so that modeclip status shows what waits
    runner: Runner = _OnRay(processes) if ray else _Here(workers, processes)
    failures = _Schedule(jobs, results, runner, stop_on_failure, on_done).run(waiting)
    if failures:
        raise ModeclipError(_summary(failures, len(jobs)))
    return results


class _Schedule:
    """Starts each job when it can start, and keeps what became of it."""

    def __init__(
        self,
        jobs: Sequence[TrainJob],
        results: dict[str, TrainResult],
        runner: Runner,
        stop_on_failure: bool,
        on_done: Callable[[TrainJob], object] | None,
    ) -> None:
        self.jobs, self.results, self.runner = {job.name: job for job in jobs}, results, runner
        self.stop_on_failure, self.on_done = stop_on_failure, on_done
        self.failures: dict[str, str] = {}
        self.running: dict[str, TrainJob] = {}
        self.elsewhere: dict[str, tuple[Holder, float]] = {}

    def run(self, waiting: list[TrainJob]) -> dict[str, str]:
        """Run jobs to their end and return a line about each that failed or could not start."""
        with make_progress() as bars:
            tasks = {
                job.name: bars.add_task(f"train {job.name}", total=_samples(job), unit="samples", start=False)
                for job in waiting
            }
            with _ending_in_order(self.runner.stop):
                while not (self.failures and self.stop_on_failure):
                    ready = [job for job in waiting if self._is_ready(job)]
                    if not (self.running or ready):
                        break  # all are done, or what waits needs what has failed
                    for job in ready:
                        if self._begin(job):
                            waiting.remove(job)
                            bars.start_task(tasks[job.name])
                    time.sleep(POLL_SECONDS)
                    for job in [*self.running.values(), *(job for job in waiting if job.name in self.elsewhere)]:
                        bars.update(tasks[job.name], completed=round(job_status(job).share * _samples(job)))
                    for name, trouble in self.runner.ended().items():
                        self._end(self.running.pop(name), trouble)
        for job in self.running.values():
            self.failures[job.name] = f"{job.name}: stopped, since another failed; run again to continue"
        for job in waiting:
            needed = self._needed(job)
            reason = f"it needs {needed}" if needed in self.failures else "another failed"
            self.failures[job.name] = f"{job.name}: not started, since {reason}"
        return self.failures

    def _begin(self, job: TrainJob) -> bool:
        """Start a job if there is room for it and no other process trains it; return whether it no longer waits."""
        if (holder := holder_of(Path(job.folder))) is not None:
            self._tell_of(job, holder)
        elif TrainResult.read(job) is not None:  # the other process has done it
            self._end(job, "")
            return True
        elif self.runner.is_free():
            self.running[job.name] = job
            self.runner.start(job)
            return True
        return False

    def _tell_of(self, job: TrainJob, holder: Holder) -> None:
        """Say which process trains a job that is waited for, and how far it is, now and then."""
        known, told_at = self.elsewhere.get(job.name, (None, 0.0))
        if known != holder or time.monotonic() - told_at > REPORT_SECONDS:
            self.elsewhere[job.name] = holder, time.monotonic()
            found = job_status(job)
            left = "" if found.seconds_left is None else f", {in_words(found.seconds_left)} left"
            log(
                f"{job.name}: {holder} is training it, at step {found.step:,} of {found.last_step:,} "
                f"({100 * found.share:.1f} %{left}); waiting until it is done or that process ends"
            )

    def _needed(self, job: TrainJob) -> str | None:
        """Return the name of the job that this one continues, if it is one of those that are trained here."""
        return next((other.name for other in self.jobs.values() if other.folder == job.start_from), None)

    def _is_ready(self, job: TrainJob) -> bool:
        needed = self._needed(job)
        return needed is None or needed in self.results

    def _end(self, job: TrainJob, trouble: str) -> None:
        result = TrainResult.read(job)
        if result is None or trouble:
            self.failures[job.name] = trouble or f"{job.name}: training ended without a result; run again to continue"
            log(self.failures[job.name])
            return
        self.results[job.name] = result
        (Path(job.folder) / ERRORS_FILE).unlink(missing_ok=True)
        if not console.is_terminal:
            log(f"train {job.name}: {result.samples:,} samples in {result.seconds:.0f} s")
        if self.on_done is not None:
            self.on_done(job)


@contextmanager
def _ending_in_order(stop: Callable[[], object]) -> Iterator[None]:
    """Call ``stop`` at the end, also where this process is asked to end by a signal that would end it at once."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    numbers = [] if threading.current_thread() is not threading.main_thread() else [signal.SIGTERM, signal.SIGHUP]
    changed = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    for number in changed:
        signal.signal(number, leave)
    try:
        try:
            yield
        finally:
            stop()
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)


class _Here:
    """Processes of this machine."""

    def __init__(self, workers: int, processes: int) -> None:
        self.gpus, self.processes = visible_gpus(), processes
        groups = len(self.gpus) // processes if processes > 1 and self.gpus else workers
        self.workers = max(1, min(workers, groups))  # processes that train one model together share no GPU
        self.running: dict[str, JobProcess] = {}

    def is_free(self) -> bool:
        return len(self.running) < self.workers

    def start(self, job: TrainJob) -> None:
        used = Counter(gpu for started in self.running.values() for gpu in started.gpus)
        chosen = sorted(self.gpus, key=lambda gpu: used[gpu])[: self.processes]
        self.running[job.name] = start_job(job, self.processes, chosen)

    def ended(self) -> dict[str, str]:
        over = [name for name, started in self.running.items() if started.process.poll() is not None]
        return {name: self.running.pop(name).end() for name in over}

    def stop(self) -> None:
        for started in self.running.values():
            started.process.terminate()
        for started in self.running.values():
            try:
                started.process.wait(timeout=PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                started.process.kill()
            started.end()


class _OnRay:
    """Tasks of a Ray cluster, each of which starts the job's processes where it runs."""

    def __init__(self, processes: int) -> None:
        try:
            import ray
        except ImportError:
            raise ModeclipError('--ray needs the package ray: pip install "modeclip[ray]"') from None
        if not ray.is_initialized():
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
        self.ray, self.processes = ray, processes
        self.total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        self.running: dict[Any, TrainJob] = {}
        log(f"on Ray with {self.total.get('CPU', 0):g} processors and {self.total.get('GPU', 0):g} GPUs")

    def is_free(self) -> bool:
        return True  # Ray itself holds a task back until there is room for it

    def start(self, job: TrainJob) -> None:
        needs = {"CPU": job.threads * self.processes, "GPU": self.processes if self.total.get("GPU") else 0}
        for name, count in needs.items():
            if count > self.total.get(name, 0):
                raise ModeclipError(
                    f"{job.name} needs {count} {name}, the Ray cluster has {self.total.get(name, 0):g} in all; lower "
                    "experts.threads_per_job or experts.processes_per_job, or add machines to the cluster"
                )
        job = _placed(job)
        task = self.ray.remote(
            num_cpus=needs["CPU"], num_gpus=needs["GPU"], max_retries=MAX_RETRIES, retry_exceptions=True
        )(_train_on_ray)
        self.running[task.remote(job, self.processes)] = job

    def ended(self) -> dict[str, str]:
        if not self.running:
            return {}
        over, _ = self.ray.wait(list(self.running), num_returns=len(self.running), timeout=0)
        return {self.running.pop(reference).name: self._trouble(reference) for reference in over}

    def _trouble(self, reference: Any) -> str:
        try:
            return str(self.ray.get(reference))
        except self.ray.exceptions.RayTaskError as error:
            return str(error.cause)
        except self.ray.exceptions.RayError as error:
            return f"Ray gave up on a job: {str(error).splitlines()[0]}; give the command again"

    def stop(self) -> None:
        for reference in self.running:
            self.ray.cancel(reference)  # raises KeyboardInterrupt in the task, which stops its processes
        if self.running:
            self.ray.wait(list(self.running), num_returns=len(self.running), timeout=PATIENCE_SECONDS)


def _train_on_ray(job: TrainJob, processes: int) -> str:
    """Train a job in a Ray task; return what went wrong, or raise where another attempt may succeed."""
    started = start_job(job, processes)
    try:
        code = started.process.wait()
    except BaseException:
        started.process.terminate()
        started.process.wait(PATIENCE_SECONDS)
        raise
    trouble = started.end()
    if code < 0 or code in STOPPED:
        raise ChildProcessError(trouble or f"{job.name}: training was stopped; run again to continue")
    return trouble


def commands_for(jobs: Sequence[TrainJob], processes: int = 1) -> list[str]:
    """Write the job files and return a shell command for each job, in an order that works.

    The commands run on any machine that sees the folders and the catalog. A comment says which job must be finished
    before. Running the command of a job that is done does nothing.

    Args:
        jobs: The jobs.
        processes: Number of processes that train one job together.
    """
    names = {job.folder: job.name for job in jobs}
    lines = []
    for job in sorted(jobs, key=lambda job: job.start_from in names):
        words = ["python", *(["-m", "torch.distributed.run", *_torchrun(processes)] if processes > 1 else [])]
        words += ["-m", TRAINER, str(_placed(job).save())]
        needed = names.get(job.start_from or "")
        lines.append(shlex.join(words) + (f"  # after {needed}" if needed else ""))
    return lines


def _summary(failures: dict[str, str], count: int) -> str:
    """Return one line about all jobs that failed; each has been logged with a line of its own."""
    if len(failures) == 1:
        return next(iter(failures.values()))
    first = next(iter(failures.values()))
    return f"{len(failures)} of {count} models are missing ({', '.join(failures)}); the first: {first}"


@dataclass(frozen=True, kw_only=True)
class JobProcess:
    """The process that trains a job, or the one that has started several for it."""

    job: TrainJob
    """What it trains."""
    process: subprocess.Popen[bytes]
    """The process itself."""
    output: IO[bytes]
    """What it prints, in a file without a name, so that nothing stays behind when this process is killed."""
    gpus: tuple[str, ...] = ()
    """GPUs that it was given, as ``CUDA_VISIBLE_DEVICES`` names them; none: those of this process."""

    def end(self) -> str:
        """Wait for its end and return what went wrong, or an empty line; ``errors.txt`` keeps all that it printed."""
        code, job, path = self.process.wait(), self.job, Path(self.job.folder) / ERRORS_FILE
        with self.output as output:
            output.seek(0)
            lines = output.read().decode(errors="replace").strip().splitlines()
        assert self.process.stdin is not None, "it was opened as a pipe"
        self.process.stdin.close()
        if code == 0 and TrainResult.read(job) is not None:
            return ""
        if code in (*STOPPED, -signal.SIGTERM):  # the latter if it had not begun yet
            return f"{job.name}: training was stopped; run again to continue"
        if code < 0 or not lines:
            lines.append(f"killed by signal {-code}" if code < 0 else f"exit code {code}")
        write_atomically(path, "\n".join(lines) + "\n")
        if code == 2:
            return lines[-1]
        return f"{job.name}: training ended early: {lines[-1]} (more in {path}); run again to continue"


def start_job(job: TrainJob, processes: int = 1, gpus: Sequence[str] = ()) -> JobProcess:
    """Start the process of a job; it ends when this one does.

    Args:
        job: What to train; its file is written.
        processes: Number of processes that train it together under torchrun.
        gpus: GPUs that they may use, as ``CUDA_VISIBLE_DEVICES`` names them; none: those of this process.
    """
    module, words = TRAINER, [str(job.save())]
    if processes > 1:
        module, words = __name__, [*_torchrun(processes), *tied(module, *words)]
    (Path(job.folder) / ERRORS_FILE).unlink(missing_ok=True)
    output = tempfile.TemporaryFile(dir=job.folder)  # noqa: SIM115 (it is read when the process has ended)
    environment: dict[str, str | None] = {name: None for name in os.environ if name.startswith(OF_LAUNCHERS)}
    environment |= {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
    process = start_tied(module, words, environment | {"OMP_NUM_THREADS": str(job.threads)}, output)
    return JobProcess(job=job, process=process, output=output, gpus=tuple(gpus))


def _torchrun(processes: int) -> list[str]:
    return ["--standalone", "--nproc_per_node", str(processes)]


def _samples(job: TrainJob) -> int:
    return (job.last_step - job.first_step) * job.config.batch_size


def _placed(job: TrainJob) -> TrainJob:
    """Return a job with absolute paths."""

    def absolute(path: str) -> str:
        return path if "://" in path else str(Path(path).resolve())

    start = None if job.start_from is None else absolute(job.start_from)
    return replace(job, folder=absolute(job.folder), catalog=absolute(job.catalog), start_from=start)


def main(words: Sequence[str]) -> None:
    """Run torchrun in this process, quietly, until it ends."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    os.environ[PARENT_VARIABLE] = str(os.getpid())  # its workers are tied to this process
    logging.disable(logging.CRITICAL)  # what the workers say is what counts
    try:
        torchrun(list(words))
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        raise SystemExit(2 if 2 in codes else 1) from None
    except SignalException:
        raise SystemExit(128 + signal.SIGTERM) from None


if __name__ == "__main__":
    main(sys.argv[1:])
