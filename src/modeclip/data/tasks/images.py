"""The images of tasks that are not in a catalog: files, byte ranges of tar shards, or columns of Parquet files.

Nothing is opened before it is needed. The hash of all images is that of a catalog with the same images in the same
order, wherever they are stored.

Price: one read for each image. The hash reads every byte once, with several threads. An image in a Parquet file costs
decoding its row group; the last `GROUPS_HELD` row groups stay in memory.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL.Image import Image

from modeclip.data.images import IGNORED, Exif, cause_of, decode_image, hash_image, hash_parts
from modeclip.data.sources.tables import TableFile
from modeclip.errors import ModeclipError
from modeclip.system.paths import join, read_bytes

GROUPS_HELD = 2
"""Row groups of Parquet files that are held in memory."""


class EncodedImages(ABC):
    """Images that are stored as encoded bytes; a subclass knows where."""

    task: str
    """Name of the task, for messages."""
    exif: Exif
    """Whether images are turned upright as their EXIF data say."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of images, N."""

    @abstractmethod
    def keys(self) -> list[str]:
        """Return the name of each image."""

    @abstractmethod
    def _encoded(self, number: int) -> bytes:
        """Return the stored bytes of one image."""

    def read(self, rows: Int[np.ndarray, " b"]) -> list[Image]:
        """Return the images of these numbers, decoded, as RGB.

        Raises:
            ModeclipError: An image is missing, or does not decode.
        """
        return [self._guarded(number, lambda data: decode_image(data, self.exif)) for number in rows.tolist()]

    @cached_property
    def digest(self) -> str:
        """Hash of the encoded bytes of all images in their order, and of how they are decoded if not as usual."""
        content = sha256(b"" if self.exif == "apply" else IGNORED)
        for each in self.digests():
            content.update(each)
        return content.hexdigest()

    def digests(self) -> list[bytes]:
        """Return a hash of each image's encoded bytes, the same as in the column ``digest`` of a catalog."""

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
                f"task {self.task!r}: image {self.keys()[number]!r}: {cause_of(error)}; replace it, or remove it with"
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
    """Byte offset of each image in its file; None if each image is a whole file."""
    sizes: Int[np.ndarray, " N"] | None = None
    """Number of bytes of each image."""
    exif: Exif = "apply"
    """Whether images are turned upright as their EXIF data say."""

    def __len__(self) -> int:
        return len(self.paths)

    def keys(self) -> list[str]:
        """Return the name of each image."""
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
    """Images in columns of Parquet files, as encoded bytes or as Hugging Face's structs of bytes and path."""

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
    """Of each row group, the number of its file and its number in that file."""
    rows: Int[np.ndarray, " N"]
    """Row of each image, counted over all files."""
    column_of_image: Int[np.ndarray, " N"]
    """Column of each image, as an index into ``columns``."""
    exif: Exif = "apply"
    """Whether images are turned upright as their EXIF data say."""
    _held: OrderedDict[tuple[int, int], Any] = field(default_factory=OrderedDict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    def keys(self) -> list[str]:
        """Return the name of each image."""
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
        """Return one column of a row group, from memory if it was used lately."""
        with self._lock:
            if (known := self._held.get((group, column))) is not None:
                self._held.move_to_end((group, column))
                return known
            file, number = self.groups[group]
            with TableFile(self.files[file]) as table:
                values = table.read([self.columns[column]], number)[self.columns[column]].combine_chunks()
            self._held[group, column] = values
            while len(self._held) > GROUPS_HELD:
                self._held.popitem(last=False)
            return values
