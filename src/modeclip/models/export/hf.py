"""A CLIP of open_clip as a ``CLIPModel`` of Hugging Face's transformers with its processor, and back.

Both libraries hold the same computation under other names, so a conversion renames tensors: the products of queries,
keys and values are one matrix in open_clip and three in transformers, and two projections are transposed. What has no
place on the other side is an error. ``CLIPModel`` knows one architecture: a Vision Transformer with a class token, and
a causal text transformer that is read at the end-of-text token. ResNets, towers of timm or transformers, SigLIP's bias,
pooling by attention and CLIP-MoE's experts are something else.

A model is written, read again by transformers and compared on fixed pictures and texts: features to 1e-5, token ids
exactly, pixels to a grey level. Transformers resizes with torchvision, which rounds a few pixels the other way than
Pillow does, and cuts an odd margin one pixel further to the left; so a picture that has to be resized or cropped may
differ by that, in any CLIP that was ever converted.

Price: the weights are in memory twice. A folder is opened only after `modeclip.models.settings` has seen its settings.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modeclip.errors import ModeclipError
from modeclip.models.checkpoints import write_tensors
from modeclip.models.clip import CONFIG_FILE, Clip, load_clip, without_gradients
from modeclip.models.deltas import WEIGHTS_FILE
from modeclip.models.settings import check_transformer_folder, read_settings
from modeclip.system.files import write_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

TOLERANCE = 1e-5
"""Largest difference between features of unit norm, of this model and its conversion."""
GREY_LEVEL = 1 / 255 / 0.22
"""Largest difference between pixels: one grey level, divided by the least standard deviation that is in use."""
PARITY_TEXTS = (
    "A red Heart",
    "!",
    "it's 12 o'clock, café",
    "an arrow that points to the left, " * 20,
    "",
    "x",
    "a dog",
)
LEGACY_END = 2
"""The ``eos_token_id`` that transformers takes for "the largest token id", as its first CLIPs had it."""
_START_AND_END = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
_INTERPOLATIONS = {"bicubic": 3, "bilinear": 2}
_ACTIVATIONS = {"quick_gelu": "QuickGELU", "gelu": "none", "gelu_pytorch_tanh": "tanh", "gelu_new": "tanh"}
"""Activations of transformers: open_clip's class, or the ``approximate`` of PyTorch's GELU."""

_NORMS = {
    "ln_final": "text_model.final_layer_norm",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
}
_NAMES = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "text_projection": "text_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.proj": "visual_projection.weight",
} | {f"{own}.{kind}": f"{norm}.{kind}" for own, norm in _NORMS.items() for kind in ("weight", "bias")}
"""Names outside of blocks in open_clip, without the text tower's prefix, and in transformers."""
_TRANSPOSED = ("visual.proj", "text_projection")
"""Matrices that open_clip multiplies from the right."""
_BLOCKS = {
    "visual.transformer.resblocks": "vision_model.encoder.layers",
    "transformer.resblocks": "text_model.encoder.layers",
}
_PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
"""Parts of a block in open_clip and in transformers."""


def save_hf(clip: Clip, folder: Path) -> dict[str, Any]:
    """Write a CLIP as a folder that ``CLIPModel`` and ``CLIPProcessor`` of transformers load, and compare the two.

    Args:
        clip: The model.
        folder: Where it goes; it must exist.

    Returns:
        What was compared (`compare`).

    Raises:
        ModeclipError: ``CLIPModel`` cannot express the model, or computes something else.
    """
    library = _transformers()
    tower = _check_towers(clip)
    settings = _settings_of(clip, tower)
    state = _to_transformers(clip.model.state_dict(), "text." if tower is not clip.model else "")
    with _quiet():
        model = library.CLIPModel(library.CLIPConfig(**settings))
        _load(model, state, "CLIPModel has no such part")
        model.save_pretrained(folder)
        processor_of(clip).save_pretrained(folder)
        found = library.CLIPModel.from_pretrained(folder)
        processor = library.CLIPProcessor.from_pretrained(folder)
    return compare(clip, found, processor)


