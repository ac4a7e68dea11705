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

from modeclip.data.checks import format_share
from modeclip.system.files import write_atomically, writing
from modeclip.training.jobs import role_of

if TYPE_CHECKING:
    from jinja2 import Environment
    from PIL.Image import Image

Json = dict[str, Any]

PAPER, INK, SOFT, RULE, WARN = "#fbfbf9", "#17191e", "#5c6370", "#d5d6d0", "#a8371b"
"""Colours of pictures that stand alone: background, text, quiet text, lines, alarm."""
PALETTE = (
    *(("#0072b2", "#4ea9e6"), ("#d98200", "#f0a93b"), ("#009e73", "#34c79c"), ("#c25e9a", "#e391c1")),
    *(("#c8501a", "#ff8a5c"), ("#3b9fdb", "#97d5fa"), ("#9c9000", "#e3d84f"), ("#75675a", "#b9a796")),
)
"""Colours of experts and families on light and on dark ground, which colour-blind people tell apart (Okabe and Ito)."""
_DARK = {
    **{PAPER: "#0f1115", INK: "#e8eaef", SOFT: "#9ba4b3", RULE: "#2a2f39", WARN: "#ff9a7d", "#ffffff": "#171a20"},
    **dict(PALETTE),
}
"""What the colours of a picture that stands alone become on dark ground."""
TEMPLATES = Path(__file__).parent / "templates"
THUMBNAIL_PIXELS = 96
SMALL_PIXELS = 64
"""Pictures with sides up to this (icons) are stored exactly and shown whole; others are lossy and fill a square."""


def write_page(path: Path, template: str | Path, **parts: Any) -> Path:
    """Write a page and return its path. An existing page is replaced as a whole; a missing folder is made.

    Args:
        path: The page.
        template: File in ``templates/``, such as ``report.html``, or the path of another that extends one of these.
        parts: What the template shows, by the names that it uses. A name without a value is an error.
    """
    page = fill_template(template, **parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path):
        write_atomically(path, page)
    return path


def fill_template(template: str | Path, **parts: Any) -> str:
    """Return the text of a template filled with its parts; see `write_page`."""
    if isinstance(template, Path):
        return _environment().from_string(template.read_text(encoding="utf-8")).render(**parts)
    return _environment().get_template(template).render(**parts)


def encode_png(image: Image) -> bytes:
    """Return an image as a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


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
    environment.globals |= {"expert_tones": expert_tones, "dark_style": dark_style}
    environment.filters |= {
        "amount": format_amount,
        "compute": format_compute,
        "count": format_count,
        "count_or_short": lambda value: format_count(value) if abs(value) >= 100 else format_short(value),
        "digest": _digest,
        "duration": format_duration,
        "effective": math.exp,
        "exact_percent": lambda share: format_share(share, 1),
        "entropy_limit": lambda count: math.log(max(count, 1)),
        "family": family_of,
        "figure": format_figure,
        "label": label,
        "percent": lambda value: f"{100 * value:.1f}",
        "percent_range": lambda ends: f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f}",
        "plain": lambda value: f"{value:g}",
        "plain_percent": lambda value: f"{100 * value:g}",
        "points": _format_points,
        "points_range": lambda ends: f"{_format_points(ends[0])} to {_format_points(ends[1])}",
        "px": lambda value: f"{value:.1f}",
        "short": format_short,
        "short_percent": lambda value: f"{100 * value:.3g}",
        "signed": lambda value: ("−" if value < 0 else "+" if value else "") + format_amount(abs(value)),
        "thousands": "{:,}".format,
        "tone": _tone_of,
    }
    return environment


def _digest(script: str) -> str:
    """Return the hash by which a content security policy names a script."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


# ---------------------------------------------------------------- colours


