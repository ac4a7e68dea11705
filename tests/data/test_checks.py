"""A check counts what is wrong with a catalog as a slow count does, names the cause, and shows it."""

from __future__ import annotations

import io
import json
import tracemalloc
from collections import Counter
from collections.abc import Callable
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from modeclip.data.catalog import FINGERPRINT, FORMAT, FORMAT_VERSION, PAIR_COLUMNS, Catalog
from modeclip.data.checks import (
    DUPLICATE_CAPTIONS,
    DUPLICATE_IMAGES,
    DUPLICATE_KEYS,
    EMPTY_CAPTION,
    FREQUENT_CAPTION,
    KINDS,
    LEFT_OUT,
    LONG_CAPTION,
    MOJIBAKE,
    NOT_FINITE,
    NOT_UNIT,
    SHORT_CAPTION,
    STOPPED,
    UNPRINTABLE,
    ZERO,
    CheckConfig,
    CheckResult,
    HistogramCounter,
    check,
    count_repeats,
)
from modeclip.data.indexing import IndexNote, index
from modeclip.data.samples import BOMB, CHANGED, EMPTY, MISSING, SHORT_FILE, UNDECODABLE, Sample
from modeclip.data.sources import DataConfig
from modeclip.data.sources.icons import read_icons
from modeclip.data.storage import FileWriter, Ledger, create
from modeclip.errors import ModeclipError
from modeclip.pages.check_page import read_tiles, write_check
from support import plain_png, png_bomb, tar_of, write_pairs


@pytest.fixture(scope="session")
def icons() -> list[bytes]:
    """Sixty different real icons."""
    found = (item.image for item in read_icons(["lucide"], 32) if isinstance(item, Sample))
    return list(islice(dict.fromkeys(found), 60))


def write_shards(folder: Path, icons: list[bytes], per_shard: int = 20) -> Path:
    folder.mkdir(parents=True)
    for start in range(0, len(icons), per_shard):
        members: list[tuple[str, bytes]] = []
        for number, icon in enumerate(icons[start : start + per_shard]):
            members += [(f"{number:03d}.png", icon), (f"{number:03d}.txt", f"caption {start + number}".encode())]
        (folder / f"{start // per_shard:05d}.tar").write_bytes(tar_of(members))
    return folder


def catalog_of(source: Path, **options: object) -> Catalog:
    out = source.with_name(f"{source.name} out")
    index(DataConfig.from_flat({"source": str(source), **options}), out)
    return Catalog.open(out / "catalog.lance")


def counts(result: CheckResult) -> dict[str, int]:
    return {finding.what: finding.count for finding in result.findings}


def read_png(path: Path) -> Image.Image:
    return Image.open(io.BytesIO(path.read_bytes()))


# ---------------------------------------------------------------- files and images


@pytest.mark.parametrize("copy_images", [False, True])
def test_whole_data_have_no_findings(tmp_path: Path, icons, copy_images):
    result = check(catalog_of(write_shards(tmp_path / "data", icons), copy_images=copy_images))
    assert result.findings == ()
    assert not result.has_errors
    assert (result.num_pairs, result.num_captions, result.num_groups, result.num_decoded) == (60, 60, 3, 60)
    assert result.num_files == (0 if copy_images else 3)
    assert result.frequent_captions == ()
    assert [count for _, count in result.frequent_groups] == [20, 20, 20]
    assert result.sizes == ((32, 32, 60),)
    assert sum(result.aspects.counts) == sum(result.shorter_sides.counts) == sum(result.caption_lengths.counts) == 60


def test_shards_that_are_gone_or_cut_are_counted_by_file(tmp_path: Path, icons):
    folder = write_shards(tmp_path / "data", icons)
    catalog = catalog_of(folder)
    places = catalog.read(["path", "offset", "size"])
    (folder / "00002.tar").unlink()
    cut = folder / "00001.tar"
    cut.write_bytes(cut.read_bytes()[:15_000])
    behind = (places["path"] == str(cut)) & (places["offset"] + places["size"] > 15_000)
    assert 0 < behind.sum() < 20
    for config in (CheckConfig(decode_samples=0), CheckConfig(decode_all=True)):  # decoding counts nothing twice
        result = check(catalog, config)
        assert counts(result) == {MISSING: 20, SHORT_FILE: behind.sum()}
        assert result.damaged_files == (
            (str(folder / "00002.tar"), MISSING, 20),
            (str(cut), SHORT_FILE, behind.sum()),
        )
        assert result.has_errors
        first = int(np.argmax(behind))
        key = catalog.read(["key"], np.array([first]))["key"][0]
        assert result.findings[1].first == f"row {first}, key {key!r}: {cut}"


