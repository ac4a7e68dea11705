"""MoDE: a bundle of experts that is asked for one task at a time, and answers as one CLIP.

It holds three things and adds nothing of its own: the opened bundle, the router that weighs the experts, and the pool
that loads them. `route` gives weights, `task` gives the CLIP that these weights make of the experts.

Under a budget, a task uses no more experts than it allows, and no more are in memory at a time for all tasks together.
The expert that was used longest ago is freed, and loaded again when a task needs it.

Source: MoDE (arXiv 2404.16030) Sec. 3.4; Sec. 5.3 for clusters of images.
Price: routing costs the class names' embeddings. A model is loaded when it is first used.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from modeclip.errors import ModeclipError
from modeclip.mixture.bundle import Bundle, load_bundle
from modeclip.mixture.router import ClusterRouter, Route, Router, RouteRequest
from modeclip.models.encoders import Encoder, PairEncoder
from modeclip.models.pool import ModelPool, most_together

if TYPE_CHECKING:
    from PIL.Image import Image

    from modeclip.mixture.routed_clip import RoutedClip


class MoDE:
    """A mixture of data experts: opened from a bundle, asked for one task at a time."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        router: Router | None = None,
        pool: ModelPool | None = None,
        max_experts: int | None = None,
        max_memory: int | None = None,
    ) -> None:
        """Make the mixture of an opened bundle; `load` is the usual way.

        Args:
            bundle: The bundle.
            router: What weighs the experts; None: the bundle's own cluster centres.
            pool: Where models come from; None: a pool of its own, on the CPU.
            max_experts: How many experts a task may use. A pool of its own keeps no more than that in memory, for all
                tasks together. None: all of them.
            max_memory: Bytes that the weights of these experts may take, where what they share with their seed counts
                once; None: any number.

        Raises:
            ModeclipError: Not even one expert fits.
        """
        if max_experts is not None and max_experts < 1:
            raise ModeclipError(f"max_experts: expected 1 or more, got {max_experts}")
        if max_memory is not None:
            fitting = most_together(bundle.models, max_memory)
            if not fitting:
                largest = max(ref.num_bytes for ref in bundle.models)
                raise ModeclipError(
                    f"max_memory: an expert takes {largest:,} bytes, more than the {max_memory:,} given"
                )
            max_experts = min(fitting, max_experts or bundle.num_experts)
        self.bundle, self.max_experts = bundle, max_experts
        self.router: Router = ClusterRouter(bundle) if router is None else router
        self.pool = ModelPool(max_models=max_experts) if pool is None else pool  # an empty pool is false

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        max_experts: int | None = None,
        max_memory: int | None = None,
        encoder: str | Encoder | PairEncoder | None = None,
        trust_encoder: bool = False,
        expert: str | None = None,
    ) -> MoDE:
        """Open a bundle: a folder, or the id of one on the Hugging Face Hub.

        Args:
            source: Folder or id.
            encoder: Encoder, or its name, that takes the place of the one that the bundle names. It may be Python code.
            trust_encoder: Import and call what the bundle names as its encoder, if that is Python code.
            expert: Name of the one expert that answers everything, such as one that was trained for class names; None:
                all experts, as the router weighs them.
            max_experts: How many experts a task may use, and how many are in memory at a time; None: all of them.
            max_memory: Bytes that the weights of these experts may take; None: any number.

        Raises:
            ModeclipError: There is no bundle there, a file is missing or differs from its hash, or no expert fits.
        """
        name = encoder if isinstance(encoder, str) else None
        bundle = load_bundle(source, encoder=name, trust_encoder=trust_encoder)
        bundle = bundle if expert is None else bundle.choose(expert)
        router = None if encoder is None or name is not None else ClusterRouter(bundle, encoder)
        return cls(bundle, router=router, max_experts=max_experts, max_memory=max_memory)

    @property
    def per_image(self) -> bool:
        """Whether the clusters are of images, so that every image has weights of its own."""
        return self.router.per_image

    def request(
        self,
        *,
        rule: str | None = None,
        temperature: float | None = None,
        max_experts: int | None = None,
        each: bool = False,
        templates: Sequence[str] | None = None,
    ) -> RouteRequest:
        """Fill in what is not given: the bundle's rule and its temperature, and this mixture's budget.

        Args:
            rule: One of ``rules.RULES``; None: the bundle's.
            temperature: Temperature of the rule; None: the bundle's for its own rule, else that rule's default.
            max_experts: How many experts may have weight; None: as many as the mixture may use.
            each: Whether every text is a task of its own, as queries for images are.
            templates: Prompts with ``{}``, whose mean stands for the name (published code); None: the name (paper).

        Raises:
            ModeclipError: The rule is unknown, or the budget is below 1.
        """
        return RouteRequest.of(
            self.bundle.routing,
            rule=rule,
            temperature=temperature,
            max_experts=self.max_experts if max_experts is None else max_experts,
            each=each,
            templates=templates,
        )

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
            templates: As for `request`.
            rule: As for `request`.
            temperature: As for `request`.
            max_experts: As for `request`.
            each: As for `request`.

        Raises:
            ModeclipError: No class names, an unknown rule, a template without ``{}``, or the clusters are of images.
        """
        request = self.request(
            rule=rule, temperature=temperature, max_experts=max_experts, each=each, templates=templates
        )
        found = self.router.route(classnames, request)
        _ = found.weights  # an error where every image has its own
        return found

    def route_queries(
        self, texts: Sequence[str], *, rule: str | None = None, temperature: float | None = None
    ) -> Float[np.ndarray, "L K"]:
        """Weigh the experts for every text by itself, as image retrieval does; arguments as for `request`."""
        return self.route(texts, rule=rule, temperature=temperature, each=True).class_weights

    def route_images(
        self,
        pictures: Sequence[Image],
        *,
        rule: str | None = None,
        temperature: float | None = None,
        max_experts: int | None = None,
    ) -> Float[np.ndarray, "N K"]:
        """Weigh the experts for every picture by itself, where the clusters are of images.

        Args:
            pictures: N pictures.
            rule: As for `request`.
            temperature: As for `request`.
            max_experts: How many may have weight for a picture.

        Raises:
            ModeclipError: The clusters are of texts.
        """
        request = self.request(rule=rule, temperature=temperature, max_experts=max_experts)
        return self.router.route_images(pictures, request).class_weights

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
            rule: As for `request`.
            temperature: As for `request`.
            max_experts: As for `request`.
            each: As for `request`.

        Raises:
            ModeclipError: No class names, an unknown rule, or a template without ``{}``.
        """
        from modeclip.mixture.routed_clip import RoutedClip  # imports torch, which routing does not need

        prompts = tuple(templates or self.bundle.routing.templates)
        request = self.request(
            rule=rule,
            temperature=temperature,
            max_experts=max_experts,
            each=each,
            templates=prompts if route_by_prompts else None,
        )
        return RoutedClip(self.router.route(classnames, request), self.pool, prompts)
