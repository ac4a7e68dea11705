"""What the feed-forward layers of a CLIP-MoE cost, against those of the dense model.

    python benchmarks/clip_moe.py                                  ViT-B-32, top-2 of 4, batches of 32, one thread
    python benchmarks/clip_moe.py --model modeclip-icon --batch 256 --threads 2
    python benchmarks/clip_moe.py --device cuda --batch 256

The feed-forward layer of one block of each tower, whose other blocks have the same shape, runs on random tokens (seed
0), as many as a batch of pictures and captions has. In turn in each round: the dense model's, the experts' as they run
on this device, the experts by the other way (a grouped product, or a product for each expert), and every expert on
every token. Forward is without gradients; both is forward and backward, with gradients of the weights and of the
tokens. The figures are medians of the rounds' ratios, on a CPU in seconds of the processor, which a busy machine
changes least. The last two, which are no part of the bar, run in the first round alone.
The bar: 2.3 times the dense layers, forward and both, and outputs that equal a loop over the tokens to 1e-5.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime

import numpy as np
import torch
from evaluate import machine
from torch import Tensor, nn

from modeclip.models import moe
from modeclip.models.blocks import blocks_of
from modeclip.models.clip import encode_image, encode_text, load_clip
from modeclip.models.moe import MoeFfn
from modeclip.system.devices import keep_freed_memory

CAPTION = "a photo of a small red house by the sea"
BAR = 2.3


def dense_layers(name: str) -> list[tuple[nn.Module, int]]:
    """Return the feed-forward layer of each tower's first block, and how many tokens an input has there."""
    clip = load_clip(name, seed=0)
    found: list[tuple[nn.Module, int]] = []
    for blocks in blocks_of(clip.model).values():
        layer = clip.model.get_submodule(blocks[0].ffn_names[0])
        layer.register_forward_hook(lambda layer, inputs, _: found.append((layer, inputs[0].shape[1])))
    width, height = clip.image_size
    with torch.no_grad():
        encode_image(clip.model, torch.zeros(1, 3, height, width))
        encode_text(clip.model, clip.tokens([CAPTION]))
    for layer, _ in found:
        layer._forward_hooks.clear()
    return [(copy.deepcopy(layer), length) for layer, length in found]


def token_by_token(layer: MoeFfn, tokens: Tensor) -> Tensor:
    """Return what the definition says, one token after the other."""
    rows = []
    for token in tokens:
        logits, chosen = (layer.router.weight @ token).topk(layer.top_k)
        rows.append(
            sum(share * layer.experts[int(k)](token) for share, k in zip(logits.softmax(0), chosen, strict=True))
        )
    return torch.stack(rows)


def every_expert(layer: MoeFfn, tokens: Tensor) -> Tensor:
    """Run all experts on all tokens."""
    logits = layer.router(tokens)
    chosen, experts = logits.topk(layer.top_k)
    return layer._all(tokens, torch.zeros_like(logits).scatter(1, experts, chosen.softmax(1)))


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    keep_freed_memory()  # as the trainer does
    device = arguments.device
    tokens, dense, layers = [], [], []
    for layer, length in dense_layers(arguments.model):
        width = next(part for part in layer.modules() if isinstance(part, nn.Linear)).in_features
        experts = MoeFfn([copy.deepcopy(layer) for _ in range(arguments.experts)], width, arguments.top_k)
        nn.init.uniform_(experts.router.weight, -1, 1)
        tokens.append(torch.randn(arguments.batch * length, width, device=device))
        dense.append(layer.to(device))
        layers.append(experts.to(device))
    worst = max(
        float((layer(x[:64]) - token_by_token(layer, x[:64])).detach().abs().max())
        for layer, x in zip(layers, tokens, strict=True)
    )
    own = moe.GROUPED_ON
    other = own ^ {torch.device(device).type}

    def sorted_by(grouped_on: frozenset[str]) -> Callable[[int, Tensor], Tensor]:
        def run(index: int, x: Tensor) -> Tensor:
            moe.GROUPED_ON = grouped_on
            result: Tensor = layers[index](x)
            return result

        return run

    ways: dict[str, Callable[[int, Tensor], Tensor]] = {
        "dense": lambda index, x: dense[index](x),
        "experts": sorted_by(own),
        "other way": sorted_by(other),
        "every expert": lambda index, x: every_expert(layers[index], x),
    }

    def forward(way: Callable[[int, Tensor], Tensor]) -> None:
        with torch.no_grad():
            for index, x in enumerate(tokens):
                way(index, x)

    def both(way: Callable[[int, Tensor], Tensor]) -> None:
        for index, x in enumerate(tokens):
            for value in (x, *dense[index].parameters(), *layers[index].parameters()):
                value.grad = None  # as the trainer does, so that nothing is added to old gradients
            way(index, x.requires_grad_()).square().sum().backward()

    def seconds(run: Callable[[Callable[[int, Tensor], Tensor]], None], way: Callable[[int, Tensor], Tensor]) -> float:
        on_gpu = torch.device(device).type == "cuda"
        clock = time.perf_counter if on_gpu else time.process_time
        before = clock()
        run(way)
        if on_gpu:
            torch.cuda.synchronize()
        return clock() - before

    shapes = ", ".join(f"{len(x)} x {x.shape[1]}" for x in tokens)
    where = machine() if device == "cpu" else torch.cuda.get_device_name()
    print(
        f"{datetime.now(UTC).date()}, {where}, torch {torch.__version__}, {arguments.threads} threads, "
        f"{arguments.model}, top-{arguments.top_k} of {arguments.experts}, tokens {shapes}, seed 0"
    )
    result: dict[str, object] = {"benchmark": "clip_moe", "bar": BAR, "largest_difference": worst}
    for name, run in (("forward", forward), ("both", both)):
        table: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(arguments.rounds + 1):  # the first warms up
            turn = list(ways) if number < 2 else ["dense", "experts"]
            for way in turn if number % 2 else reversed(turn):
                table[way].append(seconds(run, ways[way]))
        ratios = [
            float(np.median([a / b for a, b in zip(table[way][1:], table["dense"][1:], strict=False)])) for way in ways
        ]
        result[name] = {way: round(ratio, 2) for way, ratio in zip(ways, ratios, strict=True)}
        print(
            f"  {name}: " + ", ".join(f"{way} {ratio:.2f}" for way, ratio in zip(ways, ratios, strict=True)), flush=True
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
