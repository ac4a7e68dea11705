"""Tables of pairs: CSV, TSV and Parquet files, and Hugging Face datasets on disk.

A table has open_clip's default columns, ``filepath`` and ``title``, or those that other tools write. What a column is
follows from its type and its name: images are bytes, Hugging Face's struct of bytes and path, or paths; captions are
texts, lists of texts, or numbers of classes whose names are known. All other scalar columns come along as further ones.
img2dataset's Parquet files beside shards and folders (sidecars) are read here too.

Rows stream: at most a row group of Parquet is held at a time. A file that is damaged is skipped with its cause, after
the rows that can be read.

This is the one reader of tables, for ``modeclip.data.tasks`` too: ``TableFile`` opens Parquet and Arrow files,
``csv_rows`` reads CSV, ``holds_images`` and ``class_label_names`` say what a column is, ``refuse_addresses`` stops at
columns of web addresses, and ``IMAGE_COLUMN`` and ``IMAGE_COLUMNS`` are the usual names.

Price: Python objects for each row and value, and the reading of images that are in the table itself.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from modeclip.data.samples import (
    BAD_ROW,
    DAMAGED_TABLE,
    EMPTY_CAPTION,
    MISSING_TABLE,
    NO_CAPTION,
    NO_IMAGE,
    NOT_DOWNLOADED,
    NOT_UTF8,
    Sample,
    Skipped,
)
from modeclip.data.sources.captions import FileOptions, clean_captions
from modeclip.data.sources.source import (
    MAX_CONFIGURATIONS,
    TRAIN,
    DataSource,
    Listing,
    SourceConfig,
    SourceKind,
    SourcePart,
    chosen_files,
    count,
    describe,
    files_by_split,
    is_chosen,
    missing_split,
    split_of,
)
from modeclip.errors import ModeclipError
from modeclip.system.console import log
from modeclip.system.paths import (
    absolute,
    expand,
    folders_below,
    home,
    is_folder,
    is_url,
    join,
    list_folder,
    open_file,
    parent,
    read_bytes,
    states,
)

IMAGE_COLUMN, CAPTION_COLUMN = "filepath", "title"
"""open_clip's names of columns."""
IMAGE_COLUMNS = ("image", "jpg", "image_bytes", "path", "file_name")
CAPTION_COLUMNS = ("caption", "text", "TEXT", "captions")
"""Names that are looked for where the default ones are missing."""
RESERVED = ("key", "caption", "image", "path", "offset", "size", "width", "height", "group", "task")
"""Columns of the catalog itself; a source's columns of these names are kept as ``source_NAME``, and a line says so. A
column ``group`` of a table is the pairs' ``group``."""
GROUP = "group"
MEASURED = ("key", "caption", "width", "height")
"""Columns of an img2dataset sidecar that the catalog has anyway."""
SUCCESS = "success"
ARROW_SUFFIXES = (".parquet", ".feather", ".arrow", ".ipc")
"""Suffixes of Parquet files, and of files and streams of Arrow."""
CSV_SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
GZIP = b"\x1f\x8b"
MAX_LINE = 1 << 24
"""Characters that a line, or a cell of several lines, may have."""
MAX_LINES = 1000
"""Lines that a cell may have."""
LINES_LOOKED_AT = 50
"""Lines from which the separator is guessed."""
TOO_LONG = "\0too long\n"
"""Stands in the place of a line that is longer."""
FILE_LIKE = re.compile(r"[^\s\"']+\.[A-Za-z]\w{1,4}")
"""What a name of a file looks like."""
BYTES_PER_READ = 1 << 22
"""Bytes of a Parquet column that are asked for at a time, where its pages are smaller."""
ROWS_PER_BATCH = 256
"""Rows held at a time; with images of a megabyte that is a quarter of a gigabyte."""
ROWS_PER_SIDECAR = 1 << 16
"""Rows of a sidecar that are read at a time; it holds no images."""


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """Which columns of a table hold images and captions."""

    image_column: str = "filepath"
    """Tables: column of image paths, absolute or relative to the table's folder; in Parquet also of encoded images. By
    default `filepath`, or else image, jpg, image_bytes, path or file_name, whichever is there."""
    caption_column: str = "title"
    """Tables: column of captions, in Parquet also of lists of captions. By default `title`, or else caption, text,
    TEXT or captions, whichever is there."""
    separator: str | None = None
    """CSV: the character between columns. By default it is what a first line such as `sep=;` says, a tab in .tsv files,
    or what the header and the first rows tell."""

    def __post_init__(self) -> None:
        for name in ("image_column", "caption_column"):
            if not getattr(self, name).strip():
                raise ModeclipError(f"data.{name}: expected a name, got {getattr(self, name)!r}")
        if self.separator is not None and len(self.separator) != 1:
            raise ModeclipError(f"data.separator: expected one character, got {self.separator!r}")


