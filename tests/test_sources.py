"""Folders, tables and shards become streams of samples; whatever makes a source useless says what to do."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modeclip.errors import ModeclipError
from modeclip.samples import NO_CAPTION, NO_IMAGE, NOT_UTF8, Sample, Skipped
from modeclip.sources import DataConfig, detect, read_source, read_task


def read(source: Path | str, **options: object) -> list[Sample | Skipped]:
    return list(read_source(DataConfig(source=str(source), **options)))


def write(folder: Path, files: dict[str, bytes]) -> Path:
    """Write files; images need not be any here, for sources never open them."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


# ---------------------------------------------------------------- what a source is


def test_the_kind_of_a_source_is_seen_from_what_is_there(tmp_path: Path):
    write(tmp_path, {"images/a.jpg": b"", "table.csv": b"", "table.TSV": b"", "shards/0.tar": b"", "one.tar": b""})
    kinds = {
        "icons": "icons",
        f"{tmp_path}/images": "folder",
        f"{tmp_path}/table.csv": "table",
        f"{tmp_path}/table.TSV": "table",
        f"{tmp_path}/shards": "shards",
        f"{tmp_path}/one.tar": "shards",
        "x/{000..999}.tar": "shards",
        "a.tar::b.tar": "shards",
    }
    assert {source: detect(DataConfig(source=source)) for source in kinds} == kinds


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "data.source 'nowhere' does not exist: expected the word icons, a folder of images"),
        ("nowhere.csv", "data.source 'nowhere.csv' does not exist: expected"),
        ("s3://bucket/0.tar", "is an address: copy the data to a local folder"),
        ("pyproject.toml", "data.source 'pyproject.toml' is a file of another kind: expected"),
    ],
)
def test_what_is_no_source_says_what_is_one(source, message, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    with pytest.raises(ModeclipError) as caught:
        read(source)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_keys": " ; "}, r"data\.image_keys: expected suffixes such as 'a;b', got ' ; '"),
        ({"caption_keys": ""}, r"data\.caption_keys: expected suffixes"),
        ({"holdout_fraction": 1.0}, r"data\.holdout_fraction: expected a number in \[0, 1\), got 1\.0"),
        ({"max_skipped_fraction": 1.5}, r"data\.max_skipped_fraction: expected a number in \[0, 1\], got 1\.5"),
        ({"image_size": 0}, r"data\.image_size: expected 1 or more, got 0"),
        ({"separator": "tab"}, r"data\.separator: expected one character, got 'tab'"),
        ({"tasks": ("a",), "holdout_fraction": 0.1}, r"data\.tasks and data\.holdout_fraction exclude each other"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ModeclipError, match=message):
        DataConfig(source="icons", **options)


# ---------------------------------------------------------------- folders


def test_a_folder_yields_each_image_with_the_text_of_its_name(tmp_path: Path):
    files = {
        "b.JPG": b"image b",
        "b.txt": b"second",
        "a.one.png": b"image a",
        "a.one.txt": "\ufefferster, größer\n".encode(),
        "cats/x/1.webp": b"image 1",
        "cats/x/1.json": b'{"caption": "a cat"}',
        "cats/notes.md": b"passed over",
        ".hidden/2.png": b"",
        ".3.png": b"",
    }
    samples = read(write(tmp_path, files))
    assert [(s.key, s.caption, s.group, s.read()) for s in samples] == [
        ("a.one.png", "erster, größer", "", b"image a"),
        ("b.JPG", "second", "", b"image b"),
        ("cats/x/1.webp", "a cat", "cats/x", b"image 1"),
    ]


names = st.lists(st.text("abAB01-_ é", min_size=1).map(str.strip).filter(bool), min_size=1, unique=True)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names, st.randoms())
def test_the_order_of_a_folder_depends_on_names_alone(tmp_path_factory, names, random):
    listings = []
    for _ in range(2):
        folder = tmp_path_factory.mktemp("f")
        random.shuffle(names)
        write(folder, {f"{name}/i.png": b"" for name in names} | {f"{name}/i.txt": name.encode() for name in names})
        listings.append([(s.key, s.caption) for s in read(folder)])
    assert listings[0] == listings[1] == [(f"{name}/i.png", name) for name in sorted(names)]


def test_images_without_a_usable_caption_are_skipped_by_cause(tmp_path: Path):
    files = {"a.png": b"", "b.png": b"", "b.txt": b"\xff\xfe", "c.png": b"", "c.txt": b" ", "d.png": b"", "d.txt": b"d"}
    *skipped, _ = read(write(tmp_path, files))
    assert [(s.key, s.cause) for s in skipped] == [("a.png", NO_CAPTION), ("b.png", NOT_UTF8), ("c.png", NO_CAPTION)]
    assert skipped[0].detail == "no a.txt/json beside it"


