"""MetaCLIP: keep captions that hold entries of a list, and of the frequent entries only as many as of the rare ones.

Each caption is matched with the entries of the metadata (`modeclip.curation.matching`), and over the whole pool it is
counted in how many captions each entry stands. An entry that stands in more than t captions draws each of them with
the probability t / count, the others draw all. A pair is kept if any of its entries draws it:

    p(entry) = t / max(count, t)        P(pair) = 1 - prod over its entries of (1 - p(entry))

so each entry keeps about t captions or more. Pairs without an entry are dropped. The draw of a pair depends on the
seed, its key and its caption alone. ``online`` keeps all pairs that have an entry, and leaves the drawing to training:
the column NAME_probability is P, with which every pass draws afresh.

The share of the tail says the same as t without the size of the pool: it is the share of all matches that fall on
entries with fewer than t of them. With a language column each language has its own counts and its own t, at which the
shares of the tail are equal; entries match by the rule of MetaCLIP 2, which knows scripts without spaces.

Price: three passes over the captions, each 7 microseconds of a core for a caption of 120 characters; 16 bytes for each
entry that matches, and language; 20 bytes a pair with ``one_caption``. Statistics of a fragment are kept, so an added
shard is counted alone.

Source: MetaCLIP (arXiv 2309.16671), Sec. 3.2 and Algorithm 1; MetaCLIP 2 (arXiv 2507.22062), Sec. 3. Differences:
draws do not depend on the order of the pool; where there is no t, it is that of a tail share of 0.06, about the share
that t = 170,000 had in the 2.5 billion English pairs of MetaCLIP 2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, Int, Shaped, UInt64

from modeclip.curation.counting import hash_images
from modeclip.curation.matching import Matcher, Matches, is_possible
from modeclip.curation.metadata import (
    Metadata,
    MetadataConfig,
    build,
    read_captions,
    read_corpus,
    read_metadata,
    read_titles,
    synset_names,
)
from modeclip.curation.method import Context, Curve, Histogram, Prepared, Table, draw
from modeclip.data.catalog import Catalog
from modeclip.data.mapping import POSITION, Statistic, Work, concatenate, map_fragments
from modeclip.data.wordnet import load_wordnet
from modeclip.errors import ModeclipError, check_above_zero, check_least, unknown
from modeclip.system.console import log

WORDNET, CORPUS = "wordnet", "corpus"
"""What ``entries`` says where they are in no file."""
TAIL_SHARE = 0.06
"""Share of the matches in the tail where neither it nor t is given."""
FORMAT = 1
"""Part of the facts of all counts; raise it when the same captions start to be counted otherwise."""
CAUSES = ("no entry matches", "drawn out by balancing", "another caption of its image is chosen")
"""Why a pair is dropped: the first of them online, the third with ``one_caption``."""
CAPTION_COLUMNS = ("key", "caption")
"""Columns of texts that are no languages."""
CURVE_POINTS = 25
"""Settings that the curve shows."""
PROBABILITY_BINS = 20
EXAMPLES = 10
"""Entries that the table of the head shows."""
NO_LANGUAGE = ""
"""The language of all captions where there is no language column."""

Arrays = dict[str, Shaped[np.ndarray, "..."]]
"""Arrays by name. Counts of entries have ``language`` and ``entry``, by which they are sorted, and ``count``."""


@dataclass(frozen=True, kw_only=True)
class MetaclipConfig(MetadataConfig):
    """Keep captions that hold entries of the metadata, balanced so that frequent entries do not outweigh rare ones."""

    method: ClassVar[str] = "metaclip"

    entries: str = WORDNET
    """The metadata: a file with an entry on each line or a list in JSON; a folder with such a file for each language,
    ``LANGUAGE.txt``; ``wordnet``: the names of its synsets; ``corpus``: built from the catalog's captions, or
    ``corpus:FILE`` from the lines of a file, by the four settings below."""
    wordnet: str | None = None
    """Folder of WordNet's files; by default where packages lay them (apt-get install wordnet-base)."""
    titles: str | None = None
    """corpus: a file with titles and their views, divided by a tab, which become entries too."""
    t: float | int | None = None
    """Matches up to which all captions of an entry are kept; by default as many as give the share of the tail. With
    languages it is the English t. The paper: 20,000 for 400 million pairs, 170,000 for 2.5 billion."""
    tail_share: float | None = None
    """Instead of t: the share of all matches that shall fall on entries with fewer than t of them, between 0 and 1;
    0.06 if t is not given either."""
    online: bool = False
    """Keep all pairs that match, and let every pass of training draw afresh with their probability."""
    language_column: str | None = None
    """Column with the language of each caption: each language is counted and balanced by itself."""
    one_caption: bool = False
    """Where several pairs have the same image, choose one of them by lot before balancing draws; online, divide their
    probabilities by their number."""
    english: str = "en"
    """What the language column calls English, whose share of the tail holds for all languages if t is given."""
    curve: bool = False
    """Show how many pairs other t would keep."""
    seed: int = 0
    """Decides the draws."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_above_zero("metaclip", self, "t")
        check_least("metaclip", self, seed=0)
        if self.tail_share is not None and not 0 < self.tail_share < 1:
            raise ModeclipError(f"metaclip.tail_share: expected a share between 0 and 1, got {self.tail_share}")
        if self.t is not None and self.tail_share is not None:
            raise ModeclipError("metaclip: t and tail_share say the same; give one of them")
        if self.titles is not None and self.entries.partition(":")[0] != CORPUS:
            raise ModeclipError(f"metaclip.titles: titles are added to a corpus; entries are {self.entries!r}")

    def metadata(self, catalog: Catalog) -> Metadata:
        """Read or build the metadata.

        Raises:
            ModeclipError: A file is missing or is no metadata, or WordNet is not there.
        """
        kind, _, path = self.entries.partition(":")
        if self.entries == WORDNET:
            return Metadata(entries=tuple(synset_names(load_wordnet(self.wordnet))))
        if kind != CORPUS:
            return read_metadata(self.entries)
        texts = read_corpus(path) if path else read_captions(catalog)
        titles = read_titles(self.titles) if self.titles else ()
        return Metadata(
            entries=tuple(build(texts, self, synsets=synset_names(load_wordnet(self.wordnet)), titles=titles))
        )

    def prepare(self, context: Context) -> Prepared:
        """Count matches over the whole pool, and find each language's t."""
        catalog, column = context.catalog, self.language_column
        if column is not None and column not in catalog.columns:
            raise unknown(f"column of {catalog.path!r}", column, catalog.columns)
        if column is not None and (column in CAPTION_COLUMNS or "string" not in catalog.type_of(column)):
            raise ModeclipError(
                f"metaclip.language_column: column {column!r} holds {catalog.type_of(column)}, no names of languages;"
                " choose another"
            )
        metadata = self.metadata(catalog)
        if metadata.languages is not None and column is None:
            raise ModeclipError(
                f"metaclip: {self.entries} has entries for each language; give the column of languages with"
                " --language-column"
            )
        if impossible := [entry for entry in metadata.entries if not is_possible(entry)]:
            log(
                f"metaclip: {len(impossible):,} of {len(metadata.entries):,} entries can match no caption, such as"
                f" {impossible[0]!r}: in captions, signs have spaces around them"
            )
        captions, seed = _Captions(metadata, column), None if self.online else self.seed
        counting = _Counts(captions)
        counted = map_fragments(
            catalog, counting, "metaclip: count matches", ray=context.ray, selected=context.selected
        ).total()
        if not len(counted["entry"]):
            raise ModeclipError(
                f"metaclip: none of {len(metadata.entries):,} entries stands in any of {counted['texts'].sum():,}"
                " captions (case and spelling count); choose other entries"
            )
        names = _names_of(catalog, column)
        balance = self._balance(counted, names)
        grid = self._grid(balance) if self.curve else np.empty((0, len(balance.languages)))
        draws = _Draws(captions, balance, seed, self._shares(context) if self.one_caption else None)
        effect = map_fragments(
            catalog, _Effect(draws, grid), "metaclip: balance", ray=context.ray, selected=context.selected
        ).total()
        shown = _Shown(metadata, names, counted, balance, effect, grid)
        return Prepared(
            work=_Balancing(draws, context.name),
            causes=CAUSES[: 1 if self.online else 3 if self.one_caption else 2],
            tables=shown.tables(),
            charts=shown.charts(),
        )

    def _balance(self, counted: Arrays, names: dict[int, str]) -> Balance:
        """Find each language's t."""
        languages, starts = np.unique(counted["language"], return_index=True)
        ends = np.append(starts[1:], len(counted["language"]))
        counts = [counted["count"][start:end] for start, end in zip(starts, ends, strict=True)]
        share = self.tail_share or TAIL_SHARE
        if self.t is not None:
            english = NO_LANGUAGE if self.language_column is None else self.english
            place = np.flatnonzero(languages == _language_id(english))
            if not len(place):
                known = sorted(names[int(language)] for language in languages)
                raise ModeclipError(
                    f"metaclip: t is that of English, but no entry matches captions of the language {english!r} (known:"
                    f" {', '.join(known[:10])}); name it with --english, or give --tail-share"
                )
            share = tail_share(counts[place[0]], float(self.t))
        thresholds = np.array([threshold_at(count, share) for count in counts])
        if self.t is not None:
            thresholds[place[0]] = self.t
        return Balance(languages, starts, counted["entry"], counted["count"], thresholds)

    def _shares(self, context: Context) -> Float[np.ndarray, " N"]:
        """Return what the choice of one caption leaves of each pair: 1 or 0, online 1 / the number of captions."""
        found = map_fragments(
            context.catalog,
            _Images(self.seed),
            "metaclip: find captions of the same image",
            ray=context.ray,
            selected=context.selected,
        )
        image, order = found.rows("image")[:], found.rows("order")[:]
        ranked = np.lexsort((order, image))
        is_first = np.append(True, image[ranked][1:] != image[ranked][:-1])
        share = np.zeros(len(image), np.float32)
        if self.online:
            sizes = np.diff(np.append(np.flatnonzero(is_first), len(image)))
            share[ranked] = np.repeat(1 / sizes, sizes)
        else:
            share[ranked[is_first]] = 1
        if context.selected is None:
            return share
        of_all = np.zeros(len(context.catalog), np.float32)
        of_all[context.selected] = share
        return of_all

    def _grid(self, balance: Balance) -> Float[np.ndarray, "S L"]:
        """Return settings for the curve: t of each language."""
        if len(balance.languages) == 1:
            steps = np.geomspace(1, balance.counts.max(), CURVE_POINTS).round()
            return np.unique(np.append(steps, balance.thresholds))[:, None]
        shares = np.geomspace(0.001, 0.9, CURVE_POINTS)
        return np.array([[threshold_at(counts, share) for counts in balance.by_language()] for share in shares])


