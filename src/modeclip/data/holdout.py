"""Holding out: which pairs are trained on and which judge the models, so that no image is on both sides.

Whatever is held out is known by the bytes of its image: copies of an image, and all captions of one, stay together.
Images that were scaled or encoded anew have other bytes; ``similar`` keeps them together too. It gives each image a
dHash of 64 bits: is a pixel of the 9 x 8 grey picture brighter than its right neighbour? Images whose hashes differ
in at most ``SIMILAR_BITS`` bits belong together, and so do all that are joined by a chain of such images.

What is drawn is a function of the identity, the seed and the fraction alone: the hash of identity and seed, as a number
in [0, 1), is below the fraction. So the order of reading, the number of workers and data that come later move nothing.
What is on one side already stays there. A new pair that would bring an image to the other side is left out, counted.

Source: dHash by N. Krawetz (hackerfactor.com, 2013). The three bits are ours.
Price: ``image`` nothing; ``group`` a read of the images that are held out; ``similar`` reads and decodes the source
twice, and holds about 300 bytes for each image.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain, islice, pairwise

import numpy as np
from jaxtyping import Bool, Int, UInt64
from PIL import Image

from modeclip.data.catalog import Catalog
from modeclip.data.images import Examined, Exif, decode_image, hash_image, map_in_order
from modeclip.data.samples import COPY_OF_HELD_OUT, COPY_OF_TRAINED, Sample
from modeclip.data.sources import DataConfig, DataSource
from modeclip.data.sources.options import HOLDOUT_UNITS, parse_holdout
from modeclip.errors import unknown
from modeclip.system.console import log, progress
from modeclip.system.paths import other_spelling

HOLDOUT = "holdout"
"""Name of the task that held-out pairs form."""
DHASH = "image_dhash"
"""Column of the hashes, in a catalog that was divided by ``similar``."""
SIMILAR_BITS = 3
"""Images whose dHashes differ in at most so many of 64 bits are taken for copies of each other."""
LARGE_SHARE = 0.1
"""A group of similar images with more than this share of all is worth a word: it falls on one side as a whole."""
CANDIDATES_AT_ONCE = 1 << 22
"""Pairs of hashes that are compared at a time."""
SAMPLES_PER_TASK = 32
"""Images that a thread hashes at a time."""


def is_drawn(identity: bytes, fraction: float, seed: int) -> bool:
    """Say whether the image or group of this identity is held out.

    Examples:
        >>> is_drawn(b"a", 0.0, seed=0), is_drawn(b"a", 1.0, seed=0)
        (False, True)
    """
    digest = hashlib.blake2b(identity, digest_size=8, key=seed.to_bytes(8)).digest()
    return int.from_bytes(digest) < fraction * 2**64


def dhash(image: Image.Image) -> int:
    """Return the dHash of a picture: 64 bits, one for each of 8 x 8 pairs of neighbours, from the top left on."""
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    return int.from_bytes(np.packbits(grey[:, :-1] > grey[:, 1:]).tobytes())


def similar_pairs(
    hashes: UInt64[np.ndarray, " n"], bits: int = SIMILAR_BITS
) -> Iterator[tuple[Int[np.ndarray, " p"], Int[np.ndarray, " p"]]]:
    """Yield the positions of all pairs of hashes that differ in at most some bits, in parts, each pair in both orders.

    Two hashes that differ in at most ``bits`` bits are equal in at least one of ``bits + 1`` parts of their bits, so
    only hashes that share a part are compared. A pair that shares several parts is found as often.

    Args:
        hashes: 64 bits each.
        bits: Largest number of bits in which the hashes of a pair differ.
    """
    bounds = np.linspace(0, 64, bits + 2).astype(np.uint64)
    for low, high in pairwise(bounds):
        part = hashes >> low & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(part, kind="stable")
        starts = np.flatnonzero(np.diff(part[order], prepend=part[order][:1] - np.uint64(1)))
        for places in np.split(order, starts[1:]):
            rows_at_once = max(1, CANDIDATES_AT_ONCE // len(places))
            for start in range(0, len(places) if len(places) > 1 else 0, rows_at_once):
                some = places[start : start + rows_at_once]
                one, other = np.nonzero(np.bitwise_count(hashes[some, None] ^ hashes[places]) <= bits)
                are_two = some[one] != places[other]
                yield some[one[are_two]], places[other[are_two]]


def group_similar(hashes: UInt64[np.ndarray, " n"], bits: int = SIMILAR_BITS) -> Int[np.ndarray, " n"]:
    """Return a number for each hash that is equal where hashes are joined by a chain of similar ones.

    Args:
        hashes: 64 bits each.
        bits: Largest number of bits in which neighbours of a chain differ.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    values, inverse = np.unique(hashes, return_inverse=True)
    pairs = [np.empty((2, 0), np.int64), *(np.stack(pair) for pair in similar_pairs(values, bits))]
    one, other = np.concatenate(pairs, axis=1)
    graph = coo_array((np.ones(len(one), bool), (one, other)), shape=(len(values), len(values)))
    return np.asarray(connected_components(graph, directed=False)[1])[inverse]


