"""Measure the models that `runs/experiments.py` has trained, for docs/results.md, as lines of JSON.

Usage: python runs/measure.py [--out runs/experiments] [--records runs/experiments.jsonl]

A line is one row of one study and random seed: `values` holds `tasks`, the accuracy in percent on each held-out task,
or other numbers by name. A row that is there already is not measured again, so the file grows as models are trained,
on one machine or on several; `runs/results.py` makes the tables from it without any model. Every model sees the
held-out images once, whatever is asked of it.

What is new is recorded for paired tests and for where it comes from: `hits` (which held-out images were right, task
after task, `packed`), the digest, seconds, last loss and logit scale of each training, and the commit.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import subprocess
import sys
import tempfile
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import candidates
import numpy as np
import routers
from experiments import MAIN, PARTS, QUARTER, Arm, Study, Workshop, base_arm, read_studies
from records import is_exam

from modeclip import Catalog
from modeclip.clustering.distances import nearest_centers
from modeclip.clustering.negatives import measure_negatives
from modeclip.data.tasks.task import CatalogImages, Task, catalog_tasks
from modeclip.evaluation.probing import ProbeConfig, ProbeResult, linear_probe
from modeclip.evaluation.retrieval import retrieve
from modeclip.evaluation.similarity import Similarity
from modeclip.mixture.rules import DEFAULT_TEMPERATURE, RULES, keep_best, route
from modeclip.models.clip import load_clip, logit_scale_of, save_clip
from modeclip.models.encoders import load_any_encoder
from modeclip.models.feature_cache import FeatureCache
from modeclip.models.features import image_features, text_features
from modeclip.models.pool import ModelRef
from modeclip.system.console import log
from modeclip.training.jobs import TrainJob

HERE = Path(__file__).parent
OF_IMAGES = ("clip-image", "clip-sets", "clip-both")  # encoders whose mixtures are routed image by image
PROBE_NAMES, PROBE_ICONS = 100, 20
RATE_PAIRS, RATE_ROUNDS = 8192, 3
PLAIN_CANDIDATES: dict[str, dict[str, Any]] = {
    f"per_class, temperature {value:g}": {"temperature": value} for value in (0.02, 0.05, 0.1, 0.2, 0.4)
} | {f"per_class, at most {count} experts": {"max_experts": count} for count in (1, 2)}
Values = dict[str, Any]
Weigh = Callable[[int], np.ndarray]


@dataclass
class Exam:
    """The held-out tasks, and the features of every model on them."""

    out: Path
    tasks: list[Task] = field(default_factory=list)
    """Those asked; by default all that are held out."""
    vectors: dict[Path, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cache = FeatureCache(self.out / "features")
        self.tasks = self.tasks or catalog_tasks(Catalog.open(self.out / "data" / "tasks.lance"))
        self.names = sorted({name for task in self.tasks for name in task.classnames})
        number = {name: index for index, name in enumerate(self.names)}
        self.classes = [np.array([number[name] for name in task.classnames]) for task in self.tasks]
        self.labels = np.concatenate([task.labels for task in self.tasks])
        self.share = np.concatenate([np.full(len(t.labels), 1 / len(t.labels) / len(self.tasks)) for t in self.tasks])
        """What an image counts in the plain mean over the tasks."""

    @cached_property
    def images(self) -> CatalogImages:
        """All held-out images, task after task."""
        rows = np.concatenate([task.images.rows for task in self.tasks])
        return CatalogImages(catalog=self.tasks[0].images.catalog, rows=rows)

    @cached_property
    def slices(self) -> list[slice]:
        """Where the images of each task are among them."""
        ends = np.cumsum([0, *(len(task.images) for task in self.tasks)])
        return [slice(int(a), int(b)) for a, b in itertools.pairwise(ends)]

    def load(self, folders: Sequence[Path]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return each model's vectors of all images and all names; what is missing in one pass over the images."""
        sources = [ModelRef.of(folder.name, folder) for folder in folders if folder not in self.vectors]
        if sources:
            images = image_features(sources, self.images, self.cache)
            texts = text_features(sources, self.names, self.cache)
            pairs = zip(images, texts, strict=True)
            self.vectors |= {Path(s.spec): pair for s, pair in zip(sources, pairs, strict=True)}
        return [self.vectors[folder] for folder in folders]

    def hits(
        self, members: Sequence[Path], weigh: Weigh | None = None, per_image: bool = False, logs: bool = False
    ) -> np.ndarray:
        """Return which of all images a mixture (uniform, unless it is weighed) classifies correctly.

        It mixes cosines, or log-probabilities (``logs``).
        """
        found, even = self.load(members), np.full(len(members), 1 / len(members))
        scales = np.array([logit_scale_of(member) for member in members]) if logs else None
        predicted = []
        for number, (rows, classes) in enumerate(zip(self.slices, self.classes, strict=True)):
            similarity = Similarity(
                images=[visual[rows] for visual, _ in found],
                texts=[words[classes] for _, words in found],
                weights=even if weigh is None else weigh(number),
                per_image=per_image,
                scales=scales,
            )
            predicted += [block.argmax(1) for _, block in similarity.blocks()]
        return np.concatenate(predicted) == self.labels

    def tasks_of(self, hits: np.ndarray) -> Values:
        """Return the accuracy on each task in percent."""
        return {"tasks": [round(100 * float(hits[rows].mean()), 3) for rows in self.slices]}


