"""Metadata: the list of entries that captions are matched with, from a file, from WordNet, or built from a corpus.

The published list has 500,000 entries of four sources, filled in this order: the numbers 0 to 99 and the names of
WordNet's synsets; words that Wikipedia has at least 100 times; pairs of words whose pointwise mutual information is at
least 30, the most frequent first; titles of articles with at least 70 views, the most viewed first. Signs that stand
alone are no entries. `build` does the same with any corpus. The result is sorted, so that it is the same whatever the
order and the blocks in which the corpus was read.

The pointwise mutual information of a pair of words is NLTK's, in bits, where the n words of the corpus have the words
a and b n_a and n_b times, and one directly before the other n_ab times in the same text:

    PMI = log2(n_ab n / (n_a n_b)) <= log2 n

so a corpus of a million words has no pair above 20. Words are what stands between the spaces of normalised texts.

Price: 4 microseconds of a core for a caption of 120 characters; 24 bytes for each distinct pair of words.

Source: MetaCLIP (arXiv 2309.16671), Sec. 3.1 and Table 1.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int

from modeclip.curation.matching import TEXTS_AT_ONCE, normalise
from modeclip.data.catalog import Catalog
from modeclip.data.prompts import check_texts
from modeclip.data.wordnet import WordNet
from modeclip.errors import ModeclipError, check_least, in_one_line
from modeclip.system.console import log
from modeclip.system.files import write_atomically
from modeclip.system.paths import home_path

NUMBERS = [str(number) for number in range(100)]
"""The first entries of the published list."""
PAIRS_AT_ONCE = 1 << 23
"""Pairs of words that are counted before they are added to the sum of those before."""


@dataclass(frozen=True, kw_only=True)
class MetadataConfig:
    """What an entry of metadata built from a corpus is."""

    min_count: int = 100
    """How often the corpus must have a word."""
    min_pmi: float = 30.0
    """Least pointwise mutual information of a pair of words, in bits; a corpus of n words has none above log2 n."""
    min_views: int = 70
    """How often a title must have been viewed."""
    max_entries: int = 500_000
    """Entries at most; sources are used up in their order."""

    def __post_init__(self) -> None:
        check_least("metaclip", self, min_count=1, min_views=0, max_entries=1)
        if not math.isfinite(self.min_pmi):
            raise ModeclipError(f"metaclip.min_pmi: expected a finite number, got {self.min_pmi}")


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """Entries to match captions with, for all languages or for each its own."""

    entries: tuple[str, ...]
    """The entries; those of each language are sorted, and each of them is there once."""
    languages: tuple[tuple[str, int, int], ...] | None = None
    """Each language and where its entries begin and end; None if all entries are for all captions."""

    @cached_property
    def digest(self) -> str:
        """A hash of the entries and of their languages."""
        content = json.dumps([self.entries, self.languages]).encode()
        return hashlib.blake2b(content, digest_size=16).hexdigest()

    def of_language(self, language: str) -> tuple[int, int]:
        """Return where the entries for captions of a language begin and end; there may be none."""
        if self.languages is None:
            return 0, len(self.entries)
        return {name: (begin, end) for name, begin, end in self.languages}.get(language, (0, 0))


def read_metadata(path: Path | str) -> Metadata:
    """Read entries from a text file with one on each line, from a list in JSON, or from a folder of such files.

    The files of a folder are named by languages, such as ``en.txt`` and ``ja.json``.

    Raises:
        ModeclipError: There is no such file, it is empty, is not UTF-8, or has an entry twice.
    """
    place = home_path(path)
    if not place.is_dir():
        return Metadata(entries=tuple(_read_entries(place)))
    entries: list[str] = []
    languages: list[tuple[str, int, int]] = []
    for file in sorted(place.iterdir(), key=lambda file: (file.stem, file.suffix)):
        if file.suffix in (".txt", ".json"):
            if languages and file.stem == languages[-1][0]:
                raise ModeclipError(f"metadata {place}: two files for the language {file.stem!r}: remove one of them")
            some = _read_entries(file)
            languages.append((file.stem, len(entries), len(entries) + len(some)))
            entries += some
    if not languages:
        raise ModeclipError(
            f"metadata {place}: expected a file LANGUAGE.txt or LANGUAGE.json for each language, got none"
        )
    return Metadata(entries=tuple(entries), languages=tuple(languages))


def write_metadata(path: Path | str, entries: Sequence[str]) -> None:
    """Write entries to a file that `read_metadata` reads: a list in JSON if its name ends so, else one on each line.

    Raises:
        ModeclipError: An entry has a line feed, which a file of lines cannot hold.
    """
    place = home_path(path)
    if place.suffix == ".json":
        write_atomically(place, json.dumps(list(entries), ensure_ascii=False, indent=0) + "\n")
        return
    for entry in entries:
        if not entry or len(entry.splitlines()) > 1:
            raise ModeclipError(f"{place}: the entry {entry!r} is no line of text; write to a file .json instead")
    write_atomically(place, "".join(f"{entry}\n" for entry in entries))


def _read_entries(path: Path) -> list[str]:
    """Read the entries of one file, and sort them."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModeclipError(f"metadata {in_one_line(error)}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ModeclipError(f"metadata {path}, line {line}: not UTF-8; save the file as UTF-8 text") from None
    if path.suffix == ".json":
        try:
            entries = json.loads(text)
        except ValueError as error:
            raise ModeclipError(f"metadata {path}: damaged JSON ({error}); expected a list of texts") from None
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            raise ModeclipError(f"metadata {path}: expected a list of texts, got other JSON")
    else:
        entries = [line for line in text.replace("\r\n", "\n").split("\n") if line]
    check_texts(entries, f"metadata {path}")
    if not entries:
        raise ModeclipError(f"metadata {path}: empty; expected an entry on each line")
    if len(set(entries)) < len(entries):
        twice, times = Counter(entries).most_common(1)[0]
        repeats = len(entries) - len(set(entries))
        raise ModeclipError(
            f"metadata {path}: {repeats:,} entries are repeats, such as {twice!r}, which is there {times} times; keep"
            " each entry once (sort -u)"
        )
    return sorted(entries)