class Sides:
    """Says of each pair that is indexed whether it is trained on, held out or left out."""

    def __init__(
        self,
        config: DataConfig,
        source: DataSource,
        tasks: Sequence[DataSource],
        catalog: Catalog | None,
        held: Catalog | None,
    ) -> None:
        """Find out what has to be known before the first pair is read.

        Args:
            config: What is held out.
            source: Where the pairs come from, with the parts that are about to be read.
            tasks: Sources of tasks, whose images are not to be trained on.
            catalog: The pairs that are trained on already; None if there are none.
            held: The catalog of what is held out already; None if there is none.

        Raises:
            ModeclipError: The pairs have no such column.
        """
        self._unit, self._column = parse_holdout(config.holdout, HOLDOUT_UNITS, "data.holdout")
        self._fraction, self._seed = config.holdout_fraction, config.holdout_seed
        self._kept: set[bytes] = set()
        """Digests of images that must not be trained on."""
        self._trained: set[bytes] = set()
        """Digests of images that may no longer be held out."""
        self._similar: dict[bytes, tuple[str, int]] = {}
        """Side and dHash of each image, by its digest."""
        by_group = self._unit == "group" and self._fraction > 0
        if by_group and not {self._column, f"source_{self._column}"} & {"group", *source.extra.names}:
            raise unknown("column for data.holdout", self._column, ["group", *source.extra.names])
        of_tasks = _samples(tasks)
        if self._unit == "similar" and (self._fraction or tasks):
            self._find_similar(_samples([source]), of_tasks, catalog, held, config.exif)
            return
        self._kept.update(digest for _, digest, _ in hash_samples(of_tasks, "hash the images of tasks"))
        if by_group:
            may_be = (sample for sample in _samples([source]) if self._is_group_drawn(sample) is not False)
            for sample, digest, _ in hash_samples(may_be, "hash held-out groups"):
                if self._is_drawn(sample, digest):
                    self._kept.add(digest)
            self._kept.update(digest for digest, _ in _known(held, is_task=True))
        if self._kept:
            self._trained.update(digest for digest, _ in _known(catalog) if digest in self._kept)

    @property
    def identity(self) -> str:
        """Hash of what was found out: a killed run goes on only where it is the same."""
        content = hashlib.blake2b(b"".join(sorted(self._kept)), digest_size=16)
        for digest, (side, _) in sorted(self._similar.items()):
            content.update(digest + side.encode())
        return content.hexdigest()

    def side(self, item: Examined) -> str:
        """Return "" for a pair that is trained on, `HOLDOUT`, or the cause for which it is left out."""
        if item.digest in self._similar:
            return self._similar[item.digest][0]
        if self._is_drawn(item.sample, item.digest):
            return COPY_OF_TRAINED if item.digest in self._trained else HOLDOUT
        return COPY_OF_HELD_OUT if item.digest in self._kept else ""

    def is_trained_on(self, item: Examined) -> bool:
        """Say whether the image of a task, or one like it, was trained on before."""
        return item.digest in self._trained

    def dhash_of(self, item: Examined) -> bytes | None:
        """Return the dHash of a pair's image, for the column `DHASH`."""
        return self._similar[item.digest][1].to_bytes(8) if item.digest in self._similar else None

    def _is_drawn(self, sample: Sample, digest: bytes | None) -> bool:
        by_group = self._is_group_drawn(sample)
        if by_group is not None:
            return by_group
        return self._fraction > 0 and digest is not None and is_drawn(digest, self._fraction, self._seed)

    def _is_group_drawn(self, sample: Sample) -> bool | None:
        """Say whether the group of a pair is held out; None where it has none, so that its image counts alone."""
        if self._unit != "group" or not self._fraction:
            return None
        own = (sample.extra[name] for name in (self._column, f"source_{self._column}") if name in sample.extra)
        value = next(own, sample.group if self._column == "group" else None)
        if value is None or value == "":
            return None
        return is_drawn(f"group {value}".encode(), self._fraction, self._seed)

    def _find_similar(
        self,
        new: Iterator[Sample],
        of_tasks: Iterator[Sample],
        catalog: Catalog | None,
        held: Catalog | None,
        exif: Exif,
    ) -> None:
        """Give every image its side: that of the group of similar images to which it belongs."""
        trained, kept = dict(_known(catalog)), dict(_known(held, is_task=True))
        tasks, found = (
            {digest: value for _, digest, value in hash_samples(samples, f"hash the images of {what}", dhashes=exif)}
            for samples, what in ((of_tasks, "tasks"), (new, "the source"))
        )
        hash_of = tasks | found | trained | kept
        digests = sorted(hash_of)
        groups = group_similar(np.array([hash_of[digest] for digest in digests], np.uint64))
        smallest = np.unique(groups, return_index=True)[1]  # the digests are sorted
        has_trained, has_held, has_task = (
            np.isin(np.arange(len(smallest)), groups[[digest in side for digest in digests]])
            for side in (trained, kept, tasks)
        )
        largest = int(np.bincount(groups).max()) if len(groups) else 0
        log(f"{len(digests):,} images in {len(smallest):,} groups of similar ones, the largest of {largest:,}")
        if largest > LARGE_SHARE * len(digests) and largest > 1:
            log(f"one group of similar images holds {100 * largest / len(digests):.0f} % of them and stays together")
        for digest, group in zip(digests, groups.tolist(), strict=True):
            is_kept = has_held[group] or has_task[group]
            if digest in trained or (has_trained[group] and not is_kept):
                side = ""
            elif digest in kept or (has_held[group] and not has_trained[group]):
                side = HOLDOUT
            elif has_trained[group]:
                side = COPY_OF_HELD_OUT
            elif is_drawn(digests[smallest[group]], self._fraction, self._seed):
                side = HOLDOUT
            else:
                side = COPY_OF_HELD_OUT if has_task[group] else ""
            self._similar[digest] = side, hash_of[digest]
            if has_trained[group] and digest in tasks:
                self._trained.add(digest)


