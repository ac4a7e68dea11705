"""What a person sees while work goes on: progress bars with rate and time left, tables, one-line notes.

Everything goes to standard error, so that standard output carries only results (``--json`` stays parseable). On a
terminal a bar is live; in a log file each finished bar leaves one line.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

console = Console(stderr=True, highlight=False)


class RateColumn(ProgressColumn):
    """Units of work a second, averaged over the last half minute."""

    def render(self, task: Task) -> Text:
        """Return the rate of a task as text, empty until it is known."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} {task.fields['unit']}/s" if speed else "")


def make_progress() -> Progress:
    """Return a bar display (description, bar, count, rate, elapsed, left); add tasks with field ``unit``."""
    return Progress(
        TextColumn("{task.description:<22}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        RateColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


@contextmanager
def progress(description: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Show a bar for a piece of work; yields ``advance(n)``, to be called with the units just done.

    Args:
        description: What is being done, a few words.
        total: Units of work in all.
        unit: Name of a unit, plural ("captions").
    """
    started, done = time.monotonic(), 0
    with make_progress() as bars:
        task = bars.add_task(description, total=total, unit=unit)

        def advance(count: int) -> None:
            nonlocal done
            done += count
            bars.update(task, advance=count)

        yield advance
    if not console.is_terminal:
        seconds = time.monotonic() - started
        log(f"{description}: {done:,} {unit} in {seconds:.1f} s ({done / max(seconds, 1e-9):,.0f}/s)")


def log(text: str) -> None:
    """Print one line for a person to read."""
    console.print(text, markup=False, soft_wrap=True)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on standard output: the first column left-aligned, the others right-aligned."""
    table = Table(title=title, title_justify="left")
    for position, column in enumerate(columns):
        table.add_column(column, justify="left" if position == 0 else "right", no_wrap=position == 0)
    for row in rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else 160
    Console(file=sys.stdout, width=width, highlight=False).print(table)
