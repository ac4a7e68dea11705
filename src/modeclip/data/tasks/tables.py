"""Tasks in tables: CSV, TSV, JSON lines or Parquet files whose columns say what is asked.

An image and a label make a classification task; a list of labels means that an image shows several classes. An image
and a caption make a retrieval task; several rows, or a list of captions, may belong to one image. ``image_0, image_1,
caption_0, caption_1``, or an image with a caption and a ``negative_caption``, make a selection task as in Winoground
and SugarCrepe. A column ``split`` separates rows for training from rows for testing. Images are encoded in the table
(Parquet), or they are files beside the table or in a folder beside it.

Price: all columns but encoded images are read into memory. Encoded images are read only if rows with the same image
have to be found.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from modeclip.data.sources.folders import Metadata, is_metadata, metadata_table, walk_places
from modeclip.data.sources.source import TRAIN, count, preferred_split
from modeclip.data.sources.tables import (
    IMAGE_COLUMN,
    IMAGE_COLUMNS,
    CsvRow,
    DamagedTable,
    TableFile,
    class_label_names,
    csv_rows,
    holds_images,
    refuse_addresses,
)
from modeclip.data.tasks.images import EncodedImages, FileImages, TableImages
from modeclip.data.tasks.layouts import ASKED, CLASSNAMES, FILE_SUFFIXES, Found, read_lines, read_templates
from modeclip.data.tasks.task import Task
from modeclip.errors import ModeclipError
from modeclip.system.console import log
from modeclip.system.paths import form_of, is_url, join, list_folder, other_spelling, parent, read_bytes, state, walk

SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl")
IMAGES = (IMAGE_COLUMN, *IMAGE_COLUMNS, "filename", "file", "img")
LABELS = ("label", "class", "classname", "class_name", "category", "labels", "classes", "target")
CAPTIONS = ("caption", "captions", "title", "text", "TEXT", "sentences")
NEGATIVE = "negative_caption"
PAIR = ("image_0", "image_1", "caption_0", "caption_1")
SPLIT = "split"
KEYS = ("key", "id", "image_id")
"""Names of columns; of each list the first that a table has is used."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TaskTable:
    """The columns of a table, without the images in them."""

    path: str
    """The first of its files."""
    values: Mapping[str, Sequence[Any]]
    """Values of each column; a column of encoded images has only row numbers."""
    encoded: frozenset[str] = frozenset()
    """Names of the columns of encoded images."""
    classes: Mapping[str, tuple[str, ...]] | None = None
    """Class names of columns that hold class numbers, which Hugging Face's tables state."""
    images: Callable[[str, Sequence[str], Int[np.ndarray, " N"], Sequence[str]], EncodedImages] | None = None
    """Makes images of (task, columns, rows, names) from columns of encoded images; a row's images follow each other."""

    def __len__(self) -> int:
        return len(next(iter(self.values.values()), ()))

    def first(self, names: Iterable[str]) -> str | None:
        """Return the first of these columns that the table has."""
        return next((name for name in names if name in self.values), None)


def read_table(name: str, files: Sequence[str], retrieval: bool = False) -> dict[str, Found]:
    """Read the tasks of one table: "test", and "train" if a column ``split`` marks rows for training.

    Args:
        name: Name of the task.
        files: Files of the table, all of one kind; several Parquet files are read as one table.
        retrieval: Whether to ask for captions even if there are labels.

    Raises:
        ModeclipError: The table cannot be read, or lacks the columns of any task.
    """
    table = _read_parquet(files) if files[0].lower().endswith(".parquet") else _read_text(files[0])
    if not len(table):
        raise ModeclipError(f"task {name!r}: table {files[0]!r} has no rows")
    every = np.arange(len(table))
    if SPLIT not in table.values:
        return {"test": _task_of(name, table, every, retrieval)}
    splits = np.array([str(value) for value in table.values[SPLIT]])
    test = preferred_split(set(splits.tolist()), ASKED)
    if test is None:
        return {"test": _task_of(name, table, every, retrieval)}
    train = preferred_split(set(splits.tolist()), (TRAIN,))
    parts = {"test": test} | ({"train": train} if train is not None else {})
    return {
        part: _task_of(name, table, np.flatnonzero(splits == split), retrieval and part == "test")
        for part, split in parts.items()
    }


