"""Tar shards of pairs, as webdataset, img2dataset and MetaCLIP write them.

Nothing is unpacked or copied: a shard's index is read together with the captions in it, and each image is named by its
offset and size. The conventions are those of webdataset and open_clip: members with the same name up to the first dot
are one sample, names expand braces and are joined by ``::``. In addition, the Parquet file that img2dataset leaves next
to each shard gives further columns, and MetaCLIP's JSON members give a pair for each of their texts. Unlike in
webdataset, the members of a sample need not be neighbours.

A shard that is missing, compressed or damaged is skipped with its cause, after what can be read of it. If no shard can
be read, or the first readable one lacks the keys, that is an error.

``Tar`` reads headers in blocks, several at a time where members are small and one at a time where they are large. It
understands the extensions of GNU and PAX for long names and large sizes. Python's tarfile reads the same at a tenth of
the speed, makes an object of each member, and takes a damaged header for the end of the file; here a tar without its
end mark is damaged.

Source: POSIX.1-2017, pax, "ustar Interchange Format" and "pax Header Block"; GNU tar manual, "Basic Tar Format".

Price: a look at each header, a read for every 64 KiB (4 MiB in an object store) or large member, and Python objects for
each pair. Memory: one shard's index.
"""

from __future__ import annotations

import json
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import pyarrow as pa

from modeclip.data.samples import (
    COMPRESSED_SHARD,
    DAMAGED_SHARD,
    DAMAGED_TABLE,
    MISSING_SHARD,
    NO_CAPTION,
    NO_IMAGE,
    Sample,
    Skipped,
)
from modeclip.data.sources.captions import FileOptions, samples_of
from modeclip.data.sources.source import (
    ALL_SPLITS,
    DataSource,
    SourceConfig,
    SourceKind,
    SourcePart,
    chosen_files,
    count,
    describe,
    files_by_split,
)
from modeclip.data.sources.tables import DamagedTable, read_sidecar, sidecar_columns
from modeclip.errors import ModeclipError
from modeclip.system.paths import (
    expand,
    file_size,
    folders_below,
    home,
    is_folder,
    is_url,
    other_spelling,
    read_bytes,
    states,
)
from modeclip.system.paths import state as state_of

MEMBERS_LOOKED_AT = 32
"""Number of members without a JSON file among them after which a shard is taken to have none."""
BLOCK = 512
"""Bytes of a header; members begin at multiples of it."""
LOCAL_BYTES, URL_BYTES = 1 << 16, 1 << 22
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")
"""First bytes of gzip, bzip2, xz and zstandard files."""
REGULAR, WITHOUT_DATA = b"0\x007", b"123456"
ADLER = 65521


@dataclass(slots=True)
class _Pair:
    """The best image and caption that a shard has for one sample so far, by the order of the suffixes."""

    image: tuple[int, int, int] | None = None
    """Place of its suffix, offset in bytes, size in bytes."""
    caption: tuple[int, bytes] | None = None
    """Place of its suffix, contents."""


def list_shards(source: str, split: str = ALL_SPLITS) -> list[str]:
    """Return the shards that a source names, in its order; those of a folder are sorted by name.

    Args:
        source: A folder, or names with braces.
        split: The split that is read where the names of a folder's shards begin with those of splits.
    """
    if "::" not in source and is_folder(home(source)):
        (folder,) = expand(source)
        return chosen_files(files_by_split(folder, (".tar",), hub=False), split)
    return expand(source)


