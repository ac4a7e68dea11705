"""Evaluate the models that `runs/experiments.py` has trained, and write the tables of docs/results.md.

Usage: python runs/results.py [--out runs/experiments] [--docs docs/results.md]

Every model sees the held-out images once; all tables are arithmetic on those features, so another rule, weighting or
table costs seconds. Tables stand in docs/results.md between `<!-- table: NAME -->` and `<!-- end -->` and are replaced;
figures.json beside the models keeps all numbers. Intervals are 95 % t-intervals over the seeds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from experiments import PARTS, Arm, Workshop, read_studies
from scipy.stats import t

from modeclip import Catalog
from modeclip.caching import FeatureCache
from modeclip.clip import load_clip, save_clip
from modeclip.encoders import load_any_encoder
from modeclip.features import image_features, text_features
from modeclip.flops import count_flops
from modeclip.loading import Source
from modeclip.priors import nearest_fine
from modeclip.probing import ProbeConfig, linear_probe
from modeclip.retrieval import retrieve
from modeclip.routing import RULES, route
from modeclip.similarity import Similarity
from modeclip.tasks import CatalogImages, catalog_tasks

CAPTION_TOKENS = 10  # mean length to which a batch of icon names is cut
DEFAULT = ("per_class", 0.1)
OF_IMAGES = ("clip-image", "clip-both")  # encoders whose mixtures are routed image by image
TUNED_EVERY = 4  # every fourth task, by name, chooses settings; the others confirm them


@dataclass
class Exam:
    """The held-out tasks, and the features of every model on them."""

    out: Path
    vectors: dict[Path, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cache = FeatureCache(self.out / "features")
        self.tasks = catalog_tasks(Catalog.open(self.out / "data" / "tasks.lance"))
        self.names = sorted({name for task in self.tasks for name in task.classnames})
        number = {name: index for index, name in enumerate(self.names)}
        self.classes = [np.array([number[name] for name in task.classnames]) for task in self.tasks]
        self.tuned = np.arange(len(self.tasks)) % TUNED_EVERY == 0

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

    def load(self, folders: Sequence[Path]) -> None:
        """Encode what is missing, all models in one pass over the images."""
        sources = [Source.of(folder.name, folder) for folder in folders if folder not in self.vectors]
        if sources:
            images = image_features(sources, self.images, self.cache)
            texts = text_features(sources, self.names, self.cache)
            self.vectors |= {
                Path(s.spec): pair for s, pair in zip(sources, zip(images, texts, strict=True), strict=True)
            }

    def similarity(
        self, members: Sequence[Path], task: int, weights: np.ndarray, per_image: bool = False
    ) -> Similarity:
        """Return the similarities of a task's images and classes by a mixture."""
        self.load(members)
        found = [self.vectors[member] for member in members]
        images = [visual[self.slices[task]] for visual, _ in found]
        texts = [words[self.classes[task]] for _, words in found]
        return Similarity(images=images, texts=texts, weights=weights, per_image=per_image)

    def correct(
        self, members: Sequence[Path], weigh: Callable[[int], np.ndarray], per_image: bool = False
    ) -> list[np.ndarray]:
        """Return for each task which images the mixture classifies correctly."""
        found = []
        for number, task in enumerate(self.tasks):
            similarity = self.similarity(members, number, weigh(number), per_image)
            predicted = np.concatenate([block.argmax(1) for _, block in similarity.blocks()])
            found.append(predicted == task.labels)
        return found

    def score(
        self, members: Sequence[Path], weigh: Callable[[int], np.ndarray] | None = None, per_image: bool = False
    ) -> np.ndarray:
        """Return the accuracy on each task in percent, of a mixture or of one model."""
        even = np.full(len(members), 1 / len(members))
        hits = self.correct(members, weigh or (lambda _: even), per_image)
        return np.array([100 * found.mean() for found in hits])


