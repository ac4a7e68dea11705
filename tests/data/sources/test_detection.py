"""Folders, tables and shards become streams of samples; whatever makes a source useless says what to do."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modeclip.data import sources
from modeclip.data.samples import (
    DAMAGED_TABLE,
    EMPTY_CAPTION,
    LOOP,
    NO_CAPTION,
    NO_SHARD,
    NO_SIDECAR,
    NOT_UTF8,
    Sample,
    Skipped,
)
from modeclip.data.sources import (
    DataConfig,
    DataSource,
    SourceKind,
    SourcePart,
    detect,
    open_source,
    open_task,
    relative_to,
    source_state,
)
from modeclip.data.sources.source import SourceConfig
from modeclip.errors import ModeclipError
from support import tar_of


def read(source: Path | str, **options: object) -> list[Sample | Skipped]:
    parts = open_source(DataConfig.from_flat({"source": str(source), **options})).parts
    return [item for part in parts for item in part.read()]


def state_of(config: DataConfig) -> list[str]:
    return source_state(config, open_source(config))


def write(folder: Path, files: dict[str, bytes]) -> Path:
    """Write files; images need not be any here, for sources never open them."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


# ---------------------------------------------------------------- what a source is


def test_the_kind_of_a_source_is_seen_from_what_is_there(tmp_path: Path):
    names = "images/a.jpg table.csv table.TSV shards/0.tar one.tar hf/state.json hf/dataset_info.json"
    names += " splits/dataset_dict.json parquets/1.parquet tables/1.csv both/1.csv both/a.png both/a.txt"
    names += " rows/labels.csv rows/images/a.png i2d/00000/1.jpg i2d/00000.parquet"
    write(tmp_path, dict.fromkeys(names.split(), b""))
    kinds = {
        "icons": "icons",
        "iconify": "iconify",
        "iconify:some/folder": "iconify",
        f"{tmp_path}/hf": "huggingface",
        f"{tmp_path}/splits": "huggingface",
        f"{tmp_path}/parquets": "parquet",
        f"{tmp_path}/parquets/1.parquet": "parquet",
        f"{tmp_path}/tables": "table",
        f"{tmp_path}/both": "folder",
        f"{tmp_path}/rows": "table",
        f"{tmp_path}/i2d": "img2dataset",
        "x/{1..3}.parquet::y.parquet": "parquet",
        "x/{a,b}.csv": "table",
        f"{tmp_path}/images": "folder",
        f"{tmp_path}/table.csv": "table",
        f"{tmp_path}/table.TSV": "table",
        f"{tmp_path}/shards": "shards",
        f"{tmp_path}/one.tar": "shards",
        "x/{000..999}.tar": "shards",
        "a.tar::b.tar": "shards",
    }
    assert {source: detect(DataConfig(source=source)).name for source in kinds} == kinds


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", r"'nowhere' does not exist.*icons.*\.csv"),
        ("nowhere.csv", "none of 1 table file exists .*correct"),
        ("a.tar::b.csv", r"'a\.tar::b\.csv' joins .*icons.*\.csv"),
        ("nowhere://bucket/0/", "unknown kind: expected s3://"),
        ("pyproject.toml", r"'pyproject\.toml'.*another kind.*icons.*\.csv"),
    ],
)
def test_what_is_no_source_says_what_is_one(source, message, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(Path(__file__).parents[3])
    with pytest.raises(ModeclipError, match=message) as caught:
        read(source)
    assert "\n" not in str(caught.value)


def test_a_new_kind_of_source_needs_its_declaration_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def read_list(path: Path):
        for line in path.read_text().splitlines():
            image, caption = line.split(" ", 1)
            yield Sample(image, caption, path=str(path.parent / image))

    def open_list(config: SourceConfig) -> DataSource:
        path = Path(config.source)
        part = SourcePart(name=str(path), state="1", read=partial(read_list, path))
        return DataSource(kind="list", parts=(part,), extra=pa.schema([]), what="a list")

    kind = SourceKind(
        name="list",
        expected=".lst files",
        open=open_list,
        fits_file=lambda name: name.endswith(".lst"),
    )
    monkeypatch.setattr(sources, "KINDS", (kind, *sources.KINDS))
    write(tmp_path, {"pairs.lst": b"1.png a cat\n2.png a dog"})
    assert [(s.key, s.caption) for s in read(tmp_path / "pairs.lst")] == [("1.png", "a cat"), ("2.png", "a dog")]
    config = DataConfig(source=str(tmp_path / "pairs.lst"))
    assert source_state(config, open_source(config)) == [f"{tmp_path}/pairs.lst 1"]


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
    assert [(s.key, s.cause) for s in skipped] == [
        ("a.png", NO_CAPTION),
        ("b.png", NOT_UTF8),
        ("c.png", EMPTY_CAPTION),
    ]
    assert skipped[0].detail == "no a.txt/json beside it"


def test_a_folder_without_images_says_what_it_holds(tmp_path: Path):
    write(tmp_path, {"1.tga": b"", "2.tga": b"", "1.txt": b"", "x/readme": b""})
    with pytest.raises(ModeclipError, match=r"no image.*png.*found \.tga \(2\).*set data\.image_keys"):
        read(tmp_path)
    assert len(read(tmp_path, image_keys="tga")) == 2
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ModeclipError, match="found no file at all"):
        read(empty)