def open_shards(config: SourceConfig) -> DataSource:
    """List shards, and look into the first whole one to see what kind they are.

    Raises:
        ModeclipError: No shard can be read, or the first one has no member with the suffixes that are looked for.
    """
    options, shards = config.options(FileOptions), list_shards(config.source, config.split)
    found = states(shards)
    if not any(found):
        raise ModeclipError(
            f"data.source {config.source!r}: none of {count(len(shards), 'shard')} exists"
            f" (first: {shards[0] if shards else 'none named'}); correct the names"
        )
    present = [shard for shard, state in zip(shards, found, strict=True) if state]
    kind, extra = _look_into(present, config.source, options), pa.schema([])
    if kind == "shards" and state_of(_sidecar(present[0])):
        kind, extra = "img2dataset", sidecar_columns(_sidecar(present[0]))
    parts = tuple(
        SourcePart(name=shard, state=state, read=partial(read_shard, shard, group, options, extra))
        for shard, state, group in zip(shards, found, folders_below(shards), strict=True)
    )
    name = {"shards": "webdataset shard", "metaclip": "MetaCLIP shard"}.get(kind, "img2dataset shard")
    missing = f" ({len(shards) - len(present):,} missing)" if len(present) < len(shards) else ""
    what = describe(count(len(shards), name) + missing, extra)
    return DataSource(kind=kind, parts=parts, extra=extra, what=what)


def read_shard(shard: str, group: str, options: FileOptions, extra: pa.Schema) -> Iterator[Sample | Skipped]:
    """Yield the samples of one shard in the order of their first members; if it is damaged, the cause comes last.

    Args:
        shard: Path or address of the shard.
        group: Prefix of the keys of its samples.
        options: Suffixes of images and captions, and how captions are read.
        extra: Columns to take from the Parquet file beside it, if any.
    """
    pairs, problem = dict[str, _Pair](), None
    try:
        _scan(Tar(shard), options, pairs)
    except (FileNotFoundError, NotADirectoryError):
        yield Skipped(shard, MISSING_SHARD, "no such file")
        return
    except (DamagedTar, OSError) as error:
        problem = Skipped(shard, DAMAGED_SHARD, str(error))
        if pairs and (last := next(reversed(pairs.values()))) and (last.image is None or last.caption is None):
            pairs.popitem()
    except CompressedTar:
        yield Skipped(shard, COMPRESSED_SHARD, "its images cannot be read in place: decompress it")
        return
    try:
        columns = read_sidecar(_sidecar(shard), extra) if len(extra) else {}
    except DamagedTable as error:
        columns = {}
        yield Skipped(_sidecar(shard), DAMAGED_TABLE, str(error))
    num_called = Counter(name.rpartition("/")[2] for name in pairs) if columns else Counter[str]()
    for name, pair in pairs.items():
        key = f"{group}/{name}"
        if pair.image is None:
            yield Skipped(key, NO_IMAGE, f"{shard} has no {name}.{'/'.join(options.image_suffixes)}")
        elif pair.caption is None:
            yield Skipped(key, NO_CAPTION, f"{shard} has no {name}.{'/'.join(options.caption_suffixes)}")
        else:
            captions = options.read_captions(pair.caption[1], options.caption_suffixes[pair.caption[0]], key)
            if isinstance(captions, Skipped):
                yield captions
            else:
                _, offset, size = pair.image
                short = name.rpartition("/")[2]
                more = columns.get(name) or (columns.get(short, {}) if num_called[short] == 1 else {})
                yield from samples_of(captions, key, path=shard, offset=offset, size=size, group=group, extra=more)
    if problem is not None:
        yield problem


def _scan(tar: Tar, options: FileOptions, pairs: dict[str, _Pair]) -> None:
    """Put the images and captions of a shard into ``pairs``, by name without suffix."""
    images = {suffix: place for place, suffix in enumerate(options.image_suffixes)}
    captions = {suffix: place for place, suffix in enumerate(options.caption_suffixes)}
    for name, offset, size in tar.members():
        stem, suffix = split_name(name)
        place = images.get(suffix)
        if place is not None:
            pair = pairs.setdefault(stem, _Pair())
            if pair.image is None or place < pair.image[0]:
                pair.image = (place, offset, size)
        elif (place := captions.get(suffix)) is not None:
            pair = pairs.setdefault(stem, _Pair())
            if pair.caption is None or place < pair.caption[0]:
                pair.caption = (place, tar.read(offset, size))


