"""What explains a curation: counts, examples, head and tail, clusters; the same whatever the fragments."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pytest

from modeclip.curation import surveying
from modeclip.curation.comparing import compare
from modeclip.curation.curating import Curated, curate
from modeclip.curation.explaining import explain
from modeclip.curation.method import OUTSIDE, Context, Decided, Histogram, Prepared, Table, draw
from modeclip.curation.surveying import CaptionCounts, spread_of
from modeclip.data.catalog import FINGERPRINT, FORMAT, FORMAT_VERSION, PAIR_COLUMNS, Catalog
from modeclip.data.selection import Selection
from modeclip.data.storage import FileWriter, create
from modeclip.data.subsets import uids_of, write_uids
from modeclip.errors import ModeclipError
from support import unit_rows

ROWS = 300
RNG = np.random.default_rng(5)
CAPTIONS = [f"{('cat', 'dog', 'boat')[n % 3]} number {n // 4 % 20}" for n in range(ROWS)]
FINE = np.array([n % 3 for n in range(ROWS)], np.int32)


@dataclass(frozen=True, kw_only=True)
class ByLot:
    """Decides by lot, so that a test knows all of it."""

    method: ClassVar[str] = "lot"
    seed: int = 0

    def prepare(self, context: Context) -> Prepared:
        captions = context.catalog.read(["caption"])["caption"]
        cause, score, probability, new = decisions(captions)
        values = {"cause": cause, "score": score, "probability": probability, "caption": new}
        return Prepared(
            work=Decided(values={f"{context.name}_{what}": value for what, value in values.items()}, facts={"n": 1}),
            causes=("a dog", "no luck", "never"),
            tables=(Table(title="found", columns=("what", "number"), rows=(("dogs", "100"),)),),
            charts=(Histogram(title="lots", edges=(0.0, 0.5, 1.0), counts=(100, 200), threshold=0.5),),
        )


def decisions(captions: Sequence[str]) -> tuple[np.ndarray, ...]:
    number = np.arange(len(captions))
    cause = np.where([caption.startswith("dog") for caption in captions], 1, np.where(number % 7 == 0, 2, 0))
    probability = np.where(cause == 0, 0.25 + (number % 4) / 4, 0).astype(np.float32)
    new = np.array([f"{caption} ; boat , a vessel" if "boat" in caption else None for caption in captions], object)
    return cause.astype(np.uint8), (number % 10).astype(np.float32), probability, new


def write(path: Path, *, fragment_rows: int, captions: Sequence[str] = CAPTIONS) -> Catalog:
    count = len(captions)
    values = {
        "key": [f"key {n}" for n in range(count)],
        "caption": list(captions),
        "image": [b"no picture"] * count,
        "path": [None] * count,
        "offset": [0] * count,
        "size": [10] * count,
        "width": [16 + n % 40 for n in range(count)],
        "height": [0 if n == 9 else 40 for n in range(count)],
        "digest": [bytes(16)] * count,
        "group": ["a"] * count,
    }
    table = pa.table(values, schema=pa.schema([(name, PAIR_COLUMNS[name]) for name in values]))
    writer = FileWriter(str(path), table.schema, max_rows=fragment_rows)
    writer.write(table)
    create(str(path), table.schema.with_metadata({FORMAT: FORMAT_VERSION, FINGERPRINT: "f" * 32}), writer.finish())
    return Catalog.open(path)


@pytest.fixture(autouse=True)
def few_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count false negatives in a few batches, which takes most of the time else."""
    monkeypatch.setattr(surveying, "NUM_BATCHES", 4)


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """A catalog of seven fragments with clusters and embeddings."""
    catalog = write(tmp_path_factory.mktemp("pool") / "a.lance", fragment_rows=47)
    vectors = unit_rows(3, 8)[FINE] + 0.05 * unit_rows(ROWS, 8, 1)
    catalog.add_columns({"fine_cluster": FINE}, facts={"made_by": "test"})
    catalog.add_columns({"caption_embedding": vectors.astype(np.float32)}, facts={"made_by": "test"})
    return catalog


