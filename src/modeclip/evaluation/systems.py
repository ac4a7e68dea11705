"""What is evaluated: one CLIP, several CLIPs that are weighed, or the best of several systems by the labels.

A `System` names its models and says how they answer together; no weights are loaded yet. `open_systems` makes systems
of what people write:

    runs/demo/bundle            a bundle: its mixture
    runs/demo/bundle#expert-2   one of its experts (or #seed)
    ViT-B-32@openai, FOLDER     any model that modeclip.models.clip loads
    NAME=any of these           the same under a name of its own

`run_systems` makes them of the models that a run has trained: every model by itself, the mixture under every rule, and
what keeps a reader from being misled. The uniform mixture is the plain ensemble, the dense models cost as much as the
mixture, and where the controls of the paper were trained (`modeclip.clustering.controls`), each is a system too: the
uniform average of its n models, and OneStep-n also routed by its own centres. CoarseCluster-n is the rule ``coarse``.

Two systems look at the labels, which no user of a mixture has. The best single expert has the highest average over the
tasks; the oracle takes the best expert of each task. A mixture that beats the oracle gains from its experts together;
one that does not beat the best single expert needs a better router.

Source: MoDE (arXiv 2404.16030), Sec. 3.4: class names, and the texts of a corpus from which images choose, are a task
that is routed as a whole; a text that asks for an image is a task of its own (eq. 7). Controls: Sec. 5.1 and 5.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from modeclip.clustering.clusters import Clustering
from modeclip.clustering.novelty import FineQuantiles
from modeclip.data.tasks.task import Images, Task
from modeclip.errors import ModeclipError, unknown
from modeclip.mixture.bundle import Bundle, RoutingConfig, hash_clusters, load_bundle
from modeclip.mixture.explain import Domain
from modeclip.mixture.manifest import MANIFEST_FILE, SEED, split_expert
from modeclip.mixture.mode import MoDE
from modeclip.mixture.router import ClusterRouter, Router, RouteRequest
from modeclip.mixture.rules import RULES
from modeclip.models.clip import check_model
from modeclip.models.feature_cache import FeatureCache
from modeclip.models.features import CachedEncoder, embed_images
from modeclip.models.pool import ModelRef
from modeclip.system.paths import expand_homes
from modeclip.training.jobs import JOB_FILE, Role, TrainJob, TrainResult, job_name
from modeclip.training.journal import training_seconds

BEST_SINGLE, ORACLE = "best single", "oracle"
"""Names of the two systems that look at the labels, behind the name of their mixture."""
CONTROL_TITLES: dict[Role, str] = {"random": "Random", "full": "Full", "one-step": "OneStep"}
"""Start of a control's name in tables, by the role of its models."""
ROUTED_AT_ONCE = 256
"""Images that a router without cluster centres weighs at a time."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Weights:
    """How a system weighs its K models for one task."""

    values: Float[np.ndarray, "... K"]
    """(K,), or a row a class or text, or with ``per_image`` a row an image."""
    per_image: bool = False
    """Whether the rows are of images."""
    queries: Float[np.ndarray, "T K"] | None = None
    """Retrieval: a row for each text that searches an image, where these differ from ``values``."""
    domain: Domain | None = None
    """Whether the task's names or texts lie where the router's captions lie; None where that is not known."""

    def uses(self, model: int) -> bool:
        """Whether a model has weight anywhere."""
        given = [self.values] if self.queries is None else [self.values, self.queries]
        return any(bool(values[..., model].any()) for values in given)


@dataclass(frozen=True, kw_only=True, eq=False)
class System:
    """Who answers a task: models and what weighs them, or the best of other systems by the labels."""

    name: str
    """Name in tables and files."""
    models: tuple[ModelRef, ...] = ()
    """The model, or the K models that answer together; none where ``chosen_among`` has names."""
    router: Router | None = None
    """Weighs the models for each task; None: they have equal weights."""
    request: RouteRequest | None = None
    """Rule, temperature and budget that the router is asked for."""
    kind: str = "model"
    """Section of a run's table: ``seed``, ``dense``, ``expert``, ``bound``, ``mixture`` or ``control``."""
    samples: int | None = None
    """Samples that the training of its models took, each model that they continue counted once; None: unknown."""
    templates: tuple[str, ...] = ()
    """Prompts that its bundle was made for."""
    chosen_among: tuple[str, ...] = ()
    """Names of the systems among which the labels choose the one that answers."""
    per_task: bool = False
    """Whether the labels choose for each task (the oracle) or once, by the average (the best single expert)."""
    is_given: bool = True
    """Whether somebody asked for it; if not, it is there only to be chosen."""
    is_default: bool = False
    """Whether it is what a run is compared by."""

    @property
    def rule(self) -> str | None:
        """Routing rule; None for a single model."""
        return None if self.request is None else self.request.rule

    def weigh(self, task: Task, cache: FeatureCache) -> Weights:
        """Weigh the models for a task; the vectors that this needs are kept in the cache."""
        if self.router is None or self.request is None:
            return Weights(values=np.full(len(self.models), 1 / len(self.models)))
        if self.router.per_image:
            return Weights(values=self._weigh_images(task.images, cache), per_image=True)
        texts = task.classnames if task.kind == "classification" else task.texts
        found = self.router.route(texts, replace(self.request, each=task.kind == "selection"))
        together = found.weights
        if task.kind != "retrieval":
            return Weights(values=together, domain=found.domain)
        queries = self.router.route(texts, replace(self.request, each=True)).weights
        alike = np.array_equal(queries, together)
        return Weights(values=together, queries=None if alike else queries, domain=found.domain)

    def _weigh_images(self, images: Images, cache: FeatureCache) -> Float[np.ndarray, "N K"]:
        assert self.request is not None
        if isinstance(self.router, ClusterRouter):
            vectors = embed_images(self.router.encoder_name, self.router.embed_images, images, cache)
            return self.router.route_vectors([str(row) for row in range(len(images))], vectors, self.request).weights
        assert self.router is not None
        weights = []
        for start in range(0, len(images), ROUTED_AT_ONCE):
            pictures = images.read(np.arange(start, min(start + ROUTED_AT_ONCE, len(images))))
            weights.append(self.router.route_images(pictures, self.request).class_weights)
        return np.concatenate(weights)

    def facts(self) -> dict[str, Any]:
        """Return what decides the weights, as JSON; nothing for a single model."""
        if self.request is None:
            return {}
        asked = self.request
        facts: dict[str, Any] = {"rule": asked.rule, "temperature": asked.temperature, "max_experts": asked.max_experts}
        if isinstance(self.router, ClusterRouter):
            bundle = self.router.bundle
            facts["encoder"] = self.router.encoder_name if bundle is None else bundle.manifest["encoder"]
            facts["clustering"] = hash_clusters(self.router.clusters.fine_centers, self.router.clusters.expert_of_fine)
        return facts


