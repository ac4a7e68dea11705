"""Model specification -> CLIP model with its tokenizer and preprocessing; the only file that knows open_clip.

A model is named as open_clip users name it: ``ViT-B-32`` (random weights), ``ViT-B-32@laion2b_s34b_b79k`` (a pretrained
tag or a checkpoint file), ``hf-hub:org/name``, ``local-dir:/path`` or just the path of such a folder. What is saved is
such a folder (``open_clip_config.json`` + ``open_clip_model.safetensors``): open_clip loads it with no line of ours.

Captions are cut to the longest of their batch before the text tower sees them. In a causal tower no position sees a
later one, and the features are read at the end-of-text token, so the padding behind it changes nothing: the result is
the same to rounding, for a fraction of the work (icon names use 4 to 12 of 77 positions).

Source: OpenCLIP (arXiv 2212.07143) for the conventions; model folders as open_clip 3 reads them.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modeclip.errors import ModeclipError, unknown
from modeclip.files import write_atomically

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
_OWN_CONFIGS = Path(__file__).parent / "models"


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A CLIP model with everything that it takes to run or save it."""

    model: Any
    """The open_clip model, an ``nn.Module`` (open_clip declares no types)."""
    config: dict[str, Any]
    """Content of its ``open_clip_config.json``: ``model_cfg`` and ``preprocess_cfg``."""
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

        Pictures that have the model's size already need no resizing and no crop: those are normalised as one batch,
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

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Turn texts into (B, context_length) int64 token ids."""
        tokens: Tensor = self.tokenizer(list(texts))
        return tokens


def load_clip(spec: str | Path, *, seed: int = 0) -> Clip:
    """Build a CLIP on the CPU from a model specification (see the top of this file).

    Args:
        spec: Name, ``name@tag``, ``hf-hub:``, ``local-dir:`` or the path of a model folder.
        seed: Of the random start, where the specification carries no weights.

    Raises:
        ModeclipError: The name or tag is unknown, or the folder is no model.
    """
    import open_clip
    import torch

    open_clip.add_model_config(_OWN_CONFIGS)
    check_model(str(spec))
    name, tag = _resolve(str(spec))
    if tag and not Path(tag).is_file() and tag not in open_clip.list_pretrained_tags_by_model(name):
        raise unknown(f"pretrained tag of {name}", tag, open_clip.list_pretrained_tags_by_model(name))
    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=tag)
            tokenizer = open_clip.get_tokenizer(name)
        except (RuntimeError, ValueError, OSError) as error:
            raise ModeclipError(f"model {spec}: cannot be loaded: {_one_line(error)}") from error
    return Clip(model=model, config=_config_of(name, model), tokenizer=tokenizer, preprocess=preprocess)


def check_model(spec: str) -> None:
    """Raise for a model specification that cannot be loaded, as far as can be told without importing open_clip.

    Raises:
        ModeclipError: The name is unknown, or the folder is no model.
    """
    name, _ = _resolve(spec)
    if name.startswith("local-dir:"):
        _check_folder(Path(name.removeprefix("local-dir:")))
    elif not name.startswith("hf-hub:"):
        own = sorted(path.stem for path in _OWN_CONFIGS.glob("*.json"))
        package = find_spec("open_clip")
        folders = [Path(folder) / "model_configs" for folder in (package and package.submodule_search_locations) or ()]
        known = {path.stem for folder in folders for path in folder.glob("*.json")}
        if name.replace("/", "-") not in known.union(own):
            few = ["ViT-B-32", "ViT-B-16", "ViT-L-14", "any other of open_clip.list_models()"]
            raise unknown("model", name, [*own, *few, "the path of a model folder"])


def save_clip(clip: Clip, folder: Path) -> None:
    """Write a model as the folder that open_clip loads with ``local-dir:`` (each file replaced as a whole)."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().contiguous() for name, tensor in clip.model.state_dict().items()}
    temporary = folder / f"{WEIGHTS_FILE}.part"
    save_file(weights, temporary)
    temporary.replace(folder / WEIGHTS_FILE)
    write_atomically(folder / CONFIG_FILE, json.dumps(clip.config, indent=2) + "\n")


