"""What one image-caption pair is, and the causes for which a pair is skipped.

A sample names the bytes of its image: they are in memory, or in a file (the whole file, or a byte range of a tar
shard) on this machine or in an object store. What cannot become a sample is a ``Skipped`` with a cause, which whoever
reads the source counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from modeclip.system.paths import read_bytes

# Causes for which a pair or a whole part of a source is skipped, as results name them.
NO_CAPTION = "no caption"
EMPTY_CAPTION = "caption is empty"
NO_IMAGE = "no image"
OTHER_SPLIT = "belongs to another split (data.split)"
OTHER_COLUMN = "image is named in another column (data.image_column)"
NOT_READ = "image format is not read (data.image_keys)"
BROKEN_LINK = "link leads nowhere"
LOOP = "link leads in a ring"
UNLISTED = "folder cannot be read"
NOT_UTF8 = "text is not UTF-8"
NOT_JSON = "caption file is not JSON"
MISSING = "image file is missing"
UNREADABLE = "image file cannot be read"
EMPTY = "image is empty (0 bytes)"
UNDECODABLE = "image does not decode"
CHANGED = "image has changed"
SHORT_FILE = "image file is shorter than recorded"
UNSCALABLE = "image has grey values that cannot be scaled"
BOMB = "image has too many pixels (decompression bomb)"
NOT_DOWNLOADED = "image was not downloaded (img2dataset)"
UNRENDERED = "icon does not render"
BLANK = "icon is blank"
DUPLICATE = "duplicate (same set, name and pixels)"
COPY_OF_HELD_OUT = "image is held out (a copy of it)"
COPY_OF_TRAINED = "image is trained on (a copy of it)"
DAMAGED_SHARD = "tar shard is damaged"
COMPRESSED_SHARD = "tar shard is compressed"
MISSING_SHARD = "tar shard is missing"
REPLACED = "replaced by a later member of the tar"
FURTHER_IMAGE = "further image of a sample (data.image_keys)"
FURTHER_MEMBER = "further member of a sample (a.seg.png beside a.jpg)"
OTHER_MEMBER = "tar member is neither image nor caption"
NOT_A_FILE = "tar member is no file"
SPARSE = "tar member is a sparse file"
NO_SIDECAR = "shard has no Parquet file beside it"
NO_SHARD = "Parquet file has no shard or folder beside it"
DAMAGED_SIDECAR = "Parquet file beside a shard is damaged"
DAMAGED_TABLE = "table file is damaged"
BAD_ROW = "row of a table cannot be read"
MISSING_TABLE = "table file is missing"

HARMLESS = frozenset(
    {
        *(DUPLICATE, NOT_DOWNLOADED, OTHER_SPLIT, OTHER_COLUMN, NOT_READ, LOOP, COPY_OF_HELD_OUT, COPY_OF_TRAINED),
        *(REPLACED, FURTHER_IMAGE, FURTHER_MEMBER, OTHER_MEMBER, NO_SIDECAR),
    }
)
"""Causes that do not mean that the data are damaged."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One image-caption pair: the image's bytes, or the file and byte range that hold them."""

    key: str
    caption: str
    image: bytes | None = None
    path: str | None = None
    """A file, or its address in an object store."""
    offset: int = 0
    size: int = -1
    """Number of bytes from ``offset`` on; -1 means the rest of the file."""
    group: str = ""
    """The icon set, the folder or the shard that the pair came from."""
    extra: Mapping[str, object] = field(default_factory=dict)
    """Values of further columns, by name."""

    def read(self) -> bytes:
        """Return the encoded image, from memory, its file or its object store."""
        if self.image is not None:
            return self.image
        if self.path is None:
            raise FileNotFoundError(f"sample {self.key!r} names no image file")
        return read_bytes(self.path, self.offset, self.size)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A pair, or a part of a source, that is left out: ``cause`` is for counting, ``detail`` for people."""

    key: str
    cause: str
    detail: str = ""
