"""A bundle -> the mixture, which makes one CLIP of any task: the weights, and the experts in memory.

A task whose classes are known is routed once (`route`), queries for images each by itself (`route_queries`), images
each by itself where the clusters are of images (`route_images`). Of clusters of pairs (``clip-both``) the paper weighs
every image with every class, and finds little gain for it; here an image meets the image half of the centres.

Under a budget, a task uses no more experts than it allows, and no more are in memory at a time for all tasks together:
what was used longest ago leaves, and is loaded again when its task uses it.

Source: MoDE Sec. 3.4; Sec. 5.3 for clusters of images.
Price: routing costs the class names' embeddings; a model is loaded at its first use.
"""

from __future__ import annotations

import io
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakSet

import numpy as np
from jaxtyping import Float
from safetensors import safe_open

from modeclip.data.prompts import check_templates
from modeclip.errors import ModeclipError
from modeclip.mixture.bundle import Bundle, load_bundle
from modeclip.mixture.explain import Asked, Route
from modeclip.mixture.routed_clip import RoutedClip
from modeclip.mixture.rules import DEFAULT_TEMPERATURE, embed_classes, entropy, keep_best, route
from modeclip.models.clip import WEIGHTS_FILE, Clip, load_clip
from modeclip.models.encoders import Encoder, PairEncoder, load_any_encoder

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["MoDE", "RoutedClip"]


