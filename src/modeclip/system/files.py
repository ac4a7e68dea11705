"""What every stage does with files: replace them as a whole, read and write JSON, note what they are, lock a folder.

A `FileNote` is what a record keeps of a file: its size, its time and its SHA-256. A file whose size and time are as
they were noted is taken for whole, which costs a stat; any other is hashed (0.6 s for 1 GB on one core).
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import platform
import re
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from types import GenericAlias
from typing import Any, BinaryIO, TypeVar
from uuid import uuid4

from typing_extensions import TypedDict

from modeclip.errors import DamagedError, ModeclipError

T = TypeVar("T")


class FileNote(TypedDict):
    """What a record keeps of a file."""

    size: int
    """Its bytes."""
    time: int
    """When it was last written, in nanoseconds since 1970."""
    sha256: str
    """Its SHA-256, as hexadecimal digits."""


LOCK_FILE = "lock"
"""File of a folder that the process at work in it has locked; it says which one that is."""
HEARTBEAT_SECONDS = 10.0
"""Time between two signs of life of the process at work in a folder, which other machines see."""
SILENCE_SECONDS = 120.0
"""Time without a sign of life after which a process of another machine counts as dead."""
PART_SECONDS = 86_400.0
"""Time without a write after which a half-written file of another machine counts as left behind."""
_PART = re.compile(r".+\.([0-9a-f]{8})-([1-9]\d{0,8})-[0-9a-f]{8}\.part")
"""Name of a half-written file: which machine and which process writes it."""


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
    part = _own_part(path)
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def to_json(content: Any, *, indent: int | None = None, ensure_ascii: bool = True) -> str:
    """Return a result as JSON. What is not a finite number becomes null, because JSON knows neither NaN nor Infinity.

    Examples:
        >>> to_json({"mean": float("nan"), "counts": [1, 2.5]})
        '{"mean": null, "counts": [1, 2.5]}'
    """
    try:
        return json.dumps(content, indent=indent, ensure_ascii=ensure_ascii, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(content), indent=indent, ensure_ascii=ensure_ascii, allow_nan=False)


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {_finite(name): _finite(value) for name, value in content.items()}
    return [_finite(value) for value in content] if isinstance(content, list | tuple) else content


def write_json(path: Path, content: Any, *, indent: int | None = 1, ensure_ascii: bool = True) -> None:
    """Replace a file as a whole by a result as JSON."""
    write_atomically(path, to_json(content, indent=indent, ensure_ascii=ensure_ascii) + "\n")


def read_json(path: Path, shape: type[T] | GenericAlias, remedy: str) -> T:
    """Read a file of JSON, and check that it has the shape that we wrote.

    Args:
        path: The file.
        shape: A dataclass, a TypedDict, or a type such as ``dict[str, Any]``. Fields that it does not know are left
            out, since a later version may have written them.
        remedy: What to do if the file is damaged.

    Raises:
        DamagedError: It is missing, cannot be read, is no JSON, or has another shape.
    """
    try:
        return parse_json(path.read_bytes(), shape)
    except FileNotFoundError:
        raise DamagedError(f"{path}: no such file; {remedy}") from None
    except OSError as error:
        raise DamagedError(f"{path}: cannot be read ({(error.strerror or str(error)).lower()}); {remedy}") from None
    except ValueError as error:
        raise DamagedError(f"{path}: damaged ({error}); {remedy}") from None


def parse_json(text: bytes | str, shape: type[T] | GenericAlias) -> T:
    """Return JSON as a shape, as `read_json` does for a file.

    Raises:
        ValueError: It is no JSON or has another shape; the message says where.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        adapter: TypeAdapter[T] = TypeAdapter(shape)  # type: ignore[arg-type]
        return adapter.validate_json(text, strict=True)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
    place = ".".join(map(str, problem["loc"]))
    got = "" if problem["type"] in ("missing", "json_invalid") else f", got {str(problem['input'])[:60]!r}"
    raise ValueError(f"{place}: {problem['msg']}{got}".removeprefix(": "))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield where to write a file that takes its place at the end, as a whole and even after a power cut.

    The file gets the permissions that a new file gets here (the umask), also where a library makes it private to its
    owner, as safetensors does. After an error nothing is left of it.
    """
    part = _own_part(path)
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


def _own_part(path: Path) -> Path:
    """Return where to write what takes the place of a file; no other process or thread writes there.

    What killed processes have left behind in the folder is removed.
    """
    with suppress(OSError):  # there is no such folder, as whoever writes into it will say, or others remove it too
        for left in path.parent.iterdir():
            if (found := _PART.fullmatch(left.name)) and _is_left_behind(left, found[1], int(found[2])):
                left.unlink()
    return path.with_name(f"{path.name}.{_machine()}-{os.getpid()}-{uuid4().hex[:8]}.part")


def _is_left_behind(part: Path, machine: str, process: int) -> bool:
    """Say whether nobody writes a half-written file any more."""
    if machine != _machine():
        return time.time() - part.stat().st_mtime > PART_SECONDS
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's
        return False
    return False


@cache
def _machine() -> str:
    """Return 8 digits that tell this run of this machine, or this container, from any other with the same processes."""
    own = Holder.here()
    try:
        processes = os.readlink("/proc/self/ns/pid")  # noqa: PTH115
    except OSError:  # not Linux
        processes = ""
    return sha256(f"{own.machine} {own.boot} {processes}".encode()).hexdigest()[:8]


def _flush(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a file, or a folder with everything in it, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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


def note_files(root: Path, paths: Iterable[Path], known: Mapping[str, FileNote] | None = None) -> dict[str, FileNote]:
    """Return what a record keeps of each path that is a file, by its name relative to a folder.

    Args:
        root: The folder.
        paths: Files in it; others are left out.
        known: Earlier notes. A file that has the size and time that were noted is not hashed again.
    """
    notes: dict[str, FileNote] = {}
    for path in paths:
        if path.is_file():
            name, found = path.relative_to(root).as_posix(), path.stat()
            before = (known or {}).get(name)
            if before and (before["size"], before["time"]) == (found.st_size, found.st_mtime_ns):
                notes[name] = before
            else:
                notes[name] = FileNote(size=found.st_size, time=found.st_mtime_ns, sha256=hash_file(path))
    return notes


def find_damage(path: Path, note: FileNote, *, deep: bool = False) -> str:
    """Say what is wrong with a file, "" if it is as it was noted.

    Args:
        path: The file.
        note: What a record keeps of it.
        deep: Hash it even if it has the size and time that were noted.
    """
    try:
        found = path.stat()
        if not path.is_file():
            return "not a file"
        if found.st_size != note["size"]:
            return f"{found.st_size:,} bytes instead of {note['size']:,}"
        if (deep or found.st_mtime_ns != note["time"]) and hash_file(path) != note["sha256"]:
            return "its bytes are not those that were written"
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return ""


@cache
def versions() -> dict[str, str]:
    """Return the versions of the packages that decide a result."""
    return {name: version(name) for name in ("modeclip", "torch", "open_clip_torch", "numpy", "pylance")}


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The process that is at work in a folder, as the folder's lock tells."""

    process: int | None = None
    """Its id; None where an earlier version holds the lock, which does not tell."""
    machine: str = ""
    """Name of its machine."""
    boot: str = ""
    """What tells this run of the machine from others."""
    since: str = ""
    """When it began, as date and time."""

    @classmethod
    def here(cls) -> Holder:
        """Return this process."""
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        except OSError:  # not Linux
            boot = ""
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        return cls(process=os.getpid(), machine=platform.node(), boot=boot, since=since)

    @property
    def is_elsewhere(self) -> bool:
        """Whether it works on another machine, whose locks may not be seen here."""
        own = Holder.here()
        return self.process is not None and (self.machine, self.boot) != (own.machine, own.boot)

    def __str__(self) -> str:
        if self.process is None:
            return "another process"
        return f"process {self.process} of {self.machine or 'this machine'}, since {self.since},"


