"""How images and captions in files belong together: suffixes, caption files, captions of classes.

Folders and shards share these rules: images and captions that have the same name are pairs, a caption is a text file or
a field of a JSON file, and an image without a caption file may get one from the name of its class.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from modeclip.data.prompts import PLACE, fill
from modeclip.data.samples import EMPTY_CAPTION, NO_CAPTION, NOT_JSON, NOT_UTF8, Sample, Skipped
from modeclip.errors import ModeclipError

COMMON_KEYS = "jpg;jpeg;png;webp;gif;bmp"
"""The default of ``data.image_keys``, by which catalogs know how they were made; so it does not grow."""
RARE_SUFFIXES = ("tif", "tiff", "ppm", "pgm", "pbm", "pnm", "jfif", "avif", "jp2")
"""Suffixes of images that come behind the default ones."""


@dataclass(frozen=True, kw_only=True)
class FileOptions:
    """How images and captions are found in folders and shards, and how captions are read."""

    image_keys: str = COMMON_KEYS
    """Folders and shards: suffixes of images; the first one that is found counts. The default includes tif, tiff, ppm,
    pgm, pbm, pnm, jfif, avif and jp2. In shards a name may have dots before the suffix."""
    caption_keys: str = "txt;json"
    """Folders and shards: suffixes of captions; the first one that is found counts."""
    caption_field: str = "caption"
    """Field of a .json file that holds the caption or a list of captions: strings, or pairs of key and text as in
    MetaCLIP. A file without this field is searched for `texts`."""
    text_keys: str = ""
    """Keys that count in lists of pairs of key and text, such as `text;alt`; by default all."""
    caption_lines: bool = False
    """Treat every line of a .txt file as a caption of its own."""
    class_template: str = "a photo of a {}."
    """Caption of an image that has no caption file and lies in a class's sub-folder; {} stands for the class."""

    def __post_init__(self) -> None:
        for name in ("image_keys", "caption_keys"):
            if not split_keys(value := getattr(self, name)):
                raise ModeclipError(f"data.{name}: expected suffixes such as 'a;b', got {value!r}")
        if not self.caption_field.strip():
            raise ModeclipError(f"data.caption_field: expected a name, got {self.caption_field!r}")
        if len(PLACE.findall(self.class_template)) != 1:
            raise ModeclipError(f"data.class_template: expected one {{}} for the class, got {self.class_template!r}")

    @cached_property
    def image_suffixes(self) -> tuple[str, ...]:
        """Suffixes of images, in lower case and without dots."""
        return split_keys(self.image_keys) + (RARE_SUFFIXES if self.image_keys == COMMON_KEYS else ())

    @cached_property
    def caption_suffixes(self) -> tuple[str, ...]:
        """Suffixes of captions, in lower case and without dots."""
        return split_keys(self.caption_keys)

    def class_caption(self, name: str) -> str:
        """Return the caption of an image of a class."""
        return fill(self.class_template, name.replace("_", " ").strip())

    def read_captions(self, data: bytes, suffix: str, key: str) -> list[str] | Skipped:
        """Return the captions in a text or JSON file: at least one, all different, none of them blank.

        Args:
            data: Contents of the file.
            suffix: End of its name without the dot; it tells JSON from text.
            key: Key of the pair, for the ``Skipped`` that is returned if there is no caption.

        Examples:
            >>> FileOptions().read_captions(b'{"texts": [["alt", "a cat"], ["title", "Tom"]]}', "json", "7")
            ['a cat', 'Tom']
            >>> FileOptions().read_captions(b"  ", "txt", "7").cause
            'caption is empty'
        """
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            return Skipped(key, NOT_UTF8, f".{suffix}: {error.reason} at byte {error.start}")
        if suffix != "json" and not suffix.endswith(".json"):
            lines = text.split("\n") if self.caption_lines else [text]
            return clean_captions(lines) or Skipped(key, EMPTY_CAPTION, f".{suffix} holds no text")
        field = self.caption_field
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            return Skipped(key, NOT_JSON, str(error))
        value = fields.get(field, fields.get("texts")) if isinstance(fields, dict) else None
        if not isinstance(value, str | list):
            return Skipped(key, NO_CAPTION, f".{suffix} has no field {field!r} that holds text")
        texts = [value] if isinstance(value, str) else [text for item in value for text in self._texts(item)]
        return clean_captions(texts) or Skipped(key, EMPTY_CAPTION, f".{suffix} has no text in {field!r}")

    def _texts(self, item: object) -> list[str]:
        match item:
            case str():
                return [item]
            case [str(key), str(text)] if not self._kept_texts or key in self._kept_texts:
                return [text]
        return []

    @cached_property
    def _kept_texts(self) -> frozenset[str]:
        return frozenset(key.strip() for key in self.text_keys.split(";") if key.strip())


def clean_captions(texts: Iterable[str]) -> list[str]:
    """Return the texts without surrounding space, blank texts and repeats."""
    return [text for text in dict.fromkeys(text.strip() for text in texts) if text]


def samples_of(captions: Sequence[str], key: str, **where: Any) -> Iterator[Sample]:
    """Yield a sample for each caption of an image, with the keys "k", "k#1", "k#2" and so on.

    Args:
        captions: The captions.
        key: Key of the first sample.
        where: The other fields of the samples.
    """
    for number, caption in enumerate(captions):
        yield Sample(f"{key}#{number}" if number else key, caption, **where)


def split_keys(text: str) -> tuple[str, ...]:
    """Return the suffixes of a list such as "jpg;png", in lower case and without dots.

    Examples:
        >>> split_keys("JPG; .png;")
        ('jpg', 'png')
    """
    keys = (key.strip().lstrip(".").lower() for key in text.split(";"))
    return tuple(key for key in keys if key)
