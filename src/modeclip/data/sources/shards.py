"""Tar shards of pairs, as webdataset, img2dataset and MetaCLIP write them.

Nothing is unpacked or copied: a shard's index is read together with the captions in it, and each image is named by its
offset and size. The conventions are those of webdataset and open_clip: members that have the same name without suffix
are one sample, names expand braces and are joined by ``::``. In addition, the Parquet file that img2dataset leaves next
to each shard gives further columns, and MetaCLIP's JSON members give a pair for each of their texts. Unlike in
webdataset, the members of a sample need not be neighbours, and a name may have dots: webdataset takes ``a.b.jpg`` for
the part ``b.jpg`` of ``a``. Here it is the image of ``a.b``, and if that has no caption, a further member of ``a``.

Every member is a part of a pair, or lies beside one with another suffix, or is counted by its cause. Where a name comes
twice, the later member counts, as when the tar is unpacked.

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
import posixpath
import re
import tarfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa

from modeclip.data.samples import (
    BROKEN_LINK,
    COMPRESSED_SHARD,
    DAMAGED_SHARD,
    DAMAGED_SIDECAR,
    FURTHER_IMAGE,
    FURTHER_MEMBER,
    MISSING_SHARD,
    NO_CAPTION,
    NO_IMAGE,
    NO_SIDECAR,
    NOT_A_FILE,
    OTHER_MEMBER,
    REPLACED,
    SPARSE,
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
from modeclip.data.sources.tables import DamagedTable, read_sidecar, sidecar_columns, sidecar_size
from modeclip.errors import ModeclipError
from modeclip.system.paths import (
    expand,
    file_size,
    folders_below,
    home,
    is_folder,
    is_url,
    join,
    list_folder,
    other_spelling,
    parent,
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
HARD_LINK, SYMBOLIC_LINK, FOLDER, GNU_SPARSE = b"1", b"2", b"5", b"S"
DEVICES, WITHOUT_DATA = b"346", b"123456"
PAX = b"xX"
"""Kinds of headers that describe the next member: PAX, and Sun's."""
GNU_LONG = {b"L": "path", b"K": "linkpath"}
EXTENSIONS = b"xXgLKVMDN"
"""Kinds of entries that are no members: those above, global headers, and GNU tar's for volumes and listings."""
MAX_EXTENSION = 1 << 20
"""Bytes of a header with a long name."""
MAX_ZEROS = 1 << 20
"""Bytes of zeros at the end of a tar; GNU tar writes 10,240, and few people ask it for more."""
ADLER = 65521


class Found(NamedTuple):
    """An image or a caption in a shard."""

    place: int
    """Place of its suffix among those that are looked for."""
    name: str
    """Name of the member."""
    offset: int
    size: int
    text: bytes | None
    """Contents of a caption; None for an image."""
    run: int
    """Number of the run of neighbours with the same key."""
    cause: str
    """Why the member cannot be read; "" if it can."""


@dataclass(frozen=True, slots=True)
class Pair:
    """The image and the caption of one sample, as far as they are there."""

    image: Found | None
    caption: Found | None
    num_replaced: int
    """Images, or captions if there are more of them, whose place a later member of the same sample took."""
    num_further: int
    """Images of other formats beside the one that is taken."""


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
    if kind == "shards" and (sidecar := next((path for path in map(_sidecar, present) if state_of(path)), None)):
        kind, extra = "img2dataset", sidecar_columns(sidecar)
        lonely = _without_shard(config, shards)
        shards, found = [*shards, *lonely], [*found, *[""] * len(lonely)]
    parts = tuple(
        SourcePart(
            name=shard,
            state=state,
            read=partial(read_shard, shard, group, options, extra),
            num_samples=partial(known_size, shard),
        )
        for shard, state, group in zip(shards, found, folders_below(shards), strict=True)
    )
    name = {"shards": "webdataset shard", "metaclip": "MetaCLIP shard"}.get(kind, "img2dataset shard")
    missing = f" ({len(shards) - len(present):,} missing)" if len(present) < len(shards) else ""
    what = describe(count(len(shards), name) + missing, extra)
    return DataSource(kind=kind, parts=parts, extra=extra, what=what)


