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
from jaxtyping import Float

from modeclip.errors import ModeclipError, unknown
from modeclip.mixture.bundle import load_bundle
from modeclip.mixture.manifest import MANIFEST_FILE
from modeclip.mixture.mode import MoDE
from modeclip.models.clip import Clip, encode_image, encode_text, without_gradients
from modeclip.models.pool import ModelPool, ModelRef
from modeclip.system.devices import choose_device
from modeclip.system.paths import expand_homes

if TYPE_CHECKING:
    from PIL.Image import Image

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
        cls, spec: str | Path, *, device: str = "auto", encoder: str | None = None, trust_encoder: bool = False
    ) -> SearchModel:
        """Open a model by its specification, without loading its weights where they lie in a folder.

        Args:
            spec: A bundle, ``BUNDLE#expert-1``, a model folder, ``NAME@TAG`` or ``hf-hub:...``.
            device: Where it computes.
            encoder: Encoder of a bundle's captions, as for `load_bundle`.
            trust_encoder: As for `load_bundle`.

        Raises:
            ModeclipError: There is no such model, or it has no weights.
        """
        spec, device = expand_homes(str(spec)), str(choose_device(device))
        place, _, member = spec.partition("#")
        pool = ModelPool(device=device)
        if (Path(place) / MANIFEST_FILE).is_file():
            bundle = load_bundle(place, encoder=encoder, trust_encoder=trust_encoder)
            mode = MoDE(bundle.choose(member) if member else bundle, pool=pool)
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
        """Numbers in a vector of each member; all of them are loaded, since only they know."""
        return tuple(int(self._clip(ref).config["model_cfg"]["embed_dim"]) for ref in self.refs)

    @without_gradients()
    def encode_images(self, pictures: Sequence[Image]) -> Float[np.ndarray, "n D"]:
        """Return concat(v_c) of RGB pictures, or concat(p_c v_c) where every image has weights of its own."""
        parts = []
        for start in range(0, len(pictures), IMAGES_AT_ONCE):
            batch = self._clip(self.refs[0]).images(pictures[start : start + IMAGES_AT_ONCE]).to(self.device)
            if self.mode is None:
                vectors = encode_image(self._clip(self.refs[0]).model, batch)
            else:
                vectors = self._images.encode_image(batch)
            parts.append(vectors.float().cpu().numpy())
        return np.concatenate(parts)

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
        task = self.mode.task([ANY_TEXT], rule=None if self.per_image else "uniform")
        task.to(self.device)
        return task

    def _clip(self, ref: ModelRef) -> Clip:
        return self.pool.get(ref)
