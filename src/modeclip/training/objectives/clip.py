"""CLIP's objective: each image finds its caption among all captions of the batch, and each caption its image.

With p the softmax of the logits' rows and q that of their columns, the gradient is written out instead of recorded:

    dL/dlogits = (p + q) / 2B - I / B

With label smoothing e a pair's target is 1 - e for itself and e / n more for each of the n captions or images that it
is compared with, itself included, so that, with n_i for row i and n_j for column j,

    dL/dlogits = (p + q) / 2B - (1 - e) I / B - e (1 / n_i + 1 / n_j) / 2B

A process computes the rows of its own images (`modeclip.training.objectives.logits`) and needs from the others only
the logarithms of their columns' sums, which are B numbers.

Price: one product of b x B x D and two for the gradient. Rejected: a cross-entropy over rows and another over columns
with both sides gathered, as is usual; it takes twice the products and the communication.

Source: CLIP (arXiv 2103.00020, Fig. 3); label smoothing and negatives from one group as CLIP-MoE trains its experts
(arXiv 2409.19291, Sec. 3; the negatives are those of multistage contrastive learning).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from modeclip.training.objectives.logits import CHUNK_ELEMENTS, LogitGradient, LogitRows, gather
from modeclip.training.objectives.objective import CAPTION_IDS, Features, Objective, Settings


class Contrastive(Objective):
    """Softmax over the batch in both directions."""

    def __init__(self, settings: Settings) -> None:
        """Leave pairs with the same caption, or of other groups, out of the negatives if the settings say so."""
        self.uses_caption_ids = settings.mask_same_captions
        self.columns = (settings.groups,) if settings.groups else ()
        self._label_smoothing = settings.label_smoothing

    def loss(self, features: Features, targets: Mapping[str, Tensor]) -> Tensor:
        """Return this process's share of the loss."""
        return contrastive_loss(
            features.images,
            features.texts,
            features.scale,
            targets.get(CAPTION_IDS),
            groups=targets[self.columns[0]] if self.columns else None,
            label_smoothing=self._label_smoothing,
        )


def contrastive_loss(
    image_features: Float[Tensor, "b D"],
    text_features: Float[Tensor, "b D"],
    logit_scale: Tensor,
    caption_ids: Int[Tensor, " b"] | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
    *,
    groups: Int[Tensor, " b"] | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return CLIP's loss: cross-entropy of each image over all captions, and of each caption over all images.

    Under ``torch.distributed`` the arguments are this process's part of the batch, which is equally large in every
    process. The value is this process's share of the loss, and its gradient is scaled as `Objective.loss` asks for.

    Args:
        image_features: Unit vectors of the images.
        text_features: Unit vectors of their captions, in the same order.
        logit_scale: Factor on the cosines (already exponentiated).
        caption_ids: Numbers that are equal for equal captions. Such pairs are not each other's negatives. None: every
            other pair is a negative.
        chunk_elements: Number of logits in memory at once.
        groups: Numbers of which those of a pair and its negatives are equal. None: all pairs are of one group.
        label_smoothing: Share of a target that is spread evenly over the pair and its negatives, in [0, 1).
    """
    inputs = (image_features, text_features, logit_scale)
    loss: Tensor = _ContrastiveFunction.apply(*inputs, caption_ids, groups, label_smoothing, chunk_elements)
    return loss


class _ContrastiveFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        texts: Tensor,
        scale: Tensor,
        ids: Tensor | None,
        groups: Tensor | None,
        smoothing: float,
        chunk_elements: int,
    ) -> Tensor:
        rows = LogitRows(images, texts, ids, chunk_elements, groups)
        scale_value, count = scale.detach(), len(rows.texts)
        row_sums = torch.empty(len(images), device=images.device)
        column_sums = torch.full((count,), -torch.inf, device=images.device)
        diagonal = torch.empty_like(row_sums)
        spread = smoothing / rows.num_candidates() if smoothing else None  # over a row, and over a column
        spread_logits = torch.zeros((), device=images.device)
        kept = None
        for part in rows.parts:
            logits = rows.logits(part, scale_value)
            row_sums[part] = logits.logsumexp(dim=1)
            diagonal[part] = rows.diagonal(logits, part)
            column_sums = torch.logaddexp(column_sums, logits.logsumexp(dim=0))
            if spread is not None:
                both = rows.of_images(spread)[part, None] + spread
                spread_logits += (both * logits.masked_fill(logits == -torch.inf, 0)).sum()
            kept = logits if len(rows.parts) == 1 else None
        if rows.world_size > 1:
            column_sums = gather(column_sums).view(rows.world_size, count).logsumexp(dim=0)
        own_columns = rows.of_images(column_sums)
        loss = ((row_sums + own_columns - 2 * (1 - smoothing) * diagonal).sum() - spread_logits) / (2 * count)
        if not any(ctx.needs_input_grad[:3]):
            return loss
        gradient = LogitGradient(rows)
        for part in rows.parts:
            logits = rows.logits(part, scale_value) if kept is None else kept
            weights = (logits - row_sums[part, None]).exp_().add_((logits - column_sums).exp_()).div_(2 * count)
            rows.diagonal(weights, part).sub_((1 - smoothing) / count)
            if spread is not None:
                both = rows.of_images(spread)[part, None] + spread
                weights -= both.masked_fill(logits == -torch.inf, 0).div_(2 * count)
            gradient.add(part, weights, scale_value)
        ctx.save_for_backward(*gradient.finish(scale))
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        images, texts, scale, _ = (grad * value for value in ctx.saved_tensors)
        return images, texts, scale, None, None, None, None
