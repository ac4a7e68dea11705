"""Load, save and run a CLIP with its tokenizer and preprocessing; the only file that knows open_clip.

A model is named as open_clip users name it: ``ViT-B-32`` (random weights), ``ViT-B-32@laion2b_s34b_b79k`` (a pretrained
tag or a checkpoint file), ``hf-hub:org/name``, ``local-dir:/path`` or just the path of such a folder. What is saved is
such a folder (``open_clip_config.json`` + ``open_clip_model.safetensors``), which open_clip loads without modeclip. Two
kinds of folders take modeclip to load: that of an expert in a bundle which holds only what differs from its seed
(`modeclip.models.deltas`), and that of a CLIP-MoE (`modeclip.models.moe`), with ``moe`` in its settings.

A folder or a Hub repository is opened only after `modeclip.models.settings` has seen every file that a library would
follow; nothing in it runs as code. Weights are safetensors, or files of PyTorch that are read with
``weights_only=True``. What names no weights is refused, unless a seed for random ones is given.

Captions are cut to the longest of their batch before the text tower sees them. In a causal tower no position sees a
later one, and the features are read at the end-of-text token, so the padding behind it changes nothing: the result is
the same to rounding, for a fraction of the work (icon names use 4 to 12 of 77 positions).

Source: OpenCLIP (arXiv 2212.07143) for the conventions; model folders as open_clip 3 reads them.
"""

from __future__ import annotations

import json
import logging
import math
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from modeclip.errors import ModeclipError, unknown
from modeclip.models.checkpoints import numbers_allowed, write_tensors
from modeclip.models.deltas import DELTA_FILE, WEIGHTS_FILE, check_delta, is_delta, open_weights, seed_of, weights_file
from modeclip.models.settings import (
    CLIP_CONFIG,
    HUB_ID,
    check_clip_folder,
    check_links,
    check_tokenizer_folder,
    check_transformer_folder,
)
from modeclip.models.trunk import encode
from modeclip.system.devices import choose_precision
from modeclip.system.files import read_json, write_json
from modeclip.system.importing import without_loading
from modeclip.system.paths import expand_homes

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

CONFIG_FILE = CLIP_CONFIG
WEIGHTS_SUFFIXES = (".safetensors", ".bin", ".pth")  # of the files that open_clip takes from a model folder
PREFERRED_WEIGHTS = (
    WEIGHTS_FILE,
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)
"""Files that open_clip takes before any other, in its order (``open_clip.factory``)."""
PARITY_FILE = "parity.json"
PARITY_TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 4e-3}
"""Largest difference between features of unit norm that counts as rounding, by the type of the weights in memory."""
PRECISIONS = {"32-true": None, "bf16-mixed": "bfloat16", "16-mixed": "float16"}
"""Precisions that a model can run in, and the type that its products are then computed in."""
_OWN_CONFIGS = Path(__file__).parent / "configs"
_PARITY_TEXTS = ("A red Heart", "!", "an arrow that points to the left, " * 20)