def holder_of(folder: Path) -> Holder | None:
    """Return the process that is at work in a folder, or None. Asking holds the lock for a moment only.

    A process of this machine holds the lock until it ends, however that happens. One of another machine counts as dead
    after ``SILENCE_SECONDS`` without a sign of life, whatever the shared file system says of its lock; this needs
    clocks that agree to a minute.
    """
    try:
        with (folder / LOCK_FILE).open("rb") as file:
            is_locked = not _lock(file, fcntl.LOCK_SH)
            content, silence = file.read(), time.time() - os.fstat(file.fileno()).st_mtime
    except OSError:
        return None
    try:
        holder = Holder(**json.loads(content))
    except (ValueError, TypeError):  # empty, or half-written a moment ago
        holder = Holder()
    if holder.is_elsewhere:
        return holder if silence < SILENCE_SECONDS else None
    return holder if is_locked else None


@contextmanager
def only_process(folder: Path, patience_seconds: float = 0.0) -> Iterator[None]:
    """Hold a folder's lock, which the system frees when the process ends, however that happens.

    The lock belongs to this process alone: a child that it forks or starts does not keep it. `holder_of` tells others
    who holds it.

    Args:
        folder: An existing folder.
        patience_seconds: How long to wait for another process that holds it.

    Raises:
        ModeclipError: Another process still holds it.
    """
    deadline = time.monotonic() + patience_seconds
    while (file := _take_lock(folder)) is None:
        if time.monotonic() >= deadline:
            raise ModeclipError(
                f"{folder}: {holder_of(folder) or 'another process'} is at work in this folder; wait for it, stop it, "
                "or choose another"
            )
        time.sleep(0.2)
    is_over = threading.Event()
    pulse = threading.Thread(target=_show_life, args=(file.fileno(), is_over), daemon=True)
    _held.add(file.fileno())
    try:
        pulse.start()
        yield
    finally:
        is_over.set()
        pulse.join()
        _held.discard(file.fileno())
        file.truncate(0)
        file.close()


def _take_lock(folder: Path) -> BinaryIO | None:
    """Take a folder's lock and say in it who holds it; return its open file, or None if another process has it."""
    path, holder = folder / LOCK_FILE, holder_of(folder)
    if holder is not None and holder.is_elsewhere:
        return None
    file = path.open("a+b")
    if not _lock(file, fcntl.LOCK_EX):
        file.close()
        if holder is None and holder_of(folder) is None:  # the file system keeps the lock of a machine that is gone
            path.unlink(missing_ok=True)
        return None
    file.truncate(0)
    file.write(json.dumps(asdict(Holder.here())).encode())
    file.flush()
    try:
        is_same = path.stat().st_ino == os.fstat(file.fileno()).st_ino
    except FileNotFoundError:
        is_same = False
    if is_same:
        return file
    file.close()  # the lock of a file that is not there any more is worth nothing
    return None


def _lock(file: BinaryIO, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _show_life(handle: int, is_over: threading.Event) -> None:
    while not is_over.wait(HEARTBEAT_SECONDS):
        with suppress(OSError):
            os.utime(handle)


def _leave_locks() -> None:
    """Let go of the locks that a forked process has inherited."""
    for handle in _held:
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, handle, inheritable=False)
        os.close(nothing)


_held: set[int] = set()
os.register_at_fork(after_in_child=_leave_locks)
