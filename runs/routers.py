"""A router that costs no tower: which experts answer an image, from its patches alone.

A mixture of experts of images asks the seed model's image tower where an image lies before the experts see it, one
tower more than there are experts. Here a small network learns the weights that the tower gives from what the seed
model's patch embedding, its first layer, makes of the image's patches: mean, standard deviation, largest and smallest.
It sees no labels and no held-out images.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from modeclip.data.tasks.task import CatalogImages
from modeclip.models.clip import Clip, load_clip

TAUGHT_ON = 20_000
"""Images that a router learns from: of the sets that are trained on, whether or not a study trains on them."""
HIDDEN = 64
"""Width of the network."""
BATCH = 1024
DECAY = 1e-4
"""Weight of the squares of the network's numbers beside the loss of an image."""


def patch_features(clip: Clip, images: CatalogImages) -> Float[np.ndarray, "N 4W"]:
    """Return four numbers over an image's patches for each of the W channels of their embeddings."""
    found = []
    with torch.inference_mode():
        for start in range(0, len(images), BATCH):
            rows = np.arange(start, min(start + BATCH, len(images)))
            patches = clip.model.visual.conv1(clip.images(images.read(rows))).flatten(2)
            found.append(torch.cat([patches.mean(2), patches.std(2), patches.amax(2), patches.amin(2)], 1).numpy())
    return np.concatenate(found)


def teach(features: Float[np.ndarray, "N F"], weights: Float[np.ndarray, "N K"]) -> Callable[[np.ndarray], np.ndarray]:
    """Fit the network to weights that sum to 1, by cross entropy, and return what gives weights of other features."""
    mean, spread = features.mean(0), features.std(0) + 1e-6

    def scaled(rows: np.ndarray) -> Tensor:
        return torch.from_numpy((rows - mean) / spread).double()

    inputs, targets = scaled(features), torch.from_numpy(weights).double()
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Linear(inputs.shape[1], HIDDEN), torch.nn.GELU(), torch.nn.Linear(HIDDEN, targets.shape[1])
    ).double()
    optimizer = torch.optim.LBFGS(network.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        size = sum(numbers.square().sum() for numbers in network.parameters())
        value = torch.nn.functional.cross_entropy(network(inputs), targets) + DECAY * size
        value.backward()
        return value

    optimizer.step(loss)

    def weigh(rows: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return torch.softmax(network(scaled(rows)), 1).numpy()

    return weigh


def seed_features(seed: Path, images: CatalogImages) -> Float[np.ndarray, "N 4W"]:
    """Return the patch features of images by a seed model."""
    return patch_features(load_clip(seed), images)
