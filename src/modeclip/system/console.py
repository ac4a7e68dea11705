"""What people see while work goes on: progress bars with rate and time left, tables, notes of one line.

Everything goes to standard error, so that standard output carries only results (``--json`` stays parseable). On a
terminal a bar is live; in a log file each finished bar leaves one line.

Captions, class names, keys and paths are text of strangers. Whatever is printed comes by `printable` here: a control
character could move the cursor, hide text or change a terminal's title, and a bidirectional one shows letters in
another order than they have. None of it is read as rich's markup.
"""

from __future__ import annotations

import io
import os
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
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

console = Console(stderr=True, highlight=False, markup=False, emoji=False)
PIPE_WIDTH = 160
"""Columns of a table that is not printed on a terminal, unless COLUMNS says otherwise."""
NAME_SHARE = 0.4
"""Share of the width that the first column of a table may take."""
TEXT_WIDTH = 24
"""Columns that the text of a cell gets at least where it is broken into lines."""
HEADER_WIDTH = 14
"""Columns from which a heading of a table of numbers is broken into lines."""
_HIDDEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


_wording: ContextVar[Callable[[str], str]] = ContextVar("wording", default=str)


@contextmanager
def worded(by: Callable[[str], str]) -> Iterator[None]:
    """Print what is for people in the words that a function gives it, such as the options of the command that runs."""
    token = _wording.set(by)
    try:
        yield
    finally:
        _wording.reset(token)


def printable(text: object) -> str:
    r"""Return text as it may be printed: one line, in which characters that would act on a terminal are written out.

    Examples:
        >>> printable("cat\x1b[31m\rdog\u202e")
        'cat\\x1b[31m\\rdog\\u202e'
    """
    return _HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


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


class DescriptionColumn(ProgressColumn):
    """What is being done."""

    def render(self, task: Task) -> Text:
        """Return the description of a task as text."""
        return Text(f"{printable(task.description):<22}")


def make_progress() -> Progress:
    """Return a display of bars with count, rate, and time elapsed and left; its tasks need a field ``unit``."""
    return Progress(
        DescriptionColumn(),
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


@contextmanager
def busy(text: str) -> Iterator[None]:
    """Show on a terminal that something is going on whose end is not known."""
    with console.status(Text(printable(text))):
        yield


def log(text: str) -> None:
    """Print one line for a person to read."""
    console.print(printable(_wording.get()(text)), soft_wrap=True)


def print_lines(*lines: object) -> None:
    """Print results for a person on standard output, a line each."""
    for line in lines:
        print(printable(_wording.get()(str(line))))


def print_json(content: Any) -> None:
    """Print a result for machines on standard output."""
    is_utf8 = (sys.stdout.encoding or "utf-8").lower().startswith("utf")
    text = to_json(content, indent=1, ensure_ascii=not is_utf8)
    print("\n".join(_HIDDEN.sub(lambda found: f"\\u{ord(found[0]):04x}", line) for line in text.split("\n")))


def in_points(gain: Mapping[str, float] | None) -> str:
    """Return a gain in percentage points with its interval, for a cell of a table; nothing where there is none.

    Examples:
        >>> in_points({"mean": 0.02, "low": -0.01, "high": 0.05})
        '+2.0 (-1.0 to +5.0)'
    """
    return "" if gain is None else f"{100 * gain['mean']:+.1f} ({100 * gain['low']:+.1f} to {100 * gain['high']:+.1f})"


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, in_parts: bool = False
) -> None:
    """Print a table on standard output: the first column left-aligned, the others right-aligned.

    Args:
        title: What the table shows.
        columns: Heading of each column; a line break in it is kept.
        rows: A text for each column.
        in_parts: Keep the cells behind the first one on one line; else they are wrapped.

    Columns that there is no room for continue below, under the first column again.
    """
    printer = Console(file=sys.stdout, width=_width(), highlight=False, markup=False, emoji=False)
    heads = [_heading(column, in_parts and bool(position)) for position, column in enumerate(columns)]
    cells = [[Text(printable(_wording.get()(str(cell)))) for cell in row] for row in rows]
    name_width = max(cell.cell_len for cell in [heads[0], *(row[0] for row in cells)])
    widest = printer.width if in_parts else TEXT_WIDTH
    parts = _parts(heads, cells, printer.width - name_width - 4, widest)
    if in_parts or len(parts) > 1:
        name_width = min(name_width, max(8, int(NAME_SHARE * printer.width)))
        parts = _parts(heads, cells, printer.width - name_width - 4, widest)
    for part in parts:
        printer.print(Text(printable(title), style="table.title"))
        table = Table()
        table.add_column(heads[0], overflow="fold", max_width=name_width, min_width=name_width)
        for position in part:
            table.add_column(heads[position], justify="right", no_wrap=in_parts, overflow="fold")
        for row in cells:
            table.add_row(row[0], *(row[position] for position in part))
        printer.print(table)
        title = "continued"


def _width() -> int | None:
    """Return the columns of a table; None: those of the terminal, which COLUMNS may also say."""
    said = os.environ.get("COLUMNS", "")
    return None if sys.stdout.isatty() or (said.isdigit() and int(said)) else PIPE_WIDTH


def _heading(text: str, broken: bool) -> Text:
    """Return a heading; a long one may be broken into lines."""
    lines = text.split("\n")
    if broken:
        lines = [part for line in lines for part in _broken(line)]
    return Text("\n".join(map(printable, lines)))


def _broken(line: str) -> list[str]:
    """Break a line that is too long for a heading, behind the marks that join words where there are any.

    Examples:
        >>> _broken("sugarcrepe/replace_attribute")
        ['sugarcrepe/', 'replace_', 'attribute']
    """
    lines = [""]
    for piece in re.findall(r".+?(?:[-_/.:@# ]|$)", line):
        if lines[-1] and len(lines[-1] + piece.rstrip()) > HEADER_WIDTH:
            lines.append("")
        lines[-1] += piece
    return [part for whole in lines for part in textwrap.wrap(whole, HEADER_WIDTH)]


def _parts(heads: Sequence[Text], cells: Sequence[Sequence[Text]], room: int, widest: int) -> list[range]:
    """Divide the columns behind the first one into ranges that fit beside it; lines take three letters of each."""
    parts: list[range] = []
    start, used = 1, 0
    for position in range(1, len(heads)):
        lines = [*heads[position].split("\n"), *(row[position] for row in cells)]
        width = min(widest, max(line.cell_len for line in lines)) + 3
        if used and used + width > room:
            parts.append(range(start, position))
            start, used = position, 0
        used += width
    return [*parts, range(start, len(heads))]
