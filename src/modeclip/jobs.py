"""What it takes to train one model: its settings, its part of the schedule, its rows, and the record of its end.

A *job* trains one model from one step of a schedule to another. The seed model runs from 0 to 27 parts of 32; a data
expert continues from the seed's last checkpoint, optimizer state included, through the rest of the SAME schedule on its
own cluster, so its learning rate goes on (in the paper from 5.96 % of the highest rate) to 0 and does not start again.

Source: MoDE Sec. 3.3 and 4.2, and the settings of its released code.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

from modeclip.errors import ModeclipError
from modeclip.files import write_atomically


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How one model is trained."""

    model: str = "modeclip-icon"
    """Model specification: a name, ``name@pretrained_tag``, ``hf-hub:``, or the path of an open_clip model folder."""
    samples: int = 245_760
    """Samples that the dense model sees in its whole schedule of ``total_parts`` parts."""
    batch_size: int = 256
    """Image-caption pairs a step; every other pair of the batch is a negative (the paper: 32,768)."""
    total_parts: int = 32
    """Equal parts that the schedule is divided into (the paper: 32 epochs of 400 million samples)."""
    seed_parts: int = 27
    """Parts that the seed model trains on all data before the experts part from it (the paper: 27)."""
    learning_rate: float = 1e-3
    """Highest learning rate, reached after the warm-up, then falling to 0 by a cosine (the paper, ViT-B: 5e-4)."""
    warmup_fraction: float = 0.04
    """Share of the schedule in which the learning rate rises linearly, in [0, 1)."""
    weight_decay: float = 0.2
    """AdamW's decay of matrices; norms, biases and the logit scale have none (the paper: 0.2)."""
    min_crop_share: float = 0.9
    """Least share of a picture's area that its random training crop keeps, in (0, 1]; 1: no crops (open_clip: 0.9)."""
    precision: str = "auto"
    """``32-true``, ``bf16-mixed`` or ``16-mixed``, as Lightning Fabric names them; ``auto``: bf16 where it is fast."""
    checkpoint_seconds: float = 20.0
    """Time between checkpoints, in seconds; a killed run repeats at most this much."""
    seed: int = 0
    """Of the random start and of the order of the samples."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.batch_size < 2:
            raise ModeclipError(f"train.batch_size must be at least 2 (a pair needs a negative), got {self.batch_size}")
        if not 0 < self.seed_parts < self.total_parts:
            raise ModeclipError(
                f"train.seed_parts must lie in 1 to {self.total_parts - 1} (total_parts - 1), got {self.seed_parts}"
            )
        if self.samples < self.batch_size * self.total_parts:
            raise ModeclipError(
                f"train.samples must be at least batch_size * total_parts = {self.batch_size * self.total_parts:,} "
                f"(one step a part), got {self.samples:,}"
            )
        if not 0 < self.min_crop_share <= 1:
            raise ModeclipError(f"train.min_crop_share must lie in (0, 1], got {self.min_crop_share}")
        if self.precision not in {"auto", "32-true", "bf16-mixed", "16-mixed"}:
            raise ModeclipError(
                f"train.precision must be auto, 32-true, bf16-mixed or 16-mixed, got {self.precision!r}"
            )

    @property
    def steps_per_part(self) -> int:
        """Optimizer steps in one part of the schedule."""
        return self.samples // (self.batch_size * self.total_parts)


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """One model to be trained: everything that decides the result, and where it goes."""

    name: str
    """Name of the model: ``seed``, ``dense``, ``expert-0``..."""
    folder: str
    """Where its files go."""
    catalog: str
    """Path of the catalog."""
    catalog_fingerprint: str
    """Of the catalog and of the clustering, so that a changed input makes the job stale."""
    config: TrainConfig
    """Model, optimizer and batch settings."""
    first_step: int
    """Step of the schedule at which this job starts."""
    last_step: int
    """Step of the schedule at which it ends."""
    first_share: float
    """Share of the learning-rate schedule that lies behind at the first step, in [0, 1)."""
    last_share: float
    """The same at the last step; the schedule ends at 1."""
    start_from: str | None = None
    """Folder of the finished job that this one continues, with its optimizer state; None: the model's own start."""
    start_digest: str = ""
    """Digest of that job."""
    expert: int | None = None
    """Rows of this expert only; None: all rows."""
    out_of_cluster_fraction: float = 0.0
    """Share of the rows outside the expert's cluster that it sees too, in [0, 1]."""
    threads: int = 1
    """Threads that compute; part of the digest, since another number sums in another order."""

    @property
    def digest(self) -> str:
        """Hash of all that decides the result, not of where it is written."""
        content = {key: value for key, value in asdict(self).items() if key not in {"folder", "start_from", "catalog"}}
        del content["config"]["checkpoint_seconds"]
        return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step of the job."""
        done = (step - self.first_step) / (self.last_step - self.first_step)
        return learning_rate_at(self.first_share + done * (self.last_share - self.first_share), self.config)

    def save(self) -> Path:
        """Write the job into its folder and return the file's path."""
        path = Path(self.folder) / "job.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(asdict(self), indent=2) + "\n")
        return path

    @classmethod
    def load(cls, path: Path) -> TrainJob:
        """Read a job file."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{**content, "config": TrainConfig(**content["config"])})
        except (OSError, TypeError, KeyError, json.JSONDecodeError) as error:
            raise ModeclipError(f"job file {path} cannot be read: {error}") from error


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a finished job leaves in ``done.json``."""

    digest: str
    """Of the job."""
    samples: int
    """Samples that this job itself has trained on."""
    rows: int
    """Rows of the catalog that it drew them from."""
    seconds: float
    """Wall time of the last run of the job."""

    @classmethod
    def read(cls, job: TrainJob) -> TrainResult | None:
        """Return the result of a job if it is finished and made from the same inputs, else None."""
        try:
            result = cls(**json.loads((Path(job.folder) / "done.json").read_text(encoding="utf-8")))
        except (OSError, TypeError, json.JSONDecodeError):
            return None
        return result if result.digest == job.digest else None


def learning_rate_at(share: float, config: TrainConfig) -> float:
    """Return the learning rate where a share of the schedule lies behind: linear warm-up, then a cosine to 0.

    Args:
        share: Part of the schedule that is done, in [0, 1].
        config: Highest rate and warm-up.

    Examples:
        The paper's experts start with 5.96 % of the highest rate (warm-up: 2,000 of 390,625 steps):

        >>> config = TrainConfig(learning_rate=1.0, warmup_fraction=2000 / 390_625)
        >>> round(learning_rate_at(27 / 32, config), 4)
        0.0596
    """
    warmup = config.warmup_fraction
    if share < warmup:
        return config.learning_rate * share / warmup
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (share - warmup) / (1 - warmup)))
