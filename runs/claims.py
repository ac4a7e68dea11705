"""What the paper claims beside its main tables, tested on trained models: shifted pictures, single experts, averages.

Usage: python runs/claims.py [--plan runs/experiments.yaml] [--study main] [--out runs/experiments]
                             [--records runs/claims.jsonl] [--only shifts|labelled|trained-on ...]

The models are those that `runs/experiments.py --studies main --seeds 0 1 2` trains: the dense one, four experts on
clusters of captions, four on clusters of images, four of all data, at equal cost. What is not trained yet is left for
the next call, a row that is recorded is not measured again. `runs/claims_report.py` makes the table from the records.

    shifts       MoDE Table 3: zero-shot accuracy on held-out icons that are changed as a user's pictures differ
                 (`SHIFTS`), every second of each task, among all its names
    labelled     Tables 10 and 18: each expert of captions by itself, and the mean of their weights, as the start of a
                 classifier of 100 names: zero-shot, a linear probe, all of the image tower tuned with the classifier
    trained-on   Table 18 with this project's own training: the mean of the experts' weights and the dense model go on
                 for `TRAINED_ON` more samples of all pairs

The strength of the changes, of the probe's regularisation and of the tuning were chosen with the seed model of random
seed 0 alone, so that the changes cost it part of its accuracy and the tuning does not overfit; all models share them.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from experiments import MAIN, PARTS, Arm, Workshop, base_arm, read_studies
from measure import OF_IMAGES, Bench, Exam, Labelled, Values, Weigh, average, machine
from PIL import Image, ImageOps

from modeclip.data.tasks.task import CatalogImages, Task
from modeclip.evaluation.probing import ProbeConfig, ProbeResult
from modeclip.models.clip import Clip, encode_image, load_clip
from modeclip.models.features import text_features
from modeclip.models.pool import ModelRef
from modeclip.system.console import log
from modeclip.training.jobs import TrainJob
from modeclip.training.trainer import train

HERE = Path(__file__).parent
ARMS = (base_arm(), base_arm(encoder="clip-image"))
DENSE, PLAIN = f"part-{PARTS}", "as drawn"
TESTS = ("shifts", "labelled", "trained-on")

EVERY = 2
"""One held-out image of so many is changed."""
PROBE_C = 100
TUNED_SAMPLES, TUNED_BATCH, TUNED_RATE, TUNED_DECAY = 12_800, 128, 1e-4, 0.05
TRAINED_ON, TRAINED_RATE = 25_600, 3e-4
ROTATION, SMALLER, NOISE = 10, 28, 60
"""Degrees; pixels that 32 become; standard deviation in levels of 255."""


def inverted(picture: Image.Image, _: np.random.Generator) -> Image.Image:
    """Return it in light on dark."""
    return ImageOps.invert(picture)


def coloured(picture: Image.Image, draw: np.random.Generator) -> Image.Image:
    """Return it in one colour, of any hue."""
    hue = Image.new("HSV", (1, 1), (int(draw.integers(256)), 200, 190)).convert("RGB").getpixel((0, 0))
    return ImageOps.colorize(picture.convert("L"), hue, "white")


def rotated(picture: Image.Image, draw: np.random.Generator) -> Image.Image:
    """Return it turned to the left or right."""
    angle = ROTATION * (1 if draw.integers(2) else -1)
    return picture.rotate(angle, Image.Resampling.BICUBIC, fillcolor="white")


def smaller(picture: Image.Image, _: np.random.Generator) -> Image.Image:
    """Return it with a white margin."""
    small = picture.resize((SMALLER, SMALLER), Image.Resampling.BICUBIC)
    return ImageOps.expand(small, (picture.width - SMALLER) // 2, "white")


def noisy(picture: Image.Image, draw: np.random.Generator) -> Image.Image:
    """Return it with noise in every pixel."""
    pixels = np.asarray(picture, np.float64)
    return Image.fromarray((pixels + draw.normal(0, NOISE, pixels.shape)).clip(0, 255).astype(np.uint8))


SHIFTS: dict[str, Callable[[Image.Image, np.random.Generator], Image.Image]] = {
    "another colour": coloured,
    "smaller": smaller,
    "rotated": rotated,
    "noise": noisy,
    "light on dark": inverted,
}
"""How the pictures are changed; what is random depends on the picture's number alone."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ShiftedImages:
    """The images of a task, changed in one way."""

    images: CatalogImages
    shift: str

    @property
    def digest(self) -> str:
        """Hash of the images and the change."""
        numbers = (ROTATION, SMALLER, NOISE)
        return sha256(f"{self.images.digest} {self.shift} {numbers}".encode()).hexdigest()

    def digests(self) -> list[bytes]:
        """Return what each image is known by."""
        return [digest + self.shift.encode() for digest in self.images.digests()]

    def __len__(self) -> int:
        return len(self.images)

    def read(self, rows: np.ndarray) -> list[Image.Image]:
        """Return the changed images of these numbers."""
        change = SHIFTS[self.shift]
        pairs = zip(self.images.read(rows), rows.tolist(), strict=True)
        return [change(picture, np.random.default_rng(row)) for picture, row in pairs]

    def keys(self) -> list[str]:
        """Return the key of each image."""
        return self.images.keys()


