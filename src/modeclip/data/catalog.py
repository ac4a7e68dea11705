"""The catalog: a Lance dataset with a row per image-caption pair, to which every stage adds columns.

A row holds its image or refers to it (file or address, offset, size). Every stage identifies a row by its position.
Lance provides atomic versions, fast random access and new columns without rewriting the others. A column that a stage
added carries its facts, such as what made it, in its metadata.

``modeclip.data.indexing`` makes catalogs, ``modeclip.data.mapping`` adds what takes long to compute.

Price: measured rates are in docs/scale.md. ``batches``, ``samples``, ``select`` and ``add_columns`` of a stream hold a
part of the rows at a time; ``read`` holds what it returns.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Int, Shaped
from PIL import Image

from modeclip.data.checksums import FileDamage, find_damaged
from modeclip.data.images import ChangedError, Exif, as_stored, cause_of, decode_image, hash_image, hash_parts
from modeclip.data.samples import Sample
from modeclip.data.storage import (
    NEW,
    OLD,
    add_files,
    check_place,
    missing_fragments,
    only_writer,
    open_dataset,
    remove_columns,
    remove_files,
    show_columns,
    write_column_file,
)
from modeclip.errors import DamagedError, ModeclipError, unknown
from modeclip.system.files import to_json, writing
from modeclip.system.paths import home, is_url, join, parent

PAIR_COLUMNS = {
    "key": pa.string(),
    "caption": pa.string(),
    "image": pa.large_binary(),
    "path": pa.string(),
    "offset": pa.int64(),
    "size": pa.int64(),
    "width": pa.int32(),
    "height": pa.int32(),
    "digest": pa.binary(16),
    "group": pa.string(),
    "task": pa.string(),
}
"""Columns of every pair. ``digest`` is the hash of the encoded image; only held-out pairs have a ``task``."""

CATALOG = "catalog.lance"
"""File name of the catalog in the folder that indexing wrote."""
SAMPLE_COLUMNS = ("key", "caption", "image", "path", "offset", "size")
IMAGE_COLUMNS = ("key", "image", "path", "offset", "size", "digest")
FORMAT = "modeclip.format"
FORMAT_VERSION = "2"
FINGERPRINT = "modeclip.fingerprint"
SETTINGS = "modeclip.settings"
"""Metadata of a catalog: what decided how its source was read, as JSON."""
FACTS = b"modeclip.facts"
"""Key in the metadata of a column that a stage added; the value is JSON."""

COMMANDS = {
    "caption_embedding": "embed",
    "fine_cluster": "cluster",
    "fine_distance": "cluster",
    "expert": "cluster",
    "kept": "uids --keep FILE",
}
"""The command that makes a column, for those that a single command makes."""

T = TypeVar("T")


class Catalog:
    """A catalog of image-caption pairs. Threads may share it; a forked process may not use it."""

    def __init__(self, dataset: Any, path: str, damage: Iterable[FileDamage] = ()) -> None:
        self._dataset = dataset
        self._damaged = {column: f"{found['file']}: {found['what']}" for found in damage for column in found["columns"]}
        self.path = path
        """Its folder, or its address in an object store."""

    @classmethod
    def open(cls, path: Path | str, *, verify: bool = True) -> Catalog:
        """Open a catalog that ``index`` wrote.

        Args:
            path: The folder that indexing wrote to, or ``catalog.lance`` in it; or an address in an object store.
            verify: Look whether the files of a local catalog are as they were written. A damaged one makes an error
                when a column that it holds is read.

        Raises:
            ModeclipError: There is no catalog at this path, it is unfinished, or it has another format.
        """
        given, path = str(path), home(str(path))
        if not path.rstrip("/").endswith(".lance") and not Path(path, "_versions").is_dir():
            path = join(path, CATALOG)
        if not is_url(path) and not Path(path).is_dir():
            raise ModeclipError(f"no catalog at {given!r}: make one with modeclip index, or correct the path")
        check_place(path)
        try:
            dataset = open_dataset(path)
        except DamagedError:
            raise
        except (OSError, ValueError) as error:
            if not is_url(path) and (Path(path) / "data").is_dir():
                raise ModeclipError(
                    f"catalog {path!r} is unfinished: give the same modeclip index command again to finish it"
                ) from error
            raise ModeclipError(f"{path!r} is no catalog: expected what modeclip index wrote") from error
        version = (dataset.schema.metadata or {}).get(FORMAT.encode(), b"none").decode()
        if version != FORMAT_VERSION:
            raise ModeclipError(
                f"catalog {path!r} has format {version}, expected {FORMAT_VERSION}: write it again with modeclip index"
            )
        return cls(dataset, path, find_damaged(dataset) if verify and not is_url(path) else ())

    @property
    def dataset(self) -> Any:
        """The Lance dataset."""
        return self._dataset

    def __len__(self) -> int:
        return int(self._dataset.count_rows())

    @property
    def name(self) -> str:
        """A name for people: that of its file, or of the folder if the file is ``catalog.lance``."""
        *_, folder, file = ["", *self.path.rstrip("/").split("/")]
        return folder if file == CATALOG and folder else file

    @property
    def columns(self) -> list[str]:
        """Names of the columns, in the order in which they were added."""
        return [name for name in self._dataset.schema.names if not name.startswith((NEW, OLD))]

    @property
    def damaged(self) -> Mapping[str, str]:
        """What is wrong with the file of each column that cannot be read, by the column."""
        return self._damaged

    @property
    def metadata(self) -> dict[str, str]:
        """What indexing recorded about the catalog as a whole."""
        return {name.decode(): value.decode() for name, value in self._dataset.schema.metadata.items()}

    @property
    def fingerprint(self) -> str:
        """Hash over keys, captions and image bytes of all rows in order, as hexadecimal digits.

        The same pairs have the same fingerprint wherever and whenever they are indexed, at once or bit by bit, copied
        or referred to. Columns that stages add do not change it.
        """
        return self.metadata[FINGERPRINT]

    @cached_property
    def exif(self) -> Exif:
        """Whether its images are turned upright as their EXIF data say.

        A catalog that does not say so was made when they were not turned.
        """
        return "apply" if json.loads(self.metadata.get(SETTINGS, "{}")).get("exif") == "apply" else "ignore"

    def facts(self, column: str) -> dict[str, Any] | None:
        """Return what the stage that added a column recorded about it; None for a column of the pairs.

        What is recorded of a damaged column has the entry ``damaged`` too, so that it is not taken for what a stage
        would make.

        Raises:
            ModeclipError: There is no such column.
        """
        if column not in self.columns:
            raise unknown(f"column of {self.path!r}", column, self.columns)
        facts = (self._dataset.schema.field(column).metadata or {}).get(FACTS)
        if facts is None:
            return None
        damage = {"damaged": self._damaged[column]} if column in self._damaged else {}
        return dict(json.loads(facts)) | damage

    def read(
        self, columns: Sequence[str], rows: Int[np.ndarray, " n"] | None = None
    ) -> dict[str, Shaped[np.ndarray, "n *_"]]:
        """Read columns into memory.

        Args:
            columns: Names of columns.
            rows: Positions in any order, with or without repeats; all rows by default.

        Returns:
            The columns by name, in the order of ``rows``: numbers as they are stored, vectors as (n, D), strings and
            bytes as objects.

        Raises:
            ModeclipError: A column or row does not exist, or a stage has not filled the column for all of the rows.
        """
        table = self._table(columns, rows)
        return {name: self._to_numpy(name, table[name].combine_chunks()) for name in columns}

    def read_fragment(self, columns: Sequence[str], fragment: int) -> dict[str, Shaped[np.ndarray, "n *_"]]:
        """Read columns of one of Lance's fragments, given by its number."""
        self._require(columns)
        with self._reading(columns):
            table = self._dataset.get_fragment(fragment).to_table(columns=list(columns))
        return {name: self._to_numpy(name, table[name].combine_chunks()) for name in columns}

    def batches(
        self, columns: Sequence[str], batch_size: int = 8192
    ) -> Iterator[dict[str, Shaped[np.ndarray, "n *_"]]]:
        """Yield columns in blocks of rows, in order, each as ``read`` returns them."""
        self._require(columns)
        for batch in self._batches(columns, batch_size):
            yield {name: self._to_numpy(name, batch[name]) for name in columns}

    def captions(self, rows: Int[np.ndarray, " n"] | None = None, instead: str | None = None) -> list[str]:
        """Read captions, in the order of ``rows``.

        Args:
            rows: Positions; all rows by default.
            instead: Column of texts that stand in the place of the captions where it has one (is not null).

        Raises:
            ModeclipError: There is no such column, or it holds something else than texts.
        """
        found = self.read(["caption"], rows)["caption"]
        if instead is not None:
            if self.type_of(instead) not in {"string", "large_string"}:
                raise ModeclipError(
                    f"column {instead!r} cannot replace captions: it holds {self.type_of(instead)}, expected texts"
                )
            others = self.read([instead], rows)[instead]
            found = np.where(np.array([text is None for text in others], bool), found, others)
        return list(found)

    def samples(
        self, rows: Int[np.ndarray, " n"] | None = None, *, extra: Sequence[str] = (), block_size: int = 64
    ) -> Iterator[list[Sample]]:
        """Yield pairs as samples, in blocks that are read one at a time.

        Args:
            rows: Positions, in any order; all rows by default.
            extra: Columns whose values the samples carry in ``extra``.
            block_size: Samples per block; their images are in memory where the rows hold them.
        """
        columns = (*SAMPLE_COLUMNS, *extra)
        if rows is None:
            blocks = self.batches(columns, block_size)
        else:
            starts = range(0, len(rows), block_size)
            blocks = (self.read(columns, rows[start : start + block_size]) for start in starts)
        for block in blocks:
            rows_of_block = zip(*(block[name].tolist() for name in columns), strict=True)
            samples = []
            for values in rows_of_block:
                pair = dict(zip(columns, values, strict=True))
                further, caption = {name: pair.pop(name) for name in extra}, pair.pop("caption") or ""
                samples.append(Sample(caption=caption, extra=further, **pair))
            yield samples

    def parse_value(self, column: str, text: str) -> object:
        """Return what a user means by a value of a column: a text, or a number where the column holds numbers.

        Quotes around it are left out where no text has them.

        Raises:
            ModeclipError: There is no such column, or it holds something else.
        """
        self._require([column])
        kind = self._dataset.schema.field(column).type
        kind = kind.value_type if pa.types.is_fixed_size_list(kind) else kind
        if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
            text = text[1:-1]
        try:
            return pa.scalar(text).cast(kind).as_py()
        except pa.ArrowException as error:
            raise ModeclipError(f"column {column!r} holds {kind}, which {text!r} is not") from error

    def select(self, mask: str | Bool[np.ndarray, " N"] | None = None, **equals: object) -> Int[np.ndarray, " n"]:
        """Return the positions of the rows in which every named column has the given value, ascending.

        Args:
            mask: Rows that may be chosen: a boolean for each row, or the name of a column of booleans.
            equals: A value for each named column; in a column of lists, the list must contain it.

        Raises:
            ModeclipError: A column does not exist or cannot hold such a value, or the mask has another length.
        """
        if isinstance(mask, str):
            equals[mask], mask = True, None
        if mask is not None and len(mask) != len(self):
            raise ModeclipError(f"mask has {len(mask):,} rows, catalog {self.path!r} has {len(self):,}")
        return self.select_equal(equals, mask)

    def select_equal(
        self, equals: Mapping[str, object], mask: Bool[np.ndarray, " N"] | None = None
    ) -> Int[np.ndarray, " n"]:
        """Do what ``select`` does, for columns of any name."""
        names = list(equals)
        self._require(names)
        types = self._dataset.schema
        wanted = {name: _to_scalar(name, value, types.field(name).type) for name, value in equals.items()}
        found, start = [np.empty(0, np.int64)], 0
        for batch in self._batches(names or ["offset"]):
            chosen = np.ones(batch.num_rows, bool) if mask is None else mask[start : start + batch.num_rows].copy()
            for name in names:
                chosen &= _equal(batch[name], wanted[name])
            found.append(start + np.flatnonzero(chosen))
            start += batch.num_rows
        return np.concatenate(found)

    def select_where(self, condition: str) -> Int[np.ndarray, " n"]:
        """Return the positions of the rows for which a condition in SQL holds, ascending.

        Args:
            condition: What Lance takes as a filter, such as ``width > 64 AND site = 'north'``. Names with other
                characters than letters, digits and ``_`` stand in backticks. NaN fits no condition without ``isnan``:
                in SQL it would be more than any number.

        Raises:
            ModeclipError: It is no condition, names no column, or is not the same for a row each time it is asked.
        """
        columns = self.columns_of(condition)
        self._require(columns)
        floats = [name for name in columns if self.type_of(name) in {"float", "double"}]
        numbers = "" if "isnan" in condition.lower() else "".join(f" AND isnan(`{x}`) IS NOT TRUE" for x in floats)
        try:
            scanner = self._dataset.scanner(columns=["_rowoffset"], filter=f"({condition}\n){numbers}")
            batches = [batch["_rowoffset"] for batch in scanner.to_batches()]
        except (OSError, ValueError) as error:
            reason = str(error).split(", /")[0].replace("Invalid user input: ", "")
            if unnamed := re.search(r"No field named \W*([\w-]+)", reason):
                raise unknown(f"column of {self.path!r}", unnamed[1], self.columns) from error
            if "LanceError" in reason:  # not the condition, but a file
                with self._reading(self.columns_of(condition)):
                    raise
            reason = re.sub(r"^.*\((sql parser error: .*)\)$", r"\1", " ".join(reason.split()))
            raise ModeclipError(
                f"{reason}; expected COLUMN=VALUE or a condition in SQL, such as \"width > 64 AND site = 'north'\""
            ) from error
        found = [np.empty(0, np.int64), *(np.asarray(batch, np.int64) for batch in batches)]
        return np.sort(np.concatenate(found))

    def columns_of(self, condition: str) -> list[str]:
        """Return the columns that a condition in SQL names, in their order.

        Raises:
            ModeclipError: It is more than one condition, or not the same for a row each time it is asked.
        """
        bare = re.sub(r"'[^']*'|--.*", " ", condition)
        depth = np.cumsum([(letter == "(") - (letter == ")") for letter in bare] or [0])
        if ";" in bare or depth.min() < 0:
            raise ModeclipError("it is no single condition in SQL; expected one without ; and with as many ( as )")
        for changing in re.findall(r"(?i)\b(random|uuid|now|today|current_\w+)\b", bare):
            if changing not in self.columns:
                raise ModeclipError(f"{changing} is another value each time; expected a condition on the pairs alone")
        words = set(re.findall(r"`([^`]+)`|(?<![\w`])([A-Za-z_]\w*)", bare))
        quoted, plain = {one for one, _ in words if one}, {other for _, other in words if other}
        if inner := sorted(name for name in plain if name.startswith("_row")):
            raise unknown(f"column of {self.path!r}", inner[0], self.columns)
        lower = {name.lower() for name in plain}
        return [name for name in self.columns if name in quoted or name.lower() in lower]

    def type_of(self, column: str) -> str:
        """Return what a column holds, as Arrow calls it: ``int64``, ``bool``, ``string``.

        Raises:
            ModeclipError: There is no such column.
        """
        self._require([column])
        return str(self._dataset.schema.field(column).type)

    def images(self, rows: Int[np.ndarray, " n"]) -> list[Image.Image]:
        """Read and decode images to RGB, in the order of ``rows``, turned as the property ``exif`` says.

        Raises:
            ModeclipError: A file is missing or has changed since it was indexed.
        """
        exif = self.exif
        return self._each_image(rows, lambda data: decode_image(data, exif))

    def encoded_images(self, rows: Int[np.ndarray, " n"]) -> list[bytes]:
        """Read encoded images in the order of ``rows``; errors as for ``images``.

        They are as stored, but whoever decodes them shall see what ``images`` returns: where orientations are ignored,
        an image that states one comes without it, as a PNG.
        """
        return self._each_image(rows, (lambda data: data) if self.exif == "apply" else as_stored)

    def digests(self, rows: Int[np.ndarray, " n"]) -> list[bytes | None]:
        """Return the hash of each encoded image, or None where it was not recorded and the image is in no local file.

        Images in local files are read and hashed anew, because a file may have changed.

        Raises:
            ModeclipError: A file is missing or has changed since it was indexed.
        """
        table = self._table(["path", "digest"], rows)
        found: list[bytes | None] = table["digest"].to_pylist()
        paths = table["path"].to_pylist()
        outside = np.array([n for n, path in enumerate(paths) if path is not None and not is_url(path)], np.int64)

        def hash_some(places: range) -> list[bytes]:
            return self._each_image(rows[outside[places.start : places.stop]], hash_image)

        for place, digest in zip(outside.tolist(), hash_parts(self.name, len(outside), hash_some), strict=True):
            found[place] = digest
        return found

    def _each_image(self, rows: Int[np.ndarray, " n"], work: Callable[[bytes], T]) -> list[T]:
        table = self._table(IMAGE_COLUMNS, rows)
        results = []
        columns = (column.to_pylist() for column in table.columns)
        for key, image, path, offset, size, digest in zip(*columns, strict=True):
            try:
                data = Sample(key, "", image, path, offset, size).read()
                if image is None and digest is not None and hash_image(data) != digest:
                    raise ChangedError
                results.append(work(data))
            except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
                raise ModeclipError(
                    f"image of {key!r} (path {path}): {cause_of(error)}; it was whole when"
                    f" {self.path!r} was indexed: bring the file back, or index again with --replace"
                ) from error
        return results

    def add_columns(
        self, values: Mapping[str, Any] | Iterable[Mapping[str, Any]], facts: Mapping[str, Any] | None = None
    ) -> None:
        """Add columns or replace those of the same names, all in one version.

        Args:
            values: An array with a value for each row by the column's name: numpy of shape (N,), or (N, D) for vectors,
                or pyarrow. Or a stream of such dictionaries for consecutive parts of the rows; only one of them is in
                memory at a time.
            facts: What is to be recorded about the columns, as ``facts`` returns it. None: a hash of the values, so
                that what was made of a column (a selection by it, a training) is outdated when it is replaced.

        Raises:
            ModeclipError: The disk is full, or another process is writing to the catalog.
            ValueError: There are too few or too many values, or a column belongs to the pairs themselves.
        """
        dataset, parts = self._dataset, ([values] if isinstance(values, Mapping) else values)
        tables = _cut((to_table(part) for part in parts), [part.physical_rows for part in dataset.get_fragments()])
        files: dict[int, str] = {}
        content = hashlib.blake2b(digest_size=16)
        with writing(self.path), only_writer(self.path):
            try:
                for fragment, table in zip(dataset.get_fragments(), tables, strict=True):
                    if facts is None:
                        content.update(_serialized(table))
                    files[fragment.fragment_id] = write_column_file(self.path, table, NEW)
                    schema = table.schema
            except BaseException:
                remove_files(self.path, files.values())
                raise
            self.show(schema, files, {"content": content.hexdigest()} if facts is None else facts)

    def show(self, schema: pa.Schema, files: Mapping[int, str], facts: Mapping[str, Any]) -> None:
        """Turn files that ``write_column_file`` wrote, one for each fragment, into columns.

        Args:
            schema: Names and types of the columns.
            files: Name of each fragment's file.
            facts: As for ``add_columns``.

        Raises:
            ValueError: A column belongs to the pairs themselves.
        """
        if fixed := sorted(PAIR_COLUMNS.keys() & schema.names):
            raise ValueError(f"columns of the pairs themselves cannot be replaced: {fixed}")
        metadata = {FACTS: to_json(dict(facts))}
        described = pa.schema([field.with_nullable(True).with_metadata(metadata) for field in schema])
        self._dataset = show_columns(self._dataset, described, files)
        self._damaged = {name: what for name, what in self._damaged.items() if name not in schema.names}

    def remove_columns(self, names: Sequence[str]) -> None:
        """Remove columns that a stage added.

        Raises:
            ModeclipError: There is no such column, or another process is writing to the catalog.
            ValueError: A column belongs to the pairs themselves.
        """
        if fixed := [name for name in names if self.facts(name) is None]:
            raise ValueError(f"columns of the pairs themselves cannot be removed: {fixed}")
        with writing(self.path), only_writer(self.path):
            self._dataset = remove_columns(self._dataset, names)

    def add_files(self, files: Mapping[int, str]) -> None:
        """Fill existing columns in the fragments that lack values for them; the argument is as for ``show``."""
        self._dataset = add_files(self._dataset, files)

    def _table(self, columns: Sequence[str], rows: Int[np.ndarray, " n"] | None) -> pa.Table:
        self._require(columns)
        if rows is None:
            with self._reading(columns):
                return self._dataset.to_table(columns=list(columns))
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < int(self._dataset.count_rows()):
            raise ModeclipError(
                f"catalog {self.path!r} has rows 0 to {self._dataset.count_rows() - 1}, got {int(rows.min())} to"
                f" {int(rows.max())}"
            )
        with self._reading(columns):
            return self._dataset.take(rows.tolist(), columns=list(columns))

    def _batches(self, columns: Sequence[str], batch_size: int | None = None) -> Iterator[pa.RecordBatch]:
        batches = iter(self._dataset.to_batches(columns=list(columns), batch_size=batch_size))
        while True:
            with self._reading(columns):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    @contextmanager
    def _reading(self, columns: Sequence[str]) -> Iterator[None]:
        """Turn what Lance says of a damaged file into one line."""
        try:
            yield
        except (OSError, ValueError) as error:
            if "LanceError" not in str(error) and "Invalid user input" not in str(error):
                raise
            reason = " ".join(str(error).split(", /")[0].split())
            raise DamagedError(
                f"catalog {self.path!r} cannot be read ({', '.join(columns)}: {reason}); modeclip check {self.path}"
                " --deep says which file is damaged and what makes it anew"
            ) from error

    def _require(self, columns: Iterable[str]) -> None:
        for name in columns:
            if name not in self.columns:
                raise unknown(f"column of {self.path!r}", name, self.columns)
            if name in self._damaged:
                raise DamagedError(
                    f"{self.path}/{self._damaged[name]}; it holds the column {name}: {remedy_of(name, self.path)}"
                )

    def _to_numpy(self, name: str, column: pa.Array) -> Shaped[np.ndarray, "n *_"]:
        if column.null_count and self.facts(name) is not None and missing_fragments(self._dataset, [name]):
            raise ModeclipError(
                f"column {name} of {self.path!r} has no values for {column.null_count:,} pairs that were added later:"
                " run its stage again (modeclip embed, modeclip cluster), which computes only what is missing"
            )
        return to_numpy(column)


