"""Indexing: make a catalog of a source's pairs whose images decode, and one of what is held out.

A source consists of parts (shards, table files, folders, icon sets). Each is read once, in order. Finished parts are
noted down, so a killed run continues after them, and a later run reads only the parts, and of folders only the files,
that are new. New rows become visible all at once, when they are all on disk.

Price: one read and one decode of each image (docs/scale.md has rates). Memory: what Lance holds back to write whole
pages (8 MiB per column), and 8 to 16 bytes per pair to count the distinct captions.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, NotRequired

import numpy as np
import pyarrow as pa
from typing_extensions import TypedDict

from modeclip.data.catalog import CATALOG, FINGERPRINT, FORMAT, FORMAT_VERSION, PAIR_COLUMNS, SETTINGS, Catalog
from modeclip.data.holdout import DHASH, HOLDOUT, Sides, hash_samples
from modeclip.data.images import Examined, examine, map_in_order, strict_pillow
from modeclip.data.samples import (
    COMPRESSED_SHARD,
    COPY_OF_TRAINED,
    DAMAGED_SHARD,
    DAMAGED_TABLE,
    HARMLESS,
    MISSING,
    MISSING_SHARD,
    MISSING_TABLE,
    NOT_UTF8,
    Sample,
    Skipped,
)
from modeclip.data.sources import DataConfig, DataSource, SourcePart, open_source, open_task, split_task
from modeclip.data.sources.options import LATER
from modeclip.data.storage import (
    FileWriter,
    Ledger,
    append,
    create,
    exists,
    files_where,
    only_writer,
    remove_dataset,
    remove_files,
    remove_unfinished,
)
from modeclip.errors import ModeclipError
from modeclip.system.console import Advance, log, progress
from modeclip.system.files import to_json, writing
from modeclip.system.paths import form_of, home, join, other_form, other_spelling

TASKS = "tasks.lance"
SOURCES, SKIPPED = "modeclip.sources", "modeclip.skipped"
"""Metadata of a catalog: its parts with their states, and causes with counts."""
PARTS = "modeclip.parts"
"""Metadata of a catalog: a `Reading` for each part, in the order of the rows."""
LOST_PARTS = frozenset({DAMAGED_SHARD, COMPRESSED_SHARD, MISSING_SHARD, DAMAGED_TABLE, MISSING_TABLE})
"""Causes that say of a part that pairs of it are missing."""
HELD_FINGERPRINT = "modeclip.held_fingerprint"
"""Metadata of the tasks: the fingerprint of the rows of `HOLDOUT` alone."""

ROWS_PER_NOTE = 1 << 15
"""Number of rows after which the parts read so far are noted down as finished."""
NOT_SETTINGS = ("source", "tasks", "max_skipped_fraction", "workers", "train_sets", "exclude_sets")
"""Options of the data that may differ from one run to the next on the same catalog."""
CHECK_THREADS = os.cpu_count() or 1
SAMPLES_PER_CHECK = 32
MANY_SKIPPED = 1000
"""Number of skipped pairs after which too high a share of them stops the reading."""
ROWS_PER_WRITE = 1024
BYTES_PER_WRITE = 1 << 24


@dataclass(frozen=True, kw_only=True)
class IndexResult:
    """What a catalog holds after indexing."""

    kind: str
    """Kind of the source, such as folder or shards."""
    num_samples: int
    """All pairs to train on."""
    num_captions: int
    """Distinct captions among them."""
    num_added: int
    """Pairs that this run added."""
    tasks: dict[str, tuple[int, int]]
    """Number of classes and of images of each held-out task."""
    skipped: dict[str, int]
    """Number of pairs that could not be used, by cause, over all runs."""


def index(
    config: DataConfig, out: Path | str, *, replace: bool = False, source: DataSource | None = None
) -> IndexResult:
    """Write ``catalog.lance``, and ``tasks.lance`` where pairs are held out, to the folder ``out``.

    Parts of the source that the catalog already has are skipped; the others are added at its end.

    Args:
        config: The source, and how it is read.
        out: A folder, or an address in an object store.
        replace: Replace what the catalog has by the source, once all of it is on disk.
        source: What ``open_source`` returned for the config, if it was opened before.

    Raises:
        ModeclipError: The source cannot be used, too much of it is damaged, the catalog was made with other settings,
            another process is writing to it, or the disk is full.
    """
    out = home(str(out))
    source = source or open_source(config)
    names = _task_names(config, source)
    tasks = [(split_task(task)[0], open_task(config, task)) for task in config.tasks]
    log(f"{config.source!r}: {source.what}")
    paths = join(out, CATALOG), join(out, TASKS)
    try:
        with writing(out), only_writer(paths[0]), strict_pillow():
            work = _Indexing(config, source, tasks, paths, replace)
            work.read_parts()
            catalog, num_added = work.commit()
            captions = Distinct()
            for batch in catalog.batches(["caption"], 1 << 16):
                captions.add_all(batch["caption"])
            if tasks:
                work.index_tasks(tasks, captions, _images_in(catalog))
            elif replace and not work.num_held:
                remove_dataset(paths[1])
    finally:
        for path in paths:
            remove_unfinished(path)
    held = _task_sizes(paths[1])
    for name in names:
        if name not in held:
            where = " whose name is a training caption" if source.draws_images else ""
            raise ModeclipError(
                f"task {name!r} of {config.source!r} has no usable image{where}; skipped: {work.skips};"
                " correct data.tasks or data.holdout_fraction"
            )
    return IndexResult(
        kind=source.kind,
        num_samples=len(catalog),
        num_captions=len(captions),
        num_added=num_added,
        tasks=held,
        skipped=dict(work.skips.causes),
    )


def _task_names(config: DataConfig, source: DataSource) -> list[str]:
    """Return the names of the tasks that are held out, all different."""
    names = [HOLDOUT] if config.holdout_fraction else []
    names += list(config.tasks) if source.draws_images else [split_task(task)[0] for task in config.tasks]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        if config.holdout_fraction and repeated[0] == HOLDOUT:
            raise ModeclipError(f"data.tasks: {HOLDOUT!r} is the task of data.holdout_fraction: give NAME=FOLDER")
        raise ModeclipError(f"data.tasks has {repeated[0]!r} twice: give one of them NAME=FOLDER")
    return names


class Reading(TypedDict):
    """What the reading of one part gave."""

    name: str
    """Name of the part."""
    rows: list[int]
    """Rows that were written to the catalog, and to that of what is held out."""
    skipped: dict[str, int]
    """What was skipped, by cause."""
    lost: str
    """Cause for which pairs of it are missing; "" if it was read to its end."""
    further: NotRequired[int]
    """Pairs of both kinds that are a further caption of their sample; earlier versions did not count them."""


class IndexNote(TypedDict):
    """What the ledger keeps of some parts of a source that were read."""

    plan: str
    """Hash of what decides the work."""
    units: list[list[Any]]
    """Name and state of each part, and whether it is there."""
    readings: list[Reading]
    """What each part gave."""
    files: list[list[list[Any]]]
    """(name, rows) of the data files, of pairs and of held-out pairs."""
    fingerprints: list[str]
    """Fingerprint of both catalogs after these rows."""


class _Indexing:
    """Reads the parts of a source that a catalog does not have yet, notes down what is finished, and commits it all.

    A note is an entry of the ledger: the parts that it covers, and the data files that hold their rows.
    """

    def __init__(
        self,
        config: DataConfig,
        source: DataSource,
        tasks: Sequence[tuple[str, DataSource]],
        paths: tuple[str, str],
        replace: bool,
    ) -> None:
        self.source, self.replace = source, replace
        self.paths = paths
        old = [Catalog.open(path) if exists(path) and not replace else None for path in paths]
        self.ledger = Ledger(self.paths[0], "index", IndexNote)
        self.old = old[0]
        turned = {"exif": config.exif}
        if self.old and "exif" not in json.loads(self.old.metadata[SETTINGS]):
            config, turned = dataclasses.replace(config, exif="ignore"), {}  # as whoever made it did
        self.config = config
        settings = {name: value for name, value in config.flat().items() if name not in NOT_SETTINGS}
        divided = {"holdout": config.holdout} if config.holdout_fraction else {}  # by images, not by keys as once
        self.settings = json.dumps({"kind": source.kind} | settings | turned | divided, sort_keys=True)
        self.sources: dict[str, str] = json.loads(self.old.metadata[SOURCES]) if self.old else {}
        self.readings: list[Reading] = json.loads(self.old.metadata.get(PARTS, "[]")) if self.old else []
        self.parts = self._wanted()
        again = {part.name for part in self.parts}
        causes = Counter(json.loads(self.old.metadata[SKIPPED]) if self.old else {})
        for reading in self.readings:  # what is read again is counted again
            causes -= Counter(reading["skipped"] if reading["name"] in again else {})
        self.skips = Skips(config, causes)
        self.dropped = [self._rows_of(self.changed, side, each) for side, each in enumerate(old)]
        known = None
        if any(part.name in self.sources for part in self.parts):
            known = Distinct()
            for catalog in filter(None, old):
                columns = [name for name in ("key", "task") if name in catalog.columns]
                for batch in catalog.batches(columns, 1 << 16):
                    known.add_all(batch["key"][batch["task"] == HOLDOUT] if "task" in batch else batch["key"])
        new = dataclasses.replace(source, parts=tuple(self.parts))
        # Of sets that are drawn, tasks give way to what is trained on, since it chooses their classes too.
        kept = [] if source.draws_images and config.holdout != "similar" else [task for _, task in tasks]
        self.sides = Sides(config, new, kept, *old)
        self.schemas = [
            _schema(config, source, each, is_task) for each, is_task in zip(old, (False, True), strict=True)
        ]
        starts = [each.metadata.get(HELD_FINGERPRINT, each.fingerprint) if each else "" for each in old]
        for side, (each, dropped) in enumerate(zip(old, self.dropped, strict=True)):
            if each and dropped:
                starts[side] = _fingerprint_without(each, dropped, HOLDOUT if side else None)
        self.writers = [
            CatalogWriter(path, schema, start, known)
            for path, schema, start in zip(self.paths, self.schemas, starts, strict=True)
        ]
        plan = [self.settings, self.sources, replace, self.sides.identity]
        self.plan = hashlib.blake2b(json.dumps(plan).encode()).hexdigest()[:32]
        self.notes = self._resume()

    def read_parts(self) -> None:
        """Read all parts that no note covers, and write a note whenever enough rows have come together."""
        for note in self.notes:
            for reading in note["readings"]:
                self.skips.resume(reading)
            for writer, files, fingerprint in zip(self.writers, note["files"], note["fingerprints"], strict=True):
                writer.files += files
                writer.fingerprint = fingerprint
        done = sum(len(note["units"]) for note in self.notes)
        read, readings = [], []
        with progress("index", None, "pairs") as advance:
            try:
                for position, part in enumerate(self.parts[done:], done + 1):
                    reading, is_there = self._read_part(part, advance)
                    advance.expect((position - done) / (len(self.parts) - done))
                    read.append([part.name, part.state, is_there])
                    readings.append(reading)
                    num_waiting = sum(writer.num_waiting for writer in self.writers)
                    if num_waiting >= ROWS_PER_NOTE or position == len(self.parts):
                        note = IndexNote(
                            plan=self.plan,
                            units=read,
                            readings=readings,
                            files=[writer.finish() for writer in self.writers],
                            fingerprints=[writer.fingerprint for writer in self.writers],
                        )
                        if all(state for _, state, _ in read):  # a folder may be another when it is read again
                            self.ledger.add(f"{len(self.notes):06d}", note)
                        self.notes.append(note)
                        read, readings = [], []
            except BaseException:
                for writer in self.writers:
                    writer.discard()
                raise
        self._count_lost()
        self.skips.stop_if_too_many()

    def _count_lost(self) -> None:
        """Count what parts that cannot be read to their end are known, or estimated, to have held.

        What nothing tells is taken for as much as was read of the part.
        """
        parts = {part.name: part for part in self.parts}
        new = [reading for note in self.notes for reading in note["readings"]]
        readings = [*self._kept_readings(), *new]
        sizes = [size for reading in readings if not reading["lost"] and (size := _size_of(reading))]
        num_pairs = sum(_size_of(reading) - bool(reading["lost"]) for reading in readings)
        num_samples = num_pairs - sum(reading.get("further", 0) for reading in readings)
        for reading in new:
            cause, found = reading["lost"], _size_of(reading)
            if not cause:
                continue
            known = parts[reading["name"]].num_samples()
            if known is not None:
                expected = round(known * num_pairs / num_samples) if num_samples > 0 else known
                source = "as what lies beside it or its own index says"
            elif cause in (MISSING_SHARD, MISSING_TABLE):
                continue
            elif sizes:
                expected, source = round(sum(sizes) / len(sizes)), "estimated from the other parts"
            else:
                expected, source = 2 * found, "taken for as many as were read of it, since nothing tells their number"
            more = expected - found  # which includes the one that says so
            if more > 0:
                reading["skipped"][cause] = reading["skipped"].get(cause, 0) + more
                self.skips.add_lost(cause, more)
                log(f"{cause}: {reading['name']}: {more + 1:,} of about {expected:,} pairs are missing, {source}")

    def _kept_readings(self) -> list[Reading]:
        """Return what was read before and stays; of a folder that is read again, its rows stay."""
        again = {part.name for part in self.parts}
        return [
            reading if reading["name"] not in again else reading | {"skipped": {}}
            for reading in self.readings
            if reading["name"] not in self.changed
        ]

    def _rows_of(self, names: set[str], side: int, catalog: Catalog | None) -> list[range]:
        """Return the rows that some parts have in one of the catalogs; those of tasks may lie between them."""
        found, start = [], 0
        for reading in self.readings:
            end = start + reading["rows"][side]
            if reading["name"] in names and end > start:
                found.append(range(start, end))
            start = end
        if not side or not found or catalog is None:
            return found
        held = catalog.select(task=HOLDOUT)  # in the order of the readings
        rows = np.concatenate([held[some.start : some.stop] for some in found])
        parts = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)
        return [range(int(part[0]), int(part[-1]) + 1) for part in parts]

    @property
    def num_held(self) -> int:
        """Number of pairs that this run holds out of the source."""
        return sum(count for _, count in self.writers[1].files)

    def commit(self) -> tuple[Catalog, int]:
        """Make all rows visible, and return the catalog and the number of pairs that are new in it."""
        pairs, held = self.writers
        num_kept = len(self.old) - sum(map(len, self.dropped[0])) if self.old else 0
        if not num_kept and not pairs.files:
            raise ModeclipError(
                f"data.source {self.config.source!r} ({self.source.kind}) has no pair to train on;"
                f" {sum(count for _, count in held.files):,} held out, skipped: {self.skips}"
            )
        self.sources |= {name: state for note in self.notes for name, state, is_there in note["units"] if is_there}
        readings = [*self._kept_readings(), *(reading for note in self.notes for reading in note["readings"])]
        metadata = {SOURCES: to_json(self.sources), SETTINGS: self.settings, PARTS: to_json(readings)}
        metadata[SKIPPED] = to_json({cause: count for cause, count in self.skips.causes.items() if count})
        if held.files or self.dropped[1]:
            held.commit(metadata, self.replace, self.dropped[1])
        pairs.commit(metadata, self.replace, self.dropped[0])
        self.ledger.clear()
        return Catalog.open(self.paths[0]), sum(count for _, count in pairs.files)

    def _wanted(self) -> list[SourcePart]:
        """Return the parts that have to be read: new ones, and those that may have grown."""
        if self.old and self.old.metadata[SETTINGS] != self.settings:
            was, now = json.loads(self.old.metadata[SETTINGS]), json.loads(self.settings)
            if "holdout" not in was and was.get("holdout_fraction"):
                raise ModeclipError(
                    f"catalog {self.paths[0]!r} was divided by names and not by images, so copies may be on"
                    " both sides: give --replace, or another --out"
                )
            was, now = LATER | was, LATER | now
            for name in {**now, **was}:
                if was.get(name) != now.get(name):
                    raise ModeclipError(
                        f"catalog {self.paths[0]!r} was indexed with {name} {was.get(name)!r}, not {now.get(name)!r}:"
                        " give the same settings to add to it, or another --out, or --replace"
                    )
        changed = [
            part for part in self.source.parts if part.state and self.sources.get(part.name, part.state) != part.state
        ]
        known = {reading["name"] for reading in self.readings}
        if before := [part.name for part in changed if part.name not in known]:
            raise ModeclipError(
                f"{before[0]!r} has changed since it was indexed in {self.paths[0]!r}, by a version that did not note"
                " which rows are its: give another --out, or --replace to index everything again"
            )
        self.changed = {part.name for part in changed}
        if changed:
            log(f"{changed[0].name} has changed ({len(changed):,} such parts): its pairs are replaced by the new ones")
        return [
            part
            for part in self.source.parts
            if not part.state or part.name not in self.sources or part.name in self.changed
        ]

    def _resume(self) -> list[IndexNote]:
        """Return the notes of an earlier run of the same work; notes and files of other work are removed."""
        notes = [note for _, note in sorted(self.ledger.parts().items())]
        read = [part[:2] for note in notes for part in note["units"]]
        wanted = [[part.name, part.state] for part in self.parts]
        if all(note["plan"] == self.plan for note in notes) and wanted[: len(read)] == read:
            if read:
                log(f"continuing after {len(read):,} parts of the source that an earlier run has read")
            return notes
        for path, position in zip(self.paths, (0, 1), strict=True):
            remove_files(path, [name for note in notes for name, _ in note["files"][position]])
        self.ledger.clear()
        return []

    def _read_part(self, part: SourcePart, advance: Advance) -> tuple[Reading, bool]:
        """Write the rows of one part; return what it gave, and whether it exists."""
        is_there, respelled = True, list[tuple[str, str]]()
        reading = Reading(name=part.name, rows=[0, 0], skipped={}, lost="", further=0)
        before, first, number = Counter(self.skips.causes), "", 0
        for item in check_all(part.read(), self.config, self.source.draws_images):
            advance(1)
            self.skips.num_seen += 1
            key = item.key if isinstance(item, Skipped) else item.sample.key
            is_further = key == f"{first}#{number + 1}"
            first, number = (first, number + 1) if is_further else (key, 0)
            reading["further"] += is_further
            if isinstance(item, Skipped):
                self.skips.add(item)
                if item.key == part.name:
                    log(f"{item.cause}: {item.key} {item.detail}")
                    is_there = item.cause not in (MISSING_SHARD, MISSING_TABLE)
                    reading["lost"] = item.cause if item.cause in LOST_PARTS else ""
                continue
            if item.detail:
                respelled.append((item.detail, item.sample.path or ""))
            side = self.sides.side(item)
            if side not in ("", HOLDOUT):
                self.skips.add(Skipped(item.sample.key, side, item.sample.path or ""))
                continue
            more = {DHASH: self.sides.dhash_of(item)}
            is_new = self.writers[side == HOLDOUT].add(item, side, more, may_be_known=not part.state)
            reading["rows"][side == HOLDOUT] += is_new
            reading["further"] -= is_further and not is_new
        if respelled:
            detail, path = respelled[0]
            log(
                f"{part.name}: {len(respelled):,} images are spelled another way than they are named there; the first,"
                f" {detail!r} ({form_of(detail)}), was found as {path!r} ({form_of(path)})"
            )
        reading["skipped"] = dict(self.skips.causes - before)
        return reading, is_there

    def index_tasks(self, tasks: Sequence[tuple[str, DataSource]], captions: Distinct, images: Distinct) -> None:
        """Write the rows of the tasks into the catalog of what is held out, in the place of older ones.

        Args:
            tasks: Name and source of each task.
            captions: Those that are trained on: of sets that are drawn, classes have no other names.
            images: Digests, as hexadecimal digits, of what is trained on, which no task shows.
        """
        path, start, is_divided = self.paths[1], self.writers[1].fingerprint, self.config.holdout_fraction > 0
        held = files_where(path, "task", HOLDOUT) if is_divided and exists(path) else []
        writer = CatalogWriter(path, self.schemas[1], start if is_divided else "", None)
        with progress("index tasks", None, "pairs") as advance:
            for position, (name, source) in enumerate(tasks, 1):
                for part in source.parts:
                    for item in check_all(part.read(), self.config, source.draws_images):
                        advance(1)
                        self.skips.num_seen += 1
                        if isinstance(item, Skipped):
                            self.skips.add(item)
                        elif source.draws_images and item.sample.caption not in captions:
                            continue
                        elif self.sides.is_trained_on(item) or (item.digest and item.digest.hex() in images):
                            self.skips.add(Skipped(item.sample.key, COPY_OF_TRAINED, f"in task {name}"))
                        else:
                            writer.add(item, name)
                advance.expect(position / len(tasks))
        writer.finish()
        if writer.files:
            writer.files[:0] = held
            more = {HELD_FINGERPRINT: start} if is_divided else {}
            writer.commit({SETTINGS: json.dumps({"exif": self.config.exif})} | more, replace=True)


def _size_of(reading: Reading) -> int:
    """Return how many pairs a part gave, written or skipped."""
    return sum(reading["rows"]) + sum(reading["skipped"].values())


def _fingerprint_without(catalog: Catalog, dropped: Sequence[range], task: str | None) -> str:
    """Return the fingerprint of a catalog's rows, of one task if it is named, without some of them."""
    gone = np.zeros(len(catalog), bool)
    for rows in dropped:
        gone[rows.start : rows.stop] = True
    fingerprint, start = "", 0
    columns = ["key", "caption", "group", "digest", *(["task"] if task is not None else [])]
    for batch in catalog.batches(columns):
        tasks = batch.get("task", [""] * len(batch["key"]))
        rows_of_batch = zip(*(batch[name] for name in columns[:4]), tasks, strict=True)
        for place, (key, caption, group, digest, own) in enumerate(rows_of_batch, start):
            if not gone[place] and own == (task or ""):
                fingerprint = _chain(fingerprint, (key, caption, group, own, digest))
        start += len(batch["key"])
    return fingerprint