def _without_shard(config: SourceConfig, shards: list[str]) -> list[str]:
    """Return the shards of a folder that are not there, though their Parquet files are."""
    if "::" in config.source or not is_folder(home(config.source)):
        return []
    (folder,) = expand(config.source)
    names = [name[: -len(".parquet")] for name in list_folder(folder)[1] if name.lower().endswith(".parquet")]
    known = {shard.lower() for shard in shards}
    return [path for name in names if (path := join(folder, f"{name}.tar")).lower() not in known]


def known_size(shard: str) -> int | None:
    """Return how many samples a shard should hold: by open_clip's ``sizes.json`` or img2dataset's files beside it."""
    stem = shard[:-4] if shard.lower().endswith(".tar") else shard
    for path, entry in (
        (join(parent(shard), "sizes.json"), shard.rpartition("/")[2]),
        (f"{stem}_stats.json", "successes"),
    ):
        try:
            number = json.loads(read_bytes(path))[entry]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        if isinstance(number, int) and number >= 0:
            return number
    return sidecar_size(_sidecar(shard))


def read_shard(shard: str, group: str, options: FileOptions, extra: pa.Schema) -> Iterator[Sample | Skipped]:
    """Yield the samples of one shard in the order of their first members; if it is damaged, the cause comes last.

    Args:
        shard: Path or address of the shard.
        group: Prefix of the keys of its samples.
        options: Suffixes of images and captions, and how captions are read.
        extra: Columns to take from the Parquet file beside it, if any.
    """
    members, problem = Members(options.image_suffixes, options.caption_suffixes), None
    try:
        members.read(Tar(shard))
    except (FileNotFoundError, NotADirectoryError):
        yield Skipped(shard, MISSING_SHARD, "no such file")
        return
    except (DamagedTar, OSError) as error:
        problem = Skipped(shard, DAMAGED_SHARD, str(error))
        members.drop_last_if_unfinished()
    except CompressedTar:
        yield Skipped(shard, COMPRESSED_SHARD, "its images cannot be read in place: decompress it")
        return
    try:
        columns = read_sidecar(_sidecar(shard), extra) if len(extra) else {}
        if len(extra) and not columns and not state_of(_sidecar(shard)):
            yield Skipped(_sidecar(shard), NO_SIDECAR, "its pairs have none of the further columns")
    except DamagedTable as error:
        columns = {}
        yield Skipped(_sidecar(shard), DAMAGED_SIDECAR, str(error))
    pairs = members.pairs()
    num_called = Counter(name.rpartition("/")[2] for name in pairs) if columns else Counter[str]()
    for name, pair in pairs.items():
        key = f"{group}/{name}"
        image, caption = pair.image, pair.caption
        for _ in range(pair.num_replaced):
            yield Skipped(key, REPLACED, f"{shard} has a later one")
        for _ in range(pair.num_further):
            yield Skipped(
                key, FURTHER_IMAGE, f"{shard} has several images of {name}; the first of data.image_keys counts"
            )
        broken = next((found for found in (image, caption) if found is not None and found.cause), None)
        if broken is not None:
            yield Skipped(key, broken.cause, f"{broken.name} in {shard}")
        elif image is None or caption is None:
            owner = next((start for start in dotted_starts(name) if start in pairs and pairs[start].image), None)
            found, suffixes, cause = (
                (caption, options.image_suffixes, NO_IMAGE)
                if image is None
                else (image, options.caption_suffixes, NO_CAPTION)
            )
            if owner is not None and found is not None:
                yield Skipped(key, FURTHER_MEMBER, f"{found.name} in {shard} is taken for a part of {owner}")
            else:
                yield Skipped(key, cause, f"{shard} has no {name}.{'/'.join(suffixes)}")
        else:
            text = caption.text if caption.text is not None else b""
            captions = options.read_captions(text, options.caption_suffixes[caption.place], key)
            if isinstance(captions, Skipped):
                yield captions
            else:
                short = name.rpartition("/")[2]
                more = columns.get(name) or (columns.get(short, {}) if num_called[short] == 1 else {})
                where: dict[str, Any] = {"path": shard, "offset": image.offset, "size": image.size}
                yield from samples_of(captions, key, group=group, extra=more, **where)
    yield from members.others(shard, group)
    if problem is not None:
        yield problem


