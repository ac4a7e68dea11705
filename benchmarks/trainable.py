"""What a training step takes in time and memory for each value of ``train.trainable``.

    python benchmarks/trainable.py                               modeclip-icon, batches of 128, one thread
    python benchmarks/trainable.py --model ViT-B-32 --batch 32 --rounds 3

Random pictures and captions of 10 tokens (seed 0). In turn in each round, a step of each value: both towers, the loss
of CLIP, the backward pass, and AdamW. The ratio to ``all`` is the median of the rounds' ratios, in seconds of the
processor, which a busy machine changes least. Kept: bytes of activations that the forward pass keeps for the backward
pass. State: bytes of gradients and of AdamW's moments. FLOPs: `modeclip.models.flops.count_flops`. Rows with "kept" are
passes after the first with ``train.engine.keep_trunk``: they read what the frozen trunk gave from files.
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from evaluate import machine
from torch import nn

from modeclip.models.blocks import blocks_of, freeze
from modeclip.models.clip import encode_image, encode_text, load_clip
from modeclip.models.flops import count_flops
from modeclip.models.trunk import split
from modeclip.training.gradients import make_optimizer
from modeclip.training.jobs import TrainConfig
from modeclip.training.trunk_outputs import TrunkOutputs

LENGTH = 10


class Training:
    """A model that is trained in part."""

    def __init__(self, spec: str, trainable: str, batch: int, folder: Path | None = None) -> None:
        clip = load_clip(spec, seed=0)
        freeze(clip.model, trainable)
        self.model = clip.model.train()
        named = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        self.trained, self.weights = list(named.values()), {value.data_ptr() for value in self.model.parameters()}
        self.optimizer = make_optimizer(named, TrainConfig())
        random = torch.Generator().manual_seed(0)
        width, height = clip.image_size
        self.images = torch.randn(batch, 3, height, width, generator=random)
        self.tokens = torch.zeros_like(clip.tokens([""])).repeat(batch, 1)
        self.tokens[:, :LENGTH] = torch.randint(1, 49_000, (batch, LENGTH), generator=random)

        self.kept = None if folder is None else self.keep(folder, int(trainable.removeprefix("last:")))

    def keep(self, folder: Path, depth: int) -> TrunkOutputs:
        """Write what the trunk gives for the batch to a folder."""
        self.heads = {tower: split(self.model, tower, depth) for tower in ("image", "text")}
        with torch.no_grad():
            images, texts = self.heads["image"][0](self.images)[0], self.heads["text"][0](self.tokens)[0]
        kept = TrunkOutputs(
            folder=folder,
            num_pairs=len(images),
            image_shape=tuple(images.shape[1:]),
            text_shape=(self.tokens.shape[1], texts.shape[2]),
            types=(images.dtype, texts.dtype),
            cuts_padding=True,
        )
        kept.open()
        padded = torch.nn.functional.pad(texts, (0, 0, 0, self.tokens.shape[1] - texts.shape[1]))
        kept.write(np.arange(len(images)), images, padded, np.full(len(images), texts.shape[1]))
        return kept

    def encode(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the features of the batch."""
        if self.kept is None:
            return encode_image(self.model, self.images), encode_text(self.model, self.tokens)
        images, texts = self.kept.read(np.arange(len(self.images)), self.kept.lengths(self.tokens.numpy()))
        return self.heads["image"][1]((images,)), self.heads["text"][1]((texts, self.tokens))

    def loss(self) -> torch.Tensor:
        """Return the loss of the batch."""
        images, texts = self.encode()
        logits, own = self.model.logit_scale.exp() * images @ texts.T, torch.arange(len(images))
        return (nn.functional.cross_entropy(logits, own) + nn.functional.cross_entropy(logits.T, own)) / 2

    def step(self) -> float:
        """Take a step and return its seconds of the processor."""
        began = time.process_time()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
        self.optimizer.step()
        return time.process_time() - began

    def kept_bytes(self) -> int:
        """Return the bytes of activations that a forward pass keeps."""
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = self.loss()
        del loss
        return sum(kept.values())

    def state_bytes(self) -> int:
        """Return the bytes of gradients and of the optimizer's moments."""
        return 3 * sum(value.nbytes for value in self.trained)


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="modeclip-icon")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    fewest = min(len(blocks) for blocks in blocks_of(load_clip(arguments.model, seed=0).model).values())
    values = ["all", "ffn", *(f"last:{count}" for count in sorted({1, 2, fewest // 2} & set(range(1, fewest))))]
    trainings = {value: Training(arguments.model, value, arguments.batch) for value in values}
    temporary = TemporaryDirectory(prefix="modeclip-trainable-")
    for value in [value for value in values if value.startswith("last:")]:
        folder = Path(temporary.name, value[5:], "files")
        trainings[f"{value}, kept"] = Training(arguments.model, value, arguments.batch, folder)
    for training in trainings.values():
        training.step()
    seconds = [{value: training.step() for value, training in trainings.items()} for _ in range(arguments.rounds)]
    flops = {value: count_flops(arguments.model, LENGTH, trainable=value) for value in values}
    facts: dict[str, Any] = vars(arguments) | {"machine": machine(), "date": f"{datetime.now(UTC):%Y-%m-%d}"}
    print(json.dumps(facts))
    print("| trainable | parameters | MFLOPs a sample | time of a step | kept MB | state MB |")
    print("|---|---:|---:|---:|---:|---:|")
    for value, training in trainings.items():
        ratio = float(np.median([taken[value] / taken["all"] for taken in seconds]))
        count = sum(parameter.numel() for parameter in training.trained)
        name, _, is_kept = value.partition(", ")
        operations = flops[name].training - (flops[name].trunk if is_kept else 0)
        print(
            f"| `{value}` | {count:,} | {operations / 1e6:,.1f} | {ratio:.2f} | "
            f"{training.kept_bytes() / 1e6:,.0f} | {training.state_bytes() / 1e6:,.1f} |"
        )


if __name__ == "__main__":
    main()