def test_a_caption_that_cannot_be_read_is_none(tmp_path: Path):
    write(tmp_path, {"a.png": b"", "b.png": b"", "b.txt": b"b"})
    (tmp_path / "a.txt").mkdir()
    (tmp_path / "c.png").write_bytes(b"")
    (tmp_path / "c.txt").symlink_to(tmp_path / "gone")
    first, _, third = read(tmp_path)
    assert (first.key, first.cause) == ("a.png", NO_CAPTION)
    assert (third.key, third.cause) == ("c.png", NO_CAPTION)
    assert "No such file" in third.detail


def test_a_ring_of_links_is_not_followed(tmp_path: Path):
    write(tmp_path, {"a/1.png": b"", "a/1.txt": b"one"})
    (tmp_path / "a/again").symlink_to(tmp_path, target_is_directory=True)
    found = read(tmp_path)
    assert [(s.key, getattr(s, "cause", "")) for s in found] == [("a/again", LOOP), ("a/1.png", "")]


def test_a_task_folder_gives_its_sub_folders_as_classes(tmp_path: Path):
    write(tmp_path, {"dog/1.png": b"", "cat/deep/2.png": b"", "stray.png": b""})
    config = DataConfig(source="own")
    (part,) = open_task(config, f"pets={tmp_path}").parts
    stray, cat, dog = part.read()
    assert (stray.key, stray.cause) == ("pets/stray.png", NO_CAPTION)
    assert (cat.key, cat.caption, cat.group) == ("pets/cat/deep/2.png", "cat", "pets")
    assert (dog.key, dog.caption) == ("pets/dog/1.png", "dog")
    with pytest.raises(ModeclipError, match=r"task 'none'.*none' does not exist.*data\.tasks.*FOLDER"):
        open_task(config, str(tmp_path / "none"))


def test_a_folder_of_classes_fills_a_template(tmp_path: Path):
    write(tmp_path, {"big_dog/1.png": b"", "cat/deep/2.png": b"", "notes.md": b""})
    source = open_source(DataConfig.from_flat({"source": str(tmp_path), "class_template": "a drawing of a {}"}))
    assert (source.kind, source.what) == (
        "imagefolder",
        "folder of images in 2 sub-folders, whose names are their captions",
    )
    (part,) = source.parts
    assert [(s.key, s.caption, s.group) for s in part.read()] == [
        ("big_dog/1.png", "a drawing of a big dog", "big_dog"),
        ("cat/deep/2.png", "a drawing of a cat", "cat"),
    ]
    write(tmp_path, {"cat/deep/2.txt": b"a text"})
    assert open_source(DataConfig(source=str(tmp_path))).kind == "folder"


def test_a_folder_may_have_several_captions_an_image(tmp_path: Path):
    write(tmp_path, {"a.png": b"", "a.txt": b"one\ntwo\n", "b.png": b"", "b.json": b'{"alt": ["x", "y"]}'})
    samples = read(tmp_path, caption_lines=True, caption_field="alt")
    assert [(s.key, s.caption) for s in samples] == [
        ("a.png", "one"),
        ("a.png#1", "two"),
        ("b.png", "x"),
        ("b.png#1", "y"),
    ]


