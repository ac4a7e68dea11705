"""Training: the loss and the schedule against oracles, and exactness through checkpoints, kills and hand-overs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import load_file

import support
from modeclip.data.catalog import Catalog
from modeclip.errors import ModeclipError
from modeclip.models.clip import Clip, load_clip
from modeclip.system.files import only_process
from modeclip.system.processes import PARENT_VARIABLE
from modeclip.training import gradients
from modeclip.training.batches import Feed, batch_rows, job_rows
from modeclip.training.jobs import (
    AugmentConfig,
    EngineConfig,
    TrainConfig,
    TrainJob,
    TrainResult,
    find_job_damage,
    learning_rate_at,
)
from modeclip.training.trainer import FAILED_BATCH_FILE, _Learner, _Pauses, train
from support import Python

CONFIG = TrainConfig(
    model="modeclip-icon-xxs",
    samples=32 * 32,
    batch_size=32,
    engine=EngineConfig(precision="32-true", save_every="5steps"),
)


@pytest.fixture(scope="module")
def catalog(icons_catalog: Path) -> Path:
    return icons_catalog


@pytest.fixture(scope="module")
def whole(catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job that was left alone."""
    job = make_job(catalog, tmp_path_factory.mktemp("alone") / "whole")
    train(job)
    return Path(job.folder)


def make_job(catalog: Path, folder: Path, config: TrainConfig | None = None, **changes: object) -> TrainJob:
    return support.make_job(catalog, folder, config or CONFIG, **changes)


def start(job: TrainJob, **environment: str) -> Python:
    """Train a job in a process of its own."""
    return Python("-m", "modeclip.training.trainer", job.save(), **environment)


def steps_logged(folder: Path) -> list[int]:
    path = folder / "log.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.is_file() else []


def wait_for_checkpoint(process: Python, folder: Path) -> None:
    deadline = time.monotonic() + 120
    while not newest(folder):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def newest(folder: Path) -> Path | None:
    return max(folder.glob("checkpoints/step-*.safetensors"), default=None)


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
    assert expert.learning_rate(27) / CONFIG.highest_rate == pytest.approx(0.0596, abs=6e-3)


def test_two_jobs_in_a_row_equal_one(catalog: Path, tmp_path: Path, whole: Path) -> None:
    """Optimizer state, schedule and order of the batches all carry over: not a bit differs."""
    first = make_job(catalog, tmp_path / "first", last_step=15, last_share=15 / 24)
    rest = {"first_step": 15, "first_share": 15 / 24, "start_from": first.folder, "start_digest": first.digest}
    for job in (first, make_job(catalog, tmp_path / "second", **rest)):
        train(job)
    assert support.weights_of(tmp_path / "second") == support.weights_of(whole)


def test_drawn_pairs_and_other_captions_are_trained_on_and_a_job_goes_on_with_them(
    icons_copy: Catalog, tmp_path: Path
) -> None:
    count = len(icons_copy)
    texts = [None if n % 3 else f"a drawing of number {n}" for n in range(count)]
    icons_copy.add_columns({"p": np.linspace(0, 1, count, dtype=np.float32)}, facts={"method": "test"})
    icons_copy.add_columns({"told": pa.array(texts, pa.string())}, facts={"method": "test"})
    plain = replace(CONFIG, model="modeclip-icon-xxxs")
    config, whole = replace(plain, probability="p", captions="told"), {"last_step": 12}
    last = {"first_step": 7, "first_share": 7 / 12, "start_from": str(tmp_path / "first"), "last_step": 12}
    jobs = [
        make_job(Path(icons_copy.path), tmp_path / "whole", config, **whole),
        make_job(Path(icons_copy.path), tmp_path / "first", config, last_step=7, last_share=7 / 12),
        make_job(Path(icons_copy.path), tmp_path / "rest", config, **last),
        make_job(Path(icons_copy.path), tmp_path / "drawn", replace(config, captions=None), **whole),
        make_job(Path(icons_copy.path), tmp_path / "told", replace(config, probability=None), **whole),
    ]
    found = {job.name: train(job) for job in jobs}
    assert support.weights_of(tmp_path / "rest") == support.weights_of(tmp_path / "whole")
    assert len({support.weights_of(tmp_path / name) for name in ("whole", "drawn", "told")}) == 3
    assert found["whole"].rows == count - 1  # the first has the probability 0
    assert found["told"].rows == count