class Results:
    """The trained models of all studies, evaluated."""

    def __init__(self, out: Path) -> None:
        self.out, self.exam = out, Exam(out)
        recipe, studies = read_studies()
        self.workshop = Workshop(out, recipe)
        self.studies = {study.name: study for study in studies}
        self._names: dict[str, list[np.ndarray]] = {}

    def dense(self, study: str, part: int | str = PARTS) -> dict[int, list[Path]]:
        """Return the folder of a dense model for each seed that has it."""
        name = f"part-{part}" if isinstance(part, int) else part
        folders = {seed: [self.workshop.folder(self.studies[study], seed) / name] for seed in self.studies[study].seeds}
        return {seed: found for seed, found in folders.items() if (found[0] / "done.json").is_file()}

    def arm(self, study: str, name: str) -> dict[int, list[Path]]:
        """Return the folders of an arm's models for each seed that has them all."""
        arm = next(arm for arm in self.studies[study].arms if arm.name == name)
        count = 1 if arm.kind in {"prior", "total"} else arm.experts
        found = {}
        for seed in self.studies[study].seeds:
            folder = self.workshop.folder(self.studies[study], seed)
            members = [folder / (name if arm.kind in {"prior", "total"} else f"{name}-{k}") for k in range(count)]
            if all((member / "done.json").is_file() for member in members):
                found[seed] = members
        return found

    def routed(self, study: str, name: str, seed: int, **options: Any) -> Callable[[int], np.ndarray]:
        """Return what weighs the experts of an arm for a task; options as `routing.route` has them."""
        arm = next(arm for arm in self.studies[study].arms if arm.name == name)
        clustering, _ = self.workshop.clustering(arm, self.studies[study], seed)
        centers = clustering.fine_centers
        if arm.encoder in OF_IMAGES:  # an image's own vector by the seed; of clusters of both, their image half
            seed_model = self.dense(study, 27)[seed]
            self.exam.load(seed_model)
            visual = self.exam.vectors[seed_model[0]][0]
            embeddings = [visual[rows] for rows in self.exam.slices]
            if arm.encoder == "clip-both":
                centers, embeddings = centers[:, -visual.shape[1] :], [rows * 0.5**0.5 for rows in embeddings]
        else:
            embeddings = self.class_embeddings(arm, study, seed)
        settings = {"rule": DEFAULT[0], "temperature": DEFAULT[1]} | options

        def weigh(task: int) -> np.ndarray:
            return route(
                np.ascontiguousarray(embeddings[task]),
                np.ascontiguousarray(centers),
                clustering.expert_of_fine,
                num_experts=clustering.num_experts,
                **settings,
            ).weights

        return weigh

    def class_embeddings(self, arm: Arm, study: str, seed: int) -> list[np.ndarray]:
        """Return the class embeddings of each task by an arm's encoder."""
        spec = "minilm" if arm.encoder == "minilm-set" else arm.encoder
        if spec.startswith("clip"):
            spec = f"clip:{self.workshop.folder(self.studies[study], seed) / 'part-27'}"
        if spec not in self._names:
            vectors = load_any_encoder(spec).encode(self.exam.names)
            self._names[spec] = [vectors[classes] for classes in self.exam.classes]
        return self._names[spec]

    def scores(self, study: str, name: str, **options: Any) -> dict[int, np.ndarray]:
        """Return the accuracies of a routed arm on each task, by seed."""
        per_image = next(arm for arm in self.studies[study].arms if arm.name == name).encoder in OF_IMAGES
        return {
            seed: self.exam.score(members, self.routed(study, name, seed, **options), per_image)
            for seed, members in self.arm(study, name).items()
        }

    def plain(self, found: Mapping[int, Sequence[Path]]) -> dict[int, np.ndarray]:
        """Return the accuracies of single models, or of uniform ensembles, on each task, by seed."""
        return {seed: self.exam.score(members) for seed, members in found.items()}


