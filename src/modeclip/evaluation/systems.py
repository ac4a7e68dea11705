"""What is evaluated: a specification -> one CLIP, or a mixture of experts with its rule; nothing is loaded yet.

    runs/demo/bundle            a bundle: its mixture
    runs/demo/bundle#expert-2   one of its experts (or #seed)
    ViT-B-32@openai, FOLDER     any model that modeclip.models.clip loads
    NAME=any of these           the same under a name of its own

Source: MoDE (arXiv 2404.16030), Sec. 3.4: class names, and the texts of a corpus from which images choose, are a task
that is routed as a whole; a text that asks for an image is a task of its own (eq. 7).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from modeclip.data.tasks.task import Images
from modeclip.errors import ModeclipError, unknown
from modeclip.mixture.bundle import MANIFEST_FILE, SEED, Bundle, load_bundle
from modeclip.mixture.mode import MoDE
from modeclip.mixture.router import ClusterRouter, RouteRequest
from modeclip.mixture.rules import RULES
from modeclip.models.clip import check_model
from modeclip.models.encoders import IMAGE_PREFIXES
from modeclip.models.feature_cache import FeatureCache
from modeclip.models.features import CachedEncoder, embed_images
from modeclip.models.pool import ModelRef


@dataclass(frozen=True, kw_only=True, eq=False)
class System:
    """One CLIP, or several with what weighs them."""

    name: str
    """Name in tables and files."""
    sources: tuple[ModelRef, ...]
    """The model, or the K experts."""
    mixture: Mixture | None = None
    """What weighs the experts; None: there is one model."""
    templates: tuple[str, ...] = ()
    """Prompts that its bundle was made for."""
    expert_of: str = ""
    """Name of the mixture whose bounds it counts for; empty: of none."""
    is_given: bool = True
    """Whether somebody named it; if not, it is asked for the bounds alone."""

    @property
    def per_image(self) -> bool:
        """Whether every image has weights of its own."""
        return self.mixture is not None and self.mixture.per_image

    def weigh(self, texts: Sequence[str], *, each: bool = False) -> Float[np.ndarray, "... K"]:
        """Weigh the models for a task.

        Args:
            texts: Class names or texts.
            each: Whether every text is a task of its own.

        Returns:
            (K,), or a row a text.
        """
        if self.mixture is None:
            return np.ones(1)
        return self.mixture.router.route(texts, replace(self.mixture.request, each=each)).weights

    def weigh_images(self, images: Images, cache: FeatureCache) -> Float[np.ndarray, "N K"]:
        """Weigh the models for each image, where the clusters are of images."""
        assert self.mixture is not None
        router = self.mixture.router
        vectors = embed_images(router.encoder_name, router.embed_images, images, cache)
        return router.route_vectors((), vectors, self.mixture.request).weights


@dataclass(frozen=True, kw_only=True, eq=False)
class Mixture:
    """A bundle's router and what it is asked."""

    bundle: Bundle = field(repr=False)
    """Bundle with the experts."""
    router: ClusterRouter = field(repr=False)
    """Router of its clusters."""
    request: RouteRequest
    """Rule, temperature and budget."""

    @property
    def per_image(self) -> bool:
        """Whether every image has weights of its own."""
        return self.router.per_image

    def facts(self) -> dict[str, Any]:
        """Return what decides the weights, as JSON."""
        asked, bundle = self.request, self.bundle
        facts = {"rule": asked.rule, "temperature": asked.temperature, "max_experts": asked.max_experts}
        return facts | {"encoder": bundle.manifest["encoder"], "clustering": bundle.clustering}

    @property
    def members(self) -> list[str]:
        """Names of the experts."""
        return [expert.name for expert in self.bundle.experts]