@pytest.mark.parametrize(
    ("column", "batch_size", "message"),
    [
        (
            lambda count: np.linspace(0, 1.1, count),
            32,
            r"train.probability: column 'odd' has \d+ values outside of \[0, 1",
        ),
        (lambda count: np.full(count, np.nan, np.float32), 32, r"values outside of \[0, 1\], such as nan of "),
        (lambda count: np.arange(count), 32, r"column 'odd' holds int64, expected numbers in \[0, 1\]"),
        (
            lambda count: np.full(count, 0.01),
            32,
            r"a pass reads .* pairs \(train.probability odd\), fewer than one batch",
        ),
        (lambda count: np.zeros(count), 32, r"has no pair of a odd above 0"),
    ],
)
def test_probabilities_that_cannot_be_drawn_from_are_told_first(
    icons_copy: Catalog, tmp_path: Path, column: Callable[[int], np.ndarray], batch_size: int, message: str
) -> None:
    icons_copy.add_columns({"odd": column(len(icons_copy))})
    job = make_job(Path(icons_copy.path), tmp_path / "job", replace(CONFIG, probability="odd", batch_size=batch_size))
    with pytest.raises(ModeclipError, match=message) as caught:
        train(job)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "job" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ("none", r"unknown column .*'none'"),
        ("width", r"'width' cannot replace captions: it holds int32, expected texts"),
    ],
)
def test_captions_that_are_none_are_told_first(catalog: Path, tmp_path: Path, captions: str, message: str) -> None:
    with pytest.raises(ModeclipError, match=message):
        train(make_job(catalog, tmp_path / "job", replace(CONFIG, captions=captions)))


class Killed(BaseException):
    """Ends a job at once, as a kill does: nothing that runs afterwards saves anything."""


