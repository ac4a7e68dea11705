"""The batch of any step: which rows, in which order, as which pictures and tokens.

A batch is a pure function of (seed, step, rows), and of the rows' probabilities where they have some. Each pass over
the rows is a pseudo-random permutation of them that is computed element by element, by a Feistel network on the row's
position that is repeated until the result is one of the N positions. So the order of a billion rows takes no memory,
and the batch of step one million is known without the ones before it. A job can be resumed at any step, the processes
of a job take disjoint parts of the same batch, and another number of workers changes nothing but the time.

With probabilities, a pass reads a row if a number in [0, 1) that seed, pass and row decide is below the row's, and
permutes those. How many a pass reads follows from all of its rows. So a job that goes on at step t draws the passes
before it again, for their sizes, and keeps the rows of the present pass alone.

With groups, a pass takes the rows group by group: each group in an order of its own, cut into batches of that group
alone, and what is left of the groups, less than a batch of each, in batches that several groups share. These batches
come in a random order. No row is left out: the last batch is filled up with rows that the pass has read already. The
loss knows no negatives from another group (`modeclip.training.objectives.logits`).

Augmentation follows open_clip's ``image_transform`` for training: a random crop, then changed colours and grey if asked
for. Its random numbers are a function of the step too, whichever process or thread prepares a picture.

Pictures travel as bytes, a quarter of the floats, and are normalised on the device. Where all pictures of a job fit
into ``train.engine.keep_pictures_gb``, each is read and decoded once: a small picture takes longer to read than a small
model takes to learn from it (``benchmarks/feed.py``).

Price: in memory, one batch, a few pieces of 256 samples ahead of it, and the pictures that are kept. Rejected: workers
that fork (Lance is not fork-safe) and shuffle buffers (their order depends on timing, and they cannot be resumed).

Source: Black and Rogaway, "Ciphers with arbitrary finite domains" (2002), for permutations of any size by cycle
walking; open_clip's ``AugmentationCfg`` and torchvision for augmentation.
"""

from __future__ import annotations

import hashlib
import math
import re
import signal
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int
from PIL.Image import Image, Resampling

from modeclip.data.catalog import Catalog
from modeclip.errors import ModeclipError, unknown
from modeclip.system.processes import end_with_owner
from modeclip.training.jobs import AugmentConfig, TrainConfig, TrainJob
from modeclip.training.objectives.objective import CAPTION_IDS, TrainingBatch

if TYPE_CHECKING:
    from torch import Tensor

    from modeclip.training.trunk_outputs import TrunkOutputs

