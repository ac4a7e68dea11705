"""Looks at several selections of a pool in one pass: head and tail, sizes, clusters, false negatives, examples.

A *side* is what a pool is looked at as: all of it, or what a curation has kept. A pair counts on a side by its weight,
1 or 0, or the probability with which training draws it.

- Examples are the pairs with the smallest random numbers, each drawn from the seed, key and caption of the pair alone,
  so that they do not depend on the catalog's fragments.
- Captions are counted by hashes. Up to `MAX_TEXTS` distinct ones are counted exactly. Of more, those whose hash is
  below a level and the most frequent ones are kept, and the figures are estimates.
- Words are counted in a sample of the pairs.
- Clusters are those of the column ``fine_cluster``, else k-means on a sample of the embeddings, else there are none.
- False negatives are counted in batches of a sample of each side, as `modeclip.clustering.negatives` does.

Price: a pass over keys, captions and sizes, 250,000 pairs a second of a processor, and some seconds for clusters and
false negatives where there are embeddings (`benchmarks/explain.py`). Memory: 0.1 GB for a million distinct captions,
0.3 GB for any number of them, and the samples.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Shaped, UInt8

from modeclip.clustering.cards import pick_keywords, split_words
from modeclip.clustering.distances import assign_nearest
from modeclip.clustering.embedding import read_embeddings
from modeclip.clustering.kmeans import kmeans
from modeclip.clustering.negatives import NegativeReport, measure_negatives
from modeclip.curation.method import draw
from modeclip.data.catalog import Catalog
from modeclip.data.storage import missing_fragments
from modeclip.errors import ModeclipError
from modeclip.system.console import progress

NUM_EXAMPLES = 10
"""Pairs that are shown of each cause, and of those that are kept."""
NUM_FREQUENT = 10
"""Most frequent captions and words that are named for each side."""
HEAD_FRACTION = 0.01
"""Share of the distinct texts, the most frequent ones, that is called the head."""
MAX_TEXTS = 1 << 21
"""Distinct captions up to which all are counted exactly."""
WORD_PAIRS = 200_000
"""Pairs, about, whose words are counted."""
VECTOR_PAIRS = 16_384
"""Pairs of each side, about, whose embeddings are looked at."""
NUM_CLUSTERS = 64
"""Clusters that are fitted where the catalog has none; fewer where they would have less than 20 pairs."""
NUM_BINS = 48
"""Bins of scores."""
BATCH_PAIRS, NUM_BATCHES = 256, 50
"""Batches in which false negatives are counted."""
ROWS_AT_ONCE = 8192
"""Rows that are looked at together."""
_LENGTHS = (0.0, *sorted({float(round(2 ** (k / 2))) for k in range(29)}))
"""Edges of the bins of lengths and sizes, half octaves up to 16,384."""
_OWN_DRAWS = 1 << 63
"""Is added to the seed, so that examples do not depend on what a method of the same seed has drawn."""


Block = dict[str, Shaped[np.ndarray, "n *_"]]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A pair as an example."""

    row: int
    """Position in the catalog."""
    key: str
    caption: str
    new_caption: str | None = None
    """What the method replaces the caption by."""
    score: float | None = None
    """What the method ranks it by."""
    probability: float | None = None
    """Chance that a pass of training draws it, where the method has such."""
    copy_of: int | None = None
    """Row of the pair that stays in its stead, where the method says so."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Pairs that had the same fate."""

    name: str
    """The fate in words: why they were dropped, or ``kept``."""
    count: int
    """How many they are."""
    share: float
    """How many they are of all that were looked at, in [0, 1]."""
    pairs: tuple[Pair, ...]
    """Examples."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How texts are spread over the pairs of a side."""

    total: float
    """Occurrences, counted by the weights of their pairs."""
    distinct: float
    """Distinct texts."""
    head: float
    """Share of the occurrences that are of the most frequent 1 % of the texts, in [0, 1]."""
    once: float
    """Share of the distinct texts that occur at most once, in [0, 1]."""
    gini: float
    """Inequality of the texts' counts: 0 if all are as frequent, towards 1 if one has nearly everything."""
    effective: float
    """Number of equally frequent texts that would have the same entropy."""