def expert_tones(count: int) -> list[tuple[str, str]]:
    """Return the colour of each expert on light and on dark ground; every page and picture has these.

    After eight experts the colours come again lighter, then darker, then lighter still.

    Examples:
        >>> expert_tones(1)
        [('#0072b2', '#4ea9e6')]
        >>> len(set(expert_tones(32)))
        32
    """
    rounds = ((255, 0.0), (255, 0.35), (0, 0.35), (255, 0.6))

    def mix(color: str, ground: int, share: float) -> str:
        parts = (int(color[place : place + 2], 16) for place in (1, 3, 5))
        return "#" + "".join(f"{round(part + (ground - part) * share):02x}" for part in parts)

    return [
        (mix(light, *rounds[k // 8 % 4]), mix(dark, *rounds[k // 8 % 4]))
        for k, (light, dark) in ((k, PALETTE[k % 8]) for k in range(count))
    ]


def dark_style(num_experts: int = 0) -> str:
    """Return the style by which a picture that stands alone, as SVG, is dark where its reader prefers dark pages."""
    pairs = _DARK | dict(expert_tones(num_experts))
    rules = (f'[fill="{light}"]{{fill:{dark}}}[stroke="{light}"]{{stroke:{dark}}}' for light, dark in pairs.items())
    return f"<style>@media (prefers-color-scheme: dark){{{''.join(rules)}}}</style>"


# ---------------------------------------------------------------- pictures


def embed_picture(image: Image | None, caption: str, *, place: str = "", cause: str = "") -> Json:
    """Return what templates need to show a pair.

    Args:
        image: The picture; None shows ``cause`` in its stead.
        caption: Its caption.
        place: Where the pair lies, for the pointer.
        cause: Why there is no picture.
    """
    source, small = ("", False) if image is None else (picture_url(image), is_small(image))
    return {"source": source, "small": small, "caption": caption, "place": place, "cause": cause}


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


def format_amount(value: float | int) -> str:
    """Return a count as it is; one that is a sum of probabilities is rounded where digits say little.

    Examples:
        >>> format_amount(12345), format_amount(12345.6), format_amount(2.5), format_amount(0)
        ('12,345', '12,346', '2.5', '0')
    """
    return f"{value:,.1f}" if value < 100 and value != round(value) else f"{value:,.0f}"


def format_figure(value: float | int) -> str:
    """Return a ratio with three digits.

    Examples:
        >>> format_figure(0.0427), format_figure(1.5), format_figure(0)
        ('0.0427', '1.50', '0')
    """
    return "0" if value == 0 else f"{value:.3g}" if value < 0.1 else f"{value:.3f}" if value < 1 else f"{value:.2f}"


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


def _format_points(value: float) -> str:
    """Return a difference of two shares in percentage points, with its sign."""
    return f"{100 * value:+.1f}".replace("-", "−")


# ---------------------------------------------------------------- names of models as pages write them


def family_of(name: str) -> str:
    """Return the control that a row or a model belongs to, as recipes name it; any other model is its own family.

    Examples:
        >>> family_of("OneStep-4"), family_of("one-step-3"), family_of("expert-3")
        ('one-step', 'one-step', 'expert-3')
    """
    model = name.lower().replace("onestep", "one-step")
    return role_of(model)[0] if is_control(model) else name


def is_control(name: str) -> bool:
    """Tell whether a model is a member of a control mixture."""
    role, index = role_of(name)
    return index is not None and role != "expert"


def label(name: str) -> str:
    """Return the name of a model, or of a control's models, in words."""
    shown = {"dense-total": "dense, equal cost", "random": "Random-n", "full": "Full-n", "one-step": "OneStep-n"}
    return shown.get(name, name.replace("expert-", "expert "))


def _tone_of(name: str) -> str:
    """Return the class of ``page.css`` that colours a model."""
    role, index = role_of(name)
    if role == "prior":  # the expert for class names, whatever it is called
        return "m-prior"
    return f"e{index}" if role == "expert" else "m-" + family_of(name).replace(" ", "-")
