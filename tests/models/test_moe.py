"""CLIP-MoE: each token against a plain loop, the routers' losses against counting, towers of all kinds, and folders."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from modeclip.errors import ModeclipError
from modeclip.models import moe
from modeclip.models.blocks import blocks_of
from modeclip.models.clip import Clip, assemble_clip, encode_image, encode_text, load_clip, model_shapes, save_clip
from modeclip.models.flops import count_flops
from modeclip.models.moe import (
    MoeConfig,
    MoeFfn,
    assemble,
    count_parameters,
    moe_layers,
    router_losses,
    router_sums,
    routing_of,
    with_experts,
)
from modeclip.models.pool import ModelPool, ModelRef
from modeclip.models.trunk import encode as encode_tower

MODEL = "modeclip-icon-xxs"


def layer_of(num_experts: int, top_k: int, seed: int = 0, width: int = 16) -> MoeFfn:
    torch.manual_seed(seed)
    experts = [nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width)) for _ in range(num_experts)]
    return MoeFfn(experts, width, top_k)


def token_by_token(layer: MoeFfn, x: Tensor) -> Tensor:
    """The definition: each token through its best experts, weighed by the softmax over these alone."""
    rows = []
    for token in x.reshape(-1, x.shape[-1]):
        logits = layer.router.weight @ token
        best = sorted(range(len(logits)), key=lambda k: -logits[k].item())[: layer.top_k]
        shares = torch.exp(logits[best] - logits[best].max())
        shares = shares / shares.sum()
        rows.append(sum(share * layer.experts[k](token) for share, k in zip(shares, best, strict=True)))
    return torch.stack(rows).view(x.shape)


def results(layer: MoeFfn, x: Tensor, run: Any) -> list[Tensor]:
    """The output and every gradient of a forward and backward pass."""
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    out = run(x)
    (out * torch.arange(out.numel()).view(out.shape).cos()).sum().backward()
    grads = [x.grad, *(value.grad for value in layer.parameters())]
    return [out.detach(), *(torch.zeros(()) if grad is None else grad.clone() for grad in grads)]


def assert_like_the_loop(layer: MoeFfn, x: Tensor) -> None:
    expected = results(layer, x, lambda x: token_by_token(layer, x))
    for found, value in zip(results(layer, x, layer), expected, strict=True):
        torch.testing.assert_close(found, value.expand_as(found), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 2), (4, 1), (4, 4), (1, 1), (7, 3)])
def test_layer_is_the_loop_over_tokens(
    num_experts: int, top_k: int, grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a product for each expert, and by the grouped product of all, which a CPU has too."""
    monkeypatch.setattr(moe, "GROUPED_ON", {"cpu"} if grouped else set())
    layer = layer_of(num_experts, top_k)
    used = []
    grouped_product = moe._grouped
    monkeypatch.setattr(moe, "_grouped", lambda *a: used.append(1) or grouped_product(*a))
    assert_like_the_loop(layer, torch.randn(3, 5, 16))
    assert bool(used) == grouped


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1, 40])
def test_experts_without_tokens(num_tokens: int, grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their gradient is 0 and not missing, which processes that train together could not average."""
    monkeypatch.setattr(moe, "GROUPED_ON", {"cpu"} if grouped else set())
    layer = layer_of(5, 2)
    with torch.no_grad():  # tokens of positive numbers choose 4 and 2
        layer.router.weight.copy_(torch.tensor([-1.0, -2.0, 1.0, -3.0, 2.0])[:, None].expand(5, 16))
    x = torch.rand(num_tokens, 16)
    if num_tokens:
        assert_like_the_loop(layer, x)
        assert layer.last is not None
        assert layer.last[2].unique().tolist() == [2, 4]
    else:
        assert results(layer, x, layer)[0].shape == (0, 16)
    assert all(not value.grad.any() for k in (0, 1, 3) for value in layer.experts[k].parameters())


def test_the_graph_of_an_export_is_the_same_layer() -> None:
    layer, x = layer_of(4, 2), torch.randn(6, 16)
    graph = torch.export.export(layer, (x,), dynamic_shapes={"x": {0: torch.export.Dim("tokens")}})
    torch.testing.assert_close(graph.module()(x[:3]), layer(x[:3]))


def test_router_decides_in_full_precision_under_autocast() -> None:
    layer, x = layer_of(4, 2), torch.randn(64, 16)
    with torch.no_grad():
        layer(x)
        exact = layer.last
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = layer(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(layer.last[2], exact[2])
    assert torch.equal(layer.last[1], exact[1])
    torch.testing.assert_close(out.float(), token_by_token(layer, x).detach(), atol=3e-2, rtol=3e-2)


# ------------------------------------------------------------------------------------------- whole models


def changed(state: dict[str, Tensor], names: tuple[str, ...], seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    starts = tuple(f"{name}." for name in names)
    return {
        name: value + 0.1 * torch.randn(value.shape, generator=draw) if name.startswith(starts) else value
        for name, value in state.items()
    }


def ffn_names(model: nn.Module) -> tuple[str, ...]:
    return tuple(name for blocks in blocks_of(model).values() for block in blocks for name in block.ffn_names)


def others(model: nn.Module, count: int = 2) -> list[dict[str, Tensor]]:
    """States of models whose feed-forward layers differ from a model's."""
    return [changed(model.state_dict(), ffn_names(model), seed) for seed in range(count)]


@pytest.fixture(scope="module")
def plain() -> Clip:
    return load_clip(MODEL, seed=0)


@pytest.fixture(scope="module")
def mixed(plain: Clip) -> Clip:
    """A CLIP-MoE of the plain model and two others, top-2."""
    return assemble_clip(plain, others(plain.model))


def inputs(clip: Clip) -> tuple[Tensor, Tensor]:
    draw = np.random.default_rng(0)
    width, height = clip.image_size
    pictures = [Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)) for _ in range(3)]
    return clip.images(pictures), clip.tokens(["a heart", "an arrow that points left", "!"])


