"""Tables, Parquet files and Hugging Face datasets become samples with further columns, whoever wrote them."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from modeclip.data.images import decode_image
from modeclip.data.samples import (
    BAD_ROW,
    DAMAGED_TABLE,
    EMPTY_CAPTION,
    MISSING_TABLE,
    NO_CAPTION,
    NO_IMAGE,
    NOT_DOWNLOADED,
    NOT_UTF8,
    Sample,
    Skipped,
)
from modeclip.data.sources import DataConfig, open_source, tables
from modeclip.errors import ModeclipError
from support import plain_png


def read(source: Path | str, **options: object) -> list[Sample | Skipped]:
    parts = open_source(DataConfig.from_flat({"source": str(source), **options})).parts
    return [item for part in parts for item in part.read()]


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def picture(shade: int) -> bytes:
    return plain_png((shade, 0, 0), (4, 3))


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
        ("url,title\n", r"no image column 'filepath'.*url, title.*set data\.image_column"),
        ("filepath,about\n", r"no caption column 'title'.*filepath, about.*set data\.caption_column"),
        ("", "empty: expected a header"),
        (
            "filepath,title\nhttps://x/1.jpg,a",
            r"'filepath' holds addresses.*https://x/1\.jpg.*download.*img2dataset",
        ),
        ("URL,TEXT\nu,t", "column 'URL', download .* img2dataset"),
    ],
)
def test_a_table_that_cannot_be_used_says_why(tmp_path: Path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ModeclipError, match=f"t.csv'.*{message}"):
        read(tmp_path / "t.csv")


def test_rows_that_lack_something_are_skipped_by_cause(tmp_path: Path):
    (tmp_path / "t.csv").write_bytes(b"filepath,title\n1.png,\n,a cat\n\n2.png,[]\n4.png,caf\xe9\n3.png,a dog\n")
    *skipped, sample = read(tmp_path / "t.csv")
    assert [(s.key, s.cause) for s in skipped] == [
        ("1.png", NO_CAPTION),
        ("t.csv line 3", NO_IMAGE),
        ("2.png", EMPTY_CAPTION),
        ("4.png", NOT_UTF8),
    ]
    assert sample.caption == "a dog"


cell = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).map(str.strip).filter(bool)
pairs_of_cells = st.lists(
    st.tuples(cell, cell.filter(lambda text: text[0] != "[")), min_size=1, unique_by=lambda p: p[0]
)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs_of_cells)
def test_what_the_csv_module_writes_is_read_back(tmp_path: Path, pairs):
    with (tmp_path / "t.tsv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t").writerows([("filepath", "title"), *pairs])
    samples = read(tmp_path / "t.tsv")
    assert [(s.key, s.caption) for s in samples] == pairs
    assert [s.path for s in samples] == [os.path.join(tmp_path, image) for image, _ in pairs]  # noqa: PTH118


def test_further_columns_of_a_table_are_kept_as_texts(tmp_path: Path):
    (tmp_path / "t.csv").write_bytes(b"id,filepath,title,size,note\n7,1.png,a cat,2,caf\xe9\n8,2.png,a dog,,\n")
    source = open_source(DataConfig(source=str(tmp_path / "t.csv")))
    assert source.kind == "table"
    assert source.what == "1 table (columns 'filepath' and 'title') with 3 further columns"
    assert source.extra == pa.schema([(name, pa.string()) for name in ("id", "source_size", "note")])
    first, second = source.parts[0].read()
    assert first.extra == {"id": "7", "source_size": "2", "note": "caf\ufffd"}
    assert second.extra == {"id": "8", "source_size": None, "note": None}


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_column_group_of_a_table_is_the_group_of_its_pairs(tmp_path: Path, kind, capsys):
    columns = {"filepath": ["1.png", "2.png"], "title": ["a", "b"], "group": ["north", ""], "width": ["5", "6"]}
    if kind == "csv":
        with (tmp_path / "t.csv").open("w", newline="") as file:
            csv.writer(file).writerows([list(columns), *zip(*columns.values(), strict=True)])
    else:
        pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    first, second = read(tmp_path / f"t.{kind}")
    assert (first.group, second.group) == ("north", "" if kind == "csv" else "t")
    assert first.extra == {"source_width": "5"}
    assert "columns width of the table are named source_width in the catalog" in capsys.readouterr().err


def test_several_tables_are_one_source(tmp_path: Path):
    write(tmp_path, {"a/0.csv": b"image,text,x\n1.png,one,5\n", "a/1.csv": b"text,image\ntwo,2.png\n"})
    write(tmp_path, {"b/0.csv": b"image,text\n1.png,three\n"})
    joined = f"{tmp_path}/a/{{0..2}}.csv::{tmp_path}/b/0.csv"
    first, second, missing, third = read(joined)
    assert [(s.key, s.caption, s.extra) for s in (first, second, third)] == [
        ("a/1.png", "one", {"x": "5"}),
        ("a/2.png", "two", {"x": None}),
        ("b/1.png", "three", {"x": None}),
    ]
    assert [s.path for s in (first, third)] == [f"{tmp_path}/a/1.png", f"{tmp_path}/b/1.png"]
    assert (missing.key, missing.cause) == (f"{tmp_path}/a/2.csv", MISSING_TABLE)
    assert [s.key for s in read(tmp_path / "a")] == ["1.png", "2.png"]
    with pytest.raises(ModeclipError, match=r"none of 2 table files.*x0\.csv.*correct the names"):
        read(f"{tmp_path}/x{{0,1}}.csv")


def test_a_table_that_is_another_gives_its_cause(tmp_path: Path):
    (tmp_path / "0.csv").write_text("filepath,title\na,b\n")
    (tmp_path / "1.csv").write_text("other,title\na,b\n")
    sample, strange = read(tmp_path)
    assert sample.caption == "b"
    assert (strange.key, strange.cause) == (f"{tmp_path}/1.csv", DAMAGED_TABLE)


def outcome(items: list) -> list[tuple[str, str]]:
    """What became of each row: its caption, or the line and the cause."""
    return [(item.key, item.caption if isinstance(item, Sample) else item.cause) for item in items]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # A quote that is not closed takes its own line along and no other.
        ('f,"a\ng,b\nh,c"\ni,d\n', [("t.csv line 2", BAD_ROW), ("g", "b"), ("h", 'c"'), ("i", "d")]),
        ('f,"a\ng,b\nh,c\n', [("t.csv line 2", BAD_ROW), ("g", "b"), ("h", "c")]),
        ('f,"a" b\ng,5" nails\n', [("t.csv line 2", BAD_ROW), ("g", '5" nails')]),
        # Cells of several lines, with separators and quotes in them.
        ('f,"a\nb, ""c"""\ng,d\n', [("f", 'a\nb, "c"'), ("g", "d")]),
        ('f,"a, b, c.\nd, e, f.\n\ng"\ng,d\n', [("f", "a, b, c.\nd, e, f.\n\ng"), ("g", "d")]),
        # Rows with other cells than the header.
        ("f,a, b\ng\nh,c,\n", [("t.csv line 2", BAD_ROW), ("t.csv line 3", BAD_ROW), ("h", "c")]),
        ("f,a\nfilepath,title\n\n   \ng,b", [("f", "a"), ("t.csv line 3", BAD_ROW), ("g", "b")]),
        ("f,a\0b\ng,b\n", [("t.csv line 2", BAD_ROW), ("g", "b")]),
        ("f,a\u2028b\x85c\x0bd\x0c\ng,b\n", [("f", "a\u2028b\x85c\x0bd"), ("g", "b")]),
        ("f,a\rg,b\r", [("f", "a"), ("g", "b")]),
        ("f,a\r\ng,b\r\n", [("f", "a"), ("g", "b")]),
    ],
)
def test_each_row_of_a_table_is_a_pair_or_counted_by_its_line(tmp_path: Path, text, expected):
    names = {"f": "1.png", "g": "2.png", "h": "3.png", "i": "4.png"}
    for short, name in names.items():
        text = re.sub(rf"(^|\n|\r){short},", rf"\g<1>{name},", text)
    (tmp_path / "t.csv").write_bytes(b"filepath,title\n" + text.encode())
    found = outcome(read(tmp_path / "t.csv"))
    assert found == [(names.get(key, key), caption) for key, caption in expected]