def test_each_kind_of_damage_to_an_image_has_its_cause(tmp_path: Path, icons):
    folder = write_pairs(tmp_path / "data", icons, [f"caption {n}" for n in range(40)])
    catalog = catalog_of(folder)
    (folder / "001.png").write_bytes(bytes(len(icons[1])))
    (folder / "002.png").write_bytes(icons[2][:-30])
    (folder / "003.png").write_bytes(png_bomb())
    (folder / "004.png").write_bytes(b"")
    (folder / "005.png").unlink()
    (folder / "007.png").write_bytes(icons[6])
    (folder / "008.png").write_bytes(plain_png(0, (33, 40)))
    found = counts(check(catalog, CheckConfig(duplicate_images=True)))
    assert found == {MISSING: 1, EMPTY: 1, UNDECODABLE: 2, BOMB: 1, CHANGED: 2, DUPLICATE_IMAGES: 2}
    causes = {tile.row: tile.cause for tile in read_tiles(catalog, np.arange(10))}
    expected = {1: UNDECODABLE, 2: UNDECODABLE, 3: BOMB, 4: EMPTY, 5: MISSING}
    assert causes == {row: expected.get(row, "") for row in range(10)}


def test_an_image_with_other_bytes_of_the_same_size_has_changed_until_all_is_indexed_again(tmp_path: Path, icons):
    folder = write_pairs(tmp_path / "data", icons[:6], [f"caption {n}" for n in range(6)])
    catalog = catalog_of(folder)
    (folder / "004.png").write_bytes(icons[7])
    (finding,) = check(catalog).findings
    assert (finding.what, finding.count) == (CHANGED, 1)
    assert "row 4" in finding.first
    assert "--replace" in finding.advice
    with pytest.raises(ModeclipError, match=r"has changed.*index again with --replace"):
        catalog.images(np.array([4]))
    out = Path(catalog.path).parent
    index(DataConfig(source=str(folder)), out)  # which knows the key
    assert counts(check(Catalog.open(out))) == {CHANGED: 1}
    index(DataConfig(source=str(folder)), out, replace=True)
    assert check(Catalog.open(out)).findings == ()


def test_images_in_the_row_can_be_damaged_too(tmp_path: Path, icons):
    catalog = catalog_of(write_pairs(tmp_path / "data", icons, ["a caption"] * 3), copy_images=True)
    result = check(catalog)
    assert counts(result) == {DUPLICATE_CAPTIONS: 3}
    assert result.num_files == 0


def test_a_sample_is_decoded_unless_all_is_asked_for(tmp_path: Path, icons):
    folder = write_pairs(tmp_path / "data", icons, [f"caption {n}" for n in range(60)])
    catalog = catalog_of(folder)
    for path in folder.glob("*.png"):
        path.write_bytes(bytes(path.stat().st_size))
    for config, looked_at in (
        (CheckConfig(decode_samples=7), 7),
        (CheckConfig(decode_samples=7, decode_all=True), 60),
        (CheckConfig(decode_samples=100), 60),
    ):
        result = check(catalog, config)
        (finding,) = result.findings
        assert (finding.what, finding.count, finding.looked_at) == (UNDECODABLE, looked_at, looked_at)
        assert result.num_decoded == looked_at
    firsts = {check(catalog, CheckConfig(decode_samples=2, seed=seed)).findings[0].first for seed in (0, 0, 1, 2, 3)}
    assert 2 <= len(firsts) <= 4
    assert check(catalog, CheckConfig(decode_samples=0)).findings == ()


# ---------------------------------------------------------------- captions


def test_captions_are_judged_one_by_one(tmp_path: Path, icons):
    captions = {
        "a plain caption": (),
        "x": (SHORT_CAPTION,),
        "猫": (SHORT_CAPTION,),
        "cafÃ© with milk": (MOJIBAKE,),
        "itâ€™s a trap": (MOJIBAKE,),
        "café with milk, naïve": (),
        "bell \x07 rings": (UNPRINTABLE,),
        "broken \ufffd sign": (UNPRINTABLE,),
        "word " * 75: (),
        "word " * 76: (LONG_CAPTION,),
        "猫 " * 200: (LONG_CAPTION,),
    }
    catalog = catalog_of(write_pairs(tmp_path / "data", icons, list(captions)))
    stored = catalog.read(["caption"])["caption"].tolist()
    assert [text.strip() for text in captions] == stored
    expected = Counter(what for found in captions.values() for what in found)
    assert counts(check(catalog, tokenize=tokenizer())) == expected