@dataclass(frozen=True, kw_only=True, eq=False)
class Labelled:
    """Icons of frequent names: some that are trained on to fit a classifier, those of held-out sets to test it."""

    names: np.ndarray
    """The names, the classes."""
    train: CatalogImages
    labels: np.ndarray
    test: np.ndarray
    """Which of the held-out images have one of the names."""
    test_labels: np.ndarray

    @classmethod
    def of(cls, exam: Exam, catalog: Catalog) -> Labelled:
        """Draw them, the same for every model."""
        captions = catalog.read(["caption"])["caption"].astype(str)
        shown = np.concatenate([np.array(task.classnames)[task.labels] for task in exam.tasks])
        values, counts = np.unique(captions, return_counts=True)
        usable = np.isin(values, shown)
        chosen = values[usable][np.argsort(-counts[usable], kind="stable")[:PROBE_NAMES]]
        generator = np.random.default_rng(0)
        rows = [generator.permutation(np.flatnonzero(captions == value))[:PROBE_ICONS] for value in chosen]
        test = np.flatnonzero(np.isin(shown, chosen))
        place = {value: index for index, value in enumerate(chosen)}
        return cls(
            names=chosen,
            train=CatalogImages(catalog=catalog, rows=np.concatenate(rows)),
            labels=np.repeat(np.arange(len(chosen)), [len(found) for found in rows]),
            test=test,
            test_labels=np.array([place[value] for value in shown[test]]),
        )

    def probe(self, exam: Exam, models: Sequence[Path], config: ProbeConfig | None = None) -> ProbeResult:
        """Fit a linear classifier on the models' features and test it."""
        fitted = image_features([ModelRef.of(m.name, m) for m in models], self.train, exam.cache)
        tested = [visual[self.test] for visual, _ in exam.load(models)]
        return linear_probe(fitted, self.labels, tested, self.test_labels, config)


