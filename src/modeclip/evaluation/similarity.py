"""Similarities of images with texts by one CLIP or by several with weights, computed one block at a time.

The similarity is the weighted sum of the experts' cosines (MoDE eq. 4), sum_c p_c <u_c, v_c>. The weights are one
vector, or differ from text to text (`per_class`, image retrieval) or from image to image (clusters of images). Where
the texts are the classes of a task, the experts' log-probabilities can be summed in place of their cosines. That needs
all classes at once and is no inner product, so a mixture is one CLIP by cosines alone.

Images x texts numbers are never held at once: whoever needs all of them asks for one block after another.

Price: a block of n x l costs n * l * D multiplications for each expert; the caller leaves out experts without weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

BLOCK_NUMBERS = 1 << 25
"""Similarities in a block, at most (128 MiB of float32)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Similarity:
    """Similarities of N images with L texts."""

    images: Sequence[Float[np.ndarray, "N _"]]
    """Unit vectors of the images by each of K experts, float32; may be memory-mapped."""
    texts: Sequence[Float[np.ndarray, "L _"]]
    """Unit vectors of the texts by each of them."""
    weights: Float[np.ndarray, "... K"]
    """Weight of each expert: (K,), or a row a text (L, K), or, if ``per_image``, a row an image (N, K)."""
    per_image: bool = False
    """Whether the rows of the weights are of images."""
    scales: Float[np.ndarray, " K"] | None = None
    """Factor from cosines to logits of each expert; then the similarity is sum_c p_c log softmax_l(scale_c <u_c, v_c>),
    over all L texts; None: cosines."""

    @property
    def shape(self) -> tuple[int, int]:
        """Images N and texts L."""
        return len(self.images[0]), len(self.texts[0])

    def block(self, images: slice, texts: slice = slice(None)) -> Float[np.ndarray, "n l"]:
        """Return the similarities of some images with some texts, float32.

        Examples:
            >>> one, other = np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32)[::-1]
            >>> both = Similarity(images=[one, one], texts=[one, other], weights=np.array([0.75, 0.25]))
            >>> both.block(slice(0, 1)).tolist()
            [[0.75, 0.25]]
        """
        total: np.ndarray | None = None
        for expert, (of_images, of_texts) in enumerate(zip(self.images, self.texts, strict=True)):
            weights = self.weights[..., expert].astype(np.float32)
            shares = weights[images, None] if self.per_image else weights[texts] if weights.ndim else weights
            visual = of_images[images]
            if self.scales is None:
                part = visual @ of_texts[texts].T
            else:
                from scipy.special import log_softmax

                logits = (visual * np.float32(self.scales[expert])) @ of_texts.T
                part = log_softmax(logits, axis=1)[:, texts]
            part *= shares
            total = part if total is None else np.add(total, part, out=total)
        assert total is not None
        return total

    def blocks(self) -> Iterator[tuple[slice, Float[np.ndarray, "n L"]]]:
        """Yield (images, their similarities with all texts), `BLOCK_NUMBERS` at a time."""
        num_images, num_texts = self.shape
        step = max(1, BLOCK_NUMBERS // max(1, num_texts))
        for start in range(0, num_images, step):
            rows = slice(start, min(start + step, num_images))
            yield rows, self.block(rows)
