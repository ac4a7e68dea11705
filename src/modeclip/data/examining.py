"""Rows of a catalog go in; each image, read and decoded to its last byte, comes out: its sides, or why it is unusable.

Price: one read and one decode of each image, by threads. Memory: a bounded number of images.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from modeclip.data.catalog import Catalog
from modeclip.data.samples import EMPTY, Sample, cause_of, measure_image

SHORT_FILE = "image file is shorter than recorded"
BLOCK = 64  # images in memory at a time, for each thread


class Examined(NamedTuple):
    """What came of reading and decoding one image."""

    cause: str
    """Why it cannot be used; empty if it can."""
    detail: str
    width: int
    height: int
    digest: int


def examine(sample: Sample) -> Examined:
    """Read an image and decode it to its last byte."""
    try:
        data = sample.read()
        if sample.path is not None and len(data) < sample.size:
            return Examined(SHORT_FILE, f"{len(data)} of {sample.size} bytes", 0, 0, 0)
        if not data:
            return Examined(EMPTY, "", 0, 0, 0)
        width, height = measure_image(data)
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
        return Examined(cause_of(error), str(error).split(" <_io")[0], 0, 0, 0)
    return Examined("", "", width, height, hash(data))


def examine_all(
    catalog: Catalog, rows: Int[np.ndarray, " n"] | None, threads: int
) -> Iterator[tuple[int, Sample, tuple[int, int], Examined]]:
    """Read and decode images in threads, in order, a bounded number under way."""
    columns = ("key", "image", "path", "offset", "size", "width", "height")

    def blocks() -> Iterator[tuple[Iterable[int], dict[str, np.ndarray]]]:
        if rows is None:
            start = 0
            for block in catalog.batches(columns, BLOCK):
                yield range(start, start + len(block["key"])), block
                start += len(block["key"])
        else:
            for part in np.array_split(rows, -(-len(rows) // BLOCK)):
                yield part.tolist(), catalog.read(columns, part)

    def examine_block(
        numbers: Iterable[int], block: dict[str, np.ndarray]
    ) -> list[tuple[int, Sample, tuple[int, int], Examined]]:
        values = (block[name].tolist() for name in columns)
        samples = [
            (row, Sample(key, "", image, path, offset, size), (width, height))
            for row, key, image, path, offset, size, width, height in zip(numbers, *values, strict=True)
        ]
        return [(row, sample, sides, examine(sample)) for row, sample, sides in samples]

    under_way: deque[Future[list[tuple[int, Sample, tuple[int, int], Examined]]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for numbers, block in blocks():
            under_way.append(pool.submit(examine_block, numbers, block))
            if len(under_way) > threads:
                yield from under_way.popleft().result()
        while under_way:
            yield from under_way.popleft().result()