class MoDE:
    """A mixture of data experts: opened from a bundle, asked for one task at a time."""

    def __init__(self, bundle: Bundle, *, max_experts: int | None = None, max_memory: int | None = None) -> None:
        """Make the mixture of an opened bundle; `load` is the usual way.

        Args:
            bundle: The bundle.
            max_experts: How many experts a task may use, and how many are in memory at a time, for all tasks together;
                None: all.
            max_memory: Bytes that the weights of these experts may take; None: any number.

        Raises:
            ModeclipError: Not even one expert fits.
        """
        self.bundle = bundle
        if max_experts is not None and max_experts < 1:
            raise ModeclipError(f"max_experts: expected 1 or more, got {max_experts}")
        if max_memory is not None:
            folders = {bundle.model_folder(k) for k in range(bundle.num_experts)}
            largest = max(_bytes_in_memory(folder / WEIGHTS_FILE) for folder in folders)
            if max_memory < largest:
                raise ModeclipError(
                    f"max_memory: an expert takes {largest:,} bytes, more than the {max_memory:,} given"
                )
            max_experts = min(max_memory // largest, max_experts or bundle.num_experts)
        self.max_experts = max_experts
        self._clips: OrderedDict[Path, Clip] = OrderedDict()
        self._tasks: WeakSet[RoutedClip] = WeakSet()

    @classmethod
    def load(cls, source: str | Path, *, max_experts: int | None = None, max_memory: int | None = None) -> MoDE:
        """Open a bundle: a folder, or the id of one on the Hugging Face Hub.

        Raises:
            ModeclipError: There is no bundle there, its files differ from their hashes, or no expert fits.
        """
        return cls(load_bundle(source), max_experts=max_experts, max_memory=max_memory)

    @cached_property
    def encoder(self) -> Encoder | PairEncoder:
        """Encoder that the bundle was clustered with."""
        return load_any_encoder(self.bundle.encoder)

    @property
    def per_image(self) -> bool:
        """Whether the clusters are of images, so that every image has weights of its own."""
        return not isinstance(self.encoder, Encoder)

    def ask(self, rule: str | None, temperature: float | None, max_experts: int | None) -> Asked:
        """Fill in what is not said: the bundle's rule and its temperature, else the rule's own; this budget."""
        rule = rule or self.bundle.rule
        if temperature is None:
            own = rule == self.bundle.rule
            temperature = self.bundle.temperature if own else DEFAULT_TEMPERATURE.get(rule, 0.2)
        if max_experts is None:
            max_experts = self.max_experts
        elif max_experts < 1:
            raise ModeclipError(f"max_experts: expected 1 or more, got {max_experts}")
        return Asked(rule=rule, temperature=temperature, max_experts=max_experts)

    def route(
        self,
        classnames: Sequence[str],
        *,
        templates: Sequence[str] | None = None,
        rule: str | None = None,
        temperature: float | None = None,
        max_experts: int | None = None,
        each: bool = False,
    ) -> Route:
        """Weigh the experts for a task, without loading any of them.

        Args:
            classnames: The names of the task's classes, or the texts of a retrieval corpus.
            templates: Prompts with ``{}``, whose mean stands for the name (published code); None: the name (paper).
            rule: One of ``routing.RULES``; None: the bundle's.
            temperature: Of the rule; None: the bundle's for its own rule, else that rule's default.
            max_experts: How many may have weight; None: as many as the mixture may use.
            each: Whether every text is a task of its own, as queries for images are.

        Raises:
            ModeclipError: No class names, an unknown rule, a template without ``{}``, or the clusters are of images.
        """
        if not classnames:
            raise ModeclipError("a task needs at least one class name, got none")
        if not isinstance(self.encoder, Encoder):
            raise ModeclipError(
                f"bundle {self.bundle.path}: its clusters are of images (encoder {self.bundle.encoder}), so weights "
                "are of images, not of class names; use MoDE.route_images, or `modeclip route --images FILE...`"
            )
        embeddings = embed_classes(self.encoder.encode, classnames, templates or ())
        return self.route_rows(classnames, embeddings, self.ask(rule, temperature, max_experts), each=each)

    def route_queries(
        self, texts: Sequence[str], *, rule: str | None = None, temperature: float | None = None
    ) -> Float[np.ndarray, "L K"]:
        """Weigh the experts for every text by itself, as image retrieval does; arguments as for `route`."""
        return self.route(texts, rule=rule, temperature=temperature, each=True).weights

    def route_images(
        self,
        embeddings: Float[np.ndarray, "N D"],
        *,
        rule: str | None = None,
        temperature: float | None = None,
        max_experts: int | None = None,
    ) -> Float[np.ndarray, "N K"]:
        """Weigh the experts for every image by itself, where the clusters are of images.

        Args:
            embeddings: What `embed_images` returns.
            rule: As for `route`.
            temperature: As for `route`.
            max_experts: How many may have weight for an image.
        """
        names = [str(row) for row in range(len(embeddings))]
        return self.route_rows(names, embeddings, self.ask(rule, temperature, max_experts), each=True).weights

    def embed_images(self, pictures: Sequence[Image]) -> Float[np.ndarray, "N D"]:
        """Embed pictures as the clusters were; of pairs, the half that is the image's.

        Raises:
            ModeclipError: The clusters are of texts, or of pairs by an encoder whose halves are not known.
        """
        encoder, name = self.encoder, self.bundle.encoder
        if isinstance(encoder, Encoder):
            raise ModeclipError(f"bundle {self.bundle.path}: its clusters are of texts (encoder {name}), not of images")
        if encoder.encodes == "both" and not name.startswith("clip-both:"):
            raise ModeclipError(
                f"encoder {name}: which part of its vectors is the image's is not known; use clip-both:"
            )
        vectors = encoder.encode_pairs([""] * len(pictures), [_as_png(picture) for picture in pictures])
        return vectors[:, encoder.dimension // 2 :] if encoder.encodes == "both" else vectors

    def route_rows(
        self, names: Sequence[str], embeddings: Float[np.ndarray, "L D"], asked: Asked, *, each: bool
    ) -> Route:
        """Weigh the experts for vectors of texts or images; `route` and `route_images` are the usual ways.

        Args:
            names: A name a row, for the explanation.
            embeddings: By the bundle's encoder; of images also the half of the centres that is the image's.
            asked: Rule, temperature, budget.
            each: Whether every row is a task of its own. For images, each has its own budget.
        """
        bundle = self.bundle
        per_row = each and self.per_image
        routing = route(
            embeddings,
            bundle.fine_centers[:, -embeddings.shape[1] :] if per_row else bundle.fine_centers,
            bundle.expert_of_fine,
            num_experts=bundle.num_experts,
            rule=asked.rule,
            temperature=asked.temperature,
            each=each,
            max_experts=None if per_row else asked.max_experts,
        )
        if per_row and asked.max_experts is not None:
            weights = keep_best(routing.weights, asked.max_experts, per_row=True)
            routing = replace(routing, weights=weights, entropy=entropy(weights))
        return Route(
            classnames=tuple(names),
            asked=asked,
            routing=routing,
            bundle=bundle,
            embeddings=embeddings,
        )

    def task(
        self,
        classnames: Sequence[str],
        *,
        templates: Sequence[str] | None = None,
        route_by_prompts: bool = False,
        rule: str | None = None,
        temperature: float | None = None,
        max_experts: int | None = None,
        each: bool = False,
    ) -> RoutedClip:
        """Return the one CLIP that the mixture is for these classes.

        Args:
            classnames: The names of the task's classes, or queries for images.
            templates: Prompts with ``{}`` where the name goes; None: the bundle's.
            route_by_prompts: Whether the prompts decide the weights, as in the published code, or the plain names.
            rule: As for `route`.
            temperature: As for `route`.
            max_experts: As for `route`.
            each: As for `route`.
        """
        templates = tuple(templates or self.bundle.templates)
        check_templates(templates, "task")
        asked, routed = self.ask(rule, temperature, max_experts), None
        if not self.per_image:
            routed = self.route(
                classnames,
                templates=templates if route_by_prompts else None,
                rule=rule,
                temperature=temperature,
                max_experts=max_experts,
                each=each,
            )
        return RoutedClip(self, classnames, templates, asked, routed)

    def clip(self, expert: int) -> Clip:
        """Return an expert's model, loaded if need be; under a budget, the one used longest ago leaves for it."""
        folder = self.bundle.model_folder(expert)
        if folder not in self._clips:
            while self.max_experts is not None and len(self._clips) >= self.max_experts:
                _, oldest = self._clips.popitem(last=False)
                for task in self._tasks:
                    task.forget(oldest.model)
                del oldest
            clip = load_clip(folder)
            clip.model.eval()
            self._clips[folder] = clip
        self._clips.move_to_end(folder)
        return self._clips[folder]

    def watch(self, task: RoutedClip) -> None:
        """Remember a task, which has to let go of experts that leave memory."""
        self._tasks.add(task)


def _bytes_in_memory(weights: Path) -> int:
    """Return what a file of weights takes once it is loaded, as float32 whatever the file holds; reads its header."""
    with safe_open(weights, "numpy") as file:
        return sum(4 * math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def _as_png(picture: Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
