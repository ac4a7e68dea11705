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


@dataclass(frozen=True, kw_only=True)
class FileOptions:
    """How images and captions are found in folders and shards, and how captions are read."""

    image_keys: str = "jpg;jpeg;png;webp;gif;bmp"
    """Folders and shards: suffixes of images; the first one that is found counts. In shards a suffix is everything
    after the first dot of a member's name."""
    caption_keys: str = "txt;json"
    """Folders and shards: suffixes of captions; the first one that is found counts."""
    caption_field: str = "caption"
    """Field of a .json file that holds the caption or a list of captions: strings, or pairs of key and text as in
    MetaCLIP. A file without this field is searched for `texts`."""
    text_keys: str = ""
    """Lists of pairs of key and text: the keys that count, such as `text;alt`; by default all."""
    caption_lines: bool = False
    """Treat every line of a .txt file as a caption of its own."""
    class_template: str = "a photo of a {}."
    """Images without captions in a sub-folder for each class: the caption, with {} for the class."""

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
        return split_keys(self.image_keys)

    @cached_property
    def caption_suffixes(self) -> tuple[str, ...]:
        """Suffixes of captions, in lower case and without dots."""
        return split_keys(self.caption_keys)

    @property
    def caption_rule(self) -> CaptionRule:
        """How captions are taken from text and JSON files."""
        keys = frozenset(key.strip() for key in self.text_keys.split(";") if key.strip())
        return CaptionRule(field=self.caption_field, text_keys=keys, lines=self.caption_lines)

    def class_caption(self, name: str) -> str:
        """Return the caption of an image of a class."""
        return fill(self.class_template, name.replace("_", " ").strip())


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


def split_keys(text: str) -> tuple[str, ...]:
    """Return the suffixes of a list such as "jpg;png", in lower case and without dots.

    Examples:
        >>> split_keys("JPG; .png;")
        ('jpg', 'png')
    """
    keys = (key.strip().lstrip(".").lower() for key in text.split(";"))
    return tuple(key for key in keys if key)
