"""The experts that a task is routed to, as one CLIP: their vectors behind one another, weights on one side.

The answer of the mixture is `sum_c p_c <u_c, v_c>`, the weighted sum of the experts' cosines. That is the dot product
of concat(p_c u_c) and concat(v_c), so a routed mixture is one CLIP with longer vectors whose weights sit on the text
side alone: image vectors can be stored once and used under any weights, also where every class or query has its own.
Where the clusters are of images, every image has weights and they sit on its side. An expert without weight is neither
loaded nor run.

With ``normalize=True`` both vectors have unit norm, for tools that normalise or take a cosine: image
(concat(v_c) / sqrt(K), 0) and text (concat(p_c u_c), sqrt(1 - sum p_c^2)). Their product is that of the plain vectors
divided by sqrt(K), so the order of the classes is the same.

Source: MoDE Sec. 3.4, eq. 4; class embeddings as in CLIP: each template's text, normalised, averaged, normalised.
Price: one image pass per expert that has weight. ``docs/cost.md`` has what that comes to.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor, nn

from modeclip.data.prompts import fill
from modeclip.errors import ModeclipError, unknown
from modeclip.mixture.explain import Asked, ClassReason, Route
from modeclip.mixture.rules import MIXES, reweigh
from modeclip.models.clip import CONFIG_FILE, WEIGHTS_FILE, Clip, encode_image, encode_text
from modeclip.models.features import class_features

if TYPE_CHECKING:
    from PIL.Image import Image

    from modeclip.mixture.bundle import Bundle


@runtime_checkable
class Mixture(Protocol):
    """What a routed CLIP asks of the mixture that it belongs to; `mixture.MoDE` is it."""

    @property
    def bundle(self) -> Bundle:
        """Whose experts they are."""

    def clip(self, expert: int) -> Clip:
        """Return an expert's model, loaded if need be."""

    def watch(self, task: RoutedClip) -> None:
        """Tell the task when an expert leaves memory."""

    def embed_images(self, pictures: Sequence[Image]) -> Float[np.ndarray, "N D"]:
        """Return the vectors that images are routed by."""

    def route_images(
        self,
        embeddings: Float[np.ndarray, "N D"],
        *,
        rule: str | None = None,
        temperature: float | None = None,
        max_experts: int | None = None,
    ) -> Float[np.ndarray, "N K"]:
        """Weigh the experts for every image by itself."""

    def route_queries(
        self, texts: Sequence[str], *, rule: str | None = None, temperature: float | None = None
    ) -> Float[np.ndarray, "L K"]:
        """Weigh the experts for every text by itself."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The classes of one picture, best first."""

    classnames: tuple[str, ...]
    """All class names, the most probable first."""
    probabilities: tuple[float, ...]
    """Probability of each, summing to 1."""