def probabilities(counts: Int[np.ndarray, " E"], t: float) -> Float[np.ndarray, " E"]:
    """Return with which probability each entry draws its captions: t / max(count, t).

    Examples:
        >>> probabilities(np.array([5, 20, 80]), 20.0).tolist()
        [1.0, 1.0, 0.25]
    """
    return np.asarray(t / np.maximum(counts, t))


def tail_share(counts: Int[np.ndarray, " E"], t: float) -> float:
    """Return the share of all matches that fall on entries with fewer than t of them.

    Examples:
        >>> tail_share(np.array([1, 3, 6]), 4.0)
        0.4
    """
    return float(counts[counts < t].sum() / counts.sum())


def threshold_at(counts: Int[np.ndarray, " E"], share: float) -> float:
    """Return the t of a share of the tail: the count at which the cumulative share of sorted counts is nearest to it.

    Args:
        counts: Matches of each entry; those without a match do not matter.
        share: The share of all matches that shall fall on the tail.

    Examples:
        >>> threshold_at(np.array([1, 6, 0, 3]), 0.45)
        3.0
    """
    ordered = np.sort(counts[counts > 0])
    cumulative = np.cumsum(ordered) / ordered.sum()
    return float(ordered[np.argmin(np.abs(cumulative - share))])


