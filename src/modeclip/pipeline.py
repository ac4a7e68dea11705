"""The whole method in one folder: `RunFolder` plans, trains, bundles and evaluates the models of a run.

    index -> embed -> cluster -> controls -> train -> bundle -> evaluate -> report

``modeclip run`` does these stages for a recipe; the single commands work on the same folder through the same
`RunFolder`. Each stage of a recipe leaves a record in ``stages/`` with two hashes. One is of everything that decided
its result: its own settings, the digests of the stages before it, the state of the source. The other is of what it
made: rows and columns of the catalog, files. The same command again runs only the stages whose inputs have changed, or
whose output is gone or is another one, as after an earlier recipe, another that was interrupted, and the earlier one
again. The stage ``controls`` exists only where the recipe asks for controls that need a column of their own.

A run that is killed at any moment continues with the same numbers, because no stage leaves anything half-written that a
later run would take for whole. One model by itself is planned by `single_job`.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from hashlib import sha256
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NotRequired, get_type_hints

import numpy as np
import yaml
from jaxtyping import Int
from typing_extensions import TypedDict

from modeclip.clustering.class_selection import mark_prior, name_of, select_for_classes
from modeclip.clustering.clusters import CLUSTERING_FILE, Clustering
from modeclip.clustering.controls import CONTROL_COLUMNS, ONE_STEP_FOLDER, add_controls
from modeclip.clustering.embedding import COLUMN, EmbedConfig, embed
from modeclip.clustering.fitting import (
    CARDS_FILE,
    PAIRS_PER_FINE,
    ClusterConfig,
    ClusterResult,
    choose_num_fine,
    cluster,
    read_config,
    sample_rows,
)
from modeclip.clustering.kmeans import kmeans
from modeclip.clustering.novelty import fitted_quantiles
from modeclip.data.catalog import CATALOG, PAIR_COLUMNS, Catalog, remedy_of
from modeclip.data.checksums import data_files, find_damaged, remove_leftovers, unknown_files
from modeclip.data.indexing import TASKS, index
from modeclip.data.prompts import read_classes
from modeclip.data.samples import Sample
from modeclip.data.sources import DataConfig, DataSource, SourcePart, open_source, open_task, relative_to, source_state
from modeclip.data.sources.options import GROUPS
from modeclip.data.storage import missing_fragments, open_dataset
from modeclip.data.tasks.task import catalog_tasks
from modeclip.errors import DamagedError, ModeclipError, unknown
from modeclip.evaluation.evaluate import EvaluateConfig, RecipeEvaluateConfig, evaluate, run_table
from modeclip.evaluation.results import write_results
from modeclip.evaluation.systems import TrainedModel, run_systems
from modeclip.mixture.bundle import EDITS, RoutingConfig, assemble_bundle, encoder_of, is_bundled
from modeclip.mixture.manifest import MANIFEST_FILE, read_manifest
from modeclip.models.clip import WEIGHTS_FILE, check_model, model_shapes
from modeclip.models.encoders import IMAGE_PREFIXES, PREFIXES, check_trusted
from modeclip.models.feature_cache import FeatureCache
from modeclip.system.console import log
from modeclip.system.devices import PeakMemory, return_memory
from modeclip.system.files import (
    FileNote,
    find_damage,
    hash_file,
    note_files,
    only_process,
    read_json,
    remove,
    versions,
    write_atomically,
    write_json,
    writing,
)
from modeclip.system.paths import RunPaths, expand_homes, home, home_path, is_url, join
from modeclip.training.batches import job_rows
from modeclip.training.experts import ExpertsConfig, fingerprint_of, part, pin_jobs, plan_jobs, reuse_models, seed_model
from modeclip.training.jobs import JOB_FILE, TrainConfig, TrainJob, TrainResult, brings_weights
from modeclip.training.launching import run_jobs
from modeclip.training.preflight import check_negatives
from modeclip.training.status import job_status

STAGES = ("index", "embed", "cluster", "controls", "train", "bundle", "evaluate", "report")
STAGE_FORMAT = 2
"""Part of every stage's digest; raise it when a stage starts to produce something else from the same settings."""
FINE_BEFORE = 256
"""Fine clusters of a recipe that named no number, when these did not depend on the number of pairs."""
LOOK_SECONDS, LOOK_PAIRS = 10.0, 512
"""How long a plan counts the pairs of a source, and how many of them it indexes and embeds to measure rates."""
LONG_CAPTIONS = 0.1
"""Share of captions longer than what a model reads from which on a run says so."""
EDITED = "edited"
"""State of a bundle that a user has changed since it was made: it stays as it is."""
LOCK_PATIENCE_SECONDS = 600.0
"""How long to wait for another process that writes the bundle of the same folder."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that a run is made from."""

    name: str
    """Name of the run, shown in its report."""
    data: DataConfig
    """Where the pairs come from."""
    embed: EmbedConfig = field(default_factory=EmbedConfig)
    """How captions become vectors."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """How captions are clustered and experts are formed."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How each model is trained."""
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    """Budget of the experts, and the controls."""
    evaluate: RecipeEvaluateConfig = field(default_factory=RecipeEvaluateConfig)
    """Templates and routing rule."""

    def plain(self) -> dict[str, Any]:
        """Return the recipe as JSON and YAML know it, with the flat names of its file."""
        return dict(_plain(asdict(self) | {"data": self.data.flat()}))


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a finished run leaves."""

    folder: Path
    """The run's folder."""
    results: dict[str, Any]
    """What ``results.json`` holds."""
    report: Path
    """The page that shows the results."""
    bundle: Path
    """The folder of the bundle."""


def demo_recipe() -> Path:
    """Return the path of the recipe that ``modeclip demo`` runs."""
    return Path(str(files("modeclip") / "recipes" / "demo.yaml"))


class _RecipeLoader(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error: of the two values one would be ignored."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Make a mapping of a node."""
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.value == "<<":  # merged keys may be overridden, which is their purpose
                continue
            if isinstance(key.value, str) and key.value in seen:
                raise ModeclipError(
                    f"line {line}: {key.value!r} stands twice, first in line {seen[key.value]}; remove one of the two"
                )
            seen[str(key.value)] = line
        return super().construct_mapping(node, deep)


def load_recipe(path: Path) -> Recipe:
    """Read a recipe from YAML; paths in it are relative to its folder.

    Raises:
        ModeclipError: The file is missing or no valid YAML, or a field is unknown, missing, of a wrong type or out of
            its range.
    """
    path = home_path(path)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _RecipeLoader)
    except FileNotFoundError:
        raise ModeclipError(f"recipe {path}: no such file; correct the path") from None
    except ModeclipError as error:
        raise ModeclipError(f"recipe {path}: {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ModeclipError(
            f"recipe {path}: no valid YAML ({' '.join(str(error).split())}); correct that line"
        ) from None
    if isinstance(content, dict):
        content.setdefault("name", path.stem)
        for section, name in (("train", "model"), ("embed", "encoder")):
            if isinstance(content.get(section), dict) and isinstance(content[section].get(name), str):
                content[section][name] = _folder_beside(path, content[section][name])
    try:
        recipe = parse_recipe(content)
    except ModeclipError as error:
        raise ModeclipError(f"recipe {path}: {error}") from None
    return replace(recipe, data=relative_to(recipe.data, path.parent))


