"""K-LITE: captions that say what a rare word in them means, from WordNet or Wiktionary.

For each caption its noun phrases are found and looked up. Of those that have a definition the rarest one of the pool
is taken (the alphabetically first of several), and the definition is put behind the caption:

    an ox pulling a plow ; plow , a farm tool having one or more heavy blades to break the soil

No pair is dropped. ``NAME_caption`` holds the new captions; training reads them with ``train.captions``, and pairs that
have none keep their own. Class names are explained in the same way when a model is evaluated (``--knowledge``).

Noun phrases are runs of adjectives and nouns that end with a noun; the last of several words before an article is taken
for a verb ("the train leaves the station"). Words get their parts of speech from the tagger of the package textblob, a
lexicon with rules (English, 2 MB); `benchmarks/noun_phrases.py` compares it with others.

Source: K-LITE (arXiv 2204.09222), Sec. 3; what `modeclip.data.knowledge` says.
Price: docs/scale.md. Captions are tagged twice, once to count and once to decide. Memory: the dictionaries, and 16
bytes for each phrase that occurs and has a definition.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int64, Shaped, UInt64

from modeclip.curation.counting import Counts, hash_text
from modeclip.curation.method import Context, Histogram, Prepared, Table, draw
from modeclip.data.knowledge import Entry, Knowledge, explained, load_knowledge
from modeclip.data.mapping import Work, map_fragments
from modeclip.errors import ModeclipError

CACHED = 1 << 17
"""Captions whose phrases a process keeps."""
SHOWN = 12
"""Phrases in a table."""
FORMAT = 1
"""Part of the facts; raise it when other phrases are found."""
_TOKEN = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]")
"""A word, with hyphens and apostrophes inside it, or a sign."""
NOUNS, ADJECTIVES = ("NN", "NNS", "NNP", "NNPS"), ("JJ", "JJR", "JJS", "VBN")
ARTICLES = ("DT", "PRP$", "PDT")
"""Tags of the Penn treebank. Participles such as "grilled" stand like adjectives, "his" like an article."""


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
        found = fragments.total()
        if not len(found["keys"]):
            raise ModeclipError(f"klite: no caption has a noun phrase that {', '.join(self.knowledge)} defines")
        work = Explain(
            name=context.name,
            names=knowledge.names,
            share=self.share,
            seed=self.seed,
            keys=found["keys"],
            counts=found["counts"],
            dictionaries=knowledge.digests,
        )
        return Prepared(work=work, causes=(), tables=(_table(found),), charts=(_chart(found["counts"]),))


# ---------------------------------------------------------------- noun phrases


@cache
def load_tagger() -> Callable[[str], list[tuple[str, str]]]:
    """Return a function that tells the part of speech of each word of a text of words with spaces between them.

    Raises:
        ModeclipError: Its package is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it leaves the file of its lexicon open
            from textblob.en import tag

            tag("a word", tokenize=False)  # reads the lexicon
    except ImportError:
        raise ModeclipError('klite needs the package textblob: pip install "modeclip[curate]"') from None
    return lambda text: tag(text, tokenize=False)


def noun_phrases(caption: str) -> list[str]:
    """Return the noun phrases of a caption, in lower case and in order, without articles.

    Examples:
        >>> noun_phrases("Two small dogs play with a red ball.")
        ['small dogs', 'red ball']
    """
    text = " ".join(_TOKEN.findall(caption.lower()))
    found, words, is_noun = list[str](), list[str](), list[bool]()

    def end(*, before_article: bool = False) -> None:
        """End a phrase with its last noun; right before an article the last of several words is rather a verb."""
        last = len(words) - (before_article and len(words) > 1)
        while last and not is_noun[last - 1]:
            last -= 1
        if last:
            found.append(" ".join(words[:last]))
        words.clear()
        is_noun.clear()

    for word, tag in load_tagger()(text) if text else ():
        if (tag in NOUNS and word[0].isalnum()) or tag in ADJECTIVES:
            if tag in ADJECTIVES and is_noun and is_noun[-1]:  # an adjective behind a noun begins another phrase
                end()
            words.append(word)
            is_noun.append(tag in NOUNS)
        else:
            end(before_article=tag in ARTICLES)
    end()
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
        return decided | {"share": self.share, "seed": self.seed}

    def __call__(self, block: dict[str, Shaped[np.ndarray, "n *_"]]) -> dict[str, Shaped[np.ndarray, " n"]]:
        """Write the captions of a block."""
        captions = [caption or "" for caption in block["caption"]]
        written = np.full(len(captions), None, object)
        for place in np.flatnonzero(draw(self.seed, block["key"].tolist(), captions) < self.share).tolist():
            if entry := self.rarest(captions[place]):
                written[place] = explained(captions[place], entry.phrase, entry.definition)
        return {f"{self.name}_cause": np.zeros(len(captions), np.uint8), f"{self.name}_caption": written}

    def rarest(self, caption: str) -> Entry | None:
        """Return the entry of a caption whose phrase is the rarest of the pool, or None if it has none."""
        entries = _entries_by(self.names)(caption)
        return min(entries, key=lambda entry: (self._count(entry.phrase), entry.phrase), default=None)

    def _count(self, phrase: str) -> int:
        return int(self.counts[np.searchsorted(self.keys, np.uint64(hash_text(phrase)))])


def _table(found: dict[str, np.ndarray]) -> Table:
    captions, with_one = int(found["captions"][0]), int(found["explained"][0])
    rows = (
        ("captions", f"{captions:,}"),
        ("of these with a phrase that has a definition", f"{with_one:,} ({with_one / max(1, captions):.1%})"),
        ("different phrases with a definition", f"{len(found['keys']):,}"),
        ("of these in a single caption", f"{int((found['counts'] == 1).sum()):,}"),
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
