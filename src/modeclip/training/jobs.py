"""A training job: the settings of one model, its part of the schedule, its rows, and the folder that it is trained in.

A job takes one model from one step of a schedule to another. The seed model runs from 0 to 27 of 32 parts. A data
expert continues from the seed's last checkpoint, optimizer state included, through the rest of the SAME schedule on its
own cluster. Its learning rate therefore goes on falling to 0 (in the paper from 5.96 % of the highest rate) and does
not start again.

A folder belongs to one job. The job continues from its own checkpoints there; a job with other settings is an error
that names what differs, so nothing is overwritten by mistake.

Source: MoDE Sec. 3.3 and 4.2, and the settings of its released code.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, get_args

from modeclip.data.selection import ALL, Selection
from modeclip.errors import LIMIT, DamagedError, ModeclipError, check_above_zero, check_between, check_least, unknown
from modeclip.models.checkpoints import checkpoint_files
from modeclip.system.console import log
from modeclip.system.files import FileNote, find_damage, holder_of, read_json, remove, write_json
from modeclip.training.objectives import losses_of
from modeclip.training.objectives.objective import DISTILLING

AUTO = "auto"
"""What stands for a model that the pairs decide (`modeclip.training.choosing`)."""
TRAINABLE = ("all", "ffn", "last:N", "routers", "added")
"""What a training may be limited to; N is a number of blocks."""
RATE, TUNING_RATE = 1e-3, 1e-5
"""Default learning rates from random weights, for towers of minutes, and from trained ones (FLYP: 1e-5)."""
MOST_PROCESSES = 4096
"""Most threads or processes that a setting may ask for; no machine has more cores."""
_SECONDS = {"s": 1, "min": 60, "h": 3600}

Role = Literal["seed", "dense", "dense-total", "expert", "random", "full", "one-step", "prior", "single"]
"""What a model is for: the seed; the dense model that continues it, or the one that costs as much as the mixture; the
expert of a cluster; a member of a control mixture; the expert of some class names (prior); a model by itself."""
MEMBER_ROLES: tuple[Role, ...] = ("expert", "random", "full", "one-step")
"""Roles of which a run has one model for each expert; their jobs have an index."""
JOB_FILE, LOG_FILE, DONE_FILE = "job.json", "log.jsonl", "done.json"
"""Files of a job's folder: what to do, a line of numbers every few steps, and the record that is written last."""
TRUNK_FOLDER = "trunk"
"""Folder of a job's folder with what its frozen blocks gave, while it trains."""
ERRORS_FILE = "errors.txt"
"""What a job's process has printed, kept only when the job fails."""
UNHASHED_FIELDS = frozenset({"folder", "start_from", "catalog", "role", "index"})
"""Fields of a job that do not decide its result and so are not part of its digest."""
SELECTING_FIELDS = frozenset({"name", "catalog_fingerprint", "where", "mask", "selection", "out_of_cluster_fraction"})
"""Fields that say how a job's pairs are found. Where the pairs themselves are known, they decide nothing more."""
LATER_FIELDS: dict[str, Any] = {
    "probability": None,
    "captions": None,
    "teacher": None,
    "groups": None,
    "label_smoothing": 0.0,
    "trainable": "all",
    "balance_loss": 0.01,
    "router_z_loss": 0.0,
}
"""Fields of a training that earlier versions did not have; at these values, digests are as they were."""
CONSEQUENCES = (
    "first_step", "last_step", "first_share", "last_share", "start_digest", "pairs", "catalog_fingerprint"
)  # fmt: skip
"""Fields that follow from other settings. They are named as a difference only where those are the same."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How training pictures are varied at random, with the names and defaults of open_clip's ``image_transform``."""

    min_crop_share: float = 0.9
    """Smallest share of a picture's area that a random crop keeps, in (0, 1]. 1 crops nothing (open_clip: 0.9)."""
    color_jitter: float = 0.0
    """Strength of changes in brightness, contrast and saturation, and at a quarter of it in hue, in [0, 1]."""
    color_jitter_probability: float = 0.8
    """Share of the pictures whose colours are changed, in [0, 1]; it matters only with a ``color_jitter`` above 0."""
    grayscale_probability: float = 0.0
    """Share of the pictures that lose their colours, in [0, 1]."""
    patch_dropout: float = 0.0
    """Share of the patches that the image tower leaves out while training, in [0, 1) (FLIP, arXiv 2212.00794)."""

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
    """How the machine is used. Only ``precision`` changes the model by more than rounding."""

    precision: str = "auto"
    """``32-true``, ``bf16-mixed`` or ``16-mixed``, as Lightning Fabric names them. ``auto`` takes bf16 where it is
    fast, else 32 bits."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """What each process holds under torchrun or Slurm: a copy of the model (ddp) or a part of it (fsdp)."""
    micro_batch: int | Literal["auto"] = 0
    """Samples that a process runs through the towers at once. 0 takes its whole share of the batch, ``auto`` as many
    as fit into memory. The gradient is the same."""
    grad_checkpointing: bool = False
    """Save memory by computing activations again in the backward pass."""
    workers: int = 0
    """Processes that read and decode pictures ahead of the training. 0 uses two threads of the training process."""
    keep_pictures_gb: float = 1.0
    """Memory in 10^9 bytes for decoded pictures. They are kept if all of a job's fit and ``workers`` is 0; 0 decodes
    them anew in every pass."""
    keep_trunk: bool = False
    """With ``train.trainable`` ``last:N`` and no augmentation: keep what the frozen blocks give for each pair on disk,
    in the job's folder while it trains, so that they run once for a pair and not in every pass."""
    save_every: str = "auto"
    """Time, steps or passes over the pairs between two checkpoints: ``30min``, ``1000steps``, ``1epoch``. ``auto``: a
    fiftieth of the job's time, within 20 s and 30 min, and at least 20 times what a checkpoint takes."""
    keep_checkpoints: int = 1
    """Number of newest checkpoints that are kept, at least 1."""
    log_every: int = 10
    """Steps between two lines of the log."""
    report_to: tuple[str, ...] = ()
    """Where the log goes besides the job's folder: ``tensorboard``, ``wandb``."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.precision not in {"auto", "32-true", "bf16-mixed", "16-mixed"}:
            raise ModeclipError(
                f"train.engine.precision must be auto, 32-true, bf16-mixed or 16-mixed, got {self.precision!r}"
            )
        if self.micro_batch != "auto" and not 0 <= self.micro_batch < LIMIT:
            raise ModeclipError(f"train.engine.micro_batch must be auto or at least 0, got {self.micro_batch}")
        check_least("train.engine", self, keep_pictures_gb=0, keep_checkpoints=1, log_every=1)
        check_between("train.engine", self, workers=(0, MOST_PROCESSES))
        unknown_places = set(self.report_to) - {"tensorboard", "wandb"}
        if unknown_places:
            raise unknown("place in train.engine.report_to", min(unknown_places), ["tensorboard", "wandb"])
        self.save_interval()

    def save_interval(self) -> tuple[float, str]:
        """Return the number and the unit (``seconds``, ``steps``, ``epochs``, or ``auto``) of ``save_every``.

        Examples:
            >>> EngineConfig(save_every="30min").save_interval()
            (1800.0, 'seconds')
            >>> EngineConfig(save_every="1000steps").save_interval()
            (1000.0, 'steps')
        """
        if self.save_every == "auto":
            return 0.0, "auto"
        match = re.fullmatch(r"(\d+(?:\.\d+)?) *(s|min|h|steps?|epochs?)", self.save_every)
        if match is None:
            raise ModeclipError(
                "train.engine.save_every must be auto, or a number with s, min, h, steps or epochs (30min, 1000steps), "
                f"got {self.save_every!r}"
            )
        number, unit = float(match[1]), match[2]
        if not 0 < number < LIMIT:
            raise ModeclipError(f"train.engine.save_every must be above 0, got {self.save_every!r}")
        if unit in _SECONDS:
            return number * _SECONDS[unit], "seconds"
        unit = unit.removesuffix("s") + "s"
        if number < 1 or number != round(number):
            raise ModeclipError(f"train.engine.save_every must be a whole number of {unit}, got {self.save_every!r}")
        return number, unit


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained."""

    model: str = AUTO
    """Model to train: a name, ``name@pretrained_tag``, ``hf-hub:...``, or the path of an open_clip model folder.
    ``auto`` takes the smallest of modeclip-icon, modeclip-small and ViT-B-32 that sees enough of the images and the
    captions, or the model of the job that is continued."""
    samples: int = 245_760
    """Samples that the seed and then the dense model see in a schedule of ``total_parts`` parts. A run trains on more:
    the experts, a dense model of the mixture's cost and the controls come to it (``modeclip run --plan`` adds up)."""
    batch_size: int = 256
    """Pairs in a step, over all processes. Every other pair of the batch is a negative (the paper: 32,768)."""
    total_parts: int = 32
    """Number of equal parts of the schedule (the paper: 32 epochs of 400 million samples)."""
    seed_parts: int = 27
    """Parts that the seed model trains on all data before the experts continue from it (the paper: 27)."""
    learning_rate: float | None = None
    """Highest learning rate, reached after the warm-up; then it falls to 0 by a cosine (the paper, ViT-B: 5e-4). By
    default 1e-3, and 1e-5 for a model that brings trained weights (a tag, a folder, the Hub), as in fine-tuning."""
    warmup_fraction: float = 0.04
    """Share of the schedule in which the learning rate rises linearly, in [0, 1)."""
    weight_decay: float = 0.2
    """AdamW's decay of matrices. Norms, biases and the logit scale do not decay (the paper: 0.2)."""
    clip_grad_norm: float = 0.0
    """Largest norm of the gradient; a longer one is scaled down to it. 0 sets no limit (the paper)."""
    loss: str = "clip"
    """What training minimises: ``clip``, a softmax over the batch in both directions; ``siglip``, a sigmoid for every
    pair (arXiv 2303.15343); or a sum of losses with a teacher, as for ``modeclip distill``."""
    teacher: str | None = None
    """Columns with a teacher's vectors, by their name before ``_images``; ``modeclip distill`` makes them. None: the
    loss has no teacher."""
    probability: str | None = None
    """Column of numbers in [0, 1]. Every pass over the pairs reads each of them with its probability, drawn afresh.
    None: every pass reads every pair."""
    captions: str | None = None
    """Column of texts that stand in the place of the captions where it has one. None: the captions as they are."""
    mask_same_captions: bool = False
    """Do not count pairs with the same caption as each other's negatives (the paper does)."""
    groups: str | None = None
    """Column of whole numbers: only pairs with the same number are each other's negatives, and batches are of one
    number as far as its pairs fill them. No pass leaves a pair out. None: every other pair is a negative."""
    trainable: str = "all"
    """What training changes: ``all``; ``ffn``, the feed-forward layers of both towers; ``last:N``, the last N blocks of
    both with the norms and projections behind; of a CLIP-MoE ``routers``, or ``added``: the routers and every expert
    but the first. In a run it holds for experts and their controls; the seed and the dense models train whole."""
    label_smoothing: float = 0.0
    """Share of each target that is spread evenly over the pair itself and its negatives, in [0, 1)."""
    balance_loss: float = 0.01
    """Weight of a loss that is 1 where the routers of a CLIP-MoE choose all experts alike, and more elsewhere (its
    paper: 0.01). A plain CLIP has none."""
    router_z_loss: float = 0.0
    """Weight of the mean of logsumexp(logits)^2 of a CLIP-MoE's routers, which keeps their logits small (FlexOlmo:
    0.001)."""
    seed: int = 0
    """Seed of the random start, of the order of the samples and of their augmentation."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """How pictures are varied."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """How the machine is used."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        losses = losses_of(self.loss)
        distils = not losses.keys().isdisjoint(DISTILLING)
        if distils and self.teacher is None:
            raise ModeclipError(
                f"train.loss {self.loss} compares with a teacher and train.teacher is not set; give modeclip distill, "
                "which makes a teacher's columns, or their name"
            )
        if self.teacher is not None and not distils:
            raise ModeclipError(
                f"train.loss {self.loss} has no teacher, got train.teacher {self.teacher}; leave it out, or set "
                "train.loss to reinforced"
            )
        if not 2 <= self.batch_size < LIMIT:
            raise ModeclipError(f"train.batch_size must be at least 2 (a pair needs a negative), got {self.batch_size}")
        check_least("train", self, samples=1, total_parts=2, weight_decay=0, clip_grad_norm=0, seed=0)
        check_least("train", self, balance_loss=0, router_z_loss=0)
        check_above_zero("train", self, "learning_rate")
        if self.highest_rate * self.weight_decay >= 1:
            raise ModeclipError(
                f"train.weight_decay: expected below 1 / train.learning_rate, here {1 / self.highest_rate:g}, since "
                f"a step takes learning_rate * weight_decay of the weights away, got {self.weight_decay:g}"
            )
        check_trainable("train.trainable", self.trainable)
        if self.engine.keep_trunk:
            self._check_keeps_trunk()
        if not 0 <= self.label_smoothing < 1:
            raise ModeclipError(f"train.label_smoothing must lie in [0, 1), got {self.label_smoothing}")
        if self.label_smoothing and "clip" not in losses:
            raise ModeclipError(
                f"train.label_smoothing is for train.loss clip, got {self.label_smoothing} with {self.loss}; "
                "set it to 0"
            )
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

    def _check_keeps_trunk(self) -> None:
        """Raise unless the same blocks are frozen all the time and see the same pictures."""
        if not self.trainable.startswith("last:"):
            raise ModeclipError(
                "train.engine.keep_trunk keeps what the frozen blocks of train.trainable last:N give, got "
                f"train.trainable {self.trainable}; set it to last:N, or leave keep_trunk out"
            )
        augment = self.augment
        jitter = augment.color_jitter if augment.color_jitter_probability else 0.0
        values = {"min_crop_share": 1 - augment.min_crop_share, "color_jitter": jitter}
        values |= {name: getattr(augment, name) for name in ("grayscale_probability", "patch_dropout")}
        if wrong := [name for name, value in values.items() if value]:
            plain = 1 if wrong[0] == "min_crop_share" else 0
            raise ModeclipError(
                "train.engine.keep_trunk needs the same pictures in every pass, got "
                f"train.augment.{wrong[0]} {getattr(augment, wrong[0])}; set it to {plain}, or leave keep_trunk out"
            )

    @property
    def depth(self) -> int | None:
        """Blocks behind the trunk that is kept; None where none is."""
        return int(self.trainable.removeprefix("last:")) if self.engine.keep_trunk else None

    @property
    def highest_rate(self) -> float:
        """The highest learning rate, given or by default.

        Examples:
            >>> TrainConfig().highest_rate, TrainConfig(model="ViT-B-32@laion2b_s34b_b79k").highest_rate
            (0.001, 1e-05)
        """
        if self.learning_rate is not None:
            return self.learning_rate
        return TUNING_RATE if brings_weights(self.model) else RATE

    def decided(self) -> TrainConfig:
        """Return the same settings with the learning rate written out, as jobs keep it."""
        return replace(self, learning_rate=self.highest_rate)

    def plain(self) -> dict[str, Any]:
        """Return the fields as JSON, without those that earlier versions did not have where they say nothing."""
        content = asdict(self)
        return {name: value for name, value in content.items() if LATER_FIELDS.get(name, ...) != value}

    @property
    def steps_per_part(self) -> int:
        """Optimizer steps in one part of the schedule."""
        return self.samples // (self.batch_size * self.total_parts)


