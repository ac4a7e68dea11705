"""MetaCLIP against the formulas, computed slowly from the captions: counts, t, probabilities, draws, languages."""

from __future__ import annotations

import math
import pickle
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from tests.data.test_mapping import METADATA, rows_of

from modeclip.curation.curating import Curated, curate
from modeclip.curation.matching import normalise, pad
from modeclip.curation.metaclip import MetaclipConfig, probabilities, tail_share, threshold_at
from modeclip.curation.metadata import write_metadata
from modeclip.data.catalog import Catalog
from modeclip.data.selection import Selection
from modeclip.data.storage import FileWriter, append, create
from modeclip.errors import ModeclipError
from support import write_wordnet

ENTRIES = ["cat", "dog", "hot dog", "bird", "猫", "never"]


def make_captions(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    words = ["cat", "dog", "hot", "bird", "猫", "tree", "A", "of"]
    chances = [0.3, 0.2, 0.1, 0.02, 0.02, 0.2, 0.1, 0.06]
    return [" ".join(rng.choice(words, rng.integers(0, 5), p=chances)) for _ in range(count)]


def write(
    path: Path, captions: Sequence[str], languages: Sequence[str] = (), first: int = 0, size: int = 50
) -> Catalog:
    table = rows_of(first, len(captions), captions=captions)
    if languages:
        table = table.append_column("lang", pa.array(list(languages)))
    grows = path.exists()
    writer = FileWriter(str(path), table.schema, max_rows=size)
    writer.write(table)
    if grows:
        append(str(path), writer.finish(), METADATA)
    else:
        create(str(path), writer.schema.with_metadata(METADATA), writer.finish())
    return Catalog.open(path)


@pytest.fixture
def entries(tmp_path: Path) -> str:
    write_metadata(tmp_path / "entries.txt", ENTRIES)
    return str(tmp_path / "entries.txt")


def slow(captions: Sequence[str], t: float, scripts: bool = False) -> tuple[Counter[str], list[float]]:
    found = [[entry for entry in ENTRIES if pad(entry, scripts) in normalise(caption)] for caption in captions]
    counts = Counter(entry for some in found for entry in some)
    return counts, [1 - math.prod(1 - t / max(counts[entry], t) for entry in some) for some in found]


def column(curated: Curated, what: str) -> list[float]:
    return [float(value) for value in curated.column(what)]


def test_counts_and_probabilities_are_those_of_the_formula(tmp_path: Path, entries: str) -> None:
    captions = make_captions(300)
    counts, chances = slow(captions, 20)
    online = curate(write(tmp_path / "c.lance", captions), MetaclipConfig(entries=entries, t=20.0, online=True))
    np.testing.assert_allclose(column(online, "probability"), chances, rtol=1e-6)
    assert column(online, "cause") == [0 if chance else 1 for chance in chances]
    assert online.causes == {0: "kept", 1: "no entry matches", 255: "not in the selection"}
    offline = curate(online.catalog, MetaclipConfig(entries=entries, t=20.0), name="offline")
    causes = column(offline, "cause")
    assert all(cause == 1 for cause, chance in zip(causes, chances, strict=True) if chance == 0)
    assert all(cause == 0 for cause, chance in zip(causes, chances, strict=True) if chance == 1)
    assert set(causes) == {0, 1, 2}
    assert "offline_probability" not in offline.catalog.columns  # or training would draw once more
    matches, head, ranges = offline.prepared.tables
    kept = [caption for caption, cause in zip(captions, causes, strict=True) if cause == 0]
    after, _ = slow(kept, 20)
    assert matches.rows[0][:5] == ("all", "300", f"{sum(map(bool, chances))}", "5", "20")
    assert matches.rows[0][6:] == (f"{sum(chances):,.1f}", f"{len(kept):,}")
    top = counts.most_common(1)[0]
    assert head.rows[0] == (top[0], str(top[1]), f"{20 / top[1]:.4f}", str(after[top[0]]))
    assert sum(int(row[2]) for row in ranges.rows) == counts.total()
    assert sum(int(row[4]) for row in ranges.rows) == after.total()
    assert ranges.rows[0][:2] == ("none", "1")


def test_the_share_that_is_kept_is_that_of_the_formula(tmp_path: Path, entries: str) -> None:
    captions = make_captions(2000)
    _, chances = slow(captions, 40)
    catalog = write(tmp_path / "c.lance", captions, size=1000)
    kept = []
    for seed in range(5):
        kept.append(curate(catalog, MetaclipConfig(entries=entries, t=40.0, seed=seed), dry_run=True).column("kept"))
    deviation = math.sqrt(sum(chance * (1 - chance) for chance in chances) * len(kept))
    assert abs(np.sum(kept) - sum(chances) * len(kept)) < 4 * deviation  # 1 in 16,000 by chance, of fixed seeds
    drawn = np.array(chances) < 1
    for some in (drawn, ~drawn):
        deviation = math.sqrt(sum(chance * (1 - chance) for chance in np.array(chances)[some]) * len(kept))
        assert abs(np.sum(np.array(kept)[:, some]) - np.sum(np.array(chances)[some]) * len(kept)) <= 4 * deviation
    assert not (kept[0] == kept[1]).all()


def test_order_and_fragments_and_added_pairs_do_not_move_draws(tmp_path: Path, entries: str) -> None:
    captions = make_captions(200)
    config = MetaclipConfig(entries=entries, t=15)
    whole = curate(write(tmp_path / "a.lance", captions, size=200), config)
    parts = curate(write(tmp_path / "b.lance", captions, size=7), config)
    assert column(parts, "cause") == column(whole, "cause")
    before = dict(zip(captions, column(whole, "cause"), strict=True))
    grown = curate(write(tmp_path / "b.lance", ["tree", "tree"], first=200), config)  # which no entry matches
    assert column(grown, "cause") == [*column(whole, "cause"), 1, 1]
    assert len(before) > 20
    work = pickle.loads(pickle.dumps(whole.prepared.work))  # what a Ray worker gets
    block = {"key": np.array([f"key {n}" for n in range(200)], object), "caption": np.array(captions, object)}
    assert work(block)["metaclip_cause"].tolist() == column(whole, "cause")


def test_added_fragments_are_counted_alone(tmp_path: Path, entries: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from modeclip.curation import metaclip

    captions = make_captions(100)
    catalog = write(tmp_path / "c.lance", captions)
    config = MetaclipConfig(entries=entries, tail_share=0.3)
    curate(catalog, config)
    counted = []
    count = metaclip._Counts.__call__
    monkeypatch.setattr(metaclip._Counts, "__call__", lambda self, block: counted.append(block) or count(self, block))
    more = make_captions(30, seed=1)
    grown = curate(write(tmp_path / "c.lance", more, first=100), config)
    assert [len(block["caption"]) for block in counted] == [30]
    monkeypatch.undo()
    anew = curate(write(tmp_path / "d.lance", captions + more), config)
    assert column(grown, "cause") == column(anew, "cause")


def test_a_selection_is_balanced_by_itself(tmp_path: Path, entries: str) -> None:
    captions = make_captions(120)
    catalog = write(tmp_path / "c.lance", captions)
    catalog.add_columns({"even": np.arange(120) % 2 == 0})
    config = MetaclipConfig(entries=entries, t=10.0, online=True)
    curated = curate(catalog, config, selection=Selection(mask="even"))
    _, chances = slow(captions[::2], 10)
    np.testing.assert_allclose(column(curated, "probability")[::2], chances, rtol=1e-6)
    assert set(column(curated, "cause")[1::2]) == {255}


def test_each_language_has_its_own_t(tmp_path: Path, entries: str) -> None:
    english, japanese = make_captions(200), [f"猫{'cat' if n % 3 else 'dog'}の" if n % 4 else "犬" for n in range(100)]
    captions, languages = [*english, *japanese, "cat"], ["en"] * 200 + ["ja"] * 100 + [""]
    catalog = write(tmp_path / "c.lance", captions, languages)
    config = MetaclipConfig(entries=entries, t=20.0, language_column="lang", online=True)
    found = column(curate(catalog, config), "probability")
    counts, chances = slow(english, 20, scripts=True)
    np.testing.assert_allclose(found[:200], chances, rtol=1e-6)
    share = sum(count for count in counts.values() if count < 20) / counts.total()
    counts_ja, _ = slow(japanese, 1, scripts=True)
    assert counts_ja["猫"] == 75  # without spaces around it
    ordered = sorted(counts_ja.values())
    shares = np.cumsum(ordered) / sum(ordered)
    t = ordered[int(np.argmin(abs(shares - share)))]
    np.testing.assert_allclose(found[200:300], slow(japanese, t, scripts=True)[1], rtol=1e-6)
    assert found[300] == 1
    names = [row[0] for row in curate(catalog, config).prepared.tables[0].rows]
    assert names == ["en", "ja", "without a language"]
    with pytest.raises(ModeclipError, match=r"the language 'eng' \(known: , en, ja\)"):
        curate(catalog, MetaclipConfig(entries=entries, t=20.0, language_column="lang", english="eng"))


def test_each_language_has_its_own_entries(tmp_path: Path) -> None:
    (tmp_path / "entries").mkdir()
    write_metadata(tmp_path / "entries" / "en.txt", ["gift", "cat"])
    write_metadata(tmp_path / "entries" / "de.txt", ["Gift"])
    captions, languages = ["gift", "Gift", "gift", "Gift", "cat"], ["en", "en", "de", "de", "fr"]
    catalog = write(tmp_path / "c.lance", captions, languages)
    folder = str(tmp_path / "entries")
    curated = curate(catalog, MetaclipConfig(entries=folder, tail_share=0.5, language_column="lang"))
    assert column(curated, "cause") == [0, 1, 1, 0, 1]
    with pytest.raises(ModeclipError, match=r"entries for each language; give the column .* --language-column"):
        curate(catalog, MetaclipConfig(entries=folder))


def test_one_caption_of_an_image_is_chosen(tmp_path: Path, entries: str) -> None:
    captions = ["cat", "bird", "tree"] * 200
    table = rows_of(0, 600, captions=captions)
    images = [bytes([place // 3 % 256, place // 3 // 256] * 8) for place in range(600)]  # three captions each
    images[-3:] = [None] * 3  # of images without a digest, each has its own
    table = table.set_column(table.schema.names.index("digest"), "digest", pa.array(images, pa.binary(16)))
    writer = FileWriter(str(tmp_path / "c.lance"), table.schema, max_rows=70)
    writer.write(table)
    create(str(tmp_path / "c.lance"), writer.schema.with_metadata(METADATA), writer.finish())
    catalog = Catalog.open(tmp_path / "c.lance")
    config = MetaclipConfig(entries=entries, t=1000, one_caption=True)
    cause = np.reshape(column(curate(catalog, config), "cause"), (200, 3))
    assert cause[:, 2].tolist() == [1] * 200
    chosen = (cause == 0)[:199]
    assert chosen.sum(1).max() == 1  # at most one, since the third may be chosen and matches nothing
    assert (cause[:199, :2][~chosen[:, :2]] == 3).all()
    assert abs(chosen.sum(0)[:2] - 199 / 3).max() < 4 * math.sqrt(199 * 2 / 9)
    assert cause[199].tolist() == [0, 0, 1]
    online = curate(catalog, MetaclipConfig(entries=entries, t=1000, one_caption=True, online=True), name="online")
    found = np.reshape(column(online, "probability"), (200, 3))
    np.testing.assert_allclose(found[:199], np.tile([1 / 3, 1 / 3, 0], (199, 1)), rtol=1e-6)
    assert found[199].tolist() == [1, 1, 0]


def test_one_caption_is_chosen_of_an_image_whose_digest_is_unknown(tmp_path: Path, entries: str) -> None:
    table = rows_of(0, 60, captions=["cat", "cat bird", "bird"] * 20)
    columns = {
        "key": pa.array([f"k{n // 3}" + f"#{n % 3}" * (n % 3 > 0) for n in range(60)]),
        "path": pa.array([f"shard {n // 30}.tar" for n in range(60)]),
        "offset": pa.array([n // 3 % 10 * 512 for n in range(60)]),
        "digest": pa.array([None] * 60, pa.binary(16)),
    }
    for name, values in columns.items():
        kind = table.schema.field(name)
        table = table.set_column(table.schema.names.index(name), kind, values.cast(kind.type))
    writer = FileWriter(str(tmp_path / "c.lance"), table.schema, max_rows=25)
    writer.write(table)
    create(str(tmp_path / "c.lance"), writer.schema.with_metadata(METADATA), writer.finish())
    catalog, config = Catalog.open(tmp_path / "c.lance"), MetaclipConfig(entries=entries, t=1000, one_caption=True)
    cause = np.reshape(column(curate(catalog, config), "cause"), (20, 3))
    assert ((cause == 0).sum(1) == 1).all()


def test_languages_that_were_replaced_are_counted_anew(tmp_path: Path, entries: str) -> None:
    catalog = write(tmp_path / "c.lance", ["cat", "dog"] * 50, size=30)
    config = MetaclipConfig(entries=entries, t=1000, language_column="lang")
    for languages in (["en"] * 100, ["en"] * 60 + ["de"] * 40, ["de"] * 40 + ["en"] * 60):
        catalog = Catalog.open(catalog.path)
        catalog.add_columns({"lang": np.array(languages, object)})
        curated = curate(Catalog.open(catalog.path), config)
        shown = {row[0]: row[1] for row in curated.prepared.tables[0].rows}
        number = str(languages.count("en"))
        assert shown == ({"en": "60", "de": "40"} if "de" in languages else {"en": number})
        assert curated.num_computed == 100  # the counts of the last two are the same
    assert curate(Catalog.open(catalog.path), config).num_computed == 0


def test_the_curve_says_what_other_t_would_keep(tmp_path: Path, entries: str) -> None:
    captions = make_captions(300)
    catalog = write(tmp_path / "c.lance", captions)
    curated = curate(catalog, MetaclipConfig(entries=entries, t=17.0, curve=True), dry_run=True)
    curve = curated.prepared.charts[-1]
    assert curve.chosen == 17
    assert 17 in curve.x
    assert list(curve.x) == sorted(set(curve.x))
    table = curated.prepared.tables[-1]
    lines = zip(*curve.lines.values(), strict=True)
    for t, (kept, tail), row in zip(curve.x, lines, table.rows, strict=True):
        counts, chances = slow(captions, t)
        assert kept == pytest.approx(sum(chances) / 300)
        assert tail == pytest.approx(sum(count for count in counts.values() if count < t) / counts.total())
        assert row[:2] == (f"{t:,.10g}", f"{sum(chances):,.0f}")
    assert curve.lines["pairs kept"][-1] == pytest.approx(sum(slow(captions, 1e9)[1]) / 300)


@pytest.mark.parametrize("share", [0.06, 0.3, 0.9])
def test_t_by_the_share_of_the_tail(tmp_path: Path, entries: str, share: float) -> None:
    captions = make_captions(300)
    counts, _ = slow(captions, 1)
    values = np.array(list(counts.values()))
    t = threshold_at(values, share)
    nearest = min(abs(values[values <= other].sum() / values.sum() - share) for other in values)
    assert abs(values[values <= t].sum() / values.sum() - share) == pytest.approx(nearest)
    settings = {} if share == 0.06 else {"tail_share": share}
    curated = curate(write(tmp_path / "c.lance", captions), MetaclipConfig(entries=entries, online=True, **settings))
    np.testing.assert_allclose(column(curated, "probability"), slow(captions, t)[1], rtol=1e-6)
    assert tail_share(values, float(values.max() + 1)) == 1
    np.testing.assert_array_equal(probabilities(values, 1e9), 1)


def test_metadata_from_wordnet_and_from_the_captions(tmp_path: Path) -> None:
    folder = str(write_wordnet(tmp_path / "dict"))
    catalog = write(tmp_path / "c.lance", ["a mouse", "my tree", "my tree", "no. 7", "none"])
    curated = curate(catalog, MetaclipConfig(wordnet=folder))
    assert column(curated, "cause") == [0, 1, 1, 1, 1]
    corpus = MetaclipConfig(entries="corpus", wordnet=folder, min_count=2, min_pmi=2.0, t=9)
    assert column(curate(catalog, corpus), "cause") == [0, 0, 0, 0, 1]
    (tmp_path / "corpus.txt").write_text("none\n")
    (tmp_path / "titles.tsv").write_text("tree\t100\n")
    other = MetaclipConfig(
        entries=f"corpus:{tmp_path / 'corpus.txt'}",
        titles=str(tmp_path / "titles.tsv"),
        wordnet=folder,
        min_count=1,
        t=9,
    )
    assert column(curate(catalog, other), "cause") == [0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"t": 0.0}, "metaclip.t: expected a finite number above 0, got 0.0"),
        ({"t": math.nan}, "metaclip.t: expected a finite number"),
        ({"tail_share": 1.0}, "metaclip.tail_share: expected a share between 0 and 1, got 1.0"),
        ({"t": 1.0, "tail_share": 0.5}, "give one of them"),
        ({"seed": -1}, "metaclip.seed"),
        ({"min_count": 0}, "metaclip.min_count"),
        ({"min_pmi": math.nan}, "metaclip.min_pmi: expected a finite number, got nan"),
        ({"titles": "a.tsv"}, "titles are added to a corpus"),
        ({"language_column": "language"}, "unknown column .* 'language'"),
        ({"language_column": "caption"}, "column 'caption' holds string, no names of languages"),
        ({"language_column": "width"}, "column 'width' holds int32, no names of languages"),
        ({"entries": "none.txt"}, "metadata none.txt: no such file"),
        ({"entries": "corpus:none.txt", "wordnet": "{wordnet}"}, "none.txt: no such file"),
        ({"wordnet": "nowhere"}, "nowhere: no data.noun there; apt-get install"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, settings: dict[str, object], message: str) -> None:
    folder = write_wordnet(tmp_path / "dict")
    catalog = write(tmp_path / "c.lance", ["dog"])
    with pytest.raises(ModeclipError, match=message) as error:
        curate(
            catalog,
            MetaclipConfig(
                **{name: str(folder) if value == "{wordnet}" else value for name, value in settings.items()}
            ),
        )
    assert "\n" not in str(error.value)
    assert catalog.columns == Catalog.open(catalog.path).columns


def test_entries_that_stand_in_no_caption(tmp_path: Path, entries: str) -> None:
    catalog = write(tmp_path / "c.lance", ["Dogs", "Cats"])
    with pytest.raises(ModeclipError, match=r"none of 6 entries stands in any of 2 captions"):
        curate(catalog, MetaclipConfig(entries=entries))


def test_a_caption_that_is_missing_matches_nothing(tmp_path: Path, entries: str) -> None:
    catalog = write(tmp_path / "c.lance", ["dog", None, "cat"])  # type: ignore[list-item]
    assert column(curate(catalog, MetaclipConfig(entries=entries)), "cause") == [0, 1, 0]