class DamagedTable(Exception):  # noqa: N818 (it says what is wrong with the file)
    """A table file cannot be read."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns of a table mean what."""

    image: str
    """Column of images."""
    caption: str
    """Column of captions."""
    extra: pa.Schema
    """Further columns, under the names that the catalog gives them; ``column_of`` returns the name in the table."""
    class_captions: tuple[str, ...] = ()
    """Captions of the classes, where the caption column holds their numbers."""


# ---------------------------------------------------------------- which columns mean what


def find_column(names: Sequence[str], kind: str, name: str, table: str) -> str:
    """Return the name of the image or caption column: the configured one, or one of the usual names.

    Args:
        names: Columns of the table.
        kind: "image" or "caption".
        name: The configured name. If it is the default, the usual names are tried after it.
        table: Path of the table, for the message.

    Raises:
        ModeclipError: The table has no such column.
    """
    default, usual = {"image": (IMAGE_COLUMN, IMAGE_COLUMNS), "caption": (CAPTION_COLUMN, CAPTION_COLUMNS)}[kind]
    wanted = (name, *usual) if name == default else (name,)
    if found := next((candidate for candidate in wanted if candidate in names), None):
        return found
    url = next((column for column in names if column.lower() in ("url", "image_url")), None)
    hint = f"; if the images are those of column {url!r}, download them with img2dataset first" if url else ""
    raise ModeclipError(
        f"table {table!r} has no {kind} column {name!r}; its columns are"
        f" {', '.join(names)}; set data.{kind}_column" + (hint if kind == "image" else "")
    )


def refuse_addresses(column: str, value: object, table: str) -> None:
    """Stop at an image column whose first value is an address of the web.

    Raises:
        ModeclipError: The value is such an address.
    """
    if isinstance(value, str) and value.startswith(("http://", "https://")):
        raise ModeclipError(
            f"table {table!r}: image column {column!r} holds addresses such as {value[:80]!r}:"
            " download the images with img2dataset first and index what it writes"
        )


def extra_columns(schema: pa.Schema, taken: set[str]) -> pa.Schema:
    """Return the scalar columns that are not taken; a type that is neither a number nor a boolean becomes text."""
    fields: list[pa.Field] = []
    for field in schema:
        kind = plain_type(field.type)
        if field.name in {*taken, ""} or pa.types.is_nested(kind) or item_type(kind) is not None or _is_binary(kind):
            continue
        numeric = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
        name = f"source_{field.name}" if field.name in RESERVED else field.name
        if column_of(name) == field.name and all(name != known.name for known in fields):
            fields.append(pa.field(name, kind if numeric else pa.string()))
    return pa.schema(fields)


def tell_renamed(extra: pa.Schema) -> None:
    """Log which columns of a table have other names in the catalog."""
    if renamed := [name for name in extra.names if column_of(name) != name]:
        log(f"columns {', '.join(map(column_of, renamed))} of the table are named {', '.join(renamed)} in the catalog")


def column_of(name: str) -> str:
    """Return the name that a further column of the catalog has in its table.

    Examples:
        >>> column_of("source_size"), column_of("source_url")
        ('size', 'source_url')
    """
    return name[7:] if name.startswith("source_") and name[7:] in RESERVED else name


def class_label_names(schema: pa.Schema) -> dict[str, tuple[str, ...]]:
    """Return the class names of each column that Hugging Face's metadata in a schema call a ClassLabel."""
    try:
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        return _label_names(info.get("info", {}).get("features", {}))
    except (ValueError, AttributeError):
        return {}


