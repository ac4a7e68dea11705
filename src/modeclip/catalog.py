"""A Lance dataset with a row per image-caption pair: stages read its columns and add columns to it.

Images are held in the row, or referred to where they lie (file, offset, size). The position of a row is
its identity in every stage. Lance gives atomic versions, fast random access and new columns without
rewriting the others; none of that is written here. New data are pushed into files by the calling thread,
so that Lance's own threads never call Python and an interrupt cannot meet them half-way.

``modeclip.indexing`` makes catalogs. Price: measured rates are in docs/cost.md; ``batches``, ``select``
and ``add_columns`` of a stream hold a part of the rows at a time, ``read`` what it returns.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int, Shaped
from PIL import Image

from modeclip.errors import ModeclipError, unknown
from modeclip.files import writing
from modeclip.samples import Sample, cause_of, decode_image

PAIR_COLUMNS = {
    "key": pa.string(),
    "caption": pa.string(),
    "image": pa.large_binary(),
    "path": pa.string(),
    "offset": pa.int64(),
    "size": pa.int64(),
    "width": pa.int32(),
    "height": pa.int32(),
    "group": pa.string(),
    "task": pa.string(),
}
"""Columns of the pairs themselves; ``task`` only where pairs are held out."""

FORMAT = "modeclip.format"
FORMAT_VERSION = "1"
FINGERPRINT = "modeclip.fingerprint"
STORAGE_VERSION: Final = "2.1"
ROWS_PER_FILE = 1 << 20
PENDING = "_pending_"
"""Begins the name of a column that is on disk but has not replaced its namesake yet."""


class Catalog:
    """One Lance dataset, a row per image-caption pair; safe to share between threads, not to fork."""

    def __init__(self, dataset: Any, path: Path) -> None:
        self._dataset = dataset
        self.path = path

    @classmethod
    def open(cls, path: Path | str) -> Catalog:
        """Open a catalog that ``index`` wrote.

        Raises:
            ModeclipError: There is none at this path, or it is of another format.
        """
        import lance

        path = Path(path)
        if not path.is_dir():
            raise ModeclipError(f"no catalog at {str(path)!r}: make one with modeclip index, or correct the path")
        try:
            dataset = lance.dataset(str(path))
        except (OSError, ValueError) as error:
            raise ModeclipError(f"{str(path)!r} is no catalog: expected a folder that modeclip index wrote") from error
        version = (dataset.schema.metadata or {}).get(FORMAT.encode(), b"none").decode()
        if version != FORMAT_VERSION:
            raise ModeclipError(
                f"catalog {str(path)!r} has format {version}, expected {FORMAT_VERSION}:"
                " write it again with modeclip index"
            )
        return cls(dataset, path)

    def __len__(self) -> int:
        return int(self._dataset.count_rows())

    @property
    def columns(self) -> list[str]:
        """Names of the columns, in the order in which they came."""
        return [name for name in self._dataset.schema.names if not name.startswith(PENDING)]

    @property
    def fingerprint(self) -> str:
        """Hash over keys, captions and image bytes of all rows in order, as hexadecimal digits.

        Fixed when the catalog is indexed: the same pairs give the same fingerprint wherever and whenever
        they are indexed, copied or referred to; columns that stages add do not change it.
        """
        return str(self._dataset.schema.metadata[FINGERPRINT.encode()].decode())

    def read(
        self, columns: Sequence[str], rows: Int[np.ndarray, " n"] | None = None
    ) -> dict[str, Shaped[np.ndarray, "n *_"]]:
        """Read columns into memory.

        Args:
            columns: Names of columns.
            rows: Positions, in any order, repeats allowed; all rows by default.

        Returns:
            By name, in the order of ``rows``: numbers as they are stored, vectors as (n, D), strings and
            bytes as objects.

        Raises:
            ModeclipError: There is no such column or row.
        """
        table = self._table(columns, rows)
        return {name: _to_numpy(table[name].combine_chunks()) for name in columns}

    def batches(
        self, columns: Sequence[str], batch_size: int = 8192
    ) -> Iterator[dict[str, Shaped[np.ndarray, "n *_"]]]:
        """Read columns as a stream of dictionaries as ``read`` returns them, in the order of the rows."""
        self._require(columns)
        for batch in self._dataset.to_batches(columns=list(columns), batch_size=batch_size):
            yield {name: _to_numpy(batch[name]) for name in columns}

    def select(self, **equals: object) -> Int[np.ndarray, " n"]:
        """Return the positions (ascending) of the rows in which every named column has the value given.

        Raises:
            ModeclipError: There is no such column, or it never holds such a value.
        """
        names = list(equals)
        self._require(names)
        types = self._dataset.schema
        wanted = {name: _to_scalar(name, value, types.field(name).type) for name, value in equals.items()}
        found, start = [np.empty(0, np.int64)], 0
        for batch in self._dataset.to_batches(columns=names or ["offset"]):
            mask = pa.array(np.ones(batch.num_rows, bool))
            for name in names:
                mask = pc.and_(mask, pc.equal(batch[name], wanted[name]))
            found.append(start + np.flatnonzero(mask.fill_null(False).to_numpy(False)))
            start += batch.num_rows
        return np.concatenate(found)

    def images(self, rows: Int[np.ndarray, " n"]) -> list[Image.Image]:
        """Read and decode images to RGB, in the order of ``rows``.

        Raises:
            ModeclipError: A file is gone or has changed since it was indexed.
        """
        table = self._table(("key", "image", "path", "offset", "size"), rows)
        images = []
        for key, image, path, offset, size in zip(*(column.to_pylist() for column in table.columns), strict=True):
            sample = Sample(key, "", image, path, offset, size)
            try:
                images.append(decode_image(sample.read()))
            except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
                raise ModeclipError(
                    f"image of {key!r} (path {path}): {cause_of(error)}; it was whole when"
                    f" {str(self.path)!r} was indexed: bring the file back or index again"
                ) from error
        return images

    def add_columns(self, values: Mapping[str, Any] | Iterable[Mapping[str, Any]]) -> None:
        """Add columns, or replace those of the same names.

        New columns appear together, in one version. A column that is replaced keeps its old values until
        the new ones are on disk.

        Args:
            values: By column name an array with a value for each row: numpy, (N,) or (N, D) for vectors,
                or pyarrow. Or a stream of such dictionaries, for consecutive parts of the rows, of which
                only one is held in memory.

        Raises:
            ModeclipError: The disk is full.
            ValueError: The lengths are not those of the catalog, or a column is one of the pairs'.
        """
        import lance

        staging = self.path.with_name(f".{self.path.name}.columns")
        try:
            with writing(self.path), Writer(staging) as writer:
                for part in [values] if isinstance(values, Mapping) else values:
                    writer.write(_to_table(part))
                writer.commit({})
                self._adopt(lance.dataset(str(staging)))
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _adopt(self, staged: Any) -> None:
        """Append the columns of another dataset, or put them in the place of their namesakes."""
        dataset, names = self._dataset, staged.schema.names
        if staged.count_rows() != len(self):
            raise ValueError(f"expected {len(self)} values a column, got {staged.count_rows()}")
        if fixed := sorted(PAIR_COLUMNS.keys() & names):
            raise ValueError(f"columns of the pairs themselves cannot be replaced: {fixed}")
        left = [name for name in dataset.schema.names if name.startswith(PENDING)]
        if left:  # by a process that was killed in the middle of a replacement
            dataset.drop_columns(left)
        old = [name for name in names if name in dataset.schema.names]
        source = {PENDING + name if name in old else name: name for name in names}
        dataset.add_columns(staged.scanner(columns=source).to_reader())
        if old:
            dataset.drop_columns(old)
            dataset.alter_columns(*({"path": PENDING + name, "name": name} for name in old))

    def _table(self, columns: Sequence[str], rows: Int[np.ndarray, " n"] | None) -> pa.Table:
        self._require(columns)
        if rows is None:
            return self._dataset.to_table(columns=list(columns))
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(self):
            raise ModeclipError(
                f"catalog {str(self.path)!r} has rows 0 to {len(self) - 1}, got {int(rows.min())} to {int(rows.max())}"
            )
        return self._dataset.take(rows.tolist(), columns=list(columns))

    def _require(self, columns: Iterable[str]) -> None:
        for name in columns:
            if name not in self.columns:
                raise unknown(f"column of {str(self.path)!r}", name, self.columns)


class Writer:
    """Pushes tables into a new Lance dataset, which exists once it is committed.

    Leaving the block without a commit removes what was written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._schema: pa.Schema | None = None
        self._file: Any = None
        self._rows = 0
        self._finished: list[tuple[str, int]] = []
        self._committed = False

    def __enter__(self) -> Writer:
        shutil.rmtree(self.path, ignore_errors=True)
        (self.path / "data").mkdir(parents=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._committed:
            shutil.rmtree(self.path, ignore_errors=True)

    def write(self, table: pa.Table) -> None:
        """Append a table; all must have the columns of the first."""
        from lance.file import LanceFileWriter

        self._schema = self._schema or table.schema
        if self._file is None:
            path = self.path / "data" / self._file_name()
            self._file = LanceFileWriter(str(path), self._schema, version=STORAGE_VERSION)
        self._file.write_batch(table.cast(self._schema))
        self._rows += len(table)
        if self._rows >= ROWS_PER_FILE:
            self._finish_file()

    def commit(self, metadata: Mapping[str, str]) -> None:
        """Make all that was written a dataset whose schema carries ``metadata``."""
        import lance
        from lance.fragment import DataFile, FragmentMetadata

        self._finish_file()
        schema = (self._schema or pa.schema([])).with_metadata(dict(metadata))
        dataset = lance.write_dataset(schema.empty_table(), str(self.path), data_storage_version=STORAGE_VERSION)
        fragments = [
            FragmentMetadata(position, [DataFile.create(dataset, name)], num_rows)
            for position, (name, num_rows) in enumerate(self._finished)
        ]
        if fragments:
            lance.LanceDataset.commit(
                str(self.path), lance.LanceOperation.Append(fragments), read_version=dataset.version
            )
        self._committed = True

    def _file_name(self) -> str:
        return f"{len(self._finished):05d}.lance"

    def _finish_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._finished.append((self._file_name(), self._rows))
            self._file, self._rows = None, 0


def _to_scalar(name: str, value: object, kind: pa.DataType) -> pa.Scalar:
    try:
        return pa.scalar(value, kind)
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise ModeclipError(f"column {name!r} holds {kind}, which {value!r} is not") from error


def _to_numpy(column: pa.Array) -> Shaped[np.ndarray, "n *_"]:
    if pa.types.is_fixed_size_list(column.type):
        return _to_numpy(column.flatten()).reshape(len(column), column.type.list_size)
    return np.asarray(column.to_numpy(zero_copy_only=False))


def _to_table(values: Mapping[str, Any]) -> pa.Table:
    """Return columns as a table; an (N, D) array becomes a column of fixed-size lists."""
    columns = {}
    for name, value in values.items():
        if isinstance(value, np.ndarray) and value.ndim == 2:
            flat = pa.array(np.ascontiguousarray(value).reshape(-1))
            columns[name] = pa.FixedSizeListArray.from_arrays(flat, value.shape[1])
        else:
            columns[name] = pa.array(value) if isinstance(value, np.ndarray) else value
    return pa.table(columns)
