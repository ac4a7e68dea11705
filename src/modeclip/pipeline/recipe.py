"""Recipes: a YAML file that says everything about a run, from the source of the pairs to the rule of the mixture."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from modeclip.clustering.embedding import EmbedConfig
from modeclip.clustering.fitting import (
    ClusterConfig,
)
from modeclip.curation.curating import check_name, make_method
from modeclip.curation.method import Method
from modeclip.data.sources import DataConfig, relative_to
from modeclip.data.sources.options import GROUPS
from modeclip.errors import ModeclipError, unknown
from modeclip.evaluation.evaluate import RecipeEvaluateConfig
from modeclip.models.encoders import PREFIXES
from modeclip.system.files import (
    write_atomically,
)
from modeclip.system.paths import RunPaths, expand_homes, home_path
from modeclip.training.experts import ExpertsConfig
from modeclip.training.jobs import TrainConfig

PLACES = (
    "clean", "data", "encoder", "entries", "filter", "for_classes", "knowledge", "learner", "model", "start", "targets",
    "tasks", "titles", "wordnet"
)  # fmt: skip
"""Settings that may name files and folders, apart from the source's own (`modeclip.data.sources.relative_to`)."""
WORDS = ("auto", "corpus", "minilm", "simcse", "tfidf", "wordnet")
"""What such a setting says that is no path, whatever lies beside the recipe."""
PLACE = re.compile(
    rf"((?:(?:corpus|wordnet|retrieval|local-dir|{'|'.join(PREFIXES)}):)?(?:[^=@#:/]+[=@])?)([^#]+)(#.*)?", re.DOTALL
)
"""What may stand around a path: ``corpus:PATH``, ``NAME@PATH``, ``NAME=PATH``, ``PATH#where``."""


@dataclass(frozen=True, kw_only=True)
class CurateStep:
    """A method of curation with its settings; in a recipe they stand beside each other."""

    method: str
    """metaclip, align, dfn, klite or duplicates."""
    column: str | None = None
    """What the names of its columns begin with; the method by default."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The settings of the method, as `modeclip curate CATALOG METHOD --help` lists them."""

    @property
    def name(self) -> str:
        """What the names of its columns begin with."""
        return self.column or self.method

    @property
    def config(self) -> Method:
        """The settings as the method's config."""
        return make_method(self.method, **self.settings)

    def flat(self) -> dict[str, Any]:
        """Return the step as it stands in a recipe."""
        column = {} if self.column is None else {"column": self.column}
        return {"method": self.method, **column, **self.settings}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that a run is made from."""

    name: str
    """Name of the run, shown in its report."""
    data: DataConfig
    """Where the pairs come from."""
    embed: EmbedConfig = field(default_factory=EmbedConfig)
    """How captions become vectors."""
    curate: tuple[CurateStep, ...] = ()
    """Methods of curation in their order, each of which looks at the pairs that those before it have kept; clusters
    and models are made of what the last one keeps. All pairs by default."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """How captions are clustered and experts are formed."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How each model is trained."""
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    """Budget of the experts, and the controls."""
    evaluate: RecipeEvaluateConfig = field(default_factory=RecipeEvaluateConfig)
    """Templates and routing rule."""

    def plain(self) -> dict[str, Any]:
        """Return the recipe as JSON and YAML know it, with the flat names of its file."""
        steps = [step.flat() for step in self.curate]
        plain = dict(plain_of(asdict(self) | {"data": self.data.flat(), "curate": steps}))
        return plain if steps else {name: value for name, value in plain.items() if name != "curate"}


def demo_recipe() -> Path:
    """Return the path of the recipe that ``modeclip demo`` runs."""
    return Path(str(files("modeclip") / "recipes" / "demo.yaml"))


