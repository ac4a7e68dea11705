"""Draw the picture of docs/one-model.md: the four ways from many models to one.

    python docs/one_model_picture.py

It writes ``docs/assets/one-model.svg``. A test draws it again and compares.
"""

from __future__ import annotations

from pathlib import Path

from modeclip.pages.html import INK, PAPER, RULE, SOFT, dark_style, expert_tones

PICTURE = Path(__file__).parent / "assets" / "one-model.svg"
WIDTH, PANEL, TOP, LEFT = 940, 226, 44, 8
"""Pixels: of the picture, of a way, above its drawing, left of the first."""
TONES = [light for light, _ in expert_tones(4)]
WAYS = (
    ("Average", "merge", ("one dense model,", "weights in the mean")),
    ("Multiplet upcycling", "upcycle MODEL", ("stages train feed-forward", "layers; a router joins them")),
    ("From data experts", "upcycle BUNDLE", ("experts by topic; the gate", "learns what routing did")),
    ("Distillation", "distill", ("one dense model learns", "the many's similarities")),
)
LABEL = (
    "Four ways to one model: the average of weights, multiplet upcycling, data experts in one CLIP-MoE, distillation; "
    "the first and the last give a dense model, the two between a model with a router in each block"
)


def draw() -> str:
    """Return the picture as SVG."""
    shapes = []
    for number, (title, command, words) in enumerate(WAYS):
        x = LEFT + number * (PANEL + 6)
        shapes.append(f'<rect x="{x}" y="8" width="{PANEL}" height="344" rx="12" fill="#ffffff" stroke="{RULE}"/>')
        shapes.append(_text(x + 16, 34, title, size=15, weight=700))
        shapes.append(_text(x + 16, 52, command, size=11, fill=SOFT, family="ui-monospace, monospace"))
        middle = x + PANEL / 2
        shapes += (_average, _stages, _bundle, _teacher)[number](middle, TOP)
        for line, text in enumerate(words):
            shapes.append(_text(middle, 324 + 16 * line, text, size=12, fill=SOFT, anchor="middle"))
    body = "\n".join(shapes)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} 360" role="img" aria-label="{LABEL}">'
        f'{dark_style(4)}<rect width="{WIDTH}" height="360" fill="{PAPER}"/>\n{body}\n</svg>\n'
    )


def _average(middle: float, top: float) -> list[str]:
    shapes = []
    for k, tone in enumerate(TONES):
        x = middle - 81 + 44 * k
        shapes += [_tower(x, top + 34, [tone] * 3), _line(x + 15, top + 118, middle, top + 168)]
    return [*shapes, _tower(middle - 15, top + 176, [INK] * 3)]


def _stages(middle: float, top: float) -> list[str]:
    shapes = []
    for k, tone in enumerate(TONES):
        x = middle - 96 + 56 * k
        shapes.append(_tower(x, top + 34, [tone] * 3, narrow=True))
        if k:
            shapes.append(_arrow(x - 32, top + 73, x - 4, top + 73))
            shapes.append(_text(x - 18, top + 66, f"{9**k}", size=9, fill=SOFT, anchor="middle"))
        shapes.append(_line(x + 12, top + 118, middle, top + 152))
    return [*shapes, *_moe(middle, top + 160)]


def _bundle(middle: float, top: float) -> list[str]:
    shapes = []
    for k, tone in enumerate(TONES):
        x = middle - 81 + 44 * k
        shapes.append(f'<circle cx="{x + 15}" cy="{top + 24}" r="7" fill="{tone}" fill-opacity="0.55"/>')
        shapes += [_tower(x, top + 40, [tone] * 3), _line(x + 15, top + 122, middle, top + 152)]
    return [*shapes, *_moe(middle, top + 160)]


def _teacher(middle: float, top: float) -> list[str]:
    shapes = []
    for k, tone in enumerate(TONES):
        shapes.append(_tower(middle - 81 + 44 * k, top + 34, [tone] * 3))
    cell, left, y = 11, middle - 22, top + 128
    for row in range(4):
        for column in range(4):
            tone, share = (TONES[row], 0.85) if row == column else (SOFT, (0.1, 0.25, 0.4)[(row * 5 + column * 3) % 3])
            shapes.append(
                f'<rect x="{left + cell * column}" y="{y + cell * row}" width="{cell - 1}" height="{cell - 1}"'
                f' fill="{tone}" fill-opacity="{share}"/>'
            )
    shapes += [_arrow(middle, top + 118, middle, top + 125), _arrow(middle, top + 174, middle, top + 188)]
    return [*shapes, _tower(middle - 15, top + 192, [INK] * 3, small=True)]


def _tower(x: float, y: float, tones: list[str], *, narrow: bool = False, small: bool = False) -> str:
    """Return a model of three blocks: attention as a line, the feed-forward layer in the model's colour."""
    width, height = 24 if narrow else 30, 19 if small else 26
    return "".join(
        f'<rect x="{x}" y="{y + height * n}" width="{width}" height="{height - 4}" rx="4" fill="{tone}"'
        f' fill-opacity="0.85"/>'
        for n, tone in enumerate(tones)
    )


def _moe(middle: float, top: float) -> list[str]:
    """Return a model of three blocks whose feed-forward layers are four, two of which a token goes through."""
    shapes = []
    for block, chosen in enumerate(((0, 2), (1, 3), (0, 1))):
        y = top + 30 * block
        shapes.append(f'<rect x="{middle - 76}" y="{y}" width="152" height="26" rx="6" fill="none" stroke="{SOFT}"/>')
        for k, tone in enumerate(TONES):
            shapes.append(
                f'<rect x="{middle - 70 + 36 * k}" y="{y + 5}" width="32" height="16" rx="4" fill="{tone}"'
                f' fill-opacity="{0.9 if k in chosen else 0.25}"/>'
            )
    return shapes


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{SOFT}" stroke-opacity="0.5"/>'


def _arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    """Return an arrow to the right or downwards."""
    head = f"M{x2 - 5} {y2 - 3}l5 3l-5 3" if y1 == y2 else f"M{x2 - 3} {y2 - 5}l3 5l3 -5"
    return f'<path d="M{x1} {y1}L{x2} {y2}{head}" fill="none" stroke="{SOFT}"/>'


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: int,
    fill: str = INK,
    weight: int = 400,
    anchor: str = "start",
    family: str = "system-ui, sans-serif",
) -> str:
    return (
        f'<text x="{x}" y="{y}" fill="{fill}" text-anchor="{anchor}" font-family="{family}" font-size="{size}"'
        f' font-weight="{weight}">{text}</text>'
    )


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