def features(model: Any, clip: Clip) -> Tensor:
    images, tokens = inputs(clip)
    with torch.no_grad():
        return torch.cat([encode_image(model, images), encode_text(model, tokens)])


TOWER = {"image_size": 16, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2}
TEXT = {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
TIMM = {"timm_model_name": "test_vit", "timm_model_pretrained": False, "image_size": 160, "timm_pool": "avg"}


def bert(folder: Path) -> dict[str, Any]:
    from transformers import BertConfig

    BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
    ).save_pretrained(folder)
    return {"hf_model_name": str(folder), "hf_model_pretrained": False, "context_length": 8, "hf_proj_type": "mlp"}


TOWERS: dict[str, dict[str, Any]] = {
    "plain": {"vision_cfg": TOWER, "text_cfg": TEXT},
    "quick gelu, text apart": {"vision_cfg": TOWER, "text_cfg": TEXT, "quick_gelu": True, "custom_text": True},
    "layers with norms": {"vision_cfg": {**TOWER, "block_type": "custom", "scale_fc": True}, "text_cfg": TEXT},
    "timm": {"vision_cfg": TIMM, "text_cfg": TEXT, "custom_text": True},
}


def built(settings: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    kind = open_clip.CustomTextCLIP if settings.pop("custom_text", False) else open_clip.CLIP
    return kind(embed_dim=16, **settings).eval()


@pytest.mark.parametrize("name", [*TOWERS, "bert"])
def test_towers_of_all_kinds(name: str, tmp_path: Path) -> None:
    """Equal experts give the plain model; experts that no token is sent to change nothing; others do."""
    settings = (
        {"vision_cfg": TOWER, "text_cfg": bert(tmp_path), "custom_text": True} if name == "bert" else TOWERS[name]
    )
    model = built(copy.deepcopy(settings))
    images = torch.randn(3, 3, *model.visual.image_size)
    tokens = torch.randint(1, 50, (3, 8))

    def encode(model: Any) -> Tensor:
        with torch.no_grad():
            return torch.cat([encode_image(model, images), encode_text(model, tokens)])

    expected = encode(model)
    same = assemble(model, [model.state_dict()] * 3, top_k=2)
    torch.testing.assert_close(encode(same), expected, atol=1e-6, rtol=1e-5)
    states = others(model)
    mixed = assemble(model, states, top_k=2)
    assert (encode(mixed) - expected).abs().max() > 1e-3
    for number, state in enumerate(states, start=1):  # all tokens to one expert: that model itself
        for layer in moe_layers(mixed):
            layer.top_k = len(layer.experts)
            layer.router.weight.data.zero_()
        alone = copy.deepcopy(mixed)
        for layer in moe_layers(alone):
            layer.experts = nn.ModuleList([layer.experts[number]] * len(layer.experts))
        model.load_state_dict(state)
        torch.testing.assert_close(encode(alone), encode(model), atol=1e-5, rtol=1e-4)
    assert {layer.index for layer in routing_of(mixed) if layer.tower == "text"} == {0, 1}


def test_whole_model_is_the_loop_over_tokens(mixed: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = features(mixed.model, mixed)
    monkeypatch.setattr(MoeFfn, "forward", token_by_token)
    torch.testing.assert_close(features(mixed.model, mixed), expected, atol=1e-5, rtol=1e-5)


def test_assembly_keeps_the_base_and_starts_alike(plain: Clip, mixed: Clip) -> None:
    before = {name: value.clone() for name, value in plain.model.state_dict().items()}
    again = assemble(plain.model, others(plain.model), top_k=2)
    for (name, value), other in zip(mixed.model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    assert all(torch.equal(value, before[name]) for name, value in plain.model.state_dict().items())
    state = again.state_dict()
    assert all(torch.equal(state[name], value) for name, value in before.items() if name in state)
    name = blocks_of(plain.model)["text"][0].ffn_names[0]
    assert torch.equal(state[f"{name}.experts.0.c_fc.weight"], before[f"{name}.c_fc.weight"])
    assert torch.equal(state[f"{name}.experts.2.c_fc.weight"], others(plain.model)[1][f"{name}.c_fc.weight"])
    other_seed = assemble(plain.model, others(plain.model), seed=1).state_dict()
    assert not torch.equal(state[f"{name}.router.weight"], other_seed[f"{name}.router.weight"])


def test_routers_that_are_given(plain: Clip) -> None:
    blocks = [block for found in blocks_of(plain.model).values() for block in found]
    layers = moe_layers(assemble(plain.model, others(plain.model)))
    widths = {block.name: layer.router.in_features for block, layer in zip(blocks, layers, strict=True)}
    rows = {name: torch.randn(3, width) for name, width in widths.items()}
    made = assemble(plain.model, others(plain.model), routers=rows)
    for block, layer in zip(blocks, moe_layers(made), strict=True):
        assert torch.equal(layer.router.weight, rows[block.name])
    with pytest.raises(ModeclipError, match=r"routers: expected rows of shape \(3, .*got none"):
        assemble(plain.model, others(plain.model), routers={})
    with pytest.raises(ModeclipError, match=r"got \(2, "):
        assemble(plain.model, others(plain.model), routers={name: value[:2] for name, value in rows.items()})


def wrong_experts(plain: Clip) -> Iterator[tuple[dict[str, Tensor], str]]:
    state = plain.model.state_dict()
    yield state | {"visual.proj": state["visual.proj"] + 1e-3}, "visual.proj differs from the base"
    yield {name: value for name, value in state.items() if name != "visual.proj"}, "only the base has visual.proj"
    yield state | {"other": torch.zeros(1)}, "only the expert has other"
    name = next(name for name in state if name.endswith("c_fc.bias"))
    yield state | {name: state[name][:-1]}, "has shape"


def test_experts_that_do_not_fit(plain: Clip) -> None:
    for state, message in wrong_experts(plain):
        with pytest.raises(ModeclipError, match=rf"^expert 2: .*{message}"):
            assemble(plain.model, [plain.model.state_dict(), state])
    with pytest.raises(ModeclipError, match=r"top_k: expected 1 to 2, the number of experts, got 3"):
        assemble(plain.model, [plain.model.state_dict()], top_k=3)
    resnet = built({"vision_cfg": {**TOWER, "layers": [1, 1, 1, 1], "image_size": 32}, "text_cfg": TEXT})
    with pytest.raises(ModeclipError, match=r"the image tower has no blocks with feed-forward layers"):
        assemble(resnet, [resnet.state_dict()])
    made = assemble(plain.model, [plain.model.state_dict()])
    with pytest.raises(ModeclipError, match=r"already"):
        assemble(made, [made.state_dict()])


# ------------------------------------------------------------------------------------------- routers


def test_router_losses_are_what_counting_gives(mixed: Clip) -> None:
    features(mixed.model, mixed)
    balances, zs = [], []
    for layer in moe_layers(mixed.model):
        logits = layer.last[1].double().numpy()
        exp = np.exp(logits)
        shares = np.bincount(logits.argmax(1), minlength=3) / len(logits)
        balances.append(3 * sum(shares * (exp / exp.sum(1, keepdims=True)).mean(0)))
        zs.append(np.mean(np.log(exp.sum(1)) ** 2))
    balance, z = router_losses(router_sums(mixed.model))
    assert float(balance) == pytest.approx(np.mean(balances), rel=1e-5)
    assert float(z) == pytest.approx(np.mean(zs), rel=1e-5)


def test_balance_is_1_where_all_experts_are_chosen_alike_and_their_number_where_one_is() -> None:
    model = with_experts(load_clip(MODEL, seed=0).model, MoeConfig(num_experts=4, top_k=2))
    for layer in moe_layers(model):
        logits = 50 * torch.eye(4).repeat(8, 1)
        layer.last = (torch.Size([32]), logits, logits.topk(2).indices, torch.ones(32, 2) / 2)
    assert float(router_losses(router_sums(model))[0]) == pytest.approx(1)
    for layer in moe_layers(model):
        logits = 50 * torch.eye(4)[1].expand(32, 4)
        layer.last = (torch.Size([32]), logits, logits.topk(2).indices, torch.ones(32, 2) / 2)
    assert float(router_losses(router_sums(model))[0]) == pytest.approx(4)


def test_the_last_block_routes_the_token_that_is_read(mixed: Clip) -> None:
    tokens, images = mixed.tokens(["a red heart", "x", "two dogs"]), torch.randn(3, 3, *mixed.image_size)
    with torch.no_grad():
        for tower, x in (("image", images), ("text", tokens)):
            routings = {}
            for every in (True, False):
                routings[every] = [encode_tower(mixed.model.eval(), tower, x, every_token=every)]
                routings[every] += [routing for routing in routing_of(mixed.model) if routing.tower == tower]
            torch.testing.assert_close(routings[True][0], routings[False][0], atol=1e-6, rtol=0)
            whole, one = routings[True][-1], routings[False][-1]
            at = tokens.argmax(1) if tower == "text" else torch.zeros(3, dtype=torch.long)
            assert one.experts.shape == (3, 2)
            assert torch.equal(one.experts, whole.experts[torch.arange(3), at])
            for before in zip(routings[True][1:-1], routings[False][1:-1], strict=True):
                assert torch.equal(before[0].experts, before[1].experts)


def test_routing_names_what_each_token_chose(plain: Clip, mixed: Clip) -> None:
    features(mixed.model, mixed)
    found = routing_of(mixed.model)
    num_blocks = {tower: len(blocks) for tower, blocks in blocks_of(plain.model).items()}
    assert [(routing.tower, routing.index) for routing in found] == [
        *(("image", index) for index in range(num_blocks["image"])),
        *(("text", index) for index in range(num_blocks["text"])),
    ]
    for routing in found:
        assert routing.experts.shape[0] == 3
        assert routing.experts.shape[-1] == 2
        torch.testing.assert_close(routing.weights.sum(-1), torch.ones(routing.weights.shape[:-1]))
        assert torch.equal(routing.experts[..., 0], routing.logits.argmax(-1))
    fresh = copy.deepcopy(mixed.model)  # a copy has not run
    with pytest.raises(ModeclipError, match="the image tower has not run yet"):
        routing_of(fresh)
    with pytest.raises(ModeclipError, match="this model has no experts"):
        router_sums(plain.model)


# ------------------------------------------------------------------------------------------- folders


@pytest.fixture(scope="module")
def folder(mixed: Clip, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("moe") / "model"
    save_clip(mixed, path)
    return path


def test_folder_is_the_model(mixed: Clip, plain: Clip, folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "open_clip_config.json").read_text())
    assert config["moe"] == {"num_experts": 3, "top_k": 2}
    assert config["model_cfg"] == plain.config["model_cfg"]
    loaded = load_clip(folder)
    assert torch.equal(features(loaded.model.eval(), loaded), features(mixed.model.eval(), mixed))
    save_clip(loaded, tmp_path / "again")
    for name in ("open_clip_model.safetensors", "open_clip_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    assert model_shapes(str(folder)) == {name: tuple(value.shape) for name, value in mixed.model.state_dict().items()}
    ref = ModelRef.of("moe", folder)
    assert ref.digest != ModelRef.of_clip("plain", MODEL, plain).digest
    held = ModelPool().get(ref)
    assert torch.equal(features(held.model, held), features(mixed.model.eval(), mixed))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 3, "top_k": 4}, r"moe: top_k: expected 1 to 3 \(num_experts\), got 4"),
        ({"num_experts": 3, "top_k": 0}, "top_k.*expected a whole number from 1 to 1,024, got 0"),
        ({"num_experts": 4, "top_k": 2}, "num_experts in open_clip_config.json is 4, but the routers .* know 3"),
        ({"num_experts": 10**9, "top_k": 2}, "expected a whole number from 1 to 1,024"),
        ({"num_experts": True, "top_k": 1}, "expected a whole number"),
        ({"num_experts": "3", "top_k": 2}, "expected a whole number"),
        ({"num_experts": 3}, "moe: top_k is missing"),
        ([3, 2], "expected an object of settings"),
        (None, "moe: num_experts is missing"),
        ({"num_experts": 3, "top_k": 2, "act": "os.system"}, "unknown setting .* 'act'"),
        ({"num_experts": 3, "top_k": 2, "auto_map": "x.py"}, "auto_map would run code"),
    ],
)
def test_settings_of_a_folder_that_are_refused(folder: Path, tmp_path: Path, settings: Any, message: str) -> None:
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / "open_clip_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"moe": settings}))
    with pytest.raises(ModeclipError, match=message) as error:
        load_clip(tmp_path / "model")
    assert "\n" not in str(error.value)