class _RecipeLoader(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error: of the two values one would be ignored."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Make a mapping of a node."""
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.value == "<<":  # merged keys may be overridden, which is their purpose
                continue
            if isinstance(key.value, str) and key.value in seen:
                raise ModeclipError(
                    f"line {line}: {key.value!r} stands twice, first in line {seen[key.value]}; remove one of the two"
                )
            seen[str(key.value)] = line
        return super().construct_mapping(node, deep)


def load_recipe(path: Path) -> Recipe:
    """Read a recipe from YAML; paths in it are relative to its folder.

    Raises:
        ModeclipError: The file is missing or no valid YAML, or a field is unknown, missing, of a wrong type or out of
            its range.
    """
    path = home_path(path)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _RecipeLoader)
    except FileNotFoundError:
        raise ModeclipError(f"recipe {path}: no such file; correct the path") from None
    except ModeclipError as error:
        raise ModeclipError(f"recipe {path}: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # also dates that are none, deep nesting
        raise ModeclipError(
            f"recipe {path}: no valid YAML ({' '.join(str(error).split())}); correct that line"
        ) from None
    try:
        if isinstance(content, dict):
            content.setdefault("name", path.stem)
            for name in ("embed", "curate", "train", "experts", "evaluate"):
                if name in content:
                    content[name] = _from_folder(path.parent, content[name])
        recipe = parse_recipe(content)
    except ModeclipError as error:
        raise ModeclipError(f"recipe {path}: {error}") from None
    except RecursionError:
        raise ModeclipError(f"recipe {path}: a part holds itself (an alias of YAML); write it out") from None
    return replace(recipe, data=relative_to(recipe.data, path.parent))


def parse_recipe(content: Any) -> Recipe:
    """Make a recipe of what a YAML file holds, and check every field.

    Raises:
        ModeclipError: A field is unknown, missing, of a wrong type or out of its range.
    """
    from pydantic import TypeAdapter, ValidationError

    if not isinstance(content, dict):
        raise ModeclipError(
            f"expected sections such as `data:`, got a {type(content).__name__}; docs/own-data.md shows a recipe"
        )
    if isinstance(content.get("data"), dict):
        content = content | {"data": DataConfig.nested(content["data"])}
    if "curate" in content:
        content = content | {"curate": _parse_steps(content["curate"])}
    _check_fields(Recipe, content, ())
    try:
        return TypeAdapter(Recipe).validate_python(content)
    except ValidationError as error:
        problem = error.errors()[0]
    place = ".".join(str(part) for part in problem["loc"] if part not in GROUPS)  # recipes have flat names
    if problem["type"] == "value_error":  # a range that the section itself checks; its message names the field
        raise ModeclipError(problem["msg"].removeprefix("Value error, "))
    got = "" if problem["type"] == "missing" else f", got {problem['input']!r}"
    raise ModeclipError(f"{place}: {problem['msg']}{got}")


def _parse_steps(content: Any) -> list[CurateStep]:
    """Return the steps of a curation, and check each setting.

    Raises:
        ModeclipError: A step names no method, a setting is unknown or cannot be meant, or two have the same columns.
    """
    if not isinstance(content, list) or not all(isinstance(step, dict) and "method" in step for step in content):
        raise ModeclipError(
            "curate: expected a list of methods such as `- method: duplicates`, with settings beside the method"
        )
    steps: list[CurateStep] = []
    for given in content:
        settings = {str(name): value for name, value in given.items() if name not in {"method", "column"}}
        step = CurateStep(method=str(given["method"]), column=given.get("column"), settings=settings)
        make_method(step.method, **settings)
        check_name(step.name)
        if step.name in {other.name for other in steps}:
            raise ModeclipError(f"curate: two steps are called {step.name!r}; give one of them another `column`")
        steps.append(step)
    return steps


def write_recipe(recipe: Recipe, folder: RunPaths) -> None:
    """Write a recipe into its run folder, with the settings that were left to the data or the model."""
    plain = replace(recipe, train=recipe.train.decided()).plain()
    write_atomically(folder.recipe, yaml.safe_dump(plain, sort_keys=False))


def hash_of(content: Any) -> str:
    """Return a short hash of anything that JSON can hold."""
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def find_place(name: str, value: str, folder: Path = Path()) -> tuple[str, Path, str] | None:
    """Return the file or folder that a setting names, between what stands before and behind it; None if none is there.

    Args:
        name: Of the setting.
        value: Of the setting, or one of its values.
        folder: What a path that is not absolute counts from.

    Examples:
        >>> find_place("entries", "corpus:/dev/null"), find_place("entries", "corpus")
        (('corpus:', PosixPath('/dev/null'), ''), None)
    """
    value = expand_homes(value)
    parts = PLACE.fullmatch(value)
    if name not in PLACES or parts is None or (value in WORDS and name != value):
        return None
    for before, path, behind in (("", value, ""), parts.groups("")):
        with suppress(OSError, ValueError):  # too long for a path, or with signs that none has
            if _is_meant(name, before, folder / path):
                return before, folder / path, behind
    return None


def _is_meant(name: str, before: str, place: Path) -> bool:
    """Tell whether a place is there and of the kind that a setting names."""
    if before.endswith("@") or name == "for_classes":
        return place.is_file()
    return place.is_dir() if name in {"encoder", "model"} else place.exists()


def _from_folder(folder: Path, value: Any, name: str = "") -> Any:
    """Return a setting, or a section, with the paths in it taken from a folder, where something of that name lies."""
    if isinstance(value, dict):
        return {key: _from_folder(folder, one, str(key)) for key, one in value.items()}
    if isinstance(value, list):
        return [_from_folder(folder, one, name) for one in value]
    if not isinstance(value, str) or name not in PLACES:
        return value
    found = find_place(name, value, folder)
    return expand_homes(value) if found is None else "".join(map(str, found))


def _check_fields(section: type, content: dict[str, Any], place: tuple[str, ...]) -> None:
    """Raise for the first field that a section of the recipe does not have."""
    types = get_type_hints(section)
    for name, value in content.items():
        if name not in types:
            raise unknown("field", ".".join((*place, str(name))), types)
        if is_dataclass(types[name]) and isinstance(value, dict):
            _check_fields(types[name], value, (*place, name))


def plain_of(value: Any) -> Any:
    """Return a value as JSON and YAML know it: tuples as lists, keys as text."""
    return json.loads(json.dumps(value))
