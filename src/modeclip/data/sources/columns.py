"""A batch of table rows goes in; samples come out, with the scalar columns that are neither image nor caption.

What a column is follows from its type and name: images are bytes, Hugging Face's struct of bytes and path, or paths;
captions are texts, lists of texts, or numbers of classes whose names are known. img2dataset's Parquet files beside
shards and folders (sidecars) are read here too.

Price: Python objects for each row and value.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from modeclip.data.samples import (
    EMPTY_CAPTION,
    NO_CAPTION,
    NO_IMAGE,
    NOT_DOWNLOADED,
    NOT_UTF8,
    Sample,
    Skipped,
    clean_captions,
)
from modeclip.data.sources.options import CAPTION_COLUMN, IMAGE_COLUMN, DataConfig
from modeclip.errors import ModeclipError
from modeclip.system.paths import join, open_file

IMAGE_COLUMNS = ("image", "jpg", "image_bytes", "path", "file_name")
CAPTION_COLUMNS = ("caption", "text", "TEXT", "captions")
"""Names that are looked for where the default ones are not there."""
RESERVED = ("key", "caption", "image", "path", "offset", "size", "width", "height", "group", "task")
"""Columns of the catalog itself; a source's own of these names are kept as ``source_NAME``."""
MEASURED = ("key", "caption", "width", "height")
"""Columns of an img2dataset sidecar that the catalog has anyway."""
SUCCESS = "success"


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
    """Further columns under the names that they get; ``column_of`` tells the one in the table."""
    classes: tuple[str, ...] = ()
    """Names of classes, where the caption column numbers them."""


# ---------------------------------------------------------------- which columns mean what


def choose_columns(schema: pa.Schema, config: DataConfig, table: str) -> Columns:
    """Find the image and the caption column of a table.

    Raises:
        ModeclipError: One is not there, or of a type that cannot be it.
    """
    features = class_features(schema)
    image = find_column(schema.names, "image", config.image_column, table)
    try:
        caption = find_column(schema.names, "caption", config.caption_column, table)
    except ModeclipError:
        if config.caption_column != CAPTION_COLUMN or not features:
            raise
        caption = next(iter(features))
    kind = schema.field(image).type
    if not (_is_binary(kind) or _is_text(kind) or _is_image_struct(kind)):
        raise ModeclipError(f"table {table!r}: image column {image!r} holds {kind}, expected bytes, paths or images")
    kind = schema.field(caption).type
    item = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
    if not _is_text(item) and caption not in features:
        raise ModeclipError(f"table {table!r}: caption column {caption!r} holds {kind}, expected text or lists of text")
    extra = extra_columns(schema, {image, caption, "key"})
    return Columns(image=image, caption=caption, extra=extra, classes=features.get(caption, ()))


def find_column(names: Sequence[str], kind: str, name: str, table: str) -> str:
    """Return the name of the image or caption column: the configured one, or one of those that are usual.

    Raises:
        ModeclipError: There is none.
    """
    usual = {"image": (IMAGE_COLUMN, IMAGE_COLUMNS), "caption": (CAPTION_COLUMN, CAPTION_COLUMNS)}[kind]
    wanted = (name, *usual[1]) if name == usual[0] else (name,)
    if found := next((candidate for candidate in wanted if candidate in names), None):
        return found
    url = next((column for column in names if column.lower() in ("url", "image_url")), None)
    hint = f"; if the images are those of column {url!r}, download them with img2dataset first" if url else ""
    raise ModeclipError(
        f"table {table!r} has no {kind} column {name!r}; its columns are"
        f" {', '.join(names)}; set data.{kind}_column" + (hint if kind == "image" else "")
    )


def refuse_addresses(column: str, value: object, table: str) -> None:
    """Raise where an image column holds addresses of the web.

    Raises:
        ModeclipError: It does.
    """
    if isinstance(value, str) and value.startswith(("http://", "https://")):
        raise ModeclipError(
            f"table {table!r}: image column {column!r} holds addresses such as {value[:80]!r}:"
            " download the images with img2dataset first and index what it writes"
        )


def extra_columns(schema: pa.Schema, taken: set[str]) -> pa.Schema:
    """Return the scalar columns that are not taken; what is neither number, bool nor text becomes text."""
    fields: list[pa.Field] = []
    for field in schema:
        if field.name in {*taken, ""} or pa.types.is_nested(field.type) or _is_binary(field.type):
            continue
        numeric = pa.types.is_integer(field.type) or pa.types.is_floating(field.type) or pa.types.is_boolean(field.type)
        name = f"source_{field.name}" if field.name in RESERVED else field.name
        if column_of(name) == field.name and all(name != known.name for known in fields):
            fields.append(pa.field(name, field.type if numeric else pa.string()))
    return pa.schema(fields)


def column_of(name: str) -> str:
    """Return the name in its table of a further column.

    Examples:
        >>> column_of("source_size"), column_of("source_url")
        ('size', 'source_url')
    """
    return name[7:] if name.startswith("source_") and name[7:] in RESERVED else name


def class_features(schema: pa.Schema) -> dict[str, tuple[str, ...]]:
    """Return the class names of the columns that Hugging Face's metadata call ClassLabel."""
    try:
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        return find_class_labels(info.get("info", {}).get("features", {}))
    except (ValueError, AttributeError):
        return {}


