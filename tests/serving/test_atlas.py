"""The atlas without a browser: places, lassos, masks, and the table for other viewers."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from modeclip.clustering.embedding import EmbedConfig, embed
from modeclip.clustering.fitting import ClusterConfig, cluster
from modeclip.data.catalog import Catalog
from modeclip.data.selection import Selection
from modeclip.errors import ModeclipError
from modeclip.serving import atlas as atlas_module
from modeclip.serving.atlas import Atlas, Places, TakenError, directions, inside, place_discs


@pytest.fixture(scope="module")
def run(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the small run that masks may be added to."""
    out = tmp_path_factory.mktemp("atlas") / "run"
    for name in ("catalog.lance", "clusters"):
        shutil.copytree(small_run / name, out / name)
    return out


@pytest.fixture(scope="module")
def atlas(run: Path) -> Atlas:
    return Atlas(run)


@pytest.fixture(scope="module")
def places(atlas: Atlas) -> Places:
    return atlas._opened()[2]


def test_no_disc_covers_another_and_areas_are_sizes() -> None:
    random = np.random.default_rng(0)
    sizes = random.integers(1, 400, 60)
    sizes[7] = 0
    plane = random.normal(size=(60, 2)).astype(np.float32)
    plane[3] = plane[4]  # at one place
    discs = place_discs(plane, sizes).astype(np.float64)
    for (x1, y1, r1), (x2, y2, r2) in itertools.combinations(discs[sizes > 0].tolist(), 2):
        assert np.hypot(x1 - x2, y1 - y2) > r1 + r2
    np.testing.assert_allclose(discs[:, 2] ** 2 / np.square(discs[:, 2]).sum(), sizes / sizes.sum(), atol=1e-5)
    assert (np.abs(discs[:, :2]) + discs[:, 2:] < 1 + 1e-5).all()


def test_pairs_lean_to_the_neighbour_that_they_resemble() -> None:
    random = np.random.default_rng(1)
    plane = random.normal(size=(12, 2)).astype(np.float32)
    turn = np.linalg.qr(random.normal(size=(6, 6)))[0][:, :2]
    centers = (plane @ turn.T).astype(np.float32)  # the map itself, turned: the directions turn it back
    for index, found in enumerate(directions(centers, plane)):
        np.testing.assert_allclose(found.T @ found, np.eye(2), atol=1e-5)
        np.testing.assert_allclose((centers - centers[index]) @ found, plane - plane[index], atol=1e-4)


def test_every_pair_lies_in_its_disc_the_farther_out_the_stranger(atlas: Atlas, places: Places) -> None:
    read = atlas.catalog.read(["fine_cluster", "fine_distance"])
    fine = read["fine_cluster"]
    gap = np.linalg.norm(places.pairs - places.discs[fine, :2], axis=1)
    assert (gap <= places.discs[fine, 2]).all()
    for index in np.unique(fine):
        own = fine == index
        order = np.argsort(places.novelty[own], kind="stable")
        assert (np.diff(read["fine_distance"][own][order]) >= 0).all()
        assert (np.diff(gap[own][order]) >= -1e-6).all()


