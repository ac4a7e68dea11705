"""What words mean: definitions of phrases, from WordNet and from Wiktionary, for captions and for class names.

Dictionaries are named as a user names them, and asked in this order:

    wordnet, wordnet:FOLDER    WordNet's own files, as `modeclip.data.wordnet` finds them
    FILE                       a dump of Wiktionary by kaikki.org: a JSON object a line, plain or gzipped

A phrase is looked up in lower case; while no dictionary has it, its first word is dropped: "big red fox" is explained
by "red fox". The first sense counts, and an entry that is only a form of another word ("foxes") leads to that word,
over at most ``MOST_WORDS`` words. Where Wiktionary has several entries for a word, nouns and names come first, and
words that are written in lower case.

Source: K-LITE (arXiv 2204.09222), Sec. 3, and what its released code does.
Price: WordNet takes 1.5 s and 130 MB. A dump of Wiktionary is read once in each process: docs/curation.md.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

from modeclip.data.wordnet import WordNet, load_wordnet
from modeclip.errors import DamagedError, ModeclipError
from modeclip.system.console import log
from modeclip.system.paths import absolute, home, open_file, state

WORDNET = "wordnet"
MOST_WORDS = 4
"""Words that are looked at for one entry, the first included, where each is only a form of the next (K-LITE)."""
GZIP_START = b"\x1f\x8b"
NAMING = ("noun", "name")
"""Parts of speech in a dump whose entries come first, since what is looked up are names of things."""
HOW_TO_GET = "get the JSON lines of one language from kaikki.org, such as kaikki.org-dictionary-English.jsonl.gz"


@runtime_checkable
class Dictionary(Protocol):
    """Anything that has definitions."""

    @property
    def name(self) -> str:
        """What it is loaded from, in any folder of this machine."""

    @property
    def digest(self) -> str:
        """Hash of its content."""

    def define(self, phrase: str) -> str | None:
        """Return what a phrase in lower case means, in its first sense; None if it is not there."""


@dataclass(frozen=True)
class Entry:
    """A phrase that has a definition."""

    phrase: str
    """The phrase in lower case, as it was found."""
    definition: str
    """What it means."""
    source: str
    """The dictionary that says so."""


@dataclass(frozen=True)
class Knowledge:
    """Dictionaries, the first of which that has a phrase defines it."""

    dictionaries: tuple[Dictionary, ...]

    def find(self, text: str) -> Entry | None:
        """Return the entry of a phrase, or of what is left of it when leading words are dropped."""
        words = text.lower().replace("_", " ").split()
        for start in range(len(words)):
            phrase = " ".join(words[start:])
            for dictionary in self.dictionaries:
                if definition := dictionary.define(phrase):
                    return Entry(phrase, definition, dictionary.name)
        return None

    def explain(self, prompts: Sequence[str], name: str) -> tuple[str, ...]:
        """Return prompts with a name in them, each followed by what the name means if that is known."""
        entry = self.find(name)
        return tuple(prompts if entry is None else (explained(text, name, entry.definition) for text in prompts))

    @property
    def names(self) -> tuple[str, ...]:
        """What the same dictionaries are loaded from, in any folder of this machine."""
        return tuple(one.name for one in self.dictionaries)

    @property
    def digests(self) -> list[str]:
        """What identifies their content."""
        return [one.digest for one in self.dictionaries]

    @property
    def identities(self) -> list[dict[str, str]]:
        """Names and digests, as JSON."""
        return [{"name": one.name, "digest": one.digest} for one in self.dictionaries]


def explained(text: str, phrase: str, definition: str) -> str:
    """Put a definition behind a text, as K-LITE does.

    Examples:
        >>> explained("a photo of a fox.", "fox", "a carnivorous mammal")
        'a photo of a fox. ; fox , a carnivorous mammal'
    """
    return f"{text} ; {phrase} , {definition}"


def load_knowledge(names: Sequence[str]) -> Knowledge:
    """Open dictionaries.

    Args:
        names: Their names, as at the top of this module, in the order in which they are asked.

    Raises:
        ModeclipError: There is none of this name, or its files have another format.
    """
    found: list[Dictionary] = []
    for name in names:
        kind, _, folder = name.partition(":")
        if kind == WORDNET:
            place = absolute(home(folder)) if folder else None
            found.append(_WordNetDictionary(f"{WORDNET}:{place}" if place else WORDNET, _load_wordnet(place)))
        else:
            found.append(_load_wiktionary(absolute(home(name)), _state_of(name)))
    return Knowledge(tuple(found))


def check_knowledge(names: Sequence[str]) -> None:
    """Raise for dictionaries that are not there; a dump is not read for it."""
    for name in names:
        if name.partition(":")[0] == WORDNET:
            load_knowledge([name])
        else:
            _state_of(name)


def _state_of(name: str) -> str:
    if not (moment := state(home(name))):
        raise ModeclipError(
            f"knowledge {name!r}: no such file; give wordnet, wordnet:FOLDER, or a dump of Wiktionary: {HOW_TO_GET}"
        )
    return moment


@dataclass(frozen=True)
class _WordNetDictionary:
    name: str
    wordnet: WordNet = field(repr=False)

    @property
    def digest(self) -> str:
        return self.wordnet.digest

    def define(self, phrase: str) -> str | None:
        senses = self.wordnet.senses(phrase)
        return senses[0].definition if senses else None


@dataclass(frozen=True)
class Wiktionary:
    """The first senses of a dump of Wiktionary."""

    name: str
    """Its path."""
    digest: str
    """Hash of the file's lines."""
    _senses: dict[str, tuple[str, str]] = field(repr=False)
    """By word in lower case: what it means, and the word that it is a form of; one of them is empty."""

    def define(self, phrase: str) -> str | None:
        """Return what a phrase in lower case means, in its first sense; None if it is not there."""
        for _ in range(MOST_WORDS):
            definition, phrase = self._senses.get(phrase, ("", ""))
            if definition or not phrase:
                return definition or None
        return None


