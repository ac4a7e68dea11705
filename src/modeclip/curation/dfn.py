"""DFN: a filter CLIP scores every pair, and the top fraction is kept.

The filter is any CLIP, or one that is trained here on pairs that the user marks clean; clean data make the filter, not
a large model. It embeds every pair once. The vectors are kept beside the catalog, so that another score, fraction or
threshold costs no look at an image. `modeclip.curation.scores` has the scores.

Several scores in a row, such as ``sclip+normsim``, each keep a fraction of what the one before has kept. With a soft
cap nothing is dropped: each pair gets a probability, with which every pass of training draws it.

Source: DFN (arXiv 2309.17425): a filter of clean pairs, the cosine, the top 15 %. arXiv 2405.19547: s-CLIPLoss, then
NormSim. M-FLYT: soft cap sampling. JEST (arXiv 2406.17711): learnability.
Price: one forward pass of the filter over images and captions, and 4 D bytes of disk a pair. Memory: 16 bytes a pair
for scores, and what `modeclip.curation.scores` says.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float, Float16, Shaped, UInt8

from modeclip.clustering.embedding import CACHED_CAPTIONS, CaptionCache
from modeclip.curation.method import Context, Decided, Histogram, Prepared, Table
from modeclip.curation.scores import (
    BATCH,
    PARTITIONS,
    TAU,
    Norm,
    cosine,
    normsim,
    partition_count,
    sclip_of_partition,
    soft_cap,
    threshold_of,
)
from modeclip.data.catalog import Catalog
from modeclip.data.mapping import IMAGE, FragmentRows, Statistic, concatenate, map_fragments
from modeclip.data.selection import Selection
from modeclip.data.storage import Ledger
from modeclip.data.tasks.open import load_tasks
from modeclip.data.tasks.task import CatalogImages, Images
from modeclip.errors import ModeclipError, check_above_zero, check_between, check_least, unknown
from modeclip.models.clip import CONFIG_FILE, check_model, imagenet_words, load_clip
from modeclip.models.encoders import BATCH_SIZE
from modeclip.models.encoders.images import ClipBothEncoder
from modeclip.models.pool import ModelRef
from modeclip.system.console import log, progress
from modeclip.system.paths import home, is_url
from modeclip.training.choosing import with_model
from modeclip.training.experts import fingerprint_of, pin_jobs
from modeclip.training.jobs import JOB_FILE, MOST_PROCESSES, TrainConfig, TrainJob, TrainResult, brings_weights, prepare
from modeclip.training.launching import run_jobs

SCORES = ("cosine", "sclip", "normsim", "learnability")
"""What pairs can be scored by."""
FRACTION = 0.15
"""Share of the pairs that one score keeps by default (DFN)."""
FILTERS = ".filters"
"""Suffix of the folder beside a catalog in which filters are trained, each in a folder named by its digest."""
TARGETS_AT_ONCE = 256
"""Images of target tasks that are in memory at a time."""
QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)
TOP_SHARES = (0.01, 0.1, 0.5)
BINS = 60


@dataclass(frozen=True, kw_only=True)
class DfnConfig:
    """Keep the pairs that a filter CLIP scores highest (DFN)."""

    method: ClassVar[str] = "dfn"

    filter: str | None = None
    """The filter: any CLIP with weights, such as ViT-B-32@openai, a model folder, or the folder of a finished job."""
    clean: str | None = None
    """Train the filter on these pairs: a condition such as a column of booleans, COLUMN:FRACTION for the top of a
    column of scores, or the path of another catalog. How it is trained, the options of
    `modeclip train` say: --model, --samples, --seed..."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How the filter is trained; its seed also decides the random batches of s-CLIPLoss."""
    threads: int = 1
    """Threads that train the filter."""
    random_weights: bool = False
    """Let a filter have random weights where its name says no others."""
    score: str = "cosine"
    """cosine (DFN), sclip (s-CLIPLoss), normsim (NormSim), learnability (JEST), or several, each of which chooses from
    what the one before has kept: sclip+normsim."""
    fraction: tuple[float, ...] = ()
    """Share of the pairs that each score keeps, in (0, 1]; by default 0.15 (DFN) for a single one."""
    threshold: tuple[float, ...] = ()
    """Least score that is kept, for each score, in place of a fraction."""
    soft_cap: int | None = None
    """Drop nothing and give each pair a probability: that of being among this many draws of soft cap sampling (as many
    as there will be training samples), with the most frequent pair at 1."""
    targets: tuple[str, ...] = ()
    """Target tasks of NormSim, named as modeclip evaluate names tasks; their training images are compared with. Of a
    catalog, the rows that are named: CATALOG#split=train."""
    norm: Norm = "2"
    """Norm of NormSim: 2, or inf for the nearest training image."""
    learner: str | None = None
    """Learner of learnability, a CLIP as for filter, which is the reference then."""
    tau: float = TAU
    """Temperature of s-CLIPLoss, learnability and the soft cap, above 0 (arXiv 2405.19547: 0.01, and 0.07 for the
    public filter of DFN)."""
    contrast: int = BATCH
    """Pairs in a batch of s-CLIPLoss, 2 or more; all pairs if they are fewer."""
    partitions: int = PARTITIONS
    """Random partitions into such batches that s-CLIPLoss is averaged over, 1 or more."""

    def __post_init__(self) -> None:
        """Check names and ranges."""
        if (self.filter is None) == (self.clean is None):
            raise ModeclipError(
                "dfn: expected either dfn.filter (a CLIP, such as ViT-B-32@openai or a model folder) or dfn.clean "
                f"(pairs to train one on), got {'neither' if self.filter is None else 'both'}"
            )
        for name in self.scores:
            if name not in SCORES:
                raise unknown("dfn.score", name, (*SCORES, "sclip+normsim"))
        fractions, thresholds, count = self.fraction, self.threshold, len(self.scores)
        if len(set(self.scores)) < count:
            raise ModeclipError(f"dfn.score: expected each score once, got {self.score}")
        if (self.soft_cap is not None) + bool(fractions) + bool(thresholds) > 1:
            raise ModeclipError("dfn: expected one of dfn.fraction, dfn.threshold and dfn.soft_cap, got several")
        if self.soft_cap is not None and count > 1:
            raise ModeclipError(f"dfn.soft_cap: expected a single dfn.score, got {self.score}")
        if self.soft_cap is None and len(fractions or thresholds or (FRACTION,)) != count:
            raise ModeclipError(
                f"dfn.{'threshold' if thresholds else 'fraction'}: expected {count} numbers, one for each score of "
                f"{self.score}, got {len(fractions or thresholds)}"
            )
        for fraction in fractions:
            if not 0 < fraction <= 1:
                raise ModeclipError(f"dfn.fraction: expected shares in (0, 1], got {fraction}")
        for threshold in thresholds:
            if not math.isfinite(threshold):
                raise ModeclipError(f"dfn.threshold: expected a finite number, got {threshold}")
        for score, option, value in (
            ("normsim", "targets", self.targets),
            ("learnability", "learner", self.learner),
        ):
            if (score in self.scores) != bool(value):
                raise ModeclipError(
                    f"dfn.{option}: the score {score} needs it"
                    if score in self.scores
                    else f"dfn.{option}: only the score {score} uses it, got dfn.score {self.score}"
                )
        check_above_zero("dfn", self, "tau")
        check_least("dfn", self, soft_cap=1, contrast=2, partitions=1)
        check_between("dfn", self, threads=(1, MOST_PROCESSES))

    @property
    def scores(self) -> tuple[str, ...]:
        """The scores in their order."""
        return tuple(name.strip() for name in self.score.split("+"))

    def prepare(self, context: Context) -> Prepared:
        """Train the filter if it is to be trained, embed the pairs, score them, and decide.

        Raises:
            ModeclipError: The filter, the clean pairs or the targets cannot be used.
        """
        models = [model for model in (self.filter, self.learner) if model is not None]
        for model in models:
            self._check_weights(model)
        targets = self._open_targets()
        reference = self._train(context) if self.filter is None else home(self.filter)
        try:
            vectors = _Embedded.of(context, reference, self._seed)
            scores = {name: self._score(name, context, vectors, targets) for name in self.scores}
        finally:
            _encoder.cache_clear()  # the stages that follow need the memory
        return self._decide(context, vectors.digest, scores)

    @property
    def _seed(self) -> int | None:
        """Seed of random weights; None where a filter must have others."""
        return self.train.seed if self.random_weights else None

    def _check_weights(self, model: str) -> None:
        """Raise for what is no model with weights."""
        spec = home(model)
        if not brings_weights(spec) and not self.random_weights:
            check_model(spec)  # an unknown name has its own message
            raise ModeclipError(
                f"dfn: model {model} names no weights, so its scores would be random; write {model}@TAG, {model}@FILE "
                "or the path of a model folder (dfn.random_weights takes it all the same)"
            )
        folder = Path(spec.removeprefix("local-dir:"))
        if (folder / JOB_FILE).is_file():
            job = replace(TrainJob.load(folder / JOB_FILE), folder=str(folder))
            if TrainResult.read(job) is None:
                raise ModeclipError(
                    f"dfn: the job in {folder} is not finished; train it first: modeclip train {folder / JOB_FILE}"
                )
        check_model(spec, random_weights=self.random_weights)

    def _open_targets(self) -> list[Images]:
        """Return the training images of the target tasks."""
        if not self.targets:
            return []
        found = []
        for task in load_tasks(self.targets, train=True, imagenet=imagenet_words):
            images = task.images if task.train is None else task.train.images
            if task.train is None and not _is_for_training(images):
                raise ModeclipError(
                    f"dfn.targets: task {task.name!r} has no training split, and NormSim never looks at test images; "
                    "expected a folder train beside test, or CATALOG#COLUMN=VALUE with rows of training images"
                )
            found.append(images)
        return found

    def _train(self, context: Context) -> str:
        """Train the filter on the clean pairs, unless that is done, and return its folder."""
        if is_url(context.catalog.path):
            raise ModeclipError(
                f"dfn.clean: the filter goes beside the catalog, which must therefore be on this machine, got "
                f"{context.catalog.path!r}; train it with modeclip train and give its folder as dfn.filter"
            )
        try:
            catalog, selection = self._clean_pairs(context.catalog)
            size, batch = int(selection.mask_of(catalog).sum()), self.train.batch_size
        except ModeclipError as error:
            reason = str(error).removeprefix(f"--where {self.clean!r}: ")
            raise type(error)(f"dfn.clean {self.clean!r}: {reason}") from error
        if size < batch:
            raise ModeclipError(
                f"dfn.clean: {self.clean} marks {size:,} pairs, fewer than one batch of {batch:,}; mark more, or set "
                f"train.batch_size to at most {size:,}"
            )
        train = with_model(self.train, catalog.path)
        job = TrainJob(
            name="filter",
            folder="",
            catalog=catalog.path,
            catalog_fingerprint=fingerprint_of(catalog, None, train.model),
            config=train.decided(),
            first_step=0,
            last_step=train.total_parts * train.steps_per_part,
            first_share=0.0,
            last_share=1.0,
            selection=selection,
            threads=self.threads,
        )
        (job,) = pin_jobs([job], catalog)
        folder = Path(context.catalog.path).resolve().with_suffix(FILTERS) / job.digest
        job = replace(job, folder=str(folder))
        prepare(job)
        if TrainResult.read(job) is None:
            log(f"train the filter on {size:,} clean pairs: {folder}")
        run_jobs([job], 1, ray=context.ray)
        return str(folder)

    def _clean_pairs(self, catalog: Catalog) -> tuple[Catalog, Selection]:
        """Return where the clean pairs are, and which they are."""
        clean = home(str(self.clean))
        if clean not in catalog.columns and (is_url(clean) or Path(clean).exists()):
            return Catalog.open(clean), Selection()
        column, _, share = clean.rpartition(":")
        if column not in catalog.columns:
            return catalog, Selection(where=(clean,))
        try:
            fraction, values = float(share), catalog.read([column])[column].astype(np.float64)
        except ValueError:
            raise ModeclipError(
                f"expected COLUMN:FRACTION with a column and a share of numbers, got {share!r}"
            ) from None
        if not 0 < fraction <= 1:
            raise ModeclipError(f"expected a share in (0, 1], got {share}")
        values = values[np.isfinite(values)]
        least = threshold_of(values, fraction) if len(values) else 0.0
        return catalog, Selection(where=(f"`{column}` >= {least!r}",))

    def _score(
        self, name: str, context: Context, vectors: _Embedded, targets: Sequence[Images]
    ) -> Float[np.ndarray, " n"]:
        """Return one score of each selected pair."""
        if name == "cosine":
            return cosine(vectors.images, vectors.texts)
        if name == "sclip":
            return self._sclip(context, vectors)
        if name == "normsim":
            return normsim(vectors.images, np.concatenate([vectors.embed(images) for images in targets]), self.norm)
        learner = _Embedded.of(context, home(str(self.learner)), self._seed)
        difference = self._sclip(context, vectors) - self._sclip(context, learner)
        return np.asarray(difference / np.float32(self.tau))

    def _sclip(self, context: Context, vectors: _Embedded) -> Float[np.ndarray, " n"]:
        """Return s-CLIPLoss of each selected pair; each partition is kept beside the catalog when it is done."""
        count = len(vectors.images)
        number, total = partition_count(count, self.contrast, self.partitions), np.zeros(count)
        settings: dict[str, Any] = {"tau": self.tau, "batch_size": self.contrast, "seed": self.train.seed}
        for partition in range(number):

            def compute(partition: int = partition) -> np.ndarray:
                with progress(f"s-CLIPLoss, partition {partition + 1} of {number}", count, "pairs") as advance:
                    return sclip_of_partition(vectors.images, vectors.texts, partition, **settings, advance=advance)

            total += _kept_beside(context.catalog, ["sclip", vectors.digest, settings, partition], compute)
        return np.asarray((total / number).astype(np.float32))

    def _decide(self, context: Context, digest: str, scores: dict[str, Float[np.ndarray, " n"]]) -> Prepared:
        """Return what becomes of each pair by its scores."""
        name, first = context.name, scores[self.scores[0]]
        columns: dict[str, np.ndarray] = {f"{name}_score": first}
        columns |= {f"{name}_{score}": scores[score] for score in self.scores[1:]}
        cause = np.zeros(len(first), np.uint8)
        limits: dict[str, float] = {}
        if self.soft_cap is None:
            for number, score in enumerate(self.scores):
                passed = cause == 0
                if not passed.any():
                    break
                if self.threshold:
                    limits[score] = self.threshold[number]
                else:
                    limits[score] = threshold_of(scores[score][passed], (self.fraction or (FRACTION,))[number])
                cause[passed & (scores[score] < limits[score])] = number + 1
            causes = tuple(f"{score} below {limits.get(score, math.nan):.4g}" for score in self.scores)
            tables: tuple[Table, ...] = ()
            weights = (cause == 0).astype(np.float64)
        else:
            # a loss is a logit already; the others are cosines
            logits = first if self.score == "learnability" else first / np.float32(self.tau)
            draws = soft_cap(logits, self.soft_cap)
            weights = draws / draws.max()
            columns[f"{name}_probability"] = weights.astype(np.float32)
            cause[columns[f"{name}_probability"] == 0] = 1
            causes, tables = ("never drawn",), (_table_of_draws(draws, first),)
        columns = {f"{name}_cause": cause, **columns}
        content = hashlib.blake2b(digest_size=16)
        for column, values in columns.items():
            content.update(column.encode() + values.tobytes())
        return Prepared(
            work=Decided(
                values={column: _spread(values, context) for column, values in columns.items()},
                facts={"vectors": digest, "decisions": content.hexdigest()},
            ),
            causes=causes,
            tables=(_table_of_scores(scores, limits, cause), *tables),
            charts=tuple(_histogram(score, values, weights, limits.get(score)) for score, values in scores.items()),
        )


