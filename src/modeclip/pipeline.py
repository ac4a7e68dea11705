"""A recipe -> the stages of the method, run in order into one folder; what is done and not stale is not done again.

    index -> embed -> cluster -> controls -> train -> bundle -> evaluate -> report

The stage ``controls`` is there only where the recipe asks for controls that need a column. Each stage leaves a record
in ``stages/`` with the digest of all that decided its result: its own settings, the digests of the stages before it,
the state of the source. The same command again runs the stages whose digest has changed or whose output is gone. A run
that is killed at any moment continues with the same numbers, because no stage leaves anything half-written that a
later run would take for whole.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from hashlib import sha256
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from modeclip.clustering.controls import CONTROL_COLUMNS, ONE_STEP_FOLDER, add_controls
from modeclip.clustering.embedding import EmbedConfig, embed
from modeclip.clustering.fitting import ClusterConfig, Clustering, cluster
from modeclip.data.catalog import Catalog
from modeclip.data.indexing import index
from modeclip.data.sources import relative_to, source_state
from modeclip.data.sources.options import DataConfig
from modeclip.errors import ModeclipError, unknown
from modeclip.evaluation.run_evaluation import EvaluateConfig, TrainedModel, evaluate
from modeclip.mixture.bundling import CLUSTERS, assemble_bundle, encoder_of, versions
from modeclip.models.clip import check_model
from modeclip.models.encoders import IMAGE_PREFIXES, PREFIXES
from modeclip.models.feature_cache import FeatureCache
from modeclip.system.console import log
from modeclip.system.files import only_process, write_atomically, writing
from modeclip.system.memory import PeakMemory, return_memory
from modeclip.training.experts import ExpertsConfig, fingerprint_of, pin_jobs, plan_jobs, seed_model
from modeclip.training.jobs import TrainConfig, TrainJob
from modeclip.training.launching import run_jobs
from modeclip.training.trainer import job_rows

STAGES = ("index", "embed", "cluster", "controls", "train", "bundle", "evaluate", "report")
FEATURES = "features"
"""Folder of what the models saw in the held-out images, so that other rules are scored without running a model."""
STAGE_FORMAT = 2  # raise it when a stage starts to produce something else from the same settings


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
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """Templates and routing rule."""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a finished run offers."""

    folder: Path
    """The run's folder."""
    results: dict[str, Any]
    """Content of ``results.json``."""
    report: Path
    """The report."""
    bundle: Path
    """The bundle."""


def demo_recipe() -> Path:
    """Return the path of the recipe that ``modeclip demo`` runs."""
    return Path(str(files("modeclip") / "recipes" / "demo.yaml"))


