"""Reading files and folders by the same few functions, whether they are local or in an object store.

Addresses (``s3://...``) go through fsspec, which takes keys and endpoints from the usual environment variables.
Training reads many byte ranges from the same local shards, so their descriptors stay open; a file that has been
replaced or removed since then is noticed by its state.

Price: a local byte range costs a stat and a read; a range in an object store costs a request.
"""

from __future__ import annotations

import itertools
import os
import re
import threading
import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from modeclip.errors import ModeclipError

HIDDEN = (".", "__MACOSX")
"""How the names of hidden files and folders begin, and of the folder that zip archives of macOS have beside others."""

MAX_OPEN_FILES = 128
"""Descriptors that a process keeps open; the usual limit for a process is 1,024."""
PACKAGES = {"s3": "s3", "s3a": "s3"}
"""The extra of modeclip that installs the client of an object store, by protocol."""


_HOME = re.compile(r"(?:^|(?<=[=:]))(?:\./)?~[\w.-]*(?=/|$|::|#)")
"""Where a home folder may stand in an argument: at its start, or behind NAME= and word:."""


@dataclass(frozen=True, kw_only=True)
class RunPaths:
    """The paths of everything in the folder of a run."""

    folder: Path
    """The run's folder."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", home_path(self.folder))

    @property
    def recipe(self) -> Path:
        """The recipe that the run was made from, if it was made from one."""
        return self.folder / "recipe.yaml"

    @property
    def catalog_path(self) -> Path:
        """The catalog of the training pairs."""
        return self.folder / "catalog.lance"

    @property
    def tasks_path(self) -> Path:
        """The catalog of the held-out tasks, if there are any."""
        return self.folder / "tasks.lance"

    @property
    def curation(self) -> Path:
        """The folder with a folder for each method of the curation, in which its page lies."""
        return self.folder / "curation"

    @property
    def clusters(self) -> Path:
        """The folder of the clustering."""
        return self.folder / "clusters"

    @property
    def atlas(self) -> Path:
        """The folder with the places of all pairs on the atlas."""
        return self.folder / "atlas"

    @property
    def index(self) -> Path:
        """The folder of the index of the training pairs' images."""
        return self.folder / "index"

    @property
    def held_out_index(self) -> Path:
        """The folder of the index of the held-out images."""
        return self.folder / "held-out.index"

    @property
    def models(self) -> Path:
        """The folder with a folder for each model."""
        return self.folder / "models"

    @property
    def bundle(self) -> Path:
        """The folder of the bundle."""
        return self.folder / "bundle"

    @property
    def features(self) -> Path:
        """Features of the images of the tasks, with which other rules are scored without running a model."""
        return self.folder / "features"

    @property
    def results(self) -> Path:
        """The table of results, as JSON."""
        return self.folder / "results.json"

    @property
    def answers(self) -> Path:
        """The folder with what every system answered to every image of the tasks, as `modeclip evaluate` writes it."""
        return self.folder / "results"

    @property
    def names_answers(self) -> Path:
        """The same of the question about the class names of an expert, which is no task of the run."""
        return self.answers / "names"

    @property
    def report(self) -> Path:
        """The page that shows the results."""
        return self.folder / "report.html"

    @property
    def stages(self) -> Path:
        """The folder with a record of each finished stage."""
        return self.folder / "stages"


def is_url(path: str) -> bool:
    """Say whether a path is an address such as ``s3://bucket/folder``."""
    return "://" in path


def home(path: str) -> str:
    """Return a path whose first part may be ``~`` or ``~name``, for the home of a user; others stay as they are.

    What is really called ``~`` can be given as ``./~``.

    Raises:
        ModeclipError: No user of this machine has that name.
    """
    if not path.startswith("~"):
        return path
    found = os.path.expanduser(path)  # noqa: PTH111 (a Path would drop the slash at the end)
    if found == path and not os.path.lexists(path):
        raise ModeclipError(
            f"path {path!r}: no user has the name {path[1:].partition('/')[0]!r}; write ./{path} for a file of this"
            " name"
        )
    return found


def expand_homes(text: str) -> str:
    """Return a text with the home folders in it written out, as a shell does where a path begins: also behind = and :.

    What is no user's home stays as it is. ``./~`` becomes absolute, so that nobody takes it for the home folder later.

    Examples:
        >>> expand_homes("a ~ b"), expand_homes("cat,~dog"), expand_homes("s3://b/~c")
        ('a ~ b', 'cat,~dog', 's3://b/~c')
    """

    def written_out(found: re.Match[str]) -> str:
        if found[0].startswith("."):
            return os.path.abspath(found[0])  # noqa: PTH100
        return os.path.expanduser(found[0])  # noqa: PTH111

    return _HOME.sub(written_out, text) if "~" in text else text


