"""K-LITE: captions that say what a rare word in them means, from WordNet or Wiktionary.

For each caption its noun phrases are found and looked up. Of those that have a definition the rarest one of the pool
is taken (the alphabetically first of several), and the definition is put behind the caption:

    an ox pulling a plow ; plow , a farm tool having one or more heavy blades to break the soil

No pair is dropped. ``NAME_caption`` holds the new captions; training reads them with ``train.captions``, and pairs that
have none keep their own. Class names are explained in the same way when a model is evaluated (``--knowledge``).

Noun phrases are runs of adjectives and nouns that end with a noun. Words get their parts of speech from the tagger of
the package HanTa (English, 2 MB); `benchmarks/noun_phrases.py` compares it with others.

Source: K-LITE (arXiv 2204.09222), Sec. 3; what `modeclip.data.knowledge` says.
Price: docs/scale.md. Captions are tagged twice, once to count and once to decide. Memory: the dictionaries, and 16
bytes for each phrase that occurs and has a definition.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int64, Shaped, UInt64

from modeclip.curation.counting import Counts, add_counts, hash_text, in_ranges
from modeclip.curation.method import Context, Histogram, Prepared, Table, draw
from modeclip.data.knowledge import Entry, Knowledge, explained, load_knowledge
from modeclip.data.mapping import Work, map_fragments
from modeclip.errors import ModeclipError

CACHED = 1 << 17
"""Captions whose phrases a process keeps."""
FORMAT = 1
"""Part of the facts; raise it when other phrases are found."""
PURPOSE = "klite"
"""What the pairs with a new caption are drawn for; part of the facts of the captions."""
_TOKEN = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]")
"""A word, with hyphens and apostrophes inside it, or a sign."""
NOUNS, ADJECTIVES = ("NN0", "NN1", "NN2", "NP0"), ("AJ0", "AJC", "AJS", "VVN")
"""Tags of the British National Corpus; participles such as "grilled" stand like adjectives."""
LONGEST_WORD = 40
"""Letters of a word from which on it is no noun: the tagger takes minutes for some thousands of letters."""


@dataclass(frozen=True, kw_only=True)
class KliteConfig:
    """Put the definition of the rarest noun phrase behind each caption (K-LITE)."""

    method: ClassVar[str] = "klite"

    knowledge: tuple[str, ...] = ("wordnet",)
    """Dictionaries in the order in which they are asked: wordnet, wordnet:FOLDER, or a dump of Wiktionary by kaikki.org
    (JSON lines, plain or .gz). The paper: Wiktionary, then WordNet."""
    share: float = 1.0
    """Share of the pairs that get a new caption if there is one for them, in (0, 1]; which, is drawn for each pair."""
    seed: int = 0
    """Decides the draws."""

    def __post_init__(self) -> None:
        """Check the share, and that there are dictionaries."""
        if not 0 < self.share <= 1:
            raise ModeclipError(f"klite.share: expected a share in (0, 1], got {self.share:g}")
        if not 0 <= self.seed < 1 << 63:
            raise ModeclipError(f"klite.seed: expected 0 to 2^63 - 1, got {self.seed}")
        if not self.knowledge:
            raise ModeclipError("klite.knowledge: expected a dictionary, such as wordnet, got none")

    def prepare(self, context: Context) -> Prepared:
        """Count the phrases of the pool that have a definition.

        Raises:
            ModeclipError: A dictionary cannot be read, or no caption has a phrase that it defines.
        """
        load_tagger()
        _entries_by.cache_clear()  # its files may have changed
        knowledge = load_knowledge(self.knowledge)
        fragments = map_fragments(
            context.catalog,
            Phrases(knowledge),
            f"{context.name}: count phrases",
            ray=context.ray,
            selected=context.selected,
        )
        ranges = list(in_ranges(fragments, "keys", "counts", add_counts))
        keys, counts = (np.concatenate(side) for side in zip(*ranges, strict=True))
        if not len(keys):
            raise ModeclipError(f"klite: no caption has a noun phrase that {', '.join(self.knowledge)} defines")
        work = Explain(
            name=context.name,
            names=knowledge.names,
            share=self.share,
            seed=self.seed,
            keys=keys,
            counts=counts,
            dictionaries=knowledge.digests,
        )
        captions, with_one = (sum(int(part[name][0]) for part in fragments) for name in ("captions", "explained"))
        return Prepared(work=work, causes=(), tables=(_table(captions, with_one, counts),), charts=(_chart(counts),))


# ---------------------------------------------------------------- noun phrases


@cache
def load_tagger() -> Callable[[list[str]], list[str]]:
    """Return a function that tells the part of speech of each word of a text.

    Raises:
        ModeclipError: Its package is not installed.
    """
    try:
        from HanTa.HanoverTagger import HanoverTagger
    except ImportError:
        raise ModeclipError('klite needs the package hanta: pip install "modeclip[curate]"') from None
    tagger = HanoverTagger("morphmodel_en.pgz")
    return lambda words: [tag for _, _, tag in tagger.tag_sent(words)]


def noun_phrases(caption: str) -> list[str]:
    """Return the noun phrases of a caption, in lower case and in order, without articles.

    Examples:
        >>> noun_phrases("Two small dogs play with a red ball.")
        ['small dogs', 'red ball']
    """
    tokens = [token if len(token) < LONGEST_WORD else "-" for token in _TOKEN.findall(caption.lower())]
    found, words, last = list[str](), list[str](), 0  # of the words of a phrase, those up to the last noun
    for word, tag in (*zip(tokens, load_tagger()(tokens) if tokens else (), strict=True), ("", "")):
        is_noun, is_adjective = tag in NOUNS and word[0].isalnum(), tag in ADJECTIVES
        if not is_noun and (not is_adjective or last):  # an adjective behind a noun begins another phrase
            if last:
                found.append(" ".join(words[:last]))
            words, last = [], 0
        if is_noun or is_adjective:
            words.append(word)
            last = len(words) if is_noun else last
    return found


@lru_cache(maxsize=1)
def _entries_by(names: tuple[str, ...]) -> Callable[[str], tuple[Entry, ...]]:
    """Return a function that returns the entries of a caption by this process's dictionaries."""
    knowledge = load_knowledge(names)

    @lru_cache(maxsize=CACHED)
    def entries(caption: str) -> tuple[Entry, ...]:
        entries = (knowledge.find(phrase) for phrase in noun_phrases(caption))
        return tuple({entry.phrase: entry for entry in entries if entry is not None}.values())

    return entries


