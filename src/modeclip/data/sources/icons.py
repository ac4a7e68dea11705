"""Icon sets that travel as Python packages: each icon is drawn, and its name is the caption.

The sets are real image-caption pairs with web-like noise (synonyms, one image under many names, one name for many
images), so that everything can be tried without a network. A caption is the icon's file name with spaces for - and _.
What a set writes only to tell variants of one icon apart (phosphor's weights, octicons' pixel sizes, every folder) is
left out of it.

Icons are drawn black on white by resvg at the size asked for, with their proportions, and centred on a white square. An
icon that comes out blank, does not render, or repeats a pair of its own set is skipped with its cause.

Price: one core; drawing dominates (docs/cost.md has the measured rate).
"""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image

from modeclip.data.samples import BLANK, DUPLICATE, EMPTY_CAPTION, UNRENDERED, Sample, Skipped
from modeclip.data.sources.captions import samples_of
from modeclip.data.sources.source import DataSource, SourceConfig, SourceKind, SourcePart, count
from modeclip.errors import ModeclipError, check_between, unknown


@dataclass(frozen=True, kw_only=True)
class IconOptions:
    """How icons are drawn, and which sets are trained on."""

    image_size: int = 32
    """Icons: side of the drawn image in pixels."""
    train_sets: tuple[str, ...] = ()
    """Icons: sets to train on. By default material, tabler, phosphor and simple; for iconify all sets that are
    neither tasks nor excluded."""

    def __post_init__(self) -> None:
        check_between("data", self, image_size=(1, 4096))


@dataclass(frozen=True, kw_only=True)
class IconSet:
    """Where the SVG files of one icon set are, and which part of their names does not belong in a caption."""

    module: str
    """Python package that carries the files."""
    distribution: str
    """What pip calls that package."""
    place: str
    """Folder of SVG files inside the package, or a zip archive of them."""
    variant: str = ""
    """Regular expression for the end of a name that only tells variants of one icon apart."""


ICON_SETS = {
    name: IconSet(module="material", distribution="mkdocs-material", place=f"templates/.icons/{name}")
    for name in ("material", "simple", "fontawesome")
} | {
    "octicons": IconSet(
        module="material",
        distribution="mkdocs-material",
        place="templates/.icons/octicons",
        variant=r"-(12|16|24|32|48|96)",
    ),
    "tabler": IconSet(module="pytablericons", distribution="pytablericons", place="icons"),
    "phosphor": IconSet(
        module="justmyresource_phosphor",
        distribution="justmyresource-phosphor",
        place="icons.zip",
        variant="-(thin|light|bold|fill|duotone)",
    ),
    "lucide": IconSet(module="justmyresource_lucide", distribution="justmyresource-lucide", place="icons.zip"),
    "heroicons": IconSet(
        module="justmyresource_heroicons",
        distribution="justmyresource-heroicons",
        place="icons.zip",
    ),
}
"""Every known set. Those that share a package differ in style, size and subject as much as the others."""

Drawing = bytes | tuple[str, str]
"""A PNG image, or why there is none: a cause and a detail."""

RENDERER = "resvg-py"
TRAIN_SETS = ("material", "tabler", "phosphor", "simple")
"""Sets that are trained on by default."""
TASK_SETS = ("lucide", "heroicons", "octicons", "fontawesome")
"""Sets that the demo holds out as zero-shot tasks."""


def package_versions() -> list[str]:
    """Return "name version" of the renderer and of each package of icons, as far as they are installed."""
    names = {icons.distribution for icons in ICON_SETS.values()} | {RENDERER}
    return [f"{name} {found}" for name in sorted(names) if (found := _version(name))]


def renderer_version() -> str:
    """Return name and version of the renderer ("" if it is not installed)."""
    return f"{RENDERER} {found}" if (found := _version(RENDERER)) else ""


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def open_icons(config: SourceConfig, task: str = "") -> DataSource:
    """Open the sets to train on, or the one of a task.

    Raises:
        ModeclipError: A set is unknown, its package is not installed, or it is both trained on and held out.
    """
    options = config.options(IconOptions)
    train_sets = options.train_sets or TRAIN_SETS
    if both := [name for name in config.tasks if name in train_sets]:
        raise ModeclipError(
            f"icon set {both[0]!r} is in data.tasks and trained on: a task is held out;"
            " take it out of data.tasks or data.train_sets"
        )
    versions, sets = package_versions(), (task,) if task else train_sets
    for name in sets:
        find_set(name)  # an unknown one is an error before any work
    parts = tuple(
        SourcePart(
            name=f"icons:{name}",
            state=f"{' '.join(versions)} {options.image_size}",
            read=partial(read_icons, [name], options.image_size),
        )
        for name in sets
    )
    return DataSource(
        kind="icons",
        parts=parts,
        extra=pa.schema([]),
        what=count(len(sets), "built-in icon set"),
        draws_images=True,
        versions=tuple(versions),
    )


