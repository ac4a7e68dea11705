"""The training of one model through one whole schedule: what fine-tuning, distilling and upcycling have in common.

Such a training has no seed that experts continue from. It starts from a model's weights, and its learning rate rises
and falls to 0 within its own steps.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from modeclip.data.catalog import Catalog
from modeclip.data.selection import ALL, Selection
from modeclip.training.jobs import LOG_FILE, AugmentConfig, EngineConfig, TrainConfig, TrainJob


@runtime_checkable
class Settings(Protocol):
    """What every configuration here says of a training."""

    @property
    def learning_rate(self) -> float | None:
        """Highest learning rate."""

    @property
    def weight_decay(self) -> float:
        """AdamW's decay of matrices."""

    @property
    def threads(self) -> int:
        """Threads that compute; 0: as many as PyTorch takes on this machine."""

    @property
    def seed(self) -> int:
        """Seed of all that is random."""

    @property
    def augment(self) -> AugmentConfig:
        """How pictures are varied."""

    @property
    def engine(self) -> EngineConfig:
        """How the machine is used."""


def one_schedule(
    folder: Path,
    catalog: Catalog,
    config: Settings,
    *,
    name: str,
    model: str | Path,
    steps: int,
    batch_size: int,
    selection: Selection = ALL,
    mask: str | None = None,
    **changes: Any,
) -> TrainJob:
    """Return the job of one schedule.

    Args:
        folder: Folder of the job's files.
        catalog: Pairs.
        config: What decides rates, seed, pictures and the machine.
        name: Name of the job.
        model: Model that is trained.
        steps: Steps of the schedule; at least 2 are made.
        batch_size: Pairs in a step.
        selection: Pairs that the user selected.
        mask: Column of booleans that marks the rows which may be used.
        changes: Fields of `TrainConfig` that are said otherwise, or are not in ``config``.
    """
    import torch

    steps = max(2, steps)
    shared = ("learning_rate", "weight_decay", "seed", "augment", "engine")
    settings = {field: getattr(config, field) for field in shared} | changes
    train = TrainConfig(
        model=str(model), samples=steps * batch_size, batch_size=batch_size, total_parts=2, seed_parts=1, **settings
    )
    return TrainJob(
        name=name,
        folder=str(folder),
        catalog=catalog.path,
        catalog_fingerprint=catalog.fingerprint,
        config=train.decided(),
        first_step=0,
        last_step=steps,
        first_share=0.0,
        last_share=1.0,
        mask=mask,
        selection=selection.absolute(),
        threads=config.threads or torch.get_num_threads(),
    )


def losses_of_job(job: TrainJob) -> list[float]:
    """Return the losses that a job has logged, the first one first."""
    lines = (Path(job.folder) / LOG_FILE).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]