def read_titles(path: Path | str) -> list[tuple[str, int]]:
    """Read titles with their views: on each line a title, a tab, and a number.

    Raises:
        ModeclipError: There is no such file, or a line is something else.
    """
    found = []
    for number, line in enumerate(read_corpus(path), 1):
        title, tab, views = line.rpartition("\t")
        if not tab or not views.strip().isdecimal():
            raise ModeclipError(f"{path}, line {number}: expected a title, a tab and its views, got {line[:60]!r}")
        found.append((title, int(views)))
    return found


def read_corpus(path: Path | str) -> Iterator[str]:
    """Yield the lines of a text file, which are the texts of a corpus.

    Raises:
        ModeclipError: There is no such file, or it is not UTF-8.
    """
    try:
        with home_path(path).open(encoding="utf-8-sig", newline="\n") as file:
            for line in file:
                yield line.rstrip("\r\n")
    except OSError as error:
        raise ModeclipError(in_one_line(error)) from error
    except UnicodeDecodeError:
        raise ModeclipError(f"{path}: not UTF-8; save the file as UTF-8 text") from None


def read_captions(catalog: Catalog) -> Iterator[str]:
    """Yield the captions of a catalog, which are the texts of a corpus."""
    for block in catalog.batches(["caption"]):
        yield from (caption or "" for caption in block["caption"].tolist())


def synset_names(wordnet: WordNet) -> list[str]:
    """Return the distinct names of synsets as entries: up to the first dot, with spaces; sorted."""
    names = {synset.name.partition(".")[0].replace("_", " ") for synset in wordnet.synsets}
    return sorted(name for name in names if not _is_sign(name))


def build(
    texts: Iterable[str],
    config: MetadataConfig | None = None,
    *,
    synsets: Iterable[str] = (),
    titles: Iterable[tuple[str, int]] = (),
) -> list[str]:
    """Build metadata from a corpus: numbers, synsets, words, pairs of words, titles.

    Args:
        texts: The corpus; the order of its texts does not matter.
        config: What is an entry; the numbers of the published list by default.
        synsets: Names of synsets, such as `synset_names` returns.
        titles: Titles with their views.

    Returns:
        The entries, sorted, each once.

    Examples:
        >>> config = MetadataConfig(min_count=2, min_pmi=1.0)
        >>> build(["hot dog", "a hot dog", "a cat"], config, titles=[("Hot Dog (sandwich)", 80), ("Cat", 9)])[100:]
        ['Hot Dog (sandwich)', 'a', 'a cat', 'dog', 'hot', 'hot dog']
    """
    config = config or MetadataConfig()
    found = dict.fromkeys([*NUMBERS, *sorted(synsets)])
    words, pairs = _count(texts, config)
    for source in (words, pairs, _viewed(titles, config.min_views)):
        found |= dict.fromkeys(entry for entry in source if not _is_sign(entry))
    kept = sorted(list(found)[: config.max_entries])
    if len(kept) < len(found):
        log(f"metadata: {len(found):,} entries were found; the first {len(kept):,} in the order of sources are used")
    return kept


