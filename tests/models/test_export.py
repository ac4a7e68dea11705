"""Exports of one CLIP: as CLIPModel of transformers and back, and as ONNX graphs in a real session."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import support
from modeclip.errors import ModeclipError
from modeclip.models.clip import Clip, assemble_clip, encode_text, load_clip, save_clip
from modeclip.models.export import onnx as graphs
from modeclip.models.export.hf import is_hf, load_hf, processor_of, save_hf
from support import noise_picture

VISION = {"image_size": 16, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2}
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
TEXTS = ["a red heart", "!", "an arrow that points to the left, far away from here", "x"]
PIXELS = {"mean": [0.5, 0.4, 0.3], "std": [0.25, 0.3, 0.35], "interpolation": "bicubic", "resize_mode": "shortest"}


def make(
    folder: Path, *, vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None, **more: Any
) -> Clip:
    """Return a CLIP a few numbers wide, with random weights, from a folder."""
    settings = {"embed_dim": 24, "vision_cfg": vision or VISION, "text_cfg": TEXT | (text or {}), **more}
    (folder / "tiny.json").write_text(json.dumps(settings))
    open_clip.add_model_config(folder / "tiny.json")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.create_model("tiny", pretrained_text=False)
    content = {"model_cfg": settings, "preprocess_cfg": PIXELS}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return load_clip(folder)


def pictures() -> list[Image.Image]:
    return [noise_picture(seed, size) for seed, size in enumerate([(16, 16), (16, 24), (16, 16)])]


def logits_of(clip: Clip) -> torch.Tensor:
    with torch.no_grad():
        images = torch.stack([clip.preprocess(picture) for picture in pictures()])
        found: torch.Tensor = clip.model.eval().get_logits(images, clip.tokens(TEXTS))[0]
        return found


def logits_by_transformers(folder: Path) -> torch.Tensor:
    """Return what somebody gets who has transformers alone."""
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    inputs = processor(text=TEXTS, images=pictures(), padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        found: torch.Tensor = model(**inputs).logits_per_image
        return found


@pytest.mark.parametrize(
    "more",
    [
        {"quick_gelu": True},
        {"text": {"pool_type": "eos", "eos_id": 49407, "norm_kwargs": {"eps": 1e-6}}, "custom_text": True},
    ],
    ids=["quick_gelu", "eos"],
)
def test_clip_and_clip_model_compute_the_same_both_ways(more: dict[str, Any], tmp_path: Path) -> None:
    clip, out = make(tmp_path, **more), tmp_path / "hf"
    out.mkdir()
    parity = save_hf(clip, out)
    assert max(parity[tower]["max_abs"] for tower in ("image", "text")) < 1e-5
    torch.testing.assert_close(logits_by_transformers(out), logits_of(clip), atol=1e-4, rtol=0)
    assert is_hf(out)
    assert not is_hf(tmp_path)
    back, _ = load_hf(out)
    torch.testing.assert_close(logits_of(back), logits_of(clip), atol=1e-5, rtol=0)
    before, after = clip.model.state_dict(), back.model.state_dict()
    for name, value in after.items():
        old = before.get(name, before.get(f"text.{name}"))
        old = before["text.text_projection.weight"].t() if old is None else old
        assert torch.equal(value, old if old.shape == value.shape else old.t()), name
    assert back.config["preprocess_cfg"] == PIXELS


def test_clip_model_that_transformers_made(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    (tmp_path / "any").mkdir()
    processor = processor_of(make(tmp_path / "any"))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    for name, act, end in (("legacy", "quick_gelu", 2), ("tanh", "gelu_pytorch_tanh", 49407)):
        config = CLIPConfig(
            projection_dim=24,
            text_config={**sizes, "max_position_embeddings": 12, "hidden_act": act, "eos_token_id": end},
            vision_config={**sizes, "image_size": 16, "patch_size": 8, "hidden_act": act},
        )
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
        clip, _ = load_hf(tmp_path / name)
        expected = logits_by_transformers(tmp_path / name)
        torch.testing.assert_close(logits_of(clip), expected, atol=1e-4, rtol=0)
        save_clip(clip, tmp_path / f"{name}-clip")  # and open_clip alone finds the same


def resnet(folder: Path) -> Clip:
    return make(
        folder, vision={"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8, "patch_size": None}
    )


def timm(folder: Path) -> Clip:
    tower = {"timm_model_name": "test_vit", "timm_model_pretrained": False, "image_size": 160}
    return make(folder, vision=tower)


def siglip(folder: Path) -> Clip:
    return make(folder, init_logit_bias=-10.0)


def both_ways(folder: Path) -> Clip:
    return make(folder, text={"no_causal_mask": True})


def experts(folder: Path) -> Clip:
    clip = make(folder)
    return assemble_clip(clip, [clip.model.state_dict()], top_k=1)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (resnet, "ModifiedResNet"),
        (timm, "timm"),
        (siglip, "bias"),
        (both_ways, "not causal"),
        (experts, "CLIP-MoE"),
    ],
)
def test_what_clip_model_cannot_express(kind: Callable[[Path], Clip], what: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ModeclipError, match=rf"{what}.*cannot express; export it to onnx$"):
        save_hf(kind(tmp_path), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_folders_of_transformers_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    save_hf(make(tmp_path), tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    for change, what in (
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map would run code"),
        ({"vision_config": config["vision_config"] | {"hidden_act": "relu"}}, "activation relu"),
        ({"vision_config": config["vision_config"] | {"hidden_act": "quick_gelu"}}, "one tower has quick_gelu"),
    ):
        (tmp_path / "hf/config.json").write_text(json.dumps(config | change))
        with pytest.raises(ModeclipError, match=what):
            load_hf(tmp_path / "hf")
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    (tmp_path / "hf/model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModeclipError, match="transformers cannot load it"):
        load_hf(tmp_path / "hf")


def run(path: Path, **inputs: np.ndarray) -> np.ndarray:
    import onnxruntime

    found: np.ndarray = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, inputs)[0]
    return found


def test_graphs_equal_torch_for_any_batch_and_length(tmp_path: Path) -> None:
    clip = make(tmp_path)
    parity = graphs.save_onnx([clip], tmp_path)
    assert [found.file for found in parity] == ["image.onnx", "text.onnx"]
    assert max(found.max_abs for found in parity) < 1e-5
    for size in (1, 7):
        images = torch.randn(size, 3, 16, 16, generator=torch.Generator().manual_seed(size))
        tokens = clip.tokens((TEXTS * 2)[:size])
        with torch.no_grad():
            expected = clip.model.encode_image(images, normalize=True), clip.model.encode_text(tokens, normalize=True)
        found = run(tmp_path / "image.onnx", pixel_values=images.numpy())
        np.testing.assert_allclose(found, expected[0].numpy(), atol=1e-5)
        found = run(tmp_path / "text.onnx", input_ids=tokens.numpy())
        np.testing.assert_allclose(found, expected[1].numpy(), atol=1e-5)
    short = clip.tokens(["x", "red heart"])
    found = run(tmp_path / "text.onnx", input_ids=short[:, :4].numpy())
    np.testing.assert_allclose(found, encode_text(clip.model, short).detach().numpy(), atol=1e-5)
    graphs.quantize(tmp_path / "image.onnx", tmp_path / "image.int8.onnx")
    assert "DynamicQuantizeLinear" in {node.op_type for node in onnx.load(tmp_path / "image.int8.onnx").graph.node}
    low = graphs.compare([clip], "image", tmp_path / "image.int8.onnx")
    assert 0 < low.max_abs < 0.1
    assert low.min_cosine > 0.99
    assert graphs.speed_ratio(tmp_path / "image.onnx", tmp_path / "image.int8.onnx", clip, "image") > 0
    with_sessions = graphs.with_graphs(clip, {tower: tmp_path / f"{tower}.onnx" for tower in ("image", "text")})
    np.testing.assert_allclose(
        encode_text(with_sessions.model, short), encode_text(clip.model, short).detach(), atol=1e-5
    )


def test_experts_of_a_bundle_take_routing_weights_and_share_their_trunk(tmp_path: Path) -> None:
    clip = make(tmp_path)
    other = Clip(**{**vars(clip), "model": copy.deepcopy(clip.model)})
    with torch.no_grad():
        for name, value in other.model.named_parameters():
            if name.startswith(("visual.transformer.resblocks.1", "visual.proj", "text_projection")):
                value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
    before = {name: value.clone() for name, value in other.model.state_dict().items()}
    graphs.save_onnx([clip, other], tmp_path, weighed="text")
    assert all(torch.equal(value, before[name]) for name, value in other.model.state_dict().items())
    images, tokens = torch.randn(5, 3, 16, 16), clip.tokens(TEXTS)
    weights = np.random.default_rng(0).dirichlet([1, 1], len(TEXTS)).astype(np.float32)
    found = run(tmp_path / "image.onnx", pixel_values=images.numpy()) @ (
        run(tmp_path / "text.onnx", input_ids=tokens.numpy(), routing_weights=weights).T
    )
    with torch.no_grad():
        cosines = [
            each.model.encode_image(images, normalize=True) @ each.model.encode_text(tokens, normalize=True).T
            for each in (clip, other)
        ]
    expected = sum(cosine.numpy() * weights[:, index] for index, cosine in enumerate(cosines))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    nodes = [node.op_type for node in onnx.load(tmp_path / "image.onnx").graph.node]
    assert nodes.count("Conv") == 1
    assert nodes.count("Softmax") == 3  # of attention: one shared block and two of their own


@pytest.mark.parametrize(
    ("kind", "tower"), [("BERT", "text"), ("timm", "image"), ("ResNet", "image")]
)  # fmt: skip
def test_towers_of_other_libraries_become_graphs(
    kind: str, tower: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resnet = {"vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32, "patch_size": None}}
    monkeypatch.setitem(support.CLIP_KINDS, "ResNet", resnet)
    monkeypatch.setattr(graphs, "INPUTS", {tower: graphs.INPUTS[tower]})  # type: ignore[index]
    clip = load_clip("modeclip-icon-xxxs", seed=0)
    (tmp_path / "model").mkdir()
    model, size = support.build_clip(kind, tmp_path / "model"), support.SMALL_BERT["vocab_size"]
    other = Clip(**{**vars(clip), "model": model, "tokenizer": lambda texts: clip.tokenizer(texts) % size})
    (parity,) = graphs.save_onnx([other], tmp_path)
    assert parity.file == f"{tower}.onnx"
    assert parity.max_abs < 1e-5


def test_clip_moe_becomes_graphs(tmp_path: Path) -> None:
    clip = make(tmp_path)
    states = []
    for seed in (1, 2):
        draw = torch.Generator().manual_seed(seed)
        states.append(
            {
                name: value + 0.2 * torch.randn(value.shape, generator=draw) if ".mlp." in name else value
                for name, value in clip.model.state_dict().items()
            }
        )
    moe = assemble_clip(clip, states, top_k=2)
    parity = graphs.save_onnx([moe], tmp_path)
    assert max(found.max_abs for found in parity) < 1e-5


def test_a_layer_that_the_exporter_lacks_is_one_line(tmp_path: Path) -> None:
    clip = make(tmp_path)
    whole = clip.model.visual.forward
    clip.model.visual.forward = lambda images: whole(images) * len(images.sum(dim=(1, 2, 3)).tolist())
    with pytest.raises(
        ModeclipError, match=r"cannot write the image tower \(VisionTransformer\) as ONNX: .+$"
    ) as error:
        graphs.save_onnx([clip], tmp_path)
    assert "\n" not in str(error.value)


def test_missing_packages_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(ModeclipError, match=r'^export: onnxscript is not installed; pip install "modeclip\[export\]"$'):
        graphs.check_packages()
