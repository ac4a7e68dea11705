"""Folders of images, with captions in files of the same names, in metadata tables, or in the names of class folders.

Links are followed (`modeclip.system.paths.walk`); an image that is reached by two paths is two pairs, because its class
may differ. Folders called train, val, test and the like are splits, at whatever depth: one is read, the others are left
out and counted, and none is a class (`modeclip.data.sources.source.splits_among` has the rule). The class of an image
is the first folder below the root, or below the split; where images lie in the split itself, the folder above it.

A metadata table (``metadata.jsonl``, ``.csv`` or ``.parquet`` with a column ``file_name``, as in Hugging Face's
imagefolder) gives the captions of the images that it names, which lie in its folder or below.

The folders that img2dataset writes are folders too; each has a Parquet file of further columns beside it.

Price: two walks, one to see what kind of folder it is, and the reading of the caption files. Memory: one folder's
listing, and the rows of the metadata tables.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import PurePosixPath
from posixpath import normpath
from typing import Any

import pyarrow as pa

from modeclip.data.samples import (
    BROKEN_LINK,
    DAMAGED_TABLE,
    LOOP,
    MISSING,
    NO_CAPTION,
    NO_IMAGE,
    NO_SHARD,
    NO_SIDECAR,
    NOT_JSON,
    NOT_READ,
    OTHER_COLUMN,
    OTHER_SPLIT,
    UNLISTED,
    UNREADABLE,
    Sample,
    Skipped,
)
from modeclip.data.sources.captions import FileOptions, samples_of
from modeclip.data.sources.source import (
    ALL_SPLITS,
    OTHER,
    TEST,
    TRAIN,
    VALIDATION,
    DataSource,
    Listing,
    SourceConfig,
    SourceKind,
    SourcePart,
    count,
    describe,
    is_chosen,
    missing_split,
    split_of,
    splits_among,
)
from modeclip.data.sources.tables import (
    CAPTION_COLUMN,
    CSV_SUFFIXES,
    IMAGE_COLUMN,
    CsvRow,
    DamagedTable,
    TableFile,
    TableOptions,
    captions_of,
    column_of,
    csv_rows,
    extra_columns,
    find_column,
    printable,
    read_sidecar,
    sidecar_columns,
    sidecar_size,
)
from modeclip.errors import ModeclipError
from modeclip.system.console import log
from modeclip.system.paths import (
    Folder,
    absolute,
    form_of,
    is_folder,
    is_url,
    join,
    list_folder,
    normal_form,
    open_file,
    parent,
    plain_name,
    read_bytes,
    state,
    walk,
)

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""Names of metadata tables, in any case; the first that a folder has counts."""
FILE_NAME = "file_name"
LABEL_COLUMNS = ("label", "class", "category", "class_name", "classname")
"""Columns of a metadata table whose texts are classes, where it has no captions."""
CONTAINERS = frozenset({"images", "image", "imgs", "img", "data", "dataset", "photos", "pictures", "jpegimages"})
"""Names of folders that are no classes where they hold splits, or lie in one."""
OTHER_IMAGES = frozenset({"heic", "heif", "avif", "svg", "tga", "ico", "psd", "jp2", "jxl", "dng", "cr2", "nef", "tif"})
OTHER_IMAGES |= {"tiff", "ppm", "pgm", "pbm", "pnm", "jfif", "jpe", "bmp", "gif", "webp", "png", "jpeg", "jpg"}
"""Suffixes of images that are counted where ``data.image_keys`` does not name them."""
ROWS_FOR_TYPES = 1000
"""Rows that tell the types of the further columns of metadata tables."""
_TYPES = {bool: pa.bool_(), int: pa.int64(), float: pa.float64()}
TASK_SPLITS = (TEST, VALIDATION, TRAIN)
"""Of the splits of a task, the first of these is asked."""


