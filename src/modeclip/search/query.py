"""What is looked for in an index, what is found, and how an index answers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from modeclip.errors import ModeclipError

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How an index answers."""

    exact_up_to: int = 1_000_000
    """Rows up to which every query is compared with all of them. Above, an approximate index is built too."""
    recall: float = 0.95
    """Least share of the ten best rows that the approximate index must find; if it cannot, searches stay exact."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.exact_up_to < 0:
            raise ModeclipError(f"exact_up_to: expected 0 or more rows, got {self.exact_up_to}")
        if not 0 < self.recall <= 1:
            raise ModeclipError(f"recall must lie in (0, 1], got {self.recall}")


@dataclass(frozen=True, kw_only=True)
class Query:
    """What is looked for: a text, a picture, or both, and what is not wanted."""

    text: str | None = None
    """Words that the images should fit."""
    image: Image | None = None
    """A picture that they should resemble."""
    image_weight: float = 0.5
    """Share of the picture where a text is given too, in [0, 1]."""
    negatives: tuple[str, ...] = ()
    """Texts that the images should not fit."""
    negative_weight: float = 0.5
    """Weight of each of them beside the whole of what is wanted, 0 or more."""
    expert: str | None = None
    """Name of the one expert that answers; None: all, as the text is routed."""

    def __post_init__(self) -> None:
        """Check that something is looked for."""
        if self.text is None and self.image is None:
            raise ModeclipError("search: nothing to look for; give a text, or --image FILE")
        for name, text in (("text", self.text), *(("not", text) for text in self.negatives)):
            if text is not None and not text.strip():
                raise ModeclipError(f"search: {name} is empty; write what the images should show")
        if not 0 <= self.image_weight <= 1:
            raise ModeclipError(f"image_weight must lie in [0, 1], got {self.image_weight}")
        if not 0 <= self.negative_weight < math.inf:
            raise ModeclipError(f"negative_weight: expected a finite number, 0 or more, got {self.negative_weight}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Asked:
    """A query that was encoded."""

    weights: Float[np.ndarray, " K"]
    """Weight of each expert."""
    parts: tuple[tuple[float, Float[np.ndarray, " D"]], ...]
    """What the images should be near to, each with its weight; what is not wanted has one below 0."""
    text: str | None = None
    """The words, for the captions."""


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One image that was found."""

    number: int
    """Position in the index, from 0."""

    key: str
    """Key of the pair in its catalog."""
    caption: str
    """Its caption."""
    path: str | None
    """Where the image lies; None where the catalog itself holds it."""
    score: float
    """Product of the query with the image: for a text alone the mixture's score, sum_c p_c <u_c, v_c>."""
    height: float
    """Standard deviations of the score above the mean of the query's scores."""
    strength: float
    """Share of known pairs, captions with their own images, whose height is lower, in [0, 1]."""
    parts: tuple[float, ...]
    """What each expert adds to the score."""
    catalog: str
    """Catalog of the pair."""
    row: int
    """Position in it."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """The answer to a query."""

    hits: tuple[Hit, ...]
    """The images, best first."""
    weights: tuple[float, ...]
    """Weight of each expert, as the text is routed."""
    experts: tuple[str, ...]
    """Names of the experts."""
    num_searched: int
    """Images that could have been found."""
    exact: bool
    """Whether all of them were compared."""


@dataclass(frozen=True, kw_only=True)
class Added:
    """What `Index.add` has done."""

    num_new: int
    """Images that the index did not have."""
    num_changed: int
    """Images that it had with another content under the same key of the catalog."""
    num_moved: int
    """Images that lie in another row of their catalog than before; they are not encoded anew."""
    num_edited: int
    """Images whose caption or other columns have changed; they are not encoded anew."""
    num_same: int
    """Images that it had as they are, of this catalog or under the same key of another."""
    num_doubled: int
    """Pairs whose key an earlier pair of the same catalog has; they are left out."""
    num_rows: int
    """Images in the index now."""