@pytest.fixture(scope="module")
def curated(catalog: Catalog) -> Curated:
    return curate(catalog, ByLot(), selection=Selection(where=("key <> 'key 5'",)))


def test_every_figure_is_that_of_a_slow_count(curated: Curated):
    cause, _, probability, new = decisions(CAPTIONS)
    cause[5] = OUTSIDE
    found = explain(curated)
    assert [group.count for group in (found.kept, *found.causes)] == [int((cause == code).sum()) for code in range(4)]
    assert [group.name for group in found.causes] == ["a dog", "no luck", "never"]
    assert found.num_selected == ROWS - 1
    assert found.num_kept == int((cause == 0).sum())
    assert found.num_expected == pytest.approx(float(probability[cause == 0].sum()))
    before, after, lengths, words = Counter[str](), Counter[str](), Counter[int](), Counter[str]()
    clusters = np.zeros((3, 2))
    for n in range(ROWS):
        if cause[n] == OUTSIDE:
            continue
        before[CAPTIONS[n]] += 1
        clusters[FINE[n], 0] += 1
        if cause[n] == 0:
            text = new[n] or CAPTIONS[n]
            after[text] += float(probability[n])  # type: ignore[assignment]
            clusters[FINE[n], 1] += probability[n]
            lengths[len(text)] += float(probability[n])  # type: ignore[assignment]
            for word in surveying.split_words(text):
                words[word] += float(probability[n])  # type: ignore[assignment]
    captions = found.survey.captions
    assert captions.is_exact
    for spread, counts in zip(captions.spreads, (before, after), strict=True):
        assert spread.total == pytest.approx(counts.total())
        assert spread.distinct == len(counts)
    for frequent in captions.frequent:
        assert frequent.counts == pytest.approx((before[frequent.text], after[frequent.text]))
    assert {text for text, _ in before.most_common(1)} <= {frequent.text for frequent in captions.frequent}
    assert any("vessel" in frequent.text for frequent in captions.frequent)
    assert {one.text: one.counts[1] for one in found.survey.words.frequent}["vessel"] == pytest.approx(words["vessel"])
    assert found.survey.clusters
    for cluster in found.survey.clusters.clusters:
        assert cluster.counts == pytest.approx(tuple(clusters[cluster.index]))
        expected = clusters[cluster.index, 0] * clusters[:, 1].sum() / clusters[:, 0].sum()
        assert cluster.change == pytest.approx(clusters[cluster.index, 1] - expected)
        assert ("cat", "dog", "boat")[cluster.index] == cluster.keywords[0]
    changes = [abs(cluster.change) for cluster in found.survey.clusters.clusters]
    assert changes == sorted(changes, reverse=True)
    caption_length, side, scores = found.survey.bins
    assert sum(caption_length.counts[1]) == pytest.approx(sum(lengths.values()))
    in_bin = sum(count for length, count in lengths.items() if 16 <= length < 23)
    assert caption_length.counts[1][caption_length.edges.index(16.0)] == pytest.approx(in_bin)
    assert sum(side.counts[0]) == ROWS - 2  # one has no known size, one is not in the selection
    assert sum(scores.counts[0]) == ROWS - 1
    assert (scores.edges[0], scores.edges[-1]) == (0.0, 9.0)
    assert [report.num_rows > 50 for report in found.survey.negatives] == [True, True]
    json.dumps(asdict(found), allow_nan=False)


