"""The logits of a batch that is spread over processes, a chunk of rows at a time.

Every other pair of the *global* batch is a negative. A process holds b of the B pairs. It gathers the captions'
features (B x D) and computes the b rows of the B x B logits that belong to its images, so no product is computed twice.
The rows are visited in chunks; B x B numbers are never in memory.

A pair can be kept from being another's negative: where both have the same caption, which would be a false negative, or
where they are of different groups. The logit is -inf then, so that it plays no part in a loss or its gradient.

A loss over these logits returns its process's share, and a gradient that is that of one process with the whole batch
once it is averaged over the processes, as ddp and fsdp do.

Price: chunks of 16 MiB, three or four of them in memory at once.

Source: splitting the loss into row blocks as in DisCo-CLIP (arXiv 2304.08480).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_ELEMENTS = 1 << 22
"""Logits in a chunk: 16 MiB in float32."""


class LogitRows:
    """The rows of the logits that belong to this process's images, in chunks."""

    def __init__(
        self, images: Tensor, texts: Tensor, ids: Tensor | None, chunk_elements: int, groups: Tensor | None = None
    ) -> None:
        distributed = dist.is_available() and dist.is_initialized()
        self.world_size = dist.get_world_size() if distributed else 1
        self.offset = dist.get_rank() * len(images) if distributed else 0
        self.images = images.detach()
        self.texts = gather(texts.detach()) if self.world_size > 1 else texts.detach()
        self._ids, self._all_ids = ids, self._gathered(ids)
        self._groups, self._all_groups = groups, self._gathered(groups)
        step = max(1, chunk_elements // len(self.texts))
        self.parts = [slice(first, min(first + step, len(images))) for first in range(0, len(images), step)]

    def logits(self, part: slice, scale: Tensor) -> Tensor:
        """Return the scaled cosines of some images with all captions, -inf for pairs that are no negatives."""
        logits = (scale * self.images[part]) @ self.texts.T
        if self._ids is not None and self._all_ids is not None:
            same = self._ids[part, None] == self._all_ids
            self.diagonal(same, part).fill_(False)
            logits.masked_fill_(same, -torch.inf)
        if self._groups is not None and self._all_groups is not None:
            logits.masked_fill_(self._groups[part, None] != self._all_groups, -torch.inf)
        return logits

    def of_images(self, values: Tensor) -> Tensor:
        """Return the part of values of all pairs that belongs to this process's images."""
        return values[self.offset : self.offset + len(self.images)]

    def num_candidates(self) -> Tensor:
        """Return how many logits are left in each of all columns, and so in each row: a pair's own and its negatives'.

        They are counted by sorting, without B x B comparisons.
        """
        count = len(self.texts)
        in_group = torch.full((count,), count, device=self.texts.device)
        group = torch.zeros_like(in_group)
        if self._all_groups is not None:
            _, group, sizes = torch.unique(self._all_groups, return_inverse=True, return_counts=True)
            in_group = sizes[group]
        if self._all_ids is None:
            return in_group
        _, caption = torch.unique(self._all_ids, return_inverse=True)
        _, kind, sizes = torch.unique(group * count + caption, return_inverse=True, return_counts=True)
        found: Tensor = in_group - sizes[kind] + 1
        return found

    def _gathered(self, values: Tensor | None) -> Tensor | None:
        return gather(values) if values is not None and self.world_size > 1 else values

    def diagonal(self, block: Tensor, part: slice) -> Tensor:
        """Return a view of the positives in a block of rows."""
        return block.diagonal(self.offset + part.start)[: len(block)]


class LogitGradient:
    """Gradients of features, scale and bias, summed over the chunks of ``dL/dlogits``."""

    def __init__(self, rows: LogitRows) -> None:
        self._rows = rows
        self._images = torch.empty_like(rows.images)
        self._texts = torch.zeros_like(rows.texts)
        self._bias = torch.zeros((), device=rows.images.device)

    def add(self, part: slice, weights: Tensor, scale: Tensor) -> None:
        """Add ``dL/dlogits`` of some rows."""
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


def gather(tensor: Tensor) -> Tensor:
    """Return the tensors of all processes in one, in the order of the processes."""
    gathered = tensor.new_empty((dist.get_world_size() * len(tensor), *tensor.shape[1:]))
    dist.all_gather_into_tensor(gathered, tensor.contiguous())
    return gathered
