"""Sources in an object store are read like local ones; an S3 server on this machine stands for any other."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modeclip.data.images import cause_of
from modeclip.data.samples import DAMAGED_SHARD, MISSING, MISSING_SHARD, Sample, Skipped
from modeclip.data.sources import DataConfig, open_source, open_task, shards, source_state
from modeclip.errors import ModeclipError
from modeclip.system.paths import filesystem
from support import tar_of


def put(url: str, data: bytes) -> None:
    filesystem(url).pipe_file(url, data)


def parquet_of(columns: dict[str, object]) -> bytes:
    data = io.BytesIO()
    pq.write_table(pa.table(columns), data)
    return data.getvalue()


def read(source: str) -> list[Sample | Skipped]:
    return [item for part in open_source(DataConfig(source=source)).parts for item in part.read()]


@pytest.mark.slow
def test_shards_in_an_object_store_are_read_in_place(bucket: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shards, "URL_BYTES", 3000)  # so that members lie across the ends of what is read ahead
    for shard in range(2):
        members = {f"{n}.{s}": f"{shard} {n} {s} ".encode() * 99 for n in range(9) for s in ("jpg", "txt")}
        put(f"{bucket}/shards/{shard}.tar", tar_of(members))
    for source in (f"{bucket}/shards/", f"{bucket}/shards", f"{bucket}/shards/{{0..1}}.tar"):
        samples = read(source)
        assert [s.key for s in samples] == [f"{shard}/{n}" for shard in range(2) for n in range(9)]
        assert samples[12].read() == b"1 3 jpg " * 99
        assert samples[12].caption == ("1 3 txt " * 99).strip()
    assert samples[12].path == f"{bucket}/shards/1.tar"
    source = open_source(DataConfig(source=f"{bucket}/shards/{{1..2}}.tar"))
    assert source.what == "2 webdataset shards (1 missing)"
    assert [item.cause for item in source.parts[1].read()] == [MISSING_SHARD]
    whole = tar_of({f"{n}.{s}": b"x" * 600 for n in range(4) for s in ("jpg", "txt")})
    for end, found in ((4 * 1536 * 2, 4), (3 * 1536 * 2, 3), (1000, 0), (0, 0)):  # at the end of a member, and inside
        put(f"{bucket}/cut/0.tar", whole[:end])
        put(f"{bucket}/cut/1.tar", whole)
        items = read(f"{bucket}/cut/")
        assert [item.cause for item in items if isinstance(item, Skipped)] == [DAMAGED_SHARD]
        assert len(items) == found + 5
    config = DataConfig(source=f"{bucket}/shards/")
    before = source_state(config, open_source(config))
    put(f"{bucket}/shards/1.tar", tar_of({"0.jpg": b"i", "0.txt": b"changed"}))
    after = source_state(config, open_source(config))
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, False]


def test_img2dataset_shards_in_an_object_store_have_their_columns(bucket: str):
    put(f"{bucket}/i2d/00000.tar", tar_of({"000.jpg": b"i", "000.txt": b"text"}))
    put(f"{bucket}/i2d/00000.parquet", parquet_of({"key": ["000"], "url": ["http://x"]}))
    source = open_source(DataConfig(source=f"{bucket}/i2d/"))
    assert source.kind == "img2dataset"
    assert [s.extra for s in source.parts[0].read()] == [{"url": "http://x"}]


def test_tables_in_an_object_store_are_read(bucket: str):
    put(f"{bucket}/parquet/0.parquet", parquet_of({"image": [b"bytes"], "text": ["one"]}))
    put(f"{bucket}/parquet/1.parquet", parquet_of({"image": [b"more"], "text": ["two"]}))
    assert [(s.caption, s.read()) for s in read(f"{bucket}/parquet/")] == [("one", b"bytes"), ("two", b"more")]
    put(f"{bucket}/csv/t.csv", b"filepath,title\npictures/1.png,one\nabsent.png,two\n")
    put(f"{bucket}/csv/pictures/1.png", b"picture")
    first, second = read(f"{bucket}/csv/t.csv")
    assert (first.path, first.read()) == (f"{bucket}/csv/pictures/1.png", b"picture")
    with pytest.raises(FileNotFoundError) as caught:
        second.read()
    assert cause_of(caught.value) == MISSING


def test_folders_in_an_object_store_are_read(bucket: str):
    for name, data in {"a.png": b"A", "a.txt": b"one", "deep/b.png": b"B", "deep/b.txt": b"two"}.items():
        put(f"{bucket}/folder/{name}", data)
    samples = read(f"{bucket}/folder/")
    assert [(s.key, s.caption, s.group, s.read()) for s in samples] == [
        ("a.png", "one", "", b"A"),
        ("deep/b.png", "two", "deep", b"B"),
    ]
    put(f"{bucket}/classes/cat/1.png", b"C")
    assert [(s.key, s.caption) for s in read(f"{bucket}/classes/")] == [("cat/1.png", "a photo of a cat.")]
    config = DataConfig(source=f"{bucket}/folder/", tasks=(f"pets={bucket}/classes/",))
    (part,) = open_task(config, config.tasks[0]).parts
    assert [(s.key, s.caption, s.read()) for s in part.read()] == [("pets/cat/1.png", "cat", b"C")]
    before = source_state(config, open_source(config))
    put(f"{bucket}/classes/cat/1.png", b"changed")
    assert len(before) == 5
    assert before != source_state(config, open_source(config))


def test_what_cannot_be_reached_is_said_in_one_line(bucket: str):
    with pytest.raises(ModeclipError, match=r"holds no image"):
        read(f"{bucket}/nothing/")
    with pytest.raises(ModeclipError, match=r"none of 2 shards.*s3://.*/x0\.tar.*correct the names"):
        read(f"{bucket}/x{{0,1}}.tar")
    with pytest.raises(ModeclipError) as caught:
        read("s3://no-such-bucket/{0,1}.tar")
    assert "\n" not in str(caught.value)