@dataclass(frozen=True)
class Balance:
    """The matches of each entry in each language, and each language's t."""

    languages: UInt64[np.ndarray, " L"]
    """What stands for each language, ascending."""
    starts: Int[np.ndarray, " L"]
    """Where the entries of each language begin."""
    entries: Int[np.ndarray, " m"]
    """The entries with matches."""
    counts: Int[np.ndarray, " m"]
    """Their matches."""
    thresholds: Float[np.ndarray, " L"]
    """The t of each language."""

    @property
    def facts(self) -> dict[str, Any]:
        """What tells two balances apart."""
        hashed = hashlib.blake2b(digest_size=16)
        for array in (self.languages, self.starts, self.entries, self.counts):
            hashed.update(array.tobytes())
        return {"counts": hashed.hexdigest(), "t": self.thresholds.tolist()}

    def by_language(self) -> list[Int[np.ndarray, " _"]]:
        """Return the matches of the entries of each language."""
        return np.split(self.counts, self.starts[1:])

    def probabilities(
        self, language: int, begin: int, end: int, thresholds: Float[np.ndarray, " L"] | None = None
    ) -> Float[np.ndarray, " E"]:
        """Return with which probability each of some entries draws captions of a language.

        Args:
            language: What stands for the language.
            begin: The first entry.
            end: The first entry behind them.
            thresholds: Other t of all languages.
        """
        found = np.ones(end - begin)
        place = int(np.searchsorted(self.languages, np.uint64(language)))
        if place < len(self.languages) and self.languages[place] == np.uint64(language):
            some = slice(self.starts[place], self.starts[place + 1] if place + 1 < len(self.starts) else None)
            t = (self.thresholds if thresholds is None else thresholds)[place]
            found[self.entries[some] - begin] = probabilities(self.counts[some], t)
        return found


