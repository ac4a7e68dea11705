"""Tasks in CLIP_benchmark's webdataset layout, in which many test sets are published.

Its converter writes a folder with::

    classnames.txt                          a class name per line
    zeroshot_classification_templates.txt   a prompt per line, with {c} for the class name
    dataset_type.txt                        retrieval or multilabel; without it, classification
    test/nshards.txt                        number of shards
    test/0.tar ...                          images with .cls (number), .npy (0 or 1 for each class) or .txt (captions)

Our differences: the members of a sample may lie anywhere in a shard, damaged or missing members are an error, blank
captions are left out, and transparent images are put on white.

Price: the headers and labels of all shards are read; no image is opened.
"""

from __future__ import annotations

import io
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np

from modeclip.data.sources.shards import CompressedTar, DamagedTar, Tar, dotted_starts, split_known
from modeclip.data.tasks.images import FileImages
from modeclip.data.tasks.layouts import CLASSNAMES, Found, beside, read_lines, read_templates
from modeclip.data.tasks.task import Task
from modeclip.errors import ModeclipError, unknown
from modeclip.system.console import progress
from modeclip.system.paths import expand, join, other_spelling, state

TYPE, NUM_SHARDS = "dataset_type.txt", "nshards.txt"
IMAGE_SUFFIXES = ("webp", "png", "jpg", "jpeg")
"""Suffixes of images. If a sample has several images, the first of these is taken, as in CLIP_benchmark."""
LABEL_SUFFIXES = {"classification": "cls", "multilabel": "npy", "retrieval": "txt"}
MANY_SHARDS = 4
"""Number of shards from which on reading them shows a progress bar."""


@dataclass(slots=True)
class _Member:
    """What a shard holds of one sample."""

    image: tuple[int, str, int, int] | None = None
    """Position of its suffix in `IMAGE_SUFFIXES`, shard, byte offset, number of bytes."""
    label: bytes | None = None
    """Stored bytes of its label or captions."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Split:
    """The samples of one split, in order."""

    images: FileImages
    """The images."""
    labels: list[bytes]
    """Stored bytes of each image's label or captions."""


def has_shards(folder: str) -> bool:
    """Tell whether a folder is a split of this layout."""
    return beside(folder, NUM_SHARDS) is not None or beside(folder, "0.tar") is not None


def read_webdataset(name: str, root: str, folder: str) -> Found:
    """Read the task of one split.

    Args:
        name: Name of the task.
        root: Folder of the text files.
        folder: Folder of the shards.

    Raises:
        ModeclipError: A file is missing or damaged, or labels and class names do not fit together.
    """
    kind = (read_lines(root, TYPE) or ("classification",))[0].lower()
    if kind not in LABEL_SUFFIXES:
        raise unknown(f"type in {join(root, TYPE)!r}", kind, LABEL_SUFFIXES)
    split = _read_split(name, folder, LABEL_SUFFIXES[kind])
    if kind == "retrieval":
        texts, owners = _captions(name, split)
        return Found(
            task=Task(
                name=name, kind="retrieval", images=split.images, texts=texts, image_of_text=owners, source=folder
            ),
            named=True,
        )
    classnames = read_lines(root, CLASSNAMES)
    parse = _numbers if kind == "classification" else _vectors
    labels = parse(name, split)
    named = classnames is not None
    if classnames is None:
        count = int(labels.max()) + 1 if labels.ndim == 1 else labels.shape[1]
        classnames = tuple(map(str, range(count)))
    if labels.ndim == 2 and labels.shape[1] != len(classnames):
        raise ModeclipError(
            f"task {name!r}: labels have {labels.shape[1]:,} numbers, but {join(root, CLASSNAMES)!r} has"
            f" {len(classnames):,} lines"
        )
    task = Task(
        name=name,
        kind="classification",
        images=split.images,
        classnames=classnames,
        labels=labels,
        metric="acc1" if labels.ndim == 1 else "mean_average_precision",
        source=folder,
        **read_templates(root, classnames),
    )
    return Found(task=task, named=named, numbered=not named)


