"""Counts the false negatives in batches of clustered captions, and measures how hard the other negatives are.

CLIP's loss takes every other pair of a batch for a negative. A negative is *false* if its caption says the same as the
positive's: here, if the two captions are identical, or if the cosine of their embeddings reaches a threshold. MoDE
trains on batches of one expert, so this tells before training what clustering does to the batches of a data set.

What to expect: captions of one cluster are alike, so batches of one expert usually hold MORE false negatives than
random batches. Their other negatives are harder, which is the purpose of experts. Clustering does remove the false
negatives between captions of different experts, which no longer meet; ``apart`` counts these. Identical captions have
the same embedding, hence the same cluster, and are never separated.

Method: a batch is drawn without repeats from a group of rows, and the group with a chance in proportion to its rows.
Every batch gives one value of each quantity; their mean and standard error are reported. The share of identical
captions is not estimated but counted, from how often each caption occurs in each group; what batches estimate is the
share of near-duplicates that are not identical, and the false negatives are the sum of the two.

Source: ours. The paper (MoDE, arXiv 2404.16030) argues with false negatives but does not count them.

Price: one (B, B) product a batch; a few caption numbers per row in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from modeclip.errors import ModeclipError

DEFAULT_THRESHOLD = 0.9
"""Cosine from which two captions count as saying the same.

We looked at 20,000 captions of real icons under MiniLM. Below 0.9 most pairs are different things that share a style
("tokenizer duotone thin", "refactor duotone thin"). From 0.9 on they differ in an adjective or a number, but opposites
("thumbs up", "thumbs down") are still among them. So the measured share of false negatives is an upper bound, and the
share of identical captions is a lower one.
"""
ROWS_AT_ONCE = 1024
"""Rows of a batch that are compared with the whole batch in one product."""
Z_95 = 1.96
"""Standard errors on each side of a 95 % interval."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over batches, and how certain it is."""

    mean: float
    """Mean of the batches' values."""
    standard_error: float
    """Standard deviation of the values divided by the root of their number; 0 for a single batch."""
    counted: float = 0.0
    """Part of the mean that was counted and not estimated, so that the mean cannot be below it."""

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the mean (normal approximation)."""
        low, high = self.mean - Z_95 * self.standard_error, self.mean + Z_95 * self.standard_error
        return max(low, self.counted) if self.counted else low, high

    def exceeds(self, other: Estimate) -> bool:
        """Tell whether this mean is larger by more than 1.96 standard errors of the difference."""
        return self.mean - other.mean > Z_95 * math.hypot(self.standard_error, other.standard_error)


@dataclass(frozen=True, kw_only=True)
class Negatives:
    """The negatives of one kind of batch."""

    kind: str
    """``random`` (any rows), ``expert`` (rows of one expert) or ``fine`` (rows of one fine cluster)."""
    mean_batch_size: float
    """Mean rows of a batch; fewer than asked for where groups are smaller."""
    identical: float
    """Share of negatives with exactly the positive's caption, in [0, 1]; counted, not estimated."""
    false: Estimate
    """Share of negatives that are identical (counted) or near-duplicates (estimated), in [0, 1]."""
    false_per_pair: Estimate
    """How many such negatives a pair meets in its batch."""
    cosine: Estimate | None
    """Mean cosine of the other negatives' captions with the positive's; the higher it is, the harder they are. None
    where all negatives are false."""


@dataclass(frozen=True, kw_only=True)
class NegativeReport:
    """Compares random batches with batches of one expert and of one fine cluster."""

    batch_size: int
    """Rows of a batch, if the group has as many."""
    num_batches: int
    """Batches of each kind."""
    threshold: float
    """Cosine from which captions count as near-duplicates."""
    num_rows: int
    """Rows that the batches were drawn from."""
    kinds: tuple[Negatives, ...]
    """The three kinds: random, expert, fine."""
    num_false: int
    """Number of pairs of a positive and a false negative in all random batches together."""
    apart: float
    """Share of these pairs whose rows have no expert in common, in [0, 1]: they cannot meet in an expert's batch."""

    @property
    def verdict(self) -> str:
        """The result in one sentence."""
        random, expert = self.kinds[:2]
        if expert.false.exceeds(random.false):
            more = f"{expert.false.mean / random.false.mean:.1f} times as many" if random.false.mean else "more"
        elif random.false.exceeds(expert.false):
            more = "fewer"
        else:
            more = "no clear difference"
        parts = [f"{_percent(random.false)}: {more}"]
        if expert.cosine and random.cosine:
            harder = "about as hard"
            if expert.cosine.exceeds(random.cosine):
                harder = "harder"
            elif random.cosine.exceeds(expert.cosine):
                harder = "easier"
            parts.append(
                f"the other negatives are {harder} in an expert's batch, mean cosine {expert.cosine.mean:.3f} against"
                f" {random.cosine.mean:.3f}"
            )
        apart = (
            f"{100 * self.apart:.1f} % of the false negatives of random batches join two experts and cannot meet in a "
            "batch of one"
            if self.num_false
            else "random batches had no false negative"
        )
        return (
            f"In batches of {self.batch_size:,} pairs of one expert, {_percent(expert.false)} of the negatives are "
            f"false (identical caption, or cosine {self.threshold:g} or more), in random batches "
            f"{'; '.join([*parts, apart])}."
        )


def _percent(share: Estimate) -> str:
    low, high = share.interval
    return f"{100 * share.mean:.3g} % (95 %: {100 * max(low, 0):.3g} to {100 * high:.3g})"


