"""What it takes to train one model: its settings, its part of the schedule, its rows, and the record of its end.

A *job* trains one model from one step of a schedule to another. The seed model runs from 0 to 27 parts of 32; a data
expert continues from the seed's last checkpoint, optimizer state included, through the rest of the SAME schedule on its
own cluster, so its learning rate goes on (in the paper from 5.96 % of the highest rate) to 0 and does not start again.

Source: MoDE Sec. 3.3 and 4.2, and the settings of its released code.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, get_args

from modeclip.errors import ModeclipError, unknown
from modeclip.system.files import write_atomically

_SECONDS = {"s": 1, "min": 60, "h": 3600}

Role = Literal["seed", "dense", "dense-total", "expert", "random", "full", "one-step", "prior", "single"]
"""What a model is for: the seed; the dense model that continues it, or that costs what the whole mixture costs; an
expert of a cluster; a member of one of the control mixtures; the expert of some class names; one model by itself."""
MEMBER_ROLES: tuple[Role, ...] = ("expert", "random", "full", "one-step")
"""Roles of which a run has one model for each expert; their jobs have an index."""
UNHASHED_FIELDS = frozenset({"folder", "start_from", "catalog", "role", "index"})
"""Fields of a job that do not decide its result, and so are no part of its digest."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How training pictures are varied; the names and defaults of open_clip, whose ``image_transform`` it follows."""

    min_crop_share: float = 0.9
    """Least share of a picture's area that its random crop keeps, in (0, 1]; 1: no crops (open_clip: 0.9)."""
    color_jitter: float = 0.0
    """Strength of brightness, contrast and saturation changes, and of hue at a quarter of it, in [0, 1]; 0: none."""
    color_jitter_probability: float = 0.8
    """Share of the pictures whose colours are changed, in [0, 1]."""
    grayscale_probability: float = 0.0
    """Share of the pictures that lose their colours, in [0, 1]."""
    patch_dropout: float = 0.0
    """Share of an image tower's patches that are left out in training, in [0, 1) (FLIP, arXiv 2212.00794)."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 < self.min_crop_share <= 1:
            raise ModeclipError(f"train.augment.min_crop_share must lie in (0, 1], got {self.min_crop_share}")
        for name in ("color_jitter", "color_jitter_probability", "grayscale_probability", "patch_dropout"):
            value = getattr(self, name)
            if not 0 <= value <= 1 or (name == "patch_dropout" and value == 1):
                end = ")" if name == "patch_dropout" else "]"
                raise ModeclipError(f"train.augment.{name} must lie in [0, 1{end}, got {value}")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How the machine is used; apart from ``precision`` nothing here changes what a model is, up to rounding."""

    precision: str = "auto"
    """``32-true``, ``bf16-mixed`` or ``16-mixed``, as Lightning Fabric names them; ``auto``: bf16 where it is fast."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun or Slurm with several processes: copies of the model (ddp), or its parts (fsdp)."""
    micro_batch: int | Literal["auto"] = 0
    """Samples that a process runs through the towers at once; 0: all of its batch; ``auto``: as many as fit."""
    grad_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    workers: int = 0
    """Processes that read and decode ahead; 0: two threads of the training process."""
    keep_pictures_gb: float = 1.0
    """Memory (10^9 bytes) for decoded pictures, if all of a job's fit and ``workers`` is 0; 0: decode every time."""
    save_every: str = "20s"
    """Time, steps or passes over the rows between checkpoints: ``30min``, ``1000steps``, ``1epoch``."""
    keep_checkpoints: int = 1
    """Newest checkpoints that are kept, at least 1."""
    log_every: int = 10
    """Steps between two lines of the log."""
    report_to: tuple[str, ...] = ()
    """Further places for what is logged: ``tensorboard``, ``wandb``."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.precision not in {"auto", "32-true", "bf16-mixed", "16-mixed"}:
            raise ModeclipError(
                f"train.engine.precision must be auto, 32-true, bf16-mixed or 16-mixed, got {self.precision!r}"
            )
        if self.micro_batch != "auto" and self.micro_batch < 0:
            raise ModeclipError(f"train.engine.micro_batch must be auto or at least 0, got {self.micro_batch}")
        if self.workers < 0:
            raise ModeclipError(f"train.engine.workers must be at least 0, got {self.workers}")
        if self.keep_pictures_gb < 0:
            raise ModeclipError(f"train.engine.keep_pictures_gb must be at least 0, got {self.keep_pictures_gb}")
        for name in ("keep_checkpoints", "log_every"):
            if getattr(self, name) < 1:
                raise ModeclipError(f"train.engine.{name} must be at least 1, got {getattr(self, name)}")
        unknown_places = set(self.report_to) - {"tensorboard", "wandb"}
        if unknown_places:
            raise unknown("place in train.engine.report_to", min(unknown_places), ["tensorboard", "wandb"])
        self.save_interval()

    def save_interval(self) -> tuple[float, str]:
        """Return the number and the unit (``seconds``, ``steps`` or ``epochs``) of ``save_every``.

        Examples:
            >>> EngineConfig(save_every="30min").save_interval()
            (1800.0, 'seconds')
            >>> EngineConfig(save_every="1000steps").save_interval()
            (1000.0, 'steps')
        """
        match = re.fullmatch(r"(\d+(?:\.\d+)?) *(s|min|h|steps?|epochs?)", self.save_every)
        if match is None:
            raise ModeclipError(
                f"train.engine.save_every must be a number with s, min, h, steps or epochs, such as 30min or "
                f"1000steps, got {self.save_every!r}"
            )
        number, unit = float(match[1]), match[2]
        if unit in _SECONDS:
            return number * _SECONDS[unit], "seconds"
        unit = unit.removesuffix("s") + "s"
        if number < 1 or number != round(number):
            raise ModeclipError(f"train.engine.save_every must be a whole number of {unit}, got {self.save_every!r}")
        return number, unit


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How one model is trained."""

    model: str = "modeclip-icon"
    """Model specification: a name, ``name@pretrained_tag``, ``hf-hub:``, or the path of an open_clip model folder."""
    samples: int = 245_760
    """Samples that the dense model sees in its whole schedule of ``total_parts`` parts."""
    batch_size: int = 256
    """Pairs a step over all processes; every other pair of the batch is a negative (the paper: 32,768)."""
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
    clip_grad_norm: float = 0.0
    """Largest norm of the gradient, which is scaled down to it; 0: no limit (the paper)."""
    loss: Literal["clip", "siglip"] = "clip"
    """``clip``: softmax over the batch, both ways; ``siglip``: a sigmoid for every pair (arXiv 2303.15343)."""
    mask_same_captions: bool = False
    """Whether pairs with the same caption are left out of each other's negatives (the paper: not)."""
    seed: int = 0
    """Of the random start, of the order of the samples and of their augmentation."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """How pictures are varied."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """How the machine is used."""

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
        if not 0 <= self.warmup_fraction < 1:
            raise ModeclipError(f"train.warmup_fraction must lie in [0, 1), got {self.warmup_fraction}")
        if self.clip_grad_norm < 0:
            raise ModeclipError(f"train.clip_grad_norm must be at least 0, got {self.clip_grad_norm}")

    @property
    def steps_per_part(self) -> int:
        """Optimizer steps in one part of the schedule."""
        return self.samples // (self.batch_size * self.total_parts)


def job_name(role: Role, index: int | None = None) -> str:
    """Return the name of a model of a run, which is also the name of its folder.

    Examples:
        >>> job_name("seed"), job_name("expert", 3)
        ('seed', 'expert-3')
    """
    return role if index is None else f"{role}-{index}"


def role_of(name: str) -> tuple[Role, int | None]:
    """Return the role and the index that a model's name stands for; job files and results of old runs have no others.

    Examples:
        >>> role_of("one-step-3"), role_of("dense-total"), role_of("expert-birds"), role_of("my-model")
        (('one-step', 3), ('dense-total', None), ('prior', None), ('single', None))
    """
    stem, _, number = name.rpartition("-")
    roles: dict[str, Role] = {role: role for role in get_args(Role)}
    if roles.get(stem) in MEMBER_ROLES:
        return (roles[stem], int(number)) if number.isdecimal() else ("prior" if stem == "expert" else "single", None)
    if name.startswith("expert-"):
        return "prior", None
    return (roles[name] if name in {"seed", "dense", "dense-total"} else "single"), None


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """One model to be trained: everything that decides the result, and where it goes."""

    name: str
    """Name of the model: ``seed``, ``dense``, ``expert-0``..."""
    role: Role = "single"
    """What the model is for."""
    index: int | None = None
    """Number of the expert, or of a control's member; None for the other roles."""
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
    """Folder of the finished job, or checkpoint (``.pt``) of open_clip_train, that this one continues, with its
    optimizer state; None: the model's own start."""
    start_digest: str = ""
    """Digest of that job, or SHA-256 of that checkpoint."""
    where: Mapping[str, int] = field(default_factory=dict)
    """Columns of the catalog and their values: only such rows, for example ``{"expert": 3}``; empty: all rows."""
    mask: str | None = None
    """Column of booleans: only the rows that it marks; None: no such limit."""
    out_of_cluster_fraction: float = 0.0
    """Share of the rows outside ``where`` that the model sees too, in [0, 1]."""
    threads: int = 1
    """Threads that compute; part of the digest, since another number sums in another order."""

    @property
    def digest(self) -> str:
        """Hash of all that decides the result, not of where it is written."""
        return sha256(json.dumps(self.deciding(), sort_keys=True).encode()).hexdigest()[:16]

    def deciding(self) -> dict[str, Any]:
        """Return the fields that decide the result."""
        content = {key: value for key, value in asdict(self).items() if key not in UNHASHED_FIELDS}
        content["config"]["engine"] = {"precision": self.config.engine.precision}
        return content

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
            config = content["config"]
            engine = {**config["engine"], "report_to": tuple(config["engine"]["report_to"])}
            parts = {"augment": AugmentConfig(**config["augment"]), "engine": EngineConfig(**engine)}
            if "role" not in content:  # written before jobs had roles
                content["role"], content["index"] = role_of(content["name"])
            return cls(**{**content, "config": TrainConfig(**{**config, **parts})})
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
