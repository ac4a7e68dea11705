"""Recipes: a YAML file that says everything about a run, from the source of the pairs to the rule of the mixture."""

from __future__ import annotations

import json
from collections.abc import Mapping
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
    if isinstance(content, dict):
        content.setdefault("name", path.stem)
        for section, name in (("train", "model"), ("embed", "encoder")):
            if isinstance(content.get(section), dict) and isinstance(content[section].get(name), str):
                content[section][name] = _folder_beside(path, content[section][name])
        experts = content.get("experts")
        if isinstance(experts, dict) and isinstance(experts.get("for_classes"), list):
            experts["for_classes"] = _beside(path, experts["for_classes"])
        for step in content["curate"] if isinstance(content.get("curate"), list) else []:
            for name, value in step.items() if isinstance(step, dict) else []:
                step[name] = _beside(path, value)
    try:
        recipe = parse_recipe(content)
    except ModeclipError as error:
        raise ModeclipError(f"recipe {path}: {error}") from None
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


def _folder_beside(recipe: Path, value: str) -> str:
    """Return the name of a model with its path taken from the recipe's folder, if it is a folder there."""
    prefixes = ("local-dir:", *(f"{known}:" for known in PREFIXES))
    value = expand_homes(value)
    prefix = next((known for known in prefixes if value.startswith(known)), "")
    folder = recipe.parent / value.removeprefix(prefix)
    return f"{prefix}{folder}" if folder.is_dir() else value


def _beside(recipe: Path, value: Any) -> Any:
    """Return a setting with its path taken from the recipe's folder, if there is something of that name there."""
    if isinstance(value, list):
        return [_beside(recipe, one) for one in value]
    is_there = isinstance(value, str) and value and (recipe.parent / expand_homes(value)).exists()
    return str(recipe.parent / expand_homes(value)) if is_there else value


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
