"""The stages of a recipe do the whole method in one folder.

    index -> embed -> curate -> cluster -> controls -> names -> train -> bundle -> evaluate -> report

Each stage leaves a record in ``stages/`` with two hashes. One is of everything that decided its result: its own
settings, the digests of the stages before it, the state of the source. The other is of what it made: rows and columns
of the catalog, files. The same command again runs only the stages whose inputs have changed, or whose output is gone or
is another one, as after an earlier recipe, another that was interrupted, and the earlier one again. The stages
``curate``, ``controls`` and ``names`` exist only where the recipe names methods of curation, controls with a column of
their own, or class names that get an expert.

A run that is killed at any moment continues with the same numbers, because no stage leaves anything half-written that a
later run would take for whole.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, NotRequired

import numpy as np
from typing_extensions import TypedDict

from modeclip.clustering.class_selection import PREFIX, name_of, read_names
from modeclip.clustering.clusters import CLUSTERING_FILE
from modeclip.clustering.controls import CONTROL_COLUMNS, ONE_STEP_FOLDER
from modeclip.clustering.embedding import COLUMN, embed
from modeclip.clustering.fitting import (
    CARDS_FILE,
    PAIRS_PER_FINE,
    choose_num_fine,
    cluster,
)
from modeclip.curation.curating import curate
from modeclip.curation.explaining import explain
from modeclip.data.catalog import PAIR_COLUMNS, Catalog
from modeclip.data.checksums import find_damaged, remove_leftovers
from modeclip.data.indexing import index
from modeclip.data.selection import ALL, Selection
from modeclip.data.sources import DataSource, open_source, source_state
from modeclip.data.storage import missing_fragments, open_dataset
from modeclip.errors import DamagedError, ModeclipError
from modeclip.mixture.bundle import EDITS, is_bundled
from modeclip.models.clip import CONFIG_FILE, check_model
from modeclip.models.deltas import WEIGHTS_FILE
from modeclip.models.encoders import IMAGE_PREFIXES, check_trusted
from modeclip.models.pool import ModelRef
from modeclip.pipeline.recipe import CurateStep, Recipe, find_place, hash_of, plain_of, write_recipe
from modeclip.pipeline.run_folder import EDITED, RunFolder
from modeclip.system.console import log
from modeclip.system.devices import PeakMemory, return_memory
from modeclip.system.files import (
    FileNote,
    find_damage,
    hash_file,
    hash_folder,
    note_files,
    only_process,
    read_json,
    remove,
    write_json,
    writing,
)
from modeclip.system.paths import RunPaths, home_path
from modeclip.training.choosing import Fit, with_model
from modeclip.training.experts import plan_jobs
from modeclip.training.jobs import AUTO, JOB_FILE, TrainConfig, TrainJob, TrainResult, brings_weights, job_name

STAGES = ("index", "embed", "curate", "cluster", "controls", "names", "train", "bundle", "evaluate", "report")
STAGE_FORMAT = 2
"""Part of every stage's digest; raise it when a stage starts to produce something else from the same settings."""
FINE_BEFORE = 256
"""Fine clusters of a recipe that named no number, when these did not depend on the number of pairs."""
LOOK_SECONDS, LOOK_PAIRS = 10.0, 512
"""How long a plan counts the pairs of a source, and how many of them it indexes and embeds to measure rates."""
PRODUCT = "curated_probability"
"""Column of the product of the probabilities that several methods give."""


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


def run(recipe: Recipe, out: Path, *, trust_encoder: bool = False) -> RunResult:
    """Run the stages of a recipe that are missing or stale.

    Args:
        recipe: What to do.
        out: The run's folder, which is made if it does not exist.
        trust_encoder: Import and call what the recipe names as its encoder, if that is Python code.

    Raises:
        ModeclipError: A stage cannot do its work, or another process is running in the folder.
    """
    check_recipe(recipe, trust_encoder=trust_encoder)
    if recipe.embed.encoder.partition(":")[0] in IMAGE_PREFIXES:
        raise ModeclipError(
            f"embed.encoder {recipe.embed.encoder!r} looks at images, but a recipe routes tasks by class names: give an"
            " encoder of texts, or use the commands modeclip embed and modeclip cluster, which take every encoder"
        )
    out = home_path(out)
    out.mkdir(parents=True, exist_ok=True)
    folder = open_run(recipe, out)
    log(announcement(announced_jobs(recipe, out), recipe.train))
    for line in choices(recipe):
        log(line)
    with only_process(out), writing(out):
        write_recipe(recipe, folder)
        Stages(recipe, folder).run_all(open_source(recipe.data))
    results = read_json(folder.results, dict[str, Any], "give the same modeclip run again")
    return RunResult(folder=out, results=results, report=folder.report, bundle=folder.bundle)


