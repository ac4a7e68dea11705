"""What 16 bits change in a teacher's vectors, and what reading them takes beside the pairs' pictures.

Usage: python benchmarks/distillation.py runs/demo/bundle runs/demo/catalog.lance [--batch 256] [--rounds 5]

The teacher is run over as many pairs as a batch has, without a column of the catalog. A random student of the same
dimensions gets each loss, and its gradient, from vectors of 32 and of 16 bits. For the time, vectors of noise are added
to a copy of the catalog, and random batches of vectors, and of pictures with captions, are read in turn.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from modeclip import Catalog
from modeclip.adapting.distilling import Teacher, encode_pairs
from modeclip.models.pool import ModelPool
from modeclip.training.objectives.distillation import (
    Teachers,
    feature_loss,
    interactive_loss,
    soft_contrastive_loss,
)


def run_teacher(source: str, catalog: Catalog, rows: np.ndarray) -> Teachers:
    """Return what the teacher makes of some rows, with 32 bits."""
    teacher, pool = Teacher(source=source), ModelPool()
    pictures, captions = catalog.images(rows), catalog.captions(rows)
    vectors = [encode_pairs(pool.get(ref), pictures, captions, "32-true") for ref in teacher.refs]
    images, texts = (torch.from_numpy(np.stack([pair[side] for pair in vectors], axis=1)) for side in (0, 1))
    weights = torch.tensor(teacher.weigh(captions, pictures), dtype=torch.float32)
    scales = tuple(float(pool.get(ref).model.logit_scale.detach().exp()) for ref in teacher.refs)
    return Teachers(images=images, texts=texts, weights=weights, scales=scales, weighs_images=teacher.weighs_images)


def losses(student: tuple[Tensor, Tensor, Tensor], teachers: Teachers) -> dict[str, Tensor]:
    """Return every loss."""
    return {
        "reinforced": soft_contrastive_loss(*student, teachers),
        "affinity": soft_contrastive_loss(*student, teachers.as_one()),
        "icl": interactive_loss(*student, teachers),
        "mse": feature_loss(*student[:2], teachers),
    }


def rounded(teachers: Teachers) -> Teachers:
    """Return the vectors as the catalog keeps them."""
    images, texts = (value.half().float() for value in (teachers.images, teachers.texts))
    return Teachers(
        images=images,
        texts=texts,
        weights=teachers.weights,
        scales=teachers.scales,
        weighs_images=teachers.weighs_images,
    )


def seconds_to_read(path: Path, columns: list[str], batch: int, rounds: int) -> tuple[float, float]:
    """Return the median seconds to read a batch of vectors, and one of pictures and captions."""
    catalog, draw, times = Catalog.open(path), np.random.default_rng(0), []
    for _ in range(rounds):
        rows = draw.choice(len(catalog), batch, replace=False)
        began = time.perf_counter()
        catalog.read(columns, rows)
        between = time.perf_counter()
        catalog.images(rows), catalog.captions(rows)
        times.append((between - began, time.perf_counter() - between))
    vectors, pairs = np.median(times, axis=0).tolist()
    return vectors, pairs


def main() -> None:
    """Print the differences and the times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher")
    parser.add_argument("catalog", type=Path)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, 1 thread, batch {given.batch}, seed 0")
    catalog = Catalog.open(given.catalog)
    rows = np.random.default_rng(0).choice(len(catalog), given.batch, replace=False)
    teachers = run_teacher(given.teacher, catalog, rows)
    shape = (given.batch, teachers.images.shape[2])
    draw = torch.Generator().manual_seed(0)
    vectors = [torch.nn.functional.normalize(torch.randn(shape, generator=draw), dim=1) for _ in range(2)]
    student = (vectors[0].requires_grad_(), vectors[1].requires_grad_(), torch.tensor(20.0, requires_grad=True))
    for (name, exact), low in zip(
        losses(student, teachers).items(), losses(student, rounded(teachers)).values(), strict=True
    ):
        grads = [torch.autograd.grad(loss, student[0])[0] for loss in (exact, low)]
        change = float((grads[0] - grads[1]).norm() / grads[0].norm())
        value = float((exact - low).detach().abs() / exact.detach().abs())
        print(f"{name:12} loss {value:.1e} of itself, gradient {change:.1e} of its norm")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(given.catalog, Path(folder) / "catalog.lance"))
        width, models = teachers.images[0].numel(), len(teachers.scales)
        noise = np.random.default_rng(0)
        sides = {
            f"v_{side}": noise.normal(size=(len(catalog), width)).astype(np.float16) for side in ("images", "texts")
        }
        Catalog.open(copy).add_columns({**sides, "v_weights": np.ones((len(catalog), models), np.float32)})
        times = seconds_to_read(copy, [*sides, "v_weights"], given.batch, given.rounds)
    print(f"reading a batch: vectors {1e3 * times[0]:.1f} ms, pictures and captions {1e3 * times[1]:.1f} ms")


if __name__ == "__main__":
    main()
