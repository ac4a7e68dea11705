"""Processes of jobs: failures that stay their own, kills, orphans, printed commands, torchrun and Ray."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import pytest

import support
from modeclip.errors import ModeclipError
from modeclip.system.devices import visible_gpus
from modeclip.system.files import holder_of
from modeclip.training import launching
from modeclip.training.distributed import World
from modeclip.training.jobs import EngineConfig, TrainConfig, TrainJob, TrainResult
from modeclip.training.launching import commands_for, run_jobs
from modeclip.training.status import job_status
from modeclip.training.trainer import train

CONFIG = TrainConfig(
    model="modeclip-icon-xxxs",
    samples=8 * 32,
    batch_size=8,
    engine=EngineConfig(precision="32-true", save_every="1steps", log_every=1),
)
FOREVER = 100_000


@pytest.fixture(scope="module")
def catalog(icons_catalog: Path) -> Path:
    return icons_catalog


def make_job(catalog: Path, folder: Path, last_step: int = 2, start: TrainJob | None = None) -> TrainJob:
    job = support.make_job(catalog, folder, CONFIG, last_step=last_step)
    if start is None:
        return job
    first = start.last_step
    behind = {"first_step": first, "last_step": first + last_step, "start_from": start.folder}
    return replace(job, **behind, start_digest=start.digest)


def processes_of(folder: Path) -> list[int]:
    """Processes whose command names a job of this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if any(word.startswith(str(folder).encode()) and word.endswith(b"job.json") for word in words):
                found.append(int(path.parent.name))
    return found


def wait_until_it_trains(job: TrainJob) -> None:
    deadline = time.monotonic() + 180
    while not (job_status(job).state == "running" and job_status(job).checkpoint_age_seconds is not None):
        assert time.monotonic() < deadline, job_status(job)
        time.sleep(0.05)


def wait_until_all_are_gone(folder: Path) -> None:
    deadline = time.monotonic() + 90
    while processes_of(folder):
        assert time.monotonic() < deadline, processes_of(folder)
        time.sleep(0.2)


@pytest.mark.slow
def test_a_job_that_is_killed_takes_only_those_that_need_it(catalog: Path, tmp_path: Path) -> None:
    killed = make_job(catalog, tmp_path / "killed", FOREVER)
    needs = make_job(catalog, tmp_path / "needs", 1, killed)
    other = make_job(catalog, tmp_path / "other")

    def kill() -> None:
        wait_until_it_trains(killed)
        for process in processes_of(tmp_path / "killed"):
            os.kill(process, signal.SIGKILL)

    thread, done = threading.Thread(target=kill), list[str]()
    thread.start()
    message = r"2 of 3 models .*\(killed, needs\).*first: killed.*signal 9.*run again"
    with pytest.raises(ModeclipError, match=message):
        run_jobs([needs, killed, other], 2, on_done=lambda job: done.append(job.name))
    thread.join()
    assert TrainResult.read(other) is not None
    assert done == ["other"]
    assert [job_status(job).state for job in (killed, needs, other)] == ["failed", "waiting", "finished"]
    assert not (tmp_path / "needs" / "log.jsonl").exists()
    assert not (tmp_path / "other" / "errors.txt").exists()
    assert not processes_of(tmp_path)


@pytest.mark.slow
def test_a_users_mistake_is_its_own_line_and_stops_the_others_if_asked(catalog: Path, tmp_path: Path) -> None:
    wrong = make_job(tmp_path / "nowhere.lance", tmp_path / "wrong")
    endless = make_job(catalog, tmp_path / "endless", FOREVER)
    with pytest.raises(ModeclipError) as caught:
        run_jobs([endless, wrong], 2, stop_on_failure=True)
    assert "the first: no catalog at " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not processes_of(tmp_path)
    assert job_status(endless).state in {"stopped", "waiting"}
    with pytest.raises(ModeclipError, match=r"^no catalog at .*nowhere\.lance"):
        run_jobs([wrong], 1)


