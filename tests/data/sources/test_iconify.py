"""Iconify's package becomes pairs, whoever draws them; what it is fetched by may fail in one line."""

from __future__ import annotations

import json
import os
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from modeclip.data.images import decode_image
from modeclip.data.samples import BLANK, DUPLICATE, EMPTY_CAPTION, UNRENDERED, Sample
from modeclip.data.sources import DataConfig, open_source, open_task, source_state
from modeclip.data.sources.iconify import VERSION, assemble_svg, find_package, iconify_caption, variant_pattern
from modeclip.data.sources.icons import render
from modeclip.errors import ModeclipError
from modeclip.pipeline.recipe import load_recipe

SQUARE = '<path d="M0 0h8v8H0z"/>'
SETS = {
    "round": {
        "prefix": "round",
        "icons": {
            "arrow-left": {"body": SQUARE},
            "arrow-left-bold": {"body": '<path d="M0 0h16v8H0z"/>'},
            "copy-bold": {"body": SQUARE},
            "copy": {"body": SQUARE},
            "gone": {"body": SQUARE, "hidden": True},
            "nothing": {"body": ""},
            "wrong": {"body": "<g"},
            "_": {"body": SQUARE},
        },
        "aliases": {
            "back": {"parent": "arrow-left"},
            "return": {"parent": "back"},
            "arrow-right": {"parent": "arrow-left", "hFlip": True},
            "secret": {"parent": "arrow-left", "hidden": True},
            "ring-1": {"parent": "ring-2"},
            "ring-2": {"parent": "ring-1"},
        },
        "suffixes": {"": "Regular", "bold": "Bold"},
        "categories": {"Arrows": ["arrow-left", "arrow-left-bold"]},
        "width": 16,
        "height": 16,
    },
    "wide": {
        "prefix": "wide",
        "icons": {f"icon_{n}": {"body": f'<path d="M0 0h{n}v{n}H0z"/>'} for n in range(1, 31)},
        "width": 60,
        "height": 30,
    },
    "other": {"prefix": "other", "icons": {"star": {"body": SQUARE}}},
}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "package"
    (folder / "json").mkdir(parents=True)
    for name, content in SETS.items():
        (folder / "json" / f"{name}.json").write_text(json.dumps(content))
    collections = {"round": {"category": "UI 16px"}, "wide": {"category": "Flags"}, "other": {}}
    (folder / "collections.json").write_text(json.dumps(collections))
    (folder / "package.json").write_text(json.dumps({"version": "2.2.1"}))
    return folder


def state_of(config: DataConfig) -> list[str]:
    return source_state(config, open_source(config))


def config_of(package: Path, **options: object) -> DataConfig:
    return DataConfig.from_flat({"source": f"iconify:{package}", **options})


def test_each_set_is_a_part_with_the_categories_of_its_icons(package: Path):
    source = open_source(config_of(package, exclude_sets=("other",)))
    assert (source.kind, source.what) == ("iconify", "2 icon sets of @iconify/json 2.2.1 with 2 further columns")
    assert [part.name for part in source.parts] == ["iconify:round@2.2.1", "iconify:wide@2.2.1"]
    items = list(source.parts[0].read())
    assert {item.key: getattr(item, "cause", None) or item.caption for item in items} == {
        "round/_": EMPTY_CAPTION,
        "round/arrow-left": "arrow left",
        "round/arrow-left-bold": "arrow left",
        "round/copy": "copy",
        "round/copy-bold": DUPLICATE,
        "round/nothing": BLANK,
        "round/wrong": UNRENDERED,
    }
    samples = [item for item in items if isinstance(item, Sample)]
    assert [s.extra["category"] for s in samples] == ["Arrows", "Arrows", ""]
    assert {s.extra["set_category"] for s in samples} == {"UI 16px"}
    assert {s.group for s in samples} == {"round"}
    assert decode_image(samples[0].image).size == (32, 32)


def test_aliases_are_further_captions_where_that_is_asked_for(package: Path):
    (part,) = open_source(config_of(package, train_sets=("round",), aliases=True)).parts
    captions = {item.key: item.caption for item in part.read() if isinstance(item, Sample)}
    assert [captions[f"round/arrow-left{end}"] for end in ("", "#1", "#2")] == ["arrow left", "back", "return"]
    assert len(captions) == 5  # what is mirrored, hidden or refers to itself is no further name


def test_processes_draw_the_same_in_the_same_order(package: Path):
    def read(workers: int) -> list[object]:
        parts = open_source(config_of(package, workers=workers, image_size=24)).parts
        return [item for part in parts for item in part.read()]

    assert read(1) == read(2)
    assert sum(isinstance(item, Sample) for item in read(1)) == 34


def test_an_icon_lies_where_it_or_its_set_says():
    body = '<path d="M10 10h4v4h-4z"/>'
    dark = (
        np.asarray(render(assemble_svg({"left": 9, "top": 9, "width": 8, "height": 8}, {"body": body}), 8))[..., 0]
        < 128
    )
    assert dark.sum() == 16
    assert dark[1:5, 1:5].all()
    own = {"body": body, "left": 10, "top": 10, "width": 4, "height": 4}
    assert (np.asarray(render(assemble_svg({"width": 8, "height": 8}, own), 8)) == 0).all()
    assert 'viewBox="0 0 16 16"' in assemble_svg({}, {"body": body})


