"""Cards that describe each cluster to a person: size, spread, typical captions, pictures and key words.

Assigned rows are counted block by block (`Tally`), and the cards are written from the counts (`make_cards`).

Source of the key words: log-odds with an informative Dirichlet prior, Monroe, Colaresi and Quinn 2008, "Fightin'
Words", eqs. 16, 20 and 22; the prior is the whole corpus, and each cluster is compared with all others together.

Price: some 300,000 rows a second. A few captions and rows of each cluster stay in memory, and the words and distances
of a uniform sample of the rows. Where that sample is the whole catalog, shares and quantiles are exact; else they are
estimates.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

NUM_NEAREST = 5
"""Captions on the card of a fine cluster."""
NUM_RANDOM = 5
"""Random rows on the card of a fine cluster."""
NUM_KEYWORDS = 5
"""Key words on a card."""
QUANTILE = 0.9
"""Share of the rows that lie within ``radius_90`` of the centre."""
PRIOR_WORDS = 500.0
"""Weight of the prior, in words: a cluster speaks for itself once it has many more words than that."""
WORD = re.compile(r"[^\W_]{2,}")
"""A word: two or more letters or digits."""


@dataclass(frozen=True, kw_only=True)
class FineCard:
    """Describes a fine cluster."""

    index: int
    """Number of the fine cluster, 0 to M - 1."""
    expert: int
    """Expert that it was grouped into, the first of ``experts``."""
    experts: tuple[int, ...]
    """All experts that train on it: one, and with overlap also those with the next nearest centres, nearest first."""
    size: int
    """Rows of the catalog."""
    radius: float
    """Mean distance of its rows to the centre; 0 if it has none."""
    radius_90: float
    """Distance to the centre within which 90 % of its sampled rows lie; 0 if there are none."""
    nearest_captions: tuple[str, ...]
    """The distinct captions nearest to the centre, nearest first."""
    nearest_rows: tuple[int, ...]
    """The first row with each of these captions."""
    random_rows: tuple[int, ...]
    """Rows drawn uniformly from the cluster, without repeats."""
    keywords: tuple[str, ...]
    """Words that set it apart from the rest of the corpus, strongest first."""


@dataclass(frozen=True, kw_only=True)
class ExpertCard:
    """Describes the data of an expert."""

    index: int
    """Number of the expert; expert 0 has the largest range."""
    size: int
    """Rows of the catalog that it trains on."""
    range: float
    """Mean distance to its coarse centre of the fine centres that were grouped into it, not of those it shares."""
    num_fine: int
    """Fine clusters that it trains on."""
    radius: float
    """Mean distance of its rows to their fine centres; 0 if it has none."""
    radius_90: float
    """Distance to their fine centres within which 90 % of its sampled rows lie; 0 if there are none."""
    keywords: tuple[str, ...]
    """Words that set it apart from the rest of the corpus, strongest first."""


class Tally:
    """Counts, block by block, what the cards need to know of the rows of each fine cluster.

    Args:
        num_fine: Number of fine clusters.
        sample: Rows whose words and distances are kept, ascending.
        seed: Decides the random rows, however the rows are cut into blocks.

    Attributes:
        sizes: Rows per fine cluster.
        distances: Sum of these rows' distances to the centre.
        squares: Sum of squared distances over all rows.
        nearest: Distance, caption and row of the captions nearest to the centre, nearest first, each caption once.
        words: How often each word occurs in the sampled captions.
    """

    def __init__(self, num_fine: int, sample: Int[np.ndarray, " n"], seed: int = 0) -> None:
        self.sizes = np.zeros(num_fine, np.int64)
        self.distances = np.zeros(num_fine)
        self.squares = 0.0
        self.nearest: list[list[Near]] = [[] for _ in range(num_fine)]
        self.words: list[Counter[str]] = [Counter() for _ in range(num_fine)]
        self._num_rows = 0
        self._sample = sample
        self._sampled: list[tuple[np.ndarray, np.ndarray]] = []
        self._random = np.random.default_rng(seed)
        self._drawn = np.empty(0, np.int64), np.empty(0), np.empty(0, np.int64)  # fine cluster, random key, row

    def add(
        self,
        fine: Int[np.ndarray, " n"],
        distance: Float[np.ndarray, " n"],
        captions: Shaped[np.ndarray, " n"],
        chosen: Bool[np.ndarray, " n"] | None = None,
    ) -> None:
        """Count the next rows of the catalog, or only the chosen ones among them."""
        start, num_fine = self._num_rows, len(self.sizes)
        self._num_rows += len(fine)
        rows = np.arange(start, self._num_rows)
        if chosen is not None:
            fine, distance, captions, rows = fine[chosen], distance[chosen], captions[chosen], rows[chosen]
        fine, distance = fine.astype(np.int64), distance.astype(np.float64)
        self.sizes += np.bincount(fine, minlength=num_fine)
        self.distances += np.bincount(fine, weights=distance, minlength=num_fine)
        self.squares += float(np.square(distance).sum())
        self._add_nearest(rows, fine, distance, captions)
        self._draw(rows, fine)
        low, high = np.searchsorted(self._sample, [start, self._num_rows])
        sampled = np.flatnonzero(np.isin(rows, self._sample[low:high], assume_unique=True))
        self._sampled.append((fine[sampled], distance[sampled].astype(np.float32)))
        for index, row in zip(fine[sampled].tolist(), sampled.tolist(), strict=True):
            self.words[index].update(split_words(captions[row]))

    def _add_nearest(self, rows: np.ndarray, fine: np.ndarray, distance: np.ndarray, captions: np.ndarray) -> None:
        order = np.lexsort((distance, fine))  # stable: of equals the first row comes first
        bounds = np.searchsorted(fine[order], np.arange(len(self.sizes) + 1))
        for index in np.unique(fine):
            places, known = order[bounds[index] : bounds[index + 1]], self.nearest[index]
            if len(known) < NUM_NEAREST or distance[places[0]] < known[-1][0]:
                offered = ((float(distance[at]), str(captions[at]), int(rows[at])) for at in places)
                self.nearest[index] = _nearest_distinct(known, offered)

    def _draw(self, rows: np.ndarray, fine: np.ndarray) -> None:
        """Give each row a random key and keep the smallest keys: at any time a uniform draw of the rows so far."""
        new = fine, self._random.random(len(fine)), rows
        fine, keys, rows = (np.concatenate(pair) for pair in zip(self._drawn, new, strict=True))
        order = np.lexsort((keys, fine))
        first = np.searchsorted(fine[order], fine[order])
        order = order[np.arange(len(order)) - first < NUM_RANDOM]
        self._drawn = fine[order], keys[order], rows[order]

    def random_rows(self) -> list[tuple[int, ...]]:
        """Return up to ``NUM_RANDOM`` rows of each fine cluster, in random order."""
        fine, _, rows = self._drawn
        bounds = np.searchsorted(fine, np.arange(len(self.sizes) + 1))
        return [tuple(rows[low:high].tolist()) for low, high in itertools.pairwise(bounds)]

    def sampled(self) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """Return fine cluster and distance of the sampled rows, sorted by fine cluster."""
        fine = np.concatenate([np.empty(0, np.int64), *(part for part, _ in self._sampled)])
        distance = np.concatenate([np.empty(0, np.float32), *(part for _, part in self._sampled)])
        order = np.argsort(fine, kind="stable")
        return fine[order], distance[order]


Near = tuple[float, str, int]


def _nearest_distinct(known: Sequence[Near], offered: Iterable[Near]) -> list[Near]:
    """Merge two lists sorted by distance, each caption once; of equal distances the known one comes first."""
    nearest_of_offered: dict[str, Near] = {}
    for near in offered:
        nearest_of_offered.setdefault(near[1], near)
        if len(nearest_of_offered) == NUM_NEAREST:
            break
    distinct: dict[str, Near] = {}
    for near in sorted([*known, *nearest_of_offered.values()], key=lambda near: near[0]):
        distinct.setdefault(near[1], near)
    return list(distinct.values())[:NUM_NEAREST]


def make_cards(
    tally: Tally, experts_of_fine: Int[np.ndarray, "M overlap"], range_of_expert: Float[np.ndarray, " K"]
) -> tuple[tuple[FineCard, ...], tuple[ExpertCard, ...]]:
    """Write a card per fine cluster and per expert, in their order."""
    corpus: Counter[str] = Counter()
    for words in tally.words:
        corpus.update(words)
    sampled_fine, sampled = tally.sampled()
    bounds = np.searchsorted(sampled_fine, np.arange(len(tally.sizes) + 1))
    parts = [sampled[low:high] for low, high in itertools.pairwise(bounds)]
    random_rows = tally.random_rows()
    fine = tuple(
        FineCard(
            index=index,
            expert=int(experts[0]),
            experts=tuple(experts.tolist()),
            size=int(tally.sizes[index]),
            radius=float(tally.distances[index] / max(tally.sizes[index], 1)),
            radius_90=_quantile(parts[index]),
            nearest_captions=tuple(caption for _, caption, _ in tally.nearest[index]),
            nearest_rows=tuple(row for _, _, row in tally.nearest[index]),
            random_rows=random_rows[index],
            keywords=pick_keywords(tally.words[index], corpus),
        )
        for index, experts in enumerate(experts_of_fine)
    )
    cards = []
    for expert in range(len(range_of_expert)):
        own = np.flatnonzero((experts_of_fine == expert).any(1))
        words = Counter[str]()
        for index in own:
            words.update(tally.words[index])
        size = int(tally.sizes[own].sum())
        card = ExpertCard(
            index=expert,
            size=size,
            range=float(range_of_expert[expert]),
            num_fine=len(own),
            radius=float(tally.distances[own].sum() / max(size, 1)),
            radius_90=_quantile(np.concatenate([np.empty(0, np.float32), *(parts[index] for index in own)])),
            keywords=pick_keywords(words, corpus),
        )
        cards.append(card)
    return fine, tuple(cards)


def _quantile(distances: Float[np.ndarray, " n"]) -> float:
    return float(np.quantile(distances, QUANTILE)) if len(distances) else 0.0


def split_words(caption: str) -> list[str]:
    """Return the words of a caption in lower case.

    Examples:
        >>> split_words("Arrow-left (x) 24px")
        ['arrow', 'left', '24px']
    """
    return WORD.findall(caption.lower())


def pick_keywords(words: Counter[str], corpus: Counter[str], most: int = NUM_KEYWORDS) -> tuple[str, ...]:
    """Return the words that set the texts of one group apart from all others, by log-odds with a Dirichlet prior.

    Args:
        words: How often each word occurs in the group.
        corpus: The same for all groups together, this one included.
        most: How many words at most.

    Returns:
        At most ``most`` words, the highest z-score first; none that is as frequent in the other groups.

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
    return tuple(names[i] for i in np.argsort(-z, kind="stable")[:most] if z[i] > 0)