@pytest.mark.slow
def test_commands_do_what_the_processes_do(catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each printed line is given to a shell, in another folder; then there is nothing left to do."""
    seed = make_job(catalog, tmp_path / "models of a run" / "seed")
    expert = make_job(catalog, tmp_path / "models of a run" / "expert-0", 1, seed)
    lines = commands_for([expert, seed])
    assert [line.endswith("seed/job.json'") for line in lines] == [True, False]
    assert lines[1].endswith("  # after seed")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for line in lines:
        done = subprocess.run(
            line, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, done.stderr
    before = [support.weights_of(job.folder) for job in (seed, expert)]
    assert set(run_jobs([seed, expert], 1)) == {"seed", "expert-0"}
    assert [support.weights_of(job.folder) for job in (seed, expert)] == before
    monkeypatch.chdir(tmp_path)
    moved = replace(expert, folder="models of a run/expert-0", start_from="models of a run/seed")
    assert commands_for([moved]) == [lines[1].removesuffix("  # after seed")]
    assert TrainJob.load(Path(expert.folder) / "job.json").start_from == seed.folder
    [line, _] = commands_for([seed, expert], processes=4)
    assert line.startswith(
        "python -m torch.distributed.run --standalone --nproc_per_node 4 -m modeclip.training.trainer "
    )


HOLDER = """
import sys, time
from pathlib import Path
from modeclip.system.files import only_process
with only_process(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_a_job_that_another_process_trains_is_waited_for_until_that_one_is_dead(
    catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(catalog, tmp_path / "job", 1)
    job.save()
    lines = list[str]()
    monkeypatch.setattr("modeclip.training.launching.log", lines.append)
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, job.folder], stdout=subprocess.PIPE)
    assert holder.stdout
    assert holder.stdout.readline() == b"held\n"

    def kill_when_it_is_waited_for() -> None:
        while not lines:
            time.sleep(0.05)
        holder.kill()

    killer = threading.Thread(target=kill_when_it_is_waited_for)
    killer.start()
    assert run_jobs([job], 1)["job"].samples == 8
    killer.join()
    holder.wait()
    holder.stdout.close()
    told = rf"job: process {holder.pid} of .+, since 20.+ is training it, at step 0 of 1 \(0.0 %\); waiting until"
    assert re.match(told, lines[0])
    assert not [line for line in lines[1:] if "is training it" in line]


@pytest.mark.slow
def test_a_job_is_no_part_of_the_group_that_its_caller_is_in(
    catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a script of Slurm with several tasks a job that took itself for one of them would wait for the others."""
    slurm = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2", "SLURM_NNODES": "1", "SLURM_JOB_ID": "7"}
    for name, value in (slurm | {"SLURM_JOB_NAME": "train", "SLURM_NODELIST": "localhost"}).items():
        monkeypatch.setenv(name, value)
    assert World.of_environment().size == 2
    assert run_jobs([make_job(catalog, tmp_path / "job", 1)], 1)["job"].samples == 8


@pytest.mark.parametrize(
    ("gpus", "workers", "processes", "expected"),
    [
        ([], 2, 1, [None, None]),
        (["0"], 2, 1, ["0", "0"]),
        (["4", "GPU-a1", "6"], 5, 1, ["4", "GPU-a1", "6", "4", "GPU-a1"]),
        (["0", "1", "2", "3", "4"], 8, 2, ["0,1", "2,3"]),
        (["0", "1"], 2, 2, ["0,1"]),
    ],
)
def test_jobs_divide_the_gpus(
    gpus: list[str],
    workers: int,
    processes: int,
    expected: list[str | None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As many jobs as may run at a time; then one ends, and the next takes its place and its GPUs."""
    given = list[str | None]()

    def start(_module: str, _words: list[str], environment: dict[str, str | None], _output: IO[bytes]) -> Any:
        given.append(environment.get("CUDA_VISIBLE_DEVICES"))
        return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)

    monkeypatch.setattr(launching, "visible_gpus", lambda: gpus)
    monkeypatch.setattr(launching, "start_tied", start)
    runner = launching._Here(workers, processes)
    while runner.is_free():
        runner.start(make_job(tmp_path / "none.lance", tmp_path / f"job-{len(given)}"))
    assert given == expected
    first = runner.running["job-0"].process
    assert first.stdin
    first.stdin.write(b"\n")
    first.stdin.flush()
    first.wait()
    assert list(runner.ended()) == ["job-0"]
    runner.start(make_job(tmp_path / "none.lance", tmp_path / "next"))
    assert given[-1] == expected[0]
    assert not runner.is_free()
    runner.stop()


def test_gpus_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-a1")
    assert visible_gpus() == ["3", "GPU-a1"]


LAUNCHER = """
import sys
from pathlib import Path
from modeclip.training.jobs import TrainJob
from modeclip.training.launching import run_jobs
run_jobs([TrainJob.load(Path(sys.argv[1]))], 1, processes=int(sys.argv[2]))
"""


def launch(job: TrainJob, processes: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(job.save()), str(processes)], stderr=subprocess.DEVNULL
    )


