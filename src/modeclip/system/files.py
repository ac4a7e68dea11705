"""What every stage does with files: replace them as a whole, hash them, report a full disk, lock a folder."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

from modeclip.errors import ModeclipError


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Turn the error of a full disk, which some libraries report only in words, into one that says what to do.

    Args:
        path: What is being written, for the message.

    Raises:
        ModeclipError: There is no space, or no quota, left for it.
    """
    try:
        yield
    except Exception as error:
        codes = (errno.ENOSPC, errno.EDQUOT)
        if getattr(error, "errno", None) in codes or any(f"os error {code}" in str(error) for code in codes):
            raise ModeclipError(
                f"disk full while writing {str(path)!r}: free some space and give the same command again;"
                " nothing half-written is left to be used"
            ) from error
        raise


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file as a whole: a reader sees the old content or the new one, never a part. Text is UTF-8."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    temporary.replace(path)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield where to write a file that takes its place at the end, as a whole and even after a power cut.

    The file gets the permissions that a new file gets here (the umask), also where a library makes it private to its
    owner, as safetensors does. After an error nothing is left of it.
    """
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)
    try:
        part.touch()
        permissions = part.stat().st_mode & 0o777
        yield part
        part.chmod(permissions)
        _flush(part)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _flush(path.parent)


def _flush(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, as hexadecimal digits."""
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hash_files(root: Path, paths: Iterable[Path]) -> dict[str, str]:
    """Return the SHA-256 of each path that is a file, by its name relative to the folder ``root``."""
    return {str(path.relative_to(root)): hash_file(path) for path in paths if path.is_file()}


def hash_folder(folder: Path) -> str:
    """Return one SHA-256 over the names and contents of all files in a folder, as hexadecimal digits."""
    lines = [f"{name} {digest}" for name, digest in hash_files(folder, sorted(folder.rglob("*"))).items()]
    return sha256("\n".join(lines).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of the packages that decide a result."""
    return {name: version(name) for name in ("modeclip", "torch", "open_clip_torch", "numpy", "pylance")}


@contextmanager
def only_process(folder: Path, patience_seconds: float = 0.0) -> Iterator[None]:
    """Hold a folder's lock, which the system frees when the process ends, however that happens.

    Args:
        folder: An existing folder.
        patience_seconds: How long to wait for another process that holds it.

    Raises:
        ModeclipError: Another process still holds it.
    """
    deadline = time.monotonic() + patience_seconds
    with (folder / "lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise ModeclipError(
                        f"{folder}: another process is at work in this folder; wait for it, stop it, or choose another"
                    ) from None
                time.sleep(0.2)
        yield