def shifted(exam: Exam, shift: str) -> Exam:
    """Return the same tasks with changed images."""
    if shift == PLAIN:
        return exam
    changed = copy.copy(exam)
    changed.vectors = {}
    changed.images = ShiftedImages(images=exam.images, shift=shift)  # type: ignore[assignment]
    return changed


@dataclass
class Claims:
    """The models of one random seed, and what the claims ask of them."""

    bench: Bench
    thin: Exam
    """The tasks with the images that are changed."""
    only: Sequence[str]
    work: Path
    """Where averaged models and further trained ones lie."""

    def rows(self) -> Iterator[tuple[str, Callable[[], Values]]]:
        """Yield what is not recorded yet, as far as its models are there, and what measures it."""
        plans = {"shifts": self._shifts, "labelled": self._labelled, "trained-on": self._trained_on}
        for test in self.only:
            yield from ((row, make) for row, make in plans[test]() if row not in self.bench.recorded)

    @property
    def arms(self) -> list[tuple[Arm, list[Path]]]:
        """The mixtures whose models are all trained."""
        arms = [(arm, self.bench.members(arm)) for arm in ARMS]
        return [(arm, members) for arm, members in arms if members is not None]

    @property
    def dense(self) -> Path:
        """The dense model."""
        return self.bench.model(DENSE)

    # ---------------------------------------------------------------- pictures that are changed

    def _shifts(self) -> Iterator[tuple[str, Callable[[], Values]]]:
        for shift in (PLAIN, *SHIFTS):
            bench = replace(self.bench, exam=shifted(self.thin, shift))
            if self.bench.finished(DENSE):
                yield f"{shift}: dense", lambda bench=bench: self._mixed(bench, [self.dense], None)
            for arm, members in self.arms:
                yield f"{shift}: {arm.name}", lambda b=bench, m=members, a=arm: self._mixed(b, m, a)

    def _mixed(self, bench: Bench, members: list[Path], arm: Arm | None) -> Values:
        """Return the accuracy on each task, of a mixture by cosines and by log-probabilities."""
        exam, weigh, per_image = bench.exam, None, False
        # One pass over the images serves all models of the seed.
        exam.load(list(dict.fromkeys([self.dense, bench.model("part-16"), *(m for _, ms in self.arms for m in ms)])))
        if arm is not None and arm.kind == "mode":
            weigh, per_image = remembered(bench.weigh(arm)), arm.encoder in OF_IMAGES
        found = exam.tasks_of(exam.hits(members, weigh, per_image))
        if arm is not None:
            found["logs"] = exam.tasks_of(exam.hits(members, weigh, per_image, logs=True))["tasks"]
        return found

    # ---------------------------------------------------------------- one model as the start of a classifier

    def _labelled(self) -> Iterator[tuple[str, Callable[[], Values]]]:
        if not self.bench.finished(DENSE):
            return
        yield "labelled: dense", lambda: self._classified(self.dense)
        for arm, members in self.arms:
            if arm != base_arm():
                continue
            for number, member in enumerate(members):
                yield f"labelled: {arm.name}-{number}", lambda member=member: self._classified(member)
            yield f"labelled: {arm.name}", lambda m=members: self._concatenated(m)
            yield f"labelled: mean of {arm.name}", lambda a=arm, m=members: self._classified(self._mean(a, m))

    @cached_property
    def _labels(self) -> Labelled:
        return Labelled.of(self.bench.exam, self.bench.workshop.catalog)

    def _probed(self, *models: Path) -> ProbeResult:
        return self._labels.probe(self.bench.exam, models, ProbeConfig(C=PROBE_C))

    def _classified(self, model: Path) -> Values:
        """Return the accuracies of a model on the icons of held-out sets that have one of the frequent names."""
        exam, labelled, clip = self.bench.exam, self._labels, load_clip(model)
        words = text_features([ModelRef.of(model.name, model)], labelled.names.tolist(), exam.cache)[0]
        visual = exam.load([model])[0][0][labelled.test]
        probe = self._probed(model)
        tuned = tune(clip, probe, labelled, exam, self.bench.seed)
        return {
            "zero-shot": 100 * float(((visual @ words.T).argmax(1) == labelled.test_labels).mean()),
            "probe": 100 * probe.outcome.metrics["acc1"],
            "tuned": 100 * float((tuned == labelled.test_labels).mean()),
            "fitted": len(labelled.labels),
            "tested": len(labelled.test),
        }

    def _concatenated(self, members: list[Path]) -> Values:
        return {"probe": 100 * self._probed(*members).outcome.metrics["acc1"]}

    def _mean(self, arm: Arm, members: list[Path]) -> Path:
        """Return a model whose weights are the mean of the experts'."""
        return average(members, self.work / f"mean-of-{arm.name}")

    # ---------------------------------------------------------------- the mean of the weights, trained on

    def _trained_on(self) -> Iterator[tuple[str, Callable[[], Values]]]:
        if not self.bench.finished(DENSE):
            return
        yield "trained on: dense", lambda: self._further(DENSE, self.dense)
        for arm, members in self.arms:
            yield f"mean of {arm.name}", lambda a=arm, m=members: self._plain(self._mean(a, m))
            yield f"trained on: mean of {arm.name}", lambda a=arm, m=members: self._further(a.name, self._mean(a, m))

    def _further(self, name: str, start: Path) -> Values:
        """Train a model on, on all pairs, and return its accuracy on each task."""
        folder = self.work / f"trained-on-{name}"
        config = replace(
            self.bench.study.train,
            model=str(start),
            samples=TRAINED_ON,
            learning_rate=TRAINED_RATE,
            seed=self.bench.seed,
        )
        job = TrainJob(
            name=folder.name,
            folder=str(folder),
            catalog=str(self.bench.workshop.catalog_path),
            catalog_fingerprint=self.bench.workshop.catalog.fingerprint,
            config=config,
            first_step=0,
            last_step=config.samples // config.batch_size,
            first_share=0.0,
            last_share=1.0,
        )
        result = train(job)
        return self._plain(folder) | {"samples": result.samples}

    def _plain(self, model: Path) -> Values:
        exam = self.bench.exam
        return exam.tasks_of(exam.hits([model]))


