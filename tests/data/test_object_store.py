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
from modeclip.data.selection import Selection
from modeclip.data.sources.options import DataConfig
from modeclip.errors import ModeclipError
from modeclip.search.asking import SearchModel
from modeclip.search.index import INDEX_FILE, Index
from modeclip.system.paths import filesystem, read_bytes
from support import plain_png, tar_of, with_weights

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


def test_an_index_lives_in_an_object_store(bucket: str, tmp_path: Path):
    """It is that of a folder, whether it is built, added to, thinned out or opened anew."""
    upload(f"{bucket}/pictures/0.tar", shard(0, 8))
    index(DataConfig(source=f"{bucket}/pictures/"), f"{bucket}/pairs")
    (tmp_path / "0.tar").write_bytes(shard(0, 8))
    index(DataConfig(source=str(tmp_path)), tmp_path / "pairs")
    model = SearchModel.open(with_weights("modeclip-icon-xxxs", tmp_path))
    far, place = Catalog.open(f"{bucket}/pairs"), f"{bucket}/found/pool.index"
    built = Index.build(far, model, place, selection=Selection(where=("caption < 'caption 6'",)))
    assert (len(built), built.folder) == (6, place)
    assert built.add(far).num_new == 2
    near = Index.build(Catalog.open(tmp_path / "pairs"), model, tmp_path / "index")
    again = Index.open(place, model)
    found, expected = (one.search("caption 3", count=8).hits for one in (again, near))
    assert {hit.key: hit.score for hit in found} == pytest.approx({hit.key: hit.score for hit in expected}, abs=1e-6)
    assert again.pictures(found[:1])[0].size == near.pictures(expected[:1])[0].size
    found, expected = (one.search("caption 3", hybrid=True).hits for one in (again, near))
    assert {hit.key for hit in found} == {hit.key for hit in expected}
    assert again.remove(("caption = 'caption 3'",)) == 1
    assert len(Index.open(place, model)) == 7
    with pytest.raises(ModeclipError, match="no index at"):
        Index.open(f"{bucket}/found")
    with pytest.raises(ModeclipError, match="found other files"):
        Index.build(far, model, f"{bucket}/pictures")
    filesystem(place).rm_file(f"{place}/{INDEX_FILE}")
    with pytest.raises(ModeclipError, match="half built"):
        Index.open(place)


def test_what_is_not_in_the_store_is_said_in_one_line(bucket: str, tmp_path: Path):
    with pytest.raises(ModeclipError, match=r"none/catalog\.lance' is no catalog.*modeclip index"):
        Catalog.open(f"{bucket}/none")
    with pytest.raises(ModeclipError):
        index(DataConfig(source=f"{bucket}/none/{{0..2}}.tar"), tmp_path / "out")