@dataclass(frozen=True, kw_only=True)
class LogitStart:
    """Scale and bias that the logits start with in a model that has no bias yet."""

    log_scale: float
    """Natural logarithm of the scale."""
    bias: float
    """Number that is added to every logit."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A CLIP model with everything that it takes to run or save it."""

    model: Any
    """The open_clip model, an ``nn.Module`` (open_clip declares no types)."""
    config: dict[str, Any]
    """Content of its ``open_clip_config.json``: ``model_cfg`` and ``preprocess_cfg``, and ``moe`` of a CLIP-MoE."""
    tokenizer: Any
    """Callable: list of texts -> (B, context_length) int64 token ids."""
    preprocess: Any
    """Callable: PIL image -> (3, H, W) float32, open_clip's transform for inference."""

    @property
    def image_size(self) -> tuple[int, int]:
        """Width and height that the image tower takes, in pixels."""
        size = self.model.visual.image_size
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        return int(width), int(height)

    def images(self, pictures: Sequence[Image]) -> Tensor:
        """Turn pictures into a (B, 3, H, W) float32 batch, equal to ``preprocess`` on each of them.

        Pictures that already have the model's size need no resizing and no crop. They are normalised as one batch,
        which is several times as fast for small pictures.
        """
        import torch

        if any(picture.size != self.image_size or picture.mode != "RGB" for picture in pictures):
            return torch.stack([self.preprocess(picture) for picture in pictures])
        pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
        batch = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        mean = torch.tensor(self.model.visual.image_mean).view(1, 3, 1, 1)
        std = torch.tensor(self.model.visual.image_std).view(1, 3, 1, 1)
        return batch.sub_(mean).div_(std)

    def cut(self, picture: Image) -> Image:
        """Bring a picture to the model's size in RGB, as ``preprocess`` does before it makes numbers of it.

        ``images`` of many such pictures costs a fraction of ``preprocess`` on each of them.
        """
        for step in self.preprocess.transforms[:-2]:  # open_clip ends with ToTensor and Normalize
            picture = step(picture)
        return picture

    def without_weights(self) -> Clip:
        """Return what prepares pictures and texts, for whoever keeps it while the weights may be freed."""
        visual = self.model.visual
        about = {"image_size": visual.image_size, "image_mean": visual.image_mean, "image_std": visual.image_std}
        return replace(self, model=SimpleNamespace(visual=SimpleNamespace(**about)))

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Turn texts into (B, context_length) int64 token ids."""
        tokens: Tensor = self.tokenizer(list(texts))
        return tokens

    def pieces(self, tokens: Tensor) -> list[list[str]]:
        """Return the text of each token of (B, context_length) ids, row by row, without the padding behind it.

        Tokens that stand for no text, such as start and end, are empty.
        """
        words = getattr(self.tokenizer, "tokenizer", self.tokenizer)  # open_clip's own, or one of transformers
        padding, special = getattr(words, "pad_token_id", None) or 0, set(words.all_special_ids)
        found = []
        for row in tokens.tolist():
            length = max((place for place, token in enumerate(row, 1) if token != padding), default=1)
            found.append(["" if token in special else words.decode([token]).strip() for token in row[:length]])
        return found


def load_clip(
    spec: str | Path, *, seed: int | None = None, patch_dropout: float = 0.0, logit_start: LogitStart | None = None
) -> Clip:
    """Build a CLIP on the CPU from a model specification (see the top of this file).

    Args:
        spec: Name, ``name@tag``, ``name@file``, ``hf-hub:``, ``local-dir:`` or the path of a model folder.
        seed: Seed of the random weights, where the specification names no others; None: such a specification is
            refused.
        patch_dropout: Share of the patches that the image tower leaves out in training, in [0, 1).
        logit_start: Gives the model a bias beside its scale; where it has none yet, both start with these values.

    Raises:
        ModeclipError: The name or tag is unknown, the folder is no model or its settings are refused, it has no
            weights, they need another activation than the name gives them, or the image tower has no patches to leave
            out.
    """
    import torch

    open_clip = _import_open_clip()
    check_model(str(spec), random_weights=seed is not None)
    name, tag = _resolve(str(spec))
    if is_delta(Path(name.removeprefix("local-dir:"))):
        return _load_delta(Path(name.removeprefix("local-dir:")), patch_dropout, logit_start)
    if tag and not Path(tag).is_file():
        _check_tag(name, tag)
    start = _start_words(logit_start)
    with _quiet(), _loading(str(spec)), torch.random.fork_rng(devices=[]), numbers_allowed():
        place = _fetch(name)
        tower = _text_tower(place, weights=not tag and not place.startswith("local-dir:"))
        moe = _moe_of(place)
        torch.manual_seed(seed or 0)
        model, _, preprocess = open_clip.create_model_and_transforms(
            place,
            pretrained=tag,
            force_patch_dropout=patch_dropout,
            load_weights=moe is None,
            weights_only=True,
            **tower,
            **start,
        )
        if moe:
            _load_experts(model, moe, Path(place.removeprefix("local-dir:")))
        tokenizer = _load_tokenizer(name, place)
    _check_vocabulary(str(spec), model, tokenizer)
    if patch_dropout and not any("PatchDropout" in type(module).__name__ for module in model.visual.modules()):
        raise ModeclipError(f"model {spec}: its image tower has no patches; set train.augment.patch_dropout to 0")
    config = _config_of(place, model)
    if start:
        config["model_cfg"] |= start
        if not model.logit_bias.any():  # open_clip's stand-in where weights carry none
            with without_gradients():
                model.logit_scale.fill_(start["init_logit_scale"])
                model.logit_bias.fill_(start["init_logit_bias"])
    return Clip(model=model, config=config, tokenizer=tokenizer, preprocess=preprocess)


def model_shapes(spec: str, *, logit_start: LogitStart | None = None) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor in a model's state, without making or loading its weights.

    Raises:
        ModeclipError: As for ``load_clip``.
    """
    state = hollow_model(spec, logit_start=logit_start).state_dict()
    return {key: tuple(value.shape) for key, value in state.items()}


