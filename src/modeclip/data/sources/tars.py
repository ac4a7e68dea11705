"""A plain tar file goes in; the names, offsets and sizes of its members come out, without unpacking anything.

Headers are read in blocks, several at a time where members are small and one at a time where they are large. GNU and
PAX extensions for long names and large sizes are understood. Python's tarfile reads the same at a tenth of the speed,
makes an object of each member, and takes a damaged header for the end; here a tar that does not end with its end mark
is damaged.

Source: POSIX.1-2017, pax, "ustar Interchange Format" and "pax Header Block"; GNU tar manual, "Basic Tar Format".

Price: a look at each header, and a read for every 64 KiB (4 MiB in an object store) or large member.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator

from modeclip.system.paths import file_size, is_url, read_bytes

BLOCK = 512
LOCAL_BYTES, URL_BYTES = 1 << 16, 1 << 22
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")
"""First bytes of gzip, bzip2, xz and zstandard files."""
REGULAR, WITHOUT_DATA = b"0\x007", b"123456"
ADLER = 65521


class DamagedTar(Exception):  # noqa: N818 (it says what is wrong with the file)
    """The tar ends too early or holds what is no header."""


class CompressedTar(Exception):  # noqa: N818
    """The tar is compressed, so that byte ranges of it cannot be read."""


class Tar:
    """One tar file, read from its start to its end."""

    def __init__(self, path: str) -> None:
        """Look at the first bytes.

        Raises:
            FileNotFoundError: There is no such file.
            CompressedTar: It is compressed.
        """
        self.path = path
        self.size = file_size(path)
        self._read_ahead = URL_BYTES if is_url(path) else LOCAL_BYTES
        self._start, self._buffer = 0, b""
        if self.read(0, min(self.size, BLOCK)).startswith(COMPRESSED):
            raise CompressedTar(f"{path} is compressed")

    def read(self, offset: int, size: int) -> bytes:
        """Return bytes of the file, from what has been read already if they lie there."""
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
        """Yield (name, offset, size) of the regular files in it.

        Raises:
            DamagedTar: It cannot be read to its end mark; what came before has been yielded.
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
    """Return the size that a header gives, after comparing its checksum."""
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
    """Return the path, the size and whether a file is sparse from the records "length key=value" of a PAX header."""
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
