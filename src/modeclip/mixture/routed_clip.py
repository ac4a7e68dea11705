"""A routed mixture is one CLIP: the experts' vectors are concatenated, and their weights sit on one side.

The answer of the mixture is `sum_c p_c <u_c, v_c>`, the weighted sum of the experts' cosines. That is the dot product
of concat(p_c u_c) and concat(v_c). So a routed mixture is one CLIP with longer vectors whose weights sit on the text
side alone: image vectors can be stored once and used under any weights, also where every class or query has its own.
Where the clusters are of images, every image has weights and they sit on its side. An expert without weight is neither
loaded nor run.

With ``normalize=True`` both vectors have unit norm, for tools that normalise or take a cosine: image
(concat(v_c) / sqrt(K), 0) and text (concat(p_c u_c), sqrt(1 - sum p_c^2)). Their product is that of the plain vectors
divided by sqrt(K), so the order of the classes is the same.

A routed CLIP owns no model. It asks the pool for each expert whenever it computes, so several tasks share the models in
memory, and the pool alone decides which of them stay there.

Source: MoDE Sec. 3.4, eq. 4; class embeddings as in CLIP: each template's text, normalised, averaged, normalised.
Experts that share a trunk with their seed run it once for all that have weight (`modeclip.models.trunk`), as many of
them as are in memory together.

Price: one image pass for each expert that has weight, less what they share. ``docs/cost.md`` has what that comes to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from modeclip.data.images import to_rgb
from modeclip.data.prompts import check_templates, fill
from modeclip.errors import ModeclipError, unknown
from modeclip.mixture.explain import ClassReason, Domain
from modeclip.mixture.router import Route
from modeclip.mixture.rules import MIXES, reweigh
from modeclip.models.clip import Clip, logit_scale_of, without_gradients
from modeclip.models.features import all_class_features
from modeclip.models.pool import ModelPool, ModelRef
from modeclip.models.trunk import share

if TYPE_CHECKING:
    from PIL.Image import Image

    from modeclip.models.blocks import Tower


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The classes of one picture, most probable first."""

    classnames: tuple[str, ...]
    """All class names, the most probable first."""
    probabilities: tuple[float, ...]
    """Probability of each, summing to 1."""
    domain: Domain | None = None
    """Whether the picture lies where the bundle's pictures lie; None where pictures are not routed, or not known."""


