"""Tasks in folders with a sub-folder of images for each class, and the text files that may lie beside any data.

These files say what the folders do not: ``classnames.txt`` holds a class name per line. The prompts are in
``zeroshot_classification_templates.txt``, one per line with ``{c}`` for the class name, or as JSON in
``zeroshot_classification_templates.json``, as one list or as a list for each class name.

Price: the folders are listed; no image is opened.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from modeclip.data.prompts import check_templates, fill
from modeclip.data.tasks.images import FileImages
from modeclip.data.tasks.task import Task
from modeclip.errors import ModeclipError
from modeclip.system.paths import join, list_folder, read_bytes, state, walk

CLASSNAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
CLASS_PROMPTS = "zeroshot_classification_templates.json"
TEST_FOLDERS = ("test", "val", "validation", "valid")
TRAIN_FOLDER = "train"
FILE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """A task as it was found on disk, before published names and prompts are added."""

    task: Task
    """The task."""
    named: bool
    """Whether the data name their classes by more than names of folders or numbers."""
    numbered: bool = False
    """Whether only the numbers of the classes are known, of which the last ones may not occur."""


# ---------------------------------------------------------------- files beside the data


def read_lines(folder: str, name: str) -> tuple[str, ...] | None:
    """Return the lines of a text file, stripped, or None if there is no such file. Blank lines at its end are ignored.

    Raises:
        ModeclipError: Another line is blank, or the file is no text.
    """
    path = join(folder, name)
    if not state(path):
        return None
    try:
        lines = [line.strip() for line in read_bytes(path).decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ModeclipError(
            f"{path!r} is not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8"
        ) from error
    while lines and not lines[-1]:
        lines.pop()
    if "" in lines:
        raise ModeclipError(f"{path!r}: line {lines.index('') + 1} is blank: expected one entry per line")
    if not lines:
        raise ModeclipError(f"{path!r} is empty: expected one entry per line; fill or remove the file")
    return tuple(lines)


def read_templates(folder: str, classnames: Sequence[str]) -> dict[str, Any]:
    """Read the fields ``templates`` and ``prompts`` of a task from the files beside its data.

    Raises:
        ModeclipError: A prompt has no place for the class name, or a class has no prompts.
    """
    path = join(folder, CLASS_PROMPTS)
    if state(path):
        try:
            return parse_templates(json.loads(read_bytes(path)), classnames, path)
        except ValueError as error:
            if isinstance(error, ModeclipError):
                raise
            raise ModeclipError(f"{path!r} is not JSON: {error}") from error
    lines = read_lines(folder, TEMPLATES)
    return {} if lines is None else parse_templates(list(lines), classnames, join(folder, TEMPLATES))


def parse_templates(value: object, classnames: Sequence[str], where: str) -> dict[str, Any]:
    """Return the field of a task for prompts that are one list for all classes, or a list for each class name.

    Examples:
        >>> parse_templates(["a {c}."], ["cat"], "f"), parse_templates({"cat": ["it purrs"]}, ["cat"], "f")
        ({'templates': ('a {c}.',)}, {'prompts': (('it purrs',),)})
    """
    if isinstance(value, list) and value and all(isinstance(prompt, str) for prompt in value):
        check_templates(value, where)
        return {"templates": tuple(value)}
    if not isinstance(value, Mapping):
        raise ModeclipError(f"{where!r}: expected a list of prompts, or a list of prompts for each class name")
    if missing := [name for name in classnames if not value.get(name)]:
        raise ModeclipError(f"{where!r} has no prompts for class {missing[0]!r} ({len(missing):,} such classes)")
    prompts = []
    for name in classnames:
        own = [value[name]] if isinstance(value[name], str) else value[name]
        if not isinstance(own, list) or not all(isinstance(prompt, str) for prompt in own):
            raise ModeclipError(f"{where!r}: prompts of class {name!r} are not a list of texts")
        prompts.append(tuple(fill(prompt, name) for prompt in own))
    return {"prompts": tuple(prompts)}


# ---------------------------------------------------------------- folders of classes


def place_of_test(root: str) -> str:
    """Return the folder of the test split: test/ or val/ if there is one, else the folder itself."""
    folders = list_folder(root)[0]
    name = next((name for name in TEST_FOLDERS if name in folders), None)
    return join(root, name) if name else root


def read_image_folder(name: str, root: str, folder: str) -> Found:
    """Read a classification task whose images lie in a folder for each class.

    Args:
        name: Name of the task.
        root: Folder of ``classnames.txt`` (a line for each class folder, in their order) and prompts, if there are any.
        folder: Folder of the split.

    Raises:
        ModeclipError: There is no class folder, one has no image, or the class names do not fit the folders.
    """
    folders = _class_folders(name, folder)
    names, labels = list[str](), list[int]()
    for label, each in enumerate(folders):
        own = [
            join(join(each, below) if below else each, file)
            for below, files in ((found.path, found.files) for found in walk(join(folder, each)))
            for file in files
            if file.lower().endswith(FILE_SUFFIXES)
        ]
        if not own:
            raise ModeclipError(
                f"task {name!r}: folder {join(folder, each)!r} holds no image ({', '.join(FILE_SUFFIXES)}):"
                " fill or remove it"
            )
        names += own
        labels += [label] * len(own)
    classnames, named = read_lines(root, CLASSNAMES), True
    if classnames is None:
        classnames, named = tuple(folders), False
    elif len(classnames) != len(folders):
        raise ModeclipError(
            f"task {name!r}: {join(root, CLASSNAMES)!r} has {len(classnames):,} lines, expected one for each of"
            f" {len(folders):,} folders"
        )
    task = Task(
        name=name,
        kind="classification",
        images=FileImages(task=name, names=names, paths=[join(folder, each) for each in names]),
        classnames=classnames,
        labels=np.array(labels, np.int64),
        source=folder,
        **read_templates(root, classnames),
    )
    return Found(task=task, named=named)


def _class_folders(name: str, folder: str) -> list[str]:
    """Return the names of the class folders in order; numbers are ordered by value."""
    folders = list_folder(folder)[0]
    if not folders:
        raise ModeclipError(
            f"task {name!r}: folder {folder!r} has no sub-folders: expected images in a folder for each class, a table"
            " (.parquet, .csv, .jsonl), a catalog, or CLIP_benchmark's layout (test/nshards.txt)"
        )
    if all(each.isdecimal() for each in folders):
        folders.sort(key=lambda each: (int(each), each))
    return folders


# ---------------------------------------------------------------- training splits


def with_train(task: Task, train: Task) -> Task:
    """Return a task with the training split for its linear probe; classes are matched by their names.

    Raises:
        ModeclipError: The split has classes that the task lacks, or one of them is no classification.
    """
    if task.kind != "classification" or train.kind != "classification":
        raise ModeclipError(f"task {task.name!r}: only classification has a training split")
    if strange := sorted(set(train.classnames) - set(task.classnames)):
        raise ModeclipError(
            f"task {task.name!r}: the training split has class {strange[0]!r}, which the test split lacks"
            f" ({len(strange):,} such classes): remove it from the training split"
        )
    labels = train.labels
    assert labels is not None
    if train.classnames != task.classnames:
        number_of = {name: number for number, name in enumerate(task.classnames)}
        places = np.array([number_of[name] for name in train.classnames])
        if labels.ndim == 2:
            wide = np.zeros((len(labels), len(task.classnames)), bool)
            wide[:, places] = labels
            labels = wide
        else:
            labels = places[labels]
    told = replace(
        train, classnames=task.classnames, labels=labels, templates=(), prompts=(), metric=task.metric, group=task.group
    )
    return replace(task, train=told)