def _language_id(language: str) -> int:
    """Return the number that stands for a language in arrays; it does not depend on which others there are."""
    return int.from_bytes(hashlib.blake2b(language.encode(), digest_size=8).digest(), "little")


def _names_of(catalog: Catalog, column: str | None) -> dict[int, str]:
    """Return the languages of a catalog by what stands for them."""
    names = {NO_LANGUAGE}
    if column is not None:
        for block in catalog.batches([column]):
            names.update("" if name is None else str(name) for name in set(block[column].tolist()))
    return {_language_id(name): name for name in names}


@lru_cache(maxsize=256)
def _matcher(metadata: Metadata, begin: int, end: int, scripts: bool) -> Matcher:
    return Matcher(metadata.entries[begin:end], scripts)


@dataclass(frozen=True)
class _Captions:
    """Matches the captions of a block, language by language."""

    metadata: Metadata
    language_column: str | None

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the columns that it reads."""
        return ("caption",) if self.language_column is None else ("caption", self.language_column)

    @property
    def facts(self) -> dict[str, Any]:
        """What decides which entries a caption matches."""
        return {"format": FORMAT, "metadata": self.metadata.digest, "language_column": self.language_column}

    def match(
        self, block: dict[str, Shaped[np.ndarray, "n *_"]]
    ) -> Iterator[tuple[int, Int[np.ndarray, " r"], Matches, int, int]]:
        """Yield for each language: what stands for it, its rows, their matches, its first entry, and the one behind."""
        captions = block["caption"]
        if self.language_column is None:
            rows_of = {NO_LANGUAGE: np.arange(len(captions))}
        else:
            languages = np.array([str(name or "") for name in block[self.language_column].tolist()], object)
            rows_of = {name: np.flatnonzero(languages == name) for name in sorted(set(languages.tolist()))}
        for language, rows in rows_of.items():
            begin, end = self.metadata.of_language(language)
            matcher = _matcher(self.metadata, begin, end, self.language_column is not None)
            yield _language_id(language), rows, matcher.match(captions[rows].tolist()), begin, end


@dataclass(frozen=True)
class _Counts(Statistic):
    """Counts in how many captions of each language an entry stands."""

    captions: _Captions
    unit = "captions"

    @property
    def inputs(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the columns that it reads."""
        return self.captions.inputs

    @property
    def facts(self) -> dict[str, Any]:  # type: ignore[override]
        """What decides the counts."""
        return {"statistic": "metaclip counts", **self.captions.facts}

    def __call__(self, block: dict[str, Shaped[np.ndarray, "n *_"]]) -> Arrays:
        """Count the matches of a block."""
        found = [_NO_COUNTS]
        for language, rows, matches, begin, end in self.captions.match(block):
            texts = {
                "text_language": np.array([language], np.uint64),
                "texts": np.array([len(rows)]),
                "matched": np.array([matches.is_matched.sum()], np.int64),
            }
            found.append(_sparse(language, begin, count=matches.total(end - begin).astype(np.int64)) | texts)
        return _add_counts(found, ("texts", "matched"))

    def merge(self, parts: Sequence[Arrays]) -> Arrays:
        """Add up counts."""
        return _add_counts(parts, ("texts", "matched"))