class RoutedClip(nn.Module):
    """A mixture routed to one task: to every CLIP tool, a CLIP model.

    ``encode_image`` and ``encode_text`` return vectors whose dot product is the weighted sum of the experts' cosines.
    ``preprocess`` and ``tokenizer`` are those of the experts, which share them with their seed.
    """

    def __init__(
        self, mode: Mixture, classnames: Sequence[str], templates: tuple[str, ...], asked: Asked, route: Route | None
    ) -> None:
        """Load the experts that have weight; ``MoDE.task`` is the usual way.

        Args:
            mode: The mixture.
            classnames: Names of the task's classes.
            templates: Prompts with ``{}`` where the name goes.
            asked: Rule, temperature and budget.
            route: The weights; None: every image has its own, for which ``mode`` is asked.
        """
        super().__init__()
        self.classnames, self.templates, self.asked = tuple(classnames), templates, asked
        self._mode, self._route = mode, route
        shares = np.full((1, mode.bundle.num_experts), 1 / mode.bundle.num_experts)
        if route is not None:
            shares = route.class_weights
        self.active = np.flatnonzero((shares > 0).any(axis=0))
        self.models = nn.ModuleDict()
        self._scales = [logit_scale_of(mode.bundle.model_folder(int(expert))) for expert in self.active]
        self.logit_scale: Tensor
        scale = torch.tensor(shares[:, self.active].mean(axis=0) @ self._scales)
        self.register_buffer("logit_scale", scale.float().log())
        mode.watch(self)
        first = mode.clip(int(self.active[0]))
        self.preprocess, self.tokenizer = first.preprocess, first.tokenizer
        for expert in self.active if route is not None else ():
            self._model(int(expert))
        self._class_of_tokens: dict[tuple[int, ...], int] = {}
        if route is not None and route.weights.ndim == 2:
            self._class_of_tokens = {
                key: index
                for index, name in enumerate(self.classnames)
                for key in self._keys(self.tokenizer([fill(template, name) for template in templates]))
            }

    @property
    def route(self) -> Route:
        """The weights with their reasons.

        Raises:
            ModeclipError: Every image has its own.
        """
        if self._route is None:
            raise ModeclipError(f"{self._mode.bundle.path}: every image has its own weights; use MoDE.route_images")
        return self._route

    @property
    def weights(self) -> Float[np.ndarray, "... K"]:
        """Weight of each expert: (K,), or a row a class (L, K)."""
        return self.route.weights

    def explain(self) -> list[ClassReason]:
        """Say for each class which clusters it met and what weights that gave."""
        return self.route.explain()

    def encode_image(
        self, images: Tensor, normalize: bool = False, weights: Float[np.ndarray, "B K"] | None = None
    ) -> Tensor:
        """Encode images with every active expert.

        Args:
            images: (B, 3, H, W) float tensor, as ``preprocess`` makes it.
            normalize: Scale the result to unit norm (and append the number that the other side has, or needs).
            weights: Where every image has weights, those of these images; None: they are routed as the tensor shows
                them.

        Returns:
            (B, D * active experts): concat(v_c), or concat(p_c v_c); one number more if normalised.
        """
        if self._route is not None:
            return _plain([encode_image(self._model(int(expert)), images) for expert in self.active], normalize)
        if weights is None:
            pictures = _pictures(images, self._mode.clip(int(self.active[0])).model.visual)
            weights = self._weights_of_images(pictures)
        features = []
        for expert in self.active.tolist():
            rows = torch.from_numpy(weights[:, expert] > 0).to(images.device)
            part = images.new_zeros(len(images), _dimension(self._mode.bundle.model_folder(expert)))
            if rows.any():
                part[rows] = encode_image(self._model(expert), images[rows]).to(part.dtype)
            features.append(part)
        return _weighted(features, weights[:, self.active], normalize)

    def encode_text(self, text: Tensor | Sequence[str], normalize: bool = False) -> Tensor:
        """Encode texts with every active expert, each times its weight.

        Where every class has its own weights, a prompt of one of the task's classes has that class's; any other text
        is routed by itself, to the same experts.

        Args:
            text: (B, context_length) token ids, or a list of texts.
            normalize: Append what is missing to unit norm, sqrt(1 - sum p_c^2).

        Returns:
            (B, D * active experts): concat(p_c u_c); one number more if normalised.
        """
        tokens = text if isinstance(text, Tensor) else self.tokenizer(list(text)).to(self.logit_scale.device)
        features = [encode_text(self._model(int(expert)), tokens) for expert in self.active]
        return self._on_text_side(features, None if self._route is None else self._weights_of(tokens), normalize)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return image features, text features (unit norm) and the logit scale, as open_clip's CLIP does."""
        scale = self.logit_scale.exp() * len(self.active) ** 0.5
        return self.encode_image(image, normalize=True), self.encode_text(text, normalize=True), scale

    @torch.inference_mode()
    def classifier(self, normalize: bool = False) -> Tensor:
        """Return the text vector of each class: (L, D * active experts), over all templates."""
        weights = None if self._route is None else self._route.class_weights
        return self._on_text_side(self._class_vectors(), weights, normalize)

    @torch.inference_mode()
    def classify(self, images: Tensor | Sequence[Image], mix: str = "cosines") -> list[Prediction]:
        """Name the class of each picture.

        Args:
            images: PIL images, or a (B, 3, H, W) tensor as ``preprocess`` makes it.
            mix: What of the experts is weighted and summed, one of ``routing.MIXES``.

        Raises:
            ModeclipError: ``mix`` is none of them.
        """
        if mix not in MIXES:
            raise unknown("mix", mix, MIXES)
        first, weights = self._mode.clip(int(self.active[0])), None
        if isinstance(images, Tensor):
            batch, pictures = images, []
        else:
            pictures = [image.convert("RGB") for image in images]
            batch = first.images(pictures).to(self.logit_scale.device)
        if self._route is None:
            weights = self._weights_of_images(pictures or _pictures(batch, first.model.visual))
        if mix == "cosines":
            logits = self.logit_scale.exp() * self.encode_image(batch, weights=weights) @ self._classifier.T
        else:
            shares = self.route.class_weights.T if weights is None else weights.T[:, :, None]
            logits = self._log_probabilities(batch, shares)
        probabilities, order = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        return [
            Prediction(
                classnames=tuple(self.classnames[index] for index in row_order),
                probabilities=tuple(row),
            )
            for row, row_order in zip(probabilities.tolist(), order.tolist(), strict=True)
        ]

    def forget(self, model: nn.Module) -> None:
        """Let go of a model that has to leave memory; it is loaded again when it is used."""
        for key in [key for key, own in self.models.items() if own is model]:
            del self.models[key]

    def _model(self, expert: int) -> nn.Module:
        """Return an expert's model on this task's device, loaded if it is not in memory."""
        model: nn.Module = self._mode.clip(expert).model
        self.models[str(expert)] = model
        first = next(model.parameters())
        if (first.device, first.dtype) != (self.logit_scale.device, self.logit_scale.dtype):
            model.to(self.logit_scale)
        return model

    def _on_text_side(self, features: list[Tensor], weights: np.ndarray | None, normalize: bool) -> Tensor:
        return (
            _plain(features, normalize) if weights is None else _weighted(features, weights[:, self.active], normalize)
        )

    @cached_property
    def _classifier(self) -> Tensor:
        return self.classifier()

    def _class_vectors(self) -> list[Tensor]:
        """Return the vectors of the classes by each active expert, (L, D)."""
        experts = self.active.tolist()
        return [
            class_features(self._model(expert), self._mode.clip(expert), self.classnames, self.templates)
            for expert in experts
        ]

    @cached_property
    def _words(self) -> list[Tensor]:
        return self._class_vectors()

    def _log_probabilities(self, images: Tensor, weights: Float[np.ndarray, "K ..."]) -> Tensor:
        """Return the weighted sums of the experts' log-probabilities: (B, L); weights are (K, L) or (K, B, 1)."""
        total = torch.zeros((), device=images.device)
        for expert, scale, words in zip(self.active.tolist(), self._scales, self._words, strict=True):
            cosines = encode_image(self._model(expert), images) @ words.T
            shares = torch.from_numpy(np.array(weights[expert])).to(cosines)
            total = total + shares * (scale * cosines).log_softmax(dim=-1)
        return total

    def _weights_of_images(self, pictures: Sequence[Image]) -> Float[np.ndarray, "B K"]:
        asked, embeddings = self.asked, self._mode.embed_images(pictures)
        return self._mode.route_images(
            embeddings, rule=asked.rule, temperature=asked.temperature, max_experts=asked.max_experts
        )

    def _weights_of(self, tokens: Tensor) -> Float[np.ndarray, "B K"]:
        """Weights of each text of a batch."""
        if self.weights.ndim == 1:
            return np.broadcast_to(self.weights, (len(tokens), len(self.weights)))
        keys = self._keys(tokens)
        rows = np.zeros((len(keys), self.weights.shape[1]))
        strangers = [row for row, key in enumerate(keys) if key not in self._class_of_tokens]
        for row, key in enumerate(keys):
            if key in self._class_of_tokens:
                rows[row] = self.weights[self._class_of_tokens[key]]
        if strangers:
            texts = [_decode(self.tokenizer, keys[row]) for row in strangers]
            own = self._mode.route_queries(texts, rule=self.asked.rule, temperature=self.asked.temperature)
            is_active = np.zeros(rows.shape[1])
            is_active[self.active] = 1.0
            rows[strangers] = reweigh(own, is_active)
        return rows

    @staticmethod
    def _keys(tokens: Tensor) -> list[tuple[int, ...]]:
        return [tuple(row) for row in tokens.tolist()]


