"""Train the models of `runs/experiments.yaml`: every arm of every study, from one seed model a study and random seed.

Usage: python runs/experiments.py [--out runs/experiments] [--jobs 2] [--studies NAME...] [--seeds 0 1 2]

Resumable like any run: what is finished is left alone, a job that was killed goes on from its last checkpoint. The
models of a study and seed lie in OUT/STUDY/seed-S/: `part-16`, `part-27` and `part-32` are one training (part-32 is the
dense model), `total-47` is a dense model with a longer schedule of its own, `ARM-0`, `ARM-1`... are the models of an
arm. Clusterings and the catalog are shared: OUT/data, OUT/clusterings.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from modeclip import Catalog
from modeclip.clustering.clusters import Clustering, group
from modeclip.clustering.distances import assign_nearest, nearest_centers
from modeclip.clustering.embedding import EmbedConfig, embed
from modeclip.clustering.fitting import ClusterConfig, fit_embeddings
from modeclip.data.indexing import index
from modeclip.models.encoders import load_any_encoder
from modeclip.models.encoders.text import fit_tfidf
from modeclip.models.flops import count_flops
from modeclip.pipeline.recipe import load_recipe
from modeclip.system.console import log, make_progress
from modeclip.training.batches import DecodedSample
from modeclip.training.experts import fingerprint_of
from modeclip.training.jobs import AugmentConfig, EngineConfig, TrainConfig, TrainJob, TrainResult
from modeclip.training.trainer import train

HERE = Path(__file__).parent
PARTS = 32
PARTINGS = (16, 27, 32)
CAPTION_TOKENS = 10  # mean length to which a batch of icon names is cut
MAIN = "main"  # the study that most tables are about
QUARTER = "quarter-xxxs"  # the one that has the controls of experts of images
KEPT: dict[int, DecodedSample] = {}  # what this process has read of the catalog


@dataclass(frozen=True, kw_only=True)
class Arm:
    """Several models that make one mixture, or one model of its own."""

    kind: str
    """``mode``, ``random``, ``full``, ``total`` (a dense model), ``prior`` (one expert for a task's class names, of the
    clusters nearest to them), ``named`` (one of the pairs whose caption is such a name), or a dense model that changes
    at the parting: ``pure``, to batches of one cluster each; ``batch``, to another size."""
    experts: int = 4
    fine: int = 1024
    encoder: str = "minilm"
    """What is clustered by; ``clip-sets``: whole icon sets, by the mean of their images, a control for style."""
    part: int = 16
    budget: str = "matched"
    outside: float = 0.0
    parts: int = PARTS
    task: str = ""
    """Whose class names ``prior`` and ``named`` are for; ``all``: those of all tasks."""
    batch: int = 0
    """Pairs in a batch from the parting on; 0: those of the study."""
    trainable: str = "all"
    """What is trained after the parting, as `TrainConfig` has it; cheaper samples are more samples, at the same
    floating-point operations."""
    rate: float = 1.0
    """What the learning rate after the parting is multiplied by."""
    extra: int = 0
    """Parts of a schedule of its own, with a warm-up, that follow the parting; 0: the rest of the seed model's."""

    @property
    def is_single(self) -> bool:
        """Whether it is one model, with the arm's name."""
        return self.kind in {"total", "prior", "named", "pure", "batch"}

    @property
    def cost(self) -> int:
        """Parts of the schedule that all of its models have trained together, the seed model included."""
        if self.kind == "total":
            return self.parts
        left = self.extra or PARTS - self.part
        return self.part + (left if self.budget == "matched" or self.is_single else left * self.experts)

    @property
    def name(self) -> str:
        """Name of the arm, that of its models without their numbers."""
        if self.kind == "total":
            return f"total-{self.parts}"
        if self.kind in {"prior", "named"}:
            return f"{self.kind}-{self.task}"
        words = [self.kind] if self.kind == "batch" else [f"{self.kind}-k{self.experts}"]
        if self.kind in {"mode", "pure"}:
            words += [f"m{self.fine}", self.encoder.partition(":")[0]]
        words += [f"p{self.part}"] if self.is_single else [f"p{self.part}", self.budget]
        words += [f"o{self.outside:g}"] if self.outside else []
        words += [] if self.trainable == "all" else [self.trainable.replace(":", "")]
        words += [] if self.rate == 1 else [f"r{self.rate:g}"]
        words += [f"x{self.extra}"] if self.extra else []
        return "-".join(words + ([f"b{self.batch}"] if self.batch else []))