def _chain(fingerprint: str, identity: tuple[Any, ...]) -> str:
    """Return the fingerprint of rows and of one more: key, caption, group, task and digest."""
    return hashlib.blake2b(repr((fingerprint, *identity)).encode(), digest_size=16).hexdigest()


def _images_in(catalog: Catalog) -> Distinct:
    """Return the digests of a catalog's images, as hexadecimal digits; those that it does not have are computed."""
    images, unknown, start = Distinct(), [np.empty(0, np.int64)], 0
    for batch in catalog.batches(["digest"], 1 << 16):
        images.add_all(digest.hex() for digest in batch["digest"] if digest is not None)
        unknown.append(start + np.flatnonzero([digest is None for digest in batch["digest"]]))
        start += len(batch["digest"])
    samples = chain.from_iterable(catalog.samples(np.concatenate(unknown)))
    images.add_all(digest.hex() for _, digest, _ in hash_samples(samples, "hash images that were not opened"))
    return images


def _task_sizes(path: str) -> dict[str, tuple[int, int]]:
    """Return the number of classes and of images of each task in a catalog; none if there is no catalog."""
    captions: defaultdict[str, Distinct] = defaultdict(Distinct)
    sizes: Counter[str] = Counter()
    if exists(path):
        for batch in Catalog.open(path).batches(["task", "caption"], 1 << 16):
            for task in np.unique(batch["task"]):
                of_task = batch["caption"][batch["task"] == task]
                sizes[task] += len(of_task)
                captions[task].add_all(of_task)
    return {task: (len(captions[task]), count) for task, count in sizes.items()}


