"""Results of an evaluation in files that other tools read; two models are compared from them without running either.

    out/
      SYSTEM--TASK.json                  as CLIP_benchmark writes it; ``modeclip`` in it is what the numbers rest on
      results.jsonl                      all such files of the folder, CLIP_benchmark's own too, one to a line
      predictions/SYSTEM--TASK.parquet   one row for each sample: key, label, prediction, rank, hit

In file names letters, digits and ``. _ + = , @ -`` stay as they are, and each run of other characters is ``_``: the
model ``runs/a b#expert-0`` is ``runs_a_b_expert-0``. Where two names would be one, or one is too long, the start of a
hash follows. The names themselves are in the files. A later evaluation into the same folder replaces the results of its
systems and tasks, however these are named, and keeps the rest. A run has such a folder, ``results``, which is meant
where the run itself is given.

Source: CLIP_benchmark 1.6 for the fields ``dataset``, ``model``, ``pretrained``, ``task``, ``metrics``, ``language``.
Price: about 10 bytes a sample where keys are numbers; comparing two models on 50,000 samples takes under a second.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from modeclip.data.tasks.task import Task
from modeclip.errors import ModeclipError, in_one_line, unknown
from modeclip.evaluation.intervals import Interval, Outcome, PairedTest, paired_interval, paired_test
from modeclip.system.files import replacing, to_json, write_atomically, write_json, writing
from modeclip.system.paths import RunPaths

RESULTS_FILE = "results.jsonl"
PREDICTIONS_FOLDER = "predictions"
OURS = "modeclip"
"""Field that CLIP_benchmark's JSON does not have; Parquet files have it in their metadata."""
TASK_OF_KIND = {
    "classification": "zeroshot_classification",
    "retrieval": "zeroshot_retrieval",
    "selection": "image_caption_selection",
}
"""CLIP_benchmark's name for each kind of task; any other kind (``linear_probe``) keeps its own name."""
MAX_NAME = 200
"""Longest name of a file without its ending, in bytes; Linux and macOS take 255."""
_NAMES = ("model", "pretrained", "dataset", "task")
_COLUMNS = ("key", "label", "prediction", "rank", "hit", "weight", "image")


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """What one system did on one task."""

    task: Task
    """What was asked."""
    kind: str
    """Kind of the task: ``classification``, ``retrieval`` or ``selection``; or ``linear_probe``."""
    system: str
    """Name of who answered."""
    outcome: Outcome
    """Metrics, and every sample's part in them."""
    provenance: Mapping[str, Any]
    """What the numbers rest on, as JSON: hashes, versions, precision, seed, rule, weights..."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """What one system did on one task, read back."""

    system: str
    """Name of who answered."""
    task: str
    """Name of the task; for a linear probe the kind stands behind it."""
    digest: str
    """Hash of all that was asked."""
    outcome: Outcome
    """Metrics, and every sample's part in them."""
    keys: Sequence[str] = field(repr=False)
    """Name of each sample: image, text or instance."""
    labels: Sequence[Any] = field(repr=False)
    """Right answer of each sample: a class, several classes, or an image; -1 where there is none of these."""
    record: Mapping[str, Any]
    """Content of the JSON."""


@dataclass(frozen=True, kw_only=True)
class TaskComparison:
    """Two systems on one task."""

    task: str
    """Name of the task."""
    metric: str
    """The main metric of the task."""
    first: float
    """What the first system reached, in that metric."""
    second: float
    """What the second system reached."""
    difference: Interval
    """First minus second, on the same samples."""
    test: PairedTest | None
    """Exact McNemar test; None if the metric does not count right and wrong samples."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two systems on all tasks that both were asked."""

    first: str
    """Name of the first system."""
    second: str
    """Name of the second system."""
    tasks: tuple[TaskComparison, ...]
    """One each, by name."""
    difference: Interval
    """Difference of the plain means over the tasks, first minus second."""
    test: PairedTest | None
    """McNemar test over the samples of all tasks that have one."""
    left_out: tuple[str, ...]
    """Tasks that only one of them was asked."""


