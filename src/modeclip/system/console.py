"""What people see while work goes on: progress bars with rate and time left, tables, notes of one line.

Everything goes to standard error, so that standard output carries only results (``--json`` stays parseable). On a
terminal a bar is live; in a log file each finished bar leaves one line.
"""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from modeclip.system.files import to_json

console = Console(stderr=True, highlight=False)


def open_streams() -> None:
    """Make standard output and error such that printing cannot fail for the text's sake.

    What their encoding lacks is written as backslash escapes. One that is closed goes nowhere; its descriptor is
    taken, so that no file of ours gets its number and with it what some library prints.
    """
    for name, descriptor in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, "w" if descriptor else "r", encoding="utf-8", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class RateColumn(ProgressColumn):
    """Units of work a second, averaged over the last half minute."""

    def render(self, task: Task) -> Text:
        """Return the rate of a task as text, empty until it is known."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} {task.fields['unit']}/s" if speed else "")


def make_progress() -> Progress:
    """Return a display of bars with count, rate, and time elapsed and left; its tasks need a field ``unit``."""
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


class Advance:
    """Callback of a progress bar, called with the units of work just done."""

    def __init__(self, bars: Progress, task: TaskID) -> None:
        self.done = 0
        self._bars, self._task = bars, task

    def __call__(self, count: int) -> None:
        """Count work as done."""
        self.done += count
        self._bars.update(self._task, advance=count)

    def expect(self, share: float) -> None:
        """Set the total from the share of the work that is done, in (0, 1], where it was not known before."""
        self._bars.update(self._task, total=max(self.done, round(self.done / share)))


@contextmanager
def progress(description: str, total: int | None, unit: str) -> Iterator[Advance]:
    """Show a bar for a piece of work; yields ``advance(n)``, to be called with the units just done.

    Args:
        description: What is being done, a few words.
        total: Units of work in all, or None while it is unknown; ``advance.expect`` sets it then.
        unit: Plural name of a unit ("captions").
    """
    started = time.monotonic()
    with make_progress() as bars:
        advance = Advance(bars, bars.add_task(description, total=total, unit=unit))
        yield advance
    if not console.is_terminal:
        seconds = time.monotonic() - started
        log(f"{description}: {advance.done:,} {unit} in {seconds:.1f} s ({advance.done / max(seconds, 1e-9):,.0f}/s)")


def log(text: str) -> None:
    """Print one line for a person to read."""
    console.print(text, markup=False, soft_wrap=True)


def print_json(content: Any) -> None:
    """Print a result for machines on standard output."""
    is_utf8 = (sys.stdout.encoding or "utf-8").lower().startswith("utf")
    print(to_json(content, indent=1, ensure_ascii=not is_utf8))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on standard output: the first column left-aligned, the others right-aligned."""
    table = Table(title=title, title_justify="left")
    for position, column in enumerate(columns):
        table.add_column(column, justify="left" if position == 0 else "right", no_wrap=position == 0)
    for row in rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else 160
    Console(file=sys.stdout, width=width, highlight=False).print(table)