# ---------------------------------------------------------------- from the command line


def open_systems(
    specs: Sequence[str],
    cache: FeatureCache | None = None,
    *,
    rules: Sequence[str] = (),
    temperature: float | None = None,
    max_experts: int | None = None,
    max_memory: int | None = None,
    bounds: bool = False,
    random_weights: bool = False,
    encoder: str | None = None,
    trust_encoder: bool = False,
) -> list[System]:
    """Open what is to be evaluated; names are the shortest ends of the specifications that differ.

    Args:
        specs: As at the top of this module.
        cache: Where the vectors of class names are kept; None: nowhere.
        rules: Routing rules of the mixtures. With several, each mixture is one system for each rule, ``NAME@RULE``;
            with none, each bundle uses its own.
        temperature: Temperature of the rules; None: the bundle's for its own rule, else the rule's default.
        max_experts: How many experts may have weight; None: all of them.
        max_memory: Bytes that the weights of these experts may take; None: any number.
        bounds: Whether the best single expert and the oracle of each mixture are systems too. Then all finished
            experts of the bundle are evaluated.
        random_weights: Whether a name without weights is evaluated with random ones; else it is an error.
        encoder: Encoder of all bundles, as for `load_bundle`.
        trust_encoder: As for `load_bundle`.

    Raises:
        ModeclipError: A model, expert or rule is unknown, two systems have the same name, or bounds are wanted and no
            model is a bundle with a finished expert.
    """
    if not specs:
        raise ModeclipError("evaluate: no model given; give a bundle, BUNDLE#expert-0, a model folder or NAME@TAG")
    if wrong := [rule for rule in rules if rule not in RULES]:
        raise unknown("rule", wrong[0], RULES)
    specs = [expand_homes(spec) for spec in specs]
    names = _names(specs)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ModeclipError(f"evaluate: two models have the name {twice[0]!r}; write NAME=MODEL for one of them")
    cache = cache or FeatureCache()
    bundles: dict[str, Bundle] = {}
    systems: list[System] = []
    mixtures: dict[str, Bundle] = {}
    for spec, name in zip(specs, names, strict=True):
        spec = spec.partition("=")[2] if _is_named(spec) else spec
        if not spec.strip():
            raise ModeclipError(f"evaluate: model {name!r} is empty; give a bundle, a model folder or NAME@TAG")
        place, member = split_expert(spec)
        if not member and not _is_bundle(place):
            ref = ModelRef.of(name, spec, seed=0 if random_weights else None)
            systems.append(System(name=name, models=(ref,), samples=samples_of(Path(spec))))
            continue
        bundle = bundles.get(place) or load_bundle(place, encoder=encoder, trust_encoder=trust_encoder)
        bundles[place] = bundle
        if member:
            systems.append(_open_member(name, bundle, member))
            continue
        mode = MoDE(bundle, router=_router_of(bundle, cache), max_experts=max_experts, max_memory=max_memory)
        for rule in dict.fromkeys(rules) or (None,):
            systems.append(
                System(
                    name=f"{name}@{rule}" if len(set(rules)) > 1 else name,
                    models=bundle.models,
                    router=mode.router,
                    request=mode.request(rule=rule, temperature=temperature),
                    kind="mixture",
                    templates=bundle.routing.templates,
                )
            )
        mixtures[name] = bundle
    return _with_bounds(systems, mixtures) if bounds else systems