# ---------------------------------------------------------------- the tree: splits, classes, names


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A folder of a tree, and what its path says about the images in it."""

    folder: Folder
    """What it holds."""
    split: str
    """The split that it belongs to; "" if the tree has none there."""
    split_folder: str
    """Path of the split's folder below the root; "" without a split."""

    @property
    def label(self) -> str:
        """The folder that is the class of its images, in Unicode form NFC; "" if it lies in none."""
        parts = self.folder.path.split("/") if self.folder.path else []
        if not self.split:
            return normal_form(parts[0]) if parts else ""
        depth = len(self.split_folder.split("/"))
        above, below = parts[: depth - 1], parts[depth:]
        if len(below) > 1 and below[0].lower() in CONTAINERS:
            below = below[1:]
        candidates = below[:1] or above[-1:]
        return normal_form(next((name for name in candidates if name.lower() not in CONTAINERS), ""))


def walk_places(root: str, suffixes: Sequence[str]) -> Iterator[Place]:
    """Yield the folders of a tree with their splits, in the order of ``walk``.

    Args:
        root: The folder.
        suffixes: Suffixes of images, in lower case and without dots; folders without images do not count.
    """
    splits: dict[str, tuple[str, str]] = {}
    for folder in walk(root):
        split, split_folder = splits.pop(folder.path, ("", ""))
        place = join(root, folder.path) if folder.path else root
        named = {} if split else splits_among(folder.folders, partial(_has_image, place, suffixes))
        if split or named:
            for name in folder.folders:
                path = f"{folder.path}/{name}" if folder.path else name
                splits[path] = (split, split_folder) if split else (named[name], path) if name in named else ("", "")
        yield Place(folder=folder, split=split, split_folder=split_folder)


def _has_image(root: str, suffixes: Sequence[str], folder: str) -> bool:
    return any(suffix_of(name) in suffixes for each in walk(join(root, folder)) for name in each.files)


def suffix_of(name: str) -> str:
    """Return what follows the last dot of a file's name, in lower case."""
    return PurePosixPath(name).suffix.lower()[1:]


class CaptionFiles:
    """The caption files of one folder, found by the names of their images.

    Suffixes fit in any case, and names in any Unicode form; a name that fits exactly wins.
    """

    def __init__(self, names: Sequence[str], suffixes: Sequence[str]) -> None:
        self.suffixes = suffixes
        self._exact: dict[tuple[str, str], str] = {}
        self._alike: dict[tuple[str, str], str] = {}
        for name in names:
            lower = name.lower()
            for suffix in suffixes:
                if lower.endswith(f".{suffix}"):
                    stem = name[: -len(suffix) - 1]
                    if name.endswith(f".{suffix}"):
                        self._exact[stem, suffix] = name
                    self._exact.setdefault((stem, suffix), name)
                    self._alike.setdefault((normal_form(stem), suffix), name)

    def find(self, stem: str) -> tuple[str, str]:
        """Return (name, suffix) of an image's caption file, by the first suffix that it has; "" without one."""
        for suffix in self.suffixes:
            found = self._exact.get((stem, suffix)) or self._alike.get((normal_form(stem), suffix))
            if found is not None:
                return found, suffix
        return "", ""


@dataclass(kw_only=True)
class _Survey:
    """What a walk through a tree has shown."""

    images: Counter[str] = field(default_factory=Counter)
    """Number of images in each folder of a split; "" for those in none."""
    splits: dict[str, str] = field(default_factory=dict)
    """The split of each such folder."""
    labels: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """Class folders in each folder of a split."""
    captioned: set[str] = field(default_factory=set)
    """Folders of splits in which an image has a caption file."""
    tables: list[tuple[str, str]] = field(default_factory=list)
    """Paths of metadata tables below the root, and the folders of the splits that they are in."""
    others: Counter[str] = field(default_factory=Counter)
    """Number of files with other suffixes."""


def survey(root: str, options: FileOptions) -> _Survey:
    """Walk through a tree, and return what it holds."""
    found = _Survey()
    for place in walk_places(root, options.image_suffixes):
        files, at = place.folder.files, place.split_folder
        images = [name for name in files if suffix_of(name) in options.image_suffixes]
        found.others.update(f".{suffix_of(name)}" for name in files if suffix_of(name) not in options.image_suffixes)
        if table := metadata_table(files):
            found.tables.append((f"{place.folder.path}/{table}" if place.folder.path else table, at))
        if at:
            found.splits[at] = place.split
        if not images:
            continue
        found.images[at] += len(images)
        if place.label:
            found.labels[at].add(place.label)
        if at not in found.captioned:
            captions = CaptionFiles(files, options.caption_suffixes)
            if any(captions.find(PurePosixPath(name).stem)[0] for name in images):
                found.captioned.add(at)
    return found


