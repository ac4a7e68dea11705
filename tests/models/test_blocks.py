"""Blocks of towers of every make, what a training may change of them, and that all else keeps its bytes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from modeclip.errors import ModeclipError
from modeclip.models.blocks import blocks_of, ffn_parameters, freeze, last_parameters
from modeclip.models.clip import hollow_model
from modeclip.models.trunk import head_depth
from support import build_clip

KINDS = ["plain", "custom text", "attention pool", "timm", "timm, pooled by attention", "BERT", "RoBERTa"]
FFN = re.compile(r"\.mlp\.|layer\.\d+\.(intermediate|output\.dense)\.")


def step(model: nn.Module, *, checkpointing: bool = False) -> set[str]:
    """Train a model for two steps with decay and return what has changed in its state."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if checkpointing:
        model.set_grad_checkpointing()
    model.train()
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.5)
    width, height = (
        (model.visual.image_size,) * 2 if isinstance(model.visual.image_size, int) else model.visual.image_size
    )
    tokens = torch.randint(1, 590, (4, 12))
    for _ in range(2):
        optimizer.zero_grad()
        images = model.encode_image(torch.randn(4, 3, height, width), normalize=True)
        texts = model.encode_text(tokens, normalize=True)
        logits = model.logit_scale.exp() * images @ texts.T
        nn.functional.cross_entropy(logits, torch.arange(4)).backward()
        optimizer.step()
    assert all(value.grad is None for value in model.parameters() if not value.requires_grad)
    assert set(optimizer.state) <= set(trained)
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def numbers_kept(model: nn.Module) -> int:
    """Count the numbers that a forward pass keeps for the backward pass, weights included."""
    sizes: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.encode_image(torch.randn(4, 3, 16, 16))
        model.encode_text(torch.randint(1, 590, (4, 12)))
    return sum(sizes)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # open_clip's name for checkpointing in transformers is an old one
@pytest.mark.parametrize("kind", KINDS)
def test_the_rest_keeps_its_bytes(kind: str, tmp_path: Path) -> None:
    for trainable in ("ffn", "last:1", "last:2"):
        model = build_clip(kind, tmp_path)
        expected = set(ffn_parameters(model))
        if trainable == "ffn":
            assert expected == {name for name, _ in model.named_parameters() if FFN.search(name) and "pool" not in name}
        else:
            count = int(trainable[-1])
            expected = set(last_parameters(model, count))
            for tower, blocks in blocks_of(model).items():
                assert head_depth(model, tower, expected) == count
                behind = [name for name in expected if name.startswith(blocks[-count].name + ".")]
                assert len(behind) == len(list(blocks[-count].module.parameters()))
        freeze(model, trainable)
        changed = step(model, checkpointing=trainable == "ffn")
        assert changed <= expected
        weights = {name for name in expected if name.endswith("weight") and "pool" not in name}
        assert changed >= weights


def test_last_blocks_bring_norms_and_projections(tmp_path: Path) -> None:
    behind = {
        "plain": {"visual.ln_post.weight", "visual.proj", "ln_final.weight", "text_projection"},
        "custom text": {"visual.ln_post.weight", "visual.proj", "text.ln_final.weight", "text.text_projection"},
        "timm": {"visual.trunk.norm.weight", "visual.head.proj.weight", "text_projection"},
        "BERT": {"text.proj.0.weight", "visual.proj"},
    }
    for kind, names in behind.items():
        found = set(last_parameters(build_clip(kind, tmp_path), 1))
        assert names <= found
        assert not {name for name in found if "embed" in name or "logit" in name or "conv1" in name}


def test_a_frozen_trunk_keeps_no_graph(tmp_path: Path) -> None:
    """Of the blocks before the last one, no activation is kept."""
    model = build_clip("plain", tmp_path).train()
    kept = {}
    for trainable in ("all", "last:1"):
        freeze(model, trainable)
        kept[trainable] = numbers_kept(model)
    seen = []
    model.transformer.resblocks[1].register_forward_hook(lambda *x: seen.append(x[2].requires_grad))
    model.visual.transformer.resblocks[1].register_forward_hook(lambda *x: seen.append(x[2].requires_grad))
    model.encode_text(torch.randint(1, 590, (4, 12)))
    model.encode_image(torch.randn(4, 3, 16, 16))
    assert seen == [False, False]
    assert kept["last:1"] < kept["all"] / 2


def test_statistics_of_frozen_norms_stand_still(tmp_path: Path) -> None:
    model = build_clip("plain", tmp_path)
    model.visual.ln_pre = nn.Sequential(nn.BatchNorm1d(5), nn.LayerNorm(32))
    freeze(model, "last:1")
    assert not {name for name in step(model) if "ln_pre" in name}


def test_what_a_model_lacks_is_one_line() -> None:
    resnet, plain = hollow_model("RN50"), hollow_model("modeclip-icon-xxxs")
    for trainable in ("ffn", "last:1"):
        with pytest.raises(
            ModeclipError, match=f"train.trainable {trainable}: the image tower has no blocks.*ViT-B-32"
        ):
            freeze(resnet, trainable)
    with pytest.raises(
        ModeclipError, match=r"^train\.trainable last:99: the \w+ tower has \d+ blocks?; expected last:1"
    ):
        freeze(plain, "last:99")
    for trainable in ("routers", "added"):
        with pytest.raises(
            ModeclipError, match=f"train.trainable {trainable}: the model has no experts; give a CLIP-MoE"
        ):
            freeze(plain, trainable)
    assert all(value.requires_grad for value in plain.parameters())