@dataclass(frozen=True, kw_only=True)
class Study:
    """A model size and a length of training, and what is compared there."""

    name: str
    train: TrainConfig
    seeds: tuple[int, ...]
    arms: tuple[Arm, ...]
    pairs: int = 0
    """Pairs drawn from all of them, which alone are trained on; 0: all."""
    partings: tuple[int, ...] = PARTINGS
    """Parts at which the state of the seed model is kept; the last is the dense model."""

    @property
    def embeds_at(self) -> int:
        """The part at which the seed model embeds what is clustered by it, and routed by it, wherever experts part."""
        return min(self.partings)


def base_arm(**changes: Any) -> Arm:
    """Return the arm that most tables are about, or one that differs from it."""
    return Arm(**{"kind": "mode"} | changes)


def read_studies(path: Path = HERE / "experiments.yaml") -> tuple[Path, list[Study]]:
    """Return the recipe of the data and the studies."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    studies = []
    for study in content["studies"]:
        config = TrainConfig(
            model=study["model"],
            samples=study["samples"],
            batch_size=content["batch_size"],
            learning_rate=study.get("learning_rate", content["learning_rate"]),
            total_parts=PARTS,
            augment=AugmentConfig(min_crop_share=content["min_crop_share"]),
            engine=EngineConfig(
                precision=study.get("precision", content["precision"]), save_every="60s", keep_pictures_gb=2.0
            ),
        )
        arms = [Arm(**fields) for arm in study["arms"] for fields in expand(arm)]
        fields = {"name": study["name"], "seeds": tuple(study["seeds"]), "pairs": study.get("pairs", 0)}
        fields["partings"] = tuple(study.get("partings", PARTINGS))
        studies.append(Study(train=config, arms=tuple(arms), **fields))
    return path.parent / content["data"], studies


def expand(fields: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the fields of an arm with each combination of those that are lists."""
    values = [value if isinstance(value, list) else [value] for value in fields.values()]
    for combination in itertools.product(*values):
        yield dict(zip(fields, combination, strict=True))