def thinned(tasks: Sequence[Task]) -> list[Task]:
    """Return tasks with the images that are changed, among all names."""
    found = []
    for task in tasks:
        images = CatalogImages(catalog=task.images.catalog, rows=task.images.rows[::EVERY])
        found.append(replace(task, images=images, labels=task.labels[::EVERY]))
    return found


def remembered(weigh: Weigh) -> Weigh:
    """Return the same weights, each task's computed once."""
    found: dict[int, np.ndarray] = {}

    def recall(task: int) -> np.ndarray:
        if task not in found:
            found[task] = weigh(task)
        return found[task]

    return recall


def tune(clip: Clip, probe: ProbeResult, labelled: Labelled, exam: Exam, seed: int) -> np.ndarray:
    """Tune the image tower with a classifier that starts as the linear probe, and answer for the test images.

    AdamW with a rate that falls to 0 by a cosine; pictures are not varied. Source of the start: arXiv 2202.10054.
    """
    torch.manual_seed(seed)
    count = len(labelled.labels)
    pixels, labels = clip.images(labelled.train.read(np.arange(count))), torch.from_numpy(labelled.labels)
    classifier = torch.nn.Linear(probe.coefficients.shape[1], len(labelled.names))
    with torch.no_grad():
        classifier.weight.copy_(torch.from_numpy(probe.coefficients))
        classifier.bias.copy_(torch.from_numpy(probe.intercepts))
    parameters = [*clip.model.visual.parameters(), *classifier.parameters()]
    optimizer = torch.optim.AdamW(parameters, TUNED_RATE, weight_decay=TUNED_DECAY)
    steps = TUNED_SAMPLES // TUNED_BATCH
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    passes = -(-TUNED_SAMPLES // count)
    order = torch.cat([torch.randperm(count) for _ in range(passes)])
    clip.model.train()
    for step in range(steps):
        rows = order[step * TUNED_BATCH : (step + 1) * TUNED_BATCH]
        logits = classifier(encode_image(clip.model, pixels[rows]))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, labels[rows]).backward()
        optimizer.step()
        schedule.step()
    clip.model.eval()
    with torch.no_grad():
        tested = clip.images(exam.images.read(labelled.test))
        answers = [classifier(encode_image(clip.model, part)).argmax(1) for part in tested.split(512)]
    return torch.cat(answers).numpy()