def home_path(path: Path | str) -> Path:
    """Return a path of the user's as ``home`` does."""
    return Path(home(str(path)))


def absolute(path: str) -> str:
    """Return a path that does not depend on the working folder; addresses stay as they are, ``~`` is the home folder.

    A path that does not exist, but does with its letters in another Unicode form, is that one.
    """
    if is_url(path):
        return path
    found = str(Path(home(path)).resolve())
    return other_form(found) or found


def other_form(path: str) -> str | None:
    """Return the existing path that differs only in the Unicode form of its letters, such as NFC for NFD.

    Returns None for a path that exists, for an address, and where nothing or more than one thing fits.
    """
    if path.isascii() or is_url(path) or os.path.lexists(path):
        return None
    return _spelled(path, normal_form)


def other_spelling(path: str) -> str | None:
    """Return the existing path that differs only in Unicode forms, or in the case of its suffix, as ``other_form``."""
    if is_url(path) or os.path.lexists(path):
        return None
    return _spelled(path, plain_name)


def _spelled(path: str, plain: Callable[[str], str]) -> str | None:
    pure = Path(path)
    folder = str(pure.parent)
    if not os.path.isdir(folder):  # noqa: PTH112
        found = other_form(folder)
        if found is None:
            return None
        folder = found
        if os.path.lexists(join(folder, pure.name)):
            return join(folder, pure.name)
    fits = _names_of(folder, os.stat(folder).st_mtime_ns, plain).get(plain(pure.name), [])  # noqa: PTH116
    return join(folder, fits[0]) if len(fits) == 1 else None


@lru_cache(maxsize=16)
def _names_of(folder: str, changed: int, plain: Callable[[str], str]) -> dict[str, list[str]]:
    """Return the names in a folder by their plain forms; when it was changed is part of what is remembered."""
    del changed
    found: dict[str, list[str]] = {}
    for name in os.listdir(folder):  # noqa: PTH208
        found.setdefault(plain(name), []).append(name)
    return found


def plain_name(name: str) -> str:
    """Return a name in the one form in which names are compared: Unicode NFC, its suffix in lower case.

    Examples:
        >>> plain_name("IMG_1.Final.JPG")
        'IMG_1.Final.jpg'
    """
    stem, dot, suffix = name.rpartition(".")
    return normal_form(f"{stem}{dot}{suffix.lower()}" if dot else name)


