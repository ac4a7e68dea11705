"""What a run will do and cost, before it does anything: models, samples, seconds, disk.

The pairs of the source are counted for some seconds; a few hundred of them are indexed, embedded and trained on for
some steps, in a folder that is thrown away.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from modeclip.clustering.class_selection import read_names
from modeclip.clustering.embedding import embed
from modeclip.clustering.fitting import (
    choose_num_fine,
)
from modeclip.clustering.kmeans import kmeans
from modeclip.data.catalog import Catalog
from modeclip.data.indexing import index
from modeclip.data.samples import Sample
from modeclip.data.selection import ALL
from modeclip.data.sources import DataConfig, DataSource, SourcePart, open_source, open_task
from modeclip.pipeline.recipe import Recipe, hash_of, plain_of
from modeclip.pipeline.run_folder import EDITED
from modeclip.pipeline.stages import (
    LOOK_PAIRS,
    LOOK_SECONDS,
    STAGE_FORMAT,
    STAGES,
    Stages,
    announced_jobs,
    announcement,
    check_recipe,
    choices,
    open_run,
    samples_of,
)
from modeclip.system.paths import home_path
from modeclip.training.choosing import Fit, with_model
from modeclip.training.experts import pin_jobs
from modeclip.training.jobs import AUTO, TrainJob, job_name
from modeclip.training.status import job_status

ONE_STEP_SECONDS, CAPTION_SECONDS, CARD_SECONDS, REPORT_SECONDS = 2e-4, 2e-5, 4e-3, 1.0
"""What a pair of the control without two steps, a pair of the bundle's captions, and a fine cluster on the report take,
and the rest of the report: as on the demo's 23,537 pairs and 256 clusters (2 cores)."""
BUNDLE_SECONDS = 4e-9
"""What a byte of a model takes to be hashed and copied."""


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

    check_recipe(recipe, trust_encoder=trust_encoder)
    out = home_path(out)
    folder = open_run(recipe, out)
    stages = _Outlook(recipe, folder)
    source = open_source(recipe.data)
    done = stages.look(source)
    folder = stages.folder  # with what a curation that is done has selected
    named = recipe.experts.for_classes
    has_columns = ("controls" in done or not folder.split_controls) and ("names" in done or not named)
    if "cluster" in done and has_columns:
        jobs = folder.jobs
    elif "index" in done and ("curate" in done or not recipe.curate):
        # models that read no clusters may be trained already
        known = announced_jobs(stages.recipe, out, folder.selection)
        jobs = pin_jobs([job for job in known if not job.where and not job.mask], Catalog.open(folder.catalog_path))
    else:
        jobs = []
    with tempfile.TemporaryDirectory(prefix="modeclip-plan-") as temporary:
        looked = _look(recipe, source, Path(temporary))
        train = with_model(stages.recipe.train, looked.catalog, recipe.experts.start, folder.models / job_name("seed"))
        fit = Fit.of(train.model, Catalog.open(looked.catalog))
        announced = announced_jobs(replace(stages.recipe, train=train), out, folder.selection)
        if "index" in done:
            looked = replace(looked, num_pairs=len(Catalog.open(folder.catalog_path)), is_counted=True)
        left = {job.name: _left_of(job) for job in jobs}
        probes: dict[str, tuple[float, float, int, int]] = {}
        models, seconds = [], []
        for job in announced:
            share = 0.0 if "train" in done else left.get(job.name, 1.0)
            kind = hash_of([asdict(replace(job.config, seed=0)), job.threads])
            if share and kind not in probes:
                started = time.monotonic()
                found = measure(
                    replace(
                        job,
                        catalog=str(looked.catalog),
                        config=replace(job.config, probability=None, captions=None),
                        where={},
                        mask=None,
                        selection=ALL,
                        out_of_cluster_fraction=0.0,
                    ),
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
    bundled = recipe.cluster.num_experts + 1 + bool(named)
    pairs = f"{'' if looked.is_counted else 'about '}{looked.num_pairs:,} pairs"
    training = wall_time(announced, seconds, recipe.experts.jobs)
    estimates: dict[str, tuple[str, float | None, int]] = {
        "index": (pairs, looked.num_pairs * looked.index_seconds, int(looked.num_pairs * looked.bytes_per_pair)),
        "embed": (
            recipe.embed.encoder,
            looked.load_seconds + looked.num_pairs * looked.embed_seconds,
            2 * looked.num_pairs * looked.dimension,
        ),
        "curate": (", ".join(step.name for step in recipe.curate), None, 2 * len(recipe.curate) * looked.num_pairs),
        "cluster": (
            f"{num_fine:,} fine clusters, {recipe.cluster.num_experts} experts",
            _kmeans_seconds(min(looked.num_pairs, recipe.cluster.fit_samples), num_fine, looked.dimension, recipe),
            4 * num_fine * looked.dimension + 12 * looked.num_pairs,
        ),
        "controls": (
            ", ".join(folder.split_controls),
            ("one-step" in folder.split_controls) * looked.num_pairs * ONE_STEP_SECONDS,
            4 * looked.num_pairs,
        ),
        "names": (f"{len(read_names(named))} class names" if named else "", looked.load_seconds, looked.num_pairs),
        "train": (f"{len(announced)} models", training, sum(model.disk_bytes for model in models)),
        "bundle": (
            f"the seed and {bundled - 1} experts",
            bundled * model_bytes * BUNDLE_SECONDS + looked.num_pairs * CAPTION_SECONDS,
            bundled * model_bytes,
        ),
        "evaluate": (
            f"{looked.num_held:,} images",
            # every model runs its image tower forward, a third of a training step
            looked.num_held * len(announced) * per_sample / 3,
            2 * 4 * looked.num_held * len(announced) * 64,
        ),
        "report": ("report.html", REPORT_SECONDS + num_fine * CARD_SECONDS, 0),
    }
    notes = [
        *([fit.reason] if recipe.train.model == AUTO else []),
        *choices(replace(recipe, train=train), looked.num_pairs),
    ]
    rows = []
    for name in STAGES:
        is_wanted = {"controls": folder.split_controls, "curate": recipe.curate, "names": named}
        if not is_wanted.get(name, True):
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
        announcement=announcement(announced, train),
        notes=(*notes, *fit.misfits),
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


class _MissingError(Exception):
    """A stage that is not done, where only a look is taken."""


class _Outlook(Stages):
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
        self.digests[name] = digest = hash_of([STAGE_FORMAT, name, plain_of(inputs)])
        record = self.read_record(name)
        state = made() if record is not None and record["digest"] == digest else None
        if record is None or state is None or state not in (record.get("made", state), EDITED):
            raise _MissingError
        self.done[name] = record["detail"]

    def mend_catalogs(self) -> None:
        """Leave the catalogs as they are."""

    def note_choices(self) -> None:
        """Leave the recipe as it is."""

    def curate_stage(self) -> list[str]:
        """Look at the stage of the methods, if there are some."""
        return super().curate_stage() if self.recipe.curate else []

    def controls_stage(self) -> None:
        """Look at the stage of the controls, if there is one."""
        if self.folder.split_controls:
            super().controls_stage()

    def names_stage(self) -> list[str]:
        """Look at the stage of the class names, if there are some."""
        return super().names_stage() if self.recipe.experts.for_classes else []
