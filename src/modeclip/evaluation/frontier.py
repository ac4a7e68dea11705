"""From which length of training on experts on clusters of images were seen to pay, for towers of any size.

The gain of four such experts over one dense model of equal cost rose with what towers of their size have seen: samples
over the floating-point operations of a training sample. A line through it foresaw a training that it had not seen
(docs/results.md, "When do experts pay?"). It was measured on icons with small towers. For other data it says whether a
short trial can be expected to show a gain, not how large the gain will be.

Source: `runs/frontier.py`, which fits the line to `runs/experiments.jsonl`; a test compares the number below with it.
"""

from __future__ import annotations

SAMPLES_PER_FLOP = 0.161
"""Samples for each floating-point operation of a training sample from which on the line's gain is certainly above 0."""


def image_experts_pay_from(flops: float) -> float:
    """Return the samples from which on experts on clusters of images were seen to gain.

    Args:
        flops: Floating-point operations of a training sample, forward and backward (`modeclip.models.flops`).
    """
    return SAMPLES_PER_FLOP * flops


def outlook(samples: float, flops: float) -> str:
    """Return a sentence about what a longer training may change in the verdict on experts of images.

    Args:
        samples: Samples that the dense model has seen in a trial.
        flops: As in `image_experts_pay_from`.
    """
    needed = image_experts_pay_from(flops)
    if samples >= needed:
        return (
            "These towers have seen as much for their size as those on which experts on clusters of images were seen "
            "to gain on icons (docs/results.md), so what the trial says of them stands for itself."
        )
    return (
        f"On icons, experts on clusters of images were seen to gain from about {needed:,.0f} samples on for towers of "
        f"this size, {needed / samples:.2g} times this trial's (docs/results.md); what the trial says of them is said "
        "of a short training."
    )
