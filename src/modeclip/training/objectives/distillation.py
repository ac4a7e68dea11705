"""Distillation: a student learns what its teachers see in a batch, from vectors that were computed once and kept.

There are K teachers: one CLIP, or the experts of a mixture. Of each pair i the catalog holds the unit vectors of its
plain picture I_ik and caption T_ik by each of them, and weights w_ik that sum to 1 over k: 1 / K for an ensemble, those
of the routing for a mixture. s_k is teacher k's own logit scale. I, T and s are the student's, and P its softmaxes

    P_ij = softmax_j(s I_i T_j)        P'_ij = softmax_i(s I_i T_j)

so a row of P says which caption belongs to image i, a column of P' which image belongs to caption j. ``train.loss`` is
a sum of the losses below, each with a weight (``clip+icl+kl+2000*mse``):

    reinforced   Of teachers' softmaxes, averaged after the softmax, each with its own scale, weighed by the pair:
                     Q_ij = sum_k w_ik softmax_j(s_k I_ik T_jk)     Q'_ij = sum_k w_jk softmax_i(s_k I_ik T_jk)
                     loss = 1/2 [CE(Q, P) + CE(Q', P')],   CE(Q, P) = -1/B sum_ij Q_ij log P_ij
                 Source: MobileCLIP (arXiv 2311.17049, Sec. 3), where teachers have equal weights.
    affinity     Of one softmax of the mixture as one CLIP, averaged before it:
                     A_ij = sum_k w_jk s_k I_ik T_jk      (w_ik where the clusters are of images)
                     loss = 1/2 [CE(softmax_j A, P) + CE(softmax_i A, P')]
                 Source: TinyCLIP (arXiv 2309.12314, Sec. 3.1, affinity mimicking), which adds the directions up.
    kl           The same less the entropy of the teacher, so that its least value is 0; the gradient is affinity's.
                 Source: CLIP-KD (arXiv 2307.12732, contrastive relational distillation), with temperature 1.
    icl          A student's vector against those of the other modality by each teacher:
                     loss = sum_k 1/B sum_i w_ik 1/2 [-log softmax_j(s I_i T_jk)_i - log softmax_j(s T_i I_jk)_i]
                 Source: CLIP-KD (interactive contrastive learning), whose code has a factor of its own for s.
    mse          How far the vectors lie from the teachers', a mean over B pairs and D numbers:
                     loss = sum_k 1/(B D) sum_i w_ik (|I_i - I_ik|^2 + |T_i - T_ik|^2)
                 Source: CLIP-KD (feature distillation).

``clip-kd`` stands for CLIP-KD's sum, ``clip+icl+kl+2000*mse``. icl and mse compare vectors, so the student needs as
many dimensions as its teachers (CLIP-KD learns a projection where they differ; here the others are for that). The clip
in a sum is `modeclip.training.objectives.clip` with all its settings; captions that are the same, and groups, are kept
apart by it alone.

The teachers have seen plain pictures, the student sees augmented ones. MobileCLIP keeps vectors of several augmented
pictures and shows the student those, CLIP-KD runs the teacher beside the student. Here a crop must leave in a picture
what its teachers saw, as ``train.augment.min_crop_share`` 0.9 does.

A process computes the rows of its own images (`modeclip.training.objectives.logits`), the teachers' too, and needs from
the others their teachers' text vectors and the logarithms of columns' sums.

Price: for each teacher two products of b x B x D, in chunks, and reading 4 K D bytes a pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from modeclip.errors import ModeclipError
from modeclip.training.objectives.clip import Contrastive
from modeclip.training.objectives.logits import CHUNK_ELEMENTS, LogitGradient, LogitRows, gather
from modeclip.training.objectives.objective import (
    Features,
    Objective,
    Settings,
    TrainingBatch,
    check_dimensions,
    parse_loss,
    teacher_columns,
)

if TYPE_CHECKING:
    from modeclip.data.catalog import Catalog


@dataclass(frozen=True, kw_only=True)
class Teachers:
    """What K teachers make of this process's part of a batch."""

    images: Float[Tensor, "b K D"]
    """Unit vectors of the plain pictures."""
    texts: Float[Tensor, "b K D"]
    """Unit vectors of the captions."""
    weights: Float[Tensor, "b K"]
    """Weight of each teacher for each pair; they sum to 1."""
    scales: tuple[float, ...]
    """Factor on the cosines of each teacher, already exponentiated."""
    weighs_images: bool = False
    """Whether weights belong to images and not to captions, which matters to `as_one` alone."""

    def as_one(self) -> Teachers:
        """Return the mixture as one teacher, whose logits are the weighted sums of the teachers' logits."""
        scales = torch.tensor(self.scales, dtype=self.images.dtype, device=self.images.device)
        weighted = (self.weights * scales)[:, :, None]
        images = self.images * weighted if self.weighs_images else self.images
        texts = self.texts if self.weighs_images else self.texts * weighted
        return Teachers(
            images=images.flatten(1)[:, None],
            texts=texts.flatten(1)[:, None],
            weights=torch.ones_like(self.weights[:, :1]),
            scales=(1.0,),
        )


