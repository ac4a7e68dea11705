"""What one image-caption pair is, the causes for which one is skipped, and how its two halves decode.

A sample names the bytes of its image: held in memory, or lying in a file (a whole one, or a byte range
of a tar shard). What cannot be a sample is a ``Skipped`` with a cause, which its reader counts.

Images become RGB over white. open_clip drops transparency instead, which turns a black drawing on a
transparent ground all black; it also lets Pillow clip 16-bit images to nearly all white.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

# Causes for which a pair is skipped, as they appear in results.
NO_CAPTION = "no caption"
NO_IMAGE = "no image"
NOT_UTF8 = "text is not UTF-8"
NOT_JSON = "caption file is not JSON"
MISSING = "image file is missing"
UNREADABLE = "image file cannot be read"
EMPTY = "image is empty (0 bytes)"
UNDECODABLE = "image does not decode"
BOMB = "image has too many pixels (decompression bomb)"
UNRENDERED = "icon does not render"
BLANK = "icon is blank"
DUPLICATE = "duplicate (same set, name and pixels)"


@dataclass(frozen=True, slots=True)
class Sample:
    """One image-caption pair: the image's bytes, or the file and byte range that hold them."""

    key: str
    caption: str
    image: bytes | None = None
    path: str | None = None
    offset: int = 0
    size: int = -1
    """Number of bytes from ``offset`` on; -1 means the rest of the file."""
    group: str = ""
    """The icon set, the folder or the shard that the pair came from."""

    def read(self) -> bytes:
        """Return the encoded image, from memory or from its file."""
        if self.image is not None:
            return self.image
        if self.path is None:
            raise FileNotFoundError(f"sample {self.key!r} names no image file")
        with Path(self.path).open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True, slots=True)
class Skipped:
    """What could not become a sample: ``cause`` is for counting, ``detail`` for reading."""

    key: str
    cause: str
    detail: str = ""


def read_caption(data: bytes, suffix: str, key: str) -> str | Skipped:
    """Return the caption in the bytes of a .json file (its field "caption") or of any other (all).

    Args:
        data: Contents of the caption file.
        suffix: What its name ends in, without the dot.
        key: Key of the pair, for the ``Skipped`` that is returned where there is no caption.

    Examples:
        >>> read_caption(b'{"caption": "a cat"}', "json", "7")
        'a cat'
        >>> read_caption(b"  ", "txt", "7").cause
        'no caption'
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Skipped(key, NOT_UTF8, f".{suffix}: {error.reason} at byte {error.start}")
    if suffix.rpartition(".")[2] == "json":
        try:
            fields = json.loads(text)
        except ValueError as error:
            return Skipped(key, NOT_JSON, str(error))
        value = fields.get("caption") if isinstance(fields, dict) else None
        text = value if isinstance(value, str) else ""
    return text.strip() or Skipped(key, NO_CAPTION, f".{suffix} holds no caption")


def decode_image(data: bytes) -> Image.Image:
    """Decode an encoded image to RGB; transparent parts become white.

    Raises:
        Exception: The bytes are no image that Pillow can decode; ``cause_of`` names the cause.
    """
    return _to_rgb(Image.open(io.BytesIO(data)))


def measure_image(data: bytes) -> tuple[int, int]:
    """Return (width, height) of an image after decoding it to its last byte.

    Raises:
        Exception: As for ``decode_image``.
    """
    image = Image.open(io.BytesIO(data))
    size = image.size
    image.draft("RGB", (1, 1))  # JPEG: all data are read, but an eighth of the size comes out
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
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return BOMB
    if isinstance(error, OSError) and error.errno is not None:
        return UNREADABLE
    return UNDECODABLE