def normal_form(name: str) -> str:
    """Return a name in the one Unicode form in which names are compared, NFC."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def form_of(name: str) -> str:
    """Return how the letters of a name are written: NFC, NFD, or neither.

    Examples:
        >>> form_of("caf\u00e9"), form_of("cafe\u0301")
        ('NFC', 'NFD')
    """
    forms: tuple[Literal["NFC", "NFD"], ...] = ("NFC", "NFD")
    return next((form for form in forms if unicodedata.is_normalized(form, name)), "no normal form")


def join(folder: str, name: str) -> str:
    """Return the path of a name in a folder, or the name itself if it is absolute."""
    if is_url(name) or name.startswith("/"):
        return name
    return f"{folder.rstrip('/')}/{name}" if folder else name


def parent(path: str) -> str:
    """Return the folder of a file."""
    return path.rstrip("/").rpartition("/")[0]


def folders_below(paths: list[str]) -> list[str]:
    """Return each path without its suffix, relative to the folder that all have in common.

    Examples:
        >>> folders_below(["s3://b/x/00.tar", "s3://b/y/00.tar"])
        ['x/00', 'y/00']
    """
    parts = [path.split("/") for path in paths]
    levels = zip(*(part[:-1] for part in parts), strict=False)
    depth = sum(1 for _ in itertools.takewhile(lambda level: len(set(level)) == 1, levels))
    return ["/".join(part[depth:]).rpartition(".")[0] for part in parts]


def expand(source: str) -> list[str]:
    """Return the absolute names in a list joined by ``::``, with their braces expanded."""
    return [absolute(name) for part in source.split("::") for name in expand_braces(part) if name]


def expand_braces(text: str) -> list[str]:
    """Expand braces as a shell does: lists, and ranges of numbers.

    Examples:
        >>> expand_braces("{a,b}-{08..10}.tar")
        ['a-08.tar', 'a-09.tar', 'a-10.tar', 'b-08.tar', 'b-09.tar', 'b-10.tar']
    """
    parts: list[list[str]] = []
    for piece in re.split(r"(\{[^{}]*\})", text):
        bounds = re.fullmatch(r"\{(\d+)\.\.(\d+)\}", piece)
        if bounds:
            first, last = bounds.groups()
            padded = any(len(bound) > 1 and bound.startswith("0") for bound in (first, last))
            width = max(len(first), len(last)) if padded else 0
            step = 1 if int(first) <= int(last) else -1
            numbers = range(int(first), int(last) + step, step)
            parts.append([f"{number:0{width}d}" for number in numbers])
        elif piece.startswith("{") and "," in piece:
            parts.append(piece[1:-1].split(","))
        else:
            parts.append([piece])
    return ["".join(choice) for choice in itertools.product(*parts)]


def filesystem(url: str) -> Any:
    """Return the fsspec client for an address.

    Raises:
        ModeclipError: The client's package is not installed, or the protocol is unknown.
    """
    import fsspec  # only where it is needed: half a second

    protocol = url.partition("://")[0]
    try:
        return fsspec.filesystem(protocol)
    except ImportError as error:
        extra = PACKAGES.get(protocol)
        install = f'pip install "modeclip[{extra}]"' if extra else f"{error}"
        raise ModeclipError(f"{url!r} needs a package that is not installed: {install}") from error
    except ValueError as error:
        raise ModeclipError(
            f"{url!r} is an address of an unknown kind: expected s3:// or another that fsspec knows"
        ) from error


@contextmanager
def reaching(url: str) -> Iterator[None]:
    """Turn the errors of an object store's client about addresses, keys and endpoints into one line.

    Raises:
        ModeclipError: The store cannot be reached or refuses the request.
    """
    try:
        yield
    except (FileNotFoundError, ModeclipError):
        raise
    except Exception as error:  # each client has its own
        if not is_url(url):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModeclipError(f"cannot read {url!r}: {reason}; correct the address, the keys or the endpoint") from error


def states(paths: list[str]) -> list[str]:
    """Return for each file a text that changes when the file does, made of its size and time or etag; "" if missing."""
    for folder in sorted({parent(path) for path in paths if is_url(path)}):  # one listing, not a request a file
        with suppress(FileNotFoundError), reaching(folder):
            filesystem(folder).ls(folder, detail=True, refresh=True)
    return [state(path) for path in paths]


def state(path: str) -> str:
    """Return the state of one file as ``states`` does."""
    try:
        if not is_url(path):
            found = Path(path).stat()
            return f"{found.st_size} {found.st_mtime_ns}"
        with reaching(path):
            return _state_of(filesystem(path).info(path))
    except (FileNotFoundError, NotADirectoryError):
        return ""


def _state_of(info: dict[str, Any]) -> str:
    change = next((info[name] for name in ("ETag", "etag", "md5Hash", "mtime", "LastModified") if name in info), "")
    return f"{info['size']} {str(change).strip(chr(34))}"


def is_folder(path: str) -> bool:
    """Say whether a path is a folder; an address that ends in "/" is believed to be one."""
    if not is_url(path):
        return Path(path).is_dir()
    with reaching(path):
        return path.endswith("/") or bool(filesystem(path).isdir(path))


def list_folder(folder: str) -> tuple[list[str], list[str]]:
    """Return the names of a folder's sub-folders and of its files, each sorted, without hidden ones."""
    found = next(walk(folder), None)
    return (found.folders, found.files) if found else ([], [])


@dataclass(frozen=True, kw_only=True, slots=True)
class Folder:
    """What one folder of a tree holds, without names that begin as `HIDDEN` says."""

    path: str
    """Path relative to the root of the tree; "" for the root itself."""
    folders: list[str]
    """Names of the sub-folders that can be entered, sorted; links to folders are among them."""
    files: list[str]
    """Names of the files, sorted; links to files are among them."""
    loops: list[str] = field(default_factory=list)
    """Names of links that would lead round in a ring."""
    broken: list[str] = field(default_factory=list)
    """Names of links that lead nowhere."""
    unreadable: str = ""
    """Why the folder cannot be listed."""


def walk(root: str) -> Iterator[Folder]:
    """Yield a folder and all folders below it, each before those in it, sorted by name.

    Links are followed wherever they lead. What is reached by two paths is there twice, under two names. A link is a
    loop, and not followed, if it leads to a folder above it; a link inside a linked folder also if that folder was
    seen before, because links that lead to each other would multiply.
    """
    if is_url(root):
        yield from _walk_store(root)
        return
    seen = set[tuple[int, int]]()
    waiting: list[tuple[str, frozenset[tuple[int, int]], bool]] = [("", frozenset(), False)]
    while waiting:
        relative, above, is_linked = waiting.pop()
        place = join(root, relative) if relative else root
        found = Folder(path=relative, folders=[], files=[])
        try:
            here = _identity(place)
            seen.add(here)
            above |= {here}
            with os.scandir(place) as entries:
                visible = sorted(
                    (entry for entry in entries if not entry.name.startswith(HIDDEN)), key=lambda e: e.name
                )
            below = []
            for entry in visible:
                is_link = entry.is_symlink()
                if not _leads_to_folder(entry):
                    kept = _files_or_broken(entry, found) if is_link else found.files
                    kept.append(entry.name)
                    continue
                identity = _identity(entry.path) if is_link or is_linked else (-1, -1)
                if identity in above or (is_link and is_linked and identity in seen):
                    found.loops.append(entry.name)
                    continue
                found.folders.append(entry.name)
                below.append((f"{relative}/{entry.name}" if relative else entry.name, above, is_linked or is_link))
        except FileNotFoundError:
            continue
        except OSError as error:
            yield Folder(path=relative, folders=[], files=[], unreadable=error.strerror or str(error))
            continue
        yield found
        waiting += reversed(below)


