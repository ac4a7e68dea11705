"""The picture of a route shows every class once, with bars as long as its weights, and its files open."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from modeclip import MoDE
from modeclip.mixture.router import ClusterRouter, Route
from modeclip.pages.html import expert_tones
from modeclip.pages.route_picture import MAX_DRAWN, Box, Words, draw_route, write_picture

CLASSES = ["heart", "arrow left", "bell <b> & co", "book"]


@pytest.fixture(scope="module")
def mode(small_run: Path) -> MoDE:
    return MoDE.load(small_run / "bundle")


def many(mode: MoDE, count: int) -> Route:
    """A route of as many made-up class names, without an encoder."""
    draw = np.random.default_rng(0)
    centers = mode.bundle.fine_centers[draw.integers(len(mode.bundle.fine_centers), size=count)]
    vectors = centers + 0.02 * draw.normal(size=centers.shape).astype(np.float32)
    names = [f"class {index}" for index in range(count)]
    return ClusterRouter(mode.bundle).route_vectors(names, vectors, mode.request(rule="per_class", temperature=0.1))


@pytest.mark.parametrize("count", [3, 300, 2 * MAX_DRAWN + 1])
def test_picture_shows_every_class_once_inside_the_page(mode: MoDE, count: int) -> None:
    found = many(mode, count)
    drawing = draw_route(found)
    names = [part.text for part in drawing.parts if isinstance(part, Words) and part.text.startswith("class ")]
    step = -(-count // MAX_DRAWN) if count > MAX_DRAWN else 1
    assert len(names) == len(set(names)) == -(-count // step)
    for part in drawing.parts:
        assert 0 <= part.x < drawing.width
        assert 0 <= part.y < drawing.height
    places = [(part.x, part.y) for part in drawing.parts if isinstance(part, Words)]
    assert len(places) == len(set(places))
    title = drawing.parts[0]
    assert isinstance(title, Words)
    assert (f"{len(names):,} of {count:,} classes" if count > MAX_DRAWN else f"{count:,} classes") in title.text


def test_bars_are_as_long_as_the_weights(mode: MoDE) -> None:
    found = many(mode, 5)
    colors = [light for light, _ in expert_tones(2)]
    bars = [
        part for part in draw_route(found).parts if isinstance(part, Box) and part.width > 11.5 and part.height < 14
    ]
    for reason in found.explain():
        for weight, color in zip(reason.weights, colors, strict=True):
            if weight > 0.1:
                assert any(bar.color == color and bar.width == pytest.approx(180 * weight) for bar in bars)


def test_picture_files_hold_the_names_and_open(tmp_path: Path, mode: MoDE) -> None:
    found = mode.route(CLASSES)
    svg, png = tmp_path / "route.svg", tmp_path / "route.png"
    for path in (svg, png):
        write_picture(found, path)
    root = ElementTree.parse(svg).getroot()
    words = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert set(CLASSES) <= set(words)
    with Image.open(png) as image:
        assert image.size == (2 * int(root.get("width", "0")), round(2 * float(root.get("height", "0"))))
        pixels = np.asarray(image)
    for color, _ in expert_tones(2):
        wanted = [int(color[at : at + 2], 16) for at in (1, 3, 5)]
        assert (pixels == wanted).all(axis=2).sum() > 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["route.png", "route.svg"]


def test_captions_of_any_letters_make_a_file_that_opens(tmp_path: Path, mode: MoDE) -> None:
    names = ["tab\there", "nul\0 bell\a", "心 ❤ ñ", "a" * 300, "</text>"]
    found = ClusterRouter(mode.bundle).route_vectors(names, mode.bundle.fine_centers[:5], mode.request())
    for name in ("x.svg", "x.png"):
        write_picture(found, tmp_path / name)
    ElementTree.parse(tmp_path / "x.svg")
    assert "a" * 300 not in (tmp_path / "x.svg").read_text(encoding="utf-8")
