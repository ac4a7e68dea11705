"""Classification among names that are known beforehand, of held-out images whose captions hold these names.

An image belongs to a name if its caption holds exactly one of them, as whole words in any case. A longer name hides the
shorter ones in it: "shopping cart" is no "cart". Each name that has images counts as much as any other, however
frequent.

Source: the pilot's question (docs/pilot.md), which recipes with ``experts.for_classes`` ask too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from modeclip.data.catalog import Catalog
from modeclip.data.tasks.task import CatalogImages, Task

CLASS_NAMES = "class names"
"""Name of the task."""
_WORD = re.compile(r"[^\W_]+")


def names_task(held: Catalog, rows: Int[np.ndarray, " N"], classnames: Sequence[str]) -> Task | None:
    """Return the classification of rows of a catalog among class names; None where no caption holds exactly one.

    Args:
        held: Catalog of what is held out.
        rows: Rows that may be asked.
        classnames: Names that differ in more than case and signs (`distinct_names`); there may be none.
    """
    labels = match_classes(held.read(["caption"], rows)["caption"].astype(str).tolist(), classnames)
    chosen = labels >= 0
    if not chosen.any():
        return None
    return Task(
        name=CLASS_NAMES,
        kind="classification",
        images=CatalogImages(catalog=held, rows=rows[chosen]),
        classnames=tuple(classnames),
        labels=labels[chosen],
        metric="mean_per_class_recall",
        source=held.path,
    )


def chance_of_names(task: Task) -> float:
    """Return what guessing reaches: always the same name of those that have images."""
    return 1 / len(np.unique(np.asarray(task.labels)))


def distinct_names(names: Sequence[str]) -> list[str]:
    """Return class names that differ in more than case and signs, each as it stands first.

    Examples:
        >>> distinct_names(["Hot-Dog", "cat", "hot dog"])
        ['Hot-Dog', 'cat']
    """
    labels = match_classes(names, names)
    return [name for row, name in enumerate(names) if labels[row] in (-1, row)]


def are_names(captions: Sequence[str], classnames: Sequence[str]) -> Bool[np.ndarray, " N"]:
    """Tell which captions are one of the class names and nothing else, in any case and with any signs.

    Examples:
        >>> are_names(["Shopping-Cart", "a cart", "dog"], ["dog", "shopping cart"]).tolist()
        [True, False, True]
    """
    known = {_words(name) for name in classnames} - {()}
    return np.array([_words(caption) in known for caption in captions], bool)


def match_classes(captions: Sequence[str], classnames: Sequence[str]) -> Int[np.ndarray, " N"]:
    """Return for each caption which one class name it holds, as whole words in any case; -1 for none and for several.

    Examples:
        >>> match_classes(["A red Shopping-Cart", "cart and dog", "carts"], ["cart", "shopping cart", "dog"]).tolist()
        [1, -1, -1]
    """
    names: dict[tuple[str, ...], int] = {}
    for index, name in enumerate(classnames):
        names.setdefault(_words(name), index)
    names.pop((), None)
    longest = max(map(len, names), default=0)
    labels = np.full(len(captions), -1, np.int64)
    for row, caption in enumerate(captions):
        words, found, place = _words(caption), set[int](), 0
        while place < len(words):
            lengths = range(min(longest, len(words) - place), 0, -1)
            taken = next((length for length in lengths if words[place : place + length] in names), 0)
            if taken:
                found.add(names[words[place : place + taken]])
            place += taken or 1
        if len(found) == 1:
            labels[row] = found.pop()
    return labels


def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text.casefold()))
