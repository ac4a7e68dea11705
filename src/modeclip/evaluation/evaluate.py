"""The evaluator: finds what each of several systems can do on each of several tasks, and on average.

One pass over the images of a task serves all systems that need them, and an expert that has no weight on a task is not
run for it. All else is arithmetic on vectors that the cache keeps: the same call again runs no model, and a call that
was killed has lost at most the pass over one task. Runs, the command line and checks during fine-tuning all come by
here: vectors make a `Similarity`, `answer` makes metrics of it, `averages` and `run_table` compare these.

    classification   class names route the mixture; the class with the highest similarity wins
    retrieval        all texts together route the search for texts, each text its own search for images
    selection        each text is routed by itself; images and captions of an instance are told apart
    linear_probe     a classifier on the vectors of all experts, whatever their weights

Source: MoDE (arXiv 2404.16030), Sec. 3.4, 4.3 and App. D; the plain mean over tasks as in its tables. Metrics as in
`modeclip.evaluation.metrics` and `modeclip.evaluation.retrieval`.
Price: each model encodes each image and each prompt once; then N x L x D multiplications for each model of a system.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from modeclip.data.knowledge import Knowledge, check_knowledge, load_knowledge
from modeclip.data.prompts import check_templates
from modeclip.data.tasks.task import Images, Task
from modeclip.errors import ModeclipError, check_above_zero, check_least, in_one_line, unknown
from modeclip.evaluation.intervals import (
    CONFIDENCE,
    NUM_RESAMPLES,
    Interval,
    Outcome,
    PairedTest,
    average,
    bootstrap_interval,
    paired_interval,
    paired_test,
)
from modeclip.evaluation.metrics import choose_by_labels, score_classes, select_captions
from modeclip.evaluation.probing import ProbeConfig, linear_probe
from modeclip.evaluation.results import Result
from modeclip.evaluation.retrieval import retrieve
from modeclip.evaluation.similarity import Similarity
from modeclip.evaluation.systems import BEST_SINGLE, ORACLE, System, Weights, is_equal_cost
from modeclip.mixture.bundle import RoutingConfig
from modeclip.mixture.explain import flag
from modeclip.mixture.router import ClusterRouter
from modeclip.mixture.rules import MIXES, Mix, entropy, route
from modeclip.models.clip import logit_scale_of, resolve_precision
from modeclip.models.feature_cache import FeatureCache, hash_texts
from modeclip.models.features import image_features, missing_images, prompt_features, text_features
from modeclip.models.pool import ModelRef
from modeclip.system.console import progress
from modeclip.system.devices import choose_device
from modeclip.system.files import versions

FAULTS = (ModeclipError, OSError, ArithmeticError, RuntimeError, ValueError)
"""What a model, its files or a task's images may raise; anything else is a defect of ours."""
PROBE = "linear_probe"
"""Kind of a result that was fitted to the training images of its task."""

Features = Mapping[str, Float[np.ndarray, "_ _"]]
"""Vectors by the digest of the model that made them."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How systems are evaluated."""

    templates: tuple[str, ...] = ()
    """Prompts, {} or {c} where the class name goes; default: each task's own, or the first bundle's."""
    knowledge: tuple[str, ...] = ()
    """Put the definition of the class name behind each prompt (K-LITE), from these dictionaries in this order: wordnet,
    wordnet:FOLDER, or a dump of Wiktionary by kaikki.org. Default: prompts as they are."""
    mix: Mix = "cosines"
    """What of a mixture's experts is weighted and summed to tell classes apart, one of ``rules.MIXES``. Retrieval and
    the choice of captions have no classes and always sum cosines."""
    probe: bool = False
    """Fit a linear probe too, where a task has training images."""
    probe_c: float | None = None
    """Inverse strength of the probe's regularisation, above 0; default: chosen on held-out training images."""
    batch_size: int = 512
    """Images encoded at a time."""
    device: str = "auto"
    """What models run on: auto (the GPU if there is one), cpu, cuda, cuda:1..."""
    precision: str = "32-true"
    """What they compute in: 32-true, bf16-mixed, 16-mixed, or auto for the fastest here. The default gives the same
    numbers on every machine."""

    def __post_init__(self) -> None:
        """Check every field that has a range."""
        check_templates(self.templates, "templates")
        if self.mix not in MIXES:
            raise unknown("mix", self.mix, MIXES)
        check_least("evaluate", self, batch_size=1)
        check_above_zero("evaluate", self, "probe_c")
        resolve_precision(self.precision)
        _ = self.probe_config

    @property
    def probe_config(self) -> ProbeConfig:
        """How a linear probe is fitted."""
        return ProbeConfig(C=self.probe_c)