@pytest.mark.parametrize("step", [4, 7, 23])
def test_killed_job_ends_with_the_same_bits(catalog: Path, tmp_path: Path, whole: Path, step: int) -> None:
    """Killed before the first checkpoint, behind one, and before the last step."""

    def kill(clip: Clip, now: int) -> bool:
        del clip
        if now == step:
            raise Killed
        return False

    killed = make_job(catalog, tmp_path / "killed")
    with pytest.raises(Killed):
        train(killed, visit_every=1, visit=kill)
    assert not (tmp_path / "killed" / "done.json").exists()
    assert (newest(tmp_path / "killed") is None) == (step < 5)
    train(killed)
    assert support.weights_of(tmp_path / "killed") == support.weights_of(whole)
    assert steps_logged(tmp_path / "killed") == steps_logged(whole) == [10, 20, 24]
    first, second = (load_file(newest(folder) or "") for folder in (whole, tmp_path / "killed"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_killed_process_leaves_what_its_job_continues_from(catalog: Path, tmp_path: Path, whole: Path) -> None:
    killed = make_job(catalog, tmp_path / "killed")
    process = start(killed)
    wait_for_checkpoint(process, tmp_path / "killed")
    process.kill()
    process.communicate()
    assert not (tmp_path / "killed" / "done.json").exists()
    train(killed)
    assert support.weights_of(tmp_path / "killed") == support.weights_of(whole)


@contextmanager
def handled(number: signal.Signals, handler: signal.Handlers | Callable[..., object]) -> Iterator[None]:
    before = signal.signal(number, handler)  # a test may run where it is ignored
    try:
        yield
        assert signal.getsignal(number) == handler, "a training leaves it as it was"
    finally:
        signal.signal(number, before)


def signalling(number: signal.Signals, times: int = 1) -> Callable[[Clip, int], bool]:
    """Return a visit that sends this process a signal at step 3."""

    def visit(clip: Clip, step: int) -> bool:
        del clip
        for _ in range(times if step == 3 else 0):
            os.kill(os.getpid(), number)
        return False

    return visit


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_before_it_ends(catalog: Path, tmp_path: Path, number: signal.Signals) -> None:
    with (
        handled(number, signal.default_int_handler),
        pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as ended,
    ):
        train(make_job(catalog, tmp_path / "job"), visit_every=1, visit=signalling(number))
    assert getattr(ended.value, "code", 128 + signal.SIGINT) == 128 + number
    assert str(newest(tmp_path / "job")).endswith("step-000000003.safetensors")


def test_a_second_ctrl_c_does_not_wait(catalog: Path, tmp_path: Path) -> None:
    with handled(signal.SIGINT, signal.default_int_handler), pytest.raises(KeyboardInterrupt):
        train(make_job(catalog, tmp_path / "job"), visit_every=1, visit=signalling(signal.SIGINT, times=2))
    assert newest(tmp_path / "job") is None


def test_signals_are_left_alone_where_they_are_ignored_and_outside_the_main_thread(
    catalog: Path, tmp_path: Path
) -> None:
    with handled(signal.SIGHUP, signal.SIG_IGN):
        job = make_job(catalog, tmp_path / "job", last_step=4)
        assert train(job, visit_every=1, visit=signalling(signal.SIGHUP)).samples == 4 * 32
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(train, make_job(catalog, tmp_path / "other", last_step=1)).result().samples == 32


@pytest.mark.parametrize(("world_size", "expected"), [(1, [7, 14, 21, 28, 35]), (2, [10, 20, 30, 40])])
def test_processes_that_share_a_job_save_at_the_first_look_behind_an_interval(
    tmp_path: Path, world_size: int, expected: list[int]
) -> None:
    config = replace(CONFIG, engine=EngineConfig(save_every="7steps"))
    learner: Any = _Learner.__new__(_Learner)  # without its model
    learner.job, learner.rows, learner.probability = make_job(tmp_path, tmp_path / "job", config), range(64), None
    learner.step, learner.save = 0, lambda: None
    pauses, saved = _Pauses(learner), []
    for learner.step in range(1, 41) if world_size == 1 else range(10, 41, 10):  # several look every 10 steps alone
        if pauses._is_due():
            pauses.save()
            saved.append(learner.step)
    assert saved == expected


def test_a_job_goes_on_with_the_micro_batch_that_is_asked_for_now(
    catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was found is kept for a job that finds it itself; any other is that of the present settings."""
    used: set[int] = set()
    found: list[int] = []
    own = gradients.backward

    def backward(*words: Any, micro_batch: int, **more: Any) -> Any:
        used.add(micro_batch)
        return own(*words, micro_batch=micro_batch, **more)

    def find(*_: object) -> int:
        found.append(16)
        return 16

    monkeypatch.setattr(gradients, "backward", backward)
    monkeypatch.setattr(gradients, "find_micro_batch", find)
    for step, asked, expected in ((3, 0, 32), (5, 8, 8), (7, "auto", 16), (9, "auto", 16), (11, 4, 4)):
        engine = EngineConfig(precision="32-true", save_every="1steps", micro_batch=asked)  # type: ignore[arg-type]

        def kill(clip: Clip, now: int, last: int = step) -> bool:
            del clip
            if now == last:
                raise Killed
            return False

        used.clear()
        with pytest.raises(Killed):
            train(make_job(catalog, tmp_path / "job", replace(CONFIG, engine=engine)), visit_every=1, visit=kill)
        assert used == {expected}
    assert found == [16]


def test_second_process_in_the_same_folder_gives_up(
    catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modeclip.training.trainer.LOCK_PATIENCE_SECONDS", 0.0)
    job = make_job(catalog, tmp_path / "job")
    (tmp_path / "job").mkdir()
    with (
        only_process(tmp_path / "job"),
        pytest.raises(ModeclipError, match=f"process {os.getpid()} of .*, since .* is at work"),
    ):
        train(job)


@pytest.mark.parametrize("by_whom", ["the other", "this one"])
def test_a_job_of_several_waits_for_the_process_that_was_quicker_to_begin(
    catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_whom: str
) -> None:
    monkeypatch.setenv(PARENT_VARIABLE, "1")
    monkeypatch.setattr("modeclip.training.trainer.LOCK_PATIENCE_SECONDS", 0.0)
    job = make_job(catalog, tmp_path / "job", last_step=1)
    (tmp_path / "job").mkdir()
    is_held = threading.Event()

    def hold() -> None:
        with only_process(tmp_path / "job"):
            is_held.set()
            time.sleep(1)
            if by_whom == "the other":
                support.mark_done(job)

    other = threading.Thread(target=hold)
    other.start()
    is_held.wait()
    assert train(job).samples == (1 if by_whom == "the other" else 32)
    other.join()


def test_a_folder_in_which_another_job_is_trained_is_refused_at_once(catalog: Path, tmp_path: Path) -> None:
    before, job = (make_job(catalog, tmp_path / "job", replace(CONFIG, seed=seed)) for seed in (0, 1))
    before.save()
    for resume in ("latest", "never"):
        with (
            only_process(tmp_path / "job"),
            pytest.raises(
                ModeclipError, match=r"is training with other settings .*seed was 0, now 1; .*choose another"
            ),
        ):
            train(job, resume=resume)
    assert TrainJob.load(tmp_path / "job" / "job.json") == before


def test_what_another_job_has_trained_in_the_meantime_stays(catalog: Path, tmp_path: Path) -> None:
    before, job = (make_job(catalog, tmp_path / "job", replace(CONFIG, seed=seed)) for seed in (0, 1))
    is_held = threading.Event()

    def hold() -> None:
        with only_process(tmp_path / "job"):
            is_held.set()
            time.sleep(1)
            support.mark_done(before)

    (tmp_path / "job").mkdir()
    other = threading.Thread(target=hold)
    other.start()
    is_held.wait()
    with pytest.raises(ModeclipError, match="trained with other settings: seed was 0, now 1"):
        train(job, resume="latest")
    other.join()
    assert TrainJob.load(tmp_path / "job" / "job.json") == before
    assert train(replace(job, last_step=1), resume="never").samples == 32
    assert TrainJob.load(tmp_path / "job" / "job.json").config.seed == 1


def test_finished_job_is_not_trained_again(catalog: Path, tmp_path: Path) -> None:
    job = make_job(catalog, tmp_path / "job", last_step=2)
    result = train(job)
    before = (tmp_path / "job" / "open_clip_model.safetensors").stat().st_mtime_ns
    assert train(job) == result
    assert (tmp_path / "job" / "open_clip_model.safetensors").stat().st_mtime_ns == before
    assert train(replace(job, config=replace(CONFIG, seed=1))).digest != result.digest


def test_batch_larger_than_the_selection(catalog: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, samples=10**6, batch_size=4096)
    with pytest.raises(ModeclipError, match=r"pairs .*fewer.*4,096.*set train\.batch_size"):
        train(make_job(catalog, tmp_path / "job", config=config))


def test_selection_without_a_pair(catalog: Path, tmp_path: Path) -> None:
    with pytest.raises(ModeclipError, match=r"has no pair of width 77; choose others"):
        train(replace(make_job(catalog, tmp_path / "job"), where={"width": 77}))


def test_loss_that_is_not_finite(catalog: Path, tmp_path: Path) -> None:
    """The step is the one at fault, also when the losses are looked at later; its batch is named, nothing is saved."""
    engine = EngineConfig(precision="32-true", log_every=7)
    job = make_job(
        catalog, tmp_path / "job", config=replace(CONFIG, learning_rate=1e30, weight_decay=0.0, engine=engine)
    )
    with pytest.raises(ModeclipError, match=r"loss is nan at step 2.*batch begins with .*lower train\.learning_rate"):
        train(job)
    failed = json.loads((tmp_path / "job" / FAILED_BATCH_FILE).read_text())
    opened = Catalog.open(catalog)
    rows = batch_rows(job_rows(job, opened), failed["step"], CONFIG.batch_size, CONFIG.seed)
    assert failed["keys"] == opened.read(["key"], rows)["key"].tolist()
    assert newest(tmp_path / "job") is None


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x01
    path.write_bytes(content)


@pytest.mark.parametrize("damage", ["no checkpoint", "a flipped byte"])
def test_a_damaged_checkpoint_is_removed_and_training_ends_with_the_same_bits(
    catalog: Path, tmp_path: Path, whole: Path, damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """A flipped byte among the tensors of a checkpoint leaves a file that safetensors reads without a word."""
    job = make_job(catalog, tmp_path / "whole")
    train(replace(job, folder=str(tmp_path / "whole")), visit_every=3, visit=lambda _, step: step == 3)
    (tmp_path / "whole" / "done.json").unlink()
    path = newest(tmp_path / "whole")
    assert path is not None
    if damage == "no checkpoint":
        path.write_bytes(b"not a checkpoint")
    else:
        flip_a_byte(path)
    train(job)
    assert support.weights_of(tmp_path / "whole") == support.weights_of(whole)
    assert path.name in capfd.readouterr().err


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_config.json", "done.json", "checkpoints"])
def test_damage_of_a_finished_job_is_made_anew(catalog: Path, tmp_path: Path, whole: Path, name: str) -> None:
    job = make_job(catalog, tmp_path / "whole")
    shutil.copytree(whole, tmp_path / "whole")
    assert find_job_damage(job) == {}
    assert TrainResult.read(job) is not None
    path = newest(tmp_path / "whole") if name == "checkpoints" else tmp_path / "whole" / name
    assert path is not None
    before = path.read_bytes()
    flip_a_byte(path) if name != "done.json" else path.write_text("[]")
    assert list(find_job_damage(job)) == [path]
    assert TrainResult.read(job) is None
    train(job)
    assert TrainResult.read(job) is not None
    if name != "done.json":  # which says how long it took
        assert path.read_bytes() == before
    assert support.weights_of(tmp_path / "whole") == support.weights_of(whole)


def test_a_finished_job_of_an_earlier_version_has_no_notes_of_its_files(
    catalog: Path, tmp_path: Path, whole: Path
) -> None:
    job = make_job(catalog, tmp_path / "whole")
    shutil.copytree(whole, tmp_path / "whole")
    done = json.loads((tmp_path / "whole" / "done.json").read_text())
    del done["files"]
    (tmp_path / "whole" / "done.json").write_text(json.dumps(done))
    assert TrainResult.read(job) is not None


def test_expert_without_its_seed(catalog: Path, tmp_path: Path) -> None:
    job = make_job(catalog, tmp_path / "expert-0", start_from=str(tmp_path / "seed"), start_digest="x")
    with pytest.raises(ModeclipError, match="train that model first"):
        train(job)


def features(model: torch.nn.Module, images: torch.Tensor, tokens: torch.Tensor) -> list[torch.Tensor]:
    return [model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True)]


def test_step_is_that_of_plain_pytorch(catalog: Path, tmp_path: Path) -> None:
    """Three steps of the engine against a loop of a few lines: same weights, batches, rates and optimizer."""
    job = make_job(catalog, tmp_path / "job", last_step=3)
    train(job)
    clip = load_clip(CONFIG.model, seed=CONFIG.seed)
    decayed = [value for value in clip.model.parameters() if value.ndim >= 2]
    others = [value for value in clip.model.parameters() if value.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.2}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), eps=1e-6)
    feed = Feed(
        catalog=str(catalog),
        rows=torch.from_numpy(job_rows(job, Catalog.open(catalog))),
        config=CONFIG,
        tokenizer=clip.tokenizer,
        preprocess=clip.preprocess,
        image_size=clip.image_size,
    )
    mean, std = (torch.tensor(getattr(clip.model.visual, f"image_{name}")).view(1, 3, 1, 1) for name in ("mean", "std"))
    for step, (batch, _) in enumerate(feed.batches(range(3))):
        for group in optimizer.param_groups:
            group["lr"] = job.learning_rate(step)
        image, text = features(clip.model, (batch.images / 255 - mean) / std, batch.tokens)
        logits = clip.model.logit_scale.exp() * image @ text.T
        labels = torch.arange(len(logits))
        optimizer.zero_grad()
        ((F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2).backward()
        optimizer.step()
    trained = load_file(tmp_path / "job" / "open_clip_model.safetensors")
    for name, value in clip.model.state_dict().items():
        torch.testing.assert_close(trained[name], value, atol=2e-5, rtol=1e-4)


def small_config(**changes: object) -> TrainConfig:
    engine = EngineConfig(precision="32-true", save_every="10h", **changes.pop("engine", {}))  # type: ignore[arg-type]
    return replace(CONFIG, engine=engine, **changes)  # type: ignore[arg-type]


def trained_weights(catalog: Path, folder: Path, config: TrainConfig, last_step: int = 3) -> dict[str, torch.Tensor]:
    train(make_job(catalog, folder, config=config, last_step=last_step))
    return load_file(folder / "open_clip_model.safetensors")


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_micro_batches_change_nothing(catalog: Path, tmp_path: Path, loss: str) -> None:
    """12 leaves a rest of 8: gradients are those of the whole batch, whatever the parts."""
    expected = trained_weights(catalog, tmp_path / "whole", small_config(loss=loss))
    for micro_batch in (8, 12, "auto"):
        config = small_config(loss=loss, engine={"micro_batch": micro_batch})
        parts = trained_weights(catalog, tmp_path / str(micro_batch), config)
        for name, value in expected.items():
            torch.testing.assert_close(parts[name], value, atol=2e-5, rtol=1e-4)


def test_patch_dropout_and_micro_batches_are_repeatable(catalog: Path, tmp_path: Path) -> None:
    config = small_config(
        augment=AugmentConfig(patch_dropout=0.5, color_jitter=0.4, grayscale_probability=0.2), engine={"micro_batch": 8}
    )
    first, second = (trained_weights(catalog, tmp_path / name, config) for name in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    plain = trained_weights(catalog, tmp_path / "plain", small_config())
    assert any(not torch.equal(first[name], plain[name]) for name in first)


def test_visit_sees_the_model_and_ends_the_job(catalog: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, bool]] = []

    def visit(clip: Clip, step: int) -> bool:
        seen.append((step, clip.model.training))
        return step == 8

    result = train(make_job(catalog, tmp_path / "job"), visit_every=4, visit=visit)
    assert seen == [(4, False), (8, False)]
    assert result.samples == 8 * CONFIG.batch_size
    assert (tmp_path / "job" / "done.json").is_file()


def by_torchrun(job: TrainJob) -> None:
    """Train a job in two processes with the environment that torchrun gives them."""
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "ROLE_RANK": "0", "ROLE_WORLD_SIZE": "2"}
    common |= {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0"}
    together(job, common, rank="RANK", local_rank="LOCAL_RANK")


def by_slurm(job: TrainJob) -> None:
    """Train a job in two processes with the environment that srun gives its tasks."""
    common = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NNODES": "1"}
    common |= {"SLURM_NODEID": "0", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NODELIST": "localhost"}
    together(job, common, rank="SLURM_PROCID", local_rank="SLURM_LOCALID")


def together(job: TrainJob, common: dict[str, str], *, rank: str, local_rank: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    tasks = [start(job, **common, **{rank: str(task), local_rank: str(task)}) for task in range(2)]
    for task in tasks:
        _, errors = task.communicate(timeout=240)
        assert task.returncode == 0, errors[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "launch"), [("ddp", by_slurm), ("fsdp", by_torchrun)])
def test_two_processes_train_what_one_does(
    catalog: Path, tmp_path: Path, strategy: str, launch: Callable[[TrainJob], None]
) -> None:
    """Also with micro-batches, over a checkpoint, and read back by one process: the state of both kinds is the same."""
    whole = trained_weights(catalog, tmp_path / "whole", small_config(), last_step=4)
    config = small_config(engine={"strategy": strategy, "micro_batch": 8})
    launch(make_job(catalog, tmp_path / "two", config=config, last_step=2, last_share=0.5))
    second = make_job(
        catalog,
        tmp_path / "then",
        config=config,
        first_step=2,
        first_share=0.5,
        last_step=4,
        start_from=str(tmp_path / "two"),
    )
    launch(second)
    train(replace(second, folder=str(tmp_path / "alone")))
    for folder in ("then", "alone"):
        found = load_file(tmp_path / folder / "open_clip_model.safetensors")
        apart = torch.cat([(found[name] - value).abs().flatten() for name, value in whole.items()])
        # AdamW divides by the gradient's own size, so that rounding shows where a gradient is nearly 0: there a weight
        # may be a tenth of a step (0.001) away; how many are, and how far, depends on the processor
        assert float(apart.max()) < 1e-4
        assert float(apart.mean()) < 1e-8
