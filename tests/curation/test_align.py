"""ALIGN's rules against plain counting in Python, whatever the fragments; near-duplicates of evaluation images."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.test_mapping import METADATA

from modeclip.curation import counting
from modeclip.curation.align import AlignConfig, Ngrams, frequent_ngrams, keys_with_more, split_words
from modeclip.curation.counting import add_counts, in_ranges
from modeclip.curation.curating import curate
from modeclip.curation.method import Context, Decided
from modeclip.data.catalog import PAIR_COLUMNS, Catalog
from modeclip.data.mapping import map_fragments
from modeclip.data.selection import Selection
from modeclip.data.storage import FileWriter, append, create
from modeclip.errors import ModeclipError
from support import encode_picture, noise_picture

Pair = dict[str, Any]
WORDS = ("red", "fox", "the", "jumps", "over", "dog", "Dog,", "&", "a-b", "x1", "é")


def pair(number: int, caption: str, *, image: int | None = None, width: int = 300, height: int = 300) -> Pair:
    data = encode_picture(noise_picture(number if image is None else image, (8, 8)))
    digest = (number if image is None else image).to_bytes(16, "little")
    return {
        "key": f"key {number}", "caption": caption, "image": data, "path": None, "offset": 0, "size": len(data),
        "width": width, "height": height, "digest": digest, "group": "",
    }  # fmt: skip


def write(path: Path, pairs: Sequence[Pair], *, max_rows: int = 7) -> Catalog:
    schema = pa.schema([(name, PAIR_COLUMNS[name]) for name in pairs[0]])
    writer = FileWriter(str(path), schema, max_rows=max_rows)
    writer.write(pa.Table.from_pylist(list(pairs), schema=schema))
    create(str(path), schema.with_metadata(METADATA), writer.finish())
    return Catalog.open(path)


def words(caption: str) -> list[str]:
    """Words as the module's text defines them, slowly."""
    stripped = (token.strip(",.;:!?&-+()'\"") for token in caption.split())
    return [word.lower() for word in stripped if word]


def ngrams(caption: str) -> list[tuple[str, ...]]:
    found = words(caption)
    return [(word,) for word in found] + list(pairwise(found))


def broken_rules(pairs: Sequence[Pair], config: AlignConfig) -> list[list[int]]:
    """The oracle: which rules each pair breaks, by plain counting."""
    limits = config.limits
    counts = Counter(gram for one in pairs for gram in ngrams(one["caption"]))
    ranked = sorted(counts.values(), reverse=True)
    floor = ranked[limits.frequent_ngrams] if len(ranked) > limits.frequent_ngrams else 0
    texts, images = defaultdict(set), defaultdict(set)
    for one in pairs:
        texts[one["digest"]].add(one["caption"])
        images[one["caption"]].add(one["digest"])
    found = []
    for one in pairs:
        short, long = sorted((one["width"], one["height"]))
        number = len(words(one["caption"]))
        rules = [
            0 < short <= limits.side_above,
            short > 0 and long / short >= limits.aspect_below,
            len(texts[one["digest"]]) > limits.max_texts,
            len(images[one["caption"]]) > limits.max_images,
            number < limits.min_words,
            number > limits.max_words,
            any(counts[gram] <= floor for gram in ngrams(one["caption"])),
        ]
        found.append([place for place, breaks in enumerate(rules, 1) if breaks])
    return found


pairs_of = st.lists(
    st.tuples(
        st.lists(st.sampled_from(WORDS), max_size=6).map(" ".join),
        st.integers(0, 5),
        st.sampled_from([0, 30, 200, 201, 600, 603]),
        st.sampled_from([201, 200, 600]),
    ),
    min_size=1,
    max_size=40,
)
numbers_of = st.fixed_dictionaries(
    {
        "max_texts": st.integers(1, 4),
        "max_images": st.integers(1, 4),
        "min_words": st.integers(0, 3),
        "max_words": st.integers(3, 5),
        "frequent_ngrams": st.integers(1, 30),
    }
)