def check_trainable(name: str, value: str) -> None:
    """Raise unless a setting of this name says what a training may be limited to."""
    if not re.fullmatch("|".join(TRAINABLE).replace("N", r"[1-9]\d{0,3}"), value):
        raise unknown(name, value, TRAINABLE)


def brings_weights(model: str) -> bool:
    """Tell whether a model's specification names trained weights.

    Examples:
        >>> brings_weights("ViT-B-32"), brings_weights("ViT-B-32@openai"), brings_weights("hf-hub:org/name")
        (False, True, True)
    """
    return "@" in model or model.startswith(("hf-hub:", "local-dir:")) or Path(model).expanduser().is_dir()


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
    """Number of the expert, or of the control's member; None for roles that have one model."""
    folder: str
    """Folder of the job's files."""
    catalog: str
    """Path of the catalog."""
    catalog_fingerprint: str
    """Hash of the catalog's pairs and of their clustering when the job was planned."""
    config: TrainConfig
    """Model, optimizer and batches."""
    first_step: int
    """Step of the schedule at which this job starts."""
    last_step: int
    """Step of the schedule at which it ends."""
    first_share: float
    """Share of the learning-rate schedule that is done at the first step, in [0, 1)."""
    last_share: float
    """Share of it that is done at the last step; a schedule ends at 1."""
    start_from: str | None = None
    """Folder of the finished job, or checkpoint (``.pt``) of open_clip_train, that this one continues with its
    optimizer state. None: it starts from the model as the specification gives it."""
    start_digest: str = ""
    """Digest of that job, or SHA-256 of that checkpoint."""
    where: Mapping[str, int | float | str | bool] = field(default_factory=dict)
    """Values that columns of the catalog must have in the job's rows, such as ``{"expert": 3}``. Empty: all rows."""
    mask: str | None = None
    """Column of booleans that marks the rows which may be used. None: all of them."""
    selection: Selection = ALL
    """What the user selected: no other row is used, whatever ``where`` and ``mask`` of the model say."""
    out_of_cluster_fraction: float = 0.0
    """Share of the rows outside ``where`` that the model sees too, in [0, 1]."""
    pairs: str = ""
    """Hash of the pairs that it trains on and of what else it reads (`modeclip.training.experts.pin_jobs`): the job is
    stale when they change, and not when the clustering changes around them. Empty in jobs of earlier versions, which
    ``catalog_fingerprint`` makes stale."""
    threads: int = 1
    """Threads that compute. Another number sums in another order, so it is part of the digest."""

    @property
    def digest(self) -> str:
        """Hash of what decides the result; where the job is written plays no part."""
        return sha256(json.dumps(self.deciding(), sort_keys=True).encode()).hexdigest()[:16]

    def deciding(self) -> dict[str, Any]:
        """Return the fields that decide the result."""
        without = UNHASHED_FIELDS | (SELECTING_FIELDS if self.pairs else {"pairs"})
        content = {key: value for key, value in asdict(self).items() if key not in without}
        if self.selection.is_all:
            content.pop("selection", None)
        content["config"] = self.config.plain() | {
            "engine": {"precision": self.config.engine.precision},
            "learning_rate": self.config.highest_rate,
        }
        return content

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step of the job."""
        done = (step - self.first_step) / (self.last_step - self.first_step)
        return learning_rate_at(self.first_share + done * (self.last_share - self.first_share), self.config)

    def save(self) -> Path:
        """Write the job into its folder and return the file's path."""
        path = Path(self.folder) / JOB_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(self), indent=2)
        return path

    @classmethod
    def load(cls, path: Path) -> TrainJob:
        """Read a job file.

        Raises:
            DamagedError: It is no job file.
        """
        remedy = "give the command that trains this model again, which writes it anew"
        remedy = f"delete it and {remedy}" if path.exists() else f"correct the path, or {remedy}"
        content = read_json(path, dict[str, Any], remedy)
        try:
            config = content["config"]
            engine = {**config["engine"], "report_to": tuple(config["engine"]["report_to"])}
            parts = {"augment": AugmentConfig(**config["augment"]), "engine": EngineConfig(**engine)}
            content["selection"] = Selection.of(content.get("selection", {}))
            if "role" not in content:  # written before jobs had roles
                content["role"], content["index"] = role_of(content["name"])
            return cls(**{**content, "config": TrainConfig(**{**config, **parts})})
        except ModeclipError as error:
            raise DamagedError(f"{path}: {error}; {remedy}") from error
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise DamagedError(f"{path}: no job of this version ({error}); {remedy}") from error


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a finished job leaves in ``done.json``."""

    digest: str
    """Digest of the job."""
    samples: int
    """Samples that this job has trained on, without those of the job that it continues."""
    rows: int
    """Rows of the catalog that the samples were drawn from."""
    seconds: float
    """Wall time of the last run of the job."""
    files: Mapping[str, FileNote] = field(default_factory=dict)
    """The files of the model, and the checkpoints, as they were written; none where an earlier version wrote them."""

    @classmethod
    def read(cls, job: TrainJob) -> TrainResult | None:
        """Return the result of a job; None if it is not finished, was made from other inputs, or is damaged."""
        try:
            result = read_json(Path(job.folder) / DONE_FILE, cls, "")
        except DamagedError:
            return None
        return result if result.digest == job.digest and not find_job_damage(job) else None


def find_job_damage(job: TrainJob) -> dict[Path, str]:
    """Return the damaged files of a finished job, with what is wrong with each.

    A checkpoint that is missing is no damage: a finished model needs none, unless another job continues it.
    """
    folder, done = Path(job.folder), Path(job.folder) / DONE_FILE
    if not done.exists():
        return {}
    try:
        result = read_json(done, TrainResult, "")
    except DamagedError as error:
        return {done: str(error).removeprefix(f"{done}: ").removesuffix("; ")}
    found = {folder / name: find_damage(folder / name, note) for name, note in result.files.items()}
    return {path: what for path, what in found.items() if what and (path.parent == folder or path.exists())}


def remove_damage(job: TrainJob) -> None:
    """Remove what is damaged of a finished job, so that training it again makes that anew, with the same bytes."""
    if damage := find_job_damage(job):
        for path, what in damage.items():
            log(f"{path}: {what}; it is made anew from the last whole checkpoint, or from the start of {job.name}")
            remove(path)
        remove(Path(job.folder) / DONE_FILE)


def learning_rate_at(share: float, config: TrainConfig) -> float:
    """Return the learning rate after a share of the schedule: a linear warm-up, then a cosine that falls to 0.

    Args:
        share: Part of the schedule that is done, in [0, 1].
        config: Highest rate and warm-up.

    Examples:
        The paper's experts start at 5.96 % of the highest rate (warm-up: 2,000 of 390,625 steps):

        >>> config = TrainConfig(learning_rate=1.0, warmup_fraction=2000 / 390_625)
        >>> round(learning_rate_at(27 / 32, config), 4)
        0.0596
    """
    warmup = config.warmup_fraction
    if share < warmup:
        return config.highest_rate * share / warmup
    return config.highest_rate * 0.5 * (1 + math.cos(math.pi * (share - warmup) / (1 - warmup)))


def prepare(job: TrainJob, resume: str = "latest") -> None:
    """Make a job's folder fit for it.

    Args:
        job: What is to be trained.
        resume: ``latest`` lets the job continue from its own checkpoints; ``never`` removes what is in the folder;
            ``stale`` removes what another job has trained.

    Raises:
        ModeclipError: The folder holds what another job has trained.
    """
    folder = Path(job.folder)
    before = TrainJob.load(folder / JOB_FILE) if resume != "never" and (folder / JOB_FILE).is_file() else None
    differs = before is not None and before.digest != job.digest
    if resume == "never" or (resume == "stale" and differs):
        for path in (*checkpoint_files(folder), folder / LOG_FILE, folder / DONE_FILE, folder / ERRORS_FILE):
            path.unlink(missing_ok=True)
        shutil.rmtree(folder / TRUNK_FOLDER, ignore_errors=True)
    elif before is not None and differs and (checkpoint_files(folder) or (folder / DONE_FILE).is_file()):
        raise ModeclipError(
            f"{folder} holds a model that was trained with other settings: {', '.join(changes(before, job))}; "
            "give the same settings, or --resume never to train anew (train-experts: --resume stale keeps what still "
            "fits), or another folder"
        )


def check_free(job: TrainJob) -> None:
    """Raise if another process is at work on another job in a job's folder; one with the same job can be waited for.

    Raises:
        ModeclipError: There is one, or the folder's job file is damaged.
    """
    folder = Path(job.folder)
    if (holder := holder_of(folder)) is None or not (folder / JOB_FILE).is_file():
        return
    before = TrainJob.load(folder / JOB_FILE)
    if before.digest != job.digest:
        raise ModeclipError(
            f"{folder}: {holder} is training with other settings in this folder: {', '.join(changes(before, job))}; "
            "wait for it, stop it, or choose another"
        )


def changes(before: TrainJob, job: TrainJob) -> list[str]:
    """Return the differences between two jobs that decide the result, a few words each."""
    old, new = (
        one.deciding() | {"where": one.where, "mask": one.mask, "selection": asdict(one.selection)}
        for one in (before, job)
    )
    return settings_changes(old, new)


def settings_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the differences between two settings, a few words each.

    Examples:
        >>> settings_changes({"top_k": 2, "augment": {"patch_dropout": 0.5}}, {"top_k": 2, "augment": {}})
        ['augment.patch_dropout was 0.5, now None']
    """
    old, new = _flat(before), _flat(now)
    different = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    causes = [name for name in different if name not in CONSEQUENCES] or different
    return [f"{name} was {old.get(name)!r}, now {new.get(name)!r}" for name in causes]


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in content.items():
        name = f"{prefix}{key}".removeprefix("config.")
        found |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found
