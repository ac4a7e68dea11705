"""The plan of the method: who sees how many samples, on which schedule, from which start; and what a failure leaves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from modeclip.catalog import Catalog
from modeclip.errors import ModeclipError
from modeclip.experts import ExpertsConfig, plan_jobs, run_jobs
from modeclip.jobs import TrainConfig, TrainJob
from modeclip.training import job_rows

TRAIN = TrainConfig(samples=32 * 8 * 10, batch_size=8)


def plan(folder: Path, experts: ExpertsConfig, num_experts: int = 4) -> dict[str, TrainJob]:
    jobs = plan_jobs(folder / "catalog.lance", "f", folder / "models", num_experts, TRAIN, experts)
    return {job.name: job for job in jobs}


def parts(job: TrainJob) -> float:
    return (job.last_step - job.first_step) / TRAIN.steps_per_part


@pytest.mark.parametrize(("budget", "expert", "total"), [("paper", 5, 47), ("matched", 1.2, 31.8)])
def test_budgets_cost_what_they_say(tmp_path: Path, budget: str, expert: float, total: float) -> None:
    """The matched budget is 5/4 parts an expert, rounded down to a step of a tenth of a part."""
    jobs = plan(tmp_path, ExpertsConfig(budget=budget))  # type: ignore[arg-type]
    assert list(jobs) == ["seed", "dense-total", "dense", *(f"expert-{k}" for k in range(4))]
    assert parts(jobs["seed"]) == 27
    assert parts(jobs["dense"]) == 5
    assert [parts(jobs[f"expert-{k}"]) for k in range(4)] == pytest.approx([expert] * 4)
    assert parts(jobs["dense-total"]) == pytest.approx(total)
    assert "dense-total" not in plan(tmp_path, ExpertsConfig(dense_total=False))


@pytest.mark.parametrize("budget", ["paper", "matched"])
def test_schedules_meet_where_the_seed_ends(tmp_path: Path, budget: str) -> None:
    jobs = plan(tmp_path, ExpertsConfig(budget=budget))  # type: ignore[arg-type]
    seed = jobs["seed"]
    for name in ("dense", "expert-0"):
        job = jobs[name]
        assert job.start_from == seed.folder
        assert job.first_step == seed.last_step
        assert job.learning_rate(job.first_step) == pytest.approx(seed.learning_rate(seed.last_step))
        assert job.learning_rate(job.last_step) == pytest.approx(0)
    assert jobs["dense-total"].start_from is None
    assert jobs["dense-total"].learning_rate(jobs["dense-total"].last_step) == pytest.approx(0)


def test_digest_follows_what_decides_the_result(tmp_path: Path) -> None:
    expert = plan(tmp_path, ExpertsConfig())["expert-0"]
    assert replace(expert, folder="/elsewhere", catalog="/elsewhere").digest == expert.digest
    for change in ({"where": {"expert": 1}}, {"threads": 2}, {"catalog_fingerprint": "g"}, {"start_digest": "other"}):
        assert replace(expert, **change).digest != expert.digest  # type: ignore[arg-type]


def test_rows_of_an_expert(small_run: Path, tmp_path: Path) -> None:
    catalog = Catalog.open(small_run / "catalog.lance")
    expert_of_row = catalog.read(["expert"])["expert"]
    job = plan(tmp_path, ExpertsConfig(), 2)["expert-1"]
    assert job_rows(job, catalog).tolist() == np.flatnonzero(expert_of_row == 1).tolist()
    mixed = job_rows(replace(job, out_of_cluster_fraction=0.1), catalog)
    outside = mixed[expert_of_row[mixed] != 1]
    assert set(np.flatnonzero(expert_of_row == 1)) <= set(mixed)
    assert len(outside) == round(0.1 * (expert_of_row != 1).sum()) == len(set(outside))
    assert (mixed == job_rows(replace(job, out_of_cluster_fraction=0.1), catalog)).all()


def test_failure_of_a_job_is_its_own_line(tmp_path: Path) -> None:
    jobs = list(plan(tmp_path, ExpertsConfig(dense_total=False), 1).values())
    with pytest.raises(ModeclipError, match=r"no catalog at .*catalog\.lance"):
        run_jobs(jobs, workers=2)
    assert not (tmp_path / "models" / "dense").exists(), "nothing that depends on the failed job may have started"


def test_settings_out_of_range() -> None:
    with pytest.raises(ModeclipError, match=r"experts\.out_of_cluster_fraction must lie in \[0, 1\], got 2"):
        ExpertsConfig(out_of_cluster_fraction=2.0)
    with pytest.raises(ModeclipError, match=r"experts\.jobs must be at least 1, got 0"):
        ExpertsConfig(jobs=0)
