"""Prompts are made of templates and class names. A template has ``{}``, or CLIP_benchmark's ``{c}``, for the name.

Source: zero-shot classification of CLIP (arXiv 2103.00020), Sec. 3.1.4.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from modeclip.errors import ModeclipError

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
    for template in templates:
        if not PLACE.search(template):
            raise ModeclipError(f"{where}: template {template!r} has no {{}} (or {{c}}) where the class name goes")


def fill(template: str, name: str) -> str:
    """Put a class name into a template.

    Examples:
        >>> fill("a photo of a {}.", "cat"), fill("a {c}.", "set {}")
        ('a photo of a cat.', 'a set {}.')
    """
    return PLACE.sub(lambda _: name, template)
