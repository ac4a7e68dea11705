"""`modeclip route` and its picture: the numbers shown are those of the mixture, the words those of the clusters."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from modeclip import MoDE
from modeclip.commands.mixture import classify, route
from modeclip.errors import ModeclipError
from modeclip.mixture.router import ClusterRouter, Route
from modeclip.pages.route_picture import MAX_DRAWN, Box, Words, draw_route, expert_colors, write_picture

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


def test_json_has_the_weights_the_clusters_and_the_budget(
    small_run: Path, mode: MoDE, capsys: pytest.CaptureFixture[str]
) -> None:
    route(small_run / "bundle", ",".join(CLASSES), max_experts=1, as_json=True)
    content = json.loads(capsys.readouterr().out)
    expected = mode.route(CLASSES, max_experts=1)
    np.testing.assert_allclose([row["weights"] for row in content["classes"]], expected.class_weights, atol=1e-6)
    np.testing.assert_allclose(content["weights"], expected.class_weights.mean(axis=0), atol=1e-6)
    assert content["max_experts"] == 1
    assert content["experts"] == ["expert-0", "expert-1"]
    for row, reason in zip(content["classes"], expected.explain(), strict=True):
        assert [cluster["index"] for cluster in row["clusters"]] == [cluster.index for cluster in reason.clusters]
        assert row["clusters"][0]["captions"] == list(reason.clusters[0].captions)


def test_explain_shows_three_clusters_a_class_and_prompts_change_them(
    small_run: Path, mode: MoDE, capsys: pytest.CaptureFixture[str]
) -> None:
    route(small_run / "bundle", "heart,book", explain=True)
    explained = capsys.readouterr().out
    for reason in mode.route(["heart", "book"]).explain():
        for cluster in reason.clusters:
            assert f"{cluster.distance:.2f}" in explained
            assert cluster.captions[0] in explained
    route(small_run / "bundle", "heart,book")
    short = capsys.readouterr().out
    assert len(explained.splitlines()) == len(short.splitlines()) + 4
    route(small_run / "bundle", "heart,book", template=("a {} on a box",), as_json=True)
    prompted = json.loads(capsys.readouterr().out)
    expected = mode.route(["heart", "book"], templates=["a {c} on a box"])  # the same place for the name
    np.testing.assert_allclose(prompted["weights"], expected.class_weights.mean(axis=0), atol=1e-6)


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
    colors = expert_colors(2)
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
    for color in expert_colors(2):
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


def test_what_cannot_be_asked(small_run: Path, tmp_path: Path) -> None:
    bundle = small_run / "bundle"
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ModeclipError, match="route: give either --classes"):
        route(bundle)
    with pytest.raises(ModeclipError, match=r"picture .*route\.gif: expected a file that ends in \.svg or \.png"):
        route(bundle, "a,b", picture=tmp_path / "route.gif")
    with pytest.raises(ModeclipError, match=r"there is no folder .*nowhere"):
        route(bundle, "a,b", picture=tmp_path / "nowhere" / "route.svg")
    with pytest.raises(ModeclipError, match="image does not decode"):
        route(bundle, images=(tmp_path / "text.png",))
    with pytest.raises(ModeclipError, match="max_memory: an expert takes"):
        classify(bundle, (Path(__file__).parents[2] / "docs" / "assets" / "heart.png",), "a,b", max_memory=1e-6)
    with pytest.raises(ModeclipError, match=re.escape("its clusters are of texts (encoder minilm), not of images")):
        route(bundle, images=(Path(__file__).parents[2] / "docs" / "assets" / "heart.png",))
