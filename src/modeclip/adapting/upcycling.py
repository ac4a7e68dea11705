"""Make one CLIP-MoE of a CLIP (or of a bundle's data experts): experts of feed-forward layers, and routers that choose.

There are three ways to the experts:

    stages    Diversified Multiplet Upcycling. Stage j sees all pairs with the model of stage j - 1, parts them into
              clusters (`modeclip.adapting.multistage`), and trains the feed-forward layers alone, with negatives from
              a pair's own cluster, from the plain model (as the released code does) or from the stage before.
    a bundle  Data experts that were trained with ``train.trainable: ffn``: their clusters are those of the bundle.
    copies    Sparse upcycling, the baseline: copies of the plain model's layers, and the whole CLIP-MoE is trained.

Then each block of the plain model gets its own layer and those of the experts, with a router before them. Either the
routers alone are trained, on all pairs, with a loss for balance. Or nothing is trained: the rows of the routers come
from the experts' pairs (`modeclip.adapting.gating`), and another expert can be added to the CLIP-MoE later, by itself.

A folder holds ``base`` (where the plain model had no folder), ``stage-1`` and so on, ``start`` (the CLIP-MoE before its
training), ``model`` (the CLIP-MoE) and ``upcycling.json``. Every step is kept as soon as it is done: vectors beside the
catalog, clusters as columns of it, models as training jobs. So the same command goes on where it was killed, with the
same numbers, and does nothing once it is done.

Source: CLIP-MoE (arXiv 2409.19291) for stages, numbers and routers; CLIP-UP (arXiv 2502.00965) for copies; FlexOlmo for
rows without training.
Price: for each stage one forward pass over all pairs and one epoch of feed-forward layers; for the routers one epoch of
a CLIP-MoE, which is ``top_k`` feed-forward layers a token. `plan_upcycling` measures it.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from jaxtyping import Bool, Int
from tyro.conf import arg

from modeclip.adapting.gating import BlockInputs, centre_row, centroid_rows, look_at_inputs
from modeclip.adapting.merging import as_folder, find_model
from modeclip.adapting.multistage import refine_clusters
from modeclip.adapting.schedule import losses_of_job, one_schedule
from modeclip.curation.dfn import embed_pairs
from modeclip.data.catalog import Catalog
from modeclip.data.selection import ALL, Selection
from modeclip.errors import ModeclipError, check_above_zero, check_between, check_least
from modeclip.mixture.bundle import Bundle, load_bundle
from modeclip.mixture.manifest import MANIFEST_FILE, SEED
from modeclip.models.blocks import blocks_of, ffn_parameters
from modeclip.models.clip import CONFIG_FILE, Clip, assemble_clip, load_clip, save_clip
from modeclip.models.deltas import WEIGHTS_FILE, open_weights
from modeclip.models.flops import TRAINING_FACTOR
from modeclip.models.pool import ModelPool, ModelRef
from modeclip.system.console import log, progress
from modeclip.system.devices import choose_device
from modeclip.system.files import only_process, read_json, remove, write_json, writing
from modeclip.system.paths import expand_homes, home_path
from modeclip.training.batches import steps_of_groups
from modeclip.training.costs import Plan, plan
from modeclip.training.experts import hash_pairs
from modeclip.training.jobs import (
    MOST_PROCESSES,
    AugmentConfig,
    EngineConfig,
    TrainJob,
    TrainResult,
    prepare,
    settings_changes,
)
from modeclip.training.status import in_words
from modeclip.training.trainer import train

if TYPE_CHECKING:
    from torch import Tensor

RESULT_FILE = "upcycling.json"
"""What an upcycling leaves beside its models, written last."""
SETTINGS_FILE = "settings.json"
"""What decides an upcycling, written first: a folder belongs to one."""
INPUTS_FILE = "inputs.safetensors"
"""Mean and variance of what the plain model's layers see in all pairs, where rows were made of it."""
BASE, START, MODEL = "base", "start", "model"
"""Folders of the plain model, of the CLIP-MoE before it is trained, and of the CLIP-MoE."""
FORMAT = 2
"""Raised when the same settings start to give something else."""
GRADIENT_NORM = 1.0
"""Largest norm of a gradient, as in fine-tuning."""
COPIES_Z_LOSS = 0.001
"""Share of the z-loss where copies are trained (ST-MoE, arXiv 2202.08906)."""
NO_CLUSTER = -1
"""Cluster of the pairs that are not selected."""
MOST_STAGES = 8
"""Stages that an upcycling may have: 9^8 clusters are more than pairs that anyone has."""


