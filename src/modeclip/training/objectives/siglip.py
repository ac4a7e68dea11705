"""SigLIP's objective: every pair of an image and a caption of the batch is a yes-or-no question of its own.

The logits get a bias, which starts at -10 because nearly all pairs are negatives. The loss needs no sums over rows or
columns, so it is less sensitive to the size of the batch than a softmax.

Price: one product of b x B x D and two for the gradient, in one pass over the logits.

Source: SigLIP (arXiv 2303.15343, Alg. 1 and Sec. 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (the name that PyTorch's own documents use)
from jaxtyping import Float, Int
from torch import Tensor

from modeclip.models.clip import LogitStart
from modeclip.training.objectives.logits import CHUNK_ELEMENTS, LogitGradient, LogitRows
from modeclip.training.objectives.objective import CAPTION_IDS, Features, Objective, Settings


class Sigmoid(Objective):
    """A sigmoid for every pair of the batch."""

    logit_start = LogitStart(log_scale=math.log(10), bias=-10.0)

    def __init__(self, settings: Settings) -> None:
        """Leave pairs with the same caption, or of other groups, out of the negatives if the settings say so."""
        self.uses_caption_ids = settings.mask_same_captions
        self.columns = (settings.groups,) if settings.groups else ()

    def loss(self, features: Features, targets: Mapping[str, Tensor]) -> Tensor:
        """Return this process's share of the loss."""
        groups = targets[self.columns[0]] if self.columns else None
        return sigmoid_loss(*features[:4], targets.get(CAPTION_IDS), groups=groups)


def sigmoid_loss(
    image_features: Float[Tensor, "b D"],
    text_features: Float[Tensor, "b D"],
    logit_scale: Tensor,
    logit_bias: Tensor,
    caption_ids: Int[Tensor, " b"] | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
    *,
    groups: Int[Tensor, " b"] | None = None,
) -> Tensor:
    """Return SigLIP's loss: the sum over all pairs of an image and a caption, divided by B.

    Args:
        image_features: Unit vectors of the images.
        text_features: Unit vectors of their captions, in the same order.
        logit_scale: Factor on the cosines (already exponentiated).
        logit_bias: Number that is added to the logits.
        caption_ids: As in ``contrastive_loss``.
        chunk_elements: As in ``contrastive_loss``.
        groups: As in ``contrastive_loss``.
    """
    arguments = (image_features, text_features, logit_scale, logit_bias, caption_ids, groups, chunk_elements)
    loss: Tensor = _SigmoidFunction.apply(*arguments)
    return loss


class _SigmoidFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        texts: Tensor,
        scale: Tensor,
        bias: Tensor,
        ids: Tensor | None,
        groups: Tensor | None,
        chunk_elements: int,
    ) -> Tensor:
        rows = LogitRows(images, texts, ids, chunk_elements, groups)
        scale_value, bias_value, count = scale.detach(), bias.detach(), len(rows.texts)
        loss = torch.zeros((), device=images.device)
        gradient = LogitGradient(rows)
        for part in rows.parts:
            logits = rows.logits(part, scale_value) + bias_value
            rows.diagonal(logits, part).neg_()  # a positive's question is asked the other way round
            loss = loss + F.softplus(logits).sum() / count
            weights = logits.sigmoid_().div_(count)
            rows.diagonal(weights, part).neg_()
            gradient.add(part, weights, scale_value)
        ctx.save_for_backward(*gradient.finish(scale))
        ctx.bias_shape = bias.shape  # open_clip has models with a bias of shape [1]
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        images, texts, scale, bias = (grad * value for value in ctx.saved_tensors)
        return images, texts, scale, bias.view(ctx.bias_shape), None, None, None