class Distillation(Objective):
    """A sum of the losses above, and of ``clip``."""

    def __init__(self, settings: Settings) -> None:
        """Take the losses and their weights; the teachers' vectors are columns of the catalog."""
        self._losses = parse_loss(settings.loss)
        self._stem = str(settings.teacher)
        self.vector_columns = teacher_columns(self._stem)
        self._clip = Contrastive(settings)
        if "clip" in self._losses:
            self.columns, self.uses_caption_ids = self._clip.columns, self._clip.uses_caption_ids

    def open(self, device: torch.device, catalog: Catalog) -> None:  # noqa: ARG002
        """Read from the catalog which teachers made the vectors.

        Raises:
            ModeclipError: The columns hold something else.
        """
        facts = catalog.facts(self.vector_columns[0]) or {}
        try:
            self._scales = tuple(float(scale) for scale in facts["scales"])
            self._weighs_images = bool(facts["weighs_images"])
        except (KeyError, TypeError, ValueError):
            raise ModeclipError(
                f"train.teacher: column {self.vector_columns[0]!r} of {catalog.path!r} was not made by a teacher, or is"
                " damaged; give modeclip distill again, which makes it and names it"
            ) from None

    def targets(self, batch: TrainingBatch, device: torch.device) -> Mapping[str, Tensor]:
        """Return the batch's extras, numbers that were stored with 16 bits with 32."""
        found = super().targets(batch, device)
        return {name: value.float() if name in self.vector_columns else value for name, value in found.items()}

    def loss(self, features: Features, targets: Mapping[str, Tensor]) -> Tensor:
        """Return this process's share of the sum."""
        images, texts, weights = (targets[name] for name in self.vector_columns)
        shape = (len(weights), len(self._scales), -1)
        teachers = Teachers(
            images=images.view(shape),
            texts=texts.view(shape),
            weights=weights,
            scales=self._scales,
            weighs_images=self._weighs_images,
        )
        check_dimensions(self._losses, features.images.shape[1], teachers.images.shape[2])
        student = (features.images, features.texts, features.scale)
        total = torch.zeros((), device=features.images.device)
        for name, weight in self._losses.items():
            if name == "clip":
                value = self._clip.loss(features, targets)
            elif name == "icl":
                value = interactive_loss(*student, teachers)
            elif name == "mse":
                value = feature_loss(features.images, features.texts, teachers)
            else:
                one = teachers if name == "reinforced" else teachers.as_one()
                value = soft_contrastive_loss(*student, one, less_entropy=name == "kl")
            total = total + weight * value
        return total


def soft_contrastive_loss(
    image_features: Float[Tensor, "b D"],
    text_features: Float[Tensor, "b D"],
    logit_scale: Tensor,
    teachers: Teachers,
    *,
    less_entropy: bool = False,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Tensor:
    """Return 1/2 [CE(Q, P) + CE(Q', P')] with the teachers' weighted softmaxes Q, as at the top of this module.

    Its least value is the entropy of Q and Q', where P = Q and P' = Q'. Value and gradient are what `Objective.loss`
    asks for.

    Args:
        image_features: Unit vectors of the student's images.
        text_features: Unit vectors of their captions, in the same order.
        logit_scale: The student's factor on the cosines (already exponentiated).
        teachers: Vectors, weights and scales of the teachers for the same pairs.
        less_entropy: Take the entropy away, which makes it a Kullback-Leibler divergence. The gradient is the same.
        chunk_elements: Number of logits in memory at once, of the student and of each teacher in turn.
    """
    inputs = (image_features, text_features, logit_scale)
    loss: Tensor = _SoftFunction.apply(*inputs, teachers, less_entropy, chunk_elements)
    return loss


class _SoftFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        texts: Tensor,
        scale: Tensor,
        teachers: Teachers,
        less_entropy: bool,
        chunk_elements: int,
    ) -> Tensor:
        rows, scale_value = LogitRows(images, texts, None, chunk_elements), scale.detach()
        row_sums, column_sums = _log_sums(rows, scale_value)
        targets = _SoftTargets(teachers, chunk_elements)
        count = len(rows.texts)
        loss = torch.zeros((), device=images.device)
        gradient = LogitGradient(rows)
        for part in rows.parts:
            logits = rows.logits(part, scale_value)
            pairs = zip(targets.of(part), (logits - row_sums[part, None], logits - column_sums), strict=True)
            weights = torch.zeros_like(logits)
            for target, log_probability in pairs:
                loss -= (target * log_probability).sum()
                if less_entropy:
                    loss += torch.xlogy(target, target).sum()
                weights += log_probability.exp_().sub_(target)
            gradient.add(part, weights.div_(2 * count), scale_value)
        ctx.save_for_backward(*gradient.finish(scale))
        return loss / (2 * count)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        images, texts, scale, _ = (grad * value for value in ctx.saved_tensors)
        return images, texts, scale, None, None, None