def main() -> None:
    """Write a record for every row that has its models and has none yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", type=Path, default=HERE / "experiments.yaml")
    parser.add_argument("--study", default=MAIN)
    parser.add_argument("--out", type=Path, default=Path("runs/experiments"))
    parser.add_argument("--records", type=Path, default=HERE / "claims.jsonl")
    parser.add_argument("--only", nargs="*", choices=TESTS, default=TESTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    recipe, studies = read_studies(arguments.plan)
    study = next(study for study in studies if study.name == arguments.study)
    exam, workshop = Exam(arguments.out), Workshop(arguments.out, recipe)
    thin = Exam(arguments.out, thinned(exam.tasks))
    lines = arguments.records.read_text(encoding="utf-8").splitlines() if arguments.records.exists() else []
    recorded = {(record["study"], record["seed"], record["row"]) for record in map(json.loads, lines)}
    names: dict[str, list[np.ndarray]] = {}
    waiting = []
    for seed in study.seeds:
        known = {row for of, number, row in recorded if (of, number) == (study.name, seed)}
        bench = Bench(exam=exam, workshop=workshop, study=study, seed=seed, recorded=known, _names=names)
        work = arguments.out / "claims" / study.name / f"seed-{seed}"
        waiting.append([(seed, *row) for row in Claims(bench=bench, thin=thin, only=arguments.only, work=work).rows()])
    with arguments.records.open("a", encoding="utf-8") as file:
        for turn in itertools.zip_longest(*waiting):  # every seed of a row before the next row
            for seed, row, make in filter(None, turn):
                line = {"study": study.name, "seed": seed, "row": row, "values": make()} | machine()
                file.write(json.dumps(line) + "\n")
                file.flush()
                log(f"{study.name}, seed {seed}: {row}")


if __name__ == "__main__":
    main()