def metadata_table(files: Sequence[str]) -> str | None:
    """Return the metadata table among the files of a folder."""
    lower = {name.lower(): name for name in files}
    return next((lower[name] for name in METADATA if name in lower), None)


def has_captions(root: str, options: FileOptions) -> bool:
    """Say whether an image of a folder has a caption file."""
    for folder in walk(root):
        captions = CaptionFiles(folder.files, options.caption_suffixes)
        for name in folder.files:
            if suffix_of(name) in options.image_suffixes and captions.find(PurePosixPath(name).stem)[0]:
                return True
    return False


def _no_image(root: str, found: _Survey, options: FileOptions) -> ModeclipError:
    seen = ", ".join(f"{suffix if suffix != '.' else '(none)'} ({n})" for suffix, n in found.others.most_common(8))
    where = "prefix" if is_url(root) else "folder"
    return ModeclipError(
        f"{where} {root!r} holds no image: expected files ending in"
        f" {' or '.join(options.image_suffixes)}, found {seen or 'no file at all'}; set data.image_keys"
    )


# ---------------------------------------------------------------- metadata tables


@dataclass(kw_only=True)
class Row:
    """What a metadata table says about an image."""

    table: str
    """Path of the table below the root."""
    number: int
    """Number of the row, from 1."""
    values: dict[str, Any]
    """Values of the columns."""
    used: bool = False
    """Whether its image was found."""


