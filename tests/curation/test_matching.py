"""Matching against the slow rule: every padded entry is looked for in every normalised text."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from modeclip.curation import matching
from modeclip.curation.matching import Matcher, is_possible, normalise, pad

ALPHABET = "ab ,.`\t\n\r-猫ーก\u00a0é𠀀。#"
texts = st.one_of(st.text(ALPHABET, max_size=12), st.text(max_size=8))
entry_lists = st.lists(st.one_of(st.text("ab ,.-猫ー。#\t", max_size=5), st.text(max_size=3)), max_size=12, unique=True)


def spaced(text: str) -> str:
    """METHOD's words, character by character."""
    out = [" "]
    for character in text:
        out.append(" " if character in "\t\n\r" else f" {character} " if character in ",.;:?!`" else character)
    return "".join([*out, " "])


def slow(entries: list[str], text: str, scripts: bool) -> list[int]:
    def edge(character: str) -> str:
        name = unicodedata.name(character, "")
        unspaced = ("CJK UNIFIED", "HIRAGANA", "KATAKANA", "THAI", "LAO", "TIBETAN", "MYANMAR", "KHMER")
        return "" if unicodedata.category(character)[0] == "P" or name.startswith(unspaced) else " "

    found = []
    for place, entry in enumerate(entries):
        padded = f"{edge(entry[0])}{entry}{edge(entry[-1])}" if scripts and entry else f" {entry} "
        if padded in spaced(text):
            found.append(place)
    return found


@given(entry_lists, st.lists(texts, max_size=6), st.booleans())
@settings(max_examples=150, deadline=None)
@example(["", " ", "  ", "a", "a a", "a  a"], ["", ",", "a", "a a a", "a\na"], False)
@example(["", " ", "a", "猫", "a猫", "猫 a", "ー", "#"], ["猫a", "xa猫", "猫 a", "#1", "ラーメン"], True)
@example(["a\tb", "\n", "\t", "\r"], ["a\tb", "\n", ""], True)
@example(["a\tb"], ["a\tb"], False)
@example([], ["a"], False)
def test_matching_is_the_slow_rule(entries: list[str], given_texts: list[str], scripts: bool) -> None:
    entries = [entry for entry in entries if not has_rare(entry)]
    found = Matcher(entries, scripts).match(given_texts)
    for place, text in enumerate(given_texts):
        assert normalise(text) == spaced(text)
        assert found[place] == slow(entries, text, scripts)
        assert all(is_possible(entries[entry]) for entry in found[place])


def has_rare(entry: str) -> bool:
    """Whether the edge of an entry lies in a block of a script without spaces, but its name does not say so."""
    rare = [c for c in entry[:1] + entry[-1:] if pad(c, scripts=True) == c]
    return any(slow([c], f"x{c}x", scripts=True) == [] for c in rare)


def test_blocks_and_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    vocabulary = [f"w{number}" for number in range(50)]
    captions = [" ".join(rng.choice(vocabulary, rng.integers(0, 8))) for _ in range(500)] * 2
    entries = sorted({" ".join(rng.choice(vocabulary, rng.integers(1, 4))) for _ in range(300)})
    matcher = Matcher(entries)
    whole = matcher.match(captions)
    monkeypatch.setattr(matching, "TEXTS_AT_ONCE", 37)
    parts = matcher.match(captions)
    np.testing.assert_array_equal(whole.starts, parts.starts)
    np.testing.assert_array_equal(whole.entries, parts.entries)
    assert [parts[place] for place in range(1000)] == [slow(entries, text, False) for text in captions[:500]] * 2


def test_a_text_counts_once_per_entry_and_equal_texts_each() -> None:
    matches = Matcher(["cat", "dog", "bird"]).match(["cat cat cat", "dog cat", "dog cat", "", None])
    np.testing.assert_array_equal(matches.total(3), [3, 2, 0])
    np.testing.assert_array_equal(matches.total(3, np.array([0.5, 0.25, 0.125, 1, 1])), [0.875, 0.375, 0])
    np.testing.assert_array_equal(matches.is_matched, [True, True, True, False, False])
    np.testing.assert_allclose(matches.probabilities(np.array([0.5, 0.1, 1])), [0.5, 0.55, 0.55, 0, 0])


def test_equal_entries_are_refused() -> None:
    with pytest.raises(ValueError, match="no two equal"):
        Matcher(["a", "b", "a"])


def test_nothing_to_look_in_or_for() -> None:
    assert len(Matcher(["a"]).match([]).distinct) == 0
    assert Matcher([]).match(["a"])[0] == []
    np.testing.assert_array_equal(Matcher([]).match([]).total(0), [])
