"""Checked samples go in; rows of a catalog come out, with a hash over all of them and a count of distinct texts.

Price: what Lance holds back to write whole pages (8 MiB a column), and 8 to 16 bytes for each distinct text.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from modeclip.data.catalog import FINGERPRINT, FORMAT, FORMAT_VERSION, PAIR_COLUMNS
from modeclip.data.intake import Checked
from modeclip.data.storage import FileWriter, append, create, exists

ROWS_PER_WRITE = 1024
BYTES_PER_WRITE = 1 << 24


class Rows:
    """The rows that are added to one catalog, with their fingerprint.

    Attributes:
        files: (name, rows) of the data files that are finished.
        fingerprint: Hash over all rows so far; each row is hashed together with the fingerprint before it.
        num_waiting: Rows since the last call of ``finish``.
    """

    def __init__(self, path: str, schema: pa.Schema, fingerprint: str, known: Distinct | None) -> None:
        self.fingerprint = fingerprint
        self.files: list[list[Any]] = []
        self.num_waiting = 0
        self._path, self._schema, self._known = path, schema, known
        self._further = [name for name in schema.names if name not in PAIR_COLUMNS]
        self._writer = FileWriter(path, schema)
        self._table: list[dict[str, object]] = []
        self._table_bytes = 0

    def add(self, checked: Checked, task: str = "") -> None:
        """Append a row, unless its key is one of those known."""
        sample = checked.sample
        if self._known is not None and sample.key in self._known:
            return
        identity = (self.fingerprint, sample.key, sample.caption, sample.group, task, checked.digest)
        self.fingerprint = hashlib.blake2b(repr(identity).encode(), digest_size=16).hexdigest()
        in_row = checked.image is not None
        self._table.append(
            {
                "key": sample.key,
                "caption": sample.caption,
                "image": checked.image,
                "path": None if in_row else sample.path,
                "offset": 0 if in_row else sample.offset,
                "size": len(checked.image or b"") if in_row else sample.size,
                "width": checked.width,
                "height": checked.height,
                "digest": checked.digest,
                "group": sample.group,
                "task": task,
            }
            | {name: sample.extra.get(name) for name in self._further}
        )
        self.num_waiting += 1
        self._table_bytes += len(checked.image or b"")
        if len(self._table) >= ROWS_PER_WRITE or self._table_bytes >= BYTES_PER_WRITE:
            self._write()

    def finish(self) -> list[list[Any]]:
        """Finish the data file, so that no later row is in it; return (name, rows) of the files since the last call."""
        self._write()
        finished = [list(file) for file in self._writer.finish()]
        self.files += finished
        self.num_waiting = 0
        return finished

    def discard(self) -> None:
        """Remove what is not finished."""
        self._writer.discard()

    def commit(self, metadata: Mapping[str, str], replace: bool) -> None:
        """Make the rows of all finished files a catalog, or a part of the one that is there."""
        described = {FORMAT: FORMAT_VERSION, FINGERPRINT: self.fingerprint, **metadata}
        if replace or not exists(self._path):
            create(self._path, self._schema.with_metadata(described), self.files)
        else:
            append(self._path, self.files, described)

    def _write(self) -> None:
        if self._table:
            self._writer.write(pa.Table.from_pylist(self._table, schema=self._schema))
            self._table, self._table_bytes = [], 0


class Distinct:
    """A set of texts that keeps 8 to 16 bytes of hash a text.

    The chance that a billion texts are counted one short is 3 % (n² / 2^65).

    Hashes lie in 256 parts by their last byte, each sorted, so that only one at a time is sorted anew.
    """

    def __init__(self) -> None:
        self._sorted = [np.empty(0, np.uint64) for _ in range(256)]
        self._new = [array("Q") for _ in range(256)]

    def add(self, text: str) -> None:
        """Put a text in."""
        value = self._hash(text)
        new = self._new[value % 256]
        new.append(value)
        if len(new) > len(self._sorted[value % 256]) + 256:
            self._merge(value % 256)

    def add_all(self, texts: Iterable[str]) -> None:
        """Put several texts in."""
        for text in texts:
            self.add(text)

    def __len__(self) -> int:
        return sum(len(self._merge(part)) for part in range(256))

    def __contains__(self, text: str) -> bool:
        value = self._hash(text)
        values = self._merge(value % 256)
        position = int(np.searchsorted(values, np.uint64(value)))
        return position < len(values) and int(values[position]) == value

    def _merge(self, part: int) -> np.ndarray:
        if self._new[part]:
            new = np.frombuffer(self._new[part], np.uint64)
            self._sorted[part] = np.unique(np.concatenate([self._sorted[part], new]))
            self._new[part] = array("Q")
        return self._sorted[part]

    @staticmethod
    def _hash(text: str) -> int:
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
