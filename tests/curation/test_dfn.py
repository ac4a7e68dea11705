"""DFN on real icons: scores against the model run by hand, what is kept and computed again, clean pairs, mistakes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch

from modeclip.curation import dfn, scores
from modeclip.curation.curating import Curated, curate, make_method
from modeclip.curation.dfn import DfnConfig
from modeclip.data.catalog import Catalog
from modeclip.data.selection import Selection
from modeclip.errors import ModeclipError
from modeclip.models.clip import load_clip
from modeclip.training.jobs import TrainConfig
from support import plain_png, weights_of, with_weights

MODEL = "modeclip-icon-xxxs"
NEAR = 2e-2
"""Difference of scores that bfloat16 makes, where the processor has it."""
SHORT = TrainConfig(model=MODEL, samples=64, batch_size=16, total_parts=4, seed_parts=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A CLIP with weights."""
    return with_weights(MODEL, tmp_path_factory.mktemp("filter"))


@pytest.fixture(scope="module")
def vectors(icons_catalog: Path, model: str) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of all images and captions, as open_clip makes them one after the other."""
    clip, catalog = load_clip(model), Catalog.open(icons_catalog)
    clip.model.eval()
    rows = np.arange(len(catalog))
    with torch.no_grad():
        pixels = [clip.preprocess(picture)[None] for picture in catalog.images(rows)]
        images = torch.cat([clip.model.encode_image(one, normalize=True) for one in pixels])
        captions = catalog.read(["caption"])["caption"].tolist()
        texts = torch.cat([clip.model.encode_text(clip.tokenizer([one]), normalize=True) for one in captions])
    assert isinstance(clip.model, open_clip.CustomTextCLIP | open_clip.CLIP)
    return images.numpy(), texts.numpy()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pairs that were embedded, block by block."""
    blocks: list[int] = []
    embed = dfn.PairVectors.__call__

    def count(self: dfn.PairVectors, block: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        blocks.append(len(block["caption"]))
        return embed(self, block)

    monkeypatch.setattr(dfn.PairVectors, "__call__", count)
    return blocks


def kept(curated: Curated) -> np.ndarray:
    return np.flatnonzero(curated.column("kept"))


def test_the_score_is_the_cosine_and_the_top_is_kept(
    icons_copy: Catalog, model: str, vectors: tuple[np.ndarray, np.ndarray], counted: list[int]
) -> None:
    curated = curate(icons_copy, DfnConfig(filter=model))
    assert sum(counted) == len(icons_copy)
    found = icons_copy.read(["dfn_score"])["dfn_score"]
    assert found.dtype == np.float32
    assert np.allclose(found, (vectors[0] * vectors[1]).sum(1), atol=NEAR)
    least = sorted(found.tolist(), reverse=True)[int(len(found) * 0.15)]
    assert np.array_equal(kept(curated), np.flatnonzero(found >= least))
    assert f"{least:.4g}" in curated.causes[1]
    (table,) = curated.prepared.tables
    assert table.rows[0][-1] == str(len(kept(curated)))
    (chart,) = curated.prepared.charts
    assert sum(chart.counts) == len(found)
    assert sum(chart.kept) == len(kept(curated))
    assert chart.threshold == least


def test_another_score_or_threshold_looks_at_no_image(
    icons_copy: Catalog, model: str, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    curate(icons_copy, DfnConfig(filter=model), dry_run=True)
    counted.clear()
    version = icons_copy.dataset.version
    by_half = curate(icons_copy, DfnConfig(filter=model, fraction=(0.5,)), dry_run=True)
    assert abs(len(kept(by_half)) - len(icons_copy) / 2) <= 1
    above = curate(icons_copy, DfnConfig(filter=model, threshold=(0.05,)), dry_run=True)
    assert np.array_equal(kept(above), np.flatnonzero(above.column("score") >= 0.05))
    by_sclip = DfnConfig(filter=model, score="sclip", contrast=200, partitions=2)
    first = curate(icons_copy, by_sclip, dry_run=True).column("score")
    monkeypatch.setattr(dfn, "sclip_of_partition", None)  # what was computed is kept, too
    assert np.array_equal(first, curate(icons_copy, by_sclip, dry_run=True).column("score"))
    assert counted == []
    assert icons_copy.dataset.version == version


def test_sclip_is_that_of_the_vectors(icons_copy: Catalog, model: str, vectors: tuple[np.ndarray, np.ndarray]) -> None:
    settings: dict[str, Any] = {"tau": 0.07, "partitions": 2}
    config = DfnConfig(filter=model, score="sclip", contrast=300, train=TrainConfig(seed=3), **settings)
    found = curate(icons_copy, config, name="by_sclip", dry_run=True).column("score")
    expected = scores.sclip(*vectors, batch_size=300, seed=3, **settings)
    assert np.allclose(found, expected, atol=NEAR)
    assert np.corrcoef(found, expected)[0, 1] > 0.99


def test_a_second_score_chooses_from_what_the_first_has_kept(
    icons_copy: Catalog, model: str, vectors: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    targets = tmp_path / "shapes"
    for split, color in (("train", (250, 20, 20)), ("train", (0, 0, 255)), ("test", (0, 0, 0))):
        folder = targets / split / f"colour {color[0]}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "a.png").write_bytes(plain_png(color))
    for name in ("colour 250", "colour 0"):
        (targets / "test" / name).mkdir(exist_ok=True)
        (targets / "test" / name / "b.png").write_bytes(plain_png(3))
    config = DfnConfig(filter=model, score="sclip+normsim", fraction=(0.4, 0.5), targets=(str(targets),), norm="inf")
    curated = curate(icons_copy, config, dry_run=True)
    clip = load_clip(model)
    clip.model.eval()
    from PIL import Image

    with torch.no_grad():
        pictures = [clip.preprocess(Image.new("RGB", (4, 4), color))[None] for color in ((250, 20, 20), (0, 0, 255))]
        goals = torch.cat([clip.model.encode_image(one, normalize=True) for one in pictures]).numpy()
    assert np.allclose(curated.column("normsim"), np.abs(vectors[0] @ goals.T).max(1), atol=NEAR)
    first, second = curated.column("score"), curated.column("normsim")
    of_catalog = replace(config, targets=(f"{icons_copy.path}#caption=heart",))
    hearts = vectors[0][icons_copy.read(["caption"])["caption"] == "heart"]
    assert len(hearts)
    found = curate(icons_copy, of_catalog, dry_run=True).column("normsim")
    assert np.allclose(found, np.abs(vectors[0] @ hearts.T).max(1), atol=NEAR)
    passed = first >= sorted(first, reverse=True)[int(len(first) * 0.4)]
    least = sorted(second[passed], reverse=True)[int(passed.sum() * 0.5)]
    expected = np.where(~passed, 1, np.where(second >= least, 0, 2))
    assert np.array_equal(curated.column("cause"), expected)
    assert [row[0] for row in curated.prepared.tables[0].rows] == ["sclip", "normsim"]
    assert [row[-1] for row in curated.prepared.tables[0].rows] == [str(passed.sum()), str((expected == 0).sum())]


def test_learnability_is_the_loss_of_the_learner_less_that_of_the_filter(icons_copy: Catalog, model: str) -> None:
    def score(**settings: Any) -> np.ndarray:
        config = DfnConfig(tau=0.05, random_weights=True, train=TrainConfig(seed=7), **settings)
        return np.asarray(curate(icons_copy, config, dry_run=True).column("score"))

    reference, learner = (score(filter=one, score="sclip") for one in (model, MODEL))
    found = score(filter=model, learner=MODEL, score="learnability")
    assert np.allclose(found, (reference - learner) / 0.05, atol=1e-4)
    assert np.abs(found).max() > 0


def test_a_soft_cap_gives_probabilities(icons_copy: Catalog, model: str) -> None:
    curated = curate(icons_copy, DfnConfig(filter=model, soft_cap=3000), name="capped", dry_run=True)
    found, score = curated.column("probability"), curated.column("score")
    assert found.dtype == np.float32
    assert found.max() == 1
    assert found.min() >= 0
    draws = scores.soft_cap(score / np.float32(0.01), 3000)
    assert np.allclose(found, draws / draws.max())
    assert np.array_equal(curated.column("kept"), found > 0)
    assert (np.diff(found[np.argsort(score)]) >= -1e-6).all()
    assert sum(float(row[1]) for row in curated.prepared.tables[1].rows[2:]) > 0.5


def test_only_selected_pairs_are_embedded_and_compared(icons_copy: Catalog, model: str, counted: list[int]) -> None:
    rows = np.arange(len(icons_copy))
    icons_copy.add_columns({"third": rows % 3 == 0})
    curated = curate(icons_copy, DfnConfig(filter=model, fraction=(0.5,)), selection=Selection(mask="third"))
    assert sum(counted) == (rows % 3 == 0).sum()
    found = icons_copy.read(["dfn_score", "dfn_cause"])
    chosen = found["dfn_score"][::3]
    least = sorted(chosen.tolist(), reverse=True)[int(len(chosen) * 0.5)]
    assert np.array_equal(kept(curated), rows[::3][chosen >= least])
    assert (found["dfn_cause"][rows % 3 > 0] == 255).all()


@pytest.mark.usefixtures("trains_here")
class TestClean:
    """A filter that is trained on pairs that the user marks clean."""

    def test_a_mask_another_catalog_a_condition_or_a_top(
        self, icons_copy: Catalog, icons_catalog: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rows = np.arange(len(icons_copy))
        points = np.where(rows % 7 == 0, np.nan, rows * 61 % 997).astype(np.float32)
        least = sorted(points[rows % 7 > 0].tolist(), reverse=True)[int((rows % 7 > 0).sum() * 0.3)]
        icons_copy.add_columns({"hand": points >= least, "points": points})
        found = {}
        for clean in ("hand", f"points >= {least}", "points:0.3", str(icons_catalog)):
            curated = curate(icons_copy, DfnConfig(clean=clean, train=SHORT), dry_run=True)
            found[clean] = curated.column("score").tobytes()
        assert len(set(found.values())) == 2  # three words for the same pairs, and all pairs
        filters = sorted(Path(icons_copy.path).with_suffix(".filters").iterdir())
        assert len({weights_of(folder) for folder in filters}) == 2
        monkeypatch.setattr("modeclip.training.trainer.train", None)  # a filter is trained once
        again = curate(icons_copy, DfnConfig(clean="hand", train=SHORT), dry_run=True)
        assert again.column("score").tobytes() == found["hand"]
        by_folder = curate(icons_copy, DfnConfig(filter=str(filters[0])), dry_run=True)
        assert by_folder.column("score").tobytes() in found.values()

    @pytest.mark.parametrize(
        ("clean", "message"),
        [
            ("few", r"marks 9 pairs, fewer than one batch of 16; mark more, or set train.batch_size to at most 9"),
            ("none", r"dfn.clean 'none': .*no pair"),
            ("hnad", r"dfn.clean 'hnad': .*hnad"),
            ("width", r"dfn.clean 'width': .*booleans"),
            ("width:2", r"dfn.clean 'width:2': expected a share in \(0, 1\], got 2"),
            ("caption:0.5", r"dfn.clean 'caption:0.5': expected COLUMN:FRACTION"),
        ],
    )
    def test_mistakes(self, icons_copy: Catalog, clean: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
        rows = np.arange(len(icons_copy))
        icons_copy.add_columns({"few": rows < 9, "none": rows < 0})
        monkeypatch.setattr(dfn, "run_jobs", None)
        shutil.rmtree(Path(icons_copy.path).with_suffix(".filters"), ignore_errors=True)
        with pytest.raises(ModeclipError, match=message) as caught:
            curate(icons_copy, DfnConfig(clean=clean, train=SHORT))
        assert "\n" not in str(caught.value)
        assert not Path(icons_copy.path).with_suffix(".filters").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "either dfn.filter .* or dfn.clean .* got neither"),
        ({"filter": "a", "clean": "b"}, "got both"),
        ({"filter": "a", "score": "cosin"}, "unknown dfn.score 'cosin'; known: cosine, sclip"),
        ({"filter": "a", "score": "cosine+cosine"}, "each score once"),
        ({"filter": "a", "score": "cosine+sclip"}, "dfn.fraction: expected 2 numbers, .* got 0"),
        ({"filter": "a", "threshold": (0.1, 0.2)}, "dfn.threshold: expected 1 numbers, .* got 2"),
        ({"filter": "a", "fraction": (0.0,)}, r"shares in \(0, 1\], got 0"),
        ({"filter": "a", "fraction": (1.5,)}, r"shares in \(0, 1\], got 1.5"),
        ({"filter": "a", "threshold": (float("nan"),)}, "finite number, got nan"),
        ({"filter": "a", "fraction": (0.5,), "threshold": (0.5,)}, "one of dfn.fraction"),
        ({"filter": "a", "soft_cap": 0}, "dfn.soft_cap: expected 1 or more"),
        ({"filter": "a", "soft_cap": 5, "score": "cosine+sclip"}, "single dfn.score"),
        ({"filter": "a", "score": "normsim"}, "dfn.targets: the score normsim needs it"),
        ({"filter": "a", "targets": ("t",)}, "dfn.targets: only the score normsim uses it"),
        ({"filter": "a", "score": "learnability"}, "dfn.learner: the score learnability needs it"),
        ({"filter": "a", "tau": 0.0}, "dfn.tau: expected a finite number above 0"),
        ({"filter": "a", "contrast": 1}, "dfn.contrast: expected 2 or more"),
    ],
)
def test_settings_that_cannot_be_meant(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ModeclipError, match=message):
        DfnConfig(**settings)


def test_a_setting_of_the_training_that_does_not_exist_is_named() -> None:
    with pytest.raises(ModeclipError, match=r"unknown setting of dfn.train.augment 'crop'; known: min_crop_share"):
        make_method("dfn", filter="a", train={"augment": {"crop": 1}})


def test_models_and_targets_that_cannot_be_used(icons_copy: Catalog, model: str, tmp_path: Path) -> None:
    (tmp_path / "t" / "red").mkdir(parents=True)
    (tmp_path / "t" / "red" / "a.png").write_bytes(plain_png())
    for settings, message in (
        ({"filter": MODEL}, f"{MODEL} names no weights.*write {MODEL}@TAG"),
        ({"filter": "ViT-Z"}, "unknown model 'ViT-Z'"),
        ({"filter": str(tmp_path)}, "open_clip_config.json is missing"),
        ({"filter": model, "score": "normsim", "targets": (str(tmp_path / "t"),)}, "'t' has no training split"),
        ({"filter": model, "threshold": (2.0,)}, "would keep none of .* cosine below 2"),
    ):
        with pytest.raises(ModeclipError, match=message) as caught:
            curate(icons_copy, DfnConfig(**settings), name="wrong")
        assert "\n" not in str(caught.value)
    assert not [column for column in icons_copy.columns if column.startswith("wrong")]


def test_the_command_takes_scores_and_fractions(
    icons_catalog: Path, model: str, modeclip_command: Callable[..., Any], tmp_path: Path
) -> None:
    path = shutil.copytree(icons_catalog, tmp_path / "catalog.lance")
    done = modeclip_command("curate", path, "dfn", "--filter", model, "--fraction", "0.3", "--seed", "1")
    assert done.returncode == 0, done.stderr
    assert {"dfn_score", "dfn_kept", "dfn_cause"} <= set(Catalog.open(path).columns)
    failed = modeclip_command("curate", path, "dfn", "--filter", MODEL)
    assert failed.returncode == 2
    assert "--random-weights" in failed.stderr
    assert failed.stderr.count("\n") == 1


def test_help_leaves_training_to_the_command_that_trains(modeclip_command: Callable[..., Any]) -> None:
    shown = modeclip_command("curate", "pool", "dfn", "--help").stdout
    assert "--soft-cap" in shown
    assert "--weight-decay" not in shown
    assert "modeclip train" in shown
    taken = modeclip_command("curate", "pool", "dfn", "--weight-decay", "much")
    assert "--weight-decay: expected a number" in taken.stderr
