"""Files are read from folders and from object stores alike, quickly where many ranges of the same files are read."""

from __future__ import annotations

import builtins
import io
import os
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modeclip.data.images import cause_of
from modeclip.data.samples import DAMAGED_SHARD, MISSING, MISSING_SHARD, Sample, Skipped
from modeclip.data.sources import DataConfig, open_source, open_task, source_state
from modeclip.errors import ModeclipError
from modeclip.system import paths as places
from modeclip.system.paths import MAX_OPEN_FILES, folders_below, read_bytes
from support import tar_of


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def test_ranges_of_many_files_leave_few_open(tmp_path: Path):
    for number in range(3 * MAX_OPEN_FILES):
        (tmp_path / f"{number}").write_bytes(b"%06d" % number)
    before = open_descriptors()
    for number in range(3 * MAX_OPEN_FILES):
        assert read_bytes(str(tmp_path / f"{number}"), 3, 2) == (b"%06d" % number)[3:5]
    assert open_descriptors() <= before + MAX_OPEN_FILES


def test_a_file_that_is_replaced_grows_or_vanishes_is_noticed(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(b"first")
    assert read_bytes(str(path), 0, 5) == b"first"
    (tmp_path / "new").write_bytes(b"other")
    (tmp_path / "new").replace(path)
    assert read_bytes(str(path), 0, 5) == b"other"
    with path.open("ab") as file:
        file.write(b" and more")
    assert read_bytes(str(path), 5, 100) == b" and more"
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read_bytes(str(path), 0, 5)


def test_many_threads_read_the_right_bytes_while_files_are_opened_and_closed(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(places, "MAX_OPEN_FILES", 2)
    for number in range(8):
        (tmp_path / f"{number}").write_bytes(bytes([number]) * 4096)
    wrong: list[object] = []

    def work(seed: int) -> None:
        try:
            for step in range(400):
                number = (step * 7 + seed) % 8
                data = read_bytes(str(tmp_path / f"{number}"), step, 100)
                if data != bytes([number]) * 100:
                    wrong.append((number, data[:4]))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.filterwarnings("ignore:lance is not fork-safe", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_process_that_was_forked_reads_too(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"0123456789")
    assert read_bytes(str(tmp_path / "file"), 2, 3) == b"234"
    read, write = os.pipe()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "print", lambda *_: None)
        child = os.fork()
        if not child:
            os.write(write, read_bytes(str(tmp_path / "file"), 5, 2))
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 10) == b"56"
    os.close(read)
    os.close(write)


def test_what_paths_have_in_common_is_left_out():
    assert folders_below(["/a/b/0.tar"]) == ["0"]
    assert folders_below(["/a/b/0.tar", "/a/c/0.tar", "/d.tar"]) == ["a/b/0", "a/c/0", "d"]
    assert folders_below(["/a/bb/0.tar", "/a/b/0.tar"]) == ["bb/0", "b/0"]
    assert folders_below([]) == []


def test_an_address_without_its_client_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch):
    import fsspec

    def fail(_: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "filesystem", fail)
    with pytest.raises(ModeclipError) as caught:
        open_source(DataConfig(source="s3://bucket/{0..3}.tar"))
    assert str(caught.value).endswith('needs a package that is not installed: pip install "modeclip[s3]"')


# ---------------------------------------------------------------- an S3 server


def put(url: str, data: bytes) -> None:
    places.filesystem(url).pipe_file(url, data)


def parquet_of(columns: dict[str, object]) -> bytes:
    data = io.BytesIO()
    pq.write_table(pa.table(columns), data)
    return data.getvalue()


def read(source: str) -> list[Sample | Skipped]:
    return [item for part in open_source(DataConfig(source=source)).parts for item in part.read()]


def test_shards_in_an_object_store_are_read_in_place(bucket: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "modeclip.data.sources.shards.URL_BYTES", 3000
    )  # so that members lie across the ends of what is read ahead
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
    shards = DataConfig(source=f"{bucket}/shards/")
    before = source_state(shards, open_source(shards))
    put(f"{bucket}/shards/1.tar", tar_of({"0.jpg": b"i", "0.txt": b"changed"}))
    after = source_state(shards, open_source(shards))
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
    with pytest.raises(ModeclipError, match=r"none of 2 shards exists \(first: s3://.*/x0\.tar\)"):
        read(f"{bucket}/x{{0,1}}.tar")
    with pytest.raises(ModeclipError) as caught:
        read("s3://no-such-bucket/{0,1}.tar")
    assert "\n" not in str(caught.value)
