"""A table goes in (CSV, TSV, JSON lines, Parquet); the task that its rows ask comes out.

The columns say what is asked: an image and a label are classification (a list of labels: several classes an image), an
image and a caption retrieval (several rows, or a list of captions, for one image), ``image_0, image_1, caption_0,
caption_1`` or an image with a caption and a ``negative_caption`` are selection, as in Winoground and SugarCrepe. A
column ``split`` tells the rows for training from those for testing. Images are encoded in the table (Parquet), or files
beside it or in one of the folders there.

Price: the columns other than encoded images are read as a whole; encoded images only where rows that hold the same one
have to be recognised.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from modeclip.data.sources.columns import IMAGE_COLUMNS, class_features, refuse_addresses
from modeclip.data.sources.options import IMAGE_COLUMN
from modeclip.data.tasks.images import EncodedImages, FileImages, TableImages
from modeclip.data.tasks.layouts import CLASSNAMES, TEST_FOLDERS, TRAIN_FOLDER, Found, read_lines, read_templates
from modeclip.data.tasks.task import Task
from modeclip.errors import ModeclipError
from modeclip.system.paths import is_url, join, list_folder, open_file, parent, read_bytes, state

SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl")
IMAGES = (IMAGE_COLUMN, *IMAGE_COLUMNS, "filename", "file", "img")
LABELS = ("label", "class", "classname", "class_name", "category", "labels", "classes", "target")
CAPTIONS = ("caption", "captions", "title", "text", "TEXT", "sentences")
NEGATIVE = "negative_caption"
PAIR = ("image_0", "image_1", "caption_0", "caption_1")
SPLIT = "split"
KEYS = ("key", "id", "image_id")
"""Columns that are looked for, the first that is there counts."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """The rows of a table, without the images in it."""

    path: str
    """Its first file."""
    values: Mapping[str, Sequence[Any]]
    """Columns by name; those of encoded images hold nothing."""
    encoded: frozenset[str] = frozenset()
    """Names of the columns of encoded images."""
    classes: Mapping[str, tuple[str, ...]] | None = None
    """Class names of numbered columns, as Hugging Face's tables have them."""
    images: Callable[[str, Sequence[str], Int[np.ndarray, " N"], Sequence[str]], EncodedImages] | None = None
    """Makes the images of (task, columns, rows, names) in columns of encoded images; rows of the first column first."""

    def __len__(self) -> int:
        return len(next(iter(self.values.values()), ()))

    def first(self, names: Iterable[str]) -> str | None:
        """Return the first of some columns that is there."""
        return next((name for name in names if name in self.values), None)


def read_table(name: str, files: Sequence[str], retrieval: bool = False) -> dict[str, Found]:
    """Read the tasks that one table holds: "test", and "train" where a column ``split`` says so.

    Args:
        name: Name of the task.
        files: Its files, all of one kind; several Parquet files follow one another.
        retrieval: Whether captions are asked for where there are labels too.

    Raises:
        ModeclipError: It cannot be read, or its columns are not what is needed.
    """
    rows = _read_parquet(files) if files[0].lower().endswith(".parquet") else _read_text(files[0])
    if not len(rows):
        raise ModeclipError(f"task {name!r}: table {files[0]!r} has no rows")
    every = np.arange(len(rows))
    if SPLIT not in rows.values:
        return {"test": _task_of(name, rows, every, retrieval)}
    splits = np.array([str(value) for value in rows.values[SPLIT]])
    test = next((split for split in TEST_FOLDERS if split in splits), None)
    if test is None:
        return {"test": _task_of(name, rows, every, retrieval)}
    parts = {"test": test} | ({"train": TRAIN_FOLDER} if TRAIN_FOLDER in splits else {})
    return {
        part: _task_of(name, rows, np.flatnonzero(splits == split), retrieval and part == "test")
        for part, split in parts.items()
    }


