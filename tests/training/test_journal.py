"""The job's log: cut back where a job continues, readable by every JSON parser; the same numbers elsewhere."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from modeclip.errors import ModeclipError
from modeclip.training.jobs import TrainConfig, TrainResult
from modeclip.training.journal import Journal, check_reports, training_seconds
from support import make_job

REPORT = """
import sys
from pathlib import Path
from modeclip.training.journal import Journal
journal = Journal(Path(sys.argv[1]), 0, [sys.argv[2]], "expert-3", {"batch_size": 8, "engine": {"workers": 0}})
for step in (10, 20):
    journal.count(80, 0.0)
    journal.write(step=step, loss=1 / step, grad_norm=float("nan"))
journal.close()
if len(sys.argv) > 3:
    sys.exit()
journal = Journal(Path(sys.argv[1]), 10, [sys.argv[2]], "expert-3", {"batch_size": 8})
journal.write(step=20, loss=0.125)
journal.close()
"""


def lines(folder: Path) -> list[dict[str, float | None]]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    text = (folder / "log.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def report(folder: Path, *words: str, **environment: str) -> str:
    """Write two runs of a journal in a process of its own; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", REPORT, str(folder), *words],
        env=os.environ | environment, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("rate", [None, 0.0, "none"])
def test_a_training_whose_log_tells_no_rate_took_its_last_run(tmp_path: Path, rate: object) -> None:
    job = make_job("catalog.lance", tmp_path, TrainConfig(batch_size=8))
    result = TrainResult(digest=job.digest, samples=16, rows=16, seconds=5.0)
    told = [{"step": 1, "samples_per_second": 2.0}, {"step": 2, "samples_per_second": 4.0}]
    (tmp_path / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in told))
    assert training_seconds(job, result) == 8 / 2 + 8 / 4
    told[1]["samples_per_second"] = rate  # type: ignore[assignment]
    (tmp_path / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in told))
    assert training_seconds(job, result) == 5.0


def test_lines_carry_rate_and_wait(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "job", 0, (), "seed", {})
    for _ in range(3):
        journal.count(100, 1e-9)
    journal.write(step=10, loss=2.5)
    journal.write(step=20, loss=1.5)
    journal.close()
    first, second = lines(tmp_path / "job")
    assert list(first) == ["step", "loss", "samples_per_second", "data_wait"]
    assert (first["samples_per_second"] or 0) > 100
    assert 0 <= (first["data_wait"] or 0) < 0.1
    assert second["samples_per_second"] == 0.0


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 0, (), "seed", {})
    journal.write(step=1, loss=math.nan, grad_norm=math.inf)
    (line,) = lines(tmp_path)
    assert line["loss"] is None
    assert line["grad_norm"] is None


def test_continuing_cuts_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 0, (), "seed", {})
    for step in (10, 20, 30):
        journal.write(step=step, loss=1.0)
    Journal(tmp_path, 20, (), "seed", {}).write(step=30, loss=2.0)
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(10, 1.0), (20, 1.0), (30, 2.0)]
    Journal(tmp_path, 0, (), "seed", {})
    assert lines(tmp_path) == []


@pytest.mark.parametrize("end", ['{"step": 2', '{"loss": 1}', "12", "\x00\x00", '{"step": null}'])
def test_line_that_a_kill_cut_short_is_dropped(tmp_path: Path, end: str) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 3.0}\n' + end)
    Journal(tmp_path, 5, (), "seed", {}).write(step=6, loss=1.0)
    assert [line["step"] for line in lines(tmp_path)] == [1, 6]


def test_package_that_is_not_installed() -> None:
    with pytest.raises(ModeclipError, match=r"no_such_place is not installed.*pip install 'modeclip\[no_such_place\]"):
        check_reports(["no_such_place"])


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {f"train/{name}" for name in NAMES}
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (10, pytest.approx(0.1)),
        (20, 0.125),  # what the first run told of a step after the one that the second continued from is gone
    ]
    assert [line["loss"] for line in lines(tmp_path)] == [0.1, 0.125]


NAMES = ("loss", "grad_norm", "samples_per_second", "data_wait")


def test_wandb_without_login_writes_its_files_here(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    printed = report(tmp_path, "wandb", HOME=str(tmp_path / "home"))
    assert printed == ""  # the last line that a job prints is the one that says why it failed
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2
    assert len({file.name for file in files}) == 1  # one run, continued
    first, second = (file.read_bytes() for file in files)
    for name in NAMES:
        assert f"train/{name}".encode() in first
    assert b"0.05" in first
    assert b"0.125" in second
    assert b"batch_size" in second


@pytest.mark.slow
def test_wandb_without_a_network_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    printed = report(tmp_path, "wandb", "once", WANDB_API_KEY="0" * 40, WANDB_BASE_URL="http://127.0.0.1:9")
    assert "Weights & Biases does not answer" in printed
    assert "is kept in" in printed
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
