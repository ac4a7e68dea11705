"""The page of routers shows what the trace says, as text, and loads nothing."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from modeclip.adapting.tracing import BlockTrace, ExpertTrace, Topic, Trace, TracedPair
from modeclip.pages.router_page import patch_grid, write_routers
from support import Element, noise_picture, parse_page

EVIL = "</script><script>alert(1)</script> <img src=x onerror=alert(2)> {{ 7*7 }}"
EXPERTS, BLOCKS = 3, 6


def make_pair(number: int, *, grid: int = 2, size: tuple[int, int] = (32, 32)) -> TracedPair:
    draw = np.random.default_rng(number)
    share = np.array([0.5, 0.3, 0.2])
    return TracedPair(
        row=number,
        key=f"key {number} <b>",
        caption=f"thing {number} {EVIL}",
        picture=noise_picture(number, size),
        pieces=("", f"piece{number}", "<b>", ""),
        image=tuple(draw.integers(0, EXPERTS, 1 + grid * grid * size[0] // size[1]) for _ in range(BLOCKS)),
        text=tuple(np.array([0, 1, 2, 0]) for _ in range(2)),
        image_share=share,
        text_share=share,
    )


@pytest.fixture(scope="module")
def trace() -> Trace:
    first = np.array([0.7, 0.297, 0.003])
    blocks = [
        BlockTrace(tower=tower, index=index, first=first, chosen=np.array([0.9, 0.8, 0.3]), balance=1.23)
        for tower, count in (("image", BLOCKS), ("text", 2))
        for index in range(count)
    ]
    pairs = tuple(make_pair(number) for number in range(4))
    experts = [
        ExpertTrace(name=f"expert {k}", image=0.4, text=0.3, words=("heart", EVIL), pairs=pairs[:k]) for k in range(2)
    ]
    experts.append(ExpertTrace(name=f"stage {EVIL}", image=0.2, text=0.4, words=(), pairs=pairs[:1]))
    topic = Topic(name=f"topic {EVIL}", num_pairs=17, image=np.array([0.9, 0.1, 0]), text=np.array([0.3, 0.3, 0.4]))
    return Trace(
        model=f"/models/{EVIL.replace('/', '')}",
        top_k=2,
        num_pairs=1234,
        num_unreadable=5,
        blocks=tuple(blocks),
        experts=tuple(experts),
        topic_column=None,
        topics=(topic,),
        shown=pairs,
    )


def cells_of(view: Element, rows: int, columns: int) -> np.ndarray:
    """Return the expert that the middle of each patch has the colour of."""
    found = np.full((rows, columns), -1)
    x, y = (np.arange(columns) + 0.5) * 100 / columns, (np.arange(rows) + 0.5) * 100 / rows
    for path in view.all("path"):
        for box in re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)v([\d.]+)h-\3z", path.attributes["d"]):
            left, top, width, height = map(float, box)
            inside = np.outer((top < y) & (y < top + height), (left < x) & (x < left + width))
            assert (found[inside] == -1).all()
            found[inside] = int(path.attributes["class"].rpartition("e")[2])
    return found


def test_the_page_says_what_the_trace_says(trace: Trace, tmp_path: Path):
    page = write_routers(trace, tmp_path / "new" / "folder", name=f"my {EVIL}")
    assert page.name == "router.html"
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "<img src=x" not in text
    assert "<b>" not in re.sub(r"<b>[\d.,]+</b>", "", text)
    assert not re.search(r'(src|href)="(?!data:|#)|url\(|@import', text)
    root = parse_page(page)
    assert f"my {EVIL}" in root.one("h1").text
    assert "1,234" in root.text
    assert "5 others cannot be read" in root.text
    rows = [[cell.text for cell in row.children if isinstance(cell, Element)] for row in root.all("tr")]
    assert ["0", *["70.0"] * BLOCKS, "70.0"] in rows
    assert [f"2 stage {EVIL}", *["0.3"] * 2, "0.3"] in rows
    assert ["balance", *["1.23"] * BLOCKS, "1.23"] in rows
    assert [f"topic {EVIL}", "17", "90", "10", "0", "30", "30", "40"] in rows
    assert "expert 2 in block 5 of the image tower" in root.text
    assert "No token of the sample chooses it first." in root.text  # expert 0 has no pairs


def test_patches_have_the_colour_of_their_expert(trace: Trace, tmp_path: Path):
    root = parse_page(write_routers(trace, tmp_path))
    pictures = [svg for svg in root.all("svg") if svg.all("image")]
    assert len(pictures) == 4
    for pair, picture in zip(trace.shown, pictures, strict=True):
        assert picture.attributes["role"] == "img"
        assert pair.caption in picture.attributes["aria-label"]
        views = picture.all("g")
        for block, view in zip([0, 2, 3, 5], views, strict=True):  # the first, the last, and two between
            experts = pair.image[block]
            np.testing.assert_array_equal(cells_of(view, 2, 2), experts[1:].reshape(2, 2))
            digits = [element.text for element in view.all("text")]
            assert digits == [str(k) for k in [*experts[1:], experts[0]]]  # the class token stands below
            share = 100 * np.mean(experts == experts[0])
            assert f"block {block}: " in picture.attributes["aria-label"]
            assert f"expert {experts[0]} {share:.0f} %" in picture.attributes["aria-label"]
    lines = root.all("p", class_="line")
    assert lines[0].text == "block 0 •0 piece01 <b>2 •0"
    assert [span.attributes["class"] for span in lines[0].all("span")] == [
        "piece e0",
        "piece e1",
        "piece e2",
        "piece e0",
    ]


def test_a_large_grid_has_no_digits_and_a_wide_picture_has_its_shape(trace: Trace, tmp_path: Path):
    pairs = (make_pair(0, grid=16, size=(64, 64)), make_pair(1, grid=4, size=(64, 32)))
    root = parse_page(write_routers(replace(trace, shown=pairs), tmp_path))
    large, wide = (svg for svg in root.all("svg") if svg.all("image"))
    assert [len(view.all("text")) for view in large.all("g")] == [1] * 4  # the class token's
    np.testing.assert_array_equal(cells_of(large.all("g")[0], 16, 16), pairs[0].image[0][1:].reshape(16, 16))
    np.testing.assert_array_equal(cells_of(wide.all("g")[1], 4, 8), pairs[1].image[2][1:].reshape(4, 8))


@pytest.mark.parametrize(
    ("tokens", "size", "grid"),
    [
        (197, (224, 224), (14, 14)),
        (1 + 4 + 256, (224, 224), (16, 16)),  # four registers
        (576, (384, 384), (24, 24)),  # no class token
        (1 + 8 * 4, (128, 256), (8, 4)),
        (1, (32, 32), (1, 1)),
    ],
)
def test_grid_of_patches(tokens: int, size: tuple[int, int], grid: tuple[int, int]):
    assert patch_grid(tokens, size) == grid


def test_nothing_to_show_leaves_sections_out(trace: Trace, tmp_path: Path):
    root = parse_page(write_routers(replace(trace, shown=(), topics=(), topic_column="fine_cluster"), tmp_path))
    assert [section.attributes["id"] for section in root.all("section")] == ["shares", "experts"]
    assert root.values("a", "href") == ["#shares", "#experts"]
