"""Writing Lance datasets so that new files become visible in one commit, or not at all.

Any process may write the data files first. A ledger beside them notes which parts of a long piece of work are finished,
so that a killed one continues where it stopped. A commit then makes all files visible at once: as rows of a new
dataset, as more rows of an existing one, or as columns of its fragments. All of this works on a local folder and on an
object store. Lance reaches the store by its own client and the ledger by fsspec; the usual environment variables
configure both.

Price: no data are written twice; a commit reads the footer of each new file.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import GenericAlias
from typing import Any, Final, Generic, TypeVar

import numpy as np
import pyarrow as pa

from modeclip.data.checksums import SIDE_FOLDER, note_commit, restore_manifest
from modeclip.errors import DamagedError, ModeclipError
from modeclip.system.console import log
from modeclip.system.files import only_process, parse_json, to_json, write_atomically
from modeclip.system.paths import is_url, join

# Lance reads this when it is first imported. By itself it leaves two cores to others, and on a machine that has no more
# it can stand still while it builds an index.
os.environ.setdefault("LANCE_CPU_THREADS", str(max(2, os.cpu_count() or 1)))

T = TypeVar("T")

STORAGE_VERSION: Final = "2.1"
ROWS_PER_FRAGMENT = 1 << 16
"""Largest number of rows in a fragment, which is what a stage works on as a whole."""
ROWS_PER_WRITE = 8192
ROWS_PER_REWRITE = 256
"""Rows that are in memory while a fragment is written anew; they may hold their images."""
NEW, OLD = "_modeclip_new_", "_modeclip_old_"
"""Prefixes of columns that a commit is about to show, and of those that it has just replaced."""
KEEP_VERSIONS = timedelta(hours=1)
"""How long replaced data stay on disk for processes that are still reading them."""


def check_place(uri: str) -> None:
    """Check that Lance takes the name of a folder.

    Raises:
        ModeclipError: It has a control character, such as the end of a line.
    """
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in uri):
        raise ModeclipError(f"catalog {uri!r}: a path with a control character cannot hold a catalog; choose another")


@contextmanager
def _as_it_was_opened(uri: str) -> Iterator[None]:
    """Say in one line that a dataset has changed since it was opened, so that Lance refuses a commit."""
    from lance.commit import CommitConflictError

    try:
        yield
    except CommitConflictError as error:
        raise ModeclipError(
            f"catalog {uri!r} has changed since it was opened, here or in another process: open it anew and repeat this"
        ) from error


@contextmanager
def only_writer(uri: str) -> Iterator[None]:
    """Keep other processes from writing to a local dataset; on an object store only Lance's commits protect it.

    Raises:
        ModeclipError: Another process is writing to it.
    """
    check_place(uri)
    if is_url(uri):
        yield
        return
    folder = Path(uri) / SIDE_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with only_process(folder):
        yield


class Ledger(Generic[T]):
    """Notes which parts of a piece of work on a dataset are finished, each with a note of a given shape."""

    def __init__(self, uri: str, name: str, shape: type[T] | GenericAlias) -> None:
        from fsspec.core import url_to_fs

        self._files, self._folder = url_to_fs(join(uri, f"{SIDE_FOLDER}/{name}"))
        self._is_local, self._shape = not is_url(uri), shape

    def add(self, part: str, content: T) -> None:
        """Note that a part is finished; a reader sees the whole note or none."""
        path, text = f"{self._folder}/{part}.json", to_json(content)
        if self._is_local:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(Path(path), text)
        else:
            self._files.pipe_file(path, text.encode())

    def parts(self) -> dict[str, T]:
        """Return the notes by the names of the finished parts, sorted; a part whose note is damaged is not finished."""
        self._files.invalidate_cache()
        if not self._files.exists(self._folder):
            return {}
        paths = sorted(path for path in self._files.ls(self._folder, detail=False) if path.endswith(".json"))
        found = {}
        for path in paths:
            try:
                found[Path(path).stem] = parse_json(self._files.cat_file(path), self._shape)
            except (OSError, ValueError) as error:
                log(f"{path}: damaged ({error}); this part is done again")
        return found

    def note(self, part: str) -> T | None:
        """Return the note of a part, or None if it is not finished, or its note is damaged."""
        try:
            return parse_json(self._files.cat_file(f"{self._folder}/{part}.json"), self._shape)
        except (OSError, ValueError):
            return None

    def add_file(self, part: str, content: bytes) -> None:
        """Write what belongs to a part, before it is noted as finished; a reader sees all of it or nothing."""
        path = f"{self._folder}/{part}.bin"
        if self._is_local:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(Path(path), content)
        else:
            self._files.pipe_file(path, content)

    def read_file(self, part: str) -> bytes | None:
        """Return what belongs to a part; None where it is missing."""
        try:
            return bytes(self._files.cat_file(f"{self._folder}/{part}.bin"))
        except OSError:
            return None

    def local_file(self, part: str) -> Path | None:
        """Return where what belongs to a part lies; None in an object store."""
        return Path(f"{self._folder}/{part}.bin") if self._is_local else None

    def remove(self, part: str) -> None:
        """Remove a part's note, and what belongs to it."""
        for kind in ("json", "bin"):
            with suppress(FileNotFoundError):
                self._files.rm_file(f"{self._folder}/{part}.{kind}")

    def clear(self) -> None:
        """Remove all notes."""
        if self._files.exists(self._folder):
            self._files.rm(self._folder, recursive=True)


