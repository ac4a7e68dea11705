"""A CLIP-MoE where a CLIP is expected: averages, fine-tuning with the line to its start, and CLIP_benchmark."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from modeclip.adapting.finetuning import FinetuneConfig, finetune
from modeclip.adapting.merging import MergeConfig, merge
from modeclip.data.catalog import Catalog
from modeclip.data.indexing import index
from modeclip.data.sources.options import DataConfig
from modeclip.errors import ModeclipError
from modeclip.evaluation.clip_benchmark import load
from modeclip.models.clip import assemble_clip, encode_image, load_clip, save_clip
from modeclip.training.jobs import EngineConfig

WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two CLIP-MoEs of one shape with different routers, others of other shapes, and their plain model."""
    out = tmp_path_factory.mktemp("models")
    plain = load_clip("modeclip-icon-xxxs", seed=0)
    save_clip(plain, out / "plain")
    state = plain.model.state_dict()
    other = load_clip("modeclip-icon-xxxs", seed=1).model.state_dict()
    expert = {name: other[name] if ".mlp." in name else value for name, value in state.items()}
    save_clip(assemble_clip(plain, [expert, expert], seed=0), out / "one")
    save_clip(assemble_clip(plain, [expert, expert], seed=1), out / "two")
    save_clip(assemble_clip(plain, [expert, expert], top_k=1), out / "top-1")
    save_clip(assemble_clip(plain, [expert]), out / "of two")
    return out


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_average_is_that_of_every_tensor(models: Path, tmp_path: Path) -> None:
    merge([models / "one", models / "two"], MergeConfig(weights=(1.0, 3.0)), out=tmp_path / "mean")
    one, two, mean = (load_file(folder / WEIGHTS) for folder in (models / "one", models / "two", tmp_path / "mean"))
    for name, value in mean.items():
        torch.testing.assert_close(value, one[name] / 4 + two[name] * 3 / 4)
    assert any(not torch.equal(one[name], two[name]) for name in one)
    assert (tmp_path / "mean" / CONFIG).read_bytes() == (models / "one" / CONFIG).read_bytes()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("plain", 'moe is {"num_experts": 3, "top_k": 2} and missing'),
        ("top-1", 'moe is {"num_experts": 3, "top_k": 2} and {"num_experts": 3, "top_k": 1}'),
        ("of two", '"top_k": 2} and {"num_experts": 2, "top_k": 2}'),
    ],
)
def test_other_shapes_are_not_averaged(models: Path, tmp_path: Path, other: str, message: str) -> None:
    with pytest.raises(ModeclipError, match="different architectures") as error:
        merge([models / "one", models / other], MergeConfig(), out=tmp_path / "mean")
    assert message in str(error.value)
    assert not (tmp_path / "mean").exists()


def test_clip_benchmark_gets_the_model(models: Path) -> None:
    model, transform, tokenizer = load(str(models / "one"), "default")
    clip = load_clip(models / "one")
    clip.model.eval()
    picture = Image.new("RGB", (40, 30), "red")
    with torch.no_grad():
        assert torch.equal(
            encode_image(model, transform(picture)[None]), encode_image(clip.model, clip.images([picture]))
        )
    assert torch.equal(tokenizer(["a heart"]), clip.tokens(["a heart"]))
    with pytest.raises(ModeclipError, match=r"one model is not routed by a rule; leave --pretrained per_class out"):
        load(str(models / "one"), "per_class")


@pytest.mark.slow
def test_fine_tuning(models: Path, tmp_path: Path) -> None:
    """Its experts and routers move, and the line to the start is walked."""
    draw = np.random.default_rng(0)
    for number in range(3):
        (tmp_path / "photos" / f"sort_{number}").mkdir(parents=True)
        for copy in range(12):
            pixels = draw.integers(0, 200, (16, 16, 3), dtype=np.uint8) + np.uint8(50) * (np.arange(3) == number)
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "photos" / f"sort_{number}" / f"{copy}.png")
    index(DataConfig(source=str(tmp_path / "photos")), tmp_path / "catalog")
    config = FinetuneConfig(
        epochs=2, batch_size=8, learning_rate=1e-2, checks=2, alphas=3, engine=EngineConfig(precision="32-true")
    )
    catalog = Catalog.open(tmp_path / "catalog")
    finetune(str(models / "one"), catalog, config, out=tmp_path / "tuned")
    before, after = (load_file(folder / WEIGHTS) for folder in (models / "one", tmp_path / "tuned"))
    assert json.loads((tmp_path / "tuned" / CONFIG).read_text())["moe"] == {"num_experts": 3, "top_k": 2}
    assert before.keys() == after.keys()
    assert load_clip(tmp_path / "tuned").config["moe"]["top_k"] == 2