@dataclass(frozen=True)
class _Images(Statistic):
    """Tells which pairs have the same image, and puts them into an order that is drawn."""

    seed: int
    inputs = ("key", "caption", "digest", "path", "offset")
    unit = "pairs"

    @property
    def facts(self) -> dict[str, Any]:  # type: ignore[override]
        """What decides the order."""
        return {"statistic": "metaclip images", "seed": self.seed}

    def __call__(self, block: dict[str, Shaped[np.ndarray, "n *_"]]) -> Arrays:
        """Return a number for each image, and one for each pair that is drawn."""
        keys, captions = block["key"].tolist(), [caption or "" for caption in block["caption"].tolist()]
        return {"image": hash_images(block).view(np.int64), "order": draw(self.seed, keys, captions, purpose="choice")}

    def merge(self, parts: Sequence[Arrays]) -> Arrays:
        """Join blocks."""
        return concatenate(parts)


@dataclass(frozen=True)
class _Draws:
    """The probability of each caption of a block, and how much of it is kept."""

    captions: _Captions
    balance: Balance
    seed: int | None
    """Decides which pairs are kept; None if every pass of training draws."""
    shares: Float[np.ndarray, " N"] | None
    """What the choice among the captions of an image leaves of each pair of the catalog; None: no choice is made."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the columns that it reads."""
        drawn_by = () if self.seed is None else ("key",)
        return (*drawn_by, *self.captions.inputs, *(() if self.shares is None else (POSITION,)))

    @property
    def facts(self) -> dict[str, Any]:
        """What decides the draws."""
        shares = None if self.shares is None else hashlib.blake2b(self.shares.tobytes(), digest_size=16).hexdigest()
        return {**self.captions.facts, **self.balance.facts, "seed": self.seed, "shares": shares}

    def share(self, block: dict[str, Shaped[np.ndarray, "n *_"]]) -> Float[np.ndarray, " n"]:
        """Return what the choice among the captions of an image leaves of each pair."""
        if self.shares is None:
            return np.ones(len(block["caption"]))
        return np.asarray(self.shares[block[POSITION]], np.float64)

    def kept(
        self, block: dict[str, Shaped[np.ndarray, "n *_"]], chances: Float[np.ndarray, " n"]
    ) -> Float[np.ndarray, " n"]:
        """Return 1 for each pair that is drawn and else 0; where training draws, its chance."""
        if self.seed is None:
            return chances
        texts = [caption or "" for caption in block["caption"].tolist()]
        return (draw(self.seed, block["key"].tolist(), texts) < chances).astype(np.float64)


