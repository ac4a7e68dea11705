"""What an index asks its model: vectors of images once, vectors of texts and pictures at each query.

The model is one CLIP or a routed mixture. A mixture's image vector is concat(v_c) over all of its experts, and a text's
is concat(p_c u_c) with the weights that the text is routed by, so one index of images answers every query under its
own weights (`modeclip.mixture.routed_clip`). Where a mixture's clusters are of images, the weights sit on the images'
side and are part of what the index stores.

Source: MoDE (arXiv 2404.16030) Sec. 3.4: a text that asks for an image is a task of its own (eq. 7).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float

from modeclip.data.images import to_rgb
from modeclip.errors import ModeclipError, unknown
from modeclip.mixture.bundle import load_bundle
from modeclip.mixture.manifest import MANIFEST_FILE, split_expert
from modeclip.mixture.mode import MoDE
from modeclip.models.clip import Clip, encode_image, encode_text, without_gradients
from modeclip.models.pool import ModelPool, ModelRef
from modeclip.models.settings import CLIP_CONFIG, check_clip_folder
from modeclip.search.query import Asked, Query
from modeclip.system.devices import choose_device
from modeclip.system.paths import expand_homes

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from modeclip.mixture.routed_clip import RoutedClip

IMAGES_AT_ONCE = 128
"""Images that go through the towers together; a CPU's cache holds no more."""
TEXTS_AT_ONCE = 512
ANY_TEXT = "image"
"""A class name that stands for nothing: it opens a task of which only the image side is used."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SearchModel:
    """One CLIP, or a routed mixture, with names and digests of its members."""

    spec: str
    """What it was opened from: a bundle, BUNDLE#expert-1, a model folder or NAME@TAG."""
    refs: tuple[ModelRef, ...]
    """Its K members: the experts, or the one model."""
    names: tuple[str, ...]
    """Names of the members."""
    mode: MoDE | None
    """The mixture; None for one CLIP."""
    pool: ModelPool
    """Where the one CLIP comes from."""
    device: str

    @classmethod
    def open(
        cls,
        spec: str | Path,
        *,
        device: str = "auto",
        encoder: str | None = None,
        trust_encoder: bool = False,
        max_memory: int | None = None,
    ) -> SearchModel:
        """Open a model by its specification, without loading its weights where they lie in a folder.

        Args:
            spec: A bundle, ``BUNDLE#expert-1``, a model folder, ``NAME@TAG`` or ``hf-hub:...``.
            device: Where it computes.
            encoder: Encoder of a bundle's captions, as for `load_bundle`.
            trust_encoder: As for `load_bundle`.
            max_memory: Bytes that the weights of members may take at a time, as for `MoDE`; None: any number.

        Raises:
            ModeclipError: There is no such model, it has no weights, or not even one member fits.
        """
        spec, device = expand_homes(str(spec)), str(choose_device(device))
        place, member = split_expert(spec)
        pool = ModelPool(max_bytes=max_memory, device=device)
        if (Path(place) / MANIFEST_FILE).is_file():
            bundle = load_bundle(place, encoder=encoder, trust_encoder=trust_encoder)
            mode = MoDE(bundle.choose(member) if member else bundle, pool=pool, max_memory=max_memory)
            names = tuple(expert.name for expert in mode.bundle.experts)
            return cls(spec=spec, refs=mode.bundle.models, names=names, mode=mode, pool=pool, device=device)
        if member:
            raise ModeclipError(f"--model {spec}: {place} is no bundle, so it has no expert {member}; correct the path")
        ref = ModelRef.of(Path(spec).name or spec, spec)
        return cls(spec=spec, refs=(ref,), names=(ref.name,), mode=None, pool=pool, device=device)

    @property
    def digests(self) -> tuple[str, ...]:
        """SHA-256 of the weights and settings of each member."""
        return tuple(ref.digest for ref in self.refs)

    @property
    def per_image(self) -> bool:
        """Whether the weights sit on the images' side."""
        return self.mode is not None and self.mode.per_image

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Numbers in a vector of each member; what lies in no folder is loaded, since only the model knows."""
        folders = [Path(str(ref.spec).removeprefix("local-dir:")) for ref in self.refs]
        configs = [
            check_clip_folder(folder) if (folder / CLIP_CONFIG).is_file() else self._clip(ref).config
            for ref, folder in zip(self.refs, folders, strict=True)
        ]
        return tuple(int(config["model_cfg"]["embed_dim"]) for config in configs)

    @cached_property
    def front(self) -> Clip:
        """What prepares pictures and texts for all members, without weights."""
        return self._clip(self.refs[0]).without_weights()

    def encode_images(self, pictures: Sequence[Image]) -> Float[np.ndarray, "n D"]:
        """Return concat(v_c) of RGB pictures, or concat(p_c v_c) where every image has weights of its own."""
        starts = range(0, len(pictures), IMAGES_AT_ONCE)
        return np.concatenate(
            [self.encode_batch(self.front.images(pictures[start : start + IMAGES_AT_ONCE])) for start in starts]
        )

    @without_gradients()
    def encode_batch(
        self,
        batch: Tensor,
        asked: Bool[np.ndarray, "n K"] | None = None,
        weights: Float[np.ndarray, "n K"] | None = None,
    ) -> Float[np.ndarray, "n D"]:
        """Return the vectors of prepared pictures, (n, 3, H, W).

        Args:
            batch: The pictures, as `front` prepares them.
            asked: Which members each of them is for, as for `RoutedClip.encode_image`; None: all.
            weights: Weights of these pictures, where every image has its own, as for `RoutedClip.encode_image`.
        """
        batch = batch.to(self.device)
        if self.mode is None:
            vectors = encode_image(self._clip(self.refs[0]).model, batch)
        else:
            vectors = self._images.encode_image(batch, asked=asked, weights=weights)
        return np.asarray(vectors.float().cpu())

    def weigh(self, texts: Sequence[str], expert: str | None = None) -> Float[np.ndarray, "T K"]:
        """Return the weights of the members for each text: routed by itself, or all of it for one member.

        Raises:
            ModeclipError: There is no member of this name.
        """
        if expert is not None and expert not in self.names:
            raise unknown(f"expert of {self.spec}", expert, self.names)
        if expert is not None:
            return np.tile(np.array([name == expert for name in self.names], float), (len(texts), 1))
        if self.mode is None or self.per_image:
            return np.full((len(texts), len(self.refs)), 1 / len(self.refs))
        return np.asarray(self.mode.route_queries(texts))

    def shares(self, expert: str | None = None) -> Float[np.ndarray, "1 K"]:
        """Return the weights for a picture: all members alike, or one of them alone.

        Raises:
            ModeclipError: There is no member of this name.
        """
        return self.weigh([ANY_TEXT], expert) if expert else np.full((1, len(self.refs)), 1 / len(self.refs))

    @without_gradients()
    def encode_texts(self, texts: Sequence[str], weights: Float[np.ndarray, "T K"]) -> Float[np.ndarray, "T D"]:
        """Return concat(p_c u_c) of texts, whose product with an image vector is the mixture's score of the image.

        A member without weight for any of the texts is not run. Where the images have the weights, the text's vector
        is concat(u_c), 0 for members whose weight here is 0.
        """
        parts = []
        for number, (ref, size) in enumerate(zip(self.refs, self.sizes, strict=True)):
            own = (weights[:, number] > 0).astype(float) if self.per_image else weights[:, number]
            part = np.zeros((len(texts), size), np.float32)
            rows = np.flatnonzero(own)
            for start in range(0, len(rows), TEXTS_AT_ONCE):
                some, clip = rows[start : start + TEXTS_AT_ONCE], self._clip(ref)
                tokens = clip.tokens([texts[row] for row in some]).to(self.device)
                part[some] = own[some, None] * encode_text(clip.model, tokens).float().cpu().numpy()
            parts.append(part)
        return np.concatenate(parts, axis=1)

    def facts(self) -> dict[str, Any]:
        """Return what decides the vectors, as JSON."""
        request = None if self.mode is None or not self.per_image else self.mode.request()
        rule = {} if request is None else {"rule": request.rule, "temperature": request.temperature}
        return {"digests": list(self.digests), **rule}

    @cached_property
    def _images(self) -> RoutedClip:
        """The image side of the mixture, with all of its experts."""
        assert self.mode is not None
        everyone = len(self.refs)  # whatever the budget of a task
        task = self.mode.task([ANY_TEXT], rule=None if self.per_image else "uniform", max_experts=everyone)
        task.to(self.device)
        return task

    def _clip(self, ref: ModelRef) -> Clip:
        return self.pool.get(ref)


def encode_query(model: SearchModel, query: Query) -> Asked:
    """Encode what is looked for."""
    texts = texts_of(query)
    weights = model.weigh(texts, query.expert) if texts else np.empty((0, len(model.refs)))
    vectors = model.encode_texts(texts, weights) if texts else np.empty((0, sum(model.sizes)), np.float32)
    picture = None if query.image is None else model.encode_images([to_rgb(query.image)])[0]
    return join_parts(model, query, weights, vectors, picture)


def texts_of(query: Query) -> list[str]:
    """Return the texts of a query: what is wanted, then what is not."""
    return [*([query.text] if query.text is not None else []), *query.negatives]


def join_parts(
    model: SearchModel,
    query: Query,
    weights: Float[np.ndarray, "T K"],
    vectors: Float[np.ndarray, "T D"],
    picture: Float[np.ndarray, " D"] | None,
) -> Asked:
    """Put the encoded parts of a query together.

    Args:
        model: What encoded them.
        query: What is looked for.
        weights: Weights of its texts.
        vectors: Vectors of its texts, as `SearchModel.encode_texts` returns them.
        picture: Vector of its picture, as `SearchModel.encode_images` returns it.
    """
    shares = model.shares(query.expert)[0]
    own = shares if query.text is None else weights[0]
    encoded, parts = list(vectors), list[tuple[float, np.ndarray]]()
    if query.text is not None:
        parts.append((1 - query.image_weight if picture is not None else 1.0, encoded.pop(0)))
    if picture is not None:
        picture = picture * np.repeat(shares, model.sizes).astype(np.float32)
        parts.append((query.image_weight if query.text is not None else 1.0, picture))
    parts += [(-query.negative_weight, vector) for vector in encoded]
    return Asked(weights=own, parts=tuple(parts), text=query.text)
