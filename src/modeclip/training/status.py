"""How far the jobs of a folder are, read from the files that they leave.

The processes that train are not asked, so this works from any machine that sees the folder, while others write to it.
``job.json`` says what is to be done, the lock whether a process is working on it, the last whole line of ``log.jsonl``
how far it is, ``done.json`` that it is finished, and ``errors.txt`` why it is not.

Price: a few small reads for each model, among them the last 16 kB of its log.
"""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Required

from rich.live import Live
from rich.table import Table
from rich.text import Text
from typing_extensions import TypedDict

from modeclip.data.catalog import Catalog
from modeclip.errors import ModeclipError
from modeclip.models.checkpoints import checkpoint_files
from modeclip.system.console import console, printable
from modeclip.system.files import holder_of, parse_json
from modeclip.system.paths import RunPaths
from modeclip.training.experts import why_stale
from modeclip.training.jobs import ERRORS_FILE, JOB_FILE, LOG_FILE, TrainJob, TrainResult

LOG_TAIL_BYTES = 1 << 14
SPEED_LINES = 5
"""Lines of the log whose median is the speed, so that a line which a checkpoint has slowed down does not count."""
REFRESH_SECONDS = 1.0
GAP_SECONDS = 60.0
"""How long to watch on for another job to start when none runs."""

State = Literal["finished", "stale", "running", "waiting", "stopped", "failed"]
COLOURS: dict[State, str] = {
    "finished": "green",
    "stale": "magenta",
    "running": "cyan",
    "waiting": "dim",
    "stopped": "yellow",
    "failed": "red",
}
COLUMNS = ("model", "state", "step", "done", "samples/s", "loss", "time left", "checkpoint", "note")


class LogLine(TypedDict, total=False):
    """What the status reads of a line of a job's log."""

    step: Required[int]
    """Steps done."""
    loss: float | None
    """Loss of the step."""
    samples_per_second: float | None
    """Speed since the line before."""


@dataclass(frozen=True, kw_only=True)
class JobStatus:
    """How far one job is."""

    name: str
    """Name of the model."""
    state: State
    """What the job is doing. A ``stopped`` one was ended by a signal or with its machine; the same command continues
    it. A ``stale`` one is finished, but the catalog has other pairs for it now, or another model is its start."""
    step: int
    """Step of the schedule that the log has reached."""
    last_step: int
    """Step at which the job ends."""
    share: float
    """Share of the job's own steps that is done, in [0, 1]."""
    samples_per_second: float | None
    """Recent speed; None before the first line of the log."""
    loss: float | None
    """Loss in the last line of the log."""
    seconds_left: float | None
    """Time to the end at the recent speed; None where nothing runs."""
    checkpoint_age_seconds: float | None
    """Age of the newest checkpoint; None if there is none."""
    note: str = ""
    """Last line of the error that ended a failed job; which process trains one that runs; why a finished one is stale.
    """

    def cells(self) -> tuple[str, ...]:
        """Return the status as words for the columns of a table."""
        return (
            self.name,
            self.state,
            f"{self.step:,} / {self.last_step:,}",
            f"{100 * self.share:.1f} %",
            "" if self.samples_per_second is None else f"{self.samples_per_second:,.0f}",
            "" if self.loss is None else f"{self.loss:.4f}",
            "" if self.seconds_left is None else in_words(self.seconds_left),
            "" if self.checkpoint_age_seconds is None else f"{in_words(self.checkpoint_age_seconds)} ago",
            self.note,
        )


def status(folder: Path) -> tuple[JobStatus, ...]:
    """Return how far the jobs of a folder are, the seed first, then by name.

    Args:
        folder: Folder of a run, of its models, or of one job.

    Raises:
        ModeclipError: It has no job.
    """
    paths = [path for place in ("", "*/", "models/*/") for path in folder.glob(place + JOB_FILE)]
    if not paths:
        raise ModeclipError(f"{folder}: no job.json in it or in its models; give the folder of a run that is training")
    jobs = sorted(((TrainJob.load(path), path.parent) for path in paths), key=_place)
    rows, fits = [], dict[Path, str]()
    for job, place in jobs:
        row = job_status(job, place)
        if row.state == "finished":
            start = place.with_name(Path(job.start_from).name) if job.start_from else place
            fits[place] = job.digest
            why = why_stale(job, catalog) if (catalog := _catalog_of(job, place)) is not None else ""
            if not why and start != place and (start / JOB_FILE).is_file() and fits.get(start) != job.start_digest:
                why = f"the {start.name} that it continues has changed"
            if why:
                row = replace(row, state="stale", note=why)
                del fits[place]
        rows.append(row)
    return tuple(rows)