class RoutedClip(nn.Module):
    """A mixture routed to one task: to every CLIP tool, a CLIP model.

    ``encode_image`` and ``encode_text`` return vectors whose dot product is the weighted sum of the experts' cosines.
    ``preprocess`` and ``tokenizer`` are those of the experts, which share them with their seed.
    """

    def __init__(self, route: Route, pool: ModelPool, templates: Sequence[str] | None = None) -> None:
        """Find out which experts have weight; they are loaded when something is encoded.

        Args:
            route: Weights of a bundle's experts for a task.
            pool: Where models come from.
            templates: Prompts of the task's classes with ``{}`` where the name goes; None: those of the bundle.

        Raises:
            ModeclipError: The route has no bundle whose experts could run, or a template has no place for the name.
        """
        super().__init__()
        if route.bundle is None:
            raise ModeclipError("RoutedClip: the route says nothing of models; route with the router of a bundle")
        self.route, self.pool, self.classnames = route, pool, route.classnames
        self.templates = tuple(templates or route.bundle.routing.templates)
        check_templates(self.templates, "task")
        self.refs = route.bundle.models
        num_experts = len(self.refs)
        shares = np.full((1, num_experts), 1 / num_experts) if route.per_image else route.class_weights
        self.active = np.flatnonzero((shares > 0).any(axis=0))
        self._experts: list[int] = self.active.tolist()
        self._scales = [logit_scale_of(route.bundle.model_folder(int(expert))) for expert in self._experts]
        self.logit_scale: Tensor
        scale = torch.tensor(shares[:, self.active].mean(axis=0) @ self._scales)
        self.register_buffer("logit_scale", scale.float().log())

    @cached_property
    def preprocess(self) -> Any:
        """Transform of the experts, from a PIL image to (3, H, W) float32."""
        return self._first.preprocess

    @cached_property
    def tokenizer(self) -> Any:
        """Tokenizer of the experts, from a list of texts to (B, context_length) token ids."""
        return self._first.tokenizer

    @property
    def weights(self) -> Float[np.ndarray, "... K"]:
        """Weight of each expert: (K,), or a row a class (L, K).

        Raises:
            ModeclipError: Every image has weights of its own.
        """
        return self.route.weights

    def explain(self) -> list[ClassReason]:
        """Say for each class which clusters lie nearest and what weights that gave."""
        return self.route.explain()

    def encode_image(
        self,
        images: Tensor,
        normalize: bool = False,
        weights: Float[np.ndarray, "B K"] | None = None,
        asked: Bool[np.ndarray, "B k"] | None = None,
    ) -> Tensor:
        """Encode images with every active expert.

        Args:
            images: (B, 3, H, W) float tensor, as ``preprocess`` makes it.
            normalize: Whether to scale the result to unit norm, which takes one number more.
            weights: Weights of these images where every image has its own; None: the images are routed as the tensor
                shows them.
            asked: Which active experts each image is for; the others are not run for it, and their part is 0. None:
                all. Not used where every image has its own weights.

        Returns:
            (B, D * active experts): concat(v_c), or concat(p_c v_c); one number more if normalised.
        """
        if not self.route.per_image:
            return _plain(self._encode("image", images, asked), normalize)
        if weights is None:
            weights = self.route.weigh_images(_pictures(images, self._first.model.visual))
        own = weights[:, self.active]
        return _weighted(self._encode("image", images, own > 0), own, normalize)

    def encode_text(
        self,
        text: Tensor | Sequence[str],
        normalize: bool = False,
        weights: Float[np.ndarray, "B K"] | None = None,
    ) -> Tensor:
        """Encode texts with every active expert, each times its weight.

        Where every class has its own weights, a prompt of one of the task's classes has that class's. Any other text is
        routed by itself, to the same experts.

        Args:
            text: (B, context_length) token ids, or a list of texts.
            normalize: Whether to append what is missing to unit norm, sqrt(1 - sum p_c^2).
            weights: Weights of these texts, if they are known; None: as above. Not used where every image has its own.

        Returns:
            (B, D * active experts): concat(p_c u_c); one number more if normalised.
        """
        tokens = text if isinstance(text, Tensor) else self.tokenizer(list(text)).to(self.logit_scale.device)
        features = self._encode("text", tokens)
        if self.route.per_image:
            weights = None
        elif weights is None:
            weights = self._weights_of(tokens)
        return self._on_text_side(features, weights, normalize)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return image features, text features (unit norm) and the logit scale, as open_clip's CLIP does."""
        scale = self.logit_scale.exp() * len(self.active) ** 0.5
        return self.encode_image(image, normalize=True), self.encode_text(text, normalize=True), scale

    def classifier(self, normalize: bool = False) -> Tensor:
        """Return the text vector of each class over all templates, without a gradient: (L, D * active experts)."""
        weights = None if self.route.per_image else self.route.class_weights
        with torch.inference_mode(False), without_gradients():
            return self._on_text_side(self._class_vectors(), weights, normalize)

    @without_gradients()
    def classify(self, images: Tensor | Sequence[Image], mix: str = "cosines") -> list[Prediction]:
        """Name the class of each picture.

        Args:
            images: PIL images, or a (B, 3, H, W) tensor as ``preprocess`` makes it.
            mix: What of the experts is weighted and summed, one of ``rules.MIXES``.

        Raises:
            ModeclipError: ``mix`` is none of them, or an expert cannot be loaded.
        """
        if mix not in MIXES:
            raise unknown("mix", mix, MIXES)
        if not len(images):
            return []
        first, weights, domain = self._first, None, None
        if isinstance(images, Tensor):
            batch, pictures = images, []
        else:
            pictures = [to_rgb(image) for image in images]
            batch = first.images(pictures).to(self.logit_scale.device)
        if self.route.per_image:
            seen = pictures or _pictures(batch, first.model.visual)
            found = self.route.router.route_images(seen, self.route.request)
            weights, domain = found.class_weights, found.domain
        del first  # the pool may have to free it for the next expert
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
                domain=None if domain is None else domain.part(number),
            )
            for number, (row, row_order) in enumerate(zip(probabilities.tolist(), order.tolist(), strict=True))
        ]

    def _clip(self, expert: int) -> Clip:
        """Return an expert on this task's device, with weights of its type, loaded if it is not in memory."""
        return self.pool.get(self.refs[expert], device=self.logit_scale.device, dtype=self.logit_scale.dtype)

    @property
    def _first(self) -> Clip:
        """One of the experts, for what they all share."""
        return self._clip(self._experts[0])

    def _groups(self, refs: Sequence[ModelRef]) -> Iterator[dict[str, Clip]]:
        """Yield experts by digest, as many together as fit into memory, on this task's device."""
        yield from self.pool.groups(refs, device=self.logit_scale.device, dtype=self.logit_scale.dtype)

    def _encode(self, tower: Tower, x: Tensor, rows: Bool[np.ndarray, "B k"] | None = None) -> list[Tensor]:
        """Return the vectors of a batch by each active expert, (B, D).

        Args:
            tower: Which tower.
            x: Images or token ids.
            rows: Which rows each expert is asked for; the others are zeros. None: all of them.
        """
        asked = np.ones((len(x), len(self._experts)), bool) if rows is None else rows
        used = [place for place in range(len(self._experts)) if rows is None or asked[:, place].any()]
        refs = [self.refs[expert] for expert in self._experts]
        found: dict[int, Tensor] = {}
        for clips in self._groups([refs[place] for place in used]):
            here = [place for place in used if refs[place].digest in clips]
            for shared in share([clips[refs[place].digest].model for place in here], tower):
                places = [here[index] for index in shared.members]
                some = asked[:, places].any(axis=1)
                state = shared.trunk(x if some.all() else x[torch.from_numpy(some).to(x.device)])
                for place, head in zip(places, shared.heads, strict=True):
                    found[place] = _on_rows(head, state, asked[some, place], asked[:, place])
        empty = [place for place in range(len(self._experts)) if place not in found]
        found |= {place: x.new_zeros(len(x), self._dimension) for place in empty}
        return [found[place] for place in range(len(self._experts))]

    @cached_property
    def _dimension(self) -> int:
        """Length of one expert's vectors."""
        return int(self._first.config["model_cfg"]["embed_dim"])

    def _on_text_side(self, features: list[Tensor], weights: np.ndarray | None, normalize: bool) -> Tensor:
        return (
            _plain(features, normalize) if weights is None else _weighted(features, weights[:, self.active], normalize)
        )

    @cached_property
    def _classifier(self) -> Tensor:
        return self.classifier()

    def _class_vectors(self) -> list[Tensor]:
        """Return the vectors of the classes by each active expert, (L, D)."""
        found: dict[str, Tensor] = {}
        refs = [self.refs[expert] for expert in self._experts]
        for clips in self._groups(refs):
            digests = list(clips)
            vectors = all_class_features([clips[digest] for digest in digests], self.classnames, self.templates)
            found |= dict(zip(digests, vectors, strict=True))
        return [found[ref.digest] for ref in refs]

    @cached_property
    def _words(self) -> list[Tensor]:
        return self._class_vectors()

    def _log_probabilities(self, images: Tensor, weights: Float[np.ndarray, "K ..."]) -> Tensor:
        """Return the weighted sums of the experts' log-probabilities: (B, L); weights are (K, L) or (K, B, 1)."""
        total = torch.zeros((), device=images.device)
        features = self._encode("image", images)
        for expert, scale, words, own in zip(self._experts, self._scales, self._words, features, strict=True):
            cosines = own @ words.T
            shares = torch.from_numpy(np.array(weights[expert])).to(cosines)
            total = total + shares * (scale * cosines).log_softmax(dim=-1)
        return total

    @cached_property
    def _class_of_tokens(self) -> dict[tuple[int, ...], int]:
        """Class that each prompt of the task belongs to, by the prompt's token ids."""
        return {
            key: index
            for index, name in enumerate(self.classnames)
            for key in _keys(self.tokenizer([fill(template, name) for template in self.templates]))
        }

    def _weights_of(self, tokens: Tensor) -> Float[np.ndarray, "B K"]:
        """Return the weights of each text of a batch."""
        if self.weights.ndim == 1:
            return np.broadcast_to(self.weights, (len(tokens), len(self.weights)))
        keys = _keys(tokens)
        rows = np.zeros((len(keys), self.weights.shape[1]))
        strangers = [row for row, key in enumerate(keys) if key not in self._class_of_tokens]
        for row, key in enumerate(keys):
            if key in self._class_of_tokens:
                rows[row] = self.weights[self._class_of_tokens[key]]
        if strangers:
            own = self.route.weigh_texts([_decode(self.tokenizer, keys[row]) for row in strangers])
            is_active = np.zeros(rows.shape[1])
            is_active[self.active] = 1.0
            rows[strangers] = reweigh(own, is_active)
        return rows


