"""A job is known by what decides its result; its role and index are fields, also of jobs written before there were."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from modeclip.training.experts import ExpertsConfig, plan_jobs
from modeclip.training.jobs import MEMBER_ROLES, Role, TrainConfig, TrainJob, job_name, role_of

TRAIN = TrainConfig(samples=32 * 8 * 10, batch_size=8)
DIGESTS = {"seed": "35f3d2cf66eb446d", "dense-total": "ab462f9816f93283", "expert-1": "d5fce2815175cc46"}
"""Of version 0.1, before jobs had roles: run folders and bundles of that time name them."""


@pytest.fixture
def jobs() -> dict[str, TrainJob]:
    config = ExpertsConfig(controls=("random", "full", "one-step"))
    return {job.name: job for job in plan_jobs(Path("c.lance"), "f", Path("models"), 2, TRAIN, config)}


def test_digests_stay_what_they_were(jobs: dict[str, TrainJob]) -> None:
    assert {name: jobs[name].digest for name in DIGESTS} == DIGESTS
    assert replace(jobs["seed"], role="single", index=7).digest == DIGESTS["seed"]


def test_names_say_role_and_index(jobs: dict[str, TrainJob]) -> None:
    for job in jobs.values():
        assert job.name == job_name(job.role, job.index)
        assert role_of(job.name) == (job.role, job.index)
        assert (job.index is not None) == (job.role in MEMBER_ROLES)
    assert {job.role for job in jobs.values()} == set(get_args(Role)) - {"prior", "single"}
    assert role_of("expert-birds_my-fish") == ("prior", None)
    for name in ("full", "random-walk", "expert", "one-step", "model", "seed-2"):
        assert role_of(name) == ("single", None)


def test_job_files_without_roles_are_read(jobs: dict[str, TrainJob], tmp_path: Path) -> None:
    for job in jobs.values():
        path = replace(job, folder=str(tmp_path / job.name)).save()
        assert TrainJob.load(path) == replace(job, folder=str(tmp_path / job.name))
        content = json.loads(path.read_text())
        del content["role"], content["index"]
        path.write_text(json.dumps(content))
        assert TrainJob.load(path) == replace(job, folder=str(tmp_path / job.name))
