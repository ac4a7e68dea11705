"""The checksums of a dataset's files, so that flipped bytes are noticed before they are taken for vectors.

Lance itself reads whatever bytes a file has. So each commit of ours notes the size, time and SHA-256 of every file that
it added, in ``_modeclip/checksums.json`` inside the dataset, and keeps a copy of the newest manifest, which says what
the dataset is made of. A manifest that is missing or damaged is put back from its copy: the same bytes, and only while
no newer version is there. In an object store a file is known by its size and the store's own tag instead.

A dataset of an earlier version has no notes: its files are "not known", and the first commit notes them.

Price: a commit reads its new files once more, 0.6 s for 1 GB from memory on one core; in a store a listing. Opening a
local dataset costs a stat for each of its files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from modeclip.errors import DamagedError, ModeclipError
from modeclip.system.console import log
from modeclip.system.files import FileNote, find_damage, note_files, only_process, parse_json, to_json, write_atomically
from modeclip.system.paths import is_url, join, open_file, read_bytes, states

SIDE_FOLDER = "_modeclip"
"""Folder inside a dataset for what is ours: checksums, ledgers and the lock; Lance leaves it alone."""
CHECKSUMS_FILE = "checksums.json"
MANIFEST_COPY = "manifest"
MUCH = 2e9
"""Bytes whose hashing takes so long that it is said."""
HINT = "_versions/latest_version_hint.json"
"""File of Lance that says the newest version; it is a hint, and listing the folder tells the same."""
_DESCENDING = (1 << 64) - 1
"""Lance names the manifest of version n by this number minus n, so that the newest is listed first."""


class Checksums(TypedDict):
    """What is noted of the files of a dataset."""

    uri: str
    """Where the dataset was; the tags of a store mean nothing elsewhere."""
    manifest: str
    """Name of the newest version's manifest."""
    files: dict[str, FileNote]
    """Of a local dataset: the files by their name in it."""
    objects: dict[str, str]
    """Of a dataset in a store: size and tag of each object by its name."""


class FileDamage(TypedDict):
    """A file of a dataset that is not as it was written."""

    file: str
    """Its name in the dataset."""
    what: str
    """What is wrong with it."""
    columns: list[str]
    """Columns whose values it holds."""
    is_needed: bool
    """Whether the newest version needs it; the manifest of an older one is not needed."""


def data_files(dataset: Any) -> dict[str, list[str]]:
    """Return the data files of a Lance dataset, each with the columns that it holds values of."""
    names = {field.id(): field.name() for field in dataset.lance_schema.fields()}
    found: dict[str, list[str]] = {}
    for fragment in dataset.get_fragments():
        for file in fragment.data_files():
            found[f"data/{file.path}"] = [names[field] for field in file.fields if field in names]
    return found


def note_commit(dataset: Any) -> None:
    """Note the files of a dataset's newest version; those that are noted and unchanged are not read again."""
    uri = dataset.uri
    known, names = read_checksums(uri), sorted(data_files(dataset))
    manifest = _manifest_name(uri, dataset.version)
    checksums = Checksums(uri=uri, manifest=manifest, files={}, objects={})
    if is_url(uri):
        found = states([join(uri, name) for name in names])
        checksums["objects"] = dict(zip(names, found, strict=True))
    else:
        root = Path(uri)
        (root / SIDE_FOLDER).mkdir(exist_ok=True)
        paths = [root / name for name in names] + [root / name for name in _versions_and_transactions(root)]
        checksums["files"] = note_files(root, paths, known["files"] if known else None)
        write_atomically(root / SIDE_FOLDER / MANIFEST_COPY, (root / manifest).read_bytes())
    _write(uri, to_json(checksums).encode())


def read_checksums(uri: str) -> Checksums | None:
    """Return what is noted of a dataset; None where nothing is, or where the notes themselves are damaged."""
    path = join(uri, f"{SIDE_FOLDER}/{CHECKSUMS_FILE}")
    try:
        return parse_json(read_bytes(path), Checksums)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log(f"{path}: damaged ({error}); the next command that writes to the catalog notes its files as they are then")
        return None


def find_damaged(dataset: Any, *, deep: bool = False) -> list[FileDamage]:
    """Return the files of a dataset that are not as they were noted.

    Args:
        dataset: A Lance dataset.
        deep: Hash every file, also those of the size and time that were noted.
    """
    uri, checksums = dataset.uri, read_checksums(dataset.uri)
    if checksums is None:
        return []
    columns, newest = data_files(dataset), _manifest_name(uri, dataset.version)
    found: list[FileDamage] = []

    def add(name: str, what: str) -> None:
        if what:
            is_needed = name in columns or name == newest
            found.append(FileDamage(file=name, what=what, columns=columns.get(name, []), is_needed=is_needed))

    if is_url(uri):
        names = sorted(columns)
        for name, now in zip(names, states([join(uri, name) for name in names]), strict=True):
            add(name, _object_damage(join(uri, name), now, name, checksums, deep))
        return found
    files = checksums["files"]
    copied = [name for name in files if _time(Path(uri, name)) != files[name]["time"]]
    if (size := sum(files[name]["size"] for name in copied)) > MUCH:
        log(f"{uri}: was copied or changed; hashing {size / 1e9:.0f} GB once, to see that the bytes are the same")
    for name, note in files.items():
        path = Path(uri, name)
        if name in columns or path.exists():  # files that only older versions need are cleaned up in time
            add(name, find_damage(path, note, deep=deep))
    if copied and not found:
        _note_times(Path(uri), checksums)
    return found