class FileWriter:
    """Writes tables to new data files of a dataset, none of them longer than ``max_rows`` rows."""

    def __init__(self, uri: str, schema: pa.Schema, max_rows: int = ROWS_PER_FRAGMENT) -> None:
        self.schema, self.max_rows = schema, max_rows
        self.num_rows = 0
        """Rows written to the current file."""
        self._uri, self._folder = uri, join(uri, "data")
        self._file: Any = None
        self._name = ""
        self._finished: list[tuple[str, int]] = []

    def write(self, table: pa.Table) -> None:
        """Append the rows of a table."""
        from lance.file import LanceFileWriter

        table = table.cast(self.schema)
        while len(table):
            if self._file is None:
                if not is_url(self._uri):
                    Path(self._folder).mkdir(parents=True, exist_ok=True)
                self._name = f"{uuid.uuid4().hex}.lance"
                self._file = LanceFileWriter(join(self._folder, self._name), self.schema, version=STORAGE_VERSION)
            some = table.slice(0, min(ROWS_PER_WRITE, self.max_rows - self.num_rows))
            self._file.write_batch(some)
            self.num_rows += len(some)
            table = table.slice(len(some))
            if self.num_rows >= self.max_rows:
                self._close()

    def finish(self) -> list[tuple[str, int]]:
        """Close the last file and return (name, rows) of all files since the last call."""
        self._close()
        finished, self._finished = self._finished, []
        return finished

    def discard(self) -> None:
        """Remove the files that are not committed, after an error such as a full disk."""
        names = [name for name, _ in self._finished] + ([self._name] if self._file is not None else [])
        self._finished, self._file, self.num_rows = [], None, 0
        remove_files(self._uri, names)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._finished.append((self._name, self.num_rows))
            self._file, self.num_rows = None, 0


def write_column_file(uri: str, table: pa.Table, prefix: str) -> str:
    """Write the columns of one fragment to a file, their names behind a prefix, and return the file's name."""
    writer = FileWriter(uri, pa.schema([field.with_name(prefix + field.name) for field in table.schema]), len(table))
    writer.write(table.rename_columns(writer.schema.names))
    return writer.finish()[0][0]


def read_schema(uri: str, name: str) -> pa.Schema:
    """Return the columns of a file that ``write_column_file`` wrote, by the names that a commit gives them."""
    from lance.file import LanceFileReader

    schema = LanceFileReader(join(uri, f"data/{name}")).metadata().schema
    return pa.schema([field.with_name(field.name.removeprefix(NEW)) for field in schema])


def read_column_file(uri: str, name: str) -> dict[str, np.ndarray]:
    """Return the columns of a file that ``write_column_file`` wrote, by the names that a commit gives them."""
    from lance.file import LanceFileReader

    table = LanceFileReader(join(uri, f"data/{name}")).read_all().to_table()
    return {name.removeprefix(NEW): np.asarray(table[name].to_numpy()) for name in table.schema.names}


def remove_unfinished(uri: str) -> None:
    """Remove the folder of a local dataset if nothing in it has been committed or noted as finished."""
    if not is_url(uri) and not exists(uri) and not any(Path(uri, SIDE_FOLDER).rglob("*.json")):
        shutil.rmtree(uri, ignore_errors=True)


def remove_dataset(uri: str) -> None:
    """Remove a dataset if it exists."""
    from fsspec.core import url_to_fs

    store, folder = url_to_fs(uri)
    if store.exists(folder):
        store.rm(folder, recursive=True)


def open_dataset(uri: str) -> Any:
    """Open a Lance dataset; a damaged manifest of a local one is put back from its copy first.

    Raises:
        DamagedError: It has commits, but the newest of them cannot be read.
        OSError: There is no dataset.
        ValueError: There is no dataset.
    """
    import lance

    restore_manifest(uri)
    try:
        return lance.dataset(uri)
    except (OSError, ValueError) as error:
        manifests = [] if is_url(uri) else sorted(Path(uri, "_versions").glob("*.manifest"))
        if not manifests:
            raise
        raise DamagedError(
            f"{manifests[0]}: the newest manifest of catalog {uri!r} is damaged and has no copy"
            f" ({str(error).split(', /')[0]}); make the catalog anew with modeclip index --replace"
        ) from error


