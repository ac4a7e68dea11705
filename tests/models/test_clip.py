"""CLIP models: the cut of captions over every text tower that open_clip builds, specifications, and proven exports."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from modeclip.errors import ModeclipError
from modeclip.models.clip import (
    Clip,
    LogitStart,
    check_model,
    computing,
    encode_image,
    encode_text,
    load_clip,
    model_shapes,
    save_clip,
    write_parity,
)

SIGLIP = LogitStart(log_scale=math.log(10), bias=-10.0)
TOWER = {"image_size": 16, "patch_size": 8, "width": 32, "head_width": 16, "layers": 1}


def reduced(name: str) -> dict[str, Any] | None:
    """Return a built-in configuration with its kind of text tower, a few numbers wide; None: it is not open_clip's."""
    config = open_clip.get_model_config(name)
    text = config["text_cfg"]
    if "hf_model_name" in text:
        return None
    text |= {"width": 32, "heads": 2, "layers": 2, "vocab_size": 600}
    pooled = {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    vision = {**TOWER, **(pooled if "multimodal_cfg" in config else {})}
    small = {**config, "embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
    if "multimodal_cfg" in config:
        small["multimodal_cfg"] = {**config["multimodal_cfg"], "width": 32, "heads": 2, "layers": 1, "vocab_size": 600}
    return small


def text_towers() -> dict[str, dict[str, Any]]:
    """Every kind of text tower among the built-in models, by the first name that has it."""
    kinds: dict[str, tuple[str, dict[str, Any]]] = {}
    for name in open_clip.list_models():
        small = reduced(name)
        if small is not None:
            kinds.setdefault(json.dumps(small, sort_keys=True), (name, small))
    return dict(kinds.values())


def build(config: dict[str, Any], folder: Path, name: str = "small") -> Any:
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{name}.json")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return open_clip.create_model(name, pretrained_text=False).eval()


def token_ids(lengths: list[int], context_length: int, end: int) -> torch.Tensor:
    """Token ids of captions of these lengths in all, end included, some with the token that looks like padding."""
    draw = np.random.default_rng(len(lengths))
    ids = np.zeros((len(lengths), context_length), np.int64)
    for row, length in enumerate(lengths):
        ids[row, : length - 1] = draw.integers(10, 500, length - 1)
        ids[row, 1 : length - 1 : 3] = 0
        ids[row, length - 1] = end
    return torch.from_numpy(ids)


def lengths_run(model: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, set[int]]:
    """Encode, and return the positions that the text transformer ran over too."""
    seen = set()
    tower = model.text if hasattr(model, "text") else model
    hook = tower.transformer.register_forward_pre_hook(lambda _, inputs: seen.add(inputs[0].shape[1]))
    with torch.inference_mode():
        features = encode_text(model, tokens)
    hook.remove()
    return features, seen


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_cut_is_exact_for_every_built_in_text_tower(tmp_path: Path) -> None:
    kinds = text_towers()
    cut, whole = [], []
    for name, config in kinds.items():
        model = build(config, tmp_path)
        context = config["text_cfg"].get("context_length", 77)
        pool, text = config["text_cfg"].get("pool_type", "argmax"), config["text_cfg"]
        end = 599 if pool != "eos" else text.get("eos_id", 2)
        exact = not text.get("no_causal_mask") and not text.get("embed_cls") and pool in {"argmax", "eos"}
        (cut if exact else whole).append(reduced(name))
        for lengths in ([3], [3, 5, 9], [context, 3], [2], [context]):
            tokens = token_ids(lengths, context, end)
            features, seen = lengths_run(model, tokens)
            with torch.inference_mode():
                full = model.encode_text(tokens, normalize=True)
            torch.testing.assert_close(features, full, atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
            positions = max(lengths) if exact else context + ("embed_cls" in text)
            assert seen == {positions}, name
    assert all(reduced(name) in cut for name in ("ViT-B-32", "ViT-L-14-quickgelu", "EVA02-B-16", "PE-Core-B-16"))
    others = ("ViT-B-16-SigLIP", "ViT-B-16-SigLIP2", "coca_ViT-B-32", "MobileCLIP-S1", "ViT-H-14-CLIPA")
    assert all(reduced(name) in whole for name in others)


def test_cut_with_end_of_text_by_id(tmp_path: Path) -> None:
    config = reduced("EVA02-B-16")
    assert config is not None
    for custom in (True, False):
        config |= {"custom_text": custom}
        config["text_cfg"] |= {"pool_type": "eos", "eos_id": 2}
        model = build(config, tmp_path)
        tokens = token_ids([4, 7], 77, 2)
        features, seen = lengths_run(model, tokens)
        assert seen == {7}
        torch.testing.assert_close(features, model.encode_text(tokens, normalize=True), atol=1e-5, rtol=0)


@pytest.mark.parametrize("change", [{"embed_cls": True}, {"pool_type": "last"}, {"pool_type": "eos", "eos_id": 0}])
def test_causal_tower_that_reads_elsewhere_gets_the_full_length(change: dict[str, Any], tmp_path: Path) -> None:
    config = reduced("EVA02-B-16")
    assert config is not None
    config["text_cfg"] |= change
    model = build(config, tmp_path)
    tokens = token_ids([4, 7], 77, 599)
    features, seen = lengths_run(model, tokens)
    assert seen == {77 + ("embed_cls" in change)}
    torch.testing.assert_close(features, model.encode_text(tokens, normalize=True), atol=1e-5, rtol=0)


def test_cut_gives_the_gradients_of_full_captions() -> None:
    clip = load_clip("modeclip-icon", seed=0)
    tokens = clip.tokens(["arrow", "a red heart"])
    gradients = []
    for encode in (encode_text, lambda model, ids: model.encode_text(ids, normalize=True)):
        clip.model.zero_grad()
        encode(clip.model, tokens).square().mul(torch.arange(128.0)).sum().backward()
        gradients.append({name: value.grad for name, value in clip.model.named_parameters() if value.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-4, rtol=1e-4)


def test_tokens_of_padding_alone_get_the_full_length() -> None:
    clip = load_clip("modeclip-icon", seed=0)
    tokens = torch.zeros(2, 24, dtype=torch.int64)
    full = clip.model.encode_text(tokens, normalize=True)
    torch.testing.assert_close(encode_text(clip.model, tokens), full, atol=1e-6, rtol=0)


def test_patch_dropout_is_of_training_only() -> None:
    clip, plain = load_clip("modeclip-icon", seed=0, patch_dropout=0.5), load_clip("modeclip-icon", seed=0)
    images = torch.rand(4, 3, 32, 32)
    lengths: list[int] = []
    clip.model.visual.transformer.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    encode_image(clip.model.train(), images)
    with torch.inference_mode():
        both = [encode_image(each.model.eval(), images) for each in (clip, plain)]
    assert lengths == [9, 17]
    torch.testing.assert_close(*both, atol=1e-6, rtol=0)
    assert clip.config == plain.config


def test_patch_dropout_of_a_tower_without_patches() -> None:
    with pytest.raises(ModeclipError, match=r"RN50.*no patches.*set train\.augment\.patch_dropout to 0"):
        load_clip("RN50", seed=0, patch_dropout=0.5)


def test_siglip_starts_as_siglip_and_travels(tmp_path: Path) -> None:
    clip, plain = load_clip("modeclip-icon", seed=4, logit_start=SIGLIP), load_clip("modeclip-icon", seed=4)
    assert clip.model.logit_scale.exp().item() == pytest.approx(10)
    assert clip.model.logit_bias.item() == -10
    assert torch.equal(clip.model.visual.conv1.weight, plain.model.visual.conv1.weight)
    with torch.no_grad():
        clip.model.logit_bias.fill_(-3)
    save_clip(clip, tmp_path)
    for again in (load_clip(tmp_path), load_clip(tmp_path, logit_start=SIGLIP)):
        assert again.model.logit_bias.item() == -3
    assert model_shapes("modeclip-icon", logit_start=SIGLIP).keys() - model_shapes("modeclip-icon").keys() == {
        "logit_bias"
    }


def test_weights_without_a_bias_start_as_siglip(tmp_path: Path) -> None:
    plain = load_clip("modeclip-icon", seed=1)
    save_clip(plain, tmp_path)
    for spec in (str(tmp_path), f"modeclip-icon@{tmp_path / 'open_clip_model.safetensors'}"):
        clip = load_clip(spec, logit_start=SIGLIP)
        assert clip.model.logit_bias.item() == -10
        assert clip.model.logit_scale.exp().item() == pytest.approx(10)
        assert torch.equal(clip.model.visual.conv1.weight, plain.model.visual.conv1.weight)
        save_clip(clip, tmp_path / "again")


def test_weights_of_a_file(tmp_path: Path) -> None:
    """As open_clip_train and as others write them; with NumPy's numbers, which older releases leave in them."""
    weights = load_clip("modeclip-icon", seed=9).model.state_dict()
    save_file(weights, tmp_path / "w.safetensors")
    torch.save(weights, tmp_path / "bare.pt")
    wrapped = {f"module.{name}": value for name, value in weights.items()}
    groups = [{"lr": np.float64(0.1), "params": [0]}]
    torch.save({"epoch": 1, "state_dict": wrapped, "optimizer": {"param_groups": groups}}, tmp_path / "epoch_1.pt")
    for file in ("w.safetensors", "bare.pt", "epoch_1.pt"):
        loaded = load_clip(f"modeclip-icon@{tmp_path / file}", seed=0).model.state_dict()
        assert all(torch.equal(value, loaded[name]) for name, value in weights.items()), file


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ViT-B-33", "unknown model 'ViT-B-33'"),
        ("bundle/expert-1", "unknown model 'bundle/expert-1'.*the path of a model folder"),  # as it was written
        ("ViT-B-32@no_such", "tag of ViT-B-32 'no_such'.*nearest: "),
        ("ViT-B/32@no_such", "unknown pretrained tag of ViT-B-32 'no_such'"),
        ("ViT-B-32@openai", "QuickGELU, ViT-B-32 has not.*write ViT-B-32-quickgelu@openai"),
        ("ViT-B-32-quickgelu@laion2B-s34B-b79K", "unknown pretrained tag of ViT-B-32-quickgelu"),
        ("modeclip-icon@/no/such/file.pt", r"no file /no/such/file\.pt.*correct the path"),
        ("local-dir:/no/such/folder", "open_clip_config.json is missing"),
    ],
)
def test_specification_that_names_nothing(spec: str, message: str) -> None:
    with pytest.raises(ModeclipError, match=message) as raised:
        load_clip(spec)
    assert "\n" not in str(raised.value)


def test_settings_without_weights_are_no_model(tmp_path: Path) -> None:
    """open_clip would start such a model at random, and a random model can be evaluated like any other."""
    save_clip(load_clip("modeclip-icon", seed=0), tmp_path)
    (tmp_path / "open_clip_model.safetensors").rename(tmp_path / "open_clip_pytorch_model.txt")
    with pytest.raises(ModeclipError, match=r"open_clip_model\.safetensors is missing.*folder as open_clip"):
        load_clip(tmp_path)


def test_weights_of_another_model(tmp_path: Path) -> None:
    weights = load_clip("modeclip-icon", seed=0).model.state_dict()
    del weights["ln_final.bias"]
    torch.save(weights, tmp_path / "w.pt")
    (tmp_path / "text.pt").write_text("hello")
    for file, message in {"w.pt": r"cannot be loaded: .*ln_final\.bias", "text.pt": "cannot be loaded: "}.items():
        with pytest.raises(ModeclipError, match=message) as raised:
            load_clip(f"modeclip-icon@{tmp_path / file}")
        assert "\n" not in str(raised.value)


def test_shapes_are_those_of_the_model() -> None:
    state = load_clip("modeclip-icon", seed=0).model.state_dict()
    assert model_shapes("modeclip-icon") == {name: tuple(value.shape) for name, value in state.items()}


def test_parity_is_written_and_exact(tmp_path: Path) -> None:
    clip = load_clip("modeclip-icon", seed=2, patch_dropout=0.5)
    clip.model.train()
    before = torch.random.get_rng_state()
    save_clip(clip, tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert clip.model.training
    parity = json.loads((tmp_path / "parity.json").read_text())
    assert parity["token_ids_equal"]
    for part in ("preprocess", "image", "text"):
        assert parity[part]["max_abs"] < 1e-6
    assert min(parity["image"]["min_cosine"], parity["text"]["min_cosine"]) > 1 - 1e-6
    assert parity["versions"].keys() == {"modeclip", "open_clip_torch", "torch"}


def test_open_clip_loads_the_weights_by_the_name_of_the_configuration(tmp_path: Path) -> None:
    clip = load_clip("modeclip-icon", seed=5)
    save_clip(clip, tmp_path)
    model = open_clip.create_model("modeclip-icon", pretrained=str(tmp_path / "open_clip_model.safetensors"))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in clip.model.state_dict().items())
    assert load_file(tmp_path / "open_clip_model.safetensors").keys() == clip.model.state_dict().keys()


def test_tokenizer_of_hugging_face_travels_with_the_model(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz!,", "red", "heart", "arrow"]
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "source" / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    config = reduced("ViT-B-32")
    assert config is not None
    config["text_cfg"] |= {"hf_tokenizer_name": "some/tokenizer", "context_length": 16, "pool_type": "eos", "eos_id": 3}
    save_file(build(config, tmp_path).state_dict(), tmp_path / "source" / "open_clip_model.safetensors")
    content = json.dumps({"model_cfg": config, "preprocess_cfg": {}})
    (tmp_path / "source" / "open_clip_config.json").write_text(content)
    clip = load_clip(tmp_path / "source")
    save_clip(clip, tmp_path / "copy")
    assert torch.equal(load_clip(tmp_path / "copy").tokens(["red heart"]), clip.tokens(["red heart"]))
    assert clip.tokens(["red heart"])[0, :4].tolist() == [2, words.index("red"), words.index("heart"), 3]


def quick(clip: Clip, tmp_path: Path) -> Clip:
    """Give a model QuickGELU behind the back of its configuration."""
    model = build({**clip.config["model_cfg"], "quick_gelu": True}, tmp_path, "quick")
    model.load_state_dict(clip.model.state_dict())
    return replace(clip, model=model)


def other_mean(clip: Clip, _: Path) -> Clip:
    config = json.loads(json.dumps(clip.config))
    config["preprocess_cfg"]["mean"][0] += 0.01
    return replace(clip, config=config)


def other_size(clip: Clip, _: Path) -> Clip:
    config = json.loads(json.dumps(clip.config))
    config["preprocess_cfg"]["resize_mode"] = "squash"
    return replace(clip, config=config)


def other_weights(clip: Clip, _: Path) -> Clip:
    with torch.no_grad():
        clip.model.positional_embedding[0, 0] = math.nan
    return clip


def other_tokenizer(clip: Clip, _: Path) -> Clip:
    return replace(clip, tokenizer=open_clip.SimpleTokenizer(context_length=24, clean="whitespace"))


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (quick, "image by .*text by"),
        (other_mean, "preprocess by"),
        (other_size, "preprocess by"),
        (other_weights, "text by nan"),
        (other_tokenizer, "token ids"),
    ],
)
def test_export_that_is_another_model(change: Any, parts: str, tmp_path: Path) -> None:
    clip = change(load_clip("modeclip-icon", seed=0), tmp_path)
    with pytest.raises(
        ModeclipError, match=rf"open_clip loads another model.*{parts}.*open_clip_config\.json"
    ) as raised:
        save_clip(clip, tmp_path / "model")
    assert "\n" not in str(raised.value)


def test_weights_that_were_damaged_after_they_were_written(tmp_path: Path) -> None:
    clip = load_clip("modeclip-icon", seed=0)
    save_clip(clip, tmp_path)
    weights = load_file(tmp_path / "open_clip_model.safetensors")
    weights["visual.proj"] = weights["visual.proj"].flip(0)
    save_file(weights, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(ModeclipError, match="differ in image by"):
        write_parity(clip, tmp_path)


@pytest.mark.parametrize("size", [(32, 32), (50, 40)])
def test_preprocessing_of_both_ways_is_in_the_proof(size: tuple[int, int]) -> None:
    clip = load_clip("modeclip-icon", seed=0)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8))
    torch.testing.assert_close(clip.images([picture])[0], clip.preprocess(picture), atol=1e-6, rtol=0)