PIECE_SAMPLES = 256
"""Samples that are prepared at a time."""
PREFETCH_THREADS = 2
PREFETCH_PIECES = 4
"""Pieces that are prepared ahead, for each thread or worker process."""
KEPT_BYTES = 1000
"""Memory of a kept sample besides its pixels: Python objects and tokens."""
PIXEL_BYTES = 4
"""Memory of a pixel in Pillow's RGB."""
KNOWN_CAPTIONS = 1 << 17
"""Captions whose tokens are kept for the next pass: 40 MB at 77 tokens."""
KEEP_STREAM = 1 << 44
"""First key of the random streams that say which rows a pass reads."""
GROUP_STREAM = 1 << 48
"""First key of the random streams of groups: of the order of their batches, and of the rows in each of them."""
ROWS_AT_ONCE = 1 << 18
"""Rows that are drawn at a time."""
CROP_STREAM = 1 << 40
"""First key of the random streams of augmentation, far from those of the orders of the rows."""
NUM_DRAWS = 11
"""Random numbers in [0, 1) that a picture takes: four for the crop, seven for the colours."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # SplitMix64's step: 2^64 over the golden ratio
_ROUNDS = 6  # of the Feistel network
_ORDERS = tuple(permutations(range(4)))  # torchvision's ColorJitter applies its four changes in a random order
_ASPECT = 4 / 3  # the width of a crop to its height lies between 1 / this and this


def select_rows(job: TrainJob, catalog: Catalog) -> Int[np.ndarray, " N"]:
    """Return the catalog rows that a job asks for, ascending, be they enough or not."""
    if not (job.where or job.mask):
        return job.selection.rows(catalog)
    chosen = None if job.selection.is_all else job.selection.mask_of(catalog)
    marked = {} if job.mask is None else {job.mask: True}
    rows = catalog.select_equal({**job.where, **marked}, chosen)
    if job.out_of_cluster_fraction > 0 and job.where:
        others = np.setdiff1d(catalog.select_equal(marked, chosen), rows)
        draw = np.random.Generator(
            np.random.Philox(key=[job.config.seed, 1_000_003 + sum(int(value) for value in job.where.values())])
        )
        count = round(job.out_of_cluster_fraction * len(others))
        rows = np.sort(np.concatenate([rows, draw.choice(others, count, replace=False)]))
    return rows


def job_rows(job: TrainJob, catalog: Catalog) -> Int[np.ndarray, " N"]:
    """Return the catalog rows that a job trains on, ascending; none that has the probability 0.

    Raises:
        ModeclipError: They are fewer than one batch, or a pass is expected to read fewer, or the column of
            probabilities holds something else.
    """
    rows = select_rows(job, catalog)
    catalog.captions(rows[:1], job.config.captions)  # raises if that is no column of texts
    read_groups(job.config, catalog, rows[:1])  # the same
    probability = read_probability(job.config, catalog, rows)
    if probability is not None:
        expected = float(probability.sum(dtype=np.float64))
        if 0 < expected < job.config.batch_size <= len(rows):
            raise ModeclipError(
                f"{job.name}: a pass reads {expected:,.1f} of {len(rows):,} pairs (train.probability"
                f" {job.config.probability}), fewer than one batch of {job.config.batch_size:,}; set train.batch_size"
                " lower, or choose more pairs"
            )
        rows = rows[probability > 0]
    if not len(rows):
        chosen = [
            *(f"{column} {value}" for column, value in job.where.items()),
            *([f"mask {job.mask}"] if job.mask else []),
            *([] if job.selection.is_all else [str(job.selection)]),
            *([f"a {job.config.probability} above 0"] if job.config.probability else []),
        ]
        raise ModeclipError(
            f"{job.name}: {catalog.path!r} has no pair{' of ' if chosen else ''}{' and '.join(chosen)}; "
            "choose others, or index some"
        )
    if len(rows) < job.config.batch_size:
        raise ModeclipError(
            f"{job.name}: {len(rows):,} pairs are fewer than one batch of {job.config.batch_size:,}; "
            f"set train.batch_size to at most {len(rows):,}, or use fewer experts"
        )
    return rows


def batch_rows(
    rows: Int[np.ndarray, " N"], step: int, batch_size: int, seed: int, part: slice = slice(None)
) -> Int[np.ndarray, " B"]:
    """Return the rows of one step's batch, none of them twice.

    Each pass over the rows is a new permutation. What is left at its end, fewer rows than a batch, is left out of it.

    Args:
        rows: All rows that are trained on.
        step: Number of the batch, from 0.
        batch_size: Rows in a batch.
        seed: Decides the permutations.
        part: Positions of the batch that are wanted; only those are computed.
    """
    batches_per_pass = len(rows) // batch_size
    passes, index = divmod(step, batches_per_pass)
    positions = np.arange(index * batch_size, (index + 1) * batch_size, dtype=np.int64)[part]
    batch: np.ndarray = rows[permute(positions, len(rows), seed, passes)]
    return batch


def read_probability(
    config: TrainConfig, catalog: Catalog, rows: Int[np.ndarray, " N"]
) -> Float[np.ndarray, " N"] | None:
    """Return the probability with which a pass reads each of some rows; None where all are read.

    Raises:
        ModeclipError: There is no such column, or it holds something else than numbers in [0, 1].
    """
    name = config.probability
    if name is None:
        return None
    kind = catalog.type_of(name)
    if kind not in {"halffloat", "float", "double"}:
        raise ModeclipError(f"train.probability: column {name!r} holds {kind}, expected numbers in [0, 1]")
    values = catalog.read([name], rows)[name]
    wrong = ~((values >= 0) & (values <= 1))  # NaN too
    if wrong.any():
        first = int(np.argmax(wrong))
        key = catalog.read(["key"], rows[first : first + 1])["key"][0]
        raise ModeclipError(
            f"train.probability: column {name!r} has {int(wrong.sum()):,} values outside of [0, 1], such as"
            f" {values[first]} of {key!r}; leave these pairs out (--where), or write the column again"
        )
    return values.astype(np.float32)


def read_groups(config: TrainConfig, catalog: Catalog, rows: Int[np.ndarray, " N"]) -> Int[np.ndarray, " N"] | None:
    """Return the group of each of some rows, whose negatives come from the same group; None where there are no groups.

    Raises:
        ModeclipError: There is no such column, or it holds something else than whole numbers.
    """
    name = config.groups
    if name is None:
        return None
    if name not in catalog.columns:
        raise unknown(f"column of {catalog.path!r}, which train.groups names,", name, catalog.columns)
    kind = catalog.type_of(name)
    if re.fullmatch(r"u?int\d+", kind) is None:
        raise ModeclipError(f"train.groups: column {name!r} holds {kind}, expected whole numbers")
    values = catalog.read([name], rows)[name]
    if values.dtype.kind == "f":  # as whole numbers are read where some are missing
        missing = np.flatnonzero(np.isnan(values))
        key = catalog.read(["key"], rows[missing[:1]])["key"][0]
        raise ModeclipError(
            f"train.groups: column {name!r} has no value for {len(missing):,} of {len(rows):,} pairs, such as {key!r}; "
            "leave these pairs out (--where), or write the column again"
        )
    return values.astype(np.int64)


def keeps(
    rows: Int[np.ndarray, " N"], probability: Float[np.ndarray, " N"], seed: int, number: int
) -> Bool[np.ndarray, " N"]:
    """Return which rows a pass reads: each with its probability, decided by seed, pass and row alone.

    Args:
        rows: Positions in the catalog.
        probability: In [0, 1]: 1 reads a row in every pass, 0 in none.
        seed: Of the training.
        number: Number of the pass.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, KEEP_STREAM + number]))
    key = generator.integers(0, 1 << 64, dtype=np.uint64, endpoint=False)
    kept = np.empty(len(rows), bool)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        scrambled = _mix(rows[part].astype(np.uint64) * _GOLDEN + key)
        kept[part] = (scrambled >> np.uint64(11)) * 2.0**-53 < probability[part]
    return kept