@dataclass(frozen=True, kw_only=True)
class RecipeEvaluateConfig(RoutingConfig):
    """How a recipe's models are evaluated, and what its bundle does by default."""

    batch_size: int = 512
    """Images encoded at a time."""
    knowledge: tuple[str, ...] = ()
    """Dictionaries whose definitions stand behind the prompts, as of `modeclip evaluate`; the bundle does not keep
    them."""

    def __post_init__(self) -> None:
        """Check the batch size, the dictionaries, and what the bundle keeps."""
        super().__post_init__()
        check_least("evaluate", self, batch_size=1)
        check_knowledge(self.knowledge)


def evaluate(
    systems: Sequence[System],
    tasks: Sequence[Task],
    config: EvaluateConfig | None = None,
    cache: FeatureCache | None = None,
    *,
    done: Callable[[list[Result]], object] | None = None,
    failed: Callable[[str], object] | None = None,
) -> list[Result]:
    """Put tasks to systems.

    Args:
        systems: Who answers. Systems that the labels choose have the systems that they are chosen among beside them.
        tasks: What is asked; their names must differ.
        config: How they are asked.
        cache: Where vectors are kept, those of `open_systems` if it had one; None: nowhere.
        done: Called with the results of each task as soon as they are there, and last with those that labels chose.
        failed: Called with a line about each result that cannot be had (which task, which model, why); the others are
            made all the same. None: the first of these lines is raised.

    Returns:
        A result for each task and system, task by task, and with ``config.probe`` one more where a task has training
        images; then the results that labels chose.

    Raises:
        ModeclipError: Two tasks or systems have the same name, or a class has no training image for its probe; without
            ``failed`` also where a model or an image cannot be read, or a model's vectors are not finite.
    """
    for kind, names in (("tasks", [task.name for task in tasks]), ("models", [system.name for system in systems])):
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ModeclipError(f"evaluate: two {kind} have the name {twice[0]!r}; give one of them another")
    config, cache, failed = config or EvaluateConfig(), cache or FeatureCache(), failed or _raise
    templates = config.templates or next((s.templates for s in systems if s.templates), ("{}",))
    answering = [system for system in systems if not system.chosen_among]
    knowledge = load_knowledge(config.knowledge)
    questions = []
    with progress("route", len(tasks), "tasks") as advance:
        for task in tasks:
            questions.append(_Question.of(task, answering, templates, knowledge, config, cache, failed))
            advance(1)
    total = sum(
        len(images) * len(missing_images(refs, images, cache, precision=config.precision))
        for question in questions
        for images, refs in question.passes()
    )
    results: list[Result] = []
    with progress("evaluate", total, "images x models") as advance:
        for question in questions:
            results += (found := question.results(cache, advance, failed))
            if found and done is not None:
                done(found)
    chosen = [result for system in systems if system.chosen_among for result in _choose(system, results)]
    if chosen and done is not None:
        done(chosen)
    return [*results, *chosen]


def _raise(problem: str) -> None:
    raise ModeclipError(problem)


