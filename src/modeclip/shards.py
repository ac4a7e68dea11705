"""Names of tar shards go in; samples come out that refer to byte ranges of those shards.

Nothing is unpacked or copied: a shard's index is read (a seek from header to header) with the captions
in it, and each image is named by offset and size. Conventions are webdataset's and open_clip's: members
with the same name up to the first dot are one sample, names expand braces and are joined by ``::``.
Difference: members of one sample need not be neighbours, and a shard that lacks captions or images, or
cannot be read to its end, is an error that says so. Compressed tars are refused, for a byte range of
them cannot be read at random.

Price: two seeks and a small read a member; memory is one shard's index.
"""

from __future__ import annotations

import itertools
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

from modeclip.errors import ModeclipError
from modeclip.samples import NO_CAPTION, NO_IMAGE, Sample, Skipped, read_caption

# First bytes of gzip, bzip2, xz and zstandard files.
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")


@dataclass(slots=True)
class _Members:
    """What a shard holds of one sample, by suffix."""

    images: dict[str, tuple[int, int]] = field(default_factory=dict)
    captions: dict[str, bytes] = field(default_factory=dict)


def read_shards(source: str, image_keys: Sequence[str], caption_keys: Sequence[str]) -> Iterator[Sample | Skipped]:
    """Yield the samples of shards, one shard after the other, in the order of their first members.

    Args:
        source: A folder of .tar files, or names with braces, joined by ``::``.
        image_keys: Suffixes of images, lower case; of several in a sample the first is taken.
        caption_keys: Suffixes of captions, likewise.

    Raises:
        ModeclipError: A shard does not exist, is damaged or compressed, or has no caption or image.
    """
    shards = list_shards(source)
    root = os.path.commonpath([shard.parent for shard in shards])
    for shard in shards:
        group = shard.relative_to(root).with_suffix("").as_posix()
        for name, members in _scan_shard(shard, image_keys, caption_keys).items():
            key = f"{group}/{name}"
            image = next((k for k in image_keys if k in members.images), None)
            suffix = next((k for k in caption_keys if k in members.captions), None)
            if image is None:
                yield Skipped(key, NO_IMAGE, f"{shard.name} has no {name}.{'/'.join(image_keys)}")
            elif suffix is None:
                detail = f"{shard.name} has no {name}.{'/'.join(caption_keys)}"
                yield Skipped(key, NO_CAPTION, detail)
            else:
                caption = read_caption(members.captions[suffix], suffix, key)
                offset, size = members.images[image]
                yield (
                    caption
                    if isinstance(caption, Skipped)
                    else Sample(key, caption, None, str(shard), offset, size, group)
                )


def list_shards(source: str) -> list[Path]:
    """Return the shard files that a source names, in its order (a folder's sorted by name).

    Raises:
        ModeclipError: One of them does not exist.
    """
    if Path(source).is_dir():
        return sorted(Path(source).resolve().glob("*.tar"))
    names = [name for part in source.split("::") for name in expand_braces(part) if name]
    shards = [Path(name).resolve() for name in names]
    missing = [str(shard) for shard in shards if not shard.is_file()]
    if missing or not shards:
        raise ModeclipError(
            f"data.source {source!r}: {len(missing)} of {len(shards)} shards do not exist"
            f" (first: {missing[0] if missing else 'none named'}); correct the names"
        )
    return shards


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


def _scan_shard(shard: Path, image_keys: Sequence[str], caption_keys: Sequence[str]) -> dict[str, _Members]:
    """Read the index and the captions of one shard; the images stay unread."""
    samples: dict[str, _Members] = {}
    seen: Counter[str] = Counter()
    for tar, member in _walk_tar(shard):
        path = PurePosixPath(member.name)
        stem, _, suffix = path.name.partition(".")
        suffix = suffix.lower()
        if not stem:  # a hidden file, such as the ._name that macOS puts beside every name
            continue
        seen[suffix or "(none)"] += 1
        if suffix in image_keys or suffix in caption_keys:
            members = samples.setdefault((path.parent / stem).as_posix(), _Members())
            if suffix in image_keys:
                members.images[suffix] = (member.offset_data, member.size)
            else:
                content = tar.extractfile(member)
                members.captions[suffix] = content.read() if content else b""
    for kind, keys in (("caption", caption_keys), ("image", image_keys)):
        if seen.keys().isdisjoint(keys):
            found = ", ".join(key for key, _ in seen.most_common(8)) or "no member at all"
            raise ModeclipError(
                f"shard {str(shard)!r} holds no {kind}: expected members ending in"
                f" {' or '.join(keys)}, found {found}; set data.{kind}_keys"
            )
    return samples


def _walk_tar(shard: Path) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Yield the regular members of a tar, and make sure that it was read to its end."""
    with shard.open("rb") as file:
        _refuse_compressed(shard, file)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    # tarfile keeps what it has seen, and a shard may have millions of members.
                    tar.members = []  # type: ignore[attr-defined]
                    if member.isreg():
                        yield tar, member
                # tarfile takes a header that it cannot read, or none, for the end; the true end is a block of zeros.
                file.seek(tar.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError(f"neither a member nor the end mark is at byte {tar.offset}")
        except (tarfile.TarError, EOFError) as error:
            raise ModeclipError(
                f"shard {str(shard)!r} is damaged ({error}): expected a whole tar file;"
                " bring or write it again, or leave it out of data.source"
            ) from error


def _refuse_compressed(shard: Path, file: IO[bytes]) -> None:
    if file.read(6).startswith(COMPRESSED):
        raise ModeclipError(
            f"shard {str(shard)!r} is compressed: expected a plain .tar, whose images can be read"
            " in place; decompress it"
        )
    file.seek(0)
