"""A model and a batch -> the gradient of the batch's contrastive loss, in memory that a micro-batch decides.

The loss needs the features of all pairs at once, the towers do not. A *cached-gradient* step runs the towers over one
micro-batch after the other without keeping anything, takes the loss and its gradient for all features, then runs each
micro-batch again, keeps its activations this time, and passes them its features' gradient. The result is the gradient
of the whole batch; the price is one more forward pass. So the batch size is a matter of the method alone.

What is random in the towers (patch dropout) is seeded by step, process and micro-batch, so both passes agree and a
resumed job repeats it.

Source: Gao et al., "Scaling Deep Contrastive Learning TrainingBatch Size under Memory Limited Setup" (arXiv 2101.06983).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from modeclip.models.clip import Clip, encode_image, encode_text
from modeclip.system.devices import free_memory
from modeclip.training.batches import TrainingBatch
from modeclip.training.distributed import whole
from modeclip.training.jobs import TrainConfig

if TYPE_CHECKING:
    from lightning_fabric import Fabric

PROBE_SAMPLES = 4
"""Samples of the smaller of the two trial passes that say what a sample's activations take."""
MEMORY_SHARE = 0.6
"""Of the memory that is free, what a micro-batch's activations may take; the rest is for what is not kept."""
Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""Image features, text features, scale, bias, caption ids -> loss."""


class Towers(nn.Module):
    """Both towers as one module, so that what wraps modules (DDP, FSDP, precision) sees a single forward pass."""

    mean: Tensor
    std: Tensor

    def __init__(self, clip: Clip) -> None:
        super().__init__()
        self.model = clip.model
        visual = clip.model.visual
        self.register_buffer("mean", torch.tensor(visual.image_mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(visual.image_std).view(1, 3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the features of (b, 3, H, W) uint8 pictures and of tokens, the scale of the logits and their bias."""
        images = (pixels.float() / 255 - self.mean) / self.std
        features = encode_image(self.model, images).float(), encode_text(self.model, tokens).float()
        bias = getattr(self.model, "logit_bias", None)
        scale = self.model.logit_scale.exp()
        return *features, scale, torch.zeros_like(scale) if bias is None else bias.clone()


def backward(
    towers: Any, fabric: Fabric, batch: TrainingBatch, loss: Loss, *, micro_batch: int, seed: tuple[int, ...]
) -> Tensor:
    """Add the gradient of a batch's loss to the parameters' ``grad`` and return this process's share of the loss.

    Args:
        towers: ``Towers`` as Lightning Fabric set it up.
        fabric: Device, precision, processes.
        batch: This process's part of the batch, on the CPU: each micro-batch is moved when its turn comes, so that the
            device holds no more pictures than that.
        loss: Loss of the whole batch.
        micro_batch: Samples that go through the towers at once; all of them if it is at least their number.
        seed: Non-negative numbers that decide what is random in the towers.
    """
    count = len(batch.tokens)
    if micro_batch >= count:
        _seed([*seed, 0])
        images, texts, scale, bias = _encode(towers, fabric, batch, slice(0, count))
        value = loss(images, texts, scale, bias, batch.caption_ids.to(images.device))
        fabric.backward(value)
        return value.detach()
    parts = [slice(first, first + micro_batch) for first in range(0, count, micro_batch)]
    outputs = []
    with torch.no_grad():
        for index, part in enumerate(parts):
            _seed([*seed, index])
            outputs.append(_encode(towers, fabric, batch, part))
    images, texts = (torch.cat([output[side] for output in outputs]).requires_grad_() for side in (0, 1))
    scale, bias = (outputs[0][side].clone().requires_grad_() for side in (2, 3))
    del outputs
    value = loss(images, texts, scale, bias, batch.caption_ids.to(images.device))
    inputs = (images, texts, scale, bias)
    gradients = torch.autograd.grad(value, inputs, allow_unused=True)
    grads = [torch.zeros_like(x) if grad is None else grad for x, grad in zip(inputs, gradients, strict=True)]
    for index, part in enumerate(parts):
        _seed([*seed, index])
        with fabric.no_backward_sync(towers, enabled=index < len(parts) - 1):
            output = _encode(towers, fabric, batch, part)
            own = (grads[0][part], grads[1][part], grads[2] / len(parts), grads[3] / len(parts))
            products: list[Tensor] = [(x * grad).sum() for x, grad in zip(output, own, strict=True)]
            fabric.backward(torch.stack(products).sum())
    return value.detach()