def _schema(config: DataConfig, source: DataSource, old: Catalog | None, is_task: bool) -> pa.Schema:
    """Return the columns that indexing writes: those of every pair, and the further ones of the source."""
    pairs = [pa.field(name, kind) for name, kind in PAIR_COLUMNS.items() if is_task or name != "task"]
    if config.holdout == "similar":
        pairs.append(pa.field(DHASH, pa.binary(8)))
    further = [field for field in source.extra if field.name not in PAIR_COLUMNS and not is_task]
    if old is not None:
        new = [field.name for field in further if field.name not in old.columns]
        if new:
            log(f"columns {', '.join(new)} are left out: the catalog was made without them")
        further = [field for field in further if field.name not in new]
    return pa.schema([*pairs, *further])


# ---------------------------------------------------------------- checking pairs


def check_all(stream: Iterator[Sample | Skipped], config: DataConfig, in_memory: bool) -> Iterator[Examined | Skipped]:
    """Read and decode the images of a stream in threads, and yield what was examined in the stream's order.

    Args:
        stream: Samples; pairs that are skipped already are passed on.
        config: Which images are decoded and which are copied.
        in_memory: Use no threads: for small images that are in memory, they would only wait for each other.
    """

    def check_part(part: list[Sample | Skipped]) -> list[Examined | Skipped]:
        return [item if isinstance(item, Skipped) else _check(item, config) for item in part]

    if in_memory:
        for item in stream:
            yield from check_part([item])
        return
    parts = iter(lambda: list(islice(stream, SAMPLES_PER_CHECK)), [])
    with ThreadPoolExecutor(CHECK_THREADS) as pool:
        for checked in map_in_order(pool, check_part, parts, 2 * CHECK_THREADS):
            yield from checked


