"""Distil a mixture, or any CLIP, into one dense CLIP that costs as much as the student alone.

The teacher is a bundle (its experts, weighed for each caption as `MoDE.task` weighs them for a query, or for each image
where the clusters are of images), a CLIP-MoE, or any CLIP. It is run once over the pairs. Its unit vectors of the plain
pictures and captions, and its experts' weights, are columns of the catalog. Their name is a hash of what decides them
(weights, routing, precision, captions, selection), so another student of the same teacher runs no teacher. Pairs that
are not selected are not run, and vectors of all pairs serve every selection.

Then the student is trained as any model is, with a loss that compares it with these columns
(`modeclip.training.objectives.distillation`, which has the losses). The student may be random, pretrained, or a folder.

Vectors are kept with 16 bits: ``benchmarks/distillation.py`` prints by how much that changes losses and gradients.

Source: MobileCLIP (arXiv 2311.17049) for vectors that are stored instead of teachers that run; here they are of the
plain picture alone, and the student's pictures are augmented.
Price: a forward pass of each expert over all pairs, once, less what experts share with their seed; 4 K (D + 1) bytes of
disk a pair for K experts with D dimensions; in memory what a fragment of the catalog has of that. Training costs as
much as that of any student.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from modeclip.adapting.merging import find_model
from modeclip.adapting.schedule import losses_of_job, one_schedule
from modeclip.data.catalog import Catalog
from modeclip.data.mapping import IMAGES_AT_ONCE, POSITION, Work, map_columns
from modeclip.data.selection import ALL, Selection
from modeclip.data.storage import missing_fragments
from modeclip.errors import ModeclipError, check_above_zero, check_between, check_least
from modeclip.mixture.bundle import load_bundle
from modeclip.mixture.manifest import MANIFEST_FILE
from modeclip.mixture.mode import MoDE
from modeclip.models.clip import (
    CONFIG_FILE,
    Clip,
    check_model,
    computing,
    load_clip,
    resolve_precision,
)
from modeclip.models.pool import ModelPool, ModelRef
from modeclip.models.settings import check_clip_folder
from modeclip.models.trunk import share
from modeclip.system.console import log
from modeclip.system.files import read_json, write_json
from modeclip.system.paths import expand_homes, home_path, is_url
from modeclip.training.batches import job_rows
from modeclip.training.experts import hash_pairs
from modeclip.training.jobs import (
    MOST_PROCESSES,
    AugmentConfig,
    EngineConfig,
    TrainJob,
    TrainResult,
    check_free,
    prepare,
)
from modeclip.training.objectives import losses_of
from modeclip.training.objectives.objective import COMPARE_VECTORS, DISTILLING, check_dimensions, teacher_columns
from modeclip.training.trainer import train

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from modeclip.models.blocks import Tower

RESULT_FILE = "distillation.json"
"""What a distillation leaves beside the student's files, written last."""
FORMAT = 1
"""Part of the columns' names; raised when the same settings start to give other vectors."""
BATCH = 128
"""Pictures or captions that a teacher sees at a time."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """How a student is taught."""

    loss: str = "reinforced"
    """What it learns from its teacher: ``reinforced`` (softmaxes of the experts, averaged after the softmax and weighed
    by the routing), ``affinity``, ``kl``, ``icl``, ``mse``, ``clip-kd``, or a sum of these and ``clip``, with numbers
    before names: ``clip+0.5*affinity``."""
    rule: str | None = None
    """How a bundle weighs its experts for each caption: paper, eq6, release, uniform (an ensemble), coarse, top1, share
    or per_class. None: as the bundle says."""
    temperature: float | None = None
    """Temperature of that rule, above 0. None: the bundle's, or the rule's own."""
    captions: str | None = None
    """Column of texts that stand in the place of the captions where it has one, for teacher and student."""
    samples: int = 245_760
    """Pairs that the student sees, each as often as it is seen."""
    batch_size: int = 256
    """Pairs in a step, or all pairs if there are fewer; a student learns from the similarities within a batch."""
    learning_rate: float | None = None
    """Highest learning rate. None: 1e-3 for random weights, 1e-5 for trained ones."""
    warmup_fraction: float = 0.04
    """Share of the steps in which the rate rises, in [0, 1)."""
    weight_decay: float = 0.2
    """AdamW's decay of matrices."""
    clip_grad_norm: float = 0.0
    """Largest norm of the gradient; 0 sets no limit."""
    mask_same_captions: bool = False
    """Do not count pairs with the same caption as each other's negatives, in the ``clip`` of a sum."""
    threads: int = 0
    """Threads that compute; 0: as many as PyTorch takes on this machine."""
    seed: int = 0
    """Seed of random weights, of the order of the samples and of their augmentation."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """How the student's pictures are varied; the teacher has seen them as they are."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """How the machine is used."""

    def __post_init__(self) -> None:
        """Check what ``TrainConfig`` does not check, or too late."""
        if losses_of(self.loss).keys().isdisjoint(DISTILLING):
            raise ModeclipError(
                f"distill.loss {self.loss} has no teacher; expected at least one of {', '.join(DISTILLING)} in it; "
                "modeclip train trains without a teacher"
            )
        check_least("distill", self, batch_size=2, weight_decay=0, clip_grad_norm=0, seed=0)
        check_least("distill", self, samples=2 * self.batch_size)
        check_between("distill", self, threads=(0, MOST_PROCESSES))
        check_above_zero("distill", self, "learning_rate")
        check_above_zero("distill", self, "temperature")
        if not 0 <= self.warmup_fraction < 1:
            raise ModeclipError(f"distill.warmup_fraction must lie in [0, 1), got {self.warmup_fraction}")