def finish_gradient(
    towers: Any, fabric: Fabric, optimizer: Any, limit: float, *, sharded: bool, looks: bool
) -> Tensor | None:
    """Scale a gradient down to the largest norm that is allowed; return the norm that it had, or None.

    Args:
        towers: As in ``backward``.
        fabric: As in ``backward``.
        optimizer: As Lightning Fabric set it up.
        limit: Largest norm; 0: any.
        sharded: Whether each process has a part of the weights only; then numbers (the logit scale), which are not
            split, still have the gradient of this process alone.
        looks: Whether the norm is wanted anyway.
    """
    parameters = [value for value in towers.parameters() if value.grad is not None]
    for value in parameters if sharded else ():
        if value.ndim == 0:
            value.grad = fabric.all_reduce(value.grad, reduce_op="mean")
    if not (limit or looks):
        return None
    limit = limit or math.inf
    if not sharded:
        norm: Any = fabric.clip_gradients(towers, optimizer, max_norm=limit, error_if_nonfinite=False)
        return torch.as_tensor(norm)
    norm = torch.stack([whole(value.grad.norm()) for value in parameters]).norm()
    if limit < norm:
        for value in parameters:
            value.grad.mul_(limit / norm)
    return torch.as_tensor(norm)


def make_optimizer(parameters: Mapping[str, nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """Return AdamW with the field's settings: decay on matrices alone."""
    groups: list[dict[str, Any]] = [
        {"params": values, "weight_decay": config.weight_decay if dimensions >= 2 else 0.0}
        for dimensions in (2, 1, 0)  # numbers apart from vectors: split models do not split them
        if (values := [value for value in parameters.values() if min(value.ndim, 2) == dimensions])
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), eps=1e-6, fused=True)


def find_micro_batch(towers: Any, fabric: Fabric, batch: TrainingBatch, processes_here: int) -> int:
    """Return how many samples fit into the towers at once: a power of two, or the whole part of the batch.

    The activations that two trial passes keep are counted, so nothing has to fail to find out.

    Args:
        towers: As in ``backward``.
        fabric: As in ``backward``.
        batch: Samples to try.
        processes_here: Processes that share the memory.
    """
    count = len(batch.tokens)
    small, large = min(PROBE_SAMPLES, count), min(2 * PROBE_SAMPLES, count)
    if small == large:
        return count
    first, second = (_bytes_kept(towers, fabric, batch, samples) for samples in (small, large))
    a_sample = max(1.0, (second - first) / (large - small))
    fitting = max(1, int((MEMORY_SHARE * free_memory(fabric.device) / processes_here - first) / a_sample))
    found = count if fitting >= count else 1 << (fitting.bit_length() - 1)
    return int(fabric.all_reduce(torch.tensor(-found, device=fabric.device), reduce_op="max").neg())  # type: ignore[union-attr]


def _encode(towers: Any, fabric: Fabric, batch: TrainingBatch, part: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run a part of a batch through the towers, on the device."""
    images, tokens = batch.images[part], batch.tokens[part]
    output: tuple[Tensor, Tensor, Tensor, Tensor] = towers(
        images.to(fabric.device, non_blocking=True), tokens.to(fabric.device, non_blocking=True)
    )
    return output


def _bytes_kept(towers: Any, fabric: Fabric, batch: TrainingBatch, samples: int) -> int:
    """Return the bytes of the tensors that a forward pass keeps for the backward pass."""
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        output = _encode(towers, fabric, batch, slice(0, samples))
    del output
    return sum(kept.values())


def _seed(numbers: Sequence[int]) -> None:
    """Seed PyTorch's random streams by a few numbers."""
    value = 0
    for number in numbers:
        value = (value * 0x9E3779B97F4A7C15 + number + 1) % (1 << 63)
    torch.manual_seed(value)