def interval(values: Sequence[float]) -> str:
    """Return a mean with the half width of its 95 % t-interval."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:.1f}"
    half = t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{mean:.1f} ± {half:.1f}"


def averages(scores: Mapping[int, np.ndarray], chosen: np.ndarray | None = None) -> dict[int, float]:
    """Return the plain mean over the tasks, by seed."""
    return {seed: float(values[slice(None) if chosen is None else chosen].mean()) for seed, values in scores.items()}


def against(scores: Mapping[int, np.ndarray], other: Mapping[int, np.ndarray], chosen: np.ndarray | None = None) -> str:
    """Return the mean difference of two rows with its interval over the seeds that both have."""
    mine, theirs = averages(scores, chosen), averages(other, chosen)
    gains = [mine[seed] - theirs[seed] for seed in mine if seed in theirs]
    if not gains:
        return ""
    text = interval(gains)
    return text if text.startswith("-") else f"+{text}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    if not rows:
        return "Not computed yet."
    lines = [f"| {' | '.join(columns)} |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


PAPER = {
    "main": "B/32, 26 tasks: MetaCLIP 58.2 / MoDE-2 58.6 / MoDE-4 59.0 (400M); 59.8 / 61.2 / 61.7 (2.5B)",
    "controls": "B/32, n = 2, 400M / 2.5B: Random 57.7 / 60.0, Full 58.3 / 60.0, OneStep 58.0 / 59.8, "
    "CoarseCluster 58.5 / 60.6, MoDE 58.6 / 61.2",
    "retrieval": "COCO R@1 text / image, B/16: 59.4 / 41.4 to 62.7 / 44.1 (MoDE-4)",
    "probe": "ImageNet, B/16: 73.8 to 79.6 (MoDE-4, concatenated)",
}
K4, K4_HALF = "mode-k4-m1024-minilm-p27-paper", "mode-k4-m1024-minilm-p16-matched"


def mode(experts: int = 4, part: int = 27, budget: str = "paper", fine: int = 1024, encoder: str = "minilm") -> str:
    """Return the name of an arm."""
    return f"mode-k{experts}-m{fine}-{encoder}-p{part}-{budget}"


def main_table(results: Results, study: str) -> str:
    """Dense against MoDE-2, 4 and 8 under both budgets."""
    dense = results.plain(results.dense(study))
    total = results.plain(results.dense(study, "total-47"))
    rows = []

    def add(label: str, parts: float, scores: Mapping[int, np.ndarray], equal: Mapping[int, np.ndarray]) -> None:
        if scores:
            samples = parts * results.studies[study].train.samples / PARTS
            cells = [interval(list(averages(scores).values())), against(scores, dense), against(scores, equal)]
            rows.append([label, f"{parts:g}", f"{samples / 1e3:,.0f}k", *cells])

    add("seed (27 of 32 parts)", 27, results.plain(results.dense(study, 27)), {})
    add("dense", 32, dense, dense)
    add("dense at the cost of MoDE-4", 47, total, total)
    for budget, part in (("paper", 27), ("matched", 27), ("matched", 16)):
        for experts in (2, 4, 8):
            name = mode(experts, part, budget)
            if name not in {arm.name for arm in results.studies[study].arms}:
                continue
            parts = part + (PARTS - part) * (experts if budget == "paper" else 1)
            equal = dense if budget == "matched" else total if experts == 4 else {}
            label = f"MoDE-{experts}, {budget}, parted at {part}"
            add(label, parts, results.scores(study, name), equal)
            add(f"{label}, uniform weights", parts, results.plain(results.arm(study, name)), equal)
    return table(["model", "parts", "samples", "average", "against dense", "against dense of equal cost"], rows)


def controls_table(results: Results, study: str) -> str:
    """Several models without clusters, without parts of the data, without fine clusters."""
    mixture = results.scores(study, K4)
    rows = {
        "MoDE-4": mixture,
        "MoDE-4, uniform weights": results.plain(results.arm(study, K4)),
        "CoarseCluster-4 (routed by coarse centres)": results.scores(study, K4, rule="coarse", temperature=0.2),
        "OneStep-4": results.scores(study, mode(fine=4)),
        "Random-4": results.plain(results.arm(study, "random-k4-p27-paper")),
        "Full-4": results.plain(results.arm(study, "full-k4-p27-paper")),
        "dense at their cost": results.plain(results.dense(study, "total-47")),
    }
    cells = [
        [name, interval(list(averages(scores).values())), against(scores, mixture)]
        for name, scores in rows.items()
        if scores
    ]
    return table(["mixture", "average", "against MoDE-4"], cells)


def sweep_table(results: Results, study: str, arms: Mapping[str, str], base: str) -> str:
    """Arms that differ in one setting, routed by the default rule and uniformly."""
    reference, dense, rows = results.scores(study, base), results.plain(results.dense(study)), []
    for label, name in arms.items():
        scores = results.scores(study, name)
        if scores:
            even = results.plain(results.arm(study, name))
            cells = [interval(list(averages(found).values())) for found in (scores, even)]
            rows.append([label, *cells, against(scores, reference), against(scores, dense)])
    return table(["", "per_class", "uniform", "against the default", "against dense"], rows)


def rules_table(results: Results, study: str, name: str) -> str:
    """Every rule; and what bounds them: each task's best expert, by the labels."""
    even, rows = results.plain(results.arm(study, name)), []
    exam = results.exam
    singles = {
        seed: np.array([exam.score([member]) for member in members])
        for seed, members in results.arm(study, name).items()
    }
    found: dict[str, dict[int, np.ndarray]] = {
        rule: results.scores(study, name, rule=rule, temperature=0.1 if rule in {"share", "per_class"} else 0.2)
        for rule in RULES
        if rule not in {"uniform", "adaptive"}
    }
    found = {"uniform": even} | found
    found["best single expert (by the labels)"] = {s: v[v.mean(1).argmax()] for s, v in singles.items()}
    found["oracle expert a task (by the labels)"] = {s: v.max(0) for s, v in singles.items()}
    for rule, scores in found.items():
        cells = [interval(list(averages(scores, chosen).values())) for chosen in (None, exam.tuned, ~exam.tuned)]
        rows.append([rule, *cells, against(scores, even, ~exam.tuned)])
    columns = ["rule", "all tasks", "tuned", "confirmed", "against uniform (confirmed)"]
    return table(columns, rows)


