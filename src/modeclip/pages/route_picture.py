"""The picture of a route: for each class, the nearest fine clusters and the weights that the experts get.

The picture is a list of rectangles and words, which is written as SVG or painted as PNG with Pillow and its built-in
font. Up to `MAX_ROOMY` classes are drawn with all their nearest clusters, in the order of the task. More classes have
one line each, in columns, sorted by the expert with most of the weight, so that a thousand classes can be surveyed.

Price: milliseconds for a hundred classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from modeclip.errors import ModeclipError
from modeclip.mixture.explain import ClassReason
from modeclip.mixture.router import Route
from modeclip.pages.html import INK, PAPER, RULE, SOFT, dark_style, encode_png, expert_tones
from modeclip.system.files import write_atomically, writing

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont, ImageFont

MAX_ROOMY = 40
"""Most classes that are drawn with all their nearest clusters."""
MAX_COLUMN = 60
"""Most classes in a column, where each class has one line."""
MAX_DRAWN = 1500
"""Most classes that are drawn; of more classes, every n-th is drawn."""
LINE, FONT, EDGE, GAP = 19.0, 12, 18.0, 30.0
"""Height of a line, size of the letters, margin, room between columns: pixels."""
NAME, CLUSTER, BAR = 150.0, 330.0, 180.0
"""Widths of a class name, of a cluster's captions, and of a bar of weights: pixels."""
PNG_SCALE = 2
"""Pixels of the PNG for a pixel of the layout; 2 makes the letters sharp."""


@dataclass(frozen=True, slots=True)
class Box:
    """A filled rectangle."""

    x: float
    y: float
    width: float
    height: float
    color: str


@dataclass(frozen=True, slots=True)
class Words:
    """A line of text; ``y`` is its middle."""

    x: float
    y: float
    text: str
    color: str = INK
    bold: bool = False


@dataclass(frozen=True, slots=True)
class RoutePicture:
    """Everything on the picture, and its size in pixels."""

    width: float
    height: float
    parts: tuple[Box | Words, ...]
    num_experts: int


def write_picture(route: Route, path: Path) -> None:
    """Write the picture of a route to a file.

    Args:
        route: The route of a task.
        path: A file that ends in ``.svg`` or ``.png``; an existing one is replaced as a whole.

    Raises:
        ModeclipError: The file's name has another ending, or the disk is full.
    """
    check_picture(path)
    picture = draw_route(route)
    with writing(path):
        write_atomically(path, to_svg(picture) if path.suffix.lower() == ".svg" else to_png(picture))


def check_picture(path: Path) -> None:
    """Raise a ModeclipError if no picture can be written to this file."""
    if path.suffix.lower() not in (".svg", ".png"):
        raise ModeclipError(f"picture {path}: expected a file that ends in .svg or .png")
    if not path.absolute().parent.is_dir():
        raise ModeclipError(f"picture {path}: there is no folder {path.parent}; make it, or choose another one")