def test_examples_are_ten_of_each_cause_and_do_not_depend_on_fragments(tmp_path: Path, curated: Curated):
    found = explain(curated)
    assert [len(group.pairs) for group in (found.kept, *found.causes)] == [10, 10, 10, 0]
    cause, score, probability, new = decisions(CAPTIONS)
    for code, group in enumerate((found.kept, *found.causes)):
        assert len({pair.row for pair in group.pairs}) == len(group.pairs)
        for pair in group.pairs:
            assert cause[pair.row] == code
            assert (pair.key, pair.caption) == (f"key {pair.row}", CAPTIONS[pair.row])
            assert (pair.score, pair.probability) == (score[pair.row], probability[pair.row])
            assert pair.new_caption == new[pair.row]
    other = write(tmp_path / "b.lance", fragment_rows=1000)
    again = explain(curate(other, ByLot(), selection=Selection(where=("key <> 'key 5'",)), dry_run=True))
    assert asdict(again.kept) == asdict(found.kept)
    assert [asdict(group) for group in again.causes] == [asdict(group) for group in found.causes]
    assert asdict(again.survey.captions) == asdict(found.survey.captions)
    assert not again.is_written
    assert "lot_kept" not in Catalog.open(other.path).columns
    assert explain(curated, seed=1).kept.pairs != found.kept.pairs


def test_examples_do_not_follow_the_draws_of_a_method_with_the_same_seed(tmp_path: Path):
    catalog = write(tmp_path / "a.lance", fragment_rows=500)
    lots = draw(0, [f"key {n}" for n in range(ROWS)], CAPTIONS)
    values = {"lot_cause": (lots > 0.5).astype(np.uint8)}
    prepared = Prepared(work=Decided(values=values, facts={}), causes=("no luck",))
    made = Curated(catalog=catalog, name="lot", method=ByLot(), prepared=prepared, num_computed=ROWS, values=values)
    shown = lots[[pair.row for pair in explain(made).kept.pairs]]
    assert shown.max() > 0.2  # the ten smallest lots are all below 0.05


def test_without_clusters_or_embeddings_it_says_what_to_do(tmp_path: Path):
    catalog = write(tmp_path / "a.lance", fragment_rows=100)
    found = explain(curate(catalog, ByLot(), dry_run=True)).survey
    assert (found.clusters, found.negatives) == (None, ())
    assert len(found.notes) == 1
    assert f"modeclip embed {catalog.path}" in found.notes[0]
    groups = np.arange(ROWS) % 2  # other ones than the causes know
    catalog.add_columns({"caption_embedding": unit_rows(2, 4)[groups].astype(np.float32)}, facts={"made_by": "test"})
    fitted = explain(curate(catalog, ByLot(), dry_run=True)).survey
    assert fitted.clusters
    assert "k-means" in fitted.clusters.origin
    assert fitted.clusters.num_pairs == ROWS
    assert sorted(cluster.counts[0] for cluster in fitted.clusters.clusters) == [150, 150]
    assert len(fitted.negatives) == 2


def gini(counts: Sequence[float]) -> float:
    differences = sum(abs(a - b) for a, b in itertools.product(counts, counts))
    return differences / (2 * len(counts) * sum(counts))


@pytest.mark.parametrize("counts", [[1.0], [3.0, 0.0, 3.0], [1.0, 2.0, 3.0, 10.0], list(RNG.integers(1, 60, 250))])
def test_the_spread_of_texts_is_that_of_its_definition(counts: list[float]):
    spread = spread_of(np.array(counts, float))
    own = sorted((float(count) for count in counts if count), reverse=True)
    assert spread.distinct == len(own)
    assert spread.gini == pytest.approx(gini(own))
    assert spread.head == pytest.approx(sum(own[: math.ceil(len(own) / 100)]) / sum(own))
    assert spread.once == pytest.approx(sum(count <= 1 for count in own) / len(own))
    assert math.log(spread.effective) == pytest.approx(-sum(c / sum(own) * math.log(c / sum(own)) for c in own))
    twice = spread_of(np.repeat(counts, 2).astype(float))
    weighted = spread_of(np.array(counts, float), np.full(len(counts), 2.0))
    assert weighted.gini == pytest.approx(twice.gini)
    assert weighted.effective == pytest.approx(twice.effective)