def test_folders_whose_weights_do_not_fit(folder: Path, plain: Clip, tmp_path: Path) -> None:
    save_clip(plain, tmp_path / "plain")
    config = json.loads((folder / "open_clip_config.json").read_text())
    (tmp_path / "plain" / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ModeclipError, match="know no experts"):
        load_clip(tmp_path / "plain")
    shutil.copytree(folder, tmp_path / "model")
    del config["moe"]
    (tmp_path / "model" / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ModeclipError, match="cannot be loaded") as error:
        load_clip(tmp_path / "model")
    assert "\n" not in str(error.value)


def test_what_it_costs(folder: Path, plain: Clip, mixed: Clip) -> None:
    """Two of three experts are counted, the router, and the sum of both outputs."""
    ffn = sum(
        value.numel() for name, value in plain.model.state_dict().items() if name.startswith(ffn_names(plain.model))
    )
    routers = sum(layer.router.weight.numel() for layer in moe_layers(mixed.model))
    total = sum(value.numel() for value in plain.model.parameters())
    assert count_parameters(plain.model) == (total, total)
    assert count_parameters(mixed.model) == (total + 2 * ffn + routers, total + ffn + routers)
    dense, found = count_flops(MODEL, 5), count_flops(folder, 5)
    blocks = {tower: len(blocks) for tower, blocks in blocks_of(plain.model).items()}
    for tower, tokens in (("image", 17), ("text", 5)):
        layer = moe_layers(mixed.model)[0 if tower == "image" else -1]
        matrices = sum(value.numel() for value in layer.experts[0].parameters() if value.ndim == 2)
        sums = 2 * layer.router.in_features
        extra = 2 * tokens * blocks[tower] * (matrices + layer.router.weight.numel() + sums)
        assert getattr(found, tower) - getattr(dense, tower) == extra