def answer(task: Task, similarity: Similarity, to_images: Similarity | None = None) -> Outcome:
    """Score a task by similarities.

    Args:
        task: What is asked.
        similarity: Of its images with its classes or texts.
        to_images: Retrieval: the same for texts that search an image, where the weights of these differ.
    """
    if task.kind == "classification":
        assert task.labels is not None
        return score_classes(similarity, task.labels, task.metric)
    if task.kind == "selection":
        assert task.instance_of_image is not None
        assert task.instance_of_text is not None
        return select_captions(similarity, task.instance_of_image, task.instance_of_text)
    assert task.image_of_text is not None
    return retrieve(similarity if to_images is None else to_images, task.image_of_text, to_texts=similarity)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Question:
    """A task, and how each system weighs its models for it."""

    task: Task
    systems: Sequence[System]
    weights: Mapping[str, Weights]
    """How each system weighs its models, by the name of the system."""
    prompts: tuple[tuple[str, ...], ...]
    """Classification: the prompts of each class."""
    config: EvaluateConfig
    knowledge: Knowledge
    """Dictionaries whose definitions the prompts have; there may be none."""

    @classmethod
    def of(
        cls,
        task: Task,
        systems: Sequence[System],
        templates: Sequence[str],
        knowledge: Knowledge,
        config: EvaluateConfig,
        cache: FeatureCache,
        failed: Callable[[str], object],
    ) -> _Question:
        """Route a task for all systems, and check that a probe knows all of its classes."""
        weights: dict[str, Weights] = {}
        for system in systems:
            try:
                weights[system.name] = system.weigh(task, cache)
            except FAULTS as error:
                failed(f"task {task.name!r}, model {system.name!r}: {_cause(error)}")
        prompts = task.prompts_of(templates) if task.kind == "classification" else ()
        question = cls(
            task=task,
            systems=[system for system in systems if system.name in weights],
            weights=weights,
            prompts=tuple(map(knowledge.explain, prompts, task.classnames)),
            config=config,
            knowledge=knowledge,
        )
        if question.train is not None:
            unseen = np.setdiff1d(np.asarray(task.labels), np.asarray(question.train.labels))
            if len(unseen):
                names = ", ".join(repr(task.classnames[label]) for label in unseen[:3]) + ", ..." * (len(unseen) > 3)
                raise ModeclipError(
                    f"task {task.name!r}: {len(unseen)} of its classes have no training image for a linear probe: "
                    f"{names}; add images, or evaluate without --probe"
                )
        return question

    @property
    def train(self) -> Task | None:
        """Where the probe is fitted; None: the task has no probe."""
        wanted = self.config.probe and self.task.kind == "classification"
        return self.task.train if wanted and self.task.metric != "mean_average_precision" else None

    def passes(self) -> list[tuple[Images, list[ModelRef]]]:
        """Return images and the models that have to see them: those of the task, and those of its probe."""
        passes = [(self.task.images, self._models(everyone=self.train is not None))]
        return passes if self.train is None else [*passes, (self.train.images, self._models(everyone=True))]

    def results(
        self, cache: FeatureCache, advance: Callable[[int], None], failed: Callable[[str], object]
    ) -> list[Result]:
        """Answer the task by every system; what cannot be had is told to ``failed``."""
        task, refs = self.task, self._models(everyone=False)
        how: dict[str, Any] = {"device": self.config.device, "precision": self.config.precision}
        faults: dict[str, str] = {}
        seen = []
        for images, models in self.passes():
            encode = partial(
                image_features, images=images, cache=cache, batch_size=self.config.batch_size, advance=advance, **how
            )
            seen.append(_encode(models, encode, "images", faults))
        sound = [ref for ref in refs if ref.digest not in faults]
        if task.kind == "classification":
            texts = _encode(sound, lambda some: prompt_features(some, self.prompts, cache, **how), "prompts", faults)
        else:
            texts = _encode(sound, lambda some: text_features(some, task.texts, cache, **how), "texts", faults)
        if len(faults) == len(refs) > 1 and len(same := set(faults.values())) == 1:
            failed(f"task {task.name!r}: {same.pop()}")
            return []
        results = []
        for system in self.systems:
            where = f"task {task.name!r}, model {system.name!r}"
            try:
                self._check(system, faults, everyone=False)
                results.append(self._result(system, task.kind, self._answer(system, seen[0], texts), {}))
            except FAULTS as error:
                failed(f"{where}: {_cause(error)}")
                continue
            try:
                if len(seen) > 1:
                    self._check(system, faults, everyone=True)
                    results.append(self._probe(system, seen[1], seen[0]))
            except FAULTS as error:
                failed(f"{where}, linear probe: {_cause(error)}")
        return results

    def _check(self, system: System, faults: Mapping[str, str], *, everyone: bool) -> None:
        """Raise if a model that a system needs could not be asked."""
        for place, ref in enumerate(system.models):
            if ref.digest in faults and (everyone or self.weights[system.name].uses(place)):
                fault = faults[ref.digest]
                is_named = len(system.models) == 1 or fault.startswith(f"model {ref.name}:")
                raise ModeclipError(fault if is_named else f"{ref.name}: {fault}")

    def _answer(self, system: System, images: Features, texts: Features) -> Outcome:
        weights = self.weights[system.name]
        mix = self.config.mix if self.task.kind == "classification" and system.rule is not None else "cosines"
        similarity = _similarity(system, weights.values, images, texts, per_image=weights.per_image, mix=mix)
        if weights.queries is None:
            return answer(self.task, similarity)
        return answer(self.task, similarity, _similarity(system, weights.queries, images, texts))

    def _probe(self, system: System, train: Features, test: Features) -> Result:
        """Fit a classifier on the vectors of all models of a system, each model once."""
        assert self.train is not None
        digests, config = list(dict.fromkeys(ref.digest for ref in system.models)), self.config.probe_config
        found = linear_probe(
            [train[digest] for digest in digests],
            np.asarray(self.train.labels),
            [test[digest] for digest in digests],
            np.asarray(self.task.labels),
            config,
            metric=self.task.metric,
            images=self.train.images.digests(),
        )
        facts = asdict(config) | {"C": found.C, "converged": found.converged, "num_train": found.num_train}
        facts |= {"sweep": [asdict(trial) for trial in found.sweep], "train_images": self.train.images.digest}
        return self._result(system, PROBE, found.outcome, {"probe": facts, "seed": config.seed})

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
            "exif": task.exif,
            "models": {ref.name: ref.digest for ref in system.models},
            "preprocess": sorted({ref.preprocess for ref in system.models}),
            "device": str(choose_device(self.config.device)),
            "precision": resolve_precision(self.config.precision),
            "versions": versions(),
        }
        if task.kind == "classification":
            facts |= {"num_classes": len(task.classnames), "classnames": hash_texts(task.classnames)}
            facts["prompts"] = hash_texts(prompt for of_class in self.prompts for prompt in of_class)
            facts["num_templates"] = max(len(of_class) for of_class in self.prompts)
            facts |= {"chance": task.chance, "majority": task.majority}
            if self.knowledge.names:
                known = sum(self.knowledge.find(name) is not None for name in task.classnames)
                facts["knowledge"] = {"dictionaries": self.knowledge.identities, "num_explained": known}
        else:
            facts |= {"num_texts": len(task.texts), "texts": hash_texts(task.texts)}
        facts |= self._routing(system) if kind != PROBE else {}
        if system.is_default:
            facts["default"] = True
        if system.samples is not None:
            facts["samples"] = system.samples
        return Result(task=task, kind=kind, system=system.name, outcome=outcome, provenance=facts | dict(more))

    def _routing(self, system: System) -> dict[str, Any]:
        """Return how a mixture was routed, as JSON; of weights that differ, the mean."""
        if system.rule is None:
            return {}
        weights = self.weights[system.name].values
        mean = weights.reshape(-1, weights.shape[-1]).mean(axis=0).tolist()
        shares = dict(zip((ref.name for ref in system.models), mean, strict=True))
        mix = self.config.mix if self.task.kind == "classification" else "cosines"
        facts = system.facts() | {"mix": mix, "weights": shares, "entropy": entropy(weights)}
        return facts | (flag(self.weights[system.name].domain) if system.router is not None else {})

    def _models(self, *, everyone: bool) -> list[ModelRef]:
        """Return the models that some system needs, each once."""
        needed: dict[str, ModelRef] = {}
        for system in self.systems:
            for place, ref in enumerate(system.models):
                if everyone or self.weights[system.name].uses(place):
                    needed.setdefault(ref.digest, ref)
        return list(needed.values())