def open_systems(
    specs: Sequence[str],
    cache: FeatureCache,
    *,
    rules: Sequence[str] = (),
    temperature: float | None = None,
    max_experts: int | None = None,
    max_memory: int | None = None,
    bounds: bool = False,
) -> list[System]:
    """Open what is to be evaluated; names are the shortest ends of the specifications that differ.

    Args:
        specs: As at the top of this module.
        cache: Where the vectors of class names are kept.
        rules: Routing rules of the mixtures; of several, each mixture is a system a rule, ``NAME@RULE``. None given:
            each bundle's own.
        temperature: Of the rules; None: the bundle's for its own rule, else the rule's default.
        max_experts: Experts that may have weight; None: all.
        max_memory: Bytes that the weights of these experts may take; None: any number.
        bounds: Whether the finished experts of each bundle follow as systems, for the bounds of its mixture
            (``averages.bounds``).

    Raises:
        ModeclipError: There is no such model, expert or rule, two have the same name, or bounds are wanted and no
            model is a bundle with a finished expert.
    """
    if not specs:
        raise ModeclipError("evaluate: no model given; give a bundle, BUNDLE#expert-0, a model folder or NAME@TAG")
    if wrong := [rule for rule in rules if rule not in RULES]:
        raise unknown("rule", wrong[0], RULES)
    names = _names(specs)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ModeclipError(f"evaluate: two models have the name {twice[0]!r}; write NAME=MODEL for one of them")
    bundles: dict[str, Bundle] = {}
    systems: list[System] = []
    mixtures: dict[str, Bundle] = {}
    for spec, name in zip(specs, names, strict=True):
        spec = spec.partition("=")[2] if _is_named(spec) else spec
        if not spec.strip():
            raise ModeclipError(f"evaluate: model {name!r} is empty; give a bundle, a model folder or NAME@TAG")
        place, _, member = spec.partition("#")
        if not member and not _is_bundle(place):
            systems.append(System(name=name, sources=(ModelRef.of(name, spec),)))
            continue
        bundle = bundles.get(place) or load_bundle(place)
        bundles[place] = bundle
        if member:
            systems.append(_open_member(name, bundle, member))
        else:
            mode = MoDE(bundle, max_experts=max_experts, max_memory=max_memory)
            asked = [mode.request(rule=rule, temperature=temperature) for rule in (*dict.fromkeys(rules),) or (None,)]
            for each in asked:
                own = f"{name}@{each.rule}" if len(asked) > 1 else name
                systems.append(_open_mixture(own, bundle, cache, each))
            mixtures[name] = bundle
    return _with_experts(systems, mixtures) if bounds else systems


def _with_experts(systems: Sequence[System], mixtures: Mapping[str, Bundle]) -> list[System]:
    """Return the systems, those that are experts of a mixture marked, and behind them the experts that are missing."""
    found = {system.name: system for system in systems}
    for name, bundle in mixtures.items():
        for expert in bundle.experts:
            if expert.folder != SEED:
                own = f"{name}#{expert.name}"
                opened = found.get(own) or replace(_open_member(own, bundle, expert.name), is_given=False)
                found[own] = replace(opened, expert_of=name)
    if not any(system.expert_of for system in found.values()):
        raise ModeclipError("evaluate: bounds are of a mixture's experts; give a bundle that has a finished expert")
    return list(found.values())


def _open_member(name: str, bundle: Bundle, member: str) -> System:
    folders = {SEED: SEED} | {expert.name: expert.folder for expert in bundle.experts}
    if member not in folders:
        raise unknown(f"expert of {bundle.path}", member, folders)
    source = bundle.model_ref(folders[member], name)
    return System(name=name, sources=(source,), templates=bundle.routing.templates)


def _open_mixture(name: str, bundle: Bundle, cache: FeatureCache, request: RouteRequest) -> System:
    folders = [expert.folder for expert in bundle.experts]
    source_of = {folder: bundle.model_ref(folder) for folder in set(folders)}
    per_image = bundle.encoder.partition(":")[0] in IMAGE_PREFIXES
    encoder = None if per_image else CachedEncoder(bundle.encoder, bundle.fine_centers.shape[1], cache)
    return System(
        name=name,
        sources=tuple(source_of[folder] for folder in folders),
        mixture=Mixture(bundle=bundle, router=ClusterRouter(bundle, encoder), request=request),
        templates=bundle.routing.templates,
    )


def _is_bundle(place: str) -> bool:
    """Whether a specification without ``#`` is a bundle: a folder of one, or a Hub id that is no model's name."""
    if Path(place).is_dir():
        return (Path(place) / MANIFEST_FILE).is_file()
    try:
        check_model(place)
    except ModeclipError:
        if place.count("/") == 1:
            return True
        raise
    return False


def _is_named(spec: str) -> bool:
    """Whether a specification starts with a name of its own; a folder whose name has ``=`` in it is none."""
    return "=" in spec and not Path(spec.partition("#")[0]).exists()


def _names(specs: Sequence[str]) -> list[str]:
    """Return a name for each specification: its own, or the shortest end of its path that no other has.

    Examples:
        >>> _names(["runs/a/bundle", "runs/b/bundle#expert-0", "ViT-B-32@openai", "best=x/y"])
        ['a/bundle', 'b/bundle#expert-0', 'ViT-B-32@openai', 'best']
    """
    names = []
    for spec in specs:
        if _is_named(spec):
            names.append(spec.partition("=")[0])
            continue
        parts = [part for part in spec.removeprefix("local-dir:").split("/") if part] or [spec]
        length = 2 if parts[-1].partition("#")[0] == "bundle" and len(parts) > 1 else 1
        others = [other for other in specs if other != spec]
        while length < len(parts) and any(_ends_alike(other, parts[-length:]) for other in others):
            length += 1
        names.append("/".join(parts[-length:]))
    return names


def _ends_alike(spec: str, end: Sequence[str]) -> bool:
    return [part for part in spec.split("/") if part][-len(end) :] == list(end)