def test_a_folder_without_images_says_what_it_holds(tmp_path: Path):
    write(tmp_path, {"1.tif": b"", "2.tif": b"", "1.txt": b"", "x/readme": b""})
    with pytest.raises(ModeclipError) as caught:
        read(tmp_path)
    assert str(caught.value) == (
        f"folder '{tmp_path}' holds no image: expected files ending in jpg or jpeg or png or webp or gif or bmp,"
        " found .tif (2), .txt (1), (none) (1); set data.image_keys"
    )
    assert len(read(tmp_path, image_keys="tif")) == 2
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ModeclipError, match="found no file at all"):
        read(empty)


def test_a_ring_of_links_is_not_followed(tmp_path: Path):
    write(tmp_path, {"a/1.png": b"", "a/1.txt": b"one"})
    (tmp_path / "a/again").symlink_to(tmp_path, target_is_directory=True)
    assert [s.key for s in read(tmp_path)] == ["a/1.png"]


def test_a_task_folder_gives_its_sub_folders_as_classes(tmp_path: Path):
    write(tmp_path, {"dog/1.png": b"", "cat/deep/2.png": b"", "stray.png": b""})
    config = DataConfig(source="icons")
    stray, cat, dog = read_task(config, f"pets={tmp_path}")
    assert (stray.key, stray.cause) == ("pets/stray.png", NO_CAPTION)
    assert (cat.key, cat.caption, cat.group) == ("pets/cat/deep/2.png", "cat", "pets")
    assert (dog.key, dog.caption) == ("pets/dog/1.png", "dog")
    with pytest.raises(ModeclipError, match=r"task 'none': folder '.*none' does not exist; data\.tasks expects"):
        list(read_task(config, str(tmp_path / "none")))


# ---------------------------------------------------------------- tables


@pytest.mark.parametrize(("name", "separator"), [("t.csv", "\t"), ("t.csv", ","), ("t.csv", ";"), ("t.tsv", "\t")])
def test_a_table_is_read_whatever_separates_its_columns(tmp_path: Path, name, separator):
    images = write(tmp_path / "pictures", {"1.png": b"one", "2.png": b"two"})
    with (tmp_path / name).open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, delimiter=separator)
        rows.writerow(["id", "title", "filepath"])
        rows.writerow(["7", "a cat, a dog; a\tbird", "pictures/1.png"])
        rows.writerow(["8", 'two "lines"\nof text', str(images / "2.png")])
    first, second = read(tmp_path / name)
    assert (first.key, first.caption, first.read()) == ("pictures/1.png", "a cat, a dog; a\tbird", b"one")
    assert (second.caption, second.read()) == ('two "lines"\nof text', b"two")


def test_columns_and_separator_can_be_named(tmp_path: Path):
    (tmp_path / "t.csv").write_text("text!file\na cat!1.png\n")
    (sample,) = read(tmp_path / "t.csv", image_column="file", caption_column="text", separator="!")
    assert (sample.caption, sample.path) == ("a cat", str(tmp_path / "1.png"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("url,title\n", "has no image column 'filepath'; its columns are url, title; set data.image_column"),
        ("filepath,text\n", "has no caption column 'title'; its columns are filepath, text; set data.caption_column"),
        ("", "is empty: expected a header and rows"),
        ("filepath,title\na," + "x" * 140_000, "line 2: field larger than field limit"),
    ],
)
def test_a_table_that_cannot_be_used_says_why(tmp_path: Path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ModeclipError) as caught:
        read(tmp_path / "t.csv")
    assert message in str(caught.value)
    assert str(tmp_path / "t.csv") in str(caught.value)


def test_rows_that_lack_something_are_skipped_by_cause(tmp_path: Path):
    (tmp_path / "t.csv").write_text("filepath,title\n1.png\n,a cat\n\n2.png,  \n3.png,a dog\n")
    *skipped, sample = read(tmp_path / "t.csv")
    assert [(s.key, s.cause) for s in skipped] == [
        ("1.png", NO_CAPTION),
        ("t.csv line 3", NO_IMAGE),
        ("2.png", NO_CAPTION),
    ]
    assert sample.caption == "a dog"


cell = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).map(str.strip).filter(bool)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(cell, cell), min_size=1))
def test_what_the_csv_module_writes_is_read_back(tmp_path: Path, pairs):
    with (tmp_path / "t.tsv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t").writerows([("filepath", "title"), *pairs])
    samples = read(tmp_path / "t.tsv")
    assert [(s.key, s.caption) for s in samples] == pairs
    assert [s.path for s in samples] == [os.path.join(tmp_path, image) for image, _ in pairs]  # noqa: PTH118
