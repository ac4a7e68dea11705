"""Encoders with the towers of a CLIP or a model of timm: captions, images, or both become unit vectors.

`clip:MODEL` encodes captions, and therefore class names too. The others encode the images of a catalog, which is then
clustered by them. `clip-both` concatenates the unit vectors of text and image, since their sum gives no meaningful
clusters.

Source: MoDE (arXiv 2404.16030) Table 7: seed-CLIP text, image, and both concatenated; DINOv2, here any model of timm.
Price: one pass of the towers over the pairs, in bfloat16 where the processor has it; memory for the decoded images of
one batch.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from modeclip.data.images import cause_of, decode_image
from modeclip.errors import ModeclipError, unknown
from modeclip.models.clip import Clip, encode_image, encode_text, load_clip
from modeclip.models.encoders.hub import (
    cached_folder,
    check_vectors,
    hash_weights,
    in_batches,
    in_bfloat16,
    loading,
    local_folder,
    need,
    unit_rows,
)
from modeclip.models.settings import check_timm_folder
from modeclip.system.devices import choose_device
from modeclip.system.paths import home

if TYPE_CHECKING:
    from torch import Tensor

TEXTS_AT_ONCE = 8192
"""Captions in one call of the tokenizer."""
PROBES = ("a cat", "arrow up left", "a photo of two dogs that run after a red ball", "x")
"""Texts that show whether a text tower tolerates bfloat16."""


class ClipTextEncoder:
    """The text tower of a CLIP, such as the seed model as its own encoder of captions."""

    encodes = "text"

    def __init__(self, name: str, model: str | Clip, batch_size: int) -> None:
        self._clip = _load_clip(name, model)
        self._model: Any = self._clip.model.eval().to(choose_device())
        self.name, self.batch_size = name, batch_size
        self.fingerprint = hash_weights(self._model)
        self._model = in_bfloat16(self._model, lambda model: self._encode(PROBES, model, 1))
        self.dimension = int(self._encode(["a"], self._model, 1).shape[1])

    def encode(self, texts: Sequence[str]) -> Float[np.ndarray, "N D"]:
        """Return a float32 vector of norm 1 for each text, in the order of the texts."""
        if not texts:
            return np.empty((0, self.dimension), np.float32)
        return check_vectors(self.name, self._encode(texts, self._model, self.batch_size), texts)

    def _encode(self, texts: Sequence[str], model: Any, rows: int) -> Float[np.ndarray, "N D"]:
        parts = []
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            tokens = self._clip.tokens(texts[start : start + TEXTS_AT_ONCE])
            position = np.arange(1, tokens.shape[1] + 1)
            lengths = ((tokens != 0).numpy() * position).max(axis=1)  # an id of 0 is padding, but also a token

            def run(batch: np.ndarray, tokens: Tensor = tokens) -> Tensor:
                return encode_text(model, tokens[batch].to(choose_device()))

            found = list(in_batches(lengths, rows, run))
            vectors = np.empty((len(tokens), found[0][1].shape[1]), np.float32)
            for batch, made in found:
                vectors[batch] = unit_rows(made)
            parts.append(vectors)
        return np.concatenate(parts)


class ClipImageEncoder:
    """The image tower of a CLIP."""

    encodes = "image"

    def __init__(self, name: str, model: str | Clip, batch_size: int) -> None:
        self._clip = _load_clip(name, model)
        self._model: Any = self._clip.model.eval().to(choose_device())
        self.name, self.batch_size = name, batch_size
        self.fingerprint = hash_weights(self._model)
        self._model = in_bfloat16(self._model, lambda model: self._encode(_probe_images(), model, 1))
        self.dimension = int(self._encode(_probe_images()[:1], self._model, 1).shape[1])

    def encode_pairs(self, captions: Sequence[str], images: Sequence[bytes]) -> Float[np.ndarray, "N D"]:
        """Return a float32 vector of norm 1 for each encoded image; captions only name what fails."""
        if not images:
            return np.empty((0, self.dimension), np.float32)
        return check_vectors(self.name, self._encode(images, self._model, self.batch_size), captions)

    def encode_pictures(self, pictures: Sequence[Image.Image]) -> Float[np.ndarray, "N D"]:
        """Return a float32 vector of norm 1 for each picture that is decoded already."""
        return self._encode(pictures, self._model, self.batch_size)

    def _encode(
        self, images: Sequence[bytes] | Sequence[Image.Image], model: Any, rows: int
    ) -> Float[np.ndarray, "N D"]:
        dtype = next(model.visual.parameters()).dtype

        def run(batch: np.ndarray) -> Tensor:
            pixels = self._clip.images([_decode(images[i], self.name) for i in batch])
            return encode_image(model, pixels.to(choose_device(), dtype))

        return _encode_images(len(images), rows, run)


class ClipBothEncoder:
    """Text and image vectors of a CLIP, concatenated and scaled to norm 1."""

    encodes = "both"

    def __init__(self, name: str, model: str | Clip, batch_size: int) -> None:
        clip = _load_clip(name, model)
        self.text = ClipTextEncoder(name, clip, batch_size)
        """The text tower by itself."""
        self.image = ClipImageEncoder(name, clip, batch_size)
        """The image tower by itself."""
        self.name, self.dimension = name, self.text.dimension + self.image.dimension
        self.fingerprint = self.text.fingerprint

    def encode_pairs(self, captions: Sequence[str], images: Sequence[bytes]) -> Float[np.ndarray, "N D"]:
        """Return a float32 vector of norm 1 for each caption with its encoded image."""
        return unit_rows(np.hstack([self.text.encode(captions), self.image.encode_pairs(captions, images)]))


class TimmEncoder:
    """An image model of timm without its classifier, such as DINOv2, from a folder or the local cache."""

    encodes = "image"

    def __init__(self, name: str, model: str, batch_size: int) -> None:
        need("timm", name, "timm")
        folder = _timm_folder(name, model)
        check_timm_folder(folder)
        with loading(name, folder):
            timm: Any = import_module("timm")  # parts of it are not typed
            self._model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)
            config = timm.data.resolve_model_data_config(self._model)
            self._preprocess: Any = timm.data.create_transform(**config, is_training=False)
        self._model = self._model.eval().to(choose_device())
        self.name, self.batch_size = name, batch_size
        self.fingerprint = hash_weights(self._model)
        self._model = in_bfloat16(self._model, lambda model: self._encode(_probe_images(), model, 1))
        self.dimension = int(self._encode(_probe_images()[:1], self._model, 1).shape[1])

    def encode_pairs(self, captions: Sequence[str], images: Sequence[bytes]) -> Float[np.ndarray, "N D"]:
        """Return a float32 vector of norm 1 for each encoded image; captions only name what fails."""
        if not images:
            return np.empty((0, self.dimension), np.float32)
        return check_vectors(self.name, self._encode(images, self._model, self.batch_size), captions)

    def _encode(self, images: Sequence[bytes], model: Any, rows: int) -> Float[np.ndarray, "N D"]:
        import torch

        dtype = next(model.parameters()).dtype

        def run(batch: np.ndarray) -> Tensor:
            pixels = torch.stack([self._preprocess(_decode(images[i], self.name)) for i in batch])
            features: Tensor = model(pixels.to(choose_device(), dtype))
            return features

        return _encode_images(len(images), rows, run)


def _encode_images(count: int, rows: int, run: Any) -> Float[np.ndarray, "N D"]:
    """Return the unit vectors of images 0 to ``count`` - 1, encoded in batches of ``rows``."""
    parts = [unit_rows(found) for _, found in in_batches(np.zeros(count, np.int64), rows, run)]
    return np.concatenate(parts)  # one group: the batches come in the order of the images


def _decode(data: bytes | Image.Image, name: str) -> Image.Image:
    if isinstance(data, Image.Image):
        return data
    try:
        return decode_image(data)
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
        raise ModeclipError(
            f"encoder {name!r}: an image of the catalog cannot be read any more ({cause_of(error)}); modeclip check "
            "says which"
        ) from error


def _probe_images() -> list[bytes]:
    """Return small pictures that show whether an image tower tolerates bfloat16."""
    draw, images = np.random.default_rng(0), []
    for _ in range(4):
        buffer = io.BytesIO()
        pixels = draw.integers(0, 256, (3, 3, 3)).astype(np.uint8)
        Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC).save(buffer, "PNG")
        images.append(buffer.getvalue())
    return images


def _load_clip(name: str, model: str | Clip) -> Clip:
    if isinstance(model, Clip):
        return model
    spec = home(model)
    with loading(name, spec):
        return load_clip(spec)


def _timm_folder(name: str, model: str) -> Path:
    """Return the folder of a timm model: the given one, or that of a pretrained model in the local cache."""
    if "/" in model or Path(model).is_dir():
        folder = local_folder(model)
        if not (folder / "config.json").is_file():
            raise ModeclipError(
                f"encoder {name!r}: expected a folder as timm.models.save_for_hf saves it, got one without "
                f"config.json: {folder}"
            )
        return folder
    timm: Any = import_module("timm")
    if model.split(".")[0] not in timm.list_models():
        near = timm.list_models(f"{model.split('_')[0]}*")[:5]
        raise unknown("model of timm", model, near or timm.list_models(), "" if near else "timm.list_models()")
    pretrained = timm.models.get_pretrained_cfg(model)
    hub_id = getattr(pretrained, "hf_hub_id", None)
    full = model if "." in model else f"{model}.{getattr(pretrained, 'tag', '')}".rstrip(".")
    of_hub = f"{hub_id}{full}" if str(hub_id).endswith("/") else hub_id  # some ids of timm lack the model's name
    cached = cached_folder(of_hub) if of_hub else None
    if cached is None:
        raise ModeclipError(
            f"encoder {name!r}: its pretrained weights are not in the local cache; give timm:FOLDER with a copy of the "
            f"hub's {of_hub or f'model {full}'}"
        )
    return cached
