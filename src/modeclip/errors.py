"""The one exception that modeclip raises for a user's mistake, and the words that its messages share.

    ValueError
     └── ModeclipError      something the user gave cannot work; the message is one line
          └── DamagedError  a file is not as it was written; the message names it and what makes it anew

A message says what is wrong, where, what was expected, what was found, and what to do. The command line prints
it behind ``modeclip: error:`` and exits with code 2. Anything else that escapes is a defect of modeclip.
"""

from __future__ import annotations

import difflib
import errno
import math
from collections.abc import Iterable

ADVICE = {
    errno.ENOENT: "correct the path",
    errno.ENOTDIR: "a folder is needed where a file is; choose another path",
    errno.EEXIST: "a folder is needed where a file is; choose another path",
    errno.EISDIR: "a file is needed where a folder is; choose another path",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOSPC: "free some space and give the same command again",
    errno.EDQUOT: "free some space and give the same command again",
}
"""What to do about what the operating system refuses; anything else is a matter of permissions or of the disk."""


LIMIT = 1 << 63
"""No number that a user gives is as large: it would not fit into a 64-bit integer."""


class ModeclipError(ValueError):
    """What the user asked for cannot be done; the message is one line that says why and what to do."""


class DamagedError(ModeclipError):
    """A file is missing, cut, changed or of another shape than what was written there."""


def unknown(kind: str, got: str, known: Iterable[str], listed: str = "") -> ModeclipError:
    """Make the error for a name that is not one of a known list.

    Args:
        kind: What the name stands for, as the user calls it ("rule", "encoder", "column").
        got: The name that was given.
        known: The names that would have worked.
        listed: Where a list too long for one line is to be found; then only the three nearest names are shown.

    Examples:
        >>> str(unknown("rule", "best", ["eq6", "paper"]))
        "unknown rule 'best'; known: eq6, paper"
        >>> str(unknown("bird", "robbin", ["robin", "wren", "ruff", "rook", "raven"], "birds.txt"))
        "unknown bird 'robbin'; nearest: robin, wren, rook; all 5: birds.txt"
    """
    names = list(known)
    if listed and len(names) > 3:
        nearest = difflib.get_close_matches(got, names, 3, cutoff=0)
        return ModeclipError(f"unknown {kind} {got!r}; nearest: {', '.join(nearest)}; all {len(names)}: {listed}")
    return ModeclipError(f"unknown {kind} {got!r}; known: {', '.join(names) or 'none'}")


def check_least(stage: str, config: object, **least: int) -> None:
    """Raise for the first field of a config that is less than it may be, or too large for a 64-bit number.

    A field that is None is left out.

    Args:
        stage: What the user calls the config, as in a recipe ("cluster").
        config: The config.
        **least: The least value of each field that is checked.

    Raises:
        ModeclipError: A field is less than that, infinite, NaN, or 2^63 or more, which no random seed can be.
    """
    for name, value in least.items():
        got = getattr(config, name)
        if got is not None and not value <= got < LIMIT:  # NaN is not
            most = " (and below 2^63)" if got >= LIMIT else ""
            raise ModeclipError(f"{stage}.{name}: expected {value} or more{most}, got {got}")


def check_between(stage: str, config: object, **ranges: tuple[int, int]) -> None:
    """Raise for the first field of a config that lies outside its range; a field that is None is left out.

    Args:
        stage: What the user calls the config, as in a recipe ("embed").
        config: The config.
        **ranges: The least and the largest value of each field that is checked.

    Raises:
        ModeclipError: A field is less or more than that, or NaN.
    """
    for name, (least, most) in ranges.items():
        got = getattr(config, name)
        if got is not None and not least <= got <= most:
            raise ModeclipError(f"{stage}.{name}: expected {least:,} to {most:,}, got {got}")


def check_above_zero(stage: str, config: object, *names: str) -> None:
    """Raise for the first field of a config that is no finite number above 0; a field that is None is left out.

    Args:
        stage: What the user calls the config, as in a recipe ("train").
        config: The config.
        *names: The fields that are checked.

    Raises:
        ModeclipError: A field is 0 or less, infinite, or NaN.
    """
    for name in names:
        got = getattr(config, name)
        if got is not None and not 0 < got < math.inf:
            raise ModeclipError(f"{stage}.{name}: expected a finite number above 0, got {got}")


def in_one_line(error: OSError) -> str:
    """Say what the operating system refused, of which file, and what to do.

    Examples:
        >>> in_one_line(NotADirectoryError(errno.ENOTDIR, "Not a directory", "a.txt/b"))
        'a.txt/b: not a directory; a folder is needed where a file is; choose another path'
    """
    if error.errno is None or error.strerror is None:  # a library's own
        return " ".join(str(error).split()) or type(error).__name__
    cause = "no such file or folder" if error.errno == errno.ENOENT else error.strerror.lower()
    advice = ADVICE.get(error.errno, "choose another path, or see to its permissions and its disk")
    places = [str(place) for place in (error.filename, error.filename2) if place is not None]  # two of a rename
    return f"{' -> '.join(places)}{': ' if places else ''}{cause}; {advice}"
