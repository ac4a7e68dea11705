"""What is held out: no image on both sides, the same side whatever comes with it, near-duplicates and groups."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from modeclip.data import indexing
from modeclip.data.catalog import Catalog
from modeclip.data.holdout import DHASH, SIMILAR_BITS, dhash, group_similar, is_drawn
from modeclip.data.indexing import index
from modeclip.data.samples import COPY_OF_HELD_OUT, COPY_OF_TRAINED
from modeclip.data.sources import DataConfig
from modeclip.errors import ModeclipError
from support import encode_picture, noise_picture, tar_of

PICTURES = [encode_picture(noise_picture(seed, (12, 12))) for seed in range(40)]


def sides(folder: Path) -> tuple[list[bytes], list[bytes]]:
    """Return the digests of the pairs that are trained on and of those that are held out."""
    found = []
    for name in ("catalog", "tasks"):
        path = folder / f"{name}.lance"
        found.append(list(Catalog.open(path).read(["digest"])["digest"]) if path.exists() else [])
    return found[0], found[1]


def write_shards(folder: Path, shards: list[list[tuple[int, int]]]) -> str:
    """Write tars of (picture, caption) under keys that say nothing about the picture."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, pairs in enumerate(shards):
        members = []
        for place, (picture, caption) in enumerate(pairs):
            members += [(f"{place:03d}.png", PICTURES[picture]), (f"{place:03d}.txt", f"caption {caption}".encode())]
        if not (folder / f"{number:05d}.tar").exists():
            (folder / f"{number:05d}.tar").write_bytes(tar_of(members))
    return str(folder)


