"""Held-out tasks and trained models -> accuracies of each model, of their bounds, and of the mixture under every rule.

Every image is decoded once and encoded by every model (`modeclip.models.features`); every other number is arithmetic on
cosines. A mixture's cosine is the weighted sum of its experts' (MoDE eq. 4), so all rows are scored from the same
cosines, a block of images at a time: what is held is one task's features on disk and a block in memory. Beside the
mixture stand the rows that keep a reader from being misled: the uniform ensemble, the dense model at the mixture's
total cost, and two bounds that look at the labels: the best single expert, and an oracle that picks the best expert
for each task. Where a run has trained the controls of the paper (`modeclip.clustering.controls`), each is a row too: the uniform
average of its n models, and for OneStep-n also their mixture routed by its own centres. CoarseCluster-n is the
mixture's rule ``coarse``.

Source: MoDE Sec. 4.3, 5.1 and 5.2; the plain mean over tasks as in its tables. Intervals: bootstrap over the images of
each task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from modeclip.clustering.clusters import Clustering
from modeclip.data.catalog import Catalog
from modeclip.data.prompts import fill
from modeclip.data.tasks.task import Task, catalog_tasks
from modeclip.errors import ModeclipError
from modeclip.evaluation.metrics import bootstrap_interval, choose_by_labels, correct, paired_interval
from modeclip.evaluation.similarity import BLOCK_NUMBERS
from modeclip.mixture.bundle import RoutingConfig
from modeclip.mixture.rules import RULES, Routing, route
from modeclip.models.feature_cache import FeatureCache
from modeclip.models.features import CachedEncoder, image_features, missing_images, prompt_features
from modeclip.models.pool import ModelRef
from modeclip.system.console import progress
from modeclip.training.jobs import Role, TrainJob, TrainResult, job_name

CONTROLS: dict[Role, str] = {"random": "Random", "full": "Full", "one-step": "OneStep"}
"""Name of a control's row, by the name of its models: ``random-0``, ``random-1``..."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(RoutingConfig):
    """How models are evaluated, and what the bundle will do by default."""

    batch_size: int = 512
    """Images encoded at a time."""

    def __post_init__(self) -> None:
        """Check the batch size, and what the bundle keeps."""
        super().__post_init__()
        if self.batch_size < 1:
            raise ModeclipError(f"evaluate.batch_size: expected 1 image or more, got {self.batch_size}")


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A finished model, and what it cost."""

    name: str
    """``seed``, ``dense``, ``dense-total``, ``expert-0``, ``random-0``..."""
    role: Role
    """What it is for."""
    folder: Path
    """Its open_clip folder."""
    samples: int
    """Samples that its own training has seen, without those of the model that it continues."""
    start: Path | None = None
    """Folder of the model that it continues."""

    @classmethod
    def of(cls, job: TrainJob) -> TrainedModel | None:
        """Return the model of a job, None if it is not finished."""
        result = TrainResult.read(job)
        if result is None:
            return None
        start = None if job.start_from is None else Path(job.start_from).resolve()
        return cls(name=job.name, role=job.role, folder=Path(job.folder).resolve(), samples=result.samples, start=start)

    @classmethod
    def given(cls, folder: Path) -> TrainedModel:
        """Return a seed that was given; its own training counts as far as its folder tells of it."""
        result = None
        if (folder / "job.json").is_file():
            result = TrainResult.read(replace(TrainJob.load(folder / "job.json"), folder=str(folder)))
        samples = 0 if result is None else result.samples
        return cls(name=job_name("seed"), role="seed", folder=folder.resolve(), samples=samples)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the result table."""

    name: str
    """Name of the model."""
    kind: str
    """``seed``, ``dense``, ``expert``, ``bound``, ``mixture`` or ``control``."""
    samples: int
    """Samples that training all its models has cost, their seed's included once."""
    correct: Mapping[str, Bool[np.ndarray, " N"]]
    """For each task, whether each image was classified correctly."""
    rule: str | None = None
    """Routing rule of a mixture or a control."""
    entropy: Mapping[str, float] | None = None
    """Entropy of its routing on each task, in nats."""

    @property
    def accuracy(self) -> dict[str, float]:
        """Top-1 accuracy on each task, in [0, 1]."""
        return {task: float(is_correct.mean()) for task, is_correct in self.correct.items()}

    @property
    def average(self) -> float:
        """Plain mean over the tasks."""
        return float(np.mean(list(self.accuracy.values())))


