"""What a check can find: the kinds with their severity and advice, and the counters that findings come from.

A finding has a severity: an error makes training fail or learn nonsense, a warning costs quality, a note is
to be known.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from modeclip.data.samples import BOMB, EMPTY, MISSING, SHORT_FILE, UNDECODABLE, UNREADABLE

ERROR, WARNING, NOTE = "error", "warning", "note"

CHANGED = "image has other sides than when it was indexed"
DUPLICATE_KEYS = "key occurs more than once"
DUPLICATE_CAPTIONS = "caption occurs more than once"
FREQUENT_CAPTION = "one caption has over 1 % of the pairs"
DUPLICATE_IMAGES = "image occurs more than once"
EMPTY_CAPTION = "caption is empty"
SHORT_CAPTION = "caption is very short"
LONG_CAPTION = "caption is cut by the tokenizer"
UNPRINTABLE = "caption has characters that do not print"
MOJIBAKE = "caption was decoded wrongly (mojibake)"
NOT_FINITE = "caption embedding is not finite"
NOT_UNIT = "caption embedding is not of length 1"

KINDS = {
    MISSING: (ERROR, "bring the file back, or index again"),
    SHORT_FILE: (ERROR, "bring the whole file back, or index again"),
    EMPTY: (ERROR, "bring the image back, or index again"),
    UNREADABLE: (ERROR, "look at the permissions and the disk"),
    UNDECODABLE: (ERROR, "bring the image back, or index again, which leaves it out"),
    BOMB: (ERROR, "index again, which leaves it out, or make the image smaller"),
    CHANGED: (ERROR, "the file was written again: index again"),
    NOT_FINITE: (ERROR, "embed again"),
    NOT_UNIT: (ERROR, "embed again with unit vectors"),
    DUPLICATE_KEYS: (WARNING, "give each pair a key of its own: id lists cannot tell these apart"),
    FREQUENT_CAPTION: (WARNING, "balance or filter: equal captions are false negatives of each other"),
    EMPTY_CAPTION: (WARNING, "index again: pairs without a caption are left out"),
    LONG_CAPTION: (WARNING, "put what matters first, or take a model with a longer context"),
    MOJIBAKE: (WARNING, "mend the encoding at the source (ftfy.fix_text does it)"),
    UNPRINTABLE: (WARNING, "clean the captions at the source"),
    DUPLICATE_IMAGES: (NOTE, "remove repeats if they are not meant as several captions of an image"),
    DUPLICATE_CAPTIONS: (NOTE, "false negatives in a batch; mask them or balance"),
    SHORT_CAPTION: (NOTE, "look whether such captions say anything"),
}
"""Severity of each finding and what to do about it, gravest first."""

TOP = 10
"""Most frequent values that are named."""
PARTS = 16


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong, or worth knowing."""

    severity: str
    """error, warning or note."""
    what: str
    """What was found."""
    count: int
    """Pairs that it holds for."""
    looked_at: int
    """Pairs that were looked at for it."""
    first: str
    """The first example."""
    advice: str
    """What to do."""


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts between edges."""

    edges: tuple[float, ...]
    """Lower edge of each bin; the last bin is open."""
    counts: tuple[int, ...]
    """Values in each bin; what lies under the first edge is in the first bin."""


def format_share(count: int, total: int) -> str:
    """Return a share in percent, never 0 where something was counted.

    Examples:
        >>> format_share(1, 3), format_share(1, 10**6), format_share(0, 5)
        ('33.3 %', '<0.1 %', '0.0 %')
    """
    percent = 100 * count / max(total, 1)
    return "<0.1 %" if 0 < percent < 0.05 else f"{percent:.1f} %"


class Batch(NamedTuple):
    """Consecutive rows of a catalog."""

    start: int
    """Position of the first."""
    keys: Sequence[str] | np.ndarray


class Findings:
    """Counts by kind of finding, with the first example of each."""

    def __init__(self) -> None:
        self._count: Counter[str] = Counter()
        self._looked_at: dict[str, int] = {}
        self._first: dict[str, str] = {}

    def add(self, what: str, count: int, looked_at: int, first: str) -> None:
        """Count pairs.

        Args:
            what: A kind of ``KINDS``.
            count: Pairs that it holds for.
            looked_at: Pairs that are looked at for it in all.
            first: An example; that of the first call is kept.
        """
        if count:
            self._count[what] += count
            self._looked_at[what] = looked_at
            self._first.setdefault(what, " ".join(first.split()))

    def add_rows(
        self, what: str, mask: Bool[np.ndarray, " n"], looked_at: int, batch: Batch, describe: Callable[[int], str]
    ) -> None:
        """Count the pairs of a batch for which a mask holds; ``describe`` says more about one of them."""
        if mask.any():
            row = int(np.argmax(mask))
            first = f"row {batch.start + row:,}, key {batch.keys[row]!r}: {describe(row)}"
            self.add(what, int(mask.sum()), looked_at, first)

    def sorted(self) -> tuple[Finding, ...]:
        """Return the findings in the order of ``KINDS``."""
        return tuple(
            Finding(
                severity=severity,
                what=what,
                count=self._count[what],
                looked_at=self._looked_at[what],
                first=self._first[what],
                advice=advice,
            )
            for what, (severity, advice) in KINDS.items()
            if self._count[what]
        )


class Repeats(NamedTuple):
    """How often values occur."""

    num_distinct: int
    num_repeated: int
    """Rows whose value another row has too."""
    top: list[tuple[int, int]]
    """(count, first row) of the most frequent values, ties by row."""


def count_repeats(hashes: Int[np.ndarray, " N"]) -> Repeats:
    """Count equal values, a sixteenth of them at a time (those whose hash ends alike)."""
    ends = hashes.view(np.uint8)[:: hashes.itemsize]  # the low byte on a little-endian machine, some byte on any
    num_distinct, num_repeated, top = 0, 0, list[tuple[int, int]]()
    for part in range(PARTS):
        rows = np.flatnonzero(ends % PARTS == part)
        values = hashes[rows]
        order = np.argsort(values, kind="stable")  # so that a value's first row leads its run
        values = values[order]
        starts = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]])[: len(values)])
        counts = np.diff(starts, append=len(values))
        first = rows[order[starts]]
        num_distinct += len(starts)
        num_repeated += int(counts[counts > 1].sum())
        best = np.lexsort((first, -counts))[:TOP]
        top += zip(counts[best].tolist(), first[best].tolist(), strict=True)
    return Repeats(num_distinct, num_repeated, heapq.nsmallest(TOP, top, key=lambda pair: (-pair[0], pair[1])))


class HistogramCounter:
    """A histogram in the making."""

    def __init__(self, edges: tuple[float, ...]) -> None:
        self._edges = np.array(edges)
        self._counts = np.zeros(len(edges), np.int64)

    def bins(self, values: np.ndarray) -> Int[np.ndarray, " n"]:
        """Return the bin of each value."""
        return np.maximum(np.searchsorted(self._edges, values, "right") - 1, 0)

    def add(self, values: np.ndarray) -> None:
        """Count values."""
        self._counts += np.bincount(self.bins(values), minlength=len(self._counts))

    def finish(self) -> Histogram:
        """Return the counts so far."""
        return Histogram(edges=tuple(self._edges.tolist()), counts=tuple(self._counts.tolist()))