@settings(max_examples=40)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 39), st.integers(0, 5)), min_size=4, max_size=12), min_size=2, max_size=4
    )
)
def test_no_image_is_on_both_sides_whatever_the_order_and_the_workers(
    tmp_path_factory: pytest.TempPathFactory, shards: list[list[tuple[int, int]]]
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    held_of = {}
    for name, order, threads in (("a", shards, 1), ("b", shards[::-1], 3)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(indexing, "CHECK_THREADS", threads)
            try:
                index(
                    DataConfig(source=write_shards(folder / name, order), holdout_fraction=0.4), folder / f"{name} out"
                )
            except ModeclipError as error:
                assert "holdout" in str(error) or "no pair to train on" in str(error)  # noqa: PT017
                return
        train, held = sides(folder / f"{name} out")
        assert not set(train) & set(held)
        assert len(train) + len(held) == sum(map(len, shards))
        held_of[name] = set(held)
    assert held_of["a"] == held_of["b"]


def test_the_side_of_an_image_stays_when_shards_come_later(tmp_path: Path) -> None:
    first = [[(n, n) for n in range(20)]]
    later = [*first, [(n % 40, n) for n in range(10, 50)]]
    config = DataConfig(source=write_shards(tmp_path / "data", first), holdout_fraction=0.3)
    index(config, tmp_path / "out")
    before = sides(tmp_path / "out")
    write_shards(tmp_path / "data", later)
    index(config, tmp_path / "out")
    after = sides(tmp_path / "out")
    index(config, tmp_path / "at once")
    for old, new, at_once in zip(before, after, sides(tmp_path / "at once"), strict=True):
        assert set(old) <= set(new)
        assert sorted(new) == sorted(at_once)
    assert not set(after[0]) & set(after[1])


def test_the_draw_is_that_of_seed_and_fraction() -> None:
    names = [f"{number}".encode() for number in range(2000)]
    drawn = [np.array([is_drawn(name, 0.25, seed) for name in names]) for seed in (0, 1)]
    for one in drawn:
        assert abs(one.mean() - 0.25) < 0.04
    assert 0.03 < (drawn[0] & drawn[1]).mean() < 0.1, "two seeds draw apart from each other: a sixteenth is in both"
    more = np.array([is_drawn(name, 0.5, 0) for name in names])
    assert (more | ~drawn[0]).all(), "a larger fraction keeps what a smaller one held out"


def test_keys_that_end_like_those_of_captions_are_keys(tmp_path: Path) -> None:
    """Pictures named `a#1` and `a#2` are not captions of one picture."""
    folder = tmp_path / "data"
    folder.mkdir()
    for number, picture in enumerate(PICTURES):
        (folder / f"a#{number}.png").write_bytes(picture)
        (folder / f"a#{number}.txt").write_text(f"caption {number}")
    index(DataConfig(source=str(folder), holdout_fraction=0.5), tmp_path / "out")
    train, held = sides(tmp_path / "out")
    assert min(len(train), len(held)) > 8


@pytest.mark.parametrize("check_images", [True, False])
def test_all_captions_of_an_image_are_on_one_side(tmp_path: Path, check_images: bool) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for number, picture in enumerate(PICTURES[:20]):
        (folder / f"{number}.png").write_bytes(picture)
        (folder / f"{number}.txt").write_text("one\ntwo\nthree")
        (folder / f"again-{number}.png").write_bytes(picture)
        (folder / f"again-{number}.txt").write_text("four")
    options = {"source": str(folder), "caption_lines": True, "check_images": check_images, "holdout_fraction": 0.3}
    index(DataConfig.from_flat(options), tmp_path / "out")
    train, held = sides(tmp_path / "out")
    assert len(train) + len(held) == 80
    assert not set(train) & set(held)
    assert {held.count(digest) for digest in held} == {train.count(digest) for digest in train} == {4}


def write_classes(folder: Path, pictures: list[bytes]) -> str:
    for number, picture in enumerate(pictures):
        (folder / f"sort {number % 2}").mkdir(parents=True, exist_ok=True)
        (folder / f"sort {number % 2}" / f"{number}.png").write_bytes(picture)
    return str(folder)


def test_tasks_and_a_fraction_work_together_and_no_task_is_trained_on(tmp_path: Path) -> None:
    source = write_shards(tmp_path / "data", [[(n, n) for n in range(30)]])
    task = write_classes(tmp_path / "flowers", PICTURES[25:35])  # five of them are in the source too
    config = DataConfig(source=source, tasks=(task,), holdout_fraction=0.3)
    result = index(config, tmp_path / "out")
    train, held = sides(tmp_path / "out")
    tasks = Catalog.open(tmp_path / "out" / "tasks.lance")
    names = tasks.read(["task"])["task"]
    assert set(names) == {"holdout", "flowers"}
    assert (names == "flowers").sum() == 10
    assert result.tasks == {"flowers": (2, 10), "holdout": ((names == "holdout").sum(), (names == "holdout").sum())}
    assert not set(train) & set(held)
    assert result.skipped == {COPY_OF_HELD_OUT: 30 - len(train) - (names == "holdout").sum()}
    assert 1 <= result.skipped[COPY_OF_HELD_OUT] <= 5
    again = index(config, tmp_path / "out")
    assert (again.num_added, again.tasks) == (0, result.tasks)
    assert Catalog.open(tmp_path / "out" / "tasks.lance").fingerprint == tasks.fingerprint
    write_shards(tmp_path / "data", [[(n, n) for n in range(30)], [(n, n) for n in range(30, 40)]])
    index(config, tmp_path / "out")
    index(config, tmp_path / "at once")
    train, held = sides(tmp_path / "out")
    assert not set(train) & set(held)
    assert [sorted(side) for side in (train, held)] == [sorted(side) for side in sides(tmp_path / "at once")]


def test_a_task_that_comes_later_is_left_without_what_is_trained_on(tmp_path: Path) -> None:
    source = write_shards(tmp_path / "data", [[(n, n) for n in range(20)]])
    index(DataConfig(source=source), tmp_path / "out")
    task = write_classes(tmp_path / "flowers", PICTURES[15:25])
    result = index(DataConfig(source=source, tasks=(task,)), tmp_path / "out")
    assert (result.num_samples, result.tasks) == (20, {"flowers": (2, 5)})
    assert result.skipped == {COPY_OF_TRAINED: 5}
    config = DataConfig(source=source, tasks=(f"holdout={task}",), holdout_fraction=0.1)
    with pytest.raises(ModeclipError, match=r"'holdout' is the task of data\.holdout_fraction: give NAME=FOLDER"):
        index(config, tmp_path / "other")


def test_held_out_pairs_of_a_changed_shard_leave_from_behind_those_of_a_task(tmp_path: Path) -> None:
    shards = [[(n, n) for n in range(15)], [(n, n) for n in range(15, 30)]]
    config = DataConfig(source=write_shards(tmp_path / "data", shards[:1]), holdout_fraction=0.4)
    task = write_classes(tmp_path / "flowers", PICTURES[30:40])
    index(replace(config, tasks=(task,)), tmp_path / "out")
    write_shards(tmp_path / "data", shards)
    index(config, tmp_path / "out")  # whose held-out pairs come behind those of the task
    (tmp_path / "data" / "00001.tar").unlink()
    write_shards(tmp_path / "data", [shards[0], [(n, n + 100) for n in range(15, 23)]])
    index(config, tmp_path / "out")
    index(config, tmp_path / "anew")
    for name in ("catalog", "tasks"):
        found = Catalog.open(tmp_path / "out" / f"{name}.lance")
        anew = Catalog.open(tmp_path / "anew" / f"{name}.lance")
        rows = np.arange(len(found)) if name == "catalog" else found.select(task="holdout")
        assert sorted(found.captions(rows)) == sorted(anew.captions())
        assert len(found) - len(rows) == (0 if name == "catalog" else 10)


def test_images_that_are_not_opened_are_on_one_side_too(tmp_path: Path) -> None:
    """Without `check_images` the pairs of a task are known by their bytes as well, whichever comes first."""
    source = Path(write_table(tmp_path / "data", [(n, "a") for n in range(20)]))
    task = write_classes(tmp_path / "flowers", PICTURES[15:25])
    result = index(DataConfig(source=str(source), tasks=(task,), check_images=False), tmp_path / "out")
    assert (result.num_samples, result.tasks) == (15, {"flowers": (2, 10)})
    assert result.skipped == {COPY_OF_HELD_OUT: 5}
    assert set(Catalog.open(tmp_path / "out").read(["width"])["width"]) == {0}  # they are not decoded
    index(DataConfig(source=str(source), check_images=False), tmp_path / "later")
    assert set(sides(tmp_path / "later")[0]) == {None}
    result = index(DataConfig(source=str(source), tasks=(task,), check_images=False), tmp_path / "later")
    assert (result.num_samples, result.tasks) == (20, {"flowers": (2, 5)})
    assert result.skipped == {COPY_OF_TRAINED: 5}


# ---------------------------------------------------------------- groups


def write_table(folder: Path, rows: list[tuple[int, str]], column: str = "site") -> str:
    """Write a CSV of (picture, value of a column)."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"filepath,title,{column}"]
    for place, (picture, value) in enumerate(rows):
        (folder / f"{place}.png").write_bytes(PICTURES[picture])
        lines.append(f"{place}.png,caption {place},{value}")
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    return str(folder / "pairs.csv")


@settings(max_examples=10)
@given(st.lists(st.tuples(st.integers(0, 15), st.sampled_from("abcdef")), min_size=8, max_size=30))
def test_groups_are_held_out_as_a_whole_and_no_image_with_them(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, str]]
) -> None:
    folder = tmp_path_factory.mktemp("groups")
    drawn = {value for value in "abcdef" if is_drawn(f"group {value}".encode(), 0.4, 0)}
    assert drawn
    assert drawn != set("abcdef")
    held_pictures = {picture for picture, value in rows if value in drawn}
    spoiled = sum(picture in held_pictures for picture, value in rows if value not in drawn)
    if not held_pictures or all(picture in held_pictures for picture, _ in rows):
        return
    config = DataConfig(source=write_table(folder, rows), holdout="group=site", holdout_fraction=0.4)
    result = index(config, folder / "out")
    train, held = sides(folder / "out")
    assert not set(train) & set(held)
    assert len(held) == sum(value in drawn for _, value in rows)
    assert result.skipped == ({COPY_OF_HELD_OUT: spoiled} if spoiled else {})
    assert len(train) + len(held) + spoiled == len(rows)
    assert not set(Catalog.open(folder / "out").read(["site"])["site"]) & drawn


@pytest.mark.parametrize("column", ["group", "site"])
def test_a_column_of_the_users_own_is_the_group(tmp_path: Path, column: str) -> None:
    rows = [(n, f"place {n % 8}") for n in range(40)]
    source = write_table(tmp_path / "data", rows, column)
    index(DataConfig(source=source, holdout=f"group={column}", holdout_fraction=0.4), tmp_path / "out")
    train, held = sides(tmp_path / "out")
    assert len(held) % 5 == len(train) % 5 == 0
    assert len(held) == 5 * sum(is_drawn(f"group place {n}".encode(), 0.4, 0) for n in range(8))


def test_a_column_that_is_not_there_and_a_unit_that_is_none_are_said(tmp_path: Path) -> None:
    source = write_table(tmp_path / "data", [(0, "a"), (1, "b")])
    with pytest.raises(ModeclipError, match=r"unknown column for data\.holdout 'sight'.*site"):
        index(DataConfig(source=source, holdout="group=sight", holdout_fraction=0.4), tmp_path / "out")
    for text in ("rows", "image=site", "group="):
        with pytest.raises(ModeclipError, match=r"data\.holdout: expected image, similar, group or group=COLUMN, got"):
            DataConfig(source=source, holdout=text)
    with pytest.raises(ModeclipError, match=r"data\.holdout_seed: expected 0 or more"):
        DataConfig(source=source, holdout_seed=-1)


def test_a_group_that_is_held_out_does_not_take_an_image_that_is_trained_on_already(tmp_path: Path) -> None:
    trained, drawn = (
        next(value for value in "abcdef" if is_drawn(f"group {value}".encode(), 0.4, 0) == side)
        for side in (False, True)
    )
    first = write_table(tmp_path / "one", [(n, trained) for n in range(6)] + [(20, drawn)])
    config = DataConfig(source=first, holdout="group=site", holdout_fraction=0.4)
    index(config, tmp_path / "out")
    second = write_table(tmp_path / "two", [(5, drawn), (6, drawn), (7, trained), (20, trained)])
    result = index(DataConfig(source=second, holdout="group=site", holdout_fraction=0.4), tmp_path / "out")
    assert result.skipped == {COPY_OF_TRAINED: 1, COPY_OF_HELD_OUT: 1}
    train, held = sides(tmp_path / "out")
    assert (len(train), len(held)) == (7, 2)
    assert not set(train) & set(held)


@pytest.mark.parametrize("holdout", ["group=site", "similar"])
def test_a_file_that_is_spelled_another_way_is_on_the_side_of_its_copies(tmp_path: Path, holdout: str) -> None:
    """A table names `20.png`, and the file is `20.PNG`, as indexing finds it."""
    rows = [(n, f"place {n % 8}") for n in range(20)] + [(n, f"place {(n + 1) % 8}") for n in range(20)]
    source = Path(write_table(tmp_path / "data", rows))
    for number in range(20, 40):
        (source.parent / f"{number}.png").rename(source.parent / f"{number}.PNG")
        if holdout == "similar":
            picture = smooth_picture(number)
            (source.parent / f"{number - 20}.png").write_bytes(encode_picture(picture))
            (source.parent / f"{number}.PNG").write_bytes(encode_picture(picture.resize((48, 48))))
    index(DataConfig(source=str(source), holdout=holdout, holdout_fraction=0.4), tmp_path / "out")
    captions = [Catalog.open(tmp_path / "out" / f"{name}.lance").captions() for name in ("catalog", "tasks")]
    train, held = ({int(caption.split()[-1]) % 20 for caption in some} for some in captions)
    assert train
    assert held
    assert not train & held


# ---------------------------------------------------------------- near-duplicates


def smooth_picture(seed: int, size: int = 96) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)


def test_dhash_says_where_the_picture_gets_darker() -> None:
    ramp = Image.fromarray(np.tile(np.arange(90, dtype=np.uint8)[::-1], (80, 1)))
    assert dhash(ramp) == 2**64 - 1
    assert dhash(ramp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) == 0
    half = np.tile(np.arange(90, dtype=np.uint8), (80, 1))
    half[:10] = half[:10, ::-1]  # the first of eight rows gets darker
    assert dhash(Image.fromarray(half)) == 0xFF << 56


def slow_groups(hashes: list[int], bits: int) -> list[set[int]]:
    groups: list[set[int]] = []
    for place, one in enumerate(hashes):
        near = [group for group in groups if any((one ^ hashes[other]).bit_count() <= bits for other in group)]
        groups = [group for group in groups if group not in near] + [set().union({place}, *near)]
    return groups


@given(
    st.lists(st.tuples(st.integers(0, 2**64 - 1), st.lists(st.integers(0, 63), max_size=6)), min_size=1, max_size=12),
    st.integers(0, 5),
)
def test_groups_of_similar_hashes_are_those_of_all_comparisons(numbers: list, bits: int) -> None:
    hashes = []
    for number, flips in numbers:  # a chain that moves away from each number bit by bit
        hashes.append(number)
        for flip in flips:
            hashes.append(hashes[-1] ^ (1 << flip))
    groups = group_similar(np.array(hashes, np.uint64), bits)
    found = [set(np.flatnonzero(groups == group).tolist()) for group in np.unique(groups)]
    assert sorted(map(sorted, found)) == sorted(map(sorted, slow_groups(hashes, bits)))


def write_variants(folder: Path, seeds: range, kinds: tuple[str, ...]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        for kind in kinds:
            picture, file = smooth_picture(seed), io.BytesIO()
            if kind == "half":
                picture = picture.resize((48, 48))
            picture.save(
                file, "JPEG" if kind.startswith("q") else "PNG", quality=int(kind[1:]) if kind[0] == "q" else 75
            )
            (folder / f"{kind}-{seed}.{'jpg' if kind[0] == 'q' else 'png'}").write_bytes(file.getvalue())
            (folder / f"{kind}-{seed}.txt").write_text(f"caption {seed}")
    return str(folder)


def seeds_in(folder: Path) -> list[set[int]]:
    found = []
    for name in ("catalog", "tasks"):
        keys = Catalog.open(folder / f"{name}.lance").read(["key"])["key"]
        found.append({int(key.rpartition("-")[2].partition(".")[0]) for key in keys})
    return found


def test_near_duplicates_stay_together_also_when_they_come_later(tmp_path: Path) -> None:
    hashes = [dhash(smooth_picture(seed)) for seed in range(30)]
    assert all((a ^ b).bit_count() > SIMILAR_BITS for n, a in enumerate(hashes) for b in hashes[:n])
    source = write_variants(tmp_path / "data", range(30), ("plain", "half", "q90"))
    apart = index(DataConfig(source=source, holdout_fraction=0.3), tmp_path / "by bytes")
    train, held = seeds_in(tmp_path / "by bytes")
    assert train & held, "bytes alone do not know a copy that was encoded anew"
    config = DataConfig(source=source, holdout="similar", holdout_fraction=0.3)
    result = index(config, tmp_path / "out")
    train, held = seeds_in(tmp_path / "out")
    assert not train & held
    assert train | held == set(range(30))
    assert min(len(train), len(held)) >= 3
    assert result.num_samples + result.tasks["holdout"][1] == 90 == apart.num_samples + apart.tasks["holdout"][1]
    stored = Catalog.open(tmp_path / "out").read([DHASH, "key"])
    for value, key in zip(stored[DHASH], stored["key"], strict=True):
        assert (
            int.from_bytes(value) ^ hashes[int(key.rpartition("-")[2].partition(".")[0])]
        ).bit_count() <= SIMILAR_BITS
    write_variants(tmp_path / "data", range(40), ("plain", "half", "q90", "q60"))
    index(config, tmp_path / "out")
    later_train, later_held = seeds_in(tmp_path / "out")
    assert not later_train & later_held
    assert train <= later_train
    assert held <= later_held


def test_near_duplicates_of_a_task_are_not_trained_on(tmp_path: Path) -> None:
    source = write_variants(tmp_path / "data", range(12), ("half",))
    task = write_classes(tmp_path / "flowers", [encode_picture(smooth_picture(seed)) for seed in range(8, 12)])
    result = index(DataConfig(source=source, tasks=(task,), holdout="similar"), tmp_path / "out")
    assert (result.num_samples, result.tasks) == (8, {"flowers": (2, 4)})
    assert result.skipped == {COPY_OF_HELD_OUT: 4}


def test_a_catalog_that_was_divided_by_keys_is_not_added_to(tmp_path: Path) -> None:
    """An earlier version divided by keys; its catalog can be read, and says why nothing can be added."""
    config = DataConfig(source=write_shards(tmp_path / "data", [[(n, n) for n in range(20)]]), holdout_fraction=0.3)
    whole = index(config, tmp_path / "out")
    catalog = Catalog.open(tmp_path / "out")
    for fraction, message in ((0.3, "divided by names and not by images.*--replace"), (0.0, None)):
        settings = json.loads(catalog.metadata[indexing.SETTINGS]) | {"holdout_fraction": fraction}
        settings.pop("holdout", None)
        dataset = Catalog.open(tmp_path / "out").dataset
        dataset.update_schema_metadata({indexing.SETTINGS: json.dumps(settings)})
        again = DataConfig(source=config.source, holdout_fraction=fraction)
        if message:
            with pytest.raises(ModeclipError, match=message):
                index(again, tmp_path / "out")
        else:
            assert index(again, tmp_path / "out").num_added == 0
    assert index(config, tmp_path / "out", replace=True) == whole