def check_recipe(recipe: Recipe, *, trust_encoder: bool = False) -> None:
    """Check at once what would else be noticed after an hour of embedding.

    Args:
        recipe: What will be run.
        trust_encoder: As for `run`.

    Raises:
        ModeclipError: The encoder, the model or the class names cannot be used.
    """
    check_trusted(recipe.embed.encoder, trust_encoder)
    if recipe.train.model != AUTO:
        check_model(recipe.train.model)
    names = read_names(recipe.experts.for_classes)
    if len(names) == 1:
        raise ModeclipError(
            f"experts.for_classes: expected at least 2 different class names, got {names[0]!r} alone; give more, or a "
            "file with one on each line"
        )


def open_run(recipe: Recipe, out: Path) -> RunFolder:
    """Return the run folder of a recipe."""
    return RunFolder(
        folder=out,
        training=recipe.train,
        experts=recipe.experts,
        routing=recipe.evaluate,
        clustered_by=recipe.cluster,
        encoder=recipe.embed.encoder,
    )


def rewrite_report(folder: Path) -> Path:
    """Write the report of a run again, and note in the stage's record that it is whole; return its path.

    Raises:
        ModeclipError: The folder holds no readable ``results.json``.
    """
    from modeclip.pages.run_report import write_report

    page, path = write_report(folder), RunPaths(folder=folder).stages / "report.json"
    with suppress(ModeclipError):  # no run of a recipe, or a damaged record, which the next run replaces
        record = read_record(path, "give the same modeclip run again")
        record["files"] = note_files(folder, [page])
        record["check"] = hash_record(record)
        write_json(path, record, indent=2)
    return page


def announced_jobs(recipe: Recipe, out: Path, selection: Selection = ALL) -> list[TrainJob]:
    """Return the models that a recipe trains, before its pairs are known: their names, roles and steps."""
    experts = replace(recipe.experts, order="index")
    paths = RunPaths(folder=out)
    models, count = paths.models.resolve(), recipe.cluster.num_experts
    return plan_jobs(paths.catalog_path, "", models, count, recipe.train, experts, selection=selection)


def samples_of(job: TrainJob) -> int:
    """Return the number of samples that a job trains on."""
    return (job.last_step - job.first_step) * job.config.batch_size


def announcement(jobs: Sequence[TrainJob], train: TrainConfig) -> str:
    """Return a line about all samples that a run trains on."""
    groups: dict[str, list[int]] = {}
    for job in jobs:
        groups.setdefault(job.role, []).append(samples_of(job))
    named = {"prior": "expert for class names"}
    parts = [
        f"{named.get(role, role)} {sizes[0]:,}" if len(sizes) == 1 else f"{len(sizes)} x {role} {sizes[0]:,}"
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
    if recipe.train.model == AUTO:
        lines.append("train.model is not given: the images and captions decide, once they are read")
    if recipe.train.learning_rate is None:
        model, brings = recipe.train.model, "brings" if brings_weights(recipe.train.model) else "has no"
        model = "a model of modeclip's choice" if model == AUTO else model
        rate = f"{recipe.train.highest_rate:g}, since {model} {brings} trained weights"
        lines.append(f"train.learning_rate is not given: {rate}")
    if recipe.cluster.num_fine is None:
        found = "" if num_pairs is None else f": {choose_num_fine(num_pairs, recipe.cluster.num_experts):,}"
        lines.append(f"cluster.num_fine is not given{found}, one for {PAIRS_PER_FINE} pairs")
    return lines


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
    "curate": ("curation/*/curate.html",),
    "cluster": ("clusters/clustering.safetensors", "clusters/cards.json", "clusters/config.json"),
    "controls": ("clusters/one-step/*",),
    "train": ("models/*/job.json", "models/*/done.json", "models/*/log.jsonl"),
    "bundle": ("bundle/**/*",),
    "evaluate": ("results.json", "results/**/*", "features/*"),
    "report": ("report.html",),
}
"""Files that a stage writes, apart from the catalog and the models, which know themselves whether they are whole."""