def _check(sample: Sample, config: DataConfig) -> Examined | Skipped:
    """Read and decode one image, unless the user wants it unopened; where there are tasks it is hashed all the same."""
    try:
        "".join((sample.key, sample.caption, sample.path or "")).encode()
    except UnicodeEncodeError as error:
        return Skipped(ascii(sample.key), NOT_UTF8, f"{error.reason} in {error.object!a}")
    decode = config.check_images or config.copy_images or sample.image is not None or config.holdout_fraction > 0
    if not decode and not config.tasks:
        found = other_form(sample.path or "")
        if found:
            return Examined(dataclasses.replace(sample, path=found), detail=sample.path or "")
        return Examined(sample)
    seen = examine(sample, keep=config.copy_images, exif=config.exif, decode=decode)
    if seen.cause == MISSING and sample.path and (found := other_spelling(sample.path)):
        again = dataclasses.replace(sample, path=found)
        seen = examine(again, keep=config.copy_images, exif=config.exif, decode=decode)
        seen = seen if seen.cause else dataclasses.replace(seen, detail=sample.path)
    return Skipped(sample.key, seen.cause, seen.detail or sample.path or "") if seen.cause else seen


class Skips:
    """Counts skipped pairs by cause, keeps the first of each cause, and stops when there are too many."""

    def __init__(self, config: DataConfig, causes: Mapping[str, int]) -> None:
        self.causes: Counter[str] = Counter(causes)
        self.num_seen = 0
        self._first: dict[str, Skipped] = {}
        self._config = config
        self._num_damaged = 0

    def resume(self, reading: Reading) -> None:
        """Count what an earlier run has read."""
        self.num_seen += _size_of(reading)
        for cause, count in reading["skipped"].items():
            self.causes[cause] += count
            self._num_damaged += 0 if cause in HARMLESS else count

    def add_lost(self, cause: str, count: int) -> None:
        """Count pairs of a part that was not read to its end."""
        self.causes[cause] += count
        self.num_seen += count
        self._num_damaged += count

    def add(self, skipped: Skipped) -> None:
        """Count a skipped pair, and stop early when too many of them are damaged."""
        self.causes[skipped.cause] += 1
        self._first.setdefault(skipped.cause, skipped)
        if skipped.cause not in HARMLESS:
            self._num_damaged += 1
            if self._num_damaged % MANY_SKIPPED == 0:
                self.stop_if_too_many()

    def stop_if_too_many(self) -> None:
        """Stop when more than ``max_skipped_fraction`` of the pairs seen so far cannot be used.

        Raises:
            ModeclipError: There are more.
        """
        if self._num_damaged > self._config.max_skipped_fraction * self.num_seen:
            raise ModeclipError(
                f"data.source {self._config.source!r}: {self._num_damaged:,} of {self.num_seen:,} pairs cannot"
                f" be used, more than data.max_skipped_fraction {self._config.max_skipped_fraction};"
                f" stopped there: {self}; mend the data or raise data.max_skipped_fraction"
            )

    def __str__(self) -> str:
        return (
            "; ".join(
                f"{cause} {self.causes[cause]:,} (first: {first.key!r}, {' '.join(first.detail.split())})"
                for cause, first in self._first.items()
            )
            or "none"
        )