def find_metadata(folder: str) -> list[str]:
    """Return the metadata tables of Hugging Face's imagefolder in a folder and below, as paths relative to it."""
    found = []
    for each in walk(folder):
        if (table := metadata_table(each.files)) and is_metadata(join(join(folder, each.path), table)):
            found.append(join(each.path, table))
    return found


def read_metadata(name: str, folder: str, tables: Sequence[str], retrieval: bool) -> dict[str, Found]:
    """Read the task whose labels or captions metadata tables give, as "test", and as "train" if there is such a split.

    Args:
        name: Name of the task.
        folder: The folder of the images.
        tables: Paths of the tables, relative to it.
        retrieval: Whether to ask for captions even if there are labels.

    Raises:
        ModeclipError: A row cannot be read, its image is missing, or there are neither labels nor captions.
    """
    metadata = Metadata(folder, tables)
    if metadata.problems:
        first = metadata.problems[0]
        raise ModeclipError(f"task {name!r}: {first.key}: {first.cause} ({first.detail}); correct it")
    splits, unnamed, files = dict[str, str](), Counter[str](), list[tuple[str, str]]()
    for place in walk_places(folder, tuple(suffix[1:] for suffix in FILE_SUFFIXES)):
        for file in place.folder.files:
            if not file.lower().endswith(FILE_SUFFIXES):
                continue
            path = join(place.folder.path, file)
            split = PurePosixPath(place.split_folder).name
            if rows := metadata.rows(path):
                files.append((path, split))
                for row in rows:
                    row.used = True
                    splits.setdefault(path, str(row.values.get(SPLIT) or split))
            else:
                unnamed[split] += 1
    if missing := [path for path, _ in metadata.unused()]:
        raise ModeclipError(
            f"task {name!r}: image {missing[0]!r}, which {tables[0]!r} names, is not there ({len(missing):,} such"
            " rows): put it there or remove the row"
        )
    records = [row.values | {IMAGE_COLUMN: path} for path, _ in files for row in metadata.rows(path)]
    of_row = [splits[path] for path, _ in files for _ in metadata.rows(path)]
    columns = list(dict.fromkeys(column for record in records for column in record))
    table = TaskTable(
        path=join(folder, PurePosixPath(tables[0]).name),
        values={column: [record.get(column) for record in records] for column in columns},
    )
    if not len(table):
        raise ModeclipError(f"task {name!r}: {join(folder, tables[0])!r} names no image")
    asked, train = preferred_split(set(of_row), ASKED), preferred_split(set(of_row), (TRAIN,))
    if asked is None:
        asked = "" if "" in of_row else train or of_row[0]
    left = Counter(split for split in of_row if split != asked)
    told = [f"{split or 'no split'} ({count(number, 'row')})" for split, number in sorted(left.items())]
    told += [f"{count(sum(unnamed.values()), 'image')} that no row names"] if unnamed else []
    if told or asked:
        log(f"task {name!r}: reads {asked or tables[0]}" + (f"; leaves out {', '.join(told)}" if told else ""))
    chosen = {"test": asked} | ({"train": train} if train is not None and train != asked else {})
    return {
        part: _task_of(name, table, np.flatnonzero(np.array(of_row) == split), retrieval and part == "test")
        for part, split in chosen.items()
    }


def _task_of(name: str, table: TaskTable, chosen: Int[np.ndarray, " n"], retrieval: bool) -> Found:
    if all(column in table.values for column in PAIR):
        return _pairs(name, table, chosen)
    image, label, caption = table.first(IMAGES), table.first(LABELS), table.first(CAPTIONS)
    if image is None or (label is None and caption is None) or (retrieval and caption is None):
        wanted = f"{', '.join(IMAGES[:4])}" if image is None else "caption" if retrieval else "label or caption"
        raise ModeclipError(
            f"table {table.path!r} has no column {wanted}; its columns are {', '.join(table.values)}: rename one"
        )
    if image not in table.encoded:
        for number in chosen[:1].tolist():
            refuse_addresses(image, table.values[image][number], table.path)
    if NEGATIVE in table.values and caption is not None:
        return negatives(name, table, chosen, image, caption)
    if label is None or retrieval:
        assert caption is not None
        return _retrieval(name, table, chosen, image, caption)
    return _classification(name, table, chosen, image, label)


