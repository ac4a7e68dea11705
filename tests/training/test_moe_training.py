"""Training a CLIP-MoE: the routers' losses against a few lines of PyTorch, and kills that change no bit."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import load_file
from torch import Tensor

from modeclip.errors import ModeclipError
from modeclip.models.clip import Clip, assemble_clip, load_clip, save_clip
from modeclip.models.moe import MoeFfn, moe_layers
from modeclip.training.gradients import Towers, backward
from modeclip.training.jobs import AugmentConfig, EngineConfig, TrainConfig
from modeclip.training.objectives import make_objective
from modeclip.training.objectives.objective import TrainingBatch
from modeclip.training.trainer import train
from support import WEIGHTS, Python, make_job, weights_of

MODEL = "modeclip-icon-xxxs"
CONFIG = TrainConfig(
    model=MODEL,
    samples=16 * 32,
    batch_size=16,
    learning_rate=1e-2,
    warmup_fraction=0.0,
    balance_loss=0.3,
    router_z_loss=0.1,
    augment=AugmentConfig(min_crop_share=1.0),
    engine=EngineConfig(precision="32-true", save_every="1steps", log_every=2),
)
BALANCE, Z = CONFIG.balance_loss, CONFIG.router_z_loss


def made() -> Clip:
    """A CLIP-MoE of three experts from different seeds, top-2."""
    base, *others = (load_clip(MODEL, seed=seed) for seed in range(3))
    state = base.model.state_dict()
    experts = [
        {name: other.model.state_dict()[name] if ".mlp." in name else value for name, value in state.items()}
        for other in others
    ]
    return assemble_clip(base, experts)


def one_process(world_size: int = 1) -> Any:
    """What the gradient code asks of Lightning Fabric."""
    return SimpleNamespace(
        device=torch.device("cpu"),
        world_size=world_size,
        backward=Tensor.backward,
        no_backward_sync=lambda *_, **__: nullcontext(),
    )


def batch_of(clip: Clip, count: int = 6) -> TrainingBatch:
    width, height = clip.image_size
    images = torch.randint(0, 256, (count, 3, height, width), generator=torch.Generator().manual_seed(0))
    texts = ["a red heart", "an arrow", "x", "home", "two arrows left", "map"]
    return TrainingBatch(images=images.to(torch.uint8), tokens=clip.tokens(texts[:count]))


def by_hand(clip: Clip, batch: TrainingBatch, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The loss of a batch: CLIP's over all pairs, and the routers' losses over all tokens that are no padding."""
    seen: list[Tensor] = []
    forward = MoeFfn.forward

    def note(layer: MoeFfn, x: Tensor) -> Tensor:
        seen.append(x.reshape(-1, x.shape[-1]) @ layer.router.weight.T)
        return forward(layer, x)

    monkeypatch.setattr(MoeFfn, "forward", note)
    images, texts, scale, *_ = Towers(clip)(batch.images, batch.tokens)
    monkeypatch.undo()
    lengths = batch.tokens.argmax(1) + 1
    within = torch.arange(int(lengths.max())) < lengths[:, None]
    blocks = []
    for number, logits in enumerate(seen):
        if number >= len(seen) // 2:  # texts come second
            logits = logits[within.flatten()]
        shares = torch.bincount(logits.argmax(1), minlength=3) / len(logits)
        balance = 3 * (shares * logits.softmax(1).mean(0)).sum()
        blocks.append(BALANCE * balance + Z * (logits.exp().sum(1).log() ** 2).mean())
    logits = scale * images @ texts.T
    labels = torch.arange(len(logits))
    loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    return loss + sum(blocks) / len(blocks)


@pytest.mark.parametrize("micro_batch", [6, 4, 1])
def test_gradient_has_the_routers_losses_of_the_whole_batch(micro_batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = made()
    clip.model.train()
    batch = batch_of(clip)
    expected = by_hand(clip, batch, monkeypatch)
    expected.backward()
    grads = {name: value.grad.clone() for name, value in clip.model.named_parameters()}
    clip.model.zero_grad()
    towers = Towers(clip, balance_loss=BALANCE, router_z_loss=Z)
    found, _ = backward(towers, one_process(), batch, make_objective(CONFIG), micro_batch=micro_batch, seed=(0,))
    torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=1e-5)
    for name, value in clip.model.named_parameters():
        torch.testing.assert_close(value.grad, grads[name], atol=1e-5, rtol=1e-4, msg=name)
    routers = [layer.router.weight.grad for layer in moe_layers(clip.model)]
    assert all(bool(grad.any()) for grad in routers)


