"""Losses of a student and its teachers: against sums of PyTorch's own softmaxes, in parts, and over two processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from modeclip.errors import ModeclipError
from modeclip.training.jobs import TrainConfig, TrainJob
from modeclip.training.objectives import losses_of
from modeclip.training.objectives.distillation import (
    Teachers,
    feature_loss,
    interactive_loss,
    soft_contrastive_loss,
)
from modeclip.training.objectives.objective import check_dimensions
from support import Python

Student = tuple[Tensor, Tensor, Tensor]


def units(*shape: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def make_student(count: int = 7, dimension: int = 5) -> Student:
    return units(count, dimension, seed=1), units(count, dimension, seed=2), torch.tensor(6.0)


def make_teachers(count: int = 7, number: int = 3, dimension: int = 5, **more: bool) -> Teachers:
    weights = torch.rand(count, number, generator=torch.Generator().manual_seed(5)).softmax(dim=1)
    vectors = (units(count, number, dimension, seed=seed) for seed in (3, 4))
    scales = tuple(3.0 + 2 * k for k in range(number))
    return Teachers(images=next(vectors), texts=next(vectors), weights=weights, scales=scales, **more)


def softmaxes(teachers: Teachers) -> tuple[Tensor, Tensor]:
    """Q, and Q' with a row for each caption, averaged teacher by teacher and pair by pair."""
    count = len(teachers.weights)
    of_images, of_texts = torch.zeros(count, count), torch.zeros(count, count)
    for k, scale in enumerate(teachers.scales):
        logits = scale * teachers.images[:, k] @ teachers.texts[:, k].T
        for i in range(count):
            of_images[i] += teachers.weights[i, k] * logits[i].softmax(0)
            of_texts[i] += teachers.weights[i, k] * logits[:, i].softmax(0)
    return of_images, of_texts


def mixed(teachers: Teachers) -> tuple[Tensor, Tensor]:
    """The softmaxes of the weighted sum of the teachers' logits, number by number."""
    count = len(teachers.weights)
    logits = torch.zeros(count, count)
    for i in range(count):
        for j in range(count):
            for k, scale in enumerate(teachers.scales):
                weight = teachers.weights[i if teachers.weighs_images else j, k]
                logits[i, j] += weight * scale * (teachers.images[i, k] @ teachers.texts[j, k])
    return logits.softmax(dim=1), logits.T.softmax(dim=1)


def slow_entropies(student: Student, targets: tuple[Tensor, Tensor]) -> Tensor:
    images, texts, scale = student
    logits = scale * images @ texts.T
    return sum(F.cross_entropy(one, target) for one, target in zip((logits, logits.T), targets, strict=True)) / 2  # type: ignore[return-value]


def slow_interactive(student: Student, teachers: Teachers) -> Tensor:
    images, texts, scale = student
    total = torch.zeros(())
    for k in range(len(teachers.scales)):
        for i in range(len(images)):
            of_image = (scale * teachers.texts[:, k] @ images[i]).log_softmax(0)[i]
            of_text = (scale * teachers.images[:, k] @ texts[i]).log_softmax(0)[i]
            total = total - teachers.weights[i, k] * (of_image + of_text) / 2
    return total / len(images)


def slow_features(student: Student, teachers: Teachers) -> Tensor:
    images, texts, _ = student
    total = torch.zeros(())
    for k in range(len(teachers.scales)):
        for i in range(len(images)):
            distance = F.mse_loss(images[i], teachers.images[i, k]) + F.mse_loss(texts[i], teachers.texts[i, k])
            total = total + teachers.weights[i, k] * distance
    return total / len(images)


CASES: dict[str, tuple[Callable[..., Tensor], Callable[[Student, Teachers], Tensor]]] = {
    "reinforced": (
        lambda student, teachers, chunk: soft_contrastive_loss(*student, teachers, chunk_elements=chunk),
        lambda student, teachers: slow_entropies(student, softmaxes(teachers)),
    ),
    "affinity": (
        lambda student, teachers, chunk: soft_contrastive_loss(*student, teachers.as_one(), chunk_elements=chunk),
        lambda student, teachers: slow_entropies(student, mixed(teachers)),
    ),
    "kl": (
        lambda student, teachers, chunk: soft_contrastive_loss(
            *student, teachers.as_one(), less_entropy=True, chunk_elements=chunk
        ),
        lambda student, teachers: (
            slow_entropies(student, mixed(teachers))
            + sum(torch.xlogy(one, one).sum() for one in mixed(teachers)) / (2 * len(student[0]))
        ),
    ),
    "icl": (
        lambda student, teachers, chunk: interactive_loss(*student, teachers, chunk_elements=chunk),
        slow_interactive,
    ),
    "mse": (lambda student, teachers, _: feature_loss(*student[:2], teachers), slow_features),
}


