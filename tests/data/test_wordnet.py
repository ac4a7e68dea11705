"""WordNet's own files: every part of a synset, words in any form, packages' folders and zips, files that are none."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest

from modeclip.data.wordnet import Synset, WordNet, load_wordnet
from modeclip.errors import DamagedError, ModeclipError
from support import write_wordnet


@pytest.fixture(scope="module")
def wordnet(tmp_path_factory: pytest.TempPathFactory) -> WordNet:
    return load_wordnet(write_wordnet(tmp_path_factory.mktemp("wordnet") / "dict"))


def test_a_synset_has_name_words_definition_examples_and_counts(wordnet: WordNet) -> None:
    assert wordnet.synsets[0] == Synset(
        "dog.n.01",
        ("dog", "domestic dog"),
        "a member of the genus Canis",
        ("the dog barked",),
        (42, 0),
        ("animal.n.01",),
    )
    names = [synset.name for synset in wordnet.synsets]
    assert names == [
        "dog.n.01", "animal.n.01", "hot_dog.n.01", "mouse.n.01", "u.s.a..n.01", "run.v.01", "small.a.01", "tiny.s.01",
        "fast.r.01",
    ]  # fmt: skip
    hot_dog, tiny = wordnet.synsets[2], wordnet.synsets[7]
    assert hot_dog.words == ("hot dog", "dog", "Red Hot")
    assert hot_dog.counts == (0, 3, 0)  # the second sense of dog
    assert hot_dog.definition == 'a sausage on a bun (called a "dog" at fairs)'
    assert wordnet.synsets[1].examples == ("animals eat", "it is an animal")
    assert tiny.words == ("tiny", "asleep")  # without the mark of its place
    assert hot_dog.hypernyms == tiny.hypernyms == ()
    assert tiny.counts == (7, 0)  # counted by a key that names the cluster's first word


@pytest.mark.parametrize(
    ("text", "pos", "names"),
    [
        ("dog", "nvar", ["dog.n.01", "hot_dog.n.01"]),
        ("Hot  Dogs", "nvar", ["hot_dog.n.01"]),
        ("mice", "nvar", ["mouse.n.01"]),
        ("runs", "nvar", ["run.v.01"]),
        ("runs", "n", []),
        ("smallest", "nvar", ["small.a.01"]),
        ("unicorn", "nvar", []),
        ("", "nvar", []),
    ],
)
def test_words_are_found_in_any_form(wordnet: WordNet, text: str, pos: str, names: list[str]) -> None:
    assert [synset.name for synset in wordnet.senses(text, pos)] == names


def test_folder_zip_and_environment(wordnet: WordNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_wordnet(tmp_path / "npm" / "dict")
    with zipfile.ZipFile(tmp_path / "wordnet.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"wordnet/{file.name}")
    for place in (folder, folder.parent, tmp_path / "wordnet.zip", tmp_path / "wordnet"):
        assert load_wordnet(place).synsets == wordnet.synsets
        assert load_wordnet(place).digest == wordnet.digest
    monkeypatch.setenv("WNSEARCHDIR", os.fspath(folder))
    assert load_wordnet().folder == os.fspath(folder)
    (folder / "data.adv").write_text("00000100 02 r 01 fast 0 000 | in little time\n")
    assert load_wordnet(folder).digest != wordnet.digest


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("index.noun", "dog n 1 1 @ 1 1 00009999\n"),
        ("data.noun", "entity\n"),
        ("data.verb", "{}\n"),
        ("data.adj", "00000100 00 s 01 small 0 000 | a satellite of nothing\n"),
    ],
)
def test_files_that_are_none(tmp_path: Path, file: str, text: str) -> None:
    folder = write_wordnet(tmp_path / "dict")
    (folder / file).write_text(text)
    with pytest.raises(DamagedError, match=r"not WordNet's, or do not fit.*get them anew: apt-get") as error:
        load_wordnet(folder)
    assert "\n" not in str(error.value)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ModeclipError, match=r"nowhere: no data.noun there; apt-get install wordnet-base"):
        load_wordnet(tmp_path / "nowhere")
    folder = write_wordnet(tmp_path / "dict")
    (folder / "index.adv").unlink()
    with pytest.raises(ModeclipError, match=r"index.adv is missing"):
        load_wordnet(folder)
