"""A catalog reads, selects and gains columns as arrays of its rows would, and says what it cannot do."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeclip.data.catalog import FINGERPRINT, FORMAT, FORMAT_VERSION, PAIR_COLUMNS, Catalog
from modeclip.data.images import hash_image
from modeclip.data.indexing import index
from modeclip.data.selection import Selection
from modeclip.data.sources import DataConfig
from modeclip.data.storage import NEW, FileWriter, append, create, only_writer
from modeclip.errors import ModeclipError
from modeclip.system.files import writing
from support import plain_png

NUM_ROWS = 50


def write_catalog(path: Path) -> Path:
    """Write a catalog of files of ten rows; odd images lie in the row, even ones in one file on disk."""
    block, offsets = b"", []
    for n in range(NUM_ROWS):
        offsets.append(len(block))
        block += plain_png(n)
    (path.parent / "block").write_bytes(block)
    values = {
        "key": [f"key {n}" for n in range(NUM_ROWS)],
        "caption": [f"caption {n // 2}" for n in range(NUM_ROWS)],
        "image": [plain_png(n) if n % 2 else None for n in range(NUM_ROWS)],
        "path": [None if n % 2 else str(path.parent / "block") for n in range(NUM_ROWS)],
        "offset": offsets,
        "size": [len(plain_png(n)) for n in range(NUM_ROWS)],
        "width": [4] * NUM_ROWS,
        "height": [4] * NUM_ROWS,
        "digest": [hash_image(plain_png(n)) for n in range(NUM_ROWS)],
        "group": ["a" if n < 20 else "b" for n in range(NUM_ROWS)],
    }
    table = pa.table(values, schema=pa.schema([(name, PAIR_COLUMNS[name]) for name in values]))
    writer = FileWriter(str(path), table.schema, max_rows=10)
    for start in range(0, NUM_ROWS, 4):
        writer.write(table.slice(start, 4))
    create(str(path), table.schema.with_metadata({FORMAT: FORMAT_VERSION, FINGERPRINT: "f" * 32}), writer.finish())
    return path


def data_files(catalog: Catalog) -> set[str]:
    return {path.name for path in Path(catalog.path, "data").iterdir()}


def used_files(catalog: Catalog) -> set[str]:
    fragments = Catalog.open(catalog.path).dataset.get_fragments()
    return {str(file.path) for fragment in fragments for file in fragment.data_files()}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """A catalog that tests only read."""
    return Catalog.open(write_catalog(tmp_path_factory.mktemp("shared") / "c.lance"))


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    """A catalog that a test may change."""
    return Catalog.open(write_catalog(tmp_path / "c.lance"))


rows = st.lists(st.integers(0, NUM_ROWS - 1)).map(lambda values: np.array(values, np.int64))


# ---------------------------------------------------------------- reading


def test_what_was_written_is_there(shared: Catalog):
    assert len(shared) == NUM_ROWS
    assert shared.columns == [name for name in PAIR_COLUMNS if name != "task"]
    assert shared.fingerprint == "f" * 32
    assert len(list(Path(shared.path, "data").iterdir())) == NUM_ROWS // 10
    columns = shared.read(["key", "offset", "width"])
    assert columns["key"].tolist() == [f"key {n}" for n in range(NUM_ROWS)]
    assert (columns["offset"].dtype, columns["width"].dtype) == (np.int64, np.int32)


@given(rows)
def test_rows_come_in_the_order_asked_for_with_repeats(shared: Catalog, rows):
    assert shared.read(["key"], rows)["key"].tolist() == [f"key {n}" for n in rows]
    assert [image.getpixel((0, 0)) for image in shared.images(rows)] == [(n, n, n) for n in rows]


@given(st.integers(1, 60))
def test_batches_are_the_rows_in_order(shared: Catalog, batch_size):
    parts = list(shared.batches(["key", "offset"], batch_size))
    whole = shared.read(["key", "offset"])
    assert all(len(part["key"]) <= batch_size for part in parts)
    for name in whole:
        assert np.concatenate([part[name] for part in parts]).tolist() == whole[name].tolist()


def test_threads_share_a_catalog(shared: Catalog):
    random = np.random.default_rng(0)
    draws = [random.integers(0, NUM_ROWS, 20) for _ in range(40)]
    with ThreadPoolExecutor(8) as pool:
        for drawn, images in zip(draws, pool.map(shared.images, draws), strict=True):
            assert [image.getpixel((0, 0))[0] for image in images] == drawn.tolist()
    assert threading.active_count() < 20


def test_select_gives_the_positions_where_all_values_are_equal(shared: Catalog):
    assert shared.select(group="b").tolist() == list(range(20, NUM_ROWS))
    assert shared.select(group="a", caption="caption 3").tolist() == [6, 7]
    assert shared.select(group="a", caption="caption 33").tolist() == []
    assert shared.select(caption=r"it's \ a %").tolist() == []
    assert shared.select().tolist() == list(range(NUM_ROWS))
    assert shared.select(offset=0).dtype == np.int64


# ---------------------------------------------------------------- adding columns


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_vectors_come_back_as_they_went_in(catalog: Catalog, dtype):
    vectors = np.random.default_rng(0).standard_normal((NUM_ROWS, 6)).astype(dtype)
    catalog.add_columns({"embedding": vectors, "expert": np.arange(NUM_ROWS, dtype=np.int32) % 3})
    for opened in (catalog, Catalog.open(catalog.path)):
        columns = opened.read(["embedding", "expert"])
        assert columns["embedding"].dtype == dtype
        assert (columns["embedding"] == vectors).all()
        assert opened.columns[-2:] == ["embedding", "expert"]
        assert opened.fingerprint == "f" * 32
        assert (opened.read(["embedding"], np.array([7, 3]))["embedding"] == vectors[[7, 3]]).all()
        assert opened.select(expert=2).tolist() == list(range(2, NUM_ROWS, 3))
    assert [part["embedding"].shape for part in catalog.batches(["embedding"], 25)][:2] == [(10, 6)] * 2


@pytest.mark.parametrize("part", [1, 7, 10, 50])
def test_columns_can_be_added_as_a_stream(catalog: Catalog, part):
    values = np.arange(NUM_ROWS * 2, dtype=np.float32).reshape(NUM_ROWS, 2)
    words = [f"word {n}" for n in range(NUM_ROWS)]
    catalog.add_columns(
        {"v": values[start : start + part], "w": pa.array(words[start : start + part])}
        for start in range(0, NUM_ROWS, part)
    )
    assert (catalog.read(["v"])["v"] == values).all()
    assert catalog.read(["w"])["w"].tolist() == words
    assert data_files(catalog) == used_files(catalog)


def test_a_column_is_replaced_even_by_one_of_another_type(catalog: Catalog):
    catalog.add_columns({"expert": np.zeros(NUM_ROWS, np.int32), "v": np.zeros((NUM_ROWS, 2), np.float16)})
    catalog.add_columns({"v": np.ones((NUM_ROWS, 5), np.float32), "new": np.arange(NUM_ROWS)})
    columns = catalog.read(["expert", "v", "new"])
    assert (columns["v"] == np.ones((NUM_ROWS, 5))).all()
    assert columns["new"].tolist() == list(range(NUM_ROWS))
    assert not columns["expert"].any()
    assert sorted(Catalog.open(catalog.path).columns[10:]) == ["expert", "new", "v"]


def test_a_reader_keeps_the_version_that_it_opened(catalog: Catalog):
    catalog.add_columns({"expert": np.zeros(NUM_ROWS, np.int32)})
    reader = Catalog.open(catalog.path)
    catalog.add_columns({"expert": np.ones(NUM_ROWS, np.int32)})
    assert not reader.read(["expert"])["expert"].any()
    assert Catalog.open(catalog.path).read(["expert"])["expert"].all()


def test_a_replacement_cut_short_is_cleared_away_by_the_next(catalog: Catalog, monkeypatch: pytest.MonkeyPatch):
    catalog.add_columns({"expert": np.zeros(NUM_ROWS, np.int32)})

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lance.LanceDataset, "alter_columns", killed)
        with pytest.raises(KeyboardInterrupt):
            catalog.add_columns({"expert": np.ones(NUM_ROWS, np.int32)})
    opened = Catalog.open(catalog.path)
    assert NEW + "expert" in opened._dataset.schema.names
    assert opened.columns[10:] == ["expert"]
    assert not opened.read(["expert"])["expert"].any()  # the old values, whole
    opened.add_columns({"expert": np.full(NUM_ROWS, 2, np.int32)})
    assert opened._dataset.schema.names[10:] == ["expert"]
    assert (opened.read(["expert"])["expert"] == 2).all()


def test_a_stream_that_fails_changes_nothing(catalog: Catalog):
    def parts():
        yield {"v": np.zeros(10)}
        raise RuntimeError("the encoder failed")

    with pytest.raises(RuntimeError, match="the encoder failed"):
        catalog.add_columns(parts())
    assert Catalog.open(catalog.path).columns[10:] == []
    assert data_files(catalog) == used_files(catalog)


def test_columns_that_do_not_fit_are_refused(catalog: Catalog):
    with pytest.raises(ValueError, match="expected a value for every row, got 1 too few"):
        catalog.add_columns({"v": np.zeros(49)})
    with pytest.raises(ValueError, match="expected a value for every row, got 2 too many"):
        catalog.add_columns({"v": np.zeros(52)})
    with pytest.raises(ValueError, match=r"cannot be replaced.*\['caption', 'task'\]"):
        catalog.add_columns({"task": np.zeros(50), "caption": np.zeros(50), "v": np.zeros(50)})
    assert catalog.columns[10:] == []


# ---------------------------------------------------------------- what cannot be done


@pytest.mark.parametrize(
    "use",
    [
        lambda catalog: catalog.read(["captoin"]),
        lambda catalog: catalog.select(captoin=1),
        lambda catalog: next(catalog.batches(["captoin"])),
    ],
)
def test_a_column_that_is_not_there_lists_the_known_ones(shared: Catalog, use):
    known = "known: key, caption, image, path, offset, size, width, height, digest, group"
    with pytest.raises(ModeclipError, match=rf"^unknown column of '.*c\.lance' 'captoin'; {known}$"):
        use(shared)


@pytest.mark.parametrize("row", [-1, NUM_ROWS])
def test_a_row_that_is_not_there_says_which_are(shared: Catalog, row):
    with pytest.raises(ModeclipError, match=rf"has rows 0 to 49, got {min(row, 3)} to {max(row, 3)}$"):
        shared.images(np.array([3, row]))


def test_a_value_of_another_type_is_an_error(shared: Catalog):
    with pytest.raises(ModeclipError, match=r"'offset' holds int64.*'three'"):
        shared.select(offset="three")


def test_images_that_went_away_are_named(catalog: Catalog):
    block = Path(catalog.path).parent / "block"
    whole = block.read_bytes()
    block.write_bytes(whole[:200])
    with pytest.raises(ModeclipError, match=r"'key 8'.*block\).*has changed.*bring the file back"):
        catalog.images(np.array([1, 8]))
    block.write_bytes(whole.replace(plain_png(0), plain_png(49)[: len(plain_png(0))].ljust(len(plain_png(0)))))
    for read in (catalog.images, catalog.encoded_images, catalog.digests):
        with pytest.raises(ModeclipError, match=r"'key 0'.*has changed.*index again"):
            read(np.array([0]))
    block.write_bytes(whole)
    rows = np.array([8, 1, 0, 8])
    assert catalog.digests(rows) == [hash_image(plain_png(row)) for row in rows]
    block.unlink()
    with pytest.raises(ModeclipError, match=r"'key 0'.*is missing.*bring the file back"):
        catalog.images(np.array([0]))
    assert len(catalog.images(np.array([1]))) == 1


def test_what_is_no_catalog_is_said(tmp_path: Path):
    with pytest.raises(ModeclipError, match=r"no catalog at .*none'.*modeclip index"):
        Catalog.open(tmp_path / "none")
    (tmp_path / "folder" / "catalog.lance").mkdir(parents=True)
    with pytest.raises(ModeclipError, match=r"catalog\.lance' is no catalog.*modeclip index"):
        Catalog.open(tmp_path / "folder")
    lance.write_dataset(pa.table({"a": [1]}), str(tmp_path / "other"))
    with pytest.raises(ModeclipError, match=r"other' has format none, expected 2.*modeclip index"):
        Catalog.open(tmp_path / "other")


def test_what_is_not_committed_is_no_catalog(tmp_path: Path):
    path, schema = str(tmp_path / "c.lance"), pa.schema([("a", pa.int64())])
    writer = FileWriter(path, schema)
    writer.write(pa.table({"a": [1]}))
    with pytest.raises(ModeclipError, match=r"c\.lance' is unfinished.*same modeclip index command"):
        Catalog.open(path)
    create(path, schema.with_metadata({FORMAT: FORMAT_VERSION, FINGERPRINT: "0"}), writer.finish())
    shutil.move(path, tmp_path / "moved.lance")
    assert Catalog.open(tmp_path / "moved.lance").read(["a"])["a"].tolist() == [1]


def test_a_folder_stands_for_the_catalog_in_it(tmp_path: Path):
    write_catalog(tmp_path / "catalog.lance")
    assert len(Catalog.open(tmp_path)) == NUM_ROWS
    assert Catalog.open(tmp_path).name == tmp_path.name


# ---------------------------------------------------------------- lists, masks, facts, further rows


def test_rows_are_selected_by_a_list_and_by_a_mask(catalog: Catalog):
    pairs = np.stack([np.arange(NUM_ROWS) % 5, np.arange(NUM_ROWS) % 3], axis=1).astype(np.int32)
    mask = np.random.default_rng(0).random(NUM_ROWS) < 0.5
    catalog.add_columns({"experts": pairs, "kept": mask})
    has_two = (pairs == 2).any(1)
    assert catalog.select(experts=2).tolist() == np.flatnonzero(has_two).tolist()
    expected = np.flatnonzero(has_two & mask & (np.arange(NUM_ROWS) >= 20)).tolist()
    assert catalog.select(mask=mask, experts=2, group="b").tolist() == expected
    assert catalog.select(mask="kept", experts=2, group="b").tolist() == expected
    with pytest.raises(ModeclipError, match=r"mask has 49 rows, catalog '.*' has 50"):
        catalog.select(mask=mask[1:])


def test_columns_remember_what_made_them(catalog: Catalog):
    catalog.add_columns({"v": np.zeros((NUM_ROWS, 2), np.float16)}, facts={"encoder": "minilm"})
    catalog.add_columns({"w": np.zeros(NUM_ROWS)})
    opened = Catalog.open(catalog.path)
    assert [opened.facts(name) for name in ("v", "caption")] == [{"encoder": "minilm"}, None]


def test_a_column_of_a_user_is_known_by_its_values(catalog: Catalog):
    values, words = np.arange(NUM_ROWS, dtype=np.int64) % 7 == 0, [f"word {n}" for n in range(NUM_ROWS)]
    found = []
    for part in (NUM_ROWS, 7, 10):  # however they are given
        catalog.add_columns(
            {"good": values[start : start + part], "w": pa.array(words[start : start + part])}
            for start in range(0, NUM_ROWS, part)
        )
        found.append(catalog.facts("good"))
    assert found[0] == found[1] == found[2] == catalog.facts("w")
    chosen = Selection(mask="good").facts(catalog)
    catalog.add_columns({"good": ~values})
    assert catalog.facts("good") != found[0]
    assert Selection(mask="good").facts(catalog) != chosen


def test_rows_added_later_have_no_values_until_the_stage_is_run_again(catalog: Catalog):
    catalog.add_columns({"v": np.ones((NUM_ROWS, 2), np.float16)})
    more = catalog.dataset.to_table(columns=[name for name in PAIR_COLUMNS if name != "task"]).slice(0, 3)
    writer = FileWriter(catalog.path, more.schema)
    writer.write(more)
    files = writer.finish()
    for _ in range(2):  # the second time they are there already
        append(catalog.path, files, {FORMAT: FORMAT_VERSION, FINGERPRINT: "e" * 32})
    opened = Catalog.open(catalog.path)
    assert (len(opened), opened.fingerprint) == (NUM_ROWS + 3, "e" * 32)
    assert (opened.read(["v"], np.arange(NUM_ROWS))["v"] == 1).all()
    for read in (lambda: opened.read(["v"]), lambda: list(opened.batches(["v"]))):
        with pytest.raises(ModeclipError, match=r"column v .*no values for 3 pairs.*run its stage again"):
            read()
    assert opened.read(["caption"])["caption"][-3:].tolist() == ["caption 0", "caption 0", "caption 1"]


def test_two_cannot_write_at_once(catalog: Catalog):
    with only_writer(catalog.path), pytest.raises(ModeclipError, match=r"process .* is at work"):
        catalog.add_columns({"v": np.zeros(NUM_ROWS)})


def test_a_handle_of_before_a_change_writes_nothing_and_says_so(catalog: Catalog):
    stale = Catalog.open(catalog.path)
    catalog.add_columns({"new": np.arange(NUM_ROWS)})
    before = len(catalog.dataset.versions())
    for name in ("new", "another"):
        with pytest.raises(ModeclipError, match=r"^catalog .* has changed since it was opened.*open it anew"):
            stale.add_columns({name: np.zeros(NUM_ROWS)})
    opened = Catalog.open(catalog.path)
    assert len(opened.dataset.versions()) == before
    assert "another" not in opened.columns
    assert opened.read(["new"])["new"].tolist() == list(range(NUM_ROWS))


@pytest.mark.parametrize("letter", ["\n", "\x1b", "\x7f"])
def test_a_path_with_a_control_character_is_refused(catalog: Catalog, tmp_path: Path, letter: str):
    place = tmp_path / f"a{letter}b"
    shutil.copytree(catalog.path, place / "catalog.lance")
    with pytest.raises(ModeclipError, match=r"^catalog '.*control character.*choose another$"):
        Catalog.open(place)
    config = DataConfig.from_flat({"source": "icons", "train_sets": ("octicons",)})
    with pytest.raises(ModeclipError, match="control character"):
        index(config, tmp_path / f"new{letter}")


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        OSError(122, "Disk quota exceeded"),
        OSError("LanceError(IO): No space left on device (os error 28), writer.rs:190:9"),
    ],
)
def test_a_full_disk_is_told_in_one_line(error):
    with (
        pytest.raises(ModeclipError, match=r"^disk full.*'out'.*free some space"),
        writing(Path("out")),
    ):
        raise error


def test_other_errors_of_writing_are_left_as_they_are():
    with pytest.raises(PermissionError), writing(Path("out")):
        raise PermissionError(13, "Permission denied")


def test_what_a_user_writes_for_a_value_is_of_the_columns_type(tmp_path: Path):
    image = plain_png((1, 2, 3), (2, 2))
    (tmp_path / "1.png").write_bytes(image)
    (tmp_path / "t.csv").write_text("filepath,title,group,code\n1.png,a,north,7\n1.png,b,it's,8\n")
    index(DataConfig(source=str(tmp_path / "t.csv")), tmp_path / "out")
    catalog = Catalog.open(tmp_path / "out")
    for text, value in (("north", "north"), ("'north'", "north"), ("it's", "it's")):
        assert catalog.parse_value("group", text) == value
    assert catalog.select(group=catalog.parse_value("group", "north")).tolist() == [0]
    assert catalog.select(code=catalog.parse_value("code", "8")).tolist() == [1]
    assert catalog.parse_value("width", "2") == 2
    with pytest.raises(ModeclipError, match=r"'width' holds int32, which 'two' is not"):
        catalog.parse_value("width", "two")
    with pytest.raises(ModeclipError, match=r"column .*'colour'.*group"):
        catalog.parse_value("colour", "2")