def num_tokens(text: str) -> int:
    """Tokens of a text without a limit, start and end included."""
    return int((tokenizer()([text], context_length=1000) != 0).sum())


@cache
def tokenizer() -> Callable[..., torch.Tensor]:
    import open_clip

    return open_clip.get_tokenizer("ViT-B-32")


@pytest.mark.parametrize("context_length", [5, 8, 24])
def test_captions_that_are_cut_are_those_with_too_many_tokens(tmp_path: Path, icons, context_length):
    draw = np.random.default_rng(0)
    words = ["cat", "antidisestablishmentarianism", "İĞ", "&amp;", "ﬁne", "7", "?!", "naïve", "क़क़", "x"]
    captions = [" ".join(draw.choice(words, draw.integers(1, 12))) for _ in range(60)]
    catalog = catalog_of(write_pairs(tmp_path / "data", icons, captions))
    expected = sum(num_tokens(caption) > context_length for caption in captions)
    config = CheckConfig(context_length=context_length, decode_samples=0)
    found = counts(check(catalog, config, tokenize=tokenizer()))
    assert 0 < expected < 60
    assert found[LONG_CAPTION] == expected
    assert LONG_CAPTION not in counts(check(catalog, config))


def test_the_tokenizer_is_asked_only_about_captions_that_may_be_too_long(tmp_path: Path, icons):
    asked: list[str] = []

    def tokenize(texts: list[str], *, context_length: int) -> torch.Tensor:
        asked.extend(texts)
        return tokenizer()(texts, context_length=context_length)

    catalog = catalog_of(write_pairs(tmp_path / "data", icons, ["short", "a caption that is much longer"]))
    check(catalog, CheckConfig(context_length=20), tokenize=tokenize)
    assert asked == ["", "a caption that is much longer"]


def test_repeats_are_named_with_their_counts(tmp_path: Path, icons):
    captions = ["the same"] * 25 + ["twice"] * 2 + ["three"] * 3 + [f"caption {n}" for n in range(30)]
    result = check(catalog_of(write_pairs(tmp_path / "data", icons, captions)), CheckConfig(decode_samples=0))
    assert counts(result) == {DUPLICATE_CAPTIONS: 30, FREQUENT_CAPTION: 25}
    assert result.frequent_captions == (("the same", 25), ("three", 3), ("twice", 2))
    assert result.num_captions == 33
    assert result.findings[1].first == "'the same', 25 times, first in row 0"


def test_rows_that_indexing_would_refuse_are_found(tmp_path: Path, icons):
    """A catalog that another tool wrote, or that was damaged inside."""
    images = [icons[0], b"", icons[2][:60], png_bomb(), None, icons[5]]
    values = {
        "key": ["a", "b", "a", "c", "d", "e"],
        "caption": ["first one", "", " \t", None, "fifth one", "sixth one"],
        "image": images,
        "path": [None] * 6,
        "offset": [0] * 6,
        "size": [len(image or b"x") for image in images],
        "width": [32] * 6,
        "height": [32] * 5 + [31],
        "group": ["g"] * 6,
    }
    table = pa.table(values, schema=pa.schema([(name, PAIR_COLUMNS[name]) for name in values]))
    path = str(tmp_path / "c.lance")
    writer = FileWriter(path, table.schema)
    writer.write(table)
    create(path, table.schema.with_metadata({FORMAT: FORMAT_VERSION, FINGERPRINT: "0" * 32}), writer.finish())
    catalog = Catalog.open(path)
    result = check(catalog)
    assert counts(result) == {
        DUPLICATE_KEYS: 2,
        EMPTY_CAPTION: 3,
        EMPTY: 1,
        UNDECODABLE: 1,
        BOMB: 1,
        MISSING: 1,
        CHANGED: 1,
    }
    firsts = {finding.what: finding.first for finding in result.findings}
    assert firsts[DUPLICATE_KEYS] == "'a', 2 times, first in row 0"
    assert firsts[EMPTY_CAPTION] == "row 1, key 'b': ''"
    assert firsts[CHANGED] == "row 5, key 'e': held in the row: 32 x 32, was 32 x 31"
    write_check(catalog, result, tmp_path)


@given(st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 40), max_size=200))
def test_repeats_are_counted_as_a_counter_does(values):
    found = count_repeats(np.array(values, np.int64))
    counter = Counter(values)
    assert found.num_distinct == len(counter)
    assert found.num_repeated == sum(count for count in counter.values() if count > 1)
    expected = sorted(((count, values.index(value)) for value, count in counter.items()), key=lambda t: (-t[0], t[1]))
    assert found.top == expected[:10]