class Order:
    """Which rows each step reads, as a function of the step alone; threads may share it.

    Args:
        rows: All rows that are trained on.
        batch_size: Rows in a batch.
        seed: Decides what is drawn, and in which order it is read.
        probability: Of each row to be read in a pass; None reads all in every pass.
        groups: Group of each row, whose rows are read together; None: there are no groups.
    """

    def __init__(
        self,
        rows: Int[np.ndarray, " N"],
        batch_size: int,
        seed: int,
        probability: Float[np.ndarray, " N"] | None = None,
        groups: Int[np.ndarray, " N"] | None = None,
    ) -> None:
        self._rows, self._batch_size, self._seed = rows, batch_size, seed
        self._probability, self._groups = probability, groups
        self._first_steps = [0]  # of the passes that were drawn so far, and of the next one
        self._passes: dict[int, _Pass | _GroupedPass] = {}
        self._lock = Lock()

    def batch(self, step: int, part: slice = slice(None)) -> Int[np.ndarray, " B"]:
        """Return the rows of a step's batch, none of them twice; ``part`` says which positions are wanted."""
        if self._probability is None and self._groups is None:
            return batch_rows(self._rows, step, self._batch_size, self._seed, part)
        index, found = self._find(step)
        return found.batch(index, part)

    def _find(self, step: int) -> tuple[int, _Pass | _GroupedPass]:
        """Return the number of a step in its pass, and the pass."""
        with self._lock:
            while self._first_steps[-1] <= step:  # job_rows has seen to it that this ends
                self._first_steps.append(self._first_steps[-1] + self._steps(len(self._first_steps) - 1))
            number = bisect_right(self._first_steps, step) - 1
            if number not in self._passes:
                self._passes = dict(list(self._passes.items())[-1:])  # threads are in two passes at its end
                self._passes[number] = self._make(number)
            return step - self._first_steps[number], self._passes[number]

    def _steps(self, number: int) -> int:
        """Return the steps of a pass."""
        count = len(self._rows) if self._probability is None else int(np.count_nonzero(self._draw(number)))
        return count // self._batch_size if self._groups is None else steps_of_groups(count, self._batch_size)

    def _make(self, number: int) -> _Pass | _GroupedPass:
        drawn = slice(None) if self._probability is None else self._draw(number)
        if self._groups is None:
            return _Pass(self._rows[drawn], self._batch_size, self._seed, number)
        return _GroupedPass(self._rows[drawn], self._groups[drawn], self._batch_size, self._seed, number)

    def _draw(self, number: int) -> Bool[np.ndarray, " N"]:
        assert self._probability is not None
        return keeps(self._rows, self._probability, self._seed, number)


