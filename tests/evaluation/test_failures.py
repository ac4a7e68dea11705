"""What cannot be had in an evaluation is named, and loses nothing of the rest."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from modeclip.data.tasks.open import load_tasks
from modeclip.errors import ModeclipError
from modeclip.evaluation.evaluate import EvaluateConfig, _choose, averages, evaluate
from modeclip.evaluation.systems import System, make_bounds
from modeclip.models.pool import ModelRef
from support import WEIGHTS, plain_png


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders ``sound``, ``nan``, ``cut``: models of which two are damaged; ``colours``, ``greys``, ``lost``: tasks."""
    from modeclip.models.clip import load_clip, save_clip

    root = tmp_path_factory.mktemp("plain")
    for name in ("sound", "nan", "cut"):
        save_clip(load_clip("modeclip-icon", seed=0), root / name)
    tensors = load_file(root / "nan" / WEIGHTS)
    tensors["visual.proj"][0, 0] = float("nan")
    save_file(tensors, root / "nan" / WEIGHTS)
    weights = root / "cut" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-5000])
    for task in ("colours", "greys", "lost"):
        for label, name in enumerate(("one", "two", "three")):
            (root / task / name).mkdir(parents=True)
            for number in range(4):
                (root / task / name / f"{number}.png").write_bytes(plain_png((80 * label, 60 * number, len(task))))
    return root


def evaluate_plain(out: Path, *words: str) -> tuple[int, str, str, list[dict[str, object]]]:
    """Run the command; return its exit code, output, error output and results."""
    from modeclip.commands import main

    stdout, stderr = io.StringIO(), io.StringIO()
    code = 0
    with redirect_stdout(stdout), redirect_stderr(stderr):
        try:
            main(["evaluate", *words, "--out", str(out)])
        except SystemExit as stop:
            code = stop.code
    lines = (out / "results.jsonl").read_text().splitlines() if (out / "results.jsonl").exists() else []
    return code, stdout.getvalue(), stderr.getvalue(), [json.loads(line) for line in lines]


def test_a_model_that_cannot_answer_loses_no_other_result(plain: Path, tmp_path: Path) -> None:
    models = [str(plain / name) for name in ("nan", "sound", "cut")]
    code, out, err, results = evaluate_plain(tmp_path, *models, "--tasks", str(plain / "colours"), str(plain / "greys"))
    assert code == 2
    assert [(result["model"], result["dataset"]) for result in results] == [("sound", "colours"), ("sound", "greys")]
    assert "sound" in out
    for task in ("colours", "greys"):
        assert re.search(
            f"task '{task}', model 'nan': .*not finite.*weights are damaged, or its training diverged", err
        )
        assert re.search(f"task '{task}', model 'cut': .*", err)
    assert "Traceback" not in err
    assert re.search("error: evaluate: 4 problems, named above; all other results are in", err.splitlines()[-1])


def test_a_task_that_cannot_be_read_loses_no_other_result(plain: Path, tmp_path: Path) -> None:
    task = tmp_path / "broken"
    shutil.copytree(plain / "lost", task)
    (task / "two" / "1.png").write_bytes(b"no picture")
    words = [str(plain / "sound"), "--tasks", str(task), str(plain / "colours"), "--json"]
    code, out, err, results = evaluate_plain(tmp_path / "out", *words)
    assert code == 2
    assert [result["dataset"] for result in results] == ["colours"]
    [problem] = json.loads(out)["failed"]
    assert "task 'broken'" in problem
    assert problem in err


def test_a_mixture_names_the_expert_whose_vectors_are_not_finite(plain: Path) -> None:
    task = load_tasks([str(plain / "colours")])[0]
    refs = tuple(ModelRef.of(name, str(plain / name)) for name in ("sound", "nan"))
    with pytest.raises(
        ModeclipError, match="task 'colours', model 'both': nan: 12 of 12 vectors of its images are not"
    ):
        evaluate([System(name="both", models=refs)], [task], EvaluateConfig())
    problems: list[str] = []
    single = System(name="sound", models=refs[:1])
    found = evaluate([System(name="both", models=refs), single], [task], EvaluateConfig(), failed=problems.append)
    assert [result.system for result in found] == ["sound"]
    assert len(problems) == 1


def test_averages_of_models_that_lack_a_task_are_not_compared(plain: Path) -> None:
    tasks = load_tasks([str(plain / name) for name in ("colours", "greys")])
    systems = [System(name=name, models=(ModelRef.of(name, str(plain / "sound")),)) for name in ("one", "two")]
    results = evaluate(systems, tasks, EvaluateConfig())
    one, two = averages(results[:-1])
    assert (len(one.tasks), len(two.tasks), two.versus_first, two.test) == (2, 1, None, None)
    assert averages(results)[1].versus_first is not None
    bounds = make_bounds(["one", "two"])
    chosen = [result for bound in bounds for result in _choose(bound, results[:-1])]
    assert [(result.system, result.task.name) for result in chosen] == [
        ("best single", "colours"),
        ("oracle", "colours"),
    ]


def test_a_probe_whose_scores_overflow_keeps_its_result(plain: Path, tmp_path: Path) -> None:
    task = tmp_path / "task"
    for split in ("train", "test"):
        shutil.copytree(plain / "colours", task / split)
    code, _, err, results = evaluate_plain(tmp_path / "out", str(plain / "sound"), "--tasks", str(task), "--probe")
    assert code == 0, err
    [probe] = [result for result in results if result["task"] == "linear_probe"]
    assert all(math.isfinite(trial["loss"]) for trial in probe["modeclip"]["probe"]["sweep"])
