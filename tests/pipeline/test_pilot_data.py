"""The pairs of a pilot: a random sample of any source, and which captions hold one class name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from modeclip.data.indexing import index
from modeclip.data.samples import DAMAGED_SHARD, NO_CAPTION, NOT_UTF8, Sample, Skipped
from modeclip.data.sources import DataConfig, DataSource, SourcePart, open_source
from modeclip.data.tasks.names import match_classes
from modeclip.pipeline import pilot_data
from modeclip.pipeline.pilot_data import sample_source
from support import encode_picture, noise_picture, write_pairs


def made_of(*sizes: int) -> tuple[DataSource, list[str]]:
    """A source whose parts have so many pairs, an unusable one behind each and a word about the part; and its reads."""
    reads: list[str] = []

    def part(name: str, size: int) -> SourcePart:
        def read() -> Iterator[Sample | Skipped]:
            reads.append(name)
            for number in range(size):
                yield Sample(key=f"{number}", caption="a", image=b"1234")
                yield Skipped(f"bad {number}", NO_CAPTION)
            yield Skipped(name, DAMAGED_SHARD)

        return SourcePart(name=name, state="1", read=read)

    parts = tuple(part(f"part {place}", size) for place, size in enumerate(sizes))
    return DataSource(kind="table", parts=parts, extra=pa.schema([]), what="parts"), reads


def keys(source: DataSource) -> list[tuple[str, str]]:
    return [(part.name, item.key) for part in source.parts for item in part.read() if isinstance(item, Sample)]


def test_a_sample_has_as_many_pairs_as_wanted_from_all_parts_and_is_the_same_again() -> None:
    source, reads = made_of(4000, 2000)
    found = sample_source(source, 600, seconds=1e6, seed=0)
    assert (found.num_pairs, found.is_counted) == (6000, True)
    drawn = keys(found.source)
    assert len(drawn) == 600
    assert 340 < sum(name == "part 0" for name, _ in drawn) < 460
    assert keys(found.source) == drawn
    assert sorted(reads) == ["part 0", "part 1"]  # what was looked at is kept
    assert keys(sample_source(source, 600, seconds=1e6, seed=0).source) == drawn
    assert keys(sample_source(source, 600, seconds=1e6, seed=1).source) != drawn
    skipped = [item for part in found.source.parts for item in part.read() if isinstance(item, Skipped)]
    assert [item.key for item in skipped if item.cause == DAMAGED_SHARD] == ["part 0", "part 1"]
    assert 520 < len(skipped) < 680  # what cannot be used has its share


def test_the_draws_are_kept_as_plain_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that each takes 8 bytes, not those of a Python object."""

    class Draw(int):
        alive = most = 0

        def __init__(self, _: int) -> None:
            Draw.alive += 1
            Draw.most = max(Draw.most, Draw.alive)

        def __del__(self) -> None:
            Draw.alive -= 1

    source, _ = made_of(2000)
    wanted = keys(sample_source(source, 600, seconds=1e6, seed=0).source)
    draw = pilot_data._draw
    monkeypatch.setattr(pilot_data, "_draw", lambda *asked: Draw(draw(*asked)))
    assert keys(sample_source(source, 600, seconds=1e6, seed=0).source) == wanted
    assert 0 < Draw.most < 10


def test_names_that_are_not_utf8_are_left_to_the_index(tmp_path: Path) -> None:
    write_pairs(tmp_path / "own", [encode_picture(noise_picture(n)) for n in range(4)], ["a", "b", "c", "d"])
    for path in (tmp_path / "own").glob("*0.*"):
        os.rename(path, os.fsencode(path.parent) + b"/caf\xe9" + os.fsencode(path.suffix))  # noqa: PTH104
    data = DataConfig.from_flat({"source": str(tmp_path / "own"), "max_skipped_fraction": 0.5})
    found = sample_source(open_source(data), 10, seconds=1e6, seed=0)
    result = index(data, tmp_path / "out", source=found.source)
    assert (result.num_samples, result.skipped) == (3, {NOT_UTF8: 1})


def test_a_small_source_is_taken_whole() -> None:
    source, _ = made_of(30, 20)
    assert len(keys(sample_source(source, 600, seconds=1e6, seed=0).source)) == 50


def test_of_a_source_that_is_too_long_what_was_reached_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    source, reads = made_of(*[1000] * 8)
    clock = iter(range(10**6))
    monkeypatch.setattr(pilot_data.time, "monotonic", lambda: next(clock))
    found = sample_source(source, 10_000, seconds=5000.0, seed=0)  # two parts of 2,001 items, and half of a third
    assert len(reads) == len(set(reads)) == 3
    assert (found.num_pairs, found.is_counted) == (8000, False)
    drawn = keys(found.source)
    assert 2400 < len(drawn) < 2600
    assert {name for name, _ in drawn} == set(reads)
    monkeypatch.setattr(pilot_data.time, "monotonic", lambda: next(clock))
    few = sample_source(source, 10_000, seconds=99.0, seed=0)
    assert (len(keys(few.source)), few.num_pairs, few.is_counted) == (50, 50, False)


def test_images_that_take_much_memory_are_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pilot_data, "MOST_BYTES", 100)
    source, reads = made_of(1000)
    found = sample_source(source, 500, seconds=1e6, seed=0)
    assert keys(found.source) == keys(found.source)
    assert reads == ["part 0"] * 3


@pytest.mark.parametrize(
    ("caption", "name"),
    [
        ("A CAT on a mat", "cat"),
        ("cat_and_mat", "cat"),
        ("cats", None),
        ("a cat, a dog", None),
        ("hot dog", "hot dog"),  # the longer name hides the shorter
        ("hot dog dog", None),
        ("dog hot", "dog"),
        ("cat cat", "cat"),
        ("", None),
    ],
)
def test_a_caption_belongs_to_the_one_name_that_it_holds(caption: str, name: str | None) -> None:
    names = ["cat", "dog", "Hot-Dog", "..."]
    (label,) = match_classes([caption], names)
    assert (None if label < 0 else names[label].lower().replace("-", " ")) == name
