"""Systems and tasks -> what each system did on each task, with what the numbers rest on.

One pass over the images of a task serves all systems that need them, and an expert that has no weight on a task is not
run for it. Everything else is arithmetic on the vectors in the cache, so that the same call again runs no model, and a
call that was killed has lost at most the pass over one task.

    classification   class names route the mixture; the class with the highest similarity wins
    retrieval        all texts together route the search for texts, each text its own search for images
    selection        each text is routed by itself; images and captions of an instance are told apart
    linear_probe     a classifier on the vectors of all experts, whatever their weights

Source: MoDE (arXiv 2404.16030), Sec. 3.4, 4.3 and App. D; metrics as in `modeclip.evaluation.metrics` and `modeclip.evaluation.retrieval`.
Price: one forward pass a model, image and prompt, once; then N x L x D multiplications an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from modeclip.data.prompts import check_templates
from modeclip.data.tasks.task import Images, Task
from modeclip.errors import ModeclipError, unknown
from modeclip.evaluation.intervals import CONFIDENCE, NUM_RESAMPLES, Outcome, bootstrap_interval
from modeclip.evaluation.metrics import classify, select_captions
from modeclip.evaluation.probing import ProbeConfig, linear_probe
from modeclip.evaluation.retrieval import retrieve
from modeclip.evaluation.similarity import Similarity
from modeclip.evaluation.systems import System
from modeclip.mixture.routed_clip import logit_scale_of
from modeclip.mixture.rules import MIXES, Mix, entropy
from modeclip.models.clip import resolve_precision
from modeclip.models.feature_cache import FeatureCache, hash_texts
from modeclip.models.features import image_features, missing_images, prompt_features, text_features
from modeclip.models.pool import ModelRef
from modeclip.system.console import progress
from modeclip.system.devices import choose_device
from modeclip.system.files import versions

PROBE = "linear_probe"
"""Kind of a result that was fitted to the training images of its task."""

Features = Mapping[str, Float[np.ndarray, "_ _"]]
"""Vectors by the digest of the model."""


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """How systems are evaluated."""

    templates: tuple[str, ...] = ()
    """Prompts for class names of tasks without their own; none: those of the first bundle, or the bare names."""
    probe: ProbeConfig | None = None
    """Answer tasks with training images by a linear probe as well; None: by none."""
    batch_size: int = 512
    """Images encoded at a time."""
    mix: Mix = "cosines"
    """What of a mixture's experts is weighted and summed to tell classes apart, one of ``routing.MIXES``. Retrieval
    and the choice of captions have no classes and are always by cosines."""
    device: str = "auto"
    """What models run on: ``auto`` is the GPU if there is one."""
    precision: str = "32-true"
    """What they compute in, as in ``clip.PRECISIONS``; ``auto`` is the fastest. The default gives the same numbers
    on every machine."""

    def __post_init__(self) -> None:
        """Check the templates, the mix and the precision."""
        check_templates(self.templates, "templates")
        if self.mix not in MIXES:
            raise unknown("mix", self.mix, MIXES)
        resolve_precision(self.precision)


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """What one system did on one task."""

    task: Task
    """What was asked."""
    kind: str
    """The task's kind, or ``linear_probe``."""
    system: str
    """Name of who answered."""
    outcome: Outcome
    """Metrics, and every sample's part in them."""
    provenance: Mapping[str, Any]
    """What the numbers rest on, as JSON: hashes, versions, precision, seed, rule, weights..."""


def evaluate_systems(
    systems: Sequence[System],
    tasks: Sequence[Task],
    config: ScoreConfig,
    cache: FeatureCache,
    *,
    done: Callable[[list[Result]], object] | None = None,
) -> list[Result]:
    """Put tasks to systems.

    Args:
        systems: Who answers.
        tasks: What is asked; names must differ.
        config: How.
        cache: Where vectors are kept.
        done: Called with the results of each task as soon as they are there.

    Returns:
        A result a task and system, task by task; with ``config.probe`` one more where a task has training images.

    Raises:
        ModeclipError: Two tasks or systems have the same name, a model or an image cannot be read, or a class has no
            training image for its probe.
    """
    for kind, names in (("tasks", [task.name for task in tasks]), ("models", [system.name for system in systems])):
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ModeclipError(f"evaluate: two {kind} have the name {twice[0]!r}; give one of them another")
    templates = config.templates or next((s.templates for s in systems if s.templates), ("{}",))
    asked = []
    with progress("route", len(tasks), "tasks") as advance:
        for task in tasks:
            asked.append(_Asked.of(task, systems, templates, config, cache))
            advance(1)
    total = sum(
        len(images) * len(missing_images(sources, images, cache, precision=config.precision))
        for question in asked
        for images, sources in question.passes()
    )
    results = []
    with progress("evaluate", total, "images x models") as advance:
        for question in asked:
            results += (found := question.results(cache, advance))
            if done is not None:
                done(found)
    return results