@settings(max_examples=25, deadline=None)
@given(drawn=pairs_of, numbers=numbers_of, max_rows=st.integers(1, 41), at_once=st.integers(1, 30))
def test_rules_are_those_of_plain_counting_whatever_the_fragments(
    tmp_path_factory: pytest.TempPathFactory,
    drawn: list[tuple[str, int, int, int]],
    numbers: dict[str, int],
    max_rows: int,
    at_once: int,
) -> None:
    config = AlignConfig(**numbers)  # type: ignore[arg-type]
    pairs = [
        pair(number, caption, image=image, width=width, height=height)
        for number, (caption, image, width, height) in enumerate(drawn)
    ]
    catalog = write(tmp_path_factory.mktemp("align") / "c.lance", pairs, max_rows=max_rows)
    expected = broken_rules(pairs, config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counting, "KEYS_AT_ONCE", at_once)
        prepared = config.prepare(Context(catalog=catalog, name="align", selected=None, selection=None))
    assert isinstance(prepared.work, Decided)
    assert prepared.work.values["align_cause"].tolist() == [rules[0] if rules else 0 for rules in expected]
    shown = prepared.tables[0].rows
    for place, row in enumerate(shown[:7], 1):
        assert row[1] == str(sum(place in rules for rules in expected))
        assert row[3] == str(sum([place] == rules for rules in expected))
        assert row[4] == str(sum(rules[:1] == [place] for rules in expected))


def test_numbers_of_the_paper_and_what_counts_as_a_word() -> None:
    limits = AlignConfig().limits
    assert (limits.side_above, limits.aspect_below, limits.max_texts, limits.max_images) == (200, 3, 1000, 10)
    assert (limits.min_words, limits.max_words, limits.frequent_ngrams) == (3, 20, 100_000_000)
    assert limits.max_cosine == 0.975
    assert AlignConfig(preset="small", max_words=5).limits.max_words == 5
    captions = ["“Dog” dog. DOG", " - \t", "a-b 'n' x_1", "हिन्दी हिन्द", None]
    hashes, counts = split_words(np.array(captions, object))
    assert counts.tolist() == [3, 0, 3, 2, 0]
    assert len(set(hashes[:3].tolist())) == 1
    assert hashes[6] != hashes[7]  # a vowel sign at the end belongs to the word


def test_totals_of_ranges_are_those_of_all_at_once() -> None:
    random = np.random.default_rng(0)
    parts = []
    for _ in range(5):
        keys, counts = np.unique(random.integers(0, 40, 30).astype(np.uint64) << np.uint64(58), return_counts=True)
        parts.append({"keys": keys, "counts": counts})
    expected: Counter[int] = Counter()
    for part in parts:
        expected.update(dict(zip(part["keys"].tolist(), part["counts"].tolist(), strict=True)))
    for at_once in (1, 3, 7, 1000):
        ranges = list(in_ranges(parts, "keys", "counts", add_counts, at_once))
        assert len(ranges) == 1 if at_once == 1000 else len(ranges) > 1
        found = {
            key: count for keys, counts in ranges for key, count in zip(keys.tolist(), counts.tolist(), strict=True)
        }
        assert found == expected
        for most in (1, 5, 20, 100):
            ranked = sorted(expected.values(), reverse=True)
            floor = ranked[most] if len(ranked) > most else 0
            frequent = frequent_ngrams(parts, most, at_once)
            assert frequent.keys.tolist() == sorted(key for key, count in expected.items() if count > floor)
            assert (frequent.num_distinct, frequent.least) == (len(expected), floor + 1)


def test_an_image_with_very_many_texts_does_not_fill_the_memory() -> None:
    one = {"image": np.full(500, 7, np.uint64), "text": np.arange(500, dtype=np.uint64)}
    other = {"image": np.array([3, 7], np.uint64), "text": np.array([1, 1], np.uint64)}
    assert keys_with_more([one, other, one], "image", "text", 10, at_once=4).tolist() == [7]
    assert keys_with_more([one, other, one], "text", "image", 1, at_once=4).tolist() == [1]


def test_pairs_that_are_added_are_counted_alone_and_change_what_holds_for_all(tmp_path: Path) -> None:
    config = AlignConfig(preset="small", max_images=2, tasks=())
    first = [pair(0, "a red fox"), pair(1, "a red fox"), pair(9, "a blue fox")]
    more = [pair(20, "a red fox"), pair(21, "a fox")]
    catalog = write(tmp_path / "c.lance", first)
    assert curate(catalog, config).column("cause").tolist() == [0, 0, 0]
    assert curate(catalog, config).num_computed == 0
    schema = pa.schema([(name, PAIR_COLUMNS[name]) for name in first[0]])
    writer = FileWriter(catalog.path, schema)
    writer.write(pa.Table.from_pylist(more, schema=schema))
    append(catalog.path, writer.finish(), METADATA)
    catalog = Catalog.open(catalog.path)
    assert map_fragments(catalog, Ngrams(), "count").computed == (1,)  # the first fragment is not counted again
    grown = curate(catalog, config).column("cause").tolist()
    assert (
        grown == [4, 4, 0, 4, 0] == curate(write(tmp_path / "d.lance", first + more), config).column("cause").tolist()
    )


