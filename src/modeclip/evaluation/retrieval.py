"""Recall@k of searches for images by text and for texts by image, in little memory whatever their number.

Image retrieval: every text is a query, and the one image that it describes is the right answer. Text retrieval: every
image is a query, and any of its texts is right. A query is a hit at k if a right answer is among its k most similar
candidates; among equal similarities the lower index counts as more similar.

Nothing is sorted: the place of the right answer is the number of candidates before it. A first sweep computes only the
blocks that hold pairs, and keeps the similarity of each pair. A second sweep computes every block and counts the
candidates above. This is exact, it gives the place for every k at once, and a block is forgotten once it is counted.

Source: MoDE (arXiv 2404.16030), Sec. 3.4 and eq. 7, for weights of each query; the recall is that of CLIP papers, any
right answer among the top k.
Price: N x T similarities, each computed once and then looked at for about 5 ns on a core; ``benchmarks/retrieval.py``
measures it. The first sweep adds one or two of every N / 512 blocks if the texts come in the order of their images, and
doubles the work if they come in no order. Memory is a few blocks of 1 MiB and about 100 bytes for each text and image;
features that are memory-mapped stay on disk.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
from jaxtyping import Float, Int

from modeclip.errors import ModeclipError
from modeclip.evaluation.intervals import Outcome
from modeclip.evaluation.similarity import Similarity
from modeclip.system.console import progress

IMAGES_AT_ONCE, TEXTS_AT_ONCE = 512, 512
"""Sides of a block: 1 MiB of similarities, which stays in the cache of a core while it is looked at."""
LONG = 1 << 28
"""A progress bar is shown from so many similarities on: about two seconds."""
MAPPED_BYTES = 1 << 30
"""After so many bytes from memory-mapped files their pages are given back; else all that was read counts as used."""


def retrieve(
    similarity: Similarity,
    image_of_text: Int[np.ndarray, " T"],
    ks: Sequence[int] = (1, 5, 10),
    *,
    to_texts: Similarity | None = None,
) -> Outcome:
    """Search an image for each text, and a text for each image.

    The metrics are ``image_retrieval_recall@k`` (mean over the texts), ``text_retrieval_recall@k`` (mean over the
    images that have a text), and ``mean_recall@k`` of the first k: the mean of these two, which counts in averages.
    Samples of the outcome are the T texts, then the N images: ``prediction`` is the best image of a text or the best
    text of an image, ``rank`` the place of the first right answer. An image without a text has weight 0.

    Args:
        similarity: Similarities of the N images with the T texts for image retrieval, where each text may have weights
            of its own.
        image_of_text: The image that each text describes, 0 to N - 1; an image may have any number of texts.
        ks: How many answers are looked at, each 1 or more. The first number counts in averages.
        to_texts: Similarities for text retrieval, if its weights differ; by default the same.

    Raises:
        ModeclipError: There are no texts, an image of a text does not exist, the two similarities are not of the same
            images and texts, or features hold NaN.

    Examples:
        >>> unit = np.eye(2, dtype=np.float32)
        >>> pairs = Similarity(images=[unit], texts=[unit[[0, 0, 1]]], weights=np.ones(1))
        >>> retrieve(pairs, np.array([0, 0, 1]), ks=[1]).metrics
        {'image_retrieval_recall@1': 1.0, 'text_retrieval_recall@1': 1.0, 'mean_recall@1': 1.0}
    """
    _check(similarity, image_of_text, ks)
    if to_texts is not None and to_texts.shape != similarity.shape:
        raise ModeclipError(
            f"retrieval: expected the same images and texts {similarity.shape} for text retrieval, got {to_texts.shape}"
        )
    num_images, num_texts = similarity.shape
    if to_texts is None:
        of_texts, of_images = _rank(similarity, image_of_text, ["images", "texts"])
    else:
        (of_texts,) = _rank(similarity, image_of_text, ["images"])
        (of_images,) = _rank(to_texts, image_of_text, ["texts"])
    has_text = of_images.target >= 0
    ranks = {"image": of_texts.rank, "text": of_images.rank[has_text]}
    metrics = {f"{side}_retrieval_recall@{k}": float((rank < k).mean()) for side, rank in ranks.items() for k in ks}
    main = f"mean_recall@{ks[0]}"
    metrics[main] = sum(metrics[f"{side}_retrieval_recall@{ks[0]}"] for side in ranks) / 2
    rank = np.concatenate([of_texts.rank, np.where(has_text, of_images.rank, num_texts)])
    found = rank < np.repeat([ks[0], min(ks[0], num_texts)], [num_texts, num_images])
    weights = np.concatenate([np.full(num_texts, 0.5 / num_texts), has_text * (0.5 / has_text.sum())])
    return Outcome(
        metrics=metrics,
        main=main,
        hits=found.astype(np.float64),
        prediction=np.concatenate([of_texts.prediction, of_images.prediction]),
        rank=rank,
        weights=weights * (num_texts + num_images),
        image=np.concatenate([image_of_text, np.arange(num_images)]),
        extra={"is_text": np.arange(num_texts + num_images) < num_texts},
    )


class _Ranks:
    """For Q queries, the place of the right answer among the candidates seen so far, and the best candidate."""

    def __init__(self, target: Int[np.ndarray, " Q"], score: Float[np.ndarray, " Q"]) -> None:
        self.target, self.score = target, score  # right answer of each query (-1: it has none) and its similarity
        self.rank = np.zeros(len(target), np.int64)
        self.prediction = np.zeros(len(target), np.int64)
        self._best = np.full(len(target), -np.inf, np.float32)

    def add(self, block: Float[np.ndarray, "c q"], candidates: slice, queries: slice) -> None:
        """Count the candidates of a block. Blocks must come in the order of their candidates."""
        target, score = self.target[queries], self.score[queries]
        # A tie counts only if it stands before the right answer.
        bar = np.where(target >= candidates.stop, score, np.nextafter(score, np.float32(np.inf)))
        self.rank[queries] += np.count_nonzero(block >= bar, axis=0)
        inside = np.flatnonzero((target >= candidates.start) & (target < candidates.stop))
        row, column = np.nonzero(block[:, inside] == score[inside])
        ties = inside[column[row + candidates.start < target[inside[column]]]]
        self.rank[queries] += np.bincount(ties, minlength=len(target))
        top = block.max(axis=0)
        better = np.flatnonzero(top > self._best[queries])
        self._best[queries.start + better] = top[better]
        self.prediction[queries.start + better] = block[:, better].argmax(axis=0) + candidates.start


def _rank(similarity: Similarity, image_of_text: np.ndarray, sought: Sequence[str]) -> list[_Ranks]:
    """Rank the candidates that are sought: "images" for each text, "texts" for each image."""
    tile = _tiles(similarity)
    num_images, num_texts = similarity.shape
    score = np.empty(num_texts, np.float32)
    pairs: dict[tuple[int, int], np.ndarray] = {}  # by image and text block, the texts whose image is in the block too
    for texts in _slices(num_texts, TEXTS_AT_ONCE):
        image = image_of_text[texts]
        for first in np.unique(image // IMAGES_AT_ONCE).tolist():
            images = slice(first * IMAGES_AT_ONCE, min((first + 1) * IMAGES_AT_ONCE, num_images))
            own = np.flatnonzero(image // IMAGES_AT_ONCE == first)
            score[texts.start + own] = tile(images, texts)[image[own] - images.start, own]
            pairs[images.start, texts.start] = own
    if np.isnan(score).any():
        raise _diverged()
    ranks = {side: _Ranks(*_answers(side, score, image_of_text, num_images)) for side in sought}
    with _bar(num_images * num_texts) as advance:
        for texts in _slices(num_texts, TEXTS_AT_ONCE):
            for images in _slices(num_images, IMAGES_AT_ONCE):
                block = tile(images, texts)
                if (paired := pairs.get((images.start, texts.start))) is not None:
                    # Use the numbers of the first sweep: a BLAS may round the same product differently.
                    block[image_of_text[texts][paired] - images.start, paired] = score[texts][paired]
                if np.isnan(block.max()):
                    raise _diverged()
                if "images" in ranks:
                    ranks["images"].add(block, images, texts)
                if "texts" in ranks:
                    ranks["texts"].add(block.T, texts, images)
                advance(block.size)
    return [ranks[side] for side in sought]


def _answers(
    side: str, score: np.ndarray, image_of_text: np.ndarray, num_images: int
) -> tuple[Int[np.ndarray, " Q"], Float[np.ndarray, " Q"]]:
    """Return the right answer of each query and its similarity; an image's right answer is its most similar text."""
    if side == "images":
        return image_of_text.astype(np.int64), score
    order = np.lexsort((-score, image_of_text))  # stable: among equal texts the lowest index comes first
    ordered = image_of_text[order]
    first = np.flatnonzero(np.diff(ordered, prepend=-1))
    target, best = np.full(num_images, -1), np.full(num_images, np.inf, np.float32)
    target[ordered[first]], best[ordered[first]] = order[first], score[order[first]]
    return target, best


