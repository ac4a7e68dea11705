"""The published tasks by name: the prompts, class names and metric of each, and where its data belong.

These are the 26 tasks of MoDE and MetaCLIP (``tasks26``), the shifted versions of ImageNet (``robustness``), two sets
for retrieval and two for selecting captions. Class names come from a file ``classnames.txt`` beside the data if there
is one, else from what was published, else from the names of the data's folders. ImageNet's names and prompts belong to
open_clip, so whoever asks for them passes them in (`ImageNetWords`).

Source: ``published.yaml`` states it for each task. Our difference: each class of FER-2013 has one name, as in
CLIP_benchmark; CLIP gives several names to three of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
"""What CLIP_benchmark, and sets published in its layout, put before a name."""
ImageNetWords = Callable[[], tuple[tuple[str, ...], tuple[str, ...]]]
"""Returns ImageNet's 1,000 class names and 80 prompts: `modeclip.models.clip.imagenet_words`."""


@dataclass(frozen=True, kw_only=True)
class KnownTask:
    """What was published about a task, apart from its images."""

    name: str
    """Its name in modeclip."""
    title: str
    """Its name in papers."""
    kind: Kind = "classification"
    """What it asks: classification, retrieval or selection."""
    classes: int = 0
    """Number of class names."""
    metric: str = "acc1"
    """The metric that counts in averages."""
    templates: tuple[str, ...] = ()
    """Its prompts, or ``imagenet`` alone for ImageNet's 80 prompts."""
    names: tuple[str, ...] = ()
    """Class names by number; if empty, they come from a package or from the data."""
    package: str = ""
    """Name of its list of class names in the package clip_benchmark."""
    sorted: bool = False
    """Whether the class names follow the alphabetical order of the data's own names."""
    ids: str = ""
    """``wordnet`` if the data name their classes by ImageNet's WordNet ids or class numbers."""
    also: tuple[str, ...] = ()
    """Other names of the same task."""
    group: str = ""
    """Group of tasks that it is averaged in."""
    folder: str = ""
    """Folder of the data, if it is not called like the task."""
    files: tuple[str, ...] = ()
    """Names of annotation files; the first that exists is read."""
    put: str = ""
    """What to put into the folder, for the message when the data are missing."""


@cache
def known_tasks() -> dict[str, KnownTask]:
    """Return all published tasks by name, in the order of the papers."""
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
    """Return the groups ``tasks26``, ``robustness`` and ``sugarcrepe`` with the names of their tasks."""
    tasks = known_tasks().values()
    return {
        "tasks26": tuple(task.name for task in tasks if task.kind == "classification" and not task.group),
        "robustness": tuple(task.name for task in tasks if task.group == IMAGENET),
        "sugarcrepe": tuple(task.name for task in tasks if task.group == "sugarcrepe"),
    }


