"""Any source goes in; a catalog of pairs to train on, and one of tasks that are held out, come out.

The source is read twice: once without its images, which finds whatever makes it useless before the first image is
opened, and once decoding every image to its last byte in two threads. A pair that cannot be used is skipped and counted
by cause; too many of them are an error. Rows keep the order of the source, so the same data give the same catalog.
Catalogs are written to hidden folders and renamed when they are whole: one that can be opened is complete, and what a
killed run left is removed by the next.

Price: one read and one decode of each image (docs/cost.md has rates). Memory: what Lance holds back to write whole
pages (8 MiB a column), and 8 to 16 bytes a pair to count the distinct captions.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import warnings
from array import array
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from modeclip.catalog import FINGERPRINT, FORMAT, FORMAT_VERSION, PAIR_COLUMNS, Writer
from modeclip.errors import ModeclipError
from modeclip.files import writing
from modeclip.icons import TRAIN_SETS, list_icons, read_icons
from modeclip.progress import log, progress
from modeclip.samples import (
    DUPLICATE,
    EMPTY,
    NOT_UTF8,
    Sample,
    Skipped,
    cause_of,
    measure_image,
)
from modeclip.sources import DataConfig, detect, read_source, read_task, split_task

CATALOG = "catalog.lance"
TASKS = "tasks.lance"
HOLDOUT = "holdout"

CHECK_THREADS = 2
SAMPLES_PER_CHECK = 32
ROWS_PER_WRITE = 1024
BYTES_PER_WRITE = 1 << 24


@dataclass(frozen=True, kw_only=True)
class IndexResult:
    """What was indexed."""

    kind: str
    """Kind of the source: icons, folder, table or shards."""
    num_samples: int
    """Pairs to train on."""
    num_captions: int
    """Distinct captions among them."""
    tasks: dict[str, tuple[int, int]]
    """Number of classes and of images of each task that is held out."""
    skipped: dict[str, int]
    """Pairs that could not be used, by cause."""


def index(config: DataConfig, out: Path | str) -> IndexResult:
    """Write ``catalog.lance``, and ``tasks.lance`` where pairs are held out, to the folder ``out``.

    Catalogs that are there already are replaced once the new ones are whole.

    Raises:
        ModeclipError: The source cannot be used, too much of it is damaged, or the disk is full.
    """
    out = Path(out)
    kind = detect(config)
    tasks = _task_names(config, kind)
    log(f"{config.source!r} is read as {kind}")
    total = _count(config, kind)
    _remove_leftovers(out)
    skips = _Skips(config, total)
    stream = _read_all(config, kind)
    with (
        writing(out),
        Writer(_partial(out, CATALOG)) as catalog_writer,
        Writer(_partial(out, TASKS)) as task_writer,
        _strict_pillow(),
        progress("index", total, "pairs") as advance,
    ):
        pairs, held = _Rows(catalog_writer), _Rows(task_writer, with_task=True)
        for task, item in _check_all(stream, config.copy_images, kind == "icons"):
            advance(1)
            if isinstance(item, Skipped):
                skips.add(item)
            elif not task and not _is_held_out(item.sample.key, config.holdout_fraction):
                pairs.add(item)
            elif kind != "icons" or not task or item.sample.caption in pairs.captions[""]:
                held.add(item, task or HOLDOUT)
        if not pairs.num_rows[""]:
            raise ModeclipError(
                f"data.source {config.source!r} ({kind}) has no pair to train on;"
                f" {held.num_rows.total()} held out, skipped: {skips}"
            )
        for name in tasks:
            if not held.num_rows[name]:
                where = " whose name is a training caption" if kind == "icons" else ""
                raise ModeclipError(
                    f"task {name!r} of {config.source!r} has no usable image{where}; skipped: {skips};"
                    " correct data.tasks or data.holdout_fraction"
                )
        pairs.commit()
        if held.num_rows:
            held.commit()
        _publish(out)
    return IndexResult(
        kind=kind,
        num_samples=pairs.num_rows[""],
        num_captions=len(pairs.captions[""]),
        tasks={name: (len(held.captions[name]), count) for name, count in held.num_rows.items()},
        skipped=dict(skips.causes),
    )


# ---------------------------------------------------------------- what is read


def _task_names(config: DataConfig, kind: str) -> list[str]:
    """Return the names of the tasks that were asked for, after looking that they make sense."""
    if config.holdout_fraction:
        return [HOLDOUT]
    if kind != "icons":
        names = [split_task(task)[0] for task in config.tasks]
    else:
        names = list(config.tasks)
        both = [name for name in names if name in (config.train_sets or TRAIN_SETS)]
        if both:
            raise ModeclipError(
                f"icon set {both[0]!r} is in data.tasks and trained on: a task is held out;"
                " take it out of data.tasks or data.train_sets"
            )
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ModeclipError(f"data.tasks has {repeated[0]!r} twice: give one of them NAME=FOLDER")
    return names


def _count(config: DataConfig, kind: str) -> int:
    """Return the number of pairs; whatever makes the source useless is raised here."""
    if kind == "icons":
        sets = (*(config.train_sets or TRAIN_SETS), *config.tasks)
        return sum(len(list_icons(name)) for name in sets)
    return sum(1 for _ in _read_all(config, kind))


def _read_all(config: DataConfig, kind: str) -> Iterator[tuple[str, Sample | Skipped]]:
    """Yield (task, pair) for all there is: first the pairs of no task, then task by task."""
    if kind == "icons":
        for item in read_icons(config.train_sets or TRAIN_SETS, config.image_size):
            yield "", item
        for task in config.tasks:
            for item in read_icons([task], config.image_size):
                yield task, item
        return
    for item in read_source(config):
        yield "", item
    for task in config.tasks:
        for item in read_task(config, task):
            yield split_task(task)[0], item


def _is_held_out(key: str, fraction: float) -> bool:
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest) < fraction * 2**64


# ---------------------------------------------------------------- what is checked


@dataclass(frozen=True, slots=True)
class _Checked:
    """A sample whose image has been decoded."""

    sample: Sample
    image: bytes | None
    """What the row holds: nothing where it refers to a file."""
    width: int
    height: int
    digest: bytes
    """Hash of the encoded image."""


def _check(sample: Sample, copy_image: bool) -> _Checked | Skipped:
    """Read and decode one image; what fails comes back as the cause."""
    texts = (sample.key, sample.caption, sample.path or "")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        return Skipped(ascii(sample.key), NOT_UTF8, f"{error.reason} in {error.object!a}")
    try:
        data = sample.read()
        if not data:
            return Skipped(sample.key, EMPTY, sample.path or "")
        width, height = measure_image(data)
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
        return Skipped(sample.key, cause_of(error), re.sub(r" ?<_io[^>]*>", "", str(error)))
    held = data if copy_image or sample.path is None else None
    digest = hashlib.blake2b(data, digest_size=16).digest()
    return _Checked(sample, held, width, height, digest)


def _check_all(
    stream: Iterator[tuple[str, Sample | Skipped]], copy_images: bool, in_memory: bool
) -> Iterator[tuple[str, _Checked | Skipped]]:
    """Check a stream in order; images in files by threads, with a bounded number under way.

    Images in memory are small and just made: there threads would only wait for each other.
    """

    def check_item(item: Sample | Skipped) -> _Checked | Skipped:
        return item if isinstance(item, Skipped) else _check(item, copy_images)

    def check_part(part: list[tuple[str, Sample | Skipped]]) -> list[tuple[str, _Checked | Skipped]]:
        return [(task, check_item(item)) for task, item in part]

    if in_memory:
        yield from ((task, check_item(item)) for task, item in stream)
        return
    under_way: deque[Future[list[tuple[str, _Checked | Skipped]]]] = deque()
    with ThreadPoolExecutor(CHECK_THREADS) as pool:
        while part := list(islice(stream, SAMPLES_PER_CHECK)):
            under_way.append(pool.submit(check_part, part))
            if len(under_way) > 2 * CHECK_THREADS:
                yield from under_way.popleft().result()
        while under_way:
            yield from under_way.popleft().result()


@contextmanager
def _strict_pillow() -> Iterator[None]:
    """Make Pillow raise for a decompression bomb and keep silent about metadata it cannot read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


