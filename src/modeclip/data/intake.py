"""Samples go in; those whose image decodes come out with its size and hash, the others counted by their cause.

Price: one read and one decode of each image, by threads where it lies in a file.
"""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

from PIL import Image

from modeclip.data.samples import EMPTY, HARMLESS, NOT_UTF8, Sample, Skipped, cause_of, hash_image, measure_image
from modeclip.data.sources.options import DataConfig
from modeclip.errors import ModeclipError

CHECK_THREADS = os.cpu_count() or 1
SAMPLES_PER_CHECK = 32
MANY_SKIPPED = 1000
"""Skipped pairs after which too high a share of them is an error before everything was read."""


@dataclass(frozen=True, slots=True)
class Checked:
    """A sample whose image has been decoded, unless the user wants it unopened."""

    sample: Sample
    image: bytes | None
    """What the row holds: nothing where it refers to a file."""
    width: int = 0
    """In pixels; 0: not looked at. So is ``height``."""
    height: int = 0
    digest: bytes | None = None
    """Hash of the encoded image, if that was read."""


def _check(sample: Sample, config: DataConfig) -> Checked | Skipped:
    """Read and decode one image; what fails comes back as the cause."""
    texts = (sample.key, sample.caption, sample.path or "")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        return Skipped(ascii(sample.key), NOT_UTF8, f"{error.reason} in {error.object!a}")
    if not config.check_images and not config.copy_images and sample.image is None:
        return Checked(sample, None)
    try:
        data = sample.read()
        if not data:
            return Skipped(sample.key, EMPTY, sample.path or "")
        width, height = measure_image(data)
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
        return Skipped(sample.key, cause_of(error), re.sub(r" ?<_io[^>]*>", "", str(error)))
    held = data if config.copy_images or sample.path is None else None
    digest = hash_image(data)
    return Checked(sample, held, width, height, digest)


def check_all(stream: Iterator[Sample | Skipped], config: DataConfig, in_memory: bool) -> Iterator[Checked | Skipped]:
    """Check a stream in order; images in files by threads, with a bounded number under way.

    Images in memory are small and just made: there threads would only wait for each other.
    """

    def check_item(item: Sample | Skipped) -> Checked | Skipped:
        return item if isinstance(item, Skipped) else _check(item, config)

    def check_part(part: list[Sample | Skipped]) -> list[Checked | Skipped]:
        return [check_item(item) for item in part]

    if in_memory:
        yield from map(check_item, stream)
        return
    under_way: deque[Future[list[Checked | Skipped]]] = deque()
    with ThreadPoolExecutor(CHECK_THREADS) as pool:
        while part := list(islice(stream, SAMPLES_PER_CHECK)):
            under_way.append(pool.submit(check_part, part))
            if len(under_way) > 2 * CHECK_THREADS:
                yield from under_way.popleft().result()
        while under_way:
            yield from under_way.popleft().result()


@contextmanager
def strict_pillow() -> Iterator[None]:
    """Make Pillow raise for a decompression bomb and keep silent about metadata it cannot read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


class Skips:
    """Counts of what was skipped by cause, with the first example of each."""

    def __init__(self, config: DataConfig, causes: Mapping[str, int]) -> None:
        self.causes: Counter[str] = Counter(causes)
        self.num_seen = 0
        self._first: dict[str, Skipped] = {}
        self._config = config
        self._num_damaged = 0

    def add(self, skipped: Skipped) -> None:
        """Count one; raise when they are too many, whatever may still come."""
        self.causes[skipped.cause] += 1
        self._first.setdefault(skipped.cause, skipped)
        if skipped.cause not in HARMLESS:
            self._num_damaged += 1
            if self._num_damaged % MANY_SKIPPED == 0:
                self.stop_if_too_many()

    def stop_if_too_many(self) -> None:
        """Raise when more than ``max_skipped_fraction`` of what was seen cannot be used."""
        if self._num_damaged > self._config.max_skipped_fraction * self.num_seen:
            raise ModeclipError(
                f"data.source {self._config.source!r}: {self._num_damaged:,} of {self.num_seen:,} pairs cannot"
                f" be used, more than data.max_skipped_fraction {self._config.max_skipped_fraction};"
                f" stopped there: {self}; mend the data or raise data.max_skipped_fraction"
            )

    def __str__(self) -> str:
        return (
            "; ".join(
                f"{cause} {self.causes[cause]:,} (first: {first.key!r}, {' '.join(first.detail.split())})"
                for cause, first in self._first.items()
            )
            or "none"
        )