def split_name(name: str) -> tuple[str, str]:
    """Split a member's name at the first dot of its last part; the suffix is in lower case, "" for hidden files.

    Examples:
        >>> split_name("./a.b/0001.Input.JPG"), split_name("a/._0001.jpg")
        (('a.b/0001', 'input.jpg'), ('a/', ''))
    """
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower() if stem else ""  # ._name is what macOS puts beside every name


def _look_into(shards: list[str], source: str, options: FileOptions) -> str:
    """Return "metaclip" or "shards", judged by the first members of the first readable shard that has any."""
    images, captions = options.image_suffixes, options.caption_suffixes
    problem: Exception | None = None
    for shard in shards:
        seen: Counter[str] = Counter()
        kind = ""
        try:
            tar = Tar(shard)
            for name, offset, size in tar.members():
                suffix = split_name(name)[1]
                seen[suffix] += bool(suffix)
                if suffix.rpartition(".")[2] == "json" and suffix in captions and not kind:
                    kind = _kind_of(tar.read(offset, size), options.caption_field)
                both = not seen.keys().isdisjoint(images) and not seen.keys().isdisjoint(captions)
                if both and (kind or sum(seen.values()) > MEMBERS_LOOKED_AT):
                    break
        except (DamagedTar, CompressedTar, OSError) as error:
            if seen.keys().isdisjoint(images) or seen.keys().isdisjoint(captions):
                problem = error
                continue
        for noun, keys in (("caption", captions), ("image", images)):
            if seen and seen.keys().isdisjoint(keys):
                found = ", ".join(key for key, _ in seen.most_common(8) if key) or "no member at all"
                raise ModeclipError(
                    f"shard {shard!r} holds no {noun}: expected members ending in"
                    f" {' or '.join(keys)}, found {found}; set data.{noun}_keys"
                )
        if seen:
            return kind or "shards"
    if isinstance(problem, CompressedTar):
        raise ModeclipError(
            f"shard {shards[0]!r} is compressed: expected a plain .tar, whose images can be read"
            " in place; decompress it"
        )
    reason = f"the last: {problem}" if problem else "no member in any of them"
    raise ModeclipError(f"data.source {source!r}: none of {count(len(shards), 'shard')} can be read ({reason})")


def _kind_of(data: bytes, field: str) -> str:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return "shards"
    is_metaclip = isinstance(fields, dict) and isinstance(fields.get("texts"), list) and field not in fields
    return "metaclip" if is_metaclip else "shards"


def _sidecar(shard: str) -> str:
    path = f"{shard[:-4] if shard.lower().endswith('.tar') else shard}.parquet"
    return other_spelling(path) or path


# ---------------------------------------------------------------- tar files


class DamagedTar(Exception):  # noqa: N818 (it says what is wrong with the file)
    """The tar ends too early, or has something else where a header should be."""


class CompressedTar(Exception):  # noqa: N818
    """The tar is compressed, so its members cannot be read as byte ranges."""