@dataclass
class Bench:
    """The models of one study and seed, and what can be asked of them."""

    exam: Exam
    workshop: Workshop
    study: Study
    seed: int
    recorded: set[str]
    _names: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def model(self, name: str) -> Path:
        """Return the folder of a model."""
        return self.workshop.folder(self.study, self.seed) / name

    def finished(self, name: str) -> bool:
        """Tell whether a model is trained."""
        return (self.model(name) / "done.json").is_file()

    def members(self, arm: Arm) -> list[Path] | None:
        """Return the models of an arm; None unless all are trained."""
        names = [arm.name] if arm.is_single else [f"{arm.name}-{k}" for k in range(arm.experts)]
        return [self.model(name) for name in names] if all(map(self.finished, names)) else None

    def rows(self) -> Iterator[tuple[str, Values]]:
        """Yield what is not recorded yet, as far as its models are there."""
        plan = [
            (f"part-{part}", lambda part=part: self._plain([self.model(f"part-{part}")]))
            for part in self.study.partings
        ]
        plan = [(name, make) for name, make in plan if self.finished(name)]
        alone: list[Path] = []
        for arm in self.study.arms:
            if (members := self.members(arm)) is not None:
                plan += self._arm_rows(arm, members)
                alone += members if arm.is_single and arm.name not in self.recorded else []
        self.exam.load(alone)  # together, so that the images are decoded once
        for row, make in plan:
            if row not in self.recorded:
                yield row, make()

    def _plain(self, members: Sequence[Path], weigh: Weigh | None = None, per_image: bool = False) -> Values:
        hits = self.exam.hits(members, weigh, per_image)
        return self.exam.tasks_of(hits) | {"hits": packed(hits)}

    def _arm_rows(self, arm: Arm, members: list[Path]) -> list[tuple[str, Callable[[], Values]]]:
        if arm.is_single:
            return [(arm.name, lambda: self._plain(members) | trained(members))]
        rows: list[tuple[str, Callable[[], Values]]] = [
            (f"{arm.name} uniform", lambda: self._plain(members) | trained(members)),
            (f"{arm.name} mixing", lambda: self._mixing(arm, members)),
        ]
        if arm.kind != "mode":
            return rows
        rows.append((f"{arm.name} per_class", lambda: self._routed(arm, members)))
        if self.study.name == QUARTER and arm == base_arm(encoder="clip-image"):
            rows.append((f"{arm.name} routers", lambda: self._routers(arm, members)))
        if self.study.name == MAIN and replace(arm, experts=4, encoder="minilm") == base_arm():
            rows.append((f"{arm.name} negatives", lambda: self._negatives(arm)))
        if self.study.name == MAIN and replace(arm, budget="matched") in {base_arm(), base_arm(encoder="clip-image")}:
            rows += [
                (f"{arm.name} try {name}", lambda options=options: self._routed(arm, members, **options))
                for name, options in PLAIN_CANDIDATES.items()
                if arm.encoder not in OF_IMAGES or "max_experts" not in options
            ]
        if arm.encoder in OF_IMAGES:
            return rows
        if arm in {base_arm(), base_arm(budget="paper")}:
            rows.append((f"{arm.name} knowledge", lambda: self._knowledge(arm, members)))
        if self.study.name != MAIN:
            return rows
        if arm in {base_arm(), base_arm(budget="paper"), base_arm(part=27, budget="paper")}:
            rows += [
                (f"{arm.name} {rule}", lambda rule=rule: self._routed(arm, members, rule=rule))
                for rule in RULES
                if rule not in {"uniform", "per_class"}
            ]
            rows += [
                (f"{arm.name} expert {k}", lambda member=member: self._plain([member]))
                for k, member in enumerate(members)
            ]
            rows.append((f"{arm.name} retrieval", lambda: self._retrieval(arm, members)))
        if arm in {base_arm(), base_arm(budget="paper")}:
            rows += [
                (
                    f"{arm.name} try adaptive by {spread}, factor {value:g}",
                    lambda s=spread, v=value: self._plain(
                        members, self._by_distance(arm, lambda *given: candidates.adaptive(*given, s, v))
                    ),
                )
                for spread, value in itertools.product(candidates.SPREADS, (0.06, 0.125, 0.25, 0.5))
            ]
            rows += [
                (
                    f"{arm.name} try per_class, the seed at distance {value:g}",
                    lambda v=value: self._plain(
                        [*members, self.model(f"part-{arm.part}")],
                        self._by_distance(arm, lambda *given: candidates.with_seed(*given, v)),
                    ),
                )
                for value in (0.8, 1.0, 1.2)
            ]
            rows += [
                (f"{arm.name} try confidence", lambda: self._confident(arm, members)),
                (f"{arm.name} averaged", lambda: self._averaged(arm, members)),
                (f"{arm.name} probe", lambda: self._probe(arm, members)),
            ]
        if arm == base_arm(experts=8):
            rows += [
                (f"{arm.name} first {count}", lambda count=count: self._first(arm, members, count))
                for count in range(len(members) + 1)
            ]
        return rows

    def class_embeddings(self, arm: Arm) -> list[np.ndarray]:
        """Return the class embeddings of each task by an arm's encoder."""
        spec = arm.encoder
        if spec.startswith("clip"):
            spec = f"clip:{self.model(f'part-{self.study.embeds_at}')}"
        if spec not in self._names:
            vectors = self.workshop.encoder(spec).encode(self.exam.names)
            self._names[spec] = [vectors[classes] for classes in self.exam.classes]
        return self._names[spec]

    def weigh(self, arm: Arm, **options: Any) -> Weigh:
        """Return what weighs the experts of an arm for a task; options as `routing.route` has them."""
        clustering, _ = self.workshop.clustering(arm, self.study, self.seed)
        centers = clustering.fine_centers
        if arm.encoder in OF_IMAGES:  # an image's own vector by the seed; of clusters of both, their image half
            visual = self.exam.load([self.model(f"part-{self.study.embeds_at}")])[0][0]
            embeddings = [visual[rows] for rows in self.exam.slices]
            if arm.encoder == "clip-both":
                centers, embeddings = centers[:, -visual.shape[1] :], [rows * 0.5**0.5 for rows in embeddings]
        else:
            embeddings = self.class_embeddings(arm)
        rule = options.setdefault("rule", "per_class")
        options.setdefault("temperature", DEFAULT_TEMPERATURE[rule])

        def weigh(task: int) -> np.ndarray:
            return route(
                np.ascontiguousarray(embeddings[task]),
                np.ascontiguousarray(centers),
                clustering.expert_of_fine,
                num_experts=clustering.num_experts,
                **options,
            ).weights

        return weigh

    def _routed(self, arm: Arm, members: Sequence[Path], **options: Any) -> Values:
        return self._plain(members, self.weigh(arm, **options), arm.encoder in OF_IMAGES)

    def _by_distance(self, arm: Arm, weights: Callable[[np.ndarray, np.ndarray, int], np.ndarray]) -> Weigh:
        """Return what weighs the experts by the classes' squared distances to all fine centres."""
        clustering, _ = self.workshop.clustering(arm, self.study, self.seed)
        embeddings, centers = self.class_embeddings(arm), clustering.fine_centers
        return lambda task: weights(
            candidates.distances_of(embeddings[task], centers), clustering.expert_of_fine, clustering.num_experts
        )

    def _first(self, arm: Arm, members: list[Path], count: int) -> Values:
        """Of the experts only those of the largest range are there; the seed stands in for the others."""
        clustering, _ = self.workshop.clustering(arm, self.study, self.seed)
        present = set(np.argsort(-clustering.range_of_expert, kind="stable")[:count].tolist())
        seed_model = self.model(f"part-{arm.part}")
        return self._routed(arm, [member if k in present else seed_model for k, member in enumerate(members)])

    def _averaged(self, arm: Arm, members: list[Path]) -> Values:
        """One model whose weights are the mean of the experts'."""
        return self._plain([average(members, self.model(f"mean-of-{arm.name}"))])

    def _confident(self, arm: Arm, members: list[Path]) -> Values:
        """Weigh each expert by how well it tells pairs of its own cluster apart."""
        _, column = self.workshop.clustering(arm, self.study, self.seed)
        catalog, recalls = self.workshop.catalog, []
        columns = catalog.read(["caption", column])
        for expert, member in enumerate(members):
            rows = np.flatnonzero(columns[column] == expert)
            rows = np.sort(np.random.default_rng(0).choice(rows, 2000, replace=False))
            source = [ModelRef.of(member.name, member)]
            names, label = np.unique(columns["caption"][rows].astype(str), return_inverse=True)
            visual = image_features(source, CatalogImages(catalog=catalog, rows=rows), self.exam.cache)[0]
            words = text_features(source, names.tolist(), self.exam.cache)[0]
            recalls.append(float(((visual @ words.T).argmax(1) == label).mean()))
        weigh = self.weigh(arm)
        return self._plain(members, lambda task: candidates.reweighed(weigh(task), recalls))

    def _mixing(self, arm: Arm, members: list[Path]) -> Values:
        """Other ways to bring the experts' cosines together, with the arm's own weights; accuracies by way."""
        exam, even = self.exam, np.full((1, len(members)), 1 / len(members))
        weigh = self.weigh(arm) if arm.kind == "mode" else lambda _: even
        visual, words = zip(*exam.load(members), strict=True)
        scales = np.array([float(load_clip(member).model.logit_scale.detach().exp()) for member in members])
        draw = np.random.default_rng(0)
        some, others = (draw.choice(len(all_of), min(2000, len(all_of)), False) for all_of in (visual[0], words[0]))
        sample = np.stack([v[some] @ u[others].T for v, u in zip(visual, words, strict=True)])
        mean, spread = (x[:, None, None] for x in (sample.mean((1, 2)), sample.std((1, 2))))
        found: dict[str, list[float]] = {}
        for number, task in enumerate(exam.tasks):
            rows, classes = exam.slices[number], exam.classes[number]
            cosine = np.stack([v[rows] @ u[classes].T for v, u in zip(visual, words, strict=True)])
            weights = weigh(number).T  # of classes, or of images
            weights = weights[:, :, None] if arm.encoder in OF_IMAGES else weights[:, None, :]
            logits = cosine * scales[:, None, None]
            chance = np.exp(logits - logits.max(2, keepdims=True))
            chance /= chance.sum(2, keepdims=True)
            ways = {
                "cosines (the rule)": weights * cosine,
                "cosines less each expert's mean": weights * (cosine - mean),
                "cosines standardised for each expert": weights * (cosine - mean) / spread,
                "cosines times each expert's logit scale": weights * logits,
                "probabilities": weights * chance,
                "logarithms of probabilities": weights * np.log(chance + 1e-12),
                "weights half way to uniform": (weights + 1 / len(members)) / 2 * cosine,
            }
            for way, parts in ways.items():
                hits = float(100 * (parts.sum(0).argmax(1) == task.labels).mean())
                found.setdefault(way, []).append(round(hits, 3))
        return found

    def _routers(self, arm: Arm, members: list[Path]) -> Values:
        """Weights of each image by the seed model's tower or by its patches alone, for all experts or the best few."""
        exam, catalog, seed = self.exam, self.workshop.catalog, self.model(f"part-{arm.part}")
        clustering, _ = self.workshop.clustering(arm, self.study, self.seed)
        draw = np.random.default_rng(self.seed).permutation(len(catalog))[: routers.TAUGHT_ON]
        taught = CatalogImages(catalog=catalog, rows=np.sort(draw))
        vectors = image_features([ModelRef.of(seed.name, seed)], taught, exam.cache)[0]
        centers = np.ascontiguousarray(clustering.fine_centers)
        options = {"num_experts": arm.experts, "rule": "per_class", "temperature": DEFAULT_TEMPERATURE["per_class"]}
        weights = route(np.ascontiguousarray(vectors), centers, clustering.expert_of_fine, **options).weights
        distilled = routers.teach(routers.seed_features(seed, taught), weights)
        by_tower, by_patches = self.weigh(arm), distilled(routers.seed_features(seed, exam.images))
        found: Values = {}
        tower = np.concatenate([by_tower(number) for number in range(len(exam.slices))])
        found["same expert first"] = 100 * float((tower.argmax(1) == by_patches.argmax(1)).mean())
        for way, given in (("tower", tower), ("patches", by_patches)):
            for count in range(1, arm.experts + 1):
                kept = keep_best(given, count, per_row=True)
                hits = exam.hits(members, lambda number, kept=kept: kept[exam.slices[number]], per_image=True)
                found[f"{way}, {count}"] = exam.tasks_of(hits)["tasks"]
        return found

    def _negatives(self, arm: Arm) -> Values:
        """The negatives of a batch, by MiniLM's cosines of captions: of random batches and of an expert's."""
        _, column = self.workshop.clustering(arm, self.study, self.seed)
        found = self.workshop.catalog.read(["caption", column])
        _, captions = np.unique(found["caption"].astype(str), return_inverse=True)
        vectors, experts = self.workshop.embeddings("minilm"), found[column]
        size = self.study.train.batch_size
        report = measure_negatives(lambda rows: vectors[rows], captions, experts, experts[:, None], batch_size=size)
        return {
            kind.kind: {
                "same": kind.identical * (size - 1),
                "false": kind.false_per_pair.mean,
                "cosine": kind.cosine.mean,
            }
            for kind in report.kinds[:2]
        }

    def _owners(self, arm: Arm) -> list[np.ndarray]:
        """Return the expert that each class of each task falls to."""
        clustering, _ = self.workshop.clustering(arm, self.study, self.seed)
        centers, expert_of = clustering.fine_centers, clustering.expert_of_fine
        return [expert_of[nearest_centers(vectors, centers)[0][:, 0]] for vectors in self.class_embeddings(arm)]

    def _knowledge(self, arm: Arm, members: list[Path]) -> Values:
        """Accuracy of each kind of model on the images of classes that fall to an expert, by task too."""
        exam = self.exam
        owner = np.concatenate([o[task.labels] for o, task in zip(self._owners(arm), exam.tasks, strict=True)])
        experts = np.array([exam.hits([member]) for member in members])
        own = experts[owner, np.arange(len(owner))]
        others = (experts.sum(0) - own) / (len(members) - 1)
        # Between its own classes alone: what is left when no other expert's class can be taken for the answer.
        within = np.zeros(len(owner), bool)
        found = exam.load(members)
        dense_within = np.zeros(len(owner), bool)
        dense = exam.load([self.model(f"part-{PARTS}")])[0]
        for number, of_class in enumerate(self._owners(arm)):
            rows, classes = exam.slices[number], exam.classes[number]
            labels = exam.tasks[number].labels
            for k in range(len(members)):
                mine, inside = np.flatnonzero(of_class == k), np.flatnonzero(of_class[labels] == k)
                if len(inside):
                    for (visual, words), hits in ((found[k], within), (dense, dense_within)):
                        cosine = visual[rows][inside] @ words[classes[mine]].T
                        hits[rows.start + inside] = mine[cosine.argmax(1)] == labels[inside]
        share = exam.share
        sizes = [np.bincount(o, minlength=len(members)).max() / len(o) for o in self._owners(arm)]
        return {
            "own": 100 * float((own * share).sum()),
            "others": 100 * float((others * share).sum()),
            "own, among its own classes": 100 * float((within * share).sum()),
            "dense, among the same classes": 100 * float((dense_within * share).sum()),
            "own by task": exam.tasks_of(own)["tasks"],
            "largest share of classes": [round(float(size), 4) for size in sizes],
        }

    def _retrieval(self, arm: Arm, members: list[Path]) -> Values:
        """One image of each held-out name: the image for a text, the text for an image; metrics by model."""
        exam, found = self.exam, {}
        names = np.concatenate([classes[task.labels] for task, classes in zip(exam.tasks, exam.classes, strict=True)])
        text, image = np.unique(names, return_index=True)
        clustering, _ = self.workshop.clustering(arm, self.study, self.seed)
        centres = clustering.fine_centers, clustering.expert_of_fine
        embeddings = load_any_encoder("minilm").encode([exam.names[index] for index in text])

        def add(label: str, models: Sequence[Path], weights: np.ndarray, to_texts: np.ndarray | None = None) -> None:
            vectors = exam.load(models)
            parts = {"images": [visual[image] for visual, _ in vectors], "texts": [words[text] for _, words in vectors]}
            other = None if to_texts is None else Similarity(**parts, weights=to_texts)
            outcome = retrieve(Similarity(**parts, weights=weights), np.arange(len(text)), to_texts=other)
            found[label] = {key: 100 * value for key, value in outcome.metrics.items()}

        for label, name in (("seed", f"part-{arm.part}"), ("dense", f"part-{PARTS}"), ("dense-total", "total-80")):
            if self.finished(name):
                add(label, [self.model(name)], np.ones(1))
        for rule in ("uniform", "paper", "per_class"):
            settings = {"num_experts": len(members), "rule": rule, "temperature": DEFAULT_TEMPERATURE[rule]}
            of_queries = route(embeddings, *centres, each=True, **settings).weights
            add(rule, members, of_queries, route(embeddings, *centres, **settings).weights)
        return found | {"pairs": len(text)}

    def _probe(self, arm: Arm, members: list[Path]) -> Values:
        """Linear probe: frequent names, fitted on training icons, tested on the icons of held-out sets."""
        labelled = Labelled.of(self.exam, self.workshop.catalog)

        def accuracy(models: Sequence[Path], config: ProbeConfig | None = None) -> float:
            return 100 * labelled.probe(self.exam, models, config).outcome.metrics["acc1"]

        found: Values = {"fitted": len(labelled.labels), "tested": len(labelled.test)}
        for label, name in (("seed", f"part-{arm.part}"), ("dense", f"part-{PARTS}"), ("dense-total", "total-80")):
            if self.finished(name):
                found[label] = accuracy([self.model(name)])
        found |= {"MoDE-4": accuracy(members), "MoDE-4, sum": accuracy(members, ProbeConfig(combine="sum"))}
        full = self.members(base_arm(kind="full"))
        return found | ({"Full-4": accuracy(full)} if full else {})


