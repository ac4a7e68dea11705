"""Duplicates of a made pool: who stays, whatever the order and the fragments; each kind against slow search."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from tests.data.test_mapping import METADATA

from modeclip.curation.clustered import ImageVectors, cluster_pairs, to_unit
from modeclip.curation.curating import Curated, curate
from modeclip.curation.duplicates import NOT_SEARCHED, SEARCHES_FOLDER, DuplicatesConfig, correlations
from modeclip.curation.semdedup import find_near_copies
from modeclip.data.catalog import PAIR_COLUMNS, Catalog
from modeclip.data.images import hash_image
from modeclip.data.selection import Selection
from modeclip.data.storage import FileWriter, append, create
from modeclip.errors import ModeclipError
from support import encode_picture, grouped_rows, noise_picture, with_weights

Pair = dict[str, Any]


def pair(key: str, caption: str, picture: Image.Image, kind: str = "PNG", **options: object) -> Pair:
    data = encode_picture(picture, kind, **options)
    return {
        "key": key, "caption": caption, "image": data, "path": None, "offset": 0, "size": len(data),
        "width": picture.width, "height": picture.height, "digest": hash_image(data), "group": "",
    }  # fmt: skip


def table(pairs: Sequence[Pair]) -> pa.Table:
    return pa.Table.from_pylist(list(pairs), schema=pa.schema([(name, PAIR_COLUMNS[name]) for name in pairs[0]]))


def write(path: Path, pairs: Sequence[Pair], *, max_rows: int = 7) -> Catalog:
    content = table(pairs)
    writer = FileWriter(str(path), content.schema, max_rows=max_rows)
    writer.write(content)
    create(str(path), content.schema.with_metadata(METADATA), writer.finish())
    return Catalog.open(path)


def smooth(seed: int, side: int = 64) -> Image.Image:
    return noise_picture(seed, (6, 6)).resize((side, side), Image.Resampling.BICUBIC)


def pool() -> list[Pair]:
    """Twelve pictures; some twice or more: the same bytes, other bytes of the same pixels, smaller, as JPEG."""
    pairs = [pair(f"a{number:02d}", f"picture {number}", smooth(number)) for number in range(12)]
    pairs += [pair(f"b{number:02d}", f"a longer caption {number}", smooth(number)) for number in (0, 1)]
    pairs += [pair(f"A{number:02d}", f"picture {number}", smooth(number)) for number in (1, 2)]
    pairs += [pair("c03", "p", smooth(3), compress_level=0), pair("c04", "picture of four", smooth(4), "BMP")]
    pairs += [pair("d05", "p", smooth(5).resize((40, 40))), pair("d06", "sixth picture", smooth(6), "JPEG", quality=60)]
    return pairs


def kept(curated: Curated) -> set[str]:
    keys = curated.catalog.read(["key"])["key"]
    return set(keys[curated.column("kept")])


EXACT = {*(f"a{number:02d}" for number in range(3, 12)), "b00", "b01", "A02", "c03", "c04", "d05", "d06"}
PIXELS = EXACT - {"c03", "a04"}
PERCEPTUAL = PIXELS - {"d05", "a06"}


@pytest.mark.parametrize("max_rows", [3, 100])
def test_the_longest_caption_stays_then_the_first_key(tmp_path: Path, max_rows: int) -> None:
    pairs = pool()
    for name, order in {"one": pairs, "other": pairs[::-1]}.items():
        catalog = write(tmp_path / name, order, max_rows=max_rows)
        assert kept(curate(catalog, DuplicatesConfig(), dry_run=True)) == EXACT
        assert kept(curate(catalog, DuplicatesConfig(pixels=True), dry_run=True)) == PIXELS
        assert kept(curate(catalog, DuplicatesConfig(by="perceptual"), dry_run=True)) == PERCEPTUAL


def test_each_dropped_pair_names_the_one_that_stays(tmp_path: Path) -> None:
    catalog = write(tmp_path / "pool", pool())
    curated = curate(catalog, DuplicatesConfig(by="perceptual"))
    keys, of = catalog.read(["key"])["key"], curated.column("of")
    dropped = np.flatnonzero(curated.column("cause") == 1)
    found = {keys[row]: keys[of[row]] for row in dropped.tolist()}
    assert found == {
        "a00": "b00", "a01": "b01", "A01": "b01", "a02": "A02", "c03": "a03", "a04": "c04", "d05": "a05", "a06": "d06"
    }  # fmt: skip
    assert (of[curated.column("kept")] == -1).all()


def test_pairs_that_are_added_are_compared_with_all(tmp_path: Path) -> None:
    pairs = pool()
    catalog = write(tmp_path / "pool", pairs[:12])
    assert len(kept(curate(catalog, DuplicatesConfig(by="perceptual")))) == 12
    writer = FileWriter(catalog.path, table(pairs[:1]).schema)
    writer.write(table(pairs[12:]))
    append(catalog.path, writer.finish(), METADATA | {"modeclip.fingerprint": "another"})
    catalog = Catalog.open(catalog.path)
    again = curate(catalog, DuplicatesConfig(by="perceptual"))
    assert kept(again) == PERCEPTUAL
    assert again.num_computed == len(pairs)
    assert curate(Catalog.open(catalog.path), DuplicatesConfig(by="perceptual")).num_computed == 0


def test_only_selected_pairs_are_compared(tmp_path: Path) -> None:
    catalog = write(tmp_path / "pool", pool())
    curated = curate(catalog, DuplicatesConfig(), selection=Selection(where=("key LIKE 'a%'",)), dry_run=True)
    assert (curated.column("cause") == 1).sum() == 0
    assert (curated.column("cause") == 255).sum() == 8


def test_drawings_that_only_share_their_outline_are_no_copies(tmp_path: Path) -> None:
    """A hash of 64 bits alone takes them for the same."""
    drawings = []
    for number in range(4):
        picture = np.full((64, 64, 3), 255, np.uint8)
        picture[8:56, 8:56] = 0
        picture[14:50, 14:50] = 255
        picture[20 + 6 * number : 26 + 6 * number, 20:44] = 90
        drawings.append(Image.fromarray(picture))
    catalog = write(tmp_path / "pool", [pair(f"{n}", f"{n}", drawing) for n, drawing in enumerate(drawings)])
    assert len(kept(curate(catalog, DuplicatesConfig(by="perceptual", bits=15), dry_run=True))) == 4
    assert len(kept(curate(catalog, DuplicatesConfig(by="perceptual", bits=15, correlation=0.0), dry_run=True))) < 4


def test_correlations_are_those_of_numpy() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (6, 256), dtype=np.uint8)
    pictures[5] = 7
    one, other = np.triu_indices(6, 1)
    pairs = zip(one.tolist(), other.tolist(), strict=True)
    expected = np.array([0.0 if b == 5 else np.corrcoef(pictures[a], pictures[b])[0, 1] for a, b in pairs])
    np.testing.assert_allclose(correlations(pictures, one, other), expected, atol=1e-12)


# ---------------------------------------------------------------- by vector


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """300 pairs with vectors in six groups, some of them repeated, and clusters, of which one is empty."""
    random = np.random.default_rng(5)
    x = grouped_rows(300, 16, 4)
    x[200:] = to_unit(x[:100] + 0.08 * random.normal(size=(100, 16)))
    x[250:260] = x[0]
    order = random.permutation(300)
    pictures = smooth(0, 4)
    pairs = [pair(f"k{number:03d}", "c" * int(random.integers(1, 4)), pictures) for number in range(300)]
    catalog = write(tmp_path_factory.mktemp("embedded") / "pool", [pairs[row] for row in order], max_rows=77)
    catalog.add_columns({"caption_embedding": x[order].astype(np.float16)}, {"encoder": "made"})
    cluster_of = np.array([0, 1, 2, 4, 5], np.int32)
    labels = cluster_of[[int(key[1:]) % 100 % 5 for key in catalog.read(["key"])["key"]]]
    catalog.add_columns({"fine_cluster": labels, "expert": labels // 3}, {"clustering": "made"})
    return catalog


def slow_semantic(catalog: Catalog, eps: float) -> set[str]:
    """SemDeDup in plain Python."""
    pairs = catalog.read(["key", "caption", "caption_embedding", "fine_cluster"])
    x, stays = to_unit(pairs["caption_embedding"]).astype(np.float64), set()
    clusters = defaultdict(list)
    for row, cluster in enumerate(pairs["fine_cluster"].tolist()):
        clusters[cluster].append(row)
    for rows in clusters.values():
        center = x[rows].sum(0) / np.linalg.norm(x[rows].sum(0))
        order = sorted(
            rows, key=lambda row: (-round(1 - x[row] @ center, 9), -len(pairs["caption"][row]), pairs["key"][row])
        )
        mine: list[int] = []
        for row in order:
            if not any(x[row] @ x[other] > 1 - eps for other in mine):
                mine.append(row)
        stays |= {pairs["key"][row] for row in mine}
    return stays


@pytest.mark.parametrize("eps", [0.02, 0.2])
def test_semantic_copies_are_those_of_a_slow_search(embedded: Catalog, eps: float) -> None:
    curated = curate(embedded, DuplicatesConfig(by="semantic", eps=eps), dry_run=True)
    assert kept(curated) == slow_semantic(embedded, eps)
    dropped = curated.column("cause") == 1
    assert (curated.column("score")[dropped] > 1 - eps).all()
    assert np.isnan(curated.column("score")[~dropped]).all()


def test_a_search_that_ended_early_goes_on_and_is_not_repeated(
    embedded: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, searched, ends_at = DuplicatesConfig(by="semantic", eps=0.07), list[int](), [2]

    def search(x: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
        if len(searched) >= ends_at[0]:
            raise RuntimeError("the machine is gone")
        searched.append(len(x))
        return find_near_copies(x, threshold)

    monkeypatch.setattr("modeclip.curation.duplicates.find_near_copies", search)
    with pytest.raises(RuntimeError, match="gone"):
        curate(embedded, config, dry_run=True)
    kept_files = (Path(embedded.path) / SEARCHES_FOLDER).iterdir()
    open_pairs = {path: int((np.fromfile(path, np.int64)[::2] == NOT_SEARCHED).sum()) for path in kept_files}
    ((kept_file, count),) = ((path, count) for path, count in open_pairs.items() if count)
    assert count == 300 - sum(searched)
    ends_at[0] = 1000
    for _ in range(2):  # the second time all is known
        assert kept(curate(embedded, config, dry_run=True)) == slow_semantic(embedded, 0.07)
        assert sum(searched) == 300
    assert kept(curate(embedded, replace(config, eps=0.2), dry_run=True)) == slow_semantic(embedded, 0.2)
    assert kept_file not in kept_file.parent.iterdir()


def test_dropped_pairs_drop_others_only_with_chain(embedded: Catalog) -> None:
    plain = curate(embedded, DuplicatesConfig(by="semantic", eps=0.3), dry_run=True)
    chain = curate(embedded, DuplicatesConfig(by="semantic", eps=0.3, chain=True), dry_run=True)
    assert kept(chain) < kept(plain)
    assert ((chain.column("score") > np.float32(0.7)) == (chain.column("cause") == 1)).all()


@pytest.mark.parametrize("chain", [False, True])
def test_the_kept_fraction_is_met(embedded: Catalog, chain: bool) -> None:
    curated = curate(embedded, DuplicatesConfig(by="semantic", kept_fraction=0.5, chain=chain), dry_run=True)
    assert abs(len(kept(curated)) - 150) <= 2


def test_density_and_balance_keep_what_was_asked_for(embedded: Catalog) -> None:
    for by in ("density", "balanced"):
        curated = curate(embedded, DuplicatesConfig(by=by, kept_fraction=0.4), dry_run=True)
        assert curated.column("kept").sum() == 120
    labels = embedded.read(["fine_cluster"])["fine_cluster"]
    sizes = np.unique(labels[curated.column("kept")], return_counts=True)[1]
    assert np.abs(np.bincount([0, 0, 0, 1, 1], weights=sizes) - 60).max() <= 1
    assert np.ptp(sizes[:3]) <= 1


def test_density_keeps_the_farthest(embedded: Catalog) -> None:
    stays = curate(embedded, DuplicatesConfig(by="density", kept_fraction=0.4), dry_run=True).column("kept")
    found = embedded.read(["caption_embedding", "fine_cluster"])
    x, labels = to_unit(found["caption_embedding"]).astype(np.float64), found["fine_cluster"]
    for cluster in np.unique(labels).tolist():
        mine = labels == cluster
        distance = 1 - x[mine] @ x[mine].sum(0) / np.linalg.norm(x[mine].sum(0))
        assert distance[stays[mine]].min() >= distance[~stays[mine]].max() - 1e-9


def test_what_balance_draws_depends_on_pairs_and_seed_alone(embedded: Catalog, tmp_path: Path) -> None:
    first = kept(curate(embedded, DuplicatesConfig(by="balanced", kept_fraction=0.4), dry_run=True))
    columns = embedded.dataset.to_table().to_pylist()[::-1]
    other = write(tmp_path / "other", [{name: row[name] for name in PAIR_COLUMNS if name in row} for row in columns])
    other.add_columns({"caption_embedding": np.array([row["caption_embedding"] for row in columns], np.float16)})
    labels = np.array([row["fine_cluster"] for row in columns], np.int32)
    other.add_columns({"fine_cluster": labels, "expert": labels // 3}, {"clustering": "made"})
    assert kept(curate(other, DuplicatesConfig(by="balanced", kept_fraction=0.4), dry_run=True)) == first
    assert kept(curate(other, DuplicatesConfig(by="semantic"), dry_run=True)) == slow_semantic(embedded, 0.05)
    assert kept(curate(other, DuplicatesConfig(by="balanced", kept_fraction=0.4, seed=1), dry_run=True)) != first


def test_pairs_outside_of_the_selection_are_copies_of_no_row(tmp_path: Path) -> None:
    catalog = write(tmp_path / "pool", [pair(f"{n:02}", f"{n:02}", noise_picture(n % 3, (4, 4))) for n in range(12)])
    catalog.add_columns({"good": np.arange(12) >= 6})
    curated = curate(Catalog.open(catalog.path), "duplicates", selection=Selection(mask="good"))
    assert curated.column("of").tolist() == [-1] * 9 + [6, 7, 8]


def test_balance_draws_anew_among_pairs_that_metaclip_has_drawn(tmp_path: Path) -> None:
    words = ["plow" if number % 10 == 0 else "dog" for number in range(1500)]
    picture = noise_picture(0, (4, 4))
    catalog = write(tmp_path / "pool", [pair(f"{n:04}", f"a {word} {n}", picture) for n, word in enumerate(words)])
    catalog.add_columns({"caption_embedding": np.ones((1500, 4), np.float16)})
    (tmp_path / "entries.txt").write_text("dog\nplow\n")
    curate(catalog, "metaclip", entries=str(tmp_path / "entries.txt"), t=150)
    catalog, selection = Catalog.open(catalog.path), Selection(mask="metaclip_kept")
    given, is_plow = catalog.read(["metaclip_kept"])["metaclip_kept"], np.array(words) == "plow"
    curated = curate(catalog, "duplicates", by="balanced", kept_fraction=0.5, clusters=1, selection=selection)
    stays = curated.column("kept")
    shares = [stays[given & some].sum() / (given & some).sum() for some in (is_plow, ~is_plow)]
    assert all(0.33 < share < 0.67 for share in shares)  # 4 standard deviations


def test_clusters_of_their_own_hold_all_pairs_once(embedded: Catalog) -> None:
    selected = np.arange(300) % 3 > 0
    pairs = cluster_pairs(embedded, selected, model=None, num_clusters=7, seed=0)
    assert sorted(pairs.rows.tolist()) == np.flatnonzero(selected).tolist()
    assert pairs.sizes.sum() == 200
    stored = embedded.read(["caption_embedding"], pairs.rows)["caption_embedding"]
    np.testing.assert_array_equal(pairs.vectors, stored)
    near = [np.vecdot(x := pairs.unit_vectors(j), x.mean(0) / np.linalg.norm(x.mean(0))).mean() for j in range(7)]
    assert np.mean(near) > 0.7


def test_image_vectors_of_a_model_are_kept_beside_the_catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog, model = write(tmp_path / "pool", pool()), with_weights("modeclip-icon-xxxs", tmp_path)
    config = DuplicatesConfig(by="semantic", model=model, clusters=1, eps=0.0001)
    stays = kept(curate(catalog, config, dry_run=True))
    assert {"a07", "a08", "a09", "a10", "a11"} <= stays
    assert all(
        len(stays & {f"{letter}{number}" for letter in "aAbcd"}) == 1 for number in ("00", "01", "02", "03", "04")
    )
    monkeypatch.setattr(ImageVectors, "__call__", None)  # what is computed twice fails
    assert kept(curate(catalog, config, dry_run=True)) == stays
    with pytest.raises(ModeclipError, match="encodes texts"):
        curate(catalog, DuplicatesConfig(by="semantic", model=f"clip:{model}"), dry_run=True)


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize("config", [DuplicatesConfig(pixels=True), DuplicatesConfig(by="perceptual")])
def test_an_image_that_does_not_decode_is_named(tmp_path: Path, config: DuplicatesConfig) -> None:
    pairs = [pair(key, key, smooth(place)) for place, key in enumerate("abc")]
    pairs[1] |= {"image": None, "path": str(tmp_path / "b.png"), "size": 12, "width": 0, "height": 0, "digest": None}
    (tmp_path / "b.png").write_bytes(b"not an image")
    with pytest.raises(ModeclipError, match=r"image of 'b' \(path .*b\.png\): image does not decode; .*--replace"):
        curate(write(tmp_path / "pool", pairs), config, dry_run=True)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"by": "semantic", "eps": 0.0}, "eps.*above 0"),
        ({"by": "semantic", "eps": float("nan")}, "eps.*above 0"),
        ({"by": "density"}, "kept_fraction.*got none"),
        ({"by": "balanced", "kept_fraction": 1.5}, "kept_fraction.*at most 1"),
        ({"bits": 16}, "bits.*15"),
        ({"by": "perceptual", "pixels": True}, "pixels is for exact"),
        ({"chain": True}, "chain is for semantic"),
        ({"by": "perceptual", "correlation": 2.0}, "correlation.*0 to 1"),
        ({"by": "density", "kept_fraction": 0.5, "temperature": 0.0}, "temperature.*above 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ModeclipError, match=words):
        DuplicatesConfig(**settings)


def test_a_pool_without_vectors_is_told_how_to_get_them(tmp_path: Path) -> None:
    catalog = write(tmp_path / "pool", pool())
    with pytest.raises(ModeclipError, match=r"modeclip embed.*--model"):
        curate(catalog, DuplicatesConfig(by="semantic"))
    catalog.add_columns({"caption_embedding": np.ones((20, 4), np.float16)}, {"encoder": "made"})
    with pytest.raises(ModeclipError, match="clusters is 1,000"):
        curate(catalog, DuplicatesConfig(by="semantic", clusters=1000))


def test_the_command_marks_copies_shows_them_and_does_nothing_twice(
    tmp_path: Path, modeclip_command: Callable[..., Any]
) -> None:
    catalog = write(tmp_path / "run" / "catalog.lance", pool())

    def curate_by(*words: object) -> dict[str, Any]:
        done = modeclip_command("curate", tmp_path / "run", "duplicates", *words, "--json")
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    tried = curate_by("--by", "perceptual", "--dry-run")
    assert tried["num_kept"] == len(PERCEPTUAL)
    assert Path(tried["page"]) == tmp_path / "run" / "curation" / "duplicates-dry-run" / "curate.html"
    assert Catalog.open(catalog.path).columns == catalog.columns
    found = curate_by("--pixels", "--column", "same")
    assert (found["num_kept"], found["num_selected"]) == (len(PIXELS), len(pool()))
    columns = Catalog.open(catalog.path).read(["key", "same_kept", "same_of"])
    assert set(columns["key"][columns["same_kept"]]) == PIXELS
    assert columns["key"][columns["same_of"][columns["key"].tolist().index("a00")]] == "b00"
    assert "same image as a pair that stays" in Path(found["page"]).read_text()
    after = modeclip_command("curate", tmp_path / "run", "duplicates", "--pixels", "--column", "same")
    assert "nothing to do" in after.stderr
    wrong = modeclip_command("curate", tmp_path / "run", "duplicates", "--by", "density")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert "--kept-fraction" in wrong.stderr
