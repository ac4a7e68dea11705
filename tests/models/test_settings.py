"""Settings of model folders: everything that the libraries themselves save passes, everything else does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import open_clip
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeclip.errors import ModeclipError
from modeclip.models.settings import (
    MODEL_TYPES,
    TOKENIZERS,
    check_clip_folder,
    check_clip_settings,
    check_links,
    check_sentence_folder,
    check_static_folder,
    check_timm_folder,
    check_transformer_folder,
)

CONFIGS = [
    *Path(open_clip.__file__).parent.glob("model_configs/*.json"),
    *(Path(__file__).parents[2] / "src/modeclip/models/configs").glob("*.json"),
]


def clip_settings() -> dict[str, Any]:
    model = {"embed_dim": 8, "vision_cfg": {"layers": 1, "width": 64}, "text_cfg": {"width": 8}}
    return {"model_cfg": model, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}}


def test_every_configuration_of_open_clip_passes() -> None:
    assert len(CONFIGS) > 140
    for path in CONFIGS:
        content = {"model_cfg": json.loads(path.read_text()), "preprocess_cfg": {}}
        assert check_clip_settings(content, path.name) is content


def test_every_field_of_open_clip_is_known() -> None:
    """A field of a newer open_clip has to be looked at before it is let through."""
    from open_clip.coca_model import MultimodalCfg
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg
    from open_clip.transform import PreprocessCfg

    towers = {"vision_cfg": CLIPVisionCfg, "text_cfg": CLIPTextCfg, "multimodal_cfg": MultimodalCfg}
    for name, kind in towers.items():
        content = clip_settings()
        content["model_cfg"][name] = {field.name: None for field in fields(kind)}
        check_clip_settings(content, "x")
    check_clip_settings(
        clip_settings() | {"preprocess_cfg": {field.name: None for field in fields(PreprocessCfg)}}, "x"
    )


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("model_cfg.text_cfg.tokenizer_kwargs.trust_remote_code", True, "trust_remote_code would run code"),
        ("model_cfg.text_cfg.tokenizer_kwargs.trust_remote_code", "yes", "trust_remote_code would run code"),
        ("model_cfg.text_cfg.tokenizer_kwargs.a.b.trust_remote_code", 1, "trust_remote_code would run code"),
        ("trust_remote_code", True, "trust_remote_code would run code"),
        ("preprocess_cfg.auto_map", {"AutoModel": "evil.Model"}, "auto_map would run code"),
        ("model_cfg.text_cfg.tokenizer_kwargs.bpe_path", "/etc/passwd", "'bpe_path'"),
        ("model_cfg.text_cfg.tokenizer_kwargs.tokenizer_file", "../x.json", "'tokenizer_file'"),
        ("model_cfg.text_cfg.tokenizer_kwargs.cache_dir", "/tmp", "'cache_dir'"),
        ("model_cfg.text_cfg.hf_tokenizer_name", "../outside", "'hf_tokenizer_name': expected a name on the Hub"),
        ("model_cfg.text_cfg.hf_tokenizer_name", "/abs", "'hf_tokenizer_name': expected a name on the Hub"),
        ("model_cfg.text_cfg.hf_tokenizer_name", "a/../b", "'hf_tokenizer_name': expected a name on the Hub"),
        ("model_cfg.text_cfg.hf_model_name", "./evil", "'hf_model_name': expected a name on the Hub"),
        ("model_cfg.text_cfg.hf_model_name", ["a"], "'hf_model_name': expected a name on the Hub"),
        ("model_cfg.vision_cfg.timm_model_name", "hf-hub:org/evil", "'timm_model_name': expected the name of a model"),
        ("model_cfg.vision_cfg.timm_model_name", "../x", "'timm_model_name': expected the name of a model"),
        ("model_cfg.vision_cfg.act_kwargs", {"fn": "os.system"}, "'fn'"),
        ("model_cfg.vision_cfg.layers", 10**9, "'layers': expected a whole number from 0 to 1,024"),
        ("model_cfg.vision_cfg.layers", True, "'layers': expected a whole number"),
        ("model_cfg.vision_cfg.width", "64", "'width': expected a whole number.*got '64'"),
        ("model_cfg.vision_cfg.patch_dropout", float("nan"), "'patch_dropout': expected a number"),
        ("model_cfg.embed_dim", -1, "'embed_dim': expected a whole number"),
        ("model_cfg.embed_dim", None, "embed_dim is missing"),
        ("model_cfg.text_cfg", [], "expected an object of settings"),
        ("model_cfg", None, "model_cfg is missing"),
        ("model_cfg.custom_text", "evil.Tower", "'custom_text': expected true or false"),
        ("model_cfg.pretrained_hf", True, "'pretrained_hf'"),
        ("preprocess_cfg.std", [0, 0, 0], "'std': expected a number above 0"),
        ("preprocess_cfg.mode", "L", "'mode': expected one of RGB"),
        ("preprocess_cfg.interpolation", "os.system('x')", "'interpolation': expected a word"),
        ("weights", "/etc/passwd", "'weights'"),
    ],
)
def test_settings_of_a_clip_that_are_refused(place: str, value: object, message: str) -> None:
    content = clip_settings()
    *path, last = place.split(".")
    section = content
    for key in path:
        section = section.setdefault(key, {})
    section[last] = value
    with pytest.raises(ModeclipError, match=message) as raised:
        check_clip_settings(content, "where/x.json")
    assert "\n" not in str(raised.value)
    assert "where/x.json" in str(raised.value)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(VALUES, st.sampled_from(["", "model_cfg", "model_cfg.text_cfg", "model_cfg.vision_cfg", "preprocess_cfg"]))
def test_any_json_passes_or_is_an_error_of_ours(value: object, place: str) -> None:
    content: Any = clip_settings()
    *path, last = ["root", *filter(None, place.split("."))]
    whole = section = {"root": content}
    for key in path:
        section = section[key]
    section[last] = value
    with suppress(ModeclipError):
        check_clip_settings(whole["root"], "x")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"\xff\xfe{}", "no JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[]", "expected an object of settings"),
        (b"1" * 5000, "no JSON"),
    ],
)
def test_damaged_settings_are_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_bytes(content)
    with pytest.raises(ModeclipError, match=message) as raised:
        check_clip_folder(tmp_path)
    assert "\n" not in str(raised.value)


def sentences(folder: Path) -> None:
    """A folder as sentence-transformers 6 saves it."""
    names = {
        "base.modules.transformer.Transformer": "",
        "sentence_transformer.modules.pooling.Pooling": "1_Pooling",
        "base.modules.dense.Dense": "2_Dense",
    }
    modules = [
        {"idx": k, "name": str(k), "path": path, "type": f"sentence_transformers.{name}"}
        for k, (name, path) in enumerate(names.items())
    ]
    put(folder / "modules.json", modules)
    put(folder / "config.json", {"model_type": "bert", "hidden_act": "gelu", "architectures": ["BertModel"], "some": 1})
    task = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
    put(folder / "sentence_bert_config.json", {"transformer_task": "feature-extraction", "modality_config": task})
    put(folder / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "unk_token": "[UNK]", "is_local": True})
    put(folder / "1_Pooling/config.json", {"embedding_dimension": 8, "pooling_mode": "mean"})
    dense = {"in_features": 8, "activation_function": "torch.nn.modules.activation.Tanh"}
    put(folder / "2_Dense/config.json", dense)
    put(folder / "config_sentence_transformers.json", {"model_type": "SentenceTransformer", "prompts": {}})


def put(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_what_sentence_transformers_saves_passes(tmp_path: Path) -> None:
    sentences(tmp_path)
    check_sentence_folder(tmp_path)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("modules.json", [{"type": "evil.Module", "path": ""}], "'type': expected a module of sentence-transformers"),
        ("modules.json", [{"type": "os.system", "path": ""}], "'type': expected a module of sentence-transformers"),
        ("modules.json", [{"type": "sentence_transformers.util.import_from_string"}], "'type': expected a module"),
        (
            "modules.json",
            [{"type": "sentence_transformers.models.Dense", "path": "../x"}],
            "'path': expected a folder",
        ),
        (
            "modules.json",
            [{"type": "sentence_transformers.models.Dense", "path": "/x"}],
            "'path': expected a folder",
        ),
        ("modules.json", {}, "expected a list of modules"),
        ("modules.json", [3], "expected an object of settings"),
        ("config.json", {"auto_map": {"AutoModel": "evil.Model"}}, "auto_map would run code"),
        ("config.json", {"attn_implementation": "org/kernel"}, "'attn_implementation': expected one"),
        ("config.json", {"_attn_implementation": "org/kernel"}, "'_attn_implementation': expected one"),
        (
            "config.json",
            {"transformers_weights": "../../x.safetensors"},
            "transformers_weights would run code or open files",
        ),
        ("config.json", {"model_type": "timm_wrapper"}, "'model_type': expected one of"),
        ("config.json", {"model_type": None}, "model_type is missing"),
        ("config.json", {"backbone": "hf-hub:org/evil"}, "'backbone': expected numbers"),
        ("config.json", {"quantization_config": {"quant_method": "evil"}}, "quantization_config would run code"),
        ("sentence_bert_config.json", {"model_args": {"trust_remote_code": True}}, "trust_remote_code would run code"),
        (
            "sentence_bert_config.json",
            {"modality_config": {"text": {"method": "save_pretrained"}}},
            "'method': expected one",
        ),
        ("tokenizer_config.json", {"auto_map": ["evil.Slow", None]}, "auto_map would run code"),
        ("tokenizer_config.json", {"tokenizer_class": "evil.Tokenizer"}, "'tokenizer_class': expected"),
        (
            "tokenizer_config.json",
            {"tokenizer_class": "BertJapaneseTokenizer"},
            "'tokenizer_class': expected",
        ),
        ("tokenizer_config.json", {"vocab_file": "/etc/passwd"}, "'vocab_file': expected numbers"),
        (
            "tokenizer_config.json",
            {"extra": {"deep": [{"trust_remote_code": True}]}},
            "trust_remote_code would run code",
        ),
        (
            "2_Dense/config.json",
            {"activation_function": "torch.hub.load"},
            "'activation_function': expected",
        ),
        ("2_Dense/config.json", {"activation_function": "evil.Act"}, "'activation_function': expected"),
        (
            "adapter_config.json",
            {"base_model_name_or_path": "org/evil"},
            "adapter_config.json makes",
        ),
        ("model.safetensors.index.json", {"weight_map": {"a": "../x.safetensors"}}, "no file of the folder"),
        ("model.safetensors.index.json", {"weight_map": {"a": "/x.safetensors"}}, "no file of the folder"),
        ("preprocessor_config.json", {"auto_map": {"AutoProcessor": "evil.P"}}, "auto_map would run code"),
        (
            "preprocessor_config.json",
            {"image_processor_type": "EvilProcessor"},
            "'image_processor_type': expected",
        ),
        ("config_sentence_transformers.json", {"trust_remote_code": True}, "trust_remote_code would run code"),
    ],
)
def test_settings_of_an_encoder_that_are_refused(file: str, change: Any, message: str, tmp_path: Path) -> None:
    sentences(tmp_path)
    path = tmp_path / file
    before = json.loads(path.read_text()) if path.is_file() else {}
    put(path, before | change if isinstance(before, dict) and isinstance(change, dict) else change)
    with pytest.raises(ModeclipError, match=message) as raised:
        check_sentence_folder(tmp_path)
    assert "\n" not in str(raised.value)
    if file in {"config.json", "tokenizer_config.json"}:
        with pytest.raises(ModeclipError, match=message):
            check_transformer_folder(tmp_path)


def test_listed_classes_are_in_transformers() -> None:
    """A name that transformers does not have would let anything through that takes the name."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    classes = {name: (f"{name}Tokenizer", f"{name}TokenizerFast") for name in TOKENIZERS}
    missing = {name for name, both in classes.items() if not any(hasattr(transformers, each) for each in both)}
    assert missing <= {"MT5"}  # gone since 5.0, which reads such a folder with its general class
    assert set(CONFIG_MAPPING_NAMES) >= MODEL_TYPES


