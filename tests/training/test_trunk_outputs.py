"""What a frozen trunk gave, kept on disk: the same weights as without, after kills too, and errors in one line."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from modeclip.data.catalog import Catalog
from modeclip.errors import ModeclipError
from modeclip.models.clip import Clip, load_clip
from modeclip.models.flops import count_flops
from modeclip.training import trunk_outputs
from modeclip.training.costs import Measurement, plan
from modeclip.training.gradients import Towers
from modeclip.training.jobs import TRUNK_FOLDER, AugmentConfig, EngineConfig, TrainConfig
from modeclip.training.trainer import train
from modeclip.training.trunk_outputs import TrunkOutputs, measure_outputs
from support import WEIGHTS, make_job, weights_of

CONFIG = TrainConfig(
    model="modeclip-icon-xxs",
    samples=32 * 32,
    batch_size=264,  # of 716 pairs: two steps a pass, in pieces of 256 and 8, and what is left in a later one
    total_parts=2,
    seed_parts=1,
    trainable="last:1",
    augment=AugmentConfig(min_crop_share=1.0),
    engine=EngineConfig(precision="32-true", save_every="1steps", log_every=1),
)
KEEPS = replace(CONFIG, engine=replace(CONFIG.engine, keep_trunk=True))


class Killed(BaseException):
    """Ends a job at once."""


@pytest.fixture(scope="module")
def kept(icons_catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job that kept its trunk's outputs, over three passes."""
    job = make_job(icons_catalog, tmp_path_factory.mktemp("kept") / "whole", KEEPS, last_step=5)
    train(job)
    return Path(job.folder)


def test_the_weights_are_those_of_a_trunk_that_runs_every_time(icons_catalog: Path, kept: Path, tmp_path: Path) -> None:
    train(make_job(icons_catalog, tmp_path / "plain", CONFIG, last_step=5))
    plain, with_it = (load_file(folder / WEIGHTS) for folder in (tmp_path / "plain", kept))
    for name, value in plain.items():
        if name.endswith("in_proj_bias"):  # a key's bias shifts all logits: no gradient but rounding
            value, with_it[name] = (x.view(3, -1)[[0, 2]] for x in (value, with_it[name]))
        torch.testing.assert_close(with_it[name], value, atol=2e-5, rtol=1e-4, msg=name)
    assert not (kept / TRUNK_FOLDER).exists(), "it is removed with the end of the training"


