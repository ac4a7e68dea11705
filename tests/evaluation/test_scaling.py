from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeclip.commands.evaluation import scaling
from modeclip.errors import ModeclipError
from modeclip.evaluation.scaling import ScalingConfig, ScalingPoint, choose_points, fit_line, fit_scaling, read_points
from modeclip.system.options import call

SIZES = {"xs": 1.8e7, "s": 5e7, "m": 1.2e8}
BUDGETS = (2.5e5, 1e6, 4e6)


def law(
    family: str, A: float, b: float, noise: float = 0.0, seeds: int = 1, seed: int = 0, factor: float = 1.0
) -> list[ScalingPoint]:
    """Return points that follow a law, each seed off by a random share."""
    draw = np.random.default_rng(seed)
    return [
        ScalingPoint(
            name=f"{size} {budget:g}",
            family=family,
            compute=factor * flops * budget,
            errors=tuple((A * (factor * flops * budget) ** -b * np.exp(noise * draw.normal(size=seeds))).tolist()),
        )
        for size, flops in SIZES.items()
        for budget in BUDGETS
    ]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(points: list[ScalingPoint]) -> list[dict[str, Any]]:
    return [
        {"name": point.name, "family": point.family, "compute": point.compute, "error": error, "seed": seed}
        for point in points
        for seed, error in enumerate(point.errors)
    ]


@given(
    A=st.floats(0.5, 50),
    b=st.floats(0.01, 0.3),
    compute=st.lists(st.floats(1e9, 1e18), min_size=2, max_size=8, unique_by=lambda value: round(np.log(value), 2)),
)
def test_a_law_without_noise_is_found(A: float, b: float, compute: list[float]) -> None:
    spent = np.array(compute)
    log_a, found = fit_line(spent, A * spent**-b)
    assert found == pytest.approx(b, abs=1e-6)
    assert np.exp(log_a) == pytest.approx(A, rel=1e-4)


def test_the_line_is_numpys_least_squares() -> None:
    draw = np.random.default_rng(0)
    compute, error = np.exp(draw.normal(30, 3, 12)), draw.uniform(0.1, 0.9, 12)
    slope, log_a = np.polyfit(np.log(compute), np.log(error), 1)
    np.testing.assert_allclose(fit_line(compute, error), [log_a, -slope])


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12, unique=True))
def test_the_frontier_is_what_nothing_cheaper_beats(places: list[tuple[int, int]]) -> None:
    compute, error = np.array(places, float).T
    beaten = [
        any((c <= compute[i] and e <= error[i]) and (c, e) != (compute[i], error[i]) for c, e in places)
        for i in range(len(places))
    ]
    np.testing.assert_array_equal(choose_points(compute, error, "frontier"), np.logical_not(beaten))


def test_intervals_hold_the_law_that_the_points_were_drawn_from() -> None:
    hit = 0
    for seed in range(20):
        points = law("dense", 4.0, 0.06, noise=0.02, seeds=3, seed=seed)
        (found,) = fit_scaling(points, ScalingConfig(points="all", num_resamples=100)).laws
        hit += found.b.low <= 0.06 <= found.b.high
        assert found.b.low < found.b.mean < found.b.high
    assert hit >= 16  # 95 % intervals of nine points, drawn again: rather too narrow


def test_more_noise_and_fewer_seeds_are_wider() -> None:
    def width(noise: float, seeds: int) -> float:
        (found,) = fit_scaling(law("dense", 4.0, 0.06, noise, seeds), ScalingConfig(num_resamples=150)).laws
        return found.b.high - found.b.low

    assert width(0.0, 1) < 1e-9
    assert width(0.01, 10) < width(0.05, 10) < width(0.15, 10)


