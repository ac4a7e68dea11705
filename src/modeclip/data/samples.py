"""What one image-caption pair is, and the causes for which a pair is skipped.

A sample names the bytes of its image: they are in memory, or in a file (the whole file, or a byte range of a tar
shard) on this machine or in an object store. What cannot become a sample is a ``Skipped`` with a cause, which whoever
reads the source counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from modeclip.system.paths import read_bytes

# Causes for which a pair, or a whole part of a source, is skipped, as they appear in results.
NO_CAPTION = "no caption"
EMPTY_CAPTION = "caption is empty"
NO_IMAGE = "no image"
NOT_UTF8 = "text is not UTF-8"
NOT_JSON = "caption file is not JSON"
MISSING = "image file is missing"
UNREADABLE = "image file cannot be read"
EMPTY = "image is empty (0 bytes)"
UNDECODABLE = "image does not decode"
CHANGED = "image has changed"
SHORT_FILE = "image file is shorter than recorded"
BOMB = "image has too many pixels (decompression bomb)"
NOT_DOWNLOADED = "image was not downloaded (img2dataset)"
UNRENDERED = "icon does not render"
BLANK = "icon is blank"
DUPLICATE = "duplicate (same set, name and pixels)"
DAMAGED_SHARD = "tar shard is damaged"
COMPRESSED_SHARD = "tar shard is compressed"
MISSING_SHARD = "tar shard is missing"
DAMAGED_TABLE = "table file is damaged"
MISSING_TABLE = "table file is missing"

HARMLESS = frozenset({DUPLICATE, NOT_DOWNLOADED})
"""Causes that say nothing against the data."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One image-caption pair: the image's bytes, or the file and byte range that hold them."""

    key: str
    caption: str
    image: bytes | None = None
    path: str | None = None
    """A file, or its address in an object store."""
    offset: int = 0
    size: int = -1
    """Number of bytes from ``offset`` on; -1 means the rest of the file."""
    group: str = ""
    """The icon set, the folder or the shard that the pair came from."""
    extra: Mapping[str, object] = field(default_factory=dict)
    """Values of further columns, by name."""

    def read(self) -> bytes:
        """Return the encoded image, from memory, its file or its object store."""
        if self.image is not None:
            return self.image
        if self.path is None:
            raise FileNotFoundError(f"sample {self.key!r} names no image file")
        return read_bytes(self.path, self.offset, self.size)


@dataclass(frozen=True, slots=True)
class Skipped:
    """What could not become a sample: ``cause`` is for counting, ``detail`` for reading."""

    key: str
    cause: str
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class CaptionRule:
    """How captions are taken from the bytes of a text or json file."""

    field: str = "caption"
    """json: the field that holds a caption, or a list of captions or of [key, text] pairs."""
    text_keys: frozenset[str] = frozenset()
    """json: keys of pairs that count; none means all."""
    lines: bool = False
    """Text: every line is a caption."""

    def read(self, data: bytes, suffix: str, key: str) -> list[str] | Skipped:
        """Return the captions of a file, at least one, none of them blank or there twice.

        Args:
            data: Contents of the file.
            suffix: What its name ends in, without the dot; json decides how it is read.
            key: Key of the pair, for the ``Skipped`` that is returned where there is no caption.

        Examples:
            >>> CaptionRule().read(b'{"texts": [["alt", "a cat"], ["title", "Tom"]]}', "json", "7")
            ['a cat', 'Tom']
            >>> CaptionRule().read(b"  ", "txt", "7").cause
            'caption is empty'
        """
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            return Skipped(key, NOT_UTF8, f".{suffix}: {error.reason} at byte {error.start}")
        if suffix != "json" and not suffix.endswith(".json"):
            return clean_captions(text.splitlines() if self.lines else [text]) or Skipped(
                key, EMPTY_CAPTION, f".{suffix} holds no text"
            )
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            return Skipped(key, NOT_JSON, str(error))
        value = fields.get(self.field, fields.get("texts")) if isinstance(fields, dict) else None
        if not isinstance(value, str | list):
            return Skipped(key, NO_CAPTION, f".{suffix} has no field {self.field!r} that holds text")
        texts = [value] if isinstance(value, str) else [text for item in value for text in self._texts(item)]
        return clean_captions(texts) or Skipped(key, EMPTY_CAPTION, f".{suffix} has no text in {self.field!r}")

    def _texts(self, item: object) -> list[str]:
        match item:
            case str():
                return [item]
            case [str(key), str(text)] if not self.text_keys or key in self.text_keys:
                return [text]
        return []


def clean_captions(texts: Iterable[str]) -> list[str]:
    """Return the texts without the space around them, without blank ones and repeats."""
    return [text for text in dict.fromkeys(text.strip() for text in texts) if text]


def samples_of(captions: Sequence[str], key: str, **where: Any) -> Iterator[Sample]:
    """Yield a sample for every caption of an image; the second has the key "k#1", and so on.

    Args:
        captions: The captions.
        key: Key of the first.
        where: The other fields of the samples.
    """
    for number, caption in enumerate(captions):
        yield Sample(f"{key}#{number}" if number else key, caption, **where)
