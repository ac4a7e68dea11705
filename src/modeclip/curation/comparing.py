"""Compares two selections of a catalog's pairs: how far they overlap, and what only one of them keeps.

A selection is a curation, a column of booleans or a list of ids. Next to the overlap stands what two selections of the
same sizes would share if they had nothing to do with each other.

Price: a pass over each selection, and that of `modeclip.curation.surveying`. Memory: a few bytes for each pair.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from modeclip.curation.surveying import Block, Group, Part, Survey, survey
from modeclip.data.catalog import Catalog
from modeclip.data.selection import Selection
from modeclip.errors import LIMIT, ModeclipError, unknown

BOTH, ONLY_FIRST, ONLY_SECOND, NEITHER = range(4)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How two selections of a catalog differ; ``dataclasses.asdict`` makes JSON of it."""

    catalog: str
    """Path of the catalog."""
    names: tuple[str, str]
    """The two selections, as they were given."""
    num_pairs: int
    """Pairs of the catalog."""
    counts: tuple[int, int]
    """Pairs of each selection."""
    jaccard: float
    """Pairs of both by those of at least one of them, in [0, 1]; 1 if neither has any."""
    jaccard_by_chance: float
    """The same to be expected of two selections of these sizes that have nothing to do with each other."""
    groups: tuple[Group, Group, Group, Group]
    """Pairs that both keep, only the first, only the second, and neither."""
    survey: Survey
    """All pairs, and what each of the two keeps, as its sides."""

    @property
    def sentence(self) -> str:
        """The result in one sentence."""
        both, first, second = (group.count for group in self.groups[:3])
        one, other = self.survey.sides[1:]
        return (
            f"{one} keeps {self.counts[0]:,} and {other} {self.counts[1]:,} of {self.num_pairs:,} pairs: both keep"
            f" {both:,}, only {one} {first:,}, only {other} {second:,} (Jaccard index {self.jaccard:.3f},"
            f" {self.jaccard_by_chance:.3f} by chance)."
        )


def compare(catalog: Catalog, first: str, second: str, *, seed: int = 0) -> Comparison:
    """Compare two selections.

    Args:
        catalog: The catalog.
        first: Name of a curation (of its columns ``NAME_kept``), a column of booleans, or a .npy list of ids.
        second: Another one.
        seed: Decides the examples and the samples.

    Raises:
        ModeclipError: There is no such selection, it has no pair, or the seed is negative.
    """
    if not 0 <= seed < LIMIT:
        raise ModeclipError(f"compare: expected a seed of 0 or more (and below 2^63), got {seed}")
    names = (first, second)
    kept = {f"{place}": selected(catalog, name) for place, name in enumerate(names)}
    counts = (int(kept["0"].sum()), int(kept["1"].sum()))

    def look(block: Block) -> Part:
        one, other = block["0"], block["1"]
        groups = np.where(one, np.where(other, BOTH, ONLY_FIRST), np.where(other, ONLY_SECOND, NEITHER))
        weights = np.stack([np.ones(len(one)), one, other], 1).astype(np.float64)
        return Part(groups=groups.astype(np.uint8), weights=weights)

    labels = names if first != second else (f"{first} (1)", f"{second} (2)")
    totals = {"all pairs": float(len(catalog)), labels[0]: float(counts[0]), labels[1]: float(counts[1])}
    found, pairs = survey(catalog, look, totals, columns=tuple(kept), values=kept, seed=seed)
    both = int((kept["0"] & kept["1"]).sum())
    sizes = (both, counts[0] - both, counts[1] - both, len(catalog) - counts[0] - counts[1] + both)
    words = ("both keep", f"only {labels[0]} keeps", f"only {labels[1]} keeps", "neither keeps")
    groups = [
        Group(name=words[code], count=size, share=size / max(len(catalog), 1), pairs=pairs.get(code, ()))
        for code, size in enumerate(sizes)
    ]
    chance = counts[0] * counts[1] / max(len(catalog), 1)
    return Comparison(
        catalog=str(catalog.path),
        names=names,
        num_pairs=len(catalog),
        counts=counts,
        jaccard=both / max(sum(counts) - both, 1),
        jaccard_by_chance=chance / max(sum(counts) - chance, 1),
        groups=(groups[0], groups[1], groups[2], groups[3]),
        survey=found,
    )


def selected(catalog: Catalog, name: str) -> Bool[np.ndarray, " N"]:
    """Return for each pair whether it is in a selection, given as for `compare`.

    Raises:
        ModeclipError: There is no such selection, or it has no pair.
    """
    if name.endswith(".npy"):
        return Selection(mask=name).mask_of(catalog)
    column = f"{name}_kept" if f"{name}_kept" in catalog.columns else name
    if column not in catalog.columns:
        known = [known for known in catalog.columns if catalog.type_of(known) == "bool"]
        raise unknown(f"selection of {catalog.path!r}", name, [*known, "FILE.npy"])
    if catalog.type_of(column) != "bool":
        raise ModeclipError(
            f"compare: column {column!r} holds {catalog.type_of(column)}; expected the name of a curation, a column of"
            " booleans or a .npy list of ids"
        )
    return Selection(mask=column).mask_of(catalog)