def test_families_have_their_own_laws_and_are_compared_at_one_error() -> None:
    dense, mixture = law("dense", 4.0, 0.06), law("mode-4", 4.0, 0.066, factor=1.5)
    few = ScalingConfig(num_resamples=30)
    result = fit_scaling([*mixture, *dense], few)
    assert [found.family for found in result.laws] == ["dense", "mode-4"]
    assert [found.b.mean for found in result.laws] == pytest.approx([0.06, 0.066])
    assert result.laws[0].compute_ratio is None
    largest = max(point.compute for point in dense)
    wanted = (largest**-0.06) ** (-1 / 0.066) / largest
    assert result.laws[1].compute_ratio is not None
    assert result.laws[1].compute_ratio.mean == pytest.approx(wanted, rel=1e-3)
    assert result.laws[1].best_error.mean == pytest.approx(4 * (1.5 * largest) ** -0.066)
    one_way, other_way = (fit_scaling(points, few).laws for points in ([*dense, *mixture], [*mixture, *dense]))
    assert one_way == other_way


def test_a_family_that_never_gets_there_has_no_ratio() -> None:
    rising = law("mode-4", 0.1, -0.02)
    result = fit_scaling([*law("dense", 4.0, 0.06), *rising], ScalingConfig(points="all", num_resamples=20))
    assert result.laws[1].compute_ratio is None


def test_points_that_are_beaten_do_not_bend_the_line() -> None:
    points = law("dense", 4.0, 0.06)
    wasted = ScalingPoint(name="m too short", family="dense", compute=points[5].compute, errors=(0.99,))
    frontier, everything = (
        fit_scaling([*points, wasted], ScalingConfig(points=which, num_resamples=50)) for which in ("frontier", "all")
    )
    assert frontier.laws[0].b.mean == pytest.approx(0.06)
    assert everything.laws[0].b.mean != pytest.approx(0.06, abs=1e-4)
    assert [point.name for point in frontier.points if not point.fitted] == ["m too short"]


def test_the_same_seed_gives_the_same_intervals() -> None:
    points = law("dense", 4.0, 0.06, noise=0.05, seeds=2)
    one, same, other = (fit_scaling(points, ScalingConfig(seed=seed, num_resamples=50)).laws for seed in (0, 0, 1))
    assert one == same != other


@pytest.mark.parametrize("which", ["frontier", "all"])
def test_fewer_than_three_sizes_are_refused(which: str) -> None:
    points = law("dense", 4.0, 0.06)[:2]
    with pytest.raises(ModeclipError, match=r"dense.*3 different computes.*got 2.*train more sizes"):
        fit_scaling(points, ScalingConfig(points=which))
    with pytest.raises(ModeclipError, match="expected results, got none"):
        fit_scaling([])


def test_a_frontier_of_two_sizes_is_refused() -> None:
    points = [
        ScalingPoint(name=str(place), family="dense", compute=10.0**place, errors=(error,))
        for place, error in enumerate([0.5, 0.6, 0.7, 0.4])
    ]
    with pytest.raises(ModeclipError, match=r"2 of its 4 computes.*frontier.*--points all"):
        fit_scaling(points)
    assert fit_scaling(points, ScalingConfig(points="all", num_resamples=20)).laws[0].num_points == 4


def test_lines_are_read_as_points_with_seeds(tmp_path: Path) -> None:
    rows = [
        {
            "name": "s",
            "family": "dense",
            "flops_per_sample": 2e9,
            "samples": 1000,
            "accuracy": 0.3,
            "seed": 0,
            "more": [],
        },
        {"name": "s", "family": "dense", "compute": 2e12, "error": 0.72, "seed": 1},
        {"name": "s", "family": "mode-4", "compute": 2e12, "error": 0.6},
    ]
    one, other = write(tmp_path / "a.jsonl", rows[:1]), write(tmp_path / "b.jsonl", rows[1:])
    dense, mixture = read_points([one, other])
    assert (dense.compute, dense.errors, dense.error) == (2e12, (pytest.approx(0.7), 0.72), pytest.approx(0.71))
    assert (mixture.family, mixture.errors) == ("mode-4", (0.6,))


