"""Counting things over a catalog by their hash: counts of fragments that add up, in as much memory as is allowed.

A key is a 64-bit hash. Among three billion keys one expects a quarter of a pair that share a hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64, Shaped, UInt64

from modeclip.data.mapping import Statistic

KEYS_AT_ONCE = 1 << 26
"""Keys whose totals are in memory at a time: 1 GB, and about twice that while they are sorted."""


def hash_text(text: str) -> int:
    """Return a 64-bit hash that is never 0."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") or 1


def hash_images(block: dict[str, Shaped[np.ndarray, "n *_"]]) -> UInt64[np.ndarray, " n"]:
    """Return a hash of each image: of its bytes or, where these are not known, of where it is."""
    columns = (block["digest"], block["path"], block["offset"].tolist(), block["key"])
    return np.array(
        [
            int.from_bytes(digest[:8], "little")
            if digest is not None
            else hash_text(f"{path} {offset}" if path else key)
            for digest, path, offset, key in zip(*columns, strict=True)
        ],
        np.uint64,
    )


class Counts(Statistic):
    """A statistic that counts keys: ``keys`` ascending, each once, and ``counts``."""

    def counted(self, keys: UInt64[np.ndarray, " n"]) -> dict[str, Shaped[np.ndarray, " k"]]:
        """Return how often each of some keys occurs."""
        each, counts = np.unique(keys, return_counts=True)
        return {"keys": each, "counts": counts.astype(np.int64)}

    def merge(self, parts: Sequence[dict[str, Shaped[np.ndarray, "..."]]]) -> dict[str, Shaped[np.ndarray, "..."]]:
        """Add up the counts of each key."""
        keys, counts = add_counts(*(np.concatenate([part[name] for part in parts]) for name in ("keys", "counts")))
        return {"keys": keys, "counts": counts}


def add_counts(
    keys: UInt64[np.ndarray, " n"], counts: Int64[np.ndarray, " n"]
) -> tuple[UInt64[np.ndarray, " k"], Int64[np.ndarray, " k"]]:
    """Return each key once, ascending, with the sum of its counts."""
    order = np.argsort(keys, kind="stable")
    keys, counts = keys[order], counts[order]
    starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]]) if len(keys) else np.empty(0, np.int64)
    return keys[starts], np.add.reduceat(counts, starts) if len(starts) else counts


Join = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def in_ranges(
    fragments: Iterable[dict[str, Any]], key: str, value: str, join: Join, at_once: int | None = None
) -> Iterator[tuple[UInt64[np.ndarray, " k"], Shaped[np.ndarray, " k"]]]:
    """Yield keys and values of all fragments, joined, one range of keys after the other, ascending.

    Where there are too many for memory, the range ends before the key that is one too many, and the fragments are read
    once more for the next range.

    Args:
        fragments: Arrays by name; they are iterated over once for each range.
        key: Name of the keys.
        value: Name of the values.
        join: Sorts keys with their values, and makes one of those that belong together.
        at_once: Keys in memory, apart from those of one fragment; None: ``KEYS_AT_ONCE``.
    """
    at_once = KEYS_AT_ONCE if at_once is None else at_once
    first, is_last = np.uint64(0), False
    while not is_last:
        end: np.uint64 | None = None
        keys, values = np.empty(0, np.uint64), None
        waiting: list[tuple[np.ndarray, np.ndarray]] = []
        for part in (*fragments, None):
            if part is not None:
                inside = part[key] >= first
                if end is not None:
                    inside &= part[key] < end
                waiting.append((part[key][inside], part[value][inside]))
                if sum(len(some) for some, _ in waiting) < min(at_once, max(len(keys), 1 << 20)):
                    continue  # joining many at once costs less
            if values is not None:
                waiting.append((keys, values))
            if waiting:
                keys, values = join(*(np.concatenate(side) for side in zip(*waiting, strict=True)))
                waiting = []
            if len(keys) > at_once and keys[at_once] > keys[0]:
                end = keys[at_once]
                inside = keys < end
                keys, values = keys[inside], values[inside]  # type: ignore[index]
        if values is not None:
            yield keys, values
        is_last = end is None
        first = first if end is None else end
