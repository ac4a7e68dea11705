"""What the files of a model folder may say, checked before open_clip, transformers or timm read them.

A model's folder is input: whoever publishes it chooses every word of its settings, and the libraries that open it
follow some of these words into code (``auto_map``, ``trust_remote_code``, module types, kernels from the Hub) or out of
the folder (file names, links, the Hub id of a tokenizer). So a folder is opened only if everything that it says is in a
list of what models need:

- ``open_clip_config.json`` has the keys that open_clip's own configurations have, with numbers, flags and words;
- in the settings of transformers, sentence-transformers, timm and model2vec only keys that are known to be harmless may
  hold words or objects. Any other key may hold numbers, which name nothing;
- classes of models, tokenizers and modules are those in the lists below, all of which the libraries ship;
- no file is a link that leaves the folder, and no setting names a file by a path.

Price: a few milliseconds a folder; nothing but JSON is read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modeclip.errors import ModeclipError, unknown

CLIP_CONFIG = "open_clip_config.json"
MAX_BYTES = 1 << 25
"""Largest settings file that is read; a large tokenizer's settings have 2 MB."""


def _words(words: str) -> frozenset[str]:
    return frozenset(words.split())


CODE_KEYS = _words("""
        auto_map trust_remote_code custom_pipelines custom_generate code_revision transformers_weights
        use_kernels kernel_config quantization_config base_model_name_or_path fast_tokenizer_files gguf_file
        """)
