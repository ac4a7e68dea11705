"""How many floating-point operations a training sample costs, for any CLIP and length of captions.

PyTorch's own counter watches one sample go through the functions that training calls. It counts matrix products,
convolutions and attention in both towers, a multiplication and an addition each, so it works for every model that
open_clip has, and captions cost what they cost after their padding is cut. The backward pass takes two products for
each product of the forward pass, so a training sample counts as three forward passes. Where a training changes a part
of the model only (``train.trainable``), the counter watches its backward pass too: what is frozen has no product for
its weights, and what lies before the first part that is trained has none at all.

Not counted: normalisations, activations, softmax, the optimizer, the B x B similarities of a batch (2 * B * D a
sample, under 1 % of a tower), and the additional forward pass of gradient caching.

Source: Kaplan et al. (arXiv 2001.08361), Sec. 2.1, for the factor of three; OpenCLIP (arXiv 2212.07143) measures the
compute of its scaling laws likewise, operations a sample times samples seen.
Price: the model is built once and runs once on the CPU: tenths of a second for an icon model, seconds for ViT-L-14.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from modeclip.errors import ModeclipError
from modeclip.models.blocks import freeze
from modeclip.models.clip import encode_image, encode_text, load_clip
from modeclip.models.trunk import split

TRAINING_FACTOR = 3
"""Forward passes that a training sample is worth."""


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Floating-point operations of one sample."""

    image: int
    """Operations of the image tower's forward pass."""
    text: int
    """Operations of the text tower's forward pass."""
    backward: int
    """Operations of the backward pass of both towers, for what the training changes."""
    trunk: int = 0
    """Operations of the forward pass before the last blocks of ``last:N``, in towers that can be cut there."""

    @property
    def forward(self) -> int:
        """Return the operations of the forward pass of both towers."""
        return self.image + self.text

    @property
    def training(self) -> int:
        """Return the operations of a training sample, forward and backward."""
        return self.forward + self.backward


def count_flops(spec: str | Path, caption_length: int | None = None, *, trainable: str = "all") -> Flops:
    """Count the floating-point operations that one image-caption pair costs.

    Args:
        spec: A model specification (see ``clip``); its pretrained tag is ignored, since weights change nothing.
        caption_length: Tokens that the text tower sees, start and end of text included: those of the longest caption
            of a batch. None: its full context. A tower whose padding cannot be cut sees its full context in any case.
        trainable: What a training changes, as ``train.trainable`` says it.

    Raises:
        ModeclipError: The model is unknown or lacks what is to be trained, or a caption is longer than its context.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    name = str(spec) if Path(spec).exists() else str(spec).partition("@")[0]
    clip = load_clip(name, seed=0)  # what its weights are costs nothing
    tokens = torch.zeros_like(clip.tokens([""]))
    context = tokens.shape[1]
    length = context if caption_length is None else caption_length
    if not 2 <= length <= context:
        raise ModeclipError(f"caption length: expected 2 to {context} tokens for {spec}, got {length}")
    tokens[:, :length] = 1
    width, height = clip.image_size
    image = torch.zeros(1, 3, height, width)
    freeze(clip.model, trainable)
    found, backward, trunk = [], 0, 0
    # The counter does not see into fused kernels, which evaluation mode and other attention backends would use.
    with sdpa_kernel(SDPBackend.MATH):
        clip.model.train()
        for encode, batch in ((encode_image, image), (encode_text, tokens)):
            with FlopCounterMode(display=False) as counter:
                vectors = encode(clip.model, batch)
            found.append(int(counter.get_total_flops()))
            if trainable != "all" and vectors.requires_grad:
                with FlopCounterMode(display=False) as counter:
                    torch.autograd.backward([vectors.sum()])
                backward += int(counter.get_total_flops())
        if trainable.startswith("last:"):
            with FlopCounterMode(display=False) as counter, torch.no_grad(), suppress(ModeclipError):
                for tower, batch in (("image", image), ("text", tokens)):
                    split(clip.model, tower, int(trainable.removeprefix("last:")))[0](batch)  # type: ignore[arg-type]
            trunk = int(counter.get_total_flops())
    if trainable == "all":  # with the gradient of the pixels, which nobody takes: the convention of scaling laws
        backward = (TRAINING_FACTOR - 1) * sum(found)
    return Flops(image=found[0], text=found[1], backward=backward, trunk=trunk)