# ---------------------------------------------------------------- writing rows


class CatalogWriter:
    """Writes rows that are added to one catalog, and keeps their fingerprint.

    Attributes:
        files: (name, rows) of the data files that are finished.
        fingerprint: Hash over all rows so far; each row is hashed together with the fingerprint before it.
        num_waiting: Rows since the last call of ``finish``.
    """

    def __init__(self, path: str, schema: pa.Schema, fingerprint: str, known: Distinct | None) -> None:
        self.fingerprint = fingerprint
        self.files: list[list[Any]] = []
        self.num_waiting = 0
        self._path, self._schema, self._known = path, schema, known
        self._further = [name for name in schema.names if name not in PAIR_COLUMNS]
        self._writer = FileWriter(path, schema)
        self._table: list[dict[str, object]] = []
        self._table_bytes = 0

    def add(
        self,
        checked: Examined,
        task: str = "",
        more: Mapping[str, object] = MappingProxyType({}),
        *,
        may_be_known: bool = False,
    ) -> bool:
        """Append a row, and return True; ``more`` are values of further columns.

        With ``may_be_known``, as in a folder that is read again, a pair whose key the catalog has is passed over.
        """
        sample = checked.sample
        if may_be_known and self._known is not None and sample.key in self._known:
            return False
        identity = (sample.key, sample.caption, sample.group, task, checked.digest)
        self.fingerprint = _chain(self.fingerprint, identity)
        in_row = checked.image is not None
        self._table.append(
            {
                "key": sample.key,
                "caption": sample.caption,
                "image": checked.image,
                "path": None if in_row else sample.path,
                "offset": 0 if in_row else sample.offset,
                "size": len(checked.image or b"") if in_row else sample.size,
                "width": checked.width,
                "height": checked.height,
                "digest": checked.digest,
                "group": sample.group,
                "task": task,
            }
            | {name: more[name] if name in more else sample.extra.get(name) for name in self._further}
        )
        self.num_waiting += 1
        self._table_bytes += len(checked.image or b"")
        if len(self._table) >= ROWS_PER_WRITE or self._table_bytes >= BYTES_PER_WRITE:
            self._write()
        return True

    def finish(self) -> list[list[Any]]:
        """Close the data file and return (name, rows) of the files since the last call; later rows go to a new file."""
        self._write()
        finished = [list(file) for file in self._writer.finish()]
        self.files += finished
        self.num_waiting = 0
        return finished

    def discard(self) -> None:
        """Remove the files that are not finished."""
        self._writer.discard()

    def commit(self, metadata: Mapping[str, str], replace: bool, dropped: Sequence[range] = ()) -> None:
        """Make the rows of all finished files a catalog, or append them to the existing one, which loses some rows."""
        described = {FORMAT: FORMAT_VERSION, FINGERPRINT: self.fingerprint, **metadata}
        if replace or not exists(self._path):
            create(self._path, self._schema.with_metadata(described), self.files)
        else:
            append(self._path, self.files, described, dropped)

    def _write(self) -> None:
        if self._table:
            self._writer.write(pa.Table.from_pylist(self._table, schema=self._schema))
            self._table, self._table_bytes = [], 0


class Distinct:
    """A set of texts that keeps only hashes: 8 to 16 bytes per text.

    With a billion texts the chance that two of them share a hash is 3 % (n² / 2^65). The hashes are kept in 256 sorted
    parts by their last byte, so that only one part at a time is sorted anew.
    """

    def __init__(self) -> None:
        self._sorted = [np.empty(0, np.uint64) for _ in range(256)]
        self._new = [array("Q") for _ in range(256)]

    def add(self, text: str) -> None:
        """Add a text."""
        value = self._hash(text)
        new = self._new[value % 256]
        new.append(value)
        if len(new) > len(self._sorted[value % 256]) + 256:
            self._merge(value % 256)

    def add_all(self, texts: Iterable[str]) -> None:
        """Add several texts."""
        for text in texts:
            self.add(text)

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