def exists(uri: str) -> bool:
    """Say whether there is a dataset with a commit, whole or damaged."""
    try:
        open_dataset(uri)
    except DamagedError:
        return True
    except (OSError, ValueError):
        return False
    return True


def remove_files(uri: str, names: Iterable[str]) -> None:
    """Remove data files that exist and belong to no commit; leave the others."""
    from fsspec.core import url_to_fs

    store, folder = url_to_fs(join(uri, "data"))
    try:
        committed = _files_of(open_dataset(uri)) if exists(uri) else set()
    except DamagedError:  # nobody can say what belongs to it
        return
    for name in set(names) - committed:
        with suppress(FileNotFoundError):
            store.rm_file(f"{folder}/{name}")


def create(uri: str, schema: pa.Schema, files: Sequence[Sequence[Any]]) -> None:
    """Commit files as a new dataset, or as the new content of an existing one.

    Args:
        uri: Folder or address of the dataset; the files are in its ``data``.
        schema: Plain columns (numbers, strings, bytes), with the metadata of the dataset.
        files: (name, number of rows) in order.
    """
    import lance
    from fsspec.core import url_to_fs
    from lance.fragment import DataFile, FragmentMetadata

    store, folder = url_to_fs(join(uri, "data"))
    fields = list(range(len(schema)))
    version = [int(number) for number in STORAGE_VERSION.split(".")]
    fragments = [
        FragmentMetadata(
            position,
            [DataFile(name, fields, fields, version[0], version[1], int(store.size(f"{folder}/{name}")))],
            num_rows,
        )
        for position, (name, num_rows) in enumerate(files)
    ]
    _remove_broken(uri)
    dataset = lance.LanceDataset.commit(uri, lance.LanceOperation.Overwrite(schema, fragments))
    _finish(dataset, has_replaced=True)


def _remove_broken(uri: str) -> None:
    """Remove the versions of a local dataset whose newest one cannot be read, which Lance would build upon."""
    try:
        if exists(uri):
            open_dataset(uri)
    except DamagedError as error:
        log(f"{error}: it is replaced")
        for name in ("_versions", "_transactions"):
            shutil.rmtree(Path(uri, name), ignore_errors=True)


def _finish(dataset: Any, *, has_replaced: bool) -> None:
    """Note the files of a dataset after a commit; after one that replaced some, clean up what nobody reads any more."""
    if has_replaced:
        try:
            dataset.cleanup_old_versions(older_than=KEEP_VERSIONS)
        except (OSError, ValueError) as error:  # a damaged manifest of an older version
            log(f"{dataset.uri}: older versions were left on the disk ({str(error).split(', /')[0]})")
    note_commit(dataset)


def append(
    uri: str, files: Sequence[Sequence[Any]], metadata: Mapping[str, str], dropped: Sequence[range] = ()
) -> None:
    """Commit those files that a dataset does not have yet as further rows, and then its new metadata.

    Args:
        uri: Folder or address of the dataset.
        files: (name, number of rows) in order.
        metadata: What is noted about the dataset.
        dropped: Rows that leave it in the same commit. Their fragments are written anew, with all of their columns.
    """
    import lance
    from lance.fragment import DataFile, FragmentMetadata

    dataset = open_dataset(uri)
    known = _files_of(dataset)
    is_done = {str(name) for name, _ in files} <= known  # by a run that was killed before it wrote the metadata
    if not files and dropped:
        is_done = dataset.count_rows() < dropped[-1].stop
    if not is_done:
        added = [
            FragmentMetadata(0, [DataFile.create(dataset, name)], num_rows)
            for name, num_rows in files
            if name not in known
        ]
        if dropped:
            gone, shrunk = _without_rows(dataset, dropped)
            operation: Any = lance.LanceOperation.Update(
                removed_fragment_ids=gone, updated_fragments=shrunk, new_fragments=added, fields_modified=[]
            )
        else:
            operation = lance.LanceOperation.Append(added)
        with _as_it_was_opened(uri):
            dataset = lance.LanceDataset.commit(uri, operation, read_version=dataset.version)
    dataset.update_schema_metadata(dict(metadata), replace=True)
    _finish(dataset, has_replaced=bool(dropped))