def load_hf(folder: Path) -> tuple[Clip, dict[str, Any]]:
    """Make an open_clip model of a folder that transformers saved as ``CLIPModel``.

    Args:
        folder: With ``config.json``, weights, and the files of the processor.

    Returns:
        The model, and what was compared (`compare`).

    Raises:
        ModeclipError: The folder holds something else, its settings are refused, or open_clip cannot express them.
    """
    library = _transformers()
    check_transformer_folder(folder)
    try:
        with _quiet():
            model = library.CLIPModel.from_pretrained(folder, local_files_only=True, dtype="float32")
            processor = library.CLIPProcessor.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # damaged files alone raise nearly anything
        raise ModeclipError(f"model folder {folder}: transformers cannot load it: {_first(error)}") from None
    tokenizer, config = processor.tokenizer, _clip_config(model.config, processor, folder)
    with tempfile.TemporaryDirectory(prefix="modeclip-hf-") as room:
        write_tensors(Path(room) / WEIGHTS_FILE, _from_transformers(model.state_dict()))
        write_json(Path(room) / CONFIG_FILE, config)
        clip = load_clip(room)
        if _token_ids(clip.tokens(PARITY_TEXTS), model.config.text_config.eos_token_id) != _own_ids(processor):
            with _quiet():
                tokenizer.save_pretrained(room)
            config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = Path(folder).name
            write_json(Path(room) / CONFIG_FILE, config)
            clip = load_clip(room)
    return clip, compare(clip, model, processor)


def is_hf(folder: Path) -> bool:
    """Whether a folder is a ``CLIPModel`` of transformers and not a model of open_clip."""
    if (folder / CONFIG_FILE).is_file() or not (folder / "config.json").is_file():
        return False
    with suppress(ModeclipError):
        content = read_settings(folder / "config.json")
        return isinstance(content, dict) and content.get("model_type") == "clip"
    return False


