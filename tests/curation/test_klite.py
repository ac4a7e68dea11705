"""K-LITE: noun phrases, the rarest one with a definition by plain counting, draws; the same whatever the fragments."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tests.curation.test_align import pair, write
from tests.data.test_knowledge import gloss, word, write_dump

from modeclip.curation.curating import curate
from modeclip.curation.klite import KliteConfig, noun_phrases
from modeclip.curation.method import draw
from modeclip.data.catalog import Catalog
from modeclip.data.knowledge import load_knowledge
from modeclip.data.selection import Selection
from modeclip.errors import ModeclipError
from support import write_wordnet

CAPTIONS = (
    "a small dog plays with a mouse",
    "two hot dogs on a plate",
    "Dog",
    "",
    "the dog and the dog",
    "a tasty hot dog with a dog",
    "unknown zyzzyva",
    "An animal, a mouse!",
    "mouse",
    "a small dog",
)
"""By number of captions: dog 5, mouse 3, hot dog(s) 1 each."""


@pytest.fixture
def wordnet(tmp_path: Path) -> str:
    return f"wordnet:{write_wordnet(tmp_path / 'dict')}"


def expected(captions: list[str], name: str) -> list[str | None]:
    """The oracle: count by hand, take the rarest."""
    known = load_knowledge([name])
    found = [{entry.phrase: entry for text in noun_phrases(one) if (entry := known.find(text))} for one in captions]
    counts = Counter(phrase for of_caption in found for phrase in of_caption)
    texts: list[str | None] = []
    for caption, entries in zip(captions, found, strict=True):
        ranked = sorted(entries, key=lambda phrase: (counts[phrase], phrase))
        texts.append(f"{caption} ; {ranked[0]} , {entries[ranked[0]].definition}" if ranked else None)
    return texts


@pytest.mark.parametrize(
    ("caption", "phrases"),
    [
        ("a red fox sees a lazy dog", ["red fox", "lazy dog"]),
        ("The train leaves the old station", ["train", "old station"]),
        ("Portrait of an old fisherman, Norway", ["portrait", "old fisherman", "norway"]),
        ("Golden retriever puppy running through tall grass", ["golden retriever puppy", "tall grass"]),
        ("a plate of grilled salmon with lemon", ["plate", "grilled salmon", "lemon"]),
        ("a red fox jumps over a lazy dog", ["red fox", "lazy dog"]),
        ("of the and", []),
        ("a dog " + "x" * 5000, ["dog"]),
        ("!!! ... \t", []),
        ("", []),
    ],
)
def test_noun_phrases(caption: str, phrases: list[str]) -> None:
    assert noun_phrases(caption) == phrases


@pytest.mark.parametrize("max_rows", [1, 3, 50])
def test_the_rarest_phrase_of_the_pool_is_explained(tmp_path: Path, wordnet: str, max_rows: int) -> None:
    catalog = write(tmp_path / "c.lance", [pair(n, text) for n, text in enumerate(CAPTIONS)], max_rows=max_rows)
    curated = curate(catalog, KliteConfig(knowledge=(wordnet,)))
    texts = curated.column("caption").tolist()
    assert texts == expected(list(CAPTIONS), wordnet)
    assert texts[0] == "a small dog plays with a mouse ; mouse , a small rodent"
    assert texts[5] == 'a tasty hot dog with a dog ; hot dog , a sausage on a bun (called a "dog" at fairs)'
    assert texts[6] is texts[3] is None
    assert curated.column("kept").all()
    assert catalog.captions(instead="klite_caption")[6] == CAPTIONS[6]
    assert catalog.type_of("klite_caption") == "string"
    assert curate(Catalog.open(catalog.path), KliteConfig(knowledge=(wordnet,))).num_computed == 0


def test_a_share_of_the_pairs_is_drawn_for_each_pair_alone(tmp_path: Path, wordnet: str) -> None:
    pairs = [pair(n, f"a dog and {n}") for n in range(60)]
    catalog = write(tmp_path / "c.lance", pairs, max_rows=13)
    for share, seed in ((0.3, 0), (0.3, 1), (0.8, 0)):
        curated = curate(catalog, KliteConfig(knowledge=(wordnet,), share=share, seed=seed), dry_run=True)
        is_new = [text is not None for text in curated.column("caption")]
        keys, captions = [one["key"] for one in pairs], [one["caption"] for one in pairs]
        assert is_new == (draw(seed, keys, captions, purpose="klite") < share).tolist()


def test_the_share_is_met_among_pairs_that_metaclip_has_drawn(tmp_path: Path, wordnet: str) -> None:
    (tmp_path / "entries.txt").write_text("dog\n")
    catalog = write(tmp_path / "c.lance", [pair(n, f"a dog and {n}") for n in range(800)])
    curate(catalog, "metaclip", entries=str(tmp_path / "entries.txt"), t=200)
    catalog = Catalog.open(catalog.path)
    found = curate(catalog, "klite", knowledge=wordnet, share=0.5, selection=Selection(mask="metaclip_kept"))
    texts = found.column("caption")[catalog.select(mask="metaclip_kept")]
    assert 150 < len(texts) < 250
    assert 0.35 < sum(text is not None for text in texts) / len(texts) < 0.65  # 4 standard deviations


def test_counts_are_those_of_the_selection_and_a_changed_dictionary_counts_anew(tmp_path: Path) -> None:
    config = KliteConfig(knowledge=(write_dump(tmp_path / "d", [word("dog", gloss("a")), word("mouse", gloss("b"))]),))
    alone = [pair(n, text) for n, text in enumerate(["a dog, a mouse"] * 3 + ["a mouse"] * 4)]
    catalog = write(tmp_path / "e.lance", [{**one, "group": "ab"[n > 2]} for n, one in enumerate(alone)])
    chosen = curate(catalog, config, selection=Selection(where=("group=a",)))
    assert chosen.column("caption").tolist() == ["a dog, a mouse ; dog , a"] * 3 + [None] * 4
    write_dump(tmp_path / "d", [word("mouse", gloss("c"))])
    again = curate(catalog, config, selection=Selection(where=("group=a",)))
    assert again.column("caption").tolist()[:3] == ["a dog, a mouse ; mouse , c"] * 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 0.0}, r"klite.share: expected a share in \(0, 1\]"),
        ({"share": float("nan")}, "klite.share"),
        ({"share": 1.5}, "klite.share"),
        ({"knowledge": ()}, "expected a dictionary"),
        ({"seed": -1}, "klite.seed"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ModeclipError, match=message):
        KliteConfig(**settings)


def test_a_pool_without_a_known_phrase_is_an_error(tmp_path: Path, wordnet: str) -> None:
    catalog = write(tmp_path / "c.lance", [pair(0, "zyzzyva"), pair(1, "")])
    with pytest.raises(ModeclipError, match="no caption has a noun phrase"):
        curate(catalog, KliteConfig(knowledge=(wordnet,)))
    assert not [name for name in catalog.columns if name.startswith("klite")]


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from modeclip.curation.klite import load_tagger

    load_tagger.cache_clear()
    monkeypatch.setitem(sys.modules, "HanTa.HanoverTagger", None)
    with pytest.raises(ModeclipError, match=r"modeclip\[curate\]"):
        noun_phrases("a dog")
    load_tagger.cache_clear()
