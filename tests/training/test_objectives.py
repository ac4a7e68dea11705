"""Objectives: the losses against sums written out by hand, and a toy objective that the trainer has never seen."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import load_file
from torch import Tensor

from modeclip.data.catalog import Catalog
from modeclip.errors import ModeclipError
from modeclip.models.clip import load_clip
from modeclip.training.batches import Feed, batch_rows, job_rows
from modeclip.training.gradients import Towers
from modeclip.training.jobs import EngineConfig, TrainConfig
from modeclip.training.objectives import OBJECTIVES
from modeclip.training.objectives.clip import contrastive_loss
from modeclip.training.objectives.objective import Features, Objective, TrainingBatch
from modeclip.training.objectives.siglip import sigmoid_loss
from modeclip.training.trainer import train
from support import Python, make_job


def make_batch(count: int = 6, dimension: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(F.normalize(torch.randn(count, dimension, generator=generator), dim=1) for _ in range(2))  # type: ignore[return-value]


def slow_contrastive(image: Tensor, text: Tensor, scale: float, same: list[int] | None = None) -> float:
    """Cross-entropy both ways, number by number."""
    count, total = len(image), 0.0
    same = list(range(count)) if same is None else same
    for i in range(count):
        others = [j for j in range(count) if j == i or same[i] != same[j]]
        own = scale * float(image[i] @ text[i])
        total -= own - math.log(sum(math.exp(scale * float(image[i] @ text[j])) for j in others))
        total -= own - math.log(sum(math.exp(scale * float(image[j] @ text[i])) for j in others))
    return total / (2 * count)


def slow_smoothed(
    image: Tensor, text: Tensor, scale: float, smoothing: float, same: list[int], groups: list[int]
) -> float:
    """Cross-entropy both ways with a target for each candidate, number by number."""
    count, total = len(image), 0.0
    for i in range(count):
        candidates = [j for j in range(count) if j == i or (same[i] != same[j] and groups[i] == groups[j])]
        for of in (lambda j, i=i: float(image[i] @ text[j]), lambda j, i=i: float(image[j] @ text[i])):
            norm = math.log(sum(math.exp(scale * of(j)) for j in candidates))
            for j in candidates:
                target = (1 - smoothing) * (i == j) + smoothing / len(candidates)
                total -= target * (scale * of(j) - norm)
    return total / (2 * count)


def slow_sigmoid(image: Tensor, text: Tensor, scale: float, bias: float, same: list[int] | None = None) -> float:
    count, total = len(image), 0.0
    same = list(range(count)) if same is None else same
    for i in range(count):
        for j in range(count):
            if i == j or same[i] != same[j]:
                logit = scale * float(image[i] @ text[j]) + bias
                total += math.log(1 + math.exp(-logit if i == j else logit))
    return total / count


@pytest.mark.parametrize("chunk", [1 << 24, 12, 1])
@pytest.mark.parametrize("same", [None, [0, 1, 0, 2, 1, 0]])
def test_losses_equal_sums_by_hand(chunk: int, same: list[int] | None) -> None:
    image, text = make_batch()
    ids = None if same is None else torch.tensor(same)
    got = contrastive_loss(image, text, torch.tensor(7.0), ids, chunk)
    assert float(got) == pytest.approx(slow_contrastive(image, text, 7.0, same), rel=1e-5)
    got = sigmoid_loss(image, text, torch.tensor(7.0), torch.tensor(-3.0), ids, chunk)
    assert float(got) == pytest.approx(slow_sigmoid(image, text, 7.0, -3.0, same), rel=1e-5)


@pytest.mark.parametrize("chunk", [1 << 24, 12, 1])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("same", [[0, 1, 2, 3, 4, 5], [0, 1, 0, 2, 1, 0]])
@pytest.mark.parametrize("groups", [[7, 7, 7, 7, 7, 7], [1, 0, 1, 1, 0, 3]])
def test_groups_and_smoothing_equal_sums_by_hand(
    chunk: int, smoothing: float, same: list[int], groups: list[int]
) -> None:
    image, text = make_batch()
    more = {"groups": torch.tensor(groups), "label_smoothing": smoothing}
    got = contrastive_loss(image, text, torch.tensor(7.0), torch.tensor(same), chunk, **more)  # type: ignore[arg-type]
    assert float(got) == pytest.approx(slow_smoothed(image, text, 7.0, smoothing, same, groups), rel=1e-5)


def test_a_group_of_its_own_is_a_batch_of_its_own() -> None:
    """Two groups in one batch: the sum of what each would have alone, weighed by its share."""
    image, text = make_batch(8)
    groups, scale = torch.tensor([0, 1, 0, 0, 1, 1, 0, 0]), torch.tensor(5.0)
    clip = sum((groups == g).sum() / 8 * contrastive_loss(image[groups == g], text[groups == g], scale) for g in (0, 1))
    torch.testing.assert_close(contrastive_loss(image, text, scale, groups=groups), clip)
    bias = torch.tensor(-2.0)
    parts = ((image[groups == g], text[groups == g], scale, bias) for g in (0, 1))
    sigmoid = sum(len(part[0]) / 8 * sigmoid_loss(*part) for part in parts)
    torch.testing.assert_close(sigmoid_loss(image, text, scale, bias, groups=groups), sigmoid)


def test_smoothing_is_that_of_pytorch() -> None:
    image, text = make_batch(64, 32)
    scale = torch.tensor(30.0, requires_grad=True)
    inputs = [image.requires_grad_(), text.requires_grad_(), scale]
    logits, labels = scale * image @ text.T, torch.arange(64)
    plain = sum(F.cross_entropy(one, labels, label_smoothing=0.1) for one in (logits, logits.T)) / 2
    mine = contrastive_loss(image, text, scale, label_smoothing=0.1, chunk_elements=640)
    torch.testing.assert_close(mine, plain)
    for one, two in zip(torch.autograd.grad(mine, inputs), torch.autograd.grad(plain, inputs), strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("chunk", [1 << 24, 12])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_gradients_equal_finite_differences(kind: str, masked: bool, chunk: int) -> None:
    """The gradient is written out by hand, so PyTorch's numerical check is its judge, in float64."""
    torch.set_default_dtype(torch.float64)
    try:
        image, text = (value.double().requires_grad_() for value in make_batch())
        scale, bias = torch.tensor(5.0, requires_grad=True), torch.tensor([-2.0], requires_grad=True)
        ids = torch.tensor([0, 1, 0, 2, 1, 0]) if masked else None
        groups = torch.tensor([1, 1, 1, 1, 0, 0]) if masked else None
        if kind == "clip":
            inputs = (image, text, scale)
            for smoothing in (0.0, 0.2):
                more = {"groups": groups, "label_smoothing": smoothing}
                assert torch.autograd.gradcheck(lambda i, t, s: contrastive_loss(i, t, s, ids, chunk, **more), inputs)  # noqa: B023
        else:
            assert torch.autograd.gradcheck(
                lambda i, t, s, b: sigmoid_loss(i, t, s, b, ids, chunk, groups=groups), (image, text, scale, bias)
            )
    finally:
        torch.set_default_dtype(torch.float32)