def steps_of_groups(num_rows: int, batch_size: int) -> int:
    """Return the steps of a pass by groups, which leaves no row out; 0 if there are fewer rows than a batch.

    Examples:
        >>> steps_of_groups(10, 4), steps_of_groups(8, 4), steps_of_groups(3, 4)
        (3, 2, 0)
    """
    return math.ceil(num_rows / batch_size) if num_rows >= batch_size else 0


@dataclass(frozen=True)
class _Pass:
    """A pass over some rows in a random order; fewer rows than a batch are left out at its end."""

    rows: Int[np.ndarray, " n"]
    batch_size: int
    seed: int
    number: int

    def batch(self, index: int, part: slice) -> Int[np.ndarray, " B"]:
        """Return the rows of one of the batches."""
        positions = np.arange(index * self.batch_size, (index + 1) * self.batch_size, dtype=np.int64)[part]
        batch: np.ndarray = self.rows[permute(positions, len(self.rows), self.seed, self.number)]
        return batch


class _GroupedPass:
    """A pass over some rows, group by group, in batches of one group as far as the groups fill them.

    The rows have places in a line: first, group after group, those that fill whole batches, then the rests of the
    groups in a random order. The line is cut into batches, and its beginning fills up the last one.
    """

    def __init__(
        self,
        rows: Int[np.ndarray, " n"],
        groups: Int[np.ndarray, " n"],
        batch_size: int,
        seed: int,
        number: int,
    ) -> None:
        order = np.argsort(groups, kind="stable")
        self._rows, self._batch_size, self._seed = rows[order], batch_size, seed
        _, self._firsts, self._sizes = np.unique(groups[order], return_index=True, return_counts=True)
        self._stream = GROUP_STREAM + number * (len(rows) + 1)  # as many groups as rows at most
        self._whole = self._sizes - self._sizes % batch_size
        self._whole_ends = np.cumsum(self._whole)
        draw = np.random.Generator(np.random.Philox(key=[seed, self._stream]))
        self._rest_order = draw.permutation(len(self._sizes))
        self._rest_ends = np.cumsum((self._sizes - self._whole)[self._rest_order])

    def batch(self, index: int, part: slice) -> Int[np.ndarray, " B"]:
        """Return the rows of one of the batches."""
        count = len(self._rows)
        (place,) = permute(np.array([index]), steps_of_groups(count, self._batch_size), self._seed, self._stream)
        places = np.arange(place * self._batch_size, (place + 1) * self._batch_size, dtype=np.int64)[part] % count
        group, position = self._find(places)
        batch = np.empty_like(places)
        for one in np.unique(group).tolist():
            own = group == one
            found = permute(position[own], int(self._sizes[one]), self._seed, self._stream + 1 + one)
            batch[own] = self._rows[self._firsts[one] + found]
        return batch

    def _find(self, places: Int[np.ndarray, " B"]) -> tuple[Int[np.ndarray, " B"], Int[np.ndarray, " B"]]:
        """Return the group that has each place of the line, and which of the group's places it is."""
        num_whole = int(self._whole_ends[-1])
        ends, rest_ends = self._whole_ends, self._rest_ends
        group = np.searchsorted(ends, np.minimum(places, num_whole - 1), side="right")
        position = places - ends[group] + self._whole[group]
        in_rest = places >= num_whole
        slot = np.searchsorted(rest_ends, places[in_rest] - num_whole, side="right")
        group[in_rest] = self._rest_order[slot]
        position[in_rest] = places[in_rest] - num_whole - rest_ends[slot] + self._sizes[self._rest_order[slot]]
        return group, position


