"""Opens the tasks that a user asks for: folders, tables, catalogs, or published tasks by name.

A specification is ``PATH`` or ``NAME=PATH`` (without a name the task is called like the folder or file), or the name of
a published task or group (`modeclip.data.tasks.published`), whose data lie below a root. What lies at a path is
detected: a catalog, CLIP_benchmark's webdataset layout, a table, annotations, or a folder of classes. ``retrieval:`` in
front asks for captions even if there are classes, and ``#column=value`` behind a catalog selects rows.

A task with a published name is that published task wherever its data lie, with its metric and class names. If the user
asks for it by name it has the published prompts. If the user gives only a path, prompts beside the data come first.

Price: that of `modeclip.data.tasks.layouts` and its neighbours; no image is opened.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import Int

from modeclip.data.catalog import CATALOG, Catalog
from modeclip.data.images import EXIF, Exif
from modeclip.data.indexing import TASKS
from modeclip.data.prompts import check_templates
from modeclip.data.selection import ALL, Selection
from modeclip.data.sources.source import TRAIN, count, files_by_split, preferred_split, split_of
from modeclip.data.tasks.annotations import read_annotations
from modeclip.data.tasks.images import FileImages, TableImages
from modeclip.data.tasks.layouts import (
    ASKED,
    Found,
    parse_templates,
    read_image_folder,
    split_folders,
    with_train,
)
from modeclip.data.tasks.published import (
    ImageNetWords,
    KnownTask,
    class_names,
    find_data,
    find_known,
    known_tasks,
    missing_data,
    task_groups,
    templates_of,
    unknown_task,
)
from modeclip.data.tasks.shards import has_shards, read_webdataset
from modeclip.data.tasks.tables import SUFFIXES, find_metadata, read_metadata, read_table
from modeclip.data.tasks.task import Task, catalog_classification, catalog_retrieval, catalog_tasks
from modeclip.errors import ModeclipError, unknown
from modeclip.system.console import log
from modeclip.system.paths import absolute, is_folder, is_url, join, list_folder, parent, state

RETRIEVAL = "retrieval:"
HUB_SUFFIXES = (".parquet",)
"""Suffixes of the tables that the folder of a configuration holds on Hugging Face's Hub."""
SPEC = re.compile(r"(?:(?P<name>[^=/#:]+)=)?(?P<path>[^#]+)(?:#(?P<where>.+))?", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """One specification, taken apart."""

    name: str
    """Name of the task."""
    is_named: bool = False
    """Whether the user gave the name, not only a path."""
    path: str
    """Absolute path or address of its data."""
    where: str = ""
    """Which rows of a catalog: conditions as of `modeclip.data.selection.Selection`, several joined by ``&``."""
    retrieval: bool = False
    """Whether the task is to find captions, even if there are classes."""
    known: KnownTask | None = None
    """The published task of this name, if there is one."""


def load_tasks(
    specs: Sequence[str],
    *,
    templates: Sequence[str] = (),
    template_file: Path | None = None,
    root: str = "data",
    train: bool = False,
    train_specs: Sequence[str] = (),
    imagenet: ImageNetWords | None = None,
    exif: Exif = "apply",
    selection: Selection = ALL,
) -> list[Task]:
    """Open the tasks that specifications name, in their order.

    Args:
        specs: The specifications.
        templates: Prompts with ``{}`` for the class name; they replace the prompts of all tasks.
        template_file: Prompts by task in CLIP_benchmark's format: JSON with a list for each task, or for each class
            name of a task.
        root: Folder of the data of published tasks, each in a folder of its name.
        train: Whether to read training splits, for linear probes: a folder or files ``train`` beside ``test``.
        train_specs: Training splits that lie elsewhere, as NAME=PATH with the name of a task.
        exif: Whether images in files and tables are turned upright as their EXIF data say; a catalog says so itself.
        selection: Rows that tasks of catalogs consist of.
        imagenet: Returns ImageNet's class names and prompts; needed for published tasks with ImageNet's classes.

    Raises:
        ModeclipError: A specification names nothing, two tasks have the same name, or data are missing or damaged.
    """
    check_templates(templates, "templates")
    tasks: list[Task] = []
    for spec in specs:
        tasks += [task for part in _expand(spec, root) for task in _load(part, train, imagenet, selection)]
    if twice := [name for name, number in Counter(task.name for task in tasks).items() if number > 1]:
        places = " and ".join(repr(task.source) for task in tasks if task.name == twice[0])
        raise ModeclipError(f"task {twice[0]!r} is given twice ({places}): give one of them another name (NAME=PATH)")
    for task in tasks:
        twice = [name for name, number in Counter(task.classnames).items() if number > 1]
        if twice and find_known(task.name) is None:  # published lists have such: two classes of ImageNet are "missile"
            log(f"task {task.name!r}: several classes are called {twice[0]!r}, so no model can tell them apart")
    tasks = _add_train(tasks, train_specs, imagenet)
    if exif not in EXIF:
        raise unknown("exif", exif, EXIF)
    if exif != "apply":
        tasks = [_decoded(task, exif) for task in tasks]
    if template_file is not None:
        tasks = _use_template_file(tasks, template_file)
    if templates:
        tasks = [replace(task, templates=tuple(templates), prompts=()) for task in tasks]
    return tasks


def _decoded(task: Task, exif: Exif) -> Task:
    """Return a task, and its training split, whose images in files and tables are decoded in this way."""
    train = task.train and _decoded(task.train, exif)
    images = task.images
    if isinstance(images, FileImages | TableImages):
        images = replace(images, exif=exif)
    return replace(task, images=images, train=train)


# ---------------------------------------------------------------- specifications


def _expand(text: str, root: str) -> list[TaskSpec]:
    """Return the specifications that a text stands for: one, or those of a group."""
    retrieval, rest = text.startswith(RETRIEVAL), text.removeprefix(RETRIEVAL)
    if names := task_groups().get(rest):
        return _find_group(rest, names, root)
    path = absolute(rest)
    match = None if _exists(path) else SPEC.fullmatch(rest)
    name, where = "", ""
    if match is not None:
        name, where = match["name"] or "", match["where"] or ""
        path = absolute(match["path"]) if match["path"].strip() else path
    if not _exists(path):
        known = None if name or where else find_known(rest)
        if known is not None:
            found = find_data(known, root)
            if found is None:
                raise missing_data(known, root)
            return [TaskSpec(name=known.name, is_named=True, path=absolute(found), retrieval=retrieval, known=known)]
        if name and (known := find_known(name)):
            raise ModeclipError(f"task {name!r}: {path!r} does not exist; expected data of {known.title}")
        if name:
            raise ModeclipError(f"task {name!r}: {path!r} does not exist; correct the path")
        raise unknown_task(text)
    own = name or _name_of(path)
    known = find_known(own)
    if where and not name:
        own = f"{own}#{where}"
    return [TaskSpec(name=own, is_named=bool(name), path=path, where=where, retrieval=retrieval, known=known)]


def _find_group(group: str, names: Sequence[str], root: str) -> list[TaskSpec]:
    """Return the tasks of a group; the data of all must be there."""
    found = {name: find_data(known_tasks()[name], root) for name in names}
    missing = [name for name, place in found.items() if place is None]
    if missing:
        first = missing_data(known_tasks()[missing[0]], root)
        raise ModeclipError(
            f"{len(missing)} of {len(names)} tasks of {group!r} have no data: {', '.join(missing)}; {first}"
        )
    return [
        TaskSpec(name=name, is_named=True, path=absolute(place), known=known_tasks()[name])
        for name, place in found.items()
        if place is not None
    ]


def _exists(path: str) -> bool:
    return is_folder(path) or bool(state(path)) or (is_url(path) and path.rstrip("/").endswith(".lance"))


def _name_of(path: str) -> str:
    pure = PurePosixPath(path)
    if split_of(pure.stem) in ASKED:  # the folder around it has the task's name
        pure = pure.parent
    name = pure.name.removesuffix(pure.suffix) if pure.suffix.lower() in (*SUFFIXES, ".json", ".lance") else pure.name
    return name.removeprefix("wds_")


# ---------------------------------------------------------------- what lies there


def _load(spec: TaskSpec, train: bool, imagenet: ImageNetWords | None, selection: Selection = ALL) -> list[Task]:
    if _is_catalog(spec.path):
        return _catalog(spec, selection)
    if not selection.is_all:
        raise ModeclipError(f"task {spec.name!r}: {selection} selects rows of catalogs, and {spec.path!r} is none")
    if spec.where:
        raise ModeclipError(f"task {spec.name!r}: #{spec.where} selects rows of a catalog, but {spec.path!r} is none")
    parts = _read(spec, train)
    task = _finish(parts["test"], spec, imagenet)
    if spec.retrieval and task.kind != "retrieval":
        raise ModeclipError(
            f"task {task.name!r}: {spec.path!r} holds {task.kind} without captions; leave out {RETRIEVAL!r}"
        )
    if train and "train" in parts and task.kind == "classification":
        task = with_train(task, _finish(parts["train"], spec, imagenet))
    return [task]


def _read(spec: TaskSpec, train: bool) -> dict[str, Found]:
    """Read what lies at a path as "test", and as "train" the training split if it is wanted and exists."""
    name, path, suffix = spec.name, spec.path, PurePosixPath(spec.path).suffix.lower()
    if not is_folder(path):
        if suffix in SUFFIXES or suffix == ".txt":
            return read_table(name, [path], spec.retrieval)
        if suffix == ".json":
            return {"test": read_annotations(name, path)}
        raise ModeclipError(
            f"task {name!r}: {path!r} can hold no task: expected {', '.join(SUFFIXES)} or .json, a catalog, or a folder"
        )
    test, train_folder = split_folders(path)
    root = path
    if test is None and split_of(PurePosixPath(path).name) in ASKED:  # the user names the folder of a split
        root, train_folder = parent(path), split_folders(parent(path))[1]
    place = test or path
    if has_shards(place):
        parts = {"test": read_webdataset(name, root, place)}
        if train and train_folder and has_shards(train_folder):
            parts["train"] = read_webdataset(name, root, train_folder)
        return parts
    if tables := find_metadata(path):
        return read_metadata(name, path, tables, spec.retrieval)
    if (files := _tables(path)) and (test is None or preferred_split(files, ASKED)):
        asked, told = preferred_split(files, ASKED), preferred_split(files, (TRAIN,))
        chosen = asked if asked is not None else "" if "" in files else told
        parts = read_table(name, _one_table(files[chosen or ""]), spec.retrieval)
        left = [
            f"{split} ({count(len(own), 'file')})" for split, own in sorted(files.items()) if split not in ("", chosen)
        ]
        if left:
            log(f"task {name!r}: reads {chosen or 'what is in no split'}; leaves out {', '.join(left)}")
        if train and "train" not in parts and told is not None and told != chosen:
            parts["train"] = read_table(name, _one_table(files[told]))["test"]
        return parts
    if test is None and len(found := [file for file in list_folder(path)[1] if file.lower().endswith(".json")]) == 1:
        return {"test": read_annotations(name, join(path, found[0]))}
    parts = read_image_folder(name, root, path)
    if train and "train" not in parts and train_folder and root != path:
        parts["train"] = read_image_folder(name, root, train_folder)["test"]
    return parts


def _tables(folder: str) -> dict[str, list[str]]:
    """Return the tables in a folder by the names of their splits, "" for those of none; Parquet also as on the Hub."""
    found = files_by_split(folder, SUFFIXES, hub=False)
    if not found and "data" in list_folder(folder)[0]:
        found = files_by_split(join(folder, "data"), SUFFIXES, hub=False)
    return found or files_by_split(folder, HUB_SUFFIXES)


def _one_table(files: list[str]) -> list[str]:
    """Return the files of one table: several only if they are Parquet."""
    if len(files) > 1 and not all(name.lower().endswith(".parquet") for name in files):
        names = ", ".join(name.rpartition("/")[2] for name in files[:4])
        raise ModeclipError(f"{parent(files[0])!r} holds several tables ({names}): name one of them")
    return files


def _finish(found: Found, spec: TaskSpec, imagenet: ImageNetWords | None) -> Task:
    """Add what was published about a task, and write class names as people do."""
    task, known = found.task, spec.known
    if known is None:
        if found.numbered:
            raise ModeclipError(
                f"task {task.name!r}: labels are numbers, and nothing says what the classes are called: put a file"
                f" classnames.txt beside {task.source!r}, with a line for each class in the order of the numbers"
            )
        return task if found.named or task.kind != "classification" else _clean(task)
    if (
        not spec.is_named
        and task.labels is not None
        and 0 < known.classes != len(task.classnames)
        and not found.numbered
    ):
        log(
            f"task {task.name!r} has {len(task.classnames):,} classes, not the {known.classes:,} of {known.title}: it"
            " is taken for a set of your own that has the same name"
        )
        return task if found.named else _clean(task)
    if known.kind != task.kind:
        raise ModeclipError(
            f"task {task.name!r}: {known.title} is {known.kind}, but {task.source!r} holds {task.kind}; put"
            f" {known.put or 'images in a folder for each class'} there, or give it another name (NAME=PATH)"
        )
    if task.labels is None:
        return replace(task, group=known.group)
    has_own = bool(task.templates or task.prompts) and not spec.is_named
    return replace(
        task,
        group=known.group,
        metric=known.metric if task.labels.ndim == 1 else task.metric,
        classnames=task.classnames if found.named else class_names(known, task.classnames, imagenet),
        templates=task.templates if has_own else templates_of(known, imagenet),
        prompts=task.prompts if has_own else (),
    )


def _clean(task: Task) -> Task:
    """Write the underscores in names of folders as spaces."""
    names = tuple(name.replace("_", " ").strip() for name in task.classnames)
    if twice := [name for name, number in Counter(names).items() if number > 1]:
        raise ModeclipError(f"task {task.name!r}: two classes are called {twice[0]!r}: rename one of their folders")
    return replace(task, classnames=names)


# ---------------------------------------------------------------- catalogs


def _is_catalog(path: str) -> bool:
    if path.rstrip("/").endswith(".lance"):
        return True
    return is_folder(path) and any(name in list_folder(path)[0] for name in ("_versions", CATALOG))


def _catalog(spec: TaskSpec, selection: Selection) -> list[Task]:
    """Return the tasks of a catalog, or the task of a selection of its rows."""
    held_out = not spec.where and not spec.retrieval and not spec.path.rstrip("/").endswith(".lance")
    has_tasks = held_out and TASKS in list_folder(spec.path)[0]  # the folder of a run
    catalog = selection.part_of(Catalog.open(join(spec.path, TASKS) if has_tasks else spec.path))
    if spec.where:
        rows = _select(catalog, spec)
        return [
            catalog_retrieval(catalog, rows, spec.name)
            if spec.retrieval
            else catalog_classification(catalog, rows, spec.name)
        ]
    held = catalog.read(["task"])["task"].astype(str) if "task" in catalog.columns else np.array([""])
    if not any(held):
        if spec.retrieval:
            return [catalog_retrieval(catalog, np.arange(len(catalog)), spec.name)]
        raise ModeclipError(
            f"catalog {spec.path!r} holds no tasks: select rows with {spec.path}#column=value (columns:"
            f" {', '.join(catalog.columns)}), or write retrieval: in front of it"
        )
    names = sorted(set(held) - {""})
    if spec.is_named and len(names) > 1:
        raise ModeclipError(
            f"task {spec.name!r}: {spec.path!r} holds {len(names):,} tasks: leave out the name, or select one, such as"
            f" {spec.name}={spec.path}#task={names[0]}"
        )
    if spec.retrieval:
        tasks = [catalog_retrieval(catalog, np.flatnonzero(held == name), name) for name in names]
    else:
        tasks = catalog_tasks(catalog)
    return [replace(tasks[0], name=spec.name)] if spec.is_named else tasks


def _select(catalog: Catalog, spec: TaskSpec) -> Int[np.ndarray, " n"]:
    try:
        return Selection(where=tuple(spec.where.split("&"))).rows(catalog)
    except ModeclipError as error:
        raise ModeclipError(f"task {spec.name!r}: {error}") from error


# ---------------------------------------------------------------- further files


def _add_train(tasks: list[Task], specs: Sequence[str], imagenet: ImageNetWords | None) -> list[Task]:
    """Add the training splits that lie elsewhere to their tasks."""
    by_name = {task.name: task for task in tasks}
    for text in specs:
        match = SPEC.fullmatch(text)
        if match is None or not match["name"]:
            raise ModeclipError(f"training split {text!r}: expected NAME=PATH with the name of a task")
        if match["name"] not in by_name:
            raise ModeclipError(f"training split {text!r}: no task {match['name']!r}; tasks: {', '.join(by_name)}")
        (spec,) = _expand(text, "")
        found = _load(spec, False, imagenet)
        if len(found) != 1:
            raise ModeclipError(f"training split {text!r} holds {len(found):,} tasks: select one with #task=...")
        by_name[spec.name] = with_train(by_name[spec.name], found[0])
    return list(by_name.values())


def _use_template_file(tasks: list[Task], path: Path) -> list[Task]:
    """Replace the prompts of the tasks that a file names."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModeclipError(f"template file {str(path)!r} does not exist; correct the path") from error
    except ValueError as error:
        raise ModeclipError(f"template file {str(path)!r} is not JSON: {error}") from error
    if not isinstance(content, Mapping):
        raise ModeclipError(f"template file {str(path)!r}: expected prompts by name of a task")
    changed = []
    for task in tasks:
        known = find_known(task.name)
        names = [task.name, *((known.name, *known.also) if known else ())]
        key = next((name for name in names if name in content), None)
        if key is None or task.kind != "classification":
            changed.append(task)
            continue
        told = {"templates": (), "prompts": ()} | parse_templates(content[key], task.classnames, f"{path}, {key}")
        changed.append(replace(task, **told))
    return changed