def remedy_of(column: str, path: str) -> str:
    """Say which command makes a damaged column anew."""
    if column in COMMANDS:
        return f"give modeclip {COMMANDS[column]} {path}, which makes it anew"
    if column in PAIR_COLUMNS:
        return f"give modeclip index again, with --out {parent(path)} and --replace"
    return "give the command that made it again (a column of the source: modeclip index --replace)"


def to_numpy(column: pa.Array) -> Shaped[np.ndarray, "n *_"]:
    """Return a column without missing numbers as an array; lists of D numbers as (n, D)."""
    if pa.types.is_fixed_size_list(column.type):
        return to_numpy(column.flatten()).reshape(len(column), column.type.list_size)
    return np.asarray(column.to_numpy(zero_copy_only=False))


def to_table(values: Mapping[str, Any]) -> pa.Table:
    """Return columns as a table; an (N, D) array becomes a column of fixed-size lists, one of None of texts."""
    columns = {}
    for name, value in values.items():
        if isinstance(value, np.ndarray) and value.ndim == 2:
            flat = pa.array(np.ascontiguousarray(value).reshape(-1))
            columns[name] = pa.FixedSizeListArray.from_arrays(flat, value.shape[1])
        else:
            column = pa.array(value) if isinstance(value, np.ndarray) else value
            columns[name] = column.cast(pa.string()) if pa.types.is_null(column.type) else column
    return pa.table(columns)


