"""Folders of images, with caption files of the same names beside them or a sub-folder for each class.

The folders that img2dataset writes are folders too; each has a Parquet file of further columns beside it.

Price: the walk and the reading of the caption files. Memory: one folder's listing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import PurePosixPath

import pyarrow as pa

from modeclip.data.samples import DAMAGED_TABLE, NO_CAPTION, Sample, Skipped
from modeclip.data.sources.captions import FileOptions, samples_of
from modeclip.data.sources.source import DataSource, Listing, SourceConfig, SourceKind, SourcePart, count, describe
from modeclip.data.sources.tables import CSV_SUFFIXES, DamagedTable, read_sidecar, sidecar_columns
from modeclip.errors import ModeclipError
from modeclip.system.paths import absolute, is_folder, is_url, join, list_folder, read_bytes, walk

IMAGES_LOOKED_AT = 1000
"""Number of images without a caption file after which a folder is taken to have none."""


def open_folder(config: SourceConfig) -> DataSource:
    """Open a folder of images: with caption files, or with a sub-folder for each class.

    Raises:
        ModeclipError: It holds no image.
    """
    root, options = absolute(config.source), config.options(FileOptions)
    if is_folder_of_classes(root, options):
        kind, read = "imagefolder", partial(read_class_folder, root, options)
        what = f"folder of images in {count(len(list_folder(root)[0]), 'sub-folder')}, whose names are their captions"
    else:
        kind, read = "folder", partial(read_folder, root, options)
        what = "folder of images with caption files"
    return DataSource(kind=kind, parts=(SourcePart(name=root, state="", read=read),), extra=pa.schema([]), what=what)


def open_img2dataset(config: SourceConfig) -> DataSource:
    """Open the folders that img2dataset wrote: 00000/ with images and texts, and 00000.parquet beside it, and so on."""
    root, options = absolute(config.source), config.options(FileOptions)
    folders, files = list_folder(root)
    tables = frozenset(files)
    names = [name for name in folders if f"{name}.parquet" in tables]
    extra = sidecar_columns(join(root, f"{names[0]}.parquet"))
    parts = tuple(
        SourcePart(name=join(root, name), state="", read=partial(read_img2dataset, root, name, options, extra))
        for name in names
    )
    what = describe(count(len(names), "img2dataset folder"), extra)
    return DataSource(kind="img2dataset", parts=parts, extra=extra, what=what)


def open_classes(config: SourceConfig, task: str) -> DataSource:
    """Open an entry of ``data.tasks``; the caption of an image is its class, the bare name of the sub-folder.

    Raises:
        ModeclipError: The folder does not exist.
    """
    name, folder = split_task(task)
    root = absolute(folder)
    if not is_folder(root):
        raise ModeclipError(
            f"task {name!r}: folder {folder!r} does not exist; data.tasks expects FOLDER or"
            " NAME=FOLDER, with a sub-folder of images for each class"
        )
    part = SourcePart(name=root, state="", read=partial(read_class_folder, root, config.options(FileOptions), name))
    return DataSource(kind="imagefolder", parts=(part,), extra=pa.schema([]), what=f"task {name}: a folder of classes")


def is_folder_of_classes(root: str, options: FileOptions) -> bool:
    """Say whether images lie only in sub-folders and none of the first has a caption file.

    Raises:
        ModeclipError: The folder holds no image.
    """
    first = islice(_walk_images(root, options.image_suffixes), IMAGES_LOOKED_AT)
    return all(folder and not _caption_suffix(name, names, options) for folder, name, names in first)


def has_captions(root: str, options: FileOptions) -> bool:
    """Say whether one of the first images of a folder has a caption file."""
    first = islice(_walk_images(root, options.image_suffixes), IMAGES_LOOKED_AT)
    try:
        return any(_caption_suffix(name, names, options) for _, name, names in first)
    except ModeclipError:  # there is no image at all
        return False


def split_task(task: str) -> tuple[str, str]:
    """Split an entry of `data.tasks` into the task's name and its folder.

    Examples:
        >>> split_task("birds=eval/cub"), split_task("eval/pets")
        (('birds', 'eval/cub'), ('pets', 'eval/pets'))
    """
    name, equals, folder = task.partition("=")
    return (name, folder) if equals else (PurePosixPath(task).name, task)


def read_folder(root: str, options: FileOptions, below: str = "") -> Iterator[Sample | Skipped]:
    """Yield the images of a folder and its sub-folders, with the caption files of the same names.

    Args:
        root: The folder that keys and groups are relative to.
        options: Suffixes of images and captions, and how captions are read.
        below: Sub-folder to read; all by default.
    """
    for folder, name, names in _walk_images(join(root, below) if below else root, options.image_suffixes):
        group = "/".join(filter(None, (below, folder)))
        key = f"{group}/{name}" if group else name
        stem, suffix = PurePosixPath(name).stem, _caption_suffix(name, names, options)
        if suffix is None:
            yield Skipped(key, NO_CAPTION, f"no {stem}.{'/'.join(options.caption_suffixes)} beside it")
            continue
        place = join(root, group) if group else root
        try:
            captions = options.read_captions(read_bytes(join(place, f"{stem}.{suffix}")), suffix, key)
        except OSError as error:
            captions = Skipped(key, NO_CAPTION, str(error))
        if isinstance(captions, Skipped):
            yield captions
        else:
            yield from samples_of(captions, key, path=join(place, name), group=group)


def read_class_folder(root: str, options: FileOptions, task: str = "") -> Iterator[Sample | Skipped]:
    """Yield the images of a folder whose sub-folders are their classes.

    Args:
        root: The folder.
        options: Suffixes of images, and the template of captions.
        task: Name of a task: it begins the keys and is the group, and the bare names of classes are the captions.
    """
    for folder, name, _ in _walk_images(root, options.image_suffixes):
        key = "/".join(filter(None, (task, folder, name)))
        if not folder:
            yield Skipped(key, NO_CAPTION, "not in the sub-folder of a class")
            continue
        label = folder.partition("/")[0]
        caption = label if task else options.class_caption(label)
        yield Sample(key, caption, path=join(join(root, folder), name), group=task or label)


def read_img2dataset(root: str, part: str, options: FileOptions, extra: pa.Schema) -> Iterator[Sample | Skipped]:
    """Yield the images of one of img2dataset's folders, with the columns of its Parquet file.

    Args:
        root: Folder of all parts.
        part: Name of the folder.
        options: Suffixes of images and captions, and how captions are read.
        extra: Columns to take from the Parquet file.
    """
    sidecar = join(root, f"{part}.parquet")
    try:
        columns = read_sidecar(sidecar, extra)
    except DamagedTable as error:
        columns = {}
        yield Skipped(sidecar, DAMAGED_TABLE, str(error))
    try:
        for item in read_folder(root, options, part):
            if isinstance(item, Sample) and item.path is not None:
                more = columns.get(PurePosixPath(item.path).stem, {})
                yield Sample(item.key, item.caption, path=item.path, group=item.group, extra=more)
            else:
                yield item
    except ModeclipError:  # no image of it could be downloaded
        return


def _caption_suffix(image: str, names: frozenset[str], options: FileOptions) -> str | None:
    """Return the suffix of an image's caption file, given the names of all files in its folder."""
    stem = PurePosixPath(image).stem
    return next((suffix for suffix in options.caption_suffixes if f"{stem}.{suffix}" in names), None)


