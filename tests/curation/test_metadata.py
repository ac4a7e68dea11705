"""Metadata against a slow count of words and pairs; files that are none."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeclip.curation import metadata
from modeclip.curation.matching import normalise
from modeclip.curation.metadata import (
    MetadataConfig,
    build,
    read_corpus,
    read_metadata,
    read_titles,
    synset_names,
    write_metadata,
)
from modeclip.data.wordnet import load_wordnet
from modeclip.errors import ModeclipError
from support import write_wordnet

corpora = st.lists(st.lists(st.sampled_from(["a", "b", "c", ",", "dd", "é"]), max_size=6).map(" ".join), max_size=30)


def slow_build(texts: list[str], min_count: int, min_pmi: float) -> set[str]:
    words: Counter[str] = Counter()
    pairs: Counter[tuple[str, str]] = Counter()
    for text in texts:
        found = normalise(text).split()
        words.update(found)
        pairs.update(pairwise(found))
    total = words.total()
    kept = {word for word, count in words.items() if count >= min_count and word != ","}
    for (one, other), count in pairs.items():
        pmi = math.log2(count * total / (words[one] * words[other]))
        if pmi >= min_pmi - 1e-9 and "," not in (one, other):
            kept.add(f"{one} {other}")
    return kept


@given(corpora, st.integers(1, 5), st.sampled_from([-2.0, 0.03, 0.51, 1.23]))
@settings(max_examples=60, deadline=None)
def test_words_and_pairs_are_those_of_a_slow_count(texts: list[str], min_count: int, min_pmi: float) -> None:
    config = MetadataConfig(min_count=min_count, min_pmi=min_pmi)
    found = build(texts, config)
    assert found == sorted(slow_build(texts, min_count, min_pmi) | {str(number) for number in range(100)})
    assert build(texts[::-1], config) == found


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"w{number % 7} w{number % 5} , w{number % 3}" for number in range(200)]
    config = MetadataConfig(min_count=40, min_pmi=0.5)
    whole = build(texts, config)
    monkeypatch.setattr(metadata, "TEXTS_AT_ONCE", 9)
    monkeypatch.setattr(metadata, "PAIRS_AT_ONCE", 20)
    assert build(texts, config) == whole


def test_sources_are_filled_in_their_order(tmp_path: Path) -> None:
    names = synset_names(load_wordnet(write_wordnet(tmp_path / "dict")))
    assert names == ["animal", "dog", "fast", "hot dog", "mouse", "run", "small", "tiny", "u"]
    titles = [("Cat", 50), ("Dog", 90), ("Cat", 20), ("Talk:Cat", 900), ("Cow", 69), ("!", 100)]
    texts = ["often rare"] * 2 + ["often"] * 3
    config = MetadataConfig(min_count=2, min_pmi=0.0)
    found = build(texts, config, synsets=names, titles=titles)
    assert set(found) - set(metadata.NUMBERS) - set(names) == {"often", "rare", "often rare", "Cat", "Dog"}
    for size, kept in (
        (100, set()),
        (110, {"often"}),
        (111, {"often", "rare"}),
        (113, {"often", "rare", "often rare", "Dog"}),
    ):
        some = build(texts, MetadataConfig(min_count=2, min_pmi=0.1, max_entries=size), synsets=names, titles=titles)
        assert len(some) == size
        assert set(some) - set(metadata.NUMBERS) - set(names) == kept


@pytest.mark.parametrize("name", ["entries.txt", "entries.json"])
def test_what_is_written_is_read(tmp_path: Path, name: str) -> None:
    entries = ["b", "a cat", " padded ", "猫", "é"]
    write_metadata(tmp_path / name, entries)
    read = read_metadata(tmp_path / name)
    assert list(read.entries) == sorted(entries)
    assert read.of_language("en") == (0, 5)
    assert read.digest == read_metadata(tmp_path / name).digest


def test_a_file_for_each_language(tmp_path: Path) -> None:
    write_metadata(tmp_path / "en.txt", ["cat", "gift"])
    write_metadata(tmp_path / "de.json", ["Katze", "gift", "Hund"])
    read = read_metadata(tmp_path)
    assert read.entries == ("Hund", "Katze", "gift", "cat", "gift")
    assert (read.of_language("de"), read.of_language("en"), read.of_language("fr")) == ((0, 3), (3, 5), (0, 0))
    (tmp_path / "de.txt").write_text("Kuh\n")
    with pytest.raises(ModeclipError, match=r"two files for the language 'de'"):
        read_metadata(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt: empty; expected an entry on each line"),
        ("a.txt", b"\n\n", "a.txt: empty"),
        ("a.txt", b"cat\ncaf\xe9\n", "a.txt, line 2: not UTF-8; save the file as UTF-8"),
        ("a.txt", b"cat\ndog\ncat\ncat\n", r"2 entries are repeats, such as 'cat', which is there 3 times"),
        ("a.txt", b"cat\n\0\n", "NUL byte"),
        ("a.json", b'{"cat": 1}', "expected a list of texts"),
        ("a.json", b'["cat', "damaged JSON"),
        ("a.json", b'["\\ud800"]', "not UTF-8"),
        ("a.json", b"[1]", "expected a list of texts"),
    ],
)
def test_files_that_are_no_metadata(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModeclipError, match=message) as error:
        read_metadata(tmp_path / name)
    assert "\n" not in str(error.value)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ModeclipError, match="no such file or folder; correct the path"):
        read_metadata(tmp_path / "none.txt")
    with pytest.raises(ModeclipError, match="no such file or folder"):
        list(read_corpus(tmp_path / "none.txt"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(ModeclipError, match=r"expected a file LANGUAGE.txt or LANGUAGE.json"):
        read_metadata(tmp_path / "folder")


def test_corpus_and_titles(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_bytes("a cat\r\n\u2028é\n".encode())
    assert list(read_corpus(tmp_path / "corpus.txt")) == ["a cat", "\u2028é"]
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(ModeclipError, match="not UTF-8"):
        list(read_corpus(tmp_path / "latin.txt"))
    (tmp_path / "titles.tsv").write_text("Cat\t80\nTab\tin it\t7\n")
    assert read_titles(tmp_path / "titles.tsv") == [("Cat", 80), ("Tab\tin it", 7)]
    (tmp_path / "titles.tsv").write_text("Cat\t80\nDog,90\n")
    with pytest.raises(ModeclipError, match=r"titles.tsv, line 2: expected a title, a tab and its views, got 'Dog,90'"):
        read_titles(tmp_path / "titles.tsv")


def test_a_line_that_a_text_file_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(ModeclipError, match=r"no line of text; write to a file .json"):
        write_metadata(tmp_path / "a.txt", ["a\nb"])
    json_file = tmp_path / "a.json"
    write_metadata(json_file, ["a\nb"])
    assert json.loads(json_file.read_text()) == ["a\nb"]
