"""What ``mode.json`` may say: one schema for everything that a bundle states about itself.

Whoever makes a bundle makes its hashes too, so hashes show damage and no intent. Therefore a manifest can name only
files of settings, text and safetensors that lie in the bundle, and each with its hash; what lies beside them in the
folder of a model is refused. A field that is missing, unknown or of another type is an error that names it, and so are
fields that occur twice, NaN, deep nesting, and control characters in anything that is printed.

Source: the format is ours; pydantic checks types.
Price: milliseconds, and a look at the names of the files.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, NoReturn

from modeclip.data.prompts import check_templates
from modeclip.errors import ModeclipError, unknown
from modeclip.mixture.rules import RULES
from modeclip.models.clip import CONFIG_FILE
from modeclip.models.deltas import DELTA_FILE, SEED_FOLDER, WEIGHTS_FILE

FORMAT_VERSION = 4
DELTAS_SINCE = 4
"""First format whose experts may be stored as what differs from the seed."""
MANIFEST_FILE = "mode.json"
CENTRES_FILE = "centres.safetensors"
CLUSTERS_FILE = "clusters.json"
SEED = SEED_FOLDER
"""Folder of the seed in a bundle; it stands in for every expert that is missing."""
FITTED, ENCODER_FOLDER = "tfidf:", "encoder"
"""Start of the name of an encoder that was fitted to the captions, and the folder of a bundle that carries it."""
SUFFIXES = (".json", ".safetensors", ".txt")
"""Ends of the names of a bundle's files: settings and text, and weights that hold nothing but numbers."""
MAX_BYTES = 1 << 26
"""Largest ``mode.json`` that is read; one of a thousand experts has a hundredth of that."""
MAX_DEPTH = 32
"""Deepest nesting of a manifest; ours have 6."""
LARGEST = 10**15
"""Largest number that can be meant: pairs, samples."""
_AGAIN = "get the bundle again"
_STRICT = {"extra": "forbid", "strict": True}
_HASH = re.compile(r"[0-9a-f]{64}")
_DIRECTIONS = {*map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A))}
"""Characters that turn the direction of text, so that a name reads as another."""


def split_expert(spec: str) -> tuple[str, str]:
    """Return the bundle and the expert of ``BUNDLE#expert-1``, "" where none is named.

    A folder that exists under the whole name has a ``#`` in its own.

    Examples:
        >>> split_expert("runs/#1/bundle#expert-1"), split_expert("ViT-B-32@openai")
        (('runs/#1/bundle', 'expert-1'), ('ViT-B-32@openai', ''))
    """
    if "#" not in spec or Path(spec.removeprefix("local-dir:")).exists():
        return spec, ""
    place, _, member = spec.rpartition("#")
    return place, member


@dataclass(frozen=True, kw_only=True)
class Expert:
    """One data expert as the manifest lists it."""

    __pydantic_config__: ClassVar[Any] = _STRICT

    name: str
    """Its name: ``expert-0``, ``expert-1``..., or ``expert-pets`` if it was trained for class names."""
    folder: str
    """Folder of the model that runs for it in the bundle: its own, or ``seed`` while it is missing."""
    size: int
    """Number of pairs in its cluster."""
    keywords: tuple[str, ...] = ()
    """Words that its captions use more often than those of the other experts."""

    def __post_init__(self) -> None:
        """Check that the name is one, the folder lies in the bundle, and the size can be meant."""
        if not re.fullmatch(r"expert-\w+", self.name):
            raise ModeclipError(f"expected an expert's name, such as expert-0, got {_shown(self.name)}")
        check_place(self.folder)
        if "/" in self.folder:
            raise ModeclipError(f"folder: expected a folder of the bundle, such as expert-0, got {_shown(self.folder)}")
        check_count("size", self.size)


@dataclass(frozen=True, kw_only=True)
class Files:
    """Names of the files that are not models."""

    __pydantic_config__: ClassVar[Any] = _STRICT

    centres: str = CENTRES_FILE
    """Centres of the fine clusters."""
    clusters: str = CLUSTERS_FILE
    """Their cards."""

    def __post_init__(self) -> None:
        """Check that they lie in the bundle."""
        for name, end in ((self.centres, ".safetensors"), (self.clusters, ".json")):
            check_place(name)
            if not name.endswith(end):
                raise ModeclipError(f"files: expected a file {end}, got {_shown(name)}")