def evaluate(
    catalog: Catalog,
    models: Sequence[TrainedModel],
    clustering: Clustering,
    encoder: str,
    config: EvaluateConfig,
    *,
    one_step: Clustering | None = None,
    cache: FeatureCache | None = None,
) -> dict[str, Any]:
    """Score every model, every routing rule and every control on every task.

    Args:
        catalog: Task catalog.
        models: The seed, which stands in for missing experts, and any of the others. A control with a model missing
            is left out.
        clustering: Fine centres and their experts.
        encoder: Encoder of class names, the one that the captions were clustered with.
        config: Templates, default rule, batch size.
        one_step: Centres of OneStep-n, whose row is routed by them; None: only its uniform average.
        cache: Where features are kept; None: nowhere.

    Returns:
        ``tasks``, ``chance``, ``models`` and ``routing``, as ``results.json`` holds them.
    """
    tasks, cache = catalog_tasks(catalog), cache or FeatureCache()
    models = sorted(models, key=lambda m: (m.role != "seed", m.role == "expert", len(m.name)))
    names = CachedEncoder(encoder, clustering.fine_centers.shape[1], cache)
    scorer = _Scorer(
        sources={model.name: ModelRef.of(model.name, model.folder) for model in models},
        plans=_plan(models, clustering, one_step, config),
        embeddings={task.name: names.encode(list(task.classnames)) for task in tasks},
        config=config,
        cache=cache,
    )
    rows = _with_bounds(scorer.rows(tasks, models))
    default = next(row for row in rows if row.kind == "mixture" and row.rule == config.rule)
    of_its_cost = [r for r in rows if r.name == "dense-total" or (r.name, r.samples) == ("dense", default.samples)]
    equal_cost = max(of_its_cost, key=lambda row: len(row.name), default=None)
    return {
        "tasks": [{"name": t.name, "num_classes": len(t.classnames), "num_images": len(t.images)} for t in tasks],
        "chance": {task.name: 1 / len(task.classnames) for task in tasks},
        "models": [_as_json(row, equal_cost, default) for row in rows],
        "routing": {t.name: _explained(scorer.route(t, clustering, config.rule), t, config.rule) for t in tasks},
    }


@dataclass(frozen=True, kw_only=True, eq=False)
class _Plan:
    """A row of the table before it is scored: which models answer together, and who weighs them."""

    name: str
    kind: str
    members: tuple[str, ...]
    rule: str | None = None
    clustering: Clustering | None = None
    """Whose centres route; None: the members have equal weights."""


def _plan(
    models: Sequence[TrainedModel], clustering: Clustering, one_step: Clustering | None, config: EvaluateConfig
) -> list[_Plan]:
    """Return the rows: single models, the mixture under every rule, the controls whose models are all there."""
    known, num_experts = [model.name for model in models], clustering.num_experts
    plans = [
        _Plan(name=model.name, kind=_kind(model.role), members=(model.name,))
        for model in models
        if model.role not in CONTROLS
    ]
    experts = tuple(name if (name := job_name("expert", k)) in known else job_name("seed") for k in range(num_experts))
    plans += [
        _Plan(name="mixture", kind="mixture", members=experts, rule=rule, clustering=clustering) for rule in RULES
    ]
    for control, title in CONTROLS.items():
        members, name = tuple(job_name(control, k) for k in range(num_experts)), f"{title}-{num_experts}"
        if not set(known) >= set(members):
            continue
        if control == "one-step" and one_step is not None and config.rule != "uniform":
            plans.append(_Plan(name=name, kind="control", members=members, rule=config.rule, clustering=one_step))
        plans.append(_Plan(name=name, kind="control", members=members, rule="uniform"))
    return plans