def candidate_settings() -> dict[str, dict[str, Any]]:
    """Return what tries to beat `per_class`: settings of `routing.route` by name."""
    found: dict[str, dict[str, Any]] = {}
    for value in (0.02, 0.05, 0.1, 0.2, 0.4):
        found[f"per_class, temperature {value:g}"] = {"temperature": value}
    for spread in ("nearest", "mean", "gap"):
        for value in (0.06, 0.125, 0.25, 0.5):
            found[f"adaptive by {spread}, factor {value:g}"] = {
                "rule": "adaptive",
                "spread": spread,
                "temperature": value,
            }
    for distance in (0.8, 1.0, 1.2):
        found[f"per_class with the seed at distance {distance:g}"] = {"seed_distance": distance}
    for count in (1, 2):
        found[f"per_class, at most {count} experts"] = {"max_experts": count}
    return found


def candidates_table(results: Results, study: str, name: str) -> str:
    """Settings chosen on the tuned tasks, confirmed on the others."""
    exam, base = results.exam, results.scores(study, name)
    tried: dict[str, dict[int, np.ndarray]] = {}
    for label, options in candidate_settings().items():
        tried[label] = {
            seed: exam.score(
                [*members, results.dense(study, 27)[seed][0]] if "seed_distance" in options else members,
                results.routed(study, name, seed, **options),
            )
            for seed, members in results.arm(study, name).items()
        }
    tried["per_class x confidence on the own cluster"] = confident(results, study, name)
    order = sorted(tried, key=lambda label: -np.mean(list(averages(tried[label], exam.tuned).values())))
    rows = [
        [
            label,
            *(interval(list(averages(tried[label], chosen).values())) for chosen in (exam.tuned, ~exam.tuned)),
            against(tried[label], base, ~exam.tuned),
        ]
        for label in order
    ]
    return table(["setting, best on the tuned tasks first", "tuned", "confirmed", "against per_class 0.1"], rows)


def mixing_table(results: Results, study: str, name: str) -> str:
    """Other ways to bring the experts' cosines together, all with the weights of `per_class`."""
    exam = results.exam
    found: dict[str, dict[int, list[float]]] = {}
    for seed, members in results.arm(study, name).items():
        weigh = results.routed(study, name, seed)
        scales = np.array([float(load_clip(member).model.logit_scale.detach().exp()) for member in members])
        exam.load(members)
        draw = np.random.default_rng(0)
        visual, words = zip(*(exam.vectors[member] for member in members), strict=True)
        some, others = draw.choice(len(visual[0]), 2000, False), draw.choice(len(words[0]), 2000, False)
        sample = np.stack([v[some] @ u[others].T for v, u in zip(visual, words, strict=True)])
        mean, spread = sample.mean((1, 2)), sample.std((1, 2))
        for number, task in enumerate(exam.tasks):
            rows, classes = exam.slices[number], exam.classes[number]
            cosine = np.stack([v[rows] @ u[classes].T for v, u in zip(visual, words, strict=True)])
            weights, even = weigh(number).T[:, None, :], np.full((len(members), 1, 1), 1 / len(members))
            logits = cosine * scales[:, None, None]
            chance = np.exp(logits - logits.max(2, keepdims=True))
            chance /= chance.sum(2, keepdims=True)
            ways = {
                "cosines (the rule)": weights * cosine,
                "cosines less each expert's mean": weights * (cosine - mean[:, None, None]),
                "cosines standardised for each expert": weights
                * ((cosine - mean[:, None, None]) / spread[:, None, None]),
                "cosines times each expert's logit scale": weights * logits,
                "probabilities": weights * chance,
                "logarithms of probabilities": weights * np.log(chance + 1e-12),
                "weights half way to uniform": (weights + even) / 2 * cosine,
            }
            for way, parts in ways.items():
                hits = float(100 * (parts.sum(0).argmax(1) == task.labels).mean())
                found.setdefault(way, {}).setdefault(seed, []).append(hits)
    scores = {way: {seed: np.array(values) for seed, values in runs.items()} for way, runs in found.items()}
    base = scores["cosines (the rule)"]
    order = sorted(scores, key=lambda way: -np.mean(list(averages(scores[way], exam.tuned).values())))
    rows = [
        [
            way,
            *(interval(list(averages(scores[way], chosen).values())) for chosen in (exam.tuned, ~exam.tuned)),
            against(scores[way], base, ~exam.tuned),
        ]
        for way in order
    ]
    return table(["what is weighted and summed", "tuned", "confirmed", "against the rule"], rows)