def hollow_model(spec: str, *, logit_start: LogitStart | None = None) -> Any:
    """Return a model whose tensors have shapes and no numbers, for questions about its parts.

    Raises:
        ModeclipError: As for ``load_clip``.
    """
    import torch

    open_clip = _import_open_clip()
    check_model(spec)
    name, tag = _resolve(spec)
    if is_delta(Path(name.removeprefix("local-dir:"))):
        return hollow_model(str(seed_of(Path(name.removeprefix("local-dir:")))), logit_start=logit_start)
    if tag and not Path(tag).is_file():
        _check_tag(name, tag)
    start = _start_words(logit_start)
    with _quiet(), _loading(spec):
        place = _fetch(name)
        tower = _text_tower(place, weights=False)
        with torch.device("meta"):
            model = open_clip.create_model(
                place, load_weights=False, device="meta", pretrained_text=False, **tower, **start
            )
            if moe := _moe_of(place):
                _with_experts(model, moe)
    return model


def _start_words(start: LogitStart | None) -> dict[str, float]:
    """Return where logits start in open_clip's words."""
    return {} if start is None else {"init_logit_scale": start.log_scale, "init_logit_bias": start.bias}


def check_model(spec: str, *, random_weights: bool = True) -> None:
    """Check a model specification as far as possible without importing open_clip.

    Args:
        spec: As for `load_clip`.
        random_weights: Let a name stand alone, as training does; a model that is used needs weights.

    Raises:
        ModeclipError: The name is unknown, names no weights where they are needed, or the folder is no model or has
            settings that are refused.
    """
    name, tag = _resolve(spec)
    if name.startswith("hf-hub:") and not HUB_ID.fullmatch(name.removeprefix("hf-hub:")):
        raise ModeclipError(f"model {spec}: expected hf-hub:ORG/NAME")
    if tag and "." in Path(tag).name and not Path(tag).is_file():
        raise ModeclipError(f"model {spec}: there is no file {tag}; correct the path, or name a pretrained tag")
    if name.startswith("local-dir:"):
        _check_folder(Path(name.removeprefix("local-dir:")))
    elif not name.startswith("hf-hub:"):
        own = sorted(path.stem for path in _OWN_CONFIGS.glob("*.json"))
        package = find_spec("open_clip")
        folders = [Path(folder) / "model_configs" for folder in (package and package.submodule_search_locations) or ()]
        known = {path.stem for folder in folders for path in folder.glob("*.json")}
        if name not in known.union(own):
            few = ["ViT-B-32", "ViT-B-16", "ViT-L-14", "any other of open_clip.list_models()"]
            raise unknown("model", spec.partition("@")[0], [*own, *few, "the path of a model folder"])
        if not tag and not random_weights:
            raise ModeclipError(
                f"model {spec} names no weights, so they would be random; write {spec}@TAG, {spec}@FILE or the path of "
                "a model folder (modeclip evaluate --random-weights evaluates it all the same)"
            )