def write_results(folder: Path, results: Sequence[Result]) -> Path:
    """Write results into a folder beside those that it holds.

    Returns:
        The file that lists all of them.

    Raises:
        ModeclipError: Two results are of the same system and task, or one cannot be written; the others are there.
    """
    (folder / PREDICTIONS_FOLDER).mkdir(parents=True, exist_ok=True)
    names = {identity: path.stem for path, record in _records(folder) if (identity := _identity(record)) is not None}
    written: set[tuple[str, ...]] = set()
    problems: list[str] = []
    for result in results:
        record = _record(result)
        identity, what = _identity(record), f"model {result.system!r}, task {result.task.name!r} ({result.kind})"
        assert identity is not None
        if identity in written:
            raise ModeclipError(f"results: two results of {what}; give the models other names")
        written.add(identity)
        before = names.pop(identity, None)
        name = names[identity] = _file_name(identity, names.values())
        try:
            with writing(folder):
                _write_predictions(folder / PREDICTIONS_FOLDER / f"{name}.parquet", result, record)
                write_json(folder / f"{name}.json", record)
        except (ModeclipError, OSError, ValueError, pa.ArrowException) as error:
            cause = in_one_line(error) if isinstance(error, OSError) else " ".join(str(error).split())
            problems.append(f"{what} cannot be written: {cause}")
            continue
        if before not in (None, name):  # an older version named it otherwise
            (folder / f"{before}.json").unlink(missing_ok=True)
            (folder / PREDICTIONS_FOLDER / f"{before}.parquet").unlink(missing_ok=True)
    lines = [to_json(record) + "\n" for record in read_results(folder)]
    path = folder / RESULTS_FILE
    with writing(path):
        write_atomically(path, "".join(lines))
    if problems:
        raise ModeclipError(f"results: {'; '.join(problems)}")
    return path


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Read the results in a folder, ours and those that CLIP_benchmark wrote, sorted by model, dataset and task.

    A metric that is not a number (CLIP_benchmark's ``acc5`` with fewer than five classes) is None. Other JSON files are
    skipped.

    Raises:
        ModeclipError: A JSON file cannot be read.
    """
    records = [record | {"metrics": _metrics(record["metrics"])} for _, record in _records(folder)]
    return sorted(records, key=lambda record: [record[name] for name in _NAMES])


def read_predictions(folder: Path) -> list[Predictions]:
    """Read the predictions in a folder of results or in a run, sorted by system and task.

    Raises:
        ModeclipError: There are none, or a file is damaged or was not written by `write_results`.
    """
    places = [folder / PREDICTIONS_FOLDER, RunPaths(folder=folder).answers / PREDICTIONS_FOLDER]
    paths = next((found for place in places if (found := sorted(place.glob("*.parquet")))), [])
    if not paths:
        raise ModeclipError(
            f"{folder}: no predictions; expected the folder that `modeclip evaluate --out` wrote, or a finished run "
            "(one of an older version: delete its results.json and give `modeclip run` again)"
        )
    return sorted((_read(path) for path in paths), key=lambda found: (found.system, found.task))


def compare(
    first: Path, second: Path, *, first_system: str | None = None, second_system: str | None = None
) -> Comparison:
    """Compare two systems, sample by sample, on the tasks that both were asked; no model is run.

    Args:
        first: Folder of results, or a run; a positive difference means that its system is better.
        second: The same for the other system; it may be the same folder.
        first_system: Name of the first system. It may be left out if the folder has only one, or if it is of a run:
            then the mixture under the bundle's rule is compared.
        second_system: The same in the second folder.

    Raises:
        ModeclipError: A folder has several systems and none is named, the systems share no task, or a task was asked
            with other images, class names or labels.
    """
    one = _of_system(first, first_system, "--first-system")
    other = _of_system(second, second_system, "--second-system")
    shared = sorted(one.keys() & other.keys())
    if not shared:
        raise ModeclipError(
            f"compare: the two have no task in common; {first} has {sorted(one)}, {second} has {sorted(other)}"
        )
    for task in shared:
        if one[task].digest != other[task].digest:
            raise ModeclipError(
                f"compare: task {task!r} is not the same in {first} and {second} (other images, class names, labels or "
                "metric); evaluate one of them again"
            )
    comparisons = tuple(_compare(one[task], other[task]) for task in shared)
    tested = [found.task for found in comparisons if found.test is not None]
    outcomes = [{task: side[task].outcome for task in shared} for side in (one, other)]
    return Comparison(
        first=next(iter(one.values())).system,
        second=next(iter(other.values())).system,
        tasks=comparisons,
        difference=paired_interval(*outcomes),
        test=paired_test(*({task: side[task] for task in tested} for side in outcomes)) if tested else None,
        left_out=tuple(sorted(one.keys() ^ other.keys())),
    )


def _compare(first: Predictions, second: Predictions) -> TaskComparison:
    one, other = {first.task: first.outcome}, {second.task: second.outcome}
    counts = np.isin(np.concatenate([first.outcome.hits, second.outcome.hits]), (0, 1)).all()
    return TaskComparison(
        task=first.task,
        metric=first.outcome.main,
        first=first.outcome.score,
        second=second.outcome.score,
        difference=paired_interval(one, other),
        test=paired_test(one, other) if counts else None,
    )


def _of_system(folder: Path, system: str | None, option: str) -> dict[str, Predictions]:
    """Return what a system did by task; without a name the only one is meant, or the one that is marked as default."""
    found = read_predictions(folder)
    systems = sorted({predictions.system for predictions in found})
    if system is None and len(systems) > 1:
        marked = {predictions.system for predictions in found if predictions.record[OURS].get("default")}
        if len(marked) != 1:
            raise ModeclipError(f"compare: {folder} has several models; give {option} with one of {', '.join(systems)}")
        (system,) = marked
    if system is not None and system not in systems:
        raise unknown(f"model of {folder}, {option}", system, systems)
    return {predictions.task: predictions for predictions in found if system in (None, predictions.system)}


def _records(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the results in a folder with their files."""
    for path in sorted(path for path in folder.glob("*.json") if path.is_file()):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ModeclipError(f"{path}: cannot be read ({error}); delete it and evaluate again") from None
        if _is_result(content):
            yield path, content


def _identity(record: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return model, task and kind of a result of ours; None of one that CLIP_benchmark wrote."""
    own = record.get(OURS)
    kind = own.get("kind") if isinstance(own, dict) else None
    return (record["model"], record["dataset"], kind) if isinstance(kind, str) else None


def _file_name(identity: Sequence[str], taken: Collection[str]) -> str:
    """Return the name of a result's files, which no other result of the folder has.

    Examples:
        >>> _file_name(("runs/a b#expert-0", "birds", "classification"), [])
        'runs_a_b_expert-0--birds'
    """
    *parts, kind = identity
    parts += [] if kind in TASK_OF_KIND else [kind]
    name = "--".join(re.sub(r"[^\w.+=,@-]+", "_", part) for part in parts)
    name = re.sub(r"^[.-]+", "_", name)
    if len(name.encode()) <= MAX_NAME and name.casefold() not in {other.casefold() for other in taken}:
        return name
    short = name.encode()[: MAX_NAME - 9].decode(errors="ignore")
    return f"{short}-{sha256(json.dumps(identity).encode()).hexdigest()[:8]}"


def _record(result: Result) -> dict[str, Any]:
    """Return the content of a result's JSON."""
    outcome = result.outcome
    rests_on = {"main": outcome.main, "num_samples": len(outcome.hits), "digest": result.task.digest}
    return {
        "dataset": result.task.name,
        "model": result.system,
        "pretrained": str(result.provenance.get("rule") or ""),
        "task": TASK_OF_KIND.get(result.kind, result.kind),
        "metrics": dict(outcome.metrics),
        "language": str(result.provenance.get("language") or "en"),
        OURS: dict(result.provenance) | rests_on | {"kind": result.kind},
    }


def _is_result(content: object) -> bool:
    """Whether the content of a JSON file is a result, ours or CLIP_benchmark's."""
    if not isinstance(content, dict) or not isinstance(content.get("metrics"), dict):
        return False
    return all(isinstance(content.get(name), str) for name in _NAMES)


def _metrics(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics that are numbers; None for NaN, infinity and integers that are too large for a float."""
    numbers = {name: value for name, value in found.items() if isinstance(value, int | float)}
    return {name: value if abs(value) <= sys.float_info.max else None for name, value in numbers.items()}


def _keys_and_labels(result: Result) -> tuple[list[str], list[Any]]:
    """Return the name and the right answer of each sample."""
    task = result.task
    if task.kind == "retrieval":
        assert task.image_of_text is not None
        images = task.images.keys()
        return [*task.texts, *images], [*task.image_of_text.tolist(), *([-1] * len(images))]
    if task.kind == "selection":
        instances = result.outcome.extra["instance"].tolist()
        return [str(instance) for instance in instances], [0] * len(instances)
    labels = np.asarray(task.labels)
    one = labels.ndim == 1
    return task.images.keys(), labels.tolist() if one else [np.flatnonzero(row).tolist() for row in labels]


def _write_predictions(path: Path, result: Result, record: Mapping[str, Any]) -> None:
    keys, labels = _keys_and_labels(result)
    outcome = result.outcome
    columns: dict[str, Any] = {"key": keys, "label": labels, "prediction": outcome.prediction, "rank": outcome.rank}
    columns["hit"] = outcome.hits
    if outcome.weights is not None:
        columns["weight"] = outcome.weights
    if outcome.image is not None:
        columns["image"] = outcome.image
    table = pa.table(columns | dict(outcome.extra))
    table = table.replace_schema_metadata({OURS: to_json(record)})
    with replacing(path) as part:
        pq.write_table(table, part, compression="zstd")


def _read(path: Path) -> Predictions:
    """Read the predictions in one file."""
    try:
        table = pq.read_table(path, partitioning=None)
        record = json.loads((table.schema.metadata or {})[OURS.encode()])
        columns = {name: table[name].to_numpy() for name in table.column_names if name not in ("key", "label")}
        if not _is_result(record):
            raise ValueError("its metadata hold no result")
        score, hits = record["metrics"][record[OURS]["main"]], columns["hit"].astype(float)
        if not math.isfinite(score) or not np.isfinite(hits).all():
            raise ValueError("the metric, or what a sample adds to it, is missing or not a number")
        outcome = Outcome(
            metrics=record["metrics"],
            main=record[OURS]["main"],
            hits=columns["hit"],
            prediction=columns["prediction"],
            rank=columns["rank"],
            weights=columns.get("weight"),
            image=columns.get("image"),
            extra={name: values for name, values in columns.items() if name not in _COLUMNS},
        )
        kind = record[OURS]["kind"]
        return Predictions(
            system=record["model"],
            task=record["dataset"] if kind in TASK_OF_KIND else f"{record['dataset']} ({kind})",
            digest=record[OURS]["digest"],
            outcome=outcome,
            keys=table["key"].to_pylist(),
            labels=table["label"].to_pylist(),
            record=record,
        )
    except (pa.ArrowException, OSError, LookupError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModeclipError(
            f"{path}: cannot be read as predictions of modeclip ({reason}); delete it and evaluate again"
        ) from None
