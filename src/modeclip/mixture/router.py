"""Routers decide whom a task listens to: they weigh the experts for class names, for single queries, or for pictures.

A `Router` turns names or pictures into a `Route`, which carries the weights, and `modeclip.mixture.routed_clip` turns
a route into one CLIP. Any object with the three members of `Router` can stand in: one that knows its experts' weights
from elsewhere, or one that is learned. `ClusterRouter` is ours. It embeds the names as the captions were embedded,
looks where they fall among the cluster centres, and applies a formula of `modeclip.mixture.rules`.

The classes of a task, or the texts of a corpus from which images choose, are routed together. Queries that look for an
image are tasks of their own (``each``). Where the clusters are of images, each picture has weights of its own and class
names have none. Of clusters of pairs (``clip-both``) the paper weighs every image with every class and finds little
gain in it; here a picture meets the image half of the centres.

Source: MoDE (arXiv 2404.16030) Sec. 3.4; Sec. 5.3 for clusters of images.
Price: the vectors of the names, then a product with the centres. No weights of experts are read.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from modeclip.clustering.clusters import Clustering
from modeclip.clustering.novelty import FineQuantiles
from modeclip.data.images import to_rgb
from modeclip.data.prompts import check_texts
from modeclip.errors import ModeclipError, unknown
from modeclip.mixture.bundle import Bundle, RoutingConfig
from modeclip.mixture.explain import ClassReason, Domain, explain
from modeclip.mixture.rules import RULES, embed_classes, entropy, keep_best, route
from modeclip.models.encoders import IMAGE_PREFIXES, OWN, PREFIXES, Encoder, PairEncoder, load_any_encoder

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, kw_only=True)
class RouteRequest:
    """How a task is to be routed."""

    rule: str
    """Name of the formula, one of ``rules.RULES``."""
    temperature: float
    """Temperature of the rule, in units of squared distance, above 0."""
    max_experts: int | None = None
    """How many experts may have weight; None: all of them."""
    each: bool = False
    """Whether every text is a task of its own, as queries for images are."""
    templates: tuple[str, ...] = ()
    """Prompts with ``{}`` whose mean vector stands for the name (published code); none: the plain name (paper)."""

    def __post_init__(self) -> None:
        """Check the rule and the budget."""
        if self.rule not in RULES:
            raise unknown("rule", self.rule, RULES)
        if self.max_experts is not None and self.max_experts < 1:
            raise ModeclipError(f"max_experts: expected 1 or more, got {self.max_experts}")

    @classmethod
    def of(
        cls,
        defaults: RoutingConfig,
        *,
        rule: str | None = None,
        temperature: float | None = None,
        max_experts: int | None = None,
        each: bool = False,
        templates: Sequence[str] | None = None,
    ) -> RouteRequest:
        """Fill in what is not given.

        Args:
            defaults: Rule and temperature that a bundle keeps.
            rule: None: the default rule.
            temperature: None: the default temperature if the rule is the default one, else the rule's own.
            max_experts: As the field of that name.
            each: As the field of that name.
            templates: As the field of that name.

        Raises:
            ModeclipError: The rule is unknown, or the budget is below 1.
        """
        rule = rule or defaults.rule
        return cls(
            rule=rule,
            temperature=defaults.temperature_of(rule) if temperature is None else temperature,
            max_experts=max_experts,
            each=each,
            templates=tuple(templates or ()),
        )


@runtime_checkable
class Router(Protocol):
    """Weighs experts for what a mixture is asked."""

    @property
    def per_image(self) -> bool:
        """Whether every picture has weights of its own, so that class names have none."""
        ...

    def route(self, names: Sequence[str], request: RouteRequest) -> Route:
        """Weigh the experts for a task's class names, or for each of several texts.

        Where every picture has weights of its own, the route says so and weighs pictures when they come.
        """
        ...

    def route_images(self, pictures: Sequence[Image], request: RouteRequest, names: Sequence[str] = ()) -> Route:
        """Weigh the experts for each picture by itself; the names are for explanations."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Route:
    """The experts' weights for one task, with the reasons, before any model is loaded."""

    classnames: tuple[str, ...]
    """Class names in the order of the task; queries or files of pictures where each of them is routed by itself."""
    request: RouteRequest
    """How the task was routed."""
    fixed_weights: Float[np.ndarray, "... K"] | None
    """What `weights` returns; None where every picture has weights of its own."""
    router: Router = field(repr=False)
    """The router that weighs what comes later: other texts, and pictures."""
    bundle: Bundle | None = field(default=None, repr=False)
    """Bundle with the experts; None where only a clustering is known, so that no model can be run."""
    embeddings: Float[np.ndarray, "L D"] | None = field(default=None, repr=False)
    """Vectors that were compared with the centres; None where the router does not look at clusters."""
    find_domain: Callable[[], Domain | None] | None = field(default=None, repr=False)
    """What `domain` asks once it is wanted: the weights do not need it, and it takes longer than they do."""

    @cached_property
    def domain(self) -> Domain | None:
        """Whether the names lie where the captions of the bundle lie; None where that is not known."""
        return None if self.find_domain is None else self.find_domain()

    @property
    def per_image(self) -> bool:
        """Whether every picture has weights of its own."""
        return self.fixed_weights is None

    @property
    def weights(self) -> Float[np.ndarray, "... K"]:
        """Weight of each expert, summing to 1: (K,), or a row a class (L, K).

        Raises:
            ModeclipError: Every picture has weights of its own.
        """
        if self.fixed_weights is None:
            place = "" if self.bundle is None else f"bundle {self.bundle.path}: "
            raise ModeclipError(
                f"{place}its clusters are of images, so every image has its own weights and class names have none; use "
                "MoDE.route_images, or `modeclip route --images FILE...`"
            )
        return self.fixed_weights

    @property
    def class_weights(self) -> Float[np.ndarray, "L K"]:
        """Weight of each expert for each class, whatever the rule."""
        return np.broadcast_to(self.weights, (len(self.classnames), self.weights.shape[-1]))

    @property
    def entropy(self) -> float:
        """Entropy of the weights in nats: 0 if one expert has all, ln(K) if they are equal; the mean over rows."""
        return entropy(self.weights)

    @property
    def members(self) -> tuple[str, ...]:
        """Names of the experts, in the order of the weights."""
        if self.bundle is None:
            return tuple(f"expert {k}" for k in range(self.weights.shape[-1]))
        return tuple(expert.name for expert in self.bundle.experts)

    def explain(self) -> list[ClassReason]:
        """Say for each class which fine clusters lie nearest, what they are about and whose they are."""
        if self.bundle is None or self.embeddings is None:
            rows = zip(self.classnames, self.class_weights.tolist(), strict=True)
            return [ClassReason(name=name, weights=tuple(own), clusters=()) for name, own in rows]
        return explain(self.classnames, self.class_weights, self.embeddings, self.bundle, self.domain)

    def weigh_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "B K"]:
        """Weigh the experts for texts that are not among the classes, each text by itself and without a budget."""
        request = replace(self.request, each=True, max_experts=None, templates=())
        return self.router.route(texts, request).class_weights

    def weigh_images(self, pictures: Sequence[Image]) -> Float[np.ndarray, "B K"]:
        """Weigh the experts for pictures, each by itself."""
        return self.router.route_images(pictures, self.request).class_weights