@lru_cache(maxsize=1)
def _load_wordnet(folder: str | None) -> WordNet:
    return load_wordnet(folder)


@lru_cache(maxsize=1)
def _load_wiktionary(path: str, moment: str) -> Wiktionary:
    """Read a dump; ``moment`` is there so that a file that changes is read again."""
    del moment
    log(f"knowledge: reading {path}")
    return read_wiktionary(path)


def read_wiktionary(path: str) -> Wiktionary:
    """Read the first sense of each word of a dump of Wiktionary by kaikki.org.

    Raises:
        DamagedError: It ends early.
        ModeclipError: It has another format.
    """
    hashed = hashlib.blake2b(digest_size=16)
    ranks, senses = dict[str, int](), dict[str, tuple[str, str]]()
    for number, line in enumerate(_lines(path), 1):
        hashed.update(line)
        if not line.strip():
            continue
        entry = _parse(line, path, number)
        word = entry.get("word")
        if not isinstance(word, str) or not isinstance(entry.get("senses", []), list):
            if "redirect" in entry or "redirects" in entry:
                continue
            raise _other_format(path, number, "an object without word and senses")
        if entry.get("lang_code", "en") != "en":
            continue
        sense = next(filter(any, map(_sense_of, entry.get("senses", []))), None)
        key = word.lower()
        rank = 2 * (entry.get("pos") not in NAMING) + (word != key)
        if sense is not None and rank < ranks.get(key, 4):
            ranks[key], senses[key] = rank, sense
    if not senses:
        raise _other_format(path, 1, "no entry that has a definition")
    return Wiktionary(path, hashed.hexdigest(), senses)


def _sense_of(sense: Any) -> tuple[str, str]:
    """Return what a sense means, or the word in lower case that it is a form of; two empty texts if it says neither."""
    if not isinstance(sense, dict):
        return "", ""
    for form in (*(sense.get("form_of") or ()), *(sense.get("alt_of") or ())):
        if isinstance(form, dict) and isinstance(form.get("word"), str):
            return "", form["word"].lower()
    glosses = sense.get("glosses") or ()
    first = glosses[0] if isinstance(glosses, list) and isinstance(glosses[0], str) else ""
    return " ".join(first.split()), ""


def _lines(path: str) -> Iterator[bytes]:
    try:
        with open_file(path) as file:
            is_packed = file.read(2) == GZIP_START
            file.seek(0)
            if not is_packed:
                yield from file
                return
            with gzip.GzipFile(fileobj=file) as unpacked:
                yield from unpacked
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DamagedError(f"knowledge {path!r} is damaged ({error}); {HOW_TO_GET}") from None
    except OSError as error:
        raise ModeclipError(f"knowledge {path!r} cannot be read: {error.strerror or error}") from None


def _parse(line: bytes, path: str, number: int) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:
        raise _other_format(path, number, repr(line[:30].decode("utf-8", "replace"))) from None
    if not isinstance(entry, dict):
        raise _other_format(path, number, f"a {type(entry).__name__}")
    return entry


def _other_format(path: str, number: int, got: str) -> ModeclipError:
    return ModeclipError(
        f"knowledge {path!r}, line {number}: expected a JSON object with word and senses, got {got}; {HOW_TO_GET}"
    )
