"""What inference_mode costs around a tower in bfloat16 autocast on a CPU, against the context that modeclip uses.

    python benchmarks/autocast.py                                  ViT-B-32, batches of 16, three rounds
    python benchmarks/autocast.py --model ViT-B-16 --batch 64 --rounds 5

Three ways to run the same image tower on the same random pictures (seed 0), in turn in each round:

- ``inference_mode`` around each batch, as modeclip did before;
- `without_gradients` around each batch;
- `without_gradients` around all batches of a round, as evaluation does now: weights are cast once.

Autocast keeps the casts of weights that need a gradient until its context ends, but not under inference_mode, where
every use casts anew. The figures are medians of the rounds' ratios, in seconds of the processor, which a busy machine
changes least. Features of the three may differ by the rounding of bfloat16: kernels
differ with the kind of tensor.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import UTC, datetime

import numpy as np
import torch
from evaluate import machine

from modeclip.models.clip import encode_image, fast_attention, load_clip, without_gradients

BATCHES = 3


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    clip = load_clip(arguments.model, seed=0)
    clip.model.eval()
    width, height = clip.image_size
    pictures = torch.randn(BATCHES, arguments.batch, 3, height, width, generator=torch.Generator().manual_seed(0))
    cpu = torch.device("cpu")

    def low() -> torch.autocast:
        return torch.autocast("cpu", dtype=torch.bfloat16)

    def each(context: Callable[[], AbstractContextManager[object]]) -> list[torch.Tensor]:
        found = []
        for batch in pictures:
            with context(), fast_attention(cpu, "bf16-mixed"), low():
                found.append(encode_image(clip.model, batch))
        return found

    def once() -> list[torch.Tensor]:
        with without_gradients(), fast_attention(cpu, "bf16-mixed"), low():
            return [encode_image(clip.model, batch) for batch in pictures]

    ways = {
        "inference_mode": lambda: each(torch.inference_mode),
        "without_gradients": lambda: each(without_gradients),
        "without_gradients, one context": once,
    }
    print(f"{datetime.now(UTC).date()}, {machine()}, {arguments.model}, {BATCHES} batches of {arguments.batch}, seed 0")
    features = {name: torch.cat(run()) for name, run in ways.items()}  # warms up
    rounds = []
    for number in range(arguments.rounds):
        seconds = {}
        for name in list(ways) if number % 2 == 0 else list(reversed(ways)):
            before = time.process_time()
            ways[name]()
            seconds[name] = time.process_time() - before
        rounds.append([seconds[name] for name in ways])
        print(f"  round {number + 1}: " + ", ".join(f"{name} {seconds[name]:.2f} s" for name in ways), flush=True)
    table = np.array(rounds)
    ratios = np.median(table / table[:, 1:2], axis=0)
    first = features["inference_mode"]
    result = {
        "benchmark": "autocast",
        "inference_mode_over_without_gradients": round(float(ratios[0]), 2),
        "one_context_over_one_a_batch": round(float(ratios[2]), 2),
        "largest_difference": max(float((first.float() - other.float()).abs().max()) for other in features.values()),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
