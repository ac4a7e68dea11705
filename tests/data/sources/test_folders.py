"""Folders: links, splits, metadata tables, and names in any spelling; every image is a pair or has its cause."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modeclip.data.catalog import Catalog
from modeclip.data.indexing import index
from modeclip.data.samples import (
    BROKEN_LINK,
    LOOP,
    MISSING,
    NO_CAPTION,
    NO_IMAGE,
    NOT_JSON,
    NOT_READ,
    OTHER_COLUMN,
    OTHER_SPLIT,
    Sample,
    Skipped,
)
from modeclip.data.sources import DataConfig, open_source, open_task
from modeclip.data.sources.source import is_chosen, splits_among
from modeclip.errors import ModeclipError
from support import plain_png, tar_of

NFC, NFD = unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café")


def write(folder: Path, names: str | list[str]) -> Path:
    """Write empty files, for sources never open them; a .txt holds its own stem."""
    for name in names.split() if isinstance(names, str) else names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(Path(name).stem if name.lower().endswith(".txt") else "")
    return folder


def read(source: Path, **options: object) -> list[Sample | Skipped]:
    parts = open_source(DataConfig.from_flat({"source": str(source), **options})).parts
    return [item for part in parts for item in part.read()]


def pairs(source: Path, **options: object) -> dict[str, str]:
    return {item.key: item.caption for item in read(source, **options) if isinstance(item, Sample)}


def causes(source: Path, **options: object) -> dict[str, str]:
    return {item.key: item.cause for item in read(source, **options) if isinstance(item, Skipped)}


# ---------------------------------------------------------------- splits


@pytest.mark.parametrize(
    ("train", "test"),
    [("train", "test"), ("Training", "TESTING"), ("train", "val"), ("TRAIN", "dev"), ("train2017", "val2017")],
)
def test_one_split_is_read_and_the_others_are_counted(tmp_path: Path, train: str, test: str):
    write(tmp_path, f"{train}/rose/0.png {train}/tulip/1.png {test}/rose/2.png")
    assert pairs(tmp_path) == {
        f"{train}/rose/0.png": "a photo of a rose.",
        f"{train}/tulip/1.png": "a photo of a tulip.",
    }
    assert causes(tmp_path) == {f"{test}/rose/2.png": OTHER_SPLIT}
    what = open_source(DataConfig(source=str(tmp_path))).what
    assert "2 sub-folders" in what
    assert f"left out: {test} (1 image)" in what
    assert list(pairs(tmp_path, split=test)) == [f"{test}/rose/2.png"]
    assert len(pairs(tmp_path, split="all")) == 3


def test_splits_may_lie_above_or_below_the_classes(tmp_path: Path):
    for name, places in {
        "above": "images/train/rose/0.png images/test/rose/1.png",
        "below": "rose/train/0.png rose/test/1.png",
        "inside": "train/images/rose/0.png test/images/rose/1.png",
    }.items():
        found = read(write(tmp_path / name, places))
        assert [item.caption for item in found if isinstance(item, Sample)] == ["a photo of a rose."]
        assert [item.key.split("/")[-1] for item in found if isinstance(item, Skipped)] == ["1.png"]


def test_images_in_a_split_without_classes_have_no_caption(tmp_path: Path):
    assert causes(write(tmp_path, "train/0.png test/1.png")) == {"train/0.png": NO_CAPTION, "test/1.png": OTHER_SPLIT}


def test_a_class_may_be_called_like_a_split(tmp_path: Path):
    names = [f"{name}/0.png" for name in ("bus", "car", "test", "train")]
    write(tmp_path / "one", names[:3])
    assert pairs(tmp_path / "one")["test/0.png"] == "a photo of a test."
    write(tmp_path / "vehicles", [names[0], names[1], names[3]])
    assert pairs(tmp_path / "vehicles")["train/0.png"] == "a photo of a train."
    assert splits_among(["train", "test", "bus"]) == {"train": "train", "test": "test", "bus": "other"}
    assert splits_among(["train", "labels"], lambda name: name != "labels") == {"train": "train"}


def test_captions_beside_images_keep_to_the_split(tmp_path: Path):
    write(tmp_path, "train/a.png train/a.txt test/b.png test/b.txt")
    assert pairs(tmp_path) == {"train/a.png": "a"}
    assert pairs(tmp_path, split="test") == {"test/b.png": "b"}


def test_a_split_that_is_not_there_is_an_error(tmp_path: Path):
    write(tmp_path, "test/rose/0.png val/rose/1.png")
    with pytest.raises(ModeclipError, match=r"'train' is not there; its splits are test, val: set data\.split"):
        read(tmp_path)
    write(tmp_path / "plain", "rose/0.png")
    with pytest.raises(ModeclipError, match=r"'dev'.*has no folders of splits"):
        read(tmp_path / "plain", split="dev")


def test_a_task_reads_what_is_for_testing(tmp_path: Path, capsys):
    write(tmp_path / "both", "train/rose/0.png test/rose/1.png val/rose/2.png")
    write(tmp_path / "valid", "train/rose/0.png valid/rose/2.png")
    for name, key in (("both", "test/rose/1.png"), ("valid", "valid/rose/2.png")):
        (part,) = open_task(DataConfig(source="x"), f"t={tmp_path / name}").parts
        assert [(item.key, item.caption) for item in part.read()] == [(f"t/{key}", "rose")]
    assert "left out: train (1 image)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "split", "chosen", "expected"),
    [
        ("Valid", "validation", "dev", True),
        ("val2017", "validation", "val2017", True),
        ("val2014", "validation", "val2017", False),
        ("extra", "other", "train", False),
        ("extra", "other", "extra", True),
        ("test", "test", "ALL", True),
    ],
)
def test_a_split_is_chosen_by_its_kind_or_its_name(name, split, chosen, expected):
    assert is_chosen(name, split, chosen) is expected


@pytest.mark.parametrize("layout", ["data/{}-00000-of-00001.parquet", "plain/{}/0000.parquet", "{}.PARQUET"])
def test_tables_as_the_hub_has_them_are_read_by_split(tmp_path: Path, layout: str):
    for split in ("train", "test"):
        path = tmp_path / layout.format(split)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"image": [b"x"], "text": [split]}), path)
    assert list(pairs(tmp_path).values()) == ["train"]
    assert list(pairs(tmp_path, split="test").values()) == ["test"]


def test_several_configurations_have_to_be_named(tmp_path: Path):
    for name in ("large", "small"):
        (tmp_path / name).mkdir()
        pq.write_table(pa.table({"image": [b"x"], "text": [name]}), tmp_path / name / "train-0.parquet")
    with pytest.raises(ModeclipError, match=r"several configurations \(large, small\).*name the folder"):
        read(tmp_path)
    assert list(pairs(tmp_path / "small").values()) == ["small"]


def test_shards_of_one_split_are_read(tmp_path: Path):
    for split in ("train", "test"):
        (tmp_path / f"{split}-0.TAR").write_bytes(tar_of([("a.jpg", b"x"), ("a.txt", split.encode())]))
    assert list(pairs(tmp_path).values()) == ["train"]


# ---------------------------------------------------------------- links


def test_links_are_followed_and_loops_are_counted(tmp_path: Path):
    write(tmp_path / "pool", "rose/0.png tulip/1.png")
    root = write(tmp_path / "set", "daisy/2.png")
    (root / "rose").symlink_to(tmp_path / "pool/rose")
    (root / "tulip").symlink_to("../pool/tulip")
    (root / "daisy/3.png").symlink_to(tmp_path / "pool/rose/0.png")
    (root / "daisy/up").symlink_to("..")
    (root / "lost").symlink_to("nowhere")
    (root / "daisy/gone.png").symlink_to("nowhere.png")
    assert sorted(pairs(root)) == ["daisy/2.png", "daisy/3.png", "rose/0.png", "tulip/1.png"]
    assert causes(root) == {"daisy/up": LOOP, "lost": BROKEN_LINK, "daisy/gone.png": MISSING}


def test_a_folder_that_is_reached_twice_is_there_under_both_names(tmp_path: Path):
    write(tmp_path, "rose/0.png")
    (tmp_path / "flower").symlink_to("rose")
    assert pairs(tmp_path) == {"flower/0.png": "a photo of a flower.", "rose/0.png": "a photo of a rose."}


def test_folders_that_link_to_each_other_end(tmp_path: Path):
    names = [f"c{number}" for number in range(6)]
    for name in names:
        write(tmp_path, f"{name}/0.png")
        for other in names:
            (tmp_path / name / f"to_{other}").symlink_to(f"../{other}")
    found = read(tmp_path)
    kinds = Counter(type(item).__name__ for item in found)
    assert kinds["Sample"] < 100
    assert {name.split("/")[0] for name in pairs(tmp_path)} == set(names)


# ---------------------------------------------------------------- metadata


def write_metadata(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    elif path.suffix.lower() == ".csv":
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
        path.write_text("\n".join(lines))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet", "METADATA.CSV"])
@pytest.mark.parametrize("column", ["text", "caption"])
def test_a_metadata_table_gives_the_captions(tmp_path: Path, name: str, column: str):
    write(tmp_path, "a.png sub/b.png c.png")
    rows = [
        {"file_name": "a.png", column: "one", "year": 1990},
        {"file_name": "sub/b.png", column: "two", "year": 2001},
    ]
    write_metadata(tmp_path / name, [*rows, {"file_name": "d.png", column: "three", "year": 3}])
    assert pairs(tmp_path) == {"a.png": "one", "sub/b.png": "two"}
    assert causes(tmp_path) == {"c.png": NO_CAPTION, "d.png": MISSING}
    years = [item.extra["year"] for item in read(tmp_path) if isinstance(item, Sample)]
    assert [str(year) for year in years] == ["1990", "2001"]


def test_metadata_tables_at_any_depth_name_files_beside_them(tmp_path: Path):
    write(tmp_path, "train/x/a.png train/y/a.png test/a.png")
    write_metadata(tmp_path / "train/x/metadata.jsonl", [{"file_name": "a.png", "text": "x"}])
    write_metadata(tmp_path / "train/y/metadata.jsonl", [{"file_name": "./a.png", "text": "y"}])
    write_metadata(tmp_path / "test/metadata.jsonl", [{"file_name": "a.png", "text": "no"}])
    assert pairs(tmp_path) == {"train/x/a.png": "x", "train/y/a.png": "y"}
    assert causes(tmp_path) == {"test/a.png": OTHER_SPLIT}


def test_rows_that_name_an_image_twice_are_captions_of_it(tmp_path: Path):
    write(tmp_path, "a.png")
    write_metadata(
        tmp_path / "metadata.jsonl", [{"file_name": "a.png", "text": text} for text in ("one", "two", "one")]
    )
    assert pairs(tmp_path) == {"a.png": "one", "a.png#1": "two"}


def test_of_several_file_columns_one_is_read(tmp_path: Path):
    write(tmp_path, "a.png mask.png")
    row = {"mask_file_name": "mask.png", "image_file_name": "a.png", "prompt": "one"}
    write_metadata(tmp_path / "metadata.jsonl", [row])
    assert pairs(tmp_path, caption_column="prompt") == {"a.png": "one"}
    assert causes(tmp_path, caption_column="prompt") == {"mask.png": OTHER_COLUMN}
    assert pairs(tmp_path, caption_column="prompt", image_column="mask_file_name") == {"mask.png": "one"}
    with pytest.raises(ModeclipError, match=r"no caption column.*mask_file_name, image_file_name, prompt"):
        read(tmp_path)


def test_labels_stand_in_for_captions_that_are_not_there(tmp_path: Path):
    write(tmp_path, "a.png")
    write_metadata(tmp_path / "metadata.jsonl", [{"file_name": "a.png", "label": "red_fox"}])
    assert pairs(tmp_path) == {"a.png": "a photo of a red fox."}


def test_a_table_without_captions_leaves_class_folders_as_they_are(tmp_path: Path):
    write(tmp_path, "train/rose/a.png")
    write_metadata(tmp_path / "train/metadata.jsonl", [{"file_name": "rose/a.png", "boxes": [1, 2]}])
    assert pairs(tmp_path) == {"train/rose/a.png": "a photo of a rose."}


def test_damaged_rows_are_counted(tmp_path: Path):
    write(tmp_path, "a.png")
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "a.png", "text": "o\u2028ne"}\n{"file_name\n[1]\n{"text": "x"}\n'
    )
    assert pairs(tmp_path) == {"a.png": "o\u2028ne"}
    assert list(causes(tmp_path).values()) == [NOT_JSON, NOT_JSON, NO_IMAGE]


# ---------------------------------------------------------------- names


def test_suffixes_fit_in_any_case(tmp_path: Path):
    write(tmp_path, "a.JPG a.TXT b.jpg b.Txt")
    (tmp_path / "c.PNG").write_text("")
    (tmp_path / "c.JSON").write_text('{"caption": "c"}')
    assert pairs(tmp_path) == {"a.JPG": "a", "b.jpg": "b", "c.PNG": "c"}


@pytest.mark.parametrize(("image", "caption"), [(NFC, NFD), (NFD, NFC)])
def test_captions_are_found_in_another_unicode_form(tmp_path: Path, capsys, image: str, caption: str):
    write(tmp_path, [f"{image}.png", f"{caption}.txt"])
    assert pairs(tmp_path) == {f"{image}.png": caption}
    assert f"Unicode form {'NFD' if caption == NFD else 'NFC'}" in capsys.readouterr().err


def test_of_both_unicode_forms_the_exact_one_wins(tmp_path: Path):
    write(tmp_path, [f"{form}.{suffix}" for form in (NFC, NFD) for suffix in ("png", "txt")])
    assert pairs(tmp_path) == {f"{NFC}.png": NFC, f"{NFD}.png": NFD}


def test_a_table_finds_images_that_are_spelled_another_way(tmp_path: Path, capsys):
    data = plain_png(7)
    (tmp_path / f"{NFD}.png").write_bytes(data)
    (tmp_path / "b.PNG").write_bytes(data)
    (tmp_path / "t.csv").write_text(f"filepath,title\n{NFC}.png,one\nb.png,two\n")
    result = index(DataConfig(source=str(tmp_path / "t.csv")), tmp_path / "out")
    assert (result.num_samples, result.skipped) == (2, {})
    paths = Catalog.open(tmp_path / "out").read(["path"])["path"].tolist()
    assert paths == [str(tmp_path / f"{NFD}.png"), str(tmp_path / "b.PNG")]
    assert "(NFC), was found as" in capsys.readouterr().err


def test_images_of_other_formats_are_counted(tmp_path: Path):
    write(tmp_path, "a.png a.txt b.heic c.svg readme.md d.tif d.txt")
    assert pairs(tmp_path) == {"a.png": "a", "d.tif": "d"}
    assert causes(tmp_path) == {"b.heic": NOT_READ, "c.svg": NOT_READ}


def test_captions_behind_many_images_without_are_found(tmp_path: Path):
    write(tmp_path, [*(f"a/{number:04}.png" for number in range(1100)), "b/x.png", "b/x.txt"])
    assert open_source(DataConfig(source=str(tmp_path))).kind == "folder"
    assert pairs(tmp_path) == {"b/x.png": "x"}


def test_sidecars_tell_sub_folders_apart(tmp_path: Path):
    write(tmp_path, "00000/a/1.jpg 00000/a/1.txt 00000/b/1.jpg 00000/b/1.txt 00000/2.jpg 00000/2.txt")
    pq.write_table(pa.table({"key": ["a/1", "b/1", "2"], "url": ["u1", "u2", "u3"]}), tmp_path / "00000.parquet")
    found = {item.key: item.extra.get("url") for item in read(tmp_path)}
    assert found == {"00000/a/1.jpg": "u1", "00000/b/1.jpg": "u2", "00000/2.jpg": "u3"}
    pq.write_table(pa.table({"key": ["1", "2"], "url": ["u1", "u3"]}), tmp_path / "00000.parquet")
    found = {item.key: item.extra.get("url") for item in read(tmp_path)}
    assert found == {"00000/a/1.jpg": None, "00000/b/1.jpg": None, "00000/2.jpg": "u3"}
