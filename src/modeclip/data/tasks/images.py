"""Places of images go in, in folders, tar shards or Parquet files; the images of a task come out, by number.

Nothing is opened before it is asked for. The hash of all images is that of a catalog with the same images in the same
order, wherever they lie.

Price: a read an image; the hash reads every byte once, by several threads. Images in Parquet files cost the decoding of
the row group that they lie in, of which the last `GROUPS_HELD` stay in memory.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL.Image import Image

from modeclip.data.images import cause_of, decode_image, hash_image, hash_parts
from modeclip.errors import ModeclipError
from modeclip.system.paths import is_url, join, open_file, read_bytes

GROUPS_HELD = 2
"""Row groups of Parquet files that are held in memory."""


class EncodedImages(ABC):
    """Images that lie somewhere as files do: encoded."""

    task: str
    """Name of the task, for messages."""

    @abstractmethod
    def __len__(self) -> int:
        """Return how many there are."""

    @abstractmethod
    def keys(self) -> list[str]:
        """Return their names."""

    @abstractmethod
    def _encoded(self, number: int) -> bytes:
        """Return one as it is stored."""

    def read(self, rows: Int[np.ndarray, " b"]) -> list[Image]:
        """Return images by number, decoded, RGB.

        Raises:
            ModeclipError: One is gone, or does not decode.
        """
        return [self._guarded(number, lambda data: decode_image(data)) for number in rows.tolist()]

    @cached_property
    def digest(self) -> str:
        """Hash of the encoded bytes of all images in their order."""
        content = sha256()
        for each in self.digests():
            content.update(each)
        return content.hexdigest()

    def digests(self) -> list[bytes]:
        """Return a hash of each image's encoded bytes: that of a catalog's column ``digest``."""

        def hash_some(numbers: range) -> list[bytes]:
            return [self._guarded(number, hash_image) for number in numbers]

        return hash_parts(self.task, len(self), hash_some)

    def _guarded(self, number: int, work: Callable[[bytes], Any]) -> Any:
        try:
            data = self._encoded(number)
            if not data:
                raise ModeclipError(f"task {self.task!r}: image {self.keys()[number]!r} is empty: replace or remove it")
            return work(data)
        except ModeclipError:
            raise
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
            raise ModeclipError(
                f"task {self.task!r}: image {self.keys()[number]!r}: {cause_of(error)}; replace it, or remove it and"
                " its label"
            ) from error


@dataclass(frozen=True, kw_only=True, eq=False)
class FileImages(EncodedImages):
    """Images in files, or in byte ranges of files such as tar shards."""

    task: str
    """Name of the task, for messages."""
    names: Sequence[str]
    """Name of each image."""
    paths: Sequence[str]
    """Path or address of each image's file."""
    offsets: Int[np.ndarray, " N"] | None = None
    """Where each begins; None: they are whole files."""
    sizes: Int[np.ndarray, " N"] | None = None
    """How many bytes each has."""

    def __len__(self) -> int:
        return len(self.paths)

    def keys(self) -> list[str]:
        """Return their names."""
        return list(self.names)

    def _encoded(self, number: int) -> bytes:
        if self.offsets is None or self.sizes is None:
            return read_bytes(self.paths[number])
        size = int(self.sizes[number])
        data = read_bytes(self.paths[number], int(self.offsets[number]), size)
        if len(data) < size:
            raise OSError(f"{self.paths[number]} ends early")
        return data


@dataclass(frozen=True, kw_only=True, eq=False)
class TableImages(EncodedImages):
    """Images in columns of Parquet files: encoded bytes, or Hugging Face's bytes and path."""

    task: str
    """Name of the task, for messages."""
    names: Sequence[str]
    """Name of each image."""
    files: Sequence[str]
    """Paths of the files."""
    columns: Sequence[str]
    """Names of the columns."""
    group_starts: Int[np.ndarray, " g"]
    """First row of each row group, counted over all files."""
    groups: Sequence[tuple[int, int]]
    """Its file and its number there."""
    rows: Int[np.ndarray, " N"]
    """Row of each image, counted over all files."""
    column_of_image: Int[np.ndarray, " N"]
    """Number of its column."""
    _held: OrderedDict[tuple[int, int], Any] = field(default_factory=OrderedDict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    def keys(self) -> list[str]:
        """Return their names."""
        return list(self.names)

    def _encoded(self, number: int) -> bytes:
        row, column = int(self.rows[number]), int(self.column_of_image[number])
        group = int(np.searchsorted(self.group_starts, row, side="right")) - 1
        value = self._load(group, column)[row - int(self.group_starts[group])].as_py()
        if isinstance(value, dict):
            folder = self.files[self.groups[group][0]].rpartition("/")[0]
            inside = value.get("bytes")
            value = inside if inside is not None or not value.get("path") else read_bytes(join(folder, value["path"]))
        return value or b""

    def _load(self, group: int, column: int) -> Any:
        """Return one column of a row group, from memory where it is among the last ones."""
        import pyarrow.parquet as pq

        with self._lock:
            if (known := self._held.get((group, column))) is not None:
                self._held.move_to_end((group, column))
                return known
            file, number = self.groups[group]
            path = self.files[file]
            with open_file(path) if is_url(path) else nullcontext(path) as source, pq.ParquetFile(source) as table:
                values = table.read_row_group(number, [self.columns[column]])[self.columns[column]].combine_chunks()
            self._held[group, column] = values
            while len(self._held) > GROUPS_HELD:
                self._held.popitem(last=False)
            return values