def test_later_passes_need_neither_pictures_nor_the_trunk(
    icons_catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded, runs = [], []
    images, run = Catalog.images, Towers.run_trunks
    monkeypatch.setattr(Catalog, "images", lambda self, rows: (decoded.append(len(rows)), images(self, rows))[1])
    monkeypatch.setattr(Towers, "run_trunks", lambda self, *x: (runs.append(len(x[1])), run(self, *x))[1])

    def job(steps: int) -> int:
        decoded.clear()
        runs.clear()
        train(make_job(icons_catalog, tmp_path / str(steps), KEEPS, last_step=steps))
        return sum(runs)

    assert job(2) == 2 + 2 + 528, "two probes, and the pairs of the first pass"
    assert sum(decoded) - 2 * 32 <= 528
    assert job(5) <= 2 + 2 + 716, "every pair once"


@pytest.mark.parametrize("step", [1, 3])
def test_a_killed_job_goes_on_with_the_same_bits(icons_catalog: Path, kept: Path, tmp_path: Path, step: int) -> None:
    job = make_job(icons_catalog, tmp_path / "job", KEEPS, last_step=5)

    def kill(clip: Clip, now: int) -> bool:
        del clip
        if now == step:
            raise Killed
        return False

    with pytest.raises(Killed):
        train(job, visit_every=1, visit=kill)
    (folder,) = (tmp_path / "job" / TRUNK_FOLDER).iterdir()
    assert len(np.fromfile(folder / "kept", np.int64)) >= 264 * min(step, 2)
    train(job)
    assert weights_of(tmp_path / "job") == weights_of(kept)


def test_states_are_read_as_they_were_written(tmp_path: Path) -> None:
    clip = load_clip(CONFIG.model, seed=0)
    outputs = TrunkOutputs(
        folder=tmp_path / "trunk" / "a",
        num_pairs=5,
        image_shape=(3, 4),
        text_shape=(6, 2),
        types=(torch.bfloat16, torch.float32),
        cuts_padding=True,
    )
    (tmp_path / "trunk" / "other").mkdir(parents=True)
    outputs.open()
    assert [path.name for path in (tmp_path / "trunk").iterdir()] == ["a"], "what is left of another training is gone"
    places, lengths = np.array([3, 0]), np.array([2, 6])
    images, texts = torch.randn(2, 3, 4).bfloat16(), torch.randn(2, 6, 2)
    outputs.write(places, images, texts, lengths)
    outputs.open()
    again: TrunkOutputs = pickle.loads(pickle.dumps(outputs))
    assert again.has(np.arange(5)).tolist() == [True, False, False, True, False]
    found = again.read(np.array([0, 3]), np.array([6, 2]))
    assert torch.equal(found[0], images[[1, 0]])
    assert torch.equal(found[1][0], texts[1])
    assert torch.equal(found[1][1, :2], texts[0, :2])
    assert not found[1][1, 2:].any()
    tokens = clip.tokens(["a", "two arrows"]).numpy()
    assert outputs.lengths(tokens).tolist() == [int(row.argmax()) + 1 for row in tokens]


def test_a_disk_that_is_too_small_is_told_before_the_first_step(
    icons_catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def usage(_: Any) -> Any:
        return type("Usage", (), {"free": 1_000_000})()

    monkeypatch.setattr(trunk_outputs.shutil, "disk_usage", usage)
    monkeypatch.setattr("modeclip.training.preflight._check_disk", lambda *_: None)
    job = make_job(icons_catalog, tmp_path / "job", KEEPS, last_step=5)
    with pytest.raises(
        ModeclipError, match=r"job: train\.engine\.keep_trunk takes \d\.\d\d GB for 716 pairs in .*trunk"
    ):
        train(job)
    assert not (tmp_path / "job" / TRUNK_FOLDER).exists()


def test_what_cannot_be_kept() -> None:
    with pytest.raises(ModeclipError, match=r"train\.engine\.keep_trunk .* got train\.trainable ffn; set it to last:N"):
        replace(KEEPS, trainable="ffn")
    for wrong in (
        {"min_crop_share": 0.9},
        {"color_jitter": 0.1},
        {"grayscale_probability": 0.1},
        {"patch_dropout": 0.5},
    ):
        with pytest.raises(ModeclipError, match=rf"keep_trunk needs the same pictures .*train\.augment\.{min(wrong)}"):
            replace(KEEPS, augment=replace(KEEPS.augment, **wrong))


def test_blocks_with_dropout_are_told_in_one_line(icons_catalog: Path, tmp_path: Path) -> None:
    job = make_job(icons_catalog, tmp_path / "job", KEEPS)
    clip, catalog = load_clip(CONFIG.model, seed=0), Catalog.open(icons_catalog)
    with pytest.raises(ModeclipError, match=r"job: train\.engine\.keep_trunk: .* do not give the same twice"):
        measure_outputs(job, catalog, np.arange(9), clip, lambda *_: (torch.rand(2, 3, 4), torch.zeros(2, 3, 4)))


def test_a_plan_counts_the_trunk_once_for_each_pair(
    icons_catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = Measurement(seconds_per_step=1.0, memory_gb=1.0, checkpoint_bytes=0, model_bytes=0)
    monkeypatch.setattr("modeclip.training.costs.measure", lambda *_: taken)
    flops = count_flops(CONFIG.model, 9, trainable="last:1")
    assert 0 < flops.trunk < flops.forward
    assert count_flops(CONFIG.model, 9, trainable="ffn").trunk == 0
    jobs = [make_job(icons_catalog, tmp_path / "a", config, last_step=10) for config in (CONFIG, KEEPS)]
    plain, kept = (plan([job], Catalog.open(icons_catalog)).jobs[0] for job in jobs)
    trunk = (plain.flops_per_sample - kept.flops_per_sample) / (1 - 716 / 2640)
    assert trunk / plain.flops_per_sample == pytest.approx(flops.trunk / flops.training, rel=0.2)
    assert kept.seconds == pytest.approx(10 * kept.flops_per_sample / plain.flops_per_sample)
    assert kept.disk_bytes > 716 * 4 * 17 * 64
    assert plain.disk_bytes == 0
