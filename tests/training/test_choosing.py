"""Which model fits the pairs: the smallest that sees enough, with the reason; a model that was trained stays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from modeclip.data.catalog import Catalog
from modeclip.data.indexing import index
from modeclip.data.sources import DataConfig
from modeclip.models.clip import load_clip
from modeclip.training.choosing import LADDER, Fit, choose_model, with_model
from modeclip.training.experts import ExpertsConfig, part
from modeclip.training.jobs import AUTO, TrainConfig
from support import encode_picture, make_job, noise_picture, write_pairs


def pairs_of(folder: Path, side: int, words: int) -> Catalog:
    pictures = [encode_picture(noise_picture(seed, (side + 16, side))) for seed in range(10)]
    source = write_pairs(folder / "pairs", pictures, [" ".join(["word"] * words)] * 10)
    index(DataConfig.from_flat({"source": str(source)}), str(folder / "out"))
    return Catalog.open(folder / "out")


@pytest.mark.parametrize(
    ("side", "words", "chosen"),
    [
        (63, 22, "modeclip-icon"),  # sees 32 x 32 pixels and 24 tokens, two of which are the ends
        (64, 22, "modeclip-small"),
        (32, 23, "modeclip-small"),  # 64 x 64, 48
        (127, 46, "modeclip-small"),
        (128, 2, "ViT-B-32"),
        (20, 47, "ViT-B-32"),
        (20, 200, "ViT-B-32"),  # too much for any of them
    ],
)
def test_the_smallest_that_sees_enough_is_chosen(tmp_path: Path, side: int, words: int, chosen: str) -> None:
    catalog = pairs_of(tmp_path, side, words)
    fit = choose_model(catalog)
    assert fit.model == chosen == with_model(TrainConfig(), catalog.path).model
    assert f"not given: {chosen}" in fit.reason
    assert f"{side} or more on their shorter side" in fit.reason
    assert with_model(TrainConfig(model="ViT-B-16"), catalog.path).model == "ViT-B-16"


def test_the_ladder_is_what_its_models_see() -> None:
    sizes = []
    for name in LADDER:
        clip = load_clip(name, seed=0)
        sizes.append((clip.model.visual.image_size, clip.model.context_length))
    assert sizes == [((32, 32), 24), ((64, 64), 48), ((224, 224), 77)]


def test_a_model_that_sees_little_of_its_pairs_is_said(tmp_path: Path) -> None:
    long = Fit.of("modeclip-icon", pairs_of(tmp_path / "long", 64, 23)).misfits
    assert "32 x 32 pixels, half of the images have 64 or more" in long[0]
    assert "100 % of the captions" in long[1]
    assert len(Fit.of("modeclip-icon", pairs_of(tmp_path / "short", 64, 22)).misfits) == 1


def test_jobs_name_their_model_and_a_trained_one_stays(tmp_path: Path) -> None:
    catalog = pairs_of(tmp_path, 64, 3)
    train, experts = TrainConfig(samples=256, batch_size=4), ExpertsConfig()
    first = part(Path(catalog.path), "f", tmp_path / "models", train, experts)
    assert first.seed is not None
    assert {first.seed.config.model, first.rest.config.model} == {"modeclip-small"}
    seed = replace(first.seed, config=replace(first.seed.config, model="modeclip-icon"))
    seed.save()  # an earlier version, which had another default, has begun it
    assert part(Path(catalog.path), "f", tmp_path / "models", train, experts).rest.config.model == "modeclip-icon"
    given = make_job(catalog, tmp_path / "given", TrainConfig(model="modeclip-icon-xs"))
    given.save()
    assert with_model(train, catalog.path, given.folder, seed.folder).model == "modeclip-icon-xs"


def test_what_is_not_there_yet_is_planned_with_the_smallest(tmp_path: Path) -> None:
    assert with_model(TrainConfig(), tmp_path / "nothing.lance").model == LADDER[0]
    assert TrainConfig().model == AUTO