# ---------------------------------------------------------------- what is asked


def _classification(name: str, table: TaskTable, chosen: Int[np.ndarray, " n"], image: str, label: str) -> Found:
    values = _values(table, label, chosen)
    known = (table.classes or {}).get(label)
    lists = [value if isinstance(value, list) else [value] for value in values]
    several = any(isinstance(value, list) for value in values)
    flat = [each for value in lists for each in value]
    numbered = all(isinstance(each, int) or str(each).isdecimal() for each in flat)
    folder, named = parent(table.path), True
    lines = read_lines(folder, CLASSNAMES) if numbered and known is None else None
    if known is not None:
        classnames = known
    elif lines is not None:
        classnames = lines
    elif numbered:
        classnames, named = tuple(map(str, range(max(map(int, flat), default=0) + 1))), False
    else:
        classnames, named = tuple(sorted({str(each) for each in flat})), False
    if numbered:
        numbers = [[int(each) for each in value] for value in lists]
    else:
        number_of = {each: number for number, each in enumerate(classnames)}
        numbers = [[number_of[str(each)] for each in value] for value in lists]
    images = _images(name, table, [image], chosen)
    labels: np.ndarray = (
        np.array([value[0] for value in numbers], np.int64)
        if not several
        else _hot(name, numbers, len(classnames), images)
    )
    task = Task(
        name=name,
        kind="classification",
        images=images,
        classnames=classnames,
        labels=labels,
        metric="mean_average_precision" if several else "acc1",
        source=table.path,
        **read_templates(folder, classnames),
    )
    return Found(task=task, named=named, numbered=numbered and not named)


def _hot(name: str, numbers: Sequence[Sequence[int]], num_classes: int, images: EncodedImages) -> np.ndarray:
    labels = np.zeros((len(numbers), num_classes), bool)
    for row, own in enumerate(numbers):
        if own and not 0 <= min(own) <= max(own) < num_classes:
            raise ModeclipError(
                f"task {name!r}: labels {list(own)} of image {images.keys()[row]!r} are out of range: expected 0 to"
                f" {num_classes - 1}"
            )
        labels[row, list(own)] = True
    return labels


def _retrieval(name: str, table: TaskTable, chosen: Int[np.ndarray, " n"], image: str, caption: str) -> Found:
    captions = [value if isinstance(value, list) else [value] for value in _values(table, caption, chosen)]
    images = _images(name, table, [image], chosen)
    if image in table.encoded:
        identity: list[Any] = list(images.digests()) if len(chosen) > 1 else [0]
    else:
        identity = list(_values(table, image, chosen))
    number_of = {each: number for number, each in enumerate(dict.fromkeys(identity))}
    owner_of_row = np.array([number_of[each] for each in identity])
    firsts = np.unique(owner_of_row, return_index=True)[1]
    texts, owners = list[str](), list[int]()
    for row, own in zip(owner_of_row.tolist(), captions, strict=True):
        kept = [str(text).strip() for text in own if text is not None and str(text).strip()]
        texts += kept
        owners += [row] * len(kept)
    kept_images = _images(name, table, [image], chosen[firsts])
    return retrieval_task(name, kept_images, texts, owners, table.path)


def retrieval_task(name: str, images: EncodedImages, texts: Sequence[str], owners: Sequence[int], source: str) -> Found:
    """Make a retrieval task.

    Raises:
        ModeclipError: An image has no text.
    """
    without = np.setdiff1d(np.arange(len(images)), np.array(owners, np.int64))
    if len(without):
        raise ModeclipError(
            f"task {name!r}: image {images.keys()[int(without[0])]!r} has no caption ({len(without):,} such images):"
            " give it one or remove it"
        )
    task = Task(
        name=name,
        kind="retrieval",
        images=images,
        texts=tuple(texts),
        image_of_text=np.array(owners, np.int64),
        source=source,
    )
    return Found(task=task, named=True)


def _pairs(name: str, table: TaskTable, chosen: Int[np.ndarray, " n"]) -> Found:
    columns = list(PAIR[:2])
    images = _images(name, table, columns, chosen)
    texts = [
        text for each in zip(*(_values(table, column, chosen) for column in PAIR[2:]), strict=True) for text in each
    ]
    instances = np.repeat(np.arange(len(chosen)), 2)
    return _selection(name, images, texts, instances, instances, table.path)


