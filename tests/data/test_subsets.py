"""Lists of ids are DataComp's to the byte, and choose the rows that a slow search by text chooses."""

from __future__ import annotations

import hashlib
import re
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeclip.data.catalog import Catalog
from modeclip.data.indexing import index
from modeclip.data.sources import DataConfig
from modeclip.data.subsets import format_uids, match_uids, parse_uids, read_uids, uid_mask, uids_of, write_uids
from modeclip.errors import ModeclipError
from support import plain_png

NUM_ROWS = 60
hexadecimal = st.integers(0, 2**128 - 1).map(lambda number: f"{number:032x}")
# Few values of each half, so that halves repeat, are zero, or end in zero bytes.
HALVES = (0, 1, 255, 256, 2**56, 2**63, 2**64 - 256, 2**64 - 1)
ALL_CROWDED = [f"{high:016x}{low:016x}" for high in HALVES for low in HALVES]
CROWDED = ALL_CROWDED[::-1][:NUM_ROWS]
crowded = st.sampled_from(ALL_CROWDED)


def slow_subset(texts: list[str]) -> np.ndarray:
    """Build a subset as DataComp's own tools do: a tuple of two integers for each uid, sorted."""
    pairs = sorted({(int(text[:16], 16), int(text[16:32], 16)) for text in texts})
    return np.array(pairs, np.dtype("u8,u8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of a picture and a caption."""
    folder = tmp_path_factory.mktemp("pairs")
    for number in range(NUM_ROWS):
        (folder / f"käfer {number}.png").write_bytes(plain_png((number, 0, 0)))
        (folder / f"käfer {number}.txt").write_text(f"beetle {number}", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def bare(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """A catalog without uids."""
    out = tmp_path_factory.mktemp("bare")
    index(DataConfig(source=str(folder)), out)
    return Catalog.open(out / "catalog.lance")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """A uid for each row; those of rows 1 and 2 are equal, that of row 3 is in capitals."""
    draw = np.random.default_rng(0)
    found = [draw.bytes(16).hex() for _ in range(NUM_ROWS)]
    found[2], found[3] = found[1], found[3].upper()
    found[4], found[5] = "0" * 32, "f" * 32
    return found


@pytest.fixture(scope="module")
def catalog(folder: Path, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """A catalog with a column ``uid``, one of uids that share halves, and one with a text that is none."""
    out = tmp_path_factory.mktemp("with uids")
    index(DataConfig(source=str(folder)), out)
    catalog = Catalog.open(out / "catalog.lance")
    catalog.add_columns({"uid": pa.array(texts), "crowded": pa.array(CROWDED)})
    catalog.add_columns({"odd": pa.array([*texts[:-1], "no uid"])})
    return catalog


# ---------------------------------------------------------------- texts and files


@given(st.lists(st.one_of(hexadecimal, crowded), max_size=40))
def test_texts_become_the_pairs_that_int_makes(texts):
    assert parse_uids(texts).tolist() == [(int(text[:16], 16), int(text[16:], 16)) for text in texts]
    assert format_uids(parse_uids(texts)) == texts
    assert (parse_uids([text.upper() for text in texts]) == parse_uids(texts)).all()


@given(st.lists(st.one_of(hexadecimal, crowded), max_size=40))
def test_a_file_is_what_datacomp_would_write(tmp_path_factory: pytest.TempPathFactory, texts):
    path = tmp_path_factory.mktemp("list") / "subset.npy"
    expected = slow_subset(texts)
    for uids in (texts, parse_uids(texts)):
        write_uids(path, uids)
        stored = np.load(path)
        assert stored.dtype == np.dtype("u8,u8")
        assert stored.tolist() == expected.tolist()
        assert read_uids(path).tolist() == expected.tolist()
    assert [file.name for file in path.parent.iterdir()] == ["subset.npy"]


def test_a_list_that_is_not_sorted_or_of_other_byte_order_is_read(tmp_path: Path, texts: list[str]):
    pairs = [(int(text[:16], 16), int(text[16:], 16)) for text in texts]
    np.save(tmp_path / "a.npy", np.array(pairs, "u8,u8"))
    np.save(tmp_path / "b.npy", np.array(pairs, ">u8,>u8"))
    np.save(tmp_path / "c.npy", np.array(pairs, [("high", "u8"), ("low", "u8")]))
    for name in "abc":
        assert read_uids(tmp_path / f"{name}.npy").tolist() == slow_subset(texts).tolist()


@pytest.mark.parametrize(
    ("array", "found"),
    [
        (np.zeros(3), "float64 of shape (3,)"),
        (np.zeros((3, 2), np.uint64), "uint64 of shape (3, 2)"),
        (np.zeros(3, "i8,i8"), "[('f0', '<i8'), ('f1', '<i8')] of shape (3,)"),
        (np.array(["0" * 32]), "<U32 of shape (1,)"),
    ],
)
def test_another_kind_of_array_is_refused(tmp_path: Path, array, found):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ModeclipError, match=rf"holds {re.escape(found)}.*expected DataComp's.*write_uids"):
        read_uids(tmp_path / "a.npy")


def test_what_is_no_list_is_said(tmp_path: Path):
    with pytest.raises(ModeclipError, match=r"no id list at .*none\.npy.*expected a \.npy"):
        read_uids(tmp_path / "none.npy")
    (tmp_path / "text.npy").write_text("0" * 32)
    with pytest.raises(ModeclipError, match=r"text\.npy' cannot be read.*expected a \.npy of u8,u8"):
        read_uids(tmp_path / "text.npy")
    write_uids(tmp_path / "cut.npy", ["0" * 32, "1" * 32])
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:-8])
    with pytest.raises(ModeclipError, match="cannot be read"):
        read_uids(tmp_path / "cut.npy")


@pytest.mark.parametrize("wrong", ["", "0" * 31, "0" * 33, "g" * 32, "é" * 16, "0" * 31 + "é"])
def test_a_text_that_is_no_uid_is_named(wrong):
    with pytest.raises(ModeclipError, match=rf"^{wrong!r} is no uid: expected 32 hexadecimal digits"):
        parse_uids(["0" * 32, wrong])


# ---------------------------------------------------------------- rows


@given(st.sets(st.integers(0, NUM_ROWS - 1)), st.lists(hexadecimal, max_size=5))
def test_rows_are_those_whose_text_is_in_the_list(catalog: Catalog, texts: list[str], chosen, foreign):
    wanted = {texts[row].lower() for row in chosen} | set(foreign)
    match = match_uids(catalog, slow_subset(sorted(wanted)))
    assert match.mask.tolist() == [text.lower() in wanted for text in texts]
    unknown = wanted - {text.lower() for text in texts}
    assert (match.num_uids, match.num_unknown) == (len(wanted), len(unknown))
    assert (match.first_unknown in unknown) if unknown else match.first_unknown == ""
    assert match.origin == "column 'uid'"


@given(st.sets(crowded, max_size=20))
def test_halves_that_repeat_do_not_mislead(catalog: Catalog, wanted):
    match = match_uids(catalog, slow_subset(sorted(wanted)), column="crowded")
    assert match.mask.tolist() == [text in wanted for text in CROWDED]
    assert match.num_unknown == len(wanted - set(CROWDED))


def test_a_list_lies_in_the_home_folder(catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_uids("~/s.npy", uids_of(catalog, np.array([4, 9])))
    assert np.flatnonzero(uid_mask(catalog, "~/s.npy")).tolist() == [4, 9]


def test_a_list_goes_out_and_comes_in_again(catalog: Catalog, texts: list[str], tmp_path: Path):
    rows = np.array([9, 4, 30, 5, 3])
    assert format_uids(uids_of(catalog, rows)) == [texts[row].lower() for row in rows]
    write_uids(tmp_path / "s.npy", uids_of(catalog, rows))
    assert np.flatnonzero(uid_mask(catalog, tmp_path / "s.npy")).tolist() == sorted(rows)
    assert format_uids(uids_of(catalog)) == [text.lower() for text in texts]
    assert catalog.select(mask=uid_mask(catalog, str(tmp_path / "s.npy"))).tolist() == sorted(rows)
    assert not uid_mask(catalog, np.empty(0, "u8,u8")).any()


def test_without_a_column_the_key_s_md5_is_the_uid(bare: Catalog, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    keys = bare.read(["key"])["key"].tolist()
    assert format_uids(uids_of(bare)) == [hashlib.md5(key.encode()).hexdigest() for key in keys]
    write_uids(tmp_path / "s.npy", [*format_uids(uids_of(bare, np.array([7, 3]))), "0" * 32])
    assert np.flatnonzero(uid_mask(bare, tmp_path / "s.npy")).tolist() == [3, 7]
    said = capsys.readouterr().err
    assert "id list: 2 of 60 pairs, 3 ids (no column 'uid': made from the keys by MD5)" in said
    assert f"id list: 1 ids belong to no pair of the catalog, such as {'0' * 32}" in said


def test_rows_without_a_uid_match_nothing(folder: Path, tmp_path: Path):
    uids = [None if row % 3 == 0 else f"{row:032x}" for row in range(9)]
    shards = tmp_path / "shards"
    shards.mkdir()
    with tarfile.open(shards / "00000.tar", "w") as tar:
        for row in range(9):
            for suffix in ("png", "txt"):
                tar.add(folder / f"käfer {row}.{suffix}", f"{row:09d}.{suffix}")
    pq.write_table(
        pa.table({"key": [f"{row:09d}" for row in range(9)], "status": ["success"] * 9, "uid": uids}),
        shards / "00000.parquet",
    )
    (shards / "00000_stats.json").write_text("{}")
    index(DataConfig(source=str(shards)), tmp_path / "out")
    catalog = Catalog.open(tmp_path / "out" / "catalog.lance")
    assert catalog.read(["uid"])["uid"].tolist() == uids
    match = match_uids(catalog, parse_uids(["0" * 32, f"{1:032x}", f"{8:032x}"]))
    assert np.flatnonzero(match.mask).tolist() == [1, 8]
    assert match.first_unknown == "0" * 32
    with pytest.raises(ModeclipError, match="None is no uid"):
        uids_of(catalog)


def test_what_cannot_match_is_said(catalog: Catalog):
    with pytest.raises(ModeclipError, match=r"none of 2 ids .*'uid'.*correct the list or the column"):
        uid_mask(catalog, parse_uids(["1" * 32, "2" * 32]))
    with pytest.raises(ModeclipError, match=r"unknown column of .* 'id'; known: key"):
        uid_mask(catalog, parse_uids(["1" * 32]), column="id")
    with pytest.raises(ModeclipError, match=r"'no uid' is no uid.*32 hexadecimal"):
        uid_mask(catalog, parse_uids(["1" * 32]), column="odd")