def _with_bounds(systems: Sequence[System], mixtures: Mapping[str, Bundle]) -> list[System]:
    """Put the experts that are missing and the bounds of each mixture behind the systems."""
    found, chosen = {system.name: system for system in systems}, list[System]()
    for name, bundle in mixtures.items():
        finished = [expert.name for expert in bundle.experts if expert.folder != SEED]
        for expert in finished:
            own = f"{name}#{expert}"
            if own not in found:
                found[own] = replace(_open_member(own, bundle, expert), is_given=False)
        chosen += make_bounds([f"{name}#{expert}" for expert in finished], prefix=f"{name} ")
    if not chosen:
        raise ModeclipError("evaluate: bounds are of a mixture's experts; give a bundle that has a finished expert")
    return [*found.values(), *chosen]


def make_bounds(experts: Sequence[str], *, prefix: str = "", samples: int | None = None) -> list[System]:
    """Return the best single expert and the oracle of some experts; nothing where there are none.

    Args:
        experts: Names of their systems; of equal ones the labels choose the first.
        prefix: What stands before `BEST_SINGLE` and `ORACLE`.
        samples: What the experts cost together.
    """
    return [
        System(name=f"{prefix}{bound}", kind="bound", chosen_among=tuple(experts), per_task=per_task, samples=samples)
        for bound, per_task in ((BEST_SINGLE, False), (ORACLE, True))
        if experts
    ]


def _open_member(name: str, bundle: Bundle, member: str) -> System:
    folders = {SEED: SEED} | {expert.name: expert.folder for expert in (*bundle.experts, *bundle.class_experts)}
    if member not in folders:
        raise unknown(f"expert of {bundle.path}", member, folders)
    kind = "seed" if member == SEED else "expert"
    models = (bundle.model_ref(folders[member], name),)
    return System(name=name, models=models, kind=kind, templates=bundle.routing.templates)


