"""Results on disk: read back as they were, by CLIP_benchmark too, and compared without the models."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL.Image import Image

from modeclip.commands.evaluation import compare as run_command
from modeclip.data.tasks.task import Task
from modeclip.errors import ModeclipError
from modeclip.evaluation.evaluate import averages
from modeclip.evaluation.intervals import paired_interval, paired_test
from modeclip.evaluation.metrics import score_classes, select_captions
from modeclip.evaluation.results import Result, compare, read_predictions, read_results, write_results
from modeclip.evaluation.retrieval import retrieve
from modeclip.evaluation.similarity import Similarity
from support import unit_rows

RNG = np.random.default_rng(0)


@dataclass(frozen=True)
class Numbered:
    """Images that are only counted."""

    count: int
    digest: str = "images"

    def __len__(self) -> int:
        return self.count

    def keys(self) -> list[str]:
        return [f"picture {row}" for row in range(self.count)]

    def digests(self) -> list[bytes]:
        return [key.encode() for key in self.keys()]

    def read(self, rows: np.ndarray) -> list[Image]:
        raise AssertionError(f"no image is needed, asked for {rows}")


def similar(images: int, texts: int) -> Similarity:
    return Similarity(images=[unit_rows(images, 12, RNG)], texts=[unit_rows(texts, 12, RNG)], weights=np.ones(1))


def classification(name: str = "pets", metric: str = "acc1", images: str = "images", count: int = 80) -> Task:
    labels = np.random.default_rng(1).integers(6, size=count)
    shown = np.eye(6, dtype=bool)[labels] if metric == "mean_average_precision" else labels
    names = tuple("abcdef")
    return Task(
        name=name, kind="classification", images=Numbered(count, images), classnames=names, labels=shown, metric=metric
    )


def classified(task: Task, system: str, kind: str = "classification", rule: str | None = None) -> Result:
    assert task.labels is not None
    outcome = score_classes(similar(len(task.images), 6), np.asarray(task.labels), task.metric)
    return Result(task=task, kind=kind, system=system, outcome=outcome, provenance={"rule": rule, "seed": 3})


def all_kinds(system: str) -> list[Result]:
    owners, instances = np.arange(30) % 20, np.arange(20) // 2
    texts = tuple(f"text {row}" for row in range(30))
    retrieval = Task(name="coco", kind="retrieval", images=Numbered(20), texts=texts, image_of_text=owners)
    selection = Task(
        name="wino", kind="selection", images=Numbered(20), texts=texts[:20],
        instance_of_image=instances, instance_of_text=instances,
    )  # fmt: skip
    found = [classified(classification(), system), classified(classification(), system, "linear_probe")]
    found += [classified(classification("birds/of a feather", "mean_per_class_recall"), system, rule="eq6")]
    found += [classified(classification("voc", "mean_average_precision"), system)]
    outcomes = {
        "coco": retrieve(similar(20, 30), owners),
        "wino": select_captions(similar(20, 20), instances, instances),
    }
    for task in (retrieval, selection):
        found.append(
            Result(task=task, kind=task.kind, system=system, outcome=outcomes[task.name], provenance={"seed": 3})
        )
    return found


def test_what_is_read_back_is_what_was_written(tmp_path: Path) -> None:
    results = all_kinds("B/32 = small")
    path = write_results(tmp_path, results)
    found = {predictions.task: predictions for predictions in read_predictions(tmp_path)}
    assert found.keys() == {"pets", "pets (linear_probe)", "birds/of a feather", "voc", "coco", "wino"}
    for result in results:
        name = result.task.name + (" (linear_probe)" if result.kind == "linear_probe" else "")
        back = found[name]
        assert (back.system, back.digest) == (result.system, result.task.digest)
        assert back.outcome.metrics == result.outcome.metrics
        assert back.outcome.score == result.outcome.score
        for field in ("hits", "prediction", "rank", "weights", "image"):
            np.testing.assert_array_equal(getattr(back.outcome, field), getattr(result.outcome, field))
        assert back.outcome.extra.keys() == result.outcome.extra.keys()
        assert len(back.keys) == len(back.labels) == len(back.outcome.hits)
    assert found["pets"].keys[3] == "picture 3"
    assert found["pets"].labels == np.asarray(results[0].task.labels).tolist()
    assert found["voc"].labels == [[label] for label in found["pets"].labels]
    assert found["coco"].keys[:2] + found["coco"].keys[30:31] == ["text 0", "text 1", "picture 0"]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == read_results(tmp_path)
    assert {line["task"] for line in lines} == {
        "zeroshot_classification", "zeroshot_retrieval", "image_caption_selection", "linear_probe",
    }  # fmt: skip
    birds = next(line for line in lines if line["dataset"] == "birds/of a feather")
    assert (birds["model"], birds["pretrained"], birds["language"]) == ("B/32 = small", "eq6", "en")
    assert birds["modeclip"]["seed"] == 3
    assert birds["modeclip"]["main"] == "mean_per_class_recall"
    assert (tmp_path / "B_32_=_small--birds_of_a_feather.json").is_file()


def test_a_later_evaluation_replaces_its_own_and_keeps_the_rest(tmp_path: Path) -> None:
    task = classification()
    write_results(tmp_path, [classified(task, "one"), classified(task, "two")])
    before = {p.system: p.outcome.hits for p in read_predictions(tmp_path)}
    write_results(tmp_path, [classified(task, "two"), classified(task, "three")])
    after = {p.system: p.outcome.hits for p in read_predictions(tmp_path)}
    assert list(after) == ["one", "three", "two"]
    np.testing.assert_array_equal(before["one"], after["one"])
    assert (before["two"] != after["two"]).any()
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 3


@pytest.mark.filterwarnings("ignore:Exception ignored in", "ignore:unclosed file")  # CLIP_benchmark closes none
def test_clip_benchmark_builds_its_table_from_our_folder_and_we_read_its_json(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    from clip_benchmark.cli import main_build

    theirs = {"dataset": "wds/cars", "model": "ViT-B-32", "pretrained": "openai", "task": "zeroshot_classification"}
    theirs |= {"metrics": {"acc1": 0.5, "acc5": float("nan"), "mean_per_class_recall": 0.5}, "language": "en"}
    (tmp_path / "theirs.json").write_text(json.dumps(theirs))
    (tmp_path / "notes.json").write_text("[1]")
    result = classified(classification(), "ours", rule="eq6")
    path = write_results(tmp_path, [result])
    (tmp_path / "notes.json").unlink()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["model"] for line in lines] == ["ViT-B-32", "ours"]
    assert lines[0]["metrics"] == {"acc1": 0.5, "acc5": None, "mean_per_class_recall": 0.5}
    main_build(Namespace(files=[str(tmp_path)], output=str(tmp_path / "all.csv")))
    table = pandas.read_csv(tmp_path / "all.csv").set_index("model_fullname")
    assert table.loc["ours eq6", "acc1"] == result.outcome.metrics["acc1"]
    assert table.loc["ViT-B-32 openai", "dataset"] == "wds/cars"


def test_comparing_folders_is_comparing_the_outcomes(tmp_path: Path) -> None:
    tasks = [classification("pets"), classification("birds", "mean_per_class_recall", count=50)]
    tasks += [classification("voc", "mean_average_precision")]
    one, other = ([classified(task, system) for task in tasks] for system in ("one", "other"))
    write_results(tmp_path / "a", [*one, classified(classification("cars"), "one")])
    write_results(tmp_path / "b", other)
    found = compare(tmp_path / "a", tmp_path / "b")
    first, second = ({r.task.name: r.outcome for r in results} for results in (one, other))
    assert (found.first, found.second, found.left_out) == ("one", "other", ("cars",))
    assert found.difference == paired_interval(first, second)
    counted = [{name: side[name] for name in ("pets", "birds")} for side in (first, second)]
    assert found.test == paired_test(*counted)
    assert [task.task for task in found.tasks] == ["birds", "pets", "voc"]
    for task in found.tasks:
        assert task.difference == paired_interval([first[task.task]], [second[task.task]])
        assert (task.first, task.second) == (first[task.task].score, second[task.task].score)
        assert (task.test is None) == (task.task == "voc")
    back = compare(tmp_path / "b", tmp_path / "a")
    assert back.difference.mean == pytest.approx(-found.difference.mean)


def test_command_prints_a_row_a_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = classification()
    write_results(tmp_path, [classified(task, "one"), classified(task, "two")])
    run_command(tmp_path, tmp_path, "one", "two")
    shown = capsys.readouterr().out
    for word in ("pets", "acc1", "average of tasks (1)", "McNemar p", "one", "two"):
        assert word in shown
    run_command(tmp_path, tmp_path, "one", "two", as_json=True)
    found = compare(tmp_path, tmp_path, first_system="one", second_system="two")
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(asdict(found)))


def damage(folder: Path) -> None:
    path = next((folder / "predictions").glob("*.parquet"))
    path.write_bytes(path.read_bytes()[:-20])


def replace_by_another_table(folder: Path) -> None:
    pq.write_table(pa.table({"key": ["a"]}), next((folder / "predictions").glob("*.parquet")))


def with_metadata(content: bytes) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.replace_schema_metadata({"modeclip": content})


def without_metric(table: pa.Table) -> pa.Table:
    record = json.loads(table.schema.metadata[b"modeclip"])
    return table.replace_schema_metadata({"modeclip": json.dumps(record | {"metrics": {"acc5": 1.0}})})


def without_a_hit(table: pa.Table) -> pa.Table:
    hits = pa.array([None, *table["hit"].to_pylist()[1:]], pa.float64())
    return table.set_column(table.column_names.index("hit"), "hit", hits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_metadata(b"{bad"), "cannot be read as predictions.*Expecting property name.*delete it"),
        (with_metadata(b"[]"), "cannot be read as predictions.*no result.*delete it"),
        (without_metric, "cannot be read as predictions.*'acc1'.*delete it"),
        (without_a_hit, "is missing or not a number"),
    ],
)
def test_predictions_that_were_changed_are_one_line(
    tmp_path: Path, change: Callable[[pa.Table], pa.Table], message: str
) -> None:
    write_results(tmp_path, [classified(classification(), "one")])
    path = tmp_path / "predictions" / "one--pets.parquet"
    pq.write_table(change(pq.read_table(path, partitioning=None)), path)
    with pytest.raises(ModeclipError, match=message) as caught:
        compare(tmp_path, tmp_path)
    assert "\n" not in str(caught.value)


def test_json_of_others_is_left_alone(tmp_path: Path) -> None:
    ours = {"dataset": "cars", "model": "m", "pretrained": "", "task": "t", "metrics": {"acc1": 0.5}}
    for number, change in enumerate([{"model": 1}, {"metrics": [1]}, {"task": None}, {"metrics": {"acc1": 10**400}}]):
        (tmp_path / f"{number}.json").write_text(json.dumps(ours | change))
    (tmp_path / "folder.json").mkdir()
    assert read_results(tmp_path) == [ours | {"metrics": {"acc1": None}}]


NAMES = [
    ("runs/a b#expert-0", "runs_a_b_expert-0--pets"),
    ("ViT-B-32@laion2b_s34b", "ViT-B-32@laion2b_s34b--pets"),
    ("größe", "größe--pets"),
    ("../../etc/passwd", "__.._etc_passwd--pets"),
    ("-rf", "_rf--pets"),
    ("a\x1b[31m\u202eb\n%2Fc", "a_31m_b_2Fc--pets"),
]


@pytest.mark.parametrize(("system", "name"), NAMES)
def test_names_of_files_need_no_quotes(tmp_path: Path, system: str, name: str) -> None:
    write_results(tmp_path, [classified(classification(), system)])
    assert {path.name for path in tmp_path.rglob("*.*")} == {f"{name}.json", f"{name}.parquet", "results.jsonl"}
    assert [found.system for found in read_predictions(tmp_path)] == [system]


def test_names_that_would_be_one_and_names_too_long_stay_apart(tmp_path: Path) -> None:
    systems = ["a b", "a/b", "A_B", "a_b", "x" * 300, "x" * 299 + "y", "雪" * 150]
    task = classification()
    write_results(tmp_path, [classified(task, system) for system in systems])
    names = {path.name for path in tmp_path.glob("*.json")}
    assert len(names) == len(systems)
    assert "a_b--pets.json" in names
    for system in systems:  # each keeps its file
        write_results(tmp_path, [classified(task, system)])
    assert {path.name for path in tmp_path.glob("*.json")} == names
    assert {found.system for found in read_predictions(tmp_path)} == set(systems)


def test_results_under_the_names_of_older_versions_are_read_and_replaced(tmp_path: Path) -> None:
    result = classified(classification("my birds"), "a/b")
    write_results(tmp_path, [result])
    for folder, ending in ((tmp_path, "json"), (tmp_path / "predictions", "parquet")):
        (folder / f"a_b--my_birds.{ending}").rename(folder / f"a%2Fb--my birds.{ending}")
    assert [found.system for found in read_predictions(tmp_path)] == ["a/b"]
    assert [record["model"] for record in read_results(tmp_path)] == ["a/b"]
    write_results(tmp_path, [result])
    assert {path.stem for path in tmp_path.rglob("*--*")} == {"a_b--my_birds"}


def test_a_result_that_cannot_be_written_loses_no_other(tmp_path: Path) -> None:
    task = classification()
    (tmp_path / "two--pets.json").mkdir()
    results = [classified(task, system) for system in ("one", "two", "three")]
    with pytest.raises(ModeclipError, match=r"model 'two', task 'pets'.*cannot be written"):
        write_results(tmp_path, results)
    assert [record["model"] for record in read_results(tmp_path)] == ["one", "three"]
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (["one", "two"], ["one"], "a has several models.*--first-system with one of one, two"),
        ([], ["one"], "a: no predictions.*`modeclip evaluate --out`"),
        (["damaged"], ["one"], "cannot be read as predictions.*delete it"),
        (["foreign"], ["one"], "cannot be read as predictions.*delete it"),
        (["other images"], ["one"], "'pets' is not the same.*evaluate one of them again"),
        (["other task"], ["one"], "have no task in common; "),
    ],
)
def test_what_cannot_be_compared_is_said(
    tmp_path: Path, first: Sequence[str], second: Sequence[str], message: str
) -> None:
    for folder, systems in (("a", first), ("b", second)):
        tasks = [
            classification(
                "cars" if system == "other task" else "pets", images=system if "images" in system else "images"
            )
            for system in systems
        ]
        write_results(tmp_path / folder, [classified(t, system) for t, system in zip(tasks, systems, strict=True)])
    if "damaged" in first:
        damage(tmp_path / "a")
    if "foreign" in first:
        replace_by_another_table(tmp_path / "a")
    with pytest.raises(ModeclipError, match=message):
        compare(tmp_path / "a", tmp_path / "b")


def test_a_system_that_is_not_there_and_two_results_of_one_name_are_said(tmp_path: Path) -> None:
    task = classification()
    write_results(tmp_path, [classified(task, "one")])
    for option in ("first_system", "second_system"):
        with pytest.raises(ModeclipError, match=f"--{option.replace('_', '-')} 'two'; known: one$"):
            compare(tmp_path, tmp_path, **{option: "two"})
    with pytest.raises(ModeclipError, match="two results of model 'one', task 'pets'"):
        write_results(tmp_path, [classified(task, "one"), classified(task, "one")])
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ModeclipError, match=re.escape("broken.json: cannot be read")):
        read_results(tmp_path)


@pytest.mark.parametrize("num_models", [1, 6, 10])
@pytest.mark.parametrize("num_tasks", [1, 4, 40])
def test_models_are_rows_that_read_well_at_80_columns(
    num_models: int, num_tasks: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from modeclip.commands.evaluation import _print_results

    monkeypatch.setenv("COLUMNS", "80")
    systems = [f"pairs/bundle#expert-{number}" for number in range(num_models)]
    tasks = [classification(f"vtab/dataset_{number}") for number in range(num_tasks)]
    results = [classified(task, system) for task in tasks for system in systems]
    _print_results(results, averages(results))
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in out
    rows = [line for line in lines if line.startswith("│")]
    assert [row.split()[1] for row in rows[:num_models]] == systems
    assert len(rows) % (num_models + 2) == 0  # with the majority class and chance
    cells = [cell for row in rows for cell in row.split("│")[2:-1]]
    assert sum(bool(re.fullmatch(r" *\d+\.\d *", cell)) for cell in cells) >= num_models * num_tasks