def _tiles(similarity: Similarity) -> Callable[[slice, slice], np.ndarray]:
    """Return a function that computes a block. It keeps the last one, so that a small task is computed once."""
    last: dict[tuple[int, int], np.ndarray] = {}
    features = [*similarity.images, *similarity.texts]
    bytes_a_block = TEXTS_AT_ONCE * sum(part.itemsize * part.shape[1] for part in features)
    blocks_until_return = max(1, MAPPED_BYTES // max(1, bytes_a_block))
    num_blocks = 0

    def tile(images: slice, texts: slice) -> np.ndarray:
        nonlocal num_blocks
        key = (images.start, texts.start)
        if key not in last:
            last.clear()
            last[key] = similarity.block(images, texts)
            num_blocks += 1
            if num_blocks % blocks_until_return == 0:
                _return_pages(features)
        return last[key]

    return tile


def _return_pages(features: Sequence[np.ndarray]) -> None:
    """Let go of the pages that were read from memory-mapped files; the system's file cache still has them."""
    for part in features:
        base: object = part
        while isinstance(base, np.ndarray):
            base = base.base
        if isinstance(base, mmap.mmap) and not part.flags.writeable and hasattr(mmap, "MADV_DONTNEED"):
            base.madvise(mmap.MADV_DONTNEED)


def _slices(count: int, step: int) -> Iterator[slice]:
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def _bar(num_pairs: int) -> AbstractContextManager[Callable[[int], None]]:
    if num_pairs < LONG:
        return nullcontext(lambda _: None)
    return progress("retrieval", num_pairs, "pairs")


def _diverged() -> ModeclipError:
    return ModeclipError("retrieval: the similarities hold NaN; the model diverged, or its features are damaged")


def _check(similarity: Similarity, image_of_text: np.ndarray, ks: Sequence[int]) -> None:
    """Raise if there is nothing to retrieve, or pairs point nowhere."""
    num_images, num_texts = similarity.shape
    if num_texts == 0 or len(image_of_text) != num_texts:
        raise ModeclipError(
            f"retrieval: expected the image of each text, and at least one, got {len(image_of_text)} for {num_texts}"
        )
    if image_of_text.min() < 0 or image_of_text.max() >= num_images:
        raise ModeclipError(
            f"retrieval: expected images 0 to {num_images - 1}, got {image_of_text.min()} to {image_of_text.max()}"
        )
    if not ks or min(ks) < 1:
        raise ModeclipError(f"retrieval: expected every k to be 1 or more, got {list(ks)}")
