"""Rows of a CLIP-MoE's routers that need no training: from what the feed-forward layers of the plain model see.

The router of a block has a row for each expert; a token goes to the experts whose rows have the largest products with
it. Rows are found by running pairs through the plain model and looking at the inputs of its feed-forward layers, one
vector for each token (padding of texts left out):

    centroids   spherical k-means of the inputs of all pairs: the rows are the E centroids, of norm 1
    centres     the mean m of the inputs of all pairs, and the mean m_k of those of the pairs of expert k's domain:
                row_k = (m_k - m without its part along m) / v, with v the mean variance of a number of the inputs

With centres, the first expert, which is the plain model's own layer, has the row 0. An expert is chosen before it where
its row's product is above 0. A typical token has the product 0 with every row: that is what leaving out the part along
m is for, as routers have no bias. Dividing by v makes the product the log-odds of the expert's domain against all pairs
for inputs with equal, independent variances, up to a constant. A row depends on no other expert, so experts can be
added one by one.

Source: cluster-aware upcycling (arXiv 2604.13508) for centroids. FlexOlmo starts the rows of its experts from the mean
embeddings of their domains and concatenates them; the form above, for routers without bias, is ours.
Price: a forward pass of some thousand pairs for each domain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from modeclip.clustering.fitting import sample_rows
from modeclip.clustering.kmeans import kmeans
from modeclip.data.catalog import Catalog
from modeclip.models.blocks import blocks_of
from modeclip.models.clip import Clip, computing, encode_image, encode_text

if TYPE_CHECKING:
    from torch import Tensor

PAIRS_AT_ONCE = 128
"""Pairs that are run at a time."""
TOKENS_OF_PAIRS = 8
"""Tokens of each image, and of each text, that centroids are fitted to at most."""


@dataclass(kw_only=True)
class BlockInputs:
    """What the feed-forward layer of one block has seen."""

    count: int = 0
    """Tokens."""
    total: Float[np.ndarray, " width"] = field(default_factory=lambda: np.zeros(0))
    """Sum of their vectors."""
    squares: float = 0.0
    """Sum of the squares of all of their numbers."""
    kept: list[Float[np.ndarray, "n width"]] = field(default_factory=list)
    """Some of the vectors."""

    @property
    def mean(self) -> Float[np.ndarray, " width"]:
        """Return the mean vector."""
        return self.total / max(self.count, 1)

    @property
    def variance(self) -> float:
        """Return the variance of a number of the vectors around its mean, on average over the width."""
        mean = self.mean
        return float(max(self.squares / max(self.count, 1) - mean @ mean, 0) / len(mean))

    def add(self, tokens: Float[np.ndarray, "n width"], keep: int) -> None:
        """Take more vectors, and keep some of them."""
        tokens = tokens.astype(np.float64)
        self.total = tokens.sum(0) + (self.total if self.count else 0)
        self.squares += float(np.square(tokens).sum())
        self.count += len(tokens)
        if keep:
            step = max(1, len(tokens) // keep)
            self.kept.append(tokens[::step][:keep].astype(np.float32))


def look_at_inputs(
    clip: Clip,
    catalog: Catalog,
    rows: Int[np.ndarray, " n"],
    *,
    most_pairs: int,
    seed: int = 0,
    keep: bool = False,
    advance: Callable[[int], object] | None = None,
) -> dict[str, BlockInputs]:
    """Run some pairs through a plain CLIP and return what the layer of each block saw, by the block's name.

    Args:
        clip: The plain model, in evaluation mode, where it is.
        catalog: Catalog of the pairs.
        rows: Pairs that may be run.
        most_pairs: Pairs that are run at most, drawn at random.
        seed: Decides which.
        keep: Keep some of the vectors, as centroids need them.
        advance: Called with the number of pairs just done.
    """
    chosen = rows[sample_rows(len(rows), most_pairs, seed)]
    found: dict[str, BlockInputs] = {}
    padding = int(clip.tokens([""])[0, -1])
    with _watching(clip.model) as seen, computing(clip, "32-true") as device:
        for start in range(0, len(chosen), PAIRS_AT_ONCE):
            part = chosen[start : start + PAIRS_AT_ONCE]
            tokens = clip.tokens([caption or "" for caption in catalog.captions(part)])
            encode_image(clip.model, clip.images(catalog.images(part)).to(device))
            encode_text(clip.model, tokens.to(device))
            for (tower, name), values in seen.items():
                vectors = values if tower == "image" else _without_padding(values, tokens, padding)
                keeping = TOKENS_OF_PAIRS * len(part) if keep else 0
                found.setdefault(name, BlockInputs()).add(vectors.flatten(0, -2).float().cpu().numpy(), keeping)
            seen.clear()
            if advance:
                advance(len(part))
    return found


def centroid_rows(
    inputs: Mapping[str, BlockInputs], num_experts: int, *, seed: int = 0
) -> dict[str, Float[np.ndarray, "E width"]]:
    """Return rows that are the centroids of each block's inputs.

    Args:
        inputs: With vectors that were kept, by the block's name.
        num_experts: Rows of each block.
        seed: Decides the start of k-means.
    """
    return {
        name: kmeans(np.concatenate(one.kept), num_experts, spherical=True, seed=seed).centers
        for name, one in inputs.items()
    }


def centre_row(of_all: BlockInputs, of_domain: BlockInputs) -> Float[np.ndarray, " width"]:
    """Return the row of an expert in one block.

    Args:
        of_all: What the block's layer sees in all pairs.
        of_domain: What it sees in the pairs of the expert's domain.

    Examples:
        >>> of_all, of_domain = BlockInputs(), BlockInputs()
        >>> of_all.add(np.array([[2.0, 1.0], [2.0, -1.0]]), 0)
        >>> of_domain.add(np.array([[3.0, 1.0]]), 0)
        >>> centre_row(of_all, of_domain).tolist()
        [0.0, 2.0]
    """
    mean = of_all.mean
    apart = of_domain.mean - mean
    if (length := float(mean @ mean)) > 0:
        apart = apart - (apart @ mean / length) * mean
    row: np.ndarray = apart / (of_all.variance or 1.0)
    return row


@contextmanager
def _watching(model: Any) -> Iterator[dict[tuple[str, str], Tensor]]:
    """Note the input of each block's feed-forward layer while the model runs, by tower and name of the block."""
    seen: dict[tuple[str, str], Tensor] = {}

    def note(tower: str, name: str) -> Callable[..., None]:
        def hook(_: Any, inputs: tuple[Tensor, ...]) -> None:
            seen[tower, name] = inputs[0].detach()

        return hook

    handles = [
        model.get_submodule(block.ffn_names[0]).register_forward_pre_hook(note(block.tower, block.name))
        for blocks in blocks_of(model).values()
        for block in blocks
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _without_padding(values: Tensor, tokens: Tensor, padding: int) -> Tensor:
    """Return the vectors of the tokens that are no padding, (n, width); what a tower adds at the end is kept."""
    import torch

    is_text = torch.ones(values.shape[:2], dtype=torch.bool)
    length = min(values.shape[1], tokens.shape[1])
    is_text[:, :length] = tokens[:, :length] != padding
    return values[is_text.to(values.device)]