def trained(members: Sequence[Path]) -> Values:
    """Return what each training of an arm was: pairs, digest, seconds, and the loss and scale that it ended with."""
    done = [json.loads((member / "done.json").read_text(encoding="utf-8")) for member in members]
    last = [json.loads((member / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1]) for member in members]
    return {
        "pairs": [one["rows"] for one in done],
        "digest": [one["digest"] for one in done],
        "seconds": [round(one["seconds"], 1) for one in done],
        "loss": [one["loss"] for one in last],
        "logit_scale": [one["logit_scale"] for one in last],
    }


def average(members: Sequence[Path], folder: Path) -> Path:
    """Return the folder of one model whose weights are the mean of the members', made where it is missing."""
    if not (folder / "open_clip_model.safetensors").exists():
        clips = [load_clip(member) for member in members]
        states = [clip.model.state_dict() for clip in clips]
        clips[0].model.load_state_dict({key: sum(s[key] for s in states) / len(states) for key in states[0]})
        save_clip(clips[0], folder)
    return folder


def packed(hits: np.ndarray) -> str:
    """Return which images were right as base64 of bits, the first image in the highest bit.

    Examples:
        >>> packed(np.array([True, False, False, False, False, False, False, True, True]))
        'gYA='
    """
    return b64encode(np.packbits(hits).tobytes()).decode("ascii")


