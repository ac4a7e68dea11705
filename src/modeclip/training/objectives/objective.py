"""The seam between the trainer and what it minimises: what the trainer asks, and what it hands over.

A step runs both towers over a batch, micro-batch by micro-batch where memory asks for it, and collects their features.
`Objective.loss` is a function of these features alone, so the trainer can take its gradient for all features of the
batch first and pass it through the towers afterwards (`modeclip.training.gradients`). What a loss needs besides the
features are its targets: numbers that the catalog holds for each pair, or the output of another model on the same
pictures, as in distillation. They are made once a step, without a gradient.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, runtime_checkable

from modeclip.errors import ModeclipError, unknown

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from modeclip.data.catalog import Catalog
    from modeclip.models.clip import LogitStart

MAX_LOG_SCALE = math.log(100)
"""Upper limit of the logarithm of the logits' scale (CLIP, Sec. 2.5)."""
DISTILLING = ("reinforced", "affinity", "kl", "icl", "mse")
"""Losses of a student and its teachers, which may be summed (`modeclip.training.objectives.distillation`)."""
SUMS = {"clip-kd": {"clip": 1.0, "icl": 1.0, "kl": 1.0, "mse": 2000.0}}
"""Names of sums (CLIP-KD, arXiv 2307.12732, and the weights of its code)."""
TEACHER_PARTS = ("images", "texts", "weights")
"""What the columns of a teacher hold of each pair: K D numbers, K D numbers, K numbers."""
COMPARE_VECTORS = frozenset({"icl", "mse"})
"""Losses for which the student needs as many dimensions as its teachers."""
CAPTION_IDS = "caption_ids"
"""Name of the numbers among a batch's extras that are equal for equal captions."""


@dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """A process's part of the samples of one step."""

    images: Tensor
    """(b, 3, H, W) uint8; with ``train.engine.keep_trunk`` what the frozen trunk gave for them, (b, T, W)."""
    tokens: Tensor
    """(b, context_length) int64."""
    extras: dict[str, Tensor] = field(default_factory=dict)
    """What the objective reads besides, by name, a row for each sample: (b,) or (b, ...)."""
    texts: Tensor | None = None
    """(b, T, W) what the frozen trunk gave for the captions. None: the images are pictures."""
    places: Tensor | None = None
    """(b,) place of each pair among the job's rows. None: no trunk is kept."""
    fresh: Tensor | None = None
    """(b,) whether the images hold a pair's picture: not where the trunk's output is kept already."""


class Features(NamedTuple):
    """What the towers make of a process's part of a batch."""

    images: Tensor
    """(b, D) unit vectors of the images."""
    texts: Tensor
    """(b, D) unit vectors of their captions, in the same order."""
    scale: Tensor
    """Factor on the cosines, already exponentiated."""
    bias: Tensor
    """Added to the logits; 0 in a model that has no bias."""
    routing: Tensor
    """(blocks, sums) what the losses of a CLIP-MoE's routers need of this part of the batch
    (`modeclip.models.moe.router_sums`); (0,) of a plain CLIP. No objective looks at it."""


@runtime_checkable
class Settings(Protocol):
    """The fields of `TrainConfig` that choose an objective and are its settings."""

    @property
    def loss(self) -> str:
        """Name of the objective."""
        ...

    @property
    def teacher(self) -> str | None:
        """Name of the columns with teachers' vectors, without ``_images`` and so on."""
        ...

    @property
    def mask_same_captions(self) -> bool:
        """Whether pairs with the same caption are left out of each other's negatives."""
        ...

    @property
    def groups(self) -> str | None:
        """Column of numbers; only pairs with the same number are each other's negatives."""
        ...

    @property
    def label_smoothing(self) -> float:
        """Share of each target that is spread over the pair and its negatives."""
        ...


