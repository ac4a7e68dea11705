"""Training: the loss and the schedule against oracles, and exactness through checkpoints, kills and hand-overs."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from modeclip.clip import encode_text, load_clip, save_clip
from modeclip.errors import ModeclipError
from modeclip.indexing import index
from modeclip.jobs import EngineConfig, TrainConfig, TrainJob, learning_rate_at
from modeclip.sources import DataConfig
from modeclip.training import batch_rows, contrastive_loss, train

CONFIG = TrainConfig(samples=32 * 32, batch_size=32, engine=EngineConfig(precision="32-true", save_every="0s"))


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A catalog of a few hundred real icons."""
    out = tmp_path_factory.mktemp("catalog")
    index(DataConfig(source="icons", train_sets=("octicons",)), out)
    return out / "catalog.lance"


def make_job(catalog: Path, folder: Path, **changes: object) -> TrainJob:
    job = TrainJob(
        name=folder.name,
        folder=str(folder),
        catalog=str(catalog),
        catalog_fingerprint="test",
        config=CONFIG,
        first_step=0,
        last_step=24,
        first_share=0.0,
        last_share=1.0,
    )
    return replace(job, **changes)  # type: ignore[arg-type]


def start(job: TrainJob, **environment: str) -> subprocess.Popen[str]:
    """Train a job in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "modeclip.training", str(job.save())],
        env=os.environ | environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def steps_logged(folder: Path) -> list[int]:
    path = folder / "log.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.is_file() else []


def wait_for_checkpoint(process: subprocess.Popen[str], folder: Path) -> None:
    deadline = time.monotonic() + 120
    while not (folder / "checkpoint.safetensors").is_file():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def weights(folder: Path) -> bytes:
    return (folder / "open_clip_model.safetensors").read_bytes()


def test_contrastive_loss_is_cross_entropy_both_ways() -> None:
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.nn.functional.normalize(torch.randn(5, 7, generator=generator), dim=1) for _ in range(2))
    scale, total = 11.0, 0.0
    for i in range(5):
        cosines = [float(image[i] @ text[j]) for j in range(5)]
        total -= scale * cosines[i] - math.log(sum(math.exp(scale * c) for c in cosines))
        cosines = [float(image[j] @ text[i]) for j in range(5)]
        total -= scale * cosines[i] - math.log(sum(math.exp(scale * c) for c in cosines))
    got = contrastive_loss(image, text, torch.tensor(scale))
    assert float(got) == pytest.approx(total / 10, rel=1e-5)


def test_schedule_rises_to_the_highest_rate_and_falls_to_zero() -> None:
    config = TrainConfig(learning_rate=0.5, warmup_fraction=0.1)
    assert learning_rate_at(0.05, config) == pytest.approx(0.25)
    assert learning_rate_at(0.1, config) == pytest.approx(0.5)
    assert learning_rate_at(0.55, config) == pytest.approx(0.25)
    assert learning_rate_at(1.0, config) == pytest.approx(0.0)


def test_expert_goes_on_where_the_seed_left_the_schedule(tmp_path: Path) -> None:
    seed = make_job(tmp_path, tmp_path / "seed", last_step=27, last_share=27 / 32)
    expert = make_job(tmp_path, tmp_path / "expert-0", first_step=27, last_step=32, first_share=27 / 32)
    assert expert.learning_rate(27) == pytest.approx(seed.learning_rate(27))
    assert expert.learning_rate(32) == pytest.approx(0.0)
    assert expert.learning_rate(27) / CONFIG.learning_rate == pytest.approx(0.0596, abs=6e-3)


@given(count=st.integers(8, 200), batch=st.integers(2, 8), seed=st.integers(0, 3))
def test_batches_are_permutations_of_the_rows(count: int, batch: int, seed: int) -> None:
    rows = np.arange(count, dtype=np.int64) * 3
    per_pass = count // batch
    for first in (0, per_pass):
        seen = np.concatenate([batch_rows(rows, first + step, batch, seed) for step in range(per_pass)])
        assert len(set(seen.tolist())) == per_pass * batch
        assert set(seen.tolist()) <= set(rows.tolist())
    assert (batch_rows(rows, per_pass, batch, seed) == batch_rows(rows, per_pass, batch, seed)).all()


@pytest.mark.parametrize("model", ["modeclip-icon", "ViT-B-32"])
def test_cut_captions_give_the_features_of_full_ones(model: str) -> None:
    clip = load_clip(model)
    clip.model.eval()
    texts = ["arrow", "! warning ! of a much longer kind !", "!"]
    for batch in (texts, texts[2:], texts[:1]):
        tokens = clip.tokens(batch)
        with torch.inference_mode():
            full = clip.model.encode_text(tokens, normalize=True)
            torch.testing.assert_close(encode_text(clip.model, tokens), full, atol=1e-5, rtol=0)


def test_batch_of_images_equals_preprocess_of_each() -> None:
    clip = load_clip("modeclip-icon")
    draw = np.random.default_rng(0)
    right = [Image.fromarray(draw.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(3)]
    wrong = [*right, Image.fromarray(draw.integers(0, 255, (50, 40, 3), dtype=np.uint8))]
    for pictures in (right, wrong):
        expected = torch.stack([clip.preprocess(picture) for picture in pictures])
        torch.testing.assert_close(clip.images(pictures), expected, atol=1e-6, rtol=0)


def test_saved_model_is_a_plain_open_clip_folder(tmp_path: Path) -> None:
    import open_clip

    clip = load_clip("modeclip-icon", seed=3)
    save_clip(clip, tmp_path)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(["a heart", "an arrow"])
    image = preprocess(Image.new("RGB", (70, 50), "red")).unsqueeze(0)
    with torch.inference_mode():
        for method, inputs in (("encode_image", image), ("encode_text", tokens)):
            theirs, ours = getattr(model, method)(inputs), getattr(clip.model.eval(), method)(inputs)
            torch.testing.assert_close(theirs, ours, atol=1e-6, rtol=0)


def test_two_jobs_in_a_row_equal_one(catalog: Path, tmp_path: Path) -> None:
    """Optimizer state, schedule and order of the batches all carry over: not a bit differs."""
    whole = make_job(catalog, tmp_path / "whole")
    first = make_job(catalog, tmp_path / "first", last_step=15, last_share=15 / 24)
    rest = {"first_step": 15, "first_share": 15 / 24, "start_from": first.folder, "start_digest": first.digest}
    for job in (whole, first, make_job(catalog, tmp_path / "second", **rest)):
        train(job)
    assert weights(tmp_path / "second") == weights(tmp_path / "whole")


def test_killed_job_ends_with_the_same_bits(catalog: Path, tmp_path: Path) -> None:
    whole, killed = make_job(catalog, tmp_path / "whole"), make_job(catalog, tmp_path / "killed")
    train(whole)
    process = start(killed)
    wait_for_checkpoint(process, tmp_path / "killed")
    process.kill()
    process.communicate()
    assert not (tmp_path / "killed" / "done.json").exists()
    train(killed)
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    assert steps_logged(tmp_path / "killed") == steps_logged(tmp_path / "whole") == [10, 20, 24]
    first, second = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_sigterm_saves_before_it_ends(catalog: Path, tmp_path: Path) -> None:
    job = make_job(catalog, tmp_path / "job", last_step=2000)
    process = start(job)
    wait_for_checkpoint(process, tmp_path / "job")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM


def test_job_ends_when_its_parent_is_gone(catalog: Path, tmp_path: Path) -> None:
    job = make_job(catalog, tmp_path / "job", last_step=2000)
    process = start(job, MODECLIP_PARENT="1" if os.getpid() != 1 else "2")
    process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM


def test_second_process_in_the_same_folder_gives_up(
    catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modeclip.training.LOCK_PATIENCE_SECONDS", 0.0)
    job = make_job(catalog, tmp_path / "job", last_step=2000)
    process = start(job)
    wait_for_checkpoint(process, tmp_path / "job")
    with pytest.raises(ModeclipError, match="another process is at work in this folder"):
        train(job)
    process.terminate()
    process.communicate(timeout=60)


def test_finished_job_is_not_trained_again(catalog: Path, tmp_path: Path) -> None:
    job = make_job(catalog, tmp_path / "job", last_step=2)
    result = train(job)
    before = (tmp_path / "job" / "open_clip_model.safetensors").stat().st_mtime_ns
    assert train(job) == result
    assert (tmp_path / "job" / "open_clip_model.safetensors").stat().st_mtime_ns == before
    assert train(replace(job, config=replace(CONFIG, seed=1))).digest != result.digest


def test_batch_larger_than_the_selection(catalog: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, samples=10**6, batch_size=4096)
    with pytest.raises(ModeclipError, match=r"pairs are fewer than one batch of 4,096; set train\.batch_size"):
        train(make_job(catalog, tmp_path / "job", config=config))


def test_loss_that_is_not_finite(catalog: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, learning_rate=1e30, warmup_fraction=0.0)
    with pytest.raises(ModeclipError, match=r"the loss is nan at step \d+; lower train\.learning_rate"):
        train(make_job(catalog, tmp_path / "job", config=config))


def test_damaged_checkpoint(catalog: Path, tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "checkpoint.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(ModeclipError, match=r"checkpoint\.safetensors is damaged .*; delete it and run again"):
        train(make_job(catalog, tmp_path / "job"))


def test_expert_without_its_seed(catalog: Path, tmp_path: Path) -> None:
    job = make_job(catalog, tmp_path / "expert-0", start_from=str(tmp_path / "seed"), start_digest="x")
    with pytest.raises(ModeclipError, match="is missing or of another run; train that model first"):
        train(job)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 1}, "train.batch_size must be at least 2"),
        ({"seed_parts": 32}, "train.seed_parts must lie in 1 to 31"),
        ({"samples": 100}, "train.samples must be at least batch_size"),
    ],
)
def test_settings_out_of_range(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ModeclipError, match=message.replace(".", r"\.")):
        TrainConfig(**settings)  # type: ignore[arg-type]