def _is_sign(entry: str) -> bool:
    """Say whether an entry is blank or a single sign."""
    return not entry.strip() or (len(entry) == 1 and not entry.isalnum())


def _viewed(titles: Iterable[tuple[str, int]], min_views: int) -> list[str]:
    """Return titles with enough views, the most viewed first; those with a colon are no articles."""
    views: dict[str, int] = {}
    for title, number in titles:
        views[title] = views.get(title, 0) + number
    wanted = [(-number, title) for title, number in views.items() if number >= min_views and ":" not in title]
    return [title for _, title in sorted(wanted)]


def _count(texts: Iterable[str], config: MetadataConfig) -> tuple[list[str], list[str]]:
    """Return the frequent words, the most frequent first, and the pairs of words with enough PMI, likewise."""
    number_of: dict[str, int] = {}
    counts = np.zeros(0, np.int64)
    pairs, pair_counts = np.empty(0, np.int64), np.empty(0, np.int64)
    waiting: list[np.ndarray] = []
    reading = iter(texts)
    while block := list(islice(reading, TEXTS_AT_ONCE)):
        joined = " \n ".join(normalise(text) for text in block)
        encoded = pc.split_pattern(pa.array([joined], pa.large_string()), " ").values.dictionary_encode()
        numbers = np.array([number_of.setdefault(word, len(number_of)) for word in encoded.dictionary.to_pylist()])
        words = numbers[encoded.indices.to_numpy()]
        words = words[words != number_of.get("", -1)]  # more than one space
        counts = np.bincount(words, minlength=len(number_of)) + np.pad(counts, (0, len(number_of) - len(counts)))
        end = number_of.get("\n", -1)
        inside = (words[:-1] != end) & (words[1:] != end)
        waiting.append(words[:-1][inside] << 32 | words[1:][inside])
        if sum(map(len, waiting)) > PAIRS_AT_ONCE:
            pairs, pair_counts = _add(pairs, pair_counts, waiting)
            waiting = []
    pairs, pair_counts = _add(pairs, pair_counts, waiting)
    if "\n" in number_of:
        counts[number_of["\n"]] = 0
    words_of = list(number_of)
    frequent = sorted(
        (-count, word) for count, word in zip(counts.tolist(), words_of, strict=True) if count >= config.min_count
    )
    left, right = pairs >> 32, pairs & 0xFFFFFFFF
    pmi = np.log2(pair_counts * float(counts.sum())) - np.log2(counts[left].astype(float) * counts[right])
    is_sign = np.array([_is_sign(word) for word in words_of], bool)
    fits = np.flatnonzero((pmi >= config.min_pmi) & ~is_sign[left] & ~is_sign[right])
    collocations = sorted(
        (-count, f"{words_of[one]} {words_of[other]}")
        for count, one, other in zip(pair_counts[fits].tolist(), left[fits].tolist(), right[fits].tolist(), strict=True)
    )
    return [word for _, word in frequent], [pair for _, pair in collocations]


def _add(
    known: Int[np.ndarray, " k"], counts: Int[np.ndarray, " k"], blocks: Sequence[Int[np.ndarray, " _"]]
) -> tuple[Int[np.ndarray, " d"], Int[np.ndarray, " d"]]:
    """Return the distinct numbers of known ones and of blocks, ascending, with how often they occur."""
    more, more_counts = np.unique(np.concatenate([np.empty(0, np.int64), *blocks]), return_counts=True)
    both, place = np.unique(np.concatenate([known, more]), return_inverse=True)
    return both, np.bincount(place, np.concatenate([counts, more_counts]), len(both)).astype(np.int64)
