"""Tar shards become samples that point into them; a shard that cannot be used is named with the remedy."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeclip.errors import ModeclipError
from modeclip.samples import NO_CAPTION, NO_IMAGE, NOT_UTF8, Sample, Skipped
from modeclip.shards import expand_braces, list_shards, read_shards


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def read(source: str | Path, images: str = "jpg png", captions: str = "txt json") -> list[Sample | Skipped]:
    return list(read_shards(str(source), images.split(), captions.split()))


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
    assert skipped[0].detail == "s.tar has no b.txt/json"


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
    assert list_shards(f"{tmp_path}/x/{{01,00}}.tar") == [tmp_path / "x/01.tar", tmp_path / "x/00.tar"]


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


def test_shards_that_are_missing_are_counted_and_named(tmp_path: Path):
    write_tar(tmp_path / "0.tar", {"a.jpg": b"i"})
    with pytest.raises(ModeclipError, match=r"2 of 3 shards do not exist \(first: .*/1\.tar\); correct the names"):
        read(f"{tmp_path}/{{0..2}}.tar")
    with pytest.raises(ModeclipError, match=r"0 of 0 shards do not exist \(first: none named\)"):
        read("::")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            {"0.jpg": b"i", "0.cls": b"3"},
            "holds no caption: expected members ending in txt or json, found jpg, cls; set data.caption_keys",
        ),
        (
            {"0.input.jpg": b"i", "0.txt": b"t"},
            "holds no image: expected members ending in jpg or png, found input.jpg, txt; set data.image_keys",
        ),
        ({}, "holds no caption: expected members ending in txt or json, found no member at all"),
    ],
)
def test_a_shard_without_captions_or_images_is_an_error(tmp_path: Path, members, message):
    shard = write_tar(tmp_path / "00003.tar", members)
    with pytest.raises(ModeclipError) as caught:
        read(shard)
    assert str(caught.value).startswith(f"shard '{shard}' {message}")


def cut(data: bytes) -> bytes:
    return data[:7000]


def cut_between_members(data: bytes) -> bytes:
    return data[: 5 * 2560]


def overwrite_second_header(data: bytes) -> bytes:
    return data[:1536] + b"\xa5" * 512 + data[2048:]


@pytest.mark.parametrize(
    "damage", [cut, cut_between_members, overwrite_second_header, lambda _: b"", lambda _: b"no tar" * 300]
)
def test_a_damaged_shard_is_an_error_not_a_short_one(tmp_path: Path, damage):
    members = {f"{n}.{s}": os.urandom(1000) if s == "jpg" else b"text" for n in range(9) for s in ("jpg", "txt")}
    shard = write_tar(tmp_path / "s.tar", members)
    assert len(read(shard)) == 9
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(ModeclipError, match=r"s\.tar' is damaged \(.*\): expected a whole tar file; bring or write"):
        read(shard)


def test_a_compressed_shard_is_refused(tmp_path: Path):
    shard = write_tar(tmp_path / "s.tar", {"a.jpg": b"i", "a.txt": b"t"})
    shard.write_bytes(gzip.compress(shard.read_bytes()))
    with pytest.raises(ModeclipError, match=r"is compressed: expected a plain \.tar"):
        read(shard)