class Metadata:
    """The rows of the metadata tables of a tree, by the images that they name.

    Attributes:
        columns: Columns of the first table.
        problems: What cannot be read.
    """

    def __init__(self, root: str, tables: Sequence[str], image_column: str = "") -> None:
        """Read the tables.

        Args:
            root: Root of the tree.
            tables: Paths of the tables below the root.
            image_column: The column of file names, if not one of the usual.
        """
        self.root, self.tables = root, list(tables)
        self.columns: list[str] = []
        self.problems: list[Skipped] = []
        self._rows: dict[str, list[Row]] = {}
        self._alike: dict[str, str] = {}
        self._others: set[str] = set()
        for table in tables:
            folder = parent(table)
            for number, values in self._read(table):
                image, *others = file_columns(list(values), image_column)
                file = values[image]
                if not isinstance(file, str) or not file.strip():
                    self.problems.append(Skipped(f"{table} row {number}", NO_IMAGE, f"column {image} is empty"))
                    continue
                path = self._path(folder, file.strip())
                self._rows.setdefault(path, []).append(Row(table=table, number=number, values=values))
                self._alike.setdefault(plain_name(path), path)
                self._others.update(plain_name(self._path(folder, str(values[c]))) for c in others if values[c])

    def _path(self, folder: str, file: str) -> str:
        """Return a file's path below the root; one outside of it begins with ".." or is absolute."""
        if is_url(file):
            return file
        path = join(folder, file)
        if path.startswith("/") and not is_url(self.root):
            path = path.removeprefix(f"{self.root.rstrip('/')}/")
        return normpath(path)

    def _read(self, table: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (number, values) of the rows of a table."""
        try:
            for number, values in enumerate(_table_rows(join(self.root, table)), 1):
                if not isinstance(values, dict):
                    self.problems.append(Skipped(f"{table} row {number}", NOT_JSON, str(values)))
                    continue
                if not file_columns(list(values), ""):
                    self.problems.append(Skipped(f"{table} row {number}", NO_IMAGE, f"it has no {FILE_NAME}"))
                    continue
                self.columns = self.columns or list(values)
                yield number, values
        except (DamagedTable, OSError) as error:
            self.problems.append(Skipped(join(self.root, table), DAMAGED_TABLE, str(error)))

    def rows(self, path: str) -> list[Row]:
        """Return the rows that name an image, by its path below the root; the exact name wins."""
        found = self._rows.get(path)
        if found is None and (alike := self._alike.get(plain_name(path))) is not None:
            found = self._rows[alike]
        return found or []

    def is_other(self, path: str) -> bool:
        """Say whether an image is named in a column that is not read."""
        return plain_name(path) in self._others

    def unused(self) -> Iterator[tuple[str, list[Row]]]:
        """Yield the images whose rows were not asked for."""
        yield from ((path, rows) for path, rows in self._rows.items() if not rows[0].used)

    def schema(self) -> pa.Schema:
        """Return the columns of the first table, with the types that its first rows have."""
        rows = [rows[0].values for rows in islice(self._rows.values(), ROWS_FOR_TYPES)]
        fields = []
        for name in self.columns:
            kinds = {type(row[name]) for row in rows if row.get(name) is not None}
            if kinds <= _TYPES.keys() | {str} and kinds:
                kind = _TYPES.get(kinds.pop(), pa.string()) if len(kinds) == 1 else pa.string()
                fields.append(pa.field(name, kind))
        return pa.schema(fields)

    def first_value(self, names: Sequence[str]) -> tuple[str, object] | None:
        """Return the first of these columns that the tables have, and its value in the first row."""
        name = next((name for name in names if name in self.columns), None)
        row = next(iter(self._rows.values()), None)
        return None if name is None or row is None else (name, row[0].values.get(name))


def file_columns(columns: Sequence[str], image_column: str) -> list[str]:
    """Return the columns that name files: the one whose images are read, then the others.

    Examples:
        >>> file_columns(["id", "mask_file_name", "image_file_name"], "")
        ['image_file_name', 'mask_file_name']
    """
    found = [name for name in columns if name in (FILE_NAME, image_column) or name.endswith(f"_{FILE_NAME}")]
    order = (image_column, FILE_NAME, f"image_{FILE_NAME}")
    return sorted(found, key=lambda name: order.index(name) if name in order else len(order))


def _table_rows(table: str) -> Iterator[dict[str, Any] | str]:
    """Yield the rows of a metadata table, or what is wrong with one.

    Raises:
        DamagedTable: It cannot be read any further.
    """
    suffix = suffix_of(table)
    if suffix == "jsonl":
        with open_file(table) as lines:
            for line in lines:  # lines end at \n only
                if not line.strip():
                    continue
                try:
                    value = json.loads(line.decode("utf-8-sig"))
                except (ValueError, RecursionError) as error:
                    yield str(error)
                    continue
                yield value if isinstance(value, dict) else f"expected an object, got {str(value)[:40]}"
    elif suffix == "csv":
        rows = csv_rows(table, wanted=(FILE_NAME,))
        header = next(rows, CsvRow(1, []))
        for row in rows:
            yield row.problem or dict(zip(header.cells, (cell or None for cell in row.cells), strict=False))
    else:
        try:
            with TableFile(table) as file:
                for batch in file.batches(file.schema.names, 1 << 12):
                    yield from batch.to_pylist()
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise DamagedTable(" ".join(str(error).split())) from error


def is_metadata(table: str) -> bool:
    """Say whether a file named like a metadata table names files of images."""
    try:
        first = next(_table_rows(table), None)
    except (DamagedTable, OSError, ModeclipError):
        return False
    return isinstance(first, dict) and bool(file_columns(list(first), ""))


# ---------------------------------------------------------------- opening


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """How the images of a tree are read."""

    options: FileOptions
    """Suffixes of images and captions, and how captions are read."""
    chosen: str = ALL_SPLITS
    """The split that is read."""
    tables: tuple[str, ...] = ()
    """Metadata tables that give the captions."""
    image_column: str = ""
    """The column of file names in them, if not one of the usual."""
    caption_column: str = ""
    """The column of captions in them."""
    label_column: str = ""
    """The column of classes in them, where there are no captions."""
    extra: pa.Schema = field(default_factory=lambda: pa.schema([]))
    """Further columns of the metadata tables."""
    classes: bool = False
    """Whether the captions are the names of class folders."""
    task: str = ""
    """Name of a task: it begins the keys and is the group, and the bare names of classes are the captions."""


def open_folder(config: SourceConfig) -> DataSource:
    """Open a folder of images: with caption files, with a metadata table, or with a sub-folder for each class.

    Raises:
        ModeclipError: It holds no image, none of the chosen split, or a metadata table without captions.
    """
    root, options = absolute(config.source), config.options(FileOptions)
    found = survey(root, options)
    if not found.images:
        raise _no_image(root, found, options)
    if not found.splits and split_of(config.split) != TRAIN and config.split != ALL_SPLITS:
        raise ModeclipError(f"data.split {config.split!r}: {root!r} has no folders of splits such as train and test")
    kept = _chosen_folders(found, config.split)
    plan = _Plan(options=options, chosen=config.split)
    tables, extra = _tables_of(root, found, kept), pa.schema([])
    if tables:
        try:
            plan = _with_columns(config, root, tables, plan)
        except ModeclipError as error:
            if not any(found.labels[at] for at in kept) and not found.captioned & kept:
                raise
            log(f"{error}; captions are looked for elsewhere")
            tables = ()
    if tables:
        kind = "folder"
        extra = plan.extra
        column = plan.caption_column or plan.label_column
        what = f"folder of images with {PurePosixPath(tables[0]).name} (column {column!r})"
    elif found.captioned & kept or not any(found.labels[at] for at in kept):
        kind, what = "folder", "folder of images with caption files"
    else:
        kind, plan = "imagefolder", replace(plan, classes=True)
        labels = set[str]().union(*(found.labels[at] for at in kept))
        what = f"folder of images in {count(len(labels), 'sub-folder')}, whose names are their captions"
    if left := _left_out(found, kept):
        what += f"; data.split is {config.split}, left out: {left}"
    part = SourcePart(name=root, state="", read=partial(read_images, root, plan))
    return DataSource(kind=kind, parts=(part,), extra=extra, what=describe(what, extra))


def _chosen_folders(found: _Survey, chosen: str) -> set[str]:
    """Return the folders of splits that are read; "" stands for what is in none.

    Raises:
        ModeclipError: No image belongs to the chosen split.
    """
    kept = {at for at in found.images if not at or is_chosen(PurePosixPath(at).name, found.splits[at], chosen)}
    if not kept:
        names = {PurePosixPath(at).name for at in found.images if found.splits[at] != OTHER}
        raise missing_split(chosen, sorted(names))
    return kept


def _left_out(found: _Survey, kept: set[str]) -> str:
    """Return the folders of the splits that are not read, with the number of their images."""
    sizes: Counter[str] = Counter()
    for at, number in found.images.items():
        if at not in kept:
            sizes[PurePosixPath(at).name] += number
    return ", ".join(f"{name} ({count(number, 'image')})" for name, number in sorted(sizes.items()))


def _tables_of(root: str, found: _Survey, kept: set[str]) -> tuple[str, ...]:
    return tuple(table for table, at in found.tables if (not at or at in kept) and is_metadata(join(root, table)))


def _with_columns(config: SourceConfig, root: str, tables: tuple[str, ...], plan: _Plan) -> _Plan:
    """Return a plan that reads metadata tables.

    Raises:
        ModeclipError: They have neither captions nor classes.
    """
    options = config.options(TableOptions)
    image_column = options.image_column if options.image_column != IMAGE_COLUMN else ""
    metadata = Metadata(root, tables[:1], image_column)
    caption, label = "", ""
    try:
        caption = find_column(metadata.columns, "caption", options.caption_column, join(root, tables[0]))
    except ModeclipError:
        named = metadata.first_value(LABEL_COLUMNS)
        if options.caption_column != CAPTION_COLUMN or named is None or not isinstance(named[1], str):
            raise
        label = named[0]
    taken = {caption or label, *file_columns(metadata.columns, image_column)[:1]}
    return replace(
        plan,
        tables=tables,
        image_column=image_column,
        caption_column=caption,
        label_column=label,
        extra=extra_columns(metadata.schema(), taken),
    )


def open_img2dataset(config: SourceConfig) -> DataSource:
    """Open the folders that img2dataset wrote: 00000/ with images and texts, and 00000.parquet beside it, and so on."""
    root, options = absolute(config.source), config.options(FileOptions)
    folders, files = list_folder(root)
    tables = {name.lower(): name for name in files}
    known = {name.lower() for name in folders}
    lonely = [name[: -len(".parquet")] for name in files if name.lower().endswith(".parquet")]
    names = folders + [name for name in lonely if name.lower() not in known]
    sidecars = {name: join(root, tables.get(f"{name.lower()}.parquet", f"{name}.parquet")) for name in names}
    extra = sidecar_columns(next(path for name, path in sidecars.items() if f"{name.lower()}.parquet" in tables))
    parts = tuple(
        SourcePart(
            name=join(root, name),
            state="",
            read=partial(read_img2dataset, root, name, sidecars[name], options, extra),
        )
        for name in names
    )
    what = describe(count(len(names), "img2dataset folder"), extra)
    return DataSource(kind="img2dataset", parts=parts, extra=extra, what=what)


def open_classes(config: SourceConfig, task: str) -> DataSource:
    """Open an entry of ``data.tasks``; the caption of an image is its class, the bare name of the sub-folder.

    Of the splits of a folder, the one for testing is read, else that for validation, else that for training.

    Raises:
        ModeclipError: The folder does not exist, or holds no image.
    """
    name, folder = split_task(task)
    root, options = absolute(folder), config.options(FileOptions)
    if not is_folder(root):
        raise ModeclipError(
            f"task {name!r}: folder {folder!r} does not exist; data.tasks expects FOLDER or"
            " NAME=FOLDER, with a sub-folder of images for each class"
        )
    found = survey(root, options)
    if not found.images:
        raise _no_image(root, found, options)
    split = next((each for each in TASK_SPLITS if each in {found.splits.get(at) for at in found.images}), ALL_SPLITS)
    kept = _chosen_folders(found, split)
    plan = _Plan(options=options, chosen=split, classes=True, task=name)
    left = _left_out(found, kept)
    what = f"task {name}: a folder of classes" + (f"; {split} is read, left out: {left}" if left else "")
    if left:
        log(what)
    part = SourcePart(name=root, state="", read=partial(read_images, root, plan))
    return DataSource(kind="imagefolder", parts=(part,), extra=pa.schema([]), what=what)


def split_task(task: str) -> tuple[str, str]:
    """Split an entry of `data.tasks` into the task's name and its folder.

    Examples:
        >>> split_task("birds=eval/cub"), split_task("eval/pets")
        (('birds', 'eval/cub'), ('pets', 'eval/pets'))
    """
    name, equals, folder = task.partition("=")
    return (name, folder) if equals else (PurePosixPath(task).name, task)


# ---------------------------------------------------------------- reading


def read_images(root: str, plan: _Plan, below: str = "") -> Iterator[Sample | Skipped]:
    """Yield the images of a folder and its sub-folders, and count what is none or cannot be read.

    Args:
        root: The folder that keys and groups are relative to.
        plan: Which images are read, and where their captions are.
        below: Sub-folder to read; all by default.
    """
    options, forms = plan.options, Counter[str]()
    metadata = Metadata(root, plan.tables, plan.image_column) if plan.tables else None
    if metadata is not None:
        yield from metadata.problems
    for place in walk_places(join(root, below) if below else root, options.image_suffixes):
        folder = "/".join(filter(None, (below, place.folder.path)))
        prefix = "/".join(filter(None, (plan.task, folder)))
        yield from _oddities(place.folder, prefix, options)
        is_left_out = bool(place.split) and not is_chosen(
            PurePosixPath(place.split_folder).name, place.split, plan.chosen
        )
        captions = CaptionFiles([*place.folder.files, *place.folder.broken], options.caption_suffixes)
        for name in place.folder.files:
            suffix = suffix_of(name)
            key = f"{prefix}/{name}" if prefix else name
            path = f"{folder}/{name}" if folder else name
            if suffix not in options.image_suffixes:
                if suffix in OTHER_IMAGES:
                    yield Skipped(key, NOT_READ, f".{suffix}")
                continue
            where: dict[str, Any] = {
                "path": join(root, path),
                "group": plan.task or (place.label if plan.classes else folder),
            }
            if is_left_out:
                if metadata is not None:
                    _use(metadata.rows(path))
                if not plan.task:  # a task says once what it leaves out; mostly that is trained on
                    yield Skipped(key, OTHER_SPLIT, place.split_folder)
            elif metadata is not None and (rows := metadata.rows(path)):
                yield from _of_rows(rows, key, plan, where)
            elif metadata is not None and metadata.is_other(path):
                yield Skipped(key, OTHER_COLUMN, f"in {plan.tables[0]}")
            elif plan.classes:
                if place.label:
                    caption = place.label if plan.task else options.class_caption(place.label)
                    yield Sample(key, caption, **where)
                else:
                    yield Skipped(key, NO_CAPTION, "not in the sub-folder of a class")
            else:
                yield from _with_file(name, captions, key, options, where, metadata, forms)
    if metadata is not None:
        yield from _without_visit(metadata, root, plan)
    for form, number in forms.items():
        log(f"{root}: {count(number, 'caption file')} in Unicode form {form}, another than that of the image's name")


def _oddities(folder: Folder, prefix: str, options: FileOptions) -> Iterator[Skipped]:
    """Yield what a folder holds that could not be followed or listed."""
    for name in folder.broken:
        if (suffix := suffix_of(name)) not in options.caption_suffixes:  # its image is counted as one without a caption
            cause = MISSING if suffix in options.image_suffixes else BROKEN_LINK
            yield Skipped(f"{prefix}/{name}" if prefix else name, cause, "a link that leads nowhere")
    for name in folder.loops:
        cause = UNREADABLE if suffix_of(name) in options.image_suffixes else LOOP
        yield Skipped(f"{prefix}/{name}" if prefix else name, cause, "a link to itself, above it, or seen before")
    if folder.unreadable:
        yield Skipped(prefix or ".", UNLISTED, folder.unreadable)


def _with_file(
    name: str,
    files: CaptionFiles,
    key: str,
    options: FileOptions,
    where: Mapping[str, Any],
    metadata: Metadata | None,
    forms: Counter[str],
) -> Iterator[Sample | Skipped]:
    """Yield the samples of an image by the caption file beside it."""
    stem = PurePosixPath(name).stem
    file, suffix = files.find(stem)
    if not file:
        wanted = f"{stem}.{'/'.join(options.caption_suffixes)} beside it"
        wanted += "" if metadata is None else f" and no row in {metadata.tables[0]}"
        yield Skipped(key, NO_CAPTION, f"no {wanted}")
        return
    if not file.startswith(stem):
        forms[form_of(file)] += 1
    try:
        captions = options.read_captions(read_bytes(join(parent(where["path"]), file)), suffix, key)
    except OSError as error:
        captions = Skipped(key, NO_CAPTION, str(error))
    if isinstance(captions, Skipped):
        yield captions
    else:
        yield from samples_of(captions, key, **where)


def _of_rows(rows: Sequence[Row], key: str, plan: _Plan, where: Mapping[str, Any]) -> Iterator[Sample | Skipped]:
    """Yield the samples of an image by the rows of a metadata table that name it."""
    _use(rows)
    captions = list[str]()
    skipped: Skipped | None = None
    for row in rows:
        split = row.values.get("split")
        if isinstance(split, str) and (named := split_of(split)) and not is_chosen(split, named, plan.chosen):
            skipped = Skipped(key, OTHER_SPLIT, f"row {row.number} of {row.table}")
            continue
        value = row.values.get(plan.caption_column or plan.label_column)
        if plan.label_column and isinstance(value, str):
            value = plan.options.class_caption(value)
        texts = captions_of(value, key, f"{plan.caption_column or plan.label_column} of {row.table} row {row.number}")
        if isinstance(texts, Skipped):
            skipped = texts
        else:
            captions += [text for text in texts if text not in captions]
    if captions:
        more = {
            name: _fit(rows[0].values.get(column_of(name)), kind)
            for name, kind in zip(plan.extra.names, plan.extra.types, strict=True)
        }
        yield from samples_of(captions, key, extra=more, **where)
    elif skipped is not None:
        yield skipped


def _fit(value: Any, kind: pa.DataType) -> Any:
    """Return a value of a further column, or None where it has another type."""
    if value is None or isinstance(value, (list, dict)):
        return None
    if pa.types.is_string(kind):
        return printable(str(value))
    is_right = type(value) is {pa.bool_(): bool, pa.int64(): int}.get(kind, type(value))
    return value if is_right and isinstance(value, (bool, int, float)) else None


def _use(rows: Sequence[Row]) -> None:
    for row in rows:
        row.used = True


def _without_visit(metadata: Metadata, root: str, plan: _Plan) -> Iterator[Sample | Skipped]:
    """Yield the images of rows that no folder below the root has: files outside of it, or none."""
    for path, rows in metadata.unused():
        place = join(root, path)
        if (path.startswith("..") or path.startswith("/") or is_url(path)) and state(place):
            yield from _of_rows(rows, path, plan, {"path": place, "group": parent(rows[0].table)})
        else:
            yield Skipped(path, MISSING, f"named in row {rows[0].number} of {rows[0].table}")


def read_img2dataset(
    root: str, part: str, sidecar: str, options: FileOptions, extra: pa.Schema
) -> Iterator[Sample | Skipped]:
    """Yield the images of one of img2dataset's folders, with the columns of its Parquet file.

    Args:
        root: Folder of all parts.
        part: Name of the folder.
        sidecar: The Parquet file.
        options: Suffixes of images and captions, and how captions are read.
        extra: Columns to take from the Parquet file.
    """
    if not is_folder(join(root, part)):
        for _ in range(sidecar_size(sidecar) or 1):
            yield Skipped(join(root, part), NO_SHARD, f"{sidecar} tells of it")
        return
    if not state(sidecar):
        yield Skipped(sidecar, NO_SIDECAR, "its pairs have none of the further columns")
    try:
        columns = read_sidecar(sidecar, extra)
    except DamagedTable as error:
        columns = {}
        yield Skipped(sidecar, DAMAGED_TABLE, str(error))
    images = list(read_images(root, _Plan(options=options), part))
    stems = {item.path: _stem_below(item.path, join(root, part)) for item in images if isinstance(item, Sample)}
    last = Counter(stem.rpartition("/")[2] for stem in stems.values())
    for item in images:
        if isinstance(item, Sample):
            stem = stems[item.path]
            name = stem.rpartition("/")[2]
            more = columns.get(stem) or (columns.get(name, {}) if last[name] == 1 else {})
            yield Sample(item.key, item.caption, path=item.path, group=item.group, extra=more)
        else:
            yield item


def _stem_below(path: str | None, folder: str) -> str:
    """Return a path below a folder, without its suffix."""
    below = str(path).removeprefix(f"{folder}/")
    return below.rpartition(".")[0]


# ---------------------------------------------------------------- the kinds of sources


def _is_img2dataset(_: SourceConfig, folder: Listing) -> bool:
    return not {f"{name}.parquet".lower() for name in folder.folders}.isdisjoint(name.lower() for name in folder.files)


def _has_metadata(config: SourceConfig, folder: Listing) -> bool:
    table = metadata_table(folder.files)
    return table is not None and is_metadata(join(absolute(config.source), table))


def _is_folder(config: SourceConfig, folder: Listing) -> bool:
    has_table = any(name.lower().endswith(CSV_SUFFIXES) for name in folder.files)
    return not has_table or has_captions(absolute(config.source), config.options(FileOptions))


IMAGEFOLDER = SourceKind(
    name="imagefolder",
    expected="a folder of images with metadata.jsonl, .csv or .parquet",
    open=open_folder,
    fits_folder=_has_metadata,
)
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