def _task_of(name: str, rows: Rows, chosen: Int[np.ndarray, " n"], retrieval: bool) -> Found:
    if all(column in rows.values for column in PAIR):
        return _pairs(name, rows, chosen)
    image, label, caption = rows.first(IMAGES), rows.first(LABELS), rows.first(CAPTIONS)
    if image is None or (label is None and caption is None) or (retrieval and caption is None):
        wanted = f"{', '.join(IMAGES[:4])}" if image is None else "caption" if retrieval else "label or caption"
        raise ModeclipError(
            f"table {rows.path!r} has no column {wanted}; its columns are {', '.join(rows.values)}: rename one"
        )
    if image not in rows.encoded:
        for number in chosen[:1].tolist():
            refuse_addresses(image, rows.values[image][number], rows.path)
    if NEGATIVE in rows.values and caption is not None:
        return negatives(name, rows, chosen, image, caption)
    if label is None or retrieval:
        assert caption is not None
        return _retrieval(name, rows, chosen, image, caption)
    return _classification(name, rows, chosen, image, label)


# ---------------------------------------------------------------- what is asked


def _classification(name: str, rows: Rows, chosen: Int[np.ndarray, " n"], image: str, label: str) -> Found:
    values = _values(rows, label, chosen)
    known = (rows.classes or {}).get(label)
    lists = [value if isinstance(value, list) else [value] for value in values]
    several = any(isinstance(value, list) for value in values)
    flat = [each for value in lists for each in value]
    numbered = all(isinstance(each, int) or str(each).isdecimal() for each in flat)
    folder, named = parent(rows.path), True
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
    images = _images(name, rows, [image], chosen)
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
        source=rows.path,
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


def _retrieval(name: str, rows: Rows, chosen: Int[np.ndarray, " n"], image: str, caption: str) -> Found:
    captions = [value if isinstance(value, list) else [value] for value in _values(rows, caption, chosen)]
    images = _images(name, rows, [image], chosen)
    if image in rows.encoded:
        identity: list[Any] = list(images.digests()) if len(chosen) > 1 else [0]
    else:
        identity = list(_values(rows, image, chosen))
    number_of = {each: number for number, each in enumerate(dict.fromkeys(identity))}
    owner_of_row = np.array([number_of[each] for each in identity])
    firsts = np.unique(owner_of_row, return_index=True)[1]
    texts, owners = list[str](), list[int]()
    for row, own in zip(owner_of_row.tolist(), captions, strict=True):
        kept = [str(text).strip() for text in own if text is not None and str(text).strip()]
        texts += kept
        owners += [row] * len(kept)
    kept_images = _images(name, rows, [image], chosen[firsts])
    return retrieval_task(name, kept_images, texts, owners, rows.path)


