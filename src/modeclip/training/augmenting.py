"""Pictures of a batch and random numbers -> pictures of the model's size, cropped and coloured at random.

The operations are those of open_clip's ``image_transform`` for training: a random crop, then, if asked, changed colours
and grey. The random numbers are arguments, because the batch of a step must be a pure function of the step: whatever
process or thread prepares which part of it, the pictures are the same.

Source: open_clip's ``AugmentationCfg`` for names and defaults, torchvision for the colour operations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations

import numpy as np
from jaxtyping import Float
from PIL.Image import Image, Resampling

from modeclip.training.jobs import AugmentConfig

NUM_DRAWS = 11
"""Random numbers in [0, 1) that a picture takes: four for the crop, seven for the colours."""
_ORDERS = tuple(permutations(range(4)))  # torchvision's ColorJitter applies its four changes in a random order
_ASPECT = 4 / 3  # a crop's width to height lies between 1 / this and this


def augment(
    pictures: Sequence[Image], size: tuple[int, int], config: AugmentConfig, draws: Float[np.ndarray, "b 11"]
) -> list[Image]:
    """Vary pictures at random and scale them to a size.

    Args:
        pictures: Any RGB pictures.
        size: Width and height of the results, in pixels.
        config: What is done to how many of them.
        draws: Random numbers in [0, 1), a row a picture.
    """
    changed = []
    for picture, numbers in zip(pictures, draws.tolist(), strict=True):
        result = (
            random_crop(picture, size, config.min_crop_share, numbers[:4]) if config.min_crop_share < 1 else picture
        )
        if config.color_jitter > 0 and numbers[4] < config.color_jitter_probability:
            result = _jitter(result, config.color_jitter, numbers[5:10])
        if numbers[10] < config.grayscale_probability:
            result = result.convert("L").convert("RGB")
        changed.append(result)
    return changed


def random_crop(picture: Image, size: tuple[int, int], min_share: float, draws: Sequence[float]) -> Image:
    """Cut a random box out of a picture and scale it, as open_clip does in training.

    Args:
        picture: Any picture.
        size: Width and height of the result, in pixels.
        min_share: The box has a share of the picture's area drawn from [min_share, 1], at a width to height drawn
            from [3/4, 4/3] (log-uniform), and is narrowed where it would not fit.
        draws: Four random numbers in [0, 1).
    """
    share, shape, left, top = draws
    width, height = picture.size
    area, ratio = (min_share + share * (1 - min_share)) * width * height, _ASPECT ** (2 * shape - 1)
    box_width, box_height = min(width, math.sqrt(area * ratio)), min(height, math.sqrt(area / ratio))
    left, top = left * (width - box_width), top * (height - box_height)
    box = (left, top, min(width, left + box_width), min(height, top + box_height))
    return picture.resize(size, Resampling.BICUBIC, box=box)


def _jitter(picture: Image, strength: float, draws: Sequence[float]) -> Image:
    """Change brightness, contrast and saturation by up to a share of them, the hue by up to a quarter of that."""
    from torchvision.transforms import functional

    order, factors = _ORDERS[int(draws[0] * len(_ORDERS))], [1 + strength * (2 * draw - 1) for draw in draws[1:4]]
    change = (
        lambda picture: functional.adjust_brightness(picture, factors[0]),
        lambda picture: functional.adjust_contrast(picture, factors[1]),
        lambda picture: functional.adjust_saturation(picture, factors[2]),
        lambda picture: functional.adjust_hue(picture, strength / 4 * (2 * draws[4] - 1)),
    )
    for index in order:
        picture = change[index](picture)
    return picture