@dataclass(frozen=True, kw_only=True)
class UpcycleConfig:
    """How a CLIP-MoE is made. Numbers without a source are those of CLIP-MoE (arXiv 2409.19291)."""

    experts: Literal["stages", "copies"] = "stages"
    """Where the experts of a plain model come from: ``stages`` of training on ever finer clusters, or ``copies`` of its
    own layers (sparse upcycling). A bundle brings its own."""
    stages: int = 3
    """Stages, and so experts beside the plain model's own layers."""
    each_from: Annotated[Literal["base", "previous"], arg(name="from")] = "base"
    """What a stage starts from: the plain model (released code), or the model of the stage before."""
    num_clusters: int = 3
    """Clusters of the image vectors, and as many of the text vectors: a stage parts each cluster into up to 9."""
    min_pairs: int = 0
    """Pairs that a cluster must have, or it is merged into the nearest one. 0: those of a batch."""
    copies: int = 3
    """Copies of the plain model's layers beside them, with ``copies``."""
    top_k: int = 2
    """Experts that a token goes through."""
    gate: Literal["trained", "rows"] = "trained"
    """``trained``: the CLIP-MoE is trained, its routers alone unless ``trains`` says more. ``rows``: the routers are
    made of the experts' pairs and nothing is trained, so that experts can be added later; needs the start
    ``centres``."""
    start: Literal["random", "centroids", "centres"] | None = None
    """Rows of the routers at the start: ``random``; ``centroids`` of what the layers see (arXiv 2604.13508);
    ``centres`` of it in each expert's pairs (experts of a bundle). None: random, and centres without training."""
    trains: Literal["routers", "added", "all"] | None = None
    """What the training of the CLIP-MoE changes: its routers, also every expert but the plain model's (``added``,
    FlexOlmo), or all. None: routers, and all with copies."""
    gate_pairs: int = 4096
    """Pairs, of each expert's, that rows are made of at most."""
    epochs: int = 1
    """Passes over the pairs, of each stage and of the CLIP-MoE."""
    batch_size: int = 256
    """Pairs in a step, or all pairs if there are fewer."""
    learning_rate: float = 1e-5
    """Highest learning rate of experts. Models that were trained for minutes bear 1e-4 to 1e-3."""
    weight_decay: float = 0.2
    """AdamW's decay of the experts' matrices."""
    router_learning_rate: float = 1e-6
    """Highest learning rate where routers alone are trained."""
    router_weight_decay: float = 0.01
    """AdamW's decay there."""
    warmup_steps: int = 200
    """Steps in which a learning rate rises; half of all steps where they are fewer than twice as many."""
    label_smoothing: float = 0.1
    """Share of each target that is spread over the pair and its negatives, in [0, 1)."""
    balance_loss: float = 0.01
    """Weight of the routers' balance in the loss; the balance is 1 where all experts are chosen alike."""
    router_z_loss: float | None = None
    """Weight of the mean of logsumexp(logits)^2. None: 0, and 0.001 with copies (CLIP-UP, ST-MoE)."""
    threads: int = 0
    """Threads that compute; 0: as many as PyTorch takes on this machine."""
    seed: int = 0
    """Seed of clusters, of random rows, of the order of the samples and of their augmentation."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """How pictures are varied."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """How the machine is used."""

    def __post_init__(self) -> None:
        """Check the ranges that ``TrainConfig`` does not check."""
        check_least("upcycle", self, min_pairs=0, copies=1, top_k=1, gate_pairs=1, epochs=1, batch_size=2)
        check_least("upcycle", self, weight_decay=0, router_weight_decay=0, warmup_steps=0, balance_loss=0, seed=0)
        check_between("upcycle", self, stages=(1, MOST_STAGES), num_clusters=(1, 1 << 10), threads=(0, MOST_PROCESSES))
        check_above_zero("upcycle", self, "learning_rate")
        check_above_zero("upcycle", self, "router_learning_rate")
        if not 0 <= self.label_smoothing < 1:
            raise ModeclipError(f"upcycle.label_smoothing must lie in [0, 1), got {self.label_smoothing}")
        if self.router_z_loss is not None and not 0 <= self.router_z_loss < math.inf:
            raise ModeclipError(f"upcycle.router_z_loss must be 0 or more and finite, got {self.router_z_loss}")
        if self.gate == "rows" and self.start not in {None, "centres"}:
            raise ModeclipError(
                f"upcycle.gate rows trains nothing, so it needs upcycle.start centres, got {self.start}; leave start "
                "out"
            )
        if self.gate == "rows" and self.trains is not None:
            raise ModeclipError(f"upcycle.gate rows trains nothing, got upcycle.trains {self.trains}; leave one out")

    @property
    def routers_start(self) -> str:
        """Where the rows of the routers come from."""
        return self.start or ("centres" if self.gate == "rows" else "random")


@dataclass(frozen=True, kw_only=True)
class StageFacts:
    """What became of a stage."""

    name: str
    """Its folder."""
    column: str
    """Column of the catalog with the clusters; -1 for pairs that were not selected."""
    num_clusters: int
    """Clusters, accumulated over the stages so far."""
    num_found: int
    """Clusters before small ones were merged."""
    num_merged: int
    """Clusters that were merged into the nearest one because they had fewer pairs than asked for."""
    pairs_moved: int
    """Pairs of these."""
    smallest: int
    """Pairs of the smallest cluster."""
    largest: int
    """Pairs of the largest cluster."""


@dataclass(frozen=True, kw_only=True)
class TrainedFacts:
    """What a training has taken, and where its loss went."""

    name: str
    """Its folder."""
    steps: int
    """Steps."""
    samples: int
    """Pairs that it has seen, each as often as it was seen."""
    seconds: float
    """Wall time of the last run of the job."""
    first_loss: float
    """Loss that was logged first."""
    last_loss: float
    """Loss that was logged last."""


@dataclass(frozen=True, kw_only=True)
class Upcycled:
    """What ``upcycling.json`` holds."""

    folder: str
    """Folder of the CLIP-MoE."""
    model: str
    """Model, bundle or CLIP-MoE that it was made of."""
    digest: str
    """Hash of all that decided the result."""
    experts: tuple[str, ...]
    """Name of each expert, in the order of the routers' rows; the first is the plain model's own."""
    top_k: int
    """Experts that a token goes through."""
    gate: str
    """``trained`` or ``rows``."""
    num_pairs: int
    """Pairs that were selected."""
    parameters: int
    """Numbers that the CLIP-MoE has."""
    active_parameters: int
    """Numbers that a token meets."""
    stages: tuple[StageFacts, ...] = ()
    """The stages' clusters."""
    trainings: tuple[TrainedFacts, ...] = ()
    """The trainings of the stages and of the CLIP-MoE."""