def test_a_quote_takes_no_rows_along_even_if_another_ends_it(tmp_path: Path):
    rows = [f"p{n}.png\ta caption {n}" for n in range(10)]
    rows[1], rows[8] = 'p1.png\t"the best day', 'p8.png\tnight sky"'
    (tmp_path / "t.tsv").write_text("\n".join(["filepath\ttitle", *rows, ""]))
    bad, *others = sorted(read(tmp_path / "t.tsv"), key=lambda item: isinstance(item, Sample))
    assert (bad.key, bad.cause) == ("t.tsv line 3", BAD_ROW)
    assert "line 3: a quote is not closed" in bad.detail
    assert [s.key for s in others] == [f"p{n}.png" for n in range(10) if n != 1]


@pytest.mark.parametrize("length", [140_000, 3_000_000])
def test_long_captions_are_captions(tmp_path: Path, length):
    (tmp_path / "t.csv").write_text("filepath,title\na," + "x" * length + "\nb,y\n")
    assert [(s.key, len(s.caption)) for s in read(tmp_path / "t.csv")] == [("a", length), ("b", 1)]


def test_a_line_without_end_is_counted(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(tables, "MAX_LINE", 1000)
    text = "filepath,title\na,1\nb," + "x" * 2500 + "\nc,3\nd," + "y" * 1000
    (tmp_path / "t.csv").write_text(text)
    assert outcome(read(tmp_path / "t.csv")) == [
        ("a", "1"),
        ("t.csv line 3", BAD_ROW),
        ("c", "3"),
        ("t.csv line 5", BAD_ROW),
    ]


@pytest.mark.parametrize(
    "content",
    [
        b"sep=;\nfilepath;title\n1.png;a, b\n",
        b'"sep=|"\r\nfilepath|title\r\n1.png|a, b\r\n',
        "\ufefffilepath\ttitle\n1.png\ta, b\n".encode(),
        "filepath;title\n1.png;a, b\n".encode("utf-16"),
        b"\xfe\xff" + "filepath;title\n1.png;a, b\n".encode("utf-16-be"),
        "filepath;title\n1.png;a, b\n".encode("utf-32"),
        gzip.compress(
            b"filepath;title\n1.png;a, b\n", mtime=0
        ),  # else the second is in the name of the test, which two workers must agree on
        # Every character that the header has is in it once; the rows tell.
        b"filepath|x;y|title\n1.png|3|a, b\n2.png|4|c\n",
    ],
)
def test_tables_say_how_they_are_written(tmp_path: Path, content):
    (tmp_path / "t.csv").write_bytes(content)
    first, *_ = read(tmp_path / "t.csv")
    assert (first.key, first.caption) == ("1.png", "a, b")


def test_a_compressed_table_that_was_cut_gives_what_comes_before(tmp_path: Path):
    rows = "".join(f"{n}.png,{os.urandom(20).hex()}\n" for n in range(3000))
    whole = gzip.compress(f"filepath,title\n{rows}".encode())
    (tmp_path / "t.csv.gz").write_bytes(whole[: len(whole) // 2])
    *samples, problem = read(tmp_path / "t.csv.gz")
    assert 500 < len(samples) < 2500
    assert (problem.key, problem.cause) == (f"{tmp_path}/t.csv.gz", DAMAGED_TABLE)


lines_of_any_kind = st.text(st.sampled_from('ab,;"\n\r\t .'), max_size=60)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(lines_of_any_kind, max_size=5), st.integers(0, 5))
def test_rows_that_are_whole_are_never_lost_beside_damaged_ones(tmp_path: Path, noise, at):
    """A line with a mark of its own, after a line end, is a pair or is named as a bad line: it does not vanish."""
    noise.insert(at % (len(noise) + 1), "mark.png,the mark")
    text = "\n".join(["filepath,title", *noise]) + "\n"
    (tmp_path / "t.csv").write_bytes(text.encode())
    number = re.split(r"\r\n|\r|\n", text).index("mark.png,the mark") + 1
    found = read(tmp_path / "t.csv")
    inside = [s for s in found if isinstance(s, Sample) and "mark.png,the mark" in s.caption]
    marked = ("mark.png", "the mark") in outcome(found) or (f"t.csv line {number}", BAD_ROW) in outcome(found)
    legal = inside and '"' in text  # a caption that is quoted from end to end may hold any line
    assert marked or legal


def test_several_captions_of_an_image_lie_in_a_list_or_in_rows_that_follow_each_other(tmp_path: Path):
    rows = [["filepath", "title"], ["1.png", '["one", "two"]'], ["1.png", "three"], ["2.png", "[not json]"]]
    with (tmp_path / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    captions = {s.key: s.caption for s in read(tmp_path / "t.csv")}
    assert captions == {"1.png": "one", "1.png#1": "two", "1.png#2": "three", "2.png": "[not json]"}


# ---------------------------------------------------------------- Parquet


@pytest.mark.parametrize("kind", ["bytes", "struct", "path"])
def test_images_of_parquet_files_are_bytes_structs_or_paths(tmp_path: Path, kind):
    data = [picture(10), picture(20)]
    images = {
        "bytes": pa.array(data),
        "struct": pa.array([{"bytes": data[0], "path": "x.png"}, {"bytes": None, "path": "files/2.png"}]),
        "path": pa.array(["files/1.png", f"{tmp_path}/files/2.png"]),
    }[kind]
    write(tmp_path, {"files/1.png": data[0], "files/2.png": data[1]})
    extra = {"n": [1, None], "day": [date(2026, 1, 2), None], "box": [[1], [2]], "text": ["kept", "too"]}
    pq.write_table(pa.table({"image": images, "caption": ["one", "two"]} | extra), tmp_path / "t.parquet")
    source = open_source(DataConfig(source=str(tmp_path / "t.parquet")))
    assert source.kind == "parquet"
    assert source.what == "1 Parquet file (columns 'image' and 'caption') with 3 further columns"
    assert source.extra == pa.schema([("n", pa.int64()), ("day", pa.string()), ("text", pa.string())])
    samples = list(source.parts[0].read())
    assert [s.read() for s in samples] == data
    assert [s.caption for s in samples] == ["one", "two"]
    assert samples[0].extra == {"n": 1, "day": "2026-01-02", "text": "kept"}
    keys = {"bytes": ["t/0", "t/1"], "struct": ["t/0", "files/2.png"], "path": ["files/1.png", samples[1].path]}
    assert [s.key for s in samples] == keys[kind]


def test_parquet_files_stream_in_order_and_may_differ(tmp_path: Path):
    for number in range(3):
        rows = range(number * 1000, number * 1000 + 1000)
        columns = {"jpg": [b"%d" % row for row in rows], "TEXT": [f"row {row}" for row in rows]}
        if number != 1:
            columns["score"] = [row / 2 for row in rows] if number == 0 else [f"{row}?" for row in rows]
        pq.write_table(pa.table(columns), tmp_path / f"{number}.parquet", row_group_size=300)
    samples = read(tmp_path)
    assert [s.caption for s in samples] == [f"row {row}" for row in range(3000)]
    assert [s.read() for s in samples] == [b"%d" % row for row in range(3000)]
    assert [s.key for s in samples[999:1001]] == ["0/999", "1/0"]
    assert [samples[row].extra["score"] for row in (7, 1007, 2007)] == [3.5, None, None]


def test_rows_of_parquet_files_that_lack_something_are_skipped_by_cause(tmp_path: Path):
    table = pa.table(
        {
            "key": ["0", "1", "2", "3", "4", "5"],
            "jpg": [b"a", None, None, b"d", b"e", b"f"],
            "caption": pa.array([["one", "two"], ["x"], ["y"], None, [" "], ["six"]]),
            "status": ["success", "failed_to_download", "success", "success", "success", "success"],
        }
    )
    pq.write_table(table, tmp_path / "t.parquet")
    found = [(item.key, getattr(item, "cause", "")) for item in read(tmp_path / "t.parquet")]
    assert found == [
        ("t/0", ""),
        ("t/0#1", ""),
        ("t/1", NOT_DOWNLOADED),
        ("t/2", NO_IMAGE),
        ("t/3", NO_CAPTION),
        ("t/4", EMPTY_CAPTION),
        ("t/5", ""),
    ]


def test_text_in_parquet_that_is_not_utf8_is_skipped(tmp_path: Path):
    texts = pa.array([b"one", b"caf\xe9", b"three"]).view(pa.string())
    pq.write_table(pa.table({"image": [b"a", b"b", b"c"], "text": texts, "note": texts}), tmp_path / "t.parquet")
    one, broken, three = read(tmp_path / "t.parquet")
    assert (one.caption, broken.cause, three.extra) == ("one", NOT_UTF8, {"note": "three"})


@pytest.mark.parametrize("damage", ["middle", "cut", "nothing"])
def test_a_damaged_parquet_file_is_skipped_after_what_can_be_read(tmp_path: Path, damage):
    for number in range(2):
        rows = range(2000)
        image = [os.urandom(200) for _ in rows]
        table = pa.table({"image": image, "text": [f"{number} {row}" for row in rows]})
        pq.write_table(table, tmp_path / f"{number}.parquet", row_group_size=500, use_dictionary=False)
    content = bytearray((tmp_path / "1.parquet").read_bytes())
    if damage == "middle":
        where = pq.ParquetFile(tmp_path / "1.parquet").metadata.row_group(2).column(0).data_page_offset
        content[where : where + 40] = b"\xff" * 40
    (tmp_path / "1.parquet").write_bytes({"middle": content, "cut": content[:5000], "nothing": b""}[damage])
    *samples, problem = read(tmp_path)
    assert (problem.key, problem.cause) == (f"{tmp_path}/1.parquet", DAMAGED_TABLE)
    assert len(problem.detail) > 10
    assert len(samples) <= 3000
    assert (len(samples) > 2000) == (damage == "middle")
    assert [s.caption for s in samples] == [f"{row // 2000} {row % 2000}" for row in range(len(samples))]


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"url": ["http://x"], "caption": ["c"]}, {}, "column 'url', download"),
        (
            {"image": ["https://x/1.jpg"], "text": ["c"]},
            {},
            "'image' holds addresses .*: download",
        ),
        ({"image": [b"i"]}, {}, r"no caption column 'title'.*set data\.caption_column"),
        (
            {"image": [b"i"], "text": ["c"]},
            {"image_column": "pic"},
            r"no image column 'pic'.*image, text.*set data\.image_column",
        ),
        ({"image": [1.5], "text": ["c"]}, {}, "'image' holds double.*bytes, paths"),
        ({"image": [b"i"], "text": [7]}, {}, "'text' holds int64, expected text"),
    ],
)
def test_parquet_files_without_the_columns_say_what_to_do(tmp_path: Path, columns, options, message):
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    with pytest.raises(ModeclipError, match=f"t.parquet'.*{message}"):
        read(tmp_path / "t.parquet", **options)


