"""The name of a published task goes in; its prompts, class names and metric come out, and where its data belong.

The 26 tasks of MoDE and MetaCLIP (`TASKS26`), the shifted versions of ImageNet (`ROBUSTNESS`), two sets for retrieval
and two for choosing captions. What is not theirs to say is taken from the data: a file ``classnames.txt`` first, then
the names that were published, then the names of the data's own folders.

Source: ``published.yaml`` names them. Our difference: classes of FER-2013 have one name each, as in CLIP_benchmark;
CLIP gives three of them several.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from modeclip.data.tasks.task import Kind
from modeclip.errors import ModeclipError, unknown
from modeclip.system.paths import expand_braces, is_folder, join, state

IMAGENET = "imagenet"
PREFIXES = ("wds/", "wds_", "vtab/", "vtab-", "vtab_")
"""What CLIP_benchmark and the sets published in its layout put before a name."""


@dataclass(frozen=True, kw_only=True)
class KnownTask:
    """What was published of a task, other than its images."""

    name: str
    """Name here."""
    title: str
    """Name for people."""
    kind: Kind = "classification"
    """What is asked."""
    classes: int = 0
    """Number of class names."""
    metric: str = "acc1"
    """What counts in averages."""
    templates: tuple[str, ...] = ()
    """Prompts, or ``imagenet``: those of open_clip."""
    names: tuple[str, ...] = ()
    """Class names by number; empty: from a package, or the data's own."""
    package: str = ""
    """Name of the list of class names in clip_benchmark."""
    sorted: bool = False
    """Whether the class names belong to the data's own names in alphabetical order."""
    ids: str = ""
    """``wordnet``: the data's own names are WordNet ids of ImageNet, or its class numbers."""
    also: tuple[str, ...] = ()
    """Other names of the same data."""
    group: str = ""
    """Group that it is averaged in."""
    folder: str = ""
    """Folder of the data, where it is not the name."""
    files: tuple[str, ...] = ()
    """Names of annotation files, the first that is there counts."""
    put: str = field(default="")
    """What is to be put into the folder."""


@cache
def known_tasks() -> dict[str, KnownTask]:
    """Return all of them by name, in the papers' order."""
    text = files("modeclip.data.tasks").joinpath("published.yaml").read_text(encoding="utf-8")
    return {name: _read(name, entry) for name, entry in yaml.safe_load(text).items()}


def _read(name: str, entry: dict[str, Any]) -> KnownTask:
    given: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
    if given.get("templates") == IMAGENET:
        given["templates"] = (IMAGENET,)
    elif "templates" in given:
        given["templates"] = tuple(prompt for form in given["templates"] for prompt in expand_braces(form))
    return KnownTask(name=name, **given)


def task_groups() -> dict[str, tuple[str, ...]]:
    """Return the names that stand for several tasks: ``tasks26``, ``robustness`` and ``sugarcrepe``."""
    tasks = known_tasks().values()
    return {
        "tasks26": tuple(task.name for task in tasks if task.kind == "classification" and not task.group),
        "robustness": tuple(task.name for task in tasks if task.group == IMAGENET),
        "sugarcrepe": tuple(task.name for task in tasks if task.group == "sugarcrepe"),
    }


def find_known(name: str) -> KnownTask | None:
    """Return the task of a name, also of one that CLIP_benchmark gives it; None: there is none.

    Examples:
        >>> find_known("wds_vtab-pets").title, find_known("fgvc_aircraft").metric, find_known("my_own")
        ('Oxford-IIIT Pets', 'mean_per_class_recall', None)
    """
    bare = _bare(name)
    return next((task for task in known_tasks().values() if bare in map(_bare, (task.name, *task.also))), None)


def _bare(name: str) -> str:
    name = name.lower()
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def unknown_task(spec: str) -> ModeclipError:
    """Make the error for a task that is neither a path nor a known name."""
    names = [*known_tasks(), *task_groups()]
    return unknown("task: no such folder or file, and no published task", spec, names, "docs/evaluation.md")


def templates_of(task: KnownTask) -> tuple[str, ...]:
    """Return the prompts of a task."""
    if task.templates != (IMAGENET,):
        return task.templates
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    return tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)


def places_of(task: KnownTask, root: str) -> list[str]:
    """Return where the data of a task may lie below a root, in the order in which they are looked for."""
    stems = [task.folder or task.name, *(name.replace("/", "-") for name in task.also)]
    names = [prefix + stem for stem in dict.fromkeys(stems) for prefix in ("", "wds_", "wds_vtab-")]
    folders = [join(root, name) for name in names]
    tables = [join(root, stem + suffix) for stem in stems for suffix in (".parquet", ".csv", ".tsv", ".jsonl")]
    with_files = [join(folder, name) for folder in folders for name in task.files]
    return with_files + folders + tables


