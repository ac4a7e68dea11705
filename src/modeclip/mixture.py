"""A bundle and a task's class names -> one CLIP: the experts that the task is routed to, as a single model.

The answer of the mixture is `sum_c p_c <u_c, v_c>`, the weighted sum of the experts' cosines. That is the dot product
of concat(p_c u_c) and concat(v_c), so a routed mixture is one CLIP with longer vectors whose weights sit on the text
side alone: image vectors can be stored once and used under any weights, also where every class or query has its own.
An expert without weight is neither loaded nor run.

With ``normalize=True`` both vectors have unit norm, for tools that normalise or take a cosine: image
(concat(v_c) / sqrt(K), 0) and text (concat(p_c u_c), sqrt(1 - sum p_c^2)). Their product is that of the plain vectors
divided by sqrt(K), so the order of the classes is the same.

Source: MoDE Sec. 3.4, eq. 4; class embeddings as in CLIP: each template's text, normalised, averaged, normalised.
Price: one image pass per expert that has weight. ``docs/cost.md`` has what that comes to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from modeclip.bundle import Bundle, load_bundle
from modeclip.clip import Clip, encode_image, encode_text, load_clip
from modeclip.encoders import Encoder, load_encoder
from modeclip.errors import ModeclipError
from modeclip.routing import DEFAULT_TEMPERATURE, Routing, route

if TYPE_CHECKING:
    from PIL.Image import Image

TEXT_BATCH = 1024
NEAREST_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class NearCluster:
    """A fine cluster that a class name lies close to."""

    index: int
    """Of the fine cluster."""
    distance: float
    """Euclidean distance of the class name to its centre (unit vectors: 0 to 2)."""
    expert: int
    """Expert that the cluster belongs to."""
    captions: tuple[str, ...]
    """The captions nearest to its centre."""


@dataclass(frozen=True, kw_only=True)
class ClassReason:
    """Why one class has the weights that it has."""

    name: str
    """The class name."""
    weights: tuple[float, ...]
    """Weight of each expert for this class (the same for all classes unless the rule is ``per_class``)."""
    clusters: tuple[NearCluster, ...]
    """The nearest fine clusters, nearest first."""


@dataclass(frozen=True, kw_only=True)
class Route:
    """The weights of a task, before any model is loaded."""

    classnames: tuple[str, ...]
    """Class names, in the order of the task."""
    rule: str
    """Rule that made the weights."""
    temperature: float
    """Its temperature."""
    routing: Routing
    """Weights, nearest clusters, distances, entropy."""
    bundle: Bundle = field(repr=False)
    """Whose experts they weigh."""
    embeddings: Float[np.ndarray, "L D"] = field(repr=False)
    """Unit vectors of the class names."""

    @property
    def weights(self) -> Float[np.ndarray, "... K"]:
        """Weight of each expert: (K,), or (L, K) under ``per_class``."""
        return self.routing.weights

    @property
    def class_weights(self) -> Float[np.ndarray, "L K"]:
        """Weight of each expert for each class, whatever the rule."""
        return np.broadcast_to(self.weights, (len(self.classnames), self.bundle.num_experts))

    def explain(self) -> list[ClassReason]:
        """Say for each class which fine clusters it met, what they are about and whose they are."""
        centers, cards = self.bundle.fine_centers, self.bundle.clusters
        reasons = []
        for name, embedding, weights in zip(self.classnames, self.embeddings, self.class_weights, strict=True):
            distance = np.linalg.norm(centers.astype(np.float64) - embedding, axis=1)
            nearest = np.argsort(distance, kind="stable")[:NEAREST_SHOWN]
            clusters = tuple(
                NearCluster(
                    index=int(s),
                    distance=float(distance[s]),
                    expert=int(self.bundle.expert_of_fine[s]),
                    captions=tuple(cards[s]["nearest_captions"]),
                )
                for s in nearest
            )
            reasons.append(ClassReason(name=name, weights=tuple(weights.tolist()), clusters=clusters))
        return reasons


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The classes of one picture, best first."""

    classnames: tuple[str, ...]
    """All class names, the most probable first."""
    probabilities: tuple[float, ...]
    """Probability of each, summing to 1."""


