"""Unit vectors of images and texts by many CLIPs, each computed once and kept by the hash of its content.

One pass over the images serves all models that lack their vectors: a batch is read and decoded once, prepared once for
each kind of preprocessing among the models, and encoded by each of them while the next batch is being read. Class
names and texts are sorted by length, so that each batch is cut to the length that it needs (``clip.encode_text``).

Vectors are kept under the hash of the model's weights and settings, the precision, and the bytes of the images or
texts. A model that was trained further, or a picture that was changed, therefore never meets old vectors
(`modeclip.models.feature_cache`).

Models of a bundle that share a trunk with their seed (`modeclip.models.trunk`) run it once for all of them, and each
runs its own last blocks.

Price: one forward pass for each model and image, less what models share, and 4 D bytes of disk. Models come from the
cache's pool; where they do not all fit into memory together, the images are read once more for each group of models
that does.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from jaxtyping import Float, Int

from modeclip.data.prompts import fill
from modeclip.data.tasks.task import Images
from modeclip.errors import ModeclipError
from modeclip.models.clip import Clip, computing, resolve_precision, without_gradients
from modeclip.models.encoders import MINILM_PACKAGE, OWN, PREFIXES, SIMCSE_ID, Encoder, load_encoder
from modeclip.models.encoders.hub import cached_folder
from modeclip.models.feature_cache import FeatureCache, hash_texts
from modeclip.models.pool import ModelRef
from modeclip.models.trunk import Shared, share
from modeclip.system.console import progress
from modeclip.system.files import hash_files
from modeclip.system.paths import home_path

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

    from modeclip.models.blocks import Tower

T = TypeVar("T")

TEXT_BATCH = 512
"""Texts encoded at a time."""
PROMPT_BATCH = 1024
"""Prompts of one template encoded at a time."""
CPU_BATCH = 128
"""Images that a tower sees at a time on a CPU, whose cache holds no more; 512 take a sixth longer with the demo's."""
ENCODED_AT_ONCE = 1 << 16
"""Texts whose routing vectors are in memory at a time: 200 MB for vectors of 768 numbers."""
SHOWN_TEXTS = 20_000
"""Texts times models from which on a progress bar is shown."""


class CachedEncoder:
    """An encoder of texts (`encoders.Encoder`) that is loaded only for texts that are not in the cache."""

    def __init__(self, name: str, dimension: int, cache: FeatureCache, *, trust_encoder: bool = False) -> None:
        self.name, self.dimension, self._cache, self._trusted = name, dimension, cache, trust_encoder

    def encode(self, texts: Sequence[str]) -> Float[np.ndarray, "N D"]:
        """Return a float32 vector of norm 1 for each text, in the order of the texts."""
        identity = self._identity
        if identity is None or not texts:
            return self._encoder.encode(list(texts))
        key = self._cache.key("names", encoder=identity, texts=hash_texts(texts))
        if not self._cache.has(key, len(texts)):
            with self._cache.writer(key, len(texts)) as write:
                for start in range(0, len(texts), ENCODED_AT_ONCE):
                    part = list(texts[start : start + ENCODED_AT_ONCE])
                    write(slice(start, start + len(part)), self._encoder.encode(part))
        return self._cache.read(key, len(texts))

    @cached_property
    def _encoder(self) -> Encoder:
        return load_encoder(self.name, trust_encoder=self._trusted)

    @cached_property
    def _identity(self) -> dict[str, str] | None:
        return encoder_identity(self.name)


def encoder_identity(name: str) -> dict[str, str] | None:
    """Return what identifies an encoder, without running it, or None if its name does not say what it computes."""
    prefix, _, rest = name.partition(":")
    place = rest if prefix in PREFIXES and rest else name
    folder = home_path(place)
    if prefix.startswith("clip") and rest:
        return {"kind": prefix, "model": ModelRef.of(name, folder if folder.is_dir() else rest).digest}
    if folder.is_dir():
        return {"kind": prefix if rest else "", **hash_files(folder, sorted(folder.rglob("*")))}
    if name == "minilm":
        return {"name": name, "version": version(MINILM_PACKAGE.replace("_", "-"))}
    if OWN.fullmatch(name) and prefix not in PREFIXES:
        return None
    hub = cached_folder(SIMCSE_ID if name == "simcse" else place)
    return None if hub is None else {"kind": prefix if rest else "", "folder": str(hub)}