class Workshop:
    """The catalog with its clusterings, and the jobs of studies on it."""

    def __init__(self, out: Path, recipe: Path) -> None:
        self.out, self.catalog_path = out, out / "data" / "catalog.lance"
        loaded = load_recipe(recipe)
        if not (out / "data" / "tasks.lance").exists():
            index(loaded.data, out / "data", replace=True)
        embed(Catalog.open(self.catalog_path), EmbedConfig(encoder="minilm"))

    @property
    def catalog(self) -> Catalog:
        """The training pairs, with the columns that there are now."""
        return Catalog.open(self.catalog_path)

    def folder(self, study: Study, seed: int) -> Path:
        """Return where the models of a study and seed lie."""
        return self.out / study.name / f"seed-{seed}"

    @cache  # noqa: B019 (one workshop a process)
    def encoder(self, name: str) -> Any:
        """Return an encoder by the name that an arm has for it, or by that of `modeclip.models.encoders`."""
        if name == "tfidf":
            folder = self.out / "tfidf"
            if not folder.exists():
                fit_tfidf(self.catalog.read(["caption"])["caption"].tolist(), folder)
            return load_any_encoder(f"tfidf:{folder}")
        return load_any_encoder("minilm" if name == "minilm-set" else name)

    @cache  # noqa: B019 (one workshop a process)
    def embeddings(self, encoder: str) -> np.ndarray:
        """Return a vector for each pair."""
        if encoder == "minilm":
            return self.catalog.read(["caption_embedding"])["caption_embedding"].astype(np.float32)
        embedder = self.encoder(encoder)
        columns = self.catalog.read(["caption", "group"])
        captions = columns["caption"].astype(str)
        if encoder == "minilm-set":  # what is clustered says which set drew the icon, what is trained on does not
            captions = np.array([f"{a}, {b}" for a, b in zip(captions, columns["group"].astype(str), strict=True)])
        if hasattr(embedder, "encode_pairs"):
            parts = []
            for start in range(0, len(captions), 8192):
                rows = np.arange(start, min(start + 8192, len(captions)))
                parts.append(embedder.encode_pairs(captions[rows].tolist(), self.catalog.encoded_images(rows)))
            return np.concatenate(parts)
        distinct, inverse = np.unique(captions, return_inverse=True)
        return np.asarray(embedder.encode(distinct.tolist()), np.float32)[inverse]

    def clustering(self, arm: Arm, study: Study, seed: int) -> tuple[Clustering, str]:
        """Return the clustering of an arm, of all pairs, and the column of its experts; made where it is missing."""
        spec, words = arm.encoder, [arm.encoder, f"m{arm.fine}", f"k{arm.experts}", f"s{seed}"]
        if spec.startswith("clip"):  # of the study's own seed model
            spec, words = f"{spec}:{self.folder(study, seed) / f'part-{study.embeds_at}'}", [study.name, *words]
        name = "_".join(words).replace("-", "_")
        folder, column = self.out / "clusterings" / name, f"expert_{name}"
        config = ClusterConfig(num_fine=arm.fine, num_experts=arm.experts, seed=seed)
        by_set = arm.encoder == "clip-sets"
        spec = spec.replace("clip-sets", "clip-image")
        if not (folder / "clustering.safetensors").exists():
            log(f"clustering {name}")
            vectors = self.embeddings(spec)
            if by_set:
                made = group(mean_of_sets(vectors, self.sets), arm.experts, seed=seed)
            else:
                made = fit_embeddings(vectors, config)
            made.save(folder)
        clustering = Clustering.load(folder)
        if column not in self.catalog.columns:
            fine = self.sets if by_set else assign_nearest(self.embeddings(spec), clustering.fine_centers)[0]
            self.catalog.add_columns({column: clustering.expert_of_fine[fine].astype(np.int32)})
        return clustering, column

    @property
    def sets(self) -> np.ndarray:
        """The number of the icon set of each pair."""
        return np.unique(self.catalog.read(["group"])["group"].astype(str), return_inverse=True)[1]

    def random_column(self, arm: Arm, study: Study, seed: int) -> str:
        """Return the column of a random split in the sizes of an arm's clusters, within the pairs of the study."""
        _, column = self.clustering(arm, study, seed)
        sample = self.sample_column(study)
        name = "_".join([column.replace("expert_", "random_", 1), *([sample] if sample else [])])
        if name not in self.catalog.columns:
            experts = np.array(self.catalog.read([column])[column])
            drawn = np.random.default_rng(seed)
            if sample:
                rows = np.flatnonzero(self.catalog.read([sample])[sample])
                experts[rows] = drawn.permutation(experts[rows])
            else:
                experts = drawn.permutation(experts)
            self.catalog.add_columns({name: experts})
        return name

    def sample_column(self, study: Study) -> str | None:
        """Return the column that marks the pairs of a study; None for all pairs."""
        if not study.pairs:
            return None
        name = f"sample_{study.pairs}"
        if name not in self.catalog.columns:
            chosen = np.random.default_rng(0).permutation(len(self.catalog)) < study.pairs
            self.catalog.add_columns({name: chosen})
        return name

    def class_names(self, task: str) -> list[str]:
        """Return the class names of a task, or of ``all``."""
        tasks = Catalog.open(self.out / "data" / "tasks.lance").read(["task", "caption"])
        asked = (tasks["task"] == task) | (task == "all")
        return sorted(set(tasks["caption"][asked].astype(str)))

    def prior_column(self, arm: Arm, study: Study, seed: int) -> str:
        """Return the column that marks the pairs of the fine clusters nearest to a task's class names."""
        name = f"prior_{arm.task}_s{seed}".replace("-", "_")
        if name not in self.catalog.columns:
            clustering, _ = self.clustering(arm, study, seed)
            names = load_any_encoder("minilm").encode(self.class_names(arm.task))
            chosen = nearest_centers(names, clustering.fine_centers)[0]
            fine, _ = assign_nearest(self.embeddings("minilm"), clustering.fine_centers)
            self.catalog.add_columns({name: np.isin(fine, chosen)})
        return name

    def named_column(self, task: str) -> str:
        """Return the column that marks the pairs whose caption is a class name of a task."""
        name = f"named_{task}".replace("-", "_")
        if name not in self.catalog.columns:
            captions = self.catalog.read(["caption"])["caption"].astype(str)
            self.catalog.add_columns({name: np.isin(captions, self.class_names(task))})
        return name

    def trunk(self, study: Study, seed: int) -> dict[int, TrainJob]:
        """Return the jobs of the seed model by the part at which they end.

        Those of `Study.partings` are one training. A part between them at which an arm parts is a training of its own
        from the one before, so that an arm that is added later leaves the trainings alone that are there.
        """
        config, jobs = replace(study.train, seed=seed), {}
        between = {arm.part for arm in study.arms if arm.kind != "total"} - set(study.partings)
        for part in (*study.partings, *sorted(between)):
            before = jobs[max(earlier)] if (earlier := [known for known in study.partings if known < part]) else None
            first = 0 if before is None else before.last_step
            job = TrainJob(
                name=f"part-{part}",
                folder=str(self.folder(study, seed) / f"part-{part}"),
                catalog=str(self.catalog_path),
                catalog_fingerprint=fingerprint_of(self.catalog, None, config.model),
                config=config,
                first_step=first,
                last_step=part * config.steps_per_part,
                first_share=first / (PARTS * config.steps_per_part),
                last_share=part / PARTS,
                start_from=None if before is None else before.folder,
                start_digest="" if before is None else before.digest,
                mask=self.sample_column(study),
            )
            jobs[part] = job
        return jobs

    def jobs(self, arm: Arm, study: Study, seed: int) -> list[TrainJob]:
        """Return the jobs of an arm."""
        trunk = self.trunk(study, seed)
        if arm.kind == "total":
            steps = arm.parts * study.train.steps_per_part
            start = trunk[min(trunk)]
            whole = replace(start, name=arm.name, folder=str(self.folder(study, seed) / arm.name), last_step=steps)
            return [replace(whole, last_share=1.0)]
        start = trunk[arm.part]
        left = (arm.extra or PARTS - arm.part) * study.train.steps_per_part
        steps = left // arm.experts if arm.budget == "matched" and not arm.is_single else left
        steps = int(steps * training_flops(study.train.model) / training_flops(study.train.model, arm.trainable))
        config = replace(start.config, trainable=arm.trainable, learning_rate=start.config.learning_rate * arm.rate)
        rest = replace(
            start,
            config=config,
            first_step=start.last_step,
            last_step=start.last_step + steps,
            first_share=0.0 if arm.extra else start.last_share,
            last_share=1.0,
            start_from=start.folder,
            start_digest=start.digest,
            out_of_cluster_fraction=arm.outside,
        )
        found = []
        for k in range(1 if arm.is_single else arm.experts):
            name = arm.name if arm.is_single else f"{arm.name}-{k}"
            job = replace(rest, name=name, folder=str(self.folder(study, seed) / name))
            if arm.kind == "full":
                job = replace(job, config=replace(job.config, seed=seed + 100 * (k + 1)))
            elif arm.kind == "prior":
                job = replace(job, mask=self.prior_column(arm, study, seed))
            elif arm.kind == "named":
                job = replace(job, mask=self.named_column(arm.task))
            elif arm.kind in {"pure", "batch"}:
                job = self.in_batches(job, arm, study, seed)
            elif arm.kind == "random":
                job = replace(job, where={self.random_column(arm, study, seed): k})
            else:
                clustering, column = self.clustering(arm, study, seed)
                fingerprint = fingerprint_of(self.catalog, clustering, job.config.model)
                job = replace(job, where={column: k}, catalog_fingerprint=fingerprint)
            found.append(job)
        return found

    def in_batches(self, job: TrainJob, arm: Arm, study: Study, seed: int) -> TrainJob:
        """Return a job whose batches are of an arm's size and, if it asks for that, of one cluster each."""
        size = arm.batch or job.config.batch_size
        factor = job.config.batch_size // size
        config = replace(job.config, batch_size=size)
        if arm.kind == "pure":
            config = replace(config, groups=self.clustering(arm, study, seed)[1])
        return replace(job, config=config, first_step=job.first_step * factor, last_step=job.last_step * factor)


