"""What a training may change: everything else keeps its bytes, and gets no place in the optimizer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeclip.errors import ModeclipError
from modeclip.models.blocks import last_parameters
from modeclip.models.clip import assemble_clip, load_clip, save_clip
from modeclip.training.experts import ExpertsConfig, plan_jobs
from modeclip.training.jobs import AugmentConfig, EngineConfig, TrainConfig
from modeclip.training.trainer import train
from support import make_job

CONFIG = TrainConfig(
    model="modeclip-icon-xxxs",
    samples=16 * 32,
    batch_size=16,
    learning_rate=1e-2,
    warmup_fraction=0.0,
    weight_decay=0.5,
    augment=AugmentConfig(min_crop_share=1.0),
    engine=EngineConfig(precision="32-true", micro_batch=8),
)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP-MoE of three experts, two of them copies of a model of another seed."""
    base, other = (load_clip("modeclip-icon-xxxs", seed=seed) for seed in (0, 1))
    state = dict(base.model.state_dict())
    state |= {name: value for name, value in other.model.state_dict().items() if ".mlp." in name}
    folder = tmp_path_factory.mktemp("moe") / "model"
    save_clip(assemble_clip(base, [state, state]), folder)
    return folder


@pytest.mark.parametrize("trainable", ["ffn", "last:1", "routers", "added"])
def test_the_rest_keeps_its_bytes(icons_catalog: Path, moe: Path, tmp_path: Path, trainable: str) -> None:
    start = tmp_path / "start"
    if trainable in {"ffn", "last:1"}:
        save_clip(load_clip("modeclip-icon-xxxs", seed=3), start)
    else:
        start = moe
    config = replace(CONFIG, model=str(start), trainable=trainable)
    job = make_job(icons_catalog, tmp_path / "job", config, last_step=2)
    train(job)
    before, after = (load_file(folder / "open_clip_model.safetensors") for folder in (start, Path(job.folder)))
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    expected = {
        "ffn": {name for name in before if ".mlp." in name},
        "last:1": set(last_parameters(load_clip(str(start)).model, 1)),
        "routers": {name for name in before if ".router." in name},
        "added": {name for name in before if ".router." in name or ".experts.1." in name or ".experts.2." in name},
    }
    assert changed <= expected[trainable]
    assert changed >= {name for name in expected[trainable] if name.endswith("weight")}, "biases may have no gradient"
    (checkpoint,) = (tmp_path / "job" / "checkpoints").glob("step-*.safetensors")
    moments = {name.split(".exp_avg.")[1] for name in load_file(checkpoint) if ".exp_avg." in name}
    assert moments == expected[trainable], "no state for what is frozen"


def test_a_whole_model_goes_on_in_part(icons_catalog: Path, tmp_path: Path) -> None:
    """The seed's moments of what is trained are taken over; those of the rest are left behind."""
    seed = make_job(icons_catalog, tmp_path / "seed", CONFIG, last_step=2)
    train(seed)
    config = replace(CONFIG, trainable="last:1")
    job = make_job(icons_catalog, tmp_path / "job", config, first_step=2, last_step=4)
    job = replace(job, start_from=seed.folder, start_digest=seed.digest)
    train(job)
    (before,), (after,) = ([*(tmp_path / name / "checkpoints").glob("step-*.safetensors")] for name in ("seed", "job"))
    old, new = load_file(before), load_file(after)
    trained = set(last_parameters(load_clip(CONFIG.model, seed=0).model, 1))
    assert {name.split(".exp_avg.")[1] for name in new if ".exp_avg." in name} == trained
    steps = {name: float(value) for name, value in new.items() if ".step." in name}
    assert set(steps.values()) == {4.0}
    model, start = (load_file(Path(folder) / "open_clip_model.safetensors") for folder in (job.folder, seed.folder))
    assert {name for name in model if not torch.equal(model[name], start[name])} <= trained
    assert len(new) < len(old)


def test_experts_alone_train_in_part(tmp_path: Path) -> None:
    config = replace(CONFIG, trainable="last:1")
    settings = ExpertsConfig(controls=("random",))
    jobs = plan_jobs(tmp_path / "c.lance", "f", tmp_path, 2, config, settings)
    assert {job.role: job.config.trainable for job in jobs} == {
        "seed": "all", "dense": "all", "dense-total": "all", "expert": "last:1", "random": "last:1"
    }  # fmt: skip
    plain = plan_jobs(tmp_path / "c.lance", "f", tmp_path, 2, CONFIG, settings)
    assert [job.digest for job in plain[:3]] == [job.digest for job in jobs[:3]]
    with pytest.raises(ModeclipError, match=r"train\.trainable last:99: the \w+ tower has \d+ block"):
        plan_jobs(tmp_path / "c.lance", "f", tmp_path, 2, replace(config, trainable="last:99"), settings)


def test_defaults_leave_digests_as_they_were() -> None:
    plain = CONFIG.plain()
    assert not {"trainable", "groups", "label_smoothing", "probability", "captions"} & plain.keys()
    assert replace(CONFIG, trainable="ffn").plain()["trainable"] == "ffn"
    assert json.dumps(replace(CONFIG, label_smoothing=0.1, groups="site").plain()).count("site") == 1


def test_what_cannot_be_trained(icons_catalog: Path, tmp_path: Path) -> None:
    for wrong in ("head", "last", "last:0", "last:-1", "last:N", "last:1.5", "FFN", "", "last:1\n"):
        with pytest.raises(ModeclipError, match=r"train\.trainable.*known: all, ffn, last:N, routers, added$"):
            replace(CONFIG, trainable=wrong)
    job = make_job(icons_catalog, tmp_path / "job", replace(CONFIG, trainable="routers"))
    with pytest.raises(ModeclipError, match=r"train\.trainable routers: the model has no experts; give a CLIP-MoE"):
        train(job)