@dataclass(frozen=True, kw_only=True)
class Frequent:
    """A text that is among the most frequent ones of a side."""

    text: str
    counts: tuple[float, ...]
    """How often it occurs on each side."""


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Head and tail of captions, or of words."""

    spreads: tuple[Spread, ...]
    """For each side."""
    frequent: tuple[Frequent, ...]
    """The most frequent ones, in the order of the first side."""
    num_pairs: int
    """Pairs that were looked at."""
    is_exact: bool
    """Whether all of the pairs and texts were counted; else the figures are estimates."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What became of the pairs of a fine cluster."""

    index: int
    """Number of the cluster."""
    keywords: tuple[str, ...]
    """Words that set its captions apart."""
    counts: tuple[float, ...]
    """Pairs on each side, counted by their weights."""
    change: float
    """How many pairs more the last side has than if it were made up of the clusters as the side before it is."""


@dataclass(frozen=True, kw_only=True)
class Clusters:
    """What became of each fine cluster."""

    origin: str
    """Where the clusters come from, in words."""
    num_pairs: int
    """Pairs that were counted."""
    clusters: tuple[Cluster, ...]
    """Those that changed most come first."""


@dataclass(frozen=True, kw_only=True)
class Bins:
    """Histograms of one quantity, one for each side."""

    title: str
    """What is counted."""
    unit: str
    """In what it is measured."""
    edges: tuple[float, ...]
    """Edges of the bins, one more than there are bins; what lies beyond is in the first or the last bin."""
    counts: tuple[tuple[float, ...], ...]
    """For each side its pairs in each bin."""
    is_log: bool
    """Whether the bins are half octaves, for a logarithmic axis."""


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What is to be seen on each side of a pool."""

    sides: tuple[str, ...]
    """Names of the sides, such as ``before`` and ``after``."""
    captions: Texts
    """Head and tail of the captions."""
    words: Texts
    """Head and tail of the words."""
    clusters: Clusters | None
    """What became of each fine cluster."""
    bins: tuple[Bins, ...]
    """Lengths of captions, sizes of images, and scores where there are any."""
    negatives: tuple[NegativeReport, ...]
    """False negatives in batches of each side; none where there are no embeddings."""
    notes: tuple[str, ...]
    """What could not be shown, and what to do about it."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a block of rows means to a survey."""

    groups: UInt8[np.ndarray, " n"]
    """The group of each pair; examples are drawn of each group."""
    weights: Float[np.ndarray, "n sides"]
    """How often each pair counts on each side, in [0, 1]; on the first one pairs count once, or not at all."""
    score: Float[np.ndarray, " n"] | None = None
    probability: Float[np.ndarray, " n"] | None = None
    copy_of: Int[np.ndarray, " n"] | None = None
    """Row of the pair that stays in each one's stead; below 0 there is none."""