@dataclass(frozen=True, kw_only=True)
class PairVectors(Statistic):
    """Embeds images and captions with a CLIP; every process loads it once."""

    model: str
    """Which CLIP, as `load_clip` takes it."""
    seed: int | None
    """Seed of its random weights; None: it has others."""
    facts: dict[str, Any]
    """What decides the vectors: a hash of the model, and which pairs are selected."""
    inputs = ("caption", IMAGE)
    unit = "pairs"

    def __call__(self, block: dict[str, Shaped[np.ndarray, "n *_"]]) -> dict[str, Float16[np.ndarray, "n D"]]:
        """Return the vectors of a block's images and captions."""
        encoder, captions = _encoder(self.model, self.seed)
        texts = np.array([caption or "" for caption in block["caption"]], object)
        images = encoder.image.encode_pairs(texts.tolist(), block[IMAGE].tolist())
        return {"images": images.astype(np.float16), "texts": captions.encode(encoder.text, texts)}

    def merge(self, parts: Sequence[dict[str, Float16[np.ndarray, "_ D"]]]) -> dict[str, Float16[np.ndarray, "_ D"]]:
        """Return the vectors of all parts."""
        return concatenate(parts)


def embed_pairs(
    catalog: Catalog,
    model: str,
    seed: int | None = None,
    *,
    selected: Bool[np.ndarray, " N"] | None = None,
    selection: Any = None,
    ray: bool = False,
) -> tuple[FragmentRows, FragmentRows, str]:
    """Return the unit vectors of images and captions by a CLIP, float16, and a hash of what decides them.

    They are kept beside the catalog, so that a killed call goes on and the same call again reads them.

    Args:
        catalog: Catalog of the pairs.
        model: Which CLIP, as `load_clip` takes it.
        seed: Seed of its random weights; None: it has others.
        selected: Rows that are embedded; None: all.
        selection: What chose them, as JSON.
        ray: As for `map_fragments`.
    """
    facts = {"model": _identity(model, seed), "selection": selection}
    statistic = PairVectors(model=model, seed=seed, facts=facts)
    found = map_fragments(catalog, statistic, f"embed pairs with {model}", ray=ray, selected=selected)
    rows = [] if selected is None else [hashlib.blake2b(np.packbits(selected).tobytes(), digest_size=16).hexdigest()]
    return found.rows("images"), found.rows("texts"), _hash([facts, catalog.fingerprint, *rows])


