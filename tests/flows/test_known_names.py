"""A recipe that names its classes beforehand: one more expert, and the question whether it pays."""

from __future__ import annotations

import json
import random
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from modeclip.clustering.class_selection import select_for_classes
from modeclip.commands.runs import _print_run
from modeclip.data.catalog import Catalog
from modeclip.errors import ModeclipError
from modeclip.evaluation.results import read_predictions
from modeclip.evaluation.systems import System
from modeclip.mixture.bundle import load_bundle
from modeclip.models.clip import load_clip
from modeclip.models.features import class_features
from modeclip.pipeline.known_names import Contest
from modeclip.pipeline.planning import plan_run
from modeclip.pipeline.recipe import load_recipe
from modeclip.pipeline.run_folder import RunFolder
from modeclip.pipeline.stages import RunResult, run
from modeclip.system.paths import RunPaths
from modeclip.training.costs import Measurement
from support import Python, parse_page, weights_of

NAMES = ("arrow", "calendar", "cloud", "file", "folder", "heart")
EXPERT = "expert-arrow_calendar_cloud_file_folder_heart"
STAGES = ("index", "embed", "cluster", "names", "train", "bundle", "evaluate", "report")


def with_names(small_recipe: Path, folder: Path, names: str = f"[{', '.join(NAMES)}]") -> Path:
    """The small recipe with an expert for class names; its mixture costs no more than the dense model."""
    path = folder / "names.yaml"
    experts = f"experts: {{budget: matched, dense_total: false, for_classes: {names}}}\n"
    path.write_text(small_recipe.read_text(encoding="utf-8") + experts, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def recipe(small_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_names(small_recipe, tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def named(
    recipe: Path,
    small_run: Path,
    tmp_path_factory: pytest.TempPathFactory,
    trains_here: None,  # noqa: ARG001
) -> RunResult:
    """A finished run with an expert for class names, from a run without one."""
    return run(load_recipe(recipe), Path(shutil.copytree(small_run, tmp_path_factory.mktemp("named") / "run")))


def times(out: Path) -> dict[str, int]:
    return {path.stem: path.stat().st_mtime_ns for path in (out / "stages").glob("*.json")}


def test_one_more_expert_is_trained_for_as_long_as_the_dense_model(named: RunResult) -> None:
    rows = {row["name"]: row for row in named.results["models"] if row["rule"] is None}
    assert rows[EXPERT]["samples"] == rows["dense"]["samples"] == 1024
    catalog = Catalog.open(named.folder / "catalog.lance")
    chosen = select_for_classes(catalog, RunFolder(folder=named.folder).clustering, NAMES, name="any").fine
    expected = np.flatnonzero(np.isin(catalog.read(["fine_cluster"])["fine_cluster"], chosen))
    done = json.loads((named.folder / "models" / EXPERT / "done.json").read_text())
    assert done["rows"] == len(expected)
    assert [expert.name for expert in load_bundle(named.bundle).class_experts] == [EXPERT]
    best = max(rows[f"expert-{k}"]["average"] for k in range(2))
    assert rows["best single"]["average"] == best, "the bounds are those of the mixture's experts alone"


def test_held_out_pictures_of_the_names_are_asked(named: RunResult) -> None:
    """Labels by a pattern of their own, answers by the models' vectors, the score class by class."""
    decision, tasks = named.results["decision"], Catalog.open(named.folder / "tasks.lance")
    columns = tasks.read(["caption", "key"])
    labels = {}
    for row, caption in enumerate(columns["caption"].astype(str)):
        found = [
            k for k, name in enumerate(NAMES) if re.search(rf"(?<![^\W_]){name}(?![^\W_])", caption, re.IGNORECASE)
        ]
        if len(found) == 1:
            labels[row] = found[0]
    rows, right = np.array(list(labels)), np.array(list(labels.values()))
    assert decision["questions"] == {"class names": len(rows), "all names": len(tasks)}
    assert decision["chance"] == 1 / len(set(right.tolist()))
    assert len(rows) > 40
    pictures = tasks.images(rows)
    for model, way in (("dense", "dense"), (EXPERT, "names")):
        clip = load_clip(named.folder / "models" / model)
        with torch.inference_mode():
            vectors = clip.model.eval().encode_image(clip.images(pictures), normalize=True)
            answers = (vectors @ class_features(clip, NAMES, ["{}"]).T).numpy().argmax(1)
        (asked,) = (one for one in read_predictions(RunPaths(folder=named.folder).names_answers) if one.system == model)
        assert asked.keys == columns["key"][rows].tolist()
        assert asked.outcome.prediction.tolist() == answers.tolist()
        shares = [(answers[right == k] == k).mean() for k in sorted(set(right.tolist()))]
        (row,) = (row for row in decision["rows"] if row["name"] == way)
        assert row["score"]["class names"] == pytest.approx(np.mean(shares))
    assert [row["name"] for row in decision["rows"]] == ["dense", "names", "mixture"]
    for row in decision["rows"]:
        (same,) = (
            model
            for model in named.results["models"]
            if f"{model['name']}@{model['rule']}".removesuffix("@None") == row["model"]
        )
        assert row["score"]["all names"] == pytest.approx(same["average"])
        assert (row["samples"], row["towers"]) == (same["samples"], 2 if row["name"] == "mixture" else 1)
        assert row["megabytes"] == pytest.approx(6.5 * row["towers"], abs=0.2)
        assert row["seconds"] > 0
    assert decision["verdict"]["certainty"] in {"likely", "open"}, "one seed is never sure"
    assert {"class names", "all names"} == decision["rows"][1]["gain"].keys()


def test_a_run_prints_the_decision_and_the_page_begins_with_it(
    named: RunResult, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "220")
    _print_run(named)
    printed, decision = capsys.readouterr().out, named.results["decision"]
    for words in (decision["verdict"]["sentence"], decision["caution"], str(named.report), f"these {len(NAMES)} names"):
        assert words in printed
    assert "mixture, uniform" not in printed, "the table of rules is in the report"
    page = parse_page(named.report)
    text = page.text
    places = [
        text.index(words) for words in (decision["verdict"]["sentence"], "What to train Three", "Every model and")
    ]
    assert places == sorted(places)
    assert page.values("tr", "data-way") == ["dense", "names", "mixture"]


@pytest.mark.usefixtures("trains_here")
def test_other_names_train_one_model_and_no_names_none(
    recipe: Path, small_recipe: Path, named: RunResult, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(named.folder, tmp_path / "run"))
    before = times(out)
    run(load_recipe(recipe), out)
    assert times(out) == before, "the same again does nothing"
    trained = {path.parent.name: path.stat().st_mtime_ns for path in (out / "models").glob("*/done.json")}
    (tmp_path / "names.txt").write_text("star\nheart\nhome\n", encoding="utf-8")
    other = with_names(small_recipe, tmp_path, "[names.txt]")  # counted from the recipe's folder
    run(load_recipe(other), out)
    redone = {name for name, moment in times(out).items() if moment != before[name]}
    assert redone == set(STAGES) - {"index", "embed", "cluster"}
    new = {path.parent.name: path.stat().st_mtime_ns for path in (out / "models").glob("*/done.json")}
    assert new.keys() - trained.keys() == {"expert-names"}
    assert {name: new[name] for name in trained} == trained
    before = times(out)
    (tmp_path / "names.txt").write_text("star\nheart\nhome\ncloud\n", encoding="utf-8")
    run(load_recipe(other), out)
    assert times(out)["names"] != before["names"], "the names decide, not the file's path"
    assert times(out)["cluster"] == before["cluster"]
    plain = tmp_path / "plain.yaml"
    plain.write_text(recipe.read_text().replace(f", for_classes: [{', '.join(NAMES)}]", ""), encoding="utf-8")
    run(load_recipe(plain), out)
    assert not (out / "stages" / "names.json").exists()
    assert "decision" not in json.loads((out / "results.json").read_text())


@pytest.mark.slow
def test_a_run_that_is_killed_at_the_names_continues_to_the_same_weights(
    small_recipe: Path, named: RunResult, tmp_path: Path
) -> None:
    out, recipe = Path(shutil.copytree(named.folder, tmp_path / "run")), with_names(small_recipe, tmp_path)
    settings = recipe.read_text().replace("batch_size: 32", "batch_size: 32, engine: {save_every: 1steps}")
    recipe.write_text(settings, encoding="utf-8")
    shutil.rmtree(out / "models" / EXPERT)
    (out / "stages" / "names.json").unlink()
    process = Python("-m", "modeclip", "run", recipe, "--out", out)
    while not list((out / "models" / EXPERT).glob("checkpoints/step-*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    time.sleep(random.Random(0).uniform(0, 0.3))
    process.kill()
    process.wait()
    again = run(load_recipe(recipe), out).results["decision"]
    assert weights_of(out / "models" / EXPERT) == weights_of(named.folder / "models" / EXPERT)
    for row, before in zip(again["rows"], named.results["decision"]["rows"], strict=True):
        assert row | {"seconds": 0} == before | {"seconds": 0}


def test_a_plan_counts_the_expert_for_names(
    recipe: Path, named: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Measurement(seconds_per_step=2.0, memory_gb=1.0, checkpoint_bytes=3_000_000, model_bytes=1_000_000)
    monkeypatch.setattr("modeclip.training.costs.measure", lambda *_: found)
    plan = plan_run(load_recipe(recipe), tmp_path / "new")
    assert [stage.name for stage in plan.stages] == list(STAGES)
    assert {model.name: model.samples for model in plan.models}[EXPERT] == 160
    assert "expert for class names 160" in plan.announcement
    whole = plan_run(load_recipe(recipe), named.folder)
    assert all(stage.is_done for stage in (*whole.stages, *whole.models))
    out = Path(shutil.copytree(named.folder, tmp_path / "run"))
    (out / "stages" / "names.json").unlink()
    left = plan_run(load_recipe(recipe), out)
    assert [stage.name for stage in left.stages if stage.is_done] == ["index", "embed", "cluster"]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("[heart]", r"experts\.for_classes: expected at least 2 different class names, got 'heart' alone"),
        ("[lost/names.txt]", r"classes .*names\.txt: no such file"),
        ("7", r"experts\.for_classes: .*got 7"),
    ],
)
def test_names_that_cannot_be_meant_are_one_line_before_anything_is_done(
    small_recipe: Path, tmp_path: Path, names: str, words: str
) -> None:
    with pytest.raises(ModeclipError, match=words):
        run(load_recipe(with_names(small_recipe, tmp_path, names)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_names_that_no_held_out_caption_holds_are_not_asked(
    named: RunResult, capfd: pytest.CaptureFixture[str]
) -> None:
    systems = [
        System(name="dense", kind="dense", samples=64),
        System(name="expert-quark_gluon", kind="expert", samples=64),
    ]
    held = Catalog.open(named.folder / "tasks.lance")
    assert Contest.of(held, ["quark", "gluon"], "expert-quark_gluon", systems) is None
    assert "no held-out caption holds exactly one of its names" in " ".join(capfd.readouterr().err.split())
    assert Contest.of(held, NAMES, "expert-quark_gluon", systems[1:]) is None
    assert "no dense model of its cost was trained" in " ".join(capfd.readouterr().err.split())