GOOD = {"name": "s", "family": "dense", "compute": 1e12, "error": 0.5}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2: expected a JSON object, got"),
        ("[1]", r"line 2: expected a JSON object, got '\[1\]'"),
        ({**GOOD, "family": None}, "line 2: expected text in family"),
        ({"name": "s", "family": "d", "samples": 4, "error": 0.5}, "compute, or flops_per_sample.*got the fields"),
        ({**GOOD, "compute": "1e12"}, "compute: expected a number, got '1e12'"),
        ({**GOOD, "compute": 0}, "compute: .*above 0, got 0"),
        ({**GOOD, "error": 43.2}, r"error: .*at most 1.*not percent.*got 43\.2"),
        ({**GOOD, "error": float("nan")}, "error: expected a number, got nan"),
        ({**GOOD, "accuracy": 0.5}, "expected either error or accuracy"),
        ({**GOOD, "seed": [1]}, r"seed: expected a number or a name, got \[1\]"),
        ({**GOOD, "compute": 10**400}, "compute: expected a number, got 1000"),
        (json.dumps(GOOD).replace("0.5", "1" * 5000), "expected a JSON object, got"),
        (
            {"name": "s", "family": "d", "flops_per_sample": 1e200, "samples": 1e200, "error": 0.5},
            "compute: .*above 0, got inf",
        ),
        (GOOD, "line 2: s of dense.*twice.*give each seed its number"),
    ],
)
def test_a_line_that_cannot_be_used_is_one_line(tmp_path: Path, row: Any, message: str) -> None:
    path = write(tmp_path / "results.jsonl", [GOOD])
    with path.open("a", encoding="utf-8") as file:
        file.write(row if isinstance(row, str) else json.dumps(row))
    with pytest.raises(ModeclipError, match=message) as caught:
        read_points([path])
    assert "\n" not in str(caught.value)