def measure_negatives(
    read: Callable[[Int[np.ndarray, " B"]], np.ndarray],
    caption_ids: Int[np.ndarray, " N"],
    fine: Int[np.ndarray, " N"],
    experts: Int[np.ndarray, "N overlap"],
    *,
    batch_size: int = 256,
    num_batches: int = 100,
    threshold: float = DEFAULT_THRESHOLD,
    seed: int = 0,
) -> NegativeReport:
    """Count the false negatives in random batches, in batches of one expert, and in batches of one fine cluster.

    Args:
        read: Returns the embeddings (B, D) of those of the N rows whose positions it is given.
        caption_ids: A number for each row, the same for equal captions.
        fine: Fine cluster of each row.
        experts: Experts of each row.
        batch_size: Pairs of a batch, 2 or more.
        num_batches: Batches of each kind, 1 or more.
        threshold: Cosine from which captions count as saying the same, in (0, 1].
        seed: Decides the batches.

    Raises:
        ModeclipError: An argument is out of its range, or there are fewer than two rows.
    """
    if batch_size < 2 or num_batches < 1 or not 0 < threshold <= 1:
        raise ModeclipError(
            "negatives: expected batches of 2 pairs or more, 1 batch or more and a threshold in (0, 1], "
            f"got {batch_size}, {num_batches} and {threshold}"
        )
    if len(fine) < 2:
        raise ModeclipError(f"negatives: expected 2 rows or more, got {len(fine)}")
    order = np.argsort(fine, kind="stable")
    groups = {
        "random": [np.arange(len(fine))],
        "expert": [np.flatnonzero((experts == k).any(1)) for k in range(int(experts.max()) + 1)],
        "fine": np.split(order, np.flatnonzero(np.diff(fine[order])) + 1),
    }
    num_false = num_apart = 0
    kinds = []
    for position, (kind, rows_of_group) in enumerate(groups.items()):
        usable = [rows for rows in rows_of_group if len(rows) > 1]
        if not usable:
            raise ModeclipError(f"negatives: every group of kind {kind} has a single row: use fewer clusters")
        sizes = np.array([len(rows) for rows in usable])
        random = np.random.default_rng((seed, position))
        values = []
        for chosen in random.choice(len(usable), num_batches, p=sizes / sizes.sum()):
            rows = random.choice(usable[chosen], min(batch_size, sizes[chosen]), replace=False)
            captions = caption_ids[rows]
            first, second, cosine = _false_pairs(read(rows), captions, threshold)
            near = int((captions[first] != captions[second]).sum())
            values.append((len(rows), near / (len(rows) * (len(rows) - 1)), near / len(rows), cosine))
            if kind == "random":
                shared = (experts[rows[first], :, None] == experts[rows[second], None, :]).any((1, 2))
                num_false += len(first)
                num_apart += int((~shared).sum())
        length, near_share, near_per_pair, cosine = np.array(values).T
        identical = identical_share(caption_ids, usable)
        identical_per_pair = identical_share(caption_ids, usable, batch_size=batch_size)
        kinds.append(
            Negatives(
                kind=kind,
                mean_batch_size=float(length.mean()),
                identical=identical,
                false=_estimate(near_share, identical),
                false_per_pair=_estimate(near_per_pair, identical_per_pair),
                cosine=None if np.isnan(cosine).all() else _estimate(cosine[~np.isnan(cosine)]),
            )
        )
    return NegativeReport(
        batch_size=batch_size,
        num_batches=num_batches,
        threshold=threshold,
        num_rows=len(fine),
        kinds=tuple(kinds),
        num_false=num_false,
        apart=num_apart / max(num_false, 1),
    )


def identical_share(
    caption_ids: Int[np.ndarray, " N"], groups: Sequence[Int[np.ndarray, " _"]], *, batch_size: int | None = None
) -> float:
    """Return the exact chance that a pair and a negative of its batch have the same caption.

    Args:
        caption_ids: A number for each row, the same for equal captions.
        groups: Groups of two rows or more that batches are drawn from, each with a chance in proportion to its rows.
        batch_size: Return how many such negatives a pair meets in a batch of so many rows (or all rows of a smaller
            group) instead.

    Examples:
        Two of three rows are equal, which makes one of the three pairs of rows:

        >>> round(identical_share(np.array([7, 7, 9]), [np.arange(3)]), 4)
        0.3333
    """
    total = sum(len(rows) for rows in groups)
    share = 0.0
    for rows in groups:
        counts = np.unique(caption_ids[rows], return_counts=True)[1].astype(np.float64)
        met = 1 if batch_size is None else min(batch_size, len(rows)) - 1
        share += met * len(rows) / total * float((counts * (counts - 1)).sum()) / (len(rows) * (len(rows) - 1))
    return share


def _false_pairs(
    x: np.ndarray, caption_ids: Int[np.ndarray, " B"], threshold: float
) -> tuple[Int[np.ndarray, " F"], Int[np.ndarray, " F"], float]:
    """Return a batch's ordered pairs that are false negatives, and the mean cosine of the others (NaN if none)."""
    x = np.asarray(x, np.float32)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    found, total, count = [], 0.0, 0
    for start in range(0, len(x), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        cosine = x[part] @ x.T
        false = (cosine >= threshold) | (caption_ids[part, None] == caption_ids)
        own = np.arange(len(cosine)), start + np.arange(len(cosine))
        cosine[own], false[own] = 0, False
        found.append(np.argwhere(false) + np.array([start, 0]))
        total += float(cosine.sum(where=~false, dtype=np.float64))
        count += len(cosine) * (len(x) - 1) - len(found[-1])
    first, second = np.concatenate(found).T
    return first, second, total / count if count else math.nan


def _estimate(values: Float[np.ndarray, " n"], counted: float = 0.0) -> Estimate:
    """Return the mean of what batches gave and what was counted beside it."""
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0
    return Estimate(mean=counted + float(values.mean()), standard_error=error, counted=counted)