@cache
def training_flops(model: str, trainable: str = "all") -> int:
    """Return the floating-point operations of a training sample; counted once a model and what is trained."""
    return count_flops(model, CAPTION_TOKENS, trainable=trainable).training


def mean_of_sets(vectors: np.ndarray, sets: np.ndarray) -> np.ndarray:
    """Return the mean vector of each icon set as a direction."""
    means = np.stack([vectors[sets == number].mean(0) for number in range(sets.max() + 1)]).astype(np.float32)
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def all_jobs(workshop: Workshop, studies: list[Study], seeds: set[int] | None) -> Iterator[TrainJob]:
    """Yield the jobs, a study's trunks first; every seed of an arm before the next arm."""
    for study in studies:
        here = [seed for seed in study.seeds if seeds is None or seed in seeds]
        for seed in here:
            yield from workshop.trunk(study, seed).values()
        for arm in study.arms:
            for seed in here:
                yield from workshop.jobs(arm, study, seed)


def train_one(job: TrainJob) -> int:
    """Train a job in a worker process; the optimizer's state is kept only where others start from it."""
    try:
        result = train(job, kept=KEPT)
    except SystemExit:  # the parent is gone; a pool's worker would wait for it
        os._exit(1)
    if not job.name.startswith("part-"):
        shutil.rmtree(Path(job.folder) / "checkpoints", ignore_errors=True)
    return result.samples


