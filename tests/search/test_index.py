"""An index against its experts asked one by one, and what happens to it: kills, changes, other models, bad input."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import torch

from modeclip import Catalog, MoDE, ModeclipError
from modeclip.data.indexing import index as make_catalog
from modeclip.data.selection import Selection
from modeclip.data.sources import DataConfig
from modeclip.errors import DamagedError
from modeclip.models.clip import encode_image, encode_text
from modeclip.search import approximate as approximate_module
from modeclip.search import index as index_module
from modeclip.search.asking import SearchModel, encode_query
from modeclip.search.index import INDEX_FILE, Index
from modeclip.search.query import Query, SearchConfig
from support import encode_picture, noise_picture, transparent_drawing, with_weights, write_pairs


@pytest.fixture(scope="module")
def catalog(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """The pairs of a finished run, in a copy."""
    return Catalog.open(
        shutil.copytree(small_run / "catalog.lance", tmp_path_factory.mktemp("pairs") / "catalog.lance")
    )


@pytest.fixture(scope="module")
def bundle(small_run: Path) -> str:
    """The bundle of that run."""
    return str(small_run / "bundle")


@pytest.fixture(scope="module")
def index(catalog: Catalog, bundle: str, tmp_path_factory: pytest.TempPathFactory) -> Index:
    """An index of these pairs, for reading."""
    return Index.build(catalog, bundle, tmp_path_factory.mktemp("index") / "index")


@pytest.fixture
def own(index: Index, tmp_path: Path) -> Path:
    """A copy of the index that may be changed."""
    return Path(shutil.copytree(index.folder, tmp_path / "index"))


@pytest.fixture(scope="module")
def vectors(catalog: Catalog, bundle: str) -> list[np.ndarray]:
    """Unit vectors of all pictures by each expert, each asked by itself."""
    mode = MoDE.load(bundle)
    pictures = catalog.images(np.arange(len(catalog)))
    found = []
    with torch.no_grad():
        for ref in mode.bundle.models:
            clip = mode.pool.get(ref)
            found.append(encode_image(clip.model, clip.images(pictures)).numpy())
    return found


@pytest.mark.parametrize("text", ["arrow left", "red heart", "a"])
def test_scores_are_those_of_the_routed_experts(
    index: Index, bundle: str, vectors: list[np.ndarray], catalog: Catalog, text: str
) -> None:
    mode = MoDE.load(bundle)
    (weights,) = mode.route_queries([text])
    expected = np.zeros(len(catalog))
    with torch.no_grad():
        for weight, ref, images in zip(weights, mode.bundle.models, vectors, strict=True):
            clip = mode.pool.get(ref)
            expected += weight * (images @ encode_text(clip.model, clip.tokens([text])).numpy()[0])
    found = index.search(text, count=20)
    assert found.weights == pytest.approx(weights)
    assert found.exact
    assert found.num_searched == len(catalog)
    rows = [hit.row for hit in found.hits]
    np.testing.assert_allclose([hit.score for hit in found.hits], expected[rows], atol=2e-3)  # float16
    assert min(expected[rows]) >= np.sort(expected)[-20] - 2e-3
    for hit in found.hits:
        assert sum(hit.parts) == pytest.approx(hit.score, abs=1e-6)
        assert 0 <= hit.strength <= 1
        assert hit.height == pytest.approx((hit.score - expected.mean()) / expected.std(), abs=0.05)
    assert np.diff([hit.score for hit in found.hits]).max() < 1e-6


def test_strength_is_the_share_of_captions_that_lie_lower(index: Index, catalog: Catalog) -> None:
    """By definition the captions' own images have strengths that are spread evenly over [0, 1]."""
    captions = catalog.captions()
    found = []
    for row in range(0, len(catalog), max(1, len(catalog) // 60)):
        hits = index.search(captions[row], count=len(catalog)).hits
        found.append(next(hit.strength for hit in hits if hit.row == row))
    assert 0.3 < np.mean(found) < 0.7
    assert min(found) < 0.3 < 0.7 < max(found)


def test_one_expert_answers_alone(index: Index) -> None:
    name = index.model.names[1]
    found = index.search(Query(text="arrow", expert=name), count=5)
    assert found.weights == tuple(float(one == name) for one in index.model.names)
    assert all(hit.parts[0] == 0 and hit.parts[1] == pytest.approx(hit.score) for hit in found.hits)
    with pytest.raises(ModeclipError, match="expert-99"):
        index.search(Query(text="arrow", expert="expert-99"))


def test_a_picture_finds_itself_and_pulls_a_text(index: Index, catalog: Catalog) -> None:
    row = len(catalog) // 2
    (picture,) = catalog.images(np.array([row]))
    found = index.search(Query(image=picture), count=3)
    assert found.hits[0].score == pytest.approx(1, abs=5e-3)
    (same,) = index.pictures(found.hits[:1])
    assert np.array_equal(np.asarray(same), np.asarray(picture))

    def rank(share: float) -> int:
        hits = index.search(Query(text="arrow", image=picture, image_weight=share), count=len(catalog)).hits
        return [hit.row for hit in hits].index(row)

    assert rank(1.0) <= rank(0.5) <= rank(0.0)
    words = index.search("arrow", count=9).hits
    assert [hit.row for hit in index.search(Query(text="arrow", image=picture, image_weight=0.0), count=9).hits] == [
        hit.row for hit in words
    ]


def test_what_is_transparent_in_a_picture_is_white(index: Index) -> None:
    found, expected = (encode_query(index.model, Query(image=picture)) for picture in transparent_drawing())
    np.testing.assert_allclose(found.parts[0][1], expected.parts[0][1], atol=1e-6)


def test_what_is_not_wanted_goes_down(index: Index, catalog: Catalog) -> None:
    captions = catalog.captions()
    worst = captions[index.search("arrow", count=1).hits[0].row]
    before = index.search("arrow", count=len(catalog)).hits
    after = index.search(Query(text="arrow", negatives=(worst,), negative_weight=1.0), count=len(catalog)).hits
    places = [[hit.row for hit in hits].index(before[0].row) for hits in (before, after)]
    assert places[0] == 0 < places[1]


def test_conditions_and_strength_leave_images_out(index: Index, catalog: Catalog) -> None:
    groups = catalog.read(["expert"])["expert"]
    found = index.search("arrow", count=1000, where=("expert=1",))
    assert {hit.row for hit in found.hits} == set(np.flatnonzero(groups == 1).tolist())
    assert found.num_searched == int((groups == 1).sum())
    assert np.diff([hit.score for hit in found.hits]).max() < 1e-6
    strong = index.search("arrow", count=1000, least_strength=0.5).hits
    assert strong == tuple(hit for hit in index.search("arrow", count=1000).hits if hit.strength >= 0.5)


def test_queries_together_are_each_answered_as_alone(index: Index, catalog: Catalog) -> None:
    picture = catalog.images(np.array([0]))[0]
    queries = [Query(text="arrow left"), Query(text="home", negatives=("heart",)), Query(text="star", image=picture)]
    asked = [encode_query(index.model, query) for query in queries]
    together = index.search_together(asked, count=4, least_strength=0.1)
    for one, found in zip(asked, together, strict=True):
        alone = index.search(one, count=4, least_strength=0.1)
        assert [hit.key for hit in found.hits] == [hit.key for hit in alone.hits]
        np.testing.assert_allclose([hit.score for hit in found.hits], [hit.score for hit in alone.hits], atol=1e-6)
        assert (found.weights, found.num_searched, found.exact) == (alone.weights, alone.num_searched, alone.exact)
    with pytest.raises(ModeclipError, match="count must be 1 or more"):
        index.search_together(asked, count=0)


def test_hybrid_joins_words_of_captions(index: Index, catalog: Catalog) -> None:
    captions = catalog.captions()
    row = len(catalog) - 1
    found = index.search(captions[row], count=5, hybrid=True)
    assert captions[row] in [hit.caption for hit in found.hits]  # its words are those of the query
    one = index.search(captions[row], count=1000, where=("expert=0",), hybrid=True)
    assert {catalog.read(["expert"], np.array([hit.row]))["expert"][0] for hit in one.hits} == {0}


def test_removed_images_come_back_when_they_are_added(own: Path, catalog: Catalog) -> None:
    index = Index.open(own)
    before = index.search("arrow", count=1000)
    groups = catalog.read(["expert"])["expert"]
    assert index.remove(("expert=0",)) == int((groups == 0).sum())
    assert len(index) == len(catalog)  # an opened index stays as it was
    less = Index.open(own, index.model)
    assert len(less) == int((groups != 0).sum())
    assert {hit.row for hit in less.search("arrow", count=1000).hits} == set(np.flatnonzero(groups != 0).tolist())
    added = less.add(catalog)
    assert (added.num_new, added.num_same, added.num_changed) == (int((groups == 0).sum()), len(less), 0)
    again = Index.open(own, index.model).search("arrow", count=1000)
    scores = {hit.row: hit.score for hit in again.hits}
    assert scores == pytest.approx({hit.row: hit.score for hit in before.hits}, abs=1e-6)


def test_a_removal_keeps_what_was_changed_since_the_index_was_opened(own: Path, catalog: Catalog) -> None:
    groups, opened = catalog.read(["expert"])["expert"], Index.open(own)
    first, second = catalog.read(["key"], np.flatnonzero(groups == 0)[:2])["key"]
    assert opened.remove((f"key = '{first}'",)) == 1
    assert opened.remove((f"key = '{second}'",)) == 1
    with pytest.raises(ModeclipError, match="has no pair"):
        opened.remove((f"key = '{first}'",))
    assert len(Index.open(own, opened.model)) == len(catalog) - 2
    Index.open(own, opened.model).add(catalog, selection=Selection(where=(f"key = '{first}'",)))
    assert opened.remove(("expert=0",)) == int((groups == 0).sum()) - 1
    with pytest.raises(ModeclipError, match=f"remove all {int((groups != 0).sum()):,} images"):
        opened.remove(("expert != 0",))


def test_an_addition_keeps_how_the_index_answers_now(own: Path, catalog: Catalog) -> None:
    opened = Index.open(own)
    Index.build(catalog, opened.model, own, SearchConfig(recall=0.5))
    opened.remove(("expert=0",))
    assert opened.add(catalog).num_new > 0
    assert Index.open(own, opened.model).config.recall == 0.5


def test_a_changed_image_is_encoded_anew(tmp_path: Path, bundle: str) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(6):
        noise_picture(number).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"noise {number}", encoding="utf-8")
    make_catalog(DataConfig.from_flat({"source": str(folder)}), tmp_path / "data")
    index = Index.build(Catalog.open(tmp_path / "data"), bundle, tmp_path / "index")
    noise_picture(99).save(folder / "3.png")
    make_catalog(DataConfig.from_flat({"source": str(folder)}), tmp_path / "data", replace=True)
    added = index.add(Catalog.open(tmp_path / "data"))
    assert (added.num_new, added.num_changed, added.num_same, added.num_rows) == (0, 1, 5, 6)
    best = Index.open(tmp_path / "index").search(Query(image=noise_picture(99)), count=2).hits[0]
    assert (best.caption, round(best.score, 2)) == ("noise 3", 1.0)


def test_images_in_other_rows_than_before_are_found_again(
    tmp_path: Path, bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_pairs(
        tmp_path / "pictures",
        [encode_picture(noise_picture(number)) for number in range(6)],
        [f"noise {number}" for number in range(6)],
    )
    make_catalog(DataConfig.from_flat({"source": str(folder)}), tmp_path / "data")
    index = Index.build(Catalog.open(tmp_path / "data"), bundle, tmp_path / "index")
    for file in folder.glob("001.*"):
        file.unlink()
    make_catalog(DataConfig.from_flat({"source": str(folder)}), tmp_path / "data", replace=True)
    hits = {hit.caption: hit for hit in index.search("noise", count=6).hits}
    with pytest.raises(ModeclipError, match=r"data/catalog.lance has the pair .* in another row.* search add "):
        index.pictures([hits["noise 5"]])
    with pytest.raises(ModeclipError, match=r"search add "):
        index.encoded_picture(hits["noise 4"].number)
    with pytest.raises(ModeclipError, match=r"no longer has the pair .*; give modeclip search remove .* --where \"key"):
        index.pictures([hits["noise 1"]])
    with monkeypatch.context() as patched:
        patched.setattr(index_module, "decode_image", None)  # nothing is encoded anew
        added = index.add(Catalog.open(tmp_path / "data"))
    assert (added.num_new, added.num_changed, added.num_moved, added.num_same, added.num_rows) == (0, 0, 4, 1, 6)
    index = Index.open(tmp_path / "index", index.model)
    for number in (0, 2, 3, 4, 5):
        [hit] = index.search(Query(image=noise_picture(number)), count=1).hits
        assert (hit.caption, round(hit.score, 2)) == (f"noise {number}", 1.0)
        assert np.array_equal(np.asarray(index.pictures([hit])[0]), np.asarray(noise_picture(number)))
    assert index.add(Catalog.open(tmp_path / "data")).num_same == 5


def noise_pairs(folder: Path, numbers: Sequence[int]) -> Catalog:
    """Make a catalog of noise pictures, 000.png and so on, whose captions have their numbers."""
    pictures = write_pairs(
        folder / "pictures",
        [encode_picture(noise_picture(number)) for number in numbers],
        [f"noise {number}" for number in numbers],
    )
    make_catalog(DataConfig.from_flat({"source": str(pictures)}), folder / "data")
    return Catalog.open(folder / "data")


def test_images_of_two_catalogs_may_have_the_same_keys(tmp_path: Path, bundle: str) -> None:
    one, other = noise_pairs(tmp_path / "one", range(3)), noise_pairs(tmp_path / "other", [0, 7, 8])
    index = Index.build(one, bundle, tmp_path / "index")
    added = index.add(other)
    assert (added.num_new, added.num_changed, added.num_same, added.num_rows) == (2, 0, 1, 5)  # 000.png is in both
    index = Index.open(tmp_path / "index", index.model)
    for number in (1, 2, 7, 8):
        [hit] = index.search(Query(image=noise_picture(number)), count=1).hits
        assert (hit.caption, round(hit.score, 2)) == (f"noise {number}", 1.0)
        assert np.array_equal(np.asarray(index.pictures([hit])[0]), np.asarray(noise_picture(number)))
    for catalog in (one, other):
        assert index.add(catalog).num_same == 3
    assert index.remove(("caption = 'noise 7'",)) == 1
    left = Index.open(tmp_path / "index", index.model).search("noise", count=9).hits
    assert {hit.caption for hit in left} == {f"noise {number}" for number in (0, 1, 2, 8)}


def test_captions_and_columns_that_change_are_brought_up_to_date(
    tmp_path: Path, bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = noise_pairs(tmp_path, range(4))
    catalog.add_columns({"score": np.array([0.5, np.nan, 0.5, 0.5], np.float32)})
    model = Index.build(Catalog.open(catalog.path), bundle, tmp_path / "index").model
    (tmp_path / "pictures" / "002.txt").write_text("umbrella", encoding="utf-8")
    make_catalog(DataConfig.from_flat({"source": str(tmp_path / "pictures")}), tmp_path / "data", replace=True)
    catalog = Catalog.open(tmp_path / "data")
    catalog.add_columns({"score": np.array([0.5, np.nan, 0.5, 0.5], np.float32)})
    monkeypatch.setattr(index_module, "decode_image", None)  # nothing is encoded anew
    added = Index.open(tmp_path / "index", model).add(Catalog.open(catalog.path))
    assert (added.num_new, added.num_changed, added.num_edited, added.num_same) == (0, 0, 1, 3)
    index = Index.open(tmp_path / "index", model)
    assert "umbrella" in {hit.caption for hit in index.search("umbrella", count=4).hits}
    assert index.search("umbrella", count=4, hybrid=True).hits[0].caption == "umbrella"
    Catalog.open(catalog.path).add_columns({"place": np.arange(4)})
    index = Index.build(Catalog.open(catalog.path), model, tmp_path / "index")
    assert [hit.caption for hit in index.search("noise", where=("place = 3",)).hits] == ["noise 3"]
    assert index.add(Catalog.open(catalog.path)).num_same == 4


def test_an_index_is_moved_with_what_it_was_made_from(tmp_path: Path, bundle: str) -> None:
    home = tmp_path / "home"
    shutil.copytree(bundle, home / "bundle")
    shutil.copytree(Path(noise_pairs(tmp_path, range(3)).path).parent, home / "data")
    catalog = Catalog.open(home / "data")
    with contextlib.chdir(home):
        Index.build(catalog, "bundle#expert-1", "index")
    (tmp_path / "away").mkdir()
    moved = home.rename(tmp_path / "away" / "moved")

    def check(place: Path) -> None:
        index = Index.open(moved / "index")
        assert index.catalogs == [str(place)]
        [hit] = index.search(Query(image=noise_picture(2)), count=1).hits
        assert np.array_equal(np.asarray(index.pictures([hit])[0]), np.asarray(noise_picture(2)))
        assert index.add(Catalog.open(place)).num_same == 3

    check(moved / "data" / "catalog.lance")
    # an index of an earlier modeclip has whole paths alone; what lies beside it, as in a run, is found all the same
    (moved / "data" / "catalog.lance").rename(moved / "catalog.lance")
    content = json.loads((moved / "index" / INDEX_FILE).read_text())
    del content["places"], content["model"]["place"]
    (moved / "index" / INDEX_FILE).write_text(json.dumps(content))
    check(moved / "catalog.lance")
    (moved / "index").rename(tmp_path / "index")
    with pytest.raises(ModeclipError, match="home/bundle"):
        Index.open(tmp_path / "index")


def test_images_that_are_all_alike_are_searched(tmp_path: Path, bundle: str) -> None:
    pictures = write_pairs(tmp_path / "pictures", [encode_picture(noise_picture(0))] * 3, ["a", "b", "c"])
    make_catalog(DataConfig.from_flat({"source": str(pictures)}), tmp_path / "data")
    index = Index.build(Catalog.open(tmp_path / "data"), bundle, tmp_path / "index")
    hits = index.search(Query(text="a heart", image=noise_picture(3)), count=2).hits
    assert len(hits) == 2
    assert all(abs(hit.height) < 0.01 and 0 <= hit.strength <= 1 for hit in hits)


@pytest.mark.parametrize(
    "change",
    [{"heights": [0.0] * 7}, {"heights": None}, {"catalogs": []}, {"config": {"exact": 1}}, {"model": []}],
    ids=str,
)
def test_a_note_that_is_damaged_is_one_line(own: Path, index: Index, change: dict[str, object]) -> None:
    content = json.loads((own / INDEX_FILE).read_text())
    (own / INDEX_FILE).write_text(json.dumps(content | change))
    with pytest.raises(DamagedError, match=f"{next(iter(change))}|index.json has no"):
        Index.open(own, index.model)


def test_rows_of_another_catalog_than_the_note_has_are_one_line(own: Path, index: Index) -> None:
    content = json.loads((own / INDEX_FILE).read_text())
    (own / INDEX_FILE).write_text(json.dumps(content | {"catalogs": [], "places": []}))
    with pytest.raises(DamagedError, match="its rows are of more; delete the folder and give the same"):
        Index.open(own, index.model)


def test_rows_that_are_damaged_are_one_line(own: Path, index: Index, catalog: Catalog) -> None:
    for path in (own / "images.lance" / "data").iterdir():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for work in (
        lambda: Index.open(own, index.model).search("arrow"),
        lambda: Index.open(own, index.model).add(catalog),
    ):
        with pytest.raises(DamagedError, match=r"images\.lance cannot be read .*delete the folder and give the same"):
            work()


def test_a_build_that_was_stopped_goes_on_and_ends_the_same(
    tmp_path: Path, catalog: Catalog, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before anything is written, and between the rows and the note that names them."""
    write = index_module._write_file

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(index_module, "_write", stop)
    with pytest.raises(KeyboardInterrupt):
        Index.build(catalog, index.model, tmp_path / "new")
    with pytest.raises(ModeclipError, match="half built"):
        Index.open(tmp_path / "new")
    monkeypatch.undo()
    monkeypatch.setattr(index_module, "_write_file", stop)
    with pytest.raises(KeyboardInterrupt):
        Index.build(catalog, index.model, tmp_path / "new")
    with pytest.raises(ModeclipError, match="half built; give the same"):
        Index.open(tmp_path / "new")
    monkeypatch.setattr(index_module, "_write_file", write)
    built = Index.build(catalog, index.model, tmp_path / "new")
    assert len(built) == len(catalog)
    assert built.search("arrow", count=30).hits == index.search("arrow", count=30).hits
    assert not list(Path(catalog.path).rglob("fragments-*"))  # what was kept beside the catalog is in the index now


def test_a_stopped_addition_is_not_seen_and_done_again(
    own: Path, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = Index.open(own)
    index.remove(("expert=0",))
    index = Index.open(own, index.model)
    kept, write = len(index), index_module._write_file
    monkeypatch.setattr(index_module, "_write_file", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        index.add(catalog)
    monkeypatch.setattr(index_module, "_write_file", write)
    assert len(Index.open(own, index.model)) == kept
    index.add(catalog)
    assert len(Index.open(own, index.model)) == len(catalog)


def test_an_approximate_index_says_what_it_finds(
    tmp_path: Path, catalog: Catalog, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(approximate_module, "FIRST_LOOKED_AT", 1)
    built = Index.build(catalog, index.model, tmp_path / "new", SearchConfig(exact_up_to=0, recall=0.9))
    found = built.approximate
    assert found is not None
    assert found.recall >= 0.9
    hits = built.search("arrow", count=10)
    assert not hits.exact
    true = {hit.row for hit in index.search("arrow", count=10).hits}
    assert len(true & {hit.row for hit in hits.hits}) >= 7
    assert built.search("arrow", where=("expert=1",)).exact  # few rows are compared one by one
    # the index before stays for those who have it open, older ones go
    files, opened = [found.file], Index.open(tmp_path / "new", index.model)
    assert [path.name for path in (tmp_path / "new").glob("candidates-*")] == files
    for _ in range(2):
        now = Index.open(tmp_path / "new", index.model)
        now.remove([f"key = '{now.read([0], ['key'])[0]['key']}'"])
        now = Index.open(tmp_path / "new", index.model)
        assert now.approximate is not None
        files = [*files[-1:], now.approximate.file]
        assert {path.name for path in (tmp_path / "new").glob("candidates-*")} == set(files)
        assert not now.search("arrow").exact
    with pytest.raises(ModeclipError, match="has changed since it was opened; open it again"):
        opened.search("arrow")
    # without faiss, and as an earlier modeclip has left it, the same index answers exactly
    with monkeypatch.context() as patched:
        patched.setattr(index_module, "faiss_is_there", lambda: False)
        assert Index.open(tmp_path / "new", index.model).search("arrow").exact
    path = tmp_path / "new" / files[-1]
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ModeclipError, match=rf"{path.name}: it cannot be read .*give the same modeclip search build"):
        Index.open(tmp_path / "new", index.model).search("arrow")
    content = json.loads((tmp_path / "new" / INDEX_FILE).read_text())
    del content["approximate"]["file"]
    (tmp_path / "new" / INDEX_FILE).write_text(json.dumps(content))
    assert Index.open(tmp_path / "new", index.model).search("arrow").exact


def test_a_single_clip_is_an_index_of_one(tmp_path: Path, catalog: Catalog) -> None:
    spec = with_weights("modeclip-icon-xxxs", tmp_path)
    index = Index.build(catalog, spec, tmp_path / "index")
    hits = index.search("arrow", count=4).hits
    assert all(hit.parts == pytest.approx((hit.score,)) for hit in hits)


def test_an_index_of_another_model_says_which(own: Path, small_run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small_run / "bundle", tmp_path / "bundle"))
    other = SearchModel.open(folder)
    other = replace(other, refs=(replace(other.refs[0], digest="0" * 64), *other.refs[1:]))
    with pytest.raises(ModeclipError, match=rf"another model than .*\({other.names[0]} has the hash 0+, expected"):
        Index.open(own, other)
    content = json.loads((own / INDEX_FILE).read_text())
    (own / INDEX_FILE).write_text(
        json.dumps(content | {"model": content["model"] | {"spec": str(tmp_path / "gone"), "place": ""}})
    )
    with pytest.raises(ModeclipError, match="gone"):
        Index.open(own)


@pytest.mark.parametrize("name", index_module.CONTENT)
def test_a_note_that_lacks_something_is_one_line(own: Path, index: Index, name: str) -> None:
    content = json.loads((own / INDEX_FILE).read_text())
    del content[name]
    (own / INDEX_FILE).write_text(json.dumps(content))
    with pytest.raises(ModeclipError, match=f"has no {name}; delete the folder and give the same"):
        Index.open(own, index.model)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{index}"], "nothing to look for"),
        (["{index}", " "], "text is empty"),
        (["{index}", "arrow", "--where", "colour=red"], "unknown column"),
        (["{index}", "arrow", "--where", "expert=77"], "has no pair"),
        (["{index}", "arrow", "--count", "0"], "count must be 1 or more"),
        (["{index}", "arrow", "--expert", "expert-77"], "expert-77"),
        (["{index}", "arrow", "--image", "{tmp}/none.png"], "no such file"),
        (["{index}", "arrow", "--image-weight", "2"], "must lie in [0, 1]"),
        (["{index}", "arrow", "--negative-weight", "nan"], "--negative-weight: expected a finite number, 0 or more"),
        (["{index}", "--hybrid", "--image", "{tmp}/a.png"], "needs a text"),
        (["{tmp}/nothing", "arrow"], "no index at"),
        (["remove", "{index}"], "no --where condition"),
        (["remove", "{index}", "--where", "width > 0"], "delete the folder instead"),
        (["build", "{tmp}/nothing", "--model", "{bundle}", "--out", "{tmp}/i"], "no catalog at"),
        (["build", "{catalog}", "--model", "{bundle}#expert-77", "--out", "{tmp}/i"], "expert-77"),
        (["build", "{catalog}", "--model", "ViT-B-32", "--out", "{tmp}/i"], "names no weights"),
        (["build", "{catalog}", "--model", "{bundle}", "--out", "{tmp}"], "expected an index or an empty folder"),
        (["build", "{catalog}", "--model", "{bundle}", "--out", "{tmp}/i", "--recall", "0"], "must lie in (0, 1]"),
    ],
)
def test_mistakes_are_one_line(
    modeclip_command: Callable[..., CompletedProcess[str]],
    index: Index,
    catalog: Catalog,
    bundle: str,
    tmp_path: Path,
    words: list[str],
    message: str,
) -> None:
    noise_picture(0).save(tmp_path / "a.png")
    places = {"index": str(index.folder), "tmp": str(tmp_path), "catalog": catalog.path, "bundle": bundle}
    done = modeclip_command("search", *[word.format(**places) for word in words])
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "i" / INDEX_FILE).exists()


def test_the_command_builds_searches_and_draws(
    modeclip_command: Callable[..., CompletedProcess[str]], catalog: Catalog, bundle: str, tmp_path: Path
) -> None:
    from PIL import Image

    index = tmp_path / "index"
    done = modeclip_command("search", "build", catalog.path, "--model", bundle, "--out", index)
    assert done.returncode == 0, done.stderr
    assert f"{len(catalog):,} images" in done.stdout
    found = json.loads(
        modeclip_command("search", index, "arrow", "--count", "3", "--json", "--sheet", tmp_path / "s.png").stdout
    )
    assert [len(found["hits"]), len(found["weights"])] == [3, len(found["experts"])]
    with Image.open(tmp_path / "s.png") as sheet:
        assert sheet.width > 100
    table = modeclip_command("search", index, "arrow", "--not", "left", "--count", "3").stdout
    assert "strength" in table
    assert found["hits"][0]["caption"][:20] in modeclip_command("search", index, "arrow", "--count", "3").stdout
    done = modeclip_command("search", "remove", index, "--where", "expert=0", "--encoder", "tfidf")
    assert "unknown option" not in done.stderr
    (tmp_path / "build").mkdir()
    with contextlib.chdir(tmp_path):  # a folder of this name is no index
        assert modeclip_command("search", "build", catalog.path, "--model", bundle, "--out", index).returncode == 0
    again = modeclip_command("search", "add", index, catalog.path)
    assert "0 images are new" in again.stdout
