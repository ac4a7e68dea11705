"""Tar shards become samples that point into them; a shard that cannot be used is named with the remedy."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import posixpath
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
    BROKEN_LINK,
    COMPRESSED_SHARD,
    DAMAGED_SHARD,
    DAMAGED_SIDECAR,
    MISSING_SHARD,
    NO_CAPTION,
    NO_IMAGE,
    NO_SIDECAR,
    NOT_A_FILE,
    NOT_UTF8,
    OTHER_MEMBER,
    SPARSE,
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
    assert [item.cause for item in again if isinstance(item, Skipped)] == [NO_SIDECAR, DAMAGED_SIDECAR]
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
    found = [member[:3] for member in Tar(str(path)).members() if not member.name.startswith("link")]
    assert found == [(posixpath.normpath(name.lstrip("/")), *place) for name, *place in by_tarfile(path)]


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
        found = [member[:3] for member in Tar(str(path)).members()]
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
        (_, start, size, _), (name, offset, length, _) = tar.members()
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
        found = [member[:3] for member in Tar(str(path)).members() if not member.name.startswith("link")]
    assert found == [(posixpath.normpath(name.lstrip("/")), *place) for name, *place in by_tarfile(path)]


def test_a_sparse_file_is_counted_and_what_follows_is_read(tmp_path: Path):
    with (tmp_path / "hole.jpg").open("wb") as file:
        for number in range(1, 9):  # more holes than a header has room for
            file.seek(number << 17)
            file.write(b"end")
    write(tmp_path, {"hole.txt": b"t", "next.jpg": b"i", "next.txt": b"next"})
    names = ["hole.jpg", "hole.txt", "next.jpg", "next.txt"]
    for form in ("gnu", "pax"):
        path = tmp_path / f"{form}.tar"
        subprocess.run(["tar", "-C", tmp_path, "-S", f"--format={form}", "-cf", path, *names], check=True)
        hole, sample = read(path)
        assert (hole.key, hole.cause, sample.caption, sample.read()) == (f"{form}/hole", SPARSE, "next", b"i")


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).write_bytes(data)


# ---------------------------------------------------------------- which members belong together


def shard_of(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """Write a shard whose names may come several times."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize(
    ("names", "pairs", "skipped"),
    [
        # Names with dots are names.
        ("v1.2.jpg v1.2.txt", ["v1.2: jpg0 txt1"], []),
        ("a.jpg a.txt a.b.jpg a.b.txt", ["a: jpg0 txt1", "a.b: jpg2 txt3"], []),
        ("c.jpg c.txt a.jpg a.b.txt", ["c: jpg0 txt1"], ["a.b: further member", "a: no caption"]),
        ("a.jpg a.txt a.seg.png", ["a: jpg0 txt1"], ["a.seg: further member"]),
        ("a.jpg a.txt a.cls a.seg.npy", ["a: jpg0 txt1"], []),
        ("a.jpg a.png a.txt", ["a: jpg0 txt2"], ["a: further image"]),
        (
            "a.jpg a.txt README b.cls ._a.jpg",
            ["a: jpg0 txt1"],
            ["README: tar member is neither", "b: tar member is neither"],
        ),
        ("x/a.jpg x/a.txt y/a.jpg y/a.txt", ["x/a: jpg0 txt1", "y/a: jpg2 txt3"], []),
        # The later member of a name counts, also under another spelling of it.
        ("a.jpg a.txt b.jpg b.txt a.txt", ["a: jpg0 txt4", "b: jpg2 txt3"], ["a: replaced"]),
        ("a.jpg a.txt b.jpg b.txt ./a.jpg", ["a: jpg4 txt1", "b: jpg2 txt3"], ["a: replaced"]),
        ("a.jpg a.txt a.txt a.txt", ["a: jpg0 txt3"], ["a: replaced", "a: replaced"]),
        ("a.jpg b.jpg a.txt b.txt a.txt", ["a: jpg0 txt4", "b: jpg1 txt3"], ["a: replaced"]),
        # Members of two samples are never joined.
        ("a.jpg b.jpg b.txt a.jpg a.txt", ["a: jpg3 txt4", "b: jpg1 txt2"], ["a: replaced"]),
        ("a.jpg a.txt b.jpg b.txt a.jpg a.txt", ["a: jpg4 txt5", "b: jpg2 txt3"], ["a: replaced"]),
        ("a.jpg a.txt a.jpg a.txt", ["a: jpg2 txt3"], ["a: replaced"]),
        ("a.txt a.jpg a.txt a.jpg", ["a: jpg3 txt2"], ["a: replaced"]),
        ("a.jpg a.txt a.png a.txt", ["a: png2 txt3"], ["a: replaced"]),
        ("a.jpg a.txt b.jpg b.txt a.png a.json", ["a: png4 json5", "b: jpg2 txt3"], ["a: replaced"]),
        ("a.png a.txt b.jpg b.txt a.jpg a.json", ["a: jpg4 json5", "b: jpg2 txt3"], ["a: replaced"]),
        ("a.jpg a.txt b.jpg b.txt a.png", ["a: jpg0 txt1", "b: jpg2 txt3"], ["a: further image"]),
    ],
)
def test_members_of_two_samples_are_never_joined(tmp_path: Path, names, pairs, skipped):
    members = []
    for number, name in enumerate(names.split()):
        suffix = name.rpartition(".")[2]
        text = f"{suffix}{number}"
        members.append((name, (json.dumps({"caption": text}) if suffix == "json" else text).encode()))
    found = read(shard_of(tmp_path / "s.tar", members))
    assert [f"{s.key[2:]}: {s.read().decode()} {s.caption}" for s in found if isinstance(s, Sample)] == pairs
    causes = [f"{s.key[2:]}: {s.cause}" for s in found if isinstance(s, Skipped)]
    assert len(causes) == len(skipped)
    assert all(words in cause for words, cause in zip(skipped, sorted(causes), strict=True))


