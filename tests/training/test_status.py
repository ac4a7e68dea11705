"""The board of a run's jobs: each state from real files and locks, half-written lines, and a job while it trains."""

from __future__ import annotations

import fcntl
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from modeclip.errors import ModeclipError
from modeclip.system.files import only_process
from modeclip.training.jobs import EngineConfig, TrainConfig, TrainJob, role_of
from modeclip.training.status import JobStatus, board_table, job_status, read_log, status, watch
from modeclip.training.trainer import train
from support import make_job, mark_done

CONFIG = TrainConfig(
    model="modeclip-icon-xxxs",
    samples=32 * 4000,
    batch_size=16,
    engine=EngineConfig(precision="32-true", save_every="1steps", log_every=1),
)


def saved_job(folder: Path, catalog: Path | str = "catalog.lance", **changes: object) -> TrainJob:
    """Save a job with the role that its name stands for and return it."""
    role, index = role_of(folder.name)
    steps = {"first_step": 100, "last_step": 300}
    job = make_job(catalog, folder, CONFIG, role=role, index=index, **(steps | changes))
    job.save()
    return job


def write_log(job: TrainJob, steps: range, tail: str = "") -> None:
    lines = [
        json.dumps({"step": step, "loss": 1 / step, "samples_per_second": 320.0 if step % 50 else 1.0})
        for step in steps
    ]
    (Path(job.folder) / "log.jsonl").write_text("\n".join(lines) + "\n" + tail)


def test_states_from_what_jobs_leave(tmp_path: Path) -> None:
    models = tmp_path / "models"
    mark_done(saved_job(models / "seed"))
    waiting = saved_job(models / "expert-10")
    stopped = saved_job(models / "expert-2")
    write_log(stopped, range(110, 210, 10), tail='{"step": 210, "lo')
    failed = saved_job(models / "expert-9")
    (Path(failed.folder) / "errors.txt").write_text("Traceback\nRuntimeError: [CUDA] error\n")
    other = saved_job(models / "dense")
    mark_done(replace(other, threads=7))  # what is there was made by another job
    other.save()
    rows = {row.name: row for row in status(tmp_path)}
    assert list(rows) == ["seed", "dense", "expert-2", "expert-9", "expert-10"]
    assert [row.state for row in rows.values()] == ["finished", "waiting", "stopped", "failed", "waiting"]
    assert (rows["seed"].share, rows["seed"].step, rows["expert-10"].share) == (1.0, 300, 0.0)
    two = rows["expert-2"]
    assert (two.step, two.share, two.loss) == (200, 0.5, pytest.approx(1 / 200))
    assert (two.samples_per_second, two.seconds_left) == (320.0, None)  # the median: one line was slow
    assert rows["expert-9"].note == "RuntimeError: [CUDA] error"
    assert rows["expert-2"].note == ""
    assert [row.name for row in status(models)] == list(rows)
    assert [row.name for row in status(Path(waiting.folder))] == ["expert-10"]
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    console.print(board_table(rows.values(), "t"))
    assert "RuntimeError: [CUDA] error" in console.export_text()
    console.file.close()


def test_a_lock_that_is_held_means_running(tmp_path: Path) -> None:
    job = saved_job(tmp_path / "job")
    write_log(job, range(110, 160, 10))
    assert job_status(job).state == "stopped"
    with (tmp_path / "job" / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        row = job_status(job)
        assert (row.state, row.step) == ("running", 150)
        assert row.seconds_left == pytest.approx((300 - 150) * 16 / 320)
        assert row.note == "by another process"
    with only_process(tmp_path / "job"):
        assert job_status(job).note.startswith(f"by process {os.getpid()} of ")
    assert job_status(job).state == "stopped"


@pytest.mark.parametrize("tail", [b"", b'{"step": 99', b"\x00\x00", b'{"step": "x"}\n', b"[1]\n", b"\xff\xfe\n"])
def test_lines_that_are_half_written_do_not_count(tmp_path: Path, tail: bytes) -> None:
    job = saved_job(tmp_path / "job")
    write_log(job, range(101, 300))  # longer than what is read
    with (tmp_path / "job" / "log.jsonl").open("ab") as file:
        file.write(tail)
    assert read_log(tmp_path / "job")[-1]["step"] == 299
    assert job_status(job).step == 299
    (tmp_path / "job" / "log.jsonl").write_bytes(tail)
    assert job_status(job).step == 100


def test_a_folder_without_jobs(tmp_path: Path) -> None:
    with pytest.raises(ModeclipError, match=r"no job\.json in it.*give the folder of a run"):
        status(tmp_path)


def test_a_job_while_it_trains_and_after_it_was_stopped(
    icons_catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = saved_job(tmp_path / "job", catalog=icons_catalog, first_step=0, last_step=100)
    assert job_status(job).state == "waiting"
    seen = list[JobStatus]()

    def look(clip: object, step: int) -> bool:
        del clip
        seen.append(job_status(job))
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return False

    with pytest.raises(SystemExit):
        train(job, visit_every=1, visit=look)
    assert [(row.state, row.step, row.share) for row in seen] == [("running", step, step / 100) for step in (1, 2, 3)]
    running = seen[-1]
    assert running.samples_per_second
    assert running.seconds_left
    assert running.checkpoint_age_seconds is not None
    assert running.checkpoint_age_seconds < 600
    monkeypatch.setattr("modeclip.training.status.REFRESH_SECONDS", 0.0)
    before = iter([(running,), (running,)])
    rows = watch(lambda: next(before, status(tmp_path / "job")), "live")  # ends by itself when nothing runs any more
    assert (rows[0].state, rows[0].step) == ("stopped", 3)