@given(st.lists(st.floats(0, 1e6), max_size=50))
def test_a_histogram_counts_every_value_once(values):
    edges = (1.0, 2.0, 5.0, 100.0)
    counter = HistogramCounter(edges)
    counter.add(np.array(values[:20], float))
    counter.add(np.array(values[20:], float))
    slow = [sum(low <= max(v, 1.0) < high for v in values) for low, high in zip(edges, (*edges[1:], 1e9), strict=True)]
    assert list(counter.finish().counts) == slow


def test_hashes_take_few_bytes_a_row():
    values = np.random.default_rng(0).integers(0, 2**62, 1_000_000)
    tracemalloc.start()
    count_repeats(values)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6 * len(values)


# ---------------------------------------------------------------- embeddings and options


def test_embeddings_that_are_no_unit_vectors_are_errors(tmp_path: Path, icons):
    catalog = catalog_of(write_pairs(tmp_path / "data", icons, [f"caption {n}" for n in range(20)]))
    vectors = np.random.default_rng(0).standard_normal((20, 16))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    catalog.add_columns({"caption_embedding": vectors.astype(np.float16)})
    assert check(catalog).findings == ()
    vectors[3, 2], vectors[4, 0], vectors[5], vectors[6] = np.nan, np.inf, 0, vectors[6] * 2
    catalog.add_columns({"caption_embedding": vectors.astype(np.float16)})
    result = check(catalog)
    assert counts(result) == {NOT_FINITE: 2, NOT_UNIT: 1, ZERO: 1}
    assert result.findings[1].first == "row 6, key '006.png': length 2"
    assert result.findings[2].first == "row 5, key '005.png': length 0"


@pytest.mark.parametrize("name", ["decode_samples", "context_length", "short_characters", "threads"])
def test_options_that_make_no_sense_are_refused(name):
    with pytest.raises(ModeclipError, match=rf"^check\.{name}: expected \d( or more| to 4,096), got -1$"):
        CheckConfig(**{name: -1})


def test_a_result_is_plain_text_and_json(tmp_path: Path, icons):
    folder = write_pairs(tmp_path / "data", icons, ["one caption", "x", "third caption"])
    catalog = catalog_of(folder)
    (folder / "000.png").unlink()
    result = check(catalog)
    content = json.loads(json.dumps(result.to_json()))
    assert content["num_pairs"] == 3
    assert content["findings"][0]["what"] == MISSING
    assert content["caption_lengths"]["counts"] == list(result.caption_lengths.counts)
    assert [row[:4] for row in result.rows()] == [
        (MISSING, "error", "1", "33.3 %"),
        (SHORT_CAPTION, "note", "1", "33.3 %"),
    ]
    severities = [severity for severity, _ in KINDS.values()]
    assert severities == sorted(severities, key=["error", "warning", "note"].index)
    assert EMPTY_CAPTION in KINDS


# ---------------------------------------------------------------- what is not in the catalog


def test_repeated_images_are_named_by_their_file(tmp_path: Path) -> None:
    images = [plain_png(1), plain_png(2), plain_png(1)]
    catalog = catalog_of(write_pairs(tmp_path / "data", images, ["one", "two", "three"]))
    finding = next(one for one in check(catalog).findings if one.what == DUPLICATE_IMAGES)
    first = catalog.read(["path", "key"])
    assert finding.first == f"{first['path'][0]}, 2 times, first in row 0, key {first['key'][0]!r}"


def test_a_part_of_the_source_that_is_left_out_is_said_by_its_causes(tmp_path: Path) -> None:
    images = [plain_png(1), b"no picture", plain_png(2)]
    catalog = catalog_of(write_pairs(tmp_path / "data", images, ["one", "two", "three"]), max_skipped_fraction=0.5)
    finding = next(one for one in check(catalog).findings if one.what == LEFT_OUT)
    assert (finding.count, finding.looked_at) == (1, 3)
    assert finding.first.startswith("1 ")


def test_an_index_that_was_stopped_is_said(tmp_path: Path) -> None:
    catalog = catalog_of(write_pairs(tmp_path / "data", [plain_png(1), plain_png(2)], ["one", "two"]))
    note = IndexNote(
        plan="p", units=[["a", "1", True]], readings=[], files=[[["x.lance", 7]], []], fingerprints=["", ""]
    )
    Ledger(catalog.path, "index", IndexNote).add("000000", note)
    finding = next(one for one in check(catalog).findings if one.what == STOPPED)
    assert (finding.count, finding.advice) == (7, "give the same modeclip index again, which finishes it")
