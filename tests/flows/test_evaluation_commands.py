"""Two runs are compared by what they answered to every image, and their numbers are those of their tables."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modeclip.evaluation.results import read_predictions, read_results
from support import plain_png

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def other_run(small_run: Path, small_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run with another routing rule: only the bundle, the evaluation and the report are made anew."""
    from modeclip.pipeline.recipe import load_recipe
    from modeclip.pipeline.stages import run

    folder = tmp_path_factory.mktemp("other")
    recipe = folder / "small.yaml"
    recipe.write_text(small_recipe.read_text(encoding="utf-8").replace("per_class", "eq6"), encoding="utf-8")
    out = shutil.copytree(small_run, folder / "run")
    (out / "results" / "gone--heroicons.json").write_text("{}", encoding="utf-8")
    run(load_recipe(recipe), out)
    return out


def rows_of(run: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((run / "results.json").read_text(encoding="utf-8"))["models"]
    return rows


def test_two_runs_are_compared_by_their_mixtures(
    small_run: Path, other_run: Path, modeclip_command: Command, tmp_path: Path
) -> None:
    done = modeclip_command("compare", small_run, other_run, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["first"], found["second"]) == ("mixture@per_class", "mixture@eq6")
    averages = [next(row for row in rows_of(run) if row["default"])["average"] for run in (small_run, other_run)]
    assert found["difference"]["mean"] == pytest.approx(averages[0] - averages[1])
    assert [task["task"] for task in found["tasks"]] == ["heroicons", "lucide"]
    done = modeclip_command("compare", small_run, other_run, "--first-system", "oracle", "--second-system", "dense")
    assert done.returncode == 0, done.stderr
    assert "oracle" in done.stdout
    empty = modeclip_command("compare", small_run, tmp_path)
    assert empty.returncode == 2
    assert "no predictions" in empty.stderr
    assert "modeclip run" in empty.stderr


def test_evaluate_says_where_the_router_can_only_guess(
    small_run: Path, modeclip_command: Command, tmp_path: Path
) -> None:
    strange = {"nucleophilic substitution of a benzene ring", "the enthalpy of formation of methane"}
    for task, names in {"chemistry": strange, "icons": {"heart", "book"}}.items():
        for shade, name in enumerate(sorted(names)):
            (tmp_path / task / name).mkdir(parents=True)
            (tmp_path / task / name / "0.png").write_bytes(plain_png(shade))
    tasks = ("--tasks", tmp_path / "chemistry", tmp_path / "icons", "--out", tmp_path / "out")
    done = modeclip_command("evaluate", small_run / "bundle", *tasks)
    assert done.returncode == 0, done.stderr
    [said] = [line for line in " ".join(done.stdout.split()).split(". ") if "out of domain" in line]
    assert "chemistry is out of domain: 2 of 2 names lie farther from their nearest caption" in said
    assert "icons is out of domain" not in said


def test_a_run_keeps_the_answers_of_every_row_of_its_table(small_run: Path, other_run: Path) -> None:
    for run in (small_run, other_run):
        rows = rows_of(run)
        names = [f"{row['name']}@{row['rule']}" if row["rule"] else row["name"] for row in rows]
        score = {(p.system, p.task): p.outcome.hits.mean() for p in read_predictions(run)}
        table = {
            (name, task): row["accuracy"][task]
            for name, row in zip(names, rows, strict=True)
            for task in row["accuracy"]
        }
        assert score == pytest.approx(table)
        marked = {r["model"] for r in read_results(run / "results") if r["modeclip"].get("default")}
        assert marked == {name for name, row in zip(names, rows, strict=True) if row["default"]}
    assert not (other_run / "results" / "gone--heroicons.json").exists(), "of an earlier evaluation"
