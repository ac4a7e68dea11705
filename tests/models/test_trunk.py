"""Towers cut in two: trunk and head together are the whole tower, whatever it is made of, and share its parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import nn

from modeclip.errors import ModeclipError
from modeclip.models.clip import encode_text
from modeclip.models.trunk import encode, head_depth, record, split
from support import CLIP_KINDS, SMALL_TEXT, build_clip


def inputs_of(model: Any, tower: str) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    if tower == "image":
        size = model.visual.image_size
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        return torch.randn(3, 3, height, width, generator=random)
    tokens = torch.randint(10, 500, (3, 12), generator=random)
    tokens[0, 5:], tokens[1, 8:], tokens[2, 3:] = 0, 0, 0
    tokens[0, 4] = tokens[1, 7] = tokens[2, 2] = 599
    return tokens


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", CLIP_KINDS)
def test_trunk_and_head_are_the_tower_at_every_depth(kind: str, tmp_path: Path) -> None:
    model = build_clip(kind, tmp_path)
    for tower, own in (("image", "vision_cfg"), ("text", "text_cfg")):
        if kind not in {"plain", "custom text"} and own not in CLIP_KINDS[kind]:
            continue
        x = inputs_of(model, tower)
        with torch.no_grad():
            whole = getattr(model, f"encode_{tower}")(x, normalize=True)
            depths = [6, 2, 0] if "timm" in kind else [3, 2, 1, 0]
            for depth in depths:
                trunk, head = split(model, tower, depth)
                state = trunk(x)
                assert all(len(part) == len(x) for part in state)
                torch.testing.assert_close(head(state), whole, atol=1e-6, rtol=0)
                torch.testing.assert_close(head(tuple(part[1:2] for part in state)), whole[1:2], atol=1e-6, rtol=0)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["plain", "custom text", "class token", "attention pool", "timm", "BERT", "RoBERTa"])
def test_a_head_holds_what_changes_and_a_trunk_the_rest(kind: str, tmp_path: Path) -> None:
    """Oracle: the features of a changed model come from the old trunk and the new head, at no lesser depth."""
    model, changed = build_clip(kind, tmp_path), build_clip(kind, tmp_path)
    names = [name for name, value in model.named_parameters() if value.numel() > 1]
    for tower in ("image", "text"):
        if "timm" in kind and tower == "text":
            continue
        x = inputs_of(model, tower)
        own = [name for name in names if name.startswith("visual.") == (tower == "image")]
        picked = own[:: max(1, len(own) // 12)] + own[-2:]
        for name in picked:
            depth = head_depth(model, tower, [name, "logit_scale", "visual.proj" if tower == "text" else "text.proj"])
            value, other = model.get_parameter(name), changed.get_parameter(name)
            with torch.no_grad():
                other.add_(torch.randn(other.shape, generator=torch.Generator().manual_seed(1)))
                new = getattr(changed, f"encode_{tower}")(x, normalize=True)
                if depth is not None:
                    joined = split(changed, tower, depth)[1](split(model, tower, depth)[0](x))
                    torch.testing.assert_close(joined, new, atol=1e-6, rtol=0, msg=name)
                if depth:
                    less = split(changed, tower, depth - 1)[1](split(model, tower, depth - 1)[0](x))
                    moved = not torch.allclose(new, getattr(model, f"encode_{tower}")(x, normalize=True), atol=1e-4)
                    assert not torch.allclose(less, new, atol=1e-5) or not moved, name
                other.copy_(value)
    assert head_depth(model, "image", []) == 0
    assert head_depth(model, "image", ["text.transformer.resblocks.0.ln_1.weight"]) == 0


def test_embeddings_are_in_no_head(tmp_path: Path) -> None:
    model = build_clip("plain", tmp_path)
    assert head_depth(model, "image", ["visual.conv1.weight"]) is None
    assert head_depth(model, "text", ["token_embedding.weight", "ln_final.bias"]) is None
    assert head_depth(model, "text", ["transformer.resblocks.1.mlp.c_fc.bias"]) == 2


def test_gradients_reach_the_parameters_of_the_model(tmp_path: Path) -> None:
    model = build_clip("plain", tmp_path)
    names = ("visual.transformer.resblocks.0.mlp.c_fc.weight", "visual.transformer.resblocks.2.mlp.c_fc.weight")
    x, found = inputs_of(model, "image"), []
    for way in (
        lambda: model.encode_image(x, normalize=True),
        lambda: (pair := split(model, "image", 1))[1](pair[0](x)),
    ):
        model.zero_grad()
        way()[:, 0].sum().backward()
        found.append([model.get_parameter(name).grad.clone() for name in names])
    torch.testing.assert_close(found[0], found[1], atol=1e-7, rtol=1e-5)
    with torch.no_grad():
        trunk, head = split(model, "image", 1)
        state = trunk(x)
    model.zero_grad()
    head(state)[:, 0].sum().backward()
    assert model.get_parameter(names[0]).grad is None
    torch.testing.assert_close(model.get_parameter(names[1]).grad, found[0][1], atol=1e-7, rtol=1e-5)
    with torch.no_grad():  # new values of the parameters are seen: nothing was copied
        model.get_parameter(names[1]).mul_(2)
        torch.testing.assert_close(head(state), model.encode_image(x, normalize=True), atol=1e-6, rtol=0)


def test_padding_is_cut_at_every_depth(tmp_path: Path) -> None:
    model = build_clip("plain", tmp_path)
    tokens = inputs_of(model, "text")
    state = split(model, "text", 2)[0](tokens)
    assert [part.shape[1] for part in state] == [8, 8]
    torch.testing.assert_close(encode_text(model, tokens), model.encode_text(tokens, normalize=True), atol=1e-6, rtol=0)


class Watched(nn.Module):
    """A layer that notes what it is given, with no hook that could be seen."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.shapes = layer, []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(x.shape))
        return self.layer(x)