def assemble_clip(
    base: Clip,
    experts: Sequence[Mapping[str, Tensor]],
    *,
    top_k: int = 2,
    routers: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> Clip:
    """Make a CLIP-MoE of a plain CLIP and the states of models that differ from it in feed-forward layers only.

    Arguments and errors are those of `modeclip.models.moe.assemble`. Tokenizer and preprocessing are the base's.
    """
    from modeclip.models.moe import MoeConfig, assemble

    model = assemble(base.model, experts, top_k=top_k, routers=routers, seed=seed)
    moe = MoeConfig(num_experts=1 + len(experts), top_k=top_k)
    return replace(base, model=model, config=base.config | {"moe": asdict(moe)})


def save_clip(clip: Clip, folder: Path) -> None:
    """Write a model as a folder that open_clip loads with ``local-dir:``, and check that it loads the same model.

    What open_clip cannot express, a CLIP-MoE, is loaded by ``load_clip`` for that.

    Raises:
        ModeclipError: The disk is full, or another model is made of the folder (see ``write_parity``).
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PARITY_FILE).unlink(missing_ok=True)
    write_tensors(folder / WEIGHTS_FILE, clip.model.state_dict())
    write_json(folder / CONFIG_FILE, clip.config, indent=2)
    if hasattr(clip.tokenizer, "save_pretrained"):  # Hugging Face's; open_clip looks for it in the folder
        clip.tokenizer.save_pretrained(str(folder))
    write_parity(clip, folder)


def write_parity(clip: Clip, folder: Path) -> dict[str, Any]:
    """Load a model folder with open_clip alone, compare it with the model in memory, and write down what differs.

    The folder of a CLIP-MoE is loaded by ``load_clip``. Both run on the same device, on two random pictures (one of the
    model's size, one of another size and shape) and on fixed texts: so preprocessing, token ids and the towers (with
    their activation function) are all compared.

    Returns:
        The content of ``parity.json``.

    Raises:
        ModeclipError: They differ by more than rounding.
    """
    import torch
    from PIL import Image

    model, preprocess, tokenizer = _load_anew(folder)
    ours = next(clip.model.parameters())
    draw = np.random.default_rng(0)
    width, height = clip.image_size
    shapes = [(height + height // 2, width + width // 4, 3), (height, width, 3)]
    pictures = [Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]
    images = torch.cat([clip.images([picture]) for picture in pictures])
    tokens = clip.tokens(_PARITY_TEXTS)
    kind = str(ours.dtype).removeprefix("torch.")
    tolerance = PARITY_TOLERANCE.get(kind, PARITY_TOLERANCE["float32"])
    training = clip.model.training
    clip.model.eval()
    model.to(ours.device).eval()
    try:
        with without_gradients():
            inputs = {"encode_image": images.to(ours), "encode_text": tokens.to(ours.device)}
            features = [
                [getattr(tower, method)(value, normalize=True).float() for method, value in inputs.items()]
                for tower in (clip.model, model.to(ours.dtype))
            ]
    finally:
        clip.model.train(training)
    seen = torch.stack([preprocess(picture) for picture in pictures])
    parity: dict[str, Any] = {
        "preprocess": {"max_abs": _largest(images, seen)},
        "token_ids_equal": bool(torch.equal(tokens, tokenizer(list(_PARITY_TEXTS)))),
    }
    for tower, here, there in zip(("image", "text"), *features, strict=True):
        cosine = float(torch.nn.functional.cosine_similarity(here, there).min())
        parity[tower] = {"max_abs": _largest(here, there), "min_cosine": cosine}
    parity |= {"tolerance": tolerance, "precision": kind, "device": str(ours.device)}
    parity["versions"] = {name: version(name) for name in ("modeclip", "open_clip_torch", "torch")}
    write_json(folder / PARITY_FILE, parity, indent=2)
    _refuse_difference(parity, folder)
    return parity


def _load_anew(folder: Path) -> tuple[Any, Any, Any]:
    """Return model, preprocessing and tokenizer of a folder as those find them who get it."""
    import torch

    open_clip = _import_open_clip()
    if "moe" in check_clip_folder(folder):  # checked in any case: its tokenizer came from a folder or the Hub
        clip = load_clip(folder)
        return clip.model, clip.preprocess, clip.tokenizer
    with _quiet(), torch.random.fork_rng(devices=[]):
        model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        return model, preprocess, open_clip.get_tokenizer(f"local-dir:{folder}")


def logit_scale_of(folder: Path) -> float:
    """Return exp(logit scale) of a model folder, reading nothing else of its weights.

    Raises:
        ModeclipError: The file with the weights is damaged.
    """
    from safetensors import SafetensorError

    try:
        with open_weights(folder) as weights:
            return float(weights.tensor("logit_scale").float().exp())
    except (SafetensorError, RuntimeError, ValueError) as error:  # also a scale that is no single number
        name = weights_file(folder).name
        raise ModeclipError(
            f"model {folder}: {name} cannot be read (logit_scale: {error}); get the model again"
        ) from None


def encode_image(model: Any, images: Tensor) -> Tensor:
    """Encode (B, 3, H, W) images into (B, D) unit vectors."""
    return encode(model, "image", images)


def encode_text(model: Any, tokens: Tensor) -> Tensor:
    """Encode (B, context_length) token ids into (B, D) unit vectors, without the padding that no caption uses.

    Cutting the padding is exact for open_clip's own text tower if it is causal and read at the end-of-text token. Any
    other tower gets the full length.
    """
    return encode(model, "text", tokens)


def resolve_precision(wanted: str) -> str:
    """Return one of `PRECISIONS`; ``auto`` becomes the fastest that this machine has.

    Raises:
        ModeclipError: The name is unknown.
    """
    precision = choose_precision(wanted)
    if precision not in PRECISIONS:
        raise unknown("precision", wanted, ["auto", *PRECISIONS])
    return precision


def imagenet_words() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return ImageNet's 1,000 class names and its 80 prompts with ``{}`` for the name, as open_clip has them."""
    open_clip = _import_open_clip()
    templates = (template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES)
    return tuple(open_clip.IMAGENET_CLASSNAMES), tuple(templates)


@contextmanager
def computing(clip: Clip, precision: str) -> Iterator[torch.device]:
    """Run a model without gradients in a precision of `PRECISIONS`, and yield its device.

    The casts of the weights are kept until the end of the context, so a context around many batches casts once.
    """
    import torch

    device = next(clip.model.parameters()).device
    kind = PRECISIONS[precision]
    low = torch.autocast(device.type, dtype=getattr(torch, kind)) if kind else nullcontext()
    with without_gradients(), fast_attention(device, precision), low:
        yield device


def without_gradients() -> torch.no_grad:
    """Return the context, or decorator, in which every tower runs that is not trained.

    It is ``torch.no_grad``: under ``torch.inference_mode`` autocast keeps no cast weights on a CPU, casts each of them
    at each use, and takes 2 to 3 times as long (``benchmarks/autocast.py`` prints by how much). Without
    autocast the two differ by less than the noise.
    """
    import torch

    return torch.no_grad()


@contextmanager
def fast_attention(device: torch.device, precision: str) -> Iterator[None]:
    """Choose the attention kernel: plain products for bfloat16 on a CPU, PyTorch's choice elsewhere.

    On the CPU the fused kernel is slow for short sequences in bfloat16, such as 17 image patches;
    ``benchmarks/train_step.py`` prints by how much.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if device.type == "cpu" and precision.startswith("bf16"):
        with sdpa_kernel(SDPBackend.MATH):
            yield
    else:
        yield


@cache
def _import_open_clip() -> Any:
    """Import open_clip once, without what a plain CLIP has no use for (a third of the time), and tell it our models."""
    with without_loading("timm", "timm.layers", "transformers", "transformers.modeling_outputs", "torch._dynamo.utils"):
        open_clip = import_module("open_clip")
    open_clip.add_model_config(_OWN_CONFIGS)
    return open_clip


def _resolve(spec: str) -> tuple[str, str | None]:
    """Split a specification into open_clip's model name and pretrained tag."""
    spec = expand_homes(spec)
    if spec.startswith(("hf-hub:", "local-dir:")):
        return spec, None
    if Path(spec).is_dir():
        return f"local-dir:{spec}", None
    name, _, tag = spec.partition("@")
    return name.replace("/", "-"), tag or None


def _fetch(name: str) -> str:
    """Return a model's name for open_clip; what is on the Hub is downloaded and checked, and becomes a folder.

    Raises:
        ModeclipError: Its settings are refused.
    """
    if not name.startswith("hf-hub:"):
        return name
    from open_clip.pretrained import download_pretrained_from_hf

    hub_id = name.removeprefix("hf-hub:")
    folder = Path(download_pretrained_from_hf(hub_id, filename=CONFIG_FILE)).parent
    check_clip_folder(folder)
    download_pretrained_from_hf(hub_id)
    _check_folder(folder)
    return f"local-dir:{folder}"


def _text_settings(place: str) -> dict[str, Any]:
    """Return open_clip's settings of the text tower of a built-in name or a folder, which has been checked."""
    import open_clip

    settings: dict[str, Any] = open_clip.get_model_config(place)["text_cfg"]
    return settings


def _text_tower(place: str, *, weights: bool) -> dict[str, Any]:
    """Return what open_clip gets to build a text tower of transformers from files that have been checked.

    Args:
        place: Name or folder of the model.
        weights: Load the weights that the text tower has on the Hub, for a new model.
    """
    settings = _text_settings(place)
    if not settings.get("hf_model_name"):
        return {}
    patterns = ["*.json", *(["*.safetensors", "*.bin"] if weights else [])]
    folder = _download(settings["hf_model_name"], patterns)
    check_transformer_folder(folder)
    return {"text_cfg": settings | {"hf_model_name": str(folder), "hf_model_pretrained": weights}}


def _load_delta(folder: Path, patch_dropout: float, logit_start: LogitStart | None) -> Clip:
    """Load the seed beside a delta's folder, and put what differs in its place."""
    check_delta(folder)
    clip = load_clip(seed_of(folder), patch_dropout=patch_dropout, logit_start=logit_start)
    state = clip.model.state_dict()
    with without_gradients(), open_weights(folder) as weights:
        for name in weights.own_names:
            if name not in state or tuple(state[name].shape) != weights.shape(name):
                raise ModeclipError(
                    f"model folder {folder}: {DELTA_FILE} holds {name[:80]!r} of shape {weights.shape(name)}, which no "
                    "model of its settings has; get the bundle again"
                )
            state[name].copy_(weights.tensor(name))
    return clip


def _moe_of(place: str) -> dict[str, int] | None:
    """Return the section ``moe`` of a folder's settings, which have been checked; None for a plain CLIP."""
    if not place.startswith("local-dir:"):
        return None
    path = Path(place.removeprefix("local-dir:")) / CONFIG_FILE
    found: dict[str, int] | None = read_json(path, dict[str, Any], "get the model again").get("moe")
    return found


def _with_experts(model: Any, moe: Mapping[str, int]) -> None:
    from modeclip.models.moe import MoeConfig, with_experts

    with_experts(model, MoeConfig(**moe))


def _load_experts(model: Any, moe: Mapping[str, int], folder: Path) -> None:
    """Make a plain model the CLIP-MoE of a folder, weights included."""
    import torch
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS_FILE, "pt") as file:
        routers = [name for name in file.keys() if name.endswith(".router.weight")]  # noqa: SIM118  (no mapping)
        found = {file.get_slice(name).get_shape()[0] for name in routers}
        if found != {moe["num_experts"]}:  # before memory is taken for as many as the settings say
            raise ModeclipError(
                f"model folder {folder}: moe.num_experts in {CONFIG_FILE} is {moe['num_experts']}, but the routers in "
                f"{WEIGHTS_FILE} know {' or '.join(map(str, sorted(found))) or 'no'} experts; get the model again"
            )
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    _with_experts(model, moe)
    if getattr(model, "logit_bias", None) is not None:
        weights.setdefault("logit_bias", torch.zeros_like(model.logit_bias))
    model.load_state_dict(weights)


