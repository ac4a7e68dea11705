"""Clustering of real icon names, embedded cheaply, against oracles that look at all rows at once."""

from __future__ import annotations

import json
import math
import pickle
import re
import shutil
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
from PIL import Image

import modeclip.clustering.fitting as clustering_module
from modeclip.clustering.cards import NUM_KEYWORDS, NUM_NEAREST, NUM_RANDOM, Tally, pick_keywords
from modeclip.clustering.clusters import Clustering
from modeclip.clustering.controls import add_controls, cluster_in_one_step
from modeclip.clustering.diagnostics import DiagnoseConfig, diagnose
from modeclip.clustering.distances import assign_nearest
from modeclip.clustering.fitting import (
    AssignWork,
    ClusterConfig,
    ClusterResult,
    apply,
    cluster,
    count_pairs,
    fit,
    regroup,
)
from modeclip.clustering.novelty import fitted_quantiles
from modeclip.data.catalog import Catalog
from modeclip.data.indexing import index
from modeclip.data.samples import Sample
from modeclip.data.selection import Selection
from modeclip.data.sources import DataConfig
from modeclip.data.sources.icons import read_icons
from modeclip.data.storage import append
from modeclip.errors import ModeclipError
from support import plain_png, write_pairs

CONFIG = ClusterConfig(num_fine=24, num_experts=3)
DIMENSION = 64