def _on_rows(
    head: Callable[[tuple[Tensor, ...]], Tensor],
    state: tuple[Tensor, ...],
    asked: Bool[np.ndarray, " b"],
    rows: Bool[np.ndarray, " B"],
) -> Tensor:
    """Return the vectors (B, D) of a head that is asked for some rows of a state; the others are zeros."""
    if rows.all():
        return head(state)
    own = head(tuple(part[torch.from_numpy(asked).to(part.device)] for part in state))
    whole = own.new_zeros(len(rows), own.shape[1])
    whole[torch.from_numpy(rows).to(own.device)] = own
    return whole


def _plain(features: Sequence[Tensor], normalize: bool) -> Tensor:
    """Return concat(v_c); if asked for, scaled to unit norm with a 0 appended."""
    vectors = torch.cat(list(features), dim=-1)
    return nn.functional.pad(vectors / len(features) ** 0.5, (0, 1)) if normalize else vectors


def _weighted(features: Sequence[Tensor], weights: Float[np.ndarray, "B k"], normalize: bool) -> Tensor:
    """Return concat(p_c u_c); if asked for, with the number appended that completes it to unit norm."""
    p = torch.from_numpy(np.array(weights)).to(features[0])
    parts = [p[:, [position]] * part for position, part in enumerate(features)]
    if normalize:
        parts.append((1 - p.square().sum(dim=-1, keepdim=True)).clamp(min=0).sqrt())
    return torch.cat(parts, dim=-1)


def _pictures(images: Tensor, tower: Any) -> list[Image]:
    """Return the pictures that a preprocessed batch shows, exactly if they were resized as pictures before."""
    from PIL import Image as Pictures

    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (tower.image_mean, tower.image_std))
    pixels = (images.detach().float().cpu() * std + mean).mul(255).round().clamp(0, 255).to(torch.uint8)
    return [Pictures.fromarray(array) for array in pixels.permute(0, 2, 3, 1).numpy()]


def _keys(tokens: Tensor) -> list[tuple[int, ...]]:
    return [tuple(row) for row in tokens.tolist()]


def _decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Turn token ids back into text, without the marks of its start and end."""
    specials = set(tokenizer.all_special_ids)
    return str(tokenizer.decode([token for token in tokens if token and token not in specials])).strip() or "?"