def _identity(path: str) -> tuple[int, int]:
    found = os.stat(path)  # noqa: PTH116 (a Path would cost more than the call)
    return found.st_dev, found.st_ino


def _files_or_broken(entry: os.DirEntry[str], found: Folder) -> list[str]:
    """Return the list of a folder that a link belongs to that leads to no folder."""
    try:
        os.stat(entry.path)  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError):
        return found.broken
    except OSError:  # it leads to itself
        return found.loops
    return found.files


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _walk_store(root: str) -> Iterator[Folder]:
    store = filesystem(root)
    base = store._strip_protocol(root).rstrip("/")
    with reaching(root):
        store.invalidate_cache()
        for folder, folders, names in store.walk(base):
            _sort_visible(folders)
            files = sorted(name for name in names if name and not name.startswith(HIDDEN))
            path = folder.rstrip("/")[len(base) :].strip("/")
            yield Folder(path=path, folders=list(folders), files=files)


def _sort_visible(folders: Any) -> None:
    """Sort in place the folders that fsspec is still to walk: a dictionary, or a list."""
    kept = sorted(name for name in folders if not name.startswith(HIDDEN))
    if isinstance(folders, dict):
        told = {name: folders[name] for name in kept}
        folders.clear()
        folders.update(told)
    else:
        folders[:] = kept


def tree_states(root: str, suffixes: tuple[str, ...]) -> list[str]:
    """Return "path state" for all files below a folder that end in one of the suffixes, sorted."""
    if is_url(root):
        with reaching(root):
            store = filesystem(root)
            store.invalidate_cache()
            found = store.find(root, detail=True)
        return [f"{path} {_state_of(found[path])}" for path in sorted(found) if path.lower().endswith(suffixes)]
    paths = (join(join(root, folder.path), name) for folder in walk(root) for name in folder.files)
    return [f"{path} {state(path)}" for path in sorted(paths) if path.lower().endswith(suffixes)]


def open_file(path: str) -> Any:
    """Open a local or remote file for reading bytes; fsspec's files have no common type."""
    if not is_url(path):
        return Path(path).open("rb")
    return filesystem(path).open(path, "rb", block_size=1 << 22)


def file_size(path: str) -> int:
    """Return the number of bytes of a file.

    Raises:
        FileNotFoundError: There is no such file.
    """
    if not is_url(path):
        return Path(path).stat().st_size
    with reaching(path):
        return int(filesystem(path).info(path)["size"])


def read_bytes(path: str, offset: int = 0, size: int = -1) -> bytes:
    """Return ``size`` bytes of a file from ``offset`` on, fewer at its end, or with -1 all to its end.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: It cannot be read.
    """
    if is_url(path):
        end = None if size < 0 else offset + size
        with reaching(path):
            return bytes(filesystem(path).cat_file(path, start=offset or None, end=end)) if size else b""
    if size >= 0:
        return _OPEN.read(path, offset, size)
    with Path(path).open("rb") as file:
        file.seek(offset)
        return file.read()


class _Descriptor:
    """An open file that is closed when nothing refers to it any more."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class _OpenFiles:
    """The files of which this process read ranges most recently; threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: OrderedDict[str, tuple[tuple[int, int, int], _Descriptor]] = OrderedDict()

    def read(self, path: str, offset: int, size: int) -> bytes:
        found = os.stat(path)  # noqa: PTH116 (a Path would cost more than the reading)
        identity = (found.st_dev, found.st_ino, found.st_mtime_ns)
        with self._lock:
            known = self._files.get(path)
            if known is None or known[0] != identity:
                known = self._files[path] = (identity, _Descriptor(path))
                if len(self._files) > MAX_OPEN_FILES:
                    self._files.popitem(last=False)
            self._files.move_to_end(path)
        data = os.pread(known[1].number, size, offset)
        while len(data) < size and (more := os.pread(known[1].number, size - len(data), offset + len(data))):
            data += more
        return data

    def after_fork(self) -> None:
        self._lock = threading.Lock()


_OPEN = _OpenFiles()
os.register_at_fork(after_in_child=_OPEN.after_fork)