def tower_rates(workshop: Workshop, studies: Sequence[Study]) -> Values:
    """Return samples per second on one thread by model, trained in turn on pairs that are all read and decoded."""
    column = workshop.sample_column(replace(studies[0], pairs=RATE_PAIRS))
    passes, models = 3, dict.fromkeys(study.train.model for study in studies)
    found: dict[str, list[float]] = {model: [] for model in models}
    for _, model in itertools.product(range(RATE_ROUNDS), models):
        with tempfile.TemporaryDirectory() as folder:
            study = next(study for study in studies if study.train.model == model)
            steps = RATE_PAIRS // study.train.batch_size
            config = replace(study.train, samples=PARTS * passes * steps * study.train.batch_size)
            job = TrainJob(
                name="rate",
                folder=folder,
                catalog=str(workshop.catalog_path),
                catalog_fingerprint="",
                config=config,
                first_step=0,
                last_step=passes * steps,
                first_share=0.0,
                last_share=1 / PARTS,
                mask=column,
            )
            subprocess.run([sys.executable, "-m", "modeclip.training.trainer", str(job.save())], check=True)
            lines = map(json.loads, (Path(folder) / "log.jsonl").read_text(encoding="utf-8").splitlines())
            rates = [line["samples_per_second"] for line in lines if line["step"] > steps]
            found[model].append(float(np.median(rates)))
    return {model: round(float(np.median(rates)), 1) for model, rates in found.items()}


