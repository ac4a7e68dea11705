"""The anatomy of a CLIP's towers: their blocks, the feed-forward layers in them, and what a training may change.

A block is a module that holds attention and a feed-forward layer side by side, which is how open_clip's own image and
text transformers, timm's and those of Hugging Face are built. Names of both tell which is which, so no library has to
be imported to find them.

What is frozen has no gradient. PyTorch records nothing until the first parameter that has one, so the blocks before
the last N run without a graph and keep no activations.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from modeclip.errors import ModeclipError

if TYPE_CHECKING:
    from torch import nn

Tower = Literal["image", "text"]
_ATTENTION = ("attn", "attention", "self_attn")
_BEHIND = re.compile(
    r"visual\.(ln_post|proj|attn_pool|attn_pool_contrastive|head|trunk\.(norm|fc_norm|attn_pool|head))(\.|$)"
    r"|(text\.)?(ln_final|text_projection)(\.|$)|text\.(proj|pooler|transformer\.pooler)(\.|$)"
)
"""Parameters of what follows the blocks: norm, pooling and projection, of open_clip, timm and Hugging Face."""
_FFN = (("mlp",), ("ffn",), ("intermediate", "output.dense"))  # open_clip, timm, CLIP; DistilBERT; BERT


@dataclass(frozen=True, kw_only=True)
class Block:
    """One block of a tower."""

    tower: Tower
    """Which tower."""
    index: int
    """Its number in the tower, from the input."""
    name: str
    """Prefix of its parameters in the plain model, such as ``visual.transformer.resblocks.3``."""
    module: nn.Module
    """The block itself."""
    ffn_names: tuple[str, ...]
    """Prefixes of the parameters of its feed-forward layer, in the order in which they run."""


def blocks_of(model: nn.Module) -> dict[Tower, list[Block]]:
    """Return the blocks of both towers; a tower that has none, such as a ResNet, has an empty list."""
    found: dict[Tower, list[Block]] = {"image": [], "text": []}
    for name, module, ffn in _blocks(model):
        tower: Tower | None = "image" if name.startswith("visual.") else None
        if name.startswith(("transformer.", "text.")):
            tower = "text"
        if tower:
            names = tuple(f"{name}.{part}" for part in ffn)
            block = Block(tower=tower, index=len(found[tower]), name=name, module=module, ffn_names=names)
            found[tower].append(block)
    return found


def ffn_parameters(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters of all feed-forward layers.

    Raises:
        ModeclipError: A tower has none.
    """
    blocks = [block for found in _blocks_of_both(model).values() for block in found]
    starts = tuple(f"{name}." for block in blocks for name in block.ffn_names)
    return tuple(name for name, _ in model.named_parameters() if name.startswith(starts))


def last_parameters(model: nn.Module, count: int) -> tuple[str, ...]:
    """Return the names of the parameters of the last blocks of both towers, and of the norms and projections behind.

    Args:
        model: A CLIP.
        count: Number of blocks of each tower, at least 1.

    Raises:
        ModeclipError: A tower has none, or fewer.
    """
    blocks = _blocks_of_both(model)
    tower, fewest = min(((tower, len(found)) for tower, found in blocks.items()), key=lambda pair: pair[1])
    if not 1 <= count <= fewest:
        raise ModeclipError(
            f"last:{count}: the {tower} tower has {fewest} block{'s' if fewest > 1 else ''}; expected last:1"
            + (f" to last:{fewest}" if fewest > 1 else "")
        )
    starts = tuple(f"{block.name}." for found in blocks.values() for block in found[-count:])
    return tuple(name for name, _ in model.named_parameters() if name.startswith(starts) or _BEHIND.match(name))


def freeze(model: nn.Module, trainable: str) -> None:
    """Freeze what a training leaves out: it gets no gradient and no place in the optimizer, and statistics stand still.

    Args:
        model: A CLIP.
        trainable: As ``train.trainable`` says it.

    Raises:
        ModeclipError: The model has no such parts.
    """
    from torch.nn.modules.batchnorm import _BatchNorm

    if trainable == "all":
        return
    changed = _changed(model, trainable)
    for name, value in model.named_parameters():
        if name not in changed:
            value.requires_grad_(False)
    for module in model.modules():
        is_trained = any(value.requires_grad for value in module.parameters())
        if isinstance(module, _BatchNorm) and not is_trained:
            module.track_running_stats = False


def _changed(model: nn.Module, trainable: str) -> set[str]:
    """Return the names of the parameters that a training changes."""
    try:
        if trainable == "ffn":
            return set(ffn_parameters(model))
        if trainable.startswith("last:"):
            return set(last_parameters(model, int(trainable.removeprefix("last:"))))
    except ModeclipError as error:
        raise ModeclipError(f"train.trainable {trainable}: {str(error).removeprefix(f'{trainable}: ')}") from None
    names = [name for name, _ in model.named_parameters()]
    router = {name for name in names if name.endswith(".router.weight")}
    if not router:
        raise ModeclipError(
            f"train.trainable {trainable}: the model has no experts; give a CLIP-MoE, or all, ffn or last:N"
        )
    added = {name for name in names if re.search(r"\.experts\.[1-9]\d*\.", name)}
    return router if trainable == "routers" else router | added


def _blocks_of_both(model: nn.Module) -> dict[Tower, list[Block]]:
    """Return the blocks of both towers; raise if one has none."""
    blocks = blocks_of(model)
    for tower, found in blocks.items():
        if not found:
            raise ModeclipError(
                f"the {tower} tower has no blocks with feed-forward layers; take a model whose towers are "
                "transformers, such as ViT-B-32"
            )
    return blocks


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[str, ...]]]:
    """Yield name, module and the parts of the feed-forward layer of each block."""
    for name, module in model.named_modules():
        children = dict(module.named_children())
        if not any(child in children for child in _ATTENTION):
            continue
        ffn = next((parts for parts in _FFN if parts[0] in children), None)
        if ffn is not None:
            yield name, module, ffn