def test_what_img2dataset_writes_as_files_has_its_columns(tmp_path: Path):
    for part in ("00000", "00001"):
        keys = [f"{part}{number:04d}" for number in range(3)]
        for key in keys[:2]:
            meta = {"key": key, "caption": f"about {key}"}
            files = {f"{key}.jpg": key.encode(), f"{key}.txt": f"about {key}".encode()}
            write(tmp_path / part, files | {f"{key}.json": json.dumps(meta).encode()})
        table = pa.table(
            {
                "key": keys,
                "url": [f"http://x/{key}" for key in keys],
                "caption": keys,
                "status": ["success", "success", "failed_to_download"],
                "width": [256, 256, None],
                "original_width": [300, 400, None],
                "exif": ["{}", None, None],
            }
        )
        pq.write_table(table, tmp_path / f"{part}.parquet")
    source = open_source(DataConfig(source=str(tmp_path)))
    assert source.kind == "img2dataset"
    assert source.what == "2 img2dataset folders with 4 further columns"
    assert [part.name for part in source.parts] == [f"{tmp_path}/00000", f"{tmp_path}/00001"]
    assert source.extra.names == ["url", "status", "original_width", "exif"]
    _, last = source.parts[1].read()
    assert (last.key, last.caption, last.group, last.read()) == (
        "00001/000010001.jpg",
        "about 000010001",
        "00001",
        b"000010001",
    )
    assert last.extra == {
        "url": "http://x/000010001",
        "status": "success",
        "original_width": 400,
        "exif": None,
    }
    (tmp_path / "00000.parquet").write_bytes(b"PAR1 no more")
    broken, first, _ = source.parts[0].read()
    assert (broken.key, broken.cause, first.extra) == (f"{tmp_path}/00000.parquet", DAMAGED_TABLE, {})


def test_the_state_of_a_source_changes_with_what_is_in_it(tmp_path: Path):
    write(tmp_path / "images", {"a.png": b"1", "a.txt": b"one", "passed.over": b""})
    write(tmp_path, {"t.csv": b"filepath,title\na,b\n", "task/cat/1.png": b"1"})
    write(tmp_path, {"shard.tar": tar_of({"a.jpg": b"i", "a.txt": b"t"})})
    for source, change in (("images", "images/a.txt"), ("t.csv", "t.csv"), ("shard.tar", "shard.tar")):
        config = DataConfig(source=str(tmp_path / source), tasks=(f"pets={tmp_path}/task",))
        before = state_of(config)
        assert state_of(config) == before
        (tmp_path / change).write_bytes((tmp_path / change).read_bytes() + b" ")
        between = state_of(config)
        assert between != before
        os.utime(tmp_path / "task/cat/1.png", ns=(1, len(source)))
        assert state_of(config) != between
    icons = state_of(DataConfig(source="icons"))
    assert any(line.startswith("resvg-py ") for line in icons)


def test_paths_of_a_recipe_are_taken_from_its_folder(tmp_path: Path):
    sources = {
        "icons": "icons",
        "iconify": "iconify",
        "iconify:package": f"iconify:{tmp_path}/package",
        "a.tar::b/{0..3}.tar": f"{tmp_path}/a.tar::{tmp_path}/b/{{0..3}}.tar",
        "s3://bucket/a/": "s3://bucket/a/",
        "/absolute": "/absolute",
    }
    assert {name: relative_to(DataConfig(source=name), tmp_path).source for name in sources} == sources
    moved = relative_to(DataConfig(source="x", tasks=("pets=eval", "s3://bucket/birds")), tmp_path)
    assert moved.tasks == (f"pets={tmp_path}/eval", "birds=s3://bucket/birds")
    assert relative_to(DataConfig(source="iconify", tasks=("lucide",)), tmp_path).tasks == ("lucide",)


def test_parts_of_img2dataset_of_which_a_half_is_missing_are_counted(tmp_path: Path):
    for part in ("00000", "00001"):
        (tmp_path / part).mkdir()
        (tmp_path / part / f"{part}0000.jpg").write_bytes(b"i")
        (tmp_path / part / f"{part}0000.txt").write_text(part)
    for part in ("00000", "00002"):
        status = ["success", "success", "failed_to_download"]
        keys = [f"{part}{number:04d}" for number in range(3)]
        pq.write_table(pa.table({"key": keys, "url": keys, "status": status}), tmp_path / f"{part}.parquet")
    source = open_source(DataConfig(source=str(tmp_path)))
    found = [item for part in source.parts for item in part.read()]
    assert [item.caption for item in found if isinstance(item, Sample)] == ["00000", "00001"]
    causes = [item.cause for item in found if isinstance(item, Skipped)]
    assert causes == [NO_SIDECAR, NO_SHARD, NO_SHARD]