def test_a_plain_clip_has_no_routers_losses() -> None:
    clip = load_clip(MODEL, seed=0)
    batch = batch_of(clip)
    assert Towers(clip, balance_loss=1.0, router_z_loss=1.0)(batch.images, batch.tokens)[4].shape == (0,)


RANK = """
import sys
from pathlib import Path
from modeclip.training.distributed import leave_processes
from modeclip.training.jobs import TrainJob
from modeclip.training.trainer import train
for path in sys.argv[1:]:
    train(TrainJob.load(Path(path)))
leave_processes()
"""


def test_two_processes_train_what_one_does(icons_catalog: Path, folder: Path, tmp_path: Path) -> None:
    """A CLIP-MoE with the losses of its routers: whole and its last block alone, with ddp and with fsdp."""
    config = replace(CONFIG, model=str(folder), learning_rate=1e-3)
    part = replace(config, trainable="last:1", seed=1)
    ddp = {"strategy": "ddp", "micro_batch": 4}
    settings = {
        "all-ddp": (config, ddp),
        "all-fsdp": (config, {"strategy": "fsdp"}),
        "last-fsdp": (part, {"strategy": "fsdp"}),
    }
    for name in ("all", "last"):
        train(make_job(icons_catalog, tmp_path / name, settings[f"{name}-fsdp"][0], last_step=2))
    paths = []
    for name, (own, engine) in settings.items():
        own = replace(own, engine=replace(own.engine, **engine))
        paths.append(make_job(icons_catalog, tmp_path / name, own, last_step=2).save())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    world |= {"GROUP_RANK": "0", "ROLE_RANK": "0", "ROLE_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}
    world |= {"TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0"}
    ranks = [Python("-c", RANK, *paths, **world, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]
    for process in ranks:
        _, errors = process.communicate()
        assert process.returncode == 0, errors[-3000:]
    for name in settings:
        folders = tmp_path / name.partition("-")[0], tmp_path / name
        alone, two = (load_file(path / WEIGHTS) for path in folders)
        for tensor, value in alone.items():
            if tensor.endswith(
                "in_proj_bias"
            ):  # a key's bias shifts all logits, so that its gradient is rounding alone
                value, two[tensor] = (x.view(3, -1)[[0, 2]] for x in (value, two[tensor]))
            torch.testing.assert_close(two[tensor], value, atol=2e-5, rtol=1e-4, msg=f"{name}: {tensor}")
        one, many = (json.loads((path / "log.jsonl").read_text().splitlines()[-1]) for path in folders)
        for number in ("loss", "balance", "router_z"):
            assert many[number] == pytest.approx(one[number], abs=2e-4), name


class Killed(BaseException):
    """Ends a job at once."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("moe") / "model"
    save_clip(made(), path)
    return path


def test_killed_training_ends_with_the_same_bits(icons_catalog: Path, folder: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, model=str(folder), engine=replace(CONFIG.engine, micro_batch=8))

    def job(name: str) -> Any:
        return make_job(icons_catalog, tmp_path / name, config, last_step=4)

    def kill_at(step: int) -> Callable[[Clip, int], bool]:
        def visit(clip: Clip, now: int) -> bool:
            del clip
            if now == step:
                raise Killed
            return False

        return visit

    train(job("whole"))
    with pytest.raises(Killed):
        train(job("killed"), visit_every=1, visit=kill_at(3))
    train(job("killed"))
    assert weights_of(tmp_path / "killed") == weights_of(tmp_path / "whole")
    assert json.loads((tmp_path / "killed" / "open_clip_config.json").read_text())["moe"]["num_experts"] == 3
    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert all(1 <= line["balance"] <= 3 and line["router_z"] > 0 for line in lines)


def test_settings() -> None:
    plain = replace(CONFIG, balance_loss=0.01, router_z_loss=0.0).plain()
    assert not {"balance_loss", "router_z_loss"} & plain.keys()
    assert CONFIG.plain()["balance_loss"] == 0.3
    for name in ("balance_loss", "router_z_loss"):
        with pytest.raises(ModeclipError, match=rf"train\.{name}.*-1"):
            replace(CONFIG, **{name: -1.0})
