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

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import pyarrow as pa

from modeclip.data.samples import Sample, Skipped
from modeclip.errors import ModeclipError
from modeclip.system.console import log
from modeclip.system.paths import join, list_folder

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

    @property
    def split(self) -> str:
        """The split that is read where a source has several, or "all"."""
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
    num_samples: Callable[[], int | None] = lambda: None
    """Tells how many samples, each with one caption or more, a part should hold that cannot be read to its end; None if
    nothing says so."""


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


# ---------------------------------------------------------------- splits

TRAIN, VALIDATION, TEST = "train", "validation", "test"
SPLIT_NAMES = {
    TRAIN: ("train", "training"),
    VALIDATION: ("val", "valid", "validation", "dev"),
    TEST: ("test", "testing", "eval", "evaluation"),
}
"""The names by which splits go, in any case."""
ALL_SPLITS = "all"
MAX_CONFIGURATIONS = 64
"""Sub-folders of a folder in which tables are looked for."""
OTHER = "other"
"""The split of what lies beside splits and is none."""
_SPLIT = re.compile(
    r"(?P<name>" + "|".join(name for names in SPLIT_NAMES.values() for name in names) + r")"
    r"(?:[-_ ]?(?:set|split|images?|\d+))?",
    re.IGNORECASE,
)


def split_of(name: str) -> str:
    """Return the split that a folder's name stands for, or "".

    Examples:
        >>> split_of("Train"), split_of("val2017"), split_of("dev"), split_of("testament")
        ('train', 'validation', 'validation', '')
    """
    found = _SPLIT.fullmatch(name)
    return next(split for split, names in SPLIT_NAMES.items() if found["name"].lower() in names) if found else ""


def splits_among(names: Iterable[str], is_filled: Callable[[str], bool] = lambda _: True) -> dict[str, str]:
    """Return the split of each name, or nothing if they are other things that only have names like splits.

    They are splits if all that is filled has the name of one, or if a split for training and another kind are there;
    what lies beside them is then the split `OTHER`. So a class "test" among others is a class.

    Args:
        names: Names of all folders in one place, or names of files without what follows the split's name.
        is_filled: Tells whether there is anything in a folder that bears no split's name.

    Examples:
        >>> splits_among(["train", "test"]), splits_among(["train", "bus", "car"])
        ({'train': 'train', 'test': 'test'}, {})
    """
    names = list(names)
    found = {name: split for name in names if (split := split_of(name))}
    kinds = set(found.values())
    others = [name for name in names if name not in found]
    if TRAIN in kinds and len(kinds) > 1:
        return found | dict.fromkeys(others, OTHER)
    return {} if any(is_filled(name) for name in others) else found


def preferred_split(names: Iterable[str], kinds: Sequence[str]) -> str | None:
    """Return the name of the split that is wanted most: by its kind, then by the order of `SPLIT_NAMES`.

    Examples:
        >>> preferred_split(["train", "dev", "Val", "extra"], (TEST, VALIDATION))
        'Val'
    """
    order = [name for kind in kinds for name in SPLIT_NAMES[kind]]
    own = [name for name in names if split_of(name) in kinds]

    def rank(name: str) -> tuple[int, int, str]:
        exact = order.index(name.lower()) if name.lower() in order else len(order)
        return kinds.index(split_of(name)), exact, name

    return min(own, key=rank, default=None)


def is_chosen(name: str, split: str, chosen: str) -> bool:
    """Say whether a split is the one that a user chose.

    Args:
        name: Name of its folder.
        split: What ``splits_among`` makes of the name.
        chosen: The user's word: a usual name of a split, the name of the folder itself, or `ALL_SPLITS`.

    Examples:
        >>> is_chosen("Valid", "validation", "val"), is_chosen("val2017", "validation", "val2014")
        (True, False)
    """
    known = {each: kind for kind, names in SPLIT_NAMES.items() for each in (kind, *names)}
    if chosen.lower() == ALL_SPLITS:
        return True
    return name.casefold() == chosen.casefold() or known.get(chosen.lower()) == split


def files_by_split(folder: str, suffixes: tuple[str, ...], *, hub: bool = True) -> dict[str, list[str]]:
    """Return the files of a folder that have one of the suffixes, by the names of their splits, "" for none.

    A file's split stands at the start of its name, as in ``train-00000-of-00004.parquet``. A folder without such files
    may have them as on Hugging Face's Hub: in ``data/`` or in the folder of its one configuration, where they may also
    lie in folders of splits.

    Args:
        folder: The folder.
        suffixes: Suffixes in lower case, with dots.
        hub: Whether to look for the Hub's layout.

    Raises:
        ModeclipError: There are several configurations, none of which is called "default".
    """
    folders, files = list_folder(folder)
    found: dict[str, list[str]] = {}
    for name in files:
        if name.lower().endswith(suffixes):
            start = re.split(r"[-_.]", name, maxsplit=1)[0]
            found.setdefault(start if split_of(start) else "", []).append(join(folder, name))
    for name in [] if found else folders:
        if split_of(name):
            place = join(folder, name)
            tables = [join(place, each) for each in list_folder(place)[1] if each.lower().endswith(suffixes)]
            found |= {name: tables} if tables else {}
    if found or not hub:
        return found
    if "data" in folders and (found := files_by_split(join(folder, "data"), suffixes, hub=False)):
        return found
    others = [name for name in folders if not split_of(name)][:MAX_CONFIGURATIONS]
    configurations = {name: files_by_split(join(folder, name), suffixes, hub=False) for name in others}
    configurations = {name: own for name, own in configurations.items() if own}
    if len(configurations) > 1 and "default" not in configurations:
        names = ", ".join(list(configurations)[:6])
        raise ModeclipError(f"{folder!r} holds several configurations ({names}): name the folder of one of them")
    return configurations.get("default") or next(iter(configurations.values()), {})


def chosen_files(found: Mapping[str, list[str]], chosen: str) -> list[str]:
    """Return the files of the chosen split and those of none, and log which are left out.

    Raises:
        ModeclipError: There are only files of other splits.
    """
    names = {name for name in found if not name or is_chosen(name, split_of(name), chosen)}
    kept = [file for name in names for file in found[name]]
    if found and not kept:
        raise missing_split(chosen, sorted(found))
    left = {name: files for name, files in sorted(found.items()) if name not in names}
    if left:
        told = ", ".join(f"{name} ({count(len(files), 'file')})" for name, files in left.items())
        log(f"data.split is {chosen}; left out: {told}")
    return sorted(kept)


def missing_split(chosen: str, found: Iterable[str]) -> ModeclipError:
    """Make the error for a split that is not there."""
    return ModeclipError(
        f"data.split {chosen!r} is not there; its splits are {', '.join(found)}: set data.split to one"
    )


# ---------------------------------------------------------------- words


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