@dataclass(frozen=True, kw_only=True)
class Taught:
    """The vectors of a teacher, in a catalog."""

    columns: str
    """Name of the columns, before ``_images``, ``_texts`` and ``_weights``: ``train.teacher`` of any training."""
    models: int
    """Models whose vectors they hold, K."""
    dimension: int
    """Dimensions of each model's vectors, D."""
    bytes_per_pair: int
    """What a pair takes on disk."""
    computed: int
    """Pairs that the teacher was run over now; the vectors of the others were there, or nobody selected them."""
    seconds: float
    """Time that this took."""


@dataclass(frozen=True, kw_only=True)
class Distilled:
    """What ``distillation.json`` holds."""

    folder: str
    """The student's folder."""
    teacher: str
    """Bundle or model that taught it."""
    student: str
    """Model that it started from."""
    digest: str
    """Digest of the training, which covers the teacher."""
    loss: str
    """What it has learned from its teacher."""
    vectors: Taught
    """The teacher's vectors."""
    num_pairs: int
    """Pairs that were selected."""
    samples: int
    """Pairs that the student has seen, each as often as it was seen."""
    seconds: float
    """Wall time of the last run of the training."""
    first_loss: float
    """Loss that was logged first."""
    last_loss: float
    """Loss that was logged last."""


def distill(
    teacher: str | Path,
    catalog: Catalog,
    config: DistillConfig,
    *,
    student: str | Path,
    out: str | Path,
    selection: Selection = ALL,
    encoder: str | None = None,
    ray: bool = False,
) -> Distilled:
    """Teach a student and write it to a folder; a killed call goes on.

    Args:
        teacher: A bundle, or any model: a CLIP-MoE, ``BUNDLE#expert-1``, ``NAME@TAG``...
        catalog: Pairs; columns with the teacher's vectors are added, unless they are there.
        config: How.
        student: Model that is trained, as `load_clip` takes it; a name alone has random weights.
        out: Folder of the student.
        selection: Pairs that are used.
        encoder: Encoder that the bundle's captions are routed with, in place of the one that it names.
        ray: Run the teacher on Ray, as for `map_columns`.

    Raises:
        ModeclipError: A model is unknown, a loss does not fit their dimensions, there are too few pairs, or the folder
            holds a model that was trained with other settings.
    """
    job, work = plan_distillation(
        teacher, catalog, config, student=student, out=out, selection=selection, encoder=encoder
    )
    if done := _read_result(job):
        log(f"distill: {job.folder} is done")
        return done
    vectors = teach(catalog, work, ray=ray)
    result = train(job, resume="latest")
    losses = losses_of_job(job)
    distilled = Distilled(
        folder=job.folder,
        teacher=str(teacher),
        student=job.config.model,
        digest=job.digest,
        loss=config.loss,
        vectors=vectors,
        num_pairs=result.rows,
        samples=result.samples,
        seconds=result.seconds,
        first_loss=losses[0],
        last_loss=losses[-1],
    )
    write_json(Path(job.folder) / RESULT_FILE, asdict(distilled))
    return distilled


