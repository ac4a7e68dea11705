"""Tasks in folders with a sub-folder of images for each class, and the text files that may lie beside any data.

These files say what the folders do not: ``classnames.txt`` holds a class name per line. The prompts are in
``zeroshot_classification_templates.txt``, one per line with ``{c}`` for the class name, or as JSON in
``zeroshot_classification_templates.json``, as one list or as a list for each class name.

Price: the folders are listed; no image is opened.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from modeclip.data.prompts import check_templates, fill
from modeclip.data.sources.captions import RARE_SUFFIXES
from modeclip.data.sources.folders import walk_places
from modeclip.data.sources.source import OTHER, TEST, TRAIN, VALIDATION, count, preferred_split, split_of, splits_among
from modeclip.data.tasks.images import FileImages
from modeclip.data.tasks.task import Task
from modeclip.errors import ModeclipError
from modeclip.system.console import log
from modeclip.system.paths import form_of, is_url, join, list_folder, normal_form, read_bytes, state, walk

CLASSNAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
CLASS_PROMPTS = "zeroshot_classification_templates.json"
ASKED = (TEST, VALIDATION)
"""The splits that a task may ask, the first that there is."""
_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", *RARE_SUFFIXES)
FILE_SUFFIXES = tuple(f".{suffix}" for suffix in _SUFFIXES)


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


def beside(folder: str, name: str) -> str | None:
    """Return the path of a file in a folder, whatever the case of its name; the exact name wins."""
    if state(path := join(folder, name)):
        return path
    if is_url(folder):
        return None
    found = next((each for each in list_folder(folder)[1] if each.lower() == name.lower()), None)
    return found and join(folder, found)


def read_lines(folder: str, name: str) -> tuple[str, ...] | None:
    """Return the lines of a text file, stripped, or None if there is no such file. Blank lines at its end are ignored.

    Raises:
        ModeclipError: Another line is blank, or the file is no text.
    """
    path = beside(folder, name)
    if path is None:
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
    path = beside(folder, CLASS_PROMPTS)
    if path is not None:
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


def split_folders(root: str) -> tuple[str | None, str | None]:
    """Return the folders of the test split and of the training split in a folder, None for one that is not there.

    Where there is no test split, that for validation is it.
    """
    folders = list_folder(root)[0]
    named = splits_among(folders, lambda name: _holds_files(join(root, name)))
    test, train = (preferred_split(named, kinds) for kinds in (ASKED, (TRAIN,)))
    return test and join(root, test), train and join(root, train)


def _holds_files(folder: str) -> bool:
    return any(name.lower().endswith((*FILE_SUFFIXES, ".tar")) for found in walk(folder) for name in found.files)


def read_image_folder(name: str, root: str, folder: str) -> dict[str, Found]:
    """Read a classification task whose images lie in a folder for each class, as "test", and as "train" if it is there.

    Folders of splits may lie above or below those of the classes (`modeclip.data.sources.folders`).

    Args:
        name: Name of the task.
        root: Folder of ``classnames.txt`` (a line for each class folder, in their order) and prompts, if there are any.
        folder: Folder of the images.

    Raises:
        ModeclipError: There is no class folder, one has no image, or the class names do not fit the folders.
    """
    files, places = defaultdict[str, dict[str, list[str]]](dict), defaultdict[str, set[str]](set)
    sizes, loose, forms = Counter[str](), 0, set[str]()
    for place in walk_places(folder, _SUFFIXES):
        if place.folder.broken or place.folder.unreadable:
            odd = join(place.folder.path, next(iter(place.folder.broken), ""))
            reason = place.folder.unreadable or "the link leads nowhere"
            raise ModeclipError(f"task {name!r}: {join(folder, odd)!r} cannot be read: {reason}; mend or remove it")
        own = [join(place.folder.path, file) for file in place.folder.files if file.lower().endswith(FILE_SUFFIXES)]
        if not own:
            continue
        split = PurePosixPath(place.split_folder).name
        if place.label or place.split:
            sizes[split] += len(own)
        if place.label and place.split != OTHER:
            files[split].setdefault(place.label, []).extend(own)
            places[split].add(place.split_folder)
            forms |= {form_of(part) for part in place.folder.path.split("/") if normal_form(part) != part}
        elif not place.split:
            loose += len(own)
    asked, train = preferred_split(files, ASKED), preferred_split(files, (TRAIN,))
    if asked is None and "" not in files:
        asked = train
    chosen, at = files[asked or ""], places[asked or ""]
    if asked:
        for label, more in files[""].items():
            chosen.setdefault(label, []).extend(more)
    _check_folders(name, folder, chosen, at)
    left = [f"{each} ({count(number, 'image')})" for each, number in sorted(sizes.items()) if each not in ("", asked)]
    left += [f"{count(loose, 'image')} in no class folder"] if loose else []
    if asked or left:
        log(
            f"task {name!r}: reads {asked or 'what is in no split'}"
            + (f"; leaves out {', '.join(left)}" if left else "")
        )
    if forms:
        log(f"task {name!r}: folders are named in Unicode form {', '.join(sorted(forms))}, classes are called in NFC")
    parts = {"test": _found(name, root, folder, chosen, at)}
    if train is not None and train != asked:
        parts["train"] = _found(name, root, folder, files[train], places[train])
    return parts


def _check_folders(name: str, folder: str, files: Mapping[str, Sequence[str]], places: set[str]) -> None:
    """Raise if there is no class, or a class folder has no image."""
    for place in places or {""}:
        at = join(folder, place) if place else folder
        folders = list_folder(at)[0]
        if not files:
            raise ModeclipError(
                f"task {name!r}: folder {at!r} has no "
                + ("images in its sub-folders" if folders else "sub-folders")
                + ": expected images in a folder for each class, a table (.parquet, .csv, .jsonl), a catalog, or"
                " CLIP_benchmark's layout (test/nshards.txt)"
            )
        for each in folders:
            if normal_form(each) not in files and not split_of(each) and not _holds_files(join(at, each)):
                raise ModeclipError(
                    f"task {name!r}: folder {join(at, each)!r} holds no image ({', '.join(FILE_SUFFIXES)}):"
                    " fill or remove it"
                )


def _found(name: str, root: str, folder: str, files: Mapping[str, list[str]], places: set[str]) -> Found:
    """Return the task of one split, given the files of each class."""
    at = join(folder, next(iter(places))) if len(places) == 1 and places != {""} else folder
    classes = sorted(files)
    if all(each.isdecimal() for each in classes):
        classes.sort(key=lambda each: (int(each), each))
    paths = [join(folder, file) for each in classes for file in files[each]]
    labels = [label for label, each in enumerate(classes) for _ in files[each]]
    classnames, named = read_lines(root, CLASSNAMES), True
    if classnames is None:
        classnames, named = tuple(classes), False
    elif len(classnames) != len(classes):
        raise ModeclipError(
            f"task {name!r}: {join(root, CLASSNAMES)!r} has {len(classnames):,} lines, expected one for each of"
            f" {len(classes):,} folders"
        )
    task = Task(
        name=name,
        kind="classification",
        images=FileImages(task=name, names=[path.removeprefix(f"{at}/") for path in paths], paths=paths),
        classnames=classnames,
        labels=np.array(labels, np.int64),
        source=at,
        **read_templates(root, classnames),
    )
    return Found(task=task, named=named)


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