def read_record(path: Path, again: str) -> StageRecord:
    """Return the record of a stage."""
    record = read_json(path, StageRecord, again)
    if record.get("check") not in (None, hash_record(record)):
        raise DamagedError(f"{path}: damaged (its content is not what was written); {again}")
    return record


def hash_record(record: StageRecord) -> str:
    """Return the hash that a record carries of the rest of itself."""
    content = {name: value for name, value in record.items() if name != "check"}
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class Stages:
    """The stages of a recipe, each a method that does the work and returns one line about it."""

    def __init__(self, recipe: Recipe, folder: RunFolder) -> None:
        self.recipe, self.folder = recipe, folder
        self.digests: dict[str, str] = {}

    def run_all(self, source: DataSource) -> None:
        """Do the stages that are not done, in their order."""
        recipe, folder = self.recipe, self.folder
        state = [recipe.data.flat() | {"workers": 1}, source_state(recipe.data, source)]
        self.mend_catalogs()
        if recipe.data.holdout_fraction:
            state.append("divided by images")  # by keys in earlier versions
        made = Made(folder)
        self.stage("index", partial(self.index, source), state, made.rows)
        self.choose_model()
        recipe, folder = self.recipe, self.folder
        self.stage("embed", self.embed, [asdict(recipe.embed), self.digests["index"]], partial(made.columns, COLUMN))
        chosen_by = self.curate_stage()
        recipe, folder = self.recipe, self.folder
        made = Made(folder)
        files = [folder.clusters / name for name in (CLUSTERING_FILE, CARDS_FILE)]
        clusters = partial(made.columns, "fine_cluster", "expert", files=files)
        self.keep_num_fine()
        inputs = [asdict(self.recipe.cluster), self.digests["embed"], *chosen_by]
        self.stage("cluster", self.cluster, inputs, clusters)
        self.note_choices()
        self.controls_stage()
        named = self.names_stage()
        train = recipe.train.decided().plain()
        train["engine"]["save_every"] = "20s"  # it decides nothing; a constant keeps the digests of earlier versions
        del train["engine"]["keep_trunk"]  # nor does this, to rounding
        experts = asdict(recipe.experts)
        del experts["for_classes"], experts["nearest"]  # the stage `names` stands for them
        training = [train, experts, folder.fingerprint, *chosen_by, *named]
        self.stage("train", self.train, training, made.models)
        bundled = asdict(recipe.evaluate)
        knowledge = bundled.pop("knowledge")
        self.stage("bundle", self.bundle, [bundled, self.digests["train"]], made.bundle)
        files = [path for path in map(home_path, knowledge) if path.is_file()]
        explained = [knowledge, list(map(hash_file, files))] if knowledge else []
        self.stage("evaluate", self.evaluate, [recipe.name, self.digests["bundle"], *explained], made.results)
        self.stage("report", self.report, [version("modeclip"), self.digests["evaluate"]], made.report)

    def choose_model(self) -> None:
        """Name the model where the recipe leaves it to the pairs; a folder that has trained one keeps it."""
        seed = self.folder.models / job_name("seed")
        train = with_model(self.recipe.train, self.folder.catalog_path, self.recipe.experts.start, seed)
        self.recipe = replace(self.recipe, train=train)
        self.folder = replace(self.folder, training=train)

    def curate_stage(self) -> list[str]:
        """Do the stage of the curation, and have clusters and models made of what it keeps.

        Without methods, no record of an earlier one is left.

        Returns:
            The digests that stages depend on because of it.
        """
        steps = self.recipe.curate
        if not steps:
            (self.folder.stages / "curate.json").unlink(missing_ok=True)
            return []
        inputs = [[step.flat() for step in steps], hash_places(steps)]
        made = partial(Made(self.folder).columns, *(f"{step.name}_kept" for step in steps))
        self.stage("curate", self.curate, [*inputs, self.digests["embed"]], made)
        probability, captions = curated_columns(Catalog.open(self.folder.catalog_path), steps)
        train = self.recipe.train
        train = replace(train, probability=train.probability or probability, captions=train.captions or captions)
        self.recipe = replace(self.recipe, train=train)
        self.folder = replace(self.folder, training=train, selection=Selection(mask=f"{steps[-1].name}_kept"))
        return [self.digests["curate"]]

    def keep_num_fine(self) -> None:
        """Let a folder of an earlier version, which had another default, keep its number of fine clusters."""
        before = self.recipe.cluster
        if before.num_fine is None and before.num_experts <= FINE_BEFORE <= before.fit_samples:
            before = replace(before, num_fine=FINE_BEFORE)
            record = self.read_record("cluster")
            inputs = plain_of([asdict(before), self.digests["embed"]])
            if record is not None and record["digest"] == hash_of([STAGE_FORMAT, "cluster", inputs]):
                self.recipe = replace(self.recipe, cluster=before)

    def note_choices(self) -> None:
        """Write the recipe again, with what the data have decided."""
        found = replace(self.recipe.cluster, num_fine=self.folder.clustering.num_fine)
        write_recipe(replace(self.recipe, cluster=found), self.folder)

    def controls_stage(self) -> None:
        """Do the stage of the controls' columns; without any, leave no record of an earlier one."""
        if controls := self.folder.split_controls:
            files = [self.folder.clusters / ONE_STEP_FOLDER / CLUSTERING_FILE] if "one-step" in controls else []
            made = partial(Made(self.folder).columns, *map(CONTROL_COLUMNS.__getitem__, controls), files=files)
            self.stage("controls", self.controls, [controls, self.digests["cluster"]], made)
        else:
            (self.folder.stages / "controls.json").unlink(missing_ok=True)

    def names_stage(self) -> list[str]:
        """Do the stage of the expert for class names; without names, leave no record of an earlier one.

        Returns:
            The digests that the training depends on because of it.
        """
        if not (sources := self.recipe.experts.for_classes):
            (self.folder.stages / "names.json").unlink(missing_ok=True)
            return []
        made, name = Made(self.folder), name_of(sources)
        inputs = [name, read_names(sources), self.recipe.experts.nearest, self.digests["cluster"]]
        self.stage("names", self.names, inputs, partial(made.columns, PREFIX + name))
        return [self.digests["names"]]

    def stage(self, name: str, work: Callable[[], str], inputs: list[Any], made: Callable[[], str | None]) -> None:
        """Do a stage unless its record says that it was done from the same inputs, and what it made is still there.

        Args:
            name: Name of the stage.
            work: Does it and returns a line about it.
            inputs: What decides its result.
            made: Returns a hash of what it has made; None where something is missing.
        """
        self.digests[name] = digest = hash_of([STAGE_FORMAT, name, plain_of(inputs)])
        path = self.folder.stages / f"{name}.json"
        record = before = self.read_record(name)
        is_mended = record is not None and self.remove_damaged(name, record)
        if record is not None and record["digest"] == digest and not is_mended and (state := made()) is not None:
            if "made" not in record:  # an earlier version wrote it
                record["made"] = state
                record["check"] = hash_record(record)
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
        if name in {"train", "bundle"} and (before is None or before.get("made") != state):
            for later in ("evaluate", "report"):  # of the models before, which the same settings have made
                (path.parent / f"{later}.json").unlink(missing_ok=True)
        record["check"] = hash_record(record)
        write_json(path, record, indent=2)
        return_memory()
        log(f"{name:<9} {seconds:6.1f} s: {detail}")

    def read_record(self, name: str) -> StageRecord | None:
        """Return the record of a stage; None where there is none, or where it is damaged: the stage is done again."""
        path = self.folder.stages / f"{name}.json"
        again = f"the stage {name} is done again"
        try:
            return read_record(path, again)
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
        """Do the stage: read the source."""
        result = index(self.recipe.data, self.folder.folder, replace=True, source=source)
        held_out = sum(images for _, images in result.tasks.values())
        skipped = ", ".join(f"{count:,} {cause}" for cause, count in sorted(result.skipped.items())) or "none"
        return (
            f"{result.num_samples:,} pairs with {result.num_captions:,} captions from {result.kind}; "
            f"{held_out:,} images in {len(result.tasks)} held-out tasks; skipped: {skipped}"
        )

    def embed(self) -> str:
        """Do the stage: embed the captions."""
        result = embed(Catalog.open(self.folder.catalog_path), self.recipe.embed)
        return f"{result.num_captions:,} captions as {result.dimension} numbers by {Path(result.encoder).name}"

    def curate(self) -> str:
        """Do the stage: ask each method about the pairs that those before it have kept."""
        from modeclip.pages.curate_page import write_curation

        selection, kept = ALL, []
        for step in self.recipe.curate:
            catalog = Catalog.open(self.folder.catalog_path)
            curated = curate(catalog, step.config, name=step.name, selection=selection)
            selection = Selection(mask=f"{step.name}_kept")
            explanation, folder = explain(curated), self.folder.curation / step.name
            explanation.save(folder)
            write_curation(catalog, explanation, folder)
            kept.append(f"{step.name} kept {explanation.kept.count:,}")
        add_product(Catalog.open(self.folder.catalog_path), self.recipe.curate)
        return f"{', '.join(kept)} of {len(catalog):,} pairs"

    def cluster(self) -> str:
        """Do the stage: cluster, and form experts."""
        catalog = Catalog.open(self.folder.catalog_path)
        result = cluster(catalog, self.recipe.cluster, selection=self.folder.selection)
        result.save(self.folder.clusters)
        sizes = ", ".join(f"{card.size:,}" for card in result.experts)
        return f"{len(result.fine):,} fine clusters in {len(result.experts)} experts of {sizes} pairs"

    def controls(self) -> str:
        """Do the stage: divide the pairs for the controls."""
        sizes = self.folder.add_controls()
        return "; ".join(f"{column} of {', '.join(f'{n:,}' for n in counts)} pairs" for column, counts in sizes.items())

    def names(self) -> str:
        """Do the stage: mark the pairs of the expert for class names."""
        catalog, experts = self.folder.catalog, self.recipe.experts
        prior = self.folder.mark_classes(experts.for_classes, experts.nearest)
        pairs, names = f"{len(catalog.select(mask=prior.column)):,} pairs", f"{len(prior.classnames)} class names"
        if not experts.nearest:
            return f"{names} are the captions of {pairs}"
        return f"{names} are nearest to {len(prior.fine)} fine clusters of {pairs}"

    def train(self) -> str:
        """Do the stage: train all models."""
        jobs = self.folder.jobs
        pairs, train = self.folder.selection.part_of(self.folder.catalog), self.folder.training
        for line in Fit.of(train.model, pairs, train.captions).misfits:
            log(line)
        for job in jobs:
            if not (Path(job.folder) / JOB_FILE).is_file():
                job.save()
        results = self.folder.train(jobs, stop_on_failure=True)
        return f"{len(jobs)} models, {sum(result.samples for result in results.values()):,} samples in all"

    def bundle(self) -> str:
        """Do the stage: write the bundle."""
        before = ("index", "embed", "cluster", "train")
        lineage = {
            "stages": {stage: self.digests[stage] for stage in before},
            "recipe": replace(self.recipe, train=self.recipe.train.decided()).plain(),
        }
        self.folder.write_bundle(name=self.recipe.name, lineage=lineage)
        named = " and one for class names" if self.recipe.experts.for_classes else ""
        return f"seed and {self.folder.clustering.num_experts} experts{named}, rule {self.recipe.evaluate.rule}"

    def evaluate(self) -> str:
        """Do the stage: score all systems on the tasks."""
        results = self.folder.evaluate(
            self.recipe.name, batch_size=self.recipe.evaluate.batch_size, knowledge=self.recipe.evaluate.knowledge
        )
        rows, tasks = len(results["models"]), len(results["tasks"])
        return f"{rows} rows on {tasks} tasks" if tasks else "no held-out tasks: nothing was evaluated"

    def report(self) -> str:
        """Do the stage: write the page."""
        from modeclip.pages.run_report import write_report

        return str(write_report(self.folder.folder))