def confident(results: Results, study: str, name: str) -> dict[int, np.ndarray]:
    """Weigh each expert by how well it tells pairs of its own cluster apart."""
    found = {}
    for seed, members in results.arm(study, name).items():
        arm = next(arm for arm in results.studies[study].arms if arm.name == name)
        _, column = results.workshop.clustering(arm, results.studies[study], seed)
        catalog, recalls = results.workshop.catalog, []
        columns = catalog.read(["caption", column])
        for expert, member in enumerate(members):
            rows = np.flatnonzero(columns[column] == expert)
            rows = np.sort(np.random.default_rng(0).choice(rows, 2000, replace=False))
            source = [Source.of(member.name, member)]
            names, label = np.unique(columns["caption"][rows].astype(str), return_inverse=True)
            visual = image_features(source, CatalogImages(catalog=catalog, rows=rows), results.exam.cache)[0]
            words = text_features(source, names.tolist(), results.exam.cache)[0]
            recalls.append(float(((visual @ words.T).argmax(1) == label).mean()))
        prior = np.array(recalls) / np.mean(recalls)
        found[seed] = results.exam.score(members, results.routed(study, name, seed, prior=prior))
    return found


def retrieval_table(results: Results, study: str, name: str) -> str:
    """One image of each held-out name: the image for a text, the text for an image."""
    exam = results.exam
    names = np.concatenate([classes[task.labels] for task, classes in zip(exam.tasks, exam.classes, strict=True)])
    text, image = np.unique(names, return_index=True)
    rows: dict[str, list[dict[str, float]]] = {}

    def add(label: str, members: Sequence[Path], weights: np.ndarray, to_texts: np.ndarray | None = None) -> None:
        exam.load(members)
        found = [exam.vectors[member] for member in members]
        parts = {"images": [visual[image] for visual, _ in found], "texts": [words[text] for _, words in found]}
        other = None if to_texts is None else Similarity(**parts, weights=to_texts)
        outcome = retrieve(Similarity(**parts, weights=weights), np.arange(len(text)), to_texts=other)
        rows.setdefault(label, []).append(outcome.metrics)

    arm = next(arm for arm in results.studies[study].arms if arm.name == name)
    embeddings = load_any_encoder("minilm").encode([exam.names[index] for index in text])
    for seed, members in results.arm(study, name).items():
        clustering, _ = results.workshop.clustering(arm, results.studies[study], seed)
        centres = clustering.fine_centers, clustering.expert_of_fine
        for part in (27, PARTS, "total-47"):
            if seed in results.dense(study, part):
                add({27: "seed", PARTS: "dense"}.get(part, str(part)), results.dense(study, part)[seed], np.ones(1))
        for rule, heat in (("uniform", 0.2), ("paper", 0.2), ("per_class", 0.1)):
            settings = {"num_experts": len(members), "rule": rule, "temperature": heat}
            of_queries = route(embeddings, *centres, each=True, **settings).weights
            of_corpus = route(embeddings, *centres, **settings).weights
            add(f"MoDE-4, {rule}", members, of_queries, of_corpus)
    ks = [f"{side}_retrieval_recall@{k}" for side in ("text", "image") for k in (1, 5, 10)]
    cells = [[label, *(interval([100 * m[k] for m in found]) for k in ks)] for label, found in rows.items()]
    return table([f"{len(text):,} images and texts", *(k.replace("_retrieval_recall", "") for k in ks)], cells)


