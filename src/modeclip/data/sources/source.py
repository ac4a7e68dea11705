"""What a source of image-caption pairs is: parts that are read one after the other, and how a module declares a kind.

A module of this package describes each kind that it reads by a ``SourceKind``: how a user's words or files are
recognised, and how they are opened. The package lists these kinds. To add a source, write a module and add its kinds to
that list; options of its own are a frozen dataclass in the module and a field of ``DataConfig``.

Opening lists names and looks into the first file; it copies nothing and opens no image, because a sample says where its
image lies. The order of the pairs depends only on names, never on the file system. What cannot become a sample is
yielded as ``Skipped`` with its cause. What makes a whole source useless (a column is missing, there is no image, no
shard can be read) is a ``ModeclipError``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import pyarrow as pa

from modeclip.data.samples import Sample, Skipped

Options = TypeVar("Options")


@runtime_checkable
class SourceConfig(Protocol):
    """What a source module sees of a ``DataConfig``."""

    @property
    def source(self) -> str:
        """The source, as the user names it."""
        ...

    @property
    def tasks(self) -> tuple[str, ...]:
        """What is held out, as the user names it."""
        ...

    def options(self, group: type[Options]) -> Options:
        """Return the options of one group, such as ``TableOptions``."""
        ...


@dataclass(frozen=True, kw_only=True)
class SourcePart:
    """A part of a source that is read as a whole: a shard, a table file, a folder, an icon set."""

    name: str
    """Identity of the part: an absolute path, a URL, or the version of a package and the name of a set."""
    state: str
    """Size and time of change, or etag. It is "" where the part may grow and pairs are compared by key (folders)."""
    read: Callable[[], Iterator[Sample | Skipped]]
    """Streams its pairs, always in the same order. A damaged part ends with a ``Skipped`` whose key is ``name``."""


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """Where pairs come from, in parts."""

    kind: str
    """icons, iconify, folder, imagefolder, table, parquet, huggingface, shards, img2dataset or metaclip."""
    parts: tuple[SourcePart, ...]
    """What it consists of, in the order of reading."""
    extra: pa.Schema
    """Further columns that its samples may carry."""
    what: str
    """One line for people, such as "12 img2dataset shards with 9 further columns"."""
    draws_images: bool = False
    """Whether images are drawn in memory instead of read. Tasks are then sets of the same source, and their classes
    must be captions that are trained on."""
    versions: tuple[str, ...] = ()
    """Versions that show a change where images are drawn; files show it by their states."""


class Listing(NamedTuple):
    """What is in a folder, each sorted by name."""

    folders: list[str]
    """Names of its sub-folders."""
    files: list[str]
    """Names of its files."""


@dataclass(frozen=True, kw_only=True)
class SourceKind:
    """How one kind of source is recognised (by a word, by names of files, or by what a folder holds) and opened."""

    name: str
    """What the kind is called where kinds are listed."""
    expected: str
    """How a user names such a source, for the error about one that is of no kind."""
    open: Callable[[SourceConfig], DataSource]
    """Opens the source, or raises ``ModeclipError``."""
    word: str = ""
    """The word by which users name the source."""
    takes_folder: bool = False
    """Whether a colon and a folder may follow the word."""
    fits_file: Callable[[str], bool] = lambda _: False
    """Tells by its name whether a file is of this kind."""
    fits_folder: Callable[[SourceConfig, Listing], bool] = lambda *_: False
    """Tells by what is in a folder whether it is of this kind."""
    open_task: Callable[[SourceConfig, str], DataSource] | None = None
    """Opens an entry of ``data.tasks``; without it an entry is a folder of classes."""

    def is_named(self, source: str) -> bool:
        """Say whether a user names this kind by its word."""
        word, colon, _ = source.partition(":")
        return bool(self.word) and word == self.word and (self.takes_folder or not colon)


def count(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural if need be.

    Examples:
        >>> count(1, "shard"), count(12_000, "shard")
        ('1 shard', '12,000 shards')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def describe(what: str, extra: pa.Schema) -> str:
    """Return what a source is, with the number of its further columns."""
    return f"{what} with {count(len(extra), 'further column')}" if len(extra) else what
