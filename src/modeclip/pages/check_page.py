"""The page of a data check and its contact sheet: pairs to look at, beside what the check counted.

The sheet is a PNG of pairs with their captions. A picture that cannot be shown is a crossed tile with the cause, so
that the eye finds what a table only counts. The page holds the counts, the findings, three histograms and the pairs.

Price: a second for 96 pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from modeclip.data.catalog import Catalog
from modeclip.data.checks import CheckResult, format_share
from modeclip.data.images import cause_of, decode_image, strict_pillow
from modeclip.data.samples import EMPTY
from modeclip.pages.charts import draw_bins
from modeclip.pages.html import INK, PAPER, RULE, SOFT, WARN, embed_picture, encode_png, is_small, write_page
from modeclip.system.files import write_atomically, writing

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

SHEET_PAIRS = 96
"""Pairs on the sheet and on the page."""
TILE, GAP, LINE_PIXELS, FONT_PIXELS = 112, 10, 14, 11
"""Side of a picture on the sheet, room between tiles, height of a line of caption, size of its letters: pixels."""
LINES = 3
"""Most lines of a caption."""
HISTOGRAM_SIZE = (380.0, 210.0)


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A pair as the sheet and the page show it."""

    row: int
    key: str
    caption: str
    image: Image | None
    """The decoded image; None if it cannot be shown."""
    cause: str
    """Why it cannot be shown; empty if it can."""


def draw_rows(catalog: Catalog, count: int = SHEET_PAIRS, seed: int = 0) -> Int[np.ndarray, " n"]:
    """Draw rows at random and return them in ascending order; all rows if the catalog has no more."""
    count = min(count, len(catalog))
    return np.sort(np.random.default_rng(seed).choice(len(catalog), count, replace=False, shuffle=False))


def read_tiles(catalog: Catalog, rows: Int[np.ndarray, " n"]) -> list[Tile]:
    """Read and decode pairs in the order of ``rows``. A tile says why its image cannot be decoded."""
    tiles = []
    with strict_pillow():
        for row, pair in zip(rows.tolist(), chain.from_iterable(catalog.samples(rows)), strict=True):
            picture = None
            try:
                data = pair.read()
                picture, cause = (decode_image(data, catalog.exif), "") if data else (None, EMPTY)
            except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
                cause = cause_of(error)
            tiles.append(Tile(row=row, key=pair.key, caption=pair.caption, image=picture, cause=cause))
    return tiles


def write_check(catalog: Catalog, result: CheckResult, folder: Path | str, seed: int = 0) -> tuple[Path, Path]:
    """Write ``check.html`` and ``contact.png`` to a folder. Both show the same pairs, drawn at random.

    Args:
        catalog: The catalog.
        result: What the check of the catalog found.
        folder: The folder; it is made if it is missing.
        seed: Decides which pairs are drawn.

    Returns:
        Paths of the page and of the sheet.
    """
    tiles = read_tiles(catalog, draw_rows(catalog, seed=seed))
    severities = [finding.severity for finding in result.findings]
    histograms = (
        ("Caption length", "characters", result.caption_lengths),
        ("Shorter side", "pixels", result.shorter_sides),
        ("Aspect", "width / height", result.aspects),
    )
    page = write_page(
        Path(folder) / "check.html",
        "check.html",
        result=result,
        name=catalog.name,
        verdict=[(severity, severities.count(severity)) for severity in dict.fromkeys(severities)],
        findings=[(finding, format_share(finding.count, finding.looked_at)) for finding in result.findings],
        charts=[
            (title, unit, draw_bins(found.counts, found.edges, size=HISTOGRAM_SIZE))
            for title, unit, found in histograms
        ],
        pictures=[
            embed_picture(tile.image, tile.caption, place=f"row {tile.row:,}, key {tile.key}", cause=tile.cause)
            for tile in tiles
        ],
    )
    return page, write_sheet(tiles, Path(folder) / "contact.png")


def write_sheet(tiles: Sequence[Tile], path: Path, columns: int = 12) -> Path:
    """Write a PNG of pairs, each picture with its caption below, and return its path.

    Args:
        tiles: The pairs in order. A picture that cannot be shown is crossed out.
        path: The file; an existing one is replaced as a whole.
        columns: Tiles in a row of the sheet.
    """
    from PIL import Image, ImageDraw, ImageFont

    height = TILE + LINES * LINE_PIXELS + 6
    across, down = min(columns, max(len(tiles), 1)), -(-len(tiles) // columns)
    size = (GAP + across * (TILE + GAP), GAP + max(down, 1) * (height + GAP))
    sheet, font = Image.new("RGB", size, PAPER), ImageFont.load_default(FONT_PIXELS)
    pen = ImageDraw.Draw(sheet)
    for position, tile in enumerate(tiles):
        left = GAP + position % columns * (TILE + GAP)
        top = GAP + position // columns * (height + GAP)
        _draw_tile(sheet, pen, font, tile, left, top)
    with writing(path):
        write_atomically(path, encode_png(sheet))
    return path


def _draw_tile(sheet: Image, pen: ImageDraw, font: ImageFont | FreeTypeFont, tile: Tile, left: int, top: int) -> None:
    """Draw a picture, or a cross and the cause, with the caption below it."""
    from PIL import Image

    right, bottom = left + TILE - 1, top + TILE - 1
    if tile.image is None:
        pen.rectangle((left, top, right, bottom), "#f6ebe7", WARN)
        pen.line((left, top, right, bottom), WARN)
        pen.line((left, bottom, right, top), WARN)
        lines = _wrap(tile.cause, font, TILE - 16, 4)
        for number, line in enumerate(lines):
            middle, y = (left + right) // 2, (top + bottom) // 2 + (number - len(lines) / 2 + 0.5) * LINE_PIXELS
            box = pen.textbbox((middle, y), line, font, "mm")
            pen.rectangle((box[0] - 3, box[1] - 1, box[2] + 3, box[3] + 1), "#f6ebe7")
            pen.text((middle, y), line, WARN, font, "mm")
    else:
        pen.rectangle((left, top, right, bottom), "white", RULE)
        small, room = tile.image, TILE - 2
        if is_small(small):  # whole multiples keep the pixels of an icon square
            factor = max(1, room // max(small.size))
            small = small.resize((small.width * factor, small.height * factor), Image.Resampling.NEAREST)
        else:
            small = small.copy()
            small.thumbnail((room, room))
        sheet.paste(small, (left + (TILE - small.width) // 2, top + (TILE - small.height) // 2))
    for number, line in enumerate(_wrap(tile.caption, font, TILE, LINES)):
        pen.text((left, bottom + 5 + number * LINE_PIXELS), line, INK if tile.image else SOFT, font)


def _wrap(text: str, font: ImageFont | FreeTypeFont, width: int, most: int) -> list[str]:
    """Break a text into at most ``most`` lines of a width in pixels; an ellipsis stands for the rest."""
    rest = " ".join("".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split())).split())[:500]
    lines: list[str] = []
    while rest and len(lines) < most:
        fits = next(n for n in range(len(rest), -1, -1) if font.getlength(rest[:n]) <= width or n == 1)
        cut = fits if fits == len(rest) else (rest.rfind(" ", 0, fits + 1) if " " in rest[: fits + 1] else fits)
        lines.append(rest[:cut].rstrip())
        rest = rest[cut:].lstrip()
    if rest and lines:
        while lines[-1] and font.getlength(lines[-1] + "…") > width:
            lines[-1] = lines[-1][:-1].rstrip()
        lines[-1] += "…"
    return lines