def test_parquet_files_of_which_none_can_be_read_are_an_error(tmp_path: Path):
    write(tmp_path, {"0.parquet": b"no", "1.parquet": b"neither"})
    with pytest.raises(ModeclipError, match=r"0\.parquet' cannot be read.*of 2 files"):
        read(tmp_path)


DATA = [b"one", b"two", None, b"four"]
TEXTS = ["first", "second", "third", None]


def encoded(kind: str, values: list) -> pa.Array:
    """The values as a column whose type is encoded in some way."""
    text = pa.array(values, pa.string() if isinstance(values[0], str) else pa.binary())
    if kind == "dictionary":
        return text.dictionary_encode()
    if kind == "runs":
        import pyarrow.compute as pc

        return pc.run_end_encode(text)
    return text.cast(getattr(pa, f"{kind}_{'string' if isinstance(values[0], str) else 'binary'}")())


def save(table: pa.Table, path: Path) -> None:
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".feather":
        feather.write_feather(table, path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)


@pytest.mark.parametrize("suffix", ["parquet", "feather", "arrow"])
@pytest.mark.parametrize("kind", ["dictionary", "large", "view", "runs"])
def test_columns_are_read_however_arrow_encodes_them(tmp_path: Path, kind, suffix):
    def column(values: list) -> pa.Array:
        name = f"{'string' if isinstance(values[0], str) else 'binary'}_view"
        return pa.array(values, getattr(pa, name)()) if kind == "view" else encoded(kind, values)

    if kind == "runs" and suffix != "arrow":
        pytest.skip("no such files")
    numbers = pa.array([7, 8, 9, None]).dictionary_encode()
    table = pa.table({"image": column(DATA), "text": column(TEXTS), "site": column(TEXTS), "n": numbers})
    save(table, path := tmp_path / f"t.{suffix}")
    one, two, empty, silent = read(path)
    assert [(s.read(), s.caption, s.extra) for s in (one, two)] == [
        (b"one", "first", {"site": "first", "n": 7}),
        (b"two", "second", {"site": "second", "n": 8}),
    ]
    assert (empty.cause, silent.cause) == (NO_IMAGE, NO_CAPTION)


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.string(), 2),
        pa.list_(pa.string_view(), 2),
        pa.large_list(pa.large_string()),
        pa.list_view(pa.string()),
        pa.large_list_view(pa.string()),
        pa.list_(pa.dictionary(pa.int8(), pa.string())),
    ],
)
def test_lists_of_captions_are_read_however_arrow_encodes_them(tmp_path: Path, kind):
    captions = pa.array([["a", "b"], None, ["c", None]], kind)
    images = pa.array([{"bytes": b"1", "path": None}, {"bytes": b"2", "path": None}, {"bytes": None, "path": "3.png"}])
    save(pa.table({"image": images, "captions": captions}), path := tmp_path / "t.arrow")
    found = read(path)
    assert [(s.key, getattr(s, "caption", None)) for s in found] == [
        ("t/0", "a"),
        ("t/0#1", "b"),
        ("t/1", None),
        ("3.png", "c"),
    ]