def retrieval_task(name: str, images: EncodedImages, texts: Sequence[str], owners: Sequence[int], source: str) -> Found:
    """Make a retrieval task, after a look whether each image has a text.

    Raises:
        ModeclipError: One has none.
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


def _pairs(name: str, rows: Rows, chosen: Int[np.ndarray, " n"]) -> Found:
    columns = list(PAIR[:2])
    images = _images(name, rows, columns, chosen)
    texts = [
        text for each in zip(*(_values(rows, column, chosen) for column in PAIR[2:]), strict=True) for text in each
    ]
    instances = np.repeat(np.arange(len(chosen)), 2)
    return _selection(name, images, texts, instances, instances, rows.path)


def negatives(name: str, rows: Rows, chosen: Int[np.ndarray, " n"], image: str, caption: str) -> Found:
    """Make the task of telling an image's caption from another one.

    Raises:
        ModeclipError: A caption is empty, or an image is missing.
    """
    pairs = zip(_values(rows, caption, chosen), _values(rows, NEGATIVE, chosen), strict=True)
    texts = [str(text) for pair in pairs for text in pair]
    images = _images(name, rows, [image], chosen)
    count = np.arange(len(chosen))
    return _selection(name, images, texts, count, np.repeat(count, 2), rows.path)


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


def _values(rows: Rows, column: str, chosen: Int[np.ndarray, " n"]) -> list[Any]:
    found = [rows.values[column][row] for row in chosen.tolist()]
    for row, value in zip(chosen.tolist(), found, strict=True):
        if value is None or (isinstance(value, str) and not value.strip()):
            raise ModeclipError(f"table {rows.path!r}: column {column!r} of row {row + 1} is empty")
    return found


def _images(name: str, rows: Rows, columns: Sequence[str], chosen: Int[np.ndarray, " n"]) -> EncodedImages:
    """Return the images of some rows, those of a row after one another."""
    key = rows.first(KEYS)
    names = [str(row if key is None else rows.values[key][row]) for row in chosen.tolist() for _ in columns]
    if len(columns) > 1:
        names = [f"{each}/{columns[number % len(columns)]}" for number, each in enumerate(names)]
    if columns[0] in rows.encoded:
        assert rows.images is not None
        return rows.images(name, columns, chosen, names)
    folder, cells = parent(rows.path), [_values(rows, column, chosen) for column in columns]
    files = [str(file) for row in zip(*cells, strict=True) for file in row]
    return file_images(name, folder, files, names if key is not None or len(columns) > 1 else files)


def file_images(name: str, folder: str, files: Sequence[str], names: Sequence[str]) -> FileImages:
    """Return images that lie in a folder or in one of its sub-folders, with or without their suffix.

    Raises:
        ModeclipError: One is in none of them.
    """
    if is_url(folder):
        return FileImages(task=name, names=names, paths=[join(folder, file) for file in files])
    places = [folder, *(join(folder, below) for below in list_folder(folder)[0])]
    listed = {place: frozenset(list_folder(place)[1]) for place in places}
    paths = [_place(file, listed) for file in files]
    if missing := [file for file, path in zip(files, paths, strict=True) if path is None]:
        raise ModeclipError(
            f"task {name!r}: image {missing[0]!r} is neither in {folder!r} nor in a folder there ({len(missing):,} of"
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


# ---------------------------------------------------------------- CSV and JSON lines


def _read_text(path: str) -> Rows:
    try:
        text = read_bytes(path).decode("utf-8-sig")
        if path.lower().endswith(".jsonl"):
            records = [json.loads(line) for line in text.splitlines() if line.strip()]
            if strange := [record for record in records if not isinstance(record, dict)]:
                raise TypeError(f"expected a JSON object a line, got {json.dumps(strange[0])[:60]}")
            columns = list(dict.fromkeys(name for record in records for name in record))
        elif path.lower().endswith(".txt"):
            return _caption_lines(path, text)
        else:
            head = text[: text.find("\n") % (len(text) + 1)]
            table = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if "\t" in head else ",", strict=True)
            records, columns = list(table), list(table.fieldnames or [])
            short = next((number for number, record in enumerate(records, 1) if None in record), None)
            if short is not None:
                raise ModeclipError(f"table {path!r}: row {short} has more cells than the header; correct its quotes")
    except FileNotFoundError as error:
        raise ModeclipError(f"table {path!r} does not exist") from error
    except (csv.Error, AttributeError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModeclipError(f"table {path!r} cannot be read: {error}") from error
    return Rows(path=path, values={name: [record.get(name) for record in records] for name in columns})


def _caption_lines(path: str, text: str) -> Rows:
    """Read lines of "file,caption" after a header, in which captions hold commas without quotes."""
    lines = [line.partition(",") for line in text.splitlines()[1:] if line.strip()]
    return Rows(
        path=path,
        values={"image": [file.strip() for file, _, _ in lines], "caption": [caption for _, _, caption in lines]},
    )


# ---------------------------------------------------------------- Parquet


def _read_parquet(files: Sequence[str]) -> Rows:
    import pyarrow.parquet as pq

    tables, starts, groups, start = [], list[int](), list[tuple[int, int]](), 0
    for number, path in enumerate(files):
        try:
            with open_file(path) as source, pq.ParquetFile(source) as table:
                schema = table.schema_arrow
                encoded = [field.name for field in schema if _is_encoded(field.type)]
                tables.append(table.read([name for name in schema.names if name not in encoded]))
                for group in range(table.num_row_groups):
                    starts.append(start)
                    groups.append((number, group))
                    start += table.metadata.row_group(group).num_rows
        except (pa.ArrowException, OSError) as error:
            raise ModeclipError(f"table {path!r} cannot be read: {' '.join(str(error).split())}") from error
    try:
        whole = pa.concat_tables(tables)
    except pa.ArrowException as error:
        raise ModeclipError(f"the tables beside {files[0]!r} have different columns: keep those of one set") from error
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

    return Rows(path=files[0], values=values, encoded=frozenset(encoded), classes=class_features(schema), images=images)


def _is_encoded(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return {"bytes", "path"} <= {kind.field(number).name for number in range(kind.num_fields)}
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