def _label_names(features: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    return {
        name: tuple(feature["names"])
        for name, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
    }


def holds_images(kind: pa.DataType) -> bool:
    """Say whether a type of columns can hold encoded images: bytes, or Hugging Face's struct of bytes and path."""
    kind = plain_type(kind)
    if pa.types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0)
    return _is_binary(kind)


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Return what a column holds, however it is encoded: of dictionaries, runs and extensions the type of their values.

    Examples:
        >>> plain_type(pa.dictionary(pa.int8(), pa.string()))
        DataType(string)
    """
    while True:
        if isinstance(kind, pa.BaseExtensionType):
            kind = kind.storage_type
        elif pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
            kind = kind.value_type
        else:
            return kind


def item_type(kind: pa.DataType) -> pa.DataType | None:
    """Return the plain type of the items of a list of any kind; None for a type that is no list."""
    kind, is_type = plain_type(kind), pa.types
    checks = (is_type.is_list, is_type.is_large_list, is_type.is_fixed_size_list)
    if any(check(kind) for check in (*checks, is_type.is_list_view, is_type.is_large_list_view)):
        return plain_type(kind.value_type)
    return None


def _is_binary(kind: pa.DataType) -> bool:
    kind, is_type = plain_type(kind), pa.types
    checks = (is_type.is_binary, is_type.is_large_binary, is_type.is_fixed_size_binary, is_type.is_binary_view)
    return any(check(kind) for check in checks)


def _is_text(kind: pa.DataType) -> bool:
    kind, is_type = plain_type(kind), pa.types
    return any(check(kind) for check in (is_type.is_string, is_type.is_large_string, is_type.is_string_view))


# ---------------------------------------------------------------- what cells hold


class _Numbering:
    """Makes samples, and numbers consecutive ones that have the same key."""

    def __init__(self) -> None:
        self._key, self._number = "", 0

    def samples(self, captions: list[str], *, key: str, **where: Any) -> Iterator[Sample]:
        """Yield a sample for each caption."""
        for caption in captions:
            self._number = self._number + 1 if key == self._key else 0
            self._key = key
            yield Sample(f"{key}#{self._number}" if self._number else key, caption, **where)


def captions_of(value: object, key: str, column: str) -> list[str] | Skipped:
    """Return the captions in a cell, which holds a text or a list of texts."""
    if value is None:
        return Skipped(key, NO_CAPTION, f"column {column} is empty")
    texts = [value] if isinstance(value, str) else [text for text in value if text] if isinstance(value, list) else []
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return Skipped(key, NOT_UTF8, f"column {column}: {error.reason}")
    return clean_captions(texts) or Skipped(key, EMPTY_CAPTION, f"column {column} holds no text")


def to_values(column: pa.Array) -> list[Any]:
    """Return a column as Python values; bytes that are not UTF-8 become lone surrogates."""
    column = plain_column(column)
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        kind = pa.large_binary() if item_type(column.type) is None else pa.large_list(pa.large_binary())
        cells = column.cast(kind).to_pylist()
    return [[_to_text(item) for item in cell] if isinstance(cell, list) else _to_text(cell) for cell in cells]


def plain_column(column: pa.Array) -> pa.Array:
    """Return a column as ``plain_type`` says it is."""
    while column.type != (kind := plain_type(column.type)):
        if isinstance(column.type, pa.BaseExtensionType):
            column = column.storage
        elif pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        else:
            column = pc.run_end_decode(column)
        del kind
    return column


def _to_text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("utf-8", "surrogateescape")


def printable(text: str) -> str:
    """Return a text that can be stored: what is not UTF-8 becomes �."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _extras_of(batch: pa.RecordBatch, extra: pa.Schema) -> list[dict[str, Any]]:
    """Return the further columns of each row; a value that does not fit the type of its column becomes None."""
    if not len(extra):
        return []
    values = []
    for field in extra:
        name = column_of(field.name)
        try:
            known = name in batch.schema.names
            column = plain_column(batch[name]).cast(field.type) if known else pa.nulls(len(batch))
        except pa.ArrowException:
            column = pa.nulls(len(batch))
        cells = to_values(column)
        is_text = pa.types.is_string(field.type)
        values.append([printable(cell) if is_text and cell is not None else cell for cell in cells])
    return [dict(zip(extra.names, row, strict=True)) for row in zip(*values, strict=True)]


# ---------------------------------------------------------------- table files that a source names


def list_tables(config: SourceConfig, suffixes: tuple[str, ...]) -> list[str]:
    """Return the files that a source names: those of a folder that have one of the suffixes, or names with braces.

    Of the splits in a folder only the chosen one counts.
    """
    if "::" not in config.source and is_folder(home(config.source)):
        (folder,) = expand(config.source)
        return chosen_files(files_by_split(folder, suffixes, hub=suffixes == ARROW_SUFFIXES), config.split)
    return expand(config.source)


def _states(source: str, files: list[str]) -> list[str]:
    """Return the states of table files, at least one of which must exist."""
    found = states(files)
    if not any(found):
        raise ModeclipError(
            f"data.source {source!r}: none of {count(len(files), 'table file')} exists"
            f" (first: {files[0] if files else 'none named'}); correct the names"
        )
    return found


# ---------------------------------------------------------------- CSV


def open_csv(config: SourceConfig) -> DataSource:
    """Open CSV or TSV files that begin with a header; all columns but image and caption are further ones, as texts.

    Raises:
        ModeclipError: None of the files exists, or the first lacks a column.
    """
    options, files = config.options(TableOptions), list_tables(config, CSV_SUFFIXES)
    found = _states(config.source, files)
    first = next(file for file, state in zip(files, found, strict=True) if state)
    try:
        rows = _rows_of(first, options)
        columns = _csv_columns(header := _header_of(rows, first), first, options)
        row = next(rows, CsvRow(0, []))
    except DamagedTable as error:
        raise ModeclipError(f"table {first!r} cannot be read: {error}; write it again") from error
    if not row.problem and row.cells:
        refuse_addresses(columns.image, row.cells[header.index(columns.image)].strip(), first)
    groups = [group.rpartition("/")[0] for group in folders_below(files)]
    parts = tuple(
        SourcePart(name=file, state=state, read=partial(read_csv, file, group, options, columns.extra))
        for file, state, group in zip(files, found, groups, strict=True)
    )
    tell_renamed(columns.extra)
    what = f"{count(len(files), 'table')} (columns {columns.image!r} and {columns.caption!r})"
    return DataSource(kind="table", parts=parts, extra=columns.extra, what=describe(what, columns.extra))