def _similarity(
    system: System,
    weights: Float[np.ndarray, "... K"],
    images: Features,
    texts: Features,
    *,
    per_image: bool = False,
    mix: Mix = "cosines",
) -> Similarity:
    """Return the similarities by the models that have weight; one that stands for several experts counts once."""
    shares: dict[str, np.ndarray] = {}
    places: dict[str, Path] = {}
    for place, ref in enumerate(system.models):
        share = weights[..., place]
        if share.any():
            shares[ref.digest] = shares[ref.digest] + share if ref.digest in shares else share
            places[ref.digest] = Path(ref.spec)
    return Similarity(
        images=[images[digest] for digest in shares],
        texts=[texts[digest] for digest in shares],
        weights=np.stack(list(shares.values()), axis=-1),
        per_image=per_image,
        scales=None if mix == "cosines" else np.array([logit_scale_of(places[digest]) for digest in shares]),
    )


def _encode(
    refs: Sequence[ModelRef],
    encode: Callable[[Sequence[ModelRef]], Sequence[Float[np.ndarray, "_ _"]]],
    what: str,
    faults: dict[str, str],
) -> dict[str, np.ndarray]:
    """Return the vectors of each model by its digest; why those of a model cannot be used goes into ``faults``."""
    found: dict[str, np.ndarray] = {}
    try:
        found = {ref.digest: vectors for ref, vectors in zip(refs, encode(refs), strict=True)}
    except FAULTS as error:
        if len(refs) == 1:
            faults.setdefault(refs[0].digest, _cause(error))
        else:  # one of them is to blame, or what they look at
            for ref in refs:
                found |= _encode([ref], encode, what, faults)
        return found
    for ref in refs:
        finite = np.isfinite(found[ref.digest].sum(axis=1))
        if not finite.all():
            faults[ref.digest] = (
                f"{np.count_nonzero(~finite):,} of {len(finite):,} vectors of its {what} are not finite, first that of "
                f"{what[:-1]} {finite.argmin()}: its weights are damaged, or its training diverged"
            )
    return found


