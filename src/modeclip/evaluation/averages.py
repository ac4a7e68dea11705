"""What systems did on tasks -> their averages with intervals, and the bounds of a mixture's experts.

Two bounds stand beside a mixture. Both choose among its experts by the labels, which no user of a mixture has: the
best single expert is the one with the highest average, the oracle takes the best expert of each task. A mixture that
beats the oracle gains from its experts together; one that does not beat the best single expert needs a better router.

Source: MoDE (arXiv 2404.16030), Sec. 4.3, for the plain mean over tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from modeclip.evaluation.evaluate import Result
from modeclip.evaluation.intervals import (
    Interval,
    Outcome,
    PairedTest,
    bootstrap_interval,
    paired_interval,
    paired_test,
)
from modeclip.evaluation.metrics import choose_by_labels
from modeclip.evaluation.systems import System

BEST_SINGLE, ORACLE = "best single", "oracle"
"""Names of the two bounds, behind the name of their mixture."""


@dataclass(frozen=True, kw_only=True)
class Average:
    """Plain mean of a system's main metrics over tasks of one kind and group."""

    system: str
    """Name of who answered."""
    kind: str
    """Kind of the tasks."""
    group: str
    """Their group; empty for those that are in none."""
    tasks: tuple[str, ...]
    """Their names."""
    score: Interval
    """The mean, with a bootstrap over the samples of each task."""
    versus_first: Interval | None
    """How much better than the first system, on the same samples; None for the first one itself."""
    test: PairedTest | None
    """McNemar's test against it; None also where a metric does not count right and wrong samples."""


def averages(results: Sequence[Result]) -> list[Average]:
    """Return the plain means over the tasks of each kind and group, the first system being what others are compared to.

    Args:
        results: Of ``scoring.evaluate_systems``, and of `bounds`.
    """
    found = []
    for kind, group in dict.fromkeys((result.kind, result.task.group) for result in results):
        chosen = [result for result in results if (result.kind, result.task.group) == (kind, group)]
        of_system: dict[str, dict[str, Outcome]] = {}
        for result in chosen:
            of_system.setdefault(result.system, {})[result.task.name] = result.outcome
        first = next(iter(of_system.values()))
        for system, outcomes in of_system.items():
            is_first = outcomes is first
            found.append(
                Average(
                    system=system,
                    kind=kind,
                    group=group,
                    tasks=tuple(outcomes),
                    score=bootstrap_interval(outcomes),
                    versus_first=None if is_first else paired_interval(outcomes, first),
                    test=None if is_first or not _counts(outcomes, first) else paired_test(outcomes, first),
                )
            )
    return found


def _counts(*sides: Mapping[str, Outcome]) -> bool:
    """Whether all metrics count right and wrong samples."""
    return all(np.isin(outcome.hits, (0, 1)).all() for side in sides for outcome in side.values())


def bounds(results: Sequence[Result], systems: Sequence[System]) -> list[Result]:
    """Return what the best expert of each mixture, and the best of each task, did: chosen by the labels.

    Args:
        results: Of ``scoring.evaluate_systems``, those of the experts among them.
        systems: Who was asked; of a mixture's experts, ``expert_of`` is its name.

    Returns:
        For each mixture, kind and task a result of ``NAME best single`` and one of ``NAME oracle``; ``expert`` in the
        provenance names the system that it is taken from.
    """
    found = []
    for mixture in dict.fromkeys(system.expert_of for system in systems if system.expert_of):
        experts = sorted((system.name for system in systems if system.expert_of == mixture), key=lambda n: (len(n), n))
        own = [result for result in results if result.system in experts]
        for kind in dict.fromkeys(result.kind for result in own):
            of_expert: dict[str, dict[str, Result]] = {name: {} for name in experts}
            for result in own:
                if result.kind == kind:
                    of_expert[result.system][result.task.name] = result
            scores = {
                name: {task: result.outcome.score for task, result in of_task.items()}
                for name, of_task in of_expert.items()
            }
            best, best_of_task = choose_by_labels(scores)
            for task, oracle in best_of_task.items():
                for bound, name in ((BEST_SINGLE, best), (ORACLE, oracle)):
                    chosen = of_expert[name][task]
                    facts = {**chosen.provenance, "bound": bound, "expert": name}
                    found.append(replace(chosen, system=f"{mixture} {bound}", provenance=facts))
    return found
