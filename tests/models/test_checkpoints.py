"""Checkpoints: ours through kills, damage and full disks; open_clip_train's, of a real run, against AdamW by hand."""

from __future__ import annotations

import math
import pickle
import random
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modeclip.data.catalog import Catalog
from modeclip.errors import ModeclipError
from modeclip.models.checkpoints import (
    Checkpoint,
    check_weights,
    find_checkpoint,
    load_checkpoint,
    load_open_clip_train,
    save_checkpoint,
)
from modeclip.models.clip import load_clip, model_shapes
from support import Python, can_mount, python

OPEN_CLIP_TRAIN = """
import sys
import open_clip
from open_clip_train.main import main
open_clip.add_model_config(sys.argv[1])
main(sys.argv[2:])
"""
NUM_PAIRS = 8


def make_checkpoint(step: int, digest: str = "d", size: int = 4) -> Checkpoint:
    model = {"a.weight": torch.full((size, 3), float(step)), "b": torch.tensor(step)}
    optimizer = {"exp_avg.a.weight": torch.full((size, 3), step / 2), "step.a.weight": torch.tensor(float(step))}
    return Checkpoint(step=step, digest=digest, model=model, optimizer=optimizer, facts={"samples": step * 8})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def trained(icons_catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of one step each, by open_clip_train on real icons: ``epoch_1.pt`` and ``epoch_2.pt``."""
    folder = tmp_path_factory.mktemp("open_clip_train")
    catalog = Catalog.open(icons_catalog)
    rows = np.arange(NUM_PAIRS)
    lines = ["filepath\ttitle"]
    for row, image, caption in zip(rows, catalog.images(rows), catalog.read(["caption"], rows)["caption"], strict=True):
        image.save(folder / f"{row}.png")
        lines.append(f"{folder / f'{row}.png'}\t{caption}")
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    config = Path(sys.modules["modeclip"].__file__ or "").parent / "models" / "configs"
    options = {"train-data": folder / "pairs.csv", "dataset-type": "csv", "model": "modeclip-icon", "device": "cpu"}
    options |= {"batch-size": NUM_PAIRS, "epochs": 2, "warmup": 1, "workers": 0, "logs": folder, "name": "run"}
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    done = python("-c", OPEN_CLIP_TRAIN, config, *words, "--precision", "fp32", PYTHONWARNINGS="ignore")
    assert done.returncode == 0, done.stderr
    return folder / "run" / "checkpoints"


@pytest.fixture(scope="module")
def parameters() -> list[tuple[str, int]]:
    return [(name, value.ndim) for name, value in load_clip("modeclip-icon", seed=0).model.named_parameters()]


def changed(trained: Path, path: Path, **changes: Any) -> Path:
    """Write the last checkpoint of open_clip_train again, with some of its entries changed (None: left out)."""
    content = torch.load(trained / "epoch_2.pt", weights_only=True) | changes
    torch.save({key: value for key, value in content.items() if value is not None}, path)
    return path


def test_round_trip(tmp_path: Path) -> None:
    written = make_checkpoint(7)
    written.model["half"] = torch.randn(2, 5).bfloat16().T  # not contiguous
    written.model["tied"] = written.model["a.weight"]
    path = save_checkpoint(tmp_path, written, keep=1)
    assert path == tmp_path / "checkpoints" / "step-000000007.safetensors"
    read = load_checkpoint(tmp_path)
    assert read is not None
    assert (read.step, read.digest, read.facts) == (7, "d", {"samples": 56})
    assert equal(read.model, written.model)
    assert equal(read.optimizer, written.optimizer)


def test_no_checkpoint(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path, make_checkpoint(1), keep=1)
    assert load_checkpoint(tmp_path, "another") is None


def test_newest_are_kept_and_leftovers_removed(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        save_checkpoint(tmp_path, make_checkpoint(step), keep=2)
        (tmp_path / "checkpoints" / "step-000000999.safetensors.part").write_bytes(b"half")
    save_checkpoint(tmp_path, make_checkpoint(1000), keep=2)
    assert names(tmp_path) == ["step-000000100.safetensors", "step-000001000.safetensors"]
    newest = load_checkpoint(tmp_path)
    assert newest is not None
    assert newest.step == 1000


def test_checkpoint_of_another_job_neither_is_read_nor_outlives(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, make_checkpoint(500, "old"), keep=2)
    save_checkpoint(tmp_path, make_checkpoint(3, "old"), keep=3)
    save_checkpoint(tmp_path, make_checkpoint(10, "new"), keep=1)
    assert names(tmp_path) == ["step-000000010.safetensors"]
    assert find_checkpoint(tmp_path, "old") is None
    save_checkpoint(tmp_path, make_checkpoint(20, "old"), keep=2)
    found = load_checkpoint(tmp_path, "new")
    assert found is not None
    assert found.step == 10


@pytest.mark.parametrize("damage", ["truncated", "no header", "not ours"])
def test_damaged_newest(tmp_path: Path, damage: str) -> None:
    from safetensors.torch import save_file

    for step in (1, 2):
        path = save_checkpoint(tmp_path, make_checkpoint(step), keep=2)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-5])
    elif damage == "no header":
        path.write_bytes(b"")
    else:
        save_file({"x": torch.zeros(1)}, path)
    message = r"step-000000002\.safetensors is damaged.*train its job again.*the one before"
    for digest in (None, "d"):
        with pytest.raises(ModeclipError, match=message):
            load_checkpoint(tmp_path, digest)
    path.unlink()
    before = load_checkpoint(tmp_path)
    assert before is not None
    assert before.step == 1
    path.with_name("step-000000001.safetensors").write_bytes(b"x")
    with pytest.raises(ModeclipError, match="starts again from its beginning"):
        load_checkpoint(tmp_path)


@pytest.mark.slow
def test_killed_while_writing(tmp_path: Path) -> None:
    """Whenever the process dies, the newest checkpoint is whole, and the next run goes on from it."""
    writer = f"""
import sys, torch
from pathlib import Path
from modeclip.models.checkpoints import Checkpoint, save_checkpoint
for step in range(1, 10**6):
    weights = {{"w": torch.full((10**6,), float(step))}}
    state = Checkpoint(step=step, digest="d", model=weights, optimizer={{}}, facts={{}})
    save_checkpoint(Path({str(tmp_path)!r}), state, 1)
"""
    draw = random.Random(0)
    for _ in range(3):
        process = Python("-c", writer)
        before = find_checkpoint(tmp_path)
        deadline = time.monotonic() + 600
        while find_checkpoint_patiently(tmp_path) == before and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(draw.random() * 0.1)
        process.kill()
        process.wait()
        found = load_checkpoint(tmp_path)
        assert found is not None
        assert bool((found.model["w"] == found.step).all())
    assert len([name for name in names(tmp_path) if name.endswith(".safetensors")]) <= 2


def find_checkpoint_patiently(folder: Path) -> Path | None:
    """Look for a checkpoint while another process replaces it."""
    paths = sorted((folder / "checkpoints").glob("*.safetensors"))
    return paths[-1] if paths else None


@pytest.mark.skipif(not can_mount(), reason="mounts a small file system")
def test_disk_full_leaves_the_one_before(tmp_path: Path) -> None:
    code = f"""
import os, torch
from pathlib import Path
from modeclip.models.checkpoints import Checkpoint, save_checkpoint
folder = Path({str(tmp_path)!r})
for step, size in ((1, 1000), (2, 10**6)):
    state = Checkpoint(step=step, digest="d", model={{"w": torch.zeros(size)}}, optimizer={{}}, facts={{}})
    try:
        save_checkpoint(folder, state, 1)
    except ValueError as error:
        print(str(error)[:23], os.listdir(folder / "checkpoints"))
"""
    script = f'mount -t tmpfs -o size=300k tmpfs "{tmp_path}" && "{sys.executable}" -c "$0"'
    command = ["unshare", "-rm", "sh", "-c", script, code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.stdout == "disk full while writing ['step-000000001.safetensors']\n", done.stderr


@pytest.mark.slow
def test_open_clip_train_state_is_given_to_the_right_parameters(
    trained: Path, parameters: list[tuple[str, int]]
) -> None:
    """AdamW's step by hand: weights of epoch 1 and the named state of epoch 2 give the weights of epoch 2."""
    first, second = (load_open_clip_train(trained / f"epoch_{epoch}.pt", parameters) for epoch in (1, 2))
    assert (first.step, second.step) == (1, 2)
    assert second.facts["epoch"] == 2
    groups = torch.load(trained / "epoch_2.pt", weights_only=True)["optimizer"]["param_groups"]
    rate, (beta1, beta2), eps = groups[0]["lr"], groups[0]["betas"], groups[0]["eps"]
    seen_by_shape = 0
    for name, _ in parameters:
        before, after = first.model[name], second.model[name]
        decay = 1 - rate * groups[1]["weight_decay"] * (name in decayed_names(parameters))
        mean = second.optimizer[f"exp_avg.{name}"] / (1 - beta1**2)
        root = (second.optimizer[f"exp_avg_sq.{name}"] / (1 - beta2**2)).sqrt()
        torch.testing.assert_close(before * decay - rate * mean / (root + eps), after, atol=2e-6, rtol=0)
        assert float(second.optimizer[f"step.{name}"]) == 2
        seen_by_shape += not torch.equal(before, after)
    assert seen_by_shape > len(parameters) // 2


def decayed_names(parameters: list[tuple[str, int]]) -> set[str]:
    """Name the parameters that open_clip_train decays, as its own source words it."""
    words = ("bn", "ln", "bias", "logit_scale")
    return {name for name, ndim in parameters if not (ndim < 2 or any(word in name for word in words))}


def test_open_clip_train_state_by_shape_and_value(trained: Path, parameters: list[tuple[str, int]]) -> None:
    """A parameter whose shape no other has: its state is the only one of that shape in the file."""
    state = torch.load(trained / "epoch_2.pt", weights_only=True)["optimizer"]["state"]
    named = load_open_clip_train(trained / "epoch_2.pt", parameters).optimizer
    for name in ("token_embedding.weight", "visual.conv1.weight", "positional_embedding", "logit_scale"):
        (only,) = [entry for entry in state.values() if entry["exp_avg"].shape == named[f"exp_avg.{name}"].shape]
        assert torch.equal(only["exp_avg"], named[f"exp_avg.{name}"])
        assert torch.equal(only["exp_avg_sq"], named[f"exp_avg_sq.{name}"])


def test_groups_by_name(tmp_path: Path) -> None:
    """Parameters of one shape, which only open_clip_train's rule of names puts in order."""
    words = ("head.weight", "relative_position_bias_table", "mlp.weight", "ln_1.weight", "bn.weight", "logit_scale")
    values = {name: torch.nn.Parameter(torch.zeros(2, 2)) for name in words}
    rest = decayed_names([(name, 2) for name in words])
    groups = [{"params": [values[name] for name in words if (name in rest) is decayed]} for decayed in (False, True)]
    optimizer = torch.optim.AdamW(groups)
    for number, value in enumerate(values.values()):
        value.grad = torch.full((2, 2), float(number))
    optimizer.step()
    weights = {name: value.detach() for name, value in values.items()}
    torch.save({"state_dict": weights, "optimizer": optimizer.state_dict()}, tmp_path / "x.pt")
    named = load_open_clip_train(tmp_path / "x.pt", [(name, 2) for name in words]).optimizer
    for name, value in values.items():
        assert torch.equal(named[f"exp_avg.{name}"], optimizer.state[value]["exp_avg"]), name


def test_wrapped_names_and_numbers_of_older_releases(
    trained: Path, tmp_path: Path, parameters: list[tuple[str, int]]
) -> None:
    plain = load_open_clip_train(trained / "epoch_2.pt", parameters)
    content = torch.load(trained / "epoch_2.pt", weights_only=True)
    for group in content["optimizer"]["param_groups"]:
        group["lr"] = np.float64(group["lr"])
    wrapped = {f"module._orig_mod.{name}": value for name, value in content["state_dict"].items()}
    scaler = {"scale": 65536.0, "growth_tracker": 3}
    path = changed(trained, tmp_path / "x.pt", optimizer=content["optimizer"], state_dict=wrapped, scaler=scaler)
    read = load_open_clip_train(path, parameters)
    assert equal(read.model, plain.model)
    assert equal(read.optimizer, plain.optimizer)
    assert read.facts["scaler"] == scaler
    check_weights(path, model_shapes("modeclip-icon"))


def test_weights_alone(trained: Path, tmp_path: Path, parameters: list[tuple[str, int]]) -> None:
    whole = load_open_clip_train(trained / "epoch_2.pt", parameters)
    torch.save({name: value.bfloat16() for name, value in whole.model.items()}, tmp_path / "bare.pt")
    for path in (changed(trained, tmp_path / "x.pt", optimizer=None), tmp_path / "bare.pt"):
        read = load_open_clip_train(path, parameters)
        assert read.step == 0
        assert read.optimizer == {}
        assert all(read.model[name].dtype == torch.float32 for name, _ in parameters)
    assert whole.digest != read.digest


def test_parameter_that_never_had_a_gradient(trained: Path, tmp_path: Path, parameters: list[tuple[str, int]]) -> None:
    optimizer = torch.load(trained / "epoch_2.pt", weights_only=True)["optimizer"]
    del optimizer["state"][0]
    named = load_open_clip_train(changed(trained, tmp_path / "x.pt", optimizer=optimizer), parameters).optimizer
    first = next(name for name, ndim in parameters if name not in decayed_names(parameters))
    assert float(named[f"step.{first}"]) == 0
    assert not named[f"exp_avg.{first}"].any()


def test_tower_that_was_locked(trained: Path, tmp_path: Path, parameters: list[tuple[str, int]]) -> None:
    optimizer = torch.load(trained / "epoch_2.pt", weights_only=True)["optimizer"]
    optimizer["param_groups"][1]["params"].pop()
    path = changed(trained, tmp_path / "x.pt", optimizer=optimizer)
    with pytest.raises(ModeclipError, match=r"64 and 33 parameters.*64 and 34.*NAME@"):
        load_open_clip_train(path, parameters)


def test_optimizer_with_another_order(trained: Path, tmp_path: Path, parameters: list[tuple[str, int]]) -> None:
    optimizer = torch.load(trained / "epoch_2.pt", weights_only=True)["optimizer"]
    optimizer["param_groups"][1]["params"].reverse()
    path = changed(trained, tmp_path / "x.pt", optimizer=optimizer)
    with pytest.raises(ModeclipError, match=r"optimizer's state of \S+ .*not AdamW's.*NAME@"):
        load_open_clip_train(path, parameters)


def test_wrong_model(trained: Path, tmp_path: Path, parameters: list[tuple[str, int]]) -> None:
    shapes = model_shapes("modeclip-icon")
    weights = dict(torch.load(trained / "epoch_2.pt", weights_only=True)["state_dict"])
    del weights["positional_embedding"]
    weights["extra"] = torch.zeros(1)
    weights["logit_scale"] = torch.zeros(2, 2)
    torch.save(weights, tmp_path / "x.pt")
    with pytest.raises(ModeclipError, match=r"missing: positional_embedding.*unexpected: extra.*shape: logit_scale"):
        check_weights(tmp_path / "x.pt", shapes)
    with pytest.raises(ModeclipError, match=r"x\.pt .*another model.*missing: positional_embedding.*set train\.model"):
        load_open_clip_train(tmp_path / "x.pt", parameters)
    ours = replace(make_checkpoint(1), model=weights)
    with pytest.raises(ModeclipError, match=r"other shape: logit_scale \(2, 2\) instead of \(\)"):
        check_weights(save_checkpoint(tmp_path, ours, keep=1), shapes)


class _Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (shutil.rmtree, ("/tmp/no-such-folder-of-modeclip",))


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "harmful.pt").write_bytes(pickle.dumps({"state_dict": _Harmful()}, protocol=2))
    torch.save({"state_dict": _Harmful()}, tmp_path / "harmful2.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"loss": math.pi}, tmp_path / "other.pt")
    torch.save({"w": torch.zeros(1000)}, tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:-2000])
    for name, message in {
        "missing.pt": "is missing",
        "text.pt": "is damaged",
        "harmful.pt": "holds more than tensors and numbers",
        "harmful2.pt": "holds more than tensors and numbers",
        "list.pt": "expected a dictionary, got list",
        "other.pt": "expected .*open_clip_train.*weights, got another",
        "cut.pt": r"is damaged \(",
    }.items():
        with pytest.raises(ModeclipError, match=message) as raised:
            load_open_clip_train(tmp_path / name, [("w", 1)])
        assert "\n" not in str(raised.value)
        assert name in str(raised.value)
