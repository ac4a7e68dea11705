"""Training speed of the demo's model for each precision and attention kernel, which take turns in one process.

Usage: python benchmarks/train_step.py [--threads 1] [--rounds 5]

On a CPU with instructions for products of bfloat16, training uses the row "bf16, plain products".
"""

from __future__ import annotations

import argparse
import platform
import time
from contextlib import nullcontext
from datetime import UTC, datetime

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from modeclip.models.clip import encode_image, encode_text, load_clip
from modeclip.training.objectives.clip import contrastive_loss

BATCH = 256
STEPS = 6


def main() -> None:
    """Measure every variant in turn, several rounds, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clip = load_clip("modeclip-icon", seed=0)
    optimizer = torch.optim.AdamW(clip.model.parameters(), lr=1e-3, fused=True)
    images, tokens = torch.randn(BATCH, 3, 32, 32), clip.tokens([f"arrow left circle {i}" for i in range(BATCH)])

    def step(bf16: bool, plain: bool) -> None:
        attention = sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()
        with attention:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                features = encode_image(clip.model, images), encode_text(clip.model, tokens)
            loss = contrastive_loss(*(f.float() for f in features), clip.model.logit_scale.exp())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    variants = {
        "float32, fused attention": (False, False),
        "float32, plain products": (False, True),
        "bf16, fused attention": (True, False),
        "bf16, plain products": (True, True),
    }
    rates: dict[str, list[float]] = {name: [] for name in variants}
    for settings in variants.values():
        step(*settings)
    for _ in range(arguments.rounds):
        for name, settings in variants.items():
            started = time.perf_counter()
            for _ in range(STEPS):
                step(*settings)
            rates[name].append(BATCH * STEPS / (time.perf_counter() - started))
    print(f"{datetime.now(UTC).date()}, torch {torch.__version__}, {platform.machine()}, {arguments.threads} thread(s)")
    base = np.median(rates["float32, fused attention"])
    for name, found in rates.items():
        print(f"{name:<26} {np.median(found):7.0f} samples/s   {np.median(found) / base:.2f} x")


if __name__ == "__main__":
    main()