@pytest.mark.parametrize(
    ("check", "content", "message"),
    [
        (check_timm_folder, {"architecture": "hf-hub:org/evil"}, "'architecture': expected the name of a model"),
        (check_timm_folder, {"architecture": "vit", "model_args": {"checkpoint_path": "/x"}}, "'checkpoint_path'"),
        (check_timm_folder, {"architecture": "vit", "pretrained_cfg": {"file": "/x.pth"}}, "'file': expected numbers"),
        (check_timm_folder, {"architecture": "vit", "pretrained_cfg": {"custom_load": "hf"}}, "'custom_load'"),
        (check_static_folder, {"auto_map": {"AutoModel": "evil.M"}}, "auto_map would run code"),
        (check_static_folder, {"loader": "evil.load"}, "'loader': expected numbers"),
    ],
)
def test_other_settings_that_are_refused(
    check: Callable[[Path], None], content: object, message: str, tmp_path: Path
) -> None:
    put(tmp_path / "config.json", content)
    with pytest.raises(ModeclipError, match=message):
        check(tmp_path)


def test_links_stay_in_the_folder(tmp_path: Path) -> None:
    """A cache of the Hub is made of links to files beside the snapshots; its repository is the folder then."""
    folder = tmp_path / "model"
    (folder / "part").mkdir(parents=True)
    (folder / "weights").write_text("")
    (folder / "part" / "again").symlink_to("../weights")
    check_links(folder)
    (tmp_path / "same").symlink_to(folder)
    check_links(tmp_path / "same")
    (tmp_path / "outside").write_text("")
    for target in (tmp_path / "outside", "../../outside", "/nowhere"):
        (folder / "part" / "out").symlink_to(target)
        with pytest.raises(ModeclipError, match=r"part/out is a link to .*outside of the folder"):
            check_links(folder)
        (folder / "part" / "out").unlink()
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0a1b"
    (snapshot / "expert-0").mkdir(parents=True)
    (tmp_path / "models--org--name" / "blobs").mkdir()
    (tmp_path / "models--org--name" / "blobs" / "1").write_text("")
    (snapshot / "expert-0" / "weights").symlink_to("../../../blobs/1")
    check_links(snapshot)
    check_links(snapshot / "expert-0")
    (snapshot / "weights").symlink_to("../../../outside")
    with pytest.raises(ModeclipError, match="weights is a link"):
        check_links(snapshot)


def test_a_link_to_itself_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").symlink_to("vocab.txt")
    with pytest.raises(ModeclipError, match=r"vocab\.txt is a link to itself; get the model again"):
        check_links(tmp_path)


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer"])
def test_a_number_of_layers_that_no_model_has_is_refused(tmp_path: Path, key: str) -> None:
    """Building them one by one would take hours before anything fails."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", key: 10**9}))
    with pytest.raises(ModeclipError, match=f"'{key}': expected a whole number from 0 to 1,024"):
        check_transformer_folder(tmp_path)


def test_a_depth_that_no_image_model_has_is_refused(tmp_path: Path) -> None:
    settings = {"architecture": "test_vit", "pretrained_cfg": {}, "model_args": {"depth": 10**6}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ModeclipError, match="'depth': expected a whole number from 0 to 1,024"):
        check_timm_folder(tmp_path)