def draw_route(route: Route) -> RoutePicture:
    """Lay out the picture of a route: title, experts with their key words, then the classes."""
    reasons, colors = route.explain(), [light for light, _ in expert_tones(len(route.members))]
    shares = route.class_weights
    mean = shares.mean(axis=0)
    order = np.arange(len(reasons))
    width, columns = _columns(min(len(order), MAX_DRAWN))
    if columns:
        order = np.lexsort((order, -shares.max(axis=1), shares.argmax(axis=1)))
        order = order[:: -(-len(order) // MAX_DRAWN)]
    drawn = f"{len(order):,} of " if len(order) < len(reasons) else ""
    title = (
        f"{drawn}{len(reasons):,} classes, rule {route.request.rule}, temperature {route.request.temperature:g}, "
        f"entropy {route.entropy:.2f} of at most {np.log(len(mean)):.2f} nats"
    )
    parts: list[Box | Words] = [Words(EDGE, EDGE + LINE / 2, title, bold=True)]
    y = EDGE + 1.6 * LINE
    experts = () if route.bundle is None else route.bundle.experts
    keywords = [", ".join(expert.keywords[:5]) for expert in experts] or [""] * len(route.members)
    bar = NAME + 70.0
    for name, words, weight, color in zip(route.members, keywords, mean.tolist(), colors, strict=True):
        parts += [Box(EDGE, y + 4, 11.0, 11.0, color), Words(EDGE + 18, y + LINE / 2, _fit(name, NAME - 60))]
        parts += [Box(EDGE + NAME - 30, y + 4, 100 * weight, 11.0, color)]
        parts += [Words(EDGE + bar, y + LINE / 2, f"{weight:.2f}"), Words(EDGE + bar + 40, y + LINE / 2, words, SOFT)]
        y += LINE
    y += LINE / 2
    for column in range(max(1, columns)):
        left = EDGE + column * (_LINE_WIDTH + GAP)
        heads = {
            0: "class",
            NAME: "distance to the nearest fine clusters, their captions",
            NAME + CLUSTER + 20: "weights",
        }
        parts += [Words(left + x, y + LINE / 2, words, SOFT) for x, words in heads.items()]
    y += 1.2 * LINE
    if columns == 0:
        parts += _roomy(reasons, route.members, colors, y)
        height = y + len(reasons) * (3 * LINE + 10)
    else:
        rows = -(-len(order) // columns)
        for place, index in enumerate(order.tolist()):
            left = EDGE + (place // rows) * (_LINE_WIDTH + GAP)
            parts += _one_line(reasons[index], route.members, colors, left, y + (place % rows) * LINE)
        height = y + rows * LINE
    return RoutePicture(width=width, height=height + EDGE, parts=tuple(parts), num_experts=len(route.members))


def to_svg(picture: RoutePicture) -> str:
    """Return the picture as SVG."""
    size = f"{picture.width:g} {picture.height:g}"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" width="{picture.width:g}" '
        f'height="{picture.height:g}" font-family="Helvetica, Arial, sans-serif" font-size="{FONT}">',
        dark_style(picture.num_experts),
        f'<rect width="100%" height="100%" fill="{PAPER}"/>',
    ]
    for part in picture.parts:
        if isinstance(part, Box):
            place = f'x="{part.x:.1f}" y="{part.y:.1f}" width="{part.width:.1f}" height="{part.height:.1f}"'
            lines.append(f'<rect {place} fill="{part.color}"/>')
        else:
            weight = ' font-weight="bold"' if part.bold else ""
            place = f'x="{part.x:.1f}" y="{part.y + 0.35 * FONT:.1f}"'
            lines.append(f'<text {place} fill="{part.color}"{weight}>{escape(_printable(part.text))}</text>')
    return "\n".join([*lines, "</svg>", ""])


def to_png(picture: RoutePicture) -> bytes:
    """Return the picture as a PNG file."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (round(picture.width * PNG_SCALE), round(picture.height * PNG_SCALE)), PAPER)
    pencil, font = ImageDraw.Draw(image), _font()
    for part in picture.parts:
        x, y = part.x * PNG_SCALE, part.y * PNG_SCALE
        if isinstance(part, Box):
            right, bottom = x + part.width * PNG_SCALE - 1, y + part.height * PNG_SCALE - 1
            pencil.rectangle((x, y, max(x, right), max(y, bottom)), fill=part.color)
        else:
            stroke = 0.5 if part.bold else 0
            pencil.text((x, y), part.text, fill=part.color, font=font, anchor="lm", stroke_width=stroke)
    return encode_png(image)


_LINE_WIDTH = NAME + CLUSTER + BAR + 110


def _columns(num_classes: int) -> tuple[float, int]:
    """Return the picture's width and its number of columns; 0 columns if there is room for all nearest clusters."""
    if num_classes <= MAX_ROOMY:
        return 2 * EDGE + _LINE_WIDTH, 0
    columns = min(3, -(-num_classes // MAX_COLUMN))
    return 2 * EDGE + columns * _LINE_WIDTH + (columns - 1) * GAP, columns


def _roomy(reasons: Sequence[ClassReason], members: Sequence[str], colors: list[str], y: float) -> list[Box | Words]:
    """Lay out each class with all its nearest clusters."""
    parts: list[Box | Words] = []
    for reason in reasons:
        parts.append(Box(EDGE, y, _LINE_WIDTH, 1.0, RULE))
        parts.append(Words(EDGE, y + 5 + LINE / 2, _fit(reason.name, NAME - 10), bold=True))
        for place, cluster in enumerate(reason.clusters):
            parts += _cluster(reason, place, colors[cluster.expert], EDGE + NAME, y + 5 + place * LINE)
        parts += _bar(reason, members, colors, EDGE + NAME + CLUSTER + 20, y + 5)
        y += 3 * LINE + 10
    return parts


def _one_line(reason: ClassReason, members: Sequence[str], colors: list[str], x: float, y: float) -> list[Box | Words]:
    """Lay out a class with its nearest cluster on one line."""
    parts: list[Box | Words] = [Words(x, y + LINE / 2, _fit(reason.name, NAME - 10), bold=True)]
    parts += _cluster(reason, 0, colors[reason.clusters[0].expert], x + NAME, y)
    return parts + _bar(reason, members, colors, x + NAME + CLUSTER + 20, y)


def _cluster(reason: ClassReason, place: int, color: str, x: float, y: float) -> list[Box | Words]:
    """Lay out the colour of a cluster's expert, its distance, and its captions."""
    cluster = reason.clusters[place]
    captions = _fit(" · ".join(cluster.captions), CLUSTER - 55)
    distance = Words(x + 16, y + LINE / 2, f"{cluster.distance:.2f}", SOFT)
    return [Box(x, y + 4, 11.0, 11.0, color), distance, Words(x + 50, y + LINE / 2, captions)]


def _bar(reason: ClassReason, members: Sequence[str], colors: list[str], x: float, y: float) -> list[Box | Words]:
    """Lay out the weights of a class as one bar, with the name of the largest."""
    parts: list[Box | Words] = []
    at, best = x, int(np.argmax(reason.weights))
    for weight, color in zip(reason.weights, colors, strict=True):
        if weight * BAR >= 0.2:
            parts.append(Box(at, y + 3, weight * BAR, LINE - 6, color))
        at += weight * BAR
    label = f"{reason.weights[best]:.2f} {members[best]}"
    return [*parts, Words(x + BAR + 8, y + LINE / 2, _fit(label, 95.0), SOFT)]


@cache
def _font() -> FreeTypeFont | ImageFont:
    from PIL import ImageFont

    return ImageFont.load_default(FONT * PNG_SCALE)


def _fit(text: str, width: float) -> str:
    """Cut text to a width in pixels, with room for bold letters, which are up to a tenth wider."""
    text = _printable(text)
    font = _font()
    if font.getlength(text) <= 0.92 * width * PNG_SCALE:
        return text
    while text and font.getlength(text + "…") > 0.92 * width * PNG_SCALE:
        text = text[:-1]
    return text.rstrip() + "…"


def _printable(text: str) -> str:
    """Put text on one line, without characters that XML does not allow."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
