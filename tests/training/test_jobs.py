"""A job is known by what decides its result; its role and index are fields, also of jobs written before there were."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from modeclip.data.selection import Selection
from modeclip.errors import ModeclipError
from modeclip.training.experts import ExpertsConfig, plan_jobs
from modeclip.training.jobs import (
    MEMBER_ROLES,
    EngineConfig,
    Role,
    TrainConfig,
    TrainJob,
    changes,
    job_name,
    prepare,
    role_of,
)
from support import make_job

TRAIN = TrainConfig(samples=32 * 8 * 10, batch_size=8)
DIGESTS = {"seed": "35f3d2cf66eb446d", "dense-total": "ab462f9816f93283", "expert-1": "d5fce2815175cc46"}
"""Of version 0.1, before jobs had roles: run folders and bundles of that time name them."""


@pytest.fixture
def jobs() -> dict[str, TrainJob]:
    config = ExpertsConfig(controls=("random", "full", "one-step"))
    return {job.name: job for job in plan_jobs(Path("c.lance"), "f", Path("models"), 2, TRAIN, config)}


def test_what_jobs_of_earlier_versions_did_not_have_changes_no_digest() -> None:
    config = TrainConfig(model="m", samples=1024, batch_size=32)
    jobs = [make_job("c", Path("/x/job"), config, **more) for more in ({}, {"pairs": "ab"}, {"where": {"expert": 3}})]
    assert [job.digest for job in jobs[:2]] == ["2a3c58ce4831c003", "8a17fe81d73d0010"]
    assert make_job("c", Path("/x/job"), config, where={"expert": 3}, mask="k").digest == "446b2e9a20895e91"
    selected = [replace(job, selection=Selection(where=("width > 3",))) for job in jobs]
    assert [a.digest == b.digest for a, b in zip(jobs, selected, strict=True)] == [False, True, False]
    for name in ("probability", "captions"):
        assert replace(jobs[1], config=replace(config, **{name: "x"})).digest != jobs[1].digest


def test_a_job_keeps_its_selection_in_its_file(tmp_path: Path) -> None:
    job = make_job("c", tmp_path / "job", TrainConfig(probability="p", captions="t"))
    job = replace(job, selection=Selection(where=("a > 3", "b=c"), mask="kept"))
    assert TrainJob.load(job.save()) == job
    content = json.loads((tmp_path / "job" / "job.json").read_text())
    del content["selection"], content["config"]["probability"], content["config"]["captions"]
    (tmp_path / "job" / "job.json").write_text(json.dumps(content))
    before = TrainJob.load(tmp_path / "job" / "job.json")
    assert before.selection.is_all
    assert before.config == TrainConfig(model="modeclip-icon")


def test_digests_stay_what_they_were(jobs: dict[str, TrainJob]) -> None:
    assert {name: jobs[name].digest for name in DIGESTS} == DIGESTS
    assert replace(jobs["seed"], role="single", index=7).digest == DIGESTS["seed"]


def test_the_learning_rate_follows_the_start(jobs: dict[str, TrainJob], tmp_path: Path) -> None:
    """From random weights 1e-3, from trained ones 1e-5, unless it is given; jobs keep the number."""
    assert jobs["seed"].config.learning_rate == 1e-3
    for model in ("ViT-B-32@laion2b_s34b_b79k", "hf-hub:org/name", str(tmp_path)):
        assert TrainConfig(model=model).highest_rate == 1e-5
        assert TrainConfig(model=model, learning_rate=3e-4).highest_rate == 3e-4
        [job, *_] = plan_jobs(Path("c.lance"), "f", tmp_path, 2, replace(TRAIN, model=model), ExpertsConfig())
        assert max(job.learning_rate(step) for step in range(job.last_step)) == pytest.approx(1e-5, rel=0.01)
        assert TrainJob.load(replace(job, folder=str(tmp_path / "job")).save()).config.learning_rate == 1e-5


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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 1}, r"train\.batch_size.*at least 2"),
        ({"seed_parts": 32}, r"train\.seed_parts.*1 to 31"),
        ({"samples": 100}, r"train\.samples.*at least batch_size"),
        ({"total_parts": 0}, "train.total_parts: expected 2 or more, got 0"),
        ({"learning_rate": -1.0}, "train.learning_rate: expected a finite number above 0, got -1.0"),
        ({"learning_rate": float("nan")}, "train.learning_rate: expected a finite number above 0, got nan"),
        ({"weight_decay": -0.1}, "train.weight_decay: expected 0 or more, got -0.1"),
        ({"clip_grad_norm": float("nan")}, "train.clip_grad_norm: expected 0 or more, got nan"),
    ],
)
def test_settings_out_of_range(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ModeclipError, match=message):
        TrainConfig(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "fp8"}, r"train\.engine\.precision.*auto, 32-true, bf16-mixed or 16-mixed.*got 'fp8'"),
        ({"save_every": "soon"}, r"train\.engine\.save_every.*number with s, min, h.*got 'soon'"),
        ({"save_every": "0.5epochs"}, r"train\.engine\.save_every.*whole number of epochs.*got '0\.5epochs'"),
        ({"keep_checkpoints": 0}, r"train\.engine\.keep_checkpoints: expected 1 or more, got 0"),
        ({"report_to": ("mail",)}, r"place in train\.engine\.report_to.*'mail'.*known: tensorboard"),
    ],
)
def test_engine_settings_out_of_range(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ModeclipError, match=message):
        EngineConfig(**settings)  # type: ignore[arg-type]


def test_a_folder_of_another_job_is_refused(tmp_path: Path) -> None:
    config = TrainConfig(samples=8 * 32, batch_size=8)
    job = make_job("catalog.lance", tmp_path / "job", config, last_step=2)
    prepare(job)
    job.save()
    (tmp_path / "job" / "checkpoints").mkdir()
    checkpoint = tmp_path / "job" / "checkpoints" / "step-000000001.safetensors"
    checkpoint.write_bytes(b"weights")
    prepare(job)
    longer = replace(job, config=replace(config, batch_size=16, samples=16 * 32), last_step=99, where={"expert": 1})
    changed = r"batch_size was 8, now 16.*samples was 256, now 512.*where\.expert was None, now 1"
    with pytest.raises(ModeclipError, match=f"{changed}.*--resume never"):
        prepare(longer)
    assert changes(job, replace(job, last_step=99)) == ["last_step was 2, now 99"]
    assert checkpoint.exists()
    prepare(longer, "never")
    assert not checkpoint.exists()
    prepare(longer)