def upcycle(
    model: str | Path,
    catalog: Catalog,
    config: UpcycleConfig,
    *,
    out: str | Path,
    add: Sequence[str] = (),
    selection: Selection = ALL,
) -> Upcycled:
    """Make one CLIP-MoE and write it, with all that led to it, to a folder; a killed call goes on.

    Args:
        model: Plain CLIP, a bundle whose experts were trained with ``train.trainable: ffn``, or, with ``add``, a
            CLIP-MoE.
        catalog: Pairs; columns are added that say which cluster each of them is in.
        config: How.
        out: Folder.
        add: Models that become further experts of the CLIP-MoE: such that differ from its first expert in their
            feed-forward layers alone, whose rows are made of the selected pairs; or CLIP-MoEs, which bring their rows.
        selection: Pairs that are used.

    Raises:
        ModeclipError: The model has no blocks with feed-forward layers, experts do not fit it, there are too few pairs,
            or the folder holds what was made with other settings.
    """
    out, source = home_path(out).resolve(), expand_homes(str(model))
    maker = _Maker.of(source, catalog, config, out, tuple(add), selection)
    out.mkdir(parents=True, exist_ok=True)
    with only_process(out), writing(out):
        if done := maker.check_settings():
            log(f"upcycle: {out} is done")
            return done
        result = maker.run()
        write_json(out / RESULT_FILE, asdict(result))
    return result


