"""The gradient of a whole batch's loss, in as little memory as a micro-batch takes.

The loss needs the features of all pairs at once, the towers do not. A *cached-gradient* step first runs the towers over
one micro-batch after the other and keeps the features alone. It takes the loss and its gradient with respect to
all features, then runs each micro-batch again, keeps the activations this time, and passes the features' gradient back
through them. The result is the gradient of the whole batch, so the batch size is chosen for the method and not for the
memory.

The losses of a CLIP-MoE's routers are those of the whole batch too. They follow from sums over tokens, which the
micro-batches and the processes add up. Padding behind captions is left out of them: each part of a batch is cut to its
own longest caption.

What is random in the towers (patch dropout) is seeded by step, process and micro-batch, so both passes agree and a
resumed job repeats it.

Price: one more forward pass where a batch is taken in parts.

Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (arXiv 2101.06983).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from modeclip.models.clip import Clip, encode_image, encode_text
from modeclip.models.moe import moe_layers, router_losses, router_sums
from modeclip.models.trunk import split, tokens_read
from modeclip.system.devices import free_memory
from modeclip.training.distributed import whole
from modeclip.training.jobs import TrainConfig
from modeclip.training.objectives.objective import Features, Objective, TrainingBatch

if TYPE_CHECKING:
    from lightning_fabric import Fabric

PROBE_SAMPLES = 4
"""Samples of the smaller of two trial passes that measure what the activations of a sample take."""
MEMORY_SHARE = 0.6
"""Share of the free memory that a micro-batch's activations may take; the rest is for what is not kept."""