def find_data(task: KnownTask, root: str) -> str | None:
    """Return where the data of a task lie below a root; None: they are not there."""
    for place in places_of(task, root):
        is_shared = place.rpartition("/")[2] == task.folder  # by several tasks, each with a file of its own
        if not is_shared and (state(place) or is_folder(place)):
            return place
    return None


def missing_data(task: KnownTask, root: str) -> ModeclipError:
    """Make the error that says what is to be put where."""
    folder = join(root, task.folder or task.name)
    put = task.put or "the test images in a folder for each class (in test/, beside train/ for a linear probe)"
    return ModeclipError(
        f"task {task.name!r}: no data of {task.title} below {root!r}; put into {folder!r} {put}, or CLIP_benchmark's"
        f" layout (classnames.txt, test/nshards.txt, test/0.tar), also as {join(root, 'wds_' + task.name)!r}; or give"
        f" {task.name}=PATH"
    )


# ---------------------------------------------------------------- class names


@cache
def published_names(task: KnownTask) -> tuple[str, ...]:
    """Return the class names that were published for a task; empty: none of the installed packages has them."""
    if task.ids:
        from open_clip import IMAGENET_CLASSNAMES

        return tuple(IMAGENET_CLASSNAMES)
    if task.names or not task.package:
        return task.names
    spec = find_spec("clip_benchmark")
    if spec is None or spec.origin is None:
        return ()
    path = Path(spec.origin).parent / "datasets" / "en_classnames.json"
    return tuple(json.loads(path.read_text(encoding="utf-8"))[task.package])


@cache
def wordnet_ids() -> tuple[str, ...]:
    """Return the WordNet ids of ImageNet's 1,000 classes in their order, as timm (which open_clip needs) has them."""
    spec = find_spec("timm")
    assert spec is not None
    assert spec.origin is not None
    return tuple((Path(spec.origin).parent / "data" / "_info" / "imagenet_synsets.txt").read_text().split())


def class_names(task: KnownTask, ids: Sequence[str]) -> tuple[str, ...]:
    """Return the class name of each of the data's own names, and of those after them that never occur.

    Args:
        task: The task.
        ids: What the data call their classes, in the order of the labels: names of folders, or numbers.

    Raises:
        ModeclipError: There are too few or too many, or nothing says what they mean.
    """
    names, numbered = published_names(task), all(each.isdecimal() for each in ids)
    from_zero = numbered and [int(each) for each in ids] == list(range(len(ids)))
    if task.sorted and numbered:
        names = ()  # there are several numberings
    if from_zero and len(ids) <= len(names) == task.classes:
        return names  # the numbers of labels, of which the last ones may not occur
    if len(ids) != task.classes:
        raise ModeclipError(
            f"task {task.name!r}: {task.title} has {task.classes:,} classes, found {len(ids):,} ({_some(ids)});"
            " complete the data, or give them another name (NAME=PATH) to be asked for these classes only"
        )
    if task.ids:
        return _imagenet_names(task, ids, names)
    if numbered and names:
        places = sorted(range(len(ids)), key=lambda place: int(ids[place]))
        found = dict(zip(places, names, strict=True))
        return tuple(found[place] for place in range(len(ids)))
    if numbered:
        package = ", or install clip-benchmark, which knows them" if task.package else ""
        raise ModeclipError(
            f"task {task.name!r}: the classes are numbers ({_some(ids)}), and nothing says what they are called: put"
            f" classnames.txt beside them, a line for each class in their order{package}"
        )
    of_key = {_key(name): name for name in names}
    if names and task.sorted and not all(_key(each) in of_key for each in ids):
        of_id = dict(zip(sorted(ids), names, strict=True))
        return tuple(of_id[each] for each in ids)
    return tuple(of_key.get(_key(clean_name(each)), clean_name(each)) for each in ids)


def _imagenet_names(task: KnownTask, ids: Sequence[str], names: tuple[str, ...]) -> tuple[str, ...]:
    number_of = {synset: number for number, synset in enumerate(wordnet_ids())}
    if task.classes == len(names):
        number_of |= {str(number): number for number in range(len(names))}
    if strange := [each for each in ids if each not in number_of]:
        raise ModeclipError(
            f"task {task.name!r}: {_some(strange)} is no WordNet id of ImageNet's classes (such as n01440764)"
            "; rename the folders, or put classnames.txt beside them"
        )
    return tuple(names[number_of[each]] for each in ids)


def clean_name(name: str) -> str:
    """Return the class name that the name of a folder says.

    Examples:
        >>> clean_name("001.Black_footed_Albatross"), clean_name("ApplyEyeMakeup"), clean_name("F_A-18")
        ('Black footed Albatross', 'Apply Eye Makeup', 'F A-18')
    """
    name = re.sub(r"^\d+\.(?=\D)", "", name).replace("_", " ").replace("/", " ").strip()
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name) if re.fullmatch(r"([A-Z][a-z]+){2,}", name) else name


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