def find_class_labels(features: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Return the class names of each feature that is a ClassLabel."""
    return {
        name: tuple(feature["names"])
        for name, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
    }


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


def _is_image_struct(kind: pa.DataType) -> bool:
    return bool(pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0)


# ---------------------------------------------------------------- rows to samples


def read_rows(
    batches: Iterator[pa.RecordBatch], columns: Columns, config: DataConfig, place: tuple[str, str]
) -> Iterator[Sample | Skipped]:
    """Yield the samples of a table's rows; an image that is there in consecutive rows gets keys "k", "k#1" and so on.

    Args:
        batches: The rows.
        columns: Which columns mean what.
        config: Template of captions of classes.
        place: Folder that paths are relative to, and the group, which begins the keys of images in the table itself.
    """
    start, numbered = 0, Numbering()
    for batch in batches:
        images, captions = to_values(batch[columns.image]), to_values(batch[columns.caption])
        keys = to_values(batch["key"]) if "key" in batch.schema.names else range(start, start + len(batch))
        status = to_values(batch["status"]) if "status" in batch.schema.names else None
        extras = _extras_of(batch, columns.extra)
        for row, (image, caption, key) in enumerate(zip(images, captions, keys, strict=True)):
            where = _locate(image, str(key), *place)
            if where is None:
                lost = status is not None and status[row] != SUCCESS
                cause, detail = (NOT_DOWNLOADED, str(status[row])) if lost and status else (NO_IMAGE, "column is empty")
                yield Skipped(f"{place[1]}/{key}", cause, f"{columns.image}: {detail}")
                continue
            if columns.classes and isinstance(caption, int):
                known = 0 <= caption < len(columns.classes)
                caption = config.class_caption(columns.classes[caption]) if known else None
            texts = captions_of(caption, where["key"], columns.caption)
            if isinstance(texts, Skipped):
                yield texts
            else:
                yield from numbered.samples(texts, group=place[1], extra=extras[row] if extras else {}, **where)
        start += len(batch)


class Numbering:
    """Makes samples, numbering those that follow each other with the same key."""

    def __init__(self) -> None:
        self._key, self._number = "", 0

    def samples(self, captions: list[str], *, key: str, **where: Any) -> Iterator[Sample]:
        """Yield a sample for each caption."""
        for caption in captions:
            self._number = self._number + 1 if key == self._key else 0
            self._key = key
            yield Sample(f"{key}#{self._number}" if self._number else key, caption, **where)


def captions_of(value: object, key: str, column: str) -> list[str] | Skipped:
    """Return the captions in a cell: a text, or a list of them."""
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
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        cells = column.cast(pa.list_(pa.binary()) if is_list else pa.binary()).to_pylist()
    return [[_to_text(item) for item in cell] if isinstance(cell, list) else _to_text(cell) for cell in cells]


def _to_text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("utf-8", "surrogateescape")


def printable(text: str) -> str:
    """Return a text that can be stored: what is not UTF-8 becomes �."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _locate(image: object, row_key: str, folder: str, group: str) -> dict[str, Any] | None:
    """Return where an image is, as fields of a sample, with its key; None where there is none."""
    if isinstance(image, dict):  # Hugging Face's images
        data, path = image.get("bytes"), image.get("path")
        image = data if data is not None else path
    if isinstance(image, bytes):
        return {"key": f"{group}/{row_key}", "image": image}
    if isinstance(image, str) and image.strip():
        return {"key": image.strip(), "path": join(folder, image.strip())}
    return None


def _extras_of(batch: pa.RecordBatch, extra: pa.Schema) -> list[dict[str, Any]]:
    """Return the further columns of each row; a value that has not the type of its column is None."""
    if not len(extra):
        return []
    values = []
    for field in extra:
        name = column_of(field.name)
        try:
            column = batch[name].cast(field.type) if name in batch.schema.names else pa.nulls(len(batch))
        except pa.ArrowException:
            column = pa.nulls(len(batch))
        cells = to_values(column)
        is_text = pa.types.is_string(field.type)
        values.append([printable(cell) if is_text and cell is not None else cell for cell in cells])
    return [dict(zip(extra.names, row, strict=True)) for row in zip(*values, strict=True)]


# ---------------------------------------------------------------- what img2dataset writes beside images


def sidecar_columns(path: str) -> pa.Schema:
    """Return the further columns that a sidecar has, none where it cannot be read or has no keys."""
    import pyarrow.parquet as pq

    try:
        with open_file(path) as file:
            schema = pq.read_schema(file)
    except (pa.ArrowException, OSError):
        return pa.schema([])
    return extra_columns(schema, set(MEASURED)) if "key" in schema.names else pa.schema([])


def read_sidecar(path: str, extra: pa.Schema) -> dict[str, dict[str, Any]]:
    """Return the further columns of each key; empty where there is no such file.

    Raises:
        DamagedTable: It cannot be read.
    """
    import pyarrow.parquet as pq

    found: dict[str, dict[str, Any]] = {}
    try:
        with open_file(path) as file, pq.ParquetFile(file) as table:
            names = ["key", *(name for name in map(column_of, extra.names) if name in table.schema_arrow.names)]
            for batch in table.iter_batches(columns=names):
                found.update(zip(map(str, to_values(batch["key"])), _extras_of(batch, extra), strict=True))
    except FileNotFoundError:
        return {}
    except (pa.ArrowException, OSError, KeyError) as error:
        raise DamagedTable(" ".join(str(error).split())) from error
    return found