@dataclass(frozen=True, kw_only=True)
class _Embedded:
    """The selected pairs of a catalog as vectors of one CLIP."""

    model: str
    seed: int | None
    catalog: Catalog
    digest: str
    """Hash of the model, the pairs, and which of them are selected."""
    images: FragmentRows
    texts: FragmentRows

    @classmethod
    def of(cls, context: Context, model: str, seed: int | None) -> _Embedded:
        """Embed the pairs, unless that is done."""
        images, texts, digest = embed_pairs(
            context.catalog, model, seed, selected=context.selected, selection=context.selection, ray=context.ray
        )
        return cls(model=model, seed=seed, catalog=context.catalog, digest=digest, images=images, texts=texts)

    def embed(self, images: Images) -> Float[np.ndarray, "m D"]:
        """Return the vectors of other images; they are kept beside the catalog too."""

        def compute() -> np.ndarray:
            encoder, _ = _encoder(self.model, self.seed)
            parts = []
            with progress("embed target images", len(images), "images") as advance:
                for start in range(0, len(images), TARGETS_AT_ONCE):
                    rows = np.arange(start, min(start + TARGETS_AT_ONCE, len(images)))
                    parts.append(encoder.image.encode_pictures(images.read(rows)))
                    advance(len(rows))
            return np.concatenate(parts)

        identity = ["targets", _identity(self.model, self.seed), images.digest]
        return _kept_beside(self.catalog, identity, compute).reshape(len(images), -1)