def embed_cheaply(captions: np.ndarray) -> np.ndarray:
    """Return unit vectors of hashed character trigrams: what is spelt alike is near."""
    vectors = np.zeros((len(captions), DIMENSION), np.float32)
    for row, caption in enumerate(captions):
        padded = f"  {caption} "
        for i in range(len(padded) - 2):
            digest = crc32(padded[i : i + 3].encode())
            vectors[row, digest % DIMENSION] += 1 if digest & 1 << 20 else -1
        vectors[row, len(caption) % DIMENSION] += 0.1
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A catalog of some hundred pairs with names of real icons, some of them several times, and embeddings."""
    folder = tmp_path_factory.mktemp("pairs")
    samples = (sample for sample in read_icons(("octicons",), 8) if isinstance(sample, Sample))
    lines = []
    for number, sample in enumerate(islice(samples, 240)):
        Image.new("RGB", (4, 4), (number % 256, 0, 0)).save(folder / f"{number}.png")
        lines += [f"{number}.png\t{sample.caption}"] * (1 + number % 3)
    (folder / "pairs.tsv").write_text("filepath\ttitle\n" + "\n".join(lines) + "\n", encoding="utf-8")
    out = tmp_path_factory.mktemp("catalogs")
    index(DataConfig(source=str(folder / "pairs.tsv")), out)
    catalog = Catalog.open(out / "catalog.lance")
    catalog.add_columns({"caption_embedding": embed_cheaply(catalog.read(["caption"])["caption"])})
    return out / "catalog.lance"


@pytest.fixture
def catalog(embedded: Path, tmp_path: Path) -> Catalog:
    """A copy that may be changed."""
    return Catalog.open(shutil.copytree(embedded, tmp_path / "catalog.lance"))


@pytest.fixture(scope="module")
def done(embedded: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Catalog, ClusterResult]:
    """A clustered catalog and the result; not to be changed."""
    copy = Catalog.open(shutil.copytree(embedded, tmp_path_factory.mktemp("done") / "catalog.lance"))
    return copy, cluster(copy, CONFIG)


def all_distances(x: np.ndarray, centers: np.ndarray) -> np.ndarray:
    return np.sqrt(np.square(x[:, None].astype(np.float64) - centers[None]).sum(2))


@pytest.mark.parametrize("fit_samples", [2_000_000, 100])
def test_selected_pairs_are_clustered_as_if_there_were_no_others(
    embedded: Path, tmp_path: Path, fit_samples: int
) -> None:
    """The oracle is a catalog of which the other rows were removed. All rows are assigned, only selected ones count."""
    whole, less = (Catalog.open(shutil.copytree(embedded, tmp_path / name)) for name in ("a.lance", "b.lance"))
    gone, kept = [range(30, 90), range(200, 300)], np.ones(len(whole), bool)
    for rows in gone:
        kept[rows.start : rows.stop] = False
    append(less.path, [], less.metadata, dropped=gone)
    less = Catalog.open(less.path)
    assert len(less) == kept.sum()
    whole.add_columns({"good": kept}, facts={"method": "test"})
    config, selection = replace(CONFIG, fit_samples=fit_samples), Selection(mask="good")
    found, expected = cluster(whole, config, selection=selection), cluster(less, config)
    assert found.clustering.digest == expected.clustering.digest
    assert found.experts == expected.experts
    assert (found.imbalance, found.objective) == (expected.imbalance, expected.objective)
    place = np.flatnonzero(kept)
    for card, other in zip(found.fine, expected.fine, strict=True):
        rows = {name: tuple(place[list(getattr(other, name))].tolist()) for name in ("nearest_rows", "random_rows")}
        assert card == replace(other, **rows)
    fine = whole.read(["fine_cluster"])["fine_cluster"]
    assert (fine[kept] == less.read(["fine_cluster"])["fine_cluster"]).all()
    assert (
        fine == assign_nearest(embed_cheaply(whole.read(["caption"])["caption"]), found.clustering.fine_centers)[0]
    ).all()
    same = fitted_quantiles(less, CONFIG.num_fine).distances
    np.testing.assert_array_equal(fitted_quantiles(whole, CONFIG.num_fine, selection).distances, same)
    assert count_pairs(whole, 3, selection=selection).tolist() == [card.size for card in found.experts]
    what = DiagnoseConfig(num_batches=4, batch_size=32)
    assert diagnose(whole, found, config, what, selection=selection) == diagnose(less, expected, config, what)
    add_controls(whole, ["random", "one-step"], config, tmp_path, selection)
    for column in ("random_expert", "one_step_expert"):
        sizes = np.bincount(whole.read([column])[column][kept], minlength=3)
        assert column != "random_expert" or sizes.tolist() == [card.size for card in found.experts]
    assert Clustering.load(tmp_path / "one-step").digest == cluster_in_one_step(less, config, tmp_path / "x").digest


def test_every_row_goes_to_its_nearest_centre_and_that_ones_expert(done: tuple[Catalog, ClusterResult]) -> None:
    catalog, result = done
    columns = catalog.read(["caption_embedding", "fine_cluster", "fine_distance", "expert"])
    expected = all_distances(columns["caption_embedding"], result.clustering.fine_centers).argmin(1)
    np.testing.assert_array_equal(columns["fine_cluster"], expected)
    distances = all_distances(columns["caption_embedding"], result.clustering.fine_centers).min(1)
    np.testing.assert_allclose(columns["fine_distance"], distances, rtol=1e-5)
    np.testing.assert_array_equal(columns["expert"], result.clustering.expert_of_fine[expected])
    assert columns["fine_cluster"].dtype == columns["expert"].dtype == np.int32
    assert columns["fine_distance"].dtype == np.float32
    assert result.clustering.fine_centers.shape == (24, DIMENSION)


def test_equal_captions_share_a_cluster(done: tuple[Catalog, ClusterResult]) -> None:
    columns = done[0].read(["caption", "fine_cluster"])
    of_caption: dict[str, set[int]] = {}
    for caption, fine in zip(columns["caption"], columns["fine_cluster"], strict=True):
        of_caption.setdefault(caption, set()).add(fine)
    assert max(len(found) for found in of_caption.values()) == 1


def test_fine_cards(done: tuple[Catalog, ClusterResult]) -> None:
    catalog, result = done
    columns = catalog.read(["caption", "caption_embedding", "fine_cluster"])
    distances = all_distances(columns["caption_embedding"], result.clustering.fine_centers)
    for position, card in enumerate(result.fine):
        rows = np.flatnonzero(columns["fine_cluster"] == position)
        assert card.index == position
        assert card.size == len(rows) > 0
        assert card.expert == result.clustering.expert_of_fine[position]
        assert card.radius == pytest.approx(distances[rows, position].mean(), rel=1e-5)
        nearest = rows[np.argsort(distances[rows, position], kind="stable")]
        distinct = list(dict.fromkeys(columns["caption"][nearest]))[:NUM_NEAREST]
        assert list(card.nearest_captions) == distinct
        assert list(columns["caption"][list(card.nearest_rows)]) == distinct
        assert card.nearest_rows[0] == nearest[0]
        assert card.radius_90 == pytest.approx(np.quantile(distances[rows, position], 0.9), rel=1e-5)
        assert len(set(card.random_rows)) == min(NUM_RANDOM, len(rows))
        assert set(card.random_rows) <= set(rows.tolist())
        assert card.experts == (card.expert,)
    squared = distances.min(1) ** 2
    assert result.objective == pytest.approx(squared.mean(), rel=1e-5)


def test_expert_cards(done: tuple[Catalog, ClusterResult]) -> None:
    catalog, result = done
    columns = catalog.read(["expert", "fine_distance"])
    sizes = np.bincount(columns["expert"])
    clustering = result.clustering
    for position, card in enumerate(result.experts):
        own = clustering.fine_centers[clustering.expert_of_fine == position].astype(np.float64)
        assert (card.index, card.size, card.num_fine) == (position, sizes[position], len(own))
        assert card.range == pytest.approx(np.linalg.norm(own - own.mean(0), axis=1).mean(), rel=1e-5)
        np.testing.assert_allclose(clustering.coarse_centers[position], own.mean(0), atol=1e-6)
        distances = columns["fine_distance"][columns["expert"] == position]
        assert card.radius == pytest.approx(distances.mean(), rel=1e-5)
        assert card.radius_90 == pytest.approx(np.quantile(distances, 0.9), rel=1e-5)
    assert result.imbalance == pytest.approx(sizes.max() * 3 / sizes.sum())
    ranges = [card.range for card in result.experts]
    assert ranges == sorted(ranges, reverse=True)
    np.testing.assert_allclose(clustering.range_of_expert, ranges)
    assert max(card.num_fine for card in result.experts) <= math.ceil(1.25 * 24 / 3)


def keywords_by_hand(inside: Counter[str], corpus: Counter[str]) -> list[str]:
    """Monroe et al. 2008, equations 16, 20 and 22, a word at a time."""
    outside = corpus - inside
    score = {}
    for word in inside:
        prior = 500 * corpus[word] / corpus.total()
        a, b = inside[word] + prior, outside[word] + prior
        own = math.log(a / (inside.total() + 500 - a))
        other = math.log(b / (outside.total() + 500 - b))
        score[word] = (own - other) / math.sqrt(1 / a + 1 / b)
    ranked = sorted(score, key=lambda word: (-round(score[word], 9), word))
    return [word for word in ranked[:NUM_KEYWORDS] if score[word] > 0]


def test_keywords(done: tuple[Catalog, ClusterResult]) -> None:
    catalog, result = done
    columns = catalog.read(["caption", "fine_cluster", "expert"])
    words = [re.findall(r"[a-z0-9]{2,}", caption.lower()) for caption in columns["caption"]]
    corpus = Counter(word for caption in words for word in caption)
    for name, cards in (("fine_cluster", result.fine), ("expert", result.experts)):
        for card in cards:
            inside = Counter(word for row in np.flatnonzero(columns[name] == card.index) for word in words[row])
            assert list(card.keywords) == keywords_by_hand(inside, corpus)
    assert any(card.keywords for card in result.fine)


def test_keywords_leave_out_what_is_common_everywhere() -> None:
    corpus = Counter({"arrow": 50, "icon": 1000, "left": 30, "zebra": 1})
    assert pick_keywords(Counter({"icon": 40, "arrow": 48, "left": 20, "zebra": 1}), corpus)[:2] == ("arrow", "left")
    assert "icon" not in pick_keywords(Counter({"icon": 4, "arrow": 48}), corpus)
    assert pick_keywords(Counter(), corpus) == ()


@pytest.mark.parametrize("rows_at_once", [1, 7, 100])
def test_blocks_do_not_matter(
    rows_at_once: int, catalog: Catalog, done: tuple[Catalog, ClusterResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clustering_module, "ROWS_AT_ONCE", rows_at_once)
    result = cluster(catalog, CONFIG)
    assert [card.keywords for card in result.experts] == [card.keywords for card in done[1].experts]
    for card, expected in zip(result.fine, done[1].fine, strict=True):
        assert card.nearest_captions == expected.nearest_captions
        assert (card.size, card.keywords) == (expected.size, expected.keywords)
        assert (card.nearest_rows, card.random_rows) == (expected.nearest_rows, expected.random_rows)
        assert card.radius == pytest.approx(expected.radius)
    for name in ("fine_cluster", "expert"):
        np.testing.assert_array_equal(catalog.read([name])[name], done[0].read([name])[name])


def test_nearest_captions_across_blocks() -> None:
    tally = Tally(1, np.arange(9))
    for distance, captions in (([2, 3, 1], "abc"), ([1, 0, 4], "cde"), ([5, 6, 1], "afg")):
        tally.add(np.zeros(3, np.int32), np.array(distance, np.float32), np.array(list(captions), object))
    assert tally.nearest == [[(0.0, "d", 4), (1.0, "c", 2), (1.0, "g", 8), (2.0, "a", 0), (3.0, "b", 1)]]
    assert tally.sizes.tolist() == [9]
    assert tally.squares == sum(d * d for d in (2, 3, 1, 1, 0, 4, 5, 6, 1))


def test_words_and_distances_are_those_of_the_sample() -> None:
    tally = Tally(2, np.array([1, 4]))
    for fine, distance, captions in (([0, 1], [1, 2], ["aa", "bb"]), ([1, 0, 1], [3, 4, 5], ["cc", "dd", "ee bb"])):
        tally.add(np.array(fine, np.int32), np.array(distance, np.float32), np.array(captions, object))
    assert tally.words == [Counter(), Counter(bb=2, ee=1)]
    fine, distance = tally.sampled()
    assert (fine.tolist(), distance.tolist()) == ([1, 1], [2, 5])


def test_random_rows_are_uniform_and_do_not_depend_on_the_blocks() -> None:
    rows, times = 20, 500
    counts = np.zeros(rows)
    for seed in range(times):
        whole, parts = Tally(1, np.arange(0), seed), Tally(1, np.arange(0), seed)
        whole.add(np.zeros(rows, np.int32), np.ones(rows, np.float32), np.full(rows, "a", object))
        for size in (1, 12, 7):
            parts.add(np.zeros(size, np.int32), np.ones(size, np.float32), np.full(size, "a", object))
        (drawn,) = whole.random_rows()
        assert parts.random_rows() == [drawn]
        counts[list(drawn)] += 1
    share = NUM_RANDOM / rows
    assert np.abs(counts / times - share).max() < 5 * math.sqrt(share * (1 - share) / times)


# overlapping experts and other numbers of them


def test_overlapping_experts(catalog: Catalog, done: tuple[Catalog, ClusterResult]) -> None:
    result = cluster(catalog, replace(CONFIG, overlap=2))
    clustering, plain = result.clustering, done[1].clustering
    np.testing.assert_array_equal(clustering.expert_of_fine, plain.expert_of_fine)
    np.testing.assert_array_equal(clustering.coarse_centers, plain.coarse_centers)
    distances = all_distances(clustering.fine_centers, clustering.coarse_centers)
    for fine, (first, second) in enumerate(clustering.experts_of_fine.tolist()):
        others = [k for k in range(3) if k != first]
        assert second == min(others, key=lambda k: distances[fine, k])
    columns = catalog.read(["fine_cluster", "expert"])
    assert columns["expert"].dtype == np.int32
    np.testing.assert_array_equal(columns["expert"], clustering.experts_of_fine[columns["fine_cluster"]])
    for card in result.experts:
        rows = np.flatnonzero((columns["expert"] == card.index).any(1))
        assert card.size == len(rows)
        np.testing.assert_array_equal(catalog.select(expert=card.index), rows)
    assert sum(card.size for card in result.experts) == 2 * len(catalog)
    assert [card.experts for card in result.fine] == [tuple(pair) for pair in clustering.experts_of_fine.tolist()]
    np.testing.assert_array_equal(clustering.range_of_expert, plain.range_of_expert)
    cluster(catalog, CONFIG)
    assert catalog.read(["expert"])["expert"].shape == (len(catalog),)


def test_every_expert_overlaps(catalog: Catalog) -> None:
    clustering = fit(catalog, replace(CONFIG, overlap=3))
    np.testing.assert_array_equal(np.sort(clustering.experts_of_fine, axis=1), np.tile(np.arange(3), (24, 1)))


@pytest.mark.parametrize("num_experts", [1, 2, 5, 24])
def test_regrouping_equals_a_fit_with_that_number(
    num_experts: int, catalog: Catalog, done: tuple[Catalog, ClusterResult]
) -> None:
    regrouped = regroup(done[1].clustering, num_experts, CONFIG)
    refitted = fit(catalog, replace(CONFIG, num_experts=num_experts))
    assert regrouped.digest == refitted.digest


def test_too_many_experts_for_the_fine_clusters(done: tuple[Catalog, ClusterResult]) -> None:
    with pytest.raises(ModeclipError, match=r"num_experts: expected 1 .*24, got 25"):
        regroup(done[1].clustering, 25, CONFIG)


def test_applying_a_regrouped_clustering(catalog: Catalog, done: tuple[Catalog, ClusterResult]) -> None:
    result = apply(catalog, regroup(done[1].clustering, 5, CONFIG), CONFIG)
    assert [card.size for card in result.fine] == [card.size for card in done[1].fine]
    np.testing.assert_array_equal(np.bincount(catalog.read(["expert"])["expert"]), [c.size for c in result.experts])


def test_the_assignment_is_the_same_whole_in_parts_and_after_pickling(done: tuple[Catalog, ClusterResult]) -> None:
    catalog, result = done
    work = pickle.loads(pickle.dumps(AssignWork(clustering=result.clustering, facts={})))
    x = catalog.read(["caption_embedding"])["caption_embedding"]
    parts = [work({"caption_embedding": x[start : start + 37]}) for start in range(0, len(x), 37)]
    for name, expected in catalog.read(work.outputs).items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), expected)
    of_embedding = catalog.facts("caption_embedding")
    assert catalog.facts("expert") == {"clustering": result.clustering.digest, "embedding": of_embedding}


def test_same_seed_same_bytes(catalog: Catalog, done: tuple[Catalog, ClusterResult], tmp_path: Path) -> None:
    cluster(catalog, CONFIG).save(tmp_path / "again")
    done[1].save(tmp_path / "first")
    for name in ("clustering.safetensors", "cards.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()


def test_clustering_again_replaces_the_columns(catalog: Catalog) -> None:
    cluster(catalog, CONFIG)
    result = cluster(catalog, ClusterConfig(num_fine=5, num_experts=2, seed=1))
    fine = catalog.read(["fine_cluster"])["fine_cluster"]
    np.testing.assert_array_equal(np.bincount(fine), [card.size for card in result.fine])
    assert catalog.columns.count("expert") == 1


def test_fit_sees_a_uniform_sample(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = []
    original = clustering_module.kmeans

    def spy(x: np.ndarray, num_clusters: int, **options: object) -> object:
        fitted.append(x)
        return original(x, num_clusters, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(clustering_module, "kmeans", spy)
    config = ClusterConfig(num_fine=8, num_experts=8, fit_samples=100, seed=2)
    result = cluster(catalog, config)
    every = catalog.read(["caption_embedding"])["caption_embedding"].astype(np.float32)
    rows = np.sort(np.random.default_rng(2).choice(len(catalog), 100, replace=False))
    np.testing.assert_array_equal(fitted[0], every[rows])
    assert sum(card.size for card in result.fine) == len(catalog)
    assert [card.num_fine for card in result.experts] == [1] * 8
    assert [card.range for card in result.experts] == [0.0] * 8
    np.testing.assert_array_equal(result.clustering.expert_of_fine, np.arange(8))  # equal ranges: by fine cluster


def test_one_expert(catalog: Catalog) -> None:
    result = cluster(catalog, ClusterConfig(num_fine=4, num_experts=1, max_size_ratio=None, max_expert_ratio=None))
    assert result.imbalance == 1
    assert set(catalog.read(["expert"])["expert"].tolist()) == {0}


# files


def test_save_and_load(done: tuple[Catalog, ClusterResult], tmp_path: Path) -> None:
    result = done[1]
    result.save(tmp_path / "new" / "clusters")
    loaded = Clustering.load(tmp_path / "new" / "clusters")
    for name in ("fine_centers", "experts_of_fine", "coarse_centers"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(result.clustering, name))
        assert getattr(loaded, name).dtype == getattr(result.clustering, name).dtype
    assert (loaded.num_fine, loaded.num_experts) == (24, 3)
    cards = json.loads((tmp_path / "new" / "clusters" / "cards.json").read_text(encoding="utf-8"))
    assert list(cards) == ["fine", "experts", "imbalance", "objective"]
    assert cards["fine"][3]["nearest_captions"] == list(result.fine[3].nearest_captions)
    assert cards["experts"][0]["range"] == result.experts[0].range
    assert sorted(path.name for path in (tmp_path / "new" / "clusters").iterdir()) == [
        "cards.json",
        "clustering.safetensors",
        "config.json",
    ]


def test_a_result_is_what_it_was(done: tuple[Catalog, ClusterResult], tmp_path: Path) -> None:
    done[1].save(tmp_path)
    loaded = ClusterResult.load(tmp_path)
    assert (loaded.fine, loaded.experts) == (done[1].fine, done[1].experts)
    assert (loaded.imbalance, loaded.objective) == (done[1].imbalance, done[1].objective)
    assert loaded.clustering.digest == done[1].clustering.digest


def test_a_file_of_the_first_format(done: tuple[Catalog, ClusterResult], tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    clustering = done[1].clustering
    tensors = {name: getattr(clustering, name).copy() for name in ("fine_centers", "expert_of_fine", "coarse_centers")}
    save_file(tensors, tmp_path / "clustering.safetensors", metadata={"modeclip.clustering": "1"})
    loaded = Clustering.load(tmp_path)
    assert (loaded.overlap, loaded.digest) == (1, clustering.digest)


@pytest.mark.parametrize("content", [None, "", "[]", '{"fine": [{"index": 0}]}'])
def test_damaged_cards(content: str | None, done: tuple[Catalog, ClusterResult], tmp_path: Path) -> None:
    done[1].save(tmp_path)
    path = tmp_path / "cards.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ModeclipError, match=r"cards\.json: .*cluster again"):
        ClusterResult.load(tmp_path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ModeclipError, match=r"no clustering at .*clustering\.safetensors.*modeclip cluster"):
        Clustering.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a tensor", "cut"])
def test_damaged_file(content: bytes | str, done: tuple[Catalog, ClusterResult], tmp_path: Path) -> None:
    done[1].save(tmp_path)
    path = tmp_path / "clustering.safetensors"
    path.write_bytes(path.read_bytes()[:-100] if isinstance(content, str) else content)
    with pytest.raises(ModeclipError, match=r"clustering\.safetensors' is damaged.*cluster again"):
        Clustering.load(tmp_path)


def test_file_of_another_kind(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"weight": np.zeros(3)}, tmp_path / "clustering.safetensors")
    with pytest.raises(ModeclipError, match=r"format 2.*got format none.*cluster again"):
        Clustering.load(tmp_path)


# mistakes


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_fine": 0}, "cluster.num_fine: expected 1 or more, got 0"),
        ({"num_experts": 0}, "cluster.num_experts: expected 1 or more, got 0"),
        ({"num_iterations": -1}, "cluster.num_iterations: expected 0 or more, got -1"),
        ({"seed": -1}, "cluster.seed: expected 0 or more, got -1"),
        ({"max_size_ratio": 0.5}, "cluster.max_size_ratio: expected 1 or more, .*no limit, got 0.5"),
        ({"max_expert_ratio": 0.5}, "cluster.max_expert_ratio: expected 1 or more, .*no limit, got 0.5"),
        (
            {"num_fine": 4, "num_experts": 5},
            r"cluster\.num_experts: expected at most num_fine.*4, got 5",
        ),
        ({"overlap": 0}, r"cluster\.overlap: expected 1 to num_experts.*4, got 0"),
        ({"overlap": 5}, r"cluster\.overlap: expected 1 to num_experts.*4, got 5"),
        ({"num_fine": 256, "fit_samples": 9}, r"cluster\.fit_samples: expected at least num_fine.*256, got 9"),
    ],
)
def test_mistakes_in_the_config(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ModeclipError, match=message):
        ClusterConfig(**fields)  # type: ignore[arg-type]


def test_fewer_captions_than_clusters(catalog: Catalog) -> None:
    distinct = len(set(catalog.read(["caption"])["caption"]))
    with pytest.raises(ModeclipError, match=rf"num_fine is 400.*only {distinct} .*set num_fine to {distinct} or less"):
        cluster(catalog, ClusterConfig(num_fine=400))
    assert "expert" not in catalog.columns


def test_fewer_captions_than_clusters_in_the_sample(catalog: Catalog) -> None:
    with pytest.raises(ModeclipError, match=r"num_fine.*30 rows sampled.*or less.*raise fit_samples$"):
        cluster(catalog, ClusterConfig(num_fine=30, fit_samples=30))


def test_catalog_without_embeddings(tmp_path: Path) -> None:
    index(DataConfig(source=str(write_pairs(tmp_path / "pairs", [plain_png()], ["a caption"]))), tmp_path)
    with pytest.raises(ModeclipError, match=r"no column caption_embedding.*embed its captions"):
        cluster(Catalog.open(tmp_path / "catalog.lance"), CONFIG)


@pytest.mark.parametrize("fit_samples", [24, 2_000_000])
def test_embeddings_with_nan(catalog: Catalog, fit_samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clustering_module, "ROWS_AT_ONCE", 5)
    vectors = catalog.read(["caption_embedding"])["caption_embedding"].copy()
    vectors[7, 3] = np.nan
    catalog.add_columns({"caption_embedding": vectors})
    config = ClusterConfig(num_fine=2, num_experts=1, fit_samples=fit_samples, seed=1)  # row 7 not in the sample of 24
    with pytest.raises(ModeclipError, match=r"caption_embedding has NaN.*row 7\b.*embed the captions again"):
        cluster(catalog, config)
    assert "expert" not in catalog.columns