def probe_table(results: Results, study: str, name: str, num_names: int = 100, per_name: int = 20) -> str:
    """Linear probe: frequent names, fitted on training icons, tested on the icons of held-out sets."""
    exam, catalog = results.exam, results.workshop.catalog
    captions = catalog.read(["caption"])["caption"].astype(str)
    shown = np.concatenate([np.array(task.classnames)[task.labels] for task in exam.tasks])
    values, counts = np.unique(captions, return_counts=True)
    usable = np.isin(values, shown)
    chosen = values[usable][np.argsort(-counts[usable], kind="stable")[:num_names]]
    generator = np.random.default_rng(0)
    rows = [generator.permutation(np.flatnonzero(captions == value))[:per_name] for value in chosen]
    labels = np.repeat(np.arange(len(chosen)), [len(found) for found in rows])
    train = CatalogImages(catalog=catalog, rows=np.concatenate(rows))
    test = np.flatnonzero(np.isin(shown, chosen))
    place = {value: index for index, value in enumerate(chosen)}
    test_labels = np.array([place[value] for value in shown[test]])
    found: dict[str, list[float]] = {}

    def add(label: str, members: Sequence[Path], combine: str = "concat") -> None:
        exam.load(members)
        fitted = image_features([Source.of(m.name, m) for m in members], train, exam.cache)
        tested = [exam.vectors[member][0][test] for member in members]
        config = ProbeConfig(combine="concatenate" if combine == "concat" else "sum")
        result = linear_probe(fitted, labels, tested, test_labels, config)
        found.setdefault(label, []).append(100 * result.outcome.metrics["acc1"])

    for seed, members in results.arm(study, name).items():
        for part in (27, PARTS, "total-47"):
            if seed in results.dense(study, part):
                add({27: "seed", PARTS: "dense"}.get(part, str(part)), results.dense(study, part)[seed])
        add("MoDE-4, concatenated", members)
        add("MoDE-4, element-wise sum", members, "sum")
        if seed in (full := results.arm(study, "full-k4-p27-paper")):
            add("Full-4, concatenated", full[seed])
    cells = [[label, interval(values)] for label, values in found.items()]
    title = f"{len(chosen)} names, {len(labels):,} icons to fit, {len(test):,} to test"
    return table([title, "accuracy"], cells)


def averaging_table(results: Results, study: str, name: str) -> str:
    """One model whose weights are the mean of the experts'."""
    merged, single = {}, {}
    for seed, members in results.arm(study, name).items():
        folder = members[0].with_name(f"mean-of-{name}")
        if not (folder / "open_clip_model.safetensors").exists():
            clips = [load_clip(member) for member in members]
            states = [clip.model.state_dict() for clip in clips]
            clips[0].model.load_state_dict({key: sum(s[key] for s in states) / len(states) for key in states[0]})
            save_clip(clips[0], folder)
        merged[seed] = results.exam.score([folder])
        single[seed] = np.max([results.exam.score([member]) for member in members], axis=0)
    rows = {
        "seed": results.plain(results.dense(study, 27)),
        "dense": results.plain(results.dense(study)),
        "mean of the four experts' weights": merged,
        "MoDE-4, four models": results.scores(study, name),
    }
    cells = [[label, interval(list(averages(s).values())), against(s, rows["dense"])] for label, s in rows.items()]
    return table(["model", "average", "against dense"], cells)


def order_table(results: Results, study: str, name: str) -> str:
    """Experts added one by one, the largest range first; the seed stands in for those that are missing."""
    found: dict[int, dict[int, np.ndarray]] = {}
    for seed, members in results.arm(study, name).items():
        seed_model = results.dense(study, 27)[seed][0]
        arm = next(arm for arm in results.studies[study].arms if arm.name == name)
        clustering, _ = results.workshop.clustering(arm, results.studies[study], seed)
        order = np.argsort(-clustering.range_of_expert, kind="stable")
        for count in range(len(members) + 1):
            present = set(order[:count].tolist())
            mixture = [member if k in present else seed_model for k, member in enumerate(members)]
            scores = results.exam.score(mixture, results.routed(study, name, seed))
            found.setdefault(count, {})[seed] = scores
    cells = [
        [str(count), interval(list(averages(scores).values())), against(scores, found[0])]
        for count, scores in found.items()
    ]
    return table(["experts trained", "average", "against the seed"], cells)


def prior_table(results: Results, study: str) -> str:
    """One expert for the class names of one task (MoDE Sec. 5.5), on that task."""
    rows = []
    for arm in results.studies[study].arms:
        found = results.arm(study, arm.name) if arm.kind == "prior" else {}
        if not found:
            continue
        number = next(n for n, task in enumerate(results.exam.tasks) if task.name == arm.task)
        single = np.arange(len(results.exam.tasks)) == number
        dense, scores = results.plain(results.dense(study)), results.plain(found)
        pairs = {seed: trained_rows(members[0]) for seed, members in found.items()}
        mixture = results.scores(study, K4)
        cells = [interval(list(averages(s, single).values())) for s in (dense, scores, mixture)]
        rows.append([arm.task, f"{np.mean(list(pairs.values())):,.0f}", *cells, against(scores, dense, single)])
    return table(["task", "pairs", "dense", "its own expert", "MoDE-4", "expert against dense"], rows)