# ---------------------------------------------------------------- Hugging Face


@pytest.fixture
def faces():
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    pictures = [Image.fromarray(np.full((4, 4, 3), shade, np.uint8)) for shade in range(40)]
    features = datasets.Features(
        image=datasets.Image(), text=datasets.Value("string"), label=datasets.ClassLabel(names=["cat", "big_dog"])
    )
    rows = {"image": pictures, "text": [f"picture {n}" for n in range(40)], "label": [n % 2 for n in range(40)]}
    return datasets, datasets.Dataset.from_dict(rows, features=features)


def shades(samples: list[Sample]) -> list[int]:
    return [decode_image(sample.read()).getpixel((0, 0))[0] for sample in samples]


def test_a_dataset_saved_to_disk_is_read_without_its_library(tmp_path: Path, faces):
    _, dataset = faces
    dataset.save_to_disk(tmp_path / "d", num_shards=3)
    source = open_source(DataConfig(source=str(tmp_path / "d")))
    assert source.kind == "huggingface"
    assert source.what == "3 Hugging Face files (columns 'image' and 'text') with 1 further column"
    samples = [item for part in source.parts for item in part.read()]
    assert [s.caption for s in samples] == [f"picture {n}" for n in range(40)]
    assert shades(samples) == list(range(40))
    assert [s.extra for s in samples[:2]] == [{"label": 0}, {"label": 1}]
    selected = dataset.select([5, 3, 30])
    selected.save_to_disk(tmp_path / "few")
    assert shades(read(tmp_path / "few")) == [5, 3, 30]