@dataclass(frozen=True)
class _Effect(Statistic):
    """Counts what balancing leaves of each entry, and what other t would keep."""

    draws: _Draws
    grid: Float[np.ndarray, "S L"]
    unit = "captions"

    @property
    def inputs(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the columns that it reads."""
        return self.draws.inputs

    @property
    def facts(self) -> dict[str, Any]:  # type: ignore[override]
        """What decides the counts."""
        return {"statistic": "metaclip effect", "grid": self.grid.tolist(), **self.draws.facts}

    def __call__(self, block: dict[str, Shaped[np.ndarray, "n *_"]]) -> Arrays:
        """Count the effect on a block."""
        count = len(block["caption"])
        chances, kept_at, found = np.zeros(count), np.zeros(len(self.grid)), [_NO_COUNTS]
        parts = list(self.draws.captions.match(block))
        balance, share = self.draws.balance, self.draws.share(block)
        for language, rows, matches, begin, end in parts:
            chances[rows] = share[rows] * matches.probabilities(balance.probabilities(language, begin, end))
            for place, thresholds in enumerate(self.grid):
                of_entry = balance.probabilities(language, begin, end, thresholds)
                kept_at[place] += share[rows] @ matches.probabilities(of_entry)
        kept = self.draws.kept(block, chances)
        for language, rows, matches, begin, end in parts:
            texts = {
                "text_language": np.array([language], np.uint64),
                "expected": np.array([chances[rows].sum()]),
                "kept": np.array([kept[rows].sum()]),
            }
            found.append(_sparse(language, begin, count=matches.total(end - begin, kept[rows])) | texts)
        bins = np.minimum((chances * PROBABILITY_BINS).astype(np.int64), PROBABILITY_BINS - 1)
        some = chances > 0
        return _add_counts(found, ("expected", "kept")) | {
            "pairs_of_bin": np.bincount(bins[some], minlength=PROBABILITY_BINS),
            "kept_of_bin": np.bincount(bins[some], kept[some], PROBABILITY_BINS).astype(np.float64),
            "kept_at": kept_at,
        }

    def merge(self, parts: Sequence[Arrays]) -> Arrays:
        """Add up counts."""
        plain = {
            name: np.sum([part[name] for part in parts], axis=0) for name in ("pairs_of_bin", "kept_of_bin", "kept_at")
        }
        return _add_counts(parts, ("expected", "kept")) | plain


@dataclass(frozen=True)
class _Balancing(Work):
    """Decides about each pair by the draws of its entries."""

    draws: _Draws
    name: str
    unit = "captions"

    @property
    def inputs(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the columns that it reads."""
        return self.draws.inputs

    @property
    def outputs(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the columns that it makes."""
        return (f"{self.name}_cause", *([f"{self.name}_probability"] if self.draws.seed is None else []))

    @property
    def facts(self) -> dict[str, Any]:  # type: ignore[override]
        """What decides the columns."""
        return self.draws.facts

    def __call__(self, block: dict[str, Shaped[np.ndarray, "n *_"]]) -> dict[str, Shaped[np.ndarray, "n *_"]]:
        """Decide about the pairs of a block."""
        chances, share = np.zeros(len(block["caption"])), self.draws.share(block)
        for language, rows, matches, begin, end in self.draws.captions.match(block):
            chances[rows] = matches.probabilities(self.draws.balance.probabilities(language, begin, end))
        kept = self.draws.kept(block, chances * share)
        causes = [chances == 0, kept > 0, share == 0]
        cause = np.select(causes, [1, 0, 3], 2).astype(np.uint8)
        columns: Arrays = {
            f"{self.name}_cause": cause,
            f"{self.name}_probability": (chances * share).astype(np.float32),
        }
        return {name: columns[name] for name in self.outputs}


_NO_COUNTS: Arrays = {
    "language": np.empty(0, np.uint64),
    "entry": np.empty(0, np.int64),
    "count": np.empty(0, np.int64),
    "text_language": np.empty(0, np.uint64),
    "texts": np.empty(0, np.int64),
    "matched": np.empty(0, np.int64),
    "expected": np.empty(0),
    "kept": np.empty(0),
}
"""The counts of a block without rows."""


def _sparse(language: int, begin: int, count: Shaped[np.ndarray, " E"]) -> Arrays:
    """Return the values of a language's entries that are not 0."""
    entries = np.flatnonzero(count)
    return {
        "language": np.full(len(entries), language, np.uint64),
        "entry": entries + begin,
        "count": count[entries],
    }


def _add_counts(parts: Sequence[Arrays], of_texts: tuple[str, ...]) -> Arrays:
    """Add up the counts of entries, and those of the captions of each language."""
    return _add(parts, ("language", "entry"), ("count",)) | _add(parts, ("text_language",), of_texts)


def _add(parts: Sequence[Arrays], keys: tuple[str, ...], values: tuple[str, ...]) -> Arrays:
    """Add up the values of equal keys; the result is sorted by the keys."""
    joined: Arrays = {name: np.concatenate([part[name] for part in parts]) for name in (*keys, *values)}
    order = np.lexsort([joined[name] for name in reversed(keys)])
    joined = {name: joined[name][order] for name in joined}
    is_first = np.ones(len(order), bool)
    if len(order):
        is_first[1:] = np.any([joined[name][1:] != joined[name][:-1] for name in keys], axis=0)
    firsts = np.flatnonzero(is_first)
    sums = {name: np.add.reduceat(joined[name], firsts) if len(firsts) else joined[name] for name in values}
    return {**{name: joined[name][firsts] for name in keys}, **sums}


@dataclass(frozen=True)
class _Shown:
    """What balancing has done, for people."""

    metadata: Metadata
    names: dict[int, str]
    """Languages by what stands for them."""
    counted: Arrays
    balance: Balance
    effect: Arrays
    grid: Float[np.ndarray, "S L"]
    """Other t of each language."""

    def tables(self) -> tuple[Table, ...]:
        """Return the languages, the head, the tail, and what other t would do."""
        return (self._languages(), self._head(), self._ranges(), *([self._settings()] if len(self.grid) else []))

    def charts(self) -> tuple[Histogram | Curve, ...]:
        """Return the probabilities, the head and the tail, and what other t would do."""
        edges = np.linspace(0, 1, PROBABILITY_BINS + 1)
        probabilities_of_pairs = Histogram(
            title="Pairs by the probability with which they are kept",
            edges=tuple(edges.tolist()),
            counts=tuple(self.effect["pairs_of_bin"].tolist()),
            kept=tuple(self.effect["kept_of_bin"].tolist()),
        )
        order = np.argsort(self.balance.counts, kind="stable")
        ordered, last = self.balance.counts[order], {}
        before, after = np.cumsum(ordered), np.cumsum(self._after()[order])
        for place, count in enumerate(ordered.tolist()):  # the last entry with each count
            last[count] = place
        at = list(last.values())
        some = [at[place] for place in np.unique(np.linspace(0, len(at) - 1, 200).astype(int))]
        shares = Curve(
            title="Share of the matches that falls on entries with up to so many captions",
            x=tuple(float(ordered[place]) for place in some),
            lines={
                "before": tuple((before[some] / before[-1]).tolist()),
                "after": tuple((after[some] / max(after[-1], 1e-300)).tolist()),
            },
            x_label="captions of the entry before balancing",
            is_log=True,
            chosen=self._chosen(),
        )
        return (probabilities_of_pairs, shares, *([self._curve()] if len(self.grid) else []))

    def _chosen(self) -> float | None:
        """Return the t that was used, if there is one for all."""
        return float(self.balance.thresholds[0]) if len(self.balance.thresholds) == 1 else None

    def _after(self) -> Float[np.ndarray, " m"]:
        """Return the captions of each entry after balancing."""

        def keys(sparse: Arrays) -> Int[np.ndarray, " _"]:
            places = np.searchsorted(self.balance.languages, sparse["language"])
            return np.asarray(places * len(self.metadata.entries) + sparse["entry"])

        found = np.zeros(len(self.balance.entries))
        found[np.searchsorted(keys(self.counted), keys(self.effect))] = self.effect["count"]
        return found

    def _name(self, language: int) -> str:
        if len(self.names) == 1:
            return "all"
        return self.names.get(language) or "without a language"

    def _languages(self) -> Table:
        rows = []
        for language, texts, matched in zip(
            *(self.counted[name].tolist() for name in ("text_language", "texts", "matched")), strict=True
        ):
            cells = ["0", "-", "-", "0", "0"]
            if matched:
                place = int(np.searchsorted(self.balance.languages, np.uint64(language)))
                counts, t = self.balance.by_language()[place], self.balance.thresholds[place]
                found = int(np.searchsorted(self.effect["text_language"], np.uint64(language)))
                expected, kept = self.effect["expected"][found], self.effect["kept"][found]
                cells = [
                    f"{len(counts):,}",
                    f"{t:,.10g}",
                    f"{tail_share(counts, t):.1%}",
                    f"{expected:,.1f}",
                    f"{kept:,.0f}",
                ]
            rows.append((self._name(language), f"{texts:,}", f"{matched:,}", *cells))
        columns = (
            "captions",
            "number",
            "with an entry",
            "entries found",
            "t",
            "share of the tail",
            "kept, expected",
            "kept",
        )
        return Table(title="Matches and balance", columns=columns, rows=tuple(sorted(rows)))

    def _head(self) -> Table:
        """Return the entries with the most captions before."""
        after, rows = self._after(), []
        languages = np.repeat(np.arange(len(self.balance.languages)), np.diff([*self.balance.starts, len(after)]))
        for place in np.argsort(-self.balance.counts, kind="stable")[:EXAMPLES].tolist():
            language, count = languages[place], self.balance.counts[place]
            entry = self.metadata.entries[self.balance.entries[place]]
            if len(self.names) > 1:
                entry = f"{entry} ({self._name(int(self.balance.languages[language]))})"
            chance = min(1.0, self.balance.thresholds[language] / count)
            rows.append((entry, f"{count:,}", f"{chance:.4f}", f"{after[place]:,.0f}"))
        columns = ("entry", "captions before", "probability", "captions after")
        return Table(title="Head: the entries with the most captions", columns=columns, rows=tuple(rows))

    def _ranges(self) -> Table:
        """Return the entries by the size of their counts, from the tail to the head."""
        counts, after, rows = self.balance.counts, self._after(), []
        digits = np.floor(np.log10(counts) + 1e-9).astype(int)
        for digit in range(int(digits.max()) + 1):
            some = np.flatnonzero(digits == digit)
            examples = ", ".join(self.metadata.entries[entry] for entry in self.balance.entries[some[:3]].tolist())
            rows.append(
                (
                    f"{10**digit:,} to {10 ** (digit + 1) - 1:,}",
                    f"{len(some):,}",
                    f"{counts[some].sum():,}",
                    f"{counts[some].sum() / counts.sum():.1%}",
                    f"{after[some].sum():,.0f}",
                    f"{after[some].sum() / max(after.sum(), 1e-300):.1%}",
                    examples,
                )
            )
        missing = len(self.metadata.entries) - len(np.unique(self.balance.entries))
        rows.insert(0, ("none", f"{missing:,}", "0", "0.0%", "0", "0.0%", ""))
        columns = ("captions of an entry", "entries", "matches before", "share", "matches after", "share", "such as")
        return Table(title="From the tail to the head: entries by their captions", columns=columns, rows=tuple(rows))

    def _tail_shares(self) -> list[float]:
        """Return the share of the tail at each setting of the curve, before balancing."""
        counts = self.balance.by_language()
        total = self.balance.counts.sum()
        return [
            sum(tail_share(count, t) * count.sum() for count, t in zip(counts, row, strict=True)) / total
            for row in self.grid
        ]

    def _settings(self) -> Table:
        captions, rows = self.counted["texts"].sum(), []
        for thresholds, kept, share in zip(self.grid, self.effect["kept_at"], self._tail_shares(), strict=True):
            first = (
                f"{thresholds[0]:,.10g}"
                if len(thresholds) == 1
                else f"{thresholds.min():,.10g} to {thresholds.max():,.10g}"
            )
            rows.append((first, f"{kept:,.0f}", f"{kept / captions:.2%}", f"{share:.2%}"))
        columns = ("t", "pairs kept, expected", "of all", "share of the tail")
        return Table(title="What other t would keep", columns=columns, rows=tuple(rows))

    def _curve(self) -> Curve:
        shares, is_one = self._tail_shares(), self.grid.shape[1] == 1
        lines = {"pairs kept": tuple((self.effect["kept_at"] / self.counted["texts"].sum()).tolist())}
        if is_one:
            lines["matches in the tail"] = tuple(shares)
        return Curve(
            title="What other t would keep: share of all pairs" + (", and share of the tail" if is_one else ""),
            x=tuple(self.grid[:, 0].tolist()) if is_one else tuple(shares),
            lines=lines,
            x_label="t" if is_one else "share of the matches in the tail, of each language",
            is_log=True,
            chosen=self._chosen() if is_one else None,
        )