def _without_rows(dataset: Any, dropped: Sequence[range]) -> tuple[list[int], list[Any]]:
    """Return which fragments lose all of their rows, and those that lose some, written anew without them."""
    from lance.fragment import DataFile, FragmentMetadata

    gone = np.zeros(dataset.count_rows(), bool)
    for rows in dropped:
        gone[rows.start : rows.stop] = True
    removed, shrunk, start = [], [], 0
    for fragment in dataset.get_fragments():
        stays = ~gone[start : start + fragment.physical_rows]
        start += fragment.physical_rows
        if not stays.any():
            removed.append(int(fragment.fragment_id))
        elif not stays.all():
            own = {field for file in fragment.data_files() for field in file.fields}
            names = [field.name() for field in dataset.lance_schema.fields() if field.id() in own]
            writer = FileWriter(dataset.uri, pa.schema([dataset.schema.field(name) for name in names]))
            at = 0
            for batch in fragment.to_batches(columns=names, batch_size=ROWS_PER_REWRITE):
                mask = pa.array(stays[at : at + len(batch)])
                writer.write(pa.Table.from_batches([batch]).filter(mask))
                at += len(batch)
            ((name, count),) = writer.finish()
            shrunk.append(FragmentMetadata(fragment.fragment_id, [DataFile.create(dataset, name)], count))
    return removed, shrunk


def files_where(uri: str, column: str, value: str) -> list[list[Any]]:
    """Return (name, number of rows) of the data files in whose first row a column has some value, in order."""
    import lance

    return [
        [fragment.data_files()[0].path, fragment.physical_rows]
        for fragment in lance.dataset(uri).get_fragments()
        if fragment.take([0], columns=[column])[column].to_pylist() == [value]
    ]


def _files_of(dataset: Any) -> set[str]:
    return {str(file.path) for fragment in dataset.get_fragments() for file in fragment.data_files()}


def show_columns(dataset: Any, schema: pa.Schema, files: Mapping[int, str]) -> Any:
    """Commit a file for every fragment as columns, replacing those of the same names, and return the dataset.

    Args:
        dataset: A Lance dataset.
        schema: The columns; in the files their names begin with ``NEW``.
        files: Name of the file of each fragment.
    """
    with _as_it_was_opened(dataset.uri):
        remove_hidden(dataset)
        dataset.add_columns(pa.schema([field.with_name(NEW + field.name) for field in schema]))
        dataset = _merge_files(dataset, files)
    old = [name for name in schema.names if name in dataset.schema.names]
    # One commit swaps all names, so that a reader sees the old columns or the new ones.
    dataset.alter_columns(
        *({"path": name, "name": OLD + name} for name in old),
        *({"path": NEW + name, "name": name} for name in schema.names),
    )
    if old:
        dataset.drop_columns([OLD + name for name in old])
    _finish(dataset, has_replaced=bool(old))
    return dataset


def remove_columns(dataset: Any, names: Sequence[str]) -> Any:
    """Commit that columns are gone, and return the dataset."""
    dataset.drop_columns(list(names))
    _finish(dataset, has_replaced=True)
    return dataset


def add_files(dataset: Any, files: Mapping[int, str]) -> Any:
    """Commit a further file for some fragments, with values of columns that exist already; return the dataset."""
    with _as_it_was_opened(dataset.uri):
        dataset = _merge_files(dataset, files)
    _finish(dataset, has_replaced=False)
    return dataset


def _merge_files(dataset: Any, files: Mapping[int, str]) -> Any:
    import lance
    from lance.fragment import DataFile, FragmentMetadata

    fragments = []
    for fragment in dataset.get_fragments():
        known = fragment.metadata
        added = [DataFile.create(dataset, files[known.id])] if known.id in files else []
        fragments.append(
            FragmentMetadata(
                known.id, [*known.files, *added], known.physical_rows, known.deletion_file, known.row_id_meta
            )
        )
    operation = lance.LanceOperation.Merge(fragments, dataset.lance_schema)
    return lance.LanceDataset.commit(dataset.uri, operation, read_version=dataset.version)


def remove_hidden(dataset: Any) -> None:
    """Drop the columns left over from a process that was killed between two commits."""
    if left := [name for name in dataset.schema.names if name.startswith((NEW, OLD))]:
        dataset.drop_columns(left)


def files_with(dataset: Any, names: Sequence[str]) -> dict[int, list[str]]:
    """Return for each fragment the names of its data files that hold some columns; replaced columns have new files."""
    wanted = {field.id() for field in dataset.lance_schema.fields() if field.name() in names}
    return {
        fragment.fragment_id: [str(file.path) for file in fragment.data_files() if wanted.intersection(file.fields)]
        for fragment in dataset.get_fragments()
    }


def missing_fragments(dataset: Any, names: Sequence[str]) -> set[int]:
    """Return the fragments without values in these columns, which were appended after the columns were made."""
    wanted = {field.id() for field in dataset.lance_schema.fields() if field.name() in names}
    return {
        fragment.fragment_id
        for fragment in dataset.get_fragments()
        if not wanted <= {field for file in fragment.data_files() for field in file.fields}
    }
