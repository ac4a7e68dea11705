"""What a user says about a source, and the parts that every source consists of once it is opened."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated

import pyarrow as pa
from tyro.conf import arg

from modeclip.data.prompts import PLACE, fill
from modeclip.data.samples import CaptionRule, Sample, Skipped
from modeclip.errors import ModeclipError

IMAGE_COLUMN, CAPTION_COLUMN = "filepath", "title"
"""open_clip's names of columns."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where image-caption pairs come from, and which of them are kept for evaluation."""

    source: Annotated[str, arg(metavar="SOURCE")]
    """`icons` (built in), `iconify` (200 sets from npm; or `iconify:FOLDER`), a folder of images with same-named .txt
    or .json files or with a sub-folder for each class, .csv, .tsv or .parquet files, a Hugging Face dataset on disk,
    tar shards, or what img2dataset wrote. Names expand braces (`data/{000..009}.tar`), `::` joins them, a folder means
    all files in it; all may lie in an object store (`s3://bucket/folder/`)."""
    image_column: str = IMAGE_COLUMN
    """Tables: column of image paths, absolute or relative to the table's folder; in Parquet also of encoded images. By
    default `filepath`, or else image, jpg, image_bytes, path or file_name, whichever is there."""
    caption_column: str = CAPTION_COLUMN
    """Tables: column of captions, in Parquet also of lists of them. By default `title`, or else caption, text,
    TEXT or captions."""
    separator: str | None = None
    """CSV: the character between columns; by default tab for .tsv, found in the header for .csv."""
    image_keys: str = "jpg;jpeg;png;webp;gif;bmp"
    """Folders and shards: suffixes of images; the first that is there counts. In shards a suffix is all
    that follows the first dot of a member's name."""
    caption_keys: str = "txt;json"
    """Folders and shards: suffixes of captions; the first that is there counts."""
    caption_field: str = "caption"
    """Field of a .json file that holds the caption, or a list of them: strings, or pairs of key and text as MetaCLIP
    has them. Where a file lacks this field, `texts` is looked for."""
    text_keys: str = ""
    """Lists of pairs of key and text: which keys count, such as `text;alt`; by default all."""
    caption_lines: bool = False
    """Every line of a .txt file is a caption of its own."""
    class_template: str = "a photo of a {}."
    """Images without captions in a sub-folder for each class: the caption, with {} for the class."""
    copy_images: Annotated[bool, arg(aliases=["--copy"])] = False
    """Copy the images into the catalog instead of referring to the files in which they lie."""
    image_size: int = 32
    """Icons: side of the rendered image in pixels."""
    train_sets: tuple[str, ...] = ()
    """Icons: sets to train on; by default material, tabler, phosphor and simple; of iconify all that are neither tasks
    nor excluded."""
    exclude_sets: tuple[str, ...] = ()
    """iconify: sets that are not trained on, such as other versions of those in `tasks`."""
    aliases: bool = False
    """iconify: the further names of an icon are further captions of its image."""
    workers: int = 1
    """iconify: processes that draw; what they draw does not depend on their number."""
    tasks: tuple[str, ...] = ()
    """Held out as zero-shot tasks. Icons: names of sets. Own data: folders that hold a sub-folder of
    images for each class, written FOLDER or NAME=FOLDER."""
    check_images: bool = True
    """Decode every image once, so that damaged ones are left out and counted. Without it images that lie in files are
    not opened: faster by what reading them costs, but sizes are 0, hashes are missing and damage shows later."""
    holdout_fraction: float = 0.0
    """Own data without tasks: share of the pairs that is never trained on and becomes the one task
    `holdout` (class = caption), chosen by a hash of the key; in [0, 1)."""
    max_skipped_fraction: float = 0.05
    """Stop with an error when more than this share of the pairs cannot be used; in [0, 1]."""

    def __post_init__(self) -> None:
        for name in ("image_keys", "caption_keys"):
            if not split_keys(value := getattr(self, name)):
                raise ModeclipError(f"data.{name}: expected suffixes such as 'a;b', got {value!r}")
        for name in ("source", "image_column", "caption_column", "caption_field"):
            if not getattr(self, name).strip():
                raise ModeclipError(f"data.{name}: expected a name, got {getattr(self, name)!r}")
        if not 0 <= self.holdout_fraction < 1:
            raise ModeclipError(f"data.holdout_fraction: expected a number in [0, 1), got {self.holdout_fraction}")
        if not 0 <= self.max_skipped_fraction <= 1:
            raise ModeclipError(
                f"data.max_skipped_fraction: expected a number in [0, 1], got {self.max_skipped_fraction}"
            )
        for name in ("image_size", "workers"):
            if getattr(self, name) < 1:
                raise ModeclipError(f"data.{name}: expected 1 or more, got {getattr(self, name)}")
        if self.separator is not None and len(self.separator) != 1:
            raise ModeclipError(f"data.separator: expected one character, got {self.separator!r}")
        if len(PLACE.findall(self.class_template)) != 1:
            raise ModeclipError(f"data.class_template: expected one {{}} for the class, got {self.class_template!r}")
        if self.tasks and self.holdout_fraction:
            raise ModeclipError("data.tasks and data.holdout_fraction exclude each other: drop one")

    @property
    def caption_rule(self) -> CaptionRule:
        """How captions are taken from text and json files."""
        keys = frozenset(key.strip() for key in self.text_keys.split(";") if key.strip())
        return CaptionRule(field=self.caption_field, text_keys=keys, lines=self.caption_lines)

    def class_caption(self, name: str) -> str:
        """Return the caption of an image of a class."""
        return fill(self.class_template, name.replace("_", " ").strip())


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A part of a source that is read as a whole: a shard, a table file, a folder, an icon set."""

    name: str
    """What it is known by: an absolute path, a URL, or package version and set."""
    state: str
    """Size and time of change, or etag; "" where the unit may grow and is compared key by key (folders)."""
    read: Callable[[], Iterator[Sample | Skipped]]
    """Stream of its pairs, always in the same order. One that breaks ends with a ``Skipped`` whose key is ``name``."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where pairs come from, in parts."""

    kind: str
    """icons, iconify, folder, imagefolder, table, parquet, huggingface, shards, img2dataset or metaclip."""
    units: tuple[Unit, ...]
    """Its parts, in order."""
    extra: pa.Schema
    """Further columns that samples may carry, possibly none."""
    what: str
    """One line for people, such as "12 img2dataset shards with 9 further columns"."""


def split_keys(text: str) -> tuple[str, ...]:
    """Return the suffixes of a list such as "jpg;png", in lower case and without dots.

    Examples:
        >>> split_keys("JPG; .png;")
        ('jpg', 'png')
    """
    keys = (key.strip().lstrip(".").lower() for key in text.split(";"))
    return tuple(key for key in keys if key)


def count(number: int, noun: str) -> str:
    """Return a number and what it counts.

    Examples:
        >>> count(1, "shard"), count(12_000, "shard")
        ('1 shard', '12,000 shards')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def describe(what: str, extra: pa.Schema) -> str:
    """Return what a source is, with the number of its further columns."""
    return f"{what} with {count(len(extra), 'further column')}" if len(extra) else what
