"""What a model under change is judged by: zero-shot tasks for a CLIP in memory, and a held-out part of an own set.

Fine-tuning and averaging score the same model again and again while its weights change. `Examiner` decodes and
normalises the pictures of its tasks once, as far as they fit into ``CACHE_BYTES``, and hands the vectors to the same
`modeclip.evaluation.evaluate.answer` that compares finished models.

`split_rows` divides an own set into rows to train on and rows to be judged by, so that no image is on both sides.
Copies of an image (equal bytes) and all of its captions stay together. Where a class or a group is held out that shares
an image with another one, that image is left out of training, and so is one that a general task shows. Images that were
scaled or encoded anew are recognised as copies by ``similar`` alone (`modeclip.data.holdout`).

Source: CLIP (arXiv 2103.00020, Sec. 3.1): the class whose text has the highest cosine with the image.
Price: one pass of the image tower over all images and one of the text tower over all class names, each time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Int

from modeclip.data.catalog import Catalog
from modeclip.data.holdout import dhash, group_similar, identify
from modeclip.data.selection import ALL, Selection
from modeclip.data.sources.options import parse_holdout
from modeclip.data.tasks.task import CatalogImages, Task, catalog_tasks
from modeclip.errors import ModeclipError
from modeclip.evaluation.evaluate import answer
from modeclip.evaluation.intervals import Outcome
from modeclip.evaluation.similarity import Similarity
from modeclip.models.clip import Clip, encode_image, without_gradients
from modeclip.models.features import class_features

if TYPE_CHECKING:
    import torch

CACHE_BYTES = 1 << 30
"""Memory for normalised pictures: 1,780 of 224 x 224 pixels, or 87,000 icons of 32 x 32."""
HOLDOUT_STREAM = 7_000_001
"""Key of the random stream that draws what is held out, far from those of training."""

HOLDOUT_UNITS = ("image", "similar", "class", "group")
"""What may be held out."""
IMAGES_AT_ONCE = 256
"""Images that are decoded at a time for their dHashes."""


class Examiner:
    """Tasks that are put to one model after another, all of them with the same preprocessing."""

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        templates: Sequence[str] = ("{}",),
        batch_size: int = 256,
    ) -> None:
        """Keep what is asked; nothing is read before the first model comes.

        Args:
            tasks: Classification tasks.
            templates: Prompts with ``{}`` where the class name goes.
            batch_size: Images encoded at a time.
        """
        self.tasks = tuple(tasks)
        self._templates, self._batch_size = tuple(templates), batch_size
        self._cache: dict[tuple[int, int], torch.Tensor] = {}
        self._room = CACHE_BYTES

    def examine(self, clip: Clip) -> dict[str, Outcome]:
        """Return by task what a model answers as it is now."""
        import torch

        found = {}
        device = next(clip.model.parameters()).device
        was_training = clip.model.training
        clip.model.eval()
        with without_gradients():
            for index, task in enumerate(self.tasks):
                texts = class_features(clip, task.classnames, self._templates)
                images = torch.cat([encode_image(clip.model, batch.to(device)) for batch in self._batches(index, clip)])
                vectors = [rows.float().cpu().numpy() for rows in (images, texts)]
                similarity = Similarity(images=vectors[:1], texts=vectors[1:], weights=np.ones(1))
                found[task.name] = answer(task, similarity)
        clip.model.train(was_training)
        return found

    def _batches(self, index: int, clip: Clip) -> Iterator[torch.Tensor]:
        images = self.tasks[index].images
        for start in range(0, len(images), self._batch_size):
            batch = self._cache.get((index, start))
            if batch is None:
                rows = np.arange(start, min(start + self._batch_size, len(images)))
                batch = clip.images(images.read(rows))
                size = batch.numel() * batch.element_size()
                if size <= self._room:
                    self._room -= size
                    self._cache[index, start] = batch
            yield batch


def open_tasks(path: str, templates: Sequence[str], batch_size: int, selection: Selection = ALL) -> Examiner:
    """Open the zero-shot tasks of a task catalog, such as ``tasks.lance`` of a run, or of the selected part of it.

    Raises:
        ModeclipError: There is no catalog, or it holds no tasks.
    """
    catalog = selection.part_of(Catalog.open(path))
    tasks = catalog_tasks(catalog) if "task" in catalog.columns else []
    if not tasks:
        raise ModeclipError(f"{path} holds no tasks; give the tasks.lance that `modeclip index --tasks` writes")
    return Examiner(tasks, templates=templates, batch_size=batch_size)


@dataclass(frozen=True, kw_only=True)
class Split:
    """Which rows of an own set are trained on, and which are held out."""

    train: Int[np.ndarray, " n"]
    """Rows that are trained on, ascending."""
    held_out: Int[np.ndarray, " m"]
    """Rows that are classified and never trained on, ascending."""
    num_duplicates: int
    """How many rows are neither, because their image is the same as one held out or in a task."""


def split_rows(
    catalog: Catalog,
    holdout: str,
    fraction: float,
    seed: int,
    *,
    tasks: Sequence[Task] = (),
    captions: str | None = None,
) -> Split:
    """Choose which rows of an own set are held out. The same catalog and arguments give the same choice.

    Args:
        catalog: The own set.
        holdout: What is held out as a whole: ``image`` (the same share of each class), ``similar`` (images with their
            near-duplicates), ``class`` (distinct captions), ``group`` or ``group=COLUMN``.
        fraction: Share of the units that is held out, in (0, 1).
        seed: Seed of the draw.
        tasks: General tasks, whose images are not trained on.
        captions: Column that replaces the captions, and so the classes, where it has a text.

    Raises:
        ModeclipError: The set is too small to be split, what is left has a single caption, or there is no such column.
    """
    unit, column = parse_holdout(holdout, HOLDOUT_UNITS, "finetune.holdout")
    labels = _number(catalog.captions(None, captions))
    known_by = identities(catalog)
    images = _number(known_by)
    if unit == "class":
        units = labels
    elif unit == "group":
        values = zip(catalog.read([column])[column], known_by, strict=True)  # without a value, an image counts alone
        units = _number([f"of {value}" if value not in (None, "") else f"by {own.hex()}" for value, own in values])
    else:
        units = images if unit == "image" else _similar(catalog, images)
    if (count := len(np.unique(units))) < 2:
        words = {"image": "images", "similar": "groups of similar images", "class": "classes", "group": "groups"}[unit]
        raise ModeclipError(f"finetune: {catalog.path} has {count} {words}, expected at least 2 to hold one out")
    strata = labels if unit in ("image", "similar") else np.zeros_like(labels)
    held_out = draw_units(units, strata, fraction, seed)
    general = {digest for task in tasks for digest in task.images.digests()}
    is_elsewhere = np.array([identity in general for identity in known_by])
    copies = (np.isin(images, images[held_out]) | is_elsewhere) & ~held_out
    train = np.flatnonzero(~held_out & ~copies)
    if len(train) < 2 or len(np.unique(labels[train])) < 2:
        raise ModeclipError(
            f"finetune: {len(train):,} pairs with {len(np.unique(labels[train])):,} captions are left to train on, "
            "expected at least 2 of each (a pair needs a negative); add data or hold out less"
        )
    return Split(train=train, held_out=np.flatnonzero(held_out), num_duplicates=int(copies.sum()))


def draw_units(
    units: Int[np.ndarray, " N"], strata: Int[np.ndarray, " N"], fraction: float, seed: int
) -> Bool[np.ndarray, " N"]:
    """Draw the same share of units from each stratum at random, and return a mask of the rows of these units.

    This is systematic sampling: the units are put in a row, stratum by stratum and in random order within each, and one
    in 1 / fraction is taken. So every stratum gives its share of units, rounded up or down.

    Args:
        units: Number of each row's unit; the rows of a unit stay together.
        strata: Number of each row's stratum; a unit belongs to the stratum of its first row.
        fraction: Share of the units, in (0, 1). At least one unit is drawn, and at least one is not.
        seed: Seed of the draw.
    """
    values, first, inverse = np.unique(units, return_index=True, return_inverse=True)
    draw = np.random.Generator(np.random.Philox(key=[seed, HOLDOUT_STREAM]))
    place_of_stratum = draw.permutation(int(strata.max()) + 1)
    order = np.lexsort((draw.random(len(values)), place_of_stratum[strata[first]]))
    ends = np.floor(np.arange(len(values) + 1) * fraction + draw.random())
    taken = np.diff(ends) > 0
    taken[0] |= not taken.any()
    taken[0] &= not taken.all()
    chosen = np.zeros(len(values), bool)
    chosen[order[taken]] = True
    return chosen[inverse]


def own_task(catalog: Catalog, split: Split, captions: str | None = None) -> Task:
    """Return the held-out rows as a task. Its classes are all distinct captions of the own set."""
    texts = np.array(catalog.captions(None, captions)).astype(str)
    classnames, labels = np.unique(texts, return_inverse=True)
    return Task(
        name="own set",
        kind="classification",
        images=CatalogImages(catalog=catalog, rows=split.held_out),
        classnames=tuple(classnames.tolist()),
        labels=labels[split.held_out],
        source=catalog.path,
    )


def identities(catalog: Catalog) -> list[bytes]:
    """Return what the image of each row is known by: the hash of its bytes or, in an object store, where it lies."""
    columns = catalog.read(["digest", "path", "offset"])
    digests = columns["digest"]
    if len(unknown := np.flatnonzero([digest is None for digest in digests])):
        digests[unknown] = catalog.digests(unknown)
    return identify(digests.tolist(), columns["path"].tolist(), columns["offset"].tolist())


def _similar(catalog: Catalog, images: Int[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
    """Return a number for each row that is equal for near-duplicates; each image is decoded once."""
    _, first, inverse = np.unique(images, return_index=True, return_inverse=True)
    hashes = [
        dhash(picture)
        for start in range(0, len(first), IMAGES_AT_ONCE)
        for picture in catalog.images(first[start : start + IMAGES_AT_ONCE])
    ]
    return group_similar(np.array(hashes, np.uint64))[inverse]


def _number(values: Sequence[object] | np.ndarray) -> Int[np.ndarray, " N"]:
    """Return the number of each row's value among the distinct ones."""
    number_of = {value: number for number, value in enumerate(sorted(set(values)))}
    return np.array([number_of[value] for value in values], np.int64)
