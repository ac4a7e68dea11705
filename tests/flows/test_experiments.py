"""The page of results is what its records say, and the statistics and candidates behind it are those of plain loops."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

RUNS = Path(__file__).parents[2] / "runs"


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    """The scripts of the experiments, which import each other as they lie in their folder."""
    sys.path.insert(0, str(RUNS))
    import candidates
    import results

    yield {"candidates": candidates, "results": results}
    sys.path.remove(str(RUNS))


def test_tables_are_those_of_the_records(scripts: dict[str, ModuleType]) -> None:
    results = scripts["results"]
    text = (RUNS.parent / "docs" / "results.md").read_text(encoding="utf-8")
    made = results.written(text, results.Records(RUNS / "experiments.jsonl"))
    differing = [pair for pair in zip(made.splitlines(), text.splitlines(), strict=False) if pair[0] != pair[1]]
    assert not differing[:3]  # pytest's own comparison of two whole pages takes minutes
    assert len(made) == len(text)


def test_every_record_has_a_number_for_each_task(scripts: dict[str, ModuleType]) -> None:
    results = scripts["results"]
    records = results.Records(RUNS / "experiments.jsonl")
    count, known = len(records.data["tasks"]), set(records.studies)
    keys = [(line["study"], line["seed"], line["row"]) for line in records.lines]
    assert len(set(keys)) == len(keys)
    assert {study for study, _, _ in keys} <= known | {"data"}
    for line in records.lines:
        if "tasks" in line["values"] and line["study"] != "data":
            values = np.array(line["values"]["tasks"])
            assert values.shape == (count,), line["row"]
            assert ((values >= 0) & (values <= 100)).all(), line["row"]


def test_interval_is_students(scripts: dict[str, ModuleType]) -> None:
    interval, against = scripts["results"].interval, scripts["results"].against
    # three values: mean 2, standard deviation 1, t(0.975, 2) = 4.3027, half width 4.3027 / sqrt(3)
    assert interval([1.0, 2.0, 3.0]) == "2.0\u00a0±\u00a02.5"
    assert interval([4.0]) == "4.0"
    assert interval([]) == ""
    one = {0: np.array([2.0, 4.0]), 1: np.array([3.0, 5.0]), 2: np.array([9.0, 9.0])}
    other = {0: np.array([1.0, 1.0]), 1: np.array([2.0, 2.0])}
    assert against(one, other) == "+2.0\u00a0±\u00a00.0"  # only seeds that both have
    assert against(other, one) == "-2.0\u00a0±\u00a00.0"
    assert against(one, other, np.array([True, False])) == "+1.0\u00a0±\u00a00.0"


def squares(seed: int, num_classes: int = 5, num_fine: int = 20) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    classes, centers = draw.normal(size=(num_classes, 3)), draw.normal(size=(num_fine, 3))
    return ((classes[:, None] - centers) ** 2).sum(2), draw.integers(0, 4, num_fine), draw.uniform(0.5, 2, 4)


@pytest.mark.parametrize("spread", ["nearest", "mean", "gap"])
def test_adaptive_has_a_temperature_for_each_class(scripts: dict[str, ModuleType], spread: str) -> None:
    squared, expert_of_fine, _ = squares(1)
    found = scripts["candidates"].adaptive(squared, expert_of_fine, 4, spread, 0.3)
    for row, weights in zip(squared.tolist(), found, strict=True):
        near = sorted(row)[:16]
        size = {"nearest": near[0], "mean": math.fsum(near) / 16, "gap": math.fsum(near) / 16 - near[0]}[spread]
        affinity = [math.exp(-square / (0.3 * size)) for square in row]
        sums = [sum(a for a, c in zip(affinity, expert_of_fine, strict=True) if c == k) for k in range(4)]
        np.testing.assert_allclose(weights, np.array(sums) / sum(sums), rtol=1e-9)


def test_the_seed_is_one_more_center(scripts: dict[str, ModuleType]) -> None:
    squared, expert_of_fine, factors = squares(2)
    found = scripts["candidates"].with_seed(squared, expert_of_fine, 4, 0.8, 0.2)
    for row, weights in zip(squared.tolist(), found, strict=True):
        affinity = [math.exp(-square / 0.2) for square in [*row, 0.64]]
        owners = [*expert_of_fine, 4]
        sums = [sum(a for a, c in zip(affinity, owners, strict=True) if c == k) for k in range(5)]
        np.testing.assert_allclose(weights, np.array(sums) / sum(sums), rtol=1e-9)
    product = found[:, :4] * factors
    reweighed = scripts["candidates"].reweighed(found[:, :4], factors.tolist())
    np.testing.assert_allclose(reweighed, product / product.sum(1, keepdims=True))