def test_a_selection_is_the_pool(tmp_path: Path) -> None:
    pairs = [{**pair(number, "a red fox"), "group": "ab"[number % 2]} for number in range(6)]
    catalog = write(tmp_path / "c.lance", pairs)
    config = AlignConfig(preset="small", max_images=3)
    with pytest.raises(ModeclipError, match="keep none"):
        curate(catalog, config)
    chosen = curate(catalog, config, selection=Selection(where=("group=a",)))
    assert chosen.column("cause").tolist() == [0, 255] * 3


class Pixels:
    """An encoder of images: their pixels, without the mean."""

    dimension = 192
    encodes = "image"
    fingerprint = "pixels"
    num_seen = 0

    def encode_pairs(self, captions: Sequence[str], images: Sequence[bytes]) -> np.ndarray:
        import io

        from PIL import Image

        Pixels.num_seen += len(captions)
        found = []
        for data in images:
            picture = Image.open(io.BytesIO(data)).convert("RGB").resize((8, 8))
            found.append(np.asarray(picture, np.float32).ravel() - 127.5)
        return np.stack(found)


def test_near_duplicates_of_evaluation_images_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import ModuleType

    module = ModuleType("own_pixels")
    module.Pixels = Pixels  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_pixels", module)
    for name, seeds in (("cat", (1, 2)), ("dog", (3,))):
        for seed in seeds:
            (tmp_path / "task" / name).mkdir(parents=True, exist_ok=True)
            noise_picture(seed, (8, 8)).save(tmp_path / "task" / name / f"{seed}.png")
    pairs = [pair(number, "a red fox", image=number) for number in range(12)]
    near = np.asarray(noise_picture(3, (8, 8))).astype(int)
    near = np.clip(near + np.random.default_rng(0).integers(-9, 10, near.shape), 0, 255).astype(np.uint8)
    from PIL import Image

    changed = pair(30, "a red fox")
    changed["image"] = encode_picture(Image.fromarray(near))
    catalog = write(tmp_path / "c.lance", [*pairs, changed])
    config = AlignConfig(preset="small", tasks=(f"icons={tmp_path / 'task'}",), model="own_pixels:Pixels")
    curated = curate(catalog, config)
    assert np.flatnonzero(curated.column("cause") == 8).tolist() == [1, 2, 3, 12]
    assert set(curated.column("cause").tolist()) == {0, 8}
    assert curated.prepared.tables[-1].rows == (("icons", "3", "4"),)
    seen = Pixels.num_seen
    more = AlignConfig(preset="small", tasks=config.tasks, model=config.model, max_cosine=0.99999)
    assert np.flatnonzero(curate(catalog, more).column("cause") == 8).tolist() == [1, 2, 3]
    assert Pixels.num_seen == seen + 3  # vectors of the catalog are kept; those of a task only if the encoder is known


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"aspect_below": 1.0}, "more than 1"),
        ({"aspect_below": float("nan")}, "more than 1"),
        ({"max_cosine": 1.5}, "expected a cosine"),
        ({"min_words": 30}, "no text has both"),
        ({"frequent_ngrams": 0}, "frequent_ngrams"),
        ({"side_above": -1}, "side_above"),
        ({"tasks": ("data",)}, "needs align.model"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(ModeclipError, match=message):
        AlignConfig(**settings_)


def test_a_model_without_weights_and_an_encoder_of_texts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "task" / "cat").mkdir(parents=True)
    noise_picture(1).save(tmp_path / "task" / "cat" / "1.png")
    catalog = write(tmp_path / "c.lance", [pair(0, "a red fox")])
    for model, message in (("ViT-B-32", "weights"), ("ViT-Nothing@openai", "ViT-Nothing")):
        config = AlignConfig(preset="small", tasks=(str(tmp_path / "task"),), model=model)
        with pytest.raises(ModeclipError, match=message):
            curate(catalog, config)
    assert not [name for name in catalog.columns if name.startswith("align")]