def _is_for_training(images: Images) -> bool:
    """Whether images are rows of a catalog that no evaluation holds out: a catalog has no splits but what is named."""
    if not isinstance(images, CatalogImages):
        return False
    return "task" not in images.catalog.columns or not any(images.catalog.read(["task"], images.rows)["task"])


@lru_cache(maxsize=1)
def _encoder(model: str, seed: int | None) -> tuple[ClipBothEncoder, CaptionCache]:
    """Return this process's encoder, which is loaded at its first use, and its cache of captions."""
    return ClipBothEncoder(model, load_clip(model, seed=seed), BATCH_SIZE), CaptionCache(most=CACHED_CAPTIONS)


def _identity(model: str, seed: int | None) -> str:
    """Return a hash of a model's weights and settings; a folder is not loaded for it."""
    if (Path(model.removeprefix("local-dir:")) / CONFIG_FILE).is_file():
        return ModelRef.of(model, model).digest
    return _encoder(model, seed)[0].fingerprint


def _kept_beside(
    catalog: Catalog, identity: list[Any], compute: Callable[[], Float[np.ndarray, "..."]]
) -> Float[np.ndarray, " n"]:
    """Return float32 numbers that are kept beside a catalog by what decides them, and computed where they are not."""
    ledger = Ledger(catalog.path, "scores", tuple[str])
    part = _hash(identity)
    content, note = ledger.read_file(part), ledger.note(part)
    if content is None or note is None or hashlib.blake2b(content, digest_size=16).hexdigest() != note[0]:
        content = np.ascontiguousarray(compute(), np.float32).tobytes()
        ledger.add_file(part, content)
        ledger.add(part, (hashlib.blake2b(content, digest_size=16).hexdigest(),))
    return np.frombuffer(content, np.float32)


