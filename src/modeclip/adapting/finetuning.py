"""Fine-tune a model on a small set of one's own, and keep what it could do before.

Fine-tuning on few images soon makes a model better at them and worse at everything else. Four guards stand against
that. The loss is that of pre-training (FLYP: better than a new head), and pairs with the same caption are not each
other's negatives. A part of the own set is held out, its duplicates too. Training stops when the held-out accuracy has
not risen for a while, and the best step is kept. Then the weights are moved back towards the start (WiSE-FT): of the
models (1 - alpha) seed + alpha tuned, with alpha from 0 to 1, `choose_alpha` takes the one with

    the highest accuracy on the held-out images of the own set (the smallest alpha among equals),
    of those whose mean accuracy on the general tasks is at most ``tolerance`` below the start's.

alpha = 0 is the start itself, so there is always a choice. Without general tasks only the first line counts. The
held-out images choose the step and the alpha, so their "after" is a little too good: test on other images at the end.

Source: WiSE-FT (arXiv 2109.01903) for the line, the rule of choice is ours; FLYP (arXiv 2212.00638) for the loss.
Price: the training; ``checks`` passes over the held-out images, and ``alphas`` + 1 over these and all general tasks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from typing_extensions import TypedDict

from modeclip.adapting.merging import FINETUNE_FILE, as_folder, find_model, interpolate_into
from modeclip.adapting.schedule import one_schedule
from modeclip.adapting.validation import (
    HOLDOUT_UNITS,
    Examiner,
    Split,
    open_tasks,
    own_task,
    split_rows,
)
from modeclip.data.catalog import Catalog
from modeclip.data.prompts import check_templates
from modeclip.data.selection import ALL, Selection
from modeclip.data.sources.options import parse_holdout
from modeclip.data.tasks.task import Task
from modeclip.errors import DamagedError, ModeclipError, check_above_zero, check_between, check_least
from modeclip.evaluation.intervals import Interval, average, bootstrap_interval, paired_interval
from modeclip.models.blocks import freeze
from modeclip.models.clip import Clip, hollow_model, load_clip, save_clip
from modeclip.models.deltas import WEIGHTS_FILE, weights_file
from modeclip.system.console import log, progress
from modeclip.system.files import hash_file, only_process, read_json, write_json, writing
from modeclip.system.paths import expand_homes, home_path
from modeclip.training.batches import read_probability
from modeclip.training.jobs import (
    LATER_FIELDS,
    MOST_PROCESSES,
    AugmentConfig,
    EngineConfig,
    TrainConfig,
    TrainJob,
    check_trainable,
    prepare,
)
from modeclip.training.trainer import train

RESULT_FILE, NOTES_FILE = FINETUNE_FILE, "notes.json"
FORMAT = 1
"""Raised when the same settings start to give something else."""
GRADIENT_NORM = 1.0
"""Largest norm of a gradient: the first batches of a foreign set are far from what the model knows."""
FEW_PAIRS, FEW_IMAGES, FEW_STEPS, MANY_COPIES = 5, 50, 10, 0.1
"""What is warned of: fewer pairs a class or steps than this, fewer held-out images (one of 50 is 2 points of accuracy),
and a larger share of pairs that are left out as copies of held-out images."""

Correct = Mapping[str, Bool[np.ndarray, " _"]]
"""Whether each image of a task is classified correctly, by task."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """How a model is fine-tuned on a small set."""

    epochs: int = 10
    """Passes over the training rows, at most: the schedule ends there, and early stopping may end it before."""
    batch_size: int = 128
    """Pairs in a step, or all pairs if the set has fewer. Large batches need more memory and give fewer steps."""
    learning_rate: float = 1e-5
    """Highest learning rate: a fiftieth of what ViT-B is pre-trained with. Models trained for minutes bear 1e-4 to
    1e-3."""
    warmup_fraction: float = 0.1
    """Share of the steps in which the rate rises, in [0, 1), so that AdamW's averages settle before it is high."""
    weight_decay: float = 0.1
    """AdamW's decay of matrices: half of pre-training's, since there are few steps and the start is worth keeping."""
    holdout: str = "image"
    """What is held out. `image`: images at random with their copies, the same share of each class. `similar`: the same,
    but with near-duplicates (64-bit dHashes at most 3 bits apart, and chains of them). `class`: whole classes (distinct
    captions), which shows what it does for names never seen. `group` or `group=COLUMN`: whole groups (folders, shards,
    or equal values in a column), for another source, camera or site."""
    holdout_fraction: float = 0.2
    """Share of the images, classes or groups that is held out, in (0, 1)."""
    checks: int = 20
    """How often the held-out images are classified during training."""
    patience: int = 5
    """Checks without a new best after which training stops; the default is a quarter of the schedule."""
    alphas: int = 10
    """Number of steps on the line from the start (alpha 0) to the tuned model (alpha 1)."""
    tolerance: float = 0.01
    """Accuracy that the mean over the general tasks may lose, in [0, 1]."""
    templates: tuple[str, ...] = ("{}",)
    """Prompts for class names of the general tasks, {} where the name goes; the own captions are used as they are."""
    captions: str | None = None
    """Column of texts that stand in the place of the captions, and so of the classes, where it has one."""
    probability: str | None = None
    """Column of numbers in [0, 1]: every pass over the training rows draws afresh which of them it reads."""
    trainable: str = "all"
    """What training changes: ``all``; ``ffn``, the feed-forward layers of both towers; ``last:N``, the last N blocks of
    both with the norms and projections behind; of a CLIP-MoE ``routers``, or ``added``: the routers and every expert
    but the first. All else keeps its bytes."""
    threads: int = 0
    """Threads that compute; 0: as many as PyTorch takes on this machine."""
    seed: int = 0
    """Seed of what is held out, of the order of the samples and of their augmentation."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """How pictures are varied."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """How the machine is used."""

    def __post_init__(self) -> None:
        """Check the ranges that ``TrainConfig`` does not check."""
        check_least("finetune", self, epochs=1, batch_size=2, checks=1, patience=1, alphas=1, seed=0)
        check_between("finetune", self, threads=(0, MOST_PROCESSES))
        check_above_zero("finetune", self, "learning_rate")
        if not 0 < self.holdout_fraction < 1:
            raise ModeclipError(f"finetune.holdout_fraction must lie in (0, 1), got {self.holdout_fraction}")
        if not 0 <= self.tolerance <= 1:
            raise ModeclipError(f"finetune.tolerance must lie in [0, 1], got {self.tolerance}")
        if not 0 <= self.warmup_fraction < 1:
            raise ModeclipError(f"finetune.warmup_fraction must lie in [0, 1), got {self.warmup_fraction}")
        if not 0 <= self.weight_decay < math.inf:
            raise ModeclipError(f"finetune.weight_decay must be 0 or more and finite, got {self.weight_decay}")
        check_trainable("finetune.trainable", self.trainable)
        parse_holdout(self.holdout, HOLDOUT_UNITS, "finetune.holdout")
        check_templates(self.templates, "finetune")


@dataclass(frozen=True, kw_only=True)
class AlphaPoint:
    """One place on the line from the start to the tuned model."""

    alpha: float
    """Share of the tuned model."""
    own: float
    """Accuracy on the held-out images of the own set."""
    general: float | None
    """Mean accuracy over the general tasks; None without them."""


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """One line of the table: accuracies with 95 % bootstrap intervals over the images."""

    name: str
    """Name of the task; ``general tasks`` is the plain mean over all of them."""
    num_images: int
    """Number of images that are classified."""
    before: Interval
    """Accuracy of the start, alpha = 0."""
    tuned: Interval
    """Accuracy at the best step of the training, alpha = 1."""
    after: Interval
    """Accuracy at the chosen alpha, of the model in the folder."""
    change: Interval
    """After minus before, on the same images."""
    majority: float | None = None
    """Share of the most frequent class, which a model that names nothing else gets right; None: not known."""
    chance: float | None = None
    """Share that guessing gets right; None: not known."""


@dataclass(frozen=True, kw_only=True)
class FinetuneResult:
    """What ``finetune.json`` holds."""

    folder: str
    """The open_clip folder of the chosen model."""
    model: str
    """Model that it started from."""
    digest: str
    """Hash of all that decided the result."""
    alpha: float
    """Chosen share of the tuned model."""
    num_train: int
    """Pairs trained on."""
    num_held_out: int
    """Pairs held out."""
    num_duplicates: int
    """Pairs left out because their image is held out or in a general task."""
    num_classes: int
    """Distinct captions of the whole own set, from which the class of a held-out image is chosen."""
    batch_size: int
    """Pairs in a step."""
    steps: int
    """Steps that were trained."""
    planned_steps: int
    """Steps of the schedule: more than ``steps`` if training stopped early."""
    best_step: int
    """Step at which the tuned model was kept."""
    tolerance: float
    """Accuracy that the general tasks were allowed to lose."""
    checks: tuple[tuple[int, float], ...]
    """Step and held-out accuracy of each check during training."""
    curve: tuple[AlphaPoint, ...]
    """Accuracies on the line from alpha 0 to 1."""
    table: tuple[TableRow, ...]
    """Before and after: the own set, the mean over the general tasks, and each general task."""
    warnings: tuple[str, ...] = ()
    """What makes the result worth less than it looks, a sentence each."""

    @classmethod
    def read(cls, folder: Path, digest: str) -> FinetuneResult | None:
        """Return a folder's result if it was made from the same inputs, else None."""
        from pydantic import TypeAdapter, ValidationError

        try:
            content = (folder / RESULT_FILE).read_bytes()
            result = TypeAdapter(cls).validate_json(content)
        except (OSError, ValidationError):
            return None
        return result if result.digest == digest and (folder / WEIGHTS_FILE).is_file() else None