def _cause(error: Exception) -> str:
    """Return what went wrong in one line."""
    words = in_one_line(error) if isinstance(error, OSError) else " ".join(str(error).split())
    return words if isinstance(error, ModeclipError | OSError) else f"{type(error).__name__}: {words}"


def _choose(system: System, results: Sequence[Result]) -> list[Result]:
    """Return the results of a system that the labels choose, one for each kind and task."""
    found = []
    for kind in dict.fromkeys(result.kind for result in results if result.system in system.chosen_among):
        of_name: dict[str, dict[str, Result]] = {name: {} for name in system.chosen_among}
        for result in results:
            if result.kind == kind and result.system in of_name:
                of_name[result.system][result.task.name] = result
        answered = set.intersection(*(set(own) for own in of_name.values()))  # by all of them
        outcomes = {
            name: {task: one.outcome for task, one in own.items() if task in answered} for name, own in of_name.items()
        }
        if not answered:
            continue
        best, best_of_task = choose_by_labels(outcomes)
        for task, best_here in best_of_task.items():
            chosen = of_name[best_here if system.per_task else best][task]
            facts = {"bound": ORACLE if system.per_task else BEST_SINGLE, "expert": chosen.system}
            found.append(replace(chosen, system=system.name, provenance={**chosen.provenance, **facts}))
    return found


# ---------------------------------------------------------------- averages


@dataclass(frozen=True, kw_only=True)
class Average:
    """Plain mean of a system's main metrics over tasks of one kind and group."""

    system: str
    """Name of who answered."""
    kind: str
    """Kind of the tasks."""
    group: str
    """Their group; empty for those that are in none."""
    tasks: tuple[str, ...]
    """Their names."""
    score: Interval
    """The mean, with a bootstrap over the samples of each task."""
    versus_first: Interval | None
    """How much better than the first system, on the same samples; None for the first one itself, and where one of the
    two lacks a task."""
    test: PairedTest | None
    """McNemar's test against it; None also where a metric does not count right and wrong samples."""


def averages(results: Sequence[Result]) -> list[Average]:
    """Return the plain means over the tasks of each kind and group; the first system is what others are compared to."""
    found = []
    for kind, group in dict.fromkeys((result.kind, result.task.group) for result in results):
        chosen = [result for result in results if (result.kind, result.task.group) == (kind, group)]
        of_system = _outcomes(chosen)
        first = next(iter(of_system.values()))
        for system, outcomes in of_system.items():
            alone = outcomes is first or outcomes.keys() != first.keys()
            found.append(
                Average(
                    system=system,
                    kind=kind,
                    group=group,
                    tasks=tuple(outcomes),
                    score=bootstrap_interval(outcomes),
                    versus_first=None if alone else paired_interval(outcomes, first),
                    test=None if alone or not _counts(outcomes, first) else paired_test(outcomes, first),
                )
            )
    return found


