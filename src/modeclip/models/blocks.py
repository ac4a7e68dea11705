"""The anatomy of a CLIP's towers: their blocks, and the feed-forward layers in them.

A block is a module that holds attention and a feed-forward layer side by side, which is how open_clip's own image and
text transformers, timm's and those of Hugging Face are built. Names of both tell which is which, so no library has to
be imported to find them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

from modeclip.errors import ModeclipError

Tower = Literal["image", "text"]
_ATTENTION = ("attn", "attention", "self_attn")
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
    blocks = blocks_of(model)
    for tower, found in blocks.items():
        if not found:
            raise ModeclipError(
                f"the {tower} tower has no blocks with feed-forward layers; take a model whose towers are "
                "transformers, such as ViT-B-32"
            )
    starts = tuple(f"{name}." for found in blocks.values() for block in found for name in block.ffn_names)
    return tuple(name for name, _ in model.named_parameters() if name.startswith(starts))


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[str, ...]]]:
    """Yield name, module and the parts of the feed-forward layer of each block."""
    for name, module in model.named_modules():
        children = dict(module.named_children())
        if not any(child in children for child in _ATTENTION):
            continue
        ffn = next((parts for parts in _FFN if parts[0] in children), None)
        if ffn is not None:
            yield name, module, ffn