def _router_of(bundle: Bundle, cache: FeatureCache) -> ClusterRouter:
    """Return a bundle's router, which keeps the vectors of class names in a cache."""
    router = ClusterRouter(bundle)
    if router.per_image:
        return router
    names = CachedEncoder(bundle.encoder, bundle.fine_centers.shape[1], cache, trust_encoder=bundle.trust_encoder)
    return ClusterRouter(bundle, names)


def _is_bundle(place: str) -> bool:
    """Whether a specification without ``#`` is a bundle: a folder of one, or a Hub id that is no model's name."""
    if Path(place).is_dir():
        return (Path(place) / MANIFEST_FILE).is_file()
    try:
        check_model(place)
    except ModeclipError:
        if place.count("/") == 1 and ":" not in place:
            return True
        raise
    return False


def _is_named(spec: str) -> bool:
    """Whether a specification starts with a name of its own; the ``=`` may also be part of a folder's name."""
    return "=" in spec and not Path(split_expert(spec)[0]).exists()


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
        length = 2 if split_expert(parts[-1])[0] == "bundle" and len(parts) > 1 else 1
        others = [other for other in specs if other != spec]
        while length < len(parts) and any(_ends_alike(other, parts[-length:]) for other in others):
            length += 1
        names.append("/".join(parts[-length:]))
    return names


def _ends_alike(spec: str, end: Sequence[str]) -> bool:
    return [part for part in spec.split("/") if part][-len(end) :] == list(end)


# ---------------------------------------------------------------- from the models of a run


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A finished model of a run, and what it cost."""

    name: str
    """``seed``, ``dense``, ``dense-total``, ``expert-0``, ``random-0``..."""
    role: Role
    """What it is for."""
    folder: Path
    """The open_clip folder of the model."""
    samples: int
    """Samples that its own training has seen, without those of the model that it continues."""
    start: Path | None = None
    """Folder of the model that it continues."""
    seconds: float = 0.0
    """How long its own training took; 0 where that is not known."""

    @classmethod
    def of(cls, job: TrainJob) -> TrainedModel | None:
        """Return the model of a job, or None while it is not finished."""
        result = TrainResult.read(job)
        if result is None:
            return None
        start = None if job.start_from is None else Path(job.start_from).resolve()
        return cls(
            name=job.name,
            role=job.role,
            folder=Path(job.folder).resolve(),
            samples=result.samples,
            start=start,
            seconds=training_seconds(job, result),
        )

    @classmethod
    def given(cls, folder: Path) -> TrainedModel:
        """Return a seed that was given; its own training counts as far as its folder tells of it."""
        result = None
        if (folder / "job.json").is_file():
            result = TrainResult.read(replace(TrainJob.load(folder / "job.json"), folder=str(folder)))
        samples = 0 if result is None else result.samples
        return cls(name=job_name("seed"), role="seed", folder=folder.resolve(), samples=samples)


def samples_of(folder: Path) -> int | None:
    """Return the samples of a model's whole training, as its folder and those that it continues tell; None: unknown."""
    total, place = 0, folder
    while (place / JOB_FILE).is_file():
        try:
            job = replace(TrainJob.load(place / JOB_FILE), folder=str(place))
        except ModeclipError:
            return None
        result = TrainResult.read(job)
        if result is None:
            return None
        total += result.samples
        if job.start_from is None:
            has_weights = "@" in job.config.model or Path(job.config.model).is_dir()
            return None if has_weights else total
        place = Path(job.start_from)
    return None