@pytest.mark.parametrize(
    ("icon", "content", "caption"),
    [
        ("outline-rounded-home-outline-rounded", {"suffixes": ["outline", "outline-rounded"]}, "outline rounded home"),
        ("sharp-home", {"prefixes": ["sharp", "round"]}, "home"),
        ("sharp", {"prefixes": ["sharp"], "suffixes": {"sharp": ""}}, "sharp"),
        ("home_2-16-solid", {"suffixes": {"": "", "16-solid": "", "solid": ""}}, "home 2"),
        ("home-bold", {}, "home bold"),
    ],
)
def test_a_caption_leaves_out_only_what_its_set_declares(icon, content, caption):
    assert iconify_caption(icon, variant_pattern(content)) == caption


def test_tasks_and_excluded_sets_are_not_trained_on(package: Path):
    config = config_of(package, tasks=("wide",), exclude_sets=("other",))
    assert [part.name for part in open_source(config).parts] == ["iconify:round@2.2.1"]
    (part,) = open_task(config, "wide").parts
    assert [item.caption for item in part.read()][:2] == ["icon 1", "icon 10"]
    with pytest.raises(ModeclipError, match=r"'wide'.*data\.train_sets.*held out.*drop one"):
        open_source(config_of(package, train_sets=("wide",), tasks=("wide",)))
    with pytest.raises(ModeclipError, match="unknown icon set 'rund'; known: other, round, wide"):
        open_source(config_of(package, exclude_sets=("rund",)))


def test_the_state_tells_versions_sizes_and_aliases_apart(package: Path):
    states = [
        state_of(config_of(package)),
        state_of(config_of(package, image_size=64)),
        state_of(config_of(package, aliases=True)),
    ]
    (package / "package.json").write_text(json.dumps({"version": "2.2.2"}))
    states.append(state_of(config_of(package)))
    assert len({tuple(state) for state in states}) == 4
    assert state_of(config_of(package, workers=2)) == states[3]


def test_the_recipe_of_the_large_corpus_holds_out_whole_sets():
    data = load_recipe(Path(__file__).parents[3] / "runs" / "icons.yaml").data
    assert (data.source, data.icons.image_size) == ("iconify", 32)
    assert len(set(data.tasks)) == len(data.tasks) >= 25
    assert not set(data.tasks) & set(data.iconify.exclude_sets)


# ---------------------------------------------------------------- npm


def fake_npm(folder: Path, script: str) -> None:
    """Put a program that behaves as npm does in a folder."""
    folder.mkdir()
    program = folder / "npm"
    program.write_text(f"#!{sys.executable}\n{script}")
    program.chmod(0o755)


def test_the_package_is_fetched_once_and_whole(tmp_path: Path, package: Path, monkeypatch: pytest.MonkeyPatch):
    (package / "dist").mkdir()
    (package / "dist" / "large").write_bytes(b"not needed")
    archive = tmp_path / "archive.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(package, "package")
    script = (
        "import sys, shutil, pathlib\n"
        f"assert sys.argv[1:] == ['pack', '@iconify/json@{VERSION}', '--silent'], sys.argv\n"
        f"pathlib.Path({str(tmp_path / 'calls')!r}).open('a').write('x')\n"
        f"shutil.copy({str(archive)!r}, 'iconify-json.tgz')\n"
    )
    fake_npm(tmp_path / "bin", script)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("MODECLIP_CACHE", str(tmp_path / "cache"))
    for _ in range(2):
        source = open_source(DataConfig.from_flat({"source": "iconify", "train_sets": ("other",)}))
        assert [item.caption for item in source.parts[0].read()] == ["star"]
    assert (tmp_path / "calls").read_text() == "x"
    found = find_package("iconify")
    assert found == tmp_path / "cache" / f"iconify-json-{VERSION}"
    assert sorted(os.listdir(found)) == ["collections.json", "json", "package.json"]  # noqa: PTH208
    assert [path.name for path in found.parent.iterdir()] == [found.name]


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            "import sys; sys.exit('npm error network\\nnpm error more')",
            r"npm cannot fetch .*\(npm error network\)",
        ),
        ("", r"npm cannot fetch .*\(no file came\)"),
        (None, "npm, which is not installed: install"),
    ],
)
def test_npm_that_fails_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script, message):
    if script is not None:
        fake_npm(tmp_path / "bin", script)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("MODECLIP_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ModeclipError, match=f"{message}.*unpack it and set data.source") as caught:
        open_source(DataConfig(source="iconify"))
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").glob("*"))


def test_a_folder_that_is_not_the_package_says_so(tmp_path: Path):
    with pytest.raises(ModeclipError, match=r"not the unpacked .*@iconify/json.*collections\.json"):
        open_source(config_of(tmp_path))
