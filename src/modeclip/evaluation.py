"""Held-out tasks and trained models -> accuracies of each model, of their bounds, and of the mixture under every rule.

Every image is decoded once and encoded by every model; every other number is arithmetic on cosines. A mixture's cosine
is the weighted sum of its experts' (MoDE eq. 4), so all routing rules are scored from the same features. Beside the
mixture stand the rows that keep a reader from being misled: the uniform ensemble, the dense model at the mixture's
total cost, and two bounds that look at the labels: the best single expert, and an oracle that picks the best expert
for each task. Where a run has trained the controls of the paper (`modeclip.controls`), each is a row too: the uniform
average of its n models, and for OneStep-n also their mixture routed by its own centres. CoarseCluster-n is the
mixture's rule ``coarse``.

Source: MoDE Sec. 4.3, 5.1 and 5.2; the plain mean over tasks as in its tables. Intervals: bootstrap over the images of
each task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int

from modeclip.catalog import Catalog
from modeclip.clustering import Clustering
from modeclip.encoders import load_encoder
from modeclip.errors import ModeclipError, unknown
from modeclip.jobs import TrainJob, TrainResult
from modeclip.metrics import bootstrap_interval, correct, paired_interval
from modeclip.progress import progress
from modeclip.routing import DEFAULT_TEMPERATURE, RULES, Routing, route

if TYPE_CHECKING:
    from modeclip.clip import Clip

DEFAULT_RULE = "per_class"
"""What measurement favours: over three seeds of the demo it beat the uniform ensemble by 0.6 ± 0.2 points, the
only rule with a clear gain (``runs/rules_over_seeds.py`` prints the table, docs/log.md keeps it)."""

CONTROLS = {"random": "Random", "full": "Full", "one-step": "OneStep"}
"""Name of a control's row, by the name of its models: ``random-0``, ``random-1``..."""


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
class TrainedModel:
    """A finished model, and what it cost."""

    name: str
    """``seed``, ``dense``, ``dense-total``, ``expert-0``, ``random-0``..."""
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
        return cls(name=job.name, folder=Path(job.folder).resolve(), samples=result.samples, start=start)

    @classmethod
    def given(cls, folder: Path) -> TrainedModel:
        """Return a seed that was given; its own training counts as far as its folder tells of it."""
        result = None
        if (folder / "job.json").is_file():
            result = TrainResult.read(replace(TrainJob.load(folder / "job.json"), folder=str(folder)))
        return cls(name="seed", folder=folder.resolve(), samples=0 if result is None else result.samples)


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
    models: Sequence[TrainedModel],
    clustering: Clustering,
    encoder: str,
    config: EvaluateConfig,
    *,
    one_step: Clustering | None = None,
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

    Returns:
        ``tasks``, ``chance``, ``models`` and ``routing``, as ``results.json`` holds them.
    """
    tasks, num_experts = load_tasks(catalog), clustering.num_experts
    models = sorted(models, key=lambda m: (m.name != "seed", m.name.startswith("expert-"), len(m.name)))
    known = {model.name: model for model in models}
    cosines = _all_cosines(catalog, tasks, {model.name: model.folder for model in models}, config)
    embedder = load_encoder(encoder)
    scorer = _Scorer(
        tasks=tasks,
        cosines=cosines,
        embeddings={task.name: embedder.encode(list(task.classnames)) for task in tasks},
        models=known,
        config=config,
    )
    rows = [scorer.single(name) for name in known if not _is_control(name)]
    experts = [f"expert-{k}" if f"expert-{k}" in known else "seed" for k in range(num_experts)]
    rows += _bounds([row for row in rows if row.kind == "expert"], scorer.cost(experts))
    for rule in RULES:
        rows.append(scorer.mixed("mixture", "mixture", experts, clustering, rule))
    for control, name in CONTROLS.items():
        members = [f"{control}-{k}" for k in range(num_experts)]
        if not known.keys() >= set(members):
            continue
        name = f"{name}-{num_experts}"
        if control == "one-step" and one_step is not None and config.rule != "uniform":
            rows.append(scorer.mixed(name, "control", members, one_step, config.rule))
        rows.append(scorer.mixed(name, "control", members, None, "uniform"))
    default = next(row for row in rows if row.kind == "mixture" and row.rule == config.rule)
    dense_total = next((row for row in rows if row.name == "dense-total"), None)
    return {
        "tasks": [{"name": t.name, "num_classes": len(t.classnames), "num_images": len(t.rows)} for t in tasks],
        "chance": {task.name: 1 / len(task.classnames) for task in tasks},
        "models": [_as_json(row, dense_total, default) for row in rows],
        "routing": {t.name: _explained(scorer.route(t, clustering, config.rule), t, config.rule) for t in tasks},
    }


@dataclass(frozen=True, kw_only=True)
class _Scorer:
    """What rows are made of: the cosines of every model, the class embeddings, the costs."""

    tasks: Sequence[ZeroShotTask]
    cosines: Mapping[str, Mapping[str, Float[np.ndarray, "_ _"]]]
    """Of each image with each class, by model and task."""
    embeddings: Mapping[str, Float[np.ndarray, "_ D"]]
    """Of the class names, by task."""
    models: Mapping[str, TrainedModel]
    config: EvaluateConfig

    def single(self, name: str) -> Row:
        """Return the row of one model."""
        return Row(name=name, kind=_kind(name), samples=self.cost([name]), correct=self._correct(self.cosines[name]))

    def mixed(self, name: str, kind: str, members: Sequence[str], clustering: Clustering | None, rule: str) -> Row:
        """Return the row of several models, routed by a clustering, or with equal weights where there is none."""
        mixed, entropy = {}, {}
        for task in self.tasks:
            weights = np.full(len(members), 1 / len(members))
            if clustering is not None:
                routed = self.route(task, clustering, rule)
                weights, entropy[task.name] = routed.weights, routed.entropy
            mixed[task.name] = mix([self.cosines[member][task.name] for member in members], weights)
        return Row(
            name=name,
            kind=kind,
            samples=self.cost(members),
            correct=self._correct(mixed),
            rule=rule,
            entropy=entropy or None,
        )

    def route(self, task: ZeroShotTask, clustering: Clustering, rule: str) -> Routing:
        """Weigh the experts of a clustering for a task."""
        return route(
            self.embeddings[task.name],
            clustering.fine_centers,
            clustering.expert_of_fine,
            num_experts=clustering.num_experts,
            rule=rule,
            temperature=self.config.temperature_of(rule),
        )

    def cost(self, names: Sequence[str]) -> int:
        """Return the samples that training some models has taken, each model that they continue counted once."""
        model_of_folder = {model.folder: model for model in self.models.values()}
        parts: dict[str, int] = {}
        for name in names:
            model: TrainedModel | None = self.models[name]
            while model is not None and model.name not in parts:
                parts[model.name] = model.samples
                model = None if model.start is None else model_of_folder.get(model.start)
        return sum(parts.values())

    def _correct(self, cosines: Mapping[str, np.ndarray]) -> dict[str, Bool[np.ndarray, " N"]]:
        return {task.name: correct(cosines[task.name], task.labels) for task in self.tasks}


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


def _is_control(name: str) -> bool:
    return name.rpartition("-")[0] in CONTROLS


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


def _as_json(row: Row, dense_total: Row | None, default: Row) -> dict[str, Any]:
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
        "versus_dense_total": _difference(row, dense_total) if row.kind in {"mixture", "control"} else None,
        "versus_mixture": _difference(row, default) if row.kind == "control" else None,
    }


def _difference(row: Row, reference: Row | None) -> dict[str, Any] | None:
    """Return how much higher a row's average is than another's, with the interval over the same images."""
    if reference is None:
        return None
    gain = paired_interval(row.correct, reference.correct)
    return {"difference": gain.mean, "interval": [gain.low, gain.high]}
