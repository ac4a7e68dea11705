"""A small own set -> the rows to train on and the rows to be judged by, with no image on both sides.

Copies of an image (equal ``digest``) stay together, or are left out of training where a class or group is held out
that another one shares an image with. Images that were scaled or encoded anew are not recognised as copies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Int

from modeclip.data.catalog import Catalog
from modeclip.data.tasks.task import CatalogImages, Task
from modeclip.errors import ModeclipError

HOLDOUT_STREAM = 7_000_001  # key of the random stream of the draw, far from those of training
Unit = Literal["image", "class", "group"]


@dataclass(frozen=True, kw_only=True)
class Split:
    """The rows of an own set by what they are for."""

    train: Int[np.ndarray, " n"]
    """Trained on, ascending."""
    held_out: Int[np.ndarray, " m"]
    """Classified, never trained on, ascending."""
    num_duplicates: int
    """Rows that are neither: the same image as one held out."""


def split_rows(catalog: Catalog, unit: Unit, fraction: float, seed: int) -> Split:
    """Choose what of an own set is held out; a function of the catalog's content and the arguments alone.

    Args:
        catalog: The own set.
        unit: What is held out as a whole: images (the same share of each class), classes (distinct captions), groups.
        fraction: Share of the units that is held out, in (0, 1).
        seed: Of the draw.

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
    """Draw a share of the units at random, the same share of each stratum; return the rows of the units drawn.

    Units are put in a row, stratum by stratum, at random within each, and every 1 / fraction-th is taken: systematic
    sampling, which spares large strata no unit more or less than their share rounded up or down.

    Args:
        units: Number of each row's unit; the rows of a unit stay together.
        strata: Number of each row's stratum; that of a unit's first row counts.
        fraction: Share of the units, in (0, 1); at least one unit is drawn, and one is not.
        seed: Of the draw.
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
    """Return the held-out rows as a task whose classes are all distinct captions of the own set."""
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
    """Return a number for each row, the same for the same image: by its hash, or by the key where it has none."""
    names: list[Any] = [
        digest.hex() if digest is not None else f"key {key}" for digest, key in zip(digests, keys, strict=True)
    ]
    return _number(np.array(names))