def trained_rows(folder: Path) -> int:
    """Return how many pairs a model was trained on."""
    return int(json.loads((folder / "done.json").read_text(encoding="utf-8"))["rows"])


def knowledge_table(results: Results, study: str, name: str) -> str:
    """Who knows a class: accuracy of each kind of model on the images of classes that fall to an expert."""
    exam, rows = results.exam, []
    own, others, dense, seed_model, mixture = [], [], [], [], []
    for seed, members in results.arm(study, name).items():
        arm = next(arm for arm in results.studies[study].arms if arm.name == name)
        clustering, _ = results.workshop.clustering(arm, results.studies[study], seed)
        embeddings = results.class_embeddings(arm, study, seed)
        owner = [
            clustering.expert_of_fine[nearest_fine(vectors, clustering.fine_centers, 1)[:, 0]] for vectors in embeddings
        ]
        of_image = np.concatenate([o[task.labels] for o, task in zip(owner, exam.tasks, strict=True)])
        weight = np.concatenate([np.full(len(task.labels), 1 / len(task.labels)) for task in exam.tasks])

        def mean(hits: np.ndarray, weight: np.ndarray = weight) -> float:
            return float(100 * (hits * weight).sum() / weight.sum())

        experts = np.array([np.concatenate(exam.correct([m], lambda _: np.ones(1))) for m in members])
        is_own = np.arange(len(members))[:, None] == of_image
        own.append(mean(experts[of_image, np.arange(len(of_image))]))
        others.append(mean((experts * ~is_own).sum(0) / (len(members) - 1)))
        for found, part in ((dense, PARTS), (seed_model, arm.part)):
            model = results.dense(study, part)[seed]
            found.append(mean(np.concatenate(exam.correct(model, lambda _: np.ones(1)))))
        mixture.append(mean(np.concatenate(exam.correct(members, results.routed(study, name, seed)))))
    for label, values in (
        ("the expert whose cluster the class falls into", own),
        ("the other experts", others),
        ("the mixture, per_class", mixture),
        ("the seed that they started from", seed_model),
        ("dense", dense),
    ):
        rows.append([label, interval(values)])
    return table(["on the images of each class", "accuracy"], rows)


def size_table(results: Results) -> str:
    """Dense models by size and cost, and the mixtures of the smallest size: samples, FLOPs, accuracy."""
    rows = []
    for study in results.studies.values():
        flops = count_flops(study.train.model, CAPTION_TOKENS).training
        entries: list[tuple[str, float, Mapping[int, np.ndarray]]] = [
            ("dense", PARTS, results.plain(results.dense(study.name)))
        ]
        for arm in study.arms:
            if arm.kind == "total":
                entries.append(("dense", arm.parts, results.plain(results.dense(study.name, arm.name))))
            elif arm.kind == "mode" and arm.name in {
                mode(k, p, b) for k in (2, 4, 8) for p in (16, 27) for b in ("paper", "matched")
            }:
                parts = arm.part + (PARTS - arm.part) * (arm.experts if arm.budget == "paper" else 1)
                entries.append(
                    (
                        f"MoDE-{arm.experts}, {arm.budget}, parted at {arm.part}",
                        parts,
                        results.scores(study.name, arm.name),
                    )
                )
        for label, parts, scores in entries:
            if scores:
                samples = parts * study.train.samples / PARTS
                cells = [
                    f"{samples / 1e6:.2f}",
                    f"{samples * flops / 1e12:,.0f}",
                    interval(list(averages(scores).values())),
                ]
                rows.append((samples * flops, [study.train.model, label, *cells]))
    return table(["towers", "model", "million samples", "TFLOPs", "average"], [row for _, row in sorted(rows)])


def scaling_lines(results: Results) -> list[dict[str, Any]]:
    """Return a line for each model and seed, as `modeclip scaling` reads them."""
    lines = []
    for study in results.studies.values():
        flops = count_flops(study.train.model, CAPTION_TOKENS).training
        families: list[tuple[str, str, float, Mapping[int, np.ndarray]]] = [
            (f"{study.name} dense", "dense", PARTS, results.plain(results.dense(study.name)))
        ]
        for arm in study.arms:
            if arm.kind == "total":
                families.append(
                    (f"{study.name} {arm.name}", "dense", arm.parts, results.plain(results.dense(study.name, arm.name)))
                )
            elif arm.name in {K4_HALF, K4}:
                parts = PARTS if arm.budget == "matched" else 47
                families.append(
                    (f"{study.name} {arm.name}", f"mode-4 {arm.budget}", parts, results.scores(study.name, arm.name))
                )
        for name, family, parts, scores in families:
            for seed, value in averages(scores).items():
                samples = parts * study.train.samples / PARTS
                lines.append(
                    {
                        "name": name,
                        "family": family,
                        "model": study.train.model,
                        "samples": samples,
                        "flops_per_sample": flops,
                        "accuracy": value / 100,
                        "seed": seed,
                    }
                )
    return lines