class Members:
    """The members of a shard by their keys, and which of them belong together.

    A key is a member's name without the longest suffix that is looked for, so ``a.b.jpg`` and ``a.b.txt`` are the
    sample ``a.b``, and never a part of ``a``. As when a tar is unpacked, the last member of a name counts. Where a key
    comes more than once, an image is never taken from one sample and the caption from another: members that follow each
    other and are whole together stay together.
    """

    def __init__(self, images: Sequence[str], captions: Sequence[str]) -> None:
        self._images = {suffix: place for place, suffix in enumerate(images)}
        self._captions = {suffix: place for place, suffix in enumerate(captions)}
        self._found: dict[str, list[Found]] = {}
        self._others: dict[str, list[tuple[str, str]]] = {}
        self._last, self._run = "", 0

    def read(self, tar: Tar) -> None:
        """Take all members of a tar; errors are those of ``Tar.members``."""
        for member in tar.members():
            self.add(member, tar)

    def add(self, member: Member, tar: Tar) -> str:
        """Take one member, and return its key."""
        key, suffix = split_known(member.name, self._images, self._captions)
        place = self._images.get(suffix)
        is_image = place is not None
        if place is None:
            place = self._captions.get(suffix)
        if key != self._last:
            self._last, self._run = key, self._run + 1
        if place is None or member.cause == REPLACED:
            if suffix:
                self._others.setdefault(key, []).append((member.name, member.cause))
            return key
        text = None if is_image else b"" if member.cause else tar.read(member.offset, member.size)
        found = Found(place, member.name, member.offset, member.size, text, self._run, member.cause)
        self._found.setdefault(key, []).append(found)
        return key

    def drop_last_if_unfinished(self) -> None:
        """Forget the last key if the tar broke off before its image or its caption."""
        found = self._found.get(self._last, [])
        if len({each.text is None for each in found}) == 1:
            del self._found[self._last]

    def pairs(self) -> dict[str, Pair]:
        """Return what belongs together, in the order of the first members."""
        return {key: _choose(found) for key, found in self._found.items()}

    def others(self, shard: str, group: str) -> Iterator[Skipped]:
        """Yield the members that are neither image nor caption and lie beside none of the same key."""
        for key, members in self._others.items():
            is_beside = any(start in self._found for start in (key, *dotted_starts(key)))
            for name, cause in members:
                if cause == REPLACED or not is_beside:
                    yield Skipped(f"{group}/{key}", cause or OTHER_MEMBER, f"{name} in {shard}")


def _choose(found: list[Found]) -> Pair:
    """Return the image and the caption of one key.

    A run that has both is a sample. Later members replace it if they have its names, as an update of the tar does. If
    no run has both, the members lie apart, sorted by suffix, and the last one of a name counts.
    """
    images, captions = [each for each in found if each.text is None], [each for each in found if each.text is not None]
    if len(images) <= 1 and len(captions) <= 1:
        return Pair(next(iter(images), None), next(iter(captions), None), 0, 0)
    runs, unsure = _runs(found)
    whole = max((n for n, run in enumerate(runs) if len({each.text is None for each in run}) == 2), default=-1)
    base = runs[whole] if whole >= 0 else []
    later = [each for run in runs[whole + 1 :] for each in run]
    names = [each.name for each in base or later]
    is_updated = any(each.name in names for each in later) if base else len(set(names)) < len(names)

    def pick(candidates: list[Found]) -> Found | None:
        own = [each for each in base if each in candidates]
        new = [each for each in later if each in candidates]
        if is_updated and new:
            return new[-1]
        return min(own or new, key=lambda each: (each in unsure, each.place), default=None)

    image, caption = pick(images), pick(captions)
    last = {each.name: each for each in found}
    gone = [
        sum(each is not last[each.name] and each is not chosen for each in some)
        + sum(each is last[each.name] and each not in base + later for each in some)
        for some, chosen in ((images, image), (captions, caption))
    ]
    further = sum(each is last[each.name] and each is not image and each in base + later for each in images)
    return Pair(image, caption, max(gone), further)


def _runs(found: list[Found]) -> tuple[list[list[Found]], list[Found]]:
    """Cut the members of one key where others come between, and before one of a name that was there already.

    In the second case all members that follow the first image and caption belong to the later sample. Those before the
    name that comes again may be of the earlier one: they are returned too, and count only where the later has no other.
    """
    runs: list[list[Found]] = []
    unsure: list[Found] = []
    for each in found:
        run = runs[-1] if runs and runs[-1][-1].run == each.run else None
        if run is None:
            runs.append([each])
        elif all(each.name != known.name for known in run):
            run.append(each)
        else:
            kinds = [known.text is None for known in run]
            end = max(kinds.index(True), kinds.index(False)) + 1 if len(set(kinds)) == 2 else len(run)
            rest = run[end:]
            del run[end:]
            if any(each.name == known.name for known in rest):
                runs += [rest, [each]]
            else:
                runs.append([*rest, each])
                unsure += rest
    return runs, unsure