def read_csv(table: str, group: str, options: TableOptions, extra: pa.Schema) -> Iterator[Sample | Skipped]:
    """Yield the rows of one table as samples.

    Args:
        table: Path or address of the file.
        group: Prefix of the keys; "" for none.
        options: Names of columns, and the separator.
        extra: Further columns; empty cells are None.
    """
    name, numbered = PurePosixPath(table).name, _Numbering()
    try:
        rows = _rows_of(table, options)
        header = _header_of(rows, table)
        columns = _csv_columns(header, table, options)
        image_at, caption_at = header.index(columns.image), header.index(columns.caption)
        further = [(column, header.index(column_of(column))) for column in extra.names if column_of(column) in header]
        group_at = header.index(GROUP) if GROUP in header and GROUP not in (columns.image, columns.caption) else None
        for line, row, problem in rows:
            if problem:
                yield Skipped(f"{name} line {line}", BAD_ROW, f"{table} {problem}")
                continue
            image, cell = row[image_at].strip(), row[caption_at].strip()
            key = f"{group}/{image}" if group else image
            if not image:
                yield Skipped(f"{name} line {line}", NO_IMAGE, f"column {columns.image} is empty")
                continue
            texts = captions_of(_list_of(cell), key, f"{columns.caption} of {name}")
            if isinstance(texts, Skipped):
                yield texts
                continue
            values = dict.fromkeys(extra.names) | {column: printable(row[at]) or None for column, at in further}
            path = join(parent(table), image)
            own = group if group_at is None else printable(row[group_at]) or group
            yield from numbered.samples(texts, key=key, path=path, group=own, extra=values if len(extra) else {})
    except (FileNotFoundError, NotADirectoryError):
        yield Skipped(table, MISSING_TABLE, "no such file")
    except (DamagedTable, ModeclipError) as error:
        yield Skipped(table, DAMAGED_TABLE, str(error))


def _header_of(rows: Iterator[CsvRow], table: str) -> list[str]:
    """Return the header of a CSV file.

    Raises:
        ModeclipError: It cannot be read.
        DamagedTable: Neither can the file.
    """
    header = next(rows, CsvRow(1, []))
    if header.problem:
        raise ModeclipError(f"table {table!r}: {header.problem}; expected a header in UTF-8")
    return header.cells


class CsvRow(NamedTuple):
    """A row of a CSV file, or a line that is none."""

    line: int
    """Number of the line that it begins in, from 1 on."""
    cells: list[str]
    problem: str = ""
    """Why it cannot be read, with the number of its line; "" if it can."""


def csv_rows(table: str, separator: str | None = None, wanted: Collection[str] = ()) -> Iterator[CsvRow]:
    """Yield the rows of a CSV or TSV file that are not blank, the header first.

    A row whose quotes are damaged, or that has another number of cells than the header, has a ``problem``. A quote that
    is opened and not closed takes only its own line along: the lines behind it are rows again.

    Args:
        table: Path or address of the file, which may be compressed by gzip. What is not UTF-8 in it becomes lone
            surrogates; UTF-16 is read if it begins with its mark.
        separator: The character between columns. By default it is what a first line ``sep=;`` says, a tab in .tsv
            files, or the one that splits the header into most of the wanted columns, and the first lines alike.
        wanted: Columns that the table should have.

    Raises:
        FileNotFoundError: There is no such file.
        DamagedTable: It is compressed and cannot be read to its end.
    """
    with open_file(table) as file:
        try:
            text = _decoded(file)
            lines = _Lines(text)
            first = lines.peek(1)
            if first and (said := re.fullmatch(r'"?sep=(.)"?', first[0].rstrip("\r\n"), re.IGNORECASE)):
                separator = separator or said[1]
                lines.take(1)
            if separator is None:
                header = "".join(lines.peek(1))
                is_tsv = table.lower().removesuffix(".gz").endswith(".tsv") and "\t" in header
                separator = "\t" if is_tsv else _guess_separator(lines.peek(LINES_LOOKED_AT), wanted)
            yield from _parse_rows(lines, separator)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DamagedTable(" ".join(str(error).split())) from error


def _decoded(file: Any) -> io.TextIOWrapper:
    """Return the text of an open file, by its first bytes."""
    head = file.read(4)
    file.seek(0)
    if head.startswith(GZIP):
        file = gzip.GzipFile(fileobj=file)
        head = file.read(4)
        file.seek(0)
    for mark, encoding in ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32")):
        if head == mark:
            return io.TextIOWrapper(file, encoding=encoding, errors="replace", newline="")
    if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return io.TextIOWrapper(file, encoding="utf-16", errors="replace", newline="")
    return io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")