def survey(
    catalog: Catalog,
    look: Callable[[Block], Part],
    totals: Mapping[str, float],
    *,
    columns: Sequence[str] = (),
    values: Mapping[str, Shaped[np.ndarray, "N *_"]] | None = None,
    new_captions: str | None = None,
    outside: int | None = None,
    score_ends: tuple[float, float] | None = None,
    seed: int = 0,
) -> tuple[Survey, dict[int, tuple[Pair, ...]]]:
    """Look at each side of a pool, in one pass, and draw examples.

    Args:
        catalog: The pool.
        look: Says to which group and sides the rows of a block belong.
        totals: Name of each side, and the sum of its weights.
        columns: What ``look`` reads.
        values: Those of the columns that the catalog does not have.
        new_captions: Which of the columns has the captions of the last side; a row without one has its own.
        outside: Group of the pairs of which no examples are drawn.
        score_ends: Least and largest score, if the pairs have scores.
        seed: Decides examples and samples.

    Returns:
        The survey, and examples of each group.
    """
    num_sides, notes = len(totals), list[str]()
    has_fine = _is_filled(catalog, "fine_cluster")
    samples = _Samples(list(totals.values()))
    captions, examples = CaptionCounts(num_sides), _Examples(outside)
    lengths, sizes = _Bins(num_sides, _LENGTHS), _Bins(num_sides, _LENGTHS)
    scores = _Bins(num_sides, _score_edges(*score_ends)) if score_ends else None
    per_cluster, start = np.zeros((0, num_sides)), 0
    own = ("key", "caption", "width", "height", *(("fine_cluster",) if has_fine else ()))
    with progress("explain", len(catalog), "pairs") as advance:
        for block in read_blocks(catalog, (*own, *columns), values):
            part, old = look(block), _texts(block["caption"])
            new = old if new_captions is None else _replaced(old, block[new_captions])
            rows = start + np.arange(len(old))
            draws = draw(seed + _OWN_DRAWS, block["key"].tolist(), old.tolist())
            captions.add(old, new, part.weights, rows)
            examples.add(draws, rows, part, block["key"], old, new)
            fine = block["fine_cluster"].astype(np.int64) if has_fine else None
            samples.add(draws, rows, part.weights, old, new, fine)
            lengths.add(_lengths(old), part.weights, last=None if new is old else _lengths(new))
            sides = np.minimum(*(np.nan_to_num(np.asarray(block[name], float)) for name in ("width", "height")))
            sizes.add(sides, part.weights * (sides > 0)[:, None])
            if scores and part.score is not None:
                known = np.isfinite(part.score)
                scores.add(np.where(known, part.score, 0), part.weights * known[:, None])
            if fine is not None:
                per_cluster = _add_up(per_cluster, fine, part.weights)
            start += len(old)
            advance(len(old))
    sampled = samples.finish(catalog, notes)
    clusters = _clusters(per_cluster, samples) if has_fine else _fit_clusters(sampled, seed, notes)
    bins = (
        lengths.finish("Caption length", "characters"),
        sizes.finish("Shorter side of the image", "pixels"),
        *((scores.finish("Score", ""),) if scores else ()),
    )
    found = Survey(
        sides=tuple(totals),
        captions=captions.finish(catalog, new_captions, values),
        words=samples.words(),
        clusters=clusters,
        bins=tuple(one for one in bins if any(map(any, one.counts))),
        negatives=_count_negatives(sampled, seed, notes),
        notes=tuple(notes),
    )
    return found, examples.finish()


def read_blocks(
    catalog: Catalog, columns: Sequence[str], values: Mapping[str, Shaped[np.ndarray, "N *_"]] | None
) -> Iterator[Block]:
    """Yield columns in blocks of rows; those in ``values`` are taken from there."""
    held = {name: values[name] for name in columns if values is not None and name in values}
    read = [name for name in columns if name not in held]
    start = 0
    for block in catalog.batches(read or ["offset"], ROWS_AT_ONCE):
        stop = start + len(next(iter(block.values())))
        yield {name: block[name] for name in read} | {name: found[start:stop] for name, found in held.items()}
        start = stop


def _is_filled(catalog: Catalog, column: str) -> bool:
    """Tell whether a catalog has a column, with values for all of its pairs."""
    has = column in catalog.columns and column not in catalog.damaged
    return has and not missing_fragments(catalog.dataset, [column])


def _texts(captions: Shaped[np.ndarray, " n"]) -> Shaped[np.ndarray, " n"]:
    """Return captions as texts; a missing one is empty."""
    return np.array([caption or "" for caption in captions.tolist()], object)


def _replaced(old: Shaped[np.ndarray, " n"], new: Shaped[np.ndarray, " n"]) -> Shaped[np.ndarray, " n"]:
    return np.array([was if now is None else now for was, now in zip(old.tolist(), new.tolist(), strict=True)], object)