def compare(clip: Clip, model: Any, processor: Any) -> dict[str, Any]:
    """Compare a CLIP of open_clip with a ``CLIPModel``: pixels, token ids, and the features of both towers.

    Returns:
        Largest difference and least cosine of each tower, the largest difference of pixels, and the tolerances.

    Raises:
        ModeclipError: They differ by more than rounding.
    """
    import torch
    import torch.nn.functional as F  # noqa: N812
    from PIL import Image

    draw, (width, height) = np.random.default_rng(0), clip.image_size
    sizes = [(height, width), (height * 2, width * 2), (height + height // 4 * 2, width), (height, width)]
    pictures = [Image.fromarray(draw.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
    pixels, tokens = clip.images(pictures), clip.tokens(PARITY_TEXTS)
    with without_gradients(), _quiet():
        clip.model.eval()
        model.eval()
        seen = processor(images=pictures, return_tensors="pt")["pixel_values"]
        ours = {
            "image": clip.model.encode_image(pixels, normalize=True),
            "text": clip.model.encode_text(tokens, normalize=True),
        }
        theirs = {
            "image": F.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1),
            "text": F.normalize(model.get_text_features(input_ids=tokens).pooler_output, dim=-1),
        }
    parity: dict[str, Any] = {
        "preprocess": {"max_abs": float((seen - pixels).abs().max()) if seen.shape == pixels.shape else np.inf},
        "token_ids_equal": _token_ids(tokens, model.config.text_config.eos_token_id) == _own_ids(processor),
    }
    for tower, features in ours.items():
        parity[tower] = {
            "max_abs": float((features - theirs[tower]).abs().max()),
            "min_cosine": float(torch.cosine_similarity(features, theirs[tower]).min()),
        }
    parity |= {"tolerance": TOLERANCE, "preprocess_tolerance": GREY_LEVEL}
    wrong = [f"{part} by {parity[part]['max_abs']:.2g}" for part in ours if not parity[part]["max_abs"] <= TOLERANCE]
    wrong += [] if parity["preprocess"]["max_abs"] <= GREY_LEVEL else ["pixels"]
    wrong += [] if parity["token_ids_equal"] else ["token ids"]
    if wrong:
        raise ModeclipError(
            f"export: CLIPModel and open_clip compute different things of this model ({', '.join(wrong)}; tolerance "
            f"{TOLERANCE:g}); export it to onnx instead"
        )
    return parity


def processor_of(clip: Clip) -> Any:
    """Return the processor of transformers that prepares pictures and texts as a CLIP does.

    Raises:
        ModeclipError: It has no such way to resize.
    """
    library = _transformers()
    settings = clip.model.visual.preprocess_cfg | clip.config.get("preprocess_cfg", {})
    mode, interpolation = settings.get("resize_mode") or "shortest", settings.get("interpolation") or "bicubic"
    width, height = clip.image_size
    if mode == "longest" or interpolation not in _INTERPOLATIONS or (mode == "shortest" and width != height):
        raise ModeclipError(
            f"export: transformers' processor of CLIP has no way to resize a picture to {width} x {height} with "
            f"resize_mode {mode} and interpolation {interpolation}; prepare pictures with open_clip"
        )
    whole = {"height": height, "width": width}
    images = library.CLIPImageProcessor(
        size={"shortest_edge": height} if mode == "shortest" else whole,
        crop_size=whole,
        do_center_crop=mode == "shortest",
        resample=_INTERPOLATIONS[interpolation],
        image_mean=list(clip.model.visual.image_mean),
        image_std=list(clip.model.visual.image_std),
    )
    own = clip.tokenizer
    if hasattr(own, "bpe_ranks"):  # open_clip's own
        vocabulary = {_START_AND_END.get(word, word): number for word, number in own.encoder.items()}
        merges = list(own.bpe_ranks)
        tokenizer = library.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=own.context_length)
    else:
        tokenizer = own.tokenizer
        tokenizer.model_max_length = own.context_length
    return library.CLIPProcessor(image_processor=images, tokenizer=tokenizer)


def _check_towers(clip: Clip) -> Any:
    """Return the module that holds the text tower, if ``CLIPModel`` can express both towers."""
    model, visual = clip.model, clip.model.visual
    text = getattr(model, "text", model)

    def refuse(what: str) -> ModeclipError:
        return ModeclipError(f"export: {what}, which CLIPModel of transformers cannot express; export it to onnx")

    if "moe" in clip.config:
        raise refuse("a CLIP-MoE has several feed-forward layers in a block")
    if not hasattr(visual, "conv1") or not hasattr(getattr(visual, "transformer", None), "resblocks"):
        kind = "timm" if hasattr(visual, "trunk") else type(visual).__name__
        raise refuse(f"the image tower is {kind}, no Vision Transformer of open_clip")
    if not hasattr(text, "token_embedding"):
        raise refuse(f"the text tower is {type(text).__name__}, not open_clip's own")
    if getattr(model, "logit_bias", None) is not None:
        raise refuse("the logits have a bias (SigLIP)")
    if visual.attn_pool is not None or visual.pool_type != "tok":
        raise refuse("the image tower is not read at its class token")
    if text.attn_mask is None or getattr(text, "cls_emb", None) is not None:
        raise refuse("the text tower is not causal, or has a class token")
    if _pool_of(text) not in ("argmax", "eos"):
        raise refuse(f"the text tower is read by {_pool_of(text)!r}, not at the end of the text")
    if clip.image_size[0] != clip.image_size[1]:
        raise refuse(f"pictures have {clip.image_size[0]} x {clip.image_size[1]} pixels")
    return text


def _pool_of(text: Any) -> str:
    return str(getattr(text, "pool_type", None) or text.text_pool_type)


def _settings_of(clip: Clip, text: Any) -> dict[str, Any]:
    """Return the words of a ``CLIPConfig`` for a model of open_clip, read from its modules."""
    visual, end = clip.model.visual, int(clip.tokens([""]).max())
    patch, size = visual.conv1.kernel_size, clip.image_size
    if patch[0] != patch[1] or size[0] % patch[0]:
        raise ModeclipError(f"export: CLIPModel has square patches that fill the picture, got {patch} of {size}")
    if _pool_of(text) == "eos":
        end = int(getattr(text, "eos_id", None) or text.text_eos_id)
        if end == LEGACY_END:
            raise ModeclipError(
                "export: the end of a text has the id 2, which CLIPModel takes for the largest id; export it to onnx"
            )
    elif end != text.vocab_size - 1:
        end = LEGACY_END
    start = int(clip.tokens([""])[0, 0])
    projection = text.text_projection
    embed_dim = visual.proj.shape[1] if visual.proj is not None else 0
    shape = None if projection is None else getattr(projection, "weight", projection).shape
    if not embed_dim or shape is None:
        raise ModeclipError("export: CLIPModel has a projection behind each tower, this model has not; use onnx")
    return {
        "projection_dim": embed_dim,
        "vision_config": _tower_settings(visual.transformer, visual.ln_post.eps)
        | {"image_size": size[0], "patch_size": patch[0], "projection_dim": embed_dim},
        "text_config": _tower_settings(text.transformer, text.ln_final.eps)
        | {
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.positional_embedding.shape[0],
            "projection_dim": embed_dim,
            "bos_token_id": start,
            "eos_token_id": end,
            "pad_token_id": 0,
        },
    }


def _tower_settings(transformer: Any, eps: float) -> dict[str, Any]:
    block = transformer.resblocks[0]
    activation = getattr(block.mlp, "gelu", None)
    kind = str(getattr(activation, "approximate", type(activation).__name__))
    names = [name for name, own in _ACTIVATIONS.items() if own == kind]
    heads = getattr(block.attn, "num_heads", 0)
    if not names or not heads:
        raise ModeclipError(
            f"export: a block with {type(block.attn).__name__} and {kind} is none that CLIPModel has; export it to onnx"
        )
    return {
        "hidden_size": block.ln_1.normalized_shape[0],
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": len(transformer.resblocks),
        "num_attention_heads": heads,
        "hidden_act": names[0],
        "layer_norm_eps": eps,
    }


def _to_transformers(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Rename the tensors of open_clip; ``prefix`` is what stands before those of the text tower."""
    found: dict[str, Tensor] = {}
    for whole, value in state.items():
        name = whole.removeprefix(prefix)
        block = re.fullmatch(r"(.*resblocks)\.(\d+)\.(.+)[._](weight|bias)", name)
        if name in _NAMES:
            value = value.reshape(()) if name == "logit_scale" else value
            found[_NAMES[name]] = value.t().contiguous() if name in _TRANSPOSED else value
        elif name == "text_projection.weight":  # a layer, in a text tower that is a module of its own
            found[name] = value
        elif block and block[1] in _BLOCKS and block[3] in _PARTS:
            found[f"{_BLOCKS[block[1]]}.{block[2]}.{_PARTS[block[3]]}.{block[4]}"] = value
        elif block and block[1] in _BLOCKS and block[3] == "attn.in_proj":
            for letter, third in zip("qkv", value.chunk(3), strict=True):
                found[f"{_BLOCKS[block[1]]}.{block[2]}.self_attn.{letter}_proj.{block[4]}"] = third.clone()
        else:
            raise ModeclipError(f"export: CLIPModel has no place for {whole}; export the model to onnx instead")
    return found


def _from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name the tensors of a ``CLIPModel`` as open_clip does."""
    import torch

    own_names = {new: old for old, new in _NAMES.items()}
    own_parts = {new: old for old, new in _PARTS.items()}
    own_blocks = {new: old for old, new in _BLOCKS.items()}
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        layer = re.fullmatch(r"(.*layers)\.(\d+)\.(.+)\.(weight|bias)", name)
        if name in own_names:
            own = own_names[name]
            found[own] = value.t().contiguous() if own in _TRANSPOSED else value
        elif layer and layer[3] in own_parts:
            found[f"{own_blocks[layer[1]]}.{layer[2]}.{own_parts[layer[3]]}.{layer[4]}"] = value
        elif layer and layer[3] == "self_attn.q_proj":
            thirds = [state[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            found[f"{own_blocks[layer[1]]}.{layer[2]}.attn.in_proj_{layer[4]}"] = torch.cat(thirds)
    return found


def _clip_config(config: Any, processor: Any, folder: Path) -> dict[str, Any]:
    """Return the content of an ``open_clip_config.json`` for a ``CLIPModel`` and its processor."""
    text, vision, images = config.text_config, config.vision_config, processor.image_processor

    def refuse(what: str) -> ModeclipError:
        return ModeclipError(f"model folder {folder}: {what}, which open_clip's CLIP cannot express")

    for tower, part in (("image", vision), ("text", text)):
        if part.hidden_act not in _ACTIVATIONS:
            raise refuse(f"the {tower} tower has the activation {part.hidden_act}")
    quick = [part.hidden_act == "quick_gelu" for part in (vision, text)]
    if quick[0] != quick[1]:
        raise refuse("one tower has quick_gelu and the other has not")
    if isinstance(text.eos_token_id, list):
        raise refuse("a text has several ends")
    size, crop = dict(images.size), dict(images.crop_size or {})
    edge = vision.image_size
    squash = {"height": edge, "width": edge}
    if size == {"shortest_edge": edge} and crop in (squash, {}):
        mode = "shortest"
    elif size == squash and (not images.do_center_crop or crop == squash):
        mode = "squash"
    else:
        raise refuse(f"pictures are resized to {size} and cut to {crop} for a tower of {edge} x {edge}")
    interpolation = {number: word for word, number in _INTERPOLATIONS.items()}.get(int(images.resample))
    if interpolation is None:
        raise refuse(f"pictures are resized by Pillow's method {int(images.resample)}")
    at_end: dict[str, Any] = {}
    if text.eos_token_id not in (LEGACY_END, text.vocab_size - 1):
        at_end = {"pool_type": "eos", "eos_id": text.eos_token_id}
    return {
        "model_cfg": {
            "embed_dim": config.projection_dim,
            "quick_gelu": quick[0],
            "vision_cfg": {
                "image_size": edge,
                "patch_size": vision.patch_size,
                "head_width": vision.hidden_size // vision.num_attention_heads,
                **_block_settings(vision),
            },
            "text_cfg": {
                "context_length": text.max_position_embeddings,
                "vocab_size": text.vocab_size,
                "heads": text.num_attention_heads,
                **_block_settings(text),
                **at_end,
            },
        },
        "preprocess_cfg": {
            "mean": list(images.image_mean),
            "std": list(images.image_std),
            "interpolation": interpolation,
            "resize_mode": mode,
        },
    }


def _block_settings(part: Any) -> dict[str, Any]:
    found = {
        "width": part.hidden_size,
        "layers": part.num_hidden_layers,
        "mlp_ratio": part.intermediate_size / part.hidden_size,
    }
    if _ACTIVATIONS[part.hidden_act] == "tanh":
        found["act_kwargs"] = {"approximate": "tanh"}
    if part.layer_norm_eps != 1e-5:
        found["norm_kwargs"] = {"eps": part.layer_norm_eps}
    return found


def _load(model: nn.Module, state: Mapping[str, Tensor], problem: str) -> None:
    missing, unexpected = model.load_state_dict(state, strict=False)
    if names := [*missing, *unexpected]:
        raise ModeclipError(f"export: {names[0]}: {problem}; export the model to onnx instead")


def _own_ids(processor: Any) -> list[list[int]]:
    """Return the ids of the fixed texts by transformers, up to the end of each."""
    with _quiet():
        found = processor(text=list(PARITY_TEXTS), padding=True, truncation=True, return_tensors="pt")["input_ids"]
    return _token_ids(found, processor.tokenizer.eos_token_id)


def _token_ids(tokens: Tensor, end: int) -> list[list[int]]:
    """Return token ids of texts up to the first end of each."""
    last = end if end != LEGACY_END else int(tokens.max())
    rows: Sequence[list[int]] = tokens.tolist()
    return [row[: row.index(last) + 1] if last in row else row for row in rows]


def _transformers() -> Any:
    """Import transformers, whose types are in parts only."""
    return import_module("transformers")


def _first(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers while a model is built; what fails is raised."""
    logging = _transformers().utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
