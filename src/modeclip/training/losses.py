"""Features of a batch's images and captions -> the contrastive loss and its gradient, over all processes.

Every other pair of the *global* batch is a negative. A process holds b of the B pairs; it gathers the captions'
features (B x D), computes the b rows of the B x B logits that belong to its images, and needs from the others only the
logarithms of their columns' sums (B numbers). So no product is computed twice, and the gradient equals that of one
process with the whole batch: averaged over processes, as DDP and FSDP do, it is the gradient of the global loss.

The gradient is written out instead of recorded: with p the row softmax and q the column softmax of the logits,

    dL/dlogits = (p + q) / 2B - I / B,

so the logits are visited in chunks of rows, twice when there is more than one, and B x B is never in memory.

Price: one product of b x B x D and two for the gradient, and some chunks of 16 MiB. Rejected: a cross-entropy over rows
and one over columns with both sides gathered, as is usual: twice the products and the communication.

Source: CLIP (arXiv 2103.00020, Fig. 3), SigLIP (arXiv 2303.15343, Alg. 1); splitting the loss into row blocks as in
DisCo-CLIP (arXiv 2304.08480).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812  (the name that PyTorch's own documents use)
from jaxtyping import Float, Int
from torch import Tensor

CHUNK_ELEMENTS = 1 << 22
"""Logits in a chunk (16 MiB in float32; three or four such blocks are in memory at once)."""


def contrastive_loss(
    image_features: Float[Tensor, "b D"],
    text_features: Float[Tensor, "b D"],
    logit_scale: Tensor,
    caption_ids: Int[Tensor, " b"] | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Tensor:
    """Return CLIP's loss: cross-entropy of each image over all captions, and of each caption over all images.

    Under ``torch.distributed`` the arguments are this process's part of the batch, equally large in all of them; the
    value is this process's share of the loss (their sum is the loss), and its gradient is scaled so that the average
    over processes is that of the loss.

    Args:
        image_features: Unit vectors of the images.
        text_features: Unit vectors of their captions, in the same order.
        logit_scale: Factor on the cosines (already exponentiated).
        caption_ids: Equal for equal captions: then such pairs are no negatives of each other; None: they are.
        chunk_elements: Logits that are in memory at once.
    """
    loss: Tensor = _Contrastive.apply(image_features, text_features, logit_scale, caption_ids, chunk_elements)
    return loss


def sigmoid_loss(
    image_features: Float[Tensor, "b D"],
    text_features: Float[Tensor, "b D"],
    logit_scale: Tensor,
    logit_bias: Tensor,
    caption_ids: Int[Tensor, " b"] | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Tensor:
    """Return SigLIP's loss: every pair of image and caption is a yes-or-no question, their sum is divided by B.

    Args:
        image_features: Unit vectors of the images.
        text_features: Unit vectors of their captions, in the same order.
        logit_scale: Factor on the cosines (already exponentiated).
        logit_bias: Added to the logits; starts at -10, since nearly all pairs are negatives.
        caption_ids: As in ``contrastive_loss``.
        chunk_elements: As in ``contrastive_loss``.
    """
    arguments = (image_features, text_features, logit_scale, logit_bias, caption_ids, chunk_elements)
    loss: Tensor = _Sigmoid.apply(*arguments)
    return loss


class _Contrastive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, images: Tensor, texts: Tensor, scale: Tensor, ids: Tensor | None, chunk_elements: int
    ) -> Tensor:
        rows = _Rows(images, texts, ids, chunk_elements)
        scale_value, count = scale.detach(), len(rows.texts)
        row_sums = torch.empty(len(images), device=images.device)
        column_sums = torch.full((count,), -torch.inf, device=images.device)
        diagonal = torch.empty_like(row_sums)
        kept = None
        for part in rows.parts:
            logits = rows.logits(part, scale_value)
            row_sums[part] = logits.logsumexp(dim=1)
            diagonal[part] = rows.diagonal(logits, part)
            column_sums = torch.logaddexp(column_sums, logits.logsumexp(dim=0))
            kept = logits if len(rows.parts) == 1 else None
        if rows.world_size > 1:
            column_sums = _gather(column_sums).view(rows.world_size, count).logsumexp(dim=0)
        own_columns = column_sums[rows.offset : rows.offset + len(images)]
        loss = (row_sums + own_columns - 2 * diagonal).sum() / (2 * count)
        if not any(ctx.needs_input_grad[:3]):
            return loss
        gradient = _Gradient(rows)
        for part in rows.parts:
            logits = rows.logits(part, scale_value) if kept is None else kept
            weights = (logits - row_sums[part, None]).exp_().add_((logits - column_sums).exp_()).div_(2 * count)
            rows.diagonal(weights, part).sub_(1 / count)
            gradient.add(part, weights, scale_value)
        ctx.save_for_backward(*gradient.finish(scale))
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        images, texts, scale, _ = (grad * value for value in ctx.saved_tensors)
        return images, texts, scale, None, None


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, ids: Tensor | None, chunk_elements: int
    ) -> Tensor:
        rows = _Rows(images, texts, ids, chunk_elements)
        scale_value, bias_value, count = scale.detach(), bias.detach(), len(rows.texts)
        loss = torch.zeros((), device=images.device)
        gradient = _Gradient(rows)
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
        return images, texts, scale, bias.view(ctx.bias_shape), None, None


class _Rows:
    """The rows of the logits that belong to this process's images, in chunks."""

    def __init__(self, images: Tensor, texts: Tensor, ids: Tensor | None, chunk_elements: int) -> None:
        distributed = dist.is_available() and dist.is_initialized()
        self.world_size = dist.get_world_size() if distributed else 1
        self.offset = dist.get_rank() * len(images) if distributed else 0
        self.images = images.detach()
        self.texts = _gather(texts.detach()) if self.world_size > 1 else texts.detach()
        self._ids = ids
        self._all_ids = _gather(ids) if ids is not None and self.world_size > 1 else ids
        step = max(1, chunk_elements // len(self.texts))
        self.parts = [slice(first, min(first + step, len(images))) for first in range(0, len(images), step)]

    def logits(self, part: slice, scale: Tensor) -> Tensor:
        """Return the scaled cosines of some images with all captions; -inf for other pairs of an equal caption."""
        logits = (scale * self.images[part]) @ self.texts.T
        if self._ids is not None and self._all_ids is not None:
            same = self._ids[part, None] == self._all_ids
            self.diagonal(same, part).fill_(False)
            logits.masked_fill_(same, -torch.inf)
        return logits

    def diagonal(self, block: Tensor, part: slice) -> Tensor:
        """Return a view of the entries of a block of rows that belong to the positives."""
        return block.diagonal(self.offset + part.start)[: len(block)]


class _Gradient:
    """Gradients of features, scale and bias, summed over the chunks of ``dL/dlogits``."""

    def __init__(self, rows: _Rows) -> None:
        self._rows = rows
        self._images = torch.empty_like(rows.images)
        self._texts = torch.zeros_like(rows.texts)
        self._bias = torch.zeros((), device=rows.images.device)

    def add(self, part: slice, weights: Tensor, scale: Tensor) -> None:
        """Take in ``dL/dlogits`` of some rows."""
        self._images[part] = scale * (weights @ self._rows.texts)
        self._texts.addmm_(weights.T, scale * self._rows.images[part])
        self._bias += weights.sum()

    def finish(self, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the gradients of this process's images and captions, of the scale and of the bias."""
        rows = self._rows
        # sum of weights * cosines, without the cosines: each image's gradient is scale * (weights @ texts)
        of_scale = ((self._images * rows.images).sum() / scale.detach()).view(scale.shape)
        texts = self._texts
        if rows.world_size > 1:
            dist.all_reduce(texts)
            texts = texts[rows.offset : rows.offset + len(rows.images)].contiguous()
        factor = rows.world_size  # what averages over processes later divides by it
        return self._images * factor, texts * factor, of_scale * factor, self._bias * factor


def _gather(tensor: Tensor) -> Tensor:
    """Return the tensors of all processes, one behind the other."""
    gathered = tensor.new_empty((dist.get_world_size() * len(tensor), *tensor.shape[1:]))
    dist.all_gather_into_tensor(gathered, tensor.contiguous())
    return gathered
