"""A folder of images goes in, with text files beside them or a sub-folder for each class; samples come out.

No image is opened here: a sample says where its image lies. The order of the stream depends only on names, never on the
file system's. What img2dataset writes as files is a folder too, whose sub-folders each have a Parquet file of further
columns beside them.

Price: the walk, and the reading of the caption files; memory is one folder's listing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import PurePosixPath

import pyarrow as pa

from modeclip.data.samples import DAMAGED_TABLE, NO_CAPTION, Sample, Skipped, samples_of
from modeclip.data.sources.columns import DamagedTable, read_sidecar, sidecar_columns
from modeclip.data.sources.options import DataConfig, Source, Unit, count, describe, split_keys
from modeclip.errors import ModeclipError
from modeclip.system.paths import absolute, is_folder, is_url, join, list_folder, read_bytes, walk

IMAGES_LOOKED_AT = 1000
"""So many images without a caption file show that a folder has none."""


def kind_of_folder(root: str, config: DataConfig) -> str:
    """Return "folder", or "imagefolder" where images lie in sub-folders and none of the first has a caption file."""
    suffixes = split_keys(config.caption_keys)
    found = False
    for folder, name, names in islice(_walk_images(root, split_keys(config.image_keys)), IMAGES_LOOKED_AT):
        found = True
        if not folder or any(f"{PurePosixPath(name).stem}.{suffix}" in names for suffix in suffixes):
            return "folder"
    return "imagefolder" if found else "folder"


def has_captions(root: str, config: DataConfig) -> bool:
    """Say whether one of the first images of a folder has a caption file."""
    suffixes = split_keys(config.caption_keys)
    try:
        for _, name, names in islice(_walk_images(root, split_keys(config.image_keys)), IMAGES_LOOKED_AT):
            if any(f"{PurePosixPath(name).stem}.{suffix}" in names for suffix in suffixes):
                return True
    except ModeclipError:  # no image at all
        pass
    return False


def open_folder(config: DataConfig) -> Source:
    """Open a folder of images.

    Raises:
        ModeclipError: It holds no image.
    """
    root = absolute(config.source)
    kind = kind_of_folder(root, config)
    read = partial(read_classes, root, config) if kind == "imagefolder" else partial(read_folder, root, config)
    what = "folder of images with caption files"
    if kind == "imagefolder":
        what = f"folder of images in {count(len(list_folder(root)[0]), 'sub-folder')}, whose names are their captions"
    return Source(kind=kind, units=(Unit(name=root, state="", read=read),), extra=pa.schema([]), what=what)


def open_img2dataset_files(config: DataConfig) -> Source:
    """Open the folders that img2dataset wrote as files: 00000/ with images and texts, and 00000.parquet beside it."""
    root = absolute(config.source)
    folders, files = list_folder(root)
    parts = [name for name in folders if f"{name}.parquet" in files]
    extra = sidecar_columns(join(root, f"{parts[0]}.parquet"))
    units = tuple(
        Unit(name=join(root, part), state="", read=partial(_read_part, root, part, config, extra)) for part in parts
    )
    what = describe(count(len(parts), "img2dataset folder"), extra)
    return Source(kind="img2dataset", units=units, extra=extra, what=what)


def open_classes(config: DataConfig, task: str) -> Source:
    """Open an entry of `data.tasks`; the caption of an image is its class, the sub-folder's bare name.

    Raises:
        ModeclipError: The folder does not exist or holds no image.
    """
    name, folder = split_task(task)
    root = absolute(folder)
    if not is_folder(root):
        raise ModeclipError(
            f"task {name!r}: folder {folder!r} does not exist; data.tasks expects FOLDER or"
            " NAME=FOLDER, with a sub-folder of images for each class"
        )
    unit = Unit(name=root, state="", read=partial(read_classes, root, config, name))
    return Source(kind="imagefolder", units=(unit,), extra=pa.schema([]), what=f"task {name}: a folder of classes")


def split_task(task: str) -> tuple[str, str]:
    """Split an entry of `data.tasks` into the task's name and its folder.

    Examples:
        >>> split_task("birds=eval/cub"), split_task("eval/pets")
        (('birds', 'eval/cub'), ('pets', 'eval/pets'))
    """
    name, equals, folder = task.partition("=")
    return (name, folder) if equals else (PurePosixPath(task).name, task)


def read_folder(root: str, config: DataConfig, below: str = "") -> Iterator[Sample | Skipped]:
    """Yield the images of a folder and its sub-folders, with the caption files of the same names.

    Args:
        root: The folder that keys and groups are relative to.
        config: Suffixes of images and captions, and how captions are read.
        below: Sub-folder to read; all by default.
    """
    caption_keys, rule = split_keys(config.caption_keys), config.caption_rule
    for folder, name, names in _walk_images(join(root, below) if below else root, split_keys(config.image_keys)):
        group = "/".join(filter(None, (below, folder)))
        key = f"{group}/{name}" if group else name
        stem = PurePosixPath(name).stem
        suffix = next((suffix for suffix in caption_keys if f"{stem}.{suffix}" in names), None)
        if suffix is None:
            yield Skipped(key, NO_CAPTION, f"no {stem}.{'/'.join(caption_keys)} beside it")
            continue
        place = join(root, group) if group else root
        try:
            captions = rule.read(read_bytes(join(place, f"{stem}.{suffix}")), suffix, key)
        except OSError as error:
            captions = Skipped(key, NO_CAPTION, str(error))
        if isinstance(captions, Skipped):
            yield captions
        else:
            yield from samples_of(captions, key, path=join(place, name), group=group)


def read_classes(root: str, config: DataConfig, task: str = "") -> Iterator[Sample | Skipped]:
    """Yield the images of a folder, whose sub-folders are their classes.

    Args:
        root: The folder.
        config: Suffixes of images, and the template of captions.
        task: Name of a task: begins the keys, is the group, and makes the bare names captions.
    """
    for folder, name, _ in _walk_images(root, split_keys(config.image_keys)):
        key = "/".join(filter(None, (task, folder, name)))
        if not folder:
            yield Skipped(key, NO_CAPTION, "not in the sub-folder of a class")
            continue
        label = folder.partition("/")[0]
        caption = label if task else config.class_caption(label)
        yield Sample(key, caption, path=join(join(root, folder), name), group=task or label)


def _read_part(root: str, part: str, config: DataConfig, extra: pa.Schema) -> Iterator[Sample | Skipped]:
    """Yield the images of one of img2dataset's folders, with the columns of its Parquet file."""
    sidecar = join(root, f"{part}.parquet")
    try:
        columns = read_sidecar(sidecar, extra)
    except DamagedTable as error:
        columns = {}
        yield Skipped(sidecar, DAMAGED_TABLE, str(error))
    try:
        for item in read_folder(root, config, part):
            if isinstance(item, Sample) and item.path is not None:
                more = columns.get(PurePosixPath(item.path).stem, {})
                yield Sample(item.key, item.caption, path=item.path, group=item.group, extra=more)
            else:
                yield item
    except ModeclipError:  # none of its images could be downloaded
        return


def _walk_images(root: str, image_keys: Sequence[str]) -> Iterator[tuple[str, str, frozenset[str]]]:
    """Yield (folder below the root, image name, all names in that folder), sorted by folder and name."""
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