def split_known(name: str, *known: Collection[str]) -> tuple[str, str]:
    """Split a member's name before the longest suffix that is known, or else at the first dot of its last part.

    Args:
        name: Name of a member.
        known: Suffixes, in lower case.

    Returns:
        The name without the suffix, and the suffix in lower case; "" for hidden files and for files without a suffix.

    Examples:
        >>> split_known("d.e/v1.2.JPG", ["jpg"]), split_known("1.seg.png", ["seg.png", "png"])
        (('d.e/v1.2', 'jpg'), ('1', 'seg.png'))
        >>> split_known("a.b.npy", ["jpg"]), split_known("a/._0001.jpg", ["jpg"])
        (('a', 'b.npy'), ('a/', ''))
    """
    folder, slash, base = name.rpartition("/")
    stem, _, whole = base.partition(".")
    if not stem:  # ._name is what macOS puts beside every name
        return folder + slash, ""
    suffix = whole = whole.lower()
    while suffix:
        if any(suffix in each for each in known):
            return name[: -len(suffix) - 1], suffix
        suffix = suffix.partition(".")[2]
    return folder + slash + stem, whole or "no suffix"


def dotted_starts(name: str) -> Iterator[str]:
    """Yield the starts of a name before each dot of its last part, the shortest first."""
    folder, slash, base = name.rpartition("/")
    parts = base.split(".")
    for length in range(1, len(parts)):
        yield folder + slash + ".".join(parts[:length])


def split_name(name: str) -> tuple[str, str]:
    """Split a member's name at the first dot of its last part; the suffix is in lower case, "" for hidden files.

    Examples:
        >>> split_name("./a.b/0001.Input.JPG"), split_name("a/._0001.jpg")
        (('a.b/0001', 'input.jpg'), ('a/', ''))
    """
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower() if stem else ""


def _look_into(shards: list[str], source: str, options: FileOptions) -> str:
    """Return "metaclip" or "shards", judged by the first members of the first readable shard that has any."""
    images, captions = options.image_suffixes, options.caption_suffixes
    problem: Exception | None = None
    for shard in shards:
        seen: Counter[str] = Counter()
        halves: defaultdict[str, set[bool]] = defaultdict(set)
        kind, is_whole = "", False
        try:
            tar = Tar(shard)
            for member in tar.members():
                suffix = split_name(member.name)[1]
                seen[suffix] += bool(suffix)
                key, known = split_known(member.name, images, captions)
                if known in images or known in captions:
                    halves[key].add(known in images)
                    is_whole = is_whole or len(halves[key]) == 2
                if known.rpartition(".")[2] == "json" and known in captions and not kind and not member.cause:
                    kind = _kind_of(tar.read(member.offset, member.size), options.caption_field)
                if is_whole and (kind or sum(seen.values()) > MEMBERS_LOOKED_AT):
                    break
        except (DamagedTar, CompressedTar, OSError) as error:
            if not is_whole:
                problem = error
                continue
        for noun, keys in () if is_whole else (("caption", captions), ("image", images)):
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