def wait_for_processes(folder: Path, count: int) -> None:
    deadline = time.monotonic() + 180
    while len(processes_of(folder)) < count:
        assert time.monotonic() < deadline, processes_of(folder)
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "moment"), [(2, "at its start"), (2, "while it trains"), (1, "while it is stopped")]
)
def test_no_process_outlives_the_one_that_started_it(
    catalog: Path, tmp_path: Path, processes: int, moment: str
) -> None:
    """A process that is stopped, as one that is stuck, cannot look for its parent; it ends nevertheless."""
    job = make_job(catalog, tmp_path / "job", FOREVER)
    launcher = launch(job, processes)
    try:
        if moment == "at its start":
            wait_for_processes(tmp_path, 1)
        else:
            wait_until_it_trains(job)
        if moment == "while it is stopped":
            for process in processes_of(tmp_path):
                os.kill(process, signal.SIGSTOP)
    finally:
        launcher.kill()
        launcher.wait()
    wait_until_all_are_gone(tmp_path)
    while holder_of(tmp_path / "job"):  # the last files of a process are closed after its name is gone
        os.sched_yield()
    status = job_status(job)
    assert (status.state, status.note) == ("waiting" if moment == "at its start" else "stopped", "")
    assert {path.name for path in (tmp_path / "job").iterdir()} <= {"job.json", "lock", "log.jsonl", "checkpoints"}
    if moment == "while it is stopped":
        assert run_jobs([replace(job, last_step=2)], 1)["job"].samples == 16


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGHUP])
def test_a_caller_that_is_asked_to_end_has_its_jobs_save(catalog: Path, tmp_path: Path, ending: signal.Signals) -> None:
    config = replace(CONFIG, engine=replace(CONFIG.engine, save_every="10h"))
    job = replace(make_job(catalog, tmp_path / "job", FOREVER), config=config)
    before = signal.signal(ending, signal.SIG_DFL)  # what nohup has told this process to ignore, its children would too
    launcher = launch(job, 1)
    signal.signal(ending, before)
    try:
        deadline = time.monotonic() + 180
        while not job_status(job).step:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        launcher.send_signal(ending)
        code = launcher.wait(180)
    finally:
        launcher.kill()
        launcher.wait()
    assert code == 128 + ending
    assert not processes_of(tmp_path)
    assert job_status(job).checkpoint_age_seconds is not None


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["torchrun", "rank"])
def test_a_group_ends_as_a_whole(catalog: Path, tmp_path: Path, victim: str) -> None:
    job = make_job(catalog, tmp_path / "job", FOREVER)

    def kill() -> None:
        wait_until_it_trains(job)
        agent, *ranks = sorted(processes_of(tmp_path))
        assert len(ranks) == 2
        os.kill(agent if victim == "torchrun" else ranks[-1], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(ModeclipError, match=r"job: training ended early: .*run again to continue"):
        run_jobs([job], 1, processes=2)
    thread.join()
    wait_until_all_are_gone(tmp_path)


@pytest.mark.slow
def test_workers_that_read_pictures_end_with_the_trainer(catalog: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, engine=replace(CONFIG.engine, workers=2))
    job = replace(make_job(catalog, tmp_path / "job", FOREVER), config=config)
    launcher = launch(job, 1)
    try:
        wait_until_it_trains(job)
        [trainer] = set(processes_of(tmp_path)) - {launcher.pid}
        group = [process for process in processes() if session_of(process) == trainer]
        assert len(group) >= 4  # the trainer, the server that forks, and two workers
    finally:
        launcher.kill()
        launcher.wait()
    deadline = time.monotonic() + 90
    while left := [process for process in group if process in processes()]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def processes() -> set[int]:
    """Processes that are alive; the dead whom nobody has asked for yet do not count."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if path.read_text().rpartition(")")[2].split()[0] != "Z":
                found.add(int(path.parent.name))
    return found


def session_of(process: int) -> int:
    try:
        return os.getsid(process)
    except ProcessLookupError:
        return -1


@pytest.mark.slow
class TestTorchrun:
    def test_two_processes_train_one_model(self, catalog: Path, tmp_path: Path) -> None:
        job = make_job(catalog, tmp_path / "job")
        assert run_jobs([job], 1, processes=2)["job"].samples == 16
        assert not (tmp_path / "job" / "errors.txt").exists()
        assert not processes_of(tmp_path)

    def test_a_users_mistake_in_them_is_one_line(self, catalog: Path, tmp_path: Path) -> None:
        job = replace(make_job(catalog, tmp_path / "job"), where={"width": 1})
        with pytest.raises(ModeclipError) as caught:
            run_jobs([job], 1, processes=2)
        assert "\n" not in str(caught.value)
        assert re.search("no pair of width 1.*choose others", str(caught.value))
        assert job_status(job).state == "failed"


@pytest.fixture
def ray_of_two() -> Iterator[None]:
    """A real Ray cluster with two processors on this machine."""
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # ray's own
@pytest.mark.usefixtures("ray_of_two")
def test_ray_repeats_a_job_whose_worker_died(catalog: Path, tmp_path: Path) -> None:
    """The worker that trains is killed; another one goes on from the checkpoint, to the same bits."""
    seed = make_job(catalog, tmp_path / "seed", 30)
    expert = make_job(catalog, tmp_path / "expert-0", 1, seed)
    wrong = make_job(tmp_path / "nowhere.lance", tmp_path / "wrong")
    killed = list[int]()

    def kill() -> None:
        wait_until_it_trains(seed)
        [process] = processes_of(tmp_path / "seed")
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        killed.append(int(fields[1]))
        os.kill(killed[0], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(ModeclipError, match=r"^no catalog at "):
        run_jobs([seed, expert, wrong], 1, ray=True)
    thread.join()
    assert killed
    assert [job_status(job).state for job in (seed, expert, wrong)] == ["finished", "finished", "failed"]
    alone = replace(seed, folder=str(tmp_path / "alone"))
    train(alone)
    assert support.weights_of(alone.folder) == support.weights_of(seed.folder)
    too_wide = replace(make_job(catalog, tmp_path / "wide"), threads=3)
    with pytest.raises(ModeclipError, match=r"wide needs 3 CPU.*has 2 .*lower experts"):
        run_jobs([too_wide], 1, ray=True)