def parse_recipe(content: Any) -> Recipe:
    """Make a recipe of what a YAML file holds, and check every field.

    Raises:
        ModeclipError: A field is unknown, missing, of a wrong type or out of its range.
    """
    from pydantic import TypeAdapter, ValidationError

    if not isinstance(content, dict):
        raise ModeclipError(
            f"expected sections such as `data:`, got a {type(content).__name__}; docs/own-data.md shows a recipe"
        )
    if isinstance(content.get("data"), dict):
        content = content | {"data": DataConfig.nested(content["data"])}
    _check_fields(Recipe, content, ())
    try:
        return TypeAdapter(Recipe).validate_python(content)
    except ValidationError as error:
        problem = error.errors()[0]
    place = ".".join(str(part) for part in problem["loc"] if part not in GROUPS)  # recipes have flat names
    if problem["type"] == "value_error":  # a range that the section itself checks; its message names the field
        raise ModeclipError(problem["msg"].removeprefix("Value error, "))
    got = "" if problem["type"] == "missing" else f", got {problem['input']!r}"
    raise ModeclipError(f"{place}: {problem['msg']}{got}")


@dataclass(frozen=True, kw_only=True, eq=False)
class RunFolder(RunPaths):
    """A run's folder with a clustered catalog, and how its models are trained.

    The catalog and the clustering are opened, and the jobs are planned, when they are first asked for, and only once.
    """

    training: TrainConfig = field(default_factory=TrainConfig)
    """How each model is trained."""
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    """Which models there are, and where they run."""
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    """Rule and templates that the bundle keeps."""
    clustered_by: ClusterConfig | None = None
    """Settings of the clustering, for a folder of an earlier version, which does not tell them."""
    encoder: str | None = None
    """Name of the catalog's encoder by whoever opens the folder, which is needed if it is Python code."""

    @cached_property
    def catalog(self) -> Catalog:
        """The catalog of the training pairs.

        Raises:
            ModeclipError: There is none, or it is not clustered.
        """
        catalog = Catalog.open(self.catalog_path.resolve())
        if "expert" not in catalog.columns:
            raise ModeclipError(f"catalog {catalog.path!r} is not clustered: run modeclip cluster {self.folder} first")
        return catalog

    @cached_property
    def clustering(self) -> Clustering:
        """The clustering that the catalog's experts come from.

        Raises:
            ModeclipError: There is none, or the catalog was clustered in another way since.
        """
        clustering = Clustering.load(self.clusters)
        facts = self.catalog.facts("expert") or {}
        if facts.get("clustering", clustering.digest) != clustering.digest:
            raise ModeclipError(
                f"{self.clusters} is not the clustering that the catalog's column expert comes from: run modeclip"
                f" cluster {self.folder} again"
            )
        return clustering

    @cached_property
    def cluster_config(self) -> ClusterConfig:
        """The settings that the clustering was made with, by which the controls are split too."""
        known = read_config(self.clusters) or self.clustered_by
        if known is not None:
            return known
        sizes = {"num_fine": self.clustering.num_fine, "num_experts": self.clustering.num_experts}
        return ClusterConfig(**sizes, seed=self.training.seed)

    @cached_property
    def fingerprint(self) -> str:
        """What the training data and, if it is a folder, the start model are known by."""
        return fingerprint_of(self.catalog, self.clustering, self.training.model)

    @property
    def split_controls(self) -> list[str]:
        """The controls that need a column of the catalog; none where only some experts are trained."""
        return [] if self.experts.only else sorted(CONTROL_COLUMNS.keys() & set(self.experts.controls))

    def add_controls(self) -> dict[str, Int[np.ndarray, " K"]]:
        """Add the columns of the controls that the catalog lacks; return the rows of each of their models."""
        return add_controls(self.catalog, self.split_controls, self.cluster_config, self.clusters)

    @cached_property
    def jobs(self) -> list[TrainJob]:
        """The models that were asked for, in the order in which they should start.

        Raises:
            ModeclipError: The settings fit neither the clustering nor each other, or the catalog lacks the column of a
            control (`add_controls`).
        """
        return self._plan(self.experts)

    @cached_property
    def members(self) -> list[TrainJob]:
        """The seed and every expert of the clusters, those of other machines and earlier calls included."""
        jobs = (
            self._plan(replace(self.experts, only=(), order="index", controls=())) if self.experts.only else self.jobs
        )
        return sorted(filter(is_bundled, jobs), key=lambda job: -1 if job.index is None else job.index)

    @property
    def class_experts(self) -> list[TrainJob]:
        """The experts for class names that are done in this folder and continue the seed of its experts."""
        starts = {job.start_digest for job in self.members if job.role == "expert"}
        found = []
        for path in sorted(self.models.resolve().glob("expert-*/job.json")):
            with suppress(ModeclipError):  # damaged: it cannot be part of the bundle
                job = replace(TrainJob.load(path), folder=str(path.parent))
                if job.role == "prior" and job.start_digest in starts and TrainResult.read(job) is not None:
                    found.append(job)
        return found

    def jobs_for_classes(self, classes: Sequence[str], nearest: int = 1) -> list[TrainJob]:
        """Return the job of one expert for class names, behind the seed's; its rows are marked in the catalog.

        Args:
            classes: Files of class names, or lists with commas; one expert is trained for all of them.
            nearest: Fine clusters that each class name takes.

        Raises:
            ModeclipError: A file cannot be read, or the captions were not embedded by an encoder of texts.
        """
        names = [name for source in classes for name in read_classes(source)]
        prior = select_for_classes(
            self.catalog, self.clustering, names, name=name_of(classes), count=nearest, encoder=self.encoder
        )
        mark_prior(self.catalog, prior)
        models = self.models.resolve()
        parting = part(Path(self.catalog.path), self.fingerprint, models, self.training, self.experts)
        expert = parting.branch("prior", name=f"expert-{prior.name}")
        expert = replace(expert, mask=prior.column, catalog_fingerprint=f"{self.fingerprint}-{prior.digest}")
        return pin_jobs([expert] if parting.seed is None else [parting.seed, expert], self.catalog)

    def train(
        self, jobs: Sequence[TrainJob], *, ray: bool = False, stop_on_failure: bool = False, bundle: bool = False
    ) -> dict[str, TrainResult]:
        """Train the jobs that are not finished yet.

        Args:
            jobs: Of this folder.
            ray: Run them on Ray.
            stop_on_failure: Stop all of them when one fails.
            bundle: Bring the bundle up to date after each expert that is done.

        Returns:
            Results by the jobs' names.

        Raises:
            ModeclipError: Jobs failed.
        """

        def refresh(job: TrainJob) -> None:
            if bundle and job.role == "expert":
                try:
                    self.refresh_bundle()
                except (ModeclipError, OSError) as error:  # no reason to stop the other experts; it is tried again
                    log(f"bundle: {error}")

        self.reuse_models(jobs)
        for job in jobs:  # an expert with too few pairs, or without a negative, is an error before the seed is trained
            if TrainResult.read(job) is None and (
                warning := check_negatives(job, self.catalog, job_rows(job, self.catalog))
            ):
                log(warning)
        return run_jobs(
            jobs,
            self.experts.jobs,
            processes=self.experts.processes_per_job,
            ray=ray,
            stop_on_failure=stop_on_failure,
            on_done=refresh,
        )

    def reuse_models(self, jobs: Sequence[TrainJob]) -> None:
        """Bring finished models to the jobs that they fit, where clusters have got other numbers; say which."""
        if self.models.is_dir():
            with only_process(self.models, LOCK_PATIENCE_SECONDS):
                for words in reuse_models(jobs):
                    log(f"the same pairs as before: {words}")

    def refresh_bundle(self) -> Path | None:
        """Write the bundle of the experts that are done, unless it is up to date or was edited since.

        Returns:
            Its folder; None where no expert is done.
        """
        done = [job for job in self.members if TrainResult.read(job) is not None] + self.class_experts
        if all(job.role not in {"expert", "prior"} for job in done):
            return None
        with only_process(self.models, LOCK_PATIENCE_SECONDS):
            lineage = self.lineage
            if self.is_edited:
                log(
                    f"bundle: {self.bundle} was edited since it was made and stays as it is; modeclip bundle adds to it"
                )
            elif (
                lineage.get("jobs") != {job.name: job.digest for job in done}
                or lineage.get("catalog_fingerprint") != self.members[0].catalog_fingerprint
                or "experts" not in lineage.get("recipe", {})  # an earlier version wrote it
            ):
                self.write_bundle()
        return self.bundle

    @property
    def lineage(self) -> dict[str, Any]:
        """What the bundle says that it was made from; nothing where there is none, or where it is damaged."""
        with suppress(DamagedError):
            lineage = read_json(self.bundle / MANIFEST_FILE, dict[str, Any], "").get("lineage")
            return lineage if isinstance(lineage, dict) else {}
        return {}

    @property
    def is_edited(self) -> bool:
        """Whether the bundle was edited since it was made from the run."""
        return bool(self.lineage.get(EDITS))

    def write_bundle(self, *, name: str | None = None, lineage: Mapping[str, Any] | None = None) -> Path:
        """Write the bundle of the models that are done, in the place of any other, and return its folder.

        Args:
            name: Of the run; the folder's by default.
            lineage: What else the models were made from; their settings are always recorded.

        Raises:
            ModeclipError: The seed is not trained yet.
        """
        recipe = {"train": asdict(self.training), "experts": asdict(self.experts)}
        return assemble_bundle(
            self.folder,
            [*self.members, *self.class_experts],
            self.routing,
            seed=self.seed if self.experts.start is not None else None,
            name=name,
            lineage={"recipe": recipe} | dict(lineage or {}),
        )

    @property
    def seed(self) -> Path:
        """The model folder of the seed, trained here or given."""
        return seed_model(self.models, self.training, self.experts)

    def evaluate(self, name: str, *, batch_size: int = 512) -> dict[str, Any]:
        """Score the finished models on the held-out tasks and write ``results.json`` and ``results``.

        ``results.json`` is the table that the report shows; the folder ``results`` has what `modeclip evaluate` writes,
        the answer to every image among it, so that two runs can be compared.

        Args:
            name: Of the run.
            batch_size: Images encoded at a time.

        Returns:
            What was written.
        """
        results = {
            "name": name,
            "date": datetime.now(UTC).date().isoformat(),
            "seed": self.training.seed,
            "machine": _machine(),
        }
        shutil.rmtree(self.answers, ignore_errors=True)  # of an earlier evaluation, which may have had other systems
        if self.tasks_path.exists():
            one_step, cache = self.clusters / ONE_STEP_FOLDER, FeatureCache(self.features)
            tasks = catalog_tasks(Catalog.open(self.tasks_path))
            encoder = encoder_of(self.catalog)
            systems = run_systems(
                self._trained_models(),
                self.clustering,
                encoder,
                self.routing,
                cache,
                one_step=Clustering.load(one_step) if "one-step" in self.split_controls else None,
                trust_encoder=encoder == self.encoder,
                quantiles=fitted_quantiles(self.catalog, self.clustering.num_fine),
            )
            config = EvaluateConfig(batch_size=batch_size)
            found = evaluate(systems, tasks, config, cache, done=lambda part: write_results(self.answers, part))
            results |= run_table(systems, tasks, found)
            cache.remove_unused()
        else:
            results |= {"tasks": [], "chance": {}, "majority": {}, "models": [], "routing": {}}
        write_json(self.results, results)
        return results

    def _trained_models(self) -> list[TrainedModel]:
        """Return the finished models of the run and of its bundle, the seed among them also where it was given."""
        jobs = {job.name: job for job in (*self.jobs, *self.members)}
        models = [model for job in jobs.values() if (model := TrainedModel.of(job)) is not None]
        if all(model.role != "seed" for model in models):
            models.append(TrainedModel.given(self.seed))
        return models

    def _plan(self, experts: ExpertsConfig) -> list[TrainJob]:
        jobs = plan_jobs(
            Path(self.catalog.path),
            self.fingerprint,
            self.models.resolve(),
            self.clustering.num_experts,
            self.training,
            experts,
            ranges=self.clustering.range_of_expert,
        )
        return pin_jobs(jobs, self.catalog)


