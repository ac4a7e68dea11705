"""The plan of a run: counts from the catalog, costs from steps that were really taken, an honest sum."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from modeclip.data.catalog import Catalog
from modeclip.errors import ModeclipError
from modeclip.training.costs import COLUMNS, Plan, measure, plan, wall_time
from modeclip.training.experts import ExpertsConfig, plan_jobs
from modeclip.training.jobs import EngineConfig, TrainConfig, TrainJob
from support import mark_done

TRAIN = TrainConfig(samples=16 * 64, batch_size=16, engine=EngineConfig(precision="32-true", keep_checkpoints=2))


@pytest.fixture(scope="module")
def catalog(icons_copy: Catalog) -> Catalog:
    """Real icons, split in two."""
    catalog = icons_copy
    catalog.add_columns({"expert": (np.arange(len(catalog)) >= 100).astype(np.int32)})
    return catalog


def jobs_of(catalog: Catalog, folder: Path, **settings: object) -> list[TrainJob]:
    config = ExpertsConfig(dense_total=False, dense=False, **settings)  # type: ignore[arg-type]
    return plan_jobs(Path(catalog.path), "f", folder, 2, TRAIN, config)


@pytest.mark.slow
def test_a_plan_counts_and_measures_and_leaves_nothing(catalog: Catalog, tmp_path: Path) -> None:
    jobs = jobs_of(catalog, tmp_path / "models")
    found = plan(jobs, catalog, workers=2)
    assert not (tmp_path / "models").exists()
    rows = {job.name: job for job in found.jobs}
    assert [job.rows for job in found.jobs] == [len(catalog), 100, len(catalog) - 100]
    assert [job.steps for job in found.jobs] == [54, 10, 10]
    assert [job.samples for job in found.jobs] == [54 * 16, 160, 160]
    assert rows["expert-0"].passes == 1.6
    step = {job.seconds_per_step for job in found.jobs}
    assert len(step) == 1  # the three are alike and measured once
    [seconds] = step
    assert seconds is not None
    assert 1e-4 < seconds < 600
    assert [job.seconds for job in found.jobs] == pytest.approx([54 * seconds, 10 * seconds, 10 * seconds])
    assert found.seconds == pytest.approx(64 * seconds)
    weights = 8.2e6 * 4  # parameters of the model
    kept = 2 + 1  # and the one that is being written
    assert found.jobs[0].disk_bytes == pytest.approx((3 * kept + 1) * weights, rel=0.2)
    assert found.disk_bytes == sum(job.disk_bytes for job in found.jobs)
    assert found.jobs[0].memory_gb is not None
    assert 0.1 < found.jobs[0].memory_gb < 10
    assert all(len(row) == len(COLUMNS) for row in found.rows())
    assert json.loads(json.dumps(found.to_json()))["problem"] is None


def test_what_is_done_costs_nothing_more(catalog: Catalog, tmp_path: Path) -> None:
    jobs = jobs_of(catalog, tmp_path)
    for job in jobs:
        mark_done(job)
    found = plan(jobs, catalog)
    assert [(job.share_done, job.seconds, job.disk_bytes) for job in found.jobs] == [(1.0, 0.0, 0)] * 3
    assert found.seconds == 0


def test_a_disk_that_is_too_small_is_said() -> None:
    found = Plan(jobs=(), seconds=0.0, disk_bytes=3_000_000_000, free_bytes=1_500_000_000, folder="/models")
    assert found.problem is not None
    assert re.match(r"/models: .*need 3\.00 GB.*1\.50 .*free some", found.problem)
    assert replace(found, free_bytes=3_000_000_000).problem is None


@pytest.mark.slow
def test_a_job_that_cannot_work_is_said_by_its_own_line(catalog: Catalog, tmp_path: Path) -> None:
    [seed, *_] = jobs_of(catalog, tmp_path)
    wide = replace(seed, config=replace(TRAIN, samples=10**6, batch_size=4096))
    with pytest.raises(ModeclipError, match=r"4,096"):
        plan([wide], catalog)
    with pytest.raises(ModeclipError, match="unknown model 'nonsense'") as caught:
        measure(replace(seed, config=replace(TRAIN, model="nonsense")))
    assert "\n" not in str(caught.value)


def test_wall_time_against_all_hands(tmp_path: Path) -> None:
    """A clock that ticks: at each tick every free worker takes the first job that can start."""
    base = jobs_of_shape(tmp_path)
    for seconds in itertools.product([1, 3], [2, 5], [1, 4], [2]):
        for workers in (1, 2, 3):
            assert wall_time(base, [float(s) for s in seconds], workers) == ticks(base, seconds, workers)


def jobs_of_shape(folder: Path) -> list[TrainJob]:
    jobs = plan_jobs(folder / "c.lance", "f", folder, 2, TRAIN, ExpertsConfig(dense=False))
    assert [job.name for job in jobs] == ["seed", "dense-total", "expert-0", "expert-1"]
    return jobs


def ticks(jobs: list[TrainJob], seconds: tuple[int, ...], workers: int) -> int:
    left = {job.folder: time for job, time in zip(jobs, seconds, strict=True)}
    running, clock = set[str](), 0
    while any(left.values()):
        for job in jobs:
            free = left.get(job.start_from or "", 0) == 0
            if left[job.folder] and job.folder not in running and len(running) < workers and free:
                running.add(job.folder)
        for folder in running:
            left[folder] -= 1
        running = {folder for folder in running if left[folder]}
        clock += 1
    return clock