def negatives(name: str, table: TaskTable, chosen: Int[np.ndarray, " n"], image: str, caption: str) -> Found:
    """Make a selection task in which each image has a right caption and a wrong one.

    Raises:
        ModeclipError: A caption is empty, or an image is missing.
    """
    pairs = zip(_values(table, caption, chosen), _values(table, NEGATIVE, chosen), strict=True)
    texts = [str(text) for pair in pairs for text in pair]
    images = _images(name, table, [image], chosen)
    count = np.arange(len(chosen))
    return _selection(name, images, texts, count, np.repeat(count, 2), table.path)


def _selection(
    name: str,
    images: EncodedImages,
    texts: Sequence[object],
    of_images: Int[np.ndarray, " n"],
    of_texts: Int[np.ndarray, " t"],
    source: str,
) -> Found:
    for number, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise ModeclipError(f"task {name!r}: a caption of row {int(of_texts[number]) + 1} of {source!r} is empty")
    task = Task(
        name=name,
        kind="selection",
        images=images,
        texts=tuple(str(text).strip() for text in texts),
        instance_of_image=of_images,
        instance_of_text=of_texts,
        source=source,
    )
    return Found(task=task, named=True)


def _values(table: TaskTable, column: str, chosen: Int[np.ndarray, " n"]) -> list[Any]:
    found = [table.values[column][row] for row in chosen.tolist()]
    for row, value in zip(chosen.tolist(), found, strict=True):
        if value is None or (isinstance(value, str) and not value.strip()):
            raise ModeclipError(f"table {table.path!r}: column {column!r} of row {row + 1} is empty")
    return found


def _images(name: str, table: TaskTable, columns: Sequence[str], chosen: Int[np.ndarray, " n"]) -> EncodedImages:
    """Return the images of some rows; those of one row follow each other."""
    key = table.first(KEYS)
    names = [str(row if key is None else table.values[key][row]) for row in chosen.tolist() for _ in columns]
    if len(columns) > 1:
        names = [f"{each}/{columns[number % len(columns)]}" for number, each in enumerate(names)]
    if columns[0] in table.encoded:
        assert table.images is not None
        return table.images(name, columns, chosen, names)
    folder, cells = parent(table.path), [_values(table, column, chosen) for column in columns]
    files = [str(file) for row in zip(*cells, strict=True) for file in row]
    return file_images(name, folder, files, names if key is not None or len(columns) > 1 else files)


def file_images(name: str, folder: str, files: Sequence[str], names: Sequence[str]) -> FileImages:
    """Find images in a folder or its sub-folders by their names, with or without suffix.

    Raises:
        ModeclipError: An image is in none of them.
    """
    if is_url(folder):
        return FileImages(task=name, names=names, paths=[join(folder, file) for file in files])
    places = [folder, *(join(folder, below) for below in list_folder(folder)[0])]
    listed = {place: frozenset(list_folder(place)[1]) for place in places}
    paths = [_place(file, listed) for file in files]
    spelled = {file: _place_spelled(file, places) for file, path in zip(files, paths, strict=True) if path is None}
    paths = [path or spelled[file] for file, path in zip(files, paths, strict=True)]
    if respelled := [(file, path) for file, path in spelled.items() if path is not None]:
        file, path = respelled[0]
        log(
            f"task {name!r}: {count(len(respelled), 'image')} spelled another way than named; the first, {file!r}"
            f" ({form_of(file)}), was found as {path!r} ({form_of(path)})"
        )
    if missing := [file for file, path in zip(files, paths, strict=True) if path is None]:
        raise ModeclipError(
            f"task {name!r}: image {missing[0]!r} is neither in {folder!r} nor in its sub-folders ({len(missing):,} of"
            f" {len(files):,} images are missing); put the images there"
        )
    return FileImages(task=name, names=names, paths=[path for path in paths if path is not None])


def _place(file: str, listed: Mapping[str, frozenset[str]]) -> str | None:
    for folder, names in listed.items():
        if "/" in file:
            if state(join(folder, file)):
                return join(folder, file)
        elif found := next((name for name in (file, f"{file}.png", f"{file}.jpg") if name in names), None):
            return join(folder, found)
    return None