def plan_distillation(
    teacher: str | Path,
    catalog: Catalog,
    config: DistillConfig,
    *,
    student: str | Path,
    out: str | Path,
    selection: Selection = ALL,
    encoder: str | None = None,
) -> tuple[TrainJob, TeacherWork]:
    """Return the training of a student, and the work of its teacher that comes before it (`teach`).

    Nothing is written. Arguments and errors are those of `distill`.
    """
    place, start = home_path(out).resolve(), _find_student(expand_homes(str(student)))
    asked = Teacher(
        source=expand_homes(str(teacher)), rule=config.rule, temperature=config.temperature, encoder=encoder
    )
    for one in (asked.source, start):
        if Path(one.removeprefix("local-dir:")).resolve() == place:
            raise ModeclipError(f"distill: {one} is also the folder to write to; choose another --out")
    work = TeacherWork.of(asked, catalog, config, selection)
    if wrong := COMPARE_VECTORS & losses_of(config.loss).keys():
        check_dimensions(dict.fromkeys(sorted(wrong), 1.0), _dimension_of(start), _dimension_of(asked.refs[0].spec))
    job = _make_job(start, work.stem, catalog, config, place, selection)
    job_rows(job, catalog)  # what cannot be trained on is told before the teacher runs
    job = replace(job, pairs=hash_pairs(job, catalog))
    check_free(job)
    prepare(job)
    return job, work


def _read_result(job: TrainJob) -> Distilled | None:
    """Return the result of a finished job, if it is there."""
    path = Path(job.folder) / RESULT_FILE
    if TrainResult.read(job) is None or not path.is_file():
        return None
    found = read_json(path, Distilled, "remove it, and give the command again")
    return found if found.digest == job.digest else None


def _find_student(spec: str) -> str:
    """Return the specification of a student: anything that a training starts from, or a model of a bundle."""
    if not (Path(spec) / MANIFEST_FILE).is_file() and ("#" not in spec or Path(spec).exists()):
        check_model(spec)
        return spec
    return find_model(spec, "distill --student")


def _dimension_of(spec: str | Path) -> int:
    """Return the dimensions of a model's vectors."""
    folder = Path(str(spec).removeprefix("local-dir:"))
    config = check_clip_folder(folder) if (folder / CONFIG_FILE).is_file() else load_clip(spec, seed=0).config
    return int(config["model_cfg"]["embed_dim"])


def _make_job(
    student: str, columns: str, catalog: Catalog, config: DistillConfig, out: Path, selection: Selection
) -> TrainJob:
    batch_size = max(2, min(config.batch_size, len(selection.rows(catalog))))
    return one_schedule(
        out,
        catalog,
        config,
        name="distill",
        model=student,
        steps=config.samples // batch_size,
        batch_size=batch_size,
        selection=selection,
        warmup_fraction=config.warmup_fraction,
        clip_grad_norm=config.clip_grad_norm,
        loss=config.loss,
        teacher=columns,
        captions=config.captions,
        mask_same_captions=config.mask_same_captions,
    )


