"""Chooses the training rows of an expert by the class names of tasks that are known beforehand.

Method: the names are embedded by the encoder that embedded the captions, and each name takes its nearest fine clusters.
One expert is trained on the rows of all of these clusters, which a column of booleans marks. Given the names of several
tasks, it serves all of them. Where a name takes no cluster, the rows are those whose caption is one of the names.

Source: MoDE (arXiv 2404.16030) Sec. 5.5, Tables 8 and 17. How many clusters a name takes is our choice: 1, as in
routing, unless another number is asked for. Rows by their captions are our own.
Price: one distance for each name and fine cluster, then a pass over the column ``fine_cluster``; or one over captions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int

from modeclip.clustering.clusters import Clustering
from modeclip.clustering.distances import nearest_centers
from modeclip.clustering.embedding import COLUMN
from modeclip.data.catalog import Catalog
from modeclip.data.prompts import is_file, read_classes
from modeclip.data.tasks.names import are_names
from modeclip.errors import ModeclipError
from modeclip.models.encoders import load_encoder

PREFIX = "prior_"
"""First part of the columns' names."""
LONGEST_NAME, LONGEST_WORD = 40, 30
"""Most letters of a selection's name, which also names a folder, and of the first class in a name that is cut short."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PriorSelection:
    """The fine clusters that a list of class names selects."""

    name: str
    """Name of the selection; its column is ``prior_NAME`` and its expert ``expert-NAME``."""
    classnames: tuple[str, ...]
    """The class names in their order, each once."""
    nearest: Int[np.ndarray, "L n"]
    """Fine clusters of each class name, the nearest first; none where captions that are names are selected."""
    clustering: str
    """Digest of the clustering that the fine clusters belong to."""

    @property
    def column(self) -> str:
        """Column of the catalog that marks the selected rows."""
        return PREFIX + self.name

    @property
    def fine(self) -> Int[np.ndarray, " m"]:
        """The selected fine clusters, ascending, each once."""
        return np.unique(self.nearest)

    @property
    def digest(self) -> str:
        """Hash of what decides which rows are selected, as hexadecimal digits."""
        decides = f"{self.clustering} {self.fine.tolist()}" if self.nearest.size else f"are {sorted(self.classnames)}"
        return sha256(decides.encode()).hexdigest()[:16]


def select_for_classes(
    catalog: Catalog,
    clustering: Clustering,
    classnames: Sequence[str],
    *,
    name: str,
    count: int = 1,
    encoder: str | None = None,
) -> PriorSelection:
    """Return the fine clusters nearest to class names.

    Args:
        catalog: The catalog; it knows which encoder embedded its captions.
        clustering: The clustering whose fine clusters are selected.
        classnames: Class names of one task or of several.
        name: Name of the selection, of letters, digits and ``_``.
        count: Fine clusters for each class name; 0: captions that are one of the names are selected.
        encoder: Name of the catalog's encoder by whoever asks, which is needed if it is Python code.

    Raises:
        ModeclipError: There are no class names or too few fine clusters, or the encoder of the captions does not embed
            texts.
    """
    names = tuple(dict.fromkeys(classnames))
    if not names:
        raise ModeclipError(f"prior {name}: there are no class names; give a file with one on each line")
    if not 0 <= count <= clustering.num_fine:
        raise ModeclipError(f"nearest: expected 0 to {clustering.num_fine}, the number of fine clusters, got {count}")
    if not re.fullmatch(r"\w+", name):
        raise ModeclipError(f"prior {name!r}: expected a name of letters, digits and _")
    if count == 0:
        none = np.empty((len(names), 0), np.int64)
        return PriorSelection(name=name, classnames=names, nearest=none, clustering=clustering.digest)
    facts = catalog.facts(COLUMN)
    if facts is None:
        raise ModeclipError(
            f"catalog {catalog.path!r} does not say which encoder made {COLUMN}: embed its captions again"
        )
    own = str(facts["encoder"])
    vectors = load_encoder(own, trust_encoder=own == encoder).encode(names)
    nearest = nearest_centers(vectors, clustering.fine_centers, count)[0]
    return PriorSelection(name=name, classnames=names, nearest=nearest, clustering=clustering.digest)


def mark_prior(catalog: Catalog, selection: PriorSelection) -> int:
    """Add the column of a selection, unless the catalog has it, and return how many rows it marks.

    Raises:
        ModeclipError: The rows are not assigned to this clustering, or no caption is one of the names.
    """
    if "fine_cluster" not in catalog.columns:
        raise ModeclipError(f"catalog {catalog.path!r} has no column fine_cluster: cluster its captions first")
    facts = {"prior": selection.digest, "fine": selection.fine.tolist(), "classes": len(selection.classnames)}
    has_it = selection.column in catalog.columns and catalog.facts(selection.column) == facts
    if not has_it:
        marks = list(_marks(catalog, selection))
        if not any(block[selection.column].any() for block in marks):
            raise ModeclipError(
                f"prior {selection.name}: no caption is one of the {len(selection.classnames):,} class names; with "
                "nearest: 1 the clusters nearest to the names are taken"
            )
        catalog.add_columns(iter(marks), facts)
    return len(catalog.select(mask=selection.column))


def _marks(catalog: Catalog, selection: PriorSelection) -> Iterator[dict[str, Bool[np.ndarray, " n"]]]:
    if selection.nearest.size:
        for block in catalog.batches(["fine_cluster"]):
            yield {selection.column: np.isin(block["fine_cluster"], selection.fine)}
    else:
        for block in catalog.batches(["caption"]):
            yield {selection.column: are_names(block["caption"].astype(str).tolist(), selection.classnames)}


def read_names(sources: Sequence[str]) -> list[str]:
    """Return the class names in files (one on each line) and in lists with commas, each once.

    Raises:
        ModeclipError: A file cannot be read, or there are no names.
    """
    return list(dict.fromkeys(name for source in sources for name in read_classes(source)))


def name_of(sources: Sequence[str]) -> str:
    """Make the name of a selection from the files or lists that its class names came from.

    Examples:
        >>> name_of(["tasks/food-101.txt", "tasks/pets.txt"])
        'food_101_pets'
        >>> name_of(["arrow,calendar,cloud,file,folder,heart,home,lock"])
        'arrow_and_7_more'
    """
    words = []
    for source in sources:
        is_path = is_file(Path(source)) or Path(source).suffix
        words += [Path(source).stem] if is_path else [word for word in source.split(",") if word.strip()]
    name = _plain("_".join(words))
    if len(name) > LONGEST_NAME:
        first, others = _plain(words[0])[:LONGEST_WORD].rstrip("_"), len(words) - 1
        name = f"{first or 'classes'}_and_{others}_more" if others else name[:LONGEST_NAME].rstrip("_")
    return name or "classes"


def _plain(text: str) -> str:
    return re.sub(r"\W+", "_", text, flags=re.ASCII).strip("_")
