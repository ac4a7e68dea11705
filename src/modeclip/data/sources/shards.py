"""Names of tar shards go in; samples come out that refer to byte ranges of those shards.

Nothing is unpacked or copied: a shard's index is read with the captions in it, and each image is named by offset and
size. Conventions are webdataset's and open_clip's: members with the same name up to the first dot are one sample, names
expand braces and are joined by ``::``. Beside that, the Parquet file that img2dataset leaves next to each shard gives
further columns, and MetaCLIP's json members give a pair for each of their texts. Difference: members of one sample need
not be neighbours.

Shards that are missing, compressed or damaged are skipped with their cause after what can be read of them; none that
can be read, or keys that the first readable one does not have, are an error.

Price: ``modeclip.data.sources.tars`` for the index, and Python objects for each pair; memory is one shard's index.
"""

from __future__ import annotations

import json
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
    samples_of,
)
from modeclip.data.sources.columns import DamagedTable, read_sidecar, sidecar_columns
from modeclip.data.sources.options import DataConfig, Source, Unit, count, describe, split_keys
from modeclip.data.sources.tars import CompressedTar, DamagedTar, Tar
from modeclip.errors import ModeclipError
from modeclip.system.paths import expand, folders_below, is_folder, join, list_folder, states
from modeclip.system.paths import state as state_of

MEMBERS_LOOKED_AT = 32
"""So many members without a json file among them show that there is none."""


@dataclass(slots=True)
class _Pair:
    """What a shard holds of one sample: the best image and caption so far, each with its place in the list of keys."""

    image: tuple[int, int, int] | None = None
    """Place of its suffix, offset, size."""
    caption: tuple[int, bytes] | None = None
    """Place of its suffix, contents."""


def list_shards(source: str) -> list[str]:
    """Return the shard files that a source names, in its order (a folder's sorted by name)."""
    if "::" not in source and is_folder(source):
        (folder,) = expand(source)
        return [join(folder, name) for name in list_folder(folder)[1] if name.endswith(".tar")]
    return expand(source)


def open_shards(config: DataConfig) -> Source:
    """List shards, and look into the first that is whole to see what kind they are.

    Raises:
        ModeclipError: None can be read, or it has no member with the keys that are looked for.
    """
    shards = list_shards(config.source)
    found = states(shards)
    if not any(found):
        raise ModeclipError(
            f"data.source {config.source!r}: none of {count(len(shards), 'shard')} exists"
            f" (first: {shards[0] if shards else 'none named'}); correct the names"
        )
    present = [shard for shard, state in zip(shards, found, strict=True) if state]
    kind, extra = _look_into(present, config), pa.schema([])
    if kind == "shards" and state_of(_sidecar(present[0])):
        kind, extra = "img2dataset", sidecar_columns(_sidecar(present[0]))
    groups = folders_below(shards)
    units = tuple(
        Unit(name=shard, state=state, read=partial(read_shard, shard, group, config, extra))
        for shard, state, group in zip(shards, found, groups, strict=True)
    )
    name = {"shards": "webdataset shard", "metaclip": "MetaCLIP shard"}.get(kind, "img2dataset shard")
    missing = f" ({len(shards) - len(present):,} missing)" if len(present) < len(shards) else ""
    return Source(kind=kind, units=units, extra=extra, what=describe(count(len(shards), name) + missing, extra))


def read_shard(shard: str, group: str, config: DataConfig, extra: pa.Schema) -> Iterator[Sample | Skipped]:
    """Yield the samples of one shard in the order of their first members; where it breaks off, last of all the cause.

    Args:
        shard: Path or address of the shard.
        group: Begins the keys of its samples.
        config: Suffixes of images and captions, and how captions are read.
        extra: Columns to take from the Parquet file beside it, if any.
    """
    image_keys, caption_keys = split_keys(config.image_keys), split_keys(config.caption_keys)
    rule, pairs, problem = config.caption_rule, dict[str, _Pair](), None
    try:
        _scan(Tar(shard), image_keys, caption_keys, pairs)
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
    for name, pair in pairs.items():
        key = f"{group}/{name}"
        if pair.image is None:
            yield Skipped(key, NO_IMAGE, f"{shard} has no {name}.{'/'.join(image_keys)}")
        elif pair.caption is None:
            yield Skipped(key, NO_CAPTION, f"{shard} has no {name}.{'/'.join(caption_keys)}")
        else:
            captions = rule.read(pair.caption[1], caption_keys[pair.caption[0]], key)
            if isinstance(captions, Skipped):
                yield captions
            else:
                _, offset, size = pair.image
                more = columns.get(name.rpartition("/")[2], {}) if columns else {}
                yield from samples_of(captions, key, path=shard, offset=offset, size=size, group=group, extra=more)
    if problem is not None:
        yield problem


def _scan(tar: Tar, image_keys: tuple[str, ...], caption_keys: tuple[str, ...], pairs: dict[str, _Pair]) -> None:
    """Put what a shard holds into ``pairs``, by name without suffix."""
    images = {key: place for place, key in enumerate(image_keys)}
    captions = {key: place for place, key in enumerate(caption_keys)}
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
    """Split a member's name at the first dot of its last part; the suffix in lower case, "" for hidden files.

    Examples:
        >>> split_name("./a.b/0001.Input.JPG"), split_name("a/._0001.jpg")
        (('a.b/0001', 'input.jpg'), ('a/', ''))
    """
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower() if stem else ""  # ._name is what macOS puts beside every name


def _look_into(shards: list[str], config: DataConfig) -> str:
    """Return "metaclip" or "shards" by the first members of the first shard that has any and is whole so far."""
    images, captions = split_keys(config.image_keys), split_keys(config.caption_keys)
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
                    kind = _kind_of(tar.read(offset, size), config.caption_field)
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
    raise ModeclipError(f"data.source {config.source!r}: none of {count(len(shards), 'shard')} can be read ({reason})")


def _kind_of(data: bytes, field: str) -> str:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return "shards"
    is_metaclip = isinstance(fields, dict) and isinstance(fields.get("texts"), list) and field not in fields
    return "metaclip" if is_metaclip else "shards"


def _sidecar(shard: str) -> str:
    return f"{shard.removesuffix('.tar')}.parquet"