@dataclass(frozen=True, kw_only=True)
class _Scorer:
    """What rows are made of: the models, how they answer together, the class embeddings."""

    sources: Mapping[str, ModelRef]
    plans: Sequence[_Plan]
    embeddings: Mapping[str, Float[np.ndarray, "_ D"]]
    """Of the class names, by task."""
    config: EvaluateConfig
    cache: FeatureCache

    def rows(self, tasks: Sequence[Task], models: Sequence[TrainedModel]) -> list[Row]:
        """Score all rows on all tasks, one task after another."""
        found: list[dict[str, np.ndarray]] = [{} for _ in self.plans]
        entropy: list[dict[str, float]] = [{} for _ in self.plans]
        sources = list(self.sources.values())
        total = sum(len(task.images) * len(missing_images(sources, task.images, self.cache)) for task in tasks)
        with progress("evaluate", total, "images x models") as advance:
            for task in tasks:
                labels, weights = np.asarray(task.labels), [self._weigh(plan, task) for plan in self.plans]
                parts: list[list[np.ndarray]] = [[] for _ in self.plans]
                for rows, cosines in self._cosines(task, advance):
                    for plan, (given, _), part in zip(self.plans, weights, parts, strict=True):
                        answers = [cosines[member] for member in plan.members]
                        part.append(correct(answers[0] if given is None else mix(answers, given), labels[rows]))
                for index, part in enumerate(parts):
                    found[index][task.name] = np.concatenate(part)
                    if (spread := weights[index][1]) is not None:
                        entropy[index][task.name] = spread
        return [
            Row(
                name=plan.name,
                kind=plan.kind,
                samples=_cost(plan.members, models),
                correct=is_correct,
                rule=plan.rule,
                entropy=spreads or None,
            )
            for plan, is_correct, spreads in zip(self.plans, found, entropy, strict=True)
        ]

    def route(self, task: Task, clustering: Clustering, rule: str) -> Routing:
        """Weigh the experts of a clustering for a task."""
        return route(
            self.embeddings[task.name],
            clustering.fine_centers,
            clustering.expert_of_fine,
            num_experts=clustering.num_experts,
            rule=rule,
            temperature=self.config.temperature_of(rule),
        )

    def _weigh(self, plan: _Plan, task: Task) -> tuple[Float[np.ndarray, "... K"] | None, float | None]:
        """Return the weights of a row's members, None for a single model, and the entropy of what was routed."""
        if plan.rule is None:
            return None, None
        if plan.clustering is None:
            return np.full(len(plan.members), 1 / len(plan.members)), None
        routed = self.route(task, plan.clustering, plan.rule)
        return routed.weights, routed.entropy

    def _cosines(
        self, task: Task, advance: Callable[[int], None]
    ) -> Iterator[tuple[slice, dict[str, Float[np.ndarray, "n L"]]]]:
        """Yield the cosines of some images with all classes by each model."""
        sources = list(self.sources.values())
        prompts = [[fill(template, name) for template in self.config.templates] for name in task.classnames]
        texts = prompt_features(sources, prompts, self.cache)
        images = image_features(sources, task.images, self.cache, batch_size=self.config.batch_size, advance=advance)
        step = max(1, BLOCK_NUMBERS // (len(task.classnames) * len(sources)))
        for start in range(0, len(task.images), step):
            rows = slice(start, start + step)
            yield (
                rows,
                {
                    name: of_images[rows] @ of_texts.T
                    for name, of_images, of_texts in zip(self.sources, images, texts, strict=True)
                },
            )


def mix(cosines: Sequence[Float[np.ndarray, "N L"]], weights: Float[np.ndarray, "... K"]) -> Float[np.ndarray, "N L"]:
    """Return the weighted sum of the experts' cosines (MoDE eq. 4).

    Args:
        cosines: For each of K experts, the cosine of each image with each class.
        weights: One weight an expert, (K,), or one row a class, (L, K).

    Examples:
        >>> mix([np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])], np.array([0.75, 0.25])).tolist()
        [[0.75, 0.25]]
    """
    mixed = np.zeros_like(cosines[0])
    for expert, cosine in enumerate(cosines):
        mixed += cosine * weights[..., expert].astype(cosine.dtype)
    return mixed


def _with_bounds(rows: Sequence[Row]) -> list[Row]:
    """Put what chooses among the experts with the labels' help behind the single models."""
    experts = [row for row in rows if row.kind == "expert"]
    if not experts:
        return list(rows)
    place = next(index for index, row in enumerate(rows) if row.kind == "mixture")
    cost = rows[place].samples
    of_name = {row.name: row for row in experts}
    best, best_of_task = choose_by_labels({row.name: row.accuracy for row in experts})
    oracle = {task: of_name[name].correct[task] for task, name in best_of_task.items()}
    bounds = [
        Row(name="best single", kind="bound", samples=cost, correct=of_name[best].correct),
        Row(name="oracle", kind="bound", samples=cost, correct=oracle),
    ]
    return [*rows[:place], *bounds, *rows[place:]]


def _cost(names: Sequence[str], models: Sequence[TrainedModel]) -> int:
    """Return the samples that training some models has taken, each model that they continue counted once."""
    model_of_name = {model.name: model for model in models}
    model_of_folder = {model.folder: model for model in models}
    parts: dict[str, int] = {}
    for name in names:
        model: TrainedModel | None = model_of_name[name]
        while model is not None and model.name not in parts:
            parts[model.name] = model.samples
            model = None if model.start is None else model_of_folder.get(model.start)
    return sum(parts.values())


def _kind(role: Role) -> str:
    return role if role in {"expert", "seed"} else "dense"


def _explained(routing: Routing, task: Task, rule: str) -> dict[str, Any]:
    """Return what the report shows of one task's routing."""
    rows = np.broadcast_to(routing.weights, (len(task.classnames), routing.weights.shape[-1]))
    return {
        "rule": rule,
        "weights": rows.mean(axis=0).tolist(),
        "entropy": routing.entropy,
        "classes": [
            {"name": name, "nearest_fine": int(fine), "distance": float(distance), "weights": weights.tolist()}
            for name, fine, distance, weights in zip(
                task.classnames, routing.nearest_fine, routing.distance, rows, strict=True
            )
        ],
    }


def _as_json(row: Row, equal_cost: Row | None, default: Row) -> dict[str, Any]:
    interval = bootstrap_interval(row.correct)
    return {
        "name": row.name,
        "kind": row.kind,
        "rule": row.rule,
        "default": row is default,
        "samples": row.samples,
        "accuracy": row.accuracy,
        "average": row.average,
        "interval": [interval.low, interval.high],
        "entropy": dict(row.entropy) if row.entropy else None,
        "versus_dense_total": _difference(row, equal_cost) if row.kind in {"mixture", "control"} else None,
        "versus_mixture": _difference(row, default) if row.kind == "control" else None,
    }


def _difference(row: Row, reference: Row | None) -> dict[str, Any] | None:
    """Return how much higher a row's average is than another's, with the interval over the same images."""
    if reference is None:
        return None
    gain = paired_interval(row.correct, reference.correct)
    return {"difference": gain.mean, "interval": [gain.low, gain.high]}