def embed_images(
    encoder: str,
    embed: Callable[[Sequence[Image]], Float[np.ndarray, "n D"]],
    images: Images,
    cache: FeatureCache,
    *,
    batch_size: int = 256,
) -> Float[np.ndarray, "N D"]:
    """Return the vectors that images are routed by, for bundles whose clusters are of images.

    Args:
        encoder: Name of the bundle's encoder.
        embed: What embeds pictures as the clusters were (``ClusterRouter.embed_images``).
        images: N images.
        cache: Where vectors are kept.
        batch_size: Images embedded at a time.
    """
    identity = encoder_identity(encoder)
    key = cache.key("pictures", encoder=identity or time.time_ns(), images=images.digest)
    if not cache.has(key, len(images)):
        with cache.writer(key, len(images)) as write, progress("embed images", len(images), "images") as advance:
            for start in range(0, len(images), batch_size):
                rows = np.arange(start, min(start + batch_size, len(images)))
                write(rows, embed(images.read(rows)))
                advance(len(rows))
    return cache.read(key, len(images))


def missing_images(
    refs: Sequence[ModelRef], images: Images, cache: FeatureCache, *, precision: str = "32-true"
) -> list[ModelRef]:
    """Return the models whose vectors of these images are not in the cache yet, each once."""
    kinds = {ref.digest: ref for ref in refs}
    return [
        ref
        for ref in kinds.values()
        if not cache.has(_image_key(cache, ref, images, resolve_precision(precision)), len(images))
    ]


def image_features(
    refs: Sequence[ModelRef],
    images: Images,
    cache: FeatureCache,
    *,
    batch_size: int = 512,
    device: str = "auto",
    precision: str = "32-true",
    advance: Callable[[int], None] | None = None,
) -> list[Float[np.ndarray, "N D"]]:
    """Return the unit vectors of images by each model, float32, memory-mapped.

    Args:
        refs: Models; naming one several times costs nothing.
        images: N images; each is decoded once for all models that lack its vector.
        cache: Where vectors are kept.
        batch_size: Images encoded at a time.
        device: ``auto``, ``cpu``, ``cuda``...
        precision: One of `PRECISIONS`, or ``auto`` (see ``devices.choose_precision``).
        advance: Called with the number of images x models just done; None: a progress bar is shown.

    Raises:
        ModeclipError: There is no image, or a model or an image cannot be read.
    """
    if len(images) == 0:
        raise ModeclipError("expected at least 1 image, got none")
    precision = resolve_precision(precision)
    keys = {ref.digest: _image_key(cache, ref, images, precision) for ref in refs}
    missing = missing_images(refs, images, cache, precision=precision)
    total = len(images) * len(missing)
    shown = progress("encode images", total, "images x models") if missing and advance is None else nullcontext(advance)
    with shown as count:
        for clips in cache.pool.groups(missing, device=device):
            _encode_images(clips, images, cache, keys, batch_size, precision, count or (lambda _: None))
    return [cache.read(keys[ref.digest], len(images)) for ref in refs]


def text_features(
    refs: Sequence[ModelRef],
    texts: Sequence[str],
    cache: FeatureCache,
    *,
    device: str = "auto",
    precision: str = "32-true",
) -> list[Float[np.ndarray, "T D"]]:
    """Return the unit vectors of texts by each model, float32, memory-mapped; arguments as in `image_features`."""
    precision, content = resolve_precision(precision), hash_texts(texts)
    keys = {ref.digest: cache.key("texts", source=ref.digest, precision=precision, texts=content) for ref in refs}
    missing = [ref for ref in _distinct(refs) if not cache.has(keys[ref.digest], len(texts))]
    with _text_bar(len(texts) * len(missing)) as advance:
        for clips in cache.pool.groups(missing, device=device):
            with ExitStack() as stack:
                write = {name: stack.enter_context(cache.writer(keys[name], len(texts))) for name in clips}
                place = stack.enter_context(computing(next(iter(clips.values())), precision))
                for digest, rows, vectors in _encoded_texts(clips, texts, place):
                    write[digest](rows, vectors)
                    advance(len(rows))
    return [cache.read(keys[ref.digest], len(texts)) for ref in refs]