def _plain(features: Sequence[Tensor], normalize: bool) -> Tensor:
    """Return concat(v_c), scaled to unit norm with a 0 behind it if asked for."""
    vectors = torch.cat(list(features), dim=-1)
    return nn.functional.pad(vectors / len(features) ** 0.5, (0, 1)) if normalize else vectors


def _weighted(features: Sequence[Tensor], weights: Float[np.ndarray, "B k"], normalize: bool) -> Tensor:
    """Return concat(p_c u_c), with the number that completes it to unit norm if asked for."""
    p = torch.from_numpy(np.array(weights)).to(features[0])
    parts = [p[:, [position]] * part for position, part in enumerate(features)]
    if normalize:
        parts.append((1 - p.square().sum(dim=-1, keepdim=True)).clamp(min=0).sqrt())
    return torch.cat(parts, dim=-1)


def logit_scale_of(folder: Path) -> float:
    """Return exp(logit scale) of a model folder, reading nothing else of its weights."""
    with safe_open(folder / WEIGHTS_FILE, "pt") as file:
        return float(file.get_tensor("logit_scale").float().exp())


def _dimension(folder: Path) -> int:
    """Return the length of a model's vectors."""
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    return int(config["model_cfg"]["embed_dim"])


def _pictures(images: Tensor, tower: Any) -> list[Image]:
    """Return the pictures that a preprocessed batch shows: exact where they were resized as pictures."""
    from PIL import Image as Pictures

    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (tower.image_mean, tower.image_std))
    pixels = (images.detach().float().cpu() * std + mean).mul(255).round().clamp(0, 255).to(torch.uint8)
    return [Pictures.fromarray(array) for array in pixels.permute(0, 2, 3, 1).numpy()]


def _decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Turn token ids back into the text, without the marks of its start and end."""
    specials = set(tokenizer.all_special_ids)
    return str(tokenizer.decode([token for token in tokens if token and token not in specials])).strip() or "?"