class _Skips:
    """Counts of what was skipped by cause, with the first example of each."""

    def __init__(self, config: DataConfig, total: int) -> None:
        self.causes: Counter[str] = Counter()
        self._first: dict[str, Skipped] = {}
        self._config = config
        self._total = total

    def add(self, skipped: Skipped) -> None:
        """Count one; raise when they are too many. Duplicates are no damage and raise nothing."""
        self.causes[skipped.cause] += 1
        self._first.setdefault(skipped.cause, skipped)
        damaged = self.causes.total() - self.causes[DUPLICATE]
        if damaged > self._config.max_skipped_fraction * self._total:
            raise ModeclipError(
                f"data.source {self._config.source!r}: {damaged:,} of {self._total:,} pairs cannot"
                f" be used, more than data.max_skipped_fraction {self._config.max_skipped_fraction};"
                f" stopped there: {self}; mend the data or raise data.max_skipped_fraction"
            )

    def __str__(self) -> str:
        return (
            "; ".join(
                f"{cause} {count:,} (first: {self._first[cause].key!r}, {' '.join(self._first[cause].detail.split())})"
                for cause, count in self.causes.most_common()
            )
            or "none"
        )


# ---------------------------------------------------------------- what is written


class _Rows:
    """The rows of one catalog in the making, with their fingerprint and what is counted of them."""

    def __init__(self, writer: Writer, with_task: bool = False) -> None:
        self.num_rows: Counter[str] = Counter()
        self.captions: defaultdict[str, _Distinct] = defaultdict(_Distinct)
        self._writer = writer
        names = [name for name in PAIR_COLUMNS if with_task or name != "task"]
        self._schema = pa.schema([(name, PAIR_COLUMNS[name]) for name in names])
        self._hash = hashlib.blake2b(digest_size=16)
        self._waiting: list[dict[str, object]] = []
        self._waiting_bytes = 0

    def add(self, checked: _Checked, task: str = "") -> None:
        """Append a row."""
        sample = checked.sample
        self.num_rows[task] += 1
        self.captions[task].add(sample.caption)
        identity = (sample.key, sample.caption, sample.group, task, checked.digest)
        self._hash.update(repr(identity).encode())
        in_row = checked.image is not None
        self._waiting.append(
            {
                "key": sample.key,
                "caption": sample.caption,
                "image": checked.image,
                "path": None if in_row else sample.path,
                "offset": 0 if in_row else sample.offset,
                "size": len(checked.image or b"") if in_row else sample.size,
                "width": checked.width,
                "height": checked.height,
                "group": sample.group,
                "task": task,
            }
        )
        self._waiting_bytes += len(checked.image or b"")
        if len(self._waiting) >= ROWS_PER_WRITE or self._waiting_bytes >= BYTES_PER_WRITE:
            self._write()

    def commit(self) -> None:
        """Write what waits and make the catalog one that opens."""
        self._write()
        self._writer.commit({FORMAT: FORMAT_VERSION, FINGERPRINT: self._hash.hexdigest()})

    def _write(self) -> None:
        if self._waiting:
            self._writer.write(pa.Table.from_pylist(self._waiting, schema=self._schema))
            self._waiting, self._waiting_bytes = [], 0