def regime_table(results: Results) -> str:
    """What the split brings at equal cost, by the length of the training and the point at which experts part."""
    rows = []
    for study in results.studies.values():
        dense = results.plain(results.dense(study.name))
        for arm in study.arms:
            if (
                arm.kind != "mode"
                or arm.budget != "matched"
                or arm.name not in {mode(k, p, "matched") for k in (2, 4, 8) for p in (16, 27)}
            ):
                continue
            scores = results.scores(study.name, arm.name)
            if scores:
                samples = study.train.samples
                cells = [interval(list(averages(dense).values())), interval(list(averages(scores).values()))]
                rows.append(
                    [
                        study.train.model,
                        f"{samples / 328_405:.1f}",
                        f"MoDE-{arm.experts}",
                        str(arm.part),
                        *cells,
                        against(scores, dense),
                    ]
                )
    columns = ["towers", "passes over the data", "mixture", "parted at", "dense", "MoDE", "gain"]
    return table(columns, rows)


def all_tables(results: Results) -> dict[str, Callable[[], str]]:
    """Return what makes each table."""
    short, half = "short", {"part": 16, "budget": "matched"}
    return {
        "main": lambda: main_table(results, short),
        "regime": lambda: regime_table(results),
        "long": lambda: main_table(results, "long"),
        "controls": lambda: controls_table(results, short),
        "fine": lambda: sweep_table(
            results, short, {f"M = {m:,}": mode(fine=m, **half) for m in (4, 32, 256, 1024)}, K4_HALF
        ),
        "encoders": lambda: sweep_table(
            results,
            short,
            {
                label: mode(encoder=name, **half)
                for label, name in (
                    ("MiniLM", "minilm"),
                    ("TF-IDF", "tfidf"),
                    ("seed-CLIP, text", "clip"),
                    ("MiniLM, caption with the set's name", "minilm-set"),
                    ("seed-CLIP, image (routed per image)", "clip-image"),
                    ("seed-CLIP, text and image (routed per image)", "clip-both"),
                )
            },
            K4_HALF,
        ),
        "outside": lambda: sweep_table(
            results, short, {"0": K4_HALF, "0.02": f"{K4_HALF}-o0.02", "0.1": f"{K4_HALF}-o0.1"}, K4_HALF
        ),
        "rules": lambda: rules_table(results, short, K4),
        "rules-long": lambda: rules_table(results, "long", K4_HALF),
        "candidates": lambda: candidates_table(results, "long", K4_HALF),
        "mixing": lambda: mixing_table(results, "long", K4_HALF),
        "retrieval": lambda: retrieval_table(results, short, K4),
        "probe": lambda: probe_table(results, short, K4),
        "averaging": lambda: averaging_table(results, short, K4),
        "order": lambda: order_table(results, short, mode(8)),
        "prior": lambda: prior_table(results, short),
        "knowledge": lambda: knowledge_table(results, "long", K4_HALF),
        "sizes": lambda: size_table(results),
    }


def main() -> None:
    """Write the tables whose models are there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/experiments"))
    parser.add_argument("--docs", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--tables", nargs="*", default=None, help="only these; default: those of the page")
    arguments = parser.parse_args()
    results = Results(arguments.out)
    text = arguments.docs.read_text(encoding="utf-8") if arguments.docs.exists() else ""
    for name, make in all_tables(results).items():
        on_page = f"<!-- table: {name} -->" in text
        if not (on_page if arguments.tables is None else name in arguments.tables):
            continue
        content = make() + (f"\n\nThe paper: {PAPER[name]}." if name in PAPER else "")
        print(f"\n## {name}\n\n{content}", flush=True)
        pattern = rf"(<!-- table: {re.escape(name)} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda found, content=content: f"{found[1]}{content}\n{found[2]}", text, flags=re.S)
    if text:
        arguments.docs.write_text(text, encoding="utf-8")
    lines = "".join(json.dumps(line) + "\n" for line in scaling_lines(results))
    (arguments.out / "scaling.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