@dataclass(frozen=True, kw_only=True)
class Edit:
    """What was added or replaced in a bundle since it was made."""

    __pydantic_config__: ClassVar[Any] = {"extra": "allow", "strict": True}  # a note may say more

    action: str
    """``add``, ``replace`` or ``fill in``."""
    expert: str
    """Name of the expert."""
    date: str
    """When, in UTC."""
    clustering: str
    """Hash of the clusters at that time."""
    forced: bool
    """Whether the origin of the model was not looked at."""
    job: str | None
    """Digest of the job that made the model; None: unknown."""
    modeclip: str = ""
    """Version that made the edit."""
    start: str = ""
    """Digest of what that job continued."""
    catalog_fingerprint: str = ""
    """What its training data are known by."""
    catalog: str = "an unnamed catalog"
    """Name of its training data."""
    pairs: int = 0
    """Its pairs."""
    samples: int = 0
    """Its samples."""

    def __post_init__(self) -> None:
        """Check that the numbers can be meant."""
        check_count("pairs", self.pairs)
        check_count("samples", self.samples)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings that a bundle was made with; those of other versions may be there too."""

    __pydantic_config__: ClassVar[Any] = {"extra": "allow", "strict": True}

    name: str = ""
    """Of the run."""
    train: dict[str, Any] | None = None
    """How each model was trained."""
    experts: dict[str, Any] | None = None
    """Which models there are."""
    selection: dict[str, Any] | None = None
    """The pairs that were selected; None: all."""


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """Where a bundle comes from."""

    __pydantic_config__: ClassVar[Any] = _STRICT

    catalog_fingerprint: str = ""
    """What the training data are known by."""
    jobs: dict[str, str] = field(default_factory=dict)
    """Digest of the job of each model."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of the packages that made it."""
    stages: dict[str, str] = field(default_factory=dict)
    """Digests of the stages of its run."""
    recipe: Recipe | None = None
    """Settings of its run."""
    edits: tuple[Edit, ...] = ()
    """What was added or replaced since, oldest first."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of ``mode.json``."""

    __pydantic_config__: ClassVar[Any] = _STRICT

    format_version: int
    """Version of the format."""
    encoder: str
    """Encoder of captions, class names and centres."""
    rule: str
    """Routing rule."""
    temperature: float
    """Temperature of that rule."""
    templates: tuple[str, ...]
    """Prompts with ``{}`` where the class name goes."""
    experts: tuple[Expert, ...]
    """The K experts, by index."""
    sha256: dict[str, str]
    """Hash of each file of the bundle, by its place."""
    lineage: Lineage
    """Where it comes from."""
    name: str = ""
    """Name of its run."""
    files: Files = field(default_factory=Files)
    """Names of the files that are not models; format 1 has only the usual ones."""
    class_experts: tuple[Expert, ...] = ()
    """Experts that were trained for class names, beside those of the clusters; chosen by their name."""

    def __post_init__(self) -> None:
        """Check what concerns several fields, or the range of one."""
        if self.rule not in RULES:
            raise unknown("rule", self.rule, RULES)
        if not 0 < self.temperature < math.inf:
            raise ModeclipError(f"temperature: expected a finite number above 0, got {self.temperature}")
        if not self.encoder:
            raise ModeclipError("encoder: expected a name, got none")
        if self.encoder.startswith(FITTED) and self.encoder != FITTED + ENCODER_FOLDER:
            raise ModeclipError(
                f"encoder: expected {FITTED}{ENCODER_FOLDER}, its folder in the bundle, got {_shown(self.encoder)}"
            )
        if not self.templates:
            raise ModeclipError("templates: expected one or more, got none")
        check_templates(self.templates, "templates")
        if not self.experts:
            raise ModeclipError("experts: expected one or more, got none")
        if twice := [name for name, n in Counter(e.name for e in self.all_experts).items() if n > 1]:
            raise ModeclipError(f"experts: {twice[0]} is there twice")
        self._check_files()

    @property
    def all_experts(self) -> tuple[Expert, ...]:
        """The experts of the clusters, and those for class names."""
        return self.experts + self.class_experts

    def _check_files(self) -> None:
        """Check the list of files, and that it has those that are needed."""
        for place, digest in self.sha256.items():
            check_place(place)
            if not place.endswith(SUFFIXES):
                raise ModeclipError(
                    f"sha256: {_shown(place)} is no file of a bundle; expected {', '.join(SUFFIXES)}, and weights as "
                    "safetensors alone"
                )
            if not _HASH.fullmatch(digest):
                raise ModeclipError(f"sha256: expected 64 hexadecimal digits for {place}, got {_shown(digest)}")
        needed = [self.files.centres, self.files.clusters]
        for expert in self.all_experts:
            delta, whole = (f"{expert.folder}/{name}" for name in (DELTA_FILE, WEIGHTS_FILE))
            needed += [f"{expert.folder}/{CONFIG_FILE}"]
            if delta not in self.sha256:
                needed += [whole]
                continue
            if whole in self.sha256 or expert.folder == SEED:
                raise ModeclipError(f"sha256: names {delta}, but {expert.folder} has all its weights in {WEIGHTS_FILE}")
            if self.format_version < DELTAS_SINCE:
                raise ModeclipError(f"sha256: {delta} is no file of format {self.format_version}")
            needed += [f"{SEED}/{CONFIG_FILE}", f"{SEED}/{WEIGHTS_FILE}"]
        if missing := [place for place in needed if place not in self.sha256]:
            raise ModeclipError(f"sha256: has no hash of {missing[0]}, expected one for every file of the bundle")