def finetune(
    model: str | Path,
    catalog: Catalog,
    config: FinetuneConfig,
    *,
    out: str | Path,
    tasks: str | None = None,
    selection: Selection = ALL,
) -> FinetuneResult:
    """Fine-tune a model on a catalog and write the chosen model and its result; a killed run continues.

    Args:
        model: Specification or folder of the model to start from: a seed, an expert of a bundle, an average.
        catalog: The own set, as ``modeclip index`` makes it; a column is added that marks its training rows.
        config: How to train, what to hold out, and how much the general tasks may lose.
        out: Folder of the model; ``best`` and ``train`` in it hold the tuned model and its training.
        tasks: Catalog of general zero-shot tasks, such as ``tasks.lance`` of a run.
        selection: Pairs that the own set consists of.

    Raises:
        ModeclipError: The model or the tasks are not there, or the set is too small.
    """
    out = home_path(out)
    start = find_model(expand_homes(str(model)), "finetune")
    if config.trainable != "all":  # told before anything is written
        freeze(hollow_model(start), config.trainable)
    general = open_tasks(tasks, config.templates, 256) if tasks else None
    asked = general.tasks if general else ()
    chosen = selection.part_of(catalog)
    split = split_rows(
        chosen, config.holdout, config.holdout_fraction, config.seed, tasks=asked, captions=config.captions
    )
    out.mkdir(parents=True, exist_ok=True)
    with only_process(out), writing(out):
        seed = as_folder(start, out / "seed")
        if seed.resolve() == out.resolve():
            raise ModeclipError(f"finetune: {model} is also the folder to write to; choose another --out")
        job = _make_job(seed, catalog, selection.rows(catalog)[split.train], config, out / "train", selection)
        digest = _digest(job, config, tasks)
        if done := FinetuneResult.read(out, digest):
            log(f"finetune: {out} is done")
            _warn(done.warnings)
            return done
        notes = _Notes.open(out / NOTES_FILE, digest)
        if notes is None:  # what may be trained here was checked with other settings
            prepare(job, "never")
            notes = _Notes(out / NOTES_FILE, digest, [], {})
            notes.save()
        task = own_task(chosen, split, config.captions)
        warnings = warnings_of(split, task, job.last_step)
        _warn(warnings)
        own = Examiner([task])
        job.save()
        watch = _Watch(job, notes, own, out / "best", config.patience)
        visit_every = max(1, job.last_step // config.checks)
        train(job, visit_every=visit_every, visit=watch)
        examiners = [own, *([general] if general else [])]
        found = _sweep(seed, out / "best", [i / config.alphas for i in range(config.alphas + 1)], examiners, notes)
        num_classes = len(task.classnames)
        result = _make_result(str(model), job, split, num_classes, config, notes, found, out, digest)
        by_name = {task.name: task for examiner in examiners for task in examiner.tasks}
        result = replace(result, table=tuple(_with_baselines(row, by_name) for row in result.table))
        result = replace(result, warnings=(*warnings, *warnings_after(result)))
        _warn(result.warnings[len(warnings) :])
        clip = load_clip(seed)
        interpolate_into(clip, seed, out / "best", result.alpha)
        save_clip(clip, out)
        write_json(out / RESULT_FILE, asdict(result))
    return result


def _warn(warnings: Sequence[str]) -> None:
    for warning in warnings:
        log(f"finetune: warning: {warning}")


def warnings_of(split: Split, task: Task, steps: int) -> list[str]:
    """Return what makes a fine-tuning on an own set worth less than it looks, known before it starts.

    Args:
        split: What is trained on and what is held out.
        task: The own set: all its captions, and the labels of the held-out images.
        steps: Steps of the schedule.
    """
    num_classes, num_held_out = len(task.classnames), len(split.held_out)
    num_pairs = len(split.train) + num_held_out + split.num_duplicates
    found = []
    if num_pairs < FEW_PAIRS * num_classes:
        found.append(
            f"{num_classes:,} different captions for {num_pairs:,} pairs, {num_pairs / num_classes:.1f} a class: every "
            "caption counts as a class of its own; give class names as captions if the set has classes"
        )
    if num_held_out < FEW_IMAGES:
        found.append(
            f"only {num_held_out:,} of {num_pairs:,} pairs are held out, so one image is {100 / num_held_out:.0f} "
            "percentage points of the accuracy that chooses step and alpha; hold out more, or have more data"
        )
    assert task.labels is not None
    answers = np.unique(task.labels)
    if len(answers) == 1:
        found.append(
            f"all held-out images are of one class, {task.classnames[int(answers[0])]!r}, so a model that always "
            "says it is right"
        )
    if split.num_duplicates > MANY_COPIES * num_pairs:
        found.append(
            f"{split.num_duplicates:,} of {num_pairs:,} pairs are not trained on, since their image is held out or in "
            "a task; remove the copies from the set"
        )
    if steps < FEW_STEPS:
        found.append(f"{steps} steps are all the training that {len(split.train):,} pairs give; give more --epochs")
    return found


def warnings_after(result: FinetuneResult) -> list[str]:
    """Return what a result itself says against it: the start came out, or a model that looks at nothing is as good."""
    found, own, start = [], result.table[0], result.curve[0]
    if result.alpha == 0:
        best = max(point.own for point in result.curve)
        reason = (
            f"no model on the line is better than the start on the {own.num_images:,} held-out images "
            f"({100 * best:.1f} %)"
            if best <= start.own
            else f"what is better on the own set (up to {100 * best:.1f} % against {100 * start.own:.1f} %) loses "
            f"more than {100 * result.tolerance:g} points on the general tasks"
        )
        found.append(f"alpha 0 was chosen, so {result.folder} is the start itself, unchanged: {reason}")
    if own.majority is not None and own.after.mean <= own.majority:
        found.append(
            f"{100 * own.after.mean:.1f} % of the held-out images are right, and {100 * own.majority:.1f} % would be "
            "for a model that always names their most frequent class"
        )
    return found


# ---------------------------------------------------------------- training, and what it leaves behind


class NotesContent(TypedDict):
    """What the file of the notes holds; as in `_Notes`."""

    digest: str
    checks: list[tuple[int, float]]
    found: dict[str, dict[str, str]]


@dataclass
class _Notes:
    """What is known so far, kept in a file so that a killed run can go on from it."""

    path: Path
    digest: str
    checks: list[tuple[int, float]]
    found: dict[str, dict[str, str]]
    """A 0 or 1 for each image, by alpha and task."""

    @classmethod
    def open(cls, path: Path, digest: str) -> _Notes | None:
        """Return the notes of a fine-tuning; None where there are none of it."""
        try:
            notes = read_json(path, NotesContent, "the model is trained again")
        except DamagedError as error:
            if path.exists():
                log(str(error))
            return None
        return cls(path, digest, notes["checks"], notes["found"]) if notes["digest"] == digest else None

    def save(self) -> None:
        content = {"digest": self.digest, "checks": self.checks, "found": self.found}
        write_json(self.path, content, indent=None)


@dataclass
class _Watch:
    """Called by the training from time to time: scores the model, keeps the best one and says when to stop."""

    job: TrainJob
    notes: _Notes
    examiner: Examiner
    folder: Path
    patience: int

    def __call__(self, clip: Clip, step: int) -> bool:
        notes, earlier = self.notes, [check for check in self.notes.checks if check[0] < step]
        if self._is_over(earlier):  # killed after the check that said so
            return True
        score = average(self.examiner.examine(clip))
        is_best = score > max((before for _, before in earlier), default=-1.0)
        if is_best:
            save_clip(clip, self.folder)
        notes.checks = [*earlier, (step, score)]  # a resumed job comes by the same steps again
        notes.save()
        log(f"finetune: step {step:,} of {self.job.last_step:,}: held-out {score:.4f}{', the best' if is_best else ''}")
        return self._is_over(notes.checks)

    def _is_over(self, checks: Sequence[tuple[int, float]]) -> bool:
        return bool(checks) and sum(step > best_step(checks) for step, _ in checks) >= self.patience


def best_step(checks: Sequence[tuple[int, float]]) -> int:
    """Return the step with the highest score, the first one among equals.

    Examples:
        >>> best_step([(10, 0.5), (20, 0.7), (30, 0.7)])
        20
    """
    return max(checks, key=lambda check: (check[1], -check[0]))[0]


def _make_job(
    seed: Path,
    catalog: Catalog,
    rows: Int[np.ndarray, " n"],
    config: FinetuneConfig,
    folder: Path,
    selection: Selection,
) -> TrainJob:
    probability = read_probability(TrainConfig(probability=config.probability), catalog, rows)
    pairs = len(rows) if probability is None else int(probability.sum(dtype=np.float64))
    batch_size = max(2, min(config.batch_size, pairs))
    job = one_schedule(
        folder,
        catalog,
        config,
        name="finetune",
        model=seed,
        steps=config.epochs * (pairs // batch_size),
        batch_size=batch_size,
        mask=_mark(catalog, rows, config, selection),
        warmup_fraction=config.warmup_fraction,
        clip_grad_norm=GRADIENT_NORM,
        probability=config.probability,
        captions=config.captions,
        mask_same_captions=True,
        trainable=config.trainable,
    )
    return replace(job, catalog_fingerprint=f"{catalog.fingerprint}-{hash_file(weights_file(seed))}")


def _mark(catalog: Catalog, rows: Int[np.ndarray, " n"], config: FinetuneConfig, selection: Selection) -> str:
    """Mark the training rows in a column of the catalog, unless it is there, and return the column's name."""
    facts: dict[str, Any] = {
        "holdout": config.holdout,
        "holdout_fraction": config.holdout_fraction,
        "seed": config.seed,
    }
    if not selection.is_all:
        facts["selection"] = selection.facts(catalog)
    if config.captions is not None:
        facts["captions"] = [config.captions, catalog.facts(config.captions)]
    key = json.dumps([catalog.fingerprint, facts], sort_keys=True)
    column = f"finetune_{sha256(key.encode()).hexdigest()[:8]}"
    if column not in catalog.columns:
        marked = np.zeros(len(catalog), bool)
        marked[rows] = True
        catalog.add_columns({column: marked}, facts={"finetune": "rows that are trained on", **facts})
    return column


def _digest(job: TrainJob, config: FinetuneConfig, tasks: str | None) -> str:
    said = {key: value for key, value in asdict(config).items() if key not in {"engine", "threads"}}
    settings = {key: value for key, value in said.items() if LATER_FIELDS.get(key, ...) != value}
    general = Catalog.open(tasks).fingerprint if tasks else None
    content = json.dumps([FORMAT, job.digest, settings, general], sort_keys=True)
    return sha256(content.encode()).hexdigest()[:16]


# ---------------------------------------------------------------- the line between the start and the tuned model


def _sweep(
    seed: Path, tuned: Path, alphas: Sequence[float], examiners: Sequence[Examiner], notes: _Notes
) -> dict[float, dict[str, Bool[np.ndarray, " _"]]]:
    """Return by alpha and task whether each image is classified correctly; what the notes hold is not done again."""
    clip: Clip | None = None
    with progress("interpolate", len(alphas), "models") as advance:
        for alpha in alphas:
            if str(alpha) not in notes.found:
                clip = clip or load_clip(seed)
                interpolate_into(clip, seed, tuned, alpha)
                found = {task: one for examiner in examiners for task, one in examiner.examine(clip).items()}
                bits = {task: "".join("01"[int(hit)] for hit in one.hits) for task, one in found.items()}
                notes.found[str(alpha)] = bits
                notes.save()
            advance(1)
    return {
        alpha: {task: np.array([bit == "1" for bit in bits]) for task, bits in notes.found[str(alpha)].items()}
        for alpha in alphas
    }


def _make_result(
    model: str,
    job: TrainJob,
    split: Split,
    num_classes: int,
    config: FinetuneConfig,
    notes: _Notes,
    found: Mapping[float, Correct],
    out: Path,
    digest: str,
) -> FinetuneResult:
    own, *general = next(iter(found.values()))
    curve = curve_of(found)
    chosen = choose_alpha(curve, config.tolerance)
    lines = {own: [own]} | ({"general tasks": general} if len(general) > 1 else {}) | {task: [task] for task in general}
    return FinetuneResult(
        folder=str(out),
        model=model,
        digest=digest,
        alpha=chosen.alpha,
        num_train=len(split.train),
        num_held_out=len(split.held_out),
        num_duplicates=split.num_duplicates,
        num_classes=num_classes,
        batch_size=job.config.batch_size,
        steps=notes.checks[-1][0],
        planned_steps=job.last_step,
        best_step=best_step(notes.checks),
        tolerance=config.tolerance,
        checks=tuple(notes.checks),
        curve=curve,
        table=tuple(table_row(name, tasks, found, chosen.alpha) for name, tasks in lines.items()),
    )


def curve_of(found: Mapping[float, Correct]) -> tuple[AlphaPoint, ...]:
    """Return the accuracies along the line. The first task is the own set, the others are the general tasks."""
    own, *general = next(iter(found.values()))
    return tuple(
        AlphaPoint(
            alpha=alpha,
            own=average({own: correct[own]}),
            general=average({task: correct[task] for task in general}) if general else None,
        )
        for alpha, correct in found.items()
    )


def choose_alpha(curve: Sequence[AlphaPoint], tolerance: float) -> AlphaPoint:
    """Choose a point by the rule at the top of this module.

    Args:
        curve: The points; the first one is that of alpha 0.
        tolerance: How much lower than at alpha 0 the general tasks may be.

    Examples:
        >>> curve = [AlphaPoint(alpha=0.0, own=0.5, general=0.7), AlphaPoint(alpha=0.5, own=0.8, general=0.695)]
        >>> choose_alpha([*curve, AlphaPoint(alpha=1.0, own=0.9, general=0.6)], 0.01).alpha
        0.5
    """
    start = curve[0].general
    rounding = 1e-9
    allowed = [p for p in curve if start is None or p.general is None or p.general >= start - tolerance - rounding]
    return max(allowed, key=lambda point: (point.own, -point.alpha))


def _with_baselines(row: TableRow, tasks: Mapping[str, Task]) -> TableRow:
    """Return a line of the table with what a model would get that does not look at the images."""
    own = [tasks[row.name]] if row.name in tasks else list(tasks.values())[1:]
    known = [(task.majority, task.chance) for task in own if task.majority is not None and task.chance is not None]
    majority, chance = (sum(values) / len(known) for values in zip(*known, strict=True)) if known else (None, None)
    return replace(row, majority=majority, chance=chance)


def table_row(name: str, tasks: Sequence[str], found: Mapping[float, Correct], alpha: float) -> TableRow:
    """Return the line of one task, or of the mean over several.

    Args:
        name: Name of the line.
        tasks: Names of the tasks.
        found: Whether each image is classified correctly, by alpha and task.
        alpha: The alpha that was chosen.
    """
    before, tuned, after = ({task: found[place][task] for task in tasks} for place in (0.0, 1.0, alpha))
    return TableRow(
        name=name,
        num_images=sum(len(images) for images in before.values()),
        before=bootstrap_interval(before),
        tuned=bootstrap_interval(tuned),
        after=bootstrap_interval(after),
        change=paired_interval(after, before),
    )
