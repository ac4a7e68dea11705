"""What a newcomer does first with a finished run: look for held-out pictures by words, and name what they show.

Words are looked for in an index of the held-out pictures, which is built once and which `modeclip serve` then searches
too. For each word that is a caption there, one of its pictures is classified among all the words, with the expert that
answers and the captions that speak for it.

Price: each held-out picture goes through each expert once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from modeclip.data.catalog import Catalog
from modeclip.mixture.mode import MoDE
from modeclip.search.asking import SearchModel
from modeclip.search.index import Index, drop_outdated
from modeclip.search.query import Query
from modeclip.system.console import log
from modeclip.system.paths import RunPaths

HITS = 3
"""Pictures that are shown for each word."""


@dataclass(frozen=True, kw_only=True)
class Looked:
    """What words have found."""

    words: str
    """What was looked for."""
    captions: tuple[str, ...]
    """Captions of the hits, the best first."""
    expert: str
    """The expert that answered most of it."""
    weight: float
    """Its weight, in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class Named:
    """What a picture shows."""

    picture: str
    """Key of the picture."""
    caption: str
    """What it is called in its set."""
    answer: str
    """The class that was found."""
    probability: float
    """Its probability among the classes, in [0, 1]."""
    expert: str
    """The expert that answered most of it."""
    weight: float
    """Its weight, in [0, 1]."""
    near: tuple[str, ...]
    """Training captions of the fine cluster nearest to the class that was found."""


@dataclass(frozen=True, kw_only=True)
class FirstUse:
    """What was tried on the held-out pictures of a run."""

    pictures: int
    """Held-out pictures."""
    looked: tuple[Looked, ...]
    named: tuple[Named, ...]


def first_use(paths: RunPaths, words: tuple[str, ...]) -> FirstUse:
    """Look for words among the held-out pictures of a finished run, and classify a picture of each word.

    Args:
        paths: The run. It has held-out tasks and a bundle.
        words: What is looked for; they are also the classes.
    """
    tasks, index = Catalog.open(paths.tasks_path), held_out_index(paths)
    captions = tasks.read(["caption"])["caption"].astype(str)
    looked = tuple(_look(index, word) for word in words)
    return FirstUse(pictures=len(index), looked=looked, named=_name(paths, tasks, captions, words))


def held_out_index(paths: RunPaths) -> Index:
    """Return the index of a run's held-out pictures, built or brought up to date."""
    model = SearchModel.open(paths.bundle)
    if drop_outdated(paths.held_out_index, paths.tasks_path, model):
        log(f"{paths.bundle} has changed: encode the images of {paths.tasks_path} into {paths.held_out_index}")
    return Index.build(Catalog.open(paths.tasks_path), model, paths.held_out_index)


def _look(index: Index, words: str) -> Looked:
    found = index.search(Query(text=words), count=HITS)
    best = int(np.argmax(found.weights))
    return Looked(
        words=words,
        captions=tuple(hit.caption for hit in found.hits),
        expert=found.experts[best],
        weight=found.weights[best],
    )


def _name(paths: RunPaths, tasks: Catalog, captions: np.ndarray, words: tuple[str, ...]) -> tuple[Named, ...]:
    task = MoDE.load(paths.bundle).task(list(words), templates=["{}"])
    reasons = {reason.name: reason for reason in task.explain()}
    keys = tasks.read(["key"])["key"].astype(str)
    rows = [int(np.flatnonzero(captions == word)[0]) for word in words if (captions == word).any()]
    named = []
    for row, answer in zip(rows, task.classify(tasks.images(np.array(rows))), strict=True):
        reason = reasons[answer.classnames[0]]
        best = int(np.argmax(reason.weights))
        named.append(
            Named(
                picture=keys[row],
                caption=captions[row],
                answer=answer.classnames[0],
                probability=float(answer.probabilities[0]),
                expert=task.route.members[best],
                weight=reason.weights[best],
                near=reason.clusters[0].captions[:3],
            )
        )
    return tuple(named)