def single_job(
    catalog: Catalog,
    folder: Path,
    train: TrainConfig,
    *,
    where: Mapping[str, int] | None = None,
    mask: str | None = None,
    start: str | None = None,
    threads: int = 1,
) -> TrainJob:
    """Return the job that trains one model by itself, from the start or onwards from another model.

    Args:
        catalog: Any catalog.
        folder: Where the model goes; the folder's name becomes the job's.
        train: How the model is trained.
        where: Columns and the value that a row must have in each to be trained on.
        mask: Column of booleans that marks the rows to train on.
        start: Folder of a finished job, or a checkpoint (``.pt``) of open_clip_train. The job then takes the steps
            after ``train.seed_parts``, as an expert does after its seed; None takes the whole schedule.
        threads: Threads that compute.

    Raises:
        ModeclipError: The catalog has no such column or value, or the start cannot be continued.
    """
    where, folder = dict(where or {}), folder.resolve()
    fingerprint = fingerprint_of(catalog, None, train.model)
    if where or mask:
        rows = catalog.select(mask=mask, **where)
        fingerprint += f"-{sha256(rows.tobytes()).hexdigest()[:16]}"
    experts = ExpertsConfig(start=start, threads_per_job=threads)
    parting = part(Path(catalog.path), fingerprint, folder.parent, train, experts)
    job = replace(parting.branch("single", name=folder.name), where=where, mask=mask)
    if parting.seed is not None:
        job = replace(job, first_step=0, first_share=0.0, start_from=None, start_digest="")
    return pin_jobs([job], catalog)[0]