def _to_scalar(name: str, value: object, kind: pa.DataType) -> pa.Scalar:
    kind = kind.value_type if pa.types.is_fixed_size_list(kind) else kind
    try:
        return pa.scalar(value, kind)
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise ModeclipError(f"column {name!r} holds {kind}, which {value!r} is not") from error


def _equal(column: pa.Array, value: pa.Scalar) -> Bool[np.ndarray, " n"]:
    """Return for each row whether it has a value, or a list that contains it."""
    if pa.types.is_fixed_size_list(column.type):
        inside = pc.equal(pc.list_flatten(column.fill_null([None] * column.type.list_size)), value)
        return np.asarray(np.asarray(inside.fill_null(False)).reshape(len(column), -1).any(1))
    return np.asarray(pc.equal(column, value).fill_null(False))


def _serialized(table: pa.Table) -> pa.Buffer:
    """Return a table as Arrow's stream of bytes, which is the same for the same values however they were cut."""
    fresh = table.take(np.arange(len(table))).combine_chunks()  # a slice keeps offsets and bits of its neighbours
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(fresh)
    return sink.getvalue()


def _cut(tables: Iterator[pa.Table], sizes: Iterable[int]) -> Iterator[pa.Table]:
    """Cut a stream of tables into tables of the given sizes, which must add up to all rows."""
    waiting: list[pa.Table] = []
    for size in sizes:
        while sum(map(len, waiting)) < size:
            if (table := next(tables, None)) is None:
                raise ValueError(f"expected a value for every row, got {size - sum(map(len, waiting))} too few")
            waiting.append(table)
        whole = pa.concat_tables(waiting)
        waiting = [whole.slice(size)]
        yield whole.slice(0, size)
    if left := sum(map(len, chain(waiting, tables))):
        raise ValueError(f"expected a value for every row, got {left} too many")
