"""npm's package of 200 and more icon sets goes in; samples come out: the rendered icon and its name, black on white.

The package @iconify/json holds each set as one JSON file: for every icon the inner part of an SVG, and for the set its
size, variants and categories. A caption is the icon's name with spaces for - and _, without what the set itself
declares to be a variant (a weight, a style, a pixel size). The package is fetched once by npm, in a fixed version,
unless a folder with it is named.

Icons that come out blank, do not render, or repeat a pair of their own set are skipped with their cause. Drawing is
shared by processes, because the renderer holds the interpreter's lock; the order and the bytes do not depend on them.

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
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import suppress
from functools import cache, partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa

from modeclip.data.samples import Sample, Skipped, clean_captions
from modeclip.data.sources.icons import Drawing, draw, draw_many, renderer_version, usable
from modeclip.data.sources.options import DataConfig, Source, Unit, count, describe
from modeclip.errors import ModeclipError, unknown
from modeclip.system.console import log
from modeclip.system.files import writing

ICONIFY = "iconify"
PACKAGE, VERSION = "@iconify/json", "2.2.535"
EXTRA = pa.schema([("category", pa.string()), ("set_category", pa.string())])
ICONS_PER_TASK = 256
NPM_SECONDS = 1800
DEFAULT_SIDE = 16
"""Width and height of an icon where neither it nor its set says (IconifyJSON)."""


def open_iconify(config: DataConfig, task: str = "") -> Source:
    """Open the sets to train on, or the one of a task.

    Raises:
        ModeclipError: The package cannot be had, or a set is unknown or both trained on and held out.
    """
    package = find_package(config)
    known = json.loads((package / "collections.json").read_text(encoding="utf-8"))
    for name in (*config.train_sets, *config.exclude_sets, *config.tasks):
        if name not in known:
            raise unknown("icon set", name, sorted(known))
    for name in config.train_sets:
        if name in config.tasks or name in config.exclude_sets:
            raise ModeclipError(f"icon set {name!r} is in data.train_sets and held out or excluded: drop one")
    kept_out = {*config.tasks, *config.exclude_sets}
    sets = (task,) if task else config.train_sets or tuple(name for name in sorted(known) if name not in kept_out)
    state = package_state(config)
    units = tuple(
        Unit(
            name=f"{ICONIFY}:{name}@{state.partition(' ')[0]}",
            state=state,
            read=partial(read_set, package, name, known[name].get("category", ""), config),
        )
        for name in sets
    )
    what = f"{count(len(sets), 'icon set')} of {PACKAGE} {state.partition(' ')[0]}"
    return Source(kind=ICONIFY, units=units, extra=EXTRA, what=describe(what, EXTRA))


def read_set(package: Path, name: str, set_category: str, config: DataConfig) -> Iterator[Sample | Skipped]:
    """Yield the icons of one set, sorted by name.

    Args:
        package: Folder of the unpacked package.
        name: Prefix of the set.
        set_category: What collections.json calls its category.
        config: Size of the images, whether aliases count, and the number of processes.
    """
    content = json.loads((package / "json" / f"{name}.json").read_text(encoding="utf-8"))
    categories = {icon: kind for kind, icons in content.get("categories", {}).items() for icon in icons}
    others = _aliases(content) if config.aliases else {}
    variants = variant_pattern(content)
    names = sorted(icon for icon, fields in content["icons"].items() if not fields.get("hidden"))
    svgs = (assemble_svg(content, content["icons"][icon]) for icon in names)
    seen: set[bytes] = set()
    for icon, drawing in zip(names, _draw_all(svgs, config.image_size, config.workers), strict=True):
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
    """Return what a set declares to be no part of a name: its suffixes and prefixes; None where it declares none."""
    suffixes, prefixes = (
        "|".join(re.escape(part) for part in sorted(content.get(kind, {}), key=len, reverse=True) if part)
        for kind in ("suffixes", "prefixes")
    )
    parts = [f"-(?:{suffixes})$"] * bool(suffixes) + [f"^(?:{prefixes})-"] * bool(prefixes)
    return re.compile("|".join(parts)) if parts else None


def assemble_svg(content: Mapping[str, Any], icon: Mapping[str, Any]) -> str:
    """Return the whole SVG of an icon, whose place and size are its own or else those of its set."""
    defaults = {"left": 0, "top": 0, "width": DEFAULT_SIDE, "height": DEFAULT_SIDE}
    left, top, width, height = (icon.get(name, content.get(name, value)) for name, value in defaults.items())
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        f' viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )


def _aliases(content: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the further names of each icon; what is turned or mirrored is another drawing and left out."""
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
    """Draw in order; with several workers in processes, of whose work a bounded part is under way."""
    if workers == 1:
        yield from (draw(svg, image_size) for svg in svgs)
        return
    under_way: deque[Future[list[Drawing]]] = deque()
    rest = iter(svgs)
    while part := list(islice(rest, ICONS_PER_TASK)):
        under_way.append(_pool(workers).submit(draw_many, part, image_size))
        if len(under_way) > 2 * workers:
            yield from under_way.popleft().result()
    while under_way:
        yield from under_way.popleft().result()


@cache
def _pool(workers: int) -> ProcessPoolExecutor:
    """Return the processes that draw for all sets; they end with this one. They are started anew, never forked."""
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"))


# ---------------------------------------------------------------- the package


def find_package(config: DataConfig) -> Path:
    """Return the folder of the unpacked package, after fetching it with npm if need be.

    Raises:
        ModeclipError: The folder that was named is not it, or npm cannot fetch it.
    """
    named = config.source.partition(":")[2]
    folder = Path(named or _cache_folder() / f"iconify-json-{VERSION}")
    if not named and not folder.exists():
        _fetch(folder)
    if not (folder / "collections.json").is_file() or not (folder / "json").is_dir():
        raise ModeclipError(
            f"data.source {config.source!r}: {str(folder)!r} is not the unpacked npm package {PACKAGE}:"
            " expected collections.json and the folder json in it"
        )
    return folder


def package_state(config: DataConfig) -> str:
    """Return what decides the pairs of the sets: versions of package and renderer, size, and whether aliases count."""
    try:
        found = json.loads((find_package(config) / "package.json").read_text(encoding="utf-8"))["version"]
    except (OSError, ValueError, KeyError):
        found = "unknown"
    return f"{found} {renderer_version()} {config.image_size}{' aliases' if config.aliases else ''}"


def _cache_folder() -> Path:
    return Path(os.environ.get("MODECLIP_CACHE") or Path.home() / ".cache" / "modeclip")


def _fetch(folder: Path) -> None:
    """Have npm bring the package, and unpack what is needed of it; the folder appears once it is whole."""
    advice = f"bring {PACKAGE} {VERSION} in another way, unpack it and set data.source to iconify:FOLDER"
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
            raise ModeclipError(f"npm cannot bring {PACKAGE} {VERSION} ({lines[0]}); {advice}")
        with tarfile.open(archive) as tar:
            wanted = ("package/json/", "package/collections.json", "package/package.json")
            tar.extractall(place, [member for member in tar if member.name.startswith(wanted)], filter="data")
        with suppress(OSError):  # another process was quicker
            (Path(place) / "package").rename(folder)