def test_batch_of_images_equals_preprocess_of_each() -> None:
    clip = load_clip("modeclip-icon", seed=0)
    draw = np.random.default_rng(0)
    right = [Image.fromarray(draw.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(3)]
    wrong = [*right, Image.fromarray(draw.integers(0, 255, (50, 40, 3), dtype=np.uint8))]
    for pictures in (right, wrong):
        expected = torch.stack([clip.preprocess(picture) for picture in pictures])
        torch.testing.assert_close(clip.images(pictures), expected, atol=1e-6, rtol=0)
        cut = clip.images([clip.cut(picture) for picture in pictures])
        torch.testing.assert_close(cut, expected, atol=1e-6, rtol=0)


def test_saved_model_is_a_plain_open_clip_folder(tmp_path: Path) -> None:
    clip = load_clip("modeclip-icon", seed=3)
    save_clip(clip, tmp_path)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(["a heart", "an arrow"])
    image = preprocess(Image.new("RGB", (70, 50), "red")).unsqueeze(0)
    with torch.inference_mode():
        for method, inputs in (("encode_image", image), ("encode_text", tokens)):
            theirs, ours = getattr(model, method)(inputs), getattr(clip.model.eval(), method)(inputs)
            torch.testing.assert_close(theirs, ours, atol=1e-6, rtol=0)


def test_a_hub_that_does_not_answer_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The Hub's client warns of each try, once for every handler; the error says it."""
    logger = logging.getLogger("huggingface_hub.utils._http")

    def refuse(*_: object, **__: object) -> None:
        logger.warning("thrown while requesting HEAD")
        raise OSError("no route to the Hub")

    monkeypatch.setattr(open_clip.pretrained, "download_pretrained_from_hf", refuse)
    with pytest.raises(ModeclipError, match="model hf-hub:no/such: cannot be loaded: no route to the Hub"):
        load_clip("hf-hub:no/such")
    assert "HEAD" not in capfd.readouterr().err
    assert logging.getLogger("huggingface_hub").level < logging.CRITICAL


def test_a_tower_runs_without_gradients_and_keeps_the_casts_of_its_weights() -> None:
    """Under inference_mode autocast on a CPU would cast every weight at every use."""
    clip = load_clip("modeclip-icon-xxxs", seed=0)
    clip.model.eval()
    tokens = clip.tokens(["a cat"])
    with computing(clip, "bf16-mixed"):
        assert not torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        casts = []
        for _ in range(3):
            with torch.profiler.profile() as profile:
                encode_text(clip.model, tokens)
            casts.append(sum(event.name == "aten::_to_copy" for event in profile.events()))
    assert casts[0] > casts[1] == casts[2]


def test_a_name_without_weights_is_refused_where_a_model_is_used() -> None:
    for spec in ("ViT-B-32", "modeclip-icon"):
        with pytest.raises(ModeclipError, match=f"model {spec} names no weights.* be random; write {spec}@TAG"):
            load_clip(spec)
        check_model(spec)
        with pytest.raises(ModeclipError, match="names no weights"):
            check_model(spec, random_weights=False)