def run(recipe: Recipe, out: Path, *, trust_encoder: bool = False) -> RunResult:
    """Run the stages of a recipe that are missing or stale.

    Args:
        recipe: What to do.
        out: The run's folder, which is made if it does not exist.
        trust_encoder: Import and call what the recipe names as its encoder, if that is Python code.

    Raises:
        ModeclipError: A stage cannot do its work, or another process is running in the folder.
    """
    check_trusted(recipe.embed.encoder, trust_encoder)
    check_model(recipe.train.model)  # at once, not after an hour of embedding
    if recipe.embed.encoder.partition(":")[0] in IMAGE_PREFIXES:
        raise ModeclipError(
            f"embed.encoder {recipe.embed.encoder!r} looks at images, but a recipe routes tasks by class names: give an"
            " encoder of texts, or use the commands modeclip embed and modeclip cluster, which take every encoder"
        )
    out = home_path(out)
    out.mkdir(parents=True, exist_ok=True)
    folder = _run_folder(recipe, out)
    log(announcement(announced_jobs(recipe, out), recipe.train))
    for line in choices(recipe):
        log(line)
    with only_process(out), writing(out):
        write_recipe(recipe, folder)
        _Stages(recipe, folder).run_all(open_source(recipe.data))
    results = read_json(folder.results, dict[str, Any], "give the same modeclip run again")
    return RunResult(folder=out, results=results, report=folder.report, bundle=folder.bundle)


def _run_folder(recipe: Recipe, out: Path) -> RunFolder:
    return RunFolder(
        folder=out,
        training=recipe.train,
        experts=recipe.experts,
        routing=recipe.evaluate,
        clustered_by=recipe.cluster,
        encoder=recipe.embed.encoder,
    )


# ---------------------------------------------------------------- what a run will cost


def announced_jobs(recipe: Recipe, out: Path) -> list[TrainJob]:
    """Return the models that a recipe trains, before its pairs are known: their names, roles and steps."""
    experts = replace(recipe.experts, order="index")
    paths = RunPaths(folder=out)
    return plan_jobs(paths.catalog_path, "", paths.models.resolve(), recipe.cluster.num_experts, recipe.train, experts)


def samples_of(job: TrainJob) -> int:
    """Return the number of samples that a job trains on."""
    return (job.last_step - job.first_step) * job.config.batch_size


def announcement(jobs: Sequence[TrainJob], train: TrainConfig) -> str:
    """Return a line about all samples that a run trains on."""
    groups: dict[str, list[int]] = {}
    for job in jobs:
        groups.setdefault(job.role, []).append(samples_of(job))
    parts = [
        f"{role} {sizes[0]:,}" if len(sizes) == 1 else f"{len(sizes)} x {role} {sizes[0]:,}"
        for role, sizes in groups.items()
    ]
    total = sum(sum(sizes) for sizes in groups.values())
    return (
        f"{len(jobs)} models, {total:,} samples in all: {', '.join(parts)} (train.samples, {train.samples:,}, is the"
        " schedule of the seed and the dense model together)"
    )


def choices(recipe: Recipe, num_pairs: int | None = None) -> list[str]:
    """Return a line for each setting that the recipe leaves to the data or to the model.

    Args:
        recipe: What the user has said.
        num_pairs: Pairs of the source, if they are known already.
    """
    lines = []
    if recipe.train.learning_rate is None:
        model, brings = recipe.train.model, "brings" if brings_weights(recipe.train.model) else "has no"
        rate = f"{recipe.train.highest_rate:g}, since {model} {brings} trained weights"
        lines.append(f"train.learning_rate is not given: {rate}")
    if recipe.cluster.num_fine is None:
        found = "" if num_pairs is None else f": {choose_num_fine(num_pairs, recipe.cluster.num_experts):,}"
        lines.append(f"cluster.num_fine is not given{found}, one for {PAIRS_PER_FINE} pairs")
    return lines


def misfits(model: str, catalog: Catalog) -> list[str]:
    """Return a line where a model sees much less than the pairs hold: pixels of the images, words of the captions."""
    shapes = model_shapes(model)
    patches, kernel = shapes.get("visual.positional_embedding", (0,)), shapes.get("visual.conv1.weight", (0,))
    context = shapes.get("positional_embedding", (0,))[0]
    size = round((patches[0] - 1) ** 0.5) * kernel[-1] if patches[0] > 1 else 0
    rows = sample_rows(len(catalog), LOOK_PAIRS, 0)
    pairs = catalog.read(["width", "height", "caption"], rows)
    shorter = float(np.median(np.minimum(pairs["width"], pairs["height"])))
    long = np.mean([len(str(caption).split()) + 2 > context for caption in pairs["caption"]])
    lines = []
    if size and shorter >= 2 * size:
        lines.append(
            f"train.model {model} sees {size} x {size} pixels, half of the images have {shorter:.0f} or more on their"
            " shorter side: a model for larger pictures, such as ViT-B-32, sees more of them"
        )
    if context and long >= LONG_CAPTIONS:
        lines.append(
            f"train.model {model} reads {context} tokens, {100 * long:.0f} % of the captions have more words, cut"
            " off: give a model with a longer context"
        )
    return lines


def write_recipe(recipe: Recipe, folder: RunPaths) -> None:
    """Write a recipe into its run folder, with the settings that were left to the data or the model."""
    plain = replace(recipe, train=recipe.train.decided()).plain()
    write_atomically(folder.recipe, yaml.safe_dump(plain, sort_keys=False))


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """What is left to do of one stage."""

    name: str
    """Name of the stage."""
    is_done: bool
    """Whether nothing is left."""
    detail: str
    """What it does, or what it has done."""
    samples: int
    """Samples that it trains on in all, done or not."""
    seconds: float | None
    """Time that is left, with the start of processes and models; None where it is not estimated."""
    disk_bytes: int
    """Disk space that it takes from now on."""


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What a run will do, and what that costs."""

    stages: tuple[StagePlan, ...]
    """The stages in their order."""
    models: tuple[StagePlan, ...]
    """The models, as parts of the stage ``train``."""
    announcement: str
    """All samples in one line."""
    notes: tuple[str, ...]
    """What the recipe leaves to the data, and where model and data do not fit."""
    num_pairs: int
    """Pairs of the source."""
    is_counted: bool
    """Whether all pairs were counted; else their number is extrapolated from the parts that were."""
    num_fine: int
    """Fine clusters, given or chosen by the number of pairs."""
    free_bytes: int
    """Free disk space in the run's folder."""

    @property
    def seconds(self) -> float:
        """Time that is left in all."""
        return sum(stage.seconds or 0.0 for stage in self.stages)

    @property
    def disk_bytes(self) -> int:
        """Disk space that is needed from now on."""
        return sum(stage.disk_bytes for stage in self.stages)

    @property
    def samples(self) -> int:
        """Samples that all models train on."""
        return sum(model.samples for model in self.models)