def read_manifest(path: Path) -> tuple[Manifest, dict[str, Any]]:
    """Read and check the manifest of a bundle's folder; return it as objects, and as the JSON that it is.

    Raises:
        ModeclipError: It is missing, of a newer format, or says something that it may not say; or a file that it names
            is not in the folder, or one lies beside a model that it does not name.
    """
    from pydantic import TypeAdapter, ValidationError

    file = path / MANIFEST_FILE
    if not file.is_file():
        raise ModeclipError(f"{path} is no bundle: {MANIFEST_FILE} is missing; `modeclip run` makes one")
    _check_inside(path, MANIFEST_FILE)
    if file.stat().st_size > MAX_BYTES:
        raise _error(path, f"is larger than {MAX_BYTES:,} bytes")
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_without_twins)
    except (ValueError, RecursionError, OSError) as error:  # one that is not UTF-8 is a ValueError too
        raise _error(path, f"cannot be read ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(content, dict):
        raise _error(path, f"cannot be read (expected an object, got {type(content).__name__})")
    _check_version(path, content.get("format_version"))
    recipe = content["lineage"].get("recipe") if isinstance(content.get("lineage"), dict) else None
    try:
        for words, in_recipe in _strings(content, recipe):
            _check_words(words, in_recipe)
        manifest = TypeAdapter(Manifest).validate_json(text)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part)[:80] for part in problem["loc"])
        match problem["type"]:
            case "missing":
                said = "is missing"
            case "unexpected_keyword_argument":
                said = "is no field of this format"
            case "value_error":
                said = problem["msg"].removeprefix("Value error, ")
            case _:
                said = f"{problem['msg'][:1].lower()}{problem['msg'][1:]}, got {_shown(problem['input'])}"
        raise _error(path, f"{place}: {said}" if place else said) from None
    except ModeclipError as error:
        raise _error(path, str(error)) from None
    _check_folder(path, manifest)
    return manifest, content


def check_place(name: str) -> None:
    """Raise unless a name is that of a file or folder inside the bundle, written in the one usual way.

    Raises:
        ModeclipError: It is absolute, leads out of the bundle, or is no plain path.

    Examples:
        >>> check_place("expert-0/open_clip_config.json")
        >>> check_place("seed/../../passwords.json")
        Traceback (most recent call last):
        modeclip.errors.ModeclipError: names 'seed/../../passwords.json', which is not in the bundle
    """
    place = PurePosixPath(name)
    inside = not place.is_absolute() and ".." not in place.parts and place.parts
    if not inside or str(place) != name or "\\" in name or ":" in name or "\0" in name or len(name) > 1000:
        raise ModeclipError(f"names {_shown(name)}, which is not in the bundle")