def class_features(clip: Clip, classnames: Sequence[str], templates: Sequence[str]) -> Float[Tensor, "L D"]:
    """Return one unit vector a class: its prompts encoded, normalised, averaged over the templates, normalised.

    Args:
        clip: The model that encodes them, where it is.
        classnames: L class names.
        templates: Prompts with ``{}`` where the name goes.
    """
    return all_class_features([clip], classnames, templates)[0]


def all_class_features(
    clips: Sequence[Clip], classnames: Sequence[str], templates: Sequence[str]
) -> list[Float[Tensor, "L D"]]:
    """Return the vectors of `class_features` by each of some models with one tokenizer, on one device."""
    import torch

    device = next(clips[0].model.parameters()).device
    found: dict[int, Tensor] = {}
    with torch.inference_mode(False), without_gradients():  # a gradient of images may pass through the result
        for shared in share([clip.model for clip in clips], "text"):
            totals = [torch.zeros((), device=device) for _ in shared.members]
            for template in templates:
                prompts = [fill(template, name) for name in classnames]
                parts: list[list[Tensor]] = []
                for start in range(0, len(prompts), PROMPT_BATCH):
                    tokens = clips[0].tokens(prompts[start : start + PROMPT_BATCH]).to(device)
                    state = shared.trunk(tokens)
                    parts.append([head(state) for head in shared.heads])
                totals = [total + torch.cat(own) for total, own in zip(totals, zip(*parts, strict=True), strict=True)]
            found |= dict(zip(shared.members, totals, strict=True))
        return [torch.nn.functional.normalize(found[index], dim=-1) for index in range(len(clips))]


def prompt_features(
    refs: Sequence[ModelRef],
    prompts: Sequence[Sequence[str]],
    cache: FeatureCache,
    *,
    device: str = "auto",
    precision: str = "32-true",
) -> list[Float[np.ndarray, "L D"]]:
    """Return a unit vector a class by each model: its prompts encoded, normalised, averaged, normalised.

    Args:
        refs: Models.
        prompts: One or more for each of L classes.
        cache: Where vectors are kept.
        device: As in `image_features`.
        precision: As in `image_features`.
    """
    precision = resolve_precision(precision)
    texts = [text for of_class in prompts for text in of_class]
    sizes = [len(of_class) for of_class in prompts]
    content = hash_texts([*texts, *map(str, sizes)])
    keys = {ref.digest: cache.key("classes", source=ref.digest, precision=precision, prompts=content) for ref in refs}
    missing = [ref for ref in _distinct(refs) if not cache.has(keys[ref.digest], len(prompts))]
    class_of_text = np.repeat(np.arange(len(prompts)), sizes)
    with _text_bar(len(texts) * len(missing)) as advance:
        for clips in cache.pool.groups(missing, device=device):
            sums: dict[str, np.ndarray] = {}
            with computing(next(iter(clips.values())), precision) as place:
                for digest, rows, vectors in _encoded_texts(clips, texts, place):
                    total = sums.setdefault(digest, np.zeros((len(prompts), vectors.shape[1])))
                    np.add.at(total, class_of_text[rows], vectors)
                    advance(len(rows))
            for digest, total in sums.items():
                with cache.writer(keys[digest], len(prompts)) as write:
                    write(slice(None), (total / np.linalg.norm(total, axis=1, keepdims=True)).astype(np.float32))
    return [cache.read(keys[ref.digest], len(prompts)) for ref in refs]


def _encode_images(
    clips: Mapping[str, Clip],
    images: Images,
    cache: FeatureCache,
    keys: Mapping[str, str],
    batch_size: int,
    precision: str,
    advance: Callable[[int], None],
) -> None:
    """Write the vectors of all images by some models, in one pass."""
    groups = _sharing(clips, {digest: _preprocess_kind(clip) for digest, clip in clips.items()}, "image")
    example = {kind: clips[digests[0]] for kind, digests, _ in groups}

    def batches() -> Iterator[tuple[slice, dict[str, Tensor]]]:
        for start in range(0, len(images), batch_size):
            rows = np.arange(start, min(start + batch_size, len(images)))
            pictures = images.read(rows)
            yield slice(start, start + len(rows)), {kind: clip.images(pictures) for kind, clip in example.items()}

    with ExitStack() as stack:
        write = {digest: stack.enter_context(cache.writer(keys[digest], len(images))) for digest in clips}
        device = stack.enter_context(computing(next(iter(clips.values())), precision))  # all are on one device
        for rows, prepared in _ahead(batches()):
            for kind, digests, shared in groups:
                pixels = prepared[kind].to(device)
                step = CPU_BATCH if device.type == "cpu" else batch_size
                states = [shared.trunk(pixels[start : start + step]) for start in range(0, len(pixels), step)]
                for digest, head in zip(digests, shared.heads, strict=True):
                    vectors = np.concatenate([_unit(head(state)) for state in states])
                    write[digest](rows, vectors)
                    advance(len(vectors))