class ClusterRouter:
    """Weighs the experts by where names or pictures fall among the cluster centres."""

    def __init__(
        self,
        clusters: Bundle | Clustering,
        encoder: str | Encoder | PairEncoder | None = None,
        quantiles: FineQuantiles | None = None,
    ) -> None:
        """Keep the centres; the encoder is loaded when something is embedded.

        Args:
            clusters: An opened bundle, or the clustering that a bundle would be made of.
            encoder: The encoder that the clusters were made with, or its name, which the user gave; None: the one that
                the bundle names, which is Python code only if whoever opened the bundle trusts it.
            quantiles: How far from their centre the captions of each fine cluster lie; None: as the bundle says, if
                it does.
        """
        self.clusters = clusters
        self.bundle = clusters if isinstance(clusters, Bundle) else None
        self._quantiles = self.bundle.fine_quantiles if quantiles is None and self.bundle is not None else quantiles
        self._trusted = encoder is not None or (self.bundle is not None and self.bundle.trust_encoder)
        if encoder is None:
            if self.bundle is None:
                raise ModeclipError("ClusterRouter: a clustering does not name its encoder; give one")
            encoder = self.bundle.encoder
        self._given = encoder if isinstance(encoder, str) else self._fitting(encoder)

    @cached_property
    def encoder(self) -> Encoder | PairEncoder:
        """The encoder of names or pictures."""
        if not isinstance(self._given, str):
            return self._given
        return self._fitting(load_any_encoder(self._given, trust_encoder=self._trusted))

    def _fitting(self, encoder: Encoder | PairEncoder) -> Encoder | PairEncoder:
        """Return an encoder if its vectors have the dimensions of the centres, else raise."""
        expected = self.clusters.fine_centers.shape[1]
        if encoder.dimension != expected:
            place = "" if self.bundle is None else f"bundle {self.bundle.path}: "
            raise ModeclipError(
                f"{place}its centres have {expected:,} dimensions, the encoder {encoder.name} has "
                f"{encoder.dimension:,}; give the encoder that embedded the captions, or get the bundle again"
            )
        return encoder

    @property
    def encoder_name(self) -> str:
        """Name of the encoder."""
        return self._given if isinstance(self._given, str) else self._given.name

    @property
    def per_image(self) -> bool:
        """Whether the clusters are of images, so that every picture has weights of its own."""
        prefix = self.encoder_name.partition(":")[0]
        if isinstance(self._given, str) and (prefix in PREFIXES or not OWN.fullmatch(self._given)):
            return prefix in IMAGE_PREFIXES  # only a user's own encoder has to be loaded to know what it encodes
        return not isinstance(self.encoder, Encoder)

    def route(self, names: Sequence[str], request: RouteRequest) -> Route:
        """Weigh the experts for class names, or for each of several texts.

        Raises:
            ModeclipError: There is no name, a template has no place for it, or the temperature is not above 0.
        """
        if isinstance(names, str):  # each letter would be a class
            raise ModeclipError(f"a task needs a list of class names, got the text {names!r}; write [{names!r}]")
        check_texts(names, "class names")
        if not names:
            raise ModeclipError("a task needs at least one class name, got none")
        if self.per_image:
            return Route(classnames=tuple(names), request=request, fixed_weights=None, router=self, bundle=self.bundle)
        assert isinstance(self.encoder, Encoder)
        return self.route_vectors(names, embed_classes(self.encoder.encode, names, request.templates), request)

    def route_images(self, pictures: Sequence[Image], request: RouteRequest, names: Sequence[str] = ()) -> Route:
        """Weigh the experts for each picture by itself, each with the whole budget.

        Raises:
            ModeclipError: As for `embed_images`.
        """
        return self.route_vectors(names, self.embed_images(pictures), request)

    def route_vectors(self, names: Sequence[str], vectors: Float[np.ndarray, "L D"], request: RouteRequest) -> Route:
        """Weigh the experts for vectors that the encoder has made before.

        Args:
            names: A name for each vector; none given: their numbers.
            vectors: Of texts, as the encoder makes them; where the clusters are of images, as `embed_images` does.
            request: How they are to be routed.
        """
        clusters, per_image = self.clusters, self.per_image
        is_whole = vectors.shape[-1] == clusters.fine_centers.shape[-1]  # half of a pair has distances of its own
        found = route(
            vectors,
            clusters.fine_centers[:, -vectors.shape[1] :] if per_image else clusters.fine_centers,
            clusters.expert_of_fine,
            num_experts=clusters.num_experts,
            rule=request.rule,
            temperature=request.temperature,
            each=per_image or request.each,
            max_experts=None if per_image else request.max_experts,
        )
        weights = found.weights
        if per_image and request.max_experts is not None:
            weights = keep_best(weights, request.max_experts, per_row=True)
        return Route(
            classnames=tuple(names) or tuple(map(str, range(len(vectors)))),
            request=request,
            fixed_weights=weights,
            router=self,
            bundle=self.bundle,
            embeddings=vectors,
            find_domain=partial(Domain.of, vectors, found.nearest_fine, found.distance, self._quantiles)
            if is_whole
            else None,
        )

    def embed_images(self, pictures: Sequence[Image]) -> Float[np.ndarray, "N D"]:
        """Embed pictures as the clusters were embedded; where those are of pairs, the half that is the image's.

        Raises:
            ModeclipError: The clusters are of texts, or of pairs by an encoder whose halves are not known.
        """
        encoder, name = self.encoder, self.encoder_name
        if isinstance(encoder, Encoder):
            place = "" if self.bundle is None else f"bundle {self.bundle.path}: "
            raise ModeclipError(
                f"{place}its clusters are of texts (encoder {name}), not of images; route class names instead"
            )
        if encoder.encodes == "both" and not name.startswith("clip-both:"):
            raise ModeclipError(
                f"encoder {name}: nothing says which part of its vectors is the image's; cluster with clip-both:MODEL"
            )
        vectors = encoder.encode_pairs([""] * len(pictures), [_as_png(picture) for picture in pictures])
        return vectors[:, encoder.dimension // 2 :] if encoder.encodes == "both" else vectors


def _as_png(picture: Image) -> bytes:
    buffer = io.BytesIO()
    to_rgb(picture).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