def test_gradients_equal_those_of_two_cross_entropies() -> None:
    image, text = make_batch(64, 32)
    scale = torch.tensor(30.0, requires_grad=True)
    inputs = [image.requires_grad_(), text.requires_grad_(), scale]
    logits = scale * image @ text.T
    labels = torch.arange(64)
    plain = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    for mine, theirs in zip(
        torch.autograd.grad(3 * contrastive_loss(image, text, scale), inputs),
        torch.autograd.grad(3 * plain, inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)


def test_masked_pairs_have_no_gradient_towards_each_other() -> None:
    image, text = make_batch(3)
    image.requires_grad_()
    contrastive_loss(image, text, torch.tensor(9.0), torch.tensor([4, 4, 4])).backward()
    assert image.grad is not None
    assert float(image.grad.abs().max()) < 1e-6, "without negatives there is nothing to learn"


TWO_PROCESSES = """
import sys, torch, torch.distributed as dist
from modeclip.training.objectives.clip import contrastive_loss
from modeclip.training.objectives.siglip import sigmoid_loss
rank, world = map(int, sys.argv[3:])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}.store", rank=rank, world_size=world)
image, text, weight, ids = torch.load(sys.argv[1], weights_only=True)
share = slice(rank * len(image) // world, (rank + 1) * len(image) // world)
found = []
for masked in (False, True):
    for kind in ("clip", "siglip"):
        layer = weight.clone().requires_grad_()
        scale, bias = torch.tensor(9.0, requires_grad=True), torch.tensor(-2.0, requires_grad=True)
        features = [torch.nn.functional.normalize(value[share] @ layer, dim=1) for value in (image, text)]
        own, groups = (ids[share], ids[share] % 2) if masked else (None, None)
        if kind == "clip":
            loss = contrastive_loss(*features, scale, own, 40, groups=groups, label_smoothing=0.1 * masked)
        else:
            loss = sigmoid_loss(*features, scale, bias, own, 40, groups=groups)
        loss.backward()
        grads = [layer.grad, scale.grad] + ([bias.grad] if kind == "siglip" else [])
        loss = loss.detach()
        dist.all_reduce(loss)
        for grad in grads:
            dist.all_reduce(grad)
            grad /= world  # as DDP does
        found.append([loss, *grads])
if rank == 0:
    torch.save(found, sys.argv[2])
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_give_the_gradient_of_one(tmp_path: Path) -> None:
    image, text = make_batch(16, 8)
    weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(5))
    ids = torch.arange(16) % 5
    torch.save((image, text, weight, ids), tmp_path / "in.pt")
    words = ("-c", TWO_PROCESSES, tmp_path / "in.pt", tmp_path / "out.pt")
    for process in [Python(*words, rank, 2) for rank in range(2)]:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    found = iter(torch.load(tmp_path / "out.pt", weights_only=True))
    for masked in (False, True):
        for kind in ("clip", "siglip"):
            layer = weight.clone().requires_grad_()
            scale, bias = torch.tensor(9.0, requires_grad=True), torch.tensor(-2.0, requires_grad=True)
            features = [F.normalize(value @ layer, dim=1) for value in (image, text)]
            own, groups = (ids, ids % 2) if masked else (None, None)
            if kind == "clip":
                loss = contrastive_loss(*features, scale, own, groups=groups, label_smoothing=0.1 * masked)
            else:
                loss = sigmoid_loss(*features, scale, bias, own, groups=groups)
            loss.backward()
            expected = [loss.detach(), layer.grad, scale.grad] + ([bias.grad] if kind == "siglip" else [])
            for one, two in zip(expected, next(found), strict=True):
                torch.testing.assert_close(two, one, atol=1e-5, rtol=1e-5)


class Imitation(Objective):
    """A small distillation: features near those of a frozen teacher, each pair weighed by a column of the catalog."""

    columns = ("weight",)

    def open(self, device: torch.device, catalog: Catalog) -> None:  # noqa: ARG002
        self.teacher = Towers(load_clip(MODEL, seed=7)).to(device).eval()

    def targets(self, batch: TrainingBatch, device: torch.device) -> Mapping[str, Tensor]:
        assert not torch.is_grad_enabled()
        images, texts, *_ = self.teacher(batch.images, batch.tokens)
        return {"images": images, "texts": texts, **super().targets(batch, device)}

    def loss(self, features: Features, targets: Mapping[str, Tensor]) -> Tensor:
        images = (features.images - targets["images"]).square().sum(1)
        texts = (features.texts - targets["texts"]).square().sum(1)
        return (targets["weight"] * (images + texts)).mean()

    def limit(self, model: torch.nn.Module) -> None:
        model.logit_scale.fill_(1.5)

    def values(self, model: torch.nn.Module) -> dict[str, float]:
        return {"scale_here": float(model.logit_scale.detach())}


MODEL = "modeclip-icon-xxxs"


def test_an_objective_of_ones_own_is_trained(
    icons_copy: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of it, whole and in micro-batches: the same weights, its loss as written out here, its own numbers."""
    monkeypatch.setitem(OBJECTIVES, "imitation", Imitation)
    catalog = icons_copy
    weight = np.linspace(0, 1, len(catalog), dtype=np.float32)
    catalog.add_columns({"weight": weight})
    logs, weights = [], []
    for micro_batch in (0, 6):
        engine = EngineConfig(precision="32-true", log_every=1, micro_batch=micro_batch)
        config = TrainConfig(model=MODEL, samples=16 * 32, batch_size=16, loss="imitation", engine=engine)
        job = make_job(catalog, tmp_path / f"micro-{micro_batch}", config, last_step=2)
        train(job)
        logs.append([json.loads(line) for line in (tmp_path / job.name / "log.jsonl").read_text().splitlines()])
        weights.append(load_file(tmp_path / job.name / "open_clip_model.safetensors"))
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=2e-5, rtol=1e-4)
    assert [line["scale_here"] for line in logs[0]] == [1.5, 1.5]
    assert "logit_scale" not in logs[0][0]

    student, teacher = load_clip(MODEL, seed=0), load_clip(MODEL, seed=7)
    rows = job_rows(job, catalog)
    feed = Feed(
        catalog=catalog.path,
        rows=torch.from_numpy(rows),
        config=config,
        tokenizer=student.tokenizer,
        preprocess=student.preprocess,
        image_size=student.image_size,
        columns=("weight",),
    )
    [(batch, _)] = feed.batches(range(1))
    assert batch.extras["weight"].tolist() == weight[batch_rows(rows, 0, 16, 0)].tolist()
    with torch.no_grad():
        mine, theirs = (Towers(clip)(batch.images, batch.tokens) for clip in (student, teacher))
    distance = sum((a - b).square().sum(1) for a, b in zip(mine[:2], theirs[:2], strict=True))
    expected = sum(float(w * d) for w, d in zip(batch.extras["weight"], distance, strict=True)) / 16
    assert logs[0][0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_what_an_objective_reads_is_checked_first(
    icons_catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModeclipError, match=r"unknown train\.loss 'imitation'; known: clip, siglip"):
        TrainConfig(loss="imitation")
    monkeypatch.setitem(OBJECTIVES, "imitation", Imitation)
    config = TrainConfig(model=MODEL, samples=16 * 32, batch_size=16, loss="imitation")
    with pytest.raises(ModeclipError, match=r"needs for train\.loss imitation, 'weight'"):
        train(make_job(icons_catalog, tmp_path / "job", config))
