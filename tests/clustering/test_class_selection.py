"""Prior-based selection: the fine clusters of class names against a slow search, and the rows that they give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from modeclip.clustering.class_selection import mark_prior, name_of, select_for_classes
from modeclip.clustering.clusters import Clustering
from modeclip.clustering.embedding import EmbedConfig, embed
from modeclip.clustering.fitting import ClusterConfig, cluster
from modeclip.data.catalog import Catalog
from modeclip.data.prompts import read_classes
from modeclip.errors import ModeclipError
from modeclip.models.encoders import load_encoder

NAMES = ["arrow", "file", "git branch", "person", "arrow"]


@pytest.fixture(scope="module")
def clustered(icons_copy: Catalog) -> tuple[Catalog, Clustering]:
    embed(icons_copy, EmbedConfig(encoder="tfidf", dimension=16))
    found = cluster(icons_copy, ClusterConfig(num_fine=8, num_experts=2, num_iterations=3))
    return icons_copy, found.clustering


@pytest.mark.parametrize("count", [1, 3, 8])
def test_rows_are_those_of_the_nearest_clusters(clustered: tuple[Catalog, Clustering], count: int) -> None:
    catalog, clustering = clustered
    selection = select_for_classes(catalog, clustering, NAMES, name=f"some_{count}", count=count)
    assert selection.classnames == tuple(NAMES[:4])
    vectors = load_encoder(catalog.facts("caption_embedding")["encoder"]).encode(NAMES[:4])
    wanted = set()
    for vector in vectors.astype(np.float64):
        distances = [((vector - center) ** 2).sum() for center in clustering.fine_centers.astype(np.float64)]
        wanted |= set(np.argsort(distances, kind="stable")[:count].tolist())
    assert selection.fine.tolist() == sorted(wanted)
    marked = mark_prior(catalog, selection)
    fine = catalog.read(["fine_cluster"])["fine_cluster"]
    rows = [row for row in range(len(catalog)) if int(fine[row]) in wanted]
    assert catalog.select(mask=f"prior_some_{count}").tolist() == rows
    assert marked == len(rows) == sum((fine == k).sum() for k in wanted)
    assert (marked == len(catalog)) == (count == 8)


def test_the_same_classes_write_nothing_anew(clustered: tuple[Catalog, Clustering]) -> None:
    catalog, clustering = clustered
    first = select_for_classes(catalog, clustering, NAMES, name="again")
    mark_prior(catalog, first)
    version = catalog.dataset.version
    second = select_for_classes(catalog, clustering, NAMES, name="again")
    assert second.digest == first.digest
    mark_prior(catalog, second)
    assert catalog.dataset.version == version
    other = select_for_classes(catalog, clustering, NAMES, name="again", count=2)
    assert other.digest != first.digest
    assert mark_prior(catalog, other) == np.isin(catalog.read(["fine_cluster"])["fine_cluster"], other.fine).sum()
    assert catalog.dataset.version > version


def test_without_clusters_rows_are_those_whose_caption_is_a_name(clustered: tuple[Catalog, Clustering]) -> None:
    catalog, clustering = clustered
    captions = catalog.read(["caption"])["caption"].astype(str).tolist()
    names = [captions[3].upper(), captions[7].replace(" ", "_"), "what no icon is called"]
    selection = select_for_classes(catalog, clustering, names, name="called", count=0)
    assert selection.fine.tolist() == []
    wanted = [row for row, caption in enumerate(captions) if caption in {captions[3], captions[7]}]
    assert mark_prior(catalog, selection) == len(wanted)
    assert catalog.select(mask="prior_called").tolist() == wanted
    version = catalog.dataset.version
    again = select_for_classes(catalog, clustering, names[::-1], name="called", count=0)
    assert mark_prior(catalog, again) == len(wanted)
    assert catalog.dataset.version == version
    other = select_for_classes(catalog, clustering, names[:1], name="called", count=0)
    assert mark_prior(catalog, other) == captions.count(captions[3])
    with pytest.raises(ModeclipError, match="no caption is one of the 1 class names; with nearest: 1"):
        mark_prior(catalog, select_for_classes(catalog, clustering, ["nothing"], name="none", count=0))
    assert "prior_none" not in catalog.columns


def test_many_names_make_a_short_name(tmp_path: Path) -> None:
    many = ["arrow left", *(f"name {number}" for number in range(19))]
    assert name_of([",".join(many)]) == name_of(many) == "arrow_left_and_19_more"
    assert name_of(["heart,home"]) == "heart_home"
    assert name_of([",".join(["\N{GREEK SMALL LETTER ALPHA}" * 3, "b" * 50])]) == "classes_and_1_more"
    (tmp_path / f"{'long' * 20}.txt").write_text("a\nb\n")
    assert name_of([str(tmp_path / f"{'long' * 20}.txt")]) == ("long" * 20)[:40]


def test_several_tasks_are_one_selection(clustered: tuple[Catalog, Clustering], tmp_path: Path) -> None:
    (tmp_path / "arrows.txt").write_text("arrow left\narrow right\n\n")
    (tmp_path / "my-people.txt").write_text("person\n")
    sources = [str(tmp_path / "arrows.txt"), str(tmp_path / "my-people.txt")]
    names = [name for source in sources for name in read_classes(source)]
    assert (names, name_of(sources)) == (["arrow left", "arrow right", "person"], "arrows_my_people")
    catalog, clustering = clustered
    both = set(select_for_classes(catalog, clustering, names, name="both").fine.tolist())
    each = [
        select_for_classes(catalog, clustering, read_classes(source), name="one").fine.tolist() for source in sources
    ]
    assert both == set(each[0]) | set(each[1])


@pytest.mark.parametrize(
    ("names", "name", "count", "message"),
    [
        ([], "a", 1, "prior a: there are no class names"),
        (["x"], "a b", 1, "prior 'a b'.*letters, digits and _"),
        (["x"], "a", 9, "nearest: expected 0 to 8.*got 9"),
        (["x"], "a", -1, "nearest: expected 0 to 8.*got -1"),
    ],
)
def test_mistakes(clustered: tuple[Catalog, Clustering], names: list[str], name: str, count: int, message: str) -> None:
    with pytest.raises(ModeclipError, match=message):
        select_for_classes(*clustered, names, name=name, count=count)
