"""Bytes of a catalog that change after they were written are noticed before they are taken for values."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from modeclip.data.catalog import Catalog
from modeclip.data.checksums import MANIFEST_COPY, find_damaged, read_checksums, unknown_files
from modeclip.data.indexing import index
from modeclip.data.mapping import map_columns
from modeclip.data.sources import DataConfig
from modeclip.errors import DamagedError
from support import plain_png, write_pairs

CAPTIONS = [f"picture {n}" for n in range(6)]


class Lengths:
    """Work that makes the column of the captions' lengths."""

    inputs, outputs, unit = ("caption",), ("caption_embedding",), "captions"
    facts: dict[str, object] = {"lengths": True}  # noqa: RUF012

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"caption_embedding": np.array([[len(caption), 0.0] for caption in block["caption"]], np.float32)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A catalog with a column of vectors and a column of numbers, each in a file of its own."""
    folder = tmp_path_factory.mktemp("made")
    index(DataConfig(source=str(write_pairs(folder / "pairs", [plain_png(n) for n in range(6)], CAPTIONS))), folder)
    catalog = Catalog.open(folder)
    map_columns(catalog, Lengths(), "lengths")
    catalog.add_columns({"expert": np.arange(6)}, facts={"made": 1})
    return folder / "catalog.lance"


@pytest.fixture
def path(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "catalog.lance")


def file_of(path: Path, column: str) -> Path:
    """The data file that holds a column, found by Lance alone."""
    dataset = Catalog.open(path).dataset
    number = next(field.id() for field in dataset.lance_schema.fields() if field.name() == column)
    files = dataset.get_fragments()[0].data_files()
    return path / "data" / next(str(file.path) for file in files if number in file.fields)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path) -> None:
    path.unlink()


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE = [flip, cut, empty, remove, make_folder]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_column_is_not_read_and_the_others_are(path: Path, damage: Callable[[Path], None]) -> None:
    file = file_of(path, "caption_embedding")
    damage(file)
    catalog = Catalog.open(path)
    assert catalog.read(["caption", "expert"])["expert"].tolist() == list(range(6))
    for read in (
        lambda: catalog.read(["caption_embedding"]),
        lambda: catalog.read(["caption_embedding"], np.array([1])),
        lambda: next(catalog.batches(["key", "caption_embedding"])),
        lambda: catalog.read_fragment(["caption_embedding"], 0),
    ):
        with pytest.raises(DamagedError, match=rf"{file.name}: .*caption_embedding: give modeclip embed "):
            read()


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_stage_that_made_a_damaged_column_makes_it_anew(path: Path, damage: Callable[[Path], None]) -> None:
    before = Catalog.open(path).read(["caption_embedding", "expert"])
    damage(file_of(path, "caption_embedding"))
    catalog = Catalog.open(path)
    assert map_columns(catalog, Lengths(), "lengths") == 6
    for opened in (catalog, Catalog.open(path)):
        after = opened.read(["caption_embedding", "expert"])
        assert all(np.array_equal(before[name], after[name]) for name in before)
    assert map_columns(Catalog.open(path), Lengths(), "lengths") == 0


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_manifest_is_put_back_from_its_copy(path: Path, damage: Callable[[Path], None]) -> None:
    """Lance opens a manifest with a flipped byte, and takes the version before where the newest is missing."""
    manifest = min(path.glob("_versions/*.manifest"))
    before = manifest.read_bytes()
    damage(manifest)
    assert "expert" in Catalog.open(path).columns
    assert manifest.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"[]", b'{"version":1}', b'{"version":99}', b"\xff", None])
def test_a_damaged_version_hint_is_put_back(path: Path, content: bytes | None) -> None:
    hint = path / "_versions" / "latest_version_hint.json"
    before = hint.read_bytes()
    hint.unlink() if content is None else hint.write_bytes(content)
    assert "expert" in Catalog.open(path).columns
    assert json.loads(hint.read_bytes()) == json.loads(before)


def test_a_manifest_whose_copy_is_damaged_too_is_one_line(path: Path) -> None:
    flip(min(path.glob("_versions/*.manifest")))
    flip(path / "_modeclip" / MANIFEST_COPY)
    with pytest.raises(DamagedError, match=r"\.manifest: its bytes .* copy; .*modeclip index --replace"):
        Catalog.open(path)


def test_a_catalog_that_cannot_be_opened_is_made_anew_from_its_source(made: Path, path: Path) -> None:
    shutil.rmtree(path / "_modeclip")
    for manifest in path.glob("_versions/*.manifest"):
        empty(manifest)
    with pytest.raises(DamagedError, match="newest manifest"):
        Catalog.open(path)
    index(DataConfig(source=str(made.parent / "pairs")), path.parent, replace=True)
    assert Catalog.open(path).fingerprint == Catalog.open(made).fingerprint


def test_pairs_that_are_damaged_say_to_index_again(made: Path, path: Path) -> None:
    flip(file_of(path, "caption"))
    with pytest.raises(DamagedError, match=rf"modeclip index again, with --out {path.parent} and --replace"):
        Catalog.open(path).read(["key"])
    index(DataConfig(source=str(made.parent / "pairs")), path.parent, replace=True)
    assert Catalog.open(path).read(["caption"])["caption"].tolist() == CAPTIONS


def test_only_hashing_finds_what_a_disk_did_behind_the_file_systems_back(path: Path) -> None:
    file = file_of(path, "expert")
    time = file.stat().st_mtime_ns
    flip(file)
    os.utime(file, ns=(time, time))
    dataset = Catalog.open(path).dataset
    assert find_damaged(dataset) == []
    assert [found["file"] for found in find_damaged(dataset, deep=True)] == [f"data/{file.name}"]


def test_a_copy_is_hashed_once(path: Path) -> None:
    for file in path.rglob("data/*"):
        os.utime(file, ns=(1, 1))
    Catalog.open(path)
    checksums = read_checksums(str(path))
    assert checksums is not None
    assert {note["time"] for name, note in checksums["files"].items() if name.startswith("data/")} == {1}


def test_a_catalog_of_an_earlier_version_gets_its_checksums_with_the_next_column(path: Path) -> None:
    shutil.rmtree(path / "_modeclip")
    flip(file_of(path, "expert"))  # nobody can know
    catalog = Catalog.open(path)
    assert len(unknown_files(catalog.dataset)) == 3
    catalog.add_columns({"kept": np.ones(6, bool)})
    assert unknown_files(Catalog.open(path).dataset) == []


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"null", b"\xff"])
def test_checksums_that_are_damaged_themselves_are_not_known(path: Path, content: bytes) -> None:
    (path / "_modeclip" / "checksums.json").write_bytes(content)
    assert len(Catalog.open(path).read(["expert"])["expert"]) == 6


def test_a_data_file_that_nothing_is_known_of_is_one_line_when_it_is_read(path: Path) -> None:
    file = file_of(path, "expert")
    shutil.rmtree(path / "_modeclip")
    cut(file)
    with pytest.raises(DamagedError, match=r"expert: .*; modeclip check .* --deep"):
        Catalog.open(path).read(["expert"])
