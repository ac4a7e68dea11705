"""A catalog and what a check found in it go in; a contact sheet (PNG) and a page (HTML) to look at come out.

The sheet shows pairs with their captions; a picture that cannot be shown is a crossed tile with the cause, so that the
eye finds what a table only counts. The page is one file that loads nothing: counts, findings, three histograms as
inline SVG, the sheet. All text from the data is escaped by the template engine.

Price: a second for 96 pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from modeclip.data.catalog import Catalog
from modeclip.data.checks import CheckResult
from modeclip.data.findings import Histogram, format_share
from modeclip.data.images import cause_of, decode_image, strict_pillow
from modeclip.data.samples import EMPTY, Sample
from modeclip.pages.charts import Axis
from modeclip.pages.run_report import encode_image, format_count, format_duration, is_small
from modeclip.system.files import write_atomically, writing

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

Json = dict[str, Any]

SHEET_PAIRS = 96
TILE = 112  # pixels of a tile's side on the sheet
GAP = 10
LINES = 3  # of a caption
LINE_PIXELS = 14
FONT_PIXELS = 11
HISTOGRAM_SIZE = (380.0, 210.0)
PAPER, INK, SOFT, RULE, WARN = "#fbfbf9", "#17191e", "#5c6370", "#d5d6d0", "#a8371b"


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One pair as it is shown."""

    row: int
    key: str
    caption: str
    image: Image | None
    """Nothing where it cannot be shown."""
    cause: str
    """Why it cannot be shown; empty if it can."""


def draw_rows(catalog: Catalog, count: int = SHEET_PAIRS, seed: int = 0) -> Int[np.ndarray, " n"]:
    """Draw rows at random, ascending; all of them where there are not more."""
    count = min(count, len(catalog))
    return np.sort(np.random.default_rng(seed).choice(len(catalog), count, replace=False, shuffle=False))


def read_tiles(catalog: Catalog, rows: Int[np.ndarray, " n"]) -> list[Tile]:
    """Read and decode pairs, in the order of ``rows``; what cannot be decoded comes with its cause."""
    columns = ("key", "caption", "image", "path", "offset", "size")
    values = (column.tolist() for column in catalog.read(columns, rows).values())
    tiles = []
    with strict_pillow():
        for row, key, caption, image, path, offset, size in zip(rows.tolist(), *values, strict=True):
            picture = None
            try:
                data = Sample(key, caption, image, path, offset, size).read()
                picture, cause = (decode_image(data), "") if data else (None, EMPTY)
            except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
                cause = cause_of(error)
            tiles.append(Tile(row=row, key=key, caption=caption or "", image=picture, cause=cause))
    return tiles


def draw_contact_sheet(catalog: Catalog, rows: Int[np.ndarray, " n"], path: Path | str, columns: int = 12) -> Path:
    """Write a PNG of pairs: each picture with its caption below, crossed out where it cannot be decoded.

    Args:
        catalog: The catalog.
        rows: Positions of the pairs, in the order in which they are shown.
        path: The file; an existing one is replaced.
        columns: Tiles side by side.

    Returns:
        The file.
    """
    return _write_sheet(read_tiles(catalog, rows), Path(path), columns)


def write_check(catalog: Catalog, result: CheckResult, folder: Path | str, seed: int = 0) -> tuple[Path, Path]:
    """Write ``check.html`` and ``contact.png`` to a folder, of pairs drawn at random.

    Args:
        catalog: The catalog.
        result: What ``check`` found in it.
        folder: Where to write; made if it is not there.
        seed: Of the draw.

    Returns:
        The page and the sheet.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tiles = read_tiles(catalog, draw_rows(catalog, seed=seed))
    page = folder / "check.html"
    with writing(page):
        write_atomically(page, _render(result, tiles, catalog.name))
    return page, _write_sheet(tiles, folder / "contact.png", 12)


# ---------------------------------------------------------------- the sheet


def _write_sheet(tiles: Sequence[Tile], path: Path, columns: int) -> Path:
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
    temporary = path.with_name(path.name + ".part")
    with writing(path):
        sheet.save(temporary, "PNG")
    temporary.replace(path)
    return path


def _draw_tile(sheet: Image, pen: ImageDraw, font: ImageFont | FreeTypeFont, tile: Tile, left: int, top: int) -> None:
    """Draw a picture, or a cross and the cause, and the caption below it."""
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
    """Break a text into at most so many lines of a width in pixels; what is left out becomes an ellipsis."""
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


# ---------------------------------------------------------------- the page


def draw_histogram(histogram: Histogram, size: tuple[float, float] = HISTOGRAM_SIZE) -> Json | None:
    """Place the bars of a histogram on a logarithmic axis: bars, ticks and frame; None where nothing was counted.

    Each bin is as wide as it is on that axis; the open bin at the end is as wide as the one before it.
    """
    counts, edges = np.array(histogram.counts), np.array(histogram.edges)
    filled = np.flatnonzero(counts)
    if not len(filled):
        return None
    first, last = int(filled[0]), min(len(counts) - 1, int(filled[-1]) + 1)
    ends = np.append(edges[1:], 2 * edges[-1] - edges[-2])
    low = edges[first] or 0.5  # a bin that starts at 0 has no place on a logarithmic axis
    across = Axis(float(low), float(ends[last]), 46.0, size[0] - 12, log=True)
    up = Axis(0.0, float(counts.max()) * 1.08, size[1] - 34, 10.0)
    bars = []
    for position in range(first, last + 1):
        left, right = across.place(max(float(edges[position]), float(low))), across.place(float(ends[position]))
        top = up.place(int(counts[position]))
        words = f"{edges[position]:g}" if position == len(counts) - 1 else f"{edges[position]:g} to {ends[position]:g}"
        bars.append(
            {
                "x": round(left + 0.5, 1),
                "y": round(top, 1),
                "width": round(max(right - left - 1, 0.5), 1),
                "height": round(up.start - top, 1),
                "words": words,
                "count": int(counts[position]),
            }
        )
    return {
        "size": size,
        "frame": (across.start, up.end, across.end, up.start),
        "bars": [bar for bar in bars if bar["count"]],
        "x_ticks": _thin_ticks(across.ticks(5)),
        "y_ticks": up.ticks(4),
    }


def _thin_ticks(ticks: list[tuple[float, float]], gap: float = 34.0) -> list[tuple[float, float]]:
    """Leave out ticks whose numbers would touch."""
    kept: list[tuple[float, float]] = []
    for value, place in ticks:
        if value > 0 and (not kept or place - kept[-1][1] >= gap):
            kept.append((value, place))
    return kept


def _render(result: CheckResult, tiles: Sequence[Tile], name: str) -> str:
    """Fill the template with what was found."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"count": format_count, "duration": format_duration}
    pictures = [
        {
            "source": encode_image(tile.image) if tile.image else "",
            "small": tile.image is not None and is_small(tile.image),
            "caption": tile.caption,
            "place": f"row {tile.row:,}, key {tile.key}",
            "cause": tile.cause,
        }
        for tile in tiles
    ]
    severities = [finding.severity for finding in result.findings]
    return environment.get_template("check.html").render(
        result=result,
        name=name,
        verdict=[(severity, severities.count(severity)) for severity in dict.fromkeys(severities)],
        findings=[(finding, format_share(finding.count, finding.looked_at)) for finding in result.findings],
        charts=[
            ("Caption length", "characters", draw_histogram(result.caption_lengths)),
            ("Shorter side", "pixels", draw_histogram(result.shorter_sides)),
            ("Aspect", "width / height", draw_histogram(result.aspects)),
        ],
        pictures=pictures,
        num_experts=4,
    )
