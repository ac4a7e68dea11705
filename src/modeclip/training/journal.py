"""The log of a training job: ``log.jsonl`` in its folder, and TensorBoard or Weights & Biases where asked for.

A job that continues cuts its log back to the step that it continues from, so that each step is in it once. Scalars have
open_clip's names (``train/loss``), so the runs of both share their charts. Weights & Biases works without an account
and without a network; such a run is kept in the job's folder for ``wandb sync``.
"""

from __future__ import annotations

import json
import math
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from modeclip.errors import ModeclipError
from modeclip.system.console import log
from modeclip.system.files import to_json, write_atomically
from modeclip.training.jobs import LOG_FILE, TrainJob, TrainResult

PROJECT = "modeclip"
"""Project in Weights & Biases, unless ``WANDB_PROJECT`` names another one."""
INIT_TIMEOUT_SECONDS = 30.0
"""How long the server may take to answer before the run is kept in the job's folder instead."""


class Journal:
    """The log of one run of a job."""

    def __init__(
        self, folder: Path, step: int, report_to: Sequence[str], name: str, settings: Mapping[str, Any]
    ) -> None:
        """Open the log and cut it back.

        Args:
            folder: Folder of the job.
            step: Step that the job continues from; lines of later steps are dropped.
            report_to: ``tensorboard``, ``wandb``, both or none.
            name: Name of the run.
            settings: Settings of the run, shown beside its curves.

        Raises:
            ModeclipError: What is needed for ``report_to`` is not installed.
        """
        check_reports(report_to)
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / LOG_FILE
        _cut_back(self._path, step)
        openers: dict[str, type[_TensorBoard | _Wandb]] = {"tensorboard": _TensorBoard, "wandb": _Wandb}
        self._places = [openers[place](folder, step, name, settings) for place in report_to]
        self._since, self._samples, self._waited = time.monotonic(), 0, 0.0

    def count(self, samples: int, waited: float) -> None:
        """Count the samples of a step and the seconds that it waited for them."""
        self._samples += samples
        self._waited += waited

    def write(self, **values: int | float) -> None:
        """Write a line with these values, ``step`` among them, and the speed and the wait since the last line.

        Numbers that are not finite become null in the file, since JSON has none.
        """
        seconds = max(time.monotonic() - self._since, 1e-9)
        values["samples_per_second"] = round(self._samples / seconds, 1)
        values["data_wait"] = round(self._waited / seconds, 4)
        line = {key: value if math.isfinite(value) else None for key, value in values.items()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(to_json(line) + "\n")
        step = int(values.pop("step"))
        for place in self._places:
            place.write(step, {f"train/{key}": value for key, value in values.items()})
        self._since, self._samples, self._waited = time.monotonic(), 0, 0.0

    def close(self) -> None:
        """Write what is still held back."""
        for place in self._places:
            place.close()


def training_seconds(job: TrainJob, result: TrainResult) -> float:
    """Return how long a training took over all of its runs, as its log tells; without one, its last run."""
    try:
        lines = [json.loads(line) for line in (Path(job.folder) / LOG_FILE).read_text(encoding="utf-8").splitlines()]
        steps = np.diff([job.first_step, *(line["step"] for line in lines)]).tolist()
        samples = [count * job.config.batch_size for count in steps]
        return float(sum(n / line["samples_per_second"] for n, line in zip(samples, lines, strict=True)))
    except (OSError, ValueError, LookupError, TypeError, ZeroDivisionError):  # a rate may be null, or 0.0 by rounding
        return result.seconds


def check_reports(report_to: Sequence[str]) -> None:
    """Raise if the package of a place that is to be reported to is not installed.

    Raises:
        ModeclipError: The message says which one to install.
    """
    for place in report_to:
        if find_spec(place) is None:
            raise ModeclipError(
                f"train.engine.report_to: {place} is not installed; install it with pip install 'modeclip[{place}]', "
                "or leave it out"
            )


class _TensorBoard:
    def __init__(self, folder: Path, step: int, name: str, settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self._writer.add_text(name, f"```json\n{json.dumps(settings, indent=2, default=str)}\n```", step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, folder: Path, step: int, name: str, settings: Mapping[str, Any]) -> None:
        import wandb

        del step  # the server ignores a step that it already knows
        # without ``silent`` its own lines would follow the one that says why a job failed
        quiet = wandb.Settings(silent=True, console="off", init_timeout=INIT_TIMEOUT_SECONDS)
        start = partial(
            wandb.init,
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=_identity(folder / "wandb-id.txt"),
            name=name,
            dir=str(folder),
            config=dict(settings),
            settings=quiet,
        )
        mode = os.environ.get("WANDB_MODE", "online")
        self._run: Any = None
        try:
            if mode == "online" and wandb.login(prompt=False):
                self._run = start(resume="allow")
        except wandb.errors.Error as error:
            log(f"{name}: Weights & Biases does not answer ({error}); the run is kept in {folder} for wandb sync")
        if self._run is None:
            self._run = start(mode="disabled" if mode == "disabled" else "offline")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def _identity(path: Path) -> str:
    """Return the id of the run, which stays the same when the job continues."""
    if not path.is_file():
        write_atomically(path, uuid.uuid4().hex[:12])
    return path.read_text(encoding="utf-8")


def _cut_back(path: Path, step: int) -> None:
    """Drop the lines after a step, and a line that a kill has cut short."""
    kept = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                kept += [line] if json.loads(line)["step"] <= step else []
            except (json.JSONDecodeError, KeyError, TypeError):
                break
    write_atomically(path, "".join(f"{line}\n" for line in kept))
