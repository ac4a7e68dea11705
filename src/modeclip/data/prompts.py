"""Templates and class names -> prompts. ``{}`` in a template, or ``{c}`` as CLIP_benchmark writes it, is the name.

Source: zero-shot classification of CLIP (arXiv 2103.00020), Sec. 3.1.4.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from modeclip.errors import ModeclipError

PLACE = re.compile(r"\{c?\}")
"""Where the class name goes."""


def check_templates(templates: Sequence[str], where: str) -> None:
    """Raise for a template that says nothing of the class.

    Args:
        templates: Prompts with a place for the class name.
        where: What the message begins with: a setting, or a file.

    Raises:
        ModeclipError: A template has no place for the name.

    Examples:
        >>> check_templates(["a {}.", "a {c}."], "templates")
        >>> check_templates(["a photo"], "templates")
        Traceback (most recent call last):
        modeclip.errors.ModeclipError: templates: template 'a photo' has no {} (or {c}) where the class name goes
    """
    for template in templates:
        if not PLACE.search(template):
            raise ModeclipError(f"{where}: template {template!r} has no {{}} (or {{c}}) where the class name goes")


def fill(template: str, name: str) -> str:
    """Return a template with the class name in its place.

    Examples:
        >>> fill("a photo of a {}.", "cat"), fill("a {c}.", "set {}")
        ('a photo of a cat.', 'a set {}.')
    """
    return PLACE.sub(lambda _: name, template)