def test_more_captions_than_fit_are_estimated_in_bounded_memory(catalog: Catalog):
    ranks = np.arange(1, 20_001)
    numbers = np.concatenate([np.repeat(ranks, np.maximum(1, 4000 // ranks)), np.arange(30_000, 60_000)])
    RNG.shuffle(numbers)
    texts = np.array([f"text {number}" for number in numbers], object)
    exact = spread_of(np.unique(numbers, return_counts=True)[1].astype(float))
    counts = CaptionCounts(1, limit=8192)
    for start in range(0, len(texts), 1000):
        block = texts[start : start + 1000]
        counts.add(block, block, np.ones((len(block), 1)), np.zeros(len(block), np.int64))
    found = counts.finish(catalog)
    assert len(counts._hashes) <= 8192
    assert not found.is_exact
    (spread,) = found.spreads
    assert spread.distinct == pytest.approx(exact.distinct, rel=0.1)
    assert spread.total == pytest.approx(len(texts), rel=0.1)
    assert spread.head == pytest.approx(exact.head, abs=0.03)
    assert spread.gini == pytest.approx(exact.gini, abs=0.03)
    assert found.frequent[0].counts[0] == pytest.approx(4000, rel=0.02)


# two selections


def test_a_comparison_counts_what_two_sets_share(tmp_path: Path, curated: Curated):
    catalog = curated.catalog
    mine = np.arange(ROWS) % 2 == 0
    catalog.add_columns({"mine": mine}, facts={"made_by": "test"})
    kept = catalog.read(["lot_kept"])["lot_kept"]
    found = compare(catalog, "lot", "mine")
    sizes = [(kept & mine).sum(), (kept & ~mine).sum(), (mine & ~kept).sum(), (~mine & ~kept).sum()]
    assert [group.count for group in found.groups] == sizes
    assert found.counts == (kept.sum(), mine.sum())
    assert found.jaccard == pytest.approx(sizes[0] / sum(sizes[:3]))
    for group, belongs in zip(found.groups, (kept & mine, kept & ~mine, mine & ~kept, ~mine & ~kept), strict=True):
        assert len(group.pairs) == min(10, belongs.sum())
        assert all(belongs[pair.row] for pair in group.pairs)
    assert found.survey.clusters
    for cluster in found.survey.clusters.clusters:
        own = cluster.index == FINE
        assert cluster.counts == (own.sum(), (own & kept).sum(), (own & mine).sum())
    write_uids(tmp_path / "mine.npy", uids_of(catalog, np.flatnonzero(mine)))
    again = compare(catalog, "lot_kept", str(tmp_path / "mine.npy"))
    assert [group.count for group in again.groups] == sizes
    assert [group.pairs for group in again.groups] == [group.pairs for group in found.groups]
    same = compare(catalog, "mine", "mine")
    assert same.jaccard == 1
    assert same.survey.sides == ("all pairs", "mine (1)", "mine (2)")
    json.dumps(asdict(found), allow_nan=False)


@pytest.mark.parametrize(
    ("name", "parts"),
    [("nobody", ["nobody", "lot_kept"]), ("caption", ["'caption'", "string", "booleans"]), ("no.npy", ["no.npy"])],
)
def test_what_is_no_selection_is_refused(curated: Curated, name: str, parts: list[str]):
    with pytest.raises(ModeclipError) as error:
        compare(curated.catalog, "lot", name)
    assert "\n" not in str(error.value)
    assert all(part in str(error.value) for part in parts)


def test_a_seed_that_is_none_is_refused(curated: Curated):
    with pytest.raises(ModeclipError, match="-1"):
        compare(curated.catalog, "lot", "lot", seed=-1)


def test_a_selection_without_pairs_is_refused(tmp_path: Path):
    catalog = write(tmp_path / "a.lance", fragment_rows=100)
    catalog.add_columns({"none_kept": np.zeros(ROWS, bool)}, facts={"made_by": "test"})
    with pytest.raises(ModeclipError, match="none_kept"):
        compare(catalog, "none", "none")