class Member(NamedTuple):
    """A file in a tar; of a link, the file that it leads to."""

    name: str
    """Its path, without ``./`` at its start."""
    offset: int = 0
    size: int = 0
    cause: str = ""
    """Why it cannot be read; "" if it can."""


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

    def members(self) -> Iterator[Member]:
        """Yield the files in the tar: regular ones and hard links in their order, and then symbolic links.

        What stands behind the end mark is read too, where tars were joined. Folders are left out.

        Raises:
            DamagedTar: The tar cannot be read to its end mark. The members before the damage have been yielded.
        """
        known: dict[str, Member] = {}
        links: dict[str, str] = {}
        waiting: list[tuple[str, str]] = []
        problem: Exception | None = None
        try:
            for kind, member, linked in self._entries():
                name, target = member.name, _plain(linked)
                if kind == HARD_LINK and target in known:
                    member = known[target]._replace(name=name)
                elif kind == HARD_LINK and target not in links:
                    member = Member(name, cause=BROKEN_LINK)
                elif kind in (HARD_LINK, SYMBOLIC_LINK):
                    inside = "" if linked.startswith("/") else _plain(f"{parent(name)}/{target}")
                    links[name] = links[target] if kind == HARD_LINK else inside
                    waiting.append((name, links[name]))
                    known.pop(name, None)
                    continue
                known[name] = member
                yield member
        except (DamagedTar, OSError) as error:
            problem = error
        for name, target in waiting:
            seen = {name}
            while target not in known and target in links and target not in seen:
                seen.add(target)
                target = links[target]
            cause = REPLACED if name in known else "" if target in known else BROKEN_LINK
            yield Member(name, cause=cause) if cause else known[target]._replace(name=name)
        if problem is not None:
            raise problem

    def _entries(self) -> Iterator[tuple[bytes, Member, str]]:
        """Yield kind, member and target of a link for every entry that is neither a folder nor an extension."""
        position, extended = 0, dict[str, str]()
        while True:
            header = self.read(position, BLOCK)
            if len(header) < BLOCK:
                raise DamagedTar(f"neither a member nor the end mark is at byte {position:,}")
            if not header[0] and header == bytes(BLOCK):
                following = self._after_end(position)
                if following is None:
                    return
                position, extended = following, {}
                header = self.read(position, BLOCK)
            size = _check_header(header, position)
            kind, start = header[156:157], position + BLOCK
            if kind not in EXTENSIONS:
                size = int(extended.get("size", size))
            if kind == GNU_SPARSE:
                more = header[482]
                while more:
                    more, start = self.read(start, BLOCK)[504:505] not in (b"", b"\0"), start + BLOCK
            position = start if kind in WITHOUT_DATA else start + (size + BLOCK - 1) // BLOCK * BLOCK
            if start + size > self.size and kind not in WITHOUT_DATA:
                raise DamagedTar(f"it ends at byte {self.size:,}, inside a member of {size:,} bytes")
            if kind in EXTENSIONS:
                if size > MAX_EXTENSION:
                    raise DamagedTar(f"the extended header before byte {start:,} has {size:,} bytes")
                if kind in PAX:
                    extended |= _parse_pax(self.read(start, size), position)
                elif kind in GNU_LONG:
                    extended[GNU_LONG[kind]] = _text(self.read(start, size))
                continue
            name = extended.get("path") or _name_of(header)
            target = extended.get("linkpath") or _text(header[157:257])
            is_sparse, extended = "sparse" in extended or kind == GNU_SPARSE, {}
            if kind == FOLDER or name.endswith("/"):  # in the oldest tars a folder is known by that alone
                continue
            name = _plain(name)
            if kind in DEVICES:
                yield kind, Member(name, cause=NOT_A_FILE), ""
            elif is_sparse:
                yield kind, Member(name, cause=SPARSE), ""
            else:
                yield kind, Member(name, start, size), target if kind in (HARD_LINK, SYMBOLIC_LINK) else ""

    def _after_end(self, position: int) -> int | None:
        """Return where the next tar begins behind an end mark, or None if nothing but zeros follows.

        Raises:
            DamagedTar: So many zeros follow that the file was made in its full size, but not written to its end.
        """
        start = position
        while position < self.size:
            some = self.read(position, min(self._read_ahead, self.size - position))
            if not some:
                break
            if rest := some.lstrip(b"\0"):
                return position + (len(some) - len(rest)) // BLOCK * BLOCK
            position += len(some)
        if self.size - start > MAX_ZEROS:
            raise DamagedTar(f"nothing but {self.size - start:,} zeros follow byte {start:,}")
        return None


def _plain(name: str) -> str:
    """Return a path as it is when it is unpacked: without ``./``, ``//`` and ``/`` at its start."""
    if name.startswith((".", "/")) or "/." in name or "//" in name:
        return posixpath.normpath(name.lstrip("/"))
    return name


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
    """Return path, target, size and a mark of sparse files from a PAX header, whose records are "length key=value"."""
    found, at = dict[str, str](), 0
    try:
        while at < len(data) and data[at]:
            length = int(data[at : data.index(b" ", at)])
            key, _, value = data[at : at + length - 1].partition(b" ")[2].partition(b"=")
            if key in (b"path", b"size", b"linkpath"):
                found[key.decode()] = value.decode("utf-8", "surrogateescape")
            elif key.startswith(b"GNU.sparse"):
                found["sparse"] = "yes"
                if key == b"GNU.sparse.name":
                    found["path"] = value.decode("utf-8", "surrogateescape")
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
