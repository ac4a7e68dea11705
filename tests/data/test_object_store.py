"""Shards and catalogs in an object store: a real S3 server on this machine, reached as any other would be."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from modeclip.data.catalog import Catalog
from modeclip.data.checksums import data_files, find_damaged, unknown_files
from modeclip.data.indexing import index
from modeclip.data.mapping import map_columns
from modeclip.data.sources.options import DataConfig
from modeclip.errors import ModeclipError
from modeclip.system.paths import read_bytes
from support import plain_png, tar_of

pytestmark = pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow:DeprecationWarning")


def shard(first: int, count: int) -> bytes:
    members: dict[str, bytes] = {}
    for number in range(first, first + count):
        members |= {f"{number:04d}.png": plain_png((number, 0, 0)), f"{number:04d}.txt": f"caption {number}".encode()}
    return tar_of(members)


def upload(uri: str, data: bytes) -> None:
    import fsspec

    with fsspec.open(uri, "wb") as file:
        file.write(data)


class Lengths:
    inputs = ("caption", "image")
    outputs = ("length",)
    unit = "captions"
    facts: ClassVar[dict[str, object]] = {"made_by": "lengths"}

    def __call__(self, block):
        assert all(data.startswith(b"\x89PNG") for data in block["image"])
        return {"length": np.array([len(caption) for caption in block["caption"]], np.int32)}


def test_a_catalog_lives_in_an_object_store_from_its_shards_to_its_columns(bucket: str, tmp_path: Path):
    for number in range(3):
        upload(f"{bucket}/shards/{number:05d}.tar", shard(10 * number, 10))
    first = index(DataConfig(source=f"{bucket}/shards/{{00000..00001}}.tar"), f"{bucket}/out")
    assert (first.kind, first.num_samples, first.skipped) == ("shards", 20, {})
    catalog = Catalog.open(f"{bucket}/out")
    assert map_columns(catalog, Lengths(), "lengths") == 20
    assert index(DataConfig(source=f"{bucket}/shards/"), f"{bucket}/out").num_added == 10
    catalog = Catalog.open(f"{bucket}/out/catalog.lance")
    assert map_columns(catalog, Lengths(), "lengths") == 10
    assert catalog.read(["length"])["length"].tolist() == [len(f"caption {n}") for n in range(30)]
    rows = np.array([29, 3, 17])
    assert [image.getpixel((0, 0))[0] for image in catalog.images(rows)] == [29, 3, 17]
    for number in range(3):  # the same shards on this machine
        (tmp_path / f"{number:05d}.tar").write_bytes(shard(10 * number, 10))
    index(DataConfig(source=str(tmp_path)), tmp_path / "out")
    assert Catalog.open(tmp_path / "out").fingerprint == catalog.fingerprint
    assert unknown_files(catalog.dataset) == []
    assert find_damaged(catalog.dataset, deep=True) == []
    name = sorted(data_files(catalog.dataset))[0]
    content = read_bytes(f"{catalog.path}/{name}")
    upload(f"{catalog.path}/{name}", content[:-1] + bytes([content[-1] ^ 1]))
    assert [one["file"] for one in find_damaged(catalog.dataset, deep=True)] == [name]


def test_what_is_not_in_the_store_is_said_in_one_line(bucket: str, tmp_path: Path):
    with pytest.raises(ModeclipError, match=r"none/catalog\.lance' is no catalog.*modeclip index"):
        Catalog.open(f"{bucket}/none")
    with pytest.raises(ModeclipError):
        index(DataConfig(source=f"{bucket}/none/{{0..2}}.tar"), tmp_path / "out")