def run_all(jobs: Iterator[TrainJob], processes: int) -> None:
    """Train jobs as soon as what they start from is there, the first of the list first."""
    os.environ["MODECLIP_PARENT"] = str(os.getpid())
    waiting: list[TrainJob] = []
    running: dict[Future[int], TrainJob] = {}
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool, make_progress() as bars:
        bar = bars.add_task("experiments", total=None, unit="samples")
        while True:
            while len(running) < processes:
                job = next((job for job in waiting if is_ready(job)), None)
                if job is None:  # its clustering is made now that its turn has come
                    job = next(jobs, None)
                    if job is None:
                        break
                    if TrainResult.read(job) is None:
                        job.save()
                        waiting.append(job)
                    continue
                waiting.remove(job)
                running[pool.submit(train_one, job)] = job
            if not running:
                break
            for future in wait(running, timeout=5, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                bars.advance(bar, future.result())
                log(f"{time.strftime('%H:%M:%S')} {job.folder}: {future.result():,} samples")
    if waiting:
        raise SystemExit(f"{waiting[0].name} starts from {waiting[0].start_from}, which no job makes")


def is_ready(job: TrainJob) -> bool:
    """Tell whether what a job starts from is finished."""
    if job.start_from is None:
        return True
    done = Path(job.start_from) / "done.json"
    return done.is_file() and json.loads(done.read_text(encoding="utf-8"))["digest"] == job.start_digest


def main() -> None:
    """Train what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/experiments"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--studies", nargs="*", default=None)
    parser.add_argument("--seeds", type=int, nargs="*", default=None)
    arguments = parser.parse_args()
    recipe, studies = read_studies()
    studies = [study for study in studies if arguments.studies is None or study.name in arguments.studies]
    workshop = Workshop(arguments.out, recipe)
    run_all(all_jobs(workshop, studies, set(arguments.seeds) if arguments.seeds else None), arguments.jobs)


if __name__ == "__main__":
    main()