def check_count(name: str, value: int) -> None:
    """Raise unless a number of things is one.

    Raises:
        ModeclipError: It is below 0, or beyond all that can be meant.
    """
    if not 0 <= value <= LARGEST:
        raise ModeclipError(f"{name}: expected 0 to {LARGEST:,}, got {_shown(value)}")


def _check_version(path: Path, version: Any) -> None:
    if type(version) is not int or version < 1:
        got = "none" if version is None else _shown(version)
        raise _error(path, f"format_version: expected a whole number of 1 to {FORMAT_VERSION}, got {got}")
    if version > FORMAT_VERSION:
        raise ModeclipError(
            f"bundle {path}: format {_shown(version)} is newer than this modeclip reads ({FORMAT_VERSION}); upgrade "
            "modeclip"
        )


def _check_folder(path: Path, manifest: Manifest) -> None:
    """Check that no file of a bundle lies outside of it, and that no other lies among those of a model."""
    listed = manifest.sha256.keys()
    for place in listed:
        _check_inside(path, place)
    places = {str(parent) for place in listed for parent in PurePosixPath(place).parents}
    for folder in sorted({*(expert.folder for expert in manifest.all_experts), SEED, ENCODER_FOLDER} & places):
        for found in sorted((path / folder).iterdir()) if (path / folder).is_dir() else []:
            name = f"{folder}/{found.name}"
            if name not in listed and name not in places and not found.name.startswith("."):
                raise ModeclipError(
                    f"bundle {path}: {name!r} is not among the files that {MANIFEST_FILE} lists; remove it, or {_AGAIN}"
                )


def _check_inside(path: Path, place: str) -> None:
    """Raise if a file is a link that leaves the bundle; in the cache of the Hub, every file is a link into it."""
    root = path.resolve()
    roots = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    try:
        found = (path / place).resolve()
    except (OSError, RuntimeError):  # links in a circle
        raise ModeclipError(f"bundle {path}: {place!r} is a link to itself; {_AGAIN}") from None
    if not any(found.is_relative_to(allowed) for allowed in roots):
        raise ModeclipError(f"bundle {path}: {place!r} is a link that leaves the bundle; {_AGAIN}")


def _error(path: Path, problem: str) -> ModeclipError:
    return ModeclipError(f"bundle {path}: {MANIFEST_FILE} {problem[:400]}; {_AGAIN}")


def _strings(content: Any, recipe: Any) -> Iterator[tuple[str, bool]]:
    """Yield every text of nested JSON, names of fields included, and whether it is part of the recipe.

    Raises:
        ModeclipError: It is nested too deep.
    """
    left = [(content, 0, False)]
    while left:
        value, depth, in_recipe = left.pop()
        if depth > MAX_DEPTH:
            raise ModeclipError(f"is nested deeper than {MAX_DEPTH} levels")
        in_recipe = in_recipe or (value is recipe and recipe is not None)
        if isinstance(value, str):
            yield value, in_recipe
        elif isinstance(value, dict):
            left += [(part, depth + 1, in_recipe) for pair in value.items() for part in pair]
        elif isinstance(value, list):
            left += [(part, depth + 1, in_recipe) for part in value]


def _check_words(words: str, in_recipe: bool) -> None:
    """Raise for characters that a terminal obeys; the settings of a run may have a tab, as a separator."""
    for character in words:
        kind = unicodedata.category(character)
        if kind == "Cs" or (not in_recipe and (kind in {"Cc", "Zl", "Zp"} or character in _DIRECTIONS)):
            raise ModeclipError(f"has a control character in {_shown(words)}")


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if twice := [name for name, number in Counter(name for name, _ in pairs).items() if number > 1]:
        raise ValueError(f"{_shown(twice[0])} is there twice")
    return dict(pairs)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _shown(value: object) -> str:
    """Return a value as a message shows it: short, in one line, without anything that a terminal obeys."""
    if isinstance(value, Mapping | list | tuple):
        return type(value).__name__
    if isinstance(value, int) and abs(value) > LARGEST:
        return "a huge number"
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