class _Lines:
    """The lines of a text, of which those ahead can be looked at; none is kept longer than `MAX_LINE` characters."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self._text = text
        self._ahead: deque[str] = deque()
        self.number = 1
        """Number of the next line."""

    def peek(self, count: int) -> list[str]:
        """Return the next lines, as many of them as there are."""
        while len(self._ahead) < count and (line := self._text.readline(MAX_LINE)):
            while not line.endswith(("\n", "\r")) and len(line) >= MAX_LINE:
                if not (rest := self._text.readline(MAX_LINE)).endswith(("\n", "\r")) and rest:
                    continue
                line = TOO_LONG
            self._ahead.append(line)
        return list(islice(self._ahead, count))

    def line(self, place: int) -> str:
        """Return the line that is so many lines ahead; "" behind the end."""
        if place >= len(self._ahead):
            self.peek(place + 1)
        return self._ahead[place] if place < len(self._ahead) else ""

    def take(self, count: int) -> None:
        """Go on behind the next lines."""
        for _ in range(count):
            self._ahead.popleft()
        self.number += count


def _guess_separator(lines: Sequence[str], wanted: Collection[str]) -> str:
    """Return the character that splits the header into most wanted columns, then most lines into as many cells."""

    def fit(candidate: str) -> tuple[int, int, int]:
        header, *rows = [next(csv.reader([line], delimiter=candidate), []) for line in lines] or [[]]
        alike = sum(len(row) == len(header) for row in rows) if len(header) > 1 else 0
        return len(set(wanted) & set(header)), alike, len(header)

    csv.field_size_limit(MAX_LINE)
    return max("\t,;|", key=fit)


def _parse_rows(lines: _Lines, separator: str) -> Iterator[CsvRow]:
    csv.field_size_limit(MAX_LINE)
    header: list[str] | None = None
    while line := lines.line(0):
        number = lines.number
        if not line.strip(" \r\n\f\v"):
            lines.take(1)
            continue
        cells, taken, problem = _parse_record(lines, separator, header)
        lines.take(taken)
        if header is None:
            header = cells
        elif not problem and len(cells) > len(header) and not any(cells[len(header) :]):
            cells = cells[: len(header)]
        elif not problem and len(cells) != len(header):
            advice = f"quote cells with {separator!r}" if len(cells) > len(header) else "fill in the missing ones"
            problem = f"{count(len(cells), 'cell')} where the header has {len(header)}: {advice}"
        elif not problem and cells == header:
            problem = "it repeats the header"
        yield CsvRow(number, cells, f"line {number}: {problem}" if problem else "")


def _parse_record(lines: _Lines, separator: str, header: list[str] | None) -> tuple[list[str], int, str]:
    """Return the cells of the next row, how many lines it has, and what is wrong with it."""
    taken, first = 0, lines.line(0)

    def record() -> Iterator[str]:
        nonlocal taken
        size = 0
        while taken < MAX_LINES and size <= MAX_LINE and (line := lines.line(taken)):
            taken += 1
            size += len(line)
            yield line

    if first == TOO_LONG:
        return [], 1, f"it is longer than {MAX_LINE:,} characters"
    if "\0" in first:
        return [], 1, "it has a byte that is 0"
    try:
        cells = next(csv.reader(record(), delimiter=separator, strict=True), [])
    except csv.Error as error:
        return [], 1, f"a quote is not closed, or stands where none can be ({error})"
    if (
        taken > 1
        and header is not None
        and (len(cells) != len(header) or _swallows(lines, taken, separator, len(header)))
    ):
        end = lines.number + taken - 1
        return [], 1, f"a quote is not closed before the rows behind it (it would end in line {end})"
    return cells, taken, ""


def _swallows(lines: _Lines, taken: int, separator: str, num_columns: int) -> bool:
    """Say whether a quoted cell goes over lines that look like rows: file names where its own row has some."""

    def files_in(line: str) -> set[int] | None:
        cells = line.rstrip("\r\n").split(separator)
        return {n for n, cell in enumerate(cells) if FILE_LIKE.fullmatch(cell)} if len(cells) >= num_columns else None

    own = files_in(lines.line(0))
    return bool(own) and any((files_in(lines.line(place)) or set()) >= (own or set()) for place in range(1, taken))


def _rows_of(table: str, options: TableOptions) -> Iterator[CsvRow]:
    return csv_rows(
        table, options.separator, (options.image_column, options.caption_column, *IMAGE_COLUMNS, *CAPTION_COLUMNS)
    )


def _csv_columns(header: list[str], table: str, options: TableOptions) -> Columns:
    if not header:
        raise ModeclipError(f"table {table!r} is empty: expected a header and rows")
    image = find_column(header, "image", options.image_column, table)
    caption = find_column(header, "caption", options.caption_column, table)
    names = [printable(name) for name in dict.fromkeys(header)]
    extra = extra_columns(pa.schema([(name, pa.string()) for name in names]), {image, caption, GROUP})
    return Columns(image=image, caption=caption, extra=extra)


def _list_of(cell: str) -> object:
    """Return the list that a cell holds as JSON, or else the cell; None where it is empty."""
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


# ---------------------------------------------------------------- Parquet and Arrow


class TableFile:
    """An open Parquet file, or an open file or stream of Arrow; use it as a context manager.

    Where several columns have the same name, the first counts, as in CSV files.
    """

    def __init__(self, table: str) -> None:
        """Open a file by its path or address.

        Raises:
            FileNotFoundError: There is no such file.
            pa.ArrowException: It is damaged. Damage may also be an OSError.
        """
        import pyarrow.parquet as pq

        is_parquet = table.lower().endswith(".parquet")
        self._file = open_file(table) if is_url(table) else pa.memory_map(table)
        self._parquet: Any = None
        try:
            if is_parquet:
                self._parquet = pq.ParquetFile(self._file, buffer_size=BYTES_PER_READ)
                self.schema: pa.Schema = self._parquet.schema_arrow
            else:
                is_file = self._file.read(6) == b"ARROW1"
                self._file.seek(0)
                self._arrow = pa.ipc.open_file(self._file) if is_file else pa.ipc.open_stream(self._file)
                self.schema = self._arrow.schema
            if len(names := dict.fromkeys(self.schema.names)) < len(self.schema):
                firsts = [self.schema.field(self.schema.names.index(name)) for name in names]
                self.schema = pa.schema(firsts, self.schema.metadata)
        except BaseException:
            self._file.close()
            raise

    @property
    def group_sizes(self) -> list[int]:
        """Rows of each row group of a Parquet file, which are read together."""
        metadata = self._parquet.metadata
        return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    def batches(self, names: Sequence[str], size: int) -> Iterator[pa.RecordBatch]:
        """Yield the rows as batches of at most ``size`` rows; named columns that the table lacks are left out."""
        known = [name for name in dict.fromkeys(names) if name in self.schema.names]
        if self._parquet is not None:
            for part in self._parquet.iter_batches(batch_size=size, columns=known):
                yield part.select([part.schema.names.index(name) for name in known])
            return
        whole = self._arrow
        number = getattr(whole, "num_record_batches", None)
        for part in whole if number is None else (whole.get_batch(position) for position in range(number)):
            chosen = part.select([part.schema.names.index(name) for name in known])
            yield from (chosen.slice(start, size) for start in range(0, len(chosen), size))

    def read(self, names: Sequence[str], group: int | None = None) -> pa.Table:
        """Return columns of a Parquet file, of all its rows or of one row group."""
        columns = list(names)
        found = self._parquet.read(columns) if group is None else self._parquet.read_row_group(group, columns)
        return found.select([found.schema.names.index(name) for name in columns])

    def __enter__(self) -> TableFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def open_parquet(config: SourceConfig) -> DataSource:
    """Open Parquet or Arrow files whose images are bytes, Hugging Face's structs, or paths.

    Raises:
        ModeclipError: None of the files can be read, or the first that can be lacks a column.
    """
    files = list_tables(config, ARROW_SUFFIXES)
    noun = "Parquet file" if all(file.lower().endswith(".parquet") for file in files) else "Arrow file"
    return _open_arrow(config, files, noun, "parquet", {})


def open_huggingface(config: SourceConfig) -> DataSource:
    """Open what ``datasets`` saved to disk: a dataset, or the split "train" of several splits (all, if there is none).

    Raises:
        ModeclipError: The folder is incomplete, or a column is missing.
    """
    (folder,) = expand(config.source)
    folder, split = folder.rstrip("/"), ""
    folders = [folder]
    try:
        if "dataset_dict.json" in list_folder(folder)[1]:
            splits = json.loads(read_bytes(join(folder, "dataset_dict.json")))["splits"]
            kept = [name for name in splits if is_chosen(name, split_of(name), config.split)]
            if not kept and config.split != TRAIN:
                raise missing_split(config.split, splits)
            kept = kept or splits
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
    return _open_arrow(config, files, f"Hugging Face file{split}", "huggingface", _label_names(features))


def _open_arrow(
    config: SourceConfig, files: list[str], noun: str, kind: str, labels: Mapping[str, tuple[str, ...]]
) -> DataSource:
    """Open Parquet or Arrow files after a look into the first that can be read.

    Args:
        config: Names of columns.
        files: Paths or addresses.
        noun: What a file is called, and what follows its number after a comma.
        kind: Kind of the source.
        labels: Class names of numbered columns; without any, the schema is searched for them.
    """
    found = _states(config.source, files)
    schema, first = _first_schema([file for file, state in zip(files, found, strict=True) if state])
    if kind == "parquet" and b"huggingface" in (schema.metadata or {}):
        kind = "huggingface"
    columns = _arrow_columns(schema, labels or class_label_names(schema), config, first)
    try:
        with TableFile(first) as table:
            batch = next(table.batches([columns.image], 1), None)
            value = next(iter(to_values(batch[columns.image])), None) if batch is not None else None
    except (pa.ArrowException, OSError):  # reading counts it
        value = None
    refuse_addresses(columns.image, value, first)
    parts = tuple(
        SourcePart(
            name=file,
            state=state,
            read=partial(read_arrow, file, group, columns),
            num_samples=partial(table_size, file),
        )
        for file, state, group in zip(files, found, folders_below(files), strict=True)
    )
    tell_renamed(columns.extra)
    name, comma, split = noun.partition(",")
    what = f"{count(len(files), name)}{comma}{split} (columns {columns.image!r} and {columns.caption!r})"
    return DataSource(kind=kind, parts=parts, extra=columns.extra, what=describe(what, columns.extra))


def _first_schema(files: list[str]) -> tuple[pa.Schema, str]:
    """Return the schema of the first file that can be read, and that file."""
    problem = ""
    for file in files:
        try:
            with TableFile(file) as table:
                return table.schema, file
        except (pa.ArrowException, OSError) as error:
            problem = problem or " ".join(str(error).split())
    raise ModeclipError(
        f"table {files[0]!r} cannot be read ({problem}), nor can any other of {count(len(files), 'file')}"
    )


def _arrow_columns(
    schema: pa.Schema, labels: Mapping[str, tuple[str, ...]], config: SourceConfig, table: str
) -> Columns:
    """Find the image and the caption column of a table, whose types must fit.

    Raises:
        ModeclipError: A column is missing or has a type that cannot be right.
    """
    options = config.options(TableOptions)
    image = find_column(schema.names, "image", options.image_column, table)
    try:
        caption = find_column(schema.names, "caption", options.caption_column, table)
    except ModeclipError:
        if options.caption_column != CAPTION_COLUMN or not labels:
            raise
        caption = next(iter(labels))
    kind = schema.field(image).type
    if not (holds_images(kind) or _is_text(kind)):
        raise ModeclipError(f"table {table!r}: image column {image!r} holds {kind}, expected bytes, paths or images")
    kind = schema.field(caption).type
    item = item_type(kind) or kind
    if not _is_text(item) and caption not in labels:
        raise ModeclipError(f"table {table!r}: caption column {caption!r} holds {kind}, expected text or lists of text")
    extra = extra_columns(schema, {image, caption, "key", GROUP})
    captions = map(config.options(FileOptions).class_caption, labels.get(caption, ()))
    return Columns(image=image, caption=caption, extra=extra, class_captions=tuple(captions))


def read_arrow(table: str, group: str, columns: Columns) -> Iterator[Sample | Skipped]:
    """Yield the rows of one Parquet or Arrow file as samples.

    The key of an image in the table is ``group/key``, where the second key comes from a column ``key`` or else is the
    row's number. A column ``status``, as img2dataset writes it, tells why an image is missing.

    Args:
        table: Path or address of the file.
        group: Prefix of the keys of images that are in the table.
        columns: Which columns mean what.
    """
    wanted = [columns.image, columns.caption, "key", "status", GROUP, *map(column_of, columns.extra.names)]
    numbered, start = _Numbering(), 0
    try:
        with TableFile(table) as file:
            for batch in file.batches(wanted, ROWS_PER_BATCH):
                yield from _read_batch(batch, start, columns, (parent(table), group), numbered)
                start += len(batch)
    except (FileNotFoundError, NotADirectoryError):
        yield Skipped(table, MISSING_TABLE, "no such file")
    except (pa.ArrowException, OSError, KeyError) as error:
        yield Skipped(table, DAMAGED_TABLE, " ".join(str(error).split()))


def _read_batch(
    batch: pa.RecordBatch, start: int, columns: Columns, place: tuple[str, str], numbered: _Numbering
) -> Iterator[Sample | Skipped]:
    """Yield the rows of a batch as samples.

    Args:
        batch: Rows of the table.
        start: Number of the first row.
        columns: Which columns mean what.
        place: Folder that paths of images are relative to, and the group.
        numbered: Makes the samples.
    """
    names = batch.schema.names
    images, captions = to_values(batch[columns.image]), to_values(batch[columns.caption])
    keys = to_values(batch["key"]) if "key" in names else range(start, start + len(batch))
    status = to_values(batch["status"]) if "status" in names else None
    extras = _extras_of(batch, columns.extra)
    named = GROUP in names and GROUP not in (columns.image, columns.caption)
    groups = to_values(batch[GROUP]) if named else [None] * len(batch)
    for row, (image, caption, key) in enumerate(zip(images, captions, keys, strict=True)):
        where = _locate(image, str(key), *place)
        if where is None:
            lost = status is not None and status[row] != SUCCESS
            cause, detail = (NOT_DOWNLOADED, str(status[row])) if lost and status else (NO_IMAGE, "column is empty")
            yield Skipped(f"{place[1]}/{key}", cause, f"{columns.image}: {detail}")
            continue
        if columns.class_captions and isinstance(caption, int):
            known = 0 <= caption < len(columns.class_captions)
            caption = columns.class_captions[caption] if known else None
        texts = captions_of(caption, where["key"], columns.caption)
        if isinstance(texts, Skipped):
            yield texts
        else:
            own = place[1] if groups[row] in (None, "") else printable(str(groups[row]))
            yield from numbered.samples(texts, group=own, extra=extras[row] if extras else {}, **where)


def _locate(image: object, row_key: str, folder: str, group: str) -> dict[str, Any] | None:
    """Return where an image is, as fields of a sample with its key; None if the cell holds no image."""
    if isinstance(image, dict):  # Hugging Face's images
        data, path = image.get("bytes"), image.get("path")
        image = data if data is not None else path
    if isinstance(image, bytes):
        return {"key": f"{group}/{row_key}", "image": image}
    if isinstance(image, str) and image.strip():
        return {"key": image.strip(), "path": join(folder, image.strip())}
    return None


# ---------------------------------------------------------------- what img2dataset writes beside images


def sidecar_columns(path: str) -> pa.Schema:
    """Return the further columns of a sidecar; none if it cannot be read or has no keys."""
    try:
        with TableFile(path) as table:
            schema = table.schema
    except (pa.ArrowException, OSError):
        return pa.schema([])
    return extra_columns(schema, set(MEASURED)) if "key" in schema.names else pa.schema([])


def sidecar_size(path: str) -> int | None:
    """Return how many images a sidecar says were downloaded; None if it cannot be read."""
    try:
        with TableFile(path) as table:
            if "status" not in table.schema.names:
                return sum(table.group_sizes)
            cells = (
                cell for batch in table.batches(["status"], ROWS_PER_SIDECAR) for cell in to_values(batch["status"])
            )
            return sum(1 for cell in cells if cell == SUCCESS)
    except (pa.ArrowException, OSError, KeyError):
        return None


def table_size(path: str) -> int | None:
    """Return how many rows the footer of a Parquet file states; None if it cannot be read, or for other files."""
    try:
        with TableFile(path) as table:
            return sum(table.group_sizes) if path.lower().endswith(".parquet") else None
    except (pa.ArrowException, OSError):
        return None


def read_sidecar(path: str, extra: pa.Schema) -> dict[str, dict[str, Any]]:
    """Return the further columns of each key; empty if there is no such file.

    Raises:
        DamagedTable: The file cannot be read.
    """
    found: dict[str, dict[str, Any]] = {}
    try:
        with TableFile(path) as table:
            for batch in table.batches(["key", *map(column_of, extra.names)], ROWS_PER_SIDECAR):
                found.update(zip(map(str, to_values(batch["key"])), _extras_of(batch, extra), strict=True))
    except FileNotFoundError:
        return {}
    except (pa.ArrowException, OSError, KeyError) as error:
        raise DamagedTable(" ".join(str(error).split())) from error
    return found


# ---------------------------------------------------------------- the kinds of sources


def _is_dataset(_: SourceConfig, folder: Listing) -> bool:
    return "dataset_dict.json" in folder.files or {"state.json", "dataset_info.json"} <= set(folder.files)


def _holds_parquet(config: SourceConfig, folder: Listing) -> bool:
    """Say whether a folder has Parquet files, or has them as on Hugging Face's Hub and nothing else."""
    if any(name.lower().endswith(ARROW_SUFFIXES) for name in folder.files):
        return True
    others = (".tar", *CSV_SUFFIXES, *(f".{suffix}" for suffix in config.options(FileOptions).image_suffixes))
    if any(name.lower().endswith(others) for name in folder.files) or len(folder.folders) > MAX_CONFIGURATIONS:
        return False
    try:
        return bool(files_by_split(absolute(config.source), ARROW_SUFFIXES))
    except ModeclipError:  # several configurations: opening says so
        return True


HUGGINGFACE = SourceKind(
    name="huggingface",
    expected="a Hugging Face dataset on disk",
    open=open_huggingface,
    fits_folder=_is_dataset,
)
PARQUET = SourceKind(
    name="parquet",
    expected=".parquet or .arrow files",
    open=open_parquet,
    fits_file=lambda name: name.lower().endswith(ARROW_SUFFIXES),
    fits_folder=_holds_parquet,
)
CSV = SourceKind(
    name="table",
    expected=".csv or .tsv files",
    open=open_csv,
    fits_file=lambda name: name.lower().endswith(CSV_SUFFIXES),
    fits_folder=lambda _, folder: any(name.lower().endswith(CSV_SUFFIXES) for name in folder.files),
)