@dataclass(frozen=True, kw_only=True)
class UpcyclePlan:
    """What an upcycling will cost."""

    trainings: Plan | None
    """Cost of each training; None where nothing is trained."""
    num_stages: int
    """Passes over all pairs that embed them."""
    num_pairs: int
    """Pairs."""
    embedding_seconds: float
    """Time of these passes: a third of that of as many training samples, since a training sample is three passes."""

    @property
    def embedding(self) -> str:
        """Return the cost of the passes in a line."""
        passes = f"{self.num_stages} passes of {self.num_pairs:,} pairs through the model of the stage before"
        return (
            f"embedding: {passes}, about {in_words(self.embedding_seconds)}"
            if self.num_stages
            else "no pair is embedded"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON holds it."""
        return asdict(self) | {"trainings": self.trainings.to_json() if self.trainings else None}


def plan_upcycling(
    model: str | Path,
    catalog: Catalog,
    config: UpcycleConfig,
    *,
    out: str | Path,
    add: Sequence[str] = (),
    selection: Selection = ALL,
) -> UpcyclePlan:
    """Return what an upcycling will cost, from a few measured steps; arguments and errors as for `upcycle`."""
    maker = _Maker.of(expand_homes(str(model)), catalog, config, home_path(out), tuple(add), selection)
    with TemporaryDirectory(prefix="modeclip-plan-") as temporary:
        jobs = maker.jobs_like(Path(temporary))
        trainings = plan(jobs, catalog) if jobs else None
    stages = config.stages if maker.has_stages else 0
    a_sample = (trainings.jobs[0].seconds_per_step or 0) / maker.batch_size if trainings else 0.0
    return UpcyclePlan(
        trainings=trainings,
        num_stages=stages,
        num_pairs=len(maker.rows),
        embedding_seconds=stages * len(maker.rows) * a_sample / TRAINING_FACTOR,
    )


# ---------------------------------------------------------------- the steps


@dataclass(frozen=True)
class _Expert:
    """An expert that joins the plain model."""

    name: str
    state: Callable[[], Mapping[str, Tensor]]
    """Reads the state of the plain model with this expert's feed-forward layers."""
    where: Mapping[str, int] | None = None
    """Values of columns in its pairs; None: no pairs are its own."""


@dataclass(frozen=True)
class _Maker:
    """One upcycling: what it is made of, and its steps."""

    source: str
    catalog: Catalog
    config: UpcycleConfig
    out: Path
    add: tuple[str, ...]
    selection: Selection
    rows: Int[np.ndarray, " n"]
    ref: ModelRef
    """The plain model, or the CLIP-MoE that experts are added to."""
    bundle: Bundle | None

    @classmethod
    def of(
        cls, source: str, catalog: Catalog, config: UpcycleConfig, out: Path, add: tuple[str, ...], selection: Selection
    ) -> _Maker:
        """Look at what is given, before anything is written."""
        bundle = load_bundle(source) if (Path(source) / MANIFEST_FILE).is_file() else None
        if bundle is not None:
            ref = bundle.model_ref(SEED)
        else:
            spec = find_model(source, "upcycle")
            folder = Path(spec.removeprefix("local-dir:"))
            if folder.resolve() == out.resolve():
                raise ModeclipError(f"upcycle: {source} is also the folder to write to; choose another --out")
            ref = ModelRef.of(source, spec)
        rows = selection.rows(catalog)
        if len(rows) < 2:
            raise ModeclipError(f"upcycle: {catalog.path!r} has {len(rows)} pairs, expected at least 2; choose more")
        maker = cls(source, catalog, config, out, add, selection, rows, ref, bundle)
        maker._check_request()
        return maker

    def _check_request(self) -> None:
        config, is_bundle = self.config, self.bundle is not None
        if self.add and is_bundle:
            raise ModeclipError(f"upcycle --add: {self.source} is a bundle; give the CLIP-MoE that was made of it")
        if is_bundle and config.experts == "copies":
            raise ModeclipError(
                f"upcycle: {self.source} is a bundle, which brings its experts; give its seed, {self.source}#{SEED}, "
                "for copies"
            )
        if config.routers_start == "centres" and not (is_bundle or self.add or self._is_for_selection):
            raise ModeclipError(
                "upcycle.start centres: rows are made of the pairs of each expert, which only the experts of a bundle "
                "have, and a single copy that is trained on selected pairs (--where, --mask); give a bundle, or random "
                f"or centroids, got the model {self.source}"
            )
        if not self.add and config.top_k > 1 + self._num_added:
            raise ModeclipError(
                f"upcycle.top_k: expected 1 to {1 + self._num_added}, the number of experts, got {config.top_k}"
            )
        if is_bundle and config.routers_start == "centres" and "expert" not in self.catalog.columns:
            raise ModeclipError(
                f"upcycle.start centres: {self.catalog.path!r} has no column expert, which says whose each pair is; "
                f"give modeclip assign {self.source} {self.catalog.path} first, or the catalog of the run"
            )
        if self.batch_size < 2 * config.num_clusters and self.has_stages:
            raise ModeclipError(
                f"upcycle: {len(self.rows):,} pairs are too few for {config.num_clusters} x {config.num_clusters} "
                "clusters; choose more pairs"
            )

    @property
    def _num_added(self) -> int:
        """Experts beside the plain model's own layers."""
        if self.bundle is not None:
            return sum(expert.folder != SEED for expert in self.bundle.experts)
        return self.config.stages if self.config.experts == "stages" else self.config.copies

    @property
    def _is_for_selection(self) -> bool:
        """Whether there is one expert, a copy, and the selected pairs are its own."""
        is_copy = self.bundle is None and self.config.experts == "copies" and self.config.copies == 1
        return is_copy and not self.selection.is_all

    @property
    def has_stages(self) -> bool:
        """Whether experts are trained in stages."""
        return self.bundle is None and not self.add and self.config.experts == "stages"

    @property
    def is_trained(self) -> bool:
        """Whether the CLIP-MoE is trained."""
        return self.config.trains is not None if self.add else self.config.gate == "trained"

    @property
    def batch_size(self) -> int:
        """Pairs in a step."""
        return min(self.config.batch_size, len(self.rows))

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides the result, as JSON."""
        config = asdict(self.config)
        engine, _ = config.pop("engine"), config.pop("threads")
        members = [] if self.bundle is None else [ref.digest for ref in self.bundle.models]
        return {
            "format": FORMAT,
            "model": self.ref.digest,
            "experts_of_bundle": members,
            "add": [ModelRef.of(one, find_model(one, "upcycle")).digest for one in self.add],
            "catalog": self.catalog.fingerprint,
            "selection": self.selection.facts(self.catalog),
            "precision": engine["precision"],
            **config,
        }

    @property
    def digest(self) -> str:
        """Hash of the settings."""
        return _hash(self.settings)

    def check_settings(self) -> Upcycled | None:
        """Return the result if it is there.

        Raises:
            ModeclipError: The folder holds what was made with other settings.
        """
        path = self.out / SETTINGS_FILE
        if path.exists():
            settings = json.loads(json.dumps(self.settings))
            before = read_json(path, dict[str, Any], "remove the folder, or choose another --out")
            if before != settings:
                raise ModeclipError(
                    f"upcycle: {self.out} holds an upcycling with other settings: "
                    f"{', '.join(settings_changes(before, settings))}; give the same settings, or another --out"
                )
        done = self.out / RESULT_FILE
        if not done.exists() or not (self.out / MODEL / WEIGHTS_FILE).is_file():
            return None
        return read_json(done, Upcycled, "remove it, and give the command again")

    def _take_folder(self) -> None:
        """Note the settings, before the first model is written: from now on the folder is for these."""
        write_json(self.out / SETTINGS_FILE, self.settings, indent=2)

    def run(self) -> Upcycled:
        """Take all steps that are not done yet."""
        from modeclip.models.moe import count_parameters

        stages: tuple[StageFacts, ...] = ()
        trainings: tuple[TrainedFacts, ...] = ()
        base = self._load_base()
        if self.has_stages:
            self._take_folder()
            stages, trainings = self._train_stages(as_folder(self._spec, self.out / BASE).resolve())
        start = self.out / (START if self.is_trained else MODEL)
        if not (start / CONFIG_FILE).is_file():
            clip = self._with_added(base) if self.add else self._assemble(base)
            self._take_folder()
            _save(clip, start)
        del base
        if self.is_trained:
            trainings = (*trainings, self._train(self._model_job(start)))
        clip = load_clip(self.out / MODEL)
        total, active = count_parameters(clip.model)
        return Upcycled(
            folder=str(self.out / MODEL),
            model=self.source,
            digest=self.digest,
            experts=self._names(),
            top_k=clip.config["moe"]["top_k"],
            gate="trained" if self.is_trained else "rows",
            num_pairs=len(self.rows),
            parameters=total,
            active_parameters=active,
            stages=stages,
            trainings=trainings,
        )

    @property
    def _spec(self) -> str:
        return str(self.ref.spec)

    def _load_base(self) -> Clip:
        """Return the plain model, or the CLIP-MoE that experts are added to."""
        from modeclip.models.moe import moe_layers

        clip = ModelPool(1).get(self.ref)
        has_experts = bool(moe_layers(clip.model))
        if self.add and not has_experts:
            raise ModeclipError(f"upcycle --add: {self.source} is no CLIP-MoE, to which experts can be added; make one")
        if has_experts and not self.add:
            raise ModeclipError(
                f"upcycle: {self.source} is a CLIP-MoE already; add experts to it (--add), or give a plain CLIP"
            )
        if not self.add:
            try:
                ffn_parameters(clip.model)
            except ModeclipError as error:  # a ResNet
                raise ModeclipError(f"upcycle: {self.source}: {error}") from error
        return clip

    # ------------------------------------------------ stages

    def _train_stages(self, base: Path) -> tuple[tuple[StageFacts, ...], tuple[TrainedFacts, ...]]:
        """Train all stages, one after the other."""
        stages: list[StageFacts] = []
        trainings: list[TrainedFacts] = []
        seen, before = base, np.zeros(len(self.rows), np.int64)
        for number in range(1, self.config.stages + 1):
            facts, before = self._cluster(number, seen, before)
            start = seen if self.config.each_from == "previous" else base
            job = self._stage_job(number, start, facts.column)
            trainings.append(self._train(job))
            stages.append(facts)
            seen = Path(job.folder)
        return tuple(stages), tuple(trainings)

    def _cluster(
        self, number: int, seen: Path, before: Int[np.ndarray, " n"]
    ) -> tuple[StageFacts, Int[np.ndarray, " n"]]:
        """Part the clusters of the stage before by what a model sees, and keep them as a column of the catalog."""
        config, catalog, name = self.config, self.catalog, f"stage-{number}"
        min_pairs = config.min_pairs or self.batch_size
        settings: dict[str, Any] = {
            "pairs": [catalog.fingerprint, self.selection.facts(catalog)],
            "model": ModelRef.of(name, seen).digest,
            "before": _hash(before.tolist()) if number > 1 else "",
            "num_clusters": config.num_clusters,
            "min_pairs": min_pairs,
            "seed": config.seed,
        }
        column = f"upcycle_{number}_{_hash(settings)[:8]}"
        known = (catalog.facts(column) or {}) if column in catalog.columns else {}
        if known.get("upcycle") != settings:
            marked: Bool[np.ndarray, " N"] | None = None
            if not self.selection.is_all:
                marked = np.zeros(len(catalog), bool)
                marked[self.rows] = True
            images, texts, _ = embed_pairs(
                catalog, str(seen), selected=marked, selection=self.selection.facts(catalog) or None
            )
            found = refine_clusters(
                before,
                images,
                texts,
                num_clusters=config.num_clusters,
                min_pairs=min_pairs,
                seed=config.seed,
            )
            values = np.full(len(catalog), NO_CLUSTER, np.int64)
            values[self.rows] = found.cluster
            counts = {"found": found.num_found, "merged": found.num_merged, "pairs_moved": found.pairs_moved}
            known = {"upcycle": settings, **counts}
            catalog.add_columns({column: values}, facts=known)
        cluster = catalog.read([column], self.rows)[column].astype(np.int64)
        sizes = np.bincount(cluster)
        facts = StageFacts(
            name=name,
            column=column,
            num_clusters=len(sizes),
            num_found=known["found"],
            num_merged=known["merged"],
            pairs_moved=known["pairs_moved"],
            smallest=int(sizes.min()),
            largest=int(sizes.max()),
        )
        log(_in_words(facts, config, min_pairs, number))
        return facts, cluster

    def _stage_job(self, number: int, start: Path, column: str | None) -> TrainJob:
        """Return the training of a stage's expert."""
        steps = self.config.epochs * steps_of_groups(len(self.rows), self.batch_size)
        return self._job(f"stage-{number}", start, steps=steps, trainable="ffn", groups=column)

    def jobs_like(self, folder: Path) -> list[TrainJob]:
        """Return jobs that cost what the trainings will cost, with models in a folder that start anyhow."""
        base, jobs = self._load_base(), list[TrainJob]()
        if self.has_stages:
            start = as_folder(self._spec, folder / BASE)
            jobs = [self._stage_job(number, start, None) for number in range(1, self.config.stages + 1)]
        if self.is_trained:
            if self.add:
                clip = self._with_added(base)
            elif self.has_stages:
                state = base.model.state_dict()
                clip = assemble_clip(base, [state] * self.config.stages, top_k=self.config.top_k)
            else:
                experts = self._experts()
                clip = assemble_clip(base, [expert.state() for expert in experts], top_k=self.config.top_k)
            _save(clip, folder / START)
            jobs.append(self._model_job(folder / START))
        return jobs

    # ------------------------------------------------ experts and routers

    def _experts(self) -> list[_Expert]:
        """Return the experts that join the plain model's own layers."""
        config = self.config
        if self.bundle is not None:
            return self._experts_of_bundle(self.bundle)
        if config.experts == "copies":
            folder = as_folder(self._spec, self.out / BASE).resolve()
            return [_Expert(f"copy-{k}", lambda: _read_state(folder)) for k in range(1, config.copies + 1)]
        folders = [self.out / f"stage-{number}" for number in range(1, config.stages + 1)]
        return [_Expert(folder.name, lambda folder=folder: _read_state(folder)) for folder in folders]  # type: ignore[misc]

    def _experts_of_bundle(self, bundle: Bundle) -> list[_Expert]:
        """Return the finished experts of a bundle."""
        pool = ModelPool(1)
        found = []
        for index, (expert, ref) in enumerate(zip(bundle.experts, bundle.models, strict=True)):
            if expert.folder == SEED:
                log(
                    f"upcycle: {expert.name} of {bundle.path} is not trained and is left out; the seed is the first "
                    "expert"
                )
                continue
            found.append(_Expert(expert.name, lambda ref=ref: pool.get(ref).model.state_dict(), {"expert": index}))  # type: ignore[misc]
        if not found:
            raise ModeclipError(f"upcycle: no expert of {bundle.path} is trained yet; train some first")
        return found

    def _assemble(self, base: Clip) -> Clip:
        """Return the CLIP-MoE before it is trained."""
        from modeclip.models.moe import check_experts

        config, experts = self.config, self._experts()
        states = [expert.state() for expert in experts]
        try:
            check_experts(base.model, states)  # before a pair is looked at
            return assemble_clip(
                base,
                states,
                top_k=config.top_k,
                routers=self._rows_of(base, experts),
                seed=config.seed,
            )
        except ModeclipError as error:
            found = re.sub(r"^expert (\d+)", lambda match: experts[int(match[1]) - 1].name, str(error))
            raise ModeclipError(f"upcycle: {self.source}: {found}") from error

    def _rows_of(self, base: Clip, experts: Sequence[_Expert]) -> dict[str, Tensor] | None:
        """Return the routers' rows at the start; None: random ones."""
        import torch

        start = self.config.routers_start
        if start == "random":
            return None
        everything = np.arange(len(self.catalog)) if self._is_for_selection else self.rows
        of_all = self._look(base, everything, "all pairs", keep=start == "centroids")
        if start == "centroids":
            found = centroid_rows(of_all, 1 + len(experts), seed=self.config.seed)
            return {name: torch.from_numpy(rows) for name, rows in found.items()}
        _write_inputs(of_all, self.out / INPUTS_FILE)
        zeros = {name: np.zeros_like(one.mean) for name, one in of_all.items()}
        rows = [zeros]
        for expert in experts:
            own = self._rows_where(expert)
            of_domain = self._look(base, own, f"pairs of {expert.name}")
            rows.append({name: centre_row(of_all[name], of_domain[name]) for name in of_all})
        return {name: torch.from_numpy(np.stack([row[name] for row in rows])).float() for name in of_all}

    def _rows_where(self, expert: _Expert) -> Int[np.ndarray, " n"]:
        chosen = None if self.selection.is_all else self.selection.mask_of(self.catalog)
        own = self.catalog.select_equal(dict(expert.where or {}), chosen)
        if not len(own):
            raise ModeclipError(
                f"upcycle.start centres: {self.catalog.path!r} has no selected pair of {expert.name}, whose row would "
                "be made of them; choose more pairs, or another start"
            )
        return own

    def _look(
        self, clip: Clip, rows: Int[np.ndarray, " n"], what: str, *, keep: bool = False
    ) -> dict[str, BlockInputs]:
        """Return what the plain model's layers see in some pairs."""
        most, seed = self.config.gate_pairs, self.config.seed
        clip.model.to(choose_device())
        with progress(f"look at {what}", min(most, len(rows)), "pairs") as advance:
            found = look_at_inputs(clip, self.catalog, rows, most_pairs=most, seed=seed, keep=keep, advance=advance)
        clip.model.cpu()
        return found

    def _names(self) -> tuple[str, ...]:
        """Return the names of the CLIP-MoE's experts, in the order of the routers' rows."""
        if not self.add:
            return "base", *(expert.name for expert in self._experts())
        names = list(_names_of(Path(self._spec)))
        for source in self.add:
            names += _names_of(Path(find_model(source, "upcycle")))[1:] or [source]
        return tuple(names)

    def _with_added(self, clip: Clip) -> Clip:
        """Return a CLIP-MoE with further experts."""
        import torch

        from modeclip.models.moe import check_experts, moe_layers

        base, own = dense_of(clip, 0), clip.model.state_dict()
        blocks = [block for found in blocks_of(clip.model).values() for block in found]
        routers = {block.name: own[f"{block.ffn_names[0]}.router.weight"] for block in blocks}
        num_experts = clip.config["moe"]["num_experts"]
        states = [dense_of(clip, k).model.state_dict() for k in range(1, num_experts)]
        of_all: dict[str, BlockInputs] | None = None
        for source in self.add:
            spec = find_model(source, "upcycle")
            joining = load_clip(spec)
            if moe_layers(joining.model):
                theirs = joining.model.state_dict()
                more = joining.config["moe"]["num_experts"]
                states += [dense_of(joining, k).model.state_dict() for k in range(1, more)]
                rows = {name: theirs.get(f"{name_of_ffn}.router.weight") for name, name_of_ffn in _ffns(clip).items()}
                if any(rows[name] is None or rows[name].shape[1] != value.shape[1] for name, value in routers.items()):
                    raise ModeclipError(f"upcycle --add {source}: its towers have another shape than {self.source}'s")
                new = {name: value[1:] - value[:1] for name, value in rows.items() if value is not None}
            else:
                states.append(joining.model.state_dict())
                try:
                    check_experts(base.model, states[-1:])  # before a pair is looked at
                except ModeclipError as error:
                    raise ModeclipError(f"upcycle --add {source}: {str(error).partition(': ')[2]}") from error
                of_all = of_all or _read_inputs(Path(self._spec).parent / INPUTS_FILE)
                of_all = of_all or self._look(base, np.arange(len(self.catalog)), "all pairs")
                of_domain = self._look(base, self.rows, f"pairs of {source}")
                new = {
                    name: torch.from_numpy(centre_row(of_all[name], of_domain[name]))[None].float() for name in routers
                }
            routers = {name: torch.cat([value, value[:1] + new[name].to(value)]) for name, value in routers.items()}
        if of_all:
            _write_inputs(of_all, self.out / INPUTS_FILE)
        try:
            top_k = clip.config["moe"]["top_k"]
            return assemble_clip(base, states, top_k=top_k, routers=routers)
        except ModeclipError as error:
            raise ModeclipError(f"upcycle --add: {error}") from error

    # ------------------------------------------------ training

    def _model_job(self, start: Path) -> TrainJob:
        """Return the training of the CLIP-MoE in a folder."""
        config, copies = self.config, self.config.experts == "copies" and self.bundle is None
        trains = config.trains or ("all" if copies else "routers")
        z_loss = (COPIES_Z_LOSS if copies else 0.0) if config.router_z_loss is None else config.router_z_loss
        alone = trains == "routers"
        return self._job(
            MODEL,
            start,
            steps=config.epochs * max(1, len(self.rows) // self.batch_size),
            trainable=trains,
            learning_rate=config.router_learning_rate if alone else config.learning_rate,
            weight_decay=config.router_weight_decay if alone else config.weight_decay,
            balance_loss=config.balance_loss,
            router_z_loss=z_loss,
        )

    def _job(self, name: str, model: Path, *, steps: int, **changes: Any) -> TrainJob:
        """Return a job of one schedule over the selected pairs."""
        config, steps = self.config, max(2, steps)
        return one_schedule(
            self.out / name,
            self.catalog,
            config,
            name=name,
            model=model,
            steps=steps,
            batch_size=self.batch_size,
            selection=self.selection,
            warmup_fraction=min(config.warmup_steps / steps, 0.5),
            clip_grad_norm=GRADIENT_NORM,
            label_smoothing=config.label_smoothing,
            **changes,
        )

    def _train(self, job: TrainJob) -> TrainedFacts:
        """Train a job to its end, unless that is done, and return what it took."""
        job = replace(job, pairs=hash_pairs(job, self.catalog))
        if TrainResult.read(job) is None:
            prepare(job)
            job.save()
        result = train(job)
        losses = losses_of_job(job)
        return TrainedFacts(
            name=job.name,
            steps=job.last_step,
            samples=result.samples,
            seconds=result.seconds,
            first_loss=losses[0],
            last_loss=losses[-1],
        )


def dense_of(clip: Clip, expert: int) -> Clip:
    """Return the plain CLIP that has the feed-forward layers of one expert of a CLIP-MoE.

    Args:
        clip: A CLIP-MoE; it stays as it is.
        expert: Number of the expert; 0 is the model that it was made of.
    """
    model = copy.deepcopy(clip.model)
    for block in (block for found in blocks_of(model).values() for block in found):
        layer = model.get_submodule(block.ffn_names[0]).experts[expert]
        parts = [layer] if len(block.ffn_names) == 1 else list(layer)
        for name, part in zip(block.ffn_names, parts, strict=True):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, part)
    return replace(clip, model=model, config={key: value for key, value in clip.config.items() if key != "moe"})


def _in_words(facts: StageFacts, config: UpcycleConfig, min_pairs: int, number: int) -> str:
    """Say what the clusters of a stage are."""
    most = (config.num_clusters**2) ** number
    merged = ""
    if facts.num_merged:
        merged = (
            f"; {facts.num_merged} of the {facts.num_found} that were found had fewer than {min_pairs:,} pairs and "
            f"were merged into the nearest ({facts.pairs_moved:,} pairs)"
        )
    return (
        f"{facts.name}: {facts.num_clusters} clusters of up to {most:,}, of {facts.smallest:,} to {facts.largest:,} "
        f"pairs{merged}"
    )


def _save(clip: Clip, folder: Path) -> None:
    """Write a model; its settings come last, so that a folder that has them is whole."""
    part = folder.with_name(f"{folder.name}.part")
    remove(part)
    save_clip(clip, part)
    remove(folder)
    part.rename(folder)


def _names_of(folder: Path) -> tuple[str, ...]:
    """Return the names of a CLIP-MoE's experts, as its upcycling has left them beside it; none for a plain CLIP."""
    if not (folder / CONFIG_FILE).is_file():
        return ()
    moe = read_json(folder / CONFIG_FILE, dict[str, Any], "get the model again").get("moe")
    if not moe:
        return ()
    path, names = folder.parent / RESULT_FILE, list[str]()
    if path.is_file():
        names = read_json(path, dict[str, Any], "remove it").get("experts", [])
    plain = ("base", *(f"expert {k}" for k in range(1, moe["num_experts"])))
    return tuple(names) if len(names) == len(plain) else plain


def _ffns(clip: Clip) -> dict[str, str]:
    """Return where each block's feed-forward layer is, by the block's name."""
    return {block.name: block.ffn_names[0] for found in blocks_of(clip.model).values() for block in found}


def _read_state(folder: Path) -> dict[str, Tensor]:
    with open_weights(folder) as weights:
        return {name: weights.tensor(name) for name in weights.names}


def _write_inputs(inputs: Mapping[str, BlockInputs], path: Path) -> None:
    """Keep mean and variance of the blocks' inputs, for experts that are added later."""
    from safetensors.numpy import save_file

    with writing(path.parent):
        save_file({name: np.append(one.mean, one.variance) for name, one in inputs.items()}, path)


def _read_inputs(path: Path) -> dict[str, BlockInputs] | None:
    """Read what `_write_inputs` has written; None where there is nothing."""
    from safetensors.numpy import load_file

    if not path.is_file():
        return None
    found = {}
    for name, values in load_file(path).items():
        mean, variance = values[:-1], float(values[-1])
        squares = variance * len(mean) + float(mean @ mean)
        found[name] = BlockInputs(count=1, total=mean, squares=squares)
    return found


def _hash(content: Any) -> str:
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