def draws_of(seed: int, step: int, first: int, last: int) -> Float[np.ndarray, "b 11"]:
    """Return the random numbers of the positions from ``first`` to before ``last`` of a step's batch."""
    bits = np.random.Philox(key=[seed, CROP_STREAM + step])
    blocks, rest = divmod(first * NUM_DRAWS, 4)  # Philox makes four numbers at a time
    bits.advance(blocks)
    draw = np.random.Generator(bits)
    draw.random(rest)
    return draw.random((last - first, NUM_DRAWS))


def permute(positions: Int[np.ndarray, " B"], count: int, seed: int, stream: int) -> Int[np.ndarray, " B"]:
    """Return where a random permutation sends some positions.

    Args:
        positions: Positions in [0, count).
        count: Size of the permutation.
        seed: Chooses the permutation, together with ``stream``.
        stream: Number of the permutation.
    """
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = np.random.Generator(np.random.Philox(key=[seed, stream])).integers(0, 1 << 63, _ROUNDS, dtype=np.uint64)

    def encrypt(values: np.ndarray) -> np.ndarray:
        left, right = values >> half, values & mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        return (left << half) | right

    result = encrypt(positions.astype(np.uint64))
    while (outside := result >= np.uint64(count)).any():  # the domain is at most four times as large, so this ends soon
        result[outside] = encrypt(result[outside])
    return result.astype(np.int64)


def _mix(values: np.ndarray) -> np.ndarray:
    """Scramble 64-bit numbers (the finaliser of MurmurHash3)."""
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    scrambled: np.ndarray = values ^ (values >> np.uint64(33))
    return scrambled


def augment(
    pictures: Sequence[Image], size: tuple[int, int], config: AugmentConfig, draws: Float[np.ndarray, "b 11"]
) -> list[Image]:
    """Vary pictures at random and scale them to a size.

    Args:
        pictures: Any RGB pictures.
        size: Width and height of the results, in pixels.
        config: What is done to how many of them.
        draws: Random numbers in [0, 1), a row for each picture.
    """
    changed = []
    for picture, numbers in zip(pictures, draws.tolist(), strict=True):
        result = (
            random_crop(picture, size, config.min_crop_share, numbers[:4]) if config.min_crop_share < 1 else picture
        )
        if config.color_jitter > 0 and numbers[4] < config.color_jitter_probability:
            result = _jitter(result, config.color_jitter, numbers[5:10])
        if numbers[10] < config.grayscale_probability:
            result = result.convert("L").convert("RGB")
        changed.append(result)
    return changed


def random_crop(picture: Image, size: tuple[int, int], min_share: float, draws: Sequence[float]) -> Image:
    """Cut a random box out of a picture and scale it, as open_clip does in training.

    Args:
        picture: Any picture.
        size: Width and height of the result, in pixels.
        min_share: Smallest share of the picture's area that the box may have. The share is drawn from [min_share, 1]
            and the ratio of width to height from [3/4, 4/3] (log-uniform); a box that would not fit is narrowed.
        draws: Four random numbers in [0, 1).
    """
    share, shape, left, top = draws
    width, height = picture.size
    area, ratio = (min_share + share * (1 - min_share)) * width * height, _ASPECT ** (2 * shape - 1)
    box_width, box_height = min(width, math.sqrt(area * ratio)), min(height, math.sqrt(area / ratio))
    left, top = left * (width - box_width), top * (height - box_height)
    box = (left, top, min(width, left + box_width), min(height, top + box_height))
    return picture.resize(size, Resampling.BICUBIC, box=box)


