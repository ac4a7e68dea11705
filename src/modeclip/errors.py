"""The one exception that modeclip raises for a user's mistake, and the words that its messages share.

    ValueError
     └── ModeclipError      something the user gave cannot work; the message is one line

A message says what is wrong, where, what was expected, what was found, and what to do. The command line prints
it behind ``modeclip: error:`` and exits with code 2. Anything else that escapes is a defect of modeclip.
"""

from __future__ import annotations

from collections.abc import Iterable


class ModeclipError(ValueError):
    """What the user asked for cannot be done; the message is one line that says why and what to do."""


def unknown(kind: str, got: str, known: Iterable[str]) -> ModeclipError:
    """Make the error for a name that is not one of a known list.

    Args:
        kind: What the name stands for, as the user calls it ("rule", "encoder", "column").
        got: The name that was given.
        known: The names that would have worked.

    Examples:
        >>> str(unknown("rule", "best", ["eq6", "paper"]))
        "unknown rule 'best'; known: eq6, paper"
    """
    return ModeclipError(f"unknown {kind} {got!r}; known: {', '.join(known) or 'none'}")