def run_systems(
    models: Sequence[TrainedModel],
    clusters: Clustering,
    encoder: str,
    config: RoutingConfig,
    cache: FeatureCache,
    *,
    one_step: Clustering | None = None,
    trust_encoder: bool = False,
    quantiles: FineQuantiles | None = None,
) -> list[System]:
    """Return the systems of a run's table, in its order: single models, bounds, the mixture under every rule, controls.

    Args:
        models: The seed, which stands in for missing experts, and any others. A control with a model missing is left
            out.
        clusters: Fine centres and whose they are.
        encoder: Encoder that the captions were clustered with.
        config: Rule, temperature and templates of the bundle; its rule decides which mixture is the default.
        cache: Where the vectors of class names are kept.
        one_step: Centres of OneStep-n, by which it is routed too; None: it is only averaged.
        trust_encoder: Whether the user named the encoder, so that it may be Python code.
        quantiles: How far from their centre the captions of each fine cluster lie; None: not known.
    """
    names = CachedEncoder(encoder, clusters.fine_centers.shape[1], cache, trust_encoder=trust_encoder)
    ordered = sorted(
        models, key=lambda model: (model.role != "seed", model.role in {"expert", "prior"}, len(model.name))
    )
    ref_of = {model.name: ModelRef.of(model.name, model.folder) for model in ordered}
    known = {model.name: model for model in ordered}

    def weighed(
        name: str, kind: str, role: Role, rule: str, clusters: Clustering | None, default: bool = False
    ) -> System:
        """Return K models of a role with a router; without clusters they have equal weights."""
        members = [known.get(job_name(role, k), known[job_name("seed")]) for k in range(num_experts)]
        return System(
            name=f"{name}@{rule}",
            models=tuple(replace(ref_of[m.name], name=job_name(role, k)) for k, m in enumerate(members)),
            router=None
            if clusters is None
            else ClusterRouter(clusters, names, quantiles if kind == "mixture" else None),
            request=RouteRequest(rule=rule, temperature=config.temperature_of(rule)),
            kind=kind,
            samples=count_samples(members, models),
            templates=config.templates,
            is_default=default,
        )

    num_experts = clusters.num_experts
    singles = [
        System(
            name=model.name,
            models=(ref_of[model.name],),
            kind={"seed": "seed", "expert": "expert", "prior": "expert"}.get(model.role, "dense"),
            samples=count_samples([model], models),
            templates=config.templates,
        )
        for model in ordered
        if model.role not in CONTROL_TITLES
    ]
    mixtures = [weighed("mixture", "mixture", "expert", rule, clusters, rule == config.rule) for rule in RULES]
    members = [model.name for model in ordered if model.role == "expert"]
    bounds = make_bounds(members, samples=mixtures[0].samples)
    controls = []
    for role, title in CONTROL_TITLES.items():
        if all(job_name(role, k) in known for k in range(num_experts)):
            if role == "one-step" and one_step is not None and config.rule != "uniform":
                controls.append(weighed(f"{title}-{num_experts}", "control", role, config.rule, one_step))
            controls.append(weighed(f"{title}-{num_experts}", "control", role, "uniform", None))
    return [*singles, *bounds, *mixtures, *controls]


def is_equal_cost(name: str, samples: int | None, mixture_samples: int | None) -> bool:
    """Tell whether a model is the dense one that has cost what the mixture has, or a division's remainder more.

    Args:
        name: Of the model: ``dense-total`` is trained for it, and ``dense`` serves where it has cost enough.
        samples: What it has cost.
        mixture_samples: What the mixture has cost under its default rule.

    Examples:
        >>> is_equal_cost("dense", 960, 958), is_equal_cost("dense", 960, 1410), is_equal_cost("seed", 960, 958)
        (True, False, False)
    """
    return name == "dense-total" or (name == "dense" and (samples or 0) >= (mixture_samples or 0))


def count_samples(used: Sequence[TrainedModel], models: Sequence[TrainedModel]) -> int:
    """Return the samples that training some models has taken, each model that they continue counted once."""
    return sum(model.samples for model in models_behind(used, models))


def models_behind(used: Sequence[TrainedModel], models: Sequence[TrainedModel]) -> list[TrainedModel]:
    """Return some models and those among all models that they continue, each once."""
    model_of_folder = {model.folder: model for model in models}
    found: dict[str, TrainedModel] = {}
    for first in used:
        model: TrainedModel | None = first
        while model is not None and model.name not in found:
            found[model.name] = model
            model = None if model.start is None else model_of_folder.get(model.start)
    return list(found.values())