def entry(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_links_and_devices_of_a_tar_are_read_or_counted(tmp_path: Path, form):
    long = "blobs/" + "n" * 140
    with tarfile.open(tmp_path / "s.tar", "w", format=form, pax_headers={"comment": "all of it"}) as tar:
        for name, data in ((long, b"image"), ("words", b"the caption"), ("real.jpg", b"own"), ("real.txt", b"own")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name, kind, target in [
            ("hard.jpg", tarfile.LNKTYPE, long),
            ("hard.txt", tarfile.LNKTYPE, "./words"),
            ("x/soft.jpg", tarfile.SYMTYPE, f"../{long}"),
            ("x/soft.txt", tarfile.SYMTYPE, "later.txt"),
            ("broken.jpg", tarfile.SYMTYPE, "nowhere"),
            ("broken.txt", tarfile.SYMTYPE, "words"),
            ("ring.jpg", tarfile.SYMTYPE, "ring.jpg"),
            ("outside.jpg", tarfile.SYMTYPE, "/real.jpg"),
            ("hard2.jpg", tarfile.LNKTYPE, "real.txt.not"),
            ("device.jpg", tarfile.CHRTYPE, ""),
            ("pipe.jpg", tarfile.FIFOTYPE, ""),
            ("d.jpg", tarfile.DIRTYPE, ""),
        ]:
            tar.addfile(entry(name, kind, target))
        info = tarfile.TarInfo("x/later.txt")
        info.size = 5
        tar.addfile(info, io.BytesIO(b"later"))
    found = read(tmp_path / "s.tar")
    pairs = {s.key[2:]: (s.read(), s.caption) for s in found if isinstance(s, Sample)}
    assert pairs == {"real": (b"own", "own"), "hard": (b"image", "the caption"), "x/soft": (b"image", "later")}
    causes = {s.key[2:]: s.cause for s in found if isinstance(s, Skipped)}
    assert causes == dict.fromkeys(("broken", "ring", "outside", "hard2"), BROKEN_LINK) | {
        "device": NOT_A_FILE,
        "pipe": NOT_A_FILE,
        "x/later": NO_IMAGE,
        "blobs/" + "n" * 140: OTHER_MEMBER,
        "words": OTHER_MEMBER,
    }


def test_tars_that_were_joined_are_read_to_their_end(tmp_path: Path):
    one, two = (tar_of({f"{n}.jpg": b"i", f"{n}.txt": n.encode()}) for n in "ab")
    shard = tmp_path / "s.tar"
    shard.write_bytes(one + two)
    assert [s.caption for s in read(shard)] == ["a", "b"]
    shard.write_bytes(one + b"what is this" * 100)
    sample, problem = read(shard)
    assert (sample.caption, problem.cause) == ("a", DAMAGED_SHARD)
    shard.write_bytes(one + bytes(2 << 20))  # made in its full size, and not written to its end
    sample, problem = read(shard)
    assert (sample.caption, problem.cause) == ("a", DAMAGED_SHARD)


bases = st.sampled_from(["a", "b", "a.b", "x/a", "./a", "x//b"])
suffixes = st.sampled_from(["jpg", "png", "txt", "json", "JPG", "seg.png", "cls"])


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(bases, suffixes, st.sampled_from("fffffhs")), max_size=14))
def test_every_member_is_in_a_pair_or_counted(tmp_path: Path, members):
    """Of what tarfile finds, each image is in a pair, or its key is counted; and no pair has strange parts."""
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        for number, (base, suffix, kind) in enumerate([("base", "jpg", "f"), ("base", "txt", "f"), *members]):
            name = f"{base}.{suffix}"
            if kind == "f":
                data = json.dumps({"caption": f"{number}"}).encode() if suffix == "json" else b"%d" % number
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            else:
                tar.addfile(entry(name, tarfile.LNKTYPE if kind == "h" else tarfile.SYMTYPE, "base.jpg"))
    found = read(path)
    pairs = [item for item in found if isinstance(item, Sample)]
    counted = [item for item in found if isinstance(item, Skipped)]
    with tarfile.open(path) as tar:
        final = {posixpath.normpath(member.name): member for member in tar if not member.isdir()}
        every = [posixpath.normpath(member.name) for member in tar]
        images = [name for name in every if name.lower().endswith(("jpg", "png"))]
        captions = [name for name in every if name.endswith(("txt", "json"))]
        assert len(pairs) + len(counted) >= max(len(images), len(captions) - 2 * len(final))
        assert len(images) <= len(pairs) + len(counted)
        for sample in pairs:
            stem = sample.key.removeprefix("s/")
            of_key = {name: member for name, member in final.items() if name.rpartition(".")[0] == stem}
            contents = [tar.extractfile(member) for name, member in of_key.items() if member.isreg()]
            texts = [file.read().decode() for file in contents if file is not None]
            linked = any(not member.isreg() for member in of_key.values())
            assert sample.read().decode() in texts or linked
            assert any(sample.caption in text for text in texts) or linked


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (["png", "json", "jpg"], ["png", "txt"]),
        (["jpg", "json", "txt"], ["jpg", "json"]),
        (["png", "txt", "jpg"], ["png", "txt"]),
    ],
)
def test_neighbours_with_the_same_key_and_other_formats_are_not_joined(tmp_path: Path, first, second):
    members = [
        (f"a.{end}", f'{{"caption": "{n}"}}'.encode() if end == "json" else n.encode())
        for n, ends in (("1", first), ("2", second))
        for end in ends
    ]
    (tmp_path / "t.tar").write_bytes(tar_of(members))
    (sample,) = [each for each in read(tmp_path / "t.tar") if isinstance(each, Sample)]
    assert (sample.read(), sample.caption) == (b"2", "2")
