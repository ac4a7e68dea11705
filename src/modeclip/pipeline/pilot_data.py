"""The pairs of a pilot: a random sample of a source, whatever its size, and what its held-out part asks.

The parts of the source are looked at in random order, for a tenth of the pilot's time at most. Of all pairs that were
reached, those with the smallest hashes of part and key are taken, so that the order of reading plays no part.

Two questions are made of the held-out pairs. In *retrieval*, each distinct caption searches its image among all, and
each image its caption. In *class names*, images whose caption holds exactly one of the user's names are classified
among all names (`modeclip.data.tasks.names`).

Price: a read of the source without its images, where these lie in files; 8 bytes for each pair, and 256 MB. What does
not fit into these is read again to be indexed.
"""

from __future__ import annotations

import hashlib
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import numpy as np

from modeclip.data.catalog import Catalog
from modeclip.data.holdout import HOLDOUT
from modeclip.data.samples import Sample, Skipped
from modeclip.data.sources import DataSource, SourcePart
from modeclip.data.tasks.names import names_task
from modeclip.data.tasks.task import Task, catalog_retrieval
from modeclip.system.console import progress

RETRIEVAL = "retrieval"
"""Name of the task."""
MOST_QUERIES = 2000
"""Most captions of the retrieval task: more make every recall smaller and tell little more."""
MOST_BYTES, BYTES_OF_ITEM = 1 << 28, 512
"""Memory for what was looked at, so that it need not be read again (some sources draw their images, which takes time),
and what a pair takes besides its image."""


@dataclass(frozen=True, kw_only=True)
class SampledSource:
    """A source of which only some pairs are read."""

    source: DataSource
    """The source with the parts that are read, each of which yields the pairs that were drawn."""
    num_pairs: int
    """Pairs of the whole source, extrapolated from the parts that were counted where these are not all."""
    is_counted: bool
    """Whether all were counted."""


def sample_source(source: DataSource, wanted: int, *, seconds: float, seed: int) -> SampledSource:
    """Return a source that yields so many of its pairs, or all if they are fewer.

    Args:
        source: An opened source.
        wanted: Number of pairs.
        seconds: How long its parts are looked at, in random order; what is not reached by then is left out.
        seed: Decides which pairs are drawn.
    """
    end, order = time.monotonic() + seconds, np.random.default_rng(seed).permutation(len(source.parts)).tolist()
    items: dict[int, Callable[[], Iterable[Sample | Skipped]]] = {}
    draws, in_whole_parts, num_whole, size = array("Q"), 0, 0, 0
    with progress("look at the source", None, "pairs") as advance:
        for place in order:
            part, kept, number = source.parts[place], list[Sample | Skipped](), 0
            for item in part.read():
                number += 1
                if isinstance(item, Sample):
                    draws.append(_draw(part, item.key, seed))
                    advance(1)
                size += BYTES_OF_ITEM + len((isinstance(item, Sample) and item.image) or b"")
                kept += [item] if size <= MOST_BYTES else []
                if time.monotonic() > end:
                    break
            else:
                num_whole, in_whole_parts = num_whole + 1, len(draws)
            is_kept = len(kept) == number
            items[place] = partial(iter, kept) if is_kept else partial(_first, part, number)
            if time.monotonic() > end:
                break
    num_parts = len(source.parts)
    is_counted = num_whole == num_parts
    expected = round(in_whole_parts * num_parts / num_whole) if num_whole else len(draws)
    limit = 2**64
    if len(draws) > wanted:
        ordered = np.frombuffer(draws, np.uint64)
        ordered.partition(wanted - 1)  # in their place
        limit = int(ordered[wanted - 1])
    parts = tuple(_drawn(source.parts[place], items[place], limit, seed) for place in sorted(items))
    return SampledSource(
        source=replace(source, parts=parts), num_pairs=max(expected, len(draws)), is_counted=is_counted
    )


def _first(part: SourcePart, number: int) -> Iterator[Sample | Skipped]:
    """Read a part again as far as it was looked at."""
    return islice(part.read(), number)


def _draw(part: SourcePart, key: str, seed: int) -> int:
    """Return a number of 64 bits that a pair is drawn by, the smallest first."""
    name = f"{part.name} {key}".encode(errors="surrogatepass")  # a file's name that is not UTF-8: index tells of it
    digest = hashlib.blake2b(name, digest_size=8, key=seed.to_bytes(8))
    return int.from_bytes(digest.digest())


def _drawn(part: SourcePart, items: Callable[[], Iterable[Sample | Skipped]], limit: int, seed: int) -> SourcePart:
    """Return a part that yields the pairs drawn up to a number, and the same share of those that cannot be used."""

    def read() -> Iterator[Sample | Skipped]:
        for item in items():
            is_whole_part = isinstance(item, Skipped) and item.key == part.name
            if is_whole_part or _draw(part, item.key, seed) <= limit:
                yield item

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
    return retrieval, names_task(held, rows, classnames)
