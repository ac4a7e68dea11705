"""Everything that modeclip does with encoded images: decode, measure, hash and examine them.

Images become RGB on a white ground. open_clip drops transparency instead, which turns a black drawing on a transparent
ground all black; it also lets Pillow clip 16-bit images to nearly all white.

Pillow's decoders raise nearly any exception on damaged bytes. ``cause_of`` turns an exception into the cause under
which the image is counted, and ``examine`` never raises.

Price: decoding dominates; threads share it, because Pillow releases the interpreter's lock.
"""

from __future__ import annotations

import io
import os
import re
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from hashlib import blake2b
from typing import TypeVar

import numpy as np
from PIL import Image

from modeclip.data.samples import (
    BOMB,
    CHANGED,
    EMPTY,
    MISSING,
    SHORT_FILE,
    UNDECODABLE,
    UNREADABLE,
    Sample,
)
from modeclip.errors import ModeclipError
from modeclip.system.console import progress

HASHES_PER_TASK = 256
"""Images that a thread hashes before it reports them to the progress bar."""
MANY_IMAGES = 4096
"""From this number of images on, hashing shows a progress bar."""

T = TypeVar("T")
R = TypeVar("R")


class ChangedError(Exception):
    """The bytes of an image differ from those that were indexed."""


@contextmanager
def strict_pillow() -> Iterator[None]:
    """Make Pillow raise on a decompression bomb and keep silent about metadata that it cannot read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def decode_image(data: bytes) -> Image.Image:
    """Decode an encoded image to RGB; transparent parts become white.

    Raises:
        Exception: Pillow cannot decode the bytes; ``cause_of`` names the cause.
    """
    return _to_rgb(Image.open(io.BytesIO(data)))


def measure_image(data: bytes) -> tuple[int, int]:
    """Return (width, height) in pixels of an image after decoding it to its last byte.

    Raises:
        Exception: As for ``decode_image``.
    """
    image = Image.open(io.BytesIO(data))
    size = image.size
    image.draft("RGB", (1, 1))  # a JPEG is still read to its end, but decoded at an eighth of its size
    _to_rgb(image)
    return size


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def cause_of(error: Exception) -> str:
    """Return the cause under which an exception from reading or decoding an image is counted."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return MISSING
    if isinstance(error, ChangedError):
        return CHANGED
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return BOMB
    if isinstance(error, ModeclipError) or (isinstance(error, OSError) and error.errno is not None):
        return UNREADABLE
    return UNDECODABLE


# ---------------------------------------------------------------- hashes


def hash_image(data: bytes) -> bytes:
    """Return the 16-byte hash of an encoded image, as the catalog's column ``digest`` holds it."""
    return blake2b(data, digest_size=16).digest()


def hash_parts(name: str, count: int, hash_some: Callable[[range], list[bytes]]) -> list[bytes]:
    """Hash images in threads, with a progress bar where there are many.

    Args:
        name: What the images belong to, for the progress bar.
        count: Number of images.
        hash_some: Returns the hashes of a range of images.
    """
    parts = [range(start, min(start + HASHES_PER_TASK, count)) for start in range(0, count, HASHES_PER_TASK)]
    found: list[bytes] = []
    bar = progress(f"hash {name}", count, "images") if count >= MANY_IMAGES else nullcontext()
    with bar as advance, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for part in pool.map(hash_some, parts):
            found += part
            if advance is not None:
                advance(len(part))
    return found


# ---------------------------------------------------------------- examining


@dataclass(frozen=True, slots=True)
class Examined:
    """A sample, with what reading and decoding its image has shown."""

    sample: Sample
    cause: str = ""
    """Why the image cannot be used; empty if it can."""
    detail: str = ""
    """What a person would want to know beside the cause."""
    width: int = 0
    """Width in pixels; 0 if the image was not decoded."""
    height: int = 0
    """Height in pixels; 0 if the image was not decoded."""
    digest: bytes | None = None
    """Hash of the encoded image, if it was read."""
    image: bytes | None = None
    """The encoded image, if it is to be kept."""


def examine(sample: Sample, keep: bool = False) -> Examined:
    """Read an image and decode it to its last byte; a failure is a cause, never an exception.

    Args:
        sample: Names the image.
        keep: Keep the encoded image even where the sample refers to a file.
    """
    try:
        data = sample.read()
        if sample.path is not None and len(data) < sample.size:
            return Examined(sample, SHORT_FILE, f"{len(data)} of {sample.size} bytes")
        if not data:
            return Examined(sample, EMPTY)
        width, height = measure_image(data)
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
        return Examined(sample, cause_of(error), re.sub(r" ?<_io[^>]*>", "", str(error)))
    return Examined(sample, "", "", width, height, hash_image(data), data if keep or sample.path is None else None)


def examine_all(blocks: Iterable[Sequence[Sample]], threads: int) -> Iterator[Examined]:
    """Read and decode the images of blocks of samples in threads, and yield what ``examine`` returns in their order."""

    def examine_block(block: Sequence[Sample]) -> list[Examined]:
        return [examine(sample) for sample in block]

    with ThreadPoolExecutor(threads) as pool:
        for examined in map_in_order(pool, examine_block, blocks, threads):
            yield from examined


def map_in_order(pool: Executor, work: Callable[[T], R], items: Iterable[T], num_ahead: int) -> Iterator[R]:
    """Yield the results of some work in the order of its items, with a bounded number of them under way.

    Args:
        pool: Threads or processes that do the work.
        work: What to do with each item.
        items: Consumed only as fast as the results are.
        num_ahead: Most items that are handed in before the first result is waited for.
    """
    under_way: deque[Future[R]] = deque()
    for item in items:
        under_way.append(pool.submit(work, item))
        if len(under_way) > num_ahead:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()
