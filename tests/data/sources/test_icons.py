"""Every icon set that is named is there, and comes as black drawings on white with its names as captions."""

from __future__ import annotations

import importlib.util
import io
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from modeclip.data.images import decode_image
from modeclip.data.samples import BLANK, DUPLICATE, EMPTY_CAPTION, UNRENDERED, Sample, Skipped
from modeclip.data.sources import icons
from modeclip.data.sources.icons import (
    ICON_SETS,
    TASK_SETS,
    TRAIN_SETS,
    draw,
    icon_caption,
    list_icons,
    read_icons,
    render,
    usable,
)
from modeclip.errors import ModeclipError


@pytest.fixture(scope="module")
def octicons() -> list[Sample | Skipped]:
    return list(read_icons(["octicons"], 32))


def test_the_demo_trains_on_sets_that_it_does_not_hold_out():
    assert sorted(TRAIN_SETS + TASK_SETS) == sorted(ICON_SETS)
    assert sum(len(list_icons(name)) for name in TRAIN_SETS) > 20_000


@pytest.mark.parametrize("name", sorted(ICON_SETS))
def test_icons_are_black_drawings_on_white(name):
    for sample in islice(read_icons([name], 32), 12):
        image = Image.open(io.BytesIO(sample.image))
        pixels = np.asarray(image).astype(int)
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (32, 32))
        assert np.ptp(pixels, axis=2).max() == 0  # no colours
        assert pixels.min() < 128  # something is dark
        assert pixels.max() == 255
        assert sample.group == name
        assert sample.caption == icon_caption(name, f"{sample.key}.svg")


def test_each_pair_of_a_set_is_there_once(octicons):
    samples = [item for item in octicons if isinstance(item, Sample)]
    pairs = {(sample.caption, decode_image(sample.image).tobytes()) for sample in samples}
    assert len(pairs) == len(samples)
    assert {item.cause for item in octicons if isinstance(item, Skipped)} == {DUPLICATE}
    assert len(octicons) == len(list_icons("octicons"))


def test_rendering_is_repeatable_and_takes_any_size(octicons):
    assert list(read_icons(["octicons"], 32)) == octicons
    first = next(read_icons(["octicons"], 57))
    assert decode_image(first.image).size == (57, 57)


@pytest.mark.parametrize(
    ("name", "file", "caption"),
    [
        ("phosphor", "bold/arrow-left-bold.svg", "arrow left"),
        ("phosphor", "regular/text-b.svg", "text b"),
        ("octicons", "bell-fill-24.svg", "bell fill"),
        ("heroicons", "24/outline/academic-cap.svg", "academic cap"),
        ("tabler", "filled/number-24.svg", "number 24"),
        ("material", "account-outline.svg", "account outline"),
    ],
)
def test_a_caption_leaves_out_only_what_tells_variants_apart(name, file, caption):
    assert icon_caption(name, file) == caption


def test_proportions_are_kept_and_the_drawing_is_centred():
    wide = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 4 2"><path d="M0 0h4v2H0z"/></svg>'
    dark = np.asarray(render(wide, 32))[:, :, 0] < 128
    assert np.flatnonzero(dark.any(axis=1)).tolist() == list(range(8, 24))
    assert dark[8:24].all()


def test_icons_that_cannot_be_used_are_skipped_by_cause(monkeypatch: pytest.MonkeyPatch):
    shape = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 4 4">{}</svg>'
    square = shape.format('<path d="M0 0h2v2H0z"/>')
    files = {
        "a": square,
        "bold/a": square,  # in octicons a folder is no part of a name
        "b": square,  # the same pixels under another name are noise as the web has it, and stay
        "c": shape.format(""),
        "d": "<svg",
    }
    monkeypatch.setattr(icons, "_read_set", lambda _: ((f"{file}.svg", svg) for file, svg in files.items()))
    items = {item.key: getattr(item, "cause", "kept") for item in read_icons(["octicons"], 32)}
    assert items == {
        "octicons/a": "kept",
        "octicons/bold/a": DUPLICATE,
        "octicons/b": "kept",
        "octicons/c": BLANK,
        "octicons/d": UNRENDERED,
    }


def test_an_icon_with_several_names_is_several_pairs_but_each_only_once():
    drawing = draw('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 4 4"><path d="M0 0h2v2H0z"/></svg>', 8)
    seen: set[bytes] = set()
    first = [(i.key, i.caption) for i in usable(drawing, "s/a", ["one", "two"], seen)]
    again, new = usable(drawing, "s/b", ["two", "three"], seen)
    assert first == [("s/a", "one"), ("s/a#1", "two")]
    assert (again.cause, new.key, new.caption) == (DUPLICATE, "s/b", "three")
    assert [i.cause for i in usable(drawing, "s/-", [], seen)] == [EMPTY_CAPTION]


def test_an_unknown_set_lists_the_known_ones():
    with pytest.raises(ModeclipError, match=f"'octicon'; known: {', '.join(sorted(ICON_SETS))}"):
        list(read_icons(["octicon"], 32))


@pytest.mark.parametrize(("module", "package"), [("pytablericons", "pytablericons"), ("resvg_py", "resvg-py")])
def test_a_missing_package_says_which_extra_brings_it(monkeypatch: pytest.MonkeyPatch, module, package):
    found = importlib.util.find_spec
    monkeypatch.setattr(icons, "find_spec", lambda name: None if name == module else found(name))
    with pytest.raises(ModeclipError, match=rf"'tabler' needs the package {package}.*modeclip\[demo\]"):
        next(read_icons(["tabler"], 32))


def test_versions_of_all_packages_are_told_apart(monkeypatch: pytest.MonkeyPatch):
    versions = icons.package_versions()
    assert [line.split()[0] for line in versions] == [
        "justmyresource-heroicons",
        "justmyresource-lucide",
        "justmyresource-phosphor",
        "mkdocs-material",
        "pytablericons",
        "resvg-py",
    ]
    monkeypatch.setattr(icons, "RENDERER", "no-such-package")
    assert icons.package_versions() == versions[:-1]