def _catalog_of(job: TrainJob, place: Path) -> Catalog | None:
    """Return the catalog of the run in which a job's folder lies now, or that of the job, if it can be opened."""
    own = RunPaths(folder=place.absolute().parent.parent).catalog_path
    try:
        return Catalog.open(own if own.is_dir() else job.catalog)
    except ModeclipError:
        return None


def job_status(job: TrainJob, folder: Path | None = None) -> JobStatus:
    """Return how far one job is; its folder may have been moved since the job was written."""
    folder = Path(job.folder) if folder is None else folder
    lines = read_log(folder)
    result = TrainResult.read(replace(job, folder=str(folder)))
    step = job.last_step if result is not None else int(lines[-1]["step"]) if lines else job.first_step
    step = min(max(step, job.first_step), job.last_step)
    ages = [time.time() - moment for path in checkpoint_files(folder) if (moment := _modified(path)) is not None]
    note = _last_words(folder)
    holder = None if result is not None else holder_of(folder)
    state = _state(result is not None, holder is not None, bool(lines or ages), bool(note))
    speeds = [speed for line in lines[-SPEED_LINES:] if (speed := line.get("samples_per_second")) is not None]
    speed = statistics.median(speeds) if speeds else None
    left = (job.last_step - step) * job.config.batch_size
    return JobStatus(
        name=job.name,
        state=state,
        step=step,
        last_step=job.last_step,
        share=(step - job.first_step) / (job.last_step - job.first_step),
        samples_per_second=speed,
        loss=lines[-1].get("loss") if lines else None,
        seconds_left=left / speed if speed and state == "running" else None,
        checkpoint_age_seconds=max(0.0, min(ages)) if ages else None,
        note=note if state == "failed" else f"by {holder}".rstrip(",") if holder is not None else "",
    )


def read_log(folder: Path) -> list[LogLine]:
    """Return the last whole lines of a job's log, oldest first, without one that is being written."""
    try:
        with (folder / LOG_FILE).open("rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - LOG_TAIL_BYTES)
            file.seek(start)
            pieces = file.read().split(b"\n")
    except OSError:
        return []
    lines: list[LogLine] = []
    for piece in pieces[1 if start else 0 :]:
        with suppress(ValueError):
            lines.append(parse_json(piece, LogLine))
    return lines


def board_table(rows: Iterable[JobStatus], title: str) -> Table:
    """Return the table that `watch` shows."""
    table = Table(title=printable(title), title_justify="left")
    for name in COLUMNS:
        left = name in {"model", "state", "note"}
        table.add_column(name, justify="left" if left else "right", no_wrap=name != "note", overflow="fold")
    for row in rows:
        name, state, *cells = map(printable, row.cells())
        table.add_row(name, Text(state, style=COLOURS[row.state]), *cells)
    return table


def watch(read: Callable[[], tuple[JobStatus, ...]], title: str) -> tuple[JobStatus, ...]:
    """Show the jobs live until each has ended, or none has run for a minute; return their last status.

    Args:
        read: Returns the present status of the jobs.
        title: Title of the table.
    """
    rows, idle_since = read(), time.monotonic()
    with Live(board_table(rows, title), console=console, auto_refresh=False) as live:
        while any(row.state in {"running", "waiting"} for row in rows):
            if any(row.state == "running" for row in rows):
                idle_since = time.monotonic()
            if time.monotonic() - idle_since > GAP_SECONDS:
                break
            time.sleep(REFRESH_SECONDS)
            rows = read()
            live.update(board_table(rows, title), refresh=True)
    return rows


def in_words(seconds: float) -> str:
    """Return a time in its two largest units.

    Examples:
        >>> in_words(8.0), in_words(68.0), in_words(7_300.0), in_words(200_000.0)
        ('8 s', '1 min 8 s', '2 h 1 min', '2 d 7 h')
    """
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86_400
    if minutes < 1:
        return f"{seconds:.0f} s"
    if hours < 1:
        return f"{int(minutes)} min {int(seconds % 60)} s"
    return f"{int(hours)} h {int(minutes % 60)} min" if days < 1 else f"{int(days)} d {int(hours % 24)} h"


def _state(is_done: bool, is_running: bool, is_begun: bool, has_errors: bool) -> State:
    if is_done:
        return "finished"
    if is_running:
        return "running"
    if has_errors:
        return "failed"
    return "stopped" if is_begun else "waiting"


def _last_words(folder: Path) -> str:
    """Return the last line of a failed job's errors."""
    try:
        lines = (folder / ERRORS_FILE).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1] if lines else ""


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:  # it was removed a moment ago
        return None


def _place(entry: tuple[TrainJob, Path]) -> tuple[bool, list[tuple[int, str]]]:
    """Return the key that sorts the jobs: the seed first, numbers by their value."""
    job, folder = entry
    parts = re.findall(r"\d+|\D+", folder.name)
    return job.role != "seed", [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
