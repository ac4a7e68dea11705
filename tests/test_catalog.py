"""A catalog reads, selects and gains columns as arrays of its rows would, and says what it cannot do."""

from __future__ import annotations

import io
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
from PIL import Image

from modeclip import catalog as catalog_module
from modeclip.catalog import FINGERPRINT, FORMAT, PAIR_COLUMNS, PENDING, Catalog, Writer
from modeclip.errors import ModeclipError
from modeclip.files import writing

NUM_ROWS = 50


def picture(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, shade, shade)).save(file, "PNG")
    return file.getvalue()


def write_catalog(path: Path) -> Path:
    """Write a catalog of files of ten rows; odd images lie in the row, even ones in one file on disk."""
    block, offsets = b"", []
    for n in range(NUM_ROWS):
        offsets.append(len(block))
        block += picture(n)
    (path.parent / "block").write_bytes(block)
    values = {
        "key": [f"key {n}" for n in range(NUM_ROWS)],
        "caption": [f"caption {n // 2}" for n in range(NUM_ROWS)],
        "image": [picture(n) if n % 2 else None for n in range(NUM_ROWS)],
        "path": [None if n % 2 else str(path.parent / "block") for n in range(NUM_ROWS)],
        "offset": offsets,
        "size": [len(picture(n)) for n in range(NUM_ROWS)],
        "width": [4] * NUM_ROWS,
        "height": [4] * NUM_ROWS,
        "group": ["a" if n < 20 else "b" for n in range(NUM_ROWS)],
    }
    table = pa.table(values, schema=pa.schema([(name, PAIR_COLUMNS[name]) for name in values]))
    with pytest.MonkeyPatch.context() as patch, Writer(path) as writer:
        patch.setattr(catalog_module, "ROWS_PER_FILE", 10)
        for start in range(0, NUM_ROWS, 5):
            writer.write(table.slice(start, 5))
        writer.commit({FORMAT: "1", FINGERPRINT: "f" * 32})
    return path


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
    assert len(list((shared.path / "data").iterdir())) == NUM_ROWS // 10
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
    assert [path.name for path in catalog.path.parent.iterdir() if path.name.startswith(".")] == []


def test_a_column_is_replaced_even_by_one_of_another_type(catalog: Catalog):
    catalog.add_columns({"expert": np.zeros(NUM_ROWS, np.int32), "v": np.zeros((NUM_ROWS, 2), np.float16)})
    catalog.add_columns({"v": np.ones((NUM_ROWS, 5), np.float32), "new": np.arange(NUM_ROWS)})
    columns = catalog.read(["expert", "v", "new"])
    assert (columns["v"] == np.ones((NUM_ROWS, 5))).all()
    assert columns["new"].tolist() == list(range(NUM_ROWS))
    assert not columns["expert"].any()
    assert sorted(Catalog.open(catalog.path).columns[9:]) == ["expert", "new", "v"]


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
        patch.setattr(lance.LanceDataset, "drop_columns", killed)
        with pytest.raises(KeyboardInterrupt):
            catalog.add_columns({"expert": np.ones(NUM_ROWS, np.int32)})
    opened = Catalog.open(catalog.path)
    assert PENDING + "expert" in opened._dataset.schema.names
    assert opened.columns[9:] == ["expert"]
    assert not opened.read(["expert"])["expert"].any()  # the old values, whole
    opened.add_columns({"expert": np.full(NUM_ROWS, 2, np.int32)})
    assert opened._dataset.schema.names[9:] == ["expert"]
    assert (opened.read(["expert"])["expert"] == 2).all()


def test_a_stream_that_fails_changes_nothing(catalog: Catalog):
    def parts():
        yield {"v": np.zeros(10)}
        raise RuntimeError("the encoder failed")

    with pytest.raises(RuntimeError, match="the encoder failed"):
        catalog.add_columns(parts())
    assert Catalog.open(catalog.path).columns[9:] == []
    assert [path.name for path in catalog.path.parent.iterdir() if path.name.startswith(".")] == []


def test_columns_that_do_not_fit_are_refused(catalog: Catalog):
    with pytest.raises(ValueError, match="expected 50 values a column, got 49"):
        catalog.add_columns({"v": np.zeros(49)})
    with pytest.raises(ValueError, match=r"columns of the pairs themselves cannot be replaced: \['caption', 'task'\]"):
        catalog.add_columns({"task": np.zeros(50), "caption": np.zeros(50), "v": np.zeros(50)})
    assert catalog.columns[9:] == []


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
    known = "known: key, caption, image, path, offset, size, width, height, group"
    with pytest.raises(ModeclipError, match=rf"^unknown column of '.*c\.lance' 'captoin'; {known}$"):
        use(shared)


@pytest.mark.parametrize("row", [-1, NUM_ROWS])
def test_a_row_that_is_not_there_says_which_are(shared: Catalog, row):
    with pytest.raises(ModeclipError, match=rf"has rows 0 to 49, got {min(row, 3)} to {max(row, 3)}$"):
        shared.images(np.array([3, row]))


def test_a_value_of_another_type_is_an_error(shared: Catalog):
    with pytest.raises(ModeclipError, match="column 'offset' holds int64, which 'three' is not"):
        shared.select(offset="three")


def test_images_that_went_away_are_named(catalog: Catalog):
    block = catalog.path.parent / "block"
    block.write_bytes(block.read_bytes()[:200])
    with pytest.raises(ModeclipError, match=r"image of 'key 8' \(path .*block\): image does not decode; it was"):
        catalog.images(np.array([1, 8]))
    block.unlink()
    with pytest.raises(ModeclipError, match=r"image of 'key 0' .*: image file is missing; .*bring the file back"):
        catalog.images(np.array([0]))
    assert len(catalog.images(np.array([1]))) == 1


def test_what_is_no_catalog_is_said(tmp_path: Path):
    with pytest.raises(ModeclipError, match=r"no catalog at '.*none': make one with modeclip index"):
        Catalog.open(tmp_path / "none")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ModeclipError, match=r"folder' is no catalog: expected a folder that modeclip index wrote"):
        Catalog.open(tmp_path / "folder")
    lance.write_dataset(pa.table({"a": [1]}), str(tmp_path / "other"))
    with pytest.raises(ModeclipError, match=r"other' has format none, expected 1: write it again with modeclip index"):
        Catalog.open(tmp_path / "other")


def test_what_is_not_committed_is_no_catalog(tmp_path: Path):
    with Writer(tmp_path / "c.lance") as writer:
        writer.write(pa.table({"a": [1]}))
    assert not (tmp_path / "c.lance").exists()
    with Writer(tmp_path / "c.lance") as writer:
        writer.write(pa.table({"a": [1]}))
        with pytest.raises(ModeclipError, match="is no catalog"):
            Catalog.open(tmp_path / "c.lance")
        writer.commit({FORMAT: "1", FINGERPRINT: "0"})
    shutil.move(tmp_path / "c.lance", tmp_path / "moved.lance")
    assert Catalog.open(tmp_path / "moved.lance").read(["a"])["a"].tolist() == [1]


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
        pytest.raises(
            ModeclipError, match=r"^disk full while writing 'out': free some space and give the same command"
        ),
        writing(Path("out")),
    ):
        raise error


def test_other_errors_of_writing_are_left_as_they_are():
    with pytest.raises(PermissionError), writing(Path("out")):
        raise PermissionError(13, "Permission denied")