class Tar:
    """A tar file that is read from its start to its end."""

    def __init__(self, path: str) -> None:
        """Look at the first bytes of a file.

        Raises:
            FileNotFoundError: There is no such file.
            CompressedTar: The file is compressed.
        """
        self.path = path
        self.size = file_size(path)
        self._read_ahead = URL_BYTES if is_url(path) else LOCAL_BYTES
        self._start, self._buffer = 0, b""
        if self.read(0, min(self.size, BLOCK)).startswith(COMPRESSED):
            raise CompressedTar(f"{path} is compressed")

    def read(self, offset: int, size: int) -> bytes:
        """Return bytes of the file, from the buffer if it has them."""
        if offset >= self.size:  # an object store would call it an error
            return b""
        at = offset - self._start
        if not 0 <= at <= len(self._buffer) - size:
            if size > self._read_ahead:
                return read_bytes(self.path, offset, size)
            self._buffer = read_bytes(self.path, offset, self._read_ahead)
            self._start, at = offset, 0
        return self._buffer[at : at + size]

    def members(self) -> Iterator[tuple[str, int, int]]:
        """Yield (name, offset in bytes, size in bytes) of the regular files in the tar.

        Raises:
            DamagedTar: The tar cannot be read to its end mark. The members before the damage have been yielded.
        """
        position, extended = 0, dict[str, str]()
        while True:
            header = self.read(position, BLOCK)
            if len(header) < BLOCK:
                raise DamagedTar(f"neither a member nor the end mark is at byte {position:,}")
            if not header[0] and header == bytes(BLOCK):
                return
            size = _check_header(header, position)
            size = int(extended.get("size", size))
            kind, start = header[156:157], position + BLOCK
            position = start if kind in WITHOUT_DATA else start + (size + BLOCK - 1) // BLOCK * BLOCK
            if start + size > self.size and kind not in WITHOUT_DATA:
                raise DamagedTar(f"it ends at byte {self.size:,}, inside a member of {size:,} bytes")
            if kind in REGULAR:
                name = extended.get("path") or _name_of(header)
                if "sparse" in extended:
                    raise DamagedTar(f"member {name!r} is a sparse file, which is not supported")
                if not name.endswith("/"):  # in the oldest tars a folder is known by that alone
                    yield name, start, size
                extended = {}
            elif kind == b"x":
                extended |= _parse_pax(self.read(start, size), position)
            elif kind == b"L":
                extended["path"] = _text(self.read(start, size))
            elif kind == b"S":
                raise DamagedTar("it holds a sparse file, which is not supported")
            elif kind not in b"gK":
                extended = {}


def _check_header(header: bytes, position: int) -> int:
    """Return the size in a header after checking its checksum."""
    try:
        # The lower half of Adler-32 is one more than the sum of all bytes (modulo ADLER). The header holds that sum as
        # octal digits, with its own eight bytes taken for spaces.
        expected = int(header[148:156].rstrip(b"\0 "), 8) + sum(header[148:156]) - 8 * 32 + 1
        if (zlib.adler32(header) & 0xFFFF) != expected % ADLER:
            raise ValueError("checksum")
        size = int(header[124:136].rstrip(b"\0 "), 8)
        if size < 0:
            raise ValueError("size")
        return size
    except ValueError:  # signed sums, binary numbers and empty fields, or damage
        try:
            size = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").size
            if size < 0:
                raise ValueError(f"size {size}")
            return size
        except (tarfile.HeaderError, ValueError) as error:
            raise DamagedTar(f"no header at byte {position:,}: {error}") from error


def _name_of(header: bytes) -> str:
    if header[345] and header[257:263] == b"ustar\0":
        return f"{_text(header[345:500])}/{_text(header[:100])}"
    return _text(header[:100])


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _parse_pax(data: bytes, position: int) -> dict[str, str]:
    """Return path, size and a mark of sparse files from a PAX header, whose records are "length key=value"."""
    found, at = dict[str, str](), 0
    try:
        while at < len(data) and data[at]:
            length = int(data[at : data.index(b" ", at)])
            key, _, value = data[at : at + length - 1].partition(b" ")[2].partition(b"=")
            if key in (b"path", b"size"):
                found[key.decode()] = value.decode("utf-8", "surrogateescape")
            elif key.startswith(b"GNU.sparse"):
                found["sparse"] = "yes"
            at += max(length, 1)
        if not found.get("size", "0").isdecimal():
            raise ValueError(f"size {found['size']!r}")
    except ValueError as error:
        raise DamagedTar(f"the extended header before byte {position:,} cannot be read: {error}") from error
    return found


# ---------------------------------------------------------------- the kind of source

SHARDS = SourceKind(
    name="shards",
    expected="tar shards (data/{000..009}.tar, a.tar::b.tar, a folder of .tar files)",
    open=open_shards,
    fits_file=lambda name: re.search(r"\.(tar|tgz|tar\.\w+)$", name.lower()) is not None,
    fits_folder=lambda _, folder: any(name.lower().endswith(".tar") for name in folder.files),
)