def _jitter(picture: Image, strength: float, draws: Sequence[float]) -> Image:
    """Change brightness, contrast and saturation by up to a share of them, the hue by up to a quarter of that."""
    from torchvision.transforms import functional

    order, factors = _ORDERS[int(draws[0] * len(_ORDERS))], [1 + strength * (2 * draw - 1) for draw in draws[1:4]]
    change = (
        lambda picture: functional.adjust_brightness(picture, factors[0]),
        lambda picture: functional.adjust_contrast(picture, factors[1]),
        lambda picture: functional.adjust_saturation(picture, factors[2]),
        lambda picture: functional.adjust_hue(picture, strength / 4 * (2 * draws[4] - 1)),
    )
    for index in order:
        picture = change[index](picture)
    return picture


@dataclass(frozen=True, slots=True)
class DecodedSample:
    """A row as it is before augmentation, the same in every pass."""

    picture: Image
    """Decoded picture in RGB, of its own size."""
    tokens: Int[np.ndarray, " context_length"]
    """Token ids of the caption, int32."""
    caption_id: int
    """Number that is equal for equal captions."""


@dataclass(frozen=True, kw_only=True)
class Feed:
    """Makes the batch of any step, in any process."""

    catalog: str
    """Path of the catalog."""
    rows: Tensor
    """(N,) int64, the rows of the catalog that are trained on."""
    probability: Tensor | None = None
    """(N,) float32, the probability with which a pass reads each of them. None: all are read."""
    groups: Tensor | None = None
    """(N,) int64, the group of each of them, whose rows are read together. None: there are no groups."""
    config: TrainConfig
    """Batch size, seed and augmentation."""
    tokenizer: Any
    """Turns a list of n texts into (n, context_length) token ids."""
    preprocess: Any
    """open_clip's transform for inference. Its steps before the tensor bring a picture to the model's size where no
    crop has done so."""
    image_size: tuple[int, int]
    """Width and height of the pictures, in pixels."""
    columns: tuple[str, ...] = ()
    """Columns of the catalog that go into the batch's extras."""
    caption_ids: bool = False
    """Whether the extras hold numbers that are equal for equal captions."""
    rank: int = 0
    """Which process of the job this is."""
    world_size: int = 1
    """Processes of the job; each takes an equal part of every batch."""
    kept: dict[int, DecodedSample] | None = None
    """Samples by row that earlier jobs of this process have kept, with the same catalog and tokenizer."""
    trunk: TrunkOutputs | None = None
    """What the frozen trunk has given for pairs, which need no picture then. None: nothing is kept."""

    @cached_property
    def _opened(self) -> Catalog:
        return Catalog.open(self.catalog)

    @cached_property
    def _order(self) -> Order:
        probability = None if self.probability is None else self.probability.numpy()
        groups = None if self.groups is None else self.groups.numpy()
        return Order(self.rows.numpy(), self.config.batch_size, self.config.seed, probability, groups)

    @cached_property
    def _known_tokens(self) -> dict[str, Int[np.ndarray, " context_length"]]:
        return {}

    @cached_property
    def _kept(self) -> dict[int, DecodedSample] | None:
        """The samples read so far, by row. None where the job's do not all fit, or where several processes read."""
        room, rows = self.config.engine.keep_pictures_gb * 1e9, self.rows.numpy()
        if self.trunk or self.config.engine.workers or len(rows) * KEPT_BYTES > room:
            return None
        sizes = self._opened.read(["width", "height"], rows)
        pixels = int((sizes["width"].astype(np.int64) * sizes["height"]).sum())
        if len(rows) * KEPT_BYTES + pixels * PIXEL_BYTES > room:
            return None
        return {} if self.kept is None else self.kept

    def _samples(self, rows: Int[np.ndarray, " b"]) -> list[DecodedSample]:
        """Return the samples of rows, in their order."""
        kept = self._kept
        missing = np.array([row for row in rows.tolist() if not kept or row not in kept], np.int64)
        found: dict[int, DecodedSample] = {}
        if len(missing):
            captions = self._opened.captions(missing, self.config.captions)
            parts = zip(self._opened.images(missing), self._tokens(captions), map(_hash, captions), strict=True)
            found = dict(zip(missing.tolist(), (DecodedSample(*part) for part in parts), strict=True))
        if kept is None:
            return [found[row] for row in rows.tolist()]
        kept.update(found)
        return [kept[row] for row in rows.tolist()]

    def _tokens(self, captions: Sequence[str]) -> list[Int[np.ndarray, " context_length"]]:
        """Return the token ids of captions; each is tokenized once, which is a third of a small picture's cost."""
        known = self._known_tokens
        ids = {caption: known[caption] for caption in captions if caption in known}
        if new := sorted(set(captions) - ids.keys()):
            ids |= zip(new, self.tokenizer(new).numpy().astype(np.int32), strict=True)
            if len(known) < KNOWN_CAPTIONS:
                known.update(ids)
        return [ids[caption] for caption in captions]

    def piece(self, step: int, first: int, last: int) -> TrainingBatch:
        """Return the samples of a step's whole batch from position ``first`` to before ``last``."""
        import torch

        config = self.config
        rows = self._order.batch(step, slice(first, last))
        if self.trunk is not None:
            return self._piece_of_trunk(step, first, rows, self.trunk)
        samples = self._samples(rows)
        pixels = self._pixels(samples, draws_of(config.seed, step, first, last))
        return TrainingBatch(
            images=pixels,
            tokens=torch.from_numpy(np.stack([sample.tokens for sample in samples]).astype(np.int64)),
            extras=self._extras(rows, [sample.caption_id for sample in samples]),
        )

    def _pixels(self, samples: Sequence[DecodedSample], draws: Float[np.ndarray, "b 11"]) -> Tensor:
        """Return (b, 3, H, W) pictures as a step sees them."""
        import torch

        pictures: Sequence[Image] = augment(
            [sample.picture for sample in samples], self.image_size, self.config.augment, draws
        )
        pixels = torch.from_numpy(np.stack([np.asarray(self._fit(picture)) for picture in pictures]))
        return pixels.permute(0, 3, 1, 2).contiguous()

    def _piece_of_trunk(self, step: int, first: int, rows: Int[np.ndarray, " b"], trunk: TrunkOutputs) -> TrainingBatch:
        """Return samples with the pictures of those alone whose trunk's output is not kept yet."""
        import torch

        places, captions = np.searchsorted(self.rows.numpy(), rows), self._opened.captions(rows, self.config.captions)
        tokens, fresh = np.stack(self._tokens(captions)).astype(np.int64), ~trunk.has(places)
        images, texts = torch.empty(0), None
        if fresh.any():
            draws = draws_of(self.config.seed, step, first, first + len(rows))[fresh]
            images = self._pixels(self._samples(rows[fresh]), draws)
        else:
            images, texts = trunk.read(places, trunk.lengths(tokens))
        return TrainingBatch(
            images=images,
            tokens=torch.from_numpy(tokens),
            extras=self._extras(rows, [_hash(caption) for caption in captions]),
            texts=texts,
            places=torch.from_numpy(places),
            fresh=torch.from_numpy(fresh),
        )

    def _extras(self, rows: Int[np.ndarray, " b"], caption_ids: Sequence[int]) -> dict[str, Tensor]:
        """Return what the objective reads besides."""
        import torch

        read = self._opened.read(self.columns, rows) if self.columns else {}
        extras = {name: torch.tensor(values) for name, values in read.items()}
        if self.caption_ids:
            extras[CAPTION_IDS] = torch.tensor(caption_ids, dtype=torch.int64)
        return extras

    def batches(
        self, steps: range, finish: Callable[[TrainingBatch], TrainingBatch] | None = None
    ) -> Iterator[tuple[TrainingBatch, float]]:
        """Yield this process's part of each step's batch, and the seconds that the caller waited for it.

        Args:
            steps: Steps.
            finish: What is done with each piece of a batch in this thread, in the order of the steps.
        """
        import torch

        pieces: list[TrainingBatch] = []
        waited = 0.0
        for piece, seconds in _timed(self._pieces(_Pieces(self, steps))):
            pieces.append(piece if finish is None else finish(piece))
            waited += seconds
            if sum(len(piece.tokens) for piece in pieces) == self.config.batch_size // self.world_size:
                batch = TrainingBatch(
                    images=torch.cat([piece.images for piece in pieces]),
                    tokens=torch.cat([piece.tokens for piece in pieces]),
                    extras={name: torch.cat([piece.extras[name] for piece in pieces]) for name in pieces[0].extras},
                    texts=_of_one_length([piece.texts for piece in pieces if piece.texts is not None]),
                )
                pieces.clear()  # before the step, which takes its time, not after it
                del piece
                yield batch, waited
                waited = 0.0

    def _pieces(self, pieces: _Pieces) -> Iterator[TrainingBatch]:
        workers = self.config.engine.workers
        if workers == 0:
            yield from _ahead(pieces.__getitem__, range(len(pieces)))
            return
        from torch.utils.data import DataLoader

        for shared in (self.rows, self.probability, self.groups):
            if shared is not None:
                shared.share_memory_()  # type: ignore[no-untyped-call]
        loader: DataLoader[Any] = DataLoader(
            pieces,  # type: ignore[arg-type]
            batch_size=None,
            num_workers=workers,
            prefetch_factor=PREFETCH_PIECES,
            multiprocessing_context="forkserver",
            worker_init_fn=_start_worker,
        )
        yield from map(_checked, loader)

    def _fit(self, picture: Image) -> Image:
        """Bring a picture to the model's size as open_clip does for inference, unless a crop has done so."""
        from torchvision.transforms import ToTensor

        if picture.size == self.image_size and picture.mode == "RGB":
            return picture
        for transform in self.preprocess.transforms:
            if isinstance(transform, ToTensor):
                break
            picture = transform(picture)
        return picture


