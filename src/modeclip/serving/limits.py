"""What a client may ask of a service, checked before anything is decoded or computed.

A picture comes as base64, alone or as a data URL. Its size in bytes is known from the text, its pixels and frames from
its header; only then is it decoded. No address and no path is ever followed.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modeclip.data.prompts import check_texts
from modeclip.data.samples import BOMB
from modeclip.errors import ModeclipError, check_above_zero, check_least

if TYPE_CHECKING:
    from PIL.Image import Image

PLACES = ("http:", "https:", "file:", "ftp:", "s3:")
FORMATS = frozenset({"AVIF", "BMP", "GIF", "JPEG", "MPO", "PNG", "PPM", "TIFF", "WEBP"})
"""Formats of pictures by Pillow's names; others, such as EPS, start programs or are hardly tested."""


class RefusedError(ModeclipError):
    """A request is not answered; ``status`` is HTTP's, and ``retry_after`` says when to come again, in seconds."""

    def __init__(self, message: str, status: int = 400, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The most that one request may hold."""

    max_bytes: int = 32_000_000
    """Bytes of a request."""
    max_image_bytes: int = 16_000_000
    """Bytes of an encoded picture."""
    max_pixels: int = 50_000_000
    """Pixels of all pictures of a request."""
    max_frames: int = 1000
    """Frames of an animated picture, of which the first is taken."""
    max_images: int = 64
    """Pictures of a request."""
    max_texts: int = 1024
    """Texts of a request, class names left out."""
    max_classes: int = 10_000
    """Class names of a request, times its templates."""
    max_letters: int = 2000
    """Letters of a text."""
    max_hits: int = 1000
    """Images that a search returns."""
    max_waiting: int = 256
    """Requests under way, and pictures that wait for the model; whoever comes then is told to come again."""
    timeout_seconds: float = 60.0
    """How long a request may take to arrive, and again to be answered."""
    cache_megabytes: int = 256
    """Memory for vectors of texts and lists of classes that may be asked again, in units of 10^6 bytes."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        names = ["max_bytes", "max_image_bytes", "max_pixels", "max_frames", "max_images", "max_texts", "max_classes"]
        names += ["max_letters", "max_hits", "max_waiting"]
        check_least("serve", self, **dict.fromkeys(names, 1), cache_megabytes=0)
        check_above_zero("serve", self, "timeout_seconds")

    def check_texts(self, what: str, texts: Sequence[str], most: int | None = None) -> None:
        """Refuse too many texts, texts that are too long, and empty ones."""
        most = self.max_texts if most is None else most
        if len(texts) > most:
            raise RefusedError(f"{what}: expected at most {most:,}, got {len(texts):,}", 413)
        check_texts(texts, what)
        for number, text in enumerate(texts):
            if not text.strip():
                raise RefusedError(f"{what}[{number}] is empty; write some words", 422)
            if len(text) > self.max_letters:
                raise RefusedError(
                    f"{what}[{number}] has {len(text):,} letters, expected at most {self.max_letters:,}", 413
                )

    def check_classes(self, classes: Sequence[str], templates: Sequence[str], own: Sequence[str] = ()) -> None:
        """Refuse a list of classes that is empty, or too long with the templates of a request.

        Args:
            classes: The classes.
            templates: Prompts that the client gives.
            own: Prompts of the model, which are filled where the client gives none.
        """
        if not classes:
            raise RefusedError("classes: expected at least one name, got none", 422)
        self.check_texts("templates", templates)
        self.check_texts("classes", classes, self.max_classes // max(1, len(templates or own)))

    def check_distinct(self, classes: Sequence[str]) -> None:
        """Refuse a list of classes that names one twice, whose probability would be split."""
        if len(set(classes)) < len(classes):
            twice = next(name for name, count in Counter(classes).items() if count > 1)
            raise RefusedError(f"classes: {twice!r} stands there twice; name each class once", 422)

    def read_base64(self, what: str, text: str) -> bytes:
        """Return the bytes of a picture in base64, alone or as a data URL.

        Raises:
            RefusedError: It is an address, is too large, or no base64.
        """
        start = text[:64].lstrip().lower()
        if start.startswith(PLACES):
            raise RefusedError(
                f"{what}: addresses are never fetched; send the picture as a data URL (data:image/png;base64,...)", 422
            )
        if start.startswith("data:"):
            head, comma, text = text.partition(",")
            if not comma or not head.rstrip().lower().endswith(";base64"):
                raise RefusedError(f"{what}: expected a data URL in base64 (data:image/png;base64,...)", 422)
        if len(text) > self.max_image_bytes * 3 // 2 + 8:  # a third more, and line breaks
            raise RefusedError(f"{what}: expected at most {self.max_image_bytes:,} bytes of picture", 413)
        try:
            return base64.b64decode("".join(text.split()), validate=True)
        except (binascii.Error, ValueError):
            raise RefusedError(f"{what}: no base64; send the bytes of an image file in base64", 422) from None

    def measure(self, what: str, data: bytes) -> int:
        """Return the pixels of an encoded picture, from its header.

        Raises:
            RefusedError: It is too large, or no picture in one of `FORMATS`.
        """
        from PIL import Image

        from modeclip.data.images import cause_of, strict_pillow

        if len(data) > self.max_image_bytes:
            raise RefusedError(f"{what}: {len(data):,} bytes, expected at most {self.max_image_bytes:,}", 413)
        if not data:
            raise RefusedError(f"{what} is empty; send the bytes of an image file", 422)
        try:
            with strict_pillow(), Image.open(io.BytesIO(data)) as image:
                kind, pixels = image.format, image.width * image.height
                if pixels > self.max_pixels:
                    raise RefusedError(f"{what}: {pixels:,} pixels, expected at most {self.max_pixels:,}", 413)
                if kind not in FORMATS:
                    raise RefusedError(f"{what}: is {kind}; expected one of {', '.join(sorted(FORMATS))}", 422)
                frames = int(getattr(image, "n_frames", 1))
        except RefusedError:
            raise
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
            cause = cause_of(error)
            status = 413 if cause == BOMB else 422
            raise RefusedError(f"{what}: no picture ({cause}); send a PNG, JPEG or WebP file", status) from None
        if frames > self.max_frames:
            raise RefusedError(f"{what}: {frames:,} frames, expected at most {self.max_frames:,}", 413)
        return pixels

    def decode(self, what: str, data: bytes) -> Image:
        """Decode a picture whose header was looked at.

        Raises:
            RefusedError: Its bytes are damaged.
        """
        from modeclip.data.images import cause_of, decode_image, strict_pillow

        try:
            with strict_pillow():
                return decode_image(data)
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
            raise RefusedError(f"{what}: no picture ({cause_of(error)}); send a PNG, JPEG or WebP file", 422) from None