# ---------------------------------------------------------------- counting and deciding


class Phrases(Counts):
    """Counts the phrases that have a definition, each once a caption, and captions with one (``explained``)."""

    inputs = ("caption",)
    unit = "captions"

    def __init__(self, knowledge: Knowledge) -> None:
        self.names = knowledge.names
        self.facts = {"statistic": "defined phrases", "format": FORMAT, "dictionaries": knowledge.digests}

    def __call__(self, block: dict[str, Shaped[np.ndarray, "n *_"]]) -> dict[str, Shaped[np.ndarray, "..."]]:
        """Count those of a block."""
        entries = _entries_by(self.names)
        phrases, captions = Counter[str](), 0
        for caption in block["caption"]:
            found = entries(caption or "")
            phrases.update(entry.phrase for entry in found)
            captions += bool(found)
        keys = np.array([hash_text(phrase) for phrase in phrases], np.uint64)
        order, counts = np.argsort(keys), np.array(list(phrases.values()), np.int64)
        totals = {"explained": np.array([captions]), "captions": np.array([len(block["caption"])])}
        return {"keys": keys[order], "counts": counts[order], **totals}

    def merge(self, parts: Sequence[dict[str, Shaped[np.ndarray, "..."]]]) -> dict[str, Shaped[np.ndarray, "..."]]:
        """Add up the counts."""
        totals = {name: np.sum([part[name] for part in parts], axis=0) for name in ("explained", "captions")}
        return super().merge(parts) | totals


@dataclass(frozen=True, kw_only=True)
class Explain(Work):
    """Writes the captions of the pairs that are drawn."""

    name: str
    names: tuple[str, ...]
    """What the dictionaries are loaded from, wherever this works."""
    share: float
    seed: int
    keys: UInt64[np.ndarray, " k"]
    """Hashes of the phrases that occur, ascending."""
    counts: Int64[np.ndarray, " k"]
    """In how many captions each occurs."""
    dictionaries: list[str]
    """Their digests."""
    inputs = ("key", "caption")
    unit = "captions"

    @property
    def outputs(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the columns."""
        return f"{self.name}_cause", f"{self.name}_caption"

    @property
    def facts(self) -> dict[str, Any]:  # type: ignore[override]
        """What decides the captions."""
        counted = hashlib.blake2b(self.keys.tobytes() + self.counts.tobytes(), digest_size=16).hexdigest()
        decided = {"format": FORMAT, "counts": counted, "dictionaries": self.dictionaries}
        return decided | {"share": self.share, "seed": self.seed, "purpose": PURPOSE}

    def __call__(self, block: dict[str, Shaped[np.ndarray, "n *_"]]) -> dict[str, Shaped[np.ndarray, " n"]]:
        """Write the captions of a block."""
        captions = [caption or "" for caption in block["caption"]]
        written = np.full(len(captions), None, object)
        drawn = draw(self.seed, block["key"].tolist(), captions, purpose=PURPOSE)
        for place in np.flatnonzero(drawn < self.share).tolist():
            if entry := self.rarest(captions[place]):
                written[place] = explained(captions[place], entry.phrase, entry.definition)
        return {f"{self.name}_cause": np.zeros(len(captions), np.uint8), f"{self.name}_caption": written}

    def rarest(self, caption: str) -> Entry | None:
        """Return the entry of a caption whose phrase is the rarest of the pool, or None if it has none."""
        entries = _entries_by(self.names)(caption)
        return min(entries, key=lambda entry: (self._count(entry.phrase), entry.phrase), default=None)

    def _count(self, phrase: str) -> int:
        return int(self.counts[np.searchsorted(self.keys, np.uint64(hash_text(phrase)))])


def _table(captions: int, with_one: int, counts: Int64[np.ndarray, " k"]) -> Table:
    rows = (
        ("captions", f"{captions:,}"),
        ("of these with a phrase that has a definition", f"{with_one:,} ({with_one / max(1, captions):.1%})"),
        ("different phrases with a definition", f"{len(counts):,}"),
        ("of these in a single caption", f"{int((counts == 1).sum()):,}"),
    )
    return Table(title="noun phrases", columns=("", "number"), rows=rows)


def _chart(counts: Int64[np.ndarray, " k"]) -> Histogram:
    edges = 2.0 ** np.arange(int(counts.max()).bit_length() + 1)
    numbers, _ = np.histogram(counts, bins=edges)
    return Histogram(
        title="phrases with a definition, by the number of captions that they are in",
        edges=tuple(edges.tolist()),
        counts=tuple(numbers.tolist()),
        is_log=True,
    )
