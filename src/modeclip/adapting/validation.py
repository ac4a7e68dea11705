"""What a model under change is judged by: zero-shot tasks for a CLIP in memory, and a held-out part of an own set.

Fine-tuning and averaging score the same model again and again while its weights change. `Examiner` decodes and
normalises the pictures of its tasks once, as far as they fit into ``CACHE_BYTES``, and hands the vectors to the same
`modeclip.evaluation.evaluate.answer` that compares finished models.

`split_rows` divides an own set into rows to train on and rows to be judged by, so that no image is on both sides.
Copies of an image (equal ``digest``) stay together. Where a class or a group is held out that shares an image with
another one, that image is left out of training. Images that were scaled or encoded anew are not recognised as copies.

Source: CLIP (arXiv 2103.00020, Sec. 3.1): the class whose text has the highest cosine with the image.
Price: one pass of the image tower over all images and one of the text tower over all class names, each time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Bool, Int

from modeclip.data.catalog import Catalog
from modeclip.data.tasks.task import CatalogImages, Task, catalog_tasks
from modeclip.errors import ModeclipError
from modeclip.evaluation.evaluate import answer
from modeclip.evaluation.intervals import Outcome
from modeclip.evaluation.similarity import Similarity
from modeclip.models.clip import Clip, encode_image
from modeclip.models.features import class_features

if TYPE_CHECKING:
    import torch

CACHE_BYTES = 1 << 30
"""Memory for normalised pictures: 1,780 of 224 x 224 pixels, or 87,000 icons of 32 x 32."""
HOLDOUT_STREAM = 7_000_001
"""Key of the random stream that draws what is held out, far from those of training."""

HoldoutUnit = Literal["image", "class", "group"]


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
        with torch.inference_mode():
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


def open_tasks(path: str, templates: Sequence[str], batch_size: int) -> Examiner:
    """Open the zero-shot tasks of a task catalog, such as ``tasks.lance`` of a run.

    Raises:
        ModeclipError: There is no catalog, or it holds no tasks.
    """
    catalog = Catalog.open(path)
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
    """How many rows are neither, because their image is the same as one held out."""


def split_rows(catalog: Catalog, unit: HoldoutUnit, fraction: float, seed: int) -> Split:
    """Choose which rows of an own set are held out. The same catalog and arguments give the same choice.

    Args:
        catalog: The own set.
        unit: What is held out as a whole: images (the same share of each class), classes (distinct captions), groups.
        fraction: Share of the units that is held out, in (0, 1).
        seed: Seed of the draw.

    Raises:
        ModeclipError: The set is too small to be split, or what is left has a single caption.
    """
    columns = catalog.read(["key", "caption", "digest", "group"])
    images, labels = _identify(columns["digest"], columns["key"]), _number(columns["caption"])
    units = {"image": images, "class": labels, "group": _number(columns["group"])}[unit]
    if (count := len(np.unique(units))) < 2:
        words = {"image": "images", "class": "classes", "group": "groups"}[unit]
        raise ModeclipError(f"finetune: {catalog.path} has {count} {words}, expected at least 2 to hold one out")
    strata = labels if unit == "image" else np.zeros_like(labels)
    held_out = draw_units(units, strata, fraction, seed)
    copies = np.isin(images, images[held_out]) & ~held_out
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


def own_task(catalog: Catalog, split: Split) -> Task:
    """Return the held-out rows as a task. Its classes are all distinct captions of the own set."""
    captions = catalog.read(["caption"])["caption"].astype(str)
    classnames, labels = np.unique(captions, return_inverse=True)
    return Task(
        name="own set",
        kind="classification",
        images=CatalogImages(catalog=catalog, rows=split.held_out),
        classnames=tuple(classnames.tolist()),
        labels=labels[split.held_out],
        source=catalog.path,
    )


def _number(values: np.ndarray) -> Int[np.ndarray, " N"]:
    """Return the number of each row's value among the distinct ones."""
    return np.unique(np.array([str(value) for value in values]), return_inverse=True)[1]


def _identify(digests: np.ndarray, keys: np.ndarray) -> Int[np.ndarray, " N"]:
    """Return a number for each row that is equal for equal images; a row without a hash is known by its key."""
    names: list[Any] = [
        digest.hex() if digest is not None else f"key {key}" for digest, key in zip(digests, keys, strict=True)
    ]
    return _number(np.array(names))