def plan_run(recipe: Recipe, out: Path, *, trust_encoder: bool = False) -> RunPlan:
    """Return what a run would do and cost; nothing is written into its folder.

    The pairs are counted for some seconds. A few hundred of them are indexed, embedded and trained on for some steps,
    in a folder that is thrown away.

    Raises:
        ModeclipError: The recipe cannot be run.
    """
    from modeclip.training.costs import MEASURED_STEPS, free_bytes, measure, wall_time

    check_trusted(recipe.embed.encoder, trust_encoder)
    check_model(recipe.train.model)
    out = home_path(out)
    folder = _run_folder(recipe, out)
    stages = _Outlook(recipe, folder)
    source = open_source(recipe.data)
    done = stages.look(source)
    jobs = folder.jobs if "cluster" in done and ("controls" in done or not folder.split_controls) else None
    announced = announced_jobs(recipe, out)
    with tempfile.TemporaryDirectory(prefix="modeclip-plan-") as temporary:
        looked = _look(recipe, source, Path(temporary))
        if "index" in done:
            looked = replace(looked, num_pairs=len(Catalog.open(folder.catalog_path)), is_counted=True)
        left = {job.name: _left_of(job) for job in jobs} if jobs else {}
        probes: dict[str, tuple[float, float, int, int]] = {}
        models, seconds = [], []
        for job in announced:
            share = 0.0 if "train" in done else left.get(job.name, 1.0)
            kind = _hash([asdict(replace(job.config, seed=0)), job.threads])
            if share and kind not in probes:
                started = time.monotonic()
                found = measure(
                    replace(job, catalog=str(looked.catalog), where={}, mask=None, out_of_cluster_fraction=0.0),
                    recipe.experts.processes_per_job,
                )
                start_up = time.monotonic() - started - MEASURED_STEPS * found.seconds_per_step
                size = (job.config.engine.keep_checkpoints + 1) * found.checkpoint_bytes + found.model_bytes
                probes[kind] = max(start_up, 0.0), found.seconds_per_step, size, found.model_bytes
            start_up, per_step, size, _ = probes.get(kind, (0.0, 0.0, 0, 0))
            own = start_up + share * (job.last_step - job.first_step) * per_step if share else 0.0
            seconds.append(own)
            models.append(
                StagePlan(
                    name=job.name,
                    is_done=not share,
                    detail=job.role,
                    samples=samples_of(job),
                    seconds=own,
                    disk_bytes=size if share else 0,
                )
            )
    model_bytes = max((size for *_, size in probes.values()), default=0)
    per_sample = max((step / recipe.train.batch_size for _, step, *_ in probes.values()), default=0.0)
    num_fine = recipe.cluster.num_fine or choose_num_fine(looked.num_pairs, recipe.cluster.num_experts)
    bundled = recipe.cluster.num_experts + 1
    pairs = f"{'' if looked.is_counted else 'about '}{looked.num_pairs:,} pairs"
    training = wall_time(announced, seconds, recipe.experts.jobs)
    estimates: dict[str, tuple[str, float | None, int]] = {
        "index": (pairs, looked.num_pairs * looked.index_seconds, int(looked.num_pairs * looked.bytes_per_pair)),
        "embed": (
            recipe.embed.encoder,
            looked.load_seconds + looked.num_pairs * looked.embed_seconds,
            2 * looked.num_pairs * looked.dimension,
        ),
        "cluster": (
            f"{num_fine:,} fine clusters, {recipe.cluster.num_experts} experts",
            _kmeans_seconds(min(looked.num_pairs, recipe.cluster.fit_samples), num_fine, looked.dimension, recipe),
            4 * num_fine * looked.dimension + 12 * looked.num_pairs,
        ),
        "controls": (", ".join(folder.split_controls), None, 4 * looked.num_pairs),
        "train": (f"{len(announced)} models", training, sum(model.disk_bytes for model in models)),
        "bundle": (f"the seed and {bundled - 1} experts", None, bundled * model_bytes),
        "evaluate": (
            f"{looked.num_held:,} images",
            # every model runs its image tower forward, a third of a training step
            looked.num_held * len(announced) * per_sample / 3,
            2 * 4 * looked.num_held * len(announced) * 64,
        ),
        "report": ("report.html", None, 0),
    }
    rows = []
    for name in STAGES:
        if name == "controls" and not folder.split_controls:
            continue
        detail, time_left, size = estimates[name]
        samples = sum(model.samples for model in models) if name == "train" else 0
        if name in done:
            detail, time_left, size = done[name], 0.0, 0
        rows.append(
            StagePlan(
                name=name, is_done=name in done, detail=detail, samples=samples, seconds=time_left, disk_bytes=size
            )
        )
    return RunPlan(
        stages=tuple(rows),
        models=tuple(models),
        announcement=announcement(announced, recipe.train),
        notes=(*choices(recipe, looked.num_pairs), *looked.misfits),
        num_pairs=looked.num_pairs,
        is_counted=looked.is_counted,
        num_fine=num_fine,
        free_bytes=free_bytes(out),
    )


@dataclass(frozen=True, kw_only=True)
class _Look:
    """What a look into a source has shown."""

    catalog: Path
    num_pairs: int
    is_counted: bool
    num_held: int
    index_seconds: float
    bytes_per_pair: float
    load_seconds: float
    embed_seconds: float
    dimension: int
    misfits: tuple[str, ...]


def _look(recipe: Recipe, source: DataSource, folder: Path) -> _Look:
    """Count the pairs of a source for a while, and index and embed some of them."""
    some: list[Sample] = []
    count, finished, deadline = 0, 0, time.monotonic() + LOOK_SECONDS
    for each in source.parts:
        for item in each.read():
            if isinstance(item, Sample):
                count += 1
                if len(some) < max(LOOK_PAIRS, 2 * recipe.train.batch_size):
                    some.append(item)
                elif time.monotonic() > deadline:
                    break
        else:
            finished += 1
            continue
        break
    is_counted = finished == len(source.parts)
    num_pairs = count if is_counted else round(count * len(source.parts) / (finished + 0.5))
    times: list[tuple[int, float, float]] = []
    plain = replace(recipe.data, tasks=(), holdout_fraction=0.0, max_skipped_fraction=1.0)
    for name, number in (("few", 32), ("some", len(some))):
        look = SourcePart(name="look", state="", read=partial(iter, some[:number]))
        started = time.monotonic()
        index(plain, folder / name, source=replace(source, parts=(look,)))
        indexed = time.monotonic()
        embedded = embed(Catalog.open(folder / name), recipe.embed)
        times.append((number, indexed - started, time.monotonic() - indexed))
    (few, _, load), (many, indexing, embedding) = times
    size = sum(
        path.stat().st_size for path in (folder / "some" / "catalog.lance" / "data").rglob("*") if path.is_file()
    )
    return _Look(
        catalog=folder / "some" / "catalog.lance",
        num_pairs=num_pairs,
        is_counted=is_counted,
        num_held=round(recipe.data.holdout_fraction * num_pairs) + _count_tasks(recipe.data),
        index_seconds=indexing / max(many, 1),
        bytes_per_pair=size / max(many, 1),
        load_seconds=load,
        embed_seconds=max(0.0, embedding - load) / max(many - few, 1),
        dimension=embedded.dimension,
        misfits=tuple(misfits(recipe.train.model, Catalog.open(folder / "some"))),
    )


def _count_tasks(config: DataConfig) -> int:
    """Return the number of images in the tasks."""
    tasks = [open_task(config, task) for task in config.tasks]
    return sum(isinstance(item, Sample) for task in tasks for part in task.parts for item in part.read())