def load_recipe(path: Path) -> Recipe:
    """Read a recipe from YAML; paths in it are relative to its folder.

    Raises:
        ModeclipError: It is missing, is no YAML, or a field is unknown, missing or of a wrong type.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModeclipError(f"recipe {path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ModeclipError(f"recipe {path}: no valid YAML: {' '.join(str(error).split())}") from None
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
    """Turn what YAML gave into a recipe, every field checked.

    Raises:
        ModeclipError: A field is unknown, missing, of a wrong type or out of its range.
    """
    from pydantic import TypeAdapter, ValidationError

    if not isinstance(content, dict):
        raise ModeclipError(f"expected sections such as `data:`, got {type(content).__name__}")
    _check_fields(Recipe, content, ())
    try:
        return TypeAdapter(Recipe).validate_python(content)
    except ValidationError as error:
        problem = error.errors()[0]
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "value_error":  # a range that the section itself checks; its message names the field
        raise ModeclipError(problem["msg"].removeprefix("Value error, "))
    got = "" if problem["type"] == "missing" else f", got {problem['input']!r}"
    raise ModeclipError(f"{place}: {problem['msg']}{got}")


def run(recipe: Recipe, out: Path) -> RunResult:
    """Run what is missing or stale of a recipe's stages.

    Args:
        recipe: What to do.
        out: The run's folder; made if it is not there.

    Raises:
        ModeclipError: A stage cannot do its work, or another process is running in the folder.
    """
    check_model(recipe.train.model)  # at once, not after an hour of embedding
    if recipe.embed.encoder.partition(":")[0] in IMAGE_PREFIXES:
        raise ModeclipError(
            f"embed.encoder {recipe.embed.encoder!r} looks at images, but tasks are routed by class names: give an"
            " encoder of texts, or use the commands modeclip embed and modeclip cluster, which take all of them"
        )
    out.mkdir(parents=True, exist_ok=True)
    with only_process(out), writing(out):
        write_atomically(out / "recipe.yaml", yaml.safe_dump(_plain(asdict(recipe)), sort_keys=False))
        _Run(recipe, out).all_stages()
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    return RunResult(folder=out, results=results, report=out / "report.html", bundle=out / "bundle")


class _Run:
    """The stages of one run, each a method that does the work and returns one line about it."""

    def __init__(self, recipe: Recipe, out: Path) -> None:
        self.recipe, self.out = recipe, out
        self.digests: dict[str, str] = {}

    def all_stages(self) -> None:
        recipe = self.recipe
        self.stage(
            "index", self.index, [asdict(replace(recipe.data, workers=1)), source_state(recipe.data)], "catalog.lance"
        )
        self.stage("embed", self.embed, [asdict(recipe.embed), self.digests["index"]], "catalog.lance")
        self.stage("cluster", self.cluster, [asdict(recipe.cluster), self.digests["embed"]], "clusters")
        self.controls_stage()
        training = [asdict(recipe.train), asdict(recipe.experts), self.fingerprint]
        self.stage("train", self.train, training, f"models/{self.jobs()[0].name}/done.json")
        self.stage("bundle", self.bundle, [asdict(recipe.evaluate), self.digests["train"]], "bundle/mode.json")
        self.stage("evaluate", self.evaluate, [recipe.name, self.digests["bundle"]], "results.json")
        self.stage("report", self.report, [version("modeclip"), self.digests["evaluate"]], "report.html")

    def controls_stage(self) -> None:
        """Do the stage of the controls' columns; without any, leave no record of an earlier one."""
        if self.split_controls:
            output = f"{CLUSTERS}/{ONE_STEP_FOLDER}" if "one-step" in self.split_controls else CLUSTERS
            self.stage("controls", self.controls, [self.split_controls, self.digests["cluster"]], output)
        else:
            (self.out / "stages" / "controls.json").unlink(missing_ok=True)

    @property
    def split_controls(self) -> list[str]:
        """The controls that need a column, none where only some experts are trained."""
        experts = self.recipe.experts
        return [] if experts.only else sorted(CONTROL_COLUMNS.keys() & set(experts.controls))

    def stage(self, name: str, work: Callable[[], str], inputs: list[Any], output: str) -> None:
        """Do a stage unless its record says that it was done from the same inputs."""
        text = json.dumps([STAGE_FORMAT, name, _plain(inputs)], sort_keys=True)
        self.digests[name] = digest = sha256(text.encode()).hexdigest()[:16]
        path = self.out / "stages" / f"{name}.json"
        record = _read_record(path)
        if record is not None and record["digest"] == digest and (self.out / output).exists():
            log(f"{name:<9} done: {record['detail']}")
            return
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        started = time.monotonic()
        with PeakMemory() as peak:
            detail = work()
        seconds = time.monotonic() - started
        content = {"name": name, "digest": digest, "seconds": round(seconds, 2), "detail": detail}
        content["peak_memory_gb"] = round(peak.gb, 3)
        write_atomically(path, json.dumps(content, indent=2) + "\n")
        return_memory()
        log(f"{name:<9} {seconds:6.1f} s: {detail}")

    def index(self) -> str:
        result = index(self.recipe.data, self.out, replace=True)
        held_out = sum(images for _, images in result.tasks.values())
        skipped = ", ".join(f"{count:,} {cause}" for cause, count in sorted(result.skipped.items())) or "none"
        return (
            f"{result.num_samples:,} pairs with {result.num_captions:,} captions from {result.kind}; "
            f"{held_out:,} images in {len(result.tasks)} held-out tasks; skipped: {skipped}"
        )

    def embed(self) -> str:
        result = embed(self.catalog, self.recipe.embed)
        return f"{result.num_captions:,} captions as {result.dimension} numbers by {Path(result.encoder).name}"

    def cluster(self) -> str:
        result = cluster(self.catalog, self.recipe.cluster)
        result.save(self.out / CLUSTERS)
        sizes = ", ".join(f"{card.size:,}" for card in result.experts)
        return f"{len(result.fine):,} fine clusters in {len(result.experts)} experts of {sizes} pairs"

    def controls(self) -> str:
        sizes = add_controls(self.catalog, self.split_controls, self.recipe.cluster, self.out / CLUSTERS)
        return "; ".join(f"{column} of {', '.join(f'{n:,}' for n in counts)} pairs" for column, counts in sizes.items())

    def train(self) -> str:
        experts = self.recipe.experts
        jobs = self.jobs()
        for job in jobs:
            job_rows(job, self.catalog)  # an expert with too few pairs is an error before the seed is trained
        results = run_jobs(jobs, experts.jobs, processes=experts.processes_per_job, stop_on_failure=True)
        samples = sum(result.samples for result in results.values())
        return f"{len(jobs)} models, {samples:,} samples in all"

    @cached_property
    def fingerprint(self) -> str:
        """Return what the training data and, if it is a folder, the start model are known by."""
        return fingerprint_of(self.catalog, self.clustering(), self.recipe.train.model)

    def jobs(self) -> list[TrainJob]:
        recipe, models, clustering = self.recipe, self.out / "models", self.clustering()
        jobs = plan_jobs(
            self.out / "catalog.lance",
            self.fingerprint,
            models,
            clustering.num_experts,
            recipe.train,
            recipe.experts,
            ranges=clustering.range_of_expert,
        )
        return pin_jobs(jobs, self.catalog)

    def models(self) -> list[TrainedModel]:
        """Return the finished models, the seed among them also where it was given."""
        models = [model for job in self.jobs() if (model := TrainedModel.of(job)) is not None]
        if all(model.role != "seed" for model in models):
            models.append(TrainedModel.given(self.seed))
        return models

    @property
    def seed(self) -> Path:
        """The model folder of the seed, trained here or given."""
        return seed_model(self.out / "models", self.recipe.train, self.recipe.experts)

    def bundle(self) -> str:
        config, before = self.recipe.evaluate, ("index", "embed", "cluster", "train")
        lineage = {
            "stages": {stage: self.digests[stage] for stage in before},
            "recipe": _plain(asdict(self.recipe)),
        }
        assemble_bundle(self.out, self.jobs(), config, seed=self.seed, name=self.recipe.name, lineage=lineage)
        return f"seed and {self.clustering().num_experts} experts, rule {config.rule}"

    def evaluate(self) -> str:
        path = self.out / "tasks.lance"
        base = {
            "name": self.recipe.name,
            "date": datetime.now(UTC).date().isoformat(),
            "seed": self.recipe.train.seed,
            "machine": _machine(),
        }
        if path.exists():
            one_step, cache = self.out / CLUSTERS / ONE_STEP_FOLDER, FeatureCache(self.out / FEATURES)
            scores = evaluate(
                Catalog.open(path),
                self.models(),
                self.clustering(),
                encoder_of(self.catalog),
                self.recipe.evaluate,
                one_step=Clustering.load(one_step) if "one-step" in self.split_controls else None,
                cache=cache,
            )
            cache.remove_unused()
        else:
            scores = {"tasks": [], "chance": {}, "models": [], "routing": {}}
        write_atomically(self.out / "results.json", json.dumps(base | scores, indent=1) + "\n")
        rows, tasks = len(scores["models"]), len(scores["tasks"])
        return f"{rows} rows on {tasks} tasks" if tasks else "no held-out tasks: nothing was evaluated"

    def report(self) -> str:
        from modeclip.pages.run_report import write_report

        return str(write_report(self.out))

    @property
    def catalog(self) -> Catalog:
        return Catalog.open(self.out / "catalog.lance")

    def clustering(self) -> Clustering:
        return Clustering.load(self.out / CLUSTERS)


def stage_records(out: Path) -> list[dict[str, Any]]:
    """Return the records of a run's finished stages, in order: name, seconds, peak memory, one line of detail."""
    records = (_read_record(out / "stages" / f"{name}.json") for name in STAGES)
    return [record for record in records if record is not None]


def _read_record(path: Path) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    return content


def _folder_beside(recipe: Path, value: str) -> str:
    """Return the name of a model with its path taken from the recipe's folder, if it is a folder there."""
    prefixes = ("local-dir:", *(f"{known}:" for known in PREFIXES))
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
