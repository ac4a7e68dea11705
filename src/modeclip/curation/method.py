"""What a curation method is: a config, global statistics, and work on blocks of rows that decides about each pair.

A method is asked once for its `Work`: it counts over the whole pool, trains or loads a model, finds its threshold. Then
the work decides block by block, and gives each pair a cause: 0 if it is kept, else why it is not. Nothing is deleted:
the decisions become columns, whose names begin with the name of the curation.

    NAME_cause        uint8: 0 kept, 1 and more the method's causes in their order, 255 not looked at
    NAME_kept         bool: the cause is 0
    NAME_probability  float32 in [0, 1], of methods that draw afresh at every pass of training
    NAME_score        float32, of methods that rank
    NAME_caption      string, of methods that change captions

A new method is a file with a config that has ``prepare``, and a line in `modeclip.curation.curating.METHODS`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Shaped

from modeclip.data.catalog import Catalog
from modeclip.data.mapping import POSITION, Work

KEPT, OUTSIDE = 0, 255
"""Causes of a pair that is kept, and of one outside of the selection that was curated."""
MAX_CAUSES = 254


@dataclass(frozen=True, kw_only=True)
class Table:
    """Figures for people: what a method has found out about the pool."""

    title: str
    """What it shows, with the unit."""
    columns: tuple[str, ...]
    """Headings; the first column names the rows."""
    rows: tuple[tuple[str, ...], ...]
    """Cells as they are shown."""


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """How many pairs have which value."""

    title: str
    """What is counted, with the unit."""
    edges: tuple[float, ...]
    """Edges of the bins, one more than there are counts."""
    counts: tuple[int, ...]
    """Pairs in each bin."""
    kept: tuple[float, ...] | None = None
    """Of these the pairs that are kept, if that is known; where each pass of training draws, those to be expected."""
    threshold: float | None = None
    """Where the method divides the values, if it does."""
    is_log: bool = False
    """Whether the horizontal axis is logarithmic."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What other settings would have done."""

    title: str
    """What is drawn."""
    x: tuple[float, ...]
    """Values of the setting, ascending."""
    lines: dict[str, tuple[float, ...]]
    """For each line its name and its values."""
    x_label: str
    """The setting."""
    is_log: bool = False
    """Whether the horizontal axis is logarithmic."""
    chosen: float | None = None
    """The setting that was used."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a method is given to prepare itself."""

    catalog: Catalog
    """The pool."""
    name: str
    """What the names of the columns begin with."""
    selected: Bool[np.ndarray, " N"] | None
    """The rows that are curated; None if all are."""
    selection: Any
    """What chose these rows, as JSON."""
    ray: bool = False
    """Whether to compute on Ray."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a method decides with, once it knows the whole pool."""

    work: Work
    """Returns ``NAME_cause`` for a block of rows, and whatever else the method adds. The decision about a pair does not
    depend on the block that it stands in."""
    causes: tuple[str, ...]
    """Why a pair is dropped, in words; the first is cause 1."""
    tables: tuple[Table, ...] = ()
    """What was found out about the pool."""
    charts: tuple[Histogram | Curve, ...] = ()
    """The same in pictures."""


@runtime_checkable
class Method(Protocol):
    """A config that can prepare its method."""

    method: ClassVar[str]
    """What the method is called on the command line and in recipes."""

    def prepare(self, context: Context) -> Prepared:
        """Look at the pool, and return what decides about each pair.

        Raises:
            ModeclipError: The settings do not fit the pool.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Decided(Work):
    """Decisions that were made for the whole pool at once, as work that looks them up."""

    values: dict[str, Shaped[np.ndarray, "N *_"]]
    """What is to become of each row of the catalog, by the names of the columns."""
    facts: dict[str, Any]
    """What decided it."""
    unit: str = "pairs"
    inputs = (POSITION,)

    @property
    def outputs(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the columns."""
        return tuple(self.values)

    def __call__(self, block: dict[str, Shaped[np.ndarray, "n *_"]]) -> dict[str, Shaped[np.ndarray, "n *_"]]:
        """Return the decisions about a block's rows."""
        return {name: values[block[POSITION]] for name, values in self.values.items()}


def draw(seed: int, *identities: Sequence[str], purpose: str | None = None) -> Float[np.ndarray, " n"]:
    """Return a random number in [0, 1) for each pair, which depends on the seed and on the pair alone.

    So a draw is the same in whatever order, blocks and processes pairs are looked at, and whatever pairs are added.

    Args:
        seed: Decides all draws.
        identities: What identifies the pairs, such as their keys and their captions, each of length n.
        purpose: What is drawn. Draws for different purposes are independent at the same seed; with the same purpose,
            pairs that an earlier draw has kept are those with small numbers in a later one.

    Examples:
        >>> bool((draw(0, ["a", "b"]) == draw(0, ["b", "a"])[::-1]).all())
        True
    """
    state = hashlib.blake2b(seed.to_bytes(8, "little"), digest_size=8)
    if purpose is not None:
        state.update(len(purpose.encode()).to_bytes(8, "little") + purpose.encode())
    numbers = np.empty(len(identities[0]), np.uint64)
    for place, identity in enumerate(zip(*identities, strict=True)):
        one = state.copy()
        for text in identity:
            content = text.encode()
            one.update(len(content).to_bytes(8, "little") + content)
        numbers[place] = int.from_bytes(one.digest(), "little")
    return (numbers >> np.uint64(11)) * 2.0**-53
