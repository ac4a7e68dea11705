"""Held-out tasks and trained models -> accuracies of each model, of their bounds, and of the mixture under every rule.

Every image is decoded once and encoded by every model; every other number is arithmetic on cosines. A mixture's cosine
is the weighted sum of its experts' (MoDE eq. 4), so all routing rules are scored from the same features. Beside the
mixture stand the rows that keep a reader from being misled: the uniform ensemble, the dense model at the mixture's
total cost, and two bounds that look at the labels: the best single expert, and an oracle that picks the best expert
for each task.

Source: MoDE Sec. 4.3; the plain mean over tasks as in its tables. Intervals: bootstrap over the images of each task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int

from modeclip.catalog import Catalog
from modeclip.clustering import Clustering
from modeclip.encoders import load_encoder
from modeclip.errors import ModeclipError, unknown
from modeclip.metrics import bootstrap_interval, correct, paired_interval
from modeclip.progress import progress
from modeclip.routing import DEFAULT_TEMPERATURE, RULES, Routing, route

if TYPE_CHECKING:
    from modeclip.clip import Clip

DEFAULT_RULE = "per_class"
"""What measurement favours: over three seeds of the demo it beat the uniform ensemble by 0.6 ± 0.2 points, the
only rule with a clear gain (``runs/rules_over_seeds.py`` prints the table, docs/log.md keeps it)."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How models are evaluated, and what the bundle will do by default."""

    templates: tuple[str, ...] = ("{}",)
    """Prompts for class names, ``{}`` where the name goes; ``{}`` alone where captions are bare names."""
    rule: str = DEFAULT_RULE
    """Routing rule that the bundle uses unless told otherwise; one of ``routing.RULES``."""
    temperature: float | None = None
    """Temperature of that rule; none: the rule's own default."""
    batch_size: int = 512
    """Images encoded at a time."""

    def __post_init__(self) -> None:
        """Check the rule and the templates."""
        if self.rule not in RULES:
            raise unknown("rule", self.rule, RULES)
        for template in self.templates:
            if "{}" not in template:
                raise ModeclipError(f"evaluate.templates: {template!r} has no {{}} where the class name goes")

    def temperature_of(self, rule: str) -> float:
        """Return the temperature that a rule is scored with."""
        own = self.temperature if rule == self.rule else None
        return DEFAULT_TEMPERATURE[rule] if own is None else own


@dataclass(frozen=True, kw_only=True)
class ZeroShotTask:
    """One classification task: which rows of the task catalog, and which of the classes each shows."""

    name: str
    """Name of the task."""
    classnames: tuple[str, ...]
    """Its classes, sorted."""
    rows: Int[np.ndarray, " N"]
    """Rows of the task catalog."""
    labels: Int[np.ndarray, " N"]
    """Index of each row's class."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the result table."""

    name: str
    """Name of the model."""
    kind: str
    """``seed``, ``dense``, ``expert``, ``bound`` or ``mixture``."""
    samples: int
    """Samples that training it has cost, its seed's included."""
    correct: Mapping[str, Bool[np.ndarray, " N"]]
    """For each task, whether each image was classified correctly."""
    rule: str | None = None
    """Routing rule of a mixture."""
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


def load_tasks(catalog: Catalog) -> list[ZeroShotTask]:
    """Read the tasks of a task catalog (columns ``task`` and ``caption`` = class name), sorted by name."""
    columns = catalog.read(["task", "caption"])
    tasks = []
    for name in sorted(set(columns["task"])):
        rows = np.flatnonzero(columns["task"] == name)
        classnames, labels = np.unique(columns["caption"][rows].astype(str), return_inverse=True)
        tasks.append(ZeroShotTask(name=str(name), classnames=tuple(classnames.tolist()), rows=rows, labels=labels))
    return tasks