def _place_spelled(file: str, places: Sequence[str]) -> str | None:
    """Return the image of a name that differs in Unicode form or in the case of its suffix."""
    return next((found for place in places if (found := other_spelling(join(place, file)))), None)


# ---------------------------------------------------------------- files


def _read_text(path: str) -> TaskTable:
    """Read CSV, TSV, JSON lines, or as .txt a header and lines of "file,caption" without quotes (Flickr8k's format)."""
    suffix = path.lower().rpartition(".")[2]
    try:
        if suffix in ("csv", "tsv"):
            columns, rows = _read_cells(path)
        else:
            # Lines end at \n: U+2028 and the like are text.
            lines = [line.rstrip("\r") for line in read_bytes(path).decode("utf-8-sig").split("\n")]
            if suffix == "jsonl":
                records = [_parse_line(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
                columns = list(dict.fromkeys(name for record in records for name in record))
                rows = [[record.get(name) for name in columns] for record in records]
            else:
                pairs = [line.partition(",") for line in [line for line in lines if line.strip()][1:]]
                columns, rows = ["image", "caption"], [[file.strip(), caption] for file, _, caption in pairs]
    except FileNotFoundError as error:
        raise ModeclipError(f"table {path!r} does not exist") from error
    except UnicodeDecodeError as error:
        raise ModeclipError(f"table {path!r} cannot be read: {error}") from error
    return TaskTable(path=path, values={name: [row[at] for row in rows] for at, name in enumerate(columns)})


def _parse_line(path: str, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ModeclipError(f"table {path!r} cannot be read: line {number}: {error}; correct it") from error
    if not isinstance(record, dict):
        raise ModeclipError(
            f"table {path!r} cannot be read: line {number}: expected a JSON object per line, got {line[:60]}"
        )
    return record


def _read_cells(path: str) -> tuple[list[str], list[list[Any]]]:
    """Return header and rows of a CSV file."""
    try:
        every = csv_rows(path, wanted=(*IMAGES, *LABELS, *CAPTIONS))
        header, rows = next(every, CsvRow(1, [])), list[list[Any]]()
        for row in every:
            if problem := row.problem or header.problem:
                raise ModeclipError(f"table {path!r}: {problem}; correct it")
            try:
                "".join(row.cells).encode()
            except UnicodeEncodeError as error:
                raise ModeclipError(f"table {path!r}: line {row.line} is not UTF-8; save the table as UTF-8") from error
            rows.append(list(row.cells))
    except DamagedTable as error:
        raise ModeclipError(f"table {path!r} cannot be read: {error}; write it again") from error
    return header.cells, rows


def _read_parquet(files: Sequence[str]) -> TaskTable:
    tables, starts, groups, start = [], list[int](), list[tuple[int, int]](), 0
    for number, path in enumerate(files):
        try:
            with TableFile(path) as table:
                schema = table.schema
                encoded = [field.name for field in schema if holds_images(field.type)]
                tables.append(table.read([name for name in schema.names if name not in encoded]))
                for group, size in enumerate(table.group_sizes):
                    starts.append(start)
                    groups.append((number, group))
                    start += size
        except (pa.ArrowException, OSError) as error:
            raise ModeclipError(f"table {path!r} cannot be read: {' '.join(str(error).split())}") from error
    try:
        whole = pa.concat_tables(tables)
    except pa.ArrowException as error:
        raise ModeclipError(
            f"the tables beside {files[0]!r} have different columns: keep the tables of one set"
        ) from error
    values: dict[str, Sequence[Any]] = {name: whole[name].to_pylist() for name in whole.column_names}
    values |= {name: range(start) for name in encoded}

    def images(task: str, columns: Sequence[str], rows: Int[np.ndarray, " N"], names: Sequence[str]) -> EncodedImages:
        return TableImages(
            task=task,
            names=names,
            files=files,
            columns=columns,
            group_starts=np.array(starts, np.int64),
            groups=groups,
            rows=np.repeat(rows, len(columns)),
            column_of_image=np.tile(np.arange(len(columns)), len(rows)),
        )

    return TaskTable(
        path=files[0], values=values, encoded=frozenset(encoded), classes=class_label_names(schema), images=images
    )