@dataclass(frozen=True, kw_only=True, eq=False)
class _Weights:
    """How a system weighs its models for a task."""

    values: Float[np.ndarray, "... K"]
    """As `similarity.Similarity` has them."""
    per_image: bool = False
    """Whether their rows are of images."""
    each: Float[np.ndarray, "... K"] | None = None
    """In retrieval: of each text that searches an image, where these differ."""

    @classmethod
    def of(cls, system: System, task: Task, cache: FeatureCache) -> _Weights:
        """Route a task."""
        if system.per_image:
            return cls(values=system.weigh_images(task.images, cache), per_image=True)
        texts = task.classnames if task.kind == "classification" else task.texts
        values = system.weigh(texts, each=task.kind == "selection")
        if task.kind != "retrieval":
            return cls(values=values)
        each = system.weigh(texts, each=True)
        return cls(values=values, each=None if np.array_equal(each, values) else each)

    def uses(self, place: int) -> bool:
        """Whether a model has weight anywhere."""
        given = [self.values] if self.each is None else [self.values, self.each]
        return any(place < values.shape[-1] and bool(values[..., place].any()) for values in given)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Asked:
    """A task, and how each system weighs its models for it."""

    task: Task
    systems: Sequence[System]
    weights: Mapping[str, _Weights]
    """By system."""
    prompts: tuple[tuple[str, ...], ...]
    config: ScoreConfig

    @classmethod
    def of(
        cls,
        task: Task,
        systems: Sequence[System],
        templates: Sequence[str],
        config: ScoreConfig,
        cache: FeatureCache,
    ) -> _Asked:
        """Route a task for all systems."""
        asked = cls(
            task=task,
            systems=systems,
            weights={system.name: _Weights.of(system, task, cache) for system in systems},
            prompts=task.prompts_of(templates) if task.kind == "classification" else (),
            config=config,
        )
        if asked._train is not None:
            unseen = np.setdiff1d(np.asarray(task.labels), np.asarray(asked._train.labels))
            if len(unseen):
                names = ", ".join(repr(task.classnames[label]) for label in unseen[:3]) + ", ..." * (len(unseen) > 3)
                raise ModeclipError(
                    f"task {task.name!r}: {len(unseen)} of its classes have no training image for a linear probe: "
                    f"{names}; add images, or evaluate without --probe"
                )
        return asked

    def passes(self) -> list[tuple[Images, list[ModelRef]]]:
        """Return images and the models that have to see them: those of the task, and those of its probe."""
        is_probed = self._train is not None
        passes = [(self.task.images, self._sources(everyone=is_probed))]
        return passes if self._train is None else [*passes, (self._train.images, self._sources(everyone=True))]

    def results(self, cache: FeatureCache, advance: Callable[[int], None]) -> list[Result]:
        """Answer the task by every system."""
        config, task, sources = self.config, self.task, self._sources(everyone=False)
        how: dict[str, Any] = {"device": config.device, "precision": config.precision}
        seen = [
            _by_digest(models, image_features(models, of, cache, batch_size=config.batch_size, advance=advance, **how))
            for of, models in self.passes()
        ]
        if task.kind == "classification":
            texts = _by_digest(sources, prompt_features(sources, self.prompts, cache, **how))
        else:
            texts = _by_digest(sources, text_features(sources, task.texts, cache, **how))
        results = []
        for system in self.systems:
            try:
                outcome = self._answer(system, seen[0], texts)
                results.append(self._result(system, task.kind, outcome, self._routing(system)))
                if len(seen) > 1:
                    results.append(self._probe(system, seen[1], seen[0]))
            except ModeclipError as error:
                raise ModeclipError(f"task {task.name!r}, model {system.name!r}: {error}") from error
        return results

    def _answer(self, system: System, images: Features, texts: Features) -> Outcome:
        task, weights = self.task, self.weights[system.name]
        by_chance = task.kind == "classification" and self.config.mix != "cosines" and system.mixture is not None
        similarity = _similarity(system, weights.values, images, texts, weights.per_image, by_chance)
        if task.kind == "classification":
            assert task.labels is not None
            return classify(similarity, task.labels, task.metric)
        if task.kind == "selection":
            assert task.instance_of_image is not None
            assert task.instance_of_text is not None
            return select_captions(similarity, task.instance_of_image, task.instance_of_text)
        assert task.image_of_text is not None
        if weights.each is None:
            return retrieve(similarity, task.image_of_text)
        to_images = _similarity(system, weights.each, images, texts, per_image=False)
        return retrieve(to_images, task.image_of_text, to_texts=similarity)

    def _probe(self, system: System, train: Features, test: Features) -> Result:
        """Fit a classifier on the vectors of all experts of a system; a model that stands for several counts once."""
        assert self._train is not None
        assert self.config.probe is not None
        digests = list(dict.fromkeys(source.digest for source in system.sources))
        found = linear_probe(
            [train[digest] for digest in digests],
            np.asarray(self._train.labels),
            [test[digest] for digest in digests],
            np.asarray(self.task.labels),
            self.config.probe,
            metric=self.task.metric,
        )
        facts = asdict(self.config.probe) | {"C": found.C, "converged": found.converged, "num_train": found.num_train}
        facts |= {"sweep": [asdict(trial) for trial in found.sweep], "train_images": self._train.images.digest}
        return self._result(system, PROBE, found.outcome, {"probe": facts, "seed": self.config.probe.seed})

    def _result(self, system: System, kind: str, outcome: Outcome, more: Mapping[str, Any]) -> Result:
        """Put an outcome together with what it rests on, as JSON."""
        task, interval = self.task, bootstrap_interval([outcome])
        facts: dict[str, Any] = {
            "interval": [interval.low, interval.high],
            "bootstrap": {"resamples": NUM_RESAMPLES, "confidence": CONFIDENCE, "seed": 0},
            "group": task.group,
            "source": task.source,
            "num_images": len(task.images),
            "images": task.images.digest,
            "models": {source.name: source.digest for source in system.sources},
            "preprocess": sorted({source.preprocess for source in system.sources}),
            "device": str(choose_device(self.config.device)),
            "precision": resolve_precision(self.config.precision),
            "versions": versions(),
        }
        if task.kind == "classification":
            facts |= {"num_classes": len(task.classnames), "classnames": hash_texts(task.classnames)}
            facts["prompts"] = hash_texts(prompt for of_class in self.prompts for prompt in of_class)
            facts["num_templates"] = max(len(of_class) for of_class in self.prompts)
        else:
            facts |= {"num_texts": len(task.texts), "texts": hash_texts(task.texts)}
        return Result(task=task, kind=kind, system=system.name, outcome=outcome, provenance=facts | dict(more))

    def _routing(self, system: System) -> dict[str, Any]:
        """Return how a mixture was routed, as JSON; of weights that differ, the mean."""
        if system.mixture is None:
            return {}
        weights = self.weights[system.name].values
        mean = weights.reshape(-1, weights.shape[-1]).mean(axis=0).tolist()
        shares = dict(zip(system.mixture.members, mean, strict=True))
        mix = self.config.mix if self.task.kind == "classification" else "cosines"
        return system.mixture.facts() | {"mix": mix, "weights": shares, "entropy": entropy(weights)}

    @property
    def _train(self) -> Task | None:
        """Where the probe is fitted; None: the task has no probe."""
        wanted = self.config.probe is not None and self.task.kind == "classification"
        return self.task.train if wanted and self.task.metric != "mean_average_precision" else None

    def _sources(self, *, everyone: bool) -> list[ModelRef]:
        """Return the models that some system needs, each once."""
        needed: dict[str, ModelRef] = {}
        for system in self.systems:
            for place, source in enumerate(system.sources):
                if everyone or self.weights[system.name].uses(place):
                    needed.setdefault(source.digest, source)
        return list(needed.values())


def _similarity(
    system: System,
    weights: Float[np.ndarray, "... K"],
    images: Features,
    texts: Features,
    per_image: bool,
    by_chance: bool = False,
) -> Similarity:
    """Return the similarities by the models that have weight; one that stands for several experts counts once."""
    shares: dict[str, np.ndarray] = {}
    places: dict[str, Path] = {}
    for place, source in enumerate(system.sources):
        share = weights[..., place]
        if share.any():
            shares[source.digest] = shares[source.digest] + share if source.digest in shares else share
            places[source.digest] = Path(source.spec)
    return Similarity(
        images=[images[digest] for digest in shares],
        texts=[texts[digest] for digest in shares],
        weights=np.stack(list(shares.values()), axis=-1),
        per_image=per_image,
        scales=np.array([logit_scale_of(places[digest]) for digest in shares]) if by_chance else None,
    )


def _by_digest(sources: Sequence[ModelRef], features: Sequence[Float[np.ndarray, "_ _"]]) -> dict[str, np.ndarray]:
    return {source.digest: vectors for source, vectors in zip(sources, features, strict=True)}
