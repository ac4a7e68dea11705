"""What a user calls a source goes in; its kind, its parts and the streams of their samples come out.

Nothing is copied and no image is opened here: a sample says where its image lies. The order of a stream depends only
on names, never on the file system's. What cannot be a sample is yielded as ``Skipped`` with its cause; what makes the
whole source useless (no such column, no image at all, no shard that can be read) is a ``ModeclipError``.

    icons, iconify             modeclip.data.sources.icons, modeclip.data.sources.iconify
    folder, imagefolder        modeclip.data.sources.folders
    table, parquet, huggingface    modeclip.data.sources.tables
    shards, img2dataset, metaclip  modeclip.data.sources.shards (img2dataset's files: modeclip.data.sources.folders, its Parquet: modeclip.data.sources.tables)

Price: opening lists names, and looks into the first file of each kind.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pyarrow as pa

from modeclip.data.sources.folders import has_captions, open_classes, open_folder, open_img2dataset_files, split_task
from modeclip.data.sources.iconify import ICONIFY, open_iconify, package_state
from modeclip.data.sources.icons import TRAIN_SETS, find_set, package_versions, read_icons
from modeclip.data.sources.options import DataConfig, Source, Unit, count, split_keys
from modeclip.data.sources.shards import open_shards
from modeclip.data.sources.tables import CSV_SUFFIXES, open_csv, open_huggingface, open_parquet
from modeclip.errors import ModeclipError
from modeclip.system.paths import expand, is_folder, is_url, list_folder, state, tree_states

__all__ = [
    "DataConfig",
    "Source",
    "Unit",
    "detect",
    "open_source",
    "open_task",
    "relative_to",
    "source_state",
    "split_keys",
    "split_task",
]

EXPECTED = (
    "expected the word icons or iconify, a folder of images with same-named .txt files or of class folders,"
    " .csv, .tsv or .parquet files, a Hugging Face dataset on disk, or tar shards (data/{000..009}.tar,"
    " a.tar::b.tar, a folder of .tar files)"
)
ICONS = "icons"


def detect(config: DataConfig) -> str:
    """Say who reads a source: "icons", "iconify", "folder", "files", "table", "parquet", "huggingface" or "shards".

    Raises:
        ModeclipError: It is none of these.
    """
    source = config.source
    if source == ICONS:
        return ICONS
    if source.partition(":")[0] == ICONIFY:
        return ICONIFY
    if "::" in source or "{" in source:
        kinds = {_kind_of_name(name) for name in expand(source)} or {"shards"}
        if len(kinds) > 1 or "" in kinds:
            raise ModeclipError(f"data.source {source!r} joins what is not of one kind: {EXPECTED}")
        return kinds.pop()
    if kind := _kind_of_name(source):
        if kind == "shards" or state(source) or is_folder(source):
            return kind
    elif is_folder(source):
        return _kind_of_folder(config)
    elif state(source):
        raise ModeclipError(f"data.source {source!r} is a file of another kind: {EXPECTED}")
    raise ModeclipError(f"data.source {source!r} does not exist: {EXPECTED}")


def _kind_of_name(name: str) -> str:
    lower = name.lower()
    if re.search(r"\.(tar|tgz|tar\.\w+)$", lower):
        return "shards"
    if lower.endswith(CSV_SUFFIXES):
        return "table"
    return "parquet" if lower.endswith(".parquet") else ""


def _kind_of_folder(config: DataConfig) -> str:
    folders, files = list_folder(config.source)
    if "dataset_dict.json" in files or {"state.json", "dataset_info.json"} <= set(files):
        return "huggingface"
    if any(name.endswith(".tar") for name in files):
        return "shards"
    tables = {name.removesuffix(".parquet") for name in files if name.endswith(".parquet")}
    if tables:
        return "files" if tables & set(folders) else "parquet"
    if any(name.lower().endswith(CSV_SUFFIXES) for name in files) and not has_captions(config.source, config):
        return "table"
    return "folder"


def open_source(config: DataConfig) -> Source:
    """Find out what a source is, and list its parts.

    Raises:
        ModeclipError: It cannot be used as a whole.
    """
    match detect(config):
        case "icons":
            return _open_icons(config.train_sets or TRAIN_SETS, config)
        case "iconify":
            return open_iconify(config)
        case "folder":
            return open_folder(config)
        case "files":
            return open_img2dataset_files(config)
        case "table":
            return open_csv(config)
        case "parquet":
            return open_parquet(config)
        case "huggingface":
            return open_huggingface(config)
    return open_shards(config)


def open_task(config: DataConfig, task: str) -> Source:
    """Open an entry of `data.tasks`: an icon set, or a folder of classes; captions are the names of classes.

    Raises:
        ModeclipError: There is no such set or folder.
    """
    match config.source.partition(":")[0]:
        case "icons":
            return _open_icons((task,), config)
        case "iconify":
            return open_iconify(config, task)
    return open_classes(config, task)


def _open_icons(sets: tuple[str, ...], config: DataConfig) -> Source:
    versions = " ".join(package_versions())
    for name in sets:
        find_set(name)  # an unknown one is an error before any work
    units = tuple(
        Unit(
            name=f"icons:{name}",
            state=f"{versions} {config.image_size}",
            read=partial(read_icons, [name], config.image_size),
        )
        for name in sets
    )
    return Source(kind="icons", units=units, extra=pa.schema([]), what=count(len(sets), "built-in icon set"))


def source_state(config: DataConfig) -> list[str]:
    """Return what shows a change of a source or its tasks: names, sizes and times of files, or versions of packages.

    Raises:
        ModeclipError: It cannot be used as a whole.
    """
    kind = detect(config)
    if kind == "icons":
        return package_versions()
    if kind == "iconify":
        return [package_state(config)]
    suffixes = split_keys(f"{config.image_keys};{config.caption_keys};parquet")
    found = []
    for unit in open_source(config).units:
        found += [f"{unit.name} {unit.state}"] if unit.state else tree_states(unit.name, _dotted(suffixes))
    for task in config.tasks:
        found += tree_states(open_task(config, task).units[0].name, _dotted(split_keys(config.image_keys)))
    return found


def _dotted(suffixes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f".{suffix}" for suffix in suffixes)


def relative_to(config: DataConfig, folder: Path) -> DataConfig:
    """Return a configuration with its paths taken from a folder, where they are not absolute or addresses."""
    name, colon, place = config.source.partition(":")
    if config.source == ICONS or (name == ICONIFY and not place):
        return config
    if name == ICONIFY:
        return replace(config, source=f"{name}{colon}{folder / place}")

    def resolve(path: str) -> str:
        return path if is_url(path) or not path else str(folder / path)

    source = "::".join(resolve(part) for part in config.source.split("::"))
    named = (split_task(task) for task in config.tasks)
    return replace(config, source=source, tasks=tuple(f"{name}={resolve(path)}" for name, path in named))
