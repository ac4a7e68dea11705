"""New pairs meet a bundle: another sample of its source is not novel, another topic is; what is proposed of it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeclip.clustering.embedding import COLUMN, EmbedConfig, embed
from modeclip.clustering.fitting import ClusterConfig, cluster
from modeclip.clustering.novelty import FineQuantiles, fit_quantiles, fitted_quantiles
from modeclip.data.catalog import Catalog
from modeclip.data.indexing import index
from modeclip.data.sources.icons import icon_caption, list_icons
from modeclip.data.sources.options import DataConfig
from modeclip.errors import ModeclipError
from modeclip.mixture.assigning import AssignConfig, ExpertShare, assign, propose
from modeclip.mixture.bundle import Bundle, Expert, RoutingConfig
from support import plain_png

NUM_FINE = 64
CONFIG = AssignConfig(min_pairs=100)
DISHES = [
    f"{style} {dish} with {side}"
    for style, dish, side in itertools.product(
        ("grilled", "creamy", "spicy", "homemade"),
        ("salmon fillet", "chicken curry", "lentil soup", "mushroom risotto", "beef stew", "pasta salad"),
        ("steamed rice", "garlic bread", "roasted potatoes", "fresh parsley", "lemon butter sauce"),
    )
]


def catalog_of(folder: Path, captions: Sequence[str]) -> Catalog:
    """A catalog of these captions, with images that nobody looks at."""
    folder.mkdir()
    images = [plain_png((number % 256, number // 256, 0), (8, 8)) for number in range(len(captions))]
    pq.write_table(pa.table({"image": images, "caption": list(captions)}), folder / "pairs.parquet")
    index(DataConfig(source=str(folder / "pairs.parquet")), folder / "catalog")
    return Catalog.open(folder / "catalog")


@pytest.fixture(scope="module")
def halves() -> tuple[list[str], list[str]]:
    """The captions of real icons, cut in two at random."""
    captions = [icon_caption("tabler", name) for name in list_icons("tabler")]
    order = np.random.default_rng(0).permutation(len(captions))
    return tuple([captions[row] for row in order[half::2]] for half in range(2))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory, halves: tuple[list[str], list[str]]) -> Catalog:
    """One half, embedded and clustered."""
    catalog = catalog_of(tmp_path_factory.mktemp("fitted") / "half", halves[0])
    embed(catalog, EmbedConfig(encoder="minilm"))
    cluster(catalog, ClusterConfig(num_fine=NUM_FINE, num_experts=2))
    return catalog


@pytest.fixture(scope="module")
def bundle(fitted: Catalog) -> Bundle:
    """What a bundle of that half says of its clusters."""
    clustering = cluster(fitted, ClusterConfig(num_fine=NUM_FINE, num_experts=2)).clustering
    facts = fitted.facts(COLUMN)
    assert facts is not None
    return Bundle(
        path=Path("nowhere"),
        encoder=facts["encoder"],
        routing=RoutingConfig(rule="per_class"),
        fine_centers=clustering.fine_centers,
        expert_of_fine=clustering.expert_of_fine,
        experts=tuple(
            Expert(name=f"expert-{k}", folder=f"expert-{k}", size=len(fitted.select(expert=k))) for k in range(2)
        ),
        lineage={},
        fine_quantiles=fitted_quantiles(fitted, NUM_FINE),
    )


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory, halves: tuple[list[str], list[str]]) -> Catalog:
    """The other half."""
    return catalog_of(tmp_path_factory.mktemp("new") / "half", halves[1])


@pytest.mark.slow
def test_pairs_of_the_same_source_are_novel_by_chance_only(new: Catalog, bundle: Bundle) -> None:
    result = assign(new, bundle, CONFIG)
    assert result.num_pairs == len(new)
    assert 0.004 < result.num_novel / result.num_pairs < 0.02
    assert [(p.action, p.expert) for p in result.proposals] == [("continue", 0), ("continue", 1)]
    columns = new.read(["fine_cluster", "fine_distance", "expert", "novelty", "novel", COLUMN])
    distance = np.linalg.norm(columns[COLUMN].astype(np.float64)[:, None] - bundle.fine_centers, axis=2)
    assert (columns["fine_cluster"] == distance.argmin(1)).all()
    assert columns["fine_distance"] == pytest.approx(distance.min(1), abs=1e-4)
    assert (columns["expert"] == bundle.expert_of_fine[columns["fine_cluster"]]).all()
    assert 0.45 < columns["novelty"].mean() < 0.58
    assert columns["novel"].sum() == result.num_novel == (columns["novelty"] > 0.99).sum()
    assert [e.num_pairs for e in result.experts] == np.bincount(columns["expert"]).tolist()
    assert (new.facts("novel") or {})["novel_beyond"] == 0.99
    strict = assign(new, bundle, replace(CONFIG, novel_beyond=0.9))
    assert 0.07 < strict.num_novel / strict.num_pairs < 0.16


def test_pairs_of_another_topic_want_an_expert_of_their_own(tmp_path: Path, bundle: Bundle) -> None:
    result = assign(catalog_of(tmp_path / "dishes", DISHES), bundle, replace(CONFIG, new_fraction=0.05))
    assert result.num_novel > 0.9 * len(DISHES)
    (proposal,) = result.proposals
    assert (proposal.action, proposal.expert, proposal.num_pairs) == ("new", 2, result.num_novel)
    assert f"{result.num_novel} of {len(DISHES)} pairs are novel" in proposal.reason
    assert result.to_json()["experts"][0].keys() >= {"num_pairs", "num_novel", "novel_fraction"}
    assert result.rows()[-1][2:4] == (str(len(DISHES)), str(result.num_novel))


def test_same_work_is_not_done_twice_and_added_rows_are(tmp_path: Path, bundle: Bundle) -> None:
    catalog = catalog_of(tmp_path / "some", DISHES[:40])
    embed(catalog, EmbedConfig(encoder="minilm", batch_size=16))
    facts, first = catalog.facts(COLUMN), assign(catalog, bundle, CONFIG)
    assert catalog.facts(COLUMN) == facts, "vectors of the same encoder are used as they are"
    version = catalog.dataset.version
    assert assign(Catalog.open(catalog.path), bundle, CONFIG) == first
    assert Catalog.open(catalog.path).dataset.version == version
    table = pq.read_table(tmp_path / "some" / "pairs.parquet")
    more = pa.table({"image": table["image"][:5], "caption": ["home", "arrow left", "heart", "user", "star"]})
    pq.write_table(more, tmp_path / "some" / "more.parquet")
    index(DataConfig(source=str(tmp_path / "some" / "more.parquet")), tmp_path / "some" / "catalog")
    grown = Catalog.open(catalog.path)
    assert assign(grown, bundle, CONFIG).num_pairs == 45
    assert grown.read(["novel"], np.arange(40, 45))["novel"].sum() == 0


def test_a_bundle_without_quantiles_takes_those_of_its_catalog(new: Catalog, bundle: Bundle, fitted: Catalog) -> None:
    old = replace(bundle, fine_quantiles=None)
    with pytest.raises(ModeclipError, match=r"no quantiles of distances.*; give --catalog"):
        assign(new, old, CONFIG)
    assert assign(new, old, CONFIG, fitted_on=fitted) == assign(new, bundle, CONFIG)
    with pytest.raises(ModeclipError, match=r"expected 0 to 9.*another clustering.*give the catalog"):
        fitted_quantiles(fitted, 10)


def test_small_clusters_do_not_make_everything_novel() -> None:
    """Ten points a cluster in many dimensions: plain quantiles call a quarter of new points novel, these 1 %."""
    random = np.random.default_rng(0)
    dimension, size, num_fine = 32, 10, 300
    middles = 20 * random.standard_normal((num_fine, dimension))
    x = middles[:, None] + random.standard_normal((num_fine, size, dimension))
    centers = x.mean(1)
    fine = np.repeat(np.arange(num_fine), size)
    distance = np.linalg.norm(x - centers[:, None], axis=2).reshape(-1).astype(np.float32)
    fresh = middles[:, None] + random.standard_normal((num_fine, size, dimension))
    far = np.linalg.norm(fresh - centers[:, None], axis=2).reshape(-1).astype(np.float32)
    threshold = fit_quantiles(fine, distance, num_fine).threshold(0.99)
    plain = np.array([np.quantile(distance[fine == s], 0.99) for s in range(num_fine)])
    assert (far > plain[fine]).mean() > 0.25
    assert 0.002 < (far > threshold[fine]).mean() < 0.025


def test_quantiles_of_large_clusters_are_their_own() -> None:
    random = np.random.default_rng(1)
    fine = random.integers(0, 3, 30_000)
    distance = (random.random(30_000) * (1 + fine)).astype(np.float32)
    found = fit_quantiles(fine, distance, 3, (0.5, 0.9, 0.99))
    for s in range(3):
        own = distance[fine == s].astype(np.float64)
        assert found.distances[s] == pytest.approx(np.quantile(own, (0.5, 0.9, 0.99)), rel=1e-3)
    empty = fit_quantiles(fine, distance, 4, (0.5, 0.9, 0.99)).distances[3]
    assert empty[0] == pytest.approx(np.median(found.distances[:, 0]), rel=1e-3)
    assert (np.diff(empty) > 0).all()


@given(
    st.lists(st.floats(0, 2, width=32), min_size=3, max_size=3),
    st.lists(st.floats(0, 3, width=32), min_size=1, max_size=20),
)
def test_novelty_grows_with_the_distance_and_agrees_with_the_threshold(knots: list[float], far: list[float]) -> None:
    levels = (0.5, 0.9, 0.99)
    quantiles = FineQuantiles(levels=levels, distances=np.sort(np.array([knots], np.float32), axis=1))
    distance = np.sort(np.array(far, np.float32))
    share, beyond = quantiles.novelty(np.zeros(len(far), np.int64), distance)
    assert (np.diff(share) >= 0).all()
    assert ((share >= 0) & (share <= 1)).all()
    assert (beyond == (distance > quantiles.threshold(0.99)[0])).all()
    assert (quantiles.threshold(0.7) <= quantiles.threshold(0.9)).all()
    with pytest.raises(ModeclipError, match=r"expected 0\.5 to 0\.99, got 0\.3"):
        quantiles.threshold(0.3)


def test_proposals_follow_their_thresholds() -> None:
    def actions(num_pairs: int, num_novel: int, config: AssignConfig, size: int = 10_000) -> list[tuple[str, int]]:
        shares = (
            ExpertShare(index=0, size=size, num_pairs=num_pairs, num_novel=num_novel),
            ExpertShare(index=1, size=size, num_pairs=0, num_novel=0),
        )
        return [(proposal.action, proposal.num_pairs) for proposal in propose(shares, config)]

    config = AssignConfig(min_pairs=100)
    assert actions(600, 6, config) == [("continue", 594)]
    assert actions(480, 6, config) == [], "under 5 % of the expert's pairs"
    assert actions(99, 0, config, size=10) == [], "under min_pairs"
    assert actions(1100, 1100, config) == [("new", 1100)]
    assert actions(900, 900, config) == [], "under a tenth of the mean expert"
    assert actions(1_000_000, 20_000, config) == [("continue", 980_000)], "twice what chance gives"
    assert actions(100_000, 6_000, config) == [("continue", 94_000), ("new", 6_000)]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("novel_beyond", 1.0, r"assign\.novel_beyond: expected 0\.5 to 0\.999, got 1\.0"),
        ("min_pairs", 0, r"assign\.min_pairs: expected 1 or more, got 0"),
        ("new_fraction", 0.0, r"assign\.new_fraction: expected .* \(0, 1\], got 0\.0"),
    ],
)
def test_settings_out_of_range(field: str, value: float, message: str) -> None:
    with pytest.raises(ModeclipError, match=message):
        AssignConfig(**{field: value})  # type: ignore[arg-type]