def _encoded_texts(
    clips: Mapping[str, Clip], texts: Sequence[str], device: torch.device
) -> Iterator[tuple[str, Int[np.ndarray, " n"], Float[np.ndarray, "n D"]]]:
    """Yield a model's digest, positions of texts and their vectors; texts of similar length go together.

    The caller has entered `computing`, which keeps the casts of all models' weights until the last text.
    """
    groups = _sharing(clips, {digest: _tokenizer_kind(digest, clip) for digest, clip in clips.items()}, "text")
    order = np.argsort([len(text) for text in texts], kind="stable")
    for start in range(0, len(order), TEXT_BATCH):
        rows = order[start : start + TEXT_BATCH]
        tokens: dict[str, Tensor] = {}
        for kind, digests, shared in groups:
            if kind not in tokens:
                tokens[kind] = clips[digests[0]].tokens([texts[row] for row in rows])
            state = shared.trunk(tokens[kind].to(device))
            for digest, head in zip(digests, shared.heads, strict=True):
                yield digest, rows, _unit(head(state))


def _sharing(
    clips: Mapping[str, Clip], kind_of: Mapping[str, str], tower: Tower
) -> list[tuple[str, list[str], Shared]]:
    """Return the kind of input, the digests and the trunk and heads of models that run together."""
    groups: list[tuple[str, list[str], Shared]] = []
    for kind in dict.fromkeys(kind_of.values()):
        alike = [digest for digest in clips if kind_of[digest] == kind]
        for shared in share([clips[digest].model for digest in alike], tower):
            groups.append((kind, [alike[index] for index in shared.members], shared))
    return groups


def _unit(vectors: Tensor) -> Float[np.ndarray, "n D"]:
    """Return vectors as float32 rows of norm 1, which those of a low precision are only nearly."""
    import torch.nn.functional as F  # noqa: N812

    array: np.ndarray = (vectors if vectors.dtype.itemsize == 4 else F.normalize(vectors.float(), dim=-1)).cpu().numpy()
    return array


def _ahead(batches: Iterator[T]) -> Iterator[T]:
    """Yield batches while a thread prepares the next one."""
    done = object()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, batches, done)
        while (batch := coming.result()) is not done:
            coming = pool.submit(next, batches, done)
            yield batch  # type: ignore[misc]  # it is not `done`


def _text_bar(total: int) -> Any:
    """Show progress where texts are many."""
    return progress("encode texts", total, "texts x models") if total > SHOWN_TEXTS else nullcontext(lambda _: None)


def _image_key(cache: FeatureCache, ref: ModelRef, images: Images, precision: str) -> str:
    return cache.key("images", source=ref.digest, precision=precision, images=images.digest)


def _preprocess_kind(clip: Clip) -> str:
    """Return a text that is equal for models with equal preprocessing."""
    return json.dumps(clip.model.visual.preprocess_cfg, sort_keys=True, default=str)


def _tokenizer_kind(digest: str, clip: Clip) -> str:
    """Return a text that is equal for models with equal tokenizers; tokenizers from files count as different."""
    settings = clip.config.get("model_cfg", {}).get("text_cfg", {})
    if {"hf_tokenizer_name", "hf_model_name"} & settings.keys():
        return digest
    keys = ("context_length", "vocab_size", "tokenizer_kwargs")
    return json.dumps([type(clip.tokenizer).__name__, *(settings.get(key) for key in keys)], sort_keys=True)


def _distinct(refs: Sequence[ModelRef]) -> list[ModelRef]:
    return list({ref.digest: ref for ref in refs}.values())