def _kmeans_seconds(num_rows: int, num_fine: int, dimension: int, recipe: Recipe) -> float:
    """Return how long a fit takes, after some iterations of a small one: time grows with rows and clusters."""
    rows, clusters, spent = min(num_rows, 4096), min(num_fine, num_rows, 256), []
    x = np.random.default_rng(0).normal(size=(max(rows, clusters), dimension)).astype(np.float32)
    for iterations in (1, 4):
        started = time.monotonic()
        kmeans(x, clusters, start="random", num_iterations=iterations)
        spent.append(time.monotonic() - started)
    per_iteration = max(0.0, spent[1] - spent[0]) / 3
    return per_iteration * recipe.cluster.num_iterations * (num_rows * num_fine) / (len(x) * clusters)


def _left_of(job: TrainJob) -> float:
    return 1.0 - job_status(job).share


class StageRecord(TypedDict):
    """What a finished stage leaves in ``stages/``."""

    name: str
    """Name of the stage."""
    digest: str
    """Hash of everything that decided its result."""
    seconds: float
    """How long it took."""
    detail: str
    """What it did, in one line."""
    peak_memory_gb: float
    """Most memory that the process had while it ran."""
    made: NotRequired[str]
    """Hash of what it has made; none where an earlier version wrote the record."""
    files: NotRequired[dict[str, FileNote]]
    """The files that it wrote, by their name in the run's folder; none where an earlier version ran it."""
    check: NotRequired[str]
    """SHA-256 of the rest of the record; none where an earlier version wrote it."""


OUTPUTS = {
    "cluster": ("clusters/clustering.safetensors", "clusters/cards.json", "clusters/config.json"),
    "controls": ("clusters/one-step/*",),
    "train": ("models/*/job.json", "models/*/done.json", "models/*/log.jsonl"),
    "bundle": ("bundle/**/*",),
    "evaluate": ("results.json", "results/**/*", "features/*"),
    "report": ("report.html",),
}
"""Files that a stage writes, apart from the catalog and the models, which know themselves whether they are whole."""


@dataclass(frozen=True, kw_only=True)
class FileState:
    """Whether a file is as it was written."""

    file: str
    """Its path."""
    state: Literal["whole", "damaged", "not known"]
    """Not known: an earlier version wrote it, and noted nothing of it."""
    detail: str = ""
    """What is wrong with it."""
    advice: str = ""
    """What to do."""


def verify(path: str) -> tuple[FileState, ...]:
    """Hash every file of a run, a catalog, a bundle or a model that something is noted of, and compare.

    Args:
        path: The folder; a catalog may lie in an object store.

    Returns:
        The files, the damaged ones first.

    Raises:
        ModeclipError: There is nothing of that kind in the folder.

    Price: every byte is read, 0.6 s for 1 GB from memory on one core.
    """
    found: dict[str, FileState] = {}

    def add(file: Path | str, what: str, advice: str) -> None:
        if what or str(file) not in found:
            state: Literal["whole", "damaged"] = "damaged" if what else "whole"
            found[str(file)] = FileState(file=str(file), state=state, detail=what, advice=advice if what else "")

    def add_unknown(file: Path | str, advice: str) -> None:
        found.setdefault(str(file), FileState(file=str(file), state="not known", advice=advice))

    path = path if is_url(path) else home(path)
    folder = Path(path)
    paths = RunPaths(folder=folder)
    is_run = not is_url(path) and paths.stages.is_dir()
    again = f"give the same modeclip run again (--out {folder})"
    names = [path] if path.rstrip("/").endswith(".lance") else [join(path, CATALOG), join(path, TASKS)]
    for uri in names:
        if is_url(uri) or Path(uri).is_dir():
            _verify_catalog(uri, add, add_unknown, again if is_run else "")
    if not is_url(path):
        for record in sorted(paths.stages.glob("*.json")):
            _verify_stage(record, folder, add, again)
        for done in sorted({*folder.glob("models/*/done.json"), *folder.glob("done.json")}):
            advice = again if is_run else "give the command that trained it again"
            _verify_model(done.parent, add, add_unknown, advice)
        for manifest in [place / MANIFEST_FILE for place in (folder, paths.bundle) if (place / MANIFEST_FILE).exists()]:
            advice = again if is_run else "get the bundle again"
            _verify_bundle(manifest, add, advice)
        if (paths.clusters / CLUSTERING_FILE).exists() and not is_run:
            try:
                ClusterResult.load(paths.clusters)
                add_unknown(paths.clusters / CLUSTERING_FILE, "")
            except ModeclipError as error:
                add(paths.clusters / CLUSTERING_FILE, str(error), f"modeclip cluster {folder}")
    if not found:
        raise ModeclipError(f"{path}: no run, catalog, bundle or finished model in it; correct the path")
    order = {"damaged": 0, "not known": 1, "whole": 2}
    return tuple(sorted(found.values(), key=lambda one: (order[one.state], one.file)))


def _verify_catalog(
    uri: str, add: Callable[[str, str, str], None], add_unknown: Callable[[str, str], None], again: str
) -> None:
    try:
        dataset = open_dataset(uri)
        damaged = {one["file"]: one for one in find_damaged(dataset, deep=True)}
    except DamagedError as error:
        add(uri, str(error), again or "modeclip index --replace")
        return
    except (OSError, ValueError) as error:
        if not is_url(uri):
            add(uri, f"no catalog ({str(error).splitlines()[0]})", again or "modeclip index")
        return
    unknown_names = set(unknown_files(dataset))
    for name in data_files(dataset):
        if name not in damaged and name not in unknown_names:
            add(f"{uri}/{name}", "", "")
    for name, one in damaged.items():
        columns = f"; it holds {', '.join(one['columns'])}" if one["columns"] else ""
        remedy = remedy_of(one["columns"][0], uri) if one["columns"] else "no need: only an older version needed it"
        add(f"{uri}/{name}", one["what"] + columns, again or remedy)
    for name in unknown_names:
        add_unknown(f"{uri}/{name}", "the next command that writes to the catalog notes it")


def _verify_stage(path: Path, root: Path, add: Callable[[Path, str, str], None], again: str) -> None:
    try:
        record = _read_record(path, again)
    except DamagedError as error:
        add(path, str(error).removeprefix(f"{path}: ").removesuffix(f"; {again}"), again)
        return
    add(path, "", "")
    is_edited = record["name"] == "bundle" and RunFolder(folder=root).is_edited
    for name, note in ({} if is_edited else record.get("files", {})).items():
        what = find_damage(root / name, note, deep=True)
        if what != "missing" or not name.startswith("features/"):
            add(root / name, what, again)


def _verify_model(
    folder: Path, add: Callable[[Path, str, str], None], add_unknown: Callable[[Path, str], None], advice: str
) -> None:
    done = folder / "done.json"
    try:
        result = read_json(done, TrainResult, advice)
        TrainJob.load(folder / JOB_FILE)
    except DamagedError as error:
        add(done, str(error).removeprefix(f"{done}: ").removesuffix(f"; {advice}"), advice)
        return
    add(done, "", "")
    for name, note in result.files.items():
        what = find_damage(folder / name, note, deep=True)
        if what != "missing" or "/" not in name:  # a checkpoint may be removed
            add(folder / name, what, advice)
    if not result.files:
        add_unknown(folder / WEIGHTS_FILE, "")


