"""The atlas shows what the clustering holds, shows it as text, and needs nothing but itself; diagnoses of a catalog."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modeclip.clustering.cards import ExpertCard, FineCard
from modeclip.clustering.clusters import Clustering
from modeclip.clustering.diagnostics import DiagnoseConfig, Diagnostics, ExpertsTrial, FineTrial, diagnose
from modeclip.clustering.fitting import ClusterConfig, ClusterResult, cluster
from modeclip.data.catalog import Catalog
from modeclip.data.indexing import index
from modeclip.data.sources import DataConfig
from modeclip.errors import ModeclipError
from modeclip.pages.atlas import PICTURES_OF_FINE, write_atlas
from support import parse_page

EVIL = "</script><script>alert(1)</script> <img src=x onerror=alert(2)> {{ 7*7 }}"
CONFIG = ClusterConfig(num_fine=10, num_experts=3, overlap=2)
WHAT = DiagnoseConfig(experts=(2, 4, 64), fine=(4, 8), num_seeds=2, num_samples=120, batch_size=16, num_batches=20)


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """A catalog of 150 pictures with captions, most of them twice, and embeddings."""
    folder = tmp_path_factory.mktemp("pairs")
    lines = ["filepath\ttitle"]
    for number in range(150):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
        lines.append(f"{number}.png\tthing {number // 2}")
    (folder / "pairs.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    index(DataConfig(source=str(folder / "pairs.tsv")), folder)
    catalog = Catalog.open(folder / "catalog.lance")
    of_caption = {caption: number for number, caption in enumerate(sorted(set(catalog.read(["caption"])["caption"])))}
    vectors = np.random.default_rng(0).normal(size=(len(of_caption), 12)).astype(np.float32)
    rows = [of_caption[caption] for caption in catalog.read(["caption"])["caption"]]
    catalog.add_columns({"caption_embedding": vectors[rows] / np.linalg.norm(vectors[rows], axis=1, keepdims=True)})
    return catalog


@pytest.fixture(scope="module")
def result(catalog: Catalog) -> ClusterResult:
    return cluster(catalog, CONFIG)


@pytest.fixture(scope="module")
def diagnostics(catalog: Catalog, result: ClusterResult) -> Diagnostics:
    return diagnose(catalog, result, CONFIG, WHAT)


# diagnoses of a catalog


def test_diagnoses_are_saved_and_read(diagnostics: Diagnostics, tmp_path: Path) -> None:
    diagnostics.save(tmp_path / "new")
    assert Diagnostics.load(tmp_path / "new") == diagnostics
    content = json.loads((tmp_path / "new" / "diagnostics.json").read_text(encoding="utf-8"))
    assert diagnostics.negatives is not None
    assert content["negatives"]["verdict"] == diagnostics.negatives.verdict
    Diagnostics().save(tmp_path)
    assert Diagnostics.load(tmp_path) == Diagnostics()


def test_diagnoses_of_the_catalog(catalog: Catalog, result: ClusterResult, diagnostics: Diagnostics) -> None:
    assert [trial.num_experts for trial in diagnostics.experts] == [2, 4]  # 64 experts cannot have 10 fine clusters
    assert [trial.num_fine for trial in diagnostics.fine] == [4, 8]
    assert diagnostics.stability is not None
    assert len(diagnostics.stability.pairs) == 1
    assert (diagnostics.num_samples, diagnostics.negatives and diagnostics.negatives.num_rows) == (120, len(catalog))
    again = diagnose(catalog, result, CONFIG, WHAT)
    assert (again.negatives, again.stability, again.experts) == (
        diagnostics.negatives,
        diagnostics.stability,
        diagnostics.experts,
    )


def test_identical_captions_are_counted_in_the_catalog(catalog: Catalog, diagnostics: Diagnostics) -> None:
    captions = catalog.read(["caption"])["caption"]
    same = sum(a == b for i, a in enumerate(captions) for j, b in enumerate(captions) if i != j)
    assert diagnostics.negatives is not None
    assert diagnostics.negatives.kinds[0].identical == pytest.approx(same / (150 * 149))


def test_tables(diagnostics: Diagnostics) -> None:
    tables = diagnostics.tables()
    assert len(tables) == 4
    for _, columns, rows in tables:
        assert {len(row) for row in rows} == {len(columns)}
    assert [row[0] for row in tables[3][2]] == ["random", "of one expert", "of one fine cluster"]
    assert tables[2][2][-1][0] == "mean ± deviation"


def test_parts_can_be_left_out(catalog: Catalog, result: ClusterResult) -> None:
    nothing = diagnose(catalog, result, CONFIG, DiagnoseConfig(experts=(), num_batches=0))
    assert nothing == Diagnostics()


def test_more_clusters_than_sampled_rows(catalog: Catalog, result: ClusterResult) -> None:
    with pytest.raises(ModeclipError, match=r"num_samples: .*at least 151.*got 150 rows.*raise it"):
        diagnose(catalog, result, CONFIG, DiagnoseConfig(fine=(151,)))
    with pytest.raises(ModeclipError, match=r"num_samples: .*at least 10.*got 9 rows.*raise it"):
        diagnose(catalog, result, CONFIG, DiagnoseConfig(num_seeds=2, num_samples=9))


@pytest.mark.parametrize("content", ["", "{}", '{"stability": null, "negatives": {}, "experts": [], "fine": []}'])
def test_damaged_diagnostics(content: str, tmp_path: Path) -> None:
    (tmp_path / "diagnostics.json").write_text(content)
    with pytest.raises(ModeclipError, match=r"diagnostics\.json: .*cluster again"):
        Diagnostics.load(tmp_path)


# the page


def test_the_page_holds_everything(
    catalog: Catalog, result: ClusterResult, diagnostics: Diagnostics, tmp_path: Path
) -> None:
    path = write_atlas(catalog, result, tmp_path / "deep" / "atlas.html", diagnostics, name="pairs & things")
    page = parse_page(path)
    assert page.values("article", "data-expert-sheet") == ["0", "1", "2"]
    shown = [int(index) for index in page.values("article", "data-fine")]
    assert sorted(shown) == list(range(10))
    assert len(page.values("circle", "data-expert")) == 10
    for card in result.fine:
        for caption in card.nearest_captions:
            assert " ".join(caption.split()) in page.text
        assert f"also expert {card.experts[1]}" in page.text
    assert diagnostics.negatives is not None
    assert diagnostics.negatives.verdict in page.text
    assert page.values("tr", "data-kind") == ["random", "expert", "fine"]
    assert page.values("div", "data-sweep") == ["experts", "fine"]
    assert "pairs & things" in page.text
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["atlas.html"]


def test_the_page_loads_nothing_and_runs_only_its_own_script(
    catalog: Catalog, result: ClusterResult, diagnostics: Diagnostics, tmp_path: Path
) -> None:
    fine = tuple(replace(card, nearest_captions=(EVIL,), keywords=(EVIL,)) for card in result.fine)
    experts = tuple(replace(card, keywords=(EVIL,)) for card in result.experts)
    hostile = replace(result, fine=fine, experts=experts)
    path = write_atlas(catalog, hostile, tmp_path / "atlas.html", diagnostics, name=EVIL)
    page, source = parse_page(path), path.read_text(encoding="utf-8")
    assert page.text.count("{{ 7*7 }}") >= 24
    policy = page.one("meta", http_equiv="Content-Security-Policy").attributes["content"]
    (script,) = re.findall(r"<script>(.*?)</script>", source, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert len(page.all("script")) == 1
    assert page.all("img")
    assert all(source.startswith("data:image/webp;base64,") for source in page.values("img", "src"))
    assert not page.all("link")
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", source)


def test_without_diagnoses_the_page_has_no_empty_sections(
    catalog: Catalog, result: ClusterResult, tmp_path: Path
) -> None:
    page = parse_page(write_atlas(catalog, result, tmp_path / "atlas.html"))
    sections = page.values("section", "id")
    assert sections == ["map", "experts", "sizes"]
    assert set(page.values("a", "href")) == {f"#{name}" for name in sections}
    assert catalog.name in page.text


def test_pictures_stay_within_their_budget(catalog: Catalog, result: ClusterResult, tmp_path: Path) -> None:
    counts = []
    for budget in (0, 3000, 10_000_000):
        page = parse_page(write_atlas(catalog, result, tmp_path / "atlas.html", picture_bytes=budget))
        sources = page.values("img", "src")
        assert sum(map(len, sources)) <= budget
        counts.append(len(sources))
    assert counts[0] == 0 < counts[1] < counts[2]
    assert counts[2] <= 3 * 20 + 10 * PICTURES_OF_FINE


def test_pictures_show_rows_of_their_owner(catalog: Catalog, result: ClusterResult, tmp_path: Path) -> None:
    source = write_atlas(catalog, result, tmp_path / "atlas.html").read_text(encoding="utf-8")
    captions = catalog.read(["caption", "fine_cluster"])
    owner: dict[str, int] = dict(zip(captions["caption"], captions["fine_cluster"].tolist(), strict=True))
    parts = source.split('data-fine="')[1:]
    for part in parts:
        card = part.split("</article>")[0]
        for caption in re.findall(r'alt="(thing \d+)"', card):
            assert owner[caption] == int(card.split('"')[0])


def test_missing_pictures_leave_a_sentence(result: ClusterResult, catalog: Catalog, tmp_path: Path) -> None:
    gone = replace(result, fine=tuple(replace(card, random_rows=(9999,), nearest_rows=(9999,)) for card in result.fine))
    page = parse_page(write_atlas(catalog, gone, tmp_path / "atlas.html"))
    assert "There are no pictures: " in page.text
    assert not page.all("img")


def test_a_thousand_clusters_stay_usable(catalog: Catalog, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    centers = random.normal(size=(1024, 24)).astype(np.float32)
    experts = np.sort(random.integers(32, size=(1024, 1)), axis=0)
    clustering = Clustering(
        fine_centers=centers, experts_of_fine=experts, coarse_centers=random.normal(size=(32, 24)).astype(np.float32)
    )
    caption = (
        "a rather long caption, as they are found beside pictures on the web, of about a hundred characters in all"
    )
    fine = tuple(
        FineCard(
            index=index,
            expert=int(experts[index, 0]),
            experts=(int(experts[index, 0]),),
            size=int(random.integers(1, 100_000)) if index else 0,
            radius=0.5,
            radius_90=0.7,
            nearest_captions=(caption,) * 5,
            nearest_rows=(1, 2, 3, 4, 5),
            random_rows=(6, 7, 8, 9, 10),
            keywords=("first", "second", "third", "fourth", "fifth"),
        )
        for index in range(1024)
    )
    cards = tuple(
        ExpertCard(index=k, size=10**6, range=0.5, num_fine=32, radius=0.5, radius_90=0.7, keywords=("word",))
        for k in range(32)
    )
    result = ClusterResult(clustering=clustering, fine=fine, experts=cards, imbalance=1.5, objective=0.4)
    path = write_atlas(catalog, result, tmp_path / "atlas.html", picture_bytes=400_000)
    page, source = parse_page(path), path.read_text(encoding="utf-8")
    assert len(source) < 4_400_000  # and so below 8 MB with the pictures' default budget
    assert len(page.values("article", "data-fine")) == 1024
    assert not page.values("details", "open")
    pictured = {part.split('"')[0] for part in source.split('data-fine="')[1:] if "<img" in part.split("</article>")[0]}
    assert len(pictured) == 1024
    assert re.search(r"Fine clusters\s*1,024\s*1 empty", page.text)


def test_one_cluster_and_one_expert(catalog: Catalog, tmp_path: Path) -> None:
    result = cluster(catalog, ClusterConfig(num_fine=1, num_experts=1))
    found = Diagnostics(
        experts=(ExpertsTrial(num_experts=1, imbalance=1.0, smallest=150, mean_range=0.0, objective=0.0),),
        fine=(FineTrial(num_fine=1, objective=0.5, imbalance=1.0, num_empty=0, seconds=0.0),),
    )
    page = parse_page(write_atlas(catalog, result, tmp_path / "atlas.html", found))
    assert "nan" not in page.text
    cluster(catalog, CONFIG)  # as it was