def _walk_images(root: str, image_keys: Sequence[str]) -> Iterator[tuple[str, str, frozenset[str]]]:
    """Yield (folder below the root, image name, all names in that folder), sorted by folder and name.

    Raises:
        ModeclipError: There is no image.
    """
    others: Counter[str] = Counter()
    found = False
    for folder, names in walk(root):
        all_names = frozenset(names)
        for name in names:
            suffix = PurePosixPath(name).suffix.lower()
            if suffix[1:] in image_keys:
                found = True
                yield folder, name, all_names
            else:
                others[suffix or "(none)"] += 1
    if not found:
        seen = ", ".join(f"{suffix} ({number})" for suffix, number in others.most_common(8))
        where = "prefix" if is_url(root) else "folder"
        raise ModeclipError(
            f"{where} {root!r} holds no image: expected files ending in"
            f" {' or '.join(image_keys)}, found {seen or 'no file at all'}; set data.image_keys"
        )


# ---------------------------------------------------------------- the kinds of sources


def _is_img2dataset(_: SourceConfig, folder: Listing) -> bool:
    return not {f"{name}.parquet" for name in folder.folders}.isdisjoint(folder.files)


def _is_folder(config: SourceConfig, folder: Listing) -> bool:
    has_table = any(name.lower().endswith(CSV_SUFFIXES) for name in folder.files)
    return not has_table or has_captions(config.source, config.options(FileOptions))


IMG2DATASET = SourceKind(
    name="img2dataset",
    expected="what img2dataset wrote",
    open=open_img2dataset,
    fits_folder=_is_img2dataset,
)
FOLDER = SourceKind(
    name="folder",
    expected="a folder of images with same-named .txt files or of class folders",
    open=open_folder,
    fits_folder=_is_folder,
)