def _verify_bundle(path: Path, add: Callable[[Path, str, str], None], advice: str) -> None:
    try:
        manifest, _ = read_manifest(path.parent)
    except ModeclipError as error:
        add(path, str(error), advice)
        return
    add(path, "", "")
    for name, wanted in manifest.sha256.items():
        file = path.parent / name
        what = "missing" if not file.is_file() else "" if hash_file(file) == wanted else "its bytes are not those noted"
        add(file, what, advice)


def _read_record(path: Path, again: str) -> StageRecord:
    record = read_json(path, StageRecord, again)
    if record.get("check") not in (None, _hash_record(record)):
        raise DamagedError(f"{path}: damaged (its content is not what was written); {again}")
    return record


def _hash_record(record: StageRecord) -> str:
    content = {name: value for name, value in record.items() if name != "check"}
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class _Stages:
    """The stages of a recipe, each a method that does the work and returns one line about it."""

    def __init__(self, recipe: Recipe, folder: RunFolder) -> None:
        self.recipe, self.folder = recipe, folder
        self.digests: dict[str, str] = {}

    def run_all(self, source: DataSource) -> None:
        recipe, folder = self.recipe, self.folder
        state = [recipe.data.flat() | {"workers": 1}, source_state(recipe.data, source)]
        self.mend_catalogs()
        if recipe.data.holdout_fraction:
            state.append("divided by images")  # by keys in earlier versions
        made = _Made(folder)
        self.stage("index", partial(self.index, source), state, made.rows)
        self.stage("embed", self.embed, [asdict(recipe.embed), self.digests["index"]], partial(made.columns, COLUMN))
        files = [folder.clusters / name for name in (CLUSTERING_FILE, CARDS_FILE)]
        clusters = partial(made.columns, "fine_cluster", "expert", files=files)
        self.keep_num_fine()
        self.stage("cluster", self.cluster, [asdict(self.recipe.cluster), self.digests["embed"]], clusters)
        self.note_choices()
        self.controls_stage()
        train = asdict(recipe.train.decided())
        train["engine"]["save_every"] = "20s"  # it decides nothing; a constant keeps the digests of earlier versions
        training = [train, asdict(recipe.experts), folder.fingerprint]
        self.stage("train", self.train, training, made.models)
        bundle = [asdict(recipe.evaluate), self.digests["train"]]
        self.stage("bundle", self.bundle, bundle, made.bundle)
        self.stage("evaluate", self.evaluate, [recipe.name, self.digests["bundle"]], made.results)
        self.stage("report", self.report, [version("modeclip"), self.digests["evaluate"]], made.report)

    def keep_num_fine(self) -> None:
        """Let a folder of an earlier version, which had another default, keep its number of fine clusters."""
        before = self.recipe.cluster
        if before.num_fine is None and before.num_experts <= FINE_BEFORE <= before.fit_samples:
            before = replace(before, num_fine=FINE_BEFORE)
            record = self.read_record("cluster")
            inputs = _plain([asdict(before), self.digests["embed"]])
            if record is not None and record["digest"] == _hash([STAGE_FORMAT, "cluster", inputs]):
                self.recipe = replace(self.recipe, cluster=before)

    def note_choices(self) -> None:
        """Write the recipe again, with what the data have decided."""
        found = replace(self.recipe.cluster, num_fine=self.folder.clustering.num_fine)
        write_recipe(replace(self.recipe, cluster=found), self.folder)

    def controls_stage(self) -> None:
        """Do the stage of the controls' columns; without any, leave no record of an earlier one."""
        if controls := self.folder.split_controls:
            files = [self.folder.clusters / ONE_STEP_FOLDER / CLUSTERING_FILE] if "one-step" in controls else []
            made = partial(_Made(self.folder).columns, *map(CONTROL_COLUMNS.__getitem__, controls), files=files)
            self.stage("controls", self.controls, [controls, self.digests["cluster"]], made)
        else:
            (self.folder.stages / "controls.json").unlink(missing_ok=True)

    def stage(self, name: str, work: Callable[[], str], inputs: list[Any], made: Callable[[], str | None]) -> None:
        """Do a stage unless its record says that it was done from the same inputs, and what it made is still there.

        Args:
            name: Name of the stage.
            work: Does it and returns a line about it.
            inputs: What decides its result.
            made: Returns a hash of what it has made; None where something is missing.
        """
        self.digests[name] = digest = _hash([STAGE_FORMAT, name, _plain(inputs)])
        path = self.folder.stages / f"{name}.json"
        record = self.read_record(name)
        is_mended = record is not None and self.remove_damaged(name, record)
        if record is not None and record["digest"] == digest and not is_mended and (state := made()) is not None:
            if "made" not in record:  # an earlier version wrote it
                record["made"] = state
                record["check"] = _hash_record(record)
                write_json(path, record, indent=2)
            if state in (record["made"], EDITED):
                log(f"{name:<9} done: {record['detail']}")
                return
        path.parent.mkdir(exist_ok=True)
        if name != "index" or path.is_dir():  # an interrupted index is known by its rows; others have side files
            remove(path)
        started = time.monotonic()
        with PeakMemory() as peak:
            detail = work()
        seconds = time.monotonic() - started
        root = self.folder.folder
        outputs = sorted({path for pattern in OUTPUTS.get(name, ()) for path in root.glob(pattern)})
        record = StageRecord(
            name=name,
            digest=digest,
            seconds=round(seconds, 2),
            detail=detail,
            peak_memory_gb=round(peak.gb, 3),
            files=note_files(root, outputs),
        )
        if (state := made()) is not None:
            record["made"] = state
        record["check"] = _hash_record(record)
        write_json(path, record, indent=2)
        return_memory()
        log(f"{name:<9} {seconds:6.1f} s: {detail}")

    def read_record(self, name: str) -> StageRecord | None:
        """Return the record of a stage; None where there is none, or where it is damaged: the stage is done again."""
        path = self.folder.stages / f"{name}.json"
        again = f"the stage {name} is done again"
        try:
            return _read_record(path, again)
        except DamagedError as error:
            if path.exists():
                log(str(error))
            return None

    def remove_damaged(self, name: str, record: StageRecord) -> bool:
        """Remove the files of a stage that are not as it wrote them; return whether the stage must be done again."""
        if name == "bundle" and self.folder.is_edited:
            return False
        is_mended = False
        for file, note in record.get("files", {}).items():
            path = self.folder.folder / file
            is_kept = file.startswith("features/") and not path.exists()  # the cache may be emptied
            if not is_kept and (what := find_damage(path, note)):
                log(f"{path}: {what}; the stage {name} is done again")
                remove(path)
                is_mended = True
        return is_mended

    def mend_catalogs(self) -> None:
        """Say which columns of the catalogs are damaged, and remove what only their older versions needed.

        A catalog whose newest version cannot be read is removed, and made again.
        """
        for path in (self.folder.catalog_path, self.folder.tasks_path):
            if not path.is_dir():
                continue
            try:
                damaged = find_damaged(open_dataset(str(path)))
            except DamagedError as error:
                log(f"{error}; it is made again")
                remove(path)
            except (OSError, ValueError):  # an index that was stopped; it goes on
                continue
            else:
                remove_leftovers(str(path), damaged)
                for found in damaged:
                    if found["columns"]:
                        columns = ", ".join(found["columns"])
                        log(f"{path / found['file']}: {found['what']}; what it holds is made again: {columns}")

    def index(self, source: DataSource) -> str:
        result = index(self.recipe.data, self.folder.folder, replace=True, source=source)
        held_out = sum(images for _, images in result.tasks.values())
        skipped = ", ".join(f"{count:,} {cause}" for cause, count in sorted(result.skipped.items())) or "none"
        return (
            f"{result.num_samples:,} pairs with {result.num_captions:,} captions from {result.kind}; "
            f"{held_out:,} images in {len(result.tasks)} held-out tasks; skipped: {skipped}"
        )

    def embed(self) -> str:
        result = embed(Catalog.open(self.folder.catalog_path), self.recipe.embed)
        return f"{result.num_captions:,} captions as {result.dimension} numbers by {Path(result.encoder).name}"

    def cluster(self) -> str:
        result = cluster(Catalog.open(self.folder.catalog_path), self.recipe.cluster)
        result.save(self.folder.clusters)
        sizes = ", ".join(f"{card.size:,}" for card in result.experts)
        return f"{len(result.fine):,} fine clusters in {len(result.experts)} experts of {sizes} pairs"

    def controls(self) -> str:
        sizes = self.folder.add_controls()
        return "; ".join(f"{column} of {', '.join(f'{n:,}' for n in counts)} pairs" for column, counts in sizes.items())

    def train(self) -> str:
        jobs = self.folder.jobs
        for line in misfits(self.recipe.train.model, self.folder.catalog):
            log(line)
        for job in jobs:
            if not (Path(job.folder) / JOB_FILE).is_file():
                job.save()
        results = self.folder.train(jobs, stop_on_failure=True)
        return f"{len(jobs)} models, {sum(result.samples for result in results.values()):,} samples in all"

    def bundle(self) -> str:
        before = ("index", "embed", "cluster", "train")
        lineage = {
            "stages": {stage: self.digests[stage] for stage in before},
            "recipe": self.recipe.plain(),
        }
        self.folder.write_bundle(name=self.recipe.name, lineage=lineage)
        return f"seed and {self.folder.clustering.num_experts} experts, rule {self.recipe.evaluate.rule}"

    def evaluate(self) -> str:
        results = self.folder.evaluate(self.recipe.name, batch_size=self.recipe.evaluate.batch_size)
        rows, tasks = len(results["models"]), len(results["tasks"])
        return f"{rows} rows on {tasks} tasks" if tasks else "no held-out tasks: nothing was evaluated"

    def report(self) -> str:
        from modeclip.pages.run_report import write_report

        return str(write_report(self.folder.folder))