def test_classes_of_a_dataset_become_captions_where_it_has_no_text(tmp_path: Path, faces):
    _, dataset = faces
    bare = dataset.remove_columns("text")
    bare.save_to_disk(tmp_path / "d")
    bare.to_parquet(tmp_path / "p" / "0.parquet")
    for place in ("d", "p"):
        samples = read(tmp_path / place, class_template="a {}")
        assert [s.caption for s in samples[:3]] == ["a cat", "a big dog", "a cat"]
        assert shades(samples) == list(range(40))


def test_of_several_splits_train_is_read(tmp_path: Path, faces):
    datasets, dataset = faces
    splits = datasets.DatasetDict(train=dataset.select(range(30)), test=dataset.select(range(30, 40)))
    splits.save_to_disk(tmp_path / "s")
    source = open_source(DataConfig(source=str(tmp_path / "s")))
    assert source.what.startswith("1 Hugging Face file, train of train, test (columns")
    assert shades([item for part in source.parts for item in part.read()]) == list(range(30))
    assert shades(read(tmp_path / "s" / "test")) == list(range(30, 40))
    (tmp_path / "s" / "test" / "state.json").write_text("{}")
    with pytest.raises(ModeclipError, match=r"no whole Hugging Face dataset.*KeyError.*save_to_disk"):
        read(tmp_path / "s" / "test")


