"""The page of a check and its sheet show every pair, and cross out what is broken."""

from __future__ import annotations

import base64
import io
import re
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageChops

from modeclip.data.catalog import Catalog
from modeclip.data.checks import check
from modeclip.data.indexing import index
from modeclip.data.samples import Sample
from modeclip.data.sources import DataConfig
from modeclip.data.sources.icons import read_icons
from modeclip.pages.check_page import SHEET_PAIRS, TILE, draw_rows, read_tiles, write_check, write_sheet
from support import write_pairs


@pytest.fixture(scope="module")
def icons() -> list[bytes]:
    """Sixty different real icons."""
    found = (item.image for item in read_icons(["lucide"], 32) if isinstance(item, Sample))
    return list(islice(dict.fromkeys(found), 60))


def catalog_of(source: Path) -> Catalog:
    out = source.with_name(f"{source.name} out")
    index(DataConfig(source=str(source)), out)
    return Catalog.open(out / "catalog.lance")


def read_png(path: Path) -> Image.Image:
    return Image.open(io.BytesIO(path.read_bytes()))


def test_a_sheet_shows_every_pair_and_crosses_out_what_is_broken(tmp_path: Path, icons):
    folder = write_pairs(tmp_path / "data", icons, [f"caption {n}" for n in range(30)])
    catalog = catalog_of(folder)
    before = read_png(write_sheet(read_tiles(catalog, np.arange(30)), tmp_path / "a.png", columns=8))
    again = read_png(write_sheet(read_tiles(catalog, np.arange(30)), tmp_path / "b.png", columns=8))
    assert before.tobytes() == again.tobytes()
    assert 8 * TILE < before.width < 9 * TILE
    (folder / "009.png").write_bytes(bytes(100))
    after = read_png(write_sheet(read_tiles(catalog, np.arange(30)), tmp_path / "a.png", columns=8))
    left, top, right, bottom = ImageChops.difference(before, after).getbbox()
    assert TILE < left < right < 2 * TILE + 30  # the second tile of the second row, and nothing else
    assert TILE < top < bottom < 3 * TILE
    empty = read_png(write_sheet(read_tiles(catalog, np.arange(0)), tmp_path / "e.png"))
    assert empty.width < 2 * TILE


def test_a_caption_of_one_endless_word_or_of_strange_signs_is_drawn(tmp_path: Path, icons):
    catalog = catalog_of(write_pairs(tmp_path / "data", icons, ["w" * 4000, "猫\u200b\x07 x", "a " * 500, "é"]))
    sheet = read_png(write_sheet(read_tiles(catalog, np.arange(4)), tmp_path / "a.png", columns=3))
    assert sheet.width < 4 * TILE


def test_the_page_holds_everything_and_loads_nothing(tmp_path: Path, icons):
    captions = [f"caption {n}" for n in range(58)] + ["<script>alert(1)</script>", '"quoted" & <b>bold</b>']
    folder = write_pairs(tmp_path / "data", icons, captions)
    catalog = catalog_of(folder)
    (folder / "059.png").write_bytes(bytes(100))
    (folder / "002.png").unlink()
    result = check(catalog)
    page, sheet = write_check(catalog, result, tmp_path / "page")
    assert sorted(path.name for path in page.parent.iterdir()) == ["check.html", "contact.png"]
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "<b>bold" not in text
    assert not re.search(r'(src|href)="(?!data:)|url\(|@import', text)
    assert text.count('class="gone"') == 2
    assert text.count("<rect ") == sum(
        count > 0 for h in (result.caption_lengths, result.shorter_sides, result.aspects) for count in h.counts
    )
    for finding in result.findings:
        assert finding.what in text
        assert finding.advice in text
    first = re.search(r'src="data:image/webp;base64,([^"]+)"', text)
    assert Image.open(io.BytesIO(base64.b64decode(first.group(1)))).size == (32, 32)
    assert read_png(sheet).size[0] > 11 * TILE


def test_pairs_are_drawn_by_a_seed(tmp_path: Path, icons):
    catalog = catalog_of(write_pairs(tmp_path / "data", icons, [f"caption {n}" for n in range(60)]))
    assert draw_rows(catalog, 10).tolist() == draw_rows(catalog, 10).tolist() != draw_rows(catalog, 10, seed=1).tolist()
    assert len(set(draw_rows(catalog, 10).tolist())) == 10
    assert draw_rows(catalog, SHEET_PAIRS).tolist() == list(range(60))