def test_places_are_kept_and_made_anew_if_their_file_is_cut(
    run: Path, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> Places:
        raise AssertionError("placed again")

    monkeypatch.setattr(atlas_module, "place", refuse)
    np.testing.assert_array_equal(Atlas(run)._opened()[2].pairs, places.pairs)
    kept = run / "atlas" / "places.safetensors"
    content = kept.read_bytes()
    kept.write_bytes(content[: len(content) // 2])
    with pytest.raises(AssertionError, match="placed again"):
        Atlas(run)._opened()
    kept.write_bytes(content)


def test_a_point_is_inside_what_winds_around_it() -> None:
    random = np.random.default_rng(2)
    angles = np.sort(random.uniform(0, 2 * np.pi, 40))
    polygon = random.uniform(0.3, 1, (40, 1)) * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    points = random.uniform(-1, 1, (500, 2)).astype(np.float32)

    def winds(point: np.ndarray) -> bool:
        apart = polygon - point
        turned = np.roll(apart, -1, axis=0)
        cross = apart[:, 0] * turned[:, 1] - apart[:, 1] * turned[:, 0]
        return bool(abs(np.arctan2(cross, (apart * turned).sum(1)).sum()) > np.pi)

    assert inside(points, polygon).tolist() == [winds(point) for point in points.astype(np.float64)]


def test_a_lasso_around_a_disc_is_a_mask_that_stages_take(atlas: Atlas, run: Path, places: Places) -> None:
    x, y, radius = places.discs[2].tolist()
    angles = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    circle = [(x + radius * np.cos(angle), y + radius * np.sin(angle)) for angle in angles.tolist()]
    chosen = atlas.selected([circle], clusters=[5], rows=[0])
    expected = np.isin(atlas.catalog.read(["fine_cluster"])["fine_cluster"], [2, 5])
    expected[0] = True
    np.testing.assert_array_equal(chosen, expected)
    done = atlas.save_mask("lassoed", chosen)
    assert done["num_selected"] == chosen.sum()
    assert "--mask lassoed" in done["commands"][0]
    np.testing.assert_array_equal(Selection(mask="lassoed").mask_of(Catalog.open(run)), chosen)
    legend, codes = atlas.colour("lassoed")
    assert legend["kind"] == "mask"
    assert list(codes) == chosen.astype(int).tolist()
    assert atlas.cluster(5)["masks"] == {"lassoed": 1.0}
    with pytest.raises(TakenError, match="replace it"):
        atlas.save_mask("lassoed", ~chosen)
    atlas.save_mask("lassoed", ~chosen, replace=True)
    np.testing.assert_array_equal(Selection(mask="lassoed").mask_of(Catalog.open(run)), ~chosen)
    atlas.remove_mask("lassoed")
    assert "lassoed" not in Catalog.open(run).columns


@pytest.mark.parametrize(
    ("name", "words"),
    [("caption", "column of this name"), ("two words", "a letter and then"), ("", "a letter and"), ("x" * 64, "62")],
)
def test_a_name_that_cannot_be_a_column_is_refused(atlas: Atlas, name: str, words: str) -> None:
    before = atlas.catalog.columns
    with pytest.raises(ModeclipError, match=words):
        atlas.save_mask(name, np.ones(len(atlas.catalog), bool))
    assert atlas.catalog.columns == before


def test_an_empty_selection_and_what_is_not_there_are_refused(atlas: Atlas) -> None:
    with pytest.raises(ModeclipError, match="nothing is selected"):
        atlas.save_mask("none", np.zeros(len(atlas.catalog), bool))
    for ask in (
        lambda: atlas.cluster(16),
        lambda: atlas.pairs([-1]),
        lambda: atlas.picture(10**9, 64),
        lambda: atlas.selected([], [16]),
    ):
        with pytest.raises(ModeclipError, match="expected 0 to"):
            ask()
    with pytest.raises(ModeclipError, match="novelty"):
        atlas.colour("no_such")


def test_the_table_has_places_captions_and_pictures(atlas: Atlas, places: Places, tmp_path: Path) -> None:
    table, catalog = pq.read_table(atlas.write_table(tmp_path / "atlas.parquet")), atlas.catalog
    assert table["text"].to_pylist() == catalog.captions()
    np.testing.assert_array_equal(np.column_stack([table["x"], table["y"]]), places.pairs)
    rows = np.array([0, len(catalog) - 1])
    assert [table["image"][int(row)].as_py()["bytes"] for row in rows] == catalog.encoded_images(rows)


def test_of_several_experts_of_a_pair_the_first_is_shown(icons_catalog: Path, tmp_path: Path) -> None:
    shutil.copytree(icons_catalog, tmp_path / "catalog.lance")
    embed(Catalog.open(tmp_path), EmbedConfig(encoder="tfidf", dimension=8))
    config = ClusterConfig(num_fine=6, num_experts=3, num_iterations=3, overlap=2)
    cluster(Catalog.open(tmp_path), config).save(tmp_path / "clusters")
    atlas = Atlas(tmp_path)
    experts = atlas.catalog.read(["expert"])["expert"]
    assert experts.shape[1] == 2
    assert [pair["expert"] for pair in atlas.pairs([5, 0, 7])] == experts[[5, 0, 7], 0].tolist()
    assert np.frombuffer(atlas.colour("expert")[1], np.uint8).tolist() == experts[:, 0].tolist()
    table = pq.read_table(atlas.write_table())
    assert table["expert"].to_pylist() == [f"expert {number}" for number in experts[:, 0]]


def test_numbers_and_texts_become_colours() -> None:
    legend, codes = atlas_module._encode("number", np.array([0.0, 1.0, np.nan, 0.5], np.float32))
    assert codes.tolist() == [0, 254, 255, 127]
    assert legend["range"] == pytest.approx([0, 1], abs=0.03)
    texts = np.array([f"t{min(number, 20)}" for number in range(40)], object)
    legend, codes = atlas_module._encode("text", texts)
    assert len(legend["categories"]) == 12
    assert legend["categories"][0] == "t20"
    assert legend["categories"][-1] == "other"
    assert codes[25] == 0