# ---------------------------------------------------------------- the teacher and its vectors


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """Who teaches: the experts of a bundle, weighed by its router, or one model."""

    source: str
    """Folder of a bundle, or the specification of a model."""
    rule: str | None = None
    """Rule of the routing; None: the bundle's."""
    temperature: float | None = None
    """Its temperature; None: the bundle's, or the rule's own."""
    encoder: str | None = None
    """Encoder of the captions that the user named in place of the bundle's."""

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process needs to open it, without what this one has opened."""
        return asdict(self)

    @cached_property
    def mode(self) -> MoDE | None:
        """The mixture; None for one model."""
        if (Path(self.source) / MANIFEST_FILE).is_file():
            return MoDE(load_bundle(self.source, encoder=self.encoder))
        if (self.rule, self.temperature, self.encoder) != (None, None, None):
            raise ModeclipError(
                f"distill: --rule, --temperature and --encoder are for a bundle, {self.source} is one model; leave them"
                " out"
            )
        return None

    @cached_property
    def refs(self) -> tuple[ModelRef, ...]:
        """The models, in the order of the weights."""
        if self.mode is not None:
            return self.mode.bundle.models
        return (ModelRef.of(self.source, find_model(self.source, "distill")),)

    @property
    def weighs_images(self) -> bool:
        """Whether every image has weights of its own, and no caption has."""
        return self.mode is not None and self.mode.per_image

    def identity(self) -> dict[str, Any]:
        """Return what decides vectors and weights, as JSON."""
        routing = None
        if self.mode is not None:
            request, bundle = self.mode.request(rule=self.rule, temperature=self.temperature), self.mode.bundle
            routing = {"clusters": bundle.clustering, "encoder": bundle.encoder, **asdict(request)}
        return {"models": [ref.digest for ref in self.refs], "routing": routing}

    def weigh(self, captions: Sequence[str], pictures: Sequence[Image]) -> Float[np.ndarray, "n K"]:
        """Return the weight of each model for each pair."""
        if self.mode is None:
            return np.ones((len(captions), 1))
        if self.weighs_images:
            return self.mode.route_images(pictures, rule=self.rule, temperature=self.temperature)
        return self.mode.route_queries(captions, rule=self.rule, temperature=self.temperature)


@dataclass(kw_only=True)
class TeacherWork(Work):
    """Encodes pairs with a teacher; every process opens the teacher itself."""

    teacher: Teacher
    """Who teaches."""
    catalog: str
    """Path of the catalog."""
    captions: str | None
    """Column of texts in the place of captions."""
    precision: str
    """Precision of the models, as `resolve_precision` returns it."""
    selected: bytes | None
    """Whether each row is encoded, a bit each; None: all are. The others get zeros."""
    stem: str
    """Name of the columns, before ``_images`` and so on: a hash of what decides them."""
    facts: dict[str, Any]
    """That, and once the models are loaded their ``scales`` and ``dimension``, and whether it ``weighs_images``."""
    inputs = (POSITION,)
    unit = "pairs"

    @classmethod
    def of(cls, teacher: Teacher, catalog: Catalog, config: DistillConfig, selection: Selection) -> TeacherWork:
        """Return the work that makes a teacher's columns for selected pairs.

        Where they are not there, but those of all pairs are, it is these.
        """
        precision = resolve_precision(config.engine.precision)
        instead = None if config.captions is None else [config.captions, catalog.facts(config.captions)]
        facts = {"format": FORMAT, **teacher.identity(), "precision": precision, "captions": instead, "selection": {}}
        whole = cls(
            teacher=teacher,
            catalog=catalog.path,
            captions=config.captions,
            precision=precision,
            selected=None,
            stem=_stem(facts),
            facts=facts,
        )
        if selection.is_all:
            return whole
        facts = {**facts, "selection": selection.facts(catalog)}
        bits = np.packbits(selection.mask_of(catalog)).tobytes()
        part = replace(whole, facts=facts, stem=_stem(facts), selected=bits)
        return whole if whole.is_done(catalog) and not part.is_done(catalog) else part

    @property
    def outputs(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the columns."""
        return teacher_columns(self.stem)

    def is_done(self, catalog: Catalog) -> bool:
        """Tell whether a catalog has these columns, for all of its rows."""
        present = all(name in catalog.columns and name not in catalog.damaged for name in self.outputs)
        return present and not missing_fragments(catalog.dataset, self.outputs)

    def __call__(self, block: dict[str, Shaped[np.ndarray, "n *_"]]) -> dict[str, Shaped[np.ndarray, "n *_"]]:
        """Return vectors and weights of a fragment's pairs."""
        rows: Int[np.ndarray, " n"] = block[POSITION]
        chosen = np.arange(len(rows)) if self.selected is None else np.flatnonzero(_bits(self.selected, rows))
        catalog, kinds = Catalog.open(self.catalog), (np.float16, np.float16, np.float32)
        found: dict[str, np.ndarray] = {}
        for start in range(0, max(1, len(chosen)), IMAGES_AT_ONCE):
            places = chosen[start : start + IMAGES_AT_ONCE]
            some = rows[places] if len(places) else rows[:1]  # where none is selected, one tells the shapes
            for name, values, kind in zip(self.outputs, self._encode(catalog, some), kinds, strict=True):
                found.setdefault(name, np.zeros((len(rows), values.shape[1]), kind))[places] = values[: len(places)]
        return found

    def _encode(
        self, catalog: Catalog, rows: Int[np.ndarray, " n"]
    ) -> tuple[Float[np.ndarray, "n KD"], Float[np.ndarray, "n KD"], Float[np.ndarray, "n K"]]:
        """Return the vectors of some rows' pictures and captions by each model, side by side, and the weights."""
        teacher, pool = _opened(self.teacher, self.stem)
        pictures = catalog.images(rows)
        captions = [caption or "" for caption in catalog.captions(rows, self.captions)]
        vectors: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for clips in pool.groups(teacher.refs):
            found = encode_pairs(list(clips.values()), pictures, captions, self.precision)
            vectors |= dict(zip(clips, found, strict=True))
        images, texts = (np.hstack([vectors[ref.digest][side] for ref in teacher.refs]) for side in (0, 1))
        return images, texts, teacher.weigh(captions, pictures)


def _stem(facts: dict[str, Any]) -> str:
    return f"teacher_{sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]}"


