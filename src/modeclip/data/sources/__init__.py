"""Every kind of source that pairs can come from, and how a source is recognised and opened.

A user names a source by a word (`icons`), by a folder, or by files. ``KINDS`` lists what is tried; each module of this
package declares its own kinds, and a new one is a new module and an entry in that list.

Price: opening lists names, and looks into the first file of each kind.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from modeclip.data.sources import folders, iconify, icons, shards, tables
from modeclip.data.sources.captions import FileOptions
from modeclip.data.sources.folders import open_classes, split_task
from modeclip.data.sources.options import DataConfig
from modeclip.data.sources.source import DataSource, Listing, SourceKind, SourcePart
from modeclip.errors import ModeclipError
from modeclip.system.paths import expand, home, is_folder, is_url, list_folder, state, tree_states

__all__ = [
    "KINDS",
    "DataConfig",
    "DataSource",
    "SourceKind",
    "SourcePart",
    "detect",
    "open_source",
    "open_task",
    "relative_to",
    "source_state",
    "split_task",
]

KINDS = (
    icons.ICONS,
    iconify.ICONIFY,
    tables.HUGGINGFACE,
    shards.SHARDS,
    folders.IMAGEFOLDER,
    folders.IMG2DATASET,
    tables.PARQUET,
    folders.FOLDER,
    tables.CSV,
)
"""Every kind of source, in the order in which they are tried."""
EXPECTED = f"expected {', '.join(kind.expected for kind in KINDS[:-1])}, or {KINDS[-1].expected}"


def detect(config: DataConfig) -> SourceKind:
    """Return the kind of a source, judged by its name or by what a folder holds.

    Raises:
        ModeclipError: It is of no known kind.
    """
    source = config.source
    if kind := next((kind for kind in KINDS if kind.is_named(source)), None):
        return kind
    if "::" in source or "{" in source:
        kinds = [next((kind for kind in KINDS if kind.fits_file(name)), None) for name in expand(source)]
        if not kinds or kinds[0] is None or any(kind is not kinds[0] for kind in kinds):
            raise ModeclipError(f"data.source {source!r} joins what is not of one kind: {EXPECTED}")
        return kinds[0]
    if kind := next((kind for kind in KINDS if kind.fits_file(source)), None):
        return kind
    if is_folder(home(source)):
        listing = Listing(*list_folder(home(source)))
        return next(kind for kind in KINDS if kind.fits_folder(config, listing))
    if state(home(source)):
        raise ModeclipError(f"data.source {source!r} is a file of another kind: {EXPECTED}")
    raise ModeclipError(f"data.source {source!r} does not exist: {EXPECTED}")


def open_source(config: DataConfig) -> DataSource:
    """Find out what kind a source is, and list its parts.

    Raises:
        ModeclipError: The source as a whole cannot be used.
    """
    return detect(config).open(config)


def open_task(config: DataConfig, task: str) -> DataSource:
    """Open an entry of ``data.tasks``: a set of a source that draws its images, or else a folder of classes.

    Raises:
        ModeclipError: There is no such set or folder.
    """
    openers = (kind.open_task for kind in KINDS if kind.open_task is not None and kind.is_named(config.source))
    return next(openers, open_classes)(config, task)


def source_state(config: DataConfig, source: DataSource) -> list[str]:
    """Return what shows a change of a source or its tasks: names, sizes and times of files, or versions of packages.

    Args:
        config: How the source was opened.
        source: The opened source.

    Raises:
        ModeclipError: The folder of a task does not exist.
    """
    if source.versions:
        return list(source.versions)
    options, found = config.options(FileOptions), []
    suffixes = _dotted((*options.image_suffixes, *options.caption_suffixes, "parquet", "jsonl", "csv"))
    for part in source.parts:
        found += [f"{part.name} {part.state}"] if part.state else tree_states(part.name, suffixes)
    for task in config.tasks:
        found += tree_states(open_task(config, task).parts[0].name, _dotted(options.image_suffixes))
    return found


def _dotted(suffixes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f".{suffix}" for suffix in suffixes)


def relative_to(config: DataConfig, folder: Path) -> DataConfig:
    """Return a config whose relative paths are taken from a folder; absolute ones and addresses stay as they are."""

    def resolve(path: str) -> str:
        if is_url(path) or not path or path.startswith("~"):
            return home(path)
        found = str(folder / path)
        return f"./{found}" if found.startswith("~") else found

    word, colon, place = config.source.partition(":")
    if any(kind.is_named(config.source) for kind in KINDS):
        return replace(config, source=f"{word}{colon}{resolve(place)}")
    source = "::".join(resolve(part) for part in config.source.split("::"))
    named = (split_task(task) for task in config.tasks)
    return replace(config, source=source, tasks=tuple(f"{name}={resolve(path)}" for name, path in named))