class _Distinct:
    """A set of texts that keeps 8 to 16 bytes of hash a text.

    The chance that a billion texts are counted one short is 3 % (n² / 2^65).

    Hashes lie in 256 parts by their last byte, each sorted, so that only one at a time is sorted anew.
    """

    def __init__(self) -> None:
        self._sorted = [np.empty(0, np.uint64) for _ in range(256)]
        self._new = [array("Q") for _ in range(256)]

    def add(self, text: str) -> None:
        """Put a text in."""
        value = self._hash(text)
        new = self._new[value % 256]
        new.append(value)
        if len(new) > len(self._sorted[value % 256]) + 256:
            self._merge(value % 256)

    def __len__(self) -> int:
        return sum(len(self._merge(part)) for part in range(256))

    def __contains__(self, text: str) -> bool:
        value = self._hash(text)
        values = self._merge(value % 256)
        position = int(np.searchsorted(values, np.uint64(value)))
        return position < len(values) and int(values[position]) == value

    def _merge(self, part: int) -> np.ndarray:
        if self._new[part]:
            new = np.frombuffer(self._new[part], np.uint64)
            self._sorted[part] = np.unique(np.concatenate([self._sorted[part], new]))
            self._new[part] = array("Q")
        return self._sorted[part]

    @staticmethod
    def _hash(text: str) -> int:
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _partial(out: Path, name: str) -> Path:
    return out / f".{name}.partial"


def _replaced(out: Path, name: str) -> Path:
    return out / f".{name}.replaced"


def _remove_leftovers(out: Path) -> None:
    for name in (CATALOG, TASKS):
        shutil.rmtree(_partial(out, name), ignore_errors=True)
        shutil.rmtree(_replaced(out, name), ignore_errors=True)


def _publish(out: Path) -> None:
    """Put the new catalogs in the place of the old ones; that of the pairs goes first and comes last."""
    for name in (CATALOG, TASKS):
        if (out / name).exists():
            (out / name).rename(_replaced(out, name))
    for name in (TASKS, CATALOG):
        if _partial(out, name).joinpath("_versions").exists():
            _partial(out, name).rename(out / name)
    _remove_leftovers(out)