def parse_loss(text: str) -> dict[str, float]:
    """Return the weight of each loss of a sum, which consists of ``clip`` and of `DISTILLING`.

    Args:
        text: Names, each with a number before it where its weight is not 1.

    Raises:
        ModeclipError: A name is unknown or occurs twice, or a weight is no number above 0.

    Examples:
        >>> parse_loss("reinforced"), parse_loss("clip+0.5*affinity")
        ({'reinforced': 1.0}, {'clip': 1.0, 'affinity': 0.5})
        >>> parse_loss("clip-kd")
        {'clip': 1.0, 'icl': 1.0, 'kl': 1.0, 'mse': 2000.0}
    """
    if text in SUMS:
        return dict(SUMS[text])
    found: dict[str, float] = {}
    for term in text.split("+"):
        number, _, name = term.rpartition("*")
        name = name.strip()
        if name not in {"clip", *DISTILLING}:
            if "+" in text:
                raise unknown(f"part of train.loss {text!r}", name, ["clip", *DISTILLING])
            raise unknown("train.loss", name, ["clip", "siglip", *DISTILLING, *SUMS])
        try:
            weight = float(number) if number else 1.0
        except ValueError:
            weight = math.nan
        if not 0 < weight < math.inf or name in found:
            problem = f"{name} twice" if name in found else f"the weight {number.strip()!r} of {name}"
            raise ModeclipError(
                f"train.loss {text!r}: expected each name once, with a number above 0 before it where its weight is not"
                f" 1 (clip+0.5*affinity), got {problem}"
            )
        found[name] = weight
    return found


def teacher_columns(stem: str) -> tuple[str, str, str]:
    """Return the names of the columns that hold what teachers make of the pairs.

    Examples:
        >>> teacher_columns("teacher_1a2b")
        ('teacher_1a2b_images', 'teacher_1a2b_texts', 'teacher_1a2b_weights')
    """
    images, texts, weights = (f"{stem}_{part}" for part in TEACHER_PARTS)
    return images, texts, weights


def check_dimensions(losses: Mapping[str, float], student: int, teacher: int) -> None:
    """Raise if a loss compares vectors of a student and a teacher that differ in length."""
    if student != teacher and (wrong := COMPARE_VECTORS & losses.keys()):
        raise ModeclipError(
            f"train.loss {'+'.join(losses)}: {' and '.join(sorted(wrong))} compare vectors, and the student's have "
            f"{student:,} numbers, the teacher's {teacher:,}; take reinforced, affinity or kl, which compare "
            "similarities, or a student with the teacher's embed_dim"
        )


class Objective(ABC):
    """What a training step minimises; a subclass gives at least `loss`."""

    logit_start: ClassVar[LogitStart | None] = None
    """Scale and bias that the logits of a model without a bias get. None: the model stays as it is."""
    columns: tuple[str, ...] = ()
    """Columns of the catalog with numbers for each pair that the batch's ``extras`` shall hold."""
    vector_columns: tuple[str, ...] = ()
    """Columns with arrays for each pair that they shall hold as well. Their names tell what made them, so nobody reads
    them to know whether they have changed."""
    uses_caption_ids: bool = False
    """Whether they shall hold `CAPTION_IDS` too."""

    def __init__(self, settings: Settings) -> None:  # noqa: B027
        """Take what it needs from the settings; models that it needs are loaded by `open`."""

    def open(self, device: torch.device, catalog: Catalog) -> None:  # noqa: B027  (most have nothing to load)
        """Load what the targets are made with, once before the first step.

        Args:
            device: Where the model is.
            catalog: Catalog of the pairs.
        """

    def targets(self, batch: TrainingBatch, device: torch.device) -> Mapping[str, Tensor]:
        """Return what the loss compares the features with, a row for each sample of the batch, on the device.

        It is called once a step without recording a gradient. By default the targets are the batch's extras.

        Args:
            batch: This process's part of the batch, on the CPU.
            device: Where the model is.
        """
        return {name: values.to(device) for name, values in batch.extras.items()}

    @abstractmethod
    def loss(self, features: Features, targets: Mapping[str, Tensor]) -> Tensor:
        """Return this process's share of the loss of the whole batch.

        With several processes the shares add up to the loss, while the gradient of a share is scaled so that the
        average over the processes is the gradient of the loss: averaging is what ddp and fsdp do.

        Args:
            features: Features of this process's part of the batch; it may differ from them by another process's part.
            targets: As `targets` returned them.
        """

    def limit(self, model: Any) -> None:
        """Bring numbers of the model back into their range after the optimizer's step; called without a gradient."""
        model.logit_scale.clamp_(0, MAX_LOG_SCALE)

    def values(self, model: Any) -> dict[str, float]:
        """Return what the log says of the model besides the loss."""
        return {"logit_scale": round(float(model.logit_scale.detach().exp()), 4)}