READ_AT_ONE = {
    "image": {"plain": True, "average, norm behind": False, "attention pool": False, "timm": False},
    "text": {"plain": True, "class token": True, "sees all": True, "end by id": True, "pools nothing": False},
}


@pytest.mark.parametrize(("tower", "kind"), [(tower, kind) for tower, kinds in READ_AT_ONE.items() for kind in kinds])
def test_the_last_block_computes_the_token_that_is_read(tower: str, kind: str, tmp_path: Path) -> None:
    model = build_clip("sees all" if kind == "pools nothing" else kind, tmp_path)
    if kind == "pools nothing":
        model.text.pool_type = "none"
    if kind == "timm":
        blocks: Any = model.visual.trunk.blocks
    else:
        blocks = (model.visual if tower == "image" else getattr(model, "text", model)).transformer.resblocks
    x = inputs_of(model, tower)
    ways: dict[str, Any] = {
        "plain": lambda: encode(model, tower, x),
        "every token": lambda: encode(model, tower, x, every_token=True),
        "with a graph": lambda: torch.enable_grad()(encode)(model, tower, x),
    }
    watched = [Watched(block.mlp) for block in blocks[-2:]]
    for block, layer in zip(blocks[-2:], watched, strict=True):
        block.mlp = layer
    found, seen = {}, {}
    with torch.no_grad():
        for name, way in ways.items():
            found[name] = way()
            seen[name] = [layer.shapes.pop() for layer in watched]
        whole = model.visual if tower == "image" else blocks[-1]
        for number, part in enumerate((blocks[-1].attn, whole)):
            handle = part.register_forward_hook(lambda *_: None)
            encode(model, tower, x)
            seen[f"watched {number}"] = [layer.shapes.pop() for layer in watched]
            handle.remove()
        model.train()
        encode(model, tower, x)
        seen["in training"] = [layer.shapes.pop() for layer in watched]
    every = seen.pop("plain")
    assert all(len(shape) == 3 and shape[1] > 1 for shapes in seen.values() for shape in shapes)
    assert every == ([seen["every token"][0], (3, every[0][2])] if READ_AT_ONE[tower][kind] else seen["every token"])
    for name in ("every token", "with a graph"):
        torch.testing.assert_close(found["plain"], found[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("with_class_token", [False, True])
def test_padding_that_is_masked_is_masked_in_both_parts(with_class_token: bool, tmp_path: Path) -> None:
    model = build_clip("class token" if with_class_token else "sees all", tmp_path)
    model.text.use_pad_mask, model.text.pool_type, tokens = True, "first", inputs_of(model, "text")
    with torch.no_grad():
        whole = model.encode_text(tokens, normalize=True)
        for depth in (3, 1, 0):
            trunk, head = split(model, "text", depth)
            torch.testing.assert_close(head(trunk(tokens)), whole, atol=1e-6, rtol=0)
        torch.testing.assert_close(encode(model, "text", tokens), whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_one_token_in_low_precision_is_as_near_as_all_of_them(tower: str, tmp_path: Path) -> None:
    model = build_clip("plain", tmp_path)
    x = inputs_of(model, tower)
    with torch.no_grad():
        exact = encode(model, tower, x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = [encode(model, tower, x, every_token=every) for every in (False, True)]
        model.to(torch.bfloat16)
        x = x.to(torch.bfloat16) if tower == "image" else x
        pure = [encode(model, tower, x, every_token=every) for every in (False, True)]
    for one, all_tokens in (mixed, pure):
        apart = [float((value.float() - exact).square().mean().sqrt()) for value in (one, all_tokens)]
        assert apart[0] <= 1.5 * apart[1]


def test_what_cannot_be_cut_is_one_line(tmp_path: Path) -> None:
    model = build_clip("plain", tmp_path)
    with pytest.raises(ModeclipError, match="image tower: expected 0 to 3 blocks in the head, got 4"):
        split(model, "image", 4)
    config = {
        "embed_dim": 32,
        "text_cfg": SMALL_TEXT,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8},
    }
    (tmp_path / "resnet.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "resnet.json")
    resnet = open_clip.create_model("resnet")
    with pytest.raises(ModeclipError, match=r"image tower: ModifiedResNet has no row of blocks .*; expected a Vision"):
        split(resnet, "image", 1)
    assert head_depth(resnet, "image", ["visual.layer4.0.conv1.weight"]) is None
    assert head_depth(resnet, "text", ["visual.layer4.0.conv1.weight"]) == 0


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["plain", "class token"])
def test_a_recorded_tower_is_the_tower_and_runs_without_it(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_clip(kind, tmp_path)
    images = inputs_of(model, "image")
    with torch.no_grad():
        whole = [encode(model, "image", images[:count]) for count in (1, 2, 3)]
        assert record(model)
        monkeypatch.setattr(model.visual, "forward", None)  # nobody runs the tower itself any more
        for count, expected in enumerate(whole, 1):
            torch.testing.assert_close(encode(model, "image", images[:count]), expected, atol=1e-6, rtol=0)


def test_a_tower_that_depends_on_its_batch_is_not_recorded(tmp_path: Path) -> None:
    model = build_clip("plain", tmp_path)
    inner, images = model.visual.forward, inputs_of(model, "image")
    model.visual.forward = lambda images: inner(images) if len(images) == 2 else inner(images).flip(1)
    with torch.no_grad():
        before = encode(model, "image", images)
        assert not record(model)
        torch.testing.assert_close(encode(model, "image", images), before)
