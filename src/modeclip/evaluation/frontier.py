"""From which length of training on experts on clusters of images should pay, by a line through what was measured.

The gain of four such experts over one dense model of equal cost rose with what towers of their size have seen: samples
over the floating-point operations of a training sample (docs/results.md, "When do experts pay?"). The line through it
rests on six trainings of small towers on icons; the gain of the sixth lay in the interval that the first five foresaw.
For other data it says whether a short trial can be expected to show a gain, not how large the gain will be.

Source: `runs/frontier.py`, which fits the line to `runs/experiments.jsonl`; a test compares the number below with it.
"""

from __future__ import annotations

import math

SAMPLES_PER_FLOP = 0.19
"""Samples for each floating-point operation of a training sample from which on the line's gain is certainly above 0."""


def image_experts_pay_from(flops: int) -> float:
    """Return the samples from which on experts on clusters of images gain by the line.

    Args:
        flops: Floating-point operations of a training sample, forward and backward (`modeclip.models.flops`).
    """
    return SAMPLES_PER_FLOP * flops


def outlook(samples: int, flops: int) -> str:
    """Return a sentence about what a longer training may change in the verdict on experts of images.

    Args:
        samples: Samples that the dense model has seen in a trial.
        flops: As in `image_experts_pay_from`.
    """
    needed = image_experts_pay_from(flops)
    if samples >= needed:
        return (
            "By a line through six trainings on icons, experts on clusters of images gain after a training as long as "
            "this one for towers of this size (docs/results.md): if they do not here, it is not for want of length."
        )
    rounded = round(needed, 1 - math.floor(math.log10(needed)))
    return (
        f"By a line through six trainings on icons, experts on clusters of images gain from about {rounded:,.0f} "
        f"samples on with towers of this size (docs/results.md); this trial is {needed / samples:.2g} times shorter."
    )
