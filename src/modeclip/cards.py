"""Assigned captions in, what a person wants to know of each cluster out: size, radius, typical captions, key words.

Source of the key words: log-odds with an informative Dirichlet prior, Monroe, Colaresi and Quinn 2008, "Fightin'
Words", eqs. 16, 20 and 22; the prior is the whole corpus, and each cluster is compared with all others together.

Price: blocks of rows are counted in as they pass; what is kept is a few captions per cluster and one word count.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Shaped

NUM_NEAREST = 5
"""Captions on the card of a fine cluster."""
NUM_KEYWORDS = 5
"""Key words on a card."""
PRIOR_WORDS = 500.0
"""Weight of the prior, in words: what a cluster says counts fully once it has many more words than that."""
WORD = re.compile(r"[^\W_]{2,}")
"""A word: two or more letters or digits."""


@dataclass(frozen=True, kw_only=True)
class FineCard:
    """What a person wants to know of a fine cluster."""

    index: int
    """Its position."""
    expert: int
    """Expert that it belongs to."""
    size: int
    """Rows of the catalog."""
    radius: float
    """Mean distance of these rows to the centre; 0 where there are none."""
    nearest_captions: tuple[str, ...]
    """The distinct captions nearest to the centre, nearest first."""
    keywords: tuple[str, ...]
    """Words that set it apart from the rest of the corpus, strongest first."""


@dataclass(frozen=True, kw_only=True)
class ExpertCard:
    """What a person wants to know of an expert's data."""

    index: int
    """Its number: 0 has the largest range."""
    size: int
    """Rows of the catalog."""
    range: float
    """Mean distance of its fine centres to its coarse centre."""
    num_fine: int
    """Fine clusters."""
    keywords: tuple[str, ...]
    """Words that set it apart from the rest of the corpus, strongest first."""


class Tally:
    """What assigning the rows says of each fine cluster.

    Attributes:
        sizes: Rows per fine cluster.
        distances: Sum of their distances to the centre.
        squares: Sum of squared distances over all rows.
        captions: Nearest distinct captions with their distances, nearest first.
    """

    def __init__(self, num_fine: int) -> None:
        self.sizes = np.zeros(num_fine, np.int64)
        self.distances = np.zeros(num_fine)
        self.squares = 0.0
        self.captions: list[list[tuple[float, str]]] = [[] for _ in range(num_fine)]

    def add(
        self, fine: Int[np.ndarray, " n"], squared: Float[np.ndarray, " n"], captions: Shaped[np.ndarray, " n"]
    ) -> None:
        """Count rows in, in the catalog's order."""
        num_fine = len(self.sizes)
        distance = np.sqrt(squared.astype(np.float64))
        self.sizes += np.bincount(fine, minlength=num_fine)
        self.distances += np.bincount(fine, weights=distance, minlength=num_fine)
        self.squares += float(squared.sum(dtype=np.float64))
        order = np.lexsort((distance, fine))  # stable: of equals the first row comes first
        bounds = np.searchsorted(fine[order], np.arange(num_fine + 1))
        for index in np.unique(fine):
            rows = order[bounds[index] : bounds[index + 1]]
            offered = ((float(distance[row]), str(captions[row])) for row in rows)
            self.captions[index] = _nearest_distinct(self.captions[index], offered)


def _nearest_distinct(
    known: Sequence[tuple[float, str]], offered: Iterable[tuple[float, str]]
) -> list[tuple[float, str]]:
    """Return the nearest captions of two lists that are sorted by distance, each caption once, the known ones first."""
    nearest_of_offered: dict[str, float] = {}
    for distance, caption in offered:
        nearest_of_offered.setdefault(caption, distance)
        if len(nearest_of_offered) == NUM_NEAREST:
            break
    both = [*known, *((distance, caption) for caption, distance in nearest_of_offered.items())]
    distinct: dict[str, float] = {}
    for distance, caption in sorted(both, key=lambda item: item[0]):
        distinct.setdefault(caption, distance)
    return [(distance, caption) for caption, distance in distinct.items()][:NUM_NEAREST]


def split_words(caption: str) -> list[str]:
    """Return the words of a caption in lower case.

    Examples:
        >>> split_words("Arrow-left (x) 24px")
        ['arrow', 'left', '24px']
    """
    return WORD.findall(caption.lower())


def pick_keywords(words: Counter[str], corpus: Counter[str]) -> tuple[str, ...]:
    """Return the words that set one group's texts apart from all others', by log-odds with a Dirichlet prior.

    Args:
        words: How often each word occurs in the group.
        corpus: The same for all groups together, this one included.

    Returns:
        At most ``NUM_KEYWORDS`` words, the highest z-score first, none that is as frequent elsewhere.

    Examples:
        >>> pick_keywords(Counter(arrow=8, left=1, the=9), Counter(arrow=9, left=10, the=90))
        ('arrow',)
    """
    own, total = sum(words.values()), sum(corpus.values())
    names = sorted(words)
    inside = np.array([words[name] for name in names], np.float64)
    everywhere = np.array([corpus[name] for name in names], np.float64)
    prior = PRIOR_WORDS * everywhere / total
    a, b = inside + prior, everywhere - inside + prior
    log_odds = np.log(a / (own + PRIOR_WORDS - a)) - np.log(b / (total - own + PRIOR_WORDS - b))
    z = log_odds / np.sqrt(1 / a + 1 / b)
    return tuple(names[i] for i in np.argsort(-z, kind="stable")[:NUM_KEYWORDS] if z[i] > 0)
