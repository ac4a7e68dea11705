"""How good a pair looks to a filter CLIP: scores of pairs from the unit vectors of their images and captions.

Every score is a pure function of vectors and larger is better. ``x_i`` is the vector of image i, ``t_i`` that of its
caption, ``g_1`` to ``g_m`` are the vectors of the training images of target tasks:

    cosine        x_i . t_i
    s-CLIPLoss    x_i . t_i - (tau / 2) [log sum_j exp(x_i . t_j / tau) + log sum_j exp(x_j . t_i / tau)]
    NormSim_p     || (x_i . g_1, ..., x_i . g_m) ||_p
    learnability  loss of a learner - loss of a reference model, both as in s-CLIPLoss

What is kept is a top fraction (`threshold_of`), or a probability for each pair (`soft_cap`).

N vectors are an array, a memory-mapped file, or anything that has a length and returns the rows of an index array; they
are read a block at a time, so that memory depends on the block and not on N.

Price: cosine and NormSim_2 read the vectors once (D and D^2 products a pair). s-CLIPLoss multiplies each image with a
batch of 32,768 captions in each of five partitions, and takes two exponentials of each product: 1.7e14 operations for
a million pairs of 512 dimensions. docs/scale.md has the rates.

Source: DFN (arXiv 2309.17425); s-CLIPLoss and NormSim (arXiv 2405.19547); soft cap sampling (M-FLYT); learnability
(JEST, arXiv 2406.17711).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from modeclip.models.clip import without_gradients
from modeclip.system.devices import choose_device

if TYPE_CHECKING:
    from torch import Tensor

Norm = Literal["2", "inf"]
"""Norms that NormSim knows."""
TAU = 0.01
"""Temperature of s-CLIPLoss; 0.07 suits the public filter of DFN (arXiv 2405.19547)."""
BATCH = 32_768
"""Pairs that s-CLIPLoss contrasts a pair with (arXiv 2405.19547)."""
PARTITIONS = 5
"""Random partitions over which s-CLIPLoss is averaged (arXiv 2405.19547: at least 5)."""
ROWS_AT_ONCE = 8192
"""Vectors that are read at once: 16 MB of float32 at 512 dimensions."""
LOGITS_AT_ONCE = 1 << 23
"""Products that a thread holds at once: 32 MB, and as much again for their exponentials."""
ROUND_DRAWS, ROUND_SHARE, PENALTY = 100_000, 1 / 1280, 0.15
"""Soft cap sampling draws 100,000 pairs a round from 128 million, and takes 0.15 from their logits (M-FLYT)."""
LOGIT_BINS = 1 << 12
"""Bins of logits in which soft cap sampling counts: pairs with equal logits have equal expectations."""
NEWTON_STEPS = 200
"""Most steps to the rate of a round; a few are enough unless nearly all pairs are drawn."""


@runtime_checkable
class Vectors(Protocol):
    """N unit vectors, of which some rows at a time are read."""

    def __len__(self) -> int:
        """Return N."""
        ...

    def __getitem__(self, rows: Any) -> Float[np.ndarray, "n D"]:
        """Return the vectors of an array of positions."""
        ...


def cosine(images: Vectors, texts: Vectors) -> Float[np.ndarray, " N"]:
    """Return the cosine of each image with its caption, float32 in [-1, 1]: the score of DFN.

    Args:
        images: (N, D) unit vectors of the images.
        texts: (N, D) unit vectors of their captions.

    Examples:
        >>> cosine(np.eye(2), np.array([[0.5, 0.75], [0.0, 1.0]])).tolist()
        [0.5, 1.0]

    Source: DFN (arXiv 2309.17425).
    """
    return _by_block(len(images), lambda rows: np.einsum("nd,nd->n", _floats(images[rows]), _floats(texts[rows])))


def sclip(
    images: Vectors,
    texts: Vectors,
    *,
    tau: float = TAU,
    batch_size: int = BATCH,
    partitions: int = PARTITIONS,
    seed: int = 0,
) -> Float[np.ndarray, " N"]:
    """Return s-CLIPLoss of each pair: its cosine less what its image and its caption give to any pair.

    The sums run over a random batch that holds the pair; the score is the mean over random partitions of the pairs into
    batches. It has the same bytes on a CPU whatever the number of threads.

    Args:
        images: (N, D) unit vectors of the images.
        texts: (N, D) unit vectors of their captions.
        tau: Temperature, above 0.
        batch_size: Pairs in a batch; all N if they are fewer, and one partition is enough then.
        partitions: Random partitions, 1 or more.
        seed: Decides the partitions.

    Returns:
        float32. Minus the score, divided by ``tau``, is the pair's mean loss in the two directions.

    Source: arXiv 2405.19547 (s-CLIPLoss, also negCLIPLoss).
    """
    count, total = partition_count(len(images), batch_size, partitions), np.zeros(len(images))
    for number in range(count):
        total += sclip_of_partition(images, texts, number, tau=tau, batch_size=batch_size, seed=seed)
    return (total / count).astype(np.float32)


def partition_count(num_pairs: int, batch_size: int, partitions: int) -> int:
    """Return how many partitions differ: a single batch is the same in all of them.

    Examples:
        >>> partition_count(40_000, 32_768, 5), partition_count(30_000, 32_768, 5)
        (5, 1)
    """
    return 1 if num_pairs <= batch_size else partitions


def sclip_of_partition(
    images: Vectors,
    texts: Vectors,
    partition: int,
    *,
    tau: float = TAU,
    batch_size: int = BATCH,
    seed: int = 0,
    advance: Callable[[int], None] = lambda _: None,
) -> Float[np.ndarray, " N"]:
    """Return s-CLIPLoss of each pair in the batches of one random partition; arguments and source as for `sclip`.

    The last batch is filled up with pairs of the one before, so that all batches have the same size.

    Args:
        images: As for `sclip`.
        texts: As for `sclip`.
        partition: Number of the partition, from 0.
        tau: As for `sclip`.
        batch_size: As for `sclip`.
        seed: As for `sclip`.
        advance: Called with the number of pairs that have been scored.
    """
    count = len(images)
    batch_size, found = min(batch_size, count), np.empty(count, np.float32)
    order = np.random.Generator(np.random.Philox(key=[seed, partition])).permutation(count)
    for start in range(0, count, batch_size):
        first = min(start, count - batch_size)
        rows = np.sort(order[first : first + batch_size])  # files are read in their order
        of_batch = _contrast(_floats(images[rows]), _floats(texts[rows]), tau)
        new = np.isin(rows, order[start : start + batch_size], assume_unique=True)
        found[rows[new]] = of_batch[new]
        advance(int(new.sum()))
    return found


def normsim(images: Vectors, targets: Float[np.ndarray, "m D"], p: Norm = "2") -> Float[np.ndarray, " N"]:
    """Return how near each image is to the training images of target tasks: the p-norm of its cosines with them.

    With p = 2 the images' second moment, a matrix of D by D, is all that is needed of them.

    Args:
        images: (N, D) unit vectors of the images.
        targets: (m, D) unit vectors of the target tasks' training images, m at least 1.
        p: ``2``, or ``inf`` for the largest cosine (of either sign, as in any norm).

    Source: arXiv 2405.19547 (NormSim).
    """
    targets = _floats(targets)
    if p == "2":
        moment = targets.astype(np.float64).T @ targets.astype(np.float64)

        def squared(rows: slice) -> np.ndarray:
            x = images[rows].astype(np.float64)
            return np.asarray(np.sqrt(np.maximum(np.einsum("nd,nd->n", x @ moment, x), 0)))

        return _by_block(len(images), squared)

    def largest(rows: slice) -> np.ndarray:
        x, step = _floats(images[rows]), max(1, LOGITS_AT_ONCE // ROWS_AT_ONCE)
        best = np.zeros(len(x), np.float32)
        for start in range(0, len(targets), step):
            np.maximum(best, np.abs(x @ targets[start : start + step].T).max(axis=1), out=best)
        return best

    return _by_block(len(images), largest)


def threshold_of(scores: Float[np.ndarray, " N"], fraction: float) -> float:
    """Return the score that a pair needs to be in the top fraction: the ``int(N * fraction)``-th of them, from 0.

    Pairs with a score of at least this are kept, so that equal scores are kept together.

    Args:
        scores: One or more scores, in any order.
        fraction: Share of the pairs, in (0, 1]; 1 keeps all.

    Examples:
        >>> threshold_of(np.array([0.1, 0.4, 0.3, 0.2]), 0.5)
        0.2

    Source: DFN (arXiv 2309.17425).
    """
    place = min(int(len(scores) * fraction), len(scores) - 1)
    return float(np.partition(scores, len(scores) - 1 - place)[len(scores) - 1 - place])


def soft_cap(
    logits: Float[np.ndarray, " N"], draws: int, *, round_draws: int | None = None, penalty: float = PENALTY
) -> Float[np.ndarray, " N"]:
    """Return how often soft cap sampling is expected to draw each pair.

    Soft cap sampling draws pairs without replacement with the softmax of their logits, takes the penalty from the
    logits of those drawn, and draws again: good pairs recur, none too often. Here this is computed and not drawn. In a
    round a pair is drawn with the probability 1 - exp(-rate * exp(logit)), where the rate makes the expected number of
    draws right, and then loses the penalty times that probability. (Drawing without replacement is a race of
    exponential clocks; with many pairs the time at which it stops is nearly certain.) What is expected depends on the
    logit alone, so it is computed for bins of logits and interpolated, and the order of the pairs does not matter.

    Args:
        logits: Logits z of the pairs, such as their scores divided by a temperature.
        draws: Draws in all rounds together, 1 or more.
        round_draws: Draws in a round, at most N; None: 100,000, or an 1280th of the pairs if that is less.
        penalty: What a draw takes from a logit, 0 or more.

    Returns:
        float64, at least 0; the sum is ``draws`` but for the width of the bins.

    Source: M-FLYT's soft cap sampling: 100,000 draws a round from 128 million pairs, penalty 0.15.
    """
    count = len(logits)
    if round_draws is None:
        round_draws = min(ROUND_DRAWS, math.ceil(count * ROUND_SHARE))
    logits = np.asarray(logits, np.float64)
    places = np.linspace(logits.min(), logits.max(), LOGIT_BINS)
    width = (places[-1] - places[0]) / (LOGIT_BINS - 1)
    if width == 0:
        return np.full(count, draws / count)
    # A pair counts for the two places beside it, the nearer one more, as it will be interpolated between them.
    left = np.minimum(((logits - places[0]) / width).astype(np.int64), LOGIT_BINS - 2)
    part = (logits - places[0]) / width - left
    pairs = np.bincount(left, 1 - part, LOGIT_BINS) + np.bincount(left + 1, part, LOGIT_BINS)
    (filled,) = np.nonzero(pairs)
    now, expected, left_over = places[filled], np.zeros(len(filled)), draws
    while left_over > 0:
        drawn = _drawn_in_a_round(now, pairs[filled], min(round_draws, left_over))
        expected += drawn
        now -= penalty * drawn
        left_over -= round_draws
    return np.asarray(np.interp(logits, places[filled], expected))


def _drawn_in_a_round(
    logits: Float[np.ndarray, " B"], pairs: Float[np.ndarray, " B"], draws: int
) -> Float[np.ndarray, " B"]:
    """Return with which probability pairs of each bin are among the draws of one round.

    The rate comes from Newton's method, which from below never passes it: the number of draws is concave in the rate.
    """
    chances = np.exp(logits - logits.max())
    wanted = min(draws, pairs.sum() * (1 - 1e-6))
    rate = wanted / (pairs @ chances)
    for _ in range(NEWTON_STEPS):
        drawn = -np.expm1(-rate * chances)
        lacking = wanted - pairs @ drawn
        if lacking <= 1e-9 * wanted:
            break
        rate += lacking / (pairs @ (chances * (1 - drawn)))
    return np.asarray(drawn)


def _contrast(images: Float[np.ndarray, "B D"], texts: Float[np.ndarray, "B D"], tau: float) -> Float[np.ndarray, " B"]:
    """Return the score of each pair of one batch."""
    import torch

    device = choose_device()
    x, t = (torch.from_numpy(part).to(device) for part in (images, texts))
    step = max(1, LOGITS_AT_ONCE // len(x))

    def block(start: int) -> tuple[Tensor, Tensor]:
        with without_gradients():
            logits = x[start : start + step] @ t.T / tau
            return torch.logsumexp(logits, 1), torch.logsumexp(logits, 0)

    of_image, of_text = [], torch.full((len(x),), -math.inf, device=device)
    with _single_threaded(device.type) as run:
        for rows, columns in run(block, range(0, len(x), step)):
            of_image.append(rows)
            of_text = torch.logaddexp(of_text, columns)
    both = (torch.cat(of_image) + of_text).double().cpu().numpy()
    return np.asarray(np.einsum("nd,nd->n", images, texts) - tau / 2 * both)


@contextmanager
def _single_threaded(device: str) -> Iterator[Callable[[Callable[[int], Any], range], Iterator[Any]]]:
    """Yield a map that computes each block on one thread of a CPU, so that its bytes do not depend on their number."""
    import torch

    threads = torch.get_num_threads()
    if device != "cpu" or threads == 1:
        yield map
        return
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool.map
    finally:
        torch.set_num_threads(threads)


def _by_block(count: int, score: Callable[[slice], np.ndarray]) -> Float[np.ndarray, " N"]:
    """Return scores that are computed for a block of rows at a time."""
    result = np.empty(count, np.float32)
    for start in range(0, count, ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        result[rows] = score(rows)
    return result


def _floats(vectors: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "n D"]:
    return np.ascontiguousarray(vectors, np.float32)
