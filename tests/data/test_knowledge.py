"""Dictionaries: first senses, forms of other words, leading words, the order of dictionaries; files that are none."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from modeclip.data.knowledge import Entry, load_knowledge
from modeclip.errors import DamagedError, ModeclipError
from support import write_wordnet


def word(text: str, *senses: Mapping[str, Any], pos: str = "noun", **more: Any) -> dict[str, Any]:
    return {"word": text, "pos": pos, "lang_code": "en", "senses": list(senses), **more}


def gloss(text: str) -> dict[str, Any]:
    return {"glosses": [text]}


def form(of: str, kind: str = "form_of") -> dict[str, Any]:
    return {"glosses": [f"plural of {of}"], kind: [{"word": of}], "tags": ["form-of"]}


ENTRIES = [
    word("run", gloss("to move fast"), pos="verb"),
    word("run", gloss("an act of running")),
    word("Fox", gloss("a surname"), pos="name"),
    word("fox", {"tags": ["no-gloss"]}, gloss("a  small wild\ndog"), gloss("a sly person")),
    word("fox", gloss("another etymology")),
    word("foxes", form("Fox")),
    word("foxen", form("foxes", "alt_of")),
    word("foxens", form("foxen")),
    word("foxenses", form("foxens")),
    word("left", form("right")),
    word("right", form("left")),
    word("red fox", gloss("Vulpes vulpes")),
    {"title": "Reynard", "redirect": "fox"},
    word("chien", gloss("dog"), **{"lang_code": "fr"}),
    word("nothing", pos="noun"),
]


def write_dump(path: Path, entries: Sequence[Mapping[str, Any]] = ENTRIES) -> str:
    content = "\n".join(json.dumps(entry) for entry in entries).encode() + b"\n\n"
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "packed"])
def test_first_senses_of_wiktionary(tmp_path: Path, name: str) -> None:
    dump = write_dump(tmp_path / ("d.jsonl.gz" if name == "packed" else name))
    if name == "packed":  # what a file is called does not matter
        dump = str(Path(dump).rename(tmp_path / "packed"))
    known = load_knowledge([dump])

    def define(text: str) -> str | None:
        entry = known.find(text)
        return None if entry is None else entry.definition

    assert (
        define("fox") == define("FOX") == define("foxes") == define("foxen") == define("foxens") == ("a small wild dog")
    )
    assert define("foxenses") is None  # one word too many
    assert define("left") is None  # a circle
    assert define("run") == "an act of running"  # a noun, though the verb comes first
    assert known.find("a big Red  Fox") == Entry("red fox", "Vulpes vulpes", dump)
    assert known.find("big_red_fox") == Entry("red fox", "Vulpes vulpes", dump)
    assert define("chien") is define("nothing") is define("Reynard") is define("") is None


def test_dictionaries_are_asked_in_order_for_each_phrase(tmp_path: Path) -> None:
    wordnet = f"wordnet:{write_wordnet(tmp_path / 'dict')}"
    dump = write_dump(tmp_path / "d.jsonl", [word("dog", gloss("a pet")), word("run", gloss("a track"))])
    both, other = load_knowledge([dump, wordnet]), load_knowledge([wordnet, dump])
    assert both.find("dog") == Entry("dog", "a pet", dump)
    assert other.find("dog") == Entry("dog", "a member of the genus Canis", wordnet)
    found = both.find("hot dog")  # the longer phrase, though the first dictionary has "dog"
    assert found is not None
    assert found.phrase == "hot dog"
    assert both.find("tasty mice") == Entry("mice", "a small rodent", wordnet)
    assert both.explain(["a Dog.", "Dog"], "Dog") == ("a Dog. ; Dog , a pet", "Dog ; Dog , a pet")
    assert both.explain(["a photo of a unicorn."], "unicorn") == ("a photo of a unicorn.",)
    assert len(set(both.digests)) == 2
    assert load_knowledge(both.names).digests == both.digests


def test_a_file_that_changes_is_another_dictionary(tmp_path: Path) -> None:
    dump = write_dump(tmp_path / "d.jsonl", [word("dog", gloss("a pet"))])
    before = load_knowledge([dump])
    write_dump(tmp_path / "d.jsonl", [word("dog", gloss("a faithful pet"))])
    after = load_knowledge([dump])
    assert before.digests != after.digests
    entry = after.find("dog")
    assert entry is not None
    assert entry.definition == "a faithful pet"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<mediawiki>\n<page>", r"line 1: expected a JSON object with word and senses, got '<mediawiki>"),
        (b'[{"word": "a"}]', "got a list"),
        (b'{"lemma": "dog", "definition": "a pet"}\n', "line 1: .*got an object without word and senses"),
        (b'{"word": "dog", "definition": "a pet"}\n', "no entry that has a definition"),
        (b"BZh91AY&SY\xff\xfe\n", "line 1: expected a JSON object"),
        (b"", "no entry that has a definition"),
        (b'{"word": "dog", "senses": [{"glosses": ["a pet"]}]}\n{"word": "ca', "line 2: expected a JSON object"),
        (b'{"word": "dog", "senses": "a pet"}', "without word and senses"),
    ],
)
def test_a_dump_of_another_format_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "d").write_bytes(content)
    with pytest.raises(ModeclipError, match=message) as caught:
        load_knowledge([str(tmp_path / "d")])
    assert "\n" not in str(caught.value)
    assert "kaikki.org" in str(caught.value)


def test_files_that_are_missing_cut_or_folders(tmp_path: Path) -> None:
    with pytest.raises(ModeclipError, match=r"'nowhere\.jsonl': no such file; give wordnet"):
        load_knowledge(["nowhere.jsonl"])
    with pytest.raises(ModeclipError, match="cannot be read"):
        load_knowledge([str(tmp_path)])
    with pytest.raises(ModeclipError, match=r"no data\.noun"):
        load_knowledge([f"wordnet:{tmp_path}"])
    packed = Path(write_dump(tmp_path / "d.jsonl.gz"))
    packed.write_bytes(packed.read_bytes()[:-12])
    with pytest.raises(DamagedError, match="is damaged"):
        load_knowledge([str(packed)])
