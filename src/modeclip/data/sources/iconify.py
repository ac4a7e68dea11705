"""The npm package @iconify/json, more than 200 icon sets: each icon is drawn, and its name is the caption.

The package holds each set as one JSON file: for every icon the inner part of an SVG, and for the set its size, variants
and categories. A caption is the icon's name with spaces for - and _, without what the set itself declares to be a
variant (a weight, a style, a pixel size). npm fetches the package once, in a fixed version, unless the user names a
folder that has it.

An icon that comes out blank, does not render, or repeats a pair of its own set is skipped with its cause. Processes
share the drawing, because the renderer holds the interpreter's lock; the order and the bytes do not depend on them.

Source: Iconify documentation, "IconifyJSON".

Price: drawing dominates; docs/scale.md has the measured rate.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa

from modeclip.data.images import map_in_order
from modeclip.data.samples import Sample, Skipped
from modeclip.data.sources.captions import clean_captions
from modeclip.data.sources.icons import Drawing, IconOptions, draw, draw_many, renderer_version, usable
from modeclip.data.sources.source import DataSource, SourceConfig, SourceKind, SourcePart, count, describe
from modeclip.errors import ModeclipError, check_between, unknown
from modeclip.system.console import log
from modeclip.system.files import writing

PACKAGE, VERSION = "@iconify/json", "2.2.535"
EXTRA = pa.schema([("category", pa.string()), ("set_category", pa.string())])
ICONS_PER_TASK = 256
NPM_SECONDS = 1800
DEFAULT_SIDE = 16
"""Width and height of an icon where neither it nor its set says (IconifyJSON)."""


@dataclass(frozen=True, kw_only=True)
class IconifyOptions:
    """What is read of iconify's sets, and by how many processes."""

    exclude_sets: tuple[str, ...] = ()
    """iconify: sets that are not trained on, such as other versions of those in `tasks`."""
    aliases: bool = False
    """iconify: use the further names of an icon as further captions of its image."""
    workers: int = 1
    """iconify: processes that draw; the images do not depend on their number."""

    def __post_init__(self) -> None:
        check_between("data", self, workers=(1, 4096))


def open_iconify(config: SourceConfig, task: str = "") -> DataSource:
    """Open the sets to train on, or the one of a task.

    Raises:
        ModeclipError: The package cannot be fetched, a set is unknown, or a set is both trained on and held out.
    """
    icons, own = config.options(IconOptions), config.options(IconifyOptions)
    package = find_package(config.source)
    known = json.loads((package / "collections.json").read_text(encoding="utf-8"))
    for name in (*icons.train_sets, *own.exclude_sets, *config.tasks):
        if name not in known:
            raise unknown("icon set", name, sorted(known))
    kept_out = {*config.tasks, *own.exclude_sets}
    for name in icons.train_sets:
        if name in kept_out:
            raise ModeclipError(f"icon set {name!r} is in data.train_sets and held out or excluded: drop one")
    sets = (task,) if task else icons.train_sets or tuple(name for name in sorted(known) if name not in kept_out)
    state = _package_state(package, icons.image_size, own.aliases)
    package_version = state.partition(" ")[0]
    parts = tuple(
        SourcePart(
            name=f"{ICONIFY.name}:{name}@{package_version}",
            state=state,
            read=partial(read_set, package, name, known[name].get("category", ""), icons.image_size, own),
        )
        for name in sets
    )
    what = describe(f"{count(len(sets), 'icon set')} of {PACKAGE} {package_version}", EXTRA)
    return DataSource(kind=ICONIFY.name, parts=parts, extra=EXTRA, what=what, draws_images=True, versions=(state,))


def read_set(
    package: Path, name: str, set_category: str, image_size: int, options: IconifyOptions
) -> Iterator[Sample | Skipped]:
    """Yield the icons of one set, sorted by name.

    Args:
        package: Folder of the unpacked package.
        name: Prefix of the set.
        set_category: Category of the set in collections.json.
        image_size: Side of the images in pixels.
        options: Whether aliases count, and the number of processes.
    """
    content = json.loads((package / "json" / f"{name}.json").read_text(encoding="utf-8"))
    categories = {icon: kind for kind, icons in content.get("categories", {}).items() for icon in icons}
    others = _aliases(content) if options.aliases else {}
    variants = variant_pattern(content)
    names = sorted(icon for icon, fields in content["icons"].items() if not fields.get("hidden"))
    svgs = (assemble_svg(content, content["icons"][icon]) for icon in names)
    seen: set[bytes] = set()
    for icon, drawing in zip(names, _draw_all(svgs, image_size, options.workers), strict=True):
        captions = clean_captions(iconify_caption(other, variants) for other in (icon, *others.get(icon, ())))
        extra = {"category": categories.get(icon, ""), "set_category": set_category}
        yield from usable(drawing, f"{name}/{icon}", captions, seen, group=name, extra=extra)


def iconify_caption(icon: str, variants: re.Pattern[str] | None) -> str:
    """Return the caption of an icon.

    Examples:
        >>> iconify_caption("arrow-left-bold", variant_pattern({"suffixes": {"": "Regular", "bold": "Bold"}}))
        'arrow left'
    """
    stem = variants.sub("", icon) if variants else icon
    return " ".join(re.split(r"[-_\s]+", stem)).strip()