class _MissingError(Exception):
    """A stage that is not done, where only a look is taken."""


class _Outlook(_Stages):
    """Finds out which stages are done, and changes nothing."""

    def look(self, source: DataSource) -> dict[str, str]:
        """Return what the stages that are done have said, by their names; the first one that is not ends the look."""
        self.done: dict[str, str] = {}
        with suppress(_MissingError):
            self.run_all(source)
        return self.done

    def stage(self, name: str, work: Callable[[], str], inputs: list[Any], made: Callable[[], str | None]) -> None:
        """Note a stage that is done; leave at the first that is not."""
        del work
        self.digests[name] = digest = _hash([STAGE_FORMAT, name, _plain(inputs)])
        record = self.read_record(name)
        state = made() if record is not None and record["digest"] == digest else None
        if record is None or state is None or state not in (record.get("made", state), EDITED):
            raise _MissingError
        self.done[name] = record["detail"]

    def mend_catalogs(self) -> None:
        """Leave the catalogs as they are."""

    def note_choices(self) -> None:
        """Leave the recipe as it is."""

    def controls_stage(self) -> None:
        """Look at the stage of the controls, if there is one."""
        if self.folder.split_controls:
            super().controls_stage()


@dataclass(frozen=True)
class _Made:
    """What the stages have made, each as a hash; None where it is not there or cannot be read."""

    run: RunFolder

    def rows(self) -> str | None:
        """Return the state of the pairs: those that are trained on, and those that are held out."""
        catalogs = [_open(self.run.catalog_path), _open(self.run.tasks_path)]
        if catalogs[0] is None or (catalogs[1] is None and self.run.tasks_path.exists()):
            return None
        if any(catalog and catalog.damaged.keys() & PAIR_COLUMNS.keys() for catalog in catalogs):
            return None
        return _hash([catalog and catalog.fingerprint for catalog in catalogs])

    def columns(self, *names: str, files: Sequence[Path] = ()) -> str | None:
        """Return the state of columns, which rows they belong to and what made them, and of files beside them."""
        catalog = _open(self.run.catalog_path)
        if catalog is None or not set(names) <= set(catalog.columns) or missing_fragments(catalog.dataset, names):
            return None
        if not all(path.is_file() for path in files):
            return None
        return _hash([catalog.fingerprint, [catalog.facts(name) for name in names], list(map(hash_file, files))])

    def models(self) -> str | None:
        """Return the state of the models: what each was trained from."""
        jobs = self.run.jobs
        done = [TrainResult.read(job) is not None and (Path(job.folder) / WEIGHTS_FILE).is_file() for job in jobs]
        return _hash({job.name: job.digest for job in jobs}) if all(done) else None

    def bundle(self) -> str | None:
        """Return the state of the bundle: which models are in it, or that a user has changed it since."""
        lineage = self.run.lineage
        if not lineage:
            return None
        return EDITED if lineage.get(EDITS) else _hash([lineage.get("jobs"), lineage.get("stages")])

    def results(self) -> str | None:
        """Return the state of the table of results."""
        return hash_file(self.run.results)[:16] if self.run.results.is_file() else None

    def report(self) -> str | None:
        """Return whether there is a page; whoever writes it again writes the same."""
        return "there" if self.run.report.is_file() else None


def _open(path: Path) -> Catalog | None:
    try:
        return Catalog.open(path)
    except ModeclipError:
        return None


def _hash(content: Any) -> str:
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _folder_beside(recipe: Path, value: str) -> str:
    """Return the name of a model with its path taken from the recipe's folder, if it is a folder there."""
    prefixes = ("local-dir:", *(f"{known}:" for known in PREFIXES))
    value = expand_homes(value)
    prefix = next((known for known in prefixes if value.startswith(known)), "")
    folder = recipe.parent / value.removeprefix(prefix)
    return f"{prefix}{folder}" if folder.is_dir() else value


def _check_fields(section: type, content: dict[str, Any], place: tuple[str, ...]) -> None:
    """Raise for the first field that a section of the recipe does not have."""
    types = get_type_hints(section)
    for name, value in content.items():
        if name not in types:
            raise unknown("field", ".".join((*place, str(name))), types)
        if is_dataclass(types[name]) and isinstance(value, dict):
            _check_fields(types[name], value, (*place, name))


def _plain(value: Any) -> Any:
    """Return a value as JSON and YAML know it: tuples as lists, keys as text."""
    return json.loads(json.dumps(value))


def _machine() -> dict[str, Any]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor() or platform.machine()
    known = versions()
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "python": platform.python_version(),
        "torch": known["torch"],
        "open_clip": known["open_clip_torch"],
        "modeclip": known["modeclip"],
    }