def test_parquet_that_datasets_wrote_is_known_as_such(tmp_path: Path, faces):
    _, dataset = faces
    dataset.to_parquet(tmp_path / "p" / "train-0.parquet")
    source = open_source(DataConfig(source=str(tmp_path / "p")))
    assert source.kind == "huggingface"
    assert shades(list(source.parts[0].read())) == list(range(40))


def test_a_truncated_arrow_file_gives_what_comes_before(tmp_path: Path, faces):
    _, dataset = faces
    dataset.save_to_disk(tmp_path / "d", num_shards=2)
    last = sorted((tmp_path / "d").glob("*.arrow"))[-1]
    last.write_bytes(last.read_bytes()[:-900])
    *samples, problem = read(tmp_path / "d")
    assert (problem.key, problem.cause) == (str(last), DAMAGED_TABLE)
    assert shades(samples) == list(range(20))
    assert json.loads((tmp_path / "d" / "state.json").read_text())["_data_files"]


@pytest.mark.parametrize("suffix", ["parquet", "feather", "arrow"])
def test_of_columns_with_the_same_name_the_first_counts(tmp_path: Path, suffix):
    columns = [[picture(1), picture(2)], ["a cat", "a dog"], ["other", "other"], [1, 2], [3, 4]]
    _write_arrow(tmp_path / f"t.{suffix}", pa.table(columns, ["image", "caption", "caption", "site", "site"]))
    found = read(tmp_path / f"t.{suffix}")
    assert [(s.caption, s.image, dict(s.extra)) for s in found] == [
        ("a cat", picture(1), {"site": 1}),
        ("a dog", picture(2), {"site": 2}),
    ]


def test_a_first_file_that_is_cut_off_does_not_stop_the_others(tmp_path: Path):
    for name in ("a", "b"):
        _write_arrow(tmp_path / f"{name}.arrow", pa.table({"image": [picture(1)], "caption": [f"of {name}"]}))
    (tmp_path / "a.arrow").write_bytes((tmp_path / "a.arrow").read_bytes()[:-100])
    damaged, kept = read(tmp_path)
    assert (damaged.cause, damaged.key) == (DAMAGED_TABLE, str(tmp_path / "a.arrow"))
    assert kept.caption == "of b"


def test_advice_fits_a_row_that_is_too_short(tmp_path: Path):
    (tmp_path / "t.csv").write_text("filepath,title\n1.png\n2.png,a,b\n3.png,c\n")
    short, long, _ = read(tmp_path / "t.csv")
    assert short.detail.endswith("1 cell where the header has 2: fill in the missing ones")
    assert long.detail.endswith("3 cells where the header has 2: quote cells with ','")


def _write_arrow(path: Path, table: pa.Table) -> None:
    if path.suffix == ".parquet":
        pq.write_table(table, path)
        return
    new = pa.ipc.new_stream if path.suffix == ".arrow" else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
        writer.write_table(table)