def find_known(name: str) -> KnownTask | None:
    """Return the published task of this name, which may be CLIP_benchmark's; None if there is no such task.

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
    """Return the error for a specification that is neither a path nor a published name."""
    names = [*known_tasks(), *task_groups()]
    return unknown("task: no such folder or file, and no published task", spec, names, "docs/evaluation.md")


def templates_of(task: KnownTask, imagenet: ImageNetWords | None = None) -> tuple[str, ...]:
    """Return the prompts of a task.

    Raises:
        ModeclipError: They are ImageNet's, which were not passed in.
    """
    return _imagenet(task, imagenet)[1] if task.templates == (IMAGENET,) else task.templates


def _imagenet(task: KnownTask, imagenet: ImageNetWords | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if imagenet is None:
        raise ModeclipError(
            f"task {task.name!r} needs ImageNet's class names and prompts, which come with open_clip: pass"
            " imagenet=modeclip.models.clip.imagenet_words"
        )
    return imagenet()


def places_of(task: KnownTask, root: str) -> list[str]:
    """Return where the data of a task may lie below a root, in the order of the search."""
    stems = [task.folder or task.name, *(name.replace("/", "-") for name in task.also)]
    names = [prefix + stem for stem in dict.fromkeys(stems) for prefix in ("", "wds_", "wds_vtab-")]
    folders = [join(root, name) for name in names]
    tables = [join(root, stem + suffix) for stem in stems for suffix in (".parquet", ".csv", ".tsv", ".jsonl")]
    with_files = [join(folder, name) for folder in folders for name in task.files]
    return with_files + folders + tables


def find_data(task: KnownTask, root: str) -> str | None:
    """Return where the data of a task lie below a root; None if they are missing."""
    for place in places_of(task, root):
        is_shared = place.rpartition("/")[2] == task.folder  # by several tasks, each of which has its own file
        if not is_shared and (state(place) or is_folder(place)):
            return place
    return None


def missing_data(task: KnownTask, root: str) -> ModeclipError:
    """Return the error that says what to put where."""
    folder = join(root, task.folder or task.name)
    put = task.put or "the test images in a folder for each class (in test/, beside train/ for a linear probe)"
    return ModeclipError(
        f"task {task.name!r}: no data of {task.title} below {root!r}; put {put} into {folder!r}, or put"
        " CLIP_benchmark's layout (classnames.txt, test/nshards.txt, test/0.tar) there or into"
        f" {join(root, 'wds_' + task.name)!r}, or give {task.name}=PATH"
    )


# ---------------------------------------------------------------- class names


def published_names(task: KnownTask, imagenet: ImageNetWords | None = None) -> tuple[str, ...]:
    """Return the class names that were published for a task, or none if no installed package has them.

    Raises:
        ModeclipError: They are ImageNet's, which were not passed in.
    """
    if task.ids:
        return _imagenet(task, imagenet)[0]
    return task.names if task.names or not task.package else tuple(_benchmark_names().get(task.package, ()))


@cache
def _benchmark_names() -> dict[str, list[str]]:
    """Return the lists of class names in clip_benchmark, none if it is not installed."""
    spec = find_spec("clip_benchmark")
    if spec is None or spec.origin is None:
        return {}
    path = Path(spec.origin).parent / "datasets" / "en_classnames.json"
    names: dict[str, list[str]] = json.loads(path.read_text(encoding="utf-8"))
    return names


@cache
def wordnet_ids() -> tuple[str, ...]:
    """Return the WordNet ids of ImageNet's 1,000 classes in their order, from timm, which open_clip depends on."""
    spec = find_spec("timm")
    assert spec is not None
    assert spec.origin is not None
    return tuple((Path(spec.origin).parent / "data" / "_info" / "imagenet_synsets.txt").read_text().split())


def class_names(task: KnownTask, ids: Sequence[str], imagenet: ImageNetWords | None = None) -> tuple[str, ...]:
    """Return the class names that belong to the data's own names of classes.

    If these are the numbers of labels, the last classes may have no image; they are returned all the same.

    Args:
        task: The task.
        ids: What the data call their classes, in the order of the labels: names of folders, or numbers.
        imagenet: Returns ImageNet's class names and prompts, for the tasks that need them.

    Raises:
        ModeclipError: There are too few or too many classes, or nothing says what they mean.
    """
    names, numbered = published_names(task, imagenet), all(each.isdecimal() for each in ids)
    from_zero = numbered and [int(each) for each in ids] == list(range(len(ids)))
    if task.sorted and numbered:
        names = ()  # there are several numberings
    if from_zero and len(ids) <= len(names) == task.classes:
        return names  # the numbers of labels, of which the last ones may not occur
    if len(ids) != task.classes:
        raise ModeclipError(
            f"task {task.name!r}: {task.title} has {task.classes:,} classes, found {len(ids):,} ({_some(ids)});"
            " complete the data, or give them another name (NAME=PATH) to use only these classes"
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
            f"task {task.name!r}: the classes are numbers ({_some(ids)}), and nothing says what they are called: put a"
            f" file classnames.txt beside them, with a line for each class in their order{package}"
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
            f"task {task.name!r}: {_some(strange)} is no WordNet id of ImageNet's classes (such as n01440764);"
            " rename the folders, or put a file classnames.txt beside them"
        )
    return tuple(names[number_of[each]] for each in ids)


def clean_name(name: str) -> str:
    """Return the class name that a folder's name stands for.

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