def machine() -> dict[str, str]:
    """Return what a record says of where and when it was made."""
    cpu = Path("/proc/cpuinfo")
    model = platform.machine()
    if cpu.is_file():
        lines = cpu.read_text(encoding="utf-8").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    git = subprocess.run(
        ["git", "rev-parse", "--short=10", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False
    )
    return {
        "machine": model,
        "torch": version("torch"),
        "date": str(datetime.now(UTC).date()),
        "commit": git.stdout.strip(),
    }


def main() -> None:
    """Write a record for every row that has its models and has none yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/experiments"))
    parser.add_argument("--records", type=Path, default=Path("runs/experiments.jsonl"))
    parser.add_argument("--rates", action="store_true", help="time the towers too; leave the machine alone then")
    arguments = parser.parse_args()
    recipe, studies = read_studies()
    exam, workshop = Exam(arguments.out), Workshop(arguments.out, recipe)
    recorded: dict[tuple[str, int], set[str]] = {}
    lines = arguments.records.read_text(encoding="utf-8").splitlines() if arguments.records.exists() else []
    for record in map(json.loads, lines):
        recorded.setdefault((record["study"], record["seed"]), set()).add(record["row"])
    with arguments.records.open("a", encoding="utf-8") as file:

        def write(study: str, seed: int, row: str, values: Values) -> None:
            file.write(json.dumps({"study": study, "seed": seed, "row": row, "values": values} | machine()) + "\n")
            file.flush()
            log(f"{study}, seed {seed}: {row}")

        known_exams = [record["values"] for record in map(json.loads, lines) if is_exam(record)]
        names, counts = [task.name for task in exam.tasks], [len(task.labels) for task in exam.tasks]
        facts = {"pairs": len(workshop.catalog), "tasks": names, "images": counts}
        facts["classes"] = [len(classes) for classes in exam.classes]
        if facts not in known_exams:
            write("data", 0, f"tasks of {sum(counts)} images" if known_exams else "tasks", facts)
        if arguments.rates and "rates" not in recorded.get(("data", 0), set()):
            write("data", 0, "rates", tower_rates(workshop, studies))
        for study, seed in [(every, number) for every in studies for number in every.seeds]:
            known = recorded.get((study.name, seed), set())
            bench = Bench(exam=exam, workshop=workshop, study=study, seed=seed, recorded=known)
            for row, values in bench.rows():
                write(study.name, seed, row, values)


if __name__ == "__main__":
    main()