@dataclass(frozen=True)
class _Pieces:
    """The pieces of the batches of some steps, by number, as PyTorch's loader wants them."""

    feed: Feed
    steps: range

    @property
    def _share(self) -> int:
        return self.feed.config.batch_size // self.feed.world_size

    @property
    def _per_step(self) -> int:
        return -(-self._share // PIECE_SAMPLES)

    def __len__(self) -> int:
        return len(self.steps) * self._per_step

    def __getitem__(self, index: int) -> TrainingBatch | ModeclipError:
        step, part = divmod(index, self._per_step)
        start = self.feed.rank * self._share
        first = start + part * PIECE_SAMPLES
        try:
            return self.feed.piece(self.steps[step], first, min(first + PIECE_SAMPLES, start + self._share))
        except ModeclipError as error:  # raised in a worker it would come out with a traceback in its text
            return error


def _start_worker(_: int) -> None:
    """Make a worker compute in one thread and end with the trainer, which may save a checkpoint first."""
    import torch

    end_with_owner()
    for number in (signal.SIGINT, signal.SIGHUP):  # Ctrl-C and a closed terminal reach it too
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


def _of_one_length(states: Sequence[Tensor]) -> Tensor | None:
    """Join (b, T, W) states, with zeros behind those that are shorter; None if there are none."""
    import torch

    if len(states) < 2:
        return states[0] if states else None
    longest = max(part.shape[1] for part in states)
    return torch.cat([torch.nn.functional.pad(part, (0, 0, 0, longest - part.shape[1])) for part in states])


def _hash(caption: str) -> int:
    return int.from_bytes(hashlib.blake2b(caption.encode(), digest_size=8).digest(), signed=True)


def _ahead(load: Callable[[int], TrainingBatch | ModeclipError], numbers: range) -> Iterator[TrainingBatch]:
    """Yield ``load`` of each number in order, while threads load the next few."""
    with ThreadPoolExecutor(PREFETCH_THREADS) as pool:
        waiting: deque[Future[TrainingBatch | ModeclipError]] = deque()
        try:
            for number in numbers:
                waiting.append(pool.submit(load, number))
                if len(waiting) >= PREFETCH_PIECES:
                    yield _checked(waiting.popleft().result())
            while waiting:
                yield _checked(waiting.popleft().result())
        finally:
            for future in waiting:
                future.cancel()


def _checked(piece: TrainingBatch | ModeclipError) -> TrainingBatch:
    if isinstance(piece, ModeclipError):
        raise piece
    return piece


def _timed(values: Iterator[TrainingBatch]) -> Iterator[tuple[TrainingBatch, float]]:
    while True:
        started = time.monotonic()
        try:
            value = next(values)
        except StopIteration:
            return
        yield value, time.monotonic() - started
