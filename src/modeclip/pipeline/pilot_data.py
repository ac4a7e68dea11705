"""The pairs of a pilot: a random sample of a source, whatever its size, and what its held-out part asks.

The pairs of the source are counted for some seconds. Of one with too many parts to be read, random parts are read; of
these each pair is drawn by the hash of its part and key, so that the order of reading plays no part.

Two questions are made of the held-out pairs. In *retrieval*, each distinct caption searches its image among all, and
each image its caption. In *class names*, images whose caption holds exactly one of the user's names are classified
among all names. A longer name hides the shorter ones in it: "shopping cart" is no "cart".

Price: a look of `LOOK_SECONDS`, and one read of the parts that are drawn from.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int

from modeclip.data.catalog import Catalog
from modeclip.data.holdout import HOLDOUT, is_drawn
from modeclip.data.samples import Sample, Skipped
from modeclip.data.sources import DataSource, SourcePart
from modeclip.data.tasks.task import CatalogImages, Task, catalog_retrieval

LOOK_SECONDS = 10.0
"""How long the pairs of a source are counted."""
RETRIEVAL, CLASS_NAMES = "retrieval", "class names"
"""Names of the two tasks."""
MOST_QUERIES = 2000
"""Most captions of the retrieval task: more make every recall smaller and tell little more."""
MOST_BYTES = 1 << 28
"""Images of a part that are kept in memory between two readings of it: some sources draw them, which takes time."""
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True, kw_only=True)
class SampledSource:
    """A source of which only some pairs are read."""

    source: DataSource
    """The source with the parts that are read, each of which yields the pairs that were drawn."""
    num_pairs: int
    """Pairs of the whole source, extrapolated where not all were counted."""
    is_counted: bool
    """Whether all were counted."""


def sample_source(source: DataSource, wanted: int, *, seconds: float, seed: int) -> SampledSource:
    """Return a source that yields about so many of its pairs.

    Args:
        source: An opened source.
        wanted: Number of pairs.
        seconds: About how long the reading of them may take.
        seed: Decides which pairs are drawn.
    """
    count, finished, started = 0, 0, time.monotonic()
    for part in source.parts:
        for item in part.read():
            count += isinstance(item, Sample)
            if time.monotonic() - started > LOOK_SECONDS:
                break
        else:
            finished += 1
            continue
        break
    rate = max(count, 1) / max(time.monotonic() - started, 1e-3)
    is_counted, num_parts = finished == len(source.parts), len(source.parts)
    num_pairs = count if is_counted else round(count * num_parts / (finished + 0.5))
    share = min(1.0, rate * seconds / max(num_pairs, 1))
    number = min(num_parts, max(1, math.ceil(share * num_parts)))
    drawn = sorted(np.random.default_rng(seed).permutation(num_parts)[:number].tolist())
    fraction = wanted / max(num_pairs * number / num_parts, 1)
    parts = tuple(_drawn(source.parts[place], fraction, seed) for place in drawn)
    return SampledSource(source=replace(source, parts=parts), num_pairs=num_pairs, is_counted=is_counted)


def _drawn(part: SourcePart, fraction: float, seed: int) -> SourcePart:
    """Return a part that yields a fraction of its pairs, those among them that cannot be used included."""
    kept: list[Sample | Skipped] = []

    def read() -> Iterator[Sample | Skipped]:
        if kept:
            yield from kept
            return
        found, size = list[Sample | Skipped](), 0
        for item in part.read():
            is_whole_part = isinstance(item, Skipped) and item.key == part.name
            if is_whole_part or is_drawn(f"pilot {part.name} {item.key}".encode(), fraction, seed):
                yield item
                size += len(item.image or b"") if isinstance(item, Sample) else 0
                found += [item] if size <= MOST_BYTES else []
        kept.extend(found if size <= MOST_BYTES else ())

    return replace(part, read=read)


def held_out_tasks(held: Catalog, classnames: Sequence[str], *, seed: int) -> tuple[Task, Task | None]:
    """Return the retrieval task of held-out pairs, and the classification among class names; None where none has one.

    Args:
        held: Catalog of what is held out.
        classnames: The user's class names; there may be none.
        seed: Decides which captions search where there are too many.
    """
    rows = np.flatnonzero(held.read(["task"])["task"] == HOLDOUT)
    captions = held.read(["caption"], rows)["caption"].astype(str)
    _, first = np.unique(captions, return_index=True)
    if len(first) > MOST_QUERIES:
        first = np.random.default_rng(seed).choice(first, MOST_QUERIES, replace=False)
    retrieval = catalog_retrieval(held, rows[np.sort(first)], RETRIEVAL)
    label = match_classes(captions.tolist(), classnames)
    chosen = label >= 0
    if not chosen.any():
        return retrieval, None
    classes = Task(
        name=CLASS_NAMES,
        kind="classification",
        images=CatalogImages(catalog=held, rows=rows[chosen]),
        classnames=tuple(classnames),
        labels=label[chosen],
        source=held.path,
    )
    return retrieval, classes


def match_classes(captions: Sequence[str], classnames: Sequence[str]) -> Int[np.ndarray, " N"]:
    """Return for each caption which one class name it holds, as whole words in any case; -1 for none and for several.

    Examples:
        >>> match_classes(["A red Shopping-Cart", "cart and dog", "carts"], ["cart", "shopping cart", "dog"]).tolist()
        [1, -1, -1]
    """
    names: dict[tuple[str, ...], int] = {}
    for index, name in enumerate(classnames):
        names.setdefault(_words(name), index)
    names.pop((), None)
    longest = max(map(len, names), default=0)
    labels = np.full(len(captions), -1, np.int64)
    for row, caption in enumerate(captions):
        words, found, place = _words(caption), set[int](), 0
        while place < len(words):
            lengths = range(min(longest, len(words) - place), 0, -1)
            taken = next((length for length in lengths if words[place : place + length] in names), 0)
            if taken:
                found.add(names[words[place : place + taken]])
            place += taken or 1
        if len(found) == 1:
            labels[row] = found.pop()
    return labels


def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text.casefold()))
