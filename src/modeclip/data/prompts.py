"""Prompts are made of templates and class names. A template has ``{}``, or CLIP_benchmark's ``{c}``, for the name.

Source: zero-shot classification of CLIP (arXiv 2103.00020), Sec. 3.1.4.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from modeclip.errors import ModeclipError
from modeclip.system.console import log
from modeclip.system.paths import expand_homes, form_of, other_form

PLACE = re.compile(r"\{c?\}")
"""The place of the class name in a template."""


def check_templates(templates: Sequence[str], where: str) -> None:
    """Check that templates have a place for the class name.

    Args:
        templates: The templates.
        where: Setting or file that they come from, with which the message begins.

    Raises:
        ModeclipError: A template has no place for the name.

    Examples:
        >>> check_templates(["a {}.", "a {c}."], "templates")
        >>> check_templates(["a photo"], "templates")
        Traceback (most recent call last):
        modeclip.errors.ModeclipError: templates: template 'a photo' has no {} (or {c}) where the class name goes
    """
    check_texts(templates, where)
    for template in templates:
        if not PLACE.search(template):
            raise ModeclipError(f"{where}: template {template!r} has no {{}} (or {{c}}) where the class name goes")


def check_texts(texts: Sequence[str], where: str) -> None:
    r"""Check that texts are such as a file of text can hold.

    Args:
        texts: Class names, queries or captions.
        where: What they come from, with which the message begins.

    Raises:
        ModeclipError: One is no text, holds a NUL byte, or half of a character, as words that are not UTF-8 do.

    Examples:
        >>> check_texts(["caf\udce9"], "classes")
        Traceback (most recent call last):
        modeclip.errors.ModeclipError: classes: 'caf\udce9' is not UTF-8 text; write it anew
    """
    for text in texts:
        if not isinstance(text, str):
            raise ModeclipError(f"{where}: expected texts, got {type(text).__name__}; give a list of texts")
        if "\0" in text:
            raise ModeclipError(f"{where}: {text[:40]!r} holds a NUL byte; save the file as UTF-8 text")
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise ModeclipError(f"{where}: {text[:40]!r} is not UTF-8 text; write it anew")


def fill(template: str, name: str) -> str:
    """Put a class name into a template.

    Examples:
        >>> fill("a photo of a {}.", "cat"), fill("a {c}.", "set {}")
        ('a photo of a cat.', 'a set {}.')
    """
    return PLACE.sub(lambda _: name, template)


def read_classes(text: str) -> list[str]:
    """Return the class names in a file (one on each line) or in a list with commas, and log names that come twice.

    Raises:
        ModeclipError: There are none, or what looks like a path is not a text file.
    """
    path = Path(expand_homes(text))
    if not is_file(path) and (found := other_form(str(path))):
        log(f"classes {text!r} ({form_of(text)}): found as {found!r} ({form_of(found)})")
        path = Path(found)
    if is_file(path):
        try:
            names = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ModeclipError(
                f"classes {path}: expected UTF-8 text, got something else ({error}); save the file as UTF-8"
            ) from None
    elif "," not in text and (path.suffix or "/" in text):
        found = "a folder" if path.is_dir() else "no such file"
        raise ModeclipError(f"classes {path}: {found}; give a file with one class name on each line, or 'cat,dog'")
    else:
        names = text.split(",")
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise ModeclipError(
            f"classes {text!r}: there are no class names; give a file with one on each line, or 'cat,dog'"
        )
    check_texts(names, f"classes {path}" if is_file(path) else "classes")
    if twice := [name for name, number in Counter(names).items() if number > 1]:
        some = ", ".join(map(repr, twice[:3])) + (", ..." if len(twice) > 3 else "")
        log(f"classes: more than one class is called {some}; nothing can tell them apart")
    return names


def is_file(path: Path) -> bool:
    """Tell whether a path is a file; a text that is too long for a path is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # a list of names that is too long for the name of a file, or holds a NUL byte
        return False