class Towers(nn.Module):
    """Both towers as one module, so that what wraps modules (DDP, FSDP, precision) sees a single forward pass."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, clip: Clip, *, balance_loss: float = 0.0, router_z_loss: float = 0.0, depth: int | None = None
    ) -> None:
        """Take a model.

        Args:
            clip: The model.
            balance_loss: Weight of the loss for balance of a CLIP-MoE's routers.
            router_z_loss: Weight of their z-loss.
            depth: How many of the last blocks may run by themselves, from what the trunk gave before. None: none.

        Raises:
            ModeclipError: A tower cannot be cut.
        """
        super().__init__()
        self._image = self._text = None
        if depth is not None:
            self._image, self._text = (split(clip.model, tower, depth) for tower in ("image", "text"))
        self.model = clip.model
        self.weights = balance_loss, router_z_loss
        self.is_moe = bool(moe_layers(clip.model))
        visual = clip.model.visual
        self.register_buffer("mean", torch.tensor(visual.image_mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(visual.image_std).view(1, 3, 1, 1), persistent=False)

    def run_trunks(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the (b, T, W) hidden states before the last blocks, of pictures and of their tokens."""
        assert self._image is not None
        assert self._text is not None
        return self._image[0](self._normed(pixels))[0], self._text[0](tokens)[0]

    def forward(
        self, pixels: Tensor, tokens: Tensor, texts: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the fields of `Features`.

        Args:
            pixels: (b, 3, H, W) uint8 pictures, or, with ``texts``, the hidden states that `run_trunks` gave for them.
            tokens: Their tokens.
            texts: What it gave for the tokens.
        """
        if texts is None:
            features = encode_image(self.model, self._normed(pixels)).float(), encode_text(self.model, tokens).float()
        else:
            assert self._image is not None
            assert self._text is not None
            tokens = tokens[:, : texts.shape[1]]
            features = self._image[1]((pixels,)).float(), self._text[1]((texts, tokens)).float()
        bias = getattr(self.model, "logit_bias", None)
        scale = self.model.logit_scale.exp()
        sums = router_sums(self.model, tokens_read(self.model, tokens)) if self.is_moe else scale.new_empty(0)
        return *features, scale, torch.zeros_like(scale) if bias is None else bias.clone(), sums

    def _normed(self, pixels: Tensor) -> Tensor:
        return (pixels.float() / 255 - self.mean) / self.std


def backward(
    towers: Any,
    fabric: Fabric,
    batch: TrainingBatch,
    objective: Objective,
    *,
    micro_batch: int,
    seed: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """Add the gradient of a batch's loss to the parameters' ``grad``.

    The losses of a CLIP-MoE's routers are part of the loss, with their weights.

    Args:
        towers: ``Towers`` as Lightning Fabric set it up.
        fabric: Device, precision, processes.
        batch: This process's part of the batch, on the CPU. Each micro-batch is moved to the device when its turn
            comes, so the device never holds the pictures of more than one.
        objective: What is minimised.
        micro_batch: Samples that go through the towers at once; all of them if it is at least their number.
        seed: Non-negative numbers that decide what is random in the towers.

    Returns:
        This process's share of the loss, and the sums of the whole batch's routers (`modeclip.models.moe.router_sums`),
        empty for a plain CLIP.
    """
    count, processes = len(batch.tokens), fabric.world_size
    with torch.no_grad():
        targets = objective.targets(batch, fabric.device)
    if micro_batch >= count:
        _seed([*seed, 0])
        features = _encode(towers, fabric, batch, slice(0, count))
        value = objective.loss(features, targets)
        sums = _over_processes(fabric, features.routing)
        penalty = _penalty(towers, sums)
        fabric.backward(value + processes * penalty)
        return value.detach() + penalty.detach() / processes, sums.detach()
    parts = [slice(first, first + micro_batch) for first in range(0, count, micro_batch)]
    outputs: list[Features] = []
    with torch.no_grad():
        for index, part in enumerate(parts):
            _seed([*seed, index])
            outputs.append(_encode(towers, fabric, batch, part))
    features = Features(
        images=torch.cat([output.images for output in outputs]).requires_grad_(),
        texts=torch.cat([output.texts for output in outputs]).requires_grad_(),
        scale=outputs[0].scale.clone().requires_grad_(),
        bias=outputs[0].bias.clone().requires_grad_(),
        routing=torch.stack([output.routing for output in outputs]).sum(dim=0).requires_grad_(),
    )
    del outputs
    value = objective.loss(features, targets)
    sums = _over_processes(fabric, features.routing)
    penalty = _penalty(towers, sums)
    found = torch.autograd.grad(value + processes * penalty, features, allow_unused=True)
    grads = Features(*(torch.zeros_like(x) if grad is None else grad for x, grad in zip(features, found, strict=True)))
    for index, part in enumerate(parts):
        _seed([*seed, index])
        with fabric.no_backward_sync(towers, enabled=index < len(parts) - 1):
            output = _encode(towers, fabric, batch, part)
            shares = (grad / len(parts) for grad in (grads.scale, grads.bias))
            own = (grads.images[part], grads.texts[part], *shares, grads.routing)
            products: list[Tensor] = [(x * grad).sum() for x, grad in zip(output, own, strict=True)]
            fabric.backward(torch.stack(products).sum())
    return value.detach() + penalty.detach() / processes, sums.detach()


def _over_processes(fabric: Fabric, sums: Tensor) -> Tensor:
    """Return the sums of all processes, with the gradient of this one's part."""
    if fabric.world_size == 1 or not sums.numel():
        return sums
    own = sums.detach()
    everywhere: Any = fabric.all_reduce(own.clone(), reduce_op="sum")
    added: Tensor = everywhere - own
    return sums + added


def _penalty(towers: Any, sums: Tensor) -> Tensor:
    """Return what the routers add to the loss of a batch with these sums."""
    if not sums.numel():
        return sums.sum()
    balance, z = router_losses(sums)
    penalty: Tensor = towers.weights[0] * balance + towers.weights[1] * z
    return penalty


def finish_gradient(
    towers: Any, fabric: Fabric, optimizer: Any, limit: float, *, sharded: bool, with_norm: bool
) -> Tensor | None:
    """Finish the gradient of a step: scale it down to the largest norm that is allowed.

    Args:
        towers: As in ``backward``.
        fabric: As in ``backward``.
        optimizer: As Lightning Fabric set it up.
        limit: Largest norm. 0 sets no limit.
        sharded: Whether each process has a part of the weights only. Single numbers (the logit scale) are not split
            then and still have the gradient of this process alone.
        with_norm: Whether the norm is wanted even without a limit.

    Returns:
        The norm before it was scaled, or None where it was not needed.
    """
    parameters = [value for value in towers.parameters() if value.grad is not None]
    for value in parameters if sharded else ():
        if value.ndim == 0:
            value.grad = fabric.all_reduce(value.grad, reduce_op="mean")
    if not (limit or with_norm):
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
    """Return AdamW with the settings that are usual for CLIP: decay on matrices alone."""
    groups: list[dict[str, Any]] = [
        {"params": values, "weight_decay": config.weight_decay if dimensions >= 2 else 0.0}
        for dimensions in (2, 1, 0)  # numbers apart from vectors: split models do not split them
        if (values := [value for value in parameters.values() if min(value.ndim, 2) == dimensions])
    ]
    return torch.optim.AdamW(groups, lr=config.highest_rate, betas=(0.9, 0.98), eps=1e-6, fused=True)


def find_micro_batch(towers: Any, fabric: Fabric, batch: TrainingBatch, processes_here: int) -> int:
    """Return how many samples fit through the towers at once: a power of two, or all of this process's part.

    Two trial passes count the bytes of their activations, so nothing has to run out of memory to find out.

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


def _encode(towers: Any, fabric: Fabric, batch: TrainingBatch, part: slice) -> Features:
    """Run a part of a batch through the towers, on the device."""
    given = [values for values in (batch.images, batch.tokens, batch.texts) if values is not None]
    return Features(*towers(*(values[part].to(fabric.device, non_blocking=True) for values in given)))


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