@pytest.mark.parametrize("weighs_images", [False, True])
@pytest.mark.parametrize("chunk", [1 << 24, 15, 1])
@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_equal_sums_by_hand(name: str, chunk: int, weighs_images: bool) -> None:
    fast, slow = CASES[name]
    student = tuple(value.requires_grad_() for value in make_student())
    teachers = make_teachers(weighs_images=weighs_images)
    got, expected = fast(student, teachers, chunk), slow(student, teachers)  # type: ignore[arg-type]
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    inputs = student[:2] if name == "mse" else student
    for one, two in zip(torch.autograd.grad(3 * got, inputs), torch.autograd.grad(3 * expected, inputs), strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-4)


def test_teachers_may_have_other_dimensions_where_similarities_are_compared() -> None:
    student, teachers = make_student(), make_teachers(dimension=9)
    for name in ("reinforced", "affinity", "kl"):
        fast, slow = CASES[name]
        assert float(fast(student, teachers, 20)) == pytest.approx(float(slow(student, teachers)), rel=1e-5)
    check_dimensions({"reinforced": 1.0, "kl": 1.0}, 5, 9)
    check_dimensions({"mse": 1.0}, 9, 9)
    with pytest.raises(
        ModeclipError, match=r"icl and mse compare vectors, and the student's have 5 numbers, the teach"
    ):
        check_dimensions(losses_of("clip-kd"), 5, 9)


@pytest.mark.parametrize("name", ["reinforced", "affinity", "kl", "mse"])
def test_a_student_that_is_its_own_teacher_has_the_least_loss(name: str) -> None:
    """No gradient there, and more loss everywhere around."""
    fast, _ = CASES[name]
    student = tuple(value.requires_grad_() for value in make_student())
    images, texts, scale = (value.detach() for value in student)
    weights = torch.ones(len(images), 1)
    teachers = Teachers(images=images[:, None], texts=texts[:, None], weights=weights, scales=(float(scale),))
    least = fast(student, teachers, 20)
    for grad in torch.autograd.grad(least, student, allow_unused=True):
        assert grad is None or float(grad.abs().max()) < 1e-6
    for seed in range(20):
        nudged = tuple(value + 0.05 * units(*value.shape, 1, seed=seed)[..., 0] for value in (images, texts))
        assert float(fast((*nudged, scale), teachers, 20)) > float(least.detach())
    if name in {"kl", "mse"}:
        assert float(least.detach()) == pytest.approx(0, abs=1e-6)


def test_equal_teachers_count_as_one_and_a_weight_of_zero_as_none() -> None:
    student, one = make_student(), make_teachers(number=1)
    twice = Teachers(
        images=one.images.repeat(1, 2, 1),
        texts=one.texts.repeat(1, 2, 1),
        weights=torch.tensor([0.3, 0.7]).repeat(7, 1),
        scales=(3.0, 3.0),
    )
    other = make_teachers(number=2)
    weights = torch.tensor([1.0, 0.0]).repeat(7, 1)
    images, texts = (torch.cat([a, b[:, 1:]], 1) for a, b in ((one.images, other.images), (one.texts, other.texts)))
    without = Teachers(images=images, texts=texts, weights=weights, scales=(3.0, 50.0))
    for fast, _ in CASES.values():
        alone = float(fast(student, one, 20))
        assert float(fast(student, twice, 20)) == pytest.approx(alone, rel=1e-5)
        assert float(fast(student, without, 20)) == pytest.approx(alone, rel=1e-5)


def test_an_average_after_the_softmax_is_not_one_before_it() -> None:
    student, teachers = make_student(), make_teachers()
    after, before = (CASES[name][0](student, teachers, 100) for name in ("reinforced", "affinity"))
    assert abs(float(after) - float(before)) > 1e-3


def test_gradients_equal_finite_differences() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        student = tuple(value.double().requires_grad_() for value in make_student())
        teachers = make_teachers()
        for name in ("reinforced", "icl"):
            fast, _ = CASES[name]
            assert torch.autograd.gradcheck(lambda *inputs: fast(inputs, teachers, 20), student)  # noqa: B023
    finally:
        torch.set_default_dtype(torch.float32)