def _read_split(name: str, folder: str, label_suffix: str) -> _Split:
    """Find the images and read the labels of all shards of a split."""
    lines = read_lines(folder, NUM_SHARDS)
    if lines is None or not lines[0].isdecimal() or int(lines[0]) < 1:
        got = "is missing" if lines is None else f"says {lines[0]!r}"
        raise ModeclipError(f"task {name!r}: {join(folder, NUM_SHARDS)!r} {got}: expected the number of shards")
    shards = [other_spelling(path) or path for path in expand(join(folder, f"{{0..{int(lines[0]) - 1}}}.tar"))]
    if missing := [shard for shard in shards if not state(shard)]:
        raise ModeclipError(
            f"task {name!r}: {missing[0]!r} is missing ({len(missing):,} of {len(shards):,} shards): download it again,"
            f" or correct {NUM_SHARDS}"
        )
    found: list[tuple[str, _Member]] = []
    seen = set[str]()
    bar = progress(f"read {name}", len(shards), "shards") if len(shards) >= MANY_SHARDS else nullcontext()
    with bar as advance:
        for number, shard in enumerate(shards):
            members = _read_shard(name, shard, label_suffix)
            found += [(f"{number}/{key}" if key in seen else key, member) for key, member in members.items()]
            seen.update(members)
            if advance is not None:
                advance(1)
    if not found:
        raise ModeclipError(f"task {name!r}: the shards in {folder!r} hold no sample")
    places = [member.image or (0, "", 0, 0) for _, member in found]
    images = FileImages(
        task=name,
        names=[key for key, _ in found],
        paths=[path for _, path, _, _ in places],
        offsets=np.array([offset for _, _, offset, _ in places], np.int64),
        sizes=np.array([size for *_, size in places], np.int64),
    )
    return _Split(images=images, labels=[member.label or b"" for _, member in found])


def _read_shard(name: str, shard: str, label_suffix: str) -> dict[str, _Member]:
    members: dict[str, _Member] = {}
    try:
        tar = Tar(shard)
        for name_of_member, offset, size, cause in tar.members():
            key, suffix = split_known(name_of_member, IMAGE_SUFFIXES, [label_suffix])
            if not suffix:
                continue
            if cause and (suffix in IMAGE_SUFFIXES or suffix == label_suffix):
                raise ModeclipError(f"task {name!r}: {name_of_member!r} in {shard!r}: {cause}; pack it again")
            member = members.setdefault(key, _Member())
            if suffix in IMAGE_SUFFIXES:
                place = IMAGE_SUFFIXES.index(suffix)
                if member.image is not None and member.image[0] == place:
                    raise ModeclipError(f"task {name!r}: {shard!r} has {key}.{suffix} twice: rename one of them")
                if member.image is None or place < member.image[0]:
                    member.image = (place, shard, offset, size)
            elif suffix == label_suffix:
                if member.label is not None:
                    raise ModeclipError(f"task {name!r}: {shard!r} has {key}.{suffix} twice: rename one of them")
                member.label = tar.read(offset, size)
    except (DamagedTar, CompressedTar, OSError) as error:
        raise ModeclipError(f"task {name!r}: shard {shard!r} cannot be read: {error}; download it again") from error
    for key, member in list(members.items()):
        if any(start in members for start in dotted_starts(key)) and None in (member.image, member.label):
            del members[key]  # such as 1.seg.png beside 1.png
            continue
        for part, suffixes in ((member.image, IMAGE_SUFFIXES), (member.label, (label_suffix,))):
            if part is None:
                raise ModeclipError(
                    f"task {name!r}: sample {key!r} of {shard!r} has no .{' or .'.join(suffixes)}: add it or remove"
                    " the sample"
                )
    return members


def _numbers(name: str, split: _Split) -> np.ndarray:
    labels = []
    for key, data in zip(split.images.names, split.labels, strict=True):
        try:
            labels.append(int(data))
        except ValueError:
            raise ModeclipError(f"task {name!r}: label of {key!r} is {data[:20]!r}, expected a number") from None
    return np.array(labels, np.int64)


def _vectors(name: str, split: _Split) -> np.ndarray:
    rows: list[np.ndarray] = []
    for key, data in zip(split.images.names, split.labels, strict=True):
        try:
            row = np.load(io.BytesIO(data), allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise ModeclipError(f"task {name!r}: label of {key!r} is not a .npy array: {error}") from error
        if row.ndim != 1 or not np.isin(row, (0, 1)).all() or (rows and len(row) != len(rows[0])):
            raise ModeclipError(
                f"task {name!r}: label of {key!r} has shape {row.shape}, expected"
                f" {f'{len(rows[0])} numbers' if rows else 'one axis'}, all 0 or 1"
            )
        rows.append(row.astype(bool))
    return np.stack(rows)


def _captions(name: str, split: _Split) -> tuple[tuple[str, ...], np.ndarray]:
    texts: list[str] = []
    owners: list[int] = []
    for number, data in enumerate(split.labels):
        try:
            own = [line.strip() for line in data.decode().split("\n") if line.strip()]
        except UnicodeDecodeError as error:
            raise ModeclipError(
                f"task {name!r}: captions of {split.images.names[number]!r} are not UTF-8 ({error.reason})"
            ) from error
        if not own:
            raise ModeclipError(
                f"task {name!r}: image {split.images.names[number]!r} has no caption: give it one or remove it"
            )
        texts += own
        owners += [number] * len(own)
    return tuple(texts), np.array(owners, np.int64)