def _time(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _note_times(root: Path, checksums: Checksums) -> None:
    """Note the times of files that were found whole, so that they are not hashed again; a reader may be unable to."""
    for name, note in checksums["files"].items():
        note["time"] = _time(root / name)
    with suppress(OSError, ModeclipError), only_process(root / SIDE_FOLDER):
        now = read_checksums(str(root))
        if now is not None and now["manifest"] == checksums["manifest"]:  # no writer came between
            _write(str(root), to_json(checksums).encode())


def unknown_files(dataset: Any) -> list[str]:
    """Return the data files of a dataset that nothing is noted of."""
    checksums = read_checksums(dataset.uri)
    noted = checksums["files"].keys() | checksums["objects"].keys() if checksums else set()
    return sorted(data_files(dataset).keys() - noted)


def restore_manifest(uri: str) -> None:
    """Put back the newest manifest of a local dataset from its copy, if it is missing or damaged.

    Raises:
        DamagedError: The copy is damaged too, or it cannot be written.
    """
    if is_url(uri) or (checksums := read_checksums(uri)) is None:
        return
    root, name = Path(uri), checksums["manifest"]
    note = checksums["files"].get(name)
    newest = max(_versions(root), default=0)
    if note is None or newest > _version_of(name):
        return
    if what := find_damage(root / name, note):
        copy = root / SIDE_FOLDER / MANIFEST_COPY
        if find_damage(copy, note):
            raise DamagedError(f"{root / name}: {what}, and so is its copy; {_INDEX_AGAIN}")
        try:
            if (root / name).is_dir():
                (root / name).rmdir()
            write_atomically(root / name, copy.read_bytes())
        except OSError as error:
            raise DamagedError(
                f"{root / name}: {what}, and its copy cannot be put back ({error.strerror}); copy {copy} there"
            ) from None
        log(f"{root / name}: {what}; put back from its copy")
    _restore_hint(root / HINT, _version_of(name))


_INDEX_AGAIN = "make the catalog anew with modeclip index --replace"


def _restore_hint(path: Path, version: int) -> None:
    with suppress(OSError, ValueError):
        if json.loads(path.read_bytes()) == {"version": version}:
            return
    with suppress(OSError):  # a reader may not write, and needs no hint
        if path.is_dir():
            path.rmdir()
        write_atomically(path, json.dumps({"version": version}, separators=(",", ":")))


def remove_leftovers(uri: str, damaged: Iterable[FileDamage]) -> None:
    """Remove damaged files that only older versions of a local dataset need."""
    for damage in damaged:
        if not damage["is_needed"] and not damage["columns"]:
            path = Path(uri, damage["file"])
            if path.is_dir():
                path.rmdir()
            else:
                path.unlink(missing_ok=True)
            log(f"{path}: {damage['what']}; removed, since only an older version of the catalog needed it")


def _object_damage(path: str, now: str, name: str, checksums: Checksums, deep: bool) -> str:
    if not now:
        return "missing"
    if checksums["uri"] == path.removesuffix(f"/{name}") and (before := checksums["objects"].get(name)):
        return "" if now == before else f"the store says {now!r} of it (size, tag) instead of {before!r}"
    if (note := checksums["files"].get(name)) is None:
        return ""
    if int(now.split()[0]) != note["size"]:
        return f"{int(now.split()[0]):,} bytes instead of {note['size']:,}"
    return "its bytes are not those that were written" if deep and _hash_object(path) != note["sha256"] else ""


def _hash_object(path: str) -> str:
    from hashlib import sha256

    digest = sha256()
    with open_file(path) as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _write(uri: str, content: bytes) -> None:
    from fsspec.core import url_to_fs

    path = join(uri, f"{SIDE_FOLDER}/{CHECKSUMS_FILE}")
    if is_url(uri):
        store, place = url_to_fs(path)
        store.pipe_file(place, content)
    else:
        write_atomically(Path(path), content)


def _versions_and_transactions(root: Path) -> list[str]:
    folders = ("_versions", "_transactions")
    return sorted(str(path.relative_to(root)) for folder in folders for path in (root / folder).glob("*.*"))


def _versions(root: Path) -> list[int]:
    return [_version_of(path.name) for path in (root / "_versions").glob("*.manifest")]


def _version_of(name: str) -> int:
    """Return the version that a manifest is of, by its name in either of Lance's two ways."""
    found = re.search(r"(\d+)\.manifest$", name)
    number = int(found[1]) if found else 0
    return _DESCENDING - number if number > _DESCENDING // 2 else number


def _manifest_name(uri: str, version: int) -> str:
    plain = f"_versions/{version}.manifest"
    if not is_url(uri) and Path(uri, plain).exists():
        return plain
    return f"_versions/{_DESCENDING - version:020d}.manifest"