TWO_PROCESSES = """
import sys, torch, torch.distributed as dist
from modeclip.training.objectives.distillation import Teachers, feature_loss, interactive_loss, soft_contrastive_loss
rank, world = map(int, sys.argv[3:])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}.store", rank=rank, world_size=world)
image, text, layer, images, texts, weights = torch.load(sys.argv[1], weights_only=True)
share = slice(rank * len(image) // world, (rank + 1) * len(image) // world)
teachers = Teachers(images=images[share], texts=texts[share], weights=weights[share], scales=(3.0, 5.0, 7.0))
found = []
for name in ("reinforced", "affinity", "icl", "mse"):
    own, scale = layer.clone().requires_grad_(), torch.tensor(9.0, requires_grad=True)
    features = [torch.nn.functional.normalize(value[share] @ own, dim=1) for value in (image, text)]
    if name == "mse":
        loss = feature_loss(*features, teachers)
    elif name == "icl":
        loss = interactive_loss(*features, scale, teachers, chunk_elements=20)
    else:
        one = teachers if name == "reinforced" else teachers.as_one()
        loss = soft_contrastive_loss(*features, scale, one, chunk_elements=20)
    loss.backward()
    values = [own.grad] + ([] if scale.grad is None else [scale.grad])
    for value in values:
        dist.all_reduce(value)
        value /= world  # as DDP does
    loss = loss.detach()
    dist.all_reduce(loss)
    found.append([loss, *values])
if rank == 0:
    torch.save(found, sys.argv[2])
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_give_the_gradient_of_one(tmp_path: Path) -> None:
    image, text, layer = units(8, 6, seed=1), units(8, 6, seed=2), units(6, 5, seed=3)
    teachers = make_teachers(8)
    torch.save((image, text, layer, teachers.images, teachers.texts, teachers.weights), tmp_path / "in.pt")
    words = ("-c", TWO_PROCESSES, tmp_path / "in.pt", tmp_path / "out.pt")
    for process in [Python(*words, rank, 2) for rank in range(2)]:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    for name, found in zip(
        ("reinforced", "affinity", "icl", "mse"), torch.load(tmp_path / "out.pt", weights_only=True), strict=True
    ):
        own, scale = layer.clone().requires_grad_(), torch.tensor(9.0, requires_grad=True)
        features = [F.normalize(value @ own, dim=1) for value in (image, text)]
        loss = CASES[name][1]((features[0], features[1], scale), teachers)
        loss.backward()
        expected = [loss.detach(), own.grad] + ([] if scale.grad is None else [scale.grad])
        for one, two in zip(expected, found, strict=True):
            torch.testing.assert_close(two, one, atol=1e-5, rtol=1e-5)


def test_sums_of_losses_are_checked() -> None:
    config = TrainConfig(loss="clip+0.5*affinity", teacher="teacher_1")
    assert losses_of(config.loss) == {"clip": 1.0, "affinity": 0.5}
    assert losses_of("clip") == {"clip": 1.0}
    for loss, words in {
        "kd": "unknown train.loss 'kd'; known: clip, siglip, reinforced",
        "siglip+mse": r"unknown part of train.loss 'siglip\+mse' 'siglip'; known: clip, reinforced",
        "clip+clip+mse": "got clip twice",
        "0*mse": "got the weight '0' of mse",
        "much*mse": "got the weight 'much' of mse",
        "reinforced": "train.loss reinforced compares with a teacher and train.teacher is not set",
    }.items():
        with pytest.raises(ModeclipError, match=words):
            TrainConfig(loss=loss, teacher=None if loss == "reinforced" else "teacher_1")
    with pytest.raises(ModeclipError, match=r"train\.loss clip has no teacher, got train\.teacher teacher_1; leave it"):
        TrainConfig(teacher="teacher_1")
    with pytest.raises(ModeclipError, match=r"label_smoothing is for train\.loss clip"):
        TrainConfig(loss="mse", teacher="teacher_1", label_smoothing=0.1)


def test_without_a_teacher_digests_are_as_they_were(tmp_path: Path) -> None:
    job = TrainJob(
        name="one", folder=str(tmp_path), catalog="c", catalog_fingerprint="f", config=TrainConfig(model="ViT-B-32"),
        first_step=0, last_step=1, first_share=0.0, last_share=1.0,
    )  # fmt: skip
    assert "teacher" not in job.deciding()["config"]
