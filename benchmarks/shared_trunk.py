"""What a mixture costs whose experts share a trunk with their seed, against one model: time, memory and disk.

    python benchmarks/shared_trunk.py                                    ViT-B-32, 4 experts of last:1, five rounds
    python benchmarks/shared_trunk.py --model modeclip-icon --depth 1    the demo's model
    python benchmarks/shared_trunk.py --experts 8 --depth 2 --batch 64

The seed has random weights (seed 0), and so have the last blocks, the norm behind them and the projections of each
expert: what they compute costs the same as trained ones. The same pictures run in turn, in each round in another order,
through one model, through the experts of a bundle that stores what differs from the seed, and through the same experts
from their full folders; and through one model that computes every token of its last block, as open_clip runs it.
Ratios are to both models. Seconds are those of the processor, which a busy machine changes least; the figures are
medians of the rounds' ratios. All features are compared, too.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from evaluate import machine

from modeclip.mixture.bundle import copy_model
from modeclip.models.checkpoints import write_tensors
from modeclip.models.clip import CONFIG_FILE, load_clip, save_clip, without_gradients
from modeclip.models.deltas import WEIGHTS_FILE
from modeclip.models.pool import ModelPool, ModelRef, total_bytes
from modeclip.models.trunk import encode, head_depth, share


def main() -> None:
    """Make the experts, run them and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--depth", type=int, default=1, help="last blocks that an expert has for itself")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), arguments)


def measure(folder: Path, arguments: argparse.Namespace) -> None:
    """Measure both mixtures and one model, in turn."""
    make_experts(folder, arguments.model, arguments.experts, arguments.depth)
    names = [f"expert-{k}" for k in range(arguments.experts)]
    stored, full = ([ModelRef.of(name, folder / kind / name) for name in names] for kind in ("bundle", "full"))
    pool = ModelPool()
    one = pool.get(ModelRef.of("seed", folder / "bundle" / "seed")).model
    mixtures = {
        "shared trunk": [pool.get(ref).model for ref in stored],
        "full folders": [pool.get(r).model for r in full],
    }
    clip = load_clip(folder / "bundle" / "seed")
    width, height = clip.image_size
    images = torch.randn(arguments.batch, 3, height, width, generator=torch.Generator().manual_seed(0))
    tokens = clip.tokens(["a picture of a heart", "an arrow that points to the left"] * (arguments.batch // 2))
    print(f"{datetime.now(UTC).date()}, {machine()}; {arguments.rounds} rounds of batches of {arguments.batch}, seed 0")
    print(f"{arguments.model}, {arguments.experts} experts of last:{arguments.depth}")
    for tower, x in (("image", images), ("text", tokens)):
        ways = {"one model": lambda tower=tower, x=x: [encode(one, tower, x)]}
        ways |= {"every token": lambda tower=tower, x=x: [encode(one, tower, x, every_token=True)]}
        ways |= {name: lambda m=m, tower=tower, x=x: run(m, tower, x) for name, m in mixtures.items()}
        with without_gradients():
            ratios, features = compare(ways, arguments.rounds)
        pairs = (("shared trunk", "full folders"), ("one model", "every token"))
        apart = max(float((a - b).abs().max()) for x, y in pairs for a, b in zip(features[x], features[y], strict=True))
        every = ratios["every token"]
        print(
            f"  {tower} features: shared trunk {ratios['shared trunk']:.2f} times one model, full folders "
            f"{ratios['full folders']:.2f} times; with every token of the last block one model takes {every:.2f}, and "
            f"the shared trunk {ratios['shared trunk'] / every:.2f} times that; they differ by at most {apart:.1e}"
        )
    disk = {kind: sum(f.stat().st_size for f in (folder / kind).rglob("*.safetensors")) for kind in ("bundle", "full")}
    seed = (folder / "bundle" / "seed" / "open_clip_model.safetensors").stat().st_size
    sizes = disk["bundle"] / seed, 1 + disk["full"] / seed
    print(f"  disk, with the seed: {sizes[0]:.2f} times one model, full folders {sizes[1]:.2f}")
    held = total_bytes(stored) / stored[0].num_bytes
    print(f"  memory of the weights: {held:.2f} times one model, full folders {arguments.experts:.2f}")


def make_experts(folder: Path, model: str, num_experts: int, depth: int) -> None:
    """Write a seed and experts with other last blocks: as a bundle stores them, and as full folders."""
    clip = load_clip(model, seed=0)
    (folder / "bundle").mkdir()
    save_clip(clip, folder / "bundle" / "seed")
    state = clip.model.state_dict()
    before = {name: value.clone() for name, value in state.items()}
    own = [
        name
        for name, value in state.items()
        if value.ndim
        and (d := head_depth(clip.model, "image" if "visual." in name else "text", [name])) is not None
        and d <= depth
    ]
    for expert in range(num_experts):
        random = torch.Generator().manual_seed(expert + 1)
        for name in own:
            state[name].copy_(before[name] + 0.02 * torch.randn(before[name].shape, generator=random))
        target = folder / "full" / f"expert-{expert}"
        target.mkdir(parents=True)
        shutil.copyfile(folder / "bundle" / "seed" / CONFIG_FILE, target / CONFIG_FILE)
        write_tensors(target / WEIGHTS_FILE, state)
        copy_model(folder / "full" / f"expert-{expert}", folder / "bundle" / f"expert-{expert}")


def run(models: list[torch.nn.Module], tower: str, x: torch.Tensor) -> list[torch.Tensor]:
    """Return the features of each model, as the evaluator and a routed CLIP compute them."""
    found: dict[int, torch.Tensor] = {}
    for shared in share(models, tower):
        state = shared.trunk(x)
        found |= {index: head(state) for index, head in zip(shared.members, shared.heads, strict=True)}
    return [found[index] for index in range(len(models))]


def compare(ways: dict, rounds: int) -> tuple[dict[str, float], dict[str, list[torch.Tensor]]]:
    """Return the median ratio of each way's seconds to the first's, and what each computes."""
    features = {name: way() for name, way in ways.items()}  # warms up
    table = []
    for number in range(rounds):
        seconds = {}
        for name in list(ways) if number % 2 == 0 else list(reversed(ways)):
            before = time.process_time()
            ways[name]()
            seconds[name] = time.process_time() - before
        table.append([seconds[name] / seconds[next(iter(ways))] for name in ways])
    return dict(zip(ways, np.median(table, axis=0), strict=True)), features


if __name__ == "__main__":
    main()