def variant_pattern(content: Mapping[str, Any]) -> re.Pattern[str] | None:
    """Return a pattern of the suffixes and prefixes that a set declares to be variants; None if it declares none."""
    suffixes, prefixes = (
        "|".join(re.escape(part) for part in sorted(content.get(kind, {}), key=len, reverse=True) if part)
        for kind in ("suffixes", "prefixes")
    )
    parts = [f"-(?:{suffixes})$"] * bool(suffixes) + [f"^(?:{prefixes})-"] * bool(prefixes)
    return re.compile("|".join(parts)) if parts else None


def assemble_svg(content: Mapping[str, Any], icon: Mapping[str, Any]) -> str:
    """Return the whole SVG of an icon; a place or size that the icon lacks is that of its set."""
    defaults = {"left": 0, "top": 0, "width": DEFAULT_SIDE, "height": DEFAULT_SIDE}
    left, top, width, height = (icon.get(name, content.get(name, value)) for name, value in defaults.items())
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        f' viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )


def _aliases(content: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the further names of each icon, except those of a turned or mirrored drawing."""
    aliases, found = content.get("aliases", {}), dict[str, list[str]]()
    for name in sorted(aliases):
        parent, steps = name, 0
        while parent in aliases and aliases[parent].keys() <= {"parent"} and steps <= len(aliases):
            parent, steps = aliases[parent]["parent"], steps + 1
        if parent in content["icons"]:
            found.setdefault(parent, []).append(name)
    return found


# ---------------------------------------------------------------- drawing


def _draw_all(svgs: Iterable[str], image_size: int, workers: int) -> Iterator[Drawing]:
    """Draw icons in order, in this process or in several."""
    if workers == 1:
        yield from (draw(svg, image_size) for svg in svgs)
        return
    rest = iter(svgs)
    parts = iter(lambda: list(islice(rest, ICONS_PER_TASK)), [])
    work = partial(draw_many, image_size=image_size)
    for drawings in map_in_order(_pool(workers), work, parts, 2 * workers):
        yield from drawings


@cache
def _pool(workers: int) -> ProcessPoolExecutor:
    """Return the processes that draw all sets. They are spawned, never forked, and end with this process."""
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"))


# ---------------------------------------------------------------- the package


def find_package(source: str) -> Path:
    """Return the folder of the unpacked package that a source names, and fetch the package with npm if it names none.

    Raises:
        ModeclipError: The named folder is not the package, or npm cannot fetch it.
    """
    named = source.partition(":")[2]
    folder = Path(named or _cache_folder() / f"iconify-json-{VERSION}")
    if not named and not folder.exists():
        _fetch(folder)
    if not (folder / "collections.json").is_file() or not (folder / "json").is_dir():
        raise ModeclipError(
            f"data.source {source!r}: {str(folder)!r} is not the unpacked npm package {PACKAGE}:"
            " expected collections.json and the folder json in it"
        )
    return folder


def _package_state(package: Path, image_size: int, aliases: bool) -> str:
    """Return what decides the pairs of the sets: versions of package and renderer, size, and whether aliases count."""
    try:
        found = json.loads((package / "package.json").read_text(encoding="utf-8"))["version"]
    except (OSError, ValueError, KeyError):
        found = "unknown"
    return f"{found} {renderer_version()} {image_size}{' aliases' if aliases else ''}"


def _cache_folder() -> Path:
    return Path(os.environ.get("MODECLIP_CACHE") or Path.home() / ".cache" / "modeclip")


def _fetch(folder: Path) -> None:
    """Fetch the package with npm and unpack what is needed of it; the folder appears once it is whole."""
    advice = f"fetch {PACKAGE} {VERSION} in another way, unpack it and set data.source to iconify:FOLDER"
    npm = shutil.which("npm")
    if npm is None:
        raise ModeclipError(
            f"data.source 'iconify' is fetched by npm, which is not installed: install Node.js, or {advice}"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    log(f"fetching {PACKAGE} {VERSION} with npm into {folder}")
    with writing(folder), tempfile.TemporaryDirectory(dir=folder.parent, prefix=".iconify-") as place:
        command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--silent"]
        try:
            done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=NPM_SECONDS, check=False)
            problem = done.stderr if done.returncode else ""
        except subprocess.TimeoutExpired:
            problem = f"no answer in {NPM_SECONDS} seconds"
        archive = next(Path(place).glob("*.tgz"), None)
        if problem or archive is None:
            lines = [line.strip() for line in problem.splitlines() if line.strip()] or ["no file came"]
            raise ModeclipError(f"npm cannot fetch {PACKAGE} {VERSION} ({lines[0]}); {advice}")
        with tarfile.open(archive) as tar:
            wanted = ("package/json/", "package/collections.json", "package/package.json")
            options: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # from Python 3.11.4 on
            tar.extractall(place, [member for member in tar if member.name.startswith(wanted)], **options)
        with suppress(OSError):  # another process was quicker
            (Path(place) / "package").rename(folder)


ICONIFY = SourceKind(
    name="iconify",
    expected="the word iconify",
    open=open_iconify,
    word="iconify",
    takes_folder=True,
    open_task=open_iconify,
)