"""Keys that lead the libraries to code, or to files that the folder does not show; refused at any depth."""
ATTENTION_KEYS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
ATTENTIONS = ("eager", "sdpa")
"""Kernels of attention that come with transformers; any other name is downloaded from the Hub and run."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)

_Rules = dict[str, Any]
"""Kind of the value of each key, or the rules of the object under it."""


@dataclass(frozen=True)
class _Kind:
    """A kind of value: what the message calls it, and the test that a value must pass; null always does."""

    expected: str
    fits: Callable[[Any], bool]


def _keys(words: str, kind: _Kind) -> dict[str, _Kind]:
    return dict.fromkeys(words.split(), kind)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_plain(value: Any) -> bool:
    """Whether a value holds numbers and flags alone, which cannot name a class or a file."""
    if isinstance(value, list | dict):
        return all(map(_is_plain, value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, bool) or _is_number(value)


def _count(most: int) -> _Kind:
    return _Kind(
        f"a whole number from 0 to {most:,}",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most,
    )


def _some(kind: _Kind, most: int) -> _Kind:
    """Return the kind of one value or a list of up to ``most``."""
    return _Kind(
        f"{kind.expected}, or a list of up to {most}",
        lambda value: (
            kind.fits(value) or (isinstance(value, list) and len(value) <= most and all(map(kind.fits, value)))
        ),
    )


def _word(pattern: str, expected: str) -> _Kind:
    compiled = re.compile(pattern, re.ASCII)
    return _Kind(expected, lambda value: isinstance(value, str) and compiled.fullmatch(value) is not None)


def _among(words: Iterable[str]) -> _Kind:
    known = tuple(words)
    return _Kind(f"one of {', '.join(known)}", lambda value: value in known)


_FLAG = _Kind("true or false", lambda value: isinstance(value, bool))
_NUMBER = _Kind("a number", _is_number)
_WORD = _word(r"[\w-]{0,64}", "a word of letters, digits, _ and -")
_DOTTED = _word(r"[\w.-]{0,128}", "a name of letters, digits, _, - and .")
_TEXT = _Kind("a text", lambda value: isinstance(value, str))
_PLAIN = _Kind("numbers", _is_plain)
_WIDTH, _LAYERS, _LENGTH, _PIXELS = _count(1 << 16), _count(1 << 10), _count(1 << 20), _count(1 << 14)
_EXPERTS = _Kind("a whole number from 1 to 1,024", lambda value: type(value) is int and 1 <= value <= 1 << 10)
_HUB_NAME = _Kind(
    "a name on the Hub (NAME or ORG/NAME)",
    lambda value: isinstance(value, str) and (value == "" or HUB_ID.fullmatch(value) is not None),
)
_TOKENS = _Kind("a token", lambda value: isinstance(value, str) or (isinstance(value, dict) and _is_token(value)))
_POSITIVE = _some(_Kind("a number above 0", lambda value: _is_number(value) and value > 0), 4)


def _is_token(value: dict[str, Any]) -> bool:
    return all(isinstance(item, str | bool) for item in value.values())


# ---------------------------------------------------------------------------------------------- open_clip

_BLOCK: _Rules = {
    "mlp_ratio": _NUMBER,
    "ls_init_value": _NUMBER,
    "final_ln_after_pool": _FLAG,
    "pool_type": _WORD,
    "output_tokens": _FLAG,
    "act_kwargs": {"approximate": _WORD, "negative_slope": _NUMBER, "inplace": _FLAG},
    "norm_kwargs": {"eps": _NUMBER, "elementwise_affine": _FLAG, "bias": _FLAG},
    "block_type": _WORD,
    "qk_norm": _FLAG,
    "scaled_cosine_attn": _FLAG,
    "scale_heads": _FLAG,
    "scale_attn_inner": _FLAG,
    "scale_attn": _FLAG,
    "scale_fc": _FLAG,
}
_VISION: _Rules = _BLOCK | {
    "layers": _some(_LAYERS, 4),
    "width": _WIDTH,
    "head_width": _WIDTH,
    "patch_size": _some(_PIXELS, 2),
    "image_size": _some(_PIXELS, 2),
    "patch_dropout": _NUMBER,
    "attentional_pool": _Kind("true, false or a word", lambda value: isinstance(value, bool) or _WORD.fits(value)),
    "attn_pooler_queries": _WIDTH,
    "attn_pooler_heads": _WIDTH,
    "no_ln_pre": _FLAG,
    "pos_embed_type": _WORD,
    "timm_model_name": _word(r"[\w-]+(\.[\w-]+)?", "the name of a model that timm ships"),
    "timm_model_pretrained": _FLAG,
    "timm_pool": _WORD,
    "timm_proj": _WORD,
    "timm_proj_bias": _FLAG,
    "timm_drop": _NUMBER,
    "timm_drop_path": _NUMBER,
}
_TOKENIZER_ARGUMENTS: _Rules = {
    "clean": _WORD,
    "strip_sep_token": _FLAG,
    "language": _WORD,
    "additional_special_tokens": _some(_TEXT, 1 << 10),
    "reduction_mask": _WORD,
    "do_lower_case": _FLAG,
    "add_prefix_space": _FLAG,
    "legacy": _FLAG,
    "use_fast": _FLAG,
    "keep_accents": _FLAG,
    "model_max_length": _NUMBER,
    "padding_side": _WORD,
    "truncation_side": _WORD,
    "src_lang": _WORD,
    "tgt_lang": _WORD,
}
_TEXT_TOWER: _Rules = _BLOCK | {
    "context_length": _LENGTH,
    "vocab_size": _count(1 << 24),
    "hf_tokenizer_name": _HUB_NAME,
    "tokenizer_mode": _WORD,
    "tokenizer_kwargs": _TOKENIZER_ARGUMENTS,
    "width": _WIDTH,
    "heads": _WIDTH,
    "layers": _LAYERS,
    "embed_cls": _FLAG,
    "pad_id": _count(1 << 24),
    "eos_id": _count(1 << 24),
    "no_causal_mask": _FLAG,
    "proj_bias": _FLAG,
    "proj_type": _WORD,
    "hf_model_name": _HUB_NAME,
    "hf_model_pretrained": _FLAG,
    "hf_proj_type": _WORD,
    "hf_pooler_type": _WORD,
}
_CLIP: _Rules = {
    "model_cfg": {
        "embed_dim": _WIDTH,
        "vision_cfg": _VISION,
        "text_cfg": _TEXT_TOWER,
        "multimodal_cfg": _TEXT_TOWER | {"dim_head": _WIDTH, "n_queries": _WIDTH, "attn_pooler_heads": _WIDTH},
        "quick_gelu": _FLAG,
        "custom_text": _FLAG,
        "init_logit_scale": _NUMBER,
        "init_logit_bias": _NUMBER,
        "nonscalar_logit_scale": _FLAG,
        "output_dict": _FLAG,
        "pad_id": _count(1 << 24),
    },
    "preprocess_cfg": {
        "size": _some(_PIXELS, 3),
        "mode": _among(["RGB"]),
        "mean": _some(_NUMBER, 4),
        "std": _POSITIVE,
        "interpolation": _WORD,
        "resize_mode": _WORD,
        "fill_color": _some(_NUMBER, 4),
    },
    "moe": {"num_experts": _EXPERTS, "top_k": _EXPERTS},
}

# ------------------------------------------------------------------------------- transformers and the others

TOKENIZERS = _words("""
        Albert Bart Barthez Bert BigBird Blenderbot Camembert CLIP Cohere Deberta DebertaV2 DistilBert Electra
        FNet Funnel Gemma GPT2 GPTNeoX Herbert LED Llama Longformer Lxmert M2M100 MBart MBart50 MobileBert MPNet
        MT5 Nllb Pegasus PreTrained Qwen2 RemBert Roberta Siglip Siglip2 SqueezeBert T5 XLMRoberta XLNet
        """)
"""Tokenizers of transformers that read a vocabulary and nothing else, without ``Tokenizer`` and ``TokenizerFast``."""
MODEL_TYPES = _words("""
        albert bart bert big_bird camembert clip clip_text_model convbert deberta deberta-v2 distilbert electra
        ernie eurobert fnet funnel gemma gemma2 gemma3_text gpt2 gpt_neox gte ibert jina_embeddings_v3 led llama
        longformer luke m2m_100 mbart megatron-bert mistral mobilebert modernbert mpnet mt5 nomic_bert
        nystromformer opt pegasus phi3 qwen2 qwen3 reformer rembert roberta roberta-prelayernorm roformer siglip
        siglip2 siglip2_text_model siglip_text_model siglip_vision_model clip_vision_model siglip2_vision_model
        smollm3 splinter squeezebert t5 t5gemma xlm-roberta xlm-roberta-xl xlnet xmod
        """)
"""Models of texts, and CLIPs, that transformers itself ships."""
MODULES = ("CLIPModel", "Dense", "Dropout", "LayerNorm", "Normalize", "Pooling", "StaticEmbedding", "Transformer")
"""Modules of sentence-transformers that a folder may be made of."""

_FREE = _Kind("anything without a key that leads to code", lambda _: True)  # `_refuse_code` has seen it
_ACTIVATIONS = "ELU GELU Hardswish Hardtanh Identity LeakyReLU Mish ReLU ReLU6 SELU SiLU Sigmoid Softplus Softsign Tanh"
_DTYPE = _among(["auto", "bfloat16", "float16", "float32", "float64"])
_ATTENTION: _Rules = dict.fromkeys(ATTENTION_KEYS, _among(ATTENTIONS))


def _is_tokenizer(value: Any) -> bool:
    if value in ("TokenizersBackend", "PreTrainedTokenizerFast"):
        return True
    return isinstance(value, str) and re.sub("Tokenizer(Fast)?$", "", value) in TOKENIZERS and "Tokenizer" in value


_TOKENIZER_CLASS = _Kind("the class of a tokenizer that transformers ships", _is_tokenizer)
_MODEL: _Rules = (
    _ATTENTION
    | _keys(
        """
        hidden_act hidden_activation activation activation_function dense_act_fn feed_forward_proj
        position_embedding_type classifier_activation classifier_pooling summary_type summary_activation
        pooler_type problem_type emb_pooler relative_attention_type position_biased_input norm_type mlp_type
        attention_type hidden_act_fn initializer_type pooling_type summary_first ff_activation mem_len_type
        init_range_type
        """,
        _WORD,
    )
    | _keys("num_hidden_layers num_layers num_decoder_layers n_layer n_layers encoder_layers decoder_layers", _LAYERS)
    | _keys("_name_or_path name_or_path finetuning_task language prefix _commit_hash model_name", _TEXT)
    | _keys(
        """
        architectures layer_types mlp_layer_types pos_att_type id2label label2id task_specific_params
        rope_scaling rope_parameters attention_types attention_layers keys_to_ignore_at_inference
        sentence_transformers block_layer_types pruned_heads
        """,
        _FREE,
    )
    | {
        "model_type": _among(sorted(MODEL_TYPES)),
        "tokenizer_class": _TOKENIZER_CLASS,
        "transformers_version": _DOTTED,
        "dtype": _DTYPE,
        "torch_dtype": _DTYPE,
    }
)
_TOKENIZER: _Rules = (
    _keys(
        """
        unk_token sep_token pad_token cls_token mask_token bos_token eos_token eot_token sot_token image_token
        decoder_start_token
        """,
        _TOKENS,
    )
    | _keys(
        """
        padding_side truncation_side truncation_strategy padding tokenizer_type backend errors src_lang tgt_lang
        lang processor_class image_processor_type feature_extractor_type legacy_behaviour language task
        verbose_name padding_strategy
        """,
        _WORD,
    )
    | _keys("_name_or_path name_or_path special_tokens_map_file transformers_version", _TEXT)
    | _keys(
        """
        added_tokens_decoder additional_special_tokens extra_special_tokens model_specific_special_tokens
        model_input_names chat_template language_codes never_split
        """,
        _FREE,
    )
    | {"tokenizer_class": _TOKENIZER_CLASS}
)
_IMAGE_PROCESSOR: _Rules = {
    "image_processor_type": _word(r"(CLIP|Siglip|Siglip2|ViT|Bit)\w*", "an image processor that transformers ships"),
    "feature_extractor_type": _word(r"(CLIP|Siglip|ViT)\w*", "a feature extractor that transformers ships"),
    "processor_class": _word(r"(CLIP|Siglip|Siglip2)\w*", "a processor that transformers ships"),
    "_valid_processor_keys": _FREE,
    **dict.fromkeys(("size", "crop_size", "image_mean", "image_std", "data_format", "patch_size"), _FREE),
}
_PROCESSOR: _Rules = _IMAGE_PROCESSOR | {"image_processor": _IMAGE_PROCESSOR}  # beside it, or in it, since version 5
_ARGUMENTS: _Rules = _ATTENTION | {
    "dtype": _DTYPE,
    "torch_dtype": _DTYPE,
    "padding_side": _WORD,
    "truncation_side": _WORD,
    "model_max_length": _NUMBER,
    "rope_scaling": _FREE,
}
_SENTENCE: _Rules = {
    "transformer_task": _among(["feature-extraction"]),
    "modality_config": {
        kind: {
            "method": _among(["forward", "get_text_features", "get_image_features"]),
            "method_output_name": _some(_WORD, 8),
            "format": _WORD,
        }
        for kind in ("text", "image")
    },
    "module_output_name": _WORD,
    "message_format": _WORD,
    "processing_kwargs": {"common": _ARGUMENTS, "text": _ARGUMENTS},
    **dict.fromkeys(
        ("model_args", "model_kwargs", "config_args", "config_kwargs", "tokenizer_args", "processor_kwargs"), _ARGUMENTS
    ),
}
_MODULE: _Rules = {
    "activation_function": _word(
        rf"torch\.nn\.modules\.(activation|linear)\.({'|'.join(_ACTIVATIONS.split())})",
        "an activation of torch.nn.modules",
    ),
    "pooling_mode": _some(_WORD, 8),
    "module_input_name": _WORD,
    "module_output_name": _WORD,
    "tokenizer_name": _TEXT,
    "embedding_dtype": _WORD,
}
_MODULE_LIST: _Rules = {
    "idx": _count(1 << 10),
    "name": _WORD,
    "path": _word(r"([\w-]+|\.|)", "a folder beside modules.json"),
    "type": _word(
        rf"sentence_transformers(\.[a-zA-Z_]+)*\.({'|'.join(MODULES)})",
        f"a module of sentence-transformers ({', '.join(MODULES)})",
    ),
    "kwargs": _some(_WORD, 8),
}
_SENTENCE_TRANSFORMERS: _Rules = {
    "__version__": _FREE,
    "prompts": _FREE,
    "default_prompt_name": _TEXT,
    "similarity_fn_name": _WORD,
    "model_type": _among(["SentenceTransformer"]),
    "truncate_dim": _NUMBER,
}
_STATIC: _Rules = {
    "model_type": _among(["model2vec"]),
    "architectures": _FREE,
    "tokenizer_name": _TEXT,
    "tokenizer_class": _WORD,
    "pooling": _WORD,
    "embedding_dtype": _WORD,
    "dtype": _WORD,
    "max_length": _NUMBER,
}
_TIMM_WEIGHTS: _Rules = (
    _keys("license description origin_url paper_name paper_ids notes label_descriptions", _FREE)
    | _keys("label_names labels url hf_hub_id hf_hub_filename tag architecture source", _FREE)
    | _keys("interpolation crop_mode test_crop_mode global_pool", _WORD)
    | {
        "first_conv": _some(_DOTTED, 16),
        "classifier": _some(_DOTTED, 16),
        "custom_load": _Kind("false", lambda value: value is False),
    }
)
_TIMM: _Rules = _TIMM_WEIGHTS | {
    "architecture": _word(r"\w+", "the name of a model that timm ships"),
    "pretrained_cfg": _TIMM_WEIGHTS,
    "model_args": {
        "global_pool": _WORD,
        "act_layer": _WORD,
        "norm_layer": _WORD,
        "pos_embed": _WORD,
        "weight_init": _WORD,
        "fix_init": _FLAG,
        **dict.fromkeys(("depth", "depths", "layers", "num_layers"), _some(_LAYERS, 16)),
    },
}
_LISTED: dict[str, _Rules | None] = {
    "tokenizer_config.json": _TOKENIZER,
    "special_tokens_map.json": None,
    "generation_config.json": None,
    "chat_template.json": None,
    "preprocessor_config.json": _PROCESSOR,
    "processor_config.json": _PROCESSOR,
    "video_preprocessor_config.json": _PROCESSOR,
    "config_sentence_transformers.json": _SENTENCE_TRANSFORMERS,
}
"""Files that transformers and sentence-transformers look for; where there are no rules, no key may lead to code."""


def read_settings(path: Path) -> Any:
    """Read a JSON file of a model folder.

    Raises:
        ModeclipError: It is missing, no JSON, or far larger than settings are.
    """
    again = "get the model again"
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ModeclipError(f"model folder {path.parent}: {path.name} has more than {MAX_BYTES >> 20} MB; {again}")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModeclipError(f"model folder {path.parent}: {path.name} is missing; {again}") from None
    except RecursionError:
        raise ModeclipError(f"model folder {path.parent}: {path.name} is nested too deeply; {again}") from None
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModeclipError(f"model folder {path.parent}: {path.name} is no JSON ({reason}); {again}") from None


def check_clip_settings(content: Any, where: str) -> dict[str, Any]:
    """Return the content of an ``open_clip_config.json`` if it says nothing but what open_clip needs.

    Args:
        content: What the file holds.
        where: Its path, for messages.

    Raises:
        ModeclipError: A key is not in the list, a value is of another kind, or one that every model has is missing.
    """
    _refuse_code(content, where)
    _check(content, _CLIP, where)
    for name, keys in (("", ("model_cfg",)), ("model_cfg", ("embed_dim", "vision_cfg", "text_cfg"))):
        section = content[name] if name else content
        if missing := [key for key in keys if not isinstance(section.get(key), dict | int)]:
            raise ModeclipError(f"{where}: {missing[0]} is missing; expected settings as open_clip saves them")
    if "moe" in content:
        _check_experts(content["moe"], where)
    settings: dict[str, Any] = content
    return settings


def _check_experts(moe: Any, where: str) -> None:
    """Check that both numbers of a CLIP-MoE are there, and that it has as many experts as a token takes."""
    for key in ("num_experts", "top_k"):
        if not isinstance(moe, dict) or moe.get(key) is None:
            raise ModeclipError(f"{where}: moe: {key} is missing; expected num_experts and top_k")
    if moe["top_k"] > moe["num_experts"]:
        raise ModeclipError(
            f"{where}: moe: top_k: expected 1 to {moe['num_experts']} (num_experts), got {moe['top_k']}"
        )


def check_clip_folder(folder: Path) -> dict[str, Any]:
    """Return the settings of an open_clip folder, after a check of all files that open_clip would read.

    Raises:
        ModeclipError: A file is missing, damaged or leaves the folder, or says what `check_clip_settings` refuses.
    """
    check_links(folder)
    content = check_clip_settings(read_settings(folder / CLIP_CONFIG), str(folder / CLIP_CONFIG))
    check_tokenizer_folder(folder)
    return content


def check_tokenizer_folder(folder: Path) -> None:
    """Check the files that transformers reads to make a tokenizer.

    Raises:
        ModeclipError: They name code, a class that is not in the list, or a file outside of the folder.
    """
    _check_listed(folder)
    if (path := folder / "config.json").is_file():  # of a model of any kind; only its tokenizer's class matters here
        content = read_settings(path)
        _refuse_code(content, str(path))
        if isinstance(content, dict):
            _check({key: content.get(key) for key in ("tokenizer_class",)}, _MODEL, str(path))


def check_transformer_folder(folder: Path) -> None:
    """Check the files that transformers reads to make a model and its tokenizer.

    Raises:
        ModeclipError: They name code, a class that is not in the list, or a file outside of the folder.
    """
    check_links(folder)
    _check_listed(folder)
    _check_model(folder / "config.json")


def check_sentence_folder(folder: Path) -> None:
    """Check all files of a sentence-transformers folder.

    Raises:
        ModeclipError: They name code, a module or class that is not in the list, or a file outside of the folder.
    """
    check_links(folder)
    _check_listed(folder)
    path = folder / "modules.json"
    modules = read_settings(path)
    if not isinstance(modules, list) or not modules:
        raise ModeclipError(f"{path}: expected a list of modules; get the model again")
    for module in modules:
        _refuse_code(module, str(path))
        _check(module, _MODULE_LIST, str(path))
        if not isinstance(module.get("type"), str):
            raise ModeclipError(f"{path}: a module has no type; get the model again")
        part = folder / (module.get("path") or ".")
        if module["type"].endswith((".Transformer", ".CLIPModel")):
            _check_listed(part)
            if (part / "config.json").is_file():
                _check_model(part / "config.json")
        elif module["type"].endswith(".StaticEmbedding"):
            if (part / "config.json").is_file():
                _check_file(part / "config.json", _STATIC | _MODEL | {"model_type": _WORD})
        elif (part / "config.json").is_file():
            _check_file(part / "config.json", _MODULE)


def check_static_folder(folder: Path) -> None:
    """Check the files of a model2vec folder; errors as for the others."""
    check_links(folder)
    if (folder / "config.json").is_file():
        _check_file(folder / "config.json", _STATIC | _MODEL | {"model_type": _WORD})
    _check_listed(folder)


def check_timm_folder(folder: Path) -> None:
    """Check the settings of a timm folder; errors as for the others."""
    check_links(folder)
    _check_file(folder / "config.json", _TIMM)


def check_links(folder: Path) -> None:
    """Raise if a file in a folder is a link to a place outside of it.

    In a download cache of the Hub, where every file is a link to a file beside the snapshots, the folder of the
    repository counts.

    Raises:
        ModeclipError: One is.
    """
    inside = next((p.parents[1] for p in (folder, *folder.parents) if _is_snapshot(p)), folder).resolve()
    for path in folder.rglob("*"):
        try:
            leaves = path.is_symlink() and not path.resolve().is_relative_to(inside)
        except (OSError, RuntimeError):
            raise ModeclipError(
                f"model folder {folder}: {path.relative_to(folder)} is a link to itself; get the model again"
            ) from None
        if leaves:
            raise ModeclipError(
                f"model folder {folder}: {path.relative_to(folder)} is a link to {path.resolve()}, outside of the "
                "folder, and is not followed; copy the file into the folder"
            )


def _is_snapshot(folder: Path) -> bool:
    """Whether a folder is a revision in a download cache of the Hub."""
    return folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")


def _check_listed(folder: Path) -> None:
    """Check the settings in a folder that transformers or sentence-transformers read by their name."""
    if (folder / "adapter_config.json").exists():
        raise ModeclipError(
            f"model folder {folder}: adapter_config.json makes the model of another one, which is not followed; merge "
            "the adapter into the model and save that"
        )
    for name, rules in _LISTED.items():
        if (folder / name).is_file():
            _check_file(folder / name, rules)
    for path in folder.glob("sentence_*_config.json"):
        _check_file(path, _SENTENCE)
    for path in folder.glob("*.index.json"):
        content = read_settings(path)
        files = content.get("weight_map", {}) if isinstance(content, dict) else {}
        names = files.values() if isinstance(files, dict) else ["/"]
        if bad := [name for name in names if not isinstance(name, str) or Path(name).name != name or name == ".."]:
            raise ModeclipError(f"{path}: names {bad[0]!r}, which is no file of the folder; get the model again")


def _check_model(path: Path) -> None:
    """Check the ``config.json`` of a model of transformers; that of a CLIP has one for each tower in it."""
    _check_file(path, _MODEL | {"text_config": _FREE, "vision_config": _FREE})
    content = read_settings(path)
    if not content.get("model_type"):
        raise ModeclipError(f"{path}: model_type is missing; expected one of {', '.join(sorted(MODEL_TYPES))}")
    for name in ("text_config", "vision_config"):
        if content.get(name) is not None:
            _check(content[name], _MODEL, f"{path}: {name}", numbers=True)


def _check_file(path: Path, rules: _Rules | None) -> None:
    content = read_settings(path)
    _refuse_code(content, str(path))
    if rules is not None:
        _check(content, rules, str(path), numbers=True)


def _refuse_code(content: Any, where: str) -> None:
    """Raise if a key of `CODE_KEYS` stands anywhere in a content."""
    left = [content]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            if found := CODE_KEYS.intersection(value):
                key = sorted(found)[0]
                if not (key == "trust_remote_code" and value[key] is False) and value[key] is not None:
                    raise ModeclipError(
                        f"{where}: {key} would run code or open files that come with the model, and is never followed; "
                        "use a model whose classes open_clip and transformers have themselves"
                    )
            left += value.values()
        elif isinstance(value, list):
            left += value


def _check(content: Any, rules: _Rules, where: str, *, numbers: bool = False) -> None:
    """Check that a content has known keys and values of their kinds.

    Args:
        content: What a file or a part of it holds.
        rules: Kind of each key's value, or the rules of the object under it.
        where: File and part, for messages.
        numbers: Let any other key hold numbers, flags and lists of them.

    Raises:
        ModeclipError: It is no object, or the first key that does not fit.
    """
    if not isinstance(content, dict):
        raise ModeclipError(f"{where}: expected an object of settings, got {_short(content)}; get the model again")
    for key, value in content.items():
        rule = rules.get(key, _PLAIN if numbers else None)
        if rule is None:
            raise unknown(f"setting in {where}:", key[:60], sorted(rules), "the settings of open_clip's own models")
        if value is None:
            continue
        if isinstance(rule, dict):
            _check(value, rule, f"{where}: {key}", numbers=numbers)
        elif not rule.fits(value):
            known = "" if key in rules else " (it is no known setting, and only those may hold words)"
            raise ModeclipError(f"{where}: {_short(key)}: expected {rule.expected}, got {_short(value)}{known}")


def _short(value: Any) -> str:
    words = repr(value)
    return words if len(words) <= 60 else f"{words[:57]}..."
