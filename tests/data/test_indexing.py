"""Every source becomes the same catalog; what cannot be used is counted, or said in one line; kills leave no half."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from modeclip.data import indexing
from modeclip.data.catalog import Catalog
from modeclip.data.images import decode_image
from modeclip.data.indexing import Distinct, IndexResult, index
from modeclip.data.samples import (
    BOMB,
    DAMAGED_SHARD,
    DUPLICATE,
    EMPTY,
    MISSING,
    MISSING_SHARD,
    NO_CAPTION,
    NOT_UTF8,
    UNDECODABLE,
    UNREADABLE,
    Sample,
)
from modeclip.data.sources import DataConfig
from modeclip.data.sources.icons import read_icons
from modeclip.errors import ModeclipError
from support import can_mount, encode_picture, png_bomb, tar_of


@pytest.fixture(scope="session")
def icons() -> list[Sample]:
    """A few dozen real icons, each with a caption of its own."""
    samples = (item for item in read_icons(["lucide"], 32) if isinstance(item, Sample))
    return [Sample(f"{n:03d}", s.caption, s.image) for n, s in enumerate(islice(samples, 40))]


def write_folder(folder: Path, icons: list[Sample]) -> Path:
    folder.mkdir(parents=True)
    for icon in icons:
        (folder / f"{icon.key}.png").write_bytes(icon.image)
        (folder / f"{icon.key}.txt").write_text(icon.caption)
    return folder


def write_table(folder: Path, icons: list[Sample]) -> Path:
    write_folder(folder, icons)
    rows = [f"{icon.key}.png\t{icon.caption}" for icon in icons]
    (folder / "pairs.tsv").write_text("\n".join(["filepath\ttitle", *rows]))
    return folder / "pairs.tsv"


def write_shards(folder: Path, icons: list[Sample]) -> Path:
    for number, part in enumerate((icons[:25], icons[25:])):
        write_shard(folder / f"{number:05d}.tar", part)
    return folder


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


SOURCES = {"folder": write_folder, "table": write_table, "shards": write_shards}


# ---------------------------------------------------------------- round trips


@pytest.mark.parametrize("copy_images", [False, True])
@pytest.mark.parametrize("kind", SOURCES)
def test_pairs_come_back_from_every_source(tmp_path: Path, icons, kind, copy_images):
    source = SOURCES[kind](tmp_path / "data", icons)
    result = index(DataConfig(source=str(source), copy_images=copy_images), tmp_path / "out")
    assert result == IndexResult(kind=kind, num_samples=40, num_captions=40, num_added=40, tasks={}, skipped={})
    assert names_in(tmp_path / "out") == ["catalog.lance"]
    if copy_images:
        shutil.rmtree(tmp_path / "data")
    catalog = Catalog.open(tmp_path / "out" / "catalog.lance")
    rows = np.arange(40)[::-1]
    pairs = catalog.read(["caption", "image", "width", "height"], rows)
    assert pairs["caption"].tolist() == [icon.caption for icon in reversed(icons)]
    assert pairs["image"].tolist() == [icon.image if copy_images else None for icon in reversed(icons)]
    assert set(pairs["width"]) == set(pairs["height"]) == {32}
    expected = [decode_image(icon.image).tobytes() for icon in reversed(icons)]
    assert [image.tobytes() for image in catalog.images(rows)] == expected


def test_the_fingerprint_is_that_of_the_pairs_wherever_they_lie(tmp_path: Path, icons):
    def fingerprint(name: str, samples: list[Sample], **options: object) -> str:
        source = write_folder(tmp_path / name, samples)
        index(DataConfig.from_flat({"source": str(source), **options}), tmp_path / f"{name} out")
        return Catalog.open(tmp_path / f"{name} out" / "catalog.lance").fingerprint

    first = fingerprint("a", icons)
    assert re.fullmatch("[0-9a-f]{32}", first)
    assert fingerprint("b", icons[::-1]) == first  # written in another order, elsewhere
    assert fingerprint("c", icons, copy_images=True) == first
    image, caption = icons[3].image, icons[3].caption
    others = [
        fingerprint("d", icons[:-1]),
        fingerprint("e", [*icons[:3], Sample("003", caption + "s", image), *icons[4:]]),
        fingerprint("f", [*icons[:3], Sample("003", caption, image + b" "), *icons[4:]]),
    ]
    assert len({first, *others}) == 4


@pytest.mark.slow
def test_icons_are_trained_on_and_held_out(tmp_path: Path):
    config = DataConfig.from_flat({"source": "icons", "train_sets": ("octicons",), "tasks": ("heroicons",)})
    result = index(config, tmp_path)
    catalog, tasks = Catalog.open(tmp_path / "catalog.lance"), Catalog.open(tmp_path / "tasks.lance")
    captions, classes = catalog.read(["caption"])["caption"], tasks.read(["caption"])["caption"]
    assert set(classes) <= set(captions)
    assert set(tasks.read(["task"])["task"]) == {"heroicons"}
    assert result.kind == "icons"
    assert (result.num_samples, result.num_captions) == (len(catalog), len(set(captions)))
    assert result.tasks == {"heroicons": (len(set(classes)), len(tasks))}
    assert result.skipped[DUPLICATE] > 0
    assert catalog.columns[-1] == "group"
    assert tasks.columns[-1] == "task"
    again = index(config, tmp_path / "again")
    assert again == result
    for name, first in (("catalog.lance", catalog), ("tasks.lance", tasks)):
        second = Catalog.open(tmp_path / "again" / name)
        assert second.fingerprint == first.fingerprint
        assert second.read(["key"])["key"].tolist() == first.read(["key"])["key"].tolist()


def test_a_share_of_the_images_is_held_out(tmp_path: Path, icons):
    def held(samples: list[Sample], name: str) -> set[str]:
        source = write_folder(tmp_path / name, samples)
        result = index(DataConfig(source=str(source), holdout_fraction=0.3), tmp_path / f"{name} out")
        catalog, tasks = (Catalog.open(tmp_path / f"{name} out" / f"{n}.lance") for n in ("catalog", "tasks"))
        train, test = (set(c.read(["caption"])["caption"]) for c in (catalog, tasks))
        assert not train & test
        assert train | test == {icon.caption for icon in samples}
        assert result.tasks == {"holdout": (len(test), len(test))}
        return test

    all_held = held(icons, "all")
    assert 3 <= len(all_held) <= 25
    assert held(icons[:20], "half") == all_held & {icon.caption for icon in icons[:20]}


def test_own_tasks_have_their_folders_as_classes(tmp_path: Path, icons):
    source = write_folder(tmp_path / "data", icons[:30])
    for number, icon in enumerate(icons[30:]):
        path = tmp_path / "eval" / f"class {number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(icon.image)
    tasks = (str(tmp_path / "eval"), f"again={tmp_path / 'eval'}")
    result = index(DataConfig(source=str(source), tasks=tasks), tmp_path / "out")
    assert result.tasks == {"eval": (3, 10), "again": (3, 10)}
    held = Catalog.open(tmp_path / "out" / "tasks.lance")
    rows = held.select(task="again", caption="class 1")
    assert held.read(["key"], rows)["key"].tolist() == [f"again/class 1/{n}.png" for n in (1, 4, 7)]
    index(DataConfig(source=str(source)), tmp_path / "out", replace=True)
    assert names_in(tmp_path / "out") == ["catalog.lance"]  # those of the run before are gone


# ---------------------------------------------------------------- what cannot be used


def shrink(icon: Sample, side: int) -> bytes:
    return encode_picture(decode_image(icon.image).resize((side, side)))


def test_each_kind_of_damage_is_counted_and_the_rest_is_used(tmp_path: Path, icons):
    folder = write_folder(tmp_path / "data", icons)
    (folder / "001.png").write_bytes(b"")
    (folder / "002.png").write_bytes(icons[2].image[:100])
    (folder / "003.png").write_bytes(b"no image")
    (folder / "004.png").write_bytes(png_bomb())
    (folder / "005.txt").write_bytes(b"caf\xe9")
    (folder / "006.txt").unlink()
    (folder / "007.png").unlink()
    (folder / "007.png").symlink_to(folder / "nowhere.png")
    (folder / "008.png").unlink()
    (folder / "008.png").symlink_to(folder / "008.png")
    shutil.copy(folder / "009.png", os.fsencode(folder) + b"/\xff.png")
    shutil.copy(folder / "009.txt", os.fsencode(folder) + b"/\xff.txt")
    result = index(DataConfig(source=str(folder), max_skipped_fraction=0.5), tmp_path / "out")
    assert result.skipped == {
        EMPTY: 1,
        UNDECODABLE: 2,
        BOMB: 1,
        NOT_UTF8: 2,
        NO_CAPTION: 1,
        MISSING: 1,
        UNREADABLE: 1,
    }
    assert result.num_samples == 41 - 9
    catalog = Catalog.open(tmp_path / "out" / "catalog.lance")
    assert catalog.read(["key"])["key"].tolist() == ["000.png", *(f"{n:03d}.png" for n in range(9, 40))]
    with pytest.raises(ModeclipError, match=r"9 of 41 pairs .*max_skipped_fraction 0\.05.*mend the data") as caught:
        index(DataConfig(source=str(folder)), tmp_path / "strict")
    for cause, count in result.skipped.items():
        assert f"{cause} {count} (first: '00" in str(caught.value)
    assert f"'001.png', {folder}/001.png" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert names_in(tmp_path / "strict") == []


@pytest.mark.filterwarnings("default")  # as for a user: Pillow itself only warns up to twice its limit
def test_an_image_over_the_limit_of_pixels_is_a_bomb_and_no_warning(tmp_path: Path, icons, monkeypatch, recwarn):
    folder = write_folder(tmp_path / "data", icons[:1])
    (folder / "small.png").write_bytes(shrink(icons[0], 20))
    (folder / "small.txt").write_text("small")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)
    result = index(DataConfig(source=str(folder), max_skipped_fraction=0.5), tmp_path / "out")
    assert (result.num_samples, result.skipped) == (1, {BOMB: 1})
    assert not recwarn.list


def test_captions_of_a_table_that_are_not_text_are_counted(tmp_path: Path, icons):
    table = write_table(tmp_path / "data", icons)
    table.write_bytes(table.read_bytes().replace(icons[0].caption.encode(), b"caf\xe9", 1))
    assert index(DataConfig(source=str(table)), tmp_path / "out").skipped == {NOT_UTF8: 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_sets": ("octicon",)}, "unknown icon set 'octicon'; known: fontawesome"),
        ({"tasks": ("luzide",)}, "unknown icon set 'luzide'; known: fontawesome"),
        ({"tasks": ("simple",)}, "'simple' is in data.tasks and trained on.*take it out"),
        ({"tasks": ("lucide", "lucide")}, "'lucide' twice: give one"),
    ],
)
def test_names_of_icon_sets_are_looked_up_before_any_work(tmp_path: Path, options, message):
    with pytest.raises(ModeclipError, match=message):
        index(DataConfig.from_flat({"source": "icons", **options}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_to_train_on_is_an_error(tmp_path: Path, icons):
    folder = write_folder(tmp_path / "data", icons[:2])
    for path in folder.glob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(ModeclipError, match=r"\(folder\) has no pair.*0 held out.*image is empty"):
        index(DataConfig(source=str(folder), max_skipped_fraction=1.0), tmp_path / "out")
    (tmp_path / "t.csv").write_text("filepath,title\n")
    with pytest.raises(ModeclipError, match=r"\(table\) has no pair.*0 held out.*skipped: none"):
        index(DataConfig(source=str(tmp_path / "t.csv")), tmp_path / "out")


def test_a_task_without_a_usable_image_is_an_error(tmp_path: Path, icons):
    folder = write_folder(tmp_path / "data", icons)
    (tmp_path / "eval" / "cat").mkdir(parents=True)
    (tmp_path / "eval" / "cat" / "1.png").write_bytes(b"")
    config = DataConfig(source=str(folder), tasks=(f"pets={tmp_path}/eval",))
    with pytest.raises(ModeclipError, match=r"'pets'.*no usable image.*image is empty.*correct data\.tasks"):
        index(config, tmp_path / "out")
    with pytest.raises(ModeclipError, match=r"'holdout'.*no usable image.*data\.holdout_fraction"):
        index(DataConfig(source=str(folder), holdout_fraction=1e-9), tmp_path / "other")


# ---------------------------------------------------------------- interruptions


def start(config: DataConfig, out: Path) -> subprocess.Popen[bytes]:
    code = (
        # A shell starts what runs in its background with interrupts ignored, and children inherit that.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from modeclip.data.indexing import index\nfrom modeclip.data.sources import DataConfig\n"
        f"index(DataConfig.from_flat({config.flat()!r}), {str(out)!r})"
    )
    return subprocess.Popen([sys.executable, "-W", "error", "-c", code], stderr=subprocess.PIPE)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_stopped_leaves_no_catalog_and_the_next_one_works(tmp_path: Path, number):
    sets = ("octicons", "heroicons", "lucide")  # they take some seconds
    config = DataConfig.from_flat({"source": "icons", "train_sets": sets})
    process = start(config, tmp_path)
    deadline = time.monotonic() + 600
    while not (tmp_path / "catalog.lance" / "data").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)  # while it draws; Lance, which has just begun to write, takes no interrupt
    process.send_signal(number)
    _, output = process.communicate(timeout=600)
    assert process.returncode == -number, output.decode()
    # An interrupt has time to clean up.
    with pytest.raises(ModeclipError, match="is unfinished" if number == signal.SIGKILL else "no catalog at"):
        Catalog.open(tmp_path / "catalog.lance")
    result = index(config, tmp_path)
    assert names_in(tmp_path) == ["catalog.lance"]
    assert len(Catalog.open(tmp_path / "catalog.lance")) == result.num_samples


def test_a_catalog_stays_until_its_successor_is_whole(tmp_path: Path, icons):
    index(DataConfig(source=str(write_folder(tmp_path / "good", icons))), tmp_path / "out")
    bad = write_folder(tmp_path / "bad", icons)
    (bad / "039.png").write_bytes(b"")
    with pytest.raises(ModeclipError, match="1 of 40"):
        index(DataConfig(source=str(bad), max_skipped_fraction=0.0), tmp_path / "out", replace=True)
    assert len(Catalog.open(tmp_path / "out" / "catalog.lance")) == 40
    index(DataConfig(source=str(bad)), tmp_path / "out", replace=True)
    assert len(Catalog.open(tmp_path / "out" / "catalog.lance")) == 39
    assert names_in(tmp_path / "out") == ["catalog.lance"]


# ---------------------------------------------------------------- more data later


def write_shard(path: Path, icons: list[Sample]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    members = [
        (f"{icon.key}.{s}", data) for icon in icons for s, data in (("png", icon.image), ("txt", icon.caption.encode()))
    ]
    path.write_bytes(tar_of(members))
    return path


def test_shards_that_come_later_are_added_and_the_others_left_alone(tmp_path: Path, icons):
    for number in range(4):
        write_shard(tmp_path / "data" / f"{number:05d}.tar", icons[10 * number : 10 * number + 10])
    at_once = index(DataConfig(source=str(tmp_path / "data")), tmp_path / "at once")
    source = f"{tmp_path}/data/{{00000..00001}}.tar"
    assert index(DataConfig(source=source), tmp_path / "out").num_added == 20
    before = Catalog.open(tmp_path / "out")
    before.add_columns({"expert": np.zeros(20, np.int32)})
    result = index(DataConfig(source=str(tmp_path / "data")), tmp_path / "out")
    assert (result.num_added, result.num_samples, result.num_captions) == (20, 40, at_once.num_captions)
    assert index(DataConfig(source=str(tmp_path / "data")), tmp_path / "out").num_added == 0
    catalog = Catalog.open(tmp_path / "out")
    assert rows_of_pairs(catalog) == rows_of_pairs(Catalog.open(tmp_path / "at once"))
    assert catalog.fingerprint == Catalog.open(tmp_path / "at once").fingerprint != before.fingerprint
    with pytest.raises(ModeclipError, match=r"column expert .*no values for 20 pairs.*run its stage again"):
        catalog.read(["expert"])


def rows_of_pairs(catalog: Catalog) -> list[tuple[object, ...]]:
    names = ["key", "caption", "image", "offset", "size", "width", "height"]
    return list(zip(*(column.tolist() for column in catalog.read(names).values()), strict=True))


def test_files_that_come_into_a_folder_are_added(tmp_path: Path, icons):
    folder = write_folder(tmp_path / "data", icons[:30])
    index(DataConfig(source=str(folder)), tmp_path / "out")
    write_folder(tmp_path / "more", icons[30:])
    for path in (tmp_path / "more").iterdir():
        path.rename(folder / path.name)
    assert index(DataConfig(source=str(folder)), tmp_path / "out").num_added == 10
    index(DataConfig(source=str(folder)), tmp_path / "at once")
    assert rows_of_pairs(Catalog.open(tmp_path / "out")) == rows_of_pairs(Catalog.open(tmp_path / "at once"))
    assert Catalog.open(tmp_path / "out").fingerprint == Catalog.open(tmp_path / "at once").fingerprint


def test_another_source_is_added_too(tmp_path: Path, icons):
    first, second = (write_shard(tmp_path / f"{name}.tar", part) for name, part in (("a", icons[:9]), ("b", icons[9:])))
    index(DataConfig(source=str(first)), tmp_path / "out")
    assert index(DataConfig(source=str(second)), tmp_path / "out").num_samples == 40
    assert index(DataConfig(source=str(second)), tmp_path / "out", replace=True).num_samples == 31


def test_other_settings_are_refused(tmp_path: Path, icons):
    shard = write_shard(tmp_path / "a.tar", icons[:9])
    index(DataConfig(source=str(shard)), tmp_path / "out")
    with pytest.raises(ModeclipError, match=r"copy_images False, not True.*same settings.*--out, or --replace"):
        index(DataConfig(source=str(shard), copy_images=True), tmp_path / "out")
    assert len(Catalog.open(tmp_path / "out")) == 9


@pytest.mark.parametrize("copy_images", [False, True])
def test_the_pairs_of_a_part_that_changed_are_replaced(tmp_path: Path, icons, copy_images):
    for number, part in enumerate((icons[:9], icons[9:20], icons[20:30])):
        write_shard(tmp_path / "data" / f"{number}.tar", part)
    config = DataConfig(source=str(tmp_path / "data"), copy_images=copy_images)
    index(config, tmp_path / "out")
    catalog = Catalog.open(tmp_path / "out")
    catalog.add_columns({"length": np.array([len(text) for text in catalog.read(["caption"])["caption"]])})
    write_shard(tmp_path / "data" / "1.tar", icons[12:17] + icons[30:40])
    result = index(config, tmp_path / "out")
    assert (result.num_samples, result.num_added) == (34, 15)
    catalog = Catalog.open(tmp_path / "out")
    index(config, tmp_path / "anew")
    anew = Catalog.open(tmp_path / "anew")
    rows = rows_of_pairs(catalog)
    assert sorted(rows, key=repr) == sorted(rows_of_pairs(anew), key=repr)
    assert [row[0].partition("/")[0] for row in rows] == ["0"] * 9 + ["2"] * 10 + ["1"] * 15
    kept = catalog.read(["caption", "length"], np.arange(19))  # what stages have made of the others stays with them
    assert kept["length"].tolist() == [len(text) for text in kept["caption"]]
    # The fingerprint is that of these rows in this order, as if the parts had come so.
    order = "::".join(str(tmp_path / "data" / f"{number}.tar") for number in (0, 2, 1))
    index(DataConfig(source=order, copy_images=copy_images), tmp_path / "ordered")
    assert catalog.fingerprint == Catalog.open(tmp_path / "ordered").fingerprint
    assert index(config, tmp_path / "out").num_added == 0


def test_held_out_pairs_of_a_part_that_changed_are_replaced_too(tmp_path: Path, icons):
    for number, part in enumerate((icons[:20], icons[20:40])):
        write_shard(tmp_path / "data" / f"{number}.tar", part)
    config = DataConfig(source=str(tmp_path / "data"), holdout_fraction=0.5)
    index(config, tmp_path / "out")
    write_shard(tmp_path / "data" / "0.tar", icons[:12])
    index(config, tmp_path / "out")
    index(config, tmp_path / "anew")
    for name in ("catalog.lance", "tasks.lance"):
        found, anew = (rows_of_pairs(Catalog.open(tmp_path / folder / name)) for folder in ("out", "anew"))
        assert sorted(found, key=repr) == sorted(anew, key=repr)


@pytest.mark.parametrize("notes", ["none", "sizes", "stats", "parquet"])
@pytest.mark.parametrize("left", [0, 9000])
def test_what_a_damaged_shard_held_is_counted_and_too_much_stops(tmp_path: Path, icons, notes, left):
    for number in range(4):
        write_shard(tmp_path / "data" / f"{number}.tar", icons[10 * number : 10 * number + 10])
    if notes == "sizes":
        (tmp_path / "data" / "sizes.json").write_text(json.dumps({"2.tar": 17}))
    elif notes == "stats":
        (tmp_path / "data" / "2_stats.json").write_text(json.dumps({"count": 20, "successes": 17}))
    elif notes == "parquet":
        status = ["success"] * 17 + ["failed_to_download"] * 3
        table = pa.table({"key": [str(n) for n in range(20)], "status": status})
        pq.write_table(table, tmp_path / "data" / "2.parquet")
    shard = tmp_path / "data" / "2.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:left])
    config = DataConfig(source=str(tmp_path / "data"))
    with pytest.raises(ModeclipError, match=r"more than data.max_skipped_fraction.*tar shard is damaged"):
        index(config, tmp_path / "out")
    assert not (tmp_path / "out" / "catalog.lance" / "_versions").exists()
    lenient = dataclasses.replace(config, max_skipped_fraction=1.0)
    result = index(lenient, tmp_path / "out")
    assert 30 <= result.num_samples < 40
    assert result.num_samples + result.skipped[DAMAGED_SHARD] == 30 + (10 if notes == "none" else 17)
    assert index(lenient, tmp_path / "out").skipped == result.skipped  # nothing is counted a second time
    shard.write_bytes(whole)
    mended = index(config, tmp_path / "out")
    assert (mended.num_samples, mended.skipped.get(DAMAGED_SHARD)) == (40, None)
    index(config, tmp_path / "anew")
    found, anew = (rows_of_pairs(Catalog.open(tmp_path / name)) for name in ("out", "anew"))
    assert sorted(found, key=repr) == sorted(anew, key=repr)


def test_of_a_damaged_shard_whose_samples_have_several_captions_all_lost_pairs_are_counted(tmp_path: Path, icons):
    (tmp_path / "data").mkdir()
    for number in range(2):
        members: list[tuple[str, bytes]] = []
        for icon in icons[20 * number : 20 * number + 20]:
            texts = [[name, f"{name} {icon.caption}"] for name in ("alt", "title", "text")]
            members += [(f"{icon.key}.png", icon.image), (f"{icon.key}.json", json.dumps({"texts": texts}).encode())]
        (tmp_path / "data" / f"{number}.tar").write_bytes(tar_of(members))
    (tmp_path / "data" / "sizes.json").write_text(json.dumps({"0.tar": 20, "1.tar": 20}))
    shard = tmp_path / "data" / "1.tar"
    shard.write_bytes(shard.read_bytes()[:12000])
    config = DataConfig(source=str(tmp_path / "data"))
    with pytest.raises(ModeclipError, match=r"more than data.max_skipped_fraction.*tar shard is damaged"):
        index(config, tmp_path / "out")
    result = index(dataclasses.replace(config, max_skipped_fraction=1.0), tmp_path / "out")
    assert 60 < result.num_samples < 120
    assert result.num_samples + result.skipped[DAMAGED_SHARD] == 120


def test_rows_of_a_new_part_with_a_known_image_are_added(tmp_path: Path, icons):
    write_folder(tmp_path / "data", icons[:2])
    image = next(path.name for path in sorted((tmp_path / "data").iterdir()) if path.suffix == ".png")
    for name in "ab":
        (tmp_path / "data" / f"{name}.csv").write_text(f"filepath,title\n{image},caption {name}\n")
    index(DataConfig(source=str(tmp_path / "data" / "a.csv")), tmp_path / "out")
    assert index(DataConfig(source=str(tmp_path / "data" / "b.csv")), tmp_path / "out").num_samples == 2


def test_a_shard_that_was_missing_is_added_when_it_is_there(tmp_path: Path, icons):
    write_shard(tmp_path / "0.tar", icons[:30])
    config = DataConfig(source=f"{tmp_path}/{{0..1}}.tar")
    result = index(config, tmp_path / "out")
    assert (result.num_samples, result.skipped) == (30, {MISSING_SHARD: 1})
    write_shard(tmp_path / "1.tar", icons[30:])
    assert index(config, tmp_path / "out").num_samples == 40


def test_a_killed_run_goes_on_behind_the_shards_it_has_read(tmp_path: Path, icons, monkeypatch):
    for number in range(4):
        write_shard(tmp_path / "data" / f"{number:05d}.tar", icons[10 * number : 10 * number + 10])
    config = DataConfig(source=str(tmp_path / "data"))
    index(config, tmp_path / "whole")
    monkeypatch.setattr(indexing, "ROWS_PER_NOTE", 1)
    code = (
        "import os, signal\nfrom modeclip.data import indexing\nindexing.ROWS_PER_NOTE = 1\n"
        "read = indexing._Indexing._read_part\n"
        "def dying(self, part, advance):\n"
        "    if '00002' in part.name: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return read(self, part, advance)\n"
        f"indexing._Indexing._read_part = dying\nconfig = indexing.DataConfig.from_flat({config.flat()!r})\n"
        f"indexing.index(config, {str(tmp_path / 'out')!r})"
    )
    assert subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL).returncode == -signal.SIGKILL
    with pytest.raises(ModeclipError, match=r"catalog\.lance' is unfinished.*same modeclip index command"):
        Catalog.open(tmp_path / "out")
    read: list[str] = []
    original = indexing._Indexing._read_part

    def watched(self, part, advance):
        read.append(Path(part.name).stem)
        return original(self, part, advance)

    monkeypatch.setattr(indexing._Indexing, "_read_part", watched)
    result = index(config, tmp_path / "out")
    assert read == ["00002", "00003"]
    assert result.num_added == 40
    assert rows_of_pairs(Catalog.open(tmp_path / "out")) == rows_of_pairs(Catalog.open(tmp_path / "whole"))
    assert Catalog.open(tmp_path / "out").fingerprint == Catalog.open(tmp_path / "whole").fingerprint
    used = {f.path for part in Catalog.open(tmp_path / "out").dataset.get_fragments() for f in part.data_files()}
    left = {path.name for path in (tmp_path / "out" / "catalog.lance" / "data").iterdir()} - used
    assert len(left) <= 1  # the file that was being written at the kill


def test_further_columns_of_a_table_come_along(tmp_path: Path, icons):
    write_folder(tmp_path / "data", icons)
    lines = [f"{icon.key}.png\t{icon.caption}\tuid{n}" for n, icon in enumerate(icons)]
    (tmp_path / "data" / "pairs.tsv").write_text("\n".join(["filepath\ttitle\tuid", *lines]))
    index(DataConfig(source=str(tmp_path / "data" / "pairs.tsv")), tmp_path / "out")
    catalog = Catalog.open(tmp_path / "out")
    assert catalog.read(["uid"])["uid"].tolist() == [f"uid{n}" for n in range(40)]
    assert catalog.select(uid="uid7").tolist() == [7]


@pytest.mark.skipif(not can_mount(), reason="mounts a small file system")
def test_a_full_disk_says_so_and_leaves_nothing(tmp_path: Path):
    config = DataConfig.from_flat({"source": "icons", "train_sets": ("heroicons",)})
    code = (
        "import os\nfrom modeclip.data.indexing import index\nfrom modeclip.data.sources import DataConfig\n"
        f"try:\n    index(DataConfig.from_flat({config.flat()!r}), {str(tmp_path)!r})\n"
        f"except ValueError as error:\n    print(error, os.listdir({str(tmp_path)!r}))"
    )
    script = f'mount -t tmpfs -o size=300k tmpfs "{tmp_path}" && "{sys.executable}" -W error -c "$0"'
    command = ["unshare", "-rm", "sh", "-c", script, code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.stdout == (
        f"disk full while writing '{tmp_path}': free some space and give the same command again;"
        " nothing half-written is left to be used []\n"
    ), done.stderr


# ---------------------------------------------------------------- counting


@given(st.lists(st.text(max_size=3)), st.text(max_size=3))
def test_distinct_texts_are_counted_as_a_set_does(texts, other):
    counted = Distinct()
    for text in texts:
        counted.add(text)
    assert len(counted) == len(set(texts))
    assert all(text in counted for text in texts)
    assert (other in counted) == (other in texts)


def test_counting_distinct_texts_keeps_16_bytes_a_text():
    counted = Distinct()
    for number in range(200_000):
        counted.add(f"caption {number % 20_000}")
        if number % 10_000 == 0:
            assert sum(map(len, counted._new)) <= sum(map(len, counted._sorted)) + 256 * 257
    assert len(counted) == 20_000
    assert sum(part.nbytes for part in counted._sorted) == 8 * 20_000
