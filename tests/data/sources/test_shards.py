"""Tar shards become samples that point into them; a shard that cannot be used is named with the remedy."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import shutil
import subprocess
import tarfile
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modeclip.data.samples import (
    COMPRESSED_SHARD,
    DAMAGED_SHARD,
    DAMAGED_TABLE,
    MISSING_SHARD,
    NO_CAPTION,
    NO_IMAGE,
    NOT_UTF8,
    Sample,
    Skipped,
)
from modeclip.data.sources import DataConfig, open_source
from modeclip.data.sources.shards import DamagedTar, Tar, list_shards, open_shards
from modeclip.errors import ModeclipError
from modeclip.system.paths import expand_braces
from support import tar_of


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_of(members))
    return path


def read(source: str | Path, images: str = "jpg;png", captions: str = "txt;json", **more: object):
    config = DataConfig.from_flat({"source": str(source), "image_keys": images, "caption_keys": captions, **more})
    return [item for part in open_shards(config).parts for item in part.read()]


def test_samples_point_at_the_bytes_of_their_images(tmp_path: Path):
    shard = write_tar(
        tmp_path / "00000.tar",
        {
            "a.txt": b" a cat ",
            "a.jpg": b"image of a",
            "a.json": b'{"caption": "not this one"}',
            "deep/b.PNG": b"image of b" * 200,
            "deep/b.json": b'{"caption": "a dog"}',
            "deep/b.npy": b"passed over",
        },
    )
    samples = read(shard)
    assert [(s.key, s.caption, s.group) for s in samples] == [
        ("00000/a", "a cat", "00000"),
        ("00000/deep/b", "a dog", "00000"),
    ]
    assert [s.read() for s in samples] == [b"image of a", b"image of b" * 200]
    assert all(s.image is None and s.path == str(shard) for s in samples)


def test_members_of_one_sample_need_not_be_neighbours(tmp_path: Path):
    names = [f"{n}.jpg" for n in range(5)] + [f"{n}.txt" for n in reversed(range(5))]
    shard = write_tar(tmp_path / "s.tar", {name: name.encode() for name in names})
    assert [(s.caption, s.read()) for s in read(shard)] == [(f"{n}.txt", f"{n}.jpg".encode()) for n in range(5)]


def test_any_suffixes_will_do_when_they_are_named(tmp_path: Path):
    shard = write_tar(tmp_path / "s.tar", {"1.input.jpg": b"image", "1.outputs.txt": b"text"})
    assert [s.caption for s in read(shard, "input.jpg", "outputs.txt")] == ["text"]


def test_names_of_any_kind_are_read(tmp_path: Path):
    long = "n" * 150 + "/" + "é" * 120
    members = {f"{long}.jpg": b"1", f"{long}.txt": b"long", "._a.jpg": b"hidden", "._a.txt": b"hidden"}
    (sample,) = read(write_tar(tmp_path / "s.tar", members))
    assert (sample.key, sample.caption) == (f"s/{long}", "long")


def test_pairs_that_lack_a_half_are_skipped_by_cause(tmp_path: Path):
    members = {"a.jpg": b"i", "a.txt": b"ok", "b.jpg": b"i", "c.txt": b"t", "d.jpg": b"i", "d.txt": b"\xff"}
    _, *skipped = read(write_tar(tmp_path / "s.tar", members))
    assert [(s.key, s.cause) for s in skipped] == [("s/b", NO_CAPTION), ("s/c", NO_IMAGE), ("s/d", NOT_UTF8)]
    assert skipped[0].detail == f"{tmp_path}/s.tar has no b.txt/json"


def test_shards_are_named_by_braces_joins_or_their_folder(tmp_path: Path):
    for name in ("x/00", "x/01", "y/7"):
        write_tar(tmp_path / f"{name}.tar", {"a.jpg": b"i", "a.txt": name.encode()})
    joined = f"{tmp_path}/x/{{00..01}}.tar::{tmp_path}/y/7.tar"
    assert [(s.key, s.caption) for s in read(joined)] == [
        ("x/00/a", "x/00"),
        ("x/01/a", "x/01"),
        ("y/7/a", "y/7"),
    ]
    assert [s.key for s in read(tmp_path / "x")] == ["00/a", "01/a"]
    assert list_shards(f"{tmp_path}/x/{{01,00}}.tar") == [f"{tmp_path}/x/01.tar", f"{tmp_path}/x/00.tar"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="compares with bash")
@given(
    st.lists(
        st.sampled_from(["a", "-", "{0..3}", "{08..11}", "{3..1}", "{x,y}", "{007..9}", "{p,,q}", ".tar"]), max_size=5
    )
)
def test_braces_expand_as_in_bash(parts):
    text = "s" + "".join(parts)
    shell = subprocess.run(["bash", "-c", f"echo {text}"], capture_output=True, text=True, check=True)
    assert expand_braces(text) == shell.stdout.split()


def test_a_shard_that_is_missing_is_skipped_unless_all_are(tmp_path: Path):
    write_tar(tmp_path / "0.tar", {"a.jpg": b"i", "a.txt": b"t"})
    source = open_source(DataConfig(source=f"{tmp_path}/{{0..2}}.tar"))
    assert source.what == "3 webdataset shards (2 missing)"
    assert [part.state == "" for part in source.parts] == [False, True, True]
    sample, *skipped = (item for part in source.parts for item in part.read())
    assert sample.caption == "t"
    assert skipped == [Skipped(f"{tmp_path}/{n}.tar", MISSING_SHARD, "no such file") for n in (1, 2)]
    (tmp_path / "0.tar").unlink()
    assert [item.cause for item in source.parts[0].read()] == [MISSING_SHARD]  # it vanished after it was listed
    with pytest.raises(ModeclipError, match=r"none of 3 shards.*/0\.tar.*correct the names"):
        read(f"{tmp_path}/{{0..2}}.tar")
    with pytest.raises(ModeclipError, match=r"none of 0 shards.*none named.*correct the names"):
        read("::")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            {"0.jpg": b"i", "0.cls": b"3"},
            r"no caption.*txt or json.*found jpg, cls.*set data\.caption_keys",
        ),
        (
            {"0.input.jpg": b"i", "0.txt": b"t"},
            r"no image.*jpg or png.*found input\.jpg, txt.*set data\.image_keys",
        ),
    ],
)
def test_a_shard_without_captions_or_images_is_an_error(tmp_path: Path, members, message):
    shard = write_tar(tmp_path / "00003.tar", members)
    with pytest.raises(ModeclipError, match=f"{shard}.*{message}"):
        read(shard)


def test_an_empty_shard_is_no_problem_unless_all_are(tmp_path: Path):
    write_tar(tmp_path / "0.tar", {})
    with pytest.raises(ModeclipError, match=r"none of 1 shard .*no member"):
        read(tmp_path)
    write_tar(tmp_path / "1.tar", {"a.jpg": b"i", "a.txt": b"t"})
    assert [s.key for s in read(tmp_path)] == ["1/a"]


def cut(data: bytes) -> bytes:
    return data[:7000]


def cut_between_members(data: bytes) -> bytes:
    return data[: 5 * 2560]


def overwrite_fifth_header(data: bytes) -> bytes:
    return data[: 2 * 2560] + b"\xa5" * 512 + data[2 * 2560 + 512 :]


def change_a_size(data: bytes) -> bytes:
    return data[: 2 * 2560 + 130] + b"7" + data[2 * 2560 + 131 :]


@pytest.mark.parametrize("damage", [cut, cut_between_members, overwrite_fifth_header, change_a_size])
def test_a_damaged_shard_gives_what_comes_before_the_damage(tmp_path: Path, damage):
    members = {f"{n}.{s}": os.urandom(1000) if s == "jpg" else b"text" for n in range(9) for s in ("jpg", "txt")}
    shard = write_tar(tmp_path / "s.tar", members)
    whole = read(shard)
    assert len(whole) == 9
    shard.write_bytes(damage(shard.read_bytes()))
    *found, problem = read(shard)
    assert 2 <= len(found) < 9
    assert found == whole[: len(found)]
    assert (problem.key, problem.cause) == (str(shard), DAMAGED_SHARD)
    assert "byte" in problem.detail


def test_an_image_that_is_cut_off_is_no_pair(tmp_path: Path):
    shard = write_tar(tmp_path / "s.tar", {f"{n}.{s}": b"x" * 1000 for n in range(2) for s in ("txt", "jpg")})
    shard.write_bytes(shard.read_bytes()[: 4 * 1536 - 600])
    sample, problem = read(shard)
    assert sample.key == "s/0"
    assert problem.detail == "it ends at byte 5,544, inside a member of 1,000 bytes"


@pytest.mark.parametrize("content", [b"", b"no tar" * 300, b"\0" * 100])
def test_a_shard_that_is_damaged_from_its_start_is_an_error_where_it_is_the_only_one(tmp_path: Path, content):
    (tmp_path / "0.tar").write_bytes(content)
    with pytest.raises(ModeclipError, match=r"none of 1 shard .*byte 0"):
        read(tmp_path)
    write_tar(tmp_path / "1.tar", {"a.jpg": b"i", "a.txt": b"t"})
    assert [getattr(item, "cause", item.key) for item in read(tmp_path)] == [DAMAGED_SHARD, "1/a"]


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_a_compressed_shard_is_skipped_and_refused_where_all_are(tmp_path: Path, compress):
    shard = write_tar(tmp_path / "0.tar", {"a.jpg": b"i", "a.txt": b"t"})
    shard.write_bytes(compress(shard.read_bytes()))
    with pytest.raises(ModeclipError, match=r"is compressed: expected a plain \.tar"):
        read(shard)
    write_tar(tmp_path / "1.tar", {"a.jpg": b"i", "a.txt": b"t"})
    assert [getattr(item, "cause", item.key) for item in read(tmp_path)] == [COMPRESSED_SHARD, "1/a"]


# ---------------------------------------------------------------- conventions of other tools


def test_the_tables_beside_img2dataset_shards_become_columns(tmp_path: Path):
    for part in ("00000", "00001"):
        keys = [f"{part}{number:04d}" for number in range(3)]
        members = {f"{k}.{s}": k.encode() for k in keys[:2] for s in ("jpg", "txt")}
        members |= {f"{k}.json": json.dumps({"caption": k, "url": "u"}).encode() for k in keys[:2]}
        write_tar(tmp_path / f"{part}.tar", members)
        columns = {"key": keys, "caption": keys, "url": ["u0", "u1", "u2"], "similarity": [0.5, None, 0.1]}
        columns |= {"width": [1, 2, 3], "height": [1, 2, 3], "size": [7, 8, 9], "box": [[1], [2], [3]]}
        if part == "00001":  # where a column has no value at all, Parquet files have another type for it
            columns["similarity"] = pa.nulls(3)
        pq.write_table(pa.table(columns), tmp_path / f"{part}.parquet")
    source = open_source(DataConfig(source=str(tmp_path)))
    assert source.kind == "img2dataset"
    assert source.what == "2 img2dataset shards with 3 further columns"
    assert source.extra == pa.schema([("url", pa.string()), ("similarity", pa.float64()), ("source_size", pa.int64())])
    samples = [item for part in source.parts for item in part.read()]
    assert [s.caption for s in samples] == ["000000000", "000000001", "000010000", "000010001"]
    assert samples[0].extra == {"url": "u0", "similarity": 0.5, "source_size": 7}
    assert samples[3].extra == {"url": "u1", "similarity": None, "source_size": 8}
    (tmp_path / "00000.parquet").unlink()
    (tmp_path / "00001.parquet").write_bytes(b"PAR1")
    again = [item for part in source.parts for item in part.read()]
    assert [item.cause for item in again if isinstance(item, Skipped)] == [DAMAGED_TABLE]
    assert [s.extra for s in again if isinstance(s, Sample)] == [{}] * 4


def test_each_text_of_a_metaclip_shard_is_a_pair(tmp_path: Path):
    texts = [["alt", "a cat"], ["title", "Tom"], ["alt", "a cat"], ["alt", " "]]
    members = {"1/u-1.jpeg": b"image", "1/u-1.json": json.dumps({"texts": texts, "url": "u"}).encode()}
    shard = write_tar(tmp_path / "0.tar", members)
    source = open_source(DataConfig(source=str(shard)))
    assert (source.kind, source.what) == ("metaclip", "1 MetaCLIP shard")
    samples = list(source.parts[0].read())
    assert [(s.key, s.caption, s.read()) for s in samples] == [
        ("0/1/u-1", "a cat", b"image"),
        ("0/1/u-1#1", "Tom", b"image"),
    ]
    assert [s.caption for s in read(shard, "jpeg", text_keys="title; other")] == ["Tom"]


def test_a_member_without_bytes_is_an_image_without_bytes(tmp_path: Path):
    (sample,) = read(write_tar(tmp_path / "s.tar", {"a.jpg": b"", "a.txt": b"t"}))
    assert (sample.size, sample.read()) == (0, b"")  # the indexing counts it as empty


def test_lines_of_a_text_member_may_be_captions(tmp_path: Path):
    shard = write_tar(tmp_path / "s.tar", {"a.jpg": b"i", "a.txt": b"one\ntwo\n"})
    assert [(s.key, s.caption) for s in read(shard, caption_lines=True)] == [("s/a", "one"), ("s/a#1", "two")]


# ---------------------------------------------------------------- tars


def by_tarfile(path: Path) -> list[tuple[str, int, int]]:
    with tarfile.open(path, "r:") as tar:
        return [(member.name, member.offset_data, member.size) for member in tar if member.isreg()]


names = st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=180)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(names, st.integers(0, 3000)), max_size=8),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_members_are_those_that_tarfile_finds(tmp_path: Path, members, form):
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w", format=form) as tar:
        for number, (name, size) in enumerate(members):
            info = tarfile.TarInfo(f"{'d' * (number * 30)}/{name}")
            info.size = size
            with suppress(ValueError):  # too long a name for ustar
                tar.addfile(info, io.BytesIO(b"x" * size))
            link = tarfile.TarInfo(f"link{number}")
            link.type, link.linkname = tarfile.SYMTYPE, name[:50]
            tar.addfile(link)
    assert list(Tar(str(path)).members()) == by_tarfile(path)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damage_never_goes_unseen_where_tarfile_sees_it(tmp_path: Path, data):
    path = tmp_path / "t.tar"
    write_tar(path, {f"{n}.txt": b"x" * (n * 300) for n in range(4)})
    content = bytearray(path.read_bytes())
    headers = [offset - 512 for _, offset, _ in by_tarfile(path)]
    at = data.draw(st.sampled_from(headers)) + data.draw(st.integers(0, 511))
    content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        expected = by_tarfile(path)
    except tarfile.TarError:
        expected = None
    try:
        found = list(Tar(str(path)).members())
    except DamagedTar:
        return  # tarfile takes a header that it cannot read for the end, unless it is the first
    assert found == expected


def test_sizes_that_octal_digits_cannot_hold_are_read(tmp_path: Path):
    info = tarfile.TarInfo("big.jpg")
    info.size = 9 << 30
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"{form}.tar"
        with path.open("wb") as file:  # nine gigabytes of nothing, which take no space
            header = info.tobuf(form)
            file.write(header)
            file.truncate(len(header) + info.size)
            file.seek(0, os.SEEK_END)
            small = tarfile.TarInfo("small.txt")
            small.size = 3
            file.write(small.tobuf(form) + b"abc".ljust(512, b"\0") + bytes(1024))
        tar = Tar(str(path))
        (_, start, size), (name, offset, length) = tar.members()
        assert (start, size) == (len(header), info.size)
        assert (name, tar.read(offset, length)) == ("small.txt", b"abc")


def test_tars_that_gnu_tar_writes_are_read(tmp_path: Path):
    for number in range(3):
        (tmp_path / f"{'n' * 120}{number}.txt").write_bytes(b"y" * number)
    (tmp_path / "short").write_bytes(b"short")
    for form in ("gnu", "oldgnu", "pax", "ustar", "v7"):
        files = ["short"] if form in ("v7", "ustar") else sorted(path.name for path in tmp_path.glob("n*.txt"))
        path = tmp_path / f"{form}.tar"
        subprocess.run(["tar", "-C", tmp_path, f"--format={form}", "-cf", path, *files], check=True)
        assert list(Tar(str(path)).members()) == by_tarfile(path)


def test_a_sparse_file_is_said_to_be_unsupported(tmp_path: Path):
    with (tmp_path / "hole.jpg").open("wb") as file:
        file.truncate(1 << 20)
        file.seek(0, os.SEEK_END)
        file.write(b"end")
    for form in ("gnu", "pax"):
        path = tmp_path / f"{form}.tar"
        subprocess.run(["tar", "-C", tmp_path, "-S", f"--format={form}", "-cf", path, "hole.jpg"], check=True)
        with pytest.raises(DamagedTar, match="sparse file, which is not supported"):
            list(Tar(str(path)).members())