class Task(nn.Module):
    """A mixture routed to one task: to every CLIP tool, a CLIP model.

    ``encode_image`` and ``encode_text`` return vectors whose dot product is the weighted sum of the experts' cosines.
    ``preprocess`` and ``tokenizer`` are those of the experts, which share them with their seed.
    """

    def __init__(self, mode: MoDE, route: Route, templates: tuple[str, ...]) -> None:
        """Load the experts that have weight; ``MoDE.task`` is the usual way."""
        super().__init__()
        self._mode, self.route, self.templates = mode, route, templates
        self.active = np.flatnonzero((route.class_weights > 0).any(axis=0))
        clips = [mode.clip(int(expert)) for expert in self.active]
        self._clip = clips[0]
        self.models = nn.ModuleList(clip.model for clip in clips)
        scales = torch.stack([clip.model.logit_scale.detach().reshape(()).exp() for clip in clips])
        share = torch.from_numpy(route.class_weights[:, self.active].mean(axis=0)).to(scales)
        self.logit_scale: Tensor
        self.register_buffer("logit_scale", (share * scales).sum().log())
        self._class_of_tokens = {
            key: index
            for index, name in enumerate(route.classnames)
            for key in self._keys(self.tokenizer([template.replace("{}", name) for template in templates]))
        }

    @property
    def classnames(self) -> tuple[str, ...]:
        """The class names of the task."""
        return self.route.classnames

    @property
    def weights(self) -> Float[np.ndarray, "... K"]:
        """Weight of each expert: (K,), or (L, K) under ``per_class``."""
        return self.route.weights

    @property
    def preprocess(self) -> Any:
        """PIL image -> (3, H, W) tensor."""
        return self._clip.preprocess

    @property
    def tokenizer(self) -> Any:
        """List of texts -> (B, context_length) token ids."""
        return self._clip.tokenizer

    def explain(self) -> list[ClassReason]:
        """Say for each class which clusters it met and what weights that gave."""
        return self.route.explain()

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Encode images with every active expert.

        Args:
            images: (B, 3, H, W) float tensor, as ``preprocess`` makes it.
            normalize: Scale the result to unit norm (and append the 0 that the text side's last number meets).

        Returns:
            (B, D * active experts): concat(v_c); one number more if normalised.
        """
        features = torch.cat([encode_image(model, images) for model in self.models], dim=-1)
        if not normalize:
            return features
        return nn.functional.pad(features / len(self.models) ** 0.5, (0, 1))

    def encode_text(self, text: Tensor | Sequence[str], normalize: bool = False) -> Tensor:
        """Encode texts with every active expert, each times its weight.

        Under ``per_class``, a prompt of one of the task's classes has that class's weights; any other text is routed
        by itself.

        Args:
            text: (B, context_length) token ids, or a list of texts.
            normalize: Append what is missing to unit norm, sqrt(1 - sum p_c^2).

        Returns:
            (B, D * active experts): concat(p_c u_c); one number more if normalised.
        """
        tokens = text if isinstance(text, Tensor) else self.tokenizer(list(text))
        weights = torch.from_numpy(self._weights_of(tokens)[:, self.active]).to(tokens.device)
        features = [encode_text(model, tokens) for model in self.models]
        return _weighted(features, weights, normalize)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return image features, text features (unit norm) and the logit scale, as open_clip's CLIP does."""
        scale = self.logit_scale.exp() * len(self.models) ** 0.5
        return self.encode_image(image, normalize=True), self.encode_text(text, normalize=True), scale

    @torch.inference_mode()
    def classifier(self, normalize: bool = False) -> Tensor:
        """Return the text vector of each class: (L, D * active experts), over all templates."""
        features = [class_features(model, self._clip, self.classnames, self.templates) for model in self.models]
        weights = torch.from_numpy(self.route.class_weights[:, self.active].copy()).to(features[0].device)
        return _weighted(features, weights, normalize)

    @torch.inference_mode()
    def classify(self, images: Tensor | Sequence[Image]) -> list[Prediction]:
        """Name the class of each picture.

        Args:
            images: PIL images, or a (B, 3, H, W) tensor as ``preprocess`` makes it.
        """
        batch = images if isinstance(images, Tensor) else self._clip.images([i.convert("RGB") for i in images])
        logits = self.logit_scale.exp() * self.encode_image(batch) @ self._classifier.T
        probabilities, order = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        return [
            Prediction(
                classnames=tuple(self.classnames[index] for index in row_order),
                probabilities=tuple(row),
            )
            for row, row_order in zip(probabilities.tolist(), order.tolist(), strict=True)
        ]

    @cached_property
    def _classifier(self) -> Tensor:
        return self.classifier()

    def _weights_of(self, tokens: Tensor) -> Float[np.ndarray, "B K"]:
        """Weights of each text of a batch."""
        if self.weights.ndim == 1:
            return np.broadcast_to(self.weights, (len(tokens), len(self.weights))).astype(np.float32)
        keys = self._keys(tokens)
        rows = np.zeros((len(keys), self.weights.shape[1]), dtype=np.float32)
        strangers = [row for row, key in enumerate(keys) if key not in self._class_of_tokens]
        for row, key in enumerate(keys):
            if key in self._class_of_tokens:
                rows[row] = self.weights[self._class_of_tokens[key]]
        if strangers:
            texts = [_decode(self.tokenizer, keys[row]) for row in strangers]
            rows[strangers] = self._mode.route(
                texts, rule=self.route.rule, temperature=self.route.temperature
            ).class_weights
        return rows

    @staticmethod
    def _keys(tokens: Tensor) -> list[tuple[int, ...]]:
        return [tuple(row) for row in tokens.tolist()]


class MoDE:
    """A mixture of data experts: opened from a bundle, asked for one task at a time."""

    def __init__(self, bundle: Bundle) -> None:
        """Make the mixture of an opened bundle; `load` is the usual way."""
        self.bundle = bundle
        self._clips: dict[Path, Clip] = {}

    @classmethod
    def load(cls, source: str | Path) -> MoDE:
        """Open a bundle: a folder, or the id of one on the Hugging Face Hub.

        Raises:
            ModeclipError: There is no bundle there, or its files differ from their hashes.
        """
        return cls(load_bundle(source))

    @cached_property
    def encoder(self) -> Encoder:
        """Encoder that the bundle's captions were clustered with."""
        return load_encoder(self.bundle.encoder)

    def route(self, classnames: Sequence[str], *, rule: str | None = None, temperature: float | None = None) -> Route:
        """Weigh the experts for a task, without loading any of them.

        Args:
            classnames: The names of the task's classes, or the texts of a retrieval corpus.
            rule: One of ``routing.RULES``; None: the bundle's.
            temperature: Of the rule; None: the bundle's for its own rule, else that rule's default.

        Raises:
            ModeclipError: No class names, or an unknown rule.
        """
        if not classnames:
            raise ModeclipError("a task needs at least one class name, got none")
        rule = rule or self.bundle.rule
        if temperature is None:
            own = rule == self.bundle.rule
            temperature = self.bundle.temperature if own else DEFAULT_TEMPERATURE.get(rule, 0.2)
        embeddings = self.encoder.encode(list(classnames))
        routing = route(
            embeddings,
            self.bundle.fine_centers,
            self.bundle.expert_of_fine,
            num_experts=self.bundle.num_experts,
            rule=rule,
            temperature=temperature,
        )
        return Route(
            classnames=tuple(classnames),
            rule=rule,
            temperature=temperature,
            routing=routing,
            bundle=self.bundle,
            embeddings=embeddings,
        )

    def task(
        self,
        classnames: Sequence[str],
        *,
        templates: Sequence[str] | None = None,
        rule: str | None = None,
        temperature: float | None = None,
    ) -> Task:
        """Return the one CLIP that the mixture is for these classes.

        Args:
            classnames: The names of the task's classes.
            templates: Prompts with ``{}`` where the name goes; None: the bundle's.
            rule: One of ``routing.RULES``; None: the bundle's.
            temperature: Of the rule; None: as in `route`.
        """
        templates = tuple(templates or self.bundle.templates)
        for template in templates:
            if "{}" not in template:
                raise ModeclipError(f"template {template!r} has no {{}} where the class name goes")
        return Task(self, self.route(classnames, rule=rule, temperature=temperature), templates)

    def clip(self, expert: int) -> Clip:
        """Return an expert's model, loaded at its first use and then kept."""
        folder = self.bundle.model_folder(expert)
        if folder not in self._clips:
            clip = load_clip(folder)
            clip.model.eval()
            self._clips[folder] = clip
        return self._clips[folder]


@torch.inference_mode()
def class_features(
    model: nn.Module, clip: Clip, classnames: Sequence[str], templates: Sequence[str]
) -> Float[Tensor, "L D"]:
    """Return one unit vector a class: its prompts encoded, normalised, averaged over the templates, normalised.

    Args:
        model: The CLIP that encodes.
        clip: Whose tokenizer is used.
        classnames: L class names.
        templates: Prompts with ``{}`` where the name goes.
    """
    device = next(model.parameters()).device
    total = torch.zeros(())
    for template in templates:
        prompts = [template.replace("{}", name) for name in classnames]
        batches = [prompts[start : start + TEXT_BATCH] for start in range(0, len(prompts), TEXT_BATCH)]
        total = total.to(device) + torch.cat([encode_text(model, clip.tokens(batch).to(device)) for batch in batches])
    return nn.functional.normalize(total, dim=-1)


def _weighted(features: Sequence[Tensor], weights: Float[Tensor, "B k"], normalize: bool) -> Tensor:
    """Return concat(p_c u_c), with the number that completes it to unit norm if asked for."""
    weights = weights.to(features[0].dtype)
    parts = [weights[:, [position]] * part for position, part in enumerate(features)]
    if normalize:
        parts.append((1 - weights.square().sum(dim=-1, keepdim=True)).clamp(min=0).sqrt())
    return torch.cat(parts, dim=-1)


def _decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Turn token ids back into the text, without the marks of its start and end."""
    specials = set(tokenizer.all_special_ids)
    return str(tokenizer.decode([token for token in tokens if token and token not in specials])).strip() or "?"
