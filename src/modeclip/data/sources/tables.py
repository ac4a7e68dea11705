"""CSV, TSV and Parquet files or a Hugging Face dataset on disk go in; samples come out.

Tables have open_clip's default columns, ``filepath`` and ``title``, or those that other tools write. Hugging Face's
Arrow files are read by pyarrow alone. Rows stream: at most a row group of Parquet is held at a time. A file that cannot
be read, or breaks off, is skipped with its cause after what can be read of it.

Price: Python objects for each row, and the reading of images that lie in the table itself.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from modeclip.data.samples import DAMAGED_TABLE, MISSING_TABLE, NO_IMAGE, Sample, Skipped
from modeclip.data.sources.columns import (
    Columns,
    Numbering,
    captions_of,
    choose_columns,
    column_of,
    extra_columns,
    find_class_labels,
    find_column,
    printable,
    read_rows,
    refuse_addresses,
    to_values,
)
from modeclip.data.sources.options import DataConfig, Source, Unit, count, describe
from modeclip.errors import ModeclipError
from modeclip.system.paths import (
    expand,
    folders_below,
    is_folder,
    is_url,
    join,
    list_folder,
    open_file,
    parent,
    read_bytes,
    states,
)

CSV_SUFFIXES = (".csv", ".tsv")
BYTES_PER_READ = 1 << 22
"""Bytes of a Parquet column that are asked for at a time, where its pages are smaller."""
ROWS_PER_BATCH = 256
"""Rows held at a time; with images of a megabyte a quarter of a gigabyte."""


def list_tables(source: str, suffixes: tuple[str, ...]) -> list[str]:
    """Return the files that a source names: those of a folder with one of the suffixes, or names with braces."""
    if "::" not in source and is_folder(source):
        (folder,) = expand(source)
        return [join(folder, name) for name in list_folder(folder)[1] if name.lower().endswith(suffixes)]
    return expand(source)


def _present(source: str, files: list[str]) -> list[str]:
    """Return the states of files, of which one must be there."""
    found = states(files)
    if not any(found):
        raise ModeclipError(
            f"data.source {source!r}: none of {count(len(files), 'table file')} exists"
            f" (first: {files[0] if files else 'none named'}); correct the names"
        )
    return found


# ---------------------------------------------------------------- CSV


def open_csv(config: DataConfig) -> Source:
    """Open CSV or TSV files that begin with a header; all columns but image and caption are further ones, as texts.

    Raises:
        ModeclipError: None is there, or the first has not the columns.
    """
    files = list_tables(config.source, CSV_SUFFIXES)
    found = _present(config.source, files)
    first = next(file for file, state in zip(files, found, strict=True) if state)
    with _open_text(first) as text:
        rows = _csv_rows(text, first, config)
        header = next(rows, [])
        columns = _csv_columns(header, first, config)
        sample = next(rows, [])
    position = header.index(columns.image)
    refuse_addresses(columns.image, sample[position].strip() if position < len(sample) else None, first)
    groups = [group.rpartition("/")[0] for group in folders_below(files)]
    units = tuple(
        Unit(name=file, state=state, read=partial(read_csv, file, group, config, columns.extra))
        for file, state, group in zip(files, found, groups, strict=True)
    )
    what = f"{count(len(files), 'table')} (columns {columns.image!r} and {columns.caption!r})"
    return Source(kind="table", units=units, extra=columns.extra, what=describe(what, columns.extra))


def read_csv(table: str, group: str, config: DataConfig, extra: pa.Schema) -> Iterator[Sample | Skipped]:
    """Yield the rows of one table.

    Args:
        table: Path or address of the file.
        group: Begins the keys, where it is not empty.
        config: Names of columns, and the separator.
        extra: Further columns; empty cells are None.
    """
    name, numbered, line = PurePosixPath(table).name, Numbering(), 1
    try:
        with _open_text(table) as text:
            rows = _csv_rows(text, table, config)
            header = next(rows, [])
            columns = _csv_columns(header, table, config)
            image_at, caption_at = header.index(columns.image), header.index(columns.caption)
            further = [
                (column, header.index(column_of(column))) for column in extra.names if column_of(column) in header
            ]
            for row in rows:
                line += 1
                row += [""] * (len(header) - len(row))
                image, cell = row[image_at].strip(), row[caption_at].strip()
                key = f"{group}/{image}" if group else image
                if not image:
                    yield Skipped(f"{name} row {line}", NO_IMAGE, f"column {columns.image} is empty")
                    continue
                texts = captions_of(_list_of(cell), key, f"{columns.caption} of {name}")
                if isinstance(texts, Skipped):
                    yield texts
                    continue
                values = dict.fromkeys(extra.names) | {column: printable(row[at]) or None for column, at in further}
                path = join(parent(table), image)
                yield from numbered.samples(texts, key=key, path=path, group=group, extra=values if len(extra) else {})
    except (FileNotFoundError, NotADirectoryError):
        yield Skipped(table, MISSING_TABLE, "no such file")
    except csv.Error as error:
        yield Skipped(table, DAMAGED_TABLE, f"row {line + 1}: {error}; correct the quotes or set data.separator")
    except ModeclipError as error:
        yield Skipped(table, DAMAGED_TABLE, str(error))


def _open_text(table: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(open_file(table), encoding="utf-8-sig", errors="surrogateescape", newline="")


def _csv_rows(text: io.TextIOWrapper, table: str, config: DataConfig) -> Iterator[list[str]]:
    """Yield the rows that are not blank, the header first."""
    separator = config.separator or _find_separator(table, text.readline(1 << 20), config)
    text.seek(0)
    yield from filter(None, csv.reader(text, delimiter=separator))


def _find_separator(table: str, header: str, config: DataConfig) -> str:
    """Return the separator that splits a header into the wanted columns, or else into most."""
    if table.lower().endswith(".tsv"):
        return "\t"

    def fit(separator: str) -> tuple[int, int]:
        columns = next(csv.reader([header], delimiter=separator), [])
        wanted = {config.image_column, config.caption_column}
        return len(wanted & set(columns)), len(columns)

    return max("\t,;|", key=fit)


def _csv_columns(header: list[str], table: str, config: DataConfig) -> Columns:
    if not header:
        raise ModeclipError(f"table {table!r} is empty: expected a header and rows")
    image = find_column(header, "image", config.image_column, table)
    caption = find_column(header, "caption", config.caption_column, table)
    names = [printable(name) for name in dict.fromkeys(header)]
    extra = extra_columns(pa.schema([(name, pa.string()) for name in names]), {image, caption})
    return Columns(image=image, caption=caption, extra=extra)


def _list_of(cell: str) -> object:
    """Return the list that a cell holds as JSON, or the cell."""
    if not cell:
        return None
    if cell.startswith("[") and cell.endswith("]"):
        try:
            value = json.loads(cell)
        except (ValueError, RecursionError):
            return cell
        if isinstance(value, list) and all(isinstance(text, str) for text in value):
            return value
    return cell


# ---------------------------------------------------------------- Parquet


def open_parquet(config: DataConfig) -> Source:
    """Open Parquet files: images as bytes, as Hugging Face has them, or as paths.

    Raises:
        ModeclipError: None can be read, or the first that can has not the columns.
    """
    files = list_tables(config.source, (".parquet",))
    return _open_arrow(config, files, "Parquet file", "parquet", {})


def open_huggingface(config: DataConfig) -> Source:
    """Open what ``datasets`` saved to disk: one dataset, or the split "train" of several (all, if there is none).

    Raises:
        ModeclipError: It is no such folder, or its columns are not what is needed.
    """
    (folder,) = expand(config.source)
    folder, split = folder.rstrip("/"), ""
    folders = [folder]
    try:
        if "dataset_dict.json" in list_folder(folder)[1]:
            splits = json.loads(read_bytes(join(folder, "dataset_dict.json")))["splits"]
            kept = ["train"] if "train" in splits else splits
            folders = [join(folder, name) for name in kept]
            split = f", {' and '.join(kept)} of {', '.join(splits)}"
        files = [
            join(part, str(file["filename"]))
            for part in folders
            for file in json.loads(read_bytes(join(part, "state.json")))["_data_files"]
        ]
        features = json.loads(read_bytes(join(folders[0], "dataset_info.json"))).get("features") or {}
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise ModeclipError(
            f"data.source {config.source!r} is no whole Hugging Face dataset ({error!r}):"
            " write it again with save_to_disk"
        ) from error
    return _open_arrow(config, files, f"Hugging Face file{split}", "huggingface", find_class_labels(features))


def _open_arrow(
    config: DataConfig, files: list[str], noun: str, kind: str, classes: dict[str, tuple[str, ...]]
) -> Source:
    """Make the source of Parquet or Arrow files, after a look into the first that can be read."""
    found = _present(config.source, files)
    schema, first = _first_schema([file for file, state in zip(files, found, strict=True) if state])
    if classes:
        info = {
            "info": {"features": {name: {"_type": "ClassLabel", "names": names} for name, names in classes.items()}}
        }
        schema = schema.with_metadata({b"huggingface": json.dumps(info).encode()})
    elif kind == "parquet" and b"huggingface" in (schema.metadata or {}):
        kind = "huggingface"
    columns = choose_columns(schema, config, first)
    sample = next(_batches(first, [columns.image], 1), None)
    if sample is not None:
        refuse_addresses(columns.image, next(iter(to_values(sample[columns.image])), None), first)
    units = tuple(
        Unit(name=file, state=state, read=partial(read_arrow, file, group, config, columns))
        for file, state, group in zip(files, found, folders_below(files), strict=True)
    )
    name, _, split = noun.partition(",")
    what = (
        f"{count(len(files), name)}{',' + split if split else ''} (columns {columns.image!r} and {columns.caption!r})"
    )
    return Source(kind=kind, units=units, extra=columns.extra, what=describe(what, columns.extra))


def _first_schema(files: list[str]) -> tuple[pa.Schema, str]:
    problem = ""
    for file in files:
        try:
            with _Reader(file) as reader:
                return reader.schema, file
        except (pa.ArrowException, OSError) as error:
            problem = problem or " ".join(str(error).split())
    raise ModeclipError(
        f"table {files[0]!r} cannot be read ({problem}), nor can any other of {count(len(files), 'file')}"
    )


def read_arrow(table: str, group: str, config: DataConfig, columns: Columns) -> Iterator[Sample | Skipped]:
    """Yield the rows of one Parquet or Arrow file.

    Args:
        table: Path or address of the file.
        group: Begins the keys of images that lie in the table.
        config: Template of captions of classes.
        columns: Which columns mean what.
    """
    wanted = [columns.image, columns.caption, "key", "status", *map(column_of, columns.extra.names)]
    try:
        yield from read_rows(_batches(table, wanted, ROWS_PER_BATCH), columns, config, (parent(table), group))
    except (FileNotFoundError, NotADirectoryError):
        yield Skipped(table, MISSING_TABLE, "no such file")
    except (pa.ArrowException, OSError, KeyError) as error:
        yield Skipped(table, DAMAGED_TABLE, " ".join(str(error).split()))


def _batches(table: str, columns: list[str], size: int) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a Parquet or Arrow file; of the columns those that it has."""
    with _Reader(table) as reader:
        names = [name for name in dict.fromkeys(columns) if name in reader.schema.names]
        yield from reader.batches(names, size)


class _Reader:
    """A Parquet file, or one of Arrow's streams or files."""

    def __init__(self, table: str) -> None:
        import pyarrow.parquet as pq

        is_parquet = table.lower().endswith(".parquet")
        self._file = open_file(table) if is_url(table) else pa.memory_map(table)
        self._table: Any = None
        try:
            if is_parquet:
                self._table = pq.ParquetFile(self._file, buffer_size=BYTES_PER_READ)
                self.schema: pa.Schema = self._table.schema_arrow
            else:
                is_file = self._file.read(6) == b"ARROW1"
                self._file.seek(0)
                self._arrow = pa.ipc.open_file(self._file) if is_file else pa.ipc.open_stream(self._file)
                self.schema = self._arrow.schema
        except BaseException:
            self._file.close()
            raise

    def batches(self, names: list[str], size: int) -> Iterator[pa.RecordBatch]:
        if self._table is not None:
            yield from self._table.iter_batches(batch_size=size, columns=names)
            return
        whole = self._arrow
        number = getattr(whole, "num_record_batches", None)
        parts = whole if number is None else (whole.get_batch(position) for position in range(number))
        for part in parts:
            part = part.select(names)
            yield from (part.slice(start, size) for start in range(0, len(part), size))

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
