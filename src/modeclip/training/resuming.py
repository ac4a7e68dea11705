"""A job and the folder that it is to be trained in -> a folder that is fit for it, or an error that says why not.

A job goes on from its own checkpoint. One of other settings is never continued and never overwritten by mistake.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modeclip.errors import ModeclipError
from modeclip.training.jobs import TrainJob
from modeclip.training.status import ERRORS_FILE, LOG_FILE, checkpoint_files

FOLLOWS = ("first_step", "last_step", "first_share", "last_share", "start_digest")
"""What follows from other settings, and is named only where these are the same."""


def prepare(job: TrainJob, resume: str = "latest") -> None:
    """Make a job's folder fit for it: empty, its own, or emptied on request.

    Args:
        job: What is to be trained.
        resume: ``latest``: the folder may hold this job's own checkpoints; ``never``: what is in it goes.

    Raises:
        ModeclipError: The folder holds what another job has trained.
    """
    folder = Path(job.folder)
    if resume == "never":
        for path in (*checkpoint_files(folder), folder / LOG_FILE, folder / "done.json", folder / ERRORS_FILE):
            path.unlink(missing_ok=True)
    elif (folder / "job.json").is_file():
        before = TrainJob.load(folder / "job.json")
        is_used = bool(checkpoint_files(folder)) or (folder / "done.json").is_file()
        if is_used and before.digest != job.digest:
            raise ModeclipError(
                f"{folder} holds what was trained with other settings: {', '.join(changes(before, job))}; "
                "give these again, or --resume never to train anew, or another folder"
            )


def changes(before: TrainJob, job: TrainJob) -> list[str]:
    """Return what two jobs differ in that decides the result, a few words each."""
    old, new = _flat(before.deciding()), _flat(job.deciding())
    different = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    causes = [name for name in different if name not in FOLLOWS] or different
    return [f"{name} was {old.get(name)!r}, now {new.get(name)!r}" for name in causes]


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in content.items():
        name = f"{prefix}{key}".removeprefix("config.")
        found |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found
