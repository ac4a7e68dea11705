"""Checks whether every file of a run, a catalog, a bundle or a model is as it was written (``check FOLDER --deep``)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from modeclip.clustering.clusters import CLUSTERING_FILE
from modeclip.clustering.fitting import (
    ClusterResult,
)
from modeclip.data.catalog import CATALOG, remedy_of
from modeclip.data.checksums import data_files, find_damaged, unknown_files
from modeclip.data.indexing import TASKS
from modeclip.data.storage import open_dataset
from modeclip.errors import DamagedError, ModeclipError
from modeclip.mixture.manifest import MANIFEST_FILE, read_manifest
from modeclip.models.deltas import WEIGHTS_FILE
from modeclip.pipeline.run_folder import RunFolder
from modeclip.pipeline.stages import read_record
from modeclip.system.files import (
    find_damage,
    hash_file,
    read_json,
)
from modeclip.system.paths import RunPaths, home, is_url, join
from modeclip.training.jobs import JOB_FILE, TrainJob, TrainResult


@dataclass(frozen=True, kw_only=True)
class FileState:
    """Whether a file is as it was written."""

    file: str
    """Its path."""
    state: Literal["whole", "damaged", "not known"]
    """Not known: an earlier version wrote it, and noted nothing of it."""
    detail: str = ""
    """What is wrong with it."""
    advice: str = ""
    """What to do."""


def verify(path: str) -> tuple[FileState, ...]:
    """Hash every file of a run, a catalog, a bundle or a model that something is noted of, and compare.

    Args:
        path: The folder; a catalog may lie in an object store.

    Returns:
        The files, the damaged ones first.

    Raises:
        ModeclipError: There is nothing of that kind in the folder.

    Price: every byte is read, 0.6 s for 1 GB from memory on one core.
    """
    found: dict[str, FileState] = {}

    def add(file: Path | str, what: str, advice: str) -> None:
        if what or str(file) not in found:
            state: Literal["whole", "damaged"] = "damaged" if what else "whole"
            found[str(file)] = FileState(file=str(file), state=state, detail=what, advice=advice if what else "")

    def add_unknown(file: Path | str, advice: str) -> None:
        found.setdefault(str(file), FileState(file=str(file), state="not known", advice=advice))

    path = path if is_url(path) else home(path)
    folder = Path(path)
    paths = RunPaths(folder=folder)
    is_run = not is_url(path) and paths.stages.is_dir()
    again = f"give the same modeclip run again (--out {folder})"
    names = [path] if path.rstrip("/").endswith(".lance") else [join(path, CATALOG), join(path, TASKS)]
    for uri in names:
        if is_url(uri) or Path(uri).is_dir():
            _verify_catalog(uri, add, add_unknown, again if is_run else "")
    if not is_url(path):
        for record in sorted(paths.stages.glob("*.json")):
            _verify_stage(record, folder, add, again)
        for done in sorted({*folder.glob("models/*/done.json"), *folder.glob("done.json")}):
            advice = again if is_run else "give the command that trained it again"
            _verify_model(done.parent, add, add_unknown, advice)
        for manifest in [place / MANIFEST_FILE for place in (folder, paths.bundle) if (place / MANIFEST_FILE).exists()]:
            advice = again if is_run else "get the bundle again"
            _verify_bundle(manifest, add, advice)
        if (paths.clusters / CLUSTERING_FILE).exists() and not is_run:
            try:
                ClusterResult.load(paths.clusters)
                add_unknown(paths.clusters / CLUSTERING_FILE, "")
            except ModeclipError as error:
                add(paths.clusters / CLUSTERING_FILE, str(error), f"modeclip cluster {folder}")
    if not found:
        raise ModeclipError(f"{path}: no run, catalog, bundle or finished model in it; correct the path")
    order = {"damaged": 0, "not known": 1, "whole": 2}
    return tuple(sorted(found.values(), key=lambda one: (order[one.state], one.file)))


def _verify_catalog(
    uri: str, add: Callable[[str, str, str], None], add_unknown: Callable[[str, str], None], again: str
) -> None:
    try:
        dataset = open_dataset(uri)
        damaged = {one["file"]: one for one in find_damaged(dataset, deep=True)}
    except DamagedError as error:
        add(uri, str(error), again or "modeclip index --replace")
        return
    except (OSError, ValueError) as error:
        if not is_url(uri):
            add(uri, f"no catalog ({str(error).splitlines()[0]})", again or "modeclip index")
        return
    unknown_names = set(unknown_files(dataset))
    for name in data_files(dataset):
        if name not in damaged and name not in unknown_names:
            add(f"{uri}/{name}", "", "")
    for name, one in damaged.items():
        columns = f"; it holds {', '.join(one['columns'])}" if one["columns"] else ""
        remedy = remedy_of(one["columns"][0], uri) if one["columns"] else "no need: only an older version needed it"
        add(f"{uri}/{name}", one["what"] + columns, again or remedy)
    for name in unknown_names:
        add_unknown(f"{uri}/{name}", "the next command that writes to the catalog notes it")


def _verify_stage(path: Path, root: Path, add: Callable[[Path, str, str], None], again: str) -> None:
    try:
        record = read_record(path, again)
    except DamagedError as error:
        add(path, str(error).removeprefix(f"{path}: ").removesuffix(f"; {again}"), again)
        return
    add(path, "", "")
    is_edited = record["name"] == "bundle" and RunFolder(folder=root).is_edited
    for name, note in ({} if is_edited else record.get("files", {})).items():
        what = find_damage(root / name, note, deep=True)
        if what != "missing" or not name.startswith("features/"):
            add(root / name, what, again)


def _verify_model(
    folder: Path, add: Callable[[Path, str, str], None], add_unknown: Callable[[Path, str], None], advice: str
) -> None:
    done = folder / "done.json"
    try:
        result = read_json(done, TrainResult, advice)
        TrainJob.load(folder / JOB_FILE)
    except DamagedError as error:
        add(done, str(error).removeprefix(f"{done}: ").removesuffix(f"; {advice}"), advice)
        return
    add(done, "", "")
    for name, note in result.files.items():
        what = find_damage(folder / name, note, deep=True)
        if what != "missing" or "/" not in name:  # a checkpoint may be removed
            add(folder / name, what, advice)
    if not result.files:
        add_unknown(folder / WEIGHTS_FILE, "")


def _verify_bundle(path: Path, add: Callable[[Path, str, str], None], advice: str) -> None:
    try:
        manifest, _ = read_manifest(path.parent)
    except ModeclipError as error:
        add(path, str(error), advice)
        return
    add(path, "", "")
    for name, wanted in manifest.sha256.items():
        file = path.parent / name
        what = "missing" if not file.is_file() else "" if hash_file(file) == wanted else "its bytes are not those noted"
        add(file, what, advice)