def _hash(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def _spread(values: Shaped[np.ndarray, " n"], context: Context) -> Shaped[np.ndarray, " N"]:
    """Return a value for each row of the catalog; those that are not selected are not looked at."""
    if context.selected is None:
        return values
    whole = np.zeros(len(context.catalog), values.dtype)
    whole[context.selected] = values
    return whole


def _table_of_scores(
    scores: dict[str, Float[np.ndarray, " n"]], limits: dict[str, float], cause: UInt8[np.ndarray, " n"]
) -> Table:
    """Return how the scores are spread, and what they keep."""
    rows = []
    for number, (score, values) in enumerate(scores.items(), 1):
        limit = f"{limits[score]:.4f}" if score in limits else "-"
        kept = int(((cause == 0) | (cause > number)).sum())
        spread = [f"{value:.4f}" for value in (values.mean(), *np.quantile(values, QUANTILES))]
        rows.append((score, *spread, limit, f"{kept:,}"))
    headings = ("score", "mean", *(f"{100 * share:g} %" for share in QUANTILES), "least kept", "pairs kept")
    return Table(title=f"scores of {len(cause):,} pairs, quantiles", columns=headings, rows=tuple(rows))


def _table_of_draws(draws: Float[np.ndarray, " n"], values: Float[np.ndarray, " n"]) -> Table:
    """Return which share of the draws goes to the best pairs."""
    best, rows = np.argsort(-values, kind="stable"), []
    for share in TOP_SHARES:
        some = draws[best[: max(1, int(share * len(best)))]]
        rows.append((f"best {100 * share:g} %", f"{some.sum() / draws.sum():.3f}", f"{some.mean():.2f}"))
    headings = ("pairs", "share of the draws", "draws a pair")
    return Table(title="draws of soft cap sampling", columns=headings, rows=tuple(rows))


def _histogram(
    score: str, values: Float[np.ndarray, " n"], weights: Float[np.ndarray, " n"], limit: float | None
) -> Histogram:
    """Return how many pairs have which score, and how many of these are kept."""
    counts, edges = np.histogram(values, BINS)
    kept, _ = np.histogram(values, edges, weights=weights)
    return Histogram(
        title=f"pairs by {score}",
        edges=tuple(edges.tolist()),
        counts=tuple(counts.tolist()),
        kept=tuple(kept.tolist()),
        threshold=limit,
    )
