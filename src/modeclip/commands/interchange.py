"""The command that compares results that are there already: compare. Parse, call, print."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from modeclip.commands.data import AsJson
from modeclip.system.console import print_json, print_table

if TYPE_CHECKING:
    from modeclip.evaluation.intervals import Interval, PairedTest

Folder = Positional[Annotated[Path, arg(help="Folder that `modeclip evaluate --out` wrote.")]]


def compare(
    first: Folder,
    second: Folder,
    first_system: Annotated[str | None, arg(help="Model in the first folder, if it has several.")] = None,
    second_system: Annotated[str | None, arg(help="Model in the second folder, if it has several.")] = None,
    *,
    as_json: AsJson = False,
) -> None:
    """Compare two models by their predictions, without running them: paired intervals and exact McNemar tests."""
    from modeclip.evaluation.results import compare as run_compare

    found = run_compare(first, second, first_system=first_system, second_system=second_system)
    if as_json:
        print_json(asdict(found))
        return
    rows = [
        (
            task.task,
            task.metric,
            f"{100 * task.first:.1f}",
            f"{100 * task.second:.1f}",
            *_cells(task.difference, task.test),
        )
        for task in found.tasks
    ]
    means = (sum(side) / len(found.tasks) for side in zip(*((t.first, t.second) for t in found.tasks), strict=True))
    label = f"average of tasks ({len(rows)})"
    rows.append((label, "", *(f"{100 * mean:.1f}" for mean in means), *_cells(found.difference, found.test)))
    columns = ["task", "metric", found.first, found.second, "difference", "95 %", "only first, second", "McNemar p"]
    print_table("in %; difference with its bootstrap interval over the same samples of each task", columns, rows)
    if found.left_out:
        print(f"only in one of them: {', '.join(found.left_out)}")


def _cells(difference: Interval, test: PairedTest | None) -> tuple[str, ...]:
    cells = (f"{100 * difference.mean:+.1f}", f"{100 * difference.low:.1f} to {100 * difference.high:.1f}")
    return (*cells, f"{test.only_first}, {test.only_second}", f"{test.p_value:.2g}") if test else (*cells, "", "")