class _SoftTargets:
    """The teachers' weighted softmaxes, a block of rows at a time."""

    def __init__(self, teachers: Teachers, chunk_elements: int) -> None:
        self._weights = teachers.weights
        self._teachers = []
        for k, scale in enumerate(teachers.scales):
            rows = LogitRows(teachers.images[:, k], teachers.texts[:, k], None, chunk_elements)
            factor = rows.images.new_tensor(scale)
            self._teachers.append((rows, factor, *_log_sums(rows, factor)))
        self._all_weights = gather(self._weights) if self._teachers[0][0].world_size > 1 else self._weights

    def of(self, part: slice) -> tuple[Tensor, Tensor]:
        """Return the targets Q and Q' of some images with all captions."""
        shape = (part.stop - part.start, len(self._all_weights))
        of_rows, of_columns = self._weights.new_zeros(shape), self._weights.new_zeros(shape)
        for k, (rows, scale, row_sums, column_sums) in enumerate(self._teachers):
            logits = rows.logits(part, scale)
            of_rows += (logits - row_sums[part, None]).exp_().mul_(self._weights[part, k, None])
            of_columns += (logits - column_sums).exp_().mul_(self._all_weights[:, k])
        return of_rows, of_columns


def _log_sums(rows: LogitRows, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return logsumexp of each of this process's rows of logits, and of each of all columns."""
    count = len(rows.texts)
    row_sums = torch.empty(len(rows.images), device=rows.images.device)
    column_sums = torch.full((count,), -torch.inf, device=rows.images.device)
    for part in rows.parts:
        logits = rows.logits(part, scale)
        row_sums[part] = logits.logsumexp(dim=1)
        column_sums = torch.logaddexp(column_sums, logits.logsumexp(dim=0))
    if rows.world_size > 1:
        column_sums = gather(column_sums).view(rows.world_size, count).logsumexp(dim=0)
    return row_sums, column_sums


def interactive_loss(
    image_features: Float[Tensor, "b D"],
    text_features: Float[Tensor, "b D"],
    logit_scale: Tensor,
    teachers: Teachers,
    *,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Tensor:
    """Return icl as at the top of this module; arguments and result as for `soft_contrastive_loss`.

    Logits are computed again in the backward pass, so those of one chunk are in memory at a time.
    """
    total, world_size, count = torch.zeros((), device=image_features.device), 1, len(image_features)
    for k in range(len(teachers.scales)):
        for own, others in ((image_features, teachers.texts[:, k]), (text_features, teachers.images[:, k])):
            rows = LogitRows(own, others, None, chunk_elements)
            world_size, count = rows.world_size, len(rows.texts)
            labels = torch.arange(rows.offset, rows.offset + len(own), device=own.device)
            for part in rows.parts:
                weighed = (own[part], rows.texts, logit_scale, labels[part], teachers.weights[part, k])
                total = total + checkpoint(_weighed_entropy, *weighed, use_reentrant=False, preserve_rng_state=False)
    return _as_share(total / (2 * count), world_size)


def _weighed_entropy(own: Tensor, others: Tensor, scale: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sum of the cross-entropies of some vectors over all those of the other modality."""
    return weights @ torch.nn.functional.cross_entropy((scale * own) @ others.T, labels, reduction="none")


def feature_loss(
    image_features: Float[Tensor, "b D"], text_features: Float[Tensor, "b D"], teachers: Teachers
) -> Tensor:
    """Return mse as at the top of this module; arguments and result as for `soft_contrastive_loss`."""
    squares = (image_features[:, None] - teachers.images).square() + (text_features[:, None] - teachers.texts).square()
    world_size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    value = (teachers.weights * squares.mean(dim=2)).sum() / (world_size * len(image_features))
    return _as_share(value, world_size)


def _as_share(value: Tensor, world_size: int) -> Tensor:
    """Return a process's part of a sum with the gradient that is that of the whole once processes average it."""
    return value + (world_size - 1) * (value - value.detach())