def _lengths(texts: Shaped[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    return np.fromiter(map(len, texts.tolist()), np.int64, len(texts))


def _add_up(
    counts: Float[np.ndarray, "M sides"], clusters: Int[np.ndarray, " n"], weights: Float[np.ndarray, "n sides"]
) -> Float[np.ndarray, "K sides"]:
    """Add the weights of rows to those of their clusters; there may be clusters that are new."""
    size = max(len(counts), int(clusters.max(initial=-1)) + 1)
    total = np.zeros((size, weights.shape[1]))
    total[: len(counts)] = counts
    for side, column in enumerate(weights.T):
        total[:, side] += np.bincount(clusters, column, size)
    return total


# ---------------------------------------------------------------- examples and histograms


class _Examples:
    """Keeps the pairs with the smallest random numbers of each group."""

    def __init__(self, outside: int | None) -> None:
        self._outside = outside
        self._found: dict[int, list[tuple[float, int, Pair]]] = {}

    def add(
        self,
        draws: Float[np.ndarray, " n"],
        rows: Int[np.ndarray, " n"],
        part: Part,
        keys: Shaped[np.ndarray, " n"],
        old: Shaped[np.ndarray, " n"],
        new: Shaped[np.ndarray, " n"],
    ) -> None:
        """Look at a block of rows."""
        order = np.argsort(draws, kind="stable")
        groups = part.groups[order]
        for group in np.unique(groups).tolist():
            if group == self._outside:
                continue
            known = self._found.setdefault(group, [])
            for place in order[groups == group][:NUM_EXAMPLES].tolist():
                if len(known) == NUM_EXAMPLES and draws[place] >= known[-1][0]:
                    break
                pair = Pair(
                    row=int(rows[place]),
                    key=str(keys[place]),
                    caption=str(old[place]),
                    new_caption=None if new[place] == old[place] else str(new[place]),
                    score=_number(part.score, place),
                    probability=_number(part.probability, place),
                    copy_of=None if part.copy_of is None or part.copy_of[place] < 0 else int(part.copy_of[place]),
                )
                known.append((float(draws[place]), pair.row, pair))
                known.sort(key=lambda item: item[:2])
                del known[NUM_EXAMPLES:]

    def finish(self) -> dict[int, tuple[Pair, ...]]:
        """Return the pairs of each group, in the order of their random numbers."""
        return {group: tuple(pair for *_, pair in found) for group, found in self._found.items()}


def _number(values: Float[np.ndarray, " n"] | None, place: int) -> float | None:
    return None if values is None or not math.isfinite(values[place]) else float(values[place])


class _Bins:
    """Counts values, each by its weight on every side, into bins."""

    def __init__(self, num_sides: int, edges: Sequence[float]) -> None:
        self._edges = np.array(edges)
        self._counts = np.zeros((num_sides, len(edges) - 1))

    def add(
        self,
        values: Shaped[np.ndarray, " n"],
        weights: Float[np.ndarray, "n sides"],
        *,
        last: Shaped[np.ndarray, " n"] | None = None,
    ) -> None:
        """Count values; those of the last side may be others."""
        size = self._counts.shape[1]
        for side, column in enumerate(weights.T):
            own = last if last is not None and side == len(self._counts) - 1 else values
            place = np.clip(np.searchsorted(self._edges, own, "right") - 1, 0, size - 1)
            self._counts[side] += np.bincount(place, column, size)

    def finish(self, title: str, unit: str) -> Bins:
        """Return the counts, without the empty bins at both ends."""
        filled = np.flatnonzero(self._counts.any(0))
        part = slice(filled[0], filled[-1] + 1) if len(filled) else slice(0, 1)
        edges = self._edges[part.start : part.stop + 1]
        is_log = tuple(self._edges.tolist()) == _LENGTHS
        return Bins(
            title=title,
            unit=unit,
            edges=tuple(edges.tolist()),
            counts=tuple(tuple(row) for row in self._counts[:, part].tolist()),
            is_log=is_log,
        )


def _score_edges(low: float, high: float) -> list[float]:
    margin = 0.0 if high > low else 0.5
    return [float(edge) for edge in np.linspace(low - margin, high + margin, NUM_BINS + 1)]


# ---------------------------------------------------------------- head and tail


class CaptionCounts:
    """Counts how often each text occurs on each side, in bounded memory.

    Texts are known by a hash in [0, 1). Up to ``limit`` distinct texts all counts are exact. Of more, those stay whose
    hash is below a level, a uniform sample of the texts with exact counts, and the most frequent others, whose counts
    may be too low by ``missed`` at most.

    Args:
        num_sides: Number of sides.
        limit: Most texts that are kept.
    """

    def __init__(self, num_sides: int, limit: int = MAX_TEXTS) -> None:
        self.limit, self.level, self.missed = limit, 1.0, 0.0
        self._hashes, self._counts = np.empty(0), np.empty((0, num_sides))
        self._origins = np.empty(0, np.int64)
        self._waiting: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._num_waiting = 0

    def add(
        self,
        old: Shaped[np.ndarray, " n"],
        new: Shaped[np.ndarray, " n"],
        weights: Float[np.ndarray, "n sides"],
        rows: Int[np.ndarray, " n"],
    ) -> None:
        """Count the texts of some rows; ``new`` are those of the last side, the same object if they are no others."""
        if new is old:
            self._add(old, weights, 2 * rows)
            return
        is_last = np.arange(weights.shape[1]) == weights.shape[1] - 1
        self._add(old, weights * ~is_last, 2 * rows)
        self._add(new, weights * is_last, 2 * rows + 1)

    def _add(
        self, texts: Shaped[np.ndarray, " n"], weights: Float[np.ndarray, "n sides"], origins: Int[np.ndarray, " n"]
    ) -> None:
        chosen = weights.any(1)
        self._waiting.append((draw(0, texts[chosen].tolist()), weights[chosen], origins[chosen]))
        self._num_waiting += int(chosen.sum())
        if self._num_waiting > max(1 << 16, len(self._hashes) // 2):
            self._merge()

    def _merge(self) -> None:
        """Add what waits to the counts."""
        parts = [(self._hashes, self._counts, self._origins), *self._waiting]
        hashes, counts, origins = (np.concatenate(column) for column in zip(*parts, strict=True))
        self._waiting, self._num_waiting = [], 0
        order = np.argsort(hashes, kind="stable")
        hashes = hashes[order]
        starts = np.flatnonzero(np.concatenate([[True], hashes[1:] != hashes[:-1]])[: len(hashes)])
        if len(starts):
            self._hashes = hashes[starts]
            self._counts = np.add.reduceat(counts[order], starts)
            self._origins = np.minimum.reduceat(origins[order], starts)
        if len(self._hashes) > self.limit:
            self._thin()

    def _thin(self) -> None:
        """Keep a sample of the texts, and the most frequent of the others."""
        while (self._hashes < self.level).sum() > self.limit // 2:
            self.level /= 2
        others = np.flatnonzero(self._hashes >= self.level)
        sizes = self._counts[others].max(1)
        by_size = np.argsort(-sizes, kind="stable")
        keep = self._hashes < self.level
        keep[others[by_size[: self.limit // 4]]] = True
        self.missed += float(sizes[by_size[self.limit // 4]]) if len(by_size) > self.limit // 4 else 0.0
        self._hashes, self._counts, self._origins = self._hashes[keep], self._counts[keep], self._origins[keep]

    def finish(
        self,
        catalog: Catalog,
        new_captions: str | None = None,
        values: Mapping[str, Shaped[np.ndarray, "N *_"]] | None = None,
    ) -> Texts:
        """Return what was counted; the texts of the most frequent ones are read from the catalog."""
        self._merge()
        is_sampled, sizes = self._hashes < self.level, self._counts.max(1, initial=0)
        is_large = (sizes >= 10 * self.missed) & (self.level < 1)  # as good as exact, whatever its hash
        stands_for = np.where(is_large, 1.0, np.where(is_sampled, 1 / self.level, 0.0))
        places = most_frequent(self._counts)
        found = []
        for place in places:
            row, is_new = divmod(int(self._origins[place]), 2)
            column = str(new_captions) if is_new else "caption"
            held = values is not None and column in values
            read = values[column][row] if held and values else catalog.read([column], np.array([row]))[column][0]
            found.append(Frequent(text=str(read or ""), counts=tuple(self._counts[place].tolist())))
        return Texts(
            spreads=tuple(spread_of(column, stands_for) for column in self._counts.T),
            frequent=tuple(found),
            num_pairs=round(float((self._counts[:, 0] * stands_for).sum())),
            is_exact=self.level == 1,
        )


def most_frequent(counts: Float[np.ndarray, "n sides"]) -> list[int]:
    """Return the places of the texts that are most frequent on some side, in the order of the first side.

    Texts that occur no more than once on every side are left out.
    """
    tops = [np.argsort(-column, kind="stable")[:NUM_FREQUENT] for column in counts.T]
    places = np.unique(np.concatenate([np.empty(0, np.int64), *tops]))
    places = places[counts[places].max(1, initial=0) > 1]
    keys = [-counts[places, side] for side in range(counts.shape[1])]
    return [int(place) for place in places[np.lexsort(keys[::-1])]]


def spread_of(counts: Float[np.ndarray, " n"], stands_for: Float[np.ndarray, " n"] | None = None) -> Spread:
    """Return how texts are spread.

    Args:
        counts: How often each text occurs; those of 0 do not count.
        stands_for: How many texts of this frequency each one stands for; 1 by default.

    Examples:
        >>> spread = spread_of(np.array([97.0, 1.0, 1.0, 1.0]))
        >>> spread.total, spread.distinct, spread.head, spread.once, spread.gini
        (100.0, 4.0, 0.97, 0.75, 0.72)
    """
    number = np.ones(len(counts)) if stands_for is None else stands_for
    chosen = (counts > 0) & (number > 0)
    order = np.argsort(counts[chosen], kind="stable")
    count, number = counts[chosen][order], number[chosen][order]
    mass, distinct = number * count, float(number.sum())
    total = float(mass.sum())
    if not total:
        return Spread(total=0.0, distinct=0.0, head=0.0, once=0.0, gini=0.0, effective=0.0)
    up_to = np.cumsum(number)
    head = math.ceil(HEAD_FRACTION * distinct - 1e-9)
    in_head = np.clip(up_to - (distinct - head), 0, number)
    share = count / total
    return Spread(
        total=total,
        distinct=distinct,
        head=float((in_head * count).sum()) / total,
        once=float(number[count <= 1].sum()) / distinct,
        gini=round(float((mass * (2 * up_to - number)).sum()) / (distinct * total) - 1, 12),
        effective=math.exp(-float((number * share * np.log(share)).sum())),
    )


# ---------------------------------------------------------------- samples: words, clusters, false negatives


@dataclass(kw_only=True, eq=False)
class _Sample:
    """Pairs of a side that were drawn, and their embeddings."""

    texts: Shaped[np.ndarray, " n"]
    weights: Float[np.ndarray, "n sides"]
    fine: Int[np.ndarray, " n"] | None
    vectors: Float[np.ndarray, "n D"]


class _Samples:
    """Draws the pairs whose words are counted, and those of each side whose embeddings are looked at."""

    def __init__(self, totals: Sequence[float]) -> None:
        self._word_rate = WORD_PAIRS / max(totals[0], 1.0)
        self._rates = [min(1.0, VECTOR_PAIRS / max(total, 1.0)) for total in totals]
        self._words: list[Counter[str]] = [Counter() for _ in totals]
        self._num_pairs = 0
        self._drawn: list[list[tuple[np.ndarray, ...]]] = [[] for _ in totals]
        self.words_of_cluster: dict[int, Counter[str]] = {}

    def add(
        self,
        draws: Float[np.ndarray, " n"],
        rows: Int[np.ndarray, " n"],
        weights: Float[np.ndarray, "n sides"],
        old: Shaped[np.ndarray, " n"],
        new: Shaped[np.ndarray, " n"],
        fine: Int[np.ndarray, " n"] | None,
    ) -> None:
        """Look at a block of rows."""
        last = weights.shape[1] - 1
        for place in np.flatnonzero((draws < self._word_rate) & (weights[:, 0] > 0)).tolist():
            words = split_words(old[place])
            for side, weight in enumerate(weights[place].tolist()):
                if weight:
                    own = split_words(new[place]) if side == last and new is not old else words
                    for word in own:
                        self._words[side][word] += weight
            if fine is not None:
                self.words_of_cluster.setdefault(int(fine[place]), Counter()).update(words)
            self._num_pairs += 1
        for side, found in enumerate(self._drawn):
            chosen = draws < weights[:, side] * self._rates[side]
            labels = np.zeros(len(rows), np.int64) if fine is None else fine
            found.append((rows[chosen], old[chosen], weights[chosen], labels[chosen]))
        self._has_fine = fine is not None

    def words(self) -> Texts:
        """Return head and tail of the words."""
        vocabulary = sorted(set().union(*self._words))
        counts = np.array([[words[word] for words in self._words] for word in vocabulary], float)
        counts = counts.reshape(-1, len(self._words))
        return Texts(
            spreads=tuple(map(spread_of, counts.T)),
            frequent=tuple(
                Frequent(text=vocabulary[place], counts=tuple(counts[place].tolist()))
                for place in most_frequent(counts)
            ),
            num_pairs=self._num_pairs,
            is_exact=self._word_rate >= 1,
        )

    def finish(self, catalog: Catalog, notes: list[str]) -> list[_Sample]:
        """Read the embeddings of the drawn pairs of each side; none, and a note, if they cannot be read."""
        if not _is_filled(catalog, "caption_embedding"):
            notes.append(
                f"There are no clusters and no false negatives to show: modeclip embed {catalog.path} makes the"
                " embeddings of all captions that this needs."
            )
            return []
        samples = []
        try:
            for found in self._drawn:
                rows, texts, weights, fine = (np.concatenate(column) for column in zip(*found, strict=True))
                vectors = read_embeddings(catalog, rows)
                samples.append(
                    _Sample(texts=texts, weights=weights, fine=fine if self._has_fine else None, vectors=vectors)
                )
        except ModeclipError as error:
            notes.append(f"There are no false negatives to show: {error}.")
            return []
        return samples


def _clusters(counts: Float[np.ndarray, "M sides"], samples: _Samples) -> Clusters:
    """Return what became of the clusters that the catalog has."""
    words = samples.words_of_cluster
    keywords = _keywords([words.get(index, Counter()) for index in range(len(counts))])
    return _sorted_clusters("column fine_cluster", counts, keywords)


def _fit_clusters(sampled: list[_Sample], seed: int, notes: list[str]) -> Clusters | None:
    """Return what became of clusters of the sample; every sample learns the clusters of its rows."""
    if not sampled:
        return None
    first = sampled[0]
    number = min(NUM_CLUSTERS, len(first.vectors) // 20)
    if number < 2:
        notes.append("There are no clusters to show: fewer than 40 pairs make none.")
        return None
    centers = kmeans(first.vectors, number, seed=seed).centers
    for sample in sampled:
        if len(sample.vectors):
            sample.fine = assign_nearest(sample.vectors, centers)[0]
    assert first.fine is not None
    words: list[Counter[str]] = [Counter() for _ in range(number)]
    for index, text in zip(first.fine.tolist(), first.texts.tolist(), strict=True):
        words[index].update(split_words(text))
    counts = _add_up(np.zeros((number, first.weights.shape[1])), first.fine, first.weights)
    origin = "k-means on the caption embeddings of a sample, since not all pairs have a fine cluster"
    return _sorted_clusters(origin, counts, _keywords(words))


def _keywords(words: Sequence[Counter[str]]) -> list[tuple[str, ...]]:
    corpus: Counter[str] = Counter()
    for some in words:
        corpus.update(some)
    return [pick_keywords(some, corpus) for some in words]


def _sorted_clusters(origin: str, counts: Float[np.ndarray, "M sides"], keywords: list[tuple[str, ...]]) -> Clusters:
    """Return the clusters that have pairs, those that changed most first."""
    before, after = counts[:, -2], counts[:, -1]
    change = after - before * (after.sum() / max(before.sum(), 1e-9))
    change[np.abs(change) < 1e-6] = 0
    filled = np.flatnonzero(counts[:, 0] > 0)
    order = filled[np.argsort(-np.abs(change[filled]), kind="stable")]
    return Clusters(
        origin=origin,
        num_pairs=round(float(counts[:, 0].sum())),
        clusters=tuple(
            Cluster(
                index=index,
                keywords=keywords[index],
                counts=tuple(counts[index].tolist()),
                change=float(change[index]),
            )
            for index in order.tolist()
        ),
    )


def _count_negatives(sampled: list[_Sample], seed: int, notes: list[str]) -> tuple[NegativeReport, ...]:
    """Count the false negatives in batches of each side."""
    if not sampled:
        return ()
    if min(len(sample.vectors) for sample in sampled) < 2:
        notes.append("There are no false negatives to count: a side has fewer than two pairs.")
        return ()
    reports = []
    for sample in sampled:
        vectors, count = sample.vectors, len(sample.vectors)
        fine = sample.fine
        if fine is None or np.bincount(fine).max() < 2:
            fine = np.zeros(count, np.int64)
        _, captions = np.unique(sample.texts, return_inverse=True)
        report = measure_negatives(
            vectors.__getitem__,
            captions,
            fine,
            np.zeros((count, 1), np.int64),
            batch_size=BATCH_PAIRS,
            num_batches=NUM_BATCHES,
            seed=seed,
        )
        reports.append(report)
    return tuple(reports)