def _outcomes(results: Sequence[Result]) -> dict[str, dict[str, Outcome]]:
    """Return outcomes by system and task."""
    of_system: dict[str, dict[str, Outcome]] = {}
    for result in results:
        of_system.setdefault(result.system, {})[result.task.name] = result.outcome
    return of_system


def _counts(*sides: Mapping[str, Outcome]) -> bool:
    """Whether all metrics count right and wrong samples."""
    return all(np.isin(outcome.hits, (0, 1)).all() for side in sides for outcome in side.values())


# ---------------------------------------------------------------- the table of a run


def run_table(systems: Sequence[System], tasks: Sequence[Task], results: Sequence[Result]) -> dict[str, Any]:
    """Return what ``results.json`` of a run holds: ``tasks``, ``chance``, ``majority``, ``models`` and ``routing``.

    Args:
        systems: Those of `modeclip.evaluation.systems.run_systems`.
        tasks: Classification tasks, in the order of the table.
        results: What `evaluate` returned.
    """
    outcomes = _outcomes(results)
    entropies: dict[str, dict[str, float]] = {}
    for result in results:
        if "entropy" in result.provenance:
            entropies.setdefault(result.system, {})[result.task.name] = result.provenance["entropy"]
    default = next(system for system in systems if system.is_default)
    dense = {system.name: system for system in systems if is_equal_cost(system.name, system.samples, default.samples)}
    equal_cost = dense.get("dense-total", dense.get("dense"))
    rows = []
    for system in systems:
        own = outcomes[system.name]
        interval = bootstrap_interval(own)
        rows.append(
            {
                "name": system.name.partition("@")[0],
                "kind": system.kind,
                "rule": system.rule,
                "default": system is default,
                "samples": system.samples,
                "accuracy": {task: outcome.score for task, outcome in own.items()},
                "average": average(own),
                "interval": [interval.low, interval.high],
                "entropy": entropies.get(system.name) if system.router is not None else None,
                "versus_dense_total": _difference(own, outcomes, equal_cost)
                if system.kind in {"mixture", "control"}
                else None,
                "versus_mixture": _difference(own, outcomes, default) if system.kind == "control" else None,
            }
        )
    return {
        "tasks": [{"name": t.name, "num_classes": len(t.classnames), "num_images": len(t.images)} for t in tasks],
        "chance": {task.name: task.chance for task in tasks},
        "majority": {task.name: task.majority for task in tasks},
        "models": rows,
        "routing": {task.name: _explained(default, task) for task in tasks},
    }


def _difference(
    own: Mapping[str, Outcome], outcomes: Mapping[str, Mapping[str, Outcome]], reference: System | None
) -> dict[str, Any] | None:
    """Return how much higher a system's average is than another's, with the interval over the same images."""
    if reference is None:
        return None
    gain = paired_interval(own, outcomes[reference.name])
    return {"difference": gain.mean, "interval": [gain.low, gain.high]}


def _explained(system: System, task: Task) -> dict[str, Any]:
    """Return what the report shows of one task's routing."""
    assert isinstance(system.router, ClusterRouter)
    assert system.request is not None
    found, clusters = system.router.route(task.classnames, system.request), system.router.clusters
    assert found.embeddings is not None
    near = route(
        found.embeddings,
        clusters.fine_centers,
        clusters.expert_of_fine,
        num_experts=clusters.num_experts,
        rule=system.request.rule,
        temperature=system.request.temperature,
    )
    rows = zip(task.classnames, near.nearest_fine, near.distance, found.class_weights, strict=True)
    return {
        "rule": system.request.rule,
        "weights": found.class_weights.mean(axis=0).tolist(),
        "entropy": found.entropy,
        **flag(found.domain),
        "classes": [
            {"name": name, "nearest_fine": int(fine), "distance": float(distance), "weights": weights.tolist()}
            for name, fine, distance, weights in rows
        ],
    }