def encode_image(model: Any, images: Tensor) -> Tensor:
    """Encode (B, 3, H, W) images into (B, D) unit vectors."""
    features: Tensor = model.encode_image(images, normalize=True)
    return features


def encode_text(model: Any, tokens: Tensor) -> Tensor:
    """Encode (B, context_length) token ids into (B, D) unit vectors, cutting the padding that no caption uses.

    The cut is exact for open_clip's own text tower (causal, features at the end-of-text token); any other tower gets
    the full length.
    """
    import open_clip
    import torch.nn.functional as F  # noqa: N812  (the name that PyTorch's own documents use)
    from open_clip.transformer import text_global_pool

    causal = type(model) is open_clip.CLIP and model.attn_mask is not None
    if not (causal and model.text_pool_type in {"argmax", "eos"}):
        features: Tensor = model.encode_text(tokens, normalize=True)
        return features
    length = int((tokens != 0).any(dim=0).nonzero().max()) + 1  # an id of 0 is padding, but also the token "!"
    tokens = tokens[:, :length]
    dtype = model.transformer.get_cast_dtype()
    x = model.token_embedding(tokens).to(dtype) + model.positional_embedding[:length].to(dtype)
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    x = text_global_pool(x, tokens, model.text_pool_type, eos_token_id=getattr(model, "text_eos_id", None))
    projection = model.text_projection
    if projection is not None:
        x = projection(x) if callable(projection) else x @ projection
    return F.normalize(x, dim=-1)


def random_crops(
    pictures: Sequence[Image], size: tuple[int, int], min_share: float, draw: np.random.Generator
) -> list[Image]:
    """Cut a random box out of each picture and scale it to the model's size, as open_clip does in training.

    Args:
        pictures: Any pictures.
        size: Width and height of the results, in pixels.
        min_share: A box has a share of the picture's area drawn from [min_share, 1], at a width to height drawn
            from [3/4, 4/3] (log-uniform), and is narrowed where it would not fit.
        draw: Source of the randomness.
    """
    from PIL.Image import Resampling

    crops = []
    for picture, (share, shape, left, top) in zip(pictures, draw.random((len(pictures), 4)).tolist(), strict=True):
        width, height = picture.size
        area, ratio = (min_share + share * (1 - min_share)) * width * height, (4 / 3) ** (2 * shape - 1)
        box_width, box_height = min(width, math.sqrt(area * ratio)), min(height, math.sqrt(area / ratio))
        left, top = left * (width - box_width), top * (height - box_height)
        box = (left, top, min(width, left + box_width), min(height, top + box_height))
        crops.append(picture.resize(size, Resampling.BICUBIC, box=box))
    return crops


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


def _resolve(spec: str) -> tuple[str, str | None]:
    """Split a specification into open_clip's model name and pretrained tag."""
    if spec.startswith(("hf-hub:", "local-dir:")):
        return spec, None
    if Path(spec).is_dir():
        return f"local-dir:{spec}", None
    name, _, tag = spec.partition("@")
    return name, tag or None


def _check_folder(folder: Path) -> None:
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file() and not (file == WEIGHTS_FILE and any(folder.glob("open_clip*.*"))):
            raise ModeclipError(f"model folder {folder}: {file} is missing; expected a folder as open_clip saves it")


def _config_of(name: str, model: Any) -> dict[str, Any]:
    """Return what ``open_clip_config.json`` must say for a model that was created by this name."""
    import open_clip

    if name.startswith("local-dir:"):
        path = Path(name.removeprefix("local-dir:")) / CONFIG_FILE
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return config
    wanted = ("mean", "std", "interpolation", "resize_mode")
    preprocess = {key: value for key, value in model.visual.preprocess_cfg.items() if key in wanted}
    return {"model_cfg": open_clip.get_model_config(name), "preprocess_cfg": preprocess}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back open_clip's notes on the root logger while a model is built."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