def _samples(sources: Iterable[DataSource]) -> Iterator[Sample]:
    return (item for source in sources for part in source.parts for item in part.read() if isinstance(item, Sample))


def hash_samples(
    samples: Iterator[Sample], title: str, *, dhashes: Exif | None = None
) -> Iterator[tuple[Sample, bytes, int]]:
    """Yield samples with the digests of their images and, if wanted, their dHashes, in order.

    What cannot be read or decoded is left out here: it is counted when the pairs themselves are read.

    Args:
        samples: They name the images.
        title: Title of the progress bar.
        dhashes: Whether images are turned upright before their dHashes are made; None: 0 stands for the dHashes.
    """

    def hash_some(some: Sequence[Sample]) -> list[tuple[Sample, bytes, int]]:
        found = []
        for sample in some:
            try:
                data = _read(sample)
                found.append((sample, hash_image(data), dhash(decode_image(data, dhashes)) if dhashes else 0))
            except Exception:  # Pillow's decoders raise nearly anything on damaged bytes
                continue
        return found

    first = next(samples, None)
    if first is None:
        return
    samples, threads = chain([first], samples), os.cpu_count() or 1
    blocks = iter(lambda: list(islice(samples, SAMPLES_PER_TASK)), [])
    with progress(title, None, "images") as advance, ThreadPoolExecutor(threads) as pool:
        for found in map_in_order(pool, hash_some, blocks, 2 * threads):
            advance(len(found))
            yield from found


def _read(sample: Sample) -> bytes:
    """Return the image of a sample, whose file may be spelled another way than it is named, as for indexing."""
    try:
        return sample.read()
    except (FileNotFoundError, NotADirectoryError):
        found = other_spelling(sample.path or "")
        if found is None:
            raise
        return replace(sample, path=found).read()


def _known(catalog: Catalog | None, *, is_task: bool = False) -> Iterator[tuple[bytes, int]]:
    """Yield digest and dHash (0: none) of the images in a catalog; of a catalog of tasks, those of `HOLDOUT` alone."""
    if catalog is None:
        return
    columns = [name for name in ("digest", DHASH, "task") if name in catalog.columns]
    for block in catalog.batches(columns):
        hashes = block.get(DHASH, [None] * len(block["digest"]))
        tasks = block["task"] if is_task else [HOLDOUT] * len(block["digest"])
        for digest, value, task in zip(block["digest"], hashes, tasks, strict=True):
            if digest is not None and task == HOLDOUT:
                yield digest, int.from_bytes(value) if value is not None else 0


def identify(digests: Sequence[bytes | None], paths: Sequence[str | None], offsets: Sequence[int]) -> list[bytes]:
    """Return what each row's image is known by: its digest or, where it has none, where it lies."""
    return [
        digest if digest is not None else f"{path} {offset}".encode()
        for digest, path, offset in zip(digests, paths, offsets, strict=True)
    ]


def keep_together(chosen: Bool[np.ndarray, " N"], units: Int[np.ndarray, " N"]) -> Bool[np.ndarray, " N"]:
    """Return a mask in which every row of a unit is chosen or not as the unit's first row is in the given mask."""
    _, first, inverse = np.unique(units, return_index=True, return_inverse=True)
    return np.asarray(chosen[first][inverse])