def evaluate(
    catalog: Catalog,
    models: Mapping[str, Path],
    samples: Mapping[str, int],
    clustering: Clustering,
    encoder: str,
    config: EvaluateConfig,
) -> dict[str, Any]:
    """Score every model and every routing rule on every task.

    Args:
        catalog: Task catalog.
        models: Model folder by name: ``seed``, ``dense``, ``dense-total``, ``expert-0``... (any may be missing but
            ``seed``, which stands in for missing experts).
        samples: Samples that each model's own job has trained on.
        clustering: Fine centres and their experts.
        encoder: Encoder of class names, the one that the captions were clustered with.
        config: Templates, default rule, batch size.

    Returns:
        ``tasks``, ``chance``, ``models`` and ``routing``, as ``results.json`` holds them.
    """
    tasks = load_tasks(catalog)
    order = sorted(models, key=lambda name: (name != "seed", name.startswith("expert-"), len(name)))
    models = {name: models[name] for name in order}
    cosines = _all_cosines(catalog, tasks, models, config)
    num_experts = clustering.num_experts
    experts = [f"expert-{k}" if f"expert-{k}" in models else "seed" for k in range(num_experts)]
    seed_cost = samples["seed"]
    costs = {name: count if name in {"seed", "dense-total"} else seed_cost + count for name, count in samples.items()}
    mixture_cost = seed_cost + sum(samples[f"expert-{k}"] for k in range(num_experts) if f"expert-{k}" in samples)
    rows = [
        Row(name=name, kind=_kind(name), samples=costs[name], correct=_correct(cosines[name], tasks)) for name in models
    ]
    rows += _bounds([row for row in rows if row.kind == "expert"], mixture_cost)
    embedder = load_encoder(encoder)
    embeddings = {task.name: embedder.encode(list(task.classnames)) for task in tasks}
    routing: dict[str, Any] = {}
    for rule in RULES:
        routes = {task.name: _route(embeddings[task.name], clustering, rule, config) for task in tasks}
        mixed = {
            task.name: mix([cosines[name][task.name] for name in experts], routes[task.name].weights) for task in tasks
        }
        rows.append(
            Row(
                name="mixture",
                kind="mixture",
                samples=mixture_cost,
                correct=_correct(mixed, tasks),
                rule=rule,
                entropy={name: routed.entropy for name, routed in routes.items()},
            )
        )
        if rule == config.rule:
            routing = {task.name: _explained(routes[task.name], task, rule) for task in tasks}
    reference = next((row for row in rows if row.name == "dense-total"), None)
    return {
        "tasks": [{"name": t.name, "num_classes": len(t.classnames), "num_images": len(t.rows)} for t in tasks],
        "chance": {task.name: 1 / len(task.classnames) for task in tasks},
        "models": [_as_json(row, reference, config.rule) for row in rows],
        "routing": routing,
    }


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


def _all_cosines(
    catalog: Catalog, tasks: Sequence[ZeroShotTask], models: Mapping[str, Path], config: EvaluateConfig
) -> dict[str, dict[str, Float[np.ndarray, "N L"]]]:
    """Return the cosine of each image with each class of its task, by model and task."""
    import torch

    from modeclip.clip import encode_image, load_clip
    from modeclip.mixture import class_features

    clips: dict[str, Clip] = {name: load_clip(folder) for name, folder in models.items()}
    for clip in clips.values():
        clip.model.eval()
    found: dict[str, dict[str, np.ndarray]] = {name: {} for name in clips}
    total = sum(len(task.rows) for task in tasks) * len(clips)
    with torch.inference_mode(), progress("evaluate", total, "images x models") as advance:
        for task in tasks:
            texts = {
                name: class_features(clip.model, clip, task.classnames, config.templates)
                for name, clip in clips.items()
            }
            parts: dict[str, list[np.ndarray]] = {name: [] for name in clips}
            for start in range(0, len(task.rows), config.batch_size):
                pictures = catalog.images(task.rows[start : start + config.batch_size])
                batch = next(iter(clips.values())).images(pictures)
                for name, clip in clips.items():
                    parts[name].append((encode_image(clip.model, batch) @ texts[name].T).numpy())
                    advance(len(pictures))
            for name, arrays in parts.items():
                found[name][task.name] = np.concatenate(arrays)
    return found


def _correct(cosines: Mapping[str, np.ndarray], tasks: Sequence[ZeroShotTask]) -> dict[str, Bool[np.ndarray, " N"]]:
    return {task.name: correct(cosines[task.name], task.labels) for task in tasks}


def _route(embeddings: np.ndarray, clustering: Clustering, rule: str, config: EvaluateConfig) -> Routing:
    return route(
        embeddings,
        clustering.fine_centers,
        clustering.expert_of_fine,
        num_experts=clustering.num_experts,
        rule=rule,
        temperature=config.temperature_of(rule),
    )


def _bounds(experts: Sequence[Row], cost: int) -> list[Row]:
    """Return the rows that choose among the experts with the labels' help."""
    if not experts:
        return []
    best = max(experts, key=lambda row: row.average)
    oracle = {
        task: max((row.correct[task] for row in experts), key=lambda is_correct: float(is_correct.mean()))
        for task in experts[0].correct
    }
    return [
        Row(name="best single", kind="bound", samples=cost, correct=best.correct),
        Row(name="oracle", kind="bound", samples=cost, correct=oracle),
    ]


def _kind(name: str) -> str:
    return "expert" if name.startswith("expert-") else "seed" if name == "seed" else "dense"


def _explained(routing: Routing, task: ZeroShotTask, rule: str) -> dict[str, Any]:
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


def _as_json(row: Row, reference: Row | None, default_rule: str) -> dict[str, Any]:
    versus = None
    if reference is not None and row.kind == "mixture":
        gain = paired_interval(row.correct, reference.correct)
        versus = {"difference": gain.mean, "interval": [gain.low, gain.high]}
    interval = bootstrap_interval(row.correct)
    return {
        "name": row.name,
        "kind": row.kind,
        "rule": row.rule,
        "default": row.kind == "mixture" and row.rule == default_rule,
        "samples": row.samples,
        "accuracy": row.accuracy,
        "average": row.average,
        "interval": [interval.low, interval.high],
        "entropy": dict(row.entropy) if row.entropy else None,
        "versus_dense_total": versus,
    }