def test_a_law_too_steep_for_a_number_is_still_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A, at a compute of one, would be above all floats, and the lines through some of the points above all laws."""
    errors = {1e250: 0.9, 1.001e250: 0.5, 1.002e250: 1e-5}
    rows = [{**GOOD, "name": f"{compute}", "compute": compute, "error": error} for compute, error in errors.items()]
    results = write(tmp_path / "results.jsonl", rows)
    call(scaling, [str(results), "--num-resamples", "50", "--out", str(tmp_path), "--json"])
    printed, written = capsys.readouterr().out, (tmp_path / "scaling.json").read_text(encoding="utf-8")
    assert not re.search("NaN|Infinity", printed + written)
    assert json.loads(written)["laws"][0]["A"]["mean"] > 1e300


def test_computes_that_no_logarithm_tells_apart_are_one() -> None:
    near = [1e18, 1e18 + 128, 1e18 + 256]
    points = [ScalingPoint(name=str(c), family="dense", compute=c, errors=(0.5 / n,)) for n, c in enumerate(near, 1)]
    with pytest.raises(ModeclipError, match=r"3 different computes.*got 1.*train more sizes"):
        fit_scaling(points)


def test_a_seed_below_zero_is_refused() -> None:
    with pytest.raises(ModeclipError, match=r"scaling\.seed: expected 0 or more, got -1"):
        ScalingConfig(seed=-1)


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModeclipError, match=r"nothing\.jsonl cannot be read.*give files of JSON lines"):
        read_points([tmp_path / "nothing.jsonl"])


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = [*law("dense", 4.0, 0.06, 0.01, 2), *law("<mode>", 4.0, 0.07, 0.01, 2, seed=1)]
    results, out = write(tmp_path / "results.jsonl", rows_of(points)), tmp_path / "out"
    words = [str(results), "--num-resamples", "50", "--out", str(out), "--what", "top-1 error"]

    call(scaling, words)
    printed = capsys.readouterr().out
    assert "fitted to the Pareto frontier" in printed
    assert re.search(r"dense .* 0\.0\d\d \(0\.0\d\d to 0\.0\d\d\)", printed)
    call(scaling, [*words, "--json"])
    content = json.loads(capsys.readouterr().out)
    assert content == json.loads((out / "scaling.json").read_text(encoding="utf-8"))
    assert [found["family"] for found in content["laws"]] == ["dense", "<mode>"]

    picture = ElementTree.parse(out / "scaling.svg").getroot()
    circles = [mark for mark in picture.iter() if mark.tag.endswith("circle")]
    assert len(circles) == len(points)
    assert not re.search(r"var\(|url\(|href", (out / "scaling.svg").read_text(encoding="utf-8"))
    page = (out / "scaling.html").read_text(encoding="utf-8")
    assert "&lt;mode&gt;" in page
    assert "<mode>" not in page
    assert not re.search(r"(src|href)=", page)


def write_evaluated(folder: Path, accuracies: dict[str, list[float]], **about: object) -> Path:
    """Write what ``modeclip evaluate`` leaves of models, with an accuracy on each task."""
    folder.mkdir(parents=True)
    lines = []
    for model, scores in accuracies.items():
        for task, score in enumerate(scores):
            line = {"dataset": f"task {task}", "model": model, "pretrained": "", "task": "zeroshot_classification"}
            line |= {"metrics": {"acc1": 0.99, "mean_per_class_recall": score}, "language": "en"}
            line |= {"modeclip": {"main": "mean_per_class_recall", "kind": "classification", **about}}
            lines.append(line)
            lines.append(line | {"task": "linear_probe", "metrics": {"mean_per_class_recall": 0.9}})
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_results_of_evaluate_are_points(tmp_path: Path) -> None:
    first = write_evaluated(tmp_path / "a", {"xs": [0.2, 0.4], "m=2\u2028": [0.5, 0.7]}, samples=1000)
    second = write_evaluated(tmp_path / "b", {"xs": [0.3, 0.5]}, samples=1000)
    routed = write_evaluated(tmp_path / "run" / "results", {"mix": [0.6, 0.8]}, rule="per_class")
    write_evaluated(tmp_path / "bound", {"oracle": [1.0, 1.0]}, bound="oracle")
    points = read_points(
        [first, second / "results.jsonl", tmp_path / "run", tmp_path / "bound"],
        families={"m=2\u2028": "wide"},
        compute={"mix": 5e9},
        flops_per_sample={"xs": 1e3, "m=2\u2028": 1e4},
    )
    assert [(point.name, point.family, point.compute) for point in points] == [
        ("xs", "dense", 1e6),
        ("mix", "mixture", 5e9),
        ("m=2\u2028", "wide", 1e7),
    ]
    assert points[0].errors == pytest.approx((0.7, 0.6))  # two seeds
    assert points[1].errors == pytest.approx((0.3,))
    assert routed.is_dir()


def test_what_an_evaluated_model_cost_must_be_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_evaluated(tmp_path / "a", {"xs": [0.2], "s": [0.3], "m": [0.5]}, samples=1000)
    with pytest.raises(ModeclipError, match=r"'s' \(1,000 samples\), 'm'.* cost; give --compute MODEL=FLOPS"):
        read_points([folder], compute={"xs": 1.0})
    uneven = write_evaluated(tmp_path / "b", {"xs": [0.2], "s": [0.3, 0.4]})
    with pytest.raises(ModeclipError, match="'xs' has no result on 'task 1'"):
        read_points([uneven], compute={"xs": 1.0, "s": 2.0})
    call(scaling, [str(folder), "--compute", "xs=1e6", "s=1e7", "--flops-per-sample", "m=1e5", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [point["compute"] for point in found["points"]] == [1e6, 1e7, 1e8]
    for words in (["--compute", "xs"], ["--compute", "xs=many"], ["--family", "=dense"]):
        with pytest.raises(ModeclipError, match=words[0]):
            call(scaling, [str(folder), *words])