def _load_tokenizer(name: str, place: str) -> Any:
    """Return a model's tokenizer: open_clip's own, or one of transformers from files that have been checked."""
    import open_clip

    settings = _text_settings(place)
    source = settings.get("hf_tokenizer_name")
    if not source:
        if not place.startswith("local-dir:"):
            return open_clip.get_tokenizer(place)
        length = settings.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH)
        return _plain_tokenizer(length, json.dumps(settings.get("tokenizer_kwargs") or {}))
    # As open_clip does: a folder's tokenizer lies in it, and a repository's where its settings say.
    if name.startswith("local-dir:"):
        folder = Path(name.removeprefix("local-dir:"))
    else:
        folder = _download(source, ["*.json", "*.txt", "*.model", "*.tiktoken"])
        check_links(folder)
    check_tokenizer_folder(folder)
    return open_clip.tokenizer.HFTokenizer(
        str(folder),
        context_length=settings.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH),
        tokenizer_mode=settings.get("tokenizer_mode"),
        **(settings.get("tokenizer_kwargs") or {}),
        local_files_only=True,
        trust_remote_code=False,
    )


@cache
def _plain_tokenizer(context_length: int, words: str) -> Any:
    """Make open_clip's own tokenizer, once for all models that have the same: it reads 49,000 merges each time."""
    import open_clip

    return open_clip.SimpleTokenizer(context_length=context_length, **json.loads(words))


