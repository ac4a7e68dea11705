"""How pages are written: the one template environment, its filters, and pictures that travel inside a page.

A page is one file that loads nothing: its style sheet, its script and its pictures are inside, and its content security
policy makes the browser refuse everything else. ``templates/page.html`` is the frame of all pages, ``page.css`` their
looks, ``page.js`` what moves on them. A template holds words and order; the module of the page computes what is drawn.
Text that comes from the data (captions, class names, file names) is always escaped.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment
    from PIL.Image import Image

TEMPLATES = Path(__file__).parent / "templates"
THUMBNAIL_PIXELS = 96
SMALL_PIXELS = 64
"""Pictures with sides up to this (icons) are stored exactly and shown whole; others are lossy and fill a square."""


def render(template: str, **parts: Any) -> str:
    """Fill a template with what it shows.

    Args:
        template: File in ``templates/``, such as ``report.html``.
        parts: Values that the template names. One that it names and that is missing is an error.
    """
    return _environment().get_template(template).render(**parts)


@cache
def _environment() -> Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "compute": format_compute,
        "count": format_count,
        "digest": _digest,
        "duration": format_duration,
        "effective": math.exp,
        "entropy_limit": lambda count: math.log(max(count, 1)),
        "short": format_short,
        "thousands": "{:,}".format,
    }
    return environment


def _digest(script: str) -> str:
    """Return the hash by which a content security policy names a script."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


# ---------------------------------------------------------------- pictures


def is_small(image: Image) -> bool:
    """Tell whether an image is small enough (an icon) to be shown exactly and whole."""
    return max(image.size) <= SMALL_PIXELS


def picture_url(image: Image) -> str:
    """Return a thumbnail of an image as a data URL."""
    small, buffer = image.copy(), io.BytesIO()
    small.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    small.save(buffer, "WEBP", lossless=is_small(image), quality=80)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


# ---------------------------------------------------------------- numbers as people read them


def format_count(value: float | int) -> str:
    """Return a count with three digits and a magnitude.

    Examples:
        >>> format_count(950), format_count(12_800_000)
        ('950', '12.8 M')
    """
    for power, letter in ((9, " G"), (6, " M"), (3, " k")):
        if value >= 0.9995 * 10**power:
            return f"{float(f'{value / 10**power:.3g}'):g}{letter}"
    return f"{float(f'{value:.3g}'):g}"


def format_short(value: float | int) -> str:
    """Return a number of an axis, with an exponent if it is small.

    Examples:
        >>> format_short(2.5), format_short(0.0005)
        ('2.5', '5e-4')
    """
    if value == 0 or abs(value) >= 0.01:
        return f"{value:.3g}"
    power = math.floor(math.log10(abs(value)) + 1e-9)
    return f"{value / 10**power:.3g}e{power}"


def format_duration(seconds: float | int) -> str:
    """Return a duration in the unit that suits it.

    Examples:
        >>> format_duration(3.42), format_duration(754), format_duration(7260)
        ('3.4 s', '12 min 34 s', '2 h 01 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def format_compute(value: float) -> str:
    """Return a number of operations with its power of ten.

    Examples:
        >>> format_compute(3.2e15), format_compute(1e12)
        ('3.2·10¹⁵', '10¹²')
    """
    mantissa, power = f"{value:.1e}".split("e")
    raised = str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    factor = mantissa.removesuffix(".0")
    return f"10{raised}" if factor == "1" else f"{factor}·10{raised}"
