"""What a model answers at each alpha -> the curve, the chosen alpha, and the table of before and after.

Intervals are bootstraps over the images of each task (see ``metrics``).
Source: WiSE-FT (arXiv 2109.01903) for the line; the rule of choice is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from modeclip.adapting.validation import Correct, average
from modeclip.evaluation.metrics import Interval, bootstrap_interval, paired_interval


@dataclass(frozen=True, kw_only=True)
class Point:
    """One place on the line from the start to the tuned model."""

    alpha: float
    """Share of the tuned model."""
    own: float
    """Accuracy on the held-out images of the own set."""
    general: float | None
    """Mean accuracy over the general tasks; None without them."""


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """One line of the table: accuracies with 95 % bootstrap intervals over the images."""

    name: str
    """Of the task; ``general tasks`` is the plain mean over them."""
    num_images: int
    """Images that are classified."""
    before: Interval
    """The start, alpha = 0."""
    tuned: Interval
    """The best step of the training, alpha = 1."""
    after: Interval
    """The chosen alpha: the model in the folder."""
    change: Interval
    """After minus before on the same images."""


def curve_of(found: Mapping[float, Correct]) -> tuple[Point, ...]:
    """Return the accuracies along the line; the first task is the own set, the others are the general tasks."""
    own, *general = next(iter(found.values()))
    return tuple(
        Point(
            alpha=alpha,
            own=float(correct[own].mean()),
            general=average({task: correct[task] for task in general}) if general else None,
        )
        for alpha, correct in found.items()
    )


def choose_alpha(curve: Sequence[Point], tolerance: float) -> Point:
    """Choose a point by the rule of ``finetuning``.

    Args:
        curve: The points, that of alpha 0 first.
        tolerance: How much below alpha 0 the general tasks may be.

    Examples:
        >>> curve = [Point(alpha=0.0, own=0.5, general=0.7), Point(alpha=0.5, own=0.8, general=0.695)]
        >>> choose_alpha([*curve, Point(alpha=1.0, own=0.9, general=0.6)], 0.01).alpha
        0.5
    """
    start = curve[0].general
    rounding = 1e-9
    allowed = [p for p in curve if start is None or p.general is None or p.general >= start - tolerance - rounding]
    return max(allowed, key=lambda point: (point.own, -point.alpha))


def table_row(name: str, tasks: Sequence[str], found: Mapping[float, Correct], alpha: float) -> TableRow:
    """Return the line of one task, or of the mean over several.

    Args:
        name: Its name.
        tasks: The tasks.
        found: Answers by alpha and task.
        alpha: The chosen one.
    """
    before, tuned, after = ({task: found[place][task] for task in tasks} for place in (0.0, 1.0, alpha))
    return TableRow(
        name=name,
        num_images=sum(len(images) for images in before.values()),
        before=bootstrap_interval(before),
        tuned=bootstrap_interval(tuned),
        after=bootstrap_interval(after),
        change=paired_interval(after, before),
    )
