"""A folder of feature vectors: each file is named after everything that decides its content, and made once.

Each file is an .npy of float32 rows with the SHA-256 of all before it as its last 32 bytes: a damaged file counts as
missing and is made again. Files appear whole or not at all, so several processes may share a folder, and a process
that is killed leaves nothing that could be mistaken for a whole file. Nothing ever becomes stale, since other content
has another name.

Price: 4 D bytes of disk a vector; a file is read once when it is opened, to be checked, and then memory-mapped.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from hashlib import file_digest, sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import numpy as np
from jaxtyping import Float

from modeclip.models.pool import ModelPool
from modeclip.system.files import writing

FORMAT = 2
"""Part of every name; raise it when the same inputs start to give other vectors."""
OLD_SECONDS = 24 * 3600.0
"""Age at which a half-written file is taken for one that a killed process left behind, and removed."""
DIGEST_BYTES = 32


class FeatureCache:
    """A folder of vectors, with the pool of models that make those that are missing."""

    def __init__(self, folder: Path | None = None, *, pool: ModelPool | None = None) -> None:
        """Open a cache.

        Args:
            folder: Where the files are, made with the first of them; None: a temporary folder, which is removed with
                this object.
            pool: Where models come from; None: a pool of its own, which holds as many as fit.
        """
        if folder is None:
            folder = Path(tempfile.mkdtemp(prefix="modeclip-features-"))
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        else:
            _remove_old_parts(folder)
        self.folder = folder
        self.pool = ModelPool() if pool is None else pool
        self._used: set[str] = set()
        self._checked: dict[str, tuple[int, int]] = {}

    def key(self, kind: str, **parts: object) -> str:
        """Return the name of the file whose content these parts decide."""
        made_by = {"format": FORMAT, "open_clip": version("open_clip_torch")}
        content = json.dumps([kind, made_by, parts], sort_keys=True)
        return f"{kind}-{sha256(content.encode()).hexdigest()[:40]}"

    def has(self, key: str, num_rows: int) -> bool:
        """Return whether a file is there and whole."""
        return self._read(key, num_rows) is not None

    def read(self, key: str, num_rows: int) -> Float[np.ndarray, "N D"]:
        """Return the rows of a file that is there, memory-mapped."""
        rows = self._read(key, num_rows)
        assert rows is not None, f"{self.folder / key} was there a moment ago"
        return rows

    @contextmanager
    def writer(self, key: str, num_rows: int) -> Iterator[Callable[[Any, Float[np.ndarray, "n D"]], None]]:
        """Yield ``write(rows, vectors)``; the file appears at the end unless an error was raised."""
        part = self.folder / f"{key}.{uuid4().hex}.part"  # several processes may write the same file
        maps: list[np.memmap[Any, Any]] = []

        def write(rows: Any, vectors: Float[np.ndarray, "n D"]) -> None:
            if not maps:
                shape = (num_rows, vectors.shape[1])
                maps.append(np.lib.format.open_memmap(part, mode="w+", dtype=np.float32, shape=shape))
                _reserve(part)
            maps[0][rows] = vectors

        try:
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                yield write
                maps.pop().flush()
                with part.open("r+b") as file:
                    digest = file_digest(file, "sha256").digest()
                    file.seek(0, os.SEEK_END)
                    file.write(digest)
                    file.flush()
                    os.fsync(file.fileno())
                part.replace(self.folder / f"{key}.npy")
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def remove_unused(self) -> None:
        """Remove the files that have not been read since this cache was opened."""
        for path in self.folder.glob("*.npy"):
            if path.stem not in self._used:
                path.unlink(missing_ok=True)

    def _read(self, key: str, num_rows: int) -> Float[np.ndarray, "N D"] | None:
        path = self.folder / f"{key}.npy"
        try:
            state = path.stat()
            moment = (state.st_mtime_ns, state.st_ino)
            if self._checked.get(key) != moment:
                with path.open("rb") as file:
                    if not _is_whole(file, state.st_size):
                        return None
            rows = np.asarray(np.load(path, mmap_mode="r"))
        except (OSError, ValueError):
            return None
        if rows.ndim != 2 or len(rows) != num_rows or rows.dtype != np.float32:
            return None
        self._checked[key] = moment
        self._used.add(key)
        return rows


def hash_texts(texts: Iterable[str]) -> str:
    """Return the SHA-256 of texts in their order."""
    content = sha256()
    for text in texts:
        raw = text.encode()
        content.update(len(raw).to_bytes(8, "little") + raw)
    return content.hexdigest()


def _is_whole(file: BinaryIO, size: int) -> bool:
    """Whether a file ends with the SHA-256 of what is before."""
    content, left = sha256(), size - DIGEST_BYTES
    while left > 0 and (block := file.read(min(left, 1 << 22))):
        content.update(block)
        left -= len(block)
    return file.read() == content.digest()


def _reserve(path: Path) -> None:
    """Take the blocks of a sparse file now: a mapped file that meets a full disk later ends the process."""
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _remove_old_parts(folder: Path) -> None:
    for path in folder.glob("*.part"):
        try:
            if time.time() - path.stat().st_mtime > OLD_SECONDS:
                path.unlink()
        except FileNotFoundError:  # by another process
            pass
