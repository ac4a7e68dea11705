"""A selection is what a plain loop over the rows keeps, whatever the words, and a mistake is told in one line."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from modeclip.data.catalog import FINGERPRINT, FORMAT, FORMAT_VERSION, PAIR_COLUMNS, Catalog
from modeclip.data.selection import Selection
from modeclip.data.storage import FileWriter, append, create
from modeclip.data.subsets import uids_of, write_uids
from modeclip.errors import ModeclipError

NUM_ROWS = 40
TEXTS = ["north", "it's far", "south and west", 'a "b" c', "x=y", None]
OWN = {"site": pa.string(), "p": pa.float32(), "My-Col": pa.int64(), "sure": pa.bool_(), "mask": pa.int32()}


def values() -> dict[str, list[Any]]:
    return {
        "key": [f"key {n}" for n in range(NUM_ROWS)],
        "caption": [f"caption {n // 2}" for n in range(NUM_ROWS)],
        "width": [n % 7 for n in range(NUM_ROWS)],
        "site": [TEXTS[n % len(TEXTS)] for n in range(NUM_ROWS)],
        "p": [n / NUM_ROWS for n in range(NUM_ROWS)],
        "My-Col": [n % 3 for n in range(NUM_ROWS)],
        "sure": [None if n % 5 == 0 else n % 2 == 0 for n in range(NUM_ROWS)],
        "mask": [n % 2 for n in range(NUM_ROWS)],
    }


def write(path: Path, rows: slice = slice(None)) -> FileWriter:
    schema = pa.schema([(name, (PAIR_COLUMNS | OWN)[name]) for name in values()])
    writer = FileWriter(str(path), schema, max_rows=7)
    writer.write(pa.table({name: column[rows] for name, column in values().items()}, schema=schema))
    return writer


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    path = tmp_path_factory.mktemp("selection") / "catalog.lance"
    writer = write(path)
    create(
        str(path),
        writer.schema.with_metadata({FORMAT: FORMAT_VERSION, FINGERPRINT: "f" * 32}),
        writer.finish(),
    )
    catalog = Catalog.open(path)
    catalog.add_columns({"good_kept": np.arange(NUM_ROWS) % 4 > 0}, facts={"method": "good"})
    catalog.add_columns({"good_score": np.linspace(-1, 1, NUM_ROWS, dtype=np.float32)}, facts={"method": "good"})
    return catalog


def kept(catalog: Catalog, *where: str, mask: str | None = None) -> list[int]:
    selection = Selection(where=where, mask=mask)
    rows, marks = selection.rows(catalog), selection.mask_of(catalog)
    assert rows.dtype == np.int64
    assert np.array_equal(np.flatnonzero(marks), rows)
    assert marks.dtype == np.bool_
    return rows.tolist()


@pytest.mark.parametrize(
    ("word", "holds"),
    [
        ("width=3", lambda row: row["width"] == 3),
        (" width = 3 ", lambda row: row["width"] == 3),
        ("width=3 OR width=4", lambda row: row["width"] in {3, 4}),
        ("width != 3", lambda row: row["width"] != 3),
        ("width == 3", lambda row: row["width"] == 3),
        ("width>=3 AND site = 'north'", lambda row: row["width"] >= 3 and row["site"] == "north"),
        ("site=north", lambda row: row["site"] == "north"),
        ("site='north'", lambda row: row["site"] == "north"),
        ('site="north"', lambda row: row["site"] == "north"),
        ("site = 'north' OR site = 'x=y'", lambda row: row["site"] in {"north", "x=y"}),
        ("site=it's far", lambda row: row["site"] == "it's far"),
        ("site = 'it''s far'", lambda row: row["site"] == "it's far"),
        ("site=south and west", lambda row: row["site"] == "south and west"),
        ("site=x=y", lambda row: row["site"] == "x=y"),
        ("site IS NULL", lambda row: row["site"] is None),
        ("site LIKE '%;%' OR width < 2 -- ; or so", lambda row: row["width"] < 2),
        ("p > 0.3 AND p <= 0.6", lambda row: np.float32(0.3) < row["p"] <= 0.6),
        ("p=0.5", lambda row: row["p"] == 0.5),
        ("My-Col=2", lambda row: row["My-Col"] == 2),
        ("`My-Col` >= 1", lambda row: row["My-Col"] >= 1),
        ("sure", lambda row: row["sure"] is True),
        ("sure=true", lambda row: row["sure"] is True),
        ("not sure", lambda row: row["sure"] is False),
        ("sure AND good_kept", lambda row: row["sure"] is True and row["n"] % 4 > 0),
        ("mask=1", lambda row: row["mask"] == 1),
        ("good_score > 0", lambda row: row["n"] >= NUM_ROWS / 2),
    ],
)
def test_a_condition_keeps_what_a_loop_keeps(
    catalog: Catalog, word: str, holds: Callable[[dict[str, Any]], bool]
) -> None:
    rows = [
        dict(zip(values(), row, strict=True)) | {"n": n} for n, row in enumerate(zip(*values().values(), strict=True))
    ]
    assert kept(catalog, word) == [row["n"] for row in rows if holds(row)] != []


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_a_score_that_a_pair_lacks_fits_no_condition(tmp_path: Path, kind: type) -> None:
    writer = write(tmp_path / "catalog.lance")
    schema = writer.schema.with_metadata({FORMAT: FORMAT_VERSION, FINGERPRINT: "f" * 32})
    create(str(tmp_path / "catalog.lance"), schema, writer.finish())
    catalog = Catalog.open(tmp_path / "catalog.lance")
    scores = np.where(np.arange(NUM_ROWS) < 5, np.nan, np.linspace(0, 1, NUM_ROWS)).astype(kind)
    catalog.add_columns({"score": scores}, facts={"method": "good"})
    for word in ("score >= 0.5", "NOT score < 0.5", "score > 0.5 OR score = 0.5"):
        assert kept(catalog, word) == np.flatnonzero(scores >= 0.5).tolist()
    assert kept(catalog, "isnan(score)") == [0, 1, 2, 3, 4]


def test_all_conditions_and_the_mask_hold(catalog: Catalog) -> None:
    expected = [n for n in range(NUM_ROWS) if n % 7 > 2 and n % 3 == 1 and n % 4 > 0]
    assert kept(catalog, "width > 2", "My-Col=1", mask="good_kept") == expected
    assert Selection(where=("width > 2",), mask="good_kept").narrowed("My-Col=1").rows(catalog).tolist() == expected


def test_nothing_said_is_all(catalog: Catalog) -> None:
    assert Selection().is_all
    assert kept(catalog) == list(range(NUM_ROWS))
    assert Selection().facts(catalog) == {}


def test_a_list_of_ids_is_a_mask(catalog: Catalog, tmp_path: Path) -> None:
    rows, path = np.array([1, 5, 33]), tmp_path / "some.npy"
    write_uids(path, uids_of(catalog, rows))
    assert kept(catalog, mask=str(path)) == rows.tolist()
    assert (
        Selection(mask=os.path.relpath(path)).absolute()
        == Selection(mask=str(path))
        == Selection(mask=str(path)).absolute()
    )
    before = Selection(mask=str(path)).facts(catalog)
    write_uids(path, uids_of(catalog, rows[1:]))
    assert Selection(mask=str(path)).facts(catalog) != before
    assert kept(catalog, mask=str(path)) == [5, 33]


def test_a_part_is_read_as_if_there_were_no_other_pairs(catalog: Catalog) -> None:
    selection = Selection(where=("width > 2",))
    rows = [n for n in range(NUM_ROWS) if n % 7 > 2]
    part = selection.part_of(catalog)
    assert len(part) == len(rows)
    keys = [f"key {n}" for n in rows]
    assert part.read(["key"])["key"].tolist() == keys
    assert part.read(["key"], np.array([3, 0]))["key"].tolist() == [keys[3], keys[0]]
    assert [key for block in part.batches(["key"], 5) for key in block["key"]] == keys
    assert part.captions() == [f"caption {n // 2}" for n in rows]
    for chosen in (part.select(width=4), part.select_where("width = 4"), Selection(where=("width=4",)).rows(part)):
        assert [rows[at] for at in chosen] == [n for n in rows if n % 7 == 4]
    assert part.fingerprint != catalog.fingerprint
    assert Selection().part_of(catalog) is catalog
    with pytest.raises(NotImplementedError):
        part.add_columns({"x": np.arange(len(part))})
    assert "x" not in Catalog.open(catalog.path).columns


def test_facts_tell_the_conditions_and_what_made_their_columns(catalog: Catalog) -> None:
    assert Selection(where=("GOOD_SCORE > 0 AND width > 2", "My-Col=1"), mask="good_kept").facts(catalog) == {
        "where": ["GOOD_SCORE > 0 AND width > 2", "My-Col=1"],
        "mask": "good_kept",
        "columns": {"My-Col": None, "good_kept": {"method": "good"}, "good_score": {"method": "good"}, "width": None},
    }


@pytest.mark.parametrize(
    ("where", "mask", "message"),
    [
        ("widht=3", None, r"--where 'widht=3': unknown column .*'widht'; known: .*width"),
        ("widht > 3", None, r"unknown column .*'widht'; known: .*width"),
        ("width", None, r"--where 'width': column 'width' holds int32.*COLUMN=VALUE.*SQL"),
        ("width=wide", None, r"column 'width' holds int32, which 'wide' is not"),
        ("width >", None, r"sql parser error.*expected COLUMN=VALUE or a condition in SQL"),
        ("", None, r"expected COLUMN=VALUE"),
        ("width + 1", None, r"boolean.*expected COLUMN=VALUE"),
        ("width > 3; drop table x", None, r"no single condition"),
        ("width > 3) OR (1 = 1", None, r"no single condition"),
        ("width > 3 4", None, r"sql parser error"),
        ("random() > 0.5", None, r"random is another value each time"),
        ("_rowid > 3", None, r"unknown column .*'_rowid'"),
        ("width > 99", None, r"no pair that --where 'width > 99' selects"),
        ("site = north", "good_score", r"--mask good_score: column 'good_score' holds float, expected booleans"),
        ("width > 3", "good", r"--mask good: unknown column .*'good'; known: .*good_kept"),
        ("width > 3", "none.npy", r"no id list at 'none.npy'"),
    ],
)
def test_mistakes_are_one_line(catalog: Catalog, where: str, mask: str | None, message: str) -> None:
    with pytest.raises(ModeclipError, match=message) as caught:
        Selection(where=(where,), mask=mask).rows(catalog)
    assert "\n" not in str(caught.value)


def test_pairs_that_a_stage_has_not_seen_are_no_part_of_a_choice_by_it(tmp_path: Path) -> None:
    path = tmp_path / "catalog.lance"
    writer = write(path, slice(0, 14))
    create(str(path), writer.schema.with_metadata({FORMAT: FORMAT_VERSION, FINGERPRINT: "f"}), writer.finish())
    Catalog.open(path).add_columns({"k": np.arange(14) < 4}, facts={"method": "k"})
    append(str(path), write(path, slice(14, 20)).finish(), {FORMAT: FORMAT_VERSION, FINGERPRINT: "g"})
    catalog = Catalog.open(path)
    assert kept(catalog, "key = 'key 15'") == [15]
    for selection in (Selection(mask="k"), Selection(where=("k",)), Selection(where=("NOT k",))):
        with pytest.raises(ModeclipError, match=r"column k .*added later.*again"):
            selection.rows(catalog)