def _bits(packed: bytes, rows: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """Return the bits of ascending rows."""
    whole = np.unpackbits(np.frombuffer(packed, np.uint8)[int(rows[0]) // 8 : int(rows[-1]) // 8 + 1])
    chosen: np.ndarray = whole[rows - int(rows[0]) // 8 * 8].astype(bool)
    return chosen


@lru_cache(maxsize=1)
def _opened(teacher: Teacher, stem: str) -> tuple[Teacher, ModelPool]:
    """Return this process's own copy of a teacher, and the pool of its models, until the cache is cleared."""
    del stem  # a folder of the same name may hold another model now
    return replace(teacher), ModelPool(device="auto")


def encode_pairs(
    clips: Sequence[Clip], pictures: Sequence[Image], captions: Sequence[str], precision: str
) -> list[tuple[Float[np.ndarray, "n D"], Float[np.ndarray, "n D"]]]:
    """Return the unit vectors of pictures and captions by each model; captions of similar length go together.

    Args:
        clips: Models with one tokenizer and one preprocessing, on one device; what they share runs once.
        pictures: N pictures.
        captions: N captions.
        precision: Precision of the models, as `resolve_precision` returns it.
    """
    distinct, caption_of_row = np.unique(np.array(captions, object), return_inverse=True)
    order = np.argsort([len(caption) for caption in distinct], kind="stable")
    starts = {"image": range(0, len(pictures), BATCH), "text": range(0, len(order), BATCH)}
    with computing(clips[0], precision) as device:
        images = _encode(
            clips, "image", (clips[0].images(pictures[at : at + BATCH]).to(device) for at in starts["image"])
        )
        texts = _encode(
            clips,
            "text",
            (clips[0].tokens(distinct[order[at : at + BATCH]].tolist()).to(device) for at in starts["text"]),
        )
    back = np.argsort(order)[caption_of_row]
    return [(image, text[back]) for image, text in zip(images, texts, strict=True)]


def _encode(clips: Sequence[Clip], tower: Tower, batches: Iterable[Tensor]) -> list[Float[np.ndarray, "n D"]]:
    """Return the unit vectors of batches by each model."""
    import torch

    parts: list[list[Tensor]] = [[] for _ in clips]
    groups = share([clip.model for clip in clips], tower)
    for batch in batches:
        for group in groups:
            state = group.trunk(batch)
            for index, head in zip(group.members, group.heads, strict=True):
                parts[index].append(head(state).float())
    return [torch.nn.functional.normalize(torch.cat(own), dim=-1).cpu().numpy() for own in parts]


def teach(catalog: Catalog, work: TeacherWork, *, ray: bool = False) -> Taught:
    """Run a teacher over the pairs of a catalog that lack its vectors.

    Args:
        catalog: Pairs; columns are added.
        work: As `TeacherWork.of` returns it.
        ray: As for `map_columns`.

    Raises:
        ModeclipError: The disk has no room, a model cannot be loaded, or a picture cannot be read.
    """
    began, computed = time.monotonic(), 0
    if work.is_done(catalog):
        log(f"teacher: its vectors are there already ({work.stem})")
    else:
        try:
            computed = map_columns(catalog, _described(work, catalog), "run the teacher", ray=ray)
            if work.selected is not None:
                computed = min(computed, int(np.unpackbits(np.frombuffer(work.selected, np.uint8)).sum()))
        finally:
            _opened.cache_clear()  # the student needs the memory
    facts: dict[str, Any] = catalog.facts(work.outputs[0]) or {}
    models, dimension = len(facts["scales"]), int(facts["dimension"])
    return Taught(
        columns=work.stem,
        models=models,
        dimension=dimension,
        bytes_per_pair=_bytes_per_pair(models, dimension),
        computed=computed,
        seconds=time.monotonic() - began,
    )


def _described(work: TeacherWork, catalog: Catalog) -> TeacherWork:
    """Return the work with facts that only the loaded models tell; check that the disk has room for their vectors."""
    teacher, pool = _opened(work.teacher, work.stem)
    scales = [float(pool.get(ref).model.logit_scale.detach().exp()) for ref in teacher.refs]
    dimension = int(pool.get(teacher.refs[0]).config["model_cfg"]["embed_dim"])
    if not is_url(catalog.path):
        needed, free = _bytes_per_pair(len(scales), dimension) * len(catalog), shutil.disk_usage(catalog.path).free
        if needed > free:
            raise ModeclipError(
                f"distill: the teacher's vectors need {needed / 1e9:,.1f} GB beside {catalog.path}, which has "
                f"{free / 1e9:,.1f} GB; free some space"
            )
    found = {"scales": scales, "dimension": dimension, "weighs_images": teacher.weighs_images}
    return replace(work, facts=work.facts | found)


def _bytes_per_pair(models: int, dimension: int) -> int:
    """Return what a pair takes: two vectors of 16-bit numbers and a 32-bit weight for each model."""
    return models * (2 * 2 * dimension + 4)
