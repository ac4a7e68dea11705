"""Captions come out of text and JSON files as they should, and every way in which they cannot has its cause."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeclip.data.samples import EMPTY_CAPTION, NO_CAPTION, NOT_JSON, NOT_UTF8, Skipped
from modeclip.data.sources.captions import FileOptions, samples_of


@pytest.mark.slow
@given(st.text())
def test_a_caption_is_the_text_without_the_space_around_it(text):
    expected = text.removeprefix("\ufeff").strip()
    captions = FileOptions().read_captions(text.encode("utf-8", "ignore"), "txt", "k")
    if expected.encode("utf-8", "ignore").decode():
        assert captions == [expected.encode("utf-8", "ignore").decode()]
    else:
        assert isinstance(captions, Skipped)
        assert captions.cause == EMPTY_CAPTION


@given(st.text(st.characters(exclude_categories=["Cs"])).filter(str.strip))
def test_a_json_caption_is_its_field(text):
    assert FileOptions().read_captions(json.dumps({"caption": text}).encode(), "json", "k") == [text.strip()]


@pytest.mark.parametrize(
    ("data", "suffix", "cause"),
    [
        (b"", "txt", EMPTY_CAPTION),
        (b" \n", "txt", EMPTY_CAPTION),
        (b'{"caption": " "}', "json", EMPTY_CAPTION),
        (b'{"caption": [1, "", null, ["alt"]]}', "json", EMPTY_CAPTION),
        (b"[" * 100_000, "json", NOT_JSON),
        (b"caf\xe9", "txt", NOT_UTF8),
        (b'{"caption": "caf\xe9"}', "json", NOT_UTF8),
        (b"{", "json", NOT_JSON),
        (b"[1]", "json", NO_CAPTION),
        (b'{"caption": null}', "json", NO_CAPTION),
        (b"{}", "meta.json", NO_CAPTION),
    ],
)
def test_what_is_no_caption_has_a_cause(data, suffix, cause):
    skipped = FileOptions().read_captions(data, suffix, "the key")
    assert isinstance(skipped, Skipped)
    assert (skipped.key, skipped.cause) == ("the key", cause)
    assert suffix.rpartition(".")[2] in skipped.detail or cause == NOT_JSON


@pytest.mark.parametrize(
    ("content", "options", "captions"),
    [
        ({"caption": ["one", " two ", "one", ""]}, FileOptions(), ["one", "two"]),
        ({"alt": "one", "caption": "two"}, FileOptions(caption_field="alt"), ["one"]),
        ({"texts": [["alt", "one"], ["title", "two"], ["alt", "three"]]}, FileOptions(), ["one", "two", "three"]),
        (
            {"texts": [["alt", "one"], ["title", "two"], ["alt", "three"]]},
            FileOptions(text_keys="alt"),
            ["one", "three"],
        ),
        ({"texts": [["alt", "one"]], "caption": "two"}, FileOptions(), ["two"]),
    ],
)
def test_a_json_file_may_hold_several_captions(content, options, captions):
    assert options.read_captions(json.dumps(content).encode(), "json", "k") == captions


def test_every_line_is_a_caption_where_that_is_asked_for():
    text = b"one cat\r\n\n two cats\none cat\n"
    assert FileOptions(caption_lines=True).read_captions(text, "txt", "k") == ["one cat", "two cats"]
    assert FileOptions().read_captions(text, "txt", "k") == ["one cat\r\n\n two cats\none cat"]


def test_captions_of_one_image_are_samples_with_numbered_keys():
    samples = list(samples_of(["a", "b", "c"], "k", path="p", offset=3, size=4))
    assert [(s.key, s.caption) for s in samples] == [("k", "a"), ("k#1", "b"), ("k#2", "c")]
    assert {(s.path, s.offset, s.size) for s in samples} == {("p", 3, 4)}