def hash_places(steps: Sequence[CurateStep]) -> dict[str, str]:
    """Return a hash of what methods of curation read apart from their pairs, by its path: files, models, catalogs."""
    found = {}
    for name, value in (text for step in steps for text in _texts(step.settings)):
        place = find_place(name, value)
        if place is not None and (digest := _hash_place(name, place[1])):
            found[str(place[1])] = digest
    return found


def _texts(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield the texts of a setting, at any depth, each with the name of its setting."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield from _texts(one, key)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts(one, name)


def _hash_place(name: str, place: Path) -> str | None:
    """Return a hash of what a setting names; None for a folder of pictures, whose files are not read for it."""
    if place.is_file():
        return hash_file(place)
    if (place / CONFIG_FILE).is_file():
        return ModelRef.of(name, place).digest
    if name in {"entries", "knowledge", "model", "wordnet"}:
        return hash_folder(place)
    with suppress(ModeclipError):
        return Catalog.open(place, verify=False).fingerprint
    return None


def curated_columns(catalog: Catalog, steps: Sequence[CurateStep]) -> tuple[str | None, str | None]:
    """Return the columns that training reads because of a curation: the probability of each pair, and its caption."""
    probabilities = [name for step in steps if (name := f"{step.name}_probability") in catalog.columns]
    captions = [name for step in steps if (name := f"{step.name}_caption") in catalog.columns]
    probability = PRODUCT if len(probabilities) > 1 else next(iter(probabilities), None)
    return probability, captions[-1] if captions else None


def add_product(catalog: Catalog, steps: Sequence[CurateStep]) -> None:
    """Add the product of the probabilities that several methods give to each pair, if more than one does."""
    names = [name for step in steps if (name := f"{step.name}_probability") in catalog.columns]
    if len(names) > 1:
        product = ({PRODUCT: np.prod([block[name] for name in names], axis=0)} for block in catalog.batches(names))
        catalog.add_columns(product, facts={"product_of": {name: catalog.facts(name) for name in names}})


@dataclass(frozen=True)
class Made:
    """What the stages have made, each as a hash; None where it is not there or cannot be read."""

    run: RunFolder

    def rows(self) -> str | None:
        """Return the state of the pairs: those that are trained on, and those that are held out."""
        catalogs = [open_or_none(self.run.catalog_path), open_or_none(self.run.tasks_path)]
        if catalogs[0] is None or (catalogs[1] is None and self.run.tasks_path.exists()):
            return None
        if any(catalog and catalog.damaged.keys() & PAIR_COLUMNS.keys() for catalog in catalogs):
            return None
        return hash_of([catalog and catalog.fingerprint for catalog in catalogs])

    def columns(self, *names: str, files: Sequence[Path] = ()) -> str | None:
        """Return the state of columns, which rows they belong to and what made them, and of files beside them."""
        catalog = open_or_none(self.run.catalog_path)
        if catalog is None or not set(names) <= set(catalog.columns) or missing_fragments(catalog.dataset, names):
            return None
        if not all(path.is_file() for path in files):
            return None
        return hash_of([catalog.fingerprint, [catalog.facts(name) for name in names], list(map(hash_file, files))])

    def models(self) -> str | None:
        """Return the state of the models: what each was trained from."""
        jobs = self.run.jobs
        done = [TrainResult.read(job) is not None and (Path(job.folder) / WEIGHTS_FILE).is_file() for job in jobs]
        return hash_of({job.name: job.digest for job in jobs}) if all(done) else None

    def bundle(self) -> str | None:
        """Return the state of the bundle: which models are in it, or that a user has changed it since.

        One that lacks a model of the run as it is now, such as an expert of a seed that was trained anew, is none.
        """
        lineage = self.run.lineage
        if not lineage or lineage.get(EDITS):
            return EDITED if lineage else None
        jobs = lineage.get("jobs") or {}
        if any(jobs.get(job.name) != job.digest for job in self.run.jobs if is_bundled(job)):
            return None
        return hash_of([lineage.get("jobs"), lineage.get("stages")])

    def results(self) -> str | None:
        """Return the state of the table of results."""
        return hash_file(self.run.results)[:16] if self.run.results.is_file() else None

    def report(self) -> str | None:
        """Return whether there is a page; whoever writes it again writes the same."""
        return "there" if self.run.report.is_file() else None


def open_or_none(path: Path) -> Catalog | None:
    """Return a catalog, or None where it cannot be opened."""
    try:
        return Catalog.open(path)
    except ModeclipError:
        return None