def _check_vocabulary(spec: str, model: Any, tokenizer: Any) -> None:
    """Raise unless a model has an embedding for the tokens that begin and end every text."""
    table = getattr(getattr(model, "text", model), "token_embedding", None)
    largest = int(tokenizer([""]).max())
    if table is not None and largest >= table.num_embeddings:
        raise ModeclipError(
            f"model {spec}: its tokenizer gives token {largest:,}, but it has {table.num_embeddings:,} embeddings "
            f"(text_cfg.vocab_size); its {CONFIG_FILE} and its tokenizer are of different models"
        )


def _download(hub_id: str, patterns: list[str]) -> Path:
    """Return the folder of a Hub repository in the local cache, with the files of some patterns."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(hub_id, allow_patterns=patterns))


@contextmanager
def _loading(spec: str) -> Iterator[None]:
    """Turn whatever open_clip raises for a model that it cannot load into one line."""
    try:
        yield
    except ModeclipError:
        raise
    except pickle.UnpicklingError as error:  # its own words advise to run what is in the file
        raise ModeclipError(
            f"model {spec}: cannot be loaded: its weights are damaged, or hold more than tensors and numbers, which is "
            "never loaded; get them as safetensors"
        ) from error
    except Exception as error:  # damaged files alone raise nearly anything
        raise ModeclipError(f"model {spec}: cannot be loaded: {' '.join(str(error).split())[:300]}") from error


def _check_tag(name: str, tag: str) -> None:
    """Check that open_clip knows a tag, and that its weights were trained with the activation of this name."""
    import open_clip

    found = open_clip.get_pretrained_cfg(name, tag)
    if not found:
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise unknown(f"pretrained tag of {name}", tag, tags, f"open_clip.list_pretrained_tags_by_model({name!r})")
    config = open_clip.get_model_config(name) or {}
    if found.get("quick_gelu", False) != config.get("quick_gelu", False):
        quick = "QuickGELU" if found.get("quick_gelu", False) else "GELU"
        other = name.removesuffix("-quickgelu") if name.endswith("-quickgelu") else f"{name}-quickgelu"
        advice = f"; write {other}@{tag}" if other in open_clip.list_models() else ""
        raise ModeclipError(f"model {name}@{tag}: these weights were trained with {quick}, {name} has not{advice}")


def _largest(one: Tensor, other: Tensor) -> float:
    """Return the largest difference of two tensors; infinite if their shapes differ."""
    return float((one.float() - other.float()).abs().max()) if one.shape == other.shape else math.inf


def _refuse_difference(parity: dict[str, Any], folder: Path) -> None:
    found = [
        f"{part} by {parity[part]['max_abs']:.2g}"
        for part in ("preprocess", "image", "text")
        if not parity[part]["max_abs"] <= parity["tolerance"]
    ]
    found += [] if parity["token_ids_equal"] else ["token ids"]
    if found:
        raise ModeclipError(
            f"{folder}: open_clip loads another model from this folder than the one in memory; they differ in "
            f"{', '.join(found)} (tolerance {parity['tolerance']:g}, see {PARITY_FILE}): its {CONFIG_FILE} does not "
            "describe the weights (QuickGELU, image size, mean, std)"
        )


def chosen_weights(folder: Path) -> Path | None:
    """Return the file whose weights open_clip loads from a model folder; None: it has none."""
    found = sorted(path for path in folder.glob("*") if path.suffix in WEIGHTS_SUFFIXES)
    found.sort(key=lambda path: path.suffix != ".safetensors")
    preferred = [path for path in found if path.name in PREFERRED_WEIGHTS]
    preferred.sort(key=lambda path: PREFERRED_WEIGHTS.index(path.name))
    return next(iter([*preferred, *found]), None)


def _check_folder(folder: Path) -> None:
    """Check a folder's settings, and that it has weights; without, open_clip would start a model at random."""
    has_weights = chosen_weights(folder) is not None
    for file, is_there in ((CONFIG_FILE, (folder / CONFIG_FILE).is_file()), (WEIGHTS_FILE, has_weights)):
        if not is_there:
            raise ModeclipError(f"model folder {folder}: {file} is missing; expected a folder as open_clip saves it")
    if check_clip_folder(folder).get("moe") and not weights_file(folder).is_file():
        raise ModeclipError(f"model folder {folder}: {WEIGHTS_FILE} is missing, which a CLIP-MoE needs")


def _config_of(name: str, model: Any) -> dict[str, Any]:
    """Return the content of ``open_clip_config.json`` for a model that was created by this name."""
    import open_clip

    if name.startswith("local-dir:"):
        path = Path(name.removeprefix("local-dir:")) / CONFIG_FILE
        return read_json(path, dict[str, Any], "get the model again")
    wanted = ("mean", "std", "interpolation", "resize_mode")
    preprocess = {key: value for key, value in model.visual.preprocess_cfg.items() if key in wanted}
    return {"model_cfg": open_clip.get_model_config(name), "preprocess_cfg": preprocess}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the notes of open_clip and of the Hub's client while a model is built; what fails is raised."""
    loggers = {logging.getLogger(): logging.ERROR, logging.getLogger("huggingface_hub"): logging.CRITICAL}
    levels = {logger: logger.level for logger in loggers}
    for logger, level in loggers.items():
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