def list_icons(name: str) -> list[str]:
    """Return the paths of a set's files inside the set, sorted.

    Raises:
        ModeclipError: There is no such set, or its package is not installed.
    """
    place = find_set(name)
    if place.suffix == ".zip":
        with zipfile.ZipFile(place) as archive:
            return sorted(file for file in archive.namelist() if file.endswith(".svg"))
    return sorted(path.relative_to(place).as_posix() for path in place.rglob("*.svg"))


def read_icons(names: Sequence[str], image_size: int) -> Iterator[Sample | Skipped]:
    """Yield the icons of several sets, one set after the other, as PNG images with their names as captions.

    Args:
        names: Names of sets, each a key of ``ICON_SETS``.
        image_size: Side of the images in pixels.

    Raises:
        ModeclipError: A set is unknown, or its package or the renderer is not installed.
    """
    for name in names:
        seen: set[bytes] = set()
        for file, svg in _read_set(name):
            key = f"{name}/{file.removesuffix('.svg')}"
            captions = [caption] if (caption := icon_caption(name, file)) else []
            yield from usable(draw(svg, image_size), key, captions, seen, group=name)


def draw(svg: str, image_size: int) -> Drawing:
    """Return an icon as a PNG image, or why it cannot be used."""
    try:
        image = render(svg, image_size)
    except ValueError as error:
        return UNRENDERED, str(error)
    if image.convert("L").getextrema() == (255, 255):
        return BLANK, "every pixel is white"
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    return encoded.getvalue()


def draw_many(svgs: Sequence[str], image_size: int) -> list[Drawing]:
    """Return several icons as ``draw`` does."""
    return [draw(svg, image_size) for svg in svgs]


def usable(
    drawing: Drawing, key: str, captions: Sequence[str], seen: set[bytes], **where: Any
) -> Iterator[Sample | Skipped]:
    """Yield a sample for each caption of an icon, except for pairs that its set has already.

    Args:
        drawing: What ``draw`` returned.
        key: Key of the icon.
        captions: Its captions.
        seen: Hashes of the set's pairs so far; those of this icon are added.
        where: The other fields of the samples.
    """
    if isinstance(drawing, tuple):
        yield Skipped(key, *drawing)
        return
    if not captions:
        yield Skipped(key, EMPTY_CAPTION, "its name has no words")
    new = []
    for caption in captions:
        pair = hashlib.blake2b(caption.encode() + b"\0" + drawing).digest()
        if pair in seen:
            yield Skipped(key, DUPLICATE, f"caption {caption!r}")
        else:
            seen.add(pair)
            new.append(caption)
    yield from samples_of(new, key, image=drawing, **where)


def icon_caption(name: str, file: str) -> str:
    """Return the caption of the icon in ``file`` of the set ``name``.

    Examples:
        >>> icon_caption("phosphor", "bold/arrow-left-bold.svg"), icon_caption("simple", "dot_net.svg")
        ('arrow left', 'dot net')
    """
    stem = Path(file).stem
    if ICON_SETS[name].variant:
        stem = re.sub(f"{ICON_SETS[name].variant}$", "", stem)
    return " ".join(re.split(r"[-_\s]+", stem)).strip()


def render(svg: str, image_size: int) -> Image.Image:
    """Draw an SVG centred on a white square, in its own colours, or in black if it names none.

    Raises:
        ValueError: The renderer rejects the file.
    """
    import resvg_py

    data = resvg_py.svg_to_bytes(
        svg_string=svg,
        width=image_size,
        height=image_size,
        background="white",
        skip_system_fonts=True,
    )
    drawing = Image.open(io.BytesIO(bytes(data))).convert("RGB")
    square = Image.new("RGB", (image_size, image_size), "white")
    left, top = ((image_size - side) // 2 for side in drawing.size)
    square.paste(drawing, (left, top))
    return square


def _read_set(name: str) -> Iterator[tuple[str, str]]:
    """Yield (path inside the set, SVG text), sorted by path."""
    place, files = find_set(name), list_icons(name)
    if find_spec("resvg_py") is None:
        raise _not_installed(name, RENDERER)
    if place.suffix == ".zip":
        with zipfile.ZipFile(place) as archive:
            for file in files:
                yield file, archive.read(file).decode()
    else:
        for file in files:
            yield file, (place / file).read_text(encoding="utf-8")


def find_set(name: str) -> Path:
    """Return the folder or zip archive with the files of a set.

    Raises:
        ModeclipError: There is no such set, or its package is not installed.
    """
    if name not in ICON_SETS:
        raise unknown("icon set", name, sorted(ICON_SETS))
    icons = ICON_SETS[name]
    spec = find_spec(icons.module)
    if spec is None or not spec.submodule_search_locations:
        raise _not_installed(name, icons.distribution)
    place = Path(spec.submodule_search_locations[0]) / icons.place
    if not place.exists():
        raise ModeclipError(
            f"icon set {name!r}: {icons.distribution} has no {icons.place}: another version is"
            ' expected; pip install --upgrade "modeclip[demo]"'
        )
    return place


def _not_installed(name: str, distribution: str) -> ModeclipError:
    return ModeclipError(
        f'icon set {name!r} needs the package {distribution}, which is not installed: pip install "modeclip[demo]"'
    )


ICONS = SourceKind(name="icons", expected="the word icons", open=open_icons, word="icons", open_task=open_icons)
